"""What is printed and drawn: tables and pictures of an evaluation and of a run.

    table, change, plot                           of results of eval.py
    introduce, show_group, plot_run               of a run of train.py
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

from tqdm import tqdm

from data.metrics import by_model
from data.models import load_encoder
from dqo import embed, end_tokens, gram, log_det, marginal_gains

LABELS = dict(
    quality="quality",
    pass_at="pass@",
    max_at="max@",
    distinct_correct="distinct correct",
    distinct_1="distinct-1",
    distinct_4="distinct-4",
    self_bleu_diversity="1 - self-BLEU",
    self_rouge_diversity="1 - self-ROUGE-L",
    correct_distinct_4="distinct-4, correct only",
    correct_self_bleu_diversity="1 - self-BLEU, correct only",
    effective_diversity="effective semantic diversity",
    cosine_distance="cosine distance",
    vendi="Vendi score",
    log_det="log det",
    mean_tokens="tokens",
    truncated="truncated",
    nll="nll under the judge",
)


# ------------------------------------------------------------------------------ an evaluation
def measured(result):
    """(label, mean, standard error) of each line of the table, of one result."""
    for key, label in LABELS.items():
        if key not in result:
            continue
        mean, se = result[key], result["se"][key]
        if key == "pass_at":
            for n in mean:
                yield f"{label}{n}", mean[n], se[n]
        elif key == "max_at":
            n = list(mean)[-1]
            yield f"{label}{n}", mean[n], se[n]
        else:
            yield label, mean, se


def table(results):
    """A block per task: metrics down, models across."""
    models = by_model(results)
    longest = max(map(len, models))
    width = max(15, min(30, longest + 2))
    lines = []
    for task in zip(*models.values()):  # the results of all models on one task
        first = task[0]
        title = f"\n{first['task']}: {first['prompts']} prompts x {first['n']} responses"
        names = "".join(name[-28:].rjust(width) for name in models)
        lines.append(title.ljust(45) + names)
        for cells in zip(*map(measured, task)):  # the same metric of all models
            numbers = "".join(f"{mean:.3f} ± {se:.3f}".rjust(width) for _, mean, se in cells)
            label = cells[0][0]
            lines.append(f"  {label}".ljust(44) + numbers)
    return "\n".join(lines)


def change(before, after):
    """The few metrics to judge by, before -> after training: a line per task."""
    (base,), (trained,) = by_model(before).values(), by_model(after).values()
    n = base[0]["n"]
    prompts = sum(result["prompts"] for result in before)
    lines = [
        f"\n{prompts} test prompts, {n} responses each, base -> trained",
        f"{'task':<20}{'quality':>15}{f'pass@{n}':>15}{'distinct correct':>18}"
        f"{'effective diversity':>21}",
    ]
    for b, a in zip(base, trained):
        quality = f"{b['quality']:.2f} -> {a['quality']:.2f}"
        one_right = f"{b['pass_at'][str(n)]:.2f} -> {a['pass_at'][str(n)]:.2f}"
        distinct = f"{b['distinct_correct']:.1f} -> {a['distinct_correct']:4.1f}"
        effective = f"{b['effective_diversity']:.2f} -> {a['effective_diversity']:.2f}"
        task = b["task"][:19]
        lines.append(f"{task:<20}{quality:>15}{one_right:>15}{distinct:>18}{effective:>21}")
    return "\n".join(lines)


def plot(results, path):
    """Left: the quality-diversity plane. Right: pass@n."""
    import matplotlib
    from matplotlib.figure import Figure  # unlike pyplot it needs no screen
    figure = Figure(figsize=(11, 4.4))
    plane, curve = figure.subplots(1, 2)
    for color, tasks in zip(matplotlib.colormaps["tab10"].colors, by_model(results).values()):
        draw_plane(plane, tasks, color)
        draw_pass_at(curve, tasks[-1], color)
    last = results[-1]
    plane.set(
        xlabel=f"distinct correct responses among {last['n']}",
        ylabel="quality",
        title="quality and diversity per task (large: mean)",
    )
    curve.set(
        xlabel="n",
        ylabel="pass@n",
        title="at least one of n responses right (mean over tasks)",
    )
    sizes = [int(n) for n in last["pass_at"]]
    curve.set_xscale("log", base=2)
    curve.set_xticks(sizes, sizes)
    for axes in (plane, curve):
        plain_axes(axes)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def draw_plane(axes, tasks, color):
    """One model in the plane: a small dot per task and a large one for their mean."""
    for result in tasks:
        x, y = result["distinct_correct"], result["quality"]
        is_mean = result is tasks[-1]
        axes.errorbar(
            x, y,
            xerr=result["se"]["distinct_correct"],
            yerr=result["se"]["quality"],
            fmt="o",
            color=color,
            ms=10 if is_mean else 4,
            alpha=1 if is_mean else 0.45,
            lw=0.8,
        )
        if is_mean:
            name_at(axes, result["model"], (x, y), (9, -12), color, weight="bold")
        else:
            name_at(axes, result["task"], (x, y), (4, 4), color, fontsize=7, alpha=0.8)


def draw_pass_at(axes, result, color):
    sizes = [int(n) for n in result["pass_at"]]
    axes.plot(sizes, list(result["pass_at"].values()), "o-", color=color)
    start = (sizes[0], result["pass_at"]["1"])
    name_at(axes, result["model"], start, (6, -12), color, weight="bold")


def name_at(axes, text, point, offset, color, **style):
    axes.annotate(text, point, color=color, xytext=offset, textcoords="offset points", **style)


def plain_axes(axes):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


# -------------------------------------------------------------------------------------- a run
def introduce(config, model, tokenizer, records, done):
    """What is about to happen, in full: the resolved configuration and the distribution that
    is sampled from."""
    size = f"{model.num_parameters():,} parameters, {model.device}"
    resumed = f", resumed after step {done}" if config.resume else ""
    print(f"{config.objective} on {config.model} ({size}), "
          f"{len(records)} prompts of {config.data}{resumed}")
    shown = []
    for name, value in dataclasses.asdict(config).items():
        if name not in ("model", "data", "objective") and value is not None:
            shown.append(f"{name}={value}")
    print("  ".join(shown))
    ends = tokenizer.convert_ids_to_tokens(end_tokens(model, tokenizer).tolist())
    print(f"sampling: temperature {config.temperature}, "
          "full vocabulary (no top-p, no top-k, no penalty), "
          f"at most {config.max_new_tokens} tokens, ended by {' '.join(map(str, ends))}")


def show_group(step, samples, metrics):
    """One prompt's group, best advantage first, above the progress bar."""
    prompt = str(samples[0]["prompt"])[-110:]
    distinct = len({sample["response"] for sample in samples})
    title = f"step {step}  {prompt!r}  {distinct} of {len(samples)} distinct"
    beyond = metrics["beyond_window"]
    if beyond:
        title += f"  ({beyond:.0%} of the step's responses exceed the encoder's window)"
    lines = [title, "  quality  gain  advantage"]
    for sample in sorted(samples, key=lambda sample: -sample["advantage"]):
        gain = sample["gain"] + 0.0  # -0.0 becomes 0.0
        lines.append(f"    {sample['quality']:5.2f}  {gain:6.3f}  {sample['advantage']:+6.2f}"
                     f"   {sample['response'][:90]!r}")
    tqdm.write("\n".join(lines))


def share_beyond_window(encoder, texts):
    """Share of texts that are longer than the encoder's window.

    WARNING  It reads only their beginning: if that is alike, they are duplicates to it.
    """
    window = getattr(encoder, "max_seq_length", None) or math.inf
    # Tokenize only what may be too long: a token is at least a character, and two are added.
    long = [text for text in texts if len(text) > window - 2]
    if not long:
        return 0.0
    ids = encoder.tokenizer(long, truncation=False).input_ids
    return sum(len(x) > window for x in ids) / len(texts)


PANELS = dict(
    quality="quality (mean reward)",
    distinct="distinct (share of a group's responses)",
    gain="gain (mean marginal gain, nats)",
    length="length (tokens of a response)",
)


def plot_run(folder):
    """Draw metrics.jsonl of a run into its run.png: each step pale, their running mean strong.

    Returns the picture's path, or None when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    folder = Path(folder)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(11, 5.6))
    for axes, (key, title) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS.items()):
        draw_metric(axes, steps, key)
        axes.set_title(title, fontsize=10)
        plain_axes(axes)
    for axes in figure.axes[2:]:
        axes.set_xlabel("step")
    figure.suptitle(folder.resolve().name)
    figure.tight_layout()
    path = folder / "run.png"
    figure.savefig(path, dpi=120)
    return path


def draw_metric(axes, steps, key):
    known = [line for line in steps if line.get(key) is not None]
    if not known:
        axes.text(0.5, 0.5, "not measured by this objective", transform=axes.transAxes,
                  ha="center", va="center", color="gray")
        axes.set_yticks([])
        return
    x = [line["step"] for line in known]
    y = [line[key] for line in known]
    axes.plot(x, y, ".-", color="tab:blue", ms=3, lw=0.8, alpha=0.3)
    width = min(20, len(y) // 5)  # over most of a short run, it would show a trend as none
    axes.plot(x, running_mean(y, width), color="tab:blue", lw=2)


def running_mean(values, width):
    """Each value becomes the mean of those at most width / 2 steps before or after it."""
    reach = width // 2
    means = []
    for i in range(len(values)):
        around = values[max(0, i - reach):i + reach + 1]
        means.append(sum(around) / len(around))
    return means


# --------------------------------------------------------------------- python dqo.py TEXT TEXT
def show_texts(texts):
    """Gram matrix, log det and marginal gains of some texts, as if they were one group."""
    if len(texts) < 2:
        print('dqo.py: give at least two texts: python dqo.py "one" "another"', file=sys.stderr)
        return 2
    phi, k = embed(load_encoder(), texts), len(texts)  # (k, D)
    print("gain    Gram matrix L (cosines)")
    for row, gain, text in zip(gram(phi).tolist(), marginal_gains(phi).tolist(), texts):
        cosines = " ".join(f"{x:5.2f}" for x in row)
        print(f"{gain:.3f}  {cosines}   {text}")
    print(f"log det(L + I) = {log_det(phi):.3f}, between {math.log(1 + k):.3f} (all equal) "
          f"and {k * math.log(2):.3f} (all orthogonal)")
    print(f"a gain lies between {math.log(1 + 1 / k):.3f} and {math.log(2):.3f}")
    return 0
