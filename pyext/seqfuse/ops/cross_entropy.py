"""cross_entropy of given logits and linear_cross_entropy of hidden states: checks, autograd, who runs what.

Both are one autograd function: for reductions "mean" and "sum" the gradient is computed in the forward pass, while the
logits are in the caches, and only multiplied by the incoming gradient in the backward pass; for "none" and in float16
it is computed in the backward pass, for which linear_cross_entropy makes the logits once more (docs/losses.md).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling

from seqfuse import dispatch, reference
from seqfuse.native import door
from seqfuse.ops import checks, library, loss_blocks
from seqfuse.ops.autograd import (
    apply,
    autocast_is_on,
    differentiable_gradients,
    is_differentiated,
    may_write,
    traced,
    wants_gradient,
)
from seqfuse.reference import LossOptions

REDUCTIONS = ("mean", "sum", "none")


class LossCase(NamedTuple):
    """What the choice of a backend may depend on. width: of the hidden states, 0 where the logits are given."""

    device: str
    dtype: torch.dtype
    tokens: int
    vocabulary: int
    width: int
    grad: bool

    def shape_class(self) -> str:
        sizes = " x ".join(dispatch.size_class(n) for n in (self.tokens, self.vocabulary, self.width))
        return f"{str(self.dtype)[6:]} {sizes}{' grad' if self.grad else ''}"


def linear_cross_entropy(
    x,
    weight,
    target,
    *,
    bias=None,
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=None,
    z_loss=0.0,
    class_weight=None,
    reduction="mean",
):
    """Cross entropy of the logits x @ weight^T + bias, which are never in memory as a whole.

    x: [..., D], floating point. weight: [V, D] and bias: [V], of x's dtype. target: [...] int64, in [0, V) or
    ignore_index. class_weight: [V] floating point; it gets no gradient.
    Returns a scalar ("mean", "sum") or the losses [...] ("none", 0 where ignored), float32 for 16-bit x. With u =
    softcap * tanh(logits / softcap), lse = logsumexp(u), w = class_weight[target] (1 without), eps = label_smoothing:

        loss = (1 - eps) w (lse - u[target]) + eps / V * sum_j class_weight_j (lse - u_j) + z_loss w lse^2

    "mean" divides the sum by the sum of w over tokens that are not ignored, as torch's cross_entropy does (NaN where
    all are ignored). Differentiable twice; create_graph=True takes the whole logits. Raises TypeError or ValueError on
    bad arguments; a target out of range raises on a CPU and gives NaN on a GPU, where a check would wait for it.
    Sources: label smoothing: Szegedy et al. 2015 (arXiv:1512.00567); softcap: Gemma 2 (arXiv:2408.00118); z-loss: PaLM
    (arXiv:2204.02311).
    """
    op = "linear_cross_entropy"
    usual = bias is class_weight is softcap is None and z_loss == label_smoothing == 0.0 and reduction == "mean"
    if usual and not is_dynamo_compiling():
        loss = door.linear_cross_entropy(x, weight, target, ignore_index)
        if loss is not None:
            return loss
    checks.tensor(op, "x", x)
    checks.tensor(op, "weight", weight, (2,))
    x, weight, bias = autocast(x, weight, bias)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: x must be [..., {weight.shape[1]}] for this weight, got {checks.describe(x)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            checks.tensor(op, name, t)
            checks.same_device(op, name, t, "x", x)
            checks.same_dtype(op, name, t, "x", x)
    if bias is not None:
        checks.shape(op, "bias", bias, weight.shape[:1])
    options = _options(op, ignore_index, label_smoothing, softcap, z_loss)
    _check_targets(op, x, x.shape[:-1], weight.shape[0], target, class_weight, reduction)
    rows = checks.rows(x)
    return _loss(op, rows, weight, bias, target, class_weight, options, reduction)


def cross_entropy(
    logits,
    target,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=None,
    z_loss=0.0,
    class_weight=None,
    reduction="mean",
):
    """Cross entropy of given logits [..., V] (the vocabulary comes last). Everything else as in linear_cross_entropy.

    One pass over the logits gives the loss and, for "mean" and "sum", the gradient.
    """
    op = "cross_entropy"
    checks.tensor(op, "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"{op}: logits must be [..., V], got a scalar")
    options = _options(op, ignore_index, label_smoothing, softcap, z_loss)
    _check_targets(op, logits, logits.shape[:-1], logits.shape[-1], target, class_weight, reduction)
    rows = checks.rows(logits)
    return _loss(op, rows, None, None, target, class_weight, options, reduction)


def _loss(op, x, weight, bias, target, class_weight, options, reduction):
    shape, target = target.shape, target.reshape(-1)
    grad = wants_gradient(x, weight, bias)
    vocabulary, width = (x.shape[1], 0) if weight is None else weight.shape
    case = LossCase(x.device.type, x.dtype, x.shape[0], vocabulary, width, grad)
    backend = dispatch.get(op, dispatch.select(op, case).backend)
    wide = torch.promote_types(x.dtype, torch.float32)
    if class_weight is not None:
        class_weight = class_weight.detach().to(wide).contiguous()
    if backend.name == "torch" and not (options.softcap or options.z_loss):  # its own reduction, a third of the calls
        return _torch_cross_entropy(x, weight, bias, target, class_weight, options, reduction).view(
            shape if reduction == "none" else ()
        )
    scale = reference.loss_scale(target, class_weight, options.ignore_index, reduction, wide)
    if backend.bwd is None:
        losses = backend.fwd(x, weight, bias, target, class_weight, options)
    else:
        wanted = tuple(wants_gradient(t) for t in (x, weight, bias))
        args = (x, weight, bias, target.contiguous(), class_weight, scale, tuple(options), reduction, op, backend.name)
        losses = (apply(LossFunction, *args, wanted) if grad else LossFunction.forward(*args, wanted))[0]
        if reduction != "none":
            return losses
    return losses.view(shape) if reduction == "none" else losses.sum() * scale


def _in_forward(x, reduction):
    """Whether the gradient is made in the forward pass. Not in float16: there it would vanish below 6e-8 before the
    loss scale (torch.amp.GradScaler) reaches it."""
    return reduction != "none" and x.dtype != torch.float16


class LossFunction(torch.autograd.Function):
    """Outputs: (loss, lse [N], dx, dweight, dbias); all but the first only so that they can be kept.

    wanted: whether x, weight and bias get gradients: a frozen vocabulary matrix costs neither a product nor memory.
    Gradients that the forward pass made are handed on by the first backward pass, multiplied in place: nobody else
    holds them. A second one (retain_graph=True) finds them gone and computes them again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, target, class_weight, scale, options, reduction, op, name, wanted):
        fwd = dispatch.get(op, name).fwd
        own_scale = scale.reshape(1) if any(wanted) and _in_forward(x, reduction) else None
        losses, lse, dx, dweight, dbias = fwd(
            x, weight, bias, target, class_weight, own_scale, None, LossOptions(*options), wanted
        )
        return losses if reduction == "none" else losses.sum() * scale, lse, dx, dweight, dbias

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, target, class_weight, scale, options, reduction, op, name, wanted = inputs
        _, lse, *grads = output
        ctx.mark_non_differentiable(lse, *grads)
        ctx.set_materialize_grads(False)
        made = _in_forward(x, reduction)
        ctx.call = options, reduction, op, name, wanted, made and traced()
        ctx.save_for_backward(x, weight, bias, target, class_weight, scale, lse, *(grads if made and traced() else ()))
        ctx.grads = grads if made and not traced() else None

    @staticmethod
    def backward(ctx, dloss, *_):
        x, weight, bias, target, class_weight, scale, lse, *grads = ctx.saved_tensors
        options, reduction, op, name, wanted, was_saved = ctx.call
        nothing, needs = (None,) * 8, ctx.needs_input_grad[:3]
        if dloss is None:
            return None, None, None, *nothing
        options = LossOptions(*options)
        if is_differentiated(dloss, x, weight, bias):

            def loss(x, weight, bias):
                losses = dispatch.get(op, "reference").fwd(x, weight, bias, target, class_weight, options)
                return [losses if reduction == "none" else losses.sum() * scale]

            return *differentiable_gradients(loss, [dloss], (x, weight, bias), needs), *nothing
        if was_saved:
            grads = [g * dloss.to(g.dtype) for g in grads]
        elif ctx.grads is not None and may_write(dloss):
            grads, ctx.grads = ctx.grads, None
            if dloss.device.type != "cpu" or dloss.item() != 1.0:  # of a CPU tensor, item() waits for nothing
                for g in grads:
                    g.mul_(dloss)
        elif ctx.grads is not None:
            grads = [g * dloss.to(g.dtype) for g in ctx.grads]
        else:
            upstream = dloss.reshape(-1) if reduction == "none" else (dloss * scale).reshape(1)
            upstream = upstream.to(torch.float32).contiguous()
            bwd = dispatch.get(op, name).bwd
            grads = bwd(x, weight, bias, target, class_weight, upstream, lse, options, wanted)[2:]
        return *(g if n else None for g, n in zip(grads, needs, strict=True)), *nothing


def autocast(*tensors):
    """The tensors (None: an absent one), in autocast's dtype where it is on."""
    if not autocast_is_on(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def _options(op, ignore_index, label_smoothing, softcap, z_loss):
    checks.number(op, "label_smoothing", label_smoothing, 0.0, 1.0)
    checks.number(op, "z_loss", z_loss, 0.0)
    if softcap is not None:
        checks.number(op, "softcap", softcap)
        if not softcap > 0.0:
            raise ValueError(f"{op}: softcap must be positive or None, got {softcap!r}")
    checks.number(op, "ignore_index", ignore_index)
    if int(ignore_index) != ignore_index:
        raise TypeError(f"{op}: ignore_index must be an integer, got {checks.describe(ignore_index)}")
    return LossOptions(int(ignore_index), float(label_smoothing), float(softcap or 0.0), float(z_loss))


def _check_targets(op, x, shape, vocabulary, target, class_weight, reduction):
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be an int64 tensor of class indices, got {checks.describe(target)}")
    checks.shape(op, "target", target, shape)
    checks.same_device(op, "target", target, "x", x)
    if class_weight is not None:
        checks.tensor(op, "class_weight", class_weight)
        checks.shape(op, "class_weight", class_weight, (vocabulary,))
        checks.same_device(op, "class_weight", class_weight, "x", x)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def _torch_cross_entropy(x, weight, bias, target, class_weight, options, reduction="none"):
    """PyTorch's own ops, made of logits; what they have no argument for is put around them."""
    logits = x if weight is None else F.linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.softcap:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    losses = F.cross_entropy(
        logits,
        target,
        class_weight,
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        reduction=reduction,
    )
    if options.z_loss:
        keep = target != options.ignore_index
        w = 1.0 if class_weight is None else class_weight[target.where(keep, 0)]
        losses = losses + options.z_loss * (w * logits.logsumexp(1).square()).where(keep, 0.0)
    return losses


def _reference(x, weight, bias, target, class_weight, options):
    if weight is None:
        return reference.cross_entropy(x, target, class_weight, options)
    return reference.linear_cross_entropy(x, weight, bias, target, class_weight, options)


def _kernel(name):
    """fwd and bwd of a backend: the same call, with `lse` of an earlier one in the backward pass."""

    def run(x, weight, bias, target, class_weight, scale, lse, options, wanted):
        op = torch.ops.seqfuse_composed.cross_entropy.default
        return op(x, weight, bias, target, class_weight, scale, lse, *options, wanted, name)

    return run


def _fake(
    x, weight, bias, target, class_weight, scale, lse, ignore_index, label_smoothing, softcap, z_loss, wanted, backend
):
    rows = x.new_empty(x.shape[0] if lse is None else 0, dtype=torch.float32)
    grads = (
        x.new_empty(0 if scale is None or t is None or not w else t.shape)
        for t, w in zip((x, weight, bias), wanted, strict=True)
    )
    return rows, torch.empty_like(rows), *grads


library.register_composed(
    "cross_entropy",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor target, Tensor? class_weight, Tensor? scale, Tensor? lse, "
    "int ignore_index, float label_smoothing, float softcap, float z_loss, bool[] wanted, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    loss_blocks.cross_entropy,
)


# Logits from which ours was measured no slower (two threads, AVX2: docs/losses.md); given ones, where they are.
_WORTH_IT, _WORTH_IT_GIVEN = 500_000, 1 << 20


def _cpu_prefers(case: LossCase) -> str | None:
    if case.tokens * case.vocabulary >= (_WORTH_IT if case.width else _WORTH_IT_GIVEN):
        return None
    return "at this size PyTorch's own call costs less than ours does to reach its kernel"


for _op, _least in (("cross_entropy", None), ("linear_cross_entropy", lambda: (_WORTH_IT,))):
    dispatch.register(
        _op,
        dispatch.Backend(
            "cpu", _kernel("cpu"), _kernel("cpu"), lambda c: library.cpu_refusal(c.device, c.dtype), _cpu_prefers
        ),
        dispatch.Backend(
            "triton",
            _kernel("triton"),
            _kernel("triton"),
            lambda c: library.triton_refusal(c.device, c.dtype),
            library.interpreter_is_for_tests,
            note=library.NOT_RUN_ON_GPU,
        ),
        dispatch.Backend("torch", _torch_cross_entropy, None, note="PyTorch's own cross_entropy, of whole logits"),
        dispatch.Backend("reference", _reference, None),
        least=_least,
    )
