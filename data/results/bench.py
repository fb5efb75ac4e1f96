"""How fast and how large: ours beside what one would otherwise use, in turn in one run.

    python data/results/bench.py trl --trl-python trlenv/bin/python    # a step of GRPOTrainer
    python data/results/bench.py sample                                # model.generate
    python data/results/bench.py gpu --trl-python trlenv/bin/python    # Qwen2.5-0.5B's shape

Clocks drift, so the sides take turns; numbers are medians. The sides of a step are processes, one
computing at a time. Models have random weights, and draw responses of full length.
Ours is a step of DQO, TRL's of GRPO, with bf16 products both or neither. gb: the peak of the
process, on a GPU of torch; tokens: those that went through the model with gradient, or were drawn.

    python -m venv trlenv && trlenv/bin/pip install torch==2.13.0 trl==1.16.0
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

ROOT, GPU = Path(__file__).resolve().parents[2], torch.cuda.is_available()
SHAPES = {  # vocabulary, width, MLP, layers, heads, key-value heads
    "smollm2": (49152, 576, 1536, 30, 9, 3), "qwen": (151936, 896, 4864, 24, 14, 2)}


def make_model(shape, bf16, end=-1e4):
    """(model, tokenizer): one of SHAPES at random, which draws the words of data/tiny about equally
    often. end: the logit of the end token; of 3.8 mean lengths of 16."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny")
    vocabulary, width, mlp, depth, heads, kv_heads = SHAPES[shape]
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp,
        num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0))
    bias = torch.zeros(vocabulary)
    bias[2], bias[len(tokenizer):] = end, -1e4
    model.lm_head.bias = torch.nn.Parameter(bias)
    model = model.to("cuda" if GPU else "cpu").eval()
    model.bf16 = bf16
    return model, tokenizer


def with_adapters(model):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def prompts_of(words):
    """Texts of so many words, each a token; 0: as they are."""
    texts = [json.loads(line)["prompt"] for line in (ROOT / "data/story.jsonl").open()]
    every = " ".join(texts).split()
    return [" ".join(every[i:i + words]) for i in range(99)] if words else texts


def peak_gb():
    """Of this process."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2 ** 20


# ---- a process that makes a step for each line on its standard input
class Turns:
    def __init__(self, model):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a library prints must not get between the answers
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, model, args, kwargs):
        self.tokens += kwargs["input_ids"].numel() * torch.is_grad_enabled()

    def wait(self):
        sys.stdin.readline() or os._exit(0)  # no more is asked
        self.tokens, self.start = 0, perf_counter()

    def answer(self):
        gb = peak_gb()
        if GPU:
            torch.cuda.synchronize()
            gb = torch.cuda.max_memory_allocated() / 2 ** 30
        found = dict(gb=gb, s=perf_counter() - self.start, tokens=self.tokens)
        print(json.dumps(found), file=self.out, flush=True)


def serve_dqo(spec):
    """dqo_step."""
    import dqo
    model, tokenizer = make_model(spec.shape, spec.bf16)
    if spec.lora:
        model = with_adapters(dqo.freeze(model))
    reference = dqo.freeze(make_model(spec.shape, spec.bf16)[0]) if spec.beta else None
    encoder, known, turns = dqo.load_encoder(), {}, Turns(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    rows = [dict(prompt=text) for text in prompts_of(spec.words)]
    config = dqo.Config(objective="dqo", k=spec.k, max_new_tokens=spec.T, beta=spec.beta,
                        micro_batch=spec.micro_batch)

    def reward(prompts, responses, rows):  # it costs nothing
        return [text.count("e") for text in responses]

    while True:
        turns.wait()
        batch, rows = rows[:spec.P], rows[spec.P:] + rows[:spec.P]
        dqo.dqo_step(model, tokenizer, encoder, reward, optimizer, batch, config, reference, known)
        turns.answer()


def serve_trl(spec):
    """From one on_step_end to the next: data, sampling, rewards, update."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    model, tokenizer = make_model(spec.shape, spec.bf16)
    model = with_adapters(model) if spec.lora else model
    turns = Turns(model)

    class OneAtATime(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            turns.wait()

        def on_step_end(self, *args, **kwargs):
            turns.answer()
            turns.wait()

    def reward(completions, **_):
        return [completion[0]["content"].count("e") for completion in completions]

    rows = [dict(prompt=[dict(role="user", content=text)]) for text in prompts_of(spec.words)]
    with tempfile.TemporaryDirectory() as out:
        if spec.beta:  # it loads the reference by the model's name
            model.save_pretrained(out)
            model.config._name_or_path = out
        arguments = GRPOConfig(
            out, per_device_train_batch_size=spec.micro_batch, num_generations=spec.k,
            gradient_accumulation_steps=spec.P * spec.k // spec.micro_batch, use_cpu=not GPU,
            max_completion_length=spec.T, beta=spec.beta, learning_rate=1e-6, max_steps=10 ** 6,
            bf16=spec.bf16, gradient_checkpointing=False, report_to="none", save_strategy="no")
        GRPOTrainer(model, reward, arguments, train_dataset=Dataset.from_list(rows),
                    processing_class=tokenizer, callbacks=[OneAtATime()]).train()


# ---- in turn
def in_turn(case, sides, n, warmup=1):
    """A line of CSV for each side. sides: {name: function that returns numbers}, ours first"""
    rounds = [[side() for side in sides.values()] for _ in range(warmup + n)][warmup:]
    for i, name in enumerate(sides):
        seconds = [x[i]["s"] for x in rounds]
        ratio = statistics.median(x[i]["s"] / x[0]["s"] for x in rounds)
        row = [statistics.median(x[i][key] for x in rounds) for key in ("s", "gb", "tokens")]
        row = [f"{x:.4g}" for x in (*row, min(seconds), ratio)]
        print(f'"{case}"', name, *row, sep=",", flush=True)


def ask(side):
    print("go", file=side.stdin, flush=True)
    return json.loads(side.stdout.readline() or sys.exit("a side stopped"))


def steps(o, shape, words, P, T=32, theirs=32, betas=(0.0, 0.04), loras=(0,)):
    """A step of ours, and of TRL."""
    def worker(python, side, micro_batch):
        spec = dict(side=side, shape=shape, words=words, P=P, k=8, T=T, beta=beta, bf16=bf16,
                    lora=lora, micro_batch=micro_batch)
        return subprocess.Popen([python, __file__, "worker", json.dumps(spec)], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    for lora, bf16, beta in itertools.product(loras, (True,) if GPU else (False, True), betas):
        workers = dict(ours=worker(sys.executable, "dqo", 16))
        if o.trl_python:
            workers["TRL"] = worker(o.trl_python, "trl", theirs)
        case = f"{shape}{', LoRA' * lora}, {words} tokens, bf16 {bf16:d}, beta {beta}"
        in_turn(case, {name: partial(ask, side) for name, side in workers.items()}, o.n)
        for side in workers.values():
            side.communicate()  # closes its standard input, and it ends


def sample(o, shape, bf16, end, P=8, k=8, T=64):
    """dqo.sample and model.generate."""
    import dqo
    model, tokenizer = make_model(shape, bf16, end)
    ids = [dqo.prompt_ids(tokenizer, text) for text in prompts_of(0)[:P]]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")

    def timed(function):
        start = perf_counter()
        tokens = int(function())  # waits for a GPU
        return dict(gb=math.nan, s=perf_counter() - start, tokens=tokens)

    @torch.no_grad()
    def generate():
        with dqo.precision(model):
            out = model.generate(**batch.to(model.device), do_sample=True, top_k=0,
                                 num_return_sequences=k, max_new_tokens=T, eos_token_id=2)
        is_end = (out[:, batch["input_ids"].shape[1]:] == 2).long()
        return (is_end.cumsum(1) - is_end == 0).sum()

    def ours():
        return dqo.sample(model, tokenizer, ids, k, T).mask.sum()

    lengths = "lengths differ" if end > 0 else "equal lengths"
    in_turn(f"sample, {shape}, bf16 {bf16:d}, {lengths}",
            dict(ours=partial(timed, ours), generate=partial(timed, generate)), o.n)


def main():
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "worker":
        spec = argparse.Namespace(**json.loads(sys.argv[2]))
        return serve_dqo(spec) if spec.side == "dqo" else serve_trl(spec)
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("part", choices=("trl", "sample", "gpu"))
    parser.add_argument("--trl-python", help="python of an environment with TRL")
    parser.add_argument("--n", type=int, default=5, help="steps that are measured")
    o = parser.parse_args()
    print("case,side,s,gb,tokens,least_s,times_ours")
    if o.part == "trl":
        steps(o, "smollm2", 130, P=4)
        steps(o, "smollm2", 512, P=1, theirs=8)
    if o.part == "sample":
        for bf16, end in itertools.product((False, True), (-1e4, 3.8)):
            sample(o, "smollm2", bf16, end)
    if o.part == "gpu":
        sample(o, "qwen", True, 3.8)
        steps(o, "qwen", 130, P=16, T=256, betas=(0.0,), loras=(0, 1))


if __name__ == "__main__":
    main()
