"""lstm_cell, gru_cell and rnn_cell: one step, for loops that a sequence op can't express.

Two products, then one fused kernel where PyTorch runs a chain of ten small ops on the CPU; for small batches the
products are in that kernel too, else ATen's. The weights' gradients of a loop are taken all at once (rnn_cell_loop.py).
On a GPU PyTorch has a fused cell of its own and gets the call.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import _VF

from seqfuse import dispatch, native, reference
from seqfuse.ops import checks, library
from seqfuse.ops.autograd import (
    apply,
    autocast_is_on,
    differentiable_gradients,
    forward_mode,
    is_differentiated,
    may_write,
    traced,
)
from seqfuse.ops.products import SLOW_BF16, addmm, linear, many_rows_pay, matmul
from seqfuse.ops.rnn_cell_loop import loop_of
from seqfuse.ops.rnn_scan import CELLS

MOST_ROWS = 48  # of a batch whose products the step's kernel takes; ATen's are faster with more

# From so many on the step's kernel takes longer than ATen's product with h alone (Granite Rapids, two threads, GRU of
# 384: 203 us and 170 at 32 rows, 117 both at 16)
MANY_ROWS = 32


class CellCase(NamedTuple):
    """What the choice of a backend may depend on."""

    cell: str
    device: str
    dtype: torch.dtype
    B: int
    hidden_size: int
    grad: bool

    def shape_class(self) -> str:
        batch = dispatch.size_class(self.B)
        return f"{self.cell} {str(self.dtype)[6:]} B{batch} H{self.hidden_size}{' grad' if self.grad else ''}"


def lstm_cell(x, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """One LSTM step, as torch.nn.LSTMCell computes it.

    x: [B, I]. hx: (h, c), each [B, H], or None for zeros. w_ih: [4H, I], w_hh: [4H, H], b_ih, b_hh: [4H] or both None;
    gates i f g o. Returns (h, c), each [B, H]. Raises TypeError or ValueError on bad arguments.
    """
    h, c = hx if hx is not None else (None, None)
    return _run("lstm_cell", "lstm", x, h, c, w_ih, w_hh, b_ih, b_hh)


def gru_cell(x, h, w_ih, w_hh, b_ih=None, b_hh=None):
    """One GRU step, as torch.nn.GRUCell computes it: arguments as `lstm_cell` with 3H rows (r z n). Returns h."""
    return _run("gru_cell", "gru", x, h, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_cell(x, h, w_ih, w_hh, b_ih=None, b_hh=None, *, nonlinearity="tanh"):
    """One Elman step, as torch.nn.RNNCell computes it: arguments as `lstm_cell` with H rows. Returns h [B, H]."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn_cell: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return _run("rnn_cell", f"rnn_{nonlinearity}", x, h, None, w_ih, w_hh, b_ih, b_hh)[0]


def _run(op, cell, x, h, c, w_ih, w_hh, b_ih, b_hh):
    _check(op, cell, x, h, c, w_ih, w_hh, b_ih, b_hh)
    tensors = [x, h, c, w_ih, w_hh, b_ih, b_hh]
    if autocast_is_on(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    x, h, c, w_ih, w_hh, b_ih, b_hh = tensors
    H = w_hh.shape[1]
    if h is None:
        h = x.new_zeros(x.shape[0], H)
        c = x.new_zeros(x.shape[0], H) if cell == "lstm" else None
    elif c is h:  # Dynamo takes no tensor twice
        c = h.clone()
    grad = torch.is_grad_enabled() and (traced() or any(t is not None and t.requires_grad for t in tensors))
    case = CellCase(cell, x.device.type, x.dtype, x.shape[0], H, grad)
    name = dispatch.select("rnn_cell", case).backend
    return run(name, cell, x, h, c, (w_ih, w_hh, b_ih, b_hh), grad)


def run(name, cell, x, h, c, weights, grad):
    """(h, c or None) of checked arguments on the backend `name`. grad: whether any of them wants one."""
    w_ih, w_hh, b_ih, b_hh = weights
    if name == "torch":
        state = (h, c) if cell == "lstm" else h
        out = _TORCH[cell](x, state, w_ih, w_hh, b_ih, b_hh)
        return out if cell == "lstm" else (out, None)
    if name == "reference":
        return reference.rnn_cell(cell, F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh), h, c)
    if not (grad or traced()):  # without a gradient to take, autograd's part of the way is left out
        h, c, _ = RnnCellFunction.forward(x, h, c, *weights, None, cell, False, None)
        return h, c
    loop = ticket = None
    if not traced() and torch._C._get_tracing_state() is None:  # torch.jit.trace would record the tickets
        loop, begun = loop_of(cell, x, h, weights)
        ticket = loop.ticket(cell) if begun else None
    h, c, _ = apply(RnnCellFunction, x, h, c, *weights, ticket, cell, grad, loop)
    return h, c


class StepCell:
    """A cell in a loop of generation: each kind of call is checked, and its backend chosen, once.

    cell: "lstm", "gru", "rnn_tanh" or "rnn_relu". weights: (w_ih, w_hh, b_ih, b_hh) as lstm_cell takes them, which no
    other may take the place of while the loop goes on.
    """

    def __init__(self, cell, weights):
        self.cell, self.weights = cell, weights
        self._known = {}  # by kind of call: (what runs it, choice, case)
        self._table = self._made_of = None  # products with an embedding; of what they were taken

    def __call__(self, x, h, c=None):
        """x: [B, I], h: [B, H], c of an LSTM alike -> the next state, (h,) or (h, c)."""
        if torch.is_grad_enabled() or traced() or forward_mode() or autocast_is_on(x):
            return self._state(*_run(f"{self.cell} cell", self.cell, x, h, c, *self.weights))
        key = x.shape, x.dtype, dispatch.epoch(), torch.get_num_threads()
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._chosen(x, h, c)
        step, choice, case = found
        dispatch.tell(choice, case)
        return self._state(*step(x, h, c))

    def looked_up(self, ids, embedding, h, c=None):
        """The same of x = embedding[ids], ids [B] int64 and embedding [V, I]: with many rows of few tokens x's product
        is taken once for each token."""
        B, V = ids.shape[0], embedding.shape[0]
        many = B >= MANY_ROWS and V <= 4 * B  # a table of more tokens takes more products than some steps save
        if not many or torch.is_grad_enabled() or not may_write(h) or self._backend(embedding, B) != "cpu":
            return self(embedding.index_select(0, ids), h, c)
        _, w_hh, _, b_hh = self.weights
        xg, a = self._products(embedding).index_select(0, ids), linear(h, w_hh, b_hh)
        h, c, _ = torch.ops.seqfuse.rnn_cell_fwd(CELLS[self.cell], xg, a, h if self.cell == "gru" else None, c, False)
        return self._state(h, c)

    def _products(self, embedding):
        """x's product for every token, [V, G*H]; taken again once the embedding or the weights have changed."""
        w_ih, _, b_ih, _ = self.weights
        read = [t for t in (embedding, w_ih, b_ih) if t is not None]
        if any(t.is_inference() for t in read):  # they tell nobody when they change
            return linear(embedding, w_ih, b_ih)
        made_of = embedding, [t._version for t in read]
        if self._table is None or made_of[0] is not self._made_of[0] or made_of[1] != self._made_of[1]:
            self._table, self._made_of = linear(embedding, w_ih, b_ih), made_of
        return self._table

    def _backend(self, x, B):
        if autocast_is_on(x):
            return None
        case = CellCase(self.cell, x.device.type, x.dtype, B, self.weights[1].shape[1], False)
        return dispatch.select("rnn_cell", case).backend

    def _chosen(self, x, h, c):
        _check(f"{self.cell} cell", self.cell, x, h, c, *self.weights)
        case = CellCase(self.cell, x.device.type, x.dtype, x.shape[0], h.shape[1], False)
        choice = dispatch.select("rnn_cell", case)
        if choice.backend == "cpu" and _small_step(self.cell, x, h):
            number, op = CELLS[self.cell], torch.ops.seqfuse.rnn_cell_step.default
            return lambda x, h, c: op(number, x, h, c, *self.weights, False)[:2], choice, case
        return lambda x, h, c: run(choice.backend, self.cell, x, h, c, self.weights, False), choice, case

    def _state(self, h, c):
        return (h, c) if self.cell == "lstm" else (h,)


_TORCH = {"lstm": _VF.lstm_cell, "gru": _VF.gru_cell, "rnn_tanh": _VF.rnn_tanh_cell, "rnn_relu": _VF.rnn_relu_cell}


def _check(op, cell, x, h, c, w_ih, w_hh, b_ih, b_hh):
    gates = reference.GATES[cell]
    checks.tensor(op, "x", x, dims=(2,))
    checks.tensor(op, "w_hh", w_hh, dims=(2,))
    H = w_hh.shape[1]
    if (b_ih is None) != (b_hh is None):
        raise ValueError(f"{op}: b_ih and b_hh must be given both or not at all")
    if cell == "lstm" and (h is None) != (c is None):
        raise ValueError(f"{op}: hx must hold both h and c, or be None")
    wanted = {
        "w_ih": (w_ih, (gates * H, x.shape[1])),
        "w_hh": (w_hh, (gates * H, H)),
        "b_ih": (b_ih, (gates * H,)),
        "b_hh": (b_hh, (gates * H,)),
        "h": (h, (x.shape[0], H)),
        "c": (c, (x.shape[0], H)),
    }
    autocast = autocast_is_on(x)
    for name, (t, shape) in wanted.items():
        if t is None and name not in ("w_ih", "w_hh"):
            continue
        checks.tensor(op, name, t)
        checks.shape(op, name, t, shape)
        checks.same_device(op, name, t, "x", x)
        if not autocast:
            checks.same_dtype(op, name, t, "x", x)


def _small_step(cell, x, h):
    """Whether the products of a step are taken in its kernel."""
    return (cell == "lstm" or cell == "gru") and x.shape[0] <= MOST_ROWS and not traced()


class RnnCellFunction(torch.autograd.Function):
    """Autograd of the CPU kernel. gates is an output only so that it can be saved. ticket: by which gradients of the
    weights go to the node that a loop's steps share, or None: they are taken in the step itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, h, c, w_ih, w_hh, b_ih, b_hh, ticket, cell, save, loop):
        if _small_step(cell, x, h):
            return torch.ops.seqfuse.rnn_cell_step(CELLS[cell], x, h, c, w_ih, w_hh, b_ih, b_hh, save)
        xg, a = linear(x, w_ih, b_ih), linear(h, w_hh, b_hh)  # (B, G*H) each
        return torch.ops.seqfuse.rnn_cell_fwd(CELLS[cell], xg, a, h if cell == "gru" else None, c, save)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h, c, w_ih, w_hh, b_ih, b_hh, ticket, cell, save, loop = inputs
        h_out, c_out, gates = output
        ctx.mark_non_differentiable(gates)
        if cell != "lstm":
            ctx.mark_non_differentiable(c_out)
        ctx.set_materialize_grads(False)
        if save:
            ctx.save_for_backward(x, h, c, w_ih, w_hh, b_ih, b_hh, h_out, c_out, gates)
        ctx.cell, ctx.loop, ctx.has_ticket = cell, loop, ticket is not None

    @staticmethod
    def backward(ctx, dh_out, dc_out, _gates):
        x, h, c, w_ih, w_hh, b_ih, b_hh, h_out, c_out, gates = ctx.saved_tensors
        cell, needs = ctx.cell, ctx.needs_input_grad
        dc_out = dc_out if cell == "lstm" else None  # torch.compile hands in zeros for the empty placeholder
        if dh_out is None and dc_out is None:
            return (None,) * 11
        if is_differentiated(dh_out, dc_out, x, h, c, w_ih, w_hh, b_ih, b_hh):
            found = _differentiable_backward(cell, (x, h, c, w_ih, w_hh, b_ih, b_hh), (dh_out, dc_out), needs)
            return *found, None, None, None, None
        gru, lstm = cell == "gru", cell == "lstm"
        by_ticket, step = ctx.has_ticket, _small_step(cell, x, h)
        before = dh_out, dc_out, gates
        if step:
            rows, dx, dh, dc = torch.ops.seqfuse.rnn_cell_step_bwd(
                CELLS[cell], *before, x, h, c, h_out, c_out if lstm else None, w_ih, w_hh, needs[0], needs[1]
            )
        else:
            rows, da, dh, dc = torch.ops.seqfuse.rnn_cell_bwd(
                CELLS[cell], *before, h if gru or by_ticket else None, c, h_out, c_out if lstm else None,
                x if by_ticket else None,
            )  # fmt: skip
        dw_ih = dw_hh = db_ih = db_hh = None
        if not (step and by_ticket):
            dxg, gradients = rows, w_hh.shape[0]
            if step or by_ticket:
                dxg = rows[:, :gradients]
                da = rows[:, gradients : 2 * gradients] if gru else dxg
            elif not gru:
                da = dxg
        if not step:
            dx = matmul(dxg, w_ih) if needs[0] else None
            if needs[1]:
                dh = addmm(dh, da, w_hh) if gru else matmul(da, w_hh)
        if not by_ticket:
            dw_ih = matmul(dxg.t(), x) if needs[3] else None
            dw_hh = matmul(da.t(), h) if needs[4] else None
            db_ih = dxg.sum(0) if needs[5] else None
            db_hh = da.sum(0) if needs[6] else None
        return (
            dx if needs[0] else None,
            dh if needs[1] else None,
            dc if needs[2] else None,
            dw_ih,
            dw_hh,
            db_ih,
            db_hh,
            rows if by_ticket else None,
            None,
            None,
            None,
        )


def _differentiable_backward(cell, inputs, grads, needs):
    """The backward pass through the reference, for create_graph=True."""

    def outputs(x, h, c, w_ih, w_hh, b_ih, b_hh):
        return reference.rnn_cell(cell, F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh), h, c)

    return differentiable_gradients(outputs, grads, inputs, needs)


def _fake_fwd(cell, xg, a, h, c, save):
    gated = cell >= CELLS["gru"]
    B, H = xg.shape[0], xg.shape[1] // (4 if cell == CELLS["lstm"] else 3 if gated else 1)
    lstm = cell == CELLS["lstm"]
    return xg.new_empty(B, H), xg.new_empty((B, H) if lstm else (0,)), xg.new_empty((B, 4 * H) if save and gated else 0)


def _fake_step(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, save):
    B, H = h.shape
    return (
        h.new_empty(B, H),
        h.new_empty((B, H) if cell == CELLS["lstm"] else (0,)),
        h.new_empty((B, 4 * H) if save else 0),
    )


def _fake_step_bwd(cell, dh_out, dc_out, gates, x, h, c, h_out, c_out, w_ih, w_hh, want_dx, want_dh):
    B, H = h.shape
    width = w_hh.shape[0] * (2 if cell == CELLS["gru"] else 1) + x.shape[1] + H
    empty = h.new_empty
    dx = empty((B, x.shape[1]) if want_dx else (0,))
    return empty(B, width), dx, empty(B, H), empty((B, H) if cell == CELLS["lstm"] else (0,))


def _fake_bwd(cell, dh_out, dc_out, gates, h, c, h_out, c_out, x):
    gru, lstm = cell == CELLS["gru"], cell == CELLS["lstm"]
    B, H = h_out.shape
    width = (4 if lstm else 3 if gru else 1) * H
    empty = h_out.new_empty
    if x is not None:
        width = width * (2 if gru else 1) + x.shape[1] + H
    dxg = empty(B, width)
    return dxg, empty((B, width) if gru and x is None else 0), empty((B, H) if gru else 0), empty((B, H) if lstm else 0)


library.register_fake("rnn_cell_fwd", _fake_fwd)
library.register_fake("rnn_cell_step", _fake_step)
library.register_fake("rnn_cell_step_bwd", _fake_step_bwd)
library.register_fake("rnn_cell_bwd", _fake_bwd)
for _name in ("rnn_cell_fwd", "rnn_cell_step", "rnn_cell_step_bwd", "rnn_cell_bwd"):
    library.register_vmap(_name)


def _cpu_prefers(case):
    """Measured with two threads on AVX2, AVX-512 and AMX (docs/recurrent.md)."""
    if not case.cell.startswith("rnn"):
        return None
    if case.dtype == torch.bfloat16:
        if SLOW_BF16 and (case.grad or case.B * case.hidden_size >= 512):
            return None
        if case.grad and native.isa_has("amx"):
            return None
    elif not case.grad and case.B <= 32 and many_rows_pay(case.B):
        if case.hidden_size >= (128 if native.isa() == "avx512" else 512):  # H 256 on Zen 4: 0.89
            return None  # its two products are (ops/products.py)
    return "after its two products a plain cell is one activation: nothing to fuse, and PyTorch gets there sooner"


def _never(*_):
    raise AssertionError("one step is run by rnn_cell.py itself")


dispatch.register(
    "rnn_cell",
    dispatch.Backend("cpu", _never, _never, lambda c: library.cpu_refusal(c.device, c.dtype), _cpu_prefers),
    dispatch.Backend("torch", _never, None, note="PyTorch's own cell"),
    dispatch.Backend("reference", _never, None),
)
