"""The commands, as a user runs them."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import dqo
import eval as evaluation
import train
from data import objectives, options, runs
from data.models import load_encoder, load_model
from data.pictures import plot_run
from data.report import share_beyond_window, show_texts
from dqo import BadInput, sample

ROOT = Path(__file__).resolve().parent.parent
METRICS = """
    step quality gain log_det distinct length truncated empty entropy kl loss grad_norm step_s
""".split()
SAMPLE = {"step", "prompt", "response", "quality", "gain", "advantage"}
RESULT = """
    model task prompts n threshold quality pass_at max_at utility distinct_correct distinct_1
    distinct_4
    self_bleu_diversity self_rouge_diversity correct_distinct_4 correct_self_bleu_diversity
    effective_diversity cosine_distance vendi log_det mean_tokens truncated se
""".split()
SMALL = ("--limit", 3, "--k", 3, "--prompts", 4)  # a run of seconds


def run(*args, cwd, ok=True):
    """A command in a folder that is not the repository: data/tiny must be the repository's."""
    command = [sys.executable, str(ROOT / args[0]), *map(str, args[1:])]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert not ok or done.returncode == 0, done.stderr
    return done


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the folder in which train.py ran, what it printed): three steps into run/."""
    folder = tmp_path_factory.mktemp("smoke")
    done = run("train.py", "--steps", 3, *SMALL, "--out", "run", cwd=folder)
    return folder, done


# ---------------------------------------------------------------------------------- train.py
def test_train(trained):
    """A run writes its configuration, its logs and a model that has moved, and says so."""
    folder, done = trained
    steps = json_lines(folder / "run/metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        for key in METRICS:
            assert key in line
            assert math.isfinite(line[key])
    samples = json_lines(folder / "run/samples.jsonl")
    assert len(samples) == 3 * 4 * 3
    assert set(samples[0]) == SAMPLE
    saved = json.loads((folder / "run/run.json").read_text())
    assert saved["config"]["k"] == 3
    assert saved["config"]["lr"] == options.TINY["lr"]
    assert "torch" in saved["versions"]
    for word in ("quality", "average", "->", "python eval.py"):
        assert word in done.stdout
    for word in ("log det", "s/step"):  # the progress
        assert word in done.stderr
    before, _ = load_model("data/tiny")
    after, _ = load_model(str(folder / "run"))
    pairs = zip(before.parameters(), after.parameters())
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_the_last_word(trained):
    """The table shows what to judge by, and the curves of the run lie in its folder."""
    folder, done = trained
    header = next(line for line in done.stdout.splitlines() if line.startswith("task "))
    for column in ("quality", "pass@16", "distinct correct", "effective diversity"):
        assert column in header
    picture = folder / "run/run.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert "run/run.png" in done.stdout


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    """That is no error."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_run(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_run_folder_loads_with_plain_transformers(trained):
    """It generates there, and has the logits that it has here."""
    folder = trained[0] / "run"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "make 24"}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    tokens = model.generate(**ids, max_new_tokens=12)[0]
    response = tokens[ids["input_ids"].shape[1]:]
    assert tokenizer.decode(response, skip_special_tokens=True).split()
    ours, _ = load_model(str(folder))
    torch.testing.assert_close(ours(**ids).logits, model(**ids).logits)


@pytest.mark.slow  # a process of its own takes seconds to start
def test_same_seed_same_run(trained, tmp_path):
    """Two runs with the same seed log the same numbers, times aside."""
    folder, _ = trained
    run("train.py", "--steps", 2, *SMALL, "--out", "again", cwd=tmp_path)

    def first_two(path):
        steps = json_lines(path / "metrics.jsonl")[:2]
        return [without_times(line) for line in steps]
    assert first_two(folder / "run") == first_two(tmp_path / "again")


def without_times(line):
    return {key: value for key, value in line.items() if not key.endswith("_s")}


def quick(monkeypatch, steps):
    """Flags of a run in this process that does next to nothing in each of its steps."""
    monkeypatch.setattr(train, "conclude", lambda *args: None)
    flags = dict(steps=steps, limit=1, k=2, prompts=1, max_new_tokens=2, data="story")
    return ["--objective", "grpo", *named(flags)]


def named(flags):
    """["--max-new-tokens", "2"] of {"max_new_tokens": 2}."""
    words = []
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


@pytest.mark.parametrize("steps,told", [
    (20, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
    (3, [1, 2, 3]),
    (12, [2, 3, 4, 5, 6, 8, 9, 10, 11, 12]),
])
def test_off_a_terminal_a_line_per_tenth_of_the_run(
        tmp_path, monkeypatch, capsys, steps, told):
    """Where stderr is a file, ten lines are written, or one per step, and no bar."""
    monkeypatch.chdir(tmp_path)
    assert train.main(quick(monkeypatch, steps)) == 0
    errors = capsys.readouterr().err
    assert "\r" not in errors
    lines = errors.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {i} of {steps}" for i in told]
    for line in lines:
        for word in ("quality", "log det", "distinct", "length", "truncated", "s/step"):
            assert word in line


def test_on_a_terminal_a_bar(tmp_path, monkeypatch, capsys):
    """There the bar moves with every step, and none of those lines is written."""
    monkeypatch.chdir(tmp_path)
    flags = quick(monkeypatch, 3)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(train, "tqdm", lambda **kw: tqdm(mininterval=0, **kw))
    assert train.main(flags) == 0
    errors = capsys.readouterr().err
    assert "step 1 of 3" not in errors
    for word in ("\r", "1/3", "2/3", "3/3", "s/step"):
        assert word in errors


# ------------------------------------------------------------ what the method is given by train.py
@pytest.fixture
def steps_seen(monkeypatch):
    """What train.py gives to each `dqo_step`, and learning rate and weights before it."""
    seen, usual = [], train.dqo_step

    def dqo_step(
            model, tokenizer, encoder, reward, optimizer, rows, config, reference, memory=None):
        (group,) = optimizer.param_groups
        seen.append(SimpleNamespace(
            config=config,
            rows=rows,
            reference=reference,
            memory=memory,
            lr=group["lr"],
            seed=torch.initial_seed(),
            weights=weights_of(model)))
        return usual(model, tokenizer, encoder, reward, optimizer, rows, config, reference, memory)
    monkeypatch.setattr(train, "dqo_step", dqo_step)
    monkeypatch.setattr(train, "load_encoder", lambda *args, **kw: None)
    return seen


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_what_each_step_is_given(tmp_path, monkeypatch, steps_seen):
    """The options as said, the model of the very start as reference, the learning rate of then.

    A resumed run has that reference, too, and its half of the learning rates.
    """
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text("def score(a, texts, b): return [len(text) for text in texts]")
    flags = dict(
        beta=0.3, lr=0.01, temperature=0.7, k=4, max_new_tokens=4, seed=5, reward="my.py:score")
    assert train.main([*quick(monkeypatch, 4), *named(flags), "--out", "run"]) == 0
    assert train.main(["--resume", "run", "--steps", "6"]) == 0
    rates = [1, 1, 1, 1 / 2, 2 / 3, 1 / 3]  # a half from step 4 of 4 on, steps 5 and 6 of 6
    assert [seen.lr for seen in steps_seen] == pytest.approx([0.01 * rate for rate in rates])
    for part in (steps_seen[:4], steps_seen[4:]):
        assert isinstance(part[0].memory, dict)
        assert all(seen.memory is part[0].memory for seen in part)

    start = weights_of(load_model("data/tiny")[0])
    for i, seen in enumerate(steps_seen):
        assert {name: getattr(seen.config, name) for name in flags} == flags
        assert weights_of(seen.reference).equal(start)
        assert not any(p.requires_grad for p in seen.reference.parameters())
        assert seen.weights.equal(start) == (i == 0)
        assert seen.seed == 5
        assert [row["task"] for row in seen.rows] == ["story"]
    assert all(line["kl"] > 0 for line in json_lines(Path("run/metrics.jsonl"))[1:])


@pytest.mark.parametrize("options, fits", [
    (dict(plain=True), True),
    (dict(), False),
    (dict(template_args=dict(times=2)), True),
])
def test_prompts_are_measured_as_they_will_be_read(model, tokenizer, options, fits):
    """A chat template, and what it is told, make a prompt longer; here by 60 words at first."""
    tokenizer.chat_template = "{{ messages[0].content }}{{ ' w8' * (times or 60) }}"
    rows = [dict(prompt="w5", where="line 1")]
    config = runs.RunConfig(max_new_tokens=8, **options)  # the model's context is of 64
    if fits:
        assert train.fitting(config, model, tokenizer, rows, rows) == [rows, rows]
        return
    with pytest.raises(BadInput, match="line 1: 61 prompt tokens"):
        train.fitting(config, model, tokenizer, rows)


@pytest.mark.parametrize("epochs, saved", [(1, [6]), (2, [])])
def test_a_step_that_fails_is_saved_if_the_weights_are_untouched(
        tmp_path, monkeypatch, epochs, saved):
    """With several epochs the first may have moved them: then the last checkpoint is all."""
    def dqo_step(*args):
        torch.rand(1)
        raise BadInput("the quality is nan")
    written, before = [], torch.get_rng_state()
    monkeypatch.setattr(train, "dqo_step", dqo_step)
    monkeypatch.setattr(runs, "checkpoints", lambda out: [4, 2, *(step for step, _ in written)])
    monkeypatch.setattr(runs, "save_checkpoint", lambda out, step, config, setup, state:
                        written.append((step, state["cpu"])))
    setup = runs.Setup(*[None] * 5)
    with pytest.raises(BadInput) as error:
        train.one_step(runs.RunConfig(epochs=epochs), tmp_path, 7, setup, ["row"])
    assert [step for step, _ in written] == saved
    assert all(state.equal(before) for _, state in written)
    message = f"step 7: the quality is nan; --resume {tmp_path} goes on after step "
    assert str(error.value) == message + str(saved[0] if saved else 4)


def test_the_groups_that_are_shown(tmp_path, monkeypatch):
    """One group of the first step, and of each quarter of the run."""
    monkeypatch.chdir(tmp_path)
    shown = []
    monkeypatch.setattr(train.report, "show_group", lambda step, samples, metrics:
                        shown.append((step, len(samples))))
    assert train.main([*quick(monkeypatch, 8), "--prompts", "2"]) == 0
    assert shown == [(step, 2) for step in (1, 2, 4, 6, 8)]


@pytest.mark.parametrize("limit, train_rows, test_rows", [
    (0, 50, 32),
    (40, 40, 32),
    (3, 3, 3),
])
def test_prompts_of_a_run(tmp_path, limit, train_rows, test_rows):
    """All of the training split; of the test split no more than the last table needs."""
    file = tmp_path / "my.jsonl"
    rows = []
    for split in ("train", "test"):
        rows += [dict(prompt=f"{split} {i}", answer=24, split=split) for i in range(50)]

    def load():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return train.load_prompts(runs.RunConfig(data=str(file), reward="reason", limit=limit))
    loaded = [[row["prompt"] for row in part] for part in load()[:2]]
    assert loaded[0] == [f"train {i}" for i in range(train_rows)]
    assert loaded[1] == [f"test {i}" for i in range(test_rows)]
    for bad in (1, 51):  # one of either split
        rows[bad]["answer"] = "no number"
        with pytest.raises(BadInput, match=f"line {bad + 1}: "):
            load()
        rows[bad]["answer"] = 24


@pytest.mark.parametrize("steps, rates", [
    (1, [1]),
    (2, [1, 1]),
    (5, [1, 1, 1, 0.8, 0.4]),
    (10, [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
])
def test_learning_rates(steps, rates):
    """Constant in the first half, then linear to 0."""
    config = runs.RunConfig(lr=3.0, steps=steps)
    got = [train.learning_rate(config, step) for step in range(1, steps + 1)]
    assert got == pytest.approx([3 * rate for rate in rates])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_optimizer(model, checkpointing):
    """AdamW without weight decay; gradient checkpointing only on request."""
    config = runs.RunConfig(lr=0.1, gradient_checkpointing=checkpointing)
    optimizer = train.optimizer_of(model, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.0)
    assert len(group["params"]) == len(list(model.parameters()))
    on = [getattr(module, "gradient_checkpointing", False) for module in model.modules()]
    assert any(on) == checkpointing


@pytest.mark.parametrize("reference", [None, "reference"])
def test_the_last_word_compares_start_and_end(monkeypatch, reference):
    """Sampled as in training and judged alike: the starting model first, the trained one then."""
    calls, shown = [], []
    monkeypatch.setattr(train, "evaluate", lambda *args: calls.append(args) or args[0])
    monkeypatch.setattr(train, "load_model", lambda name: (f"{name}, loaded", None))
    monkeypatch.setattr(train.report, "change", lambda *args: shown.append(args))
    monkeypatch.setattr(train.pictures, "plot_run", lambda folder: None)
    config = runs.RunConfig(
        temperature=0.7,
        max_new_tokens=9,
        plain=True,
        template_args=dict(more="x"),
        out="run")
    setup = runs.Setup("model", "tokenizer", "encoder", "reward", None, reference)
    train.conclude(config, setup, ["rows"])
    first = reference or "data/tiny, loaded"
    assert [call[:2] for call in calls] == [
        ("base", (first, "tokenizer")),
        ("trained", ("model", "tokenizer")),
    ]
    sampling = evaluation.Sampling(
        train.EVAL_N, 9, temperature=0.7, plain=True, template_args=dict(more="x"))
    for _, _, judges, rows, drawn in calls:
        assert judges == evaluation.Judges("encoder", "reward")
        assert rows == ["rows"]
        assert drawn == sampling
    assert shown == [("base", "trained")]


# -------------------------------------------------------------------- an objective in a file
def docstring_example():
    """The function that the docstring of data/objectives.py shows, as the text of a file."""
    text = objectives.__doc__
    return textwrap.dedent(text[text.index("    def shorter"):].split("\n\n")[0])


def test_an_objective_in_a_file(tmp_path):
    """`--objective my.py:shorter` of the docstring trains: each token costs alpha."""
    (tmp_path / "my.py").write_text(docstring_example())
    flags = ("--objective", "my.py:shorter", "--alpha", 0.25, "--steps", 1, *SMALL)
    done = run("train.py", *flags, cwd=tmp_path)
    out = tmp_path / "runs/shorter"  # the function's name
    assert "runs/shorter" in done.stdout
    config = json.loads((out / "run.json").read_text())["config"]
    assert config["objective"] == "my.py:shorter"
    assert config["alpha"] == 0.25

    _, tokenizer = load_model("data/tiny")
    samples = json_lines(out / "samples.jsonl")
    lengths = set()
    for i in range(0, len(samples), 3):
        group = samples[i:i + 3]
        totals = []
        for s in group:
            length = len(tokenizer(s["response"], add_special_tokens=False).input_ids) + 1
            length = min(length, options.TINY["max_new_tokens"])  # + 1: the end token
            lengths.add(length)
            totals.append(s["quality"] - 0.25 * length)
        centred = [total - sum(totals) / 3 for total in totals]
        assert [s["advantage"] for s in group] == pytest.approx(centred, abs=1e-5)
    assert len(lengths) > 1


def test_an_objective_in_a_file_says_what_it_needs(tmp_path, monkeypatch, capsys):
    """Attributes of the function are its default strength, limits and whether it embeds."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(docstring_example() + textwrap.dedent("""
        shorter.alpha, shorter.highest_alpha = 0.01, 0.5
        shorter.embeds, shorter.smallest_group = False, (2, 4)
        """))
    ours = ["--objective", "my.py:shorter"]
    with mock.patch.dict(dqo.OBJECTIVES):
        assert train.parse(ours).alpha == 0.01
        assert not dqo.OBJECTIVES["my.py:shorter"].embeds
        with pytest.raises(BadInput, match="--alpha 0.6: for my.py:shorter"):
            train.parse([*ours, "--alpha", "0.6"])
        with pytest.raises(BadInput, match="--k 3: my.py:shorter .* below k = 4"):
            train.parse([*ours, "--k", "3"])


# ----------------------------------------------------------------------- eval.py and dqo.py
def test_eval(trained):
    """Two models on all tasks: a table, a picture, the results and the responses."""
    folder, _ = trained
    done = run(
        "eval.py", "data/tiny", "run", "--limit", 2, "--n", 4,
        "--json", "out.json", "--plot", "plane.png", "--samples", "s.jsonl", cwd=folder)
    results = json.loads((folder / "out.json").read_text())
    tasks = ("instruct", "summarize", "story", "reason")
    expected = [("data/tiny", task) for task in tasks] + [("run", task) for task in tasks]
    assert [(result["model"], result["task"]) for result in results] == expected
    for result in results:
        assert set(result) == set(RESULT)
        assert set(result["pass_at"]) == {"1", "2", "4"}
        assert set(result["se"]["pass_at"]) == {"1", "2", "4"}
        assert set(result["se"]) == set(RESULT) - {
            "model", "task", "prompts", "n", "threshold", "se"}
        assert result["pass_at"]["1"] == pytest.approx(result["quality"])
        assert 0 <= result["distinct_correct"] <= 4
    assert (folder / "plane.png").stat().st_size > 10_000
    assert len(json_lines(folder / "s.jsonl")) == 2 * 4 * 2 * 4
    for word in ("average", "distinct correct", "±", "(correct: a quality of at least 1)"):
        assert word in done.stdout


def test_dqo_on_texts(tmp_path):
    """Of three texts, two of them equal, the copies gain less than the third."""
    done = run("dqo.py", "a cat", "a cat", "stocks fell", cwd=tmp_path)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[1][1:3] == ["1.00", "1.00"]
    assert float(rows[1][0]) < float(rows[3][0])
    assert "log det" in done.stdout
    assert show_texts(["alone"]) == 2


# ------------------------------------------------------------------- nothing measured is lost
def no_constant(name):
    raise ValueError(f"{name} is no JSON")


def strict_json(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constant)


def here(monkeypatch, tmp_path, *args):
    """eval.py in this process and in a folder of its own, on two prompts, two responses each."""
    monkeypatch.chdir(tmp_path)
    return evaluation.main([*args, "--data", "story", "--limit", "2", "--n", "2"])


def test_json_without_nan(monkeypatch, tmp_path):
    """One prompt has no standard error, and one response nothing to be compared with."""
    args = ["data/tiny", "--json", "x.json", "--limit", "1", "--n", "1"]
    monkeypatch.chdir(tmp_path)
    assert evaluation.main([*args, "--data", "story"]) == 0
    (result,) = strict_json(Path("x.json"))
    assert result["se"]["quality"] is None
    assert result["cosine_distance"] is None
    assert result["pass_at"] == {"1": result["quality"]}


def test_logs_without_nan(tmp_path):
    path = tmp_path / "log.jsonl"
    runs.append(path, [dict(step=1, kl=math.nan, prompt=[dict(weight=math.inf)])])
    assert strict_json(path) == dict(step=1, kl=None, prompt=[dict(weight=None)])


def test_the_same_model_twice(monkeypatch, tmp_path, capsys):
    """Two columns, which the same seed makes equal, and two results."""
    models = ["data/tiny", "data/tiny", "data/tiny"]
    assert here(monkeypatch, tmp_path, *models, "--json", "x.json") == 0
    names = ["data/tiny", "data/tiny (2)", "data/tiny (3)"]
    results = strict_json(Path("x.json"))
    assert [result.pop("model") for result in results] == names
    assert results[0] == results[1] == results[2]
    title, *lines = capsys.readouterr().out.strip().splitlines()
    [quality] = [line for line in lines if line.startswith("  quality")]
    assert title.split()[-5:] == ["data/tiny", *"data/tiny (2) data/tiny (3)".split()]
    assert quality.count("±") == 3


@pytest.mark.parametrize("flag, plain, template_args", [
    (["--plain"], True, None),
    (["--template-args", '{"more": "x"}'], False, dict(more="x")),
])
def test_every_flag_reaches_the_evaluation(monkeypatch, tmp_path, flag, plain, template_args):
    """How it samples, of what, and who judges."""
    monkeypatch.chdir(tmp_path)
    rows = [dict(q=f"make {n}", a=n, split="test") for n in (24, 25, 26)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = []

    def evaluate(*args):
        calls.append(args)
        raise BadInput("that is enough")
    prepared, usual = [], evaluation.prepare

    def prepare(*args):
        prepared.append(args[3:])
        return usual(*args)
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "prepare", prepare)
    monkeypatch.setattr(evaluation, "load_encoder", lambda *args, **kw: (args, kw))
    flags = dict(
        n=5, max_new_tokens=9, temperature=0.7, seed=3, batch=10,
        data="my.jsonl", reward="reason", prompt_key="q", answer_key="a", limit=2,
        encoder="an encoder", encoder_prompt="query", judge="data/tiny")
    assert evaluation.main(["data/tiny", *flag, *named(flags)]) == 2
    ((name, (model, tokenizer), judges, records, sampling, _),) = calls
    assert name == "data/tiny"
    assert sampling == evaluation.Sampling(5, 9, 0.7, 3, plain, template_args, 10)
    assert prepared == [(9, plain, template_args, False)]
    assert [(r["prompt"], r["answer"]) for r in records] == [("make 24", 24), ("make 25", 25)]
    assert judges.reward([""], ["20 + 4"], records[:1]) == [1.0]
    assert judges.encoder == (("an encoder",), dict(prompt="query"))
    assert weights_of(judges.fluency).equal(weights_of(model))


@pytest.mark.parametrize("wrong", ["no/such", "cut", "short"])
def test_a_model_that_does_not_work_is_found_before_another_is_measured(
        monkeypatch, tmp_path, capsys, wrong):
    """A name, a file, or a context that is too small."""
    tiny = ROOT / "data/tiny"
    for name in ("cut", "short"):
        shutil.copytree(tiny, tmp_path / name)
    os.truncate(tmp_path / "cut/model.safetensors", 100_000)
    config = json.loads((tiny / "config.json").read_text())
    config["max_position_embeddings"] = 12
    (tmp_path / "short/config.json").write_text(json.dumps(config))
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: pytest.fail("measured"))
    flags = ["--max-new-tokens", "8"]
    assert here(monkeypatch, tmp_path, "data/tiny", wrong, "data/tiny", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert wrong in line or "context of 12" in line


def test_what_was_measured_is_written_even_if_the_next_model_fails(monkeypatch, tmp_path):
    measured, usual = [], evaluation.evaluate

    def evaluate(name, *args):
        if measured:
            raise KeyboardInterrupt
        measured.append(name)
        return usual(name, *args)
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    flags = ["--json", "x.json", "--samples", "s.jsonl"]
    assert here(monkeypatch, tmp_path, "data/tiny", "data/tiny", *flags) == 130
    assert [result["model"] for result in strict_json(Path("x.json"))] == ["data/tiny"]
    assert len(json_lines(Path("s.jsonl"))) == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="it is a device of Linux")
def test_a_full_disk_costs_one_file(monkeypatch, tmp_path, capsys):
    """The others are written, and the table is printed."""
    flags = ["--json", "/dev/full", "--samples", "s.jsonl"]
    assert here(monkeypatch, tmp_path, "data/tiny", *flags) == 2
    out, err = capsys.readouterr()
    assert "distinct correct" in out
    assert err.splitlines() == ["eval.py: cannot write /dev/full: No space left on device"]
    assert len(json_lines(Path("s.jsonl"))) == 4


def piped(command, cwd):
    """(exit status, stderr) of a command whose output is closed before it has begun."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *command[1:]],
        cwd=cwd,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True)
    os.close(write)
    return done.returncode, done.stderr


@pytest.mark.slow  # a process of its own takes seconds to start
def test_eval_into_a_closed_pipe(tmp_path):
    """The files are there, and no traceback."""
    command = ["eval.py", "data/tiny", "--limit", "1", "--n", "2", "--json", "x.json"]
    assert piped(command, tmp_path) == (141, "")
    assert len(strict_json(tmp_path / "x.json")) == 4


@pytest.mark.slow  # a process of its own takes seconds to start
@pytest.mark.parametrize("both", [False, True])
def test_train_into_a_pipe_that_closes(tmp_path, both):
    """`train.py | head -4`, `train.py 2>&1 | head -4`: the step is ended and saved."""
    flags = "--data story --limit 2 --k 3 --prompts 1 --steps 40 --max-new-tokens 4 --out 'a run'"
    merge = "2>&1" if both else ""
    command = f"{sys.executable} {ROOT / 'train.py'} {flags} {merge} | head -4"
    command += "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 141
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception" not in done.stdout + done.stderr
    steps = runs.checkpoints(tmp_path / "a run")
    assert 0 < max(steps) < 40
    assert len(json_lines(tmp_path / "a run/metrics.jsonl")) == max(steps)
    if not both:
        assert "python train.py --resume 'a run'" in done.stderr


@pytest.mark.slow  # a process of its own takes seconds to start
def test_train_into_a_closed_pipe(tmp_path):
    """It ends after its first step, and can go on."""
    status, errors = piped(["train.py", "--steps", "3", "--limit", "1", "--out", "run"], tmp_path)
    assert status == 141
    assert errors.endswith("To go on:\n  python train.py --resume run\n")
    assert "Traceback" not in errors
    assert max(runs.checkpoints(tmp_path / "run")) == 1


# ---------------------------------------------------------------------------- scripts and systems
@pytest.mark.slow  # a process of its own takes seconds to start
def test_any_console_shows_any_script(tmp_path):
    """Output is UTF-8 where the console says that it is ASCII."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}

    def shown(*args):
        command = [sys.executable, *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode("utf-8")
    assert "東京" in shown(ROOT / "dqo.py", "東京", "Köln")
    assert "±" in shown(ROOT / "eval.py", "data/tiny", "--limit", 1, "--n", 2)


@pytest.mark.slow  # a process of its own takes seconds to start
def test_files_are_utf8_whatever_the_system_says(tmp_path):
    """A prompt in Japanese, read and trained on where files are ASCII by default (as cp1252 is
    that of Windows)."""
    rows = [dict(prompt="東京 make 24", answer=24)] * 2
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "日本.jsonl").write_text(text, encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    args = "train.py --data 日本.jsonl --reward reason --steps 1 --k 3 --prompts 2 --out r".split()
    command = [sys.executable, str(ROOT / args[0]), *args[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json_lines(tmp_path / "r/samples.jsonl")[0]["prompt"] == "東京 make 24"


def test_a_system_without_sighup(tmp_path, monkeypatch):
    """Windows has none."""
    monkeypatch.delattr(signal, "SIGHUP")
    with runs.noted_signals() as received:
        signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]


# ------------------------------------------------------------------------ windows and long prompts
LONG = "dog " * 300


def test_eval_says_what_exceeds_the_window(monkeypatch, tmp_path, capsys):
    """As train.py does."""
    usual = evaluation.load_encoder

    def small(*args, **kw):
        encoder = usual(*args, **kw)
        encoder.max_seq_length = 4
        return encoder
    monkeypatch.setattr(evaluation, "load_encoder", small)
    assert here(monkeypatch, tmp_path, "data/tiny") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    warning = "WARNING  4 of 4 responses of data/tiny exceed the encoder's window of 4 tokens"
    assert last.startswith(warning)
    monkeypatch.setattr(evaluation, "load_encoder", usual)
    assert here(monkeypatch, tmp_path, "data/tiny") == 0
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("texts, warning", [
    (["a cat", LONG, LONG + "s"], "WARNING  2 of 3 texts exceed the encoder's window of 256"),
    (["a cat", "dog " * 254], None),
])
def test_dqo_says_what_exceeds_the_window(capsys, texts, warning):
    assert show_texts(texts) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(warning or "a gain lies between")


def test_the_window_of_bytes():
    """A token may be a single byte, three of which are one Japanese character."""
    encoder = SimpleNamespace(
        max_seq_length=12,
        tokenizer=lambda texts, **kw: SimpleNamespace(input_ids=[t.encode() for t in texts]))
    assert share_beyond_window(encoder, ["東京タワー", "tokyo tower"]) == 0.5


LONG_ROWS = [dict(prompt=f"make {n}", answer=n) for n in (24, 25)] + [dict(prompt=LONG, answer=1)]


def test_long_prompts_are_skipped_on_request(monkeypatch, tmp_path, capsys):
    """Both commands say how many; one pass over the data is one over the rest."""
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LONG_ROWS))
    shutil.copytree(ROOT / "data/tiny", "any")
    data = ["--data", "my.jsonl", "--reward", "reason", "--max-new-tokens", "8"]
    train_flags = [*data, "--model", "any", "--beta", "0", "--k", "3", "--prompts", "1"]
    assert train.main(train_flags) == 2
    assert "add --skip-long" in capsys.readouterr().err
    monkeypatch.setattr(train, "conclude", lambda *args: None)
    assert train.main([*train_flags, "--skip-long", "--out", "run"]) == 0
    assert "2 of 6 prompts, training and test, are skipped" in capsys.readouterr().out
    assert [line["step"] for line in json_lines(Path("run/metrics.jsonl"))] == [1, 2]
    prompts = {line["prompt"] for line in json_lines(Path("run/samples.jsonl"))}
    assert prompts == {"make 24", "make 25"}
    assert json.loads(Path("run/run.json").read_text())["config"]["skip_long"]

    assert evaluation.main(["any", *data, "--n", "2"]) == 2
    assert "add --skip-long" in capsys.readouterr().err
    assert evaluation.main(["any", *data, "--n", "2", "--skip-long", "--json", "x.json"]) == 0
    assert "1 of 3 prompts were skipped" in capsys.readouterr().out
    assert strict_json(Path("x.json"))[0]["prompts"] == 2


def test_nothing_left_of_long_prompts(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text(json.dumps(LONG_ROWS[-1]))
    data = ["--data", "my.jsonl", "--reward", "reason", "--skip-long"]
    for main, models in ((train.main, []), (evaluation.main, ["data/tiny"])):
        assert main([*models, *data]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "--skip-long: no prompt" in line


def test_greedy(monkeypatch, tmp_path):
    """--temperature 0: one response is its quality; several are all the same."""
    monkeypatch.chdir(tmp_path)
    base = ["data/tiny", "--data", "reason", "--limit", "3", "--temperature", "0"]
    answers = []
    for flags in (["--n", "1"], ["--n", "3", "--seed", "5"]):
        assert evaluation.main([*base, *flags, "--json", "x.json", "--samples", "s.jsonl"]) == 0
        (result,) = strict_json(Path("x.json"))
        lines = json_lines(Path("s.jsonl"))
        answers.append([line["response"] for line in lines])
        assert result["quality"] == sum(line["quality"] for line in lines) / len(lines)
    assert answers[1] == [answer for answer in answers[0] for _ in range(3)]
    assert result["self_bleu_diversity"] == pytest.approx(0, abs=1e-9)


# -------------------------------------------------------------------------------- bad input
BAD = [
    "train.py --k 2",
    "train.py --alpha -1",
    "train.py --data stories",
    "train.py --objective ppo",
    "train.py --kernel quality --objective grpo",
    "train.py --data none.jsonl --reward reason",
    "train.py --model no/such/folder",
    "train.py --out busy --steps 1",
    "train.py --lr nan",
    "eval.py no/such/folder",
    "eval.py data/tiny --n 0",
    "eval.py data/tiny --json no/folder/x.json",
]


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_line_and_status_2(command, tmp_path, monkeypatch, capsys):
    """Nothing is written then, and nothing deleted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy/thesis.tex").write_text("x")
    program, *args = command.split()
    main = train.main if program == "train.py" else evaluation.main
    status = main(args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert status == 2
    assert len(lines) == 1
    assert ": " in lines[0]
    assert "Traceback" not in lines[0]
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert files == ["thesis.tex"]


@pytest.mark.slow  # a process of its own takes seconds to start
def test_exit_status_reaches_the_shell(tmp_path):
    """It is 2, with the one line."""
    for args in (["train.py", "--k", 2], ["eval.py", "data/tiny", "--n", 0]):
        done = run(*args, cwd=tmp_path, ok=False)
        assert done.returncode == 2
        assert done.stderr.startswith(args[0] + ": --")
        assert len(done.stderr.splitlines()) == 1


def test_run_folders_are_not_overwritten(tmp_path, monkeypatch):
    """Without --out the next free name is taken; --overwrite alone replaces a run."""
    monkeypatch.chdir(tmp_path)
    first = runs.open_run(runs.RunConfig())
    assert str(first) == "runs/dqo"
    (first / "kept").write_text("{}")
    assert str(runs.open_run(runs.RunConfig())) == "runs/dqo-2"
    with pytest.raises(BadInput, match="--overwrite"):
        runs.open_run(runs.RunConfig(out="runs/dqo"))
    assert (first / "kept").exists()
    assert (first / "run.json").exists()
    runs.open_run(runs.RunConfig(out="runs/dqo", overwrite=True))
    assert not (first / "kept").exists()


# --------------------------------------------------------------------- options and defaults
def test_every_option_is_a_flag():
    """Giving every default by its flag gives the default configuration."""
    defaults = {}
    for field in dataclasses.fields(runs.RunConfig):
        if field.type is not bool and field.default is not None:
            defaults[field.name] = field.default
    assert len(defaults) > 15
    assert train.parse(named(defaults)) == runs.RunConfig()
    assert train.parse([]) == runs.RunConfig()
    given = train.parse(["--plain", "--micro-batch", "4"])
    assert given == runs.RunConfig(plain=True, micro_batch=4)


def test_a_folder_that_is_called_tiny_is_any_model(tmp_path, monkeypatch):
    """What was tuned for the embedded model is for it alone, from wherever it is named."""
    monkeypatch.chdir(tmp_path)

    def resolved(model):
        config = runs.RunConfig(model=str(model), prompts=4)
        options.fill_defaults(config, 10)
        return {name: getattr(config, name) for name in options.TINY}
    others = dict(options.OTHER, steps=3)  # one pass over 10 prompts, 4 a step
    copy = shutil.copytree(ROOT / "data/tiny", tmp_path / "tiny")
    assert resolved(copy) == others
    assert resolved("tiny") == others
    assert resolved("data/tiny") == options.TINY
    assert resolved(ROOT / "data/tiny") == options.TINY


def test_one_word_answers_of_a_real_model_are_short():
    """So that the first run with one takes minutes; other data keep the usual length."""
    for data, length, steps in (("categories", 8, 48), ("gsm8k", 256, 2)):
        config = runs.RunConfig(model="gpt2", data=data)
        options.fill_defaults(config, 16)
        assert (config.max_new_tokens, config.steps) == (length, steps)


def test_no_run_is_longer_than_a_thousand_steps_unless_told():
    """One pass over 36,000 prompts would be for days."""
    for given, expected in ((None, 1000), (5000, 5000)):
        config = runs.RunConfig(model="gpt2", prompts=8, steps=given)
        options.fill_defaults(config, 36_000 * 8)
        assert config.steps == expected


def test_batches_are_shuffled_passes():
    """A batch depends on step and seed alone, and each prompt comes once per pass."""
    def batch(step, prompts, seed=0):
        return train.batch_of(range(10), step, prompts, seed)
    first = batch(1, 5) + batch(2, 5)
    third = batch(5, 5) + batch(6, 5)
    assert sorted(first) == list(range(10))
    assert sorted(third) == list(range(10))
    assert first != third
    assert batch(2, 5) == first[5:]
    assert batch(1, 5, seed=1) != batch(1, 5)
    assert len(batch(2, 7)) == 7  # a step may span two passes


# --------------------------------------------------------------------- what comes with them
def test_embedded_models():
    """The tiny model is small and diverse, and the encoder knows meanings."""
    model, tokenizer = load_model("data/tiny")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert (ROOT / "data/tiny/model.safetensors").stat().st_size < 4_000_000
    torch.manual_seed(0)
    texts = sample(model, tokenizer, ["make 24"], 16, 24).texts
    assert len(set(texts)) > 8
    sentences = [
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "A cheetah is running.",
    ]
    phi = load_encoder().encode(sentences, normalize_embeddings=True)       # (3, 384)
    assert phi.shape == (3, 384)
    assert phi[0] @ phi[1] > 0.6
    assert phi[0] @ phi[2] < 0.3


def test_share_beyond_the_encoders_window():
    """Two of these four texts are longer than the window; start and end token count."""
    encoder = load_encoder()
    window = encoder.max_seq_length
    texts = ["a cat", "cat " * (window - 2), "cat " * (window - 1), "cat " * 999]
    assert share_beyond_window(encoder, texts) == 0.5
    assert share_beyond_window(object(), ["x" * 10 ** 6]) == 0.0  # it has no window
