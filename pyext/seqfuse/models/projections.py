"""How models multiply by their weights. Parameters stay nn.Linear's."""

import torch
import torch.nn.functional as F
from torch import nn

from seqfuse import ops
from seqfuse.ops.linear import compiled_pays
from seqfuse.ops.products import MOST_ROWS, atens_is_slow


def multiply(x, weight, bias=None):
    """x @ weight^T + bias, by the op that has kernels for it: for the few rows of a step of decoding, and for products
    that PyTorch's library is slow at."""
    few = not torch.is_grad_enabled() and x.numel() <= MOST_ROWS * x.shape[-1]
    if few or (x.is_cpu and _ours(x.dtype, weight)):
        return ops.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _ours(dtype, weight):
    if torch.compiler.is_compiling():
        return compiled_pays(dtype, *weight.shape)
    return atens_is_slow(dtype)


def project(linear: nn.Module, x):
    """A linear layer, or what has taken its place (LoRA)."""
    return multiply(x, linear.weight, linear.bias) if type(linear) is nn.Linear else linear(x)
