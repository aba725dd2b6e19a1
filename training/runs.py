"""Reading finished runs."""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from clever_zoo.errors import CheckpointError
from training.checkpoint import CHECKPOINT, load_recipe_and_encoder
from training.config import Recipe
from training.networks import build_student
from training.provenance import ENVIRONMENT


def load_run(folder: Path) -> tuple[Recipe, nn.Module, dict[str, Any]]:
    """A run's recipe, its product (the teacher if it has one) and the facts of its training.

    Raises:
        CheckpointError: If the folder holds no readable run.
    """
    recipe, tensors, progress = load_recipe_and_encoder(folder / CHECKPOINT)
    backbone = build_student(recipe.backbone, recipe.seed)
    backbone.load_state_dict(tensors)
    try:
        first, *later = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / ENVIRONMENT} cannot be read: {error}") from error
    images = progress["step"] * recipe.batch_size
    return recipe, backbone, {
        "recipe": recipe.name,
        "shared_settings": shared_settings(recipe),
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


def shared_settings(recipe: Recipe) -> str:
    """A digest of what a model and its baseline have in common.

    That is all but name, clever, run, and the mask, which belongs to the transform term.
    """
    others: dict[str, Any] = {"name": True, "clever": True, "run": True, "views": {"disc_mask"}}
    content = recipe.model_dump_json(exclude=others)
    return hashlib.sha256(content.encode()).hexdigest()
