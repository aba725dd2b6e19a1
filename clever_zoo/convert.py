"""Turn a foreign checkpoint into a model folder."""

from pathlib import Path
from typing import NamedTuple

from clever_zoo.backbones import BACKBONES
from clever_zoo.convert_backbones import State, recognise, rename
from clever_zoo.convert_reading import Checkpoint, Network, read_checkpoint
from clever_zoo.embedding import default_cut
from clever_zoo.encoder import Encoder, StorageType, expected_tensors
from clever_zoo.errors import BackendMissingError, CheckpointError
from clever_zoo.files import write_atomic
from clever_zoo.spec import IMAGENET_MEAN, IMAGENET_STD, ModelSpec, PreprocessSpec
from clever_zoo.weights import StoredTensor, check_tensors

try:
    import torch
    from safetensors.torch import save
except ImportError as error:
    raise BackendMissingError(
        f'{error.name} is not installed: pip install "clever-zoo[torch]"'
    ) from error

HEADS_FILENAME = "heads.safetensors"
_COUNTER = "num_batches_tracked"
_STORED_AS = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    torch.int64: "I64",
}
# Two heads side by side, on the invariant and on the equivariant half.
_PAIRS = (("head", "head2", "mlp.0.weight"), ("projector_img", "projector_aug", "0.weight"))
_PREPROCESSING_NOTE = (
    "the file does not tell how pixels were normalised; where it was not given, ImageNet's mean "
    "and std are assumed, as torchvision, DINO and the CLeVER authors use. Most ViTs of timm want "
    "mean and std 0.5 0.5 0.5 and crop_pct 0.9: see the model's pretrained_cfg in timm"
)

Channels = tuple[float, float, float]


class Conversion(NamedTuple):
    """What a checkpoint was, and what became of it.

    Attributes:
        kind: What wrote it, in words.
        network: Which of the two networks of a pre-training run was taken, else None.
        epoch: The epoch it records, else None.
        title: The backbone's usual name, such as "ViT-Small/16".
        spec: Of the written model.
        dropped: How many tensors of each head are not in the model.
        heads: The file that they were written to, None if they were not.
        notes: What else to know.
    """

    kind: str
    network: Network | None
    epoch: int | None
    title: str
    spec: ModelSpec
    dropped: dict[str, int]
    heads: Path | None
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """What to tell a user, one fact per line."""
        spec = self.spec
        epoch = "" if self.epoch is None else f"epoch {self.epoch}"
        arguments = f" {spec.model_args}" if spec.model_args else ""
        halves = f"{spec.invariant_dim} invariant, {spec.equivariant_dim} equivariant"
        lines = [
            f"found: {', '.join(filter(None, (self.kind, self.network, epoch)))}",
            f"backbone: {self.title}, here {spec.backbone}{arguments}",
            f"features: {spec.feature_dim}, {halves}",
        ]
        if self.dropped:
            groups = ", ".join(f"{name} ({count} tensors)" for name, count in self.dropped.items())
            lines.append(f"dropped: {groups}{f', kept in {self.heads}' if self.heads else ''}")
        return [*lines, *(f"note: {note}" for note in self.notes), f"written: {spec.name}"]


def convert_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    name: str | None = None,
    backbone: str | None = None,
    network: Network | None = None,
    invariant_dim: int | None = None,
    input_size_px: int | None = None,
    crop_pct: float = PreprocessSpec().crop_pct,
    mean: Channels | None = None,
    std: Channels | None = None,
    dtype: StorageType = "float32",
    keep_heads: bool = False,
) -> Conversion:
    """Write a model folder from a checkpoint of another code base.

    Reads those of the CLeVER and DDCL authors, DINO, SimSiam, torchvision, timm and VMamba, as
    far as their backbone is one of `list_backbones()`. Nothing in the file is executed.

    Args:
        checkpoint: A .pth, .pt, .pth.tar or .safetensors file.
        folder: Target; see `Encoder.save_pretrained`.
        name: Name of the model; None: that of the folder.
        backbone: What it must be; None: whatever its tensors are.
        network: Of a pre-training run; None: the teacher.
        invariant_dim: Where to cut the features of a checkpoint that does not tell; None: no
            split.
        input_size_px, crop_pct: Of the evaluation transform. None: 224, or the size of a ViT's
            position embeddings.
        mean, std: What it was trained to see pixels normalised by, per RGB channel, on the 0..1
            scale. None: ImageNet's, as the code of all the above but some of timm's models.
        dtype: Storage type; see `Encoder.save_pretrained`.
        keep_heads: Write the heads to heads.safetensors, under the names that training uses.
            False: such a file of an earlier conversion is removed from the folder.

    Raises:
        CheckpointError: If the file cannot be read, holds anything but tensors and plain values,
            no backbone or one that is not here, or contradicts itself or an argument.
        WeightsMismatchError: Listing missing, unexpected, misshapen and mistyped tensors.
        SpecError: If a dimension, a size or the name does not fit.
        NonFiniteError: If a weight is not finite in the storage type.
    """
    path, folder = Path(checkpoint), Path(folder)
    content = read_checkpoint(path, network)
    state = rename(content.backbone)
    found = recognise(state, str(path))
    if backbone not in (None, found.backbone):
        raise CheckpointError(f"{path} holds {found.title}, not {backbone!r}")
    width = BACKBONES[found.backbone].feature_dim
    split = _choose_split(_trained_split(content, width, path), invariant_dim, path)
    size_px = found.model_args.get("img_size", 224) if input_size_px is None else input_size_px
    encoder = Encoder(
        ModelSpec.create(
            str(path),
            name=folder.resolve().name if name is None else name,
            backbone=found.backbone,
            invariant_dim=width if split is None else split,
            preprocess={
                "input_size_px": size_px,
                "crop_pct": crop_pct,
                "mean": IMAGENET_MEAN if mean is None else mean,
                "std": IMAGENET_STD if std is None else std,
            },
            model_args=dict(found.model_args),
        )
    )
    notes = [found.note] if found.note else []
    if split is None:
        notes.append(
            "the file tells of no split, so the equivariant half is empty; if CLeVER trained it, "
            f"give the invariant_dim, {default_cut(width)} by default"
        )
    if None in (mean, std) and not content.tells_preprocessing:
        notes.append(_PREPROCESSING_NOTE)
    if absent := _fill(encoder, state, path):
        notes.append(f"{absent} counters of batches are not in the file and set to 0")
    packed = _packed_heads(content, path) if keep_heads and content.heads else None
    spec = encoder.save_pretrained(folder, dtype=dtype)
    heads = None
    if packed is not None:
        heads = folder / HEADS_FILENAME
        write_atomic(heads, packed)
    return Conversion(
        kind=content.kind,
        network=content.network,
        epoch=content.epoch,
        title=found.title,
        spec=spec,
        dropped={head: len(tensors) for head, tensors in content.heads.items()},
        heads=heads,
        notes=tuple(notes),
    )


def _choose_split(trained: int | None, asked: int | None, path: Path) -> int | None:
    if trained is None:
        return asked
    if asked not in (None, trained):
        raise CheckpointError(
            f"{path} was trained with an invariant_dim of {trained}, not {asked}; leave it out"
        )
    return trained


def _trained_split(content: Checkpoint, width: int, path: Path) -> int | None:
    """Where the features of a width were cut in training; None without two heads."""
    for first, second, layer in _PAIRS:
        if second not in content.heads:
            continue
        try:
            cut, rest = (content.heads[head][layer].shape[1] for head in (first, second))
        except LookupError as error:
            raise CheckpointError(f"{path}: its heads have no {error}") from error
        if cut + rest != width:
            raise CheckpointError(
                f"{path} contradicts itself: its heads read {cut} and {rest} features, its "
                f"backbone has {width}"
            )
        # CLeVER rounds down; DDCL rounds to the nearest, but keeps no arguments.
        ratio = content.arguments.get("hp1")
        if isinstance(ratio, int | float) and not cut <= ratio * width < cut + 1:
            raise CheckpointError(
                f"{path} contradicts itself: its arguments say hp1 = {ratio}, but the invariant "
                f"head reads {cut} of {width} features"
            )
        return cut
    if content.arguments.get("net") == "CLeVER":
        raise CheckpointError(
            f"{path} contradicts itself: its arguments say net = CLeVER, which has two heads, but "
            f"it has only {', '.join(content.heads) or 'the backbone'}; if that is right, save the "
            "state dict alone and give the invariant_dim"
        )
    return None


def _fill(encoder: Encoder, state: State, path: Path) -> int:
    """Load a backbone strictly; returns how many counters were not in the file."""
    expected = expected_tensors(encoder.backbone)
    counters: State = {}
    if not any(key.endswith(_COUNTER) for key in state):  # files from before 2018 have none
        counters = {key: torch.tensor(0) for key in expected if key.endswith(_COUNTER)}
    state = state | counters
    stored = {
        key: StoredTensor(_STORED_AS.get(value.dtype, str(value.dtype)), tuple(value.shape))
        for key, value in state.items()
    }
    check_tensors(stored, expected, str(path))
    encoder.backbone.load_state_dict(state)
    return len(counters)


def _packed_heads(content: Checkpoint, path: Path) -> bytes:
    """A safetensors file of the heads, named as in the state of training's methods."""
    for head, state in content.heads.items():
        for key, value in state.items():
            if value.dtype not in _STORED_AS:
                raise CheckpointError(
                    f"{path}: {head}.{key} is {value.dtype}; heads are kept in "
                    f"{', '.join(map(str, _STORED_AS))}, so convert it without them"
                )
    first = "invariant." if "head2" in content.heads else ""
    names = {
        "projector_img": "invariant.projector",
        "predictor_img": "invariant.predictor",
        "projector_aug": "equivariant.projector",
        "predictor_aug": "equivariant.predictor",
    }
    if content.network:
        names |= {
            "head": f"{first}{content.network}_head",
            "head2": f"equivariant.{content.network}_head",
        }
    if "predictor" in content.heads:
        names["fc"] = "projector"  # SimSiam puts it where the backbone had its classifier
    tensors = {
        f"{names.get(head, head)}.{_parametrized(key)}": value.clone().contiguous()
        for head, state in content.heads.items()
        for key, value in state.items()
    }
    for key, prefix in (("center", first), ("center2", "equivariant.")):
        if key in content.centers:
            tensors[f"{prefix}center"] = content.centers[key].flatten().clone()
    return save(tensors, metadata={"format": "pt"})


def _parametrized(key: str) -> str:
    """The name of a weight-normalised layer's tensors in present PyTorch."""
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        key = key.replace(f".{old}", f".parametrizations.weight.{new}")
    return key
