"""Gated activations (Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202)."""

import torch
import torch.nn.functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated(gate, up, activation):
    """act(gate) * up, in at least float32; activation: an index into ACTIVATIONS."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    if activation == 0:
        a = F.silu(wide)
    else:
        a = F.gelu(wide, approximate="none" if activation == 1 else "tanh")
    return (a * up).to(gate.dtype)
