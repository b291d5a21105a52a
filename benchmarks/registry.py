"""What is measured. A case is a small frozen value; everything about how it is timed is in harness.py.

A suite is a module of this package with a tuple CASES. Adding one: write the module, name it in SUITES.
"""

import copy
import importlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

SUITES = ("norms", "losses", "projections", "attention", "recurrent", "models")
MODES = ("fwd", "fwd+bwd", "step")  # step: forward, backward and the optimizer's update, of whole models
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ON = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}


@dataclass(frozen=True)
class Case:
    """One size of one op. Subclasses (one per family of ops) add the sizes and the methods below.

    op: the dispatcher's name of it. quick: part of the quick subset. devices: where the size makes sense.
    """

    op: str
    quick: bool = field(default=False, kw_only=True)
    devices: tuple[str, ...] = field(default=("cpu", "cuda"), kw_only=True)

    bound: ClassVar[str] = "compute"  # what limits it: "compute" is reported in TFLOP/s, "memory" in GB/s
    inputs: ClassVar[tuple[str, ...]] = ("x",)
    outputs: ClassVar[tuple[str, ...]] = ("y",)
    compiled: ClassVar[bool] = True  # whether torch.compile of torch's module is worth waiting for
    modes: ClassVar[tuple[str, ...]] = MODES[:2]  # what it has: not every op has a gradient
    tokens_per_call: ClassVar[int] = 0  # where their rate is worth a column
    # for each result, the dimensions whose worst slice must be accurate too (seqfuse.testing)
    worst: ClassVar[dict[str, tuple[int, ...]]] = {}

    @property
    def name(self) -> str:
        """An id such as T64-B32-H512, unique within the op."""
        raise NotImplementedError

    def flops(self, mode: str) -> float:
        """Floating-point operations that the mathematics needs (a multiply-add counts as two)."""
        raise NotImplementedError

    def bytes(self, mode: str, itemsize: int) -> float:
        """The least memory traffic: in each pass every input read once and every result written once."""
        raise NotImplementedError

    def sample(self, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Fresh random float32 inputs, and gradients that come back for the first outputs."""
        raise NotImplementedError

    def modules(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """(torch.nn's module, seqfuse.nn's module), float32 on the CPU, with equal random parameters."""
        raise NotImplementedError

    def others(self, eager: torch.nn.Module, ours: torch.nn.Module) -> dict[str, tuple[Callable, torch.nn.Module]]:
        """What else competes, PyTorch's named op say: {name: (call, the module whose parameters it uses)}."""
        return {}

    def truth_of(self, call, inputs, parameters, grads) -> list[torch.Tensor]:
        """Outputs of call(*inputs), and the gradients of inputs and parameters where the case has them; in float64."""
        outputs = flatten(call(*inputs))
        if "fwd+bwd" not in self.modes:
            return outputs
        return outputs + list(torch.autograd.grad(outputs[: len(grads)], [*inputs, *parameters], grads))

    def line_up(self, problem: "Problem", mode: str, backends: Sequence[str], compile: bool):
        """Contenders in the order of the table, the eager baseline first, and {name: why not} of what can't run."""
        from seqfuse.benchmarks import contenders

        return contenders.line_up(problem, mode, backends, compile)

    @property
    def eager_name(self) -> str:
        """What the eager baseline is called in tables."""
        raise NotImplementedError

    def dtypes(self, device: str) -> tuple[str, ...]:
        return _ON[device]

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}"

    def missing(self) -> str | None:
        """Why the case can't be built here (a sentence), or None."""
        return None

    def build(self, device: str, dtype: str, sets: int = 1, quick: bool = False) -> "Problem":
        """All that the contenders run on: the same parameters, `sets` sets of random inputs. Seeded by the id.

        quick: the check may do with less work, where it has a choice.
        """
        kind = DTYPES[dtype]
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(self.id.encode()))
            eager, ours = (m.to(device=device, dtype=kind) for m in self.modules())
            samples = []
            for _ in range(sets):
                inputs, grads = self.sample(device)
                inputs = [t.to(kind).requires_grad_() for t in inputs]
                samples.append((inputs, [t.to(kind) for t in grads]))
        return Problem(self, dtype, eager, ours, samples)


@dataclass
class Problem:
    """A case with its data on a device. samples: [(inputs, incoming gradients)], more than one to rotate through."""

    case: Case
    dtype: str
    eager: torch.nn.Module
    ours: torch.nn.Module
    samples: list[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]

    def result_names(self, mode: str) -> list[str]:
        """Names of what `run` returns."""
        names = list(self.case.outputs)
        if mode == "fwd+bwd":
            names += [f"d{n}" for n in (*self.case.inputs, *(n for n, _ in self.ours.named_parameters()))]
        return names

    def run(self, call: Callable, parameters: Sequence[torch.Tensor], mode: str, i: int = 0) -> list[torch.Tensor]:
        """Outputs of call(*inputs) and, in mode fwd+bwd, the gradients of inputs and parameters."""
        inputs, grads = self.samples[i]
        outputs = flatten(call(*inputs))
        if mode == "fwd":
            return outputs
        return outputs + list(torch.autograd.grad(outputs[: len(grads)], [*inputs, *parameters], grads))

    def truth(self) -> list[torch.Tensor]:
        """What the float64 reference gives for the first sample: outputs, then gradients."""
        import seqfuse

        module = copy.deepcopy(self.ours).double()
        inputs, grads = self.samples[0]
        trained = "fwd+bwd" in self.case.modes
        inputs, grads = [t.detach().double().requires_grad_(trained) for t in inputs], [t.double() for t in grads]
        with seqfuse.backend("reference"), torch.enable_grad():
            found = self.case.truth_of(module, inputs, list(module.parameters()), grads)
            return [t.detach() for t in found]


def flatten(out) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for part in out for t in flatten(part)]


def suites() -> dict[str, tuple[Case, ...]]:
    return {name: importlib.import_module(f"seqfuse.benchmarks.{name}").CASES for name in SUITES}


def find(names: Sequence[str] = ()) -> list[Case]:
    """The cases of the ops and suites of these names (none: of all), each once, in the registry's order."""
    known = suites()
    everything = [case for cases in known.values() for case in cases]
    ops = list(dict.fromkeys(case.op for case in everything))
    for name in names:
        if name not in known and name not in ops:
            raise ValueError(f"unknown op {name!r}: use {', '.join(ops)}, or the suites {', '.join(known)}")
    wanted = {case.id for name in names for case in known.get(name, everything) if name in known or name == case.op}
    return [case for case in everything if not names or case.id in wanted]
