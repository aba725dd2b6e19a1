"""Models for the tests of the ONNX runtime, and what torch says of the bundled pictures.

Written where torch is, read where it is not: ``python -m tests.onnx_models FOLDER``.
"""

import sys
from pathlib import Path

import numpy as np

from clever_zoo.samples import sample_paths

NAMES = ("resnet18", "vit", "classifier")
CLASS_NAMES = ("boots", "coats", "shirts")


def pictures() -> list[Path]:
    """Twelve bundled pictures of several classes."""
    return sample_paths()[::25]


def write_models(folder: Path) -> None:
    """NAME.onnx for each name, NAME.npz with torch's outputs, and foreign.onnx."""
    import onnx
    import torch

    import clever_zoo

    torch.manual_seed(0)
    vit = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    models = {
        "resnet18": clever_zoo.from_pretrained("clever-resnet18"),
        "vit": vit,
        "classifier": clever_zoo.create_classifier(
            vit, 3, part="invariant", class_names=CLASS_NAMES
        ),
    }
    for name in NAMES:
        model = models[name].eval()
        # One of them takes normalised floats.
        fed = "float32" if name == "vit" else "uint8"
        clever_zoo.export_onnx(model, folder / f"{name}.onnx", input=fed)
        if name == "classifier":
            outputs = model.predict(pictures())._asdict()
        else:
            outputs = model.embed(pictures())._asdict()
        np.savez(folder / f"{name}.npz", **outputs)
    graph = onnx.load(folder / "vit.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, folder / "foreign.onnx")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    write_models(target)
