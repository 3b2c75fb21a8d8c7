"""The measures of evaluation on a GPU are those of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hmar_mega.evaluation.distances import FrechetReference, bootstrap_weights, kernel_distance, manifold_coverage

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("count", [400, 40])  # more images than dims, and fewer
def test_measures_are_those_of_the_cpu(count: int) -> None:
    random = np.random.default_rng(0)
    mixing = random.normal(size=(64, 64))
    fake, real = ((random.normal(size=(n, 64)) @ mixing).astype(np.float32) for n in (count, 300))
    mean, covariance = real.mean(0, dtype=np.float64), np.cov(real, rowvar=False, dtype=np.float64)
    weights = bootstrap_weights(count, 3)

    def figures(device: torch.device) -> list[np.ndarray]:
        reference = FrechetReference(mean, covariance, device)
        return [
            reference.resampled(lambda: [fake[:30], fake[30:]], weights, fake.mean(0)),
            kernel_distance(fake, real, weights, device),
            manifold_coverage(fake, real, device=device),
        ]

    for ours, theirs in zip(figures(torch.device("cuda")), figures(torch.device("cpu")), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8)
