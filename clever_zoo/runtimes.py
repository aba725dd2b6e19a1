"""Which runtime an encoder runs in: torch, or ONNX Runtime without torch."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from clever_zoo.embedder import ImageEmbedder
from clever_zoo.errors import BackendMissingError, check_choice
from clever_zoo.locate import has_onnx
from clever_zoo.sources import is_onnx_path

if TYPE_CHECKING:
    from clever_zoo.onnx_graph import OnnxGraph

Runtime = Literal["auto", "onnx", "torch"]
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def load_encoder(
    source: str | Path,
    *,
    runtime: Runtime = "auto",
    device: str = "cpu",
    threads: int | None = None,
) -> ImageEmbedder:
    """Load an encoder for inference.

    Args:
        source: As in `clever_zoo.from_pretrained`, or the path of an .onnx file.
        runtime: "auto" takes ONNX Runtime if it is installed and `source` is an .onnx file or a
            model that has one (on the Hub: that its SHA256SUMS lists), else torch.
        device: "cpu", "cuda"; with torch any of its devices.
        threads: Threads of one forward pass, None for the runtime's own choice. For torch it is
            set for the whole process.

    Raises:
        SpecError: For another runtime.
        BackendMissingError: If the runtime is not installed or cannot use `device`.
        CleverZooError: If the model cannot be found or loaded; see `from_pretrained`.
    """
    if choose_runtime(source, runtime) == "onnx":
        from clever_zoo.onnx_encoder import OnnxEncoder

        return OnnxEncoder(open_graph(source, device=device, threads=threads))
    if importlib.util.find_spec("torch") is None:
        raise BackendMissingError(
            f"{source} has to run in torch, which is not installed: "
            'pip install "clever-zoo[torch]", or pass an .onnx file to ONNX Runtime'
        )
    import torch

    from clever_zoo.encoder import from_pretrained

    encoder = from_pretrained(source, device=device)
    if threads is not None:
        torch.set_num_threads(threads)
    return encoder


def choose_runtime(source: str | Path, runtime: Runtime) -> Literal["onnx", "torch"]:
    """What "auto" stands for; see `load_encoder`."""
    check_choice("runtime", runtime, get_args(Runtime))
    if runtime != "auto":
        return runtime
    if is_onnx_path(source):
        return "onnx"
    installed = importlib.util.find_spec("onnxruntime") is not None
    return "onnx" if installed and has_onnx(source) else "torch"


def open_graph(source: str | Path, *, device: str, threads: int | None) -> "OnnxGraph":
    """Open an encoder's or classifier's graph in ONNX Runtime; see `load_encoder`."""
    from clever_zoo.onnx_graph import OnnxGraph

    if device not in _PROVIDERS:
        raise BackendMissingError(
            f"ONNX Runtime is used with the devices {' and '.join(_PROVIDERS)}, not {device!r}; "
            "name one of them, or use the runtime torch"
        )
    return OnnxGraph.find(source, providers=[_PROVIDERS[device]], threads=threads)
