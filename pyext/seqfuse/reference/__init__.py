"""Plain PyTorch, one small file per op: the numerical truth (in float64), differentiable twice."""

from seqfuse.reference.attention import AttentionOptions, attention, attention_decode, dropout_keep, kv_cache_append
from seqfuse.reference.beam import beam_step
from seqfuse.reference.cross_entropy import LossOptions, cross_entropy, linear_cross_entropy, loss_scale
from seqfuse.reference.distillation import kl
from seqfuse.reference.gated import gated
from seqfuse.reference.layer_norm import layer_norm, norm_dropout
from seqfuse.reference.linear import linear
from seqfuse.reference.luong import luong_readout
from seqfuse.reference.rnn import GATES, PLAIN, ScanOptions, recurrent_product, rnn_cell, rnn_scan
from seqfuse.reference.rope import rope

__all__ = [
    "GATES",
    "PLAIN",
    "AttentionOptions",
    "LossOptions",
    "ScanOptions",
    "attention",
    "attention_decode",
    "beam_step",
    "cross_entropy",
    "dropout_keep",
    "gated",
    "kl",
    "kv_cache_append",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "loss_scale",
    "luong_readout",
    "norm_dropout",
    "recurrent_product",
    "rnn_cell",
    "rnn_scan",
    "rope",
]
