"""Image embeddings in two labelled halves: what is in the picture, and how it was seen.

>>> import clever_zoo
>>> encoder = clever_zoo.from_pretrained("clever-resnet50")
>>> embedding = encoder.embed(["a.jpg", "b.jpg"])
>>> embedding.invariant.shape, embedding.equivariant.shape
((2, 1638), (2, 410))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clever_zoo.backbones import list_backbones as list_backbones
    from clever_zoo.classifier import Classifier as Classifier
    from clever_zoo.classifier import create_classifier as create_classifier
    from clever_zoo.compare import Comparison as Comparison
    from clever_zoo.compare import compare_images as compare_images
    from clever_zoo.embedding import Embedding as Embedding
    from clever_zoo.embedding import Part as Part
    from clever_zoo.embedding import Predictions as Predictions
    from clever_zoo.encoder import Encoder as Encoder
    from clever_zoo.encoder import create_encoder as create_encoder
    from clever_zoo.encoder import create_transform as create_transform
    from clever_zoo.encoder import from_pretrained as from_pretrained
    from clever_zoo.errors import CleverZooError as CleverZooError
    from clever_zoo.onnx_encoder import OnnxClassifier as OnnxClassifier
    from clever_zoo.onnx_encoder import OnnxEncoder as OnnxEncoder
    from clever_zoo.onnx_export import ExportReport as ExportReport
    from clever_zoo.onnx_export import export_onnx as export_onnx
    from clever_zoo.preprocess import ImageInput as ImageInput
    from clever_zoo.registry import list_models as list_models
    from clever_zoo.registry import model_info as model_info
    from clever_zoo.spec import ModelSpec as ModelSpec
    from clever_zoo.turn import Turn as Turn
    from clever_zoo.turn import read_turn as read_turn

__version__ = "0.1.0"

# Public name -> module, imported on first use: `import clever_zoo` stays free of torch.
_PUBLIC = {
    "Classifier": "classifier",
    "CleverZooError": "errors",
    "Comparison": "compare",
    "Embedding": "embedding",
    "Encoder": "encoder",
    "ExportReport": "onnx_export",
    "ImageInput": "preprocess",
    "ModelSpec": "spec",
    "OnnxClassifier": "onnx_encoder",
    "OnnxEncoder": "onnx_encoder",
    "Part": "embedding",
    "Predictions": "embedding",
    "Turn": "turn",
    "compare_images": "compare",
    "create_classifier": "classifier",
    "create_encoder": "encoder",
    "create_transform": "encoder",
    "export_onnx": "onnx_export",
    "from_pretrained": "encoder",
    "list_backbones": "backbones",
    "list_models": "registry",
    "model_info": "registry",
    "read_turn": "turn",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'clever_zoo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"clever_zoo.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
