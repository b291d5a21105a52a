"""What torch can do with a differentiable call besides one backward pass: gradients of gradients where the inputs of a
call depend on each other, torch.func, forward mode, batches of gradients. Everything as with torch.nn."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import seqfuse
from seqfuse import dispatch, native, ops

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
BACKENDS = ["auto", "cpu", "reference"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b, tolerance=2e-5):
    scale = b.abs().max().clamp(min=1e-3)
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance * scale, f"{(a - b).abs().max()} of {scale}"


# Gradients of gradients: the inputs of a call are made of each other


def loop(cell, x, is_lstm):
    state = torch.zeros(x.shape[1], 8)
    state = (state, state) if is_lstm else state
    for one in x:
        state = cell(one, state)
    return (state[0] + state[1] if is_lstm else state).square().sum()


def pieces(module, x, is_lstm):
    state, total = None, 0.0
    for piece in x.split(4):
        y, state = module(piece, state)
        total = total + y.square().sum()
    return total


def twice(module, x, is_lstm):
    return module(module(x)[0])[0].square().sum()


def tied_layers(module, x, is_lstm):
    module.weight_hh_l1 = module.weight_hh_l0
    return module(x)[0].square().sum()


def tied_weights(module, x, is_lstm):
    module.weight_hh_l0 = module.weight_ih_l0
    return module(x)[0].square().sum()


RECURRENT = {
    "cell-loop": (loop, {"LSTMCell": {}, "GRUCell": {}, "RNNCell": {}}),
    "carried": (pieces, {"LSTM": {}, "GRU": {}, "RNN": {}}),
    "twice": (twice, {"LSTM": {}, "GRU": {}, "RNN": {"bidirectional": False}}),
    "tied-layers": (tied_layers, {"LSTM": {"num_layers": 2}, "GRU": {"num_layers": 2}}),
    "tied-weights": (tied_weights, {"LSTM": {}, "GRU": {}, "RNN": {}}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind,module", [(k, m) for k, (_, modules) in RECURRENT.items() for m in modules])
def test_gradients_of_gradients_of_recurrent_modules(kind, module, backend):
    call, modules = RECURRENT[kind]
    plain, x = getattr(torch.nn, module)(8, 8, **modules[module]), torch.randn(10, 3, 8, requires_grad=True)
    fused, is_lstm = seqfuse.fuse(copy.deepcopy(plain)), "LSTM" in module

    def penalty(model):
        loss = call(model, x, is_lstm)
        used = [x, *(p for n, p in sorted(model.named_parameters()))]
        first = torch.autograd.grad(loss, used, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), used)

    wanted = penalty(plain)
    with seqfuse.backend(backend):
        found = penalty(fused)
    for a, b in zip(found, wanted, strict=True):
        for g, h in zip(a, b, strict=True):
            close(g, h, 1e-4)


SAME_TWICE = {
    "gru_cell": lambda t: ops.gru_cell(t[0], t[0], *t[1:3]),
    "lstm_cell": lambda t: sum(ops.lstm_cell(t[3], (t[0], t[0]), *t[4:6])),
    "attention": lambda t: ops.attention(t[6], t[6], t[6]),
    "keys-are-values": lambda t: ops.attention(t[6] * 2, t[6], t[6]),
    "swiglu": lambda t: ops.swiglu(t[0], t[0] * t[0]),
    "layer_norm": lambda t: ops.layer_norm(ops.layer_norm(t[0], t[7], t[7]), t[7], t[8], zero_centered=True),
    "rms_norm": lambda t: ops.rms_norm(ops.rms_norm(t[0], t[7]), t[7], zero_centered=True),
    "linear_cross_entropy": lambda t: ops.linear_cross_entropy(t[0] @ t[9].t() @ t[9], t[9], torch.arange(6)),
    "kl_loss": lambda t: ops.kl_loss(t[0] @ t[9].t() @ t[9], t[9], torch.ones(6, 8).to(t[0]), V[:12, :8].to(t[0])),
}


@pytest.mark.parametrize("call", SAME_TWICE)
def test_gradients_of_gradients_of_inputs_that_depend_on_each_other(call):
    shapes = [(6, 8), (24, 8), (24, 8), (6, 8), (32, 8), (32, 8), (2, 2, 6, 8), (8,), (8,), (12, 8)]
    wide = [torch.randn(s, dtype=torch.float64) / 2 for s in shapes]

    def gradients(tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = SAME_TWICE[call](leaves)
        first = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True, allow_unused=True)
        used = [g for g in first if g is not None]
        second = torch.autograd.grad(sum(g.square().sum() for g in used), leaves, allow_unused=True)
        return [*used, *(g for g in second if g is not None)]

    with seqfuse.backend("reference"):
        wanted = gradients(wide)
    with seqfuse.backend("cpu"):
        found = gradients([t.float() for t in wide])
    for a, b in zip(found, wanted, strict=True):
        close(a.double(), b, 1e-4)


@pytest.mark.parametrize("again", [False, True], ids=["saved", "checkpointed"])
@pytest.mark.parametrize("module", ["LSTM", "GRU", "LayerNorm", "GRUCell"])
def test_gradients_of_gradients_with_hooks_on_what_is_saved(module, again):
    plain = getattr(torch.nn, module)(*((16,) if module == "LayerNorm" else (16, 16)))
    fused, x = seqfuse.fuse(copy.deepcopy(plain)), torch.randn(64, 8, 16)[: 1 if module == "GRUCell" else 64]
    x = x.squeeze(0).requires_grad_()

    def penalty(model):
        with torch.autograd.graph.save_on_cpu():
            y = checkpoint(model, x, use_reentrant=False) if again else model(x)
            y = y if isinstance(y, torch.Tensor) else y[0]
            (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), [x, *model.parameters()], allow_unused=True)

    with seqfuse.backend("cpu"):
        found = penalty(fused)
    for a, b in zip(found, penalty(plain), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, 1e-4)


# torch.func

CALLS = {
    "layer_norm": (lambda x: ops.layer_norm(x, W[:64], B[:64]), (40, 64)),
    "rms_norm": (lambda x: ops.rms_norm(x, W[:64]), (40, 64)),
    "swiglu": (lambda x: ops.swiglu(x, x + 1), (40, 64)),
    "geglu": (lambda x: ops.geglu(x, x + 1), (40, 64)),
    "rope": (lambda x: ops.rope(x, *TABLES), (2, 2, 10, 16)),
    "attention": (lambda x: ops.attention(x, x, x, causal=True), (2, 2, 10, 16)),
    "cross_entropy": (lambda x: ops.cross_entropy(x, TARGET), (40, 64)),
    "linear_cross_entropy": (lambda x: ops.linear_cross_entropy(x, V, TARGET), (40, 64)),
    "losses": (lambda x: ops.linear_cross_entropy(x, V, TARGET, reduction="none"), (40, 64)),
    "kl_loss": (lambda x: ops.kl_loss(x, V, x.detach() + 1, V), (40, 64)),
    "linear": (lambda x: ops.linear(x, V, V[:, 0]), (40, 64)),
    "gru_cell": (lambda x: ops.gru_cell(x, x / 2, *CELL), (4, 16)),
    "gru": (lambda x: ops.gru(x, None, [CELL])[0], (5, 4, 16)),
}
with torch.random.fork_rng():
    torch.manual_seed(1)
    W, B, V, TARGET = torch.randn(64), torch.randn(64), torch.randn(64, 64) / 8, torch.randint(0, 64, (40,))
    TABLES, CELL = (torch.randn(10, 8).cos(), torch.randn(10, 8).sin()), (torch.randn(48, 16) / 4, torch.randn(48, 16))


def case(call):
    function, shape = CALLS[call]
    return function, torch.randn(shape), torch.randn(shape)


def skip_if_linear(call, backend):
    if (call, backend) == ("linear", "cpu"):
        pytest.skip("linear leaves transforms of torch.func to PyTorch")


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("call", CALLS)
def test_vjp_and_grad(call, backend):
    skip_if_linear(call, backend)
    function, x, _ = case(call)
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    weights = torch.randn(out.shape)
    (wanted,) = torch.autograd.grad(out, leaf, weights)
    with seqfuse.backend("reference"):
        (first,) = torch.autograd.grad((function(leaf) * weights).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
    with seqfuse.backend(backend):
        close(torch.func.vjp(function, x)[1](weights)[0], wanted)
        close(torch.func.grad(lambda x: (function(x) * weights).sum())(x), wanted)
        if (call, backend) == ("attention", "auto"):
            return  # at this size PyTorch's own op, which has no second derivative
        once = torch.func.grad(lambda x: (function(x) * weights).square().sum())
        close(torch.func.grad(lambda x: once(x).square().sum())(x), second, 1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("call", CALLS)
def test_batches_of_gradients(call, backend):
    """Rows of the Jacobian, and gradients of several samples."""
    skip_if_linear(call, backend)
    function, x, _ = case(call)
    rows = torch.randn(3, *function(x).shape)
    with seqfuse.backend(backend):
        _, back = torch.func.vjp(function, x)
        each = torch.stack([back(row)[0] for row in rows])
        close(torch.vmap(back)(rows)[0], each)
        xs = torch.stack([x, x / 2])
        loss = torch.func.grad(lambda x: function(x).square().sum())
        close(torch.vmap(loss)(xs), torch.stack([loss(x) for x in xs]))


@pytest.mark.parametrize("call", [c for c in CALLS if c not in ("gru_cell", "gru")])
def test_batches_of_gradients_of_a_graph(call):
    function, x, _ = case(call)
    x.requires_grad_()
    rows = torch.randn(3, *function(x).shape)
    with seqfuse.backend("cpu"):
        (found,) = torch.autograd.grad(function(x), x, rows, is_grads_batched=True)
        close(found, torch.stack([torch.autograd.grad(function(x), x, row)[0] for row in rows]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("module", [torch.nn.LayerNorm(16), torch.nn.RMSNorm(16), torch.nn.GRU(16, 16)], ids=str)
def test_modules_with_parameters_that_want_gradients(module):
    fused, x = seqfuse.fuse(copy.deepcopy(module)), torch.randn(400, 3, 16)

    def call(model, x):
        y = model(x)
        return (y if isinstance(y, torch.Tensor) else y[0]).flatten()[:3]

    for transform in (torch.func.jacrev, lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones(3))[0]):
        close(transform(lambda x: call(fused, x))(x).detach(), transform(lambda x: call(module, x))(x).detach())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("call", CALLS)
def test_gradients_from_outside_of_a_transform(call):
    """vmap and vjp of something that plain autograd differentiates: what a level has wrapped wants a gradient too."""
    skip_if_linear(call, "cpu")
    function, x, _ = case(call)
    both = torch.stack([x, x / 2]).requires_grad_()
    with seqfuse.backend("cpu"):
        (found,) = torch.autograd.grad(torch.vmap(function)(both).square().sum(), both)
        (each,) = torch.autograd.grad(sum(function(t).square().sum() for t in both.unbind()), both)
        close(found, each)


@pytest.mark.parametrize("loss", ["linear_cross_entropy", "kl_loss"])
def test_a_value_that_a_transform_gives_back_is_differentiated_outside(loss):
    x, w = torch.randn(40, 64), V.clone().requires_grad_()

    def call(x, w):
        return ops.linear_cross_entropy(x, w, TARGET) if loss[0] == "l" else ops.kl_loss(x, w, x.detach() + 1, V)

    with seqfuse.backend("cpu"):
        _, value = torch.func.grad_and_value(lambda x: call(x, w * 2))(x)
        close(torch.autograd.grad(value, w)[0], torch.autograd.grad(call(x, w * 2), w)[0])


def test_rope_is_differentiated_by_what_arrives():
    x, z = torch.randn(1, 2, 10, 16), torch.randn(1, 2, 10, 16)

    def penalty(z):
        return torch.func.grad(lambda x: (ops.rope(x, *TABLES) * z).sum())(x).pow(3).sum()

    with seqfuse.backend("reference"):
        wanted = torch.func.grad(penalty)(z)
    with seqfuse.backend("cpu"):
        close(torch.func.grad(penalty)(z), wanted)
    assert wanted.abs().max() > 0


def test_dropout_is_differentiated_twice():
    x, w = torch.randn(30, 16, requires_grad=True), torch.randn(16, requires_grad=True)

    def second(backend, wanted):
        torch.manual_seed(5)
        with seqfuse.backend(backend):
            (first,) = torch.autograd.grad(ops.layer_norm(x, w, w, dropout_p=0.3).pow(3).sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), wanted)

    for wanted in ([x], [x, w]):
        for a, b in zip(second("cpu", wanted), second("reference", wanted), strict=True):
            close(a, b, 1e-4)


def test_only_the_sum_over_keys_is_differentiated_twice():
    q, v = torch.randn(1, 2, 6, 8, requires_grad=True), torch.randn(1, 2, 6, 8, requires_grad=True)

    def second(backend, kept):
        with seqfuse.backend(backend), kept():
            lse = ops.attention(q, q, v, return_lse=True)[1]
            (first,) = torch.autograd.grad(lse.square().sum(), q, create_graph=True)
            return torch.autograd.grad(first.square().sum(), q)[0]

    wanted = second("reference", contextlib.nullcontext)
    for kept in (contextlib.nullcontext, torch.autograd.graph.save_on_cpu):
        close(second("cpu", kept), wanted, 1e-4)


# Forward mode


def test_decoding_has_no_forward_derivative_on_a_kernel():
    q, cache = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 4, 8)
    call = lambda q: ops.attention_with_kv_cache(q, cache, cache, cache_lengths=torch.tensor([4]))  # noqa: E731
    assert torch.func.jvp(call, (q,), (torch.ones_like(q),))[1].abs().max() > 0
    with seqfuse.backend("cpu"), pytest.raises(RuntimeError, match="no forward-mode derivative of attention_decode"):
        torch.func.jvp(call, (q,), (torch.ones_like(q),))


@pytest.mark.parametrize("call", CALLS)
def test_forward_mode_is_pytorchs(call):
    function, x, tangent = case(call)
    leaf = x.clone().requires_grad_()
    rows = torch.randn(function(x).shape)
    _, found = torch.func.jvp(function, (x,), (tangent,))
    (back,) = torch.autograd.grad(function(leaf), leaf, rows)
    torch.testing.assert_close((found * rows).sum(), (back * tangent).sum(), rtol=1e-4, atol=1e-4)
    assert found.abs().max() > 0
    if call == "linear":
        return  # PyTorch's own product
    with pytest.raises(RuntimeError, match="no forward-mode derivative"), seqfuse.backend("cpu"):
        torch.func.jvp(function, (x,), (tangent,))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", [torch.nn.LayerNorm, torch.nn.RMSNorm, lambda n: torch.nn.Linear(n, n)])
def test_forward_mode_of_modules_that_were_called_before(make, grad):
    module = make(256)
    fused, x, tangent = seqfuse.fuse(copy.deepcopy(module)), torch.randn(600, 256), torch.randn(600, 256)

    def derivative(model):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent

    with torch.set_grad_enabled(grad):
        for _ in range(3):
            fused(x)
            close(derivative(fused), derivative(module))
    before = dispatch.epoch()
    with forward_ad.dual_level():
        assert dispatch.epoch() != before
    assert dispatch.epoch() == before


def test_the_door_is_not_for_tangents():
    gate, tangent = torch.randn(8, 8), torch.ones(8, 8)
    ops.swiglu(gate, gate)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(gate, tangent)
        found = forward_ad.unpack_dual(ops.swiglu(dual, gate)).tangent
        close(found, forward_ad.unpack_dual(F.silu(dual) * gate).tangent)
