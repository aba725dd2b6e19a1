"""``torch.hub.load(<checkout or owner/repo>, "clever_resnet18")``: one function per backbone."""

from typing import Any

from clever_zoo.encoder import Encoder, create_encoder, from_pretrained

dependencies = ["torch", "timm", "safetensors", "pydantic", "numpy", "PIL"]


def clever_resnet18(pretrained: bool = True, **kwargs: Any) -> Encoder:
    """ResNet-18, 512 features cut at 409. Call it with pixels (B, 3, H, W), or use `.embed`.

    Args:
        pretrained: Released weights `clever-resnet18`, in evaluation mode; else random ones.
        **kwargs: For `clever_zoo.from_pretrained` or, without weights, `create_encoder`.
    """
    return _load("resnet18", pretrained, kwargs)


def clever_resnet50(pretrained: bool = True, **kwargs: Any) -> Encoder:
    """ResNet-50, 2048 features cut at 1638; arguments as for `clever_resnet18`.

    Raises UnknownModelError, which names the recipe, while no weights are released.
    """
    return _load("resnet50", pretrained, kwargs)


def clever_vit_tiny(pretrained: bool = True, **kwargs: Any) -> Encoder:
    """ViT-Tiny, 192 features cut at 153; arguments as for `clever_resnet18`.

    Raises UnknownModelError, which names the recipe, while no weights are released.
    """
    return _load("vit_tiny", pretrained, kwargs)


def clever_vit_small(pretrained: bool = True, **kwargs: Any) -> Encoder:
    """ViT-Small, 384 features cut at 307; arguments as for `clever_resnet18`.

    Raises UnknownModelError, which names the recipe, while no weights are released.
    """
    return _load("vit_small", pretrained, kwargs)


def clever_vmamba_tiny(pretrained: bool = True, **kwargs: Any) -> Encoder:
    """VMamba-Tiny, 768 features cut at 614; arguments as for `clever_resnet18`.

    Raises UnknownModelError, which names the recipe, while no weights are released.
    """
    return _load("vmamba_tiny", pretrained, kwargs)


def _load(backbone: str, pretrained: bool, kwargs: dict[str, Any]) -> Encoder:
    if pretrained:
        return from_pretrained(f"clever-{backbone.replace('_', '-')}", **kwargs)
    return create_encoder(backbone, **kwargs)
