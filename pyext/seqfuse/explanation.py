"""explain(): which backend each module of a model ran on, or would run on, and why."""

import weakref
from typing import NamedTuple

import torch

from seqfuse import dispatch
from seqfuse.native import door

_last: "weakref.WeakKeyDictionary[torch.nn.Module, dispatch.Choice]" = weakref.WeakKeyDictionary()
_current: weakref.ref | None = None
_REASON = "_why_torch"  # in a module's __dict__: why its last call went to PyTorch without asking the dispatcher


def entering(module: torch.nn.Module) -> None:
    """A fused module tells that the op it calls next is its own."""
    global _current
    if not torch.compiler.is_compiling():
        _current = weakref.ref(module)
        door.awaited(True)  # the op takes the long way, on which its choice is told


def handed_over(module: torch.nn.Module, reason: str) -> None:
    """A fused module tells that it calls PyTorch's own op without asking the dispatcher."""
    if not torch.compiler.is_compiling():
        module.__dict__[_REASON] = reason  # made into a Choice when somebody asks: this is on the shortest path


def forget(module: torch.nn.Module) -> None:
    """Leave no trace in a module."""
    module.__dict__.pop(_REASON, None)
    module.__dict__.pop("_route", None)  # what nn.LayerNorm and the cells remember of their last call


def last_choice(module: torch.nn.Module) -> dispatch.Choice | None:
    """What the dispatcher decided for the module's last call."""
    return _last.get(module)


def _calls(module: torch.nn.Module, op: str) -> bool:
    """Whether the module may have called this op: one whose call failed before it chose may still be waiting."""
    return getattr(module, "called_op", op) == op


def note(choice: dispatch.Choice, case) -> None:
    """The dispatcher's listener: remember the choice for the module that is running."""
    global _current
    module = _current() if _current is not None else None
    if module is not None and _calls(module, choice.op):
        module.__dict__.pop(_REASON, None)
        _last[module] = choice
    _current = None
    door.awaited(False)


def told(choice: dispatch.Choice) -> None:
    """A call went through the door as the dispatcher would have chosen: a module that waits for it hears so."""
    if _current is not None:
        note(choice, None)


class Row(NamedTuple):
    """One line of the table."""

    module: str
    op: str
    backend: str
    reason: str
    refused: tuple[tuple[str, str], ...]


class Explanation(list):
    """Rows of (module, op, backend, reason, refused). Printing it gives a table."""

    def __str__(self) -> str:
        if not self:
            return "no fused module: seqfuse.fuse(model) replaces those that it has kernels for"
        head = Row("module", "op", "backend", "reason", ())
        widths = [max(len(row[i]) for row in [head, *self]) for i in range(3)]
        lines = []
        for row in [head, *self]:
            lines.append("  ".join(row[i].ljust(widths[i]) for i in range(3)) + "  " + row.reason)
            for name, why in row.refused:
                lines.append(" " * (sum(widths) + 6) + f"not {name}: {why}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(model: torch.nn.Module, *inputs, **kwargs) -> Explanation:
    """Which backend each fused module of `model` runs on, and why.

    With inputs the model is called once with them (without gradients, in its present mode) and what happened is shown.
    Without inputs: each module's last call, or, for a module that was never called, what would be chosen at a usual
    size. Print the result for a table.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"explain: model must be a torch.nn.Module, got {type(model).__name__}")
    if inputs or kwargs:
        with torch.no_grad():
            for module in model.modules():
                _last.pop(module, None)
                forget(module)
            model(*inputs, **kwargs)
    rows = Explanation()
    for path, module in model.named_modules():
        if not type(module).__module__.startswith("seqfuse.nn") and module not in _last:
            continue
        if _REASON in module.__dict__:
            choice = dispatch.Choice(_op_of(module), "torch", module.__dict__[_REASON])
        else:
            choice = _last.get(module) or _would_choose(module)
        if choice is not None:
            rows.append(Row(path or "(model)", choice.op, choice.backend, choice.reason, choice.refused))
    return rows


def _op_of(module: torch.nn.Module) -> str:
    case = getattr(module, "typical_case", lambda: None)()
    return case[0] if case is not None else type(module).__name__.lower()


def _would_choose(module: torch.nn.Module) -> dispatch.Choice | None:
    """A choice for a call that has not happened: on the module's dtype and device, at a usual size."""
    case = getattr(module, "typical_case", lambda: None)()
    if case is None:
        return None
    op, case = case
    try:
        choice = dispatch.select(op, case)
    except RuntimeError as refused:  # by a backend that was asked for by name
        return dispatch.Choice(op, "none", str(refused))
    return choice._replace(reason=f"{choice.reason} (not called yet: at a usual size)")


dispatch.add_listener(note)
