"""How models multiply by their weights. Parameters stay nn.Linear's."""

import torch
import torch.nn.functional as F
from torch import nn

from seqfuse import dispatch, ops


def multiply(x, weight, bias=None):
    """x @ weight^T + bias; without a gradient by the op that has a kernel for the few rows of a step of decoding.

    A product runs everywhere: a backend that was asked for by name means the ops that are its own.
    """
    if torch.is_grad_enabled() or dispatch.forced_backend() != "auto":
        return F.linear(x, weight, bias)
    return ops.linear(x, weight, bias)


def project(linear: nn.Module, x):
    """A linear layer, or what has taken its place (LoRA)."""
    return multiply(x, linear.weight, linear.bias) if type(linear) is nn.Linear else linear(x)
