"""DQO, Diversity Quality Optimization, in one file.

Reinforcement learning makes a language model better and duller: it settles on few answers
per prompt. DQO (Chen et al. 2025, arXiv 2509.04784) pays for diversity too. For each prompt
x it samples a group of k responses y_1 ... y_k, embeds them with a sentence encoder phi, and
rewards the volume that the embeddings span:

    J_k(theta) = E[ sum_i r(x, y_i) + alpha * log det(L + I) ] - k * beta * KL(pi || pi_ref)
    L_ij       = <phi(y_i), phi(y_j)>           the cosines; every phi has length 1

det L is the squared volume: 0 as soon as two responses are equal, 1 if all are orthogonal.
+ I keeps the logarithm finite, and copies gain a little. The gradient is REINFORCE with one
number per response:

    grad J_k = E[ sum_i grad log pi(y_i|x) * (r_i - beta * log(pi/pi_ref) + alpha * g_i) ]
    g_i      = log det(L + I) - log det(L_{-i} + I)        L_{-i} is L without response i

g_i is the marginal gain: the volume that response i adds to the others of its group. Three
responses, two of them equal, the third orthogonal to both:

        [1 1 0]    det(L + I) = 6     without the first or second: 4     without the third: 3
    L = [1 1 0]    g = log 6/4, log 6/4, log 6/3 = 0.41, 0.41, 0.69
        [0 0 1]

Why not pay everybody log det(L + I)? Whatever part of the volume does not depend on y_i adds
nothing but noise to volume * grad log pi(y_i), as E[grad log pi(y_i)] = 0. g_i lacks it.

If you know GRPO, four things differ: the gain is added to the reward; the group's mean is
subtracted, but nothing is divided by its standard deviation; the KL penalty is in the reward,
not in the loss; and the loss is divided by a constant, not by the lengths of the responses.

    PART 1, THE METHOD                           PART 2, THE MACHINERY
    log_det, marginal_gains   the volume         sample       k responses per prompt
    advantages                the baseline       embed        texts to unit vectors
    policy_loss               the update         token_logps  log pi of each token
    dqo_step                  one whole step

Shapes: P prompts, k responses each, B = P * k; N prompt tokens, T response tokens, S = N + T,
V vocabulary, D embedding width. Row i * k + j of a (B, ...) tensor is response j of prompt i.

    python dqo.py "paris" "paris" "rome" "nairobi"      # L, log det and gains of any texts
"""

import contextlib
import math
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class BadInput(ValueError):
    """The user gave something wrong. One line: what, where, what to do. Exit status 2."""


# ============================= PART 1: THE METHOD
# ----------------------------------------- volume
def gram(phi):
    """L_ij = <phi_i, phi_j>: (..., k, D) -> (..., k, k)."""
    return phi @ phi.transpose(-1, -2)


def gram_plus_identity(phi):
    """L + I in float64, (..., k, k). Its eigenvalues are at least 1, so it has an inverse."""
    L = gram(phi).double()
    return L + torch.eye(L.shape[-1]).to(L)


def log_det(phi):
    """Diversity of a group, log det(L + I): (..., k, D) -> (...,).

    It lies between log(1 + k), k equal responses, and k * log 2, k orthogonal ones.
    """
    return torch.logdet(gram_plus_identity(phi)).to(phi.dtype)


def marginal_gains(phi):
    """What each response adds to the volume of its group: (..., k, D) -> (..., k).

    g_i = log det(M) - log det(M_{-i}) with M = L + I. By Schur's complement
    det(M_{-i}) = det(M) * [M^-1]_ii, so that g_i = -log [M^-1]_ii: one inverse gives all k
    gains. They lie between log(1 + 1/k), all equal, and log 2, all orthogonal. In a group of
    real texts they differ by 0.05 to 0.2: at alpha = 1, that much reward.
    """
    M = gram_plus_identity(phi)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(M))
    return -inverse.diagonal(dim1=-2, dim2=-1).log().to(phi.dtype)


def quality_weighted(phi, q):
    """L_ij becomes sqrt(q_i q_j) L_ij: (..., k, D), (..., k) -> (..., k, D).

    A response of quality 0 then spans nothing and gains nothing: strangeness cannot buy
    reward. NOTE  Ours, not the paper's. q_i must lie in [0, 1] and depend on y_i alone: with a
    statistic of the group in it, the gradient would no longer be exact.
    """
    return phi * q.to(phi.dtype).sqrt()[..., None]


def gaussian(phi):
    """Vectors with the products exp(-|phi_i - phi_j|^2 / 2), a kernel of the authors' code.

    (..., k, D) -> (..., k, k). Orthogonal texts are 0.37 alike in it, so gains are smaller:
    alpha does not carry over.
    """
    L = (gram(phi).double() - 1).exp()  # |phi_i - phi_j|^2 = 2 - 2 cos
    eigenvalues, vectors = torch.linalg.eigh(L)
    vectors = vectors * eigenvalues.clamp(min=0).sqrt()[..., None, :]
    return vectors.to(phi.dtype) * phi.any(-1, keepdim=True)  # an empty text still spans nothing


# ------------------------------------- advantages
def advantages(quality, bonus, baseline):
    """quality + bonus minus a baseline over the prompt's own group: (P, k, ...), dimension 1.

    none  nothing is subtracted: the exact gradient of J_k, with high variance
    mean  the group's mean: exactly the gradient of J_{k-1}, with lower variance (default)
    std   also divided by the group's standard deviation, as in GRPO. That is the gradient of
          nothing, and blows up tiny gains where all qualities are equal

    Why k - 1? Let v be log det(L + I), v_{-j} the same without response j, g_j = v - v_{-j},
    and s_i = grad log pi(y_i). As E[s_i v_{-i}] = 0, in expectation s_i g_i is s_i v, and

        sum_i s_i (g_i - mean_j g_j)
            = sum_i s_i v (1 - 1/k) - 1/k sum_i sum_{j != i} s_i (v - v_{-j})
            = 1/k sum_j sum_{i != j} s_i v_{-j}               v: k - 1 terms cancel
            = gradient of E[volume of k - 1 responses]

    Likewise for the rewards. tests/test_gradient.py enumerates all groups of a policy.
    """
    total = quality + bonus
    if baseline == "none":
        return total
    centred = total - total.mean(dim=1, keepdim=True)
    if baseline == "mean":
        return centred
    return centred / (total.std(dim=1, keepdim=True) + 1e-4)


# --------------------------------------- the loss
def policy_loss(logp, weight, mask, max_new_tokens, old_logp=None, clip=0.2):
    """The surrogate whose gradient is the policy gradient, and a dict of sums.

    logp:        (B, T) log pi of each token, with gradient
    weight:      the advantages: (B,), or (B, T), one per token
    mask:        (B, T) bool, the tokens of the response
    old_logp:    (B, T) before the update: the clipped ratio of PPO and GRPO. None, or in the first
                 epoch, the ratio is 1, and its gradient is REINFORCE's grad log pi.

    We divide by B * max_new_tokens, a constant. Dividing by the actual lengths would favour
    the tokens of short responses, and the gradient would depend on the micro-batches.

    WARNING  The value says nothing about progress: advantages are centred.
    """
    if weight.dim() == 1:
        weight = weight[:, None]  # (B, 1)
    if old_logp is None:
        old_logp = logp.detach()
    ratio = (logp - old_logp).exp()
    free = ratio * weight
    clipped = ratio.clamp(1 - clip, 1 + clip) * weight
    surrogate = torch.minimum(free, clipped)  # no reward for moving beyond the clip
    loss = -(surrogate * mask).sum() / (len(mask) * max_new_tokens)
    return loss, {
        "clipped": ((surrogate < free) & mask).sum().item(),
        "entropy": -(logp.detach() * mask).sum().item(),  # estimated
    }


# --------------------------------- the objectives
OBJECTIVES = {}  # by name. data/objectives.py adds those of other papers


def objective(alpha=1.0, highest_alpha=math.inf, embeds=True, smallest_group=(1, 2)):
    """Decorator: the function becomes an --objective under its own name.

    It gets the qualities (P, k), phi (P, k, D) as the kernel has it, the log-probability of each
    token logp (P, k, T), NaN after a response's end, and alpha. It returns a bonus: (P, k),
    added to the quality before the baseline, or (P, k, T or 1), added to each token's advantage
    after it. No derivative flows through it.

    alpha, highest_alpha:  its strength by default, and at most
    embeds:                whether it looks at phi, which is None otherwise
    smallest_group:        the smallest k that carries its signal: without, and with a baseline
    """
    def register(function):
        function.alpha, function.highest_alpha = alpha, highest_alpha
        function.embeds, function.smallest_group = embeds, smallest_group
        OBJECTIVES[function.__name__] = function
        return function
    return register


@objective(embeds=False)
def grpo(quality, phi, logp, alpha):
    """Quality alone, to compare with. With the mean baseline this is Dr. GRPO."""
    return torch.zeros_like(quality)


@objective(smallest_group=(2, 3))  # with a baseline, k = 3 updates like 2 responses
def dqo(quality, phi, logp, alpha):
    """The paper's objective: each response is paid for the volume that it adds."""
    return alpha * marginal_gains(phi)


# ------------------------------------ the options
def option(default, meaning, **limits):
    """A field of Config and its help text. train.py makes a flag of it."""
    return field(default=default, metadata={"help": meaning, **limits})


@dataclass
class Config:
    """Every hyper-parameter. What is still None depends on the model: train.py fills it in."""

    # the objective
    objective: str = option("dqo", "what is optimised: a name, or file.py:function")
    alpha: float | None = option(None, "strength of diversity [the objective's own]", low=0)
    kernel: str = option("plain", "of the volume; quality: wrong answers span nothing",
                         choices=("plain", "quality", "gaussian"))
    baseline: str = option("mean", "what is subtracted within a group",
                           choices=("mean", "none", "std"))
    # the rollout
    k: int = option(8, "responses per prompt", low=1)
    prompts: int = option(8, "prompts per step", low=1)
    temperature: float = option(1.0, "of sampling and of the policy that is trained", low=0.01)
    max_new_tokens: int | None = option(None, "longest response [tiny: 24, else 256]", low=1)
    # the update. A real model needs a small lr and beta > 0, or it unlearns its language.
    steps: int | None = option(None, "optimizer steps [tiny: 640, else one pass]", low=1)
    epochs: int = option(1, "gradient steps per rollout; above 1 the ratio is clipped", low=1)
    clip: float = option(0.2, "clip range of the ratio, with --epochs > 1", low=0)
    beta: float | None = option(None, "strength of the KL penalty [tiny: 0, else 0.02]", low=0)
    lr: float | None = option(None, "learning rate of AdamW [tiny: 3e-4, else 5e-6]", low=0)
    micro_batch: int | None = option(None, "responses per backward pass, 0 = all "
                                           "[tiny: 32, else 16]", low=0)
    plain: bool = option(False, "do not wrap prompts in the tokenizer's chat template")
    template_args: dict | None = option(None, 'of the template: {"enable_thinking": false}')
    seed: int = option(0, "random seed", low=0)

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise BadInput(f"--objective is {self.objective}: choose from {', '.join(OBJECTIVES)}; "
                           "import data.objectives for more")
        if self.alpha is None:
            self.alpha = OBJECTIVES[self.objective].alpha


# --------------------------------- the whole step
def dqo_step(model, tokenizer, encoder, reward, optimizer, rows, config,
             reference=None, memory=None):
    """One step of the algorithm: sample, judge, embed, weigh, update. Returns metrics.

    model:      updated in place by `optimizer`, once per epoch
    encoder:    see `embed`; used by objectives that embed
    reward:     function(prompts, responses, rows) -> B numbers; reward.range says where they
                lie, (-inf, inf) if they are unbounded
    rows:       P dicts with "prompt" and whatever the reward needs
    config:     with every option filled in
    reference:  the frozen starting model, with beta > 0
    memory:     a dict kept from step to step: known embeddings, centre of the reward, skips

    metrics["samples"] holds the responses. Raises BadInput if a number is not finite, before
    the weights are touched (in the first epoch).
    """
    P, k = len(rows), config.k
    memory = {} if memory is None else memory
    bonus_of = OBJECTIVES[config.objective]
    tick = stopwatch(model.device)

    # 1. Sample k responses per prompt.
    ids = [prompt_ids(tokenizer, row["prompt"], config.plain, config.template_args)
           for row in rows]
    rollout = sample(model, tokenizer, ids, k, config.max_new_tokens, config.temperature)
    each = [row for row in rows for _ in range(k)]  # the row of each response
    check = finite_check(each, rollout.texts)
    tick("sample_s")

    # 2. Judge each. This is the only place where the task comes in.
    scores = reward([row["prompt"] for row in each], rollout.texts, each)
    quality = torch.tensor(scores, dtype=torch.float32).view(P, k)
    check("quality", quality)
    tick("reward_s")

    # 3. Embed them: the volume of each group, and what each response adds to it.
    phi, gain, volume = None, torch.full((P, k), math.nan), math.nan
    if bonus_of.embeds:
        known = memory.setdefault("known", {})
        phi = embed(encoder, rollout.texts, known).view(P, k, -1)  # (P, k, D)
        check("embedding", phi.sum(-1))
        tick("embed_s")
        volume = log_det(phi).mean().item()  # of the plain kernel, so that runs compare
        if config.kernel == "quality":
            phi = quality_weighted(phi, squashed(quality, reward, memory, check))
        if config.kernel == "gaussian":
            phi = gaussian(phi)
        gain = marginal_gains(phi)  # (P, k) for the log; `dqo` computes its own
    mask = rollout.mask.view(P, k, -1).cpu()  # (P, k, T)
    logp = rollout.logp.view(P, k, -1).cpu().masked_fill(~mask, math.nan)  # (P, k, T)
    bonus = bonus_of(quality, phi, logp, config.alpha)  # (P, k), or (P, k, T or 1)
    token_bonus = torch.zeros(P, k, 1)
    if bonus.dim() == 3:  # the objective weighs tokens
        bonus, token_bonus = torch.zeros(P, k), torch.where(mask, bonus, 0.0)  # (P, k, T)
    check("bonus", bonus + token_bonus.sum(-1))
    tick("gains_s")

    # 4. The KL penalty is part of the reward: log(pi/pi_ref), detached, times grad log pi is the
    # exact gradient of KL(pi || pi_ref). Each token answers for the log-ratios from it on, as
    # what came before is no consequence of it: the same expectation, mostly less variance.
    # WARNING  The popular k3 estimator, differentiated as a loss, gives the gradient of
    # KL(pi_ref || pi) instead. Here k3 is only reported.
    penalty, kl = torch.zeros(P, k, 1), 0.0
    if config.beta > 0:
        log_ratio = rollout.logp - logps_of(reference, rollout, config)  # (B, T)
        kl = (((-log_ratio).exp() - 1 + log_ratio).sum() / (P * k)).item()
        to_go = log_ratio.flip(1).cumsum(1).flip(1)
        penalty = config.beta * to_go.view(P, k, -1).cpu()  # (P, k, T)

    # 5. An advantage per response, with beta > 0 per token, from its own group.
    advantage = advantages(quality[..., None] - penalty, bonus[..., None], config.baseline)
    weight = (advantage + token_bonus).flatten(0, 1)  # (B, 1), or (B, T)

    # 6. Move the weights of the model.
    metrics = update(model, optimizer, rollout, weight.to(model.device), config, memory, check)
    tick("update_s")
    bonus = bonus + token_bonus.sum(-1) / mask.sum(-1)
    said = summary(rows, rollout, quality, bonus, penalty[..., 0], gain, weight[:, 0])
    return dict(said, log_det=volume, kl=kl, **metrics, **tick.seconds)


def summary(rows, rollout, quality, bonus, penalty, gain, advantage):
    """What the log says of the responses of a step, and the responses themselves.

    The `..._std` are mean standard deviations within groups: how much each term decides.
    """
    P, k = quality.shape
    texts, columns = rollout.texts, zip(*(x.flatten().tolist() for x in (quality, gain, advantage)))
    samples = [
        dict(prompt=rows[i // k]["prompt"], response=texts[i], quality=q, gain=g, advantage=a)
        for i, (q, g, a) in enumerate(columns)]
    return dict(
        quality=quality.mean().item(),
        gain=gain.mean().item(),
        distinct=sum(len(set(texts[i:i + k])) for i in range(0, P * k, k)) / (P * k),
        length=rollout.mask.sum().item() / (P * k),
        truncated=rollout.truncated.float().mean().item(),
        empty=sum(not text.strip() for text in texts) / (P * k),
        quality_std=quality.std(1, correction=0).mean().item(),
        bonus_std=bonus.std(1, correction=0).mean().item(),
        penalty_std=penalty.std(1, correction=0).mean().item(),
        samples=samples)


def update(model, optimizer, rollout, weight, config, memory, check):
    """Optimizer steps on one rollout, one per epoch. weight: (B, 1) or (B, T).

    The metrics are those of the last epoch. `drift` is |log pi scored - log pi sampled| per
    token before the update, which is rounding, unless the two see different policies. A
    gradient that is not finite is `skipped`; the third in a row raises BadInput.
    """
    count, total, skipped = len(rollout.texts), rollout.mask.sum().item(), 0
    model.train()  # for gradient checkpointing; all dropout must be 0
    old = torch.zeros_like(rollout.logp)
    for epoch in range(config.epochs):
        optimizer.zero_grad(set_to_none=True)
        metrics = dict(loss=0.0, clipped=0.0, entropy=0.0)
        for index, part in micro_batches(rollout, config):
            T = part.mask.shape[1]
            share = len(index) / count  # so that the parts add up to the whole batch
            logp = token_logps(model, part, config.temperature)  # (b, T)
            check("log-probability", logp.detach().sum(1), index.tolist())
            if epoch == 0:  # not rollout.logp: in bf16 only the same forward gives ratio 1
                old[index, :T] = logp.detach()
            loss, sums = policy_loss(logp, weight[index, :T], part.mask, config.max_new_tokens,
                                     old[index, :T], config.clip)
            (loss * share).backward()
            metrics["loss"] += loss.item() * share
            metrics["clipped"] += sums["clipped"] / total
            metrics["entropy"] += sums["entropy"] / total
        # Adam ignores the scale of the loss; this clip only tames outliers.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        if math.isfinite(norm):
            optimizer.step()
            memory["skipped"] = 0
            continue
        skipped, memory["skipped"] = skipped + 1, memory.get("skipped", 0) + 1
        if memory["skipped"] >= 3:
            suspect = weight.abs().amax(1).argmax().item()
            check("gradient", torch.tensor([norm]), [suspect])
    optimizer.zero_grad(set_to_none=True)  # frees the memory for the next rollout
    drift = (old - rollout.logp).abs().sum().item() / total
    return dict(metrics, grad_norm=norm, drift=drift, skipped=skipped)


def micro_batches(rollout, config):
    """Yields (index, part): whole groups, so that a prompt runs once, unless one is too large.

    The longest come first: if the memory is too small, that shows at once.
    """
    B, k = len(rollout.texts), config.k
    size = config.micro_batch or B
    longest = rollout.attention_mask.sum(1).view(-1, k).amax(1)  # (P,)
    order = longest.argsort(descending=True, stable=True).cpu()
    groups = torch.arange(B).view(-1, k)[order]  # (P, k)
    for some in groups.split(max(1, size // k)):
        for index in some.flatten().split(size):
            yield index, rollout.select(index)


@torch.no_grad()
def logps_of(model, rollout, config):
    """log pi of all response tokens under a model, (B, T), a micro-batch at a time."""
    logp = torch.zeros_like(rollout.logp)
    for index, part in micro_batches(rollout, config):
        logp[index, :part.mask.shape[1]] = token_logps(model, part, config.temperature)
    return logp


def squashed(quality, reward, memory, check):
    """Quality in [0, 1] for the quality kernel. A sigmoid where the reward is unbounded.

    Its centre, the mean of the first rollout, stays, as q_i must depend on y_i alone.
    """
    if getattr(reward, "range", None) == (-math.inf, math.inf):
        return torch.sigmoid(quality - memory.setdefault("center", quality.mean().item()))
    check("quality (for --kernel quality: in [0, 1])", quality, low=0, high=1)
    return quality


def finite_check(rows, texts):
    """A check that names the first response whose value is out of range, infinite or NaN."""
    def check(what, values, index=None, low=-1e38, high=1e38):
        for j, value in enumerate(values.flatten().tolist()):
            if not low <= value <= high:
                i = j if index is None else index[j]
                raise BadInput(f"the {what} is {value:.6g} for the prompt "
                               f"{str(rows[i]['prompt'])[-80:]!r} and the response "
                               f"{texts[i][:80]!r}")
    return check


def stopwatch(device):
    """tick(name) notes the seconds since the last tick, in tick.seconds."""
    def tick(name):
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        tick.seconds[name], tick.last = now - tick.last, now
    tick.seconds, tick.last = {}, time.perf_counter()
    return tick


# ========================== PART 2: THE MACHINERY
# --------------------------------------- sampling
# `model.generate` would do. This loop keeps the log-probabilities it draws from, runs each
# prompt once instead of k times, and lets responses leave the batch when they have ended.

@dataclass
class Rollout:
    """What `sample` drew. Example with N = 3, T = 4, pad = 0, end = 2:

        tokens          [0 5 6 | 7 8 2 0]    left-padded prompt | response
        attention_mask  [0 1 1 | 1 1 1 0]    real tokens
        mask                   [1 1 1 0]     the response, with its end token
    """

    tokens: torch.Tensor          # (B, S) long
    attention_mask: torch.Tensor  # (B, S) long
    prompt_length: int            # N, with padding
    mask: torch.Tensor            # (B, T) bool
    logp: torch.Tensor            # (B, T) float32, as drawn; 0 outside mask
    texts: list                   # B strings, without special tokens
    truncated: torch.Tensor       # (B,) bool: no end token within max_new_tokens

    def select(self, index):
        """Some rows, with columns that are padding in all of them cut off on both sides."""
        index = torch.arange(len(self.texts))[index]
        N, T = self.prompt_length, int(self.mask[index].sum(1).max())
        first = int(self.attention_mask[index].argmax(1).min())  # leftmost real token
        columns = slice(first, N + T)
        return Rollout(
            tokens=self.tokens[index, columns],
            attention_mask=self.attention_mask[index, columns],
            prompt_length=N - first,
            mask=self.mask[index, :T],
            logp=self.logp[index, :T],
            texts=[self.texts[i] for i in index],
            truncated=self.truncated[index])


def prompt_ids(tokenizer, prompt, plain=False, template_args=None):
    """Token ids of a prompt: a text, or chat messages; a final assistant message is continued.

    Text goes through the chat template if there is one. A template writes its own start
    token, so it returns ids: to tokenize its text would add a second one.
    """
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return prompt  # they are token ids already
    if isinstance(prompt, str):
        if plain or not tokenizer.chat_template:
            ids = list(tokenizer(prompt).input_ids)
            if ids[1:] and ids[-1:] == tokenizer("").input_ids[-1:]:
                ids.pop()  # this tokenizer ends every text, but a prompt must stay open
            return ids
        prompt = [{"role": "user", "content": prompt}]
    begun = prompt[-1]["role"] == "assistant"
    return list(tokenizer.apply_chat_template(
        prompt, add_generation_prompt=not begun, continue_final_message=begun, tokenize=True,
        return_dict=False, **(template_args or {})))


def end_tokens(model, tokenizer):
    """All ids that end a response, (E,): the tokenizer's and those of the model's config."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    ids = {tokenizer.eos_token_id, *ids} - {None}
    if not ids:
        raise BadInput("neither the tokenizer nor the model's generation config "
                       "names an end token")
    return torch.tensor(sorted(ids), device=model.device)


def autocast(device):
    """bf16 matrix products on CUDA; the weights stay float32, bf16 would lose steps of 1e-6."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    # cuDNN's attention: NaN gradients on Hopper (pytorch#196678), wrong text on B200, and a new
    # plan for every length, which is every token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not torch.cuda.is_bf16_supported(including_emulation=False):  # T4, V100
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.bfloat16)


def positions(attention_mask):
    """Position ids that do not count padding: [0 0 1 1 1] -> [0 0 0 1 2]."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def log_softmax(logits, temperature):
    """(..., V) -> (..., V) float32. Sampling and scoring share it: with two temperatures the
    gradient would be that of another policy."""
    return torch.log_softmax(logits.float() / (temperature or 1), dim=-1)


def draw(log_probs, u):
    """One token per row by inverse CDF: (R, V), (R,) uniform in [0, 1) -> (R, 1).

    Example: [.2 .5 .3] accumulates to [.2 .7 1.]; u = .1 gives token 0, .2 token 1, .9 token 2.

    WARNING  In float32 a token of probability below 1e-7 no longer changes a sum near 1: it
    would never be drawn. Hence float64, and u times the row's own last value.
    """
    cdf = log_probs.double().exp().cumsum(1)  # (R, V)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    return token.clamp(max=cdf.shape[1] - 1)


def left_padded(ids, pad, device):
    """Lists of token ids -> (P, N) tokens and (P, N) attention mask.

    Padded on the left, every prompt ends at column N - 1 and every response starts at N.
    """
    N = max(map(len, ids))
    tokens = torch.tensor([[pad] * (N - len(x)) + x for x in ids], device=device)
    mask = torch.tensor([[0] * (N - len(x)) + [1] * len(x) for x in ids], device=device)
    return tokens, mask


def run_prompts(model, tokens, mask):
    """The KV cache of some prompts and the logits of their last position, (P, V)."""
    out = model(input_ids=tokens, attention_mask=mask, position_ids=positions(mask),
                use_cache=True, logits_to_keep=1)
    kind = tokens.device.type
    if torch.is_autocast_enabled(kind):
        keep_in(torch.get_autocast_dtype(kind), out.past_key_values)
    return out.past_key_values, out.logits[:, -1]


def keep_in(dtype, cache):
    """Keep keys and values in the type that attention casts them to anyway: half the memory."""
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
    update = cache.update
    cache.update = lambda k, v, *rest, **named: update(k.to(dtype), v.to(dtype), *rest, **named)


def select_rows(cache, index):
    """Row i of a cache becomes what its row index[i] was."""
    recurrent = any(hasattr(layer, "conv_states") for layer in cache.layers)  # hybrid models
    (cache.reorder_cache if recurrent else cache.batch_select_indices)(index)


@torch.no_grad()
def sample(model, tokenizer, prompts, k, max_new_tokens, temperature=1.0):
    """Draw k responses to each of P prompts: texts, chat messages, or lists of token ids.

    Without top-p and top-k, whatever the model recommends: the gradient needs the policy that
    sampled. The model is left in eval mode. Raises BadInput for a prompt without tokens, a
    model without an end token, numbers that are not finite.
    """
    device, T = model.device, max_new_tokens
    model.eval()  # gradient checkpointing in train mode would drop the KV cache
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    if not all(ids):
        raise BadInput(f"prompt {ids.index([]) + 1} of the batch has no tokens")
    end = end_tokens(model, tokenizer)  # (E,)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(end[0])
    prompt, prompt_mask = left_padded(ids, pad, device)  # (P, N)
    B, N = len(ids) * k, prompt.shape[1]
    tokens = F.pad(prompt.repeat_interleave(k, 0), (0, T), value=pad)  # (B, N + T)
    attention_mask = F.pad(prompt_mask.repeat_interleave(k, 0), (0, T))
    logp = torch.zeros(B, T, device=device)

    with autocast(device):
        cache, logits = run_prompts(model, prompt, prompt_mask)  # each prompt once,
        select_rows(cache, torch.arange(B, device=device) // k)  # then k copies of its cache
        logits = logits.repeat_interleave(k, 0)  # (B, V)
        alive = torch.arange(B, device=device)  # (R,) rows that have not ended, as [0 2 5]
        for t in range(T):
            log_probs = log_softmax(logits, temperature)  # (R, V)
            # Numbers for all B rows, so that a row's do not depend on which others have left.
            u = torch.rand(B, dtype=torch.float64, device=device)[alive]  # (R,)
            token = draw(log_probs, u)  # (R, 1)
            if temperature == 0:
                token = log_probs.argmax(1, keepdim=True)
            tokens[alive, N + t] = token[:, 0]
            attention_mask[alive, N + t] = 1
            logp[alive, t] = log_probs.gather(1, token)[:, 0]
            # WARNING  Never find the end by the pad id: it is often the same id.
            goes_on = ~torch.isin(token[:, 0], end)  # (R,)
            if t == T - 1 or not goes_on.any():
                break
            if not goes_on.all():
                select_rows(cache, goes_on.nonzero()[:, 0])
                alive, token = alive[goes_on], token[goes_on]
            seen = attention_mask[alive, :N + t + 1]
            logits = model(input_ids=token, attention_mask=seen,
                           position_ids=positions(seen)[:, -1:],
                           past_key_values=cache, use_cache=True).logits[:, -1]

    if not logp.isfinite().all():
        i = (~logp.isfinite()).any(1).nonzero()[0, 0].item() // k
        raise BadInput("the model's log-probabilities are not finite for the prompt "
                       f"{tokenizer.decode(ids[i])[-80:]!r}")
    longest = t + 1
    tokens, attention_mask = tokens[:, :N + longest], attention_mask[:, :N + longest]
    mask = attention_mask[:, N:].bool()  # (B, longest)
    is_end = torch.isin(tokens[:, N:], end) & mask
    spoken = (mask & ~is_end).cpu()
    texts = [tokenizer.decode(row[keep], skip_special_tokens=True)
             for row, keep in zip(tokens[:, N:].cpu(), spoken)]
    return Rollout(tokens, attention_mask, N, mask, logp[:, :longest], texts, ~is_end.any(1))


# -------------------------------------- embedding
def embed(encoder, texts, known=None):
    """Sentence embeddings of length 1, (B, D) float32 on the CPU.

    encoder:  anything with sentence-transformers' `.encode(list of str)`
    known:    a dict that the caller keeps. Equal texts are encoded once, with it also across
              calls.

    Only the response is embedded: the prompt, common to a group, would make all k alike. A
    zero vector (an empty text, to some encoders) stays one: it spans and gains nothing.
    """
    texts = [text.rpartition("</think>")[2] for text in texts]  # what a thinking model answers
    known = {} if known is None else known
    if len(known) > 20_000:  # 30 MB at D = 384
        known.clear()
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        vectors = torch.as_tensor(encoder.encode(new)).float().cpu()  # (len(new), D)
        known.update(zip(new, F.normalize(vectors, dim=-1)))
    return torch.stack([known[text] for text in texts])


# ---------------------------------------- scoring
def token_logps(model, rollout, temperature=1.0, chunk=2 ** 22):
    """log pi of each response token, (B, T), differentiable once; 0 outside rollout.mask.

    What it computes is

        logits = model(tokens).logits[:, N - 1:-1]       # each position predicts the next
        return log_softmax(logits).gather(-1, tokens[:, N:])

    in less memory (`PickedLogProbs`) and time: like in `sample`, the prompt of a group runs
    once. chunk: at most so many logits are normalised at a time.

    WARNING  Take the logits from the model's own forward: some models cap or scale them.
    """
    N = rollout.prompt_length
    tokens, mask = rollout.tokens[:, :-1], rollout.attention_mask[:, :-1]  # (B, S - 1)
    target = rollout.tokens[:, N:]  # (B, T)
    cache = None
    with autocast(model.device):
        if N > 1 and shares_prompts(model):
            # All of the prompt but its last token, whose logits predict the first response
            # token. Gradients of the k rows add up in the shared part.
            cache = shared_cache(model, tokens[:, :N - 1], mask[:, :N - 1])
            tokens = tokens[:, N - 1:]  # (B, T)
        logits = model(input_ids=tokens, attention_mask=mask,
                       position_ids=positions(mask)[:, -tokens.shape[1]:],
                       past_key_values=cache, use_cache=cache is not None,
                       logits_to_keep=target.shape[1]).logits  # (B, T, V)
    at_a_time = max(1, chunk // logits.shape[-1])
    logp = PickedLogProbs.apply(logits.flatten(0, 1), target.flatten(), temperature, at_a_time)
    return logp.view_as(target).masked_fill(~rollout.mask, 0.0)  # (B, T)


def shares_prompts(model):
    """Whether gradients can flow through a KV cache. Gradient checkpointing goes without one,
    and a model with a recurrent state (Qwen3.5, Jamba) overwrites it."""
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    return not (checkpointed or getattr(model, "_is_stateful", False))


def shared_cache(model, tokens, mask):
    """The KV cache of (B, n) prompts, running equal ones once. (Equal masks too: the pad id
    may be that of a real token.)"""
    both, which = torch.stack([tokens, mask]).unique(dim=1, return_inverse=True)  # (2, p, n)
    cache, _ = run_prompts(model, *both)
    select_rows(cache, which)  # which: (B,) the prompt of each row
    return cache


class PickedLogProbs(torch.autograd.Function):
    """log_softmax(logits)[token]: (n, V), (n,) -> (n,), with the gradient kept in `logits`.

    The logits are the largest tensor of a run: 8 GB for 64 x 256 tokens of 128k. Autograd keeps
    four of that size; here it is one, because the gradient is simple,
    (onehot(token) - p) / temperature, and can overwrite the logits at once.

    WARNING  So the logits are gone after forward, and there can be only one backward.
    """

    @staticmethod
    def forward(ctx, logits, token, temperature, at_a_time):
        if ctx.needs_input_grad[0] and (logits if logits._base is None else logits._base).is_leaf:
            raise ValueError("these logits are parameters: they would be overwritten")
        picked = []
        for part, index in zip(logits.split(at_a_time), token[:, None].split(at_a_time)):
            log_probs = log_softmax(part, temperature)  # (c, V)
            picked.append(log_probs.gather(1, index))  # (c, 1)
            if ctx.needs_input_grad[0]:
                onehot_minus_p = log_probs.exp_().neg_()
                onehot_minus_p.scatter_add_(1, index, torch.ones_like(picked[-1]))
                part.copy_(onehot_minus_p / temperature)  # part is a view into logits
        ctx.save_for_backward(logits)
        return torch.cat(picked)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.saved_tensors[0].mul_(grad[:, None]), None, None, None


if __name__ == "__main__":
    from data.report import show_texts
    sys.exit(show_texts(sys.argv[1:]))
