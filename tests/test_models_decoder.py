"""Decoder against GPT-2 and Llama of transformers; generation from a cache against whole sequences."""

import dataclasses

import pytest
import torch
import transformers
from hf_checks import close, greedy, loaded, randomised, returned

import seqfuse
from seqfuse import models, testing
from seqfuse.models import Decoder
from seqfuse.models.attention_maps import attention_maps

IDS = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([4, 9, 7])


def gpt2(**options):
    config = {"vocab_size": 60, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3, "bos_token_id": 1,
              "eos_token_id": None} | options  # fmt: skip
    return randomised(transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)))


def llama(**options):
    config = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
              "eos_token_id": None} | options  # fmt: skip
    return randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)))


FAMILIES = {
    "gpt2": lambda: gpt2(),
    "gpt2-untied": lambda: gpt2(tie_word_embeddings=False, n_inner=50, activation_function="relu"),
    "llama": lambda: llama(),
    "llama-wide-head": lambda: llama(head_dim=12, attention_bias=True, mlp_bias=True, num_key_value_heads=4),
    "llama-tied": lambda: llama(tie_word_embeddings=True, num_key_value_heads=1),
    "llama-linear": lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}),
    "llama-llama3": lambda: llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    ),
    "llama-yarn": lambda: llama(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_same_greedy_ids_and_back(family, tmp_path):
    theirs = FAMILIES[family]()
    ours = loaded(theirs, tmp_path / "theirs")
    with torch.no_grad():
        close(ours(IDS), theirs(IDS).logits)
    wanted = theirs.generate(IDS, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(IDS))
    assert torch.equal(greedy(ours, IDS, 12), wanted[:, 9:])
    again = returned(ours, transformers.AutoModelForCausalLM, tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, theirs(IDS).logits)
    assert torch.equal(
        again.generate(IDS, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(IDS)), wanted
    )


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-llama3"])
def test_attention_maps_are_theirs(family, tmp_path):
    theirs = FAMILIES[family]()
    ours = loaded(theirs, tmp_path)
    theirs.set_attn_implementation("eager")
    before = ours(IDS)
    maps = attention_maps(ours, IDS)
    assert list(maps) == ["stack.blocks.0.attention", "stack.blocks.1.attention"]
    for got, wanted in zip(maps.values(), theirs(IDS, output_attentions=True).attentions, strict=True):
        close(got, wanted)
    assert torch.equal(ours(IDS), before) and not any(m._forward_pre_hooks for m in ours.modules())


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_each_of_several_end_tokens_ends_a_text(where, tmp_path):
    theirs = llama()
    (theirs.config if where == "config.json" else theirs.generation_config).eos_token_id = [7, 11, 30]
    ours = loaded(theirs, tmp_path / "theirs")
    assert ours.config.eos_ids == (7, 11, 30) and ours.config.eos_id == 7
    free = seqfuse.generate(ours, IDS[:1], max_new_tokens=12, stop=())[0, 9:].tolist()
    ours.config = dataclasses.replace(ours.config, more_eos_ids=(free[3],))
    found = seqfuse.generate(ours, IDS[:1], max_new_tokens=12)[0, 9:].tolist()
    assert found == free[: free.index(free[3]) + 1]
    ours.save(tmp_path / "ours")
    assert models.load(tmp_path / "ours").config == ours.config
    again = returned(ours, transformers.AutoModelForCausalLM, tmp_path / "back")
    assert again.config.eos_token_id == again.generation_config.eos_token_id == [7, free[3]]


def test_shards_and_the_old_names_of_rope(tmp_path):
    theirs = llama(max_position_embeddings=64)
    ours = loaded(theirs, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    close(ours(IDS), theirs(IDS).logits)
    values = models.files.read_json(tmp_path / "config.json")
    del values["rope_parameters"]
    values |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
    models.files.write_json(tmp_path / "config.json", values)
    assert models.load(tmp_path).config.rope == models.RopeSettings(theta=500.0, scaling="linear", factor=3.0)


CONFIGS = {
    "gpt2": {},
    "llama": {"kv_heads": 2, "norm": "rms", "activation": "swiglu", "positions": "rope", "attention_bias": False,
              "mlp_bias": False, "tied": False},
    "post-norm": {"norm_first": False, "positions": "sinusoidal", "embedding_norm": True, "scale_embeddings": True,
                  "activation": "relu"},
}  # fmt: skip


def small(name, **options):
    config = {"vocab": 60, "width": 32, "layers": 2, "heads": 4, "max_positions": 32}
    return Decoder.from_config(config | CONFIGS[name] | options).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_of_ragged_prompts_equal_whole_sequences(name):
    model = small(name)
    with torch.no_grad():
        logits, cache = model.begin(IDS, LENGTHS, capacity=16)
        rows = [row[:n] for row, n in zip(IDS, LENGTHS, strict=True)]
        for _ in range(6):
            close(logits, torch.stack([model(row[None])[0, -1] for row in rows]))
            chosen = logits.argmax(-1)
            rows = [torch.cat([row, token[None]]) for row, token in zip(rows, chosen, strict=True)]
            logits = model.step(chosen, cache)


@pytest.mark.parametrize("index", [[2, 0, 1], [1, 1], [0, 0, 2, 2, 1, 1]], ids=str)
def test_a_reordered_cache_goes_on_with_its_rows(index):
    model, index = small("llama"), torch.tensor(index)
    logits, cache = model.begin(IDS, LENGTHS, capacity=16)
    chosen = logits.argmax(-1)
    _, kept = model.begin(IDS, LENGTHS, capacity=16)
    wanted = model.step(chosen, kept)[index]
    cache.reorder(index)
    close(model.step(chosen[index], cache), wanted)
    assert torch.equal(cache.lengths, LENGTHS[index] + 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_fullgraph(name):
    model = small(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(IDS), model(IDS))


def test_a_loss_compiles_with_its_gradients_and_activation_checkpointing():
    model = small("llama", layers=1, checkpoint=True).train()
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")

    def outcome(f):
        loss = f(IDS[:, :-1], IDS[:, 1:])
        return [loss, *torch.autograd.grad(loss, model.parameters())]

    found, eager = outcome(compiled), outcome(model.loss)
    model.double()
    for got, truth, theirs in zip(found, outcome(model.loss), eager, strict=True):
        testing.assert_accurate(got, truth, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_backends_agree(name):
    model = small(name)
    results = {}
    for backend in ("reference", "cpu", "auto"):
        if backend == "cpu" and seqfuse.native.missing():
            continue
        with seqfuse.backend(backend):
            model.zero_grad()
            loss = model.loss(IDS[:, :-1], IDS[:, 1:])
            loss.backward()
            with torch.no_grad():
                logits, cache = model.begin(IDS, LENGTHS, 16)
                step = model.step(IDS[:, 0], cache)
                results[backend] = model(IDS), logits, step, loss, model.stack.embedding.weight.grad.clone()
    for result in results.values():
        for got, wanted in zip(result, results["reference"], strict=True):
            close(got, wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = small(name, checkpoint=checkpoint, dropout=0.1).train()
        torch.manual_seed(1)
        model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_loss_is_the_cross_entropy_of_the_logits():
    model = small("gpt2")
    targets = IDS[:, 1:].clone()
    targets[0, 3:] = -100
    wanted = torch.nn.functional.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), targets.flatten())
    close(model.loss(IDS[:, :-1], targets), wanted)


def test_sizes():
    model = small("gpt2")
    assert model.num_parameters() == sum(p.numel() for p in model.state_dict().values())
    model.stack.embedding.weight.requires_grad_(False)
    assert model.num_parameters(trainable_only=True) == model.num_parameters() - 60 * 32
    read = model.num_parameters() - 32 * 32  # all but the table of positions; the embedding is the output projection
    assert model.weight_bytes() == 4 * read
    untied = small("llama")
    assert untied.weight_bytes() == 4 * (untied.num_parameters() - 60 * 32)


def test_half_precision_keeps_the_angles(tmp_path):
    model = small("llama")
    model.save(tmp_path)
    half = models.load(tmp_path, dtype=torch.bfloat16)
    assert half.stack.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(half.stack.rotary.cos, model.stack.rotary.cos)
    assert models.load(tmp_path).to(torch.float64)(IDS).dtype == torch.float64
    assert half.begin(IDS, LENGTHS, 10)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda m: m(torch.full((1, 4), 60)), "ids must lie in 0 to 59, got 60 to 60"),
        (lambda m: m(torch.zeros(1, 33, dtype=torch.long)), "33 tokens are more than the 32 that it has positions for"),
        (lambda m: m(torch.zeros(4, dtype=torch.long)), r"ids must be an int64 tensor of shape \[B, T\]"),
        (lambda m: m(torch.zeros(1, 4)), "ids must be an int64 tensor"),
        (lambda m: m.begin(IDS, torch.tensor([1, 2, 0]), 16), "lengths must lie in 1 to 9, got 0 to 2"),
        (lambda m: m.begin(IDS, torch.tensor([1, 2]), 16), r"lengths must be an int64 tensor of shape \[3\]"),
        (lambda m: m.begin(IDS, None, 5), r"capacity must be 9 to 32 \(max_positions\), got 5"),
        (lambda m: m.begin(IDS, None, 33), "capacity must be 9 to 32 .*got 33"),
    ],
    ids=range(8),
)
def test_bad_calls_say_what_is_wrong(call, sentence):
    with pytest.raises(ValueError, match=f"Decoder: .*{sentence}"):
        call(small("gpt2"))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"heads": 5}, "width must be a multiple of heads, got 32 and 5"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"layers": 0}, "layers must be positive, got 0"),
        ({"norm": "batch"}, "norm must be 'layer' or 'rms', got 'batch'"),
        ({"depth": 2}, "unknown key 'depth'"),
        ({"width": "wide"}, "width must be a whole number, got 'wide'"),
        ({"dropout": 1.5}, "dropout must be below 1, got 1.5"),
        ({"eos_id": 60}, "eos_id is 60, but there are 60 tokens"),
        ({"rope": {"scaling": "llama3"}}, "RopeSettings: original_positions is needed for 'llama3'"),
        ({"rope": {"speed": 3}}, "RopeSettings: unknown key 'speed'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_configs_say_what_is_wrong(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        small("gpt2", **options)


def test_what_hugging_face_has_no_model_for(tmp_path):
    with pytest.raises(ValueError, match="GPT-2 has no counterpart of positions=.sinusoidal.*; Llama has no"):
        seqfuse.interop.export_hf(small("post-norm"), tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_generation_under_autocast(name):
    """float32 weights, products in bf16: the cache holds what the projections give."""
    model = small(name)
    with torch.autocast("cpu", torch.bfloat16):
        logits, cache = model.begin(IDS, capacity=16)
        ids = IDS
        for _ in range(3):
            ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
            logits = model.step(ids[:, -1], cache)
        wanted = model(ids)[:, -1]
    assert cache.keys[0].dtype == torch.bfloat16
    testing.assert_accurate(logits, model.double()(ids)[:, -1], wanted)
