"""The objectives of data/results/rivals.py, each worked by hand on a small group, in numbers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import REPO
from data.results import rivals
from data.tasks import function_in
from dqo import OBJECTIVES, BadInput, Rollout, advantages, gram
from test_gradient import (ALPHA, QUALITY, all_groups, expectation, expected_update, gradient,
                           kernel, one_step, policy)

# default strengths; the first six read L
ALL = dict(pairwise=1, setpo=5, repexp=1, darling=0.8, dra=1, polyepo=0.9, likelihood=0.25,
           entropy=0.01, passk=4, maxrl=1)
KNOWN = {**vars(rivals), **OBJECTIVES}
E1, E2, E3, E4 = torch.eye(4, dtype=torch.float64)
NOTHING = 0 * E1  # the embedding of an empty text


def rollout_of(logps):
    """What objectives read of one group's Rollout."""
    T = max(map(len, logps))
    logp = torch.tensor([[x + [0.0] * (T - len(x)) for x in logps]])  # (1, k, T)
    mask = torch.tensor([[[t < len(x) for t in range(T)] for x in logps]])
    return Rollout(None, None, None, mask, logp, [], [], None)


def shaped(name, quality, phi=None, logps=None, **alpha):
    """What one group is paid, (k,)."""
    L = gram(torch.stack(phi or [E1] * len(quality)))[None]
    rollout = rollout_of(logps or [[-1.0, -2.0]] * len(quality))
    quality = torch.tensor([quality], dtype=torch.float64)
    return KNOWN[name](quality, L, rollout, **alpha)[0]


def close(a, b, atol=1e-7):
    torch.testing.assert_close(a, torch.tensor(b, dtype=torch.float64), rtol=0, atol=atol)


def test_pairwise():
    """The mean distance to the two others, which are 0 or 1 away, times alpha."""
    close(shaped("pairwise", [1.0, 0.0, 1.0], [E1, E1, E2], alpha=3.0), [2.5, 1.5, 4.0])


def test_setpo():
    """D - D_{-i}: the mean of row i of L is 2/3, 2/3 and 1/3; without the first or second, the
    rows left have the mean 1/2; without the third, 1."""
    whole = -(2 * math.log(5 / 3) + math.log(4 / 3)) / 3
    copy, other = 2 * (whole + math.log(1.5)), 2 * (whole + math.log(2))
    close(shaped("setpo", [1.0, 0.0, 1.0], [E1, E1, E2], alpha=2.0), [1 + copy, copy, 1 + other])
    # Two opposites: D = -log 1, and -log 2 for either alone.
    close(shaped("setpo", [0.0, 1.0], [E1, -E1], alpha=1.0), [math.log(2), 1 + math.log(2)])


def test_repexp():
    """It is 1 - e^-g for g the marginal gain, log 6/4 or log 6/3, and phi' (I + sum phi phi')^-1
    phi with the inverse of D x D."""
    paid = shaped("repexp", [1.0, 0.0, 1.0], [E1, E1, E2], alpha=2.0)
    close(paid, [1 + 2 / 3, 2 / 3, 2.0])
    phi = F.normalize(torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    inverse = torch.linalg.inv(torch.eye(4) + phi.T @ phi)  # (D, D)
    close(shaped("repexp", [0.0] * 6, list(phi)), (phi @ inverse * phi).sum(1).tolist())


def turned(degrees):
    """E1, turned this far towards E2."""
    return math.cos(math.radians(degrees)) * E1 + math.sin(math.radians(degrees)) * E2


CHAIN = [turned(0), turned(40), turned(80), E3]  # cosines of neighbours .77, of 1 and 3 .17


def test_darling():
    """A reward shrinks with the size of its cluster, links are transitive, a tenth is left."""
    close(shaped("darling", [1.0, 1.0, 0.5, 1.0], CHAIN, alpha=0.7), [1 / 3, 1 / 3, 0.5 / 3, 1.0])
    close(shaped("darling", [1.0, 0.0, 0.5, 1.0], CHAIN, alpha=0.8), [1.0, 0.0, 0.5, 1.0])
    close(shaped("darling", [1.0, 0.0, 1.0], [E1] * 3), [0.1, 0.0, 0.1])
    # A copy of something bad is as bad.
    close(shaped("darling", [-1.0, -1.0, 0.0], [E1, E1, E2]), [-1.0, -1.0, 0.0])
    # A ring of 64, each linked to its two neighbours, is one cluster.
    ring = F.normalize(torch.eye(64).double() + 2 * torch.eye(64).roll(1, 0), dim=1)
    close(shaped("darling", [1.0] * 64, list(ring), alpha=0.3), [0.1] * 64)


def test_dra():
    """Each reward over the sum of its row of L, what is opposite counting nothing: 2, 2, 1, 1."""
    group = [E1, E1, E2, -E2]
    close(shaped("dra", [1.0, 0.5, 1.0, 0.0], group), [0.5, 0.25, 1.0, 0.0])
    close(shaped("dra", [1.0, -1.0, 1.0, 0.0], group, alpha=2.0), [0.25, -1.0, 1.0, 0.0])


def test_likelihood():
    """A reward loses the more, the likelier its response, wrong ones counted: ranks 2, 1, 0, 3."""
    logps = [[-1.0], [-2.0], [-3.0], [-0.5]]
    close(shaped("likelihood", [1.0, 1.0, 0.0, 2.0], logps=logps, alpha=0.5),
          [0.75, 0.875, 0.0, 1.25])
    close(shaped("likelihood", [-1.0, 1.0], logps=[[-1.0], [-2.0]], alpha=1.0), [-1.0, 1.0])
    # Per token: -2 and -3, though the sums are -6 and -3. Nearly equal is equal.
    logps = [[-1.0, -2.0, -3.0], [-3.0], [-3.0 + 1e-6]]
    close(shaped("likelihood", [1.0] * 3, logps=logps, alpha=1.0), [1 / 3, 1.0, 1.0])


def test_entropy():
    """Token by token, of right answers alone, and 0 after their end."""
    logps = [[-3.0, -0.5], [-3.0], [-3.0]]
    close(shaped("entropy", [1.0, 1 - 1e-9, 0.5], logps=logps, alpha=0.1),
          [[1.1, 0.975], [1.2 - 1e-9, 1 - 1e-9], [0.5, 0.5]])


def test_passk():
    """A right answer's share in pass@m, by enumeration: the others of its draw are all wrong."""
    quality = [1.0, 1 - 1e-9, 0.0, 0.5, 0.0]  # two right ones of five
    for m in range(1, 6):
        expected = []
        for i, q in enumerate(quality):
            draws = list(itertools.combinations(quality[:i] + quality[i + 1:], m - 1))
            expected.append((q > 0.9) * sum(max(x, default=0) < 0.9 for x in draws) / len(draws))
        close(shaped("passk", quality, alpha=m), expected)


def test_maxrl():
    """Minus its mean, (r - mean) / mean; alpha is an exponent."""
    paid = shaped("maxrl", [1.0, 0.0, 0.0, 0.0])
    close(paid, [4.0, 0.0, 0.0, 0.0], 1e-4)
    close(advantages(paid[None, :, None])[0, :, 0], [3.0, -1.0, -1.0, -1.0], 1e-4)
    close(shaped("maxrl", [0.5, 0.0], alpha=0.5), [1.0, 0.0], 1e-4)
    close(shaped("maxrl", [0.5, 0.0], alpha=0.0), [0.5, 0.0])


def test_polyepo():
    """Sets of 4 of 5: mean r times the share of clusters; the first three are one."""
    paid = shaped("polyepo", [1.0, 0.0, 1.0, 1.0, 0.0], [E1, E1, turned(10), E2, E3])
    out = [6 / 16, 9 / 16, 6 / 16, 4 / 16, 6 / 16]  # the worth without each: 2 right, 3 clusters
    close(paid, [(sum(out) - x) / 4 for x in out])
    # Clusters are those of the group: the first and third are alike without the second, too.
    close(shaped("polyepo", [1.0] * 5, [*CHAIN, E4], alpha=0.7), [0.625] * 3 + [0.6875] * 2)


def polychromic(y, L):
    """Mean quality times the share of clusters; 0 and 2 are alike."""
    return QUALITY[y].mean() * len({0 if i == 2 else i for i in y.tolist()}) / 4


@pytest.mark.parametrize("name, alpha, k, of_set, m, factor", [
    ("pairwise", ALPHA, 3, lambda y, L: (1 - L).triu(1).sum() / 2, 3, ALPHA),
    ("setpo", ALPHA, 4, lambda y, L: -L.mean(1).log1p().mean(), 4, ALPHA),
    ("passk", 3, 5, lambda y, L: ((y == 1) | (y == 3)).any().double(), 3, 5 / 3),
    ("polyepo", 0.9, 5, polychromic, 4, 5 / 4)])
def test_those_that_follow_a_gradient(name, alpha, k, of_set, m, factor):
    """Without a baseline, every group enumerated: pairwise and setpo follow E[ sum r + alpha *
    diversity ], passk pass@m and polyepo the worth of sets of 4, times k over the set's size."""
    theta, logp = policy()
    groups, sets = all_groups(4, k), all_groups(4, m)
    quality = torch.tensor([0, 1, 0, 1]).double() if name == "passk" else QUALITY[:4]
    weight = KNOWN[name](quality[groups], kernel(groups), None, alpha)
    value = torch.stack([of_set(group, L) for group, L in zip(sets, kernel(sets))])
    exact = factor * expectation(logp, sets, value)
    if m == k:
        exact = exact + k * (logp.exp() * quality).sum()
    estimate = gradient(expected_update(logp, groups, weight), theta)
    torch.testing.assert_close(estimate, gradient(exact, theta))
    assert estimate.abs().max() > 1e-2


GROUPS = [[E1, E2, E3, E4, CHAIN[1]], [E1] * 5, [E1, -E1, E2, -E2, E3], [NOTHING, E1, E2, E2, E3],
          [NOTHING, E1, NOTHING, E2, NOTHING], [NOTHING] * 5]
QUALITIES = [[1.0, 0, 0, 0, 0], [0, 1.0, 1.0, 0, 0], [0.0] * 5, [0.3] * 5, [1.0] * 5]
LOGPS = [[-0.5], [-1.0, -2.0], [-9.0, -0.1], [-1.5], [-2.0, -2.0]]


@pytest.mark.parametrize("name", [*ALL, "dqo"])
def test_no_group_breaks_it_and_emptiness_is_not_paid(name):
    """Whatever is right and however alike the texts are, all is finite; of equal qualities an empty
    text is paid least, and no more than its quality. A group is paid the same in any company."""
    cases, alone = list(itertools.product(GROUPS, QUALITIES)), []
    for phi, quality in cases:
        paid = shaped(name, quality, phi, LOGPS)
        alone.append(paid)
        assert paid.isfinite().all(), (phi, quality)
        empty = [not x.any() for x in phi]
        if name in [*ALL][:6] and len(set(quality)) == 1 and any(empty):
            assert (paid[empty] <= min(paid.min(), quality[0]) + 1e-6).all(), (phi, quality)
    rollout = rollout_of(LOGPS)
    rollout.logp, rollout.mask = (x.repeat(30, 1, 1) for x in (rollout.logp, rollout.mask))
    L = torch.stack([gram(torch.stack(phi)) for phi, _ in cases])
    quality = torch.tensor([quality for _, quality in cases]).double()
    torch.testing.assert_close(KNOWN[name](quality, L, rollout), torch.stack(alone))


@pytest.mark.parametrize("name, quality, alpha, message", [
    ("passk", [1.0] * 4, 1.5, "whole"), ("passk", [1.0] * 4, 0, "whole"),
    ("passk", [1.0] * 4, 5, "k = 4"), ("polyepo", [1.0] * 4, 0.9, "k = 4"),
    ("maxrl", [1.0, -0.5, 0.0, 0.0], 1.0, "at least 0")])
def test_what_makes_no_sense_is_refused(name, quality, alpha, message):
    with pytest.raises(BadInput, match=message):
        shaped(name, quality, alpha=alpha)


@pytest.mark.parametrize("name", ALL)
def test_a_step_with_each(name, model, tokenizer, monkeypatch):
    """Found by its name in the file, each goes through a whole step; all of it is centred."""
    function = function_in(f"{REPO / 'data/results/rivals.py'}:{name}")
    assert function.__defaults__ == (ALL[name],)
    monkeypatch.setitem(OBJECTIVES, name, function)
    off, advantage = one_step(model, tokenizer, None, lambda texts: [1.0, 0.0, 0.0, 0.0, 0.0] * 2,
                              objective=name, beta=0.0, k=5)
    assert off.isfinite().all() and off.abs().max() > 1e-4
    close(advantage.sum(1), [0.0, 0.0], 1e-5)
