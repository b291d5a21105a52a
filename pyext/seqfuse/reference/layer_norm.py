"""Layer normalisation (Ba, Kiros, Hinton 2016, arXiv:1607.06450) and RMS normalisation (Zhang, Sennrich 2019,
arXiv:1910.07467), with dropout and a residual addition before them."""

import torch

from seqfuse.reference.attention import dropout_keep


def layer_norm(x, residual, weight, bias, eps, seed=None, dropout_p=0.0, rms=False, zero_centered=False):
    """y = norm(s) * weight + bias with s = dropout(x) + residual.

    x, residual: [M, N]; weight, bias: [N] or None. seed: int64 [1], of dropout; see norm_dropout.
    rms: the mean counts as zero. zero_centered: the weight is stored around zero, 1 + weight is what multiplies.
    Returns (y [M, N], s or None where s is x itself). Statistics are taken in at least float32 whatever the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    s = None
    if dropout_p:
        s = x.to(wide) * norm_dropout(x, seed, dropout_p)
        s = (s if residual is None else s + residual).to(x.dtype)  # rounded once
    elif residual is not None:
        s = x + residual
    deviation = (x if s is None else s).to(wide)
    if not rms:
        deviation = deviation - deviation.mean(-1, keepdim=True)
    y = deviation * (deviation.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * (1.0 + weight.to(wide) if zero_centered else weight)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), s


def norm_dropout(x, seed, p):
    """What dropout multiplies x [..., N] by: 0 with probability p, else 1 / (1 - p), in at least float32.

    Element (m, n) of the M x N matrix of rows is decided by Philox with the counter (n // 4, low, high half of m, 0),
    word n % 4: the same on every backend, and again in the backward pass.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.numel() // max(x.shape[-1], 1)
    m = torch.arange(rows, device=x.device)[:, None]
    n = torch.arange(x.shape[-1], device=x.device)
    kept = dropout_keep(seed, torch.zeros_like(n), m >> 32, m & 0xFFFFFFFF, n, p)
    return (kept.to(wide) / (1.0 - p) if p < 1.0 else kept.to(wide) * 0.0).view(x.shape)
