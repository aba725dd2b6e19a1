"""Backbones in foreign checkpoints: which one it is, and its tensors under the names used here."""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from clever_zoo.backbones import BACKBONES
from clever_zoo.errors import CheckpointError

State = dict[str, Tensor]


class FoundBackbone(NamedTuple):
    """A backbone recognised by its tensors.

    Attributes:
        title: Its usual name, such as "ResNet-50".
        backbone: Its name here, "" for one that this package does not have.
        model_args: timm arguments that differ from its defaults.
        note: What to know about it, or "".
    """

    title: str
    backbone: str = ""
    model_args: Mapping[str, Any] = MappingProxyType({})
    note: str = ""


# Bottleneck blocks or not, blocks in each stage: usual name, name here.
_RESNETS: dict[tuple[bool, tuple[int, ...]], tuple[str, str]] = {
    (False, (2, 2, 2, 2)): ("ResNet-18", "resnet18"),
    (False, (3, 4, 6, 3)): ("ResNet-34", ""),
    (True, (3, 4, 6, 3)): ("ResNet-50", "resnet50"),
    (True, (3, 4, 23, 3)): ("ResNet-101", ""),
    (True, (3, 8, 36, 3)): ("ResNet-152", ""),
}
# Width: usual name, blocks, name here.
_VITS = {
    192: ("ViT-Tiny", 12, "vit_tiny"),
    384: ("ViT-Small", 12, "vit_small"),
    768: ("ViT-Base", 12, ""),
    1024: ("ViT-Large", 24, ""),
    1280: ("ViT-Huge", 32, ""),
}
# Channels of the first stage, blocks in each stage, widening inside a block: usual name, name here.
_VMAMBAS: dict[tuple[int, tuple[int, ...], float], tuple[str, str]] = {
    (96, (2, 2, 8, 2), 1): ("VMamba-Tiny (s1l8)", "vmamba_tiny"),
    (96, (2, 2, 5, 2), 2): ("VMamba-Tiny (s2l5, upstream's vmambav2_tiny_224)", ""),
    (96, (2, 2, 20, 2), 1): ("VMamba-Small (s1l20)", ""),
    (96, (2, 2, 15, 2), 2): ("VMamba-Small (s2l15)", ""),
    (128, (2, 2, 20, 2), 1): ("VMamba-Base (s1l20)", ""),
    (128, (2, 2, 15, 2), 2): ("VMamba-Base (s2l15)", ""),
}
_VMAMBA_NOTE = (
    "the VMamba-Tiny that the CLeVER authors call vmambav2_tiny_224 is s1l8, upstream's "
    "vmambav2v_tiny_224; upstream's own vmambav2_tiny_224 is another network, s2l5"
)
_VIT_NOTE = (
    "at other sizes than {size} px timm resamples the position embeddings with antialiasing, "
    "DINO's code without: features differ slightly there"
)
# Part of a tensor's name: what has such tensors.
_OTHERS = {
    "relative_position_bias_table": "a Swin Transformer",
    "local_mp.": "an XCiT",
    "dwconv.": "a ConvNeXt",
    "conv_dw.": "a ConvNeXt or another network of depthwise convolutions",
}

# Patterns and replacements that lead from others' names to timm's, and for VMamba to upstream's
# present ones.
_RESNET_NAMES = ((r"\.shortcut\.", ".downsample."),)  # DDCL's own ResNet
_VMAMBA_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^norm\.", "classifier.norm."),
)


def rename(tensors: Mapping[str, Tensor]) -> State:
    """A backbone's tensors under the names used here.

    Args:
        tensors: Of the backbone alone, without wrappers' prefixes and heads.
    """
    is_vmamba = any(key.endswith(".A_logs") for key in tensors)
    renamed = {}
    for key, value in tensors.items():
        for pattern, replacement in _VMAMBA_NAMES if is_vmamba else _RESNET_NAMES:
            key = re.sub(pattern, replacement, key)
        if is_vmamba and value.ndim == 4 and re.search(r"\.(in_proj|out_proj|fc1|fc2)\.", key):
            value = value.flatten(1)  # a linear layer that was written as a 1x1 convolution
        renamed[key] = value
    return renamed


def recognise(tensors: Mapping[str, Tensor], source: str) -> FoundBackbone:
    """Tell by names and shapes which backbone it is.

    Args:
        tensors: As `rename` gives them.
        source: For the error message.

    Raises:
        CheckpointError: If it is none that this package has, or its tensors are contradictory.
    """
    try:
        found = _recognise(tensors)
    except (LookupError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{source} holds part of a backbone, or tensors of other shapes: {error!r}"
        ) from error
    if found.backbone not in BACKBONES:
        raise CheckpointError(
            f"{source} holds {found.title}, which is not among the backbones here: "
            f"{', '.join(BACKBONES)}{found.note and '; '}{found.note}"
        )
    return found


def _recognise(tensors: Mapping[str, Tensor]) -> FoundBackbone:
    if "layer1.0.conv1.weight" in tensors:
        return _resnet(tensors)
    if "cls_token" in tensors and "pos_embed" in tensors:
        return _vit(tensors)
    if "layers.0.blocks.0.op.A_logs" in tensors:
        return _vmamba(tensors)
    for part, title in _OTHERS.items():
        if any(part in key for key in tensors):
            return FoundBackbone(title)
    some = ", ".join(list(tensors)[:5]) or "none"
    return FoundBackbone(f"an unknown network ({len(tensors)} tensors: {some}, ...)")


def _resnet(tensors: Mapping[str, Tensor]) -> FoundBackbone:
    depths = tuple(_count(tensors, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    is_bottleneck = "layer1.0.conv3.weight" in tensors
    unknown = f"a ResNet with {depths} blocks", ""
    title, backbone = _RESNETS.get((is_bottleneck, depths), unknown)
    width = tuple(tensors["layer1.0.conv2.weight"].shape[:2])
    if width != (64, 64):
        return FoundBackbone(f"a {title} with wide or grouped convolutions {width}")
    return FoundBackbone(title, backbone)


def _vit(tensors: Mapping[str, Tensor]) -> FoundBackbone:
    width, patch = tensors["cls_token"].shape[-1], tensors["patch_embed.proj.weight"].shape[-1]
    depth, positions = _count(tensors, r"blocks\.(\d+)\."), tensors["pos_embed"].shape[1] - 1
    title, usual_depth, backbone = _VITS.get(width, (f"a ViT of width {width}", depth, ""))
    grid = math.isqrt(positions)
    if depth != usual_depth or grid * grid != positions:
        return FoundBackbone(f"a {title}/{patch} of {depth} blocks, {positions} positions")
    size = grid * patch
    model_args = {"img_size": size} if size != 224 else {}
    model_args |= {"patch_size": patch} if patch != 16 else {}
    return FoundBackbone(f"{title}/{patch}", backbone, model_args, _VIT_NOTE.format(size=size))


def _vmamba(tensors: Mapping[str, Tensor]) -> FoundBackbone:
    depths = tuple(_count(tensors, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4))
    channels = tensors["layers.0.blocks.0.op.out_proj.weight"].shape[0]
    ratio = tensors["layers.0.blocks.0.op.out_norm.weight"].shape[0] / channels
    unknown = f"a VMamba of {channels} channels, {depths} blocks, widening {ratio:g}", ""
    title, backbone = _VMAMBAS.get((channels, depths, ratio), unknown)
    return FoundBackbone(title, backbone, note=_VMAMBA_NOTE)


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for key in tensors if (found := re.match(pattern, key))})
