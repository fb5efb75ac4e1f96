"""Prompts: names become rows. What --data says is a task, a file, an address or a hub data set.

A task is a source of rows, a template that makes prompt and answer from a row, and a reward.
To add one, put its rows into data/NAME.jsonl, or a Task with a template into READY, and its
reward into rewards.py. Your own files need no task, see data/README.md.

`load_rows` gives records, dicts with the keys

    prompt, answer   what the template, or --prompt-key and --answer-key, made of the row
    task             name of the task, or of the source
    where            "my.jsonl, line 3", for messages
    row              the row whole, as published; prompt, answer and task are filled in where it
                     has no such column. This is what a reward function of your own is given
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from data.models import first_line
from data.rewards import given_numbers, need
from data.sources import HUB_ID, hub_splits, read
from dqo import BadInput, end_tokens, prompt_ids

HERE = Path(__file__).resolve().parent
HOLD_OUT = 20  # every 20th row is kept for testing where the source has no test split


@dataclass
class Task:
    name: str | None        # None: rows of your own
    template: Callable      # row -> (prompt, answer); raises ValueError
    reward: str | None      # name in REWARDS; None: --reward has to say
    source: str             # file, address or hub id; {split} in it stands for train or test
    test_split: str | None  # what the source calls its test split; None: there is one split only


# ------------------------------------------------------------------------------ templates
# They make (prompt, answer) from a row as it is published. Change the wording here; the
# rewards rely on it.
def own_prompt(row, prompt_key="prompt", answer_key="answer"):
    """The template of your own rows, and of the miniature tasks."""
    if prompt_key not in row:
        raise ValueError(f"no {prompt_key!r} in this row; name the right key with --prompt-key")
    prompt = row[prompt_key]
    if isinstance(prompt, list) and prompt:
        prompt = [chat_message(message, f"message {number} of {prompt_key!r}")
                  for number, message in enumerate(prompt, 1)]
    elif not is_text(prompt):
        raise ValueError(f"{prompt_key!r} must be text or a list of chat messages, and not empty")
    return prompt, row.get(answer_key)


def is_text(text):
    """No tokenizer takes half a character (a lone surrogate)."""
    return isinstance(text, str) and text.strip() != "" and not re.search("[\ud800-\udfff]", text)


def chat_message(message, name):
    """The message, with its content as text: what OpenAI's API takes in parts is joined."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{name} must be an object with a role and content")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(text_part(part, name) for part in content)
    if not is_text(content):
        raise ValueError(f"{name}: its content must be text and not empty, not {content!r:.60} "
                         "(a tool call alone cannot be used)")
    return {**message, "content": content}


def text_part(part, name):
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"{name} has a part of the type {kind!r}; only text can be used")
    return part["text"]


def field(row, name, kind=str):
    content = row.get(name)
    need(
        isinstance(content, kind) and content,
        f"{name!r}, a {kind.__name__} that is not empty, in the row",
        content,
    )
    return content


def gsm8k(row):
    prompt = (
        f"{field(row, 'question')}\n\n"
        "Think step by step. Write the answer, a number alone, on the last line after ####."
    )
    return prompt, field(row, "answer")


def commongen(row):
    words = field(row, "concepts", list)
    prompt = f"Write one sentence that uses all of these words: {', '.join(map(str, words))}."
    return prompt, {"words": words, "references": [row.get("target")]}


def dolly(row):
    prompt, context = field(row, "instruction"), row.get("context")
    if isinstance(context, str) and context.strip():
        prompt += f"\n\n{context}"
    return prompt, field(row, "response")


def cnn_dailymail(row):
    prompt = f"Summarize this article in three or four sentences.\n\n{field(row, 'article')}"
    return prompt, field(row, "highlights")


def countdown_puzzle(row):
    nums, target = given_numbers(row, row.get("meta"))
    prompt = (
        f"Write an expression that equals {target}. Use each of the numbers "
        f"{', '.join(map(str, nums))} exactly once, with + - * / and parentheses. "
        "Put the expression alone on the last line."
    )
    return prompt, {"nums": nums, "target": target}


# ---------------------------------------------------------------------------------- tasks
TASKS = ["instruct", "summarize", "story", "reason"]  # the miniature tasks, the default of --data
# All that this repository has rows of, and their rewards. `categories` is for a real model: "Name
# one fruit. Answer with one word."
OURS = {**{task: task for task in TASKS}, "categories": "instruct"}

GSM8K = (
    "https://raw.githubusercontent.com/openai/grade-school-math/master/"
    "grade_school_math/data/{split}.jsonl"
)
DOLLY = (
    "https://huggingface.co/datasets/databricks/databricks-dolly-15k/"
    "resolve/main/databricks-dolly-15k.jsonl"
)
READY = {task.name: task for task in [
    Task("gsm8k", gsm8k, "math_strict", GSM8K, "test"),
    # its test split has no references
    Task("commongen", commongen, "coverage", "allenai/common_gen", "validation"),
    Task("dolly", dolly, "rouge", DOLLY, None),
    Task("cnn_dailymail", cnn_dailymail, "rouge", "abisee/cnn_dailymail:3.0.0", "test"),
    Task("countdown", countdown_puzzle, "countdown", "Jiayi-Pan/Countdown-Tasks-3to4", None),
]}


def sources(data, prompt_key="prompt", answer_key="answer"):
    """What --data names, as a list of Task: known ones, or one source of your own."""
    tasks = []
    for part in data.split(","):
        name, _, source = part.partition(":")
        if name in OURS and not source:
            tasks.append(Task(name, own_prompt, OURS[name], str(HERE / f"{name}.jsonl"), "test"))
        elif name in READY:
            tasks.append(replace(READY[name], source=source or READY[name].source))
        else:
            template = functools.partial(own_prompt, prompt_key=prompt_key, answer_key=answer_key)
            return [Task(None, template, None, data, "test")]
    return tasks


# -------------------------------------------------------------------------------- records
def load_rows(data, split, limit=0, prompt_key="prompt", answer_key="answer"):
    """The prompts of a split, "train" or "test", as a list of records (see above).

    data: tasks by name, separated by commas: miniature (`story`), real as published (`gsm8k`), or
    real from another source in the published format (`gsm8k:SOURCE`); or one SOURCE of your own,
    whose prompts and answers prompt_key and answer_key name. A SOURCE is a .jsonl file, the
    https:// address of one, or a data set of the Hugging Face hub (`openai/gsm8k:main`, with a
    configuration after the colon). {split} in it stands for train or test: `my/{split}.jsonl`.
    limit: so many of each task; 0 for all.

    Raises BadInput."""
    records = []
    for task in sources(data, prompt_key, answer_key):
        found = records_of(task, split, limit)
        if not found:
            raise BadInput(
                f"--data {data}: no prompts for the {split} split; "
                'rows without a "split" belong to both'
            )
        records += found
    return records


def records_of(task, split, limit):
    """The records of one task."""
    task = with_hub_splits(task)
    stored_as = split
    if split == "test":
        stored_as = task.test_split or "train"
    source = task.source.replace("{split}", stored_as)

    records = {}
    known = [*OURS, *READY]
    for i, (where, row) in enumerate(read(source, stored_as, limit, task.name, known)):
        try:
            prompt, answer = task.template(row)
        except ValueError as error:
            raise BadInput(f"{where}: {error}") from None
        if not belongs(row, i, split, task):
            continue
        # Published data sets repeat prompts; CommonGen has a row for every reference of one.
        key = prompt if task.name in READY else i
        if key in records and task.name == "commongen":
            merge_references(records[key], answer)
        elif limit and len(records) == limit:
            break
        elif key not in records:
            name = task.name or Path(task.source.removesuffix(".gz")).stem
            filled_in = {"prompt": prompt, "answer": answer, "task": name}
            records[key] = {**filled_in, "where": where, "row": {**filled_in, **row}}
    return list(records.values())


def with_hub_splits(task):
    """The task, with the test split that its hub data set has, if it is one of your own."""
    if task.name or not HUB_ID.fullmatch(task.source) or Path(task.source).exists():
        return task
    splits = hub_splits(task.source)
    for test_split in ("test", "validation"):
        if test_split in splits:
            return replace(task, test_split=test_split)
    return replace(task, test_split=None)


def belongs(row, i, split, task):
    """Whether row i of a source is of this split. One that does not say so belongs to both, but
    where nothing is published for testing, every 20th is kept for that."""
    if "split" in row:
        return row["split"] == split
    if task.test_split is None:
        return (i % HOLD_OUT == 0) == (split == "test")
    return True


def merge_references(record, answer):
    record["answer"]["references"] += answer["references"]


# ------------------------------------------------------------------------------ and a model
def prepare(records, model, tokenizer, max_new_tokens, plain=False, template_args=None,
            skip_long=False):
    """Refuse what does not work with a model: a prompt that is too long, or that its chat template
    does not take, and a model without an end token. Returns the records, with skip_long without
    those that are too long."""
    end_tokens(model, tokenizer)
    if template_args and (plain or not tokenizer.chat_template):
        raise BadInput("--template-args: no chat template is used here")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    fit = []
    for record in records:
        where = record["where"]
        try:
            length = len(prompt_ids(tokenizer, record["prompt"], plain, template_args))
        except Exception as error:  # a chat template raises what it likes
            raise BadInput(
                f"{where}: the tokenizer's chat template refuses this prompt: {first_line(error)}"
            ) from None
        if length + max_new_tokens <= context:
            fit.append(record)
        elif not skip_long:
            raise BadInput(
                f"{where}: {length} prompt tokens and --max-new-tokens {max_new_tokens} "
                f"do not fit into the model's context of {context}; shorten either, or add "
                "--skip-long"
            )
    if records and not fit:
        raise BadInput(f"--skip-long: no prompt and --max-new-tokens {max_new_tokens} fit into "
                       f"the model's context of {context}")
    return fit
