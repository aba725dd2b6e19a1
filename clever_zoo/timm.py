"""Importing this module registers the backbones with timm, and with them every released model.

>>> import timm, clever_zoo.timm
>>> model = timm.create_model("clever_resnet18.fmnist", pretrained=True)

Names are those of `clever_zoo.list_models()` with underscores before the tag; a backbone without
released weights has one too, for random weights. A name with released weights builds the network
that takes them, with them or without: `clever_vit_tiny` is one for 32 pixels in patches of 4,
unless `img_size` and `patch_size` say otherwise. The models are timm's own modules, or our VMamba,
and return the full features, or logits of a fresh classifier with `num_classes=N`.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clever_zoo.backbones import BACKBONES
from clever_zoo.errors import BackendMissingError
from clever_zoo.hub import HubOptions
from clever_zoo.locate import locate_model
from clever_zoo.registry import DEFAULT_TAGS, RELEASED, model_info, released, timm_name
from clever_zoo.spec import ModelSpec

try:
    from timm.models import (
        PretrainedCfg,
        generate_default_cfgs,
        model_entrypoint,
        register_model,
        resolve_pretrained_cfg,
    )
    from torch import nn

    from clever_zoo.backbones.vmamba import VARIANTS, create_vmamba
except ImportError as error:
    raise BackendMissingError(
        f'{error.name} is not installed: pip install "clever-zoo[torch]"'
    ) from error


def _described_models() -> dict[str, dict[str, Any] | PretrainedCfg]:
    """timm's name -> what it knows of a model; a tag that ends in * is the default one."""
    described: dict[str, dict[str, Any] | PretrainedCfg] = {}
    for spec in RELEASED:
        model, _, tag = spec.name.partition(".")
        mark = "*" if DEFAULT_TAGS.get(model) == tag else ""
        # timm lists as pretrained what has a source; `_with_weights` finds the file behind it.
        config = spec.to_config()["pretrained_cfg"] | {"url": spec.name}
        described[timm_name(spec.name) + mark] = config
    models = {name.partition(".")[0] for name in described}
    for backbone, info in BACKBONES.items():
        if f"clever_{backbone}" not in models:
            fresh = ModelSpec(name=backbone, backbone=backbone, invariant_dim=info.feature_dim)
            described[f"clever_{backbone}"] = fresh.to_config()["pretrained_cfg"]
    return described


default_cfgs = generate_default_cfgs(_described_models())  # the name that timm looks for


def _create(
    backbone: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    model = f"clever-{backbone.replace('_', '-')}"
    if isinstance(pretrained_cfg, str):
        model_info(f"{model}.{pretrained_cfg}")  # timm's error for another tag names no recipe
    cfg = resolve_pretrained_cfg(f"clever_{backbone}", pretrained_cfg)
    spec = released(str(cfg.url))
    cfg = dataclasses.replace(cfg, **(pretrained_cfg_overlay or {}))
    if pretrained:
        cfg = _with_weights(cfg, model, kwargs.get("cache_dir"))
    info = BACKBONES[backbone]
    arguments = info.init_args | info.model_args | (spec.model_args if spec else {}) | kwargs
    create = model_entrypoint(info.architecture)
    return create(pretrained=pretrained, pretrained_cfg=cfg, **arguments)


def _with_weights(cfg: PretrainedCfg, model: str, cache_dir: str | Path | None) -> PretrainedCfg:
    """The cfg with the verified file of a released model, unless it names weights of its own."""
    if cfg.state_dict or cfg.file or cfg.hf_hub_id or (cfg.url and not released(str(cfg.url))):
        return cfg
    options = HubOptions(cache_dir=Path(cache_dir) if cache_dir else None)
    _, weights = locate_model(str(cfg.url or model), options)
    return dataclasses.replace(cfg, file=str(weights))


def _register(name: str, create: Callable[..., nn.Module]) -> None:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(pretrained=pretrained, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    globals()[name] = register_model(entry_point)


for _variant in VARIANTS:  # timm itself knows the other architectures
    _register(_variant, functools.partial(create_vmamba, _variant))
for _backbone in BACKBONES:
    _register(f"clever_{_backbone}", functools.partial(_create, _backbone))
