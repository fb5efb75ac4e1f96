"""Mathematics in texts: numbers by a rule of ours, all else by math-verify, an optional package.

math-verify takes seconds to hours for an expression such as 9^9^9, and reads 8 000 as 8 * 0. So
what it is given is looked at first; what is odd or heavy counts as not understood: [].
"""

import functools
import logging
import re
import signal
import threading
from fractions import Fraction

logging.getLogger("math_verify").setLevel(logging.ERROR)  # no line for each parser that stops


LAST_NUMBER = re.compile(  # 72  -3  1,234.50  $18
    r"####\s*(-?[$€£¥]?|[$€£¥]-)([0-9]{1,30}|[0-9]{1,3}(?:,[0-9]{3}){1,9}|(?=\.))(\.[0-9]{1,30})?"
)


def last_number(text):
    """The exact N of a last line `#### N`. None if that line is anything else."""
    line = text.strip().rpartition("\n")[2].strip()
    found = LAST_NUMBER.fullmatch(re.sub("[−–]", "-", line))
    if not found:
        return None
    sign, whole, decimals = found.groups(default="")
    size = Fraction(whole.replace(",", "") + decimals)
    return -size if "-" in sign else size


def boxed(text):
    r"""(inside, rest) of the last \boxed{}; (None, text) without one that closes."""
    _, mark, after = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(after if mark else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return after[:i], after[i + 1:]
    return None, text


# In a text without brackets: towers, exponents of 10,000 and factorials of 1,000. And sums.
HEAVY = re.compile(
    r"\^[-0-9.]*[\^!]|\^[-0-9.]{5}|[0-9]{4}[!_]|!!|\\(sum|prod|i*int|lim|d?binom[0-9]{4})(?![a-z])"
)


def parsed(text):
    """A list of what math-verify makes of a text; [] if that is nothing, or 9^9^9."""
    flat = re.sub(r"\\(left|right|[dt]?frac)|[{}()\s]", "", text.replace("**", "^"))
    if len(text) > 400 or HEAVY.search(flat) or re.search(r"([({][^(){}]*){10}", text):
        return []
    from math_verify import parse
    return parse(text, fallback_mode="no_fallback", parsing_timeout=patience())


def patience():
    """Seconds for math-verify; None outside the main thread, where it has no alarm clock."""
    in_main = threading.current_thread() is threading.main_thread()
    return 1 if in_main and hasattr(signal, "SIGALRM") else None


# It would read 8 000 as 8 * 0, 1e400 as e * 400, 1.2.3 as a product.
ODD = re.compile(r"[0-9](\s|\\,)+[0-9.]|\.[0-9]*\.|[0-9][eE][-+]?[0-9]|[^\0-\u03ff\u2200-\u22ff]")


@functools.lru_cache(maxsize=10_000)
def whole(text):
    """The expression that a text is, in a list; [] if it is not understood. Among words it is
    the only number: "72 clips" is 72, "none" is not n * o * n * e."""
    text = text.strip(" \n*$=").rstrip(".,")
    bare = re.sub(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|sqrt", " ", text)
    if re.search("[A-Za-z]{3}|[ckm]m", bare):
        numbers = re.findall(r"(?<![\w^{])-?[0-9][0-9.,/]*", text)
        text = numbers[0].rstrip(".,") if len(numbers) == 1 else ""
    return parsed(rf"\boxed{{{text}}}") if text and not ODD.search(text) else []


def tidy(text):
    r"""Numbers as math-verify reads them, without 答案是, and the line behind #### in \boxed{}."""
    text = re.sub("[−–—]", "-", re.sub("[€£¥]", "", text))
    text = re.sub("[\u3000-\u9fff\uac00-\ud7a3]", " ", text)
    text = re.sub(r"(?<=[0-9])\\,(?=[0-9]{3})", ",", text)
    text = re.sub(r"(?<=[0-9])[eE]\+?(-?[0-9]{1,3})\b", r"*10^(\1)", text)
    text = re.sub(r"(?<=[0-9]) +([0-9]+)/([0-9]+)\b", r"\\frac{\1}{\2}", text)  # 1 1/2
    return re.sub(r"(?s)^.*####\s*([^\n]*).*", r"\\boxed{\1}", text)


def answer(text):
    """The expression that the answer of a row is, marked by #### or \\boxed{} or all of it."""
    text = tidy(text)
    return whole(boxed(text)[0] or text)


def last_expression(text):
    """What is marked by #### or \\boxed{}, else all of the text, else what its end mentions."""
    text = tidy(text)
    inside = boxed(text)[0]
    if inside is not None:
        return whole(inside)
    return whole(text) or parsed(text[-300:])


def equal(gold, mine):
    """Whether math-verify finds two expressions equal in a second."""
    from math_verify import verify
    return verify(gold, mine, timeout_seconds=patience())
