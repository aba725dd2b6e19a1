"""Classifiers: heads, freezing, parameter groups, folders that timm and transformers read."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import clever_zoo
from clever_zoo import Classifier, create_classifier, errors
from clever_zoo.classifier import HEAD_STD, load_model
from clever_zoo.samples import sample_class, sample_paths
from clever_zoo.spec import WeightFile

SHORT_NAMES = ("bag", "boot", "coat")
PARTS = ("full", "invariant", "equivariant")


def small_vit(**kwargs) -> clever_zoo.Encoder:
    return clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8, **kwargs)


def pixels(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved classifier for each part."""
    base = tmp_path_factory.mktemp("classifiers")
    for part in PARTS:
        create_classifier("clever-resnet18", 3, part=part, class_names=SHORT_NAMES).save_pretrained(
            base / part
        )
    return {part: base / part for part in PARTS}


def test_the_head_is_the_reference_s() -> None:
    classifier = create_classifier("clever-resnet18", 1000)
    assert classifier.head.weight.shape == (1000, 512)
    assert classifier.head.weight.std().item() == pytest.approx(HEAD_STD, rel=0.02)
    assert not classifier.head.bias.any()


@pytest.mark.parametrize("part", PARTS)
def test_logits_read_the_part_alone(part: str) -> None:
    classifier = create_classifier("clever-resnet18", 5, part=part).eval()
    half = getattr(clever_zoo.from_pretrained("clever-resnet18")(pixels()), part)
    expected = half @ classifier.head.weight.T + classifier.head.bias
    assert torch.allclose(classifier(pixels()), expected, atol=1e-6)
    assert classifier.spec.width == half.shape[1]


def test_predictions(sample_images) -> None:
    classifier = create_classifier("clever-resnet18", 3, class_names=SHORT_NAMES)
    statistics = classifier.encoder.backbone.bn1.running_mean.clone()
    images = [sample_images[0], np.asarray(sample_images[1]), sample_paths()[0]]
    prediction = classifier.predict(images, batch_size=2)
    assert classifier.training
    assert torch.equal(classifier.encoder.backbone.bn1.running_mean, statistics)
    logits = classifier.eval()(classifier.encoder.preprocess(images))
    assert np.allclose(prediction.probabilities, logits.softmax(1).detach(), atol=1e-6)
    assert prediction.probabilities.dtype == np.float32
    assert prediction.classes.tolist() == logits.argmax(1).tolist()
    assert prediction.names == tuple(SHORT_NAMES[i] for i in prediction.classes)
    empty = classifier.predict([])
    assert empty.probabilities.shape == (0, 3)
    assert empty.names == ()
    assert create_classifier(small_vit(), 3).predict(images).names is None


def test_logits_that_are_not_finite_are_no_prediction() -> None:
    classifier = create_classifier(small_vit(), 4)
    with torch.no_grad():
        classifier.head.bias[3] = torch.nan
    with pytest.raises(errors.NonFiniteError, match="image 0 has no class"):
        classifier.predict(sample_paths()[:2])


def test_a_classifier_in_half_precision_predicts() -> None:
    classifier = create_classifier(small_vit(), 4)
    expected = classifier.predict(sample_paths()[:4]).probabilities
    found = classifier.half().predict(sample_paths()[:4]).probabilities
    assert found == pytest.approx(expected, abs=0.01)


def test_a_refused_storage_type_leaves_what_is_there(folders, tmp_path: Path) -> None:
    classifier = Classifier.from_pretrained(folders["full"])
    classifier.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(errors.SpecError, match="dtype is 'int8'; use 'float32' or"):
        classifier.save_pretrained(tmp_path, dtype="int8")
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_bad_image_is_named() -> None:
    with pytest.raises(errors.ImageError, match=r"image 1 \(gone\.png\)"):
        create_classifier("clever-resnet18", 3).predict([sample_paths()[0], "gone.png"])


def test_a_frozen_encoder_does_not_move() -> None:
    classifier = create_classifier("clever-resnet18", 3, freeze_encoder=True).train()
    before = {k: v.clone() for k, v in classifier.encoder.state_dict().items()}
    optimizer = torch.optim.SGD(classifier.parameter_groups(1.0))
    head = classifier.head.weight.clone()
    F.cross_entropy(classifier(pixels()), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert classifier.training
    assert not any(module.training for module in classifier.encoder.modules())
    assert all(torch.equal(v, before[k]) for k, v in classifier.encoder.state_dict().items())
    assert not torch.equal(classifier.head.weight, head)
    assert create_classifier("clever-resnet18", 3).encoder.training


def test_the_callers_encoder_stays_what_its_spec_says() -> None:
    encoder = clever_zoo.from_pretrained("clever-resnet18")
    before = encoder.backbone.conv1.weight.clone()
    classifier = create_classifier(encoder, 3)
    with torch.no_grad():
        classifier.encoder.backbone.conv1.weight.add_(1)
    assert torch.equal(encoder.backbone.conv1.weight, before)
    assert not encoder.training
    assert encoder.spec == clever_zoo.model_info("clever-resnet18")
    spec = classifier.encoder.spec
    assert (spec.name, spec.provenance) == ("clever-resnet18.fmnist-classifier", None)
    assert spec.weights is None
    again = create_classifier(classifier.encoder, 2).encoder.spec
    assert again.name == spec.name


def parameter_ids(groups: list[dict]) -> list[int]:
    return sorted(id(parameter) for group in groups for parameter in group["params"])


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
@pytest.mark.parametrize("weight_decay", [None, 0.1])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_trainable_parameter_is_in_one_group(layer_decay, weight_decay, frozen) -> None:
    for encoder in ("clever-resnet18", small_vit()):
        classifier = create_classifier(encoder, 3, freeze_encoder=frozen)
        groups = classifier.parameter_groups(
            0.1, layer_decay=layer_decay, weight_decay=weight_decay
        )
        trainable = [p for p in classifier.parameters() if p.requires_grad]
        assert parameter_ids(groups) == sorted(map(id, trainable))
        for group in groups:
            assert ("weight_decay" in group) == (weight_decay is not None)
            if weight_decay is not None:
                backbone = classifier.encoder.backbone
                tokens = [getattr(backbone, name, None) for name in ("pos_embed", "cls_token")]
                spared = {p.ndim <= 1 or any(p is t for t in tokens) for p in group["params"]}
                assert spared == {group["weight_decay"] == 0}


def test_the_recurrence_of_vmamba_does_not_decay() -> None:
    classifier = create_classifier(clever_zoo.create_encoder("vmamba_tiny"), 3)
    (spared,) = (
        {id(p) for p in group["params"]}
        for group in classifier.parameter_groups(0.1, weight_decay=0.05)
        if group["name"] != "head" and group["weight_decay"] == 0
    )
    mixer = classifier.encoder.backbone.layers[0].blocks[0].op
    assert {id(mixer.A_logs), id(mixer.Ds), id(mixer.dt_projs_bias)} <= spared
    assert id(mixer.dt_projs_weight) not in spared


def test_plain_groups_are_encoder_and_head() -> None:
    groups = create_classifier("clever-resnet18", 3).parameter_groups(0.1, encoder_lr=0.01)
    assert [group["lr"] for group in groups] == [0.01, 0.1]
    assert len(groups[1]["params"]) == 2


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_layer_decay_is_timms(kind: str, tmp_path) -> None:
    from timm.optim import param_groups_layer_decay

    encoder = clever_zoo.create_encoder("resnet18") if kind == "resnet" else small_vit()
    classifier = create_classifier(encoder, 3)
    classifier.save_pretrained(tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {
        names[id(parameter)]: group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.7)
        for parameter in group["params"]
    }
    ours = {
        id(p): name.removeprefix("encoder.backbone.") for name, p in classifier.named_parameters()
    }
    actual = {
        ours[id(parameter)]: group["lr"] / 0.1
        for group in classifier.parameter_groups(0.1, layer_decay=0.7)
        for parameter in group["params"]
    }
    actual = {
        k.replace("head.", "fc." if kind == "resnet" else "head."): v for k, v in actual.items()
    }
    assert actual == pytest.approx(expected)


@pytest.mark.parametrize("layer_decay", [0, -1, 1.5, float("nan")])
def test_impossible_layer_decay(layer_decay: float) -> None:
    with pytest.raises(errors.SpecError, match="layer_decay"):
        create_classifier(small_vit(), 3).parameter_groups(0.1, layer_decay=layer_decay)


@pytest.mark.parametrize("part", PARTS)
def test_timm_and_transformers_give_the_same_logits(folders, part: str) -> None:
    from transformers import AutoModelForImageClassification

    classifier = Classifier.from_pretrained(folders[part])
    expected = classifier(pixels())
    model = timm.create_model(f"local-dir:{folders[part]}", pretrained=True).eval()
    assert torch.allclose(model(pixels()), expected, atol=1e-6)
    assert tuple(model.pretrained_cfg["label_names"]) == SHORT_NAMES
    wrapped = AutoModelForImageClassification.from_pretrained(folders[part]).eval()
    assert torch.allclose(wrapped(pixels()).logits, expected, atol=1e-6)
    assert wrapped.config.id2label == dict(enumerate(SHORT_NAMES))


def test_a_vit_goes_the_same_way(tmp_path) -> None:
    from transformers import AutoModelForImageClassification

    classifier = create_classifier(small_vit(), 1000, part="invariant").eval()
    classifier.save_pretrained(tmp_path)
    expected = classifier(pixels())
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.allclose(model(pixels()), expected, atol=1e-6)
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.allclose(wrapped(pixels()).logits, expected, atol=1e-6)
    assert wrapped.config.id2label[7] == "7"  # and not a class of ImageNet


def test_saving_and_loading_keeps_everything(folders) -> None:
    loaded = Classifier.from_pretrained(f"local-dir:{folders['invariant']}")
    assert not any(module.training for module in loaded.modules())
    assert loaded.class_names == SHORT_NAMES
    assert loaded.part == "invariant"
    assert loaded.spec.encoder.provenance is None
    assert loaded.spec.encoder.weights is not None
    again = folders["invariant"].with_name("again")
    assert loaded.save_pretrained(again) == loaded.spec
    released = clever_zoo.from_pretrained("clever-resnet18")
    assert torch.equal(loaded.encoder(pixels()).full, released(pixels()).full)


def test_half_precision_storage(folders, tmp_path) -> None:
    classifier = Classifier.from_pretrained(folders["full"])
    spec = classifier.save_pretrained(tmp_path, dtype="float16")
    assert spec.encoder.weights.size_bytes < 0.51 * classifier.spec.encoder.weights.size_bytes
    loaded = Classifier.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.allclose(loaded(pixels()), classifier(pixels()), atol=2e-3)
    with torch.no_grad():
        classifier.head.bias[0] = 1e6
    with pytest.raises(errors.NonFiniteError, match=r"fc\.bias"):
        classifier.save_pretrained(tmp_path / "bad", dtype="float16")


def test_encoders_and_classifiers_are_told_apart(folders, tmp_path) -> None:
    with pytest.raises(errors.SpecError, match=r"Classifier\.from_pretrained"):
        clever_zoo.from_pretrained(folders["full"])
    with pytest.raises(errors.SpecError, match=r"create_classifier\('clever-resnet18'"):
        Classifier.from_pretrained("clever-resnet18")
    clever_zoo.from_pretrained("clever-resnet18").save_pretrained(tmp_path)
    with pytest.raises(errors.SpecError, match="create_classifier"):
        Classifier.from_pretrained(tmp_path)
    for content in ("3", "null", '"clever_classifier"', '["clever_classifier"]'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(errors.SpecError, match="no 'clever' section"):
            load_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("part", "invariannt", "part"),
        ("num_classes", 4, "3 class_names"),
        ("colour", 1, "colour: unknown key"),
        ("encoder", {}, "encoder: unknown key"),
        ("schema_version", 2, "upgrade"),
        ("part", None, "part"),
        ("class_names", ["a", "a", "b"], "do not: a"),
    ],
)
def test_the_section_is_strict(folders, tmp_path, key, value, message) -> None:
    config = json.loads((folders["full"] / "config.json").read_text())
    config["clever_classifier"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.SpecError, match=message):
        Classifier.from_pretrained(tmp_path)
    del config["clever_classifier"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if key not in ("colour", "encoder"):
        with pytest.raises(errors.SpecError, match=f"{key}"):
            Classifier.from_pretrained(tmp_path)


def test_altered_weights_are_refused(folders, tmp_path) -> None:
    config = json.loads((folders["invariant"] / "config.json").read_text())
    tensors = load_file(folders["invariant"] / "model.safetensors")
    tensors["fc.weight"][0, -1] = 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.IntegrityError, match="sha256"):
        Classifier.from_pretrained(tmp_path)
    weights = WeightFile.of((tmp_path / "model.safetensors").read_bytes())
    config["clever"]["weights"] = weights.model_dump(mode="json")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.WeightsMismatchError, match="outside the invariant part"):
        Classifier.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": 3, "part": "half"}, "part"),
        ({"num_classes": 3, "class_names": ["a", "b"]}, "2 class_names"),
        ({"num_classes": 3, "class_names": "abc"}, "list of names"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message) -> None:
    with pytest.raises(errors.SpecError, match=message):
        create_classifier("clever-resnet18", **arguments)
    with pytest.raises(errors.SpecError, match="no such half"):
        create_classifier(small_vit(invariant_dim=192), 3, part="equivariant")


def training_images() -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    paths = sample_paths()[::6]
    names = tuple(sorted({sample_class(path) for path in paths}))
    encoder = clever_zoo.from_pretrained("clever-resnet18")
    labels = torch.tensor([names.index(sample_class(path)) for path in paths])
    return encoder.preprocess([Image.open(path) for path in paths]), labels, names


def test_a_plain_timm_loop_lowers_the_loss() -> None:
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    images, labels, names = training_images()
    classifier = create_classifier("clever-resnet18", len(names), class_names=names)
    groups = classifier.parameter_groups(0.02, layer_decay=0.8)
    optimizer = create_optimizer_v2(groups, opt="sgd", lr=0.02, weight_decay=1e-4, momentum=0.9)
    scheduler = CosineLRScheduler(optimizer, t_initial=8)
    start_lrs = [group["lr"] for group in optimizer.param_groups]
    assert start_lrs == pytest.approx([group["lr"] for group in groups])
    losses = []
    for epoch in range(8):
        loss = F.cross_entropy(classifier(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step(epoch + 1)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert optimizer.param_groups[0]["lr"] < start_lrs[0] / 100


class ForTrainer(torch.nn.Module):
    """What transformers' Trainer wants of a model: a dictionary with the loss first."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixel_values, labels=None):
        logits = self.classifier(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def test_a_hugging_face_trainer_drives_the_classifier(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    images, labels, names = training_images()
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    classifier = create_classifier("clever-resnet18", len(names), freeze_encoder=True)
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=5, per_device_train_batch_size=25, learning_rate=0.01,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(ForTrainer(classifier), arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2
    classifier.save_pretrained(tmp_path / "saved")
    loaded = Classifier.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(images[:4]), classifier.eval()(images[:4]))
