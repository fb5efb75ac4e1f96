"""Gram matrix, log det and marginal gains against independent references."""

import itertools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F

from dqo import dqo_quality, gram, log_det, marginal_gains


def unit(*shape, seed=0):
    """Random vectors of length 1."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)


def gains(phi):
    return marginal_gains(gram(phi))


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=atol)


def all_but(i, n):
    return [j for j in range(n) if j != i]


def det_by_hand(matrix):
    """Cofactor expansion of small matrices, numpy's own LU for large ones."""
    n = len(matrix)
    if n > 6:
        return float(numpy.linalg.det(matrix.numpy()))
    return 1.0 if n == 0 else sum(
        (-1) ** j * float(matrix[0, j]) * det_by_hand(matrix[1:, all_but(j, n)])
        for j in range(n))


def gains_by_hand(phi):
    """The definition: k + 1 determinants."""
    def volume(phi):
        return math.log(det_by_hand(phi @ phi.T + torch.eye(len(phi), dtype=phi.dtype)))
    return [volume(phi) - volume(phi[all_but(i, len(phi))]) for i in range(len(phi))]


def test_the_example_of_the_docstring():
    """Two equal responses and a third, orthogonal to both: log 6/4, log 6/4, log 6/3."""
    phi = torch.eye(2)[[0, 0, 1]]
    assert gram(phi).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    close(log_det(gram(phi)), math.log(6), 1e-6)
    close(gains(phi), [math.log(1.5), math.log(1.5), math.log(2)], 1e-6)


@pytest.mark.parametrize("k, D", [(1, 5), (2, 3), (3, 8), (5, 2), (6, 384), (16, 4), (64, 384)])
def test_gains_are_the_determinants(k, D):
    """-log [M^-1]_ii is the difference of two log determinants, for k and D of any sizes; copies
    share one gain, and it is the smallest of the group."""
    phi = unit(k, D)
    close(gains(phi), gains_by_hand(phi), 1e-10)
    if k > 5:
        phi = phi[[0, 1, 2, 0, 4, 0, *range(6, k)]]
        g = gains(phi)
        close(g, gains_by_hand(phi), 1e-10)
        close(g[[3, 5]], g[[0, 0]])
    if k == 6:
        assert g[0] < g[[1, 2, 4]].min()


def test_batches_are_groups():
    """A group's gains depend on no other group, for any number of leading dimensions, and on the
    order within the group only by following it."""
    phi, order = unit(3, 4, 5, 7), [3, 0, 4, 2, 1]
    g, v = gains(phi), log_det(gram(phi))
    assert g.shape == (3, 4, 5) and v.shape == (3, 4)
    for a, b in itertools.product(range(3), range(4)):
        group = phi[a, b]
        close(g[a, b], gains_by_hand(group))
        det = det_by_hand(group @ group.T + torch.eye(5, dtype=torch.float64))
        assert abs(v[a, b].item() - math.log(det)) < 1e-12
    close(gains(phi[..., order, :]), g[..., order])


def test_float32_in_float32_out():
    """The result has the type of the embeddings, and is as exact as that type allows."""
    phi = unit(4, 8, 384)
    assert gains(phi.float()).dtype == log_det(gram(phi.float())).dtype == torch.float32
    close(gains(phi.float()).double(), gains(phi), 1e-6)
    near = F.normalize(unit(1, 384) + 1e-4 * phi[0], dim=-1)  # near-copies
    close(gains(near.float()).double(), gains(near), 1e-6)


@pytest.mark.parametrize("k", [1, 2, 4, 8, 64])
def test_tight_range_is_reached(k):
    """Gains run from log(1 + 1/k), all equal, to log 2, all orthogonal, and never beyond; the
    volume from log(1 + k) to k log 2."""
    low, high = math.log(1 + 1 / k), math.log(2)
    same, orthogonal = unit(1, 70).expand(k, 70), torch.eye(70, dtype=torch.float64)[:k]
    close(gains(same), [low] * k)
    close(gains(orthogonal), [high] * k)
    close(log_det(gram(same)), math.log(1 + k))
    close(log_det(gram(orthogonal)), k * high)
    between = gains(unit(200, k, 3))
    assert low - 1e-12 <= between.min() and between.max() <= high + 1e-12


def test_what_spans_nothing():
    """An empty text, the zero vector, gains 0 and leaves the others as they are. So does a wrong
    answer in the quality kernel, sqrt(q_i q_j) L_ij, however strange it is."""
    phi = unit(4, 6)
    without = gains(phi[1:])
    phi[0] = 0
    close(gains(phi), [0, *without])

    phi, q = unit(4, 6), torch.tensor([0.0, 0.25, 1.0, 1.0], dtype=torch.float64)
    g = dqo_quality(q[None], gram(phi)[None], None, alpha=2.0)[0] - q  # alpha * gain
    close(g / 2, gains_by_hand(q.sqrt()[:, None] * phi))
    assert g[0] == 0
    # The kernel itself pays for a lone right answer.
    lone = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    paid = dqo_quality(lone, gram(phi)[None], None, alpha=2.0)
    close(paid, [[0, 0, 1 + 2 * math.log(2), 0]], 1e-6)


def test_volume_sees_what_pairwise_distance_cannot():
    """Two clusters and four answers that all differ: equal mean distance, but not volume."""
    clusters = gram(torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]])
    spread = (1 + 2 * torch.eye(4, dtype=torch.float64)) / 3  # all cosines 1/3
    for L, volume in ((clusters, 2.197), (spread, 2.631)):
        close((1 - L).sum() / 12, 2 / 3)  # the mean over the 12 ordered pairs
        assert round(log_det(L).item(), 3) == volume
