"""Evaluations against oracles, and the whole way from a run to a model folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F
from typer.testing import CliRunner

import clever_zoo
from clever_zoo.cards import results_table
from clever_zoo.errors import CheckpointError, DataError
from clever_zoo.golden import check_golden
from clever_zoo.preprocess import crop_pixels
from clever_zoo.spec import PreprocessSpec
from tests import oracles
from training import pretrain, release
from training.checkpoint import CHECKPOINT
from training.config import load_recipe
from training.data import TrainImages, load_fashion_mnist, load_train_images
from training.evaluate import __main__ as evaluate
from training.evaluate.knn import TEMPERATURE, knn_accuracy, knn_predict
from training.evaluate.perturb import circular_mask, draw_angles, perturb
from training.evaluate.rotation import angle_r2
from training.evaluate.suite import backbone_features, evaluation_pixels
from training.runs import load_run

MINIATURE = ["epochs=1", "batch_size=16", "method.prototypes=64", "method.hidden_dim=64"]
MINIATURE += ["method.bottleneck_dim=32", "optimizer.warmup_epochs=0.25"]


@pytest.mark.parametrize("k", [1, 3, 20])
def test_knn_matches_the_naive_vote(rng, k: int) -> None:
    gallery, queries = rng.normal(size=(40, 6)), rng.normal(size=(25, 6))
    labels = rng.integers(0, 4, 40)
    expected = [oracles.knn_class(gallery, labels.tolist(), q, k, TEMPERATURE) for q in queries]
    tensors = [torch.from_numpy(x).float() for x in (gallery, queries)]
    actual = knn_predict(tensors[0], torch.from_numpy(labels), tensors[1], k=k, classes=4)
    assert actual.tolist() == expected
    truth = torch.from_numpy(rng.integers(0, 4, 25))
    share = float((actual == truth).float().mean() * 100)
    assert knn_accuracy(
        tensors[0], torch.from_numpy(labels), tensors[1], truth, k=k
    ) == pytest.approx(share)


def test_angle_r2_is_one_for_the_angle_and_about_zero_for_noise(rng) -> None:
    degrees = rng.uniform(-90, 90, 3000).astype(np.float32)
    told = np.stack([np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))], 1)
    told = (told @ rng.normal(size=(2, 7)) + 3).astype(np.float32)
    noise = rng.normal(size=(3000, 7)).astype(np.float32)
    for features, low, high in ((told, 0.999, 1), (noise, -0.05, 0.05)):
        score = angle_r2(features[:2000], degrees[:2000], features[2000:], degrees[2000:])
        assert low <= score <= high


def test_perturbations_are_seeded_per_image(rng) -> None:
    x = torch.from_numpy(rng.integers(0, 256, (6, 3, 32, 32)).astype(np.float32))
    samples = np.arange(6)
    whole = perturb(x, samples, "cj_r", 0)
    assert torch.equal(whole[2:4], perturb(x[2:4], samples[2:4], "cj_r", 0))
    assert not torch.equal(whole, perturb(x, samples, "cj_r", 1))
    assert torch.equal(perturb(x, samples, "clean", 0), x)
    assert whole.min() >= 0
    assert whole.max() <= 255
    assert torch.equal(whole, whole.round())


def test_rotation_is_the_drawn_one_and_uniform(rng) -> None:
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(4)]
    x = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() for i in images])
    angles = draw_angles(np.arange(4), 5)
    expected = [np.array(F.rotate(i, float(a))) for i, a in zip(images, angles, strict=True)]
    ours = perturb(x, np.arange(4), "r", 5).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - np.stack(expected)).mean() <= 0.5
    many = draw_angles(np.arange(20_000), 0)
    assert many.abs().max() <= 90
    counts = torch.histc(many, 10, -90, 90)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 33


def test_the_mask_leaves_no_corner(rng) -> None:
    masked = circular_mask(torch.ones(1, 3, 32, 32))
    assert masked[0, 0, 0, 0] == masked[0, 0, 31, 31] == masked[0, 0, 4, 4] == 0
    assert masked[0, 0, 16, 0] == masked[0, 0, 16, 16] == 1
    assert float(masked.mean()) == pytest.approx(np.pi / 4, abs=0.02)
    turned = perturb(masked * 200, np.arange(1), "r_masked", 0)
    assert float((turned - masked * 200).abs().mean()) < 2


def test_evaluation_sees_what_the_released_encoder_sees(fashion_mnist_folder: Path) -> None:
    data = load_fashion_mnist(fashion_mnist_folder, "test")
    spec = PreprocessSpec(input_size_px=32, crop_pct=1.0)
    pixels = evaluation_pixels(data, spec)
    image = Image.fromarray(data.images[7, 0].numpy()).convert("RGB")
    assert np.array_equal(pixels[7].permute(1, 2, 0).numpy(), crop_pixels(image, 32, 32))
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8).eval()
    encoder.spec = encoder.spec.model_copy(update={"preprocess": spec})
    features = backbone_features(encoder.backbone, spec)(pixels[7:8].float())
    expected = encoder.embed([image]).full
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, fashion_mnist_folder: Path) -> Path:
    """A miniature CLeVER run and its baseline on the bundled pictures."""
    base = tmp_path_factory.mktemp("runs")
    data = TrainImages(load_fashion_mnist(fashion_mnist_folder, "train"))
    for name in ("clever-resnet18.fmnist", "dino-resnet18.fmnist"):
        recipe = load_recipe(name, MINIATURE)
        pretrain.train(recipe, data, base / name, stop_at_step=3)
    return base


@pytest.fixture(scope="module")
def record(runs: Path, fashion_mnist_folder: Path) -> dict:
    app = evaluate.typer.Typer()
    app.command()(evaluate.main)
    out = runs / "clever-resnet18.fmnist/results.json"
    arguments = [out.parent, "-o", out, "--data", fashion_mnist_folder]
    arguments += ["--baseline", runs / "dino-resnet18.fmnist"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text())


def test_the_record_has_every_column_and_part(record: dict) -> None:
    names = ["clever-resnet18.fmnist", "dino-resnet18.fmnist", "untrained", "pixels"]
    assert list(record["columns"]) == names
    assert record["evaluation"].keys() >= {"commit", "hardware", "torch"}
    for name, column in record["columns"].items():
        parts = {"full"} if name == "pixels" else {"full", "invariant", "equivariant"}
        assert column["knn"]["clean"].keys() == column["angle_r2"].keys() == parts
        for kind in ("r", "cj_r"):
            assert column["knn"][kind].keys() == parts
            for score in column["knn"][kind].values():
                assert 0 <= score["mean"] <= 100
                assert score["std"] >= 0
    # The gallery and the clean queries are the same pictures, so each query finds itself.
    assert record["columns"]["pixels"]["knn"]["clean"]["full"] > 60
    training = record["columns"]["dino-resnet18.fmnist"]["training"]
    assert training["images_seen"] == 48
    assert training["finished"] is False


def test_the_table_holds_every_figure(record: dict) -> None:
    table = results_table(record)
    assert len(table.splitlines()) == 2 + 4 * 3
    clean = record["columns"]["untrained"]["knn"]["clean"]["invariant"]
    assert f"{clean:.1f}" in table.splitlines()[3]


@pytest.fixture
def finished(runs: Path, record: dict, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The record as if both runs had ended well at one commit; the run is made to agree."""
    record = json.loads(json.dumps(record))
    columns = record["columns"]
    recipe, teacher, facts = load_run(runs / "clever-resnet18.fmnist")
    facts |= {"finished": True, "commit": "0123456789" * 4}
    for name in (recipe.name, recipe.name.replace("clever-", "dino-")):
        columns[name]["training"] |= facts | {"recipe": name}
    columns[recipe.name]["knn"]["cj_r"]["invariant"]["mean"] = 60.0
    columns["untrained"]["knn"]["cj_r"]["invariant"]["mean"] = 45.0
    columns["pixels"]["knn"]["cj_r"]["full"]["mean"] = 35.0
    monkeypatch.setattr(release, "load_run", lambda _: (recipe, teacher, facts))
    return record


def test_an_unfinished_run_is_not_released(runs: Path, record: dict, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stopped after 3 steps"):
        release.release(runs / "clever-resnet18.fmnist", record, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_gate(finished: dict) -> None:
    columns = finished["columns"]
    ours, baseline, untrained, pixels = columns.values()
    assert release.gate_problems(finished) == []
    untrained["knn"]["cj_r"]["invariant"]["mean"] = 45.1
    assert "above the untrained network: 60.10" in release.gate_problems(finished)[0]
    pixels["knn"]["cj_r"]["full"]["mean"] = 35.1
    baseline["training"]["steps"] = 2
    ours["training"] |= {"device": "cuda", "commit": "abc+changes"}
    ours["knn"]["clean"]["invariant"] = pixels["knn"]["clean"]["full"] - 1
    assert len(release.gate_problems(finished)) == 5


def test_a_stale_record_is_refused(runs: Path, finished: dict, tmp_path: Path) -> None:
    finished["columns"][finished["model"]]["training"]["seconds"] += 60
    with pytest.raises(DataError, match="another state of the run"):
        release.release(runs / "clever-resnet18.fmnist", finished, tmp_path)


def test_a_released_folder_is_complete_and_true(runs: Path, finished: dict, tmp_path: Path) -> None:
    spec = release.release(runs / "clever-resnet18.fmnist", finished, tmp_path)
    names = {"README.md", "config.json", "golden.json", "model.safetensors", "results.json"}
    assert {p.name for p in tmp_path.iterdir()} == names
    encoder = clever_zoo.from_pretrained(tmp_path)
    assert encoder.spec == spec
    assert check_golden(tmp_path) < 1e-5
    _, teacher, facts = load_run(runs / "clever-resnet18.fmnist")
    stored, trained = encoder.backbone.state_dict(), teacher.state_dict()
    assert torch.allclose(stored["conv1.weight"], trained["conv1.weight"], atol=1e-3)
    assert torch.equal(stored["bn1.running_mean"], trained["bn1.running_mean"])
    card = (tmp_path / "README.md").read_text()
    for text in (spec.weights.sha256, "results.json", facts["hardware"], "Not for", "ten classes"):
        assert text in card


def test_altered_golden_values_are_found(runs: Path, finished: dict, tmp_path: Path) -> None:
    release.release(runs / "clever-resnet18.fmnist", finished, tmp_path)
    path = tmp_path / "golden.json"
    golden = json.loads(path.read_text())
    for wrong in (golden["equivariant"][3] + 0.01 * golden["norms"]["equivariant"], float("nan")):
        golden["equivariant"][3] = wrong
        path.write_text(json.dumps(golden))
        with pytest.raises(clever_zoo.errors.IntegrityError, match="differ by"):
            check_golden(tmp_path)
    for content in ("{", '{"norms": {}}', "[]"):
        path.write_text(content)
        with pytest.raises(clever_zoo.errors.IntegrityError, match="no golden values"):
            check_golden(tmp_path)
    path.unlink()
    with pytest.raises(clever_zoo.errors.IntegrityError, match="does not exist"):
        check_golden(tmp_path)


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    from clever_zoo.samples import sample_paths

    for split, names in (("train", "abc"), ("test", "ac")):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for path in sample_paths()[:8]:
                target = tmp_path / "data" / split / name / path.name
                target.write_bytes(path.read_bytes())
    folder = ["data.dataset=image-folder", "data.image_size_px=28"]
    recipe = load_recipe("clever-resnet18.fmnist", [*MINIATURE, *folder])
    train = load_train_images(recipe.data, tmp_path / "data")
    pretrain.train(recipe, train, tmp_path / "run", stop_at_step=1)
    with pytest.raises(DataError, match="classes of train are missing: b"):
        evaluate.evaluate_run(tmp_path / "run", None, tmp_path / "data", "cpu")


def test_folders_without_a_run_are_checkpoint_errors(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_run(tmp_path)
    source = runs / "clever-resnet18.fmnist" / CHECKPOINT
    (tmp_path / CHECKPOINT).write_bytes(source.read_bytes())
    with pytest.raises(CheckpointError, match=r"environment\.json"):
        load_run(tmp_path)
