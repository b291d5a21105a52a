"""Launchers of attention, forward and backward.

What the kernels compute, and the memory traffic they are allowed, is at the heads of attention_forward.py and
attention_backward.py; what the options mean in attention_options.py; block shapes are chosen in attention_plan.py.
Interpreted and compiled; never yet run on a GPU.

The arguments are those of the torch ops attention_fwd and attention_bwd (pyext/seqfuse/ops/attention_op.py). Nothing
here waits for the GPU: packed sequences are found on the device, in a grid that is large enough for any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import attention_plan, common
from .attention_backward import bias_kernel, key_kernel, query_kernel, row_kernel
from .attention_forward import forward_kernel
from .attention_options import Options, Plane, Rows
from .dropout import drop_below

__all__ = ["attention_bwd", "attention_fwd"]

_FAR = 2**30  # a window this wide is none; positions then stay within 32 bits


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, D] as the kernels take it: elements of a row side by side, 32-bit offsets inside a tile."""
    return x if x.stride(3) == 1 and x.stride(2) < 2**23 else x.contiguous()


def strided(x: torch.Tensor) -> Rows:
    return Rows(x, x.stride(0), x.stride(1), x.stride(2))


def output_like(x: torch.Tensor, width: int) -> torch.Tensor:
    """[B, H, T, width], uninitialised, in x's order of dimensions (ops/attention_op.py: empty_like)."""
    B, H, T, _ = x.shape
    if T > 1 and x.stride(1) < x.stride(2):
        return x.new_empty(B, T, H, width).transpose(1, 2)
    return x.new_empty(B, H, T, width)


def _plane(x: torch.Tensor | None, width: int) -> Plane | None:
    """Broadcast dimensions get the stride 0."""
    if x is None:
        return None
    if x.stride(3) * x.shape[3] >= 2**31:  # kernels count the columns of a tile in 32 bits
        x = x.contiguous()
    strides = (0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
    return Plane(x.view(torch.uint8) if x.dtype == torch.bool else x, *strides, width)


def window(width: int) -> int | None:
    return None if width < 0 or width >= _FAR else width


def slopes_of(alibi_slopes: torch.Tensor | None) -> tuple[torch.Tensor | None, int | None]:
    if alibi_slopes is None:
        return None, None
    slopes = alibi_slopes.float().contiguous()
    return slopes, slopes.shape[1] if slopes.dim() == 2 and slopes.shape[0] > 1 else 0


def _options(
    keys, bias, mask, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, query_start, seed,
    scale, window_left, window_right, top_left, softcap, dropout_p,
) -> Options:  # fmt: skip
    slopes, slopes_b = slopes_of(alibi_slopes)
    drop = drop_below(dropout_p)
    whole = [None if t is None else t.contiguous() for t in (key_lengths, cu_seqlens_q, cu_seqlens_k, query_start)]
    return Options(
        bias=_plane(bias, keys), mask=_plane(mask, keys), slopes=slopes, slopes_b=slopes_b,
        key_lengths=whole[0], starts_q=whole[1], starts_k=whole[2],
        sequences=None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1, query_start=whole[3],
        seed=None if drop is None else seed, drop_below=drop,
        keep_scale=None if drop is None else 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        scale=float(scale), softcap=float(softcap) or None, window_left=window(window_left),
        window_right=window(window_right), top_left=1 if top_left else None,
    )  # fmt: skip


def tf32(dtype: torch.dtype) -> bool:
    """Whether float32 products may round their factors to tf32, as torch's switch says: the one that knows of the other
    two, which raise where they were used together."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


@dataclass(frozen=True)
class Call:
    """What the kernels of one call share."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: Options
    tiles: dict[str, attention_plan.Tiles]  # by kernel; a test's own, else the plan's

    @classmethod
    def of(cls, q, k, v, options, tiles=None) -> Call:
        return cls(rows(q), rows(k), rows(v), _options(k.shape[2], *options), tiles or {})

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(Hq, Hq / Hkv, Tq, Tk)"""
        return self.q.shape[1], self.q.shape[1] // self.k.shape[1], self.q.shape[2], self.k.shape[2]

    def tiles_of(self, kernel: str) -> attention_plan.Tiles:
        if kernel in self.tiles:
            return self.tiles[kernel]
        width = max(self.q.shape[3], self.v.shape[3])
        return attention_plan.plan(
            kernel, attention_plan.kind(self.q.dtype, tf32(self.q.dtype)), width, common.capability(self.q.device),
            causal=self.o.window_right is not None or self.o.window_left is not None, extras=self.extras,
        )  # fmt: skip

    @property
    def extras(self) -> bool:
        """Whether a program holds more than plain attention's tiles in its registers."""
        o = self.o
        return any(x is not None for x in (o.bias, o.mask, o.softcap, o.seed, o.slopes))

    def slots(self, rows: int, block: int) -> int:
        """Tiles of a packed or padded axis; where packed, at least as many as any division of it needs."""
        if self.o.sequences is None:
            return common.cdiv(rows, block)
        return rows // block + self.o.sequences + 1

    def edge(self, tiles: attention_plan.Tiles) -> bool:
        """Whether any tile may hold a query or key that does not exist, or a key that a window hides."""
        o = self.o
        given = (o.key_lengths, o.sequences, o.window_left, o.window_right)
        _, _, Tq, Tk = self.sizes
        return any(x is not None for x in given) or Tq % tiles.block_m > 0 or Tk % tiles.block_n > 0

    def constants(self, tiles: attention_plan.Tiles) -> dict:
        D, DV = self.q.shape[3], self.v.shape[3]
        return {
            "D": D, "DV": DV, "BLOCK_D": attention_plan.padded(D), "BLOCK_DV": attention_plan.padded(DV),
            "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "STAGES": tiles.stages,
            "PRECISION": "tf32" if tf32(self.q.dtype) else "ieee", "num_warps": tiles.warps,
        }  # fmt: skip


def attention_fwd(q, k, v, *options, tiles=None):
    """q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv] and the 14 options of reference.AttentionOptions.

    Returns (out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq]).
    """
    out = output_like(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    call = Call.of(q, k, v, options, tiles)
    if out.numel() == 0:
        return out, lse.fill_(-torch.inf)
    o, shape = call.o, call.tiles_of("forward")
    fold = o.scale >= 0 and all(x is None for x in (o.bias, o.mask, o.softcap, o.slopes))
    H, group, Tq, Tk = call.sizes
    slots = call.slots(Tq, shape.block_m)
    batches = 1 if o.sequences is not None else q.shape[0]
    with common.on_device(q):
        common.launch(
            forward_kernel, (slots * H * batches,),
            strided(call.q), strided(call.k), strided(call.v), strided(out), lse, o, H, group, Tq, Tk, slots,
            FOLD=fold, **call.constants(shape),
        )  # fmt: skip
    return out, lse


def attention_bwd(dout, dlse, q, k, v, out, lse, *rest, tiles=None):
    """rest: the 14 options, want_dbias, deterministic. dlse: float32 [B, Hq, Tq] or None.

    Returns (dq, dk, dv, dbias); dbias is empty unless want_dbias.
    """
    *options, want_dbias, deterministic = rest
    bias = options[0]
    dq, dk, dv = output_like(q, q.shape[3]), output_like(k, k.shape[3]), output_like(v, v.shape[3])
    dbias = bias.new_empty(bias.shape) if want_dbias else q.new_empty(0)
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_()
    call = Call.of(q, k, v, options, tiles)
    dout, out = rows(dout), rows(out)
    with common.on_device(q):
        delta = _delta(out, dout, dlse, lse)
        tensors = (strided(call.q), strided(call.k), strided(call.v), strided(dout), lse, delta)
        if deterministic or max(q.shape[3], v.shape[3]) > attention_plan.MAX_ATOMIC_HEAD_DIM:
            _launch_queries(call, tensors, dq)
            _launch_keys(call, tensors, None, dk, dv)
        else:
            in_place = dq.dtype == torch.float32 and dq.is_contiguous()
            dq32 = dq.zero_() if in_place else q.new_zeros(q.shape, dtype=torch.float32)
            _launch_keys(call, tensors, dq32, dk, dv)
            if not in_place:
                dq.copy_(dq32)
        if want_dbias:
            _launch_bias(call, tensors, dbias)
    return dq, dk, dv, dbias


def _delta(out, dout, dlse, lse):
    B, H, Tq, DV = out.shape
    delta = out.new_empty((B, H, Tq), dtype=torch.float32)
    block = max(1, min(64, 8192 // attention_plan.padded(DV)))
    tiles = common.cdiv(Tq, block)
    common.launch(
        row_kernel, (tiles * H * B,), strided(out), strided(dout), None if dlse is None else dlse.contiguous(), lse,
        delta, H, Tq, tiles, DV=DV, BLOCK_DV=attention_plan.padded(DV), BLOCK_M=block, num_warps=4,
    )  # fmt: skip
    return delta


def _launch_queries(call, tensors, dq):
    H, group, Tq, Tk = call.sizes
    shape = call.tiles_of("query")
    slots = call.slots(Tq, shape.block_m)
    batches = 1 if call.o.sequences is not None else call.q.shape[0]
    common.launch(
        query_kernel, (slots * H * batches,), *tensors, strided(dq), call.o, H, group, Tq, Tk, slots,
        EDGE=call.edge(shape), **call.constants(shape),
    )  # fmt: skip


def _launch_keys(call, tensors, dq32, dk, dv):
    H, group, Tq, Tk = call.sizes
    shape = call.tiles_of("key")
    slots = call.slots(Tk, shape.block_n)
    batches = 1 if call.o.sequences is not None else call.q.shape[0]
    common.launch(
        key_kernel, (slots * H // group * batches,), *tensors, dq32, strided(dk), strided(dv), call.o,
        H // group, group, Tq, Tk, slots, EDGE=call.edge(shape), **call.constants(shape),
    )  # fmt: skip


def _launch_bias(call, tensors, dbias):
    H, group, Tq, Tk = call.sizes
    shape = call.tiles_of("bias")
    b, h = dbias.shape[:2]
    programs = common.cdiv(Tq, shape.block_m) * common.cdiv(Tk, shape.block_n) * b * h
    common.launch(
        bias_kernel, (programs,), *tensors, dbias, call.o, call.q.shape[0], H, group, Tq, Tk, b, h,
        **call.constants(shape),
    )  # fmt: skip
