"""A GPU computes what a CPU computes: views, losses of a step, features, and a resumed run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training.config import load_recipe
from training.data import load_train_images
from training.distributed import Processes
from training.evaluate.inputs import features_of, load_encoder, subject
from training.pretrain import build_views, train
from training.runlog import LOG, read_log

pytestmark = pytest.mark.gpu

RECIPES = (
    "clever-resnet18.fmnist",
    "clever-resnet18.fmnist_plus",
    "clever-resnet50.fmnist",
    "clever-simsiam-resnet18.fmnist",
    "clever-vit-tiny.fmnist",
    "clever-vmamba-tiny.fmnist",
)


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions without the ten-bit mantissas that cuDNN takes by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def run(name: str, out: Path, device: str, **options: int) -> list[dict[str, float]]:
    """The log of a miniature of a recipe."""
    recipe = load_recipe(name, ["run.smoke=true"])
    images = load_train_images(recipe.data, None, at_least=recipe.batch_size)
    train(recipe, images, out, processes=Processes(torch.device(device)), **options)
    return read_log(out / LOG)


@pytest.mark.parametrize("size", [32, 64])
def test_views_are_those_of_a_cpu(rng: np.random.Generator, size: int) -> None:
    recipe = load_recipe(
        "clever-resnet18.fmnist",
        ["views.strength=caug_plus", f"views.global_size_px={size}"],
    )
    shape = (64, 3, size, size)
    images = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    make_views, samples = build_views(recipe), np.arange(64)
    on_cpu = make_views(images, samples, 0).pixels
    on_gpu = make_views(images.cuda(), samples, 0).pixels
    byte = 1 / (255 * min(recipe.data.std))
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        apart = (ours.cpu() - theirs).abs()
        # Where float32 sums round to another byte; the hue of nearly grey pixels is unstable.
        assert (apart > 1.5 * byte).float().mean() < 0.01
        assert apart.mean() < 0.05 * byte


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_those_of_a_cpu(tmp_path: Path, name: str) -> None:
    on_cpu, on_gpu = (run(name, tmp_path / d, d, stop_at_step=1) for d in ("cpu", "cuda"))
    terms = [k for k in on_cpu[0] if k in ("loss", "contrastive", "orthogonality", "transform")]
    for term in terms:
        # A few bytes of the views differ, and batch-norm of eight noisy images magnifies them.
        assert on_gpu[0][term] == pytest.approx(on_cpu[0][term], rel=1e-2, abs=5e-3)


def test_features_are_those_of_a_cpu(tmp_path: Path) -> None:
    run("clever-resnet18.fmnist", tmp_path, "cpu")
    pixels = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        encoder, facts = load_encoder(tmp_path, device)
        network = subject(encoder, "model", facts, encoder.spec.invariant_dim)
        found.append(features_of(network)(pixels.float()))
    assert torch.nn.functional.cosine_similarity(*found).min() > 0.9999


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_stopped_run_goes_on(tmp_path: Path, precision: str) -> None:
    recipe = load_recipe("clever-resnet18.fmnist", ["run.smoke=true"])
    run_config = recipe.run.model_copy(update={"precision": precision})
    recipe = recipe.model_copy(update={"run": run_config})
    images = load_train_images(recipe.data, None, at_least=recipe.batch_size)
    gpu = Processes(torch.device("cuda"))
    for stop in (1, None):
        progress = train(recipe, images, tmp_path, processes=gpu, stop_at_step=stop)
    assert progress["step"] == progress["steps"] == 2
    assert [values["step"] for values in read_log(tmp_path / LOG)] == [0, 1]
