"""The estimator is the gradient: every possible group of a small policy is enumerated.

For J_k = E[ sum_i r + alpha * volume ] - k * beta * KL(pi || pi_ref) and weights made by the
project's functions, the expected update is grad J_k without a baseline, and grad J_{k-1} with the
group's mean subtracted.
"""

import copy
import itertools
import zlib

import pytest
import torch
import torch.nn.functional as F

from conftest import random_llama
from dqo import (OBJECTIVES, Config, Rollout, advantages, dqo_step, gram, policy_loss, token_logps)

ALPHA = 0.7
GENERATOR = torch.Generator().manual_seed(5)
# of 15 responses: kernel and qualities
L = gram(F.normalize(torch.randn(15, 3, dtype=torch.float64, generator=GENERATOR), dim=-1))
QUALITY = torch.rand(15, dtype=torch.float64, generator=GENERATOR)  # (15,)
REF = torch.log_softmax(torch.tensor([0.0, 0.4, -0.3, 0.2], dtype=torch.float64), 0)  # (4,)


def close(a, b, atol=1e-10, rtol=0):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def policy():
    """A policy over four responses: its parameters and log-probabilities, (4,) each."""
    theta = torch.tensor([0.3, -0.5, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    return theta, torch.log_softmax(theta, 0)


def all_groups(m, k):
    """Every k-tuple of m responses, (m^k, k)."""
    return torch.tensor(list(itertools.product(range(m), repeat=k)))


def kernel(groups):
    return L[groups[:, :, None], groups[:, None, :]]  # (m^k, k, k)


def gradient(value, theta):
    return torch.autograd.grad(value, theta, retain_graph=True)[0]


def expectation(logp, groups, value):
    """Of a function of the group, (m^k,); differentiable in logp (m,)."""
    return (logp[groups].sum(1).exp() * value).sum()


def expected_update(logp, groups, weight):
    """Its gradient is E[ sum_i weight_i * grad log pi(y_i) ]."""
    probability = logp.detach()[groups].sum(1).exp()  # (m^k,)
    return (probability[:, None] * weight * logp[groups]).sum()


def objective(logp, ref, k, beta, name):
    """J_k by summing over all k-tuples; differentiable in logp (m,)."""
    groups = all_groups(len(logp), k)
    q, M = QUALITY[groups], kernel(groups)
    if name == "dqo_quality":
        M = M * (q[:, :, None] * q[:, None, :]).sqrt()
    volume = torch.linalg.det(M + torch.eye(k, dtype=torch.float64)).log()  # (m^k,)
    kl = (logp.exp() * (logp - ref)).sum()
    return expectation(logp, groups, q.sum(1) + ALPHA * volume) - k * beta * kl


def weights(logp, ref, k, beta, name, baseline):
    """All groups, and the advantages that the project gives them."""
    groups = all_groups(len(logp), k)
    shaped = OBJECTIVES[name](QUALITY[groups], kernel(groups), None, ALPHA)
    shaped = shaped - beta * (logp - ref)[groups].detach()  # (m^k, k)
    return groups, advantages(shaped[..., None], baseline)[..., 0]


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", ["dqo", "dqo_quality"])
@pytest.mark.parametrize("k", [3, 4, 5])
def test_categorical_policy(k, name, beta):
    """No baseline gives exactly grad J_k, the group's mean exactly grad J_{k-1}."""
    theta, logp = policy()
    for baseline, target_k in (("none", k), ("mean", k - 1)):
        groups, weight = weights(logp, REF, k, beta, name, baseline)
        estimate = gradient(expected_update(logp, groups, weight), theta)
        close(estimate, gradient(objective(logp, REF, target_k, beta, name), theta))
        other = gradient(objective(logp, REF, target_k + 1, beta, name), theta)
        assert (estimate - other).abs().max() > 1e-4  # k matters


def test_std_is_not_that_gradient():
    """Divided by the group's std, the update has not even the direction of J's."""
    theta, logp = policy()
    groups, weight = weights(logp, REF, 3, 0.0, "dqo", "std")
    estimate = gradient(expected_update(logp, groups, weight), theta)
    exact = gradient(objective(logp, REF, 2, 0.0, "dqo"), theta)
    assert 1 - F.cosine_similarity(estimate, exact, dim=0) > 1e-3


def test_differentiating_k3_is_the_other_kl():
    """Differentiated as a loss, k3 = rho - 1 - log rho, rho = pi_ref / pi, follows KL(pi_ref ||
    pi) in expectation; the log-ratio as a reward follows KL(pi || pi_ref)."""
    theta, logp = policy()
    p, log_rho = logp.exp().detach(), REF - logp
    k3 = gradient((p * (log_rho.exp() - 1 - log_rho)).sum(), theta)
    close(k3, gradient((REF.exp() * log_rho).sum(), theta))

    as_reward = gradient((p * -log_rho.detach() * logp).sum(), theta)
    close(as_reward, gradient((logp.exp() * -log_rho).sum(), theta))
    assert (k3 - as_reward).abs().max() > 1e-2


def test_baselines_by_hand():
    """Each baseline on two groups; `std` makes a gain of 0.03 as large as one of 0.3."""
    returns = torch.tensor([[1.2, 0.1, 0.0], [1.3, 1.0, 1.0]])
    close(advantages(returns[..., None], "none")[..., 0], returns)

    mean = [1.2 - 1.3 / 3, 0.1 - 1.3 / 3, -1.3 / 3]
    close(advantages(returns), torch.tensor([mean, [0.2, -0.1, -0.1]]), 1e-6)

    std = advantages(returns[..., None], "std")[..., 0]
    second = torch.tensor([2.0, -1.0, -1.0]) / 3 ** 0.5
    close(std[1], second, 0, 1e-3)
    # Equal qualities: a gain of 0.3 has become one of 1.7, and so does one of 0.03.
    small = advantages(torch.tensor([[[1.03], [1.0], [1.0]]]), "std")[0, :, 0]
    close(small, second, 0, 1e-2)
    # Of tokens, the divisor is one number, that of the first: 0.3 / sqrt 3 + 1e-4.
    tokens = torch.tensor([[[1.3, 6.0], [1.0, 0.0], [1.0, 0.0]]])
    close(advantages(tokens, "std")[0, :, 1], 20 * second, 0, 1e-3)


def test_two_responses_carry_no_diversity_signal():
    """At k = 2 a group baseline cancels the gains."""
    nothing = torch.zeros(1, 2, dtype=torch.float64)
    shaped = OBJECTIVES["dqo"](nothing, kernel(torch.tensor([[0, 1]])), None)
    assert shaped.min() > 0.1
    for baseline in ("mean", "std"):
        close(advantages(shaped[..., None], baseline)[..., 0], nothing)


# -------------------- the same through a language model
# All responses over {</s>, a, b} of at most 3 tokens: those that end with </s>, and the others.
LONGEST, PROMPT = 3, [2, 3, 3]
RESPONSES = [[*begun, 1] for n in range(LONGEST) for begun in itertools.product((2, 3), repeat=n)]
RESPONSES += [list(begun) for begun in itertools.product((2, 3), repeat=LONGEST)]


def language_model(seed=0):
    model = random_llama(4, seed, hidden=16, layers=1, eos_token_id=1).double()
    bias = torch.tensor([-1e4, 0.0, 0.0, 0.0], dtype=torch.float64)  # no <pad>
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def exact_logps(model, prompt, response, temperature=1.0, T=LONGEST):
    """log pi of each token, one row, without padding, in float64; 0 after the last."""
    logits = model(torch.tensor([prompt + response])).logits[0].double() / temperature
    first = len(prompt) - 1  # predicts the next token
    logps = torch.log_softmax(logits[first:first + len(response)], -1)
    return F.pad(logps[range(len(response)), response], (0, T - len(response)))


def to_go(log_ratio):
    """Of each token, the sum from it on."""
    return torch.stack([log_ratio[..., t:].sum(-1) for t in range(log_ratio.shape[-1])], -1)


@pytest.mark.parametrize("baseline, target_k", [("none", 3), ("mean", 2)])
@pytest.mark.parametrize("name, beta, temperature", [("dqo", 3.0, 1.0), ("dqo_quality", 0.3, 0.8)])
def test_language_model(name, beta, temperature, baseline, target_k):
    """grad J_k and grad J_{k-1} again, of every group that a language model can draw, through
    token_logps and policy_loss. Each token answers for the log-ratios from it on: the gradient is
    that with the whole log-ratio, and where the penalty decides most, the variance with the
    group's mean subtracted is less by a third."""
    k, model, reference = 3, language_model(), language_model(seed=9)
    parameters = [p for p in model.parameters() if p.requires_grad]
    logp = torch.stack([exact_logps(model, PROMPT, y, temperature) for y in RESPONSES])  # (15, T)
    with torch.no_grad():
        ref = torch.stack([exact_logps(reference, PROMPT, y, temperature) for y in RESPONSES])
    assert abs(logp.sum(1).exp().sum().item() - 1) < 1e-9  # these are all the responses there are

    def flat(value):
        grads = torch.autograd.grad(value, parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in grads])
    truth = flat(objective(logp.sum(1), ref.sum(1), target_k, beta, name))
    assert truth.abs().max() > 1e-2

    groups, shaped = weights(logp.sum(1), ref.sum(1), k, 0.0, name, baseline)
    ratio = (logp - ref).detach()[groups]  # (15^3, k, T)
    probability = logp.detach().sum(1)[groups].sum(1).exp()  # (15^3,)
    jacobian = torch.stack([flat(x) for x in logp.flatten()])  # (15 * T, n)
    inner, variance = jacobian @ jacobian.T, []
    for paid in (ratio.sum(-1, keepdim=True).expand_as(ratio), to_go(ratio)):
        weight = shaped[..., None] - advantages(beta * paid, baseline)  # (15^3, k, T)
        coefficient = torch.zeros(len(groups), *logp.shape, dtype=torch.float64)
        rows = torch.arange(len(groups))[:, None].expand_as(groups)
        coefficient = coefficient.index_put((rows, groups), weight, accumulate=True).flatten(1)
        mean = probability @ coefficient @ jacobian
        close(mean, truth, 2e-6)  # norms and logits are float32
        squares = ((coefficient @ inner) * coefficient).sum(1)
        variance.append((probability @ squares - mean @ mean).item())
    if baseline == "mean" and beta == 3:
        assert variance[1] < 0.7 * variance[0], variance

    # The same weights through the project's scoring and loss, which divides by P * k * T.
    tokens = torch.tensor([y + [0] * (LONGEST - len(y)) for y in RESPONSES])[None]  # (1, 15, T)
    mask = torch.tensor([[t < len(y) for t in range(LONGEST)] for y in RESPONSES])[None]
    rollout = Rollout(torch.tensor([PROMPT]), torch.ones(1, 3, dtype=torch.long), tokens, mask,
                      None, [], [], None)
    scored = token_logps(model, rollout, temperature)[0]  # (15, T)
    close(scored.double(), logp, 1e-5)
    weight = weight * (probability * len(groups) * k * LONGEST)[:, None, None]
    loss = policy_loss(scored[groups], weight, mask[0][groups], LONGEST, scored.detach()[groups])
    close(-flat(loss), truth, 1e-5, 1e-3)


# -------------------- the same through dqo_step
ROWS = [{"prompt": "<s> w5 w6"}, {"prompt": "<s> w9 w9 w3 w4"}]


class Encoder:
    """A random direction for each text, the same every time."""

    def encode(self, texts):
        seeds = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
        return torch.stack([torch.randn(6, generator=seed) for seed in seeds])


def one_step(model, tokenizer, reference, score, **config):
    """What a step of SGD at lr 1 takes off the weights; the advantages of the first tokens."""
    trained = copy.deepcopy(model)
    sgd = torch.optim.SGD(trained.parameters(), lr=1.0)
    config = Config(max_new_tokens=6, **config)
    torch.manual_seed(4)
    _, samples = dqo_step(trained, tokenizer, Encoder(), lambda prompts, texts, rows: score(texts),
                          sgd, ROWS, config, reference)
    pairs = zip(model.parameters(), trained.parameters())
    off = torch.cat([(before - after).detach().flatten() for before, after in pairs])
    return off, torch.tensor([x["advantage"] for x in samples], dtype=torch.float64).view(2, -1)


def test_equal_qualities_have_no_spread(model, tokenizer):
    """Their mean is off by rounding, which `std` must not blow up to order 1."""
    off, first = one_step(model, tokenizer, None, lambda texts: [100.1] * 16, objective="grpo",
                          baseline="std", beta=0.0, k=8)
    assert first.abs().max() < 1e-6 and off.abs().max() < 1e-6
