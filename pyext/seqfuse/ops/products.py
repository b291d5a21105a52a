"""Matrix products over whole sequences: ATen's, in float32 where it has nothing better for bfloat16 than a plain loop.

oneDNN multiplies bfloat16 on processors with AVX-512 and later. On others ATen runs a loop at about 1 GFLOP/s where
float32 runs at 50 to 150; there both operands are widened (exactly), multiplied in float32 and rounded once.
"""

import torch
import torch.nn.functional as F


def _slow_bf16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False  # another architecture, another library: not measured
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


SLOW_BF16 = _slow_bf16()  # on this machine's CPU


def widened(t: torch.Tensor) -> bool:
    """Whether products of this tensor are taken in float32."""
    return SLOW_BF16 and t.dtype == torch.bfloat16 and t.device.type == "cpu"


def linear(x, w, b=None):
    """x @ w^T + b: x [..., K], w [N, K], b [N] or None."""
    if not widened(x):
        return F.linear(x, w, b)
    return F.linear(x.float(), w.float(), None if b is None else b.float()).to(x.dtype)


def matmul(a, b):
    """a [M, K] @ b [K, N]."""
    return (a.float() @ b.float()).to(a.dtype) if widened(a) else a @ b


def addmm(c, a, b):
    """c [M, N] + a [M, K] @ b [K, N]."""
    return torch.addmm(c.float(), a.float(), b.float()).to(c.dtype) if widened(c) else torch.addmm(c, a, b)
