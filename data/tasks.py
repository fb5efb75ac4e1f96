"""Prompts and rewards. A task is a file of prompts (JSON, one object per line) and a function that scores a response.

A reward is a plain function of one row and one response:

    def reward(row: dict, response: str) -> float      # 1.0 right, 0.0 wrong, or anything in between

`row` is the whole JSON object of the prompt, so that `row["answer"]` can be anything the reward needs. To add a task,
write such a function, put it into REWARDS, and put its prompts into data/NAME.jsonl. Or add nothing here and say
`python train.py --data my.jsonl --reward my.py:function` (see `load_reward` for what that function is given).

WARNING  The reward decides whether diversity is bought with quality. A reward that gives credit to a *part* of a
response ("contains the right word") pays the model for a right start followed by random text, because random text
spans volume. Each of the rewards below therefore demands that the whole response be right.
"""

import ast
import importlib.util
import json
import re
from fractions import Fraction
from pathlib import Path

from dqo import BadInput

HERE = Path(__file__).resolve().parent


def normalize(text):
    """Lower case, single spaces, no space before punctuation, no final period: what a reader would call the same text.
    "The old dog sleeps ." and "the old dog sleeps." are equal; `distinct correct` in eval.py counts with it too."""
    text = re.sub(r"\s+([.,!?])", r"\1", " ".join(text.lower().split()))
    return text[:-1].rstrip() if text.endswith(".") else text


def choice(patterns):
    """A regex that matches one of several."""
    return "(?:" + "|".join(patterns) + ")"


# ------------------------------------------------------------------------------------------- the miniature tasks
def instruct(row, response):
    """Instruction following: "recommend a city in europe" -> one name of that kind, and nothing else."""
    return float(normalize(response) in row["answer"])


BOUGHT = ["bought", "got", "purchased"]  # most popular first, as in all lists here (make_tiny.py draws by rank)


WEATHER = {"rain": "it rained all day", "cold": "it was very cold", "wind": "there was a strong wind", "heat": "the sun was burning",
           "crowd": "the streets were full"}


def summarize(row, response):
    """Summarization: one sentence that keeps who, what and where, and invents nothing.

    Free are the verb, active or passive, the order, and the details: the colour, the day, the weather. So a right
    summary is a core sentence, the place once, and day and weather at most once each, before or after the core."""
    f = {key: re.escape(value) for key, value in row["answer"].items()}
    thing = rf"an? (?:{f['color']} )?{f['what']}"
    core = rf"(?:{f['who']} {choice(BOUGHT)} {thing}|{thing} was {choice(BOUGHT)} by {f['who']})"
    detail = {"place": rf"(?:at|in) the {f['where']}", "when": rf"on {f['when']}", "weather": rf"despite the {f['weather']}"}
    any_detail = choice(detail.values())
    text = normalize(response)
    if not re.fullmatch(rf"(?:{any_detail},? )*{core}(?: {any_detail})*", text):
        return 0.0
    times = {name: len(re.findall(pattern, text)) for name, pattern in detail.items()}
    return float(times["place"] == 1 and times["when"] <= 1 and times["weather"] <= 1)


SUBJECTS = "dog cat girl boy king bird horse fox queen wolf bear mouse teacher farmer sailor wizard".split()
STORY_PLACES = "park house river forest garden castle road lake barn boat tower bridge cave school tree hill".split()
ADJECTIVES = "old little happy big brave tired quiet hungry young lonely clever lazy proud gentle".split()
VERBS = "sleeps plays runs sings waits dances hides walks jumps laughs dreams works swims rests".split()
ADVERBS = "quietly happily alone slowly often gladly again softly".split()
PREPOSITIONS = "in near by behind under beside".split()
STORY = re.compile(rf"the (?:{choice(ADJECTIVES)} )?(?P<subject>{choice(SUBJECTS)}) {choice(VERBS)} (?:{choice(ADVERBS)} )?"
                   rf"{choice(PREPOSITIONS)} the (?:{choice(ADJECTIVES)} )?(?P<place>{choice(STORY_PLACES)})")


def story(row, response):
    """Story generation: one sentence of the grammar above that uses all given words."""
    match = STORY.fullmatch(normalize(response))
    return float(match is not None and sorted(match.groups()) == sorted(row["answer"]))


def value(expression):
    """The exact value of an arithmetic expression of integers, + - * / and parentheses, as a Fraction, or None.

    WARNING  Text from a model is parsed, never `eval`-ed, and limited in size first: 9**9**9 must not hang the run."""
    if not re.fullmatch(r"[0-9+\-*/() ]{1,100}", expression) or "**" in expression or "//" in expression:
        return None

    def walk(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if not isinstance(node, ast.BinOp):
            raise ValueError("not arithmetic")
        a, b = walk(node.left), walk(node.right)
        return {ast.Add: a.__add__, ast.Sub: a.__sub__, ast.Mult: a.__mul__, ast.Div: a.__truediv__}[type(node.op)](b)

    try:
        return walk(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def reason(row, response):
    """Reasoning: "make 24" -> an arithmetic expression of at least two numbers that equals 24."""
    expression = normalize(response)
    return float(re.search(r"\d\D*[+\-*/]\D*\d", expression) is not None and value(expression) == row["answer"])


REWARDS = {"instruct": instruct, "summarize": summarize, "story": story, "reason": reason}
TASKS = list(REWARDS)  # the default of --data: all four in one run


# ------------------------------------------------------------------------------------------ loading and scoring
def load_rows(data, split, limit=0, prompt_key="prompt", answer_key="answer"):
    """The prompts as a list of dicts with at least "prompt", "answer" and "task".

    data: miniature tasks by name ("story" or "story,reason"), or the path of a .jsonl file. Rows that name another
    split than `split` ("train" or "test") are left out; rows without a "split" belong to both.
    Raises BadInput with file and line."""
    names, rows = data.split(","), []
    unknown = [n for n in names if n not in REWARDS]
    if unknown and len(names) > 1 or unknown and not data.endswith((".jsonl", ".json")):
        raise BadInput(f"--data {data}: no task {unknown[0]!r}; there are {', '.join(REWARDS)}, or give a .jsonl file")
    for name in names:
        path = Path(name) if unknown else HERE / f"{name}.jsonl"
        rows += [dict(r, task=path.stem) for r in read_jsonl(path, prompt_key, answer_key) if r.get("split", split) == split][:limit or None]
    if not rows:
        raise BadInput(f"--data {data}: no prompts for the {split} split")
    return rows


def read_jsonl(path, prompt_key, answer_key):
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--data {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict) or prompt_key not in row:
            raise BadInput(f"{path}, line {number}: no {prompt_key!r} in this row; name the right key with --prompt-key")
        prompt = row[prompt_key]
        messages = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m and "content" in m for m in prompt)
        if not messages and not (isinstance(prompt, str) and prompt.strip()):
            raise BadInput(f"{path}, line {number}: {prompt_key!r} must be text or a list of chat messages, and not empty")
        rows.append({**row, "prompt": prompt, "answer": row.get(answer_key)})
    return rows


def load_reward(reward, data):
    """function(prompts, responses, rows) -> list of floats: scores any mixture of rows.

    reward: None (each miniature task has its own), the name of one, or `file.py:function` with that same signature."""
    if reward is None or reward in REWARDS:
        if reward is None and any(name not in REWARDS for name in data.split(",")):
            raise BadInput(f"--data {data} needs --reward: a name ({', '.join(REWARDS)}) or file.py:function")
        return lambda prompts, responses, rows: [REWARDS[reward or row["task"]](row, text) for row, text in zip(rows, responses)]
    path, _, name = reward.rpartition(":")
    if not path.endswith(".py"):
        raise BadInput(f"--reward {reward}: no such reward; there are {', '.join(REWARDS)}, or give file.py:function")
    if not Path(path).is_file():
        raise BadInput(f"--reward {reward}: no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise BadInput(f"--reward {reward}: {path} defines no function {name!r}")
    return getattr(module, name)
