"""Calls so small that what they cost is the way to the kernel: `auto` gives them to PyTorch, and they need not ask."""

import torch

from seqfuse import dispatch, explanation
from seqfuse.ops.autograd import traced

_OURS = (torch.float32, torch.bfloat16)  # of other dtypes the dispatcher has something to say


def is_certain(elements: int, worth_it: int, first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether the dispatcher would choose PyTorch by the built-in rule that a kernel pays from `worth_it` elements on,
    and nobody has to hear of it: two CPU tensors of one dtype, `auto`, no tuned table, no module to explain."""
    return (
        not traced()
        and elements < worth_it
        and first.dtype in _OURS
        and second.dtype is first.dtype
        and first.is_cpu
        and second.is_cpu
        and explanation.nobody_is_running()
        and dispatch.may_shortcut()
    )
