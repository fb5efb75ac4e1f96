"""The run folder: configuration, logs, checkpoints, resuming, signals.

    run.json        the resolved configuration and versions
    metrics.jsonl   a line per step          samples.jsonl   every response, with its quality
    checkpoints/    the last two: a model folder each, with the state of the optimizer and of
                    the random numbers
    run.png         the curves of the run, when it has ended

The folder itself is a model that plain transformers loads. Nothing here is of the method.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import random
import shutil
import signal
from pathlib import Path

import sentence_transformers
import torch
import transformers
from safetensors import SafetensorError

from data.models import first_line
from data.objectives import load_objective
from data.options import RunConfig
from dqo import BadInput

# What may differ between a run and its resumption.
NOT_OF_THE_RUN = ("steps", "out", "overwrite", "resume", "save_every")


def resumed(given):
    """The configuration of the run to resume, from what was given beside --resume."""
    path = Path(given.resume) / "run.json"
    try:
        saved = json.loads(path.read_text())["config"]
        load_objective(saved["objective"])
        config = RunConfig(**saved)
        steps = int(config.steps if given.steps is None else given.steps)
        dataclasses.replace(config, steps=steps).check()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--resume {given.resume}: {path} is not the run.json of a run "
                       f"({type(error).__name__}: {error})") from None
    folder = str(path.parent)
    return dataclasses.replace(config, resume=folder, out=folder, overwrite=False, steps=steps)


# -------------------------------------------------------------------------------- the folder
def open_run(config):
    """Create the run folder, or refuse to touch one that holds another run."""
    if config.out is None:
        config.out = next_free(f"runs/{path_of(config.objective)}")
    out = Path(config.out)
    with explained(f"--out {out}"):
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken:
        refuse_to_replace(out, config)
        shutil.rmtree(out)
    write_run(out, config)
    return out


def path_of(objective):
    """A name for a folder: that of the function, if the objective is one in a file."""
    return objective.rpartition(":")[2]


def next_free(name):
    """name, name-2, name-3, ...: the first that does not exist."""
    number, free = 1, name
    while Path(free).exists():
        number += 1
        free = f"{name}-{number}"
    return free


def refuse_to_replace(out, config):
    """Raise BadInput unless `out` is a run that --overwrite replaces, and holds no input."""
    reward_file = (config.reward or "").rpartition(":")[0]
    objective_file = config.objective.rpartition(":")[0]
    inputs = dict(model=config.model, data=config.data, reward=reward_file,
                  objective=objective_file)
    for name, used in inputs.items():
        path = Path(used).resolve()
        if used and out.resolve() in (path, *path.parents):
            raise BadInput(f"--out {out} holds the --{name} {used} of this run: name another")
    if not (out / "run.json").is_file():
        raise BadInput(f"--out {out} exists and is no run folder: name another")
    if not config.overwrite:
        raise BadInput(f"--out {out} exists; --overwrite replaces it, --resume continues it")


def write_run(out, config):
    versions = dict(python=platform.python_version())
    for module in (torch, transformers, sentence_transformers):
        versions[module.__name__] = module.__version__
    text = json.dumps(dict(config=dataclasses.asdict(config), versions=versions), indent=1)
    with explained(f"cannot write to {out}"):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "run.json", text)


@contextlib.contextmanager
def explained(what):
    """A full disk or a missing right becomes one line.

    Torch and safetensors wrap the operating system's errors.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or f"{first_line(error)} (is the disk full?)"
        raise BadInput(f"{what}: {reason}") from None


def write_whole(path, text):
    """Write a file so that it is as it was or as it should be, whenever the power fails."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# --------------------------------------------------------------------------------- checkpoints
@dataclasses.dataclass
class Setup:
    """What a step needs, prompts and configuration aside."""

    model: object
    tokenizer: object
    encoder: object
    reward: object
    optimizer: object
    reference: object = None  # the frozen starting model, with beta > 0
    memory: dict = dataclasses.field(default_factory=dict)  # see `dqo_step`


def save_checkpoint(out, step, config, setup, random_state):
    """checkpoints/step-N: a model folder, and in state.pt all else that the next step needs.

    It is written under another name and renamed into place: a folder called step-N is
    complete, whenever the run is killed.
    """
    folder = out / "checkpoints"
    target, temporary = folder / f"step-{step}", folder / "writing"
    if target.exists():
        return
    state = dict(of=identity(config), optimizer=setup.optimizer.state_dict(),
                 random=random_state, memory=setup.memory)
    with explained(f"cannot save {target}"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        setup.model.save_pretrained(temporary)
        setup.tokenizer.save_pretrained(temporary)
        torch.save(state, temporary / "state.pt")
        os.replace(temporary, target)
        for old in sorted(checkpoints(out))[:-2]:
            shutil.rmtree(folder / f"step-{old}")


def identity(config):
    """What a checkpoint must share with the run that it is resumed in."""
    options = dataclasses.asdict(config)
    return {name: value for name, value in options.items() if name not in NOT_OF_THE_RUN}


def checkpoints(out):
    """The steps that have one."""
    names = [path.name.removeprefix("step-") for path in (out / "checkpoints").glob("step-*")]
    return [int(name) for name in names if name.isdecimal()]


def random_state():
    """The state of every generator that a step draws from (a user's reward may use Python's)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return dict(cpu=torch.get_rng_state(), cuda=cuda, python=random.getstate())


def last_step(out, steps):
    """The step of the last checkpoint, from which a run of so many steps can go on."""
    done = max(checkpoints(out), default=None)
    if done is None:
        raise BadInput(f"--resume {out}: no checkpoint there yet; start again with --overwrite")
    if done > steps:
        raise BadInput(f"--resume {out}: it is at step {done} already")
    return done


def restore(out, step, config, setup):
    """Put optimizer, random numbers and memory back as they were after `step`."""
    path = out / "checkpoints" / f"step-{step}" / "state.pt"
    try:
        state = torch.load(path, weights_only=True)
        if state["of"] != identity(config):
            raise ValueError("of another run")
        setup.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in setup.optimizer.state.items():
            if parameter.shape != moments["exp_avg"].shape:
                raise ValueError("of another model")
        torch.set_rng_state(state["random"]["cpu"])
        if torch.cuda.is_available() and state["random"]["cuda"]:
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        random.setstate(state["random"]["python"])
        setup.memory = state["memory"]
    except Exception as error:  # a damaged file raises nearly anything
        raise BadInput(f"{path} is damaged or of another run ({type(error).__name__}); "
                       f"remove {path.parent} to resume from the one before") from None


# ---------------------------------------------------------------------------------------- logs
def append(path, rows):
    """Add JSON lines to a log. JSON has no NaN: a number that was not measured is null."""
    with explained(f"cannot write {path}"), open(path, "a") as file:
        for row in rows:
            file.write(json.dumps({key: finite(value) for key, value in row.items()}) + "\n")


def finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def cut_log(path, step):
    """Drop the lines of steps after `step`, which will be run again, and a line cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        whole = [line for line in lines if line.endswith("\n")]
        write_whole(path, "".join(line for line in whole if json.loads(line)["step"] <= step))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: a line is not of this log ({error}); remove it") from None


# ------------------------------------------------------------------------------------- signals
@contextlib.contextmanager
def noted_signals():
    """The first Ctrl-C (or SIGTERM) is only noted, in the list that this yields.

    A second one does what it always does.
    """
    received, handlers = [], {}

    def note(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # HUP: the terminal is gone
        handlers[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
