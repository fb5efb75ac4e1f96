"""What each objective adds to the qualities of a group, against values worked out by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from dqo import BadInput, Config, diversity_bonus, dqo_step, policy_loss, sample, token_logps
from test_step import ROWS, config

E1, E2, E3 = torch.eye(3)


def bonus(objective, quality, phi=None, logp=None, alpha=None):
    alpha = Config(objective=objective).alpha if alpha is None else alpha
    stack = lambda x: None if x is None else torch.stack(x) if isinstance(x[0], torch.Tensor) else torch.tensor(x)
    return diversity_bonus(objective, alpha, torch.tensor([quality]), *(None if x is None else stack(x)[None] for x in (phi, logp)))[0].tolist()


def test_published_strengths():
    assert {o: Config(objective=o).alpha for o in ("dqo", "pairwise", "likelihood", "entropy", "darling", "dra")} == dict(
        dqo=1.0, pairwise=1.0, likelihood=0.25, entropy=0.01, darling=0.8, dra=1.0)
    assert Config(objective="likelihood", alpha=0.0).alpha == 0.0


def test_dqo_and_grpo():
    assert bonus("grpo", [1.0, 0.0, 0.5]) == [0.0, 0.0, 0.0]
    torch.testing.assert_close(bonus("dqo", [1.0, 0.0, 1.0], [E1, E1, E2], alpha=2.0), [2 * math.log(1.5), 2 * math.log(1.5), 2 * math.log(2)], rtol=1e-6, atol=0)


def test_pairwise():
    torch.testing.assert_close(bonus("pairwise", [1.0, 0.0, 1.0], [E1, E1, E2], alpha=3.0), [1.5, 1.5, 3.0])  # distances 0, 1, 1


def test_likelihood():
    """Ranks among all four, the wrong one included, 0 the least likely: 2, 1, 0, 3. A reward of 0 or below is left alone."""
    torch.testing.assert_close(bonus("likelihood", [1.0, 1.0, 0.0, 2.0], logp=[-1.0, -2.0, -3.0, -0.5], alpha=0.5), [-0.25, -0.125, 0.0, -0.75])
    torch.testing.assert_close(bonus("likelihood", [1.0, -1.0], logp=[-1.0, -2.0], alpha=1.0), [-0.5, 0.0])
    assert bonus("likelihood", [1.0, 1.0], logp=[-1.0, -1.0 + 1e-6], alpha=1.0) == [0.0, 0.0]  # neither is less likely, but for rounding


def test_darling():
    """Clusters are transitive: at 40 degrees each to the next, 1 and 3 are alike through 2 (cosine 0.77 each, 0.17 between them)."""
    turn = lambda degrees: torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), 0.0])
    chain = [turn(0), turn(40), turn(80), E3]
    torch.testing.assert_close(bonus("darling", [1.0, 1.0, 0.5, 1.0], chain, alpha=0.7), [1 / 3 - 1, 1 / 3 - 1, 0.5 / 3 - 0.5, 0.0])
    torch.testing.assert_close(bonus("darling", [1.0, 1.0, 0.0, 1.0], [E1] * 4), [-0.9, -0.9, 0.0, -0.9])  # at least a tenth is left
    torch.testing.assert_close(bonus("darling", [1.0, 0.0, 0.0, 1.0], chain, alpha=0.9), [0.0] * 4)  # no two alike
    assert bonus("darling", [-1.0, -1.0, 0.0], [E1, E1, E2]) == [0.0] * 3  # a copy of something bad is as bad
    many = F.normalize(torch.eye(64) + 2 * torch.eye(64).roll(1, 0), dim=1)  # a ring of 64, each linked to its two neighbours
    assert diversity_bonus("darling", 0.3, torch.ones(1, 64), many[None])[0].tolist() == pytest.approx([-0.9] * 64)


def test_dra():
    """Each reward over the sum of its row of L, what is opposite counting nothing: 2, 2, 1, 1."""
    group = [E1, E1, E2, -E2]
    torch.testing.assert_close(bonus("dra", [1.0, 0.5, 1.0, 0.0], group), [-0.5, -0.25, 0.0, 0.0])
    torch.testing.assert_close(bonus("dra", [1.0, -1.0, 1.0, 0.0], group, alpha=2.0), [-0.75, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("objective", ["dqo", "pairwise", "likelihood", "darling", "dra"])
def test_each_group_is_on_its_own(objective):
    torch.manual_seed(0)
    quality, phi, logp = torch.rand(3, 4), F.normalize(torch.randn(3, 4, 2), dim=-1), -torch.rand(3, 4)
    strength = Config(objective=objective).alpha
    together = diversity_bonus(objective, strength, quality, phi, logp)
    alone = torch.cat([diversity_bonus(objective, strength, *(x[i:i + 1] for x in (quality, phi, logp))) for i in range(3)])
    torch.testing.assert_close(together, alone)
    assert together.std() > 0.01


# ------------------------------------------------------------------- entropy: a weight per token, after the baseline
def entropy_step(model, tokenizer, quality, **kw):
    """The change that one step of plain gradient ascent makes when all responses have this quality."""
    model, reward = copy.deepcopy(model), lambda prompts, responses, rows: [quality] * len(responses)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    torch.manual_seed(4)
    dqo_step(model, tokenizer, None, reward, optimizer, ROWS, config(objective="entropy", **kw))
    return model, [p.detach() - b for p, b in zip(model.parameters(), before)]


def test_entropy_weights_each_token(model, tokenizer):
    """All rewards are equal, so nothing is left of them, and the update is that of -alpha (log pi + 1) / length alone."""
    for size in (0, 5):
        _, change = entropy_step(model, tokenizer, 1.0, alpha=0.3, micro_batch=size)
        torch.manual_seed(4)
        rollout = sample(model, tokenizer, [r["prompt"] for r in ROWS], 4, 10)
        weight = -0.3 * (rollout.logp + 1) / rollout.mask.sum(1, keepdim=True)       # (B, T)
        loss, _ = policy_loss(token_logps(model, rollout), weight, rollout.mask, 10)
        for got, g in zip(change, torch.autograd.grad(loss, list(model.parameters()))):
            torch.testing.assert_close(got, -g, rtol=1e-4, atol=1e-7)
        assert max(c.abs().max() for c in change) > 1e-4


def test_entropy_leaves_wrong_answers_alone(model, tokenizer):
    assert all(c.abs().max() == 0 for c in entropy_step(model, tokenizer, 0.5)[1])


def test_entropy_does_not_push_correct_answers_down():
    """A policy of one token, right with p = 0.4 in two ways and wrong in others. In expectation the bonus follows the gradient of
    -sum over right tokens of p log p. Differentiating sum log pi of the right answers itself would make them less likely."""
    theta = torch.tensor([0.2, 0.2, 0.3, 0.3]).log().requires_grad_()
    logp, right, mask = theta.log_softmax(0), torch.tensor([True, True, False, False]), torch.ones(4, 1, dtype=torch.bool)
    weight = -1.0 * right * (logp.detach() + 1)
    up = -torch.autograd.grad(sum(p * policy_loss(l.view(1, 1), w.view(1, 1), mask[:1], 1)[0] for p, l, w in zip(logp.exp().detach(), logp, weight)), theta, retain_graph=True)[0]
    torch.testing.assert_close(up, torch.autograd.grad(-(logp.exp() * logp)[right].sum(), theta, retain_graph=True)[0])
    mass = lambda x: x.softmax(0)[right].sum()
    assert mass(theta + 0.1 * up) > mass(theta)
    naive = torch.autograd.grad(-(logp.exp().detach() * logp)[right].sum(), theta)[0]
    assert mass(theta + 0.1 * naive) < mass(theta)


def test_strengths_and_groups_that_make_no_sense_are_refused():
    for kw, message in ((dict(objective="likelihood", alpha=1.5), "at most 1"), (dict(objective="darling", alpha=1.0), "at most 0.999"),
                        (dict(objective="darling", baseline="none", k=1), "k = 2"), (dict(objective="dra", k=1), "k = 2"), (dict(objective="dqo", baseline="none", k=1), "k = 2"),
                        (dict(objective="dra", alpha=-1.0), "at least 0"), (dict(objective="dra", kernel="quality"), "dqo only")):
        with pytest.raises(BadInput, match=message):
            Config(**kw).check()
    for objective in ("likelihood", "entropy", "darling", "dra"):
        Config(objective=objective, k=2).check()
