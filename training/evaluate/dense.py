"""What the dense evaluations share: patches of any encoder, one part of them, and the record."""

from collections.abc import Mapping
from enum import StrEnum

import torch
from torch import Tensor

from clever_zoo.embedding import Part, split_features
from clever_zoo.encoder import Encoder
from clever_zoo.errors import NonFiniteError, ShapeError
from clever_zoo.records import Environment, Network, Protocol, Record, Result
from clever_zoo.spec import ModelSpec
from training.evaluate.perturb import PERTURBATIONS
from training.provenance import environment


class PartChoice(StrEnum):
    """A part on the command line."""

    full = "full"
    invariant = "invariant"
    equivariant = "equivariant"


def part_of(features: Tensor, spec: ModelSpec, part: Part) -> Tensor:
    """One part of features, (..., D) -> (..., width of the part).

    Raises:
        ShapeError: If the encoder has no split and `part` is its empty half.
    """
    if part == "full":
        return features
    chosen = getattr(split_features(features, spec.invariant_dim), part)
    if not chosen.shape[-1]:
        raise ShapeError(
            f"{spec.name} has no split, so its {part} half is empty; use part='full' or 'invariant'"
        )
    return chosen


def patch_grid(encoder: Encoder, pixels: Tensor, part: Part = "full") -> Tensor:
    """The last block's patch tokens, or the last stage's map, as a grid.

    Shapes: (B, 3, H, W) -> (B, h, w, width of the part); h, w = H, W over the patch size of a
    ViT or the stride of a convolutional backbone.

    Raises:
        ShapeError: As `Encoder.features` and `part_of`.
    """
    features = encoder.features(pixels)[0]
    if features.ndim == 4:
        return part_of(features.permute(0, 2, 3, 1), encoder.spec, part)
    grid = encoder.backbone.patch_embed.dynamic_feat_size(pixels.shape[2:])
    return part_of(features[:, 1:].unflatten(1, grid), encoder.spec, part)


def check_finite(values: Tensor, what: str) -> Tensor:
    """The values, if all of them are finite.

    Raises:
        NonFiniteError: Naming `what`.
    """
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise NonFiniteError(
            f"{what}: {bad} of {values.numel()} values are not finite, so no number would mean "
            "anything; check the weights"
        )
    return values


def dense_record(
    encoder: Encoder,
    metrics: Mapping[str, float],
    *,
    task: str,
    text: str,
    dataset: str,
    split: str,
    n_images: int,
    n: int,
    seconds: float,
    part: Part = "full",
) -> Record:
    """The scores of one encoder as a record, a row for each metric.

    Args:
        encoder: What was measured, on the device where it was.
        metrics: Means over all that was scored.
        task, text: Name and definition of the evaluation.
        dataset, split: Whose images were scored.
        n_images: Images in the split.
        n: What the means are over; `text` says what is counted.
        seconds: Of the whole evaluation.
        part: Which part of the features.
    """
    spec = encoder.spec
    network = Network(
        name=spec.name, role="model", sha256=spec.weights.sha256 if spec.weights else None
    )
    rows = tuple(
        Result(
            network=spec.name,
            split=split,
            protocol=Protocol(task=task),
            part=part,
            metric=metric,
            mean=mean,
            n=n,
            seconds=round(seconds, 2),
        )
        for metric, mean in metrics.items()
    )
    return Record(
        model=spec.name,
        dataset=dataset,
        invariant_dim=spec.invariant_dim,
        images={split: n_images},
        tasks={task: text},
        perturbations={"ori": PERTURBATIONS["ori"].text},
        networks=(network,),
        environments=(Environment(**environment(str(next(encoder.parameters()).device))),),
        results=rows,
    )
