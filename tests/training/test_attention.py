"""Attention maps and Grad-CAM against hand computations, and the pictures drawn of them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import clever_zoo
from clever_zoo.encoder import Encoder
from clever_zoo.errors import DataError, NonFiniteError, ShapeError
from clever_zoo.samples import sample_paths
from training.evaluate import attention
from training.evaluate.attention import (
    attention_matrix,
    attention_row,
    class_attention,
    grad_cam,
    grad_cam_row,
    legible_stage,
    look,
    picture_square,
    stretch,
    unfused_attention,
)


@pytest.fixture
def vit() -> Encoder:
    torch.manual_seed(0)
    return clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)


@pytest.fixture(scope="module")
def resnet() -> Encoder:
    return clever_zoo.from_pretrained("clever-resnet18")


@pytest.fixture(scope="module")
def paths() -> list[Path]:
    return sample_paths()[::100]


def fused(encoder: Encoder) -> list[bool]:
    return [block.attn.fused_attn for block in encoder.backbone.blocks]


def test_attention_rows_sum_to_one_and_match_q_and_k(vit: Encoder) -> None:
    pixels = torch.randn(2, 3, 16, 24)
    matrix = attention_matrix(vit, pixels)
    assert matrix.shape == (2, 3, 7, 7)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 3, 7))
    before: list[torch.Tensor] = []
    layer = vit.backbone.blocks[-1].attn
    handle = layer.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    vit.eval()(pixels)
    handle.remove()
    for head in range(3):
        q, k = (
            before[0] @ layer.qkv.weight[rows].T + layer.qkv.bias[rows]
            for rows in (slice(s + 64 * head, s + 64 * (head + 1)) for s in (0, 192))
        )
        expected = (q @ k.transpose(1, 2) / math.sqrt(64)).softmax(-1)
        torch.testing.assert_close(matrix[:, head], expected)
    maps = class_attention(vit, pixels)
    assert maps.shape == (2, 3, 2, 3)
    assert torch.equal(maps.flatten(2), matrix[:, :, 0, 1:])


def test_fused_attention_is_off_only_while_maps_are_read(vit: Encoder) -> None:
    vit.backbone.blocks[3].attn.fused_attn = False
    before = fused(vit)
    assert before.count(True) == 11
    with unfused_attention(vit.backbone):
        assert not any(fused(vit))
    assert fused(vit) == before
    attention_matrix(vit, torch.randn(1, 3, 16, 16))
    assert fused(vit) == before
    with pytest.raises(ShapeError, match="do not divide"):
        attention_matrix(vit, torch.randn(1, 3, 16, 17))
    assert fused(vit) == before
    assert not vit.backbone.blocks[-1].attn.attn_drop._forward_hooks
    assert vit.training


@pytest.mark.parametrize("part", ["full", "invariant", "equivariant"])
def test_grad_cam_of_the_norm_by_hand(resnet: Encoder, part) -> None:
    pixels = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    (last,) = resnet.features(pixels)
    kept = torch.zeros(512)
    kept[
        {"full": slice(0, 512), "invariant": slice(0, 409), "equivariant": slice(409, 512)}[part]
    ] = 1
    weights = 2 * last.mean((2, 3)) * kept / (3 * 2)
    expected = (weights[:, :, None, None] * last).sum(1).clamp(min=0)
    cam = grad_cam(resnet, pixels, part=part)
    assert cam.shape == (2, 3, 2)
    torch.testing.assert_close(cam, expected)
    assert all(p.grad is None for p in resnet.parameters())


def test_grad_cam_of_the_cosine_by_finite_differences(resnet: Encoder) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels, like = (torch.randn(1, 3, 64, 64, generator=generator) for _ in range(2))
    (last,) = resnet.features(pixels)
    last = last.detach().double()
    other = resnet(like).equivariant[0].detach().double()

    def cosine(maps: torch.Tensor) -> float:
        ours = maps.mean((2, 3))[0, 409:]
        return float(ours @ other / ours.norm() / other.norm())

    step = 1e-6
    slopes = torch.zeros(512, dtype=torch.double)
    for channel in range(512):
        moved = last.clone()
        moved[0, channel, 0, 0] += step
        slopes[channel] = (cosine(moved) - cosine(last)) / step
    expected = (slopes[:, None, None] * last[0]).sum(0).clamp(min=0)
    cam = grad_cam(resnet, pixels, part="equivariant", like=like)[0]
    torch.testing.assert_close(cam.double(), expected, rtol=1e-3, atol=1e-6)


def test_stages_are_counted_from_the_end(resnet: Encoder) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    assert [tuple(grad_cam(resnet, pixels, last=i).shape[1:]) for i in (1, 2, 3)] == [
        (1, 1), (2, 2), (4, 4)
    ]  # fmt: skip
    assert legible_stage(resnet, pixels) == 3
    assert legible_stage(resnet, torch.randn(1, 3, 224, 224)) == 1
    assert legible_stage(resnet, torch.randn(1, 3, 4, 4)) == 5


@pytest.mark.parametrize("part", ["full", "equivariant"])
def test_grad_cam_of_a_vmamba_by_hand(part) -> None:
    """The last map is normalised before it is pooled, and the map is of what is pooled."""
    torch.manual_seed(0)
    encoder = clever_zoo.create_encoder("vmamba_tiny").eval()
    pixels = torch.randn(2, 3, 64, 96)
    (last,) = encoder.features(pixels)
    kept = torch.zeros(768)
    kept[{"full": slice(0, 768), "equivariant": slice(614, 768)}[part]] = 1
    weights = 2 * last.mean((2, 3)) * kept / (2 * 3)
    expected = (weights[:, :, None, None] * last).sum(1).clamp(min=0)
    torch.testing.assert_close(grad_cam(encoder, pixels, part=part), expected)
    sides = [grad_cam(encoder, pixels, part=part, last=i).shape[1:] for i in (1, 2, 3, 4)]
    assert sides == [(2, 3), (4, 6), (8, 12), (16, 24)]
    with pytest.raises(ShapeError, match="no attention layers"):
        attention_matrix(encoder, pixels)


def test_a_vmamba_is_drawn_at_a_stage_that_shows_something(paths) -> None:
    encoder = clever_zoo.create_encoder("vmamba_tiny")
    row = grad_cam_row(encoder, picture_square(paths[0], encoder, 32), "x", parts=("invariant",))
    assert row.titles == ("invariant\nlayers.1.blocks, 4x4",)
    figure = look(encoder, paths[:1], size_px=32)
    assert "Grad-CAM" in figure.get_suptitle()


def test_the_picture_compared_with_itself_shows_nothing(resnet: Encoder, paths) -> None:
    picture = picture_square(paths[0], resnet, 64)
    row = grad_cam_row(resnet, picture, "x", parts=("full", "invariant"), like=picture)
    assert all((values == 0).all() for values in row.maps)


def test_stretching() -> None:
    maps = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[4.0, 4.0], [4.0, 4.0]]])
    assert stretch(maps).tolist() == [[[0, 0.5], [0.25, 1]], [[0, 0], [0, 0]]]


def test_rows_hold_the_picture_as_it_is_fed(vit: Encoder, resnet: Encoder, paths) -> None:
    row = attention_row(vit, picture_square(paths[0], vit, None), "x")
    assert row.picture.shape == (32, 32, 3)
    assert row.titles == ("mean of heads", "head 0", "head 1", "head 2")
    assert [m.shape for m in row.maps] == [(4, 4)] * 4
    np.testing.assert_allclose(row.maps[0], stretch(torch.tensor(np.mean(row.maps[1:], 0))), 1e-5)
    large = attention_row(vit, picture_square(paths[0], vit, 48), "x")
    assert large.maps[0].shape == (6, 6)
    row = grad_cam_row(resnet, large.picture, "x", parts=("equivariant",))
    assert row.titles == ("equivariant\nlayer2, 6x6",)
    assert all(m.min() >= 0 and m.max() <= 1 for m in row.maps)


def run(*arguments: object):
    app = attention.typer.Typer()
    app.command()(attention.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_draws_every_picture_of_a_folder(tmp_path: Path, paths) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in paths[:2]:
        (folder / path.name).write_bytes(path.read_bytes())
    result = run(folder, "-o", tmp_path / "all.png")
    assert result.exit_code == 0, result.output
    assert "2 pictures" in result.output
    result = run(paths[0], "-o", tmp_path / "one.png", "--part", "invariant", "--like", paths[1])
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "all.png") as both, Image.open(tmp_path / "one.png") as one:
        assert both.width == 2 * one.width
        assert both.height > 1.7 * one.height
        assert np.asarray(both.convert("RGB")).std() > 20


def test_the_command_draws_attention(tmp_path: Path, vit: Encoder, paths) -> None:
    vit.save_pretrained(tmp_path / "vit")
    model = f"local-dir:{tmp_path / 'vit'}"
    result = run(paths[0], "-m", model, "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    result = run(paths[0], "-m", model, "-o", tmp_path / "b.png", "--part", "full")
    assert result.exit_code == 2
    assert "is a ViT" in result.output
    assert [p.name for p in tmp_path.glob("*.png")] == ["a.png"]


def test_what_cannot_be_drawn_is_refused(vit: Encoder, resnet: Encoder, paths) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    with pytest.raises(ShapeError, match="no attention layers"):
        attention_matrix(resnet, pixels)
    with pytest.raises(ShapeError, match="no maps of stages"):
        grad_cam(vit, pixels)
    with pytest.raises(ShapeError, match="last is 6"):
        grad_cam(resnet, pixels, last=6)
    unsplit = clever_zoo.create_encoder("resnet18", invariant_dim=512)
    with pytest.raises(ShapeError, match="equivariant half is empty"):
        grad_cam(unsplit, pixels, part="equivariant")
    with pytest.raises(DataError, match="101 pictures"):
        look(resnet, paths[:1] * 101)
    torch.nn.init.constant_(vit.backbone.blocks[-1].norm1.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="attention of the last block"):
        look(vit, paths[:1])
    torch.nn.init.constant_(unsplit.backbone.layer4[1].bn2.bias, float("nan"))
    with pytest.raises(NonFiniteError, match="Grad-CAM of the full"):
        grad_cam(unsplit, pixels)
