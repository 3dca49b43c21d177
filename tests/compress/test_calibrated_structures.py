"""Every structure takes a calibrated metric: float32 moments, a weight for each row."""

import pytest
import torch

from hf_sqf.compress.factorize import solve
from hf_sqf.compress.metric import Metric


@pytest.mark.parametrize("structure", ["auto", "grid", "svd", "sparse_pca", "vq", "pgd", "svd+grid"])
def test_float32_moments(structure):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 48, generator=draw) @ torch.randn(48, 48, generator=draw)
    metric = Metric(x.T @ x / 300, torch.rand(64, generator=draw) + 0.5)
    weight = torch.randn(64, 48, generator=draw)
    found = solve(weight, metric, 2.0, structure, trellis=8)
    assert found.distortion == pytest.approx(metric.distance(weight, found.factors.dense()), rel=1e-3)
    assert found.distortion < metric.distance(weight, None)
