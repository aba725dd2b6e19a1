"""A model repository for NVIDIA Triton: an exported graph, and an ensemble that takes files."""

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template

from clever_zoo.errors import DataError, ShapeError, SpecError
from clever_zoo.files import replacing, write_atomic
from clever_zoo.onnx_graph import GraphInput, OnnxGraph
from clever_zoo.preprocess import check_batch_size
from clever_zoo.serve import MAX_IMAGE_PIXELS

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)

_MODEL = Template("""\
name: "$name"
backend: "onnxruntime"
max_batch_size: $max_batch_size
input { name: "pixels" data_type: TYPE_UINT8 dims: $dims }
$outputs
dynamic_batching {
  max_queue_delay_microseconds: 2000
  # More waiting requests are refused with 503, which bounds the memory.
  default_queue_policy { max_queue_size: 256 }
}
# A GPU where there is one, else the CPU; or KIND_GPU, KIND_CPU.
instance_group { kind: KIND_AUTO count: 1 }
model_warmup {
  name: "one image"
  batch_size: 1
  inputs { key: "pixels" value { data_type: TYPE_UINT8 dims: $dims zero_data: true } }
}
model_warmup {
  name: "full batch"
  batch_size: $max_batch_size
  inputs { key: "pixels" value { data_type: TYPE_UINT8 dims: $dims zero_data: true } }
}
""")

_DECODER = Template("""\
name: "$name-decode"
backend: "python"
max_batch_size: $max_batch_size
input { name: "images" data_type: TYPE_STRING dims: [1] }
output { name: "pixels" data_type: TYPE_UINT8 dims: $dims }
# Processes that decode side by side, each a request at a time.
instance_group { kind: KIND_CPU count: 2 }
dynamic_batching {
  preferred_batch_size: 1
  # More waiting requests are refused with 503, which bounds the memory.
  default_queue_policy { max_queue_size: 256 }
}
parameters { key: "preprocess" value { string_value: $preprocess } }
# Larger pictures are refused.
parameters { key: "max_image_pixels" value { string_value: "$max_image_pixels" } }
""")

_ENSEMBLE = Template("""\
name: "$name-jpeg"
platform: "ensemble"
max_batch_size: $max_batch_size
input { name: "images" data_type: TYPE_STRING dims: [1] }
$outputs
ensemble_scheduling {
  step {
    model_name: "$name-decode"
    model_version: -1
    input_map { key: "images" value: "images" }
    output_map { key: "pixels" value: "pixels" }
  }
  step {
    model_name: "$name"
    model_version: -1
    input_map { key: "pixels" value: "pixels" }
$output_maps
  }
}
""")

_README = """\
# Model repository for NVIDIA Triton
Written by `clever-zoo export ... --format triton`. Three of Triton's models make one of ours:

- `NAME` is the graph, run by the ONNX Runtime backend, requests batched. Input `pixels`, UINT8
  (B, size, size, 3): RGB, resized and cropped as `clever_zoo.preprocess.image_pixels` does, not
  normalised.
- `NAME-jpeg` takes files. Input `images`, BYTES (B, 1): each the content of a JPEG, PNG, WebP or
  other image file. One that cannot be read fails its own request with 400, and no other.
- `NAME-decode` is the first half of `NAME-jpeg`, run by the Python backend.

`NAME-decode` needs clever-zoo in Triton's Python (3.11 or newer, so Triton 24.12 or newer). With
CHECKOUT, the folder of its sources, until the package is on PyPI:

    pip wheel --no-deps -w wheel CHECKOUT
    docker build -t triton-clever -f - wheel <<END
    FROM nvcr.io/nvidia/tritonserver:24.12-py3
    COPY clever_zoo-*.whl /tmp/
    RUN pip install --break-system-packages /tmp/clever_zoo-*.whl
    END
    docker run --rm --shm-size 1g -p 8000:8000 -v "$PWD:/models" triton-clever \\
        tritonserver --model-repository /models

Add `--gpus all` to use GPUs. Without clever-zoo the stock image serves `NAME` alone:
`tritonserver --model-repository /models --model-control-mode explicit --load-model NAME`.
Batching, queue, instances, warm-up and the largest picture are in each model's config.pbtxt.
"""


def write_triton_repository(
    graph: Path, repository: Path, *, name: str | None = None, max_batch_size: int = 32
) -> tuple[str, str]:
    """Write a graph as two models that Triton serves: NAME takes pixels, NAME-jpeg image files.

    A third, NAME-decode, is the part of NAME-jpeg that runs in Triton's Python backend, where
    clever-zoo must be installed; the README.md beside the graph says how. Other models of the
    repository stay; these are replaced.

    Args:
        graph: A file that `export_onnx` wrote, with uint8 input.
        repository: Folder; created if missing.
        name: NAME; None means the name in the encoder's spec.
        max_batch_size: Most images per request and per run of the graph.

    Returns:
        The names of the model that takes pixels and of the one that takes files.

    Raises:
        SourceError, IntegrityError, SpecError: If `graph` is missing, damaged or not of ours.
        SpecError: If `name` cannot name a model of Triton's.
        ShapeError: If the graph's input is float32, or `max_batch_size` is under 1.
        DataError: If `repository` is a file.
    """
    check_batch_size(max_batch_size)
    opened = OnnxGraph.open(graph, providers=["CPUExecutionProvider"])
    check_target(repository, opened.info.input)
    name = name or opened.encoder.name
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"{name!r} cannot name a model of Triton's; pass a name of letters, digits and '._-' "
            "that begins with a letter or digit"
        )
    values = _config_values(opened) | {
        "name": name,
        "max_batch_size": max_batch_size,
        "max_image_pixels": MAX_IMAGE_PIXELS,
    }
    with replacing(repository / name / "1" / "model.onnx") as temporary:
        shutil.copyfile(graph, temporary)
    decoder = files("clever_zoo.serve").joinpath("triton_decoder.py").read_bytes()
    write_atomic(repository / f"{name}-decode" / "1" / "model.py", decoder)
    # Triton wants a folder per version; empty, it would get lost in git or object storage.
    write_atomic(repository / f"{name}-jpeg" / "1" / ".keep", b"")
    for suffix, template in (("", _MODEL), ("-decode", _DECODER), ("-jpeg", _ENSEMBLE)):
        config = template.substitute(values)
        write_atomic(repository / f"{name}{suffix}" / "config.pbtxt", config.encode())
    write_atomic(repository / name / "README.md", _README.replace("NAME", name).encode())
    return name, f"{name}-jpeg"


def check_target(repository: Path, graph_input: GraphInput) -> None:
    """Refuse what no repository can be made of, before a graph is exported for it.

    Raises:
        DataError: If `repository` is a file.
        ShapeError: If the graph's input is float32.
    """
    if repository.exists() and not repository.is_dir():
        raise DataError(f"{repository} is a file; name a folder for the models")
    if graph_input != "uint8":
        raise ShapeError(
            f"the graph takes {graph_input} pixels; a Triton repository is made of one with uint8 "
            "input, as export_onnx writes by default"
        )


def _config_values(graph: OnnxGraph) -> dict[str, object]:
    preprocess = graph.encoder.preprocess
    size_px = preprocess.input_size_px
    outputs = [
        f'output {{ name: "{name}" data_type: TYPE_FP32 dims: [{width}] }}'
        for name, width in graph.outputs.items()
    ]
    output_maps = [f'    output_map {{ key: "{name}" value: "{name}" }}' for name in graph.outputs]
    return {
        "dims": [size_px, size_px, 3],
        "outputs": "\n".join(outputs),
        "output_maps": "\n".join(output_maps),
        # Protobuf's text format quotes strings as JSON does.
        "preprocess": json.dumps(preprocess.model_dump_json()),
    }
