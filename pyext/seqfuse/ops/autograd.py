"""How ops enter torch's autograd."""

import torch

from seqfuse.dispatch import forward_mode


def traced() -> bool:
    """Whether torch.compile, torch.export or a transform of torch.func looks at this call: then the values of tensors
    decide nothing, and nothing is done in place."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def may_write(*tensors) -> bool:
    """Whether what is made of these (None: an absent one) may be written into memory that is there already: nothing is
    traced, they have no tangents, and none is a batch of torch.autograd.grad(..., is_grads_batched=True)."""
    if traced() or forward_mode():
        return False
    return not any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)


def told_of_change(*tensors) -> None:
    """Let autograd know that a kernel has changed these: whatever saved one of them must not be used any more."""
    for t in tensors:
        if not (traced() or t.is_inference()):
            torch.autograd.graph.increment_version(t)


def freed_afterwards() -> bool:
    """In a backward pass: whether what it saved is freed behind it (retain_graph=False), so that it may be overwritten.
    Where torch does not say: no."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is not None and not kept()


def autocast_is_on(t: torch.Tensor) -> bool:
    """Whether autocast converts what is done with t. torch raises where a device type knows no autocast."""
    return not t.is_meta and torch.is_autocast_enabled(t.device.type)


def wants_gradient(*tensors) -> bool:
    """Whether autograd records what is done with these tensors (None: an absent one). Inside a transform of torch.func
    it may always: what one level has wrapped does not tell what a level below wants."""
    if not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return any([t is not None for t in tensors])
    return requires_gradient(*tensors)


def requires_gradient(*tensors) -> bool:
    """Whether one of these tensors (None: an absent one) says that it wants a gradient, and it is taken."""
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def apply(function, *args):
    """function.apply(*args) without what it costs to look for keyword arguments.

    Function.apply of a class with setup_context binds its arguments through inspect.signature at every call: 25 us,
    measured, three times as much as the rest of the call. Ours pass every argument by position, so the base class's
    apply does; torch.func's transforms and Dynamo need the full one. Where no gradient is taken Dynamo (torch 2.13)
    hands forward a ctx, which with setup_context it doesn't have: it gets the call itself.
    """
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return function.forward(*args)
    if traced():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def is_differentiated(*saved) -> bool:
    """In a backward pass: whether its result is to be differentiated in its turn (create_graph=True). saved: what it is
    made of. In torch.func's transforms that is usually so, also in the last of them."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return any(t is not None and t.requires_grad for t in saved)


def _saves_by_hooks() -> bool:
    """Whether what autograd saves goes through hooks (save_on_cpu, checkpoint without reentry)."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def differentiable_gradients(make, grads, inputs, needs):
    """Gradients of `inputs` that can be differentiated again: None where none is needed.

    make(*inputs): the outputs by the reference, None for absent ones; grads: what arrives at each, None for zero. Each
    input counts by itself, even if one was made of another or two are the same tensor: what they have to do with each
    other is known to the graph that this is a part of.
    """
    wanted = [i for i, t in enumerate(inputs) if t is not None and needs[i]]

    def reached(*some):
        own = list(inputs)
        for i, t in zip(wanted, some, strict=True):
            own[i] = t
        return tuple(o for o, g in zip(make(*own), grads, strict=True) if o is not None and g is not None)

    some, arriving = [inputs[i] for i in wanted], tuple(g for g in grads if g is not None)
    if traced() or not _saves_by_hooks():
        _, back = torch.func.vjp(reached, *some)
        got = back(arriving)
    else:  # which torch.func refuses
        some = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in some]
        pairs = [(o, g) for o, g in zip(reached(*some), arriving, strict=True) if o.requires_grad]
        got = [None] * len(some)
        if pairs:
            outputs, arriving = zip(*pairs, strict=True)
            got = torch.autograd.grad(outputs, some, arriving, create_graph=True, allow_unused=True)
    found = dict(zip(wanted, got, strict=True))
    return tuple(found.get(i) for i in range(len(inputs)))
