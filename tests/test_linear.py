"""linear against the float64 reference: the CPU kernel at every instruction set, and the op as F.linear."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_module_simplified, make_boxed_func
from hypothesis import given
from hypothesis import strategies as st

import seqfuse
from seqfuse import native, reference
from seqfuse.testing import assert_accurate

DTYPES = [torch.float32, torch.bfloat16]


def sample(rows, inputs, outputs, dtype):
    return [torch.randn(s).to(dtype) for s in ((rows, inputs), (outputs, inputs), (outputs,))]


def check(x, weight, bias, call=seqfuse.ops.linear):
    with torch.no_grad(), seqfuse.backend("cpu"):
        y = call(x, weight, bias)
    theirs = F.linear(x, weight, bias)
    assert y.dtype == theirs.dtype and y.is_contiguous()
    truth = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # a slice of fewer than 8 numbers is not judged alone: one of them may cancel
    assert_accurate(y, truth, theirs, dims=[d for d in (0, -1) if y.numel() >= 8 * y.shape[d]])


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("inputs,outputs", [(1, 1), (3, 7), (33, 5), (64, 48), (257, 131)], ids=str)
def test_kernel(isa, rows, inputs, outputs, dtype):
    x, weight, bias = sample(rows, inputs, outputs, dtype)
    check(x, weight, bias)
    check(x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [9, 16, 17, 33, 47, 64, 128, 129, 300])
@pytest.mark.parametrize("inputs,outputs", [(1, 1), (5, 24), (64, 49), (257, 131)], ids=str)
def test_kernel_of_many_rows(isa, rows, inputs, outputs, dtype):
    x, weight, bias = sample(rows, inputs, outputs, dtype)
    check(x, weight, bias)
    check(x, torch.cat([weight, weight], 1)[:, inputs // 2 : inputs // 2 + inputs], None)  # its rows lie apart


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [3, 40])
def test_kernel_of_several_threads(isa, rows, dtype):
    """Enough work for each thread to get portions, and outputs that no tile divides."""
    x, weight, bias = sample(rows, 130, 1003, dtype)
    check(x, weight, bias)
    with seqfuse.backend("cpu"):
        many = seqfuse.ops.linear(x, weight, bias)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        one = seqfuse.ops.linear(x, weight, bias)
        torch.set_num_threads(threads)
    assert torch.equal(many, one)


@given(
    rows=st.integers(1, 128),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_sizes(rows, inputs, outputs, dtype, biased, seed):
    torch.manual_seed(seed)
    x, weight, bias = sample(rows, inputs, outputs, dtype)
    check(x, weight, bias if biased else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_strides_and_shapes(dtype):
    x, weight, bias = sample(6, 40, 30, dtype)
    check(x.t().contiguous().t(), weight, bias)  # x across
    check(x.view(2, 1, 3, 40).transpose(0, 2), weight, bias)
    check(x[0], weight, bias)
    check(x, torch.cat([weight, weight], 1)[:, 3:43], bias)  # rows of the weight lie apart
    check(x, weight, torch.stack([bias, bias], 1)[:, 1])
    check(x, weight, bias, torch.ops.seqfuse.linear_fwd.default)
    check(x, weight.t().contiguous().t(), bias, torch.ops.seqfuse.linear_fwd.default)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)], ids=str)
def test_size_0(isa, shape, dtype):
    rows, inputs, outputs = shape
    x, weight, bias = sample(rows, inputs, outputs, dtype)
    with torch.no_grad(), seqfuse.backend("cpu"):
        y = seqfuse.ops.linear(x, weight, bias)
    assert torch.equal(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_nan_and_inf_reach_their_rows_only(isa, dtype):
    x, weight, bias = sample(4, 37, 21, dtype)
    x[1, 36], x[2, 0], weight[20, 5] = torch.nan, torch.inf, torch.nan
    with torch.no_grad(), seqfuse.backend("cpu"):
        y = seqfuse.ops.linear(x, weight, bias)
    theirs = F.linear(x, weight, bias)
    assert torch.equal(y.isnan(), theirs.isnan()) and torch.equal(y.isinf(), theirs.isinf())
    assert y[1].isnan().all() and y[:, 20].isnan().all() and y[0, :20].isfinite().all()


def chosen(*args, call=seqfuse.ops.linear):
    decisions = []
    with seqfuse.dispatch.listening(lambda choice, case: decisions.append(choice)):
        call(*args)
    return decisions[-1]


def why_not_cpu(choice):
    return dict(choice.refused)["cpu"]


def test_auto(monkeypatch):
    """The kernel where it was measured faster; PyTorch's op wherever it can do more, or is faster; twice the same."""
    monkeypatch.setattr(native, "isa", lambda: "avx2")
    monkeypatch.setattr("seqfuse.ops.products.ROWS", (12, 32, 64))
    monkeypatch.setattr("seqfuse.ops.products.OWN_FLOATS", False)
    large, small = sample(2, 512, 512, torch.float32), sample(2, 64, 64, torch.float32)
    module = torch.nn.Linear(512, 512)
    for _ in range(2):
        with torch.no_grad():
            assert chosen(*large).backend == "cpu"
            assert chosen(large[0], module.weight, module.bias).backend == "cpu"
            assert "measured faster" in why_not_cpu(chosen(*small))
            assert "for so many rows" in why_not_cpu(chosen(torch.randn(3, 43, 512), *large[1:]))
            assert "not dense" in why_not_cpu(chosen(large[0], large[1].t(), large[2]))
            assert "one dimension" in why_not_cpu(chosen(large[0], large[1][0]))
            with torch.autocast("cpu", torch.bfloat16):
                choice = chosen(*large)
                assert choice.backend == "torch" and "autocast" in why_not_cpu(choice)
        assert "with a gradient" in why_not_cpu(chosen(large[0], module.weight, module.bias))
        assert chosen(*large).backend == "cpu"  # nobody wants one
    assert chosen(*(t.double() for t in large)).backend == "torch"
    rules = vars(sys.modules["seqfuse.ops.linear"])  # ops.linear is the function
    monkeypatch.setitem(rules, "NATIVE_BF16", False)
    assert chosen(*sample(129, 512, 512, torch.bfloat16)).backend == "cpu"
    monkeypatch.setitem(rules, "NATIVE_BF16", True)
    monkeypatch.setattr(native, "isa", lambda: "avx512")
    monkeypatch.setattr(native, "bf16_dots", lambda: False)
    seqfuse.dispatch.forget()
    many = sample(5, 512, 512, torch.bfloat16)
    assert "oneDNN" in why_not_cpu(chosen(*many))
    monkeypatch.setattr(native, "isa", lambda: "amx")
    monkeypatch.setattr(native, "bf16_dots", lambda: True)
    seqfuse.dispatch.forget()
    assert chosen(*many).backend == "cpu"
    assert "oneDNN" in why_not_cpu(chosen(*sample(9, 512, 512, torch.bfloat16)))
    threads = torch.get_num_threads()
    for rows, one, two in ((8, True, True), (9, False, False), (32, True, True), (33, False, True), (65, False, False)):
        for count, ours in ((1, one), (2, two)):
            torch.set_num_threads(count)
            assert (chosen(*sample(rows, 512, 512, torch.float32)).backend == "cpu") == ours, (rows, count)
    torch.set_num_threads(threads)
    monkeypatch.setattr(native, "isa", lambda: "baseline")
    seqfuse.dispatch.forget()
    assert "without AVX2" in why_not_cpu(chosen(*large))
    seqfuse.dispatch.forget()


def test_a_known_call_follows_what_changes_between_calls():
    x, weight, bias = sample(2, 512, 512, torch.float32)
    first = seqfuse.ops.linear(x, weight, bias)
    with seqfuse.backend("torch"):
        assert chosen(x, weight, bias).backend == "torch"
    with seqfuse.backend("cpu"):
        assert chosen(x, weight, bias).backend == "cpu"
        weight.requires_grad_()
        assert seqfuse.ops.linear(x, weight, bias).requires_grad
        weight.requires_grad_(False)
        assert not seqfuse.ops.linear(x, weight, bias).requires_grad
        assert not torch.equal(seqfuse.ops.linear(x, weight + 1, bias), first)
        with pytest.raises(ValueError, match="bias is float64"):
            seqfuse.ops.linear(x, weight, bias.double())


def gradients(call, x, weight, bias, dy):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = call(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def check_gradients(x, weight, bias):
    dy = torch.randn(*x.shape[:-1], len(weight))
    exact = gradients(reference.linear, *(t.double() for t in (x, weight, bias)), dy)
    theirs = gradients(F.linear, x, weight, bias, dy)
    with seqfuse.backend("cpu"):
        ours = gradients(seqfuse.ops.linear, x, weight, bias, dy)
    for got, truth, plain in zip(ours, exact, theirs, strict=True):
        assert got.dtype == plain.dtype and got.shape == plain.shape
        assert_accurate(got, truth, plain, dims=[d for d in range(got.dim()) if got.numel() >= 8 * got.shape[d]])
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 40, 130])
def test_gradients(isa, rows, dtype):
    check_gradients(*sample(rows, 37, 45, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_gradients_of_other_layouts(dtype, monkeypatch):
    x, weight, bias = sample(12, 40, 33, dtype)
    check_gradients(x.view(2, 6, 40).transpose(0, 1), weight, bias)
    check_gradients(x[0], weight, bias)
    for least in (32, 10):  # ATen's products, ours
        monkeypatch.setattr("seqfuse.ops.products.OWN_FLOATS", least == 10)
        monkeypatch.setattr("seqfuse.ops.products._LEAST", least)
        monkeypatch.setattr("seqfuse.ops.products._LEAST_WORK", 0)
        dweight = check_gradients(x, weight.t().contiguous().t(), bias)[2]
        assert dweight.t().is_contiguous()


@given(rows=st.integers(1, 200), inputs=st.integers(1, 70), outputs=st.integers(1, 70), dtype=st.sampled_from(DTYPES))
def test_gradients_of_random_sizes(rows, inputs, outputs, dtype):
    torch.manual_seed(rows)
    check_gradients(*sample(rows, inputs, outputs, dtype))


def test_gradients_of_gradients_and_what_needs_none():
    x, weight, bias = (t.double().float() for t in sample(6, 5, 4, torch.float32))
    with seqfuse.backend("cpu"):
        for needed in (0, 1, 2):
            args = [x, weight, bias]
            args[needed] = args[needed].clone().requires_grad_()
            (seqfuse.ops.linear(*args) ** 2).sum().backward()
            assert args[needed].grad is not None
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        dy = torch.randn(3, 6, 4)
        several = torch.autograd.grad(seqfuse.ops.linear(*leaves), leaves, dy, is_grads_batched=True)
        for i in range(3):
            one = torch.autograd.grad(seqfuse.ops.linear(*leaves), leaves, dy[i])
            for a, b in zip(several, one, strict=True):
                assert_accurate(a[i], b.double())
        ours = twice(seqfuse.ops.linear, x, weight)
    exact, theirs = twice(F.linear, x.double(), weight.double()), twice(F.linear, x, weight)
    for a, b, c in zip(ours, exact, theirs, strict=True):
        assert_accurate(a, b, c)


def twice(call, *args):
    """The gradients of a function of gradients."""
    leaves = [t.clone().requires_grad_() for t in args]
    first = torch.autograd.grad((call(*leaves) ** 3).sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum((g**2).sum() for g in first), leaves)


def test_auto_where_mkl_leaves_half_of_the_processor_unused(monkeypatch):
    monkeypatch.setattr("seqfuse.ops.products.OWN_FLOATS", True)
    monkeypatch.setattr("seqfuse.ops.products.WIDEN_FROM", sys.maxsize)
    monkeypatch.setattr(native, "isa", lambda: "avx512")
    seqfuse.dispatch.forget()
    module = torch.nn.Linear(512, 256)
    x = torch.randn(4, 50, 512)
    assert chosen(x, module.weight, module.bias).backend == "cpu"
    assert chosen(x, module.weight.t().contiguous().t(), None).backend == "cpu"
    with torch.no_grad():
        assert chosen(x, module.weight, module.bias).backend == "cpu"
    for other in (x[0, :20], x.bfloat16()):
        assert chosen(other, module.weight.to(other.dtype), None).backend == "torch"
    seqfuse.dispatch.forget()


def test_auto_where_pytorch_has_nothing_good_for_bf16(monkeypatch):
    x, weight, bias = (t.requires_grad_() for t in sample(40, 64, 50, torch.bfloat16))
    for widen_from, backend in ((sys.maxsize, "torch"), (48, "torch"), (0, "cpu")):
        monkeypatch.setattr("seqfuse.ops.products.WIDEN_FROM", widen_from)
        seqfuse.dispatch.forget()
        assert chosen(x, weight, bias).backend == backend
    dy = torch.randn(40, 50)
    exact = gradients(reference.linear, *(t.double() for t in (x, weight, bias)), dy)
    for a, b, c in zip(
        gradients(seqfuse.ops.linear, x, weight, bias, dy), exact, gradients(F.linear, x, weight, bias, dy), strict=True
    ):
        assert_accurate(a, b, c)
    seqfuse.dispatch.forget()


def test_module(monkeypatch):
    """fuse() takes those that calls may be faster with; they are nn.Linear in everything else."""
    model = torch.nn.Sequential(torch.nn.Linear(600, 500), torch.nn.Linear(500, 20))
    plain = copy.deepcopy(model)
    seqfuse.fuse(model)
    assert [type(m) for m in model] == [seqfuse.nn.Linear, torch.nn.Linear]
    x = torch.randn(3, 600)
    with torch.no_grad():
        assert_accurate(model(x), copy.deepcopy(plain).double()(x.double()), plain(x))
    row = seqfuse.explain(model, x)[0]
    assert (row.op, row.backend) == ("linear", "cpu") and seqfuse.explain(seqfuse.fuse(copy.deepcopy(plain)))
    assert list(model.state_dict()) == list(plain.state_dict()) and isinstance(model[0], torch.nn.Linear)
    compiled = torch.compile(model, fullgraph=True)
    assert_accurate(compiled(x), copy.deepcopy(plain).double()(x.double()), plain(x))
    assert [type(m) for m in seqfuse.unfuse(model)] == 2 * [torch.nn.Linear]


def test_gradients_autocast_subclasses_and_transforms_are_pytorchs():
    x, weight, bias = (t.requires_grad_() for t in sample(3, 20, 10, torch.float32))
    dy = torch.randn(3, 10)
    ours = torch.autograd.grad(seqfuse.ops.linear(x, weight, bias), (x, weight, bias), dy)
    theirs = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), dy)
    assert all(map(torch.equal, ours, theirs))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(seqfuse.ops.linear(x, weight, bias), F.linear(x, weight, bias))
    with torch.no_grad():
        several = torch.randn(4, 3, 20)
        got = torch.vmap(lambda x: seqfuse.ops.linear(x, weight, bias))(several)
        assert_accurate(
            got, F.linear(several.double(), weight.double(), bias.double()), F.linear(several, weight, bias)
        )

    class Special(torch.Tensor):
        @classmethod
        def __torch_function__(cls, fn, types, args=(), kwargs=None):
            return "special" if fn is F.linear else super().__torch_function__(fn, types, args, kwargs or {})

    assert seqfuse.ops.linear(x, weight.detach().as_subclass(Special)) == "special"


def test_compiled_and_registered():
    module = torch.nn.Linear(48, 40)

    def call(x):
        return seqfuse.ops.linear(x, module.weight, module.bias)

    compiled = torch.compile(call, fullgraph=True)
    for rows in (1, 3, 8, 20):  # the last one is no case for the kernel
        x = torch.randn(rows, 48)
        truth = F.linear(x.double(), module.weight.double(), module.bias.double())
        with torch.no_grad():
            assert_accurate(compiled(x), truth, module(x))
        assert_accurate(compiled(x), truth, module(x))
    torch.library.opcheck(
        torch.ops.seqfuse.linear_fwd.default, (torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5))
    )
    torch.library.opcheck(torch.ops.seqfuse.linear_fwd.default, (torch.randn(8), torch.randn(5, 8), None))


@pytest.mark.parametrize(
    "args,error,text",
    [
        (([1.0], torch.ones(2, 1)), TypeError, "x must be a tensor"),
        ((torch.ones(2, 3), torch.ones(4, 3, dtype=torch.int64)), TypeError, "weight must be a floating-point tensor"),
        ((torch.ones(2, 3), torch.ones(1, 4, 3)), ValueError, "weight must be 1-D or 2-D"),
        ((torch.tensor(1.0), torch.ones(4, 3)), ValueError, "x must have at least one dimension"),
        ((torch.ones(2, 3), torch.ones(4, 5)), ValueError, "x must end in weight's 5 inputs"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), ValueError, "bias must have shape [4]"),
        ((torch.ones(2, 3), torch.ones(4, 3).bfloat16()), ValueError, "weight is bfloat16, but x is float32"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(4).double()), ValueError, "bias is float64, but x is float32"),
        ((torch.ones(2, 3), torch.ones(4, 3, device="meta")), ValueError, "weight is on meta, but x is on cpu"),
    ],
)
def test_bad_input_gets_one_sentence(args, error, text):
    with pytest.raises(error) as caught:
        seqfuse.ops.linear(*args)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_the_op_itself_refuses_what_it_cannot_do():
    op = torch.ops.seqfuse.linear_fwd.default
    for args, text in (
        ((torch.ones(2, 3), torch.ones(4, 5), None), "x must be"),
        ((torch.ones(2, 3).half(), torch.ones(4, 3).half(), None), "float32 and bfloat16"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(1)), "bias must be"),
    ):
        with pytest.raises(RuntimeError, match=text):
            op(*args)


def test_module_leaves_to_pytorch_what_it_does_as_fast(monkeypatch):
    monkeypatch.setattr("seqfuse.ops.products.OWN_FLOATS", False)
    module = seqfuse.nn.Linear(600, 500)
    x = torch.randn(3, 600)
    assert "AddmmBackward" in module(x).grad_fn.name()
    row = seqfuse.explain(module)[0]
    assert (row.op, row.backend) == ("linear", "torch") and "with a gradient" in row.reason
    with seqfuse.backend("cpu"):
        assert "LinearFunction" in module(x).grad_fn.name()
    assert module.double()(x.double()).dtype == torch.float64


def test_compiled_where_mkl_leaves_half_of_the_processor_unused(narrow):
    """One opaque call for each product, forward and backward; another batch size compiles nothing anew."""
    model = torch.nn.Sequential(torch.nn.Linear(160, 200), torch.nn.Tanh(), torch.nn.Linear(200, 140))
    plain, graphs = copy.deepcopy(model), []
    seqfuse.fuse(model)

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_module_simplified(graph, inputs, fw_compiler=seen, bw_compiler=seen)

    calls = []

    def seen(graph, inputs):
        calls.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for rows in (150, 300, 3):
        x, dy = torch.randn(rows, 160), torch.randn(rows, 140)
        leaves = [x.clone().requires_grad_(), *model.parameters()]
        got = [y := compiled(leaves[0]), *torch.autograd.grad(y, leaves, dy)]
        theirs, exact = [], []
        for into, kind in ((theirs, torch.float32), (exact, torch.float64)):
            reference_model = copy.deepcopy(plain).to(kind)
            leaves = [x.to(kind).requires_grad_(), *reference_model.parameters()]
            into += [y := reference_model(leaves[0]), *torch.autograd.grad(y, leaves, dy.to(kind))]
        for a, b, c in zip(got, exact, theirs, strict=True):
            assert_accurate(a, b, c)
    assert len(graphs) == 1 and len(calls) == 2
    names = [[name for name in c if "seqfuse_composed" in name or "mm" in name] for c in calls]
    assert len(names[0]) == 2 and len(names[1]) == 4 and all("seqfuse_composed" in n for c in names for n in c)
    with torch.no_grad():
        x = torch.randn(20, 160)
        assert_accurate(torch.compile(model, fullgraph=True)(x), copy.deepcopy(plain).double()(x.double()), plain(x))


def test_composed_products_are_registered(narrow):
    composed = torch.ops.seqfuse_composed
    x, w, b = sample(40, 32, 33, torch.float32)
    torch.library.opcheck(composed.linear.default, (x, w, b))
    torch.library.opcheck(composed.product.default, (x, w.t(), None))
    torch.library.opcheck(composed.product.default, (x.t(), x, torch.randn(32, 32)))
