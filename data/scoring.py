"""Scoring: what --reward says becomes one function that scores any mixture of rows.

    scored(prompts, responses, records) -> one finite float per response

A reward of your own is `file.py:function` with the signature function(prompts, responses, rows).
Each row is the one that was published, whole, with prompt, answer and task filled in where it
has no such column. In your file say `function.range = (0, 1)` if all scores lie there,
`function.threshold = 0.5` if responses are correct from there on (else at the top of the range),
and `function.check_row = f` if f(row) raises ValueError for an answer that it cannot use.
"""

import importlib
import math
import os
import sys
from collections.abc import Mapping, Set
from importlib.machinery import PathFinder
from numbers import Real
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data.models import default_device, first_line, loading
from data.prompts import sources
from data.rewards import REWARDS, published
from data.sources import why
from dqo import OBJECTIVES, BadInput

CHOICES = {"--reward": [*REWARDS, "hf:MODEL"], "--objective": OBJECTIVES}


def load_reward(reward, data, threshold=None):
    """function(prompts, responses, records) -> list of floats, whose scores are checked.

    reward: None (each task has its own), the name of one (REWARDS), `hf:MODEL`, or
    `file.py:function`. The function has the attributes `range`, (low, high) if all scores lie
    there, `check_row`, see `check_rows`, or None, and `threshold`, see `threshold_of`, which is
    the one given, if any."""
    if reward is None:
        score = by_task(data)
    elif reward in REWARDS:
        score = by_name(reward)
    elif reward.startswith("hf:"):
        score = reward_model(reward.removeprefix("hf:"))
    else:
        score = from_file(reward)
    if threshold is not None:
        score.threshold = correct_from("--threshold", threshold, score.range)
    return checked(score, reward)


def threshold_of(reward, task):
    """The quality from which a response of a task is correct; None: none is."""
    threshold = getattr(reward, "threshold", 1.0)
    return threshold[task] if isinstance(threshold, dict) else threshold


def correct_from(what, threshold, bounds):
    """The threshold, or BadInput."""
    low, high = bounds or (-math.inf, math.inf)
    if isinstance(threshold, (int, float)) and low < threshold <= min(high, 1e30):
        return threshold
    raise BadInput(f"{what} is {threshold!r:.40}; it must lie above {low}, and at most at {high}")


# ----------------------------------------------------------------------- where rewards come from
def by_task(data):
    """Each record has the reward of its task."""
    own = {task.name: task.reward for task in sources(data)}
    if None in own:
        names = ", ".join(REWARDS)
        raise BadInput(
            f"--data {data} needs --reward: a name ({names}), hf:MODEL or file.py:function"
        )
    rewards = {task: installed(name) for task, name in own.items()}
    thresholds = {task: threshold_of(reward, task) for task, reward in rewards.items()}
    return one_by_one(lambda record: rewards[record["task"]], thresholds)


def by_name(name):
    """All records have the same reward."""
    reward = installed(name)
    return one_by_one(lambda record: reward, threshold_of(reward, None))


def installed(name):
    """The reward of this name, if the package that it needs is there."""
    package = getattr(REWARDS[name], "package", None)
    try:
        if package:
            importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise BadInput(f"the reward {name} needs one more package: pip install {package} "
                       f"({first_line(error)})") from None
    return REWARDS[name]


def one_by_one(reward_of, threshold):
    """The score of rewards that judge one response at a time; reward_of(record) is its reward."""

    def score(prompts, responses, records):
        return [reward_of(record)(record, text) for record, text in zip(records, responses)]

    def check_row(record):
        reward_of(record)(record, "")  # to score anything, even nothing, it has to read the answer

    score.range, score.threshold = (0.0, 1.0), threshold
    score.check_row = check_row
    return score


def from_file(reward):
    """A function of your own. It is given rows as they were published."""
    function = function_in("--reward", reward)
    name = reward.rpartition(":")[2]
    bounds = getattr(function, "range", None)
    if bounds is not None and not is_range(bounds):
        raise BadInput(f"--reward {reward}: {name}.range is {bounds!r:.40}; it must be (low, high)")
    top = bounds[1] if bounds and bounds[1] < math.inf else None
    threshold = getattr(function, "threshold", top)
    if threshold is not None:
        correct_from(f"--reward {reward}: {name}.threshold", threshold, bounds)

    def score(prompts, responses, records):
        return function(prompts, responses, [published(record) for record in records])

    def check_row(record):
        function.check_row(published(record))

    score.range, score.threshold = bounds, threshold
    score.check_row = check_row if getattr(function, "check_row", None) else None
    return score


def is_range(bounds):
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        return False
    return all(isinstance(bound, (int, float)) for bound in bounds)


def function_in(flag, spec):
    """The function that `file.py:function` names. flag: where that was said, for messages."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise BadInput(
            f"{flag} {spec}: no such {flag.lstrip('-')} or file; "
            f"there are {', '.join(CHOICES[flag])} and file.py:function"
        )
    try:
        module = module_of(Path(path).resolve())
    except (Exception, SystemExit) as error:
        raise BadInput(f"{flag} {spec}: importing {path} failed: {why(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise BadInput(f"{flag} {spec}: {path} defines no function {name!r}")
    return function


LOADED = {}  # path: (source, module)
ADDED = []   # to sys.path: folders of such files


def module_of(path):
    """The module in a file, as `import` would make it: dataclasses and process pools look it up
    by its name, and it may import its neighbours."""
    source = path.read_bytes()
    if path in LOADED and LOADED[path][0] == source:  # --reward and --objective of one file
        return LOADED[path][1]
    # No __pycache__ beside it, nor beside its neighbours, whoever imports them
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    others = [folder for folder in sys.path if folder not in ADDED]
    if str(path.parent) not in others:  # the last: it must not hide a package
        ADDED[:] = [str(path.parent), *(f for f in ADDED if f != str(path.parent))]
    sys.path[:] = others + ADDED
    importlib.invalidate_caches()

    name, found = path.stem, PathFinder.find_spec(path.stem)
    known = sys.modules.get(name)
    is_free = known is None or any(known is module for _, module in LOADED.values())
    if not is_free or found is None or found.origin != str(path):
        name = f"{name}_of_{path.parent.name}".replace(".", "_")  # the name is another's
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    LOADED[path] = source, module
    return module


def reward_model(name, batch=16):
    """`hf:MODEL`: the score of a sequence-classification model with one output.

    It reads prompt and response as a conversation through its chat template, or without one as a
    pair of texts. Unbounded. Safetensors only, no code of the hub."""
    with loading("reward model", name) as (path, where):
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right", **where)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            path,
            # half the memory: it is not trained
            dtype=torch.bfloat16 if default_device() == "cuda" else torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **where,
        )
        # WARNING  transformers gives a plain language model a *random* head here, with no more
        # than a log message
        if found["missing_keys"] or model.config.num_labels != 1:
            raise ValueError("it needs a trained classification head with one output")
    model = model.to(default_device()).eval()
    context = getattr(model.config, "max_position_embeddings", None) or 10**6
    longest = min(tokenizer.model_max_length, context)
    # The score is read off the last token that is not padding. A model without a padding token is
    # given one row at a time.
    can_pad = tokenizer.pad_token_id is not None and model.config.pad_token_id is not None
    size = batch if can_pad else 1

    @torch.no_grad()
    def score(prompts, responses, records):
        pairs = zip(prompts, responses)
        encoded = [encode(tokenizer, prompt, text, longest) for prompt, text in pairs]
        scores = []
        for i in range(0, len(encoded), size):
            part = encoded[i:i + size]
            inputs = tokenizer.pad(part, padding=size > 1, return_tensors="pt").to(model.device)
            scores += model(**inputs).logits[:, 0].float().tolist()
        return scores

    score.range, score.threshold = (-math.inf, math.inf), None
    return score


def encode(tokenizer, prompt, response, longest):
    """Prompt and response as a reward model reads them."""
    messages = prompt
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    if not tokenizer.chat_template:
        text = "\n".join(message["content"] for message in messages)
        return dict(tokenizer(text, response, truncation=True, max_length=longest))
    if messages[-1]["role"] == "assistant":  # an answer that was begun in the prompt
        *messages, begun = messages
        response = begun["content"] + response
    conversation = [*messages, {"role": "assistant", "content": response}]
    ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
    return {"input_ids": ids[-longest:]}  # if it is too long, the end counts: the response


# ---------------------------------------------------------------------------------------- checks
def checked(score, name):
    """score, with every fault turned into one line that says on which prompt and response."""
    bounds = getattr(score, "range", None)

    def scored(prompts, responses, records):
        try:
            scores = score(prompts, responses, records)
            if isinstance(scores, (Mapping, Set)):
                raise TypeError(f"a {type(scores).__name__} is no list of numbers, one a response")
            scores = [plain_number(x) for x in scores]
        except (Exception, SystemExit) as error:
            if len(records) > 1:  # which one is it? The message comes from there
                for prompt, response, record in zip(prompts, responses, records):
                    scored([prompt], [response], [record])
            case = about(name, prompts[0], responses[0])
            raise BadInput(f"{case}: {why(error)}") from None
        return check_scores(scores, prompts, responses, name, bounds)

    scored.range, scored.threshold = bounds, score.threshold
    scored.check_row = getattr(score, "check_row", None)
    return scored


def plain_number(x):
    """Tensors and arrays of one number will do too."""
    return x.item() if hasattr(x, "item") else x


def check_rows(records, reward):
    """Stop before the run starts, with file and line, if the reward cannot use an answer.

    It calls reward.check_row(record), which raises then."""
    if getattr(reward, "check_row", None) is None:
        return
    for record in records:
        try:
            reward.check_row(record)
        except Exception as error:
            reason = first_line(error) if isinstance(error, ValueError) else why(error)
            raise BadInput(f"{record['where']}: {reason}") from None


def check_scores(scores, prompts, responses, name, bounds=None):
    """One finite number per response, within the declared range, as a list of floats.

    A NaN would spread to every weight."""
    if len(scores) != len(responses):
        case = about(name, prompts[0], responses[0])
        raise BadInput(f"{case} and others: {len(scores)} values for {len(responses)} responses")
    for score, prompt, response in zip(scores, prompts, responses):
        wanted = None
        if not isinstance(score, Real) or not abs(score) < 1e30:  # a NaN is not below
            wanted = "a finite number below 1e30"
        elif bounds and not bounds[0] <= score <= bounds[1]:
            wanted = f"in its declared range {bounds[0]} to {bounds[1]}"
        if wanted:
            raise BadInput(f"{about(name, prompt, response)}: {score!r:.40} is not {wanted}")
    return [float(score) for score in scores]


def about(name, prompt, response):
    reward = name or "of the task"
    return f"the reward {reward} on the prompt {prompt!r:.80} and the response {response!r:.80}"
