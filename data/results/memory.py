"""What a response of 512 tokens, 256 of them the prompt's, adds to the peak of a backward pass.

    python data/results/memory.py > data/results/memory.csv    # Linux, CPU
"""

import itertools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
import bench
import dqo


def added(shape, bf16, lora, checkpointed):
    """GB per response, from two and six of them in a process of its own."""
    model, _ = bench.make_model(shape, bool(bf16))
    if checkpointed:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    if lora:
        model = bench.with_adapters(dqo.freeze(model))
    model.train()
    peak = {}
    for k in (1, 2, 6):  # the first allocates the gradient
        tokens = torch.full((1, k, 256), 5)
        rollout = dqo.Rollout(tokens[0, :1], tokens[0, :1], tokens, tokens > 0, tokens * 0.0,
                              [], [], None)
        dqo.token_logps(model, rollout).sum().backward()
        peak[k] = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return (peak[6] - peak[2]) / 4 / 2 ** 20


if __name__ == "__main__":
    print("shape,bf16,lora,checkpointed,gb_per_response")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as one:
        for case in itertools.product(bench.SHAPES, (0, 1), (0, 1), (0, 1)):
            print(*case, f"{one.submit(added, *case).result():.2f}", sep=",", flush=True)
