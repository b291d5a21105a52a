"""attention under torch.compile, torch.export, torch.func and opcheck."""

import pytest
import torch
from attention_inputs import gradients, options, qkv

import seqfuse
from seqfuse import reference
from seqfuse.ops import attention, attention_with_kv_cache, library, scaled_dot_product_attention, varlen_attention
from seqfuse.reference import AttentionOptions
from seqfuse.testing import assert_accurate

NO_CPU = pytest.mark.skipif(not library.has_kernel("attention_fwd", "CPU"), reason="this build has no CPU kernel")
KERNELS = [pytest.param("cpu", marks=NO_CPU), "reference"]


@pytest.mark.parametrize("backend", KERNELS)
def test_transforms_of_torch_func(backend):
    q, k, v = (torch.randn(3, 1, 2, 5, 4) for _ in range(3))

    def loss(q, k, v):
        return attention(q, k, v, causal=True).square().sum()

    with seqfuse.backend(backend):
        got = torch.vmap(torch.func.grad(loss))(q, k, v)
        each = [torch.func.grad(loss)(*t) for t in zip(q, k, v, strict=True)]
        mapped = torch.vmap(attention)(q, k, v)
    assert_accurate(got, torch.stack(each).double())
    assert_accurate(mapped, attention(*(t.double().flatten(0, 1) for t in (q, k, v)))[:, None])


class Recompilations:
    """How many graphs Dynamo made inside the `with` block."""

    def __enter__(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        return self

    def __exit__(self, *args):
        self.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]


@NO_CPU
@pytest.mark.parametrize("names", [("causal",), ("window", "softcap", "alibi_slopes"), ("bias", "mask", "key_lengths")],
                         ids="-".join)  # fmt: skip
def test_fullgraph_forward_and_backward_for_all_sizes(names):
    """One graph for every size, and what it computes is right."""

    def call(q, k, v, keywords):
        return attention(q, k, v, **keywords)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with Recompilations() as seen:
        for T in (9, 24, 17):
            sizes = dict(B=2, Hq=4, Hkv=2, Tq=T, Tk=T + 4, D=8, Dv=8)
            keywords, fields = options(names, sizes)
            tensors, dy = qkv(**sizes), [torch.randn(2, 4, T, 8)]
            tensors += [keywords.pop("bias")] if "bias" in keywords else []

            def ours(*t, keywords=keywords):
                return (compiled(*t[:3], {**keywords, **({"bias": t[3]} if len(t) > 3 else {})}),)

            def truth(*t, fields=fields):
                bias = t[3] if len(t) > 3 else None
                return (reference.attention(*t[:3], AttentionOptions(**{**fields, "bias": bias}))[0],)

            got, theirs = gradients(ours, tensors, dy), gradients(truth, tensors, dy)
            exact = gradients(truth, [t.double() for t in tensors], [dy[0].double()])
            for a, b, c in zip(got, exact, theirs, strict=True):
                assert_accurate(a, b, c)
    assert seen.graphs == 1


@NO_CPU
def test_fullgraph_with_dropout_and_as_sdpa():
    """Inductor too; the seed is drawn inside the graph, from torch's generator."""

    def call(q, k, v):
        return scaled_dot_product_attention(attention(q, k, v, causal=True, dropout_p=0.3), k, v, is_causal=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    with Recompilations() as seen:
        for T in (9, 24, 17):
            tensors = [t.requires_grad_() for t in qkv(Hkv=4, Tq=T, Tk=T)]
            torch.manual_seed(1)
            once = compiled(*tensors)
            again = compiled(*tensors)
            torch.manual_seed(1)
            assert torch.equal(once, compiled(*tensors)) and not torch.equal(once, again)
            once.sum().backward()
            assert all(t.grad.isfinite().all() and t.grad.abs().sum() > 0 for t in tensors)
    assert seen.graphs == 1


@NO_CPU
def test_fullgraph_packed_sequences_of_any_number():
    """No length is looked at, so nothing waits for a device: Dynamo would break the graph there."""

    def call(q, k, v, cu, longest):
        return varlen_attention(q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with Recompilations() as seen:
        for starts in ([0, 4, 9], [0, 7, 7, 12, 15]):
            cu = torch.tensor(starts, dtype=torch.int32)
            tensors = [torch.randn(starts[-1], h, 8) for h in (4, 2, 2)]
            dy = [torch.randn(starts[-1], 4, 8)]
            got = gradients(lambda *t, cu=cu: (compiled(*t, cu, cu.diff().max()),), tensors, dy)
            eager = gradients(lambda *t, cu=cu: (call(*t, cu, None),), tensors, dy)
            exact = gradients(lambda *t, cu=cu: (call(*t, cu, None),), [t.double() for t in tensors], dy)
            for a, b, c in zip(got, exact, eager, strict=True):
                assert_accurate(a, b, c)
    assert seen.graphs == 1


@NO_CPU
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_fullgraph_decoding_writes_into_the_cache(paged):
    def call(q, k_cache, v_cache, k, v, lengths, table):
        return attention_with_kv_cache(q, k_cache, v_cache, k, v, cache_lengths=lengths, block_table=table)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    table = torch.tensor([[3, 1], [0, 2]]) if paged else None
    caches = [torch.randn(4, 2, 6, 8) if paged else torch.randn(2, 2, 12, 8) for _ in range(2)]
    others = [t.clone() for t in caches]
    with Recompilations() as seen, torch.no_grad():
        for lengths in ([3, 11], [4, 10]):
            q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
            got = compiled(q, *caches, k, v, torch.tensor(lengths), table)
            assert torch.equal(got, call(q, *others, k, v, torch.tensor(lengths), table))
            assert all(map(torch.equal, caches, others))
    assert seen.graphs == 1


@NO_CPU
def test_export_for_sizes_unknown_yet():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True, window=(4, 0))

    T = torch.export.Dim("T", min=2, max=1000)
    shapes = {name: {2: T} for name in "qkv"}
    program = torch.export.export(Module(), tuple(qkv(Tk=9)), dynamic_shapes=shapes)
    assert any("seqfuse.attention_fwd" in str(node.target) for node in program.graph.nodes)
    for length in (9, 31):
        tensors = qkv(Tq=length, Tk=length)
        exact = attention(*(t.double() for t in tensors), causal=True, window=(4, 0))
        assert_accurate(program.module()(*tensors), exact)


@NO_CPU
@pytest.mark.parametrize("names", [(), ("causal", "bias"), ("mask", "key_lengths")], ids=str)
def test_opcheck(names):
    o = AttentionOptions(**options(names)[1])
    q, k, v = qkv()
    torch.library.opcheck(torch.ops.seqfuse.attention_fwd.default, (q, k, v, *o))
    out, lse = torch.ops.seqfuse.attention_fwd(q, k, v, *o)
    args = torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *o, o.bias is not None, True
    torch.library.opcheck(torch.ops.seqfuse.attention_bwd.default, args)


@NO_CPU
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_opcheck_of_decoding(paged):
    table = torch.tensor([[3, 1], [0, 2]]) if paged else None
    caches = [torch.randn(4, 2, 6, 8) if paged else torch.randn(2, 2, 12, 8) for _ in range(2)]
    q, lengths = torch.randn(2, 4, 1, 8), torch.tensor([3, 11])
    torch.library.opcheck(
        torch.ops.seqfuse.attention_decode.default, (q, *caches, lengths, table, None, 0.3, -1, 0, 0.0)
    )
    new = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
    torch.library.opcheck(torch.ops.seqfuse.kv_cache_append.default, (*caches, *new, lengths, table))


def test_fixed_masks_and_slopes_beside_dynamic_sizes():
    """A size that is symbolic equals one that is not: that is a guard, not an error."""
    mask, slopes = torch.rand(12, 12) < 0.7, torch.ones(4)
    bias = torch.nn.Parameter(torch.randn(4, 12, 12))

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def call(q, k, v):
        return (
            seqfuse.ops.attention(q, k, v, mask=mask),
            seqfuse.ops.attention(q, k, v, bias=bias),
            seqfuse.ops.attention(q, k, v, alibi_slopes=slopes * 1),
        )

    q, k, v = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    want = [seqfuse.ops.attention(q, k, v, **o) for o in (dict(mask=mask), dict(bias=bias), dict(alibi_slopes=slopes))]
    for a, b in zip(call(q, k, v), want, strict=True):
        torch.testing.assert_close(a, b)
