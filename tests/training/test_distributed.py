"""Several processes on one machine, started by torchrun over gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from clever_zoo.errors import RecipeError
from training.config import load_recipe
from training.distributed import Processes
from training.loader import step_samples
from training.pretrain import check_shares

ROOT = Path(__file__).parents[2]
SETTINGS = [
    *("epochs=1", "batch_size=32", "run.precision=fp32"),
    *("optimizer.warmup_epochs=0.2", "optimizer.lr_per_256=1e-2"),
]
RECIPES = {
    "dino": [
        "clever-vit-tiny.fmnist",
        *("method.prototypes=64", "method.hidden_dim=32", "method.bottleneck_dim=16"),
        "method.chunk_images=4",
    ],
    "mocov3": [
        "clever-vit-tiny.fmnist",
        *("method.name=mocov3", "method.hidden_dim=32", "views.local_views=0"),
    ],
}


def command(processes: int, out: Path, data: Path, *recipe: str, options: tuple[str, ...] = ()):
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start += [*options, "-m"]
    arguments = ["training.pretrain", *recipe, *SETTINGS, "--threads", "1"]
    return [*start, *arguments, "--data", str(data), "--out", str(out)]


def run(processes: int, out: Path, data: Path, *recipe: str, **keywords) -> None:
    subprocess.run(
        command(processes, out, data, *recipe, **keywords),
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_processes_make_one_processs_curve(tmp_path: Path, fashion_mnist_folder) -> None:
    """Same batch, views and dropped paths: the loss curves agree to rounding."""
    for processes in (1, 2):
        run(processes, tmp_path / str(processes), fashion_mnist_folder, *RECIPES["dino"])
    one, two = (lines(tmp_path / name) for name in "12")
    assert len(one) == len(two) == 9
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "contrastive", "orthogonality", "head_balance", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)
    assert abs(one[-1]["contrastive"] - one[0]["contrastive"]) > 0.01


def test_shares_of_a_batch_are_disjoint_and_complete() -> None:
    whole_batch = ["batch_size=64"]
    recipe = load_recipe("clever-vit-tiny.fmnist", [*whole_batch, "run.accumulation_steps=4"])
    whole = step_samples(
        load_recipe("clever-vit-tiny.fmnist", whole_batch), 1000, 7, Processes(torch.device("cpu"))
    )
    assert whole.shape == (1, 64)
    shares = [
        step_samples(recipe, 1000, 7, Processes(torch.device("cpu"), rank, 2)) for rank in (0, 1)
    ]
    assert [s.shape for s in shares] == [(4, 8), (4, 8)]
    assert np.array_equal(np.concatenate(shares).ravel(), whole.ravel())


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    recipe = load_recipe("clever-vit-tiny.fmnist")
    with pytest.raises(RecipeError, match="cannot be divided among 3"):
        check_shares(recipe, Processes(torch.device("cpu"), 0, 3))


def workers(parent: int) -> list[int]:
    """The training processes under a torchrun process."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [
        int(c) for c in children if "training.pretrain" in Path(f"/proc/{c}/cmdline").read_text()
    ]


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_from_the_last_checkpoint(
    tmp_path: Path, fashion_mnist_folder: Path
) -> None:
    recipe = [*RECIPES["dino"], "--checkpoint-every-s", "0"]
    run(2, tmp_path / "whole", fashion_mnist_folder, *recipe)
    out = tmp_path / "killed"
    start = command(2, out, fashion_mnist_folder, *recipe, options=("--max-restarts=1",))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = False
    with subprocess.Popen(
        start, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            log = out / "log.jsonl"
            if not killed and log.exists() and len(log.read_text().splitlines()) >= 3:
                os.kill(workers(process.pid)[1], signal.SIGKILL)
                killed = True
            time.sleep(0.02)
    assert killed
    assert process.returncode == 0
    for a, b in zip(lines(out), lines(tmp_path / "whole"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_loss_that_compares_images_sees_the_whole_batch(
    tmp_path: Path, fashion_mnist_folder
) -> None:
    """MoCo v3 on a ViT: without gathering, two processes would find their keys among half.

    Its heads hold batch-norm layers, which on a CPU see a process's share alone; so only the
    first loss, which is near the logarithm of the number of keys, is compared.
    """
    for processes in (1, 2):
        run(processes, tmp_path / str(processes), fashion_mnist_folder, *RECIPES["mocov3"])
    one, two = (lines(tmp_path / name)[0]["contrastive"] for name in "12")
    assert one == pytest.approx(np.log(32), abs=0.4)
    assert two == pytest.approx(one, abs=0.2)
    assert two > np.log(16) + 0.3
