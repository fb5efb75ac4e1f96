"""Sampling and scoring: what was drawn, from which distribution, and that scoring sees the same."""

import math

import pytest
import torch
from transformers.cache_utils import DynamicCache

from conftest import random_gpt2, random_llama
from dqo import BadInput, draw, prompt_ids, sample, token_logps

PROMPTS = ["<s> w5 w6", "<s>", "<s> w9 w9 w3 w30 w7", "<s> w4"]  # different lengths, so the batch is padded


def one_row(model, rollout, i, temperature):
    """log pi of row i's response tokens by an unpadded forward of that row alone."""
    tokens = rollout.tokens[i][rollout.attention_mask[i].bool()][None]
    n = int(rollout.mask[i].sum())
    logits = model(tokens).logits[0].double() / temperature
    logps = torch.log_softmax(logits, -1)
    return logps[:-1].gather(1, tokens[0, 1:, None])[-n:, 0]


def check_layout(rollout, ends, P, k, T):
    B, L = P * k, rollout.prompt_length
    assert rollout.tokens.shape == rollout.attention_mask.shape == (B, L + rollout.mask.shape[1])
    assert rollout.mask.shape == rollout.logp.shape and rollout.mask.shape[1] <= T
    assert rollout.mask.dtype == rollout.truncated.dtype == torch.bool and len(rollout.texts) == B
    for i in range(B):
        n = int(rollout.mask[i].sum())
        assert rollout.mask[i, :n].all() and not rollout.mask[i, n:].any()  # a prefix
        response = rollout.tokens[i, L:L + n].tolist()
        assert all(t not in ends for t in response[:-1])
        assert (response[-1] in ends) == (not rollout.truncated[i])
        assert n == T or not rollout.truncated[i]
        assert rollout.attention_mask[i, L:].equal(rollout.mask[i].long())
        assert rollout.tokens[i, :L].equal(rollout.tokens[i - i % k, :L])  # rows of a group share their prompt


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("make,ends,pad", [(random_llama, [2], 0), (random_llama, [2], 2), (random_llama, [2, 7, 11], 0), (random_gpt2, [2], 0)],
                         ids=["one", "pad=eos", "several", "absolute positions"])
def test_scores_equal_what_was_sampled(tokenizer, temperature, make, ends, pad, monkeypatch):
    model = make(40, spread=0.3)
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    copies = []
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda self, keep, f=DynamicCache.batch_select_indices: (copies.append(len(keep)), f(self, keep)))
    torch.manual_seed(0)
    k, T = 24, 40
    rollout = sample(model, tokenizer, PROMPTS, k, T, temperature)
    check_layout(rollout, ends, len(PROMPTS), k, T)
    assert copies and min(copies) < 0.7 * len(PROMPTS) * k, "rows should have left the batch"
    with torch.no_grad():
        scored = token_logps(model, rollout, temperature)
        torch.testing.assert_close(scored, rollout.logp, rtol=0, atol=1e-5)
        for i in range(0, len(PROMPTS) * k, 5):
            alone = one_row(model, rollout, i, temperature)
            torch.testing.assert_close(scored[i, :len(alone)].double(), alone, rtol=0, atol=1e-5)
    assert (scored[~rollout.mask] == 0).all()


def test_generation_defaults_do_not_leak(model, tokenizer):
    """What a model's authors recommend for chatting must not change the policy that is trained."""
    torch.manual_seed(0)
    plain = sample(model, tokenizer, PROMPTS, 4, 12)
    g = model.generation_config
    g.temperature, g.top_k, g.top_p, g.repetition_penalty, g.max_new_tokens, g.do_sample = 0.1, 1, 0.1, 2.0, 2, False
    torch.manual_seed(0)
    again = sample(model, tokenizer, PROMPTS, 4, 12)
    assert plain.tokens.equal(again.tokens)


def test_leaving_rows_do_not_change_the_others(model, tokenizer):
    """A row's draws are a function of the seed and its place alone: change when the *other* prompts' rows end."""
    runs = []
    for second in ("<s> w5", "<s> w6 w7"):
        torch.manual_seed(3)
        runs.append(sample(model, tokenizer, ["<s> w8", second], 30, 20))
    a, b = (r.tokens[:30, r.prompt_length:] for r in runs)
    width = max(a.shape[1], b.shape[1])
    a, b = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (a, b))
    assert a.equal(b) and runs[0].texts[30:] != runs[1].texts[30:]


def test_empirical_frequencies_are_the_models(tokenizer):
    """Chi-square of first tokens, and of second tokens given the most frequent first one."""
    model = random_llama(40, spread=0.5)
    temperature, n = 0.8, 40000
    torch.manual_seed(1)
    rollout = sample(model, tokenizer, ["<s> w5 w6"], n, 2, temperature)
    L = rollout.prompt_length
    first = rollout.tokens[:, L]
    top = first.bincount().argmax()
    second = rollout.tokens[(first == top) & rollout.mask[:, 1], L + 1] if top != 2 else first
    ids = prompt_ids(tokenizer, "<s> w5 w6")
    for drawn, context in ((first, ids), (second, ids + [int(top)])):
        p = torch.softmax(model(torch.tensor([context])).logits[0, -1].double() / temperature, -1).detach()
        expected, seen = p * len(drawn), drawn.bincount(minlength=40).double()
        big = expected >= 5
        expected, seen = (torch.cat([x[big], x[~big].sum()[None].clamp(min=1e-9)]) for x in (expected, seen))
        chi2 = ((seen - expected) ** 2 / expected)[expected > 1].sum().item()
        dof = int((expected > 1).sum()) - 1
        assert dof > 3 and chi2 < dof + 5 * math.sqrt(2 * dof), (chi2, dof)  # five standard deviations


def test_responses_of_a_group_are_independent(tokenizer):
    """Neighbouring rows of one group: the contingency table of their first tokens factorises (chi-square)."""
    model = random_llama(40, spread=0.5)
    torch.manual_seed(2)
    rollout = sample(model, tokenizer, ["<s> w5 w6"], 40000, 1)
    a, b = rollout.tokens[0::2, -1], rollout.tokens[1::2, -1]
    common = a.bincount(minlength=40).topk(5).indices
    cell = lambda x: sum((i + 1) * (x == c) for i, c in enumerate(common))          # 6 categories
    counts = (cell(a) * 6 + cell(b)).bincount(minlength=36).view(6, 6).double()
    expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert expected.min() > 5 and chi2 < 25 + 5 * math.sqrt(50), chi2


def test_draw_at_the_edges():
    log_probs = torch.log(torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]))
    for u, token in ((0.0, 1), (0.2499, 1), (0.2501, 3), (1 - 2 ** -53, 3)):
        assert draw(log_probs, torch.tensor([u], dtype=torch.float64)).item() == token


def test_draw_from_a_large_vocabulary():
    """150k tokens. Flat: draws must be even to the very end of the row. Peaked: the rare tokens come as often as they
    should, and tokens of probability 0 never."""
    V, n = 150_000, 400
    flat = torch.full((1, V), -math.log(V)).expand(n, V)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    torch.testing.assert_close(draw(flat, u)[:, 0], ((torch.arange(n) + 0.5) * V / n).long(), rtol=0, atol=1)
    last = torch.full((1,), 1 - 2 ** -53, dtype=torch.float64)
    assert draw(flat[:1], last).item() == V - 1
    logits = torch.full((1, V), -25.0)
    logits[0, 77], logits[0, -1000:] = 10.0, -math.inf
    log_probs = torch.log_softmax(logits, -1)
    assert 0 < log_probs.double().exp().sum().item() - log_probs[0, 77].double().exp().item() < 1e-9
    assert draw(log_probs, torch.tensor([0.5], dtype=torch.float64)).item() == 77
    assert draw(log_probs, last).item() < V - 1000
    # Rare tokens after a peak, each too small to change a float32 sum near 1, but 0.03 % together: every one gets its share.
    rare = torch.log_softmax(torch.where(torch.arange(V) == 77, 20.0, 0.0)[None], -1)
    p = rare[0].double().exp()
    for target in range(1000, V, 4999):
        at = torch.tensor([(p[:target].sum() + p[target] / 2).item() / p.sum().item()], dtype=torch.float64)
        assert abs(draw(rare, at).item() - target) <= 1
    peaked = torch.log_softmax(torch.where(torch.arange(V) == 77, 16.0, 0.0)[None], -1)  # the peak holds 98.3 %
    p = peaked[0].double().exp()
    drawn = draw(peaked.expand(n, V), u)[:, 0]
    assert abs((drawn != 77).double().mean().item() - (p.sum() - p[77]).item()) < 1 / n
    assert drawn.max() > V * 0.9  # the far end is reached


def test_text_is_the_response_only(model, tokenizer):
    torch.manual_seed(0)
    rollout = sample(model, tokenizer, PROMPTS, 4, 12)
    for i, text in enumerate(rollout.texts):
        words = text.split()
        assert not {"<pad>", "<s>", "</s>"} & set(words)
        tokens = rollout.tokens[i, rollout.prompt_length:][rollout.mask[i]].tolist()
        assert words == [f"w{t}" for t in tokens if t > 2]


def test_prompts(model, tokenizer):
    assert prompt_ids(tokenizer, "w5 w6") == [5, 6]
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w39{% endif %}"
    assert prompt_ids(tokenizer, "w5 w6") == [1, 5, 6, 39]  # one start token, not two
    assert prompt_ids(tokenizer, "w5 w6", plain=True) == [5, 6]
    assert prompt_ids(tokenizer, [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w7"}]) == [1, 5, 7, 39]
    assert sample(model, tokenizer, [[1, 5, 6]], 1, 1).tokens[0, :3].tolist() == [1, 5, 6]
    tokenizer.chat_template = None
    with pytest.raises(BadInput, match="prompt 2"):
        sample(model, tokenizer, ["w5", ""], 1, 1)
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(BadInput, match="end token"):
        sample(model, tokenizer, ["w5"], 1, 1)


def test_rows_of_a_rollout(model, tokenizer):
    """A micro-batch is cut to its own longest prompt and response and scores the same."""
    torch.manual_seed(0)
    whole = sample(model, tokenizer, PROMPTS, 3, 12)
    with torch.no_grad():
        scored = token_logps(model, whole)
        for index in (slice(3, 6), slice(9, 12), torch.tensor([0, 4, 11])):
            part = whole.rows(index)
            T = part.mask.shape[1]
            assert part.tokens.shape[1] <= whole.tokens.shape[1] and len(part.texts) == 3
            torch.testing.assert_close(token_logps(model, part), scored[index][:, :T], rtol=0, atol=1e-5)
            assert part.mask.sum() == whole.mask[index].sum()
    assert whole.rows(slice(3, 6)).prompt_length == 1  # the second prompt is one token long
