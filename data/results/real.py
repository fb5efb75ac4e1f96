"""The numbers of the runs of real.sh, which train SmolLM2-135M-Instruct, a real chat model.

    python data/results/real.py base TASK      # the model before any training
    python data/results/real.py RUN            # runs/real/RUN, named TASK-OBJECTIVE-ALPHA-sSEED
    python data/results/real.py --prompts      # those of `times` and `capitals`, in runs/real
    python data/results/real.py --show         # tables and pictures from the CSVs that are there

Each run adds its lines to the CSVs beside this file, which grow as the runs come in:

    real.csv            quality and diversity on test prompts and on training prompts
    real_training.csv   quality, different texts, KL and the spread of each term, every 5 steps
    real_samples.csv    what it answers to the first three test prompts
    real_pass.csv       pass@n with its standard error over the prompts, of `capitals`

The metrics are eval.py's; fluency is the negative log-likelihood under the model before training,
and the second encoder is the mean of that model's word vectors.
"""

import csv
import itertools
import json
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
    "times": (str(RUNS / "times.jsonl"), "instruct", 32, 6),
    "capitals": (str(RUNS / "capitals.jsonl"), "instruct", 32, 6),
}
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
    """rows: (question, how the answer begins, what ends it, whether it is a test)"""
    lines = []
    for question, begin, answer, test in rows:
        asked = [dict(role="user", content=question), dict(role="assistant", content=begin)]
        row = dict(prompt=asked, answer=[answer], split="test" if test else "train")
        lines.append(json.dumps(row) + "\n")
    (RUNS / f"{task}.jsonl").write_text("".join(lines), "utf-8")


def times_tables():
    """Products of 3 to 12: "7 * 8 =". Every fourth pair is kept for tests."""
    for i, (a, b) in enumerate(itertools.combinations_with_replacement(range(3, 13), 2)):
        for x, y in {(a, b), (b, a)}:
            yield f"What is {x} * {y}?", f"{x} * {y} =", str(a * b), i % 4 == 0


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
        yield f"What is the capital of {country}?", begin, capital, i % 3 == 0


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
        name_at(plane, at, title(name), color_of(name), offset, size=7.5)
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


def draw_pass():
    """real_pass.png: pass@n of `capitals`, with the standard error over the prompts."""
    figure, both = panels(2, (10, 4.2))
    titles = dict(test="countries that were not trained on", train="countries that were trained on")
    for axes, (split, about) in zip(both, titles.items()):
        ends = []
        for name, rows in by_name(read("real_pass.csv"), "capitals", split).items():
            of_n = {n: [row for row in rows if row["n"] == str(n)] for n in PASS_AT}
            ys = [statistics.mean(float(row["pass_at"]) for row in of_n[n]) for n in PASS_AT]
            spread = [statistics.mean(float(row["se"]) for row in of_n[n]) for n in PASS_AT]
            plot_pass(axes, PASS_AT, ys, spread, color_of(name))
            ends.append((ys[-1], title(name), color_of(name)))
        label_ends(axes, ends, 34, 0.05)
        axes.set(title=about, xlim=(0.9, 150), ylim=(0, 1.05))
    save(figure, "real_pass.png")


def main(name, task=None):
    is_base, task = name == "base", task or name.partition("-")[0]
    label = f"{task}-base" if is_base else name
    base, folder = load_model(str(started_from())), RUNS / name
    policy = base if is_base else load_model(str(folder))
    data, reward, n, _ = TASKS[task]
    judges = Judges(load_encoder(), load_reward(reward, data), base[0])
    second = word_vectors(*base)
    # The cosine from which the second encoder calls two responses the same: the base says.
    as_same, rows = RUNS / f"{task}-same.json", []
    for split in ("test", "train"):
        results, kept = measured(policy, judges, task, split)
        if is_base and split == "test":
            as_same.write_text(str(as_different(judges.encoder, second, kept, n)))
        same = float(as_same.read_text())
        (result,) = with_second(results, kept, second, same, n)
        rows.append([label, task, split, result["prompts"], n, *row_of(result)])
        if task == "capitals":
            columns = zip(result["pass_at"].items(), result["se"]["pass_at"].values())
            passed = [[label, split, m, f"{x:.4f}", f"{se:.4f}"] for (m, x), se in columns]
            add("real_pass.csv", ["run", "split", "n", "pass_at", "se"], passed)
        if split == "test":
            samples = [[label, x["prompt"], x["response"], x["quality"]]
                       for i in range(3) for x in kept[i * n:i * n + 8]]
    seconds = memory = ""
    if not is_base:
        seconds, memory, curve = of_training(folder)
        seconds, memory = f"{seconds:.0f}", f"{memory:.2f}"
        add("real_training.csv", ["run", "step", *CURVES], [[label, *line] for line in curve])
    add("real_samples.csv", ["run", "prompt", "response", "quality"], samples)
    header = ["run", "task", "split", "prompts", "n", "quality", *(f"pass_at_{n}" for n in PASS_AT),
              *METRICS, "second_effective_diversity", "seconds", "memory_gb"]
    add("real.csv", header, [[*row, seconds, memory] for row in rows])


if __name__ == "__main__":
    if sys.argv[1:] == ["--prompts"]:
        write_prompts("times", times_tables())
        write_prompts("capitals", capitals())
    elif sys.argv[1:] == ["--show"]:
        show()
        draw()
        draw_pass()
    else:
        main(*sys.argv[1:])
