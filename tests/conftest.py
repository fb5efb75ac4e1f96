"""Small real models for the tests. Everything runs offline on a CPU."""

import importlib.util
import os

# Before transformers is imported: a test that reaches for the hub fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out unless asked for with -m slow")
    config.addinivalue_line("markers", "optional(package): skipped where it is missing")
    config.option.markexpr = config.option.markexpr or "not slow"


def needs(package):
    """A mark for tests of something that uses an optional package: skipped where it is missing."""
    return pytest.mark.optional(package)


def pytest_runtest_setup(item):
    for mark in item.iter_markers("optional"):
        if importlib.util.find_spec(mark.args[0]) is None:
            pytest.skip(f"no {mark.args[0]}")


def word_tokenizer(words, **special):
    """One id per word, in the order given; ids are stable and readable in tests."""
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0], **special)


@torch.no_grad()
def scale_matrices(parameters, factor):
    """Make random weights larger, so that the next token is not nearly uniform."""
    for p in parameters:
        if p.dim() > 1:
            p.mul_(factor)


def random_llama(vocab, seed=0, hidden=32, layers=2, spread=1.0, **kw):
    """A random Llama with non-uniform next-token distributions. `spread` scales its logits."""
    ids = dict(eos_token_id=2, bos_token_id=1, pad_token_id=0)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        **{**ids, **kw}))
    scale_matrices(model.parameters(), 5)
    scale_matrices([model.lm_head.weight], spread)
    return model.eval()


def random_gpt2(vocab, spread=1.0):
    """The same with absolute positions, where padding shows if position ids are wrong."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0))
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
