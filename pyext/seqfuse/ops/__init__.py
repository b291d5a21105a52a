"""The functional API: one file per op, each with its checks, its autograd and its table of backends."""

from seqfuse.ops.layer_norm import layer_norm
from seqfuse.ops.recurrent import gru, lstm, rnn

__all__ = ["gru", "layer_norm", "lstm", "rnn"]
