"""Prompts and rewards. A task is a file of prompts (JSON, one object per line) and a function that scores a response.

A reward is a plain function of one row and one response:

    def reward(row: dict, response: str) -> float      # 1.0 right, 0.0 wrong, or anything in between

`row` is the whole JSON object of the prompt, so that `row["answer"]` can be anything the reward needs. To add a task,
write such a function, put it into REWARDS, and put its prompts into data/NAME.jsonl, or a template into READY. Or add nothing here and say
`python train.py --data my.jsonl --reward my.py:function` (see `load_reward` for what that function is given).

WARNING  The reward decides whether diversity is bought with quality. A reward that gives credit to a *part* of a
response ("contains the right word") pays the model for a right start followed by random text, because random text
spans volume. So the miniature tasks demand that the whole response be right, and other rewards say what they overlook.
"""

import ast
import importlib.util
import json
import math
import re
import traceback
import unicodedata
import urllib.request
from fractions import Fraction
from numbers import Real
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dqo import BadInput, default_device, first_line, loading, offline, resolve

HERE = Path(__file__).resolve().parent


def normalize(text):
    """Lower case, single spaces, no space before punctuation, no final period: what a reader would call the same text.
    "The old dog sleeps ." and "the old dog sleeps." are equal; `distinct correct` in eval.py counts with it too."""
    text = re.sub(r"\s+([.,!?])", r"\1", " ".join(text.lower().split()))
    return text[:-1].rstrip() if text.endswith(".") else text


def choice(patterns):  # a regex that matches one of several
    return "(?:" + "|".join(patterns) + ")"


# ------------------------------------------------------------------------------------------- the miniature tasks
def instruct(row, response):
    """Instruction following: "recommend a city in europe" -> one name of that kind, and nothing else."""
    return float(normalize(response) in row["answer"])


BOUGHT = ["bought", "got", "purchased"]  # most popular first, as in all lists here (make_tiny.py draws by rank)


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
    need(isinstance(row["answer"], list), "a list of two words as the answer", row["answer"])
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
    need(isinstance(row["answer"], (int, float)), "a number as the answer", row["answer"])
    expression = normalize(response)
    return float(re.search(r"\d\D*[+\-*/]\D*\d", expression) is not None and value(expression) == row["answer"])


# ------------------------------------------------------------------------------------------ rewards for real data
def need(good, what, got):
    if not good:  # a reward cannot use the answer of a row; `check_rows` finds that out before the run starts
        raise ValueError(f"this task or reward needs {what}, not {got!r:.60}")


# A number as people write it: 72  -3  1,234.50  $18  .5  3/4  1 1/2. A minus counts as a sign only if no number stands
# before it ("10-5" holds 10 and 5), and a digit inside a word is no number ("H2O").
NUMBER = re.compile(r"(?P<sign>(?<![\w)])-)?[$€£¥]?(?<![^\W_])(?:(?P<whole>[0-9]{1,9}) (?=[0-9]{1,9}/[0-9]))?"
                    r"(?P<number>[0-9]+(?:,[0-9]{3}\b)*(?:\.[0-9]+)?|(?<!\w)\.[0-9]+)(?:/(?P<divisor>[0-9]{1,9})(?![0-9]|[.,][0-9]))?")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # braces inside are balanced, to depth two


def final_number(text):
    """(number, rest): the final answer of a text as an exact Fraction, and the text behind it. (None, "") without one.

    It is the number that follows the last ####, else the one in the last \\boxed{}, else the last number of all. Of an
    equation behind #### or in a box the right-hand side counts: #### 2 * 36 = 72. Currency, units and % do not matter."""
    text = text.replace("−", "-").replace("{,}", ",").replace("\\,", ",").replace("\\$", "$")
    text = re.sub(r"(?<=[0-9])\s*(?=\\[dt]?frac)", " ", text)  # 1\frac{1}{2} is 1 1/2, not 11/2
    text = re.sub(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", text)
    text = re.sub(r"([=:#{] *)- +(?=[$€£¥]?[0-9])", r"\1-", text)  # "= - 5" is negative, "7 - 5" is not
    marked, rest = None, ""
    if "####" in text:
        marked, _, rest = text.rpartition("####")[2].strip().partition("\n")
    elif boxes := list(BOXED.finditer(text)):
        marked, rest = boxes[-1][1], text[boxes[-1].end():]
    found = list(NUMBER.finditer(text if marked is None else marked.rpartition("=")[2]))
    try:
        match = found[-1 if marked is None else 0]
        number = int(match["whole"] or 0) + Fraction(match["number"].replace(",", "")) / int(match["divisor"] or 1)
    except (IndexError, ValueError, ZeroDivisionError):  # no number; thousands of digits; 3/0
        return None, ""
    return -number if match["sign"] else number, match.string[match.end():] + rest


def gold_number(row):
    number = final_number(str(row["answer"]))[0] if isinstance(row["answer"], (str, int, float)) else None
    need(number is not None, "a number in the answer", row["answer"])
    return number


def math_answer(row, response):
    """`math`: 1.0 if the final number is exactly the answer's.    WARNING  "#### 72 blah blah" passes: for diversity `math_strict`."""
    return float(final_number(response)[0] == gold_number(row))


def math_strict(row, response):
    """`math`, but 0.0 if anything except punctuation, space or a currency sign follows; what comes before is free."""
    number, rest = final_number(response)
    return float(number == gold_number(row) and all(c.isspace() or unicodedata.category(c)[0] == "P" or c in "$€£¥" for c in rest))


def given_numbers(row):
    """(numbers, target) of a countdown puzzle: `nums` and `target` in the answer, in the row itself or in its `meta`."""
    holders = [h for h in (row["answer"], row, row.get("meta")) if isinstance(h, dict) and "nums" in h and "target" in h] or [{}]
    nums, target = holders[0].get("nums"), holders[0].get("target")
    good = isinstance(nums, list) and nums and all(type(n) is int and n >= 0 for n in nums) and type(target) is int
    need(good, "nums, a list of whole numbers, and target, a whole number", (nums, target))
    return sorted(nums), target


def countdown(row, response):
    """1.0 if the response ends with an expression that has the target's value, exactly, and uses every given number once
    and no other; else 0.0. The expression is what <answer></answer> holds, else the last line, each with or without
    "Answer:" before it and "= target" on a side. What comes before is not looked at; nothing may come behind."""
    nums, target = given_numbers(row)
    text = response.strip().rpartition("\n")[2]
    if "<answer>" in response:
        text = (re.findall(r"<answer>([^<]*)</answer>\s*$", response) or [""])[0]
    text = text.translate(str.maketrans("×÷−", "*/-")).rpartition(":")[2]
    sides = [side.strip(" \t\n.`$*") for side in text.split("=")]
    left = [side for side in sides if side != str(target)]  # without "= 24"
    if len(sides) > 2 or len(left) != 1 or value(left[0]) != target:
        return 0.0
    return float(sorted(map(int, re.findall("[0-9]+", left[0]))) == nums)


IRREGULAR = [group.split() for group in (  # the commonest in CommonGen
    "sit sat", "stand stood", "hold held", "run ran", "ride rode", "throw threw", "take took", "eat ate", "wear wore", "drink drank", "catch caught",
    "go went", "drive drove", "fall fell", "swim swam", "fly flew", "make made", "lie lay lying", "man men", "woman women", "child children")]


def forms(word):
    """A word and its common English inflections; some of these are no words ("sitted"), which does no harm."""
    found = {word + ending for ending in ("", "s", "es", "d", "ed", "ing", word[-1] + "ed", word[-1] + "ing")}  # stop, stopping
    if word[-1] in "ey":
        found |= {word[:-1] + ending for ending in (["ing"] if word[-1] == "e" else ["ies", "ied"])}  # bake, baking; cry, cried
    return found.union(*(group for group in IRREGULAR if word == group[0]))


def given_words(row):
    """The words a response has to use: the answer, or its "words"; lower case, "hot dog" as two."""
    words = row["answer"].get("words") if isinstance(row["answer"], dict) else row["answer"]
    need(isinstance(words, list) and words and all(isinstance(w, str) and w.strip() for w in words), "a list of words as the answer", words)
    return " ".join(words).lower().split()


def coverage(row, response):
    """1.0 if the response is one sentence of at most 30 words, ended by a full stop, ! or ?, that uses every given word in
    one of its `forms`; else 0.0.    WARNING  Sense is not looked at: a bare list of the words passes. Keep beta above 0."""
    words, text = given_words(row), response.strip().lower()
    used = re.findall(r"\w+(?:-\w+)*", text)
    return float(bool(re.fullmatch(r"[^.!?\n]+[.!?]", text)) and len(used) <= 30 and all(not forms(word).isdisjoint(used) for word in words))


def references(row):
    """The reference texts: the answer, a text or a list of texts, or its "references"; empty ones are left out."""
    texts = row["answer"].get("references") if isinstance(row["answer"], dict) else row["answer"]
    texts = [t for t in (texts if isinstance(texts, list) else [texts]) if isinstance(t, str) and t.strip()]
    need(texts, "a text, or a list of texts, as the answer", row["answer"])
    return texts


def rouge(row, response):
    """ROUGE-L F1 of the response against the reference, the best over several: between 0 and 1.    WARNING  It pays little
    for a good answer other than the one somebody happened to write. `hf:MODEL` judges open-ended tasks better."""
    from eval import lcs, words  # here, because eval.py imports this file
    mine = words(response)
    return max(2 * lcs(mine, r) / (len(mine) + len(r)) for r in map(words, references(row)))


TASKS = ["instruct", "summarize", "story", "reason"]  # the miniature tasks, the default of --data: all four in one run
REWARDS = {"instruct": instruct, "summarize": summarize, "story": story, "reason": reason, "math": math_answer,
           "math_strict": math_strict, "countdown": countdown, "coverage": coverage, "rouge": rouge}  # all lie in [0, 1]


# --------------------------------------------------------------------------------------------- ready real tasks
# A template makes (prompt, answer) from a row as it is published. Change the wording here; the rewards rely on it.
def field(row, name, kind=str):
    need(isinstance(row.get(name), kind) and row[name], f"{name!r}, a {kind.__name__} that is not empty, in the row", row.get(name))
    return row[name]


def gsm8k(row):
    return f"{field(row, 'question')}\n\nThink step by step. Write the answer, a number alone, on the last line after ####.", field(row, "answer")


def commongen(row):
    words = field(row, "concepts", list)
    return f"Write one sentence that uses all of these words: {', '.join(map(str, words))}.", {"words": words, "references": [row.get("target")]}


def dolly(row):
    context = row.get("context")
    return field(row, "instruction") + (f"\n\n{context}" if isinstance(context, str) and context.strip() else ""), field(row, "response")


def cnn_dailymail(row):
    return f"Summarize this article in three or four sentences.\n\n{field(row, 'article')}", field(row, "highlights")


def countdown_puzzle(row):
    nums, target = given_numbers(dict(row, answer=None))
    return (f"Write an expression that equals {target}. Use each of the numbers {', '.join(map(str, nums))} exactly once, with + - * / and "
            f"parentheses. Put the expression alone on the last line."), {"nums": nums, "target": target}


READY = {  # task: template, reward, published source, name of its test split; None: there is one split, see `load_rows`
    "gsm8k": (gsm8k, "math_strict", "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{split}.jsonl", "test"),
    "commongen": (commongen, "coverage", "allenai/common_gen", "validation"),  # its test split has no references
    "dolly": (dolly, "rouge", "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl", None),
    "cnn_dailymail": (cnn_dailymail, "rouge", "abisee/cnn_dailymail:3.0.0", "test"),
    "countdown": (countdown_puzzle, "countdown", "Jiayi-Pan/Countdown-Tasks-3to4", None),
}


# ------------------------------------------------------------------------------------------------ loading prompts
HUB_ID = re.compile(r"(?!.*\.jsonl?$)[\w.-]+/[\w.-]+(:[\w.-]+)?")


def sources(data):
    """What --data names, as [(task, source)]; the task of a plain file, address or hub id is None."""
    named = [part.partition(":")[::2] for part in data.split(",")]
    if all(task in TASKS and not source or task in READY for task, source in named):
        return [(task, source or (str(HERE / f"{task}.jsonl") if task in TASKS else READY[task][2])) for task, source in named]
    return [(None, data)]


def load_rows(data, split, limit=0, prompt_key="prompt", answer_key="answer"):
    """The prompts as a list of dicts with at least "prompt", "answer", "task" and "where" (file and line, for messages).

    data: tasks by name, separated by commas: miniature (`story`), real as published (`gsm8k`), or real from another source
    in the published format (`gsm8k:SOURCE`); or one SOURCE of your own, whose prompts and answers prompt_key and answer_key
    name. A SOURCE is a .jsonl file, the https:// address of one, or a dataset of the Hugging Face hub (`openai/gsm8k:main`,
    a configuration after the colon). {split} in it stands for train or test: `gsm8k:my/{split}.jsonl`.
    Rows that name another split than `split` ("train" or "test") are left out. Rows without a "split" belong to both; only
    of a task that is published without a test split every 20th row is kept for testing. Raises BadInput."""
    rows = []
    for task, source in sources(data):
        keys = ("prompt", "answer") if task in TASKS else (prompt_key, answer_key)
        template, _, _, test_split = READY.get(task, (lambda row: own_prompt(row, *keys), None, None, "test"))
        if task is None and HUB_ID.fullmatch(source) and not Path(source).exists():
            test_split = min({"test", "validation"} & set(hub(source)), default=None)
        stored_as = (test_split or "train") if split == "test" else split
        mine = {}  # by prompt in a real task, because CommonGen has a row for every reference of a prompt
        for i, (where, row) in enumerate(read(source.replace("{split}", stored_as), stored_as, limit, task)):
            try:
                prompt, answer = template(row)
            except ValueError as error:
                raise BadInput(f"{where}: {error}") from None
            held_out = test_split is None and "split" not in row and (i % 20 == 0) != (split == "test")
            key = prompt if task in READY else i
            if row.get("split", split) != split or held_out:
                continue
            if key in mine and task == "commongen":
                mine[key]["answer"]["references"] += answer["references"]
            elif limit and len(mine) == limit:
                break
            else:
                mine.setdefault(key, {**row, "prompt": prompt, "answer": answer, "task": task or Path(source).stem, "where": where})
        rows += mine.values()
        if not mine:
            raise BadInput(f"--data {data}: no prompts for the {split} split; rows without a \"split\" belong to both")
    return rows


def own_prompt(row, prompt_key, answer_key):
    """The template of your own rows. Half of a character (a lone surrogate) is refused: no tokenizer takes it."""
    if prompt_key not in row:
        raise ValueError(f"no {prompt_key!r} in this row; name the right key with --prompt-key")
    messages = row[prompt_key] if isinstance(row[prompt_key], list) else [{"role": "user", "content": row[prompt_key]}]
    texts = [isinstance(m, dict) and "role" in m and m.get("content") for m in messages]
    if not texts or not all(isinstance(t, str) and t.strip() and not re.search("[\ud800-\udfff]", t) for t in texts):
        raise ValueError(f"{prompt_key!r} must be text or a list of chat messages, and not empty")
    return row[prompt_key], row.get(answer_key)


def read(source, split, limit, task):
    """Yields (where, row) for each row of a source."""
    instead = f"pass --data {task + ':' if task else ''}FILE.jsonl"
    web = re.match("https?://", source)
    if not web and not source.endswith((".jsonl", ".json")) and not Path(source[:250]).exists():
        if HUB_ID.fullmatch(source):
            return (yield from hub(source, limit, split, instead))
        raise BadInput(f"--data {source:.80}: no such task or file; there are {', '.join([*TASKS, *READY])}, .jsonl files, https:// and OWNER/NAME")
    try:
        if not web:
            text = Path(resolve(source)).read_text(encoding="utf-8-sig")
        elif source.startswith("http:"):
            raise ValueError("what comes over http:// may have been changed on its way; use https://")
        else:
            with urllib.request.urlopen(source, timeout=30) as answer:  # 30 seconds without a byte
                text = answer.read().decode("utf-8-sig")
    except Exception as error:  # of the disk, DNS, TLS, HTTP, a timeout, an encoding
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadInput(f"--data {source}: {reason}" + (f"; fetch it yourself and {instead}" if web else "")) from None
    # WARNING  str.splitlines() would also split at U+2028, which may stand inside a JSON text and does in real data
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{source}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise BadInput(f"{source}, line {number}: not a JSON object")
            yield f"{source}, line {number}", row


def hub(source, limit=0, split=None, instead="pass FILE.jsonl"):
    """Yields (where, row) of a split of a hub dataset; without a split, the names of its splits. Needs the `datasets` package."""
    try:
        from datasets import get_dataset_split_names, load_dataset
        if offline():
            raise ConnectionError("the hub cannot be reached")
        if split is None:
            yield from get_dataset_split_names(*source.split(":"))
        else:  # with a limit it is streamed: no full download
            for number, row in enumerate(load_dataset(*source.split(":"), split=split, streaming=bool(limit)), 1):
                yield f"{source} ({split}), row {number}", row
    except ImportError:
        raise BadInput(f"--data {source}: a hub dataset needs one more package: pip install datasets; or download a .jsonl file and {instead}") from None
    except Exception as error:  # it raises errors of many libraries: hub, network, parquet
        raise BadInput(f"--data {source}: {why(error)}; {instead}") from None


# -------------------------------------------------------------------------------------------------------- scoring
def load_reward(reward, data):
    """function(prompts, responses, rows) -> list of floats: scores any mixture of rows, and checks the scores.

    reward: None (each task has its own), the name of one (REWARDS), `hf:MODEL`, or `file.py:function` with that signature.
    It has the attributes `range`, (low, high) if all scores lie there, and `check_row`, see `check_rows`, or None. In your
    file say `function.range = (0, 1)`."""
    if reward is None or reward in REWARDS:
        own = {task: READY[task][1] if task in READY else task for task, _ in sources(data)}
        if reward is None and None in own:
            raise BadInput(f"--data {data} needs --reward: a name ({', '.join(REWARDS)}), hf:MODEL or file.py:function")
        one = lambda row, response="": REWARDS[reward or own[row["task"]]](row, response)
        score = lambda prompts, responses, rows: list(map(one, rows, responses))
        score.range, score.check_row = (0.0, 1.0), one  # to score anything, even nothing, it has to read the answer
    else:
        score = reward_model(reward[3:]) if reward.startswith("hf:") else function_in(reward)

    def scored(prompts, responses, rows):
        try:
            scores = score(prompts, responses, rows)
            scores = [x.item() if hasattr(x, "item") else x for x in scores]  # tensors and arrays will do too
        except (Exception, SystemExit) as error:
            for case in zip(prompts, responses, rows) if len(rows) > 1 else ():
                scored(*([x] for x in case))  # which one is it? The message comes from here
            raise BadInput(f"{about(reward, prompts[0], responses[0])}: {why(error)}") from None
        return check_scores(scores, prompts, responses, reward, scored.range)
    scored.range, scored.check_row = getattr(score, "range", None), getattr(score, "check_row", None)
    return scored


def check_rows(rows, reward):
    """Stop before the run starts, with file and line, if the reward cannot use an answer: reward.check_row(row) raises."""
    for row in rows if getattr(reward, "check_row", None) else ():
        try:
            reward.check_row(row)
        except Exception as error:
            raise BadInput(f"{row['where']}: {first_line(error) if isinstance(error, ValueError) else why(error)}") from None


def check_scores(scores, prompts, responses, name, range=None):
    """One finite number per response, within the declared range, as a list of floats. A NaN would spread to every weight."""
    if len(scores) != len(responses):
        raise BadInput(f"{about(name, prompts[0], responses[0])} and others: {len(scores)} values for {len(responses)} responses")
    for score, prompt, response in zip(scores, prompts, responses):
        good = isinstance(score, Real) and abs(score) < 1e30  # False for NaN
        if not good or range and not range[0] <= score <= range[1]:
            wanted = f"in its declared range {range[0]} to {range[1]}" if good else "a finite number below 1e30"
            raise BadInput(f"{about(name, prompt, response)}: {score!r:.40} is not {wanted}")
    return [float(score) for score in scores]


def about(name, prompt, response):
    return f"the reward {name or 'of the task'} on the prompt {prompt!r:.80} and the response {response!r:.80}"


def why(error):
    """An error of somebody else's code in one line: kind, first line of the message, and where."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({Path(at.filename).name}, line {at.lineno})"


def function_in(reward):
    path, _, name = reward.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise BadInput(f"--reward {reward}: no such reward or file; there are {', '.join(REWARDS)}, hf:MODEL and file.py:function")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)  # exec_module would leave a __pycache__ beside it
    except (Exception, SystemExit) as error:
        raise BadInput(f"--reward {reward}: importing {path} failed: {why(error)}") from None
    if not callable(getattr(module, name, None)):
        raise BadInput(f"--reward {reward}: {path} defines no function {name!r}")
    score = getattr(module, name)
    bounds = getattr(score, "range", None)
    if bounds is not None and not (isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(isinstance(x, (int, float)) for x in bounds)):
        raise BadInput(f"--reward {reward}: {name}.range is {bounds!r:.40}; it must be (low, high)")
    return score


def reward_model(name, batch=16):
    """`hf:MODEL`: the score that a sequence-classification model with one output gives to prompt and response, read as a
    conversation through its chat template, or without one as a pair of texts. Unbounded. Safetensors only, no hub code."""
    with loading("reward model", name) as (path, where):
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right", **where)
        model, found = AutoModelForSequenceClassification.from_pretrained(  # half the memory: it is not trained
            path, dtype=torch.bfloat16 if default_device() == "cuda" else torch.float32, use_safetensors=True, output_loading_info=True, **where)
        # WARNING  transformers gives a plain language model a *random* head here, with no more than a log message
        if found["missing_keys"] or model.config.num_labels != 1:
            raise ValueError("it needs a trained classification head with one output")
    model = model.to(default_device()).eval()
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10 ** 6)
    # The score is read off the last token that is not padding. A model without a padding token is given one row at a time.
    size = batch if tokenizer.pad_token_id is not None and model.config.pad_token_id is not None else 1

    def encode(prompt, response):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not tokenizer.chat_template:
            return dict(tokenizer("\n".join(m["content"] for m in messages), response, truncation=True, max_length=longest))
        ids = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=True, return_dict=False)
        return {"input_ids": ids[-longest:]}  # if it is too long, the end counts: the response

    @torch.no_grad()
    def score(prompts, responses, rows):
        encoded, scores = [encode(*pair) for pair in zip(prompts, responses)], []
        for i in range(0, len(encoded), size):
            inputs = tokenizer.pad(encoded[i:i + size], padding=size > 1, return_tensors="pt").to(model.device)
            scores += model(**inputs).logits[:, 0].float().tolist()
        return scores
    score.range = (-math.inf, math.inf)
    return score
