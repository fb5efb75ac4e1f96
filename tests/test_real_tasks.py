"""Real tasks: where prompts may come from, what the rewards count as right, and that no bad input gives a traceback."""

import io
import json
import sys
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from conftest import random_llama, word_tokenizer
from data import tasks
from dqo import BadInput

NONSENSE = ["", " ", "\n", ".", "####", "\\boxed{", "\\boxed{}", "٧٢", "⁷²", "七十二", "💥", "a" * 10000, "9" * 5000, "#### " + "9" * 5000, "3/0",
            "#### 3/0", "\x00", "{" * 5000, "-" * 5000, "1 " * 5000, "\\boxed{" * 500, "None", "nan", "inf", "<answer>", "<answer></answer>", "="]


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------------- rewards
@pytest.mark.parametrize("answer,loose,strict", [  # right for `math` only, and for `math_strict` too
    ("so 48+24 = <<48+24=72>>72 clips.\n#### 72",
     ["#### 72 apples", "#### 72\nand so on", "#### 72 \\boxed{72} 9", "It is \\boxed{72} km", "72 clips", "#### 72 💥", "\\boxed{72 \\text{ km}^2}",
      "#### 72 + 0", "72 x"],
     ["#### 72", "####72.", "#### $72", "#### 72.00", "**#### 72**", "#### **72**", "#### 72%", "\\boxed{72}", "so $\\boxed{72}$.", "The answer is 72.",
      "72", "2 * 36 = 72", "#### 2 * 36 = 72", "\\boxed{x = 72}", "I think 5, no, 72!", "#### 5\n#### 72", "\\boxed{5} \\boxed{72\\%}", "$72$", "144/2", "#### 144/2",
      "12-72", "\\boxed{\\frac{144}{2}}", "#### \\boxed{72}", "#### 72 €", "\\(72\\)"]),
    ("#### 1,234.5", [], ["#### 1234.50", "1,234.5", "$1,234.5", "\\boxed{1{,}234.5}", "2469/2", "1\\,234.5", "1234 1/2", "1234\\frac{1}{2}"]),
    ("#### -3", [], ["#### -3", "−3", "-$3", "#### $-3", "= - 3", "#### - 3", "\\boxed{-3}", "-3.0", "\\boxed{-\\frac{6}{2}}", "-6/2"]),
    (0.75, ["3/4 of it"], ["3/4", "0.75", ".75", "\\dfrac{3}{4}", "\\boxed{\\frac{3}{4}}", "6/8"]),
    (1000000, [], ["1,000,000", "1000000", "$1,000,000.00"]),
])
def test_math_right(answer, loose, strict):
    row = {"answer": answer}
    assert [r for r in loose + strict if tasks.math_answer(row, r) != 1] == []
    assert [r for r in strict if tasks.math_strict(row, r) != 1] == []
    assert [r for r in loose if tasks.math_strict(row, r) != 0] == []


@pytest.mark.parametrize("answer,wrong", [
    ("#### 72", ["#### 73", "#### -72", "#### 7.2", "720", "7,2", "72 73", "#### 73 72", "72 #### 73", "\\boxed{73} 72", "#### \n", "72 or 73", "#### 72/5", "72.5",
                 "x72", "72e", "1 72/72", "#### seventy-two", "\\boxed{72} \\boxed{7}", "-72", "#### 72 = 73", "172", "1,072"]),
    ("#### -3", ["3", "#### 3", "7-3", "−4"]), ("1/2", ["1 1/2", "1\\frac{1}{2}", "2", "-1/2", "0.51", "0.49999999999999999"]), ("5", ["= - 5"]),
])
def test_math_near_misses(answer, wrong):
    for reward in (tasks.math_answer, tasks.math_strict):
        accepted = {"72e"} if reward is tasks.math_answer else set()  # 72 with a unit that follows at once
        assert [r for r in wrong + NONSENSE if reward({"answer": answer}, r) != 0 and r not in accepted] == []


PUZZLE = {"answer": None, "nums": [57, 8, 12], "target": 37}


def test_countdown():
    right = ["57 - (8 + 12)", "57-8-12", "37 = 57 - 8 - 12", "57 - 8 - 12 = 37.", "Answer: 57 - 12 - 8", "let me see: 5 * 3\nno.\n\n57 − 8 − 12", "**57 - 8 - 12**",
             "<think>8 + 12</think><answer>57 - 8 - 12</answer>", "<answer>1</answer> no <answer> 57 - 8 - 12 = 37 </answer>\n", "-8 + 57 - 12", "$57 - 8 - 12$"]
    wrong = ["57 - 8", "57 - 8 - 12 + 0", "57 - 8 - 12 - 8 + 8", "57 - 20", "37", "37 = 37", "57 - 8 - 12 = 38", "57 - 8 - 12 = 37 = 37", "57 - 8 - 12 right", "5712 - 8",
             "57 - 8 - 12\nand so on", "<answer>57 - 8 - 12</answer> and so on", "<answer>57 - 8 - 12", "57 - 8 - 12 # 💥", "57 - 8 - 12 = 40 - 3", "__import__('os')",
             "57 // 8 - 12", "9**9**9", "57 - 8 - ١٢", "(57 - 8 - 12", "57 - 8 - 12 = 57 - 8 - 12", "8 + 12 + 57"]
    for row in (PUZZLE, {"answer": {"nums": [12, 8, 57], "target": 37}}, {"answer": None, "meta": {"nums": [8, 12, 57], "target": 37}}):
        assert [r for r in right if tasks.countdown(row, r) != 1] == []
        assert [r for r in wrong + NONSENSE if tasks.countdown(row, r) != 0] == []
    thirds = {"answer": None, "nums": [8, 3, 8, 3], "target": 24}  # 24 = 8 / (3 - 8/3), which no float would give
    assert tasks.countdown(thirds, "8 / (3 - 8 / 3)") == 1 and tasks.countdown(thirds, "8 * 3 * (8 - 7)") == 0


def test_coverage():
    row = {"answer": ["ski", "Mountain", "carry", "stop", "bake", "sit"]}
    assert tasks.coverage(row, "He skis on a mountain, carries bread, stopped baking and sat.") == 1
    assert tasks.coverage(row, "Skiing down mountains they carried what we stop to bake, sitting!") == 1
    wrong = ["He skis on a mountain, carries bread, stopped baking.", "He skis on a mountain, carries bread, stopped baking and sat", "He sat. He skis on a mountain, carries bread, stopped baking and sat.",
             "He skis on a mountain,\ncarries bread, stopped baking and sat.", "He skis on a mountain, carries bread, stopped baking and sat" + " and" * 20 + ".",
             "Skimming mountainous carryalls, stopgap bakery sitcom.", "ski-mountain carry stop bake sit."]
    assert [r for r in wrong + NONSENSE if tasks.coverage(row, r) != 0] == []
    for word, form in [("dog", "dogs"), ("watch", "watches"), ("play", "played"), ("play", "plays"), ("bake", "baked"), ("run", "running"), ("cry", "cries"), ("child", "children")]:
        assert tasks.coverage({"answer": [word]}, f"The {form} here.") == 1
    assert tasks.coverage({"answer": ["hot dog"]}, "A dog in hot sun.") == 1 and tasks.coverage({"answer": ["café"]}, "Two cafés.") == 1
    assert tasks.coverage({"answer": ["be"]}, "A bee.") == 0 and tasks.coverage({"answer": ["dog"]}, "A hotdog.") == 0


def test_rouge():
    assert tasks.rouge({"answer": "The cat sat."}, "the cat sat.") == 1 and tasks.rouge({"answer": "the cat sat"}, "stocks fell") == 0
    assert tasks.rouge({"answer": "a b c d"}, "a x c") == pytest.approx(2 * 2 / (4 + 3))  # the longest common subsequence is a c
    assert tasks.rouge({"answer": ["x y", "a b c d"]}, "a b c d") == 1 and tasks.rouge({"answer": {"references": ["", None, "q", "a"]}}, "a") == 1
    assert all(0 <= tasks.rouge({"answer": "a b"}, r) <= 1 for r in NONSENSE) and tasks.rouge({"answer": "a"}, "") == 0


# ------------------------------------------------------------------------------------------------- ready tasks
PUBLISHED = {  # one row each as published, something the default reward counts as right, something it does not
    "gsm8k": ({"question": "Ann has 3 hats and buys 1,000. How many?", "answer": "3 + 1000 = <<3+1000=1003>>1003\n#### 1,003"}, "3 + 1000\n#### 1003", "#### 1003 hats"),
    "commongen": ({"concept_set_idx": 0, "concepts": ["ski", "mountain", "skier"], "target": "Skier skis down the mountain"}, "A skier skis on a mountain.", "A skier skis."),
    "dolly": ({"instruction": "Who wrote it?", "context": "Ann wrote it.", "response": "Ann did.", "category": "closed_qa"}, "Ann did.", "no"),
    "cnn_dailymail": ({"article": "LONDON (CNN) A cat sat.", "highlights": "A cat sat .\nIn London .", "id": "x"}, "a cat sat . in london .", "stocks fell"),
    "countdown": ({"target": 37, "nums": [57, 8, 12]}, "57 - 8 - 12", "57 - 8 - 12 = 38"),
}
PARTS = {"gsm8k": ["Ann has 3 hats", "####"], "commongen": ["ski, mountain, skier"], "dolly": ["Who wrote it?", "Ann wrote it."], "cnn_dailymail": ["LONDON"], "countdown": ["37", "57"]}


@pytest.mark.parametrize("task", tasks.READY)
def test_ready_task(task, tmp_path):
    published, right, wrong = PUBLISHED[task]
    data = f"{task}:" + write(tmp_path / "mine.jsonl", published)
    rows = tasks.load_rows(data, "test")
    assert len(rows) == 1 and rows[0]["task"] == task and all(part in rows[0]["prompt"] for part in PARTS[task])
    reward = tasks.load_reward(None, data)
    tasks.check_rows(rows, reward)
    scores = reward([rows[0]["prompt"]] * 2, [right, wrong], rows * 2)
    assert scores == [1.0, 0.0] and reward.range == (0, 1)
    for key in set(published) - {"concept_set_idx", "context", "category", "id", "target" if task == "commongen" else ""}:
        for other in ({k: v for k, v in published.items() if k != key}, {**published, key: None}, {**published, key: {}}, {**published, key: []}):
            write(tmp_path / "mine.jsonl", published, other)
            with pytest.raises(BadInput, match="mine.jsonl, line 2: .*needs"):
                tasks.load_rows(data, "test")
                tasks.load_rows(data, "train")


def test_commongen_references_are_merged(tmp_path):
    row = PUBLISHED["commongen"][0]
    data = "commongen:" + write(tmp_path / "c.jsonl", row, {**row, "target": "Other."}, {**row, "concepts": ["dog"]})
    rows = tasks.load_rows(data, "train")
    assert [r["answer"]["references"] for r in rows] == [[row["target"], "Other."], [row["target"]]]
    assert tasks.load_reward("rouge", data)(["p"], ["other."], rows[:1]) == [1.0] and len(tasks.load_rows(data, "train", limit=1)[0]["answer"]["references"]) == 2


def test_mixtures_splits_and_held_out_rows(tmp_path):
    gsm = PUBLISHED["gsm8k"][0]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", {**gsm, "question": split})
    rows = tasks.load_rows(f"story,gsm8k:{tmp_path}/{{split}}.jsonl", "test", limit=2)
    assert [r["task"] for r in rows] == ["story", "story", "gsm8k"] and rows[2]["prompt"].startswith("test")
    both = tasks.load_reward(None, f"story,gsm8k:{tmp_path}/{{split}}.jsonl")
    assert both(["p"] * 2, ["#### 1003"] * 2, rows[1:]) == [0.0, 1.0]
    data = "countdown:" + write(tmp_path / "n.jsonl", *({"nums": [i], "target": i} for i in range(40)))
    train, test = (tasks.load_rows(data, split) for split in ("train", "test"))
    assert [r["target"] for r in test] == [0, 20] and len(train) == 38 and not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert [r["target"] for r in tasks.load_rows(data, "train", limit=2)] == [1, 2]
    write(tmp_path / "n.jsonl", {"nums": [1], "target": 1, "split": "train"})
    assert len(tasks.load_rows(data, "train")) == 1


# ------------------------------------------------------------------------------------------------------ sources
def test_files(tmp_path):
    line = json.dumps({"prompt": "one\u2028two", "answer": "é"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n" + line.encode())
    rows = tasks.load_rows(str(tmp_path / "a.jsonl"), "train")  # a byte order mark, Windows line ends, and U+2028 within a text
    assert [r["prompt"] for r in rows] == ["one\u2028two"] * 2 and rows[1]["where"].endswith("a.jsonl, line 3") and rows[0]["task"] == "a"
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}')
    for bad, message in [(f"{tmp_path}/b.jsonl", "utf-8"), (str(tmp_path), "directory"), (f"{tmp_path}/no.jsonl", "No such file"), ("a" * 5000, "no such task"), ("", "directory"),
                         ("gsm9k", "gsm8k"), ("story:x", "no such task"), ("gsm8k:nothing", "no such task"), ("gsm8k,nothing", "no such task"), ("gsm8k:no.jsonl", "No such file"), ("a" * 5000 + ".jsonl", "too long")]:
        with pytest.raises(BadInput, match=message) as error:
            tasks.load_rows(bad, "train")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("line,message", [
    ("{", "line 2: not JSON"), ("[" * 100000, "line 2: not JSON"), ("1" * 5000, "line 2: "), ("3", "line 2: not a JSON object"), ({}, "line 2: no 'prompt'"), ({"prompt": " "}, "line 2"),
    ({"prompt": None}, "line 2"), ({"prompt": {}}, "line 2"), ({"prompt": "\ud800"}, "line 2"), ({"prompt": [{"role": "user", "content": ""}]}, "line 2"),
    ({"prompt": [{"role": "user", "content": None}]}, "line 2"), ({"prompt": [{"content": "x"}]}, "line 2"), ({"prompt": ["x"]}, "line 2"), ({"prompt": True}, "line 2")])
def test_bad_rows(tmp_path, line, message):
    with pytest.raises(BadInput, match=message):
        tasks.load_rows(write(tmp_path / "a.jsonl", {"prompt": "fine"}, line), "train")


def test_https(monkeypatch):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        assert 0 < timeout <= 120
        return io.BytesIO((json.dumps(PUBLISHED["gsm8k"][0]) + '\n\n{"question": "q", "answer": "#### 5"}\n').encode())
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for data in ("gsm8k", "gsm8k:https://a.b/{split}.jsonl"):
        rows = tasks.load_rows(data, "test")
        assert len(rows) == 2 and rows[1]["where"].endswith("test.jsonl, line 3") and asked[-1].startswith("https://") and asked[-1].endswith("test.jsonl")
    assert [r["prompt"] for r in tasks.load_rows("https://a.b/c.jsonl", "train", limit=1, prompt_key="question")] == [PUBLISHED["gsm8k"][0]["question"]]
    count = len(asked)
    with pytest.raises(BadInput, match="https"):
        tasks.load_rows("http://a.b/c.jsonl", "train")
    assert len(asked) == count  # not even asked for
    for error in (urllib.error.URLError("no network"), TimeoutError(), ConnectionResetError(), urllib.error.HTTPError("https://a", 404, "Not Found", {}, None), ValueError("bad address")):
        monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: (_ for _ in ()).throw(error))
        with pytest.raises(BadInput, match="pass --data gsm8k:FILE.jsonl") as caught:
            tasks.load_rows("gsm8k", "train")
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: io.BytesIO(b"\xff\xfe<html>"))
    with pytest.raises(BadInput, match="fetch it yourself"):
        tasks.load_rows("https://a.b/c.jsonl", "train")


def test_hub_datasets(monkeypatch):
    asked = []

    def load_dataset(name, configuration=None, split=None, streaming=False):
        asked.append((name, configuration, split, streaming))
        if split not in ("train", "validation", "test"):
            raise ValueError(f"Unknown split {split}\nmore")
        return [{"prompt": "one", "answer": "1", **PUBLISHED["commongen"][0]}]
    splits = ["train", "validation", "test"]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=lambda *name: splits))
    monkeypatch.setattr(tasks, "offline", lambda: False)
    assert tasks.load_rows("owner/some-set:main", "train")[0]["answer"] == "1" and asked[-1] == ("owner/some-set", "main", "train", False)
    assert tasks.load_rows("owner/some-set", "test", limit=3)[0]["where"] == "owner/some-set (test), row 1" and asked[-1] == ("owner/some-set", None, "test", True)
    assert tasks.load_rows("commongen", "test")[0]["answer"]["words"] and asked[-1][0] == "allenai/common_gen" and asked[-1][2] == "validation"
    assert tasks.load_rows("commongen:my/copy:x", "train") and asked[-1] == ("my/copy", "x", "train", False)
    with pytest.raises(BadInput, match="line 1|row 1"):
        tasks.load_rows("owner/some-set", "train", prompt_key="q")
    splits[:] = ["train"]  # every 20th row is the test
    assert tasks.load_rows("owner/some-set", "test") and asked[-1][2] == "train"
    with pytest.raises(BadInput, match="no prompts for the train split"):
        tasks.load_rows("owner/some-set", "train")
    splits[:] = ["train", "validation"]
    assert tasks.load_rows("owner/some-set", "test") and asked[-1][2] == "validation"
    splits[:] = ["dev", "test"]
    monkeypatch.setattr(tasks, "offline", lambda: True)
    with pytest.raises(BadInput, match="the hub cannot be reached.*pass"):
        tasks.load_rows("owner/some-set", "train")
    monkeypatch.setattr(tasks, "offline", lambda: False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match="pip install datasets"):
        tasks.load_rows("owner/some-set", "train")
    with pytest.raises(BadInput, match="countdown:FILE.jsonl"):
        tasks.load_rows("countdown", "train")


# ---------------------------------------------------------------------------------------- checks of rows and scores
@pytest.mark.parametrize("reward,bad", [
    ("math", [None, "no number", "", [], {}, float("nan")]), ("math_strict", ["#### none", True]), ("coverage", [None, [], "", [""], [1], {"words": None}]),
    ("countdown", [None, "24", {"nums": [1]}, {"nums": "1 2", "target": 3}, {"nums": [], "target": 3}, {"nums": [1.5], "target": 3}, {"nums": [1], "target": None}]),
    ("rouge", [None, "", " ", [], [None], 3, {"references": []}]), ("instruct", [None, 5]), ("summarize", [None, "x", {"who": "anna"}])])
def test_unusable_answers_are_found_at_the_start(tmp_path, reward, bad):
    for answer in bad:
        data = write(tmp_path / "a.jsonl", "", {"prompt": "p", "answer": answer})
        rows = tasks.load_rows(data, "train")
        with pytest.raises(BadInput, match="a.jsonl, line 2: "):
            tasks.check_rows(rows, tasks.load_reward(reward, data))


def test_miniature_rows_pass_the_check():
    for task in tasks.TASKS:
        tasks.check_rows(tasks.load_rows(task, "train"), tasks.load_reward(None, task))
    tasks.check_rows([{"prompt": "p"}], lambda prompts, responses, rows: [0.0])  # a bare function has no check


def module(tmp_path, text):
    (tmp_path / "my.py").write_text(text)
    return f"{tmp_path}/my.py:score"


@pytest.mark.parametrize("body,message", [
    ("return [1 / len(r) for r in responses]", "prompt 'q2' and the response ''.*ZeroDivisionError"), ("return [0.5]", "1 values for 3"), ("return None", "TypeError"), ("return 3", "TypeError"),
    ("return ['1'] * 3", "'1' is not a finite"), ("return [None] * 3", "None is not"), ("return [float('nan')] * 3", "nan is not"), ("return [1, float('inf'), 1]", "prompt 'q2'"),
    ("return [10 ** 400] * 3", "not a finite"), ("return [[1.0]] * 3", "not a finite"), ("return [1j] * 3", "not a finite"), ("return [0, 0, 2]", "prompt 'q3'.*declared range"), ("return [-0.1, 0, 0]", "declared range")])
def test_bad_scores(tmp_path, body, message):
    reward = tasks.load_reward(module(tmp_path, f"def score(prompts, responses, rows):\n    if len(rows) == 1 and {'ZeroD' not in message}: return [0]\n    {body}\nscore.range = (0, 1)\n"), "x.jsonl")
    with pytest.raises(BadInput, match=message) as error:
        reward(["q1", "q2", "q3"], ["x" * 5000, "", "z"], [{}] * 3)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and "my.py:score" in str(error.value)


def test_infinite_scores_are_refused_without_a_range_too():
    for bad in (float("inf"), -float("inf"), float("nan"), 1e300):  # the last is infinite in float32
        with pytest.raises(BadInput, match="finite"):
            tasks.check_scores([bad], ["p"], ["r"], "mine", (-float("inf"), float("inf")))


def test_good_scores_and_declared_range(tmp_path):
    make = "import torch, numpy as np\nfrom fractions import Fraction\ndef score(prompts, responses, rows):\n    return "
    for body, expected in [("[True, 2, 0.5]", [1, 2, 0.5]), ("torch.tensor([1., 2., 3.])", [1, 2, 3]), ("np.array([1, 2, 3])", [1, 2, 3]), ("(x for x in (1, 2, 3))", [1, 2, 3]),
                           ("[torch.tensor(1.), np.float32(2), Fraction(1, 2)]", [1, 2, 0.5])]:
        reward = tasks.load_reward(module(tmp_path, make + body), "x.jsonl")
        scores = reward(["p"] * 3, ["r"] * 3, [{}] * 3)
        assert scores == expected and all(type(s) is float for s in scores) and reward.range is None and reward.check_row is None
    reward = tasks.load_reward(module(tmp_path, make + "[0]\nscore.range = (-1, 1)\ndef check(row):\n    if row['answer'] != 1: raise ValueError('no one')\nscore.check_row = check"), "x.jsonl")
    assert reward.range == (-1, 1)
    with pytest.raises(BadInput, match="f, line 3: no one"):
        tasks.check_rows([{"answer": 1, "where": "f, line 1"}, {"answer": 2, "where": "f, line 3"}], reward)


@pytest.mark.parametrize("text,message", [("import nothing_of_this_name", "ModuleNotFoundError"), ("def score(:", "SyntaxError"), ("x = 1\n1 / 0", "line 2"), ("raise SystemExit(3)", "SystemExit"), ("score = 3", "no function")])
def test_reward_files_that_cannot_be_imported(tmp_path, text, message):
    with pytest.raises(BadInput, match=message):
        tasks.load_reward(module(tmp_path, text), "x.jsonl")
    with pytest.raises(BadInput, match="countdown"):
        tasks.load_reward("maths", "x.jsonl")
    with pytest.raises(BadInput, match="needs --reward"):
        tasks.load_reward(None, "openai/gsm8k")


# --------------------------------------------------------------------------------------------------- reward models
WORDS = ["<pad>", "<s>", "</s>", "user", "assistant"] + [f"w{i}" for i in range(5, 40)]
TEMPLATE = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"


def save_reward_model(folder, template=TEMPLATE, pad=True, labels=1):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS, bos_token="<s>", eos_token="</s>", **({"pad_token": "<pad>"} if pad else {}))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    model = LlamaForSequenceClassification(LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        num_labels=labels, pad_token_id=0 if pad else None, initializer_range=0.5)).eval()
    model.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("pad", [True, False])
def test_reward_model(tmp_path, monkeypatch, template, pad):
    monkeypatch.setattr(tasks, "default_device", lambda: "cpu")
    model, tokenizer = save_reward_model(tmp_path / "rm", template, pad)
    reward = tasks.load_reward(f"hf:{tmp_path}/rm", "x.jsonl")
    prompts = [f"w{5 + i % 9} w7" for i in range(20)] + [[{"role": "user", "content": "w5 w7"}]]
    responses = ["w9 " * (1 + i % 5) + f"w{20 + i % 7}" for i in range(20)] + [""]
    scores = reward(prompts, responses, [{}] * 21)  # more than one batch, of different lengths
    assert reward.range == (-float("inf"), float("inf")) and len({round(s, 4) for s in scores}) > 15
    for prompt, response, score in zip(prompts, responses, scores):  # each as if it were alone
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        words = f"<s> user {text} </s> <s> assistant {response} </s>" if template else f"{text} {response}"
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([tokenizer.convert_tokens_to_ids(words.split())])).logits[0, 0].item()
        assert score == pytest.approx(expected, abs=1e-4)
    if template:  # the end of a conversation that is too long is what the model gets to read
        ids = tokenizer.convert_tokens_to_ids((" w9" * 500 + " w8 </s>").split())[-64:]
        assert reward(["w5"], ["w9 " * 500 + "w8"], [{}]) == [pytest.approx(model(input_ids=torch.tensor([ids])).logits[0, 0].item(), abs=1e-4)]


def test_reward_model_with_text_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "default_device", lambda: "cpu")
    word_tokenizer(WORDS, pad_token="<pad>").save_pretrained(tmp_path / "rm")
    BertForSequenceClassification(BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1, max_position_embeddings=16)).save_pretrained(tmp_path / "rm")
    scores = tasks.load_reward(f"hf:{tmp_path}/rm", "x.jsonl")(["w5", "w5 w6"], ["w7", "w8 " * 90], [{}] * 2)
    assert len(scores) == 2 and np.isfinite(scores).all()


def test_what_is_no_reward_model(tmp_path):
    save_reward_model(tmp_path / "two", labels=2)
    random_llama(40, num_labels=1).save_pretrained(tmp_path / "lm")  # its head would be random
    word_tokenizer(WORDS, pad_token="<pad>").save_pretrained(tmp_path / "lm")
    for name, message in [("two", "cannot load.*one output"), ("lm", "cannot load.*one output"), ("none", "cannot load")]:
        with pytest.raises(BadInput, match=message) as error:
            tasks.load_reward(f"hf:{tmp_path}/{name}", "x.jsonl")
        assert "\n" not in str(error.value)
