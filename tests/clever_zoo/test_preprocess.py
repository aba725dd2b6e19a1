"""Preprocessing against timm, and every way an image can come in."""

import io
import json
import pickle
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence, features

from clever_zoo.encoder import create_encoder, create_transform
from clever_zoo.errors import ImageError
from clever_zoo.preprocess import (
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    crop_pixels,
    decode_image,
    image_pixels,
    load_image,
    normalize_pixels,
    pixel_batches,
)
from clever_zoo.spec import ModelSpec, PreprocessSpec

ORIENTATION = 0x0112


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def spec(size: int, crop_pct: float) -> ModelSpec:
    return ModelSpec(
        name="t",
        backbone="resnet18",
        invariant_dim=409,
        preprocess=PreprocessSpec(input_size_px=size, crop_pct=crop_pct),
    )


def timm_transform(model: ModelSpec):
    config = model.to_config()["pretrained_cfg"]
    config = timm.data.resolve_data_config(pretrained_cfg=config)
    return timm.data.create_transform(**config)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(2, 300),
    height=st.integers(2, 300),
    size_and_crop=st.sampled_from([(32, 1.0), (224, 0.875), (96, 0.9), (33, 0.95)]),
    seed=st.integers(0, 5),
)
def test_equals_timms_evaluation_transform(width, height, size_and_crop, seed) -> None:
    model = spec(*size_and_crop)
    image = picture(width, height, seed)
    ours = create_transform(model)(image)
    theirs = timm_transform(model)(image)
    assert ours.shape == theirs.shape
    # One step of a byte, on the normalised scale.
    assert float((ours - theirs).abs().max()) <= 1.01 / 255 / min(model.preprocess.std)


def test_noise_equals_timm_too(rng) -> None:
    """Noise at large sizes, where antialiasing matters most."""
    image = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
    model = spec(224, 0.875)
    gap = (create_transform(model)(image) - timm_transform(model)(image)).abs().max()
    assert float(gap) <= 1.01 / 255 / min(model.preprocess.std)


def test_normalization_formula(rng) -> None:
    pixels = rng.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    result = normalize_pixels(pixels, PreprocessSpec())
    assert result.shape == (2, 3, 4, 5)
    assert result.dtype == np.float32
    mean, std = PreprocessSpec().mean[1], PreprocessSpec().std[1]
    expected = (pixels[1, 2, 3, 1] / 255 - mean) / std
    assert result[1, 1, 2, 3] == pytest.approx(expected, abs=1e-6)


def test_a_very_long_image_is_cheap() -> None:
    assert crop_pixels(picture(2, 20_000), 256, 224).shape == (224, 224, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = picture(40, 24)
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}
    methods = [Image.Transpose(m) for m in undo.get(orientation, [])]
    stored = upright
    for method in methods:
        stored = stored.transpose(method)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "x.png")), np.asarray(upright))


@pytest.mark.parametrize(("tag", "kind"), [(0x011A, 7), (0x0132, 11), (0x0100, 1)])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_orientation_is_applied_beside_exif_that_is_malformed(tag: int, kind: int) -> None:
    """Pillow cannot write such a tag again: a resolution of bytes, a date that is a float."""
    entries = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
    entries += struct.pack("<HHI4s", tag, kind, 1, b"abcd")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    file = io.BytesIO()
    picture(40, 24).save(file, "jpeg", exif=exif)
    assert decode_image(file.getvalue(), "x").size == (24, 40)


def test_suffixes_and_formats_are_the_same() -> None:
    suffixes = Image.registered_extensions()
    assert {suffixes[suffix] for suffix in IMAGE_SUFFIXES} == set(IMAGE_FORMATS)
    for suffix in IMAGE_SUFFIXES:
        file = io.BytesIO()
        picture(40, 24).save(file, suffixes[suffix])
        assert decode_image(file.getvalue(), "x").size == (40, 24)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "JPEG2000"])
def test_other_formats_are_not_opened(tmp_path: Path, kind: str) -> None:
    """Ghostscript would run an EPS file; an ICO file is decoded when it is opened."""
    path = tmp_path / "picture.jpg"
    picture(32, 32).save(path, kind)
    with pytest.raises(ImageError, match="it is no valid BMP, GIF, JPEG"):
        load_image(path)


def test_pictures_of_phones_are_opened(tmp_path: Path) -> None:
    """JPEG files with a second picture behind the first, which Pillow calls MPO."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    others = [picture(40, 24, 1)]
    picture(40, 24).save(
        tmp_path / "x.jpg", "MPO", save_all=True, append_images=others, exif=exif, quality=95
    )
    with Image.open(tmp_path / "x.jpg") as opened:
        assert opened.format == "MPO"
        expected = ImageOps.exif_transpose(opened)
    assert np.array_equal(np.asarray(load_image(tmp_path / "x.jpg")), np.asarray(expected))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_whatever_a_decoder_raises_is_an_image_error() -> None:
    file = io.BytesIO()
    picture(64, 64).save(file, "avif")
    content = file.getvalue()
    start = content.index(b"mdat") + 4
    damaged = Image.open(io.BytesIO(content[:start] + b"\xff" * (len(content) - start)))
    with pytest.raises(ImageError, match=r"image 2 .*Failed to decode") as caught:
        load_image(damaged, 2)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_modes_become_rgb_on_white() -> None:
    base = picture(20, 20)
    alpha = Image.new("L", base.size, 0)
    alpha.paste(255, (0, 0, 10, 20))
    transparent = base.copy()
    transparent.putalpha(alpha)
    result = np.asarray(load_image(transparent))
    assert np.array_equal(result[:, :10], np.asarray(base)[:, :10])
    assert (result[:, 10:] == 255).all()
    gray = base.convert("L")
    gray_alpha = gray.copy()
    gray_alpha.putalpha(alpha)
    assert gray_alpha.mode == "LA"
    assert (np.asarray(load_image(gray_alpha))[:, 10:] == 255).all()
    assert np.array_equal(np.asarray(load_image(gray))[..., 0], np.asarray(gray))
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([10, 20, 30, 200, 100, 0])
    assert np.asarray(load_image(palette))[0, 0].tolist() == [200, 100, 0]
    palette.info["transparency"] = 1
    assert np.asarray(load_image(palette))[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(
        np.asarray(load_image(base.convert("CMYK"))),
        np.asarray(base.convert("CMYK").convert("RGB")),
    )
    assert np.asarray(load_image(Image.new("1", (4, 4), 1))).min() == 255
    assert load_image(base.convert("HSV")).mode == "RGB"


def test_sixteen_bit_gray_is_divided_by_257(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65535, 300, 65406]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    expected = np.rint(values / 257)
    assert np.array_equal(np.asarray(load_image(tmp_path / "x.png"))[..., 2], expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=f"mode {mode} has no fixed range"):
        load_image(Image.new(mode, (4, 4)))


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    return start + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"


def bad_files(folder: Path) -> dict[str, str]:
    """Name -> part of the reason."""
    (folder / "text.jpg").write_text("no picture at all")
    (folder / "empty.png").write_bytes(b"")
    picture(1, 1).save(folder / "one.png")
    (folder / "bomb.png").write_bytes(png_header(30_000, 30_000))
    picture(60, 60).save(folder / "whole.jpg")
    (folder / "torn.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:400])
    (folder / "whole.jpg").unlink()
    (folder / "no-data.png").write_bytes(png_header(20, 20))
    return {
        "text.jpg": "cannot be read",
        "empty.png": "cannot be read",
        "one.png": "1x1 pixels",
        "bomb.png": "decompression bomb",
        "torn.jpg": "cannot be",
        "no-data.png": "cannot be",
        "missing.png": "no such file",
    }


def test_bad_files_are_image_errors_with_source_and_index(tmp_path: Path) -> None:
    for name, reason in bad_files(tmp_path).items():
        good = picture(8, 8)
        with pytest.raises(ImageError, match=f"(?s)image 1 .*{name}.*{reason}") as caught:
            list(pixel_batches([good, tmp_path / name], PreprocessSpec(), 2))
        assert (caught.value.source, caught.value.index) == (str(tmp_path / name), 1)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3), dtype=np.float32),
        np.zeros((8, 8), dtype=np.uint8),
        np.zeros((8, 8, 4), dtype=np.uint8),
        np.zeros((3, 8, 8), dtype=np.uint8),
        np.zeros((0, 8, 3), dtype=np.uint8),
        np.zeros((1, 1, 3), dtype=np.uint8),
        b"bytes",
        None,
    ],
)
def test_bad_arrays_and_types(array) -> None:
    with pytest.raises(ImageError, match="image 3 "):
        load_image(array, 3)


def test_one_image_instead_of_a_list_is_explained(tmp_path: Path) -> None:
    for single in ("a.png", tmp_path, picture(4, 4)):
        with pytest.raises(ImageError, match=r"pass \[image\]"):
            list(pixel_batches(single, PreprocessSpec(), 2))


def test_an_embedding_depends_on_the_picture_alone(tmp_path: Path) -> None:
    """Path, str, PIL and array, alone and in batches of any size: 1e-5 of the row's norm."""
    torch.manual_seed(0)
    encoder = create_encoder("resnet18").eval()
    images = [picture(50 + i, 40, i) for i in range(7)]
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    ways = [images, paths, map(str, paths), [np.asarray(i) for i in images]]
    results = [encoder.embed(w, batch_size=n).full for w, n in zip(ways, (7, 3, 1, 2), strict=True)]
    norms = np.linalg.norm(results[0], axis=1, keepdims=True)
    for other in results[1:]:
        assert (np.abs(other - results[0]) <= 1e-5 * norms).all()
    with torch.no_grad():
        direct = encoder(encoder.preprocess(images)).full.numpy()
    assert (np.abs(direct - results[0]) <= 1e-5 * norms).all()


def buffer_filled_anew() -> Iterator[np.ndarray]:
    buffer = np.zeros((32, 32, 3), dtype=np.uint8)
    for value in range(8):
        buffer[:] = 30 * value
        yield buffer


def frames() -> Iterator[Image.Image]:
    """One PIL image that is read on."""
    first, *others = (Image.new("RGB", (32, 32), (30 * value,) * 3) for value in range(8))
    file = io.BytesIO()
    first.save(file, "gif", save_all=True, append_images=others)
    return ImageSequence.Iterator(Image.open(file))


@pytest.mark.parametrize("images", [buffer_filled_anew, frames])
def test_images_that_change_once_the_next_is_read(images) -> None:
    (pixels,) = pixel_batches(images(), PreprocessSpec(input_size_px=32), 8, threads=4)
    np.testing.assert_allclose(pixels[:, 9, 9, 0], 30 * np.arange(8), atol=1)


def test_one_unread_image_many_times() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "jpeg")
    p = PreprocessSpec(input_size_px=32)
    expected = image_pixels(Image.open(file), p)
    for _ in range(5):
        (pixels,) = pixel_batches([Image.open(file)] * 6, p, 6, threads=6)
        assert (pixels == expected).all()


def test_the_first_bad_image_is_raised_in_its_turn(tmp_path: Path) -> None:
    good, bad = picture(8, 8), np.zeros((8, 8), dtype=np.uint8)
    batches = pixel_batches([good, good, tmp_path / "no.png", bad], PreprocessSpec(), 2, threads=2)
    assert len(next(batches)) == 2
    with pytest.raises(ImageError, match=r"image 2 .*no\.png"):
        next(batches)


def test_training_transform_varies_and_keeps_the_shape() -> None:
    transform = create_transform(spec(32, 1.0), training=True)
    first, second = transform(picture(60, 50).convert("L")), transform(picture(60, 50).convert("L"))
    assert first.shape == (3, 32, 32)
    assert not torch.equal(first, second)


def test_transforms_can_be_pickled() -> None:
    for training in (False, True):
        transform = pickle.loads(pickle.dumps(create_transform(spec(32, 1.0), training=training)))  # noqa: S301
        assert transform(picture(40, 40)).shape == (3, 32, 32)


def test_config_carries_the_transform() -> None:
    config = json.loads(json.dumps(spec(32, 0.9).to_config()))
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert spec(32, 0.9).preprocess.resize_px == 35
