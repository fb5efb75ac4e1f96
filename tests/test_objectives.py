"""What each objective adds to the qualities of a group, against values worked out by hand."""

import copy
import itertools
import math
import textwrap
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import data.objectives  # noqa: F401  makes the objectives beside dqo and grpo known
from data.objectives import load_objective
from data.options import RunConfig
from dqo import (
    OBJECTIVES,
    BadInput,
    Config,
    dqo_step,
    embed,
    marginal_gains,
    objective,
    policy_loss,
    sample,
    token_logps,
)
from test_step import K, LONGEST, PROMPTS, ROWS, config, sgd

E1, E2, E3 = torch.eye(3)


def bonus(name, quality, phi=None, logp=None, alpha=None):
    """What is added to the qualities of one group, as a list. logp: a mean per response."""
    if alpha is None:
        alpha = Config(objective=name).alpha
    if phi is not None:
        phi = torch.stack(phi)[None]                                        # (1, k, D)
    if logp is not None:
        logp = torch.tensor(logp)[None, :, None]                            # (1, k, 1)
    added = OBJECTIVES[name](torch.tensor([quality]), phi, logp, alpha)
    return added[0].tolist()


def test_published_strengths():
    """Each objective has its own default alpha; an alpha of 0 is not taken for a missing one."""
    published = dict(dqo=1.0, pairwise=1.0, likelihood=0.25, entropy=0.01, darling=0.8, dra=1.0,
                     setpo=5.0, passk=4.0, repexp=1.0)
    assert {name: Config(objective=name).alpha for name in published} == published
    assert Config(objective="likelihood", alpha=0.0).alpha == 0.0
    spared = {name for name in published if not OBJECTIVES[name].embeds}  # the encoder
    assert spared == {"likelihood", "entropy", "passk"}


def test_dqo_and_grpo():
    """grpo adds nothing, dqo alpha times the marginal gains: here log 6/4, log 6/4, log 6/3."""
    assert bonus("grpo", [1.0, 0.0, 0.5]) == [0.0, 0.0, 0.0]
    gains = bonus("dqo", [1.0, 0.0, 1.0], [E1, E1, E2], alpha=2.0)
    by_hand = [2 * math.log(1.5), 2 * math.log(1.5), 2 * math.log(2)]
    torch.testing.assert_close(gains, by_hand, rtol=1e-6, atol=0)


def test_pairwise():
    """The mean distance to the two others, which are 0 or 1 away, times alpha."""
    distances = bonus("pairwise", [1.0, 0.0, 1.0], [E1, E1, E2], alpha=3.0)
    torch.testing.assert_close(distances, [1.5, 1.5, 3.0])


def test_likelihood():
    """A reward loses the more the likelier its response; at 0 or below it is left alone.

    Ranks are among all four, the wrong one included, 0 the least likely: here 2, 1, 0, 3.
    """
    ranked = bonus(
        "likelihood", [1.0, 1.0, 0.0, 2.0], logp=[-1.0, -2.0, -3.0, -0.5], alpha=0.5)
    torch.testing.assert_close(ranked, [-0.25, -0.125, 0.0, -0.75])
    negative = bonus("likelihood", [1.0, -1.0], logp=[-1.0, -2.0], alpha=1.0)
    torch.testing.assert_close(negative, [-0.5, 0.0])
    # Neither is less likely, but for rounding.
    assert bonus("likelihood", [1.0, 1.0], logp=[-1.0, -1.0 + 1e-6], alpha=1.0) == [0.0, 0.0]


def test_likelihood_is_per_token():
    """The mean is over a response's own tokens: -2 and -3, though the sums are -6 and -3."""
    logp = torch.tensor([[[-1.0, -2.0, -3.0], [-3.0, math.nan, math.nan]]])
    added = OBJECTIVES["likelihood"](torch.ones(1, 2), None, logp, 1.0)
    torch.testing.assert_close(added, torch.tensor([[-0.5, 0.0]]))


def turned(degrees):
    """E1, turned this far towards E2."""
    angle = math.radians(degrees)
    return torch.tensor([math.cos(angle), math.sin(angle), 0.0])


def test_darling():
    """A reward shrinks with the size of its cluster, and clusters are transitive.

    In a chain with 40 degrees from each to the next, 1 and 3 are alike through 2: the cosine
    of neighbours is 0.77, that of 1 and 3 only 0.17.
    """
    chain = [turned(0), turned(40), turned(80), E3]
    clustered = bonus("darling", [1.0, 1.0, 0.5, 1.0], chain, alpha=0.7)
    torch.testing.assert_close(clustered, [1 / 3 - 1, 1 / 3 - 1, 0.5 / 3 - 0.5, 0.0])
    no_two_alike = bonus("darling", [1.0, 0.0, 0.0, 1.0], chain, alpha=0.9)
    torch.testing.assert_close(no_two_alike, [0.0] * 4)

    # At least a tenth is left.
    all_equal = bonus("darling", [1.0, 1.0, 0.0, 1.0], [E1] * 4)
    torch.testing.assert_close(all_equal, [-0.9, -0.9, 0.0, -0.9])
    # A copy of something bad is as bad.
    assert bonus("darling", [-1.0, -1.0, 0.0], [E1, E1, E2]) == [0.0] * 3

    # A ring of 64, each linked to its two neighbours, is one cluster.
    ring = F.normalize(torch.eye(64) + 2 * torch.eye(64).roll(1, 0), dim=1)
    added = bonus("darling", [1.0] * 64, list(ring), alpha=0.3)
    assert added == pytest.approx([-0.9] * 64)


def test_dra():
    """Each reward over the sum of its row of L, what is opposite counting nothing: 2, 2, 1, 1."""
    group = [E1, E1, E2, -E2]
    once = bonus("dra", [1.0, 0.5, 1.0, 0.0], group)
    torch.testing.assert_close(once, [-0.5, -0.25, 0.0, 0.0])
    squared = bonus("dra", [1.0, -1.0, 1.0, 0.0], group, alpha=2.0)
    torch.testing.assert_close(squared, [-0.75, 0.0, 0.0, 0.0])


def test_setpo():
    """D - D_{-i} by hand: the mean of row i of L is 2/3, 2/3 and 1/3.

    Without the first or second, the rows left have the mean 1/2; without the third, 1.
    """
    added = bonus("setpo", [1.0, 0.0, 1.0], [E1, E1, E2], alpha=2.0)
    whole = -(2 * math.log(5 / 3) + math.log(4 / 3)) / 3
    by_hand = [2 * (whole + math.log(1.5)), 2 * (whole + math.log(1.5)), 2 * (whole + math.log(2))]
    torch.testing.assert_close(added, [[x] for x in by_hand])  # of each response: per token
    # Two opposites: D = -log 1, and -log 2 for either alone.
    torch.testing.assert_close(bonus("setpo", [1.0, 1.0], [E1, -E1], alpha=1.0),
                               [[math.log(2)]] * 2)


def test_passk():
    """A right answer's share in pass@m, by enumeration: the others of its draw are all wrong."""
    quality = [1.0, 1.0, 0.0, 0.5, 0.0]  # two right ones of five
    for m in range(1, 6):
        expected = []
        for i, q in enumerate(quality):
            others = [other for j, other in enumerate(quality) if j != i]
            draws = list(itertools.combinations(others, m - 1))
            decisive = sum(all(x < 1 for x in draw) for draw in draws) / len(draws)
            expected.append(decisive * (q >= 1) - q)
        torch.testing.assert_close(bonus("passk", quality, alpha=float(m)), expected)
    # At m = 2: the probability that the one other is wrong, 3 of 4.
    torch.testing.assert_close(bonus("passk", quality, alpha=2.0), [-0.25, -0.25, 0.0, -0.5, 0.0])


def test_repexp():
    """It is 1 - e^-g for g the marginal gain, and the formula with the inverse of D x D."""
    added = bonus("repexp", [1.0, 0.0, 1.0], [E1, E1, E2], alpha=2.0)
    torch.testing.assert_close(added, [2 * (1 - 4 / 6), 2 * (1 - 4 / 6), 2 * (1 - 3 / 6)])

    torch.manual_seed(0)
    phi = F.normalize(torch.randn(6, 4), dim=1)
    inverse = torch.linalg.inv(torch.eye(4) + phi.T @ phi)                  # (D, D)
    expected = (phi @ inverse * phi).sum(1)
    torch.testing.assert_close(torch.tensor(bonus("repexp", [0.0] * 6, list(phi))), expected)
    torch.testing.assert_close(expected, 1 - (-marginal_gains(phi)).exp())


@pytest.mark.parametrize("name", ["dqo", "pairwise", "likelihood", "darling", "dra", "setpo",
                                  "passk", "repexp"])
def test_each_group_is_on_its_own(name):
    """Three groups at once get what each gets alone."""
    torch.manual_seed(0)
    quality = torch.rand(3, 4)
    phi = F.normalize(torch.randn(3, 4, 2), dim=-1)
    logp = -torch.rand(3, 4)[:, :, None]
    strength, add = Config(objective=name).alpha, OBJECTIVES[name]
    if name == "passk":
        quality = (quality > 0.4).float()
        strength = 2.0
    together = add(quality, phi, logp, strength)
    alone = []
    for i in range(3):
        one = slice(i, i + 1)
        alone.append(add(quality[one], phi[one], logp[one], strength))
    torch.testing.assert_close(together, torch.cat(alone))
    assert together.std() > 0.01


# --------------------------------------------------- a weight per token, after the baseline
def step_at_equal_quality(model, tokenizer, quality, **kw):
    """The change of each parameter in one step at lr 1 when all responses have this quality."""
    model = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]

    def reward(prompts, responses, rows):
        return [quality] * len(responses)
    torch.manual_seed(4)
    dqo_step(model, tokenizer, None, reward, sgd(model), ROWS, config(**kw))
    return [p.detach() - b for p, b in zip(model.parameters(), before)]


def check_change(change, model, rollout, weight):
    """It is the gradient ascent of sum over tokens of weight * log pi, and not zero."""
    loss, _ = policy_loss(token_logps(model, rollout), weight, rollout.mask, LONGEST)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for got, g in zip(change, expected, strict=True):
        torch.testing.assert_close(got, -g, rtol=1e-4, atol=1e-7)
    assert max(c.abs().max() for c in change) > 1e-4


@pytest.fixture
def known_objectives():
    """What a test adds to OBJECTIVES is forgotten after it."""
    known = dict(OBJECTIVES)
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(known)


def test_a_bonus_per_response_is_centred_and_a_weight_per_token_is_not(
        model, tokenizer, known_objectives):
    """The same constant does nothing as (P, k), and as (P, k, 1) weighs every token."""
    @objective(embeds=False)
    def before_the_baseline(quality, phi, logp, alpha):
        return torch.full_like(quality, alpha)

    @objective(embeds=False)
    def after_the_baseline(quality, phi, logp, alpha):
        return torch.full_like(quality, alpha)[:, :, None]

    options = dict(alpha=0.3, micro_batch=5)
    change = step_at_equal_quality(
        model, tokenizer, 1.0, objective="before_the_baseline", **options)
    assert max(c.abs().max() for c in change) == 0

    change = step_at_equal_quality(
        model, tokenizer, 1.0, objective="after_the_baseline", **options)
    torch.manual_seed(4)
    rollout = sample(model, tokenizer, PROMPTS, K, LONGEST)
    check_change(change, model, rollout, torch.full((len(rollout.texts),), 0.3))


def test_entropy_weights_each_token(model, tokenizer):
    """With all rewards equal, the update is that of -alpha (log pi + 1) / length alone."""
    for size in (0, 5):
        change = step_at_equal_quality(
            model, tokenizer, 1.0, objective="entropy", alpha=0.3, micro_batch=size)
        torch.manual_seed(4)
        rollout = sample(model, tokenizer, PROMPTS, K, LONGEST)
        length = rollout.mask.sum(1, keepdim=True)                          # (B, 1)
        weight = -0.3 * (rollout.logp + 1) / length                         # (B, T)
        check_change(change, model, rollout, weight)


def test_entropy_leaves_wrong_answers_alone(model, tokenizer):
    """Below a reward of 1 there is no bonus, and with all rewards equal no update at all."""
    change = step_at_equal_quality(model, tokenizer, 0.5, objective="entropy")
    assert all(c.abs().max() == 0 for c in change)


def test_entropy_does_not_push_correct_answers_down():
    """In expectation the bonus follows the gradient of -sum over right tokens of p log p.

    A policy of one token, right with p = 0.4 in two ways and wrong in two others. To
    differentiate sum log pi of the right answers itself would make them less likely.
    """
    theta = torch.tensor([0.2, 0.2, 0.3, 0.3]).log().requires_grad_()
    right = torch.tensor([True, True, False, False])
    logp = theta.log_softmax(0)
    p = logp.exp().detach()

    def gradient(value):
        return torch.autograd.grad(value, theta, retain_graph=True)[0]

    def right_mass(theta):
        return theta.softmax(0)[right].sum()

    loss = 0.0
    weight = -1.0 * right * (logp.detach() + 1)
    one_token = torch.ones(1, 1, dtype=torch.bool)
    for token in range(4):
        part, _ = policy_loss(logp[token].view(1, 1), weight[token].view(1, 1), one_token, 1)
        loss = loss + p[token] * part
    up = -gradient(loss)
    torch.testing.assert_close(up, gradient(-(logp.exp() * logp)[right].sum()))
    assert right_mass(theta + 0.1 * up) > right_mass(theta)

    naive = gradient(-(p * logp)[right].sum())
    assert right_mass(theta + 0.1 * naive) < right_mass(theta)


@pytest.mark.parametrize("options, message", [
    (dict(objective="likelihood", alpha=1.5), "at most 1"),
    (dict(objective="darling", alpha=1.0), "at most 0.999"),
    (dict(objective="darling", baseline="none", k=1), "k = 2"),
    (dict(objective="dra", k=1), "k = 2"),
    (dict(objective="dqo", baseline="none", k=1), "k = 2"),
    (dict(objective="dra", alpha=-1.0), "at least 0"),
    (dict(objective="dra", kernel="quality"), "dqo only"),
    (dict(objective="repexp", kernel="gaussian"), "dqo only"),
    (dict(objective="repexp", k=2), "k = 3"),
    (dict(objective="passk", alpha=1.5), "a whole number from 1"),
    (dict(objective="passk", alpha=0.0), "a whole number from 1"),
    (dict(objective="passk", alpha=9.0, k=8), "which is 8"),
])
def test_strengths_and_groups_that_make_no_sense_are_refused(options, message):
    """Too strong, too weak, too small a group, or a kernel that it does not have."""
    with pytest.raises(BadInput, match=message):
        RunConfig(**options).check()


@pytest.mark.parametrize("name", ["likelihood", "entropy", "darling", "dra", "setpo"])
def test_two_responses_are_enough_for_these(name):
    """dqo, pairwise and repexp need a third: the mean baseline leaves these a signal at k = 2."""
    RunConfig(objective=name, k=2).check()


# ------------------------------------------------------------------------------ empty answers
def static_encoder(words):
    """A bag of word vectors, which gives an empty text the zero vector."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


GROUPS = [  # texts; "" is empty
    ["", "red", "green blue", "dog"],
    ["", "", "red", "dog"],
    ["", "red", "red", "red"],
    ["", "", "", ""],
]


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("texts", GROUPS, ids=str)
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_emptiness_is_not_paid(name, texts, reward):
    """No bonus is NaN, that of an empty answer is not above 0, and no other's is below it."""
    phi = embed(static_encoder("? red green blue dog".split()), texts)[None]    # (1, 4, 16)
    empty = [not text for text in texts]
    assert (phi[0].abs().sum(-1) == 0).tolist() == empty
    bonus_of = OBJECTIVES[name]
    quality = torch.full((1, 4), reward)
    logp = torch.full((1, 4, 3), -1.0)
    bonus = bonus_of(quality, phi if bonus_of.embeds else None, logp, bonus_of.alpha)[0]
    assert bonus.isfinite().all()
    if not bonus_of.embeds:
        return
    for i in range(4):
        if empty[i]:
            assert bonus[i] <= 0
            assert bonus[i] <= bonus.min() + 1e-6


def test_emptiness_is_not_paid_by_a_function_of_yours(tmp_path):
    """Nor does it make a NaN of what such a function divides by."""
    text = """
        def bonus(quality, phi, logp, alpha):
            return alpha * phi.sum(-1) ** 2 / phi.sum(-1) ** 2

        def bonus_per_token(quality, phi, logp, alpha):
            return 1 + 0 * logp
        """
    (tmp_path / "my.py").write_text(textwrap.dedent(text))
    phi = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    with mock.patch.dict(OBJECTIVES):
        for name, shape in (("bonus", (1, 3)), ("bonus_per_token", (1, 3, 2))):
            spec = f"{tmp_path / 'my.py'}:{name}"
            load_objective(spec)
            paid = OBJECTIVES[spec](torch.ones(1, 3), phi, torch.zeros(1, 3, 2), 1.0)
            assert paid.shape == shape
            assert paid.view(3, -1)[:, -1].tolist() == [0.0, 1.0, 1.0]
