"""The end of a language model: linear_cross_entropy against a product and cross_entropy; and gated activations."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from seqfuse import ops
from seqfuse.benchmarks.registry import Case
from seqfuse.ops import products


class Head(torch.nn.Module):
    """Hidden states -> loss. The targets are drawn once: every contender shares them."""

    def __init__(self, width: int, vocabulary: int, tokens: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(vocabulary, width) * width**-0.5)
        self.register_buffer("target", torch.randint(0, vocabulary, (tokens,)))

    def forward(self, x):
        return F.cross_entropy(F.linear(x, self.weight), self.target)


class OurHead(Head):
    def forward(self, x):
        return ops.linear_cross_entropy(x, self.weight, self.target)


@dataclass(frozen=True)
class LinearCrossEntropy(Case):
    """tokens x width hidden states, a vocabulary: a scalar loss, gradients for both."""

    tokens: int = 0
    width: int = 0
    vocabulary: int = 0
    outputs: ClassVar[tuple[str, ...]] = ("loss",)

    @property
    def worst(self):
        return {"dx": (0,), "dweight": (0,)}

    @property
    def name(self) -> str:
        return f"N{self.tokens}-D{self.width}-V{self.vocabulary}"

    @property
    def eager_name(self) -> str:
        return "F.cross_entropy(F.linear)"

    def flops(self, mode: str) -> float:
        return 2 * self.tokens * self.width * self.vocabulary * (1 if mode == "fwd" else 3)

    def bytes(self, mode: str, itemsize: int) -> float:
        return itemsize * (self.tokens + self.vocabulary) * self.width * (1 if mode == "fwd" else 2)

    def sample(self, device: str):
        return [torch.randn(self.tokens, self.width, device=device)], [torch.ones((), device=device)]

    def modules(self):
        eager, ours = (head(self.width, self.vocabulary, self.tokens) for head in (Head, OurHead))
        ours.load_state_dict(eager.state_dict())
        return eager, ours

    def others(self, eager, ours):
        if not hasattr(F, "linear_cross_entropy"):  # torch 2.13 has it
            return {}
        return {"F.linear_cross_entropy": (lambda x: F.linear_cross_entropy(x, eager.weight, eager.target), eager)}

    def dtypes(self, device: str) -> tuple[str, ...]:
        # ATen's bf16 products take minutes on CPUs without AVX-512
        return ("fp32",) if device == "cpu" and products.SLOW_BF16 else super().dtypes(device)


class Gated(torch.nn.Module):
    def __init__(self, activation: str):
        super().__init__()
        self.activation = activation

    def forward(self, gate, up):
        return (F.silu(gate) if self.activation == "swiglu" else F.gelu(gate)) * up


class OurGated(Gated):
    def forward(self, gate, up):
        return getattr(ops, self.activation)(gate, up)


@dataclass(frozen=True)
class GatedActivation(Case):
    """act(gate) * up, rows x cols."""

    activation: str = "swiglu"
    rows: int = 0
    cols: int = 0
    bound: ClassVar[str] = "memory"
    inputs: ClassVar[tuple[str, ...]] = ("gate", "up")
    worst: ClassVar[dict[str, tuple[int, ...]]] = {"y": (0,), "dgate": (0,), "dup": (0,)}

    @property
    def name(self) -> str:
        return f"{self.activation}-{self.rows}x{self.cols}"

    @property
    def eager_name(self) -> str:
        return "F.silu(gate) * up" if self.activation == "swiglu" else "F.gelu(gate) * up"

    def flops(self, mode: str) -> float:
        # an exponential, a division and a product or two; backward does it again and twice as much
        return self.rows * self.cols * 5 * (1 if mode == "fwd" else 4)

    def bytes(self, mode: str, itemsize: int) -> float:
        return itemsize * self.rows * self.cols * (3 if mode == "fwd" else 8)

    def sample(self, device: str):
        made = [torch.randn(self.rows, self.cols, device=device) for _ in range(3)]
        return made[:2], made[2:]

    def modules(self):
        return Gated(self.activation), OurGated(self.activation)


def _head(tokens, width, vocabulary, **options):
    return LinearCrossEntropy("linear_cross_entropy", tokens=tokens, width=width, vocabulary=vocabulary, **options)


def _gated(activation, rows, cols, **options):
    return GatedActivation("gated", activation=activation, rows=rows, cols=cols, **options)


CASES = (
    _head(64, 256, 1000, quick=True),
    _head(512, 256, 8000, quick=True),
    _head(2048, 512, 32000),
    _head(8192, 4096, 128256, devices=("cuda",)),
    *(_gated(a, r, c, quick=r == 512) for a in ("swiglu", "geglu") for r, c in ((64, 512), (512, 1024), (2048, 768))),
    *(_gated(a, 4096, 512) for a in ("swiglu", "geglu")),
    _gated("swiglu", 16384, 11008, devices=("cuda",)),
)
