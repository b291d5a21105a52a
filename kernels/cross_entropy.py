"""Loss and gradient of rows of logits, in place: what linear_cross_entropy and kl_loss run between their GEMMs.

Interpreted and compiled for sm_80 ... sm_120; never yet run on a GPU.

    u = softcap tanh(logits / softcap),  lse = log sum_j exp(u_j),  p_j = exp(u_j - lse),  w = class_weight[target]
    loss = (1 - eps) w (lse - u_target) + eps / V sum_j class_weight_j (lse - u_j) + z_loss w lse^2
    dlogits_j = scale (A p_j - eps / V class_weight_j - (1 - eps) w [j = target]) (1 - (u_j / softcap)^2)
    A = (1 - eps) w + eps / V sum_j class_weight_j + 2 z_loss w lse

Memory traffic allowed, for V elements of e bytes a row: read the row (e V), write the gradient in its place (e V). The
second read comes from the L2 where the rows in flight fit there (an H100: 50 MB, a few rows of e V bytes on each of 132
multiprocessors); at V = 128k in bf16 they may not, and then it is 3 e V: to be measured. kl_loss: the same, and the
teacher's row.
One program takes one row; statistics are fp32, each lane keeps its own largest value and sum until the row's end.
A target out of range gives NaN: a check would have to wait for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import common
from .rnn_cells import tanh

_BLOCK = 4096  # columns a program holds at a time


@triton.jit
def cross_entropy_rows_kernel(
    logits_ptr, target_ptr, cw_ptr, cw_sum_ptr, scale_ptr, loss_ptr, lse_ptr, dlogits_ptr,
    V, stride, ignore_index, eps, softcap, z_loss,
    HAS_CW: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr, FORWARD: tl.constexpr, GRADIENT: tl.constexpr,
    SCALE_A_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = row * stride
    lanes = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    keep = target != ignore_index
    exists = (target >= 0) & (target < V)
    at = tl.where(exists, target, 0)
    w = 1.0
    cw_mean = 1.0
    if HAS_CW:
        w = tl.load(cw_ptr + at)
        cw_mean = tl.load(cw_sum_ptr) / V
    if FORWARD:
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK], tl.float32)
        u_target = tl.load(logits_ptr + base + at).to(tl.float32)
        if CAPPED:
            u_target = softcap * tanh(u_target / softcap)
        weights = tl.zeros([BLOCK], tl.float32)  # of the columns that `weighted` is made of, each lane's
        for start in range(0, V, BLOCK):
            cols = start + lanes
            mask = cols < V
            u = tl.load(logits_ptr + base + cols, mask, other=float("-inf")).to(tl.float32)
            if CAPPED:
                u = tl.where(mask, softcap * tanh(u / softcap), float("-inf"))
            larger = tl.maximum(top, u)
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * tl.exp(top - shift) + tl.exp(u - shift)
            if SMOOTH:
                # from the lane's largest logit, so that what all have in common does not round
                weighted += weights * (tl.where(top == float("-inf"), 0.0, top) - shift)
                if HAS_CW:
                    own = tl.load(cw_ptr + cols, mask, other=0.0)
                else:
                    own = tl.where(mask, 1.0, 0.0)
                weighted += tl.where(mask, (u - shift) * own, 0.0)
                weights += own
            top = larger
        largest = tl.max(top, axis=0)
        log_total = tl.log(tl.sum(total * tl.exp(top - largest), axis=0))
        lse = largest + log_total
        loss = (1.0 - eps) * w * ((largest - u_target) + log_total) + z_loss * w * lse * lse
        if SMOOTH:
            shift = tl.where(top == float("-inf"), 0.0, top)
            weighted += weights * (shift - largest)
            loss += eps * (cw_mean * log_total - tl.sum(weighted, axis=0) / V)
        loss = tl.where(exists, loss, float("nan"))
        tl.store(loss_ptr + row, tl.where(keep, loss, 0.0))
        tl.store(lse_ptr + row, tl.where(keep, lse, 0.0))
    else:
        lse = tl.load(lse_ptr + row)
    if GRADIENT:
        scale = tl.load(scale_ptr + (row if SCALE_A_ROW else 0))
        factor = (1.0 - eps) * w + eps * cw_mean + 2.0 * z_loss * w * lse
        for start in range(0, V, BLOCK):
            cols = start + lanes
            mask = cols < V
            u = tl.load(logits_ptr + base + cols, mask, other=0.0).to(tl.float32)
            if CAPPED:
                u = softcap * tanh(u / softcap)
            d = factor * tl.exp(u - lse) - tl.where(cols == at, (1.0 - eps) * w, 0.0)
            if SMOOTH:
                if HAS_CW:
                    d -= eps / V * tl.load(cw_ptr + cols, mask, other=0.0)
                else:
                    d -= eps / V
            if CAPPED:
                d *= 1.0 - (u / softcap) * (u / softcap)
            d = tl.where(keep, d * scale, 0.0)
            tl.store(dlogits_ptr + base + cols, d.to(dlogits_ptr.dtype.element_ty), mask)


def cross_entropy_rows(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    lse: torch.Tensor | None,
    dlogits: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [N, V] of contiguous rows, fp32 / bf16 / fp16; target [N] int64; class_weight [V], scale [1] or [N] fp32.

    Returns (loss [N], lse [N]) fp32, or with `lse` of an earlier call two empty tensors; with `scale` the gradient goes
    into dlogits [N, V] with the strides of logits, which it may be.
    """
    rows, vocabulary = logits.shape
    forward = lse is None
    loss = torch.empty(rows if forward else 0, dtype=torch.float32, device=logits.device)
    made = torch.empty_like(loss)
    if not rows:
        return loss, made
    args = (
        logits, target, class_weight, None if class_weight is None else class_weight.sum().reshape(1), scale,
        loss if forward else None, made if forward else lse, dlogits,
        vocabulary, logits.stride(0), ignore_index, label_smoothing, softcap, z_loss,
    )  # fmt: skip
    flags = {
        "HAS_CW": class_weight is not None,
        "SMOOTH": label_smoothing > 0.0,
        "CAPPED": softcap > 0.0,
        "FORWARD": forward,
        "GRADIENT": scale is not None,
        "SCALE_A_ROW": scale is not None and scale.numel() > 1,
    }
    block = min(_BLOCK, common.next_power_of_2(vocabulary))
    with common.on_device(logits):
        common.launch(cross_entropy_rows_kernel, (rows,), *args, **flags, BLOCK=block, num_warps=8)
    return loss, made


@triton.jit
def kl_rows_kernel(
    student_ptr, teacher_ptr, keep_ptr, scale_ptr, loss_ptr, dstudent_ptr, V, temperature,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = t^2 sum_j p_j (log p_j - log q_j), dstudent_j = scale t (q_j - p_j); p, q: softmax of logits / t."""
    row = tl.program_id(0).to(tl.int64)
    base = row * V
    lanes = tl.arange(0, BLOCK)
    keep = True
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + row) != 0
    top_q = tl.full([BLOCK], float("-inf"), tl.float32)
    top_p = tl.full([BLOCK], float("-inf"), tl.float32)
    total_q = tl.zeros([BLOCK], tl.float32)
    total_p = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)  # sum of exp(teacher) (teacher - student)
    for start in range(0, V, BLOCK):
        cols = start + lanes
        mask = cols < V
        q = tl.load(student_ptr + base + cols, mask, other=float("-inf")).to(tl.float32) / temperature
        p = tl.load(teacher_ptr + base + cols, mask, other=float("-inf")).to(tl.float32) / temperature
        larger = tl.maximum(top_q, q)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total_q = total_q * tl.exp(top_q - shift) + tl.exp(q - shift)
        top_q = larger
        larger = tl.maximum(top_p, p)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        shrink = tl.exp(top_p - shift)
        e = tl.exp(p - shift)
        total_p = total_p * shrink + e
        weighted = weighted * shrink + tl.where(e == 0.0, 0.0, e * (p - q))  # a word without weight may be -inf
        top_p = larger
    largest = tl.max(top_q, axis=0)
    lse_q = largest + tl.log(tl.sum(total_q * tl.exp(top_q - largest), axis=0))
    largest = tl.max(top_p, axis=0)
    shrink = tl.exp(top_p - largest)
    sum_p = tl.sum(total_p * shrink, axis=0)
    lse_p = largest + tl.log(sum_p)
    loss = temperature * temperature * (tl.sum(weighted * shrink, axis=0) / sum_p - (lse_p - lse_q))
    tl.store(loss_ptr + row, tl.where(keep, loss, 0.0))
    if GRADIENT:
        factor = tl.load(scale_ptr) * temperature
        for start in range(0, V, BLOCK):
            cols = start + lanes
            mask = cols < V
            q = tl.load(student_ptr + base + cols, mask, other=0.0).to(tl.float32) / temperature
            p = tl.load(teacher_ptr + base + cols, mask, other=0.0).to(tl.float32) / temperature
            d = factor * (tl.exp(q - lse_q) - tl.exp(p - lse_p))
            tl.store(dstudent_ptr + base + cols, tl.where(keep, d, 0.0).to(dstudent_ptr.dtype.element_ty), mask)


def kl_rows(
    student: torch.Tensor,
    teacher: torch.Tensor,
    keep: torch.Tensor | None,
    scale: torch.Tensor | None,
    dstudent: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    """student, teacher: logits [N, V] contiguous, fp32 / bf16 / fp16; keep: bool [N], rows that count; scale [1] fp32.

    Returns loss [N] fp32; with `scale` the gradient goes into dstudent [N, V], which may be student itself.
    """
    rows, vocabulary = student.shape
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    if not rows:
        return loss
    keep = None if keep is None else keep.view(torch.uint8)
    block = min(_BLOCK, common.next_power_of_2(vocabulary))
    with common.on_device(student):
        common.launch(kl_rows_kernel, (rows,), student, teacher, keep, scale, loss, dstudent, vocabulary, temperature,
                      GRADIENT=scale is not None, BLOCK=block, num_warps=8)  # fmt: skip
    return loss
