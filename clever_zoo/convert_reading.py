"""Read a foreign checkpoint: safely, and apart into backbone and heads.

Of a pickle nothing is loaded but tensors, plain containers and the few types named here; a file
with anything else is refused, and nothing of it has run.
"""

import argparse
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from clever_zoo.convert_backbones import State
from clever_zoo.errors import BackendMissingError, CheckpointError
from clever_zoo.weights import read_header

try:
    import torch
    from safetensors.torch import load_file
    from torch import Tensor, nn
except ImportError as error:
    raise BackendMissingError(
        f'{error.name} is not installed: pip install "clever-zoo[torch]"'
    ) from error

Heads = dict[str, State]
Network = Literal["teacher", "student"]
NETWORKS: tuple[Network, ...] = ("teacher", "student")
# Kinds of files that anybody's code may have written, with any preprocessing.
_GENERAL_KINDS = ("training run", "classifier", "backbone alone")
# Where else a state dict may be; the first one that is there.
_CONTAINERS = ("state_dict_model", "state_dict", "model")
_WRAPPERS = ("module.", "backbone.", "encoder.")
_HEAD = re.compile(
    r"(head2?|head_dist|fc|classifier\.head|linear|projector(?:_img|_aug)?|predictor(?:_img|_aug)?)\."
)


class Checkpoint(NamedTuple):
    """A foreign checkpoint.

    Attributes:
        kind: What wrote it, in words.
        network: Which of the two networks of a pre-training run was taken, else None.
        epoch: The epoch it records, else None.
        arguments: Those of the run, by name; may be empty.
        backbone: The backbone's tensors, without wrappers' prefixes.
        heads: All other tensors of the network, likewise, by the name of their head.
        centers: The centres of a pre-training run's teacher scores; may be empty.
    """

    kind: str
    network: Network | None
    epoch: int | None
    arguments: dict[str, Any]
    backbone: State
    heads: Heads
    centers: State

    @property
    def tells_preprocessing(self) -> bool:
        """Whether what wrote it is known, and with that what it normalised pixels by."""
        return self.kind not in _GENERAL_KINDS


class _Ignored:
    """Stands in for an object of another library whose content is not needed."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_ALLOWED: list[Any] = [
    argparse.Namespace,  # the authors' checkpoints hold their arguments
    (OrderedDict, "yacs.config.CfgNode"),  # VMamba's hold their configuration, a dictionary
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
    (_Ignored, "numpy.dtype"),
]
# What reading a damaged file can raise in torch, besides refusing a type.
_DAMAGED = (
    *(RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError),
    *(ImportError, MemoryError, ArithmeticError, OSError, struct.error, RecursionError),
)


def read_checkpoint(path: Path, network: Network | None = None) -> Checkpoint:
    """Read a .pth, .pt, .pth.tar or .safetensors file.

    Args:
        path: The file.
        network: Of a pre-training run; None: the teacher.

    Raises:
        CheckpointError: If it cannot be read, holds anything but tensors and plain values, no
            such network, or no backbone.
        IntegrityError: If it ends in .safetensors and is none.
    """
    content = _load(path)
    container, state = _find_state(content, network, path)
    backbone, heads = _split_state(state, path)
    if container == "state_dict_model" and isinstance(content.get("state_dict"), Mapping):
        heads |= _split_state(_tensors(content["state_dict"], path), path)[1]
    if not backbone:
        raise CheckpointError(
            f"{path} has no backbone, only {' and '.join(heads) or 'nothing'}: a linear "
            "classifier's file; convert the checkpoint that it was trained on"
        )
    arguments, epoch = content.get("args"), content.get("epoch")
    losses = content.get("dino_loss")
    return Checkpoint(
        kind=_kind(container, heads),
        network=container if container in NETWORKS else None,
        epoch=epoch if type(epoch) is int else None,
        arguments=vars(arguments) if isinstance(arguments, argparse.Namespace) else {},
        backbone=backbone,
        heads=heads,
        centers=_tensors(losses, path) if isinstance(losses, Mapping) else {},
    )


def _load(path: Path) -> Mapping[Any, Any]:
    """The content of a file: a dictionary of tensors and plain values."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint")
    if path.suffix == ".safetensors":
        read_header(path)
        return load_file(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load the file without this protection.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"holds {found[1]}" if found else "is damaged or holds more than tensors"
        raise CheckpointError(
            f"{path} {reason}; only tensors, plain containers and argparse.Namespace are loaded, "
            "because anything else can run code. Nothing of it was run; if you trust the file, "
            "save its state dict alone"
        ) from error
    except _DAMAGED as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it is damaged or no "
            "PyTorch checkpoint, fetch it again"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}; expected a dictionary of tensors, or one "
            f"that has it under {', '.join((*NETWORKS, *_CONTAINERS))}"
        )
    return content


def _find_state(
    content: Mapping[Any, Any], network: Network | None, path: Path
) -> tuple[str, State]:
    """Where the state dict is, "" for the file itself, and what it holds."""
    there = [key for key in NETWORKS if isinstance(content.get(key), Mapping)]
    if there:
        chosen = network or "teacher"
        if chosen not in there:
            raise CheckpointError(f"{path} has no {chosen}; it has a {there[0]}, ask for that")
        return chosen, _tensors(content[chosen], path)
    if network:
        raise CheckpointError(
            f"{path} is no pre-training run's checkpoint, so it has no {network}; leave that out"
        )
    for key in _CONTAINERS:
        if isinstance(content.get(key), Mapping):
            return key, _tensors(content[key], path)
    return "", _tensors(content, path)


def _tensors(state: Mapping[Any, Any], path: Path) -> State:
    """The same dictionary, if it is one of plain tensors by name."""
    for key, value in state.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise CheckpointError(
                f"{path}: {key!r} is no plain tensor but {type(value).__name__}; expected a state "
                f"dict, or a dictionary that has one under {', '.join((*NETWORKS, *_CONTAINERS))}"
            )
    return {key: value.detach() for key, value in state.items()}


def _is_plain(value: Any) -> bool:
    """Whether it is a dense tensor in memory, and not a small one that claims to be large."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _split_state(state: State, path: Path) -> tuple[State, Heads]:
    """Apart into backbone and heads, both without the prefixes of wrappers."""
    backbone: State = {}
    heads: Heads = {}
    for key, value in state.items():
        plain = key
        for wrapper in _WRAPPERS:
            plain = plain.removeprefix(wrapper)
        found = _HEAD.match(plain)
        target, name = (
            (heads.setdefault(found[1], {}), plain[found.end() :]) if found else (backbone, plain)
        )
        if name in target:
            raise CheckpointError(f"{path} has {key!r} twice, with and without a wrapper's prefix")
        target[name] = value
    return backbone, heads


def _kind(container: str, heads: Heads) -> str:
    if container in NETWORKS:
        return "CLeVER pre-training run" if "head2" in heads else "DINO pre-training run"
    if container == "state_dict_model":
        return "CLeVER fine-tuning run"
    if "projector_img" in heads:
        return "DDCL pre-training run"
    if "predictor" in heads:
        return "SimSiam pre-training run"
    if container:
        return "training run"
    return "classifier" if heads else "backbone alone"
