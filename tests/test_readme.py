"""What README.md shows is what happens."""

import contextlib
import csv
import io
import re
import statistics
import sys
from pathlib import Path

import pytest

import dqo
import train

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data/results"))
import tables

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def block(start):
    """The first fenced block that contains a text."""
    return next(b for b in re.findall(r"```\w*\n(.*?)```", README, flags=re.S) if start in b)


def numbers(text):
    return [float(x.replace("\u2212", "-")) for x in re.findall(r"[-+\u2212]?\d+\.\d+", text)]


def output_of(call):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        call()
    return out.getvalue()


def test_worked_group():
    shown = block("$ python dqo.py").split("\n", 1)[1]
    assert numbers(output_of(lambda: dqo.main(["paris", "paris", "rome", "nairobi"]))) == pytest.approx(numbers(shown), abs=0.011)
    grpo, plain, quality = (numbers(line) for line in output_of(lambda: exec(block("load_encoder()"), {})).splitlines())
    rows = [numbers(line) for line in README.splitlines() if re.match(r"\| (paris|rome|nairobi) ", line)]
    for got, column in ((grpo, 0), (plain, 2), (quality, 4)):
        assert [row[column] for row in rows] == pytest.approx(got, abs=0.002)


def test_generating(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = block("pipeline(").replace("runs/dqo", str(dqo.ROOT / "data/tiny"))
    assert output_of(lambda: exec(code, {})).strip()


def test_every_flag_and_file_it_names_exists():
    flags = set(re.findall(r"python train\.py[^`\n#]*", README)) | {m for m in re.findall(r"`(--[a-z-]+)", README)}
    known = output_of(lambda: pytest.raises(SystemExit, train.parse, ["--help"])) + output_of(lambda: pytest.raises(SystemExit, __import__("eval").main, ["--help"]))
    for flag in {f for text in flags for f in re.findall(r"--[a-z-]+", text)}:
        assert flag in known, flag
    for path in re.findall(r"\]\(((?:data|dqo|LICENSE)[^)]*)\)", README):
        assert (dqo.ROOT / path).exists(), path


def test_cities_are_those_of_the_csv():
    rows = [r for r in csv.DictReader((dqo.ROOT / "data/results/cities.csv").open()) if r["template"] == "I recommend visiting {city}, {country}."]
    lines = [x for x in README[README.index("## The geometry"):README.index("## The files")].splitlines() if re.match(r"\| (uniform|largest|the same)", x)]
    assert len(rows) == len(lines) == 4
    for row, line in zip(rows, lines):
        shown = [x.strip() for x in line.strip("|").split("|")][1:]
        assert shown == [row["cities_above_1_percent"], f"{float(row['effective_cities']):.1f}", f"{float(row['vendi']):.1f}",
                         f"{float(row['distance']):.3f}", f"{float(row['log_det']):.3f}"], row["objective"]
    first_four = [sum(sorted((float(x) for x in re.findall(r"([\d.]+) %", r["top"])), reverse=True)[:4]) for r in rows[1:]]
    assert f"{first_four[0]:.0f} % on four" in README and f"the best for volume {first_four[2]:.0f} %" in README
    all_rows = {(r["template"], r["objective"]): float(r["effective_cities"]) for r in csv.DictReader((dqo.ROOT / "data/results/cities.csv").open())}
    ratios = [x / all_rows[t, "pairwise"] for (t, o), x in all_rows.items() if o == "volume"]
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times as many" in README


def test_tables_are_those_of_the_csvs():
    """Every line that data/results/tables.py prints from the CSVs stands in the README."""
    lines = [x for x in output_of(tables.show).splitlines() if x]
    assert len(lines) > 50 and all(x.startswith("| ") for x in lines)
    for line in lines:
        assert line in README, line


def test_headline_is_that_of_the_csvs():
    rows = tables.read("comparison.csv")
    mean = lambda o, a, column: statistics.mean(tables.pick(rows, column, objective=o, alpha=a, task="average"))
    ours, grpo = ([mean(o, a, c) for c in ("quality", "distinct_correct", "effective_diversity", "second_effective_diversity")] for o, a in (("dqo", "1"), ("grpo", "")))
    for text in (f"the quality is {ours[0]:.2f} against {grpo[0]:.2f}", f"{ours[1]:.1f} against {grpo[1]:.1f}, more on every task",
                 f"Effective diversity is {ours[2]:.2f} against {grpo[2]:.2f}, and {ours[3]:.2f} against {grpo[3]:.2f}", f"({ours[1] / grpo[1]:.1f} times in the mean"):
        assert text in README, text
    for task in ("instruct", "summarize", "story", "reason"):
        distinct = lambda o, a: statistics.mean(tables.pick(rows, "distinct_correct", objective=o, alpha=a, task=task))
        assert distinct("dqo", "1") > distinct("grpo", "")
    most = {c: max(tables.everybody(), key=lambda who: mean(*who, c))[0] for c in ("quality", "distinct_correct", "effective_diversity", "second_effective_diversity")}
    assert most == dict(quality="pairwise", distinct_correct="likelihood", effective_diversity="darling", second_effective_diversity="likelihood")
    train = {(r["objective"], r["alpha"]): float(r["quality"]) for r in tables.read("strengths.csv") if r["split"] == "train"}
    assert f"({train['dqo', '1']:.3f} against 0.918)" in README
