"""The estimator is the gradient: exact enumeration of every possible group of a small policy, no sampling noise.

For J_k = E[ sum_i r + alpha * volume ] - k * beta * KL(pi || pi_ref) and weights made by the project's own functions:
without a baseline the expected update is grad J_k, with the group mean subtracted it is grad J_{k-1}.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import random_llama
from dqo import BadInput, Config, Rollout, advantages, diversity_bonus, log_det, policy_loss, quality_weighted, token_logps

M, D, ALPHA = 4, 3, 0.7
GEN = torch.Generator().manual_seed(5)
PHI = F.normalize(torch.randn(8, D, dtype=torch.float64, generator=GEN), dim=-1)    # embeddings of up to 8 responses
R = torch.rand(8, dtype=torch.float64, generator=GEN)                               # and their qualities


def volume(phi, q, kernel):
    return log_det(quality_weighted(phi, q) if kernel == "quality" else phi)


def objective(logp, ref, k, beta, kernel):
    """J_k by summing over all k-tuples; differentiable in logp (m,)."""
    m = len(logp)
    groups = torch.tensor(list(itertools.product(range(m), repeat=k)))              # (m^k, k)
    p = logp[groups].sum(1).exp()                                                   # (m^k,)
    value = R[groups].sum(1) + ALPHA * volume(PHI[groups], R[groups], kernel)
    return (p * value).sum() - k * beta * (logp.exp() * (logp - ref)).sum()


def weights(logp, ref, k, beta, kernel, baseline):
    """All groups, and the advantages the project gives them."""
    groups = torch.tensor(list(itertools.product(range(len(logp)), repeat=k)))
    phi, q = PHI[groups], R[groups]
    phi = quality_weighted(phi, q) if kernel == "quality" else phi
    quality = q - beta * (logp - ref)[groups].detach()
    return groups, advantages(quality, diversity_bonus("dqo", ALPHA, quality, phi), baseline)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("kernel", ["plain", "quality"])
@pytest.mark.parametrize("k", [3, 4, 5])
def test_categorical_policy(k, kernel, beta):
    theta = torch.tensor([0.3, -0.5, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([0.0, 0.4, -0.3, 0.2], dtype=torch.float64), 0)
    logp = torch.log_softmax(theta, 0)
    for baseline, target_k in (("none", k), ("mean", k - 1)):
        groups, weight = weights(logp, ref, k, beta, kernel, baseline)
        p = logp.detach()[groups].sum(1).exp()
        estimate = torch.autograd.grad((p[:, None] * weight * logp[groups]).sum(), theta, retain_graph=True)[0]
        exact = torch.autograd.grad(objective(logp, ref, target_k, beta, kernel), theta, retain_graph=True)[0]
        torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-10)
        other = torch.autograd.grad(objective(logp, ref, target_k + 1, beta, kernel), theta, retain_graph=True)[0]
        assert (estimate - other).abs().max() > 1e-4  # the statement about k has teeth


def test_std_is_not_that_gradient():
    theta = torch.tensor([0.3, -0.5, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(theta, 0)
    groups, weight = weights(logp, logp.detach(), 3, 0.0, "plain", "std")
    estimate = torch.autograd.grad((logp.detach()[groups].sum(1).exp()[:, None] * weight * logp[groups]).sum(), theta, retain_graph=True)[0]
    exact = torch.autograd.grad(objective(logp, logp.detach(), 2, 0.0, "plain"), theta)[0]
    assert 1 - F.cosine_similarity(estimate, exact, dim=0) > 1e-3  # not even its direction


def test_differentiating_k3_is_the_other_kl():
    """E over samples of the gradient of rho - 1 - log rho, rho = pi_ref/pi, is that of KL(pi_ref || pi). The log-ratio as a reward, which
    test_categorical_policy checks with beta > 0, is KL(pi || pi_ref)."""
    theta = torch.tensor([0.3, -0.5, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([0.0, 0.4, -0.3, 0.2], dtype=torch.float64), 0)
    logp = torch.log_softmax(theta, 0)
    gradient = lambda x: torch.autograd.grad(x, theta, retain_graph=True)[0]
    k3 = gradient((logp.exp().detach() * ((ref - logp).exp() - 1 - (ref - logp))).sum())
    torch.testing.assert_close(k3, gradient((ref.exp() * (ref - logp)).sum()), rtol=0, atol=1e-12)
    as_reward = gradient((logp.exp().detach() * (logp - ref).detach() * logp).sum())
    torch.testing.assert_close(as_reward, gradient((logp.exp() * (logp - ref)).sum()), rtol=0, atol=1e-12)
    assert (k3 - as_reward).abs().max() > 1e-2


def test_pairwise_bonus_is_a_marginal_gain():
    """Its weights follow E[ sum r + alpha/(k-1) * sum_{i<j} (1 - L_ij) ]."""
    k = 3
    theta = torch.tensor([0.3, -0.5, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(theta, 0)
    groups = torch.tensor(list(itertools.product(range(M), repeat=k)))
    phi = PHI[groups]
    weight = advantages(R[groups], diversity_bonus("pairwise", ALPHA, R[groups], phi), "none")
    distance = (1 - phi @ phi.transpose(1, 2)).sum((1, 2)) / 2 / (k - 1)            # each pair once
    p = logp[groups].sum(1).exp()
    exact = torch.autograd.grad((p * (R[groups].sum(1) + ALPHA * distance)).sum(), theta, retain_graph=True)[0]
    estimate = torch.autograd.grad((p.detach()[:, None] * weight * logp[groups]).sum(), theta)[0]
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-10)


def test_baselines_by_hand():
    quality, bonus = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), torch.tensor([[0.2, 0.1, 0.0], [0.3, 0.0, 0.0]])
    torch.testing.assert_close(advantages(quality, bonus, "none"), torch.tensor([[1.2, 0.1, 0.0], [1.3, 1.0, 1.0]]))
    mean = advantages(quality, bonus, "mean")
    torch.testing.assert_close(mean, torch.tensor([[1.2 - 1.3 / 3, 0.1 - 1.3 / 3, -1.3 / 3], [0.2, -0.1, -0.1]]))
    std = advantages(quality, bonus, "std")
    torch.testing.assert_close(std[1], torch.tensor([2.0, -1.0, -1.0]) / 3 ** 0.5, rtol=1e-3, atol=0)  # equal qualities: a gain
    # difference of 0.3 has become one of 1.7, and one of 0.0003 would become nearly the same
    small = advantages(torch.ones(1, 3), torch.tensor([[0.03, 0.0, 0.0]]), "std")
    torch.testing.assert_close(small[0], std[1], rtol=1e-2, atol=0)


def test_two_responses_carry_no_diversity_signal():
    phi = PHI[:2][None]
    nothing = torch.zeros(1, 2, dtype=torch.float64)
    torch.testing.assert_close(advantages(nothing, diversity_bonus("dqo", 1.0, nothing, phi), "mean"), nothing)
    for objective_ in ("dqo", "pairwise"):
        for baseline in ("mean", "std"):
            with pytest.raises(BadInput, match="k = 3"):
                Config(objective=objective_, baseline=baseline, k=2).check()
    Config(objective="dqo", baseline="none", k=2).check()
    Config(objective="grpo", k=2).check()


# ------------------------------------------------------------------------- the same through a language model
WORDS = ["<pad>", "</s>", "a", "b"]  # responses of at most 2 tokens over {</s>, a, b}; <pad> is given probability 0
RESPONSES = [[1]] + [[x, y] for x in (2, 3) for y in (1, 2, 3)]


def all_responses(prompt):
    """A Rollout that holds each of the 7 possible responses once, as `sample` would have written it."""
    L, T, n = len(prompt), 2, len(RESPONSES)
    tokens, attention, mask = torch.zeros(n, L + T, dtype=torch.long), torch.ones(n, L + T, dtype=torch.long), torch.ones(n, T, dtype=torch.bool)
    for i, response in enumerate(RESPONSES):
        tokens[i, :L] = torch.tensor(prompt)
        tokens[i, L:L + len(response)] = torch.tensor(response)
        attention[i, L + len(response):], mask[i, len(response):] = 0, False
    return Rollout(tokens, attention, L, mask, torch.zeros(n, T), [""] * n, torch.zeros(n, dtype=torch.bool))


def exact_logps(model, prompt, temperature):
    """log pi of each whole response, one row at a time, without padding, in float64."""
    out = []
    for response in RESPONSES:
        logits = model(torch.tensor([prompt + response])).logits[0].double() / temperature
        logps = torch.log_softmax(logits, -1)
        out.append(sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(response)))
    return torch.stack(out)


@pytest.mark.parametrize("kernel,beta,temperature", [("plain", 0.0, 1.0), ("quality", 0.3, 0.8)])
def test_language_model(kernel, beta, temperature):
    model = random_llama(len(WORDS), hidden=16, layers=1, eos_token_id=1).double()
    # No model of softmax form gives <pad> probability exactly 0; a very negative logit does, to machine precision.
    model.lm_head.bias = torch.nn.Parameter(torch.tensor([-1e4, 0.0, 0.0, 0.0], dtype=torch.float64), requires_grad=False)
    prompt, k, T = [2, 3, 3], 3, 2
    ref = torch.log_softmax(torch.linspace(0, 1, len(RESPONSES), dtype=torch.float64), 0)
    exact = exact_logps(model, prompt, temperature)
    assert abs(exact.exp().sum().item() - 1) < 1e-9  # these are all the responses there are
    logp = token_logps(model, all_responses(prompt), temperature)                   # (7, T)
    torch.testing.assert_close(logp.sum(1).double(), exact, rtol=0, atol=1e-5)
    mask = all_responses(prompt).mask
    parameters = [p for p in model.parameters() if p.requires_grad]
    for baseline, target_k in (("none", k), ("mean", k - 1)):
        logp = token_logps(model, all_responses(prompt), temperature)  # its graph can be used once
        groups, weight = weights(exact.detach(), ref, k, beta, kernel, baseline)
        loss = sum(math.exp(exact[g].sum().item()) * k * T * policy_loss(logp[g], w.float(), mask[g], T)[0] for g, w in zip(groups, weight))
        estimate = torch.autograd.grad(-loss, parameters)
        truth = torch.autograd.grad(objective(exact, ref, target_k, beta, kernel), parameters, retain_graph=True)
        for a, b in zip(estimate, truth):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert max(b.abs().max() for b in truth) > 1e-2  # not a comparison of zeros
