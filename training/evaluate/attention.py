"""What an encoder looks at, as a picture: attention of a ViT, Grad-CAM of any other.

python -m training.evaluate.attention photos/ -m clever-resnet18 -o looks.png
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from clever_zoo.bulk import find_images
from clever_zoo.cli import ModelArgument, fail
from clever_zoo.embedding import Part
from clever_zoo.encoder import Encoder, evaluating
from clever_zoo.errors import CleverZooError, DataError, ShapeError
from clever_zoo.files import write_atomic
from clever_zoo.preprocess import image_pixels, load_image, normalize_pixels
from clever_zoo.records import PARTS
from training.evaluate.dense import PartChoice, check_finite, part_of
from training.evaluate.inputs import load_encoder

MIN_MAP_SIDE = 4
MAX_ROWS = 100
_FLAT = 1e-7
_PANEL_INCHES = 1.8
_DPI = 110
_OVERLAY_ALPHA = 0.5

Picture = NDArray[np.uint8]


class Row(NamedTuple):
    """One picture and what lies over it: titles and maps (h, w) in 0..1."""

    name: str
    picture: Picture
    titles: tuple[str, ...]
    maps: tuple[NDArray[np.float32], ...]


@contextmanager
def unfused_attention(backbone: nn.Module) -> Iterator[None]:
    """timm's fused attention off for a while: it never holds the attention map."""
    layers = [module for module in backbone.modules() if hasattr(module, "fused_attn")]
    before = [layer.fused_attn for layer in layers]
    try:
        for layer in layers:
            layer.fused_attn = False
        yield
    finally:
        for layer, fused in zip(layers, before, strict=True):
            layer.fused_attn = fused


def attention_matrix(encoder: Encoder, pixels: Tensor) -> Tensor:
    """Self-attention of the last block; each row sums to one.

    Shapes: (B, 3, H, W) -> (B, heads, 1 + N, 1 + N), the class token first.

    Raises:
        ShapeError: If the encoder is no ViT, or as `Encoder.features`.
        NonFiniteError: If the attention is not finite.
    """
    if not is_vit(encoder):
        raise ShapeError(
            f"{encoder.spec.backbone} has no attention layers; draw its grad_cam instead"
        )
    caught: list[Tensor] = []
    hook = encoder.backbone.blocks[-1].attn.attn_drop.register_forward_hook(
        lambda _module, _inputs, output: caught.append(output)
    )
    try:
        with unfused_attention(encoder.backbone), evaluating(encoder), torch.no_grad():
            encoder.features(pixels)
    finally:
        hook.remove()
    return check_finite(caught[0], "attention of the last block")


def class_attention(encoder: Encoder, pixels: Tensor) -> Tensor:
    """How much the class token attends to each patch in the last block, per head.

    Shapes: (B, 3, H, W) -> (B, heads, h, w), h and w in patches.

    Raises:
        ShapeError, NonFiniteError: See `attention_matrix`.
    """
    rows = attention_matrix(encoder, pixels)[:, :, 0, 1:]
    return rows.unflatten(2, encoder.backbone.patch_embed.dynamic_feat_size(pixels.shape[2:]))


def grad_cam(
    encoder: Encoder,
    pixels: Tensor,
    *,
    part: Part = "full",
    like: Tensor | None = None,
    last: int = 1,
) -> Tensor:
    """Where in a picture a part of its features comes from.

    The target stands in for a class score: the squared norm of the part, or its cosine to the
    same part of another picture. Channels of the map are weighted by the target's mean gradient
    and summed; what is negative counts as zero.

    Args:
        encoder: No ViT.
        pixels: (B, 3, H, W) normalised.
        part: Whose features make the target.
        like: (1, 3, H', W') pixels of the picture to compare with; None for the norm.
        last: Which stage's map, counted from the end: 1 is the last.

    Returns:
        (B, h, w), not negative.

    Raises:
        ShapeError: If the encoder is a ViT, lacks the part, or `last` is out of range.
        NonFiniteError: If a map is not finite.

    Source: Selvaraju et al. 2017.
    """
    if is_vit(encoder):
        raise ShapeError(
            f"{encoder.spec.backbone} has no maps of stages; draw its class_attention instead"
        )
    with evaluating(encoder), torch.enable_grad():
        maps = encoder.features(pixels.detach().requires_grad_(), last=last)
        features = part_of(encoder.backbone.forward_head(maps[-1]), encoder.spec, part)
        if like is None:
            target = features.square().sum()
        else:
            with torch.no_grad():
                reference = part_of(encoder(like).full, encoder.spec, part)
            target = F.cosine_similarity(features, reference).sum()
        (gradient,) = torch.autograd.grad(target, maps[0])
    weights = gradient.mean((2, 3), keepdim=True)
    cam = (weights * maps[0].detach()).sum(1).relu()
    return check_finite(cam, f"Grad-CAM of the {part} features")


def legible_stage(encoder: Encoder, pixels: Tensor) -> int:
    """The last stage, counted from the end, whose map has 4 x 4 places or more; else the first.

    The last stage of a ResNet sees 32 px as a single place, which shows nothing.
    """
    depth = len(encoder.backbone.feature_info)
    with evaluating(encoder), torch.no_grad():
        maps = encoder.features(pixels, last=depth)
    sides = [min(m.shape[2:]) for m in reversed(maps)]
    return next((i for i, side in enumerate(sides, 1) if side >= MIN_MAP_SIDE), depth)


def is_vit(encoder: Encoder) -> bool:
    """Whether the backbone has a class token that attends to patches."""
    return hasattr(encoder.backbone, "cls_token")


def stretch(maps: Tensor) -> Tensor:
    """Each map (..., h, w) to 0..1 by its own extremes; one that is flat to 1e-7 becomes zero.

    The cosine of a picture to itself has no gradient: its rounding errors must not be drawn.
    """
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    spread = high - low
    return torch.where(spread > _FLAT, (maps - low) / spread, 0)


def picture_square(path: Path, encoder: Encoder, size_px: int | None) -> Picture:
    """A picture as it is fed and drawn, (size, size, 3) uint8.

    Args:
        path: An image file.
        encoder: Its evaluation transform is used if `size_px` is None.
        size_px: Resize the whole picture to this square instead, as the reference does (480).
    """
    if size_px is None:
        return image_pixels(path, encoder.spec.preprocess)
    resized = load_image(path).resize((size_px, size_px), Image.Resampling.BICUBIC)
    return np.array(resized)


def attention_row(encoder: Encoder, picture: Picture, name: str) -> Row:
    """Mean over the heads and each head of a ViT, every head stretched to 0..1 first."""
    heads = stretch(class_attention(encoder, _pixels(encoder, picture))[0])
    titles = ("mean of heads", *(f"head {i}" for i in range(len(heads))))
    maps = torch.cat([stretch(heads.mean(0, keepdim=True)), heads]).cpu().numpy()
    return Row(name, picture, titles, tuple(maps))


def grad_cam_row(
    encoder: Encoder,
    picture: Picture,
    name: str,
    *,
    parts: tuple[Part, ...],
    like: Picture | None = None,
    last: int | None = None,
) -> Row:
    """Grad-CAM of each part; `last` None chooses the stage by `legible_stage`."""
    pixels = _pixels(encoder, picture)
    last = legible_stage(encoder, pixels) if last is None else last
    other = None if like is None else _pixels(encoder, like)
    cams = [grad_cam(encoder, pixels, part=part, like=other, last=last)[0] for part in parts]
    stage = encoder.backbone.feature_info[-last]["module"]
    titles = tuple(f"{part}\n{stage}, {cams[0].shape[0]}x{cams[0].shape[1]}" for part in parts)
    return Row(name, picture, titles, tuple(stretch(cam).cpu().numpy() for cam in cams))


def _pixels(encoder: Encoder, picture: Picture) -> Tensor:
    pixels = torch.from_numpy(normalize_pixels(picture[None], encoder.spec.preprocess))
    return pixels.to(next(encoder.parameters()).device)


def draw_rows(rows: list[Row], *, smooth: bool) -> Figure:
    """A figure with one row for each picture: the picture, then its maps laid over it.

    Args:
        rows: All with the same titles.
        smooth: Blend between the places of a map; else show them as squares.
    """
    columns = 1 + len(rows[0].maps)
    size = columns * _PANEL_INCHES, len(rows) * _PANEL_INCHES + 0.4
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        height, width = row.picture.shape[:2]
        for axis, title in zip(line, ("picture", *row.titles), strict=True):
            axis.imshow(row.picture)
            axis.set(xticks=[], yticks=[])
            if row is rows[0]:
                axis.set_title(title, fontsize=8)
        line[0].set_ylabel(row.name, fontsize=6)
        for axis, values in zip(line[1:], row.maps, strict=True):
            axis.imshow(
                values,
                cmap="jet",
                alpha=_OVERLAY_ALPHA,
                vmin=0,
                vmax=1,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="bilinear" if smooth else "nearest",
            )
    return figure


def look(
    encoder: Encoder,
    paths: list[Path],
    *,
    parts: tuple[Part, ...] | None = None,
    like: Path | None = None,
    last: int | None = None,
    size_px: int | None = None,
) -> Figure:
    """The figure of what an encoder looks at in each picture.

    Args:
        encoder: ViT: attention of the class token; any other: Grad-CAM.
        paths: Image files, at most 100.
        parts: Grad-CAM targets; None for every part that the encoder has.
        like: Grad-CAM of the cosine to this picture instead of the norm.
        last: Grad-CAM stage counted from the end; None: the last with 4 x 4 places or more.
        size_px: Square to resize pictures to; None for the encoder's evaluation transform.

    Raises:
        DataError: For too many pictures, or a Grad-CAM option with a ViT.
        ImageError, ShapeError, NonFiniteError: If a picture cannot be read or mapped.
    """
    if len(paths) > MAX_ROWS:
        raise DataError(f"{len(paths)} pictures; at most {MAX_ROWS} fit, pass fewer")
    if is_vit(encoder) and (parts, like, last) != (None, None, None):
        raise DataError(
            f"part, like and stage choose a Grad-CAM, but {encoder.spec.name} is a ViT, whose "
            "attention belongs to no part; leave them out"
        )
    if parts is None:
        parts = PARTS if encoder.spec.equivariant_dim else PARTS[:1]
    compared = None if like is None else picture_square(like, encoder, size_px)
    rows = []
    for path in track(paths, "look", transient=True):
        picture = picture_square(path, encoder, size_px)
        rows.append(
            attention_row(encoder, picture, path.name)
            if is_vit(encoder)
            else grad_cam_row(encoder, picture, path.name, parts=parts, like=compared, last=last)
        )
    figure = draw_rows(rows, smooth=not is_vit(encoder))
    figure.suptitle(_caption(encoder, like), fontsize=8)
    return figure


def _caption(encoder: Encoder, like: Path | None) -> str:
    if is_vit(encoder):
        return f"{encoder.spec.name}: attention of the class token, last block"
    target = "squared norm of the part" if like is None else f"cosine of the part to {like.name}"
    return f"{encoder.spec.name}: Grad-CAM of the {target}"


def main(
    inputs: Annotated[list[str], typer.Argument(help="Pictures, folders and glob patterns.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG to write.")],
    model: ModelArgument = "clever-resnet18",
    part: Annotated[
        list[PartChoice] | None,
        typer.Option(help="Grad-CAM of this part; repeat it. Default: all."),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Grad-CAM of the cosine to this picture, not of the norm.")
    ] = None,
    stage: Annotated[
        int | None,
        typer.Option(
            min=1, help="Grad-CAM stage from the end, 1: last. Default: last of 4x4 or more."
        ),
    ] = None,
    size_px: Annotated[
        int | None,
        typer.Option(min=2, help="Resize pictures to this square, not as the encoder is fed."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
) -> None:
    """Draw what an encoder looks at: attention heads of a ViT, Grad-CAM of each part of any other.

    Example: python -m training.evaluate.attention photos/ -m clever-resnet18 -o looks.png
    """
    try:
        paths = list(find_images(inputs))
        figure = look(
            load_encoder(model, device)[0],
            paths,
            parts=tuple(choice.value for choice in part) if part else None,
            like=like,
            last=stage,
            size_px=size_px,
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI)
        write_atomic(output, buffer.getvalue())
    except (CleverZooError, OSError) as error:
        fail(error)
    typer.echo(f"{len(paths)} pictures -> {output}")


if __name__ == "__main__":
    typer.run(main)
