"""The loss and the whole step."""

import copy
import math
import zlib

import pytest
import torch
import torch.nn.functional as F

import bench
import data.objectives  # noqa: F401  makes the objectives beside dqo and grpo known
from data.models import checkpoint_activations
from data.options import RunConfig
from conftest import random_llama
from dqo import (
    OBJECTIVES,
    BadInput,
    Config,
    Rollout,
    advantages,
    dqo_step,
    embed,
    gaussian,
    log_det,
    marginal_gains,
    micro_batches,
    policy_loss,
    quality_weighted,
    sample,
    summary,
    token_logps,
)

ROWS = [{"prompt": "<s> w5 w6"}, {"prompt": "<s> w9 w9 w3"}, {"prompt": "<s>"}]
PROMPTS = [row["prompt"] for row in ROWS]
P, K, LONGEST = 3, 4, 10


class HashEncoder:
    """sentence-transformers' interface: a random direction per text, the same every time."""

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        return torch.stack([self.direction(text) for text in texts]).numpy()

    def direction(self, text):
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        return torch.randn(16, generator=generator)


def reward(prompts, responses, rows):
    """The share of different words, of eight."""
    assert len(prompts) == len(responses) == len(rows) == P * K
    return [min(1.0, len(set(response.split())) / 8) for response in responses]


def config(**kw):
    """The options of most tests here, but for what is given."""
    usual = dict(k=K, prompts=P, max_new_tokens=LONGEST, beta=0.0, lr=1e-3)
    return Config(**{**usual, **kw})


def sgd(model, lr=1.0):
    return torch.optim.SGD(model.parameters(), lr=lr)


def step(model, tokenizer, reference=None, **kw):
    """One step from a fixed seed: (what was taken off each parameter, metrics).

    It is plain SGD at lr 1, so that what is taken off *is* the gradient.
    """
    model = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(4)
    metrics = dqo_step(model, tokenizer, HashEncoder(), reward, sgd(model), ROWS,
                       config(**kw), reference)
    updates = [b - p.detach() for b, p in zip(before, model.parameters())]
    return updates, metrics


def rollout_of_step(model, tokenizer):
    """The responses that `step` draws."""
    torch.manual_seed(4)
    return sample(model, tokenizer, PROMPTS, K, LONGEST)


def quality_of(rollout):
    return torch.tensor(reward(rollout.texts, rollout.texts, rollout.texts)).view(P, K)


def column(metrics, key):
    """One number of every sample of a step, (P, K)."""
    return torch.tensor([s[key] for s in metrics["samples"]]).view(P, K)


def assert_all_close(a, b, rtol, atol):
    """Two lists of tensors, one tensor after the other."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def differ(a, b, atol):
    """Whether any tensor of one list is further than atol from that of the other."""
    return any(not torch.allclose(x, y, atol=atol) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------- the gradient
def test_the_step_is_the_sum_of_its_parts(model, tokenizer):
    """The same update and metrics come out when assembled by hand from the public functions."""
    updates, metrics = step(model, tokenizer)

    rollout = rollout_of_step(model, tokenizer)
    quality = quality_of(rollout)
    gain = marginal_gains(embed(HashEncoder(), rollout.texts).view(P, K, -1))
    weight = advantages(quality, 1.0 * gain, "mean")
    logp = token_logps(model, rollout)
    loss = -(weight.flatten()[:, None] * logp).sum() / (P * K * LONGEST)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([g.norm() for g in grads]).norm().item()
    clip = min(1.0, 1 / (norm + 1e-6))
    assert_all_close(updates, [g * clip for g in grads], rtol=1e-4, atol=1e-6)

    assert metrics["quality"] == pytest.approx(quality.mean().item())
    assert metrics["gain"] == pytest.approx(gain.mean().item())
    at_ratio_1 = -(weight.flatten() * rollout.mask.sum(1)).sum() / (P * K * LONGEST)
    assert metrics["loss"] == pytest.approx(at_ratio_1.item(), abs=1e-6)
    per_token = -logp.sum().item() / rollout.mask.sum().item()
    assert metrics["entropy"] == pytest.approx(per_token, rel=1e-5)
    assert 0 < metrics["drift"] < 1e-5  # two ways to the same numbers: the rounding differs
    assert metrics["truncated"] == pytest.approx(rollout.truncated.float().mean().item())
    shown = metrics["samples"][5]
    assert shown["prompt"] == PROMPTS[1]
    assert shown["response"] == rollout.texts[5]
    assert shown["advantage"] == pytest.approx(weight[1, 1].item())


@pytest.mark.parametrize("objective, beta", [
    ("dqo", 0.0),
    ("grpo", 0.0),
    ("pairwise", 0.0),
    ("dqo", 0.3),
    ("entropy", 0.3),
])
def test_micro_batches_give_the_same_gradient(model, tokenizer, objective, beta):
    """A step in parts of any size, also less than a group of 4, is the step in one piece."""
    reference = random_llama(40, seed=9)

    def in_parts(size):
        return step(model, tokenizer, reference, objective=objective, beta=beta, micro_batch=size)
    whole, expected = in_parts(12)
    # At ratio 1 the gradient is not zero.
    assert max(u.abs().max() for u in whole) > 1e-3
    assert expected["grad_norm"] > 1e-3
    for size in (1, 3, 4, 5, 8, 11, 0):
        parts, metrics = in_parts(size)
        assert_all_close(whole, parts, rtol=1e-4, atol=1e-6)
        for key in ("loss", "grad_norm", "drift", "entropy", "clipped", "kl", "penalty_std"):
            assert expected[key] == pytest.approx(metrics[key], abs=1e-5)


@pytest.mark.parametrize("size", [1, 3, 4, 6, 9, 0])
def test_micro_batches_are_whole_groups_longest_first(model, tokenizer, size):
    """Each response is in one micro-batch; only a group too large for one is cut."""
    rollout = rollout_of_step(model, tokenizer)
    lengths = rollout.attention_mask.sum(1).view(P, K).amax(1).tolist()
    parts = list(micro_batches(rollout, config(micro_batch=size)))
    rows = torch.cat([index for index, _ in parts])
    groups = list(dict.fromkeys((rows // K).tolist()))  # in the order in which they come
    assert rows.tolist() == [i * K + j for i in groups for j in range(K)]
    in_order = [lengths[i] for i in groups]
    assert in_order == sorted(lengths, reverse=True)
    assert in_order != lengths, "they should not have been in this order already"
    for index, part in parts:
        assert part.texts == [rollout.texts[i] for i in index]
        if size in (1, 3):
            assert len({i // K for i in index.tolist()}) == 1
        else:
            assert len(index) % K == 0
        assert len(index) <= (size or P * K)
    assert len(parts) == {1: 12, 3: 6, 4: 3, 6: 3, 9: 2, 0: 1}[size]


def counted(model, calls):
    """Note each pass through the embedding layer: (real tokens, whether for a gradient).

    The model never says <pad>, id 0, so that every 0 is padding.
    """
    vocabulary = model.lm_head.out_features
    bias = F.one_hot(torch.tensor(0), vocabulary) * -1e4
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)

    def note(layer, inputs):
        calls.append(((inputs[0] != 0).sum().item(), torch.is_grad_enabled()))
    model.get_input_embeddings().register_forward_pre_hook(note)
    return model


@pytest.mark.parametrize("size, times", [
    (8, 1),
    (16, 1),
    (32, 1),
    (0, 1),
    (4, 2),  # half a group
])
def test_each_token_runs_once(tokenizer, size, times):
    """Prompts once and responses once: to sample, for the gradient, and under the reference.

    No micro-batch scatters a group of 8, and nothing is scored twice. One so small that it
    cuts the groups runs each prompt as often as it cuts.
    """
    k, policy, reference = 8, [], []
    prompts = ["<s>" + " w5" * n + f" w{n}" for n in (30, 3, 17, 25, 9, 40, 12, 21)]
    model = counted(random_llama(40), policy)
    other = counted(random_llama(40, seed=9), reference)
    torch.manual_seed(0)
    metrics = dqo_step(
        model, tokenizer, None, lambda prompts, responses, rows: [0.0] * len(rows), sgd(model),
        [{"prompt": prompt} for prompt in prompts],
        config(objective="grpo", k=k, prompts=8, beta=0.1, micro_batch=size),
        other)
    in_prompts = sum(len(tokenizer(prompt).input_ids) for prompt in prompts)
    in_responses = round(metrics["length"] * 8 * k)
    assert 0.2 < in_responses / in_prompts < 5, "neither should be all that counts"
    passes = dict(
        sampling=sum(n for n, gradient in policy if not gradient),
        gradient=sum(n for n, gradient in policy if gradient),
        reference=sum(n for n, gradient in reference))
    for name, tokens in passes.items():
        least = in_prompts * (1 if name == "sampling" else times) + in_responses
        assert 0.8 * least < tokens <= 1.02 * least, (name, passes)
    assert not any(gradient for _, gradient in reference)


@pytest.fixture
def forwards(model, monkeypatch):
    """(rows, columns) of every pass through an MLP of the model that records a gradient."""
    mlp, seen = type(model.model.layers[0].mlp), []
    forward = mlp.forward

    def recorded(self, x):
        if torch.is_grad_enabled():
            seen.append(tuple(x.shape[:2]))
        return forward(self, x)
    monkeypatch.setattr(mlp, "forward", recorded)
    return seen


def test_gradient_checkpointing_changes_nothing(model, tokenizer, forwards):
    """The update is the same; each prompt runs once without it, each layer twice with it."""
    layers = len(model.model.layers)
    whole, _ = step(model, tokenizer)
    prompt, response = forwards[0], forwards[layers]
    assert forwards == [prompt] * layers + [response] * layers
    assert prompt[0] == P
    assert response[0] == P * K

    forwards.clear()
    checkpoint_activations(model)
    again, metrics = step(model, tokenizer)
    both = (P * K, prompt[1] + response[1])
    assert forwards == [both] * 2 * layers, "each layer's forward should have run once more"
    assert_all_close(whole, again, rtol=1e-4, atol=1e-6)
    assert metrics["drift"] < 1e-5


def test_chunked_log_softmax_is_exact(model, tokenizer):
    """token_logps and its gradient are those of a plain log-softmax, in chunks of any size."""
    torch.manual_seed(0)
    rollout = sample(model, tokenizer, PROMPTS, K, LONGEST)
    weight = torch.randn(rollout.mask.shape)  # the gradient differs from token to token
    parameters = list(model.parameters())

    def with_gradient(logp):
        return [logp, *torch.autograd.grad((weight * logp).sum(), parameters)]
    real, T = rollout.attention_mask, rollout.mask.shape[1]
    position_ids = (real.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=rollout.tokens, attention_mask=real, position_ids=position_ids)
    logits = out.logits[:, -T - 1:-1]
    target = rollout.tokens[:, -T:, None]
    logp = (logits / 0.7).log_softmax(-1).gather(-1, target)[..., 0]
    plain = with_gradient(logp * rollout.mask)

    for chunk in (1, 100, 2 ** 24):  # a row at a time, two, all
        chunked = with_gradient(token_logps(model, rollout, 0.7, chunk=chunk))
        assert_all_close(plain, chunked, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------- the loss
def test_on_policy_loss_has_value_but_above_all_a_gradient():
    """At ratio 1 the gradient is the advantage over the constant number of tokens."""
    logp = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss, stats = policy_loss(logp, torch.tensor([1.0, -1.0]), mask, 4)
    loss.backward()
    assert loss.item() == pytest.approx(-(2 - 1) / 8)
    torch.testing.assert_close(logp.grad, torch.tensor([[-1.0, -1.0], [1.0, 0.0]]) / 8)
    assert stats["clipped"] == 0
    assert stats["entropy"] == pytest.approx(3.5)


def test_clipped_ratio_by_hand():
    """Four tokens: ratio 1.5 and 0.5 under a positive and a negative advantage, clip 0.2."""
    ratio = torch.tensor([[1.5, 0.5], [1.5, 0.5]])
    old = torch.full((2, 2), -1.0)
    logp = (old + ratio.log()).requires_grad_()
    mask = torch.ones(2, 2, dtype=torch.bool)
    loss, stats = policy_loss(logp, torch.tensor([2.0, -2.0]), mask, 5, old, clip=0.2)
    loss.backward()
    # min(1.5 * 2, 1.2 * 2) = 2.4 (flat)   min(0.5 * 2, 0.8 * 2) = 1.0
    # min(-3, -2.4) = -3                   min(-1, -1.6) = -1.6 (flat)
    assert loss.item() == pytest.approx(-(2.4 + 1.0 - 3.0 - 1.6) / 10)
    by_hand = -torch.tensor([[0.0, 0.5 * 2], [1.5 * -2, 0.0]]) / 10
    torch.testing.assert_close(logp.grad, by_hand)
    assert stats["clipped"] == 2

    weights = torch.tensor([[2.0, 2.0], [-2.0, -2.0]])
    per_token, _ = policy_loss(logp, weights, mask, 5, old, clip=0.2)
    assert per_token.item() == pytest.approx(loss.item())


def test_padding_is_neither_lost_nor_clipped():
    """Whatever stands outside the mask, loss, sums and gradient are those of the tokens."""
    logp = torch.tensor([[-1.0, 9.0], [-2.0, -9.0]], requires_grad=True)
    old = torch.tensor([[-1.5, -9.0], [-2.0, 9.0]])
    mask = torch.tensor([[True, False], [True, False]])
    loss, stats = policy_loss(logp, torch.tensor([1.0, 1.0]), mask, 2, old)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 + 1.0) / 4)
    assert stats == dict(clipped=1, entropy=pytest.approx(3.0))
    torch.testing.assert_close(logp.grad, torch.tensor([[0.0, 0.0], [-1 / 4, 0.0]]))


def test_epochs(model, tokenizer):
    """The first of several epochs is the on-policy step; the second is not, and moves on."""
    one, _ = step(model, tokenizer)
    two, metrics = step(model, tokenizer, epochs=2)
    assert differ(one, two, atol=1e-5)
    assert metrics["drift"] < 1e-5  # of the first epoch

    # The second epoch's ratio is against the policy that sampled, so a tight clip stops what a
    # wide one lets move.
    tight, clipped = step(model, tokenizer, epochs=2, clip=1e-4)
    wide, free = step(model, tokenizer, epochs=2, clip=1e4)
    assert clipped["clipped"] > 0.2
    assert free["clipped"] == 0
    assert differ(tight, wide, atol=1e-4)

    micro, _ = step(model, tokenizer, epochs=2, micro_batch=5)
    assert_all_close(two, micro, rtol=1e-3, atol=1e-5)


def length_of(updates):
    return torch.stack([u.norm() for u in updates]).norm().item()


def test_a_long_gradient_is_cut_to_length_one(model, tokenizer):
    """A short one is followed as it is; the log tells how long it was before."""
    for alpha, shortest, longest in ((1e-3, 0, 1), (1e3, 10, 1e6)):
        updates, metrics = step(model, tokenizer, alpha=alpha)
        assert shortest < metrics["grad_norm"] < longest
        expected = min(1.0, metrics["grad_norm"])
        assert length_of(updates) == pytest.approx(expected, rel=1e-3)


def test_no_gradient_is_left_over(model, tokenizer):
    """Neither from before a step, nor from one of its epochs to the next, nor after it."""
    _, alone = step(model, tokenizer)
    for epochs in (1, 3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        torch.manual_seed(4)
        metrics = dqo_step(model, tokenizer, HashEncoder(), reward, sgd(model, lr=0.0), ROWS,
                           config(epochs=epochs))
        assert metrics["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert all(p.grad is None for p in model.parameters())


# -------------------------------------------------------------------- the rollout and its log
@pytest.mark.parametrize("options, more", [
    (dict(), [8]),
    (dict(template_args=dict(more="w9 w9")), [8, 9, 9]),
    (dict(plain=True), []),
])
def test_the_template_is_the_one_that_was_asked_for(model, tokenizer, options, more):
    """Its arguments reach it, and a plain prompt does not go through it."""
    tokenizer.chat_template = "{{ messages[0].content }} w8 {{ more }}"
    _, metrics = step(model, tokenizer, **options)
    ids = [tokenizer(prompt).input_ids + more for prompt in PROMPTS]
    torch.manual_seed(4)
    texts = sample(model, tokenizer, ids, K, LONGEST).texts
    assert [s["response"] for s in metrics["samples"]] == texts


def test_the_log_of_a_rollout_by_hand():
    """Two prompts, three responses each. Equal responses count within a prompt only."""
    lengths = torch.tensor([1, 4, 2, 3, 3, 1])
    rollout = Rollout(
        tokens=None,
        attention_mask=None,
        prompt_length=1,
        mask=torch.arange(5) < lengths[:, None],
        logp=None,
        texts=["a", "a", " ", "a", "b", ""],
        truncated=torch.tensor([False, True, False, False, False, False]))
    quality = torch.tensor([[0.0, 3.0, 6.0], [1.0, 1.0, 1.0]])
    gain, advantage = torch.arange(6.0).view(2, 3), -torch.arange(6.0).view(2, 3)
    rows = [dict(prompt="p"), dict(prompt="q")]
    log = summary(rows, rollout, quality, 2 * quality, 3 * quality, gain, advantage)
    spread = 6 ** 0.5 / 2  # of 0, 3, 6 it is the root of 6, of equal ones 0
    shown = log.pop("samples")
    assert log == dict(
        quality=2.0,
        gain=2.5,
        distinct=pytest.approx(5 / 6),
        length=pytest.approx(14 / 6),
        truncated=pytest.approx(1 / 6),
        empty=pytest.approx(2 / 6),
        quality_std=pytest.approx(spread),
        bonus_std=pytest.approx(2 * spread),
        penalty_std=pytest.approx(3 * spread))
    assert [s["prompt"] for s in shown] == ["p"] * 3 + ["q"] * 3
    assert [s["response"] for s in shown] == rollout.texts
    assert shown[4] == dict(prompt="q", response="b", quality=1.0, gain=4.0, advantage=-4.0)


# ----------------------------------------------------------------------------- the advantages
def test_kl_is_zero_at_the_reference_and_pulls_back_away_from_it(model, tokenizer):
    """beta changes nothing at the reference; elsewhere r becomes r - beta * log(pi/pi_ref)."""
    without, _ = step(model, tokenizer)
    at, metrics = step(model, tokenizer, copy.deepcopy(model), beta=0.5)
    assert abs(metrics["kl"]) < 1e-5
    assert_all_close(without, at, rtol=1e-3, atol=1e-5)

    other = random_llama(40, seed=9)
    away, metrics = step(model, tokenizer, other, beta=0.5)
    assert metrics["kl"] > 0.1
    assert differ(without, away, atol=1e-3)

    # By hand, the log-ratio summed over the response.
    rollout = rollout_of_step(model, tokenizer)
    with torch.no_grad():
        ratio = (token_logps(model, rollout) - token_logps(other, rollout)).sum(1).view(P, K)
    gain = column(metrics, "gain")
    expected = advantages(quality_of(rollout) - 0.5 * ratio, gain, "mean")
    torch.testing.assert_close(column(metrics, "advantage"), expected, rtol=1e-4, atol=1e-4)


def test_one_temperature_for_sampling_reference_and_update(model, tokenizer):
    """At 0.7 the step is put together by hand from responses and log-probabilities at 0.7."""
    other, hot, beta = random_llama(40, seed=9), 0.7, 0.5
    updates, metrics = step(model, tokenizer, other, temperature=hot, beta=beta)
    torch.manual_seed(4)
    rollout = sample(model, tokenizer, PROMPTS, K, LONGEST, hot)
    assert [s["response"] for s in metrics["samples"]] == rollout.texts

    logp = token_logps(model, rollout, hot)                                 # (B, T)
    with torch.no_grad():
        log_ratio = logp.detach() - token_logps(other, rollout, hot)
    from_here_on = [log_ratio[:, t:].sum(1) for t in range(logp.shape[1])]
    penalty = beta * torch.stack(from_here_on, -1).view(P, K, -1)           # (P, K, T)
    reward_to_go = quality_of(rollout)[..., None] - penalty
    weight = advantages(reward_to_go, column(metrics, "gain")[..., None], "mean").flatten(0, 1)
    loss = -(weight * logp).sum() / (P * K * LONGEST)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([g.norm() for g in grads]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert_all_close(updates, [g / max(1.0, norm) for g in grads], rtol=1e-3, atol=1e-5)
    assert metrics["drift"] < 1e-5

    rho = (-log_ratio).exp()  # pi_ref / pi: k3 is rho - 1 - log rho
    k3 = (rho - 1 - rho.log()).sum() / (P * K)
    assert metrics["kl"] == pytest.approx(k3.item(), rel=1e-4)


def spread(values):
    """The standard deviation of some numbers, all of them there are."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))


@pytest.mark.parametrize("objective", ["dqo", "entropy"])
def test_how_much_each_term_decides_is_logged(model, tokenizer, objective):
    """The mean standard deviation within a group of quality, bonus and penalty, by hand."""
    other = random_llama(40, seed=9)
    _, metrics = step(model, tokenizer, other, objective=objective, beta=0.5, alpha=0.7)
    rollout = rollout_of_step(model, tokenizer)
    bonus = (0.7 * column(metrics, "gain")).flatten().tolist()
    if objective == "entropy":  # per token: the mean over the response
        logp = rollout.logp.view(P, K, -1).masked_fill(~rollout.mask.view(P, K, -1), math.nan)
        each = OBJECTIVES["entropy"](quality_of(rollout), None, logp, 0.7)
        bonus = each.nanmean(-1).flatten().tolist()
    with torch.no_grad():
        ratio = (token_logps(model, rollout) - token_logps(other, rollout)).sum(1)
    terms = dict(
        quality=column(metrics, "quality").flatten().tolist(),
        bonus=bonus,
        penalty=(0.5 * ratio).tolist())
    for name, values in terms.items():
        groups = [values[i:i + K] for i in range(0, P * K, K)]
        by_hand = sum(map(spread, groups)) / P
        assert metrics[f"{name}_std"] == pytest.approx(by_hand, rel=1e-3, abs=1e-6), name
    assert metrics["quality_std"] > 0.01
    assert metrics["penalty_std"] > 0.1

    _, metrics = step(model, tokenizer, objective="grpo")
    assert metrics["bonus_std"] == metrics["penalty_std"] == 0


def test_the_volume_in_the_log_is_that_of_the_plain_kernel(model, tokenizer):
    """So that runs with another kernel compare; the gains are those of the kernel."""
    kernels = ("plain", "quality", "gaussian")
    plain, weighted, curved = [step(model, tokenizer, kernel=kernel)[1] for kernel in kernels]
    assert [s["response"] for s in plain["samples"]] == [s["response"] for s in weighted["samples"]]
    phi = embed(HashEncoder(), [s["response"] for s in plain["samples"]]).view(P, K, -1)
    assert plain["log_det"] == pytest.approx(log_det(phi).mean().item(), rel=1e-5)
    assert weighted["log_det"] == curved["log_det"] == plain["log_det"]
    assert weighted["gain"] < plain["gain"] - 0.01
    expected = marginal_gains(gaussian(phi)).mean().item()
    assert curved["gain"] == pytest.approx(expected, rel=1e-5)
    assert curved["gain"] < plain["gain"] - 0.01


def test_advantages_stay_within_their_group(model, tokenizer):
    """Each prompt's advantages sum to 0 on their own, and grpo does not touch the encoder."""
    for objective in ("dqo", "grpo"):
        _, metrics = step(model, tokenizer, objective=objective)
        sums = column(metrics, "advantage").sum(1)
        torch.testing.assert_close(sums, torch.zeros(P), rtol=0, atol=1e-5)

    no_encoder = None
    torch.manual_seed(4)
    metrics = dqo_step(model, tokenizer, no_encoder, reward, sgd(model, lr=0.0), ROWS,
                       config(objective="grpo"))
    assert math.isnan(metrics["log_det"])
    assert math.isfinite(metrics["quality"])


def test_embed():
    """Unit vectors in the order of the texts; each text is encoded once, also across calls."""
    encoder = HashEncoder()
    phi = embed(encoder, ["b", "a", "b", "", "a", ""])
    assert encoder.seen == ["b", "a", ""]
    assert phi.shape == (6, 16)
    assert phi.dtype == torch.float32
    torch.testing.assert_close(phi.norm(dim=1), torch.ones(6))
    b, a, empty = phi[0], phi[1], phi[3]
    assert phi[2].equal(b)
    assert phi[4].equal(a)
    assert phi[5].equal(empty)
    assert not b.equal(a)

    known = {}
    embed(encoder, ["a", "c"], known)
    embed(encoder, ["c", "d", "a"], known)
    assert encoder.seen[3:] == ["a", "c", "d"]
    assert embed(encoder, ["a"], known)[0].equal(a)


def test_a_full_memory_of_embeddings_is_emptied():
    """So that a long run does not fill the machine's; what was in it is encoded again."""
    encoder, known = HashEncoder(), {}
    before = embed(encoder, ["a"], known)
    known.update((f"text {i}", before[0]) for i in range(20_000))
    assert embed(encoder, ["b", "a"], known)[1].equal(before[0])
    assert list(known) == ["b", "a"]
    assert encoder.seen == ["a", "b", "a"]


def test_a_step_does_not_encode_what_an_earlier_one_has_seen(model, tokenizer):
    encoder, memory = HashEncoder(), {}
    for _ in range(2):
        torch.manual_seed(4)
        dqo_step(model, tokenizer, encoder, reward, sgd(model, lr=0.0), ROWS, config(),
                 memory=memory)
    assert encoder.seen == list(dict.fromkeys(rollout_of_step(model, tokenizer).texts))


def test_of_a_thinking_model_only_the_answer_is_embedded():
    """What stands behind the last closed </think>; a thought that never ends is all there is."""
    encoder = HashEncoder()
    embed(encoder, ["<think> a </think> b", "a </think></think>c", "<think> a", "d </think>"])
    assert encoder.seen == [" b", "c", "<think> a", ""]


# ------------------------------------------------------------------------- what stops the step
class BrokenEncoder(HashEncoder):
    """The embedding of the last text that was not known yet has a NaN."""

    def encode(self, texts):
        phi = super().encode(texts)
        phi[-1, 3] = float("nan")
        return phi


def broken_reward(prompts, responses, rows):
    return [0.5] * 5 + [float("nan")] + [0.5] * 6


def broken_bonus(quality, phi, logp, alpha):
    return torch.zeros_like(quality).index_fill_(1, torch.tensor(2), float("inf"))


def broken_when_trained(layer, inputs, logits):
    return logits * float("nan") if torch.is_grad_enabled() else logits


@pytest.mark.parametrize("what", ["quality", "embedding", "bonus", "log-probability", "gradient"])
def test_a_number_that_is_not_finite_stops_the_step_before_the_weights_move(
        model, tokenizer, what, monkeypatch):
    """The error names the prompt and the response; a gradient is given two more chances."""
    encoder = BrokenEncoder() if what == "embedding" else HashEncoder()
    score = broken_reward if what == "quality" else reward
    before = [p.detach().clone() for p in model.parameters()]
    message = f"the {what} is (nan|inf) for the prompt .* and the response "
    memory = {}

    def one_step():
        torch.manual_seed(4)
        return dqo_step(model, tokenizer, encoder, score, sgd(model), ROWS, config(),
                        memory=memory)
    if what == "bonus":
        vars(broken_bonus).update(vars(OBJECTIVES["dqo"]))
        monkeypatch.setitem(OBJECTIVES, "dqo", broken_bonus)
    if what == "log-probability":
        model.lm_head.register_forward_hook(broken_when_trained)
    if what == "gradient":
        model.lm_head.weight.register_hook(lambda g: g * float("inf"))
        for _ in range(2):
            assert one_step()["skipped"] == 1
    with pytest.raises(BadInput, match=message) as error:
        one_step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))

    texts = rollout_of_step(model, tokenizer).texts
    last_new_text = list(dict.fromkeys(texts))[-1]
    guilty = dict(quality=5, bonus=2, embedding=texts.index(last_new_text))
    if what in guilty:
        response = guilty[what]
        assert repr(texts[response][:80]) in str(error.value)
        assert repr(PROMPTS[response // K]) in str(error.value)


class Gradients:
    """A hook on a weight: its gradient, times the next of some factors."""

    def __init__(self, *factors):
        self.factors = list(factors)

    def __call__(self, gradient):
        return gradient * self.factors.pop(0)


def test_a_gradient_that_is_not_finite_skips_its_step(model, tokenizer):
    """Neither weights nor optimizer move; only the third in a row counts, over all epochs."""
    inf, nan = float("inf"), float("nan")
    optimizer, memory = torch.optim.AdamW(model.parameters(), lr=1e-3), {}
    hook = Gradients(inf, inf, 1, nan, 1, inf, inf, 1, inf, inf, inf)
    model.lm_head.weight.register_hook(hook)

    def one_step(epochs):
        """(metrics, whether any weight moved, optimizer steps in all)."""
        before = [p.detach().clone() for p in model.parameters()]
        metrics = dqo_step(model, tokenizer, HashEncoder(), reward, optimizer, ROWS,
                           config(epochs=epochs), memory=memory)
        moved = differ(before, [p.detach() for p in model.parameters()], atol=0)
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(p.grad is None for p in model.parameters())
        state = optimizer.state.get(model.lm_head.weight, {"step": torch.tensor(0)})
        return metrics, moved, int(state["step"])
    torch.manual_seed(4)
    metrics, moved, steps = one_step(epochs=2)
    assert (metrics["skipped"], moved, steps) == (2, False, 0)
    assert metrics["grad_norm"] == inf
    metrics, moved, steps = one_step(epochs=1)  # after two in a row
    assert (metrics["skipped"], moved, steps) == (0, True, 1)
    metrics, moved, steps = one_step(epochs=2)  # the first of two epochs
    assert (metrics["skipped"], moved, steps) == (1, True, 2)
    metrics, moved, steps = one_step(epochs=3)  # two in a row, after three before
    assert (metrics["skipped"], moved, steps) == (2, True, 3)
    with pytest.raises(BadInput, match="the gradient is inf for the prompt"):
        one_step(epochs=3)
    assert hook.factors == []


def test_an_unbounded_reward_is_centred_once_for_the_kernel_and_never_in_the_reward(
        model, tokenizer):
    """The sigmoid's centre is the first rollout's mean quality, and stays in the second."""
    def score(prompts, responses, rows):
        return [7.0 + len(response.split()) for response in responses]
    options, optimizer = config(kernel="quality"), sgd(model, lr=0.0)
    with pytest.raises(BadInput, match=r"in \[0, 1\]"):  # a range was not declared
        dqo_step(model, tokenizer, HashEncoder(), score, optimizer, ROWS, options)

    score.range = (-float("inf"), float("inf"))
    memory, center = {}, None
    for seed in (4, 5):
        torch.manual_seed(seed)
        metrics = dqo_step(model, tokenizer, HashEncoder(), score, optimizer, ROWS, options,
                           memory=memory)
        if center is None:
            center = metrics["quality"]
        assert memory["center"] == center
        quality = column(metrics, "quality")
        texts = [s["response"] for s in metrics["samples"]]
        phi = embed(HashEncoder(), texts).view(P, K, -1)
        gain = marginal_gains(quality_weighted(phi, torch.sigmoid(quality - center)))
        expected = advantages(quality, gain, "mean")
        got = column(metrics, "advantage")
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert metrics["quality"] != center


@pytest.mark.parametrize("option", [
    dict(objective="DQO"),
    dict(kernel="qualty"),
    dict(baseline="Mean"),
])
def test_an_unknown_name_is_refused(option):
    """A misspelt choice is answered with the list of choices."""
    with pytest.raises(BadInput, match="choose from"):
        RunConfig(**option).check()


# --------------------------------------------------------------------------------- the memory
def test_the_loss_needs_a_third_of_the_memory_of_a_plain_log_softmax():
    """At a vocabulary of 150k, forward and backward, with the same gradient."""
    torch.manual_seed(0)
    vocab, B, N, T = 150_000, 4, 1, 64
    tokens = torch.randint(vocab, (B, N + T))
    mask = torch.ones(B, T, dtype=torch.bool)
    rollout = Rollout(
        tokens=tokens,
        attention_mask=torch.ones_like(tokens),
        prompt_length=N,
        mask=mask,
        logp=torch.zeros(B, T),
        texts=[""] * B,
        truncated=mask[:, 0])
    model, weight = bench.OnlyLogits(vocab), torch.randn(B)
    peak, grads = {}, {}
    for way in ("dqo", "plain"):
        model.zero_grad(set_to_none=False)
        # Once before it is measured, so that the gradients of the weights are there already.
        bench.loss_step(way, model, rollout, weight)
        grads[way] = [p.grad.clone() for p in model.parameters()]
        peak[way] = bench.allocated(bench.loss_step, way, model, rollout, weight)
    one_copy_of_the_logits = vocab * B * T * 4 / 2 ** 20  # MB
    assert peak["plain"] > 3 * one_copy_of_the_logits, peak
    assert peak["dqo"] <= peak["plain"] / 3, peak
    assert_all_close(grads["dqo"], grads["plain"], rtol=1e-4, atol=1e-7)
