"""Encoders: building, splitting, saving, loading, and what is refused."""

import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import clever_zoo
from clever_zoo import errors, locate
from clever_zoo.backbones import BACKBONES
from clever_zoo.embedding import Embedding, split_features
from clever_zoo.encoder import Encoder
from clever_zoo.samples import sample_paths
from clever_zoo.sources import HubSource, LocalSource, ReleasedSource, parse_source
from clever_zoo.spec import ModelSpec, PreprocessSpec, WeightFile

WIDTHS = {
    "resnet18": (409, 103, 11_176_512),
    "resnet50": (1638, 410, 23_508_032),
    "vit_tiny": (153, 39, 5_524_416),
    "vit_small": (307, 77, 21_665_664),
    "vmamba_tiny": (614, 154, 29_480_064),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_widths_and_parameter_counts(name: str) -> None:
    encoder = clever_zoo.create_encoder(name).eval()
    invariant, equivariant, parameters = WIDTHS[name]
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    with torch.no_grad():
        embedding = encoder(torch.randn(2, 3, 224, 224))
    assert embedding.invariant.shape == (2, invariant)
    assert embedding.equivariant.shape == (2, equivariant)
    assert embedding.full.shape == (2, encoder.spec.feature_dim)


def test_resnets_start_as_the_reference_does() -> None:
    encoder = clever_zoo.create_encoder("resnet18")
    assert (encoder.backbone.layer1[0].bn2.weight == 1).all()


def test_embedding_properties(rng) -> None:
    arrays = Embedding(rng.normal(size=(4, 5)).astype("f4"), rng.normal(size=(4, 3)).astype("f4"))
    tensors = Embedding(*(torch.from_numpy(half) for half in arrays))
    assert arrays.full.shape == (4, 8)
    assert np.array_equal(arrays.full[:, :5], arrays.invariant)
    assert torch.equal(tensors.full, torch.from_numpy(arrays.full))
    for half in (*arrays.normalized(), *(t.numpy() for t in tensors.normalized())):
        assert np.linalg.norm(half, axis=1) == pytest.approx(np.ones(4), rel=1e-6)
    zero = Embedding(np.zeros((2, 3), "f4"), np.zeros((2, 0), "f4")).normalized()
    assert not zero.invariant.any()
    assert zero.full.shape == (2, 3)


@pytest.mark.parametrize("cut", [0, 9, -1])
def test_impossible_splits(cut: int) -> None:
    with pytest.raises(errors.ShapeError, match=r"1\.\.8"):
        split_features(np.zeros((2, 8)), cut)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(2, 1, 32, 32),
        torch.zeros(3, 32, 32),
        torch.zeros(2, 32, 32, 3),
        torch.zeros(2, 3, 0, 32),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    ],
)
def test_wrong_pixels_are_shape_errors(pixels: torch.Tensor) -> None:
    with pytest.raises(errors.ShapeError, match="pixels"):
        clever_zoo.create_encoder("resnet18")(pixels)


def test_an_encoder_without_a_split_has_an_empty_half() -> None:
    encoder = clever_zoo.create_encoder("resnet18", invariant_dim=512)
    embedding = encoder.embed([np.zeros((8, 8, 3), np.uint8)])
    assert embedding.equivariant.shape == (1, 0)


def test_embedding_leaves_mode_and_statistics_alone() -> None:
    encoder = clever_zoo.create_encoder("resnet18").train()
    encoder.backbone.bn1.eval()
    before = encoder.backbone.layer1[0].bn1.running_mean.clone()
    progress: list[int] = []
    images = [np.full((9, 9, 3), i, np.uint8) for i in range(5)]
    embedding = encoder.embed(images, batch_size=2, on_progress=progress.append)
    assert progress == [2, 4, 5]
    assert embedding.invariant.dtype == np.float32
    assert torch.equal(encoder.backbone.layer1[0].bn1.running_mean, before)
    assert encoder.training
    assert encoder.backbone.layer1.training
    assert not encoder.backbone.bn1.training
    assert encoder.embed([]).invariant.shape == (0, 409)
    assert encoder.preprocess([]).shape == (0, 3, 224, 224)


def test_forward_is_differentiable() -> None:
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    encoder(torch.randn(2, 3, 32, 32)).equivariant.sum().backward()
    assert encoder.backbone.patch_embed.proj.weight.grad is not None


def test_vit_features_are_normed_tokens_class_token_first() -> None:
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8).eval()
    pixels = torch.randn(2, 3, 32, 32)
    (tokens,) = encoder.features(pixels)
    assert tokens.shape == (2, 17, 192)
    assert torch.equal(tokens[:, 0], encoder(pixels).full)
    older, newest = encoder.features(pixels, last=2)
    assert torch.equal(newest, tokens)
    raw: list[torch.Tensor] = []
    handle = encoder.backbone.blocks[-2].register_forward_hook(lambda *call: raw.append(call[2]))
    encoder(pixels)
    handle.remove()
    torch.testing.assert_close(older, encoder.backbone.norm(raw[0]))
    assert encoder.features(torch.randn(1, 3, 48, 64))[0].shape == (1, 1 + 6 * 8, 192)


def test_resnet_features_are_the_maps_of_the_last_stages() -> None:
    encoder = clever_zoo.create_encoder("resnet18").eval()
    pixels = torch.randn(2, 3, 64, 96)
    older, newest = encoder.features(pixels, last=2)
    assert older.shape == (2, 256, 4, 6)
    torch.testing.assert_close(newest.mean((2, 3)), encoder(pixels).full)
    assert encoder.features(pixels, last=5)[0].shape == (2, 64, 32, 48)
    newest.sum().backward()
    assert encoder.backbone.conv1.weight.grad is not None


@pytest.mark.parametrize(("backbone", "last"), [("resnet18", 6), ("vit_tiny", 13), ("vit_tiny", 0)])
def test_features_refuse_what_is_not_there(backbone: str, last: int) -> None:
    encoder = clever_zoo.create_encoder(backbone)
    with pytest.raises(errors.ShapeError, match=rf"last is {last}; .* use 1\.\."):
        encoder.features(torch.zeros(1, 3, 32, 32), last=last)
    with pytest.raises(errors.ShapeError, match="pixels"):
        encoder.features(torch.zeros(1, 1, 32, 32))


def test_features_refuse_sides_that_patches_do_not_divide() -> None:
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    with pytest.raises(errors.ShapeError, match=r"32x36.*8x8"):
        encoder.features(torch.zeros(1, 3, 32, 36))


def randomized(encoder: Encoder) -> Encoder:
    """Running statistics that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(0)
    for name, buffer in encoder.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
    return encoder.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved ResNet (float16 storage) and a saved ViT with its own position grid."""
    base = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    resnet = clever_zoo.create_encoder("resnet18")
    vit = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=4)
    randomized(resnet).save_pretrained(base / "resnet", dtype="float16")
    randomized(vit).save_pretrained(base / "vit")
    return {"resnet": base / "resnet", "vit": base / "vit"}


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_saving_again_gives_the_same_bytes(folders, kind: str, tmp_path: Path) -> None:
    storage = "float16" if kind == "resnet" else "float32"
    encoder = clever_zoo.from_pretrained(f"local-dir:{folders[kind]}")
    assert not encoder.training
    encoder.save_pretrained(tmp_path, dtype=storage)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folders[kind] / name).read_bytes()


def test_float16_storage_keeps_norms_exact(folders) -> None:
    stored = load_file(folders["resnet"] / "model.safetensors")
    types = {key: value.dtype for key, value in stored.items()}
    assert types["conv1.weight"] == torch.float16
    assert types["bn1.weight"] == types["bn1.running_var"] == torch.float32
    assert types["bn1.num_batches_tracked"] == torch.int64
    encoder = clever_zoo.from_pretrained(folders["resnet"])
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def damaged(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def test_damaged_weights_are_integrity_errors(folders, tmp_path: Path) -> None:
    path = damaged(folders["vit"], tmp_path / "m") / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(
        errors.IntegrityError, match=rf"{len(whole) - 7} bytes, expected {len(whole)}"
    ):
        clever_zoo.from_pretrained(path.parent)
    flipped = bytearray(whole)
    flipped[-1000] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(errors.IntegrityError, match=r"sha256 .*, expected") as caught:
        clever_zoo.from_pretrained(path.parent)
    assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(errors.IntegrityError, match="is missing"):
        clever_zoo.from_pretrained(path.parent)


def with_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weights, digest included, so that only the tensors are wrong."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    describe(folder)


def describe(folder: Path) -> None:
    """Put the digest of the weights file into the config."""
    config = json.loads((folder / "config.json").read_text())
    described = WeightFile.of((folder / "model.safetensors").read_bytes())
    config["clever"]["weights"] = described.model_dump()
    (folder / "config.json").write_text(json.dumps(config))


def test_wrong_tensors_are_listed(folders, tmp_path: Path) -> None:
    folder = damaged(folders["vit"], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.bias"]
    tensors["head.weight"] = torch.zeros(1)
    tensors["cls_token"] = torch.zeros(1, 1, 7)
    with_tensors(folder, tensors)
    with pytest.raises(errors.WeightsMismatchError) as caught:
        clever_zoo.from_pretrained(folder)
    for line in ("missing: norm.bias", "unexpected: head.weight",
                 "wrong shape: cls_token is (1, 1, 7), expected (1, 1, 192)"):  # fmt: skip
        assert line in str(caught.value)


def test_a_mismatch_names_some_of_each_kind_and_keeps_all() -> None:
    missing, unexpected = [f"m{i}" for i in range(30)], ["u"]
    error = errors.WeightsMismatchError("x", missing, unexpected, ["wrong shape: w"])
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    for found in (error, again):
        assert str(found).count("missing: m") == 10
        for line in ("missing: 20 more", "unexpected: u", "wrong shape: w"):
            assert f"  - {line}" in str(found)
        assert (found.missing, found.unexpected) == (tuple(missing), ("u",))


def edited(folder: Path, target: Path, edit) -> Path:
    folder = damaged(folder, target)
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("edit", "hint"),
    [
        (lambda c: c["clever"].update(ratio=0.8), "ratio: unknown key"),
        (lambda c: c["clever"].pop("invariant_dim"), "invariant_dim: missing"),
        (lambda c: c["clever"].update(invariant_dim=500), "500, but vit_tiny has 192"),
        (lambda c: c["clever"].update(backbone="alexnet"), "alexnet"),
        (lambda c: c["clever"].pop("preprocess"), "preprocess: missing"),
        (lambda c: c["clever"]["preprocess"].pop("mean"), "preprocess.mean: missing"),
        (lambda c: c["clever"]["preprocess"].update(std=[0, 1, 1]), "preprocess.std"),
        (lambda c: c["clever"].update(invariant_dim="153"), "invariant_dim: .*integer"),
        (lambda c: c["clever"].update(invariant_dim=True), "invariant_dim: .*integer"),
        (lambda c: c["clever"]["model_args"].update(pretrained=True), "model_args.pretrained"),
        (lambda c: c["clever"]["model_args"].update(checkpoint_path="/x"), "checkpoint_path"),
        (lambda c: c["clever"].update(schema_version=9), "schema_version is 9"),
        (lambda c: c["clever"]["weights"].update(sha256="x"), "weights.sha256"),
        (lambda c: c["clever"]["weights"].update(filename="../x.safetensors"), "weights.filename"),
        (lambda c: c["clever"].update(weights=None), "records no weights"),
        (lambda c: c.pop("clever"), "no 'clever' section"),
    ],
)
def test_bad_specs_name_file_and_field(folders, tmp_path: Path, edit, hint: str) -> None:
    folder = edited(folders["vit"], tmp_path / "m", edit)
    with pytest.raises(errors.SpecError, match=hint) as caught:
        clever_zoo.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_foreign_keys_outside_our_section_are_fine(folders, tmp_path: Path) -> None:
    folder = edited(folders["vit"], tmp_path / "m", lambda c: c.update(transformers_version="9"))
    assert clever_zoo.from_pretrained(folder).spec.backbone == "vit_tiny"


def test_config_says_outside_what_the_spec_says_inside() -> None:
    for name in BACKBONES:
        encoder = clever_zoo.create_encoder(name)
        spec, model = encoder.spec, encoder.backbone
        config = spec.to_config()
        assert ModelSpec.from_config(config, "test") == spec
        assert config["num_features"] == spec.feature_dim == model.num_features
        theirs = model.pretrained_cfg
        for key in ("first_conv", "classifier", "interpolation"):
            assert key == "interpolation" or config["pretrained_cfg"][key] == theirs[key]
        pool = getattr(model.global_pool, "pool_type", model.global_pool)
        assert pool == config["global_pool"]
        assert "num_classes" not in config.get("model_args", {})


def test_unreadable_config(tmp_path: Path) -> None:
    with pytest.raises(errors.SpecError, match="does not exist"):
        clever_zoo.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.SpecError, match="not valid JSON"):
        clever_zoo.from_pretrained(tmp_path)
    with pytest.raises(errors.SourceError, match="is no folder"):
        clever_zoo.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize(
    ("source", "revision", "expected"),
    [
        ("clever-resnet18", None, ReleasedSource("clever-resnet18")),
        ("clever-resnet18.fmnist", None, ReleasedSource("clever-resnet18.fmnist")),
        ("org/repo", None, HubSource("org/repo", None)),
        ("org/repo", "v1", HubSource("org/repo", "v1")),
        ("hf-hub:org/repo@main", None, HubSource("org/repo", "main")),
        ("hf-hub:org/repo@main", "main", HubSource("org/repo", "main")),
        ("local-dir:a/b", None, LocalSource(Path("a/b"))),
        ("local-dir:C:\\models", None, LocalSource(Path("C:\\models"))),
        (Path("org/repo"), None, LocalSource(Path("org/repo"))),
    ],
)
def test_sources(source, revision, expected) -> None:
    assert parse_source(source, revision) == expected


@pytest.mark.parametrize(
    "source",
    ["", "./model", "../model", "/abs/model", "a/b/c", "C:\\models\\x", "\\\\host\\share", "org/",
     "/repo", "hf-hub:repo", "hf-hub:org/repo@", "hf-hub:", "local-dir:", "s3://bucket/x",
     "https://host/x", "org/repo?x=1", "org/repo#frag", "two words", "name@v1"],
)  # fmt: skip
def test_malformed_sources_say_what_to_write(source: str) -> None:
    with pytest.raises(errors.SourceError, match=r"local-dir:|hf-hub:"):
        parse_source(source)


def test_two_readings_are_both_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "org/repo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.SourceError, match=r"'local-dir:org/repo' .*'hf-hub:org/repo'"):
        parse_source("org/repo")


@pytest.mark.parametrize(
    ("source", "revision"),
    [("clever-resnet18", "v1"), ("local-dir:x", "v1"), ("hf-hub:org/repo@a", "b")],
)
def test_revisions_that_make_no_sense(source: str, revision: str) -> None:
    with pytest.raises(errors.SourceError, match="revision"):
        parse_source(source, revision)


def test_names_without_weights_name_their_recipe() -> None:
    for name in ("dino-resnet50", "dino-vit-tiny.fmnist", "clever-vit-tiny.fmnist_plus"):
        with pytest.raises(errors.UnknownModelError) as caught:
            clever_zoo.from_pretrained(name)
        recipe = name if "." in name else f"{name}.fmnist"
        assert f"training/recipes/{recipe}.toml" in str(caught.value)
        assert (Path(__file__).parents[2] / f"training/recipes/{recipe}.toml").is_file()


def test_names_without_a_recipe_promise_none() -> None:
    for name in ("clever-resnet50.imagenet", "dino-vit-tiny.in1k-caug"):
        with pytest.raises(errors.UnknownModelError, match=f"no recipe '{name}' either"):
            clever_zoo.model_info(name)
    with pytest.raises(errors.UnknownModelError, match=r"recipes/clever-simsiam-resnet18\.fmnist"):
        clever_zoo.model_info("clever-simsiam-resnet18")
    with pytest.raises(errors.UnknownModelError, match="unknown model"):
        clever_zoo.model_info("x" * 300)


def test_an_encoder_in_half_precision_embeds() -> None:
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8).eval()
    expected = encoder.embed(sample_paths()[:2])
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        half = copy.deepcopy(encoder).to(dtype)
        assert half.precision == precision
        embedding = half.embed(sample_paths()[:2])
        assert embedding.full.dtype == np.float32
        error = np.abs(embedding.full - expected.full).max() / np.abs(expected.full).max()
        assert 0 < error < 0.05


def test_storage_types_are_not_guessed(tmp_path: Path) -> None:
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    for dtype in ("int8", "fp16", "bfloat16"):
        with pytest.raises(errors.SpecError, match=f"dtype is '{dtype}'; use 'float32' or"):
            encoder.save_pretrained(tmp_path, dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_norms_are_stored_in_float32_whatever_the_module_has(tmp_path: Path, dtype) -> None:
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8).to(dtype)
    encoder.save_pretrained(tmp_path, dtype="float16")
    assert load_file(tmp_path / "model.safetensors")["norm.weight"].dtype == torch.float32
    clever_zoo.from_pretrained(tmp_path)


def test_errors_survive_the_way_between_processes() -> None:
    error = errors.RecipeError("x.toml", ["epochs: too many", "seed: missing"])
    copied = copy.copy(error)
    assert (str(copied), copied.problems) == (str(error), error.problems)


def test_typos_get_close_matches(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(errors.UnknownModelError, match="did you mean 'clever-resnet18'"):
        clever_zoo.from_pretrained("clever-resent18")
    with pytest.raises(errors.UnknownModelError, match="did you mean 'resnet18'"):
        clever_zoo.create_encoder("resnet-18")
    (tmp_path / "mymodel").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.SourceError, match="'local-dir:mymodel'"):
        clever_zoo.from_pretrained("mymodel")


def test_hub_sources_read_the_cache_offline(folders, tmp_path: Path) -> None:
    """The layout that huggingface_hub writes, read by the real client with no request."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--org--vit"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    damaged_copy = repo / "snapshots"
    damaged_copy.mkdir()
    damaged(folders["vit"], damaged_copy / commit)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    with pytest.raises(errors.SourceError, match="no valid name"):
        clever_zoo.from_pretrained("org/a--b", **options)
    for source in ("org/vit", "hf-hub:org/vit@main", f"hf-hub:org/vit@{commit}"):
        assert clever_zoo.from_pretrained(source, **options).spec.backbone == "vit_tiny"
    with pytest.raises(errors.DownloadError, match=r"config.json of 'org/other'"):
        clever_zoo.from_pretrained("org/other", **options)


def test_bad_encoder_arguments() -> None:
    with pytest.raises(errors.SpecError, match="600, but resnet18 has 512"):
        clever_zoo.create_encoder("resnet18", invariant_dim=600)
    for backbone, arguments in (
        ("resnet18", {"foo": 1}),
        ("resnet18", {"num_classes": 10}),
        ("vit_tiny", {"dynamic_img_size": False}),
        ("vit_tiny", {"img_size": (32, 32)}),
        ("vit_tiny", {"img_size": 0}),
        ("vit_tiny", {"patch_size": 1.5}),
    ):
        key = next(iter(arguments)).replace("img_size", r"(img|input)_size")
        with pytest.raises(errors.SpecError, match=key):
            clever_zoo.create_encoder(backbone, **arguments)


def test_devices_that_cannot_be_used(folders) -> None:
    for name in ("warp-drive", "cuda:99"):
        with pytest.raises(errors.BackendMissingError, match=f"device '{name}' cannot be used"):
            clever_zoo.from_pretrained(folders["vit"], device=name)


def test_weights_that_are_no_safetensors(folders, tmp_path: Path) -> None:
    folder = damaged(folders["vit"], tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"something else entirely")
    describe(folder)
    with pytest.raises(errors.IntegrityError, match="no safetensors file"):
        clever_zoo.from_pretrained(folder)


def test_values_beyond_float16_are_not_saved(tmp_path: Path) -> None:
    encoder = clever_zoo.create_encoder("resnet18")
    with torch.no_grad():
        encoder.backbone.conv1.weight[0, 0, 0, 0] = 1e5
    with pytest.raises(errors.NonFiniteError, match=r"conv1\.weight .*float16"):
        encoder.save_pretrained(tmp_path, dtype="float16")
    assert not list(tmp_path.iterdir())
    encoder.save_pretrained(tmp_path)


def test_batch_size_zero_is_refused() -> None:
    with pytest.raises(errors.ShapeError, match="batch_size is 0"):
        clever_zoo.create_encoder("resnet18").embed([], batch_size=0)


def test_normalizing_a_zero_row_has_a_gradient() -> None:
    x = torch.zeros(1, 3, requires_grad=True)
    Embedding(x, x).normalized().invariant.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1e-4, 20.0])
def test_normalizing_half_precision_neither_overflows_nor_vanishes(value: float) -> None:
    length = 0.0 if value == 0 else 1.0
    for half in (
        np.full((2, 400), value, np.float16),
        torch.full((2, 400), value, dtype=torch.float16),
        torch.full((2, 400), value, dtype=torch.bfloat16),
    ):
        unit = Embedding(half, half).normalized().invariant
        assert unit.dtype == half.dtype
        assert float((unit[0] * 1.0 @ unit[0]) ** 0.5) == pytest.approx(length, abs=0.01)


def test_public_names_resolve() -> None:
    for name in clever_zoo.__all__:
        assert getattr(clever_zoo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        clever_zoo.nothing  # noqa: B018


def test_import_is_light(capsys) -> None:
    """Nothing heavy and no network library; the time is printed for people."""
    code = (
        "import sys, time; t = time.perf_counter(); import clever_zoo; clever_zoo.list_models(); "
        "heavy = {'torch', 'timm', 'torchvision', 'huggingface_hub', 'pyarrow', 'matplotlib'} "
        "& set(sys.modules); print(f'{time.perf_counter() - t:.2f} s', heavy or '')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with capsys.disabled():
        print(" [import clever_zoo, list_models:", run.stdout.strip(), end="] ")
    assert "{" not in run.stdout


def test_missing_torch_prints_the_pip_line() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import clever_zoo\n"
        "try: clever_zoo.from_pretrained('x')\n"
        "except clever_zoo.CleverZooError as e: print(type(e).__name__, e)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "BackendMissingError" in run.stdout
    assert 'pip install "clever-zoo[torch]"' in run.stdout


def test_a_source_logs_once_what_it_resolved_to(caplog) -> None:
    locate._log_resolution.cache_clear()
    with caplog.at_level(logging.INFO, logger="clever_zoo"):
        spec = clever_zoo.from_pretrained("clever-resnet18").spec
        clever_zoo.from_pretrained("clever-resnet18")
    lines = [r.getMessage() for r in caplog.records if "resolves to" in r.getMessage()]
    expected = f"clever-resnet18 resolves to {spec.name}, sha256 {spec.weights.sha256}"
    assert lines == [expected]


def test_image_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(errors.ImageError("a.png", 3, "bad")))  # noqa: S301
    assert (error.source, error.index, error.reason) == ("a.png", 3, "bad")


def test_every_error_has_the_root_and_a_builtin() -> None:
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and name.endswith("Error") and name != "CleverZooError":
            assert issubclass(kind, errors.CleverZooError)
            builtins = [base for base in kind.__mro__ if base.__module__ == "builtins"]
            assert builtins[0] not in (Exception, BaseException, object)


def test_preprocess_spec_is_strict() -> None:
    for bad in ({"crop_pct": 0}, {"input_size_px": 0}, {"mean": (1, 2)}, {"size": 3}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PreprocessSpec(**bad)
