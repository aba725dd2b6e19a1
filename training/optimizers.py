"""The optimiser of a recipe, its parameter groups, and its schedules."""

from collections.abc import Iterable

import torch
from timm.optim import Lars
from torch import Tensor, nn

from training.config import OptimizerConfig, Recipe
from training.schedules import cosine, warmup_cosine

LARS_TRUST = 0.001


def build_optimizer(config: OptimizerConfig, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
    """The optimiser over every trained parameter; learning rates are set at each step.

    Its groups carry `decays` and `fixed_lr`; empty ones are left out. LARS is timm's: it adapts
    every tensor but biases and vectors, by |w| / (|g| + decay |w|) where the reference divides by
    |g + decay w|; under the policy "all", which lets vectors decay, it adapts them too.
    """
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for module in modules:
        spared = module.no_weight_decay() if hasattr(module, "no_weight_decay") else set()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                fixed = config.fixed_predictor_lr and "predictor" in name
                decays = _decays(config, name, parameter, spared)
                adapts = config.name == "lars" and not _is_vector(name, parameter)
                groups.setdefault((decays, fixed, adapts), []).append(parameter)
    described = [
        {"params": parameters, "decays": decays, "fixed_lr": fixed, "weight_decay": 0.0}
        | ({"always_adapt": adapts} if config.name == "lars" else {})
        for (decays, fixed, adapts), parameters in sorted(
            groups.items(), reverse=True, key=lambda group: group[0]
        )
    ]
    match config.name:
        case "adamw":
            return torch.optim.AdamW(described, lr=0.0, fused=True)
        case "sgd":
            return torch.optim.SGD(described, lr=0.0, momentum=config.momentum)
        case "lars":
            return Lars(described, lr=0.0, momentum=config.momentum, trust_coeff=LARS_TRUST)


def _decays(config: OptimizerConfig, name: str, parameter: Tensor, spared: set[str]) -> bool:
    if config.weight_decay_policy == "all":
        return True
    spared_here = config.weight_decay_policy == "model" and name in spared
    return not _is_vector(name, parameter) and not spared_here


def _is_vector(name: str, parameter: Tensor) -> bool:
    return name.endswith(".bias") or parameter.ndim == 1


def set_schedules(
    optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, steps_per_epoch: int
) -> dict[str, float]:
    """Set the learning rate and weight decay of a step in every group.

    The optimiser's own state is forgotten where an extra warm-up ends.

    Returns:
        `lr`, `weight_decay`, and `momentum`, the teacher's (1 without a teacher).
    """
    o = recipe.optimizer
    total = recipe.total_epochs * steps_per_epoch
    warm_from = o.extra_warmup_epochs * steps_per_epoch
    if step == warm_from:
        optimizer.state.clear()
    lr = learning_rate(recipe, step, steps_per_epoch)
    decay = cosine(step, total, o.weight_decay, o.weight_decay_end)
    for group in optimizer.param_groups:
        group["lr"] = recipe.peak_lr if group["fixed_lr"] and step >= warm_from else lr
        group["weight_decay"] = decay if group["decays"] else 0.0
    start = getattr(recipe.method, "ema_momentum", 1.0)
    return {"lr": lr, "weight_decay": decay, "momentum": cosine(step, total, start, 1.0)}


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The scheduled learning rate of a step; see `OptimizerConfig`."""
    o = recipe.optimizer
    epoch = step // steps_per_epoch
    if epoch < o.extra_warmup_epochs:
        return recipe.peak_lr * epoch / o.extra_warmup_epochs
    step -= o.extra_warmup_epochs * steps_per_epoch
    if o.schedule == "epoch":
        step = step // steps_per_epoch * steps_per_epoch
    return warmup_cosine(
        step,
        recipe.epochs * steps_per_epoch,
        int(o.warmup_epochs * steps_per_epoch),
        recipe.peak_lr,
        o.min_lr,
    )


def clip_gradients(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> Tensor:
    """Clip unscaled gradients in place; returns the norm of all of them before, a scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    # In float64, because squares of finite gradients can overflow float32.
    norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float64))
    total = torch.linalg.vector_norm(norms)
    if config.clip_norm:
        measured = norms if config.clip_scope == "tensor" else total.expand(len(gradients))
        scales = (config.clip_norm / (measured + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(scales.float().unbind()))
    return total
