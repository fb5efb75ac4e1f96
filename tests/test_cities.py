"""The optimal policies of data/results/cities.py, against enumeration and cases by hand."""

import csv
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dqo import gram, log_det

RESULTS = Path(__file__).resolve().parent.parent / "data/results"
sys.path.insert(0, str(RESULTS))
import cities  # noqa: E402


def generator(seed):
    return torch.Generator().manual_seed(seed)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def unit(n, D, seed):
    """Unit vectors that lean to one side, as sentence embeddings do; the last copies the first."""
    x = torch.randn(n, D, dtype=torch.float64, generator=generator(seed)) + 0.7
    x[-1] = x[0]
    return F.normalize(x, dim=-1)


def gradient(function, p):
    p = p.clone().requires_grad_()
    return torch.autograd.grad(function(p), p)[0]


def by_enumeration(phi, f=lambda v: v, k=4):
    """The function p -> E f(log det(L + I)), over every ordered k-tuple: the definition."""
    groups = torch.tensor(list(itertools.product(range(len(phi)), repeat=k)))  # (n^k, k)
    values = f(log_det(gram(phi[groups])))  # (n^k,)
    return lambda p: p[groups].prod(1) @ values


@pytest.mark.parametrize("n, D", [
    (5, 2),
    (5, 3),
    (6, 8),
])
def test_expectations_are_exact(n, D):
    """The table of pairs of pairs, its derivatives and the identity are exact."""
    phi = unit(n, D, seed=D)
    L = phi @ phi.T
    table = cities.volume_table(L)
    p = torch.randn(n, dtype=torch.float64, generator=generator(1)).softmax(0)

    expected_volume = by_enumeration(phi)
    hessian = torch.autograd.functional.hessian(expected_volume, p)
    value, V = cities.expected_log_det(table, p)
    torch.testing.assert_close(value, expected_volume(p), rtol=0, atol=1e-12)
    torch.testing.assert_close(4 * V @ p, gradient(expected_volume, p), rtol=0, atol=1e-12)
    torch.testing.assert_close(12 * V, hessian, rtol=0, atol=1e-11)

    for k in (4, 3):
        expected_det = by_enumeration(phi, torch.exp, k)(p)
        assert abs(cities.log_expected_det(L, p, k) - expected_det.log().item()) < 1e-12
    assert value < cities.log_expected_det(L, p)  # Jensen: they are not the same objective

    distinct = sum(math.prod(p[list(g)].tolist()) for g in itertools.permutations(range(n), 4))
    assert abs(cities.measure(L, table, p)["four_all_different"] - distinct) < 1e-12


def check_optimum(objective, best):
    """A city in use has the same derivative as the others in use, and no other a larger one."""
    assert abs(best.sum() - 1) < 1e-12
    assert best.min() >= 0
    slope = gradient(objective, best)
    in_use = slope[best > 0]
    assert in_use.max() - in_use.min() < 1e-6
    assert slope.max() - in_use.max() < 1e-6


@pytest.mark.parametrize("n, D, seed", [
    (6, 3, 0),
    (7, 3, 1),
    (7, 4, 2),
    (7, 12, 3),
])
def test_optima(n, D, seed):
    """What is found is stationary: as the objectives are concave, the best of all."""
    phi = unit(n, D, seed)
    L = phi @ phi.T
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    cases = [
        (lambda p: 1 - p @ L @ p, cities.most_distant(L)),
        (lambda p: 1 - p @ L ** 2 @ p, cities.most_distant(L ** 2)),
        (by_enumeration(phi), cities.most_volume(cities.volume_table(L), uniform)),
    ]
    left_out = 0
    for objective, best in cases:
        check_optimum(objective, best)
        left_out += (best == 0).sum().item()
    assert D > n or left_out > 0  # else "no other a larger one" has not been tried


def test_two_clusters():
    """e1 e1 e2 e2: half of the probability goes to each cluster, from any start.

    The value by hand: m ~ Binomial(4, 1/2) answers are e1, and det(L + I) = (1 + m)(5 - m).
    """
    phi = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]]
    L = phi @ phi.T
    start = vector(0.7, 0.1, 0.2, 0.0)
    table = cities.volume_table(L)
    by_hand = (2 * math.log(5) + 8 * math.log(8) + 6 * math.log(9)) / 16
    most_distant = cities.maximise_quadratic(-2 * L, torch.zeros_like(start), start)
    for p in (most_distant, cities.most_volume(table, start)):
        assert abs(p[:2].sum() - 0.5) < 1e-6
        assert abs(p.sum() - 1) < 1e-12
        assert abs(1 - p @ L @ p - 0.5) < 1e-9
        assert abs(cities.expected_log_det(table, p)[0] - by_hand) < 1e-9


def test_the_committed_numbers():
    """cities.csv holds optima to 1e-6, each best by its own measure, volume more spread out."""
    assert len(cities.PLACES) == len(set(cities.PLACES)) == 100
    with open(RESULTS / "cities.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["template"] for row in rows[::4]] == cities.TEMPLATES
    for first in range(0, len(rows), 4):
        four = rows[first:first + 4]
        names = [row["objective"] for row in four]
        assert names == ["uniform", "pairwise", "squared", "volume"]
        assert max(float(row["gap_at_most"]) for row in four[1:]) < 1e-6

        def column(key):
            return [float(row[key]) for row in four]

        uniform, pairwise, squared, volume = column("distance")
        assert pairwise > volume > uniform
        uniform, pairwise, squared, volume = column("log_det")
        assert volume > pairwise > uniform
        uniform, pairwise, squared, volume = column("cities_above_1_percent")
        assert volume >= squared > pairwise
        for key in ("effective_cities", "vendi", "four_all_different"):
            uniform, pairwise, squared, volume = column(key)
            assert volume > squared > pairwise
