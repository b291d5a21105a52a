"""The functional API: one file per op, each with its checks, its autograd and its table of backends."""

from seqfuse.ops.layer_norm import layer_norm
from seqfuse.ops.recurrent import gru, lstm, rnn
from seqfuse.ops.rnn_cell import gru_cell, lstm_cell, rnn_cell
from seqfuse.ops.rnn_extras import RecurrentOptions

__all__ = ["RecurrentOptions", "gru", "gru_cell", "layer_norm", "lstm", "lstm_cell", "rnn", "rnn_cell"]
