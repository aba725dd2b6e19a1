"""`clever-zoo serve` as a process: start, signals, memory, load from another process."""

import io
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import clever_zoo
from bench.load import (
    binary_request,
    compare_with_session,
    load_from_another_process,
    running_server,
)
from clever_zoo import cli
from clever_zoo.cli import FAULT_EXIT_CODE, app
from clever_zoo.samples import sample_paths
from tests.clever_zoo.test_serve import (
    BAD_TENSORS,
    INFER,
    NAME,
    form,
    infer_numbered,
    metric,
    numbered,
    raw_request,
    send,
)

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
runner = CliRunner()


@pytest.fixture(scope="module")
def graph(onnx_models: Path) -> str:
    return str(onnx_models / "resnet18.onnx")


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def test_sigterm_finishes_accepted_requests_and_ends_with_0(graph: str) -> None:
    # With a batch that waits five seconds for company, requests are in work when the signal comes.
    arguments = (graph, "--max-delay-ms", "5000", "--threads", "1")
    with running_server(*arguments) as (address, process), ThreadPoolExecutor(4) as clients:
        assert send(address, "/v2/health/ready").status == 200
        accepted = [clients.submit(infer_numbered, address, value) for value in range(3)]
        deadline_s = time.monotonic() + 10
        while metric(address, "clever_zoo_queued_images") < 3:
            assert time.monotonic() < deadline_s
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert send(address, "/v2/health/live").status == 200
        assert send(address, "/v2/health/ready").status == 503
        assert send(address, f"/v2/models/{NAME}/ready").status == 503
        refused = infer_numbered(address, 9)
        assert refused.status == 503
        assert "Retry-After" in refused.headers
        assert [future.result().status for future in accepted] == [200] * 3
        assert process.wait(20) == 0


def test_a_drain_is_bounded_and_says_what_it_lost(graph: str) -> None:
    arguments = (graph, "--drain-timeout-s", "0.5", "--threads", "1")
    with running_server(*arguments) as (address, process):
        stalled = raw_request(address, *binary_request(numbered(1)), cut=1)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        start_s = time.monotonic()
        assert process.wait(20) == 1
        assert time.monotonic() - start_s < 10
        stalled.close()


def test_64_clients_in_another_process_see_no_error(graph: str) -> None:
    with running_server(graph, "--threads", "1") as (address, process):
        load = load_from_another_process(address, NAME, 32, clients=64, requests=4)
        assert (load.requests, load.errors) == (256, 0)
        batches = metric(address, "clever_zoo_batch_images_count")
        assert metric(address, "clever_zoo_images_total") == 320  # one more of each to warm up
        assert batches < 320 / 2
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize(
    "count", [600, pytest.param(10_000, marks=pytest.mark.slow)], ids=["600", "10000"]
)
def test_bad_requests_leave_memory_flat_and_the_service_up(graph: str, count: int) -> None:
    kinds = [(INFER, body, headers) for body, headers, _, _ in BAD_TENSORS.values()]
    kinds += [("/embed", *form(("a.png", sample_paths()[0].read_bytes()[:150])))]
    kinds += [("/embed", b"x", {"Content-Type": "multipart/form-data; boundary=cut"})]
    with running_server(graph, "--threads", "1", "--max-body-mb", "1") as (address, process):

        def misbehave(number: int) -> int:
            if number % 20 == 0:
                raw_request(address, *binary_request(numbered(1, 20)), cut=100).close()
                return 499
            path, body, headers = kinds[number % len(kinds)]
            return send(address, path, body, headers).status

        with ThreadPoolExecutor(8) as clients:
            # As much again before: allocators and thread stacks are then as large as they get.
            assert set(clients.map(misbehave, range(300))) <= {400, 413, 415, 499}
            before = resident_bytes(process.pid)
            statuses = set(clients.map(misbehave, range(count)))
        grown_mb = (resident_bytes(process.pid) - before) / 1e6
        assert statuses <= {400, 413, 415, 499}
        assert infer_numbered(address, 1).status == 200
        assert metric(address, "clever_zoo_queued_images") == 0
        assert metric(address, "process_open_fds") < 40
    print(f"{count} bad requests: {grown_mb:+.1f} MB")
    assert grown_mb < 25


def test_an_open_address_without_a_token_is_warned_about(graph: str) -> None:
    run = [sys.executable, "-c", "from clever_zoo.cli import main; main()", "serve", graph]
    warned = subprocess.Popen(
        [*run, "--host", "0.0.0.0", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "CLEVER_ZOO_TOKEN"},
    )
    assert warned.stdout is not None
    assert "http://0.0.0.0:" in warned.stdout.readline()
    warned.send_signal(signal.SIGTERM)
    _, errors = warned.communicate(timeout=20)
    assert "anyone who reaches 0.0.0.0 can use this; set CLEVER_ZOO_TOKEN" in errors


def test_a_fault_has_an_exit_code_of_its_own() -> None:
    code = "from clever_zoo import cli; cli.app = lambda: 1 / 0; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == FAULT_EXIT_CODE
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("arguments", [["--token", ""], []])
def test_an_empty_token_is_refused(graph: str, arguments: list[str]) -> None:
    result = runner.invoke(app, ["serve", graph, *arguments], env={"CLEVER_ZOO_TOKEN": ""})
    assert result.exit_code == 2
    assert "the token has 0 characters" in result.output


def test_limits_of_pictures_and_slow_bodies_are_options(graph: str) -> None:
    picture = io.BytesIO()
    Image.new("L", (1200, 1000)).save(picture, "PNG")
    arguments = (graph, "--threads", "1", "--max-image-mpx", "1", "--body-timeout-s", "0.2")
    with running_server(*arguments) as (address, _):
        large = send(address, "/embed", picture.getvalue(), {"Content-Type": "image/png"})
        stalled = raw_request(address, *binary_request(numbered(1)), cut=1)
        slow = stalled.recv(65536)
        stalled.close()
    assert "1200x1000 pixels, at most 1000000" in large.json["images"][0]["error"]
    assert b" 408 " in slow


def test_a_taken_port_or_a_missing_model_is_said_in_a_line(graph: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = runner.invoke(app, ["serve", graph, "--port", port])
    assert result.exit_code == 2
    assert "in use" in result.output
    result = runner.invoke(app, ["serve", str(tmp_path / "no.onnx")])
    assert result.exit_code == 2
    assert "clever-zoo export" in result.output


def shown_help(command: str) -> str:
    return runner.invoke(app, [command, "--help"], terminal_width=1000).output


def test_help_teaches_with_examples() -> None:
    shown = [line.strip() for line in shown_help("serve").splitlines()]
    for line in (
        "curl -F a=@shoe.png -F b=@shirt.jpg localhost:8000/embed",
        "From Python, with tritonclient[http]:",
        'pixels = tritonclient.http.InferInput("pixels", [1, 32, 32, 3], "UINT8")',
        'client.infer("clever-resnet18", [pixels]).as_numpy("invariant")',
    ):
        assert line in shown


@pytest.mark.parametrize("command", ["embed", "compare", "convert", "export", "verify", "serve"])
def test_help_swallows_no_word(command: str) -> None:
    text = getattr(cli, command).__doc__.replace("\b", "")
    assert " ".join(text.split()) in " ".join(shown_help(command).split())


@pytest.mark.slow
def test_resnet50_under_64_clients_keeps_85_percent_of_its_session(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clever_zoo.export_onnx(clever_zoo.create_encoder("resnet50").eval(), tmp_path / "resnet50.onnx")
    pairs = [compare_with_session(tmp_path / "resnet50.onnx", requests=4) for _ in range(3)]
    print(pairs)
    assert all(load.errors == 0 for load, _ in pairs)
    assert statistics.median(load.images_per_s / alone for load, alone in pairs) >= 0.85
