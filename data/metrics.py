"""Quality and diversity of a group of responses: pure functions of texts, scores, embeddings.

The first half needs texts and scores only, the second the embeddings; `group_metrics` puts
them together for one prompt, and what follows it averages over prompts and over tasks.

WARNING  log det, Vendi and cosine distance live in the space that DQO optimises, distinct-n
and self-BLEU love gibberish. Judge by quality, pass@n, distinct correct and effective diversity.
"""

import math
import re
from collections import Counter

import torch

from dqo import gram, log_det


# ------------------------------------------------------------------------------------- texts
def normalize(text):
    """Lower case, single spaces, no space before punctuation, no final period: what a reader
    would call the same text. "The old dog sleeps ." and "the old dog sleeps." are equal.

    `distinct correct` counts with it, and the rewards compare with it.
    """
    spaced = " ".join(text.lower().split())
    text = re.sub(r"\s+([.,!?。、，！？])", r"\1", spaced)
    return text[:-1].rstrip() if text.endswith((".", "。")) else text


# Scripts that are written without spaces: Thai and Lao, Burmese, Khmer, kana and bopomofo,
# Chinese characters, kana of half width. (Korean has spaces.)
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31a0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
TOKEN = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+|[^\w\s]")


def words(text):
    """Tokens: lower-cased words and single punctuation marks. Where a script has no spaces
    (Chinese, Japanese, Thai, Lao, Khmer, Burmese), each character is a token: by words, a
    whole clause would be one, and near-copies would have nothing in common."""
    return TOKEN.findall(text.lower())


def ngrams(tokens, n):
    """All n-grams; a text shorter than n tokens counts as one."""
    count = max(1, len(tokens) - n + 1)
    return [tuple(tokens[i:i + n]) for i in range(count)]


def distinct_n(texts, n):
    """Distinct n-grams over all n-grams of a group (Li et al. 2016)."""
    grams = []
    for text in texts:
        grams += ngrams(words(text), n)
    return len(set(grams)) / len(grams)


def self_bleu(texts):
    """Mean BLEU-4 of each response against the others (Zhu et al. 2018). 1 if all are equal,
    NaN if there are no others, as for all that compares."""
    if len(texts) < 2:
        return math.nan
    counts = []  # of each text: how often each of its n-grams occurs, for n from 1 to 4
    for text in texts:
        tokens = words(text)
        counts.append([Counter(ngrams(tokens, n)) for n in range(1, 5)])
    total = 0.0
    for i, mine in enumerate(counts):
        total += bleu(mine, counts[:i] + counts[i + 1:])
    return total / len(texts)


def bleu(mine, others):
    """BLEU-4 of one text against several: add-one smoothing above unigrams, brevity penalty
    against the closest length.    mine, and each of others: four Counters, of n = 1 to 4"""
    log_precision = 0.0
    for n in range(4):
        # An n-gram matches as often as it occurs in the one other text that has most of it.
        match = 0
        for ngram, count in mine[n].items():
            match += min(count, max(other[n][ngram] for other in others))
        smooth = 0 if n == 0 else 1
        if match + smooth == 0:
            return 0.0  # no word in common
        log_precision += math.log((match + smooth) / (mine[n].total() + smooth)) / 4
    length = mine[0].total()  # in words, and 1 for a text without any
    lengths = [other[0].total() for other in others]
    closest = min(lengths, key=lambda x: (abs(x - length), x))  # the shorter of two as close
    return math.exp(log_precision + min(0.0, 1 - closest / length))


def lcs(a, b):
    """Length of the longest common subsequence, bit-parallel (Hyyro 2004): bit i of v is 0
    where row i of the usual table steps up."""
    where = {}  # token: bits at its positions in a
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    v = full = (1 << len(a)) - 1
    for token in b:
        u = v & where.get(token, 0)
        v = (v + u | v - u) & full
    return len(a) - v.bit_count()


def self_rouge(texts):
    """Mean ROUGE-L F1 over all pairs of a group. 1 if all are equal."""
    if len(texts) < 2:
        return math.nan
    tokens = [words(text) or [""] for text in texts]
    f1 = []
    for i, a in enumerate(tokens):
        for b in tokens[:i]:
            f1.append(2 * lcs(a, b) / (len(a) + len(b)))
    return sum(f1) / len(f1)


# ------------------------------------------------------------------------------------ scores
def pass_at_n(correct, n):
    """Probability that at least one of n responses is correct, without bias, from N >= n of
    them (Chen et al. 2021): 1 - C(N - c, n) / C(N, n).    correct: N booleans"""
    N, c = len(correct), sum(map(bool, correct))
    return 1 - math.comb(N - c, n) / math.comb(N, n)


def max_at_n(scores, n):
    """Expected best score of n responses, without bias, from N >= n of them: the graded form
    of pass@n.    scores: N numbers

    The i-th smallest (from 0) is the best of C(i, n - 1) of the C(N, n) subsets.
    """
    ranked = sorted(scores)
    best = sum(score * math.comb(i, n - 1) for i, score in enumerate(ranked))
    return best / math.comb(len(ranked), n)


# -------------------------------------------------------------------------------- embeddings
# phi: (k, D) unit-norm, one row per response
def cosines(phi):
    """(k, D) -> (k, k): `gram`, in which two zero vectors are alike.

    Some encoders give an empty text the zero vector. Its product with another one is 0, as if
    the two were as different as can be.
    """
    empty = (~phi.any(-1, keepdim=True)).to(phi.dtype)                      # (k, 1)
    return gram(phi) + gram(empty)


def vendi(phi):
    """Effective number of different responses, between 1 and k: exp of the entropy of the
    eigenvalues of L / k (Friedman & Dieng 2023)."""
    eigenvalues = torch.linalg.eigvalsh(cosines(phi.double()) / len(phi)).clamp(min=0)
    return torch.exp(torch.special.entr(eigenvalues).sum()).item()


def cosine_distance(phi):
    """Mean over pairs of 1 - cosine."""
    k = len(phi)
    if k < 2:
        return math.nan
    distance = 1 - cosines(phi.double())                                    # (k, k)
    return (distance.sum() / (k * (k - 1))).item()  # the diagonal adds 0


def effective_diversity(correct, phi, same=0.9):
    """Effective semantic diversity (Shypula et al. 2025): the share of pairs of responses that
    are both correct and mean different things, which is here: their cosine is below `same`.

    correct: k booleans
    """
    if len(correct) < 2:
        return math.nan
    right = torch.tensor(correct)                                           # (k,)
    different = cosines(phi) < same                                         # (k, k)
    pairs = right[:, None] & right & different  # never a response with itself
    return pairs.sum().item() / (len(right) * (len(right) - 1))


def utility(scores, phi, patience=0.8, same=0.9):
    """What n responses are worth to someone who reads them in turn, goes on with probability
    `patience` after each, and gains nothing by what was said before (NoveltyBench, Zhang et al.
    2025): (1 - p) / (1 - p^n) * sum_i p^(i-1) * score_i over the first response of each class.

    A response is of the class of an earlier first one if their cosine reaches `same`.
    (There a trained classifier decides.)    scores: n numbers
    """
    alike = (cosines(phi) >= same).tolist()
    firsts, total = [], 0.0
    for i, score in enumerate(scores):
        if not any(alike[i][j] for j in firsts):
            firsts.append(i)
            total += patience ** i * score
    return total * (1 - patience) / (1 - patience ** len(scores))


# --------------------------------------------------------------------------------- one prompt
OF_CORRECT = ("pass_at", "distinct_correct", "correct_distinct_4", "correct_self_bleu_diversity",
              "effective_diversity")


def group_metrics(texts, scores, phi, threshold=1.0):
    """All metrics of one prompt's n responses: a dict of numbers, and of {n: number} for
    pass_at and max_at. Correct is a response whose score reaches the threshold, where .7 + .2 + .1
    reaches 1. Without a threshold (None) what is OF_CORRECT is left out.

    `correct_...`: over the correct responses only, 0 if there are fewer than two. What compares
    responses is NaN for n = 1.
    """
    n = len(texts)
    least = math.inf if threshold is None else threshold - 1e-6 * max(1.0, abs(threshold))
    correct = [score >= least for score in scores]
    right = [text for text, is_right in zip(texts, correct) if is_right]
    several = len(right) > 1
    none = 0.0 if n > 1 else math.nan  # one response alone cannot differ
    sizes = [m for m in (1, 2, 4, 8, 16, 32, 64, 128, 256) if m < n] + [n]
    metrics = dict(
        quality=sum(scores) / n,
        pass_at={str(m): pass_at_n(correct, m) for m in sizes},
        max_at={str(m): max_at_n(scores, m) for m in sizes},
        utility=utility(scores, phi),
        distinct_correct=len(set(map(normalize, right))),
        distinct_1=distinct_n(texts, 1),
        distinct_4=distinct_n(texts, 4),
        self_bleu_diversity=1 - self_bleu(texts),
        self_rouge_diversity=1 - self_rouge(texts),
        correct_distinct_4=distinct_n(right, 4) if several else none,
        correct_self_bleu_diversity=1 - self_bleu(right) if several else none,
        effective_diversity=effective_diversity(correct, phi),
        cosine_distance=cosine_distance(phi),
        vendi=vendi(phi),
        log_det=log_det(phi.double()).item(),
    )
    if threshold is None:
        return {key: metrics[key] for key in metrics if key not in OF_CORRECT}
    return metrics


# ------------------------------------------------------------------- many prompts, many tasks
def combine(dicts, function):
    """One dict of the keys of all; each number is the function of that number of all dicts."""
    combined = {}
    for key, first in dicts[0].items():
        if any(key not in d for d in dicts):
            continue  # of tasks with a threshold and without
        values = [d[key] for d in dicts]
        if isinstance(first, dict):  # {n: number}, of pass_at and max_at
            combined[key] = combine(values, function)
        else:
            combined[key] = function(values)
    return combined


def mean(values):
    return torch.tensor(values, dtype=torch.float64).mean().item()


def standard_error(values):
    if len(values) < 2:
        return math.nan
    x = torch.tensor(values, dtype=torch.float64)
    return (x.std() / len(x) ** 0.5).item()


def mean_and_se(values):
    """Mean and standard error over prompts, of numbers or of dicts of numbers."""
    if isinstance(values[0], dict):
        return combine(values, mean), combine(values, standard_error)
    return mean(values), standard_error(values)


def average(results):
    """The unweighted mean over a model's tasks, a result like theirs."""
    def over_tasks(values):
        return sum(values) / len(values)

    def root_of_squares(values):  # as errors add up where the tasks share no prompts
        return sum(x * x for x in values) ** 0.5 / len(values)

    about = ("model", "task", "prompts", "n", "threshold", "se")  # what is no measurement
    measured = []
    for result in results:
        measured.append({key: result[key] for key in result if key not in about})
    thresholds = {result["threshold"] for result in results if "threshold" in result}
    same = dict(threshold=thresholds.pop()) if len(thresholds) == 1 else {}
    return dict(
        model=results[0]["model"],
        task="average",
        prompts=sum(result["prompts"] for result in results),
        n=results[0]["n"],
        **same,
        **combine(measured, over_tasks),
        se=combine([result["se"] for result in results], root_of_squares),
    )


def by_model(results):
    """{model: its results, with their average last if there are several}."""
    models = {}
    for result in results:
        models.setdefault(result["model"], []).append(result)
    for tasks in models.values():
        if len(tasks) > 1:
            tasks.append(average(tasks))
    return models
