"""The loss and the whole step."""

import copy
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import random_llama, word_tokenizer
from dqo import (
    OBJECTIVES, BadInput, Config, Rollout, dqo_quality, dqo_step, embed, gram,
    marginal_gains, measure, micro_batches, policy_loss, sample, token_logps)

PROMPTS = ["w5 w6", "w9 w9 w3", "w7"]
TEMPLATE, IDS = "{{ messages[0].content }} {{ more }}", [[5, 6, 8], [9, 9, 3, 8], [7, 8]]
P, K, LONGEST = 3, 4, 10


class HashEncoder:
    """A random direction per text, the same every time."""

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        seeds = [zlib.crc32(text.encode()) for text in texts]
        return np.stack([np.random.default_rng(seed).normal(size=16) for seed in seeds])


@pytest.fixture
def tokenizer():
    """Id 22 ends a thought, so that some answers are not the whole response."""
    words = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, 40)]
    words[22] = "</think>"
    return word_tokenizer(words, bos_token="<s>", eos_token="</s>")


def reward(prompts, responses, rows):
    """The share of different words, of eight."""
    assert prompts == [row["prompt"] for row in rows] == [p for p in PROMPTS for _ in range(K)]
    return [min(1.0, len(set(response.split())) / 8) for response in responses]


def run(model, tokenizer, reference=None, encoder=None, reward=reward, known=None, **kw):
    """One step of plain SGD at lr 1, from a fixed seed: (metrics, samples)."""
    torch.manual_seed(4)
    tokenizer.chat_template = TEMPLATE
    usual = dict(k=K, max_new_tokens=LONGEST, beta=0.0, template=dict(more="w8"))
    return dqo_step(
        model, tokenizer, encoder or HashEncoder(), reward, torch.optim.SGD(model.parameters(), 1),
        [{"prompt": prompt} for prompt in PROMPTS], Config(**{**usual, **kw}), reference, known)


def step(model, *args, **kw):
    """The same for a copy of the model: (the update, which is the gradient, metrics, samples)."""
    model = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # what is left over from before is of no account
    metrics, samples = run(model, *args, **kw)
    assert all(p.grad is None for p in model.parameters())
    return [b - p.detach() for b, p in zip(before, model.parameters())], metrics, samples


def rollout_of_step(model, tokenizer, temperature=1.0):
    """The responses that `step` draws."""
    torch.manual_seed(4)
    return sample(model, tokenizer, IDS, K, LONGEST, temperature)


def assert_all_close(a, b, rtol=1e-3, atol=1e-5):
    """Two lists of tensors, one tensor after the other."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def cut_to_one(grads):
    """(gradients cut to length 1 in all, what it was)"""
    norm = torch.stack([g.norm() for g in grads]).norm().item()
    return [g / max(1.0, norm) for g in grads], norm


def per_token(quality, L, rollout, alpha=0.5):
    """An objective that pays each token apart."""
    return quality[..., None] - alpha * rollout.logp


@pytest.mark.parametrize("kw, alpha", [
    (dict(), 1.0),
    (dict(objective="grpo", baseline="none"), 0.0),
    (dict(beta=0.5, temperature=0.7, alpha=0.3), 0.3),
    (dict(beta=0.5, baseline="std", objective="dqo_quality"), 3.0),
    (dict(objective="per_token", beta=0.2, baseline="none"), 0.5),
])
def test_the_step_is_the_sum_of_its_parts(model, tokenizer, kw, alpha, monkeypatch):
    """Assembled by hand from the public functions. A token pays for the log-ratios from it on."""
    monkeypatch.setitem(OBJECTIVES, "per_token", per_token)
    other = random_llama(40, seed=9)
    updates, metrics, samples = step(model, tokenizer, other, **kw)

    temperature, beta = kw.get("temperature", 1.0), kw.get("beta", 0.0)
    rollout = rollout_of_step(model, tokenizer, temperature)
    rows = [{"prompt": p} for p in PROMPTS for _ in range(K)]
    scores = reward([row["prompt"] for row in rows], rollout.texts, rows)
    quality = torch.tensor(scores, dtype=torch.float64).view(P, K)
    L = gram(embed(HashEncoder(), rollout.texts).view(P, K, -1))
    shaped = OBJECTIVES[kw.get("objective", "dqo")](quality, L, rollout, alpha).view(P, K, -1)
    logp = token_logps(model, rollout, temperature)  # (P, K, T)
    with torch.no_grad():
        log_ratio = logp - token_logps(other, rollout, temperature)
    penalty = torch.stack([beta * log_ratio[..., t:].sum(-1) for t in range(logp.shape[-1])], -1)

    def centred(x):
        return x - x.mean(1, keepdim=True)
    weight = dict(
        none=shaped - penalty, mean=centred(shaped - penalty),
        std=centred(shaped) / (shaped.std(1, keepdim=True) + 1e-4) - centred(penalty),
    )[kw.get("baseline", "mean")].expand(logp.shape)
    loss = -(weight * logp).sum() / (P * K * LONGEST)
    grads, norm = cut_to_one(torch.autograd.grad(loss, list(model.parameters())))
    assert norm > 1e-2
    assert_all_close(updates, grads)
    by_hand = measure(rollout, quality, L, shaped, penalty, log_ratio * (beta > 0))
    assert 0 < metrics["mismatch"] < 1e-5  # two ways to the same numbers: the rounding differs
    by_hand |= dict(grad_norm=norm, mismatch=metrics["mismatch"])
    assert metrics == pytest.approx(by_hand, rel=1e-3, abs=1e-5)
    assert len(samples) == P * K and rollout.texts != rollout.whole
    for i, shown in enumerate(samples):
        assert (shown["prompt"], shown["response"]) == (PROMPTS[i // K], rollout.whole[i])
        numbers = scores[i], marginal_gains(L)[i // K, i % K], weight[i // K, i % K, 0].detach()
        got = shown["quality"], shown["gain"], shown["advantage"]
        assert got == pytest.approx(tuple(map(float, numbers)), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kw", [
    dict(beta=0.3),
    dict(objective="grpo"),
    dict(beta=0.3, epochs=2, baseline="std"),
])
def test_micro_batches_and_gradient_checkpointing_change_nothing(model, tokenizer, kw):
    """Parts of any size, even less than a group of 4, add up to the step in one piece; with
    checkpointing each layer runs twice."""
    reference, runs = random_llama(40, seed=9), []
    whole, expected, _ = step(model, tokenizer, reference, micro_batch=12, **kw)
    for size in (1, 3, 8, 12):
        if size == 12:
            model.activation_checkpointing_enable()
            model.model.layers[0].mlp.register_forward_pre_hook(
                lambda *_: runs.append(torch.is_grad_enabled()))
        parts, metrics, _ = step(model, tokenizer, reference, micro_batch=size, **kw)
        assert_all_close(whole, parts)
        assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert sum(runs) == 2 * kw.get("epochs", 1)


def test_the_longest_groups_come_first(model, tokenizer):
    """Too small a memory shows at once. Small groups share a micro-batch."""
    rollout = rollout_of_step(model, tokenizer)
    needed = [part.prompt.shape[1] + part.mask.shape[2] for _, part in micro_batches(rollout, K)]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == P
    assert [len(part.mask) for _, part in micro_batches(rollout, 2 * K + 1)] == [2, 1]


@pytest.mark.parametrize("size, times", [(4, 1), (12, 1), (2, 2)])
def test_each_token_runs_once(model, tokenizer, size, times):
    """Prompts once per group and not per response, responses once: to sample, for the gradient and
    under the reference. Micro-batches that halve the groups run each prompt twice."""
    other, passes = random_llama(40, seed=9), dict(sampling=0, gradient=0, reference=0)
    model.lm_head.bias = torch.nn.Parameter(-1e4 * torch.eye(40)[0])  # never says 0, the padding

    def note(layer, inputs):
        learns = "gradient" if torch.is_grad_enabled() else "sampling"
        name = learns if layer is model.get_input_embeddings() else "reference"
        passes[name] += (inputs[0] != 0).sum().item()
    for m in (model, other):
        m.get_input_embeddings().register_forward_pre_hook(note)
    metrics, _ = run(model, tokenizer, other, beta=0.1, micro_batch=size)
    for name, tokens in passes.items():
        prompts = sum(map(len, IDS)) * (1 if name == "sampling" else times)
        least = prompts + round(metrics["length"] * P * K)
        assert least - P * (K + times) <= tokens <= least, name  # last ones need not run


@pytest.mark.parametrize("clip", [0.001, 0.2])
def test_epochs(model, tokenizer, clip):
    """The first is the on-policy step. The second, by hand, has ratios against the policy that
    sampled."""
    one, _, samples = step(model, tokenizer)
    both, metrics, _ = step(model, tokenizer, epochs=2, clip=clip)
    rollout = rollout_of_step(model, tokenizer)
    old = token_logps(model, rollout).detach()
    for p, update in zip(model.parameters(), one):
        p.data -= update
    weight = torch.tensor([s["advantage"] for s in samples]).view(P, K, 1)
    logp = token_logps(model, rollout)
    assert ((logp - old).abs() > 2 * clip).any()  # some ratios are clipped
    loss = policy_loss(logp, weight, rollout.mask, LONGEST, old, clip)
    second, norm = cut_to_one(torch.autograd.grad(loss, list(model.parameters())))
    assert_all_close(both, [a + b for a, b in zip(one, second)])
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_metrics_by_hand():
    """Two prompts, three responses each."""
    lengths = torch.tensor([[1, 4, 2], [3, 3, 1]])
    mask = torch.arange(4) < lengths[..., None]
    rollout = Rollout(None, None, None, mask, -2.0 * mask, ["a", "a", " ", "a", "b", ""], None,
                      torch.tensor([[False, True, True], [False, False, True]]))
    quality = torch.tensor([[0.0, 3.0, 6.0], [1.0, 1.0, 1.0]])
    penalty = 3 * quality[..., None] * torch.tensor([1.0, 50.0])
    L = torch.stack([torch.ones(3, 3), torch.eye(3)])
    spread = 6 ** 0.5 / 2  # of 0, 3, 6 it is the root of 6, of equal ones 0
    got = measure(rollout, quality, L, quality[..., None] * torch.tensor([2.0, 4.0]), penalty,
                  0.5 * mask)
    assert got == pytest.approx(dict(
        quality=2.0,
        log_det=(math.log(4) + math.log(8)) / 2,
        gain=(math.log(4 / 3) + math.log(2)) / 2,
        distinct=5 / 6,
        length=14 / 6,
        truncated=3 / 6,
        truncated_quality=(3 + 6 + 1) / 3,
        entropy=2.0,
        kl=7 / 6,
        quality_std=spread,
        bonus_std=2 * spread,
        penalty_std=3 * spread), rel=1e-5)
    rollout.truncated[:] = False
    none = measure(rollout, quality, L, quality[..., None], penalty, mask)
    assert none["truncated"] == none["truncated_quality"] == 0


def test_the_loss_by_hand():
    """Ratios 1.5 and 0.5 under a positive and a negative advantage, clip 0.2; and padding."""
    ratio = torch.tensor([[[1.5, 0.5, 3.0], [1.5, 0.5, 3.0]]])  # (P, k, T), P = 1
    old, weight = torch.full((1, 2, 3), -1.0), torch.tensor([[[2.0] * 3, [-2.0] * 3]])
    logp = (old + ratio.log()).requires_grad_()
    mask = torch.tensor([True, True, False]).expand(1, 2, 3)
    loss = policy_loss(logp, weight, mask, 5, old, clip=0.2)
    # min(1.5 * 2, 1.2 * 2) = 2.4 (flat)   min(0.5 * 2, 0.8 * 2) = 1.0
    # min(-3, -2.4) = -3                   min(-1, -1.6) = -1.6 (flat)
    assert loss.item() == pytest.approx(-(2.4 + 1.0 - 3.0 - 1.6) / (1 * 2 * 5))
    loss.backward()
    by_hand = -torch.tensor([[[0.0, 0.5 * 2, 0.0], [1.5 * -2, 0.0, 0.0]]]) / 10
    torch.testing.assert_close(logp.grad, by_hand)


class OnlyLogits(torch.nn.Module):
    """An embedding and a head: the logits are all there is to the memory."""

    def __init__(self, vocab, width=16):
        super().__init__()
        self.embed = torch.nn.Embedding(vocab, width)
        self.head = torch.nn.Linear(width, vocab, bias=False)
        self.device = self.head.weight.device

    def forward(self, input_ids, logits_to_keep=0, **_):
        logits = self.head(self.embed(input_ids)[:, -logits_to_keep:])
        return SimpleNamespace(logits=logits, past_key_values=None)


def test_embeddings(model, tokenizer):
    """Unit vectors in the order of the texts; each text is encoded once, until memory is full."""
    encoder, known = HashEncoder(), {}
    phi = embed(encoder, ["b", "a", "b"], known)
    raw = torch.as_tensor(HashEncoder().encode(["b", "a", "b"])).float()
    torch.testing.assert_close(phi, raw / raw.norm(dim=1, keepdim=True))
    assert embed(encoder, ["c", "a"], known)[1].equal(phi[1])
    assert encoder.seen == ["b", "a", "c"]
    known.update((f"text {i}", phi[0]) for i in range(20_000))
    assert embed(encoder, ["d", "a"], known)[1].equal(phi[1])
    assert list(known) == ["d", "a"]

    encoder, known = HashEncoder(), {}  # from step to step, too
    for _ in range(2):
        step(model, tokenizer, encoder=encoder, known=known)
    assert encoder.seen == list(dict.fromkeys(rollout_of_step(model, tokenizer).texts))


@pytest.mark.parametrize("encode", [
    lambda texts: np.ones((len(texts), 4)),
    lambda texts: torch.tensor([[len(text), 1.0] for text in texts]),
    HashEncoder().encode,
])
def test_an_empty_text_spans_nothing(encode):
    """Whatever the encoder makes of it: its gain is 0, and nobody else's is another."""
    encoder = SimpleNamespace(encode=encode)
    phi = embed(encoder, ["a", "", "bb", " \n", "bb"])
    gain = marginal_gains(gram(phi))
    assert gain[1] == gain[3] == 0
    torch.testing.assert_close(gain[[0, 2, 4]], marginal_gains(gram(phi[[0, 2, 4]])))


class BrokenEncoder(HashEncoder):
    def encode(self, texts):
        phi = super().encode(texts)
        phi[-1, 3] = math.nan
        return phi


def broken(number):
    """A reward whose sixth number, of the second prompt, is this one."""
    return lambda prompts, *_: [0.5] * 5 + [number] + [0.5] * 6


BROKEN = {
    "reward": dict(reward=broken(math.nan)),
    "infinite reward": dict(reward=broken(math.inf), objective="grpo", baseline="none"),
    "encoder": dict(encoder=BrokenEncoder()),
    "model": {}, "reference": dict(beta=0.1), "gradient": {},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_number_that_is_not_finite_stops_the_step_before_a_weight_moves(model, tokenizer, what):
    other, known = random_llama(40, seed=9), {}
    if what in ("model", "reference"):
        (model if what == "model" else other).lm_head.weight.data[3] = math.nan
    if what == "gradient":
        model.lm_head.weight.register_hook(lambda g: g * math.inf)
    before = copy.deepcopy(model.state_dict())
    message = "w9 w9 w3.*0.5, (nan|inf), 0.5" if "reward" in what else "not finite"
    with pytest.raises(FloatingPointError, match=message):
        run(model, tokenizer, other, known=known, **BROKEN[what])
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(x.isfinite().all() for x in known.values())


@pytest.mark.parametrize("scores, fine", [
    ([0.0, 0.5, 0.2 + 0.4 + 0.3 + 0.1], True),  # 1.0000000000000002
    ([0.0, 0.5, np.float32(1.0000002)], True),  # a cosine, say
    ([0.0, 0.5, 1.1], False),
    ([-0.1, 0.5, 1.0], False),
])
def test_qualities_of_dqo_quality(scores, fine):
    """In [0, 1] up to rounding, which spans no more than 1 does."""
    quality, L = torch.tensor([scores], dtype=torch.float64), torch.eye(3)[None].double()
    if not fine:
        with pytest.raises(BadInput, match="squash"):
            dqo_quality(quality, L, None)
        return
    gain = (dqo_quality(quality, L, None, alpha=1.0) - quality)[0].tolist()
    assert gain == pytest.approx([0.0, math.log(1.5), math.log(2)], abs=1e-7)
