"""The numbers of the runs of real.sh, which train SmolLM2-135M-Instruct, a real chat model.

    python data/results/real.py base TASK      # the model before any training
    python data/results/real.py RUN            # runs/real/RUN, named TASK-OBJECTIVE-ALPHA-sSEED
    python data/results/real.py --prompts      # those that are not in data, in runs/real
    python data/results/real.py --show         # tables and pictures from the CSVs that are there

Each run adds its lines to the CSVs beside this file, which grow as the runs come in:

    real.csv            quality and diversity on test prompts and on training prompts
    real_training.csv   quality, different texts, KL and the spread of each term, every 5 steps
    real_samples.csv    what it answers to the first three test prompts
    real_pass.csv       pass@n with its standard error over the prompts, of three tasks

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
from tables import (
    COLORS,
    history,
    label_ends,
    markdown,
    mean_std,
    name_at,
    over_steps,
    panels,
    plot_pass,
    read,
    save,
)

RUNS = Path("runs/real")
TASKS = {  # data, reward, responses per prompt, longest response
    "categories": ("categories", None, 16, 8),
    "letters": (str(RUNS / "letters.jsonl"), "instruct", 32, 8),
    "times": (str(RUNS / "times.jsonl"), "instruct", 32, 6),
    "capitals": (str(RUNS / "capitals.jsonl"), "instruct", 32, 6),
    "sentences": (f"commongen:{RUNS / 'sentences.jsonl'}", None, 16, 24),
}
LETTERS = ("letters", "test")  # what the runs of `categories` are tested with besides
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
PASS_OF = dict(letters="trained on any fruit, asked for one with P",
               sentences="sentences of three words", capitals="capitals of other countries")
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


def word_vectors(model, tokenizer):
    """The second encoder."""
    vectors = model.get_input_embeddings().weight.detach().numpy()
    static = StaticEmbedding(tokenizer.backend_tokenizer, embedding_weights=vectors)
    return SentenceTransformer(modules=[static], device="cpu")


def measured(policy, judges, task, split):
    """(results, responses) of eval.py, on test prompts or the first 20 of training."""
    data, _, n, longest = TASKS[task]
    records = load_rows(data, split, 20 if split == "train" else 0)
    kept = []
    return evaluate(task, policy, judges, records, Sampling(n, longest), kept), kept


def row_of(result):
    """The numbers of one result, as text."""
    row = [result["quality"]]
    row += [result["pass_at"].get(str(n), "") for n in PASS_AT]
    row += [result[metric] for metric in METRICS]
    row.append(result["second"]["effective_diversity"])
    return [x if x == "" else f"{x:.4f}" for x in row]


def of_training(folder):
    """(seconds of all steps, GB at most, lines of real_training.csv without the run)."""
    steps = history(folder)
    curve = over_steps([(step["step"], *(step[key] for key in CURVES)) for step in steps], 5)
    memory = (RUNS / f"{folder.name}.memory").read_text()
    return sum(step["step_s"] for step in steps), int(memory) / 2 ** 20, curve


def write_prompts(task, rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    (RUNS / f"{task}.jsonl").write_text("".join(lines), "utf-8")


def begun(question, begin, answer, test):
    """A row whose answer is begun already."""
    asked = [dict(role="user", content=question), dict(role="assistant", content=begin)]
    return dict(prompt=asked, answer=[answer], split="test" if test else "train")


def times_tables():
    """Products of 3 to 12: "7 * 8 =". Every fourth pair is kept for tests."""
    for i, (a, b) in enumerate(itertools.combinations_with_replacement(range(3, 13), 2)):
        for x, y in {(a, b), (b, a)}:
            yield begun(f"What is {x} * {y}?", f"{x} * {y} =", str(a * b), i % 4 == 0)


def letters():
    """The categories that are trained on, asked for less: "Name one fruit that begins with the
    letter P. Answer with one word." One prompt for every letter that a right answer begins with."""
    for record in load_rows("categories", "train"):
        for letter, words in itertools.groupby(sorted(record["answer"]), lambda word: word[0]):
            narrower = f" that begins with the letter {letter.upper()}. Answer"
            asked = record["prompt"].replace(". Answer", narrower)
            yield dict(prompt=asked, answer=list(words), split="test")


WHO = "dog cat girl boy man woman child teacher farmer fisherman chef player dancer bird horse"
WHAT = "run jump sit sing eat play read climb throw carry watch wait sleep dance swim drive paint"
WHERE = "park beach street kitchen tree river bench table garden ball book fence car hat boat hill"


def sentences():
    """Rows like CommonGen's, of three words that make one sentence: 24 are tests, 400 are not."""
    sets = list(itertools.product(WHO.split(), WHAT.split(), WHERE.split()))
    for i, words in enumerate(random.Random(0).sample(sets, 424)):
        yield dict(concepts=list(words), target="", split="test" if i < 24 else "train")


CAPITALS = """\
afghanistan: kabul, albania: tirana, algeria: algiers, angola: luanda, argentina: buenos aires,
armenia: yerevan, australia: canberra, austria: vienna, azerbaijan: baku, bangladesh: dhaka,
belarus: minsk, belgium: brussels, bolivia: sucre, botswana: gaborone, brazil: brasilia, bulgaria:
sofia, cambodia: phnom penh, cameroon: yaounde, canada: ottawa, chile: santiago, china: beijing,
colombia: bogota, croatia: zagreb, cuba: havana, cyprus: nicosia, denmark: copenhagen, ecuador:
quito, egypt: cairo, estonia: tallinn, ethiopia: addis ababa, finland: helsinki, france: paris,
georgia: tbilisi, germany: berlin, ghana: accra, greece: athens, hungary: budapest, iceland:
reykjavik, india: new delhi, indonesia: jakarta, iran: tehran, iraq: baghdad, ireland: dublin,
israel: jerusalem, italy: rome, jamaica: kingston, japan: tokyo, jordan: amman, kenya: nairobi,
laos: vientiane, latvia: riga, lebanon: beirut, libya: tripoli, lithuania: vilnius, madagascar:
antananarivo, malaysia: kuala lumpur, mali: bamako, malta: valletta, mexico: mexico city,
mongolia: ulaanbaatar, morocco: rabat, mozambique: maputo, namibia: windhoek, nepal: kathmandu,
new zealand: wellington, nigeria: abuja, norway: oslo, oman: muscat, pakistan: islamabad,
paraguay: asuncion, peru: lima, poland: warsaw, portugal: lisbon, qatar: doha, romania: bucharest,
russia: moscow, rwanda: kigali, saudi arabia: riyadh, senegal: dakar, serbia: belgrade, slovakia:
bratislava, slovenia: ljubljana, somalia: mogadishu, south korea: seoul, spain: madrid, sudan:
khartoum, sweden: stockholm, syria: damascus, thailand: bangkok, tunisia: tunis, turkey: ankara,
uganda: kampala, ukraine: kyiv, uruguay: montevideo, venezuela: caracas, vietnam: hanoi, yemen:
sanaa, zambia: lusaka, zimbabwe: harare
"""


def capitals():
    """"The capital of Peru is": every third country is kept for tests."""
    for i, pair in enumerate(CAPITALS.replace("\n", " ").strip().split(", ")):
        country, capital = pair.split(": ")
        country = country.title()
        begin = f"The capital of {country} is"
        yield begun(f"What is the capital of {country}?", begin, capital, i % 3 == 0)


def by_name(rows, task, split="test"):
    """{"dqo-1": its rows of a CSV, of all seeds}."""
    found = {}
    for row in rows:
        trained_on, _, name = row["run"].partition("-")
        if row.get("task", trained_on) == task and row.get("split", split) == split:
            found.setdefault(name.partition("-s")[0], []).append(row)

    def place(name):
        objective, _, alpha = name.partition("-")
        return ORDER.index(objective), float(alpha or 0)

    return {name: found[name] for name in sorted(found, key=place)}


def title(name):
    return name.replace("-", ", α = ").replace("_quality", ", quality kernel")


def show():
    """The tables: of each task, prompts that were trained on and others."""
    rows, about = read("real.csv"), dict(train="trained on", test="not trained on")
    for task, split in itertools.product(TASKS, about):
        runs, table = by_name(rows, task, split), []
        if not runs:  # `letters` is for tests only
            continue
        columns = {c: shown for c, shown in SHOWN.items() if runs["base"][0][c]}
        for name, seeds in runs.items():
            cells = [mean_std([float(row[column]) for row in seeds], digits)
                     for column, (_, digits) in columns.items()]
            table.append([title(name), *cells, str(len(seeds))])
        head = [f"{task}, {about[split]}", *(title for title, _ in columns.values()), "seeds"]
        markdown(head, table)


def color_of(name):
    objective = name.partition("-")[0]
    return KERNEL if objective == "dqo_quality" else COLORS.get(objective, OTHER)


def draw(task="categories"):
    """real.png: where the runs end, and how grpo and dqo get there."""
    figure, (plane, *curves) = panels(3, (13, 4))
    # of labels that would otherwise overlap others
    offsets = {"dqo-1": (6, -11), "dqo_quality-2": (-118, -10), "likelihood-0.5": (-6, 8),
               "setpo-5": (-52, -24), "darling-0.8": (6, 4), "dqo_quality-5": (6, -24),
               "dqo_quality-3": (15, -3), "dqo-0.5": (-36, -28)}
    for name, seeds in by_name(read("real.csv"), task, "train").items():
        at = [statistics.mean(float(row[c]) for row in seeds)
              for c in ("distinct_correct", "quality")]
        plane.plot(*at, "o", color=color_of(name), ms=6)
        name_at(plane, at, title(name), color_of(name), offsets.get(name, (6, -3)),
                size=7.5)
    plane.set(xlabel="distinct correct responses of 16", ylabel="quality", xlim=(0, 9.6),
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


def draw_pass():
    """real_pass.png: pass@n, the mean over seeds, with the standard error over the prompts."""
    figure, three = panels(3, (13, 4))
    for axes, (task, about) in zip(three, PASS_OF.items()):
        ends, runs = [], by_name(read("real_pass.csv"), task)
        for name in filter(runs.get, ("base", *CURVE_OF)):
            ys, spread = {}, {}
            for n in sorted({int(row["n"]) for row in runs[name]}):
                rows = [row for row in runs[name] if row["n"] == str(n)]
                ys[n] = statistics.mean(float(row["pass_at"]) for row in rows)
                spread[n] = statistics.mean(float(row["se"]) for row in rows)
            plot_pass(axes, list(ys), list(ys.values()), list(spread.values()), color_of(name))
            ends.append((ys[max(ys)], title(name), color_of(name)))
        label_ends(axes, ends, 1.06 * max(ys), 0.05)
        axes.set(title=about, xlim=(0.9, 400), ylim=(0, 1.05))
    save(figure, "real_pass.png")


def main(name, task=None):
    is_base, task = name == "base", task or name.partition("-")[0]
    label = f"{task}-base" if is_base else name
    base, folder = load_model(str(started_from())), RUNS / name
    policy = base if is_base else load_model(str(folder))
    second, rows, passed, samples = word_vectors(*base), [], [], []
    encoder = load_encoder()
    parts = [(task, "test"), (task, "train"), *([LETTERS] if task == "categories" else [])]
    for part, split in parts:
        data, reward, n, _ = TASKS[part]
        judges = Judges(encoder, load_reward(reward, data), base[0])
        results, kept = measured(policy, judges, part, split)
        # The cosine from which the second encoder calls two responses the same: the base says.
        as_same = RUNS / f"{part}-same.json"
        if is_base and split == "test":
            as_same.write_text(str(as_different(encoder, second, kept, n)))
        (result,) = with_second(results, kept, second, float(as_same.read_text()), n)
        rows.append([label, part, split, result["prompts"], n, *row_of(result)])
        if part in PASS_OF:
            columns = zip(result["pass_at"].items(), result["se"]["pass_at"].values())
            passed += [[label, part, split, m, f"{x:.4f}", f"{se:.4f}"] for (m, x), se in columns]
        if split == "test":
            samples += [[label, x["prompt"], x["response"], x["quality"]]
                        for i in range(3) for x in kept[i * n:i * n + 8]]
    seconds = memory = ""
    if not is_base:
        seconds, memory, curve = of_training(folder)
        seconds, memory = f"{seconds:.0f}", f"{memory:.2f}"
        add("real_training.csv", ["run", "step", *CURVES], [[label, *line] for line in curve])
    add("real_pass.csv", ["run", "task", "split", "n", "pass_at", "se"], passed)
    add("real_samples.csv", ["run", "prompt", "response", "quality"], samples)
    header = ["run", "task", "split", "prompts", "n", "quality", *(f"pass_at_{n}" for n in PASS_AT),
              *METRICS, "second_effective_diversity", "seconds", "memory_gb"]
    add("real.csv", header, [[*row, seconds, memory] for row in rows])


if __name__ == "__main__":
    if sys.argv[1:] == ["--prompts"]:
        write_prompts("times", times_tables())
        write_prompts("capitals", capitals())
        write_prompts("letters", letters())
        write_prompts("sentences", sentences())
    elif sys.argv[1:] == ["--show"]:
        show()
        draw()
        draw_pass()
    else:
        main(*sys.argv[1:])
