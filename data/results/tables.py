"""From the runs of make.sh to the CSVs beside this file, and from these to tables and pictures.

    python data/results/tables.py              # both
    python data/results/tables.py --show       # tables and pictures from the CSVs that are there
    python data/results/tables.py --tried      # the strengths of each objective tried at seed 0
    python data/results/tables.py --chosen     # the one of each that seed 0 chooses, see `chosen`
"""

import csv
import json
import statistics
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data.metrics import average
from data.prompts import load_rows
from data.scoring import load_reward

RUNS, SEEDS = Path("runs/compare"), (0, 1, 2)
STRENGTHS = dict(
    dqo=(0.5, 1, 2),
    pairwise=(0.5, 1, 2),
    likelihood=(0.25, 0.5, 1),
    entropy=(0.01, 0.03, 0.1),
    darling=(0.7, 0.8, 0.9),
    dra=(0.5, 1, 2),
    setpo=(2, 5, 10),
    passk=(2, 4, 6),
    repexp=(1, 2, 4),
    dqo_quality=(1, 2, 4),  # dqo --kernel quality
)
HARD = ("instruct", "reason")  # their test prompts ask for what training hardly shows
ABLATIONS = {  # setting: name of its runs, without the seed
    "dqo, alpha = 1": "dqo-1",
    "alpha = 0 (grpo)": "grpo",
    "alpha = 0.5": "dqo-0.5",
    "alpha = 2": "dqo-2",
    "k = 4, 16 prompts": "k4",
    "baseline none": "baseline_none",
    "baseline std": "baseline_std",
    "kernel quality": "dqo_quality-1",
    "encoder: base model's states": "encoder_base",
}
HACKS = {  # name of a run: what it is
    "lax-grpo": "lax reward, grpo",
    "lax-dqo": "lax reward, dqo",
    "lax-kernel": "lax reward, quality kernel",
    "lax-beta": "lax reward, β = 0.1",
    "lax-strict": "strict reward, dqo",
    "large-dqo": "strict reward, α = 5",
    "large-kernel": "the same, quality kernel",
    "large-beta": "the same, β = 0.1",
}
# column of a CSV: where it stands in a result of eval.py
COLUMNS = {"quality": ("quality",)}
for n in (1, 2, 4, 8, 16):
    COLUMNS[f"pass_at_{n}"] = ("pass_at", str(n))
for column in ("distinct_correct", "effective_diversity", "distinct_1", "distinct_4",
               "self_bleu_diversity", "self_rouge_diversity", "correct_distinct_4",
               "correct_self_bleu_diversity", "cosine_distance", "vendi", "log_det"):
    COLUMNS[column] = (column,)
for column in ("effective_diversity", "cosine_distance", "vendi", "log_det"):
    COLUMNS[f"second_{column}"] = ("second", column)
COLUMNS["mean_tokens"] = ("mean_tokens",)


# ------------------------------------------------------------------------------ from the runs
def tasks_of(path, split="test"):
    """{task: result} of a file of measure.py, with the average over the tasks."""
    results = json.loads(path.read_text("utf-8"))[split]
    return {result["task"]: result for result in results + [average(results)]}


def of_run(name, split="test"):
    return tasks_of(RUNS / name / "measured.json", split)


def run_of(objective, alpha, seed):
    """The name of a run; alpha is "" where there is no strength."""
    return "-".join(filter(None, (objective, str(alpha), f"s{seed}")))


def all_columns(result):
    """The cells of a CSV's row for one task."""
    cells = []
    for keys in COLUMNS.values():
        value = result
        for key in keys:
            value = value[key]
        cells.append(f"{value:.4f}")
    return cells


def chosen():
    """{objective: strength}: the most distinct correct answers to the training prompts at seed 0,
    among the strengths whose quality is at most 0.03 below grpo's; if there is none, the best
    quality."""
    floor = of_run("grpo-s0", "train")["average"]["quality"] - 0.03
    best = {}
    for objective, strengths in STRENGTHS.items():
        quality, distinct = {}, {}
        for alpha in strengths:
            on_train = of_run(run_of(objective, alpha, 0), "train")["average"]
            quality[alpha], distinct[alpha] = on_train["quality"], on_train["distinct_correct"]
        good = [alpha for alpha in strengths if quality[alpha] >= floor]
        best[objective] = max(good, key=distinct.get) if good else max(strengths, key=quality.get)
    return best


def write(name, header, rows):
    with open(HERE / name, "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(header)
        out.writerows(rows)


def bonus_to_quality(name):
    """How large the bonus is beside the reward: their standard deviations within a group, each
    averaged over the steps of a run, divided."""
    steps = history(RUNS / name)
    bonus, quality = (statistics.mean(m[c] for m in steps) for c in ("bonus_std", "quality_std"))
    return bonus / quality


def hard_pass(name):
    """pass@16 on the test prompts of the hard tasks."""
    tasks = of_run(name)
    return statistics.mean(tasks[task]["pass_at"]["16"] for task in HARD)


def write_strengths(best):
    columns, rows = ("quality", "distinct_correct", "effective_diversity"), []
    tried = [(objective, alpha) for objective, alphas in STRENGTHS.items() for alpha in alphas]
    for objective, alpha in [GRPO, *tried]:
        name = run_of(objective, alpha, 0)
        is_chosen = "yes" if best.get(objective) == alpha else ""
        for split in ("train", "test"):
            mean = of_run(name, split)["average"]
            numbers = [f"{mean[column]:.4f}" for column in columns]
            numbers += [f"{bonus_to_quality(name):.4f}", f"{hard_pass(name):.4f}"]
            rows.append([objective, alpha, split, *numbers, is_chosen])
    header = ["objective", "alpha", "split", *columns, "bonus_to_quality", "hard_pass_at_16",
              "chosen"]
    write("strengths.csv", header, rows)


def write_comparison(best):
    of_dqo = [("dqo", alpha) for alpha in STRENGTHS["dqo"]]
    trained = dict.fromkeys([GRPO, ("grpo_std", ""), *best.items(), *of_dqo])  # each once
    runs = {("base", "", seed): tasks_of(RUNS / f"base-s{seed}.json") for seed in SEEDS}
    for who in trained:
        for seed in SEEDS:
            name = run_of(*who, seed)
            if (RUNS / name / "measured.json").exists():
                runs[(*who, seed)] = of_run(name)
    rows = []
    for key, tasks in runs.items():
        rows += [[*key, task, *all_columns(result)] for task, result in tasks.items()]
    write("comparison.csv", ["objective", "alpha", "seed", "task", *COLUMNS], rows)


def write_ablations():
    rows = []
    for setting, name in ABLATIONS.items():
        for seed in SEEDS:
            if (RUNS / f"{name}-s{seed}" / "measured.json").exists():
                tasks = of_run(f"{name}-s{seed}")
                rows += [[setting, seed, task, *all_columns(r)] for task, r in tasks.items()]
    write("ablations.csv", ["setting", "seed", "task", *COLUMNS], rows)


def history(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def over_steps(rows, count=20):
    """[(step, numbers...)] -> the same, averaged over so many steps each."""
    averaged = []
    for i in range(0, len(rows), count):
        (*_, last_step), *columns = zip(*rows[i:i + count])
        averaged.append([last_step, *(f"{statistics.mean(x):.4f}" for x in columns)])
    return averaged


def write_training():
    columns, rows = ("quality", "distinct", "entropy"), []
    for objective, name in (("grpo", "grpo"), ("dqo", "dqo-1")):
        for seed in SEEDS:
            steps = []
            for m in history(RUNS / f"{name}-s{seed}"):
                steps.append((m["step"], *(m[column] for column in columns)))
            rows += [[objective, seed, *numbers] for numbers in over_steps(steps)]
    write("training.csv", ["objective", "seed", "step", *columns], rows)


def rewarded_and_right(name, strict, record_of):
    """Per step of a run: (step, mean reward, share that is entirely right, tokens, share of
    different texts in a group)."""
    samples_of, steps = {}, []
    for line in (RUNS / name / "samples.jsonl").open(encoding="utf-8"):
        sample = json.loads(line)
        samples_of.setdefault(sample["step"], []).append(sample)
    for m, samples in zip(history(RUNS / name), samples_of.values()):
        prompts = [sample["prompt"] for sample in samples]
        responses = [sample["response"] for sample in samples]
        right = strict(prompts, responses, [record_of[prompt] for prompt in prompts])
        mean = statistics.mean(right)
        steps.append((m["step"], m["quality"], mean, m["length"], m["distinct"]))
    return steps


def write_hacking():
    data = "instruct,reason"
    strict = load_reward(None, data)
    record_of = {record["prompt"]: record for record in load_rows(data, "train")}
    rows = []
    for name in HACKS:
        steps = over_steps(rewarded_and_right(name, strict, record_of))
        rows += [[name, *numbers] for numbers in steps]
    write("hacking.csv", ["run", "step", "reward", "entirely_right", "tokens", "distinct"], rows)


def gather():
    """The CSVs, from the runs."""
    best = chosen()
    write_strengths(best)
    write_comparison(best)
    write_ablations()
    write_training()
    write_hacking()


# --------------------------------------------------------------------------------- the tables
def read(name):
    return list(csv.DictReader((HERE / name).open(encoding="utf-8")))


def markdown(header, rows):
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    print("\n" + "\n".join(lines))


def pick(rows, column, **which):
    """The numbers of a column, one per seed."""
    return [float(r[column]) for r in rows if all(r[k] == v for k, v in which.items())]


def of(rows, who, column, task="average"):
    """The same for one (objective, strength) of the comparison."""
    objective, alpha = who
    return pick(rows, column, objective=objective, alpha=alpha, task=task)


def mean_of(rows, who, column, task="average"):
    return statistics.mean(of(rows, who, column, task))


def of_hard(rows, who, column):
    """Averaged over the hard tasks, one number per seed."""
    each = zip(*(of(rows, who, column, task) for task in HARD))
    return [statistics.mean(numbers) for numbers in each]


def mean_std(numbers, digits):
    text = f"{statistics.mean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" ± {statistics.stdev(numbers):.{digits}f}"
    return text


def rounded(row, digits):
    """The cells of some columns of a CSV. digits: {column: how many}"""
    return [f"{float(row[column]):.{d}f}" for column, d in digits.items()]


BASE, GRPO = ("base", ""), ("grpo", "")
DQO = [("dqo", str(alpha)) for alpha in STRENGTHS["dqo"]]
IN_PASS = ("likelihood", "passk")  # beside base, grpo and dqo


def everybody():
    """[(objective, strength)] of the comparison, in order: those chosen, and dqo at all three
    strengths."""
    found = [GRPO, ("grpo_std", "")]
    for row in read("strengths.csv"):
        if row["split"] == "train" and (row["chosen"] or row["objective"] == "dqo"):
            found.append((row["objective"], row["alpha"]))
    return found


def label(who):
    objective, alpha = who
    name = {"grpo_std": "grpo, `--baseline std`", "dqo_quality": "dqo, `--kernel quality`"}
    name = name.get(objective, objective)
    return f"{name}, α = {alpha}" if alpha else name


def show_comparison():
    rows = read("comparison.csv")
    columns = {  # column: its name in the table, digits
        "quality": ("quality", 2),
        "pass_at_4": ("pass@4", 2),
        "pass_at_16": ("pass@16", 2),
        "distinct_correct": ("distinct correct of 16", 1),
        "effective_diversity": ("effective diversity", 2),
        "second_effective_diversity": ("the same, second encoder", 2),
        "correct_self_bleu_diversity": ("1 - self-BLEU, correct only", 2),
        "log_det": ("log det", 2),
    }
    table = []
    for who in [BASE, *everybody()]:
        cells = [mean_std(of(rows, who, c), digits) for c, (_, digits) in columns.items()]
        seeds = str(len(of(rows, who, "quality")))
        table.append([label(who), *cells, seeds])
    markdown(["mean over the tasks", *(name for name, _ in columns.values()), "seeds"], table)


def show_tasks():
    rows = read("comparison.csv")
    tasks = [task for task in dict.fromkeys(r["task"] for r in rows) if task != "average"]
    table = []
    for who in [BASE, *everybody()]:
        cells = [label(who)]
        for task in tasks:
            quality = mean_std(of(rows, who, "quality", task), 2)
            cells.append(f"{quality}; {mean_std(of(rows, who, 'distinct_correct', task), 1)}")
        table.append(cells)
    markdown(["quality; distinct correct", *tasks], table)


def show_hard():
    """pass@n on the two tasks whose test prompts training hardly shows."""
    rows, table = read("comparison.csv"), []
    for who in [BASE, *everybody()]:
        cells = [mean_std(of(rows, who, f"pass_at_{n}", task), 2)
                 for task in HARD for n in (1, 4, 16)]
        table.append([label(who), *cells])
    names = [f"{task}, pass@{n}" for task in HARD for n in (1, 4, 16)]
    markdown(["what training hardly shows", *names], table)


def dqo_against(rows, other, task):
    """How many times the other's distinct correct answers dqo has, at those strengths whose mean
    quality is within 0.02 of the other's; if there is none, at the closest."""
    quality = mean_of(rows, other, "quality", task)
    distinct = mean_of(rows, other, "distinct_correct", task)
    found = []  # (|difference in quality|, difference, ratio) of each strength
    for who in DQO:
        gap = mean_of(rows, who, "quality", task) - quality
        found.append((abs(gap), gap, mean_of(rows, who, "distinct_correct", task) / distinct))
    close = sorted(f"{ratio:.2f}" for size, _, ratio in found if size <= 0.02)
    if not close:
        _, gap, ratio = min(found)
        return f"({ratio:.2f}, quality {gap:+.2f})"
    lowest, highest = close[0], close[-1]
    return lowest if lowest == highest else f"{lowest} to {highest}"


def show_ratios():
    rows = read("comparison.csv")
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    table = []
    for other in everybody():
        if other[0] != "dqo":
            cells = [dqo_against(rows, other, task) for task in tasks]
            table.append([label(other), *cells])
    markdown(["distinct correct, dqo / other", *tasks], table)


def show_ablations():
    rows, table = read("ablations.csv"), []
    columns = dict(quality=2, distinct_correct=1, effective_diversity=2,
                   second_effective_diversity=2, log_det=2, second_log_det=2)
    for setting in dict.fromkeys(r["setting"] for r in rows):
        cells = []
        for column, digits in columns.items():
            numbers = pick(rows, column, setting=setting, task="average")
            cells.append(mean_std(numbers, digits))
        table.append([setting, *cells, str(len(numbers))])
    markdown(["mean over the tasks", "quality", "distinct correct", "effective diversity",
              "second encoder", "log det", "second encoder", "seeds"], table)


def show_strengths():
    digits = dict(quality=2, distinct_correct=1, effective_diversity=2, bonus_to_quality=2,
                  hard_pass_at_16=2)
    table = [[label((r["objective"], "")), r["alpha"], *rounded(r, digits), r["chosen"]]
             for r in read("strengths.csv") if r["split"] == "train"]
    markdown(["objective", "α", "quality", "distinct correct", "effective diversity",
              "spread of the bonus / of quality", "hard tests, pass@16", "chosen"], table)


def show_hacking():
    digits = dict(reward=2, entirely_right=2, tokens=1, distinct=2)
    last = {r["run"]: r for r in read("hacking.csv")}  # of each run
    table = [[HACKS[run], *rounded(r, digits)] for run, r in last.items()]
    markdown(["last 20 steps", "reward", "entirely right", "tokens", "different texts in a group"],
             table)


def show():
    show_comparison()
    show_tasks()
    show_hard()
    show_ratios()
    show_ablations()
    show_strengths()
    show_hacking()


# ------------------------------------------------------------------------------- the pictures
COLORS = dict(
    base="#555555",
    grpo="#d62728",
    grpo_std="#ff9896",
    dqo="#1f77b4",
    pairwise="#2ca02c",
    likelihood="#8c564b",
    entropy="#e377c2",
    darling="#9467bd",
    dra="#ff7f0e",
    setpo="#17becf",
    passk="#bcbd22",
    repexp="#7f7f7f",
    dqo_quality="#08306b",
)


def panels(count, size):
    from matplotlib.figure import Figure  # unlike pyplot it needs no screen
    figure = Figure(figsize=size)
    all_axes = figure.subplots(1, count, squeeze=False)[0]
    for axes in all_axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def save(figure, name, dpi=150):
    figure.tight_layout()
    figure.savefig(HERE / name, dpi=dpi)


def name_at(axes, point, text, color, offset, size=8):
    """offset: in points"""
    axes.annotate(text, point, color=color, weight="bold", fontsize=size, xytext=offset,
                  textcoords="offset points")


def cross(axes, rows, who, column):
    """One of the comparison in a plane, with its standard deviation over seeds. Returns where."""
    x, y = of(rows, who, column), of(rows, who, "quality")
    at = statistics.mean(x), statistics.mean(y)
    spread = dict(xerr=spread_of(x), yerr=spread_of(y))
    axes.errorbar(*at, **spread, fmt="o", color=COLORS[who[0]], ms=6, lw=0.8)
    return at


def line(axes, rows, whos, column):
    points = [(mean_of(rows, who, column), mean_of(rows, who, "quality")) for who in whos]
    axes.plot(*zip(*points), "-", color=COLORS["dqo"], lw=1, alpha=0.5)


def label_ends(axes, ends, x, gap, ha="left"):
    """Names beside the ends of curves, pushed apart where they would overlap.

    ends: [(y, name, color)]"""
    ends = sorted(ends)
    at = [y for y, _, _ in ends]
    for _ in range(200):
        for i in range(len(at) - 1):
            lack = max(0.0, gap - (at[i + 1] - at[i]))
            at[i], at[i + 1] = at[i] - lack / 2, at[i + 1] + lack / 2
    for y, (_, name, color) in zip(at, ends):
        axes.text(x, y, f" {name} ", color=color, va="center", ha=ha, weight="bold", fontsize=8)


def curve(axes, rows, who, numbers_of):
    """pass@n with its standard deviation over seeds, of the base over samplings. Returns its end.

    numbers_of(rows, who, column): one number per seed"""
    sizes = (1, 2, 4, 8, 16)
    columns = [numbers_of(rows, who, f"pass_at_{n}") for n in sizes]
    ys, spread = ([f(x) for x in columns] for f in (statistics.mean, spread_of))
    plot_pass(axes, sizes, ys, spread, COLORS[who[0]])
    return ys[-1]


def plot_pass(axes, sizes, ys, spread, color):
    """One curve of pass@n, n in `sizes`, on a logarithmic axis."""
    axes.errorbar(sizes, ys, yerr=spread, fmt="o-", color=color, ms=3, lw=1.2, capsize=2)
    axes.set(xlabel="n", ylabel="pass@n", xscale="log")
    axes.set_xticks(sizes, sizes)
    axes.minorticks_off()


def spread_of(numbers):
    return statistics.stdev(numbers) if len(numbers) > 1 else 0


def draw_headline():
    """headline.png: before, after GRPO, and after DQO: quality and diversity, and pass@n."""
    rows, column = read("comparison.csv"), "distinct_correct"
    figure, (plane, attempts) = panels(2, (9, 3.8))
    line(plane, rows, DQO, column)
    of_dqo = dict(zip(DQO, [(8, 6), (-58, -20), (8, -16)]))
    offsets = {BASE: (9, 6), GRPO: (-14, 12), **of_dqo}
    names = {"base": "base model", "grpo": "GRPO", "dqo": "DQO"}
    for who, offset in offsets.items():
        objective, alpha = who
        name = names[objective] + (f", α = {alpha}" if alpha else "")
        at = cross(plane, rows, who, column)
        name_at(plane, at, name, COLORS[objective], offset, size=9)
    plane.set(xlabel="distinct correct responses of 16", ylabel="quality", title="all four tasks")
    plane.set(xlim=(3.5, 9), ylim=(0.3, 0.65))
    ends = []
    for who in (BASE, GRPO, *DQO[1:]):
        end = curve(attempts, rows, who, of_hard)
        ends.append((end, names[who[0]] + (f", α = {who[1]}" if who[1] else ""), COLORS[who[0]]))
    label_ends(attempts, ends, 17, 0.04)
    attempts.set(xlim=(0.9, 60), title="what training hardly shows")
    save(figure, "headline.png", dpi=200)


def draw_plane():
    """plane.png: all objectives."""
    rows = read("comparison.csv")
    figure, both = panels(2, (12, 6))
    columns = {"distinct_correct": "distinct correct responses of 16",
               "effective_diversity": "effective semantic diversity"}
    # of labels that would otherwise overlap others
    offsets = {"entropy 0.1": (5, 4), "dqo 0.5": (6, -13), "dqo 1": (3, 10), "dqo 2": (8, 4),
               "repexp 1": (-54, 6), "dra 1": (5, -12), "darling 0.9": (-66, -4),
               "setpo 5": (-46, -4), "grpo, std": (-58, -4), "likelihood 0.25": (-88, 5)}
    for axes, (column, name) in zip(both, columns.items()):
        line(axes, rows, [GRPO, *DQO], column)
        for who in everybody():
            text = " ".join(who).strip().replace("grpo_std", "grpo, std")
            at = cross(axes, rows, who, column)
            name_at(axes, at, text, COLORS[who[0]], offsets.get(text, (6, 5)))
        low, high = axes.get_xlim()
        axes.set(xlabel=name, ylabel="quality", xlim=(low, high + 0.2 * (high - low)))
    quality, distinct, effective = (mean_of(rows, BASE, c) for c in ("quality", *columns))
    figure.suptitle(
        "mean over four tasks, ± standard deviation over 3 seeds; line: dqo over α (base model: "
        f"quality {quality:.2f}, {distinct:.1f} distinct correct, "
        f"effective diversity {effective:.2f})", fontsize=9)
    save(figure, "plane.png")


def draw_pass():
    """pass.png: pass@n of the base, grpo, dqo, and some that are not far from it."""
    rows = read("comparison.csv")
    shown = [BASE, GRPO, *DQO[1:], *(who for who in everybody() if who[0] in IN_PASS)]
    figure, all_axes = panels(3, (13, 4.4))
    for axes, task in zip(all_axes, ("instruct", "reason", "average")):
        ends = []
        for who in shown:
            end = curve(axes, rows, who, partial(of, task=task))
            name = " ".join(who).strip()
            ends.append((end, name, COLORS[who[0]]))
        label_ends(axes, ends, 17, 0.045 * height(axes))
        title = "mean over the four tasks" if task == "average" else task
        axes.set(title=title, xlim=(0.9, 60))
    save(figure, "pass.png")


def height(axes):
    low, high = axes.get_ylim()
    return high - low


def draw_training():
    """training.png: grpo and dqo step by step, each seed."""
    rows = read("training.csv")
    figure, three = panels(3, (12, 3.8))
    titles = dict(quality="quality", distinct="share of different texts in a group",
                  entropy="entropy (nats per token)")
    last = rows[-1]["step"]
    for axes, (column, title) in zip(three, titles.items()):
        ends = []
        for objective in ("grpo", "dqo"):
            color = COLORS[objective]
            for seed in map(str, SEEDS):
                run = dict(objective=objective, seed=seed)
                x, y = pick(rows, "step", **run), pick(rows, column, **run)
                axes.plot(x, y, color=color, lw=0.9, alpha=0.8)
            end = statistics.mean(pick(rows, column, objective=objective, step=last))
            ends.append((end, objective, color))
        label_ends(axes, ends, float(last), 0.06 * height(axes))
        axes.set(title=title, xlabel="step", xlim=(0, float(last) * 1.12))
    save(figure, "training.png")


def draw_hacking():
    """hacking.png: reward hacking, and what helps."""
    rows = read("hacking.csv")
    styles = {  # second half of a run's name: how it is called, color
        "grpo": ("grpo", COLORS["grpo"]),
        "dqo": ("dqo", COLORS["dqo"]),
        "kernel": ("quality kernel", "#2ca02c"),
        "beta": ("β = 0.1", "#9467bd"),
        "strict": ("strict reward", "#ff7f0e"),
    }
    contents = [
        ("lax", "entirely_right", "lax reward: entirely right"),
        ("lax", "tokens", "lax reward: tokens per response"),
        ("large", "entirely_right", "α = 5: quality"),
        ("large", "distinct", "α = 5: share of different texts"),
    ]
    figure, four = panels(4, (14, 3.8))
    for axes, (setting, column, title) in zip(four, contents):
        ends = []
        for run in HACKS:
            if not run.startswith(setting):
                continue
            name, color = styles[run.partition("-")[2]]
            x, y = pick(rows, "step", run=run), pick(rows, column, run=run)
            axes.plot(x, y, color=color, lw=1.2)
            ends.append((y[-1], name, color))
        axes.margins(y=0.12)  # room for the labels
        label_ends(axes, ends, x[-1], 0.07 * height(axes))
        axes.set(title=title, xlabel="step", xlim=(0, x[-1] * 1.5))
        axes.set_xticks([0, 100, 200, 300])
    save(figure, "hacking.png")


def pictures():
    draw_headline()
    draw_plane()
    draw_pass()
    draw_training()
    draw_hacking()


def main(argv):
    if argv == ["--tried"]:
        for objective, strengths in STRENGTHS.items():
            for alpha in strengths:
                print(objective, alpha)
        return
    if argv == ["--chosen"]:
        for objective, alpha in chosen().items():
            print(objective, alpha)
        return
    if argv != ["--show"]:
        gather()
    pictures()
    show()


if __name__ == "__main__":
    main(sys.argv[1:])
