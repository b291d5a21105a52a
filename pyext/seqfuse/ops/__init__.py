"""The functional API: one file per op, each with its checks, its autograd and its table of backends."""

from seqfuse.ops.attention import attention, scaled_dot_product_attention, varlen_attention
from seqfuse.ops.attention_cache import attention_with_kv_cache
from seqfuse.ops.beam import beam_step
from seqfuse.ops.cross_entropy import cross_entropy, linear_cross_entropy
from seqfuse.ops.distillation import kl_loss
from seqfuse.ops.gated import geglu, swiglu
from seqfuse.ops.layer_norm import layer_norm, rms_norm
from seqfuse.ops.linear import linear
from seqfuse.ops.luong import luong_readout
from seqfuse.ops.preference import dpo_loss, linear_log_probs, orpo_loss
from seqfuse.ops.recurrent import gru, lstm, rnn
from seqfuse.ops.rnn_cell import gru_cell, lstm_cell, rnn_cell
from seqfuse.ops.rnn_extras import RecurrentOptions
from seqfuse.ops.rope import rope

__all__ = [
    "RecurrentOptions",
    "attention",
    "attention_with_kv_cache",
    "beam_step",
    "cross_entropy",
    "dpo_loss",
    "geglu",
    "gru",
    "gru_cell",
    "kl_loss",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_log_probs",
    "lstm",
    "lstm_cell",
    "luong_readout",
    "orpo_loss",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "rope",
    "scaled_dot_product_attention",
    "swiglu",
    "varlen_attention",
]
