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
from fractions import Fraction

from data import maths
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
def math_strict(record, response):
    """1.0 if the last line is `#### N` and no more, N exactly the answer's number (GSM8K).
    What comes before is free; if more could follow, diversity would be bought with it."""
    answer = str(record["answer"]).strip().rstrip(".")
    gold = maths.last_number(answer if "####" in answer else f"#### {answer}")
    need(gold is not None, "a number as the answer, alone or on a last line `#### N`,", answer)
    return float(maths.last_number(response) == gold)


def math_answer(record, response):
    """`math`: 1.0 if math-verify finds the end of the response equal to the answer. What would
    keep it busy for seconds is 0.0.

    WARNING  "#### 72 blah blah" passes: for diversity `math_strict`."""
    answer = record["answer"]
    gold = maths.answer(str(answer)) if isinstance(answer, (str, int, float)) else []
    need(gold, "mathematics, alone or marked by #### or \\boxed{}, as the answer,", answer)
    return float(maths.equal(gold, maths.last_expression(response)))


math_answer.package = "math-verify"


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


def plain(text):
    r"""8 \times \frac{3}{4} as 8 * ((3)/(4)), without what sets mathematics off."""
    text = text.translate(str.maketrans("×·÷−–", "**/--", "$`")).replace("\\div", "/")
    text = re.sub(r"\\(times|cdot)(?![a-z])", "*", text)
    text = re.sub(r"\\(left|right|[()\[\],])", "", text)
    fractions = 1
    while fractions:
        fraction = r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"
        text, fractions = re.subn(fraction, r"((\1)/(\2))", text)
    return text.strip()


def countdown(record, response):
    r"""1.0 if the response ends with an expression that has exactly the target's value and uses
    every given number once and no other; else 0.0. The numbers are in the answer, row or `meta`.

    The expression is what <answer></answer> holds, else the last line, each in \boxed{} or not,
    with or without "Answer:" before it and "= target" on a side. Nothing may follow."""
    row = published(record)
    nums, target = given_numbers(record["answer"], row, row.get("meta"))

    text = plain(response[-1000:])
    if "<answer>" in response:
        tagged = re.search("<answer>([^<]*)</answer>$", text)
        text = tagged[1] if tagged else ""
    inside, rest = maths.boxed(text.rpartition("\n")[2])
    text = inside if inside and not rest.strip(" .*") else rest

    sides = [side.strip(" \t.*") for side in text.rpartition(":")[2].split("=")]
    expressions = [side for side in sides if side != str(target)]  # without "= 24"
    if len(sides) > 2 or len(expressions) != 1 or value(expressions[0]) != target:
        return 0.0
    used = map(int, re.findall("[0-9]+", expressions[0]))
    return float(sorted(used) == nums)


# ----------------------------------------------------------------------------- words and sentences
# What simplemma leaves alone or takes for another word.
LEMMAS = (
    "bore:bear bent:bend bound:bind bit:bite broke:break dove:dive drunk:drink felt:feel gone:go "
    "ground:grind left:leave people:person rose:rise rung:ring shook:shake shot:shoot swore:swear "
    "thought:think trod:tread won:win worse:bad wound:wind"
)
LEMMAS = dict(pair.split(":") for pair in LEMMAS.split())


def is_form(token, word):
    """Whether simplemma knows it as one, or it has a regular ending: sitting, baking, shelves."""
    from simplemma import lemmatize
    lemma = LEMMAS.get(token) or lemmatize(token, lang="en")
    if token == word or lemma in (word, lemmatize(word, lang="en")):
        return True
    stem, last = re.escape(word.removesuffix("e")), re.escape(word[-1])
    regular = rf"{stem}{last}?(s|es|ed|ings?|ers?|est)|{stem.removesuffix('f')}ves"
    return re.fullmatch(regular, token) is not None


def given_words(record):
    """The words to use: the answer, or its "words"; lower case, "hot dog" as two."""
    given = record["answer"]
    if isinstance(given, dict):
        given = given.get("words")
    all_words = isinstance(given, list) and all(isinstance(w, str) and w.strip() for w in given)
    need(all_words and given, "a list of words as the answer", given)
    return " ".join(given).lower().split()


# The end of a sentence within a text, but not that of Mr. or 5 p.m.; and a sentence cut short.
NOT_ONE = re.compile(
    r"(?<!\.)(?<!\b[a-z])(?<!\b(?:mr|ms|dr|st|vs))(?<!\bmrs)[.!?]\s+\w|\n"
    r"|\b(?:a|an|the|and|or|of)$",
    re.IGNORECASE,
)


def coverage(record, response):
    """1.0 if the response is one sentence of at most 50 words that has a form of every given word,
    each its own; else 0.0. The full stop may lack, people forget it too.

    WARNING  Sense is not looked at: "dogs run frisbees catch" passes. Keep beta above 0."""
    given, text = given_words(record), response.strip().lower()
    tokens = re.findall(r"[^\W_]+", text)
    is_list = set(tokens) <= {*given, "and"}
    if is_list or NOT_ONE.search(text) or len(text.split()) > 50:
        return 0.0
    for word in sorted(given, key=len, reverse=True):  # "a skier skis": the longer word first
        form = next((token for token in tokens if is_form(token, word)), None)
        if form is None:
            return 0.0
        tokens.remove(form)
    return 1.0


coverage.package = "simplemma"


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


rouge.threshold = None  # from which a response were correct; that of the others is 1


REWARDS = {  # all lie in [0, 1]
    "instruct": instruct, "summarize": summarize, "story": story, "reason": reason,
    "math": math_answer, "math_strict": math_strict, "countdown": countdown,
    "coverage": coverage, "rouge": rouge,
}
