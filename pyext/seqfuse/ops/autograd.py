"""How ops enter torch's autograd."""

import torch


def apply(function, *args):
    """function.apply(*args) without what it costs to look for keyword arguments.

    Function.apply of a class with setup_context binds its arguments through inspect.signature at every call: 25 us,
    measured, three times as much as the rest of the call. Ours pass every argument by position, so the base class's
    apply does; torch.func's transforms and Dynamo need the full one.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)
