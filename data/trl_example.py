"""More than one GPU or machine: the gains as a reward for TRL's GRPOTrainer.

    pip install trl==1.16.0                                # Python 3.11 or newer
    python data/trl_example.py                             # data/tiny on the task `story`
    accelerate launch --multi_gpu --num_processes 8 data/trl_example.py

train.py is one process. Beyond that TRL is the engine, with accelerate, DeepSpeed and vLLM under
it, and gets the gains as one more reward. It adds the rewards up, and with scale_rewards="none" it
subtracts the group's mean and does nothing else: its advantages are exactly those of
`--baseline mean`, alpha being the gain's reward_weights.

WARNING  Each process sees only its own rows, so per_device_train_batch_size times
steps_per_generation (by default gradient_accumulation_steps) must be a multiple of num_generations.
TRL itself demands that only of all processes together; an assertion stops a run whose groups are
cut. Keep num_generations at 3 or more: with 2, centring leaves nothing of the gains.
WARNING  `beta` is not ours: TRL adds k3 to the loss, dqo.py takes the log-ratio off the reward.

tests/test_trl.py (`pytest -m slow`) compares the advantages, with one process and with two.
DeepSpeed and vLLM (use_vllm=True) are untested here.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
try:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
except ModuleNotFoundError as error:
    print(f"trl_example.py: there is no {error.name}: pip install trl==1.16.0", file=sys.stderr)
    sys.exit(2)

from data.models import default_device, load_encoder
from data.prompts import load_rows
from data.rewards import story
from dqo import embed, marginal_gains

args = GRPOConfig(
    "runs/trl",
    num_generations=8,  # k
    per_device_train_batch_size=64,  # 8 groups
    max_completion_length=24,
    learning_rate=3e-4,
    scale_rewards="none",
    loss_type="dr_grpo",
    reward_weights=[1.0, 1.0],  # of quality and of gain: alpha
    model_init_kwargs={"dtype": "float32"},
    use_cpu=default_device() == "cpu",
)
encoder = load_encoder(device=str(args.device))  # after args: each process has its own GPU then


def text(completion):  # plain prompts are answered with text, chat messages with chat messages
    return completion if isinstance(completion, str) else completion[-1]["content"]


def quality(completions, answer, **_):  # the columns of the data set come in by name
    return [story({"answer": a}, text(c)) for a, c in zip(answer, completions)]


def gain(prompts, completions, **_):  # the rows of one process, k after k of the same prompt
    k = args.num_generations
    first = [prompts[i - i % k] for i in range(len(prompts))]  # of the group of each
    assert len(prompts) % k == 0 and prompts == first, "groups are not whole"
    phi = embed(encoder, [text(c) for c in completions])                    # (B, D)
    return marginal_gains(phi.unflatten(0, (-1, k))).flatten().tolist()


rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]}
        for r in load_rows("story", "train")]

if __name__ == "__main__":
    trainer = GRPOTrainer(str(ROOT / "data/tiny"), [quality, gain], args=args,
                          train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model()
