"""rms_norm, and what both norms have besides: dropout and a zero-centred weight, against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import seqfuse
from seqfuse import dispatch, reference
from seqfuse.testing import assert_accurate

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 7), (3, 16), (5, 33), (7, 100), (64, 768), (9, 513), (3, 5000)]
EPS = 1e-6


def run(call, tensors, grads, dtype=None):
    """Outputs and gradients of call(x, residual, weight, bias) -> (y, s or None), computed in `dtype`."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = [o for o in call(*leaves) if o is not None]
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=False)])
    return [*outputs, *(t.grad for t in leaves if t is not None)]


def check(rows, cols, dtype, *, rms=True, residual=False, weight=True, p=0.0, zero_centered=False, wide_weight=False,
          backend="cpu"):  # fmt: skip
    # a normalised row of one element is 1 or -1 but for eps: with a small one its true gradient is next to zero, and
    # what float32 computes for it is the rounding error of what cancels
    eps = 0.5 if cols < 3 else EPS
    param = torch.float32 if wide_weight else dtype
    x = (torch.randn(rows, cols) * 2 + 0.5).to(dtype)
    r = torch.randn(rows, cols).to(dtype) if residual else None
    w = torch.randn(cols).to(param) if weight else None
    b = torch.randn(cols).to(param) if weight and not rms else None
    grads = [torch.randn(rows, cols).to(dtype) for _ in range(2)]
    generator = torch.get_rng_state()
    seed = torch.randint(-(2**63), 2**63 - 1, (1,)) if p else None

    def ours(x, r, w, b):
        torch.set_rng_state(generator)  # the op draws the seed that stands above
        options = dict(eps=eps, residual=r, dropout_p=p, zero_centered=zero_centered)
        norm = seqfuse.ops.rms_norm if rms else seqfuse.ops.layer_norm
        out = norm(x, *((w,) if rms else (w, b)), **options)
        return out if residual else (out, None)

    def truth(*tensors):
        y, s = reference.layer_norm(*tensors, eps, seed, p, rms, zero_centered)
        return y, s if residual else None

    def pytorch(*tensors):
        args = [None if t is None else t.to(dtype) for t in tensors]
        y, s = dispatch.get("rms_norm", "torch").fwd(*args, eps, seed, p, rms, zero_centered)
        return y, s if residual else None

    with seqfuse.backend(backend):
        got = run(ours, (x, r, w, b), grads)
    exact, theirs = run(truth, (x, r, w, b), grads, torch.float64), run(pytorch, (x, r, w, b), grads)
    names = ["y", "s" if residual else None, "dx", "dresidual" if residual else None, "dweight", "dbias"]
    for name, a, e, t in zip(filter(None, names), got, exact, theirs, strict=False):
        assert_accurate(a, e, t, dims=(0,) if a.dim() == 2 else (), what=name, dtype=dtype)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_rms_norm_keeps_the_error_rule(isa, shape, dtype, residual):
    check(*shape, dtype, residual=residual)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("cols", [3, 70, 257])
def test_dropout_and_zero_centred_weight(isa, cols, dtype, residual, rms):
    check(13, cols, dtype, rms=rms, residual=residual, p=0.3, zero_centered=True)


@settings(max_examples=40)
@given(rows=st.integers(1, 40), cols=st.integers(3, 300), dtype=st.sampled_from(DTYPES), rms=st.booleans(),
       residual=st.booleans(), weight=st.booleans(), p=st.sampled_from([0.0, 0.1, 0.5]), zero_centered=st.booleans(),
       wide_weight=st.booleans(), backend=st.sampled_from(["cpu", "torch", "reference"]),
       seed=st.integers(0, 1000))  # fmt: skip
def test_random_configurations(seed, rows, cols, dtype, **options):
    torch.manual_seed(seed)
    if options["backend"] != "cpu":  # PyTorch's own op judges mixed dtypes by other rules
        options["wide_weight"] = False
    if options["p"]:
        cols += 32  # of fewer a row may keep a single element: normalised it is constant, and has no gradient
    check(rows, cols, dtype, **options)


def test_dropout_obeys_manual_seed_and_has_its_rate():
    x = torch.ones(200, 500)

    def call():
        torch.manual_seed(5)
        return seqfuse.ops.rms_norm(x, residual=torch.zeros(200, 500), dropout_p=0.25)[1]

    s = call()
    assert torch.equal(s, call()) and set(s.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((s == 0).float().mean() - 0.25) < 0.01


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_double_backward(p):
    def second(call, dtype):
        torch.manual_seed(1)
        x, r, w = (torch.randn(4, 12), torch.randn(4, 12), torch.randn(12))
        leaves = [t.to(dtype).requires_grad_() for t in (x, r, w)]
        y, s = call(*leaves)
        first = torch.autograd.grad((y**2).sum() + (s**3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), leaves)

    seed = torch.tensor([7])
    with pytest.MonkeyPatch.context() as patch, seqfuse.backend("cpu"):
        patch.setattr(torch, "randint", lambda *_, **__: seed)
        got = second(lambda x, r, w: seqfuse.ops.rms_norm(x, w, residual=r, dropout_p=p), torch.float32)
    wide, same = (second(lambda x, r, w: reference.layer_norm(x, r, w, None, EPS, seed, p, True), t)
                  for t in (torch.float64, torch.float32))  # fmt: skip
    for a, e, t in zip(got, wide, same, strict=True):
        assert_accurate(a, e, t)


def test_non_contiguous_and_empty():
    x, w = torch.randn(5, 3, 66)[..., ::2].transpose(0, 1), torch.randn(33)
    with seqfuse.backend("cpu"):
        y = seqfuse.ops.rms_norm(x, w)
        assert seqfuse.ops.rms_norm(torch.randn(0, 33), w).shape == (0, 33)
    exact = reference.layer_norm(x.double(), None, w.double(), None, EPS, rms=True)[0]
    assert_accurate(y, exact, F.rms_norm(x, (33,), w, EPS))


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck_and_compile(p):
    x, r, w, seed = torch.randn(6, 24), torch.randn(6, 24), torch.randn(24), torch.tensor([3])
    options = (seed, p, True, True)
    fwd, bwd = torch.ops.seqfuse.layer_norm_fwd.default, torch.ops.seqfuse.layer_norm_bwd.default
    torch.library.opcheck(fwd, (x, r, w, None, EPS, *options))
    _, s, mean, rstd = fwd(x, r, w, None, EPS, *options)
    torch.library.opcheck(bwd, (x, r, s, w, mean, rstd, True, False, True, *options))
    compiled = torch.compile(lambda *t: seqfuse.ops.rms_norm(t[0], t[2], residual=t[1], dropout_p=p), fullgraph=True)
    leaves = [t.clone().requires_grad_() for t in (x, r, w)]
    y, s = compiled(*leaves)
    (y.sum() + s.sum()).backward()
    assert all(t.grad.isfinite().all() for t in leaves)
    if not p:
        assert_accurate(y, reference.layer_norm(x.double(), r.double(), w.double(), None, EPS, rms=True)[0])


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_bad_dropout(p):
    with pytest.raises(ValueError, match="dropout_p must be between 0 and 1"):
        seqfuse.ops.rms_norm(torch.randn(2, 4), dropout_p=p)


@pytest.mark.parametrize("shape", [(8,), (2, 4)])
@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_module_is_torchs_and_fuse_finds_it(dtype, eps, shape):
    theirs = torch.nn.RMSNorm(shape, eps=eps, dtype=dtype)
    with torch.no_grad():
        theirs.weight.add_(torch.randn_like(theirs.weight))
    ours = seqfuse.nn.RMSNorm(shape, eps=eps, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x, r = (1e-3 * torch.randn(6, *shape)).to(dtype), torch.randn(6, *shape).to(dtype)
    with seqfuse.backend("cpu"):
        y, (z, s) = ours(x), ours(x, r)
    expected, wide = theirs(x), theirs.double()
    wide.eps = eps or torch.finfo(torch.float32).eps  # torch's default depends on the dtype
    assert_accurate(y, wide(x.double()), expected)
    assert torch.equal(s, x + r)
    assert_accurate(z, wide(s.double()))
    model = torch.nn.Sequential(torch.nn.RMSNorm(shape, dtype=dtype))
    weight = model[0].weight
    assert type(seqfuse.fuse(model)[0]) is seqfuse.nn.RMSNorm and model[0].weight is weight
    assert seqfuse.explain(model)[0].op == "rms_norm"
    assert type(seqfuse.unfuse(model)[0]) is torch.nn.RMSNorm
