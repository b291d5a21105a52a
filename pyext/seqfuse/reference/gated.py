"""Gated activations (Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202)."""

import math

import torch
import torch.nn.functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated(gate, up, activation):
    """act(gate) * up, in at least float32; activation: an index into ACTIVATIONS."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    if activation == 0:
        a = F.silu(wide)
    elif activation == 1:  # F.gelu's 1 + erf(x) and 1 + tanh(x) cancel below -8, in float64 too
        a = wide * 0.5 * torch.erfc(wide * -(0.5**0.5))
    else:
        a = wide * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    return (a * up).to(gate.dtype)
