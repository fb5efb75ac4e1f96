"""Every metric against values by hand, enumeration, or a slow independent implementation."""

import json
import math
import random
import sys
from collections import Counter
from functools import reduce
from itertools import combinations, product
from operator import or_
from unicodedata import normalize as form

import pytest
import torch
import torch.nn.functional as F

import dqo
import eval as evaluation
from data import metrics

EYE, about = torch.eye(4), pytest.approx


@pytest.mark.parametrize("scores", [
    [False] * 6, [False, True, False, True, True, False], [0.3, 0.9, 0.1, 0.9, 0.0, 0.5], [-3, -1],
])
def test_pass_at_n_and_best_of_n_are_means_over_all_subsets(scores):
    for n in range(1, len(scores) + 1):
        best = [max(subset) for subset in combinations(scores, n)]
        assert metrics.best_at(scores, n) == about(sum(best) / len(best))


# ------------------------------- tokens and overlaps
@pytest.mark.parametrize("text, expected", [
    ("The dog's 2 cats, ran!", "the dog ' s 2 cats , ran !"),
    ("हिन्दी भाषा अच्छी है", "हिन्दी भाषा अच्छी है"),  # a vowel sign does not end a word
    ("اللُّغَةُ العَرَبِيَّةُ", form("NFC", "اللُّغَةُ العَرَبِيَّةُ")),
    (form("NFD", "Tiếng Việt"), form("NFC", "tiếng việt")),
    ("GPT-4は東京。", "gpt - 4 は 東 京 。"),  # no spaces: by character
    ("カタｶﾅ𠮷 ไทย ລາ ខម ok", "カ タ ｶ ﾅ 𠮷 ไ ท ย ລ າ ខ ម ok"),
])
def test_a_token_is_a_word_or_a_character(text, expected):
    assert metrics.words(text) == expected.split()


def test_distinct_n():
    assert metrics.distinct_n(["a b a", "a b c"], 2) == about(3 / 4)  # ab ba | ab bc
    texts = ["a b a", "a b c", "a b a", "", ""]
    assert metrics.distinct_n(texts, 4) == about(3 / 5)  # a shorter text is one n-gram


def bleu_4(mine, *others):
    """A count is clipped by the most that one reference has."""
    result = 1.0
    for n in (1, 2, 3, 4):
        one, *rest = (Counter(tuple(x[i:i + n]) for i in range(max(1, len(x) - n + 1)))
                      for x in (mine, *others))
        match = (one & reduce(or_, rest)).total()
        result *= ((match + (n > 1)) / (one.total() + (n > 1))) ** 0.25
    length, *lengths = (max(1, len(x)) for x in (mine, *others))
    closest = min(sorted(lengths), key=lambda x: abs(x - length))
    return result * min(1.0, math.exp(1 - closest / length))


def lcs(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in product(range(len(a)), range(len(b))):
        longest = max(table[i][j + 1], table[i + 1][j])
        table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else longest
    return table[-1][-1]


def test_self_bleu_and_self_rouge_against_slow_ones():
    rng = random.Random(0)
    groups = [["", ""], ["x", "x", "x"], ["a b c", "d e f"], ["a b c d", "a b c e f"],
              ["a b c", "", "a b c d e"]]
    for k, longest, letters in [(2, 5, "abc"), (4, 12, "ab"), (6, 9, "abcde"), (5, 90, "abcd")] * 6:
        groups.append([" ".join(rng.choices(letters, k=rng.randrange(longest))) for _ in range(k)])
    for texts in groups:
        words = [text.split() for text in texts]
        bleu = [bleu_4(x, *words[:i], *words[i + 1:]) for i, x in enumerate(words)]
        assert metrics.self_bleu(texts) == about(sum(bleu) / len(bleu))
        rouge = [2 * lcs(a, b) / len(a + b) if a + b else 1 for a, b in combinations(words, 2)]
        assert metrics.self_rouge(texts) == about(sum(rouge) / len(rouge))


def test_self_bleu_of_many_texts_takes_time_in_proportion():
    """Each word is looked at a few times, not once per other text: lines of code are counted."""
    texts = [" ".join(f"{i * j * j % 997}" for j in range(50)) for i in range(1, 257)]
    lines, before = 0, sys.gettrace()

    def count(*_):
        nonlocal lines
        lines += 1
        return count
    sys.settrace(count)
    try:
        metrics.self_bleu(texts)
    finally:
        sys.settrace(before)
    assert lines < 100 * 256 * 50


# --------------------------------- of the embeddings
TWO = EYE[[0, 0, 1, 1]] @ EYE[[0, 0, 1, 1]].T  # two clusters
CHAIN = torch.tensor([[1, .91, .89, 0], [.91, 1, .91, 0], [.89, .91, 1, 0], [0, 0, 0, 1]])


def test_vendi():
    c = 0.6  # the eigenvalues of [[1, c], [c, 1]] / 2 are (1 +- c) / 2
    entropy = -sum(x * math.log(x) for x in ((1 - c) / 2, (1 + c) / 2))
    assert metrics.vendi(torch.tensor([[1, c], [c, 1]])) == about(math.exp(entropy))
    assert metrics.vendi(TWO) == about(2)


def test_effective_diversity():
    """Of the six pairs two are alike."""
    for correct, pairs in [("1111", 4), ("1110", 1), ("1100", 0), ("0101", 1), ("1000", 0)]:
        found = metrics.effective_diversity([x == "1" for x in correct], CHAIN)
        assert found == about(pairs / 6)


def test_utility():
    """Only the first of each kind adds; what is like a later one counts. So many are classes."""
    assert [metrics.classes(L) for L in (EYE, TWO, CHAIN)] == [[0, 1, 2, 3], [0, 2], [0, 2, 3]]
    for scores, L, expected in [([1.0, 0.5, 0.0, 1.0], EYE, 1 + .8 * .5 + .512),
                                ([1.0, 0.5, 1.0, 1.0], TWO, 1 + .64),
                                ([0.5, 1.0, 1.0, 1.0], CHAIN, .5 + .64 + .512)]:
        new = metrics.classes(L)
        assert metrics.utility(scores, new) == about(expected * (1 - .8) / (1 - .8 ** 4))


def test_every_number_stands_under_its_name():
    texts, scores = ["a b c d e", "A b c d e.", "e d c b x a", "a b c d"], [3, 1, 2, 0]
    phi = F.normalize(torch.arange(12.0).view(4, 3) + 5 * torch.eye(4, 3), dim=-1)
    L, m = phi @ phi.T, metrics.group_metrics(texts, scores, phi, 1.0)
    assert m.pop("pass_at") == {"1": 0.75, "2": 1.0, "4": 1.0}
    expected = dict(
        quality=1.5, distinct_correct=2,  # the first two are one answer
        effective_diversity=metrics.effective_diversity([True, True, True, False], L),
        utility=metrics.utility(scores, metrics.classes(L)),
        distinct_4=metrics.distinct_n(texts, 4),
        self_bleu_diversity=1 - metrics.self_bleu(texts),
        self_rouge_diversity=1 - metrics.self_rouge(texts),
        cosine_distance=1 - sum(L[i, j].item() for i, j in combinations(range(4), 2)) / 6,
        classes=len(metrics.classes(L)), vendi=metrics.vendi(L),
        log_det=torch.logdet(L + EYE).item())
    assert m == about(expected, rel=1e-5)
    graded = metrics.group_metrics(texts, scores, phi, None)
    json.dumps(metrics.group_metrics(["a"], [0.5], EYE[:1], None), allow_nan=False)
    assert graded.pop("max_at") == about({"1": 1.5, "2": 14 / 6, "4": 3})
    assert set(m) - set(graded) == {"distinct_correct", "effective_diversity"}
    unjudged = metrics.group_metrics(texts, None, phi, None)
    assert set(graded) - set(unjudged) == {"quality", "utility"}
    assert unjudged == about({key: graded[key] for key in unjudged})


def test_empty_answers_are_duplicates():
    """Zero vectors: alike each other, unlike the rest, without volume."""
    phi = torch.cat([torch.zeros(2, 4), EYE[:2]])
    found, same = (metrics.group_metrics(["", "", "rome", "oslo"], [3, 2, 1, 0], x, None)
                   | dict(max_at=0) for x in (phi, EYE[[3, 3, 0, 1]]))
    assert found == about(same | dict(log_det=2 * math.log(2)))


def test_correct_is_what_reaches_the_threshold():
    for scores, threshold, right in [
            ([.7 + .2 + .1, 1.0, 0.99, 0.0], 1.0, 2),  # the first is 0.9999999999999999
            ([-1e-3, -5e-4, -2e-3, -1.0], -1e-3, 2), ([0.0, -0.1, 0.5, 1.0], 0.0, 3)]:
        found = metrics.group_metrics(list("abcd"), scores, EYE, threshold)
        assert found["distinct_correct"] == right


# -------------------------------------- evaluate()
class WordCounts:
    def encode(self, texts):
        return [[1.0, *(text.split().count(f"w{i}") for i in range(3, 40))] for text in texts]


ROWS = [dict(prompt=f"w{i} w6", _task=task) for i, task in zip(range(7, 13), "aabbbc")]


@pytest.mark.parametrize("n, batch", [(3, 256), (3, 7), (8, 4), (7, 4), (1, 9)])
def test_n_responses_each_and_never_more_than_batch_at_once(model, tokenizer, n, batch):
    """At temperature 0 each is what the model says to that prompt alone."""
    sizes, kept = [], []
    model.register_forward_pre_hook(
        lambda _, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True)

    def reward(prompts, responses, rows):
        assert prompts == [row["prompt"] for row in rows] == prompts[:1] * n
        return [float(prompts[0] == "w9 w6")] * n
    options = evaluation.Options(n=n, batch=batch, temperature=0.0, max_new_tokens=6, threshold=0.0)
    results = evaluation.evaluate("m", (model, tokenizer), WordCounts(), reward, ROWS, options,
                                  kept.extend)
    assert max(sizes) <= batch and json.dumps(results, allow_nan=False)  # n = 1: no NaN
    ids = [dqo.prompt_ids(tokenizer, row["prompt"]) for row in ROWS]
    alone = [dqo.sample(model, tokenizer, [x], 1, 6, 0) for x in ids]
    assert [(x["prompt"], x["response"]) for x in kept] == [
        (row["prompt"], x.texts[0]) for row, x in zip(ROWS, alone) for _ in range(n)]
    assert len({x.mask.sum() for x in alone}) > 1, "they should differ in length"
    for r, task, part, right in zip(results, "ab", (alone[:2], alone[2:5]), (0, 1)):
        assert (r["task"], r["prompts"], r["quality"]) == (task, len(part), right / len(part))
        assert r["mean_tokens"] == about(sum(x.mask.sum().item() for x in part) / len(part))
        assert r["truncated"] == about(sum(x.truncated.item() for x in part) / len(part))
        assert r["pass_at"]["1"] == 1  # 0 reaches the threshold of 0
    assert results[1]["se"]["quality"] == about(1 / 3)  # the deviation of 1, 0, 0 over 3 ** .5


def test_the_average_over_tasks_and_its_error():
    results = [dict(model="m", task=task, prompts=2, n=2, threshold=1.0, quality=quality,
                    se=dict(quality=se)) for task, quality, se in [("a", .2, .3), ("b", .4, .4)]]
    assert evaluation.table(results).split()[-4:] == ["quality", "0.300", "±", "0.250"]
