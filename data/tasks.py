"""Tasks: prompts, and who judges the answers.

A task is a source of rows, a template that makes prompt and answer of a published row, and a
reward for one response, between 0 and 1. Your own need none of this: --data my.jsonl has rows with
"prompt", a text or chat messages, whatever the reward needs, and "split", train or test (else they
are of both); of --reward my.py:score, score(prompts, responses, rows) returns a number for each.

WARNING  A reward that pays for a *part* of a response pays for a right start followed by random
text, because random text spans volume. So the rewards here demand that the whole be right.
"""

import ast
import importlib.util
import json
import math
import operator
import re
import sys
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fractions import Fraction
from functools import cache
from pathlib import Path

from data.metrics import nfc, normalize, rouge_l, words
from dqo import BadInput

HERE = Path(__file__).resolve().parent


# ---- the miniature tasks, of make_tiny.py
LINES = (HERE / "words.txt").read_text("utf-8").splitlines()  # most popular words first
WORDS = {kind: x.split() for kind, x in (line.split(": ") for line in LINES)}


def choice(patterns):
    return "(?:" + "|".join(patterns) + ")"


def one(kind):
    return choice(WORDS[kind])


def instruct(row, response):
    """"recommend a city in europe" -> one name of that kind, no more. Answer: a list of names."""
    return float(normalize(response) in names(row["answer"]))


def names(answer):
    if not (isinstance(answer, list) and answer and all(isinstance(x, str) and x for x in answer)):
        raise BadInput("a list of texts is needed")
    return [normalize(name) for name in answer]


def summarize(row, response):
    """One sentence that keeps who, what and where, and invents nothing: a core, active or passive,
    and around it the place once, day and weather at most once."""
    fact = {key: re.escape(normalize(text)) for key, text in row["answer"].items()}
    thing = rf"an? (?:{fact['color']} )?{fact['what']}"
    core = choice([rf"{fact['who']} {one('bought')} {thing}",
                   rf"{thing} was {one('bought')} by {fact['who']}"])
    details = [rf"(?:at|in) the {fact['where']}", rf"on {fact['when']}",
               rf"despite the {fact['weather']}"]
    text = normalize(response)
    whole = re.fullmatch(rf"(?:{choice(details)},? )*{core}(?: {choice(details)})*", text)
    place, day, weather = (len(re.findall(detail, text)) for detail in details)
    return float(whole is not None and place == 1 and day <= 1 and weather <= 1)


STORY = re.compile(
    rf"the (?:{one('adjectives')} )?({one('subjects')}) {one('verbs')} (?:{one('adverbs')} )?"
    rf"{one('prepositions')} the (?:{one('adjectives')} )?({one('places')})")


def story(row, response):
    """A sentence of the grammar above that uses both words."""
    match, given = STORY.fullmatch(normalize(response)), sorted(names(row["answer"]))
    return float(match is not None and sorted(match.groups()) == given)


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.UAdd: operator.pos, ast.USub: operator.neg}


def value(expression):
    """The exact value of an expression of integers, + - * / and parentheses, or None. WARNING  Text
    from a model is parsed, never `eval`-ed, and limited in size first."""
    def exact(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](exact(node.operand))
        return OPERATORS[type(node.op)](exact(node.left), exact(node.right))

    if not re.fullmatch(r"[0-9+\-*/() ]{1,100}", expression):
        return None
    try:
        return exact(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, AttributeError, ZeroDivisionError, RecursionError):
        return None


def reason(row, response):
    """"make 24" -> an arithmetic expression of at least two numbers that equals 24."""
    expression, target = normalize(response), Fraction(row["answer"])
    two_numbers = re.search(r"\d\D*[+\-*/]\D*\d", expression)
    return float(two_numbers is not None and value(expression) == target)


# ---- the tasks of the paper
def gsm8k_prompt(row):
    return (f"{row['question']}\n\nThink step by step. Write the answer, a number alone, on the "
            "last line after ####."), row["answer"]


NUMBER = re.compile(  # 72  -3  1,234.50  $18  .5
    r"####\s*(-?[$€£¥]?|[$€£¥]-)((?:\d{1,30}|\d{1,3}(?:,\d{3}){1,9}|(?=\.))(?:\.\d{1,30})?)", re.A)


def last_number(text):
    """The exact N of a last line `#### N`; None if that line is anything else."""
    line = text.strip().rpartition("\n")[2].strip()
    found = NUMBER.fullmatch(re.sub("[−–]", "-", line))
    if found:
        return Fraction(found[2].replace(",", "")) * (-1 if "-" in found[1] else 1)


def gsm8k(row, response):
    """1.0 if the last line is `#### N` and no more, N exactly the answer's number. If more could
    follow, diversity would be bought with it."""
    right = last_number("#### " + str(row["answer"]).rpartition("####")[2].rstrip("."))
    if right is None:
        raise BadInput("a number is needed, or a text that ends in #### N")
    return float(last_number(response) == right)


def math_reward(row, response):
    """1.0 if math-verify finds the last expression equal to the answer's. WARNING  What follows it
    is free."""
    from math_verify import parse, verify
    answer = str(row["answer"]).rpartition("####")[2]
    right = parse(rf"\boxed{{{answer}}}")
    if not right:
        raise BadInput("math-verify finds no expression in it")
    return float(verify(right, parse(response)))


def commongen_prompt(row):
    words = row["concepts"]
    return f"Write one sentence that uses all of these words: {', '.join(words)}.", words


LEMMAS = dict(pair.split(":") for pair in WORDS["lemmas"])  # which simplemma does not know


def is_form(token, word):
    """Whether simplemma knows it as one, or its ending is regular."""
    from simplemma import lemmatize
    lemma = LEMMAS.get(token) or lemmatize(token, lang="en")
    stem, last = re.escape(word.removesuffix("e")), re.escape(word[-1])
    regular = rf"{stem}{last}?(s|es|ed|ings?|ers?|est)|{stem.removesuffix('f')}ves"
    return bool(token == word or lemma in (word, lemmatize(word, lang="en"))
                or re.fullmatch(regular, token))


# A sentence that ends within the text, if not at "mr. smith" or "5 p.m. today"; or is cut short.
NOT_ONE = re.compile(r"(?<!\.)(?<!\b[a-z])(?<!\b(?:mr|ms|dr|st|vs))(?<!\bmrs)[.!?]\s+\w|\n|"
                     r"\b(?:a|an|the|and|or|of)$")


def coverage(row, response):
    """1.0 for one sentence of at most 50 words with a form of every given word, each its own.
    WARNING  Sense is not looked at: "dogs run frisbees catch" passes. Keep beta above 0."""
    text = nfc(response).strip().lower()
    given = " ".join(names(row["answer"])).split()
    tokens = [token for token in words(text) if token[0].isalnum()]
    is_list = set(tokens) <= {*given, "and"}
    if is_list or NOT_ONE.search(text) or len(text.split()) > 50:
        return 0.0
    for word in sorted(given, key=len, reverse=True):  # "a skier skis": the longer word first
        forms = [token for token in tokens if is_form(token, word)]
        if not forms:
            return 0.0
        tokens.remove(forms[0])
    return 1.0


def dolly_prompt(row):
    return f"{row['instruction']}\n\n{row['context']}".strip(), row["response"]


def cnn_prompt(row):
    asked = "Summarize this article in three or four sentences."
    return f"{asked}\n\n{row['article']}", row["highlights"]


def rouge(row, response):
    """WARNING  Good answers that nobody wrote down get little; hf:MODEL judges better."""
    return rouge_l(row["answer"], response)


@cache  # some take seconds
def puzzle_set(name, seed):
    from reasoning_gym.factory import DATASETS, create_dataset
    if name not in DATASETS:
        near = ", ".join(get_close_matches(name, DATASETS, 9, 0))
        raise BadInput(f"--data rg:{name}: no task of reasoning-gym; near: {near}")
    return loaded("--data", lambda _: create_dataset(name, size=1000, seed=seed), f"rg:{name}")


def puzzle(row, response):
    """What reasoning-gym pays for what is in <answer>."""
    from reasoning_gym.utils import extract_answer
    task = puzzle_set(*row["puzzle"])
    try:
        return task.score_answer(extract_answer(response), row)
    except Exception:  # some raise at nonsense
        return 0.0


def puzzles(name, split):
    """(where, row) of each, from its own seed."""
    from reasoning_gym.utils import SYSTEM_PROMPTS
    which = name, 0 if split == "train" else 1000
    for row in puzzle_set(*which):
        yield f"rg:{name}", dict(row, puzzle=which, answer=str(row["answer"]),
                                 prompt=f"{SYSTEM_PROMPTS['simple']}\n\n{row['question']}")


# ---- names become rows
def loaded(what, function, name):
    """function(name); what a library raises becomes one line."""
    try:
        return function(name)
    except (BadInput, ModuleNotFoundError):
        raise
    except Exception as error:
        reason = (str(error.__cause__ or error) or repr(error)).split()
        raise BadInput(f"{what} {str(name)[:80]}: {' '.join(reason)[:300]}") from None


@dataclass
class Task:
    source: str                    # what `read` takes
    reward: object = None          # (row, response) -> number; None: --reward says
    template: object = None        # row -> (prompt, answer); None: the row has them
    train: str = "train"           # the splits, as the hub calls them
    test: str = "test"
    threshold: float | None = 1.0  # from which reward a response is correct; None: none


OWN = dict(instruct=instruct, summarize=summarize, story=story, reason=reason, categories=instruct)
TASKS = {name: Task(str(HERE / f"{name}.jsonl"), reward) for name, reward in OWN.items()} | {
    "gsm8k": Task("openai/gsm8k:main", gsm8k, gsm8k_prompt),
    "math": Task("openai/gsm8k:main", math_reward, gsm8k_prompt),
    "commongen": Task("allenai/common_gen", coverage, commongen_prompt, test="validation"),
    "dolly": Task("databricks/databricks-dolly-15k", rouge, dolly_prompt, "train[5%:]",
                  "train[:5%]", threshold=None),
    "cnn_dailymail": Task("abisee/cnn_dailymail:3.0.0", rouge, cnn_prompt, threshold=None),
    "rg": Task("", puzzle),
}


def task_of(name):
    """A task by name; NAME:FILE has its template and reward, and your rows."""
    known, _, file = name.partition(":")
    if known not in TASKS:
        return Task(name, threshold=None)
    return replace(TASKS[known], source=file or TASKS[known].source)


FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read(source, split):
    """(where, row) of each row of a file or of a hub data set, OWNER/NAME:CONFIG."""
    path = Path(source).expanduser()
    format = next((FORMATS[x] for x in path.suffixes if x in FORMATS), None)
    here = path.exists() or source[0] in "~./" or format
    if here and not (path.is_file() and format):
        raise BadInput(f"--data {source}: no such file, or none that ends in {', '.join(FORMATS)}")
    if path.suffix == ".jsonl":
        yield from read_lines(path, source)
        return
    if not here and "/" not in source:
        raise BadInput(f"--data {source}: no task ({', '.join(TASKS)}), file, or data set of the "
                       "hub, OWNER/NAME")
    from datasets import load_dataset
    named, more = source.split(":"), dict(split=split)
    if here:
        named, more = [format], dict(data_files=str(path), split="train")
    rows = loaded("--data", lambda _: load_dataset(*named, **more), source)
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


def read_lines(path, source):
    # not splitlines(): U+2028 may stand inside a JSON text
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            row = dict(json.loads(line.decode("utf-8-sig").strip() or "{}"))
        except (ValueError, TypeError):
            raise BadInput(f"{source}, line {number}: not a JSON object in UTF-8: "
                           f"{str(line[:80])[1:]}") from None
        if row:
            yield f"{source}, line {number}", row


def is_prompt(prompt):
    """A text, or chat messages of text."""
    if isinstance(prompt, str):
        return prompt.strip() != ""
    return isinstance(prompt, list) and prompt != [] and all(
        isinstance(x, dict) and "role" in x and isinstance(x.get("content"), str) for x in prompt)


def load_rows(data, split, limit=0):
    """The first `limit` rows of each task or source: dicts with prompt, answer, what was published,
    and "_task" and "_where", file and line."""
    rows = []
    for name in data.split(","):
        task, found = task_of(name), {}
        published = {"train": task.train, "test": task.test}.get(split, split)
        for where, row in (puzzles if task.reward is puzzle else read)(task.source, published):
            if task.template:
                row["prompt"], row["answer"] = loaded(f"{where}:", task.template, row)
            if (row.get("split") or split) != split:
                continue
            if not is_prompt(row.get("prompt")):
                raise BadInput(f'{where}: "prompt" must be text, or chat messages: {str(row)[:80]}')
            key = str((row["prompt"], row.get("answer")))  # published sets repeat rows
            found.setdefault(key, dict(row, _task=name, _where=where))
            if len(found) == limit:
                break
        rows += found.values()
    if not rows:
        raise BadInput(f"--data {data}: no rows of the {split} split")
    return rows


# ---- names become rewards
def load_reward(name, rows):
    """function(prompts, responses, rows) -> numbers. name: a task, hf:MODEL, file.py:function, or
    None, each row's own task. Tries the answers of the rows."""
    if name and name.startswith("hf:"):
        return loaded("--reward", reward_model, name)
    if name and ".py" in name:
        return checked(function_in(name), name)

    def score(row, response):
        return task_of(name or row["_task"]).reward(row, response)

    for row in rows:
        task, answer = name or row["_task"], row.get("answer")
        if task_of(task).reward is None:
            raise BadInput(f"--reward: {task} has none; give {', '.join(TASKS)}, hf:MODEL, or "
                           "file.py:function")
        try:
            if answer in (None, ""):
                raise BadInput("there is none")
            score(row, "")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{row['_where']}: the reward cannot use the answer {answer!r:.60}: "
                           f"{error}") from None
    return lambda prompts, responses, rows: list(map(score, rows, responses))


def checked(function, name):
    """A reward that must return a finite number per response."""
    def score(prompts, responses, rows):
        scores = function(prompts, responses, rows)
        try:
            numbers = [float(x) for x in scores]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(responses) or not all(map(math.isfinite, numbers)):
            raise BadInput(f"--reward {name}: {len(responses)} finite numbers are needed, not "
                           f"{str(scores)[:80]}")
        return numbers
    return score


def function_in(name):
    """The function that `file.py:function` names. The file may import its neighbours."""
    path, _, function = name.rpartition(":")
    path = Path(path).expanduser().resolve()
    module = f"own {path}"  # the file may be called random.py
    if not path.is_file():
        raise BadInput(f"{name}: no such file.py:function")
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        sys.path.append(str(path.parent))
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    found = getattr(sys.modules[module], function, None)
    if not callable(found):
        raise BadInput(f"{name}: no function {function} in it")
    return found


def reward_model(name, batch=16):
    """The score of a sequence-classification model with one output, which reads a conversation by
    its chat template, or a pair of texts."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    name = name.removeprefix("hf:")
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right", truncation_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    model, found = AutoModelForSequenceClassification.from_pretrained(
        name, dtype=dtype, output_loading_info=True)
    if found["missing_keys"] or model.config.num_labels != 1:  # else its head would be random
        raise BadInput(f"hf:{name} needs a trained classification head with one output")
    model = model.to(device).eval()
    # it reads the last token that is no padding
    size = batch if model.config.pad_token_id == tokenizer.pad_token_id else 1

    def encode(prompt, response):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if tokenizer.chat_template:
            messages = messages + [{"role": "assistant", "content": response}]
            return tokenizer.apply_chat_template(messages, return_dict=True, truncation=True)
        text = "\n".join(message["content"] for message in messages)
        return tokenizer(text, response, truncation=True)

    @torch.no_grad()
    def score(prompts, responses, rows):
        encoded, scores = list(map(encode, prompts, responses)), []
        for i in range(0, len(encoded), size):
            inputs = tokenizer.pad(encoded[i:i + size], return_tensors="pt").to(device)
            scores += model(**inputs).logits[:, 0].float().tolist()
        return scores
    return score
