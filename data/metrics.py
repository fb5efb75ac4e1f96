"""Quality and diversity of one prompt's responses, pure functions, and means of them."""

import math
import re
import unicodedata
from collections import Counter
from functools import partial

import regex
import torch

from dqo import log_det

nfc = partial(unicodedata.normalize, "NFC")


def normalize(text):
    """What a reader would call the same text: lower case, single spaces, none before punctuation,
    no final period."""
    text = " ".join(nfc(text).lower().split())
    text = re.sub(r"\s+([.,!?。、，！？])", r"\1", text)
    return re.sub("[.。]$", "", text).rstrip()


# Scripts without spaces, where a token is a character; elsewhere it is a word with its marks.
SPACELESS = r"[\p{Han}\p{Bopomofo}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
LETTER = r"[\p{L}\p{M}\p{N}_]"
WORD = regex.compile(rf"(?V1){SPACELESS}|[{LETTER}--{SPACELESS}]+|[^\s{LETTER}]")


def words(text):
    """Lower-cased words and punctuation marks; characters, where a script has no spaces."""
    return WORD.findall(nfc(text).lower())


def lcs(a, b):
    """Length of the longest common subsequence (Hyyro 2004): bit i of v is 0 where row i of the
    usual table steps up."""
    where = {}  # token: bits at its positions in a
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    v = full = (1 << len(a)) - 1
    for token in b:
        u = v & where.get(token, 0)
        v = (v + u | v - u) & full
    return len(a) - v.bit_count()


def rouge_l(one, other):
    """ROUGE-L F1 of two texts."""
    a, b = words(one), words(other)
    return 2 * lcs(a, b) / (len(a) + len(b)) if a or b else 1.0


def ngrams(tokens, n):
    """All n-grams; a text shorter than n tokens counts as one."""
    return [tuple(tokens[i:i + n]) for i in range(max(1, len(tokens) - n + 1))]


def distinct_n(texts, n):
    """Distinct n-grams over all n-grams of a group (Li et al. 2016)."""
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams)


def self_bleu(texts):
    """Mean BLEU-4 of each response against the others (Zhu et al. 2018); 1 if all are equal.
    Add-one smoothing above unigrams, brevity penalty against the closest length."""
    tokens = list(map(words, texts))
    logs = [0.0] * len(texts)  # of the BLEU of each
    for n in range(1, 5):
        counts, found = [Counter(ngrams(t, n)) for t in tokens], {}
        for count in counts:
            for gram, c in count.items():
                found.setdefault(gram, [0]).append(c)
        most = {gram: sorted(c)[-2:] for gram, c in found.items()}  # the two largest counts
        for i, mine in enumerate(counts):
            # An n-gram matches as often as it occurs in the other text that has most of it: the
            # largest count, or the second if the largest is this text's.
            match = sum(min(c, most[gram][c < most[gram][1]]) for gram, c in mine.items())
            match, of = match + (n > 1), mine.total() + (n > 1)
            logs[i] += math.log(match / of) / 4 if match else -math.inf
    lengths = [max(1, len(t)) for t in tokens]
    for i, length in enumerate(lengths):
        closest = min(lengths[:i] + lengths[i + 1:], key=lambda x: (abs(x - length), x))
        logs[i] += min(0.0, 1 - closest / length)
    return sum(map(math.exp, logs)) / len(texts)


def self_rouge(texts):
    """Mean ROUGE-L F1 over all pairs of a group."""
    pairs = [rouge_l(a, b) for i, a in enumerate(texts) for b in texts[:i]]
    return sum(pairs) / len(pairs)


def best_at(scores, n):
    """Expected best of n responses, without bias; of scores 0 and 1 pass@n (Chen et al. 2021).
    The i-th smallest is the best of C(i, n - 1) of the subsets."""
    best = sum(score * math.comb(i, n - 1) for i, score in enumerate(sorted(scores)))
    return best / math.comb(len(scores), n)


def vendi(L):
    """exp(entropy of the eigenvalues of L / k), an effective number (Friedman & Dieng 2023)."""
    eigenvalues = torch.linalg.eigvalsh(L / len(L)).clamp(min=0)
    return torch.special.entr(eigenvalues).sum().exp().item()


def effective_diversity(correct, L, same=0.9):
    """Share of pairs of responses that are both correct and differ in meaning, by a cosine below
    `same` (Shypula et al. 2025)."""
    right = torch.tensor(correct)
    pairs = right[:, None] & right & (L < same)  # never a response with itself
    return pairs.sum().item() / max(1, len(right) * (len(right) - 1))


def classes(L, same=0.9):
    """The responses that are new: not alike, by a cosine of at least `same`, to an earlier one of
    them. Each begins a class of meanings (NoveltyBench, Zhang et al. 2025)."""
    new = []
    for i in range(len(L)):
        if not any(L[i, j] >= same for j in new):
            new.append(i)
    return new


def utility(scores, new, patience=0.8):
    """What n responses are worth to one who reads them in turn, goes on with probability
    `patience`, and gains by the new ones alone (NoveltyBench). new: see `classes`"""
    total = sum(patience ** i * scores[i] for i in new)
    return total * (1 - patience) / (1 - patience ** len(scores))


def group_metrics(texts, scores, phi, threshold):
    """All metrics of one prompt's n responses. Correct is a score that reaches the threshold; with
    None nothing is: max_at, the best of m, takes the place of pass_at. scores may be None."""
    n, phi = len(texts), phi.double()
    empty = (~phi.any(-1, keepdim=True)).double()
    L = phi @ phi.T + empty @ empty.T  # two zero vectors, of empty texts, are alike
    sizes = [m for m in (1, 2, 4, 8, 16, 32, 64, 128, 256) if m < n] + [n]
    new = classes(L)
    metrics = dict(quality=sum(scores) / n, utility=utility(scores, new)) if scores else {}
    if scores and threshold is None:
        metrics["max_at"] = {str(m): best_at(scores, m) for m in sizes}
    elif scores:
        correct = [score >= threshold - 1e-6 for score in scores]  # .7 + .2 + .1 reaches 1
        metrics["pass_at"] = {str(m): best_at(correct, m) for m in sizes}
        metrics["distinct_correct"] = len(
            {normalize(text) for text, is_right in zip(texts, correct) if is_right})
        metrics["effective_diversity"] = effective_diversity(correct, L)
    return metrics if n == 1 else metrics | dict(
        classes=len(new),
        distinct_4=distinct_n(texts, 4),
        self_bleu_diversity=1 - self_bleu(texts),
        self_rouge_diversity=1 - self_rouge(texts),
        cosine_distance=(1 - L).sum().item() / (n * (n - 1)),
        vendi=vendi(L),
        log_det=log_det(phi @ phi.T).item())


# ---- over prompts, tasks and models
def standard_error(x):
    return x.std(correction=min(1, len(x) - 1)) / len(x) ** 0.5


def over(dicts, function):
    """A function of each number of some dicts, of numbers and of such dicts."""
    if not isinstance(dicts[0], dict):
        return function(torch.tensor(dicts, dtype=torch.float64)).item()
    return {key: over([d[key] for d in dicts], function)
            for key in dicts[0] if all(key in d for d in dicts)}


def by_model(results):
    """{model: [{label: (mean, standard error)} of each task, and of their average]}"""
    models = {}
    for result in results:
        of_one, errors = models.setdefault(result["model"], {}), result["se"]
        of_one[result["task"]] = {key: result[key] for key in errors}, errors
    for tasks in models.values():
        if len(tasks) > 1:
            means, errors = zip(*tasks.values())
            root_mean = over(errors, lambda x: (x ** 2).sum().sqrt() / len(x))
            tasks["average"] = over(means, torch.mean), root_mean
    return models


def labelled(tree):
    """{"pass_at": {"4": x}} becomes {"pass@4": x}."""
    return {key.replace("_at", "@").replace("_", " ") + n: x for key, value in tree.items()
            for n, x in (value if isinstance(value, dict) else {"": value}).items()}
