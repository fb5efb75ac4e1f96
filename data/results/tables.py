"""From the runs of make.sh to the CSVs beside this file, and from these to tables and pictures.

    python data/results/tables.py              # both
    python data/results/tables.py --show       # tables and pictures from the CSVs that are there
    python data/results/tables.py --tried      # the strengths of each objective tried at seed 0
    python data/results/tables.py --chosen     # the one of each that seed 0 chooses, see `choose`
"""

import csv
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
import eval
from cities import name_points, write
from data.tasks import load_reward, load_rows

RUNS, SEEDS = Path("runs/compare"), ("0", "1", "2")
STRENGTHS = dict(
    dqo=("0.5", "1", "2"), dqo_quality=("1", "3", "5"), pairwise=("0.5", "1", "2"),
    setpo=("2", "5", "10"), repexp=("1", "2", "4"), darling=("0.7", "0.8", "0.9"),
    dra=("0.5", "1", "2"), likelihood=("0.25", "0.5", "1"), entropy=("0.01", "0.03", "0.1"),
    passk=("2", "4", "6"), maxrl=("0.5", "1", "2"), polyepo=("0.8", "0.9", "0.95"))
TRIED = [(objective, alpha) for objective in STRENGTHS for alpha in STRENGTHS[objective]]
HARD = ("instruct", "reason")  # the tasks with hard prompts
BASE, GRPO = ("base", ""), ("grpo", "")  # (objective, strength), as in the CSVs
DQO = TRIED[:3]
VARIANTS = {  # runs with one thing changed
    ("grpo_std", ""): "grpo, `--baseline std`",
    ("dqo_std", ""): "dqo, α = 1, `--baseline std`",
}
HACKS = {  # name of a run: what it is
    "lax-grpo": "lax reward, grpo",
    "lax-dqo": "lax reward, dqo",
    "lax-quality": "lax reward, dqo_quality",
    "lax-beta": "lax reward, β = 0.1",
    "lax-strict": "strict reward, dqo",
    "large-dqo": "strict reward, α = 5",
    "large-quality": "the same, dqo_quality",
    "large-beta": "the same, β = 0.1",
}
FREE = {"objective", "alpha", "out", "resume", "inputs", "torch", "save_every", "micro_batch"}
COLUMNS = (
    "quality", *(f"pass_at_{n}" for n in (1, 2, 4, 8, 16, 32)), "distinct_correct",
    "effective_diversity", "utility", "distinct_4", "self_bleu_diversity", "self_rouge_diversity",
    "cosine_distance", "vendi", "log_det", "second_effective_diversity", "mean_tokens")


# ---- from the runs
def flat(means):
    """{"pass_at": {"4": x}} becomes {"pass_at_4": x}."""
    return {f"{key}_{n}".rstrip("_"): x for key, value in means.items()
            for n, x in (value if isinstance(value, dict) else {"": value}).items()}


def of_run(name):
    """{(split, task): {column: mean}} of a run, also for the average over the tasks."""
    measured = json.loads((RUNS / name / "measured.json").read_text("utf-8"))
    return {(split, task): flat(means) for split in ("train", "test", "hard")
            for tasks in eval.by_model(measured[split]).values()
            for task, (means, _) in tasks.items()}


def run_of(objective, alpha, seed):
    """The name of a run; alpha is "" where there is no strength."""
    return "-".join(filter(None, (objective, alpha, f"s{seed}")))


def choose(found, of_grpo):
    """The strength with the most distinct correct answers to training prompts at seed 0, of those
    whose quality there is at most 0.03 below grpo's; if there is none, the best quality.
    found: {strength: (quality, distinct correct)}"""
    good = [alpha for alpha in found if found[alpha][0] >= of_grpo - 0.03]
    return max(good, key=lambda alpha: found[alpha][1]) if good else max(found, key=found.get)


def chosen():
    """{objective: strength}"""
    def on_train(*who):
        means = of_run(run_of(*who, "0"))["train", "average"]
        return means["quality"], means["distinct_correct"]

    return {objective: choose({alpha: on_train(objective, alpha) for alpha in tried},
                              on_train(*GRPO)[0]) for objective, tried in STRENGTHS.items()}


def history(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]


def write_strengths(best):
    """bonus_to_quality: how large the bonus is beside the reward, as the standard deviations
    within a group, each averaged over the steps of a run."""
    rows = []
    for objective, alpha in [GRPO, *TRIED]:
        name = run_of(objective, alpha, "0")
        found, steps = of_run(name), history(RUNS / name)
        bonus, quality = (sum(m[c] for m in steps) for c in ("bonus_std", "quality_std"))
        for split in ("train", "test"):
            columns = ("quality", "distinct_correct", "effective_diversity")
            rows.append(dict(
                objective=objective, alpha=alpha, split=split,
                **{c: found[split, "average"][c] for c in columns},
                bonus_to_quality=bonus / quality,
                hard_pass_at_16=found["hard", "average"]["pass_at_16"],
                chosen="yes" if best.get(objective) == alpha else ""))
    write("strengths.csv", rows)


def write_comparison(best):
    rows = []
    for who in dict.fromkeys([BASE, GRPO, *DQO, *best.items(), *VARIANTS]):  # each once
        for seed in SEEDS:
            if (RUNS / run_of(*who, seed) / "measured.json").exists():
                rows += [dict(objective=who[0], alpha=who[1], seed=seed, split=split, task=task,
                              **{column: means.get(column, "") for column in COLUMNS})
                         for (split, task), means in of_run(run_of(*who, seed)).items()
                         if split != "train"]
    write("comparison.csv", rows)


def write_first():
    """What train.py shows beside a run with its defaults: first.json."""
    run = json.loads((RUNS / "grpo-s0" / "run.json").read_text("utf-8"))
    options = {name: run[name] for name in sorted(run.keys() - FREE)}
    first = dict(options=options, test=[], hard=[], answers=[])
    for name, label in (("base-s0", "base"), ("grpo-s0", "GRPO (recorded)")):
        measured = json.loads((RUNS / name / "measured.json").read_text("utf-8"))
        for part in ("test", "hard"):
            first[part] += [dict(result, model=label) for result in measured[part]]
        first["answers"] += [dict(answer, model=label) for answer in measured["samples"][:8]]
    (HERE / "first.json").write_text(json.dumps(first, indent=1) + "\n", "utf-8")


def over_steps(rows, count=20):
    """Dicts of numbers, averaged over so many steps each; of `step` the last one."""
    for i in range(0, len(rows), count):
        part = rows[i:i + count]
        yield {c: part[-1][c] if c == "step" else statistics.fmean(row[c] for row in part)
               for c in part[0]}


def write_hacking():
    """What was rewarded in training, and what was entirely right."""
    given, rows = load_rows(eval.Options.data, "train"), []
    strict, row_of = load_reward(None, given), {row["prompt"]: row for row in given}
    for run in HACKS:
        right = {}
        for line in (RUNS / run / "samples.jsonl").open(encoding="utf-8"):
            x = json.loads(line)
            score = strict([x["prompt"]], [x["response"]], [row_of[x["prompt"]]])
            right.setdefault(x["step"], []).extend(score)
        steps = [dict(step=m["step"], reward=m["quality"], tokens=m["length"],
                      entirely_right=statistics.fmean(right[m["step"]]), distinct=m["distinct"])
                 for m in history(RUNS / run)]
        rows += [dict(run=run, **means) for means in over_steps(steps)]
    write("hacking.csv", rows)


# ---- the tables
def read(name):
    return list(csv.DictReader((HERE / name).open(encoding="utf-8")))


def where(rows, **which):
    return [row for row in rows if all(row[column] == x for column, x in which.items())]


def numbers(rows, column):
    return [float(row[column]) for row in rows]


def spread_of(x):
    return statistics.stdev(x) if len(x) > 1 else 0


def table(title, groups, columns):
    """Prints Markdown. groups: {label: rows, one per seed}; columns: {label: (column, digits)},
    of one task with (column, digits, task). A cell is mean ± standard deviation over the rows."""
    lines = [[title, *columns, "seeds"], ["---"] * (len(columns) + 2)]
    for name, rows in groups.items():
        cells = []
        for column, digits, *task in columns.values():
            x = numbers(where(rows, task=task[0]) if task else rows, column)
            spread = f" ± {spread_of(x):.{digits}f}" if len(x) > 1 else ""
            cells.append(f"{statistics.mean(x):.{digits}f}{spread}")
        lines.append([name, *cells, str(len(x))])
    print("\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))


def label(who):
    return VARIANTS.get(who) or (f"{who[0]}, α = {who[1]}" if who[1] else who[0])


def everybody(**which):
    """{(objective, strength): rows} of the comparison: those chosen, and dqo at all strengths."""
    groups = {}
    for row in where(read("comparison.csv"), **which):
        groups.setdefault((row["objective"], row["alpha"]), []).append(row)
    return groups


def show():
    def labelled(groups, some=lambda who: who not in VARIANTS or who[0] == "grpo_std"):
        return {label(who): rows for who, rows in groups.items() if some(who)}

    means = everybody(split="test", task="average")
    columns = {"quality": ("quality", 2), "distinct correct of 16": ("distinct_correct", 1),
               "effective diversity": ("effective_diversity", 2),
               "the same, second encoder": ("second_effective_diversity", 2),
               "1 - self-BLEU": ("self_bleu_diversity", 2), "log det": ("log_det", 2)}
    table("test prompts, mean over the tasks", labelled(means), columns)
    for title, column in list(columns.items())[:2]:
        table(f"test prompts, {title}", labelled(everybody(split="test")),
              {task: (*column, task) for task in eval.Options.data.split(",")})
    table("hard prompts", labelled(everybody(split="hard")), {
        f"{task}, {title}": (column, digits, task) for task in HARD for title, column, digits in (
            ("pass@1", "pass_at_1", 2), ("pass@4", "pass_at_4", 2), ("pass@16", "pass_at_16", 2),
            ("distinct correct of 32", "distinct_correct", 1))})
    table("one thing changed, test prompts",
          labelled(means, {GRPO, *DQO, *VARIANTS}.__contains__), columns)
    rows = where(read("strengths.csv"), split="train")
    table("32 training prompts of each task, seed 0", {
        label((row["objective"], row["alpha"])) + (", chosen" if row["chosen"] else ""): [row]
        for row in rows}, {
        "quality": ("quality", 2), "distinct correct": ("distinct_correct", 1),
        "effective diversity": ("effective_diversity", 2),
        "spread of the bonus / of quality": ("bonus_to_quality", 2),
        "hard prompts, pass@16": ("hard_pass_at_16", 2)})
    rows = read("hacking.csv")
    table("last 20 steps", {what: where(rows, run=run)[-1:] for run, what in HACKS.items()}, {
        "reward": ("reward", 2), "entirely right": ("entirely_right", 2),
        "tokens": ("tokens", 1), "different texts in a group": ("distinct", 2)})


# ---- the pictures
COLORS = dict(zip(["base", "grpo", "grpo_std", *STRENGTHS], (
    "#555555 #d62728 #ff9896 #1f77b4 #2ca02c #98df8a #17becf #7f7f7f #9467bd #ff7f0e #8c564b "
    "#e377c2 #bcbd22 #e7ba52 #393b79").split()))


def panels(count, size):
    from matplotlib.figure import Figure  # unlike pyplot it needs no screen
    figure = Figure(figsize=size, layout="tight")
    all_axes = figure.subplots(1, count)
    for axes in all_axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def plane(axes, whos, column, xlabel):
    """Quality and a diversity on test prompts, ± standard deviation over the seeds."""
    points, groups = [], everybody(split="test", task="average")
    whos = list(filter(groups.get, whos))  # those that have been measured
    for who in whos:
        x, y = numbers(groups[who], column), numbers(groups[who], "quality")
        at = statistics.mean(x), statistics.mean(y)
        axes.errorbar(*at, spread_of(y), spread_of(x), "o", color=COLORS[who[0]], ms=5, lw=0.8)
        points.append((*at, 4, label(who).replace("`", ""), COLORS[who[0]]))
    line = [point[:2] for who, point in zip(whos, points) if who in DQO]
    axes.plot(*zip(*line), color=COLORS["dqo"], lw=1, alpha=0.5)
    axes.set(xlabel=xlabel, ylabel="quality")
    axes.margins(0.15)
    return points


def curve(axes, name, color, found):
    """pass@n. found: {n: (mean, how uncertain it is)}"""
    axes.errorbar(list(found), *zip(*found.values()), fmt="o-", color=color, ms=3, lw=1.3,
                  capsize=2, label=name)
    axes.set(xlabel="attempts, n", ylabel="pass@n", xscale="log")
    axes.set_xticks(list(found), list(found))
    axes.minorticks_off()


def hard_curves(axes, whos, task):
    """pass@n on hard prompts, ± standard deviation over the seeds; of the base over samplings."""
    groups = everybody(split="hard", task=task)
    for who in whos:
        found = {n: numbers(groups[who], f"pass_at_{n}") for n in (1, 2, 4, 8, 16, 32)}
        curve(axes, label(who), COLORS[who[0]],
              {n: (statistics.mean(x), spread_of(x)) for n, x in found.items()})


def draw_comparison():
    """headline.png: before, after GRPO, after DQO. plane.png, pass.png: the others too."""
    best = {r["objective"]: r["alpha"] for r in read("strengths.csv") if r["chosen"]}
    few, distinct = [BASE, GRPO, ("dqo", "1")], "different right answers of 16"
    figure, (left, right) = panels(2, (9, 3.8))
    points = plane(left, [BASE, GRPO, *DQO], "distinct_correct", distinct)
    hard_curves(right, few, "average")
    left.set_title("test prompts: new combinations")
    right.set_title("hard prompts: rare categories and targets")
    right.legend()
    name_points(left, points, gaps=(2, 12, 24))
    figure.savefig(HERE / "headline.png", dpi=200)

    figure, both = panels(2, (12, 6))
    whos = dict.fromkeys([GRPO, ("grpo_std", ""), *DQO, *best.items()])
    drawn = [plane(both[0], whos, "distinct_correct", distinct),
             plane(both[1], whos, "effective_diversity", "effective diversity")]
    for axes, points in zip(both, drawn):
        name_points(axes, points, 8, gaps=(2, 12, 24, 40))
    figure.savefig(HERE / "plane.png", dpi=150)

    figure, three = panels(3, (13, 4.4))
    few += [(name, best[name]) for name in ("dqo_quality", "likelihood", "passk", "maxrl")]
    for axes, task in zip(three, (*HARD, "average")):
        hard_curves(axes, few, task)
        axes.set_title("mean of both" if task == "average" else f"{task}, hard prompts")
    three[0].legend(fontsize=8)
    figure.savefig(HERE / "pass.png", dpi=150)


def draw_hacking():
    """hacking.png: what a lax reward and too large a strength do, over the steps; what helps."""
    colors = dict(COLORS, quality=COLORS["dqo_quality"], beta="#9467bd", strict="#ff7f0e")
    figure, all_axes = panels(4, (16, 3.8))
    titles = {"lax reward: entirely right": "entirely_right", "lax reward: tokens": "tokens",
              "α = 5: quality": "reward", "α = 5: share of different texts": "distinct"}
    for axes, (title, column) in zip(all_axes, titles.items()):
        for run in (run for run in HACKS if run.startswith("lax") == title.startswith("lax")):
            rows = where(read("hacking.csv"), run=run)
            axes.plot(numbers(rows, "step"), numbers(rows, column), lw=1.1, label=HACKS[run],
                      color=colors[run.partition("-")[2]])
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize=7)
    figure.savefig(HERE / "hacking.png", dpi=150)


def main(argv):
    if argv in (["--tried"], ["--chosen"]):
        for who in TRIED if argv == ["--tried"] else chosen().items():
            print(*who)
        return
    if argv != ["--show"]:
        best = chosen()
        write_strengths(best)
        write_comparison(best)
        write_first()
        write_hacking()
    draw_comparison()
    draw_hacking()
    show()


if __name__ == "__main__":
    main(sys.argv[1:])
