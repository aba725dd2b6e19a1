"""``torch.hub.load(<checkout or owner/repo>, "clever_resnet18")``: one function per backbone."""

from collections.abc import Callable as _Callable
from typing import Any as _Any

from clever_zoo.backbones import BACKBONES as _BACKBONES
from clever_zoo.embedding import default_cut as _default_cut
from clever_zoo.encoder import Encoder as _Encoder
from clever_zoo.encoder import create_encoder as _create_encoder
from clever_zoo.encoder import from_pretrained as _from_pretrained
from clever_zoo.registry import list_models as _list_models

dependencies = ["torch", "timm", "safetensors", "pydantic", "numpy", "PIL"]

_DOC = """Encoder with backbone {backbone}: {feature_dim} features cut at {cut}.

Call it with normalised pixels (B, 3, H, W), or its `embed` with images, for an `Embedding`
whose `invariant` and `equivariant` halves are {cut} and {rest} wide.
Released weights: {released}.

Args:
    pretrained: Released weights, in evaluation mode; else random ones, in training mode.
    tag: Which released weights, as after the dot of their name; None for those of `{model}`.
    **kwargs: For `clever_zoo.from_pretrained` or, without weights, `create_encoder`.

Raises:
    UnknownModelError: If no such weights are released; it names the recipe that makes them.
"""


def _entry_point(backbone: str) -> _Callable[..., _Encoder]:
    model = f"clever-{backbone.replace('_', '-')}"

    def load(pretrained: bool = True, tag: str | None = None, **kwargs: _Any) -> _Encoder:
        if pretrained:
            return _from_pretrained(f"{model}.{tag}" if tag else model, **kwargs)
        return _create_encoder(backbone, **kwargs)

    feature_dim = _BACKBONES[backbone].feature_dim
    cut = _default_cut(feature_dim)
    load.__name__ = load.__qualname__ = f"clever_{backbone}"
    load.__doc__ = _DOC.format(
        backbone=backbone,
        feature_dim=feature_dim,
        cut=cut,
        rest=feature_dim - cut,
        model=model,
        released=", ".join(f"`{name}`" for name in _list_models(f"{model}.*")) or "none",
    )
    return load


globals().update({f"clever_{backbone}": _entry_point(backbone) for backbone in _BACKBONES})
