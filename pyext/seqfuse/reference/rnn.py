"""The recurrent scan of one layer and one direction: Elman RNN, GRU (Cho et al. 2014, arXiv:1406.1078, with the reset
gate after the product as in cuDNN and torch.nn.GRU) and LSTM (Hochreiter and Schmidhuber 1997; forget gate: Gers 2000),
with what people add to them: lengths, resets, dropout of the hidden state, zoneout, peepholes, heads, layer norm.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


class ScanOptions(NamedTuple):
    """What a scan may do besides its cell. The defaults are the plain scan.

    lengths: [B] int64. Sequence b ends after lengths[b] steps (with reverse it begins at lengths[b] - 1); y and cells
        are 0 beyond. A length of 0 leaves the initial state.
    resets: [T, B] bool. Where true, the state before this step (h and c) is 0 instead of what the step before left.
    hidden_mask: [B, H]. Multiplies h_{t-1} on its way into the product with w_hh, the same at every step (variational
        dropout: Gal and Ghahramani 2016, arXiv:1512.05287). A GRU's blend with h_{t-1} does not see it.
    peephole: [3, H], LSTM: weights from c_{t-1} to the gates i and f, and from the new c to o (Gers et al. 2002).
    zone_h, zone_c: [T, B, H] bool (zone_c: LSTM). True keeps the value of the step before (zoneout in training: Krueger
        et al. 2017, arXiv:1606.01305). zoneout_h, zoneout_c: without such a mask, the weight of the value of the step
        before in the blend (its expectation, in evaluation).
    norm: LSTM: (gain [4H] of the product with w_hh, gain [H] and bias [H] of c on its way to h), layer normalisation
        as in Ba, Kiros, Hinton 2016 (arXiv:1607.06450), eq. 20 to 22; xg comes in normalised.
    projection: [P, H], LSTM: h is its product with what the cell shows, so h0, y, w_hh's columns, hidden_mask and
        zone_h have the width P, c keeps H (Sak, Senior, Beaufays 2014, arXiv:1402.1128).
    """

    lengths: torch.Tensor | None = None
    resets: torch.Tensor | None = None
    hidden_mask: torch.Tensor | None = None
    peephole: torch.Tensor | None = None
    zone_h: torch.Tensor | None = None
    zone_c: torch.Tensor | None = None
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    norm: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    projection: torch.Tensor | None = None


PLAIN = ScanOptions()


def rnn_cell(cell, x, a, h, c, options=PLAIN):
    """One step. x, a: [B, G*H], the input's and the hidden state's part of the gates. Returns (h, c or None)."""
    if cell == "lstm":
        i, f, g, o = (x + a).chunk(4, -1)  # (B, H) each
        if options.peephole is not None:
            i, f = i + options.peephole[0] * c, f + options.peephole[1] * c
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        if options.peephole is not None:
            o = o + options.peephole[2] * c
        shown = c if options.norm is None else F.layer_norm(c, c.shape[-1:], *options.norm[1:])
        return o.sigmoid() * shown.tanh(), c
    if cell == "gru":
        (xr, xz, xn), (ar, az, an) = x.chunk(3, -1), a.chunk(3, -1)
        r, z = (xr + ar).sigmoid(), (xz + az).sigmoid()
        n = (xn + r * an).tanh()
        return n + z * (h - n), None
    return ((x + a).tanh() if cell == "rnn_tanh" else (x + a).relu()), None


def recurrent_product(h, w_hh, b_hh, norm=None):
    """h @ w_hh^T + b_hh, [B, G*H]. h: [B, H]. w_hh: [G*H, H], or [G*H, H/heads], block-diagonal: unit j of a gate sees
    the H/heads units of its own head."""
    width = w_hh.shape[1]
    if h.shape[1] == width:
        a = F.linear(h, w_hh)
    else:
        heads = h.shape[1] // width
        w = w_hh.view(-1, heads, width, width)  # (G, heads, unit, k)
        a = torch.einsum("bnk,gnuk->bgnu", h.view(-1, heads, width), w).reshape(h.shape[0], -1)
    if norm is not None:
        a = F.layer_norm(a, a.shape[-1:], norm[0])
    return a if b_hh is None else a + b_hh


def rnn_scan(cell, xg, h0, c0, w_hh, b_hh, reverse, options=PLAIN):
    """Run the cell over time.

    cell: "rnn_tanh", "rnn_relu", "gru" or "lstm" with G = 1, 1, 3, 4 gates, in torch.nn's order (r z n; i f g o).
    xg: [T, B, G*H], the input's part of the gates with its bias. h0, c0: [B, H] (c0 for LSTM only).
    w_hh: [G*H, H], or [G*H, H/heads] for block-diagonal heads; b_hh: [G*H] or None.
    reverse: from the last step to the first.
    Returns (y [T, B, H], h_n [B, H], c_n [B, H] or None, cells [T, B, H] or None: c after each step).
    """
    lengths, resets = options.lengths, options.resets
    steps = range(xg.shape[0] - 1, -1, -1) if reverse else range(xg.shape[0])
    h, c, outputs, cells = h0, c0, [], []
    for t in steps:
        x = xg[t]
        if lengths is not None:
            active = (t < lengths)[:, None]
            x = torch.where(active, x, 0.0)  # what lies in the padding, a NaN too, takes no part in the gradients
        before_h, before_c = h, c
        if resets is not None:
            keep = ~resets[t][:, None]
            before_h = torch.where(keep, before_h, 0.0)
            before_c = None if c is None else torch.where(keep, before_c, 0.0)
        masked = before_h if options.hidden_mask is None else before_h * options.hidden_mask
        a = recurrent_product(masked, w_hh, b_hh, options.norm)
        new_h, new_c = rnn_cell(cell, x, a, before_h, before_c, options)
        if options.projection is not None:
            new_h = F.linear(new_h, options.projection)
        new_h = _zoneout(new_h, before_h, None if options.zone_h is None else options.zone_h[t], options.zoneout_h)
        if new_c is not None:
            zone = None if options.zone_c is None else options.zone_c[t]
            new_c = _zoneout(new_c, before_c, zone, options.zoneout_c)
        if lengths is None:
            h, c = new_h, new_c
            outputs.append(h)
            cells.append(c)
        else:
            h = torch.where(active, new_h, h)
            c = None if c is None else torch.where(active, new_c, c)
            outputs.append(torch.where(active, new_h, 0.0))
            cells.append(None if c is None else torch.where(active, new_c, 0.0))
    if reverse:
        outputs.reverse()
        cells.reverse()
    lstm = cell == "lstm"
    return torch.stack(outputs), h, c if lstm else None, torch.stack(cells) if lstm else None


def _zoneout(new, before, mask, weight):
    if mask is not None:
        return torch.where(mask, before, new)
    return new if weight == 0.0 else weight * before + (1.0 - weight) * new
