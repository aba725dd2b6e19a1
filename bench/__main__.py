"""Speed beside peers, in one process and in turns; writes bench/results.json.

Absolute figures move with whatever else the machine does; the ratio of two neighbours in the same
round holds. ``make bench`` runs all sections, about half an hour on two cores.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

import clever_zoo
from bench.load import compare_with_session
from bench.peers import (
    eager,
    fastembed_style_folder,
    forward_s,
    timm_folder,
    timm_transform,
    tuned,
)
from bench.record import HEADS, RESULTS, BenchRecord, Row, Spread, cells
from bench.timing import photograph, seconds, take_turns
from clever_zoo.ahead import usable_cores
from clever_zoo.backbones import BACKBONES
from clever_zoo.bulk import embed_files
from clever_zoo.cli import fail
from clever_zoo.encoder import Encoder
from clever_zoo.errors import CleverZooError
from clever_zoo.onnx_encoder import OnnxEncoder
from clever_zoo.onnx_graph import GraphInput, OnnxGraph, Precision
from clever_zoo.preprocess import Decoder, image_pixels, load_image, pixel_loader
from clever_zoo.records import Environment
from training.provenance import environment

# Ratios to plain timm at batch 32, fp32 and int8, and of the latency at batch 1.
REQUIRED = {
    "resnet18": (1.3, 2.8, 0.65),
    "resnet50": (1.6, 4.5, 0.65),
    "vit_tiny": (None, None, 0.95),
    "vit_small": (0.85, 1.5, 0.95),
    "vmamba_tiny": (None, None, None),
}
Rows = tuple[list[Row], list[float]]


class Size(NamedTuple):
    """How much is done; --smoke makes it tiny."""

    backbones: tuple[str, ...]
    batch: int
    calls: int
    pictures: int
    requests: int
    clients: int


WHOLE = Size(tuple(BACKBONES), batch=32, calls=10, pictures=128, requests=4, clients=64)
SMOKE = Size(("resnet18",), batch=2, calls=1, pictures=4, requests=1, clients=2)


class Bench:
    """Models and pictures that the sections share, made when first asked for."""

    def __init__(self, folder: Path, size: Size, rounds: int) -> None:
        self.folder, self.size, self.rounds = folder, size, rounds
        self.threads = usable_cores()

    def encoder(self, backbone: str) -> Encoder:
        """Random weights, in evaluation mode."""
        torch.manual_seed(0)
        return clever_zoo.create_encoder(backbone).eval()

    def graph(
        self, backbone: str, precision: Precision = "fp32", input: GraphInput = "uint8"
    ) -> Path:
        """An exported encoder."""
        path = self.folder / f"{backbone}-{precision}-{input}.onnx"
        if not path.exists():
            clever_zoo.export_onnx(self.encoder(backbone), path, precision=precision, input=input)
        return path

    def pictures(self) -> list[Path]:
        """JPEG files of 500 x 375 pixels."""
        folder = self.folder / "pictures"
        if not folder.exists():
            folder.mkdir()
            for i in range(self.size.pictures):
                picture = photograph(i, 500).crop((0, 60, 500, 435))
                picture.save(folder / f"{i:03d}.jpg", quality=90)
        return sorted(folder.iterdir())


def models(bench: Bench) -> Rows:
    """Whole batches at 224 px: ONNX Runtime, fp32 and int8, beside timm plain and tuned."""
    rows, canaries = [], []
    batch = bench.size.batch
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)
    for backbone in bench.size.backbones:
        architecture = BACKBONES[backbone].architecture
        plain, floats = eager(architecture), torch.randn(batch, 3, 224, 224)
        graphs = {
            p: OnnxEncoder.from_pretrained(bench.graph(backbone, p)) for p in ("fp32", "int8")
        }
        with tuned(architecture, batch, bench.threads) as tuned_s:
            works: dict[str, Callable[[], float]] = {
                "timm": lambda plain=plain, floats=floats: forward_s(plain, floats),
                "timm tuned": tuned_s,
            }
            for precision, encoder in graphs.items():
                works[precision] = lambda encoder=encoder: seconds(
                    lambda: encoder.embed_pixels(pixels), "cpu"
                )
            spent, canary = take_turns(works, bench.rounds)
        canaries += canary
        rates = {name: [batch / s for s in figures] for name, figures in spent.items()}
        for precision, required in zip(("fp32", "int8"), REQUIRED[backbone], strict=False):
            subject = f"{backbone} {precision}, batch {batch}"
            for peer, needed in (("timm", required), ("timm tuned", None)):
                row = Row.of(
                    "models", subject, peer, "images/s", rates[precision], rates[peer], needed
                )
                rows.append(row)
    return rows, canaries


def latency(bench: Bench) -> Rows:
    """One image at a time: median time of a call."""
    rows, canaries = [], []
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    one = torch.randn(1, 3, 224, 224)
    for backbone in bench.size.backbones:
        plain = eager(BACKBONES[backbone].architecture)
        encoder = OnnxEncoder.from_pretrained(bench.graph(backbone))

        def median_ms(work: Callable[[], object]) -> float:
            times = [seconds(work, "cpu") for _ in range(bench.size.calls)]
            return float(np.median(times)) * 1e3

        spent, canary = take_turns(
            {
                "timm": lambda plain=plain, ms=median_ms: ms(lambda: forward_s(plain, one)),
                "ours": lambda encoder=encoder, ms=median_ms: ms(
                    lambda: encoder.embed_pixels(pixels)
                ),
            },
            bench.rounds,
        )
        canaries += canary
        figures = spent["ours"], spent["timm"], REQUIRED[backbone][2]
        subject = f"{backbone} fp32, one image"
        rows.append(Row.of("latency", subject, "timm", "ms", *figures, at_most=True))
    return rows, canaries


def preprocess(bench: Bench) -> Rows:
    """JPEG file to what the network is fed, on one core; normalisation is inside our graph."""
    paths = bench.pictures()[:32]
    spec = clever_zoo.create_encoder("vit_tiny").spec.preprocess
    fast = pixel_loader("fast")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        spent, canary = take_turns(
            {
                "timm": lambda: seconds(
                    lambda: [timm_transform(Image.open(p).convert("RGB")) for p in paths], "cpu"
                ),
                "pillow": lambda: seconds(lambda: [image_pixels(p, spec) for p in paths], "cpu"),
                "fast": lambda: seconds(lambda: [fast(p, spec, 0) for p in paths], "cpu"),
                "decode": lambda: seconds(lambda: [load_image(p) for p in paths], "cpu"),
            },
            bench.rounds,
        )
    finally:
        torch.set_num_threads(before)
    rates = {name: [len(paths) / s for s in figures] for name, figures in spent.items()}
    rows = []
    for decoder, required in (("pillow", 1.5), ("fast", 2.5)):
        subject = f"JPEG 500x375 to pixels, {decoder}, one core"
        for peer, needed in (("timm", required), ("decode", None)):
            figures = rates[decoder], rates[peer], needed
            name = {"decode": "decoding with Pillow alone"}.get(peer, peer)
            rows.append(Row.of("preprocess", subject, name, "images/s", *figures))
    return rows, canary


def folder(bench: Bench) -> Rows:
    """A folder of JPEG files to Parquet, beside the network alone and two plain loops."""
    rows, canaries = [], []
    paths, batch = bench.pictures(), bench.size.batch
    out = bench.folder / "out.parquet"
    for backbone in ("resnet18", "resnet50"):
        if backbone not in bench.size.backbones:
            continue
        encoder = OnnxEncoder.from_pretrained(bench.graph(backbone))
        floats = OnnxGraph.open(bench.graph(backbone, input="float32"))
        plain = eager(BACKBONES[backbone].architecture)
        squares = [image_pixels(path, encoder.spec.preprocess) for path in paths]
        batches = [np.stack(squares[i : i + batch]) for i in range(0, len(squares), batch)]
        works = {
            **{
                decoder: lambda e=encoder, d=decoder: embed_files(
                    paths, e, out, batch_size=batch, decoder=d
                )
                for decoder in get_args(Decoder)
            },
            "network alone": lambda e=encoder, b=batches: [e.embed_pixels(x) for x in b],
            "fastembed-style loop": lambda g=floats: fastembed_style_folder(g, paths, batch),
            "timm loop": lambda m=plain: timm_folder(m, paths, batch),
        }
        spent, canary = take_turns(
            {name: lambda work=work: seconds(work, "cpu") for name, work in works.items()},
            bench.rounds,
        )
        canaries += canary
        rates = {name: [len(paths) / s for s in figures] for name, figures in spent.items()}
        required = {"network alone": 0.95, "fastembed-style loop": 1.2, "timm loop": None}
        for decoder in get_args(Decoder):
            subject = f"folder, {backbone} fp32, {decoder}"
            for peer, needed in required.items():
                figures = rates[decoder], rates[peer], needed if decoder == "fast" else None
                rows.append(Row.of("folder", subject, peer, "images/s", *figures))
    return rows, canaries


def serve(bench: Bench) -> Rows:
    """`clever-zoo serve` under clients of another process, beside the session alone."""
    backbone = "resnet50" if "resnet50" in bench.size.backbones else bench.size.backbones[0]
    clients = bench.size.clients

    def once() -> tuple[float, float]:
        load, session_images_per_s = compare_with_session(
            bench.graph(backbone),
            clients=clients,
            requests=bench.size.requests,
            batch=bench.size.batch,
        )
        if load.errors:
            raise RuntimeError(f"{load.errors} requests failed under load")
        return load.images_per_s, session_images_per_s

    rates, canaries = take_turns({"serve": once}, bench.rounds)
    served, alone = zip(*rates["serve"], strict=True)
    subject = f"serve {backbone} fp32, {clients} clients"
    row = Row.of("serve", subject, "session alone", "images/s", served, alone, 0.85)
    return [row], canaries


_STARTUP = """
import json, sys, time
started = time.perf_counter()
{imports}
ready = time.perf_counter() - started
line = next(l for l in open("/proc/self/status") if l.startswith("VmRSS"))
print(json.dumps([ready, int(line.split()[1]) / 1024]))
"""


def startup(bench: Bench) -> Rows:
    """A new process until the runtime is imported: time, and resident memory."""

    def fresh(imports: str) -> tuple[float, float]:
        command = [sys.executable, "-c", _STARTUP.format(imports=imports)]
        printed = subprocess.run(command, capture_output=True, check=True).stdout
        time_s, size_mb = json.loads(printed)
        return time_s, size_mb

    measured, canaries = take_turns(
        {
            "ours": lambda: fresh("from clever_zoo import OnnxEncoder"),
            "timm": lambda: fresh("import timm"),
        },
        bench.rounds,
    )
    times, sizes = (
        [[figures[column] for figures in measured[name]] for name in ("ours", "timm")]
        for column in (0, 1)
    )
    return [
        Row.of("startup", "import OnnxEncoder", "import timm", "s", *times, at_most=True),
        Row.of("startup", "import OnnxEncoder", "import timm", "MB", *sizes, at_most=True),
    ], canaries


SECTIONS = {f.__name__: f for f in (models, latency, preprocess, folder, serve, startup)}
SectionChoice = StrEnum("SectionChoice", ["all", *SECTIONS])


def main(
    section: Annotated[SectionChoice, typer.Argument(help="What to measure.")] = SectionChoice.all,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Write results.json there; for all: bench/results.json.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny, to see that it runs.")] = False,
) -> None:
    """Time ours beside peers: timm plain and tuned, plain loops, the session alone.

    Each section runs ours and its peers in turns, round by round, and prints medians, the ratio
    and whether the project's requirement is met. Keep the machine quiet: the canary says how
    quiet it was. After a whole run, `make tables` brings the README's table up to date.

    Example: python -m bench models --rounds 3
    """
    chosen = list(SECTIONS) if section == SectionChoice.all else [section.value]
    if out is None and section == SectionChoice.all and not smoke:
        out = RESULTS
    torch.set_num_threads(usable_cores())
    started = time.perf_counter()
    rows: list[Row] = []
    canaries: list[float] = []
    console = Console()
    try:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            bench = Bench(Path(folder), SMOKE if smoke else WHOLE, rounds)
            status = stack.enter_context(Console(stderr=True).status(""))
            for name in chosen:
                status.update(f"{name}, since {time.perf_counter() - started:.0f} s")
                found, canary = SECTIONS[name](bench)
                rows += found
                canaries += canary
    except (CleverZooError, OSError) as error:
        fail(error)
    libraries = ("onnxruntime", "timm", "pillow", "numpy")
    record = BenchRecord(
        environment=Environment(
            **environment("cpu"), versions={name: version(name) for name in libraries}
        ),
        rounds=rounds,
        canary_gflops=Spread.of(canaries),
        rows=tuple(rows),
    )
    table = Table(*HEADS)
    for row in record.rows:
        table.add_row(*cells(row))
    console.print(table)
    console.print(
        f"canary {record.canary_gflops.median:.0f} GFLOP/s "
        f"({record.canary_gflops.min:.0f}..{record.canary_gflops.max:.0f})"
    )
    if out is not None:
        record.write(out)


if __name__ == "__main__":
    typer.run(main)
