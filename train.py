"""Train a language model with DQO, or with one of the objectives beside it.

    python train.py                                    # the tiny model on four small tasks, CPU
    python train.py --objective grpo --out runs/grpo   # the same without diversity, to compare
    python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my.jsonl --reward my.py:score
    python train.py --resume runs/dqo                  # after a crash: the very same weights

What happens in a step is `dqo.dqo_step`, what is in the run folder data/runs.py. This file only
reads flags, feeds prompts and shows progress.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import random
import shlex
import sys
import time
import traceback
import typing
from pathlib import Path

import torch
from tqdm import tqdm

from data import lora, options, pictures, report, runs, terminal
from data.models import (
    checkpoint_activations,
    halve,
    json_object,
    load_encoder,
    load_model,
    memory_hint,
)
from data.objectives import load_objective
from data.options import RunConfig
from data.prompts import load_rows, prepare
from data.runs import Setup
from data.scoring import check_rows, load_reward
from dqo import BadInput, dqo_step
from eval import Judges, Sampling, evaluate

EVAL_PROMPTS, EVAL_N = 32, 16  # the last table: test prompts per task at most, responses each


TOO_LARGE = ("the weights, their gradients and AdamW's state take 16 bytes per parameter, and with "
             "--beta above 0 the reference more: a smaller --model, or --lora 16, needs less")


# -------------------------------------------------------------------------------------- flags
def parse(argv=None):
    """RunConfig from the command line. With --resume it comes from the run, but for a few."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    hints = typing.get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        add_flag(parser, field, hints[field.name])
    given = vars(parser.parse_args(argv))  # only what was given, see `add_flag`
    if "objective" in given:
        load_objective(given["objective"])
    if "template_args" in given:
        given["template_args"] = json_object("--template-args", given["template_args"])
    config = RunConfig(**given)
    config.check()
    if config.resume is None:
        return config
    for name in given:
        if name not in ("resume", *runs.CHANGEABLE):
            raise BadInput(f"{flag(name)} cannot be given with --resume: everything but "
                           f"{', '.join(map(flag, runs.CHANGEABLE))} is taken from "
                           f"{config.resume}/run.json")
    return runs.resumed(**given)


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
    kind = str if kinds[0] is dict else kinds[0]  # JSON: `parse` reads it
    parser.add_argument(flag(field.name), type=kind, default=argparse.SUPPRESS,
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
    reward = load_reward(config.reward, config.data, config.threshold)
    check_rows(rows + test_rows, reward)
    return rows, test_rows, reward


# ----------------------------------------------------------------------------------- training
def train(config):
    """Everything, from files to the table at the end. Returns the exit status."""
    with contextlib.ExitStack() as held:  # the run folder, against a second process
        return train_alone(config, held)


def train_alone(config, held):
    out, done, start_from = None, 0, config.model
    if config.resume:
        out = Path(config.out)
        done = runs.last_step(out, config.steps)
        held.enter_context(runs.locked(out))
        start_from = f"{out}/checkpoints/step-{done}"
    rows, test_rows, reward = load_prompts(config)
    model, tokenizer = policy(config, start_from)
    rows, test_rows = fitting(config, model, tokenizer, rows, test_rows)
    options.fill_defaults(config, len(rows))
    encoder = load_encoder(config.encoder, prompt=config.encoder_prompt)
    setup = Setup(model, tokenizer, encoder, reward, optimizer_of(model, config))
    setup.reference = reference(config, model)

    if config.resume:
        runs.restore(out, done, config, setup)
        with runs.explained(f"cannot write to {out}"):
            runs.cut_log(out / "metrics.jsonl", done)
            runs.cut_log(out / "samples.jsonl", done)
        runs.write_run(out, config)  # --steps may be new
    else:
        out = runs.open_run(config, held)
        runs.seed_everything(config.seed)

    start = time.time()
    with runs.noted_signals() as received:
        if not config.resume:
            runs.save_checkpoint(out, 0, config, setup, runs.random_state())
        with terminal.closing_noted(received):
            report.introduce(config, model, tokenizer, rows, done, reward)
        step = loop(config, out, done, setup, rows, received)
    if received and step < config.steps:
        with terminal.closing_noted(received):
            print(f"\nstopped after step {step}, everything is saved. To go on:\n"
                  f"  python train.py --resume {shlex.quote(str(out))}",
                  file=sys.stderr if terminal.SIGPIPE in received else sys.stdout)
        return 128 + received[0]
    with runs.explained(f"cannot save the model to {out}"):
        trained(config, model).save_pretrained(out)
        tokenizer.save_pretrained(out)
    print(f"\ntrained {config.steps - done} steps in {time.time() - start:.0f} s")
    with memory_hint(f"training is over, and the model is in {out}; for a table: python eval.py "
                     f"{shlex.quote(config.model)} {shlex.quote(str(out))} --batch 64"):
        conclude(config, setup, test_rows)
    return 0


def fitting(config, model, tokenizer, *parts):
    """The training and the test rows that the model can be given, with --skip-long only those
    that are not too long."""
    length = config.max_new_tokens or options.defaults_of(config)["max_new_tokens"]
    fit = [prepare(rows, model, tokenizer, length, config.plain, config.template_args,
                   config.skip_long) for rows in parts]
    if config.skip_long:
        total = sum(map(len, parts))
        print(f"{total - sum(map(len, fit))} of {total} prompts, training and test, are skipped: "
              "too long")
    return fit


def policy(config, start_from):
    """(the model to train, its tokenizer), as after the step of a checkpoint or from the start.
    With --lora the checkpoint holds the adapters alone, which `runs.restore` loads."""
    if not config.lora:
        return load_model(start_from)
    lora.peft()  # is it there? A large model takes minutes to load
    model, tokenizer = load_model(config.model)
    model = lora.with_adapters(model, config.model, config.lora, config.seed)
    return halve(model), tokenizer


def reference(config, model):
    """The starting model, or None if nothing needs it."""
    if config.lora:
        return lora.AdaptersOff(model)
    if config.beta > 0:
        return halve(load_model(config.model)[0].requires_grad_(False))
    return None


def trained(config, model):
    """The model that the run ends in: with --lora, the adapters of the last checkpoint merged
    into another copy of the model, on the CPU, since the table compares with them off."""
    if config.lora:
        return load_model(f"{config.out}/checkpoints/step-{config.steps}", "cpu")[0]
    return model


def optimizer_of(model, config):
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    parameters = [p for p in model.parameters() if p.requires_grad]  # with --lora a few
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)


def learning_rate(config, step):
    """Constant, then linear to 0 over the second half, to average out the noise."""
    return config.lr * min(1.0, 2 * (1 - (step - 1) / config.steps))


def loop(config, out, done, setup, rows, received):
    """The steps after `done`, until a signal is received. Returns the last."""
    step, start = done, time.time()
    bar = tqdm(total=config.steps, initial=done, desc=config.objective, dynamic_ncols=True,
               disable=not sys.stderr.isatty())
    with bar:
        for step in range(done + 1, config.steps + 1):
            for group in setup.optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            metrics, samples = one_step(config, out, step, setup, rows)
            with terminal.closing_noted(received):  # as in `| head`: that is a Ctrl-C
                show_progress(bar, step, metrics, (time.time() - start) / (step - done))
                if step == 1 or step % max(1, config.steps // 4) == 0:
                    report.show_group(step, samples[:config.k], metrics)
                if step == 1:
                    report.after_first_step(metrics, samples, config, setup.reward)
            if step % config.save_every == 0 or step == config.steps or received:
                # after the logs of the step, see `cut_log`
                runs.save_checkpoint(out, step, config, setup, runs.random_state())
            if received:
                break
    return step


def one_step(config, out, step, setup, rows):
    """A step and its lines in the logs. If a number is not finite, what was learned is saved."""
    began, before = time.time(), runs.random_state()
    batch = batch_of(rows, step, config.prompts, config.seed)
    try:
        with memory_hint(functools.partial(less_memory, config)):
            metrics = dqo_step(setup.model, setup.tokenizer, setup.encoder, setup.reward,
                               setup.optimizer, batch, config, setup.reference, setup.memory)
    except BadInput as error:
        if config.epochs == 1:  # raised before the weights were touched
            runs.save_checkpoint(out, step - 1, config, setup, before)
        last = max(runs.checkpoints(out))
        raise BadInput(f"step {step}: {error}; --resume {shlex.quote(str(out))} goes on after "
                       f"step {last}") from None
    samples = metrics.pop("samples")
    texts = [sample["response"] for sample in samples]
    metrics["step_s"] = time.time() - began
    metrics["beyond_window"] = report.share_beyond_window(setup.encoder, texts)
    runs.append(out / "metrics.jsonl", [dict(step=step, **metrics)])
    runs.append(out / "samples.jsonl", [dict(step=step, **sample) for sample in samples])
    return metrics, samples


def less_memory(config, error):
    """What to do when a step did not fit into memory."""
    while_sampling = any(x.name == "sample" for x in traceback.extract_tb(error.__traceback__))
    size = config.micro_batch or config.prompts * config.k
    if while_sampling or (size == 1 and config.gradient_checkpointing):
        return "a new run with a smaller --prompts, --k or --max-new-tokens needs less"
    resume = f"python train.py --resume {shlex.quote(config.out)}"
    ways = []
    if size > 1:
        ways.append(f"{resume} --micro-batch {size // 2}")
    if not config.gradient_checkpointing:
        ways.append(f"{resume} --gradient-checkpointing")
    return f"what needs less: {', or '.join(ways)}"


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
    sampling = Sampling(EVAL_N, config.max_new_tokens, config.temperature, plain=config.plain,
                        template_args=config.template_args)
    judges = Judges(setup.encoder, setup.reward)
    before = evaluate("base", (base, setup.tokenizer), judges, rows, sampling)
    after = evaluate("trained", (setup.model, setup.tokenizer), judges, rows, sampling)
    picture = pictures.plot_run(config.out)
    print(report.change(before, after))
    if picture:
        print(f"\nthe curves of the run: {picture}")
    print(next_commands(config))


def next_commands(config):
    """A comparison with `grpo` shows what diversity changed; after one with grpo, the other."""
    usual = vars(RunConfig(objective=config.objective)) | options.defaults_of(config)
    ours = ("objective", "alpha", "kernel", "out", "overwrite", "resume")
    same = flags_that_differ(config, usual, [name for name in usual if name not in ours])
    if config.objective == "grpo":
        return f"\nnext, the same with diversity:\n  python train.py{same}"
    of_eval = ("data", "reward", "threshold", "encoder", "encoder_prompt", "temperature", "plain",
               "template_args", "prompt_key", "answer_key", "skip_long")
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
            if isinstance(value, dict):
                value = json.dumps(value)
            if value is not True:
                line += f" {shlex.quote(str(value))}"
    return line


def main(argv=None):
    """Exit status: 0 done, 2 bad input, 130 or 143 after SIGINT or SIGTERM, 141 when nobody reads
    the output any more, all saved."""
    def work():
        with memory_hint(TOO_LARGE):
            return train(parse(argv))
    return terminal.run("train.py", work)


if __name__ == "__main__":
    sys.exit(main())
