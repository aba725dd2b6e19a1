"""The backbones by name: what timm calls them and how wide their features are."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from clever_zoo.errors import BackendMissingError, SpecError, UnknownModelError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BackboneInfo:
    """One backbone family member.

    Attributes:
        architecture: timm's model name, as written to config.json; timm knows a VMamba after
            `import clever_zoo.timm`.
        feature_dim: Width D of the pooled features.
        global_pool: timm's name of the pooling that makes them.
        model_args: Arguments that differ from timm's defaults whatever the input size.
        allowed_args: Further timm arguments that a spec may set.
        init_args: Further ones that only random weights depend on; no spec holds them.
        classifier: Name of the layer that timm would put a classifier at.
        first_conv: Name of the layer that reads the pixels.
        int8: How it is quantised for ONNX: "static", with ranges of activations from calibration
            images, or "dynamic", its matrix products with ranges from each batch.
    """

    architecture: str
    feature_dim: int
    global_pool: str
    classifier: str
    first_conv: str
    int8: Literal["static", "dynamic"]
    model_args: dict[str, Any] = field(default_factory=dict)
    allowed_args: tuple[str, ...] = ("drop_rate", "drop_path_rate")
    init_args: dict[str, Any] = field(default_factory=dict)


def _resnet(architecture: str, feature_dim: int) -> BackboneInfo:
    # The reference starts every batch-norm gain at one; timm would zero the last of a block.
    ones = {"zero_init_last": False}
    return BackboneInfo(architecture, feature_dim, "avg", "fc", "conv1", "static", init_args=ones)


def _vit(architecture: str, feature_dim: int) -> BackboneInfo:
    dynamic = {"dynamic_img_size": True}  # multi-crop training feeds two sizes
    allowed = ("img_size", "patch_size", "drop_rate", "drop_path_rate")
    return BackboneInfo(
        architecture, feature_dim, "token", "head", "patch_embed.proj", "dynamic", dynamic, allowed
    )


def _vmamba(architecture: str, feature_dim: int) -> BackboneInfo:
    return BackboneInfo(
        architecture, feature_dim, "avg", "classifier.head", "patch_embed.0", "dynamic"
    )


BACKBONES: dict[str, BackboneInfo] = {
    "resnet18": _resnet("resnet18", 512),
    "resnet50": _resnet("resnet50", 2048),
    "vit_tiny": _vit("vit_tiny_patch16_224", 192),
    "vit_small": _vit("vit_small_patch16_224", 384),
    "vmamba_tiny": _vmamba("vmamba_tiny", 768),
}


# In pixels: beyond any model, but nothing that a description alone can fill the memory with.
_LARGEST = {"img_size": 1024, "patch_size": 64}


def list_backbones() -> tuple[str, ...]:
    """Names that `create_encoder` and training recipes accept."""
    return tuple(BACKBONES)


def patch_size_px(name: str, model_args: dict[str, Any]) -> int:
    """Side of a patch, which must divide the input's; 1 for a backbone that takes any size."""
    if "patch_size" not in BACKBONES[name].allowed_args:
        return 1
    return model_args.get("patch_size", 16)


def backbone_info(name: str) -> BackboneInfo:
    """Look a backbone up.

    Raises:
        UnknownModelError: If there is no such backbone; suggests close matches.
    """
    if name not in BACKBONES:
        close = difflib.get_close_matches(name.replace("-", "_"), BACKBONES, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UnknownModelError(
            f"unknown backbone {name!r}; available: {', '.join(BACKBONES)}{hint}"
        )
    return BACKBONES[name]


def model_args_problems(name: str, model_args: dict[str, Any]) -> list[str]:
    """What is wrong with a backbone's timm arguments, one line each; empty if nothing is."""
    allowed = BACKBONES[name].allowed_args
    problems = []
    for key, value in model_args.items():
        largest = _LARGEST.get(key)
        if key not in allowed:
            problems.append(
                f"model_args.{key}: not an argument of {name}; use {', '.join(allowed)}"
            )
        elif isinstance(value, bool) or not isinstance(value, int if largest else int | float):
            problems.append(f"model_args.{key} is {value!r}; use a number")
        elif not 1 <= value <= largest if largest else not 0 <= value < 1:
            allowed_range = f"1 to {largest}" if largest else "0 to 1"
            problems.append(f"model_args.{key} is {value!r}; use {allowed_range}")
    return problems


def _creator(name: str) -> Callable[..., "nn.Module"]:
    """Whose function builds a backbone: ours or timm's."""
    if name.startswith("vmamba"):
        from clever_zoo.backbones.vmamba import create_vmamba

        return create_vmamba
    import timm

    return timm.create_model


def build_backbone(name: str, **model_args: Any) -> "nn.Module":
    """Build a randomly initialised backbone, without a classifier.

    Args:
        name: One of `list_backbones()`.
        **model_args: timm arguments that differ from its defaults, such as `img_size`.

    Returns:
        A module (B, 3, H, W) -> (B, D).

    Raises:
        UnknownModelError: For an unknown name.
        SpecError: For arguments that this backbone does not take.
        BackendMissingError: If timm is not installed.
    """
    info = backbone_info(name)
    if problems := model_args_problems(name, model_args):
        raise SpecError("; ".join(problems))
    try:
        create = _creator(name)
    except ImportError as error:
        raise BackendMissingError(
            f"{error.name} is not installed, and building {name!r} needs it: "
            'pip install "clever-zoo[torch]"'
        ) from error
    arguments = info.init_args | info.model_args | model_args
    try:
        return create(info.architecture, num_classes=0, **arguments)
    except AssertionError as error:
        raise SpecError(f"timm cannot build {name!r} with {model_args}: {error}") from error
