"""A stand-in for Triton's ONNX Runtime backend, which nvidia-pytriton's Triton lacks.

Triton takes it for the backend "onnxruntime", so it loads the repository exactly as written.
Like the real one it runs the requests that were batched together as one.
"""

from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        graph = Path(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        pixels = [triton.get_input_tensor_by_name(r, "pixels").as_numpy() for r in requests]
        names = [output.name for output in self.session.get_outputs()]
        halves = self.session.run(names, {"pixels": np.concatenate(pixels)})
        cuts = np.cumsum([len(p) for p in pixels])[:-1]
        return [
            triton.InferenceResponse(
                [triton.Tensor(*pair) for pair in zip(names, part, strict=True)]
            )
            for part in zip(*(np.split(half, cuts) for half in halves), strict=True)
        ]
