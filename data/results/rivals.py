"""The objectives of other papers, to compare with, in the same trainer:

    python train.py --objective darling --alpha 0.7

Each says what a response is paid, as `grpo` and `dqo` in dqo.py do, and its default strength alpha
is the published one, where we know of one. r is the quality (P, k), "right" means 1, and L holds
the cosines (P, k, k), of groups of k >= 2. Your own is such a function too, in any file:

    def shorter(quality, L, rollout, alpha=0.01):      # --objective my.py:shorter
        return quality - alpha * rollout.mask.sum(-1).to(quality)  # a price per token

An empty text has a row of zeros in L, L_ii too: it spans nothing, so volume pays it nothing. To a
sum of cosines, however, it is as different as can be. So the others count it as like all texts:
emptiness must not pay.

NOTE  All goes through the baseline here, with one trainer for all. `entropy` and `setpo` were
published outside of it; `likelihood` and `dra` with a division by the group's standard deviation
(`--baseline std`), `darling` without.
"""

import itertools
import math

import torch

from dqo import BadInput, marginal_gains

RIGHT = 1 - 1e-6  # .7 + .2 + .1 is right


def empty(L):
    """(P, k): the empty texts."""
    return L.diagonal(dim1=-2, dim2=-1) < 0.5


def cosines(L):
    """L, with empty texts like all others."""
    nothing = empty(L)
    return L.masked_fill(nothing[:, :, None] | nothing[:, None, :], 1.0)


def same_cluster(L, cosine):
    """(P, k, k) of 0 and 1: pairs that are linked, directly or through others, by cosines above
    `cosine`. Squaring doubles the number of links that a path may have."""
    links = (L > cosine).double().maximum(torch.eye(L.shape[-1], dtype=torch.float64))
    for _ in range(L.shape[-1].bit_length()):
        links = (links @ links).clamp(max=1)
    return links


# ------------------------------- distances, added
def pairwise(quality, L, rollout, alpha=1.0):
    """r + alpha * the mean distance to the others, 1 - L_ij.

    Deviation (Chung et al. 2025) as RL: the exact marginal gain of sum_{i<j} (1 - L_ij) / (k - 1).
    Its mean, 1 - |E phi|^2, sees clusters e1 e1 e2 e2 and four answers with all cosines 1/3 as
    equal, 2/3; log det(L + I) is 2.197 and 2.631.
    """
    distance = 1 - cosines(L)  # the diagonal adds 0
    return quality + alpha * distance.sum(-1) / (L.shape[-1] - 1)


def setpo(quality, L, rollout, alpha=5.0):
    """r + alpha * (D - D_{-i}), with D = mean_i -log(1 + mean_j L_ij), j = i too; D_{-i} is
    without response i (SetPO, ICML 2026). Its strength is unknown to us: 5 is ours."""
    k, similar = L.shape[-1], cosines(L)
    whole = -torch.log1p(similar.mean(-1)).mean(-1, keepdim=True)  # (P, 1)
    # Leaving i out takes L_ij off the sum of each j, and j = i itself must add log 1 = 0.
    others = (similar.sum(-1)[:, None, :] - similar) * (1 - torch.eye(k))  # (P, i, j)
    without = -torch.log1p(others / (k - 1)).sum(-1) / (k - 1)  # (P, k)
    return quality + alpha * (whole - without)


def repexp(quality, L, rollout, alpha=1.0):
    """r + alpha * phi_i' (I + sum_j phi_j phi_j')^-1 phi_i, j = i too: how far a response lies
    off the others (RepExp, ICLR 2026). It is 1 - exp(-g_i): dqo's ranking, another scale."""
    return quality - alpha * torch.expm1(-marginal_gains(L))


# ----------------- a reward is worth less if common
# WARNING  They scale a response's own reward and ignore what it does to those of the others: they
# follow the gradient of no stated objective. A reward of 0 or less is left alone: scaled down, a
# copy of something bad would be better than the original.
def scaled(quality, factor):
    return torch.where(quality > 0, quality * factor, quality)


def darling(quality, L, rollout, alpha=0.8):
    """r * (k - size of the response's cluster) / (k - 1), and a tenth at least (DARLING, Li et
    al. 2025, where a trained classifier decides; here clusters are linked by cosines > alpha)."""
    k = L.shape[-1]
    size = same_cluster(L, alpha).sum(-1).masked_fill(empty(L), k)  # (P, k)
    return scaled(quality, ((k - size) / (k - 1)).clamp(min=0.1))


def dra(quality, L, rollout, alpha=1.0):
    """r / (sum_j max(L_ij, 0))^alpha, j = i too (DRA-GRPO, Chen et al. 2025)."""
    crowd = L.clamp(min=0).sum(-1).masked_fill(empty(L), L.shape[-1])  # (P, k)
    return scaled(quality, crowd ** -alpha)


def likelihood(quality, L, rollout, alpha=0.25):
    """r * (1 - alpha * rank / k), alpha <= 1. rank: how many of the group, wrong ones too, are
    less likely per token, by 1e-4 (He et al. 2025, "Rewarding the Unlikely")."""
    per_token = (rollout.logp.sum(-1) / rollout.mask.sum(-1)).to(quality)  # (P, k)
    rank = (per_token[:, :, None] > per_token[:, None, :] + 1e-4).sum(-1)  # (P, k)
    return scaled(quality, 1 - alpha * rank / L.shape[-1])


# --------------------- rewards alone, no encoder
def entropy(quality, L, rollout, alpha=0.01):
    """r - alpha * (log pi(token) + 1) / length for the tokens of right answers (R1-zero-Div, Yao
    et al. 2025): -(log p + 1) dp is the gradient of -p log p. Wrong ones would gain by it."""
    logp, mask = rollout.logp.to(quality), rollout.mask.to(quality)  # (P, k, T)
    price = (logp + 1) * mask / mask.sum(-1, keepdim=True)
    return quality[..., None] - alpha * (quality >= RIGHT)[..., None] * price


def passk(quality, L, rollout, alpha=4):
    """What a response does for pass@m, m = alpha: a right one is worth the probability that m - 1
    of the k - 1 others are all wrong, any other 0. Without a baseline that is the gradient of
    pass@m times k / m (PKPO; Pass@k Training, 2025)."""
    k, m = quality.shape[1], int(alpha)
    if not 1 <= m == alpha <= k:
        raise BadInput(f"passk: alpha is the m of pass@m, a whole number from 1 to k = {k}")
    worth = [math.comb(k - c, m - 1) / math.comb(k - 1, m - 1) for c in range(k + 1)]
    right = quality >= RIGHT
    return right * torch.tensor(worth, dtype=quality.dtype)[right.sum(1, keepdim=True)]


def maxrl(quality, L, rollout, alpha=1.0):
    """r / (mean r + 1e-6)^alpha. Minus its mean, at alpha = 1, it is (r - mean r) / mean r: the
    rarer right answers are, the more they weigh, as in the gradient of the log of their
    probability (MaxRL, arXiv 2602.02710)."""
    if quality.min() < 0:
        raise BadInput("maxrl needs qualities of at least 0: its mean is a divisor")
    return quality / (quality.mean(1, keepdim=True) + 1e-6) ** alpha


# ------------------------------ the worth of sets
def polyepo(quality, L, rollout, alpha=0.9):
    """The mean worth of the sets of 4 of the group that hold the response, a set's worth being its
    mean r times its clusters / 4 (Poly-EPO, arXiv 2604.17654, where a language model judges; here
    clusters are linked by cosines > alpha). There are C(k, 4) sets, 36,000 at k = 32.
    WARNING  Wrong answers gain too, by being different."""
    k = L.shape[-1]
    if k < 5:
        raise BadInput(f"polyepo compares sets of 4: k = {k} is too small, 5 the least")
    sets = torch.tensor(list(itertools.combinations(range(k), 4)))  # (S, 4)
    same = same_cluster(L, alpha)[:, sets[:, :, None], sets[:, None, :]]  # (P, S, 4, 4)
    # n members of a cluster count 1/n each, and an empty text nothing
    clusters = (~empty(L)[:, sets] / same.sum(-1)).mean(-1)  # (P, S), as a share
    worth = quality[:, sets].mean(-1) * clusters  # (P, S)
    holds = (sets[:, :, None] == torch.arange(k)).any(1).to(worth)  # (S, k)
    return worth @ holds / holds.sum(0)
