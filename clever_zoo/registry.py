"""The published models. A name is listed here only when its weights are."""

import difflib
import fnmatch
import re
from pathlib import Path
from typing import NamedTuple

from clever_zoo.backbones import BACKBONES, backbone_info
from clever_zoo.errors import UnknownModelError
from clever_zoo.sources import is_onnx_path
from clever_zoo.spec import ModelSpec, PreprocessSpec, Provenance, WeightFile

RELEASED: tuple[ModelSpec, ...] = (
    ModelSpec(
        name="clever-resnet18.fmnist",
        backbone="resnet18",
        invariant_dim=409,
        preprocess=PreprocessSpec(input_size_px=32, crop_pct=1.0),
        weights=WeightFile(
            sha256="b78e78df406cafbda060b806d53f6dfc45256ed0fa507b1e4cccd303b6878f04",
            size_bytes=22_421_088,
        ),
        provenance=Provenance(
            recipe="clever-resnet18.fmnist",
            commit="a78eeb47a993b8c29600fad53e9a7cc1531abf35",
            dataset="fashion-mnist",
        ),
    ),
    ModelSpec(
        name="clever-resnet18.fmnist_plus",
        backbone="resnet18",
        invariant_dim=409,
        preprocess=PreprocessSpec(input_size_px=32, crop_pct=1.0),
        weights=WeightFile(
            sha256="21b3dab1c7ce327f8fa49823dbb934df89eddfb4462c61f29cca452553156789",
            size_bytes=22_421_088,
        ),
        provenance=Provenance(
            recipe="clever-resnet18.fmnist_plus",
            commit="e7901d53f95ff8b04284b490de16c844065d71c1",
            dataset="fashion-mnist",
        ),
    ),
    ModelSpec(
        name="clever-resnet50.fmnist",
        backbone="resnet50",
        invariant_dim=1638,
        preprocess=PreprocessSpec(input_size_px=32, crop_pct=1.0),
        weights=WeightFile(
            sha256="b29bc659b368a6800e926367dbf4161caff3b1780757e6641715c4c346cbba3c",
            size_bytes=47_362_880,
        ),
        provenance=Provenance(
            recipe="clever-resnet50.fmnist",
            commit="085b4aaf8450a7253228d39ccb8628648e55f47b",
            dataset="fashion-mnist",
        ),
    ),
    ModelSpec(
        name="clever-vit-tiny.fmnist",
        backbone="vit_tiny",
        invariant_dim=153,
        preprocess=PreprocessSpec(input_size_px=32, crop_pct=1.0),
        model_args={"img_size": 32, "patch_size": 4},
        weights=WeightFile(
            sha256="0bbdfd7f6e81a44777fa3341a5b9e924e45562325631e007993f438677441b18",
            size_bytes=10_754_024,
        ),
        provenance=Provenance(
            recipe="clever-vit-tiny.fmnist",
            commit="afd9961ac7ab71b682c2d6909f7f844241fbcbed",
            dataset="fashion-mnist",
        ),
    ),
)

# The released weights that a name without a tag stands for.
DEFAULT_TAGS = {
    "clever-resnet18": "fmnist",
    "clever-resnet50": "fmnist",
    "clever-vit-tiny": "fmnist",
}

DEFAULT_MODEL = "clever-resnet50"  # where a command is given no model


class HubPin(NamedTuple):
    """Where a released model lies on the Hub.

    Attributes:
        repo_id: "org/name".
        commit: All 40 digits, so that no later push changes what a release loads.
    """

    repo_id: str
    commit: str


# Full name -> its pin; written after a push, see RELEASING.md. Without one the network is never
# asked for a released name. It is no part of the spec: a commit cannot stand in its own files.
HUB_PINS: dict[str, HubPin] = {}

_MODELS = {spec.name: spec for spec in RELEASED}
_RECIPES = Path(__file__).parents[1] / "training" / "recipes"


def list_models(pattern: str = "*", *, backbone: str | None = None) -> tuple[str, ...]:
    """Full names of the released models.

    Args:
        pattern: Shell-style filter, such as "clever-*" or "*.fmnist".
        backbone: Only models with this backbone id.

    Raises:
        UnknownModelError: If `backbone` is no backbone.
    """
    if backbone is not None:
        backbone_info(backbone)
    return tuple(
        spec.name
        for spec in RELEASED
        if fnmatch.fnmatchcase(spec.name, pattern) and backbone in (None, spec.backbone)
    )


def timm_name(full_name: str) -> str:
    """The name under which timm knows a model: underscores before the tag."""
    model, dot, tag = full_name.partition(".")
    return f"{model.replace('-', '_')}{dot}{tag}"


def released(full_name: str) -> ModelSpec | None:
    """The spec of a released model, None if nothing was released under this full name."""
    return _MODELS.get(full_name)


def model_info(name: str) -> ModelSpec:
    """The spec of a released model, by full name or by the name without its tag.

    Raises:
        UnknownModelError: With close matches, or with the recipe that would make it.
    """
    full_name = f"{name}.{DEFAULT_TAGS[name]}" if name in DEFAULT_TAGS else name
    if spec := released(full_name):
        return spec
    known = re.fullmatch(
        r"(?:clever-simsiam|clever|dino|simsiam)-([a-z0-9-]+?)(\.[a-z0-9_-]+)?", name
    )
    if known and known[1].replace("-", "_") in BACKBONES:
        raise UnknownModelError(
            f"{name!r} has no released weights (released: {', '.join(_MODELS) or 'none'}); "
            f"{_recipe_hint(name if known[2] else f'{name}.fmnist')}, or start from random "
            f"weights with clever_zoo.create_encoder({known[1].replace('-', '_')!r})"
        )
    close = difflib.get_close_matches(name, [*_MODELS, *DEFAULT_TAGS], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    folder = len(name) < 256 and Path(name).is_dir()
    local = f"For the local folder write 'local-dir:{name}'. " if folder else ""
    if is_onnx_path(name):
        local = "An ONNX file is opened with clever_zoo.OnnxEncoder.from_pretrained. "
    raise UnknownModelError(
        f"unknown model {name!r}; {hint}{local}"
        f"Released: {', '.join(_MODELS) or 'none'}. See clever_zoo.list_models()."
    )


def _recipe_hint(recipe: str) -> str:
    """What to train; outside a checkout it is not known which recipes there are."""
    if _RECIPES.is_dir() and not (_RECIPES / f"{recipe}.toml").is_file():
        return f"there is no recipe {recipe!r} either, see training/recipes for those there are"
    return (
        f"train it in a checkout with `python -m training.pretrain {recipe}` "
        f"(recipe training/recipes/{recipe}.toml)"
    )
