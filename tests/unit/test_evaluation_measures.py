"""The measures of evaluation beside other implementations: SciPy, brute force, and where installed torch-fidelity,
torchmetrics and clean-fid.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from hmar_mega.evaluation.distances import (
    FrechetReference,
    bootstrap_weights,
    inception_score,
    kernel_distance,
    manifold_coverage,
)
from hmar_mega.evaluation.efficientnet import EfficientNetLite0, SameConv2d
from hmar_mega.evaluation.measures import measure
from hmar_mega.evaluation.moments import Moments
from hmar_mega.evaluation.statistics import gather

DIMS = 24


def features(count: int, seed: int, shift: float = 0.0, dims: int = DIMS) -> np.ndarray:
    """Correlated features, (count, dims) float32."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(dims, dims))
    return (random.normal(size=(count, dims)) @ mixing + shift).astype(np.float32)


FAKE, REAL = features(300, 0, 0.4), features(280, 1)


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    return FrechetReference(mean_1, cov_1).distance(mean_2, cov_2)


def sqrtm(product: np.ndarray) -> np.ndarray:
    root: np.ndarray = scipy.linalg.sqrtm(product).real
    return root


def moments_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values.astype(np.float64).mean(0), np.cov(values.astype(np.float64), rowvar=False)


def test_merged_moments_are_those_of_all_rows():
    values = FAKE + 1000  # a mean far from 0, which sums of squares would not survive
    merged = Moments.of(values[:10]).merged(Moments.of(values[10:11])).merged(Moments.of(values[11:]))
    mean, covariance = moments_of(values)
    np.testing.assert_allclose(merged.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(merged.covariance, covariance, rtol=1e-10, atol=1e-10)


# the first has more images than dims, also among those drawn; the others fewer, or a reference of low rank
@pytest.mark.parametrize(("fakes", "reals"), [(300, 280), (20, 280), (300, 10)])
def test_a_resampled_distance_is_that_of_the_repeated_rows(fakes, reals, monkeypatch):
    monkeypatch.setattr("hmar_mega.evaluation.distances.TOGETHER", 2)
    own, weights = FAKE[:fakes] + 50, bootstrap_weights(fakes, 3, seed=3)
    assert weights[1:].max() > 1
    mean, covariance = moments_of(REAL[:reals] + 50)
    centre = own.mean(0) + 0.5  # need not be the mean
    chunks = [own[i : i + 64] for i in range(0, fakes, 64)]
    found = FrechetReference(mean, covariance).resampled(lambda: chunks, weights, centre)
    repeated = [moments_of(np.repeat(own, counts.astype(int), axis=0)) for counts in weights]
    expected = [((mean - m) ** 2).sum() + np.trace(covariance + c - 2 * sqrtm(covariance @ c)) for m, c in repeated]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert FrechetReference(mean, covariance).resampled(lambda: chunks, weights[:0], centre).shape == (0,)


@pytest.mark.parametrize("count", [300, 15])  # of 24 dims: the second covariance is singular
def test_frechet_distance_is_that_of_scipys_matrix_root(count):
    (mean_1, cov_1), (mean_2, cov_2) = moments_of(FAKE[:count]), moments_of(REAL)
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * sqrtm(cov_1 @ cov_2))
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(mean_1, cov_1, mean_1, cov_1) == pytest.approx(0, abs=1e-6 * np.trace(cov_1))


def test_kernel_distance_is_the_sum_over_pairs():
    x, y = FAKE[:30].astype(np.float64), REAL[:20].astype(np.float64)
    weights = bootstrap_weights(30, 2)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / DIMS + 1) ** 3)

    def direct(w: np.ndarray) -> float:
        pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
        within = sum(w[i] * w[j] * k(x[i], x[j]) for i, j in pairs) / sum(w[i] * w[j] for i, j in pairs)
        real = np.mean([k(y[i], y[j]) for i in range(20) for j in range(20) if i != j])
        across = sum(w[i] * k(x[i], b) for i in range(30) for b in y) / (w.sum() * 20)
        return within + real - 2 * across

    np.testing.assert_allclose(kernel_distance(x, y, weights), [direct(w) for w in weights], rtol=1e-9)


def test_inception_score_by_hand():
    certain = np.log(np.array([[1.0, 1e-30], [1e-30, 1.0]] * 5))
    assert inception_score(certain, np.ones((1, 10)), 1) == pytest.approx(2)
    assert inception_score(np.log(np.full((10, 4), 0.25)), np.ones((1, 10)), 5) == pytest.approx(1)
    weights = np.array([[1.0] * 10, [2.0, 0.0] * 5])  # the second replicate drew one class alone
    assert inception_score(certain, weights, 1) == pytest.approx([2, 1])


def test_manifold_coverage_is_that_of_sorted_distances(monkeypatch):
    monkeypatch.setattr("hmar_mega.evaluation.distances.BLOCK", 17)
    x, y = FAKE[:60].astype(np.float64), REAL[:50].astype(np.float64)
    distances = np.linalg.norm(y[:, None] - y[None], axis=2)
    reach = np.sort(distances, axis=1)[:, 3]
    expected = (np.linalg.norm(x[:, None] - y[None], axis=2) <= reach).any(1)
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(manifold_coverage(x, y), expected)


def chunks_of(values: np.ndarray, size: int = 64) -> list[dict[str, np.ndarray]]:
    return [{"pooled": values[i : i + size], "spatial": values[i : i + size, :8]} for i in range(0, len(values), size)]


def test_intervals_cover_what_other_draws_give():
    """The spread that the bootstrap says agrees with that over independent sets of images."""
    real = gather(chunks_of(REAL), len(REAL))
    drawn, spread = [], []
    for seed in range(10, 22):
        own = chunks_of(features(300, seed, 0.4))
        found = {m.name: m for m in measure(lambda own=own: own, gather(own, 300), real, 12)}
        drawn.append([found[name].value for name in ("FID", "sFID", "KID")])
        spread.append([(found[name].high - found[name].low) / 3.92 for name in ("FID", "sFID", "KID")])
    ratio = np.mean(spread, axis=0) / np.std(drawn, axis=0, ddof=1)
    assert ((ratio > 0.5) & (ratio < 2)).all(), ratio


def test_same_convolution_pads_as_tensorflow_does():
    """An even side with stride 2 and kernel 3 takes its one pixel at the end: sums of 3 at 0, 2, 4 and of 2 at 6."""
    conv = SameConv2d(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(conv.weight)
    row = torch.arange(1.0, 9.0).expand(1, 1, 8, 8)
    assert conv(row)[0, 0, 0].tolist() == [18, 36, 54, 45]  # of three rows


def test_efficientnet_has_the_published_parameters():
    assert sum(p.numel() for p in EfficientNetLite0().parameters()) == 4_652_008


# ------------------------------------------------------------------------------------ other libraries, where installed


def test_agreement_with_torch_fidelity():
    fid = pytest.importorskip(
        "torch_fidelity.metric_fid", reason="torch-fidelity (hmar-mega[eval])", exc_type=ImportError
    )
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    fake, real = torch.from_numpy(FAKE[:280]), torch.from_numpy(REAL)
    one, two = (fid.fid_features_to_statistics(x) for x in (fake, real))
    theirs = fid.fid_statistics_to_metric(one, two, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*moments_of(FAKE[:280]), *moments_of(REAL)) == pytest.approx(theirs, rel=1e-6)
    kid = kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=280, verbose=False)
    ones = np.ones((1, 280))
    assert kernel_distance(FAKE[:280], REAL, ones)[0] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-5)
    isc = isc_features_to_metric(fake, splits=4, shuffle=False)
    logs = fake.double().log_softmax(1).numpy()
    assert inception_score(logs, ones, 4)[0] == pytest.approx(isc["inception_score_mean"], rel=1e-6)
    prc = prc_features_to_metric(fake, real, verbose=False)  # generated images first
    assert manifold_coverage(FAKE[:280], REAL).mean() == pytest.approx(prc["precision"], abs=1e-6)
    assert manifold_coverage(REAL, FAKE[:280]).mean() == pytest.approx(prc["recall"], abs=1e-6)


def test_agreement_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics", exc_type=ImportError)
    tensors = [torch.from_numpy(x) for x in (*moments_of(FAKE), *moments_of(REAL))]
    theirs = float(fid._compute_fid(*tensors))
    assert frechet_distance(*moments_of(FAKE), *moments_of(REAL)) == pytest.approx(theirs, rel=1e-6)


def test_agreement_with_clean_fid():
    fid = pytest.importorskip("cleanfid.fid", reason="clean-fid", exc_type=ImportError)
    theirs = fid.frechet_distance(*moments_of(FAKE), *moments_of(REAL))
    assert frechet_distance(*moments_of(FAKE), *moments_of(REAL)) == pytest.approx(float(theirs), rel=1e-6)
    theirs = fid.kernel_distance(FAKE[:280], REAL, num_subsets=1, max_subset_size=280)
    assert kernel_distance(FAKE[:280], REAL, np.ones((1, 280)))[0] == pytest.approx(float(theirs), rel=1e-4)
