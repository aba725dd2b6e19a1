"""Load on `clever-zoo serve`: many clients in a process of their own, against the raw session.

python -m bench.load model.onnx             a server is started, and compared with its session
python -m bench.load --at localhost:8000 --size-px 224 --model NAME    the load alone, as JSON
"""

import argparse
import http.client
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clever_zoo.onnx_encoder import OnnxEncoder

_HEADER_LENGTH = "Inference-Header-Content-Length"


class LoadReport(NamedTuple):
    """What the clients saw.

    Attributes:
        images_per_s: Images embedded.
        p50_ms, p99_ms: Time of a request that was answered, from the client's side; NaN if none.
        requests: Requests answered with status 200.
        errors: Other answers, and broken connections.
    """

    images_per_s: float
    p50_ms: float
    p99_ms: float
    requests: int
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
    requests: int = 8,
    images_per_request: int = 1,
) -> LoadReport:
    """Each client sends its requests one after the other; all start together after one to warm up.

    The number of requests is fixed and not the time, so that no batch is cut off at the end.
    Threads and prepared bodies, so that the load takes little of the processor it shares.
    """
    shape = (images_per_request, size_px, size_px, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    body, headers = binary_request(pixels)
    start = threading.Barrier(clients + 1)
    times_ms: list[float] = []
    errors: list[str] = []

    def send(connection: http.client.HTTPConnection) -> bool:
        try:
            connection.request("POST", f"/v2/models/{model}/infer", body, headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            errors.append(repr(error))
            connection.close()
            return False
        if response.status != 200:
            errors.append(f"{response.status} {content[:200]!r}")
        return response.status == 200

    def client() -> None:
        connection = http.client.HTTPConnection(address, timeout=300)
        send(connection)
        start.wait()
        for _ in range(requests):
            sent_s = time.perf_counter()
            if send(connection):
                times_ms.append((time.perf_counter() - sent_s) * 1e3)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    start.wait()
    start_s = time.perf_counter()
    for thread in threads:
        thread.join()
    elapsed_s = time.perf_counter() - start_s
    for line in sorted(set(errors))[:5]:
        print(line, file=sys.stderr)
    p50_ms, p99_ms = map(float, np.percentile(times_ms or [math.nan], [50, 99]))
    rate = (len(times_ms) * images_per_request) / elapsed_s
    return LoadReport(rate, p50_ms, p99_ms, len(times_ms), len(errors))


def load_from_another_process(address: str, model: str, size_px: int, **options: int) -> LoadReport:
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


def session_rate(encoder: OnnxEncoder, batch: int, batches: int) -> float:
    """Images/s of ONNX Runtime on full batches, with nothing around it."""
    size = encoder.spec.preprocess.input_size_px
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    session = encoder.graph.session
    session.run(None, {"pixels": pixels})
    start_s = time.perf_counter()
    for _ in range(batches):
        session.run(None, {"pixels": pixels})
    return batches * batch / (time.perf_counter() - start_s)


def compare_with_session(
    graph: Path, *, clients: int = 64, requests: int = 8, batch: int = 32
) -> tuple[LoadReport, float]:
    """Serve a uint8 graph under load, and run its session alone on the same machine.

    Returns:
        What the clients saw, and the session's images/s at the same batch size.
    """
    encoder = OnnxEncoder.from_pretrained(graph, providers=["CPUExecutionProvider"])
    size_px = encoder.spec.preprocess.input_size_px
    with running_server(str(graph), "--max-batch", str(batch)) as (address, _):
        alone = session_rate(encoder, batch, math.ceil(clients * requests / batch))
        served = load_from_another_process(
            address, graph.stem, size_px, clients=clients, requests=requests
        )
    return served, alone


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graph", nargs="?", type=Path, help="an exported encoder")
    parser.add_argument("--at", help="host:port of a running server")
    parser.add_argument("--model", help="with --at: the model's name")
    parser.add_argument("--size-px", type=int, help="with --at: side of its input")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="of each client")
    parser.add_argument("--images-per-request", type=int, default=1)
    a = parser.parse_args()
    if a.graph is not None:
        served, alone = compare_with_session(a.graph, clients=a.clients, requests=a.requests)
        ratio = served.images_per_s / alone
        report = {"served": served._asdict(), "session_images_per_s": alone, "ratio": ratio}
        print(json.dumps(report, indent=2))
        return
    load = run_load(
        a.at,
        a.model,
        a.size_px,
        clients=a.clients,
        requests=a.requests,
        images_per_request=a.images_per_request,
    )
    print(json.dumps(load._asdict()))


if __name__ == "__main__":
    main()
