"""Autograd of attention, written once for every backend that is a (fwd, bwd) pair, and the call that leads to it."""

import torch
import torch.nn.functional as F

from seqfuse import dispatch, reference
from seqfuse.ops.attention_rules import describe
from seqfuse.ops.autograd import (
    apply,
    autocast_is_on,
    differentiable_gradients,
    is_differentiated,
    traced,
    wants_gradient,
)
from seqfuse.reference import AttentionOptions

_TENSORS = 8  # of the options, the first: bias ... seed


class AttentionFunction(torch.autograd.Function):
    """(out, lse) of (q, k, v, *AttentionOptions, backend, deterministic). q, k, v and the bias get gradients."""

    generate_vmap_rule = True  # the ops have one: member by member

    @staticmethod
    def forward(q, k, v, *rest):
        *options, name, _ = rest
        return dispatch.get("attention", name).fwd(q, k, v, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, *options, name, deterministic = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *output, *options[:_TENSORS])
        ctx.call = tuple(options[_TENSORS:]), name, deterministic

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        numbers, name, deterministic = ctx.call
        bias, want_dbias = tensors[0], ctx.needs_input_grad[3]
        nothing = (None,) * (_TENSORS - 1 + len(numbers) + 2)
        if is_differentiated(dout, dlse, q, k, v, bias):
            rest = (*tensors[1:], *numbers)
            found = differentiable_gradients(
                lambda q, k, v, bias: reference.attention(q, k, v, AttentionOptions(bias, *rest)),
                (dout, dlse),
                (q, k, v, bias),
                ctx.needs_input_grad,
            )
            return *found, *nothing
        if dout is None:  # only lse was used
            dout = torch.zeros_like(out)
        bwd = dispatch.get("attention", name).bwd
        dq, dk, dv, dbias = bwd(dout, dlse, q, k, v, out, lse, *tensors, *numbers, want_dbias, deterministic)
        return dq, dk, dv, dbias if want_dbias else None, *nothing


class Shortcuts:
    """Calls without options that went to PyTorch's own op or to our CPU kernels: one like them goes there again with a
    look-up in between.

    All that the checks and the choice look at is in the key, so what is found was checked and chosen before.
    """

    def __init__(self):
        self._known = {}

    def key(self, q, k, v, kind, scale, gqa=True):
        """kind: "dense", "causal" or "top-left". None for a call that is looked at closely each time."""
        if traced() or not type(q) is type(k) is type(v) is torch.Tensor or not (scale is None or type(scale) is float):
            return None
        device = q.device
        if torch.is_autocast_enabled("cpu" if q.is_cpu else device.type):
            return None
        grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return (kind, scale, gqa, grad, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, device, k.device,
                v.device, dispatch.epoch(), torch.get_num_threads())  # fmt: skip

    def follow(self, key, q, k, v):
        """The result of a call that is known, else None."""
        found = self._known.get(key)
        if found is None:
            return None
        choice, case, causal, gqa, options = found
        dispatch.tell(choice, case)
        if options is not None:
            if case.grad:
                return apply(AttentionFunction, q, k, v, *options, choice.backend, False)[0]
            return dispatch.get("attention", choice.backend).fwd(q, k, v, *options)[0]
        if gqa or key[1] is not None:
            return F.scaled_dot_product_attention(q, k, v, None, 0.0, causal, scale=key[1], enable_gqa=gqa)
        return F.scaled_dot_product_attention(q, k, v, None, 0.0, causal)

    def remember(self, key, choice, case, options):
        kind = key[0]
        ours = choice.backend == "cpu"  # which is always deterministic
        if not ours and (choice.backend != "torch" or (kind == "causal" and case.Tq != case.Tk)):  # that needs a mask
            return
        if len(self._known) >= 1024:  # ever-changing shapes must not fill the memory
            self._known.clear()
        self._known[key] = choice, case, kind != "dense", case.Hq != case.Hkv, tuple(options) if ours else None


shortcuts = Shortcuts()


def attend(q, k, v, options: AttentionOptions, return_lse: bool, deterministic: bool, key=None):
    """(out [B, Hq, Tq, Dv], lse [B, Hq, Tq] or None) of checked arguments, on the dispatcher's choice of backend.

    key: what `shortcuts` knows the call by, if it has no options.
    """
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    if options.top_left and q.shape[2] == k.shape[2] and options.cu_seqlens_q is None:
        options = options._replace(top_left=False)  # one and the same, and more kernels take it
    drop_all = options.dropout_p == 1.0  # then only the values are gone: lse and NaN are what they were
    if drop_all:
        options = options._replace(dropout_p=0.0, seed=None)
    if options.dropout_p:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=q.device)
        options = options._replace(seed=seed)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        out, lse = reference.attention(q, k, v, options)  # no kernel has anything to do
    else:
        grad = wants_gradient(q, k, v, options.bias)
        case = describe(q, k, v, options, grad, return_lse)
        choice = dispatch.select("attention", case)
        if key is not None:
            shortcuts.remember(key, choice, case, options)
        out, lse = without_autocast(_run, q, k, v, options, grad, choice.backend, deterministic)
    return (out * 0.0 if drop_all else out), lse


def _run(q, k, v, options, grad, name, deterministic):
    backend = dispatch.get("attention", name)
    if backend.bwd is None or not grad:
        return backend.fwd(q, k, v, *options)
    tensors = q, k, v, *options[:_TENSORS]
    if torch.compiler.is_compiling():
        tensors = _distinct(tensors)
    return apply(AttentionFunction, *tensors, *options[_TENSORS:], name, deterministic)


def _distinct(tensors):
    """The tensors, with views of those that stand there twice (k and v, both cu_seqlens): Dynamo takes none twice."""
    seen = []
    for t in tensors:
        seen.append(t.view_as(t) if t is not None and any(t is s for s in seen) else t)
    return seen


def without_autocast(call, q, *args):
    """call(q, *args): its dtypes are settled, and autocast would round what the reference keeps in float32."""
    if not autocast_is_on(q):
        return call(q, *args)
    with torch.autocast(q.device.type, enabled=False):
        return call(q, *args)


def autocast(q, *others):
    """The floating-point tensors in autocast's dtype, as scaled_dot_product_attention has them under autocast."""
    if not autocast_is_on(q):
        return q, *others
    dtype = torch.get_autocast_dtype(q.device.type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, *others))
