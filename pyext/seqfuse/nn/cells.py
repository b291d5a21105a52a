"""torch.nn.LSTMCell, GRUCell and RNNCell on seqfuse.ops."""

from typing import NamedTuple

import torch

from seqfuse import dispatch, explanation, ops
from seqfuse.ops.autograd import traced, wants_gradient
from seqfuse.ops.rnn_cell import CellCase, run


class _Route(NamedTuple):
    """What the last call was like, and the backend that the dispatcher chose for it."""

    shapes: tuple[torch.Size, torch.Size]
    dtype: torch.dtype
    grad: bool
    epoch: int
    threads: int
    backend: str


class _Cell:
    """What the three share. Mixed in before torch's class, whose constructor, parameters and messages stay."""

    _route: _Route | None = None

    def _again(self, x, h, c=None):
        """(h, c or None) of a batched call like the last one, by the way that took, without another look; else None."""
        route = self._route
        if route is None or traced() or type(h) is not torch.Tensor:
            return None
        weights = self._own_weights()
        if (
            any(w is None for w in weights)
            or route.shapes != (x.shape, h.shape)
            or not (x.dtype is h.dtype is route.dtype is weights[1].dtype)
            or (c is not None and (c.shape != h.shape or c.dtype is not route.dtype or c is h or not c.is_cpu))
            or not (x.is_cpu and h.is_cpu and all([w.is_cpu for w in weights]))
            or route.epoch != dispatch.epoch()
            or route.threads != torch.get_num_threads()
            or route.grad != wants_gradient(x, h, c, *weights)
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        return run(route.backend, self._cell, x, h, c, weights, route.grad)

    def _remember(self, x, h, c=None):
        choice = None if traced() else explanation.last_choice(self)
        if choice is None or not x.is_cpu or type(x) is not torch.Tensor or not dispatch.nobody_else_listens():
            return
        weights = self._own_weights()
        if any(w is None for w in weights):  # parametrized: to look at one would evaluate it once more
            return
        grad = wants_gradient(x, h, c, *weights)
        self._route = _Route((x.shape, h.shape), x.dtype, grad, dispatch.epoch(), torch.get_num_threads(),
                             choice.backend)  # fmt: skip

    def __getstate__(self):  # a copy, or a pickle, starts afresh
        return {k: v for k, v in self.__dict__.items() if k != "_route"}

    called_op = "rnn_cell"  # what explain() may hear of it

    def typical_case(self):
        """(op, case) of a call of usual size, for explain() of a module that has not been called."""
        w = self.weight_hh
        return self.called_op, CellCase(self._cell, w.device.type, w.dtype, 32, self.hidden_size, self.training)

    def _batched(self, input, states):
        """(input 2-D, states 2-D or None, whether the input had a batch dimension)."""
        name = type(self).__name__
        for i, s in enumerate(states or ()):
            if not isinstance(s, torch.Tensor):
                raise TypeError(f"{name}: hx[{i}] must be a tensor, got {type(s).__name__}")
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[-1]} expected {self.input_size}")
        for i, s in enumerate(states or ()):
            if s.dim() not in (1, 2):
                raise ValueError(f"{name}: Expected hx[{i}] to be 1D or 2D, got {s.dim()}D instead")
        if input.dim() == 2:
            return input, states, True
        return input.unsqueeze(0), states and tuple(s.unsqueeze(0) if s.dim() == 1 else s for s in states), False

    def _own_weights(self):
        """The weights that are plain Parameters, None in the place of others."""
        return tuple(map(self._parameters.get, ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))

    def _weights(self):
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """torch.nn.LSTMCell: forward(input [B, I] or [I], (h, c) or None) -> (h, c)."""

    _cell = "lstm"

    def forward(self, input, hx=None):
        if hx is not None:
            if not isinstance(hx, (tuple, list)) or len(hx) != 2:
                given = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
                raise TypeError(f"LSTMCell: hx must be a pair of tensors (h, c), got {given}")
            if (out := self._again(input, *hx)) is not None:
                return out
        x, states, batched = self._batched(input, None if hx is None else tuple(hx))
        explanation.entering(self)
        h, c = ops.lstm_cell(x, states, *self._weights())
        if batched and states:
            self._remember(x, *states)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


class GRUCell(_Cell, torch.nn.GRUCell):
    """torch.nn.GRUCell: forward(input [B, I] or [I], h or None) -> h."""

    _cell = "gru"

    def forward(self, input, hx=None):
        if hx is not None and (out := self._again(input, hx)) is not None:
            return out[0]
        x, states, batched = self._batched(input, None if hx is None else (hx,))
        explanation.entering(self)
        h = ops.gru_cell(x, states and states[0], *self._weights())
        if batched and states:
            self._remember(x, states[0])
        return h if batched else h.squeeze(0)


class RNNCell(_Cell, torch.nn.RNNCell):
    """torch.nn.RNNCell: forward(input [B, I] or [I], h or None) -> h."""

    @property
    def _cell(self):
        return f"rnn_{self.nonlinearity}"

    def forward(self, input, hx=None):
        if hx is not None and (out := self._again(input, hx)) is not None:
            return out[0]
        x, states, batched = self._batched(input, None if hx is None else (hx,))
        explanation.entering(self)
        h = ops.rnn_cell(x, states and states[0], *self._weights(), nonlinearity=self.nonlinearity)
        if batched and states:
            self._remember(x, states[0])
        return h if batched else h.squeeze(0)
