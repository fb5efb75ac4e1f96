"""What the READMEs show is what happens, and their numbers are those of the CSVs."""

import contextlib
import csv
import io
import json
import re
import runpy
import statistics
import sys

import pytest
import torch
from conftest import REPO

import dqo
import eval as evaluation
import train

PLACES = ("README.md", "data/README.md", "data/results/README.md", "tests/README.md")
TEXTS = {place: (REPO / place).read_text("utf-8") for place in PLACES}
README, DATA, RESULTS, TESTS = TEXTS.values()


def block(text, start):
    """The first fenced block of a text that contains `start`."""
    return next(b for b in re.findall(r"```\w*\n(.*?)```", text, flags=re.S) if start in b)


def numbers(text):
    return [float(x.replace("−", "-")) for x in re.findall(r"[-+−]?\d+\.\d+", text)]


def cells(line):
    return [x.strip() for x in line.strip("|").split("|")]


def rows_of(text, title):
    """{first cell: other cells} of the table whose head begins with a title."""
    lines = text.split(f"| {title} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return {first: rest for first, *rest in map(cells, lines)}


def output_of(call):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        call()
    return out.getvalue()


def read(name):
    with (REPO / "data/results" / name).open() as file:
        return list(csv.DictReader(file))


# --------------------------------------- the code
def test_worked_group(monkeypatch):
    """The screen of `python dqo.py`, and the advantages under it."""
    monkeypatch.setattr(sys, "argv", ["dqo.py", "paris", "paris", "rome", "nairobi"])
    printed = output_of(lambda: runpy.run_path(str(REPO / "dqo.py"), run_name="__main__"))
    assert printed.strip() == block(README, "$ python dqo.py").split("\n", 1)[1].strip()
    gain = torch.tensor([numbers(line)[0] for line in printed.splitlines()[1:5]])[None]  # (1, 4)
    quality = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    lines = [x for x in README.splitlines() if re.match(r"\| (paris|rome|nairobi) ", x)]
    grpo, gains, ours = torch.tensor(list(map(numbers, lines))).T
    torch.testing.assert_close(gains, gain[0])
    for shown, paid in ((grpo, quality), (ours, quality + gain)):
        pushed = dqo.advantages(paid[..., None])[0, :, 0]
        torch.testing.assert_close(shown, pushed, rtol=0, atol=1e-3)


def test_the_code_runs(tmp_path, monkeypatch):
    """The loop, scoring what one has, the sampling that was trained, an objective of one's own."""
    monkeypatch.chdir(REPO)
    assert len(output_of(lambda: exec(block(README, "dqo_step("), {})).splitlines()) == 3
    assert output_of(lambda: exec(block(DATA, "group_metrics"), {})).strip()
    code = block(DATA, "pipeline(").replace("runs/dqo", str(REPO / "data/tiny"))
    assert output_of(lambda: exec(code, {})).strip()
    exec(block(DATA, "def spread("), space := {})  # e1 e1 e2 e2: 1/2 apart on average
    L = torch.eye(2).repeat_interleave(2, 0).repeat_interleave(2, 1)[None]  # (1, 4, 4)
    assert space["spread"](torch.ones(1, 4), L, None, 0.5).tolist() == [[1.25] * 4]


# ------------------------------ names, links, flags
def test_every_flag_exists():
    known = "".join(evaluation.parser_of(options).format_help()
                    for options in (train.Options, evaluation.Options))
    known = set(re.findall(r"--[a-z-]+", known))
    for place, text in TEXTS.items():
        text = text.replace("\\\n", " ")  # a command on two lines
        shown = re.findall(r"python (?:train|eval)\.py[^`\n#]*", text)
        shown += re.findall(r"`--[a-z-]+", text)
        flags = set(re.findall(r"--[a-z-]+", " ".join(shown)))
        assert flags <= known, place


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
        target = (REPO / place).parent / path if path else REPO / place
        assert target.exists(), link
        if anchor:
            target = target / "README.md" if target.is_dir() else target
            assert anchor in anchors(target.read_text("utf-8")), link


def test_every_test_that_is_named_exists():
    named = {x for text in TEXTS.values() for x in re.findall(r"(test_\w+\.py)::(test_\w+)", text)}
    assert len(named) > 40
    for file, name in named:
        assert f"def {name}(" in (REPO / "tests" / file).read_text("utf-8"), f"{file}::{name}"


# ------------- the numbers are those of the CSVs
def test_tables_are_what_the_scripts_print():
    """Those of data/results/README.md that tables.py and real.py print, row by row."""
    sys.path.insert(0, str(REPO / "data/results"))
    import real
    import tables
    printed = output_of(lambda: (tables.show(), real.show())).splitlines()
    titles = {cells(line)[0] for line in printed if line.startswith("|")}
    checked = 0
    for line in RESULTS.splitlines():
        if line.startswith("| ") and cells(line)[0] in titles:
            assert line in printed, line
            checked += 1
    assert checked > 40


def mean_of(who, column, tasks, seeds="0", split="test"):
    """Over tasks and seeds, of comparison.csv. who: (objective, strength)"""
    rows = [row for row in read("comparison.csv") if (row["objective"], row["alpha"]) == who
            and row["split"] == split and row["task"] in tasks and row["seed"] in seeds]
    assert len(rows) == len(tasks) * len(seeds)
    return statistics.mean(float(row[column]) for row in rows)


def test_the_first_run():
    """README's table is seed 0 of comparison.csv, GRPO's as train.py shows it."""
    digits = dict(quality=2, distinct_correct=1, effective_diversity=2)
    tasks, models = ("instruct", "summarize", "story", "reason"), (
        ("base", ""), ("grpo", ""), ("dqo", "1"))
    shown = rows_of(README, "task")
    assert list(shown) == [*tasks, "mean"]
    for task, found in shown.items():
        some = tasks if task == "mean" else [task]
        wanted = [f"{mean_of(m, c, some):.{n}f}" for c, n in digits.items() for m in models]
        assert [x.strip("*") for x in found] == wanted, task
    recorded = json.loads((REPO / "data/results/first.json").read_text())
    for result in recorded["test"][4:]:
        expected = mean_of(models[1], "quality", [result["task"]])
        assert result["quality"] == pytest.approx(expected, abs=1e-4)


def test_the_real_model():
    """README's sentence about the categories that were trained on."""
    for run in ("base", "grpo-s", "dqo_quality-3-s"):
        rows = [row for row in read("real.csv") if row["run"].startswith(f"categories-{run}")
                and (row["task"], row["split"]) == ("categories", "train")]
        for column, digits in (("quality", 2), ("distinct_correct", 1)):
            mean = statistics.mean(float(row[column]) for row in rows)
            assert f"{mean:.{digits}f}" in README, run


def test_bf16():
    """Seconds of a step, and what was learnt."""
    for side in ("float32", "bf16", "bf16 dithered"):
        rows = [row for row in read("bf16.csv") if row["side"] == side]
        short = [row for row in rows if row["task"] == "categories"]
        assert f"{statistics.mean(float(row['quality']) for row in short):.2f} in {side}" in DATA
        if side != "bf16":
            for part in (short, [row for row in rows if row["task"] == "gsm8k"]):
                assert f"{statistics.median(float(row['seconds']) for row in part):.1f} s" in DATA


def test_the_benchmark():
    rows = [row for row in read("bench.csv") if "sample" not in row["case"]]
    table = RESULTS.split("| prompts |")[1].split("\n\n")[0].splitlines()[2:]
    for ours, trl, shown in zip(rows[::2], rows[1::2], table, strict=True):
        wanted = [float(ours["s"]), float(trl["s"]), float(trl["times_ours"]), float(ours["gb"])]
        assert numbers(" ".join(cells(shown)[2:6])) == pytest.approx(wanted, abs=0.051)
    for row in read("bench.csv")[len(rows):]:
        assert f"{float(row['s']):.1f} s" in RESULTS


def test_memory():
    """Of a response in the backward pass, float32 and bf16, without and with checkpointing."""
    for shape, name in (("smollm2", "SmolLM2-135M"), ("qwen", "Qwen2.5-0.5B")):
        rows = [x for x in read("memory.csv") if (x["shape"], x["lora"]) == (shape, "0")]
        rows.sort(key=lambda x: x["checkpointed"])
        shown = numbers(" ".join(rows_of(DATA, "computed, GB")[name][-2:]))
        assert shown == [float(x["gb_per_response"]) for x in rows]


def test_cities():
    template, columns = "I recommend visiting {city}, {country}.", ("vendi", "distance", "log_det")
    rows = [row for row in read("cities.csv") if row["template"] == template]
    for row, found in zip(rows, rows_of(RESULTS, "policy").values(), strict=True):
        assert found[0] == row["cities_above_1_percent"]
        assert found[2:] == [f"{float(row[c]):.{1 if c == 'vendi' else 3}f}" for c in columns]
