"""Reading finished runs."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from clever_zoo.errors import CheckpointError
from training.checkpoint import load_recipe_and_teacher
from training.config import Recipe
from training.networks import build_student
from training.pretrain import CHECKPOINT, ENVIRONMENT


def load_run(folder: Path) -> tuple[Recipe, nn.Module, dict[str, Any]]:
    """A run's recipe, its teacher backbone and the facts of its training.

    Raises:
        CheckpointError: If the folder holds no readable run.
    """
    recipe, tensors, progress = load_recipe_and_teacher(folder / CHECKPOINT)
    teacher = build_student(recipe.backbone, recipe.seed)
    teacher.load_state_dict(tensors)
    try:
        first, *later = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / ENVIRONMENT} cannot be read: {error}") from error
    images = progress["step"] * recipe.batch_size
    return recipe, teacher, {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "epochs": recipe.epochs,
        "steps": progress["step"],
        "finished": progress["step"] == progress["steps"],
        "images_seen": images,
        "seconds": round(progress["seconds"]),
        "images_per_s": round(images / max(progress["seconds"], 1e-9), 1),
        **first,
        **({"continued_under": later} if later else {}),
    }  # fmt: skip
