"""What README.md shows is what happens."""

import contextlib
import csv
import io
import re
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
