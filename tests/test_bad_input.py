"""What a user can get wrong: one line that says what, where, and what to do; exit status 2; and
nothing is left behind."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, word_tokenizer
from test_runs import EVAL, TRAIN, command, files, here  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM

import dqo

GOOD = '{"prompt": "make 24", "answer": 24}\n'
SCORE = "def score(prompts, responses, rows):\n    return "
OBJECTIVE = "def shaped(quality, L, rollout, alpha=1.0):\n    return "
FILES = {  # written when a command names them
    "good.jsonl": GOOD,
    "empty.jsonl": "",
    "broken.jsonl": GOOD + '{"prompt": \n',
    "list.jsonl": GOOD + '["make 24"]\n',
    "latin.jsonl": GOOD.encode() + b'{"prompt": "caf\xe9", "answer": 1}\n',
    "unnamed.jsonl": GOOD + '{"question": "make 24"}\n',
    "picture.jsonl": GOOD + '{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}\n',
    "words.jsonl": GOOD + '{"prompt": "make it", "answer": "no number"}\n',
    "half.jsonl": '{"prompt": "make 24", "answer": 24, "split": "train"}\n',
    "plain.txt": "x",
    "lacks.py": "store = 1\n",
    "nan.py": SCORE + "[float('nan')] * len(rows)\n",
    "short.py": SCORE + "[0.5] * 2\n",
    "large.py": SCORE + "[len(x) for x in responses]\n",
    "root.py": OBJECTIVE + "(quality - 2).sqrt()\n",
}


def tiny(folder, without=(), **changes):
    """A copy of data/tiny, less some files. changes: to its JSON files, by name."""
    shutil.copytree(REPO / "data/tiny", folder, ignore=shutil.ignore_patterns(*without))
    for name, change in changes.items():
        path = Path(folder, f"{name}.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def mamba(folder):
    small = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **small))
    model.save_pretrained(folder)
    word_tokenizer([f"w{i}" for i in range(60)], eos_token="w2").save_pretrained(folder)


def sick(folder):
    """Of not a single finite weight."""
    model, tokenizer = dqo.load_model("data/tiny")
    for p in model.parameters():
        torch.nn.init.constant_(p, torch.nan)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def running(folder):
    """A run after steps 9 and 10, not ended."""
    for step in (9, 10):
        tiny(f"{folder}/step-{step}")
    Path(folder, "run.json").write_text("{}")


FOLDERS = {
    "nothing": Path.mkdir,
    "unweighted": lambda folder: tiny(folder, without=["model.safetensors"]),
    "deeper": lambda folder: tiny(folder, config=dict(num_hidden_layers=5)),
    "quantised": lambda folder: tiny(folder, config=dict(quantization_config=dict(
        quant_method="bitsandbytes", load_in_4bit=True))),
    "endless": lambda folder: tiny(
        folder, config=dict(eos_token_id=None), generation_config=dict(eos_token_id=None),
        tokenizer_config=dict(eos_token=None)),
    "mamba": mamba,
    "sick": sick,
    "running": running,
}
MATH = "train.py --reward gsm8k --k 3 --steps 1 --max-new-tokens 8 --data"

BAD = [  # a command, and what its message must say
    # prompts: the file, the line, what is needed
    (f"{MATH} none.jsonl", "none.jsonl", "no such file"),
    (f"{MATH} empty.jsonl", "empty.jsonl", "no rows"),
    (f"{MATH} broken.jsonl", "broken.jsonl, line 2", "JSON"),
    (f"{MATH} list.jsonl", "list.jsonl, line 2", "JSON object"),
    (f"{MATH} latin.jsonl", "latin.jsonl, line 2", "UTF-8"),
    (f"{MATH} unnamed.jsonl", "unnamed.jsonl, line 2", '"prompt"', "question"),
    (f"{MATH} picture.jsonl", "picture.jsonl, line 2", "text"),
    (f"{MATH} half.jsonl", "half.jsonl", "test split"),
    (f"{MATH} words.jsonl", "words.jsonl, line 2", "'no number'", "a number"),
    (f"{MATH} good.jsonl --max-new-tokens 200", "prompt", "--max-new-tokens"),
    (f"{EVAL} data/tiny --max-new-tokens 200", "prompt", "--max-new-tokens"),
    (f"{MATH} stories", "stories", "instruct", "OWNER/NAME"),
    # rewards and objectives
    ("train.py --data good.jsonl", "--reward", "file.py:function"),
    (f"{TRAIN} --reward maths", "maths", "gsm8k", "file.py:function"),
    (f"{TRAIN} --reward hf:no/such", "hf:no/such"),
    (f"{TRAIN} --reward lacks.py:score", "lacks.py", "no function score"),
    (f"{TRAIN} --reward lacks.py", "lacks.py: no such file.py:function"),
    (f"{TRAIN} --objective ppo", "ppo", "dqo_quality", "rivals", "file.py:function"),
    (f"{TRAIN} --objective none.py:shaped", "none.py:shaped"),
    # values
    (f"{EVAL} data/tiny --learning-rate 1", "--learning-rate"),
    (f"{TRAIN} --k 2", "--k 2", "3"),
    (f"{TRAIN} --k 1 --objective grpo", "--k 1", "2"),
    (f"{TRAIN} --lr nan", "--lr nan"),
    (f"{TRAIN} --baseline median", "--baseline", "median", "none"),
    (f"{TRAIN} --template [1]", "--template", "[1]"),
    (f"{EVAL} data/tiny --n 0", "--n"),
    (f"{TRAIN} --reward none", "--reward", "none has none"),
    # models and encoders
    (f"{TRAIN} --model no/such", "--model no/such"),
    (f"{EVAL} no/such", "no/such"),
    (f"{TRAIN} --model nothing", "nothing"),
    (f"{TRAIN} --model unweighted", "unweighted", "safetensors"),
    (f"{TRAIN} --model deeper", "deeper", "no weights for", "layers.4"),
    (f"{TRAIN} --model quantised", "quantised", "cannot be trained"),
    (f"{TRAIN} --model mamba", "past_key_values"),
    (f"{TRAIN} --model endless", "end token"),
    (f"{TRAIN} --model sick", "finite"),
    (f"{TRAIN} --encoder no/such", "--encoder no/such"),
    (f"{EVAL} running", "running has not ended", "running/step-10"),
    # files
    (f"{TRAIN} --out plain.txt", "plain.txt exists", "--resume"),
    (f"{TRAIN} --out plain.txt/run", "plain.txt/run"),
    (f"{EVAL} data/tiny --json plain.txt", "plain.txt"),
    ("train.py --resume nothing", "--resume nothing", "run.json"),
    # packages
    (f"{MATH} owner/name", "pip install datasets"),
    (f"{TRAIN} --lora 4", "pip install peft"),
]


def refused(capsys, line):
    """What a command says that ends with exit status 2: one line, usage aside."""
    for name in {word for part in line.split() for word in part.split(":")[0].split("/")}:
        if name in FOLDERS:
            FOLDERS[name](Path(name))
        elif name in FILES:
            text = FILES[name]
            Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = files(".")
    capsys.readouterr()
    assert command(line) == 2
    said = [x for x in capsys.readouterr().err.splitlines() if x and "it/s]" not in x]  # the bar
    if said and said[0].startswith("usage: "):  # argparse repeats it first
        said = [x for x in said[1:] if not x.startswith(" ")]
    return said, before


@pytest.mark.parametrize("case", BAD, ids=[" ".join(case[0].split()[-2:]) for case in BAD])
def test_bad_input(case, capsys, monkeypatch):
    """Before anything is measured, trained or written."""
    line, *fragments = case
    for package in ("datasets", "peft"):
        if f"install {package}" in fragments[0]:  # as if it were not
            monkeypatch.setitem(sys.modules, package, None)
    said, before = refused(capsys, line)
    assert len(said) == 1, said
    assert said[0].startswith(line.split()[0] + ": ")
    for fragment in fragments:
        assert fragment in said[0]
    assert files(".") == before


NUMBERS = [  # what only a step brings to light
    ("--reward nan.py:score", "nan.py:score", "finite", "nan"),
    ("--reward short.py:score", "short.py:score", "6 finite numbers"),
    ("--reward large.py:score --objective dqo_quality", "[0, 1]", "squash"),
    ("--objective root.py:shaped", "not finite", "tell a story with", "qualities"),
]


@pytest.mark.parametrize("case", NUMBERS, ids=[case[0] for case in NUMBERS])
def test_numbers_that_a_step_cannot_use(case, capsys):
    """In one line, before the weights move; the run goes on as soon as the file is mended."""
    flags, *fragments = case
    (said,), _ = refused(capsys, f"{TRAIN} --steps 1 {flags} --out run")
    for fragment in fragments:
        assert fragment in said
    assert not list(Path("run").glob("step-*")) and not Path("run/metrics.jsonl").exists()
    for name in FILES:
        if Path(name).exists():
            Path(name).write_text(SCORE + "[0.5] * len(rows)\n" + OBJECTIVE + "quality\n")
    assert command("train.py --resume run") == 0
    assert dqo.load_model("run")
