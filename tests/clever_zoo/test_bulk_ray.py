"""The bulk operator on Ray Data gives what it gives in one process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from clever_zoo.bulk_ray import RayEngine
from clever_zoo.errors import BackendMissingError
from clever_zoo.samples import sample_paths
from tests.clever_zoo.test_bulk_resume import SMALL_PARTS_CLI

# Two machines of one core each, as far as Ray can tell, that stay up for all commands.
ON_A_CLUSTER = """
import json, os, subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
environment = {**os.environ, "RAY_ADDRESS": cluster.address}
codes = [
    subprocess.run(command, env=environment, check=False).returncode
    for command in json.loads(sys.argv[1])
]
cluster.shutdown()
print(json.dumps(codes))
"""


def rows(out: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    table = pq.read_table(out)
    halves = [np.stack(table[name].to_numpy()) for name in ("invariant", "equivariant")]
    return table["path"].to_pylist(), *halves


def assert_same(out: Path, expected: Path) -> None:
    (paths, *halves), (expected_paths, *expected_halves) = rows(out), rows(expected)
    assert paths == expected_paths
    for ours, theirs in zip(halves, expected_halves, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.linalg.norm(theirs, axis=1).max())
    errors = [path.with_name(f"{path.name}.errors.jsonl").read_text() for path in (out, expected)]
    assert errors[0] == errors[1]


@pytest.mark.slow
def test_two_ray_workers_give_the_same_file(onnx_models: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i, path in enumerate(sample_paths()[:40]):
        content = b"no picture" if i in (3, 25) else path.read_bytes()
        (tmp_path / f"pictures/{i:02d}.png").write_bytes(content)
    command = [sys.executable, "-c", SMALL_PARTS_CLI, "embed", "pictures"]
    cli = [*command, "-m", str(onnx_models / "resnet18.onnx"), "--batch-size", "4"]
    ray = [*cli, "--engine", "ray", "--workers", "2"]

    def execute(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert execute(*cli, "-o", "local.parquet").returncode == 1

    alone = execute(*ray, "-o", "alone.parquet")
    assert alone.returncode == 1, alone.stderr
    assert_same(tmp_path / "alone.parquet", tmp_path / "local.parquet")
    assert alone.stdout.startswith("38 images embedded with clever-resnet18.fmnist")
    assert alone.stderr.splitlines()[-1].startswith("2 unusable files listed in")
    lines = [line for line in alone.stderr.splitlines() if "Set ray log level" not in line]
    assert [line.split()[0] for line in lines[:-1]] == ["embed"], alone.stderr

    commands = [
        [*ray, "-o", "cluster.parquet", "--on-error", "raise"],
        [*ray, "-o", "cluster.parquet", "--resume"],
    ]
    cluster = execute(sys.executable, "-c", ON_A_CLUSTER, json.dumps(commands))
    assert json.loads(cluster.stdout.splitlines()[-1]) == [2, 1], cluster.stderr
    assert "ImageError: image" in cluster.stderr
    assert_same(tmp_path / "cluster.parquet", tmp_path / "local.parquet")


def test_without_ray_the_pip_line_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(BackendMissingError, match=r'pip install "clever-zoo\[ray\]"'):
        RayEngine(lambda: None)
