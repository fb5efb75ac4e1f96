"""Every metric against values worked out by hand or by enumeration."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import eval as ev
from conftest import random_llama
from dqo import sample


@pytest.mark.parametrize("correct", [[], [0], [1, 3], [0, 1, 2, 4], [0, 1, 2, 3, 4, 5]])
def test_pass_at_n_is_the_share_of_subsets_with_a_right_answer(correct):
    flags = [i in correct for i in range(6)]
    for n in range(1, 7):
        subsets = list(itertools.combinations(flags, n))
        assert ev.pass_at_n(flags, n) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_max_at_n_is_the_mean_best_of_subsets():
    scores = [0.3, 0.9, 0.1, 0.9, 0.0, 0.5]
    for n in range(1, 7):
        subsets = list(itertools.combinations(scores, n))
        assert ev.max_at_n(scores, n) == pytest.approx(sum(map(max, subsets)) / len(subsets))
    flags = [True, False, False, True, False]
    for n in range(1, 6):  # on 0/1 scores it is pass@n
        assert ev.max_at_n([float(f) for f in flags], n) == pytest.approx(ev.pass_at_n(flags, n))


def test_words():
    assert ev.words("The dog's 2 cats, (really) run!") == ["the", "dog", "'", "s", "2", "cats", ",", "(", "really", ")", "run", "!"]
    assert ev.words("") == [] and ev.words("Ünïcode ok") == ["ünïcode", "ok"]


def test_distinct_n():
    texts = ["a b a", "a b c"]
    assert ev.distinct_n(texts, 1) == pytest.approx(3 / 6)
    assert ev.distinct_n(texts, 2) == pytest.approx(3 / 4)  # ab ba | ab bc
    assert ev.distinct_n(texts, 4) == pytest.approx(2 / 2)  # shorter than 4: each text is one n-gram
    assert ev.distinct_n(["x", "x", "", ""], 4) == pytest.approx(2 / 4)


def test_self_bleu():
    assert ev.self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert ev.self_bleu(["x", "x"]) == pytest.approx(1.0) and ev.self_bleu(["x", "y"]) == 0.0 and ev.self_bleu(["", ""]) == pytest.approx(1.0)
    assert ev.self_bleu(["a b c", "d e f"]) == 0.0  # no word in common
    # "a b c d" against "a b c e f": 3/4 words; (2+1)/(3+1) bigrams; (1+1)/(2+1); (0+1)/(1+1); brevity exp(1 - 5/4)
    one = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 5 / 4)
    # the other way: 3/5; (2+1)/(4+1); (1+1)/(3+1); (0+1)/(2+1); longer than its reference: no penalty
    other = (3 / 5 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert ev.self_bleu(["a b c d", "a b c e f"]) == pytest.approx((one + other) / 2)
    # counts are clipped by the *most* any single other response has: "a a" against "a b" and "a c" gets 1 of 2
    assert ev.self_bleu(["a a", "a b", "a c"]) < ev.self_bleu(["a a", "a a", "a c"])


def lcs_by_hand(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_lcs_and_self_rouge():
    assert ev.lcs("abcbdab", "bdcaba") == 4 and ev.lcs("", "ab") == 0 and ev.lcs("ab", "") == 0
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        a, b = (torch.randint(0, 4, (int(torch.randint(0, 90, (1,), generator=g)),), generator=g).tolist() for _ in range(2))
        assert ev.lcs(a, b) == lcs_by_hand(a, b)
    # LCS("a b c d", "a c d") = 3: P = 3/4, R = 1, F1 = 6/7; the others share nothing
    assert ev.self_rouge(["a b c d", "a c d", "x"]) == pytest.approx(6 / 7 / 3)
    assert ev.self_rouge(["", ""]) == pytest.approx(1.0)


def test_vendi_and_cosine_distance():
    eye = torch.eye(4)
    assert ev.vendi(eye) == pytest.approx(4.0) and ev.cosine_distance(eye) == pytest.approx(1.0)
    assert ev.vendi(eye[[0, 0, 0]]) == pytest.approx(1.0) and ev.cosine_distance(eye[[0, 0, 0]]) == pytest.approx(0.0, abs=1e-9)
    assert ev.vendi(eye[[0, 0, 1, 1]]) == pytest.approx(2.0)  # two clusters count as two
    phi = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=-1)
    lo, hi = (1 - 0.5 ** 0.5) / 2, (1 + 0.5 ** 0.5) / 2  # eigenvalues of [[1, c], [c, 1]] / 2
    assert ev.vendi(phi) == pytest.approx(math.exp(-lo * math.log(lo) - hi * math.log(hi)), rel=1e-5)
    assert ev.cosine_distance(phi) == pytest.approx(1 - 0.5 ** 0.5, rel=1e-5)


def test_group_metrics():
    texts = ["Lisbon", "lisbon.", "rome", "paris"]
    m = ev.group_metrics(texts, [1.0, 1.0, 1.0, 0.0], torch.eye(4))
    assert m["distinct_correct"] == 2  # "Lisbon" and "lisbon." are one answer, "paris" was wrong
    assert m["quality"] == 0.75 and m["pass_at"] == {"1": 0.75, "2": 1.0, "4": 1.0} and m["max_at"]["1"] == pytest.approx(0.75)
    assert m["log_det"] == pytest.approx(4 * math.log(2)) and m["vendi"] == pytest.approx(4)
    graded = ev.group_metrics(texts, [0.4, 0.8, 0.9, 1.0], torch.eye(4))
    assert graded["pass_at"]["1"] == 0.25 and graded["max_at"]["4"] == 1.0


def test_effective_diversity():
    """Of 4 responses the first three are correct and the first two nearly the same: the pairs (0, 2) and (1, 2) of 6 remain."""
    phi = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.0, -1.0]]), dim=1)
    assert ev.effective_diversity([True, True, True, False], phi) == pytest.approx(2 / 6)
    assert ev.effective_diversity([True, True, True, False], phi, same=0.999) == pytest.approx(3 / 6)  # their cosine is 0.995
    assert ev.effective_diversity([True, False, False, False], phi) == 0.0
    assert ev.effective_diversity([True] * 4, torch.eye(4)) == 1.0


def test_metrics_over_the_correct_responses_alone():
    texts = ["a red cat sat down", "a red cat ran off", "x y z w v u", "a red cat sat down"]
    m = ev.group_metrics(texts, [1.0, 1.0, 0.0, 0.5], torch.eye(4))
    assert m["correct_distinct_4"] == ev.distinct_n(texts[:2], 4) == 1.0 and m["distinct_4"] < 1.0
    assert m["correct_self_bleu_diversity"] == 1 - ev.self_bleu(texts[:2]) != m["self_bleu_diversity"]
    lone = ev.group_metrics(texts, [1.0, 0.0, 0.0, 0.0], torch.eye(4))
    assert lone["correct_distinct_4"] == lone["correct_self_bleu_diversity"] == lone["effective_diversity"] == 0.0


def test_mean_and_standard_error():
    mean, se = ev.mean_and_se([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0 and se == pytest.approx((14 / 3) ** 0.5 / 2)
    mean, se = ev.mean_and_se([{"1": 0.0}, {"1": 1.0}])
    assert mean == {"1": 0.5} and se["1"] == pytest.approx(0.5)


def result(model, task, quality):
    m = ev.group_metrics(["a", "b"], [quality, quality], torch.eye(2))
    m.update(mean_tokens=3.0, truncated=0.0)
    mean, se = ev.mean_and_se([m, m])
    return dict(model=model, task=task, prompts=2, n=2, **mean, se=se)


def test_table_and_average_and_plot(tmp_path):
    results = [result(m, t, q) for m, q in (("base", 0.5), ("trained", 1.0)) for t in ("story", "reason")]
    models = ev.by_model(results)
    assert models["base"][-1]["task"] == "average" and models["base"][-1]["quality"] == 0.5 and models["base"][-1]["prompts"] == 4
    text = ev.table(results)
    assert "story: 2 prompts x 2 responses" in text and "0.500 ± 0.000" in text and "1 - self-BLEU" in text
    ev.plot(results, tmp_path / "plane.png")
    assert (tmp_path / "plane.png").stat().st_size > 10_000
    json.dumps(results)


def test_nll_under_the_judge(model, tokenizer):
    """The responses of one model scored by another, against cross-entropy one response at a time."""
    judge, rows = random_llama(40, seed=1), [dict(prompt="w5 w6", task="a"), dict(prompt="w7", task="a")]
    kept = []
    [result] = ev.evaluate("m", model, tokenizer, WordCounts(), rows, lambda p, t, r: [0.0] * len(t), 3, 6, judge=judge, keep=kept)
    torch.manual_seed(0)
    rollout = sample(model, tokenizer, ["w5 w6", "w7"], 3, 6)
    assert [s["response"] for s in kept] == rollout.texts
    per_group = []
    for i in (0, 3):
        losses = []
        for j in range(i, i + 3):
            real = rollout.attention_mask[j].bool()
            ids, n = rollout.tokens[j][real], int(rollout.mask[j].sum())
            losses.append(F.cross_entropy(judge(ids[None]).logits[0, -n - 1:-1], ids[-n:], reduction="none"))
        per_group.append(torch.cat(losses).mean().item())
    assert result["nll"] == pytest.approx(sum(per_group) / 2, abs=1e-4)


class WordCounts:
    def encode(self, texts):
        return torch.tensor([[1.0, *(t.split().count(f"w{i}") for i in range(3, 40))] for t in texts])
