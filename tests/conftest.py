"""Small real models for the tests. Everything runs offline on a CPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that reaches for the hub fails at once

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out unless asked for with -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"


def word_tokenizer(words, **special):
    """One id per word, in the order given; ids are stable and readable in tests."""
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token=words[0], **special)


def random_llama(vocab, seed=0, hidden=32, layers=2, spread=1.0, **kw):
    """A randomly initialised Llama with non-uniform next-token distributions (`spread` scales the logits)."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, **{"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, **kw}))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(5)
        model.lm_head.weight.mul_(spread)
    return model.eval()


def random_gpt2(vocab, spread=1.0):
    """The same for an architecture with absolute positions, where padding shows if position ids are wrong."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=2, bos_token_id=1, pad_token_id=0))
    with torch.no_grad():
        for p in model.transformer.h.parameters():
            if p.dim() > 1:
                p.mul_(5)
        model.transformer.wpe.weight.mul_(30)
        model.lm_head.weight.mul_(10 * spread)
    return model.eval()


@pytest.fixture
def tokenizer():
    return word_tokenizer(["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, 40)], pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def model():
    return random_llama(40)
