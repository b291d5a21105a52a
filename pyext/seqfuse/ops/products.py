"""Matrix products over whole sequences: ATen's, or our kernels' where its library leaves much of the processor unused.

Where ATen has nothing good for bfloat16, both operands are widened (exactly), multiplied in float32 and rounded once.
Without AVX-512 it multiplies bfloat16 in a plain loop, at about 1 GFLOP/s where float32 runs at 50 to 150. With AVX-512
but no bfloat16 instructions (Skylake to Ice Lake) oneDNN does their work in software, at 55 GFLOP/s where float32 runs
at 210. Intel's instructions are slow unless its tile unit may be used: 170 GFLOP/s where float32 runs at 330. And on
Zen 5 MKL multiplies float32 at half of what the processor can (docs/linear.md).
"""

import math
import platform
import sys

import torch
import torch.nn.functional as F

from seqfuse import native
from seqfuse.ops import library
from seqfuse.ops.autograd import may_write


def _widen_from() -> int:
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return sys.maxsize  # another library: not measured
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    return sys.maxsize if torch.cpu._is_avx512_bf16_supported() and not native.bf16_dots_are_slow() else 48


# Products of bfloat16 whose three sizes are all at least this are taken in float32 on this machine's CPU: 0 for all.
WIDEN_FROM = _widen_from()
SLOW_BF16 = WIDEN_FROM == 0
NATIVE_BF16 = WIDEN_FROM == sys.maxsize


def widened(t: torch.Tensor, *sizes: int) -> bool:
    """Whether products of this tensor are taken in float32: those of these sizes, or without sizes all of them."""
    if t.dtype != torch.bfloat16 or t.device.type != "cpu":
        return False
    return min(sizes, default=0) >= WIDEN_FROM


def widened_in_memory(t: torch.Tensor, *sizes: int) -> bool:
    """The same, where no kernel of ours widens operands in the caches: better once for several products."""
    return widened(t, *sizes) and not native.isa_has("avx2")


# Products of float32 are our kernel's where MKL leaves half of the processor unused (docs/linear.md).
OWN_FLOATS = native.mkl_is_narrow()
_LEAST, _LEAST_WORK = 32, 1 << 19  # of each size, of the three multiplied: smaller ones it takes longer for


def own_floats(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether a product of these three sizes on the CPU is one of float32 that our kernel is faster at."""
    if not OWN_FLOATS or dtype != torch.float32:
        return False
    return native.isa_has("avx512") and min(sizes) >= _LEAST and math.prod(sizes) >= _LEAST_WORK


def atens_is_slow(dtype: torch.dtype) -> bool:
    """Whether ours is faster on this machine's CPU than ATen's product of many rows, if large enough."""
    return OWN_FLOATS if dtype == torch.float32 else dtype == torch.bfloat16 and not NATIVE_BF16


# Rows from which our kernel for few rows was measured faster than ATen in float32, up to how many on one thread, on
# more than one: it splits the outputs, ATen the rows (docs/linear.md).
ROWS = (12, 128, 128) if OWN_FLOATS else (12, 32, 64)
FEW_ROWS, MOST_ROWS = 8, 128  # csrc/include/seqfuse/linear.h: linear_few_rows, linear_block_rows


def many_rows_pay(rows: int) -> bool:
    return native.isa_has("avx2") and ROWS[0] <= rows <= ROWS[min(torch.get_num_threads(), 2)]


def _alone(*operands) -> bool:
    """Whether our kernels may take a product of these: they make no gradient, and a compiler has better."""
    return operands[0].is_cpu and not torch.is_grad_enabled() and may_write(*operands)


def _compiled(*operands) -> bool:
    """Whether torch.compile is to see one opaque call, which chooses by its sizes when it runs. Not asked elsewhere:
    sizes may be symbolic here."""
    if not torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return operands[0].is_cpu and atens_is_slow(operands[0].dtype)


def linear(x, w, b=None):
    """x @ w^T + b: x [..., K], w [N, K], b [N] or None."""
    if _compiled(x):
        return torch.ops.seqfuse_composed.linear(x, w, b)
    rows = x.numel() // max(x.shape[-1], 1)
    if widened(x, *w.shape) and rows >= min(WIDEN_FROM, ROWS[0]):
        if _alone(x) and native.isa_has("avx2"):
            return own_linear(x, w, b)  # which widens no weight in memory
        if rows >= WIDEN_FROM:
            return F.linear(x.float(), w.float(), None if b is None else b.float()).to(x.dtype)
    if x.dtype == torch.float32 and _alone(x):
        if min(w.shape) >= 128 and many_rows_pay(rows):
            return torch.ops.seqfuse.linear_fwd(x, w, b)
        if own_floats(x.dtype, rows, *w.shape):
            return own_linear(x, w, b)
    return F.linear(x, w, b)


def own_linear(x, w, b=None):
    """x @ w^T + b by the faster of our kernels: one packs no weight, the other is for more rows and any strides."""
    if torch.compiler.is_compiling():
        return torch.ops.seqfuse_composed.linear(x, w, b)
    rows = x.numel() // max(x.shape[-1], 1)
    if rows <= MOST_ROWS and w.stride(1) == 1:
        return torch.ops.seqfuse.linear_fwd(x, w, b)
    return _own(b, x.reshape(rows, x.shape[-1]), w.t()).view(*x.shape[:-1], w.shape[0])


def matmul(a, b, out=None):
    """a [M, K] @ b [K, N]; out: where the result is to lie."""
    if _compiled(a):
        return torch.ops.seqfuse_composed.product(a, b, None)
    sizes = *a.shape, b.shape[-1]
    if widened(a, *sizes):
        return _widened(None, a, b, out)
    if _alone(a, b) and own_floats(a.dtype, *sizes):
        return _own(None, a, b, out)
    return a @ b if out is None else torch.mm(a, b, out=out)


def addmm(c, a, b, out=None):
    """c [M, N] or [N] + a [M, K] @ b [K, N]; out: where the result is to lie, which may be c."""
    if _compiled(a):
        return torch.ops.seqfuse_composed.product(a, b, c)
    sizes = *a.shape, b.shape[-1]
    if widened(a, *sizes):
        return _widened(c, a, b, out)
    if _alone(a, b, c) and own_floats(a.dtype, *sizes):
        return _own(c, a, b, out)
    return torch.addmm(c, a, b) if out is None else torch.addmm(c, a, b, out=out)


def product(a, b, c=None, out=None):
    """a @ b, or c + a @ b: matmul or addmm."""
    return matmul(a, b, out) if c is None else addmm(c, a, b, out)


def _widened(c, a, b, out):
    if _alone(a, b, c) and native.isa_has("avx2"):  # our kernel widens no operand in memory
        return _own(c, a, b, out)
    product = a.float() @ b.float() if c is None else torch.addmm(c.float(), a.float(), b.float())
    return product.to(a.dtype) if out is None else out.copy_(product)


def _own(c, a, b, out=None):
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    torch.ops.seqfuse.matrix_product(a, b, c, out)
    return out


def _fake_linear(x, w, b):
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _fake_product(a, b, c):
    return a.new_empty(a.shape[0], b.shape[1])


library.register_composed("linear", "(Tensor x, Tensor w, Tensor? b) -> Tensor", _fake_linear, linear)
library.register_composed("product", "(Tensor a, Tensor b, Tensor? c) -> Tensor", _fake_product, product)
