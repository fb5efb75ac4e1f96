"""Gram matrix, log det and marginal gains against independent references."""

import itertools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F

from dqo import gaussian, gram, log_det, marginal_gains, quality_weighted


def unit(*shape, seed=0):
    """Random vectors of length 1."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)


def all_but(i, n):
    return [j for j in range(n) if j != i]


def det_by_hand(matrix):
    """Cofactor expansion of small matrices, numpy's own LU for large ones."""
    n = len(matrix)
    if n > 6:
        return float(numpy.linalg.det(matrix.numpy()))
    if n == 0:
        return 1.0
    det = 0.0
    for j in range(n):
        minor = det_by_hand(matrix[1:, all_but(j, n)])
        det += (-1) ** j * float(matrix[0, j]) * minor
    return det


def log_det_by_hand(phi):
    return math.log(det_by_hand(phi @ phi.T + torch.eye(len(phi), dtype=phi.dtype)))


def gains_by_hand(phi):
    """The definition: k + 1 determinants."""
    k = len(phi)
    whole = log_det_by_hand(phi)
    gains = [whole - log_det_by_hand(phi[all_but(i, k)]) for i in range(k)]
    return torch.tensor(gains, dtype=phi.dtype)


@pytest.mark.parametrize("k, D", [
    (1, 5),
    (2, 3),
    (3, 8),
    (5, 2),
    (6, 384),
    (16, 4),
    (64, 16),
    (64, 384),
])
def test_gains_are_the_determinants(k, D):
    """-log [M^-1]_ii is the difference of two log determinants, for k and D of any sizes."""
    phi = unit(k, D)
    torch.testing.assert_close(marginal_gains(phi), gains_by_hand(phi), rtol=0, atol=1e-10)


def test_gains_with_duplicates():
    """Copies share one gain, and it is the smallest of the group."""
    phi = unit(6, 9)
    phi[3] = phi[0]
    phi[5] = phi[0]
    g = marginal_gains(phi)
    torch.testing.assert_close(g, gains_by_hand(phi), rtol=0, atol=1e-12)
    torch.testing.assert_close(g[[3, 5]], g[[0, 0]], rtol=0, atol=1e-12)
    assert g[0] < g[[1, 2, 4]].min()


def test_batches_are_groups():
    """A group's gains depend on no other group, for any number of leading dimensions."""
    phi = unit(3, 4, 5, 7)
    g, v = marginal_gains(phi), log_det(phi)
    assert g.shape == (3, 4, 5)
    assert v.shape == (3, 4)
    for a, b in itertools.product(range(3), range(4)):
        group = phi[a, b]
        torch.testing.assert_close(g[a, b], gains_by_hand(group), rtol=0, atol=1e-12)
        M = gram(group) + torch.eye(5, dtype=torch.float64)
        assert abs(v[a, b].item() - math.log(det_by_hand(M))) < 1e-12


def test_float32_in_float32_out():
    """The result has the type of the embeddings, and is as exact as that type allows."""
    phi = unit(4, 8, 384)
    g = marginal_gains(phi.float())
    assert g.dtype == torch.float32
    assert log_det(phi.float()).dtype == torch.float32
    torch.testing.assert_close(g.double(), marginal_gains(phi), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4, 8, 64])
def test_tight_range_is_reached(k):
    """Gains run from log(1 + 1/k), all equal, to log 2, all orthogonal, and never beyond."""
    low, high = math.log(1 + 1 / k), math.log(2)
    same = unit(1, 70).expand(k, 70)
    orthogonal = torch.eye(70, dtype=torch.float64)[:k]

    all_low = torch.full((k,), low, dtype=torch.float64)
    all_high = torch.full((k,), high, dtype=torch.float64)
    torch.testing.assert_close(marginal_gains(same), all_low)
    torch.testing.assert_close(marginal_gains(orthogonal), all_high)
    assert abs(log_det(same).item() - math.log(1 + k)) < 1e-12
    assert abs(log_det(orthogonal).item() - k * math.log(2)) < 1e-12

    between = marginal_gains(unit(200, k, 3))
    assert between.min() >= low - 1e-12
    assert between.max() <= high + 1e-12


def test_permutation_equivariance():
    """The order of the responses does not matter: permuted embeddings, permuted gains."""
    phi = unit(7, 5)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    permuted = marginal_gains(phi)[order]
    torch.testing.assert_close(marginal_gains(phi[order]), permuted, rtol=0, atol=1e-12)


def test_quality_weighted_kernel():
    """A worthless response gains nothing, however strange, and does not change the others."""
    phi = unit(4, 6)
    q = torch.tensor([0.0, 0.25, 1.0, 1.0], dtype=torch.float64)
    weighted = quality_weighted(phi, q)
    D = q.sqrt().diag()
    torch.testing.assert_close(gram(weighted), D @ gram(phi) @ D)
    g = marginal_gains(weighted)
    assert g[0] == 0
    torch.testing.assert_close(g[1:], marginal_gains(weighted[1:]))
    # The kernel itself pays for a lone right answer.
    lone = marginal_gains(quality_weighted(phi, torch.tensor([0.0, 0.0, 1.0, 0.0])))
    torch.testing.assert_close(lone[2].item(), math.log(2))


def test_gaussian_kernel():
    """L_ij is exp(-|phi_i - phi_j|^2 / 2), pair by pair; orthogonal ones are e^-1 alike."""
    phi = unit(5, 4)
    phi[3] = phi[0]
    L = gram(gaussian(phi))
    for i, j in itertools.product(range(5), range(5)):
        by_hand = math.exp(-(phi[i] - phi[j]).square().sum().item() / 2)
        assert abs(L[i, j].item() - by_hand) < 1e-12
    groups = torch.stack([phi, unit(5, 4, seed=1)])
    torch.testing.assert_close(gram(gaussian(groups))[0], L)

    # Two orthogonal responses, by hand: M = [[2, 1/e], [1/e, 2]], and 2 without either.
    g = marginal_gains(gaussian(torch.eye(2)))
    both = math.log((4 - math.exp(-2)) / 2)
    torch.testing.assert_close(g, torch.tensor([both, both]))


def test_an_empty_text_spans_nothing_in_the_gaussian_kernel():
    """Its vector is zero, to some encoders, and at the same distance from all others."""
    phi = torch.cat([torch.zeros(2, 3), torch.eye(3)])
    g = marginal_gains(gaussian(phi))
    assert not gaussian(phi)[:2].any()
    torch.testing.assert_close(g[:2], torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(g[2:], marginal_gains(gaussian(torch.eye(3))))


def elementary_symmetric(values, j):
    """e_j: the sum over all products of j of the values."""
    return sum(math.prod(chosen) for chosen in itertools.combinations(values, j))


@pytest.mark.parametrize("k, D", [
    (2, 3),
    (3, 2),
    (4, 3),
])
def test_d_optimality_identity(k, D):
    """E det(L + I) of k iid samples is sum_j C(k, j) j! e_j(eigenvalues of E phi phi^T).

    So the volume grows with the elementary symmetric polynomials of these eigenvalues: it
    wants all directions of meaning, and not just two distant ones, as D-optimal designs do.
    The left side is summed over all k-tuples.
    """
    phi = unit(5, D, seed=3)
    p = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
    expected = 0.0
    for group in itertools.product(range(5), repeat=k):
        probability = math.prod(p[list(group)].tolist())
        expected += probability * math.exp(log_det(phi[list(group)]).item())

    eigenvalues = torch.linalg.eigvalsh((phi.T * p) @ phi).tolist()
    identity = 0.0
    for j in range(min(k, D) + 1):
        ordered_choices = math.comb(k, j) * math.factorial(j)
        identity += ordered_choices * elementary_symmetric(eigenvalues, j)
    assert abs(expected - identity) < 1e-12


def test_volume_sees_what_pairwise_distance_cannot():
    """Two clusters and four answers that all differ: equal mean distance, but not volume."""
    eye = torch.eye(4, dtype=torch.float64)
    clusters = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]]
    cosines_of_a_third = torch.full((4, 4), 1 / 3, dtype=torch.float64) + eye * 2 / 3
    spread = torch.linalg.cholesky(cosines_of_a_third)

    def distance(phi):
        return ((1 - gram(phi)).sum() / 12).item()  # mean over the 12 ordered pairs

    assert abs(distance(clusters) - 2 / 3) < 1e-12
    assert abs(distance(spread) - 2 / 3) < 1e-12
    assert round(log_det(clusters).item(), 3) == 2.197
    assert round(log_det(spread).item(), 3) == 2.631
