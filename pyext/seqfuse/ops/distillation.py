"""kl_loss: distillation of a teacher's distribution over the vocabulary; the whole logits of neither are in memory."""

import torch

from seqfuse import dispatch, reference
from seqfuse.ops import checks, library, loss_blocks
from seqfuse.ops.autograd import apply, differentiable_gradients, is_differentiated, may_write, traced, wants_gradient
from seqfuse.ops.cross_entropy import LossCase, autocast


def kl_loss(x, weight, teacher_x, teacher_weight, *, mask=None, temperature=1.0, reduction="mean"):
    """temperature^2 * KL(p || q), p = softmax(teacher logits / temperature), q = softmax(student logits / temperature).

    x: [..., D] and weight: [V, D]: the student's hidden states and vocabulary matrix, which get gradients. teacher_x:
    [..., E] and teacher_weight: [V, E], of the same dtype; they get none. mask: bool [...], tokens that count (all).
    Returns a scalar, float32 for 16-bit x: "mean" divides by the tokens that count. Differentiable twice
    (create_graph=True takes the whole logits). Raises TypeError or ValueError on bad arguments.
    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531).
    """
    for name, t, dims in (("x", x, None), ("weight", weight, (2,)), ("teacher_x", teacher_x, None),
                          ("teacher_weight", teacher_weight, (2,))):  # fmt: skip
        checks.tensor("kl_loss", name, t, dims)
    x, weight, teacher_x, teacher_weight = autocast(x, weight, teacher_x, teacher_weight)
    for name, t in (("weight", weight), ("teacher_x", teacher_x), ("teacher_weight", teacher_weight)):
        checks.same_device("kl_loss", name, t, "x", x)
        checks.same_dtype("kl_loss", name, t, "x", x)
    checks.shape("kl_loss", "x", x, (*x.shape[:-1], weight.shape[1]))
    checks.shape("kl_loss", "teacher_x", teacher_x, (*x.shape[:-1], teacher_weight.shape[1]))
    checks.shape("kl_loss", "teacher_weight", teacher_weight, (weight.shape[0], teacher_weight.shape[1]))
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"kl_loss: mask must be a bool tensor, got {checks.describe(mask)}")
        checks.shape("kl_loss", "mask", mask, x.shape[:-1])
        checks.same_device("kl_loss", "mask", mask, "x", x)
        mask = mask.reshape(-1).contiguous()
    if reduction not in ("mean", "sum"):
        raise ValueError(f"kl_loss: reduction must be mean or sum, got {reduction!r}")
    checks.number("kl_loss", "temperature", temperature)
    if not temperature > 0.0:
        raise ValueError(f"kl_loss: temperature must be positive, got {temperature!r}")
    rows, teacher_rows = checks.rows(x), checks.rows(teacher_x.detach())
    grad = wants_gradient(x, weight)
    case = LossCase(x.device.type, x.dtype, rows.shape[0], *weight.shape, grad)
    name = dispatch.select("kl_loss", case).backend
    scale = torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if reduction == "mean":
        scale = scale / rows.shape[0] if mask is None else scale / mask.sum()
    tensors = rows, weight, teacher_rows, teacher_weight.detach(), mask
    if name == "reference":
        return reference.kl(*tensors, float(temperature)).sum() * scale
    args = (*tensors, scale, float(temperature), name, tuple(wants_gradient(t) for t in (x, weight)))
    return apply(KlFunction, *args)[0] if grad else KlFunction.forward(*args)[0]


class KlFunction(torch.autograd.Function):
    """Gradients are made in the forward pass, while the logits are there; see LossFunction of cross_entropy, also why
    not in float16."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, teacher_x, teacher_weight, mask, scale, temperature, name, wanted):
        own = scale.reshape(1) if any(wanted) and x.dtype != torch.float16 else None
        losses, dx, dweight = _kernel(x, weight, teacher_x, teacher_weight, mask, own, temperature, wanted, name)
        return losses.sum() * scale, dx, dweight

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, temperature, name, wanted = inputs
        _, *grads = output
        ctx.mark_non_differentiable(*grads)
        ctx.set_materialize_grads(False)
        made = tensors[0].dtype != torch.float16
        ctx.call = temperature, name, wanted, made and traced()
        ctx.save_for_backward(*tensors, *(grads if made and traced() else ()))
        ctx.grads = grads if made and not traced() else None

    @staticmethod
    def backward(ctx, dloss, *_):
        *inputs, scale = ctx.saved_tensors[:6]
        temperature, name, wanted, was_saved = ctx.call
        needs = ctx.needs_input_grad[:2]
        if dloss is None:
            return (None,) * 9
        if is_differentiated(dloss, *inputs[:2]):
            fixed = inputs[2:]

            def loss(x, weight):
                return [reference.kl(x, weight, *fixed, temperature).sum() * scale]

            grads = differentiable_gradients(loss, [dloss], inputs[:2], needs)
        elif was_saved:
            grads = [g * dloss.to(g.dtype) for g in ctx.saved_tensors[6:]]
        elif ctx.grads is not None and may_write(dloss):
            grads, ctx.grads = ctx.grads, None
            grads = [g.mul_(dloss) for g in grads]
        elif ctx.grads is not None:
            grads = [g * dloss.to(g.dtype) for g in ctx.grads]
        else:  # float16, or a second backward pass
            upstream = (dloss * scale).to(torch.float32).reshape(1)
            grads = _kernel(*inputs, upstream, temperature, wanted, name)[1:]
        return *(g if n else None for g, n in zip(grads, needs, strict=True)), *(None,) * 7


def _fake(x, weight, teacher_x, teacher_weight, mask, scale, temperature, wanted, backend):
    grads = (x.new_empty(0 if scale is None or not w else t.shape) for t, w in zip((x, weight), wanted, strict=True))
    return x.new_empty(x.shape[0], dtype=torch.float32), *grads


library.register_composed(
    "kl",
    "(Tensor x, Tensor weight, Tensor teacher_x, Tensor teacher_weight, Tensor? mask, Tensor? scale, "
    "float temperature, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor)",
    _fake,
    loss_blocks.kl,
)


def _kernel(*args):
    return torch.ops.seqfuse_composed.kl.default(*args)


dispatch.register(
    "kl_loss",
    dispatch.Backend("cpu", _kernel, _kernel, lambda c: library.cpu_refusal(c.device, c.dtype)),
    dispatch.Backend("triton", _kernel, _kernel, lambda c: library.triton_refusal(c.device, c.dtype),
                     library.interpreter_is_for_tests, note=library.NOT_RUN_ON_GPU),
    dispatch.Backend("reference", reference.kl, None),
)  # fmt: skip
