"""Layer normalisation, alone or with the residual addition before it: y = LN(x + residual)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from seqfuse import dispatch, native, reference
from seqfuse.ops import checks, library
from seqfuse.ops.autograd import apply, differentiable_gradients, traced, wants_gradient


class LayerNormCase(NamedTuple):
    """What the choice of a backend may depend on."""

    device: str
    dtype: torch.dtype
    param_dtype: torch.dtype | None
    rows: int
    cols: int
    residual: bool
    grad: bool

    def shape_class(self) -> str:
        kind = "residual" if self.residual else "plain"
        rows, cols = max(self.rows, 1).bit_length(), max(self.cols, 1).bit_length()
        return f"{str(self.dtype)[6:]} {kind} 2^{rows} rows of 2^{cols}{' grad' if self.grad else ''}"


def layer_norm(x, weight=None, bias=None, *, eps=1e-5, residual=None):
    """y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias over the last dimension, with s = x + residual.

    x: [..., N], floating point, any strides. residual: like x, or None.
    weight, bias: [N], of x's dtype or float32 (for 16-bit x), or None. eps: added to the variance, > 0.
    Returns y [..., N] of x's dtype; with a residual (y, s), where s is what the next block's residual stream carries.

    Statistics are float32 (float64 for float64 input) and the variance is taken around the mean, so it does not cancel.
    Differentiable twice. Raises TypeError or ValueError on bad arguments, before any kernel runs.
    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016 (arXiv:1607.06450); the residual as in pre-norm transformers.
    """
    plain = isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)
    if not (
        plain
        and residual is None
        and x.is_floating_point()
        and weight.dtype == bias.dtype == x.dtype
        and weight.shape == bias.shape == x.shape[-1:]
        and weight.device == bias.device == x.device
    ):  # everything but the usual call is looked at more closely
        _check(x, weight, bias, residual)
    if residual is x:  # Dynamo takes no tensor twice
        residual = x.view_as(x)
    grad = wants_gradient(x, weight, bias, residual)
    name = dispatch.select("layer_norm", _case(x, weight, bias, residual, grad)).backend
    y, s = run(name, x, residual, weight, bias, eps, grad)
    return y if residual is None else (y, s)


def run(name, x, residual, weight, bias, eps, grad):
    """(y, x + residual or None) of checked arguments on the backend `name`. grad: whether any of them wants one."""
    backend = dispatch.get("layer_norm", name)
    if backend.bwd is None or not grad:
        return backend.fwd(x, residual, weight, bias, eps)[:2]
    if name in ("cpu", "cuda") and not traced() and not native.nodes_missing():
        return torch.ops.seqfuse.layer_norm.default(x, residual, weight, bias, eps)  # pyext/autograd/layer_norm.cpp
    return apply(LayerNormFunction, x, residual, weight, bias, eps, name)[:2]


def _case(x, weight, bias, residual, grad):
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
    )


def _check(x, weight, bias, residual):
    checks.tensor("layer_norm", "x", x)
    if x.dim() == 0:
        raise ValueError("layer_norm: x must have at least one dimension, got a scalar")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is None:
            continue
        checks.tensor("layer_norm", name, p)
        checks.shape("layer_norm", name, p, (x.shape[-1],))
        checks.same_device("layer_norm", name, p, "x", x)
        if p.dtype != x.dtype and not (p.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
            raise ValueError(
                f"layer_norm: {name} must have x's dtype or be float32 with a 16-bit x, got {checks.describe(p)} "
                f"with {checks.describe(x)}"
            )
    if weight is not None and bias is not None:
        checks.same_dtype("layer_norm", "bias", bias, "weight", weight)
    if residual is not None:
        checks.tensor("layer_norm", "residual", residual)
        checks.shape("layer_norm", "residual", residual, x.shape)
        checks.same_device("layer_norm", "residual", residual, "x", x)
        checks.same_dtype("layer_norm", "residual", residual, "x", x)


class LayerNormFunction(torch.autograd.Function):
    """Autograd of every backend that is a (fwd, bwd) pair. mean and rstd are outputs only so that they can be saved.

    The C++ ops have the same as a node of C++, which costs 30 us less a call: pyext/autograd/layer_norm.cpp.
    """

    @staticmethod
    def forward(x, residual, weight, bias, eps, name):
        return dispatch.get("layer_norm", name).fwd(x, residual, weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, eps, name = inputs
        _, s, mean, rstd = output
        ctx.set_materialize_grads(False)
        if residual is None:
            ctx.mark_non_differentiable(s, mean, rstd)
            ctx.save_for_backward(x, weight, bias, mean, rstd)
        else:
            ctx.mark_non_differentiable(mean, rstd)
            ctx.save_for_backward(s, weight, bias, mean, rstd)
        ctx.call = residual is not None, eps, name

    @staticmethod
    def backward(ctx, dy, ds, _mean, _rstd):
        s, weight, bias, mean, rstd = ctx.saved_tensors
        has_residual, eps, name = ctx.call
        _, _, want_weight, want_bias, _, _ = ctx.needs_input_grad
        if not has_residual:
            ds = None
        if dy is None:  # only the sum was used
            return ds, ds, None, None, None, None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dx, dw, db = _differentiable_backward(dy, ds, s, weight, bias, eps)
        else:
            dx, dw, db = dispatch.get("layer_norm", name).bwd(dy, ds, s, weight, mean, rstd, want_weight, want_bias)
        return dx, dx if has_residual else None, dw if want_weight else None, db if want_bias else None, None, None


def _differentiable_backward(dy, ds, s, weight, bias, eps):
    """The backward pass through the reference, for create_graph=True."""
    y, _ = reference.layer_norm(s, None, weight, bias, eps)
    dx, dw, db = differentiable_gradients([y], [dy], (s, weight, bias))
    if dx is not None and ds is not None:
        dx = dx + ds
    return dx, dw, db


def _torch_layer_norm(x, residual, weight, bias, eps):
    s = x if residual is None else x + residual
    return F.layer_norm(s, s.shape[-1:], weight, bias, eps), None if residual is None else s


def _fwd(namespace):
    return lambda *args: getattr(torch.ops, namespace).layer_norm_fwd.default(*args)


def _bwd(namespace):
    return lambda *args: getattr(torch.ops, namespace).layer_norm_bwd.default(*args)


def _fake_fwd(x, residual, weight, bias, eps):
    rows = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else x.new_empty(x.shape),
        rows,
        torch.empty_like(rows),
    )


def _fake_bwd(dy, dsum, s, weight, mean, rstd, want_dweight, want_dbias):
    param = s if weight is None else weight
    cols = s.shape[-1]
    dweight = param.new_empty(cols if want_dweight else 0)
    return s.new_empty(s.shape), dweight, param.new_empty(cols if want_dbias else 0)


def _triton_fwd(x, residual, weight, bias, eps):
    rows = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, residual)]
    y, s, mean, rstd = library.launcher("layer_norm", "layer_norm_fwd")(*rows, weight, bias, eps)
    return y.view(x.shape), s if residual is None else s.view(x.shape), mean, rstd


def _triton_bwd(dy, dsum, s, *rest):
    rows = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (dy, dsum, s)]
    dx, dweight, dbias = library.launcher("layer_norm", "layer_norm_bwd")(*rows, *rest)
    return dx.view(s.shape), dweight, dbias


library.register_op(
    "layer_norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
    _triton_fwd,
)
library.register_op(
    "layer_norm_bwd",
    "(Tensor dy, Tensor? dsum, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, bool want_dweight, bool want_dbias)"
    " -> (Tensor, Tensor, Tensor)",
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
    autograd = "no gradients" if not case.grad else "python" if native.nodes_missing() else "node"
    if case.rows * case.cols >= _WORTH_IT[case.dtype == torch.float32, case.residual, autograd]:
        return None
    return "at this size PyTorch's own call costs less than ours does to reach its kernel"


dispatch.register(
    "layer_norm",
    dispatch.Backend(
        "cpu", _fwd("seqfuse"), _bwd("seqfuse"), lambda c: library.cpu_refusal(c.device, c.dtype), _cpu_prefers
    ),
    dispatch.Backend(
        "triton",
        _fwd("seqfuse_triton"),
        _bwd("seqfuse_triton"),
        lambda c: library.triton_refusal(c.device, c.dtype),
        lambda c: "the interpreter is for tests" if c.device == "cpu" else None,
        note=library.NOT_RUN_ON_GPU,
    ),
    dispatch.Backend(
        "cuda",
        _fwd("seqfuse"),
        _bwd("seqfuse"),
        lambda c: library.cuda_refusal(c.device, c.dtype),
        lambda c: library.NOT_RUN_ON_GPU,
        note=library.NOT_RUN_ON_GPU,
    ),
    dispatch.Backend("torch", _torch_layer_norm, None, note="PyTorch's own layer_norm"),
    dispatch.Backend("reference", reference.layer_norm, None),
)
