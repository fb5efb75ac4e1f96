"""Small real models for the tests. Everything runs offline on a CPU."""

import importlib.util
import os
import sys
from pathlib import Path

# Before transformers is imported: a test that reaches for the hub fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # for plain `pytest`

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

IDS = dict(eos_token_id=2, bos_token_id=1, pad_token_id=0)
needs = pytest.mark.optional  # @needs("peft")


def pytest_configure(config):
    for mark in ("slow: left out unless asked for with -m slow", "gpu: skipped without CUDA",
                 "optional(package): skipped where it is missing"):
        config.addinivalue_line("markers", mark)
    config.option.markexpr = config.option.markexpr or "not slow"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA")
    for mark in item.iter_markers("optional"):
        if importlib.util.find_spec(mark.args[0]) is None:
            pytest.skip(f"no {mark.args[0]}")


def word_tokenizer(words, **special):
    """One id per word, in the order given."""
    tokenizer = Tokenizer(models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0], **special)


@torch.no_grad()
def scale_matrices(parameters, factor):
    """Larger random weights: the next token is not nearly uniform."""
    for p in parameters:
        if p.dim() > 1:
            p.mul_(factor)


def random_llama(vocab, seed=0, hidden=32, layers=2, spread=1.0, **kw):
    """A random Llama. `spread` scales its logits."""
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, **{**IDS, **kw}))
    scale_matrices(model.parameters(), 5)
    scale_matrices([model.lm_head.weight], spread)
    return model.eval()


def random_gpt2(vocab, spread=1.0):
    """With absolute positions, padding shows if position ids are wrong."""
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=vocab, n_embd=32, n_layer=2, n_head=2, n_positions=64, **IDS))
    scale_matrices(model.transformer.h.parameters(), 5)
    scale_matrices([model.transformer.wpe.weight], 30)
    scale_matrices([model.lm_head.weight], 10 * spread)
    return model.eval()


@pytest.fixture
def tokenizer():
    """Id i is the word w<i>, but for the first three: <pad>, <s>, </s>."""
    words = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, 40)]
    return word_tokenizer(words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def model():
    return random_llama(40)
