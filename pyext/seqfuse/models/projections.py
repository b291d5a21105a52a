"""How models multiply by their weights. Parameters stay nn.Linear's."""

import torch
import torch.nn.functional as F
from torch import nn

from seqfuse import ops
from seqfuse.ops.products import MOST_ROWS


def multiply(x, weight, bias=None):
    """x @ weight^T + bias; the few rows of a step of decoding by the op that has a kernel for them."""
    few = not torch.is_grad_enabled() and x.numel() <= MOST_ROWS * x.shape[-1]
    return ops.linear(x, weight, bias) if few else F.linear(x, weight, bias)


def project(linear: nn.Module, x):
    """A linear layer, or what has taken its place (LoRA)."""
    return multiply(x, linear.weight, linear.bias) if type(linear) is nn.Linear else linear(x)
