"""seqfuse: fused kernels for sequence models in PyTorch.

model = seqfuse.fuse(model)      # torch.nn.LSTM, GRU, RNN and LayerNorm run on our kernels, in place
print(seqfuse.explain(model, x)) # which backend each of them took, and why
"""

from seqfuse import interop, models, nn, ops
from seqfuse.dispatch import backend
from seqfuse.explanation import explain
from seqfuse.fuse import fuse, unfuse
from seqfuse.generate import generate
from seqfuse.info import build_info

__version__ = "0.1.0"
__all__ = ["backend", "build_info", "explain", "fuse", "generate", "interop", "models", "nn", "ops", "unfuse"]
