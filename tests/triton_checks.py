"""Checks that the interpreter tests and the GPU tests share: a launcher pair against the float64 reference.

Memory that nobody wrote holds NaN (tests/conftest.py), and so does everything beyond a sequence's end.
"""

from typing import NamedTuple

import torch

from seqfuse import reference
from seqfuse.kernels import layer_norm as ln
from seqfuse.kernels import rnn, rnn_plan
from seqfuse.testing import FLOOR, assert_accurate

__all__ = ["FLOOR", "layer_norm", "options_of", "rnn_inference", "rnn_nan", "rnn_scan"]


def _cast(value, dtype):
    return None if value is None else value.detach().to("cpu", dtype).requires_grad_()


def _identical(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), "two calls with the same inputs differ"


def layer_norm(
    m, n, dtype, device, *, residual=True, ds=True, weight=True, bias=True, param_dtype=None, seed=0, repeat=False
):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape, kind=dtype, scale=1.0, shift=0.0):
        return (torch.randn(*shape, generator=generator) * scale + shift).to(device, kind)

    param_dtype = param_dtype or dtype
    ds = ds and residual
    x = rand(m, n, shift=0.7)
    r = rand(m, n, scale=0.5) if residual else None
    w = rand(n, kind=param_dtype, shift=1.0) if weight else None
    b = rand(n, kind=param_dtype) if bias else None
    dy, dsum = rand(m, n), rand(m, n) if ds else None
    eps = 1e-5

    def expected(to):
        leaves = [_cast(v, to) for v in (x, r, w, b)]
        y, s = reference.layer_norm(*leaves, eps)
        y = y.to(to)
        outputs, grads = [y], [dy.cpu().to(to)]
        if ds:
            outputs.append(s)
            grads.append(dsum.cpu().to(to))
        wanted = [v for v in leaves if v is not None]
        got = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return y, s, [None if v is None else next(got) for v in leaves]

    y64, s64, (dx64, _, dw64, db64) = expected(torch.float64)
    y_t, s_t, (dx_t, _, dw_t, db_t) = expected(dtype)

    def run():
        y, s, mean, rstd = ln.layer_norm_fwd(x, r, w, b, eps)
        normalised = s if residual else x
        dx, _, *parameters = ln.layer_norm_bwd(dy, dsum, normalised, w, mean, rstd, weight, bias)
        return y, s, mean, rstd, dx, *parameters

    y, s, mean, rstd, dx, dw, db = results = run()
    if repeat:
        _identical(results, run())
    assert_accurate(y, y64, y_t, dims=(0,), what="y")
    assert_accurate(dx, dx64, dx_t, dims=(0,), what="dx")
    if residual:
        assert_accurate(s, s64, s_t, dims=(0,), what="x + residual")
        assert s.dtype == dtype
    else:
        assert s.numel() == 0
    rounded = (s if residual else x).cpu().double()  # the statistics are those of what was stored
    assert mean.dtype == rstd.dtype == torch.float32
    assert_accurate(mean, rounded.mean(1), what="mean")
    assert_accurate(rstd, (rounded.var(1, unbiased=False) + eps).rsqrt(), what="rstd")
    for got, truth, pytorch, wanted, what in ((dw, dw64, dw_t, weight, "dweight"), (db, db64, db_t, bias, "dbias")):
        if not wanted:
            assert got.numel() == 0
            continue
        assert got.dtype == (param_dtype if weight else dtype)
        # the inputs' dtype chooses the floor: a gradient of fp16 products is no better for being stored in fp32
        assert_accurate(got, truth, pytorch, what=what, dtype=dtype)


# What a recurrent scan may have besides its cell: ScanOptions by name, heads, and a gradient for every cell state.
OPTIONS = ("lengths", "resets", "hidden_mask", "zone_h", "zoneout_h", "heads")
LSTM_OPTIONS = (*OPTIONS, "peephole", "zone_c", "zoneout_c", "dcells")


def options_of(cell):
    return LSTM_OPTIONS if cell == "lstm" else OPTIONS


def _sequence(value, batch_major):
    return value.transpose(0, 1).contiguous().transpose(0, 1) if batch_major else value


class _Scan(NamedTuple):
    """The inputs of one scan."""

    rand: object
    xg: torch.Tensor
    h0: torch.Tensor
    c0: torch.Tensor | None
    w_hh: torch.Tensor
    b_hh: torch.Tensor | None
    options: reference.ScanOptions

    def fwd(self, cell, reverse, save, want_cells, plan):
        return rnn.rnn_scan_fwd(cell, *self[1:6], *self.options[:8], reverse, save, want_cells, plan)

    @property
    def beyond(self):
        """[T, B] on the CPU: what lies beyond a sequence's end."""
        t, b = self.xg.shape[:2]
        if self.options.lengths is None:
            return torch.zeros(t, b, dtype=torch.bool)
        return torch.arange(t)[:, None] >= self.options.lengths.cpu()

    def unreadable_beyond(self, value):
        return None if value is None else value.masked_fill_(self.beyond.to(value.device)[..., None], float("nan"))


def _rnn_inputs(cell, t, b, h, dtype, device, seed, *, bias=True, batch_major=False, options=()):
    """h: units of one head; options: names out of LSTM_OPTIONS."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0, kind=dtype):
        return (torch.randn(*shape, generator=generator) * scale).to(device, kind)

    def chance(p, *shape):
        return (torch.rand(*shape, generator=generator) < p).to(device)

    def given(name, make):
        return make() if name in options else None

    g = rnn_plan.GATES[cell]
    width, h = h, h * (2 if "heads" in options else 1)
    xg = _sequence(rand(t, b, g * h), batch_major)
    h0 = rand(b, h, scale=0.5)
    c0 = rand(b, h) if cell == "lstm" else None
    w = rand(g * h, width, scale=width**-0.5)
    bh = rand(g * h, scale=0.3) if bias else None
    o = reference.ScanOptions(
        lengths=given("lengths", lambda: torch.randint(0, t + 1, (b,), generator=generator).to(device)),
        resets=given("resets", lambda: chance(0.3, t, b)),
        hidden_mask=given("hidden_mask", lambda: chance(0.7, b, h).to(dtype) / 0.7),
        peephole=given("peephole", lambda: rand(3, h, scale=0.5)),
        zone_h=given("zone_h", lambda: chance(0.3, t, b, h)),
        zone_c=given("zone_c", lambda: chance(0.3, t, b, h)),
        zoneout_h=0.1 if "zoneout_h" in options else 0.0,
        zoneout_c=0.3 if "zoneout_c" in options else 0.0,
    )
    scan = _Scan(rand, xg, h0, c0, w, bh, o)
    scan.unreadable_beyond(xg)
    return scan


def _reference_options(options, to):
    def cast(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.cpu().to(to) if value.is_floating_point() else value.cpu()

    return reference.ScanOptions(*map(cast, options))


def _dw_hh(cell, dxg, dan, y, scan, reverse):
    """What ops/rnn_layer.py does after the scan: the weights' gradient from the gates' gradients."""
    da = dxg.double().cpu()
    h, width = scan.h0.shape[1], scan.w_hh.shape[1]
    if cell == "gru":
        da = torch.cat([da[..., : 2 * h], dan.double().cpu()], -1)
    y, h0 = y.double().cpu(), scan.h0.double().cpu()[None]
    before = torch.cat([y[1:], h0]) if reverse else torch.cat([h0, y[:-1]])
    o = _reference_options(scan.options, torch.float64)
    if reverse and o.lengths is not None:
        row = torch.arange(y.shape[1])[o.lengths > 0]
        before[o.lengths[row] - 1, row] = h0[0, row]
    if o.resets is not None:
        before[o.resets] = 0.0
    if o.hidden_mask is not None:
        before = before * o.hidden_mask
    da = da.unflatten(-1, (-1, h // width, width))
    return torch.einsum("tbgnu,tbnk->gnuk", da, before.unflatten(-1, (-1, width))).reshape(-1, width)


def rnn_scan(
    cell, t, b, h, dtype, device, *, plan, reverse=False, batch_major=False, bias=True,
    dy=True, dh_n=True, dc_n=True, strided_dy=False, seed=0, repeat=False, options=(),
):  # fmt: skip
    """Forward and backward of one scan against the reference. h: units of one head (there are 2 with "heads")."""
    scan = _rnn_inputs(cell, t, b, h, dtype, device, seed, bias=bias, batch_major=batch_major, options=options)
    rand, o, lstm = scan.rand, scan.options, cell == "lstm"
    h = scan.h0.shape[1]
    grad_y = rand(t, b, 2 * h)[..., h:] if strided_dy else rand(t, b, h)
    grad_y = _sequence(grad_y, batch_major) if dy else None
    grad_h = rand(b, h) if dh_n or not dy else None
    grad_c = rand(b, h) if lstm and dc_n else None
    grad_cells = rand(t, b, h, kind=torch.float32) if "dcells" in options else None
    scan.unreadable_beyond(grad_y)
    scan.unreadable_beyond(grad_cells)

    def expected(to):
        leaves = [_cast(v, to) for v in scan[1:6]]
        outputs = reference.rnn_scan(cell, *leaves, reverse, _reference_options(o, to))
        grads = (grad_y, grad_h, grad_c, grad_cells)
        pairs = [(out, g.cpu().to(to)) for out, g in zip(outputs, grads, strict=True) if g is not None]
        wanted = [v for v in leaves if v is not None]
        outs, grads = zip(*pairs, strict=True)
        got = iter(torch.autograd.grad(outs, wanted, grads, materialize_grads=True))
        return outputs, [None if v is None else next(got) for v in leaves]

    truth, truth_grads = expected(torch.float64)
    torch_out, torch_grads = expected(dtype)

    def run():
        out = scan.fwd(cell, reverse, True, False, plan)
        y, _, _, gates, cells = out
        back = rnn.rnn_scan_bwd(
            cell,
            grad_y,
            grad_h,
            grad_c,
            grad_cells,
            y,
            gates,
            cells,
            scan.h0,
            scan.c0,
            scan.w_hh,
            *o[:8],
            reverse,
            plan,
        )
        return *out, *back

    y, h_n, c_n, gates, cells, dxg, dan, dh0, dc0, db = results = run()
    if repeat:
        _identical(results, run())
    assert (y.stride(1) > y.stride(0)) == (scan.xg.stride(1) > scan.xg.stride(0)), "y has not the layout of xg"
    zoneout = o.zone_h is not None or o.zoneout_h != 0.0
    saved = 4 if rnn_plan.GATES[cell] > 1 else int(zoneout)
    assert gates.shape == ((t, b, saved * h) if saved else (0,)) and gates.dtype == dtype
    assert cells.shape == ((t, b, h) if lstm else (0,)) and cells.dtype == torch.float32
    assert db.dtype == torch.float32
    beyond = scan.beyond
    for value, what in ((y, "y"), (dxg, "dxg"), (cells, "cells"), (dan, "dan")):
        assert not value.numel() or not value.cpu()[beyond].any(), f"{what} is not 0 beyond a sequence's end"
    assert_accurate(y, truth[0], torch_out[0], dims=(0, 1), what="y")
    assert_accurate(h_n, truth[1], torch_out[1], dims=(0,), what="h_n")
    truth_dxg, torch_dxg = truth_grads[0], torch_grads[0]
    assert_accurate(dxg, truth_dxg, torch_dxg, dims=(0, 1), what="dxg")
    assert_accurate(dh0, truth_grads[1], torch_grads[1], dims=(0,), what="dh0")
    if lstm:
        assert_accurate(c_n, truth[2], torch_out[2], dims=(0,), what="c_n")
        assert_accurate(cells, truth[3], torch_out[3], dims=(0, 1), what="cells", dtype=dtype)
        assert_accurate(dc0, truth_grads[2], torch_grads[2], dims=(0,), what="dc0")
    else:
        assert c_n.numel() == dc0.numel() == 0
    assert dan.numel() == (t * b * h if cell == "gru" else 0)
    dw = _dw_hh(cell, dxg, dan, y, scan, reverse)
    assert_accurate(dw, truth_grads[3], torch_grads[3], what="dw_hh", dtype=dtype)
    if bias:
        assert_accurate(db, truth_grads[4], torch_grads[4], what="db_hh", dtype=dtype)


def rnn_inference(cell, t, b, h, dtype, device, *, plan, options=()):
    """save=False gives the same bits and keeps nothing, but for the cells that want_cells asks for."""
    scan = _rnn_inputs(cell, t, b, h, dtype, device, 3, options=options)
    kept = scan.fwd(cell, False, True, False, plan)
    free = scan.fwd(cell, False, False, False, plan)
    assert free[3].numel() == free[4].numel() == 0
    _identical(kept[:3], free[:3])
    wanted = scan.fwd(cell, False, False, True, plan)
    assert wanted[3].numel() == 0
    _identical((*kept[:3], kept[4]), (*wanted[:3], wanted[4]))


def rnn_nan(cell, dtype, device, *, plan):
    """A NaN in one sequence stays in it: it reaches that sequence's later steps and no other one."""
    scan = _rnn_inputs(cell, 4, 3, 18, dtype, device, 5)
    scan.xg[1, 1] = float("nan")
    y = scan.fwd(cell, False, False, False, plan)[0].cpu()
    bad = torch.zeros(4, 3, dtype=torch.bool)
    bad[1:, 1] = True
    assert torch.equal(y.isnan().all(-1), bad) and torch.equal(y.isnan().any(-1), bad)
