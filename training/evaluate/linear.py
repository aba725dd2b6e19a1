"""Linear probes of frozen features, under two protocols that are never mixed.

`fit_cached`, the everyday one: the features of the centre crops are computed once, and a logistic
regression on them is solved to convergence. `fit_reference`, the published one: new crops at every
epoch, SGD, a fixed number of epochs.

*Last* is the probe after the last epoch; no test label has a part in it. *Best* is the best epoch
on the test images themselves, as the published tables report it, so it flatters; everything that
prints it says so.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from clever_zoo.encoder import usable_device
from clever_zoo.errors import DataError, NonFiniteError, ShapeError
from training.evaluate.inputs import Features
from training.evaluate.scores import check_labels, top_k
from training.schedules import cosine
from training.views import crop_and_flip

GRADIENT_TOLERANCE = 1e-5
MAX_STEPS = 5000
MOMENTUM = 0.9
INITIAL_STD = 0.01
_LEAST_SPREAD = 0.01  # axes that vary less are not stretched further
_CHUNK_ROWS = 2048

Slice = Callable[[Tensor], Tensor]  # features (B, D) -> what one probe reads of them (B, d)


class LinearProbe(NamedTuple):
    """A linear classifier of standardised features, on the CPU.

    Attributes:
        weight, bias: (C, D) and (C,) float32.
        mean, std: Of the training features, (D,) float32; 0 and 1 where they are taken as is.
        converged: Whether the solver reached its tolerance; None where the number of epochs ends
            the training.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    converged: bool | None = None

    def scores(self, features: Tensor) -> Tensor:
        """Logits (N, C) of features (N, D)."""
        return F.linear((features - self.mean) / self.std, self.weight, self.bias)


class ReferenceProbe(NamedTuple):
    """What `fit_reference` gives for one slice.

    Attributes:
        probe: After the last epoch.
        top1: On the test images after each epoch, percent; empty without test images.
    """

    probe: LinearProbe
    top1: tuple[float, ...]

    @property
    def best_epoch(self) -> int:
        """The first epoch with the highest `top1`, from 1; the test images chose it."""
        return self.top1.index(max(self.top1)) + 1

    def __str__(self) -> str:
        if not self.top1:
            return "no test images"
        return (
            f"last {self.top1[-1]:.1f} % (epoch {len(self.top1)}), best {max(self.top1):.1f} % "
            f"(epoch {self.best_epoch}, chosen on the test images)"
        )


def fit_cached(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    penalty: float = 1.0,
    device: str | torch.device = "cpu",
) -> LinearProbe:
    """Multinomial logistic regression on standardised features, solved to convergence.

    Minimises the mean cross-entropy plus ``penalty / 2N`` times the squared weights (not the
    bias), the objective of scikit-learn's ``LogisticRegression(C=1 / penalty)``. The one minimum
    is found without randomness, so there is no best epoch, only a last one.

    Args:
        features: (N, D) float; a constant one is left out of the decision.
        labels: (N,) int64 in 0..classes-1.
        classes: C.
        penalty: Above 0, else separable classes have no minimum.
        device: Where to compute.

    Returns:
        The probe; `converged` is False if a gradient above `GRADIENT_TOLERANCE` was left after
        `MAX_STEPS` steps.

    Raises:
        ShapeError: If there are not as many labels as features.
        DataError: For fewer than two images or classes, or labels that do not fit.
        NonFiniteError: If a feature or the loss is not finite.
    """
    _check_training(features, labels, classes)
    if features.ndim != 2 or not features.shape[1]:
        raise ShapeError(f"features have shape {tuple(features.shape)}; pass (N, D) with D >= 1")
    if penalty <= 0:
        raise DataError(f"penalty is {penalty}; use a number above 0, such as 1.0")
    _check_finite(features, np.arange(len(features)))
    target = usable_device(device)
    mean, std = _moments(features)
    weight, bias, gradient = _solve(
        *(t.to(target) for t in (features, labels, mean.double(), std.double())),
        classes=classes,
        penalty=penalty,
    )
    converged = gradient <= GRADIENT_TOLERANCE
    return LinearProbe(weight.float().cpu(), bias.float().cpu(), mean, std, converged)


def _solve(
    x: Tensor, y: Tensor, mean: Tensor, std: Tensor, *, classes: int, penalty: float
) -> tuple[Tensor, Tensor, float]:
    """Weight (C, D) and bias (C,) float64 of the minimum, and the largest slope left there.

    The search goes along the principal axes, scaled by their spread: features are nearly
    collinear, and in their own coordinates it takes ten times as many steps.
    """
    basis = _whitening(x, mean, std)
    weight = x.new_zeros(classes, len(mean), dtype=torch.float64).requires_grad_()
    bias = x.new_zeros(classes, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_STEPS,
        max_eval=2 * MAX_STEPS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = penalty / (2 * len(x)) * (weight @ basis).square().sum()
        total.backward()
        # Nearly collinear features need double precision; a few rows at a time, to save memory.
        for rows, truth in zip(x.split(_CHUNK_ROWS), y.split(_CHUNK_ROWS), strict=True):
            slope = weight @ basis / std
            logits = F.linear(rows.double(), slope, bias - slope @ mean)
            part = F.cross_entropy(logits, truth, reduction="sum") / len(x)
            part.backward()
            total = total.detach() + part.detach()
        return total

    optimizer.step(loss)
    if not loss().isfinite():
        raise NonFiniteError("the loss of the linear probe is not finite; look at the features")
    gradient = max(float(p.grad.abs().max()) for p in (weight, bias))
    return (weight @ basis).detach(), bias.detach(), gradient


def _whitening(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(D, D): rows are the principal axes of the standardised features over their spread."""
    correlation = sum(
        (z := (rows.double() - mean) / std).T @ z / len(x) for rows in x.split(_CHUNK_ROWS)
    )
    spread, axes = torch.linalg.eigh(correlation)
    return ((spread.clamp(min=0) + _LEAST_SPREAD).rsqrt() * axes).T


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, float32 (D,); 1 for a constant feature."""
    chunks = [
        torch.var_mean(columns.double(), dim=0, correction=0) for columns in features.split(256, 1)
    ]
    variance, mean = (torch.cat(values) for values in zip(*chunks, strict=True))
    std = variance.sqrt()
    rounding = torch.finfo(torch.float32).eps * mean.abs()
    std[std <= rounding] = 1.0
    return mean.float(), std.float()


def fit_reference(
    features: Features,
    images: Tensor,
    labels: Tensor,
    slices: Mapping[str, Slice],
    classes: int,
    *,
    size_px: int,
    seed: int,
    epochs: int = 100,
    batch_size: int = 256,
    lr_per_256: float = 0.001,
    test: Mapping[str, Tensor] | None = None,
    test_labels: Tensor | None = None,
    description: str = "linear_reference",
) -> dict[str, ReferenceProbe]:
    """The published probe of every slice of the features, from one forward pass for all.

    Each epoch shows every image once, randomly cropped and flipped, in a new order; a last batch
    that is not full is used. SGD with momentum 0.9, no weight decay, learning rate ``lr_per_256 *
    batch_size / 256`` on half a cosine to 0, one value per epoch; weights start from N(0, 0.01),
    biases from 0. A slice's result depends on no other slice. With test images the last and the
    best accuracy of each slice are printed, under these names.

    Args:
        features: Frozen: (B, 3, size_px, size_px) float 0..255 -> (B, D).
        images: (N, C, H, W) uint8 with C = 1 or 3.
        labels: (N,) int64 in 0..classes-1.
        slices: What each probe reads, by name.
        classes: Number of classes.
        size_px: Side of the crops.
        seed: Of the weights, the order and the crops.
        epochs, batch_size, lr_per_256: The published values are the defaults.
        test: By name, features (M, d) of the test images as the probe reads them; they are scored
            after each epoch and decide nothing.
        test_labels: Their classes (M,).
        description: For the progress bar.

    Raises:
        ShapeError: If there are not as many labels as images, or `test` lacks a slice.
        DataError: For fewer than two images or classes, or labels that do not fit.
        NonFiniteError: If a feature or a loss is not finite; names the image or slice and epoch.

    Source: the authors' ``eval_linear.py``. Intended differences: the seed fixes everything (the
    reference seeds nothing), and `last` and `best` are told apart.
    """
    _check_training(images, labels, classes)
    _check_test(slices, test, test_labels)

    def read(indices: NDArray[np.int64], epoch: int) -> Tensor:
        batch = images[torch.from_numpy(indices)]
        rows = features(crop_and_flip(batch, indices, seed=seed, epoch=epoch, size=size_px))
        _check_finite(rows, indices)
        return rows.clone()  # what inference mode made cannot be differentiated through

    first = read(np.zeros(1, dtype=np.int64), 0)
    heads = {name: _head(cut(first).shape[1], classes, seed) for name, cut in slices.items()}
    curves: dict[str, list[float]] = {name: [] for name in slices}
    parameters = [p for head in heads.values() for p in head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr_per_256, momentum=MOMENTUM)
    with Progress(transient=True) as bar:
        task = bar.add_task(description, total=epochs * math.ceil(len(images) / batch_size))
        for epoch in range(epochs):
            rate = cosine(epoch, epochs, lr_per_256 * batch_size / 256, 0.0)
            optimizer.param_groups[0]["lr"] = rate
            for indices in _epoch_batches(len(images), batch_size, seed, epoch):
                rows, y = read(indices, epoch), labels[torch.from_numpy(indices)]
                losses = {n: F.cross_entropy(heads[n](cut(rows)), y) for n, cut in slices.items()}
                _step(optimizer, losses, epoch)
                bar.advance(task)
            for name in test or ():
                with torch.inference_mode():
                    scores = heads[name](test[name])
                curves[name].append(top_k(scores, test_labels, 1))
        fitted = {n: ReferenceProbe(_as_probe(n, heads[n]), tuple(curves[n])) for n in slices}
        for name in test or ():
            bar.console.print(f"{description}, {name}: {fitted[name]}", markup=False)
    return fitted


def _head(width: int, classes: int, seed: int) -> torch.nn.Linear:
    head = torch.nn.Linear(width, classes)
    head.weight.data.normal_(0, INITIAL_STD, generator=torch.Generator().manual_seed(seed))
    head.bias.data.zero_()
    return head


def _as_probe(name: str, head: torch.nn.Linear) -> LinearProbe:
    if not all(p.isfinite().all() for p in head.parameters()):
        raise NonFiniteError(
            f"the weights of probe {name!r} are not finite after the last epoch; lower lr_per_256"
        )
    width = head.in_features
    return LinearProbe(head.weight.data, head.bias.data, torch.zeros(width), torch.ones(width))


def _epoch_batches(
    count: int, batch_size: int, seed: int, epoch: int
) -> Iterator[NDArray[np.int64]]:
    """Indices of the batches of one epoch; every image is in one of them."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size]


def _step(optimizer: torch.optim.Optimizer, losses: Mapping[str, Tensor], epoch: int) -> None:
    """One step of all probes; their sum has each probe's own gradient."""
    for name, loss in losses.items():
        if not loss.isfinite():
            raise NonFiniteError(
                f"the loss of probe {name!r} is {loss.item()} in epoch {epoch + 1}; "
                "lower lr_per_256 or look at the features"
            )
    optimizer.zero_grad()
    torch.stack([*losses.values()]).sum().backward()
    optimizer.step()


def _check_training(rows: Tensor, labels: Tensor, classes: int) -> None:
    if labels.shape != (len(rows),):
        raise ShapeError(
            f"{len(rows)} training images come with labels of shape {tuple(labels.shape)}; "
            "pass one class for each"
        )
    if len(rows) < 2:
        raise DataError(f"{len(rows)} training image(s); a linear probe needs at least 2")
    check_labels(labels, classes)
    if len(labels.unique()) < 2:
        raise DataError(
            f"all {len(labels)} training images are of class {labels[0]}; a linear probe needs at "
            "least 2 classes"
        )


def _check_test(
    slices: Mapping[str, Slice], test: Mapping[str, Tensor] | None, test_labels: Tensor | None
) -> None:
    if not slices:
        raise DataError("no slice to fit a probe on; pass at least one")
    if (test is None) != (test_labels is None):
        raise ShapeError("test and test_labels go together; pass both or neither")
    if test is None or test_labels is None:
        return
    if test.keys() != slices.keys():
        raise ShapeError(
            f"test has features for {', '.join(test)}; pass them for {', '.join(slices)}"
        )
    for name, rows in test.items():
        if len(rows) != len(test_labels):
            raise ShapeError(
                f"{len(rows)} test features of {name!r} come with {len(test_labels)} labels; "
                "pass one class for each"
            )


def _check_finite(rows: Tensor, indices: NDArray[np.int64]) -> None:
    if not rows.isfinite().all():
        index = indices[int((~rows.isfinite()).any(1).nonzero()[0])]
        raise NonFiniteError(
            f"the features of training image {index} are not finite; the weights or the image are "
            "broken, so no probe is fitted"
        )
