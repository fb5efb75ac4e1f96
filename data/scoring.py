"""Scoring: what --reward says becomes one function that scores any mixture of rows.

    scored(prompts, responses, records) -> one finite float per response

A reward of your own is `file.py:function` with the signature function(prompts, responses, rows).
Each row is the one that was published, whole, with prompt, answer and task filled in where it
has no such column. In your file say `function.range = (0, 1)` if all scores lie there, and
`function.check_row = f` if f(row) raises ValueError for an answer that it cannot use.
"""

import importlib.util
import math
from numbers import Real
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data.models import default_device, first_line, loading
from data.prompts import sources, why
from data.rewards import REWARDS, published
from dqo import OBJECTIVES, BadInput

CHOICES = {"--reward": [*REWARDS, "hf:MODEL"], "--objective": OBJECTIVES}


def load_reward(reward, data):
    """function(prompts, responses, records) -> list of floats, whose scores are checked.

    reward: None (each task has its own), the name of one (REWARDS), `hf:MODEL`, or
    `file.py:function`. The function has the attributes `range`, (low, high) if all scores lie
    there, and `check_row`, see `check_rows`, or None."""
    if reward is None:
        score = by_task(data)
    elif reward in REWARDS:
        score = by_name(reward)
    elif reward.startswith("hf:"):
        score = reward_model(reward.removeprefix("hf:"))
    else:
        score = from_file(reward)
    return checked(score, reward)


# ----------------------------------------------------------------------- where rewards come from
def by_task(data):
    """Each record has the reward of its task."""
    own = {task.name: task.reward for task in sources(data)}
    if None in own:
        names = ", ".join(REWARDS)
        raise BadInput(
            f"--data {data} needs --reward: a name ({names}), hf:MODEL or file.py:function"
        )
    return one_by_one(lambda record: REWARDS[own[record["task"]]])


def by_name(name):
    """All records have the same reward."""
    return one_by_one(lambda record: REWARDS[name])


def one_by_one(reward_of):
    """The score of rewards that judge one response at a time; reward_of(record) is its reward."""

    def score(prompts, responses, records):
        return [reward_of(record)(record, text) for record, text in zip(records, responses)]

    def check_row(record):
        reward_of(record)(record, "")  # to score anything, even nothing, it has to read the answer

    score.range = (0.0, 1.0)
    score.check_row = check_row
    return score


def from_file(reward):
    """A function of your own. It is given rows as they were published."""
    function = function_in("--reward", reward)
    bounds = getattr(function, "range", None)
    if bounds is not None and not is_range(bounds):
        name = reward.rpartition(":")[2]
        raise BadInput(f"--reward {reward}: {name}.range is {bounds!r:.40}; it must be (low, high)")

    def score(prompts, responses, records):
        return function(prompts, responses, [published(record) for record in records])

    def check_row(record):
        function.check_row(published(record))

    score.range = bounds
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
    file = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(file)
    try:
        # exec_module would leave a __pycache__ beside it
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise BadInput(f"{flag} {spec}: importing {path} failed: {why(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise BadInput(f"{flag} {spec}: {path} defines no function {name!r}")
    return function


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

    score.range = (-math.inf, math.inf)
    return score


def encode(tokenizer, prompt, response, longest):
    """Prompt and response as a reward model reads them."""
    messages = prompt
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    if not tokenizer.chat_template:
        text = "\n".join(message["content"] for message in messages)
        return dict(tokenizer(text, response, truncation=True, max_length=longest))
    conversation = [*messages, {"role": "assistant", "content": response}]
    ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
    return {"input_ids": ids[-longest:]}  # if it is too long, the end counts: the response


# ---------------------------------------------------------------------------------------- checks
def checked(score, name):
    """score, with every fault turned into one line that says on which prompt and response."""
    bounds = getattr(score, "range", None)

    def scored(prompts, responses, records):
        try:
            scores = [plain_number(x) for x in score(prompts, responses, records)]
        except (Exception, SystemExit) as error:
            if len(records) > 1:  # which one is it? The message comes from there
                for prompt, response, record in zip(prompts, responses, records):
                    scored([prompt], [response], [record])
            case = about(name, prompts[0], responses[0])
            raise BadInput(f"{case}: {why(error)}") from None
        return check_scores(scores, prompts, responses, name, bounds)

    scored.range = bounds
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
