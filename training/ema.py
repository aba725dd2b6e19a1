"""The teacher: a copy of the student that follows it slowly."""

import copy

import torch
from torch import nn


def frozen_copy(student: nn.Module) -> nn.Module:
    """A copy that starts equal and takes no gradient.

    It stays in training mode, as in the reference: its batch-norm layers use the statistics of
    their batch and keep running ones of their own.
    """
    teacher = copy.deepcopy(student)
    return teacher.requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move every teacher parameter: ``teacher = momentum * teacher + (1 - momentum) * student``.

    Buffers are left alone: the teacher keeps its own batch-norm statistics.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
