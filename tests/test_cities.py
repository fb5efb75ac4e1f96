"""The exactly optimised policies of data/results/cities.py: against enumeration, and against cases solved by hand."""

import csv
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dqo import log_det

RESULTS = Path(__file__).resolve().parent.parent / "data/results"
sys.path.insert(0, str(RESULTS))
import cities  # noqa: E402


def unit(n, D, seed):
    """Unit vectors that lean to one side, like sentence embeddings, the last one a copy of the first."""
    x = torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.7
    x[-1] = x[0]
    return F.normalize(x, dim=-1)


def by_enumeration(phi, f=lambda v: v, k=4):
    """The function p -> E f(log det(L + I)), over every ordered k-tuple: the definition, differentiable in p."""
    groups = torch.tensor(list(itertools.product(range(len(phi)), repeat=k)))       # (n^k, k)
    values = f(log_det(phi[groups]))                                                # (n^k,)
    return lambda p: p[groups].prod(1) @ values


@pytest.mark.parametrize("n,D", [(5, 2), (5, 3), (6, 8)])
def test_expectations_are_exact(n, D):
    """The table of pairs of pairs, its derivatives, and the D-optimality identity."""
    phi = unit(n, D, seed=D)
    p = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(0).requires_grad_()
    reference = by_enumeration(phi)(p)
    gradient = torch.autograd.grad(reference, p)[0]
    hessian = torch.autograd.functional.hessian(by_enumeration(phi), p.detach())
    L, q = phi @ phi.T, p.detach()
    value, V = cities.expected_log_det(cities.volume_table(L), q)
    torch.testing.assert_close(value, reference.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(4 * V @ q, gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(12 * V, hessian, rtol=0, atol=1e-11)
    assert abs(cities.log_expected_det(L, q) - by_enumeration(phi, torch.exp)(q).log().item()) < 1e-12
    assert value < cities.log_expected_det(L, q)  # Jensen: they are not the same objective
    assert abs(cities.log_expected_det(L, q, 3) - by_enumeration(phi, torch.exp, 3)(q).log().item()) < 1e-12
    distinct = sum(math.prod(q[i].item() for i in g) for g in itertools.permutations(range(n), 4))
    assert abs(cities.measure(L, cities.volume_table(L), q)["four_all_different"] - distinct) < 1e-12


@pytest.mark.parametrize("n,D,seed", [(6, 3, 0), (7, 3, 1), (7, 4, 2), (7, 12, 3)])
def test_optima(n, D, seed):
    """Every city in use has the same derivative, no other a larger one; and as both objectives are concave, no policy is better."""
    phi = unit(n, D, seed)
    L, uniform = phi @ phi.T, torch.full((n,), 1 / n, dtype=torch.float64)
    distance, squared, volume = lambda p: 1 - p @ L @ p, lambda p: 1 - p @ L ** 2 @ p, by_enumeration(phi)
    optima = cities.most_distant(L), cities.most_distant(L ** 2), cities.most_volume(cities.volume_table(L), uniform)
    left_out = 0
    for objective, best in zip((distance, squared, volume), optima):
        assert abs(best.sum() - 1) < 1e-12 and best.min() >= 0
        p = best.clone().requires_grad_()
        slope = torch.autograd.grad(objective(p), p)[0]
        assert slope[best > 0].max() - slope[best > 0].min() < 1e-6
        assert slope.max() - slope[best > 0].max() < 1e-6
        left_out += (best == 0).sum().item()
        others = torch.randn(10, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(2).softmax(1)
        assert all(objective(q) <= objective(best) + 1e-9 and objective(0.9 * best + 0.1 * q) <= objective(best) + 1e-9 for q in others)
        curvature = torch.autograd.functional.hessian(objective, others[0])  # concave along every direction that keeps the sum at 1
        d = others[1:] - others[0]
        assert (d @ curvature * d).sum(1).max() <= 1e-12
    assert D > n or left_out > 0  # else the second condition has not been tried


def test_two_clusters():
    """e1 e1 e2 e2: half of the probability on each cluster, from any start, and the value by hand: m ~ Binomial(4, 1/2)
    answers are e1, and det(L + I) = (1 + m)(5 - m)."""
    phi = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]]
    L, start = phi @ phi.T, torch.tensor([0.7, 0.1, 0.2, 0.0], dtype=torch.float64)
    table = cities.volume_table(L)
    for p in (cities.maximise_quadratic(-2 * L, torch.zeros_like(start), start), cities.most_volume(table, start)):
        assert abs(p[:2].sum() - 0.5) < 1e-6 and abs(p.sum() - 1) < 1e-12
        assert abs(1 - p @ L @ p - 0.5) < 1e-9
        by_hand = (2 * math.log(5) + 8 * math.log(8) + 6 * math.log(9)) / 16
        assert abs(cities.expected_log_det(table, p)[0] - by_hand) < 1e-9


def test_volume_says_what_distance_never_does():
    """At 0, 60 and 120 degrees the middle answer lies between the others. log det sees cosines squared only, that is the
    cosines of the doubled angles, 0, 120 and 240, which are all alike: 1/3 each. The distance is better off without it."""
    angle = torch.tensor([0, 60, 120], dtype=torch.float64).deg2rad()
    phi = torch.stack([angle.cos(), angle.sin()], 1)
    L = phi @ phi.T
    start = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    torch.testing.assert_close(cities.most_distant(L), torch.tensor([0.5, 0, 0.5], dtype=torch.float64), rtol=0, atol=1e-6)
    for p in (cities.most_volume(cities.volume_table(L), start), cities.most_distant(L ** 2)):
        torch.testing.assert_close(p, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_committed_numbers():
    """What is said about cities.csv: optima to 1e-6, each the better one by its own measure, volume the more spread out."""
    assert len(cities.PLACES) == len(set(cities.PLACES)) == 100
    rows = list(csv.DictReader(open(RESULTS / "cities.csv")))
    assert [r["template"] for r in rows[::4]] == cities.TEMPLATES
    for uniform, pairwise, squared, volume in zip(rows[::4], rows[1::4], rows[2::4], rows[3::4]):
        assert [r["objective"] for r in (uniform, pairwise, squared, volume)] == ["uniform", "pairwise", "squared", "volume"]
        assert max(float(r["gap_at_most"]) for r in (pairwise, squared, volume)) < 1e-6
        number = lambda r, key: float(r[key])
        assert number(pairwise, "distance") > number(volume, "distance") > number(uniform, "distance")
        assert number(volume, "log_det") > number(pairwise, "log_det") > number(uniform, "log_det")
        assert number(volume, "cities_above_1_percent") >= number(squared, "cities_above_1_percent") > number(pairwise, "cities_above_1_percent")
        for key in ("effective_cities", "vendi", "four_all_different"):
            assert number(volume, key) > number(squared, key) > number(pairwise, key)
