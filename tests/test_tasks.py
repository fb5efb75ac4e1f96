"""Rewards: right answers in varied phrasing pass, everything else fails, and nothing crashes."""

import gzip
import io
import json
import urllib.request
from types import SimpleNamespace

import pytest

from data.prompts import TASKS, load_rows
from data.rewards import instruct, reason, story, summarize, value
from data.scoring import encode, load_reward
from dqo import BadInput

CITY = {"answer": ["lisbon", "rome"]}
TRIP = {"answer": {"who": "anna", "what": "hat", "color": "red", "where": "market",
                   "when": "monday", "weather": "rain"}}
TALE = {"answer": ["dog", "park"]}
N24 = {"answer": 24}
NONSENSE = [
    "", " ", "\n", ".", "٣", "²⁴", "ＲＯＭＥ", "💥", "a" * 10000, "((((((((", "9" * 5000, "\x00",
    "None", "[]", "1/0", "__import__('os')",
]

RIGHT = {
    "instruct": ["lisbon", "Lisbon", " rome .", "Rome."],
    "summarize": [
        "anna bought a hat at the market .",
        "Anna bought a hat at the market.",
        "anna got a red hat in the market on monday .",
        "at the market , anna purchased a hat .",
        "on monday , anna bought a hat at the market .",
        "a hat was bought by anna at the market .",
        "at the market, a red hat was purchased by anna despite the rain on monday.",
        "despite the rain, anna bought a hat on monday at the market .",
    ],
    "story": [
        "the dog sleeps in the park .",
        "The old dog sleeps quietly in the little park.",
        "the dog runs alone by the park",
    ],
    "reason": [
        "4 * 6", "20 + 4", "(2 + 1) * 8", "30 - 6", "48 / 2", "1/2*48", "4*6.", "- 1 + 25",
        "3 * 2 * 4 * 1", "2-(-22)",
    ],
}

WRONG = {
    "instruct": ["tokyo", "lisbon rome", "lisbon lisbon", "lisbon is", "lisbo", "the"],
    "summarize": [
        "ben bought a hat at the market .",
        "anna bought a lamp at the market .",
        "anna bought a hat at the mall .",
        "anna bought a hat .",
        "anna bought a blue hat at the market .",
        "anna bought a hat at the market on friday .",
        "anna bought a hat at the market and went home .",
        "anna bought a hat at the market at the market .",
        "on monday anna bought a hat at the market on monday .",
        "leo bought a hat at the market .",
        "anna bought a hat at the market despite the rain despite the rain .",
        "anna bought a hat at the market despite the cold .",
        "anna bought a hat at the market . anna bought a hat at the market .",
        "at the market , at the market , anna bought a hat .",
    ],
    "story": [
        "the dog sleeps in the house .",
        "the cat sleeps in the park .",
        "the dog in the park .",
        "dog park",
        "the dog sleeps in the park . the",
        "the dog sleeps in the park . the dog sleeps in the park .",
        "the park sleeps in the dog .",
        "the dog sleeps the park .",
        "the old the dog sleeps in the park .",
    ],
    "reason": [
        "24", "4 * 5", "4 * 6 + 1", "4 * 6 =", "4 * 6 = 24", "4 * 6 6", "20 +", "4 ** 6",
        "9**9**9**9**9", "24 // 1", "1 / 0", "24.0 + 0", "x + 24", "+24", "-(-24)",
        "4 * 6 # right", "4 * 6 lisbon", "0x18 + 0", "(4 * 6", "2_4 + 0", "٤ * ٦",
        "(" * 90 + "24", "1" * 90 + "*1",
    ],
}

REWARD_AND_ROW = [(instruct, CITY), (summarize, TRIP), (story, TALE), (reason, N24)]


@pytest.mark.parametrize("reward,row", REWARD_AND_ROW)
def test_right_answers(reward, row):
    right = RIGHT[reward.__name__]
    assert [reward(row, r) for r in right] == [1.0] * len(right)


@pytest.mark.parametrize("reward,row", REWARD_AND_ROW)
def test_near_misses_and_nonsense(reward, row):
    wrong = WRONG[reward.__name__] + NONSENSE
    assert [(r, reward(row, r)) for r in wrong] == [(r, 0.0) for r in wrong]


def test_value_is_exact():
    assert value("1/3*3") == 1
    assert value("10/4") == 2.5
    assert value("1/3") != 0.3333333333333333
    assert value("7 - 2 - 1") == 4
    assert value("-3 + 5") == 2
    assert value("2 * (3 + 4)") == 14


@pytest.mark.parametrize("task", TASKS)
def test_files(task):
    train, test = load_rows(task, "train"), load_rows(task, "test")
    train_prompts, test_prompts = {r["prompt"] for r in train}, {r["prompt"] for r in test}
    assert len(train_prompts) >= 90 and len(test_prompts) >= 16
    assert not train_prompts & test_prompts
    assert len(train_prompts) == len(train) and len(test_prompts) == len(test)  # no prompt twice
    assert {r["task"] for r in train + test} == {task}


def test_hard_categories():
    """instruct tests 8 categories that training asks for with one or two other verbs only."""
    def asked(split):
        found = {}
        for row in load_rows("instruct", split):
            verb, _, category = row["prompt"].partition(" ")
            found.setdefault(category, set()).add(verb)
        return found

    train, test = asked("train"), asked("test")
    assert len(train) == 24 and len(test) == 8
    for category, verbs in train.items():
        tested = test.get(category, set())
        assert not verbs & tested
        assert (len(verbs), len(tested)) in [(6, 0), (1, 3), (2, 3)]
    assert {len(train[category]) for category in test} == {1, 2}


def test_targets_that_training_never_shows():
    train, test = ({row["answer"] for row in load_rows("reason", split)}
                   for split in ("train", "test"))
    assert len(train) == 20 and len(test) == 10 and not train & test
    assert len(load_rows("reason", "test")) == 30  # three verbs each
    first = load_rows("reason", "test", limit=10)  # a short table has them all
    assert {row["answer"] for row in first} == test


def test_categories():
    """Each asks for one word and has at least 30; none of the tested ones is trained."""
    train, test = load_rows("categories", "train"), load_rows("categories", "test")
    assert (len(train), len(test)) == (8, 20)
    reward = load_reward(None, "categories")
    for record in train + test:
        words = record["answer"]
        assert len(set(words)) == len(words) >= 30
        assert words == [word.lower() for word in words if word.isalpha()]
        asked = record["prompt"]
        assert reward([asked] * 4, [words[0], f"{words[-1].title()}.", "A " + words[0], "yes"],
                      [record] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}


def test_loading(tmp_path):
    file = tmp_path / "mine.jsonl"
    two = [{"role": "user", "content": "two"}]
    file.write_text(
        '{"q": "one", "a": 1}\n'
        "\n"
        '{"q": [{"role": "user", "content": "two"}], "split": "test"}\n'
    )
    rows = load_rows(str(file), "test", prompt_key="q", answer_key="a")
    assert [r["prompt"] for r in rows] == ["one", two]
    assert [r["answer"] for r in rows] == [1, None]
    assert [r["prompt"] for r in load_rows(str(file), "train", prompt_key="q")] == ["one"]
    assert len(load_rows("story,reason", "train", limit=5)) == 10


@pytest.mark.parametrize("text,message", [
    ("", "no prompts"),
    ('{"q": 1\n', "line 1: not JSON"),
    ('{"q": "a"}\n[1]\n', "line 2: not a JSON object"),
    ('{"p": "a"}', "--prompt-key"),
    ('{"q": ""}', "line 1"),
    ('{"q": 5}', "line 1"),
    ('{"q": []}', "line 1"),
    ('{"q": ["x"]}', "line 1"),
])
def test_files_that_cannot_be_used(tmp_path, text, message):
    file = tmp_path / "mine.jsonl"
    file.write_text(text)
    with pytest.raises(BadInput, match=message):
        load_rows(str(file), "train", prompt_key="q")


@pytest.mark.parametrize("data", ["stories", "story,stories", "FOLDER/none.jsonl", "FOLDER"])
def test_what_is_no_data(tmp_path, data):
    with pytest.raises(BadInput):
        load_rows(data.replace("FOLDER", str(tmp_path)), "train")


def test_rewards_by_name_and_from_a_file(tmp_path):
    rows = load_rows("story", "train", limit=1) + load_rows("reason", "train", limit=1)
    n = rows[1]["answer"]
    each = load_reward(None, "story,reason")
    assert each([None] * 2, ["the x", f"{n - 1} + 1"], rows) == [0.0, 1.0]
    assert load_reward("reason", "any.jsonl")([None], [f"{n} * 1"], rows[1:]) == [1.0]
    file = tmp_path / "my.py"
    file.write_text(
        "def longer(prompts, responses, rows):\n"
        "    return [len(r) for r in responses]\n"
    )
    assert load_reward(f"{file}:longer", "x.jsonl")(["p"], ["abc"], [{}]) == [3]
    for bad in ("nothing", f"{file}:shorter", f"{tmp_path}/no.py:f", "x:y"):
        with pytest.raises(BadInput):
            load_reward(bad, "x.jsonl")
    with pytest.raises(BadInput, match="needs --reward"):
        load_reward(None, "x.jsonl")


PACKED = '{"prompt": "eins ä", "answer": 1}\n{"prompt": "zwei", "answer": 2}\n'.encode()


@pytest.mark.parametrize("name, content", [
    ("mine.jsonl.gz", gzip.compress(PACKED)),
    ("mine.json.gz", gzip.compress(PACKED)),
    ("mine.jsonl", gzip.compress(PACKED)),  # the content says so
    ("mine.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + PACKED)),  # a byte order mark
    ("mine.jsonl.gz", PACKED),  # unpacked by the browser, under the old name
], ids=["jsonl.gz", "json.gz", "jsonl", "order mark", "unpacked"])
def test_packed_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    rows = load_rows(str(tmp_path / name), "train")
    assert [(r["prompt"], r["answer"], r["task"]) for r in rows] == [
        ("eins ä", 1, "mine"),
        ("zwei", 2, "mine"),
    ]
    assert rows[1]["where"].endswith(f"{name}, line 2")


def test_packed_files_from_the_web(monkeypatch):
    content = io.BytesIO(gzip.compress(PACKED))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kw: content)
    assert len(load_rows("https://a.b/c.jsonl.gz", "train")) == 2


@pytest.mark.parametrize("name, content", [
    ("mine.jsonl.gz", gzip.compress(PACKED)[:-9]),
    ("owner/name.jsonl.gz", None),  # no data set of the hub
], ids=["cut", "missing"])
def test_packed_files_that_cannot_be_used(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"--data {name}: ") as error:
        load_rows(name, "train")
    assert "\n" not in str(error.value)
    assert "datasets" not in str(error.value)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("content, text", [
    ("make 24", "make 24"),
    (parts("make 24"), "make 24"),
    (parts("make", " ", "24"), "make 24"),
])
def test_parts_of_a_message_are_joined(tmp_path, content, text):
    """The row stays as it was published."""
    row = {"prompt": [{"role": "user", "content": content, "name": "anna"}], "answer": 24}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (record,) = load_rows(str(tmp_path / "a.jsonl"), "train")
    assert record["prompt"] == [{"role": "user", "content": text, "name": "anna"}]
    assert record["row"]["prompt"] == row["prompt"]


@pytest.mark.parametrize("content", [
    parts(),
    parts("", " "),
    parts("a") + [{"type": "image"}],
    parts("a") + ["b"],
    [{"type": "text"}],
    [{"type": "text", "text": None}],
])
def test_parts_that_are_no_text(tmp_path, content):
    row = {"prompt": [{"role": "user", "content": content}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadInput, match="a.jsonl, line 1: message 1 of 'prompt'"):
        load_rows(str(tmp_path / "a.jsonl"), "train")


def test_a_reward_model_reads_an_answer_that_was_begun_as_one():
    """Not as two turns of the assistant."""
    seen = []

    def apply_chat_template(messages, **kw):
        seen.append(messages)
        return [1]
    tokenizer = SimpleNamespace(chat_template="x", apply_chat_template=apply_chat_template)
    user, begun = dict(role="user", content="24?"), dict(role="assistant", content="It is ")
    encode(tokenizer, [user, begun], "4 * 6", 9)
    encode(tokenizer, [user], "4 * 6", 9)
    assert seen == [
        [user, dict(role="assistant", content="It is 4 * 6")],
        [user, dict(role="assistant", content="4 * 6")],
    ]
