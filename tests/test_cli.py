"""The commands, as a user runs them."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dqo
import eval
import train
from dqo import BadInput, load_encoder, load_model, sample

ROOT = Path(__file__).resolve().parent.parent
METRICS = "step quality gain log_det distinct length truncated empty entropy kl loss grad_norm step_s".split()
RESULT = """model task prompts n quality pass_at max_at distinct_correct distinct_1 distinct_4 self_bleu_diversity self_rouge_diversity
            correct_distinct_4 correct_self_bleu_diversity effective_diversity
            cosine_distance vendi log_det mean_tokens truncated se""".split()


def run(*args, cwd, ok=True):
    """A command in a folder that is not the repository, so that data/tiny must resolve to the repository's."""
    done = subprocess.run([sys.executable, str(ROOT / args[0]), *map(str, args[1:])], cwd=cwd, capture_output=True, text=True)
    assert not ok or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    done = run("train.py", "--steps", 3, "--limit", 3, "--k", 3, "--prompts", 4, "--out", "run", cwd=folder)
    return folder, done


def test_train(trained):
    folder, done = trained
    lines = [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3] and all(key in x for x in lines for key in METRICS)
    assert all(math.isfinite(x[key]) for x in lines for key in METRICS)
    samples = [json.loads(x) for x in (folder / "run/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * 4 * 3 and set(samples[0]) == {"step", "prompt", "response", "quality", "gain", "advantage"}
    config = json.loads((folder / "run/run.json").read_text())
    assert config["config"]["k"] == 3 and config["config"]["lr"] == train.TINY["lr"] and "torch" in config["versions"]
    for word in ("quality", "average", "->", "python eval.py"):
        assert word in done.stdout
    assert "log det" in done.stderr and "s/step" in done.stderr  # the bar
    moved = [torch.equal(a, b) for a, b in zip(load_model("data/tiny")[0].parameters(), load_model(str(folder / "run"))[0].parameters())]
    assert not all(moved)


def test_run_folder_loads_with_plain_transformers(trained):
    folder = trained[0] / "run"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "make 24"}], return_tensors="pt", return_dict=True)
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=12)[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
    assert text.split()
    ours, _ = load_model(str(folder))
    torch.testing.assert_close(ours(**ids).logits, model(**ids).logits)


def test_same_seed_same_run(trained, tmp_path):
    folder, _ = trained
    run("train.py", "--steps", 2, "--limit", 3, "--k", 3, "--prompts", 4, "--out", "again", cwd=tmp_path)
    first, again = ([json.loads(x) for x in f.read_text().splitlines()[:2]] for f in (folder / "run/metrics.jsonl", tmp_path / "again/metrics.jsonl"))
    drop = lambda rows: [{k: v for k, v in r.items() if not k.endswith("_s")} for r in rows]
    assert drop(first) == drop(again)


def test_eval(trained):
    folder, _ = trained
    done = run("eval.py", "data/tiny", "run", "--limit", 2, "--n", 4, "--json", "out.json", "--plot", "plane.png", "--samples", "s.jsonl", cwd=folder)
    results = json.loads((folder / "out.json").read_text())
    assert [(r["model"], r["task"]) for r in results] == [(m, t) for m in ("data/tiny", "run") for t in ("instruct", "summarize", "story", "reason")]
    for r in results:
        assert set(r) == set(RESULT) and set(r["pass_at"]) == set(r["se"]["pass_at"]) == {"1", "2", "4"}
        assert set(r["se"]) == set(RESULT) - {"model", "task", "prompts", "n", "se"}
        assert r["pass_at"]["1"] == pytest.approx(r["quality"]) and 0 <= r["distinct_correct"] <= 4
    assert (folder / "plane.png").stat().st_size > 10_000 and len((folder / "s.jsonl").read_text().splitlines()) == 2 * 4 * 2 * 4
    assert "average" in done.stdout and "distinct correct" in done.stdout and "±" in done.stdout


def test_dqo_on_texts(tmp_path):
    done = run("dqo.py", "a cat", "a cat", "stocks fell", cwd=tmp_path)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[1][1:3] == ["1.00", "1.00"] and float(rows[1][0]) < float(rows[3][0])  # the copies gain less
    assert "log det" in done.stdout
    assert dqo.main(["alone"]) == 2


@pytest.mark.parametrize("args", [
    ["train.py", "--k", "2"], ["train.py", "--alpha", "-1"], ["train.py", "--data", "stories"], ["train.py", "--objective", "ppo"],
    ["train.py", "--kernel", "quality", "--objective", "grpo"], ["train.py", "--data", "none.jsonl", "--reward", "reason"],
    ["train.py", "--model", "no/such/folder"], ["train.py", "--out", "busy", "--steps", "1"], ["train.py", "--lr", "nan"],
    ["eval.py", "no/such/folder"], ["eval.py", "data/tiny", "--n", "1"], ["eval.py", "data/tiny", "--json", "no/folder/x.json"]], ids=lambda a: " ".join(a))
def test_bad_input_is_one_line_and_status_2(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy/thesis.tex").write_text("x")
    main = train.main if args[0] == "train.py" else eval.main
    try:
        status = main(args[1:])
    except SystemExit as error:  # argparse
        status = error.code
    lines = [x for x in capsys.readouterr().err.splitlines() if x.strip()]
    assert status == 2 and ": " in lines[-1] and "Traceback" not in "".join(lines)
    assert len(lines) == 1 or lines[0].startswith("usage:")  # argparse shows its usage first
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["thesis.tex"]


def test_exit_status_reaches_the_shell(tmp_path):
    for args in (["train.py", "--k", 2], ["eval.py", "data/tiny", "--n", 1]):
        done = run(*args, cwd=tmp_path, ok=False)
        assert done.returncode == 2 and done.stderr.startswith(args[0] + ": --") and len(done.stderr.splitlines()) == 1


def test_run_folders_are_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = train.open_run(train.RunConfig())
    assert str(first) == "runs/dqo"
    (first / "kept").write_text("{}")
    assert str(train.open_run(train.RunConfig())) == "runs/dqo-2"
    with pytest.raises(BadInput, match="--overwrite"):
        train.open_run(train.RunConfig(out="runs/dqo"))
    assert (first / "kept").exists() and (first / "run.json").exists()
    train.open_run(train.RunConfig(out="runs/dqo", overwrite=True))
    assert not (first / "kept").exists()


def test_every_option_is_a_flag():
    flags = [x for f in dataclasses.fields(train.RunConfig) if f.type is not bool and f.default is not None and not f.metadata.get("choices")
             for x in ("--" + f.name.replace("_", "-"), str(f.default))]
    assert train.parse(flags) == train.RunConfig() == train.parse([])
    assert train.parse(["--plain", "--micro-batch", "4"]) == train.RunConfig(plain=True, micro_batch=4)


def test_batches_are_shuffled_passes():
    batch = lambda step, P, seed=0: train.batch_of(range(10), step, P, seed)
    passes = [sum((batch(step, 5) for step in steps), []) for steps in ((1, 2), (5, 6))]
    assert sorted(passes[0]) == list(range(10)) == sorted(passes[1]) and passes[0] != passes[1]  # each prompt once per pass
    assert batch(2, 5) == passes[0][5:] and batch(1, 5, seed=1) != batch(1, 5)  # a function of step and seed
    assert len(batch(2, 7)) == 7  # a step may span two passes


def test_embedded_models():
    model, tokenizer = load_model("data/tiny")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000 and (ROOT / "data/tiny/model.safetensors").stat().st_size < 4_000_000
    torch.manual_seed(0)
    assert len(set(sample(model, tokenizer, ["make 24"], 16, 24).texts)) > 8  # diverse
    phi = load_encoder().encode(["A man is eating food.", "A man is eating a piece of bread.", "A cheetah is running."], normalize_embeddings=True)
    assert phi.shape == (3, 384) and phi[0] @ phi[1] > 0.6 > 0.3 > phi[0] @ phi[2]  # it knows meanings


def test_share_beyond_the_encoders_window():
    encoder = load_encoder()
    window = encoder.max_seq_length
    assert train.share_beyond_window(encoder, ["a cat", "cat " * (window - 2), "cat " * (window - 1), "cat " * 999]) == 0.5  # start and end token count
    assert train.share_beyond_window(object(), ["x" * 10 ** 6]) == 0.0  # an encoder without a window
