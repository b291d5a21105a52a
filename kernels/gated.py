"""Gated activations: swiglu and geglu, forward and backward.

Interpreted and compiled for sm_80 ... sm_120; never yet run on a GPU.

    y = act(gate) up,    dgate = dy up act'(gate),    dup = dy act(gate)
    silu(g) = g s(g), s the logistic function;  gelu(g) = g Phi(g);  gelu_tanh(g) = g s(2 k (g + 0.044715 g^3))

Memory traffic allowed, for n elements of e bytes: 3 n e forward (gate, up, y), 5 n e backward (dy, gate, up, dgate,
dup): the activation is computed again from gate, nothing else is kept. All arithmetic is fp32.
One program takes a part of a row; tensors whose rows follow each other are one long row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import common

_BLOCK = 2048  # elements a program takes


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)). ACTIVATION: 0 silu, 1 gelu, 2 gelu by tanh."""
    if ACTIVATION == 0:
        s = tl.sigmoid(g)
        return g * s, s * (1.0 + g * (1.0 - s))
    elif ACTIVATION == 1:
        phi = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * phi, phi + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        return g * s, s + g * slope * s * (1.0 - s)


@triton.jit
def gated_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, N, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    cols = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    g = tl.load(gate_ptr + row * gate_stride + cols, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask, other=0.0).to(tl.float32)
    act, _ = activate(g, ACTIVATION)
    tl.store(y_ptr + row * N + cols, (act * up).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def gated_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, N, dy_stride, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(N, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    cols = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + row * gate_stride + cols, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask, other=0.0).to(tl.float32)
    act, slope = activate(g, ACTIVATION)
    tl.store(dgate_ptr + row * N + cols, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask)
    tl.store(dup_ptr + row * N + cols, (dy * act).to(dup_ptr.dtype.element_ty), mask)


def _rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[M, N] with dense rows; as one row where all of them are dense altogether."""
    tensors = [t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in tensors]
    dense = all(t.is_contiguous() for t in tensors)
    return [t.reshape(1, -1) if dense else t for t in tensors]


def _launch(kernel, tensors, strided, activation):
    """tensors: all arguments; strided: those that have a row stride of their own."""
    M, N = strided[0].shape
    if not M * N:
        return
    block = min(_BLOCK, common.next_power_of_2(N))
    with common.on_device(strided[0]):
        common.launch(kernel, (M * common.cdiv(N, block),), *tensors, N, *(t.stride(0) for t in strided),
                      ACTIVATION=activation, BLOCK=block)  # fmt: skip


def gated_fwd(gate: torch.Tensor, up: torch.Tensor, activation: int) -> torch.Tensor:
    """gate, up: [M, N] fp32 / bf16 / fp16, any strides. Returns y [M, N], contiguous."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows = _rows(gate, up)
    _launch(gated_fwd_kernel, (*rows, y), rows, activation)
    return y


def gated_bwd(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy, gate, up: [M, N]. Returns (dgate, dup), contiguous."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    rows = _rows(dy, gate, up)
    _launch(gated_bwd_kernel, (*rows, dgate, dup), rows, activation)
    return dgate, dup
