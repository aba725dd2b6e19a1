"""The torch encoder: a backbone, its spec, and the split into two halves."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clever_zoo.backbones import backbone_info, build_backbone
from clever_zoo.embedder import ImageEmbedder
from clever_zoo.embedding import Embedding, default_cut, split_features
from clever_zoo.errors import (
    BackendMissingError,
    IntegrityError,
    NonFiniteError,
    ShapeError,
    check_choice,
)
from clever_zoo.files import remove_derived, write_atomic
from clever_zoo.hub import HubOptions
from clever_zoo.locate import locate_model
from clever_zoo.preprocess import (
    ImageInput,
    check_pixels,
    image_pixels,
    load_image,
    normalize_pixels,
    pixel_batches,
)
from clever_zoo.spec import CONFIG_FILENAME, ModelSpec, PreprocessSpec, WeightFile
from clever_zoo.upload import PushToHub
from clever_zoo.weights import ExpectedTensor, check_tensors, read_header

try:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save
    from torch import Tensor, nn
except ImportError as error:
    raise BackendMissingError(
        f'{error.name} is not installed: pip install "clever-zoo[torch]"'
    ) from error

StorageType = Literal["float32", "float16"]
CHANGED_SUFFIX = "-changed"
_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Encoder(nn.Module, ImageEmbedder, PushToHub):
    """Pixels to embeddings; what this project publishes.

    Args:
        spec: What to build.
        backbone: An existing module (B, 3, H, W) -> (B, D) to use instead of a fresh one.

    Attributes:
        spec: The frozen description.
        backbone: The timm module.
    """

    _loader = "clever_zoo.from_pretrained"

    def __init__(self, spec: ModelSpec, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = (
            build_backbone(spec.backbone, **spec.model_args) if backbone is None else backbone
        )

    def forward(self, pixels: Tensor) -> Embedding[Tensor]:
        """Embed normalised pixels, differentiably.

        Shapes: (B, 3, H, W) float -> `invariant` (B, invariant_dim), `equivariant`
        (B, equivariant_dim).

        Raises:
            ShapeError: For another rank, channel count or an integer type.
        """
        _check_pixels(pixels)
        return split_features(self.backbone(pixels), self.spec.invariant_dim)

    def features(self, pixels: Tensor, *, last: int = 1) -> list[Tensor]:
        """Unsplit features before pooling, differentiably, for dense tasks and probes.

        Args:
            pixels: As in `forward`; a ViT takes any H and W that its patches divide.
            last: How many blocks (ViT) or stages (others; the stem of a ResNet counts) to return.

        Returns:
            Oldest first. ViT: tokens (B, 1 + N, D) with the final norm applied, class token
            first, patches row by row. Others: maps (B, C, h, w), a final norm applied to the last
            stage, so that its mean is the full features.

        Raises:
            ShapeError: For pixels that `forward` refuses or patches do not divide, or `last`
                out of range.
        """
        _check_pixels(pixels)
        backbone: Any = self.backbone
        depth = len(backbone.feature_info)
        if not 1 <= last <= depth:
            raise ShapeError(
                f"last is {last}; {self.spec.backbone} has {depth} blocks or stages, use 1..{depth}"
            )
        take = functools.partial(
            backbone.forward_intermediates,
            pixels,
            indices=last,
            norm=True,
            intermediates_only=True,
        )
        if not hasattr(backbone, "cls_token"):
            return list(take())
        _check_patches(pixels, backbone.patch_embed.patch_size)
        pairs = take(output_fmt="NLC", return_prefix_tokens=True)
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in pairs]

    def preprocess(self, images: Iterable[ImageInput]) -> Tensor:
        """Load images as `forward` wants them: (B, 3, size, size), device and type the encoder's.

        Raises:
            ImageError: For a bad image, with its source and index.
        """
        size = self.spec.preprocess.input_size_px
        batches = list(pixel_batches(images, self.spec.preprocess, batch_size=1))
        empty = np.zeros((0, size, size, 3), dtype=np.uint8)
        return self.to_tensor(np.concatenate([empty, *batches]))

    def embed_pixels(self, pixels: NDArray[np.uint8]) -> Embedding[NDArray[np.float32]]:
        """Embed resized and cropped squares, (B, size, size, 3) uint8 RGB.

        Runs in evaluation mode and without gradients whatever mode the module is in.

        Raises:
            ShapeError: For another shape or type.
        """
        check_pixels(pixels, self.spec.preprocess)
        with evaluating(self), torch.inference_mode():
            halves = self(self.to_tensor(pixels))
            return Embedding(*(half.float().cpu().numpy() for half in halves))

    def digests(self) -> dict[str, str]:
        """`sha256` of the weights as they are now, trained or not.

        Raises:
            NonFiniteError: If one is not finite.
        """
        return {"sha256": current_weights(self.stored_module(), self.spec.weights).sha256}

    def to_tensor(self, pixels: NDArray[np.uint8]) -> Tensor:
        """What `forward` takes of squares (B, size, size, 3) uint8, on the encoder's device."""
        return torch.from_numpy(normalize_pixels(pixels, self.spec.preprocess)).to(
            next(self.parameters())
        )

    @property
    def precision(self) -> str:
        """Type of the weights and of the arithmetic: "fp32", "fp16" or "bf16"."""
        return _PRECISIONS.get(next(self.parameters()).dtype, "other")

    def stored_module(self) -> nn.Module:
        """The module whose state `save_pretrained` writes, under timm's names."""
        return self.backbone

    def save_pretrained(self, folder: str | Path, *, dtype: StorageType = "float32") -> ModelSpec:
        """Write config.json and model.safetensors; timm and transformers read the folder too.

        Weights that are no longer the released ones lose that name and provenance, see
        `current_spec`.

        Args:
            folder: Created if missing; existing files of these names are replaced, and what was
                made from other weights (`clever_zoo.files.DERIVED`) is removed.
            dtype: Storage type. float16 halves the file; norm layers and running statistics
                stay float32, and loading always gives float32.

        Returns:
            The spec with the size and digest of the written file.

        Raises:
            SpecError: For another storage type.
            NonFiniteError: If a value does not fit the storage type.
        """
        content = pack_weights(self.stored_module(), dtype)
        weights = WeightFile.of(content)
        spec = self.spec
        if spec.provenance is not None:  # what it claims may not be true of them any more
            spec = current_spec(self.stored_module(), spec)
        spec = spec.model_copy(update={"weights": weights})
        write_model(Path(folder), spec.to_config(), weights.filename, content)
        return spec

    @classmethod
    def load(cls, spec: ModelSpec, weights: Path) -> Self:
        """Build an encoder and fill it from a weights file, in float32, strictly.

        Raises:
            WeightsMismatchError: Listing missing, unexpected and misshapen tensors.
        """
        encoder = cls(spec)
        read_weights(encoder.backbone, weights)
        return encoder


def _check_pixels(pixels: Tensor) -> None:
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape[2:]:
        raise ShapeError(
            f"pixels have shape {tuple(pixels.shape)}; expected (B, 3, H, W), "
            "as Encoder.preprocess returns"
        )
    if not pixels.is_floating_point():
        raise ShapeError(
            f"pixels are {pixels.dtype}; expected normalised floats, as Encoder.preprocess returns"
        )


def _check_patches(pixels: Tensor, patch_size: tuple[int, int]) -> None:
    height, width = pixels.shape[2:]
    if height % patch_size[0] or width % patch_size[1]:
        raise ShapeError(
            f"pixels are {height}x{width}, which patches of {patch_size[0]}x{patch_size[1]} do not "
            "divide; resize or crop them to a multiple"
        )


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    device: str = "cpu",
) -> Encoder:
    """Load an encoder in evaluation mode.

    Args:
        source: A released name such as "clever-resnet18" (loads with no network); "org/repo" or
            "hf-hub:org/repo[@revision]" on the Hub; "local-dir:PATH" or a Path for a folder.
        revision: Branch, tag or commit of a Hub repository.
        cache_dir, local_files_only, token: As in huggingface_hub.
        device: Where to put it, such as "cpu" or "cuda".

    Raises:
        UnknownModelError: For a name without released weights.
        SourceError, SpecError, DownloadError: If the model cannot be found or described.
        IntegrityError, WeightsMismatchError: If its weights are not the recorded ones.
        BackendMissingError: If `device` cannot be used here.
    """
    target = usable_device(device)
    options = HubOptions(revision, cache_dir, local_files_only, token)
    spec, weights = locate_model(source, options)
    return Encoder.load(spec, weights).to(target).eval()


def usable_device(name: str | torch.device) -> torch.device:
    """The torch device of that name.

    Raises:
        BackendMissingError: If there is none, or no tensor can be put on it here.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BackendMissingError(
            f"device {str(name)!r} cannot be used ({reason}); use 'cpu'"
        ) from error


def create_encoder(
    backbone: str, *, invariant_dim: int | None = None, **backbone_kwargs: Any
) -> Encoder:
    """Build an encoder with random weights, in training mode.

    Args:
        backbone: One of `list_backbones()`.
        invariant_dim: Where to cut the features; None means int(0.8 D), as in the paper.
        **backbone_kwargs: timm arguments, such as img_size=32, patch_size=4 for a ViT.

    Raises:
        UnknownModelError: For an unknown backbone.
        SpecError: If `invariant_dim` or an argument does not fit.
    """
    info = backbone_info(backbone)
    size = backbone_kwargs.get("img_size", PreprocessSpec().input_size_px)
    return Encoder(
        ModelSpec.create(
            name=backbone,
            backbone=backbone,
            invariant_dim=default_cut(info.feature_dim) if invariant_dim is None else invariant_dim,
            preprocess={"input_size_px": size},
            model_args=backbone_kwargs,
        )
    )


def create_transform(spec: ModelSpec, *, training: bool = False) -> Callable[[Image.Image], Tensor]:
    """The image transform of a model for a DataLoader; it can be pickled.

    Args:
        spec: As in `Encoder.spec` or from `model_info`.
        training: Random resized crops and flips instead of the evaluation transform.

    Returns:
        PIL image -> (3, size, size) float32, normalised.
    """
    if not training:
        return functools.partial(_evaluation_pixels, spec=spec.preprocess)
    from torchvision import transforms

    p = spec.preprocess
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            load_image,
            transforms.RandomResizedCrop(p.input_size_px, interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(p.mean, p.std),
        ]
    )


def _evaluation_pixels(image: ImageInput, spec: PreprocessSpec) -> Tensor:
    return torch.from_numpy(normalize_pixels(image_pixels(image, spec)[None], spec)[0])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule gets its own mode back."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def pack_weights(module: nn.Module, dtype: StorageType = "float32") -> bytes:
    """The content of a safetensors file with a module's state, under the module's own names.

    Args:
        module: Such as `Encoder.backbone`.
        dtype: Storage type. float16 halves the file; norm layers and running statistics stay
            float32.

    Raises:
        SpecError: For another storage type.
        NonFiniteError: If a value is not finite in the storage type.
    """
    check_choice("dtype", dtype, get_args(StorageType))
    wide = _norm_keys(module)

    def stored(key: str, value: Tensor) -> Tensor:
        if value.is_floating_point():
            value = value.to(torch.float32 if key in wide else getattr(torch, dtype))
        return value.detach().cpu().contiguous()

    tensors = {key: stored(key, value) for key, value in module.state_dict().items()}
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise NonFiniteError(
                f"{key} holds values that are not finite in {dtype}; save as float32 or "
                "look for a broken training step"
            )
    return save(tensors, metadata={"format": "pt"})


def write_model(folder: Path, config: dict[str, Any], filename: str, weights: bytes) -> None:
    """Write a model folder; what was made from other weights is removed from it."""
    remove_derived(folder)
    write_atomic(folder / filename, weights)
    write_atomic(folder / CONFIG_FILENAME, (json.dumps(config, indent=2) + "\n").encode())


def current_weights(module: nn.Module, recorded: WeightFile | None) -> WeightFile:
    """The record of a module's weights: `recorded` if it still holds, else that of float32."""
    fresh = WeightFile.of(pack_weights(module))
    if recorded is None:
        return fresh
    digests = [fresh.sha256]
    with contextlib.suppress(NonFiniteError):
        digests.append(WeightFile.of(pack_weights(module, "float16")).sha256)
    return recorded if recorded.sha256 in digests else fresh


def current_spec(module: nn.Module, spec: ModelSpec) -> ModelSpec:
    """A spec as it is true of a module's weights now.

    `weights` is as in `current_weights`. If they changed since a release, the spec no longer
    claims its provenance, and "-changed" is put to its name.
    """
    weights = current_weights(module, spec.weights)
    changes: dict[str, Any] = {"weights": weights}
    if spec.provenance is not None and weights != spec.weights:
        changes |= {"name": spec.name + CHANGED_SUFFIX, "provenance": None}
    return spec.model_copy(update=changes)


def read_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a safetensors file that `pack_weights` made, strictly.

    Raises:
        IntegrityError: If it is no safetensors file.
        WeightsMismatchError: Listing missing, unexpected, misshapen and mistyped tensors.
    """
    check_tensors(read_header(path), expected_tensors(module), str(path))
    try:
        module.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise IntegrityError(f"{path} is no safetensors file: {error}") from error


def expected_tensors(module: nn.Module) -> dict[str, ExpectedTensor]:
    """What a file must hold to fill a module: floats in any type that float32 holds exactly."""
    return {
        key: ExpectedTensor(
            ("F32", "F16", "BF16") if value.is_floating_point() else ("I64",), tuple(value.shape)
        )
        for key, value in module.state_dict().items()
    }


def _norm_keys(backbone: nn.Module) -> set[str]:
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    return {
        f"{name}.{key}"
        for name, module in backbone.named_modules()
        if isinstance(module, norms)
        for key in module.state_dict()
    }
