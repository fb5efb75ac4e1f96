"""GB that a response of 512 tokens, 256 of them the prompt's, adds to the peak of a backward pass.

    python data/results/memory.py > data/results/memory.csv    # on a CPU
"""

import itertools
import os
import sys
from multiprocessing import get_context

import bench
import torch

sys.path.insert(0, str(bench.ROOT))
import dqo


def added(case):
    """From two and six responses, in a process of its own."""
    shape, bf16, lora, checkpointed = case
    model, _ = bench.make_model(shape, bool(bf16))
    if lora:
        model = bench.with_adapters(dqo.freeze(model))
    if checkpointed:
        model.activation_checkpointing_enable()
    model.train()
    peak = {}
    for k in (1, 2, 6):  # the first allocates the gradient
        tokens = torch.full((1, k, 256), 5)
        rollout = dqo.Rollout(tokens[0, :1], tokens[0, :1], tokens, tokens > 0, tokens * 0.0,
                              [], [], None)
        dqo.token_logps(model, rollout).sum().backward()
        peak[k] = bench.peak_gb()
    return (peak[6] - peak[2]) / 4


if __name__ == "__main__":
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system
    cases = [*itertools.product(bench.SHAPES, (0, 1), (0, 1), (0, 1))]
    print("shape,bf16,lora,checkpointed,gb_per_response")
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for case, gb in zip(cases, pool.imap(added, cases)):
            print(*case, f"{gb:.2f}", sep=",", flush=True)
