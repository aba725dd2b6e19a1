"""What ships: the released models, the wheel, torch.hub, the demo, and texts made from records."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

import clever_zoo
from clever_zoo.cards import shortfalls
from clever_zoo.demo import run_demo
from clever_zoo.embedding import split_features
from clever_zoo.golden import check_golden
from clever_zoo.records import RESULTS_FILENAME, Record
from clever_zoo.registry import DEFAULT_TAGS
from clever_zoo.samples import sample_paths
from clever_zoo.spec import ModelSpec
from training.config import load_recipe
from training.evaluate.report import stale_files
from training.networks import build_student
from training.pretrain import preprocess_spec
from training.release import gate_problems

ROOT = Path(__file__).parents[2]
RELEASED = clever_zoo.list_models()


def test_the_first_model_is_there() -> None:
    assert "clever-resnet18.fmnist" in RELEASED
    assert clever_zoo.model_info("clever-resnet18").name == "clever-resnet18.fmnist"
    assert clever_zoo.list_models("clever-*", backbone="resnet50") == ("clever-resnet50.fmnist",)
    assert "clever-resnet18.fmnist" in clever_zoo.list_models("*resnet*")
    assert clever_zoo.list_models("CLEVER-*") == clever_zoo.list_models("*vgg*") == ()
    assert {f"{name}.{tag}" for name, tag in DEFAULT_TAGS.items()} <= set(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_registry_config_recipe_and_record_agree(name: str) -> None:
    spec, folder = clever_zoo.model_info(name), ROOT / "model_cards" / name
    assert ModelSpec.read(folder / "config.json") == spec
    record = Record.read(folder / RESULTS_FILENAME)
    recipe = load_recipe(name)
    assert spec.preprocess == preprocess_spec(recipe)
    assert spec.invariant_dim == recipe.invariant_dim == record.invariant_dim
    assert spec.model_args == recipe.backbone.model_args
    training, baseline = (record.network(role).training for role in ("model", "baseline"))
    assert training["commit"] == spec.provenance.commit
    assert training["epochs"] == recipe.epochs
    assert training["seed"] == recipe.seed
    assert record.network("model").name == name
    assert record.network("model").sha256 in (None, spec.weights.sha256)
    for key in ("seed", "epochs"):
        assert baseline[key] == training[key]
    assert baseline["images_seen"] >= training["images_seen"]
    assert gate_problems(record) == []
    card = (folder / "README.md").read_text()
    assert all(f"\n- {sentence}\n" in card for sentence in shortfalls(record))


@pytest.mark.parametrize("name", RELEASED)
def test_golden_values(name: str) -> None:
    assert check_golden(name) < 1e-4


@pytest.mark.parametrize("name", RELEASED)
def test_released_weights_are_no_random_ones(name: str) -> None:
    """Rotated copies find their originals far more often than with the untrained network."""
    encoder = clever_zoo.from_pretrained(name)
    spec = encoder.spec
    untrained = clever_zoo.Encoder(
        spec, build_student(load_recipe(name).backbone, load_recipe(name).seed)
    )
    from PIL import Image

    images = [Image.open(path).convert("RGB") for path in sample_paths()[::5]]
    turned = [image.rotate(70) for image in images]
    found = []
    for network in (encoder, untrained):
        gallery, queries = (network.embed(x).normalized().invariant for x in (images, turned))
        nearest = (queries @ gallery.T).argmax(1)
        found.append(float((nearest == np.arange(len(images))).mean()))
    assert found[0] >= found[1] + 0.2


def test_texts_and_figures_are_those_of_the_records() -> None:
    """`make tables` would change nothing."""
    assert stale_files() == [], "run `make tables`"


def test_fine_tuning_beats_every_frozen_probe() -> None:
    record = Record.read(ROOT / "model_cards/clever-resnet18.fmnist/results.json")
    assert record.images == {"train": 60_000, "test": 10_000}

    def last(task: str) -> float:
        return record.find(record.model, task, "top1_last", "full").mean

    tuned = last("finetune_short")
    assert tuned > last("frozen_short")
    assert tuned > last("linear_cached")


def test_the_demo_runs_on_the_released_weights(tmp_path: Path) -> None:
    headlines = run_demo(tmp_path, "clever-resnet50")
    assert len(headlines) == 3
    assert "600 pictures" in headlines[0]
    report = (tmp_path / "report.html").read_text()
    assert report.count("<img") >= 12 * 16
    assert "http" not in report.replace("http-equiv", "")
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "embeddings.parquet")
    assert table.num_rows == 600
    assert table.schema.metadata[b"model"] == b"clever-resnet50.fmnist"


WHEEL_SCRIPT = """
import socket, sys
def refuse(*arguments): raise OSError("network blocked")
socket.socket.connect = socket.getaddrinfo = refuse
import numpy as np, timm, torch
import clever_zoo, clever_zoo.timm
from clever_zoo.golden import check_golden
from clever_zoo.samples import sample_paths
assert clever_zoo.__file__.startswith(sys.prefix), clever_zoo.__file__
print(clever_zoo.__version__)
for name in clever_zoo.list_models():
    check_golden(name)
    encoder = clever_zoo.from_pretrained(name)
    embedding = encoder.embed(sample_paths()[:1])
    model = timm.create_model(name.replace("-", "_"), pretrained=True).eval()
    with torch.inference_mode():
        timms = model(encoder.preprocess(sample_paths()[:1])).numpy()
    np.savez(f"{name}.npz", timm=timms, **embedding._asdict())
"""


def test_an_installed_wheel_loads_every_model_without_network_or_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert {t for t in tops if not t.endswith(".dist-info")} == {"clever_zoo"}
        assert "clever_zoo/py.typed" in archive.namelist()
        environment = tmp_path / "env"
        venv.create(environment, with_pip=False)
        (site,) = environment.glob("lib/python*/site-packages")
        archive.extractall(site)
    # The dependencies of this environment, without its editable install of the checkout.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run = [str(environment / "bin/python"), "-I", "-c", WHEEL_SCRIPT]
    done = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.split()[0] == wheel.name.split("-")[1] == clever_zoo.__version__
    for name in RELEASED:
        spec = clever_zoo.model_info(name)
        expected = clever_zoo.from_pretrained(name).embed(sample_paths()[:1])
        with np.load(tmp_path / f"{name}.npz") as content:
            assert content["invariant"].shape == (1, spec.invariant_dim)
            assert content["equivariant"].shape == (1, spec.equivariant_dim)
            np.testing.assert_array_equal(content["timm"], expected.full)
            for half, values in expected._asdict().items():
                np.testing.assert_array_equal(content[half], values)


def test_clever_zoo_never_imports_training() -> None:
    for path in (ROOT / "clever_zoo").rglob("*.py"):
        text = path.read_text()
        assert "import training" not in text, path
        assert "from training" not in text, path


def test_the_split_of_the_full_features_is_the_specs() -> None:
    spec = clever_zoo.model_info("clever-resnet18")
    halves = split_features(np.zeros((1, spec.feature_dim)), spec.invariant_dim)
    assert [h.shape[1] for h in halves] == [409, 103]
