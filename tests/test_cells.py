"""LSTMCell, GRUCell and RNNCell against torch.nn's in float64."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import seqfuse
from seqfuse.testing import assert_accurate

CELLS = {
    "lstm": lambda *a, **k: nn.LSTMCell(*a, **k),
    "gru": lambda *a, **k: nn.GRUCell(*a, **k),
    "rnn_tanh": lambda *a, **k: nn.RNNCell(*a, **k),
    "rnn_relu": lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(cell, module, dtype, x, h, c, steps=3):
    """Outputs of a loop over `steps` inputs and all gradients, computed in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, h, c)]
    weights = {n: p.detach().to(dtype).requires_grad_() for n, p in module.named_parameters()}
    state = (leaves[1], leaves[2]) if cell == "lstm" else leaves[1]
    outputs = []
    for t in range(steps):
        state = torch.func.functional_call(module, weights, (leaves[0][t], state))
        outputs.append(state[0] if cell == "lstm" else state)
    y = torch.stack(outputs)
    g = torch.Generator().manual_seed(2)
    dy = torch.randn(y.shape, generator=g, dtype=torch.float64).bfloat16().to(dtype)
    loss = (y * dy).sum() + (state[1].sum() if cell == "lstm" else 0)
    used = [*leaves[: 3 if cell == "lstm" else 2], *weights.values()]
    return [y.detach(), *torch.autograd.grad(loss, used)]


def check(cell, B, width, H, dtype, bias=True):
    module = CELLS[cell](width, H, bias=bias).double()
    module.load_state_dict({n: p.bfloat16().double() for n, p in module.state_dict().items()})
    x, h, c = (torch.randn(s, dtype=torch.float64).bfloat16().double() for s in ((3, B, width), (B, H), (B, H)))
    exact, theirs = run(cell, module, torch.float64, x, h, c), run(cell, module, DTYPES[dtype], x, h, c)
    with seqfuse.backend("cpu"):
        got = run(cell, seqfuse.fuse(module), DTYPES[dtype], x, h, c)
    for a, b, d in zip(got, exact, theirs, strict=True):
        assert_accurate(a, b, d, dims=(0,) if a.dim() == 3 else ())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 7), (3, 4, 16), (9, 8, 33), (40, 16, 100), (48, 35, 67)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_cpu_kernel_keeps_the_error_rule(isa, cell, size, dtype):
    check(cell, *size, dtype)


@settings(max_examples=20)
@given(
    cell=st.sampled_from(["lstm", "gru", "rnn_tanh"]),
    B=st.integers(1, 50),
    width=st.integers(1, 30),
    H=st.integers(1, 150),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_configurations(cell, B, width, H, bias, seed):
    torch.manual_seed(seed)
    check(cell, B, width, H, "fp32", bias)


@pytest.mark.parametrize("cell", CELLS)
def test_fuse_keeps_torchs_surface(cell):
    module = CELLS[cell](4, 6)
    x = torch.randn(3, 4)
    plain, one = module(x), module(x[0])
    fused = seqfuse.fuse(copy.deepcopy(module))
    assert isinstance(fused, type(module)) and list(fused.state_dict()) == list(module.state_dict())
    for got, expected in ((fused(x), plain), (fused(x[0]), one)):
        for a, b in zip(got, expected, strict=True) if cell == "lstm" else [(got, expected)]:
            assert a.shape == b.shape
            assert_accurate(a, b.double())
    assert "rnn_cell" in str(seqfuse.explain(fused))
    assert type(seqfuse.unfuse(fused)) is type(module)
    empty = module(torch.randn(0, 4)), seqfuse.fuse(module)(torch.randn(0, 4))
    assert [t[0].shape if cell == "lstm" else t.shape for t in empty] == [(0, 6), (0, 6)]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_compiles_without_a_graph_break(cell):
    fused = seqfuse.fuse(CELLS[cell](4, 6))

    def loop(x):
        state = None
        for t in range(3):
            state = fused(x[t], state)
        return state[0] if cell == "lstm" else state

    x = torch.randn(3, 2, 4, requires_grad=True)
    expected = torch.autograd.grad(loop(x).square().sum(), x)[0]
    got = torch.autograd.grad(torch.compile(loop, fullgraph=True)(x).square().sum(), x)[0]
    assert_accurate(got, expected.double(), expected)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_double_backward(cell):
    module = CELLS[cell](3, 5).double()
    x = torch.randn(2, 3)

    def second(m, dtype):
        m, leaf = m.to(dtype), x.to(dtype).requires_grad_()
        out = m(leaf)
        out = out[0] if cell == "lstm" else out
        (g,) = torch.autograd.grad(out.pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [leaf, *m.parameters()])

    exact, theirs = second(module, torch.float64), second(module, torch.float32)
    with seqfuse.backend("cpu"):
        got = second(seqfuse.fuse(module), torch.float32)
    for a, b, c in zip(got, exact, theirs, strict=True):
        assert_accurate(a, b, c)


@pytest.mark.parametrize("cell", CELLS)
def test_ensemble_by_vmap(cell):
    modules = [seqfuse.fuse(CELLS[cell](3, 5)) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(4, 3)

    def loss(p, b, module=modules[0]):
        h = torch.func.functional_call(module, (p, b), (x,))
        return (h[0] if cell == "lstm" else h).square().sum()

    with seqfuse.backend("cpu"):
        together = torch.vmap(loss)(parameters, buffers)
        inside = torch.vmap(torch.func.grad(loss))(parameters, buffers)
        together.sum().backward()
        for i, module in enumerate(modules):
            alone = loss(dict(module.named_parameters()), {}, module)
            alone.backward()
            assert_accurate(together[i], alone.double(), alone)
            for name, p in module.named_parameters():
                for g in (inside[name][i], parameters[name].grad[i]):
                    assert_accurate(g, p.grad.double(), p.grad, what=name)


@pytest.mark.parametrize("cell", CELLS)
def test_copies_pickles_and_state_dict_both_ways(cell):
    module, x = CELLS[cell](3, 5), torch.randn(4, 3)
    fused = seqfuse.fuse(CELLS[cell](3, 5))
    fused.load_state_dict(module.state_dict())
    module.load_state_dict(fused.state_dict())
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for a, b in zip(twin(x), fused(x), strict=True):
            assert torch.equal(a, b)
    exported = torch.export.export(fused, (x,)).module()
    for a, b in zip(exported(x), fused(x), strict=True):
        assert_accurate(a, b.detach().double(), b.detach())


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_remembers_the_route_of_its_last_call(cell):
    """... in a loop, and leaves it as soon as anything about the call or the settings is different."""
    module = CELLS[cell](3, 5)
    fused = seqfuse.fuse(copy.deepcopy(module))

    def loop(m, dtype=torch.float32, steps=4, B=2):
        g = torch.Generator().manual_seed(7)
        state, outputs = None, []
        for _ in range(steps):
            state = m(torch.randn(B, 3, generator=g).to(dtype), state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)

    exact = loop(copy.deepcopy(module).double(), torch.float64)
    for _ in range(2):
        assert_accurate(loop(fused), exact, loop(module))
    assert fused._route is not None and fused._route.grad
    with torch.no_grad():
        assert not loop(fused).requires_grad
    with seqfuse.backend("reference"):
        loop(fused)
        assert seqfuse.explain(fused)[0].backend == "reference"
    assert loop(fused, B=7).shape == (4, 7, 5)
    with pytest.raises((ValueError, RuntimeError)):
        fused(torch.randn(7, 4), None if cell == "lstm" else torch.randn(7, 5))
    theirs = loop(copy.deepcopy(module).bfloat16(), torch.bfloat16)
    assert_accurate(loop(fused.bfloat16(), torch.bfloat16), exact, theirs)
    assert "_route" not in copy.deepcopy(fused).__dict__


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell):
    number, G = {"rnn_tanh": (0, 1), "rnn_relu": (1, 1), "gru": (2, 3), "lstm": (3, 4)}[cell]
    B, H = 3, 10
    xg, a, h, c = torch.randn(B, G * H), torch.randn(B, G * H), torch.randn(B, H), torch.randn(B, H)
    h, c = h if cell == "gru" else None, c if cell == "lstm" else None
    torch.library.opcheck(torch.ops.seqfuse.rnn_cell_fwd.default, (number, xg, a, h, c, True))
    h_out, c_out, gates = torch.ops.seqfuse.rnn_cell_fwd(number, xg, a, h, c, True)
    args = (number, torch.randn(B, H), None, gates, h, c, h_out, c_out if cell == "lstm" else None, None)
    torch.library.opcheck(torch.ops.seqfuse.rnn_cell_bwd.default, args)


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda m: m(torch.randn(2, 5)), "input has inconsistent input_size: got 5 expected 4"),
        (lambda m: m(torch.randn(2, 2, 4)), "Expected input to be 1D or 2D, got 3D"),
        (lambda m: m(torch.randn(2, 4), torch.randn(3, 6)), "h must have shape [2, 6]"),
        (lambda m: m(torch.randn(2, 4).double()), "but x is float64"),
    ],
)
def test_bad_input_gets_one_sentence(call, text):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call(seqfuse.nn.GRUCell(4, 6))
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("grad", [True, False])
def test_a_call_that_is_known_is_looked_at_again_where_a_device_changes(grad):
    x, h, c = torch.randn(4, 8), torch.randn(4, 16), torch.randn(4, 16)
    with torch.set_grad_enabled(grad):
        cell = seqfuse.nn.LSTMCell(8, 16)
        for _ in range(3):
            cell(x, (h, c))
        with pytest.raises(ValueError, match="c is on meta, but x is on cpu"):
            cell(x, (h, c.to("meta")))
        for make, state in ((seqfuse.nn.LSTMCell, (h, c)), (seqfuse.nn.GRUCell, h)):
            cell = make(8, 16)
            for _ in range(3):
                cell(x, state)
            cell.bias_hh = torch.nn.Parameter(cell.bias_hh.detach().to("meta"))
            with pytest.raises(ValueError, match="b_hh is on meta, but x is on cpu"):
                cell(x, state)


@pytest.mark.parametrize(
    "hx,text",
    [
        (torch.zeros(5, 20), "hx must be a pair of tensors (h, c), got Tensor"),
        ((torch.zeros(5, 20),), "hx must be a pair of tensors (h, c), got 1 of them"),
        (3, "hx must be a pair of tensors (h, c), got int"),
        ((None, None), "hx[0] must be a tensor, got NoneType"),
    ],
)
def test_a_state_of_the_wrong_kind_gets_one_sentence(hx, text):
    with pytest.raises(TypeError) as caught:
        seqfuse.nn.LSTMCell(6, 20)(torch.randn(5, 6), hx)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"GRUCell: hx\[0\] must be a tensor, got int"):
        seqfuse.nn.GRUCell(6, 20)(torch.randn(5, 6), 3)
