"""VMamba: blocks that read an image as four sequences, through a state-space recurrence.

Maps are NCHW between stages and NHWC inside them, where a normalisation or a linear layer of
each pixel is one plain operation.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, SelectAdaptivePool2d, create_classifier
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clever_zoo.backbones import BACKBONES
from clever_zoo.backbones.scan import cross_merge, cross_scan, selective_scan
from clever_zoo.errors import ShapeError, SpecError
from clever_zoo.spec import IMAGENET_MEAN, IMAGENET_STD

DIRECTIONS = 4
NORM_EPS = 1e-5
INIT_STD = 0.02
MIN_STEP, MAX_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4

VARIANTS: dict[str, dict[str, Any]] = {
    "vmamba_tiny": {"embed_dim": 96, "depths": (2, 2, 8, 2), "drop_path_rate": 0.2},
    "vmamba_small": {"embed_dim": 96, "depths": (2, 2, 20, 2), "drop_path_rate": 0.3},
    "vmamba_base": {"embed_dim": 128, "depths": (2, 2, 20, 2), "drop_path_rate": 0.6},
}
_INFO = BACKBONES["vmamba_tiny"]
_DEFAULT_CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "first_conv": _INFO.first_conv,
    "classifier": _INFO.classifier,
}


class SS2D(nn.Module):
    """The two-dimensional selective scan: every pixel hears all others, in four directions.

    Shapes: (B, H, W, C) -> (B, H, W, C).

    Source: VMamba, forward type v05_noz with one state and no gate.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dt_rank = math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, self.dt_rank + 2, dim))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, dim, self.dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, dim))
        self.A_logs = nn.Parameter(torch.zeros(DIRECTIONS * dim, 1))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * dim))
        self.out_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        nn.init.uniform_(self.x_proj_weight, -(dim**-0.5), dim**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        low, high = (torch.tensor(step).log() for step in (MIN_STEP, MAX_STEP))
        with torch.no_grad():
            steps = (low + torch.rand(DIRECTIONS, dim) * (high - low)).exp().clamp(min=STEP_FLOOR)
            self.dt_projs_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus inverted

    def forward(self, x: Tensor) -> Tensor:
        """Mix the pixels of each map."""
        height, width = x.shape[1:3]
        maps = F.silu(self.conv2d(self.in_proj(x).permute(0, 3, 1, 2)))
        sequences = cross_scan(maps)  # (B, 4, C, H * W)
        projected = self.x_proj_weight @ sequences
        steps, b, c = projected.split([self.dt_rank, 1, 1], dim=2)
        scanned = selective_scan(
            sequences,
            _softplus(self.dt_projs_weight @ steps + self.dt_projs_bias[..., None]),
            -self.A_logs.exp().view(DIRECTIONS, -1),
            b.squeeze(2),
            c.squeeze(2),
            self.Ds.view(DIRECTIONS, -1),
        )
        merged = cross_merge(scanned, height, width).permute(0, 2, 3, 1)
        return self.out_proj(self.out_norm(merged.to(self.out_norm.weight.dtype)))


def _softplus(x: Tensor) -> Tensor:
    if torch.compiler.is_exporting():  # onnxruntime's own operator is slow
        return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
    return _Softplus.apply(x)


class _Softplus(torch.autograd.Function):
    """Softplus that keeps its result for the gradient, as the scan does, and not its input too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = F.softplus(x)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return gradient * -torch.expm1(-result)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, (..., C) -> (..., C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Widen, bend, narrow."""
        hidden = self.fc1(x)
        if not self.training:
            return self._narrow(hidden)
        # Of the two widest tensors of a block one is made again for the gradient: the GELU alone
        # is computed twice, as the recomputation ends where the linear layer has its input.
        return checkpoint(self._narrow, hidden, use_reentrant=False, preserve_rng_state=False)

    def _narrow(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(hidden))


class Block(nn.Module):
    """Two residual branches, the scan and an MLP; (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.op = SS2D(dim)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches."""
        x = x + self.drop_path1(self.op(self.norm(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Blocks(nn.Sequential):
    """The blocks of a stage; (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply one after the other."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class VMamba(nn.Module):
    """The backbone with timm's interface; parameters carry the names of the authors' files.

    Args:
        in_chans: Channels of the pixels.
        num_classes: Width of the classifier; 0 for none.
        global_pool: timm's name of the pooling, "" for none.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        depths: Blocks of each stage.
        drop_rate: Dropout of the pooled features.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0.

    Shapes: (B, 3, H, W), any H and W from 1, -> (B, num_classes), or (B, D) without classes.
    """

    global_pool: SelectAdaptivePool2d

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
    ) -> None:
        super().__init__()
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"layers.{stage}.blocks"}
            for stage, dim in enumerate(dims)
        ]
        self.patch_embed = nn.Sequential(
            *_halving(in_chans, embed_dim // 2),
            nn.Identity(),
            nn.GELU(),
            *_halving(embed_dim // 2, embed_dim),
        )
        count = sum(depths)
        rates = (drop_path_rate * i / max(count - 1, 1) for i in range(count))
        self.layers = nn.Sequential()
        for dim, depth in zip(dims, depths, strict=True):
            blocks = Blocks(*(Block(dim, next(rates)) for _ in range(depth)))
            last = dim == dims[-1]
            down = nn.Identity() if last else nn.Sequential(nn.Identity(), *_halving(dim, 2 * dim))
            self.layers.append(nn.Sequential(OrderedDict(blocks=blocks, downsample=down)))
        self.classifier = nn.ModuleDict({"norm": LayerNorm2d(dims[-1], eps=NORM_EPS)})
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_linear)

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised map of the last stage, (B, C, H, W) -> (B, D, h, w).

        Raises:
            ShapeError: For another rank or channel count, or sides of zero.
        """
        return self.classifier["norm"](self.layers(self._embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map of `forward_features` and, unless `pre_logits`, classify it."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.classifier["head"](x)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels to logits, or to pooled features without a classifier."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of some stages, as timm's convolutional networks return them.

        Args:
            x: Pixels (B, 3, H, W).
            indices: Stages: the last n, a list of indices, or None for all.
            norm: Normalise the last stage's map.
            stop_early: Compute no stage after the last one that is wanted.
            output_fmt: "NCHW".
            intermediates_only: Return the list alone, without what `forward_features` returns.

        Raises:
            ShapeError: See `forward_features`; or for another format.
        """
        if output_fmt != "NCHW":
            raise ShapeError(f"output_fmt is {output_fmt!r}; VMamba's maps are 'NCHW'")
        taken, last = feature_take_indices(len(self.layers), indices)
        x = self._embed(x)
        maps = []
        for index, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            blocks, downsample = stage.children()
            x = blocks(x)
            if index in taken:
                maps.append(x)
            if not (stop_early and index == last):
                x = downsample(x)
        if index == len(self.layers) - 1:
            x = self.classifier["norm"](x)
            if norm and index in taken:
                maps[-1] = x
        return maps if intermediates_only else (x, maps)

    def get_classifier(self) -> nn.Module:
        """The last layer, from pooled features to logits."""
        return self.classifier["head"]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier on; 0 classes for none."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.classifier["head"] = create_classifier(
            self.num_features, num_classes, pool_type=pool_type
        )

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the layers from the pixels on, as `timm.models.group_parameters` reads."""
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99999,)),  # with the block before
            (r"^classifier\.norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of the recurrence's own parameters: rates, step sizes and what passes it by."""
        kept = (".A_logs", ".Ds", ".dt_projs_bias")
        return {name for name, _ in self.named_parameters() if name.endswith(kept)}

    def _embed(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            raise ShapeError(
                f"pixels have shape {tuple(x.shape)}; expected (B, {self.in_chans}, H, W) with H "
                "and W of at least 1"
            )
        return self.patch_embed(x)


def _halving(in_chans: int, out_chans: int) -> tuple[nn.Module, ...]:
    """Half the sides, rounded up; the identity keeps the numbers of the authors' layers."""
    conv = nn.Conv2d(in_chans, out_chans, 3, stride=2, padding=1)
    return conv, nn.Identity(), LayerNorm2d(out_chans, eps=NORM_EPS)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create_vmamba(
    variant: str, pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any
) -> nn.Module:
    """Build a variant as timm builds its models: same arguments, `features_only` too.

    Args:
        variant: "vmamba_tiny", "vmamba_small" or "vmamba_base".
        pretrained: Fill it from the source that `pretrained_cfg` names.
        pretrained_cfg: timm's; None for ImageNet's preprocessing and no weights.
        **kwargs: For `VMamba` and timm's `build_model_with_cfg`.

    Raises:
        SpecError: For an unknown variant.
    """
    if variant not in VARIANTS:
        raise SpecError(f"unknown VMamba {variant!r}; use one of {', '.join(VARIANTS)}")
    return build_model_with_cfg(
        VMamba,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg or {"architecture": variant, **_DEFAULT_CFG},
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **VARIANTS[variant] | kwargs,
    )
