"""The student backbone as the reference starts it, and the multi-crop forward pass."""

from itertools import groupby

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from clever_zoo.backbones import build_backbone
from training import ema
from training.config import BackboneConfig


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
    drop_path = {"drop_path_rate": config.drop_path_rate} if config.drop_path_rate else {}
    student = build_backbone(config.name, **config.model_args, **drop_path)
    if isinstance(student, VisionTransformer):
        nn.init.trunc_normal_(student.cls_token, std=0.02)
        student.__class__ = _DinoVisionTransformer
    return student


def build_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy of the student in which no path is dropped, as in the reference."""
    teacher = ema.frozen_copy(student)
    for module in teacher.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return teacher


def forward_views(backbone: nn.Module, views: list[Tensor]) -> Tensor:
    """Features of all views, views of one size in one pass: V x (B, 3, s, s) -> (V, B, D)."""
    passes = [
        backbone(torch.cat(list(group))) for _, group in groupby(views, key=lambda v: v.shape[-1])
    ]
    return torch.cat(passes).unflatten(0, (len(views), -1))
