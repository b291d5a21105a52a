"""Checks that the interpreter tests and the GPU tests share: a launcher pair against the float64 reference.

Memory that nobody wrote holds NaN (tests/conftest.py).
"""

import torch

from seqfuse import reference
from seqfuse.kernels import layer_norm as ln
from seqfuse.kernels import rnn, rnn_plan
from seqfuse.testing import FLOOR, assert_accurate

__all__ = ["FLOOR", "layer_norm", "rnn_inference", "rnn_nan", "rnn_scan"]


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
        return y, s, mean, rstd, *ln.layer_norm_bwd(dy, dsum, normalised, w, mean, rstd, weight, bias)

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


def _sequence(value, batch_major):
    return value.transpose(0, 1).contiguous().transpose(0, 1) if batch_major else value


def _rnn_inputs(cell, t, b, h, dtype, device, seed, *, bias=True, batch_major=False):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    g = rnn_plan.GATES[cell]
    xg = _sequence(rand(t, b, g * h), batch_major)
    h0 = rand(b, h, scale=0.5)
    c0 = rand(b, h) if cell == "lstm" else None
    w = rand(g * h, h, scale=h**-0.5)
    bh = rand(g * h, scale=0.3) if bias else None
    return rand, xg, h0, c0, w, bh


def _dw_hh(cell, dxg, dan, y, h0, reverse):
    """What ops/recurrent.py does after the scan: the weights' gradient from the gates' gradients."""
    da = dxg.double().cpu()
    h = h0.shape[1]
    if cell == "gru":
        da = torch.cat([da[..., : 2 * h], dan.double().cpu()], -1)
    y, h0 = y.double().cpu(), h0.double().cpu()[None]
    before = torch.cat([y[1:], h0]) if reverse else torch.cat([h0, y[:-1]])
    return torch.einsum("tbg,tbh->gh", da, before)


def rnn_scan(
    cell, t, b, h, dtype, device, *, plan, reverse=False, batch_major=False, bias=True,
    dy=True, dh_n=True, dc_n=True, strided_dy=False, seed=0, repeat=False,
):  # fmt: skip
    rand, xg, h0, c0, w, bh = _rnn_inputs(cell, t, b, h, dtype, device, seed, bias=bias, batch_major=batch_major)
    lstm = cell == "lstm"
    grad_y = rand(t, b, 2 * h)[..., h:] if strided_dy else rand(t, b, h)
    grad_y = _sequence(grad_y, batch_major) if dy else None
    grad_h = rand(b, h) if dh_n or not dy else None
    grad_c = rand(b, h) if lstm and dc_n else None

    def expected(to):
        leaves = [_cast(v, to) for v in (xg, h0, c0, w, bh)]
        y, h_n, c_n, _ = reference.rnn_scan(cell, *leaves, reverse)
        pairs = [(o, g.cpu().to(to)) for o, g in ((y, grad_y), (h_n, grad_h), (c_n, grad_c)) if g is not None]
        wanted = [v for v in leaves if v is not None]
        outputs, grads = zip(*pairs, strict=True)
        got = iter(torch.autograd.grad(outputs, wanted, grads, materialize_grads=True))
        return (y, h_n, c_n), [None if v is None else next(got) for v in leaves]

    truth, truth_grads = expected(torch.float64)
    torch_out, torch_grads = expected(dtype)

    def run():
        out = rnn.rnn_scan_fwd(cell, xg, h0, c0, w, bh, reverse, True, plan)
        y, _, _, gates, cells = out
        back = rnn.rnn_scan_bwd(cell, grad_y, grad_h, grad_c, y, gates, cells, h0, c0, w, reverse, plan)
        return *out, *back

    y, h_n, c_n, gates, cells, dxg, dan, dh0, dc0, db = results = run()
    if repeat:
        _identical(results, run())
    assert (y.stride(1) > y.stride(0)) == (xg.stride(1) > xg.stride(0)), "y has not the layout of xg"
    assert gates.shape == ((t, b, 4 * h) if rnn_plan.GATES[cell] > 1 else (0,)) and gates.dtype == dtype
    assert cells.shape == ((t, b, h) if lstm else (0,)) and cells.dtype == torch.float32
    assert db.dtype == torch.float32
    assert_accurate(y, truth[0], torch_out[0], dims=(0, 1), what="y")
    assert_accurate(h_n, truth[1], torch_out[1], dims=(0,), what="h_n")
    assert_accurate(dxg, truth_grads[0], torch_grads[0], dims=(0, 1), what="dxg")
    assert_accurate(dh0, truth_grads[1], torch_grads[1], dims=(0,), what="dh0")
    if lstm:
        assert_accurate(c_n, truth[2], torch_out[2], dims=(0,), what="c_n")
        assert_accurate(dc0, truth_grads[2], torch_grads[2], dims=(0,), what="dc0")
    else:
        assert c_n.numel() == dc0.numel() == 0
    assert dan.numel() == (t * b * h if cell == "gru" else 0)
    dw = _dw_hh(cell, dxg, dan, y, h0, reverse)
    assert_accurate(dw, truth_grads[3], torch_grads[3], what="dw_hh", dtype=dtype)
    if bias:
        assert_accurate(db, truth_grads[4], torch_grads[4], what="db_hh", dtype=dtype)


def rnn_inference(cell, t, b, h, dtype, device, *, plan):
    """save=False gives the same bits and keeps nothing."""
    _, *inputs = _rnn_inputs(cell, t, b, h, dtype, device, 3)
    kept = rnn.rnn_scan_fwd(cell, *inputs, False, True, plan)
    free = rnn.rnn_scan_fwd(cell, *inputs, False, False, plan)
    assert free[3].numel() == free[4].numel() == 0
    _identical(kept[:3], free[:3])


def rnn_nan(cell, dtype, device, *, plan):
    """A NaN in one sequence stays in it: it reaches that sequence's later steps and no other one."""
    _, xg, h0, c0, w, bh = _rnn_inputs(cell, 4, 3, 18, dtype, device, 5)
    xg[1, 1] = float("nan")
    y = rnn.rnn_scan_fwd(cell, xg, h0, c0, w, bh, False, False, plan)[0].cpu()
    bad = torch.zeros(4, 3, dtype=torch.bool)
    bad[1:, 1] = True
    assert torch.equal(y.isnan().all(-1), bad) and torch.equal(y.isnan().any(-1), bad)
