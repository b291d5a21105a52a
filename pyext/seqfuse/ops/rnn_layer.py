"""One recurrent layer in one direction: the input's GEMM, the scan over time (which has backends), and their gradient.

Only the scan h_{t-1} -> h_t is sequential. Everything else is a GEMM over the whole sequence and is left to ATen:

    forward   xg = x @ w_ih^T + b_ih                      then the scan
    backward  the scan gives dxg (and, for a GRU, dan)    then  dx = dxg @ w_ih,  dw_ih = dxg^T @ x,
                                                                dw_hh = dxg^T @ h_prev,  db = sum(dxg)

so there are no atomics and the result is deterministic. Contract of the scan: csrc/include/seqfuse/rnn.h
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from seqfuse import reference
from seqfuse.ops import rnn_ragged
from seqfuse.ops.autograd import (
    apply,
    differentiable_gradients,
    freed_afterwards,
    is_differentiated,
    may_write,
    traced,
)
from seqfuse.ops.products import linear, matmul
from seqfuse.ops.rnn_gradients import (
    bias_gradients,
    checkpoints,
    dw_hh,
    flat_rows,
    from_rows,
    over_rows,
    peephole_gradient,
    recomputed_scan_gradients,
)
from seqfuse.ops.rnn_scan import FUSED_OPTIONS, batch_major, by_sequence, scan_backward, scan_of, way
from seqfuse.reference import PLAIN


class Joined:
    """Where one direction of a two-way layer finds its y again in the backward pass: in the concatenation of both,
    which is kept anyway, so that a y of its own need not be."""

    def put(self, whole, first, width):
        self.whole, self.version = whole.detach(), whole._version
        self.columns = slice(first, first + width)

    def take(self):
        if self.whole._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                "output of a bidirectional recurrent layer"
            )
        return self.whole[..., self.columns]


class ScanCall(NamedTuple):
    """How one layer and direction is run. save: keep what a backward pass needs. want_cells: c after each step is an
    output. recompute: keep y and a few c only, and run the scan again in the backward pass. joined: where y is kept.
    both: both directions in one go, with tensors that lie together (csrc/include/seqfuse/rnn_both.h)."""

    cell: str
    backend: str
    reverse: bool = False
    save: bool = False
    want_cells: bool = False
    recompute: bool = False
    joined: Joined | None = None
    both: bool = False


def rnn_layer(call, x, h0, c0, weights, options=PLAIN):
    """Run one layer and direction.

    x: [T, B, I], time-major or a view of batch-major memory; or rows [N, I] of sequences of options.lengths (CPU).
    h0, c0: [B, H] or None. weights: (w_ih, w_hh) or (w_ih, w_hh, b_ih, b_hh); with w_ih None x is [.., G*H], the
    input's part of the gates with its bias.
    Returns (y [T, B, H] in x's layout or [N, H], h_n [B, H], c_n [B, H] or None, cells like y if call.want_cells).
    """
    w_ih, w_hh, b_ih, b_hh = weights if len(weights) == 4 else (*weights, None, None)
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh)
    if call.backend == "reference":
        return _reference(call, tensors, options)
    save = torch.is_grad_enabled() and (traced() or _any_requires_grad((*tensors, options.peephole)))
    # torch.compile decides by itself what to keep; a plain RNN keeps nothing but y anyway
    recompute = call.recompute and save and not traced() and (call.cell in ("gru", "lstm") or _zoneout(options))
    call = ScanCall(call.cell, call.backend, call.reverse, save, call.want_cells, recompute, call.joined, call.both)
    # as literals: with dynamic=True Dynamo would make a symbol of a float that comes from elsewhere
    fused = (None, None, None, None, None, None, 0.0, 0.0) if options is PLAIN else options[:FUSED_OPTIONS]
    y, h_n, c_n, _, cells = apply(RnnLayerFunction, *tensors, call, *fused)
    return y, h_n, c_n if call.cell == "lstm" else None, cells if call.want_cells else None


def both_directions(call, x, states, weights, options):
    """`rnn_layer` of both directions of a layer, in one go on a backend of SCAN_BOTH.

    states: (h0, c0), [2, B, H] each or None. weights: for each direction (w_ih, w_hh, b_ih, b_hh), the biases may be
    None. options: the ScanOptions of each; their masks may differ, nothing else.
    Returns (y [T, B, 2H] in x's layout, h_n [2, B, H], c_n [2, B, H] or None, cells [2, T, B, H] if call.want_cells).
    """

    def together(pair, join=torch.cat):
        return None if pair[0] is None else join(pair)

    w_ih, w_hh, b_ih, b_hh = map(together, zip(*weights, strict=True))
    options = options[0]._replace(
        **{n: together([getattr(o, n) for o in options], torch.stack) for n in ("zone_h", "zone_c")}
    )
    h0, c0 = states
    if h0 is None:
        batch = x.shape[1] if x.dim() == 3 else options.lengths.shape[0]
        h0 = x.new_zeros(2, batch, w_hh.shape[0] // (2 * reference.GATES[call.cell]))
    if c0 is None and call.cell == "lstm":
        c0 = torch.zeros_like(h0)  # not h0 itself: Dynamo takes no tensor twice
    return rnn_layer(call._replace(both=True), x, h0, c0, (w_ih, w_hh, b_ih, b_hh), options)


def projected_layer(call, x, h0, c0, weights, options=PLAIN):
    """`rnn_layer` of an LSTM whose h is w_hr @ (o tanh(c)); weights as there, then w_hr [P, H]; h0, y, h_n: P wide.

    The fused scans know no projection and need none: with W' = w_hh @ w_hr [4H, H] the scan of a plain LSTM over
    o tanh(c) is the same computation, if w_hh @ h0 is added to the first step's gates. y is one GEMM afterwards.
    """
    *weights, w_hr = weights
    w_ih, w_hh, b_ih, b_hh = weights if len(weights) == 4 else (*weights, None, None)
    if call.backend == "reference":
        return rnn_layer(call, x, h0, c0, weights, options._replace(projection=w_hr))
    if w_ih is not None:
        x = linear(x, w_ih, b_ih)
    if h0 is not None:
        x = _add_to_first_step(x, linear(h0, w_hh), call.reverse, options)
    y, h_n, c_n, cells = rnn_layer(call, x, None, c0, (None, matmul(w_hh, w_hr), None, b_hh), options)
    y, h_n = linear(y, w_hr), linear(h_n, w_hr)
    if h0 is not None and options.lengths is not None and x.dim() == 3:  # an empty sequence leaves the initial state
        h_n = torch.where((options.lengths == 0)[:, None], h0, h_n)
    return y, h_n, c_n, cells


def _add_to_first_step(xg, add, reverse, options):
    lengths, resets = options.lengths, options.resets
    if xg.dim() == 2:
        first = rnn_ragged.Ragged(lengths, 0).first_rows(reverse)
        if resets is not None:
            add = torch.where(resets[first][:, None], 0.0, add)
        return xg.index_add(0, first, add)
    ragged = rnn_ragged.Ragged(xg.new_full(xg.shape[1:2], xg.shape[0], dtype=torch.int64), xg.shape[0])
    first = (ragged if lengths is None else ragged._replace(lengths=lengths)).first_steps(reverse)
    first = first if resets is None else first & ~resets
    return torch.where(first[..., None], xg + add, xg)


def _any_requires_grad(tensors):
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False


def _zoneout(options):
    return options.zone_h is not None or options.zoneout_h != 0.0


def _reference(call, tensors, options):
    """The same by the reference, differentiable twice."""
    if call.both:
        return _reference_of_both(call, tensors, options)
    if tensors[0].dim() == 2:  # rows: the reference is padded
        ragged = rnn_ragged.rows_of(options.lengths, int(options.lengths.max()))
        padded = {n: ragged.pad(t) for n in ("resets", "zone_h", "zone_c") if (t := getattr(options, n)) is not None}
        options = options._replace(**padded)
        y, h_n, c_n, cells = _reference(call, (ragged.pad(tensors[0]), *tensors[1:]), options)
        return ragged.pack(y), h_n, c_n, None if cells is None else ragged.pack(cells)

    def run(x, h0, c0, w_ih, w_hh, b_ih, b_hh):
        projection = options.projection
        h0, c0 = _initial(call.cell, x, h0, c0, w_hh, options.lengths, None if projection is None else len(projection))
        xg = x if w_ih is None else F.linear(x, w_ih, b_ih)
        return reference.rnn_scan(call.cell, xg, h0, c0, w_hh, b_hh, call.reverse, options)

    if call.recompute and torch.is_grad_enabled() and not traced():
        y, h_n, c_n, cells = checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)
    else:
        y, h_n, c_n, cells = run(*tensors)
    return y, h_n, c_n, cells if call.want_cells else None


def _reference_of_both(call, tensors, options):
    x, *states_and_weights = tensors
    found = []
    for i, reverse in enumerate((False, True)):
        own = [None if t is None else t.chunk(2)[i] for t in states_and_weights]
        own[:2] = [None if t is None else t.squeeze(0) for t in own[:2]]
        zones = {n: t[i] for n in ("zone_h", "zone_c") if (t := getattr(options, n)) is not None}
        one = call._replace(both=False, reverse=reverse)
        found.append(_reference(one, (x, *own), options._replace(**zones)))
    y, *rest = zip(*found, strict=True)
    return torch.cat(y, -1), *(None if t[0] is None else torch.stack(t) for t in rest)


def _initial(cell, x, h0, c0, w_hh, lengths, width=None):
    """The initial state, zeros where None. width: of h, if it is not that of the gates."""
    if h0 is not None and (c0 is not None or cell != "lstm"):
        return h0, c0 if cell == "lstm" else None
    batch = x.shape[1] if x.dim() == 3 else lengths.shape[0]
    H = w_hh.shape[0] // reference.GATES[cell]
    if h0 is None:
        h0 = x.new_zeros(batch, H if width is None else width)
    if cell != "lstm":
        return h0, None
    return h0, (h0 if h0.shape[1] == H else x.new_zeros(batch, H)) if c0 is None else c0


class RnnLayerFunction(torch.autograd.Function):
    """Autograd of every backend of the scan. gates and cells are outputs so that they can be saved; cells also for the
    caller, if wanted. With recompute the place of gates is taken by c at the checkpoints."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, call, *options):
        h0, c0 = _initial(call.cell, x, h0, c0, w_hh, options[0])
        xg = _input_gates(x, w_ih, b_ih)
        keeps = call.want_cells or (call.recompute and call.cell == "lstm")
        save = call.save and not call.recompute
        out = scan_of(call).fwd(call.cell, xg, h0, c0, w_hh, b_hh, *options, *way(call), save, keeps)
        if not call.recompute or call.cell != "lstm":
            return out
        y, h_n, c_n, _, cells = out
        return y, h_n, c_n, checkpoints(cells, call.reverse), cells if call.want_cells else cells.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, call, *options = inputs
        y, _, c_n, gates, cells = output
        if call.want_cells:
            ctx.mark_non_differentiable(gates)
        else:
            ctx.mark_non_differentiable(gates, cells)
        if call.cell != "lstm":
            ctx.mark_non_differentiable(c_n)
        ctx.set_materialize_grads(False)
        if call.save:
            cells = cells if not call.recompute else None
            y = y if call.joined is None else None
            ctx.save_for_backward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, gates, cells, *options[:6])
        ctx.call, ctx.zoneouts = call, options[6:]

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _gates, dcells):
        call, needs = ctx.call, ctx.needs_input_grad
        if call.cell != "lstm":
            dc_n = None  # torch.compile hands in zeros for the empty placeholder
        if not call.want_cells:
            dcells = None
        if dy is None and dh_n is None and dc_n is None and dcells is None:
            return (None,) * (8 + FUSED_OPTIONS)
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, gates, cells, *masks = ctx.saved_tensors
        options = (*masks, *ctx.zoneouts)
        if call.joined is not None:
            y = call.joined.take()
        inputs, arriving = (x, h0, c0, w_ih, w_hh, b_ih, b_hh), (dy, dh_n, dc_n, dcells)
        if is_differentiated(*arriving, *inputs, options[3]):
            return _differentiable_backward(call, inputs, options, arriving, needs)
        first = _initial(call.cell, x, h0, c0, w_hh, options[0])
        grads, peephole = (dy, dh_n, dc_n, dcells), options[3]
        dpeephole = None
        if call.recompute:
            xg = _input_gates(x, w_ih, b_ih)
            xg = xg.clone() if w_ih is None else xg  # it will be overwritten
            dxg, dan, dh0, dc0, db_hh, dpeephole = recomputed_scan_gradients(
                call, grads, xg, y, gates, *first, (w_hh, b_hh), options
            )
        else:
            overwrite = peephole is None and may_write(*grads) and freed_afterwards()
            dxg, dan, dh0, dc0, db_hh = scan_backward(call, grads, y, gates, cells, first, w_hh, options, overwrite)
            if peephole is not None and needs[11]:
                dpeephole = peephole_gradient(dxg, gates, cells, c0, call.reverse, options, peephole.dtype)
        dh0, dc0 = dh0 if needs[1] else None, dc0 if needs[2] else None
        first = gates = cells = grads = None  # the products below take memory of their own
        layout = by_sequence(dxg)
        d_rows = flat_rows(dxg, layout)  # (T*B, G*H)
        dx = dw_ih = dw = db_ih = None
        if needs[5] or needs[6]:
            db_ih, db_hh = bias_gradients(call, d_rows, flat_rows(dan, layout) if call.cell == "gru" else None, db_hh)
            db_ih, db_hh = db_ih.to(x.dtype), db_hh.to(x.dtype)
        if needs[4]:
            dw = dw_hh(call, dxg, dan, y, h0, w_hh, options)
        dan = None
        if needs[3]:
            dw_ih = over_rows(d_rows, flat_rows(x, layout))
        if needs[0]:  # last, for it is as large as a copy that the others may have made
            dx = dxg if w_ih is None else from_rows(matmul(d_rows, w_ih), x, layout)
        return (
            dx,
            dh0,
            dc0,
            dw_ih,
            dw,
            db_ih if needs[5] else None,
            db_hh if needs[6] else None,
            None,
            None,
            None,
            None,
            dpeephole if needs[11] else None,
            None,
            None,
            None,
            None,
        )


def _input_gates(x, w_ih, b_ih):
    if w_ih is None:
        return x
    if x.is_contiguous():
        return linear(x, w_ih, b_ih)  # (T, B, G*H) or (N, G*H)
    layout = batch_major(x)
    return from_rows(linear(flat_rows(x, layout), w_ih, b_ih), x, layout)


def _differentiable_backward(call, inputs, options, grads, needs):
    """The backward pass through the reference, for create_graph=True."""
    call = call._replace(recompute=False)

    def outputs(*tensors):
        *inputs, peephole = tensors
        return _reference(call, inputs, reference.ScanOptions(*options)._replace(peephole=peephole))

    needs = (*needs[:7], needs[11])
    *found, dpeephole = differentiable_gradients(outputs, grads, (*inputs, options[3]), needs)
    return *found, None, None, None, None, dpeephole, None, None, None, None
