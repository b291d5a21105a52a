"""Which implementation a call runs on, and why.

An op describes each call by a small tuple, its *case* (device, dtype, sizes). Every backend of the op answers two
questions about a case with None or with a sentence: `supports` (can it run?) and `prefers` (would `auto` want it: was
it measured faster?). `select` asks in the op's order of preference and keeps every refusal, so that `explain()` can
show not only the choice but the reason for it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from seqfuse import tuned
from seqfuse.native import door

PLAIN = "plain PyTorch"  # what plain() forces: no name for users
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda", "torch")


def _never_refuses(case) -> None:
    return None


def _no_path(case) -> str:
    return ""


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    fwd, bwd: a pair with the signature of the op's reference. bwd is None where fwd is made of differentiable torch
    calls, so that torch differentiates it (the reference, and PyTorch's own op).
    supports(case): None, or one sentence that says why this backend can't run the case.
    prefers(case): None, or one sentence that says why `auto` passes it over all the same. Not asked while torch.compile
    traces, where sizes may be symbolic and a choice by size would force a recompilation.
    note: what the user should know of it (a kernel that has not run on real hardware says so here).
    by_name_only: why `auto` never chooses it, not even while torch.compile traces, or "". A tuned table still may: it
    says that the backend has run here and won.
    path(case): which of several ways inside the backend the call takes (a kernel's tier, the library behind PyTorch's
    op), or "". Stands before the reason of the choice. Not asked while torch.compile traces.
    """

    name: str
    fwd: Callable[..., Any]
    bwd: Callable[..., Any] | None
    supports: Callable[[Any], str | None] = _never_refuses
    prefers: Callable[[Any], str | None] = _never_refuses
    note: str = ""
    by_name_only: str = ""
    path: Callable[[Any], str] = _no_path


class Choice(NamedTuple):
    """What `select` decided. refused: (backend, reason) for each backend that was passed over."""

    op: str
    backend: str
    reason: str
    refused: tuple[tuple[str, str], ...] = ()


_ops: dict[str, dict[str, Backend]] = {}
_VARIABLE = "SEQFUSE_BACKEND"
_forced: str = os.environ.get(_VARIABLE) or "auto"
_cache: dict[Any, Choice] = {}
_listeners: list[Callable[[Choice, Any], None]] = []
_least: dict[str, Callable[[], tuple[int, ...]]] = {}
_changes = 0  # how often anything that decisions depend on has changed


def size_class(n: int) -> str:
    """Sizes that a `shape_class` does not tell apart: those with as many binary digits."""
    return f"2^{max(n, 1).bit_length()}"


def register(op: str, *backends: Backend, least: Callable[[], tuple[int, ...]] | None = None) -> None:
    """Make an op known, with its backends in the order in which `auto` asks them.

    least(): of an op with a door (pyext/autograd/door.cpp), the sizes from which `cpu` prefers to run its usual calls.
    """
    _ops[op] = {b.name: b for b in backends}
    if least is not None:
        _least[op] = least


def get(op: str, name: str) -> Backend:
    return _ops[op][name]


def ops() -> dict[str, dict[str, Backend]]:
    return dict(_ops)


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        where = f" in the environment variable {_VARIABLE}" if name == os.environ.get(_VARIABLE) else ""
        raise ValueError(f"unknown backend {name!r}{where}: use one of {', '.join(BACKENDS)}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block on one backend: "auto", "reference", "cpu", "triton", "cuda" or "torch".

    A backend asked for by name that can't run a call raises RuntimeError with the reason; only "auto" may choose.
    Like torch.backends.cudnn.flags this is a setting of the process, not of a thread. The environment variable
    SEQFUSE_BACKEND sets the same for a whole run.
    """
    _check_name(name)
    with _forcing(name):
        yield


def plain():
    """Run every op inside the `with` block as one would without seqfuse: by PyTorch's own op where it has one for the
    call, else by plain PyTorch code."""
    return _forcing(PLAIN)


@contextlib.contextmanager
def _forcing(name: str) -> Iterator[None]:
    global _forced
    before, _forced = _forced, name
    if before != name:
        _changed()
    try:
        yield
    finally:
        if _forced != before:
            _changed()
        _forced = before


def forced_backend() -> str:
    return _forced


def _changed() -> None:
    global _changes
    _changes += 1
    door.shut()


def epoch() -> int:
    """A number that grows whenever a decision taken before may no longer hold, or somebody listens who has to hear of
    it. A module that remembers its last choice compares this, and torch's number of threads."""
    now = _changes + tuned.generation()
    return -1 - now if forward_mode() else now


def may_shortcut() -> bool:
    """Whether a module may go to PyTorch by a built-in rule without asking: `auto`, no tuned table, and nobody listens
    (but explain(), which the module tells itself)."""
    return _forced == "auto" and nobody_else_listens() and not tuned.exists() and not forward_mode()


def nobody_else_listens() -> bool:
    """Whether explain() is the only one that wants to hear of decisions."""
    return len(_listeners) <= 1


def forward_mode() -> bool:
    """Whether tangents travel along with values (torch.func.jvp, torch.autograd.forward_ad): our kernels have none.
    torch keeps that for the process, so while one thread is at it calls of all threads go to the reference."""
    return forward_ad._current_level >= 0


def select(op: str, case: Any) -> Choice:
    """Choose a backend of `op` for `case`. Raises RuntimeError if a backend asked for by name can't run it."""
    if torch.compiler.is_compiling():
        return _decide(op, case, _forced, compiling=True)
    if forward_mode():
        # not PyTorch's own ops: some, like its LSTM and its attention, have no such derivative either
        choice = _decide(op, case, "reference" if _forced == "auto" else _forced, compiling=False)
        if choice.backend not in ("reference", "torch"):
            raise RuntimeError(f"backend {choice.backend!r} has no forward-mode derivative of {op}: use 'auto'")
        tell(choice, case)
        return choice
    # what else a decision depends on; a tuned table that was reloaded has a new generation
    key = (op, case, _forced, torch.get_num_threads(), tuned.generation())
    choice = _cache.get(key)
    if choice is None:
        if len(_cache) > 4096:  # ever-changing shapes must not fill the memory
            _cache.clear()
        choice = _cache[key] = _decide(op, case, _forced, compiling=False)
    tell(choice, case)
    return choice


def tell(choice: Choice, case: Any) -> None:
    """Let the listeners hear of a decision: select does, and whoever remembers one and goes straight there.

    The door is opened here where it may be: it is shut by whatever may change a decision.
    """
    for listener in _listeners:
        listener(choice, case)
    if forward_mode():
        return
    if not door.opened() and may_shortcut():
        door.open({op: least() for op, least in _least.items()})


def _decide(op: str, case: Any, name: str, compiling: bool) -> Choice:
    backends = _ops[op]

    def because(backend, reason):
        path = "" if compiling else backend.path(case)
        return f"{path}: {reason}" if path else reason

    if name == PLAIN:
        name = "torch" if "torch" in backends and backends["torch"].supports(case) is None else "reference"
    if name != "auto":
        _check_name(name)
        if name not in backends:
            raise RuntimeError(f"backend {name!r} has no {op}: it has {', '.join(backends)}")
        why_not = backends[name].supports(case)
        if why_not is not None:
            raise RuntimeError(f"backend {name!r} can't run {op} here: {why_not}")
        return Choice(op, name, because(backends[name], "asked for by name"))
    wanted = None if compiling else tuned.lookup(op, case)
    if wanted in backends and backends[wanted].supports(case) is None:
        return Choice(op, wanted, because(backends[wanted], "measured fastest on this machine (bench --tune)"))
    refused = []
    for candidate in backends.values():
        why_not = candidate.supports(case) or candidate.by_name_only or None
        if why_not is None and not compiling:
            why_not = candidate.prefers(case)
        if why_not is None:
            reason = because(candidate, candidate.note or "the first that fits")
            return Choice(op, candidate.name, reason, tuple(refused))
        refused.append((candidate.name, why_not))
    reasons = "; ".join(f"{n}: {why}" for n, why in refused)
    raise RuntimeError(f"no backend can run {op} here ({reasons})")


def forget() -> None:
    """Drop cached decisions (after the instruction-set limit or a tuned table changed)."""
    _cache.clear()
    _changed()


def add_listener(record: Callable[[Choice, Any], None]) -> None:
    """Call `record(choice, case)` for every decision from now on."""
    _listeners.append(record)
    door.shut()


@contextlib.contextmanager
def listening(record: Callable[[Choice, Any], None]) -> Iterator[None]:
    """Call `record(choice, case)` for every decision inside the `with` block."""
    _listeners.append(record)
    _changed()
    try:
        yield
    finally:
        _listeners.remove(record)
        _changed()
