"""More than one GPU: the gains as a reward for TRL's GRPOTrainer.

    pip install trl==1.16.0
    python data/trl_example.py                             # data/tiny on the task `story`
    accelerate launch --multi_gpu --num_processes 8 data/trl_example.py

WARNING  Each process must have whole groups.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.tasks import load_rows, story
from dqo import embed, gram, load_encoder, marginal_gains

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
    use_cpu=not torch.cuda.is_available())
encoder = load_encoder().to(args.device)  # after args: each process has its own GPU then


def quality(completions, answer, **_):  # the columns of the data set come in by name
    return [story({"answer": a}, c[-1]["content"]) for a, c in zip(answer, completions)]


def gain(prompts, completions, **_):  # the rows of one process
    k = args.num_generations
    first = [prompts[i - i % k] for i in range(len(prompts))]  # of the group of each
    assert len(prompts) % k == 0 and prompts == first, "groups are not whole"
    phi = embed(encoder, [c[-1]["content"] for c in completions])  # (P * k, D)
    return marginal_gains(gram(phi.unflatten(0, (-1, k)))).flatten().tolist()


if __name__ == "__main__":
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
            for row in load_rows("story", "train")]
    trainer = GRPOTrainer(str(ROOT / "data/tiny"), [quality, gain], args=args,
                          train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model()
