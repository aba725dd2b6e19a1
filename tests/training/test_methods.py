"""All methods, plain and wrapped: gradients where they belong, and chunks that change nothing."""

import numpy as np
import pytest
import torch

from clever_zoo.errors import RecipeError
from tests.training.test_pretrain import SMALL, TWO_VIEWS, VIT
from training.config import Recipe, parse_recipe
from training.methods import METHODS
from training.objective import Objective
from training.optimizers import build_optimizer
from training.pretrain import build_views
from training.views import Views

BACKBONES = {"resnet18": {}, "vit_tiny": VIT}
SMALL_HEADS = {"hidden_dim": 16, "output_dim": 8, "bottleneck_dim": 8, "prototypes": 16}
BATCH = 6


def small_recipe(method: str, *, clever: dict | None, backbone: str = "resnet18", **more) -> Recipe:
    allowed = METHODS[method].section.model_fields
    section = {"name": method, **{k: v for k, v in SMALL_HEADS.items() if k in allowed}}
    views = SMALL["views"] if METHODS[method].build.multi_crop else TWO_VIEWS
    content = {**SMALL, "method": section, "clever": clever, "views": views, **BACKBONES[backbone]}
    return parse_recipe(content | more, "test")


def views_of(recipe: Recipe, batch: int = BATCH) -> tuple[Views, np.ndarray]:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (batch, 1, 28, 28), dtype=np.uint8))
    samples = np.arange(batch)
    return build_views(recipe)(images, samples, 0), samples


def gradients(objective: Objective, recipe: Recipe) -> dict[str, torch.Tensor]:
    views, samples = views_of(recipe)
    terms, _ = objective(views, samples, 0)
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backbone", list(BACKBONES))
@pytest.mark.parametrize("clever", [None, {}], ids=["plain", "clever"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_student_tensor_gets_a_gradient_and_no_teacher_tensor(
    method, clever, backbone
) -> None:
    recipe = small_recipe(method, clever=clever, backbone=backbone)
    objective = Objective(recipe)
    got = gradients(objective, recipe).keys()
    trained = {n for n, p in objective.named_parameters() if p.requires_grad}
    assert got == trained
    teachers = {n for n, _ in objective.named_parameters() if "teacher" in n}
    assert bool(teachers) == METHODS[method].build.has_teacher
    assert not teachers & got
    still = {n for n, _ in objective.named_parameters()} - trained - teachers
    assert all(n.endswith("weight.original0") for n in still)
    before = {n: p.clone() for n, p in objective.named_parameters()}
    optimizer = build_optimizer(recipe.optimizer, objective.children())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    objective.end_step(0.9)
    for name, parameter in objective.named_parameters():
        assert parameter.isfinite().all()
        frozen = name.endswith("weight.original0")
        assert torch.equal(parameter, before[name]) == frozen, name


@pytest.mark.parametrize("method", list(METHODS))
def test_orthogonality_leaves_the_invariant_half_alone(method: str) -> None:
    objective = Objective(small_recipe(method, clever={}))
    features = torch.randn(2, BATCH, 512, requires_grad=True)
    terms = objective.method.loss_terms(features.detach(), features, 0)
    terms["orthogonality"].backward()
    assert features.grad is not None
    assert not features.grad[..., :409].any()
    assert features.grad[..., 409:].any()
    assert all(p.grad is None for p in objective.method.invariant.parameters())


def test_plain_methods_have_one_term_and_wrapped_ones_three() -> None:
    for method in METHODS:
        for clever, count in ((None, 1), ({}, 3)):
            recipe = small_recipe(method, clever=clever)
            views, samples = views_of(recipe)
            terms, features = Objective(recipe)(views, samples, 0)
            assert len(terms) == count
            assert features.shape == (len(views.pixels), BATCH, 512)
            assert not features.requires_grad


@pytest.mark.parametrize("reduction", ["mean_abs", "mean_square"])
@pytest.mark.parametrize("size", [1, 4, 6, 9])
def test_chunks_of_images_change_neither_loss_nor_gradient(size: int, reduction) -> None:
    results = []
    for chunk in (None, size):
        section = SMALL["method"] | {"chunk_images": chunk}
        content = SMALL | {"method": section, "clever": {"orthogonality_reduction": reduction}}
        objective = Objective(parse_recipe(content, "test")).double()
        generator = torch.Generator().manual_seed(1)
        target, online = (
            torch.randn(v, 6, 512, generator=generator, dtype=torch.float64) for v in (2, 3)
        )
        online.requires_grad_()
        terms = objective.method.loss_terms(target, online, 0)
        torch.stack(list(terms.values())).sum().backward()
        got = {n: p.grad for n, p in objective.method.named_parameters() if p.grad is not None}
        results.append((terms, {**got, "features": online.grad}))
    (terms, grads), (chunked_terms, chunked_grads) = results
    assert grads.keys() == chunked_grads.keys()
    for name, term in terms.items():
        assert term.item() == pytest.approx(chunked_terms[name].item(), rel=1e-12)
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, chunked_grads[name], rtol=1e-9, atol=1e-14)


def test_head_balance_is_the_mean_over_pairs_of_heads() -> None:
    objective = Objective(small_recipe("simsiam", clever={"head_balance_weight": 1.0}))
    halves = objective.method.invariant, objective.method.equivariant
    norms = [
        [
            sum(float(p.detach().square().sum()) for p in head.parameters())
            for head in half.trained_heads()
        ]
        for half in halves
    ]
    features = torch.randn(2, BATCH, 512)
    balance = objective.method.loss_terms(features, features, 0)["head_balance"].detach()
    expected = np.mean([abs(a - b) for a, b in zip(*norms, strict=True)])
    assert len(norms[0]) == 2
    assert float(balance) == pytest.approx(expected, rel=1e-5)


def test_vicregs_variance_is_a_term_of_its_own() -> None:
    section = {"name": "vicreg", "hidden_dim": 32, "output_dim": 16}
    terms = []
    for extra, clever in (
        ({}, {}),
        ({"equivariant_variance_weight": 2.0}, {}),
        ({"equivariant_variance_weight": 2.0}, {"orthogonality_weight": 0.0}),
        ({"equivariant_variance_weight": 1.0}, {}),
    ):
        content = SMALL | {"method": section | extra, "clever": clever}
        content["views"] = content["views"] | {"local_views": 0}
        method = Objective(parse_recipe(content, "test")).method
        features = torch.randn(2, 8, 512, generator=torch.Generator().manual_seed(0))
        terms.append(method.loss_terms(features, features, 0))
    plain, weighted, alone, half = terms
    assert "equivariant_variance" not in plain
    assert torch.equal(plain["orthogonality"], weighted["orthogonality"])
    assert torch.equal(weighted["equivariant_variance"], alone["equivariant_variance"])
    assert half["equivariant_variance"] > 0
    assert torch.equal(weighted["equivariant_variance"], 2 * half["equivariant_variance"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"equivariant_center": False}}, "equivariant_center is False"),
        ({"method": {"name": "vicreg", "equivariant_variance_weight": 1.0}}, "equivariant half"),
        ({"optimizer": {"fixed_predictor_lr": True}}, "dino has no predictor"),
    ],
)
def test_options_that_change_nothing_are_refused(changes, message: str) -> None:
    content = {key: value for key, value in SMALL.items() if key != "clever"}
    for key, values in changes.items():
        content = content | {key: content.get(key, {}) | values}
    if "name" in changes.get("method", {}):
        content |= {"method": changes["method"], "views": content["views"] | {"local_views": 0}}
    with pytest.raises(RecipeError, match=message):
        parse_recipe(content, "test")


def test_the_equivariant_center_can_be_left_out() -> None:
    terms = []
    for centered in (True, False):
        section = SMALL["method"] | {"equivariant_center": centered}
        method = Objective(parse_recipe(SMALL | {"method": section}, "test")).method
        method.equivariant.center.copy_(torch.linspace(-1, 1, 16))
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(3, 4, 512, generator=generator)
        terms.append(method.loss_terms(features[:2], features, 0)["orthogonality"])
    assert terms[0] != terms[1]
