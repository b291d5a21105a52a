"""LayerNorm (Ba, Kiros, Hinton 2016) and RMSNorm (Zhang, Sennrich 2019), with dropout and a residual before them.

Interpreted and compiled for sm_80 ... sm_120; never yet run on a GPU.

    s = drop(x) + residual, rounded to the input's dtype   c1 = mean_n(dy * w * xhat),  c2 = mean_n(dy * w)
    xhat = (s - mean) * rstd                               dx = rstd * (dy * w - c2 - xhat * c1) + ds
    y = xhat * w + b                                       dw = sum_m(dy * xhat),  db = sum_m(dy)
    RMSNorm: mean = 0 and c2 = 0. A weight stored around zero: 1 + w. Dropout: dx is dropped as x was, dresidual is not.

Memory traffic allowed, in bytes of one element of the input's dtype e, N columns, M rows:
    forward  N <= 32768 (fp32: 16384): read x (and residual), write y (and s): 2 e M N (4 e M N). The row stays in
             registers, its statistics take two passes over them. Beyond: chunks, and one more read (from L2 as a rule).
    backward N <= 8192: read dy, s (and ds), write dx: 3 e M N (4 e M N), and 2 * 4 P N for the partial sums of P
             programs. Beyond: a first kernel reads dy and s for the row sums c1 and c2, a second reads them again.
Statistics, sums and parameters' gradients are fp32. No atomics: sums have one order, so results are bit-identical.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import common, dropout

_CHUNK = 4096  # columns a program holds at a time where a whole row does not fit
_COLUMN_TILE = (4, 512)  # rows, columns a program of the chunked backward pass holds
_REDUCE_TILE = (64, 32)  # of the kernel that adds up the partial sums: 32 fp32 columns fill a 128-byte line,
_WIDE_REDUCE_TILE = (16, 128)  # and wide rows have columns enough to keep every multiprocessor busy anyway
_WIDEST_DROPPED = 4096  # columns of a row that stays in registers under dropout
_WARPS_PER_SM = 32  # of the persistent backward kernels; each program leaves a row of partial sums


@triton.jit
def _weight(w_ptr, cols, mask, HAS_WEIGHT: tl.constexpr, CENTERED: tl.constexpr):
    w = tl.full(cols.shape, 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + cols, mask, other=0.0).to(tl.float32)
        if CENTERED:
            w += 1.0
    return w


@triton.jit
def _bias(b_ptr, cols, mask, HAS_BIAS: tl.constexpr):
    b = tl.zeros(cols.shape, tl.float32)
    if HAS_BIAS:
        b = tl.load(b_ptr + cols, mask, other=0.0).to(tl.float32)
    return b


@triton.jit
def _dropped(x, seed_ptr, below, factor, row, first_column, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """x [ROWS, BLOCK] times 0 or 1 / (1 - p): reference/layer_norm.py, norm_dropout. first_column % 4 == 0."""
    j4 = (first_column // 4 + tl.arange(0, BLOCK // 4))[None, :]
    low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (row >> 32).to(tl.int32)[:, None]
    return tl.where(dropout.kept(seed_ptr, below, j4, low, high, 0, ROWS, BLOCK) != 0, x * factor, 0.0)


@triton.jit
def forward_rows_kernel(
    x_ptr, r_ptr, w_ptr, b_ptr, seed_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr, M, N, eps, below, factor,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr, RMS: tl.constexpr, CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    in_row = first + rows < M
    mask = in_row[:, None] & (cols < N)[None, :]
    base = first * N  # 64 bits once a program; offsets inside a tile fit in 32
    offs = rows[:, None] * N + cols[None, :]
    x = tl.load(x_ptr + base + offs, mask, other=0.0).to(tl.float32)
    if DROP:
        x = _dropped(x, seed_ptr, below, factor, first + rows, 0, ROWS, BLOCK)
    if HAS_RESIDUAL:
        x += tl.load(r_ptr + base + offs, mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL or DROP:
        s = x.to(x_ptr.dtype.element_ty)
        tl.store(s_ptr + base + offs, s, mask)
        x = s.to(tl.float32)
    centred = x
    if not RMS:
        mean = tl.sum(x, axis=1) / N
        centred = tl.where(mask, x - mean[:, None], 0.0)
        tl.store(mean_ptr + first + rows, mean, in_row)
    var = tl.sum(centred * centred, axis=1) / N
    rstd = 1.0 / tl.sqrt(var + eps)
    tl.store(rstd_ptr + first + rows, rstd, in_row)
    w = _weight(w_ptr, cols, cols < N, HAS_WEIGHT, CENTERED)
    b = _bias(b_ptr, cols, cols < N, HAS_BIAS)
    y = centred * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(y_ptr + base + offs, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def forward_chunked_kernel(
    x_ptr, r_ptr, w_ptr, b_ptr, seed_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr, M, N, eps, below, factor,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr, RMS: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = row * N
    count = 0.0
    mean = 0.0
    m2 = 0.0  # sum of squared deviations; chunks are merged as Chan, Golub, LeVeque (1979) do
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < N
        x = tl.load(x_ptr + base + cols, mask, other=0.0).to(tl.float32)
        if DROP:
            one = tl.reshape(x, [1, BLOCK])
            one = _dropped(one, seed_ptr, below, factor, row + tl.zeros([1], tl.int64), start, 1, BLOCK)
            x = tl.reshape(one, [BLOCK])
        if HAS_RESIDUAL:
            x += tl.load(r_ptr + base + cols, mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL or DROP:
            s = x.to(x_ptr.dtype.element_ty)
            tl.store(s_ptr + base + cols, s, mask)
            x = s.to(tl.float32)
        if RMS:
            m2 += tl.sum(x * x, axis=0)
        else:
            n = tl.minimum(N - start, BLOCK).to(tl.float32)
            chunk_mean = tl.sum(x, axis=0) / n
            centred = tl.where(mask, x - chunk_mean, 0.0)
            delta = chunk_mean - mean
            total = count + n
            m2 += tl.sum(centred * centred, axis=0) + delta * (delta * (count * n / total))
            mean += delta * (n / total)
            count = total
    rstd = 1.0 / tl.sqrt(m2 / N + eps)
    if not RMS:
        tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    in_ptr = x_ptr
    if HAS_RESIDUAL or DROP:
        in_ptr = s_ptr
        tl.debug_barrier()  # what other threads of this program stored to s is read below
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < N
        x = tl.load(in_ptr + base + cols, mask, other=0.0).to(tl.float32)
        w = _weight(w_ptr, cols, mask, HAS_WEIGHT, CENTERED)
        b = _bias(b_ptr, cols, mask, HAS_BIAS)
        y = (x - mean) * rstd * w + b
        tl.store(y_ptr + base + cols, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def backward_rows_kernel(
    dy_ptr, ds_ptr, s_ptr, w_ptr, mean_ptr, rstd_ptr, seed_ptr, dx_ptr, dr_ptr, partial_ptr, M, N, below, factor,
    HAS_DS: tl.constexpr, HAS_WEIGHT: tl.constexpr, WANT_DW: tl.constexpr, WANT_DB: tl.constexpr,
    DROP: tl.constexpr, WANT_DR: tl.constexpr, RMS: tl.constexpr, CENTERED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Program p takes the row blocks p, p + P, ... and leaves one row of partial sums: partial[2, P, N].
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    w = _weight(w_ptr, cols, cols < N, HAS_WEIGHT, CENTERED)
    offs = rows[:, None] * N + cols[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    wide = tl.zeros([], tl.int64)  # M * N may need 64 bits
    for block in range(program, tl.cdiv(M, ROWS), programs):
        first = (wide + block) * ROWS
        in_row = first + rows < M
        mask = in_row[:, None] & (cols < N)[None, :]
        base = first * N
        s = tl.load(s_ptr + base + offs, mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + base + offs, mask, other=0.0).to(tl.float32)
        if not RMS:
            mean = tl.load(mean_ptr + first + rows, in_row, other=0.0)
            s = tl.where(mask, s - mean[:, None], 0.0)
        rstd = tl.load(rstd_ptr + first + rows, in_row, other=0.0)
        xhat = s * rstd[:, None]
        g = dy * w[None, :]
        c1 = tl.sum(g * xhat, axis=1) / N
        dx = g - xhat * c1[:, None]
        if not RMS:
            c2 = tl.sum(g, axis=1) / N
            dx -= c2[:, None]
        dx *= rstd[:, None]
        if HAS_DS:
            dx += tl.load(ds_ptr + base + offs, mask, other=0.0).to(tl.float32)
        if WANT_DR:
            tl.store(dr_ptr + base + offs, dx.to(dx_ptr.dtype.element_ty), mask)
        if DROP:
            dx = _dropped(dx, seed_ptr, below, factor, first + rows, 0, ROWS, BLOCK)
        tl.store(dx_ptr + base + offs, dx.to(dx_ptr.dtype.element_ty), mask)
        if WANT_DW:
            dw += dy * xhat
        if WANT_DB:
            db += dy
    if WANT_DW:
        tl.store(partial_ptr + program.to(tl.int64) * N + cols, tl.sum(dw, axis=0), cols < N)
    if WANT_DB:
        tl.store(partial_ptr + (programs + program).to(tl.int64) * N + cols, tl.sum(db, axis=0), cols < N)


@triton.jit
def backward_row_sums_kernel(
    dy_ptr, s_ptr, w_ptr, mean_ptr, rstd_ptr, sums_ptr, M, N,
    HAS_WEIGHT: tl.constexpr, RMS: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    if not RMS:
        mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    c1 = tl.zeros([BLOCK], tl.float32)
    c2 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < N
        s = tl.load(s_ptr + row * N + cols, mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + row * N + cols, mask, other=0.0).to(tl.float32)
        g *= _weight(w_ptr, cols, mask, HAS_WEIGHT, CENTERED)
        c1 += g * ((s - mean) * rstd)  # g is 0 outside the row
        c2 += g
    tl.store(sums_ptr + row, tl.sum(c1, axis=0) / N)
    if not RMS:
        tl.store(sums_ptr + M + row, tl.sum(c2, axis=0) / N)


@triton.jit
def backward_columns_kernel(
    dy_ptr, ds_ptr, s_ptr, w_ptr, mean_ptr, rstd_ptr, sums_ptr, seed_ptr, dx_ptr, dr_ptr, partial_ptr, M, N,
    below, factor,
    HAS_DS: tl.constexpr, HAS_WEIGHT: tl.constexpr, WANT_DW: tl.constexpr, WANT_DB: tl.constexpr,
    DROP: tl.constexpr, WANT_DR: tl.constexpr, RMS: tl.constexpr, CENTERED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One chunk of columns, every P-th block of rows; partial[2, P, N] as in backward_rows_kernel.
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    rows = tl.arange(0, ROWS)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = _weight(w_ptr, cols, cols < N, HAS_WEIGHT, CENTERED)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    wide = tl.zeros([], tl.int64)  # M * N may need 64 bits
    for block in range(program, tl.cdiv(M, ROWS), programs):
        row = (wide + block) * ROWS + rows
        in_row = row < M
        mask = in_row[:, None] & (cols < N)[None, :]
        offs = row[:, None] * N + cols[None, :]
        s = tl.load(s_ptr + offs, mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs, mask, other=0.0).to(tl.float32)
        if not RMS:
            s = tl.where(mask, s - tl.load(mean_ptr + row, in_row, other=0.0)[:, None], 0.0)
        rstd = tl.load(rstd_ptr + row, in_row, other=0.0)[:, None]
        c1 = tl.load(sums_ptr + row, in_row, other=0.0)[:, None]
        xhat = s * rstd
        dx = dy * w[None, :] - xhat * c1
        if not RMS:
            dx -= tl.load(sums_ptr + M + row, in_row, other=0.0)[:, None]
        dx *= rstd
        if HAS_DS:
            dx += tl.load(ds_ptr + offs, mask, other=0.0).to(tl.float32)
        if WANT_DR:
            tl.store(dr_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask)
        if DROP:
            dx = _dropped(dx, seed_ptr, below, factor, row, tl.program_id(0) * BLOCK, ROWS, BLOCK)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask)
        if WANT_DW:
            dw += dy * xhat
        if WANT_DB:
            db += dy
    if WANT_DW:
        tl.store(partial_ptr + program.to(tl.int64) * N + cols, tl.sum(dw, axis=0), cols < N)
    if WANT_DB:
        tl.store(partial_ptr + (programs + program).to(tl.int64) * N + cols, tl.sum(db, axis=0), cols < N)


@triton.jit
def sum_partials_kernel(
    partial_ptr, dw_ptr, db_ptr, P, N,
    WANT_DW: tl.constexpr, WANT_DB: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < P)[:, None] & (cols < N)[None, :]
        if WANT_DW:
            dw += tl.load(partial_ptr + row.to(tl.int64)[:, None] * N + cols[None, :], mask, other=0.0)
        if WANT_DB:
            db += tl.load(partial_ptr + (P + row).to(tl.int64)[:, None] * N + cols[None, :], mask, other=0.0)
    if WANT_DW:
        tl.store(dw_ptr + cols, tl.sum(dw, axis=0).to(dw_ptr.dtype.element_ty), cols < N)
    if WANT_DB:
        tl.store(db_ptr + cols, tl.sum(db, axis=0).to(db_ptr.dtype.element_ty), cols < N)


def _draw(dropout_p: float) -> tuple[bool, int, float]:
    """(whether anything is dropped, the word up to which it is, what the rest is multiplied by)."""
    below = dropout.drop_below(dropout_p)
    factor = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return (False, 0, 1.0) if below is None else (True, below, factor)


def _width(n: int) -> int:
    return max(4, common.next_power_of_2(n))  # dropout draws for four neighbours at a time


def _blocks(op: str, t: torch.Tensor, drop: bool) -> tuple[int, int] | None:
    """(rows per program, warps) where whole rows fit into registers, else None; Philox needs some of them too."""
    n = t.shape[1]
    if drop and n > _WIDEST_DROPPED:
        return None
    return common.blocks(op, n, t.element_size(), common.capability(t.device))


def layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rms: bool = False,
    zero_centered: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual [M, N] contiguous, fp32 / bf16 / fp16; weight, bias [N] of that dtype or fp32; seed int64 [1].

    Returns (y [M, N], s = drop(x) + residual [M, N], or empty [0] where it is x itself, mean [M] fp32 (rms: empty),
    rstd [M] fp32).
    """
    m, n = x.shape
    drop, below, factor = _draw(dropout_p)
    y = torch.empty_like(x)
    s = torch.empty_like(x) if residual is not None or dropout_p else x.new_empty(0)
    rstd = torch.empty(m, dtype=torch.float32, device=x.device)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    if not x.numel():
        return y, s, mean.fill_(0.0), rstd.fill_(0.0)
    if dropout_p and not drop and residual is None:  # a probability below 2^-32
        s.copy_(x)
    flags = {
        "HAS_RESIDUAL": residual is not None, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None,
        "DROP": drop, "RMS": rms, "CENTERED": zero_centered,
    }  # fmt: skip
    written = (y, s if s.dim() == 2 else None, None if rms else mean, rstd)
    args = (x, residual, weight, bias, seed if drop else None, *written, m, n, eps, below, factor)
    block = _blocks("layer_norm_fwd", x, drop)
    with common.on_device(x):
        if block is None:
            common.launch(forward_chunked_kernel, (m,), *args, **flags, BLOCK=_CHUNK, num_warps=8)
        else:
            rows, warps = block
            grid = (common.cdiv(m, rows),)
            common.launch(forward_rows_kernel, grid, *args, **flags, ROWS=rows, BLOCK=_width(n), num_warps=warps)
    return y, s, mean, rstd


def layer_norm_bwd(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    want_dweight: bool,
    want_dbias: bool,
    want_dresidual: bool = False,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rms: bool = False,
    zero_centered: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dy, ds, s [M, N] contiguous; mean, rstd [M] fp32.

    Returns (dx [M, N], dresidual [M, N], dweight [N], dbias [N]); the last two in weight's dtype (without one in s's).
    Empty [0]: what is not wanted, and dresidual without dropout, where it is dx.
    """
    m, n = s.shape
    drop, below, factor = _draw(dropout_p)
    dx = torch.empty_like(s)
    dr = torch.empty_like(s) if want_dresidual and dropout_p else s.new_empty(0)
    want_dr = dr.dim() == 2
    own = {"RMS": rms, "CENTERED": zero_centered, "HAS_WEIGHT": weight is not None}
    flags = {"HAS_DS": ds is not None, "WANT_DW": want_dweight, "WANT_DB": want_dbias, "DROP": drop,
             "WANT_DR": want_dr, **own}  # fmt: skip
    if not s.numel():
        dtype = s.dtype if weight is None else weight.dtype
        sizes = (n if want_dweight else 0, n if want_dbias else 0)
        return dx, dr, *(torch.zeros(size, dtype=dtype, device=s.device) for size in sizes)
    block = _blocks("layer_norm_bwd", s, drop)
    rows, warps = (_COLUMN_TILE[0], 4) if block is None else block
    programs = common.sm_count(s.device) * _WARPS_PER_SM // warps
    if block is None:
        programs = max(1, programs // common.cdiv(n, _COLUMN_TILE[1]))
    programs = min(programs, common.cdiv(m, rows))
    partial = None
    if want_dweight or want_dbias:
        partial = torch.empty(2, programs, n, dtype=torch.float32, device=s.device)
    mean = None if rms else mean
    out = (seed if drop else None, dx, dr if want_dr else None, partial, m, n, below, factor)
    with common.on_device(s):
        if block is None:
            sums = torch.empty(2, m, dtype=torch.float32, device=s.device)
            row_args = (dy, s, weight, mean, rstd, sums, m, n)
            common.launch(backward_row_sums_kernel, (m,), *row_args, **own, BLOCK=_CHUNK, num_warps=8)
            width = _COLUMN_TILE[1]
            grid = (common.cdiv(n, width), programs)
            args = (dy, ds, s, weight, mean, rstd, sums, *out)
            common.launch(backward_columns_kernel, grid, *args, **flags, ROWS=rows, BLOCK=width)
        else:
            args = (dy, ds, s, weight, mean, rstd, *out)
            common.launch(
                backward_rows_kernel, (programs,), *args, **flags, ROWS=rows, BLOCK=_width(n), num_warps=warps
            )
        dtype = s.dtype if weight is None else weight.dtype
        dw = torch.empty(n if want_dweight else 0, dtype=dtype, device=s.device)
        db = torch.empty(n if want_dbias else 0, dtype=dtype, device=s.device)
        if partial is not None:
            args = (partial, dw if want_dweight else None, db if want_dbias else None, programs, n)
            rows, width = _REDUCE_TILE if n <= 8192 else _WIDE_REDUCE_TILE
            wants = {"WANT_DW": want_dweight, "WANT_DB": want_dbias}
            common.launch(sum_partials_kernel, (common.cdiv(n, width),), *args, **wants, ROWS=rows, BLOCK=width)
    return dx, dr, dw, db
