"""Sampling, scoring and their gradients on models built from the published configurations.

They are a few layers wide. What makes each of them different is kept as published (rope scaling,
query-key norms, soft-capping, sliding windows, tied embeddings, dropout); only the sizes are cut,
and the windows so that they bite.
"""


import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import scale_matrices, word_tokenizer
from dqo import Config, dither, load_model, logps_of, sample, token_logps
from test_sample import alone, check_layout, spoken

SMALL = dict(
    vocab_size=60, hidden_size=32, intermediate_size=64, num_attention_heads=4,
    num_key_value_heads=2, num_hidden_layers=2, bos_token_id=1, eos_token_id=2,
    pad_token_id=2)
MAMBA = dict(  # 2, in hybrid models; as published a chunk would be 256 positions, for our 25
    mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8, mamba_expand=2,
    mamba_chunk_size=8)
DELTA_NET = dict(  # the gated delta rule in hybrid models
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8)
FEW = dict(num_experts=4, num_experts_per_tok=2)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
GEMMA = dict(
    num_hidden_layers=4, head_dim=16, query_pre_attn_scalar=16, sliding_window=6,
    hidden_activation="gelu_pytorch_tanh")
ATTENTION = {
    "llama": dict(  # 3.2
        head_dim=8, rms_norm_eps=1e-5, max_position_embeddings=131072, tie_word_embeddings=True,
        rope_parameters=dict(
            rope_type="llama3", rope_theta=500000.0, factor=32.0, high_freq_factor=4.0,
            low_freq_factor=1.0, original_max_position_embeddings=8192)),
    "qwen3": dict(
        head_dim=16, max_position_embeddings=40960, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "gpt2": dict(n_positions=1024, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
    "gemma2": dict(GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    "gemma3_text": GEMMA,
    "mistral": dict(rms_norm_eps=1e-5, sliding_window=6),
}
HYBRID = {  # beside keys and values a state that each token overwrites
    "qwen3_5_text": dict(DELTA_NET, num_hidden_layers=4, head_dim=8, tie_word_embeddings=True),
    "lfm2": dict(
        num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False),
    "falcon_h1": dict(MAMBA, head_dim=8, mamba_d_ssm=64),  # each layer is both
    "jamba": dict(
        FEW, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8,
        mamba_dt_rank=4),
    "granitemoehybrid": dict(
        MAMBA, **LOCAL, num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"],
        shared_intermediate_size=32),
    "zamba2": dict(
        num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2, n_mamba_heads=8,
        mamba_d_state=8, chunk_size=8, adapter_rank=4),
    "nemotron_h": dict(
        layers_block_type=["mamba", "attention", "mlp", "mamba", "moe"], num_hidden_layers=None,
        head_dim=8, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, ssm_state_size=8,
        chunk_size=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16),
    "olmo_hybrid": dict(DELTA_NET, num_hidden_layers=4, linear_num_key_heads=4),
    "minimax": dict(LOCAL, head_dim=8, block_size=4),  # linear attention has its own cache
    "qwen3_next": dict(
        DELTA_NET, **FEW, num_hidden_layers=4, head_dim=8, moe_intermediate_size=16,
        shared_expert_intermediate_size=16),
}
ALWAYS = ["llama", "qwen3", "gpt2", "gemma2", "qwen3_5_text", "lfm2", "falcon_h1", "minimax"]
NAMES = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow)  # relatives
         for name in ATTENTION | HYBRID]
ENDS = [2, *range(50, 58)]  # so many that responses end early and late
# Of different lengths; the second is one token, the third longer than the windows.
PROMPTS = [[5, 6], [7], [9, 9, 13, 30, 7, 8, 11, 12, 20]]


@pytest.fixture(params=NAMES)
def policy(request, tmp_path):
    """(model, tokenizer) of a folder as published ones are. The tokenizer pads with its end."""
    torch.manual_seed(0)
    name, values = request.param, (ATTENTION | HYBRID)[request.param]
    if name == "gpt2":
        values = dict(values, vocab_size=60, n_embd=32, n_layer=2, n_head=4, eos_token_id=2)
    else:
        values = {key: x for key, x in {**SMALL, **values}.items() if x is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **values))
    scale_matrices(model.parameters(), 4)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(tmp_path)
    words = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, 60)]
    word_tokenizer(words, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(
        tmp_path)
    return load_model(str(tmp_path))


def test_all_ways_to_score_agree_with_one_row_at_a_time(policy):
    """Sampling, a padded batch with a shared prompt cache and without one, parts of a rollout, and
    micro-batches that cut groups."""
    model, tokenizer = policy
    torch.manual_seed(1)
    k, longest, temperature = 4, 12, 0.9
    rollout = sample(model, tokenizer, PROMPTS, k, longest, temperature)
    check_layout(rollout, PROMPTS, set(ENDS), k, longest)
    assert len(rollout.mask.sum(-1).unique()) > 3 and rollout.mask.shape[-1] > 8, "of one length"
    expected = torch.zeros(rollout.mask.shape, dtype=torch.float64)
    with torch.no_grad():
        for p, prompt in enumerate(PROMPTS):
            for i in range(k):
                row = alone(model, prompt, spoken(rollout, p, i), temperature)
                expected[p, i, :len(row)] = row

    def agree(logp, where=...):
        torch.testing.assert_close(logp.double(), expected[where][..., :logp.shape[-1]], rtol=0,
                                   atol=1e-5)
    agree(rollout.logp)
    with torch.no_grad():
        agree(token_logps(model.train(), rollout, temperature))  # dropout is off all the same
        for where in (([0, 1], slice(0, 2)), ([1], slice(2, 4)), ([2, 0], slice(3, 4))):
            part = rollout.part(torch.tensor(where[0]), where[1])
            assert part.prompt_mask[:, 0].any() and part.mask[..., -1].any(), "needless padding"
            agree(token_logps(model, part, temperature), where)
    for size in (3, 9):  # groups of 4 cut into 3 and 1; two groups, and one
        agree(logps_of(model, rollout, Config(temperature=temperature, micro_batch=size)))
    model.activation_checkpointing_enable()  # no cache then
    agree(token_logps(model.train(), rollout, temperature))


def test_a_frozen_model_in_bf16(policy, tmp_path):
    """What bf16 products would cast may be kept in bf16: to the bit the same log-probabilities."""
    torch.manual_seed(1)
    model, tokenizer = load_model(str(tmp_path), bf16=True)
    frozen, _ = load_model(str(tmp_path), bf16=True, frozen=True)
    rollout = sample(model, tokenizer, PROMPTS, 4, 12)
    logp = token_logps(model, rollout).detach()
    assert torch.equal(logp, token_logps(frozen, rollout))
    assert not any(x.requires_grad for x in frozen.parameters())
    exact, _ = load_model(str(tmp_path), bf16=False, frozen=True)
    assert {x.dtype for x in exact.parameters()} == {torch.float32}
    off = (logp - token_logps(policy[0], rollout)).abs().max()  # from float32
    assert 1e-4 < off < 0.2 and (logp - rollout.logp).abs().max() < 0.1
    halved = [name for name, x in frozen.named_parameters() if x.dtype == torch.bfloat16]
    assert model.config.model_type == "gpt2" or any("proj" in name for name in halved)


def test_small_steps_count_in_bf16():
    """Of a step of 1/16 of the distance between two bf16 numbers, bf16 products see nothing where
    weights are such numbers, as published ones are. Dithered, all is seen on average, and before
    the step the numbers were the same. What is 0 stays 0."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(200, 50)
    layer.bias.data.zero_()
    was = layer.weight.data.bfloat16().float()
    layer.weight.data = was.clone()
    gap = 2.0 ** was.abs().log2().floor() / 128
    assert torch.equal((was + gap / 16).bfloat16().float(), was)
    dither(layer)
    before = layer.weight.data.bfloat16().float()
    assert (before == was).float().mean() > 0.99 and (layer.bias == 0).all()
    seen = ((layer.weight.data + gap / 16).bfloat16().float() - before) / gap
    assert seen.mean().item() == pytest.approx(1 / 16, abs=0.01)


def test_gradients_are_those_of_one_row_at_a_time(policy):
    """Padding and shared prompts change no gradient, nor does a model that keeps a state."""
    model, tokenizer = policy
    torch.manual_seed(1)
    rollout = sample(model, tokenizer, PROMPTS, 2, 8)
    weight = torch.randn(rollout.mask.shape)  # the gradient differs from token to token

    def gradient(loss):
        model.zero_grad(set_to_none=True)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    together = gradient((weight * token_logps(model, rollout)).sum())
    loss = 0.0
    for p, prompt in enumerate(PROMPTS):
        for i in range(2):
            logp = alone(model, prompt, spoken(rollout, p, i))
            loss = loss + (weight[p, i, :len(logp)] * logp).sum()
    apart = gradient(loss)
    assert together.keys() == apart.keys()
    largest = max(g.abs().max() for g in apart.values())
    for name in apart:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-3, atol=1e-5 * largest)


class RandomEncoder:
    def encode(self, texts):
        return torch.randn(len(texts), 8)
