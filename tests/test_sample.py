"""Sampling and scoring: what is drawn, from which distribution; and scoring sees the same."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from conftest import random_gpt2, random_llama
from dqo import BadInput, draw, prompt_ids, sample, token_logps

# Of different lengths, so that the batch is padded.
PROMPTS = ["<s> w5 w6", "<s>", "<s> w9 w9 w3 w30 w7", "<s> w4"]
ALMOST_ONE = 1 - 2 ** -53  # the largest float64 below 1


def one_row(model, rollout, i, temperature):
    """log pi of row i's response tokens by an unpadded forward of that row alone."""
    tokens = rollout.tokens[i][rollout.attention_mask[i].bool()][None]
    n = int(rollout.mask[i].sum())
    logits = model(tokens).logits[0].double() / temperature
    logps = torch.log_softmax(logits, -1)
    return logps[:-1].gather(1, tokens[0, 1:, None])[-n:, 0]


def check_layout(rollout, ends, P, k, T):
    """Shapes, masks, end tokens and prompts of a Rollout are those that its docstring shows."""
    B, N = P * k, rollout.prompt_length
    assert rollout.tokens.shape == rollout.attention_mask.shape == (B, N + rollout.mask.shape[1])
    assert rollout.mask.shape == rollout.logp.shape
    assert rollout.mask.shape[1] <= T
    assert rollout.mask.dtype == rollout.truncated.dtype == torch.bool
    assert len(rollout.texts) == B
    for i in range(B):
        n = int(rollout.mask[i].sum())
        assert rollout.mask[i, :n].all() and not rollout.mask[i, n:].any()  # a prefix
        response = rollout.tokens[i, N:N + n].tolist()
        assert all(token not in ends for token in response[:-1])
        ended = response[-1] in ends
        assert ended == (not rollout.truncated[i])
        assert ended or n == T
        assert rollout.attention_mask[i, N:].equal(rollout.mask[i].long())
        first_of_group = i - i % k
        assert rollout.tokens[i, :N].equal(rollout.tokens[first_of_group, :N])


@pytest.fixture
def kept_rows(monkeypatch):
    """The number of rows that stayed in the batch, each time that some had left it."""
    kept, select = [], DynamicCache.batch_select_indices

    def counted(cache, indices):
        kept.append(len(indices))
        return select(cache, indices)
    monkeypatch.setattr(DynamicCache, "batch_select_indices", counted)
    return kept


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("make, ends, pad", [
    pytest.param(random_llama, [2], 0, id="one"),
    pytest.param(random_llama, [2], 2, id="pad=eos"),
    pytest.param(random_llama, [2, 7, 11], 0, id="several"),
    pytest.param(random_gpt2, [2], 0, id="absolute positions"),
])
def test_scores_equal_what_was_sampled(tokenizer, temperature, make, ends, pad, kept_rows):
    """Sampling, scoring and one row alone give the same log-probabilities, padded or not."""
    model = make(40, spread=0.3)
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    torch.manual_seed(0)
    P, k, T = len(PROMPTS), 24, 40
    rollout = sample(model, tokenizer, PROMPTS, k, T, temperature)
    check_layout(rollout, ends, P, k, T)
    assert kept_rows and min(kept_rows) < 0.7 * P * k, "rows should have left the batch"
    with torch.no_grad():
        scored = token_logps(model, rollout, temperature)
        torch.testing.assert_close(scored, rollout.logp, rtol=0, atol=1e-5)
        for i in range(0, P * k, 5):
            alone = one_row(model, rollout, i, temperature)
            padded = scored[i, :len(alone)].double()
            torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)
    assert (scored[~rollout.mask] == 0).all()


def test_generation_defaults_do_not_leak(model, tokenizer):
    """What a model's authors recommend for chatting must not change the trained policy."""
    torch.manual_seed(0)
    plain = sample(model, tokenizer, PROMPTS, 4, 12)
    recommended = dict(
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=2.0,
        max_new_tokens=2,
        do_sample=False)
    for name, value in recommended.items():
        setattr(model.generation_config, name, value)
    torch.manual_seed(0)
    again = sample(model, tokenizer, PROMPTS, 4, 12)
    assert plain.tokens.equal(again.tokens)


def test_leaving_rows_do_not_change_the_others(model, tokenizer):
    """A row's draws depend on the seed and its place, not on when rows of other prompts end."""
    runs = []
    for second in ("<s> w5", "<s> w6 w7"):
        torch.manual_seed(3)
        runs.append(sample(model, tokenizer, ["<s> w8", second], 30, 20))
    first_group = [run.tokens[:30, run.prompt_length:] for run in runs]
    width = max(tokens.shape[1] for tokens in first_group)
    a, b = [F.pad(tokens, (0, width - tokens.shape[1])) for tokens in first_group]
    assert a.equal(b)
    assert runs[0].texts[30:] != runs[1].texts[30:]


def check_frequencies(drawn, p):
    """Chi-square of drawn tokens against their probabilities, at five standard deviations.

    Tokens expected fewer than 5 times count together, as one more category.
    """
    expected = p * len(drawn)
    seen = drawn.bincount(minlength=len(p)).double()
    often = expected >= 5

    def merged(x):
        return torch.cat([x[often], x[~often].sum()[None].clamp(min=1e-9)])
    expected, seen = merged(expected), merged(seen)
    counted = expected > 1
    chi2 = ((seen - expected) ** 2 / expected)[counted].sum().item()
    dof = int(counted.sum()) - 1
    assert dof > 3
    assert chi2 < dof + 5 * math.sqrt(2 * dof), (chi2, dof)


def test_empirical_frequencies_are_the_models(tokenizer):
    """First tokens, and second ones after the most frequent first, come as often as they should."""
    model = random_llama(40, spread=0.5)
    temperature, n = 0.8, 40000
    torch.manual_seed(1)
    rollout = sample(model, tokenizer, ["<s> w5 w6"], n, 2, temperature)
    N = rollout.prompt_length
    first = rollout.tokens[:, N]
    top = first.bincount().argmax()
    after_top = (first == top) & rollout.mask[:, 1]
    second = rollout.tokens[after_top, N + 1] if top != 2 else first
    ids = prompt_ids(tokenizer, "<s> w5 w6")
    for drawn, context in ((first, ids), (second, ids + [int(top)])):
        logits = model(torch.tensor([context])).logits[0, -1].double()
        check_frequencies(drawn, torch.softmax(logits / temperature, -1).detach())


def test_responses_of_a_group_are_independent(tokenizer):
    """The table of the first tokens of neighbouring rows of a group factorises (chi-square)."""
    model = random_llama(40, spread=0.5)
    torch.manual_seed(2)
    rollout = sample(model, tokenizer, ["<s> w5 w6"], 40000, 1)
    a, b = rollout.tokens[0::2, -1], rollout.tokens[1::2, -1]
    common = a.bincount(minlength=40).topk(5).indices

    def category(tokens):
        """1 to 5 for the five most common tokens, 0 for all others."""
        return sum((i + 1) * (tokens == token) for i, token in enumerate(common))
    counts = (category(a) * 6 + category(b)).bincount(minlength=36).view(6, 6).double()
    expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert expected.min() > 5
    assert chi2 < 25 + 5 * math.sqrt(50), chi2


def draw_one(log_probs, u):
    """The token that a row of log-probabilities, (1, V), gives at one u."""
    return draw(log_probs, torch.tensor([u], dtype=torch.float64)).item()


@pytest.mark.parametrize("u, token", [
    (0.0, 1),
    (0.2499, 1),
    (0.2501, 3),
    (ALMOST_ONE, 3),
])
def test_draw_at_the_edges(u, token):
    """Tokens of probability 0, at both ends too, are never drawn."""
    log_probs = torch.log(torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]))
    assert draw_one(log_probs, u) == token


def peaked_logits(V, peak, elsewhere=0.0):
    """Logits of V tokens, (1, V): one for token 77, another for all the rest."""
    logits = torch.full((1, V), elsewhere)
    logits[0, 77] = peak
    return logits


def test_draw_from_a_large_vocabulary():
    """Of 150k tokens, rare ones come as often as they should and impossible ones never."""
    V, n = 150_000, 400
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # an even grid on [0, 1)

    # All equal: the draws are even to the very end of the row.
    flat = torch.full((1, V), -math.log(V)).expand(n, V)
    even = ((torch.arange(n) + 0.5) * V / n).long()
    torch.testing.assert_close(draw(flat, u)[:, 0], even, rtol=0, atol=1)
    assert draw_one(flat[:1], ALMOST_ONE) == V - 1

    # All but one hopeless, the last 1000 impossible.
    logits = peaked_logits(V, 10.0, elsewhere=-25.0)
    logits[0, -1000:] = -math.inf
    log_probs = torch.log_softmax(logits, -1)
    p = log_probs[0].double().exp()
    assert 0 < p.sum().item() - p[77].item() < 1e-9
    assert draw_one(log_probs, 0.5) == 77
    assert draw_one(log_probs, ALMOST_ONE) < V - 1000

    # Rare tokens after a peak, each too small to change a float32 sum near 1, but 0.03 %
    # together: every one gets its share.
    rare = torch.log_softmax(peaked_logits(V, 20.0), -1)
    p = rare[0].double().exp()
    for target in range(1000, V, 4999):
        middle_of_its_share = (p[:target].sum() + p[target] / 2).item() / p.sum().item()
        assert abs(draw_one(rare, middle_of_its_share) - target) <= 1

    # The peak holds 98.3 %; the others get the rest, to the far end.
    peaked = torch.log_softmax(peaked_logits(V, 16.0), -1)
    p = peaked[0].double().exp()
    drawn = draw(peaked.expand(n, V), u)[:, 0]
    share_of_others = (drawn != 77).double().mean().item()
    assert abs(share_of_others - (p.sum() - p[77]).item()) < 1 / n
    assert drawn.max() > V * 0.9


def test_text_is_the_response_only(model, tokenizer):
    """The texts hold every token of the response but the end token, and nothing of the prompt."""
    torch.manual_seed(0)
    rollout = sample(model, tokenizer, PROMPTS, 4, 12)
    for i, text in enumerate(rollout.texts):
        words = text.split()
        assert not {"<pad>", "<s>", "</s>"} & set(words)
        tokens = rollout.tokens[i, rollout.prompt_length:][rollout.mask[i]].tolist()
        assert words == [f"w{token}" for token in tokens if token > 2]


CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %} {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} w39{% endif %}")


def test_prompts(model, tokenizer):
    """Texts, chats and ids become prompts with one start token; what cannot work is refused."""
    assert prompt_ids(tokenizer, "w5 w6") == [5, 6]
    tokenizer.chat_template = CHAT_TEMPLATE
    assert prompt_ids(tokenizer, "w5 w6") == [1, 5, 6, 39]  # one start token, not two
    assert prompt_ids(tokenizer, "w5 w6", plain=True) == [5, 6]
    chat = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w7"}]
    assert prompt_ids(tokenizer, chat) == [1, 5, 7, 39]
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
            part = whole.select(index)
            T = part.mask.shape[1]
            assert part.tokens.shape[1] <= whole.tokens.shape[1]
            assert len(part.texts) == 3
            assert part.mask.sum() == whole.mask[index].sum()
            same = scored[index][:, :T]
            torch.testing.assert_close(token_logps(model, part), same, rtol=0, atol=1e-5)
    assert whole.select(slice(3, 6)).prompt_length == 1  # the second prompt is one token long
