"""torch.nn.RNN, LSTM and GRU on seqfuse.ops. They do not subclass torch's: Dynamo refuses any child of those."""

import math
import numbers
import warnings

import torch
from torch import _VF, nn
from torch.nn.utils.rnn import PackedSequence

from seqfuse import dispatch, explanation, ops
from seqfuse.ops.recurrent import SHORT, SHORT_STEPS, RecurrentCase


class _Recurrent(nn.Module):
    """What the three share: torch.nn.RNNBase's attributes and parameter names, so that state_dicts are interchangeable
    and seqfuse.fuse can turn one class into the other in place."""

    def __init__(self, mode, gates, input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
                 bidirectional=False, proj_size=0, device=None, dtype=None):  # fmt: skip
        super().__init__()
        _check_sizes(mode, input_size, hidden_size, num_layers, proj_size)
        _check_options(bias, batch_first, dropout, num_layers)
        self.mode, self.input_size, self.hidden_size, self.num_layers = mode, input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bool(bidirectional), proj_size
        out = proj_size or hidden_size
        directions = 2 if bidirectional else 1
        self._flat_weights_names, self._all_weights = [], []
        for layer in range(num_layers):
            for suffix in ["", "_reverse"][:directions]:
                width = input_size if layer == 0 else out * directions
                shapes = {"weight_ih": (gates * hidden_size, width), "weight_hh": (gates * hidden_size, out)}
                if bias:
                    shapes |= {"bias_ih": (gates * hidden_size,), "bias_hh": (gates * hidden_size,)}
                if proj_size:
                    shapes["weight_hr"] = (proj_size, hidden_size)
                names = [f"{name}_l{layer}{suffix}" for name in shapes]
                for name, shape in zip(names, shapes.values(), strict=True):
                    setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                self._flat_weights_names += names
                self._all_weights.append(names)
        self.reset_parameters()

    def reset_parameters(self):
        bound = 1.0 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    @property
    def all_weights(self):
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def flatten_parameters(self):
        """Does nothing: no flat buffer is needed, so tied, edited and parametrized weights just work."""

    def extra_repr(self):
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = dict(proj_size=0, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False)
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text

    def forward(self, input, hx=None):
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        self._check_input(input)
        batched = input.dim() == 3
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
        hx = self._check_state(hx, input, batched)
        handed_over = self._handed_over(input)
        if handed_over:
            explanation.handed_over(self, handed_over)
            y, state = self._torch(input, hx)
        else:
            explanation.entering(self)
            y, state = self._run(input, hx)
        if batched:
            return y, state
        y = y.squeeze(0 if self.batch_first else 1)
        return y, tuple(s.squeeze(1) for s in state) if self._is_lstm else state.squeeze(1)

    @property
    def _is_lstm(self):
        return self.mode == "LSTM"

    def _handed_over(self, input):
        """Why this call goes to PyTorch's own op without a closer look, or None."""
        if self.proj_size:
            return "proj_size is computed by PyTorch's own op"
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not input.is_cpu or not dispatch.may_shortcut():
            return None
        if input.shape[1 if self.batch_first else 0] >= SHORT_STEPS or torch.is_autocast_enabled("cpu"):
            return None
        return SHORT

    def typical_case(self):
        """(op, case) of a call of usual size, for explain() of a module that has not been called."""
        if self.proj_size:
            return None
        weight = getattr(self, self._flat_weights_names[0])
        cell = self.mode.lower()
        case = RecurrentCase(cell, weight.device.type, weight.dtype, 64, 32, self.input_size, self.hidden_size,
                             self.num_layers, self.bidirectional, self.training)  # fmt: skip
        return cell.split("_")[0], case

    def _check_input(self, input):
        name = self.mode.split("_")[0]
        if input.dim() not in (2, 3):
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        self._check_features(input)

    def _check_features(self, input):
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )
        weight = getattr(self, self._flat_weights_names[0])
        if input.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
            )

    def _state_shapes(self, batch):
        count = self.num_layers * (2 if self.bidirectional else 1)
        return (count, batch, self.proj_size or self.hidden_size), (count, batch, self.hidden_size)

    def _check_state(self, hx, input, batched):
        """The initial state as 3-D tensors, or None for zeros."""
        if hx is None:
            return None
        states = tuple(hx) if self._is_lstm else (hx,)
        if self._is_lstm and len(states) != 2:
            raise ValueError(f"LSTM: hx must be (h0, c0), got {len(states)} tensors")
        dims = 3 if batched else 2
        for s in states:
            if s.dim() != dims:
                kind = "batched 3-D" if batched else "unbatched 2-D"
                raise RuntimeError(f"For {kind} input, hx should also be {dims}-D but got {s.dim()}-D tensor")
        if not batched:
            states = tuple(s.unsqueeze(1) for s in states)
        for i, (s, shape) in enumerate(zip(states, self._state_shapes(input.shape[0 if self.batch_first else 1]))):  # noqa: B905
            if tuple(s.shape) != shape:
                which = f"hidden[{i}]" if self._is_lstm else "hidden"
                raise RuntimeError(f"Expected {which} size {shape}, got {list(s.shape)}")
        return states if self._is_lstm else states[0]

    def _options(self):
        return dict(
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
        )

    def _torch(self, input, hx, batch_sizes=None):
        """PyTorch's own op, for what the kernels do not take. With batch_sizes the input is packed data."""
        if hx is None:
            batch = int(batch_sizes[0]) if batch_sizes is not None else input.shape[0 if self.batch_first else 1]
            hx = tuple(input.new_zeros(shape) for shape in self._state_shapes(batch))
            hx = hx if self._is_lstm else hx[0]
        flat = [getattr(self, name) for name in self._flat_weights_names]
        op = getattr(_VF, self.mode.lower())
        common = (flat, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if batch_sizes is None:
            out = op(input, hx, *common, self.batch_first)
        else:
            out = op(input, batch_sizes, hx, *common)
        return out[0], out[1:] if self._is_lstm else out[1]

    def _packed(self, packed, hx):
        explanation.handed_over(self, "a PackedSequence is computed by PyTorch's own op")
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        self._check_features(data)
        states = None if hx is None else (tuple(hx) if self._is_lstm else (hx,))
        if states is not None:
            for i, (s, shape) in enumerate(zip(states, self._state_shapes(int(batch_sizes[0])))):  # noqa: B905
                if tuple(s.shape) != shape:
                    which = f"hidden[{i}]" if self._is_lstm else "hidden"
                    raise RuntimeError(f"Expected {which} size {shape}, got {list(s.shape)}")
            if sorted_indices is not None:
                states = tuple(s.index_select(1, sorted_indices) for s in states)
            states = states if self._is_lstm else states[0]
        y, state = self._torch(data, states, batch_sizes)
        if unsorted_indices is not None:
            state = (
                tuple(s.index_select(1, unsorted_indices) for s in state)
                if self._is_lstm
                else state.index_select(1, unsorted_indices)
            )
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), state


def _check_sizes(mode, input_size, hidden_size, num_layers, proj_size):
    for name, value in (("input_size", input_size), ("hidden_size", hidden_size)):
        if not isinstance(value, int):
            raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
        if value <= 0:
            raise ValueError(f"{name} must be greater than zero")
    if num_layers <= 0:
        raise ValueError("num_layers must be greater than zero")
    if proj_size and mode != "LSTM":
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    if proj_size < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    if proj_size >= hidden_size:
        raise ValueError("proj_size has to be smaller than hidden_size")


def _check_options(bias, batch_first, dropout, num_layers):
    for name, value in (("bias", bias), ("batch_first", batch_first)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    if not isinstance(dropout, numbers.Number) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
        )
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
            f"num_layers greater than 1, but got dropout={dropout} and num_layers={num_layers}",
            stacklevel=4,
        )


class LSTM(_Recurrent):
    """torch.nn.LSTM: same constructor, parameters, call and outputs.

    forward(input [T, B, I] (batch_first: [B, T, I]; unbatched [T, I]; or a PackedSequence), hx=(h0, c0) or None)
    -> (output [T, B, D*H], (h_n, c_n) [L*D, B, H]).
    """

    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", 4, *args, **kwargs)

    def _run(self, input, hx):
        return ops.lstm(input, hx, self.all_weights, **self._options())


class GRU(_Recurrent):
    """torch.nn.GRU: same constructor, parameters, call and outputs. forward(input, h0) -> (output, h_n)."""

    def __init__(self, *args, **kwargs):
        super().__init__("GRU", 3, *args, **kwargs)

    def _run(self, input, hx):
        return ops.gru(input, hx, self.all_weights, **self._options())


class RNN(_Recurrent):
    """torch.nn.RNN: same constructor, parameters, call and outputs. forward(input, h0) -> (output, h_n)."""

    def __init__(self, input_size, hidden_size, num_layers=1, nonlinearity="tanh", *args, **kwargs):
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{nonlinearity.upper()}", 1, input_size, hidden_size, num_layers, *args, **kwargs)
        self.nonlinearity = nonlinearity

    def _run(self, input, hx):
        return ops.rnn(input, hx, self.all_weights, nonlinearity=self.nonlinearity, **self._options())
