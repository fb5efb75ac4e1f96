"""Train a language model with DQO, or with one of the objectives beside it.

    python train.py                                    # the tiny model on four small tasks, CPU
    python train.py --objective grpo --out runs/grpo   # the same without diversity, to compare
    python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my.jsonl --reward my.py:score
    python train.py --resume runs/dqo                  # after a crash: the very same weights

What happens in a step is `dqo.dqo_step`, what is in the run folder data/runs.py. This file only
reads flags, feeds prompts and shows progress.
"""

import argparse
import dataclasses
import functools
import random
import shlex
import sys
import time
import typing
from pathlib import Path

import torch
from tqdm import tqdm

from data import options, report, runs
from data.models import first_line, is_tiny, load_encoder, load_model
from data.objectives import load_objective
from data.options import RunConfig
from data.prompts import load_rows, prepare
from data.runs import Setup
from data.scoring import check_rows, load_reward
from dqo import BadInput, dqo_step
from eval import Judges, Sampling, evaluate

EVAL_PROMPTS, EVAL_N = 32, 16  # the last table: test prompts per task at most, responses each


# -------------------------------------------------------------------------------------- flags
def parse(argv=None):
    """RunConfig from the command line. With --resume it comes from the run, but for --steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    hints = typing.get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        add_flag(parser, field, hints[field.name])
    given = vars(parser.parse_args(argv))  # only what was given, see `add_flag`
    if "objective" in given:
        load_objective(given["objective"])
    config = RunConfig(**given)
    if config.resume is not None:
        for name in given:
            if name not in ("resume", "steps"):
                raise BadInput(f"{flag(name)} cannot be given with --resume: everything but "
                               f"--steps is taken from {config.resume}/run.json")
        config = runs.resumed(config)
    config.check()
    return config


def flag(name):
    return "--" + name.replace("_", "-")


def add_flag(parser, field, hint):
    """The flag of a field. Not given, it is absent from the result: beside --resume even a flag
    that repeats the default is a contradiction."""
    meaning = field.metadata["help"]
    if field.default not in (None, False):
        meaning += f" [{field.default}]"
    if hint is bool:
        parser.add_argument(flag(field.name), action="store_true", default=argparse.SUPPRESS,
                            help=meaning)
        return
    kinds = typing.get_args(hint) or (hint,)  # int | None -> int, NoneType
    parser.add_argument(flag(field.name), type=kinds[0], default=argparse.SUPPRESS,
                        choices=field.metadata.get("choices"), help=meaning)


# ------------------------------------------------------------------------------------ prompts
@functools.lru_cache(maxsize=2)
def order(count, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


def batch_of(rows, step, prompts, seed):
    """The rows of one step: shuffled passes over the data, a function of (seed, step) alone."""
    batch = []
    for position in range((step - 1) * prompts, step * prompts):
        epoch, i = divmod(position, len(rows))
        batch.append(rows[order(len(rows), seed, epoch)[i]])
    return batch


def load_prompts(config):
    """(training rows, test rows, reward), each row checked against the reward."""
    keys = config.prompt_key, config.answer_key
    rows = load_rows(config.data, "train", config.limit, *keys)
    test_limit = min(config.limit or EVAL_PROMPTS, EVAL_PROMPTS)
    test_rows = load_rows(config.data, "test", test_limit, *keys)
    reward = load_reward(config.reward, config.data)
    check_rows(rows + test_rows, reward)
    return rows, test_rows, reward


# ----------------------------------------------------------------------------------- training
def train(config):
    """Everything, from files to the table at the end. Returns the exit status."""
    out, done, start_from = None, 0, config.model
    if config.resume:
        out = Path(config.out)
        done = runs.last_step(out, config.steps)
        start_from = f"{out}/checkpoints/step-{done}"
    rows, test_rows, reward = load_prompts(config)
    model, tokenizer = load_model(start_from)
    options.fill_defaults(config, len(rows))
    prepare(rows + test_rows, model, tokenizer, config.max_new_tokens, config.plain)
    encoder, optimizer = load_encoder(config.encoder), optimizer_of(model, config)
    setup = Setup(model, tokenizer, encoder, reward, optimizer)
    if config.beta > 0:
        setup.reference = load_model(config.model)[0].requires_grad_(False)

    if config.resume:
        runs.restore(out, done, config, setup)
        with runs.explained(f"cannot write to {out}"):
            runs.cut_log(out / "metrics.jsonl", done)
            runs.cut_log(out / "samples.jsonl", done)
        runs.write_run(out, config)  # --steps may be new
    else:
        out = runs.open_run(config)
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        runs.save_checkpoint(out, 0, config, setup, runs.random_state())

    report.introduce(config, model, tokenizer, rows, done)
    status = loop(config, out, done, setup, rows)
    if status:
        return status
    with runs.explained(f"cannot save the model to {out}"):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    conclude(config, setup, test_rows)
    return 0


def optimizer_of(model, config):
    if config.gradient_checkpointing:  # transformers before 5.20 has the old name only
        new_name = getattr(model, "activation_checkpointing_enable", None)
        (new_name or model.gradient_checkpointing_enable)()
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)


def learning_rate(config, step):
    """Constant, then linear to 0 over the second half, to average out the noise."""
    return config.lr * min(1.0, 2 * (1 - (step - 1) / config.steps))


def loop(config, out, done, setup, rows):
    """The steps after `done`. Returns the exit status: 0, or 128 + the signal that stopped it."""
    step, start = done, time.time()
    bar = tqdm(total=config.steps, initial=done, desc=config.objective, dynamic_ncols=True,
               disable=not sys.stderr.isatty())
    with runs.noted_signals() as received, bar:
        for step in range(done + 1, config.steps + 1):
            for group in setup.optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            metrics, samples = one_step(config, out, step, setup, rows)
            show_progress(bar, step, metrics, (time.time() - start) / (step - done))
            if step == 1 or step % max(1, config.steps // 4) == 0:
                report.show_group(step, samples[:config.k], metrics)
            if step % config.save_every == 0 or step == config.steps or received:
                # after the logs of the step, see `cut_log`
                runs.save_checkpoint(out, step, config, setup, runs.random_state())
            if received:
                break
    if received and step < config.steps:
        print(f"\nstopped after step {step}, everything is saved. To go on:\n"
              f"  python train.py --resume {shlex.quote(str(out))}")
        return 128 + received[0]
    print(f"\ntrained {config.steps - done} steps in {time.time() - start:.0f} s")
    return 0


def one_step(config, out, step, setup, rows):
    """A step and its lines in the logs. If a number is not finite, what was learned is saved."""
    began, before = time.time(), runs.random_state()
    batch = batch_of(rows, step, config.prompts, config.seed)
    try:
        metrics = dqo_step(setup.model, setup.tokenizer, setup.encoder, setup.reward,
                           setup.optimizer, batch, config, setup.reference, setup.memory)
    except BadInput as error:
        if config.epochs == 1:  # raised before the weights were touched
            runs.save_checkpoint(out, step - 1, config, setup, before)
        last = max(runs.checkpoints(out))
        raise BadInput(f"step {step}: {error}; --resume {out} goes on after step {last}") from None
    samples = metrics.pop("samples")
    texts = [sample["response"] for sample in samples]
    metrics["step_s"] = time.time() - began
    metrics["beyond_window"] = report.share_beyond_window(setup.encoder, texts)
    runs.append(out / "metrics.jsonl", [dict(step=step, **metrics)])
    runs.append(out / "samples.jsonl", [dict(step=step, **sample) for sample in samples])
    return metrics, samples


def show_progress(bar, step, metrics, pace):
    """On a terminal a progress bar; elsewhere (a file, a pipe) a line per tenth of the run."""
    state = (f"quality {metrics['quality']:.2f}, log det {metrics['log_det']:.2f}, "
             f"distinct {metrics['distinct']:.2f}, length {metrics['length']:.1f}, "
             f"truncated {metrics['truncated']:.2f}, {pace:.2f} s/step")
    bar.set_postfix_str(state, refresh=False)
    bar.update()
    if bar.disable and step * 10 // bar.total > (step - 1) * 10 // bar.total:
        print(f"step {step} of {bar.total}  {state}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------- the last word
def conclude(config, setup, rows):
    """The table base -> trained on the test prompts, a picture, and what to type next."""
    base = setup.reference or load_model(config.model)[0]
    sampling = Sampling(EVAL_N, config.max_new_tokens, config.temperature, plain=config.plain)
    judges = Judges(setup.encoder, setup.reward)
    before = evaluate("base", (base, setup.tokenizer), judges, rows, sampling)
    after = evaluate("trained", (setup.model, setup.tokenizer), judges, rows, sampling)
    print(report.change(before, after))
    picture = report.plot_run(config.out)
    if picture:
        print(f"\nthe curves of the run: {picture}")
    print(next_commands(config))


def next_commands(config):
    """A comparison with `grpo` shows what diversity changed; after one with grpo, the other."""
    usual = vars(RunConfig(objective=config.objective)) | (
        options.TINY if is_tiny(config.model) else options.OTHER)
    ours = ("objective", "alpha", "kernel", "out", "overwrite", "resume")
    same = flags_that_differ(config, usual, [name for name in usual if name not in ours])
    if config.objective == "grpo":
        return f"\nnext, the same with diversity:\n  python train.py{same}"
    of_eval = ("data", "reward", "encoder", "temperature", "plain", "prompt_key", "answer_key")
    other = shlex.quote(f"{config.out}-grpo")
    models = f"{shlex.quote(config.model)} {shlex.quote(config.out)} {other}"
    return (
        "\nHow much of that is due to diversity? Next, the same without it, then both in one "
        f"picture:\n  python train.py --objective grpo --out {other}{same}\n"
        f"  python eval.py {models} --limit {EVAL_PROMPTS}"
        f"{flags_that_differ(config, usual, of_eval)} --plot plane.png")


def flags_that_differ(config, usual, names):
    """The command line of the options that are not as usual."""
    line = ""
    for name, value in vars(config).items():
        if name in names and value != usual[name]:
            line += f" {flag(name)}"
            if value is not True:
                line += f" {shlex.quote(str(value))}"
    return line


def main(argv=None):
    """Exit status: 0 done, 2 bad input, 130 or 143 after SIGINT or SIGTERM, all saved."""
    try:
        return train(parse(argv))
    except BadInput as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"train.py: {first_line(error)} (use a smaller --micro-batch, or "
              "--gradient-checkpointing)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a second Ctrl-C, or one before the first step
        return 130


if __name__ == "__main__":
    sys.exit(main())
