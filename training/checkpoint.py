"""Checkpoints: one safetensors file that holds everything a run needs to go on to the bit.

Tensors and JSON alone: nothing in such a file can be executed.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from clever_zoo.errors import CheckpointError, RecipeError
from clever_zoo.files import write_atomic
from training.config import Recipe, parse_recipe

CHECKPOINT = "checkpoint.safetensors"


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


class RunState:
    """Everything that changes in a run: networks, optimiser, loss scale, generators.

    Args:
        objective: Its children are saved under their names.
        recipe: Written into the checkpoint; another one's checkpoint is refused.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        self._objective = objective
        self._optimizer = optimizer
        self._scaler = scaler
        self._recipe = recipe
        self._device = device

    def save(self, path: Path, progress: dict[str, Any]) -> None:
        """Write the state and `progress`, plain numbers, in one atomic step.

        Raises:
            OSError: If the file cannot be written (the disk is full); an earlier one is intact.
        """
        tensors = {"rng.cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self._device)
        tensors |= self._objective.state_dict()
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        header = {
            "progress": json.dumps(progress),
            "recipe": self._recipe.model_dump_json(),
            "scaler": json.dumps(self._scaler.state_dict()),
            "sha256": _digest(tensors),
        }
        try:
            write_atomic(path, save(tensors, metadata=header))
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; the last checkpoint is intact: make room and run the same "
                "command again",
                str(path),
            ) from error

    def resume(self, folder: Path, fixed: dict[str, Any], *, elastic: bool) -> dict[str, Any]:
        """Go back to where `save` left off, if there is a checkpoint.

        Args:
            fixed: Values of the progress that must be what they were.
            elastic: `world_size` may differ.

        Returns:
            The saved progress, or that of a fresh run.

        Raises:
            CheckpointError: If the file cannot be read, or was written under another recipe, on
                other data or by another number of processes; lists all differences.
        """
        path = folder / CHECKPOINT
        if not path.exists():
            return {"step": 0, "seconds": 0.0}
        check_resumable(path, self._recipe, fixed, elastic=elastic)
        content = _read(path)
        tensors = content.tensors
        self._objective.load_state_dict(
            {k: v for k, v in tensors.items() if not k.startswith(("optimizer.", "rng."))}
        )
        self._load_optimizer(_under(tensors, "optimizer"))
        self._scaler.load_state_dict(content.scaler)
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self._device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self._device)
        return content.progress

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        groups = self._optimizer.state_dict()["param_groups"]
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, field = key.split(".", 1)
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:
                # The fused kernel reads raw memory: moments must be laid out as their parameter.
                value = torch.empty_like(parameter).copy_(value)
            state.setdefault(int(index), {})[field] = value
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left of a checkpoint that it was writing."""
    for path in folder.glob(f".{CHECKPOINT}.*.tmp"):
        path.unlink()


def keep_epoch(folder: Path, epoch: int, count: int) -> None:
    """Keep the latest checkpoint under its epoch's number, and of such ones the last `count`."""
    kept = folder / f"checkpoint-{epoch:04d}.safetensors"
    kept.unlink(missing_ok=True)
    kept.hardlink_to(folder / CHECKPOINT)
    numbered = sorted(p for p in folder.iterdir() if re.fullmatch(_EPOCH_CHECKPOINT, p.name))
    for path in numbered[:-count]:
        path.unlink()


_EPOCH_CHECKPOINT = r"checkpoint-\d{4,}\.safetensors"


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
    scaler: dict[str, Any]


def check_resumable(path: Path, recipe: Recipe, fixed: dict[str, Any], *, elastic: bool) -> None:
    """Compare a checkpoint's header with what would go on from it; reads no tensor.

    Args:
        fixed: Values of the progress that must be what they were.
        elastic: `world_size` may differ.

    Raises:
        CheckpointError: If the file cannot be read, or listing all differences.
    """
    header = _read_header(path)
    changes = recipe_difference(header["recipe"], recipe.model_dump(mode="json"))
    advice = "go on with that recipe, or train into another folder (--out)"
    for key, value in fixed.items():
        saved = header["progress"].get(key)
        if saved != value and not (elastic and key == "world_size"):
            changes.append(f"{key}: checkpoint {saved!r}, now {value!r}")
            if key == "world_size":
                advice += "; --elastic accepts another number of processes, and rounds otherwise"
    if changes:
        lines = "".join(f"\n  - {line}" for line in changes)
        raise CheckpointError(
            f"{path} was written under another recipe, data or number of processes:{lines}\n"
            f"What to do: {advice}."
        )


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        entries = {key: json.loads(header[key]) for key in ("recipe", "progress", "scaler")}
        return entries | {"sha256": header["sha256"]}
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is no readable checkpoint of this project ({error!r}); "
            "delete it to start afresh"
        ) from error


def _read(path: Path) -> _Content:
    header = _read_header(path)
    tensors = load_file(path)
    if header["sha256"] != (actual := _digest(tensors)):
        raise CheckpointError(
            f"{path} is damaged: its tensors have sha256 {actual}, written was "
            f"{header['sha256']}; delete it to start afresh"
        )
    return _Content(tensors, header["recipe"], header["progress"], header["scaler"])


def _under(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def recorded_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a checkpoint's header, as a dictionary; reads no tensor.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    recipe: dict[str, Any] = _read_header(path)["recipe"]
    return recipe


def load_recipe_and_encoder(path: Path) -> tuple[Recipe, dict[str, Tensor], dict[str, Any]]:
    """The recipe, the tensors of the backbone that is the product, and the progress of a run.

    The product is the teacher, or the student of a method without one.

    Raises:
        CheckpointError: If the file cannot be read or its recipe is of another release.
    """
    content = _read(path)
    try:
        recipe = parse_recipe(content.recipe, str(path))
    except RecipeError as error:
        raise CheckpointError(f"the recipe in a checkpoint does not fit: {error}") from error
    if changes := recipe_difference(content.recipe, recipe.model_dump(mode="json")):
        raise CheckpointError(
            f"{path} was written by another release, whose recipe differs: {'; '.join(changes)}"
        )
    product = "teacher" if recipe.method_row.build.has_teacher else "student"
    return recipe, _under(content.tensors, product), content.progress
