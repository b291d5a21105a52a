"""layer_norm against the float64 reference: the CPU kernel at every instruction set, and the op's whole surface."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import seqfuse
from seqfuse import native, reference
from seqfuse.ops.layer_norm import LayerNormFunction, NormOptions
from seqfuse.testing import assert_accurate

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 7), (3, 16), (5, 33), (2, 1024), (7, 100), (64, 768), (9, 513), (130, 257)]


def sample(rows, cols, dtype, *, residual=False, weight=True, bias=True, param_dtype=None):
    """Leaf tensors (x, residual, weight, bias) and incoming gradients (dy, ds)."""
    param_dtype = param_dtype or dtype

    def make(*shape, dtype=dtype):
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

    x = (torch.randn(rows, cols, dtype=torch.float64) * 2 + 0.5).to(dtype).requires_grad_()
    tensors = [x, make(rows, cols) if residual else None]
    tensors += [make(cols, dtype=param_dtype) if wanted else None for wanted in (weight, bias)]
    return tensors, [torch.randn(rows, cols).to(dtype) for _ in range(2)]


def run(call, tensors, grads, dtype=None):
    """Outputs and gradients of call(x, residual, weight, bias) -> (y, s or None), computed in `dtype`."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    y, s = call(*leaves)
    outputs = [y] if s is None else [y, s]
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=False)])
    return [*outputs, *(t.grad for t in leaves if t is not None)]


def ours(x, residual, weight, bias, eps=1e-5):
    out = seqfuse.ops.layer_norm(x, weight, bias, eps=eps, residual=residual)
    return out if residual is not None else (out, None)


def truth(x, residual, weight, bias, eps=1e-5):
    return reference.layer_norm(x, residual, weight, bias, eps)


def pytorch(x, residual, weight, bias, eps=1e-5):
    s = x if residual is None else x + residual
    if weight is not None and weight.dtype != s.dtype:
        weight, bias = weight.to(s.dtype), None if bias is None else bias.to(s.dtype)
    return F.layer_norm(s, s.shape[-1:], weight, bias, eps), None if residual is None else s


def check(tensors, grads, backend, names=("y", "s", "dx", "dresidual", "dweight", "dbias")):
    if tensors[1] is None:
        names = [n for n in names if n not in ("s", "dresidual")]
    names = [
        n for n in names if (n != "dweight" or tensors[2] is not None) and (n != "dbias" or tensors[3] is not None)
    ]
    with seqfuse.backend(backend):
        got = run(ours, tensors, grads)
    exact = run(truth, tensors, grads, torch.float64)
    theirs = run(pytorch, tensors, grads)
    for name, a, b, c in zip(names, got, exact, theirs, strict=True):
        assert_accurate(a, b, c, dims=(0,) if a.dim() == 2 else (), what=name)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_cpu_kernel_keeps_the_error_rule(isa, shape, dtype, residual):
    check(*sample(*shape, dtype, residual=residual), "cpu")


@pytest.mark.parametrize("weight,bias", [(True, False), (False, True), (False, False)])
def test_optional_parameters(isa, weight, bias):
    check(*sample(6, 40, torch.float32, weight=weight, bias=bias), "cpu")


def test_float32_parameters_with_bf16_input(isa):
    check(*sample(8, 96, torch.bfloat16, param_dtype=torch.float32), "cpu")


# from three columns on: with two a normalised row is (-1, 1) whatever it was, so the true gradient is next to zero and
# what any kernel in float32 computes for it is the rounding error of what cancels
@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(3, 300),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
    weight=st.booleans(),
    bias=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_random_configurations(rows, cols, dtype, residual, weight, bias, threads, seed):
    torch.manual_seed(seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*sample(rows, cols, dtype, residual=residual, weight=weight, bias=bias), "cpu")
    finally:
        torch.set_num_threads(before)


def test_non_contiguous_input_and_more_dimensions():
    x = torch.randn(5, 3, 4, 66)[..., ::2].transpose(0, 1)
    w, b = torch.randn(33), torch.randn(33)
    with seqfuse.backend("cpu"):
        y = seqfuse.ops.layer_norm(x, w, b)
    assert y.shape == x.shape
    assert_accurate(y, truth(x.double(), None, w.double(), b.double())[0], F.layer_norm(x, (33,), w, b))


@pytest.mark.parametrize("odd", [None, 0, 100], ids=["even", "odd-first", "odd-later"])
def test_large_offset_does_not_cancel(isa, odd):
    """Also where the first or later elements lie far from the others."""
    x = torch.randn(4, 257) + 1000.0
    if odd is not None:
        x[:, odd : odd + 40] -= 1e5
    with seqfuse.backend("cpu"):
        y = seqfuse.ops.layer_norm(x)
    assert_accurate(y, truth(x.double(), None, None, None)[0], F.layer_norm(x, (257,)), dims=(0,))


@pytest.mark.parametrize("mean,cols", [(1e20, 100), (1e18, 1024)], ids=["each", "sum"])
def test_squares_beyond_float32(isa, mean, cols):
    """Elements whose squares overflow, or only the sum of these, but not their variance."""
    x = torch.randn(3, cols) * 1e15 + mean
    with seqfuse.backend("cpu"):
        y = seqfuse.ops.layer_norm(x)
    assert_accurate(y, truth(x.double(), None, None, None)[0], F.layer_norm(x, (cols,)), dims=(0,))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("cols,dtype", [(1024, torch.float32), (1001, torch.float32), (1024, torch.bfloat16)])
def test_large_results_go_past_the_caches(isa, cols, dtype, residual):
    """What exceeds the caches takes stores of its own: rows that fill whole vectors, and rows that do not. The bits are
    those of ordinary stores, which are held against the truth elsewhere."""
    tensors, grads = sample(150, cols, dtype, residual=residual)
    with seqfuse.backend("cpu"):
        with native.cached_bytes(0):
            past = run(ours, tensors, grads)
        with native.cached_bytes(1 << 40):
            kept = run(ours, tensors, grads)
    assert all(torch.equal(a, b) for a, b in zip(past, kept, strict=True))


def test_a_module_remembers_the_route_of_its_last_call():
    """... and leaves it as soon as anything about the call or the settings is different."""
    ours_, theirs = seqfuse.nn.LayerNorm(256), torch.nn.LayerNorm(256)
    x = torch.randn(2048, 256)
    for _ in range(2):
        assert_accurate(ours_(x), theirs.double()(x.double()), theirs.float()(x))
    assert ours_._route.backend == "cpu" and ours_._route.grad
    with torch.no_grad():
        assert not ours_(x).requires_grad
    with seqfuse.backend("reference"):
        ours_(x)
        assert seqfuse.explain(ours_)[0].backend == "reference"
    assert ours_(x[:3]).shape == (3, 256) and ours_._route.backend == "torch"
    y, s = ours_(x, x)
    assert torch.equal(s, x + x)
    with pytest.raises(RuntimeError, match="expected input with shape"):
        ours_(torch.randn(2048, 255))
    ours_.bfloat16()
    assert ours_(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises((RuntimeError, ValueError)):
        ours_(x.bfloat16(), x[:5].bfloat16())
    assert "_route" not in copy.deepcopy(ours_).__dict__


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
@pytest.mark.parametrize("backend", ["cpu", "reference", "torch"])
def test_empty_input(shape, backend):
    x = torch.randn(shape, requires_grad=True)
    w, b = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    with seqfuse.backend(backend):
        y = seqfuse.ops.layer_norm(x, w, b)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros(8)) and torch.equal(b.grad, torch.zeros(8))


def test_nan_and_inf_propagate_as_in_torch():
    x = torch.randn(4, 20)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    with seqfuse.backend("cpu"):
        y = seqfuse.ops.layer_norm(x)
    assert torch.equal(y.isnan(), F.layer_norm(x, (20,)).isnan())


def test_repeats_are_bit_identical():
    tensors, grads = sample(333, 200, torch.float32, residual=True)
    with seqfuse.backend("cpu"):
        first, second = run(ours, tensors, grads), run(ours, tensors, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_what_needs_a_gradient_gets_one():
    x, w = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    with seqfuse.backend("cpu"):
        seqfuse.ops.layer_norm(x, w, torch.zeros(8)).sum().backward()
    assert x.grad is None and w.grad is not None


def test_the_residual_may_be_x_itself():
    x = torch.randn(4, 8, requires_grad=True)

    def call(x):
        with seqfuse.backend("cpu"):
            return seqfuse.ops.layer_norm(x, residual=x)[0]

    dy = torch.randn(4, 8)
    wide = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(F.layer_norm(wide + wide, (8,)), wide, dy.double())[0]
    theirs = torch.autograd.grad(F.layer_norm(x + x, (8,)), x, dy)[0]
    for run in (call, torch.compile(lambda x: seqfuse.ops.layer_norm(x, residual=x)[0], fullgraph=True)):
        assert_accurate(torch.autograd.grad(run(x), x, dy)[0], exact, theirs)


def test_only_the_sum_is_used():
    x, r = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with seqfuse.backend("cpu"):
        _, s = seqfuse.ops.layer_norm(x, residual=r)
    s.sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 8)) and torch.equal(r.grad, torch.ones(4, 8))


@pytest.mark.parametrize("residual", [False, True])
def test_reference_is_differentiable_twice(residual):
    tensors, _ = sample(3, 5, torch.float64, residual=residual)
    leaves = [t for t in tensors if t is not None]

    def call(*args):
        it = iter(args)
        return [o for o in truth(*(None if t is None else next(it) for t in tensors)) if o is not None]

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("residual", [False, True])
def test_double_backward_through_the_kernel(residual):
    """create_graph=True goes through the differentiable path: the second derivative equals the reference's."""

    def second(call, dtype):
        torch.manual_seed(1)
        tensors, grads = sample(4, 12, torch.float32, residual=residual)
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
        y, s = call(*leaves)
        loss = (y * grads[0].to(dtype)).sum() + (0 if s is None else (s**2 * grads[1].to(dtype)).sum())
        used = [t for t in leaves if t is not None]
        first = torch.autograd.grad(loss, used, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), used, materialize_grads=True)

    with seqfuse.backend("cpu"):
        got = second(ours, torch.float32)
    every = zip(got, second(truth, torch.float64), second(pytorch, torch.float32), strict=True)
    for a, b, c in every:
        assert_accurate(a, b, c, what="second derivative")


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual):
    tensors, grads = sample(6, 24, torch.float32, residual=residual)
    x, r, w, b = (None if t is None else t.detach() for t in tensors)
    torch.library.opcheck(torch.ops.seqfuse.layer_norm_fwd.default, (x, r, w, b, 1e-5))
    y, s, mean, rstd = torch.ops.seqfuse.layer_norm_fwd(x, r, w, b, 1e-5)
    args = (grads[0], grads[1] if residual else None, s if residual else x, w, mean, rstd, True, True)
    torch.library.opcheck(torch.ops.seqfuse.layer_norm_bwd.default, args)
    torch.library.opcheck(torch.ops.seqfuse.layer_norm_bwd.default, (*args[:3], None, mean, rstd, False, False))


def test_compile_fullgraph_forward_and_backward_without_recompilation():
    module = seqfuse.nn.LayerNorm(64)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for rows in (8, 24, 5):
        x, dy = torch.randn(rows, 64, requires_grad=True), torch.randn(rows, 64)
        compiled(x).backward(dy)
        theirs = torch.autograd.grad(F.layer_norm(x, (64,), module.weight, module.bias), x, dy)[0]
        wide = x.detach().double().requires_grad_()
        exact = torch.autograd.grad(F.layer_norm(wide, (64,)), wide, dy.double())[0]
        assert_accurate(x.grad, exact, theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: seqfuse.ops.layer_norm([1.0]), TypeError, "x must be a tensor"),
        (lambda: seqfuse.ops.layer_norm(torch.arange(4)), TypeError, "floating-point"),
        (lambda: seqfuse.ops.layer_norm(torch.tensor(1.0)), ValueError, "at least one dimension"),
        (lambda: seqfuse.ops.layer_norm(torch.randn(2, 4), torch.ones(5)), ValueError, "weight must have shape [4]"),
        (lambda: seqfuse.ops.layer_norm(torch.randn(2, 4), bias=torch.ones(2, 4)), ValueError, "bias must have shape"),
        (
            lambda: seqfuse.ops.layer_norm(torch.randn(2, 4), torch.ones(4).bfloat16()),
            ValueError,
            "weight must have x's dtype",
        ),
        (
            lambda: seqfuse.ops.layer_norm(torch.randn(2, 4), residual=torch.randn(2, 3)),
            ValueError,
            "residual must have shape [2, 4]",
        ),
        (
            lambda: seqfuse.ops.layer_norm(torch.randn(2, 4), residual=torch.randn(2, 4).double()),
            ValueError,
            "residual is float64, but x is float32",
        ),
        (
            lambda: seqfuse.ops.layer_norm(torch.randn(2, 4), torch.ones(4, device="meta")),
            ValueError,
            "weight is on meta, but x is on cpu",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value) and "\n" not in str(caught.value)


class TestNode:
    """The autograd node in C++ (pyext/autograd/layer_norm.cpp) against the autograd.Function in Python."""

    @pytest.fixture(autouse=True)
    def _there(self):
        if native.nodes_missing():
            pytest.skip(native.nodes_missing())

    @staticmethod
    def _run(function, wanted, residual, dtype, use, create_graph, rms):
        torch.manual_seed(0)
        tensors = {"x": torch.randn(7, 40), "residual": torch.randn(7, 40) if residual else None,
                   "weight": torch.randn(40), "bias": None if rms else torch.randn(40)}  # fmt: skip
        tensors = {n: t if t is None else t.to(dtype).requires_grad_(n in wanted) for n, t in tensors.items()}
        y, s = function(*tensors.values(), 1e-5, rms)[:2]
        assert y.requires_grad
        assert s.requires_grad == residual
        out = [y] * ("y" in use) + [s] * ("s" in use)
        grads = [torch.randn(7, 40).to(dtype) for _ in out]
        inputs = [t for n, t in tensors.items() if n in wanted]
        first = torch.autograd.grad(out, inputs, grads, create_graph=create_graph, allow_unused=True)
        if not create_graph:
            return first
        again = [g.float().square().sum() for g in first if g is not None and g.requires_grad]
        if not again:  # dweight does not depend on weight
            return *first, *(None for _ in inputs)
        total = sum(again)
        return *first, *torch.autograd.grad(total, inputs, allow_unused=True)

    @staticmethod
    def _python(*args):
        *args, rms = args
        return LayerNormFunction.apply(*args, "cpu", *NormOptions(rms=rms))

    @pytest.mark.parametrize("create_graph", (False, True))
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
    @pytest.mark.parametrize(("residual", "use"), ((False, "y"), (True, "ys"), (True, "y"), (True, "s")))
    @pytest.mark.parametrize("wanted", (("x", "residual", "weight", "bias"), ("x",), ("weight",), ("residual", "bias")),
                             ids="-".join)  # fmt: skip
    @pytest.mark.parametrize("rms", (False, True), ids=("layer_norm", "rms_norm"))
    def test_is_the_function_in_python(self, rms, wanted, residual, use, dtype, create_graph):
        wanted = set(wanted) - ({"bias"} if rms else set()) - (set() if residual else {"residual"})
        if not wanted:
            pytest.skip("nothing is left that wants a gradient")
        if use == "s" and (create_graph or wanted.isdisjoint({"x", "residual"})):
            pytest.skip("a sum has no second gradient, and none for the parameters")
        args = wanted, residual, dtype, use, create_graph, rms
        ours = self._run(torch.ops.seqfuse.layer_norm.default, *args)
        for a, b in zip(ours, self._run(self._python, *args), strict=True):
            if a is None or b is None:  # no second gradient, or one of zeros
                assert (a is b) or (create_graph and (a if b is None else b).abs().max() == 0)
            else:
                assert a.dtype == b.dtype
                tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
                if create_graph:  # by different formulas
                    torch.testing.assert_close(a, b, **tolerance)
                else:
                    assert torch.equal(a, b)

    def test_keeps_torchs_rules(self):
        x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
        y, _ = torch.ops.seqfuse.layer_norm(x, None, weight, None, 1e-5)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()
        y, _ = torch.ops.seqfuse.layer_norm(x, None, weight, None, 1e-5)
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        with torch.no_grad():
            assert not torch.ops.seqfuse.layer_norm(x, None, weight, None, 1e-5)[0].requires_grad

    def test_is_left_out_under_another_torch(self, monkeypatch):
        native.nodes_missing.cache_clear()
        monkeypatch.setattr(torch, "__version__", "2.99.0")
        assert "2.99.0" in native.nodes_missing()
        x = torch.randn(64, 512, requires_grad=True)
        with seqfuse.backend("cpu"):
            y = seqfuse.nn.LayerNorm(512)(x)
        assert type(y.grad_fn).__name__ == "LayerNormFunctionBackward"
        monkeypatch.undo()
        native.nodes_missing.cache_clear()
        with seqfuse.backend("cpu"):
            y = seqfuse.nn.LayerNorm(512)(x)
        assert y.grad_fn.name() == "SeqfuseLayerNormBackward"


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [3, 2000])
def test_a_float32_bias_without_a_weight(dtype, residual, rows):
    x, bias = torch.randn(rows, 64).to(dtype).requires_grad_(), torch.randn(64, requires_grad=True)
    y = seqfuse.ops.layer_norm(x, None, bias, residual=x.detach() if residual else None)
    (y[0] if residual else y).float().sum().backward()
    assert x.grad.dtype == dtype and torch.allclose(bias.grad, torch.full((64,), float(rows)))


@pytest.mark.parametrize(
    "options,error,text",
    [
        (dict(eps=None), TypeError, "eps must be a number, got None"),
        (dict(eps=-1.0), ValueError, "eps must be at least 0, got -1.0"),
        (dict(eps=float("nan")), ValueError, "eps must be at least 0, got nan"),
        (dict(dropout_p="a"), TypeError, "dropout_p must be a number, got 'a'"),
    ],
)
def test_options_that_are_no_numbers_get_one_sentence(options, error, text):
    x, weight = torch.randn(40, 3000), torch.randn(3000)
    for call in (
        lambda: seqfuse.ops.layer_norm(x, weight, weight, **options),
        lambda: seqfuse.ops.rms_norm(x, **options),
    ):
        for _ in range(2):
            with pytest.raises(error) as caught:
                call()
            assert text in str(caught.value) and "\n" not in str(caught.value)
        seqfuse.ops.layer_norm(x, weight, weight)  # opens the door
