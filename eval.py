"""Quality and diversity of any number of models, side by side.

    python eval.py data/tiny runs/dqo     # four miniature tasks, 16 responses a prompt
    python eval.py data/tiny runs/grpo runs/dqo --plot plane.png --json eval.json

Every metric is of one prompt's n responses, then a mean over prompts, ± its standard error.
Higher is more diverse for all diversity metrics. WARNING: log det, Vendi and cosine distance live
in the space that DQO optimises, and distinct-n and self-BLEU love gibberish. Judge by quality,
pass@n, distinct correct and effective diversity.
"""

import inspect
import json
import re
import sys
from argparse import BooleanOptionalAction, RawDescriptionHelpFormatter
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import HfArgumentParser, logging, set_seed

import dqo
from data.metrics import by_model, group_metrics, labelled, over, standard_error
from data.tasks import load_reward, load_rows, loaded, task_of
from dqo import BadInput


# ---- a model on many prompts
def fitting(rows, model, tokenizer, options):
    """The rows whose prompt leaves room for the longest response. A token is drawn: a model that
    cannot be sampled is refused before a run."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", 10 ** 6)
    room, known = context - options.max_new_tokens, model.get_input_embeddings().num_embeddings
    ids = [dqo.prompt_ids(tokenizer, row["prompt"], options.template) for row in rows]
    for row, x in zip(rows, ids):
        if max(x, default=0) >= known:
            raise BadInput(f"{row['_where']}: token {max(x)}, and the model has only {known}")
    fit = [i for i, x in enumerate(ids) if 0 < len(x) <= room]
    misfits = (f"{len(rows) - len(fit)} of {len(rows)} prompts are empty, or leave no room for "
               f"--max-new-tokens {options.max_new_tokens}")
    if not fit:
        raise BadInput(misfits)
    if len(fit) < len(rows):
        print(f"{misfits}: left out")
    one = ids[fit[0]]
    loaded("cannot be sampled here: a model of type", lambda _: dqo.sample(
        model, tokenizer, [one], 1, 1), model.config.model_type)
    return [rows[i] for i in fit]


def evaluate(name, policy, encoder, reward, rows, options, keep=None):
    """n responses to each row, measured: the objects of --json, one per task.

    policy: (model, tokenizer); reward: None leaves out what needs one
    keep:   a function that gets each prompt's responses, a list of dicts"""
    set_seed(options.seed)
    (model, tokenizer), n, drawn, per_task = policy, options.n, [], {}
    k = max(m for m in range(1, min(n, options.batch) + 1) if n % m == 0)  # n, if it fits
    P = max(1, options.batch // k)
    ids = [dqo.prompt_ids(tokenizer, row["prompt"], options.template)
           for row in rows for _ in range(n // k)]
    for i in tqdm(range(0, len(ids), P), leave=False, disable=None):
        rollout = dqo.sample(model, tokenizer, ids[i:i + P], k, options.max_new_tokens,
                             options.temperature)
        columns = rollout.mask.sum(-1), rollout.truncated  # (P, k) each
        drawn += zip(rollout.texts, rollout.whole, *(x.flatten().tolist() for x in columns))
        while len(drawn) >= n:  # all of the next row is there
            row = rows[sum(map(len, per_task.values()))]
            (texts, whole, tokens, truncated), drawn = zip(*drawn[:n]), drawn[n:]
            scores = reward and reward([row["prompt"]] * n, list(texts), [row] * n)
            phi = dqo.embed(encoder, texts)
            metrics = group_metrics(texts, scores, phi, threshold_of(row["_task"], options))
            metrics |= dict(mean_tokens=sum(tokens) / n, truncated=sum(truncated) / n)
            per_task.setdefault(row["_task"], []).append(metrics)
            if keep:
                keep([dict(model=name, task=row["_task"], prompt=row["prompt"], response=text,
                           quality=score) for text, score in zip(whole, scores or [None] * n)])
    return [dict(model=name, task=task, prompts=len(found), n=n,
                 threshold=threshold_of(task, options), **over(found, torch.mean),
                 se=over(found, standard_error)) for task, found in per_task.items()]


def threshold_of(task, options):
    """From which reward a response is correct: as given, or that of the task whose reward it is."""
    given = options.threshold
    return task_of(options.reward or task).threshold if given is None else given


def table(results, labels=None):
    """A block per task: metrics down, all or some, models across."""
    models, lines = by_model(results), []
    about = {result["task"]: "{task}: {prompts} prompts, {n} responses each, correct from "
             "{threshold}".format(**result) for result in results}
    for task in next(iter(models.values()), ()):
        lines.append(f"\n{about.get(task, task):<56}" + "".join(f"{m[-19:]:>20}" for m in models))
        columns = [[labelled(tree) for tree in tasks[task]] for tasks in models.values()]
        for label in (x for x in columns[0][0] if not labels or x in labels):
            cells = (f"{mean[label]:12.3f} ± {se[label]:.3f}" for mean, se in columns)
            lines.append(f"  {label:<54}" + "".join(cells))
    return "\n".join(lines)


def plot(results, path, hard=None):
    """Left: the quality-diversity plane. Right: pass@n, or max@n where nothing is correct."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="tight")
    plane, curve = figure.subplots(1, 2)
    for name, tasks in by_model(results).items():
        mean, se = list(tasks.values())[-1]  # over the tasks
        x = "distinct_correct" if "pass_at" in mean else "distinct_4"
        y = "quality" if "quality" in mean else "vendi"
        plane.errorbar(mean[x], mean[y], se[y], se[x], "o", label=name)
    for tasks in by_model(hard or results).values():
        mean, _ = list(tasks.values())[-1]
        best = mean.get("pass_at") or mean.get("max_at") or {}
        curve.plot(list(best), list(best.values()), "o-")
    plane.set(xlabel=x.replace("_", " "), ylabel=y, title="means, with standard errors")
    curve.set(xlabel="n", ylabel="best quality", title="best of n" + " (hard prompts)" * bool(hard))
    plane.legend()
    figure.savefig(path)


# ---- the command line
def run(main):
    """Run main; what the user can mend becomes one line, and exit status 2."""
    logging.disable_progress_bar()
    try:
        main()
    except (BadInput, FloatingPointError, ModuleNotFoundError) as error:
        package = (getattr(error, "name", None) or "").partition(".")[0]  # an optional one
        hint = f": pip install {package.replace('_', '-')}" if package else ""
        print(f"{Path(sys.argv[0]).name}: {error}{hint}", file=sys.stderr)
        sys.exit(2)


def parser_of(options):
    """A parser of a dataclass, whose comments are the help texts."""
    source = "".join(inspect.getsource(c) for c in reversed(options.__mro__[:-1]))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    for field in fields(options):
        field.metadata = dict(help=comments[field.name].replace("%", "%%"))
    parser = HfArgumentParser(options, description=sys.modules[options.__module__].__doc__,
                              allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter,
                              conflict_handler="resolve")
    parser.add_argument("--bf16", action=BooleanOptionalAction, help=comments["bf16"])
    return parser


def JSON(text):
    return {**json.loads(text)}


def use_one_thread(model):
    """Two are little faster for a small model, far slower on a busy machine, other digits."""
    if model.device.type == "cpu" and model.num_parameters() < 10_000_000:
        torch.set_num_threads(1)
        print("a small model on a CPU: one thread")


def load_policy(name, bf16=None):
    """(model, tokenizer); the adapters of a --lora run that has not ended are merged."""
    if not Path(name, "adapter_config.json").is_file():
        return dqo.load_model(name, bf16)
    from peft import PeftConfig, PeftModel
    of = PeftConfig.from_pretrained(name)
    base, tokenizer = dqo.load_model(of.base_model_name_or_path, bf16)
    return PeftModel.from_pretrained(base, name).merge_and_unload(), tokenizer


def checkpoints(run):
    return sorted(run.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def append(path, rows):
    """Lines at the end of a .jsonl file."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass
class Common:
    """Flags of train.py, too."""

    data: str = "instruct,summarize,story,reason"  # tasks, files, or data sets of the hub
    reward: str | None = None       # a task's, hf:MODEL, file.py:function, none (eval.py) [its own]
    threshold: float | None = None  # quality of what is correct [the task's]; --threshold=-1e-3
    encoder: str = dqo.MINILM       # a sentence-transformers model
    bf16: bool | None = None        # multiply in bf16, or --no-bf16 [where that is fast]
    template: JSON = None           # of the chat template: '{"enable_thinking": false}'
    limit: int = 0                  # only the first prompts of each task
    n: int = 16                     # responses per prompt that is measured
    batch: int = 256                # of them sampled at once
    seed: int = 0                   # of all that is random


@dataclass
class Options(Common):
    split: str = "test"             # train, test, or hard
    temperature: float | None = None   # 0: the likeliest tokens [the run's, else 1]
    max_new_tokens: int | None = None  # longest response [the run's; data/tiny: 24; else 256]
    json: str | None = None         # a file for the results
    samples: str | None = None      # a file for every response
    plot: str | None = None         # a file for a picture


def check(options, names):
    """Refuse what cannot work; take what is open from the runs among the models."""
    for path in filter(None, (options.json, options.samples, options.plot)):
        if Path(path).exists() or not Path(path).absolute().parent.is_dir():
            raise BadInput(f"{path}: it exists, or its folder does not")
    if options.n < 1 or options.batch < 1 or (options.temperature or 0) < 0:
        raise BadInput("--n and --batch are at least 1, --temperature at least 0")
    for name in names:
        steps = checkpoints(Path(name))
        if steps and not Path(name, "config.json").is_file():
            raise BadInput(f"{name} has not ended: evaluate {steps[-1]}")
    folders = [Path(x).parent if Path(x).name.startswith("step-") else Path(x) for x in names]
    files = [folder / "run.json" for folder in folders]
    runs = [json.loads(path.read_text("utf-8")) for path in files if path.is_file()]
    tiny = {*map(Path, names)} == {Path("data/tiny")}
    usual = dict(temperature=1.0, template=None, max_new_tokens=24 if tiny else 256)
    for key in usual:
        values = [run[key] for run in runs] or [usual[key]]
        if getattr(options, key) is None:
            setattr(options, key, values[0])
            if any(value != values[0] for value in values):
                raise BadInput(f"the runs differ in {key}, {values}: give --{key}")


def main():
    parser = parser_of(Options)
    parser.add_argument("models", nargs="+", help="folders or hub ids; a run folder is one")
    parser.parse_args()  # refuses unknown flags
    options, names = parser.parse_args_into_dataclasses()
    check(options, names.models)
    rows = load_rows(options.data, options.split, options.limit)
    reward = None if options.reward == "none" else load_reward(options.reward, rows)
    encoder = loaded("--encoder", dqo.load_encoder, options.encoder)
    results = []
    with ExitStack() as after:
        after.callback(lambda: print(table(results)))
        for name in names.models:
            policy = loaded("MODEL", partial(load_policy, bf16=options.bf16), name)
            use_one_thread(policy[0])
            fit = fitting(rows, *policy, options)
            keep = options.samples and (lambda lines: append(options.samples, lines))
            results += evaluate(name, policy, encoder, reward, fit, options, keep=keep)
            if options.json:  # the next model may fail
                Path(options.json).write_text(json.dumps(results, indent=1), "utf-8")
            del policy  # there is no room for two
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    run(main)
