"""Nothing lost: kill a run at any moment, resume it, and end with the very same weights."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import dqo
import train
from data import runs
from data.models import load_model

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--steps", "9",
    "--k", "3",
    "--prompts", "2",
    "--save-every", "2",
    "--limit", "2",
    "--data", "story,reason",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(cwd, *args):
    """train.py as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT)


def finish(process):
    """Wait for a run that must end well."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def wait_for(path, process, pause):
    """Until the path exists (or the process has ended)."""
    while process.poll() is None and not path.exists():
        time.sleep(pause)


def log(run):
    """The lines of metrics.jsonl, without times."""
    lines = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines.append({key: value for key, value in line.items() if not key.endswith("_s")})
    return lines


def equal(a, b):
    """Whether two folders have the same weights, bit for bit."""
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def assert_same_run(a, b):
    """Weights and logs are those of the other run."""
    assert equal(a, b)
    assert log(a) == log(b)
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()


def copied(run, to):
    subprocess.run(["cp", "-r", run, to], check=True)
    return to


def main(*args):
    """train.py in this process, without the objectives that an earlier command has loaded."""
    with mock.patch.dict(dqo.OBJECTIVES):
        return train.main(list(args))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, *FLAGS, "--out", "run"))
    kept = (folder / "run/checkpoints").iterdir()
    assert sorted(path.name for path in kept) == ["step-8", "step-9"]  # the last two
    return folder / "run"


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(whole, tmp_path, number, status):
    """The step is ended and saved, and the resumed run ends as the undisturbed one."""
    process = start(tmp_path, *FLAGS, "--out", "run")
    run = tmp_path / "run"
    wait_for(run / "checkpoints/step-0", process, pause=0.02)
    process.send_signal(number)
    out, errors = process.communicate()
    assert process.returncode == status, errors
    assert "python train.py --resume run" in out
    assert len(log(run)) == max(runs.checkpoints(run))
    finish(start(tmp_path, "--resume", "run"))
    assert_same_run(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_three_times(whole, tmp_path, seed):
    """SIGKILL at two random moments and once while a checkpoint is being written."""
    rng = random.Random(seed)
    run = tmp_path / "run"
    aimed = False
    process = start(tmp_path, *FLAGS, "--out", "run")
    for attempt in range(3):
        wait_for(run / "checkpoints/step-0", process, pause=0.005)
        if attempt == 1:
            wait_for(run / "checkpoints/writing", process, pause=0.0005)
            aimed = True
        else:
            time.sleep(rng.uniform(0, 6))
        process.kill()
        process.wait()
        process = start(tmp_path, "--resume", "run")
    finish(process)
    assert aimed
    assert_same_run(whole, run)


def test_a_full_disk_costs_nothing_but_time(whole, tmp_path):
    """The system refuses files above 5 MB: the optimizer's state does not fit. Once it does,
    the run goes on."""
    command = f"{sys.executable} {ROOT / 'train.py'} {' '.join(FLAGS)} --out run"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 5000; exec {command}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=ENVIRONMENT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith("train.py: cannot save run/checkpoints/step-2: ")
    assert "is the disk full?" in message
    assert runs.checkpoints(tmp_path / "run") == [0]
    finish(start(tmp_path, "--resume", "run"))
    assert_same_run(whole, tmp_path / "run")


def test_a_checkpoint_is_a_model_folder(whole):
    """The last one is the final model, and the one before loads as well."""
    assert equal(whole, whole / "checkpoints/step-9")
    load_model(str(whole / "checkpoints/step-8"))


# --------------------------------------------------------------------- one process in a folder
BUSY = "another train.py is at work in run"


@pytest.fixture
def running(tmp_path):
    """A run in the folder `run`, stopped by the system in the middle of its work."""
    process = start(tmp_path, *FLAGS, "--steps", "500", "--out", "run")
    wait_for(tmp_path / "run/metrics.jsonl", process, pause=0.02)
    process.send_signal(signal.SIGSTOP)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("args", [
    ["--resume", "run"],
    ["--resume", "./run/", "--steps", "600"],
    [*FLAGS, "--out", "run", "--overwrite"],
])
def test_a_second_process_is_refused(running, tmp_path, monkeypatch, capsys, args):
    """In one line, with nothing in the folder touched."""
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path / "run")
    assert main(*args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert BUSY in line
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_first_is_gone_a_second_goes_on(running, tmp_path, monkeypatch, number):
    """However it ended: nothing is left that would hold it up."""
    monkeypatch.chdir(tmp_path)
    running.send_signal(signal.SIGCONT)
    running.send_signal(number)
    running.communicate()
    done = max(runs.checkpoints(Path("run")))
    monkeypatch.setattr(train, "conclude", lambda *args: None)
    assert main("--resume", "run", "--steps", str(done + 1)) == 0
    assert max(runs.checkpoints(Path("run"))) == done + 1
    assert not Path("run/.lock").exists()


FORKS = """\
import os
import time

def score(prompts, responses, rows):
    if not os.path.exists("child"):
        open("child", "w").close()
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
    return [0.5] * len(rows)
"""


def test_a_forked_child_does_not_hold_the_folder(tmp_path, monkeypatch):
    """A process of a reward that has outlived a run that was killed."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(FORKS)
    process = start(tmp_path, *FLAGS, "--reward", "my.py:score", "--out", "run")
    wait_for(Path("run/metrics.jsonl"), process, pause=0.02)
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
    monkeypatch.setattr(train, "conclude", lambda *args: None)
    assert main("--resume", "run", "--steps", "9") == 0


def test_two_that_start_at_once_get_a_folder_each(tmp_path):
    """Without --out, both look for the next free one."""
    flags = [*FLAGS, "--steps", "1"]
    processes = [start(tmp_path, *flags) for _ in range(2)]
    for process in processes:
        finish(process)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["dqo", "dqo-2"]


# ------------------------------------------------------------------------------ files of yours
REWARD = """\
import random

import numpy

def score(prompts, responses, rows):
    luck = random.random() + numpy.random.normal()  # of two, numpy keeps one for the next call
    return [9 + len(text) / 9 + luck + numpy.random.rand() for text in responses]

score.range = (-float("inf"), float("inf"))
"""
OBJECTIVE = """\
import torch

def bonus(quality, phi, logp, alpha):
    return alpha * torch.rand(quality.shape) / phi.sum(-1).exp()

bonus.alpha = 0.5
"""


def assert_step_4_again(flags):
    """A run of 4 steps ends in the same weights if its last step is repeated from step 2."""
    assert main(*FLAGS, "--steps", "4", *flags, "--out", "a") == 0
    shutil.copytree("a", "b")
    shutil.rmtree("b/checkpoints/step-4")  # as if killed then; its logs go to step 4 already
    assert main("--resume", "b") == 0
    assert_same_run(Path("a"), Path("b"))


def test_everything_a_step_depends_on_comes_back(tmp_path, monkeypatch):
    """A reward that draws random numbers of its own, and the centre of an unbounded reward,
    which the first step fixes."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(REWARD)
    assert_step_4_again(["--kernel", "quality", "--reward", "my.py:score"])


def test_numpy_is_seeded(tmp_path, monkeypatch):
    """Python's generator and numpy's: two runs of a seed are the same, whatever it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "conclude", lambda *args: None)
    Path("my.py").write_text(REWARD)
    flags = [*FLAGS, "--steps", "1", "--reward", "my.py:score"]
    for name, seed in (("a", "7"), ("b", "7"), ("c", str(2 ** 40))):
        assert main(*flags, "--seed", seed, "--out", name) == 0
    assert_same_run(Path("a"), Path("b"))
    assert not equal(Path("a"), Path("c"))


def test_a_checkpoint_from_before_numpys_state_was_saved(whole, tmp_path):
    run = copied(whole, tmp_path / "run")
    state = torch.load(run / STATE, weights_only=True)
    del state["random"]["numpy"]
    torch.save(state, run / STATE)
    assert main("--resume", str(run), "--steps", "9") == 0


def test_an_objective_in_a_file_is_loaded_again(tmp_path, monkeypatch, capsys):
    """So are its strength and the random numbers that it draws; without its file there is a
    line that names it."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(OBJECTIVE)
    assert_step_4_again(["--objective", "my.py:bonus"])
    config = json.loads(Path("b/run.json").read_text())["config"]
    assert config["objective"] == "my.py:bonus"
    assert config["alpha"] == 0.5
    Path("my.py").unlink()
    capsys.readouterr()
    assert main("--resume", "b", "--steps", "5") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "--objective my.py:bonus: no such objective or file" in errors[0]


# ----------------------------------------------------------------------------- what may change
def test_more_steps_can_be_added(whole, tmp_path, capsys):
    """--steps beside --resume lengthens a run; what it has done already cannot be taken back."""
    run = copied(whole, tmp_path / "run")
    assert main("--resume", str(run), "--steps", "10") == 0
    assert [line["step"] for line in log(run)] == list(range(1, 11))
    assert not equal(whole, run)
    saved = json.loads((run / "run.json").read_text())
    assert saved["config"]["steps"] == 10  # so that it could be resumed once more
    assert main("--resume", str(run), "--steps", "9") == 2
    assert "it is at step 10 already" in capsys.readouterr().err


def test_only_steps_may_change(whole, capsys):
    """Any other option beside --resume is refused by its name."""
    assert main("--resume", str(whole), "--lr", "1e-3") == 2
    assert "--lr" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- damage
STATE = "checkpoints/step-9/state.pt"
WEIGHTS = "checkpoints/step-9/model.safetensors"


def garbage(name):
    return lambda run: (run / name).write_bytes(b"x" * 100)


def truncated(run):
    (run / STATE).write_bytes((run / STATE).read_bytes()[:5000])


def another_seed(run):
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace('"seed": 0', '"seed": 1'))


def checkpoints_moved(run):
    for path in (run / "checkpoints").glob("step-*"):
        path.rename(run / path.name)


DAMAGE = {  # name: what is done to the run folder, fragment of the message
    "garbage": (garbage(STATE), "step-9"),
    "truncated": (truncated, "step-9"),
    "weights": (garbage(WEIGHTS), "cannot load the model"),
    "another run": (another_seed, "of another run"),
    "run.json broken": (lambda run: (run / "run.json").write_text("{"), "run.json"),
    "run.json gone": (lambda run: (run / "run.json").unlink(), "run.json"),
    "no checkpoints": (checkpoints_moved, "no checkpoint"),
}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage,message", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_reported(whole, tmp_path, capsys, damage, message):
    """In one line, with nothing in the folder touched."""
    run = copied(whole, tmp_path / "run")
    damage(run)
    before = files(run)
    assert main("--resume", str(run)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("train.py: ")
    assert message in errors[0]
    assert files(run) == before
