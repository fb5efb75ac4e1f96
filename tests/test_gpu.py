"""What only a GPU can show, at sizes for which its own attention kernels are chosen.

python -m pytest -m gpu        # 4 minutes
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import REPO, needs, scale_matrices, word_tokenizer
from dqo import Config, dqo_step, load_model, logps_of, sample, token_logps
from test_runs import MINE, command, here, lines  # noqa: F401
from test_sample import alone, spoken

pytestmark = pytest.mark.gpu
SHAPES = dict(  # heads as published
    llama={}, qwen3=dict(head_dim=128), gemma3_text=dict(head_dim=256, num_key_value_heads=1))
LENGTHS = [5, 62, 63, 64, 65, 190, 191, 192, 193]  # around 64 mod 128, where cuDNN gave NaN
WORDS = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, 600)]


@pytest.fixture(params=[(name, bf16) for name in SHAPES for bf16 in (False, True)], ids=str)
def policy(request, tmp_path):
    """(folder, bf16) of a model of three layers."""
    torch.manual_seed(0)
    name, bf16 = request.param
    values = dict(vocab_size=600, hidden_size=512, intermediate_size=1024, num_hidden_layers=3,
                  num_attention_heads=8, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
                  pad_token_id=0, max_position_embeddings=1024)
    config = AutoConfig.for_model(name, **values | SHAPES[name])
    model, folder = AutoModelForCausalLM.from_config(config), str(tmp_path / "model")
    scale_matrices(model.parameters(), 2)
    model.save_pretrained(folder)
    word_tokenizer(WORDS, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder, bf16


def test_scores_are_those_of_one_row_at_a_time_on_a_cpu(policy):
    """Left padding, shared prompts, micro-batches, frozen weights; finite gradients."""
    name, bf16 = policy
    (model, tokenizer), exact = load_model(name, bf16), load_model(name, bf16=False)[0].cpu()
    prompts = [torch.randint(3, 600, (n,)).tolist() for n in LENGTHS]
    rollout = sample(model, tokenizer, prompts, 3, 9)
    expected = torch.zeros(rollout.mask.shape, dtype=torch.float64)
    with torch.no_grad():
        for p, prompt in enumerate(prompts):
            for i in range(3):
                row = alone(exact, prompt, spoken(rollout, p, i))
                expected[p, i, :len(row)] = row
    frozen, _ = load_model(name, bf16, frozen=True)
    for logp in (rollout.logp, logps_of(model, rollout, Config(micro_batch=8)),
                 logps_of(frozen, rollout, Config(micro_batch=64))):
        off = (logp.cpu() - expected).abs()
        assert off.max() < (0.5 if bf16 else 1e-4) and off.mean() < (0.03 if bf16 else 1e-5)
    for ways in range(2):
        token_logps(model.train(), rollout).sum().backward()
        assert all(x.grad.isfinite().all() for x in model.parameters())
        model.activation_checkpointing_enable()


def test_steps_with_a_kl_penalty(policy):
    """What is paid becomes likelier; the KL begins near 0 and grows."""
    name, bf16 = policy
    (model, tokenizer), (reference, _) = load_model(name, bf16), load_model(name, bf16, frozen=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    rows = [dict(prompt=" ".join(WORDS[3:n])) for n in LENGTHS]
    config = Config(objective="grpo", k=8, max_new_tokens=4, beta=0.01, micro_batch=32)

    encoder = SimpleNamespace(encode=lambda texts: [[1.0, len(text)] for text in texts])

    def reward(prompts, texts, rows):  # the share of odd words
        return [sum(int(word[1:]) % 2 for word in text.split()) / 4 for text in texts]
    found = [dqo_step(model, tokenizer, encoder, reward, optimizer, rows, config, reference)[0]
             for _ in range(10)]
    assert abs(found[0]["kl"]) < (0.1 if bf16 else 1e-3) < found[-1]["kl"]
    assert found[-1]["quality"] > found[0]["quality"] + 0.1
    assert max(x["mismatch"] for x in found) < (0.1 if bf16 else 1e-4)


@pytest.mark.parametrize("flags", [
    "", "--no-bf16 --beta 0.1", pytest.param("--lora 4", marks=needs("peft"))])
def test_resume_here_and_on_a_cpu(flags, here):  # noqa: F811
    """A run that fails in its third step goes on here like one that does not, and on a CPU."""
    line = f"{MINE} {flags} --steps 4 --out"
    assert command(f"{line} whole") == 0
    for out, environment in ("here", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""}):
        Path("train.txt").write_text("\n\nraise KeyError\n")
        with pytest.raises(KeyError):
            command(f"{line} {out}")
        Path("train.txt").unlink()
        subprocess.run([sys.executable, REPO / "train.py", "--resume", out], check=True,
                       env={**os.environ, **environment})
        for x, y in zip(lines("whole/metrics.jsonl"), lines(f"{out}/metrics.jsonl"), strict=True):
            assert x["log_det"] == pytest.approx(y["log_det"], abs=0.3)
