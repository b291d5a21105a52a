"""torch.nn.LSTMCell, GRUCell and RNNCell on seqfuse.ops."""

import torch

from seqfuse import explanation, ops
from seqfuse.ops.rnn_cell import CellCase


class _Cell:
    """What the three share. Mixed in before torch's class, whose constructor, parameters and messages stay."""

    def typical_case(self):
        """(op, case) of a call of usual size, for explain() of a module that has not been called."""
        w = self.weight_hh
        return "rnn_cell", CellCase(self._cell, w.device.type, w.dtype, 32, self.hidden_size, self.training)

    def _batched(self, input, states):
        """(input 2-D, states 2-D or None, whether the input had a batch dimension)."""
        name = type(self).__name__
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

    def _weights(self):
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """torch.nn.LSTMCell: forward(input [B, I] or [I], (h, c) or None) -> (h, c)."""

    _cell = "lstm"

    def forward(self, input, hx=None):
        x, states, batched = self._batched(input, hx and tuple(hx))
        explanation.entering(self)
        h, c = ops.lstm_cell(x, states, *self._weights())
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


class GRUCell(_Cell, torch.nn.GRUCell):
    """torch.nn.GRUCell: forward(input [B, I] or [I], h or None) -> h."""

    _cell = "gru"

    def forward(self, input, hx=None):
        x, states, batched = self._batched(input, None if hx is None else (hx,))
        explanation.entering(self)
        h = ops.gru_cell(x, states and states[0], *self._weights())
        return h if batched else h.squeeze(0)


class RNNCell(_Cell, torch.nn.RNNCell):
    """torch.nn.RNNCell: forward(input [B, I] or [I], h or None) -> h."""

    @property
    def _cell(self):
        return f"rnn_{self.nonlinearity}"

    def forward(self, input, hx=None):
        x, states, batched = self._batched(input, None if hx is None else (hx,))
        explanation.entering(self)
        h = ops.rnn_cell(x, states and states[0], *self._weights(), nonlinearity=self.nonlinearity)
        return h if batched else h.squeeze(0)
