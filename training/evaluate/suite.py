"""The whole evaluation of one network: which protocols on which images give which rows."""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from clever_zoo.classifier import create_classifier
from clever_zoo.embedding import Part
from clever_zoo.errors import DataError, NonFiniteError
from clever_zoo.records import FeatureRecipe, Interpolation, Protocol, Result
from training.data import ImageSet, TrainImages
from training.evaluate import equivariance
from training.evaluate.inputs import (
    EvaluationImages,
    Subject,
    embed_images,
    features_of,
    parts_of,
)
from training.evaluate.knn import TEMPERATURE, knn_scores
from training.evaluate.linear import fit_cached, fit_reference, top_k
from training.evaluate.perturb import PERTURBATIONS
from training.finetune import FinetuneConfig, finetune, load_config, settings_text

Task = Literal["knn", "linear_cached", "linear_reference", "equivariance", "finetune"]

NEIGHBORS = (10, 20, 100, 200)
SEEDS = (0, 1, 2)
FINETUNES = ("frozen_short", "finetune_short")  # the head alone, and head and encoder
KNN_PERTURBATIONS = ("ori", "r", "cj_r")
LINEAR_PERTURBATIONS = tuple(name for name, p in PERTURBATIONS.items() if not p.masked)
BILINEAR_PERTURBATIONS = ("ori", "cj_r")  # where the gap between the interpolations is measured


def task_texts(
    reference_epochs: int = 100, seed: int = 0, *, shuffled: bool = False
) -> dict[str, str]:
    """What each task of a record is; a task whose text changed is another task.

    Args:
        reference_epochs: Of the task "linear_reference".
        seed: Of the recipe.
        shuffled: Whether the images are stored class by class; see `EvaluationImages.order`.
    """
    shortened = "" if reference_epochs == 100 else ", shortened"
    order = "; images stored class by class are shuffled first (seed 0)" if shuffled else ""
    return {
        "knn": (
            f"weighted k-NN, cosine, votes exp(similarity / {TEMPERATURE}); gallery: all training "
            "images, unperturbed; queries: the test images; parts cut before normalising"
        ),
        "linear_cached": (
            "logistic regression to convergence (L2 penalty 1) on standardised features of the "
            "centre crops of all training images; scored with its only solution, so 'last'"
        ),
        "linear_reference": (
            f"the published probe{shortened}: random resized crops (bilinear) and flips at every "
            f"epoch, {reference_epochs} epochs of SGD with momentum 0.9, learning rate 0.001 x "
            f"batch / 256, cosine to 0, batch 256, seed {seed}; perturbed images resized "
            "bilinearly and scored "
            "with the last epoch's probe; 'best' is the best epoch, chosen on the test images"
        ),
        **{name: text + order for name, text in equivariance.TASKS.items()},
        **{name: settings_text(_finetune_config(name)) for name in FINETUNES},
    }


class Condition(NamedTuple):
    """Test images in one state."""

    perturbation: str
    interpolation: Interpolation

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of the draws; none where nothing is drawn."""
        return SEEDS if PERTURBATIONS[self.perturbation].is_random else ()


@dataclass
class Rows:
    """Collects values and turns them into rows, one per key, with mean and deviation over seeds."""

    network: str
    environment: int = 0
    _values: dict[tuple[Any, ...], list[float]] = field(default_factory=lambda: defaultdict(list))
    _facts: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)

    def add(
        self,
        protocol: Protocol,
        part: Part,
        metric: str,
        value: float,
        *,
        n: int,
        at: float | None = None,
        seeds: Sequence[int] = (),
        seconds: float = 0.0,
    ) -> None:
        """One value; further ones of the same key are those of further seeds."""
        key = (protocol.task, protocol.features, protocol.perturbation, protocol.interpolation)
        key = (*key, part, metric, at)
        self._values[key].append(value)
        facts = self._facts.setdefault(
            key, {"protocol": protocol, "seeds": tuple(seeds), "n": n, "seconds": 0.0}
        )
        facts["seconds"] += seconds

    def results(self) -> list[Result]:
        """The rows, in the order in which their first values came."""
        return [
            Result(
                network=self.network,
                part=key[-3],
                metric=key[-2],
                at=key[-1],
                mean=round(float(np.mean(values)), 4),
                std=round(float(np.std(values)), 4),
                environment=self.environment,
                **(facts | {"seconds": round(facts["seconds"], 2)}),
            )
            for (key, values), facts in zip(self._values.items(), self._facts.values(), strict=True)
        ]


def feature_recipes(blocks: int) -> tuple[FeatureRecipe, ...]:
    """The ways in which features of so many blocks are cut into parts."""
    return ("last1",) if blocks == 1 else ("last1", "last4_reference", "last4_per_block")


def _cut(
    features: Tensor, subject: Subject, blocks: int, recipe: FeatureRecipe
) -> dict[Part, Tensor]:
    if recipe == "last1":
        return parts_of(features[:, -(features.shape[1] // blocks) :], subject.cut)
    per_block = recipe == "last4_per_block"
    return parts_of(features, subject.cut, blocks=blocks, per_block=per_block)


def evaluate_subject(
    subject: Subject,
    train: EvaluationImages,
    test: EvaluationImages,
    tasks: Collection[Task],
    *,
    crops: ImageSet | None = None,
    reference_epochs: int = 100,
    seed: int = 0,
    label: str = "",
) -> list[Result]:
    """Every row of one network.

    Args:
        subject: The network, or raw pixels.
        train, test: Both splits, with the same classes.
        tasks: What to measure.
        crops: The training images as stored, of which "linear_reference" and "finetune" take new
            crops at every epoch; needed by these alone.
        reference_epochs: Epochs of "linear_reference"; the published protocol has 100.
        seed: Of the crops and initial weights of "linear_reference".
        label: For the progress bars.

    Raises:
        NonFiniteError: If a feature is not finite.
        DataError: If there are too few images.
    """
    rows = Rows(subject.network.name)
    if {"knn", "linear_cached"} & set(tasks):
        _classify(rows, subject, train, test, tasks, label=label)
    if "linear_reference" in tasks and subject.encoder is not None:
        _reference_probe(
            rows, subject, crops, test, epochs=reference_epochs, seed=seed, label=label
        )
    if "finetune" in tasks and subject.network.role in ("model", "baseline"):
        for task in FINETUNES:
            _finetune(rows, subject, crops, test, task)
    if "equivariance" in tasks:
        readings = equivariance.measure(
            features_of(subject), subject.cut, train, test, description=label
        )
        for reading in readings:
            rows.add(
                Protocol(task=reading.task),
                reading.part,
                reading.metric,
                reading.value,
                n=reading.n,
                at=reading.at,
                seeds=() if reading.task == "drift" else (equivariance.TEST_SEED,),
                seconds=reading.seconds,
            )
    return rows.results()


def _conditions(tasks: Collection[Task]) -> list[Condition]:
    wanted: list[Condition] = []
    if "knn" in tasks:
        wanted += [Condition(name, "bicubic") for name in KNN_PERTURBATIONS]
    if "linear_cached" in tasks:
        wanted += [Condition(name, "bicubic") for name in LINEAR_PERTURBATIONS]
        wanted += [Condition(name, "bilinear") for name in BILINEAR_PERTURBATIONS]
    return list(dict.fromkeys(wanted))


def _test_features(
    subject: Subject,
    test: EvaluationImages,
    conditions: Sequence[Condition],
    blocks: int,
    label: str,
) -> Iterator[tuple[Condition, Tensor, float]]:
    """Features of the test images in every condition, seed after seed, and the seconds of each."""
    for interpolation in {c.interpolation for c in conditions}:
        test.prepare(interpolation)
    jobs = [(c, seed) for c in conditions for seed in c.seeds or (0,)]
    for condition, seed in track(jobs, description=label, transient=True):
        started = time.monotonic()
        features = embed_images(
            features_of(subject, blocks),
            test,
            perturbation=condition.perturbation,
            seed=seed,
            interpolation=condition.interpolation,
        )
        yield condition, features, time.monotonic() - started


def _classify(
    rows: Rows,
    subject: Subject,
    train: EvaluationImages,
    test: EvaluationImages,
    tasks: Collection[Task],
    *,
    label: str,
) -> None:
    conditions = _conditions(tasks)
    blocks = subject.blocks if "linear_cached" in tasks else 1  # k-NN reads the output alone
    ks = [k for k in NEIGHBORS if k <= len(train)]
    if "knn" in tasks and not ks:
        raise DataError(f"{len(train)} training images; k-NN needs at least {min(NEIGHBORS)}")
    train.prepare("bicubic")
    classes = len(train.data.class_names)
    features = embed_images(features_of(subject, blocks), train)
    gallery = {r: _cut(features, subject, blocks, r) for r in feature_recipes(blocks)}
    started = time.monotonic()
    probes = {
        (recipe, part): fit_cached(x, train.labels, classes, device=subject.device)
        for recipe, parts in gallery.items()
        for part, x in parts.items()
        if "linear_cached" in tasks
    }
    for (recipe, part), probe in probes.items():
        if not probe.converged:
            raise NonFiniteError(
                f"the linear probe of {subject.network.name} ({recipe}, {part}) did not reach its "
                "minimum; look at the features, or leave linear_cached out of --tasks"
            )
    fit_s = (time.monotonic() - started) / max(len(probes), 1)
    named = f"{label}: k-NN, linear"
    for condition, raw, embed_s in _test_features(subject, test, conditions, blocks, named):
        for recipe in gallery:
            for part, x in _cut(raw, subject, blocks, recipe).items():
                add = _adder(rows, recipe, condition, part, len(test))
                if "knn" in tasks and recipe == "last1" and _has_knn(condition):
                    started = time.monotonic()
                    votes = knn_scores(
                        gallery[recipe][part],
                        train.labels,
                        x,
                        ks=ks,
                        classes=classes,
                        device=subject.device,
                    )
                    seconds = embed_s + time.monotonic() - started
                    for k, scores in votes.items():
                        for metric, value in _top1_top5(scores, test.labels).items():
                            add("knn", metric, value, at=float(k), seconds=seconds)
                if "linear_cached" in tasks and condition.perturbation in LINEAR_PERTURBATIONS:
                    top1 = top_k(probes[recipe, part].scores(x), test.labels, 1)
                    add("linear_cached", "top1_last", top1, seconds=embed_s + fit_s)


def _has_knn(condition: Condition) -> bool:
    return condition.perturbation in KNN_PERTURBATIONS and condition.interpolation == "bicubic"


def _top1_top5(scores: Tensor, labels: Tensor) -> dict[str, float]:
    ks = (1, 5) if scores.shape[1] > 5 else (1,)
    return {f"top{k}": top_k(scores, labels, k) for k in ks}


def _adder(
    rows: Rows, recipe: FeatureRecipe, condition: Condition, part: Part, n: int
) -> Callable[..., None]:
    def add(task: str, metric: str, value: float, **facts: Any) -> None:
        protocol = Protocol(task=task, features=recipe, **condition._asdict())
        rows.add(protocol, part, metric, value, n=n, **({"seeds": condition.seeds} | facts))

    return add


def _reference_probe(
    rows: Rows,
    subject: Subject,
    crops: ImageSet,
    test: EvaluationImages,
    *,
    epochs: int,
    seed: int,
    label: str,
) -> None:
    started = time.monotonic()
    blocks = subject.blocks
    clean = embed_images(features_of(subject, blocks), test)
    keys = [
        (recipe, part)
        for recipe in feature_recipes(blocks)
        for part in _cut(clean[:1], subject, blocks, recipe)
    ]

    def slices(recipe: FeatureRecipe, part: Part) -> Callable[[Tensor], Tensor]:
        return lambda features: _cut(features, subject, blocks, recipe)[part]

    named = {f"{recipe}/{part}": slices(recipe, part) for recipe, part in keys}
    fitted = fit_reference(
        features_of(subject, blocks),
        crops.images,
        crops.labels,
        named,
        len(crops.class_names),
        size_px=test.spec.input_size_px,
        seed=seed,
        epochs=epochs,
        test={name: cut(clean) for name, cut in named.items()},
        test_labels=test.labels,
        description=f"{label}: linear_reference",
    )
    seconds = time.monotonic() - started
    for (recipe, part), probe in zip(keys, fitted.values(), strict=True):
        add = _adder(rows, recipe, Condition("ori", "bicubic"), part, len(test))
        add("linear_reference", "top1_last", probe.top1[-1], seconds=seconds, seeds=(seed,))
        add("linear_reference", "top1_best", max(probe.top1), seconds=seconds, seeds=(seed,))
    # As published: bicubic for clean images, bilinear for perturbed ones.
    perturbed = [Condition(n, "bilinear") for n in LINEAR_PERTURBATIONS if n != "ori"]
    last = f"{label}: linear_reference, perturbed"
    for condition, raw, embed_s in _test_features(subject, test, perturbed, blocks, last):
        for recipe, part in keys:
            name = f"{recipe}/{part}"
            top1 = top_k(fitted[name].probe.scores(named[name](raw)), test.labels, 1)
            add = _adder(rows, recipe, condition, part, len(test))
            add("linear_reference", "top1_last", top1, seconds=embed_s)


def _finetune_config(task: str) -> FinetuneConfig:
    freeze = str(task == "frozen_short").lower()
    return load_config("short", "fake", [f"freeze={freeze}"])  # the images are given, not read


def _finetune(
    rows: Rows, subject: Subject, crops: ImageSet, test: EvaluationImages, task: str
) -> None:
    assert subject.encoder is not None
    config = _finetune_config(task)
    torch.manual_seed(config.seed)
    classifier = create_classifier(
        subject.encoder,
        len(crops.class_names),
        freeze_encoder=config.freeze,
        class_names=crops.class_names,
    )
    everything = np.arange(len(crops))
    result = finetune(classifier, TrainImages(crops), crops.labels, everything, test, config)
    for metric in ("top1_last", "top1_best"):
        rows.add(
            Protocol(task=task),
            "full",
            metric,
            getattr(result, metric),
            n=len(test),
            seeds=(config.seed,),
            seconds=result.seconds,
        )
