"""The decoder of a Triton repository: image files -> pixels.

`write_triton_repository` writes this file out as a model.py; it runs inside Triton, whose Python
must have clever-zoo installed.
"""

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # exists inside Triton only

from clever_zoo.errors import ImageError
from clever_zoo.preprocess import crop_pixels, decode_image
from clever_zoo.spec import PreprocessSpec


class TritonPythonModel:
    """`images` (B, 1), each the content of an image file -> `pixels` (B, size, size, 3) uint8."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the preprocessing from config.pbtxt."""
        parameters = json.loads(args["model_config"])["parameters"]
        values = {name: value["string_value"] for name, value in parameters.items()}
        self.preprocess = PreprocessSpec.model_validate_json(values["preprocess"])
        self.max_pixels = int(values["max_image_pixels"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request by itself: a bad image fails its own request and no other."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        contents = triton.get_input_tensor_by_name(request, "images").as_numpy().ravel()
        size_px, resize_px = self.preprocess.input_size_px, self.preprocess.resize_px
        try:
            images = (
                decode_image(content, f"{len(content)} bytes", i, max_pixels=self.max_pixels)
                for i, content in enumerate(contents)
            )
            squares = [crop_pixels(image, resize_px, size_px) for image in images]
        except ImageError as error:
            refusal = triton.TritonError(str(error), triton.TritonError.INVALID_ARG)
            return triton.InferenceResponse(error=refusal)
        return triton.InferenceResponse([triton.Tensor("pixels", np.stack(squares))])
