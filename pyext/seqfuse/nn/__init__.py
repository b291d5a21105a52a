"""Drop-in modules: torch.nn's constructors, parameter names, call signatures and outputs."""

from seqfuse.nn.attention import MultiheadAttention
from seqfuse.nn.cells import GRUCell, LSTMCell, RNNCell
from seqfuse.nn.layer_norm import LayerNorm
from seqfuse.nn.linear import Linear
from seqfuse.nn.recurrent import GRU, LSTM, RNN
from seqfuse.nn.rms_norm import RMSNorm
from seqfuse.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "RNNCell",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
