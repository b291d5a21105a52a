"""lstm, gru and rnn against torch.nn in float64: every cell at every instruction set, and the ops' whole surface."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqfuse
from seqfuse import reference
from seqfuse.testing import assert_accurate

CELLS = ["rnn_tanh", "rnn_relu", "gru", "lstm"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# T, B, input, H: odd sizes, size one, more than one vector, more rows than any register tile
SIZES = [(1, 1, 1, 1), (3, 2, 5, 7), (5, 3, 4, 16), (4, 9, 8, 17), (6, 1, 33, 64), (2, 33, 10, 48), (7, 5, 12, 100)]


def torch_module(cell, width, H, **options):
    """The torch.nn module that computes the same."""
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(cell, torch.nn.RNN)
    if kind is torch.nn.RNN:
        options["nonlinearity"] = cell.removeprefix("rnn_")
    return kind(width, H, **options)


def inputs(cell, module, T, B, states=True):
    """(x, h0, c0) in float64, rounded to bf16 so that every dtype starts from the same numbers."""
    batch_first, D = module.batch_first, 2 if module.bidirectional else 1
    x = torch.randn((B, T) if batch_first else (T, B) + (), dtype=torch.float64).unsqueeze(-1)
    x = torch.randn(*x.shape[:2], module.input_size, dtype=torch.float64)
    state = [torch.randn(module.num_layers * D, B, module.hidden_size, dtype=torch.float64) for _ in range(2)]
    rounded = [t.bfloat16().double() for t in (x, *state)]
    if not states:
        return rounded[0], None, None
    return rounded[0], rounded[1], rounded[2] if cell == "lstm" else None


def gradients(outputs, seed=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=g, dtype=torch.float64).bfloat16().to(o.dtype) for o in outputs]


def run(cell, module, dtype, x, h0, c0):
    """Outputs and all gradients of module(x, state), computed in `dtype`: dict by name."""
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in (("x", x), ("h0", h0), ("c0", c0)) if t is not None}
    weights = {n: p.detach().to(dtype).requires_grad_() for n, p in module.named_parameters()}
    state = None if h0 is None else ((leaves["h0"], leaves["c0"]) if cell == "lstm" else leaves["h0"])
    y, last = torch.func.functional_call(module, weights, (leaves["x"], state))
    out = {"y": y, "h_n": last[0], "c_n": last[1]} if cell == "lstm" else {"y": y, "h_n": last}
    torch.autograd.backward(list(out.values()), gradients(out.values()))
    found = {f"d{n}": t.grad for n, t in {**leaves, **weights}.items()}
    return {**{n: t.detach() for n, t in out.items()}, **found}


def check(cell, module, dtype, x, h0, c0, backend="cpu", names=None):
    """seqfuse on `backend` keeps the error rule: truth is torch.nn in float64, the measure torch.nn at the same dtype.

    names: which results to look at (None: all outputs and all gradients).
    """
    double = torch_module(cell, module.input_size, module.hidden_size, **options_of(module)).double()
    double.load_state_dict({n: p.detach().bfloat16().double() for n, p in module.state_dict().items()})
    exact = run(cell, double, torch.float64, x, h0, c0)
    theirs = run(cell, double, dtype, x, h0, c0)
    with seqfuse.backend(backend):
        got = run(cell, seqfuse.fuse(double), dtype, x, h0, c0)
    time = 1 if module.batch_first else 0
    for name in names or exact:
        dims = (time, 1 - time) if name in ("y", "dx") else ()
        assert_accurate(got[name], exact[name], theirs[name], dims=dims, what=name)


def options_of(module):
    names = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
    return {n: getattr(module, n) for n in names}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
@pytest.mark.parametrize("cell", CELLS)
def test_cpu_kernel_keeps_the_error_rule(isa, cell, size, dtype):
    T, B, width, H = size
    module = torch_module(cell, width, H)
    check(cell, module, DTYPES[dtype], *inputs(cell, module, T, B))


@pytest.mark.parametrize("batch_first", [False, True], ids=["TBI", "BTI"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_layers_directions_and_layouts(cell, layers, bidirectional, batch_first):
    module = torch_module(cell, 6, 10, num_layers=layers, bidirectional=bidirectional, batch_first=batch_first)
    check(cell, module, torch.float32, *inputs(cell, module, 5, 4))


@pytest.mark.parametrize("cell", CELLS)
def test_no_bias_and_zero_states(isa, cell):
    module = torch_module(cell, 6, 20, bias=False)
    check(cell, module, torch.float32, *inputs(cell, module, 5, 4, states=False))


@settings(max_examples=30)
@given(
    cell=st.sampled_from(CELLS),
    T=st.integers(1, 9),
    B=st.integers(1, 40),
    width=st.integers(1, 20),
    H=st.integers(8, 70),  # the error of two numbers is luck: PyTorch's was a tenth of its usual one
    layers=st.integers(1, 2),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from(sorted(DTYPES)),
    threads=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_random_configurations(cell, T, B, width, H, layers, flags, dtype, threads, seed):
    torch.manual_seed(seed)
    bias, batch_first, bidirectional, states = flags
    module = torch_module(
        cell, width, H, num_layers=layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional
    )
    # relu's derivative jumps at zero: where a pre-activation lies within bf16's rounding of it, either value is right
    # and the gradients of two correct kernels may differ by any amount. The grid above has no such point; random
    # inputs do.
    names = ("y", "h_n") if (cell, dtype) == ("rnn_relu", "bf16") else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(cell, module, DTYPES[dtype], *inputs(cell, module, T, B, states), names=names)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [3, 5, 8])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_many_rows_of_weights_that_no_cache_holds(isa, cell, rows):
    """With AVX-512 alone, bf16 weights are pairs that a tile widens: to 4 rows, or 8 where they exceed the L2."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        module = torch_module(cell, 16, 516)
        check(cell, module, torch.bfloat16, *inputs(cell, module, 3, rows))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", [(64, 32, 64, 128), (40, 1, 32, 256)], ids=["T64-B32-H128", "T40-B1-H256"])
def test_long_sequences(cell, size):
    T, B, width, H = size
    module = torch_module(cell, width, H)
    check(cell, module, torch.float32, *inputs(cell, module, T, B))


@pytest.mark.parametrize("cell", CELLS)
def test_inference_equals_training(cell):
    module = seqfuse.fuse(torch_module(cell, 8, 24))
    x = torch.randn(6, 5, 8)
    with seqfuse.backend("cpu"):
        trained, _ = module(x)
        with torch.no_grad():
            inferred, _ = module(x)
    assert torch.equal(trained, inferred)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_repeats_are_bit_identical(cell, threads):
    module = seqfuse.fuse(torch_module(cell, 32, 96, num_layers=2))
    x, h0, c0 = inputs(cell, module, 20, 6)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with seqfuse.backend("cpu"):
            runs = [run(cell, module, torch.float32, x, h0, c0) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for name, first in runs[0].items():
        assert torch.equal(first, runs[1][name]) and torch.equal(first, runs[2][name]), name


def test_inside_another_parallel_region():
    """Where torch already runs in parallel (here: two Python threads at once), the scan neither hangs nor differs."""
    import threading

    module = seqfuse.fuse(torch.nn.LSTM(16, 64))
    x = torch.randn(50, 4, 16)
    with torch.no_grad(), seqfuse.backend("cpu"):
        expected = module(x)[0]
        results = [None] * 4

        def work(i):
            with torch.no_grad():
                results[i] = module(x)[0]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(timeout=60)
    assert all(r is not None and torch.equal(r, expected) for r in results)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row(cell):
    module = seqfuse.fuse(torch_module(cell, 4, 20))
    x = torch.randn(5, 3, 4)
    x[2, 1, 0] = float("nan")
    with torch.no_grad(), seqfuse.backend("cpu"):
        y, _ = module(x)
    nan = y.isnan().any(-1)
    assert not nan[:, 0].any() and not nan[:, 2].any() and not nan[:2, 1].any()
    assert nan[2:, 1].all()


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_tanh"])
def test_saturated_gates(cell):
    """Gates far outside exp's range give 0 and 1, not NaN."""
    module = seqfuse.fuse(torch_module(cell, 4, 20))
    x = torch.randn(5, 3, 4) * 1e6
    with torch.no_grad(), seqfuse.backend("cpu"):
        y, _ = module(x)
    assert y.isfinite().all()
    exact = run_forward(cell, module, x)
    assert_accurate(y, exact, exact.float())


def run_forward(cell, module, x):
    double = torch_module(cell, module.input_size, module.hidden_size).double()
    double.load_state_dict({n: p.double() for n, p in module.state_dict().items()})
    with torch.no_grad():
        return double(x.double())[0]


@pytest.mark.parametrize("cell", CELLS)
def test_reference_is_differentiable_twice(cell):
    G, T, B, H = reference.GATES[cell], 2, 2, 3
    shapes = [(T, B, G * H), (B, H), (B, H), (G * H, H), (G * H,)]
    xg, h0, c0, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)

    def call(xg, h0, c0, w, b):
        out = reference.rnn_scan(cell, xg, h0, c0 if cell == "lstm" else None, w, b, False)
        return [o for o in out if o is not None]

    assert torch.autograd.gradcheck(call, (xg, h0, c0, w, b)) and torch.autograd.gradgradcheck(call, (xg, h0, c0, w, b))


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward_through_the_kernel(cell):
    """create_graph=True goes through the differentiable path: the second derivative equals torch.nn's in float64."""
    torch.manual_seed(5)
    module = torch_module(cell, 5, 8).double()
    x, h0, c0 = inputs(cell, module, 4, 3)

    def second(m, dtype):
        m = m.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        state = (h0.to(dtype), c0.to(dtype)) if cell == "lstm" else h0.to(dtype)
        y, _ = m(leaf, state)
        used = [leaf, *m.parameters()]
        first = torch.autograd.grad((y * gradients([y])[0]).sum(), used, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), used, materialize_grads=True)

    exact, theirs = second(module, torch.float64), second(module, torch.float32)
    with seqfuse.backend("cpu"):
        got = second(seqfuse.fuse(module), torch.float32)
    for a, b, c in zip(got, exact, theirs, strict=True):
        assert_accurate(a, b, c, what="second derivative")


@pytest.mark.parametrize("batch_major", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, batch_major):
    number, G, T, B, H = CELLS.index(cell), reference.GATES[cell], 3, 2, 20
    xg = torch.randn(B, T, G * H).transpose(0, 1) if batch_major else torch.randn(T, B, G * H)
    h0, c0 = torch.randn(B, H), torch.randn(B, H) if cell == "lstm" else None
    w, b, plain = torch.randn(G * H, H), torch.randn(G * H), reference.PLAIN[:8]
    torch.library.opcheck(
        torch.ops.seqfuse.rnn_scan_fwd.default, (number, xg, h0, c0, w, b, *plain, False, True, False)
    )
    torch.library.opcheck(
        torch.ops.seqfuse.rnn_scan_fwd.default, (number, xg, h0, c0, w, None, *plain, True, False, False)
    )
    y, h_n, c_n, gates, cells = torch.ops.seqfuse.rnn_scan_fwd(number, xg, h0, c0, w, b, *plain, False, True, False)
    dc_n = torch.randn(B, H) if cell == "lstm" else None
    args = (number, torch.randn(T, B, H), torch.randn(B, H), dc_n, None, y, gates, cells, h0, c0, w, *plain, False)
    torch.library.opcheck(torch.ops.seqfuse.rnn_scan_bwd.default, args)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_compile_fullgraph_forward_and_backward_without_recompilation(cell):
    module = seqfuse.fuse(torch_module(cell, 6, 16, num_layers=2, bidirectional=True, batch_first=True))
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for B in (4, 9, 3):
        x = torch.randn(B, 7, 6, requires_grad=True)
        dy = torch.randn(B, 7, 32)
        compiled(x)[0].backward(dy)
        got = [x.grad, *(p.grad.clone() for p in module.parameters())]
        module.zero_grad()
        again = x.detach().requires_grad_()
        with seqfuse.backend("cpu"):
            module(again)[0].backward(dy)
        for a, b in zip(got, [again.grad, *(p.grad for p in module.parameters())], strict=True):
            assert_accurate(a, b.double(), b)
        module.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_autocast_computes_in_bf16(cell):
    module = seqfuse.fuse(torch_module(cell, 8, 16))
    x = torch.randn(5, 3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), seqfuse.backend("cpu"):
        y, _ = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in module.parameters())
    exact = run_forward(cell, module, x.detach())
    theirs = torch_module(cell, 8, 16)
    theirs.load_state_dict(module.state_dict())
    assert_accurate(y, exact, theirs.bfloat16()(x.detach().bfloat16())[0])


def test_empty_batch_and_empty_sequence_are_as_in_torch():
    for kind in (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN):
        module = kind(4, 6)
        expected, _ = module(torch.randn(3, 0, 4))
        fused = seqfuse.fuse(module)
        got, _ = fused(torch.randn(3, 0, 4))
        assert got.shape == expected.shape == (3, 0, 6)
        with pytest.raises(RuntimeError, match="sequence"):
            fused(torch.randn(0, 3, 4))


def weights(G=4, H=6, width=4):
    shapes = [(G * H, width), (G * H, H), (G * H,), (G * H,)]
    return [tuple(torch.randn(s) for s in shapes)]


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: seqfuse.ops.lstm(torch.randn(3, 4), None, weights()), ValueError, "x must be 3-D"),
        (lambda: seqfuse.ops.lstm("x", None, weights()), TypeError, "x must be a tensor"),
        (lambda: seqfuse.ops.lstm(torch.randn(3, 2, 5), None, weights()), ValueError, "w_ih must have shape [24, 5]"),
        (lambda: seqfuse.ops.lstm(torch.randn(3, 2, 4), None, []), ValueError, "one tuple for each layer"),
        (lambda: seqfuse.ops.gru(torch.randn(3, 2, 4), None, weights()), ValueError, "must have shape [18, 4]"),
        (lambda: seqfuse.ops.lstm(torch.randn(3, 2, 4).double(), None, weights()), ValueError, "is float32, but x is"),
        (
            lambda: seqfuse.ops.lstm(torch.randn(3, 2, 4), (torch.randn(1, 3, 6), torch.randn(1, 2, 6)), weights()),
            ValueError,
            "h0 must have shape [1, 2, 6]",
        ),
        (lambda: seqfuse.ops.lstm(torch.randn(3, 2, 4), None, [weights()[0][:1]]), ValueError, "got 1 tensors"),
        (lambda: seqfuse.ops.lstm(torch.randn(3, 2, 4), None, [weights()[0][:3]]), ValueError, "w_hr must be 2-D"),
        (lambda: seqfuse.ops.gru(torch.randn(3, 2, 4), None, [weights(3)[0][:3]]), ValueError, "got 3 tensors"),
        (lambda: seqfuse.ops.lstm(torch.randn(3, 2, 4), None, weights(), dropout=2), ValueError, "dropout must be in"),
        (
            lambda: seqfuse.ops.rnn(torch.randn(3, 2, 4), None, weights(1), nonlinearity="gelu"),
            ValueError,
            "'tanh' or 'relu'",
        ),
        (
            lambda: seqfuse.ops.lstm(torch.randn(3, 2, 4, device="meta"), None, weights()),
            ValueError,
            "is on cpu, but x is on meta",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value) and "\n" not in str(caught.value)
