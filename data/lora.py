"""LoRA, with `--lora RANK`: the model is frozen, and beside each of its matrices W a small one
of that rank is trained, so that W x becomes W x + 2 B A x. Needs the package peft.

The optimizer's state shrinks with the number of trained weights, and the model with its
adapters off is the starting model: no second copy for the KL penalty.
"""

import contextlib
import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dqo import BadInput

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's own names


def peft():
    try:
        import peft
    except ImportError:
        raise BadInput("--lora needs one more package: pip install peft") from None
    return peft


def with_adapters(model, name, rank, seed):
    """The model with new adapters, which alone are trained. name: that of the model."""
    torch.manual_seed(seed)  # A is random, and B is 0: it is still the same model
    config = peft().LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0,
        task_type="CAUSAL_LM")
    try:
        with quiet():
            model = peft().get_peft_model(model, config)
    except ValueError as error:
        raise BadInput(f"--lora {rank}: {error}") from None
    config.base_model_name_or_path = name
    return model


@contextlib.contextmanager
def quiet():
    """peft warns of what it then does right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class AdaptersOff:
    """The starting model, within the one that is trained."""

    def __init__(self, model):
        self.model = model

    def __call__(self, **inputs):
        with self.model.disable_adapter():
            return self.model(**inputs)

    def __getattr__(self, name):
        return getattr(self.model, name)


def save(model, folder):
    """The adapters and what is needed to merge them into their model: a folder of peft's."""
    state = peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(state, Path(folder) / WEIGHTS)
    model.peft_config["default"].save_pretrained(folder)


def restore(model, folder):
    """Give the adapters the weights that they were saved with."""
    peft().set_peft_model_state_dict(model, load_file(Path(folder) / WEIGHTS))


def base_of(folder):
    """The name of the model that saved adapters belong to."""
    return json.loads((Path(folder) / CONFIG).read_text("utf-8"))["base_model_name_or_path"]


def merged(model, folder):
    """The model with saved adapters added to its matrices: an ordinary model again."""
    with quiet():
        return peft().PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
