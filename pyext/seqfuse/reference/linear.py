"""A linear layer, as torch.nn.functional.linear has it."""

import torch
import torch.nn.functional as F


def linear(x, weight, bias):
    """x weight^T + bias, summed in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)
