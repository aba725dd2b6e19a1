"""Fine-tune an encoder, or fit a linear head on it, for any labelled data set.

    python -m training.finetune clever-resnet18 --dataset image-folder --data photos --out tuned

The classifier of the last epoch is saved; both its accuracy and the best over all epochs, which
the test images chose, are printed under these names.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from pydantic import Field, model_validator
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from clever_zoo.classifier import Classifier, create_classifier
from clever_zoo.cli import fail
from clever_zoo.embedding import Part
from clever_zoo.encoder import evaluating, usable_device
from clever_zoo.errors import CleverZooError, DataError, NonFiniteError, RecipeError
from clever_zoo.records import (
    RESULTS_FILENAME,
    Environment,
    Network,
    Protocol,
    Record,
    Result,
)
from clever_zoo.spec import CONFIG_FILENAME, ModelSpec
from training.config import DataConfig, merged, parse_override, parse_section
from training.data import (
    Batch,
    ImageSet,
    ImageSource,
    TrainImages,
    check_classes,
    list_images,
    load_train_images,
)
from training.evaluate.inputs import EvaluationImages, forbid_tf32, load_encoder, normalized
from training.evaluate.perturb import PERTURBATIONS
from training.evaluate.scores import top_k
from training.provenance import measuring_environment
from training.schema import Section
from training.subset import SUBSET, Subset, draw_subset, read_subset, write_subset
from training.views import crop_and_flip

LOG = "log.jsonl"
_FROM_ENCODER = {"crop_pct", "mean", "std"}


class FinetuneConfig(Section):
    """Everything that decides what a fine-tuning computes; defaults are the `finetune` preset.

    SGD with momentum 0.9, learning rates x batch_size / 256, cosine per epoch to 0.

    Attributes:
        part: What the head reads.
        freeze: Train the head alone (the linear evaluation).
        lr_head_per_256, lr_encoder_per_256: Learning rates at batch 256.
        layer_decay: See `Classifier.parameter_groups`.
        weight_decay: Of all parameters, biases too, as in the reference.
        fraction: Share of every class's training images that is used.
        seed: Of the head, the order, the crops and the subset.
    """

    data: DataConfig
    part: Part = "full"
    freeze: bool = False
    epochs: int = Field(200, ge=1)
    batch_size: int = Field(256, ge=2)
    lr_head_per_256: float = Field(0.001, gt=0)
    lr_encoder_per_256: float = Field(0.001, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    layer_decay: float = Field(1.0, gt=0, le=1)
    weight_decay: float = Field(1e-4, ge=0)
    fraction: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check_across_fields(self) -> "FinetuneConfig":
        problems = []
        if ignored := sorted(_FROM_ENCODER & self.data.model_fields_set):
            problems.append(f"data.{', data.'.join(ignored)}: the encoder's own are used")
        if self.freeze and self.layer_decay != 1:
            problems.append(f"layer_decay is {self.layer_decay}, but freeze trains the head alone")
        if problems:
            raise ValueError("\n".join(problems))
        return self


# Source: the authors' eval_linear.py on downstream data (linear, finetune) and its
# semi-supervised form (semi, run with a fraction of 0.01 and 0.1). Their ViT heads read four
# blocks, these the encoder's own features.
PRESETS: dict[str, dict[str, object]] = {
    "linear": {"freeze": True, "weight_decay": 0.0},
    "finetune": {},
    "semi": {"fraction": 0.1},
    # Ours, for everyday use: the best of eight pairs of rates for clever-resnet18 on 2,000 training
    # images of Fashion-MNIST, compared on 2,000 other training images.
    "short": {
        "epochs": 5,
        "batch_size": 64,
        "lr_head_per_256": 0.02,
        "lr_encoder_per_256": 0.1,
        "weight_decay": 5e-4,
    },
}


@dataclass(frozen=True)
class FinetuneResult:
    """What came out: top-1 in percent on all test images.

    Attributes:
        top1_last: After the last epoch; no test label had a part in it.
        top1_best: The best of all epochs, chosen on the test images, as the reference reports.
        best_epoch: The first epoch with that value, from 1.
        n_train, n_test: Images used.
        seconds: Training and testing, without reading the data.
    """

    top1_last: float
    top1_best: float
    best_epoch: int
    n_train: int
    n_test: int
    seconds: float


def load_config(preset: str, dataset: str, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """A preset for a data set, with values laid over it.

    Args:
        preset: One of `PRESETS`.
        dataset: As data.dataset of a recipe.
        overrides: Such as "epochs=10", "part=invariant" or "data.hf_name=org/name".

    Raises:
        RecipeError: Naming all mistakes.
    """
    if preset not in PRESETS:
        raise RecipeError(preset, [f"no such preset; use {', '.join(PRESETS)}"])
    content = {**PRESETS[preset], "data": {"dataset": dataset}}
    for override in overrides:
        content = merged(content, parse_override(override))
    return parse_section(FinetuneConfig, content, f"preset {preset}")


def choose_images(
    config: FinetuneConfig, train: ImageSet | ImageSource, subset_file: Path | None
) -> Subset:
    """The training images to use, from a file or drawn by seed.

    Raises:
        DataError: If the file does not fit the data.
        RecipeError: If it was drawn with another fraction than the one that is asked for.
    """
    digest = train.digest()
    if subset_file is None:
        return draw_subset(train.labels, config.fraction, config.seed, digest)
    subset = read_subset(subset_file, train.labels, train.class_names, digest)
    if config.fraction not in (1.0, subset.fraction):
        problem = f"drawn with fraction {subset.fraction}; fraction={config.fraction} is asked for"
        raise RecipeError(str(subset_file), [problem])
    return subset


def epoch_batches(
    images: TrainImages,
    indices: NDArray[np.int64],
    config: FinetuneConfig,
    epoch: int,
    workers: int,
) -> Iterator[Batch]:
    """All chosen images in the order of (seed, epoch), batch by batch.

    A last batch of one image goes to the batch before: batch-norm cannot take it.
    """
    order = np.random.default_rng([config.seed, epoch]).permutation(indices)
    count = max(1, math.ceil((len(order) - 1) / config.batch_size))
    cuts = [i * config.batch_size for i in range(1, count)]
    batches = [part.tolist() for part in np.split(order, cuts)]
    return iter(
        DataLoader(
            images,
            batch_sampler=batches,
            collate_fn=_unchanged,
            num_workers=workers,
            generator=torch.Generator(),  # the global one belongs to what is trained
        )
    )


def _unchanged(batch: Batch) -> Batch:
    return batch


def top1(classifier: Classifier, test: EvaluationImages) -> float:
    """Share of test images whose class is the most likely one, percent."""
    spec, device = classifier.encoder.spec.preprocess, classifier.head.weight.device
    with evaluating(classifier), torch.inference_mode():
        logits = [classifier(normalized(x.to(device), spec)).cpu() for x, _ in test.batches()]
    return top_k(torch.cat(logits), test.labels, 1)


def train_epoch(
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    labels: Tensor,
    config: FinetuneConfig,
    epoch: int,
) -> Iterator[float]:
    """Train for one epoch; yields the loss of every step.

    Images that could not be read are left out.

    Args:
        labels: Classes (N,) of the whole training split.
        epoch: From 1.

    Raises:
        NonFiniteError: If a loss is not finite; no step is taken with it.
    """
    spec, device = classifier.encoder.spec.preprocess, classifier.head.weight.device
    classifier.train()
    for step, batch in enumerate(batches, 1):
        readable = ~torch.isin(batch.samples, batch.replaced)
        if readable.sum() < 2:
            continue
        samples = batch.samples[readable]
        pixels = crop_and_flip(
            batch.images[readable].to(device),
            samples.numpy(),
            seed=config.seed,
            epoch=epoch,
            size=spec.input_size_px,
        )
        loss = F.cross_entropy(classifier(normalized(pixels, spec)), labels[samples].to(device))
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss is {value} in epoch {epoch}, step {step}; lower lr_head_per_256 and "
                "lr_encoder_per_256"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield value


def finetune(
    classifier: Classifier,
    images: TrainImages,
    labels: Tensor,
    indices: NDArray[np.int64],
    test: EvaluationImages,
    config: FinetuneConfig,
    log: Path | None = None,
    *,
    workers: int = 0,
) -> FinetuneResult:
    """Train a classifier for `config.epochs` epochs and test it after each.

    Args:
        classifier: Changed in place; it ends with the weights of the last epoch.
        images, labels: The training split and its classes (N,).
        indices: The images of it that are used.
        test: The test split; it decides nothing but `top1_best`.
        log: A line for each epoch is written here, if anywhere.
        workers: Processes that read images ahead.

    Raises:
        NonFiniteError: If a loss is not finite.
    """
    scale = config.batch_size / 256
    groups = classifier.parameter_groups(
        config.lr_head_per_256 * scale,
        encoder_lr=config.lr_encoder_per_256 * scale,
        layer_decay=config.layer_decay,
    )
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    scores: list[float] = []
    started = time.monotonic()
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
    with Progress() as bar:
        task = bar.add_task("fine-tune", total=config.epochs)
        for epoch in range(1, config.epochs + 1):
            rates = [group["lr"] for group in optimizer.param_groups]
            batches = epoch_batches(images, indices, config, epoch, workers)
            steps = train_epoch(classifier, optimizer, batches, labels, config, epoch)
            losses = []
            for loss in steps:
                losses.append(loss)
                share = 1 / math.ceil(len(indices) / config.batch_size)
                bar.update(task, advance=share, description=f"epoch {epoch}, loss {loss:.3f}")
            if not losses:
                raise DataError("no batch had two readable images; repair the training images")
            schedule.step()
            scores.append(top1(classifier, test))
            line = {
                "epoch": epoch,
                "lr_head": rates[-1],
                "lr_encoder": max(rates[:-1], default=None),
                "loss": float(np.mean(losses)),
                "test_top1": scores[-1],
            }
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, allow_nan=False) + "\n")
            bar.update(task, completed=epoch)
    best = int(np.argmax(scores))
    return FinetuneResult(
        top1_last=scores[-1],
        top1_best=scores[best],
        best_epoch=best + 1,
        n_train=len(indices),
        n_test=len(test.labels),
        seconds=time.monotonic() - started,
    )


def settings_text(config: FinetuneConfig, subset_seed: int | None = None) -> str:
    """What a record says of the task: every setting, and the images' seed where it is another."""
    settings = ", ".join(f"{k} {v}" for k, v in config.model_dump(exclude={"data"}).items())
    if subset_seed not in (None, config.seed):
        settings += f", images drawn with seed {subset_seed}"
    return f"training.finetune with {settings}; 'best' is the best epoch on the test images"


def result_record(
    result: FinetuneResult,
    config: FinetuneConfig,
    spec: ModelSpec,
    where: Environment,
    *,
    subset_seed: int | None = None,
) -> Record:
    """The result as a record; the task's definition holds every setting.

    Args:
        result: What came out.
        config: What it was trained with.
        spec: Of the encoder that it started from.
        where: Where it was trained.
        subset_seed: Seed of the images that were used, None for the config's.
    """
    task = "frozen" if config.freeze else "finetune"
    network = Network(
        name=spec.name, role="model", sha256=spec.weights.sha256 if spec.weights else None
    )
    rows = tuple(
        Result(
            network=spec.name,
            protocol=Protocol(task=task),
            part=config.part,
            metric=metric,
            seeds=(config.seed,),
            mean=getattr(result, metric),
            n=result.n_test,
            seconds=round(result.seconds, 2),
        )
        for metric in ("top1_last", "top1_best")
    )
    return Record(
        model=spec.name,
        dataset=config.data.dataset,
        invariant_dim=spec.invariant_dim,
        images={"train": result.n_train, "test": result.n_test},
        tasks={task: settings_text(config, subset_seed)},
        perturbations={"ori": PERTURBATIONS["ori"].text},
        networks=(network,),
        environments=(where,),
        results=rows,
    )


def run(
    source: str | Path,
    config: FinetuneConfig,
    data: Path | None,
    out: Path,
    *,
    subset_file: Path | None = None,
    cache_folder: Path | None = None,
    device: str = "cpu",
    workers: int = 0,
) -> FinetuneResult:
    """The whole way from an encoder and a data set to a classifier's folder.

    Args:
        source: A run's folder, or an encoder as for `clever_zoo.from_pretrained`.
        data: Folder of the data set.
        out: Gets config.json, model.safetensors, log.jsonl, results.json and, unless every
            training image is used, subset.txt.
        subset_file: A subset.txt to use again.

    Raises:
        DataError: If the data cannot be used, or `out` holds a classifier already.
        CleverZooError: See `create_classifier`, `load_split` and `finetune`.
    """
    target = usable_device(device)
    where = measuring_environment(device)
    if (out / CONFIG_FILENAME).exists():
        raise DataError(f"{out} holds a model already; choose another --out")
    train, test = (list_images(config.data, data, s, cache_folder) for s in ("train", "test"))
    check_classes(train, test)
    subset = choose_images(config, train, subset_file)
    config = config.model_copy(update={"fraction": subset.fraction})
    if len(subset.indices) < 2:
        raise DataError(f"the subset has {len(subset.indices)} image; at least 2 are needed")
    torch.manual_seed(config.seed)
    encoder, _ = load_encoder(source)
    classifier = create_classifier(
        encoder,
        len(train.class_names),
        part=config.part,
        freeze_encoder=config.freeze,
        class_names=train.class_names,
    ).to(target)
    if len(subset.indices) < len(train):
        write_subset(out / SUBSET, subset, train.labels, train.class_names)
    images = load_train_images(config.data, data, cache_folder=cache_folder)
    tested = EvaluationImages(test, classifier.encoder.spec.preprocess, "test")
    tested.prepare("bicubic")
    result = finetune(
        classifier,
        images,
        train.labels,
        subset.indices,
        tested,
        config,
        out / LOG,
        workers=workers,
    )
    classifier.save_pretrained(out)
    record = result_record(result, config, encoder.spec, where, subset_seed=subset.seed)
    record.write(out / RESULTS_FILENAME)
    return result


def main(
    source: Annotated[
        str, typer.Argument(help="A released name, org/repo, local-dir:PATH, or a run's folder.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Values that go over the preset's: epochs, batch_size, part, freeze, fraction, "
            "lr_head_per_256, lr_encoder_per_256, layer_decay, weight_decay, momentum, seed, "
            "data.hf_name, data.image_size_px, data.cache ...",
        ),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(help="As data.dataset of a recipe, such as huggingface or cub-200."),
    ] = "image-folder",
    out: Annotated[Path, typer.Option(help="Folder for the classifier.")] = Path("tuned"),
    data: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    preset: Annotated[str, typer.Option(help="short, linear, finetune or semi.")] = "short",
    subset: Annotated[
        Path | None, typer.Option(help="Use the training images that this subset.txt lists.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for decoded images (default: DATA/cache).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images ahead.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all.")] = 0,
) -> None:
    """Fine-tune an encoder on labelled images and save the classifier.

    Presets: short (ours, 5 epochs); with the paper's published settings, 200 epochs at batch 256:
    linear (the head alone), finetune, semi (a share of the labels: fraction=0.01 or 0.1).

    Exit code 0: saved. 2: bad input, and nothing is printed but the error.

    Example: python -m training.finetune clever-resnet18 part=invariant --data photos --out tuned
    """
    if threads:
        torch.set_num_threads(threads)
    forbid_tf32()
    try:
        result = run(
            source,
            load_config(preset, dataset, overrides or ()),
            data,
            out,
            subset_file=subset,
            cache_folder=cache,
            device=device,
            workers=workers,
        )
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(
        f"top-1: last {result.top1_last:.1f} %, best {result.top1_best:.1f} % in epoch "
        f"{result.best_epoch}, chosen on the test images"
    )
    typer.echo(
        f"{result.n_train:,} training and {result.n_test:,} test images, "
        f"{result.seconds:.0f} s: {out}"
    )


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
