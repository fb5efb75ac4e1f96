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
import sys
from pathlib import Path

import numpy
import sentence_transformers
import torch
import transformers
from safetensors import SafetensorError

from data import lora
from data.models import first_line, out_of_memory
from data.objectives import load_objective
from data.options import RunConfig
from dqo import BadInput

# What may be given beside --resume. But for the steps it changes no result (beyond rounding).
CHANGEABLE = ("steps", "micro_batch", "gradient_checkpointing", "save_every")
NOT_OF_THE_RUN = (*CHANGEABLE, "out", "overwrite", "resume")
LOCK = ".lock"  # in the run folder while a process is at work there


def resumed(resume, **changes):
    """The configuration of the run to resume, with what was given beside --resume."""
    path = Path(resume) / "run.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["config"]
        load_objective(saved["objective"])
        config = RunConfig(**{**saved, **changes})
        config.steps = int(config.steps)
        config.check()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--resume {resume}: {path} is not the run.json of a run "
                       f"({type(error).__name__}: {error})") from None
    folder = str(path.parent)
    return dataclasses.replace(config, resume=folder, out=folder, overwrite=False)


# -------------------------------------------------------------------------------- the folder
def open_run(config, held=None):
    """Create the run folder, or refuse to touch one that holds another run.

    held: an ExitStack, until whose end no other process gets into the folder
    """
    if config.out is None:
        config.out = next_free(f"runs/{path_of(config.objective)}")
    out = Path(config.out)
    with explained(f"--out {out}"):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            refuse_to_replace(out, config)
        out.mkdir(parents=True, exist_ok=True)
        if held:
            held.enter_context(locked(out))
        clear(out)
    write_run(out, config)
    return out


def clear(out):
    """Delete what an older run has left there."""
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextlib.contextmanager
def locked(out):
    """Keep other processes out of a run folder: two would write over each other's steps.

    The lock is the system's. It ends with this process, however that ends, and a file that is
    left behind after a crash holds nobody up.
    """
    path = out / LOCK
    with explained(f"cannot write to {out}"):
        file = open(path, "a")
    with file:
        try:
            lock(file)
            if not path.exists():  # its holder has just ended and removed it
                raise BlockingIOError
        except (BlockingIOError, PermissionError):
            raise BadInput(f"another train.py is at work in {out}: let it end, stop it, or name "
                           "another folder") from None
        except OSError:
            print(f"WARNING {out} is on a file system without locks: nothing keeps a second "
                  "train.py out of it", file=sys.stderr)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                path.unlink()


def lock(file):
    """Not flock: a child that a reward has forked would hold it on when this process is dead."""
    if os.name == "nt":
        import msvcrt
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def path_of(objective):
    """A name for a folder: that of the function, if the objective is one in a file."""
    return objective.rpartition(":")[2]


def next_free(name):
    """name, name-2, name-3, ...: the first that does not exist. It is created at once: another
    process may be looking, too."""
    number, free = 1, name
    while True:
        try:
            with explained(f"--out {free}", but=FileExistsError):
                Path(free).mkdir(parents=True)
                return free
        except FileExistsError:
            number += 1
            free = f"{name}-{number}"


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
    text = to_json(dict(config=dataclasses.asdict(config), versions=versions), indent=1)
    with explained(f"cannot write to {out}"):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "run.json", text)


@contextlib.contextmanager
def explained(what, but=()):
    """A full disk or a missing right becomes one line.

    Torch and safetensors wrap the operating system's errors.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, but) or out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or f"{first_line(error)} (is the disk full?)"
        raise BadInput(f"{what}: {reason}") from None


def write_whole(path, text):
    """Write a file so that it is as it was or as it should be, whenever the power fails."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
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
    """checkpoints/step-N: a model folder (with --lora the adapters alone), and in state.pt all
    else that the next step needs.

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
        if config.lora:
            lora.save(setup.model, temporary)
        else:
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


def seed_everything(seed):
    """Every generator that a step may draw from: a user's reward may use Python's or numpy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2 ** 32)  # it takes no larger one


def random_state():
    """The state of those generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    kind, keys, *rest = numpy.random.get_state()
    return dict(cpu=torch.get_rng_state(), cuda=cuda, python=random.getstate(),
                numpy=(kind, keys.tolist(), *rest))  # torch.load takes no arrays of numpy


def set_random_state(state):
    """As it was, on as many GPUs as there are now."""
    torch.set_rng_state(state["cpu"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number, generator in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(generator, number)
    random.setstate(state["python"])
    if "numpy" in state:  # older checkpoints lack it
        numpy.random.set_state(state["numpy"])


def last_step(out, steps):
    """The step of the last checkpoint, from which a run of so many steps can go on."""
    done = max(checkpoints(out), default=None)
    if done is None:
        raise BadInput(f"--resume {out}: no checkpoint there yet; start again with --overwrite")
    if done > steps:
        raise BadInput(f"--resume {out}: it is at step {done} already")
    return done


def restore(out, step, config, setup):
    """Put optimizer, random numbers and memory back as they were after `step`, and adapters."""
    path = out / "checkpoints" / f"step-{step}" / "state.pt"
    try:
        # On the CPU first: the GPU may be another, or none, and would hold Adam's state twice.
        state = torch.load(path, weights_only=True, map_location="cpu")
        if identity(RunConfig(**state["of"])) != identity(config):  # it may lack newer options
            raise ValueError("of another run")
        if config.lora:
            lora.restore(setup.model, path.parent)
        setup.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in setup.optimizer.state.items():
            if parameter.shape != moments["exp_avg"].shape:
                raise ValueError("of another model")
        set_random_state(state["random"])
        setup.memory = state["memory"]
    except Exception as error:  # a damaged file raises nearly anything
        if out_of_memory(error):
            raise
        raise BadInput(f"{path} is damaged or of another run ({type(error).__name__}); "
                       f"remove {path.parent} to resume from the one before") from None


# ---------------------------------------------------------------------------------------- logs
def append(path, rows):
    """Add JSON lines to a log."""
    with explained(f"cannot write {path}"), open(path, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(to_json(row) + "\n")


def to_json(value, **options):
    """JSON has no NaN, which other readers refuse: a number that was not measured is null."""
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value):
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def cut_log(path, step):
    """Drop the lines of steps after `step`, which will be run again, and a line cut short."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text.splitlines(keepends=True)
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

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # HUP: the terminal is gone
        if hasattr(signal, name):  # Windows has no HUP
            number = getattr(signal, name)
            handlers[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
