"""The recipe: everything that decides what a training run computes, in one strict schema.

Defaults are the values of the paper's released scripts; a recipe file states what differs.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import Field, PositiveFloat, ValidationError, field_validator, model_validator

from clever_zoo.backbones import BACKBONES, model_args_problems
from clever_zoo.embedding import default_cut
from clever_zoo.errors import RecipeError
from clever_zoo.spec import IMAGENET_MEAN, IMAGENET_STD, problem_lines
from training.clever import CleverSection
from training.methods import METHODS, DinoSection, MethodRow
from training.reference_views import ELASTIC_MIN_SIZE_PX
from training.schema import Section
from training.views import STYLES, Pipeline, Strength, StyleName

RECIPES = Path(__file__).parent / "recipes"
SMOKE_BATCH_SIZE = 8

AnySection = TypeVar("AnySection", bound=Section)

MethodSection = Annotated[
    Union[tuple(row.section for row in METHODS.values())],  # noqa: UP007
    Field(discriminator="name"),
]

_DATASET_KEYS = {  # keys of the data section that mean something to one data set only
    "huggingface": [
        "hf_name",
        "hf_config",
        "hf_train_split",
        "hf_test_split",
        "image_column",
        "label_column",
    ],
    "webdataset": ["shards", "test_shards"],
    "fake": ["fake_images"],
}


class DataConfig(Section):
    """What to train on, how it is kept and how pixels are normalised."""

    dataset: Literal[
        "fashion-mnist",
        "image-folder",
        "huggingface",
        "webdataset",
        "cub-200",
        "flowers-102",
        "food-101",
        "oxford-pets",
        "fake",
    ]
    cache: Literal["memory", "disk", "stream"] = "memory"  # decoded images: where, or each time
    image_size_px: int = Field(256, ge=8)  # the square that is kept; fashion-mnist has its own
    max_bad_images: int = Field(100, ge=0)  # unreadable training images that may be replaced
    hf_name: str | None = None  # huggingface: org/name on the Hub, or a folder (absolute or ./)
    hf_config: str | None = None
    hf_train_split: str = "train"
    hf_test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    shards: str | None = None  # webdataset: such as train-{000000..000146}.tar or https://...
    test_shards: str | None = None
    fake_images: int = Field(1024, ge=1)  # fake: images in each split
    crop_pct: float = Field(0.875, gt=0, le=1)  # of the released encoder's evaluation transform
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD

    @model_validator(mode="after")
    def _check_dataset(self) -> "DataConfig":
        problems = []
        for dataset, keys in _DATASET_KEYS.items():
            extra = [k for k in keys if getattr(self, k) != DataConfig.model_fields[k].default]
            if extra and dataset != self.dataset:
                problems.append(f"{', '.join(extra)}: for {dataset!r}, not for {self.dataset!r}")
        if self.dataset == "huggingface" and self.hf_name is None:
            problems.append("hf_name is missing; write org/name or the path of a folder")
        if self.dataset == "webdataset" and self.shards is None:
            problems.append("shards is missing; write a pattern such as train-{000000..000146}.tar")
        if self.dataset == "fashion-mnist" and self.cache != "memory":
            problems.append(f"cache is {self.cache!r}; fashion-mnist is always held in memory")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class BackboneConfig(Section):
    """The network; `model_args` goes to timm and into the released spec.

    The reference's teacher drops no path but VMamba's, which drops as many as its student.
    `zero_init_residual` starts every residual block of a ResNet as its shortcut.
    """

    name: str
    model_args: dict[str, Any] = Field({})
    drop_path_rate: float = Field(0.0, ge=0, lt=1)
    teacher_drop_path_rate: float = Field(0.0, ge=0, lt=1)
    zero_init_residual: bool = False
    freeze_patch_embed: bool = False  # MoCo v3 on a ViT

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in BACKBONES:
            raise ValueError(f"is {name!r}; use one of {', '.join(BACKBONES)}")
        return name

    @model_validator(mode="after")
    def _check_model_args(self) -> "BackboneConfig":
        if problems := model_args_problems(self.name, self.model_args):
            raise ValueError("\n".join(problems))
        if "drop_path_rate" in self.model_args:
            raise ValueError("model_args.drop_path_rate: set backbone.drop_path_rate instead")
        if self.teacher_drop_path_rate and not self.drop_path_rate:
            raise ValueError(
                f"teacher_drop_path_rate is {self.teacher_drop_path_rate}, but the network has no "
                "paths to drop: set drop_path_rate"
            )
        if self.freeze_patch_embed and not self.name.startswith("vit"):
            raise ValueError(f"freeze_patch_embed is for a ViT, not {self.name}")
        if self.zero_init_residual and not self.name.startswith("resnet"):
            raise ValueError(f"zero_init_residual is for a ResNet, not {self.name}")
        return self


class ViewsConfig(Section):
    """The list of views: two global ones, then the local ones of a style that has them."""

    pipeline: Pipeline = "batched"  # "reference": the same views image by image, for comparison
    style: StyleName = "dino"
    strength: Strength = "caug"
    global_size_px: int = Field(224, ge=8)
    local_size_px: int = Field(96, ge=8)
    local_views: int = Field(8, ge=0)
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    disc_mask: bool = False  # black outside the inscribed circle of every view

    @field_validator("global_scale", "local_scale")
    @classmethod
    def _check_scale(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"is {list(scale)}; use 0 < low <= high <= 1")
        return scale

    @model_validator(mode="after")
    def _check_across_fields(self) -> "ViewsConfig":
        problems = []
        if self.local_views and STYLES[self.style].local_role is None:
            problems.append(
                f"local_views is {self.local_views}; style {self.style!r} has none, so write "
                "local_views = 0"
            )
        sizes = {self.global_size_px} | ({self.local_size_px} if self.local_views else set())
        too_small = [size for size in sorted(sizes) if size < ELASTIC_MIN_SIZE_PX]
        if too_small and (self.pipeline, self.strength) == ("reference", "caug_plus"):
            problems.append(
                f"views of {too_small} px; torchvision's elastic transformation, which pipeline "
                f"'reference' uses for caug_plus, needs {ELASTIC_MIN_SIZE_PX}: use larger views "
                "or pipeline = 'batched'"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class OptimizerConfig(Section):
    """The optimiser and its schedules; defaults are those of the DINO form.

    Attributes:
        lr_per_256: Peak learning rate at batch 256, scaled linearly with the batch.
        schedule: Whether the learning rate changes at every step or at every epoch.
        extra_warmup_epochs: Whole epochs before the first one, at a learning rate that rises
            epoch by epoch, after which the optimiser starts afresh (the SimSiam form).
        weight_decay, weight_decay_end: Cosine from one to the other, step by step.
        weight_decay_policy: What decays: "dino", all but biases and vectors (the reference);
            "model", the same without what the backbone names as not to be decayed; "all".
        clip_norm: Greatest gradient norm, 0 for no clipping.
        clip_scope: Norm of each "tensor" on its own (the reference), or of all ("global").
        fixed_predictor_lr: The predictor's learning rate stays at the peak.
    """

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr_per_256: float = Field(5e-4, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)  # sgd and lars
    schedule: Literal["step", "epoch"] = "step"
    warmup_epochs: float = Field(10, ge=0)
    extra_warmup_epochs: int = Field(0, ge=0)
    weight_decay: float = Field(0.04, ge=0)
    weight_decay_end: float = Field(0.4, ge=0)
    weight_decay_policy: Literal["dino", "model", "all"] = "dino"
    clip_norm: float = Field(3.0, ge=0)
    clip_scope: Literal["tensor", "global"] = "tensor"
    fixed_predictor_lr: bool = False


class RunConfig(Section):
    """How the arithmetic is done.

    Attributes:
        smoke: A miniature of the recipe: two steps on made-up images, on a CPU in seconds.
        precision: "fp16" (with a loss scale) and "bf16" compute matrix products and convolutions
            in half precision; weights and losses stay in float32.
        compile: Compile the backbones, a ViT's blocks as one; changes rounding alone.
        small_map_products: Convolutions on maps of a few pixels as matrix products; changes
            rounding alone. ResNet-50's passes at 32 pixels are 2.1 times as fast on a CPU.
        accumulation_steps: Parts in which a process takes its share of a batch.
    """

    smoke: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    small_map_products: bool = False
    accumulation_steps: int = Field(1, ge=1)


class Recipe(Section):
    """One training run. `load_recipe` reads it from TOML; with a `clever` section it is CLeVER."""

    name: str
    seed: int = Field(0, ge=0, lt=2**63)
    epochs: int = Field(200, ge=1)
    batch_size: int = Field(512, ge=2)
    data: DataConfig
    backbone: BackboneConfig
    method: MethodSection = DinoSection()  # type: ignore[valid-type]
    clever: CleverSection | None = None
    views: ViewsConfig = ViewsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check_across_sections(self) -> "Recipe":
        problems = []
        cut = self.clever and self.clever.invariant_dim
        if cut is not None and cut >= self.feature_dim:
            problems.append(
                f"clever.invariant_dim is {cut}; {self.backbone.name} has {self.feature_dim} "
                "features, and both halves need one"
            )
        if self.views.local_views and not self.method_row.build.multi_crop:
            problems.append(
                f"views.local_views is {self.views.local_views}; {self.method.name} takes two "
                "views, so it must be 0"
            )
        parts = self.run.accumulation_steps
        if self.batch_size % parts:
            problems.append(
                f"run.accumulation_steps is {parts}, which does not divide batch_size "
                f"{self.batch_size}"
            )
        if parts > 1 and self._couples_batch:
            problems.append(
                f"run.accumulation_steps is {parts}, but the loss of {self.method.name} compares "
                "the images of a batch: it cannot be taken part by part, so it must be 1"
            )
        patch = self.backbone.model_args.get("patch_size", 16)
        keys = (
            ("global_size_px", "local_size_px") if self.views.local_views else ("global_size_px",)
        )
        for key in keys:
            size = getattr(self.views, key)
            if self.backbone.name.startswith("vit") and size % patch:
                problems.append(f"views.{key} is {size}; a ViT needs a multiple of patch {patch}")
        if self.optimizer.warmup_epochs >= self.epochs:
            problems.append(
                f"optimizer.warmup_epochs is {self.optimizer.warmup_epochs}, "
                f"which leaves nothing of {self.epochs} epochs"
            )
        problems += self._idle_options()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _idle_options(self) -> list[str]:
        """Options that are set and would change nothing."""
        problems = []
        if self.clever is None:
            problems = [
                f"method.{key} is {getattr(self.method, key)}, which concerns the equivariant "
                "half alone: add a [clever] section or leave it out"
                for key in ("equivariant_center", "equivariant_variance_weight")
                if key in type(self.method).model_fields
                and getattr(self.method, key) != type(self.method).model_fields[key].default
            ]
        if self.optimizer.fixed_predictor_lr and not self.method_row.build.has_predictor:
            problems.append(
                f"optimizer.fixed_predictor_lr is set, but {self.method.name} has no predictor: "
                "leave it out"
            )
        return problems

    @property
    def feature_dim(self) -> int:
        """Width D of the backbone's features."""
        return BACKBONES[self.backbone.name].feature_dim

    @property
    def invariant_dim(self) -> int:
        """Where the features are cut: the recipe's own value, int(0.8 D), or D without CLeVER."""
        if self.clever is None:
            return self.feature_dim
        return self.clever.invariant_dim or default_cut(self.feature_dim)

    @property
    def method_row(self) -> MethodRow:
        """The class of the method beside its section."""
        return METHODS[self.method.name]

    @property
    def total_epochs(self) -> int:
        """All epochs, those of the extra warm-up too."""
        return self.optimizer.extra_warmup_epochs + self.epochs

    @property
    def _couples_batch(self) -> bool:
        build, clever = self.method_row.build, self.clever
        if clever is None or build.couples_batch:
            return build.couples_batch
        signed = self.method.name != "dino"  # cosines of probabilities have no sign
        mean_first = (clever.orthogonality_reduction or build.reduction) == "mean_abs"
        return bool((signed and mean_first) or clever.alignment_weight)

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up."""
        return self.optimizer.lr_per_256 * self.batch_size / 256


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file or by the name of a bundled one.

    A file may say `extends = ["parts/a", ...]`: those files (relative to it, without .toml) are
    merged in order, and its own values go over theirs.

    Args:
        source: A path that ends in .toml, or a name such as "clever-resnet18.fmnist".
        overrides: Values that go over the file's, such as "optimizer.lr_per_256=1e-3"; the right
            side is TOML, or a bare word.

    Raises:
        RecipeError: If there is no such recipe, it is no TOML, or it has mistakes; lists all.
    """
    path = Path(source)
    if path.suffix != ".toml":
        path = RECIPES / f"{source}.toml"
    if not path.is_file():
        bundled = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise RecipeError(str(source), [f"no such recipe; pass a .toml file or one of: {bundled}"])
    content = {"name": path.stem, **_read_extended(path, ())}
    for override in overrides:
        content = merged(content, parse_override(override))
    recipe = parse_recipe(content, str(path))
    return smoke_version(recipe) if recipe.run.smoke else recipe


def _read_extended(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if path in children:
        raise RecipeError(str(children[0]), [f"{path} extends itself"])
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(str((*children, path)[0]), [f"cannot be read: {error}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"not valid TOML: {error}"]) from error
    content: dict[str, Any] = {}
    parents = own.pop("extends", [])
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise RecipeError(str(path), [f'extends is {parents!r}; use a list such as ["parts/a"]'])
    for parent in parents:
        content = merged(content, _read_extended(path.parent / f"{parent}.toml", (*children, path)))
    return merged(content, own)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, table by table.

    `model_args` is one value, and a method of another name brings none of the other's options.
    """
    result = dict(below)
    for key, value in above.items():
        tables = isinstance(value, dict) and isinstance(result.get(key), dict)
        if tables and key != "model_args" and not _other_method(key, result[key], value):
            value = merged(result[key], value)
        result[key] = value
    return result


def _other_method(key: str, below: dict[str, Any], above: dict[str, Any]) -> bool:
    return key == "method" and "name" in above and above["name"] != below.get("name", "dino")


def parse_override(override: str) -> dict[str, Any]:
    """KEY=VALUE as nested tables; the right side is TOML, or a bare word.

    Raises:
        RecipeError: If it is not of that form.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(override, ["an override is KEY=VALUE, such as epochs=1"])
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def smoke_version(recipe: Recipe) -> Recipe:
    """The same recipe in miniature: two steps on made-up images, small heads, batch and views."""
    content = recipe.model_dump()
    content |= {"name": f"{recipe.name}-smoke", "epochs": 1, "batch_size": SMOKE_BATCH_SIZE}
    small = {"prototypes": 64, "hidden_dim": 64, "bottleneck_dim": 32, "output_dim": 32}
    content["method"] |= {k: v for k, v in small.items() if k in content["method"]}
    content["optimizer"] |= {"warmup_epochs": 0.0, "extra_warmup_epochs": 0}
    content["run"] = {"smoke": True}
    kept = ("image_size_px", "crop_pct", "mean", "std")
    content["data"] = {key: content["data"][key] for key in kept} | {
        "dataset": "fake",
        "image_size_px": min(content["data"]["image_size_px"], 64),
        "fake_images": 2 * SMOKE_BATCH_SIZE,
    }
    views = content["views"]
    views |= {
        "global_size_px": min(views["global_size_px"], 64),
        "local_size_px": min(views["local_size_px"], 32),
        "local_views": min(views["local_views"], 2),
    }
    return parse_recipe(content, f"smoke version of {recipe.name}")


def parse_recipe(content: dict[str, Any], source: str) -> Recipe:
    """Validate the content of a recipe; see `parse_section`."""
    return parse_section(Recipe, content, source)


def parse_section(kind: type[AnySection], content: dict[str, Any], source: str) -> AnySection:
    """Validate the content of a recipe or of one of its sections.

    Raises:
        RecipeError: Naming `source` and all mistakes.
    """
    try:
        # As JSON, because strict validation takes a list for a tuple there only.
        return kind.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise RecipeError(source, problem_lines(error)) from error
