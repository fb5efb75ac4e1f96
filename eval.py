"""Quality and diversity of any number of models, side by side.

    python eval.py data/tiny runs/dqo                       # the four miniature tasks, 16 responses per test prompt
    python eval.py data/tiny runs/grpo runs/dqo --plot plane.png --json eval.json

Every metric is computed per prompt on its n responses, then averaged over prompts; +/- is the standard error over
prompts. Higher is more diverse for all diversity metrics. WARNING: log det, Vendi and cosine distance live in the
space that DQO optimises, and distinct-n and self-BLEU love gibberish. Judge by quality, pass@n and distinct correct.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from data.tasks import check_rows, load_reward, load_rows, normalize
from dqo import BadInput, Config, embed, end_tokens, first_line, gram, load_encoder, load_model, log_det, prompt_ids, sample, token_logps


# ------------------------------------------------------------------------------------------------- the metrics
def pass_at_n(correct, n):
    """Probability that at least one of n responses is correct, without bias, from N >= n of them (Chen et al. 2021):
    1 - C(N - c, n) / C(N, n).    correct: N booleans"""
    N, c = len(correct), sum(map(bool, correct))
    return 1 - math.comb(N - c, n) / math.comb(N, n)


def max_at_n(scores, n):
    """Expected best score of n responses, without bias, from N >= n of them: the graded form of pass@n.
    The i-th smallest (from 1) is the best of C(i - 1, n - 1) of the C(N, n) subsets.    scores: N numbers"""
    ranked = sorted(scores)
    return sum(s * math.comb(i, n - 1) for i, s in enumerate(ranked)) / math.comb(len(ranked), n)


def words(text):
    """Lower-cased words and single punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(tokens, n):
    """All n-grams; a text shorter than n tokens counts as one."""
    return [tuple(tokens[i:i + n]) for i in range(max(1, len(tokens) - n + 1))]


def distinct_n(texts, n):
    """Distinct n-grams over all n-grams of a group (Li et al. 2016)."""
    grams = [g for t in texts for g in ngrams(words(t), n)]
    return len(set(grams)) / len(grams)


def self_bleu(texts):
    """Mean BLEU-4 of each response against the others (Zhu et al. 2018): add-one smoothing above unigrams, brevity
    penalty against the closest length. 1 when all are equal."""
    tokens = [words(t) for t in texts]
    counts = [[Counter(ngrams(t, n)) for n in range(1, 5)] for t in tokens]
    total = 0.0
    for i, mine in enumerate(counts):
        others = counts[:i] + counts[i + 1:]
        log_precision = 0.0
        for n in range(4):
            match = sum(min(c, max(o[n][g] for o in others)) for g, c in mine[n].items())
            smooth = n > 0
            if match + smooth == 0:
                break
            log_precision += math.log((match + smooth) / (sum(mine[n].values()) + smooth)) / 4
        else:
            length = max(1, len(tokens[i]))
            closest = min((max(1, len(t)) for j, t in enumerate(tokens) if j != i), key=lambda x: (abs(x - length), x))
            total += math.exp(log_precision + min(0.0, 1 - closest / length))
    return total / len(texts)


def lcs(a, b):
    """Length of the longest common subsequence, bit-parallel (Hyyro 2004): bit i of v is 0 where row i steps up."""
    where = {}
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    v = full = (1 << len(a)) - 1
    for token in b:
        u = v & where.get(token, 0)
        v = (v + u | v - u) & full
    return len(a) - v.bit_count()


def self_rouge(texts):
    """Mean ROUGE-L F1 over all pairs of a group. 1 when all are equal."""
    tokens = [words(t) or [""] for t in texts]
    pairs = [(a, b) for i, a in enumerate(tokens) for b in tokens[:i]]
    return sum(2 * lcs(a, b) / (len(a) + len(b)) for a, b in pairs) / len(pairs)


def vendi(phi):
    """Effective number of different responses: exp of the entropy of the eigenvalues of L / k (Friedman & Dieng 2023).
    phi: (k, D) unit-norm -> between 1 and k"""
    eigenvalues = torch.linalg.eigvalsh(gram(phi.double()) / len(phi)).clamp(min=0)
    return torch.exp(torch.special.entr(eigenvalues).sum()).item()


def cosine_distance(phi):
    """Mean over pairs of 1 - cosine.    phi: (k, D) unit-norm"""
    k = len(phi)
    return ((1 - gram(phi.double())).sum() / (k * (k - 1))).item()  # the diagonal adds 0


def effective_diversity(correct, phi, same=0.9):
    """Effective semantic diversity (Shypula et al. 2025): the share of pairs of responses that are both correct and mean
    different things, which is here: their cosine is below `same`.    correct: k booleans;  phi: (k, D) unit-norm"""
    right = torch.tensor(correct)                                                   # (k,)
    pairs = right[:, None] & right & (gram(phi) < same)                             # (k, k), never i with itself
    return pairs.sum().item() / (len(right) * (len(right) - 1))


def group_metrics(texts, scores, phi, threshold=1.0):
    """All metrics of one prompt's n responses: a dict of numbers, and of {n: number} for pass_at and max_at.
    `correct_...`: over the correct responses only, 0 if there are fewer than two."""
    n, correct = len(texts), [s >= threshold for s in scores]
    right = [t for t, c in zip(texts, correct) if c]
    sizes = [m for m in (1, 2, 4, 8, 16, 32, 64, 128, 256) if m < n] + [n]
    return dict(
        quality=sum(scores) / n,
        pass_at={str(m): pass_at_n(correct, m) for m in sizes}, max_at={str(m): max_at_n(scores, m) for m in sizes},
        distinct_correct=len({normalize(t) for t, c in zip(texts, correct) if c}),
        distinct_1=distinct_n(texts, 1), distinct_4=distinct_n(texts, 4),
        self_bleu_diversity=1 - self_bleu(texts), self_rouge_diversity=1 - self_rouge(texts),
        correct_distinct_4=distinct_n(right, 4) if len(right) > 1 else 0.0,
        correct_self_bleu_diversity=1 - self_bleu(right) if len(right) > 1 else 0.0,
        effective_diversity=effective_diversity(correct, phi),
        cosine_distance=cosine_distance(phi), vendi=vendi(phi), log_det=log_det(phi.double()).item())


def mean_and_se(values):
    """Mean and standard error over prompts, of numbers or of dicts of numbers."""
    if isinstance(values[0], dict):
        both = {key: mean_and_se([v[key] for v in values]) for key in values[0]}
        return {key: m for key, (m, _) in both.items()}, {key: s for key, (_, s) in both.items()}
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / len(x) ** 0.5).item() if len(x) > 1 else math.nan


# ----------------------------------------------------------------------------------------------- the evaluation
def prepare(rows, model, tokenizer, max_new_tokens, plain=False):
    """Tokenize the prompts for a model, and refuse what does not work with it."""
    end_tokens(model, tokenizer)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for row in rows:
        try:
            row["ids"] = prompt_ids(tokenizer, row["prompt"], plain)
        except Exception as error:  # a chat template raises what it likes
            raise BadInput(f"{row['where']}: the tokenizer's chat template refuses this prompt: {first_line(error)}") from None
        if len(row["ids"]) + max_new_tokens > context:
            raise BadInput(f"{row['where']}: {len(row['ids'])} prompt tokens and --max-new-tokens {max_new_tokens} do not fit into the "
                           f"model's context of {context}; shorten either")


def evaluate(name, model, tokenizer, encoder, rows, reward, n, max_new_tokens, temperature=1.0, seed=0, plain=False, keep=None, judge=None):
    """Sample n responses for each row and measure them. One result (the object of --json) per task, in order.
    keep: a list that receives {model, task, prompt, response, quality} of every response.
    judge: a model, of the same tokenizer, whose mean negative log-likelihood per token is reported as `nll`: fluency."""
    torch.manual_seed(seed)
    groups = {}
    batch = max(1, 256 // n)
    for i in tqdm(range(0, len(rows), batch), desc=f"eval {name}", leave=False, disable=None):
        part = rows[i:i + batch]
        rollout = sample(model, tokenizer, [r.get("ids") or prompt_ids(tokenizer, r["prompt"], plain) for r in part], n, max_new_tokens, temperature)
        repeated = [r for r in part for _ in range(n)]
        scores = list(reward([r["prompt"] for r in repeated], rollout.texts, repeated))
        phi = embed(encoder, rollout.texts)                                         # (b*n, D)
        length, cut = rollout.mask.sum(1).tolist(), rollout.truncated.tolist()
        for j, row in enumerate(part):
            s = slice(j * n, (j + 1) * n)
            metrics = group_metrics(rollout.texts[s], scores[s], phi[s])
            metrics.update(mean_tokens=sum(length[s]) / n, truncated=sum(cut[s]) / n)
            if judge is not None:
                with torch.no_grad():
                    metrics["nll"] = -token_logps(judge, rollout.rows(s)).sum().item() / sum(length[s])
            groups.setdefault(row["task"], []).append(metrics)
            if keep is not None:
                keep += [dict(model=name, task=row["task"], prompt=row["prompt"], response=t, quality=q)
                         for t, q in zip(rollout.texts[s], scores[s])]
    results = []
    for task, metrics in groups.items():
        mean, se = mean_and_se(metrics)
        results.append(dict(model=name, task=task, prompts=len(metrics), n=n, **mean, se=se))
    return results


def average(results):
    """The unweighted mean over a model's tasks. Standard errors add up in squares, as the tasks share no prompts."""
    def mix(values, f):
        return {k: mix([v[k] for v in values], f) for k in values[0]} if isinstance(values[0], dict) else f(values)
    numbers = [{k: v for k, v in r.items() if k not in ("model", "task", "prompts", "n", "se")} for r in results]
    return dict(model=results[0]["model"], task="average", prompts=sum(r["prompts"] for r in results), n=results[0]["n"],
                **mix(numbers, lambda v: sum(v) / len(v)), se=mix([r["se"] for r in results], lambda v: sum(x * x for x in v) ** 0.5 / len(v)))


def by_model(results):
    """{model: its results, with their average last if there are several}."""
    models = {}
    for r in results:
        models.setdefault(r["model"], []).append(r)
    return {name: rs + ([average(rs)] if len(rs) > 1 else []) for name, rs in models.items()}


LABELS = dict(quality="quality", pass_at="pass@", max_at="max@", distinct_correct="distinct correct", distinct_1="distinct-1",
              distinct_4="distinct-4", self_bleu_diversity="1 - self-BLEU", self_rouge_diversity="1 - self-ROUGE-L",
              correct_distinct_4="distinct-4, correct only", correct_self_bleu_diversity="1 - self-BLEU, correct only",
              effective_diversity="effective semantic diversity",
              cosine_distance="cosine distance", vendi="Vendi score", log_det="log det", mean_tokens="tokens", truncated="truncated", nll="nll under the judge")


def table(results):
    """A block per task: metrics down, models across."""
    models, lines = by_model(results), []
    width = max(15, min(30, max(map(len, models)) + 2))
    for i, first in enumerate(next(iter(models.values()))):
        lines.append(f"\n{first['task']}: {first['prompts']} prompts x {first['n']} responses".ljust(45) + "".join(m[-28:].rjust(width) for m in models))
        for key, label in ((k, v) for k, v in LABELS.items() if k in first):
            cells = [(r[i][key], r[i]["se"][key]) for r in models.values()]
            sizes = list(cells[0][0]) if isinstance(cells[0][0], dict) else [None]
            for m in sizes if key == "pass_at" else sizes[-1:]:
                pairs = [(v[m], s[m]) if m else (v, s) for v, s in cells]
                lines.append(f"  {label}{m or ''}".ljust(44) + "".join(f"{v:.3f} ± {s:.3f}".rjust(width) for v, s in pairs))
    return "\n".join(lines)


def change(before, after):
    """The few metrics that matter most, before -> after training: a line per task."""
    (base,), (trained,) = by_model(before).values(), by_model(after).values()
    n = str(base[0]["n"])
    lines = [f"\n{sum(r['prompts'] for r in before)} test prompts, {n} responses each, base -> trained",
             f"{'task':<12}{'quality':>15}{'pass@' + n:>16}{'distinct correct':>20}{'1 - self-BLEU':>17}{'log det':>18}"]
    for b, a in zip(base, trained):
        lines.append(f"{b['task']:<12}{b['quality']:>7.2f} -> {a['quality']:.2f}{b['pass_at'][n]:>8.2f} -> {a['pass_at'][n]:.2f}"
                     f"{b['distinct_correct']:>11.1f} -> {a['distinct_correct']:4.1f}{b['self_bleu_diversity']:>9.2f} -> "
                     f"{a['self_bleu_diversity']:.2f}{b['log_det']:>9.2f} -> {a['log_det']:5.2f}")
    return "\n".join(lines)


def plot(results, path):
    """Left: the quality-diversity plane, a small dot per task and a large one for the mean. Right: pass@n."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (plane, curve) = plt.subplots(1, 2, figsize=(11, 4.4))
    for color, (name, rs) in zip(plt.cm.tab10.colors, by_model(results).items()):
        for r in rs:
            mean = r is rs[-1]
            plane.errorbar(r["distinct_correct"], r["quality"], xerr=r["se"]["distinct_correct"], yerr=r["se"]["quality"],
                           fmt="o", color=color, ms=10 if mean else 4, alpha=1 if mean else 0.45, lw=0.8)
            if not mean:
                plane.annotate(r["task"], (r["distinct_correct"], r["quality"]), color=color, fontsize=7, alpha=0.8,
                               xytext=(4, 4), textcoords="offset points")
        last = rs[-1]
        plane.annotate(name, (last["distinct_correct"], last["quality"]), color=color, weight="bold",
                       xytext=(9, -12), textcoords="offset points")
        xs = [int(m) for m in last["pass_at"]]
        curve.plot(xs, list(last["pass_at"].values()), "o-", color=color)
        curve.annotate(name, (xs[0], last["pass_at"]["1"]), color=color, weight="bold", xytext=(6, -12), textcoords="offset points")
    plane.set(xlabel=f"distinct correct responses among {last['n']}", ylabel="quality", title="quality and diversity per task (large: mean)")
    curve.set(xlabel="n", ylabel="pass@n", title="at least one of n responses right (mean over tasks)")
    curve.set_xscale("log", base=2)
    curve.set_xticks(xs, xs)
    for ax in (plane, curve):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=150)


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    d = Config()
    p.add_argument("models", nargs="+", metavar="MODEL", help="folder or hub id; a run folder is one")
    p.add_argument("--data", default=d.data, help="tasks by name, or prompts: a .jsonl file, its https:// address, or a hub dataset")
    p.add_argument("--reward", help="reward by name, hf:MODEL, or file.py:function [the task's own]")
    p.add_argument("--encoder", default=d.encoder, help="sentence-transformers model")
    p.add_argument("--n", type=int, default=16, help="responses per prompt [16]")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--max-new-tokens", type=int, help="longest response [that of the runs; data/tiny alone: 24; else 256]")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--limit", type=int, default=0, help="only the first N prompts of each task")
    p.add_argument("--plain", action="store_true", help="no chat template")
    p.add_argument("--prompt-key", default="prompt")
    p.add_argument("--answer-key", default="answer")
    p.add_argument("--judge", metavar="MODEL", help="also report the mean negative log-likelihood per token under this model (fluency)")
    p.add_argument("--json", metavar="FILE", help="write the results")
    p.add_argument("--samples", metavar="FILE", help="write every response with its quality, one JSON object per line")
    p.add_argument("--plot", metavar="FILE.png", help="quality-diversity plane and pass@n curves")
    return p


def default_max_new_tokens(names):
    """One length for all models, or they could not be compared: what the runs among them were trained with, at most; without a
    run 24 for the tiny base model, else 256."""
    runs = [r for name in names for r in (Path(name) / "run.json", Path(name).resolve().parent.parent / "run.json") if r.is_file()]
    try:
        found = [int(json.loads(run.read_text())["config"]["max_new_tokens"]) for run in runs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{' or '.join(map(str, runs))} is not the run.json of a run ({type(error).__name__}: {error}); give --max-new-tokens") from None
    return max(found, default=24 if all(Path(name).name == "tiny" for name in names) else 256)


def compare(args):
    if args.limit < 0:
        raise BadInput(f"--limit {args.limit}: it must be at least 0 (all)")
    if args.n < 2:
        raise BadInput(f"--n {args.n}: diversity needs at least 2 responses per prompt")
    for path in filter(None, (args.json, args.plot, args.samples)):
        if not Path(path).resolve().parent.is_dir():
            raise BadInput(f"cannot write {path}: no folder {Path(path).resolve().parent}")
        if Path(path).is_dir():
            raise BadInput(f"cannot write {path}: it is a folder")
    if args.plot and Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--plot {args.plot}: the name must end in .png, .pdf or .svg")
    Config(temperature=args.temperature, max_new_tokens=args.max_new_tokens, seed=args.seed).check()
    length = args.max_new_tokens or default_max_new_tokens(args.models)
    rows = load_rows(args.data, "test", args.limit, args.prompt_key, args.answer_key)
    reward = load_reward(args.reward, args.data)
    check_rows(rows, reward)
    encoder, results, kept = load_encoder(args.encoder), [], []
    judge = load_model(args.judge)[0] if args.judge else None
    for name in args.models:
        model, tokenizer = load_model(name)
        prepare(rows, model, tokenizer, length, args.plain)
        if judge is not None and judge.get_input_embeddings().num_embeddings != model.get_input_embeddings().num_embeddings:
            raise BadInput(f"--judge {args.judge}: its vocabulary is not that of {name}")
        results += evaluate(name, model, tokenizer, encoder, rows, reward, args.n, length,
                            args.temperature, args.seed, args.plain, kept, judge)
    print(table(results))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    if args.samples:
        Path(args.samples).write_text("".join(json.dumps(s) + "\n" for s in kept))
    if args.plot:
        plot(results, args.plot)


def main(argv=None):
    """Exit status: 0 done, 2 bad input."""
    try:
        compare(flags().parse_args(argv))
    except BadInput as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
