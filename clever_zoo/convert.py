"""Turn a foreign checkpoint into a model folder."""

from pathlib import Path
from typing import NamedTuple

from clever_zoo.backbones import BACKBONES
from clever_zoo.convert_backbones import FoundBackbone, State, recognise, rename
from clever_zoo.convert_reading import Checkpoint, Heads, Network, read_checkpoint
from clever_zoo.encoder import Encoder, StorageType, expected_tensors
from clever_zoo.errors import BackendMissingError, CheckpointError
from clever_zoo.files import write_atomic
from clever_zoo.spec import ModelSpec, PreprocessSpec
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


class Conversion(NamedTuple):
    """What a checkpoint was, and what became of it.

    Attributes:
        checkpoint: What was read.
        found: The backbone in it.
        spec: Of the written model.
        dropped: How many tensors of each head are not in the model.
        heads: The file that they were written to, None if they were not.
        notes: What else to know.
    """

    checkpoint: Checkpoint
    found: FoundBackbone
    spec: ModelSpec
    dropped: dict[str, int]
    heads: Path | None
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """What to tell a user, one fact per line."""
        spec, source = self.spec, self.checkpoint
        facts = [source.kind, source.network or ""]
        facts.append("" if source.epoch is None else f"epoch {source.epoch}")
        arguments = f" {dict(self.found.model_args)}" if self.found.model_args else ""
        halves = f"{spec.invariant_dim} invariant, {spec.equivariant_dim} equivariant"
        lines = [
            f"found: {', '.join(filter(None, facts))}",
            f"backbone: {self.found.title}, here {spec.backbone}{arguments}",
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
        dtype: Storage type; see `Encoder.save_pretrained`.
        keep_heads: Write the heads to heads.safetensors, under the names that training uses.

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
    encoder = Encoder(
        ModelSpec.create(
            str(path),
            name=folder.resolve().name if name is None else name,
            backbone=found.backbone,
            invariant_dim=_invariant_dim(content, found, invariant_dim, path),
            preprocess={
                "input_size_px": input_size_px or found.model_args.get("img_size", 224),
                "crop_pct": crop_pct,
            },
            model_args=dict(found.model_args),
        )
    )
    notes = [found.note] if found.note else []
    if absent := _fill(encoder, state, path):
        notes.append(f"{absent} counters of batches are not in the file and set to 0")
    heads = None
    if keep_heads and content.heads:
        heads = folder / HEADS_FILENAME
        write_atomic(heads, _packed_heads(content))
    spec = encoder.save_pretrained(folder, dtype=dtype)
    dropped = {name: len(tensors) for name, tensors in content.heads.items()}
    return Conversion(content, found, spec, dropped, heads, tuple(notes))


def _invariant_dim(content: Checkpoint, found: FoundBackbone, asked: int | None, path: Path) -> int:
    """Where the features were cut in training, else where they are asked to be."""
    width = BACKBONES[found.backbone].feature_dim
    trained = _trained_split(content.heads, width, path)
    if trained is None:
        return width if asked is None else asked
    ratio = content.arguments.get("hp1")
    # CLeVER rounds down; DDCL rounds to the nearest, but keeps no arguments.
    if isinstance(ratio, int | float) and not trained <= ratio * width < trained + 1:
        raise CheckpointError(
            f"{path} contradicts itself: its arguments say hp1 = {ratio}, but the invariant head "
            f"reads {trained} of {width} features"
        )
    if asked not in (None, trained):
        raise CheckpointError(
            f"{path} was trained with an invariant_dim of {trained}, not {asked}; leave it out"
        )
    return trained


def _trained_split(heads: Heads, width: int, path: Path) -> int | None:
    """Where two heads cut the features of a width; None without two heads."""
    for first, second, layer in _PAIRS:
        if second not in heads:
            continue
        try:
            cut, rest = (heads[name][layer].shape[1] for name in (first, second))
        except (KeyError, IndexError) as error:
            raise CheckpointError(f"{path}: its heads have no {error}") from error
        if cut + rest != width:
            raise CheckpointError(
                f"{path} contradicts itself: its heads read {cut} and {rest} features, its "
                f"backbone has {width}"
            )
        return cut
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


def _packed_heads(content: Checkpoint) -> bytes:
    """A safetensors file of the heads, named as in the state of training's methods."""
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
