"""Compare the speed of ours with a peer's, in one process and in turns.

    OMP_NUM_THREADS=1 python -m training.bench views
    python -m training.bench views --strength caug_plus --batch 64 --json views.json

Absolute figures move with whatever else the machine does; the ratio of two neighbours in the
same round holds. Each round also times a fixed matrix product (the canary): where it varies,
the machine was not quiet.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from clever_zoo.cli import fail
from clever_zoo.encoder import usable_device
from clever_zoo.errors import CleverZooError, RecipeError
from clever_zoo.files import write_atomic
from clever_zoo.spec import IMAGENET_MEAN, IMAGENET_STD, problem_lines
from training.config import ViewsConfig
from training.provenance import environment
from training.views import MultiCrop

CANARY_SIZE = 512

app = typer.Typer(
    help="Compare the speed of ours with a peer's, in one process and in turns.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def photograph(seed: int, size: int) -> Image.Image:
    """Smooth colour gradients, edges and grain, which is what photographs are made of."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(float)
    y, x = np.mgrid[:size, :size] / size
    pixels[(x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06] *= 0.5
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of a call, the device's work included."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def canary_gflops(device: str) -> float:
    """Speed of a float32 matrix product, the best of three."""
    a = torch.ones(CANARY_SIZE, CANARY_SIZE, device=device)
    return 2 * CANARY_SIZE**3 / min(seconds(lambda: a @ a, device) for _ in range(3)) / 1e9


def views_rounds(
    config: ViewsConfig, *, batch: int, image_size: int, rounds: int, device: str
) -> list[dict[str, float]]:
    """Time both pipelines on the same images, samples and epochs, one after the other.

    Returns:
        One entry per round: `reference` and `batched` in images/s (an image is all its views),
        their `ratio`, and the canary's GFLOP/s. A round before the first is not counted.
    """
    pillow = [photograph(seed, image_size) for seed in range(batch)]
    pixels = np.stack([np.asarray(image) for image in pillow])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
    samples = np.arange(batch)
    both = {
        pipeline: MultiCrop(
            config.model_copy(update={"pipeline": pipeline}), IMAGENET_MEAN, IMAGENET_STD, seed=0
        )
        for pipeline in ("reference", "batched")
    }
    results = []
    for epoch in range(rounds + 1):
        canary = canary_gflops(device)
        reference_s = seconds(
            lambda epoch=epoch: both["reference"].views_of(
                pillow, samples, epoch, torch.device(device)
            ),
            device,
        )
        batched_s = seconds(lambda epoch=epoch: both["batched"](images, samples, epoch), device)
        results.append(
            {
                "reference": batch / reference_s,
                "batched": batch / batched_s,
                "ratio": reference_s / batched_s,
                "canary_gflops": canary,
            }
        )
    return results[1:]


def summary(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and greatest of each column."""
    columns = {name: [r[name] for r in rounds] for name in rounds[0]}
    return {k: {"median": median(v), "min": min(v), "max": max(v)} for k, v in columns.items()}


def views_table(record: dict[str, Any]) -> Table:
    """What `views` prints."""
    figures = record["summary"]
    table = Table("", "images/s", "min..max", "ratio", "min..max", title=record["title"])
    for name in ("reference", "batched"):
        f, r = figures[name], figures["ratio"]
        ratio = ("1", "") if name == "reference" else (
            f"{r['median']:.2f}", f"{r['min']:.2f}..{r['max']:.2f}"
        )  # fmt: skip
        table.add_row(name, f"{f['median']:.1f}", f"{f['min']:.1f}..{f['max']:.1f}", *ratio)
    canary = figures["canary_gflops"]
    table.caption = (
        f"{record['environment']['hardware']}, torch {record['environment']['torch']}; "
        f"canary {canary['median']:.0f} GFLOP/s ({canary['min']:.0f}..{canary['max']:.0f})"
    )
    return table


@app.callback()
def _commands() -> None:
    """Compare the speed of ours with a peer's, in one process and in turns."""


@app.command()
def views(
    device: Annotated[str, typer.Option(help="Where the batched pipeline runs.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of torch.")] = 1,
    style: Annotated[str, typer.Option(help="dino or simsiam (has no local views).")] = "dino",
    strength: Annotated[str, typer.Option(help="baug, caug or caug_plus.")] = "caug",
    global_size: Annotated[int, typer.Option(help="Side of the two global views, px.")] = 224,
    local_size: Annotated[int, typer.Option(help="Side of the local views, px.")] = 96,
    local_views: Annotated[int, typer.Option(help="Local views of an image.")] = 8,
    image_size: Annotated[int, typer.Option(min=8, help="Side of the source, px.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Images of a round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds.")] = 7,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the record there.")
    ] = None,
) -> None:
    """Time the batched view pipeline beside torchvision on Pillow images.

    Both make the same views of the same synthetic photographs, decoding excluded, with the same
    random numbers. The peer gets its Pillow images ready made and always runs on one CPU core.
    images/s counts source images: one is all its views.

    Example: python -m training.bench views --rounds 9 --json views.json
    """
    torch.set_num_threads(threads)
    try:
        usable_device(device)
        settings = {
            "style": style,
            "strength": strength,
            "global_size_px": global_size,
            "local_size_px": local_size,
            "local_views": local_views,
        }
        try:
            config = ViewsConfig(**settings)
        except ValidationError as error:
            raise RecipeError("options", problem_lines(error)) from error
        figures = views_rounds(
            config, batch=batch, image_size=image_size, rounds=rounds, device=device
        )
        record = {
            "title": f"{style} {strength}: 2 x {global_size} + {local_views} x {local_size} px",
            "settings": settings | {"image_size_px": image_size, "batch": batch},
            "environment": environment(device),
            "summary": summary(figures),
            "rounds": figures,
        }
        if json_path is not None:
            write_atomic(json_path, (json.dumps(record, indent=2) + "\n").encode())
    except (CleverZooError, OSError) as error:
        fail(error)
    Console().print(views_table(record))


if __name__ == "__main__":
    app()
