"""Fine-tuning: subsets, presets, what is refused, and the whole way to a classifier's folder."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import clever_zoo
from clever_zoo import Classifier, create_classifier
from clever_zoo.errors import DataError, NonFiniteError, RecipeError
from clever_zoo.records import Record
from clever_zoo.registry import model_info
from clever_zoo.samples import sample_class, sample_paths
from training import finetune
from training.config import DataConfig
from training.data import ImageSet, TrainImages, check_classes, list_images, load_split
from training.subset import draw_subset, read_subset, write_subset

NAMES = ("bag", "sandal", "trouser")
DIGEST = "0" * 64
LABELS = torch.tensor([0] * 200 + [1] * 45 + [2] * 3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of three classes that are told apart easily: 20 train, 10 test of each."""
    root = tmp_path_factory.mktemp("photos")
    for name in NAMES:
        paths = [path for path in sample_paths() if sample_class(path) == name]
        for i, path in enumerate(paths):
            folder = root / ("train" if i < 20 else "test") / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / path.name).write_bytes(path.read_bytes())
    return root


def config(*overrides: str, preset: str = "short") -> finetune.FinetuneConfig:
    return finetune.load_config(preset, "image-folder", ["data.image_size_px=32", *overrides])


def test_presets_are_the_published_settings() -> None:
    linear, tuned, semi = (config(preset=name) for name in ("linear", "finetune", "semi"))
    assert linear.freeze
    assert linear.weight_decay == 0
    assert not tuned.freeze
    assert tuned.weight_decay == 1e-4
    assert semi == tuned.model_copy(update={"fraction": 0.1})
    for settings in (linear, tuned, semi):
        assert (settings.epochs, settings.batch_size, settings.momentum) == (200, 256, 0.9)
        assert settings.lr_head_per_256 == settings.lr_encoder_per_256 == 0.001
        assert settings.layer_decay == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epoch=3"], "epoch: unknown key"),
        (["fraction=0"], "fraction"),
        (["fraction=1.5"], "fraction"),
        (["batch_size=1"], "batch_size"),
        (["part=half"], "part"),
        (["lr_head_per_256=nan"], "lr_head_per_256"),
        (["data.mean=[0.5, 0.5, 0.5]"], r"data\.mean: the encoder's own"),
        (["freeze=true", "layer_decay=0.5"], "layer_decay is 0.5"),
        (["data.dataset=huggingface"], "hf_name is missing"),
        (["epochs"], "KEY=VALUE"),
    ],
)
def test_wrong_settings_are_named(overrides, message) -> None:
    with pytest.raises(RecipeError, match=message):
        config(*overrides)
    with pytest.raises(RecipeError, match="no such preset; use linear"):
        config(preset="shorter")


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_subsets_hold_a_share_of_every_class(fraction: float) -> None:
    subset = draw_subset(LABELS, fraction, 7, DIGEST)
    counts = torch.bincount(LABELS[subset.indices], minlength=3).tolist()
    assert counts == [max(1, round(fraction * n)) for n in (200, 45, 3)]
    assert len(set(subset.indices.tolist())) == len(subset.indices)
    assert np.array_equal(subset.indices, draw_subset(LABELS, fraction, 7, DIGEST).indices)
    if fraction < 1:
        assert not np.array_equal(subset.indices, draw_subset(LABELS, fraction, 8, DIGEST).indices)


def test_smaller_subsets_lie_in_larger_ones() -> None:
    small, large = (draw_subset(LABELS, fraction, 0, DIGEST) for fraction in (0.01, 0.1))
    assert set(small.indices.tolist()) < set(large.indices.tolist())


def test_subset_files(tmp_path) -> None:
    subset = draw_subset(LABELS, 0.1, 3, DIGEST)
    path = tmp_path / "subset.txt"
    write_subset(path, subset, LABELS, NAMES)
    lines = path.read_text().splitlines()
    assert lines[0] == f"# seed 3, fraction 0.1, data {DIGEST}"
    assert lines[1] == f"{subset.indices[0]}\tbag"
    again = read_subset(path, LABELS, NAMES, DIGEST)
    assert np.array_equal(again.indices, subset.indices)
    assert again[1:] == subset[1:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"# seed 3, fraction 0.1, data {'1' * 64}\n0\tbag\n", "made for data 1111"),
        (f"# seed 3, fraction 0.1, data {DIGEST}\n248\tbag\n", "0 <= INDEX < 248"),
        (f"# seed 3, fraction 0.1, data {DIGEST}\n0 bag\n", "INDEX<tab>CLASS"),
        (f"# seed 3, fraction 0.1, data {DIGEST}\n0\tsandal\n", "its class is 'bag'"),
        (f"# seed 3, fraction 0.1, data {DIGEST}\n0\tbag\n0\tbag\n", "each once"),
        (f"# seed 3, fraction 0.1, data {DIGEST}\n", "lists 0 images"),
        ("0\tbag\n", "begins with"),
        ("", "begins with ''"),
    ],
)
def test_wrong_subset_files_are_named(tmp_path, content: str, message: str) -> None:
    (tmp_path / "subset.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        read_subset(tmp_path / "subset.txt", LABELS, NAMES, DIGEST)


def image_set(labels: list[int], names=NAMES) -> ImageSet:
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64), tuple(names))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (image_set([0, 1, 2]), image_set([0, 1]), "1 classes without an image in test: trouser"),
        (image_set([0, 0, 2]), image_set([0, 1, 2]), "without an image in train: sandal"),
        (
            image_set([0, 1, 2]),
            image_set([0, 1], NAMES[:2]),
            "1 classes of train are not in test: trouser",
        ),
        (
            image_set([0, 1], NAMES[:2]),
            image_set([0, 1, 2]),
            "1 classes of test are not in train: trouser",
        ),
        (image_set([0, 1, 2]), image_set([0, 1, 2], NAMES[::-1]), "differently"),
        (image_set([0, 0], ["bag"]), image_set([0], ["bag"]), "needs at least 2"),
        (image_set([0]), image_set([0, 1, 2]), "1 training image; at least 2"),
        (image_set([0, 1, 2]), image_set([]), "3 classes without an image in test"),
    ],
)
def test_data_on_which_a_number_means_nothing_is_refused(train, test, message) -> None:
    with pytest.raises(DataError, match=message):
        check_classes(train, test)


def test_an_epoch_takes_every_image_once_and_no_batch_of_one() -> None:
    images = TrainImages(image_set([0, 1, 2] * 7))
    settings = config("batch_size=4")
    for count in range(2, 21):
        indices = np.arange(count) + 1
        batches = list(finetune.epoch_batches(images, indices, settings, 1, 0))
        sizes = [len(batch.samples) for batch in batches]
        assert sorted(torch.cat([b.samples for b in batches]).tolist()) == indices.tolist()
        assert min(sizes) >= 2
        assert max(sizes) <= 5
    first, second = (
        torch.cat([b.samples for b in finetune.epoch_batches(images, indices, settings, e, 0)])
        for e in (1, 2)
    )
    assert not torch.equal(first, second)


def invoke(*arguments: object):
    return CliRunner().invoke(finetune.app, [str(argument) for argument in arguments])


QUICK = ("clever-resnet18", "data.image_size_px=32", "batch_size=16")


def test_from_an_encoder_to_a_classifier(photos, tmp_path) -> None:
    out = tmp_path / "out"
    result = invoke(*QUICK, "epochs=3", "part=invariant", "--data", photos, "--out", out)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    scores = [line["test_top1"] for line in lines]
    best = scores.index(max(scores)) + 1
    assert f"last {scores[-1]:.1f} %, best {max(scores):.1f} % in epoch {best}" in result.output
    assert "chosen on the test images" in result.output
    assert lines[2]["loss"] < lines[0]["loss"]
    settings = config("epochs=3", "batch_size=16")
    for line in lines:
        cosine = (1 + math.cos(math.pi * (line["epoch"] - 1) / 3)) / 2
        assert line["lr_head"] == pytest.approx(settings.lr_head_per_256 / 16 * cosine)
        assert line["lr_encoder"] == pytest.approx(settings.lr_encoder_per_256 / 16 * cosine)
    assert not (out / "subset.txt").exists()
    record = Record.read(out / "results.json")
    assert {r.metric: r.mean for r in record.results} == {
        "top1_last": scores[-1], "top1_best": max(scores),
    }  # fmt: skip
    assert "epochs 3" in record.tasks["finetune"]
    assert record.networks[0].sha256 == model_info("clever-resnet18").weights.sha256
    classifier = Classifier.from_pretrained(out)
    assert classifier.class_names == NAMES
    assert classifier.part == "invariant"
    test = load_split(config().data, photos, "test")
    arrays = [image.permute(1, 2, 0).numpy() for image in test.images]
    correct = classifier.predict(arrays).classes == test.labels.numpy()
    assert 100 * correct.mean() == pytest.approx(scores[-1])  # the last, not the best
    assert scores[-1] > 60
    refused = invoke(*QUICK, "--data", photos, "--out", out)
    assert refused.exit_code == 2
    assert "holds a model already" in refused.output


def test_a_linear_head_leaves_the_encoder_alone_and_repeats_to_the_bit(photos, tmp_path) -> None:
    settings = config("epochs=2", "freeze=true", "fraction=0.5", "batch_size=16", preset="linear")
    for name, subset in (("a", None), ("b", tmp_path / "a" / "subset.txt")):
        finetune.run("clever-resnet18", settings, photos, tmp_path / name, subset_file=subset)
    a, b = (Classifier.from_pretrained(tmp_path / name) for name in "ab")
    assert torch.equal(a.head.weight, b.head.weight)
    released = clever_zoo.from_pretrained("clever-resnet18")
    tuned = a.encoder.state_dict()
    assert all(torch.equal(v, tuned[k]) for k, v in released.state_dict().items())
    files = [(tmp_path / name / "subset.txt").read_text() for name in "ab"]
    assert files[0] == files[1]
    assert files[0].count("\n") == 1 + 3 * 10
    other = config("epochs=1", "freeze=true", "batch_size=16", "seed=7", preset="linear")
    finetune.run(
        "clever-resnet18", other, photos, tmp_path / "other",
        subset_file=tmp_path / "a" / "subset.txt",
    )  # fmt: skip
    (text,) = Record.read(tmp_path / "other" / "results.json").tasks.values()
    assert "fraction 0.5" in text, "what was used, not the default"
    assert "seed 7, images drawn with seed 0" in text
    with pytest.raises(RecipeError, match=r"drawn with fraction 0\.5; fraction=0\.1"):
        finetune.run(
            "clever-resnet18", config("fraction=0.1"), photos, tmp_path / "c",
            subset_file=tmp_path / "a" / "subset.txt",
        )  # fmt: skip


def test_a_hugging_face_data_set_and_a_share_of_its_labels(photos, tmp_path) -> None:
    import datasets

    splits = {}
    for split in ("train", "test"):
        paths = sorted((photos / split).rglob("*.png"))
        rows = {
            "picture": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
            "kind": [NAMES.index(sample_class(path)) for path in paths],
        }
        table = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
        splits[split] = table.cast_column("kind", datasets.ClassLabel(names=list(NAMES)))
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "hf")
    columns = ("data.hf_name=./hf", "data.image_column=picture", "data.label_column=kind")
    options = ("--dataset", "huggingface", "--data", tmp_path, "--preset", "semi")
    result = invoke(*QUICK, *columns, "epochs=1", *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "6 training and 30 test images" in result.output
    assert (tmp_path / "out" / "subset.txt").read_text().count("\n") == 1 + 6


def test_a_subset_belongs_to_the_data_whatever_the_cache(photos, tmp_path) -> None:
    listed = [
        finetune.list_images(config(f"data.cache={cache}").data, photos, "train").digest()
        for cache in ("memory", "disk", "stream")
    ]
    assert len(set(listed)) == 1


def test_a_loss_that_is_not_finite_names_epoch_and_step(photos, tmp_path) -> None:
    settings = config("lr_head_per_256=1e30", "lr_encoder_per_256=1e30", "batch_size=16")
    with pytest.raises(NonFiniteError, match=r"in epoch 1, step [23]; lower"):
        finetune.run("clever-resnet18", settings, photos, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_unreadable_training_images_are_left_out(photos, tmp_path) -> None:
    data = tmp_path / "data"
    for split in ("train", "test"):
        for name in NAMES:
            (data / split / name).mkdir(parents=True)
            for path in sorted((photos / split / name).iterdir())[:3]:
                (data / split / name / path.name).write_bytes(path.read_bytes())
    next((data / "train" / "bag").iterdir()).write_bytes(b"no image")
    heads = []
    for cache in ("memory", "stream"):
        out = tmp_path / cache
        settings = config("epochs=1", f"data.cache={cache}", "batch_size=4")
        finetune.run("clever-resnet18", settings, data, out)
        heads.append(Classifier.from_pretrained(out).head.weight)
    assert torch.equal(*heads)


def make_folder(root: Path, *images: str) -> Path:
    for image in images:
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / image)
    return root


@pytest.mark.parametrize(
    ("images", "empty", "message"),
    [
        (["a.png", "b.png"], [], "has no folder train"),
        (["train/a.png", "test/b.png"], [], "lie outside class folders"),
        (["train/a/1.png", "test/a/1.png"], [], "needs at least 2"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png"], [], "missing: b"),
        (["train/a/1.png", "test/a/1.png", "test/b/1.png"], [], "not in train: b"),
        (["train/a/1.png", "test/a/1.png"], ["train/b", "test/b"], "without an image: b"),
    ],
)
def test_bad_folders_end_with_one_message_and_no_number(tmp_path, images, empty, message) -> None:
    root = make_folder(tmp_path / "data", *images)
    for folder in empty:
        (root / folder).mkdir(parents=True)
    result = invoke(*QUICK, "--data", root, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "DataError" in result.output
    assert re.search(message, result.output)
    assert "top-1" not in result.output
    assert not (tmp_path / "out").exists()


def test_test_images_go_through_the_encoders_own_transform(photos) -> None:
    classifier = create_classifier("clever-resnet18", 3, class_names=NAMES)
    data = list_images(DataConfig(dataset="image-folder"), photos, "test")
    spec = classifier.encoder.spec.preprocess
    test = finetune.EvaluationImages(data, spec, "test")
    paths = sorted((photos / "test").rglob("*.png"))
    correct = classifier.predict(paths).classes == data.labels.numpy()
    assert finetune.top1(classifier, test) == pytest.approx(100 * correct.mean())
    assert classifier.training
