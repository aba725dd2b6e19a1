"""Evaluations against oracles, and the whole way from a run to a model folder."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F
from typer.testing import CliRunner, Result

import clever_zoo
from clever_zoo.cards import shortfalls
from clever_zoo.errors import CheckpointError, DataError, NonFiniteError
from clever_zoo.golden import check_golden
from clever_zoo.preprocess import crop_pixels
from clever_zoo.records import Record
from clever_zoo.samples import sample_paths
from clever_zoo.spec import PreprocessSpec
from training import pixel_ops, pretrain, release
from training.checkpoint import CHECKPOINT
from training.config import DataConfig, load_recipe
from training.data import ImageSet, TrainImages, list_images, load_fashion_mnist, load_train_images
from training.evaluate import __main__ as evaluate
from training.evaluate.inputs import (
    EvaluationImages,
    embed_images,
    features_of,
    load_encoder,
    parts_of,
    raw_pixels,
    subject,
)
from training.evaluate.perturb import (
    PERTURBATIONS,
    circular_mask,
    draw_angles,
    draw_jitter,
    perturb,
)
from training.evaluate.suite import evaluate_subject, task_texts
from training.networks import build_student
from training.runs import load_run, shared_settings

MINIATURE = ["epochs=1", "batch_size=16", "method.prototypes=64", "method.hidden_dim=64"]
MINIATURE += ["method.bottleneck_dim=32", "optimizer.warmup_epochs=0.25"]


def test_perturbations_are_seeded_per_image(rng) -> None:
    x = torch.from_numpy(rng.integers(0, 256, (6, 3, 32, 32)).astype(np.float32))
    samples = np.arange(6)
    before = x.clone()
    for kind, p in PERTURBATIONS.items():
        whole = perturb(x, samples, kind, 0)
        assert torch.equal(whole[2:4], perturb(x[2:4], samples[2:4], kind, 0)), kind
        assert torch.equal(whole, perturb(x, samples, kind, 1)) != p.is_random, kind
        assert torch.equal(whole, whole.round()), kind
        assert whole.min() >= 0
        assert whole.max() <= 255
    assert torch.equal(perturb(x, samples, "ori", 0), before)
    assert torch.equal(x, before)


def test_perturbations_are_the_published_ones_in_their_order(monkeypatch) -> None:
    """Against torchvision on Pillow images, with the angle and the factors that were drawn."""
    pictures = [Image.open(path).convert("RGB").resize((64, 64)) for path in sample_paths()[:4]]
    x = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() for i in pictures])
    samples = np.arange(4)
    order, factors = draw_jitter(samples, 3)
    operations = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for kind, limit, flip in (("cj", 0, False), ("cj_f", 0, True), ("cj_r180", 180, False)):
        angles = draw_angles(samples, 3, max_angle_deg=limit)
        ours = perturb(x, samples, kind, 3)
        for i, picture in enumerate(pictures):
            expected = F.hflip(picture) if flip else picture
            expected = F.rotate(expected, float(angles[i]))
            for turn in order[i].tolist():
                expected = operations[turn](expected, float(factors[i, turn]))
            theirs = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
            assert float((ours[i] - theirs).abs().mean()) <= 0.5, (kind, i)
    noise = torch.zeros(4, 2, 64, 64).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("training.evaluate.perturb._noise", lambda *_: noise)
    turned = perturb(x, samples, "cj_r", 3)
    for kind, alpha in (("cj_r_e50", 50), ("cj_r_e", 100), ("cj_r_e150", 150)):
        warped = pixel_ops.elastic(turned, noise, alpha=alpha)
        assert torch.equal(perturb(x, samples, kind, 3), warped)
        assert not torch.equal(warped, turned)


def test_rotation_is_the_drawn_one_and_uniform(rng) -> None:
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(4)]
    x = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() for i in images])
    angles = draw_angles(np.arange(4), 5)
    expected = [np.array(F.rotate(i, float(a))) for i, a in zip(images, angles, strict=True)]
    ours = perturb(x, np.arange(4), "r", 5).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - np.stack(expected)).mean() <= 0.5
    factors = draw_jitter(np.arange(20_000), 0)[1]
    limits = [0.6, 0.6, 0.6, -0.1], [1.4, 1.4, 1.4, 0.1]
    for found, limit in zip((factors.amin(0), factors.amax(0)), limits, strict=True):
        torch.testing.assert_close(found, torch.tensor(limit), atol=1e-3, rtol=0)
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
    images = EvaluationImages(data, spec, "test")
    image = Image.fromarray(data.images[7, 0].numpy()).convert("RGB")
    seen = images.pixels(7, 8)
    assert np.array_equal(seen[0].permute(1, 2, 0).numpy(), crop_pixels(image, 32, 32))
    bilinear = image.resize((32, 32), Image.Resampling.BILINEAR)
    theirs = images.pixels(7, 8, "bilinear")[0].permute(1, 2, 0).numpy()
    assert np.array_equal(theirs, np.array(bilinear))
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8).eval()
    encoder.spec = encoder.spec.model_copy(update={"preprocess": spec})
    vit = subject(encoder, "model", {}, 153)
    expected = encoder.embed([image]).full
    np.testing.assert_allclose(features_of(vit)(seen).numpy(), expected, atol=1e-6)
    images.prepare("bicubic")
    assert torch.equal(images.pixels(7, 8), seen)
    four = features_of(vit, 4)(seen)
    assert four.shape == (1, 4 * 192)
    np.testing.assert_allclose(four[:, -192:].numpy(), expected, atol=1e-5)


def test_images_stored_class_by_class_are_shuffled() -> None:
    images = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(-1, -1, 32, 32)
    labels = torch.arange(60) // 20
    spec = PreprocessSpec(input_size_px=32, crop_pct=1.0)
    seen = EvaluationImages(ImageSet(images, labels, ("a", "b", "c")), spec, "train")
    assert seen.shuffled
    assert sorted(seen.order) == list(range(60))
    assert set(seen.labels[:20].tolist()) == {0, 1, 2}
    values = torch.cat([pixels[:, 0, 0, 0] for pixels, _ in seen.batches()])
    assert values.tolist() == seen.order.tolist()
    assert torch.equal(values.long() // 20, seen.labels)
    assert EvaluationImages(
        ImageSet(images, labels.flip(0), ("a", "b", "c")), spec, "train"
    ).shuffled
    mixed = EvaluationImages(ImageSet(images, labels.roll(5), ("a", "b", "c")), spec, "train")
    assert not mixed.shuffled
    assert mixed.order.tolist() == list(range(60))
    assert "shuffled" in task_texts(shuffled=True)["angle"]
    assert "shuffled" not in task_texts()["angle"]


def test_parts_of_four_blocks() -> None:
    """Widths of the authors' evaluation, and ours, which cuts every block."""
    rows = torch.arange(4 * 192.0)[None]
    reference = parts_of(rows, 153, blocks=4)
    assert {k: v.shape[1] for k, v in reference.items()} == {
        "full": 768, "invariant": 729, "equivariant": 39,
    }  # fmt: skip
    ours = parts_of(rows, 153, blocks=4, per_block=True)
    assert (ours["invariant"].shape[1], ours["equivariant"].shape[1]) == (4 * 153, 4 * 39)
    assert ours["equivariant"][0, :2].tolist() == [153, 154]
    assert ours["invariant"][0, 153] == 192
    assert parts_of(rows, None).keys() == {"full"}


def test_broken_features_and_lonely_images_give_no_number(fashion_mnist_folder: Path) -> None:
    data = load_fashion_mnist(fashion_mnist_folder, "test")
    spec = PreprocessSpec(input_size_px=32, crop_pct=1.0)
    images = EvaluationImages(data, spec, "test")

    def broken(pixels: torch.Tensor) -> torch.Tensor:
        rows = pixels.mean((2, 3))
        rows[3, 1] = float("nan")
        return rows

    with pytest.raises(NonFiniteError, match="test image 3 "):
        embed_images(broken, images)
    one = EvaluationImages(replace(data, images=data.images[:1], labels=data.labels[:1]), spec, "t")
    with pytest.raises(DataError, match="needs at least 2"):
        embed_images(broken, one)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, fashion_mnist_folder: Path) -> Path:
    """A miniature CLeVER run and its baseline on the bundled pictures."""
    base = tmp_path_factory.mktemp("runs")
    data = TrainImages(load_fashion_mnist(fashion_mnist_folder, "train"))
    for name in ("clever-resnet18.fmnist", "dino-resnet18.fmnist"):
        recipe = load_recipe(name, MINIATURE)
        pretrain.train(recipe, data, base / name, stop_at_step=3)
    return base


def run_evaluation(*arguments: object) -> Result:
    app = evaluate.typer.Typer()
    app.command()(evaluate.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def record(runs: Path, fashion_mnist_folder: Path) -> Record:
    out = runs / "clever-resnet18.fmnist"
    arguments = [out, "--data", fashion_mnist_folder, "--reference-epochs", 1]
    arguments += ["--baseline", runs / "dino-resnet18.fmnist"]
    result = run_evaluation(*arguments, "--tasks", "knn,linear_cached,linear_reference,finetune")
    assert result.exit_code == 0, result.output
    assert (out / "report.html").read_text().count("<img") >= 2
    return Record.read(out / "results.json")


def top1(record: Record, role: str, part: str, perturbation: str = "ori") -> float:
    name = record.network(role).name
    return record.find(name, "knn", "top1", part, perturbation=perturbation, at=20.0).mean


def test_the_record_has_every_network_protocol_and_part(record: Record) -> None:
    assert [n.role for n in record.networks] == ["model", "baseline", "untrained", "pixels"]
    assert all(n.sha256 for n in record.networks[:3])
    assert record.networks[1].training["images_seen"] == 48
    assert record.networks[1].training["finished"] is False
    count = Counter((r.network, r.protocol.task) for r in record.results)
    for network in record.networks:
        parts = 1 if network.role == "pixels" else 3
        assert count[network.name, "knn"] == parts * 3 * 4 * 2
        assert count[network.name, "linear_cached"] == parts * 11
        reference = 0 if network.role == "pixels" else parts * 10
        assert count[network.name, "linear_reference"] == reference
        tuned = network.role in ("model", "baseline")
        assert count[network.name, "finetune_short"] == 2 * tuned
    for row in record.results:
        assert 0 <= row.mean <= 100
        assert row.n == 300
        random = row.protocol.perturbation != "ori"
        seeded = row.protocol.task.endswith(("_short", "_reference"))
        assert len(row.seeds) == (3 if random else seeded)
    assert any(row.std > 0 for row in record.results)
    assert record.images == {"train": 300, "test": 300}
    # The gallery and the clean queries are the same pictures, so each query finds itself.
    assert top1(record, "pixels", "full") > 60


def test_an_evaluation_repeats_to_the_digit_and_brings_a_record_up_to_date(
    runs: Path, record: Record, fashion_mnist_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    record.model_copy(update={"results": record.results[:5]}).write(out / "results.json")
    common = [runs / "clever-resnet18.fmnist", "--data", fashion_mnist_folder, "-o", out]
    result = run_evaluation(*common, "--tasks", "knn", "--networks", "model,pixels")
    assert result.exit_code == 0, result.output
    again = Record.read(out / "results.json")
    assert {n.role for n in again.networks} == {"model", "baseline", "untrained", "pixels"}
    theirs = {r.key: (r.mean, r.std) for r in record.results}
    rows = [r for r in again.results if r.protocol.task == "knn"]
    assert len(rows) == 3 * 3 * 4 * 2 + 3 * 4 * 2
    assert all((r.mean, r.std) == theirs[r.key] for r in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "knn,magic"], "--tasks 'knn,magic': use a list of knn"),
        (["--networks", ""], "--networks '': use a list of model"),
        (["--baseline", "clever-resnet19"], "UnknownModelError"),
        (["--dataset", "bogus"], "RecipeError: data: 1 problem"),
        (["--dataset", "huggingface"], "hf_name is missing"),
        (["--networks", "baseline"], "a baseline needs --baseline"),
    ],
)
def test_mistakes_on_the_command_line(runs: Path, tmp_path, arguments, message) -> None:
    result = run_evaluation(runs / "clever-resnet18.fmnist", "-o", tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of coloured, oblong pictures in two classes."""
    root = tmp_path_factory.mktemp("photos")
    colours = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, start in (("bag", 0), ("coat", 30)):
            (root / split / name).mkdir(parents=True)
            for i, path in enumerate(sample_paths()[start : start + 12]):
                tint = colours.uniform(0.3, 1, 3)
                grey = np.asarray(Image.open(path).convert("RGB").resize((60, 44)))
                Image.fromarray((grey * tint).astype(np.uint8)).save(
                    root / split / name / f"{i}.png"
                )
    return root


@pytest.mark.slow
def test_a_vit_on_a_folder_of_coloured_pictures(photos: Path, tmp_path: Path) -> None:
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    encoder.save_pretrained(tmp_path / "vit")
    arguments = [f"local-dir:{tmp_path / 'vit'}", "--dataset", "image-folder", "--data", photos]
    arguments += ["-o", tmp_path / "out", "--networks", "model,pixels", "--reference-epochs", 2]
    result = run_evaluation(
        *arguments, "--tasks", "knn,linear_cached,linear_reference,equivariance"
    )
    assert result.exit_code == 0, result.output
    record = Record.read(tmp_path / "out/results.json")
    assert {r.at for r in record.results if r.protocol.task == "knn"} == {10.0, 20.0}
    for task in ("linear_cached", "linear_reference"):
        recipes = {
            (r.protocol.features, r.part)
            for r in record.results
            if r.protocol.task == task and r.network == "vit_tiny"
        }
        assert len(recipes) == 3 * 3
    assert "2 epochs" in record.tasks["linear_reference"]
    assert "shortened" in record.tasks["linear_reference"]
    # The gap between the interpolations is real: images are read whole, not from decoded squares.
    spec = encoder.spec.preprocess
    images = EvaluationImages(
        list_images(DataConfig(dataset="image-folder"), photos, "test"), spec, "t"
    )
    assert not torch.equal(images.pixels(0, 4), images.pixels(0, 4, "bilinear"))
    names = [(label, f"{i}.png") for label in ("bag", "coat") for i in sorted(range(12), key=str)]
    whole = [photos.joinpath("val", *names[place]) for place in images.order[:2]]
    expected = encoder.eval().embed(whole).full
    ours = features_of(subject(encoder, "model", {}, 153))(images.pixels(0, 2))
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)


def test_an_encoder_without_a_split_has_no_numbers_for_halves(photos: Path, tmp_path) -> None:
    encoder = clever_zoo.create_encoder("resnet18", invariant_dim=512)
    spec = encoder.spec.preprocess.model_copy(update={"input_size_px": 32})
    encoder.spec = encoder.spec.model_copy(update={"preprocess": spec})
    encoder.save_pretrained(tmp_path / "whole")
    arguments = [f"local-dir:{tmp_path / 'whole'}", "--dataset", "image-folder", "--data", photos]
    arguments += ["-o", tmp_path / "out", "--networks", "model", "--tasks", "knn,equivariance"]
    arguments += ["--data-name", "my-photos"]
    result = run_evaluation(*arguments)
    assert result.exit_code == 0, result.output
    record = Record.read(tmp_path / "out/results.json")
    assert {r.part for r in record.results} == {"full"}
    assert (record.dataset, record.digests.keys()) == ("my-photos", {"train", "test"})


def test_large_pictures_give_small_raw_pixels(photos: Path) -> None:
    spec = PreprocessSpec(input_size_px=64)
    images = EvaluationImages(
        list_images(DataConfig(dataset="image-folder"), photos, "test"), spec, "t"
    )
    control = raw_pixels(images)
    assert features_of(control)(images.pixels(0, 2)).shape == (2, 3 * 32 * 32)
    assert control.network.training == {"note": "averaged from 64 to 32 px"}


def test_a_released_name_needs_a_place_for_its_record() -> None:
    result = run_evaluation("clever-resnet18")
    assert result.exit_code == 2
    assert "--output FOLDER" in result.output


def with_row(record: Record, role: str, part: str, perturbation: str, mean: float) -> Record:
    name = record.network(role).name
    key = record.find(name, "knn", "top1", part, perturbation=perturbation, at=20.0).key
    rows = [r.model_copy(update={"mean": mean}) if r.key == key else r for r in record.results]
    return record.model_copy(update={"results": tuple(rows)})


def with_training(record: Record, role: str, **facts: object) -> Record:
    networks = [
        n.model_copy(update={"training": n.training | facts}) if n.role == role else n
        for n in record.networks
    ]
    return record.model_copy(update={"networks": tuple(networks)})


@pytest.fixture
def finished(runs: Path, record: Record, monkeypatch: pytest.MonkeyPatch) -> Record:
    """The record as if both runs had ended well at one commit; the run is made to agree."""
    encoder, facts = load_encoder(runs / "clever-resnet18.fmnist")
    facts |= {"finished": True, "commit": "0123456789" * 4}
    monkeypatch.setattr(release, "load_encoder", lambda _: (encoder, facts))
    monkeypatch.setattr(release, "load_recipe", lambda name: load_recipe(name, MINIATURE))
    for role in ("model", "baseline"):
        record = with_training(record, role, **facts)
    record = with_row(record, "model", "invariant", "cj_r", 60.0)
    record = with_row(record, "untrained", "invariant", "cj_r", 45.0)
    record = with_row(record, "pixels", "full", "ori", top1(record, "model", "invariant"))
    return with_row(record, "pixels", "full", "cj_r", 35.0)


def test_networks_of_one_name_are_refused(runs: Path, fashion_mnist_folder: Path, tmp_path) -> None:
    run = runs / "clever-resnet18.fmnist"
    arguments = [run, "--baseline", run, "--data", fashion_mnist_folder, "-o", tmp_path]
    result = run_evaluation(*arguments, "--tasks", "knn")
    assert result.exit_code == 2
    assert "two of the networks are called 'clever-resnet18.fmnist'" in result.output
    assert not list(tmp_path.iterdir())


def test_the_reference_probe_resizes_as_published(record: Record) -> None:
    """Bicubic for clean images, bilinear for perturbed ones."""
    rows = [r for r in record.results if r.protocol.task == "linear_reference"]
    found = {(r.protocol.perturbation == "ori", r.protocol.interpolation) for r in rows}
    assert found == {(True, "bicubic"), (False, "bilinear")}


def test_last_is_the_last_epoch_and_best_the_best(fashion_mnist_folder: Path, monkeypatch) -> None:
    def fit(*arguments: Any, **_: Any) -> dict[str, Any]:
        probe = SimpleNamespace(scores=lambda features: torch.zeros(len(features), 10))
        return {
            name: SimpleNamespace(top1=(10.0, 90.0, 50.0), probe=probe) for name in arguments[3]
        }

    monkeypatch.setattr("training.evaluate.suite.fit_reference", fit)
    monkeypatch.setattr("training.evaluate.suite.LINEAR_PERTURBATIONS", ("ori",))
    encoder = clever_zoo.from_pretrained("clever-resnet18")
    data = load_fashion_mnist(fashion_mnist_folder, "test")
    images = EvaluationImages(data, encoder.spec.preprocess, "test")
    network = subject(encoder, "model", {}, 409)
    rows = evaluate_subject(network, images, images, ["linear_reference"], crops=data)
    found = {(row.metric, row.part): row.mean for row in rows}
    assert {m: found[m, "full"] for m, _ in found} == {"top1_last": 50.0, "top1_best": 90.0}
    assert len(found) == 6


def test_a_network_of_the_papers_terms_stands_beside_a_model_with_more(
    runs: Path, record: Record, finished: Record, fashion_mnist_folder: Path, tmp_path: Path
) -> None:
    common = [runs / "clever-resnet18.fmnist", "--data", fashion_mnist_folder, "-o", tmp_path]
    paper = ["--paper", runs / "dino-resnet18.fmnist", "--networks", "paper"]
    result = run_evaluation(*common, *paper, "--tasks", "knn")
    assert result.exit_code == 0, result.output
    beside = Record.read(tmp_path / "results.json")
    (network,) = beside.networks
    assert (network.name, network.role) == ("dino-resnet18.fmnist", "paper")
    assert top1(beside, "paper", "invariant") == top1(record, "baseline", "invariant")
    renamed = network.model_copy(update={"name": "clever-resnet18.paper"})
    networks = (finished.networks[0], renamed, *finished.networks[1:])
    assert release.gate_problems(finished.model_copy(update={"networks": networks})) == []


def test_an_unfinished_run_is_not_released(runs: Path, record: Record, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"stopped after .* \(3 steps\)") as caught:
        release.release(runs / "clever-resnet18.fmnist", record, tmp_path)
    assert "--accept-shortfalls" in str(caught.value)
    assert "other values than the bundled recipe: batch_size: checkpoint" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_baseline_without_facts_of_training_is_a_problem_and_no_crash(finished: Record) -> None:
    networks = [
        n.model_copy(update={"training": {}}) if n.role == "baseline" else n
        for n in finished.networks
    ]
    unknown = finished.model_copy(update={"networks": tuple(networks)})
    assert shortfalls(unknown) == []
    assert any("the baseline saw 0 images" in text for text in release.gate_problems(unknown))


def test_the_gate(finished: Record) -> None:
    assert release.gate_problems(finished) == []
    worse = with_row(finished, "untrained", "invariant", "cj_r", 45.1)
    assert "above the untrained network: 60.10" in release.gate_problems(worse)[0]
    worse = with_row(worse, "pixels", "full", "cj_r", 35.1)
    worse = with_training(worse, "baseline", images_seen=2, epochs=5)
    later = [{"commit": "def+changes", "hardware": "another machine"}]
    worse = with_training(worse, "model", commit="abc+changes", continued_under=later)
    worse = with_training(worse, "baseline", shared_settings="other")
    problems = release.gate_problems(worse)
    assert len(problems) == 7
    for text in ("'abc+changes'", "'def+changes'", "not of clever and run alone"):
        assert text in "".join(problems)
    unmeasured = finished.model_copy(update={"results": ()})
    problems = release.gate_problems(unmeasured)
    assert "k-NN nan is not" in problems[0]
    assert problems[-1] == "clean k-NN was not measured"
    alone = finished.model_copy(update={"networks": finished.networks[:1]})
    assert "no baseline, no untrained, no pixels" in release.gate_problems(alone)[0]


def test_baselines_share_what_is_not_clevers(record: Record) -> None:
    facts = [record.network(role).training["shared_settings"] for role in ("model", "baseline")]
    wrapped, plain = (load_recipe(f"{k}-resnet18.fmnist", MINIATURE) for k in ("clever", "dino"))
    assert facts == [shared_settings(wrapped), shared_settings(plain)]
    assert len(set(facts)) == 1
    beyond = load_recipe("clever-resnet18.fmnist_plus", [*MINIATURE, "views.disc_mask=true"])
    assert shared_settings(beyond) == facts[0]
    for change in ("seed=1", "optimizer.weight_decay=0.1", "views.local_views=1"):
        other = load_recipe("dino-resnet18.fmnist", [*MINIATURE, change])
        assert shared_settings(other) != facts[0]


def test_shortfalls_are_accepted_by_hand_and_stand_in_the_card(
    runs: Path, finished: Record, tmp_path: Path
) -> None:
    assert shortfalls(finished) == []
    seen = finished.network("model").training["images_seen"]
    record = with_training(finished, "model", finished=False, epochs=2)
    record = with_training(record, "baseline", images_seen=2 * seen, epochs=2)
    record = with_row(record, "pixels", "full", "ori", 99.0)
    assert release.gate_problems(record) == []
    stopped, uneven, behind = sentences = shortfalls(record)
    assert f"stopped after {seen / record.images['train']:.1f} of its 2 epochs" in stopped
    assert "The baseline saw 100.0% more images" in uneven
    assert "99.0, the invariant half" in behind
    run = runs / "clever-resnet18.fmnist"
    with pytest.raises(DataError, match=r"was stopped after .*--accept-shortfalls"):
        release.release(run, record, tmp_path)
    assert not list(tmp_path.iterdir())
    release.release(run, record, tmp_path, accept_shortfalls=True)
    card = (tmp_path / "README.md").read_text()
    assert "continued on" not in card
    assert all(f"\n- {sentence}\n" in card for sentence in sentences)


def test_a_record_of_other_weights_is_refused(runs: Path, finished: Record, tmp_path) -> None:
    networks = (finished.networks[0].model_copy(update={"sha256": "0" * 64}),)
    other = finished.model_copy(update={"networks": networks + finished.networks[1:]})
    with pytest.raises(DataError, match="of other weights than the run's"):
        release.release(runs / "clever-resnet18.fmnist", other, tmp_path)


def test_weights_that_storage_changes_are_refused(
    runs: Path, finished: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _, facts = load_run(runs / "clever-resnet18.fmnist")
    other = build_student(recipe.backbone, recipe.seed + 1)
    monkeypatch.setattr(release, "load_run", lambda _: (recipe, other, facts))
    with pytest.raises(DataError, match=r"the invariant half of .* cosine of .*; the equivariant"):
        release.release(runs / "clever-resnet18.fmnist", finished, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_released_folder_is_complete_and_true(
    runs: Path, finished: Record, tmp_path: Path
) -> None:
    spec = release.release(runs / "clever-resnet18.fmnist", finished, tmp_path)
    names = {"README.md", "config.json", "golden.json", "model.safetensors", "results.json"}
    assert {p.name for p in tmp_path.iterdir()} == names
    encoder = clever_zoo.from_pretrained(tmp_path)
    assert encoder.spec == spec
    assert check_golden(tmp_path) < 1e-5
    assert spec.weights.sha256 == finished.network("model").sha256
    _, teacher, facts = load_run(runs / "clever-resnet18.fmnist")
    stored, trained = encoder.backbone.state_dict(), teacher.state_dict()
    assert torch.allclose(stored["conv1.weight"], trained["conv1.weight"], atol=1e-3)
    assert torch.equal(stored["bn1.running_mean"], trained["bn1.running_mean"])
    card = (tmp_path / "README.md").read_text()
    for text in (spec.weights.sha256, "results.json", facts["hardware"], "Not for", "ten classes"):
        assert text in card


def test_altered_golden_values_are_found(runs: Path, finished: Record, tmp_path: Path) -> None:
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
        next(evaluate.evaluate(str(tmp_path / "run"), data=tmp_path / "data"))


def test_folders_without_a_run_are_checkpoint_errors(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_run(tmp_path)
    source = runs / "clever-resnet18.fmnist" / CHECKPOINT
    (tmp_path / CHECKPOINT).write_bytes(source.read_bytes())
    with pytest.raises(CheckpointError, match=r"environment\.json"):
        load_run(tmp_path)
