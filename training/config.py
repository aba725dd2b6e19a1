"""The recipe: everything that decides what a training run computes, in one strict schema.

Defaults are the values of the paper's released scripts; a recipe file states what differs.
"""

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from clever_zoo.backbones import BACKBONES, model_args_problems
from clever_zoo.errors import RecipeError
from clever_zoo.spec import IMAGENET_MEAN, IMAGENET_STD, problem_lines
from training.reference_views import ELASTIC_MIN_SIZE_PX
from training.views import STYLES, Pipeline, Strength, StyleName

RECIPES = Path(__file__).parent / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(_Section):
    """What to train on and how pixels are normalised."""

    dataset: Literal["fashion-mnist", "image-folder"]
    image_size_px: int = Field(256, ge=8)  # image-folder: the square that is kept in memory
    crop_pct: float = Field(0.875, gt=0, le=1)  # of the released encoder's evaluation transform
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD


class BackboneConfig(_Section):
    """The network; `model_args` goes to timm and into the released spec."""

    name: str
    model_args: dict[str, Any] = {}
    drop_path_rate: float = Field(0.0, ge=0, lt=1)  # student only

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in BACKBONES:
            raise ValueError(f"is {name!r}; use one of {', '.join(BACKBONES)}")
        return name

    @model_validator(mode="after")
    def _check_model_args(self) -> "BackboneConfig":
        if problems := model_args_problems(self.name, self.model_args):
            raise ValueError("\n".join(problems))
        return self


class MethodConfig(_Section):
    """DINO, plain or wrapped by CLeVER; `invariant_dim` defaults to int(0.8 D)."""

    name: Literal["dino"] = "dino"
    clever: bool = True
    invariant_dim: int | None = Field(None, ge=1)


class ViewsConfig(_Section):
    """The list of views: two global ones, then the local ones of a style that has them."""

    pipeline: Pipeline = "batched"  # "reference": the same views image by image, for comparison
    style: StyleName = "dino"
    strength: Strength = "caug"
    global_size_px: int = Field(224, ge=8)
    local_size_px: int = Field(96, ge=8)
    local_views: int = Field(8, ge=0)
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    disc_mask: bool = False  # black outside the inscribed circle of every view

    @field_validator("global_scale", "local_scale")
    @classmethod
    def _check_scale(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"is {list(scale)}; use 0 < low <= high <= 1")
        return scale

    @model_validator(mode="after")
    def _check_across_fields(self) -> "ViewsConfig":
        problems = []
        if self.local_views and STYLES[self.style].local_role is None:
            problems.append(
                f"local_views is {self.local_views}; style {self.style!r} has none, so write "
                "local_views = 0"
            )
        sizes = {self.global_size_px} | ({self.local_size_px} if self.local_views else set())
        too_small = [size for size in sorted(sizes) if size < ELASTIC_MIN_SIZE_PX]
        if too_small and (self.pipeline, self.strength) == ("reference", "caug_plus"):
            problems.append(
                f"views of {too_small} px; torchvision's elastic transformation, which pipeline "
                f"'reference' uses for caug_plus, needs {ELASTIC_MIN_SIZE_PX}: use larger views "
                "or pipeline = 'batched'"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


class HeadConfig(_Section):
    """The projection head of each half."""

    prototypes: int = Field(65536, ge=2)
    hidden_dim: int = Field(2048, ge=1)
    bottleneck_dim: int = Field(256, ge=1)
    batch_norm: bool = False
    freeze_gain: bool = True


class LossConfig(_Section):
    """Temperatures, centring and the weights of CLeVER's two extra terms."""

    student_temp: float = Field(0.1, gt=0)
    teacher_temp: float = Field(0.04, gt=0)
    warmup_teacher_temp: float = Field(0.04, gt=0)
    warmup_teacher_temp_epochs: int = Field(0, ge=0)
    center_momentum: float = Field(0.9, ge=0, le=1)
    orthogonality_weight: float = Field(1.0, ge=0)
    head_balance_weight: float = Field(0.001, ge=0)


class OptimizerConfig(_Section):
    """AdamW, its schedules, the teacher's momentum."""

    lr_per_256: float = Field(5e-4, gt=0)  # peak lr at batch 256, scaled linearly
    min_lr: float = Field(1e-6, ge=0)
    warmup_epochs: float = Field(10, ge=0)
    weight_decay: float = Field(0.04, ge=0)
    weight_decay_end: float = Field(0.4, ge=0)
    clip_norm: float = Field(3.0, gt=0)  # per tensor
    ema_momentum: float = Field(0.996, ge=0, le=1)
    freeze_last_layer_epochs: float = Field(1, ge=0)


class Recipe(_Section):
    """One training run. `load_recipe` reads it from TOML."""

    name: str
    seed: int = Field(0, ge=0)
    epochs: int = Field(200, ge=1)
    batch_size: int = Field(512, ge=2)
    data: DataConfig
    backbone: BackboneConfig
    method: MethodConfig = MethodConfig()
    views: ViewsConfig = ViewsConfig()
    head: HeadConfig = HeadConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _check_across_sections(self) -> "Recipe":
        problems = []
        cut = self.method.invariant_dim
        if cut is not None and not self.method.clever:
            problems.append(f"method.invariant_dim is {cut}, but without clever nothing is cut")
        elif cut is not None and cut >= self.feature_dim:
            problems.append(
                f"method.invariant_dim is {cut}; {self.backbone.name} has {self.feature_dim} "
                "features, and both halves need one"
            )
        patch = self.backbone.model_args.get("patch_size", 16)
        for key in ("global_size_px", "local_size_px"):
            size = getattr(self.views, key)
            if self.backbone.name.startswith("vit") and size % patch:
                problems.append(f"views.{key} is {size}; a ViT needs a multiple of patch {patch}")
        if self.optimizer.warmup_epochs >= self.epochs:
            problems.append(
                f"optimizer.warmup_epochs is {self.optimizer.warmup_epochs}, "
                f"which leaves nothing of {self.epochs} epochs"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def feature_dim(self) -> int:
        """Width D of the backbone's features."""
        return BACKBONES[self.backbone.name].feature_dim

    @property
    def invariant_dim(self) -> int:
        """Where the features are cut: the method's own value, int(0.8 D), or D without CLeVER."""
        if not self.method.clever:
            return self.feature_dim
        return self.method.invariant_dim or int(0.8 * self.feature_dim)

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up."""
        return self.optimizer.lr_per_256 * self.batch_size / 256


def load_recipe(source: str | Path) -> Recipe:
    """Read a recipe from a TOML file or by the name of a bundled one.

    Args:
        source: A path that ends in .toml, or a name such as "clever-resnet18.fmnist".

    Raises:
        RecipeError: If there is no such recipe, it is no TOML, or it has mistakes; lists all.
    """
    path = Path(source)
    if path.suffix != ".toml":
        path = RECIPES / f"{source}.toml"
    if not path.is_file():
        bundled = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise RecipeError(str(source), [f"no such recipe; pass a .toml file or one of: {bundled}"])
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"not valid TOML: {error}"]) from error
    return parse_recipe({"name": path.stem, **content}, str(path))


def parse_recipe(content: dict[str, Any], source: str) -> Recipe:
    """Validate the content of a recipe.

    Raises:
        RecipeError: Naming `source` and all mistakes.
    """
    try:
        # As JSON, because strict validation takes a list for a tuple there only.
        return Recipe.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise RecipeError(source, problem_lines(error)) from error
