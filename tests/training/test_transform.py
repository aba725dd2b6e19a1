"""The transform term's targets against pictures that were really transformed."""

import numpy as np
import pytest
import torch

from tests.training.test_methods import small_recipe, views_of
from training import pixel_ops
from training.objective import Objective
from training.transform import (
    alignment_loss,
    relative_crop,
    relative_jitter,
    relative_rotation,
    transform_loss,
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
    torch.testing.assert_close(relative_jitter(first, second, "dino"), expected)


def test_without_weight_the_objective_is_the_papers_to_the_bit() -> None:
    terms = []
    for clever in ({}, {"transform_weight": 0.0, "transform_hidden_dim": 7}):
        recipe = small_recipe("dino", clever=clever)
        views, samples = views_of(recipe)
        terms.append(Objective(recipe)(views, samples, 0)[0])
    assert terms[0].keys() == terms[1].keys() == {"contrastive", "orthogonality", "head_balance"}
    assert all(torch.equal(terms[0][k], terms[1][k]) for k in terms[0])


def test_twice_the_weight_is_twice_the_term() -> None:
    weights = ("orthogonality", "head_balance", "transform", "alignment")
    found = []
    for doubled in (None, *weights):
        clever = {f"{name}_weight": 0.6 if name == doubled else 0.3 for name in weights}
        recipe = small_recipe("dino", clever=clever)
        objective = Objective(recipe)
        with torch.no_grad():  # equal heads have no difference to weigh
            next(objective.method.equivariant.parameters()).mul_(2)
        views, samples = views_of(recipe)
        found.append({k: v.item() for k, v in objective(views, samples, 0)[0].items()})
    plain, *others = found
    for name, terms in zip(weights, others, strict=True):
        assert plain[name] > 0
        for term, value in terms.items():
            expected = plain[term] * (2 if term == name else 1)
            assert value == pytest.approx(expected, rel=1e-5), (name, term)


def test_the_term_teaches_the_equivariant_half_alone() -> None:
    recipe = small_recipe("dino", clever={"transform_weight": 1.0, "transform_hidden_dim": 8})
    objective = Objective(recipe)
    views, _ = views_of(recipe)
    features = torch.randn(3, 6, 512, requires_grad=True)
    objective.transform.loss_terms(features, views.parameters, 0.0)["transform"].backward()
    assert features.grad is not None
    assert not features.grad[..., :409].any()
    assert features.grad[:2, :, 409:].any()


def test_alignment_is_one_minus_the_mean_correlation(rng) -> None:
    first, second = rng.normal(2, 5, size=(2, 30, 4))
    second = second + 3 * first
    correlations = [np.corrcoef(first[:, d], second[:, d])[0, 1] for d in range(4)]
    loss = alignment_loss(torch.from_numpy(np.stack([first, second])))
    assert float(loss) == pytest.approx(1 - np.mean(correlations), abs=1e-5)
    scaled = alignment_loss(torch.from_numpy(np.stack([0.01 * first + 7, 100 * second])))
    assert float(scaled) == pytest.approx(float(loss), abs=5e-3)


def test_alignment_reaches_the_invariant_half_alone() -> None:
    recipe = small_recipe("dino", clever={"transform_weight": 1.0, "alignment_weight": 1.0})
    objective = Objective(recipe)
    views, _ = views_of(recipe)
    features = torch.randn(3, 6, 512, requires_grad=True)
    objective.transform.loss_terms(features, views.parameters, 0.0)["alignment"].backward()
    assert features.grad is not None
    assert features.grad[:2, :, :409].any()
    assert not features.grad[..., 409:].any()


def test_the_prediction_error_matches_a_naive_loop() -> None:
    recipe = small_recipe("dino", clever={"transform_weight": 1.0})
    views, _ = views_of(recipe, batch=40)
    first, second = views.parameters[:2]
    prediction = torch.randn(40, 10)
    rotation, crop = relative_rotation(first, second), relative_crop(first, second)
    jitter = relative_jitter(first, second, "dino")
    totals = np.zeros(4)
    for i, p in enumerate(prediction):
        logit, same = float(p[2]), float(first.flip[i] == second.flip[i])
        share = 1 / (1 + np.exp(-logit))
        grey = bool(first.grayscale[i] or second.grayscale[i])
        totals += [
            float((p[:2] - rotation[i]).square().mean()),
            -np.log(share if same else 1 - share),
            float((p[3:6] - crop[i]).square().mean()),
            sum(float(p[6 + k] - jitter[i, k]) ** 2 for k in range(2 if grey else 4)) / 4,
        ]
    assert bool((first.grayscale | second.grayscale).any())
    loss = transform_loss(prediction, first, second, style="dino")
    assert float(loss) == pytest.approx(float((totals / 40).mean()), rel=1e-4)


def test_the_transform_waits_for_its_first_epoch() -> None:
    weights = {"transform_weight": 1.0, "alignment_weight": 1.0, "transform_start_epochs": 0.5}
    recipe = small_recipe("dino", clever=weights)
    objective = Objective(recipe)
    views, _ = views_of(recipe)
    features = torch.randn(3, 6, 512)
    for epoch, on in ((0.49, False), (0.5, True), (7.0, True)):
        terms = objective.transform.loss_terms(features, views.parameters, epoch)
        assert terms.keys() == {"transform", "alignment"}
        assert (terms["transform"].item() > 0) == on
        assert terms["alignment"].item() > 0
