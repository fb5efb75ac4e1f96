"""Sampling and scoring: what is drawn, from which distribution, and what is read of it."""

import math

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from conftest import random_gpt2, random_llama
from dqo import BadInput, draw, prompt_ids, read, sample, token_logps

# Of different lengths, so that the batch is padded; the second is the start token alone.
PROMPTS = [[1, 5, 6], [1], [1, 9, 9, 3, 30, 7], [1, 4]]
ALMOST_ONE = 1 - 2 ** -53  # the largest float64 below 1


def alone(model, prompt, response, temperature=1.0):
    """log pi of a response's tokens by a forward of that row alone: no padding, no cache."""
    tokens = torch.tensor([prompt + response])
    logps = torch.log_softmax(model(tokens, use_cache=False).logits[0].double() / temperature, -1)
    return logps[:-1].gather(1, tokens[0, 1:, None])[len(prompt) - 1:, 0]


def spoken(rollout, p, i):
    """The token ids of a response, its end token too."""
    return rollout.response[p, i][rollout.mask[p, i]].tolist()


def check_layout(rollout, prompts, ends, k, longest):
    """A Rollout is what its docstring shows."""
    P, N, T = len(prompts), max(map(len, prompts)), rollout.mask.shape[-1]
    assert rollout.response.shape == rollout.mask.shape == rollout.logp.shape == (P, k, T)
    assert rollout.mask.dtype == rollout.truncated.dtype == torch.bool
    assert T <= longest and T == rollout.mask.sum(-1).max()
    assert len(rollout.texts) == len(rollout.whole) == P * k
    for p, prompt in enumerate(prompts):
        assert rollout.prompt[p, N - len(prompt):].tolist() == prompt
        assert rollout.prompt_mask[p].tolist() == [0] * (N - len(prompt)) + [1] * len(prompt)
        for i in range(k):
            response = spoken(rollout, p, i)
            assert rollout.mask[p, i, :len(response)].all()  # a prefix
            assert not set(response[:-1]) & ends
            assert (response[-1] in ends) == (not rollout.truncated[p, i])
            assert response[-1] in ends or len(response) == longest
            # the text: each token of the response but its end, and nothing of the prompt
            words = [f"w{t}" for t in response if t > 2 and t not in ends]
            assert rollout.texts[p * k + i].split() == words


@pytest.mark.parametrize("make, ends, pad, temperature", [
    pytest.param(random_llama, {2}, "<pad>", 1.3, id="one end token"),
    pytest.param(random_llama, {2}, "</s>", 0.7, id="pad is end"),
    pytest.param(random_llama, {2, 7, 11}, "<pad>", 0.7, id="several end tokens"),
    pytest.param(random_llama, {2}, "<beyond>", 0.7, id="pad without an embedding"),
    pytest.param(random_gpt2, {2}, "<pad>", 1.3, id="absolute positions"),
])
def test_scores_equal_what_was_sampled(tokenizer, make, ends, pad, temperature):
    """Sampling, scoring a padded batch and one row alone give the same log-probabilities."""
    model = make(40, spread=0.3)
    model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else 2
    tokenizer.add_special_tokens({"pad_token": pad})  # <beyond> is new, id 40 of 0 to 39
    torch.manual_seed(0)
    k, longest = 12, 40
    rollout = sample(model, tokenizer, PROMPTS, k, longest, temperature)
    check_layout(rollout, PROMPTS, ends, k, longest)
    last = {spoken(rollout, p, i)[-1] for p in range(4) for i in range(k)}
    assert ends <= last  # every end token has ended a response
    with torch.no_grad():
        scored = token_logps(model, rollout, temperature)
        torch.testing.assert_close(scored, rollout.logp, rtol=0, atol=1e-5)
        for p in range(4):
            for i in range(0, k, 3):
                expected = alone(model, PROMPTS[p], spoken(rollout, p, i), temperature)
                padded = scored[p, i, :len(expected)].double()
                torch.testing.assert_close(padded, expected, rtol=0, atol=1e-5)
    assert not scored[~rollout.mask].any()


def defaults(model):
    """What a model's authors recommend for chatting."""
    recommended = dict(temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=2.0,
                       max_new_tokens=2, do_sample=False)
    for name, value in recommended.items():
        setattr(model.generation_config, name, value)


def checkpointed(model):
    """In train mode that would drop the KV cache."""
    model.activation_checkpointing_enable()
    model.train()


@pytest.mark.parametrize("change", [defaults, checkpointed])
def test_what_does_not_change_the_draws(model, tokenizer, change):
    """Neither generation defaults nor gradient checkpointing touch the policy that is sampled."""
    torch.manual_seed(0)
    plain = sample(model, tokenizer, PROMPTS, 4, 12)
    change(model)
    torch.manual_seed(0)
    again = sample(model, tokenizer, PROMPTS, 4, 12)
    assert plain.response.equal(again.response)
    torch.testing.assert_close(plain.logp, again.logp, rtol=0, atol=1e-6)
    assert not any(module.training for module in model.modules())


def test_rows_that_end_do_not_change_the_draws_of_others(model, tokenizer):
    """A row's draws depend on the seed and its place, not on when rows of other prompts end."""
    runs = []
    for other in ([1, 5], [1, 6, 7]):
        torch.manual_seed(3)
        rollout = sample(model, tokenizer, [other, [1, 8]], 30, 20)
        runs.append([[spoken(rollout, p, i) for i in range(30)] for p in range(2)])
    assert sorted(map(len, runs[0][0])) != sorted(map(len, runs[1][0]))
    assert runs[0][1] == runs[1][1]


def test_temperature_0_takes_the_likeliest_token(model, tokenizer):
    rollout = sample(model, tokenizer, PROMPTS, 2, 6, temperature=0)
    for p, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (ids[-1] != 2 or ids == prompt):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert spoken(rollout, p, 0) == spoken(rollout, p, 1) == ids[len(prompt):]


def check_frequencies(drawn, p):
    """Chi-square of drawn tokens against their probabilities, at five standard deviations.

    Tokens expected fewer than 5 times count together, as one more category.
    """
    expected, seen = p * len(drawn), drawn.bincount(minlength=len(p)).double()
    often = expected >= 5
    expected, seen = [torch.cat([x[often], x[~often].sum()[None]]) for x in (expected, seen)]
    counted = expected > 1
    chi2 = ((seen - expected) ** 2 / expected)[counted].sum().item()
    dof = int(counted.sum()) - 1
    assert dof > 3
    assert chi2 < dof + 5 * math.sqrt(2 * dof), (chi2, dof)


def test_samples_follow_the_distribution_of_the_model(tokenizer):
    """First tokens, and second ones after the commonest first, come as often as they should, and
    the first tokens of neighbours in a group are independent."""
    model, prompt, temperature = random_llama(40, spread=0.5), [1, 5, 6], 0.8
    torch.manual_seed(1)
    rollout = sample(model, tokenizer, [prompt], 40_000, 2, temperature)
    first, second = rollout.response[0].T
    common = first.bincount().topk(6).indices
    top = next(token for token in common if token != 2)
    for drawn, context in ((first, prompt), (second[first == top], prompt + [int(top)])):
        logits = model(torch.tensor([context])).logits[0, -1].double()
        check_frequencies(drawn, torch.softmax(logits / temperature, -1).detach())

    category = (first[:, None] == common).long() @ torch.arange(1, 7)  # 0 for all others
    chance = category.bincount().double() / len(category)
    check_frequencies(category[0::2] * 7 + category[1::2], chance.outer(chance).flatten())


# ---------- a draw
def draw_one(log_probs, u):
    """The token that a row of log-probabilities, (1, V), gives at one u."""
    return draw(log_probs, torch.tensor([u], dtype=torch.float64)).item()


@pytest.mark.parametrize("u, token", [(0.0, 1), (0.2499, 1), (0.2501, 3), (ALMOST_ONE, 3)])
def test_draw_at_the_edges(u, token):
    """Tokens of probability 0, at both ends too, are never drawn."""
    assert draw_one(torch.log(torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])), u) == token


def test_draw_from_a_vocabulary_of_150k():
    """Rare tokens come as often as they should, impossible ones never."""
    V, n = 150_000, 400
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # an even grid on [0, 1)
    flat = torch.full((1, V), -math.log(V))
    assert (draw(flat.expand(n, V), u)[:, 0] - (u * V).long()).abs().max() <= 1
    assert draw_one(flat, ALMOST_ONE) == V - 1

    def peaked(height, elsewhere=0.0):
        logits = torch.full((1, V), elsewhere)
        logits[0, 77] = height
        return logits
    impossible = peaked(10.0, elsewhere=-25.0)
    impossible[0, -1000:] = -math.inf
    assert draw_one(torch.log_softmax(impossible, -1), ALMOST_ONE) < V - 1000

    # Each too small to change a float32 sum near 1, 0.03 % together: every one gets its share.
    rare = torch.log_softmax(peaked(20.0), -1)
    p = rare[0].double().exp()
    for target in range(1000, V, 4999):
        middle_of_its_share = ((p[:target].sum() + p[target] / 2) / p.sum()).item()
        assert abs(draw_one(rare, middle_of_its_share) - target) <= 1


# ---------- text
TURNS = (
    "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> w39 {% endif %}{% if effort == 'low' %} w37{% endif %}")
CHAT = [{"role": role, "content": text} for role, text in
        (("user", "w5"), ("assistant", "w7 w8 "), ("user", "w6"))]


@pytest.mark.parametrize("form, start", [
    ("$A", []),
    ("<s> $A", [1]),
    ("$A </s>", []),  # as of T5
    ("<s> $A </s>", [1]),  # as of a Llama with add_eos_token
])
def test_prompts(tokenizer, form, start):
    """One start token and no end, whatever the tokenizer adds to a text and a template writes."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=form, special_tokens=[("<s>", 1), ("</s>", 2)])
    assert prompt_ids(tokenizer, "w5 w6") == start + [5, 6]
    assert prompt_ids(tokenizer, "<s> w5 w6") == [1, 5, 6]

    tokenizer.chat_template = TURNS
    assert prompt_ids(tokenizer, "w5 w6") == [1, 5, 6, 2, 1, 39]
    assert prompt_ids(tokenizer, "w5", dict(effort="low")) == [1, 5, 2, 1, 39, 37]
    assert prompt_ids(tokenizer, CHAT) == [1, 5, 2, 1, 7, 8, 2, 1, 6, 2, 1, 39]
    # An answer that was begun goes on: neither closed nor followed by another turn.
    assert prompt_ids(tokenizer, CHAT[:2]) == [1, 5, 2, 1, 7, 8]
    # Rendered already: it has its start token, and is in no need of a template.
    assert prompt_ids(tokenizer, "<s> w5 </s> <s> w39") == [1, 5, 2, 1, 39]


def test_a_model_without_an_end_token_is_refused(model, tokenizer):
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    with pytest.raises(BadInput, match="end token"):
        sample(model, tokenizer, PROMPTS, 1, 1)


def llama2(*special):
    """A tokenizer in the manner of Llama-2's: spaces are part of tokens, the first one of a text
    is added when it is read and dropped when it is written, and unknown bytes have tokens."""
    words = ("<unk> <s> </s> <0x0A> <0xC3> <0xA9> ▁ ▁▁▁ ▁def ▁f ( x ): ▁return ▁x < think > / ▁hm "
             "▁yes ▁no yes").split()
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, special=True)
                                  for token in ("<s>", "</s>", *special)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def read_one(tokenizer, prompt, response):
    """(answer, whole) of tokens written with spaces between them."""
    prompt, response = map(tokenizer.convert_tokens_to_ids, (prompt.split(), response.split()))
    assert None not in prompt + response
    (answer,), (whole,) = read(tokenizer, [prompt], [response])
    return answer, whole


@pytest.mark.parametrize("prompt, response, text", [
    ("▁def ▁f ( x ): <0x0A>", "▁▁▁ ▁return ▁x", "    return x"),  # four spaces, or it is no Python
    ("<s> ▁f", "▁yes", " yes"),
    ("<s> ▁f", "yes", "yes"),
    ("<s> ▁f", "<0xC3> <0xA9> ▁x", "é x"),
    ("<s> ▁f <0x0A>", "<s> ▁yes </s> <0x0A>", " yes\n"),  # a special token is no text
    ("<s> ▁f", "", ""),
])
def test_texts_keep_their_first_space_and_no_special_token(prompt, response, text):
    """A response goes on where its prompt ends: it is no text's beginning."""
    assert read_one(llama2(), prompt, response) == (text, text)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("prompt, response, answer", [
    ("▁f", "▁yes ▁x", " yes x"),
    ("▁f", "<think> ▁hm </think> ▁yes", "yes"),
    ("▁f", "<think> ▁hm ▁yes", ""),  # unfinished
    ("▁f", "▁no <think> ▁hm", ""),
    ("▁f <think>", "▁hm </think> ▁yes", "yes"),  # opened by the template
    ("▁f <think> <0x0A>", "▁hm </think> <0x0A> ▁yes", "yes"),
    ("▁f <think> <0x0A>", "▁hm ▁yes", ""),
    ("▁f <think> <0x0A>", "", ""),
    ("▁f <think> ▁hm </think>", "▁yes", " yes"),  # opened and closed by the template
    ("▁f", "<think> ▁hm </think> ▁no <think> ▁x </think> ▁yes", "yes"),  # two thoughts
    ("▁f", "<think> ▁hm </think> ▁yes <think> ▁x", ""),  # reopened, never closed
    ("▁f <think>", "▁hm </think> ▁yes <think> ▁x", ""),
])
def test_a_thought_is_no_answer(prompt, response, answer, special):
    """Only what follows the last closed one is, be </think> one special token or several plain
    ones; the whole text, for people, has the thoughts in it."""
    tokenizer = llama2("<think>", "</think>") if special else llama2()
    whole = response.replace(" ", "").replace("▁", " ").replace("<0x0A>", "\n")
    if not special:
        prompt, response = [text.replace("</think>", "< / think >").replace("<think>", "< think >")
                            for text in (prompt, response)]
    assert read_one(tokenizer, prompt, response) == (answer, whole)
