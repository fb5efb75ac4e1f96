"""SmolLM2 in float32, in bf16, in bf16 from dithered weights, in turn: how fast is a step, and is
as much learnt? Weights begin as bf16 numbers, as published ones are.

    python data/results/bf16.py categories 14 8 64          # data, steps, tokens, micro-batch
    python data/results/bf16.py gsm8k:FILE 4 32 16

appends to bf16.csv, a line per step and side.
"""

import sys
from pathlib import Path
from time import perf_counter

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
import dqo
from data.tasks import load_reward, load_rows

if __name__ == "__main__":
    data, steps, tokens, micro_batch = sys.argv[1], *map(int, sys.argv[2:])
    rows, encoder, sides = load_rows(data, "train"), dqo.load_encoder(), {}
    P, task = (8 if data == "categories" else 4), data.partition(":")[0]
    config = dqo.Config("dqo_quality", beta=0, max_new_tokens=tokens, micro_batch=micro_batch)
    for name in ("float32", "bf16", "bf16 dithered"):
        model, tokenizer = dqo.load_model("data/smollm2", bf16=name != "float32")
        for weight in model.parameters():
            weight.data = weight.data.bfloat16().float()
        if name == "bf16 dithered":
            dqo.dither(model)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.0, fused=True)
        sides[name] = model, tokenizer, encoder, load_reward(None, rows), optimizer
    with open(HERE / "bf16.csv", "a") as file:
        for step in range(steps):
            batch = [rows[(step * P + i) % len(rows)] for i in range(P)]
            for name, side in sides.items():
                torch.manual_seed(step)
                start = perf_counter()
                metrics, _ = dqo.dqo_step(*side, batch, config)
                numbers = perf_counter() - start, metrics["quality"], metrics["mismatch"]
                line = [task, name, str(step), *(f"{x:.4f}" for x in numbers)]
                print(",".join(line), file=file, flush=True)
