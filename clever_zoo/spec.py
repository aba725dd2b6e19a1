"""The frozen description of one model, and its config.json that timm and transformers read too."""

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from clever_zoo.backbones import BACKBONES, model_args_problems, patch_size_px
from clever_zoo.embedding import Part
from clever_zoo.errors import SpecError

SCHEMA_VERSION = 1
CARD_FILENAME = "README.md"
CONFIG_FILENAME = "config.json"
CLASSIFIER_KEY = "clever_classifier"
WEIGHTS_FILENAME = "model.safetensors"
MAX_JSON_BYTES = 1 << 20
MAX_INPUT_SIZE_PX = 4096
_NAME = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,199}")  # it may name a folder
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PreprocessSpec(_Frozen):
    """How an image becomes pixels: short side resized (bicubic), centre cropped, normalised.

    Attributes:
        input_size_px: Side of the square the backbone sees.
        crop_pct: Side of the crop relative to the resized short side, as timm defines it.
        mean, std: Per RGB channel, on the 0..1 scale.
    """

    input_size_px: int = Field(224, ge=1, le=MAX_INPUT_SIZE_PX)
    crop_pct: float = Field(0.875, ge=0.01, le=1)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD

    @property
    def resize_px(self) -> int:
        """Length of the short side after resizing."""
        return math.floor(self.input_size_px / self.crop_pct)


class WeightFile(_Frozen):
    """A weights file by name, size and digest."""

    filename: str = Field(WEIGHTS_FILENAME, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)

    @classmethod
    def of(cls, content: bytes) -> Self:
        """Describe the content of a weights file."""
        return cls(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


class Provenance(_Frozen):
    """Where released weights come from.

    Attributes:
        recipe: Name of the file in training/recipes.
        commit: Commit of this repository that trained them.
        dataset: What they were trained on.
        license: SPDX identifier of the weights' licence.
    """

    recipe: str
    commit: str
    dataset: str
    license: str = "Apache-2.0"


class _Spec(_Frozen, ABC):
    @classmethod
    def create(cls, source: str = "model spec", /, **fields: Any) -> Self:
        """Validate fields into a spec.

        Raises:
            SpecError: Naming `source` and every unknown, missing or wrong field.
        """
        try:
            return cls.model_validate_json(json.dumps(fields, default=repr))
        except ValidationError as error:
            lines = "".join(f"\n  - {line}" for line in problem_lines(error))
            raise SpecError(f"{source}:{lines}") from error

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any], source: str) -> Self:
        """Read the content of a config.json; `source` is for the error message."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a config.json; see `from_config`.

        Raises:
            SpecError: If the file is missing, no JSON, or does not fit.
        """
        return cls.from_config(read_json(path), str(path))


def is_classifier(config: Any) -> bool:
    """Whether the content of a config.json describes a classifier and not an encoder."""
    return isinstance(config, dict) and CLASSIFIER_KEY in config


class ModelSpec(_Spec):
    """One model: what to build, how to feed it, where to cut its features.

    Attributes:
        name: Full name such as "clever-resnet18.fmnist", or a backbone id for fresh weights.
        backbone: One of `clever_zoo.list_backbones()`.
        invariant_dim: The first `invariant_dim` features are the invariant half.
        preprocess: The evaluation transform.
        model_args: timm arguments that differ from its defaults, such as img_size.
        weights: The weights file, None for a network that was never saved.
        provenance: Where released weights come from, else None.
    """

    name: str
    backbone: str
    invariant_dim: int = Field(ge=1)
    preprocess: PreprocessSpec = PreprocessSpec()
    model_args: dict[str, Any] = {}
    weights: WeightFile | None = None
    provenance: Provenance | None = None

    @model_validator(mode="after")
    def _check_backbone(self) -> Self:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name is {self.name[:100]!r}; use 1 to 200 characters, no slashes, no control "
                "characters and no dot at the beginning"
            )
        if self.backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {self.backbone!r}; use {', '.join(BACKBONES)}")
        problems = model_args_problems(self.backbone, self.model_args)
        if not problems:
            patch = patch_size_px(self.backbone, self.model_args)
            sizes = {
                "preprocess.input_size_px": self.preprocess.input_size_px,
                "model_args.img_size": self.model_args.get("img_size", patch),
            }
            problems = [
                f"{key} is {size}, which patches of {patch} pixels do not divide"
                for key, size in sizes.items()
                if size % patch
            ]
        if self.invariant_dim > self.feature_dim:
            problems.append(
                f"invariant_dim is {self.invariant_dim}, but {self.backbone} "
                f"has {self.feature_dim} features"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def weights_file(self, source: str | Path) -> WeightFile:
        """The weights file; `source` is for the error message.

        Raises:
            SpecError: If none is recorded.
        """
        if self.weights is None:
            raise SpecError(
                f"{source}: the spec of {self.name!r} records no weights file; save the model "
                "again with its save_pretrained"
            )
        return self.weights

    @property
    def feature_dim(self) -> int:
        """Width D of the features."""
        return BACKBONES[self.backbone].feature_dim

    @property
    def equivariant_dim(self) -> int:
        """Width of the equivariant half; 0 for an encoder without a split."""
        return self.feature_dim - self.invariant_dim

    def to_config(self) -> dict[str, Any]:
        """The content of config.json: timm's keys outside, this spec under `clever`."""
        info, p = BACKBONES[self.backbone], self.preprocess
        model_args = info.model_args | self.model_args
        return {
            "architecture": info.architecture,
            "num_classes": 0,
            "num_features": info.feature_dim,
            "global_pool": info.global_pool,
            **({"model_args": model_args} if model_args else {}),
            # Without it transformers takes the type of the stored tensors, which may be float16.
            "dtype": "float32",
            "pretrained_cfg": {
                "num_classes": 0,
                "input_size": [3, p.input_size_px, p.input_size_px],
                "crop_pct": p.crop_pct,
                "crop_mode": "center",
                "interpolation": "bicubic",
                "mean": list(p.mean),
                "std": list(p.std),
                "first_conv": info.first_conv,
                "classifier": info.classifier,
            },
            "clever": {"schema_version": SCHEMA_VERSION, **self.model_dump(mode="json")},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str) -> Self:
        """Read the `clever` part of a config.json strictly; the rest is timm's.

        Raises:
            SpecError: Naming `source` and every unknown, missing or wrong field; or if it
                describes a classifier.
        """
        if is_classifier(config):
            raise SpecError(
                f"{source} describes a classifier; load it with "
                "clever_zoo.Classifier.from_pretrained, whose attribute `encoder` is its encoder, "
                "or serve what `clever-zoo export` makes of it"
            )
        part = config.get("clever") if isinstance(config, dict) else None
        if not isinstance(part, dict):
            raise SpecError(
                f"{source} has no 'clever' section, so the split is unknown; "
                "load such a model with timm, or add the section (see the model cards)"
            )
        fields = _current_version(part, "clever", source)
        where = f"{source}, section 'clever'"
        spec = cls.create(where, **fields)
        _check_complete(spec, fields, where)
        return spec


class ClassifierSpec(_Spec):
    """A classifier: an encoder, and which part of its features a linear head reads.

    Attributes:
        encoder: The encoder; its `weights` describe the file that holds the head, too.
        num_classes: Number of classes C.
        part: What the head reads: "full", "invariant" or "equivariant".
        class_names: Name of each class, or None.
    """

    encoder: ModelSpec
    num_classes: int = Field(ge=2)
    part: Part = "full"
    class_names: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _check_across_fields(self) -> Self:
        names, problems = self.class_names, []
        if names is not None and len(names) != self.num_classes:
            problems.append(f"{len(names)} class_names for num_classes = {self.num_classes}")
        if names is not None and len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            problems.append(f"class_names must differ; these do not: {', '.join(twice)}")
        if not self.width:
            problems.append(
                f"part is {self.part!r}, but {self.encoder.name} has no such half; use 'full'"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def columns(self) -> slice:
        """Where the part lies in the features."""
        cut = self.encoder.invariant_dim
        return {"full": slice(None), "invariant": slice(cut), "equivariant": slice(cut, None)}[
            self.part
        ]

    @property
    def width(self) -> int:
        """Number of features that the head reads."""
        return len(range(self.encoder.feature_dim)[self.columns])

    def to_config(self) -> dict[str, Any]:
        """The content of config.json: timm's keys, the encoder's under `clever`, and our own."""
        config = self.encoder.to_config()
        own = self.model_dump(mode="json", exclude={"encoder"})
        # Always names: for 1,000 classes without them transformers would take ImageNet's.
        names = self.class_names or tuple(map(str, range(self.num_classes)))
        return config | {
            "num_classes": self.num_classes,
            "label_names": list(names),
            "pretrained_cfg": config["pretrained_cfg"] | {"num_classes": self.num_classes},
            CLASSIFIER_KEY: {"schema_version": SCHEMA_VERSION, **own},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str) -> Self:
        """Read the sections `clever_classifier` and `clever` of a config.json strictly.

        Raises:
            SpecError: If it does not fit, or describes an encoder.
        """
        part = config.get(CLASSIFIER_KEY) if isinstance(config, dict) else None
        if not isinstance(part, dict):
            raise SpecError(
                f"{source} has no section {CLASSIFIER_KEY!r}, so it is no classifier; put a head "
                "on an encoder with clever_zoo.create_classifier(source, num_classes)"
            )
        where = f"{source}, section {CLASSIFIER_KEY!r}"
        fields = _current_version(part, CLASSIFIER_KEY, source)
        if "encoder" in fields:
            raise SpecError(f"{where}:\n  - encoder: unknown key; it is the section 'clever'")
        rest = {key: value for key, value in config.items() if key != CLASSIFIER_KEY}
        encoder = ModelSpec.from_config(rest, source).model_dump(mode="json")
        spec = cls.create(where, encoder=encoder, **fields)
        _check_complete(spec, {"encoder": encoder, **fields}, where)
        return spec


def read_config(config: Any, source: str) -> ModelSpec | ClassifierSpec:
    """The spec of an encoder or a classifier, whichever a config.json describes.

    Args:
        config: The content of config.json.
        source: For the error message.

    Raises:
        SpecError: If it does not fit.
    """
    kind = ClassifierSpec if is_classifier(config) else ModelSpec
    return kind.from_config(config, source)


def encoder_spec(spec: ModelSpec | ClassifierSpec) -> ModelSpec:
    """The spec of an encoder, also of a classifier's."""
    return spec.encoder if isinstance(spec, ClassifierSpec) else spec


def _current_version(part: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    """The fields of a section without its version, which must be this release's."""
    fields = dict(part)
    version = fields.pop("schema_version", None)
    if type(version) is not int or version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "upgrade clever-zoo" if newer else "save the model again with save_pretrained"
        raise SpecError(
            f"{source}: {name}.schema_version is {version!r}, this release reads "
            f"{SCHEMA_VERSION}; {advice}"
        )
    return fields


def _check_complete(spec: BaseModel, fields: dict[str, Any], where: str) -> None:
    """Written by this release a section is complete: a default must not stand in for a value."""
    if absent := missing_keys(spec.model_dump(mode="json"), fields):
        raise SpecError(f"{where}:" + "".join(f"\n  - {key}: missing" for key in absent))


def read_json(path: Path) -> Any:
    """The content of a config.json.

    Raises:
        SpecError: If the file cannot be read, is larger than 1 MiB, or is no JSON.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError as error:
        raise SpecError(f"{path} does not exist; a model folder holds {path.name}") from error
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error}") from error
    return parse_json(content, str(path))


def parse_json(content: str | bytes, source: str) -> Any:
    """The value of a config.json's content; `source` is for the error message.

    Raises:
        SpecError: If it is larger than 1 MiB, or no JSON.
    """
    if len(content) > MAX_JSON_BYTES:
        raise SpecError(
            f"{source} is larger than {MAX_JSON_BYTES} bytes, the most that is read; "
            "a model's description is a few thousand"
        )
    try:
        return json.loads(content if isinstance(content, str) else content.decode())
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, huge numbers
        raise SpecError(f"{source} is not valid JSON: {error}") from error


def missing_keys(complete: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the keys of `complete` that `given` lacks, at any depth."""
    names: list[str] = []
    for key, value in complete.items():
        if key not in given:
            names.append(f"{prefix}{key}")
        elif isinstance(value, dict) and isinstance(given[key], dict):
            names += missing_keys(value, given[key], f"{prefix}{key}.")
    return names


def problem_lines(error: ValidationError) -> list[str]:
    """One readable line for each mistake that pydantic found."""
    lines: list[str] = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        prefix = f"{where}: " if where else ""
        if item["type"] == "extra_forbidden":
            lines.append(f"{prefix}unknown key (value {item['input']!r})")
        elif item["type"] == "missing":
            lines.append(f"{prefix}missing")
        elif item["type"] == "value_error":
            lines.extend(prefix + line for line in str(item["ctx"]["error"]).splitlines())
        else:
            lines.append(f"{prefix}{item['msg']} (value {item['input']!r})")
    return lines
