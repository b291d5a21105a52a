"""lstm, gru and rnn: stacks of recurrent layers. The autograd of one layer and direction is in rnn_layer.py."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import _VF

from seqfuse import dispatch, native, reference
from seqfuse.ops import checks, library
from seqfuse.ops.rnn_layer import rnn_layer


class RecurrentCase(NamedTuple):
    """What the choice of a backend may depend on."""

    cell: str
    device: str
    dtype: torch.dtype
    T: int
    B: int
    input_size: int
    hidden_size: int
    layers: int
    bidirectional: bool
    grad: bool

    def shape_class(self) -> str:
        def power(n):
            return f"2^{max(n, 1).bit_length()}"

        return (
            f"{str(self.dtype)[6:]} T{power(self.T)} B{power(self.B)} I{power(self.input_size)} H{self.hidden_size}"
            f"{' bidirectional' if self.bidirectional else ''}{' grad' if self.grad else ''}"
        )


def lstm(x, hx, weights, *, bidirectional=False, batch_first=False, dropout=0.0, training=False):
    """Long short-term memory over a whole sequence, as torch.nn.LSTM computes it.

    x: [T, B, I], or [B, T, I] with batch_first; floating point. L layers, D = 2 directions if bidirectional, else 1.
    hx: (h0, c0), each [L*D, B, H], or None for zeros.
    weights: L*D tuples (w_ih [4H, I or D*H], w_hh [4H, H], b_ih [4H], b_hh [4H]), or without the two biases, in
    the order of torch.nn.LSTM's all_weights: layer by layer, forward before backward; gates i f g o.
    dropout: probability of zeroing an output of any layer but the last, if training.
    Returns (y [T, B, D*H] (batch_first: [B, T, D*H]), (h_n, c_n)), each of these [L*D, B, H].

    Raises ValueError or TypeError on bad arguments before any kernel runs, RuntimeError for T = 0 (as torch.nn does).
    Source: Hochreiter and Schmidhuber 1997; Gers et al. 2000 (forget gate).
    """
    h0, c0 = hx if hx is not None else (None, None)
    y, h_n, c_n = _run("lstm", "lstm", x, h0, c0, weights, bidirectional, batch_first, dropout, training)
    return y, (h_n, c_n)


def gru(x, h0, weights, *, bidirectional=False, batch_first=False, dropout=0.0, training=False):
    """Gated recurrent unit over a whole sequence, as torch.nn.GRU computes it (reset gate after the product).

    Arguments and results as `lstm`, without the cell state: h0 [L*D, B, H] or None; weights with 3H rows, gates r z n.
    Returns (y, h_n). Source: Cho et al. 2014 (arXiv:1406.1078).
    """
    y, h_n, _ = _run("gru", "gru", x, h0, None, weights, bidirectional, batch_first, dropout, training)
    return y, h_n


def rnn(x, h0, weights, *, nonlinearity="tanh", bidirectional=False, batch_first=False, dropout=0.0, training=False):
    """Elman network over a whole sequence, as torch.nn.RNN computes it: h = act(W_ih x + b_ih + W_hh h + b_hh).

    Arguments and results as `gru`, with H rows; nonlinearity: "tanh" or "relu". Source: Elman 1990.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    cell = f"rnn_{nonlinearity}"
    y, h_n, _ = _run("rnn", cell, x, h0, None, weights, bidirectional, batch_first, dropout, training)
    return y, h_n


def _run(op, cell, x, h0, c0, weights, bidirectional, batch_first, dropout, training):
    weights = [tuple(w) for w in weights]
    if not _usual(cell, x, h0, weights, bidirectional):
        _check(op, cell, x, h0, c0, weights, bidirectional, batch_first)
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"{op}: dropout must be in [0, 1], got {dropout}")
    x, h0, c0, weights = _autocast(x, h0, c0, weights)
    T, B = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    if T == 0:
        raise RuntimeError(f"{op}: the sequence is empty (T = 0); torch.nn refuses it too")
    directions = 2 if bidirectional else 1
    H = weights[0][1].shape[1]
    tensors = [x, h0, c0, *(t for w in weights for t in w)]
    case = RecurrentCase(
        cell,
        x.device.type,
        x.dtype,
        T,
        B,
        x.shape[2],
        H,
        len(weights) // directions,
        bidirectional,
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
    )
    name = dispatch.select(op, case).backend
    if name == "torch":
        return _torch(cell, x, h0, c0, weights, bidirectional, batch_first, dropout, training)
    return _layers(case, name, x, h0, c0, weights, batch_first, dropout if training else 0.0)


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


def _check(op, cell, x, h0, c0, weights, bidirectional, batch_first):
    gates = reference.GATES[cell]
    checks.tensor(op, "x", x, dims=(3,))
    directions = 2 if bidirectional else 1
    if not weights or len(weights) % directions:
        raise ValueError(
            f"{op}: weights must hold one tuple for each layer and direction ({directions} a layer), got {len(weights)}"
        )
    width, H = x.shape[2], None
    for i, w in enumerate(weights):
        if len(w) not in (2, 4):
            raise ValueError(
                f"{op}: weights[{i}] must be (w_ih, w_hh) or (w_ih, w_hh, b_ih, b_hh), got {len(w)} tensors"
            )
        for name, t in zip(("w_ih", "w_hh", "b_ih", "b_hh"), w, strict=False):
            checks.tensor(op, f"weights[{i}].{name}", t)
            checks.same_device(op, f"weights[{i}].{name}", t, "x", x)
            if not torch.is_autocast_enabled(x.device.type):
                checks.same_dtype(op, f"weights[{i}].{name}", t, "x", x)
        if H is None:
            checks.tensor(op, "weights[0].w_hh", w[1], dims=(2,))
            H = w[1].shape[1]
        into = width if i < directions else directions * H
        shapes = (gates * H, into), (gates * H, H), (gates * H,), (gates * H,)
        for name, t, wanted in zip(("w_ih", "w_hh", "b_ih", "b_hh"), w, shapes, strict=False):
            checks.shape(op, f"weights[{i}].{name}", t, wanted)
    batch = x.shape[0] if batch_first else x.shape[1]
    for name, state in (("h0", h0), ("c0", c0)):
        if state is None:
            continue
        checks.tensor(op, name, state)
        checks.shape(op, name, state, (len(weights), batch, H))
        checks.same_device(op, name, state, "x", x)
        if not torch.is_autocast_enabled(x.device.type):
            checks.same_dtype(op, name, state, "x", x)
    if cell == "lstm" and (h0 is None) != (c0 is None):
        raise ValueError(f"{op}: hx must hold both h0 and c0, or be None")


def _autocast(x, h0, c0, weights):
    """Under autocast everything is converted to its dtype, as torch does for its own recurrent layers on a GPU."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, h0, c0, weights
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t):
        return None if t is None else t.to(dtype)

    return cast(x), cast(h0), cast(c0), [tuple(cast(t) for t in w) for w in weights]


def _layers(case, name, x, h0, c0, weights, batch_first, dropout):
    directions = 2 if case.bidirectional else 1
    x = x.transpose(0, 1) if batch_first else x  # (T, B, I), a view
    last_h, last_c = [], []
    for layer in range(case.layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            h = None if h0 is None else h0[k]
            c = None if c0 is None else c0[k]
            y, h_n, c_n = rnn_layer(name, case.cell, x, h, c, weights[k], direction == 1)
            outputs.append(y)
            last_h.append(h_n)
            last_c.append(c_n)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)  # (T, B, D*H)
        if dropout > 0.0 and layer < case.layers - 1:
            x = F.dropout(x, dropout)
    c_n = torch.stack(last_c) if case.cell == "lstm" else None
    return x.transpose(0, 1) if batch_first else x, torch.stack(last_h), c_n


_TORCH = {"lstm": _VF.lstm, "gru": _VF.gru, "rnn_tanh": _VF.rnn_tanh, "rnn_relu": _VF.rnn_relu}


def _torch(cell, x, h0, c0, weights, bidirectional, batch_first, dropout, training):
    """PyTorch's own op: oneDNN or ATen on the CPU, cuDNN on a GPU."""
    H, batch = weights[0][1].shape[1], x.shape[0] if batch_first else x.shape[1]
    if h0 is None:
        h0 = x.new_zeros(len(weights), batch, H)
        c0 = h0 if cell == "lstm" else None
    flat = [t for w in weights for t in w]
    layers = len(weights) // (2 if bidirectional else 1)
    state = (h0, c0) if cell == "lstm" else h0
    out = _TORCH[cell](x, state, flat, len(weights[0]) == 4, layers, dropout, training, bidirectional, batch_first)
    return out if cell == "lstm" else (*out, None)


def _kernel_refusal(case):
    return "the batch is empty" if case.B == 0 else None


SHORT_STEPS = 8
SHORT = f"inference over fewer than {SHORT_STEPS} steps: packing the weights costs more than the scan saves"


def _cpu_prefers(case):
    """Built-in rules of `auto` on a CPU: measured with two threads and AVX-512 (docs/recurrent.md)."""
    if not case.grad and case.T < SHORT_STEPS:
        return SHORT
    if case.grad and case.T < {"lstm": 1, "gru": 2}.get(case.cell, 4):
        return "training over so few steps: packing the weights costs more than the scan saves"
    if case.cell != "lstm":
        return None
    if case.dtype == torch.float32 and (case.T * case.B >= 1024 and case.B >= 8 if case.grad else case.B >= 4):
        return "oneDNN's float32 LSTM was measured 1.1 to 1.3 times as fast at this batch size"
    if case.dtype == torch.bfloat16 and not case.grad and case.B >= 8 and native.isa() == "avx512_bf16":
        return "oneDNN's bfloat16 LSTM was measured 1.1 times as fast in inference at this batch size"
    return None


def _torch_refusal(case):
    if torch.compiler.is_compiling():
        return "torch.compile breaks the graph at torch's own recurrent ops, or unrolls them over time"
    return None


def _backends():
    def refuses(rule):
        return lambda case: rule(case.device, case.dtype) or _kernel_refusal(case)

    def never(*_):
        raise AssertionError("lstm, gru and rnn run layer by layer: see rnn_layer.py")

    return (
        dispatch.Backend("cpu", never, never, refuses(library.cpu_refusal), _cpu_prefers),
        dispatch.Backend(
            "triton",
            never,
            never,
            refuses(library.triton_refusal),
            lambda c: "the interpreter is for tests" if c.device == "cpu" else _not_measured(c),
            note=library.NOT_RUN_ON_GPU,
        ),
        dispatch.Backend(
            "cuda", never, never, refuses(library.cuda_refusal), _not_measured, note=library.NOT_RUN_ON_GPU
        ),
        dispatch.Backend("torch", never, None, _torch_refusal, note="PyTorch's own op (oneDNN, ATen or cuDNN)"),
        dispatch.Backend("reference", never, None),
    )


def _not_measured(case):
    return "not yet measured against cuDNN on a GPU"


for _op in ("lstm", "gru", "rnn"):
    dispatch.register(_op, *_backends())
