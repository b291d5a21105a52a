"""lstm, gru and rnn: stacks of recurrent layers. One layer and direction is in rnn_layer.py, the choice of a backend in
rnn_rules.py, lengths in rnn_ragged.py, the options beyond torch.nn's in rnn_extras.py.
"""

from typing import NamedTuple

import torch
from torch import _VF
from torch.nn.utils.rnn import PackedSequence

from seqfuse import dispatch, reference
from seqfuse.ops import checks, rnn_extras, rnn_ragged
from seqfuse.ops.autograd import autocast_is_on, traced
from seqfuse.ops.layer_norm import layer_norm
from seqfuse.ops.rnn_extras import NO_OPTIONS, RecurrentOptions
from seqfuse.ops.rnn_layer import Joined, ScanCall, both_directions, projected_layer, rnn_layer
from seqfuse.ops.rnn_ragged import Ragged
from seqfuse.ops.rnn_rules import RecurrentCase
from seqfuse.ops.rnn_scan import SCAN_BOTH, tf32_allowed


class Stack(NamedTuple):
    """What all layers of a call share."""

    bidirectional: bool
    batch_first: bool
    dropout: float
    training: bool
    options: RecurrentOptions


class Extent(NamedTuple):
    """Where the sequences end and begin anew, and whether c is wanted after each step."""

    lengths: torch.Tensor | None = None
    resets: torch.Tensor | None = None
    cells: bool = False


WHOLE = Extent()


def lstm(x, hx, weights, *, bidirectional=False, batch_first=False, dropout=0.0, training=False, lengths=None,
         resets=None, return_cell_states=False, options=None):  # fmt: skip
    """Long short-term memory over a whole sequence, as torch.nn.LSTM computes it.

    x: [T, B, I], or [B, T, I] with batch_first; floating point. L layers, D = 2 directions if bidirectional, else 1.
    hx: (h0, c0), each [L*D, B, H] (h0 with a projection: [L*D, B, P]), or None for zeros.
    weights: L*D tuples (w_ih [4H, I or D*H], w_hh [4H, H], b_ih [4H], b_hh [4H]), or without the two biases, in
    the order of torch.nn.LSTM's all_weights: layer by layer, forward before backward; gates i f g o. One more tensor
    w_hr [P, H] at the end of each tuple projects h to P < H units (w_hh: [4H, P], w_ih of later layers: [4H, D*P]).
    dropout: probability of zeroing an output of any layer but the last, if training.
    lengths: [B] int64, or a list: sequence b has lengths[b] steps. What lies beyond is never computed on, whatever it
    holds, and its outputs are 0. On the CPU each must lie in [1, T]; GPU lengths are not looked at (0 leaves the
    initial state).
    resets: [T, B] bool (batch_first: [B, T]): where true, the state before this step is zero.
    options: a RecurrentOptions, what torch.nn has not.
    Returns (y [T, B, D*H] (batch_first: [B, T, D*H]), (h_n, c_n)), each of these [L*D, B, H]; with return_cell_states
    also c after each step of the last layer, like y but [T, B, D*H] with a projection too.

    Raises ValueError or TypeError on bad arguments before any kernel runs, RuntimeError for T = 0 (as torch.nn does).
    Source: Hochreiter and Schmidhuber 1997; Gers et al. 2000 (forget gate); Sak et al. 2014 (projection).
    """
    h0, c0 = hx if hx is not None else (None, None)
    stack = Stack(bidirectional, batch_first, dropout, training, options or NO_OPTIONS)
    plain = lengths is None and resets is None and not return_cell_states
    extent = WHOLE if plain else Extent(lengths, resets, return_cell_states)
    y, h_n, c_n, cells = _run("lstm", "lstm", x, h0, c0, weights, stack, extent)
    return (y, (h_n, c_n), cells) if return_cell_states else (y, (h_n, c_n))


def gru(x, h0, weights, *, bidirectional=False, batch_first=False, dropout=0.0, training=False, lengths=None,
        resets=None, options=None):  # fmt: skip
    """Gated recurrent unit over a whole sequence, as torch.nn.GRU computes it (reset gate after the product).

    Arguments and results as `lstm`, without cell state and projection: h0 [L*D, B, H] or None; weights with 3H rows,
    gates r z n. Returns (y, h_n). Source: Cho et al. 2014 (arXiv:1406.1078).
    """
    stack = Stack(bidirectional, batch_first, dropout, training, options or NO_OPTIONS)
    extent = WHOLE if lengths is None and resets is None else Extent(lengths, resets)
    return _run("gru", "gru", x, h0, None, weights, stack, extent)[:2]


def rnn(x, h0, weights, *, nonlinearity="tanh", bidirectional=False, batch_first=False, dropout=0.0, training=False,
        lengths=None, resets=None, options=None):  # fmt: skip
    """Elman network over a whole sequence, as torch.nn.RNN computes it: h = act(W_ih x + b_ih + W_hh h + b_hh).

    Arguments and results as `gru`, with H rows; nonlinearity: "tanh" or "relu". Source: Elman 1990.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    stack = Stack(bidirectional, batch_first, dropout, training, options or NO_OPTIONS)
    extent = WHOLE if lengths is None and resets is None else Extent(lengths, resets)
    return _run("rnn", f"rnn_{nonlinearity}", x, h0, None, weights, stack, extent)[:2]


def _run(op, cell, x, h0, c0, weights, stack, extent):
    weights = [tuple(w) for w in weights]
    if not (stack.options is NO_OPTIONS and _usual(cell, x, h0, weights, stack.bidirectional)):
        _check(op, cell, x, h0, c0, weights, stack)
    if not 0.0 <= stack.dropout <= 1.0:
        raise ValueError(f"{op}: dropout must be in [0, 1], got {stack.dropout}")
    T, B = (x.shape[1], x.shape[0]) if stack.batch_first else (x.shape[0], x.shape[1])
    if extent is not WHOLE:
        extent = _check_extent(op, x, T, B, stack, extent)
    if T == 0:
        raise RuntimeError(f"{op}: the sequence is empty (T = 0); torch.nn refuses it too")
    if autocast_is_on(x):
        x, h0, c0, weights, stack = _autocast(x, h0, c0, weights, stack)
    case = _case(cell, x, (T, B), (h0, c0), weights, stack, extent)
    name = dispatch.select(op, case).backend
    if name == "torch":
        return *_torch(cell, x, h0, c0, weights, stack), None
    x = x.transpose(0, 1) if stack.batch_first else x  # (T, B, I), a view
    ragged = None
    if extent.lengths is not None:
        if name == "cpu" and not traced() and not stack.options.recompute:
            ragged = rnn_ragged.rows_of(extent.lengths, T)
            x = ragged.pack(x)
        else:
            ragged = Ragged(extent.lengths.to(x.device, non_blocking=True), T)
            x = torch.where(ragged.active()[..., None], x, 0.0)  # a NaN in the padding must not reach a GEMM
    y, h_n, c_n, cells = _layers(case, name, x, h0, c0, weights, stack, ragged, extent)
    if ragged is not None and ragged.rows:
        y = ragged.pad(y, stack.batch_first)
        cells = None if cells is None else ragged.pad(cells, stack.batch_first)
    if stack.batch_first:
        y, cells = y.transpose(0, 1), None if cells is None else cells.transpose(0, 1)
    return y, h_n, c_n, cells


def packed_sequence(op, cell, packed, states, weights, stack, extent=WHOLE):
    """lstm, gru or rnn of a torch PackedSequence.

    states: (h0, c0) or (h0,) as [L*D, B, H] in the caller's order of sequences, or None. extent.resets: [T, B]
    (batch_first: [B, T]) in that order too. Returns (PackedSequence, h_n, c_n or None, PackedSequence of c or None).
    """
    data, batch_sizes, order, order_back = packed
    T, B = batch_sizes.shape[0], int(batch_sizes[0])
    if extent.lengths is not None:
        raise ValueError(f"{op}: lengths goes with a padded batch; a PackedSequence knows its own")
    if states is not None and order is not None:
        states = [s.index_select(1, order) for s in states]
    h0, c0 = (*(states or (None, None)), None)[:2]
    weights = [tuple(w) for w in weights]
    _check(op, cell, data, h0, c0, weights, stack, B)
    resets = extent.resets
    if resets is not None:
        if isinstance(resets, torch.Tensor) and resets.dim() == 2:  # the padded batch may have been longer
            resets = resets.narrow(int(stack.batch_first), 0, min(T, resets.shape[int(stack.batch_first)]))
        resets = _check_resets(op, data, resets, T, B, stack.batch_first)
        resets = resets if order is None else resets.index_select(1, order)
    if autocast_is_on(data):
        data, h0, c0, weights, stack = _autocast(data, h0, c0, weights, stack)
    case = _case(cell, data, (T, B), (h0, c0), weights, stack, extent, ("packed_sequence",))
    name = dispatch.select(op, case).backend
    if name == "torch":
        y, h_n, c_n = _torch(cell, data, h0, c0, weights, stack, batch_sizes)
        cells = None
    else:
        maps = rnn_ragged.of_packed_sequence(batch_sizes)
        ragged = maps.ragged._replace(index=maps.ragged.index.to(data.device))
        maps = rnn_ragged.PackedRows(ragged, maps.order.to(data.device))
        x = maps.take(data)
        rows = name == "cpu" and not stack.options.recompute
        if not rows:
            x = ragged.pad(x)
        form = ragged if rows else Ragged(ragged.lengths.to(data.device), T)
        y, h_n, c_n, cells = _layers(case, name, x, h0, c0, weights, stack, form, Extent(None, resets, extent.cells))
        y, cells = (None if s is None else maps.give(s if rows else ragged.pack(s.contiguous())) for s in (y, cells))
    if order_back is not None:
        h_n, c_n = (None if s is None else s.index_select(1, order_back) for s in (h_n, c_n))
    like = (batch_sizes, order, order_back)
    return PackedSequence(y, *like), h_n, c_n, None if cells is None else PackedSequence(cells, *like)


def _case(cell, x, steps_and_batch, states, weights, stack, extent, extras=()):
    options, projected = stack.options, len(weights[0]) in (3, 5)
    if options is not NO_OPTIONS:
        extras += rnn_extras.in_force(options, cell == "lstm", stack.training, projected)
    if projected:
        extras += rnn_extras.projection_in_force(*weights[0][-1].shape)
    if extent is not WHOLE:
        names = ("lengths", "resets", "return_cell_states")
        extras += tuple(n for n, given in zip(names, extent, strict=True) if given is not None and given is not False)
    tensors = [x, *states, *(t for w in weights for t in w), *(options.peephole or ())]
    tensors += [t for norm in options.layer_norm or () for t in norm]
    return RecurrentCase(
        cell,
        x.device.type,
        x.dtype,
        *steps_and_batch,
        x.shape[-1],
        weights[0][0].shape[0] // reference.GATES[cell],
        len(weights) // (2 if stack.bidirectional else 1),
        stack.bidirectional,
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
        extras,
        options.heads,
        x.dtype == torch.float32 and x.device.type == "cuda" and tf32_allowed(),
    )


def _usual(cell, x, h0, weights, bidirectional):
    """Whether this is one layer in one direction without a state, all of it in order: then no closer look is needed."""
    if len(weights) != 1 or bidirectional or h0 is not None or len(weights[0]) != 4 or not isinstance(x, torch.Tensor):
        return False
    w_ih, w_hh, b_ih, b_hh = weights[0]
    return (
        x.dim() == 3
        and x.is_floating_point()
        and w_ih.dtype == w_hh.dtype == b_ih.dtype == b_hh.dtype == x.dtype
        and w_ih.device == w_hh.device == b_ih.device == b_hh.device == x.device
        and w_hh.dim() == 2
        and w_hh.shape[0] == reference.GATES[cell] * w_hh.shape[1]
        and w_ih.shape == (w_hh.shape[0], x.shape[2])
        and b_ih.shape == b_hh.shape == w_hh.shape[:1]
    )


def _check(op, cell, x, h0, c0, weights, stack, packed_batch=None):
    """packed_batch: the number of sequences of a PackedSequence, whose data is x [N, I]."""
    gates, directions = reference.GATES[cell], 2 if stack.bidirectional else 1
    checks.tensor(op, "x", x, dims=(3,) if packed_batch is None else (2,))
    if not weights or len(weights) % directions:
        raise ValueError(
            f"{op}: weights must hold one tuple for each layer and direction ({directions} a layer), got {len(weights)}"
        )
    autocast = torch._C._is_any_autocast_enabled() and autocast_is_on(x)
    accepted = (2, 4, 3, 5) if cell == "lstm" else (2, 4)
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    H = P = None
    for i, w in enumerate(weights):
        if len(w) not in accepted:
            raise ValueError(
                f"{op}: weights[{i}] must be (w_ih, w_hh) or (w_ih, w_hh, b_ih, b_hh)"
                f"{', with w_hr behind for a projection' if cell == 'lstm' else ''}, got {len(w)} tensors"
            )
        projected = len(w) % 2 == 1
        own = (*names[: len(w) // 2 * 2], *(("w_hr",) if projected else ()))
        for name, t in zip(own, w, strict=True):
            checks.tensor(op, f"weights[{i}].{name}", t, dims=(1,) if name.startswith("b") else (2,))
            checks.same_device(op, f"weights[{i}].{name}", t, "x", x)
            if not autocast:
                checks.same_dtype(op, f"weights[{i}].{name}", t, "x", x)
        if H is None:
            H = w[-1].shape[-1] if projected else w[1].shape[1] * stack.options.heads
            P = w[-1].shape[0] if projected else H
        into = x.shape[-1] if i < directions else directions * P
        shapes = [(gates * H, into), (gates * H, P // stack.options.heads), (gates * H,), (gates * H,)][
            : len(w) // 2 * 2
        ]
        if P != H or projected:
            shapes.append((P, H))
        if len(shapes) != len(w):
            raise ValueError(f"{op}: weights[{i}] has {len(w)} tensors, but weights[0] has {len(weights[0])}")
        for name, t, wanted in zip(own, w, shapes, strict=True):
            checks.shape(op, f"weights[{i}].{name}", t, wanted)
    if stack.options is not NO_OPTIONS:
        rnn_extras.check_options(op, stack.options, x, len(weights), H)
    batch = packed_batch if packed_batch is not None else x.shape[0] if stack.batch_first else x.shape[1]
    for name, state, width in (("h0", h0, P), ("c0", c0, H)):
        if state is None:
            continue
        checks.tensor(op, name, state)
        checks.shape(op, name, state, (len(weights), batch, width))
        checks.same_device(op, name, state, "x", x)
        if not autocast:
            checks.same_dtype(op, name, state, "x", x)
    if cell == "lstm" and (h0 is None) != (c0 is None):
        raise ValueError(f"{op}: hx must hold both h0 and c0, or be None")


def _check_extent(op, x, T, B, stack, extent):
    lengths, resets, cells = extent
    if lengths is not None:
        lengths = rnn_ragged.check_lengths(op, lengths, T, B, x.device)
    if resets is not None:
        resets = _check_resets(op, x, resets, T, B, stack.batch_first)
    return Extent(lengths, resets, cells)


def _check_resets(op, x, resets, T, B, batch_first):
    """resets as [T, B]."""
    wanted = (B, T) if batch_first else (T, B)
    if not isinstance(resets, torch.Tensor) or resets.dtype != torch.bool or tuple(resets.shape) != wanted:
        kind = checks.describe(resets)
        raise ValueError(f"{op}: resets must be a bool tensor of shape {list(wanted)}, got {kind}")
    if resets.device != x.device:
        raise ValueError(f"{op}: resets is on {resets.device}, but x is on {x.device}: move one of them")
    return resets.t() if batch_first else resets


def _autocast(x, h0, c0, weights, stack):
    """Under autocast everything is converted to its dtype, as torch does for its own recurrent layers on a GPU."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t):
        return None if t is None else t.to(dtype)

    options = stack.options
    if options.peephole is not None:
        options = options._replace(peephole=[cast(t) for t in options.peephole])
    if options.layer_norm is not None:
        options = options._replace(layer_norm=[tuple(cast(t) for t in norm) for norm in options.layer_norm])
    weights = [tuple(cast(t) for t in w) for w in weights]
    return cast(x), cast(h0), cast(c0), weights, stack._replace(options=options)


def _layers(case, name, x, h0, c0, weights, stack, ragged, extent):
    """All layers and directions. x: [T, B, I] or rows [N, I]. Returns (y, h_n, c_n, cells) in the same form."""
    options, directions = stack.options, 2 if case.bidirectional else 1
    resets = extent.resets
    if resets is not None and ragged is not None and ragged.rows:
        resets = ragged.pack(resets)
    over_input = options.variational()[0] if stack.training else 0.0
    plain = options is NO_OPTIONS and ragged is None and resets is None
    projected = len(weights[0]) in (3, 5)
    # where the backend runs both directions in one go; recomputation goes through the segments of one
    at_once = directions == 2 and name in SCAN_BOTH and not (projected or options.recompute)
    # both directions' y are kept once, joined; what looks into the graph, or has its own idea of y, keeps them apart
    joins = case.bidirectional and case.grad and not (projected or at_once or traced())
    joins = joins and name != "reference" and not torch._C._are_functorch_transforms_active()
    last_h, last_c, cells = [], [], []
    for layer in range(case.layers):
        outputs, cells = [], []
        joined = (Joined(), Joined()) if joins else (None, None)
        want_cells = extent.cells and layer == case.layers - 1
        if over_input:
            mask = rnn_extras.keep_mask((case.B, x.shape[-1]), over_input, x)
            x = x * (mask if ragged is None else ragged.spread(mask))
        if at_once:
            call = ScanCall(case.cell, name, want_cells=want_cells)
            x, h_n, c_n, cells = _both(call, layer, x, (h0, c0), weights, case, stack, ragged, resets)
            last_h += h_n
            last_c += [] if c_n is None else c_n
        for direction in range(0 if at_once else directions):
            k = layer * directions + direction
            h = None if h0 is None else h0[k]
            c = None if c0 is None else c0[k]
            call = ScanCall(case.cell, name, direction == 1, False, want_cells, options.recompute, joined[direction])
            if plain and not projected:
                y, h_n, c_n, cell_states = rnn_layer(call, x, h, c, weights[k])
            else:
                y, h_n, c_n, cell_states = _layer(call, k, x, (h, c), weights[k], case, stack, ragged, resets)
            outputs.append(y)
            last_h.append(h_n)
            last_c.append(c_n)
            cells.append(cell_states)
        if not at_once:
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)  # (T, B, D*H)
        if joins:
            for direction, place in enumerate(joined):
                place.put(x, direction * case.hidden_size, case.hidden_size)
        if stack.training and stack.dropout > 0.0 and layer < case.layers - 1:
            x = rnn_extras.between_layers(x, stack.dropout, case.T, ragged)
    c_n = torch.stack(last_c) if case.cell == "lstm" else None
    if extent.cells:
        cells = (cells[0] if directions == 1 else torch.cat(cells, -1)).to(x.dtype)
    return x, torch.stack(last_h), c_n, cells if extent.cells else None


def _both(call, layer, x, states, weights, case, stack, ragged, resets):
    """Both directions of a layer at once. Returns (y, h_n, c_n, cells) with one entry for each direction but in y."""
    sizes, ways = (case.T, case.B, case.hidden_size, case.hidden_size), slice(2 * layer, 2 * layer + 2)
    own, scans = [], []
    for k, (w_ih, w_hh, *biases) in zip(range(2 * layer, 2 * layer + 2), weights[ways], strict=True):
        w_hh, scan = rnn_extras.scan_options(stack.options, k, w_hh, x, sizes, stack.training, ragged, resets)
        own.append((w_ih, w_hh, *(biases or (None, None))))
        scans.append(scan)
    y, h_n, c_n, cells = both_directions(call, x, [None if s is None else s[ways] for s in states], own, scans)
    return y, h_n.unbind(), None if c_n is None else c_n.unbind(), None if cells is None else cells.unbind()


def _layer(call, k, x, states, weights, case, stack, ragged, resets):
    """One layer and direction with everything that may be asked for."""
    options, projected = stack.options, len(weights) in (3, 5)
    w_ih, w_hh, b_ih, b_hh = weights[:4] if len(weights) > 3 else (*weights[:2], None, None)
    sizes = case.T, case.B, weights[-1].shape[0] if projected else case.hidden_size, case.hidden_size
    w_hh, scan = rnn_extras.scan_options(options, k, w_hh, x, sizes, stack.training, ragged, resets)
    if options.layer_norm is not None:  # the input's part of it is one call over the whole sequence
        x = layer_norm(x @ w_ih.t(), options.layer_norm[k][0], b_ih)
        w_ih = b_ih = None
    if not projected:
        return rnn_layer(call, x, *states, (w_ih, w_hh, b_ih, b_hh), scan)
    if options.heads > 1:
        w_hh = rnn_extras.block_diagonal(w_hh, options.heads)
    return projected_layer(call, x, *states, (w_ih, w_hh, b_ih, b_hh, weights[-1]), scan)


_TORCH = {"lstm": _VF.lstm, "gru": _VF.gru, "rnn_tanh": _VF.rnn_tanh, "rnn_relu": _VF.rnn_relu}


def _torch(cell, x, h0, c0, weights, stack, batch_sizes=None):
    """PyTorch's own op: oneDNN or ATen on the CPU, cuDNN on a GPU. Returns (y, h_n, c_n or None).

    With batch_sizes x is the data of a PackedSequence.
    """
    projected = len(weights[0]) in (3, 5)
    if batch_sizes is not None:
        batch = int(batch_sizes[0])
    else:
        batch = x.shape[0] if stack.batch_first else x.shape[1]
    if h0 is None:
        H = weights[0][0].shape[0] // reference.GATES[cell]
        h0 = x.new_zeros(len(weights), batch, weights[0][-1].shape[0] if projected else H)
        c0 = (x.new_zeros(len(weights), batch, H) if projected else h0) if cell == "lstm" else None
    if stack.training and stack.options.weight_drop:
        p = stack.options.weight_drop
        weights = [(w[0], rnn_extras.dropout(w[1], p), *w[2:]) for w in weights]
    flat = [t for w in weights for t in w]
    layers = len(weights) // (2 if stack.bidirectional else 1)
    state = (h0, c0) if cell == "lstm" else h0
    common = (flat, len(weights[0]) > 3, layers, stack.dropout, stack.training, stack.bidirectional)
    if batch_sizes is None:
        out = _TORCH[cell](x, state, *common, stack.batch_first)
    else:
        out = _TORCH[cell](x, batch_sizes, state, *common)
    return out if cell == "lstm" else (*out, None)
