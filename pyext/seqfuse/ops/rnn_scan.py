"""The scan of one layer and direction as registered ops, one pair for each backend.

Contract: csrc/include/seqfuse/rnn.h; meaning: reference/rnn.py. The options of a scan are the first eight fields of
reference.ScanOptions, in their order; layer normalisation and projection are the reference's alone.
"""

import functools

import torch

from seqfuse import dispatch
from seqfuse.ops import library

CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3}  # csrc/include/seqfuse/rnn.h: enum class Cell
FUSED_OPTIONS = 8  # how many of ScanOptions the fused scans take


def tf32_allowed() -> bool:
    """Whether torch lets matrix products of float32 on a GPU use tf32: torch.set_float32_matmul_precision, or
    torch.backends.cuda.matmul.fp32_precision, which knows of the former."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# Dynamo can't trace it; its guards hold the setting all the same. torch.compiler.assume_constant_result does no more
# than this, and imports the whole of Dynamo for it: a second of every `import seqfuse`.
tf32_allowed._dynamo_marked_constant = True


def _scan_of(namespace, name="rnn_scan", extra=tuple):
    """extra(): what the ops want beyond what every backend's scan is called with."""

    def fwd(cell, *args):
        return getattr(getattr(torch.ops, namespace), f"{name}_fwd")(CELLS[cell], *args, *extra())

    def bwd(cell, *args):
        return getattr(getattr(torch.ops, namespace), f"{name}_bwd")(CELLS[cell], *args, *extra())

    return dispatch.Backend(namespace, fwd, bwd)


def _tf32():
    return (tf32_allowed(),)


# "cpu" and "cuda" are one torch op: torch's dispatcher goes by the tensors' device
SCAN = {
    "cpu": _scan_of("seqfuse"),
    "cuda": _scan_of("seqfuse", extra=_tf32),
    "triton": _scan_of("seqfuse_triton"),
}
# Backends that run both directions of a layer in one go. The same arguments, without `reverse`, of tensors that lie
# together: csrc/include/seqfuse/rnn_both.h. The CPU has the op too, as one scan after the other, for tests: there is
# nothing to be gained.
SCAN_BOTH = {"cuda": _scan_of("seqfuse", "rnn_scan_both", extra=_tf32)}
SCAN_BOTH_ON_CPU = _scan_of("seqfuse", "rnn_scan_both")


def scan_of(call):
    """The backend of an rnn_layer.ScanCall."""
    return SCAN_BOTH[call.backend] if call.both else SCAN[call.backend]


def way(call):
    """The argument of a scan's direction, which a scan of both has not."""
    return () if call.both else (call.reverse,)


def scan_backward(call, grads, y, gates, cells, first, w_hh, options, overwrite):
    """The backward pass of one scan: (dxg, dan, dh0, dc0, db_hh). call: an rnn_layer.ScanCall; grads: (dy, dh_n, dc_n,
    dcells); first: (h0, c0). overwrite: nobody looks at the saved gates again, so the CPU's kernel may put dxg and dan
    in their place: the largest tensor of the backward pass is then none of its own."""
    args = (*grads, y, gates, cells, *first, w_hh, *options)
    if not overwrite or call.both or call.backend != "cpu" or call.cell not in ("gru", "lstm"):
        return scan_of(call).bwd(call.cell, *args, *way(call))
    rest = torch.ops.seqfuse.rnn_scan_bwd_in_gates(CELLS[call.cell], *args, call.reverse)
    width = w_hh.shape[0]
    return gates[..., :width], gates[..., width:], *rest


def batch_major(x):
    """Whether x [T, B, I] is a view of contiguous [B, T, I] memory (and not also time-major)."""
    return x.dim() == 3 and not x.is_contiguous() and x.transpose(0, 1).is_contiguous()


def by_sequence(x):
    """batch_major, also of columns of such a tensor, which are not dense."""
    return x.dim() == 3 and not x.is_contiguous() and x.stride(1) == x.shape[0] * x.stride(0)


def _time_major(like, width, dtype=None):
    return like.new_empty(*like.shape[:-1], width, dtype=dtype)


def _empty_like_layout(like, width, dtype=None):
    if batch_major(like):
        T, B = like.shape[:2]
        return like.new_empty(B, T, width, dtype=dtype).transpose(0, 1)
    return _time_major(like, width, dtype)


def _fake_fwd(cell, xg, h0, c0, w_hh, b_hh, lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h,
              zoneout_c, reverse, save, want_cells, tf32=False, saved=_empty_like_layout):  # fmt: skip
    """saved(like, width): how the backend lays out what it saves."""
    B, H = h0.shape
    lstm = cell == CELLS["lstm"]
    width = 4 * H if cell >= CELLS["gru"] else H if zone_h is not None or zoneout_h != 0.0 else 0
    gates = saved(xg, width) if save and width else xg.new_empty(0)
    cells = saved(xg, H, torch.float32) if lstm and (save or want_cells) else xg.new_empty(0, dtype=torch.float32)
    return _empty_like_layout(xg, H), h0.new_empty(B, H), h0.new_empty((B, H) if lstm else (0,)), gates, cells


def _fake_bwd(cell, dy, dh_n, dc_n, dcells, y, gates, cells, h0, c0, w_hh, *options_and_reverse,
              saved=_empty_like_layout):  # fmt: skip
    B, H = h0.shape
    like = gates if saved is _empty_like_layout and gates.dim() == y.dim() else y
    dan = saved(like, H) if cell == CELLS["gru"] else y.new_empty(0)
    dc0 = y.new_empty((B, H) if cell == CELLS["lstm"] else (0,))
    db = y.new_empty(w_hh.shape[0], dtype=torch.float32)
    return _empty_like_layout(like, w_hh.shape[0]), dan, y.new_empty(B, H), dc0, db


def _fake_both_fwd(cell, xg, h0, c0, w_hh, b_hh, lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h,
                   zoneout_c, save, want_cells, tf32=False):  # fmt: skip
    y, h_n, c_n, gates, cells = _fake_fwd(
        cell, xg, h0[0], c0, w_hh, b_hh, lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c,
        False, save, want_cells, saved=_time_major,
    )  # fmt: skip

    def twice(t):
        return t.new_empty(2, *t.shape) if t.dim() > 1 else t

    return _empty_like_layout(xg, 2 * h0.shape[-1]), twice(h_n), twice(c_n), twice(gates), twice(cells)


def _fake_both_bwd(cell, dy, dh_n, dc_n, dcells, y, gates, cells, h0, *rest):
    H, (_, w_hh) = h0.shape[-1], rest[:2]
    dan = _empty_like_layout(y, 2 * H) if cell == CELLS["gru"] else y.new_empty(0)
    dc0 = y.new_empty(h0.shape if cell == CELLS["lstm"] else (0,))
    db = y.new_empty(w_hh.shape[0], dtype=torch.float32)
    return _empty_like_layout(y, w_hh.shape[0]), dan, y.new_empty(h0.shape), dc0, db


def _launch(name):
    names = {number: cell for cell, number in CELLS.items()}
    launch = library.launcher("rnn", name)
    return lambda cell, *args: launch(names[cell], *args)


_OPTIONS = (
    "Tensor? lengths, Tensor? resets, Tensor? hidden_mask, Tensor? peephole, Tensor? zone_h, Tensor? zone_c,"
    " float zoneout_h, float zoneout_c"
)

library.register_triton(
    "rnn_scan_fwd",
    f"(int cell, Tensor xg, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? b_hh, {_OPTIONS}, bool reverse, bool save,"
    " bool want_cells) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    functools.partial(_fake_fwd, saved=_time_major),
    _launch("rnn_scan_fwd"),
)
library.register_triton(
    "rnn_scan_bwd",
    "(int cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor y, Tensor gates, Tensor cells,"
    f" Tensor h0, Tensor? c0, Tensor w_hh, {_OPTIONS}, bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    functools.partial(_fake_bwd, saved=_time_major),
    _launch("rnn_scan_bwd"),
)
library.register_fake("rnn_scan_fwd", _fake_fwd)
library.register_fake("rnn_scan_bwd", _fake_bwd)
library.register_fake("rnn_scan_bwd_in_gates", lambda *args: _fake_bwd(*args)[2:])
library.register_fake("rnn_scan_both_fwd", _fake_both_fwd)
library.register_fake("rnn_scan_both_bwd", _fake_both_bwd)
for _name in ("rnn_scan_fwd", "rnn_scan_bwd", "rnn_scan_both_fwd", "rnn_scan_both_bwd"):
    library.register_vmap(_name)
