"""The command line: ``clever-zoo list | info | embed | compare | export | verify``."""

import json
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from clever_zoo.backbones import list_backbones
from clever_zoo.errors import CleverZooError
from clever_zoo.registry import list_models, model_info

app = typer.Typer(
    name="clever-zoo",
    help="Image embeddings in two labelled halves: what is in the picture, and how it was seen.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out, _err = Console(), Console(stderr=True)

ModelArgument = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A released name, org/repo or hf-hub:org/repo@rev on the Hub, or local-dir:PATH.",
    ),
]


class OnErrorChoice(StrEnum):
    """What to do with an unreadable file."""

    skip = "skip"
    raise_ = "raise"


def fail(error: CleverZooError | OSError) -> NoReturn:
    """Print an error as one message and end with exit code 2."""
    _err.print(f"[red]error:[/red] {type(error).__name__}: ", end="")
    _err.print(str(error), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell-style filter, such as 'clever-*'.")] = "*",
    backbone: Annotated[str | None, typer.Option(help="Only this backbone.")] = None,
) -> None:
    """List the released models, and the backbones that can be built."""
    try:
        names = list_models(pattern, backbone=backbone)
    except CleverZooError as error:
        fail(error)
    table = Table("model", "backbone", "invariant", "equivariant", "input px", "MB")
    for spec in map(model_info, names):
        size_mb = f"{spec.weights.size_bytes / 1e6:.1f}" if spec.weights else ""
        halves = str(spec.invariant_dim), str(spec.equivariant_dim)
        size_px = str(spec.preprocess.input_size_px)
        table.add_row(spec.name, spec.backbone, *halves, size_px, size_mb)
    _out.print(table)
    _out.print(f"backbones: {', '.join(list_backbones())}")


@app.command()
def info(name: Annotated[str, typer.Argument(help="A released model.")]) -> None:
    """Print a released model's spec as JSON."""
    try:
        spec = model_info(name)
    except CleverZooError as error:
        fail(error)
    sys.stdout.write(json.dumps(spec.model_dump(mode="json"), indent=2) + "\n")


@app.command()
def embed(
    inputs: Annotated[list[str], typer.Argument(help="Folders, glob patterns and files.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Target, .parquet or .npz; replaced at the end.")
    ],
    model: ModelArgument = "clever-resnet18",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    on_error: Annotated[
        OnErrorChoice,
        typer.Option(help="skip: list unreadable files in NAME.errors.jsonl; raise: stop at one."),
    ] = OnErrorChoice.skip,
) -> None:
    """Embed images into a file with the columns path, invariant and equivariant.

    Exit code 0: all written. 1: some files were unreadable, the rest is written. 2: nothing was.

    Example: clever-zoo embed photos/ 'more/*.png' -o photos.parquet
    """
    from clever_zoo.bulk import embed_files, find_images

    try:
        from clever_zoo.encoder import from_pretrained

        paths = find_images(inputs)
        encoder = from_pretrained(model, device=device)
        bar = Progress(
            TextColumn("embed"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=_err,
        )  # fmt: skip
        with bar:
            task = bar.add_task("embed", total=len(paths))
            report = embed_files(
                paths,
                encoder,
                output,
                batch_size=batch_size,
                on_error=on_error.value,
                on_progress=lambda done: bar.update(task, completed=done),
            )
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(f"{report.written} images embedded with {encoder.spec.name} -> {output}")
    if report.errors:
        typer.echo(
            f"{len(report.errors)} unreadable files listed in {report.errors_path}", err=True
        )
        raise typer.Exit(1)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A picture.", show_default=False)],
    second: Annotated[str, typer.Argument(help="Another one.", show_default=False)],
    model: ModelArgument = "clever-resnet18",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of words.")] = False,
) -> None:
    """Say how alike two pictures are in each half.

    A cosine alone says little: each half of each model has its own range. Beside it stands how
    many pairs of different bundled pictures (small grey pictures of clothes) are less alike.
    What a half holds is measured in the model's card; its name does not promise it.

    Example: clever-zoo compare shoe.png shoe-turned.png
    """
    try:
        from clever_zoo.compare import compare_images
        from clever_zoo.encoder import from_pretrained

        encoder = from_pretrained(model)
        comparison = compare_images(encoder, first, second)
    except (CleverZooError, OSError) as error:
        fail(error)
    halves = {name: getattr(comparison, name) for name in ("invariant", "equivariant")}
    if as_json:
        values = {name: likeness._asdict() for name, likeness in halves.items()}
        record = {"model": encoder.spec.name, "images": [first, second], **values}
        typer.echo(json.dumps(record | {"pairs": comparison.pairs}, indent=2))
        return
    for name, likeness in halves.items():
        # Rounded down: 100 % is said only where no pair is as much alike.
        typer.echo(
            f"{name}: cosine {likeness.cosine:.3f}, more alike than "
            f"{int(likeness.percent_less_alike)} % of pairs of different bundled pictures"
        )


class FormatChoice(StrEnum):
    """What a model is exported as."""

    onnx = "onnx"
    triton = "triton"


class InputChoice(StrEnum):
    """What an exported graph is fed with."""

    uint8 = "uint8"
    float32 = "float32"


class PrecisionChoice(StrEnum):
    """Weights and arithmetic of an exported graph."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(help="As --model of embed; an encoder or a classifier.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Target.")],
    format: Annotated[
        FormatChoice,
        typer.Option(help="onnx: one file; triton: a folder, model repository for NVIDIA Triton."),
    ] = FormatChoice.onnx,
    input: Annotated[
        InputChoice,
        typer.Option(
            help="uint8: (batch, size, size, 3) RGB, normalised inside the graph; "
            "float32: (batch, 3, size, size), normalised by you."
        ),
    ] = InputChoice.uint8,
    precision: Annotated[
        PrecisionChoice, typer.Option(help="fp16 is for GPUs, int8 for CPUs.")
    ] = PrecisionChoice.fp32,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder, glob pattern or file, may be repeated: pictures like yours, for int8 of "
            "a convolutional backbone. The default, bundled pictures of clothes, is a poor guess."
        ),
    ] = None,
) -> None:
    """Write a model as one self-contained ONNX file, or with it a model repository for Triton.

    Input `pixels`, outputs `invariant` and `equivariant` (`logits` of a classifier); the batch is
    dynamic. A graph that does not give torch's values is not written. Needs the extra [export];
    to run the file, [onnx] is enough.

    Example: clever-zoo export clever-resnet18 -o model.onnx
    Then: clever-zoo embed photos/ -m model.onnx -o photos.parquet
    Or: clever-zoo export clever-resnet18 --format triton -o repository/
    """
    try:
        from clever_zoo.bulk import find_images
        from clever_zoo.classifier import load_model
        from clever_zoo.onnx_export import export_onnx
        from clever_zoo.serve.triton import write_triton_repository

        pictures = find_images(calibration) if calibration else None
        status = _err.status(f"exporting {model} and comparing it with torch")
        with tempfile.TemporaryDirectory() as temporary, status:
            to_triton = format is FormatChoice.triton
            graph = Path(temporary) / "model.onnx" if to_triton else output
            report = export_onnx(
                load_model(model),
                graph,
                input=input.value,
                precision=precision.value,
                calibration=pictures,
            )
            served = write_triton_repository(graph, output) if to_triton else None
    except (CleverZooError, OSError) as error:
        fail(error)
    figure = "greatest relative difference" if report.info.precision == "fp32" else "least cosine"
    if served is not None:
        typer.echo(f"{output}: {' and '.join(served)} for Triton; README.md there says how")
    typer.echo(f"{output}: {report.size_bytes / 1e6:.1f} MB, sha256 {report.sha256}")
    for name, value in report.parity.items():
        shown = f"{value:.1e}" if report.info.precision == "fp32" else f"{value:.5f}"
        typer.echo(f"{name}: {figure} to torch {shown}")


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A released name or local-dir:PATH.")],
) -> None:
    """Check a model's size and digest, and its first values against golden.json.

    Exit code 0: all is as recorded. 2: something is not.
    """
    try:
        from clever_zoo.golden import check_golden

        difference = check_golden(model)
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(f"{model}: digest as recorded, golden values within {difference:.1e}")


def main() -> None:
    """Entry point of the console script."""
    app()
