"""Train a language model with DQO, or with another objective.

    python train.py                       # the tiny model on four small tasks
    python train.py --objective grpo      # the same without diversity, to compare
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k
    python train.py --model MODEL --data my.jsonl --reward my.py:score --lora 16
    python train.py --resume runs/dqo     # after a crash or Ctrl-C

A step is `dqo.dqo_step`. A run folder is a transformers model, with run.json, the flags;
metrics.jsonl, a line per step; samples.jsonl, every response; step-N, to resume.
"""

import hashlib
import inspect
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import filelock
import torch
from tqdm import tqdm
from transformers import set_seed

import dqo
import eval
from data.tasks import function_in, load_reward, load_rows, loaded, task_of
from dqo import BadInput

# Defaults of data/tiny and of others. A real model needs a small lr and a KL penalty, or it
# unlearns its language. Adapters start at 0 and want ten times the lr.
TINY = dict(lr=3e-4, beta=0.0, max_new_tokens=24, steps=480, micro_batch=32)
REAL = dict(lr=5e-6, beta=0.02, max_new_tokens=256, steps=None, micro_batch=16)
SUMMARY = "quality", "max@16", "distinct correct", "effective diversity"  # at the end
RESULTS = Path(__file__).resolve().parent / "data/results"


@dataclass
class Options(eval.Common, dqo.Config):
    model: str = "data/tiny"        # a folder or hub id
    lora: int = 0                   # train adapters of this rank in place of all weights
    gradient_checkpointing: bool = False  # a third more time, less memory
    lr: float | None = None         # of AdamW; decays over the second half [tiny: 3e-4, 5e-6]
    steps: int | None = None        # [tiny: 480, else one pass over the data, at most 1000]
    prompts: int = 8                # per step
    save_every: int = 100           # steps between checkpoints
    out: str | None = None          # the run folder [runs/OBJECTIVE, or the next free]
    resume: str | None = None       # a run folder to go on with; flags beside it are changed


def parse():
    """(options, hashes of inputs): with --resume those of the run, and over them what is given."""
    parser = eval.parser_of(Options)
    first, stored = parser.parse_args(), {}
    if first.resume:
        path = Path(first.resume, "run.json")
        if not path.is_file():
            raise BadInput(f"--resume {first.resume}: no run.json in it")
        stored = json.loads(path.read_text("utf-8"))
        parser.set_defaults(**dict(stored, out=first.resume))
    else:
        tiny = Path(first.model) == Path("data/tiny")
        out = f"runs/{first.objective.rpartition(':')[2]}"
        outs = [out, *(f"{out}-{i}" for i in range(2, 1000))]
        usual = dict(TINY if tiny else REAL, out=next(x for x in outs if not Path(x).exists()))
        usual["lr"] *= 10 if first.lora else 1
        parser.set_defaults(**usual, alpha=default_alpha(first.objective))
    options, *_ = parser.parse_args_into_dataclasses()
    default_alpha(options.objective)
    if not first.resume and Path(options.out).exists():
        raise BadInput(f"{options.out} exists: give --resume, or another --out")
    least = dict.fromkeys(("alpha", "lr", "beta", "lora", "limit"), 0) | dict(temperature=0.01)
    least |= dict.fromkeys(("steps", "prompts", "max_new_tokens", "epochs", "micro_batch",
                            "save_every"), 1)
    least["k"] = 1 if options.baseline == "none" else 3 if options.alpha else 2  # or no signal
    for name in least:
        value = getattr(options, name)
        if value is not None and not value >= least[name]:
            raise BadInput(f"--{name} {value}: here it is at least {least[name]}")
    return options, stored.get("inputs", {})


def default_alpha(name):
    """The default strength of an objective, which dqo_step then knows by name."""
    if name not in dqo.OBJECTIVES:
        where = name if ":" in name else f"{RESULTS}/rivals.py:{name}"
        try:
            dqo.OBJECTIVES[name] = function_in(where)
        except BadInput as error:
            error = str(error).removeprefix(f"{RESULTS}/")
            raise BadInput(f"--objective {name}: none of {', '.join(dqo.OBJECTIVES)}; as "
                           f"file.py:function {error}") from None
    alpha = inspect.signature(dqo.OBJECTIVES[name]).parameters.get("alpha")
    if not isinstance(getattr(alpha, "default", None), (int, float)):
        raise BadInput(f"--objective {name}: it needs a parameter alpha=NUMBER")
    return alpha.default


def inputs_of(options):
    """{file: hash} of what a resumed run should find as it was."""
    files = [task_of(name).source for name in options.data.split(",")]
    files += [str(name).rpartition(":")[0] for name in (options.reward, options.objective)]
    if options.lora or options.beta > 0:  # the reference
        files += Path(options.model).glob("*.safetensors")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in map(Path, files) if path.is_file()}


# ---- the model and its copy
def load(options, checkpoint):
    """(model, tokenizer, reference, optimizer, known embeddings), at the start or a checkpoint."""
    start = checkpoint if checkpoint and not options.lora else options.model
    load_model = partial(dqo.load_model, bf16=options.bf16, frozen=bool(options.lora))
    model, tokenizer = loaded("--model", load_model, str(start))
    options.bf16, reference = model.bf16, None
    if options.lora:  # adapters beside frozen weights; switched off, it is the reference
        from peft import LoraConfig, PeftModel, get_peft_model
        if checkpoint:
            model = PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
        else:
            model = get_peft_model(model, LoraConfig(
                r=options.lora, lora_alpha=2 * options.lora, target_modules="all-linear"))
        reference = AdaptersOff(model)
    elif options.beta > 0:
        reference, _ = dqo.load_model(options.model, options.bf16, frozen=True)
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.0, fused=True)
    if not checkpoint:
        if model.bf16 and not options.lora:
            dqo.dither(model)
        return model, tokenizer, reference, optimizer, {}
    state = torch.load(checkpoint / "state.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(state["optimizer"])
    return model, tokenizer, reference, optimizer, state["known"]


class AdaptersOff:
    """The starting model, within the one that is trained."""

    def __init__(self, model):
        self.model = model

    def __call__(self, **inputs):
        with self.model.disable_adapter():
            return self.model(**inputs)

    def __getattr__(self, name):
        return getattr(self.model, name)


# ---- the run folder
def save(out, step, model, tokenizer, optimizer, known):
    """All that the next step needs; its random numbers are a function of seed and step.
    Written under another name, then renamed: step-N is complete."""
    if (out / f"step-{step}").exists():
        return
    new = out / "writing"
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)  # of LoRA, the adapters alone
    tokenizer.save_pretrained(new)
    torch.save(dict(optimizer=optimizer.state_dict(), known=known), new / "state.pt")
    os.replace(new, out / f"step-{step}")
    for old in eval.checkpoints(out)[:-1]:
        shutil.rmtree(old)


def cut(path, step):
    """Drop what was logged after a checkpoint: it will be run again."""
    whole = path.read_text("utf-8").split("\n")[:-1]  # the last line may be half-written
    path.write_text("".join(x + "\n" for x in whole if json.loads(x)["step"] <= step), "utf-8")


# ---- training
def batch_of(rows, step, prompts, seed):
    """The rows of one step of shuffled passes over the data, a function of seed and step."""
    batch = []
    for position in range((step - 1) * prompts, step * prompts):
        epoch, i = divmod(position, len(rows))
        if i == 0 or not batch:
            order = random.Random(f"{seed} {epoch}").sample(range(len(rows)), len(rows))
        batch.append(rows[order[i]])
    return batch


def show(step, samples, metrics):
    """One prompt's group, best advantage first."""
    print(f"step {step}  {str(samples[0]['prompt'])[-90:]!r}\n  quality   gain  advantage")
    for x in sorted(samples, key=lambda x: -x["advantage"]):
        numbers = "{quality:9.2f}  {gain:5.3f}  {advantage:+9.2f}".format(**x)
        print(f"{numbers}   {x['response'][:90]!r}")
    if metrics["quality_std"] < 1e-6 or metrics["truncated"] > 0.5:
        print("  WARNING  {truncated:.0%} of the responses were cut off, and qualities differ by "
              "{quality_std:.2f} within a group: is there a signal?".format(**metrics))


def train(options, inputs):
    """From files to the final table. inputs: the hashes with which a resumed run began."""
    out, done, checkpoint = Path(options.out), 0, None
    rows, test_rows = (load_rows(options.data, split, limit) for split, limit in (
        ("train", options.limit), ("test", min(options.limit or 32, 32))))
    reward = load_reward(options.reward, rows + test_rows)
    encoder = loaded("--encoder", dqo.load_encoder, options.encoder)
    if options.resume and eval.checkpoints(out):
        checkpoint = eval.checkpoints(out)[-1]
        done = int(checkpoint.name.removeprefix("step-"))
    set_seed(options.seed)
    model, tokenizer, reference, optimizer, known = load(options, checkpoint)
    eval.use_one_thread(model)
    rows, test_rows = (eval.fitting(part, model, tokenizer, options) for part in (rows, test_rows))
    options.steps = options.steps or min(1000, -(-len(rows) // options.prompts))
    open_run(out, done, options, inputs)
    print(options, f"{model.num_parameters():,} parameters, {len(rows)} prompts", sep="\n")
    if "strftime_now" in str(tokenizer.chat_template):
        print("WARNING  the chat template writes today's date: see Models in data/README.md")

    stop = []  # the first Ctrl-C or SIGTERM ends the run after its step, a second at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: sys.exit(128 + n) if stop else stop.append(n))
    bar = tqdm(range(done + 1, options.steps + 1), initial=done, total=options.steps,
               mininterval=1 if sys.stderr.isatty() else 60)
    for step in bar:
        began = time.time()
        set_seed((options.seed * 1_000_003 + step) % 2 ** 32)
        lr = options.lr * min(1.0, 2 * (1 - (step - 1) / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = batch_of(rows, step, options.prompts, options.seed)
        try:
            metrics, samples = dqo.dqo_step(
                model, tokenizer, encoder, reward, optimizer, batch, options, reference, known)
        except Exception:  # nothing of this step is in the weights yet
            if options.epochs == 1 and step > done + 1:
                save(out, step - 1, model, tokenizer, optimizer, known)
                print(f"\nstep {step} failed; to repeat it: python train.py --resume {out} (out of "
                      "memory: --micro-batch 4 --gradient-checkpointing)")
            raise
        metrics |= dict(step=step, lr=lr, step_s=time.time() - began)
        shown = ("quality", "log_det", "distinct", "length")
        bar.set_postfix({name: f"{metrics[name]:.2f}" for name in shown}, refresh=False)
        eval.append(out / "metrics.jsonl", [metrics])
        eval.append(out / "samples.jsonl", [dict(step=step, **sample) for sample in samples])
        if step == 1 or step % max(1, options.steps // 4) == 0:
            show(step, samples[:options.k], metrics)
        if step % options.save_every == 0 or step == options.steps or stop:
            save(out, step, model, tokenizer, optimizer, known)  # after the logs: see `cut`
        if stop and step < options.steps:
            print(f"\nstopped after step {step}; to go on: python train.py --resume {out}")
            sys.exit(128 + stop[0])

    stop.append(0)  # from here on one signal is enough
    if options.lora:  # into float32 weights
        model, _ = eval.load_policy(str(eval.checkpoints(out)[-1]), options.bf16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    conclude(out, options, (model, tokenizer), reference, encoder, reward, test_rows)


def open_run(out, done, options, inputs):
    """The run folder, of this process alone, with the logs up to the step that is done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        options.lock = filelock.FileLock(out / ".lock")  # held as long as the options live
        options.lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BadInput(f"another process is at work in {out}") from None
    except OSError as error:
        raise BadInput(f"--out {out}: {error}") from None
    for log in out.glob("*.jsonl"):
        cut(log, done)
    now = inputs_of(options)
    for path in sorted(path for path in inputs if inputs[path] != now.get(path)):
        print(f"WARNING  {path} is not what it was when the run began")
    stored = dict(asdict(options), resume=None, inputs=now, torch=torch.__version__)
    (out / "run.json").write_text(json.dumps(stored, indent=1))


def conclude(out, options, policy, reference, encoder, reward, rows):
    """Table and picture of this run and its base; beside a default run GRPO, recorded."""
    def measured(name, policy, rows, **more):
        return eval.evaluate(name, policy, encoder, reward, rows, replace(options, **more),
                             keep=groups.append)

    known, groups = json.loads((RESULTS / "first.json").read_text("utf-8")), []
    is_default = asdict(options) | known["options"] == asdict(options)
    test, hard = known["test"], known["hard"]
    if not is_default:
        base = reference or dqo.load_model(options.model, options.bf16)[0]
        test, hard = measured("base", (base, policy[1]), rows), []
    test += measured("this run", policy, rows)
    print(eval.table(test, SUMMARY))
    if is_default:
        hard += measured("this run", policy, load_rows(options.data, "hard", 32), n=32)
        print("\nHARD prompts, rare in training" + eval.table(hard, (*SUMMARY, "pass@16")))
        print(f"\n{groups[0][0]['prompt']!r} (* wrong)")
        for name, group in groupby(known["answers"] + groups[0][:8], lambda x: x["model"]):
            marked = (x["response"] + "*" * (x["quality"] < 1) for x in group)
            print(f"{name:>20}  {', '.join(marked)}")
    eval.plot(test, out / "run.png", hard)
    other = "dqo" if options.objective == "grpo" else "grpo"
    print(f"""
The model and run.png are in {out}. To compare, on its --data:
    python train.py --objective {other}
    python eval.py {options.model} {out} runs/{other}""")


if __name__ == "__main__":
    eval.run(lambda: train(*parse()))
