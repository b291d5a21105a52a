"""Layer normalisation (Ba, Kiros, Hinton 2016, arXiv:1607.06450), with an optional residual addition."""

import torch


def layer_norm(x, residual, weight, bias, eps):
    """x, residual: [M, N]; weight, bias: [N] or None. Returns (y [M, N], x + residual or None).

    Statistics are taken in at least float32 whatever the dtype of x.
    """
    s = x if residual is None else x + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), None if residual is None else s
