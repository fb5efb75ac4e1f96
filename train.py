"""Train a language model with DQO, or with one of the objectives beside it.

    python train.py                                         # the tiny base model on the four miniature tasks, on a CPU
    python train.py --objective grpo --out runs/grpo        # the same without diversity, to compare
    python train.py --data my.jsonl --reward my.py:score --model data/tiny

Everything that happens in a step is in `dqo.dqo_step`. This file only reads flags, feeds prompts, shows progress and
writes the run folder, which plain transformers loads (`AutoModelForCausalLM.from_pretrained(folder)`):

    run.json        the resolved configuration and versions
    metrics.jsonl   a line per step          samples.jsonl   every sampled response with its quality, gain, advantage
"""

import argparse
import dataclasses
import functools
import json
import math
import platform
import random
import shutil
import sys
import time
import typing
from pathlib import Path

import sentence_transformers
import torch
import transformers
from tqdm import tqdm

import eval as evaluation
from data.tasks import load_reward, load_rows
from dqo import BadInput, Config, dqo_step, load_encoder, load_model, prompt_ids

# What the defaults of data/tiny were tuned to, and what any other model gets. A real model needs a small learning rate
# and a KL penalty to stay fluent; the tiny one, whose rewards are strict, needs neither.
TINY = dict(lr=3e-4, beta=0.0, max_new_tokens=24, steps=640)
OTHER = dict(lr=1e-6, beta=0.05, max_new_tokens=256)
EVAL_PROMPTS, EVAL_N = 32, 16  # the table at the end: at most so many test prompts per task, so many responses each


def parse(argv=None):
    """Config from the command line: one flag per field."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), hints[f.name]
        text = f.metadata["help"] + ("" if f.default in (None, False) else f" [{f.default}]")
        if kind is bool:
            p.add_argument(flag, action="store_true", help=text)
        else:
            kind = next(t for t in (typing.get_args(kind) or (kind,)) if t is not type(None))  # int | None -> int
            p.add_argument(flag, type=kind, default=f.default, choices=f.metadata.get("choices"), help=text)
    config = Config(**vars(p.parse_args(argv)))
    config.check()
    return config


def fill_defaults(config, prompts):
    """Give every option that was left open its value for this model and data."""
    defaults = TINY if Path(config.model).name == "tiny" else dict(OTHER, steps=math.ceil(prompts / config.prompts))
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def open_run(config):
    """Create the run folder, or refuse to touch one that holds another run."""
    if config.out is None:
        names = (f"runs/{config.objective}" + (f"-{i}" if i > 1 else "") for i in range(1, 10 ** 6))
        config.out = next(name for name in names if not Path(name).exists())
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        is_run = (out / "run.json").is_file()
        if not (config.overwrite and is_run):
            raise BadInput(f"--out {out} exists" + ("; --overwrite replaces it" if is_run else " and is no run folder: name another"))
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}") from None
    return out


@functools.lru_cache(maxsize=2)
def order(count, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


def batch_of(rows, step, prompts, seed):
    """The rows of one step: shuffled passes over the data, and a function of (seed, step) alone."""
    where = (divmod(i, len(rows)) for i in range((step - 1) * prompts, step * prompts))
    batch = [rows[order(len(rows), seed, epoch)[i]] for epoch, i in where]
    return sorted(batch, key=lambda row: len(row["ids"]))  # so that a micro-batch has little padding


def show_group(step, samples):
    """One prompt's group, best advantage first, above the progress bar."""
    lines = [f"step {step}  {str(samples[0]['prompt'])[-110:]!r}    quality   gain  advantage"]
    for s in sorted(samples, key=lambda s: -s["advantage"]):
        lines.append(f"    {s['quality']:5.2f}  {s['gain'] + 0.0:6.3f}  {s['advantage']:+6.2f}   {s['response'][:90]!r}")
    tqdm.write("\n".join(lines))


def dump(value):
    """JSON without NaN: a number that was not measured is null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()})


def train(config):
    torch.manual_seed(config.seed)
    rows = load_rows(config.data, "train", config.limit, config.prompt_key, config.answer_key)
    reward = load_reward(config.reward, config.data)
    model, tokenizer = load_model(config.model)
    fill_defaults(config, len(rows))
    encoder = load_encoder(config.encoder)
    reference = load_model(config.model)[0].requires_grad_(False) if config.beta > 0 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    for row in rows:  # tokenized once; the text stays for the reward and the samples
        row["ids"] = prompt_ids(tokenizer, row["prompt"], config.plain)
    out = open_run(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{config.objective} on {config.model} ({parameters:,} parameters, {model.device}), {len(rows)} prompts of {config.data}\n"
          + "  ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items() if k not in ("model", "data", "objective") and v is not None))
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
                    sentence_transformers=sentence_transformers.__version__)
    (out / "run.json").write_text(json.dumps(dict(config=dataclasses.asdict(config), versions=versions), indent=1))

    start, pace, known = time.time(), None, {}
    with open(out / "metrics.jsonl", "a") as metrics_file, open(out / "samples.jsonl", "a") as samples_file, \
            tqdm(total=config.steps, desc=config.objective, dynamic_ncols=True) as bar:
        for step in range(1, config.steps + 1):
            began = time.time()
            for group in optimizer.param_groups:  # constant, then linear to 0 over the second half, to average out the noise
                group["lr"] = config.lr * min(1.0, 2 * (1 - (step - 1) / config.steps))
            batch = batch_of(rows, step, config.prompts, config.seed)
            metrics = dqo_step(model, tokenizer, encoder, reward, optimizer, batch, config, reference, known)
            if len(known) > 50_000:  # 75 MB of embeddings
                known.clear()
            samples = metrics.pop("samples")
            metrics["step_s"] = time.time() - began
            metrics_file.write(dump(dict(step=step, **metrics)) + "\n")
            samples_file.writelines(dump(dict(step=step, **s)) + "\n" for s in samples)
            pace = metrics["step_s"] if pace is None else 0.9 * pace + 0.1 * metrics["step_s"]
            bar.set_postfix_str(f"quality {metrics['quality']:.2f}, log det {metrics['log_det']:.2f}, distinct {metrics['distinct']:.2f}, "
                                f"length {metrics['length']:.1f}, truncated {metrics['truncated']:.2f}, {pace:.2f} s/step", refresh=False)
            bar.update()
            if step == 1 or step % max(1, config.steps // 4) == 0:
                show_group(step, samples[:config.k])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"\ntrained {config.steps} steps in {time.time() - start:.0f} s")
    base = reference or load_model(config.model)[0]
    report(config, base, model, tokenizer, encoder, reward)


def report(config, base, model, tokenizer, encoder, reward):
    """The table base -> trained on the test prompts, and what to type next."""
    rows = load_rows(config.data, "test", min(config.limit or EVAL_PROMPTS, EVAL_PROMPTS), config.prompt_key, config.answer_key)
    common = dict(tokenizer=tokenizer, encoder=encoder, rows=rows, reward=reward, n=EVAL_N, max_new_tokens=config.max_new_tokens,
                  temperature=config.temperature, plain=config.plain)
    before, after = (evaluation.by_model(evaluation.evaluate(name, m, **common))[name]
                     for name, m in (("base", base), ("trained", model)))
    print(f"\n{len(rows)} test prompts, {EVAL_N} responses each, base -> trained\n"
          f"{'task':<12}{'quality':>15}{'pass@' + str(EVAL_N):>16}{'distinct correct':>20}{'1 - self-BLEU':>17}{'log det':>18}")
    for b, a in zip(before, after):
        print(f"{b['task']:<12}{b['quality']:>7.2f} -> {a['quality']:.2f}{b['pass_at'][str(EVAL_N)]:>8.2f} -> {a['pass_at'][str(EVAL_N)]:.2f}"
              f"{b['distinct_correct']:>11.1f} -> {a['distinct_correct']:4.1f}{b['self_bleu_diversity']:>9.2f} -> {a['self_bleu_diversity']:.2f}"
              f"{b['log_det']:>9.2f} -> {a['log_det']:5.2f}")
    data = "" if config.data == Config.data else f" --data {config.data}" + (f" --reward {config.reward}" if config.reward else "")
    other = "grpo" if config.objective != "grpo" else "dqo"
    print(f"\nnext, the same without diversity, then both in one picture:\n  python train.py --objective {other} --out runs/{other}-compare{data}"
          f"\n  python eval.py {config.model} {config.out} runs/{other}-compare{data} --plot plane.png" if other == "grpo" else
          f"\nnext, the same with diversity:\n  python train.py{data}")


def main(argv=None):
    """Exit status: 0 done, 2 bad input."""
    try:
        train(parse(argv))
    except BadInput as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
