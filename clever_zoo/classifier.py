"""An encoder with a linear head, for fine-tuning: `create_classifier`."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from clever_zoo.ahead import usable_cores
from clever_zoo.backbones import BACKBONES
from clever_zoo.embedding import Part, Predictions
from clever_zoo.encoder import (
    Encoder,
    StorageType,
    evaluating,
    from_pretrained,
    pack_weights,
    read_weights,
    usable_device,
    write_model,
)
from clever_zoo.errors import BackendMissingError, SpecError, WeightsMismatchError
from clever_zoo.hub import HubOptions
from clever_zoo.locate import describes_classifier, locate_classifier
from clever_zoo.preprocess import ImageInput, pixel_batches
from clever_zoo.spec import CLASSIFIER_KEY, ClassifierSpec, WeightFile
from clever_zoo.upload import PushToHub

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise BackendMissingError(
        f'{error.name} is not installed: pip install "clever-zoo[torch]"'
    ) from error

NAME_SUFFIX = "-classifier"
HEAD_STD = 0.01


class Classifier(nn.Module, PushToHub):
    """Pixels to logits; made by `create_classifier` or `Classifier.from_pretrained`.

    Args:
        spec: What the head reads and how many classes it tells apart.
        encoder: Taken as it is, not copied; None builds one with random weights.
        freeze_encoder: Keep the encoder as it is: no gradients, and always evaluation mode.

    Attributes:
        encoder: The `Encoder`.
        head: nn.Linear from the part to C logits.
        part: "full", "invariant" or "equivariant".
        class_names: Name of each class, or None.
        freeze_encoder: Whether `train` leaves the encoder in evaluation mode.

    Source: weight N(0, 0.01) and bias 0, as in the authors' ``eval_linear.py``. Their ViT
    classifiers read the [CLS] tokens of four blocks; this one reads the encoder's own features,
    those of the last block alone (intended difference).
    """

    _loader = "clever_zoo.Classifier.from_pretrained"

    def __init__(
        self, spec: ClassifierSpec, encoder: Encoder | None = None, *, freeze_encoder: bool = False
    ) -> None:
        super().__init__()
        self.encoder = Encoder(spec.encoder) if encoder is None else encoder
        self.part: Part = spec.part
        self.class_names = spec.class_names
        self.head = nn.Linear(spec.width, spec.num_classes)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            self.encoder.requires_grad_(False)
        self.train()

    @property
    def spec(self) -> ClassifierSpec:
        """The frozen description."""
        return ClassifierSpec(
            encoder=self.encoder.spec,
            num_classes=self.head.out_features,
            part=self.part,
            class_names=self.class_names,
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of normalised pixels, differentiably.

        Shapes: (B, 3, H, W) float -> (B, C).

        Raises:
            ShapeError: See `Encoder.forward`.
        """
        return self.head(getattr(self.encoder(pixels), self.part))

    def train(self, mode: bool = True) -> Self:
        """As of any module, but a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def predict(self, images: Iterable[ImageInput], *, batch_size: int = 32) -> Predictions:
        """Classify any number of images, in order.

        Runs in evaluation mode and without gradients whatever mode the module is in.

        Args:
            images: Paths, PIL images or (H, W, 3) uint8 arrays, mixed as you like.
            batch_size: Images per forward pass.

        Raises:
            ImageError: For the first bad image, with its source and index.
            NonFiniteError: If a logit is not finite.
            ShapeError: If `batch_size` is under 1.
        """
        preprocess = self.encoder.spec.preprocess
        logits = [np.zeros((0, self.head.out_features), dtype=np.float32)]
        with evaluating(self), torch.inference_mode():
            for pixels in pixel_batches(images, preprocess, batch_size, threads=usable_cores()):
                logits.append(self(self.encoder.to_tensor(pixels)).float().cpu().numpy())
        return Predictions.of(np.concatenate(logits), self.class_names)

    def parameter_groups(
        self,
        lr: float,
        *,
        encoder_lr: float | None = None,
        layer_decay: float = 1.0,
        weight_decay: float | None = None,
    ) -> list[dict[str, Any]]:
        """The trainable parameters in groups for an optimiser, each with its learning rate.

        Args:
            lr: Learning rate of the head.
            encoder_lr: That of the encoder, before `layer_decay`; None is `lr`.
            layer_decay: A layer that lies d layers below the head learns at
                encoder_lr * layer_decay ** d, with timm's count of layers. 1 gives two groups,
                encoder and head.
            weight_decay: Decay of matrices and convolutions, while biases, other vectors and what
                the backbone's `no_weight_decay` names get 0. None leaves the decay to the
                optimiser, which then applies to everything, as in the published settings.

        Returns:
            Dictionaries with `params`, `lr`, `name`, and `weight_decay` if that was given. Every
            trainable parameter is in one of them; frozen ones are in none.

        Raises:
            SpecError: If `layer_decay` is not in (0, 1].
        """
        if not 0 < layer_decay <= 1:
            raise SpecError(f"layer_decay is {layer_decay}; use a number in (0, 1], 1 for none")
        depths = _layer_depths(self.encoder.backbone) if layer_decay < 1 else {}
        encoder_lr = lr if encoder_lr is None else encoder_lr
        backbone: Any = self.encoder.backbone
        named: set[str] = getattr(backbone, "no_weight_decay", set)()
        spared = {f"encoder.backbone.{name}" for name in named}
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            layer, layer_lr = "head", lr
            if not name.startswith("head."):
                depth = depths.get(name.removeprefix("encoder.backbone."), 0)
                layer, layer_lr = f"encoder -{depth}", encoder_lr * layer_decay**depth
            no_decay = parameter.ndim <= 1 or name in spared
            key = layer, no_decay and weight_decay is not None
            if key not in groups:
                groups[key] = {"name": layer, "params": [], "lr": layer_lr}
                if weight_decay is not None:
                    groups[key]["weight_decay"] = 0.0 if no_decay else weight_decay
            groups[key]["params"].append(parameter)
        return list(groups.values())

    def save_pretrained(
        self, folder: str | Path, *, dtype: StorageType = "float32"
    ) -> ClassifierSpec:
        """Write config.json and model.safetensors; timm and transformers read the folder too.

        Args:
            folder: See `Encoder.save_pretrained`.
            dtype: Storage type, see `Encoder.save_pretrained`.

        Returns:
            The spec with the size and digest of the written file.

        Raises:
            SpecError: For another storage type.
            NonFiniteError: If a value does not fit the storage type.
        """
        content = pack_weights(self.stored_module(), dtype)
        weights = WeightFile.of(content)
        encoder = self.encoder.spec.model_copy(update={"weights": weights})
        spec = self.spec.model_copy(update={"encoder": encoder})
        write_model(Path(folder), spec.to_config(), weights.filename, content)
        return spec

    def stored_module(self) -> nn.Module:
        """What `save_pretrained` writes: a copy of the backbone with the head where timm has it."""
        return self._timm_module()[0]

    def _timm_module(self) -> tuple[nn.Module, nn.Linear]:
        """A copy of the backbone with the head where timm has it, and that head, (C, D)."""
        spec = self.spec
        full = nn.Linear(spec.encoder.feature_dim, spec.num_classes)
        with torch.no_grad():
            # timm's head reads all features: those of the other half count zero times.
            full.weight.zero_()
            full.weight[:, spec.columns] = self.head.weight.cpu()
            full.bias.copy_(self.head.bias)
        module = copy.deepcopy(self.encoder.backbone)
        module.set_submodule(BACKBONES[spec.encoder.backbone].classifier, full)
        return module, full

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        cache_dir: Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: str = "cpu",
    ) -> Self:
        """Load a classifier that `save_pretrained` wrote, in evaluation mode.

        Args:
            source: A Path or "local-dir:PATH" for a folder; "org/repo" on the Hub.
            revision, cache_dir, local_files_only, token, device: As for `from_pretrained`.

        Raises:
            SpecError: If it is an encoder, or malformed.
            SourceError, UnknownModelError, DownloadError: If it cannot be found.
            IntegrityError, WeightsMismatchError: If its weights are not the recorded ones.
            BackendMissingError: If `device` cannot be used here.
        """
        target = usable_device(device)
        options = HubOptions(revision, cache_dir, local_files_only, token)
        spec, weights = locate_classifier(source, options)
        return cls.load(spec, weights).to(target).eval()

    @classmethod
    def load(cls, spec: ClassifierSpec, weights: Path) -> Self:
        """Build a classifier and fill it from a weights file, in float32, strictly.

        Raises:
            IntegrityError: If it is no safetensors file.
            WeightsMismatchError: Listing missing, unexpected and misshapen tensors; or if the
                head reads features outside its part.
        """
        classifier = cls(spec)
        module, full = classifier._timm_module()
        read_weights(module, weights)
        other = full.weight.detach().clone()
        other[:, spec.columns] = 0
        if other.any():
            problem = (
                f"the head reads features outside the {spec.part} part; set "
                f"{CLASSIFIER_KEY}.part to 'full', or save the classifier again"
            )
            raise WeightsMismatchError(str(weights), wrong=[problem])
        with torch.no_grad():
            classifier.head.weight.copy_(full.weight[:, spec.columns])
            classifier.head.bias.copy_(full.bias)
        module.set_submodule(BACKBONES[spec.encoder.backbone].classifier, nn.Identity())
        classifier.encoder.backbone = module
        return classifier


def load_model(source: str | Path, *, device: str = "cpu", **hub: Any) -> "Encoder | Classifier":
    """Load an encoder or a classifier, whichever the source describes, in evaluation mode.

    Args:
        source: See `clever_zoo.from_pretrained`.
        device: Where to put it.
        **hub: revision, cache_dir, local_files_only and token.

    Raises:
        UnknownModelError, SourceError, SpecError, DownloadError, IntegrityError: See
            `clever_zoo.from_pretrained`.
    """
    is_classifier = describes_classifier(source, HubOptions(**hub))
    load = Classifier.from_pretrained if is_classifier else from_pretrained
    return load(source, device=device, **hub)


def _layer_depths(backbone: nn.Module) -> Mapping[str, int]:
    """How many layers each parameter lies below the head: 1 for the last layer, and so on."""
    from timm.models import group_parameters

    matcher: Any = backbone.group_matcher
    layers = group_parameters(backbone, matcher(coarse=False), reverse=True)
    top = max(layers.values()) + 1
    return {name: top - layer for name, layer in layers.items()}


def create_classifier(
    source: str | Path | Encoder,
    num_classes: int,
    *,
    part: Part = "full",
    freeze_encoder: bool = False,
    class_names: Sequence[str] | None = None,
) -> Classifier:
    """Put a new linear head on an encoder; the result is in training mode.

    Args:
        source: As for `from_pretrained`, or an `Encoder`. It is copied: the caller's own keeps
            its weights. Inside the classifier its name ends in "-classifier" and it has no
            provenance, because training makes it another one than was released.
        num_classes: Number of classes C, at least 2.
        part: What the head reads; "invariant" ignores how a picture was seen.
        freeze_encoder: Train the head alone.
        class_names: Name of each class; saved, and returned by `Classifier.predict`.

    Raises:
        SpecError: If the classes or the part do not fit.
        UnknownModelError, SourceError, DownloadError, IntegrityError: See `from_pretrained`.

    Example: ``create_classifier("clever-resnet18", 10, part="invariant", freeze_encoder=True)``
    """
    if isinstance(class_names, str):
        raise SpecError(f"class_names is the text {class_names!r}; pass a list of names")
    given = source if isinstance(source, Encoder) else from_pretrained(source)
    name = given.spec.name.removesuffix(NAME_SUFFIX) + NAME_SUFFIX
    changes = {"name": name, "provenance": None, "weights": None}
    spec = ClassifierSpec.create(
        "classifier",
        encoder=given.spec.model_copy(update=changes).model_dump(mode="json"),
        num_classes=num_classes,
        part=part,
        class_names=None if class_names is None else list(class_names),
    )
    encoder = Encoder(spec.encoder, copy.deepcopy(given.backbone))
    device = next(encoder.parameters()).device
    return Classifier(spec, encoder, freeze_encoder=freeze_encoder).to(device)
