"""Five doors to one model: clever_zoo, torch.hub, timm by name and by folder, transformers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import clever_zoo
import clever_zoo.timm
from clever_zoo import errors, locate
from clever_zoo.backbones import BACKBONES
from clever_zoo.encoder import Encoder
from clever_zoo.registry import DEFAULT_TAGS
from clever_zoo.samples import sample_paths
from clever_zoo.spec import PreprocessSpec
from tests.hub_server import run_client, running_hub

ROOT = Path(__file__).parents[2]
RELEASED = clever_zoo.list_models()
UNRELEASED = [b for b in BACKBONES if not clever_zoo.list_models(backbone=b)]
NAME = "clever-resnet18.fmnist"


def timm_name(name: str) -> str:
    return name.replace("-", "_")


def full(encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return encoder(pixels).full


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return clever_zoo.from_pretrained(NAME).preprocess(sample_paths()[::20])


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands in for a released ViT: seeded weights, patches of its own."""
    torch.manual_seed(0)
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=4).eval()
    encoder.spec = encoder.spec.model_copy(update={"name": "clever-vit-tiny.test"})
    folder = tmp_path_factory.mktemp("model_cards") / encoder.spec.name
    encoder.save_pretrained(folder, dtype="float16")
    return folder


@pytest.mark.parametrize("name", RELEASED)
def test_every_door_gives_a_released_model_to_the_bit(name: str) -> None:
    encoder = clever_zoo.from_pretrained(name)
    pixels = encoder.preprocess(sample_paths()[::20])
    expected = full(encoder, pixels)
    folder = ROOT / "model_cards" / name
    entry, _, tag = timm_name(name).partition(".")
    by_hub = [torch.hub.load(str(ROOT), entry, source="local", tag=tag)]
    by_timm = [timm_name(name), f"local-dir:{folder}"]
    if DEFAULT_TAGS[name.partition(".")[0]] == tag:
        by_hub.append(torch.hub.load(str(ROOT), entry, source="local"))
        by_timm.append(entry)
    assert all(torch.equal(expected, full(model, pixels)) for model in by_hub)
    with torch.no_grad():
        for source in by_timm:
            model = timm.create_model(source, pretrained=True).eval()
            assert torch.equal(expected, model(pixels)), source
        model = AutoModel.from_pretrained(folder).eval()
        assert torch.equal(expected, model(pixels).pooler_output)


# First without clever_zoo, as people have it who know timm or transformers alone. Then the ViT is
# registered as a release, before clever_zoo.timm is imported.
DOORS_SCRIPT = """
import sys
from pathlib import Path
import numpy as np, timm, torch
from transformers import AutoModel
checkout, *folders = map(Path, sys.argv[1:])
pixels = torch.from_numpy(np.load("pixels.npy"))
doors = {}

def through_timm(kind, *sources):
    for source in sources:
        doors[f"{kind} {source}"] = timm.create_model(source, pretrained=True).eval()(pixels)

with torch.inference_mode():
    for kind, folder in zip(("resnet", "vit"), folders):
        repo = f"org/{kind}"
        through_timm(kind, f"local-dir:{folder}", f"hf-hub:{repo}", f"hf-hub:{repo}@main")
        for source in (folder, repo):
            model = AutoModel.from_pretrained(source).eval()
            doors[f"{kind} transformers, {source}"] = model(pixels).pooler_output
    assert not any(name.startswith("clever_zoo") for name in sys.modules)
    import clever_zoo
    from clever_zoo import locate, registry
    from clever_zoo.spec import ModelSpec
    spec = ModelSpec.read(folder / "config.json")
    registry.RELEASED += (spec,)
    registry._MODELS[spec.name] = spec
    registry.DEFAULT_TAGS["clever-vit-tiny"] = "test"
    locate._MODEL_FOLDERS += (folder.parent,)
    import clever_zoo.timm
    assert "clever_vit_tiny.test" in timm.list_models("clever_*", pretrained=True)
    through_timm("vit, ours too:", "clever_vit_tiny", "clever_vit_tiny.test", "hf-hub:org/vit")
    for kind in ("resnet", "vit"):
        doors[f"{kind} clever_zoo"] = clever_zoo.from_pretrained(f"org/{kind}")(pixels).full
    entry = torch.hub.load(str(checkout), "clever_vit_tiny", source="local")
    doors["vit torch.hub"] = entry(pixels).full
np.savez("doors.npz", **{name: values.numpy() for name, values in doors.items()})
"""


def test_every_door_gives_the_same_to_the_bit_through_the_hub(
    vit: Path, pixels, tmp_path: Path
) -> None:
    folders = {"resnet": ROOT / "model_cards" / NAME, "vit": vit}
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    with running_hub() as hub:
        for kind, folder in folders.items():
            hub.add(f"org/{kind}", folder)
        run_client(DOORS_SCRIPT, hub, tmp_path, *map(str, (ROOT, *folders.values())))
        assert all(hub.lines(f"GET /org/{kind}/[0-9a-f]{{64}}") for kind in folders)
    expected = {kind: full(clever_zoo.from_pretrained(f), pixels) for kind, f in folders.items()}
    with np.load(tmp_path / "doors.npz") as doors:
        assert len(doors) == 16
        for name, features in doors.items():
            np.testing.assert_array_equal(
                features, expected[name.split()[0].rstrip(",")].numpy(), name
            )


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_their_transforms_give_our_pixels(kind: str, vit: Path) -> None:
    """Equal to the bit wherever they were compared on square pictures.

    Of others only what the square needs is resized here, and all of it there: then a few pixels
    in ten thousand differ, by one step of a byte.
    """
    folder = vit if kind == "vit" else ROOT / "model_cards" / NAME
    encoder = clever_zoo.from_pretrained(folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    processor = AutoImageProcessor.from_pretrained(folder)
    square = [Image.open(path).convert("RGB") for path in sample_paths()[::25]]
    square += [square[0].resize((side, side)) for side in (5, 31, 33, 200)]
    wide = [image.resize((203, 77), Image.Resampling.BICUBIC) for image in square[:4]]
    tall = [image.resize((45, 60), Image.Resampling.BICUBIC) for image in square[:4]]
    for images, steps in ((square, 0), (wide + tall, 1)):
        ours = encoder.preprocess(images)
        for theirs in (
            torch.stack([transform(image) for image in images]),
            processor(images)["pixel_values"],
        ):
            assert theirs.shape == ours.shape
            std = torch.tensor(encoder.spec.preprocess.std)[:, None, None]
            gap = (ours - theirs).abs() * std * 255
            assert float(gap.max()) <= 1.01 * steps
            assert float((gap > 0.01).float().mean()) < 1e-3


def test_timm_lists_every_backbone_and_what_is_released() -> None:
    assert set(timm.list_models("clever_*")) == {f"clever_{backbone}" for backbone in BACKBONES}
    pretrained = timm.list_models("clever_*", pretrained=True)
    assert sorted(pretrained) == sorted(map(timm_name, RELEASED))
    for name in ("clever_resnet18", *pretrained):
        assert timm.models.is_model_pretrained(name)
    for backbone in UNRELEASED:
        assert not timm.models.is_model_pretrained(f"clever_{backbone}")


def test_timm_knows_our_preprocessing() -> None:
    for name, expected in (
        ("clever_resnet18", clever_zoo.model_info(NAME).preprocess),
        ("clever_resnet18.fmnist", clever_zoo.model_info(NAME).preprocess),
        (f"clever_{UNRELEASED[0]}", PreprocessSpec()),
    ):
        cfg = timm.get_pretrained_cfg(name)
        size = expected.input_size_px
        assert tuple(cfg.input_size) == (3, size, size)
        assert (cfg.crop_pct, cfg.crop_mode) == (expected.crop_pct, "center")
        assert cfg.interpolation == "bicubic"
        assert (tuple(cfg.mean), tuple(cfg.std)) == (expected.mean, expected.std)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_timm_builds_every_backbone_as_we_do(backbone: str) -> None:
    """And where weights are released, the network that takes them."""
    model = f"clever-{backbone.replace('_', '-')}"
    arguments = clever_zoo.model_info(model).model_args if model in DEFAULT_TAGS else {}
    torch.manual_seed(0)
    ours = clever_zoo.create_encoder(backbone, **arguments).backbone.state_dict()
    torch.manual_seed(0)
    theirs = timm.create_model(f"clever_{backbone}").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_timm_without_released_weights_names_the_recipe() -> None:
    names = [f"clever_{backbone}{tag}" for backbone in UNRELEASED for tag in ("", ".fmnist")]
    for name in names:
        with pytest.raises(errors.UnknownModelError, match=r"recipes/clever-.*\.fmnist\.toml"):
            timm.create_model(name, pretrained=True)
    with pytest.raises(errors.UnknownModelError, match=r"clever-resnet18\.in22k"):
        timm.create_model("clever_resnet18.in22k")


def test_timm_adds_a_fresh_classifier(pixels) -> None:
    model = timm.create_model("clever_resnet18", pretrained=True, num_classes=10, drop_rate=0.25)
    assert model.drop_rate == 0.25
    model.eval()
    with torch.no_grad():
        assert model(pixels).shape == (len(pixels), 10)
        model.reset_classifier(0)
        assert torch.equal(model(pixels), full(clever_zoo.from_pretrained(NAME), pixels))


def test_timm_adapts_the_channels(pixels) -> None:
    model = timm.create_model("clever_resnet18", pretrained=True, in_chans=1).eval()
    three = clever_zoo.from_pretrained(NAME).backbone.conv1.weight
    # timm adds up what is stored, in float16.
    torch.testing.assert_close(model.conv1.weight, three.sum(1, keepdim=True), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert model(pixels[:, :1]).shape == (len(pixels), 512)


def test_timm_returns_the_maps_of_each_stage(pixels) -> None:
    model = timm.create_model("clever_resnet18", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        maps = model(pixels)
        ours = clever_zoo.from_pretrained(NAME).features(pixels, last=5)
    assert model.feature_info.channels() == [64, 64, 128, 256, 512]
    assert all(torch.equal(a, b) for a, b in zip(ours, maps, strict=True))
    wide = {"img_size": 224, "patch_size": 16}  # over those of the released weights
    tokens = timm.create_model("clever_vit_tiny", features_only=True, out_indices=(3, 11), **wide)
    assert [m.shape for m in tokens(torch.zeros(1, 3, 224, 224))] == [(1, 192, 14, 14)] * 2


def test_timm_takes_weights_of_the_users(pixels, tmp_path: Path) -> None:
    own = clever_zoo.create_encoder("resnet18").eval()
    own.save_pretrained(tmp_path)
    file = str(tmp_path / "model.safetensors")
    for options in (
        {"pretrained_cfg_overlay": {"file": file}},
        {"pretrained_cfg_overlay": {"state_dict": own.backbone.state_dict()}},
        {"pretrained_cfg": {"file": file, "num_classes": 0}},
    ):
        model = timm.create_model("clever_resnet18", pretrained=True, **options).eval()
        with torch.no_grad():
            assert torch.equal(model(pixels), full(own, pixels))
    described = timm.get_pretrained_cfg("clever_resnet18").to_dict()  # as timm's scripts pass it
    model = timm.create_model("clever_resnet18", pretrained=True, pretrained_cfg=described).eval()
    with torch.no_grad():
        assert torch.equal(model(pixels), full(clever_zoo.from_pretrained(NAME), pixels))


def test_timm_by_name_verifies_the_weights(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / NAME
    shutil.copytree(ROOT / "model_cards" / NAME, folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(locate, "_MODEL_FOLDERS", (tmp_path,))
    with pytest.raises(errors.IntegrityError, match=r"sha256 .*, expected"):
        timm.create_model("clever_resnet18", pretrained=True)


def test_torch_hub_lists_and_explains_one_entry_per_backbone(tmp_path: Path, monkeypatch) -> None:
    """By the name of a repository, as torch.hub leaves it in its folder."""
    (tmp_path / "owner_clever-zoo_main").symlink_to(ROOT)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    repository = {"github": "owner/clever-zoo:main", "trust_repo": True}
    entries = torch.hub.list(**repository)
    assert sorted(entries) == sorted(f"clever_{backbone}" for backbone in BACKBONES)
    for backbone in BACKBONES:
        text = torch.hub.help(**repository, model=f"clever_{backbone}")
        spec = clever_zoo.create_encoder(backbone).spec
        assert f"{spec.feature_dim} features cut at {spec.invariant_dim}" in text
        named = {name for name in RELEASED if f"`{name}`" in text}
        assert named == set(clever_zoo.list_models(backbone=backbone))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_torch_hub_builds_every_backbone(backbone: str) -> None:
    entry = f"clever_{backbone}"
    fresh = torch.hub.load(str(ROOT), entry, source="local", pretrained=False, invariant_dim=7)
    assert (fresh.spec.backbone, fresh.spec.invariant_dim) == (backbone, 7)
    if not clever_zoo.list_models(backbone=backbone):
        with pytest.raises(errors.UnknownModelError, match=r"recipes/clever-.*\.fmnist\.toml"):
            torch.hub.load(str(ROOT), entry, source="local")
