"""What is drawn: pictures of an evaluation and of a run."""

import importlib.util
import json
from pathlib import Path

from data.metrics import by_model
from data.report import LABELS, best_at
from dqo import BadInput


def check_picture(path):
    """Refuse now what could not be drawn in the end."""
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--plot {path}: the name must end in .png, .pdf or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--plot needs one more package: pip install matplotlib")


# ------------------------------------------------------------------------------ an evaluation
def plot(results, path):
    """Left: the quality-diversity plane. Right: pass@n, or max@n where nothing is correct."""
    import matplotlib
    from matplotlib.figure import Figure  # unlike pyplot it needs no screen
    figure = Figure(figsize=(11, 4.4))
    plane, curve = figure.subplots(1, 2)
    best = best_at(*results)
    graded = best == "max_at"
    diversity = "distinct_4" if graded else "distinct_correct"
    for color, tasks in zip(matplotlib.colormaps["tab10"].colors, by_model(results).values()):
        draw_plane(plane, tasks, color, diversity)
        draw_curve(curve, tasks[-1], color, best)
    last = results[-1]
    plane.set(
        xlabel="distinct-4" if graded else f"distinct correct responses among {last['n']}",
        ylabel="quality",
        title="quality and diversity per task (large: mean)",
    )
    curve.set(
        xlabel="n",
        ylabel=f"{LABELS[best]}n",
        title=f"{'best' if graded else 'at least one right'} of n responses (mean over tasks)",
    )
    sizes = [int(n) for n in last[best]]
    curve.set_xscale("log", base=2)
    curve.set_xticks(sizes, sizes)
    for axes in (plane, curve):
        plain_axes(axes)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def draw_plane(axes, tasks, color, diversity):
    """One model in the plane: a small dot per task and a large one for their mean."""
    for result in tasks:
        x, y = result[diversity], result["quality"]
        is_mean = result is tasks[-1]
        axes.errorbar(
            x, y,
            xerr=result["se"][diversity],
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


def draw_curve(axes, result, color, best):
    sizes = [int(n) for n in result[best]]
    axes.plot(sizes, list(result[best].values()), "o-", color=color)
    start = (sizes[0], result[best]["1"])
    name_at(axes, result["model"], start, (6, -12), color, weight="bold")


def name_at(axes, text, point, offset, color, **style):
    axes.annotate(text, point, color=color, xytext=offset, textcoords="offset points", **style)


def plain_axes(axes):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


# -------------------------------------------------------------------------------------- a run
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
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
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
