"""Turns the runs of make.sh into the CSVs and figures beside this file."""

import csv
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import eval as evaluation  # noqa: E402

RUNS, SEEDS, OBJECTIVES = Path("runs/compare"), (0, 1, 2), ("grpo", "dqo")
COLUMNS = ["quality", "pass_at", "distinct_correct", "distinct_4", "self_bleu_diversity", "self_rouge_diversity", "cosine_distance", "vendi", "log_det"]


def number(result, column):
    return result[column][str(result["n"])] if column == "pass_at" else result[column]


def load():
    """{(model, seed): {task: result}}, with the average over tasks."""
    files = {("base", 0): RUNS / "base.json"} | {(o, s): RUNS / f"{o}-{s}/eval.json" for o in OBJECTIVES for s in SEEDS}
    results = {}
    for key, file in files.items():
        tasks = json.loads(file.read_text())
        results[key] = {r["task"]: r for r in tasks + [evaluation.average(tasks)]}
    return results


def main():
    results = load()
    tasks = list(results["base", 0])
    with open(HERE / "comparison.csv", "w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["task", "model", "seed"] + [c + ("_16" if c == "pass_at" else "") for c in COLUMNS])
        for task in tasks:
            for (model, seed), rs in results.items():
                out.writerow([task, model, seed if model != "base" else ""] + [f"{number(rs[task], c):.4f}" for c in COLUMNS])

    print("| task | | quality | pass@16 | distinct correct of 16 | 1 - self-BLEU | log det |\n|---|---|---|---|---|---|---|")
    for task in tasks:
        for model in ("base", *OBJECTIVES):
            cells = []
            for c, digits in (("quality", 2), ("pass_at", 2), ("distinct_correct", 1), ("self_bleu_diversity", 2), ("log_det", 2)):
                x = [number(results[model, s][task], c) for s in SEEDS if (model, s) in results]
                cells.append(f"{statistics.mean(x):.{digits}f}" + (f" ± {statistics.stdev(x):.{digits}f}" if len(x) > 1 else ""))
            print(f"| {task if model == 'base' else ''} | {model} | " + " | ".join(cells) + " |")

    for s in SEEDS:  # the promises, one by one
        for task in tasks[:-1]:
            b, g, d = (results[key][task] for key in (("base", 0), ("grpo", s), ("dqo", s)))
            checks = {"quality >= base + 0.1": d["quality"] >= b["quality"] + 0.1, "quality >= grpo - 0.03": d["quality"] >= g["quality"] - 0.03,
                      "distinct correct >= base": d["distinct_correct"] >= b["distinct_correct"], "pass@16 >= grpo": number(d, "pass_at") >= number(g, "pass_at")}
            print(f"seed {s} {task:10s} " + "  ".join(f"{name}: {'yes' if ok else 'NO'}" for name, ok in checks.items()))
    ratio = [results["dqo", s]["average"]["distinct_correct"] / results["grpo", s]["average"]["distinct_correct"] for s in SEEDS]
    print("distinct correct, dqo / grpo, per seed: " + ", ".join(f"{x:.2f}" for x in ratio))

    seed0 = [r for model in ("base", *OBJECTIVES) for r in results[model, 0].values() if r["task"] != "average"]
    names = {"data/tiny": "base", "runs/compare/grpo-0": "grpo", "runs/compare/dqo-0": "dqo"}
    evaluation.plot([dict(r, model=names[r["model"]]) for r in seed0], HERE / "plane.png")


if __name__ == "__main__":
    main()
