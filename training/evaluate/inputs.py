"""What evaluations read: networks under test, and images through the evaluation transform."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional as F

from clever_zoo.embedding import Part, split_features
from clever_zoo.encoder import Encoder, evaluating, from_pretrained, pack_weights, usable_device
from clever_zoo.errors import DataError, NonFiniteError
from clever_zoo.preprocess import crop_pixels
from clever_zoo.records import Interpolation, Network, Role
from clever_zoo.spec import ModelSpec, PreprocessSpec, WeightFile
from training.checkpoint import CHECKPOINT
from training.config import BackboneConfig
from training.data import ImageSet, ImageSource
from training.evaluate.perturb import perturb
from training.networks import build_student
from training.pretrain import preprocess_spec
from training.runs import load_run
from training.small_maps import use_small_map_convolutions

BATCH_SIZE = 256
PIXELS_SIZE_PX = 32  # larger pictures would give the raw-pixel control 150,000 values
_CACHED_BYTES = 4 << 30

Features = Callable[[Tensor], Tensor]  # (B, 3, s, s) float 0..255 -> (B, D)
# Pixels as above and the place of each image (B,) -> other such pixels.
Change = Callable[[Tensor, NDArray[np.int64]], Tensor]


@dataclass(frozen=True)
class Subject:
    """A network under test, or the raw pixels.

    Attributes:
        network: Its entry in the record.
        encoder: In evaluation mode, with the weights as they are stored for release; None for raw
            pixels.
        cut: Index at which the features are cut into halves; None for the full vector alone.
        grey: Raw pixels are of one channel, as the three are equal.
    """

    network: Network
    encoder: Encoder | None
    cut: int | None
    grey: bool = False

    @property
    def device(self) -> torch.device:
        """Where the encoder is; the CPU for raw pixels."""
        if self.encoder is None:
            return torch.device("cpu")
        return next(self.encoder.parameters()).device

    @property
    def blocks(self) -> int:
        """How many last blocks probes read: 4 of a ViT, else 1."""
        is_vit = self.encoder is not None and self.encoder.spec.backbone.startswith("vit")
        return 4 if is_vit else 1


def as_released(spec: ModelSpec, weights: dict[str, Tensor]) -> Encoder:
    """An encoder whose weights went through the storage of a release, and their digest.

    Args:
        spec: Of the encoder.
        weights: State dict of its backbone, float32.
    """
    encoder = Encoder(spec)
    encoder.backbone.load_state_dict(weights)
    content = pack_weights(encoder.backbone, "float16")
    encoder.backbone.load_state_dict(load(content))
    encoder.spec = spec.model_copy(update={"weights": WeightFile.of(content)})
    return encoder.eval()


def load_encoder(source: str | Path, device: str = "cpu") -> tuple[Encoder, dict[str, Any]]:
    """An encoder in evaluation mode and the facts of its training.

    Args:
        source: A run's folder, whose weights are taken as a release would store them; or whatever
            `clever_zoo.from_pretrained` takes.
        device: Where to put it.

    Raises:
        CheckpointError: If the run cannot be read.
        BackendMissingError: If the device cannot be used.
        UnknownModelError, SourceError, SpecError, IntegrityError: See `from_pretrained`.
    """
    folder = Path(source)
    if (folder / CHECKPOINT).is_file():
        recipe, teacher, training = load_run(folder)
        spec = ModelSpec(
            name=recipe.name,
            backbone=recipe.backbone.name,
            invariant_dim=recipe.invariant_dim,
            preprocess=preprocess_spec(recipe),
            model_args=recipe.backbone.model_args,
        )
        encoder = as_released(spec, teacher.state_dict())
        return encoder.to(usable_device(device)), training
    return from_pretrained(source, device=device), {}


def forbid_tf32() -> None:
    """Have cuDNN compute in whole float32.

    The ten-bit mantissas of TF32 turn an untrained network's nearly equal features into others.
    """
    torch.backends.cudnn.allow_tf32 = False


def subject(encoder: Encoder, role: Role, training: dict[str, Any], cut: int) -> Subject:
    """An encoder as a subject, cut at `cut` whatever its own split.

    Its convolutions are made faster where images are small, which changes rounding alone.
    """
    use_small_map_convolutions(encoder.backbone.to(memory_format=torch.channels_last))
    weights = encoder.spec.weights
    name = "untrained" if role == "untrained" else encoder.spec.name
    network = Network(
        name=name, role=role, sha256=weights.sha256 if weights else None, training=training
    )
    return Subject(network, encoder, cut)


def untrained(spec: ModelSpec, backbone: BackboneConfig, seed: int) -> Encoder:
    """The network that training with `seed` starts from."""
    fresh = spec.model_copy(update={"provenance": None, "weights": None})
    return as_released(fresh, build_student(backbone, seed).state_dict())


class EvaluationImages:
    """One split through the evaluation transform: short side resized, centre cut.

    Squares are kept as bytes where they fit into 4 GB, else made anew at each pass.

    Attributes:
        order: Index in the data set of each image, (N,). Images that are stored class by class
            are shuffled (seed 0), so that the first few thousand are of all classes.
        labels: Classes in that order, (N,) int64.
    """

    def __init__(self, data: ImageSet | ImageSource, spec: PreprocessSpec, split: str) -> None:
        """Read nothing yet.

        Args:
            data: Images as they are stored; a source reads them whole, so that the transform is
                the released encoder's to the bit.
            spec: The transform.
            split: Its name, for messages.
        """
        self.data, self.spec, self.split = data, spec, split
        self.order = np.arange(len(data))
        if self.shuffled:
            np.random.default_rng(0).shuffle(self.order)
        self.labels = data.labels[torch.from_numpy(self.order)]
        self._kept: dict[Interpolation, Tensor] = {}

    def __len__(self) -> int:
        return len(self.data)

    @property
    def shuffled(self) -> bool:
        """Whether the data set is stored class by class."""
        changes = int(self.data.labels.diff().count_nonzero())
        return 0 < changes < len(self.data.labels.unique())

    def prepare(self, interpolation: Interpolation) -> None:
        """Make the squares that `pixels` will be asked for, if they can be kept."""
        size = self.spec.input_size_px
        if interpolation in self._kept or len(self) * 3 * size * size > _CACHED_BYTES:
            return
        steps = range(0, len(self), BATCH_SIZE)
        squares = [
            self._squares(i, min(i + BATCH_SIZE, len(self)), interpolation)
            for i in track(steps, description=f"resize {self.split} images", transient=True)
        ]
        self._kept[interpolation] = torch.cat(squares)

    def pixels(self, start: int, stop: int, interpolation: Interpolation = "bicubic") -> Tensor:
        """(stop - start, 3, size, size) float, whole numbers 0..255."""
        kept = self._kept.get(interpolation)
        squares = self._squares(start, stop, interpolation) if kept is None else kept[start:stop]
        return squares.float()

    def _squares(self, start: int, stop: int, interpolation: Interpolation) -> Tensor:
        def square(index: int) -> Tensor:
            pixels = crop_pixels(
                Image.fromarray(self._whole(index)),
                self.spec.resize_px,
                self.spec.input_size_px,
                interpolation=interpolation,
            )
            return torch.from_numpy(pixels).permute(2, 0, 1)

        with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter's lock
            return torch.stack(list(pool.map(square, range(start, stop))))

    def _whole(self, index: int) -> NDArray[np.uint8]:
        if isinstance(self.data, ImageSet):
            image = self.data.images[self.order[index]].expand(3, -1, -1)
            return image.permute(1, 2, 0).contiguous().numpy()
        return self.data.read(int(self.order[index]))

    def batches(
        self, interpolation: Interpolation = "bicubic", *, limit: int | None = None
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Pixels (B, 3, size, size) as in `pixels` and the place of each image in `order` (B,)."""
        count = min(len(self), limit or len(self))
        for start in range(0, count, BATCH_SIZE):
            stop = min(start + BATCH_SIZE, count)
            yield self.pixels(start, stop, interpolation), np.arange(start, stop)


def normalized(pixels: Tensor, spec: PreprocessSpec) -> Tensor:
    """(B, 3, H, W) of 0..255 -> normalised floats, as encoders and classifiers take them."""
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (spec.mean, spec.std))
    return (pixels.float() / 255 - mean) / std


def raw_pixels(images: EvaluationImages) -> Subject:
    """The control without a network: the bytes that the networks see, as 32 x 32 at most."""
    size = images.spec.input_size_px
    note = (
        {} if size <= PIXELS_SIZE_PX else {"note": f"averaged from {size} to {PIXELS_SIZE_PX} px"}
    )
    grey = isinstance(images.data, ImageSet) and images.data.images.shape[1] == 1
    return Subject(Network(name="pixels", role="pixels", training=note), None, None, grey=grey)


def _pixel_values(pixels: Tensor, *, channels: int) -> Tensor:
    x = pixels[:, :channels] / 255
    if x.shape[-1] > PIXELS_SIZE_PX:
        x = F.adaptive_avg_pool2d(x, PIXELS_SIZE_PX)
    return x.flatten(1)


def features_of(subject: Subject, blocks: int = 1) -> Features:
    """Features of byte-valued pixels: (B, 3, s, s) float 0..255 -> (B, blocks * D), on the CPU.

    Args:
        subject: Raw pixels give all their values, scaled to 0..1.
        blocks: 1 for the encoder's output; for a ViT also the number of last blocks whose class
            tokens, each after the final norm, are put side by side, the oldest first.
    """
    encoder = subject.encoder
    if encoder is None:
        return partial(_pixel_values, channels=1 if subject.grey else 3)

    def features(pixels: Tensor) -> Tensor:
        with evaluating(encoder), torch.inference_mode():
            x = normalized(pixels.to(subject.device), encoder.spec.preprocess)
            if blocks == 1:
                return encoder.backbone(x).float().cpu()
            tokens = encoder.features(x, last=blocks)
            return torch.cat([t[:, 0] for t in tokens], dim=1).float().cpu()

    return features


def embed_images(
    features: Features,
    images: EvaluationImages,
    *,
    perturbation: str = "ori",
    seed: int = 0,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Features (N, D) of all images, perturbed.

    Raises:
        NonFiniteError: If a feature is not finite; names the first such image.
        DataError: If there are fewer than two images.
    """

    def change(pixels: Tensor, samples: NDArray[np.int64]) -> Tensor:
        return perturb(pixels, samples, perturbation, seed)

    return embed_changed(features, images, change, name=perturbation, interpolation=interpolation)


def embed_changed(
    features: Features,
    images: EvaluationImages,
    change: Change,
    *,
    name: str,
    interpolation: Interpolation = "bicubic",
    limit: int | None = None,
) -> Tensor:
    """Features (N, D) of all images, or of the first `limit`, after any change of the pixels.

    Args:
        change: What is done to the images before they are embedded.
        name: Of the change, for the error message.

    Raises:
        NonFiniteError, DataError: As in `embed_images`.
    """
    if len(images) < 2:
        raise DataError(
            f"{len(images)} image(s) in split {images.split}; an evaluation needs at least 2"
        )
    rows = []
    for pixels, samples in images.batches(interpolation, limit=limit):
        batch = features(change(pixels, samples))
        if not batch.isfinite().all():
            first = images.order[samples[int((~batch.isfinite()).any(1).nonzero()[0])]]
            raise NonFiniteError(
                f"the features of {images.split} image {first} ({name}) are not finite; "
                "the weights or the image are broken, so nothing is evaluated"
            )
        rows.append(batch)
    return torch.cat(rows)


def parts_of(
    features: Tensor, cut: int | None, *, blocks: int = 1, per_block: bool = False
) -> dict[Part, Tensor]:
    """Features (N, blocks * D) by part.

    Args:
        cut: Index of the cut in one block's D features; None or D, which cuts nothing off, give
            the full vector alone.
        blocks: Number of blocks side by side.
        per_block: Cut every block; otherwise, as the authors' evaluation does, the equivariant
            half is that of the last block and everything else counts as invariant.

    Source: the authors' ``eval_linear.py`` keeps all but the last D - cut numbers as its "IR".
    """
    width = features.shape[1] // blocks
    if cut in (None, width):
        return {"full": features}
    if per_block:
        halves = split_features(features.unflatten(1, (blocks, width)), cut)
        return {"full": features, **{k: v.flatten(1) for k, v in halves._asdict().items()}}
    halves = split_features(features, features.shape[1] - (width - cut))
    return {"full": features, **halves._asdict()}
