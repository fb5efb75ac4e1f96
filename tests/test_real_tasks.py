"""Real tasks: where prompts may come from, what the rewards count as right, and that no bad input
gives a traceback."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import eval as evaluation
from conftest import needs, random_llama, word_tokenizer
from data import report, scoring, sources
from data.metrics import group_metrics
from data.prompts import READY, TASKS, load_rows, prepare
from data.rewards import countdown, coverage, math_answer, math_strict, rouge
from data.scoring import check_rows, check_scores, function_in, load_reward, threshold_of
from dqo import BadInput

ROOT = Path(__file__).resolve().parent.parent
NONSENSE = [
    "", " ", "\n", ".", "####", "\\boxed{", "\\boxed{}", "٧٢", "⁷²", "七十二", "💥", "a" * 10000,
    "9" * 5000, "#### " + "9" * 5000, "3/0", "#### 3/0", "\x00", "{" * 5000, "-" * 5000,
    "1 " * 5000, "\\boxed{" * 500, "None", "nan", "inf", "<answer>", "<answer></answer>", "=",
]


def write(path, *rows):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------- rewards
STRICT = [  # answer, right responses, wrong ones
    ("so 48+24 = <<48+24=72>>72 clips.\n#### 72",
     ["#### 72", "####72", "#### $72", "#### 72.00", "so 5.\n#### 5\n#### 72", "x\n#### 72 \n\n"],
     ["72", "\\boxed{72}", "#### 72 apples", "#### 72\nand so on", "#### 72 \\boxed{72}",
      "#### 72 💥",
      "#### 72%", "#### 2 * 36 = 72", "#### 144/2", "so #### 72", "#### 72 73", "#### 73",
      "#### -72",
      "#### 7,2", "#### 72e", "#### 7.2e1", "##### 72", "#### ٧٢", "#### 72\n####"]),
    ("#### 1,234.5", ["#### 1234.50", "#### 1,234.5", "#### $1,234.5"], ["#### 1,2345",
     "#### 1.234,5"]),
    ("#### -3", ["#### -3", "#### −3", "#### –3", "#### $-3", "#### -$3", "#### -3.0"],
     ["#### 3", "#### 7-3", "#### --3", "#### - -3"]),
    (0.75, ["#### 0.75", "#### .75", "#### 0.750"], ["#### 3/4", "#### 0.7500000000000001"]),
    (1000000, ["#### 1,000,000", "#### 1000000"], ["#### 1 000 000", "#### 1,000,00", "#### 1e6"]),
    ("4", ["#### 4"], ["#### 2^4", "2^4", "#### (3, 4)", "#### 4 cm^2", "#### 4 000"]),
    ("72.", ["#### 72"], []),
]


@pytest.mark.parametrize("answer,right,wrong", STRICT)
def test_math_strict(answer, right, wrong):
    row = {"answer": answer}
    assert [r for r in right if math_strict(row, r) != 1] == []
    assert [r for r in wrong + NONSENSE if math_strict(row, r) != 0] == []


MATH = [  # answer, right responses, wrong ones
    ("so 48+24 = <<48+24=72>>72 clips.\n#### 72", [
        "#### 72", "#### $72", "#### 72.00", "**#### 72**", "#### **72**", "#### 72%",
        "\\boxed{72}",
        "so $\\boxed{72}$.", "The answer is 72.", "72", "2 * 36 = 72", "#### 2 * 36 = 72",
        "\\boxed{x = 72}", "I think 5, no, 72!", "#### 5\n#### 72", "$72$", "144/2",
        "#### \\boxed{72}",
        "\\boxed{\\frac{144}{2}}", "#### 72 €", "\\(72\\)", "答案是72。", "答えは72です",
        "#### 72 apples",
        "\\boxed{72 \\text{ km}^2}", "#### 7.2e1", "\\boxed{8 \\cdot 9}", "sqrt(5184)",
    ], [
        "#### 73", "#### -72", "7.2", "720", "72 73", "#### 73 72", "\\boxed{73} 72", "72 or 73",
        "72/5",
        "x72", "172", "1,072", "#### 72 = 73", "\\boxed{72} \\boxed{7}", "答案是73。",
        "\\boxed{72^2}",
    ]),
    (r"10,\!080", ["10,080", "\\boxed{10080}", r"\boxed{10,\!080}", r"#### 10\,080"], ["80", "10"]),
    (r"10\,080", ["10080"], ["80", "90", "10"]),
    ("(3, 4)", ["(3,4)", "\\boxed{\\left(3, 4\\right)}"], ["4", "3", "\\boxed{(4, 3)}"]),
    ("[0, 1)", ["\\boxed{[0,1)}"], ["1", "0", "\\boxed{[0,1]}"]),
    ("1.2e6", ["1200000", "1,200,000", "1.2E+6", "\\boxed{1.2 \\times 10^6}"], ["6/5", "1.2", "6"]),
    ("5e-3", ["0.005", "\\frac{5}{1000}"], ["5", "-3"]),
    (1e22, ["\\boxed{10^{22}}"], ["22", "1"]),
    ("1 / 2", ["0.5", "\\frac12", "\\boxed{1/2}", "1 / 2"], ["1", "2", "1 1/2"]),
    ("1 1/2", ["3/2", "1.5", "\\boxed{1\\frac{1}{2}}"], ["1", "1/2", "11/2"]),
    ("–3", ["-3", "−3", "\\boxed{-\\frac{6}{2}}", "The answer is –3."], ["3", "#### 3"]),
    ("20 cm^2", ["20", "\\boxed{20\\text{ cm}^2}", "#### 20 cm^2", "20 cm²"], ["2", "20^2", "400"]),
    ("5\\text{ m}^3", ["5", "5 m"], ["3", "125"]),
    ("答案是72。", ["72", "#### 72"], ["7", "2"]),
    ("16", ["2^4", "\\boxed{4^2}"], ["4", "2"]),
    ("x^2 - 1", ["\\boxed{(x-1)(x+1)}", "#### x^2-1"], ["1", "2", "\\boxed{x^2+1}"]),
    ("\\text{Monday}", ["\\boxed{\\text{Monday}}"], ["\\boxed{\\text{Sunday}}", "72"]),
]


@needs("math_verify")
@pytest.mark.parametrize("answer,right,wrong", MATH)
def test_math(answer, right, wrong):
    row = {"answer": answer}
    nonsense = [r for r in NONSENSE if r != "٧٢"]
    assert [r for r in right if math_answer(row, r) != 1] == []
    assert [r for r in wrong + nonsense if math_answer(row, r) != 0] == []


@needs("math_verify")
@pytest.mark.parametrize("answer", [
    "none", "no number", "", "nan", "seventy-two", "between 3 and 4", "1e4000", "1.2.3", "8 000",
    "9^9^9^9",
    "1000000!", "step 1\nstep 2", float("nan"), None, True, [72], {"a": 1},
])
def test_answers_that_math_does_not_understand(answer):
    with pytest.raises(ValueError, match="needs mathematics"):
        math_answer({"answer": answer}, "72")


BUSY = [
    "9^9^9^9", "\\boxed{9^{9^{9^9}}}", "9**9**9**9", "10^(10^10)", "\\boxed{10^{10^{10}}}",
    "1000000!",
    "\\boxed{1000000!}", "\\boxed{(10^6)!}", "\\boxed{10!!!}", "$(1000000)_{5}$",
    "\\boxed{\\sum_{n=1}^{10^9} n}", "\\boxed{\\binom{1000000}{500000}}", "word " * 4000,
    "$x$ " * 5000,
    "1+" * 9000 + "1", "\\boxed{" * 3000, "{" * 20000, "\\boxed{" + "{" * 150 + "7" + "}" * 151,
    "\\boxed{" + "(" * 150 + "7" + ")" * 150 + "}", "\\boxed{" + "\\sqrt{2+" * 40 + "2" + "}" * 41,
]


@needs("math_verify")
@pytest.mark.parametrize("response", BUSY, ids=range(len(BUSY)))
def test_nothing_keeps_the_parser_busy(response):
    for answer in ("72", "\\sqrt{2}", "x + 1"):
        row = {"answer": answer}
        math_answer(row, "1")  # imports it, reads the answer
        began = time.monotonic()
        assert math_answer(row, response) == 0
        assert time.monotonic() - began < 1


@needs("math_verify")
def test_what_the_look_does_not_catch_the_clock_does():
    began = time.monotonic()
    assert math_answer({"answer": "72"}, "\\boxed{(x + y + z + w)^{60}}") == 0
    assert time.monotonic() - began < 4


@needs("math_verify")
def test_math_in_a_thread_and_beside_handlers_of_signals():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    with ThreadPoolExecutor(2) as pool:
        scores = list(pool.map(lambda r: math_answer({"answer": "72"}, r), ["72", "144/2", "71"]))
    assert scores == [1, 1, 0]
    assert math_answer({"answer": "72"}, "\\boxed{72.0}") == 1
    assert handlers == [signal.getsignal(s)
                        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]


@pytest.mark.parametrize("reward,data,package", [
    ("math", "x.jsonl", "math_verify"),
    ("coverage", "x.jsonl", "simplemma"),
    (None, "commongen", "simplemma"),
])
def test_a_missing_package_is_named_at_the_start(monkeypatch, reward, data, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=f"pip install {package.replace('_', '-')}") as error:
        load_reward(reward, data)
    assert "\n" not in str(error.value)
    load_reward("rouge", data)  # which needs none


RIGHT_37 = [
    "57 - (8 + 12)",
    "57-8-12",
    "37 = 57 - 8 - 12",
    "57 - 8 - 12 = 37.",
    "Answer: 57 - 12 - 8",
    "let me see: 5 * 3\nno.\n\n57 − 8 − 12",
    "**57 - 8 - 12**",
    "<think>8 + 12</think><answer>57 - 8 - 12</answer>",
    "<answer>1</answer> no <answer> 57 - 8 - 12 = 37 </answer>\n",
    "-8 + 57 - 12",
    "$57 - 8 - 12$",
]
WRONG_37 = [
    "57 - 8",
    "57 - 8 - 12 + 0",
    "57 - 8 - 12 - 8 + 8",
    "57 - 20",
    "37",
    "37 = 37",
    "57 - 8 - 12 = 38",
    "57 - 8 - 12 = 37 = 37",
    "57 - 8 - 12 right",
    "5712 - 8",
    "57 - 8 - 12\nand so on",
    "<answer>57 - 8 - 12</answer> and so on",
    "<answer>57 - 8 - 12",
    "57 - 8 - 12 # 💥",
    "57 - 8 - 12 = 40 - 3",
    "__import__('os')",
    "57 // 8 - 12",
    "9**9**9",
    "57 - 8 - ١٢",
    "(57 - 8 - 12",
    "57 - 8 - 12 = 57 - 8 - 12",
    "8 + 12 + 57",
]


@pytest.mark.parametrize("row", [
    {"answer": None, "nums": [57, 8, 12], "target": 37},
    {"answer": {"nums": [12, 8, 57], "target": 37}},
    {"answer": None, "meta": {"nums": [8, 12, 57], "target": 37}},
    {"answer": None, "row": {"nums": [57, 8, 12], "target": 37}},
    {"answer": None, "row": {"meta": {"nums": [8, 12, 57], "target": 37}}},
])
def test_countdown(row):
    assert [r for r in RIGHT_37 if countdown(row, r) != 1] == []
    assert [r for r in WRONG_37 + NONSENSE if countdown(row, r) != 0] == []


def test_countdown_is_exact():
    row = {"answer": None, "nums": [8, 3, 8, 3], "target": 24}
    assert countdown(row, "8 / (3 - 8 / 3)") == 1  # which no float would give
    assert countdown(row, "8 * 3 * (8 - 7)") == 0


SENTENCES = """
bring ball dog: The dog brought the ball back
give flower girl: a boy gave the girl a flower .
sit bench park: An old man is sitting on a bench in the park.
tooth brush child: Children brushed their teeth
knife chef cut: The chef was cutting bread with sharp knives.
leaf fall tree: Leaves fall from the trees in autumn .
leave house dog: she left the house with her dog
feel wind face: He felt the wind on his face.
think man chair: the man thought for a while in his chair
shoot ball player: A player shot the ball into the net.
rise sun mountain: The sun rose over the mountains
win team game: Our team won the game !
go store walk: They have gone for a walk to the store.
ride horse woman: A woman rode her horse along the beach.
teach class student: Ms. Lee taught the students in her class.
wear hat boy: The boy wore a red hat, and smiled.
throw frisbee catch dog: The dog catches the frisbee that his owner threw.
stand field look: I stood and looked across the field, peacefully.
swim pool kid: Kids swam in the pool all day
drive car road: He has driven his car down the road at 5 p.m. every day.
write letter desk: She is writing letters at her desk.
bake cake oven: We are baking cakes in the oven
skate rink girl: the girls skated around the rink
snow cover mountain: A snow-covered mountain under snow that fell at night.
wife husband dance: The husbands danced with their wives.
shelf book put: put the books on the shelves
wolf run forest: Wolves are running through the forest.
hang wall picture: A picture hung on the wall.
hold hand couple: The couple's hands held tight.
dog fence jump: My dog's friend jumped over the fence...
strike ball bat: The batter struck the ball with a bat.
sing stage singer: The singer sang on stage.
ski skier slope: A skier skis down the slope
surf wave surfer: the surfers surfed a big wave .
sleep bed cat: Cats slept in the bed
eat plate food: The food on the plate was eaten.
build sand castle: A castle was built from sand.
buy ticket movie: "I bought a ticket for the movie!" he shouted.
speak crowd man: The man spoke to the crowd.
break window ball: The ball broke the window
choose shirt store: He chose a shirt in the store.
bite apple girl: The girl bit into an apple.
dig hole garden: A hole was dug in the garden
lead horse barn: The farmer led the horses to the barn.
shake hand man: Two men shook hands.
big fish catch: He caught a bigger fish than I did.
foot ball kick: He kicked the ball with both feet.
mouse cheese eat: Mice ate the cheese.
woman man dance: women and men dancing
tie rope boat: The boat is tied up, tying the rope took long.
lie grass sun: He is lying in the grass under the sun
lay table cloth: She laid a cloth on the table.
fly kite sky: A kite flew high in the sky.
draw picture pencil: The picture was drawn with a pencil.
blow candle cake: Blowing candles out on the cake, she made a wish
set table plate: He is setting plates on the table.
cry baby mother: The baby cried until its mother came.
carry box stair: She carries boxes up the stairs.
hot dog grill: Hot dogs sizzle on the grill.
run race runner: Runners run a race in the U.S. every spring.
fisherman net boat: Fishermen pull a net into the boat.
grind coffee bean: Coffee beans are ground.
tomato potato cook: Cooking potatoes and tomatoes for 3.5 hours
wind scarf neck: She wound a scarf around her neck.
"""


BOXED_37 = [
    "\\boxed{57 - 8 - 12}", "so $\\boxed{57 - 8 - 12}$.", "\\[\n\\boxed{57-8-12}\n\\]",
    "**\\boxed{57-8-12}**",
    "\\(\\boxed{57 - (8 + 12)}\\).", "\\boxed{57 - 8 - 12 = 37}",
    "<answer>\\boxed{57-8-12}</answer>",
    "\\boxed{\\left(57 - 8\\right) - 12}", "Answer: $57 - 8 - 12$", "\\boxed{57\\,-\\,8 - 12}",
]
NOT_BOXED_37 = [
    "\\boxed{37}", "\\boxed{57 - 8}", "\\boxed{57 - 8 - 12} or so", "\\boxed{57 - 8 - 12",
    "\\boxed{}",
    "\\boxed{57 - 8 - 12}\nyes", "\\boxed{57 - 8 - 12} \\boxed{1}", "\\frac{57 - 8 - 12}{1}",
    "\\frac{" * 4000 + "1", "\\boxed{9^9^9}",
]


def test_countdown_in_latex():
    row = {"answer": {"nums": [12, 8, 57], "target": 37}}
    assert [r for r in BOXED_37 if countdown(row, r) != 1] == []
    assert [r for r in NOT_BOXED_37 if countdown(row, r) != 0] == []
    row = {"answer": {"nums": [3, 8, 4, 6], "target": 36}}
    right = [
        "\\boxed{3 \\times 8 \\times \\frac{6}{4}}", "3 \\cdot8 \\cdot \\dfrac{6}{4}",
        "\\frac{3\\times8\\times 6}{4}", "\\boxed{3 × 8 × 6 ÷ 4}", "3 \\times 8 \\times 6 \\div4",
        "\\boxed{\\frac{\\frac{3 \\cdot 8}{4}}{1} \\cdot 6}",
    ]
    assert [countdown(row, r) for r in right] == [1, 1, 1, 1, 1, 0]  # the last has a 1 too many


@needs("simplemma")
def test_coverage():
    row = {"answer": ["ski", "Mountain", "carry", "stop", "bake", "sit"]}
    right = [
        "He skis on a mountain, carries bread, stopped baking and sat.",
        "Skiing down mountains they carried what we stop to bake, sitting!",
        "He skis on a mountain, carries bread, stopped baking and sat",  # as many people write
        "Mr. Lee skis on a mountain and carries bread, stopped baking and sat at 5 p.m. today .",
    ]
    wrong = [
        "He skis on a mountain, carries bread, stopped baking.",
        "He sat. He skis on a mountain, carries bread, stopped baking.",
        "He sat . he skis on a mountain , carries bread , stopped baking .",
        "He skis on a mountain,\ncarries bread, stopped baking and sat.",
        "He skis on a mountain, carries bread, stopped baking and sat" + " and" * 40 + ".",
        "He skis on a mountain, carries bread, stopped baking and sat on the",  # cut short
        "Skimming mountainous carryalls, stopgap bakery sitcom.",
        "ski-mountain carry stop bake sit.",
        "ski, mountain, carry, stop, bake and sit",
        "1. ski 2. mountain 3. carry 4. stop 5. bake 6. sit",
    ]
    assert [r for r in right if coverage(row, r) != 1] == []
    assert [r for r in wrong + NONSENSE if coverage(row, r) != 0] == []


@needs("simplemma")
@pytest.mark.parametrize("word,sentence,expected", [
    ("dog", "The dogs here.", 1),
    ("dog", "The dog's tail.", 1),
    ("watch", "The watches here.", 1),
    ("play", "The played here.", 1),
    ("play", "The plays here.", 1),
    ("bake", "The baked here.", 1),
    ("run", "The running here.", 1),
    ("cry", "The cries here.", 1),
    ("child", "The children here.", 1),
    ("cover", "A snow-covered hill.", 1),
    ("hot dog", "A dog in hot sun.", 1),
    ("hot dog", "He eats hot-dogs.", 1),
    ("café", "Two cafés.", 1),
    ("surf", "A surfer here.", 1),
    ("ski skier", "A skier skis.", 1),
    ("ski skier", "A skier on snow.", 0),  # each word needs its own
    ("be", "A bee.", 0),
    ("dog", "A hotdog.", 0),
    ("man", "So many hats.", 0),
    ("car", "A carpet here.", 0),
])
def test_forms_of_a_word(word, sentence, expected):
    assert coverage({"answer": [word]}, sentence) == expected


@needs("simplemma")
def test_coverage_takes_what_people_write():
    """64 sentences over more than 60 irregular and regular words, as people write for CommonGen."""
    rejected = []
    for line in SENTENCES.strip().splitlines():
        words, _, sentence = line.partition(": ")
        if coverage({"answer": words.split()}, sentence) != 1:
            rejected.append(line)
    assert rejected == []


@pytest.mark.parametrize("answer,response,expected", [
    ("The cat sat.", "the cat sat.", 1),
    ("the cat sat", "stocks fell", 0),
    ("a b c d", "a x c", 2 * 2 / (4 + 3)),  # the longest common subsequence is a c
    (["x y", "a b c d"], "a b c d", 1),
    ({"references": ["", None, "q", "a"]}, "a", 1),
    ("a", "", 0),
])
def test_rouge(answer, response, expected):
    assert rouge({"answer": answer}, response) == expected


def test_rouge_lies_between_0_and_1():
    assert all(0 <= rouge({"answer": "a b"}, r) <= 1 for r in NONSENSE)


# ------------------------------------------------------------------------------------ ready tasks
PUBLISHED = {  # one row each as published
    "gsm8k": {
        "question": "Ann has 3 hats and buys 1,000. How many?",
        "answer": "3 + 1000 = <<3+1000=1003>>1003\n#### 1,003",
    },
    "commongen": {
        "concept_set_idx": 0,
        "concepts": ["ski", "mountain", "skier"],
        "target": "Skier skis down the mountain",
    },
    "dolly": {
        "instruction": "Who wrote it?",
        "context": "Ann wrote it.",
        "response": "Ann did.",
        "category": "closed_qa",
    },
    "cnn_dailymail": {
        "article": "LONDON (CNN) A cat sat.",
        "highlights": "A cat sat .\nIn London .",
        "id": "x",
    },
    "countdown": {"target": 37, "nums": [57, 8, 12]},
}
NEEDED = {  # the columns without which there is no prompt or no answer
    "gsm8k": ["question", "answer"],
    "commongen": ["concepts"],
    "dolly": ["instruction", "response"],
    "cnn_dailymail": ["article", "highlights"],
    "countdown": ["target", "nums"],
}
IN_PROMPT = {
    "gsm8k": ["Ann has 3 hats", "####"],
    "commongen": ["ski, mountain, skier"],
    "dolly": ["Who wrote it?", "Ann wrote it."],
    "cnn_dailymail": ["LONDON"],
    "countdown": ["37", "57"],
}
RIGHT_AND_WRONG = {  # something the default reward counts as right, and something it does not
    "gsm8k": ("3 + 1000\n#### 1003", "#### 1003 hats"),
    "commongen": ("A skier skis on a mountain.", "A skier skis."),
    "dolly": ("Ann did.", "no"),
    "cnn_dailymail": ("a cat sat . in london .", "stocks fell"),
    "countdown": ("57 - 8 - 12", "57 - 8 - 12 = 38"),
}


WITH_PACKAGES = [
    pytest.param(task, marks=needs("simplemma")) if task == "commongen" else task for task in READY
]


@pytest.mark.parametrize("task", WITH_PACKAGES)
def test_ready_task(task, tmp_path):
    data = f"{task}:" + write(tmp_path / "mine.jsonl", PUBLISHED[task])
    (row,) = load_rows(data, "test")
    assert row["task"] == task
    assert all(part in row["prompt"] for part in IN_PROMPT[task])
    reward = load_reward(None, data)
    check_rows([row], reward)
    scores = reward([row["prompt"]] * 2, list(RIGHT_AND_WRONG[task]), [row] * 2)
    assert scores == [1.0, 0.0]
    assert reward.range == (0, 1)


@pytest.mark.parametrize("task,key", [(task, key) for task in READY for key in NEEDED[task]])
def test_rows_that_a_ready_task_cannot_use(task, key, tmp_path):
    published = PUBLISHED[task]
    lacking = {k: v for k, v in published.items() if k != key}
    for row in (lacking, {**published, key: None}, {**published, key: {}}, {**published, key: []}):
        data = f"{task}:" + write(tmp_path / "mine.jsonl", published, row)
        for split in ("test", "train"):
            with pytest.raises(BadInput, match="mine.jsonl, line 2: .*needs"):
                load_rows(data, split)


def test_commongen_references_are_merged(tmp_path):
    row = PUBLISHED["commongen"]
    other, dog = {**row, "target": "Other."}, {**row, "concepts": ["dog"]}
    data = "commongen:" + write(tmp_path / "c.jsonl", row, other, dog)
    rows = load_rows(data, "train")
    found = [r["answer"]["references"] for r in rows]
    assert found == [[row["target"], "Other."], [row["target"]]]
    assert load_reward("rouge", data)(["p"], ["other."], rows[:1]) == [1.0]
    assert len(load_rows(data, "train", limit=1)[0]["answer"]["references"]) == 2


def test_mixtures_and_splits(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", {**PUBLISHED["gsm8k"], "question": split})
    data = f"story,gsm8k:{tmp_path}/{{split}}.jsonl"
    rows = load_rows(data, "test", limit=2)
    assert [r["task"] for r in rows] == ["story", "story", "gsm8k"]
    assert rows[2]["prompt"].startswith("test")
    assert load_reward(None, data)(["p"] * 2, ["#### 1003"] * 2, rows[1:]) == [0.0, 1.0]


def test_held_out_rows(tmp_path):
    def targets(rows):
        return [r["row"]["target"] for r in rows]

    puzzles = [{"nums": [i], "target": i} for i in range(40)]
    data = "countdown:" + write(tmp_path / "n.jsonl", *puzzles)
    train, test = load_rows(data, "train"), load_rows(data, "test")
    assert targets(test) == [0, 20]
    assert len(train) == 38
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert targets(load_rows(data, "train", limit=2)) == [1, 2]
    write(tmp_path / "n.jsonl", {"nums": [1], "target": 1, "split": "train"})
    assert len(load_rows(data, "train")) == 1


# ------------------------------------------------------------------------------ rows of your own
def test_a_record_has_five_keys(tmp_path):
    data = write(tmp_path / "a.jsonl", {"prompt": "p", "answer": 1, "ids": [7], "more": 2})
    (record,) = load_rows(data, "train")
    filled_in = {"prompt": "p", "answer": 1, "task": "a"}
    row = {**filled_in, "ids": [7], "more": 2}
    assert record == {**filled_in, "where": f"{data}, line 1", "row": row}
    (record,) = load_rows("gsm8k:" + write(tmp_path / "g.jsonl", PUBLISHED["gsm8k"]), "train")
    assert record["prompt"] != PUBLISHED["gsm8k"]["question"]
    assert record["row"] == {**PUBLISHED["gsm8k"], "prompt": record["prompt"], "task": "gsm8k"}


OWN = {"task": "mine", "where": "here", "ids": [1, 2], "row": 7, "meta": {"a": None}}
COMPARES = """
def score(prompts, responses, rows):
    return [float(row == EXPECTED) for row in rows]
def check(row):
    if row != EXPECTED: raise ValueError(row)
score.check_row = check
"""


@pytest.mark.parametrize("published,keys,whole", [
    ({**OWN, "prompt": "p"}, {}, {"answer": None}),
    ({**OWN, "prompt": "p", "answer": 1}, {}, {}),
    ({**OWN, "q": "p"}, {"prompt_key": "q"}, {"prompt": "p", "answer": None}),
    ({**OWN, "q": "p", "gold": 1}, {"prompt_key": "q", "answer_key": "gold"},
     {"prompt": "p", "answer": 1}),
    ({**OWN, "q": "p", "gold": 1, "prompt": 5, "answer": [6]},
     {"prompt_key": "q", "answer_key": "gold"}, {}),
])
def test_own_columns_reach_an_own_reward_unchanged(tmp_path, published, keys, whole):
    """Whatever a column is called, and though a record has keys of that name."""
    data = write(tmp_path / "a.jsonl", published)
    records = load_rows(data, "train", **keys)
    assert records[0]["task"] == "a" and records[0]["where"].endswith("a.jsonl, line 1")
    expected = f"EXPECTED = {({**published, **whole})!r}"
    reward = load_reward(module(tmp_path, expected + COMPARES), data)
    check_rows(records, reward)
    assert reward(["p"], ["r"], records) == [1.0]
    with pytest.raises(BadInput, match="line 1"):  # the check does look
        check_rows([{**records[0], "row": {}}], reward)


def test_records_of_a_library_user_may_be_plain_dicts(tmp_path):
    body = "def score(prompts, responses, rows):\n    return [row['mine'] for row in rows]\n"
    reward = load_reward(module(tmp_path, body), "x.jsonl")
    assert reward(["p"] * 2, ["r"] * 2, [{"mine": 3}, {"mine": 4, "row": 1}]) == [3, 4]
    assert load_reward("math_strict", "x.jsonl")(["p"], ["#### 72"], [{"answer": 72}]) == [1.0]


# ---------------------------------------------------------------------------------------- sources
def test_a_file_with_strange_line_ends(tmp_path):
    """A byte order mark, Windows line ends, and U+2028 within a text."""
    line = json.dumps({"prompt": "one\u2028two", "answer": "é"}, ensure_ascii=False).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    rows = load_rows(str(tmp_path / "a.jsonl"), "train")
    assert [r["prompt"] for r in rows] == ["one\u2028two"] * 2
    assert rows[1]["where"].endswith("a.jsonl, line 3")
    assert rows[0]["task"] == "a"


@pytest.mark.parametrize("data,message", [
    ("FOLDER/b.jsonl", "utf-8"),
    ("FOLDER", "directory"),
    ("FOLDER/no.jsonl", "No such file"),
    ("a" * 5000, "no such task"),
    ("", "directory"),
    ("gsm9k", "gsm8k"),
    ("story:x", "no such task"),
    ("gsm8k:nothing", "no such task"),
    ("gsm8k,nothing", "no such task"),
    ("gsm8k:no.jsonl", "No such file"),
    ("a" * 5000 + ".jsonl", "too long"),
])
def test_what_is_no_source(tmp_path, data, message):
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(BadInput, match=message) as error:
        load_rows(data.replace("FOLDER", str(tmp_path)), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line,message", [
    ("{", "line 2: not JSON"),
    ("[" * 100000, "line 2: not JSON"),
    ("1" * 5000, "line 2: "),
    ("3", "line 2: not a JSON object"),
    ({}, "line 2: no 'prompt'"),
    ({"prompt": " "}, "line 2"),
    ({"prompt": None}, "line 2"),
    ({"prompt": {}}, "line 2"),
    ({"prompt": "\ud800"}, "line 2"),
    ({"prompt": [{"role": "user", "content": ""}]}, "line 2"),
    ({"prompt": [{"role": "user", "content": None}]}, "line 2"),
    ({"prompt": [{"content": "x"}]}, "line 2"),
    ({"prompt": ["x"]}, "line 2"),
    ({"prompt": True}, "line 2"),
])
def test_bad_rows(tmp_path, line, message):
    with pytest.raises(BadInput, match=message):
        load_rows(write(tmp_path / "a.jsonl", {"prompt": "fine"}, line), "train")


def test_https(monkeypatch):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        assert 0 < timeout <= 120
        other = '\n\n{"question": "q", "answer": "#### 5"}\n'
        return io.BytesIO((json.dumps(PUBLISHED["gsm8k"]) + other).encode())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for data in ("gsm8k", "gsm8k:https://a.b/{split}.jsonl"):
        rows = load_rows(data, "test")
        assert len(rows) == 2
        assert rows[1]["where"].endswith("test.jsonl, line 3")
        assert asked[-1].startswith("https://") and asked[-1].endswith("test.jsonl")
    rows = load_rows("https://a.b/c.jsonl", "train", limit=1, prompt_key="question")
    assert [r["prompt"] for r in rows] == [PUBLISHED["gsm8k"]["question"]]
    count = len(asked)
    with pytest.raises(BadInput, match="https"):
        load_rows("http://a.b/c.jsonl", "train")
    assert len(asked) == count  # not even asked for


@pytest.mark.parametrize("error", [
    urllib.error.URLError("no network"),
    TimeoutError(),
    ConnectionResetError(),
    urllib.error.HTTPError("https://a", 404, "Not Found", {}, None),
    ValueError("bad address"),
])
def test_https_that_fails(monkeypatch, error):
    def urlopen(*args, **kw):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(BadInput, match="pass --data gsm8k:FILE.jsonl") as caught:
        load_rows("gsm8k", "train")
    assert "\n" not in str(caught.value)


def test_https_that_gives_no_text(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: io.BytesIO(b"\xff\xfe<html>"))
    with pytest.raises(BadInput, match="fetch it yourself"):
        load_rows("https://a.b/c.jsonl", "train")


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` package whose every data set is the same row. `asked`: what it was asked for;
    `splits`: those it has."""
    asked, splits = [], ["train", "validation", "test"]

    def load_dataset(name, configuration=None, split=None, streaming=False):
        asked.append((name, configuration, split, streaming))
        if split not in ("train", "validation", "test"):
            raise ValueError(f"Unknown split {split}\nmore")
        return [{"prompt": "one", "answer": "1", **PUBLISHED["commongen"]}]

    package = types.SimpleNamespace(
        load_dataset=load_dataset, get_dataset_split_names=lambda *name: splits
    )
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setattr(sources, "offline", lambda: False)
    return types.SimpleNamespace(asked=asked, splits=splits)


def test_hub_datasets(hub):
    assert load_rows("owner/some-set:main", "train")[0]["answer"] == "1"
    assert hub.asked[-1] == ("owner/some-set", "main", "train", False)
    rows = load_rows("owner/some-set", "test", limit=3)
    assert rows[0]["where"] == "owner/some-set (test), row 1"
    assert hub.asked[-1] == ("owner/some-set", None, "test", True)
    assert load_rows("commongen", "test")[0]["answer"]["words"]
    assert hub.asked[-1][0] == "allenai/common_gen" and hub.asked[-1][2] == "validation"
    assert load_rows("commongen:my/copy:x", "train")
    assert hub.asked[-1] == ("my/copy", "x", "train", False)
    with pytest.raises(BadInput, match="line 1|row 1"):
        load_rows("owner/some-set", "train", prompt_key="q")


def test_splits_of_hub_datasets(hub):
    hub.splits[:] = ["train"]  # every 20th row is the test
    assert load_rows("owner/some-set", "test")
    assert hub.asked[-1][2] == "train"
    with pytest.raises(BadInput, match="no prompts for the train split"):
        load_rows("owner/some-set", "train")
    hub.splits[:] = ["train", "validation"]
    assert load_rows("owner/some-set", "test")
    assert hub.asked[-1][2] == "validation"


def test_no_hub(hub, monkeypatch):
    with pytest.raises(BadInput, match="ValueError: Unknown split dev .*; pass") as error:
        load_rows("owner/some-set", "dev")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(sources, "offline", lambda: True)
    with pytest.raises(BadInput, match="the hub cannot be reached.*pass"):
        load_rows("owner/some-set", "train")
    monkeypatch.setattr(sources, "offline", lambda: False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match="pip install datasets"):
        load_rows("owner/some-set", "train")
    with pytest.raises(BadInput, match="countdown:FILE.jsonl"):
        load_rows("countdown", "train")


# ------------------------------------------------------------------- checks of prompts and answers
def test_prompts_are_checked_and_left_as_they_are(model, tokenizer):
    record = {"prompt": "w5 w6", "where": "a.jsonl, line 1"}
    prepare([record], model, tokenizer, 62)  # a context of 64
    assert set(record) == {"prompt", "where"}
    with pytest.raises(BadInput, match="a.jsonl, line 1: 2 prompt tokens .* context of 64"):
        prepare([record], model, tokenizer, 63)
    tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    prepare([record], model, tokenizer, 62, plain=True)
    with pytest.raises(BadInput, match="a.jsonl, line 1: .*no user here"):
        prepare([record], model, tokenizer, 62)


@pytest.mark.parametrize("reward,answers", [
    pytest.param("math", [None, "no number", "", [], {}, float("nan"), "8 000"],
                 marks=needs("math_verify")),
    ("math_strict", [None, "#### none", True, "no", "#### 72 apples", "#### 7\nx", "3, 4", [5]]),
    ("math_strict", ["1.2e6", "1 / 2", "2^4", "20 cm^2", "8 000", r"10,\!080", float("nan")]),
    pytest.param("coverage", [None, [], "", [""], [1], {"words": None}],
                 marks=needs("simplemma")),
    ("countdown", [None, "24", {"nums": [1]}, {"nums": "1 2", "target": 3}]),
    ("countdown", [{"nums": [], "target": 3}, {"nums": [1.5], "target": 3}]),
    ("countdown", [{"nums": [1], "target": None}]),
    ("rouge", [None, "", " ", [], [None], 3, {"references": []}]),
    ("instruct", [None, 5]),
    ("summarize", [None, "x", {"who": "anna"}]),
])
def test_unusable_answers_are_found_at_the_start(tmp_path, reward, answers):
    for answer in answers:
        data = write(tmp_path / "a.jsonl", "", {"prompt": "p", "answer": answer})
        rows = load_rows(data, "train")
        with pytest.raises(BadInput, match="a.jsonl, line 2: "):
            check_rows(rows, load_reward(reward, data))


def test_miniature_rows_pass_the_check():
    for task in TASKS:
        check_rows(load_rows(task, "train"), load_reward(None, task))
    check_rows([{"prompt": "p"}], lambda prompts, responses, rows: [0.0])  # which has no check


# --------------------------------------------------------------------------------- checks of scores
def module(tmp_path, text):
    (tmp_path / "my.py").write_text(text)
    return f"{tmp_path}/my.py:score"


@pytest.mark.parametrize("body,message", [
    ("return [0.5]", "1 values for 3"),
    ("return None", "TypeError"),
    ("return {1: 0.5, 0: 0.5, 2: 0.5}", "a dict is no list"),  # whose keys would be the scores
    ("import collections; return collections.Counter([0, 1, 2])", "a Counter is no list"),
    ("return {0, 0.5, 1}", "a set is no list"),  # in any order
    ("return 3", "TypeError"),
    ("return ['1'] * 3", "'1' is not a finite"),
    ("return [None] * 3", "None is not"),
    ("return [float('nan')] * 3", "nan is not"),
    ("return [1, float('inf'), 1]", "prompt 'q2'"),
    ("return [10 ** 400] * 3", "not a finite"),
    ("return [[1.0]] * 3", "not a finite"),
    ("return [1j] * 3", "not a finite"),
    ("return [0, 0, 2]", "prompt 'q3'.*declared range"),
    ("return [-0.1, 0, 0]", "declared range"),
])
def test_bad_scores(tmp_path, body, message):
    """What is wrong with three responses at once need not be wrong with one alone."""
    refuses(tmp_path, f"    if len(rows) == 1: return [0]\n    {body}\n", message)


def test_a_reward_that_raises(tmp_path):
    """The message is about the response at which it raises, not about the first of the batch."""
    message = "prompt 'q2' and the response ''.*ZeroDivisionError"
    refuses(tmp_path, "    return [1 / len(r) for r in responses]\n", message)


def refuses(tmp_path, body, message):
    text = f"def score(prompts, responses, rows):\n{body}score.range = (0, 1)\n"
    reward = load_reward(module(tmp_path, text), "x.jsonl")
    with pytest.raises(BadInput, match=message) as error:
        reward(["q1", "q2", "q3"], ["x" * 5000, "", "z"], [{}] * 3)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert "my.py:score" in str(error.value)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), 1e300])
def test_infinite_scores_are_refused_without_a_range_too(bad):  # the last is infinite in float32
    with pytest.raises(BadInput, match="finite"):
        check_scores([bad], ["p"], ["r"], "mine", (-float("inf"), float("inf")))


RETURNS = """
import torch, numpy as np
from fractions import Fraction
def score(prompts, responses, rows):
    return """


@pytest.mark.parametrize("body,expected", [
    ("[True, 2, 0.5]", [1, 2, 0.5]),
    ("torch.tensor([1., 2., 3.])", [1, 2, 3]),
    ("np.array([1, 2, 3])", [1, 2, 3]),
    ("(x for x in (1, 2, 3))", [1, 2, 3]),
    ("[torch.tensor(1.), np.float32(2), Fraction(1, 2)]", [1, 2, 0.5]),
])
def test_good_scores(tmp_path, body, expected):
    reward = load_reward(module(tmp_path, RETURNS + body), "x.jsonl")
    scores = reward(["p"] * 3, ["r"] * 3, [{}] * 3)
    assert scores == expected
    assert all(type(s) is float for s in scores)
    assert reward.range is None and reward.check_row is None


def test_declared_range_and_check(tmp_path):
    body = """[0]
score.range = (-1, 1)
def check(row):
    if row['answer'] != 1: raise ValueError('no one')
score.check_row = check
"""
    reward = load_reward(module(tmp_path, RETURNS + body), "x.jsonl")
    assert reward.range == (-1, 1)
    rows = [{"answer": 1, "where": "f, line 1"}, {"answer": 2, "where": "f, line 3"}]
    with pytest.raises(BadInput, match="f, line 3: no one"):
        check_rows(rows, reward)


@pytest.mark.parametrize("flag", ["--reward", "--objective"])
@pytest.mark.parametrize("text,message", [
    ("import nothing_of_this_name", "ModuleNotFoundError"),
    ("def score(:", "SyntaxError"),
    ("x = 1\n1 / 0", "line 2"),
    ("raise SystemExit(3)", "SystemExit"),
    ("score = 3", "no function"),
])
def test_files_that_cannot_be_imported(tmp_path, flag, text, message):
    with pytest.raises(BadInput, match=f"^{flag} .*{message}") as error:
        function_in(flag, module(tmp_path, text))
    assert "\n" not in str(error.value)
    if flag == "--reward":
        with pytest.raises(BadInput, match=message):
            load_reward(module(tmp_path, text), "x.jsonl")


MODULES = {
    "a dataclass whose annotations are deferred": """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Weights:
    length: float = 2.0
def score(prompts, responses, rows):
    return [Weights().length * len(r) for r in responses]
""",
    "a process pool": """
import concurrent.futures, multiprocessing
def twice(text):
    return 2.0 * len(text)
def score(prompts, responses, rows):
    context = multiprocessing.get_context(METHOD)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(twice, responses))
""",
    "a neighbour": """
from a_neighbour import FACTOR
def score(prompts, responses, rows):
    import another_neighbour  # not before it is needed
    return [another_neighbour.times(FACTOR, len(r)) for r in responses]
""",
    "its own name": """
import pickle, sys
def score(prompts, responses, rows):
    assert sys.modules[__name__].score is score and pickle.loads(pickle.dumps(score)) is score
    return [2.0 * len(r) for r in responses]
""",
}


LOADS_THEM = """
import os, sys
sys.path.insert(0, ROOT)
if __name__ == "__main__":
    from data.scoring import function_in, load_reward
    for path in sys.argv[1:]:
        spec = path + ":score"
        reward = load_reward(spec, "x.jsonl")
        assert reward(["p"] * 3, ["a", "bb", ""], [{}] * 3) == [2.0, 4.0, 0.0]
        assert function_in("--objective", spec) is function_in("--reward", spec)
        assert "__pycache__" not in os.listdir(os.path.dirname(path)), path
    import json, time
    assert json.dumps(1) == "1" and time.time() > 0
"""


def test_a_reward_file_is_a_module(tmp_path):
    """In a process of its own, as train.py would load it; names of other modules included."""
    paths = []
    for i, (name, method) in enumerate([
        ("my.py", "spawn"),  # a fresh interpreter has to find the module by its name
        ("my.py", "fork"), ("json.py", "fork"), ("time.py", "fork"), ("my-own v2.py", "fork"),
    ]):
        for what, text in MODULES.items():
            folder = tmp_path / f"{i} {what}"
            folder.mkdir()
            (folder / "a_neighbour.py").write_text("FACTOR = 2.0\n")
            (folder / "another_neighbour.py").write_text("def times(a, b):\n    return a * b\n")
            (folder / name).write_text(text.replace("METHOD", repr(method)))
            paths.append(str(folder / name))
    main = tmp_path / "main.py"
    main.write_text(LOADS_THEM.replace("ROOT", repr(str(ROOT))))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, str(main), *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_reward_files_of_the_same_name(tmp_path):
    """And one that was changed: each time the file that is named, as it is now."""
    for folder, factor in (("a", 1), ("b", 2), ("a", 3)):
        (tmp_path / folder).mkdir(exist_ok=True)
        text = f"def score(prompts, responses, rows):\n    return [{factor}] * len(rows)\n"
        (tmp_path / folder / "my.py").write_text(text)
        reward = load_reward(f"{tmp_path}/{folder}/my.py:score", "x.jsonl")
        assert reward(["p"], ["r"], [{}]) == [factor]
    assert sys.path[0] != str(tmp_path / "a")  # it hides nothing


def test_functions_by_file_and_name(tmp_path):
    bonus = function_in("--objective", module(tmp_path, "def score(x): return x + 1"))
    assert bonus(1) == 2
    with pytest.raises(BadInput, match="--objective my.py:f: no such objective or file.*dqo"):
        function_in("--objective", "my.py:f")


def test_what_is_no_reward():
    with pytest.raises(BadInput, match="countdown"):
        load_reward("maths", "x.jsonl")
    with pytest.raises(BadInput, match="needs --reward"):
        load_reward(None, "openai/gsm8k")


# -------------------------------------------------------------------------------- what is correct
@pytest.mark.parametrize("body,expected", [
    ("", None),
    ("score.range = (0, 1)", 1),
    ("score.range = (0, 10)", 10),  # 1 would be a tenth
    ("score.range = (-1, 1)", 1),
    ("score.range = (0, float('inf'))", None),
    ("score.threshold = 0.5", 0.5),
    ("score.range = (0, 10); score.threshold = 7", 7),
    ("score.range = (0, 1); score.threshold = None", None),
])
def test_threshold_of_an_own_reward(tmp_path, body, expected):
    text = f"def score(prompts, responses, rows):\n    return [0] * len(rows)\n{body}\n"
    spec = module(tmp_path, text)
    assert threshold_of(load_reward(spec, "x.jsonl"), "x") == expected
    assert threshold_of(load_reward(spec, "x.jsonl", 0.25), "x") == 0.25


@pytest.mark.parametrize("body,threshold,message", [
    ("score.threshold = 'high'", None, "my.py:score: score.threshold is 'high'"),
    ("score.threshold = float('nan')", None, "threshold is nan"),
    ("score.range = (0, 1); score.threshold = 2", None, "above 0, and at most at 1"),
    ("score.range = (0, 1)", 0.0, "--threshold is 0.0"),
    ("score.range = (0, 1)", 1.5, "--threshold is 1.5"),
    ("", float("inf"), "--threshold is inf"),
    ("", float("nan"), "--threshold is nan"),
])
def test_what_is_no_threshold(tmp_path, body, threshold, message):
    spec = module(tmp_path, f"def score(prompts, responses, rows):\n    return [0]\n{body}\n")
    with pytest.raises(BadInput, match=message):
        load_reward(spec, "x.jsonl", threshold)


def test_thresholds_of_tasks(tmp_path):
    assert threshold_of(load_reward("rouge", "x.jsonl"), "x") is None
    assert threshold_of(load_reward("rouge", "x.jsonl", 0.5), "x") == 0.5
    assert threshold_of(load_reward("math_strict", "x.jsonl"), "x") == 1
    mixed = load_reward(None, "story,dolly,gsm8k")
    assert [threshold_of(mixed, task) for task in ("story", "dolly", "gsm8k")] == [1, None, 1]
    assert threshold_of(load_reward(None, "story,dolly", 0.3), "dolly") == 0.3
    assert threshold_of(lambda prompts, responses, records: [0], "x") == 1  # a library user's


def test_group_metrics_with_thresholds():
    texts, phi = ["a", "b", "c", "d"], torch.eye(4)
    sum_of_parts = .7 + .2 + .1  # 0.9999999999999999
    for scores, threshold, right in [
        ([sum_of_parts, 1.0, 0.99, 0.0], 1.0, 2),
        ([1, 9.9999999, 10, 0.1 * 3 / 0.03], 10, 3),
        ([0.1 + 0.2, 0.3, 0.29, 0.5], 0.3, 3),
        ([-1.0, -0.5, -2.0, -3.0], -1.0, 2),
    ]:
        found = group_metrics(texts, scores, phi, threshold)
        assert found["distinct_correct"] == right
        assert found["pass_at"]["1"] == pytest.approx(right / 4)
    graded = group_metrics(texts, [3, 1, 2, 0], phi, None)
    assert not set(graded) & {"pass_at", "distinct_correct", "effective_diversity"}
    assert graded["max_at"] == pytest.approx({"1": 1.5, "2": 14 / 6, "4": 3})


@pytest.mark.parametrize("reward,flags,head,shown,not_shown", [
    ("[0.7 + 0.2 + 0.1] * len(rows)\nscore.range = (0, 1)", [],
     "(correct: a quality of at least 1)", ["pass@1 1.000"], ["max@1 "]),
    ("[1.0] * len(rows)\nscore.range = (0, 10)", [],
     "(correct: a quality of at least 10)", ["pass@1 0.000", "max@2 1.000"], []),
    ("[4.0] * len(rows)", [], "(correct: none, see --threshold)", ["max@1 4.000", "max@2 4.000"],
     ["pass@", "distinct correct", "effective"]),
    ("[4.0] * len(rows)", ["--threshold", "3.5"],
     "(correct: a quality of at least 3.5)", ["pass@1 1.000"], ["max@1 "]),
])
def test_the_table_says_what_is_correct(tmp_path, capsys, reward, flags, head, shown, not_shown):
    spec = module(tmp_path, f"def score(prompts, responses, rows):\n    return {reward}\n")
    files = ["--json", f"{tmp_path}/r.json", "--plot", f"{tmp_path}/p.png"]
    small = ["data/tiny", "--data", "story", "--limit", "2", "--n", "2"]
    assert evaluation.main([*small, "--reward", spec, *files, *flags]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert head in table
    assert [x for x in shown if x not in table] == []
    assert [x for x in not_shown if x in table] == []
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert ("pass_at" in result) == (result["threshold"] is not None)
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_tasks_with_a_threshold_and_without():
    about = dict(model="m", prompts=2, n=2)
    texts, phi = ["a", "b"], torch.eye(4)[:2]
    with_one, without = group_metrics(texts, [1, 0], phi), group_metrics(texts, [3, 5], phi, None)
    results = []
    for task, threshold, mean in (("a", 1.0, with_one), ("b", None, without)):
        results.append(dict(about, task=task, threshold=threshold, **mean, se=mean))
    table = report.table(results)
    assert "(correct: a quality of at least 1)" in table and "(correct: none" in table
    assert "average" in table and table.count("pass@1") == 1
    change = report.change(results, results)
    assert "pass/max@2" in change
    assert "(correct: a quality of at least 1 or none, see --threshold)" in change
    assert change.splitlines()[-2].split()[-2:] == ["-", "-"]


# ----------------------------------------------------------------------------------- reward models
WORDS = ["<pad>", "<s>", "</s>", "user", "assistant"] + [f"w{i}" for i in range(5, 40)]
TEMPLATE = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"


def save_reward_model(folder, template=TEMPLATE, pad=True, labels=1):
    torch.manual_seed(0)
    special = {"pad_token": "<pad>"} if pad else {}
    tokenizer = word_tokenizer(WORDS, bos_token="<s>", eos_token="</s>", **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        num_labels=labels,
        pad_token_id=0 if pad else None,
        initializer_range=0.5,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer


@torch.no_grad()
def score_of(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("pad", [True, False])
def test_reward_model(tmp_path, monkeypatch, template, pad):
    monkeypatch.setattr(scoring, "default_device", lambda: "cpu")
    model, tokenizer = save_reward_model(tmp_path / "rm", template, pad)
    reward = load_reward(f"hf:{tmp_path}/rm", "x.jsonl")
    prompts = [f"w{5 + i % 9} w7" for i in range(20)] + [[{"role": "user", "content": "w5 w7"}]]
    responses = ["w9 " * (1 + i % 5) + f"w{20 + i % 7}" for i in range(20)] + [""]
    scores = reward(prompts, responses, [{}] * 21)  # more than one batch, of different lengths
    assert reward.range == (-float("inf"), float("inf"))
    assert len({round(s, 4) for s in scores}) > 15
    for prompt, response, score in zip(prompts, responses, scores):  # each as if it were alone
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        if template:
            words = f"<s> user {text} </s> <s> assistant {response} </s>"
        else:
            words = f"{text} {response}"
        ids = tokenizer.convert_tokens_to_ids(words.split())
        assert score == pytest.approx(score_of(model, ids), abs=1e-4)
    if template:  # the end of a conversation that is too long is what the model gets to read
        ids = tokenizer.convert_tokens_to_ids((" w9" * 500 + " w8 </s>").split())[-64:]
        expected = pytest.approx(score_of(model, ids), abs=1e-4)
        assert reward(["w5"], ["w9 " * 500 + "w8"], [{}]) == [expected]


def test_reward_model_with_text_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "default_device", lambda: "cpu")
    word_tokenizer(WORDS, pad_token="<pad>").save_pretrained(tmp_path / "rm")
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
        max_position_embeddings=16,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    reward = load_reward(f"hf:{tmp_path}/rm", "x.jsonl")
    scores = reward(["w5", "w5 w6"], ["w7", "w8 " * 90], [{}] * 2)
    assert len(scores) == 2 and np.isfinite(scores).all()


@pytest.mark.parametrize("name,message", [
    ("two", "cannot load.*one output"),
    ("lm", "cannot load.*one output"),  # its head would be random
    ("none", "cannot load"),
])
def test_what_is_no_reward_model(tmp_path, name, message):
    save_reward_model(tmp_path / "two", labels=2)
    random_llama(40, num_labels=1).save_pretrained(tmp_path / "lm")
    word_tokenizer(WORDS, pad_token="<pad>").save_pretrained(tmp_path / "lm")
    with pytest.raises(BadInput, match=message) as error:
        load_reward(f"hf:{tmp_path}/{name}", "x.jsonl")
    assert "\n" not in str(error.value)
