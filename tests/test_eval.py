"""Every metric against values worked out by hand or by enumeration; table, picture, evaluation."""

import builtins
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from conftest import random_llama
from data import metrics, pictures, report
from data.runs import to_json
from dqo import BadInput, log_det, sample


def about(value, **kw):
    return pytest.approx(value, **kw)


# -------------------------------------------------------------------------------- the metrics
@pytest.mark.parametrize("text, same_as", [
    ("The old dog sleeps .", "the old dog sleeps"),
    ("the  old dog\nsleeps.", "the old dog sleeps"),
    ("yes , of course !", "yes, of course!"),
    ("3.5", "3.5"),
    (" . ", ""),
    ("", ""),
    ("東京 。", "東京"),
    ("東京 、京都", "東京、京都"),
])
def test_normalize(text, same_as):
    assert metrics.normalize(text) == same_as


@pytest.mark.parametrize("correct", [
    [],
    [0],
    [1, 3],
    [0, 1, 2, 4],
    [0, 1, 2, 3, 4, 5],
])
def test_pass_at_n_is_the_share_of_subsets_with_a_right_answer(correct):
    is_right = [i in correct for i in range(6)]
    for n in range(1, 7):
        subsets = list(itertools.combinations(is_right, n))
        share = sum(map(any, subsets)) / len(subsets)
        assert metrics.pass_at_n(is_right, n) == about(share)


def test_max_at_n_is_the_mean_best_of_subsets():
    scores = [0.3, 0.9, 0.1, 0.9, 0.0, 0.5]
    for n in range(1, 7):
        subsets = list(itertools.combinations(scores, n))
        assert metrics.max_at_n(scores, n) == about(sum(map(max, subsets)) / len(subsets))


def test_max_at_n_of_zeros_and_ones_is_pass_at_n():
    is_right = [True, False, False, True, False]
    scores = [float(x) for x in is_right]
    for n in range(1, 6):
        assert metrics.max_at_n(scores, n) == about(metrics.pass_at_n(is_right, n))


@pytest.mark.parametrize("text, expected", [
    ("The dog's 2 cats", ["the", "dog", "'", "s", "2", "cats"]),
    (", (really) run!", [",", "(", "really", ")", "run", "!"]),
    ("", []),
    ("Ünïcode ok", ["ünïcode", "ok"]),
    ("GPT-4は東京。", ["gpt", "-", "4", "は", "東", "京", "。"]),  # no spaces: by character
    ("カタｶﾅ𠮷", ["カ", "タ", "ｶ", "ﾅ", "𠮷"]),
    ("ไทย ok", ["ไ", "ท", "ย", "ok"]),
    ("ລາວ", ["ລ", "າ", "ວ"]),
    ("ခမ", ["ခ", "မ"]),
    ("ខម", ["ខ", "ម"]),
    ("서울은 도시", ["서울은", "도시"]),  # Korean has spaces
])
def test_words(text, expected):
    assert metrics.words(text) == expected


@pytest.mark.parametrize("tokens, n, expected", [
    ("abc", 1, [("a",), ("b",), ("c",)]),
    ("abc", 2, [("a", "b"), ("b", "c")]),
    ("abc", 3, [("a", "b", "c")]),
    ("abc", 4, [("a", "b", "c")]),  # shorter than n: the text as it is
    ("", 4, [()]),
])
def test_ngrams(tokens, n, expected):
    assert metrics.ngrams(tokens, n) == expected


@pytest.mark.parametrize("texts, n, expected", [
    (["a b a", "a b c"], 1, 3 / 6),
    (["a b a", "a b c"], 2, 3 / 4),  # ab ba | ab bc
    (["a b a", "a b c"], 4, 2 / 2),  # shorter than 4: each text is one n-gram
    (["x", "x", "", ""], 4, 2 / 4),
])
def test_distinct_n(texts, n, expected):
    assert metrics.distinct_n(texts, n) == about(expected)


@pytest.mark.parametrize("texts, expected", [
    (["a b c d e"] * 3, 1.0),
    (["x", "x"], 1.0),
    (["", ""], 1.0),
    (["x", "y"], 0.0),
    (["a b c", "d e f"], 0.0),  # no word in common
])
def test_self_bleu_of_equal_and_of_strange_texts(texts, expected):
    assert metrics.self_bleu(texts) == about(expected)


def test_self_bleu_by_hand():
    # "a b c d" against "a b c e f": 3/4 words; with one added (2+1)/(3+1) bigrams, (1+1)/(2+1)
    # and (0+1)/(1+1); brevity exp(1 - 5/4)
    one = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 5 / 4)
    # the other way: 3/5; (2+1)/(4+1); (1+1)/(3+1); (0+1)/(2+1); longer than the other: no penalty
    other = (3 / 5 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert metrics.self_bleu(["a b c d", "a b c e f"]) == about((one + other) / 2)


def test_self_bleu_compares_with_the_closest_length():
    """Of two that are as close, with the shorter; what is longer than that has no penalty."""
    longer = (5 / 8 * 5 / 8 * 4 / 7 * 3 / 6) ** 0.25  # 5 of 8 words, 4 (+ 1) of 7 (+ 1) bigrams
    texts = ["a b c d", "a b c d e", "a b c d e f g h"]  # the closest to 4 is 5, to 5 is 4
    assert metrics.self_bleu(texts) == about((math.exp(1 - 5 / 4) + 1 + longer) / 3)
    longer = (4 / 5 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    texts = ["a b c d", "a b c", "a b c d e"]  # 3 and 5 are as close to 4
    shorter = 0.5 ** 0.25 * math.exp(1 - 4 / 3)  # it has no four words
    assert metrics.self_bleu(texts) == about((1 + shorter + longer) / 3)


def test_self_bleu_clips_by_the_most_that_any_single_other_response_has():
    # "a a" against "a b" and "a c" gets 1 of 2, not 2 of 2
    assert metrics.self_bleu(["a a", "a b", "a c"]) < metrics.self_bleu(["a a", "a a", "a c"])


@pytest.mark.parametrize("one, other", [
    ("昨日は友達と一緒に公園へ行きました。", "昨日は友達と一緒に公園へ行ったよ。"),
    ("我昨天和朋友一起去公園散步了很久。", "我昨天和朋友一起去公園散步了很久啊。"),
    ("เมื่อวานฉันไปสวนสาธารณะกับเพื่อน", "เมื่อวานฉันไปสวนสาธารณะกับเพื่อนๆ"),
])
def test_near_copies_without_spaces_are_alike(one, other):
    """By words, a clause would be one token, and nothing in common."""
    assert metrics.self_bleu([one, other]) > 0.7
    assert metrics.self_rouge([one, other]) > 0.8
    assert metrics.distinct_n([one, other], 1) < 0.6
    strange = "全然違う文です" if one[0] == "昨" else "カメラ"
    assert metrics.self_rouge([one, strange]) < 0.3


def lcs_by_hand(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in itertools.product(range(len(a)), range(len(b))):
        if a[i] == b[j]:
            table[i + 1][j + 1] = table[i][j] + 1
        else:
            table[i + 1][j + 1] = max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@pytest.mark.parametrize("a, b, length", [
    ("abcbdab", "bdcaba", 4),
    ("", "ab", 0),
    ("ab", "", 0),
])
def test_lcs(a, b, length):
    assert metrics.lcs(a, b) == length


def test_lcs_is_that_of_the_usual_table():
    generator = torch.Generator().manual_seed(0)

    def random_tokens():
        length = int(torch.randint(0, 90, (1,), generator=generator))
        return torch.randint(0, 4, (length,), generator=generator).tolist()

    for _ in range(200):
        a, b = random_tokens(), random_tokens()
        assert metrics.lcs(a, b) == lcs_by_hand(a, b)


def test_self_rouge():
    # LCS("a b c d", "a c d") = 3: P = 3/4, R = 1, F1 = 6/7; the others share nothing
    assert metrics.self_rouge(["a b c d", "a c d", "x"]) == about(6 / 7 / 3)
    assert metrics.self_rouge(["", ""]) == about(1.0)


EYE = torch.eye(4)


@pytest.mark.parametrize("phi, effective_number, distance", [
    (EYE, 4.0, 1.0),
    (EYE[[0, 0, 0]], 1.0, 0.0),
    (EYE[[0, 0, 1, 1]], 2.0, 2 / 3),  # two clusters count as two
])
def test_vendi_and_cosine_distance(phi, effective_number, distance):
    assert metrics.vendi(phi) == about(effective_number)
    assert metrics.cosine_distance(phi) == about(distance, abs=1e-9)


def test_vendi_and_cosine_distance_of_two_by_hand():
    phi = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=-1)
    low = (1 - 0.5 ** 0.5) / 2  # the eigenvalues of [[1, c], [c, 1]] / 2
    high = (1 + 0.5 ** 0.5) / 2
    entropy = -low * math.log(low) - high * math.log(high)
    assert metrics.vendi(phi) == about(math.exp(entropy), rel=1e-5)
    assert metrics.cosine_distance(phi) == about(1 - 0.5 ** 0.5, rel=1e-5)


# The first two mean nearly the same: their cosine is 0.995.
PHI = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.0, -1.0]]), dim=1)


@pytest.mark.parametrize("correct, phi, same, expected", [
    ([True, True, True, False], PHI, 0.9, 2 / 6),  # the pairs (0, 2) and (1, 2) of 6 remain
    ([True, True, True, False], PHI, 0.999, 3 / 6),
    ([True, False, False, False], PHI, 0.9, 0.0),
    ([True, True, True, True], EYE, 0.9, 1.0),
])
def test_effective_diversity(correct, phi, same, expected):
    assert metrics.effective_diversity(correct, phi, same) == about(expected)


NOTHING = torch.zeros(1, 4)  # what some encoders make of an empty text


@pytest.mark.parametrize("phi, like", [
    (NOTHING[[0, 0]], EYE[[0, 0]]),
    (NOTHING[[0, 0, 0, 0]], EYE[[0, 0, 0, 0]]),
    (torch.cat([NOTHING, NOTHING, EYE[:2]]), EYE[[3, 3, 0, 1]]),
])
def test_empty_answers_are_duplicates(phi, like):
    k = len(phi)
    assert metrics.vendi(phi) == about(metrics.vendi(like))
    assert metrics.cosine_distance(phi) == about(metrics.cosine_distance(like), abs=1e-9)
    effective = metrics.effective_diversity([True] * k, phi)
    assert effective == about(metrics.effective_diversity([True] * k, like))


def test_responses_are_different_below_a_cosine_of_nine_tenths_unless_said_otherwise():
    correct = [True, True, True, False]
    assert metrics.effective_diversity(correct, PHI) == about(2 / 6)


@pytest.mark.parametrize("cosine, different", [(0.85, 1.0), (0.95, 0.0)])
def test_of_two_responses_of_a_prompt_a_cosine_decides_whether_they_differ(cosine, different):
    phi = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine ** 2)]])
    assert metrics.effective_diversity([True, True], phi) == different
    assert metrics.group_metrics(["a", "b"], [1.0, 1.0], phi)["effective_diversity"] == different


@pytest.mark.parametrize("scores, phi, expected", [
    # All differ: (1 - p)/(1 - p^4) (1 + .8 * .5 + .64 * 0 + .512 * 1) with p = .8.
    ([1.0, 0.5, 0.0, 1.0], EYE, 0.2 / 0.5904 * 1.912),
    # The second is of the first one's class, and the fourth of the third one's: 1 + .64 * 1.
    ([1.0, 0.5, 1.0, 1.0], EYE[[0, 0, 1, 1]], 0.2 / 0.5904 * 1.64),
    ([0.7], EYE[:1], 0.7),
    ([1.0, 1.0], torch.zeros(2, 4), 0.2 / 0.36),  # two empty texts are one
])
def test_utility(scores, phi, expected):
    assert metrics.utility(scores, phi) == about(expected)


def test_a_class_is_what_is_like_its_first():
    """In a chain of cosine .96 from each to the next, the third is only .84 like the first."""
    angles = torch.tensor([0.0, 0.28, 0.56])
    phi = torch.stack([angles.cos(), angles.sin()], 1)
    assert metrics.utility([0.0, 0.0, 1.0], phi) == about(0.2 / 0.488 * 0.64)
    assert metrics.utility([0.0, 1.0, 0.0], phi) == 0.0


def test_group_metrics():
    texts = ["Lisbon", "lisbon.", "rome", "paris"]
    m = metrics.group_metrics(texts, [1.0, 1.0, 1.0, 0.0], EYE)
    assert m["distinct_correct"] == 2  # "Lisbon" and "lisbon." are one answer, "paris" was wrong
    assert m["quality"] == 0.75
    assert m["pass_at"] == {"1": 0.75, "2": 1.0, "4": 1.0}
    assert m["max_at"]["1"] == about(0.75)
    assert m["log_det"] == about(4 * math.log(2))
    assert m["vendi"] == about(4)


def test_each_number_stands_under_its_own_name():
    texts = ["a b c d e", "a b c d", "e d c b x a", "a b c d e"]
    phi = F.normalize(torch.arange(12.0).view(4, 3) + 5 * torch.eye(4, 3), dim=-1)
    m = metrics.group_metrics(texts, [1.0, 1.0, 1.0, 0.0], phi)
    expected = dict(
        distinct_1=metrics.distinct_n(texts, 1),
        distinct_4=metrics.distinct_n(texts, 4),
        self_bleu_diversity=1 - metrics.self_bleu(texts),
        self_rouge_diversity=1 - metrics.self_rouge(texts),
        cosine_distance=metrics.cosine_distance(phi),
        vendi=metrics.vendi(phi),
        log_det=log_det(phi).item())
    assert {key: m[key] for key in expected} == about(expected)
    assert len({round(value, 3) for value in expected.values()}) == len(expected)


def test_group_metrics_of_graded_scores():
    m = metrics.group_metrics(["a", "b", "c", "d"], [0.4, 0.8, 0.9, 1.0], EYE)
    assert m["pass_at"]["1"] == 0.25
    assert m["max_at"]["4"] == 1.0
    assert m["utility"] == about(0.2 / 0.5904 * (0.4 + 0.8 * 0.8 + 0.64 * 0.9 + 0.512))


def test_metrics_over_the_correct_responses_alone():
    texts = ["a red cat sat down", "a red cat ran off", "x y z w v u", "a red cat sat down"]
    m = metrics.group_metrics(texts, [1.0, 1.0, 0.0, 0.5], EYE)
    right = texts[:2]
    assert m["correct_distinct_4"] == metrics.distinct_n(right, 4) == 1.0
    assert m["distinct_4"] < 1.0
    assert m["correct_self_bleu_diversity"] == 1 - metrics.self_bleu(right)
    assert m["correct_self_bleu_diversity"] != m["self_bleu_diversity"]


@pytest.mark.parametrize("key", [
    "correct_distinct_4",
    "correct_self_bleu_diversity",
    "effective_diversity",
])
def test_a_lone_correct_response_has_no_diversity(key):
    texts = ["a red cat sat down", "a red cat ran off", "x y z w v u", "a red cat sat down"]
    assert metrics.group_metrics(texts, [1.0, 0.0, 0.0, 0.0], EYE)[key] == 0.0


COMPARE = """
    self_bleu_diversity self_rouge_diversity correct_distinct_4 correct_self_bleu_diversity
    effective_diversity cosine_distance
""".split()


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_one_response_is_compared_with_none(score):
    """What needs two is not measured: NaN, which is null in a file and no line in the table."""
    m = metrics.group_metrics(["a red cat"], [score], EYE[:1])
    assert [key for key in m if m[key] != m[key]] == COMPARE
    assert (m["quality"], m["pass_at"], m["max_at"]) == (score, {"1": score}, {"1": score})
    mean, se = metrics.mean_and_se([m, m])
    text = report.table([dict(model="m", task="t", prompts=2, n=1, **mean, se=se)])
    assert "nan" not in text
    assert "quality" in text and "self-BLEU" not in text
    assert json.loads(to_json(mean))["cosine_distance"] is None


def test_json_is_json():
    """NaN and infinities, which JSON lacks, are null at any depth."""
    value = dict(a=math.nan, b=[1.0, -math.inf], c=dict(d=(math.inf, "x", 3, None, True)))
    text = to_json(value)
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found == dict(a=None, b=[1.0, None], c=dict(d=[None, "x", 3, None, True]))


# ----------------------------------------------------------- over prompts, tasks and models
def test_mean_and_standard_error():
    mean, se = metrics.mean_and_se([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert se == about((14 / 3) ** 0.5 / 2)


def test_mean_and_standard_error_of_dicts():
    mean, se = metrics.mean_and_se([{"a": {"1": 0.0}, "b": 2}, {"a": {"1": 1.0}, "b": 2}])
    assert mean == {"a": {"1": 0.5}, "b": 2.0}
    assert se == {"a": {"1": about(0.5)}, "b": 0.0}


def test_one_prompt_has_no_standard_error():
    mean, se = metrics.mean_and_se([1.5])
    assert mean == 1.5
    assert math.isnan(se)


def result(model, task, quality):
    m = metrics.group_metrics(["a", "b"], [quality, quality], torch.eye(2))
    m.update(mean_tokens=3.0, truncated=0.0)
    mean, se = metrics.mean_and_se([m, m])
    return dict(model=model, task=task, prompts=2, n=2, **mean, se=se)


def test_average():
    one = dict(model="m", task="a", prompts=2, n=4, quality=0.2, pass_at={"1": 0.0},
               se=dict(quality=0.3, pass_at={"1": 0.0}))
    two = dict(model="m", task="b", prompts=3, n=4, quality=0.4, pass_at={"1": 1.0},
               se=dict(quality=0.4, pass_at={"1": 0.1}))
    assert metrics.average([one, two]) == dict(
        model="m",
        task="average",
        prompts=5,
        n=4,
        quality=about(0.3),
        pass_at={"1": 0.5},
        se=dict(quality=about(0.25), pass_at={"1": about(0.05)}),  # (0.3² + 0.4²)^½ / 2
    )


RESULTS = [
    result("base", "story", 0.5),
    result("base", "reason", 0.5),
    result("trained", "story", 1.0),
    result("trained", "reason", 1.0),
]


def test_by_model():
    models = metrics.by_model(RESULTS)
    assert list(models) == ["base", "trained"]
    assert [r["task"] for r in models["base"]] == ["story", "reason", "average"]
    assert models["base"][-1]["quality"] == 0.5
    assert models["base"][-1]["prompts"] == 4
    alone = metrics.by_model(RESULTS[:1])
    assert [r["task"] for r in alone["base"]] == ["story"]  # one task is its own average


# ----------------------------------------------------------------------- what is shown of it
@pytest.mark.parametrize("part", [
    "story: 2 prompts x 2 responses",
    "reason: 2 prompts x 2 responses",
    "average: 4 prompts x 2 responses",
    "0.500 ± 0.000",
    "1 - self-BLEU",
    "pass@1 ",
    "pass@2 ",
    "max@2 ",
])
def test_table(part):
    assert part in report.table(RESULTS)


def test_table_has_a_line_per_metric_and_a_column_per_model():
    text = report.table(RESULTS)
    [quality, *_] = [line for line in text.splitlines() if line.startswith("  quality")]
    assert quality.split() == ["quality", "0.500", "±", "0.000", "1.000", "±", "0.000"]
    assert "max@1 " not in text  # the mean, which stands in the line of quality
    json.dumps(RESULTS)


def test_change_shows_what_to_judge_by():
    text = report.change(RESULTS[:2], RESULTS[2:])
    head, *lines = text.splitlines()[2:]
    assert text.splitlines()[1] == "4 test prompts, 2 responses each, base -> trained"
    assert head.split("  ")[0] == "task"
    for column in ("quality", "pass@2", "distinct correct", "effective diversity"):
        assert column in head
    assert [line.split()[0] for line in lines] == ["story", "reason", "average"]
    assert lines[0].split()[1:] == [
        *("0.50", "->", "1.00"),  # quality
        *("0.00", "->", "1.00"),  # pass@2: "a" and "b" are right after training only
        *("0.0", "->", "2.0"),  # distinct correct
        *("0.00", "->", "1.00"),  # effective diversity
    ]


def test_change_fits_into_90_columns():
    before = result("base", "a_task_with_a_very_long_name", -12.34)
    after = result("trained", "a_task_with_a_very_long_name", 12.34)
    assert max(map(len, report.change([before], [after]).splitlines())) <= 90


def test_plot(tmp_path):
    pictures.plot(RESULTS, tmp_path / "plane.png")
    assert (tmp_path / "plane.png").stat().st_size > 10_000


def run_folder(folder, steps, gain=0.5):
    rows = []
    for step in range(1, steps + 1):
        rows.append(dict(step=step, quality=step / steps, distinct=0.9, gain=gain, length=7.5))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("steps, gain", [
    (50, 0.5),
    (50, None),  # grpo embeds nothing
    (1, 0.5),
])
def test_plot_run(tmp_path, steps, gain):
    path = pictures.plot_run(run_folder(tmp_path, steps, gain))
    assert path == tmp_path / "run.png"
    assert path.stat().st_size > 10_000


def test_plot_run_without_matplotlib(tmp_path, monkeypatch):
    usual = builtins.__import__

    def without_matplotlib(name, *args, **kw):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return usual(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert pictures.plot_run(run_folder(tmp_path, 3)) is None
    assert not (tmp_path / "run.png").exists()


@pytest.mark.parametrize("values, width, expected", [
    ([1.0, 2.0, 6.0], 2, [1.5, 3.0, 4.0]),
    ([1.0, 2.0, 6.0], 1, [1.0, 2.0, 6.0]),
    ([0.0, 0.0, 5.0, 0.0, 0.0], 4, [5 / 3, 5 / 4, 1.0, 5 / 4, 5 / 3]),
    ([4.0], 20, [4.0]),
    ([], 20, []),
])
def test_running_mean(values, width, expected):
    assert pictures.running_mean(values, width) == about(expected)


# ------------------------------------------------------------------------------ the evaluation
class WordCounts:
    def encode(self, texts):
        return torch.tensor([[1.0, *self.counts(text)] for text in texts])

    def counts(self, text):
        return [text.split().count(f"w{i}") for i in range(3, 40)]


def nothing(prompts, responses, records):  # a reward
    return [0.0] * len(responses)


RECORDS = [dict(prompt="w5 w6", task="a"), dict(prompt="w7", task="b")]


def test_evaluate(model, tokenizer):
    """A result per task, and every response kept, as one call of `sample` draws them."""
    def longer_than_two(prompts, responses, records):
        assert prompts == [r["prompt"] for r in records] == ["w5 w6"] * 3 + ["w7"] * 3
        return [float(len(response.split()) > 2) for response in responses]

    judges = evaluation.Judges(WordCounts(), longer_than_two)
    sampling = evaluation.Sampling(n=3, max_new_tokens=6, seed=1)
    kept = []
    results = evaluation.evaluate("m", (model, tokenizer), judges, RECORDS, sampling, kept)
    torch.manual_seed(1)
    rollout = sample(model, tokenizer, ["w5 w6", "w7"], 3, 6)
    assert [s["response"] for s in kept] == rollout.texts
    assert [s["task"] for s in kept] == ["a"] * 3 + ["b"] * 3
    assert set(kept[0]) == {"model", "task", "prompt", "response", "quality"}
    assert [(r["model"], r["task"], r["prompts"], r["n"]) for r in results] == [
        ("m", "a", 1, 3),
        ("m", "b", 1, 3),
    ]
    for i, r in enumerate(results):
        group = slice(3 * i, 3 * i + 3)
        assert r["quality"] == about(sum(s["quality"] for s in kept[group]) / 3)
        assert r["mean_tokens"] == about(rollout.mask[group].sum().item() / 3)
        assert r["truncated"] == about(rollout.truncated[group].float().mean().item())
        assert "nll" not in r


TEMPLATE = "{{ messages[0].content }} w8 {{ more }}"


@pytest.mark.parametrize("options", [
    dict(),
    dict(temperature=0.3),
    dict(plain=True),
    dict(template_args=dict(more="w9 w9")),
    dict(seed=7),
    dict(max_new_tokens=2),
])
def test_evaluate_samples_as_it_is_told(model, tokenizer, options):
    tokenizer.chat_template = TEMPLATE
    sampling = evaluation.Sampling(**{**dict(n=3, max_new_tokens=6), **options})
    judges, kept = evaluation.Judges(WordCounts(), nothing), []
    evaluation.evaluate("m", (model, tokenizer), judges, RECORDS, sampling, kept)
    ids = [[5, 6], [7]]
    if not sampling.plain:
        more = [9, 9] if sampling.template_args else []
        ids = [x + [8, *more] for x in ids]
    torch.manual_seed(sampling.seed)
    rollout = sample(model, tokenizer, ids, 3, sampling.max_new_tokens, sampling.temperature)
    assert [s["response"] for s in kept] == rollout.texts


@pytest.mark.parametrize("batch, at_once", [(256, [5]), (6, [2, 2, 1]), (2, [1] * 5)])
def test_no_more_responses_at_once_than_allowed(model, tokenizer, monkeypatch, batch, at_once):
    """But for those of one prompt, which stay together."""
    prompts, usual = [], evaluation.sample

    def counted(model, tokenizer, ids, *rest):
        prompts.append(len(ids))
        return usual(model, tokenizer, ids, *rest)
    monkeypatch.setattr(evaluation, "sample", counted)
    records = [dict(prompt=f"w{i}", task="a") for i in range(3, 8)]
    sampling = evaluation.Sampling(n=3, max_new_tokens=2, batch=batch)
    judges, kept = evaluation.Judges(WordCounts(), nothing), []
    evaluation.evaluate("m", (model, tokenizer), judges, records, sampling, kept)
    assert prompts == at_once
    assert [s["prompt"] for s in kept] == [r["prompt"] for r in records for _ in range(3)]


def test_nll_under_the_judge(model, tokenizer):
    """The responses of one model scored by another, against cross-entropy one at a time."""
    judge = random_llama(40, seed=1)
    judges = evaluation.Judges(WordCounts(), nothing, judge)
    sampling = evaluation.Sampling(n=3, max_new_tokens=30)
    results = evaluation.evaluate("m", (model, tokenizer), judges, RECORDS, sampling)
    torch.manual_seed(0)
    rollout = sample(model, tokenizer, ["w5 w6", "w7"], 3, 30)
    assert len(set(rollout.mask.sum(1).tolist())) > 2, "they should differ in length"
    for r, first in zip(results, (0, 3)):
        losses = []
        for j in range(first, first + 3):
            real = rollout.attention_mask[j].bool()
            ids, n = rollout.tokens[j][real], int(rollout.mask[j].sum())
            logits = judge(ids[None]).logits[0, -n - 1:-1]
            losses.append(F.cross_entropy(logits, ids[-n:], reduction="none"))
        assert r["nll"] == about(torch.cat(losses).mean().item(), abs=1e-4)


def run_of(folder, max_new_tokens):
    folder.mkdir(parents=True)
    config = dict(max_new_tokens=max_new_tokens)
    (folder / "run.json").write_text(json.dumps(dict(config=config)))
    return folder


def test_length_of_responses(tmp_path):
    """That of the runs, the longest; the tiny base model's own only where it is alone, and only
    that of the repository: another folder of this name is a model like any other."""
    short, long = run_of(tmp_path / "short", 30), run_of(tmp_path / "long", 70)
    checkpoint = long / "checkpoints" / "step-5"
    checkpoint.mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    for models, expected in [
        (["data/tiny"], 24),
        (["data/tiny", "gpt2"], 256),
        ([str(tmp_path / "tiny")], 256),
        (["data/tiny", str(short)], 30),
        ([str(short), str(long)], 70),
        (["data/tiny", str(checkpoint)], 70),
    ]:
        assert evaluation.default_max_new_tokens(models) == expected


def test_length_of_responses_of_a_damaged_run(tmp_path):
    run = run_of(tmp_path / "run", "many")
    with pytest.raises(BadInput, match="is not the run.json of a run .*; give --max-new-tokens"):
        evaluation.default_max_new_tokens([str(run)])
