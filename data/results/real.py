"""The runs of real.sh: SmolLM2-135M-Instruct, a real chat model, on one-word answers and sentences.

    python data/results/real.py --prompts              # those that are not in data, to runs/real
    python data/results/real.py TASK-base              # measures the model before any training
    python data/results/real.py TASK-OBJECTIVE-ALPHA-sSEED    # trains a run and measures it
    python data/results/real.py --chosen TASK          # the strengths that seed 0 chooses
    python data/results/real.py --novelty FILE RUN ... # open prompts, as NoveltyBench's
    python data/results/real.py --show                 # tables and pictures from the CSVs

The CSVs beside this file grow as the runs come in: real.csv; real_training.csv, every 5 steps;
real_samples.csv, answers to the first three test prompts; real_pass.csv, pass@n with its standard
error over the prompts; real_novelty.csv. The second encoder is the mean of the word vectors of the
model before training.
"""

import csv
import itertools
import random
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

import dqo
import eval
from cities import name_points
from data.metrics import classes, words
from data.tasks import load_reward, load_rows
from measure import add_second, as_different
from tables import (
    COLORS, choose, curve, flat, history, numbers, over_steps, panels, read, table, where)

BASE, RUNS = "data/smollm2", Path("runs/real")
FLAGS = ("--model data/smollm2 --k 8 --prompts 8 --steps 48 --lr 1e-5 --beta 0.02 --micro-batch 64 "
         "--save-every 12").split()
TASKS = {  # data, responses per prompt, longest response
    "categories": ("categories", 16, 8),
    "letters": (f"instruct:{RUNS}/letters.jsonl", 32, 8),  # to test the runs of `categories`
    "sentences": (f"commongen:{RUNS}/sentences.jsonl", 16, 24),
}
PASS_AT = ("1", "2", "4", "8", "16", "32")
COLUMNS = ("quality", *(f"pass_at_{n}" for n in PASS_AT), "distinct_correct", "effective_diversity",
           "utility", "self_bleu_diversity", "cosine_distance", "vendi", "log_det",
           "mean_tokens", "second_effective_diversity")
CURVES = ("step", "quality", "distinct", "length", "kl", "quality_std", "bonus_std", "penalty_std")
SHOWN = {  # title: (column, digits)
    "quality": ("quality", 2), "pass@4": ("pass_at_4", 2), "pass@16": ("pass_at_16", 2),
    "pass@32": ("pass_at_32", 2), "distinct correct": ("distinct_correct", 1),
    "effective diversity": ("effective_diversity", 2),
    "the same, second encoder": ("second_effective_diversity", 2), "utility": ("utility", 2),
}
CURVE_OF = ("grpo", "dqo-1", "dqo_quality-3")  # the runs whose curves are drawn


# ---- prompts
def letters():
    """The categories that are trained on, asked for less: "Name one fruit that begins with the
    letter P." One prompt for every letter that a right answer begins with."""
    for row in load_rows("categories", "train"):
        for letter, names in itertools.groupby(sorted(row["answer"]), lambda name: name[0]):
            narrower = f" that begins with the letter {letter.upper()}. Answer"
            asked = row["prompt"].replace(". Answer", narrower)
            yield dict(prompt=asked, answer=list(names), split="test")


WHO = "dog cat girl boy man woman child teacher farmer fisherman chef player dancer bird horse"
WHAT = "run jump sit sing eat play read climb throw carry watch wait sleep dance swim drive paint"
WHERE = "park beach street kitchen tree river bench table garden ball book fence car hat boat hill"


def sentences():
    """Rows like CommonGen's, of three words: 24 are tests, 400 are not."""
    sets = list(itertools.product(WHO.split(), WHAT.split(), WHERE.split()))
    for i, concepts in enumerate(random.Random(0).sample(sets, 424)):
        yield dict(concepts=list(concepts), split="test" if i < 24 else "train")


def write_prompts():
    RUNS.mkdir(parents=True, exist_ok=True)
    for task in (letters, sentences):
        eval.append(RUNS / "new.jsonl", task())
        (RUNS / "new.jsonl").replace(RUNS / f"{task.__name__}.jsonl")


# ---- a run
def trained(name):
    """The folder of a run, trained if it is not."""
    folder = RUNS / name
    if not (folder / "model.safetensors").exists():
        task, objective, *alpha, seed = name.split("-")
        data, _, longest = TASKS[task]
        flags = ["--resume", folder]
        if not any(folder.glob("step-*")):
            shutil.rmtree(folder, ignore_errors=True)
            flags = [*FLAGS, "--data", data, "--max-new-tokens", str(longest), "--out", folder,
                     "--objective", objective, "--seed", seed[1:]]
            flags += ["--alpha", *alpha] if alpha else []
        subprocess.run([sys.executable, HERE.parent.parent / "train.py", *flags], check=True)
    return folder


def word_vectors(model, tokenizer):
    """The second encoder."""
    vectors = model.get_input_embeddings().weight.detach().numpy()
    static = StaticEmbedding(tokenizer.backend_tokenizer, embedding_weights=vectors)
    return SentenceTransformer(modules=[static], device="cpu")


def add(name, rows):
    """Lines at the end of a CSV, written at once: two runs may end together."""
    path = HERE / name
    if not path.exists():
        path.write_text(",".join(rows[0]) + "\n", "utf-8")
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [f"{x:.4f}" if isinstance(x, float) else x for x in row.values()] for row in rows)


def run(name):
    """Trains and measures a run, or measures the model before any training."""
    task, is_base = name.partition("-")[0], name.endswith("-base")
    folder = BASE if is_base else trained(name)
    base, encoder = dqo.load_model(BASE), dqo.load_encoder()
    policy, second = base if is_base else dqo.load_model(str(folder)), word_vectors(*base)
    seconds, rows, passed, samples = "", [], [], []
    more = [("letters", "test")] if task == "categories" else []
    for part, split in [(task, "test"), (task, "train"), *more]:
        data, n, longest = TASKS[part]
        prompts, groups = load_rows(data, split, 20 if split == "train" else 0), []
        options = eval.Options(n=n, temperature=1.0, max_new_tokens=longest)
        results = eval.evaluate(name, policy, encoder, load_reward(None, prompts), prompts, options,
                                groups.append)
        # The cosine from which the second encoder calls two responses the same: the base says.
        same = RUNS / f"{part}-same.json"
        if is_base and split == "test":
            same.write_text(str(as_different(encoder, second, groups)))
        add_second(results, groups, second, float(same.read_text()))
        means, errors = flat(results[0]), flat(results[0]["se"])
        labels = dict(run=name, task=part, split=split)
        rows.append(dict(labels, prompts=len(prompts), n=n))
        rows[-1].update({c: means.get(c, "") for c in COLUMNS})
        passed += [dict(labels, n=m, pass_at=means[f"pass_at_{m}"], se=errors[f"pass_at_{m}"])
                   for m in results[0]["pass_at"]]
        if split == "test":
            samples += [dict(run=name, **{c: x[c] for c in ("prompt", "response", "quality")})
                        for group in groups[:3] for x in group[:8]]
    if not is_base:
        steps = history(folder)
        seconds = round(sum(step["step_s"] for step in steps))
        add("real_training.csv", [dict(run=name, **means) for means in over_steps(
            [{c: step[c] for c in CURVES} for step in steps], 5)])
    add("real_pass.csv", passed)
    add("real_samples.csv", samples)
    add("real.csv", [dict(row, seconds=seconds) for row in rows])  # last: real.sh looks for it
    for checkpoint in Path(folder).glob("step-*"):
        shutil.rmtree(checkpoint)


def chosen(task):
    """["OBJECTIVE-ALPHA"]: of each objective the strength that seed 0 chooses."""
    found = {}
    for row in where(read("real.csv"), task=task, split="train"):
        if row["run"].endswith("-s0"):
            objective, alpha, *_ = f"{row['run']}-".split("-", 1)[1].replace("-s0", "").split("-")
            found.setdefault(objective, {})[alpha] = [
                float(row[c]) for c in ("quality", "distinct_correct")]
    of_grpo = found.pop("grpo")[""][0]
    return [f"{objective}-{choose(tried, of_grpo)}" for objective, tried in found.items()]


# ---- open prompts
def rouge_1(one, other):
    a, b = Counter(words(one)), Counter(words(other))
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def novelty(path, names):
    """Ten answers to each prompt of a file. Classes are by cosine, from 0.9, and by ROUGE-1, above
    .458, as NoveltyBench's code offers. Its leaderboard has a trained classifier."""
    prompts, encoder = load_rows(path, "test"), dqo.load_encoder()
    for name in names:
        policy, groups, found = dqo.load_model(BASE if name == "base" else str(RUNS / name)), [], []
        options = eval.Options(n=10, temperature=1.0, max_new_tokens=100)
        (result,) = eval.evaluate(name, policy, encoder, None, prompts, options,
                                  keep=groups.append)
        for group in groups:
            texts = [x["response"] for x in group]
            alike = eval.torch.tensor([[rouge_1(one, other) for other in texts] for one in texts])
            found.append(dict(classes_by_rouge=len(classes(alike, same=0.458))))
        means, errors = eval.over(found, eval.torch.mean), eval.over(found, eval.standard_error)
        add("real_novelty.csv", [dict(
            run=name, prompts=len(prompts), **means, **{f"{c}_se": x for c, x in errors.items()},
            classes=result["classes"], classes_se=result["se"]["classes"],
            **{c: result[c] for c in ("distinct_4", "vendi", "mean_tokens", "truncated")})])


# ---- tables and pictures
def by_name(rows, task, split="test"):
    """{"dqo-1": its rows of a CSV, of all seeds}, the base first."""
    found = {}
    for row in rows:
        trained_on, _, name = row["run"].partition("-")
        if row.get("task", trained_on) == task and row.get("split", split) == split:
            found.setdefault(name.partition("-s")[0], []).append(row)
    order = ("base", "grpo", "dqo", "dqo_quality")
    return dict(sorted(found.items(), key=lambda x: [x[0].split("-")[0] != o for o in order]))


def title(name):
    return name.replace("-", ", α = ")


def color_of(name):
    return COLORS[name.split("-")[0]]


def show():
    """Of each task, prompts that were trained on and others."""
    about = dict(train="trained on", test="not trained on")
    for task, split in itertools.product(TASKS, about):
        if runs := by_name(read("real.csv"), task, split):  # `letters` is for tests only
            table(f"{task}, {about[split]}", {title(name): rows for name, rows in runs.items()},
                  {label: shown for label, shown in SHOWN.items() if runs["base"][0][shown[0]]})


def draw(task="categories"):
    """real.png: where the runs end, and how grpo and dqo get there. real_pass.png: pass@n, the
    mean over seeds, with the standard error over the prompts."""
    figure, (plane, *steps) = panels(3, (13, 4))
    points = []
    for name, rows in by_name(read("real.csv"), task, "train").items():
        if name != "base":
            at = [statistics.mean(numbers(rows, c)) for c in ("distinct_correct", "quality")]
            plane.plot(*at, "o", color=color_of(name), ms=6)
            points.append((*at, 3, title(name), color_of(name)))
    plane.set(xlabel="different right answers of 16", ylabel="quality",
              title="categories that were trained on")
    plane.margins(0.15)
    runs = by_name(read("real_training.csv"), task)
    titles = dict(quality="quality", distinct="share of different texts in a group")
    for axes, (column, what) in zip(steps, titles.items()):
        for name in filter(runs.get, CURVE_OF):
            at = {int(row["step"]): [] for row in runs[name]}
            for row in runs[name]:
                at[int(row["step"])].append(float(row[column]))
            axes.plot(list(at), [statistics.mean(x) for x in at.values()], color=color_of(name),
                      label=title(name))
        axes.set(xlabel="step", ylim=(0, 1.05), title=what)
    steps[0].legend()
    name_points(plane, points, gaps=(2, 12, 24, 40))
    figure.savefig(HERE / "real.png", dpi=150)

    figure, two = panels(2, (9, 4))
    about = dict(letters="trained on any fruit, asked for one with P",
                 categories="categories that were not trained on")
    for axes, (task, what) in zip(two, about.items()):
        runs = by_name(read("real_pass.csv"), task)
        for name in filter(runs.get, ("base", *CURVE_OF)):
            curve(axes, title(name), color_of(name), {
                int(n): [statistics.mean(numbers(rows, c)) for c in ("pass_at", "se")]
                for n in PASS_AT if (rows := where(runs[name], n=n))})
        axes.set(title=what, ylim=(0, 1.05))
    two[0].legend()
    figure.savefig(HERE / "real_pass.png", dpi=150)


def main(first, *rest):
    if first == "--prompts":
        write_prompts()
    elif first == "--chosen":
        print(*chosen(*rest), sep="\n")
    elif first == "--novelty":
        novelty(rest[0], rest[1:])
    elif first == "--show":
        show()
        draw()
    else:
        run(first)


if __name__ == "__main__":
    main(*sys.argv[1:])
