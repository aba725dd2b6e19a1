"""The transform term's targets against pictures that were really transformed."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from tests.training.test_methods import small_recipe, views_of
from training import pixel_ops
from training.objective import Objective
from training.transform import (
    RunningProbe,
    relative_crop,
    relative_jitter,
    relative_rotation,
)
from training.views import ViewParameters, draw_parameters


def parameters(**values: list[float]) -> ViewParameters:
    count = len(next(iter(values.values())))
    p = draw_parameters(
        "local", 0, np.arange(count), seed=0, epoch=0, style="dino", strength="caug",
        image_size=(64, 64), scale=(0.2, 1.0), size=32,
    )  # fmt: skip
    fields = {k: torch.tensor(v) for k, v in values.items()}
    return ViewParameters(**{**vars(p), **fields})


def as_seen(image: torch.Tensor, p: ViewParameters) -> torch.Tensor:
    return pixel_ops.rotate(image.flip(-1) if p.flip[0] else image, p.angle)


@pytest.mark.parametrize("flips", [(False, False), (True, True), (False, True), (True, False)])
def test_relative_rotation_turns_the_first_view_into_the_second(flips) -> None:
    """Turning (and, with unequal flips, mirroring) view 1 by that angle gives view 2."""
    image = torch.zeros(1, 3, 65, 65)
    image[..., 10:18, 28:50] = 200.0
    image[..., 30:34, 8:20] = 90.0
    first = parameters(angle=[20.0], flip=[flips[0]])
    second = parameters(angle=[-35.0], flip=[flips[1]])
    views = [as_seen(image, p) for p in (first, second)]
    sine, cosine = relative_rotation(first, second)[0]
    degrees = torch.rad2deg(torch.atan2(sine, cosine))[None]
    start = views[0] if flips[0] == flips[1] else views[0].flip(-1)
    turned = pixel_ops.rotate(start, degrees)
    inside = pixel_ops.circular_mask(torch.ones_like(image)) > 0
    assert float((turned - views[1])[inside].abs().mean()) < 4.0
    assert float((start - views[1])[inside].abs().mean()) > 10.0


def test_relative_crop_points_at_the_second_crops_centre() -> None:
    """A dot at the second crop's centre appears in the first view where the target says."""
    for flip, angle in ((False, 0.0), (True, 0.0), (False, 40.0), (True, -70.0)):
        first = parameters(top=[4.0], left=[8.0], height=[40.0], width=[48.0],
                           flip=[flip], angle=[angle])  # fmt: skip
        second = parameters(top=[20.0], left=[30.0], height=[20.0], width=[12.0],
                            flip=[False], angle=[0.0])  # fmt: skip
        image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        image[..., 28:32, 34:38] = 255
        box = (first.top, first.left, first.height, first.width)
        view = pixel_ops.resized_crop(image, torch.stack(box, 1), 96, "bicubic").float()
        view = as_seen(view, first)
        rows, columns = (view[0, 0] > 128).nonzero().float().mean(0) + 0.5
        scale, right, down = relative_crop(first, second)[0]
        assert float(right) == pytest.approx((float(columns) - 48) / 96, abs=0.02)
        assert float(down) == pytest.approx((float(rows) - 48) / 96, abs=0.02)
        assert float(scale) == pytest.approx(0.5 * np.log(20 * 12 / (40 * 48)))


def test_relative_jitter_counts_an_unjittered_view_as_neutral() -> None:
    first = parameters(jitter=[True, False], factors=[[1.4, 0.6, 1.2, 0.1]] * 2)
    second = parameters(jitter=[False, False], factors=[[0.6, 0.6, 0.8, -0.1]] * 2)
    expected = torch.tensor([[-1.0, 1.0, -1.0, -1.0], [0, 0, 0, 0]])
    torch.testing.assert_close(relative_jitter(first, second), expected)


def test_without_weight_the_objective_is_the_papers_to_the_bit() -> None:
    terms = []
    for clever in ({}, {"transform_weight": 0.0, "transform_hidden_dim": 7}):
        recipe = small_recipe("dino", clever=clever)
        views, samples = views_of(recipe)
        terms.append(Objective(recipe)(views, samples, 0)[0])
    assert terms[0].keys() == terms[1].keys() == {"contrastive", "orthogonality", "head_balance"}
    assert all(torch.equal(terms[0][k], terms[1][k]) for k in terms[0])


def test_the_term_teaches_the_equivariant_half_alone() -> None:
    recipe = small_recipe("dino", clever={"transform_weight": 1.0, "transform_hidden_dim": 8})
    objective = Objective(recipe)
    views, _ = views_of(recipe)
    features = torch.randn(3, 6, 512, requires_grad=True)
    objective.transform.loss_terms(features, views.parameters, 0.0)["transform"].backward()
    assert features.grad is not None
    assert not features.grad[..., :409].any()
    assert features.grad[:2, :, 409:].any()


def test_the_probe_reads_what_a_ridge_regression_reads(rng) -> None:
    """The root of its loss is scikit-learn's R^2 on fresh data, and 0 on noise."""
    mixing = torch.from_numpy(rng.normal(size=(3, 20))).float()

    def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        truth = torch.from_numpy(rng.normal(size=(count, 3))).float()
        noise = torch.from_numpy(rng.normal(0, 3, size=(count, 20))).float()
        return truth @ mixing + noise + 5, truth

    probe = RunningProbe(20, 3)
    values = [float(probe(*batch(64))) ** 0.5 for _ in range(400)]
    features, truth = batch(25_600)
    test_features, test_truth = batch(25_600)
    ridge = Ridge(alpha=1.0).fit(features, truth)
    expected = ridge.score(test_features, test_truth)
    assert np.mean(values[200:]) == pytest.approx(expected, abs=0.03)
    noise = RunningProbe(20, 3)
    values = [float(noise(torch.randn(64, 20), torch.randn(64, 3))) for _ in range(400)]
    assert np.mean(values[200:]) < 0.03


def test_the_probes_gradient_makes_features_forget() -> None:
    torch.manual_seed(0)
    truth = torch.randn(64, 2)
    features = torch.cat([truth, torch.randn(64, 6)], dim=1).requires_grad_()
    probe = RunningProbe(8, 2)
    before = probe(features, truth)
    (gradient,) = torch.autograd.grad(before, features)
    changed = (features - 20 * gradient).detach()
    assert before.item() > 0.95
    for column in range(2):
        correlation = np.corrcoef(changed[:, column], truth[:, column])[0, 1]
        assert correlation == pytest.approx(1.0)
        assert changed[:, column].std() < 0.8 * truth[:, column].std()


def test_decorrelation_reaches_the_invariant_half_alone() -> None:
    weights = {"transform_weight": 1.0, "decorrelation_weight": 1.0}
    recipe = small_recipe("dino", clever=weights)
    objective = Objective(recipe)
    views, _ = views_of(recipe)
    features = torch.randn(3, 6, 512, requires_grad=True)
    objective.transform.loss_terms(features, views.parameters, 0.0)["decorrelation"].backward()
    assert features.grad is not None
    assert features.grad[:2, :, :409].any()
    assert not features.grad[..., 409:].any()


def test_the_terms_wait_for_their_first_epoch() -> None:
    weights = {"transform_weight": 1.0, "decorrelation_weight": 1.0, "transform_start_epochs": 0.5}
    recipe = small_recipe("dino", clever=weights)
    objective = Objective(recipe)
    views, _ = views_of(recipe)
    features = torch.randn(3, 6, 512)
    for epoch, on in ((0.49, False), (0.5, True), (7.0, True)):
        terms = objective.transform.loss_terms(features, views.parameters, epoch)
        assert terms.keys() == {"transform", "decorrelation"}
        assert all((term.item() > 0) == on for term in terms.values())
