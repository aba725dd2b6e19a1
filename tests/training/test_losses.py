import math

import numpy as np
import pytest
import torch
from torch import nn

from tests import oracles
from training.heads import DinoHead
from training.losses import (
    barlow_twins_loss,
    dino_loss,
    embedding_orthogonality_loss,
    head_balance_loss,
    info_nce_loss,
    negative_cosine_loss,
    nt_xent_loss,
    orthogonality_loss,
    vicreg_loss,
)

SWEEP = [(1, 2, 1, 2), (2, 2, 3, 5), (2, 4, 4, 17), (2, 10, 2, 33), (3, 5, 5, 8)]
TEMPERATURES = {"teacher_temp": 0.04, "student_temp": 0.1}


def logits(rng: np.random.Generator, views: int, batch: int, prototypes: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, 0.2, (views, batch, prototypes)))


@pytest.mark.parametrize(("t", "s", "b", "k"), SWEEP)
@pytest.mark.parametrize("temperatures", [TEMPERATURES, {"teacher_temp": 0.07, "student_temp": 1}])
@pytest.mark.parametrize(
    ("loss", "oracle"),
    [(dino_loss, oracles.dino_loss), (orthogonality_loss, oracles.orthogonality_loss)],
)
def test_matches_the_naive_loops(rng, t, s, b, k, temperatures, loss, oracle) -> None:
    teacher, student, center = (
        logits(rng, t, b, k),
        logits(rng, s, b, k),
        logits(rng, 1, 1, k)[0, 0],
    )
    expected = oracle(teacher.numpy(), student.numpy(), center.numpy(), *temperatures.values())
    actual = loss(teacher, student, center=center, **temperatures)
    assert actual.shape == ()
    assert float(actual) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("t", "s", "b", "k"), SWEEP)
@pytest.mark.parametrize("reduction", ["mean_abs", "abs_mean", "mean_square"])
def test_embedding_orthogonality_matches_the_naive_loops(rng, t, s, b, k, reduction) -> None:
    target, online = logits(rng, t, b, k), logits(rng, s, b, k)
    actual = embedding_orthogonality_loss(online, target, reduction=reduction)
    expected = oracles.embedding_orthogonality(target.numpy(), online.numpy(), reduction)
    assert float(actual) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_embedding_orthogonality_is_the_simsiam_form_for_two_views(rng) -> None:
    p, z = logits(rng, 2, 6, 9), logits(rng, 2, 6, 9)
    half = [torch.cosine_similarity(p[i], z[1 - i], dim=1).mean() / 2 for i in range(2)]
    assert float(embedding_orthogonality_loss(p, z)) == pytest.approx(float(abs(sum(half))))


def test_unknown_reduction_is_refused(rng) -> None:
    x = logits(rng, 2, 2, 3)
    with pytest.raises(ValueError, match=r"'sum'.*mean_abs"):
        embedding_orthogonality_loss(x, x, reduction="sum")  # type: ignore[arg-type]


@pytest.mark.parametrize("local_views", [0, 8])
def test_a_view_never_meets_itself(local_views: int) -> None:
    """Give view 0's teacher a code of its own: only pairs with other students may see it."""
    views = 2 + local_views
    teacher = torch.zeros(2, 1, 2 + views, dtype=torch.float64)
    student = torch.zeros(views, 1, 2 + views, dtype=torch.float64)
    teacher[0, 0, 0] = teacher[1, 0, 1] = 100.0
    student[0, 0, 0] = student[1, 0, 1] = 100.0
    center = torch.zeros(2 + views, dtype=torch.float64)
    loss = orthogonality_loss(teacher, student, center=center, **TEMPERATURES)
    uniform = 1 / (2 + views) ** 0.5
    pairs = 2 * (views - 1)
    assert pairs == (18 if local_views else 2)
    assert float(loss) == pytest.approx(2 * local_views * uniform / pairs, abs=1e-9)


def test_orthogonality_is_one_for_constant_logits_and_stays_in_range(rng) -> None:
    constant = torch.ones(2, 3, 7)
    zero = torch.zeros(7)
    assert float(
        orthogonality_loss(constant, constant, center=zero, **TEMPERATURES)
    ) == pytest.approx(1)
    for scale in (0.01, 1, 50):
        x = torch.from_numpy(rng.normal(0, scale, (4, 3, 7))).float()
        assert 0 <= orthogonality_loss(x[:2], x, center=zero, **TEMPERATURES) <= 1 + 1e-6


@pytest.mark.parametrize("loss", [dino_loss, orthogonality_loss])
def test_only_the_student_gets_a_gradient(rng, loss) -> None:
    teacher, student = logits(rng, 2, 3, 5).requires_grad_(), logits(rng, 4, 3, 5).requires_grad_()
    loss(teacher, student, center=torch.zeros(5), **TEMPERATURES).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_first_values_at_65536_prototypes() -> None:
    """Bottlenecks of cosine c: simulated cross-entropy, closed form of the similarity.

    Prototype scores are Gaussian with standard deviation 1/16, which makes the similarity
    exp(-(a^2 + b^2 - 2abc) / 512) for inverse temperatures a = 25 and b = 10.
    """
    torch.manual_seed(0)
    head = DinoHead(8, prototypes=65536)
    a, b = torch.linalg.qr(torch.randn(16, 256, 2))[0].unbind(2)
    for cosine, cross_entropy in [(1.0, 10.32), (0.9, 10.42), (0.5, 10.80), (0.0, 11.28)]:
        other = cosine * a + (1 - cosine**2) ** 0.5 * b
        with torch.no_grad():
            z = torch.stack([a, other]) @ head.prototypes.T
        arguments = {"center": torch.zeros(65536), **TEMPERATURES}
        assert float(dino_loss(z[:1], z, **arguments)) == pytest.approx(cross_entropy, abs=0.05)
        similarity = math.exp(-(25**2 + 10**2 - 2 * 25 * 10 * cosine) / 512)
        assert float(orthogonality_loss(z[:1], z, **arguments)) == pytest.approx(
            similarity, abs=0.03
        )


@pytest.mark.parametrize(
    ("dims", "expected"),
    [((153, 39), 93), ((307, 77), 188), ((409, 103), 251), ((614, 154), 377), ((1638, 410), 1006)],
)
def test_head_balance_at_initialisation(dims, expected) -> None:
    torch.manual_seed(0)
    heads = [DinoHead(width) for width in dims]
    naive = [
        sum(float((p.detach().double() ** 2).sum()) for p in h.parameters() if p.requires_grad)
        for h in heads
    ]
    loss = head_balance_loss(*heads).item()
    assert loss == pytest.approx(abs(naive[0] - naive[1]), rel=1e-2)
    assert loss == pytest.approx(expected, abs=21)


def test_head_balance_ignores_frozen_gains_and_is_zero_for_equal_norms() -> None:
    torch.manual_seed(0)
    first, second = DinoHead(8, prototypes=16), DinoHead(8, prototypes=16)
    second.load_state_dict(first.state_dict())
    assert head_balance_loss(first, second).item() == 0
    with torch.no_grad():
        second.last_layer.parametrizations.weight.original0.fill_(5.0)
    assert head_balance_loss(first, second).item() == 0
    assert head_balance_loss(nn.Linear(1, 1), nn.Identity()).item() > 0


TWO_VIEW_SWEEP = [(2, 2, 3), (2, 5, 4), (2, 8, 7)]


@pytest.mark.parametrize(("v", "b", "d"), TWO_VIEW_SWEEP)
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_contrastive_losses_match_the_naive_loops(rng, v, b, d, temperature) -> None:
    z, q = logits(rng, v, b, d), logits(rng, v, b, d)
    actual = info_nce_loss(z, q, temperature=temperature)
    assert float(actual) == pytest.approx(
        oracles.info_nce(z.numpy(), q.numpy(), temperature), rel=1e-9
    )
    actual = nt_xent_loss(z, temperature=temperature)
    assert float(actual) == pytest.approx(oracles.nt_xent(z.numpy(), temperature), rel=1e-9)


@pytest.mark.parametrize(("t", "s", "b", "k"), SWEEP)
def test_negative_cosine_matches_the_naive_loops(rng, t, s, b, k) -> None:
    target, online = logits(rng, t, b, k), logits(rng, s, b, k).requires_grad_()
    target.requires_grad_()
    actual = negative_cosine_loss(target, online)
    expected = oracles.negative_cosine(target.detach().numpy(), online.detach().numpy())
    assert actual.item() == pytest.approx(expected, rel=1e-9)
    actual.backward()
    assert target.grad is None


@pytest.mark.parametrize(("v", "b", "d"), TWO_VIEW_SWEEP)
def test_redundancy_losses_match_the_naive_loops(rng, v, b, d) -> None:
    z = 3 * logits(rng, v, b, d)
    actual = barlow_twins_loss(z, off_diagonal_weight=0.05)
    assert float(actual) == pytest.approx(oracles.barlow_twins(z.numpy(), 0.05), rel=1e-9)
    actual = vicreg_loss(z, invariance_weight=25, variance_weight=20, covariance_weight=3)
    assert float(actual) == pytest.approx(oracles.vicreg(z.numpy(), 25, 20, 3), rel=1e-9)


@pytest.mark.parametrize("reduction", ["mean_abs", "abs_mean", "mean_square"])
def test_orthogonality_reductions_of_probabilities(rng, reduction) -> None:
    teacher, student = logits(rng, 2, 4, 9), logits(rng, 3, 4, 9)
    center = torch.zeros(9)
    a = [[oracles.softmax(x / 0.04) for x in view] for view in teacher.numpy()]
    b = [[oracles.softmax(x / 0.1) for x in view] for view in student.numpy()]
    cosines = [
        [oracles.cosine(a[t][i], b[s][i]) for i in range(4)] for t, s in oracles.view_pairs(2, 3)
    ]
    power = 2 if reduction == "mean_square" else 1
    actual = orthogonality_loss(
        teacher, student, center=center, reduction=reduction, **TEMPERATURES
    )
    assert float(actual) == pytest.approx(float(np.mean(np.power(cosines, power))), rel=1e-9)


def test_both_sides_get_a_gradient_where_there_is_no_target(rng) -> None:
    online, target = (logits(rng, 2, 3, 5).requires_grad_() for _ in range(2))
    embedding_orthogonality_loss(online, target, detach_target=False).backward()
    assert target.grad is not None
    assert target.grad.abs().sum() > 0


def test_head_balance_options() -> None:
    torch.manual_seed(0)
    heads = [DinoHead(width, prototypes=16, hidden_dim=4, bottleneck_dim=3) for width in (9, 5)]
    everything = [[p for p in h.parameters() if p.requires_grad] for h in heads]
    perceptrons = [list(h.mlp.parameters()) for h in heads]
    for scope, groups in (("all", everything), ("mlp", perceptrons)):
        for normalize in (False, True):
            sums = [sum(float(p.square().sum()) for p in group) for group in groups]
            if normalize:
                sums = [s / sum(p.numel() for p in g) for s, g in zip(sums, groups, strict=True)]
            a, b = sums
            expected = {"absolute": abs(a - b), "square": (a - b) ** 2,
                        "log_ratio": math.log(a / b) ** 2}  # fmt: skip
            for shape, value in expected.items():
                loss = head_balance_loss(*heads, scope=scope, normalize=normalize, shape=shape)
                assert float(loss) == pytest.approx(value, rel=1e-4)


def test_half_precision_arguments_are_widened(rng) -> None:
    """float16 scores of size 60 would overflow in a float16 softmax at temperature 0.04."""
    teacher, student = (20 * logits(rng, v, 3, 50).half() for v in (2, 3))
    arguments = {"center": torch.zeros(50), **TEMPERATURES}
    with torch.autocast("cpu", torch.bfloat16):
        low = dino_loss(teacher, student, **arguments)
    assert low.dtype == torch.float32
    high = dino_loss(teacher.float(), student.float(), **arguments)
    assert float(low) == float(high)
