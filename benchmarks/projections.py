"""Linear layers: with the few rows of a step of decoding, where reading the weights takes the time, and with the many
of training, where the products do."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from seqfuse import nn, ops
from seqfuse.benchmarks.registry import Case


class OurLinear(torch.nn.Linear):
    def forward(self, x):
        return ops.linear(x, self.weight, self.bias)


class Layers(torch.nn.ModuleList):
    """Equal layers, one after another on the same x; the result is the last one's."""

    def forward(self, x):
        for layer in self:
            y = layer(x)
        return y


@dataclass(frozen=True)
class Projection(Case):
    """rows x width -> rows x units, with a bias, by each of `layers`: so many that a CPU must read them from memory, or
    one, which stays in the third-level cache if it fits."""

    rows: int = 1
    width: int = 0
    units: int = 0
    layers: int = 1
    bound: ClassVar[str] = "memory"
    compiled: ClassVar[bool] = False  # it would leave out all layers but the last
    modes: ClassVar[tuple[str, ...]] = ("fwd",)  # with gradients it is PyTorch's own op
    worst: ClassVar[dict[str, tuple[int, ...]]] = {"y": (0,)}

    @property
    def name(self) -> str:
        return f"{self.width}x{self.units}-rows{self.rows}-layers{self.layers}"

    @property
    def eager_name(self) -> str:
        return "torch.nn.Linear"

    def flops(self, mode: str) -> float:
        return 2 * self.layers * self.rows * self.width * self.units

    def bytes(self, mode: str, itemsize: int) -> float:
        one = self.width * self.units + self.units + self.rows * (self.width + self.units)
        return itemsize * self.layers * one

    def sample(self, device: str):
        return [torch.randn(self.rows, self.width, device=device)], []

    def modules(self):
        made = [
            Layers(kind(self.width, self.units) for _ in range(self.layers)) for kind in (torch.nn.Linear, OurLinear)
        ]
        made[1].load_state_dict(made[0].state_dict())
        return made[0], made[1]


@dataclass(frozen=True)
class Training(Case):
    """One layer on many rows, with a bias. The gradient takes two products more."""

    rows: int = 0
    width: int = 0
    units: int = 0
    worst: ClassVar[dict[str, tuple[int, ...]]] = {"y": (0,), "dx": (0,), "dweight": (0,)}

    @property
    def name(self) -> str:
        return f"{self.width}x{self.units}-rows{self.rows}"

    @property
    def eager_name(self) -> str:
        return "torch.nn.Linear"

    def flops(self, mode: str) -> float:
        return 2 * self.rows * self.width * self.units * (1 if mode == "fwd" else 3)

    def bytes(self, mode: str, itemsize: int) -> float:
        weight, rows = self.width * self.units + self.units, self.rows * (self.width + self.units)
        return itemsize * (weight + rows if mode == "fwd" else 3 * weight + 3 * rows)

    def sample(self, device: str):
        x, dy = (torch.randn(self.rows, n, device=device) for n in (self.width, self.units))
        return [x], [dy]

    def modules(self):
        eager, ours = (kind(self.width, self.units) for kind in (torch.nn.Linear, nn.Linear))
        ours.load_state_dict(eager.state_dict())
        return eager, ours


_CACHES = 1 << 25  # weights that no usual cache holds, as float32 or as bfloat16
# GPT-2 124M: attention's projections, the feed-forward's, the head; Llama with a width of 2048
_SIZES = (768, 2304), (768, 768), (768, 3072), (3072, 768), (768, 50257), (2048, 5632)


def _case(width, units, rows, layers=1, **options):
    return Projection("linear", rows=rows, width=width, units=units, layers=layers, **options)


CASES = (
    *(_case(*size, rows, math.ceil(_CACHES / math.prod(size))) for size in _SIZES for rows in (1, 2, 4, 8)),
    *(_case(*size, rows, quick=rows == 1) for size in ((768, 768), (768, 3072)) for rows in (1, 8)),
    *(
        Training("linear", rows=rows, width=width, units=units, quick=rows == 256)
        for width, units in ((256, 256), (512, 512), (768, 768), (768, 3072), (3072, 768))
        for rows in (256, 2048)
    ),
)
