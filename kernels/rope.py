"""Rotary position embedding, and its gradient, which is the rotation back.

Interpreted and compiled for sm_80 ... sm_120; never yet run on a GPU.

    (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, R / 2 + i), or (2 i, 2 i + 1) if interleaved

Memory traffic allowed, for n elements of e bytes: 2 n e (x, y), and the tables, which the heads of a batch share. In
place the elements beyond R are not touched. All arithmetic is fp32.
One program takes a few time steps of one head. The two elements of a pair are loaded apart: interleaved pairs are read
with a stride of two, twice from the same cache lines.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import common

_TILE = 1024  # pairs a program takes


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, positions_ptr, y_ptr, H, T, S, offset, HALF, REST,
    x_b, x_h, x_t, y_b, y_h, y_t, positions_b,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, COPY_REST: tl.constexpr,
    STEPS: tl.constexpr, PAIRS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(T, STEPS)
    head = tl.program_id(0) // parts
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    t = (tl.program_id(0) % parts) * STEPS + tl.arange(0, STEPS)
    steps = t < T
    if positions_ptr is None:
        position = (offset + t).to(tl.int64)
    else:
        position = tl.load(positions_ptr + b * positions_b + t, steps, other=0)
    i = tl.arange(0, PAIRS)
    mask = steps[:, None] & (i < HALF)[None, :]
    angle = position[:, None] * HALF + i[None, :]
    known = mask & ((position >= 0) & (position < S))[:, None]
    cos = tl.load(cos_ptr + angle, known, other=float("nan"))
    sin = tl.load(sin_ptr + angle, known, other=float("nan"))
    if INVERSE:
        sin = -sin
    if INTERLEAVED:
        first = 2 * i
        second = 2 * i + 1
    else:
        first = i
        second = HALF + i
    x = x_ptr + b * x_b + h * x_h + (t.to(tl.int64) * x_t)[:, None]
    y = y_ptr + b * y_b + h * y_h + (t.to(tl.int64) * y_t)[:, None]
    a = tl.load(x + first[None, :], mask, other=0.0).to(tl.float32)
    c = tl.load(x + second[None, :], mask, other=0.0).to(tl.float32)
    tl.store(y + first[None, :], (a * cos - c * sin).to(y_ptr.dtype.element_ty), mask)
    tl.store(y + second[None, :], (c * cos + a * sin).to(y_ptr.dtype.element_ty), mask)
    if COPY_REST:
        j = tl.arange(0, OTHERS)
        mask = steps[:, None] & (j < REST)[None, :]
        j = (2 * HALF + j)[None, :]
        tl.store(y + j, tl.load(x + j, mask, other=0.0), mask)


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [B, H, T, D] fp32 / bf16 / fp16; cos, sin [S, R / 2] fp32 contiguous; positions int64 [T] or [B, T], or None.

    y: where the result goes, x itself for a rotation in place (its last dimension dense); None: a new tensor, returned.
    A position outside of the tables gives NaN: to raise would mean to wait for the device.
    """
    x = x if x.stride(3) == 1 else x.contiguous()
    y = torch.empty_like(x) if y is None else y
    (B, H, T, D), half = x.shape, cos.shape[1]
    if not x.numel():
        return y
    rest = D - 2 * half
    pairs, others = common.next_power_of_2(half), common.next_power_of_2(rest)
    steps = min(max(1, _TILE // max(pairs, others // 2)), common.next_power_of_2(T))
    of_batch = 0 if positions is None or positions.dim() == 1 else positions.stride(0)
    with common.on_device(x):
        common.launch(
            rope_kernel, (B * H * common.cdiv(T, steps),), x, cos, sin, positions, y, H, T, cos.shape[0], offset,
            half, rest, *x.stride()[:3], *y.stride()[:3], of_batch, INTERLEAVED=interleaved, INVERSE=inverse,
            COPY_REST=rest > 0 and y is not x, STEPS=steps, PAIRS=pairs, OTHERS=others,
        )  # fmt: skip
    return y
