"""How ops enter torch's autograd."""

import torch


def traced() -> bool:
    """Whether torch.compile, torch.export or a transform of torch.func looks at this call: then the values of tensors
    decide nothing, and nothing is done in place."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def may_write(*tensors) -> bool:
    """Whether what is made of these (None: an absent one) may be written into memory that is there already: nothing is
    traced, and none of them is a batch of torch.autograd.grad(..., is_grads_batched=True)."""
    return not traced() and not any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)


def freed_afterwards() -> bool:
    """In a backward pass: whether what it saved is freed behind it (retain_graph=False), so that it may be overwritten.
    Where torch does not say: no."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is not None and not kept()


def wants_gradient(*tensors) -> bool:
    """Whether autograd records what is done with these tensors (None: an absent one)."""
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


def differentiable_gradients(outputs, grads, inputs):
    """Gradients of `inputs` that can be differentiated again, for create_graph=True: None where none is wanted.

    outputs: what the reference made of `inputs` in this backward pass, with None for absent ones; grads: what arrives
    at each, None for zero.
    """
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    reached, arriving = zip(*pairs, strict=True)
    got = torch.autograd.grad(reached, wanted, arriving, create_graph=True, allow_unused=True)
    found = dict(zip(map(id, wanted), got, strict=True))
    return tuple(None if t is None else found.get(id(t)) for t in inputs)
