"""From the runs of make.sh to the CSVs beside this file, and from these to the README's tables and pictures.

    python data/results/tables.py              # both
    python data/results/tables.py --show       # the tables and pictures from the CSVs that are there
    python data/results/tables.py --tried      # the strengths of each objective that are tried at seed 0
    python data/results/tables.py --chosen     # the one of each that seed 0 chooses on the training prompts
"""

import csv
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import eval as evaluation  # noqa: E402
from data.tasks import load_reward, load_rows  # noqa: E402

RUNS, SEEDS = Path("runs/compare"), (0, 1, 2)
STRENGTHS = dict(dqo=(0.5, 1, 2), pairwise=(0.5, 1, 2), likelihood=(0.25, 0.5, 1), entropy=(0.01, 0.03, 0.1), darling=(0.7, 0.8, 0.9), dra=(0.5, 1, 2))
ABLATIONS = {"dqo, alpha = 1": "dqo-1", "alpha = 0 (grpo)": "grpo", "alpha = 0.5": "dqo-0.5", "alpha = 2": "dqo-2", "k = 4, 16 prompts": "k4",
             "baseline none": "baseline_none", "baseline std": "baseline_std", "kernel quality": "kernel_quality",
             "encoder: base model's states": "encoder_base"}
HACKS = dict(lax=("grpo", "dqo", "kernel", "beta", "strict"), large=("dqo", "kernel", "beta"))
HACK_NAMES = {"lax-grpo": "lax reward, grpo", "lax-dqo": "lax reward, dqo", "lax-kernel": "lax reward, quality kernel", "lax-beta": "lax reward, β = 0.1",
              "lax-strict": "strict reward, dqo", "large-dqo": "strict reward, α = 5", "large-kernel": "the same, quality kernel", "large-beta": "the same, β = 0.1"}
# column of a CSV: where it stands in a result of eval.py
COLUMNS = {"quality": "quality", **{f"pass_at_{n}": ("pass_at", str(n)) for n in (1, 2, 4, 8, 16)},
           **{c: c for c in ("distinct_correct", "effective_diversity", "distinct_1", "distinct_4", "self_bleu_diversity", "self_rouge_diversity",
                             "correct_distinct_4", "correct_self_bleu_diversity", "cosine_distance", "vendi", "log_det")},
           **{f"second_{c}": ("second", c) for c in ("effective_diversity", "cosine_distance", "vendi", "log_det")}, "mean_tokens": "mean_tokens"}


def tasks_of(path, split="test"):
    """{task: result} of a file of measure.py, with the average over the tasks."""
    results = json.loads(path.read_text())[split]
    return {r["task"]: r for r in results + [evaluation.average(results)]}


def of_run(name, split="test"):
    return tasks_of(RUNS / name / "measured.json", split)


def value(result, column):
    at = COLUMNS[column]
    return result[at[0]][at[1]] if isinstance(at, tuple) else result[at]


def mean_std(x, digits):
    return f"{statistics.mean(x):.{digits}f}" + (f" ± {statistics.stdev(x):.{digits}f}" if len(x) > 1 else "")


def chosen():
    """{objective: strength}: the most distinct correct answers to the training prompts at seed 0, among the strengths whose
    quality is at most 0.03 below grpo's; if there is none, the best quality."""
    floor = of_run("grpo-s0", "train")["average"]["quality"] - 0.03
    best = {}
    for objective, strengths in STRENGTHS.items():
        on_train = {a: of_run(f"{objective}-{a}-s0", "train")["average"] for a in strengths}
        good = [a for a in strengths if on_train[a]["quality"] >= floor]
        best[objective] = max(good, key=lambda a: on_train[a]["distinct_correct"]) if good else max(strengths, key=lambda a: on_train[a]["quality"])
    return best


def write(name, header, rows):
    with open(HERE / name, "w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(header)
        out.writerows(rows)


def history(name):
    return [json.loads(x) for x in (RUNS / name / "metrics.jsonl").open()]


def over_20_steps(rows):
    """[(step, numbers...)] -> the same, averaged over 20 steps each."""
    return [[rows[i + 19][0], *(f"{statistics.mean(x):.4f}" for x in list(zip(*rows[i:i + 20]))[1:])] for i in range(0, len(rows), 20)]


def rewarded_and_right(name, strict, row_of):
    """Per step of a run: (step, mean reward, share that is entirely right, tokens, share of different texts in a group)."""
    steps = {}
    for line in (RUNS / name / "samples.jsonl").open():
        sample = json.loads(line)
        steps.setdefault(sample["step"], []).append(sample)
    for m, samples in zip(history(name), steps.values()):
        right = strict(*([s[x] for s in samples] for x in ("prompt", "response")), [row_of[s["prompt"]] for s in samples])
        yield m["step"], m["quality"], statistics.mean(right), m["length"], m["distinct"]


def gather():
    """The CSVs, from the runs."""
    best = chosen()
    rows = [[objective, a, split, *(f"{r[c]:.4f}" for c in ("quality", "distinct_correct", "effective_diversity")), "yes" * (best[objective] == a)]
            for objective, tried in STRENGTHS.items() for a in tried for split in ("train", "test")
            for r in [of_run(f"{objective}-{a}-s0", split)["average"]]]
    write("strengths.csv", ["objective", "alpha", "split", "quality", "distinct_correct", "effective_diversity", "chosen"], rows)

    runs = {("base", "", ""): tasks_of(RUNS / "base.json")}
    names = {("grpo", ""): "grpo", ("grpo_std", ""): "grpo_std", **{(o, a): f"{o}-{a}" for o, a in best.items()}, **{("dqo", a): f"dqo-{a}" for a in STRENGTHS["dqo"]}}
    runs |= {(o, a, s): of_run(f"{name}-s{s}") for (o, a), name in names.items() for s in SEEDS}
    write("comparison.csv", ["objective", "alpha", "seed", "task", *COLUMNS],
          [[*key, task, *(f"{value(r, c):.4f}" for c in COLUMNS)] for key, tasks in runs.items() for task, r in tasks.items()])

    write("ablations.csv", ["setting", "seed", "task", *COLUMNS],
          [[setting, s, task, *(f"{value(r, c):.4f}" for c in COLUMNS)] for setting, name in ABLATIONS.items() for s in SEEDS
           if (RUNS / f"{name}-s{s}" / "measured.json").exists() for task, r in of_run(f"{name}-s{s}").items()])

    write("training.csv", ["objective", "seed", "step", "quality", "distinct", "entropy"],
          [[o, s, *row] for o, name in (("grpo", "grpo"), ("dqo", "dqo-1")) for s in SEEDS
           for row in over_20_steps([(m["step"], m["quality"], m["distinct"], m["entropy"]) for m in history(f"{name}-s{s}")])])

    data = "instruct,reason"
    strict, row_of = load_reward(None, data), {r["prompt"]: r for r in load_rows(data, "train")}
    write("hacking.csv", ["run", "step", "reward", "entirely_right", "tokens", "distinct"],
          [[f"{setting}-{run}", *row] for setting, runs_ in HACKS.items() for run in runs_
           for row in over_20_steps(list(rewarded_and_right(f"{setting}-{run}", strict, row_of)))])


# ------------------------------------------------------------------------------------------ the README's tables
def read(name):
    return list(csv.DictReader((HERE / name).open()))


def markdown(header, rows):
    print("\n" + "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]))


def pick(rows, column, **which):
    """The numbers of a column, one per seed."""
    return [float(r[column]) for r in rows if all(r[k] == v for k, v in which.items())]


def everybody():
    """[(objective, strength)] of the comparison, in order: those chosen, and dqo at all three strengths."""
    return [("grpo", ""), ("grpo_std", ""), *((r["objective"], r["alpha"]) for r in read("strengths.csv")
                                              if r["split"] == "train" and (r["chosen"] or r["objective"] == "dqo"))]


def label(objective, alpha):
    return {"grpo_std": "grpo, `--baseline std`"}.get(objective, objective) + (f", α = {alpha}" if alpha else "")


def show_comparison():
    rows = read("comparison.csv")
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    cell = lambda o, a, task, column, digits: mean_std(pick(rows, column, objective=o, alpha=a, task=task), digits)
    columns = dict(quality=2, pass_at_2=2, distinct_correct=1, effective_diversity=2, second_effective_diversity=2, correct_self_bleu_diversity=2, log_det=2)
    markdown(["mean over the tasks", "quality", "pass@2", "distinct correct of 16", "effective diversity", "the same, second encoder",
              "1 - self-BLEU, correct only", "log det"],
             [[label(o, a), *(cell(o, a, "average", c, digits) for c, digits in columns.items())] for o, a in [("base", ""), *everybody()]])
    markdown(["quality; distinct correct", *tasks[:-1]],
             [[label(o, a), *(f"{cell(o, a, t, 'quality', 2)}; {cell(o, a, t, 'distinct_correct', 1)}" for t in tasks[:-1])] for o, a in [("base", ""), *everybody()]])

    # dqo at those strengths whose mean quality is within 0.02 of the other's, against it, task by task; if there is none, the closest
    table = []
    for other, alpha in everybody():
        if other == "dqo":
            continue
        table.append([label(other, alpha)])
        for task in tasks:
            mean = lambda o, a, column: statistics.mean(pick(rows, column, objective=o, alpha=a, task=task))
            found = sorted((abs(gap), gap, mean("dqo", a, "distinct_correct") / mean(other, alpha, "distinct_correct"))
                           for a in map(str, STRENGTHS["dqo"]) for gap in [mean("dqo", a, "quality") - mean(other, alpha, "quality")])
            ratios = sorted(f"{ratio:.2f}" for size, _, ratio in found if size <= 0.02)
            table[-1].append(" to ".join(dict.fromkeys((ratios[0], ratios[-1]))) if ratios else f"({found[0][2]:.2f}, quality {found[0][1]:+.2f})")
    markdown(["distinct correct, dqo / other", *tasks], table)


def show_ablations():
    rows, table = read("ablations.csv"), []
    columns = dict(quality=2, distinct_correct=1, effective_diversity=2, second_effective_diversity=2, log_det=2, second_log_det=2)
    for setting in dict.fromkeys(r["setting"] for r in rows):
        numbers = {c: pick(rows, c, setting=setting, task="average") for c in columns}
        table.append([setting, *(mean_std(numbers[c], digits) for c, digits in columns.items()), str(len(numbers["quality"]))])
    markdown(["mean over the tasks", "quality", "distinct correct", "effective diversity", "second encoder", "log det", "second encoder", "seeds"], table)


def show_strengths():
    markdown(["objective", "α", "quality", "distinct correct", "effective diversity", "chosen"],
             [[r["objective"], r["alpha"], *(f"{float(r[c]):.{d}f}" for c, d in (("quality", 2), ("distinct_correct", 1), ("effective_diversity", 2))), r["chosen"]]
              for r in read("strengths.csv") if r["split"] == "train"])


def show_hacking():
    last = {r["run"]: r for r in read("hacking.csv")}  # of each run
    markdown(["last 20 steps", "reward", "entirely right", "tokens", "different texts in a group"],
             [[HACK_NAMES[run], *(f"{float(r[c]):.{d}f}" for c, d in (("reward", 2), ("entirely_right", 2), ("tokens", 1), ("distinct", 2)))] for run, r in last.items()])


# ------------------------------------------------------------------------------------------------------- pictures
COLORS = dict(base="#555555", grpo="#d62728", grpo_std="#ff9896", dqo="#1f77b4", pairwise="#2ca02c", likelihood="#8c564b", entropy="#e377c2", darling="#9467bd", dra="#ff7f0e")


def plain_axes(plt, panels, size):
    fig, axes = plt.subplots(1, panels, figsize=size, squeeze=False)
    for ax in axes[0]:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes[0]


def label_ends(ax, ends, x, gap, ha="left"):
    """Names beside the ends of curves, pushed apart where they would overlap. ends: [(y, name, color)]"""
    ends = sorted(ends)
    at = [y for y, _, _ in ends]
    for _ in range(200):
        for i in range(len(at) - 1):
            lack = max(0.0, gap - (at[i + 1] - at[i]))
            at[i], at[i + 1] = at[i] - lack / 2, at[i + 1] + lack / 2
    for y, (_, name, color) in zip(at, ends):
        ax.text(x, y, f" {name} ", color=color, va="center", ha=ha, weight="bold", fontsize=8)


def pictures():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = read("comparison.csv")
    numbers = lambda o, a, column, task="average": pick(rows, column, objective=o, alpha=a, task=task)
    mean = lambda *which: statistics.mean(numbers(*which))

    fig, axes = plain_axes(plt, 2, (11, 4.8))
    alphas = [str(a) for a in STRENGTHS["dqo"]]
    for ax, column, name in zip(axes, ("distinct_correct", "effective_diversity"), ("distinct correct responses of 16", "effective semantic diversity")):
        ax.plot(*zip(*((mean(o, a, column), mean(o, a, "quality")) for o, a in [("grpo", ""), *(("dqo", a) for a in alphas)])), "-", color=COLORS["dqo"], lw=1, alpha=0.5)
        for o, a in everybody():
            x, y = numbers(o, a, column), numbers(o, a, "quality")
            at = statistics.mean(x), statistics.mean(y)
            ax.errorbar(*at, xerr=statistics.stdev(x), yerr=statistics.stdev(y), fmt="o", color=COLORS[o], ms=6, lw=0.8)
            text = {"grpo_std": "grpo, std"}.get(o, o) + f" {a}" * bool(a)
            ax.annotate(text, at, color=COLORS[o], weight="bold", fontsize=8, xytext=PLACES.get(text, (6, 5)), textcoords="offset points")
        low, high = ax.get_xlim()
        ax.set(xlabel=name, ylabel="quality", xlim=(low, high + 0.2 * (high - low)))
    base = [mean("base", "", c) for c in ("quality", "distinct_correct", "effective_diversity")]
    fig.suptitle(f"mean over four tasks, ± standard deviation over 3 seeds; line: dqo over α (base model: quality {base[0]:.2f}, {base[1]:.1f} distinct correct, "
                 f"effective diversity {base[2]:.2f})", fontsize=9)
    fig.tight_layout()
    fig.savefig(HERE / "plane.png", dpi=150)

    fig, axes = plain_axes(plt, 2, (11, 4.2))
    sizes = (1, 2, 4, 8, 16)
    for ax, task, title in zip(axes, ("average", "reason"), ("mean over the tasks", "reason")):
        ends = []
        for o, a in [("base", ""), *(x for x in everybody() if x[0] != "dqo"), ("dqo", "1")]:
            ys = [mean(o, a, f"pass_at_{n}", task) for n in sizes]
            ax.plot(sizes, ys, "o-", color=COLORS[o], ms=3, lw=1)
            ends.append((ys[0], o.replace("_", ", "), COLORS[o]))
        label_ends(ax, ends, 0.95, 0.026, ha="right")
        ax.set(xlabel="n", ylabel="pass@n", title=title, xscale="log", xlim=(0.55, 18))
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
    fig.tight_layout()
    fig.savefig(HERE / "pass.png", dpi=150)

    fig, axes = plain_axes(plt, 3, (12, 3.8))
    rows = read("training.csv")
    for ax, column, title in zip(axes, ("quality", "distinct", "entropy"), ("quality", "share of different texts in a group", "entropy (nats per token)")):
        ends = []
        for o in ("grpo", "dqo"):
            for seed in map(str, SEEDS):
                x, y = (pick(rows, c, objective=o, seed=seed) for c in ("step", column))
                ax.plot(x, y, color=COLORS[o], lw=0.9, alpha=0.8)
            ends.append((statistics.mean(pick(rows, column, objective=o, step=str(int(x[-1])))), o, COLORS[o]))
        label_ends(ax, ends, x[-1], 0.06 * (ax.get_ylim()[1] - ax.get_ylim()[0]))
        ax.set(title=title, xlabel="step", xlim=(0, x[-1] * 1.12))
    fig.tight_layout()
    fig.savefig(HERE / "training.png", dpi=150)

    fig, axes = plain_axes(plt, 4, (14, 3.8))
    colors = {"grpo": COLORS["grpo"], "dqo": COLORS["dqo"], "kernel": "#2ca02c", "beta": "#9467bd", "strict": "#ff7f0e"}
    rows = read("hacking.csv")
    for ax, (setting, column, title) in zip(axes, (("lax", "entirely_right", "lax reward: entirely right"), ("lax", "tokens", "lax reward: tokens per response"),
                                                   ("large", "entirely_right", "α = 5: quality"), ("large", "distinct", "α = 5: share of different texts"))):
        ends = []
        for run in HACKS[setting]:
            x, y = (pick(rows, c, run=f"{setting}-{run}") for c in ("step", column))
            ax.plot(x, y, color=colors[run], lw=1.2)
            ends.append((y[-1], {"kernel": "quality kernel", "beta": "β = 0.1", "strict": "strict reward"}.get(run, run), colors[run]))
        label_ends(ax, ends, x[-1], 0.07 * (ax.get_ylim()[1] - ax.get_ylim()[0]))
        ax.set(title=title, xlabel="step", xlim=(0, x[-1] * 1.5))
        ax.set_xticks([0, 100, 200, 300])
    fig.tight_layout()
    fig.savefig(HERE / "hacking.png", dpi=150)


PLACES = {"entropy 0.1": (-62, 5), "dqo 0.5": (6, -13), "dqo 1": (6, -13)}  # of labels that would otherwise overlap others, in points


def show():
    show_comparison()
    show_ablations()
    show_strengths()
    show_hacking()


def main(argv):
    if argv == ["--tried"]:
        return print("\n".join(f"{o} {a}" for o, strengths in STRENGTHS.items() for a in strengths))
    if argv == ["--chosen"]:
        return print("\n".join(f"{o} {a}" for o, a in chosen().items()))
    if argv != ["--show"]:
        gather()
    pictures()
    show()


if __name__ == "__main__":
    main(sys.argv[1:])
