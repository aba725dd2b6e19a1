"""Torch -> one self-contained ONNX file, written only if it gives the model's values."""

import contextlib
import copy
import io
import itertools
import json
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

import clever_zoo
from clever_zoo.backbones import BACKBONES
from clever_zoo.classifier import Classifier
from clever_zoo.embedding import Embedding
from clever_zoo.encoder import Encoder, current_spec
from clever_zoo.errors import (
    BackendMissingError,
    DataError,
    ExportParityError,
    SpecError,
    check_choice,
)
from clever_zoo.files import write_atomic
from clever_zoo.onnx_graph import CONFIG_KEY, GRAPH_KEY, GraphInfo, GraphInput, OnnxGraph, Precision
from clever_zoo.preprocess import ImageInput, image_pixels, normalize_pixels, pixel_batches
from clever_zoo.samples import sample_paths
from clever_zoo.sources import is_onnx_path
from clever_zoo.spec import ClassifierSpec, ModelSpec, PreprocessSpec, WeightFile

try:
    import onnx
    import onnxscript  # noqa: F401  torch.onnx needs it
    import torch
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from torch import Tensor, nn
except ImportError as error:
    raise BackendMissingError(
        f'{error.name} is not installed: pip install "clever-zoo[export]"'
    ) from error

OPSET = 20
MAX_RELATIVE_DIFFERENCE = 1e-4
MIN_COSINE = {"fp16": 0.999, "int8": 0.98}
# Pictures of the parity check, by batch: none of these sizes was seen when the graph was traced.
PARITY_BATCHES = (1, 3, 8, 32)
CALIBRATION_PICTURES = 60
FP16_MAX = 65504.0


class ExportReport(NamedTuple):
    """What `export_onnx` wrote.

    Attributes:
        path: The file.
        size_bytes, sha256: Of the file.
        info: Its input, its precision and the version that wrote it.
        parity: For each output the worst of some bundled pictures of all classes: relative
            difference to torch for fp32, cosine to torch for fp16 and int8.
    """

    path: Path
    size_bytes: int
    sha256: str
    info: GraphInfo
    parity: dict[str, float]


def export_onnx(
    model: Encoder | Classifier,
    path: str | Path,
    *,
    input: GraphInput = "uint8",
    precision: Precision = "fp32",
    calibration: Iterable[ImageInput] | None = None,
) -> ExportReport:
    """Write an encoder or a classifier as one ONNX file.

    Input `pixels`, outputs `invariant` and `equivariant` (left out where it is empty), or
    `logits`; only the batch is dynamic. config.json, with the digest of the weights, stands in
    the file's metadata, so that `OnnxEncoder` and `OnnxClassifier` need nothing else.

    Args:
        model: In any mode and on any device; it is copied.
        path: Target, replaced in one step.
        input: "uint8": (B, size, size, 3) RGB, resized and cropped, normalised inside the graph.
            "float32": (B, 3, size, size), normalised by the caller.
        precision: "fp16" halves the file and is for GPUs. "int8" is for CPUs: weights and
            activations of a ResNet, with ranges from `calibration`; of other backbones the matrix
            products, whose ranges are taken from each batch anew, so that an embedding depends a
            little on its neighbours in the batch.
        calibration: Images like those to come, for int8 of a ResNet; a hundred are plenty. None
            takes bundled pictures, which are small grey pictures of clothes.

    Raises:
        ExportParityError: If an output is off by more than 1e-4 of its norm (fp32) or its cosine
            falls below 0.999 (fp16) or 0.98 (int8) for a bundled picture; nothing is written.
        SpecError: For an unknown input or precision, or calibration images that nothing reads.
        DataError: If `path` is a folder or does not end in .onnx, or `calibration` holds no image.
        ImageError: For a bad calibration image.
    """
    check_choice("input", input, get_args(GraphInput))
    check_choice("precision", precision, get_args(Precision))
    if not is_onnx_path(path) or Path(path).is_dir():
        raise DataError(f"{path} cannot hold the graph; name a file that ends in .onnx")
    encoder = model.encoder if isinstance(model, Classifier) else model
    static = BACKBONES[encoder.spec.backbone].int8 == "static"
    if calibration is not None and not (precision == "int8" and static):
        raise SpecError(
            f"calibration images were given, but {precision} of {encoder.spec.backbone} takes "
            "none; leave calibration out"
        )
    module = copy.deepcopy(model).cpu().float().eval()
    graph = _trace(module, encoder.spec.preprocess, input)
    if precision == "fp16":
        with _quiet():
            graph = convert_float_to_float16(graph, keep_io_types=True, max_finite_val=FP16_MAX)
    elif precision == "int8" and static:
        if calibration is None:
            calibration = sample_paths()[:: len(sample_paths()) // CALIBRATION_PICTURES]
        graph = _quantize_static(graph, calibration, encoder.spec.preprocess, input)
    elif precision == "int8":
        graph = _quantize_dynamic(graph)
    info = GraphInfo(input=input, precision=precision, version=clever_zoo.__version__)
    _clear_metadata(graph)
    spec: ModelSpec | ClassifierSpec = current_spec(model.stored_module(), encoder.spec)
    if isinstance(model, Classifier):
        spec = model.spec.model_copy(update={"encoder": spec})
    onnx.helper.set_model_props(
        graph, {CONFIG_KEY: json.dumps(spec.to_config()), GRAPH_KEY: info.model_dump_json()}
    )
    content = graph.SerializeToString(deterministic=True)
    parity = _check_parity(content, module, encoder.spec.preprocess, info)
    write_atomic(Path(path), content)
    written = WeightFile.of(content)
    return ExportReport(Path(path), written.size_bytes, written.sha256, info, parity)


class _Traced(nn.Module):
    """What becomes the graph: normalisation, the model, and its outputs as a plain tuple."""

    def __init__(self, model: Encoder | Classifier, p: PreprocessSpec, input: GraphInput) -> None:
        super().__init__()
        self.model, self.normalizes = model, input == "uint8"
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (p.mean, p.std))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        if self.normalizes:
            pixels = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return tuple(_named_outputs(self.model(pixels)).values())


def _named_outputs(result: Any) -> dict[str, Any]:
    """The outputs of a model by name, without an empty half."""
    if not isinstance(result, Embedding):
        return {"logits": result}
    return {name: half for name, half in result._asdict().items() if half.shape[-1]}


def _trace(module: Encoder | Classifier, p: PreprocessSpec, input: GraphInput) -> onnx.ModelProto:
    size = p.input_size_px
    # Two, because a batch of one would be taken for a constant.
    normalized = torch.zeros(2, 3, size, size)
    with torch.inference_mode():
        names = list(_named_outputs(module(normalized)))
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8) if input == "uint8" else normalized
    with _quiet():
        program = torch.onnx.export(
            _Traced(module, p, input).eval(),
            (example,),
            dynamo=True,
            external_data=False,
            input_names=["pixels"],
            output_names=names,
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            verbose=False,
        )
    return program.model_proto  # type: ignore[union-attr]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter and the quantiser print and warn of what is no matter of the caller's."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class _Calibration(CalibrationDataReader):
    def __init__(self, images: Iterable[ImageInput], p: PreprocessSpec, input: GraphInput) -> None:
        batches = pixel_batches(images, p, batch_size=1)
        first = next(batches, None)
        if first is None:
            raise DataError(
                "calibration holds no image; give it some like those to come, or leave it out"
            )
        self.feeds = (
            {"pixels": pixels if input == "uint8" else normalize_pixels(pixels, p)}
            for pixels in itertools.chain([first], batches)
        )

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self.feeds, None)


def _quantize_static(
    graph: onnx.ModelProto, images: Iterable[ImageInput], p: PreprocessSpec, input: GraphInput
) -> onnx.ModelProto:
    calibration = _Calibration(images, p, input)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        traced, prepared, quantized = (Path(folder, f"{i}.onnx") for i in range(3))
        onnx.save(graph, traced)
        quant_pre_process(traced, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantized,
            calibration,
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Products of two neighbours must fit 16 bits on processors without VNNI.
            reduce_range=True,
        )
        return onnx.load(quantized)


def _quantize_dynamic(graph: onnx.ModelProto) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder, _quiet():
        quantized = Path(folder, "quantized.onnx")
        quantize_dynamic(
            graph,
            quantized,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(quantized)


def _clear_metadata(graph: onnx.ModelProto) -> None:
    """Remove what the exporter notes beside the graph: stack traces with paths, torch's names."""
    del graph.metadata_props[:]
    graph.doc_string = ""
    inner = graph.graph
    annotated: list[Any] = [inner, *inner.node, *inner.input, *inner.output, *inner.initializer]
    for item in [*annotated, *inner.value_info]:
        del item.metadata_props[:]
        item.doc_string = ""


def _check_parity(
    content: bytes, module: Encoder | Classifier, p: PreprocessSpec, info: GraphInfo
) -> dict[str, float]:
    graph = OnnxGraph.open(content, providers=["CPUExecutionProvider"])
    paths = iter(sample_paths()[:: len(sample_paths()) // sum(PARITY_BATCHES)])
    worst: dict[str, float] = {}
    for size in PARITY_BATCHES:
        pixels = np.stack([image_pixels(next(paths), p) for _ in range(size)])
        with torch.inference_mode():
            result = _named_outputs(module(torch.from_numpy(normalize_pixels(pixels, p))))
        exported = dict(zip(graph.outputs, graph.run(pixels), strict=True))
        for name, value in result.items():
            if info.precision == "fp32":
                figure = max_relative_difference(exported[name], value.numpy())
                # np.maximum, because Python's max can lose a NaN.
                worst[name] = float(np.maximum(worst.get(name, 0.0), figure))
            else:
                figure = min_cosine(exported[name], value.numpy())
                worst[name] = float(np.minimum(worst.get(name, 1.0), figure))
    for name, figure in worst.items():
        if info.precision == "fp32" and not figure <= MAX_RELATIVE_DIFFERENCE:
            raise ExportParityError(
                f"{name} differs from torch by {figure:.1e} of its norm, allowed "
                f"{MAX_RELATIVE_DIFFERENCE:.0e}; nothing was written. Please report this model"
            )
        if info.precision != "fp32" and not figure >= MIN_COSINE[info.precision]:
            raise ExportParityError(
                f"{name} in {info.precision} has a cosine of {figure:.4f} to torch's for a bundled "
                f"picture, required {MIN_COSINE[info.precision]}; nothing was written. Use fp32"
                + (", or other calibration images" if info.precision == "int8" else "")
            )
    return worst


def max_relative_difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Greatest distance of two rows, relative to the norm of the row of `b`; (B, D) each."""
    return float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())


def min_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Least cosine of two rows; (B, D) each."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / norms).min())
