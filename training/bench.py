"""Compare the speed of ours with a peer's: `views`, `scan` and `small-maps` in turns.

    OMP_NUM_THREADS=1 python -m training.bench views
    python -m training.bench views --strength caug_plus --batch 64 --json views.json
    OMP_NUM_THREADS=2 python -m training.bench scan --threads 2

Absolute figures move with whatever else the machine does; the ratio of two neighbours in the
same round holds. Each round also times a fixed matrix product (the canary): where it varies,
the machine was not quiet.
"""

import copy
import functools
import json
import os
import resource
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from bench.record import Spread
from bench.timing import canary_gflops, photograph, seconds, take_turns
from clever_zoo.backbones import build_backbone, list_backbones, vmamba
from clever_zoo.backbones.scan import selective_scan, selective_scan_loop
from clever_zoo.cli import fail
from clever_zoo.embedding import default_cut
from clever_zoo.encoder import usable_device
from clever_zoo.errors import CleverZooError, RecipeError
from clever_zoo.files import write_atomic
from clever_zoo.spec import IMAGENET_MEAN, IMAGENET_STD, problem_lines
from training.clever import Clever, CleverSection
from training.config import Recipe, ViewsConfig, load_recipe
from training.data import load_train_images
from training.distributed import Processes
from training.methods.dino import Dino, DinoSection
from training.pretrain import HALF, build_views, train
from training.provenance import environment
from training.runlog import LOG, read_log
from training.small_maps import use_small_map_convolutions
from training.views import MultiCrop

IN100_EPOCHS, IN100_IMAGES = 200, 126_689
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the record there.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Counted rounds.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="CPU threads of torch.")]

app = typer.Typer(
    help="Compare the speed of ours with a peer's, in one process and in turns.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


def spreads(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and greatest of each column."""
    return {name: Spread.of([r[name] for r in rounds]).model_dump() for name in rounds[0]}


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
    threads: ThreadsOption = 1,
    style: Annotated[str, typer.Option(help="dino or simsiam (has no local views).")] = "dino",
    strength: Annotated[str, typer.Option(help="baug, caug or caug_plus.")] = "caug",
    global_size: Annotated[int, typer.Option(help="Side of the two global views, px.")] = 224,
    local_size: Annotated[int, typer.Option(help="Side of the local views, px.")] = 96,
    local_views: Annotated[int, typer.Option(help="Local views of an image.")] = 8,
    image_size: Annotated[int, typer.Option(min=8, help="Side of the source, px.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Images of a round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds.")] = 7,
    json_path: JsonOption = None,
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
            "summary": spreads(figures),
            "rounds": figures,
        }
        if json_path is not None:
            write_atomic(json_path, (json.dumps(record, indent=2) + "\n").encode())
    except (CleverZooError, OSError) as error:
        fail(error)
    Console().print(views_table(record))


def heads_memory(settings: dict[str, int], chunk_images: int | None, device: str) -> dict[str, Any]:
    """Peak memory and time of CLeVER's two DINO heads and losses, forward and backward.

    Args:
        settings: `batch`, `views`, `prototypes`, `feature_dim`.
        chunk_images: As in `DinoSection`; None scores the whole batch at once.

    Returns:
        `peak_bytes` above what features and parameters take, `seconds`, `gradient_norm`.
    """
    torch.manual_seed(0)
    section = DinoSection(prototypes=settings["prototypes"], chunk_images=chunk_images)
    width = settings["feature_dim"]
    clever = Clever(lambda w: Dino(w, section), width, default_cut(width), CleverSection())
    features = torch.randn(settings["views"], settings["batch"], width)
    clever, features = clever.to(device), features.to(device).requires_grad_()

    def work() -> None:
        terms = clever.loss_terms(features[:2].detach(), features, 0)
        torch.stack(list(terms.values())).sum().backward()

    before = _used_bytes(device)
    spent = seconds(work, device)
    gradients = [p.grad.norm() for p in clever.parameters() if p.grad is not None]
    return {
        "peak_bytes": _peak_bytes(device) - before,
        "seconds": spent,
        "gradient_norm": torch.stack(gradients).norm().item(),
    }


def _used_bytes(device: str) -> int:
    """Memory in use: the allocator's on a GPU, the whole process's on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_bytes(device: str) -> int:
    """The greatest `_used_bytes` so far."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function where nothing has used memory before it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


@app.command()
def heads(
    device: DeviceOption = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 128,
    views: Annotated[int, typer.Option(min=3, help="Views of an image, two of them global.")] = 10,
    prototypes: Annotated[int, typer.Option(min=2, help="Prototypes of each head.")] = 65536,
    feature_dim: Annotated[int, typer.Option(min=2, help="Width of the features.")] = 2048,
    chunk_images: Annotated[int, typer.Option(min=1, help="Images scored at a time.")] = 16,
    json_path: JsonOption = None,
) -> None:
    """Peak memory of the two prototype heads: all images at once beside some at a time.

    Each form runs in a process of its own, forward and backward, on random features; the norms
    of their gradients are printed to show that they are the same. `method.chunk_images` in a
    recipe chooses the second.

    Example: python -m training.bench heads --chunk-images 8
    """
    settings = {
        "batch": batch, "views": views, "prototypes": prototypes, "feature_dim": feature_dim
    }  # fmt: skip
    try:
        usable_device(device)
        forms = {"all at once": None, f"{chunk_images} at a time": chunk_images}
        rows = {
            name: _in_new_process(heads_memory, settings, chunk, device)
            for name, chunk in forms.items()
        }
        record = {"settings": settings, "environment": environment(device), "forms": rows}
        if json_path is not None:
            write_atomic(json_path, (json.dumps(record, indent=2) + "\n").encode())
    except (CleverZooError, OSError) as error:
        fail(error)
    table = Table("", "peak memory", "ratio", "seconds", "gradient norm", title="two heads")
    whole = rows["all at once"]
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"{row['peak_bytes'] / max(whole['peak_bytes'], 1):.2f}",
            f"{row['seconds']:.1f}",
            f"{row['gradient_norm']:.6g}",
        )
    table.caption = f"{record['environment']['hardware']}, torch {record['environment']['torch']}"
    Console().print(table)


def backbone_step(
    backbone: str, settings: dict[str, Any], device: str, *, kernel: bool = True
) -> dict[str, float]:
    """Speed and peak memory of a backbone's training step: forward, backward and AdamW.

    Args:
        backbone: Its name.
        settings: `batch`, `size_px`, `steps`, `precision`.
        device: Where it runs.
        kernel: False: a VMamba's scan in plain torch even where there is a kernel.

    Returns:
        `images_per_s`, the median step's; `peak_bytes` above what the process took before, so
        with weights, gradients and the optimiser's state.
    """
    if not kernel:
        vmamba.selective_scan = functools.partial(vmamba.selective_scan, kernel=False)
    before, half = _used_bytes(device), HALF.get(settings["precision"])
    torch.manual_seed(0)
    network = build_backbone(backbone).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    pixels = torch.randn(settings["batch"], 3, *[settings["size_px"]] * 2, device=device)

    def work() -> None:
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, half, enabled=half is not None):
            features = network(pixels)
        features.float().square().mean().backward()
        optimizer.step()

    work()  # the first one makes the optimiser's state and compiles kernels
    step_s = median(seconds(work, device) for _ in range(settings["steps"]))
    return {
        "images_per_s": settings["batch"] / step_s,
        "peak_bytes": _peak_bytes(device) - before,
    }


@app.command()
def backbones(
    names: Annotated[
        list[str] | None, typer.Argument(help="Backbones (default: all) beside resnet50.")
    ] = None,
    device: DeviceOption = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 8,
    size: Annotated[int, typer.Option(min=1, help="Side of the images, px.")] = 224,
    steps: Annotated[int, typer.Option(min=1, help="Counted steps.")] = 3,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    json_path: JsonOption = None,
) -> None:
    """Training steps of the bare backbones: images/s and peak memory beside ResNet-50's.

    Each runs in a process of its own, on random pixels. On a GPU the VMamba runs twice, with the
    kernel and with the scan in plain torch.

    Example: python -m training.bench backbones vmamba_tiny --device cuda --precision bf16
    """
    settings = {"batch": batch, "size_px": size, "steps": steps, "precision": precision}
    try:
        if precision not in ("fp32", *HALF):
            problem = f"precision is {precision!r}; use fp32, {' or '.join(HALF)}"
            raise RecipeError("options", [problem])
        has_kernel = usable_device(device).type == "cuda"
        rows: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys(["resnet50", *(names or list_backbones())]):
            rows[name] = _in_new_process(backbone_step, name, settings, device)
            if has_kernel and name.startswith("vmamba"):
                plain = functools.partial(backbone_step, kernel=False)
                rows[f"{name}, plain scan"] = _in_new_process(plain, name, settings, device)
        record = {"settings": settings, "environment": environment(device), "backbones": rows}
        if json_path is not None:
            write_atomic(json_path, (json.dumps(record, indent=2) + "\n").encode())
    except (CleverZooError, OSError) as error:
        fail(error)
    title = f"training steps of backbones, batch {batch}, {size} px, {precision}"
    table = Table("", "images/s", "to resnet50", "peak memory", "to resnet50", title=title)
    peer = rows["resnet50"]
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['images_per_s']:.1f}",
            f"{row['images_per_s'] / peer['images_per_s']:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"{row['peak_bytes'] / peer['peak_bytes']:.2f}",
        )
    table.caption = f"{record['environment']['hardware']}, torch {record['environment']['torch']}"
    Console().print(table)


def reference_views_rate(config: ViewsConfig, images: int, image_size: int) -> float:
    """Images/s of the reference pipeline in one process, on ready-made Pillow images."""
    torch.set_num_threads(1)
    pillow = [photograph(seed, image_size) for seed in range(images)]
    reference = config.model_copy(update={"pipeline": "reference"})
    make = MultiCrop(reference, IMAGENET_MEAN, IMAGENET_STD, seed=0)
    samples = np.arange(images)

    def views() -> None:
        make.views_of(pillow, samples, 0, torch.device("cpu"))

    views()  # to warm up
    return images / seconds(views, "cpu")


def fleet_rate(config: ViewsConfig, images: int, image_size: int, cores: int) -> float:
    """Images/s of the reference pipeline on all cores at once."""
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(reference_views_rate, config, images, image_size) for _ in range(cores)]
        return sum(job.result() for job in jobs)


def scan_works(settings: dict[str, int], device: str) -> dict[str, Callable[[], float]]:
    """Forward and backward of each form of the selective scan, each a call that returns its time.

    Args:
        settings: `batch`, `directions`, `channels`, `length`.
    """
    b, k, c, length = settings.values()
    g = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, generator=g, device=device)
    inputs = [
        normal(b, k, c, length),
        torch.nn.functional.softplus(normal(b, k, c, length) - 3),
        -normal(k, c).exp(),
        normal(b, k, length),
        normal(b, k, length),
        normal(k, c),
    ]
    inputs = [x.requires_grad_() for x in inputs]
    gradient = normal(b, k, c, length)
    forms: dict[str, Callable[..., torch.Tensor]] = {
        "loop": selective_scan_loop,
        "torch": functools.partial(selective_scan, kernel=False),
    }
    if torch.device(device).type == "cuda":
        forms["triton"] = selective_scan

    def form_seconds(form: Callable[..., torch.Tensor]) -> float:
        return seconds(lambda: torch.autograd.grad(form(*inputs), inputs, gradient), device)

    return {name: functools.partial(form_seconds, form) for name, form in forms.items()}


@app.command()
def scan(
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 8,
    channels: Annotated[int, typer.Option(min=1, help="Channels of each direction.")] = 96,
    length: Annotated[int, typer.Option(min=1, help="Positions, h x w of the feature map.")] = 3136,
    rounds: RoundsOption = 5,
    json_path: JsonOption = None,
) -> None:
    """Time VMamba's selective scan, forward and backward in float32, beside the plain loop.

    The defaults are the first stage of `vmamba_tiny` at 224 px. The loop goes position by
    position over slices made beforehand; on a GPU the Triton kernels take part.

    Example: python -m training.bench scan --threads 2 --json scan.json
    """
    torch.set_num_threads(threads)
    settings = {"batch": batch, "directions": 4, "channels": channels, "length": length}
    try:
        usable_device(device)
        works = scan_works(settings, device)
        record = forms_record(works, rounds, settings, device, peer="loop", json_path=json_path)
    except (CleverZooError, OSError) as error:
        fail(error)
    title = f"selective scan {batch} x 4 x {channels} x {length}, forward and backward"
    Console().print(forms_table(record, title, peer="loop"))


def forms_record(
    works: dict[str, Callable[[], float]],
    rounds: int,
    settings: dict[str, Any],
    device: str,
    *,
    peer: str,
    json_path: Path | None,
) -> dict[str, Any]:
    """Time forms of one computation in turns; `times_the_PEER` is how many times as fast each is.

    Args:
        works: Name of a form -> call that returns its seconds.
        peer: Name of the form that the others are compared with.
        json_path: Also write the record there.
    """
    figures, canaries = take_turns(works, rounds)
    each = [{name: s[i] for name, s in figures.items()} for i in range(rounds)]
    ratios = [{name: row[peer] / s for name, s in row.items()} for row in each]
    record = {
        "settings": settings,
        "environment": environment(device),
        "seconds": spreads(each),
        f"times_the_{peer}": spreads(ratios),
        "canary_gflops": canaries,
        "rounds": each,
    }
    if json_path is not None:
        write_atomic(json_path, (json.dumps(record, indent=2) + "\n").encode())
    return record


def forms_table(record: dict[str, Any], title: str, *, peer: str) -> Table:
    """What `forms_record` found, for a terminal."""
    canaries = record["canary_gflops"]
    table = Table("", "ms", "min..max", f"times the {peer}", "min..max", title=title)
    for name in record["seconds"]:
        s, r = record["seconds"][name], record[f"times_the_{peer}"][name]
        table.add_row(
            name,
            f"{1e3 * s['median']:,.1f}",
            f"{1e3 * s['min']:,.1f}..{1e3 * s['max']:,.1f}",
            f"{r['median']:.1f}",
            f"{r['min']:.1f}..{r['max']:.1f}",
        )
    table.caption = (
        f"{record['environment']['hardware']}, torch {record['environment']['torch']}; "
        f"canary {min(canaries):.0f}..{max(canaries):.0f} GFLOP/s"
    )
    return table


def small_map_works(settings: dict[str, Any], device: str) -> dict[str, Callable[[], float]]:
    """Forward and backward of a backbone with torch's convolutions and with matrix products.

    Args:
        settings: `backbone`, `batch`, `size_px`.
    """
    torch.manual_seed(0)
    plain = build_backbone(settings["backbone"]).to(device, memory_format=torch.channels_last)
    products = copy.deepcopy(plain)
    use_small_map_convolutions(products)
    shape = (settings["batch"], 3, settings["size_px"], settings["size_px"])
    pixels = torch.randn(shape, device=device).to(memory_format=torch.channels_last)

    def step_seconds(network: torch.nn.Module) -> float:
        return seconds(lambda: network(pixels).square().mean().backward(), device)

    forms = {"convolutions": plain, "products": products}
    return {name: functools.partial(step_seconds, network) for name, network in forms.items()}


@app.command()
def small_maps(
    backbone: Annotated[str, typer.Argument(help="A ResNet.")] = "resnet50",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 1,
    batch: Annotated[int, typer.Option(min=2, help="Images.")] = 128,
    size: Annotated[int, typer.Option(min=1, help="Side of the images, px.")] = 32,
    rounds: RoundsOption = 5,
    json_path: JsonOption = None,
) -> None:
    """Time a ResNet, forward and backward, with matrix products in place of small convolutions.

    That is what `run.small_map_products = true` chooses in a recipe.

    Example: python -m training.bench small-maps resnet18 --size 32
    """
    torch.set_num_threads(threads)
    settings = {"backbone": backbone, "batch": batch, "size_px": size}
    try:
        usable_device(device)
        works = small_map_works(settings, device)
        record = forms_record(
            works, rounds, settings, device, peer="convolutions", json_path=json_path
        )
    except (CleverZooError, OSError) as error:
        fail(error)
    title = f"{backbone}, {batch} x {size} px, forward and backward"
    Console().print(forms_table(record, title, peer="convolutions"))


def step_rates(recipe: Recipe, device: str, steps: int) -> dict[str, float]:
    """Train a few steps on made-up images and read the run's own log.

    Returns:
        Medians over the steps after the first: `images_per_s`, `data_share` of a step spent
        waiting for images, `views_s`, `step_s`.
    """
    images = load_train_images(recipe.data, None, at_least=recipe.batch_size)
    processes = Processes(torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, images, Path(folder), processes=processes, stop_at_step=steps + 1)
        lines = read_log(Path(folder) / LOG)[1:]
    batch = images.__getitems__(range(recipe.batch_size))
    make, pixels = build_views(recipe), batch.images.to(device)
    make_views = functools.partial(make, pixels, batch.samples.numpy(), 0)
    make_views()
    return {
        "images_per_s": median(line["images_per_s"] for line in lines),
        "data_share": median(line["data_s"] / line["step_s"] for line in lines),
        "step_s": median(line["step_s"] for line in lines),
        "views_s": median(seconds(make_views, device) for _ in range(3)),
    }


@app.command()
def step(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="Recipes (default: CLeVER's of ImageNet-100).")
    ] = None,
    device: DeviceOption = "cpu",
    batch: Annotated[int, typer.Option(min=2, help="Images of a step.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Counted steps.")] = 3,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    cores: Annotated[int, typer.Option(min=0, help="Cores of the peer; 0: all.")] = 0,
    json_path: JsonOption = None,
) -> None:
    """Time whole training steps, and say what 200 epochs of ImageNet-100 would take.

    The peer is an ideal that nothing can beat: our own step without the making of its views, or
    the reference views of all of the machine's cores, whichever is slower.

    Example: python -m training.bench step --device cuda --batch 128 --precision bf16
    """
    names = recipes or [f"clever-{b.replace('_', '-')}.in100-caug" for b in list_backbones()]
    rows: dict[str, dict[str, float]] = {}
    try:
        usable_device(device)
        overrides = [
            *("data.dataset=fake", "data.cache=memory", f"data.fake_images={2 * batch}"),
            f"batch_size={batch}",
            f"run.precision={precision}",
        ]
        for name in names:
            recipe = load_recipe(name, overrides)
            row = step_rates(recipe, device, steps)
            side = recipe.data.image_size_px
            fleet = fleet_rate(recipe.views, 8, side, cores or os.cpu_count() or 1)
            alone = batch / max(row["step_s"] - row["views_s"], 1e-9)
            row |= {"reference_views_per_s": fleet, "peer_images_per_s": min(fleet, alone)}
            row["in100_hours"] = IN100_EPOCHS * IN100_IMAGES / row["images_per_s"] / 3600
            rows[name] = row
        record = {
            "settings": {"batch": batch, "steps": steps, "precision": precision},
            "environment": environment(device),
            "recipes": rows,
        }
        if json_path is not None:
            write_atomic(json_path, (json.dumps(record, indent=2) + "\n").encode())
    except (CleverZooError, OSError) as error:
        fail(error)
    table = Table(
        *("", "images/s", "waiting for data", "peer", "ratio", "200 epochs of ImageNet-100"),
        title=f"training steps, batch {batch}, {precision}",
    )
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['images_per_s']:.1f}",
            f"{row['data_share']:.1%}",
            f"{row['peer_images_per_s']:.1f}",
            f"{row['images_per_s'] / row['peer_images_per_s']:.2f}",
            f"{row['in100_hours']:,.0f} h",
        )
    table.caption = f"{record['environment']['hardware']}, torch {record['environment']['torch']}"
    Console().print(table)


if __name__ == "__main__":
    app()
