"""The command line, ``clever-zoo``: thin over the library, errors as one message."""

import functools
import json
import os
import sys
import tempfile
import traceback
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from clever_zoo.backbones import list_backbones
from clever_zoo.errors import BackendMissingError, CleverZooError
from clever_zoo.registry import DEFAULT_MODEL, list_models, model_info
from clever_zoo.serve import MAX_IMAGE_PIXELS

if TYPE_CHECKING:
    from clever_zoo.embedder import ImageEmbedder
    from clever_zoo.turn import Turn

app = typer.Typer(
    name="clever-zoo",
    help="Image embeddings in two labelled halves: what is in the picture, and how it was seen.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it takes [...] in a help text for markup
)
publish = typer.Typer(
    help="Model repositories for the Hugging Face Hub: build a folder offline, then push it.",
    no_args_is_help=True,
)
app.add_typer(publish, name="publish")
_out, _err = Console(), Console(stderr=True)
TOKEN_VARIABLE = "CLEVER_ZOO_TOKEN"
FAULT_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h

ModelArgument = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A released name, org/repo or hf-hub:org/repo@rev on the Hub, local-dir:PATH or an "
        ".onnx file.",
    ),
]


class RuntimeChoice(StrEnum):
    """What runs the network."""

    auto = "auto"
    onnx = "onnx"
    torch = "torch"


class EngineChoice(StrEnum):
    """Where images are embedded."""

    local = "local"
    ray = "ray"


class LogLevel(StrEnum):
    """Least severe messages of the service to print."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class DecoderChoice(StrEnum):
    """What reads and resizes images."""

    pillow = "pillow"
    fast = "fast"


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
    model = Column("model", overflow="fold")  # two names may differ in their last letters alone
    headers = ("backbone", "invariant", "equivariant", "input px", "MB")
    table = Table(model, *headers, box=None, padding=(0, 2, 0, 0))
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
    model: ModelArgument = DEFAULT_MODEL,
    runtime: Annotated[
        RuntimeChoice,
        typer.Option(help="auto: onnx for an .onnx file or a model that has one beside it."),
    ] = RuntimeChoice.auto,
    device: Annotated[str, typer.Option(help="cpu, cuda; with torch also cuda:1, mps.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 32,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the network.", show_default="one per core")
    ] = None,
    load_threads: Annotated[
        int | None,
        typer.Option(min=0, help="Threads that load images ahead.", show_default="one per core"),
    ] = None,
    decoder: Annotated[
        DecoderChoice,
        typer.Option(
            help="fast: JPEG files by simplejpeg and torch; pixels 1 of 255 apart, rarely 2."
        ),
    ] = DecoderChoice.pillow,
    on_error: Annotated[
        OnErrorChoice,
        typer.Option(
            help="skip: list files that cannot be read, or whose values are not finite, in "
            "OUTPUT.errors.jsonl; raise: stop at one."
        ),
    ] = OnErrorChoice.skip,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from what an interrupted run had done.")
    ] = False,
    engine: Annotated[
        EngineChoice, typer.Option(help="local: this process; ray: the workers of a Ray cluster.")
    ] = EngineChoice.local,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Ray workers.", show_default="one per core, or per GPU"),
    ] = None,
) -> None:
    """Embed images into a file with the columns path, invariant and equivariant.

    Exit code 0: all written. 1: some files are in the list of errors, the rest is written. Any
    other: nothing was.

    A run keeps what it did in the folder .NAME.parts beside the target until all is done. After a
    kill or an error, the same command with --resume goes on there; without, it starts again.

    Ray takes the cluster of RAY_ADDRESS or of `ray start` on this machine, else it starts a local
    one. Each worker loads the model, and sees the files under the same paths.

    \b
    Examples:
      clever-zoo embed photos/ 'more/*.png' -o photos.parquet
      clever-zoo embed photos/ -o photos.parquet -m model.onnx --threads 4
      clever-zoo embed photos/ -o photos.parquet --decoder fast
      clever-zoo embed photos/ -o photos.parquet --resume
      RAY_ADDRESS=head:6379 clever-zoo embed /shared/photos -o photos.parquet --engine ray
    """
    from clever_zoo.bulk import embed_files, find_images
    from clever_zoo.runtimes import choose_runtime, load_encoder

    try:
        chosen = choose_runtime(model, runtime.value)
        total = sum(1 for _ in find_images(inputs))
        load = functools.partial(load_encoder, model, runtime=chosen)
        if engine == EngineChoice.ray:
            from clever_zoo.bulk_ray import RayEngine

            encoder = load()  # for its spec; the workers load their own
            gpus = 0 if device == "cpu" else 1
            load = functools.partial(load, device=device, threads=threads or (None if gpus else 1))
            run = RayEngine(load, workers=workers, gpus_per_worker=gpus)
        else:
            encoder, run = load(device=device, threads=threads), None
        with _embed_progress() as bar:
            task = bar.add_task("embed", total=total, start=False)

            def show(done: int) -> None:
                if bar.tasks[task].started:
                    bar.update(task, completed=done)
                else:  # the rate leaves out loading, and what was resumed
                    bar.reset(task, completed=done)

            report = embed_files(
                find_images(inputs),
                encoder,
                output,
                batch_size=batch_size,
                threads=load_threads,
                on_error=on_error.value,
                decoder=decoder.value,
                resume=resume,
                on_progress=show,
                engine=run,
            )
    except (CleverZooError, OSError) as error:
        fail(error)
    resumed = f", {report.resumed} files were done before" if report.resumed else ""
    typer.echo(
        f"{report.written} images embedded with {encoder.spec.name} ({chosen}) -> {output}{resumed}"
    )
    if report.unreadable:
        typer.echo(f"{report.unreadable} unusable files listed in {report.errors_path}", err=True)
        raise typer.Exit(1)


def _embed_progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=_err,
    )


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:,.1f} images/s")


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A picture.", show_default=False)],
    second: Annotated[str, typer.Argument(help="Another one.", show_default=False)],
    model: ModelArgument = DEFAULT_MODEL,
    turn: Annotated[
        bool,
        typer.Option(
            "--turn",
            help="Also read from the equivariant half by how many degrees the second picture is "
            "turned against the first, and what that reading is worth; embeds 2,602 pictures.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of words.")] = False,
) -> None:
    """Say how alike two pictures are in each half.

    A cosine alone says little: each half of each model has its own range. Beside it stands how
    many pairs of different bundled pictures (small grey pictures of clothes) are less alike.
    What a half holds is measured in the model's card; its name does not promise it.

    Example: clever-zoo compare shoe.png shoe-turned.png --turn
    """
    try:
        from clever_zoo.compare import compare_images
        from clever_zoo.runtimes import load_encoder

        encoder = load_encoder(model)
        comparison = compare_images(encoder, first, second)
        reading = _read_turn(encoder, first, second) if turn else None
    except (CleverZooError, OSError) as error:
        fail(error)
    halves = {name: getattr(comparison, name) for name in ("invariant", "equivariant")}
    if as_json:
        values = {name: likeness._asdict() for name, likeness in halves.items()}
        record = {"model": encoder.spec.name, "images": [first, second], **values}
        turns = {} if reading is None else {"turn": reading._asdict()}
        typer.echo(json.dumps(record | {"pairs": comparison.pairs} | turns, indent=2))
        return
    for name, likeness in halves.items():
        # Rounded down: 100 % is said only where no pair is as much alike.
        typer.echo(
            f"{name}: cosine {likeness.cosine:.3f}, more alike than "
            f"{int(likeness.percent_less_alike)} % of pairs of different bundled pictures"
        )
    if reading is not None:
        way = "counter-clockwise" if reading.degrees >= 0 else "clockwise"
        typer.echo(
            f"turn: the second by {abs(reading.degrees):.0f}° {way} against the first; on bundled "
            f"pictures such readings are {reading.error_deg:.0f}° off on average, the answer 0 is "
            f"{reading.guess_deg:.0f}°"
        )


def _read_turn(encoder: "ImageEmbedder", first: str, second: str) -> "Turn":
    from clever_zoo.turn import read_turn, turn_pictures

    with _embed_progress() as bar:
        task = bar.add_task("turn", total=turn_pictures())
        return read_turn(
            encoder, first, second, on_progress=lambda done: bar.update(task, completed=done)
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
            "a ResNet. The default, bundled pictures of clothes, is a poor guess."
        ),
    ] = None,
) -> None:
    """Write a model as one self-contained ONNX file, or with it a model repository for Triton.

    Input `pixels`, outputs `invariant` and `equivariant` (`logits` of a classifier); the batch is
    dynamic. A graph that does not give torch's values is not written. Needs the extras export
    and onnx; to run the file, onnx is enough.

    \b
    Examples:
      clever-zoo export clever-resnet18 -o model.onnx
      clever-zoo embed photos/ -m model.onnx -o photos.parquet
      clever-zoo export clever-resnet18 --format triton -o repository/
    """
    try:
        from clever_zoo.bulk import find_images
        from clever_zoo.classifier import load_model
        from clever_zoo.onnx_export import export_onnx
        from clever_zoo.serve.triton import check_target, write_triton_repository

        pictures = find_images(calibration) if calibration else None
        status = _err.status(f"exporting {model} and comparing it with torch")
        with tempfile.TemporaryDirectory() as temporary, status:
            to_triton = format is FormatChoice.triton
            graph = Path(temporary) / "model.onnx" if to_triton else output
            if to_triton:
                check_target(output, input.value)
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
        typer.echo(f"{output}: {' and '.join(served)} for Triton; {served[0]}/README.md says how")
    typer.echo(f"{output}: {report.size_bytes / 1e6:.1f} MB, sha256 {report.sha256}")
    for name, value in report.parity.items():
        shown = f"{value:.1e}" if report.info.precision == "fp32" else f"{value:.5f}"
        typer.echo(f"{name}: {figure} to torch {shown}")


class NetworkChoice(StrEnum):
    """A network of a pre-training run."""

    teacher = "teacher"
    student = "student"


class StorageChoice(StrEnum):
    """How weights are stored."""

    float32 = "float32"
    float16 = "float16"


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A .pth, .pth.tar or .safetensors file.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    backbone: Annotated[
        str | None, typer.Option(help="Refuse any other.", show_default="as its tensors say")
    ] = None,
    network: Annotated[
        NetworkChoice | None,
        typer.Option(help="Of a pre-training run.", show_default="teacher"),
    ] = None,
    invariant_dim: Annotated[
        int | None,
        typer.Option(
            help="Where to cut the features, if the file does not tell.",
            show_default="as trained, else no split",
        ),
    ] = None,
    input_size: Annotated[
        int | None,
        typer.Option(
            help="Side of the square it sees, in pixels.",
            show_default="224, or as a ViT's position embeddings say",
        ),
    ] = None,
    crop_pct: Annotated[
        float, typer.Option(help="That side relative to the resized short side.")
    ] = 0.875,
    mean: Annotated[
        tuple[float, float, float] | None,
        typer.Option(
            help="What pixels were normalised by, R G B from 0 to 1.",
            metavar="R G B",
            show_default="ImageNet's",
        ),
    ] = None,
    std: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Likewise.", metavar="R G B", show_default="ImageNet's"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the model.", show_default="that of the folder")
    ] = None,
    dtype: Annotated[StorageChoice, typer.Option(help="How to store.")] = StorageChoice.float32,
    keep_heads: Annotated[
        bool, typer.Option("--keep-heads", help="Write the heads to heads.safetensors.")
    ] = False,
) -> None:
    """Turn a checkpoint of another code base into a model folder.

    Reads those of the CLeVER authors (teacher or student), DINO, DDCL and SimSiam, state dicts of
    torchvision and timm, and VMamba's, if their backbone is one of `clever-zoo list`. Nothing in
    the file is executed: one with more than tensors and plain values is refused.

    \b
    Examples:
      clever-zoo convert checkpoint.pth -o my-model --keep-heads
      clever-zoo convert dino_deitsmall16_pretrain.pth -o dino-vit-small
      clever-zoo convert timm-vit.safetensors -o vit --mean .5 .5 .5 --std .5 .5 .5 --crop-pct .9
    Then: clever-zoo embed photos/ -m local-dir:my-model -o photos.parquet
    """
    try:
        from clever_zoo.convert import convert_checkpoint

        conversion = convert_checkpoint(
            checkpoint,
            output,
            name=name,
            backbone=backbone,
            network=network.value if network else None,
            invariant_dim=invariant_dim,
            input_size_px=input_size,
            crop_pct=crop_pct,
            mean=mean,
            std=std,
            dtype=dtype.value,
            keep_heads=keep_heads,
        )
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo("\n".join(conversion.lines()))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A released name or local-dir:PATH.")],
) -> None:
    """Check a model's files against their recorded digests, and its values on this machine.

    Digests: of the weights, as config.json and the registry say, and of every file that SHA256SUMS
    names. Values: of golden.json, within 1e-4, in torch and in ONNX Runtime, where they are there.

    Exit code 0: all that could be checked is as recorded. 1: something is not. 2: no such model.
    70: the check itself failed.
    """
    try:
        from clever_zoo.verify import verify_model

        checks = verify_model(model)
    except (CleverZooError, OSError) as error:
        fail(error)
    for check in checks:
        typer.echo(f"{check.verdict:8}{check.subject}: {check.detail}")
    if any(check.verdict == "FAILED" for check in checks):
        raise typer.Exit(1)


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(help="A released name, a Hub repository, local-dir:PATH or .onnx file.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    runtime: Annotated[
        RuntimeChoice,
        typer.Option(help="auto: onnx for an .onnx file or a model that has one beside it."),
    ] = RuntimeChoice.auto,
    device: Annotated[str, typer.Option(help="cpu, cuda; with torch also cuda:1, mps.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the network.", show_default="one per core")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    max_delay_ms: Annotated[
        float, typer.Option(min=0, help="How long an image waits for others to share its batch.")
    ] = 5.0,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Images, and files, that may wait; more get 503.")
    ] = 256,
    max_image_mpx: Annotated[
        float, typer.Option(min=0.1, help="Largest picture that is decoded, in millions of pixels.")
    ] = MAX_IMAGE_PIXELS / 1e6,
    max_body_mb: Annotated[
        int,
        typer.Option(min=1, help="Largest body; larger ones get 413."),
    ] = 64,
    body_timeout_s: Annotated[
        float, typer.Option(min=0, help="Longest time for a body; slower ones get 408.")
    ] = 60.0,
    token: Annotated[
        str | None,
        typer.Option(
            envvar=TOKEN_VARIABLE,
            help="Bearer token to ask for; better in the environment, where `ps` shows it less.",
        ),
    ] = None,
    drain_timeout_s: Annotated[
        float, typer.Option(min=0, help="Longest time for requests in work after SIGTERM.")
    ] = 30.0,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log each request.")] = False,
    log_level: Annotated[LogLevel, typer.Option()] = LogLevel.warning,
) -> None:
    """Serve a model over HTTP: KServe V2 for tensors, POST /embed for image files.

    SIGTERM refuses new requests, finishes those in work and ends with exit code 0; with 1 if some
    were lost to --drain-timeout-s. With a token all paths but /v2/health/... ask for it.
    /openapi.json describes the paths, /metrics is for Prometheus.

    \b
    Examples:
      clever-zoo serve clever-resnet18
      curl localhost:8000/v2/health/ready
      curl localhost:8000/v2/models/clever-resnet18
      curl -F a=@shoe.png -F b=@shirt.jpg localhost:8000/embed
      curl -H 'Content-Type: image/png' --data-binary @shoe.png localhost:8000/embed
      CLEVER_ZOO_TOKEN=secret clever-zoo serve model.onnx --host 0.0.0.0
      curl -H 'Authorization: Bearer secret' -F a=@shoe.png localhost:8000/embed

    \b
    From Python, with tritonclient[http]:
      client = tritonclient.http.InferenceServerClient("localhost:8000")
      pixels = tritonclient.http.InferInput("pixels", [1, 32, 32, 3], "UINT8")
      pixels.set_data_from_numpy(array)
      client.infer("clever-resnet18", [pixels]).as_numpy("invariant")
    """
    try:
        from clever_zoo.serve.app import Limits, create_app
        from clever_zoo.serve.model import load_served_model
        from clever_zoo.serve.server import DrainingServer, is_loopback, open_socket
    except ImportError as error:
        fail(BackendMissingError(f'{error.name} is missing: pip install "clever-zoo[serve]"'))
    limits = Limits(
        max_batch=max_batch,
        max_delay_s=max_delay_ms / 1e3,
        max_queue=max_queue,
        max_body_bytes=max_body_mb << 20,
        max_image_pixels=round(max_image_mpx * 1e6),
        body_timeout_s=body_timeout_s,
    )
    if token is None:
        token = os.environ.get(TOKEN_VARIABLE)  # of an empty one typer says None
    try:
        served = load_served_model(model, runtime=runtime.value, device=device, threads=threads)
        application = create_app(served, limits, token)
        listening = open_socket(host, port)
    except (CleverZooError, OSError) as error:
        fail(error)
    if token is None and not is_loopback(listening):
        typer.echo(
            f"warning: anyone who reaches {host} can use this; set {TOKEN_VARIABLE}", err=True
        )
    server = DrainingServer(
        application,
        drain_timeout_s=drain_timeout_s,
        access_log=access_log,
        log_level=log_level.value,
    )
    typer.echo(
        f"{served.name} (sha256 {served.sha256 or 'none'}, {served.platform}) on "
        f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    )
    server.run([listening])
    if server.lost:
        typer.echo(f"{server.lost} requests were not finished in {drain_timeout_s:g} s", err=True)
        raise typer.Exit(1)


@publish.command("build")
def publish_build(
    model: Annotated[str, typer.Argument(help="A released name or local-dir:PATH.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Target folder, new or empty.", show_default=False),
    ],
) -> None:
    """Write the Hub repository of a released model into a folder, offline.

    Card, config.json, weights, onnx/model.onnx, results, golden values, figures and SHA256SUMS;
    the same bytes each time. Needs the extras [export] and [onnx].

    Example: clever-zoo publish build clever-resnet18 -o build/clever-resnet18.fmnist
    """
    try:
        from clever_zoo.publish import build

        with _err.status(f"exporting {model} and comparing it with torch"):
            spec = build(model, output)
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(f"{output}: {spec.name}, checked; look at it, then `clever-zoo publish push`")


@publish.command("push")
def publish_push(
    folder: Annotated[Path, typer.Argument(help="What `publish build` wrote.", show_default=False)],
    repo: Annotated[str, typer.Option(help="Repository org/name, created if it does not exist.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new one.", show_default="the owner's choice"),
    ] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="An existing branch.", show_default="main")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would change, change nothing.")
    ] = False,
) -> None:
    """Make a Hub repository hold a built folder, in one commit.

    The folder is checked first: a file too few or too many, a digest, a card or a registry entry
    that does not fit is refused before any request. The token is that of `hf auth login` or
    HF_TOKEN. Needs the extras [torch] and [onnx].

    Example: clever-zoo publish push build/clever-resnet18.fmnist --repo org/clever-resnet18.fmnist
    """
    try:
        from clever_zoo.publish import plan_push, push

        if dry_run:
            plan, done = plan_push(folder, repo, revision=revision), None
        else:
            done = push(folder, repo, private=private, revision=revision, create_pr=pr)
            plan = done.plan
    except (CleverZooError, OSError) as error:
        fail(error)
    if not plan.exists:
        typer.echo(f"{repo} does not exist, as far as this token may see")
    for change in ("added", "changed", "removed", "unchanged"):
        for file in getattr(plan, change):
            typer.echo(f"{change:9} {file}")
    if done is not None:
        typer.echo(done.url)
        if not pr:
            typer.echo(f'HubPin("{repo}", "{done.commit}")')


def main() -> None:
    """Entry point of the console script.

    A fault of the program exits with `FAULT_EXIT_CODE` and its traceback, because 1, Python's own
    choice, has a meaning in some commands.
    """
    try:
        app()
    except Exception:  # noqa: BLE001  # all of them, with their traceback
        traceback.print_exc()
        sys.exit(FAULT_EXIT_CODE)
