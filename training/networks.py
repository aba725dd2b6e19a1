"""The student backbone as the reference starts it, and the multi-crop forward pass."""

from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from clever_zoo.backbones import build_backbone
from training import ema
from training.config import BackboneConfig
from training.drop_path import choose_paths, use_sampled_drop_path


class _DinoVisionTransformer(VisionTransformer):
    """timm's ViT with the reference's rule for position embeddings of another grid.

    The reference resizes by the scale factor (n + 0.1) / n0 without antialiasing; timm resizes
    to the target size with it. At the native size both leave the embeddings alone.
    """

    def _pos_embed(self, x: Tensor) -> Tensor:
        grid = x.shape[1:3]
        native = self.patch_embed.grid_size
        cls_position, positions = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if tuple(grid) != tuple(native):
            table = positions.unflatten(1, native).permute(0, 3, 1, 2)
            scale = [(n + 0.1) / n0 for n, n0 in zip(grid, native, strict=True)]
            table = F.interpolate(table, scale_factor=scale, mode="bicubic")
            positions = table.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
        return self.pos_drop(tokens + torch.cat([cls_position, positions], dim=1))


def build_student(config: BackboneConfig, seed: int) -> nn.Module:
    """A fresh backbone, the same for the same seed: (B, 3, H, W) -> (B, D).

    Source: the authors' code starts ResNets as torchvision does and the ViT's class token with
    a standard deviation of 0.02.
    """
    torch.manual_seed(seed)
    model_args = {"drop_path_rate": config.drop_path_rate} | config.model_args
    student = build_backbone(config.name, **model_args)
    use_sampled_drop_path(student)
    if config.zero_init_residual:
        zero_last_gains(student)
    if isinstance(student, VisionTransformer):
        nn.init.trunc_normal_(student.cls_token, std=0.02)
        student.__class__ = _DinoVisionTransformer
        student.patch_embed.requires_grad_(not config.freeze_patch_embed)
    return student


def zero_last_gains(network: nn.Module) -> None:
    """Let every residual block of a ResNet start as its shortcut (Goyal et al. 2017)."""
    for block in network.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            block.zero_init_last()


def build_teacher(student: nn.Module, config: BackboneConfig) -> nn.Module:
    """A frozen copy of the student, which drops as many paths as the recipe says."""
    teacher = ema.frozen_copy(student)
    if config.drop_path_rate:
        use_sampled_drop_path(teacher, config.teacher_drop_path_rate / config.drop_path_rate)
    return teacher


def compile_network(network: nn.Module) -> None:
    """Compile a ViT block by block, which are alike: once for all of them; another one whole."""
    for module in network.blocks if isinstance(network, VisionTransformer) else [network]:
        module.compile()


def forward_views(
    backbone: nn.Module,
    views: list[Tensor],
    samples: NDArray[np.integer],
    *,
    seed: int,
    epoch: int,
    first_view: int = 0,
    together: bool = True,
) -> Tensor:
    """Features of all views: V x (B, 3, s, s) -> (V, B, D).

    Args:
        samples: Index of each image in the data set, (B,); with seed and epoch it keys the
            dropped paths.
        first_view: Number of the first view in those keys.
        together: Views of one size in one pass, so that batch-norm sees them as one batch; or
            each view in a pass of its own.
    """
    numbers = range(len(views))
    passes = (
        [list(group) for _, group in groupby(numbers, key=lambda i: views[i].shape[-1])]
        if together
        else [[i] for i in numbers]
    )
    features = []
    for group in passes:
        keys = range(first_view + group[0], first_view + group[-1] + 1)
        choose_paths(backbone, samples, keys, seed=seed, epoch=epoch)
        features.append(backbone(torch.cat([views[i] for i in group])))
    return torch.cat(features).unflatten(0, (len(views), -1))
