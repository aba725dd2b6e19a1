"""Diagnostics against their definitions in plain loops, and at their extremes."""

import math

import numpy as np
import pytest
import torch

from clever_zoo.errors import DataError, NonFiniteError, ShapeError
from training.diagnostics import assignment_entropy, effective_rank, feature_std, usage_entropy


def entropy(values) -> float:
    return -sum(v * math.log(v) for v in values if v > 0)


def test_feature_std_is_its_definition(rng) -> None:
    x = rng.normal(size=(7, 5)) + 1
    unit = [row / math.sqrt(sum(v * v for v in row)) for row in x]
    spreads = []
    for j in range(5):
        column = [row[j] for row in unit]
        mean = sum(column) / 7
        spreads.append(math.sqrt(sum((v - mean) ** 2 for v in column) / 7))
    expected = math.sqrt(5) * sum(spreads) / 5
    assert feature_std(torch.tensor(x)) == pytest.approx(expected, rel=1e-12)
    assert feature_std(torch.tensor(x * 100)) == pytest.approx(expected, rel=1e-12)


def test_feature_std_is_one_on_a_sphere_and_zero_at_a_point() -> None:
    both_signs = torch.cat([torch.eye(8), -torch.eye(8)])
    assert feature_std(both_signs) == pytest.approx(1, rel=1e-12)
    assert feature_std(torch.full((9, 8), 0.3)) == pytest.approx(0, abs=1e-12)
    sphere = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert feature_std(sphere) == pytest.approx(1, abs=0.01)


def test_effective_rank_is_its_definition(rng) -> None:
    x = rng.normal(size=(9, 4)) * [4, 2, 1, 0.5]
    centred = x - x.mean(0)
    singular = np.sqrt(np.linalg.eigvalsh(centred.T @ centred))
    expected = math.exp(entropy(singular / singular.sum()))
    assert effective_rank(torch.tensor(x)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_effective_rank_counts_directions(dtype: torch.dtype) -> None:
    simplex = torch.eye(6, dtype=dtype)  # five equal directions around its mean
    assert effective_rank(simplex) == pytest.approx(5, rel=1e-6)
    line = torch.arange(10, dtype=dtype)[:, None] * torch.tensor([1, 2, 4], dtype=dtype)
    assert effective_rank(line) == pytest.approx(1, rel=1e-6)
    constant = torch.full((100, 7), 0.1, dtype=dtype)
    assert effective_rank(constant) == 1.0
    assert effective_rank(constant[:1]) == 1.0


def test_effective_rank_of_rounding_errors_is_one() -> None:
    noise = torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    rows = torch.full((64, 32), 0.7) + noise * torch.finfo(torch.float32).eps
    assert rows.unique().numel() > 1
    assert effective_rank(rows) == 1.0
    assert effective_rank(rows.double()) > 20


def test_entropies_are_their_definitions(rng) -> None:
    p = rng.dirichlet([0.3] * 6, size=11)
    usage = entropy([sum(p[i][k] for i in range(11)) / 11 for k in range(6)]) / math.log(6)
    assignment = sum(entropy(row) for row in p) / 11 / math.log(6)
    assert usage_entropy(torch.tensor(p)) == pytest.approx(usage, rel=1e-12)
    assert assignment_entropy(torch.tensor(p)) == pytest.approx(assignment, rel=1e-12)


def test_entropies_at_their_extremes() -> None:
    decided, uniform = torch.eye(5), torch.full((3, 5), 0.2)
    one_prototype = torch.eye(5)[[2, 2, 2]]
    assert usage_entropy(decided) == pytest.approx(1)
    assert assignment_entropy(decided) == 0
    assert usage_entropy(uniform) == pytest.approx(1)
    assert assignment_entropy(uniform) == pytest.approx(1)
    assert usage_entropy(one_prototype) == 0


def test_no_gradient_and_half_precision() -> None:
    logits = torch.randn(8, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert isinstance(feature_std(logits), float)
    exact, rounded = (usage_entropy(logits.to(t).softmax(1)) for t in (torch.float, torch.bfloat16))
    assert rounded == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("function", [feature_std, effective_rank, usage_entropy])
def test_bad_input_is_named(function) -> None:
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        function(torch.ones(4))
    with pytest.raises(ShapeError, match=r"\(4, 0\)"):
        function(torch.ones(4, 0))
    with pytest.raises(NonFiniteError):
        function(torch.tensor([[1.0, float("nan")]]))


def test_logits_are_no_probabilities() -> None:
    with pytest.raises(DataError, match="softmax"):
        usage_entropy(torch.tensor([[3.0, -1.0]]))
    with pytest.raises(DataError, match="softmax"):
        assignment_entropy(torch.tensor([[0.5, 0.2]]))
