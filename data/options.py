"""The options of a run: those of the method (dqo.Config) and all else that train.py needs.

Every field is a flag of train.py: `prompt_key` is `--prompt-key`.
"""

import dataclasses
import math

from data.models import MINILM, is_tiny
from dqo import OBJECTIVES, BadInput, Config, option

# What data/tiny was tuned to, and what any other model gets: a real one needs a small learning
# rate and a KL penalty to stay fluent. (The tiny one, whose rewards are strict, does not.)
TINY = dict(lr=3e-4, beta=0.0, max_new_tokens=24, steps=640, micro_batch=32)
OTHER = dict(lr=5e-6, beta=0.02, max_new_tokens=256, micro_batch=16)
ONE_WORD = dict(lr=1e-5, max_new_tokens=8, steps=48, micro_batch=64)  # --data categories
LORA_LR = 10  # times as large: what is trained starts at 0 and has a low rank
MOST_STEPS = 1000  # by default; one pass over CNN/DailyMail would be 36,000


@dataclasses.dataclass
class RunConfig(Config):
    """The hyper-parameters, and what else a run needs. One flag per field."""

    # what is trained, on what, judged by whom
    model: str = option("data/tiny", "causal language model: folder, hub id, GGUF file, or "
                                     "smollm2, from a package")
    lora: int | None = option(None, "train adapters of this rank in place of all weights, "
                                    "which takes far less memory (needs peft)", low=1)
    data: str = option("instruct,summarize,story,reason",
                       "tasks by name, or a .jsonl file, https:// address or hub dataset")
    reward: str | None = option(None, "a name, hf:MODEL, or file.py:function [the task's own]")
    threshold: float | None = option(None, "quality from which a response is correct [that of "
                                           "the reward]")
    encoder: str = option(MINILM, "sentence-transformers model that measures diversity")
    encoder_prompt: str | None = option(None, "what the encoder reads before each response: "
                                              "the name of one of its prompts, or the words")
    gradient_checkpointing: bool = option(
        False, "keep fewer activations, compute them again: less memory, a third more time")
    limit: int = option(0, "use only the first N prompts of each task; 0 = all", low=0)
    prompt_key: str = option("prompt", "name of the prompt in a .jsonl row")
    answer_key: str = option("answer", "name of the answer in a .jsonl row")
    skip_long: bool = option(False, "leave out prompts that are too long for the model's context")
    out: str | None = option(
        None, "run folder [the next free of runs/OBJECTIVE, runs/OBJECTIVE-2, ...]")
    save_every: int = option(
        100, "steps between checkpoints, of which the last two are kept", low=1)
    overwrite: bool = option(False, "replace the run folder when it holds another run")
    resume: str | None = option(None, "continue the run in this folder after its last "
                                      "checkpoint; beside it may be given "
                                      "--steps, --micro-batch, --gradient-checkpointing and "
                                      "--save-every")

    def check(self):
        """Refuse what cannot work, with one line that says what to change."""
        for f in dataclasses.fields(self):
            flag, value = "--" + f.name.replace("_", "-"), getattr(self, f.name)
            low, choices = f.metadata.get("low"), f.metadata.get("choices")
            if low is not None and value is not None and not low <= value < 2 ** 63:  # or NaN
                raise BadInput(f"{flag} is {value}: it must be at least {low}, and below 2**63")
            if choices and value not in choices:
                raise BadInput(f"{flag} is {value}: choose from {', '.join(choices)}")
        bonus = OBJECTIVES[self.objective]
        smallest = bonus.smallest_group[0 if self.baseline == "none" else 1]
        if self.k < smallest:
            raise BadInput(
                f"--k {self.k}: {self.objective} with --baseline {self.baseline} carries no "
                f"signal of its own below k = {smallest}; use that or more")
        if self.alpha > bonus.highest_alpha:
            raise BadInput(f"--alpha {self.alpha}: for {self.objective} it must be at most "
                           f"{bonus.highest_alpha}")
        if self.kernel != "plain" and self.objective != "dqo":
            raise BadInput(f"--kernel {self.kernel} is defined for --objective dqo only, "
                           f"not for {self.objective}")
        if self.objective == "passk" and self.alpha not in range(1, self.k + 1):
            raise BadInput(f"--alpha {self.alpha:g}: for passk it is the m of pass@m, a whole "
                           f"number from 1 to --k, which is {self.k}")


def defaults_of(config):
    """What the options are by default that depend on what is trained."""
    defaults = TINY if is_tiny(config.model) else OTHER
    if config.data == "categories":
        defaults = defaults | ONE_WORD
    if config.lora:
        return dict(defaults, lr=LORA_LR * defaults["lr"])
    return defaults


def fill_defaults(config, prompts):
    """Give every option that was left open its value for this model and data."""
    one_pass = math.ceil(prompts / config.prompts)
    defaults = dict(steps=min(one_pass, MOST_STEPS)) | defaults_of(config)
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
