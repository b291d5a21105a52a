"""One recurrent layer in one direction: the input's GEMM, the scan over time (which has backends), and their gradient.

Only the scan h_{t-1} -> h_t is sequential. Everything else is a GEMM over the whole sequence and is left to ATen:

    forward   xg = x @ w_ih^T + b_ih                      then the scan
    backward  the scan gives dxg (and, for a GRU, dan)    then  dx = dxg @ w_ih,  dw_ih = dxg^T @ x,
                                                                dw_hh = dxg^T @ h_prev,  db = sum(dxg)

so there are no atomics and the result is deterministic. Contract of the scan: csrc/include/seqfuse/rnn.h
"""

import torch
import torch.nn.functional as F

from seqfuse import dispatch, reference
from seqfuse.ops import library
from seqfuse.ops.autograd import apply, differentiable_gradients

CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3}  # csrc/include/seqfuse/rnn.h: enum class Cell


def rnn_layer(name, cell, x, h0, c0, weights, reverse):
    """Run one layer and direction on the backend `name`.

    x: [T, B, I], time-major or a view of batch-major memory. h0, c0: [B, H] or None.
    weights: (w_ih, w_hh) or (w_ih, w_hh, b_ih, b_hh).
    Returns (y [T, B, H] in x's layout, h_n [B, H], c_n [B, H] or None).
    """
    w_ih, w_hh, b_ih, b_hh = weights if len(weights) == 4 else (*weights, None, None)
    if name == "reference":
        return _reference(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse)
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, h_n, c_n, _, _ = apply(RnnLayerFunction, *tensors, cell, reverse, save, name)
    return y, h_n, c_n if cell == "lstm" else None


def _reference(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse):
    h0, c0 = _initial(cell, x, w_hh, h0, c0)
    return reference.rnn_scan(cell, F.linear(x, w_ih, b_ih), h0, c0, w_hh, b_hh, reverse)[:3]


def _initial(cell, x, w_hh, h0, c0):
    zeros = None
    if h0 is None or (c0 is None and cell == "lstm"):
        zeros = x.new_zeros(x.shape[1], w_hh.shape[1])
    return zeros if h0 is None else h0, (zeros if c0 is None else c0) if cell == "lstm" else None


def _batch_major(x):
    """Whether x [T, B, I] is a view of contiguous [B, T, I] memory (and not also time-major)."""
    return not x.is_contiguous() and x.transpose(0, 1).is_contiguous()


def _plain():
    """The options of a plain scan. As literals: with dynamic=True, Dynamo makes a symbol of a float from elsewhere."""
    return None, None, None, None, None, None, 0.0, 0.0


def _rows(x, batch_major):
    """[T, B, X] -> [T*B, X], in the order that copies nothing for a tensor of that layout."""
    return (x.transpose(0, 1) if batch_major else x).reshape(-1, x.shape[-1])


def _sequence(rows, like, batch_major):
    """The inverse of _rows."""
    T, B = like.shape[:2]
    return rows.view(B, T, -1).transpose(0, 1) if batch_major else rows.view(T, B, -1)


class RnnLayerFunction(torch.autograd.Function):
    """Autograd of every backend of the scan. gates and cells are outputs only so that they can be saved."""

    @staticmethod
    def forward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, cell, reverse, save, name):
        batch_major = _batch_major(x)
        xg = _sequence(F.linear(_rows(x, batch_major), w_ih, b_ih), x, batch_major)  # (T, B, G*H)
        h0, c0 = _initial(cell, x, w_hh, h0, c0)
        return SCAN[name].fwd(cell, xg, h0, c0, w_hh, b_hh, *_plain(), reverse, save, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, cell, reverse, save, name = inputs
        y, _, c_n, gates, cells = output
        ctx.mark_non_differentiable(gates, cells)
        if cell != "lstm":
            ctx.mark_non_differentiable(c_n)
        ctx.set_materialize_grads(False)
        if save:
            ctx.save_for_backward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, gates, cells)
        ctx.cell, ctx.reverse, ctx.name = cell, reverse, name

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _gates, _cells):
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, gates, cells = ctx.saved_tensors
        cell, reverse, needs = ctx.cell, ctx.reverse, ctx.needs_input_grad
        dc_n = dc_n if cell == "lstm" else None  # torch.compile hands in zeros for the empty placeholder
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * 11
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = (x, h0, c0, w_ih, w_hh, b_ih, b_hh)
            return *_differentiable_backward(cell, reverse, inputs, (dy, dh_n, dc_n)), None, None, None, None
        first_h, first_c = _initial(cell, x, w_hh, h0, c0)
        dxg, dan, dh0, dc0, db_hh = SCAN[ctx.name].bwd(
            cell, dy, dh_n, dc_n, None, y, gates, cells, first_h, first_c, w_hh, *_plain(), reverse
        )
        batch_major = _batch_major(dxg)
        d_rows = _rows(dxg, batch_major)  # (T*B, G*H)
        dx = dw_ih = dw_hh = db_ih = None
        if needs[0]:
            dx = _sequence(d_rows @ w_ih, x, batch_major)
        if needs[3]:
            dw_ih = d_rows.t() @ _rows(x, batch_major)
        if needs[4]:
            dw_hh = _dw_hh(cell, dxg, dan, y, h0, reverse, batch_major)
        if needs[5]:
            db_ih = db_hh.to(x.dtype)
            if cell == "gru":  # the n gate's two biases have different gradients
                H = w_hh.shape[1]
                db_n = d_rows[:, 2 * H :].sum(0, dtype=torch.float32)
                db_ih = torch.cat([db_hh[: 2 * H], db_n]).to(x.dtype)
        return (
            dx,
            dh0 if needs[1] else None,
            dc0 if needs[2] else None,
            dw_ih,
            dw_hh,
            db_ih,
            db_hh.to(x.dtype) if needs[6] else None,
            None,
            None,
            None,
            None,
        )


def _dw_hh(cell, dxg, dan, y, h0, reverse, batch_major):
    """sum over t of da_t^T @ h_{t-1}, as GEMMs over the whole sequence. a's gradient is dxg, but dan for a GRU's n."""
    before = y[1:] if reverse else y[:-1]  # h_{t-1} of every step but the first one that ran
    first, rest = (-1, slice(0, -1)) if reverse else (0, slice(1, None))

    def product(d):  # d: (T, B, X) -> (X, H)
        w = _rows(d[rest], batch_major).t() @ _rows(before, batch_major)
        return w if h0 is None else torch.addmm(w, d[first].t(), h0)

    if cell != "gru":
        return product(dxg)
    H = y.shape[-1]
    return torch.cat([product(dxg[..., : 2 * H]), product(dan)])


def _differentiable_backward(cell, reverse, inputs, grads):
    """The backward pass through the reference, for create_graph=True."""
    return differentiable_gradients(_reference(cell, *inputs, reverse), grads, inputs)


def _scan_of(namespace):
    def fwd(cell, *args):
        return getattr(torch.ops, namespace).rnn_scan_fwd(CELLS[cell], *args)

    def bwd(cell, *args):
        return getattr(torch.ops, namespace).rnn_scan_bwd(CELLS[cell], *args)

    return dispatch.Backend(namespace, fwd, bwd)


# "cpu" and "cuda" are one torch op: torch's dispatcher goes by the tensors' device
SCAN = {"cpu": _scan_of("seqfuse"), "cuda": _scan_of("seqfuse"), "triton": _scan_of("seqfuse_triton")}


def _empty_rows(like, width, dtype=None):
    """An empty [T, B, width], or packed [N, width]."""
    return like.new_empty(*like.shape[:-1], width, dtype=dtype)


def _empty_like_layout(like, width):
    if like.dim() == 3 and _batch_major(like):
        T, B = like.shape[:2]
        return like.new_empty(B, T, width).transpose(0, 1)
    return _empty_rows(like, width)


def _fake_fwd(cell, xg, h0, c0, w_hh, b_hh, *options):
    *_, zone_h, _zone_c, zoneout_h, _zoneout_c, _reverse, save, want_cells = options
    B, H = h0.shape
    lstm = cell == CELLS["lstm"]
    saved = 4 if cell >= CELLS["gru"] else int(zone_h is not None or zoneout_h != 0)
    gates = _empty_rows(xg, saved * H) if save and saved else xg.new_empty(0)
    kept = lstm and (save or want_cells)
    cells = _empty_rows(xg, H, torch.float32) if kept else xg.new_empty(0, dtype=torch.float32)
    return _empty_like_layout(xg, H), h0.new_empty(B, H), h0.new_empty((B, H) if lstm else (0,)), gates, cells


def _fake_bwd(cell, dy, dh_n, dc_n, dcells, y, gates, cells, h0, c0, w_hh, *options):
    B, H = h0.shape
    dan = _empty_like_layout(y, H) if cell == CELLS["gru"] else y.new_empty(0)
    dc0 = y.new_empty((B, H) if cell == CELLS["lstm"] else (0,))
    db = y.new_empty(w_hh.shape[0], dtype=torch.float32)
    return _empty_like_layout(y, w_hh.shape[0]), dan, y.new_empty(B, H), dc0, db


def _launch(name, before):
    """The Triton launcher of an op, which takes the plain scan: `before` arguments, then the options, then the rest."""
    names = {number: cell for cell, number in CELLS.items()}
    launch = library.launcher("rnn", name)

    def call(cell, *args):
        options, rest = args[before : before + 8], args[before + 8 :]
        if options != _plain():
            raise ValueError("the Triton launchers run the plain scan only, without options")
        if name == "rnn_scan_fwd":
            *rest, want_cells = rest
            plain = args[:before]
            extra = want_cells and not rest[-1]
        else:
            plain, extra = args[:3] + args[4:before], args[3] is not None  # dcells
        if extra:
            raise ValueError("the Triton launchers neither return cells without save nor take dcells")
        return launch(names[cell], *plain, *rest)

    return call


_OPTIONS = (
    "Tensor? lengths, Tensor? resets, Tensor? hidden_mask, Tensor? peephole, Tensor? zone_h, Tensor? zone_c,"
    " float zoneout_h, float zoneout_c, bool reverse"
)
library.register_op(
    "rnn_scan_fwd",
    f"(int cell, Tensor xg, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? b_hh, {_OPTIONS}, bool save, bool want_cells)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
    _launch("rnn_scan_fwd", 5),
)
library.register_op(
    "rnn_scan_bwd",
    "(int cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor y, Tensor gates, Tensor cells,"
    f" Tensor h0, Tensor? c0, Tensor w_hh, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
    _launch("rnn_scan_bwd", 10),
)
