"""Nothing is lost, and nothing of ours is needed: a run survives kills, signals and errors with
the very same bytes, says what changed, and its folder is an ordinary model."""

import json
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import REPO, needs, random_gpt2, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import dqo
import eval as evaluation
import train

TRAIN = "train.py --data story --limit 2 --k 3 --prompts 2 --max-new-tokens 8"
EVAL = "eval.py --data story --limit 2 --n 3"
MAIN = {"train.py": lambda: train.train(*train.parse()), "eval.py": lambda: evaluation.main()}
SIGNALS = signal.SIGINT, signal.SIGTERM
# A reward of the user's: each call runs the next line of train.txt, or of test.txt in the last
# table, so that a signal comes, or an error, exactly when a test wants it.
REWARD = """
import os, signal
from pathlib import Path

def score(prompts, responses, rows):
    script = Path(rows[0]["split"] + ".txt")
    line, _, later = script.read_text().partition("\\n") if script.exists() else ("", "", "")
    script.write_text(later)
    exec(line)
    return [len(text) / 9 for text in responses]
"""
MINE = f"{TRAIN} --reward my.py:score"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Commands run where only data/tiny is, and on one thread: two add up in another order."""
    threads, handlers = torch.get_num_threads(), [signal.getsignal(n) for n in SIGNALS]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.set_num_threads(1)
    Path("my.py").write_text(REWARD)
    Path("data").mkdir()
    Path("data/tiny").symlink_to(REPO / "data/tiny")
    yield
    torch.set_num_threads(threads)
    for n, handler in zip(SIGNALS, handlers):
        signal.signal(n, handler)


def command(line):
    """The exit status of a command; in this process, as imports take seconds."""
    words = shlex.split(line)
    try:
        with patch.object(sys, "argv", words), patch.dict(dqo.OBJECTIVES):
            evaluation.run(MAIN[words[0]])
    except SystemExit as end:
        return end.code
    finally:  # files of the user's are read anew
        for name in [name for name in sys.modules if name.startswith("own ")]:
            del sys.modules[name]
    return 0


def fork(line, event=None, which=None, count=1):
    """The same in a copy of this process. Returns its id. SIGKILL comes as Python is about to do
    something (an audit event) to a file `which` for the count-th time."""
    def hook(name, args):
        nonlocal count
        if name == event and which in str(args):
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    pid, status = os.fork(), 1
    if pid == 0:
        try:
            sys.stdout = sys.stderr = open("log", "w")
            sys.addaudithook(hook)
            status = command(line)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return pid


def ended(pid, seconds=100):
    """Its exit status, negative for the signal that ended it."""
    for _ in range(20 * seconds):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return "hangs"


def lines(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def left(run):
    """What a run leaves, times aside: the bytes of the weights, each step, each response."""
    steps = [{key: x for key, x in step.items() if key != "step_s"}
             for step in lines(f"{run}/metrics.jsonl")]
    return Path(run, "model.safetensors").read_bytes(), steps, lines(f"{run}/samples.jsonl")


def files(folder):
    return {path: path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


# ----------------------------------------------------------------------- the same bytes
@pytest.mark.parametrize("flags", [
    "",
    pytest.param("--beta 0.02 --epochs 2", marks=pytest.mark.slow),
    pytest.param("--beta 0.02 --lora 4", marks=[pytest.mark.slow, needs("peft")]),
])
def test_killed_three_times(flags):
    """SIGKILL between two logs of step 3, a half-written line behind; when the checkpoint of step
    4 has its weights and no optimizer; and when that of step 6 has all but its name."""
    line = f"{TRAIN} {flags} --data story,instruct --lr 1e-3 --steps 6 --save-every 2 " \
        "--temperature 0.4 --out"  # so cold that texts come again: their embeddings are kept, too
    assert command(f"{line} whole") == 0
    assert ended(fork(f"{line} run", "open", "samples.jsonl', 'a'", count=3)) == -9
    assert [x["step"] for x in lines("run/metrics.jsonl")] == [1, 2, 3]
    with open("run/metrics.jsonl", "a") as log:
        log.write('{"quality": 0.')
    assert ended(fork("train.py --resume run", "open", "writing/tokenizer_config.json")) == -9
    assert any(Path("run/writing").glob("*.safetensors"))
    assert not Path("run/writing/state.pt").exists()
    assert ended(fork("train.py --resume run", "os.rename", "step-6")) == -9
    assert Path("run/writing/state.pt").exists() and not Path("run/model.safetensors").exists()
    assert ended(fork("train.py --resume run")) == 0, Path("log").read_text()
    assert left("run") == left("whole")
    assert not Path("run/writing").exists()


INTERRUPTIONS = [  # what comes in the next steps, or in the last table; exit status; last step then
    ("train", "signal.raise_signal(2)", 130, 1),
    ("train", "signal.raise_signal(15)", 143, 2),
    ("train", "signal.raise_signal(2); signal.raise_signal(15)", 143, 2),  # the second: at once
    ("train", "\n1 / 0", ZeroDivisionError, 3),
    ("test", "signal.raise_signal(15)", 143, 5),  # in the last table one is enough
]


def test_interrupted_in_every_way(capsys):
    """The output says how to go on, and the run ends as one that nothing disturbed; in the last
    table the model is saved already. Runs can be moved; flags beside --resume are kept."""
    assert command(f"{MINE} --steps 5 --bf16 --out whole") == 0
    line = f"{MINE} --steps 5 --bf16 --out run"
    for split, script, status, step in INTERRUPTIONS:
        capsys.readouterr()
        Path(f"{split}.txt").write_text(script)
        try:
            found = command(line)
        except Exception as error:  # of the user's own code: Python's traceback is the message
            found = type(error)
        said = capsys.readouterr().out
        assert found == status
        assert [x["step"] for x in lines("run/metrics.jsonl")] == [*range(1, step + 1)]
        assert [path.name for path in Path("run").glob("step-*")] == [f"step-{step}"]
        if split == "train":
            assert ("python train.py --resume run" in said) == (";" not in script)
            assert command(f"{EVAL} run") == 2  # it has not ended, but its checkpoint can be
            assert f"run/step-{step}" in capsys.readouterr().err
        assert Path("run/model.safetensors").exists() == (split == "test")
        line = "train.py --resume run"
    assert left("run") == left("whole")

    os.rename("run", "moved")
    assert command("train.py --resume moved --steps 6 --micro-batch 2") == 0
    stored = json.loads(Path("moved/run.json").read_text())
    assert (stored["steps"], stored["micro_batch"]) == (6, 2)
    assert [x["step"] for x in lines("moved/metrics.jsonl")] == [*range(1, 7)]
    assert not Path("run").exists()


def test_a_second_process_is_refused(capsys):
    """As long as the first lives (it is stopped in its first step), with nothing touched."""
    Path("train.txt").write_text("os.kill(os.getpid(), signal.SIGSTOP)")
    first = fork(f"{MINE} --steps 2 --out run")
    assert os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1])
    before = files("run")
    try:
        assert command("train.py --resume run --steps 3") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == "train.py: another process is at work in run"
        assert files("run") == before
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert command("train.py --resume run") == 0


def test_nothing_is_overwritten(capsys):
    """Without --out the next free folder is taken, with it one that exists is refused."""
    for folder in ("runs/dqo", "runs/dqo-2"):
        with patch.object(sys, "argv", ["train.py"]):
            assert train.parse()[0].out == folder
        Path(folder).mkdir(parents=True)
    assert command(f"{TRAIN} --steps 1 --out runs/dqo") == 2
    assert "exists" in capsys.readouterr().err
    assert not any(Path("runs/dqo").iterdir())


# ------------------------------------------------------------------- an ordinary model
@pytest.mark.parametrize("flags", ["", pytest.param("--lora 4 --bf16", marks=needs("peft"))])
def test_a_run_folder_is_an_ordinary_model(flags, capsys):
    """Plain transformers loads and runs it, with the logits of the policy that was trained; for
    LoRA those of plain peft. A checkpoint measures the same. Two threads became one."""
    kept, load = [], train.load
    torch.set_num_threads(2)
    with patch.object(train, "load", lambda *args: kept.append(load(*args)) or kept[0]):
        assert command(f"{TRAIN} --steps 2 --lr 0.01 {flags} --out run") == 0
    assert torch.get_num_threads() == 1
    assert "one thread" in capsys.readouterr().out
    start = AutoModelForCausalLM.from_pretrained(REPO / "data/tiny")
    plain, tokenizer = (c.from_pretrained("run") for c in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([dqo.prompt_ids(tokenizer, "tell a story with park and dog")])
    assert plain.state_dict().keys() == start.state_dict().keys()
    (policy, *_), before = kept[0], start(ids).logits
    if flags:
        from peft import PeftModel
        policy = PeftModel.from_pretrained(start, "run/step-2")
        inputs = json.loads(Path("run/run.json").read_text())["inputs"]
        assert any("model.safetensors" in path for path in inputs)
    logits = plain(ids).logits
    assert (logits - before).abs().max() > 0.1
    torch.testing.assert_close(logits, policy.eval()(ids).logits, rtol=0, atol=1e-4)
    say = pipeline("text-generation", model="run", max_new_tokens=5)
    assert say("make 24", return_full_text=False)[0]["generated_text"].split()
    assert command(f"{EVAL} run run/step-2 --json x.json") == 0
    run, step = json.loads(Path("x.json").read_text())
    assert [run[key] for key in ("quality", "mean_tokens", "log_det")] == pytest.approx(
        [step[key] for key in ("quality", "mean_tokens", "log_det")])


def test_dropout_is_off():
    """The policy that is scored, in train(), is the one that sampled, whatever the config says."""
    random_gpt2(40).save_pretrained("drops")
    word_tokenizer([f"w{i}" for i in range(40)], eos_token="w2").save_pretrained("drops")
    ids = torch.arange(3, 20)[None]
    for model, same in ((AutoModelForCausalLM.from_pretrained("drops"), False),
                        (dqo.load_model("drops")[0], True)):
        model.train()
        assert torch.equal(model(ids).logits, model(ids).logits) == same


# ------------------------------------------------------------------- what is said, what is kept
@pytest.mark.parametrize("flags", [pytest.param("--lora 4 --beta 0", marks=needs("peft")),
                                   "--beta 0.1"])
def test_inputs_that_changed(flags, capsys):
    """Data, reward file, and the base of adapters or the reference: one line each on resuming."""
    shutil.copytree(REPO / "data/tiny", "base")
    Path("my.jsonl").write_text("".join(
        json.dumps(dict(prompt=f"make {n}", split=x)) + "\n"
        for n, x in ((24, "train"), (25, "test"))))
    assert command("train.py --data my.jsonl --reward my.py:score --model base --k 3 --prompts 1 "
                   f"--max-new-tokens 4 --steps 1 {flags} --out run") == 0

    def warned():
        capsys.readouterr()
        assert command("train.py --resume run") == 0
        printed = capsys.readouterr().out.splitlines()
        return sorted(line for line in printed if line.startswith("WARNING"))
    assert warned() == []
    for name in ("my.jsonl", "my.py", "base/model.safetensors"):
        data = Path(name).read_bytes()
        Path(name).write_bytes(data[:-4] + b"\0" * 4 if "base" in name else data + b"\n")
    found = warned()
    assert len(found) == 3, found
    for line, name in zip(found, ("base/model.safetensors", "my.jsonl", "my.py")):
        assert name in line


@pytest.mark.parametrize("flags", ["--bf16", "--no-bf16", ""])
def test_weights_that_do_not_learn(flags):
    """At a learning rate of 0 they stay as they are; for bf16 but for what it rounds away."""
    assert command(f"{TRAIN} --steps 1 --lr 0 {flags} --out run") == 0
    before, after = (AutoModelForCausalLM.from_pretrained(name).lm_head.weight
                     for name in ("data/tiny", "run"))
    off = (after - before).abs() / before.abs()
    assert (off.max() == 0) == (flags != "--bf16") and off.max() < 1 / 128
    assert json.loads(Path("run/run.json").read_text())["bf16"] == (flags == "--bf16")


@pytest.mark.slow
def test_what_was_recorded(monkeypatch, capsys):
    """A run with the recorded settings is shown beside the base model and GRPO, with the hard
    prompts and eight answers each; another run is not."""
    monkeypatch.setattr(train, "RESULTS", Path())
    shutil.copy(REPO / "data/results/first.json", "first.json")
    line = "train.py --steps 1 --save-every 1"
    assert command(f"{line} --out a") == 0
    assert "recorded" not in capsys.readouterr().out
    recorded = json.loads(Path("first.json").read_text())
    recorded["options"]["steps"] = 1
    Path("first.json").write_text(json.dumps(recorded))
    assert command(f"{line} --objective dqo_quality --out b") == 0
    said = capsys.readouterr().out
    assert said.count("GRPO (recorded)") == 5 + 3 + 1 and said.count("HARD") == 1
    assert "  pass@16   " in said.partition("HARD")[2]
    assert "reason: 30 prompts, 32 responses each" in said
    base, _, mine = (x[20:].split(", ") for x in said.partition("(* wrong)")[2].splitlines()[1:4])
    assert sum(map(str.__eq__, base, mine)) > 3, "the same prompt, the same draws, a step apart"
    assert command(f"{line} --seed 1 --out c") == 0
    assert "recorded" not in capsys.readouterr().out


def test_a_template_that_writes_the_date(capsys):
    """Tomorrow the same seed is another run: one line says so."""
    shutil.copytree(REPO / "data/tiny", "dated")
    for template, warnings in (('{{ strftime_now("%d %b %Y") }}', 1), ("", 0)):
        Path("dated/chat_template.jinja").write_text(template + "{{ messages[0]['content'] }} :")
        line = f"{TRAIN} --model dated --beta 0 --steps 1 --limit 1 --prompts 1"
        assert command(f"{line} --out run{warnings}") == 0
        said = [x for x in capsys.readouterr().out.splitlines() if "today's date" in x]
        assert len(said) == warnings and all(x.startswith("WARNING") for x in said)


def test_a_run_is_measured_as_it_was_trained(capsys):
    """Temperature, length and template come from its run.json, for its checkpoint too; where two
    runs differ the flag is asked for. A run.json beside a run is somebody else's."""
    shutil.copytree(REPO / "data/tiny", "told")
    with open("told/chat_template.jinja", "a") as template:
        template.write("{% if not calm is defined %}{{ raise_exception('not told') }}{% endif %}")
    assert command(f"{TRAIN} --model told --template '{{\"calm\": 1}}' --temperature 0.01 "
                   "--max-new-tokens 3 --beta 0 --steps 1 --out run") == 0
    for model in ("run", "run/step-1"):
        name = model.replace("/", "-")
        assert command(f"{EVAL} {model} --json {name}.json --samples {name}.jsonl") == 0
        (result,) = json.loads(Path(f"{name}.json").read_text())
        assert result["mean_tokens"] == 3
        spoken = [x["response"] for x in lines(f"{name}.jsonl")]
        assert spoken[:1] * 3 == spoken[:3]  # at a temperature of 0.01 there is one answer
    shutil.copytree("run", "hot")
    stored = json.loads(Path("run/run.json").read_text())
    Path("hot/run.json").write_text(json.dumps(stored | dict(temperature=2.0)))
    capsys.readouterr()
    assert command(f"{EVAL} run hot") == 2
    assert "give --temperature" in capsys.readouterr().err
    assert command(f"{EVAL} run hot --temperature 1") == 0


@pytest.mark.parametrize("second, script, end, responses", [
    ("no/such", "", 2, 6),
    ("data/tiny", "\n\n\nsignal.raise_signal(2)", "Ctrl-C", 9),  # in its second prompt
])
def test_what_was_measured_is_kept(second, script, end, responses, capsys):
    """Results and responses are written as they come: neither a misspelt second model nor Ctrl-C
    takes those of the first away, and its table is shown."""
    Path("test.txt").write_text(script)
    try:
        found = command(f"{EVAL} data/tiny {second} --max-new-tokens 8 --reward my.py:score "
                        "--json x.json --samples s.jsonl")
    except KeyboardInterrupt:
        found = "Ctrl-C"
    assert found == end
    assert [x["model"] for x in json.loads(Path("x.json").read_text())] == ["data/tiny"]
    assert len(lines("s.jsonl")) == responses
    assert "mean tokens" in capsys.readouterr().out
    assert command(f"{EVAL} data/tiny --reward none --json y.json --samples y --plot y.png") == 0
    assert "quality" not in json.loads(Path("y.json").read_text())[0]
    assert lines("y")[0]["response"] and lines("y")[0]["quality"] is None
