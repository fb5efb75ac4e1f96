"""Quality and diversity of any number of models, side by side.

    python eval.py data/tiny runs/dqo              # the four miniature tasks, 16 responses a prompt
    python eval.py data/tiny runs/grpo runs/dqo --plot plane.png --json eval.json

Every metric is computed per prompt on its n responses, then averaged over prompts; +/- is the
standard error over prompts. Higher is more diverse for all diversity metrics. WARNING: log det,
Vendi and cosine distance live in the space that DQO optimises, and distinct-n and self-BLEU love
gibberish. Judge by quality, pass@n, distinct correct and effective semantic diversity.

The metrics are in data/metrics.py, the table is in data/report.py, the picture in pictures.py.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import terminal
from data.metrics import group_metrics, mean_and_se
from data.models import is_tiny, json_object, load_encoder, load_model, memory_hint
from data.options import RunConfig
from data.pictures import check_picture, plot
from data.prompts import load_rows, prepare
from data.report import table, window_warning
from data.runs import seed_everything, to_json
from data.scoring import check_rows, load_reward, threshold_of
from dqo import BadInput, embed, prompt_ids, sample, token_logps


@dataclass
class Sampling:
    """How responses are drawn: the same for all models, or they could not be compared."""

    n: int  # responses per prompt
    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    plain: bool = False  # no chat template
    template_args: dict | None = None  # for the chat template
    batch: int = 256  # responses at once: what they draw depends on it


@dataclass
class Judges:
    """What responses are measured with: all but the last also a part of training."""

    encoder: object  # of diversity, see `dqo.embed`
    reward: Callable  # of quality: (prompts, responses, records) -> numbers
    fluency: torch.nn.Module | None = None  # a model with the tokenizer of those measured


def evaluate(name, policy, judges, records, sampling, keep=None):
    """Sample n responses for each record and measure them. One result (the object of --json)
    per task, in order.

    policy: (model, tokenizer)
    keep:   a list that receives {model, task, prompt, response, quality} of every response
    """
    seed_everything(sampling.seed)
    by_task = {}
    batch = max(1, sampling.batch // sampling.n)  # in prompts
    starts = range(0, len(records), batch)
    for i in tqdm(starts, desc=f"eval {name}", leave=False, disable=None):
        part = records[i:i + batch]
        groups = measure(policy, judges, part, sampling)
        for record, (metrics, responses) in zip(part, groups):
            by_task.setdefault(record["task"], []).append(metrics)
            if keep is None:
                continue
            about = dict(model=name, task=record["task"], prompt=record["prompt"])
            keep += [{**about, **response} for response in responses]
    results = []
    for task, metrics in by_task.items():
        mean, se = mean_and_se(metrics)
        about = dict(model=name, task=task, prompts=len(metrics), n=sampling.n,
                     threshold=threshold_of(judges.reward, task))
        results.append(dict(**about, **mean, se=se))
    return results


def measure(policy, judges, records, sampling):
    """One batch: (metrics, [{response, quality}, ...]) of each record's n responses."""
    model, tokenizer = policy
    n = sampling.n
    ids = [prompt_ids(tokenizer, record["prompt"], sampling.plain, sampling.template_args)
           for record in records]
    rollout = sample(model, tokenizer, ids, n, sampling.max_new_tokens, sampling.temperature)
    each = [record for record in records for _ in range(n)]  # the record of each response
    prompts = [record["prompt"] for record in each]
    scores = list(judges.reward(prompts, rollout.texts, each))
    phi = embed(judges.encoder, rollout.texts)                              # (P * n, D)
    groups = []
    for i in range(0, len(each), n):
        group = slice(i, i + n)
        texts, quality = rollout.texts[group], scores[group]
        threshold = threshold_of(judges.reward, each[i]["task"])
        metrics = group_metrics(texts, quality, phi[group], threshold)
        tokens = rollout.mask[group].sum().item()
        metrics["mean_tokens"] = tokens / n
        metrics["truncated"] = rollout.truncated[group].sum().item() / n
        if judges.fluency is not None:
            with torch.no_grad():
                logp = token_logps(judges.fluency, rollout.select(group))   # (n, T)
            metrics["nll"] = -logp.sum().item() / tokens
        groups.append((metrics, [dict(response=t, quality=q) for t, q in zip(texts, quality)]))
    return groups


# ---------------------------------------------------------------------------- the command line
def flags():
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    d = RunConfig()
    p.add_argument("models", nargs="+", metavar="MODEL",
                   help="folder or hub id; a run folder is one")
    p.add_argument("--data", default=d.data,
                   help="tasks by name, or prompts: a .jsonl file, its https:// address, "
                        "or a hub dataset")
    p.add_argument("--reward",
                   help="reward by name, hf:MODEL, or file.py:function [the task's own]")
    p.add_argument("--threshold", type=float, help="quality of what is correct [the reward's]")
    p.add_argument("--encoder", default=d.encoder, help="sentence-transformers model")
    p.add_argument("--encoder-prompt", help="what the encoder reads before each response")
    p.add_argument("--n", type=int, default=16, help="responses per prompt [16]")
    p.add_argument("--batch", type=int, default=256, help="responses sampled at once [256]")
    p.add_argument("--temperature", type=float, default=1.0, help="[1]; 0: the likeliest tokens")
    p.add_argument("--max-new-tokens", type=int,
                   help="longest response [that of the runs; data/tiny alone: 24; else 256]")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--limit", type=int, default=0,
                   help="only the first N prompts of each task")
    p.add_argument("--skip-long", action="store_true",
                   help="leave out prompts that are too long for a model's context")
    p.add_argument("--plain", action="store_true", help="no chat template")
    p.add_argument("--template-args", help="for the chat template, as JSON")
    p.add_argument("--prompt-key", default="prompt")
    p.add_argument("--answer-key", default="answer")
    p.add_argument("--judge", metavar="MODEL",
                   help="also report the mean negative log-likelihood per token under this "
                        "model (fluency)")
    p.add_argument("--json", metavar="FILE", help="write the results")
    p.add_argument("--samples", metavar="FILE",
                   help="write every response with its quality, one JSON object per line")
    p.add_argument("--plot", metavar="FILE.png",
                   help="quality-diversity plane and pass@n curves")
    return p


def default_max_new_tokens(names):
    """One length for all models, or they could not be compared: what the runs among them were
    trained with, at most; without a run 24 for the tiny base model, else 256."""
    runs = []
    for name in names:
        of_checkpoint = Path(name).resolve().parent.parent  # RUN of RUN/checkpoints/step-N
        for folder in (Path(name), of_checkpoint):
            if (folder / "run.json").is_file():
                runs.append(folder / "run.json")
    try:
        configs = [json.loads(run.read_text("utf-8"))["config"] for run in runs]
        found = [int(config["max_new_tokens"]) for config in configs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        files = " or ".join(map(str, runs))
        raise BadInput(f"{files} is not the run.json of a run "
                       f"({type(error).__name__}: {error}); give --max-new-tokens") from None
    if found:
        return max(found)
    return 24 if all(map(is_tiny, names)) else 256


def check(args):
    """Refuse what cannot work before anything is loaded."""
    if args.limit < 0:
        raise BadInput(f"--limit {args.limit}: it must be at least 0 (all)")
    if args.batch < 1:
        raise BadInput(f"--batch {args.batch}: it must be at least 1")
    if args.n < 1:
        raise BadInput(f"--n {args.n}: it must be at least 1")
    if args.plot:
        check_picture(args.plot)
    terminal.check_writable(args.json, args.samples, args.plot)
    RunConfig(
        temperature=args.temperature or 1.0,  # 0 is for measuring only
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    ).check()


def compare(args):
    check(args)
    length = args.max_new_tokens or default_max_new_tokens(args.models)
    template_args = json_object("--template-args", args.template_args)
    sampling = Sampling(args.n, length, args.temperature, args.seed, args.plain, template_args,
                        args.batch)
    records = load_rows(args.data, "test", args.limit, args.prompt_key, args.answer_key)
    reward = load_reward(args.reward, args.data, args.threshold)
    check_rows(records, reward)
    judges = Judges(load_encoder(args.encoder, prompt=args.encoder_prompt), reward)
    if args.judge:
        judges.fluency = load_model(args.judge)[0]

    def loaded(name, records):
        """(model and tokenizer, the records that fit), or BadInput."""
        policy = load_model(name)
        fit = prepare(records, *policy, length, args.plain, template_args, args.skip_long)
        if args.judge and vocabulary(judges.fluency) != vocabulary(policy[0]):
            raise BadInput(f"--judge {args.judge}: its vocabulary is not that of {name}")
        return policy, fit

    fit = records
    for name in args.models[1:]:  # before the first is measured: one may be misspelt
        fit = loaded(name, fit)[1]
    results, kept, last_words, faults = [], [], [], []
    for name, label in zip(args.models, labels(args.models)):
        policy, fit = loaded(name, fit)
        first = len(kept)
        results += evaluate(label, policy, judges, fit, sampling, kept)
        texts = [line["response"] for line in kept[first:]]
        last_words.append(window_warning(judges.encoder, texts, f"responses of {label}"))
        faults = terminal.write_each({  # already now: the next model may fail
            args.json: lambda path: path.write_text(to_json(results, indent=1), "utf-8"),
            args.samples: lambda path: path.write_text("".join(map(json_line, kept)), "utf-8"),
            args.plot: lambda path: plot(results, path)})
        del policy  # there is no room for two
    if args.skip_long:
        print(f"{len(records) - len(fit)} of {len(records)} prompts were skipped: too long")
    print(table(results))
    for line in filter(None, last_words):
        print(line)
    if faults:
        raise BadInput("; ".join(faults))


def labels(names):
    """Columns of the table: the same model named twice is two of them."""
    seen = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})"


def json_line(value):
    return to_json(value) + "\n"


def vocabulary(model):
    return model.get_input_embeddings().num_embeddings


def main(argv=None):
    """Exit status: 0 done, 2 bad input, else see data/terminal.py."""
    def work():
        with memory_hint("a smaller --batch or --max-new-tokens needs less"):
            compare(flags().parse_args(argv))
    return terminal.run("eval.py", work)


if __name__ == "__main__":
    sys.exit(main())
