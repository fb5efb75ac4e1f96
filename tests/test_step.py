"""The loss and the whole step."""

import copy
import math
import zlib

import pytest
import torch

import bench
from conftest import random_llama
from dqo import BadInput, Config, Rollout, advantages, dqo_step, embed, marginal_gains, policy_loss, quality_weighted, sample, token_logps


class HashEncoder:
    """A stand-in with sentence-transformers' interface: a random direction per text, the same every time."""

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        return torch.stack([torch.randn(16, generator=torch.Generator().manual_seed(zlib.crc32(t.encode()))) for t in texts]).numpy()


def reward(prompts, responses, rows):
    assert len(prompts) == len(responses) == len(rows) == 12
    return [min(1.0, len(set(r.split())) / 8) for r in responses]


ROWS = [{"prompt": "<s> w5 w6"}, {"prompt": "<s> w9 w9 w3"}, {"prompt": "<s>"}]


def config(**kw):
    return Config(**{**dict(k=4, prompts=3, max_new_tokens=10, beta=0.0, lr=1e-3), **kw})


def step(model, tokenizer, reference=None, encoder=None, **kw):
    """One step from a fixed seed with plain SGD at lr 1, so that the update *is* the gradient. -> (updates, metrics)"""
    model = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    torch.manual_seed(4)
    metrics = dqo_step(model, tokenizer, encoder or HashEncoder(), reward, optimizer, ROWS, config(**kw), reference)
    return [b - p.detach() for b, p in zip(before, model.parameters())], metrics


def test_the_step_is_the_sum_of_its_parts(model, tokenizer):
    """The same update assembled by hand from the public functions."""
    updates, metrics = step(model, tokenizer)
    torch.manual_seed(4)
    rollout = sample(model, tokenizer, [r["prompt"] for r in ROWS], 4, 10)
    quality = torch.tensor(reward(rollout.texts, rollout.texts, rollout.texts)).view(3, 4)
    gain = marginal_gains(embed(HashEncoder(), rollout.texts).view(3, 4, -1))
    weight = advantages(quality, 1.0 * gain, "mean")
    logp = token_logps(model, rollout)
    loss = -(weight.flatten()[:, None] * logp).sum() / (12 * 10)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    scale = min(1.0, 1 / (torch.stack([g.norm() for g in grads]).norm().item() + 1e-6))
    for u, g in zip(updates, grads):
        torch.testing.assert_close(u, g * scale, rtol=1e-4, atol=1e-6)
    assert metrics["quality"] == pytest.approx(quality.mean().item()) and metrics["gain"] == pytest.approx(gain.mean().item())
    assert 0 < metrics["drift"] < 1e-5  # two ways to the same numbers, so the rounding differs
    assert metrics["truncated"] == pytest.approx(rollout.truncated.float().mean().item())
    s = metrics["samples"][5]
    assert s["prompt"] == ROWS[1]["prompt"] and s["response"] == rollout.texts[5] and s["advantage"] == pytest.approx(weight[1, 1].item())


@pytest.mark.parametrize("objective", ["dqo", "grpo", "pairwise"])
def test_micro_batches_give_the_same_gradient(model, tokenizer, objective):
    whole, m = step(model, tokenizer, objective=objective, micro_batch=12)
    assert max(u.abs().max() for u in whole) > 1e-3 and m["grad_norm"] > 1e-3  # at ratio 1 the gradient is not zero
    for size in (1, 4, 5, 0):
        parts, n = step(model, tokenizer, objective=objective, micro_batch=size)
        for a, b in zip(whole, parts):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        for key in ("loss", "grad_norm", "drift", "entropy", "clipped"):
            assert m[key] == pytest.approx(n[key], abs=1e-5)


def test_gradient_checkpointing_changes_nothing(model, tokenizer, monkeypatch):
    mlp, calls, layers = type(model.model.layers[0].mlp), [], len(model.model.layers)
    monkeypatch.setattr(mlp, "forward", lambda self, x, f=mlp.forward: (torch.is_grad_enabled() and calls.append(tuple(x.shape[:2])), f(self, x))[1])
    whole, _ = step(model, tokenizer)
    prompt, response = calls[0], calls[layers]
    assert calls == [prompt] * layers + [response] * layers and (prompt[0], response[0]) == (len(ROWS), 4 * len(ROWS))  # each prompt once
    calls.clear()
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    again, metrics = step(model, tokenizer)
    assert calls == [(4 * len(ROWS), prompt[1] + response[1])] * 2 * layers, "each layer's forward should have run once more"
    for a, b in zip(whole, again):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert metrics["drift"] < 1e-5


def test_chunked_log_softmax_is_exact(model, tokenizer):
    torch.manual_seed(0)
    rollout = sample(model, tokenizer, [r["prompt"] for r in ROWS], 4, 10)
    weight = torch.randn(rollout.mask.shape)  # the gradient differs from token to token
    real, T = rollout.attention_mask, rollout.mask.shape[1]
    logits = model(input_ids=rollout.tokens, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits[:, -T - 1:-1]
    logp = (logits / 0.7).log_softmax(-1).gather(-1, rollout.tokens[:, -T:, None])[..., 0] * rollout.mask
    naive = [logp, *torch.autograd.grad((weight * logp).sum(), list(model.parameters()))]
    for chunk in (1, 100, 2 ** 24):  # a row at a time, two, all
        logp = token_logps(model, rollout, 0.7, chunk=chunk)
        for a, b in zip(naive, [logp, *torch.autograd.grad((weight * logp).sum(), list(model.parameters()))]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_on_policy_loss_has_value_but_above_all_a_gradient():
    logp = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss, stats = policy_loss(logp, torch.tensor([1.0, -1.0]), mask, 4)
    loss.backward()
    assert loss.item() == pytest.approx(-(2 - 1) / 8)
    torch.testing.assert_close(logp.grad, torch.tensor([[-1.0, -1.0], [1.0, 0.0]]) / 8)
    assert stats["clipped"] == 0 and stats["entropy"] == pytest.approx(3.5)


def test_clipped_ratio_by_hand():
    """Four tokens: ratio 1.5 and 0.5 under a positive and a negative advantage, clip 0.2."""
    ratio = torch.tensor([[1.5, 0.5], [1.5, 0.5]])
    old = torch.full((2, 2), -1.0)
    logp = (old + ratio.log()).requires_grad_()
    loss, stats = policy_loss(logp, torch.tensor([2.0, -2.0]), torch.ones(2, 2, dtype=torch.bool), 5, old, clip=0.2)
    loss.backward()
    # min(1.5 * 2, 1.2 * 2) = 2.4 (flat)   min(0.5 * 2, 0.8 * 2) = 1.0
    # min(-3, -2.4) = -3                   min(-1, -1.6) = -1.6 (flat)
    assert loss.item() == pytest.approx(-(2.4 + 1.0 - 3.0 - 1.6) / 10)
    torch.testing.assert_close(logp.grad, -torch.tensor([[0.0, 0.5 * 2], [1.5 * -2, 0.0]]) / 10)
    assert stats["clipped"] == 2
    per_token, _ = policy_loss(logp, torch.tensor([[2.0, 2.0], [-2.0, -2.0]]), torch.ones(2, 2, dtype=torch.bool), 5, old, clip=0.2)
    assert per_token.item() == pytest.approx(loss.item())


def test_epochs(model, tokenizer):
    """The first of several epochs is the on-policy step; the second is not, and moves on."""
    one, _ = step(model, tokenizer)
    two, metrics = step(model, tokenizer, epochs=2)
    assert any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(one, two))
    assert metrics["drift"] < 1e-5  # of the first epoch
    # The second epoch's ratio is against the policy that sampled, so a tight clip stops what a wide one lets move.
    tight, metrics = step(model, tokenizer, epochs=2, clip=1e-4)
    wide, free = step(model, tokenizer, epochs=2, clip=1e4)
    assert metrics["clipped"] > 0.2 and free["clipped"] == 0 and any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(tight, wide))
    micro, _ = step(model, tokenizer, epochs=2, micro_batch=5)
    for a, b in zip(two, micro):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_kl_is_zero_at_the_reference_and_pulls_back_away_from_it(model, tokenizer):
    without, _ = step(model, tokenizer)
    at, metrics = step(model, tokenizer, copy.deepcopy(model), beta=0.5)
    assert abs(metrics["kl"]) < 1e-5
    for a, b in zip(without, at):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    other = random_llama(40, seed=9)
    away, metrics = step(model, tokenizer, other, beta=0.5)
    assert metrics["kl"] > 0.1 and any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(without, away))
    # by hand: r - beta * log(pi/pi_ref), summed over the response
    torch.manual_seed(4)
    rollout = sample(model, tokenizer, [r["prompt"] for r in ROWS], 4, 10)
    with torch.no_grad():
        ratio = (token_logps(model, rollout) - token_logps(other, rollout)).sum(1)
    quality = torch.tensor(reward(rollout.texts, rollout.texts, rollout.texts))
    gain = torch.tensor([s["gain"] for s in metrics["samples"]])
    expected = advantages((quality - 0.5 * ratio).view(3, 4), gain.view(3, 4), "mean").flatten()
    torch.testing.assert_close(torch.tensor([s["advantage"] for s in metrics["samples"]]), expected, rtol=1e-4, atol=1e-4)


def test_advantages_stay_within_their_group(model, tokenizer):
    """Each prompt's advantages sum to 0 on their own, and grpo does not touch the encoder."""
    for objective in ("dqo", "grpo"):
        _, metrics = step(model, tokenizer, objective=objective)
        a = torch.tensor([s["advantage"] for s in metrics["samples"]]).view(3, 4)
        torch.testing.assert_close(a.sum(1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.manual_seed(4)
    model = copy.deepcopy(model)
    metrics = dqo_step(model, tokenizer, None, reward, torch.optim.SGD(model.parameters(), lr=0.0), ROWS, config(objective="grpo"))
    assert math.isnan(metrics["log_det"]) and math.isfinite(metrics["quality"])


def test_embed():
    encoder = HashEncoder()
    phi = embed(encoder, ["b", "a", "b", "", "a", ""])
    assert encoder.seen == ["b", "a", ""]  # each once
    assert phi.shape == (6, 16) and phi.dtype == torch.float32
    torch.testing.assert_close(phi.norm(dim=1), torch.ones(6))
    known = {}
    embed(encoder, ["a", "c"], known), embed(encoder, ["c", "d", "a"], known)
    assert encoder.seen[3:] == ["a", "c", "d"] and embed(encoder, ["a"], known)[0].equal(phi[1])  # remembered across calls
    assert phi[0].equal(phi[2]) and phi[1].equal(phi[4]) and phi[3].equal(phi[5]) and not phi[0].equal(phi[1])


@pytest.mark.parametrize("what", ["quality", "embedding", "gradient"])
def test_a_number_that_is_not_finite_stops_the_step_before_the_weights_move(model, tokenizer, what):
    class Broken(HashEncoder):
        def encode(self, texts):
            phi = super().encode(texts)
            phi[-1, 3] = float("nan")  # of the last text that was not known yet
            return phi
    if what == "gradient":
        model.lm_head.weight.register_hook(lambda g: g * float("inf"))
    before = [p.detach().clone() for p in model.parameters()]
    score = (lambda p, t, r: [0.5] * 5 + [float("nan")] + [0.5] * 6) if what == "quality" else reward
    torch.manual_seed(4)
    with pytest.raises(BadInput, match=f"the {what} is (nan|inf) for the prompt .* and the response ") as error:
        dqo_step(model, tokenizer, Broken() if what == "embedding" else HashEncoder(), score, torch.optim.SGD(model.parameters(), lr=1.0), ROWS, config())
    torch.manual_seed(4)
    rollout = sample(model, tokenizer, [r["prompt"] for r in ROWS], 4, 10)
    guilty = dict(quality=5, embedding=rollout.texts.index(list(dict.fromkeys(rollout.texts))[-1]))
    if what in guilty:
        assert repr(rollout.texts[guilty[what]][:80]) in str(error.value) and repr(ROWS[guilty[what] // 4]["prompt"]) in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_an_unbounded_reward_is_centred_once_for_the_kernel_and_never_in_the_reward(model, tokenizer):
    def score(prompts, responses, rows):
        return [7.0 + len(t.split()) for t in responses]
    memory, optimizer, center = {}, torch.optim.SGD(model.parameters(), lr=0.0), None
    with pytest.raises(BadInput, match=r"in \[0, 1\]"):  # a range was not declared
        dqo_step(model, tokenizer, HashEncoder(), score, optimizer, ROWS, config(kernel="quality"))
    score.range = (-float("inf"), float("inf"))
    for expected in (None, "the same"):
        torch.manual_seed(4 if expected is None else 5)
        metrics = dqo_step(model, tokenizer, HashEncoder(), score, optimizer, ROWS, config(kernel="quality"), memory=memory)
        center = metrics["quality"] if expected is None else center
        assert memory["center"] == center
        quality = torch.tensor([s["quality"] for s in metrics["samples"]]).view(3, 4)
        phi = embed(HashEncoder(), [s["response"] for s in metrics["samples"]]).view(3, 4, -1)
        gain = marginal_gains(quality_weighted(phi, torch.sigmoid(quality - center)))
        got = torch.tensor([s["advantage"] for s in metrics["samples"]]).view(3, 4)
        torch.testing.assert_close(got, advantages(quality, gain, "mean"), rtol=1e-4, atol=1e-5)
    assert metrics["quality"] != center


def test_an_unknown_name_is_refused():
    for bad in (dict(objective="DQO"), dict(kernel="qualty"), dict(baseline="Mean")):
        with pytest.raises(BadInput, match="choose from"):
            Config(**bad).check()


def test_the_loss_needs_a_third_of_the_memory_of_a_plain_log_softmax():
    """At a vocabulary of 150k, forward and backward, with the same gradient."""
    torch.manual_seed(0)
    vocab, B, N, T = 150_000, 4, 1, 128
    tokens, mask = torch.randint(vocab, (B, N + T)), torch.ones(B, T, dtype=torch.bool)
    rollout = Rollout(tokens, torch.ones_like(tokens), N, mask, torch.zeros(B, T), [""] * B, mask[:, 0])
    model, weight = bench.OnlyLogits(vocab), torch.randn(B)
    peak, grads = {}, {}
    for way in ("dqo", "plain"):
        model.zero_grad(set_to_none=False)
        bench.loss_step(way, model, rollout, weight)  # so that the gradients of the weights are there already
        grads[way] = [p.grad.clone() for p in model.parameters()]
        peak[way] = bench.allocated(bench.loss_step, way, model, rollout, weight)
    assert peak["plain"] > 3 * vocab * B * T * 4 / 2 ** 20 and peak["dqo"] <= peak["plain"] / 3, peak
    for a, b in zip(grads["dqo"], grads["plain"]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
