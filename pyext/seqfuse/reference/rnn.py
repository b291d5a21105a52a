"""The recurrent scan of one layer and one direction: Elman RNN, GRU (Cho et al. 2014, arXiv:1406.1078, with the reset
gate after the product as in cuDNN and torch.nn.GRU) and LSTM (Hochreiter and Schmidhuber 1997; forget gate: Gers 2000).
"""

import torch
import torch.nn.functional as F

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


def rnn_cell(cell, x, a, h, c):
    """One step. x, a: [B, G*H], the input's and the hidden state's part of the gates. Returns (h, c or None)."""
    if cell == "lstm":
        i, f, g, o = (x + a).chunk(4, -1)  # (B, H) each
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if cell == "gru":
        (xr, xz, xn), (ar, az, an) = x.chunk(3, -1), a.chunk(3, -1)
        r, z = (xr + ar).sigmoid(), (xz + az).sigmoid()
        n = (xn + r * an).tanh()
        return n + z * (h - n), None
    return ((x + a).tanh() if cell == "rnn_tanh" else (x + a).relu()), None


def rnn_scan(cell, xg, h0, c0, w_hh, b_hh, reverse):
    """Run the cell over time.

    cell: "rnn_tanh", "rnn_relu", "gru" or "lstm" with G = 1, 1, 3, 4 gates, in torch.nn's order (r z n; i f g o).
    xg: [T, B, G*H], the input's part of the gates with its bias. h0, c0: [B, H] (c0 for LSTM only).
    w_hh: [G*H, H]; b_hh: [G*H] or None. reverse: from the last step to the first.
    Returns (y [T, B, H], h_n [B, H], c_n [B, H] or None).
    """
    steps = range(xg.shape[0] - 1, -1, -1) if reverse else range(xg.shape[0])
    h, c, outputs = h0, c0, []
    for t in steps:
        h, c = rnn_cell(cell, xg[t], F.linear(h, w_hh, b_hh), h, c)
        outputs.append(h)
    if reverse:
        outputs.reverse()
    return torch.stack(outputs), h, c if cell == "lstm" else None
