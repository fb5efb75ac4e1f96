"""Sampling, scoring and a step on models built from the published configurations.

They are a few layers wide. What makes each of them different is kept as published (rope
scaling, query-key norms, soft-capping, sliding windows, tied embeddings, dropout, several end
tokens); only the sizes are cut, and the windows so that they bite.
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import scale_matrices, word_tokenizer
from data.models import load_model
from dqo import Config, dqo_step, prompt_ids, sample, token_logps

SMALL = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    pad_token_id=None)
MAMBA = dict(  # of the Mamba 2 layers in hybrid models
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_n_groups=2,
    mamba_d_state=8,
    mamba_expand=2,
    mamba_chunk_size=8)  # as published it would compute 256 positions for our 25
DELTA_NET = dict(  # of the gated delta rule in hybrid models
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
CONFIGS = {
    "llama-3.2": dict(
        SMALL,
        model_type="llama",
        num_hidden_layers=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        eos_token_id=[2, 3, 4],
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=32.0,
            high_freq_factor=4.0,
            low_freq_factor=1.0,
            original_max_position_embeddings=8192)),
    "qwen3": dict(
        SMALL,
        model_type="qwen3",
        num_hidden_layers=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        eos_token_id=2,
        rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "gpt2": dict(
        model_type="gpt2",
        vocab_size=60,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=1024,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        bos_token_id=2,
        eos_token_id=2),
    "gemma-2": dict(
        SMALL,
        model_type="gemma2",
        num_hidden_layers=4,
        head_dim=16,
        rms_norm_eps=1e-6,
        max_position_embeddings=8192,
        query_pre_attn_scalar=16,
        sliding_window=6,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        hidden_activation="gelu_pytorch_tanh",
        eos_token_id=[2, 3]),
    "gemma-3": dict(
        SMALL,
        model_type="gemma3_text",
        num_hidden_layers=4,
        head_dim=16,
        rms_norm_eps=1e-6,
        max_position_embeddings=32768,
        query_pre_attn_scalar=16,
        sliding_window=6,
        hidden_activation="gelu_pytorch_tanh",
        eos_token_id=[2, 3]),
    "mistral": dict(
        SMALL,
        model_type="mistral",
        num_hidden_layers=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=32768,
        sliding_window=6,
        eos_token_id=2),
}
# Models that are not attention alone: a state that each token overwrites, beside keys and values.
HYBRID = {
    "qwen3.5": dict(
        SMALL,
        model_type="qwen3_5_text",
        num_hidden_layers=4,  # the fourth is attention
        head_dim=8,
        tie_word_embeddings=True,
        eos_token_id=2,
        **DELTA_NET),
    "lfm2": dict(
        SMALL,
        model_type="lfm2",
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
        eos_token_id=2),
    "falcon-h1": dict(
        SMALL,
        model_type="falcon_h1",
        num_hidden_layers=2,  # each of them is both
        head_dim=8,
        mamba_d_ssm=64,
        eos_token_id=2,
        **MAMBA),
    "jamba": dict(
        SMALL,
        model_type="jamba",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        eos_token_id=2),
    "granite-4-h": dict(
        SMALL,
        model_type="granitemoehybrid",
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        shared_intermediate_size=32,
        eos_token_id=2,
        **EXPERTS,
        **MAMBA),
    "zamba2": dict(
        SMALL,
        model_type="zamba2",
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        n_mamba_heads=8,
        mamba_d_state=8,
        chunk_size=8,
        adapter_rank=4,
        eos_token_id=2),
    "nemotron-h": dict(
        SMALL,
        model_type="nemotron_h",
        layers_block_type=["mamba", "attention", "mlp", "mamba", "moe"],
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        eos_token_id=2),
    "olmo-hybrid": dict(
        SMALL,
        model_type="olmo_hybrid",
        num_hidden_layers=4,
        eos_token_id=2,
        **dict(DELTA_NET, linear_num_key_heads=4)),
    "minimax": dict(
        SMALL,
        model_type="minimax",
        num_hidden_layers=2,  # attention, and linear attention with a cache of its own kind
        head_dim=8,
        block_size=4,
        eos_token_id=2,
        **EXPERTS),
    "qwen3-next": dict(
        SMALL,
        model_type="qwen3_next",
        num_hidden_layers=4,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        eos_token_id=2,
        **DELTA_NET),
}
CONFIGS.update(HYBRID)
ALWAYS = ["llama-3.2", "qwen3", "gpt2", "gemma-2", "qwen3.5", "lfm2", "falcon-h1", "minimax"]
SLOW = [name for name in CONFIGS if name not in ALWAYS]  # near relatives of those
PROMPTS = ["w5 w6", "w7", "w9 w9 w13 w30 w7 w8 w11 w12 w20"]


@pytest.fixture(params=ALWAYS + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW])
def folder(request, tmp_path):
    """A model folder as published ones are: config, safetensors, tokenizer without a pad."""
    torch.manual_seed(0)
    values = dict(CONFIGS[request.param])
    model_type = values.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    scale_matrices(model.parameters(), 4)
    model.generation_config.eos_token_id = values["eos_token_id"]
    model.save_pretrained(tmp_path)
    words = ["<unk>", "<s>", "</s>", "<eot>", "<eom>"] + [f"w{i}" for i in range(5, 60)]
    word_tokenizer(words, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    return tmp_path


class RandomEncoder:
    def encode(self, texts):
        return torch.randn(len(texts), 8)


def odd_length(prompts, responses, rows):
    """A reward: 1 for a text of an odd number of characters."""
    return [float(len(response) % 2) for response in responses]


def alone(model, tokens, n, temperature):
    """log pi of the last n tokens of one row without padding, in float64."""
    logits = model(tokens[None], use_cache=False).logits[0].double()
    logps = torch.log_softmax(logits / temperature, -1)
    return logps[:-1].gather(1, tokens[1:, None])[-n:, 0]


def check_scores(model, rollout, temperature):
    """Scores are those of sampling, in train mode too, and those of each row alone."""
    for train in (False, True):  # dropout is off in both
        model.train(train)
        with torch.no_grad():
            scored = token_logps(model, rollout, temperature)
        torch.testing.assert_close(scored, rollout.logp, rtol=0, atol=2e-5)
    model.eval()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {2}
    for i in range(0, len(rollout.texts), 5):
        tokens = rollout.tokens[i][rollout.attention_mask[i].bool()]
        n = int(rollout.mask[i].sum())
        with torch.no_grad():
            expected = alone(model, tokens, n, temperature)
        torch.testing.assert_close(scored[i, :n].double(), expected, rtol=0, atol=2e-5)
        ended = tokens[-1].item() in ends
        assert ended == (not rollout.truncated[i])


def test_sample_score_and_step(folder):
    """Each architecture samples, scores what it sampled, and learns without drift or KL."""
    model, tokenizer = load_model(str(folder))
    torch.manual_seed(1)
    rollout = sample(model, tokenizer, PROMPTS, 8, 16, temperature=0.9)
    # Responses of different lengths, and rows longer than the windows.
    assert rollout.mask.sum(1).min() < 16 < rollout.tokens.shape[1]
    check_scores(model, rollout, 0.9)

    reference, _ = load_model(str(folder))
    before = copy.deepcopy(model.state_dict())
    metrics = dqo_step(
        model, tokenizer, RandomEncoder(), odd_length,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        [{"prompt": prompt} for prompt in PROMPTS],
        Config(k=4, max_new_tokens=8, beta=0.1, micro_batch=5),
        reference)
    assert metrics["drift"] < 1e-4
    assert metrics["grad_norm"] > 0
    assert abs(metrics["kl"]) < 1e-3
    after = model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_gradients_are_those_of_each_row_alone(folder):
    """Padding and shared prompts change no gradient, nor does a model that keeps a state."""
    model, tokenizer = load_model(str(folder))
    torch.manual_seed(1)
    rollout = sample(model, tokenizer, PROMPTS, 3, 8)
    weight = torch.randn(rollout.mask.shape)  # the gradient differs from token to token

    def gradient(loss):
        model.zero_grad(set_to_none=True)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    together = gradient((weight * token_logps(model, rollout)).sum())
    loss = 0.0
    for tokens, real, mask, w in zip(
            rollout.tokens, rollout.attention_mask, rollout.mask, weight):
        n = int(mask.sum())
        loss = loss + (w[:n] * alone(model, tokens[real.bool()], n, 1.0)).sum()
    apart = gradient(loss)
    assert together.keys() == apart.keys()
    largest = max(g.abs().max() for g in apart.values())
    for name in apart:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-3, atol=1e-5 * largest)


CHAT_TEMPLATE = (
    "{{ bos_token }} "
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w59{% endif %}")


def test_prompts_of_a_model_with_a_chat_template(folder):
    """A text prompt goes through the template, which writes the only start token."""
    _, tokenizer = load_model(str(folder))
    tokenizer.chat_template = CHAT_TEMPLATE
    assert prompt_ids(tokenizer, "w5") == [1, 5, 59]
    assert prompt_ids(tokenizer, "w5", plain=True) == [5]
