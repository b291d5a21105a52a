"""The functional API: one file per op, each with its checks, its autograd and its table of backends."""

from seqfuse.ops.layer_norm import layer_norm
from seqfuse.ops.recurrent import gru, lstm, rnn
from seqfuse.ops.rnn_cell import gru_cell, lstm_cell, rnn_cell

__all__ = ["gru", "gru_cell", "layer_norm", "lstm", "lstm_cell", "rnn", "rnn_cell"]
