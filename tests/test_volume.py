"""Gram matrix, log det and marginal gains against independent references."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dqo import gram, log_det, marginal_gains, quality_weighted


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def det_by_hand(matrix):
    """Determinant by cofactor expansion for small matrices, by LU in numpy's own routine for large ones."""
    n = len(matrix)
    if n > 6:
        import numpy
        return float(numpy.linalg.det(matrix.numpy()))
    if n == 0:
        return 1.0
    minor = lambda j: det_by_hand(matrix[1:, [c for c in range(n) if c != j]])
    return sum((-1) ** j * float(matrix[0, j]) * minor(j) for j in range(n))


def gains_by_hand(phi):
    """The definition: k + 1 determinants."""
    k = len(phi)
    M = phi @ phi.T + torch.eye(k, dtype=phi.dtype)
    rest = [[j for j in range(k) if j != i] for i in range(k)]
    return torch.tensor([math.log(det_by_hand(M)) - math.log(det_by_hand(M[r][:, r])) for r in rest], dtype=phi.dtype)


@pytest.mark.parametrize("k,D", [(1, 5), (2, 3), (3, 8), (5, 2), (6, 384), (16, 4), (64, 16), (64, 384)])
def test_gains_are_the_determinants(k, D):
    phi = unit(k, D)
    torch.testing.assert_close(marginal_gains(phi), gains_by_hand(phi), rtol=0, atol=1e-10)


def test_gains_with_duplicates():
    phi = unit(6, 9)
    phi[3] = phi[0]
    phi[5] = phi[0]
    g = marginal_gains(phi)
    torch.testing.assert_close(g, gains_by_hand(phi), rtol=0, atol=1e-12)
    torch.testing.assert_close(g[[3, 5]], g[[0, 0]], rtol=0, atol=1e-12)  # copies share one gain,
    assert g[0] < g[[1, 2, 4]].min()  # and it is the smallest


def test_batches_are_groups():
    """A group's gains depend on no other group, for any number of leading dimensions."""
    phi = unit(3, 4, 5, 7)
    g, v = marginal_gains(phi), log_det(phi)
    assert g.shape == (3, 4, 5) and v.shape == (3, 4)
    for a, b in itertools.product(range(3), range(4)):
        torch.testing.assert_close(g[a, b], gains_by_hand(phi[a, b]), rtol=0, atol=1e-12)
        M = gram(phi[a, b]) + torch.eye(5, dtype=torch.float64)
        assert abs(v[a, b].item() - math.log(det_by_hand(M))) < 1e-12


def test_float32_in_float32_out():
    phi = unit(4, 8, 384)
    g = marginal_gains(phi.float())
    assert g.dtype == torch.float32 and log_det(phi.float()).dtype == torch.float32
    torch.testing.assert_close(g.double(), marginal_gains(phi), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4, 8, 64])
def test_tight_range_is_reached(k):
    same, orthogonal = unit(1, 70).expand(k, 70), torch.eye(70, dtype=torch.float64)[:k]
    torch.testing.assert_close(marginal_gains(same), torch.full((k,), math.log(1 + 1 / k), dtype=torch.float64))
    torch.testing.assert_close(marginal_gains(orthogonal), torch.full((k,), math.log(2), dtype=torch.float64))
    assert abs(log_det(same).item() - math.log(1 + k)) < 1e-12
    assert abs(log_det(orthogonal).item() - k * math.log(2)) < 1e-12
    between = marginal_gains(unit(200, k, 3))
    assert between.min() >= math.log(1 + 1 / k) - 1e-12 and between.max() <= math.log(2) + 1e-12


def test_permutation_equivariance():
    phi, order = unit(7, 5), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(marginal_gains(phi[order]), marginal_gains(phi)[order], rtol=0, atol=1e-12)


def test_quality_weighted_kernel():
    phi, q = unit(4, 6), torch.tensor([0.0, 0.25, 1.0, 1.0], dtype=torch.float64)
    psi = quality_weighted(phi, q)
    D = q.sqrt().diag()
    torch.testing.assert_close(gram(psi), D @ gram(phi) @ D)
    g = marginal_gains(psi)
    assert g[0] == 0  # a worthless response gains nothing, however strange,
    torch.testing.assert_close(g[1:], marginal_gains(psi[1:]))  # and does not change the others
    lone = marginal_gains(quality_weighted(phi, torch.tensor([0.0, 0.0, 1.0, 0.0])))
    torch.testing.assert_close(lone[2].item(), math.log(2))  # the kernel itself pays for a lone right answer


@pytest.mark.parametrize("k,D", [(2, 3), (3, 2), (4, 3)])
def test_d_optimality_identity(k, D):
    """E det(L + I) over iid samples = sum_j C(k, j) j! e_j(eigenvalues of E phi phi^T), by enumeration of all tuples."""
    phi = unit(5, D, seed=3)
    p = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
    expected = sum(math.prod(p[i].item() for i in t) * math.exp(log_det(phi[list(t)]).item()) for t in itertools.product(range(5), repeat=k))
    eigenvalues = torch.linalg.eigvalsh((phi.T * p) @ phi).tolist()
    e = lambda j: sum(math.prod(c) for c in itertools.combinations(eigenvalues, j))
    identity = sum(math.comb(k, j) * math.factorial(j) * e(j) for j in range(min(k, D) + 1))
    assert abs(expected - identity) < 1e-12


def test_volume_sees_what_pairwise_distance_cannot():
    """Two clusters and four answers that all differ: the same mean pairwise distance, but not the same volume."""
    clusters = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]]
    spread = torch.linalg.cholesky(torch.full((4, 4), 1 / 3, dtype=torch.float64) + torch.eye(4, dtype=torch.float64) * 2 / 3)
    distance = lambda phi: ((1 - gram(phi)).sum() / 12).item()
    assert abs(distance(clusters) - 2 / 3) < 1e-12 and abs(distance(spread) - 2 / 3) < 1e-12
    assert round(log_det(clusters).item(), 3) == 2.197 and round(log_det(spread).item(), 3) == 2.631
