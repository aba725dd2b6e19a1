"""One ONNX file in ONNX Runtime: its session, and what its metadata say of it.

Never imports torch.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from clever_zoo.embedding import Embedding
from clever_zoo.errors import BackendMissingError, IntegrityError, SourceError, SpecError
from clever_zoo.files import file_digest
from clever_zoo.hub import HubOptions
from clever_zoo.locate import locate_onnx
from clever_zoo.preprocess import check_pixels, normalize_pixels
from clever_zoo.spec import (
    ClassifierSpec,
    ModelSpec,
    PreprocessSpec,
    encoder_spec,
    parse_json,
    problem_lines,
    read_config,
)

try:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
except ImportError as error:
    raise BackendMissingError(
        f'{error.name} is not installed: pip install "clever-zoo[onnx]" '
        '(or "clever-zoo[onnx-gpu]", never both)'
    ) from error

# Keys of the model's metadata: the content of its config.json, and what the graph itself is.
CONFIG_KEY = "clever_config"
GRAPH_KEY = "clever_graph"

GraphInput = Literal["uint8", "float32"]
Precision = Literal["fp32", "fp16", "int8"]
Provider = str | tuple[str, dict[str, Any]]

_DEFAULT_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
_GPU_PROVIDERS = {"CUDAExecutionProvider", "TensorrtExecutionProvider"}
_LOAD_ERRORS = tuple(
    getattr(ort_errors, name)
    for name in (
        *("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelLoadFailed"),
        *("NoModel", "NotImplemented", "RuntimeException"),
    )
    if hasattr(ort_errors, name)
)
_ERRORS_ONLY = 3


class GraphInfo(BaseModel):
    """What kind of graph an ONNX file holds.

    Attributes:
        input: "uint8": (B, size, size, 3) RGB, normalised inside; "float32": (B, 3, size, size),
            normalised by the caller.
        precision: Of weights and arithmetic.
        version: Of the clever-zoo that wrote it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: GraphInput
    precision: Precision
    version: str


class OnnxGraph:
    """A session with the spec and the facts that stand in the file's metadata.

    Attributes:
        session: The onnxruntime.InferenceSession.
        source: Where it came from, for messages.
        sha256: Of the file.
        spec: Of the encoder or classifier.
        encoder: Spec of the encoder, also of a classifier's.
        info: What kind of graph it is.
        outputs: Width of each output by its name, the invariant half first.
        device: Where they are computed, "cpu" or "cuda".
        device_id: Which one of them.

    Raises:
        SpecError: If the metadata are missing or malformed, or do not describe the graph.
    """

    def __init__(self, session: "ort.InferenceSession", source: str, sha256: str) -> None:
        self.session, self.source, self.sha256 = session, source, sha256
        metadata = session.get_modelmeta().custom_metadata_map
        if absent := [key for key in (CONFIG_KEY, GRAPH_KEY) if key not in metadata]:
            raise SpecError(
                f"{source} is an ONNX model without {' and '.join(absent)} in its metadata, so its "
                "split and its preprocessing are unknown; write it with `clever-zoo export`"
            )
        try:
            config = parse_json(metadata[CONFIG_KEY], f"{source}, {CONFIG_KEY}")
            self.info = GraphInfo.model_validate_json(metadata[GRAPH_KEY])
        except ValidationError as error:
            lines = "".join(f"\n  - {line}" for line in problem_lines(error))
            raise SpecError(f"{source}, {GRAPH_KEY}:{lines}") from error
        self.spec = read_config(config, source)
        self.encoder = encoder_spec(self.spec)
        self.outputs = _output_widths(self.spec)
        self._check_signature()
        provider = session.get_providers()[0]
        self.device = "cuda" if provider in _GPU_PROVIDERS else "cpu"
        self.device_id = int(session.get_provider_options()[provider].get("device_id", 0))

    def _check_signature(self) -> None:
        """Raise a SpecError unless inputs and outputs are those that the spec asks for."""
        size = self.encoder.preprocess.input_size_px
        pixels = {
            "uint8": ("tensor(uint8)", [size, size, 3]),
            "float32": ("tensor(float)", [3, size, size]),
        }[self.info.input]
        outputs = {name: ("tensor(float)", [width]) for name, width in self.outputs.items()}
        for kind, expected, nodes in (
            ("inputs", {"pixels": pixels}, self.session.get_inputs()),
            ("outputs", outputs, self.session.get_outputs()),
        ):
            found = {node.name: (node.type, node.shape[1:]) for node in nodes}
            if found != expected:
                raise SpecError(
                    f"{self.source}: its {kind} are {found}, but its spec asks for {expected} "
                    "(type, and shape after the batch); export it again"
                )

    @classmethod
    def open(
        cls,
        model: Path | bytes,
        *,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
    ) -> Self:
        """Start a session.

        Args:
            model: An .onnx file or its content.
            providers: Execution providers in order of preference, each a name or a pair of name
                and options, as ONNX Runtime takes them. None: CUDA where it works, else the CPU.
            threads: Threads of one inference on the CPU; None: one per core.

        Raises:
            SourceError: If the file does not exist.
            IntegrityError: If ONNX Runtime cannot read it.
            BackendMissingError: If a named provider cannot be used here.
            SpecError: If it was not written by `export_onnx`.
        """
        if isinstance(model, bytes):
            content: str | bytes = model
            source = "the ONNX model"
            sha256 = hashlib.sha256(model).hexdigest()
        elif model.is_file():
            content = source = str(model)
            sha256 = file_digest(model)
        else:
            raise SourceError(
                f"{model} is no file; write one with `clever-zoo export NAME -o {model}`"
            )
        chosen = _usable_providers(providers)
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            session = ort.InferenceSession(content, options, providers=chosen)
            graph = cls(session, source, sha256)
        except (*_LOAD_ERRORS, UnicodeDecodeError) as error:  # of a damaged name or metadata
            raise IntegrityError(
                f"{source} cannot be loaded by ONNX Runtime {ort.__version__} ({error}); it is "
                "truncated, altered or newer: fetch it again or export it again"
            ) from error
        if providers is not None:
            _check_first_provider(chosen[0], session)
        return graph

    @classmethod
    def find(
        cls,
        source: str | Path,
        *,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        **hub: Any,
    ) -> Self:
        """Find a model's ONNX file and open it; see `locate_onnx` and `open`.

        Raises:
            IntegrityError: If it is damaged, or of another model than the config.json beside it.
        """
        path, config_path = locate_onnx(source, HubOptions(**hub))
        graph = cls.open(path, providers=providers, threads=threads)
        if config_path is not None:
            inside, beside = _facts(graph.spec), _facts(type(graph.spec).read(config_path))
            if other := [key for key in inside if inside[key] != beside[key]]:
                raise IntegrityError(
                    f"{path} was made from another model than {config_path} describes (different: "
                    f"{', '.join(other)}); export it again"
                )
        return graph

    def run(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """`outputs` for (B, size, size, 3) uint8 RGB pixels; safe to call from many threads.

        Raises:
            ShapeError: For another shape or type.
        """
        preprocess = self.encoder.preprocess
        check_pixels(pixels, preprocess)
        uint8 = self.info.input == "uint8"
        fed = np.ascontiguousarray(pixels if uint8 else normalize_pixels(pixels, preprocess))
        if self.device == "cpu":
            return self.session.run(list(self.outputs), {"pixels": fed})
        # Bound to the device: one copy there, one copy back.
        binding = self.session.io_binding()
        value = ort.OrtValue.ortvalue_from_numpy(fed, self.device, self.device_id)
        binding.bind_ortvalue_input("pixels", value)
        for name in self.outputs:
            binding.bind_output(name, self.device, self.device_id)
        self.session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()


def _facts(spec: ModelSpec | ClassifierSpec) -> dict[str, Any]:
    """What determines the outputs and where they come from: all but the name."""
    facts = dict(spec) | dict(encoder_spec(spec))
    return {key: value for key, value in facts.items() if key not in ("name", "encoder")}


def _output_widths(spec: ModelSpec | ClassifierSpec) -> dict[str, int]:
    """An empty half is left out of a graph."""
    if isinstance(spec, ClassifierSpec):
        return {"logits": spec.num_classes}
    halves = zip(Embedding._fields, (spec.invariant_dim, spec.equivariant_dim), strict=True)
    return {name: width for name, width in halves if width}


def tensorrt_provider(
    preprocess: PreprocessSpec, cache_dir: Path, *, max_batch: int = 32, fp16: bool = False
) -> tuple[str, dict[str, Any]]:
    """TensorRT with settings that suit these graphs, for `providers` of a uint8 graph.

    Args:
        preprocess: Of the model, for the size of its input.
        cache_dir: Where built engines are kept; building one takes minutes, loading it seconds.
        max_batch: Largest batch the engine is built for; larger ones make it build anew.
        fp16: Compute in half precision.

    Source: ONNX Runtime's documentation of its TensorRT provider. Not run by this project's tests.
    """
    size = preprocess.input_size_px
    shapes = {
        kind: f"pixels:{batch}x{size}x{size}x3"
        for kind, batch in (("min", 1), ("opt", max_batch), ("max", max_batch))
    }
    return "TensorrtExecutionProvider", {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(cache_dir),
        "trt_timing_cache_enable": True,
        "trt_fp16_enable": fp16,
        **{f"trt_profile_{kind}_shapes": shape for kind, shape in shapes.items()},
    }


def _name(provider: Provider) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _usable_providers(providers: Sequence[Provider] | None) -> list[Provider]:
    available = ort.get_available_providers()
    if providers is None:
        return [name for name in _DEFAULT_PROVIDERS if name in available]
    missing = [name for name in map(_name, providers) if name not in available]
    if missing or not providers or isinstance(providers, str):
        raise BackendMissingError(
            f"providers is {providers!r}; this ONNX Runtime {ort.__version__} has "
            f"{', '.join(available)}; pass a list of some of them, or None for the best that "
            'works (CUDA comes with pip install "clever-zoo[onnx-gpu]")'
        )
    return list(providers)


def _check_first_provider(provider: Provider, session: "ort.InferenceSession") -> None:
    """ONNX Runtime falls back to the CPU with no more than a line in its log."""
    active = session.get_providers()
    if active[0] != _name(provider):
        raise BackendMissingError(
            f"{_name(provider)} is in this ONNX Runtime but cannot be used on this machine; "
            f"usable: {', '.join(active)}. Check the driver and the CUDA libraries, or leave it out"
        )
