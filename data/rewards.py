"""Rewards: functions that score one response.

    def reward(record: dict, response: str) -> float   # 1.0 right, 0.0 wrong, or in between

`record["answer"]` is what a task's template, or --answer-key, found in the row of the prompt:
anything that the reward needs. To add a reward, write such a function and put it into REWARDS.
Or add nothing here and say `--data my.jsonl --reward my.py:function` (see data/scoring.py).

WARNING  The reward decides whether diversity is bought with quality. A reward that gives credit
to a *part* of a response ("contains the right word") pays for a right start followed by random
text, because random text spans volume. So the miniature tasks demand that the whole response be
right, and other rewards say what they overlook.
"""

import ast
import operator
import re
import unicodedata
from fractions import Fraction

from data.metrics import lcs, normalize, words


def need(good, what, got):
    if not good:  # `check_rows` finds that out before the run starts
        raise ValueError(f"this task or reward needs {what}, not {got!r:.60}")


def published(record):
    """The row behind a record, as it was published. A plain dict of your own is one already."""
    row = record.get("row")
    return row if isinstance(row, dict) else record


# ---------------------------------------------------------------------------- the miniature tasks
def choice(patterns):
    """A regular expression that matches one of several."""
    return "(?:" + "|".join(patterns) + ")"


def instruct(record, response):
    """Instruction following: "recommend a city in europe" -> one name of that kind, no more."""
    return float(normalize(response) in record["answer"])


# Most popular first, as in all lists here: make_tiny.py draws by rank.
BOUGHT = ["bought", "got", "purchased"]


def summarize(record, response):
    """Summarization: one sentence that keeps who, what and where, and invents nothing.

    Free are the verb, active or passive, the order, and the details: colour, day, weather. So a
    right summary is a core sentence, and around it the place once, day and weather at most once."""
    fact = {key: re.escape(text) for key, text in record["answer"].items()}
    thing = rf"an? (?:{fact['color']} )?{fact['what']}"
    active = rf"{fact['who']} {choice(BOUGHT)} {thing}"
    passive = rf"{thing} was {choice(BOUGHT)} by {fact['who']}"
    place = rf"(?:at|in) the {fact['where']}"
    day = rf"on {fact['when']}"
    weather = rf"despite the {fact['weather']}"

    text = normalize(response)
    detail = choice([place, day, weather])
    if not re.fullmatch(rf"(?:{detail},? )*{choice([active, passive])}(?: {detail})*", text):
        return 0.0

    def times(pattern):
        return len(re.findall(pattern, text))

    return float(times(place) == 1 and times(day) <= 1 and times(weather) <= 1)


SUBJECTS = (
    "dog cat girl boy king bird horse fox queen wolf bear mouse teacher farmer sailor wizard"
).split()
STORY_PLACES = (
    "park house river forest garden castle road lake barn boat tower bridge cave school tree hill"
).split()
ADJECTIVES = (
    "old little happy big brave tired quiet hungry young lonely clever lazy proud gentle"
).split()
VERBS = (
    "sleeps plays runs sings waits dances hides walks jumps laughs dreams works swims rests"
).split()
ADVERBS = "quietly happily alone slowly often gladly again softly".split()
PREPOSITIONS = "in near by behind under beside".split()

MAYBE_ADJECTIVE = rf"(?:{choice(ADJECTIVES)} )?"
STORY = re.compile(
    rf"the {MAYBE_ADJECTIVE}(?P<subject>{choice(SUBJECTS)}) {choice(VERBS)} "
    rf"(?:{choice(ADVERBS)} )?{choice(PREPOSITIONS)} "
    rf"the {MAYBE_ADJECTIVE}(?P<place>{choice(STORY_PLACES)})"
)


def story(record, response):
    """Story generation: one sentence of the grammar above that uses both given words."""
    given = record["answer"]
    need(isinstance(given, list), "a list of two words as the answer", given)
    match = STORY.fullmatch(normalize(response))
    return float(match is not None and sorted(match.groups()) == sorted(given))


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub,
             ast.Mult: operator.mul, ast.Div: operator.truediv}


def exact(node):
    """The value of a parsed expression, as a Fraction."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -exact(node.operand)
    if not isinstance(node, ast.BinOp):
        raise ValueError("not arithmetic")
    return OPERATORS[type(node.op)](exact(node.left), exact(node.right))


def value(expression):
    """The exact value of an expression of integers, + - * / and parentheses, a Fraction, or None.

    WARNING  Text from a model is parsed, never `eval`-ed, and limited in size first: 9**9**9 must
    not hang the run."""
    if not re.fullmatch(r"[0-9+\-*/() ]{1,100}", expression) or re.search(r"\*\*|//", expression):
        return None
    try:
        return exact(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def reason(record, response):
    """Reasoning: "make 24" -> an arithmetic expression of at least two numbers that equals 24."""
    target = record["answer"]
    need(isinstance(target, (int, float)), "a number as the answer", target)
    expression = normalize(response)
    two_numbers = re.search(r"\d\D*[+\-*/]\D*\d", expression)
    return float(two_numbers is not None and value(expression) == target)


# ------------------------------------------------------------------------------------------ maths
# A number as people write it: 72  -3  1,234.50  $18  .5  3/4  1 1/2
NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w)])-)?                   # a minus, but not that of "10-5"
    [$€£¥]?
    (?<![^\W_])                              # not the 2 of "H2O"
    (?:(?P<whole>[0-9]{1,9})[ ](?=[0-9]{1,9}/[0-9]))?           # the first 1 of "1 1/2"
    (?P<number>[0-9]+(?:,[0-9]{3}\b)*(?:\.[0-9]+)?              # 72 or 1,234.50
              |(?<!\w)\.[0-9]+)                                 # .5
    (?:/(?P<divisor>[0-9]{1,9})(?![0-9]|[.,][0-9]))?            # the 4 of "3/4", not of "3/4.5"
    """,
    re.VERBOSE,
)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # balanced, to depth two


def plain_latex(text):
    """Numbers as NUMBER reads them, whatever LaTeX and typography made of them."""
    text = text.replace("−", "-")
    text = text.replace("{,}", ",").replace("\\,", ",").replace("\\$", "$")
    text = re.sub(r"(?<=[0-9])\s*(?=\\[dt]?frac)", " ", text)  # 1\frac{1}{2} is 1 1/2, not 11/2
    text = re.sub(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", text)
    # "= - 5" is negative, "7 - 5" is not
    return re.sub(r"([=:#{] *)- +(?=[$€£¥]?[0-9])", r"\1-", text)


def marked_part(text):
    """(part, rest): the line behind the last ####, else what is in the last \\boxed{}, and the text
    behind it. (None, "") without either."""
    if "####" in text:
        part, _, rest = text.rpartition("####")[2].strip().partition("\n")
        return part, rest
    if boxes := list(BOXED.finditer(text)):
        return boxes[-1][1], text[boxes[-1].end():]
    return None, ""


def as_fraction(match):
    """The exact value of a match of NUMBER."""
    number = Fraction(match["number"].replace(",", "")) / int(match["divisor"] or 1)
    number += int(match["whole"] or 0)
    return -number if match["sign"] else number


def final_number(text):
    """(number, rest): the final answer of a text as an exact Fraction, and the text behind it.
    (None, "") without one.

    It is the first number of the marked part, else the last number of all. Of an equation that is
    marked the right side counts: #### 2 * 36 = 72. Currency, units and % do not matter."""
    text = plain_latex(text)
    part, rest = marked_part(text)
    if part is None:
        found = list(NUMBER.finditer(text))[-1:]
    else:
        found = list(NUMBER.finditer(part.rpartition("=")[2]))[:1]
    try:
        (match,) = found
        return as_fraction(match), match.string[match.end():] + rest
    except (ValueError, ZeroDivisionError):  # no number; thousands of digits; 3/0
        return None, ""


def gold_number(record):
    """The final number of the answer."""
    answer = record["answer"]
    number = None
    if isinstance(answer, (str, int, float)):
        number, _ = final_number(str(answer))
    need(number is not None, "a number in the answer", answer)
    return number


def math_answer(record, response):
    """`math`: 1.0 if the final number is exactly the answer's.

    WARNING  "#### 72 blah blah" passes: for diversity `math_strict`."""
    return float(final_number(response)[0] == gold_number(record))


def says_nothing(character):
    """Space, a currency sign or punctuation."""
    return character.isspace() or character in "$€£¥" or unicodedata.category(character)[0] == "P"


def math_strict(record, response):
    """`math`, but 0.0 if anything follows that says something. What comes before is free."""
    number, rest = final_number(response)
    return float(number == gold_number(record) and all(map(says_nothing, rest)))


# -------------------------------------------------------------------------------------- countdown
def given_numbers(*holders):
    """(numbers, target) of a countdown puzzle, of the first holder that has both."""
    nums = target = None
    for holder in holders:
        if isinstance(holder, dict) and "nums" in holder and "target" in holder:
            nums, target = holder["nums"], holder["target"]
            break
    whole_numbers = isinstance(nums, list) and all(type(n) is int and n >= 0 for n in nums)
    need(
        whole_numbers and nums and type(target) is int,
        "nums, a list of whole numbers, and target, a whole number",
        (nums, target),
    )
    return sorted(nums), target


def countdown(record, response):
    """1.0 if the response ends with an expression that has exactly the target's value and uses
    every given number once and no other; else 0.0. The numbers are in the answer, row or `meta`.

    The expression is what <answer></answer> holds, else the last line, each with or without
    "Answer:" before it and "= target" on a side. Free is what comes before; nothing may follow."""
    row = published(record)
    nums, target = given_numbers(record["answer"], row, row.get("meta"))

    text = response.strip().rpartition("\n")[2]
    if "<answer>" in response:
        tagged = re.search(r"<answer>([^<]*)</answer>\s*$", response)
        text = tagged[1] if tagged else ""
    text = text.translate(str.maketrans("×÷−", "*/-")).rpartition(":")[2]

    sides = [side.strip(" \t\n.`$*") for side in text.split("=")]
    expressions = [side for side in sides if side != str(target)]  # without "= 24"
    if len(sides) > 2 or len(expressions) != 1 or value(expressions[0]) != target:
        return 0.0
    used = map(int, re.findall("[0-9]+", expressions[0]))
    return float(sorted(used) == nums)


# ----------------------------------------------------------------------------- words and sentences
IRREGULAR = [  # the commonest in CommonGen
    "sit sat", "stand stood", "hold held", "run ran", "ride rode", "throw threw", "take took",
    "eat ate", "wear wore", "drink drank", "catch caught", "go went", "drive drove", "fall fell",
    "swim swam", "fly flew", "make made", "lie lay lying", "man men", "woman women",
    "child children",
]
IRREGULAR = {group.split()[0]: group.split() for group in IRREGULAR}


def forms(word):
    """A word and its common English inflections; "sitted", which is none, does no harm."""
    last = word[-1]
    endings = ["", "s", "es", "d", "ed", "ing", last + "ed", last + "ing"]  # stop, stopping
    found = {word + ending for ending in endings}
    if last == "e":
        found.add(word[:-1] + "ing")  # bake, baking
    if last == "y":
        found |= {word[:-1] + "ies", word[:-1] + "ied"}  # cry, cried
    return found.union(IRREGULAR.get(word, []))


def given_words(record):
    """The words to use: the answer, or its "words"; lower case, "hot dog" as two."""
    given = record["answer"]
    if isinstance(given, dict):
        given = given.get("words")
    all_words = isinstance(given, list) and all(isinstance(w, str) and w.strip() for w in given)
    need(all_words and given, "a list of words as the answer", given)
    return " ".join(given).lower().split()


def coverage(record, response):
    """1.0 if the response is one sentence of at most 30 words, ended by a full stop, ! or ?, that
    uses every given word in one of its `forms`; else 0.0.

    WARNING  Sense is not looked at: a bare list of the words passes. Keep beta above 0."""
    given = given_words(record)
    text = response.strip().lower()
    used = re.findall(r"\w+(?:-\w+)*", text)
    if not re.fullmatch(r"[^.!?\n]+[.!?]", text) or len(used) > 30:
        return 0.0
    return float(not any(forms(word).isdisjoint(used) for word in given))


def references(record):
    """The reference texts: the answer, one or several, or its "references"; no empty ones."""
    texts = record["answer"]
    if isinstance(texts, dict):
        texts = texts.get("references")
    if not isinstance(texts, list):
        texts = [texts]
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    need(texts, "a text, or a list of texts, as the answer", record["answer"])
    return texts


def rouge(record, response):
    """ROUGE-L F1 against the reference, the best over several: between 0 and 1.

    WARNING  It pays little for a good answer other than the one somebody happened to write.
    `hf:MODEL` judges open-ended tasks better."""
    mine = words(response)

    def f1(reference):
        return 2 * lcs(mine, reference) / (len(mine) + len(reference))

    return max(f1(words(text)) for text in references(record))


REWARDS = {  # all lie in [0, 1]
    "instruct": instruct, "summarize": summarize, "story": story, "reason": reason,
    "math": math_answer, "math_strict": math_strict, "countdown": countdown,
    "coverage": coverage, "rouge": rouge,
}
