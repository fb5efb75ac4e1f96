"""Train a language model with DQO, or with one of the objectives beside it.

    python train.py                                         # the tiny base model on the four miniature tasks, on a CPU
    python train.py --objective grpo --out runs/grpo        # the same without diversity, to compare
    python train.py --data my.jsonl --reward my.py:score --model HuggingFaceTB/SmolLM2-135M-Instruct
    python train.py --resume runs/dqo                       # after a crash or Ctrl-C: ends in the very same weights

Everything that happens in a step is in `dqo.dqo_step`. This file only reads flags, feeds prompts, shows progress and
keeps the run folder, which plain transformers loads (`AutoModelForCausalLM.from_pretrained(folder)`):

    run.json        the resolved configuration and versions
    metrics.jsonl   a line per step          samples.jsonl   every sampled response with its quality, gain, advantage
    checkpoints/    the last two: a model folder each, with the state of the optimizer and of the random numbers
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import sys
import time
import typing
from pathlib import Path

import sentence_transformers
import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

import eval as evaluation
from data.tasks import check_rows, load_reward, load_rows
from dqo import BadInput, Config, dqo_step, end_tokens, first_line, load_encoder, load_model, option

# What data/tiny was tuned to, and what any other model gets: a real one needs a small learning rate and a KL penalty to stay
# fluent. (The tiny one, whose rewards are strict, does not.)
TINY = dict(lr=3e-4, beta=0.0, max_new_tokens=24, steps=640, micro_batch=32)
OTHER = dict(lr=1e-6, beta=0.05, max_new_tokens=256, micro_batch=16)
EVAL_PROMPTS, EVAL_N = 32, 16  # the table at the end: at most so many test prompts per task, so many responses each


# ------------------------------------------------------------------------------------------------ configuration
@dataclasses.dataclass
class RunConfig(Config):
    """The hyper-parameters, and what else a run needs. One flag per field."""

    gradient_checkpointing: bool = option(False, "keep fewer activations and compute them again: less memory, a third more time")
    limit: int = option(0, "use only the first N prompts of each task; 0 = all", low=0)
    prompt_key: str = option("prompt", "name of the prompt in a .jsonl row")
    answer_key: str = option("answer", "name of the answer in a .jsonl row")
    out: str | None = option(None, "run folder [the next free of runs/OBJECTIVE, runs/OBJECTIVE-2, ...]")
    save_every: int = option(100, "steps between checkpoints, of which the last two are kept", low=1)
    overwrite: bool = option(False, "replace the run folder when it holds another run")
    resume: str | None = option(None, "continue the run in this folder after its last checkpoint; only --steps may be given beside it")


def parse(argv=None):
    """RunConfig from the command line. With --resume it comes from the run, but for --steps."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(RunConfig)
    for f in dataclasses.fields(RunConfig):
        flag, kind = "--" + f.name.replace("_", "-"), hints[f.name]
        text = f.metadata["help"] + ("" if f.default in (None, False) else f" [{f.default}]")
        if kind is bool:
            p.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            kind = next(t for t in (typing.get_args(kind) or (kind,)) if t is not type(None))  # int | None -> int
            p.add_argument(flag, type=kind, default=argparse.SUPPRESS, choices=f.metadata.get("choices"), help=text)
    given = vars(p.parse_args(argv))  # only what was given: a default beside --resume is a contradiction too
    config = RunConfig(**given)
    if config.resume is not None:
        if changed := [name for name in given if name not in ("resume", "steps")]:
            raise BadInput(f"--{changed[0].replace('_', '-')} cannot be given with --resume: everything but --steps is taken from {config.resume}/run.json")
        config = resumed(config)
    config.check()
    return config


def resumed(given):
    """The configuration of the run to resume."""
    path = Path(given.resume) / "run.json"
    try:
        config = RunConfig(**json.loads(path.read_text())["config"])
        steps = int(config.steps if given.steps is None else given.steps)
        dataclasses.replace(config, steps=steps).check()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--resume {given.resume}: {path} is not the run.json of a run ({type(error).__name__}: {error})") from None
    return dataclasses.replace(config, resume=str(path.parent), out=str(path.parent), overwrite=False, steps=steps)


def fill_defaults(config, prompts):
    """Give every option that was left open its value for this model and data."""
    defaults = TINY if Path(config.model).name == "tiny" else dict(OTHER, steps=math.ceil(prompts / config.prompts))
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


# ------------------------------------------------------------------------------------- the run folder, checkpoints
def open_run(config):
    """Create the run folder, or refuse to touch one that holds another run."""
    if config.out is None:
        names = (f"runs/{config.objective}" + (f"-{i}" if i > 1 else "") for i in range(1, 10 ** 6))
        config.out = next(name for name in names if not Path(name).exists())
    out = Path(config.out)
    with explained(f"--out {out}"):
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    for name, used in (("model", config.model), ("data", config.data), ("reward", (config.reward or "").rpartition(":")[0])):
        if taken and out.resolve() in (Path(used).resolve(), *Path(used).resolve().parents):
            raise BadInput(f"--out {out} holds the --{name} {used} of this run: name another")
    if taken:
        is_run = (out / "run.json").is_file()
        if not (config.overwrite and is_run):
            raise BadInput(f"--out {out} exists" + ("; --overwrite replaces it, --resume continues it" if is_run else " and is no run folder: name another"))
        shutil.rmtree(out)
    write_run(out, config)
    return out


def write_run(out, config):
    versions = dict(python=platform.python_version(), **{m.__name__: m.__version__ for m in (torch, transformers, sentence_transformers)})
    with explained(f"cannot write to {out}"):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "run.json", json.dumps(dict(config=dataclasses.asdict(config), versions=versions), indent=1))


@contextlib.contextmanager
def explained(what):
    """A full disk or a missing right becomes one line. Torch and safetensors wrap the operating system's errors."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{what}: {getattr(error, 'strerror', None) or first_line(error) + ' (is the disk full?)'}") from None


def write_whole(path, text):
    """Write a file so that it is there either as it was or as it should be, whenever the power fails."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_checkpoint(out, step, config, model, tokenizer, optimizer, memory, random_state):
    """checkpoints/step-N: a model folder, and in state.pt everything else that the next step depends on. Written under another
    name and renamed into place: a folder called step-N is complete, whenever the run is killed."""
    folder = out / "checkpoints"
    target, temporary = folder / f"step-{step}", folder / "writing"
    if target.exists():
        return
    with explained(f"cannot save {target}"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        torch.save(dict(of=identity(config), optimizer=optimizer.state_dict(), random=random_state, memory=memory), temporary / "state.pt")
        os.replace(temporary, target)
        for old in sorted(checkpoints(out))[:-2]:
            shutil.rmtree(folder / f"step-{old}")


def identity(config):
    """What a checkpoint must share with the run that it is resumed in."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ("steps", "out", "overwrite", "resume", "save_every")}


def checkpoints(out):  # the steps that have one
    return [int(p.name[5:]) for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdecimal()]


def random_state():  # of every generator that a step draws from
    return dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                python=random.getstate())  # a reward of the user's own may draw from it


def restore(out, step, config, model, optimizer):
    """Optimizer and random numbers as they were after `step`; returns the memory of `dqo_step`."""
    path = out / "checkpoints" / f"step-{step}" / "state.pt"
    try:
        state = torch.load(path, weights_only=True)
        if state["of"] != identity(config):
            raise ValueError("of another run")
        optimizer.load_state_dict(state["optimizer"])
        if any(p.shape != x["exp_avg"].shape for p, x in optimizer.state.items()):
            raise ValueError("of another model")
        torch.set_rng_state(state["random"]["cpu"])
        if torch.cuda.is_available() and state["random"]["cuda"]:
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        random.setstate(state["random"]["python"])
        return state["memory"]
    except Exception as error:  # a damaged file raises nearly anything
        raise BadInput(f"{path} is damaged or of another run ({type(error).__name__}); remove {path.parent} to resume from the one before") from None


def cut_log(path, step):
    """Drop the lines of steps after `step`, which will be run again, and a line that a crash cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        write_whole(path, "".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: a line is not of this log ({error}); remove it") from None


# --------------------------------------------------------------------------------------------------- the training
@functools.lru_cache(maxsize=2)
def order(count, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


def batch_of(rows, step, prompts, seed):
    """The rows of one step: shuffled passes over the data, and a function of (seed, step) alone."""
    where = (divmod(i, len(rows)) for i in range((step - 1) * prompts, step * prompts))
    return [rows[order(len(rows), seed, epoch)[i]] for epoch, i in where]


def show_group(step, samples, metrics):
    """One prompt's group, best advantage first, above the progress bar."""
    distinct, beyond = len({s["response"] for s in samples}), metrics["beyond_window"]
    lines = [f"step {step}  {str(samples[0]['prompt'])[-110:]!r}  {distinct} of {len(samples)} distinct"
             + (f"  ({beyond:.0%} of the step's responses exceed the encoder's window)" if beyond else "") + "\n  quality  gain  advantage"]
    for s in sorted(samples, key=lambda s: -s["advantage"]):
        lines.append(f"    {s['quality']:5.2f}  {s['gain'] + 0.0:6.3f}  {s['advantage']:+6.2f}   {s['response'][:90]!r}")
    tqdm.write("\n".join(lines))


def append(path, rows):
    """Add JSON lines to a log. JSON has no NaN: a number that was not measured is null."""
    number = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
    with explained(f"cannot write {path}"), open(path, "a") as file:
        file.writelines(json.dumps({k: number(v) for k, v in row.items()}) + "\n" for row in rows)


def introduce(config, model, tokenizer, rows, done):
    """What is about to happen, in full: the resolved configuration and the distribution that is sampled from."""
    print(f"{config.objective} on {config.model} ({model.num_parameters():,} parameters, {model.device}), {len(rows)} prompts of {config.data}"
          + (f", resumed after step {done}" if config.resume else ""))
    print("  ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items() if k not in ("model", "data", "objective") and v is not None))
    print(f"sampling: temperature {config.temperature}, full vocabulary (no top-p, no top-k, no penalty), at most {config.max_new_tokens} "
          f"tokens, ended by {' '.join(map(str, tokenizer.convert_ids_to_tokens(end_tokens(model, tokenizer).tolist())))}")


def share_beyond_window(encoder, texts):
    """Share of texts longer than the encoder's window. WARNING  It reads only their beginning: if that is alike, they are duplicates."""
    window = getattr(encoder, "max_seq_length", None) or math.inf
    long = [t for t in texts if len(t) > window - 2]  # a token is at least a character, and two are added
    return sum(len(ids) > window for ids in encoder.tokenizer(long, truncation=False).input_ids) / len(texts) if long else 0.0


def train(config):  # returns the exit status
    start_from, done = config.model, 0
    if config.resume:
        out = Path(config.out)
        done = max(checkpoints(out), default=-1)
        if not 0 <= done <= config.steps:
            raise BadInput(f"--resume {out}: " + ("no checkpoint there yet; start again with --overwrite" if done < 0 else f"it is at step {done} already"))
        start_from = f"{out}/checkpoints/step-{done}"
    rows, test_rows = (load_rows(config.data, split, limit, config.prompt_key, config.answer_key)
                       for split, limit in (("train", config.limit), ("test", min(config.limit or EVAL_PROMPTS, EVAL_PROMPTS))))
    reward = load_reward(config.reward, config.data)
    check_rows(rows + test_rows, reward)
    model, tokenizer = load_model(start_from)
    fill_defaults(config, len(rows))
    evaluation.prepare(rows + test_rows, model, tokenizer, config.max_new_tokens, config.plain)
    encoder = load_encoder(config.encoder)
    reference = load_model(config.model)[0].requires_grad_(False) if config.beta > 0 else None
    if config.gradient_checkpointing:  # transformers before 5.20 knows it by its old name only
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    if config.resume:
        memory = restore(out, done, config, model, optimizer)
        with explained(f"cannot write to {out}"):
            cut_log(out / "metrics.jsonl", done)
            cut_log(out / "samples.jsonl", done)
        write_run(out, config)  # --steps may be new
    else:
        out, memory = open_run(config), {}
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        save_checkpoint(out, 0, config, model, tokenizer, optimizer, memory, random_state())
    introduce(config, model, tokenizer, rows, done)
    if status := loop(config, out, done, model, tokenizer, encoder, reward, optimizer, rows, reference, memory):
        return status
    with explained(f"cannot save the model to {out}"):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    report(config, reference or load_model(config.model)[0], model, tokenizer, encoder, reward, test_rows)
    return 0


@contextlib.contextmanager
def noted_signals():
    """The first Ctrl-C (or SIGTERM) is only noted, in the list that this yields; a second one does what it always does."""
    received, handlers = [], {}

    def note(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the last: the terminal is gone
        handlers[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def loop(config, out, done, model, tokenizer, encoder, reward, optimizer, rows, reference, memory):
    """The steps after `done`. Returns the exit status: 0, or 128 + the number of the signal that stopped it."""
    step, start, pace = done, time.time(), None
    with noted_signals() as received, tqdm(total=config.steps, initial=done, desc=config.objective, dynamic_ncols=True) as bar:
        for step in range(done + 1, config.steps + 1):
            began, before = time.time(), random_state()
            for group in optimizer.param_groups:  # constant, then linear to 0 over the second half, to average out the noise
                group["lr"] = config.lr * min(1.0, 2 * (1 - (step - 1) / config.steps))
            batch = batch_of(rows, step, config.prompts, config.seed)
            try:
                metrics = dqo_step(model, tokenizer, encoder, reward, optimizer, batch, config, reference, memory)
            except BadInput as error:
                if config.epochs == 1:  # raised before the weights were touched: keep what has been learned
                    save_checkpoint(out, step - 1, config, model, tokenizer, optimizer, memory, before)
                raise BadInput(f"step {step}: {error}; --resume {out} goes on after step {max(checkpoints(out))}") from None
            samples = metrics.pop("samples")
            metrics.update(step_s=time.time() - began, beyond_window=share_beyond_window(encoder, [s["response"] for s in samples]))
            append(out / "metrics.jsonl", [dict(step=step, **metrics)])
            append(out / "samples.jsonl", [dict(step=step, **s) for s in samples])
            pace = metrics["step_s"] if pace is None else 0.9 * pace + 0.1 * metrics["step_s"]
            bar.set_postfix_str(f"quality {metrics['quality']:.2f}, log det {metrics['log_det']:.2f}, distinct {metrics['distinct']:.2f}, "
                                f"length {metrics['length']:.1f}, truncated {metrics['truncated']:.2f}, {pace:.2f} s/step", refresh=False)
            bar.update()
            if step == 1 or step % max(1, config.steps // 4) == 0:
                show_group(step, samples[:config.k], metrics)
            if step % config.save_every == 0 or step == config.steps or received:  # after the logs of the step, see `cut_log`
                save_checkpoint(out, step, config, model, tokenizer, optimizer, memory, random_state())
            if received:
                break
    if received and step < config.steps:
        print(f"\nstopped after step {step}, everything is saved. To go on:\n  python train.py --resume {out}")
        return 128 + received[0]
    print(f"\ntrained {config.steps - done} steps in {time.time() - start:.0f} s")
    return 0


def report(config, base, model, tokenizer, encoder, reward, rows):
    """The table base -> trained on the test prompts, and what to type next."""
    common = dict(tokenizer=tokenizer, encoder=encoder, rows=rows, reward=reward, n=EVAL_N, max_new_tokens=config.max_new_tokens,
                  temperature=config.temperature, plain=config.plain)
    print(evaluation.change(evaluation.evaluate("base", base, **common), evaluation.evaluate("trained", model, **common)))
    usual = {**vars(RunConfig(objective=config.objective)), **(TINY if Path(config.model).name == "tiny" else OTHER)}
    flags = lambda names: "".join(f" --{n.replace('_', '-')}" + ("" if x is True else f" {shlex.quote(str(x))}")
                                  for n, x in vars(config).items() if n in names and x != usual[n])
    same = flags(usual.keys() - {"objective", "alpha", "kernel", "out", "overwrite", "resume"})
    other = shlex.quote(f"{config.out}-grpo")
    if config.objective == "grpo":
        print(f"\nnext, the same with diversity:\n  python train.py{same}")
    else:
        print(f"\nnext, the same without diversity, then both in one picture:\n  python train.py --objective grpo --out {other}{same}\n"
              f"  python eval.py {shlex.quote(config.model)} {shlex.quote(config.out)} {other} --limit {EVAL_PROMPTS}"
              f"{flags('data reward encoder temperature plain prompt_key answer_key'.split())} --plot plane.png")


def main(argv=None):
    """Exit status: 0 done, 2 bad input, 130 or 143 after SIGINT or SIGTERM with everything saved."""
    try:
        return train(parse(argv))
    except (BadInput, torch.OutOfMemoryError) as error:
        hint = " (use a smaller --micro-batch, or --gradient-checkpointing)" * (not isinstance(error, BadInput))
        print(f"train.py: {first_line(error)}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a second Ctrl-C, or one before the first step
        return 130


if __name__ == "__main__":
    sys.exit(main())
