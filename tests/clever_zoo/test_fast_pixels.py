"""The fast decoder against the Pillow one, pixel by pixel, and what it leaves to Pillow."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from bench.timing import photograph
from clever_zoo import fast_pixels
from clever_zoo.bulk import embed_files
from clever_zoo.encoder import create_encoder
from clever_zoo.errors import ImageError
from clever_zoo.fast_pixels import fast_image_pixels
from clever_zoo.preprocess import image_pixels, load_image, pixel_loader
from clever_zoo.spec import PreprocessSpec
from tests.clever_zoo.test_preprocess import ORIENTATION, picture

SPECS = (PreprocessSpec(), PreprocessSpec(input_size_px=32, crop_pct=1.0))


def gap(path: Path, spec: PreprocessSpec) -> NDArray[np.int64]:
    ours, pillows = fast_image_pixels(path, spec), image_pixels(path, spec)
    assert ours.dtype == np.uint8
    assert ours.shape == pillows.shape
    assert ours.flags.c_contiguous
    return np.abs(ours.astype(int) - pillows)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(2, 700),
    height=st.integers(2, 700),
    quality=st.sampled_from([30, 75, 95]),
    spec=st.sampled_from(SPECS),
    noise=st.booleans(),
)
def test_pixels_are_those_of_pillow(tmp_path_factory, width, height, quality, spec, noise) -> None:
    path = tmp_path_factory.getbasetemp() / "picture.jpg"
    image = picture(width, height)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
    image.save(path, quality=quality)
    assert gap(path, spec).max() <= 2


def test_photographs_are_within_one_step(tmp_path) -> None:
    for i in range(4):
        photograph(i, 500).crop((0, 60, 500, 435)).save(tmp_path / "a.jpg", quality=90)
        apart = gap(tmp_path / "a.jpg", SPECS[0])
        assert apart.max() <= 1
        assert apart.mean() < 0.01


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpegs_are_turned_upright(tmp_path, orientation) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture(61, 40).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert gap(tmp_path / "a.jpg", SPECS[0]).max() <= 2


@pytest.mark.parametrize(
    ("name", "mode"), [("a.jpg", "L"), ("a.jpg", "CMYK"), ("a.png", "RGBA"), ("a.gif", "P")]
)
def test_other_modes_and_formats(tmp_path, name, mode) -> None:
    picture(61, 40).convert(mode).save(tmp_path / name)
    assert gap(tmp_path / name, SPECS[0]).max() <= 2


def test_arrays_and_very_long_images() -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = image_pixels(array, SPECS[0]).astype(int)
    assert np.abs(fast_image_pixels(array, SPECS[0]) - expected).max() <= 2
    long = np.zeros((2, 4000, 3), dtype=np.uint8)  # whole it would be 512,000 pixels long
    np.testing.assert_array_equal(fast_image_pixels(long, SPECS[0]), image_pixels(long, SPECS[0]))


def test_jpegs_really_take_the_fast_way(tmp_path, monkeypatch) -> None:
    picture(61, 40).save(tmp_path / "a.jpg")
    expected = fast_image_pixels(tmp_path / "a.jpg", SPECS[0])
    monkeypatch.setattr(fast_pixels, "load_image", None)
    np.testing.assert_array_equal(fast_image_pixels(str(tmp_path / "a.jpg"), SPECS[0]), expected)


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "bomb", "one pixel", "icon"])
def test_bad_files_fail_as_with_pillow(tmp_path, kind, monkeypatch) -> None:
    path = tmp_path / "a.jpg"
    if kind == "text":
        path.write_text("not an image")
    elif kind != "missing":
        picture(200, 150).resize((1, 1) if kind == "one pixel" else (200, 150)).save(path)
    if kind == "icon":
        picture(32, 32).save(path, "ico")
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-600])
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError) as expected:
        load_image(path, 3)
    with pytest.raises(ImageError) as actual:
        fast_image_pixels(path, SPECS[0], 3)
    assert str(actual.value) == str(expected.value)


def test_bulk_says_which_decoder_it_used(tmp_path) -> None:
    for i in range(3):
        picture(90, 60, i).save(tmp_path / f"{i}.jpg")
    (tmp_path / "x.jpg").write_text("broken")
    paths, encoder = sorted(tmp_path.glob("*.jpg")), create_encoder("resnet18").eval()
    tables = {}
    for decoder in ("pillow", "fast"):
        out = tmp_path / f"{decoder}.parquet"
        report = embed_files(paths, encoder, out, decoder=decoder)
        assert (report.written, report.unreadable) == (3, 1)
        tables[decoder] = pq.read_table(out)
        assert tables[decoder].schema.metadata[b"decoder"].decode() == decoder
    for half in ("invariant", "equivariant"):
        a, b = (np.array(table[half].to_pylist()) for table in tables.values())
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() > 0.999


def test_the_default_needs_no_torch() -> None:
    assert pixel_loader("pillow") is image_pixels
    assert pixel_loader("fast") is fast_image_pixels
