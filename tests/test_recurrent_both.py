"""Both directions of a layer in one op, as the CUDA backend runs them: here by the same op on the CPU, which runs one
scan after the other, against the float64 reference and bit by bit against the two ops of one direction each."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import seqfuse
from seqfuse import dispatch, native, nn
from seqfuse.ops import rnn_scan
from seqfuse.testing import assert_accurate

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
T, B, IN, H = 7, 5, 6, 9


@pytest.fixture
def calls(monkeypatch):
    """The CPU backend runs both directions at once; how often it did, forward and backward."""
    counted = {"fwd": 0, "bwd": 0}
    both = rnn_scan.SCAN_BOTH_ON_CPU

    def counting(name):
        def call(*args):
            counted[name] += 1
            return getattr(both, name)(*args)

        return call

    counting_backend = dispatch.Backend("seqfuse", counting("fwd"), counting("bwd"))
    monkeypatch.setitem(rnn_scan.SCAN_BOTH, "cpu", counting_backend)
    return counted


def run(module, x, seed=3, **kwargs):
    """Outputs and gradients: every output gets a gradient of its own."""
    torch.manual_seed(seed)  # of masks
    x = x.detach().clone().requires_grad_()
    out = flat(module(x, **kwargs))
    torch.manual_seed(seed + 1)
    grads = torch.autograd.grad(out, [x, *module.parameters()], [torch.randn(o.shape) for o in out])
    return [*(o.detach() for o in out), *grads]


def flat(out):
    return [t for part in out for t in flat(part)] if isinstance(out, tuple) else [out]


CALLS = {
    "plain": ({}, {}),
    "two-layers": ({"num_layers": 2}, {}),
    "batch-first": ({"batch_first": True}, {}),
    "no-bias": ({"bias": False}, {}),
    "zoneout": ({"zoneout": 0.3}, {}),
    "zoneout-in-evaluation": ({"zoneout": 0.3}, {"training": False}),
    "weight-drop": ({"weight_drop": 0.3}, {}),
    "lengths": ({}, {"lengths": torch.tensor([7, 1, 4, 6, 2])}),
    "resets": ({"num_layers": 2}, {"resets": torch.rand(T, B, generator=torch.Generator().manual_seed(5)) < 0.3}),
}


@pytest.mark.parametrize("which", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_at_once_is_what_two_scans_give(calls, monkeypatch, kind, which):
    options, kwargs = CALLS[which]
    kwargs = dict(kwargs)
    module = KINDS[kind](IN, H, bidirectional=True, **options).train(kwargs.pop("training", True))
    x = torch.randn(*((B, T) if options.get("batch_first") else (T, B)), IN)
    if kind == "lstm" and which in ("plain", "lengths"):
        kwargs["return_cell_states"] = True
    with seqfuse.backend("cpu"):
        together = run(module, x, **kwargs)
        assert calls == dict.fromkeys(("fwd", "bwd"), options.get("num_layers", 1))
        monkeypatch.delitem(rnn_scan.SCAN_BOTH, "cpu")
        apart = run(module, x, **kwargs)
    assert calls["fwd"] == options.get("num_layers", 1), "the second run was by two scans"
    for got, expected in zip(together, apart, strict=True):  # the GEMMs have other shapes
        assert_accurate(got, expected.double(), what=f"{kind} {which}")


@pytest.mark.parametrize("kind", KINDS)
def test_initial_states_and_the_reference(calls, kind):
    module = KINDS[kind](IN, H, 2, bidirectional=True)
    wide = KINDS[kind](IN, H, 2, bidirectional=True).double()
    wide.load_state_dict(module.state_dict())
    x, h = torch.randn(T, B, IN), [torch.randn(4, B, H) for _ in range(2 if kind == "lstm" else 1)]

    def both(module, x, h):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *h)]
        out = flat(module(leaves[0], tuple(leaves[1:]) if kind == "lstm" else leaves[1]))
        grads = torch.autograd.grad([o.sin().sum() for o in out], [*leaves, *module.parameters()])
        return [o.detach() for o in out] + list(grads)

    with seqfuse.backend("cpu"):
        got = both(module, x, h)
    assert calls == {"fwd": 2, "bwd": 2}
    with seqfuse.backend("reference"):
        truth = both(wide, x.double(), [t.double() for t in h])
    for g, t in zip(got, truth, strict=True):
        assert_accurate(g, t, what=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(calls, kind):
    module = KINDS[kind](IN, H, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(T, B, IN), torch.tensor([7, 1, 4, 6, 2]), enforce_sorted=False)
    with seqfuse.backend("cpu"), torch.no_grad():
        got = module(packed)[0].data
    with seqfuse.backend("reference"), torch.no_grad():
        assert_accurate(got, module.double()(packed.to(torch.float64))[0].data)
    assert calls["fwd"] == 1


def test_double_backward_goes_through_the_reference(calls):
    module = nn.LSTM(2, 3, bidirectional=True).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def second(backend):
        with seqfuse.backend(backend):
            (g,) = torch.autograd.grad(module(x)[0].sin().sum(), x, create_graph=True)
            return torch.autograd.grad(g.square().sum(), [x, *module.parameters()])

    with pytest.raises(RuntimeError, match="float32 and bfloat16"):
        second("cpu")
    module, x = module.float(), x.detach().float().requires_grad_()
    for got, expected in zip(second("cpu"), second("reference"), strict=True):
        assert_accurate(got, expected.double())
    assert calls["fwd"] == 1


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_torch_compile_sees_one_op(monkeypatch, kind):
    monkeypatch.setitem(rnn_scan.SCAN_BOTH, "cpu", rnn_scan.SCAN_BOTH["cuda"])  # torch goes by the tensors' device
    module = KINDS[kind](IN, H, bidirectional=True)
    x = torch.randn(T, B, IN)
    with seqfuse.backend("cpu"):
        eager = run(module, x)
        compiled = run(torch.compile(module, fullgraph=True, backend="aot_eager"), x)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("cell", rnn_scan.CELLS)
def test_the_registered_ops(cell):
    """torch's own check of schema, fake and the sharing of memory."""
    G = {"lstm": 4, "gru": 3}.get(cell, 1)
    h0 = torch.randn(2, B, H)
    c0 = torch.randn(2, B, H) if cell == "lstm" else None
    w_hh, b_hh = torch.randn(2 * G * H, H), torch.randn(2 * G * H)
    options = (None, None, None, None, torch.rand(2, T, B, H) < 0.3, None, 0.0, 0.0)
    xg = torch.randn(T, B, 2 * G * H)
    ops, tests = torch.ops.seqfuse, ("test_schema", "test_faketensor")
    args = (rnn_scan.CELLS[cell], xg, h0, c0, w_hh, b_hh, *options, True, True)
    torch.library.opcheck(ops.rnn_scan_both_fwd.default, args, test_utils=tests)
    y, h_n, c_n, gates, cells = ops.rnn_scan_both_fwd(*args)
    args = (rnn_scan.CELLS[cell], torch.randn_like(y), None, None, None, y, gates, cells, h0, c0, w_hh, *options)
    torch.library.opcheck(ops.rnn_scan_both_bwd.default, args, test_utils=tests)


def test_bad_arguments_are_refused():
    op = torch.ops.seqfuse.rnn_scan_both_fwd
    xg, h0, w, options = torch.randn(3, 2, 8), torch.randn(2, 2, 4), torch.randn(8, 4), (None,) * 6
    assert op(0, xg, h0, None, w, None, *options, 0.0, 0.0, False, False)[0].shape == (3, 2, 8)
    for args, words in (
        ((xg, h0[0], None, w, None, *options), "h0 must be 3-D"),
        ((xg[..., :4], h0, None, w, None, *options), "xg must have 8 elements in dimension 2, got 4"),
        ((xg, h0, None, w[:4], None, *options), "w_hh must have 8 elements in dimension 0, got 4"),
        ((xg, h0, None, w, None, None, None, torch.ones(2, 4), None, None, None), "neither hidden_mask nor peephole"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(0, *args, 0.0, 0.0, False, False)
