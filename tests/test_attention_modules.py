"""MultiheadAttention and the Transformer layers against torch.nn's, alone, fused, and inside torch's stacks."""

import copy

import pytest
import torch
from torch import nn

import seqfuse
from seqfuse.testing import assert_accurate

CALLS = {
    "self": {},
    "seq-first": {"batch_first": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim": {"kdim": 12, "vdim": 20},
    "no bias": {"bias": False},
}


def results(module, inputs, dtype, **call):
    """Output and every gradient, computed in `dtype`."""
    module = copy.deepcopy(module).to(dtype)
    seen = {}
    leaves = [seen.setdefault(id(x), x.detach().to(dtype).requires_grad_()) for x in inputs]
    call = {k: m.to(dtype) if isinstance(m, torch.Tensor) and m.is_floating_point() else m for k, m in call.items()}
    out = module(*leaves, **call)
    out = out[0] if isinstance(out, tuple) else out
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    wanted = [*seen.values(), *module.parameters()]
    return [out.detach(), *torch.autograd.grad(out, wanted, dy, materialize_grads=True)]


def compare(theirs, ours, inputs, **call):
    truth = results(theirs, inputs, torch.float64, **call)
    pytorch, got = results(theirs, inputs, torch.float32, **call), results(ours, inputs, torch.float32, **call)
    for i, triple in enumerate(zip(got, truth, pytorch, strict=True)):
        assert_accurate(*triple, what=f"result {i}")


def masks(kind, B, H, L, S):
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, S - 2 :] = True
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(B, S)},
        "bool mask": {"attn_mask": torch.rand(L, S) < 0.3},
        "float mask of heads": {"attn_mask": torch.randn(B * H, L, S)},
        "mask and padding": {"attn_mask": torch.rand(B * H, L, S) < 0.3, "key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "is_causal": True},
        "causal and padding": {
            "attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "is_causal": True, "key_padding_mask": padding
        },
    }[kind]  # fmt: skip


KINDS = ["none", "padding", "float padding", "bool mask", "float mask of heads", "mask and padding", "causal",
         "causal and padding"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_multihead_attention_is_torchs(options, kind):
    options = {"batch_first": True, **options}
    theirs = nn.MultiheadAttention(16, 2, **options)
    ours = seqfuse.nn.MultiheadAttention(16, 2, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    B, L, S = 3, 5, 7
    widths = 16, options.get("kdim", 16), options.get("vdim", 16)
    inputs = [torch.randn(B, t, w) for t, w in zip((L, S, S), widths, strict=True)]
    inputs = inputs if options["batch_first"] else [x.transpose(0, 1) for x in inputs]
    compare(theirs, ours, inputs, need_weights=False, **masks(kind, B, 2, L, S))


@pytest.mark.parametrize("shared", [1, 2])
def test_inputs_that_are_one_tensor(shared):
    theirs = nn.MultiheadAttention(16, 2)
    ours = seqfuse.fuse(copy.deepcopy(theirs))
    x, y = torch.randn(5, 2, 16), torch.randn(6, 2, 16)
    compare(theirs, ours, [x, x, x] if shared == 1 else [x, y, y], need_weights=False)


@pytest.mark.parametrize("average", [True, False])
def test_need_weights_and_unbatched(average):
    theirs = nn.MultiheadAttention(16, 2)
    ours = seqfuse.fuse(copy.deepcopy(theirs))
    x = torch.randn(5, 16)
    for a, b in zip(
        ours(x, x, x, average_attn_weights=average), theirs(x, x, x, average_attn_weights=average), strict=True
    ):
        assert torch.equal(a, b)
    assert "need_weights" in str(seqfuse.explain(ours))
    compare(theirs, ours, [x, x, x], need_weights=False, attn_mask=torch.randn(2, 5, 5))
    assert seqfuse.unfuse(ours) is ours and type(ours) is nn.MultiheadAttention


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_layers_in_torchs_stacks(norm_first, activation):
    options = dict(dim_feedforward=32, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, **options), 2, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, **options), 2)
    src, tgt = torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5) < 0
    fused = [seqfuse.fuse(copy.deepcopy(m)) for m in (encoder, decoder)]
    assert all(type(m.layers[0]).__module__ == "seqfuse.nn.transformer" for m in fused)
    compare(encoder, fused[0], [src], src_key_padding_mask=padding)
    compare(decoder, fused[1], [tgt, src], tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding)
    for theirs, ours in zip((encoder, decoder), fused, strict=True):
        assert list(theirs.state_dict()) == list(ours.state_dict())
        assert type(seqfuse.unfuse(ours).layers[0]) is type(theirs.layers[0])


def test_own_layers_and_nested_inference():
    encoder = nn.TransformerEncoder(seqfuse.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    plain = seqfuse.unfuse(copy.deepcopy(encoder))
    src, padding = torch.randn(3, 7, 16), torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        got, expected = encoder(src, src_key_padding_mask=padding), plain(src, src_key_padding_mask=padding)
    assert_accurate(got[~padding], expected[~padding].double())
    assert [type(m) for m in seqfuse.nn.TransformerDecoderLayer(16, 2).children()][:2] == [
        seqfuse.nn.MultiheadAttention
    ] * 2


def test_compiled_layer_has_no_graph_break():
    layer = seqfuse.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 6, 16)
    assert_accurate(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer.double()(x.double()))
