"""torch.nn.RNN, LSTM and GRU on seqfuse.ops. They do not subclass torch's: Dynamo refuses any child of those."""

import math
import numbers
import warnings

import torch
from torch import _VF, nn
from torch.nn.utils.rnn import PackedSequence

from seqfuse import dispatch, explanation, ops
from seqfuse.ops import checks
from seqfuse.ops.products import widened
from seqfuse.ops.recurrent import WHOLE, Extent, Stack, packed_sequence
from seqfuse.ops.rnn_extras import NO_OPTIONS, check_probability, in_force, projection_in_force
from seqfuse.ops.rnn_rules import SHORT, SHORT_STEPS, RecurrentCase, torch_path


class _Recurrent(nn.Module):
    """What the three share: torch.nn.RNNBase's attributes and parameter names, so that state_dicts are interchangeable
    and seqfuse.fuse can turn one class into the other in place."""

    # What torch.nn has not; a module that fuse() turned into one of ours has no attributes for it
    zoneout, variational_dropout, weight_drop = 0.0, 0.0, 0.0
    layer_norm, peephole, heads, recompute = False, False, 1, False

    def __init__(self, mode, gates, input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
                 bidirectional=False, proj_size=0, device=None, dtype=None, **extras):  # fmt: skip
        super().__init__()
        _check_sizes(mode, input_size, hidden_size, num_layers, proj_size)
        _check_options(bias, batch_first, dropout, num_layers)
        self.mode, self.input_size, self.hidden_size, self.num_layers = mode, input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bool(bidirectional), proj_size
        for name, value in _check_extras(mode, hidden_size, proj_size, extras).items():
            setattr(self, name, value)
        out = proj_size or hidden_size
        directions = 2 if bidirectional else 1
        self._flat_weights_names, self._all_weights = [], []
        for layer in range(num_layers):
            for suffix in ["", "_reverse"][:directions]:
                width = input_size if layer == 0 else out * directions
                shapes = {
                    "weight_ih": (gates * hidden_size, width),
                    "weight_hh": (gates * hidden_size, out // self.heads),
                }
                if bias:
                    shapes |= {"bias_ih": (gates * hidden_size,), "bias_hh": (gates * hidden_size,)}
                if proj_size:
                    shapes["weight_hr"] = (proj_size, hidden_size)
                names = [f"{name}_l{layer}{suffix}" for name in shapes]
                for name, shape in zip(names, shapes.values(), strict=True):
                    setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                self._flat_weights_names += names
                self._all_weights.append(names)
        for name, shape in self._extra_shapes().items():
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def _suffixes(self):
        """ "_l0", "_l0_reverse", "_l1", ...: layer by layer, forward before backward."""
        return [f"_l{layer}{s}" for layer in range(self.num_layers) for s in ("", "_reverse")[: 1 + self.bidirectional]]

    def beyond_torch(self):
        """Names of what this module was given that torch.nn has not."""
        return [name for name, default in _EXTRAS.items() if getattr(self, name) != default and name != "recompute"]

    def _extra_shapes(self):
        """Parameters that torch.nn has not, and their shapes."""
        H, shapes = self.hidden_size, {}
        for suffix in self._suffixes():
            if self.peephole:
                shapes[f"weight_ph{suffix}"] = (3, H)
            if self.layer_norm:
                kinds = zip(_NORMS, ((4 * H,), (4 * H,), (H,), (H,)), strict=True)
                shapes |= {f"{name}{suffix}": shape for name, shape in kinds}
        return shapes

    def reset_parameters(self):
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, weight in self.named_parameters():
            if name.startswith("weight_ln"):
                nn.init.ones_(weight)
            elif name.startswith("bias_ln"):
                nn.init.zeros_(weight)
            else:
                nn.init.uniform_(weight, -bound, bound)

    @property
    def all_weights(self):
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def flatten_parameters(self):
        """Does nothing: no flat buffer is needed, so tied, edited and parametrized weights just work."""

    def extra_repr(self):
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = dict(proj_size=0, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False)
        for name, default in (defaults | _EXTRAS).items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text

    def forward(self, input, hx=None, *, lengths=None, resets=None):
        return self._forward(input, hx, lengths, resets, False)[:2]

    def _forward(self, input, hx, lengths, resets, cells):
        """(output, state, cell states or None)."""
        plain = lengths is None and resets is None and not cells
        extent = WHOLE if plain else Extent(lengths, resets, cells)
        if isinstance(input, PackedSequence):
            return self._packed(input, hx, extent)
        self._check_input(input)
        batched = input.dim() == 3
        if not batched:
            if lengths is not None:
                raise ValueError(f"{self._name}: lengths needs a batch (3-D input), got {input.dim()}-D")
            input = input.unsqueeze(0 if self.batch_first else 1)
            if resets is not None:
                if not isinstance(resets, torch.Tensor):
                    raise ValueError(f"{self._name}: resets must be a bool tensor, got {type(resets).__name__}")
                extent = extent._replace(resets=resets.unsqueeze(0 if self.batch_first else 1))
        hx = self._check_state(hx, input, batched)
        if plain and self._handed_over(input):
            explanation.handed_over(self, f"{torch_path(self.typical_case()[1])}: {SHORT}")
            y, state, cell_states = *self._torch(input, hx), None
        else:
            explanation.entering(self)
            y, state, *rest = self._run(input, hx, extent)
            cell_states = rest[0] if rest else None
        if batched:
            return y, state, cell_states
        batch = 0 if self.batch_first else 1
        y, cell_states = y.squeeze(batch), None if cell_states is None else cell_states.squeeze(batch)
        return y, tuple(s.squeeze(1) for s in state) if self._is_lstm else state.squeeze(1), cell_states

    @property
    def _is_lstm(self):
        return self.mode == "LSTM"

    @property
    def _name(self):
        return self.mode.split("_")[0]

    def _handed_over(self, input):
        """Whether this call goes to PyTorch's own op without a closer look."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not input.is_cpu or not dispatch.may_shortcut():
            return False
        if input.shape[1 if self.batch_first else 0] >= SHORT_STEPS or torch.is_autocast_enabled("cpu"):
            return False
        if widened(input):  # PyTorch's own runs its bfloat16 products in a plain loop here
            return False
        return not torch._C._are_functorch_transforms_active() and self._recurrent_options() is None

    def _recurrent_options(self):
        """What torch.nn has not, as the ops take it, or None."""
        if not (self.zoneout or self.variational_dropout or self.weight_drop or self.layer_norm or self.peephole
                or self.heads > 1 or self.recompute):  # fmt: skip
            return None
        suffixes = self._suffixes()
        norm = [tuple(getattr(self, n + s) for n in _NORMS) for s in suffixes] if self.layer_norm else None
        peephole = [getattr(self, f"weight_ph{s}") for s in suffixes] if self.peephole else None
        drops = self.zoneout, self.variational_dropout, self.weight_drop
        return ops.RecurrentOptions(*drops, norm, peephole, self.heads, self.recompute)

    @property
    def called_op(self):
        """What explain() may hear of it."""
        return self._name.lower()

    def typical_case(self):
        """(op, case) of a call of usual size, for explain() of a module that has not been called."""
        weight, cell = getattr(self, self._flat_weights_names[0]), self.mode.lower()
        extras = projection_in_force(self.proj_size, self.hidden_size) if self.proj_size else ()
        options = self._recurrent_options()
        if options is not None:
            extras = in_force(options, self._is_lstm, self.training, bool(self.proj_size)) + extras
        case = RecurrentCase(cell, weight.device.type, weight.dtype, 64, 32, self.input_size, self.hidden_size,
                             self.num_layers, self.bidirectional, self.training, extras, self.heads)  # fmt: skip
        return self.called_op, case

    def _check_input(self, input):
        if input.dim() not in (2, 3):
            raise ValueError(f"{self._name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
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

    def _check_state(self, hx, input, batched):
        """The initial state as 3-D tensors, or None for zeros."""
        if hx is None:
            return None
        if self._is_lstm and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            given = f"{len(hx)} tensors" if isinstance(hx, (tuple, list)) else f"a {type(hx).__name__.lower()}"
            raise ValueError(f"LSTM: hx must be (h0, c0), got {given}")
        states = tuple(hx) if self._is_lstm else (hx,)
        dims = 3 if batched else 2
        for name, s in zip(("h0", "c0"), states):  # noqa: B905
            if not isinstance(s, torch.Tensor):
                raise TypeError(f"{self._name}: {name} must be a tensor, got {type(s).__name__}")
            checks.same_device(self._name, name, s, "input", input)
            if not torch._C._is_any_autocast_enabled():
                checks.same_dtype(self._name, name, s, "input", input)
            if s.dim() != dims:
                kind = "batched 3-D" if batched else "unbatched 2-D"
                raise RuntimeError(f"For {kind} input, hx should also be {dims}-D but got {s.dim()}-D tensor")
        if not batched:
            states = tuple(s.unsqueeze(1) for s in states)
        self._check_state_shapes(states, input.shape[0 if self.batch_first else 1])
        return states if self._is_lstm else states[0]

    def _check_state_shapes(self, states, batch):
        count = self.num_layers * (2 if self.bidirectional else 1)
        for i, (s, width) in enumerate(zip(states, (self.proj_size or self.hidden_size, self.hidden_size))):  # noqa: B905
            if tuple(s.shape) != (count, batch, width):
                which = f"hidden[{i}]" if self._is_lstm else "hidden"
                raise RuntimeError(f"Expected {which} size {(count, batch, width)}, got {list(s.shape)}")

    def _options(self, extent):
        options = dict(
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            options=self._recurrent_options(),
        )
        if extent is not WHOLE:
            options.update(lengths=extent.lengths, resets=extent.resets)
        return options

    def _torch(self, input, hx):
        """PyTorch's own op by the shortest way, for what is too short for a kernel."""
        if hx is None:
            batch, count = input.shape[0 if self.batch_first else 1], self.num_layers * (1 + self.bidirectional)
            hx = input.new_zeros(count, batch, self.proj_size or self.hidden_size)
            if self._is_lstm:
                hx = (hx, input.new_zeros(count, batch, self.hidden_size) if self.proj_size else hx)
        flat = [getattr(self, name) for name in self._flat_weights_names]
        out = getattr(_VF, self.mode.lower())(input, hx, flat, self.bias, self.num_layers, self.dropout, self.training,
                                              self.bidirectional, self.batch_first)  # fmt: skip
        return out[0], out[1:] if self._is_lstm else out[1]

    def _packed(self, packed, hx, extent):
        """A PackedSequence in and out. The state is in the order of sequences that the caller packed."""
        data = packed.data
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        self._check_features(data)
        states = None if hx is None else (tuple(hx) if self._is_lstm else (hx,))
        if states is not None:
            self._check_state_shapes(states, int(packed.batch_sizes[0]))
        stack = Stack(self.bidirectional, self.batch_first, self.dropout, self.training,
                      self._recurrent_options() or NO_OPTIONS)  # fmt: skip
        explanation.entering(self)
        cell = self.mode.lower()
        y, h_n, c_n, cells = packed_sequence(cell.split("_")[0], cell, packed, states, self.all_weights, stack, extent)
        return y, (h_n, c_n) if self._is_lstm else h_n, cells


_EXTRAS = dict(
    zoneout=0.0, variational_dropout=0.0, weight_drop=0.0, layer_norm=False, peephole=False, heads=1, recompute=False
)
_NORMS = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")


def _check_extras(mode, hidden_size, proj_size, given):
    """The keywords that torch.nn has not, those that differ from their defaults."""
    for name in given:
        if name not in _EXTRAS:
            raise TypeError(f"{mode.split('_')[0]}() got an unexpected keyword argument {name!r}")
    extras = {n: v for n, v in given.items() if v != _EXTRAS[n]}
    op = mode.split("_")[0]
    for name in ("zoneout", "variational_dropout", "weight_drop"):
        value = extras.get(name, 0.0)
        pair = name == "variational_dropout" or (name == "zoneout" and mode == "LSTM")
        if isinstance(value, list):
            extras[name] = value = tuple(value)
        check_probability(op, name, value, pair)
    for name in ("layer_norm", "peephole", "recompute"):
        if not isinstance(extras.get(name, False), bool):
            raise TypeError(f"{op}: {name} must be a bool, got {extras[name]!r}")
        if name != "recompute" and name in extras and mode != "LSTM":
            raise ValueError(f"{op}: {name} is an option of the LSTM")
    heads = extras.get("heads", 1)
    for size, what in ((hidden_size, "hidden_size"), (proj_size, "proj_size")):
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or size % heads:
            raise ValueError(f"{op}: heads must be a whole number that divides {what} {size}, got {heads!r}")
    return extras


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
    """torch.nn.LSTM: same constructor, parameters, call and outputs, and what it has not (docs/recurrent_modules.md):
    zoneout, variational_dropout, weight_drop, layer_norm, peephole, heads, recompute.

    forward(input [T, B, I] (batch_first: [B, T, I]; unbatched [T, I]; or a PackedSequence), hx=(h0, c0) or None,
    lengths=[B] or None, resets=[T, B] bool or None, return_cell_states=False)
    -> (output [T, B, D*H], (h_n, c_n) [L*D, B, H]), with return_cell_states also c after each step of the last layer.
    """

    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", 4, *args, **kwargs)

    def forward(self, input, hx=None, *, lengths=None, resets=None, return_cell_states=False):
        out = self._forward(input, hx, lengths, resets, return_cell_states)
        return out if return_cell_states else out[:2]

    def _run(self, input, hx, extent):
        return ops.lstm(input, hx, self.all_weights, **self._options(extent), return_cell_states=extent.cells)


class GRU(_Recurrent):
    """torch.nn.GRU: same constructor, parameters, call and outputs. forward(input, h0) -> (output, h_n). Beyond it:
    zoneout, variational_dropout, weight_drop, heads, recompute; lengths= and resets= as in LSTM."""

    def __init__(self, *args, **kwargs):
        super().__init__("GRU", 3, *args, **kwargs)

    def _run(self, input, hx, extent):
        return ops.gru(input, hx, self.all_weights, **self._options(extent))


class RNN(_Recurrent):
    """torch.nn.RNN: same constructor, parameters, call and outputs. forward(input, h0) -> (output, h_n). Beyond it:
    zoneout, variational_dropout, weight_drop, heads, recompute; lengths= and resets= as in LSTM."""

    def __init__(self, input_size, hidden_size, num_layers=1, nonlinearity="tanh", *args, **kwargs):
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{nonlinearity.upper()}", 1, input_size, hidden_size, num_layers, *args, **kwargs)
        self.nonlinearity = nonlinearity

    def _run(self, input, hx, extent):
        return ops.rnn(input, hx, self.all_weights, nonlinearity=self.nonlinearity, **self._options(extent))
