"""Rotary position embedding (Su et al. 2021, RoFormer, arXiv:2104.09864)."""

import torch


def rope(x, cos, sin, positions, offset, interleaved, inverse):
    """x [B, H, T, D]; cos, sin [S, R / 2]; positions [T] or [B, T] int64, or None: offset + t. Turns the first R of D
    elements: pairs (i, R / 2 + i), or (2i, 2i + 1) if interleaved."""
    if positions is None:
        positions = torch.arange(offset, offset + x.shape[2], device=x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    c, s = (t.to(dtype)[positions].unsqueeze(-3) for t in (cos, sin))  # [1, T, R / 2] or [B, 1, T, R / 2]
    if inverse:
        s = -s
    turned, rest = x[..., : 2 * cos.shape[1]].to(dtype), x[..., 2 * cos.shape[1] :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        out = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat([a * c - b * s, b * c + a * s], -1)
    return torch.cat([out.to(x.dtype), rest], -1)
