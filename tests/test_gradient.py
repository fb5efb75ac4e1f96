"""The estimator is the gradient: every possible group of a small policy is enumerated.

There is no sampling noise. For J_k = E[ sum_i r + alpha * volume ] - k * beta * KL(pi || pi_ref)
and weights made by the project's own functions, the expected update is grad J_k without a
baseline, and grad J_{k-1} with the group's mean subtracted.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import dqo
from conftest import random_llama
from data.objectives import pairwise
from data.options import RunConfig
from dqo import (
    OBJECTIVES,
    BadInput,
    Config,
    Rollout,
    advantages,
    dqo_step,
    gaussian,
    log_det,
    policy_loss,
    quality_weighted,
    token_logps,
)

ALPHA = 0.7
GENERATOR = torch.Generator().manual_seed(5)
# The embeddings of up to 15 responses, and their qualities.
PHI = F.normalize(torch.randn(15, 3, dtype=torch.float64, generator=GENERATOR), dim=-1)  # (15, D)
QUALITY = torch.rand(15, dtype=torch.float64, generator=GENERATOR)                       # (15,)
REF = torch.log_softmax(torch.tensor([0.0, 0.4, -0.3, 0.2], dtype=torch.float64), 0)     # (4,)


def policy():
    """A policy over four responses: its parameters and its log-probabilities, (4,) each."""
    theta = torch.tensor([0.3, -0.5, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    return theta, torch.log_softmax(theta, 0)


def all_groups(m, k):
    """Every k-tuple of m responses, (m^k, k)."""
    return torch.tensor(list(itertools.product(range(m), repeat=k)))


def group_probability(logp, groups):
    return logp[groups].sum(1).exp()                                        # (m^k,)


def gradient(value, theta):
    return torch.autograd.grad(value, theta, retain_graph=True)[0]


def embeddings(groups, kernel):
    """phi of all groups under a kernel, (m^k, k, D)."""
    phi = PHI[groups]
    if kernel == "quality":
        return quality_weighted(phi, QUALITY[groups])
    return gaussian(phi) if kernel == "gaussian" else phi


def objective(logp, ref, k, beta, kernel):
    """J_k by summing over all k-tuples; differentiable in logp (m,)."""
    groups = all_groups(len(logp), k)
    volume = log_det(embeddings(groups, kernel))                            # (m^k,)
    value = QUALITY[groups].sum(1) + ALPHA * volume
    kl = (logp.exp() * (logp - ref)).sum()
    return (group_probability(logp, groups) * value).sum() - k * beta * kl


def weights(logp, ref, k, beta, kernel, baseline):
    """All groups, and the advantages that the project gives them."""
    groups = all_groups(len(logp), k)
    quality = QUALITY[groups] - beta * (logp - ref)[groups].detach()
    bonus = OBJECTIVES["dqo"](quality, embeddings(groups, kernel), None, ALPHA)
    return groups, advantages(quality, bonus, baseline)


def expected_update(logp, groups, weight):
    """Its gradient is the expectation of sum_i weight_i * grad log pi(y_i)."""
    probability = group_probability(logp.detach(), groups)
    return (probability[:, None] * weight * logp[groups]).sum()


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("kernel", ["plain", "quality", "gaussian"])
@pytest.mark.parametrize("k", [3, 4, 5])
def test_categorical_policy(k, kernel, beta):
    """No baseline gives exactly grad J_k, the group's mean exactly grad J_{k-1}."""
    theta, logp = policy()
    for baseline, target_k in (("none", k), ("mean", k - 1)):
        groups, weight = weights(logp, REF, k, beta, kernel, baseline)
        estimate = gradient(expected_update(logp, groups, weight), theta)
        exact = gradient(objective(logp, REF, target_k, beta, kernel), theta)
        torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-10)
        other = gradient(objective(logp, REF, target_k + 1, beta, kernel), theta)
        assert (estimate - other).abs().max() > 1e-4  # the statement about k has teeth


def test_std_is_not_that_gradient():
    """Divided by the group's standard deviation, the update has not even the direction of J's."""
    theta, logp = policy()
    groups, weight = weights(logp, logp.detach(), 3, 0.0, "plain", "std")
    estimate = gradient(expected_update(logp, groups, weight), theta)
    exact = gradient(objective(logp, logp.detach(), 2, 0.0, "plain"), theta)
    assert 1 - F.cosine_similarity(estimate, exact, dim=0) > 1e-3


def test_differentiating_k3_is_the_other_kl():
    """Differentiated as a loss, k3 follows KL(pi_ref || pi); the log-ratio as a reward does not.

    k3 is rho - 1 - log rho with rho = pi_ref / pi, and the expectation is over samples of pi.
    The log-ratio as a reward, which test_categorical_policy checks with beta > 0, follows
    KL(pi || pi_ref).
    """
    theta, logp = policy()
    p = logp.exp().detach()
    rho = (REF - logp).exp()
    k3 = gradient((p * (rho - 1 - (REF - logp))).sum(), theta)
    kl_of_ref = gradient((REF.exp() * (REF - logp)).sum(), theta)
    torch.testing.assert_close(k3, kl_of_ref, rtol=0, atol=1e-12)

    as_reward = gradient((p * (logp - REF).detach() * logp).sum(), theta)
    kl_of_pi = gradient((logp.exp() * (logp - REF)).sum(), theta)
    torch.testing.assert_close(as_reward, kl_of_pi, rtol=0, atol=1e-12)
    assert (k3 - as_reward).abs().max() > 1e-2


def test_pairwise_bonus_is_a_marginal_gain():
    """Its weights follow E[ sum r + alpha/(k-1) * sum_{i<j} (1 - L_ij) ]."""
    k = 3
    theta, logp = policy()
    groups = all_groups(4, k)
    quality, phi = QUALITY[groups], PHI[groups]
    bonus = pairwise(quality, phi, None, ALPHA)
    weight = advantages(quality, bonus, "none")
    each_pair_twice = (1 - phi @ phi.transpose(1, 2)).sum((1, 2))
    distance = each_pair_twice / 2 / (k - 1)                                # (m^k,)
    value = quality.sum(1) + ALPHA * distance
    exact = gradient((group_probability(logp, groups) * value).sum(), theta)
    estimate = gradient(expected_update(logp, groups, weight), theta)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-10)


def test_baselines_by_hand():
    """Each baseline on two groups; `std` makes a gain of 0.03 as large as one of 0.3."""
    quality = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    bonus = torch.tensor([[0.2, 0.1, 0.0], [0.3, 0.0, 0.0]])

    none = advantages(quality, bonus, "none")
    torch.testing.assert_close(none, torch.tensor([[1.2, 0.1, 0.0], [1.3, 1.0, 1.0]]))

    mean = advantages(quality, bonus, "mean")
    first = [1.2 - 1.3 / 3, 0.1 - 1.3 / 3, -1.3 / 3]
    torch.testing.assert_close(mean, torch.tensor([first, [0.2, -0.1, -0.1]]))

    std = advantages(quality, bonus, "std")
    second = torch.tensor([2.0, -1.0, -1.0]) / 3 ** 0.5
    torch.testing.assert_close(std[1], second, rtol=1e-3, atol=0)
    # Equal qualities: a gain difference of 0.3 has become one of 1.7, and so does one of 0.03.
    small = advantages(torch.ones(1, 3), torch.tensor([[0.03, 0.0, 0.0]]), "std")
    torch.testing.assert_close(small[0], std[1], rtol=1e-2, atol=0)


def test_two_responses_carry_no_diversity_signal():
    """At k = 2 a group baseline cancels the gains: dqo and pairwise refuse it, grpo does not."""
    nothing = torch.zeros(1, 2, dtype=torch.float64)
    bonus = OBJECTIVES["dqo"](nothing, PHI[:2][None], None, 1.0)
    torch.testing.assert_close(advantages(nothing, bonus, "mean"), nothing)

    for name in ("dqo", "pairwise"):
        for baseline in ("mean", "std"):
            with pytest.raises(BadInput, match="k = 3"):
                RunConfig(objective=name, baseline=baseline, k=2).check()
    RunConfig(objective="dqo", baseline="none", k=2).check()
    RunConfig(objective="grpo", k=2).check()


# --------------------------------------------------------- the same through a language model
# Responses over {</s>, a, b}; <pad> is given probability 0.
WORDS = ["<pad>", "</s>", "a", "b"]


def every_response(longest):
    """Those that end with </s>, and those of `longest` tokens that do not: 7 of at most 2."""
    begun, ended = [[]], []
    for _ in range(longest):
        ended += [response + [1] for response in begun]
        begun = [response + [word] for response in begun for word in (2, 3)]
    return ended + begun


LONGEST = 2
RESPONSES = every_response(LONGEST)


def all_responses(prompt, responses=RESPONSES):
    """A Rollout with each of some responses once, as `sample` would have written it."""
    N, B, longest = len(prompt), len(responses), max(map(len, responses))
    tokens = torch.zeros(B, N + longest, dtype=torch.long)
    attention_mask = torch.ones(B, N + longest, dtype=torch.long)
    for i, response in enumerate(responses):
        end = N + len(response)
        tokens[i, :N] = torch.tensor(prompt)
        tokens[i, N:end] = torch.tensor(response)
        attention_mask[i, end:] = 0
    return Rollout(
        tokens=tokens,
        attention_mask=attention_mask,
        prompt_length=N,
        mask=attention_mask[:, N:].bool(),
        logp=torch.zeros(B, longest),
        texts=[str(i) for i in range(B)],
        truncated=torch.zeros(B, dtype=torch.bool))


def exact_logps(model, prompt, temperature, responses=RESPONSES):
    """log pi of each token, (m, T), one row at a time, without padding, in float64; 0 after."""
    longest, out = max(map(len, responses)), []
    for response in responses:
        logits = model(torch.tensor([prompt + response])).logits[0].double() / temperature
        logps = torch.log_softmax(logits, -1)
        first = len(prompt) - 1  # each position predicts the next token
        row = torch.stack([logps[first + t, token] for t, token in enumerate(response)])
        out.append(F.pad(row, (0, longest - len(response))))
    return torch.stack(out)


def language_model(seed=0):
    """A small random Llama that never says <pad>."""
    model = random_llama(len(WORDS), seed, hidden=16, layers=1, eos_token_id=1).double()
    # No model of softmax form gives <pad> probability exactly 0; a very negative logit does,
    # to machine precision.
    bias = torch.tensor([-1e4, 0.0, 0.0, 0.0], dtype=torch.float64)
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


@pytest.mark.parametrize("kernel, beta, temperature", [
    ("plain", 0.0, 1.0),
    ("quality", 0.3, 0.8),
])
def test_language_model(kernel, beta, temperature):
    """grad J_k and grad J_{k-1} again, through token_logps and policy_loss of a real model."""
    model = language_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    prompt, k = [2, 3, 3], 3
    ref = torch.log_softmax(torch.linspace(0, 1, len(RESPONSES), dtype=torch.float64), 0)
    exact = exact_logps(model, prompt, temperature).sum(1)                  # (7,)
    assert abs(exact.exp().sum().item() - 1) < 1e-9  # these are all the responses there are

    rollout = all_responses(prompt)
    logp = token_logps(model, rollout, temperature)                         # (7, T)
    torch.testing.assert_close(logp.sum(1).double(), exact, rtol=0, atol=1e-5)

    for baseline, target_k in (("none", k), ("mean", k - 1)):
        groups, weight = weights(exact.detach(), ref, k, beta, kernel, baseline)
        logp = token_logps(model, rollout, temperature)  # its graph can be used once
        loss = 0.0
        for group, w in zip(groups, weight):
            probability = math.exp(exact[group].sum().item())
            part, _ = policy_loss(logp[group], w.float(), rollout.mask[group], LONGEST)
            loss = loss + probability * k * LONGEST * part  # the loss divides by k * LONGEST
        estimate = torch.autograd.grad(-loss, parameters)
        truth = torch.autograd.grad(
            objective(exact, ref, target_k, beta, kernel), parameters, retain_graph=True)
        for a, b in zip(estimate, truth):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert max(b.abs().max() for b in truth) > 1e-2  # not a comparison of zeros


# ------------------------------------------------------------- reward-to-go for the KL penalty
PROMPT = [2, 3, 3]
LONGER = every_response(3)  # 15


class Given:
    """Encoder and reward of `all_responses`, whose texts are "0", "1", ..."""

    def encode(self, texts):
        return PHI[[int(text) for text in texts]]

    def reward(self, prompts, texts, rows):
        return QUALITY[[int(text) for text in texts]].tolist()


@pytest.fixture
def weights_of_step(monkeypatch):
    """A function: what `dqo_step` weighs each token with, (m^k, k, T), if it draws all groups."""
    got = []
    monkeypatch.setattr(dqo, "update", lambda *args: got.append(args[3]) or {})

    def run(model, reference, groups, baseline, beta):
        rollout = all_responses(PROMPT, LONGER)
        rollout.logp = exact_logps(model, PROMPT, 1.0, LONGER).detach().float()
        monkeypatch.setattr(dqo, "sample", lambda *args: rollout.select(groups.flatten()))
        count, k = groups.shape
        options = Config(alpha=ALPHA, k=k, prompts=count, baseline=baseline, beta=beta,
                         max_new_tokens=3, micro_batch=0)
        dqo_step(model, None, Given(), Given().reward, None, [{"prompt": PROMPT}] * count, options,
                 reference)
        return got.pop().view(count, k, -1).double()
    return run


def moments(weight, groups, probability, jacobian):
    """Mean, (n,), and total variance of sum_it weight_it * grad log pi(token t of y_i).

    jacobian: (m, T, n), the gradient of each token's log-probability
    """
    m, T, n = jacobian.shape
    coefficient = torch.zeros(len(groups), m, T, dtype=torch.float64)
    rows = torch.arange(len(groups))[:, None].expand_as(groups)
    coefficient.index_put_((rows, groups), weight.expand(*groups.shape, T), accumulate=True)
    coefficient, jacobian = coefficient.flatten(1), jacobian.view(m * T, n)
    mean = probability @ coefficient @ jacobian
    inner = jacobian @ jacobian.T  # (m * T, m * T)
    squares = ((coefficient @ inner) * coefficient).sum(1)
    return mean, (probability @ squares - mean @ mean).item()


@pytest.mark.parametrize("baseline, target_k", [("none", 3), ("mean", 2)])
def test_reward_to_go(weights_of_step, baseline, target_k):
    """Each token answers for the log-ratios from it on: the gradient is exact with both baselines.

    Every group of 3 that a language model can draw is enumerated, and goes through `dqo_step`.
    Where the penalty decides most, the variance is 0.64 of that with the whole log-ratio, minus
    the mean; without a baseline it is not less.
    """
    model, reference, beta = language_model(), language_model(seed=9), 3.0
    parameters = [p for p in model.parameters() if p.requires_grad]
    logp = exact_logps(model, PROMPT, 1.0, LONGER)                          # (15, T)
    with torch.no_grad():
        log_ratio = logp - exact_logps(reference, PROMPT, 1.0, LONGER)
    exact, ref = logp.sum(1), (logp - log_ratio).sum(1).detach()            # (15,)
    assert abs(exact.exp().sum().item() - 1) < 1e-9

    def flat(value):
        grads = torch.autograd.grad(value, parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in grads])
    jacobian = torch.stack([flat(x) for x in logp.flatten()]).view(*logp.shape, -1)
    groups, whole = weights(exact, ref, 3, beta, "plain", baseline)
    probability = group_probability(exact.detach(), groups)

    to_go = weights_of_step(model, reference, groups, baseline, beta)
    torch.testing.assert_close(to_go[..., 0], whole, rtol=0, atol=1e-5)  # all is still to come
    truth = flat(objective(exact, ref, target_k, beta, "plain"))
    variance = {}
    for name, weight in dict(to_go=to_go, whole=whole[..., None]).items():
        mean, variance[name] = moments(weight, groups, probability, jacobian)
        torch.testing.assert_close(mean, truth, rtol=1e-4, atol=1e-5)
    assert truth.abs().max() > 1e-2
    if baseline == "mean":
        assert variance["to_go"] < 0.8 * variance["whole"], variance


def test_reward_to_go_divided_by_the_standard_deviation(weights_of_step):
    """`std` divides by that of the same group at the same token, and is finite everywhere."""
    model, reference = language_model(), language_model(seed=9)
    groups = all_groups(len(LONGER), 3)
    mean = weights_of_step(model, reference, groups, "mean", 0.5)           # (15^3, 3, T)
    std = weights_of_step(model, reference, groups, "std", 0.5)
    assert std.isfinite().all()
    by_hand = mean / ((mean ** 2).sum(1, keepdim=True) / 2).sqrt().add(1e-4)
    torch.testing.assert_close(std, by_hand, rtol=1e-3, atol=1e-3)
