"""Rows, and who judges the answers: right ones in varied phrasing pass, near misses do not."""

import gzip
import json
import sys
from unicodedata import normalize as form

import pytest
import torch
import transformers as hf

from conftest import needs, random_gpt2, random_llama
from data.metrics import normalize, rouge_l, words
from data.tasks import TASKS, function_in, load_reward, load_rows, puzzle_set
from dqo import BadInput

TRIP = dict(who="anna", what="hat", color="red", where="market", when="monday", weather="rain")
CORE, TALE = "anna bought a hat at the market", "the dog sleeps in the park"
SKI = "He skis on a mountain, carries bread, stopped baking"
CLIPS = "so 48+24 = <<48+24=72>>72 clips.\n#### 72"

# task, answer, right responses, wrong ones, separated by |
JUDGED = [
    ("instruct", ["lisbon", "rome"], "lisbon|Lisbon| rome .|Rome.",
     "tokyo|lisbon rome|lisbo|a rome|rome, lisbon"),
    ("summarize", TRIP, f"""{CORE} .|Anna got a red hat in the market on monday.|at the market ,
 anna purchased a hat|on monday, {CORE}|a hat was bought by anna at the market .|at the market, a
 red hat was purchased by anna despite the rain on monday.|despite the rain, {CORE} on monday""",
     f"""ben bought a hat at the market .|anna bought a lamp at the market .|anna bought a hat at
 the mall|anna bought a hat .|anna bought a blue hat at the market|{CORE} on friday|{CORE} and
 went home .|{CORE} at the market .|at the market, {CORE}|on monday {CORE} on monday|{CORE} despite
 the cold .|{CORE} despite the rain despite the rain|{CORE} . {CORE} ."""),
    ("story", ["dog", "park"], f"{TALE} .|The old dog sleeps quietly in the little park.",
     f"""the dog sleeps in the house|the cat sleeps in the park|the dog in the park|dog park|{TALE}
 the|{TALE} . {TALE} .|the park sleeps in the dog|the dog sleeps the park|the old {TALE}"""),
    ("reason", 24, """4 * 6|20 + 4|(2 + 1) * 8|48 / 2|1/2*48|4*6.|- 1 + 25|3 * 2 * 4 * 1|2-(-22)|
31 - 4 - 3|1/3*72|8/(3-8/3)|19 + +5|19--5""",
     """24|4 * 5|4 * 6 + 1|4 * 6 =|4 * 6 = 24|4 * 6 6|20 +|24 // 1|48 ** 1 / 2|1 / 0|24.0 + 0|+24|
-(-24)|4 * 6 # right|0x18 + 0|(4 * 6|2_4 + 0|٤ * ٦|31 - (4 - 3)|19-+5|73/3 - 0|9**9**9|"""
     + "24" + "*1" * 50),  # too long
    ("gsm8k", CLIPS, "#### 72|####72|#### $72|#### 72.00|so\n#### 5\n#### 72|x\n#### 72 \n\n",
     """72|\\boxed{72}|#### 72 apples|#### 72\nand so on|#### 72 💥|#### 2 * 36 = 72|
#### 144/2|so #### 72|#### 72 73|#### -72|#### 7,2|#### 7.2e1|##### 72|#### ٧٢|#### 72\n####|
#### 72.01"""),
    ("gsm8k", "#### 1,234.5", "#### 1234.50|#### $1,234.5", "#### 1,2345|#### 1.234,5"),
    ("gsm8k", "#### -3", "#### -3|#### −3|#### –3|#### $-3|#### -$3|#### -3.0",
     "#### 3|#### 7-3|#### --3|#### - -3|#### -$-3"),
    ("gsm8k", 0.75, "#### 0.75|#### .75|#### 0.750", "#### 3/4|#### 0.75000000000000000001"),
    ("math", CLIPS, "#### 72|so $\\boxed{72}$.|No, 72!|2 * 36 = 72|144/2|\\boxed{\\frac{144}{2}}",
     "#### 73|#### -72|7.2|720|72 73|\\boxed{73} 72|72 or 73|72/5|172|1,072|\\boxed{72^2}"),
    ("math", "x^2 - 1", "\\boxed{(x-1)(x+1)}|$x^2 - 1$", "1|2|\\boxed{1}|\\boxed{x^2+1}"),
    ("math", "It is $2\\sqrt{5}$.", "\\boxed{2\\sqrt5}|$\\boxed{\\sqrt{20}}$.", "2|5|\\boxed{2}"),
    ("commongen", "ski Mountain carry stop bake sit".split(), f"""{SKI} and sat.|{SKI} and sat|
Skiing down mountains they carried what we stop to bake, sitting!|Mr. Lee skis on a mountain and
 carries bread, stopped baking and sat at 5 p.m. today .""",
     f"""{SKI}.|He sat. {SKI}.|{SKI}\nand sat|{SKI} and sat on the|Skimming mountainous carryalls,
 stopgap bakery sitcom.|ski-mountain carry stop bake sit.|ski, mountain, carry, stop, bake and sit|
1. ski 2. mountain 3. carry 4. stop 5. bake 6. sit|{SKI} and sat""" + " well" * 40),
    ("commongen", ["hot dog"], "A dog in hot sun.|He eats hot-dogs.", "A hotdog.|A dog."),
    ("commongen", ["be", "man", "car"], "The man is in a car.",
     "A bee, a man, a car.|So many were in a car.|The man is on a carpet."),
]
NONSENSE = ["", " ", ".", "####", "\\boxed{", "²⁴", "ＲＯＭＥ", "💥", "a" * 9999, "(((", "9" * 99,
            "#### " + "9" * 5000, "\x00", "nan", "1/0", "#### 3/0", "__import__('os')"]


def of_task(*case):
    package = dict(math="math_verify", commongen="simplemma").get(case[0])
    return pytest.param(*case, marks=[needs(package)] if package else [])


@pytest.mark.parametrize("task, answer, right, wrong", [of_task(*case) for case in JUDGED])
def test_right_answers_near_misses_and_nonsense(task, answer, right, wrong):
    right, wrong = (x.replace("|\n", "|").replace("\n ", " ").split("|") for x in (right, wrong))
    rows = [dict(prompt="p", answer=answer, _task=task, _where="here")]
    reward = load_reward(None, rows)
    for responses, expected in ((right, 1.0), (wrong + NONSENSE, 0.0)):
        scores = reward(["p"] * len(responses), responses, rows * len(responses))
        assert [x for x, score in zip(responses, scores) if score != expected] == []


@needs("simplemma")
def test_coverage_knows_irregular_forms():
    for pair in """be:were bear:bore child:children cut:cutting dive:dove
            drink:drunk feel:felt fly:flew go:gone grind:ground leave:left person:people rise:rose
            shoot:shot win:won wind:wound leaf:leaves big:bigger
            cover:snow-covered surf:surfers""".split():
        word, other = pair.split(":")
        assert TASKS["commongen"].reward(dict(answer=[word]), f"So {other} here.") == 1, pair


def test_rouge():
    assert rouge_l("The cat sat.", "the cat sat.") == 1
    assert rouge_l("a b c d", "a x c") == 2 * 2 / (4 + 3)  # the longest subsequence is a c
    assert rouge_l("昨日は公園へ行きました", "昨日は公園へ行った") > 0.7  # by character


@pytest.mark.parametrize("task, answer, response", [of_task(*case) for case in [
    ("instruct", ["café"], "Café."), ("dolly", "un café noir", "un café"),
    ("summarize", TRIP | dict(what="café", where="hôtel"), "anna bought a café at the hôtel"),
    ("commongen", ["café"], "Two cafés here."),
]])
def test_composed_and_decomposed_letters_are_the_same_text(task, answer, response):
    """café has four characters or five: the same to words, normalize, and every reward."""
    apart = form("NFD", response)
    assert apart != response and words(apart) == words(response)
    assert normalize(apart) == normalize(response)
    answers = [json.loads(form(x, json.dumps(answer, ensure_ascii=False))) for x in ("NFC", "NFD")]
    scores = [TASKS[task].reward(dict(answer=a), x) for a in answers for x in (response, apart)]
    assert scores == scores[:1] * 4 and scores[0] > 0


# ------------------------------------------ the data
SPLITS = "train", "test", "hard"


@pytest.mark.parametrize("task", ["instruct", "summarize", "story", "reason", "categories"])
def test_splits_share_no_prompt_and_every_answer_can_be_given(task):
    rows = [row for split in SPLITS[:3 if task in ("instruct", "reason") else 2]
            for row in load_rows(task, split)]
    assert len({row["prompt"] for row in rows}) == len(rows)
    right = dict(story="the {0[0]} waits by the {0[1]}|the {0[1]} waits by the {0[0]}",
                 summarize="{0[who]} got a {0[color]} {0[what]} at the {0[where]}",
                 reason="{1} + 1 - 1").get(task, "{0[0]}|{0[15]}").split("|")
    for row in rows:
        last = row["prompt"].split()[-1]
        scores = [TASKS[task].reward(row, x.format(row["answer"], last)) for x in right]
        assert sum(scores) == (1 if task == "story" else len(right)), row


@pytest.mark.parametrize("task, groups", [("instruct", 24), ("reason", 30)])
def test_what_is_hard_is_rare_in_training_and_tested_with_other_verbs(task, groups):
    asked = {}  # {"a city in europe": [the splits of its prompts]}
    for split in SPLITS:
        for row in load_rows(task, split):
            asked.setdefault(row["prompt"].partition(" ")[2], []).append(split)
    counts = [tuple(map(x.count, SPLITS)) for x in asked.values()]
    assert len(counts) == groups and counts.count((5, 1, 0)) == groups * 2 // 3
    assert counts.count((1, 0, 3)) + counts.count((2, 0, 3)) == groups // 3


# -------------------------------------------- files
TEXT = "eins\u2028ä, zwei"  # a line separator may stand inside a JSON text
OWN = [dict(prompt=TEXT, answer=x, more=i) for i, x in enumerate("ab")]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OWN * 2)
TABLE = f'prompt\tanswer\tmore\n"{TEXT}"\ta\t0\n"{TEXT}"\tb\t1\n'
FILES = {"a.jsonl": LINES, "b.jsonl": "\ufeff" + LINES.replace("\n", "\r\n\n"),
         "a.jsonl.gz": LINES, "a.json": json.dumps(OWN),
         "a.csv": TABLE.replace("\t", ","), "a.parquet": None}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[needs("datasets")] * (name[1:] != ".jsonl")) for name in FILES])
def test_files_of_every_format(tmp_path, monkeypatch, name):
    """Rows with equal prompts stay apart if their answers differ, and are one if not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    if FILES[name]:
        pack = gzip.compress if name.endswith("gz") else bytes
        (tmp_path / name).write_bytes(pack(FILES[name].encode()))
    else:
        import datasets
        datasets.Dataset.from_list(OWN).to_parquet(tmp_path / name)
    where = dict(zip(FILES, ["line 2", "line 3"])).get(name, "row 2")
    for path in (f"~/{name}", str(tmp_path / name)):
        rows = load_rows(path, "test")
        assert [{key: row[key] for key in OWN[0]} for row in rows] == OWN
        assert (rows[1]["_task"], rows[1]["_where"]) == (path, f"{path}, {where}")


def write(folder, *rows):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{folder}/a.jsonl"


def test_splits_limits_and_mixtures(tmp_path):
    chat = [dict(role="user", content="p")]
    data = write(tmp_path, dict(prompt="p"), dict(prompt=chat, split="test"), dict(prompt="q"))
    assert [row["prompt"] for row in load_rows(data, "test")] == ["p", chat, "q"]
    assert [row["prompt"] for row in load_rows(data, "train")] == ["p", "q"]
    rows = load_rows(f"story,{data},reason", "train", 1)
    assert [row["_task"] for row in rows] == ["story", data, "reason"]
    reward, right = load_reward(None, rows[::2]), f"{rows[2]['answer']} * 1"
    assert reward([None] * 2, [right, right], rows[::2]) == [0, 1]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
GOOD = b'{"prompt": "p"}\n'


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", LINES.encode("utf-16"), "a.jsonl, line 1: .*UTF-8"),
    ("a.jsonl", POINTER, "a.jsonl, line 1: .*git-lfs"), ("a.jsonl", b"", "no rows"),
    *(("a.jsonl", GOOD + line, "a.jsonl, line 2: ") for line in (
        b'{"prompt": 1', b"3", b'{"p": "a"}', b'{"prompt": " "}',
        b'{"prompt": [{"role": "user", "content": [1]}]}')),
    ("gsm8k:a.jsonl", GOOD, "a.jsonl, line 1: .*question"),
    *((name, POINTER, name) for name in ("a.json", "a.csv", "a.parquet", "a.jsonl.gz")),
    *((name, LINES.encode("utf-16"), name) for name in ("a.json", "a.csv")),
    ("a.txt", b"p", "a.txt"), ("folder.jsonl", None, "folder.jsonl"),
    ("a/none.csv", None, "none.csv"), ("", None, "--data"), ("story,gsm9k", None, "gsm9k: .*gsm8k"),
    ("gsm8k:no.jsonl", None, "no.jsonl"),
])
def test_what_is_no_data_is_refused_in_one_line(tmp_path, monkeypatch, name, content, message):
    file = name.rpartition(":")[2]
    if content and not file.endswith(("jsonl", "txt")):
        pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(BadInput, match=message + "[^\n]*$"):
        load_rows(name, "train")


CLIP = dict(question="Ann buys 1,000?", answer="3 + 1000\n#### 1,003")


@pytest.mark.parametrize("task, good, bad", [of_task(*case) for case in [
    ("gsm8k", "7.", [None, "none", "#### none", "#### 7 apples", "3, 4", True, [5]]),
    ("instruct", ["rome"], [None, "rome", [], [""], [1]]), ("story", ["dog", "park"], ["dog"]),
    ("summarize", TRIP, [None, "x", {"who": "anna"}]), ("reason", 7, [None, "x", []]),
    ("dolly", "text", [None, 3, ["text"]]), ("math", "7", [None, ""]),
    ("commongen", ["ski"], [None, "ski", [], {"words": []}]),
]])
def test_an_answer_that_the_reward_cannot_use_is_found_before_the_run(tmp_path, task, good, bad):
    """Also the one of many that is not there."""
    many = [dict(prompt=f"{i}", answer=good) for i in range(9)]
    for row in [dict(prompt="p", answer=answer) for answer in bad] + [dict(prompt="p")]:
        rows = load_rows(write(tmp_path, *many, row), "train")
        with pytest.raises(BadInput, match="a.jsonl, line 10: [^\n]*$"):
            load_reward(task, rows)
    load_reward(task, rows[:9])


# ----------------------------------- rewards by name
SCORE = "def score(prompts, responses, rows):\n    "


def own(folder, body, name="my.py", head=SCORE):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(head + body)
    return f"{folder}/{name}:score"


@pytest.mark.parametrize("value, message", [
    ("0.5", "0.5"), ("None", "None"), ("[0.5]", r"3 .*\[0.5\]"), ("[1, 2, float('nan')]", "nan"),
    ("[1, float('inf'), 1]", "inf"), ("['x'] * 3", "x"),
    *((value, None) for value in ("[True, 2, 0.5]", "iter((1, 2, 0.5))",
                                  "__import__('torch').tensor([1, 2, 0.5])")),
])
def test_what_an_own_reward_may_return(tmp_path, value, message):
    reward = load_reward(own(tmp_path, f"return {value}"), [])
    if not message:
        assert reward(["p"] * 3, ["x", "", "z"], [{}] * 3) == [1, 2, 0.5]
        return
    with pytest.raises(BadInput, match=f"my.py:score[^\n]*{message}[^\n]*$"):
        reward(["p"] * 3, ["x", "", "z"], [{}] * 3)


def test_what_is_no_reward(tmp_path, tokenizer):
    rows = [dict(prompt="p", _task="mine.jsonl", _where="here")]
    own(tmp_path, "return [1]")
    save_reward_model(tmp_path / "two", tokenizer, num_labels=2)
    save_reward_model(tmp_path / "lm", tokenizer)
    random_llama(40, num_labels=1).save_pretrained(tmp_path / "lm")  # its head would be random
    here = str(tmp_path)
    for name in (here + "/my.py:other", here + "/no.py:score", "nothing",
                 None, *(f"hf:{here}/{name}" for name in ("two", "lm", "none"))):
        with pytest.raises(BadInput, match=f"{name or 'mine.jsonl'}[^\n]*$"):
            load_reward(name, rows)


@needs("reasoning_gym")
@pytest.mark.parametrize("name", [
    "countdown", "basic_arithmetic", "graph_color", "word_sorting", "prime_factorization"])
def test_puzzles(name):
    """Right is what the generator gives, as the last thing between <answer> and </answer>. Seeds
    differ between splits, and are the same tomorrow. What a scorer raises at is wrong."""
    rows, others = (load_rows(f"rg:{name}", split, 20) for split in ("train", "test"))
    puzzle_set.cache_clear()
    assert rows == load_rows(f"rg:{name}", "train", 20) and len(rows) == 20
    if name not in ("graph_color", "prime_factorization"):  # small ones come twice
        assert not {row["prompt"] for row in rows} & {row["prompt"] for row in others}
    prompts, reward = [row["prompt"] for row in rows], load_reward(None, rows + others)
    right = [row["answer"] for row in rows]
    if name == "graph_color":  # many answers are right; the generator gives one as an example
        right = [json.dumps(row["metadata"]["possible_answer"]) for row in rows]
    said = [f"Is it <answer>no</answer>? It is <answer> {x} </answer>." for x in right]
    assert reward(prompts, said, rows) == [1] * 20
    for wrong in (right, ["<answer>no</answer>"] * 20, [""] * 20):
        assert max(reward(prompts, wrong, rows)) < 1
    for wrong, line in [("count_down", "near: countdown,"), ("composite", "one dataset$")]:
        with pytest.raises(BadInput, match=f"rg:{wrong}: [^\n]*{line}"):
            load_rows(f"rg:{wrong}", "train")


HEAD = """
from __future__ import annotations
import dataclasses, random
from a_neighbour import FACTOR
@dataclasses.dataclass
class Weights:  # which looks for its module
    length: float = random.choice([FACTOR])
""" + SCORE + "import another  # when it is needed\n    "


def test_a_reward_file_may_have_any_name_and_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "a_neighbour.py").write_text("FACTOR = 2.0\n")
    (tmp_path / "another.py").write_text("times = float.__mul__\n")
    body = "return [another.times(Weights().length, float(len(r))) for r in responses]"
    for name in ("my.py", "random.py", "my v2.py"):
        spec = own(tmp_path, body, name, HEAD)
        assert load_reward(spec, [])([None] * 2, ["a", "bbb"], [{}] * 2) == [2.0, 6.0]
        assert function_in(spec) is function_in(spec)  # one module for both flags
        assert sys.path[0] != str(tmp_path)  # it hides nothing
    for folder, number in (("a", 1), ("b", 2)):  # two files of one name
        reward = load_reward(own(tmp_path / folder, f"return [{number}]"), [])
        assert reward([None], ["r"], [{}]) == [number]


# ------------------------------------- reward models
TEMPLATE = """{% for m in messages %}{{ dict(user="w3", assistant="w4")[m.role] }}
{{ m.content }} </s> {% endfor %}"""


def save_reward_model(folder, tokenizer, **kw):
    tokenizer.save_pretrained(folder)
    config = random_gpt2(40).config  # absolute positions show padding
    pad = 0 if tokenizer.pad_token else None  # may differ
    config.update(dict(num_labels=1, initializer_range=1.0, pad_token_id=pad) | kw)
    model = hf.GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_a_reward_model_scores_a_batch_as_one_at_a_time(tmp_path, tokenizer, template, pad):
    """Of a conversation, or with no template of a pair of texts."""
    tokenizer.chat_template, tokenizer.pad_token, tokenizer.model_max_length = template, pad, 30
    model = save_reward_model(tmp_path / "rm", tokenizer)
    prompts = [f"w{5 + i % 9} w7" for i in range(20)] + [[dict(role="user", content="w5 w7")]]
    responses = ["w9 " * (1 + i % 5) + f"w{20 + i % 7}" for i in range(20)] + ["w8 " * 40 + "w9"]
    scores = load_reward(f"hf:{tmp_path}/rm", [])(prompts, responses, [{}] * 21)
    for prompt, response, score in zip(prompts, responses, scores):
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        if template:  # the end of what is too long counts
            read = f"w3 {text} </s> w4 {response} </s>".split()[-30:]
        else:
            read = text.split() + response.split()[-28:]
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(read)])
        assert score == pytest.approx(model(input_ids=ids).logits[0, 0].item(), abs=1e-4)
