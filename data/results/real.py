"""The numbers of the runs of real.sh, which train SmolLM2-135M-Instruct, a real chat model.

    python data/results/real.py base TASK      # the model before any training
    python data/results/real.py RUN            # runs/real/RUN, named TASK-OBJECTIVE-ALPHA-sSEED
    python data/results/real.py --prompts      # those of `sentences` and `times`, in runs/real
    python data/results/real.py --show         # tables and pictures from the CSVs that are there

Each run adds its lines to the CSVs beside this file, which grow as the runs come in:

    real.csv            quality and diversity on test prompts and on training prompts
    real_training.csv   quality, different texts, KL and the spread of each term, every 5 steps
    real_samples.csv    what it answers to the first three test prompts

The metrics are eval.py's; fluency is the negative log-likelihood under the model before training,
and the second encoder is the mean of that model's word vectors.
"""

import csv
import itertools
import json
import random
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from data.models import load_encoder, load_model
from data.prompts import load_rows
from data.scoring import load_reward
from eval import Judges, Sampling, evaluate
from measure import as_different, with_second
from tables import COLORS, label_ends, markdown, mean_std, panels, read, save

RUNS = Path("runs/real")
TASKS = {  # data, reward, responses per prompt, longest response
    "categories": ("categories", None, 16, 8),
    "sentences": (f"commongen:{RUNS / 'sentences.jsonl'}", None, 16, 24),
    "times": (str(RUNS / "times.jsonl"), "instruct", 32, 6),
}
WHO = "dog cat girl boy man woman child teacher farmer fisherman chef player dancer bird horse"
WHAT = "run jump sit sing eat play read climb throw carry watch wait sleep dance swim drive paint"
WHERE = "park beach street kitchen tree river bench table garden ball book fence car hat boat hill"
PASS_AT = (1, 2, 4, 8, 16, 32)
METRICS = ("distinct_correct", "effective_diversity", "utility", "self_bleu_diversity",
           "cosine_distance", "vendi", "log_det", "nll", "mean_tokens")
SHOWN = dict(  # column: (title, digits)
    quality=("quality", 2), pass_at_4=("pass@4", 2), pass_at_16=("pass@16", 2),
    pass_at_32=("pass@32", 2), distinct_correct=("distinct correct", 1),
    effective_diversity=("effective diversity", 2),
    second_effective_diversity=("the same, second encoder", 2), utility=("utility", 2),
    nll=("nll before training", 2))
ORDER = ("base", "grpo", "dqo", "dqo_quality", "likelihood", "darling", "setpo", "passk")
CURVE_OF = ("grpo", "dqo-1", "dqo_quality-3")  # the runs whose curves are drawn
KERNEL, OTHER = "#2ca02c", "#17becf"  # colours
CURVES = ("quality", "distinct", "length", "kl", "quality_std", "bonus_std", "penalty_std")


def add(name, header, rows):
    """Lines at the end of a CSV, written at once: two runs may end together."""
    path = HERE / name
    if not path.exists():
        path.write_text(",".join(header) + "\n", "utf-8")
    with open(path, "a", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)


def started_from():
    """Folder of the model before training, as transformers reads it."""
    folder = RUNS / "base"
    if not (folder / "model.safetensors").exists():
        model, tokenizer = load_model("smollm2")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def word_vectors():
    """The second encoder."""
    model, tokenizer = load_model(str(RUNS / "base"))
    vectors = model.get_input_embeddings().weight.detach().numpy()
    static = StaticEmbedding(tokenizer.backend_tokenizer, embedding_weights=vectors)
    return SentenceTransformer(modules=[static], device="cpu")


def measured(folder, task, split):
    """(results, responses) of eval.py, on test prompts or the first 20 of training."""
    data, reward, n, longest = TASKS[task]
    reward = load_reward(reward, data)
    judges = Judges(load_encoder(), reward, load_model(str(RUNS / "base"))[0])
    records = load_rows(data, split, 20 if split == "train" else 0)
    kept = []
    policy = load_model(str(folder))
    return evaluate(folder.name, policy, judges, records, Sampling(n, longest), kept), kept


def different(task, second):
    """The cosine from which the second encoder calls two responses the same, kept in a file."""
    path = RUNS / f"{task}-same.json"
    if not path.exists():
        n = TASKS[task][2]
        _, kept = measured(started_from(), task, "test")
        path.write_text(str(as_different(load_encoder(), second, kept, n)))
    return float(path.read_text())


def row_of(result):
    """The numbers of one result, as text."""
    row = [result["quality"]]
    row += [result["pass_at"].get(str(n), "") for n in PASS_AT]
    row += [result[metric] for metric in METRICS]
    row.append(result["second"]["effective_diversity"])
    return [x if x == "" else f"{x:.4f}" for x in row]


def of_training(folder):
    """(seconds of all steps, GB at most, lines of real_training.csv without the run)."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    curve = []
    for i in range(0, len(steps), 5):
        part = steps[i:i + 5]
        means = [statistics.mean(step[key] for step in part) for key in CURVES]
        curve.append([part[-1]["step"], *[f"{mean:.4f}" for mean in means]])
    memory = (RUNS / f"{folder.name}.memory").read_text()
    return sum(step["step_s"] for step in steps), int(memory) / 2 ** 20, curve


def word_sets():
    """Rows like CommonGen's: three words that make one sentence. 400 for training, 24 for tests."""
    rng = random.Random(0)
    lists = [text.split() for text in (WHO, WHAT, WHERE)]
    sets = [list(words) for words in itertools.product(*lists)]
    rows = []
    for i, words in enumerate(rng.sample(sets, 424)):
        row = dict(concepts=words, target="", split="test" if i < 24 else "train")
        rows.append(json.dumps(row) + "\n")
    (RUNS / "sentences.jsonl").write_text("".join(rows), "utf-8")


def times_tables():
    """Products of 3 to 12, the answer begun: "7 * 8 =". Every fourth pair is kept for tests."""
    rows = []
    for i, (a, b) in enumerate(itertools.combinations_with_replacement(range(3, 13), 2)):
        for x, y in {(a, b), (b, a)}:
            asked = [dict(role="user", content=f"What is {x} * {y}?"),
                     dict(role="assistant", content=f"{x} * {y} =")]
            row = dict(prompt=asked, answer=[str(a * b)], split="train" if i % 4 else "test")
            rows.append(json.dumps(row) + "\n")
    (RUNS / "times.jsonl").write_text("".join(rows), "utf-8")


def by_name(rows, task, split="test"):
    """{"dqo-1": its rows of real.csv or real_training.csv, of all seeds}."""
    found = {}
    for row in rows:
        if row["run"].startswith(f"{task}-") and row.get("split", split) == split:
            found.setdefault(row["run"].removeprefix(f"{task}-").partition("-s")[0], []).append(row)

    def place(name):
        objective, _, alpha = name.partition("-")
        return ORDER.index(objective), float(alpha or 0)

    return {name: found[name] for name in sorted(found, key=place)}


def title(name):
    return name.replace("-", ", α = ").replace("_quality", ", quality kernel")


def show():
    """The tables: of each task, prompts that were trained on and others."""
    rows = read("real.csv")
    for task, split in dict.fromkeys((row["task"], row["split"]) for row in rows):
        table, names = [], dict(test="not trained on", train="trained on")
        runs = by_name(rows, task, split)
        columns = {c: about for c, about in SHOWN.items() if runs["base"][0][c]}
        for name, seeds in runs.items():
            cells = [mean_std([float(row[column]) for row in seeds], digits)
                     for column, (_, digits) in columns.items()]
            table.append([title(name), *cells, str(len(seeds))])
        head = [f"{task}, {names[split]}", *(title for title, _ in columns.values()), "seeds"]
        markdown(head, table)


def color_of(name):
    objective = name.partition("-")[0]
    return KERNEL if objective == "dqo_quality" else COLORS.get(objective, OTHER)


def draw(task="categories"):
    """real.png: where the runs end, and how grpo and dqo get there."""
    figure, (plane, *curves) = panels(3, (13, 4))
    for name, seeds in by_name(read("real.csv"), task, "train").items():
        at = [statistics.mean(float(row[c]) for row in seeds)
              for c in ("distinct_correct", "quality")]
        plane.plot(*at, "o", color=color_of(name), ms=6)
        # Points to the right and up, of labels that would otherwise overlap others.
        offset = {"dqo-1": (6, -11), "dqo_quality-2": (0, 9)}.get(name, (6, -3))
        plane.annotate(title(name), at, color=color_of(name), fontsize=7.5, xytext=offset,
                       textcoords="offset points")
    plane.set(xlabel="distinct correct responses of 16", ylabel="quality", xlim=(0, 9),
              ylim=(-0.03, 1.1), title="the categories that were trained on")
    runs = by_name(read("real_training.csv"), task)
    titles = dict(quality="quality", distinct="share of different texts in a group")
    for axes, (column, name_of_column) in zip(curves, titles.items()):
        ends = []
        for name in filter(runs.get, CURVE_OF):
            steps = sorted({int(row["step"]) for row in runs[name]})
            means = [statistics.mean(float(row[column]) for row in runs[name]
                                     if int(row["step"]) == step) for step in steps]
            axes.plot(steps, means, color=color_of(name), lw=1.4)
            ends.append((means[-1], title(name), color_of(name)))
        label_ends(axes, ends, steps[-1], 0.06)
        axes.set(xlabel="step", xlim=(0, 90), ylim=(0, 1.05), title=name_of_column)
    save(figure, "real.png")


def main(name, task=None):
    base = started_from()
    folder = base if name == "base" else RUNS / name
    task = task or name.partition("-")[0]
    label = f"{task}-base" if name == "base" else name
    n, second = TASKS[task][2], word_vectors()
    same = different(task, second)
    rows = []
    for split in ("test", "train"):
        results, kept = measured(folder, task, split)
        (result,) = with_second(results, kept, second, same, n)
        rows.append([label, task, split, result["prompts"], n, *row_of(result)])
        if split == "test":
            samples = [[label, x["prompt"], x["response"], x["quality"]]
                       for i in range(3) for x in kept[i * n:i * n + 8]]
    seconds = memory = ""
    if folder != base:
        seconds, memory, curve = of_training(folder)
        seconds, memory = f"{seconds:.0f}", f"{memory:.2f}"
        add("real_training.csv", ["run", "step", *CURVES], [[label, *line] for line in curve])
    add("real_samples.csv", ["run", "prompt", "response", "quality"], samples)
    header = ["run", "task", "split", "prompts", "n", "quality", *(f"pass_at_{n}" for n in PASS_AT),
              *METRICS, "second_effective_diversity", "seconds", "memory_gb"]
    add("real.csv", header, [[*row, seconds, memory] for row in rows])


if __name__ == "__main__":
    if sys.argv[1:] == ["--prompts"]:
        word_sets()
        times_tables()
    elif sys.argv[1:] == ["--show"]:
        show()
        draw()
    else:
        main(*sys.argv[1:])
