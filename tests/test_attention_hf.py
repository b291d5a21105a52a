"""Hugging Face models on seqfuse's attention: logits, every gradient, generation. Tiny random configurations."""

import copy

import pytest
import torch

import seqfuse
from seqfuse.testing import FLOOR, assert_accurate

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
NONE = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0)


def gpt2():
    c = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0,
                                embd_pdrop=0.0, attn_pdrop=0.0, **NONE)  # fmt: skip
    return transformers.GPT2LMHeadModel(c)


def llama():
    c = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, **NONE)  # fmt: skip
    return transformers.LlamaForCausalLM(c)


def bert():
    c = transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                intermediate_size=48, hidden_dropout_prob=0.0,
                                attention_probs_dropout_prob=0.0)  # fmt: skip
    return transformers.BertForMaskedLM(c)


def t5():
    c = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
                              decoder_start_token_id=0, eos_token_id=None, pad_token_id=0)  # fmt: skip
    return transformers.T5ForConditionalGeneration(c)


def marian():
    c = transformers.MarianConfig(vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
                                  encoder_attention_heads=4, decoder_attention_heads=4, decoder_ffn_dim=48, dropout=0.0,
                                  max_position_embeddings=32, decoder_start_token_id=0, eos_token_id=None,
                                  forced_eos_token_id=None, pad_token_id=0)  # fmt: skip
    return transformers.MarianMTModel(c)


MODELS = {f.__name__: f for f in (gpt2, llama, bert, t5, marian)}


def inputs(model):
    ids = torch.randint(2, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # padded on the left, as for generation
    call = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        call["decoder_input_ids"] = torch.randint(2, 50, (3, 6))
    return call


def results(model, call, dtype):
    model = copy.deepcopy(model).to(dtype).train()
    logits = model(**call).logits
    dy = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    if not model.config.is_encoder_decoder:
        dy = dy * call["attention_mask"][..., None]  # what padding itself attends to means nothing
    logits.backward(dy)
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient(name):
    plain = MODELS[name]()
    plain.set_attn_implementation("eager")
    fused = seqfuse.fuse(copy.deepcopy(plain))
    assert fused.config._attn_implementation == "seqfuse"
    call = inputs(plain)
    exact = copy.deepcopy(plain)
    exact.set_attn_implementation("sdpa")  # in float64 the eager mask overflows to -inf, and a row of padding to NaN
    runs = (exact, torch.float64), (plain, torch.float32), (fused, torch.float32)
    truth, pytorch, got = (results(model, call, dtype) for model, dtype in runs)
    real = torch.ones(truth[0].shape[:2], dtype=torch.bool)
    if not plain.config.is_encoder_decoder:
        real = call["attention_mask"].bool()
    assert_accurate(got[0][real], truth[0][real], pytorch[0][real], what="logits")
    assert got[1].keys() == truth[1].keys()
    for key, exact_gradient in truth[1].items():
        if key.endswith(
            ("key.bias", "k_proj.bias")
        ):  # truly zero (a softmax does not feel it): what is left is rounding
            scale = truth[1][key.removesuffix("bias") + "weight"].norm()
            assert got[1][key].norm() <= 2 * pytorch[1][key].norm() + FLOOR[torch.float32] * scale
            continue
        assert_accurate(got[1][key], exact_gradient, pytorch[1][key], what=key)
    if name == "t5":
        assert any("relative_attention_bias" in k and g.abs().sum() > 0 for k, g in got[1].items())
    fused(**call)
    assert any(row.op == "attention" for row in seqfuse.explain(fused))
    assert seqfuse.unfuse(fused).config._attn_implementation == "eager"


@pytest.mark.parametrize("name", [n for n in MODELS if n != "bert"])
def test_generation_with_a_cache_gives_the_same_tokens(name):
    plain = MODELS[name]().eval()
    fused = seqfuse.fuse(copy.deepcopy(plain))
    call = {k: v for k, v in inputs(plain).items() if not k.startswith("decoder")}
    options = dict(max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(fused.generate(**call, **options), plain.generate(**call, **options))


def test_attention_sinks():
    """gpt-oss: a score in every softmax that belongs to no key, with its gradient."""
    if not hasattr(transformers, "GptOssConfig"):
        pytest.skip("this transformers has no gpt-oss")
    c = transformers.GptOssConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2,
                                  num_experts_per_tok=2, attn_implementation="eager", **NONE)  # fmt: skip
    plain = transformers.GptOssForCausalLM(c)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.3)
    fused, call = seqfuse.fuse(copy.deepcopy(plain)), inputs(plain)
    assert fused.config._attn_implementation == "seqfuse"
    for model in (plain, fused):
        model(**call).logits[call["attention_mask"].bool()].square().sum().backward()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm().clamp(min=1e-3), name


def test_what_attention_has_not_is_refused():
    from seqfuse.interop.hf_attention import attention_forward

    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="no 'indices', which Linear asks for"):
        attention_forward(torch.nn.Linear(2, 2), q, q, q, None, indices=torch.zeros(1))


def test_exclude_by_path_keeps_the_attention_too():
    def both():
        return torch.nn.ModuleDict({"a": llama(), "b": llama()})

    for exclude in ("a", ["a"], (p for p in ["a"]), "a*"):
        model = seqfuse.fuse(both(), exclude=exclude)
        assert (
            model["a"].config._attn_implementation != "seqfuse" and model["b"].config._attn_implementation == "seqfuse"
        )
