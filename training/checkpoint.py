"""Checkpoints: one safetensors file that holds everything a run needs to go on to the bit."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from clever_zoo.errors import CheckpointError, RecipeError
from clever_zoo.files import write_atomic
from training.config import Recipe, parse_recipe


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys such as "head.prototypes"."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def recipe_difference(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One line for each value in which two recipes (as dictionaries) differ."""
    a, b = flatten(saved), flatten(current)
    return [
        f"{key}: checkpoint {a.get(key)!r}, recipe {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def save_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    progress: dict[str, Any],
) -> None:
    """Write modules, optimiser state, generator state and progress in one atomic step.

    Args:
        modules: Name (without dots) to module, such as student and teacher.
        progress: Plain numbers to get back from `load_checkpoint`, such as the step.
    """
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, module in modules.items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    header = {
        "progress": json.dumps(progress),
        "recipe": recipe.model_dump_json(),
        "sha256": _digest(tensors),
    }
    write_atomic(path, save(tensors, metadata=header))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Content(NamedTuple):
    tensors: dict[str, Tensor]
    recipe: dict[str, Any]
    progress: dict[str, Any]


def _read(path: Path) -> _Content:
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            tensors, header = {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
        content = _Content(tensors, json.loads(header["recipe"]), json.loads(header["progress"]))
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is no readable checkpoint of this project ({error!r}); "
            "delete it to start afresh"
        ) from error
    if header.get("sha256") != (actual := _digest(tensors)):
        raise CheckpointError(
            f"{path} is damaged: its tensors have sha256 {actual}, written was "
            f"{header.get('sha256')}; delete it to start afresh"
        )
    return content


def _under(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
) -> dict[str, Any]:
    """Put a run back where `save_checkpoint` left it; returns the saved progress.

    Raises:
        CheckpointError: If the file cannot be read or was written under another recipe.
    """
    tensors, saved_recipe, progress = _read(path)
    changes = recipe_difference(saved_recipe, recipe.model_dump(mode="json"))
    if changes:
        lines = "".join(f"\n  - {line}" for line in changes)
        raise CheckpointError(
            f"{path} was written under another recipe:{lines}\n"
            "Go on with that recipe, or train into another folder (--out)."
        )
    for name, module in modules.items():
        module.load_state_dict(_under(tensors, name))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _under(tensors, "optimizer").items():
        index, field = key.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # The fused kernel reads raw memory: moments must be laid out as their parameter.
            value = torch.empty_like(parameter).copy_(value)
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return progress


def load_recipe_and_teacher(path: Path) -> tuple[Recipe, dict[str, Tensor], dict[str, Any]]:
    """The recipe, the teacher backbone's tensors (the product) and the progress of a run.

    Raises:
        CheckpointError: If the file cannot be read or its recipe is of another release.
    """
    tensors, saved_recipe, progress = _read(path)
    try:
        recipe = parse_recipe(saved_recipe, str(path))
    except RecipeError as error:
        raise CheckpointError(f"the recipe in a checkpoint does not fit: {error}") from error
    if changes := recipe_difference(saved_recipe, recipe.model_dump(mode="json")):
        raise CheckpointError(
            f"{path} was written by another release, whose recipe differs: {'; '.join(changes)}"
        )
    return recipe, _under(tensors, "teacher"), progress
