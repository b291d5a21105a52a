"""The functional API: one file per op, each with its checks, its autograd and its table of backends."""

from seqfuse.ops.attention import attention, scaled_dot_product_attention, varlen_attention
from seqfuse.ops.attention_cache import attention_with_kv_cache
from seqfuse.ops.layer_norm import layer_norm
from seqfuse.ops.recurrent import gru, lstm, rnn
from seqfuse.ops.rnn_cell import gru_cell, lstm_cell, rnn_cell
from seqfuse.ops.rnn_extras import RecurrentOptions

__all__ = [
    "RecurrentOptions",
    "attention",
    "attention_with_kv_cache",
    "gru",
    "gru_cell",
    "layer_norm",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
    "varlen_attention",
]
