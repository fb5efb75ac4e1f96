"""The optimal policies of data/results/cities.py, against a case by hand."""

import math
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent.parent / "data/results"
sys.path.insert(0, str(RESULTS))
import cities  # noqa: E402


def test_two_clusters():
    """e1 e1 e2 e2: half of the probability goes to each cluster, from any start.

    The value by hand: m ~ Binomial(4, 1/2) answers are e1, and det(L + I) = (1 + m)(5 - m).
    """
    phi = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]]
    L = phi @ phi.T
    start = torch.tensor([0.7, 0.1, 0.2, 0.0], dtype=torch.float64)
    table = cities.volume_table(L)
    by_hand = (2 * math.log(5) + 8 * math.log(8) + 6 * math.log(9)) / 16
    most_distant = cities.maximise_quadratic(-2 * L, torch.zeros_like(start), start)
    for p in (most_distant, cities.most_volume(table, start)):
        assert abs(p[:2].sum() - 0.5) < 1e-6
        assert abs(p.sum() - 1) < 1e-12
        assert abs(1 - p @ L @ p - 0.5) < 1e-9
        assert abs(cities.expected_log_det(table, p)[0] - by_hand) < 1e-9
