"""The objectives of other papers, beside `grpo` and `dqo` of dqo.py: one function each.

`dqo.objective` says what such a function gets and returns. To add one, write it here, or in a
file of your own, `--objective my.py:function`, and judge it with the same trainer:

    def shorter(quality, phi, logp, alpha):            # my.py
        return -alpha * (~logp.isnan()).sum(-1)        # (P, k): a price per token

Each has its own default strength. `likelihood` and `dra` were published with GRPO's division
by the group's standard deviation (`--baseline std`), `darling` without. likelihood, darling and
dra scale a response's own reward and ignore what that does to the others: they follow no stated
objective's gradient. In them r is the quality, and one below 0 is left alone.
"""

import math

import torch

from data.scoring import function_in
from data.sources import why
from dqo import OBJECTIVES, BadInput, gram, marginal_gains, objective


def empty(phi):
    """(P, k): where an embedding is the zero vector, which some encoders give an empty text.

    It spans nothing, so `dqo` pays it nothing. To a product of vectors, however, it is as
    different as can be from all others, empty ones too. So the others have to give it the
    lowest bonus that there is: emptiness must not pay.
    """
    return ~phi.any(-1)


@objective(smallest_group=(2, 3))
def pairwise(quality, phi, logp, alpha):
    """The mean cosine distance to the others: alpha * mean_{j != i} (1 - L_ij).

    Deviation, Chung et al. 2025, in RL form: the exact marginal gain of
    1/(k-1) * sum_{i<j} (1 - L_ij). The expected distance, 1 - |E phi|^2, sees nothing but the
    mean: two clusters e1 e1 e2 e2 and four answers with all cosines 1/3 both average 2/3, while
    log det(L + I) is 2.197 against 2.631.
    """
    k = quality.shape[1]
    length = (~empty(phi)).float()[:, :, None]                              # (P, k, 1) 1, or 0
    distance = gram(length) - gram(phi)  # 1 - L_ij, and 0 to a zero vector
    return alpha * distance.sum(-1) / (k - 1)  # (P, k); the diagonal adds 0


@objective(alpha=0.25, highest_alpha=1.0, embeds=False, smallest_group=(2, 2))
def likelihood(quality, phi, logp, alpha):
    """r becomes r * (1 - alpha * rank / k); rank 0 is the least likely response per token.

    "Rewarding the Unlikely", He et al. 2025. Ranks count all k responses, wrong ones too.
    Closer than 1e-4 counts as equal.
    """
    r, k = quality.clamp(min=0), quality.shape[1]
    per_token = logp.nanmean(-1)                                            # (P, k)
    rank = (per_token[:, :, None] > per_token[:, None, :] + 1e-4).sum(-1)   # (P, k)
    return -alpha * r * rank / k


@objective(alpha=0.01, embeds=False)
def entropy(quality, phi, logp, alpha):
    """A weight for each token of a right answer: -alpha * (log pi + 1) / length.

    R1-zero-Div, Yao et al. 2025: the gradient of -p log p is -(log p + 1) dp. Right answers
    (reward 1) alone get it, or wrong ones would gain.
    """
    right = (quality >= 1).float()[:, :, None]                              # (P, k, 1)
    length = (~logp.isnan()).sum(-1, keepdim=True)                          # (P, k, 1)
    return -alpha * right * (logp + 1) / length                             # (P, k, T)


@objective(alpha=0.8, highest_alpha=0.999, smallest_group=(2, 2))
def darling(quality, phi, logp, alpha):
    """r becomes r * max(0.1, (k - size) / (k - 1)); size is that of the response's cluster.

    DARLING, Li et al. 2025, where a trained classifier decides. Here a cluster is everything
    linked, directly or through others, by cosines above alpha.
    """
    r, k = quality.clamp(min=0), quality.shape[1]
    links = (gram(phi) > alpha).double()                                    # (P, k, k)
    connected = links.matrix_power(k) > 0  # by a path of k links or fewer: L_ii links i to i
    size = connected.sum(-1).masked_fill(empty(phi), k)                     # (P, k)
    return r * ((k - size) / (k - 1)).clamp(min=0.1) - r


@objective(smallest_group=(2, 2))
def dra(quality, phi, logp, alpha):
    """r becomes r / (sum_j max(L_ij, 0))^alpha, j = i included. DRA-GRPO, Chen et al. 2025."""
    r = quality.clamp(min=0)
    crowd = gram(phi).clamp(min=0).sum(-1)                                  # (P, k)
    return r * crowd.masked_fill(empty(phi), quality.shape[1]) ** -alpha - r


@objective(alpha=5.0, smallest_group=(2, 2))  # the published strength is unknown to us
def setpo(quality, phi, logp, alpha):
    """What the group's diversity D gains by a response, in its advantage: alpha * (D - D_{-i}).

    SetPO, ICML 2026: D = mean_i -log(1 + mean_j L_ij), j = i included; D_{-i} leaves response i
    out. It is added after the baseline, so nothing is subtracted from it.
    """
    k = quality.shape[1]
    nothing = empty(phi)
    L = gram(phi).masked_fill(nothing[:, :, None] | nothing[:, None, :], 1.0)  # (P, k, k)
    similar = L.sum(-1)                                                     # (P, k)
    diversity = -torch.log1p(similar / k).mean(-1, keepdim=True)            # (P, 1)
    # To leave i out takes L_ij off the sum of every j but i; that of i itself becomes log 1 = 0.
    of_j = (similar[:, None, :] - L) * (1 - torch.eye(k)) / (k - 1)         # (P, i, j)
    without = -torch.log1p(of_j).sum(-1) / (k - 1)                          # (P, k)
    return alpha * (diversity - without)[:, :, None]                        # (P, k, 1)


@objective(alpha=4.0, embeds=False, smallest_group=(2, 2))
def passk(quality, phi, logp, alpha):
    """r becomes what a response does for pass@m, m = alpha, no encoder needed.

    PKPO and Pass@k Training, 2025: a right response (reward 1) is worth the probability that
    m - 1 of the k - 1 others are all wrong; any other nothing. That is, without a baseline,
    the gradient of pass@m times k / m.
    """
    k, m = quality.shape[1], int(alpha)
    right = quality >= 1                                                    # (P, k)
    count = right.sum(1, keepdim=True)                                      # (P, 1)
    worth = [math.comb(k - c, m - 1) / math.comb(k - 1, m - 1) for c in range(k + 1)]
    return torch.tensor(worth)[count] * right - quality                     # (P, k)


@objective(smallest_group=(2, 3))
def repexp(quality, phi, logp, alpha):
    """alpha * phi_i' (I + sum_j phi_j phi_j')^-1 phi_i: how far a response lies off the others.

    RepExp, ICLR 2026; j = i included. It is exactly 1 - exp(-g_i): the same ranking within a
    group as dqo, another scale.
    """
    return alpha * -torch.expm1(-marginal_gains(phi))                       # (P, k)


def load_objective(name):
    """Make --objective NAME known to `dqo.OBJECTIVES`; file.py:function is loaded for that."""
    if name in OBJECTIVES:
        return
    if not str(name).rpartition(":")[0].endswith(".py"):
        raise BadInput(f"--objective {name!r}: no such objective or file; there are "
                       f"{', '.join(OBJECTIVES)}, and file.py:function")
    bonus = function_in("--objective", name)

    def checked(quality, phi, logp, alpha):
        try:
            value = bonus(quality, phi, logp, alpha)
        except (Exception, SystemExit) as error:
            raise BadInput(f"--objective {name}: {why(error)}") from None
        shapes = [tuple(quality.shape), (*quality.shape, 1), tuple(logp.shape)]
        if not isinstance(value, torch.Tensor) or tuple(value.shape) not in shapes:
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise BadInput(f"--objective {name} returned {got}; it must be a tensor of the shape "
                           f"{shapes[0]}, {shapes[1]} or {shapes[2]}")
        value = value.detach().float()
        if phi is None:
            return value
        nothing = empty(phi) if value.dim() == 2 else empty(phi)[:, :, None]
        return torch.where(nothing, value.nan_to_num(nan=0.0).clamp(max=0), value)

    options = {key: getattr(bonus, key) for key in
               ("alpha", "highest_alpha", "embeds", "smallest_group") if hasattr(bonus, key)}
    checked.__name__ = name
    objective(**options)(checked)
