"""What the backward pass of a scan leaves to whole-sequence operations: dw_hh, the peepholes' gradient, recomputation.

All of it works on padded sequences [T, B, X] and on rows [N, X] (see rnn_ragged.py).
"""

import torch

from seqfuse.ops.autograd import may_write, traced
from seqfuse.ops.products import addmm, matmul, widened
from seqfuse.ops.rnn_ragged import Ragged, shifted
from seqfuse.ops.rnn_scan import SCAN, batch_major, by_sequence, scan_backward


def flat_rows(x, batch_major):
    """[T, B, X] -> [T*B, X], in the order that copies nothing for a tensor of that layout. Rows stay what they are."""
    if x.dim() == 2:
        return x
    return (x.transpose(0, 1) if batch_major else x).reshape(-1, x.shape[-1])


def from_rows(rows, like, batch_major):
    """The inverse of flat_rows."""
    if like.dim() == 2:
        return rows
    T, B = like.shape[:2]
    return rows.view(B, T, -1).transpose(0, 1) if batch_major else rows.view(T, B, -1)


def ragged_of(sequence, lengths):
    """lengths and the form in which `sequence` lies."""
    if lengths is None:
        return None
    if sequence.dim() == 2:
        return Ragged(lengths, 0, True)
    return Ragged(lengths, sequence.shape[0])


def state_before(states, first, reverse, lengths, resets):
    """The state that each step started from: `states` (h or c after each step) moved on by one step, `first` [B, H] or
    None (zeros) where a sequence begins, zero where it was reset."""
    if states.dim() == 2 and states.is_cpu and not traced() and (first is None or first.dtype == states.dtype):
        before = shifted(states, lengths, first, reverse)
    elif states.dim() == 2:
        ragged = ragged_of(states, lengths)
        before = torch.cat([states[1:], states[:1]]) if reverse else torch.cat([states[-1:], states[:-1]])
        begin = ragged.first_rows(reverse)
        before = before.index_fill(0, begin, 0.0) if first is None else before.index_copy(0, begin, first)
    else:
        entry = states.new_zeros(states.shape[1:]) if first is None else first
        time = 1 if batch_major(states) else 0  # the result lies in memory as states does
        s = states.transpose(0, 1) if time else states
        entry = entry.unsqueeze(time)
        length = s.shape[time]
        parts = [s.narrow(time, 1, length - 1), entry] if reverse else [entry, s.narrow(time, 0, length - 1)]
        before = torch.cat(parts, time)
        before = before.transpose(0, 1) if time else before
        if reverse and lengths is not None and first is not None:  # beyond a sequence's end there is no state
            before = torch.where(ragged_of(states, lengths).first_steps(True)[..., None], first, before)
    return before if resets is None else torch.where(resets[..., None], 0.0, before)


LONG = 16_384  # rows from which a sum over all of them in one go loses digits: its rounding grows with their number


def over_rows(a, b, out=None):
    """a^T @ b, [X, Y], for a [rows, X] and b [rows, Y]; over very many rows in pieces, whose sums are then added up.
    out: where the result may lie, if it can be had there at once."""
    rows, small = a.shape[0], a.shape[1] * b.shape[1] <= 65_536  # of larger ones the pieces would need much memory
    piece = 512
    if rows < LONG or not small or widened(a, piece, a.shape[1], b.shape[1]):  # which is rounded to fewer digits anyway
        return matmul(a.t(), b, out)
    whole = rows // piece * piece
    parts = torch.bmm(
        a[:whole].reshape(-1, piece, a.shape[1]).transpose(1, 2), b[:whole].reshape(-1, piece, b.shape[1])
    )
    return parts.sum(0) + matmul(a[whole:].t(), b[whole:])


def bias_gradient(d_rows, by_scan=None):
    """The sum of d_rows over all rows, in float32; by_scan: what the scan summed by the way, good up to LONG rows."""
    if by_scan is not None and d_rows.shape[0] < LONG:
        return by_scan
    return d_rows.sum(0, dtype=torch.float32)


def bias_gradients(call, d_rows, dan_rows, db_hh):
    """(of b_ih, of b_hh), float32; db_hh: what the scan summed. They differ for a GRU's n gate only."""
    if call.cell != "gru":
        db = bias_gradient(d_rows, db_hh)
        return db, db
    ways = 2 if call.both else 1
    inputs, hidden = [], []
    for d, dan, db in zip(d_rows.chunk(ways, -1), dan_rows.chunk(ways, -1), db_hh.chunk(ways), strict=True):
        H = dan.shape[-1]
        db_rz = bias_gradient(d[:, : 2 * H], db[: 2 * H])
        inputs += [db_rz, bias_gradient(d[:, 2 * H :])]
        hidden += [db_rz, bias_gradient(dan, db[2 * H :])]
    return torch.cat(inputs), torch.cat(hidden)


def dw_hh(call, dxg, dan, y, h0, w_hh, options):
    """sum over t of da_t^T @ h_{t-1}, as GEMMs over the whole sequence. a's gradient is dxg, but dan for a GRU's n."""
    layout = by_sequence(dxg)
    if not call.both:
        return _dw_hh(call, (dxg, dan, y), h0, w_hh, options, layout)
    pieces = zip(*(t.chunk(2, -1) for t in (dxg, dan, y)), strict=True)
    return torch.cat(
        [
            _dw_hh(call._replace(reverse=reverse), sequences, h0[reverse], w_hh.chunk(2)[reverse], options, layout)
            for reverse, sequences in enumerate(pieces)
        ]
    )


def _dw_hh(call, sequences, h0, w_hh, options, layout):
    dxg, dan, y = sequences
    lengths, resets, hidden_mask = options[:3]
    H, heads = y.shape[-1], y.shape[-1] // w_hh.shape[1]
    plain = resets is None and hidden_mask is None

    def with_initial(w, d_first, out):
        """w and the product with h0, of the steps that began from it."""
        if h0 is None:
            return w
        return addmm(w, d_first.t(), h0, out) if heads == 1 else w + _by_heads(d_first, h0, H, heads)

    if plain and y.dim() == 2 and may_write(dxg, dan):  # rows: h_{t-1} lies before, but where a sequence begins
        begin = ragged_of(y, lengths).first_rows(call.reverse)
        states, rest = (y[1:], slice(0, -1)) if call.reverse else (y[:-1], slice(1, None))

        def product(d, out=None):  # d: (N, X) -> (X, H), in `out` if it can be
            first = d[begin]
            d.index_fill_(0, begin, 0.0)
            w = _by_heads(d[rest], states, H, heads, out)
            d.index_copy_(0, begin, first)
            return with_initial(w, first, out)
    elif plain and y.dim() == 3 and (lengths is None or not call.reverse or h0 is None):
        before = y[1:] if call.reverse else y[:-1]  # h_{t-1} of every step but the first one that ran: no copy
        first, rest = (-1, slice(0, -1)) if call.reverse else (0, slice(1, None))
        states = flat_rows(before, layout)

        def product(d, out=None):  # d: (T, B, X) -> (X, H), in `out` if it can be
            return with_initial(_by_heads(flat_rows(d[rest], layout), states, H, heads, out), d[first], out)
    else:
        before = state_before(y, h0, call.reverse, lengths, resets)
        if hidden_mask is not None:
            ragged = ragged_of(y, lengths)
            before = before * (hidden_mask if ragged is None else ragged.spread(hidden_mask))
        states = flat_rows(before, layout)

        def product(d, out=None):
            return _by_heads(flat_rows(d, layout), states, H, heads, out)

    if call.cell != "gru":
        return product(dxg)
    if not may_write(dxg):
        return torch.cat([product(dxg[..., : 2 * H]), product(dan)])
    dw = y.new_empty(w_hh.shape)
    rz, n = dw[: 2 * H], dw[2 * H :]
    made = product(dxg[..., : 2 * H], rz)
    if made is not rz:
        rz.copy_(made)
    del made
    n.copy_(product(dan))  # not made there: elsewhere than at a line's begin a library may sum differently
    return dw


def _by_heads(d, states, H, heads, out=None):
    """d^T @ states, [X, H], or only its blocks on the diagonal of each gate, [X, H/heads]."""
    if heads == 1:
        return over_rows(d, states, out)
    d = d.reshape(d.shape[0], d.shape[1] // H, heads, H // heads)  # (rows, gate, head, unit)
    states = states.reshape(states.shape[0], heads, H // heads)
    kind = d.dtype
    if widened(d):
        d, states = d.float(), states.float()
    return torch.einsum("rgnu,rnk->gnuk", d, states).reshape(-1, H // heads).to(kind)


def peephole_gradient(dxg, gates, cells, c0, reverse, options, dtype):
    """[3, H]: sums over time and batch of the gates' gradients times the cell state that each of them saw."""
    lengths, resets, _, _, _, zone_c, _, zoneout_c = options
    before = state_before(cells, None if c0 is None else c0.float(), reverse, lengths, resets)
    if zone_c is None and zoneout_c == 0.0:
        new = cells
    else:  # what the cell computed, before zoneout
        i, f, g, _ = gates.float().chunk(4, -1)
        new = f * before + i * g
        if lengths is not None and cells.dim() == 3:
            new = torch.where(ragged_of(cells, lengths).active()[..., None], new, 0.0)
    di, df, _, do = dxg.float().chunk(4, -1)
    over = tuple(range(dxg.dim() - 1))
    return torch.stack([(di * before).sum(over), (df * before).sum(over), (do * new).sum(over)]).to(dtype)


def segments(steps, reverse):
    """[(begin, end)] in the order in which the scan runs them: about sqrt(steps) pieces."""
    size = max(1, round(steps**0.5))
    pieces = [(t, min(t + size, steps)) for t in range(0, steps, size)]
    return pieces[::-1] if reverse else pieces


def checkpoints(cells, reverse):
    """[S - 1, B, H]: c on entering each segment but the first one that runs."""
    entries = segments(cells.shape[0], reverse)[1:]
    times = [end if reverse else begin - 1 for begin, end in entries]
    return cells[torch.tensor(times, dtype=torch.int64, device=cells.device)]


def recomputed_scan_gradients(call, grads, xg, y, kept, h0, c0, weights, options):
    """The backward pass of a scan that kept only y and `checkpoints`: segment by segment, the last one first, the
    forward scan is run again with everything saved, then differentiated.

    grads: (dy, dh_n, dc_n, dcells). weights: (w_hh, b_hh). xg [T, B, G*H] is overwritten by its gradient, so that no
    second tensor of that size is needed. Returns (dxg, dan, dh0, dc0, db_hh, dpeephole).
    """
    dy, dh, dc, dcells = grads
    w_hh, b_hh = weights
    lstm, reverse, scan = call.cell == "lstm", call.reverse, SCAN[call.backend]
    lengths, peephole = options[0], options[3]
    pieces = segments(y.shape[0], reverse)
    dan = y.new_empty(y.shape if call.cell == "gru" else 0)
    db = dpeephole = None
    for i in range(len(pieces) - 1, -1, -1):
        begin, end = pieces[i]
        cut = slice(begin, end)
        h_in, c_in = h0, c0
        if i > 0:
            h_in = y[end] if reverse else y[begin - 1]
            c_in = kept[i - 1].to(y.dtype) if lstm else None
            if lengths is not None and reverse:  # a sequence may begin in any segment
                began = (lengths > end)[:, None]
                h_in = torch.where(began, h_in, h0)
                c_in = torch.where(began, c_in, c0) if lstm else None
        part = _cut(options, begin, end)
        again = scan.fwd(call.cell, xg[cut], h_in, c_in, w_hh, b_hh, *part, reverse, True, False)
        y_part, _, _, gates, cells = again
        arriving = (None if dy is None else dy[cut], dh, dc, None if dcells is None else dcells[cut])
        dxg_part, dan_part, dh, dc, db_part = scan_backward(
            call, arriving, y_part, gates, cells, (h_in, c_in), w_hh, part, overwrite=peephole is None
        )
        if peephole is not None:
            dp = peephole_gradient(dxg_part, gates, cells, c_in, reverse, part, torch.float32)
            dpeephole = dp if dpeephole is None else dpeephole + dp
        xg[cut] = dxg_part
        if call.cell == "gru":
            dan[cut] = dan_part
        db = db_part if db is None else db + db_part
        dc = dc if lstm else None
        del again, y_part, gates, cells, dxg_part, dan_part  # before the next segment's
    return xg, dan, dh, dc, db, None if peephole is None else dpeephole.to(peephole.dtype)


def _cut(options, begin, end):
    """The options of the steps from begin to end."""
    lengths, resets, hidden_mask, peephole, zone_h, zone_c, *zoneouts = options
    if lengths is not None:
        lengths = (lengths - begin).clamp(0, end - begin)
    resets, zone_h, zone_c = (None if t is None else t[begin:end] for t in (resets, zone_h, zone_c))
    return (lengths, resets, hidden_mask, peephole, zone_h, zone_c, *zoneouts)
