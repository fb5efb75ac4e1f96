"""The commands, as a user runs them."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
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
from data.report import plot_run, share_beyond_window, show_texts
from dqo import BadInput, sample

ROOT = Path(__file__).resolve().parent.parent
METRICS = """
    step quality gain log_det distinct length truncated empty entropy kl loss grad_norm step_s
""".split()
SAMPLE = {"step", "prompt", "response", "quality", "gain", "advantage"}
RESULT = """
    model task prompts n quality pass_at max_at distinct_correct distinct_1 distinct_4
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
        assert set(result["se"]) == set(RESULT) - {"model", "task", "prompts", "n", "se"}
        assert result["pass_at"]["1"] == pytest.approx(result["quality"])
        assert 0 <= result["distinct_correct"] <= 4
    assert (folder / "plane.png").stat().st_size > 10_000
    assert len(json_lines(folder / "s.jsonl")) == 2 * 4 * 2 * 4
    for word in ("average", "distinct correct", "±"):
        assert word in done.stdout


def test_dqo_on_texts(tmp_path):
    """Of three texts, two of them equal, the copies gain less than the third."""
    done = run("dqo.py", "a cat", "a cat", "stocks fell", cwd=tmp_path)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[1][1:3] == ["1.00", "1.00"]
    assert float(rows[1][0]) < float(rows[3][0])
    assert "log det" in done.stdout
    assert show_texts(["alone"]) == 2


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
    "eval.py data/tiny --n 1",
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


def test_exit_status_reaches_the_shell(tmp_path):
    """It is 2, with the one line."""
    for args in (["train.py", "--k", 2], ["eval.py", "data/tiny", "--n", 1]):
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
