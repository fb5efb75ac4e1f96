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

import pytest
import torch
from safetensors.torch import load_file

import train
from dqo import load_model

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--steps", "9", "--k", "3", "--prompts", "2", "--save-every", "2", "--limit", "2", "--data", "story,reason"]


def start(cwd, *args):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def log(run):
    return [{k: v for k, v in json.loads(x).items() if not k.endswith("_s")} for x in (run / "metrics.jsonl").read_text().splitlines()]


def equal(a, b):
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, *FLAGS, "--out", "run")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert sorted(p.name for p in (folder / "run/checkpoints").iterdir()) == ["step-8", "step-9"]  # the last two
    return folder / "run"


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(whole, tmp_path, number, status):
    process = start(tmp_path, *FLAGS, "--out", "run")
    run = tmp_path / "run"
    while process.poll() is None and not (run / "checkpoints/step-0").exists():
        time.sleep(0.02)
    process.send_signal(number)
    out, errors = process.communicate()
    assert process.returncode == status, errors
    assert "python train.py --resume run" in out and len(log(run)) == max(train.checkpoints(run))
    process = start(tmp_path, "--resume", "run")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert equal(whole, run) and log(whole) == log(run)
    assert (whole / "samples.jsonl").read_text() == (run / "samples.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_three_times(whole, tmp_path, seed):
    """SIGKILL at two random moments and once while a checkpoint is being written."""
    rng, run, aimed = random.Random(seed), tmp_path / "run", False
    process = start(tmp_path, *FLAGS, "--out", "run")
    for attempt in range(3):
        while process.poll() is None and not (run / "checkpoints/step-0").exists():
            time.sleep(0.005)
        if attempt == 1:
            while process.poll() is None and not (run / "checkpoints/writing").exists():
                time.sleep(0.0005)
            aimed = True
        else:
            time.sleep(rng.uniform(0, 6))
        process.kill()
        process.wait()
        process = start(tmp_path, "--resume", "run")
    _, errors = process.communicate()
    assert process.returncode == 0 and aimed, errors
    assert equal(whole, run) and log(whole) == log(run)
    assert (whole / "samples.jsonl").read_text() == (run / "samples.jsonl").read_text()


def test_a_full_disk_costs_nothing_but_time(whole, tmp_path):
    """The system refuses files above 5 MB: the optimizer's state does not fit. Once it does, the run goes on."""
    command = f"ulimit -f 5000; exec {sys.executable} {ROOT / 'train.py'} {' '.join(FLAGS)} --out run"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: cannot save run/checkpoints/step-2: ") and "is the disk full?" in done.stderr
    assert train.checkpoints(tmp_path / "run") == [0]
    process = start(tmp_path, "--resume", "run")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert equal(whole, tmp_path / "run") and log(whole) == log(tmp_path / "run")


def test_a_checkpoint_is_a_model_folder(whole):
    assert equal(whole, whole / "checkpoints/step-9")
    load_model(str(whole / "checkpoints/step-8"))


def test_everything_a_step_depends_on_comes_back(tmp_path, monkeypatch, capsys):
    """A reward that draws random numbers of its own, and the centre of an unbounded reward, which the first step fixes."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text("import random\ndef score(p, responses, r): return [9 + len(x) / 9 + random.random() for x in responses]\n"
                             "score.range = (-float('inf'), float('inf'))\n")
    assert train.main([*FLAGS, "--steps", "4", "--kernel", "quality", "--reward", "my.py:score", "--out", "a"]) == 0
    shutil.copytree("a", "b")
    shutil.rmtree("b/checkpoints/step-4")  # as if it had been killed then; its logs go to step 4 already
    assert train.main(["--resume", "b"]) == 0
    assert equal(Path("a"), Path("b")) and log(Path("a")) == log(Path("b"))
    assert Path("a/samples.jsonl").read_text() == Path("b/samples.jsonl").read_text()


def test_more_steps_can_be_added(whole, tmp_path, capsys):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, run], check=True)
    assert train.main(["--resume", str(run), "--steps", "10"]) == 0
    assert [x["step"] for x in log(run)] == list(range(1, 11)) and not equal(whole, run)
    assert json.loads((run / "run.json").read_text())["config"]["steps"] == 10  # so that it could be resumed once more
    assert train.main(["--resume", str(run), "--steps", "9"]) == 2 and "it is at step 10 already" in capsys.readouterr().err


@pytest.mark.parametrize("damage,message", [
    (lambda run: (run / "checkpoints/step-9/state.pt").write_bytes(b"x" * 100), "step-9"),
    (lambda run: (run / "checkpoints/step-9/state.pt").write_bytes((run / "checkpoints/step-9/state.pt").read_bytes()[:5000]), "step-9"),
    (lambda run: (run / "checkpoints/step-9/model.safetensors").write_bytes(b"x" * 100), "cannot load the model"),
    (lambda run: (run / "run.json").write_text((run / "run.json").read_text().replace('"seed": 0', '"seed": 1')), "of another run"),
    (lambda run: (run / "run.json").write_text("{"), "run.json"),
    (lambda run: (run / "run.json").unlink(), "run.json"),
    (lambda run: [p.rename(run / p.name) for p in (run / "checkpoints").glob("step-*")], "no checkpoint"),
], ids=["garbage", "truncated", "weights", "another run", "run.json broken", "run.json gone", "no checkpoints"])
def test_damage_is_reported(whole, tmp_path, capsys, damage, message):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, run], check=True)
    damage(run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert train.main(["--resume", str(run)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("train.py: ") and message in errors[0]
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_only_steps_may_change(whole, capsys):
    assert train.main(["--resume", str(whole), "--lr", "1e-3"]) == 2
    assert "--lr" in capsys.readouterr().err
