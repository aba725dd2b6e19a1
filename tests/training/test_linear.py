"""Linear probes and k-NN against scikit-learn and plain loops, and what they refuse."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import clever_zoo
from clever_zoo.errors import DataError, NonFiniteError, ShapeError
from clever_zoo.samples import sample_class, sample_paths
from tests import oracles
from training.evaluate import knn, linear
from training.evaluate.inputs import features_of, parts_of, subject
from training.evaluate.knn import knn_scores
from training.evaluate.linear import fit_cached, fit_reference
from training.evaluate.scores import top_k
from training.views import crop_and_flip

PARTS = ("full", "invariant", "equivariant")
Data = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def embedded() -> dict[str, Data]:
    """By part, features and classes to fit on and to score: 150 pictures each, in four turns."""
    paths = sample_paths()
    names = sorted({sample_class(path) for path in paths})
    labels = torch.tensor([names.index(sample_class(path)) for path in paths]).repeat_interleave(4)
    turned = [np.rot90(np.asarray(Image.open(path).convert("RGB")), n) for path in paths
              for n in range(4)]  # fmt: skip
    embedding = clever_zoo.from_pretrained("clever-resnet18").embed(turned)
    first = torch.arange(len(labels)) // 4 % 2 == 0
    result = {}
    for part in PARTS:
        x = torch.from_numpy(getattr(embedding, part))
        result[part] = (x[first], labels[first], x[~first], labels[~first])
    return result


def sklearn_probe(
    x: Tensor, y: Tensor, penalty: float
) -> tuple[StandardScaler, LogisticRegression]:
    scaler = StandardScaler().fit(x.double().numpy())
    regression = LogisticRegression(C=1 / penalty, tol=1e-6, max_iter=5000)
    return scaler, regression.fit(scaler.transform(x.double().numpy()), y.numpy())


@pytest.mark.parametrize("part", PARTS)
def test_cached_is_the_logistic_regression_of_scikit_learn(embedded, part: str) -> None:
    x, y, test_x, test_y = embedded[part]
    probe = fit_cached(x, y, 10)
    assert probe.converged
    scaler, regression = sklearn_probe(x, y, 1.0)
    expected = regression.score(scaler.transform(test_x.double().numpy()), test_y.numpy()) * 100
    assert 50 < expected < 100
    assert top_k(probe.scores(test_x), test_y, 1) == pytest.approx(expected, abs=0.5)
    scale = np.abs(regression.coef_).max()
    np.testing.assert_allclose(probe.weight.numpy(), regression.coef_, atol=0.01 * scale)


def test_the_penalty_is_that_of_scikit_learn(embedded) -> None:
    x, y, _, _ = embedded["equivariant"]
    _, regression = sklearn_probe(x, y, 30.0)
    probe = fit_cached(x, y, 10, penalty=30.0)
    np.testing.assert_allclose(probe.weight.numpy(), regression.coef_, atol=2e-3)
    np.testing.assert_allclose(probe.bias.numpy(), regression.intercept_, atol=5e-3)
    assert probe.weight.abs().max() < 0.7 * fit_cached(x, y, 10).weight.abs().max()


def test_cached_gives_the_same_bits_twice(embedded) -> None:
    x, y, _, _ = embedded["equivariant"]
    once, twice = fit_cached(x, y, 10), fit_cached(x.clone(), y, 10)
    assert torch.equal(once.weight, twice.weight)
    assert torch.equal(once.bias, twice.bias)


def test_scale_and_offset_of_a_feature_change_no_score(embedded) -> None:
    x, y, test_x, _ = embedded["invariant"]
    stretch, offset = torch.linspace(0.01, 100, x.shape[1]), torch.linspace(-5, 5, x.shape[1])
    plain = fit_cached(x, y, 10, penalty=30.0).scores(test_x)
    moved = fit_cached(x * stretch + offset, y, 10, penalty=30.0)
    torch.testing.assert_close(moved.scores(test_x * stretch + offset), plain, atol=0.02, rtol=0.01)


def test_constant_features_decide_nothing(embedded) -> None:
    x, y, test_x, _ = embedded["equivariant"]
    expected = fit_cached(x, y, 10).scores(test_x)
    for value in (0.0, 0.1, -3e6):
        probe = fit_cached(torch.cat([x, torch.full((len(x), 1), value)], 1), y, 10)
        assert probe.converged
        assert probe.weight[:, -1].abs().max() < 1e-5
        same = probe.scores(torch.cat([test_x, torch.full((len(test_x), 1), value)], 1))
        torch.testing.assert_close(same, expected, atol=0.1, rtol=0.01)


def test_too_few_steps_are_told(embedded, monkeypatch) -> None:
    monkeypatch.setattr(linear, "MAX_STEPS", 3)
    x, y, _, _ = embedded["full"]
    assert fit_cached(x, y, 10).converged is False


@pytest.mark.parametrize("part", PARTS)
def test_knn_is_that_of_scikit_learn(embedded, part: str) -> None:
    x, y, test_x, test_y = embedded[part]
    ks = (200, 10, 20, 100)
    votes = knn_scores(x, y, test_x, ks=ks, classes=10)
    assert tuple(votes) == ks
    for k in ks:
        peer = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        ).fit(x.numpy(), y.numpy())
        shares = peer.predict_proba(test_x.numpy())
        expected = (shares.argmax(1) == test_y.numpy()).mean() * 100
        assert top_k(votes[k], test_y, 1) == pytest.approx(expected, abs=0.2)
        ours = votes[k] / votes[k].sum(1, keepdim=True)
        np.testing.assert_allclose(np.median(np.abs(ours.numpy() - shares)), 0, atol=1e-4)


def test_chunks_of_rows_change_nothing(rng, monkeypatch) -> None:
    x, test_x = (torch.from_numpy(rng.normal(size=(n, 8))).float() for n in (300, 40))
    y = torch.from_numpy(rng.integers(0, 10, 300))
    whole = knn_scores(x, y, test_x, ks=(20,), classes=10)[20], fit_cached(x, y, 10).weight
    monkeypatch.setattr(knn, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(linear, "_CHUNK_ROWS", 70)
    torch.testing.assert_close(knn_scores(x, y, test_x, ks=(20,), classes=10)[20], whole[0])
    torch.testing.assert_close(fit_cached(x, y, 10).weight, whole[1], atol=1e-4, rtol=1e-3)


def test_one_k_gives_the_votes_of_many(embedded) -> None:
    x, y, test_x, _ = embedded["full"]
    many = knn_scores(x, y, test_x, ks=(5, 50), classes=10)
    alone = knn_scores(x, y, test_x, ks=(5,), classes=10)
    torch.testing.assert_close(many[5], alone[5])
    assert (many[50].sum(1) > many[5].sum(1)).all()


@pytest.mark.parametrize("ks", [(), (0, 5), (5, 41)])
def test_impossible_k_are_refused(rng, ks) -> None:
    x, y = torch.from_numpy(rng.normal(size=(40, 6))), torch.zeros(40, dtype=torch.int64)
    with pytest.raises(DataError, match=r"gallery has 40 images; use one or more k in 1\.\.40"):
        knn_scores(x, y, x, ks=ks, classes=2)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_counts_as_scikit_learn(rng, k: int) -> None:
    scores, labels = rng.normal(size=(500, 6)), rng.integers(0, 6, 500)
    expected = top_k_accuracy_score(labels, scores, k=k, labels=range(6)) * 100
    assert top_k(torch.from_numpy(scores), torch.from_numpy(labels), k) == pytest.approx(expected)


def test_equal_scores_are_no_free_hits() -> None:
    labels = torch.arange(4).repeat(25)
    for k in (1, 2, 4):
        assert top_k(torch.zeros(100, 4), labels, k) == 25 * k


def test_bad_scores_are_refused() -> None:
    scores, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    for k in (0, 5):
        with pytest.raises(DataError, match=f"top-{k} of 4 classes"):
            top_k(scores, labels, k)
    with pytest.raises(DataError, match=r"labels lie in 1\.\.4"):
        top_k(scores, torch.tensor([1, 4, 2]), 1)
    with pytest.raises(DataError, match="no images"):
        top_k(scores[:0], labels[:0], 1)
    with pytest.raises(ShapeError):
        top_k(scores, labels[:2], 1)
    scores[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="row 1"):
        top_k(scores, labels, 1)


SIZE, CLASSES = 8, 3
SLICES = {"all": lambda x: x, "first": lambda x: x[:, :5]}


def shrunk(pixels: Tensor) -> Tensor:
    """Frozen features (B, 12) of small squares, made in inference mode as an encoder's are."""
    with torch.inference_mode():
        return torch.nn.functional.avg_pool2d(pixels / 64, 4).flatten(1)


@pytest.fixture
def pictures(rng) -> tuple[Tensor, Tensor]:
    """Ten images (10, 3, 12, 12), a little brighter from class to class, and their classes."""
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 1])
    images = rng.integers(0, 120, (10, 3, 12, 12)) + 60 * labels[:, None, None, None]
    return torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)


fit = partial(
    fit_reference, shrunk, slices=SLICES, classes=CLASSES, size_px=SIZE, epochs=3, batch_size=4
)


def test_reference_is_the_plain_loop(pictures) -> None:
    images, labels = pictures
    fitted = fit(images, labels, seed=5, lr_per_256=6.4)
    batches = []
    for epoch in range(3):
        order = np.random.default_rng([5, epoch]).permutation(10)
        parts = [order[:4], order[4:8], order[8:]]
        crops = [crop_and_flip(images[p], p, seed=5, epoch=epoch, size=SIZE) for p in parts]
        batches.append([(shrunk(c).numpy(), labels[p].numpy()) for c, p in zip(crops, parts)])  # noqa: B905
    for name, cut in SLICES.items():
        width = 12 if name == "all" else 5
        start = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(5)) * 0.01
        cut_batches = [[(cut(x), y) for x, y in epoch] for epoch in batches]
        weight, bias = oracles.sgd_probe(start.numpy(), cut_batches, 6.4 * 4 / 256, 0.9)
        probe = fitted[name].probe
        np.testing.assert_allclose(probe.weight.numpy(), weight, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(probe.bias.numpy(), bias, rtol=1e-3, atol=1e-5)
        assert np.abs(weight - start.numpy()).max() > 0.1
        assert fitted[name].top1 == ()


def test_initial_weights_are_small_and_normal(pictures) -> None:
    images, labels = pictures
    wide = {"wide": lambda x: x.repeat(1, 500)}
    probe = fit(images, labels, slices=wide, seed=0, lr_per_256=0.0)["wide"].probe
    assert float(probe.weight.std()) == pytest.approx(0.01, rel=0.03)
    assert not probe.bias.any()


def test_test_labels_change_the_best_and_never_the_last(pictures) -> None:
    images, labels = pictures
    clean = shrunk(images[..., 2:-2, 2:-2].float())
    test = {name: cut(clean) for name, cut in SLICES.items()}
    true = fit(images, labels, seed=1, lr_per_256=10.0, test=test, test_labels=labels)
    other = fit(images, labels, seed=1, lr_per_256=10.0, test=test, test_labels=(labels + 1) % 3)
    blind = fit(images, labels, seed=1, lr_per_256=10.0)
    alone = fit(images, labels, seed=1, lr_per_256=10.0, slices={"first": SLICES["first"]})
    assert true["all"].top1 != other["all"].top1
    for name in SLICES:
        for fitted in (other, blind):
            assert torch.equal(fitted[name].probe.weight, true[name].probe.weight)
            assert torch.equal(fitted[name].probe.bias, true[name].probe.bias)
        assert len(true[name].top1) == 3
        assert true[name].top1[-1] == top_k(true[name].probe.scores(test[name]), labels, 1)
    torch.testing.assert_close(alone["first"].probe.weight, true["first"].probe.weight)


def test_two_runs_are_equal_and_two_seeds_are_not(pictures) -> None:
    once, twice, other = (fit(*pictures, seed=s, lr_per_256=1.0)["all"].probe for s in (3, 3, 4))
    assert torch.equal(once.weight, twice.weight)
    assert not torch.equal(once.weight, other.weight)


def test_the_print_says_which_is_which(pictures, capsys) -> None:
    images, labels = pictures
    probe = fit(images, labels, seed=0)["all"].probe
    curve = linear.ReferenceProbe(probe, (50.0, 80.0, 80.0, 70.0))
    assert curve.best_epoch == 2
    text = "last 70.0 % (epoch 4), best 80.0 % (epoch 2, chosen on the test images)"
    assert str(curve) == text
    test = {"all": shrunk(images[..., 2:-2, 2:-2].float())}
    fit(images, labels, slices={"all": SLICES["all"]}, seed=0, test=test, test_labels=labels)
    printed = " ".join(capsys.readouterr().out.split())
    assert "linear_reference, all: last" in printed
    assert "chosen on the test images" in printed


def test_one_pass_feeds_every_slice_of_a_vit(pictures) -> None:
    encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8)
    calls = []

    def features(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        return features_of(subject(encoder, "untrained", {}, 153), 4)(pixels)

    def cut(x: Tensor, part: str, per_block: bool) -> Tensor:
        return parts_of(x, 153, blocks=4, per_block=per_block)[part]

    slices = {
        f"{recipe}/{part}": partial(cut, part=part, per_block=recipe == "last4_per_block")
        for recipe in ("last4_reference", "last4_per_block")
        for part in PARTS
    }
    images, labels = pictures
    fitted = fit_reference(
        features, images, labels, slices, CLASSES, size_px=32, seed=0, epochs=1, batch_size=8
    )
    assert [probe.probe.weight.shape[1] for probe in fitted.values()] == [
        *(768, 729, 39),
        *(768, 4 * 153, 4 * 39),
    ]
    assert calls == [1, 8, 2]  # one image tells the widths


@pytest.mark.parametrize("protocol", ["cached", "reference"])
def test_data_that_cannot_train_a_probe_are_refused(pictures, protocol: str) -> None:
    images, labels = pictures

    def run(images: Tensor, labels: Tensor) -> object:
        if protocol == "reference":
            return fit(images, labels, seed=0)
        return fit_cached(images.flatten(1).float(), labels, CLASSES)

    with pytest.raises(DataError, match="1 training image"):
        run(images[:1], labels[:1])
    with pytest.raises(DataError, match="all 3 training images are of class 1"):
        run(images[:3], torch.ones(3, dtype=torch.int64))
    with pytest.raises(DataError, match=r"labels lie in 0\.\.3, but there are 3 classes"):
        run(images, labels.clone().index_fill_(0, torch.tensor([4]), 3))
    with pytest.raises(ShapeError, match="10 training images come with"):
        run(images, labels[:9])


def test_features_that_are_not_finite_are_named(pictures) -> None:
    images, labels = pictures
    x = images.flatten(1).float()
    x[6, 2] = torch.inf
    with pytest.raises(NonFiniteError, match="training image 6"):
        fit_cached(x, labels, CLASSES)
    images[7] = 255

    def broken(pixels: Tensor) -> Tensor:
        return shrunk(torch.where((pixels == 255).all((1, 2, 3), True), torch.nan, pixels))

    with pytest.raises(NonFiniteError, match="training image 7"):
        fit_reference(broken, images, labels, SLICES, CLASSES, size_px=SIZE, seed=0)


def test_a_diverging_probe_is_named(pictures) -> None:
    with pytest.raises(NonFiniteError, match=r"probe 'all' is (inf|nan) in epoch 1"):
        fit(*pictures, seed=0, lr_per_256=1e39)
    large = {"all": lambda x: x * 1000}
    with pytest.raises(NonFiniteError, match="weights of probe 'all' are not finite"):
        fit(*pictures, slices=large, seed=0, lr_per_256=1e38, epochs=1, batch_size=10)


def test_arguments_that_do_not_fit_are_refused(pictures) -> None:
    images, labels = pictures
    x = images.flatten(1).float()
    with pytest.raises(ShapeError, match="D >= 1"):
        fit_cached(x[:, :0], labels, CLASSES)
    with pytest.raises(DataError, match=r"penalty is 0\.0"):
        fit_cached(x, labels, CLASSES, penalty=0.0)
    test = {name: torch.zeros(10, 3) for name in SLICES}
    with pytest.raises(ShapeError, match="both or neither"):
        fit(images, labels, seed=0, test=test)
    with pytest.raises(ShapeError, match="pass them for all, first"):
        fit(images, labels, seed=0, test={"all": test["all"]}, test_labels=labels)
    with pytest.raises(ShapeError, match="'all' come with 9 labels"):
        fit(images, labels, seed=0, test=test, test_labels=labels[:9])
    with pytest.raises(DataError, match="at least one"):
        fit(images, labels, slices={}, seed=0)
