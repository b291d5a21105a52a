"""What a recurrent layer may do besides torch.nn's: its options, and the random masks that they draw."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from seqfuse.ops import checks
from seqfuse.ops.autograd import autocast_is_on, traced
from seqfuse.reference import ScanOptions


class RecurrentOptions(NamedTuple):
    """Options of lstm, gru and rnn beyond torch.nn's. The probabilities draw masks only in training.

    zoneout: probability that a unit keeps the value of the step before (Krueger et al. 2017, arXiv:1606.01305); LSTM:
        also (of h, of c). In evaluation the expectation: p * before + (1 - p) * new.
    variational_dropout: probability of dropping a unit of each layer's input, and of h_{t-1} on its way into w_hh, with
        one mask for the whole sequence (Gal and Ghahramani 2016, arXiv:1512.05287); also (of the input, of h).
    weight_drop: probability of dropping an element of w_hh, one mask a call (Merity et al. 2018, arXiv:1708.02182).
    layer_norm: LSTM, for each layer and direction (gain of x @ w_ih^T [4H], gain of h @ w_hh^T [4H], gain and bias of c
        [H], [H]) (Ba, Kiros, Hinton 2016, arXiv:1607.06450); the two biases are added after the gains.
    peephole: LSTM, for each layer and direction [3, H]: weights from c to the gates i, f, o (Gers et al. 2002).
    heads: w_hh is block-diagonal, [G*H, H/heads]: a unit sees the units of its own head only.
    recompute: keep h and, at about sqrt(T) checkpoints, c; run the scan again in the backward pass.
    """

    zoneout: float | tuple[float, float] = 0.0
    variational_dropout: float | tuple[float, float] = 0.0
    weight_drop: float = 0.0
    layer_norm: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
    peephole: Sequence[torch.Tensor] | None = None
    heads: int = 1
    recompute: bool = False

    def zoneouts(self):
        """(of h, of c)."""
        return self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)

    def variational(self):
        """(of the input, of h)."""
        both = self.variational_dropout
        return both if isinstance(both, tuple) else (both, both)


NO_OPTIONS = RecurrentOptions()


def in_force(options, lstm, training, projected):
    """Names of the options that change what this call computes: what the choice of a backend depends on."""
    if options is NO_OPTIONS:
        return ()
    zone_h, zone_c = options.zoneouts()
    over_input, over_hidden = options.variational() if training else (0.0, 0.0)
    found = []
    if zone_h or (lstm and zone_c):
        found.append("zoneout")
    if over_input:
        found.append("variational_dropout")
    if over_hidden:
        found.append("variational_dropout of h")
    if projected and (zone_h or over_hidden):
        found.append("dropout of a projected h")
    if options.weight_drop and training:
        found.append("weight_drop")
    if options.layer_norm is not None:
        found.append("layer_norm")
    if options.peephole is not None:
        found.append("peephole")
    if options.heads > 1:
        found.append("heads")
    if options.recompute:
        found.append("recompute")
    return tuple(found)


def projection_in_force(P, H):
    """The same for a projection from H to P units. A narrow one makes PyTorch's product of a step the smaller one."""
    return ("proj_size", "narrow proj_size") if 2 * P < H else ("proj_size",)


def check_probability(op, name, value, pair=True):
    """One probability, or two of them where the argument takes a pair."""
    values = value if isinstance(value, tuple) and pair and len(value) == 2 else (value,)
    for p in values:
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p <= 1.0:
            kind = "a probability in [0, 1] or a pair of them" if pair else "a probability in [0, 1]"
            raise ValueError(f"{op}: {name} must be {kind}, got {value!r}")


def check_options(op, options, x, count, H):
    """count: layers times directions."""
    if not isinstance(options, RecurrentOptions):
        raise TypeError(f"{op}: options must be an ops.RecurrentOptions, got {type(options).__name__}")
    lstm = op == "lstm"
    check_probability(op, "zoneout", options.zoneout, pair=lstm)
    check_probability(op, "variational_dropout", options.variational_dropout)
    check_probability(op, "weight_drop", options.weight_drop, pair=False)
    heads = options.heads
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or H % heads:
        raise ValueError(f"{op}: heads must be a whole number that divides the hidden size {H}, got {heads!r}")
    autocast = torch._C._is_any_autocast_enabled() and autocast_is_on(x)
    for name, given, shapes in (
        ("layer_norm", options.layer_norm, ((4 * H,), (4 * H,), (H,), (H,))),
        ("peephole", options.peephole, ((3, H),)),
    ):
        if given is None:
            continue
        if not lstm:
            raise ValueError(f"{op}: {name} is an option of the LSTM")
        if len(given) != count:
            raise ValueError(
                f"{op}: {name} must have one entry for each layer and direction ({count}), got {len(given)}"
            )
        for i, entry in enumerate(given):
            tensors = (entry,) if isinstance(entry, torch.Tensor) else tuple(entry)
            if len(tensors) != len(shapes):
                raise ValueError(f"{op}: {name}[{i}] must hold {len(shapes)} tensors, got {len(tensors)}")
            for t, shape in zip(tensors, shapes, strict=True):
                checks.tensor(op, f"{name}[{i}]", t)
                checks.shape(op, f"{name}[{i}]", t, shape)
                checks.same_device(op, f"{name}[{i}]", t, "x", x)
                if not autocast:
                    checks.same_dtype(op, f"{name}[{i}]", t, "x", x)


def drawn(shape, p, device):
    """A bool tensor, each element true with probability p (to the nearest 1/65,536), from torch's generator."""
    if p >= 1.0:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if traced() or torch.device(device).type != "cpu":
        return torch.rand(shape, device=device) < p
    return _lanes(shape) < round(p * 65536) - 32768


def _lanes(shape):
    """Random int16 numbers over their whole range. One 64-bit number makes four: torch's bernoulli_ takes ten times as
    long, as much as a tenth of an LSTM for weight_drop."""
    count = torch.Size(shape).numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.int16)[:count].view(shape)


def keep_mask(shape, p, like):
    """A dropout mask to multiply with: 0 with probability p, else 1 / (1 - p); of like's dtype and device."""
    if p >= 1.0:
        return like.new_zeros(shape)
    if traced() or like.device.type != "cpu":
        return (torch.rand(shape, device=like.device) >= p).to(like.dtype) * (1.0 / (1.0 - p))
    mask = torch.empty(shape, dtype=like.dtype)
    return torch.ge(_lanes(shape), round(p * 65536) - 32768, out=mask).mul_(1.0 / (1.0 - p))


def dropout(x, p):
    return x * keep_mask(x.shape, p, x)


def block_diagonal(w_hh, heads):
    """[G*H, P/heads] -> [G*H, P], zeros off the blocks."""
    width = w_hh.shape[1]
    blocks = w_hh.view(4, heads, -1, 1, width)  # (gate, head, unit, head of the state, k)
    eye = torch.eye(heads, dtype=w_hh.dtype, device=w_hh.device).view(1, heads, 1, heads, 1)
    return (blocks * eye).reshape(w_hh.shape[0], heads * width)


def between_layers(x, p, steps, ragged):
    """Dropout of a layer's output, with the same mask for the same seed in rows, padded, and in either layout."""
    if x.dim() == 3:
        return dropout(x, p)
    return x * ragged.pack(keep_mask((steps, ragged.lengths.shape[0], x.shape[1]), p, x))


def scan_options(options, k, w_hh, like, sizes, training, ragged, resets):
    """The options of the scan of layer and direction k, with its masks drawn, for these sizes (T, B, h's width, H).

    resets: [T, B] or None (in rows: [N]). like: a tensor of the computation's dtype and device.
    Returns (w_hh after weight_drop, ScanOptions).
    """
    T, B, width, H = sizes
    lengths = None if ragged is None else ragged.lengths
    if options is NO_OPTIONS:
        return w_hh, ScanOptions(lengths, resets)
    lstm = w_hh.shape[0] == 4 * H
    zoneout_h, zoneout_c = options.zoneouts()
    zoneout_c = zoneout_c if lstm else 0.0
    hidden_mask = zone_h = zone_c = None
    if training:
        if options.weight_drop:
            w_hh = dropout(w_hh, options.weight_drop)
        over_hidden = options.variational()[1]
        if over_hidden:
            hidden_mask = keep_mask((B, width), over_hidden, like)
        packed = ragged is not None and ragged.rows

        def zone(p, units):
            mask = drawn((T, B, units), p, like.device)
            return ragged.pack(mask) if packed else mask

        zone_h = zone(zoneout_h, width) if zoneout_h else None
        zone_c = zone(zoneout_c, H) if zoneout_c else None
        zoneout_h = zoneout_c = 0.0
    peephole = None if options.peephole is None else options.peephole[k]
    norm = None if options.layer_norm is None else tuple(options.layer_norm[k][1:])
    zoneouts = float(zoneout_h), float(zoneout_c)
    return w_hh, ScanOptions(lengths, resets, hidden_mask, peephole, zone_h, zone_c, *zoneouts, norm)
