"""Who competes in a case: PyTorch's module (the baseline), its named ops, torch.compile, seqfuse on each backend."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import seqfuse
from seqfuse import dispatch
from seqfuse.benchmarks.harness import Contender
from seqfuse.benchmarks.registry import Problem


def _contender(name: str, problem: Problem, call: Callable, module: torch.nn.Module, mode: str, asked: str = ""):
    @contextlib.contextmanager
    def scope():
        with torch.set_grad_enabled(mode != "fwd"), seqfuse.backend(asked) if asked else contextlib.nullcontext():
            yield

    return Contender(name, functools.partial(problem.run, call, list(module.parameters()), mode), scope, asked)


def eager(problem: Problem, mode: str) -> Contender:
    """The baseline of every ratio."""
    return _contender(problem.case.eager_name, problem, problem.eager, problem.eager, mode)


def others(problem: Problem, mode: str) -> list[Contender]:
    found = problem.case.others(problem.eager, problem.ours)
    return [_contender(name, problem, call, module, mode) for name, (call, module) in found.items()]


def compiled(problem: Problem, mode: str) -> Contender:
    """torch.compile of the baseline's module. It compiles at its first call."""
    torch._dynamo.reset()  # or the sizes of earlier cases make it guess that sizes are dynamic
    return _contender("torch.compile", problem, torch.compile(problem.eager, dynamic=False), problem.eager, mode)


def ours(problem: Problem, mode: str, backend: str) -> Contender:
    name = "seqfuse" if backend == "auto" else f"seqfuse {backend}"
    return _contender(name, problem, problem.ours, problem.ours, mode, backend)


def line_up(problem: Problem, mode: str, backends: Sequence[str], compile: bool):
    """What Case.line_up says, for an op that the dispatcher knows."""
    case, known = problem.case, dispatch.ops()[problem.case.op]
    described = describe(problem, mode)
    mine, refused = [], {}
    for name in backends:
        contender = ours(problem, mode, name)
        why_not = None
        if name != "auto":
            why_not = known[name].supports(described) if name in known else f"{case.op} has no such backend"
        if why_not is None:
            mine.append(contender)
        else:
            refused[contender.name] = why_not
    if not mine:
        return [], refused
    out = [eager(problem, mode), *mine, *others(problem, mode)]
    if compile and case.compiled:
        out.append(compiled(problem, mode))
    return out, refused


def call_once(contender: Contender, op: str) -> tuple[list[torch.Tensor], dispatch.Choice | None, Any]:
    """Results of one call, and of the dispatcher's decision about `op` in it: the choice, and the case it described."""
    if contender.check is not None:  # of a whole model, whose parts each have their own choice
        with contender.scope():
            return list(contender.check()), None, None
    decisions = []
    with contender.scope(), dispatch.listening(lambda choice, case: decisions.append((choice, case))):
        results = [t.detach() for t in contender.call(0)]
    return results, *next((d for d in decisions if d[0].op == op), (None, None))


class _Described(Exception):
    pass


def describe(problem: Problem, mode: str) -> Any:
    """The dispatcher's own description of the case: what `supports` and `shape_class` go by. Nothing is computed."""

    def stop(choice, case):
        if choice.op == problem.case.op:
            raise _Described(case)

    contender = ours(problem, mode, "auto")
    try:
        with contender.scope(), dispatch.listening(stop):
            contender.call(0)
    except _Described as found:
        return found.args[0]
    raise RuntimeError(f"{problem.case.id} never asked the dispatcher for {problem.case.op}")
