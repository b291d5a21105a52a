"""The door (pyext/autograd/door.cpp): which calls go through it, and that they are PyTorch's own calls."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import seqfuse
from seqfuse import dispatch, explanation, native, ops, tuned

pytestmark = pytest.mark.skipif(native.nodes_missing() is not None, reason=str(native.nodes_missing()))

CALLS = ("attention", "attention_with_kv_cache", "gated", "layer_norm", "linear_cross_entropy")
TARGET = torch.tensor([3, 0, -100, 7, 1])


def sdpa(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, **options)


def cross_entropy(x, weight, **options):
    return F.cross_entropy(F.linear(x, weight).float(), TARGET, **options)


# name -> (shapes, our call, PyTorch's own)
SMALL = {
    "causal": ([(2, 4, 9, 16)] * 3, lambda q, k, v: ops.attention(q, k, v, causal=True),
               lambda q, k, v: sdpa(q, k, v, is_causal=True)),
    "dense": ([(2, 4, 9, 16), (2, 4, 7, 16), (2, 4, 7, 8)], lambda q, k, v: ops.attention(q, k, v, scale=0.3),
              lambda q, k, v: sdpa(q, k, v, scale=0.3)),
    "shared": ([(2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16)], ops.attention,
               lambda q, k, v: sdpa(q, k, v, enable_gqa=True)),
    "top-left": ([(2, 4, 5, 16), (2, 4, 9, 16), (2, 4, 9, 16)],
                 lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, is_causal=True),
                 lambda q, k, v: sdpa(q, k, v, is_causal=True)),
    "swiglu": ([(3, 40)] * 2, ops.swiglu, lambda gate, up: F.silu(gate) * up),
    "geglu": ([(3, 40)] * 2, ops.geglu, lambda gate, up: F.gelu(gate) * up),
    "tanh": ([(3, 40)] * 2, lambda gate, up: ops.geglu(gate, up, approximate="tanh"),
             lambda gate, up: F.gelu(gate, approximate="tanh") * up),
    "loss": ([(5, 16), (11, 16)], lambda x, w: ops.linear_cross_entropy(x, w, TARGET), cross_entropy),
    "norm": ([(3, 40), (40,), (40,)], ops.layer_norm, lambda x, w, b: F.layer_norm(x, (40,), w, b)),
}  # fmt: skip
FLOATS = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))


def tensors(name, dtype=torch.float32, grad=False):
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in SMALL[name][0]]


@pytest.fixture
def passed(monkeypatch):
    """The names of the calls that went through the door, which is open."""
    names = []

    def watched(name, call):
        def watch(*args):
            out = call(*args)
            if out is not None:
                names.append(name)
            return out

        return watch

    for name in CALLS:
        monkeypatch.setattr(native.door, name, watched(name, getattr(native.door, name)))
    open_again()
    return names


def open_again():
    dispatch.forget()
    ops.swiglu(torch.zeros(1), torch.zeros(1))
    assert native.door.opened()


@FLOATS
@pytest.mark.parametrize("name", SMALL)
def test_a_small_call_is_pytorchs_own(name, dtype, passed):
    """... bit for bit, with its first and second gradients, or its refusal to make those."""
    _, ours, theirs = SMALL[name]
    inputs = tensors(name, dtype, grad=True)
    with torch.no_grad():
        assert torch.equal(ours(*inputs), theirs(*inputs))
    with torch.inference_mode():
        assert torch.equal(ours(*inputs), theirs(*inputs))
    results = []
    for call in (ours, theirs):
        y = call(*inputs)
        grads = torch.autograd.grad(y.float().square().sum(), inputs, create_graph=True)
        try:
            again = torch.autograd.grad(sum(g.float().square().sum() for g in grads), inputs)
        except RuntimeError as error:  # the gradient of CPU flash attention has none
            again = str(error)
        results.append((y, grads, again))
    (y, grads, again), (y_, grads_, again_) = results
    assert type(y.grad_fn).__name__ == type(y_.grad_fn).__name__
    assert torch.equal(y, y_) and all(map(torch.equal, grads, grads_))
    assert again == again_ if isinstance(again, str) else all(map(torch.equal, again, again_))
    assert len(passed) == 3


@pytest.mark.parametrize("name", SMALL)
def test_strided_and_parameters(name, passed):
    _, ours, theirs = SMALL[name]
    inputs = [torch.nn.Parameter(torch.stack((t, t), -1)[..., 1]) for t in tensors(name)]
    assert not inputs[0].is_contiguous()
    assert torch.equal(ours(*inputs), theirs(*inputs)) and len(passed) == 1


class Subclass(torch.Tensor):
    pass


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def within(context):
    def run(call, inputs):
        with context():
            return call(*inputs)

    return run


# what keeps a small call from the door
UNUSUAL = {
    "subclass": lambda call, inputs: call(inputs[0].as_subclass(Subclass), *inputs[1:]),
    "float64": lambda call, inputs: call(*(t.double() for t in inputs)),
    "function mode": within(FunctionMode),
    "dispatch mode": within(DispatchMode),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "torch.func": lambda call, inputs: torch.func.vjp(call, *inputs)[0],
    "vmap": lambda call, inputs: torch.vmap(call)(*(t[None] for t in inputs))[0],
    "reference": within(lambda: dispatch.backend("reference")),
    "cpu": within(lambda: dispatch.backend("cpu")),
    "plain": within(dispatch.plain),
    "listening": within(lambda: dispatch.listening(lambda choice, case: None)),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("how", UNUSUAL)
def test_an_unusual_call_takes_the_long_way(how, name, passed):
    """... to the same result, but for the rounding of another kernel or of autocast."""
    _, ours, theirs = SMALL[name]
    inputs = tensors(name)
    expected = UNUSUAL[how](theirs, inputs)
    found = UNUSUAL[how](ours, inputs)
    assert passed == [] and type(found) is type(expected)
    close = {"rtol": 2e-2, "atol": 2e-2} if how == "autocast" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.as_subclass(torch.Tensor).float(), expected.as_subclass(torch.Tensor).float(),
                               **close)  # fmt: skip
    ours(*inputs)
    if how not in ("reference", "cpu", "plain", "listening"):
        assert len(passed) == 1
        return
    ours(*inputs)  # the first after the setting has changed back opened the door
    assert len(passed) == 1


def long_way(call, *args, **options):
    """(type and text of the error that the call raises) with the door shut."""
    with pytest.raises(Exception) as caught, dispatch.listening(lambda choice, case: None):
        call(*args, **options)
    return caught.type, str(caught.value)


DECODE, ROOM = ops.attention_with_kv_cache, torch.tensor([5, 8])
Q, X, W = torch.randn(2, 4, 9, 16), torch.randn(5, 16), torch.randn(11, 16)


@pytest.mark.parametrize(
    ("call", "args", "options"),
    [
        (ops.attention, (Q, Q[:1], Q[:1]), {}),
        (ops.attention, (Q, Q[..., :8], Q), {}),
        (ops.attention, (Q, Q, Q[:, :, :3]), {}),
        (ops.attention, (Q, Q[:, :3], Q[:, :3]), {}),
        (ops.attention, (Q, Q.bfloat16(), Q), {}),
        (ops.attention, (Q[0], Q[0], Q[0]), {}),
        (ops.attention, (Q, Q, Q), {"scale": float("nan")}),
        (ops.attention, (Q, Q, Q), {"scale": "1"}),
        (ops.attention, (Q, [1], Q), {}),
        (ops.scaled_dot_product_attention, (Q, Q[:, :2], Q[:, :2]), {}),
        (DECODE, (Q, Q[:1], Q[:1]), {"cache_lengths": ROOM}),
        (DECODE, (Q, Q, Q[:, :, :3]), {"cache_lengths": ROOM}),
        (DECODE, (Q, Q[:, :3], Q[:, :3]), {"cache_lengths": ROOM}),
        (DECODE, (Q, Q, Q, Q[:, :, :2], None), {"cache_lengths": ROOM}),
        (DECODE, (Q, Q, Q, Q[:, :2], Q[:, :2]), {"cache_lengths": ROOM}),
        (DECODE, (Q, Q, Q, Q[:, :, :2], Q[:, :, :1]), {"cache_lengths": ROOM}),
        (DECODE, (Q, Q, Q, Q[:, :, :2], Q[:, :, :2]), {"cache_lengths": ROOM + 4}),
        (DECODE, (Q, Q, Q), {"cache_lengths": ROOM - 6}),
        (DECODE, (Q, Q, Q), {"cache_lengths": ROOM[:1]}),
        (DECODE, (Q, Q, Q), {"cache_lengths": ROOM.float()}),
        (DECODE, (Q, Q, Q), {"cache_lengths": 5}),
        (DECODE, (Q, Q, Q), {"cache_lengths": ROOM, "scale": float("inf")}),
        (DECODE, (Q.clone().requires_grad_(), Q, Q), {"cache_lengths": ROOM}),
        (ops.swiglu, (X, X[:2]), {}),
        (ops.swiglu, (X, X.bfloat16()), {}),
        (ops.swiglu, (X.long(), X.long()), {}),
        (ops.swiglu, (X, 2.0), {}),
        (ops.linear_cross_entropy, (X, W[:, :8], TARGET), {}),
        (ops.linear_cross_entropy, (X, W, TARGET[:2]), {}),
        (ops.linear_cross_entropy, (X, W, TARGET.int()), {}),
        (ops.linear_cross_entropy, (X, W, TARGET + 9), {}),
        (ops.linear_cross_entropy, (X, W, TARGET), {"ignore_index": "no"}),
        (ops.layer_norm, (X, X[0, :8], X[0]), {}),
        (ops.layer_norm, (X, X[0], X[0]), {"residual": X[:2]}),
        (ops.layer_norm, (X, X[0], X[0].bfloat16()), {}),
    ],
)
def test_bad_arguments_raise_what_they_always_did(call, args, options, passed):
    expected = long_way(call, *args, **options)
    open_again()
    with pytest.raises(expected[0]) as caught:
        call(*args, **options)
    assert str(caught.value) == expected[1] and passed == []


def chosen(call):
    """The backend that the dispatcher chooses for a call."""
    heard = []
    with dispatch.listening(lambda choice, case: heard.append(choice.backend)):
        call()
    return heard[-1]


@FLOATS
@pytest.mark.parametrize("grad", (False, True), ids=("fwd", "fwd+bwd"))
def test_the_doors_sizes_are_the_dispatchers(isa, dtype, grad, passed):
    """On both sides of each threshold the door takes a call if and only if the dispatcher hands it to PyTorch."""

    def make(*shape):
        return torch.zeros(shape, dtype=dtype).requires_grad_(grad)

    calls = []
    for exponent in range(10, 20):
        for off in (0, 1):
            T = (1 << exponent >> 4) - off  # 1 << exponent scores with 16 keys
            q, k = make(1, 1, T, 64), make(1, 1, 16, 64)
            calls.append(lambda q=q, k=k: ops.attention(q, k, k))
            calls.append(lambda q=q, k=k: ops.scaled_dot_product_attention(q, k, k, is_causal=True))
            x = make((1 << exponent) - off)
            calls += [lambda f=f, x=x: f(x, x) for f in (ops.swiglu, ops.geglu)]
            calls.append(lambda x=x: ops.geglu(x, x, approximate="tanh"))
    for logits in (499_999, 500_000):
        x, w, t = make(1, 2), make(logits, 2), torch.zeros(1, dtype=torch.int64)
        calls.append(lambda x=x, w=w, t=t: ops.linear_cross_entropy(x, w, t))
    ways = set()
    for call in calls:
        backend = chosen(call)
        open_again()
        passed.clear()
        call()
        assert bool(passed) == (backend == "torch"), (backend, passed)
        ways.add(backend)
    assert ways == {"cpu", "torch"}


@FLOATS
@pytest.mark.parametrize("grad", (False, True), ids=("fwd", "fwd+bwd"))
@pytest.mark.parametrize("residual", (False, True), ids=("plain", "residual"))
def test_layer_norms_door_leads_to_both(residual, grad, dtype, passed):
    weight, bias = (torch.randn(64).to(dtype).requires_grad_(grad) for _ in range(2))
    ways = set()
    for rows in (1, 255, 256, 383, 384, 767, 768, 1535, 1536):
        x = torch.randn(rows, 64).to(dtype).requires_grad_(grad)
        call = lambda x=x: ops.layer_norm(x, weight, bias, residual=x if residual else None)  # noqa: E731
        backend = chosen(call)
        with dispatch.backend(backend):
            expected = call()
        open_again()
        passed.clear()
        found = call()
        assert passed == ["layer_norm"]
        for a, b in zip(*((t if residual else (t,)) for t in (expected, found)), strict=True):
            assert torch.equal(a, b) and type(a.grad_fn) is type(b.grad_fn)
        ways.add(backend)
    assert ways == ({"cpu"} if residual and grad else {"cpu", "torch"})


@FLOATS
@pytest.mark.parametrize("integer", (torch.int32, torch.int64), ids=("int32", "int64"))
@pytest.mark.parametrize("new", (0, 1, 3))
@pytest.mark.parametrize("options", ({}, {"causal": False, "scale": 0.3}), ids=("causal", "all"))
def test_a_step_of_decoding_is_that_of_the_long_way(options, new, integer, dtype, passed):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        q, k_cache, v_cache = (torch.randn(shape).to(dtype) for shape in ((2, 4, 3, 16), (2, 2, 9, 16), (2, 2, 9, 8)))
        k, v = (torch.randn(2, 2, new, D).to(dtype) if new else None for D in (16, 8))
        lengths = torch.tensor([[4, 0], [6, 0]]).to(integer)[:, 0]  # strided
        call = lambda: ops.attention_with_kv_cache(q, k_cache, v_cache, k, v, cache_lengths=lengths, **options)  # noqa: B023, E731
        if not results:
            assert [chosen(call), *passed] == ["cpu"]
            with dispatch.listening(lambda choice, case: None):
                out = call()
            open_again()
        else:
            out = call()
            assert passed == ["attention_with_kv_cache"]
        results.append((out, k_cache, v_cache, lengths))
    assert all(map(torch.equal, *results))


def test_a_module_that_decodes_hears_what_it_ran_on(passed):
    module, q = torch.nn.Identity(), torch.randn(2, 4, 9, 16)
    choices = []
    for by_the_door in (False, True):
        explanation.entering(module)
        if by_the_door:
            ops.attention_with_kv_cache(q, q, q, cache_lengths=ROOM)
        else:
            assert chosen(lambda: ops.attention_with_kv_cache(q, q, q, cache_lengths=ROOM)) == "cpu"
            open_again()
        choices.append(explanation._last.pop(module))
        assert passed == ["attention_with_kv_cache"] * by_the_door
    assert choices[0] == choices[1]
    ops.swiglu(*tensors("swiglu"))
    assert passed[1:] == ["gated"]


def test_explain_knows_what_a_layer_norm_ran_on(passed):
    module, small, large = seqfuse.nn.LayerNorm(64), torch.randn(3, 64), torch.randn(4096, 64)
    for x, backend in ((small, "torch"), (large, "cpu"), (small, "torch")):
        module(x)
        first = seqfuse.explain(module)[0]
        assert first.backend == backend
        passed.clear()
        assert torch.equal(module(x), module(x)) and passed == ["layer_norm"] * 2
        assert seqfuse.explain(module)[0] == first
    assert "PyTorch's own call costs less" in dict(first.refused)["cpu"]
    assert seqfuse.explain(module, large)[0].backend == "cpu"
    with dispatch.backend("reference"):
        passed.clear()
        module(small)
        assert passed == [] and seqfuse.explain(module)[0].reason == "asked for by name"
    module(small)
    assert passed == [] and "asked for" not in seqfuse.explain(module)[0].reason


def test_a_module_that_waits_for_a_choice_hears_it(passed):
    module = torch.nn.Identity()
    explanation.entering(module)
    ops.swiglu(*tensors("swiglu"))
    assert passed == [] and explanation.last_choice(module).backend == "torch"
    ops.swiglu(*tensors("swiglu"))
    assert passed == ["gated"]


def test_whoever_listens_from_now_on_hears_all(passed):
    heard = []
    dispatch.add_listener(record := lambda choice, case: heard.append(choice.backend))
    try:
        for name in SMALL:
            SMALL[name][1](*tensors(name))
    finally:
        dispatch._listeners.remove(record)
    assert heard == ["torch"] * len(SMALL) and passed == []


def test_a_tuned_table_shuts_it(tmp_path, monkeypatch, passed):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.reload()
    open_again()
    tuned.save("cpu", "gated", {"any": "cpu"})
    for _ in range(2):
        ops.swiglu(*tensors("swiglu"))
    assert passed == []
    monkeypatch.undo()
    tuned.reload()


@pytest.mark.parametrize("name", SMALL)
def test_compiled_without_a_break(name, passed):
    _, ours, theirs = SMALL[name]
    inputs = tensors(name, grad=True)
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(*inputs)
    grads = torch.autograd.grad(y.sum(), inputs)
    assert passed == []
    torch.testing.assert_close(y, theirs(*inputs))
    for found, expected in zip(grads, torch.autograd.grad(theirs(*inputs).sum(), inputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_wrong_number_of_arguments():
    with pytest.raises(TypeError, match="takes 3 arguments, got 1"):
        native.door.gated(X)
    with pytest.raises(ValueError, match="needs 8 sizes of attention"):
        native.door.open({})


def test_all_works_without_it():
    code = """
import sys
sys.modules["seqfuse._autograd"] = None
import torch, torch.nn.functional as F
from seqfuse import native, nn, ops
assert "could not be built" in native.nodes_missing()
torch.manual_seed(0)
q, x = torch.randn(2, 4, 9, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)
w, t = torch.randn(11, 16, requires_grad=True), torch.tensor([3, 0, -100, 7, 1])
norm, theirs = nn.LayerNorm(16), torch.nn.LayerNorm(16)
for _ in range(2):
    assert torch.equal(ops.attention(q, q, q, causal=True), F.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert torch.equal(ops.swiglu(x, x), F.silu(x) * x)
    assert torch.equal(ops.linear_cross_entropy(x, w, t), F.cross_entropy(F.linear(x, w), t))
    assert torch.equal(norm(x), theirs(x))
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "ok", done.stderr
