"""What the four READMEs show is what happens."""

import contextlib
import csv
import io
import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

import dqo
import eval as evaluation
import train
from data.objectives import load_objective
from data.prompts import load_rows
from data.report import show_texts

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data/results"))
import real  # noqa: E402
import tables  # noqa: E402

PLACES = ("README.md", "data/README.md", "data/results/README.md", "tests/README.md")
TEXTS = {place: (ROOT / place).read_text() for place in PLACES}
README, DATA, RESULTS, TESTS = TEXTS.values()
TASKS = ("instruct", "summarize", "story", "reason")


def block(text, start):
    """The first fenced block of a text that contains `start`."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.S)
    return next(b for b in blocks if start in b)


def section(text, heading):
    """From a heading to the next one."""
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def numbers(text):
    return [float(x.replace("\u2212", "-")) for x in re.findall(r"[-+\u2212]?\d+\.\d+", text)]


def cells(line):
    return [x.strip() for x in line.strip("|").split("|")]


def output_of(call):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        call()
    return out.getvalue()


def read(name):
    with (ROOT / "data/results" / name).open() as file:
        return list(csv.DictReader(file))


def mean(objective, alpha, column, task="average"):
    """Over the seeds, from comparison.csv."""
    return statistics.mean(
        float(row[column]) for row in read("comparison.csv")
        if (row["objective"], row["alpha"], row["task"]) == (objective, alpha, task))


# ------------------------------------------------------------------------- the code that is shown
def worked_rows(text):
    lines = (x for x in text.splitlines() if re.match(r"\| (paris|rome|nairobi) ", x))
    return [numbers(line) for line in lines]


def test_worked_group():
    shown = block(README, "$ python dqo.py").split("\n", 1)[1]
    printed = output_of(lambda: show_texts(["paris", "paris", "rome", "nairobi"]))
    assert numbers(printed) == pytest.approx(numbers(shown), abs=0.011)


def test_worked_group_in_python():
    """The rows of both tables: GRPO, gain, DQO, and in data/README.md the quality kernel too."""
    code = block(DATA, "load_encoder()")
    grpo, plain, quality = map(numbers, output_of(lambda: exec(code, {})).splitlines())
    for text, columns in ((README, {0: grpo, 2: plain}), (DATA, {0: grpo, 2: plain, 4: quality})):
        rows = worked_rows(text)
        assert len(rows) == 4
        for column, got in columns.items():
            assert [row[column] for row in rows] == pytest.approx(got, abs=0.002)
    assert [row[:3] for row in worked_rows(README)] == [row[:3] for row in worked_rows(DATA)]


def test_objective_of_your_own(tmp_path):
    """The four lines of data/README.md, by hand: of e1, e1, e2, e2 the middle is (1/2, 1/2)."""
    path = tmp_path / "my.py"
    path.write_text(block(DATA, "def spread("))
    e1, e2 = [1.0, 0.0], [0.0, 1.0]
    phi = torch.tensor([[e1, e1, e2, e2]])                                  # (1, 4, 2)
    load_objective(f"{path}:spread")
    got = dqo.OBJECTIVES.pop(f"{path}:spread")(torch.ones(1, 4), phi, torch.zeros(1, 4, 3), 0.5)
    torch.testing.assert_close(got, torch.full((1, 4), 0.5 * math.sqrt(0.5)))


def test_reward_of_your_own():
    space = {}
    exec(block(DATA, "def score("), space)
    responses = ['"Look at me," said Max.', "Max ran home.", '"No."']
    assert space["score"]([""] * 3, responses, [{}] * 3) == [1.0, 0.0, 0.0]


def test_generating(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = block(DATA, "pipeline(").replace("runs/dqo", str(ROOT / "data/tiny"))
    assert output_of(lambda: exec(code, {})).strip()


# --------------------------------------------------------------------- names, links, flags, width
def test_every_flag_exists():
    def help_of(main):
        return output_of(lambda: pytest.raises(SystemExit, main, ["--help"]))

    known = set(re.findall(r"--[a-z-]+", help_of(train.main) + help_of(evaluation.main)))
    for place, text in TEXTS.items():
        text = text.replace("\\\n", " ")  # a command on two lines
        shown = re.findall(r"python (?:train|eval)\.py[^`\n#]*", text)
        shown += re.findall(r"`--[a-z-]+", text)
        for flag in re.findall(r"--[a-z-]+", " ".join(shown)):
            assert flag in known, f"{flag} in {place}"


def anchors(text):
    """What GitHub makes of the headings: "## What fits where" -> what-fits-where."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("place", PLACES)
def test_links_lead_somewhere(place):
    text = re.sub(r"```.*?```", "", TEXTS[place], flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / place).parent / path if path else ROOT / place
        assert target.exists(), link
        if anchor:
            target = target / "README.md" if target.is_dir() else target
            assert anchor in anchors(target.read_text()), link


def test_every_test_that_is_named_exists():
    named = {x for text in TEXTS.values() for x in re.findall(r"(test_\w+\.py)::(test_\w+)", text)}
    assert len(named) > 40
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"


def test_code_fits_the_page():
    for block in re.findall(r"```\w*\n(.*?)```", README, flags=re.S):
        for line in block.splitlines():
            assert len(line) <= 90, line


# ------------------------------------------------------------ the numbers are those of the CSVs
def test_tables_are_those_of_the_csvs():
    """Every line that data/results/tables.py prints stands in the README beside it."""
    lines = [x for x in output_of(tables.show).splitlines() if x]
    assert len(lines) > 50 and all(x.startswith("| ") for x in lines)
    for line in lines:
        assert line in RESULTS, line


def shown(rows, column, digits):
    """The mean over the seeds, as text."""
    return f"{statistics.mean(float(row[column]) for row in rows):.{digits}f}"


def test_the_real_model_is_that_of_its_csv():
    """The tables of data/results/README.md, and the numbers of README's sentence."""
    lines = [x for x in output_of(real.show).splitlines() if x]
    assert len(lines) > 20
    for line in lines:
        assert line in RESULTS, line

    runs = real.by_name(read("real.csv"), "categories", "train")
    (before, *_), grpo, dqo = (
        (shown(runs[name], "quality", 2), shown(runs[name], "distinct_correct", 1))
        for name in ("base", "grpo", "dqo_quality-3"))
    assert (f"its quality is {before} before, {grpo[0]} after GRPO, with {grpo[1]} distinct "
            f"correct answers of 16, and {dqo[0]} after DQO, with {dqo[1]}") in README
    assert len(runs["grpo"]) == len(runs["dqo_quality-3"]) == 3


def test_pass_at_8_and_sentences_are_those_of_the_csvs():
    """On `letters` DQO is above GRPO by more than both standard errors over the prompts."""
    passed = real.by_name([row for row in read("real_pass.csv") if row["n"] == "8"], "letters")
    grpo, dqo = ([statistics.mean(float(row[column]) for row in passed[name])
                  for column in ("pass_at", "se")] for name in ("grpo", "dqo_quality-3"))
    assert len(passed["grpo"]) == len(passed["dqo_quality-3"]) == 3
    assert dqo[0] - grpo[0] > dqo[1] + grpo[1]
    assert f"{grpo[0]:.2f} of the cases after GRPO, in {dqo[0]:.2f} after DQO" in README
    assert f"has found one in {dqo[0]:.2f} of the cases, GRPO in {grpo[0]:.2f}" in RESULTS
    assert f"prompts apart ({grpo[1]:.2f} each)" in RESULTS
    seeds = [[f"{float(row['pass_at']):.2f}" for row in passed[name]]
             for name in ("grpo", "dqo_quality-3")]
    grpo, dqo = ("{}, {} and {}".format(*numbers) for numbers in seeds)
    assert f"at n = 8 {grpo} against {dqo}" in RESULTS

    right = real.by_name(read("real.csv"), "sentences")
    grpo, dqo = (shown(right[name], "distinct_correct", 1) for name in ("grpo", "dqo_quality-3"))
    assert f"Trained on sentences instead, {grpo} and {dqo} of 16 are right" in README
    assert f"{dqo} of 16 answers are right and different, GRPO's {grpo}" in RESULTS


def test_prompts_of_the_real_model():
    """Each letter's right answers are those of the category that begin with it, all of them; no
    set of words is for training and for tests."""
    answers = {record["prompt"]: record["answer"] for record in load_rows("categories", "train")}
    found = {prompt: [] for prompt in answers}
    for row in real.letters():
        letter = re.search(r" that begins with the letter ([A-Z])\.", row["prompt"])
        assert {word[0].upper() for word in row["answer"]} == {letter[1]}
        found[row["prompt"].replace(letter[0], ".")] += row["answer"]
    assert found == {prompt: sorted(words) for prompt, words in answers.items()}

    words_of = {split: {tuple(row["concepts"]) for row in real.sentences() if row["split"] == split}
                for split in ("train", "test")}
    assert [len(words) for words in words_of.values()] == [400, 24]
    assert not words_of["train"] & words_of["test"]


def hard(objective, alpha, n):
    """pass@n on the two tasks that test what training hardly shows."""
    return statistics.mean(mean(objective, alpha, f"pass_at_{n}", task) for task in tables.HARD)


def test_headline_table_is_that_of_the_csvs():
    names = {"base model": "base", "GRPO": "grpo", "DQO": "dqo"}
    rows = [cells(x) for x in section(README, "What it gives").splitlines() if x.startswith("| ")]
    assert len(rows) - 1 == 6
    for label, quality, distinct, effective, passed in rows[1:]:
        name, _, alpha = label.partition(", α = ")
        who = names.get(name, name.strip("`")), alpha
        assert quality == f"{mean(*who, 'quality'):.2f}", label
        assert distinct == f"{mean(*who, 'distinct_correct'):.1f}", label
        assert effective == f"{mean(*who, 'effective_diversity'):.2f}", label
        assert passed == f"{hard(*who, 16):.2f}", label


def test_claims_are_those_of_the_csvs():
    """What is said about DQO with alpha = 1 against GRPO, and who is best at what."""
    columns = ("quality", "distinct_correct", "effective_diversity", "second_effective_diversity")
    ours, grpo = ([mean(*who, c) for c in columns] for who in (("dqo", "1"), ("grpo", "")))
    times = f"{ours[1] / grpo[1]:.1f} times"
    for text in (
            f"the quality is {ours[0]:.2f} against {grpo[0]:.2f}",
            f"there are {times} as many",
            f"{ours[1]:.1f} against {grpo[1]:.1f}, more on every task",
            f"Effective diversity is {ours[2]:.2f} against {grpo[2]:.2f}, "
            f"and {ours[3]:.2f} against {grpo[3]:.2f}"):
        assert text in RESULTS, text
    assert f"[{times}]" in README and abs(ours[0] - grpo[0]) < 0.02
    for task in TASKS:
        column = "distinct_correct"
        assert mean("dqo", "1", column, task) > mean("grpo", "", column, task)


def of_everybody():
    """{(objective, alpha)}: all that were trained."""
    return {(r["objective"], r["alpha"]) for r in read("comparison.csv")} - {("base", "")}


def test_hard_tasks_are_those_of_the_csvs():
    """pass@16 of the base is above everybody's, and dqo's at every strength above grpo's."""
    base, grpo, one, two = (hard(*who, 16) for who in (
        ("base", ""), ("grpo", ""), ("dqo", "1"), ("dqo", "2")))
    assert (f"falls from the base's {base:.2f} to {grpo:.2f} with GRPO, to {one:.2f} with DQO "
            f"and α = 1, to {two:.2f} with α = 2") in RESULTS
    assert base > max(hard(*who, 16) for who in of_everybody())
    assert grpo < min(hard("dqo", alpha, 16) for alpha in ("0.5", "1", "2"))
    quality, passed = ([mean("base", "", c, task) for task in tables.HARD]
                       for c in ("quality", "pass_at_16"))
    assert (f"a quality of {quality[0]:.2f} and {quality[1]:.2f}, and a pass@16 of "
            f"{passed[0]:.2f} and {passed[1]:.2f}") in DATA


def test_the_strengths_are_chosen_by_the_rule():
    """Most distinct correct answers to training prompts at a quality of grpo's less 0.03."""
    rows = [row for row in read("strengths.csv") if row["split"] == "train"]
    (grpo,) = (float(row["quality"]) for row in rows if row["objective"] == "grpo")
    for objective, strengths in tables.STRENGTHS.items():
        tried = [row for row in rows if row["objective"] == objective]
        assert [float(row["alpha"]) for row in tried] == list(strengths)
        good = [row for row in tried if float(row["quality"]) >= grpo - 0.03]
        best = max(good, key=lambda row: float(row["distinct_correct"]))
        assert [row["alpha"] for row in tried if row["chosen"]] == [best["alpha"]]
        assert len(read_seeds(objective, best["alpha"])) == 3


def read_seeds(objective, alpha):
    """Those of one row of the comparison."""
    return {row["seed"] for row in read("comparison.csv")
            if (row["objective"], row["alpha"]) == (objective, alpha)}


def test_what_is_said_of_the_strengths_is_that_of_the_csv():
    """The spread of the bonus, and what goes with pass@16 on the hard tasks, over all that bear
    a strength."""
    tried = {(r["objective"], r["alpha"]): r for r in read("strengths.csv")
             if r["split"] == "train" and r["alpha"]}
    assert len(tried) == 30
    quality, passed = ([float(r[c]) for r in tried.values()]
                       for c in ("quality", "hard_pass_at_16"))
    correlation = f"{statistics.correlation(quality, passed):.2f}".replace("-", "\u2212")
    assert f"(correlation {correlation})" in RESULTS
    three = [("likelihood", "0.25"), ("dqo", "1"), ("dqo_quality", "2")]
    spread = [f"{float(tried[who]['bonus_to_quality']):.2f}" for who in three]
    assert (f"is {spread[0]} for `likelihood`, {spread[1]} for `dqo` with α = 1 and {spread[2]} "
            "for its quality kernel with α = 2") in RESULTS
    distinct = [f"{mean(*who, 'distinct_correct'):.1f}" for who in three]
    assert f"answers are {distinct[0]}, {distinct[1]} and {distinct[2]}" in RESULTS


def test_the_lead_at_equal_quality_is_that_of_the_table():
    """The least and the most of GRPO's two rows on the tasks of which training shows much."""
    text = section(RESULTS, "At equal quality")
    rows = [cells(x) for x in text.splitlines() if x.startswith("| grpo")]
    assert len(rows) == 2
    found = [x for row in rows for cell in row[2:4] for x in numbers(cell)]
    assert f"{min(found):.1f} to {max(found):.1f} times" in text


def test_cities_are_those_of_the_csv():
    every = read("cities.csv")
    rows = [r for r in every if r["template"] == "I recommend visiting {city}, {country}."]
    text = section(RESULTS, "The geometry, without any language model")
    lines = [x for x in text.splitlines() if re.match(r"\| (uniform|largest|the same)", x)]
    assert len(rows) == len(lines) == 4
    for row, line in zip(rows, lines):
        digits = dict(effective_cities=1, vendi=1, distance=3, log_det=3)
        wanted = [f"{float(row[column]):.{n}f}" for column, n in digits.items()]
        assert cells(line)[1:] == [row["cities_above_1_percent"], *wanted], row["objective"]

    first_four = []  # the probability, in percent, of a policy's four likeliest cities
    for row in rows[1:]:
        percents = sorted(float(x) for x in re.findall(r"([\d.]+) %", row["top"]))
        first_four.append(sum(percents[-4:]))
    assert f"{first_four[0]:.0f} % on four" in text
    assert f"the best for volume {first_four[2]:.0f} %" in text

    effective = {(r["template"], r["objective"]): float(r["effective_cities"]) for r in every}
    ratios = [effective[template, "volume"] / effective[template, "pairwise"]
              for template in {r["template"] for r in every}]
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times as many" in text
