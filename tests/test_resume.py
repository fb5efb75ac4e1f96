"""Nothing lost: kill a run at any moment, resume it, and end with the very same weights."""

import json
import os
import random
import shlex
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
import eval as evaluation
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


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes of ENVIRONMENT: with two, sums are taken in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("number,status", [
    pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    (signal.SIGINT, 130),
])
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


def test_a_signal_before_the_first_step(tmp_path, monkeypatch, capsys):
    """From the moment that there is something to resume, a signal says how."""
    def save_and_signal(out, step, *rest):
        save(out, step, *rest)
        if step == 0:
            signal.raise_signal(signal.SIGTERM)

    def not_noted(number, frame):
        pytest.fail("the signal found no handler of the run")

    save = runs.save_checkpoint
    monkeypatch.setattr(runs, "save_checkpoint", save_and_signal)
    run = tmp_path / "run"
    before = signal.signal(signal.SIGTERM, not_noted)
    try:
        assert main(*FLAGS, "--out", str(run)) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert f"python train.py --resume {run}" in capsys.readouterr().out
    assert max(runs.checkpoints(run)) == 1


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


@pytest.mark.slow  # a process of its own takes seconds to start
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
    pytest.param(["--resume", "./run/", "--steps", "600"], marks=pytest.mark.slow),
    pytest.param([*FLAGS, "--out", "run", "--overwrite"], marks=pytest.mark.slow),
])
def test_a_second_process_is_refused(running, tmp_path, monkeypatch, capsys, args):
    """In one line, with nothing in the folder touched."""
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path / "run")
    assert main(*args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert BUSY in line
    assert files(tmp_path / "run") == before


@pytest.mark.slow  # a process of its own takes seconds to start
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


@pytest.mark.slow  # a process of its own takes seconds to start
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


def test_two_that_start_at_once_get_a_folder_each(tmp_path, monkeypatch):
    """Without --out, both look for the next free one: it is taken as soon as it is found."""
    monkeypatch.chdir(tmp_path)
    assert [runs.next_free("runs/x") for _ in range(3)] == ["runs/x", "runs/x-2", "runs/x-3"]


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


def test_nothing_else_may_change(whole, capsys):
    """Any other option beside --resume is refused by its name."""
    assert main("--resume", str(whole), "--lr", "1e-3") == 2
    assert "--lr" in capsys.readouterr().err


def test_what_changes_no_result_may_change(whole, tmp_path):
    """The flags that save memory, and the one that saves more often. The result is the same
    beyond rounding."""
    run = copied(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step-9")
    flags = ["--micro-batch", "2", "--gradient-checkpointing", "--save-every", "1"]
    with mock.patch.object(train, "conclude"):
        assert main("--resume", str(run), "--steps", "10", *flags) == 0
    saved = json.loads((run / "run.json").read_text())["config"]
    assert (saved["micro_batch"], saved["gradient_checkpointing"]) == (2, True)
    assert sorted(runs.checkpoints(run)) == [9, 10]
    theirs, ours = (json.loads((folder / "samples.jsonl").read_text().splitlines()[-1 - 6 * more])
                    for folder, more in ((whole, 0), (run, 1)))
    assert ours == theirs  # the last response of step 9
    norms = [log(folder)[8]["grad_norm"] for folder in (whole, run)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


# ------------------------------------------------------------------------------- another machine
def saved_on_gpus(run, count):
    """Make its last state that of a run on so many GPUs."""
    path = run / f"checkpoints/step-{max(runs.checkpoints(run))}/state.pt"
    state = torch.load(path)
    state["random"]["cuda"] = [torch.full((16,), i, dtype=torch.uint8) for i in range(count)]
    with mock.patch("torch.serialization.location_tag", lambda storage: "cuda:0"):
        torch.save(state, path)


def test_a_run_on_gpus_goes_on_without_one(whole, tmp_path):
    """Its tensors were on a GPU that is not there; the rest is the same to the last bit."""
    run = copied(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step-9")
    saved_on_gpus(run, 2)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(run / "checkpoints/step-8/state.pt")
    assert main("--resume", str(run)) == 0
    assert equal(whole, run)
    assert log(whole) == log(run)


@pytest.mark.parametrize("saved,there,expected", [
    (2, 1, {0: 0}),
    (1, 2, {0: 0}),
    (0, 1, {}),
    (2, 2, {0: 0, 1: 1}),
])
def test_a_generator_for_each_gpu_that_is_there(monkeypatch, saved, there, expected):
    """More of them, or fewer, than when the state was saved."""
    restored = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_rng_state",
                        lambda state, device: restored.update({device: state}))
    states = list(range(saved))
    runs.set_random_state(dict(cpu=torch.get_rng_state(), cuda=states, python=random.getstate()))
    assert restored == expected


# --------------------------------------------------------------------------------------- memory
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
                           "capacity of 79.11 GiB of which 1 GiB is free."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 2 bytes. Error code 12"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(12, "Cannot allocate memory"),
    MemoryError(),
]


def raising(error):
    """A function that raises it, whatever it is called with."""
    def function(*args, **kw):
        raise error
    return function


def one_line(capsys):
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("step ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("error", NO_MEMORY)
@pytest.mark.parametrize("place", ["torch.load", "torch.optim.AdamW.load_state_dict",
                                   "data.models.AutoModelForCausalLM.from_pretrained"])
def test_too_little_memory_is_no_damage(whole, tmp_path, capsys, place, error):
    """A checkpoint that does not fit into memory is whole, and nobody is told to remove it."""
    run = copied(whole, tmp_path / "run")
    before = files(run)
    with mock.patch(place, raising(error)):
        assert main("--resume", str(run), "--steps", "10") == 2
    line = one_line(capsys)
    assert "--lora" in line
    for word in ("damaged", "remove", "cannot load"):
        assert word not in line
    assert files(run) == before


def out_of_memory_at(step, error):
    """dqo_step, which fails at a step."""
    steps = iter(range(1, 99))

    def function(*args, **kw):
        if next(steps) == step:
            raise error
        return dqo.dqo_step(*args, **kw)
    return function


@pytest.mark.parametrize("error", NO_MEMORY)
def test_a_step_that_does_not_fit_names_flags_that_can_be_given(tmp_path, capsys, error):
    """Each command of the line goes on after the last step that did, to the end."""
    run = tmp_path / "my run"
    flags = [*FLAGS, "--steps", "3", "--micro-batch", "5"]
    with mock.patch.object(train, "dqo_step", out_of_memory_at(3, error)):
        assert main(*flags, "--out", str(run)) == 2
    line = one_line(capsys)
    assert line.startswith("train.py: step 3: ")
    assert "goes on after step 2" in line
    assert "GPU 0 has" not in line
    commands = [part.split(";")[0].split(", or ")[0] for part in line.split("python train.py ")[1:]]
    words = [shlex.split(command) for command in commands]
    assert words == [["--resume", str(run), "--micro-batch", "2"],
                     ["--resume", str(run), "--gradient-checkpointing"]]
    if error is NO_MEMORY[0]:
        for i, command in enumerate(words):
            copy = copied(run, tmp_path / f"copy-{i}")
            with mock.patch.object(train, "conclude"):
                assert main("--resume", str(copy), *command[2:]) == 0
            assert [entry["step"] for entry in log(copy)] == [1, 2, 3]


def test_sampling_that_does_not_fit_needs_other_flags(tmp_path, capsys):
    """Micro-batches do nothing for it."""
    with mock.patch("dqo.draw", raising(NO_MEMORY[0])):
        assert main(*FLAGS, "--steps", "1", "--out", str(tmp_path / "run")) == 2
    line = one_line(capsys)
    assert "--prompts, --k or --max-new-tokens" in line
    assert "--micro-batch" not in line


def test_a_last_table_that_does_not_fit(tmp_path, capsys):
    """The model is saved before, and the command that is named measures it, fewer at once."""
    run = tmp_path / "run"
    with mock.patch.object(train, "evaluate", raising(NO_MEMORY[0])):
        assert main(*FLAGS, "--steps", "1", "--out", str(run)) == 2
    line = one_line(capsys)
    assert "the model is in" in line
    words = shlex.split(line.split("python eval.py ")[1])
    assert words == ["data/tiny", str(run), "--batch", "64"]
    assert evaluation.main([*words, "--limit", "1", "--n", "2"]) == 0


@pytest.mark.parametrize("error", NO_MEMORY)
def test_an_evaluation_that_does_not_fit(capsys, error):
    """eval.py names what helps, and does it: so many prompts at once."""
    flags = ["data/tiny", "--data", "story", "--limit", "5", "--n", "2", "--max-new-tokens", "2"]
    with mock.patch.object(evaluation, "sample", raising(error)):
        assert evaluation.main(flags) == 2
    line = one_line(capsys)
    assert line.startswith("eval.py: ")
    assert "--batch" in line
    with mock.patch.object(evaluation, "sample", wraps=dqo.sample) as sample:
        assert evaluation.main([*flags, "--batch", "4"]) == 0
    assert [len(call.args[2]) for call in sample.mock_calls if len(call.args) > 2] == [2, 2, 1]
    capsys.readouterr()
    assert evaluation.main([*flags, "--batch", "0"]) == 2


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
