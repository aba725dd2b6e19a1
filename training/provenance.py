"""Where a number comes from: commit, hardware and library versions."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from clever_zoo.errors import CheckpointError
from clever_zoo.files import write_atomic
from clever_zoo.records import Environment

ENVIRONMENT = "environment.json"
_CHECKOUT = Path(__file__).parent.parent


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_CHECKOUT), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def commit() -> str:
    """The checkout's commit, "+changes" if tracked files differ; "unknown" without git."""
    head = _git("rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(device: str) -> dict[str, Any]:
    """Commit, hardware and versions of this process, for a results record."""
    threads = torch.get_num_threads()
    on_gpu = torch.device(device).type == "cuda"
    cpu = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "commit": commit(),
        "device": torch.device(device).type,
        "hardware": torch.cuda.get_device_name(device) if on_gpu else cpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def measuring_environment(device: str) -> Environment:
    """Where what begins now is measured; hours later the checkout may hold other code.

    Beside torch, it has the versions of the libraries that evaluations compute with.
    """
    versions = {name: version(name) for name in ("numpy", "pillow", "scikit-learn", "timm")}
    return Environment(**environment(device), versions=versions)


def record_environment(path: Path, device: str) -> None:
    """Keep a list of every environment that a run was trained under, the first one first.

    Raises:
        CheckpointError: If the list cannot be read.
    """
    try:
        seen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to go on") from error
    current = environment(device)
    if current not in seen:
        write_atomic(path, json.dumps([*seen, current], indent=2).encode())
