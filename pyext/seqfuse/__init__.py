"""seqfuse: fused kernels for sequence models in PyTorch."""

from seqfuse import ops
from seqfuse.dispatch import backend

__version__ = "0.1.0"
__all__ = ["backend", "ops"]
