"""Layer and RMS normalisation, with dropout and the residual addition before them: y = norm(dropout(x) + residual)."""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling

from seqfuse import dispatch, native, reference
from seqfuse.native import door
from seqfuse.ops import checks, library
from seqfuse.ops.autograd import apply, differentiable_gradients, is_differentiated, traced, wants_gradient


class LayerNormCase(NamedTuple):
    """What the choice of a backend may depend on."""

    device: str
    dtype: torch.dtype
    param_dtype: torch.dtype | None
    rows: int
    cols: int
    residual: bool
    grad: bool
    dropout: bool = False
    rms: bool = False
    zero_centered: bool = False

    def shape_class(self) -> str:
        kind = ("residual" if self.residual else "plain") + (" dropout" if self.dropout else "")
        rows, cols = dispatch.size_class(self.rows), dispatch.size_class(self.cols)
        return f"{str(self.dtype)[6:]} {kind} {rows} rows of {cols}{' grad' if self.grad else ''}"


class NormOptions(NamedTuple):
    """The last arguments of the ops and of the reference. seed: int64 [1], of dropout."""

    seed: torch.Tensor | None = None
    dropout_p: float = 0.0
    rms: bool = False
    zero_centered: bool = False


_PLAIN = NormOptions()


def layer_norm(x, weight=None, bias=None, *, eps=1e-5, residual=None, dropout_p=0.0, zero_centered=False):
    """y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias over the last dimension, with s = dropout(x) + residual.

    x: [..., N], floating point, any strides. residual: like x, or None.
    weight, bias: [N], of x's dtype or float32 (for 16-bit x), or None. eps: added to the variance, not negative.
    dropout_p: probability with which an element of x is zeroed, in [0, 1]; the others are divided by 1 - dropout_p.
        Which ones depends on torch's generator and is the same on every backend (reference.norm_dropout).
    zero_centered: the weight is stored around zero: 1 + weight is what multiplies.
    Returns y [..., N] of x's dtype; with a residual (y, s), where s is what the next block's residual stream carries.

    Statistics are float32 (float64 for float64 input) and the variance is taken around the mean, so it does not cancel.
    Differentiable twice. Raises TypeError or ValueError on bad arguments, before any kernel runs.
    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016 (arXiv:1607.06450); the residual as in pre-norm transformers.
    """
    if not (dropout_p or zero_centered or is_dynamo_compiling()):
        out = door.layer_norm(x, residual, weight, bias, eps, None, None)
        if out is not None:
            return out
    plain = isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)
    if not (
        plain
        and residual is None
        and not dropout_p
        and x.is_floating_point()
        and weight.dtype == bias.dtype == x.dtype
        and weight.shape == bias.shape == x.shape[-1:]
        and weight.device == bias.device == x.device
        and type(eps) is float
        and 0.0 <= eps < math.inf
    ):  # everything but the usual call is looked at more closely
        _check("layer_norm", x, weight, bias, residual, dropout_p, eps)
    if dropout_p or zero_centered:
        return _norm("layer_norm", x, residual, weight, bias, eps, dropout_p, False, zero_centered)
    return _norm("layer_norm", x, residual, weight, bias, eps)


def rms_norm(x, weight=None, *, eps=1e-6, residual=None, dropout_p=0.0, zero_centered=False):
    """y = s / sqrt(mean(s ** 2) + eps) * weight over the last dimension, with s = dropout(x) + residual.

    x: [..., N], floating point, any strides. residual: like x, or None.
    weight: [N], of x's dtype or float32 (for 16-bit x), or None. eps: added to the mean square, not negative.
    dropout_p, zero_centered: as in layer_norm.
    Returns y [..., N] of x's dtype; with a residual (y, s). Statistics are float32 (float64 for float64 input).

    Differentiable twice. Raises TypeError or ValueError on bad arguments, before any kernel runs.
    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467).
    """
    _check("rms_norm", x, weight, None, residual, dropout_p, eps)
    return _norm("rms_norm", x, residual, weight, None, eps, dropout_p, True, zero_centered)


def _norm(op, x, residual, weight, bias, eps, dropout_p=0.0, rms=False, zero_centered=False):
    if residual is x:  # Dynamo takes no tensor twice
        residual = x.view_as(x)
    options = _PLAIN
    if dropout_p or rms or zero_centered:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device) if dropout_p else None
        options = NormOptions(seed, float(dropout_p), rms, bool(zero_centered))
    grad = wants_gradient(x, weight, bias, residual)
    name = dispatch.select(op, _case(x, weight, bias, residual, grad, options)).backend
    y, s = run(name, x, residual, weight, bias, eps, grad, options)
    return y if residual is None else (y, s)


def run(name, x, residual, weight, bias, eps, grad, options=_PLAIN):
    """(y, s or None) of checked arguments on the backend `name`. grad: whether any of them wants one."""
    backend = dispatch.get("rms_norm" if options.rms else "layer_norm", name)
    if backend.bwd is None or not grad:
        return backend.fwd(x, residual, weight, bias, eps, *options)[:2]
    plain = not options.dropout_p and not options.zero_centered
    if (
        plain and name in ("cpu", "cuda") and not traced() and not native.nodes_missing()
    ):  # pyext/autograd/layer_norm.cpp
        return torch.ops.seqfuse.layer_norm.default(x, residual, weight, bias, eps, options.rms)
    return apply(LayerNormFunction, x, residual, weight, bias, eps, name, *options)[:2]


def _case(x, weight, bias, residual, grad, options=_PLAIN):
    cols = x.shape[-1]
    param = weight if weight is not None else bias
    return LayerNormCase(
        x.device.type,
        x.dtype,
        None if param is None else param.dtype,
        x.numel() // cols if cols else 0,
        cols,
        residual is not None,
        grad,
        options.dropout_p > 0.0,
        options.rms,
        options.zero_centered,
    )


def _check(op, x, weight, bias, residual, dropout_p, eps):
    checks.number(op, "dropout_p", dropout_p, 0.0, 1.0)
    checks.number(op, "eps", eps, 0.0)
    checks.tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is None:
            continue
        checks.tensor(op, name, p)
        checks.shape(op, name, p, (x.shape[-1],))
        checks.same_device(op, name, p, "x", x)
        if p.dtype != x.dtype and not (p.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
            raise ValueError(
                f"{op}: {name} must have x's dtype or be float32 with a 16-bit x, got {checks.describe(p)} "
                f"with {checks.describe(x)}"
            )
    if weight is not None and bias is not None:
        checks.same_dtype(op, "bias", bias, "weight", weight)
    if residual is not None:
        checks.tensor(op, "residual", residual)
        checks.shape(op, "residual", residual, x.shape)
        checks.same_device(op, "residual", residual, "x", x)
        checks.same_dtype(op, "residual", residual, "x", x)


class LayerNormFunction(torch.autograd.Function):
    """Autograd of every backend that is a (fwd, bwd) pair. mean and rstd are outputs only so that they can be saved.

    The C++ ops have the same as a node of C++, which costs 30 us less a call: pyext/autograd/layer_norm.cpp.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, residual, weight, bias, eps, name, seed, dropout_p, rms, zero_centered):
        op = "rms_norm" if rms else "layer_norm"
        return dispatch.get(op, name).fwd(x, residual, weight, bias, eps, seed, dropout_p, rms, zero_centered)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, eps, name, *options = inputs
        _, s, mean, rstd = output
        ctx.set_materialize_grads(False)
        seed, *rest = options
        stored = residual is not None or rest[0] > 0.0  # then a second derivative goes by s, back to x
        ctx.mark_non_differentiable(*([] if stored else [s]), mean, rstd)
        ctx.save_for_backward(s if stored else x, weight, bias, mean, rstd, seed)
        ctx.call = residual is not None, eps, name, rest

    @staticmethod
    def backward(ctx, dy, ds, _mean, _rstd):
        s, weight, bias, mean, rstd, seed = ctx.saved_tensors
        has_residual, eps, name, (dropout_p, rms, zero_centered) = ctx.call
        _, want_residual, want_weight, want_bias, *rest = ctx.needs_input_grad
        options = NormOptions(seed, dropout_p, rms, zero_centered)
        if not (has_residual or dropout_p):
            ds = None
        if dy is None:  # only the sum was used
            dx = None if ds is None or not dropout_p else ds * reference.norm_dropout(ds, seed, dropout_p).to(ds.dtype)
            return dx if dropout_p else ds, ds, *(None for _ in range(8))
        if is_differentiated(dy, ds, s, weight, bias):
            dx, dr, dw, db = _differentiable_backward(dy, ds, s, weight, bias, eps, options, ctx.needs_input_grad)
        else:
            bwd = dispatch.get("rms_norm" if rms else "layer_norm", name).bwd
            dx, dr, dw, db = bwd(dy, ds, s, weight, mean, rstd, want_weight, want_bias, want_residual, *options)
            dr = dr if dropout_p else dx
        return (
            dx,
            dr if has_residual and want_residual else None,
            dw if want_weight else None,
            db if want_bias else None,
            *(None for _ in range(6)),
        )


def _differentiable_backward(dy, ds, s, weight, bias, eps, options, needs):
    """The backward pass through the reference, for create_graph=True."""
    plain = options._replace(seed=None, dropout_p=0.0)  # s is behind dropout
    want_x, want_residual, *want_parameters = needs[:4]
    dr, dw, db = differentiable_gradients(
        lambda s, weight, bias: reference.layer_norm(s, None, weight, bias, eps, *plain)[:1],
        [dy],
        (s, weight, bias),
        (want_x or want_residual, *want_parameters),
    )
    if dr is not None and ds is not None:
        dr = dr + ds
    dx = dr
    if dr is not None and options.dropout_p:
        dx = (dr * reference.norm_dropout(dr, options.seed, options.dropout_p)).to(dr.dtype)
    return dx, dr, dw, db


def _torch_norm(x, residual, weight, bias, eps, seed=None, dropout_p=0.0, rms=False, zero_centered=False):
    if dropout_p:
        x = x * reference.norm_dropout(x, seed, dropout_p).to(x.dtype)
    s = x if residual is None else x + residual
    if zero_centered and weight is not None:
        weight = 1.0 + weight
    if weight is None and bias is not None and bias.dtype != x.dtype:
        weight = torch.ones_like(bias)  # PyTorch takes two parameters of another dtype than x's, or none
    if rms:
        y = F.rms_norm(s, s.shape[-1:], weight, eps).to(s.dtype)
    else:
        y = F.layer_norm(s, s.shape[-1:], weight, bias, eps)
    return y, None if residual is None else s


def _fake_fwd(x, residual, weight, bias, eps, seed=None, dropout_p=0.0, rms=False, zero_centered=False):
    rows = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None and not dropout_p else x.new_empty(x.shape),
        rows.new_empty(0) if rms else rows,
        torch.empty_like(rows),
    )


def _fake_bwd(
    dy, dsum, s, weight, mean, rstd, want_dweight, want_dbias, want_dresidual=False, seed=None, dropout_p=0.0,
    rms=False, zero_centered=False,
):  # fmt: skip
    param = s if weight is None else weight
    cols = s.shape[-1]
    dresidual = s.new_empty(s.shape if want_dresidual and dropout_p else (0,))
    dweight = param.new_empty(cols if want_dweight else 0)
    return s.new_empty(s.shape), dresidual, dweight, param.new_empty(cols if want_dbias else 0)


def _rows(*tensors):
    """[..., N] as the Triton kernels read them, [rows, N], one element next to the other."""
    return [None if t is None else checks.rows(t).contiguous() for t in tensors]


def _dense(*parameters):
    return [None if t is None else t.contiguous() for t in parameters]


def _triton_fwd(x, residual, weight, bias, eps, *options):
    launch = library.launcher("layer_norm", "layer_norm_fwd")
    y, s, mean, rstd = launch(*_rows(x, residual), *_dense(weight, bias), eps, *options)
    return y.view(x.shape), s.view(x.shape) if s.dim() == 2 else s, mean, rstd


def _triton_bwd(dy, dsum, s, weight, mean, rstd, *rest):
    launch = library.launcher("layer_norm", "layer_norm_bwd")
    dx, dr, dweight, dbias = launch(*_rows(dy, dsum, s), *_dense(weight), mean, rstd, *rest)
    return dx.view(s.shape), dr.view(s.shape) if dr.dim() == 2 else dr, dweight, dbias


library.register_op(
    "layer_norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor? seed=None, float dropout_p=0.0, "
    "bool rms=False, bool zero_centered=False) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
    _triton_fwd,
)
library.register_op(
    "layer_norm_bwd",
    "(Tensor dy, Tensor? dsum, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, bool want_dweight, bool want_dbias, "
    "bool want_dresidual=False, Tensor? seed=None, float dropout_p=0.0, bool rms=False, bool zero_centered=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
    _triton_bwd,
)


# Elements from which our kernel was measured faster on a CPU than PyTorch's op, by (float32?, residual?, how autograd
# is entered). Below, reaching it costs more than it saves (two threads, AVX2: docs/layer_norm.md).
_WORTH_IT = {
    (True, False, "no gradients"): 98_304,
    (True, False, "node"): 98_304,
    (True, False, "python"): 262_144,
    (True, True, "no gradients"): 16_384,
    (True, True, "node"): 0,
    (True, True, "python"): 98_304,
    (False, False, "no gradients"): 49_152,
    (False, False, "node"): 24_576,
    (False, False, "python"): 65_536,
    (False, True, "no gradients"): 16_384,
    (False, True, "node"): 0,
    (False, True, "python"): 32_768,
}


def _cpu_prefers(case: LayerNormCase) -> str | None:
    if case.rms or case.dropout or case.zero_centered:
        return None  # PyTorch makes several passes
    autograd = "no gradients" if not case.grad else "python" if native.nodes_missing() else "node"
    if case.rows * case.cols >= _WORTH_IT[case.dtype == torch.float32, case.residual, autograd]:
        return None
    return "at this size PyTorch's own call costs less than ours does to reach its kernel"


BACKENDS = (
    dispatch.Backend(
        "cpu", *library.pair("layer_norm"), lambda c: library.cpu_refusal(c.device, c.dtype), _cpu_prefers
    ),
    dispatch.Backend(
        "triton",
        *library.pair("layer_norm", "seqfuse_triton"),
        lambda c: library.triton_refusal(c.device, c.dtype),
        library.interpreter_is_for_tests,
        note=library.NOT_RUN_ON_GPU,
    ),
    dispatch.Backend(
        "cuda",
        *library.pair("layer_norm"),
        lambda c: library.cuda_refusal(c.device, c.dtype),
        lambda c: library.NOT_RUN_ON_GPU,
        note=library.NOT_RUN_ON_GPU,
    ),
    dispatch.Backend("torch", _torch_norm, None, note="PyTorch's own op"),
    dispatch.Backend("reference", reference.layer_norm, None),
)
dispatch.register("rms_norm", *BACKENDS)
dispatch.register("layer_norm", *BACKENDS, least=lambda: tuple(
    _WORTH_IT[case] for case in itertools.product((True, False), (False, True), ("no gradients", "node"))
))  # fmt: skip
