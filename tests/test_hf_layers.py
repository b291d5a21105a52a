"""fuse() on Hugging Face's RMSNorm, gated MLPs and causal-LM loss. Tiny random configurations."""

import contextlib
import copy
import pickle

import pytest
import torch
from test_attention_hf import gpt2, llama, transformers

import seqfuse
from seqfuse.benchmarks.harness import Contender, peak_memory
from seqfuse.testing import assert_accurate


def gemma():
    c = transformers.GemmaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                                 num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=None,
                                 pad_token_id=0)  # fmt: skip
    return transformers.GemmaForCausalLM(c)


def t5_gated():
    c = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
                              decoder_start_token_id=0, eos_token_id=None, pad_token_id=0)  # fmt: skip
    return transformers.T5ForConditionalGeneration(c)


def batch():
    ids = torch.randint(2, 50, (3, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def step(model, call):
    model.zero_grad()
    out = model(**call)
    out.loss.backward()
    return [out.loss.detach(), *(p.grad.clone() for p in model.parameters())], out


def assert_same(model, call, fused, dtype=torch.float32):
    exact = step(copy.deepcopy(model).double(), call)[0]
    theirs = step(model.to(dtype), call)[0]
    got, out = step(fused.to(dtype), call)
    for a, b, c in zip(got, exact, theirs, strict=True):
        assert_accurate(a, b, c, dtype=dtype)
    return out


@pytest.mark.parametrize("make", [llama, gemma], ids=lambda f: f.__name__)
def test_norms_and_mlps(make):
    model = make()
    before = {path: type(m) for path, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    fused = seqfuse.fuse(copy.deepcopy(model))
    assert list(fused.state_dict()) == list(model.state_dict())
    assert assert_same(model, batch(), fused).logits is not None
    found = {row.op for row in seqfuse.explain(fused)}
    assert {"rms_norm", "gated", "attention"} <= found
    names = {type(m).__name__ for m in fused.modules()}
    assert names == {c.__name__ for c in before.values()}  # transformers goes by names
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert [type(m) for m in other.modules()] == [type(m) for m in fused.modules()]
        assert torch.equal(other(batch()["input_ids"] * 0).logits, fused(batch()["input_ids"] * 0).logits)
    seqfuse.fuse(model)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert {path: type(m) for path, m in seqfuse.unfuse(model).named_modules()} == before


def test_t5s_norm():
    model = t5_gated()
    ids = torch.randint(2, 50, (2, 7))
    call = {"input_ids": ids, "decoder_input_ids": ids}
    exact, theirs = copy.deepcopy(model).double()(**call).logits, model(**call).logits
    fused = seqfuse.fuse(model)
    assert_accurate(fused(**call).logits, exact, theirs)
    assert any(row.op == "rms_norm" for row in seqfuse.explain(fused))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_gelu_by_tanh(name, dtype):
    plain = transformers.activations.ACT2FN[name]
    fused = seqfuse.fuse(torch.nn.Sequential(transformers.activations.ACT2FN[name]))
    x = (3 * torch.randn(5, 40)).to(dtype).requires_grad_()

    def results(call, x):
        y = call(x)
        return [y, *torch.autograd.grad(y, x, torch.linspace(-1, 1, 200).reshape(5, 40).to(x.dtype))]

    exact = results(plain, x.detach().double().requires_grad_())
    for got, truth, theirs in zip(results(fused, x), exact, results(plain, x), strict=True):
        assert_accurate(got, truth, theirs)
    assert fused(x).grad_fn.name() == "GeluBackward0" != plain(x).grad_fn.name()
    assert type(seqfuse.unfuse(fused)[0]) is type(plain)


def test_include_exclude_and_another_activation():
    model = seqfuse.fuse(llama(), exclude="*norm*")
    assert type(model.model.norm) is type(llama().model.norm)
    mlp = model.model.layers[0].mlp
    assert type(mlp) is not type(llama().model.layers[0].mlp)
    odd = llama()
    odd.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    assert type(seqfuse.fuse(odd).model.layers[0].mlp) is type(llama().model.layers[0].mlp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", [gpt2, llama], ids=lambda f: f.__name__)
def test_fused_loss(make, dtype):
    model, call = make(), batch()
    fused = seqfuse.fuse(copy.deepcopy(model), fuse_loss=True)
    assert assert_same(model.to(torch.float32), call, fused, dtype).logits is None
    assert "linear_cross_entropy" in {row.op for row in seqfuse.explain(fused)}
    for more in ({"num_items_in_batch": torch.tensor(5)}, {"num_items_in_batch": 7}):
        assert_accurate(fused(**call, **more).loss, model(**call, **more).loss.double(), dtype=dtype)
    ids = call["input_ids"]
    assert fused(ids).logits.shape == (3, 9, 50) and fused(ids, labels=ids, return_dict=False)[0].dim() == 0
    assert fused(ids, labels=ids, logits_to_keep=0).logits is None
    assert seqfuse.unfuse(fused)(**call).logits is not None


def test_the_logits_are_never_whole():
    config = transformers.LlamaConfig(vocab_size=20000, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    plain = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 20000, (4, 256))

    def peak(model):
        def call(_):
            model(ids, labels=ids).loss.backward()
            return []

        return peak_memory(Contender("step", call, contextlib.nullcontext), "cpu")

    before = peak(plain)
    assert before > 2 * 4 * ids.numel() * 20000 and peak(seqfuse.fuse(plain, fuse_loss=True)) < before / 4


def test_what_the_fused_loss_leaves_alone():
    model, call = llama(), batch()
    seqfuse.fuse(model, fuse_loss=True)
    model.lm_head.register_forward_hook(lambda m, i, out: out * 2)
    assert model(**call).logits is not None  # the hook is kept: the head is called
    with pytest.raises(ValueError, match="fuse_loss=True knows the loss of GPT2LMHeadModel and LlamaForCausalLM"):
        seqfuse.fuse(torch.nn.Linear(2, 2), fuse_loss=True)


def test_conv1d(narrow):
    """GPT-2's linear layers, where MKL leaves half of the processor unused."""
    config = transformers.GPT2Config(vocab_size=50, n_embd=128, n_layer=1, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0,
                                     resid_pdrop=0.0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(2, 50, (3, 30))
    fused = seqfuse.fuse(copy.deepcopy(model))
    assert_same(model, {"input_ids": ids, "labels": ids}, fused)
    rows = {row.module: row for row in seqfuse.explain(fused)}
    assert rows["transformer.h.0.mlp.c_fc"][1:3] == ("linear", "cpu")
    assert type(fused.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    assert type(seqfuse.unfuse(fused).transformer.h[0].mlp.c_fc) is type(model.transformer.h[0].mlp.c_fc)
