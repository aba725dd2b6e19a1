"""Load on `clever-zoo serve`: many clients in a process of their own, against the raw session.

python -m bench.load model.onnx             a server is started, and compared with its session
python -m bench.load --at localhost:8000 --size-px 224 --model NAME    the load alone, as JSON
"""

import argparse
import http.client
import json
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

_HEADER_LENGTH = "Inference-Header-Content-Length"


class LoadReport(NamedTuple):
    """What the clients saw after the warm-up.

    Attributes:
        images_per_s: Images answered.
        p50_ms, p99_ms: Time of a request, from the client's side.
        requests: Number of answers.
        errors: Answers that were no embedding, and broken connections; any status but 200.
    """

    images_per_s: float
    p50_ms: float
    p99_ms: float
    requests: int
    errors: int


class ServingReport(NamedTuple):
    """Service and raw session in turns, medians over the rounds.

    Attributes:
        served: The load's report of the round with the median rate.
        session_images_per_s: Of ONNX Runtime alone, at the same batch size.
        ratio: Median of each round's served rate / session rate.
        errors: Over all rounds.
    """

    served: LoadReport
    session_images_per_s: float
    ratio: float
    errors: int


def binary_request(pixels: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an inference request: (B, size, size, 3) uint8, answers in binary."""
    tensor = {
        "name": "pixels",
        "shape": list(pixels.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": pixels.nbytes},
    }
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return text + pixels.tobytes(), {_HEADER_LENGTH: str(len(text))}


def run_load(
    address: str,
    model: str,
    size_px: int,
    *,
    clients: int = 64,
    images_per_request: int = 1,
    seconds: float = 10.0,
    warmup_s: float = 2.0,
) -> LoadReport:
    """Keep one request of each client in flight, for warm-up and measurement.

    Threads and prepared bodies, so that the load takes little of the processor it shares.
    """
    shape = (images_per_request, size_px, size_px, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    body, headers = binary_request(pixels)
    start_s = time.perf_counter() + warmup_s
    stop_s = start_s + seconds
    times_ms: list[float] = []
    errors: list[str] = []

    def client() -> None:
        connection = http.client.HTTPConnection(address, timeout=120)
        while (sent_s := time.perf_counter()) < stop_s:
            try:
                connection.request("POST", f"/v2/models/{model}/infer", body, headers)
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException) as error:
                errors.append(repr(error))
                connection.close()
                continue
            done_s = time.perf_counter()
            if response.status != 200:
                errors.append(f"{response.status} {content[:200]!r}")
            elif start_s <= done_s < stop_s:
                times_ms.append((done_s - sent_s) * 1e3)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for line in sorted(set(errors))[:5]:
        print(line, file=sys.stderr)
    p50_ms, p99_ms = np.percentile(times_ms or [np.nan], [50, 99])
    rate = len(times_ms) * images_per_request / seconds
    return LoadReport(rate, float(p50_ms), float(p99_ms), len(times_ms), len(errors))


def load_from_another_process(
    address: str, model: str, size_px: int, **options: float
) -> LoadReport:
    """`run_load` in a process of its own; options as there."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "bench.load", f"--at={address}", f"--size-px={size_px}"]
    done = subprocess.run(
        [*command, f"--model={model}", *flags], stdout=subprocess.PIPE, text=True, check=True
    )
    return LoadReport(**json.loads(done.stdout))


@contextmanager
def running_server(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`clever-zoo serve` with these arguments on a free port, as (host:port, process)."""
    run = "from clever_zoo.cli import main; main()"
    command = [sys.executable, "-c", run, "serve", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://(\S+)", line)
            if found is None:
                raise RuntimeError(f"the server did not start: {line!r}")
            yield found[1], process
        finally:
            process.send_signal(signal.SIGTERM)


def session_rate(graph: Path, batch: int, seconds: float) -> float:
    """Images/s of ONNX Runtime on full batches, with nothing around it."""
    from clever_zoo.onnx_encoder import OnnxEncoder

    encoder = OnnxEncoder.from_pretrained(graph, providers=["CPUExecutionProvider"])
    size = encoder.spec.preprocess.input_size_px
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    session = encoder.graph.session
    session.run(None, {"pixels": pixels})
    start_s = time.perf_counter()
    batches = 0
    while time.perf_counter() < start_s + seconds:
        session.run(None, {"pixels": pixels})
        batches += 1
    return batches * batch / (time.perf_counter() - start_s)


def compare_with_session(
    graph: Path,
    *,
    rounds: int = 3,
    clients: int = 64,
    batch: int = 32,
    seconds: float = 15.0,
) -> ServingReport:
    """Serve a uint8 graph under load and run its session alone, in turns on the same machine."""
    from clever_zoo.onnx_graph import OnnxGraph
    from clever_zoo.spec import ModelSpec

    size_px = ModelSpec.from_config(
        OnnxGraph.open(graph).config, str(graph)
    ).preprocess.input_size_px
    pairs = []
    with running_server(str(graph), "--max-batch", str(batch)) as (address, _):
        for _ in range(rounds):
            alone = session_rate(graph, batch, seconds)
            served = load_from_another_process(
                address, graph.stem, size_px, clients=clients, seconds=seconds
            )
            pairs.append((served, alone))
    return ServingReport(
        sorted(served for served, _ in pairs)[rounds // 2],
        statistics.median(alone for _, alone in pairs),
        statistics.median(served.images_per_s / alone for served, alone in pairs),
        sum(served.errors for served, _ in pairs),
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graph", nargs="?", type=Path, help="an exported encoder")
    parser.add_argument("--at", help="host:port of a running server")
    parser.add_argument("--model", help="with --at: the model's name")
    parser.add_argument("--size-px", type=int, help="with --at: side of its input")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--images-per-request", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warmup-s", type=float, default=2.0)
    a = parser.parse_args()
    if a.graph is not None:
        report = compare_with_session(a.graph, clients=a.clients, seconds=a.seconds)
        print(json.dumps(report._asdict() | {"served": report.served._asdict()}, indent=2))
        return
    load = run_load(
        a.at,
        a.model,
        a.size_px,
        clients=a.clients,
        images_per_request=a.images_per_request,
        seconds=a.seconds,
        warmup_s=a.warmup_s,
    )
    print(json.dumps(load._asdict()))


if __name__ == "__main__":
    main()
