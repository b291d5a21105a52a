"""Plain PyTorch, one small file per op: the numerical truth (in float64), differentiable twice."""

from seqfuse.reference.attention import AttentionOptions, attention, attention_decode, dropout_keep, kv_cache_append
from seqfuse.reference.layer_norm import layer_norm
from seqfuse.reference.rnn import GATES, PLAIN, ScanOptions, recurrent_product, rnn_cell, rnn_scan

__all__ = [
    "GATES",
    "PLAIN",
    "AttentionOptions",
    "ScanOptions",
    "attention",
    "attention_decode",
    "dropout_keep",
    "kv_cache_append",
    "layer_norm",
    "recurrent_product",
    "rnn_cell",
    "rnn_scan",
]
