"""Sampling and scoring: what is drawn, from which distribution; and scoring sees the same."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from transformers.cache_utils import DynamicCache

import dqo
from conftest import random_gpt2, random_llama
from data import models
from dqo import (
    BadInput,
    Config,
    PickedLogProbs,
    draw,
    dqo_step,
    prompt_ids,
    run_prompts,
    sample,
    token_logps,
)

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


def test_gradient_checkpointing_does_not_touch_sampling(model, tokenizer):
    """In train mode it would drop the cache; the model is left in eval mode."""
    torch.manual_seed(0)
    plain = sample(model, tokenizer, PROMPTS, 4, 12)
    models.checkpoint_activations(model)
    model.train()
    torch.manual_seed(0)
    again = sample(model, tokenizer, PROMPTS, 4, 12)
    assert plain.tokens.equal(again.tokens)
    assert not any(module.training for module in model.modules())


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


def test_an_end_token_is_not_part_of_the_text(model, tokenizer):
    """Not even one that the tokenizer does not know as special, here w7 and w11."""
    model.generation_config.eos_token_id = [2, 7, 11]
    torch.manual_seed(0)
    rollout = sample(model, tokenizer, PROMPTS, 12, 12)
    ends = set()
    for i, text in enumerate(rollout.texts):
        tokens = rollout.tokens[i, rollout.prompt_length:][rollout.mask[i]].tolist()
        ends.add(tokens[-1])
        assert text.split() == [f"w{token}" for token in tokens if token not in (0, 1, 2, 7, 11)]
    assert ends & {7, 11}


def test_a_prompt_is_not_taken_for_another_that_is_padded(model, tokenizer):
    """[5, 6], padded with the id 2, has the ids of [2, 5, 6]; each is scored as it is alone."""
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(2)
    torch.manual_seed(0)
    rollout = sample(model, tokenizer, [[2, 5, 6], [5, 6]], 4, 12)
    assert (rollout.tokens[:, :3] == torch.tensor([2, 5, 6])).all()
    with torch.no_grad():
        scored = token_logps(model, rollout)
        for i in range(8):
            alone = one_row(model, rollout, i, 1.0)
            torch.testing.assert_close(
                scored[i, :len(alone)].double(), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(scored, rollout.logp, rtol=0, atol=1e-5)


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
    chat = [{"role": "user", "content": "w5"}, {"role": "user", "content": "w7"}]
    assert prompt_ids(tokenizer, chat) == [1, 5, 7, 39]
    assert sample(model, tokenizer, [[1, 5, 6]], 1, 1).tokens[0, :3].tolist() == [1, 5, 6]

    tokenizer.chat_template = None
    with pytest.raises(BadInput, match="prompt 2"):
        sample(model, tokenizer, ["w5", ""], 1, 1)
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(BadInput, match="end token"):
        sample(model, tokenizer, ["w5"], 1, 1)


THINKING = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if enable_thinking %}w38 {% endif %}{% if effort == 'low' %}w37{% endif %}")


def test_template_args_reach_the_chat_template(model, tokenizer, monkeypatch):
    """From prompt_ids and from the options of a step; text taken as it is knows no template."""
    tokenizer.chat_template = THINKING
    both = dict(enable_thinking=True, effort="low")
    assert prompt_ids(tokenizer, "w5") == [5]
    assert prompt_ids(tokenizer, "w5", template_args=dict(enable_thinking=True)) == [5, 38]
    assert prompt_ids(tokenizer, "w5", template_args=both) == [5, 38, 37]
    assert prompt_ids(tokenizer, "w5", plain=True, template_args=both) == [5]

    seen, draw_responses = [], dqo.sample

    def noted(model, tokenizer, prompts, *rest):
        seen.extend(prompts)
        return draw_responses(model, tokenizer, prompts, *rest)
    monkeypatch.setattr(dqo, "sample", noted)
    for args in (None, both):
        options = Config(objective="grpo", k=2, max_new_tokens=2, beta=0, template_args=args)
        dqo_step(model, tokenizer, None, lambda prompts, *_: [0.0] * len(prompts),
                 torch.optim.SGD(model.parameters()), [{"prompt": "w5"}], options)
    assert seen == [[5], [5, 38, 37]]


def test_log_probabilities_that_are_not_finite_are_refused(model, tokenizer):
    """The error names the prompt, wherever in the response it happens."""
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = math.nan  # w9 stands in the third prompt only
    with pytest.raises(BadInput, match="not finite for the prompt '.*w9 w9 w3 w30 w7'"):
        sample(model, tokenizer, PROMPTS, 2, 1)
    alone = PROMPTS[:2] + PROMPTS[3:]
    assert sample(model, tokenizer, alone, 2, 1).logp.isfinite().all()

    # Once a response has w9 in it, here the first one of "w4".
    torch.manual_seed(0)
    good = sample(random_llama(40), tokenizer, ["<s>", "<s> w4"], 3, 8)
    said = good.tokens[3, good.prompt_length]
    assert not (good.tokens == said).any(1)[:3].any()
    torch.manual_seed(0)
    broken = random_llama(40)
    with torch.no_grad():
        broken.get_input_embeddings().weight[said] = math.nan
    torch.manual_seed(0)
    with pytest.raises(BadInput, match="not finite for the prompt '<s> w4'"):
        sample(broken, tokenizer, ["<s>", "<s> w4"], 3, 8)


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


TURNS = (
    "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> w39 {% endif %}")


@pytest.mark.parametrize("contents, ids", [
    (["w5"], [1, 5, 2, 1, 39]),
    (["w5", "w7"], [1, 5, 2, 1, 7]),  # the answer goes on: neither closed nor followed by a turn
    (["w5", "w7 w8 "], [1, 5, 2, 1, 7, 8]),
    (["w5", "w7", "w5"], [1, 5, 2, 1, 7, 2, 1, 5, 2, 1, 39]),  # it was the user's turn
])
def test_an_answer_that_was_begun_is_continued(tokenizer, contents, ids):
    tokenizer.chat_template = TURNS
    roles = ["user", "assistant", "user"]
    chat = [{"role": role, "content": text} for role, text in zip(roles, contents)]
    assert prompt_ids(tokenizer, chat) == ids


@pytest.mark.parametrize("form, ids", [
    ("<s> $A", [1, 5, 6]),
    ("$A </s>", [5, 6]),  # as of T5
    ("<s> $A </s>", [1, 5, 6]),  # as of a Llama with add_eos_token
])
def test_a_prompt_is_not_ended_by_the_tokenizer(tokenizer, form, ids):
    special = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=form, special_tokens=special)
    assert prompt_ids(tokenizer, "w5 w6") == ids
    tokenizer.chat_template = TURNS
    assert prompt_ids(tokenizer, "w5 w6", plain=True) == ids
    assert prompt_ids(tokenizer, "w5 w6") == [1, 5, 6, 2, 1, 39]


def test_temperature_0_takes_the_likeliest_token(model, tokenizer):
    """Whatever the seed, and the same for all responses of a prompt."""
    T = 6
    rollout = sample(model, tokenizer, PROMPTS, 3, T, temperature=0)
    for i in range(0, len(PROMPTS) * 3, 3):
        ids = prompt_ids(tokenizer, PROMPTS[i // 3])
        for _ in range(T):
            ids = ids + [int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == 2:
                break
        for row in range(i, i + 3):
            tokens = rollout.tokens[row][rollout.attention_mask[row].bool()].tolist()
            assert tokens == ids
    assert rollout.logp.isfinite().all()


# -------------------------------------------------------------------- what autocast does to it
@pytest.fixture
def cudnn():
    """cuDNN's attention is on, as torch begins, and afterwards as before."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield torch.backends.cuda.cudnn_sdp_enabled
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("native", [True, False])
def test_autocast_of_cuda(cudnn, monkeypatch, native):
    """bf16 where the GPU can, float32 where it would be emulated, cuDNN's attention nowhere."""
    def supported(including_emulation=True):
        return native or including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert isinstance(dqo.autocast(torch.device("cpu")), contextlib.nullcontext)
    assert cudnn()
    context = dqo.autocast(torch.device("cuda"))
    assert not cudnn()
    if native:
        assert (context.device, context.fast_dtype) == ("cuda", torch.bfloat16)
    else:
        assert isinstance(context, contextlib.nullcontext)


@pytest.fixture
def bf16(monkeypatch):
    """autocast as on a GPU, but on the CPU. Gives a function that turns it on."""
    def turn_on():
        for module in (dqo, models):
            monkeypatch.setattr(module, "autocast",
                                lambda device: torch.autocast("cpu", torch.bfloat16))
    return turn_on


def test_keys_and_values_are_bf16_under_autocast(tokenizer, bf16, monkeypatch):
    """Those of the prompts and those of each token after; no log-probability is another."""
    caches = []

    def noted(*args):
        caches.append(run_prompts(*args))
        return caches[-1]

    def types():
        return {x.dtype for cache, _ in caches for y in cache.layers for x in (y.keys, y.values)}

    def run():
        caches.clear()
        torch.manual_seed(0)
        rollout = sample(model, tokenizer, PROMPTS, 6, 8)
        return rollout.tokens, rollout.logp, token_logps(model, rollout)
    monkeypatch.setattr(dqo, "run_prompts", noted)
    model = random_llama(40)
    exact = run()
    assert types() == {torch.float32}

    bf16()
    halved = run()
    assert len(caches) == 2
    assert types() == {torch.bfloat16}
    assert (halved[1] - exact[1]).abs().max() > 1e-4, "nothing was computed in bf16"
    monkeypatch.setattr(dqo, "keep_in", lambda dtype, cache: None)
    whole = run()
    assert torch.float32 in types()
    for a, b in zip(halved, whole):
        assert a.equal(b)


@pytest.mark.parametrize("tied", [False, True])
def test_a_halved_reference_scores_bit_for_bit(tokenizer, bf16, tied):
    """Half the memory under bf16 autocast, and the very same log-probabilities; else untouched."""
    def reference():
        """Wide enough for its embedding to be small beside its layers."""
        model = random_llama(40, hidden=64, layers=3, tie_word_embeddings=tied)
        for p in model.parameters():
            if p.dim() == 1:  # of the norms, which are no numbers of bf16 either
                torch.nn.init.normal_(p, 1.0, 0.1)
        return model

    def size(model):
        return sum(p.numel() * p.element_size() for p in model.parameters())
    model = reference().requires_grad_(False)
    assert models.halve(model) is model
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    bf16()
    rollout = sample(model, tokenizer, PROMPTS, 4, 8)
    expected = token_logps(model, rollout)
    trained = models.halve(reference())  # what is trained is left alone
    assert {p.dtype for p in trained.parameters()} == {torch.float32}

    before = size(model)
    assert models.halve(model) is model
    assert size(model) < 0.53 * before
    embedding = model.get_input_embeddings().weight
    assert embedding.dtype == torch.float32
    assert (model.lm_head.weight is embedding) == tied
    assert token_logps(model, rollout).equal(expected)


# ---------------------------------------------------------------- the gradient within the logits
def test_picked_log_probs_can_be_differentiated_once():
    """A second derivative is refused, rather than wrong; so are logits that are parameters."""
    parameters, token = torch.randn(3, 5, requires_grad=True), torch.tensor([4, 0, 2])
    kept = parameters.detach().clone()
    for logits in (parameters, parameters.view(3, 5), parameters[:, :4]):
        with pytest.raises(ValueError, match="overwritten"):
            PickedLogProbs.apply(logits, token.clamp(max=3), 1.0, 2)
    assert parameters.equal(kept)

    logp = PickedLogProbs.apply(parameters * 1, token, 0.5, 2)
    expected = (kept / 0.5).log_softmax(-1)[torch.arange(3), token]
    torch.testing.assert_close(logp, expected)
    gradient, = torch.autograd.grad((logp * logp).sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    assert parameters.equal(kept)

    constant = kept.clone()  # without a gradient there is nothing to overwrite
    torch.testing.assert_close(PickedLogProbs.apply(constant, token, 0.5, 2), expected)
    assert constant.equal(kept)
