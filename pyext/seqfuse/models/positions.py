"""How a transformer knows where a token stands: a learned table, a sinusoidal one, or rotations of queries and keys."""

import dataclasses
import math
from typing import Literal

import torch
from torch import nn

from seqfuse import explanation, ops
from seqfuse.models.config import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSettings(Settings):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), and how they were stretched to a longer context.

    theta: the base of the wavelengths. scaling: None; "linear": wavelengths `factor` times as long (arXiv:2306.15595);
    "llama3": only the long ones (arXiv:2407.21783); "yarn": a ramp between the two, and warmer attention
    (arXiv:2309.00071). original_positions: the context before stretching. low, high: turns in that context below which
    a pair is stretched and above which it is kept. attention_factor: of cos and sin, "yarn" only; None for
    0.1 ln(factor) + 1.
    """

    theta: float = 10000.0
    scaling: Literal[None, "linear", "llama3", "yarn"] = None
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_positions: int | None = None
    attention_factor: float | None = None

    def __post_init__(self):
        super().__post_init__()
        self.positive("theta", "factor", "low", "high", "original_positions")
        if self.scaling in ("llama3", "yarn"):
            self.require(self.original_positions is not None, f"original_positions is needed for {self.scaling!r}")
            self.require(self.low < self.high, f"low must be below high, got {self.low} and {self.high}")

    def frequencies(self, width: int) -> torch.Tensor:
        """Radians per position of each pair of a head: float32 [width / 2]."""
        exponent = torch.arange(0, width, 2).float() / width
        plain = 1.0 / self.theta**exponent
        if self.scaling is None:
            return plain
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling == "llama3":
            turns = self.original_positions * plain / (2 * math.pi)  # in the original context
            keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        else:
            first, last = (self._pair_of(turns, width) for turns in (self.high, self.low))
            first, last = max(math.floor(first), 0), min(math.ceil(last), width - 1)
            ramp = (torch.arange(width // 2) - first) / max(last - first, 0.001)
            keep = 1 - ramp.clamp(0, 1)
        return keep * plain + (1 - keep) * plain / self.factor

    def _pair_of(self, turns: float, width: int) -> float:
        """Which pair makes so many turns in the original context."""
        return width * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.scaling != "yarn":
            return 1.0
        return self.attention_factor or (0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0)


class Rotary(nn.Module):
    """Turns queries and keys by the angles of their positions. Its tables stay float32 whatever the model's dtype."""

    def __init__(self, settings: RopeSettings, width: int, positions: int):
        super().__init__()
        self.settings, self.sizes = settings, (width, positions)
        self.make_tables()

    def make_tables(self):
        width, positions = self.sizes
        angles = torch.arange(positions).float()[:, None] * self.settings.frequencies(width)  # (S, D / 2)
        self.register_buffer("cos", angles.cos() * self.settings.amplitude, persistent=False)
        self.register_buffer("sin", angles.sin() * self.settings.amplitude, persistent=False)

    def forward(self, q, k, positions=None):
        """q (B, Hq, T, D), k (B, Hkv, T, D); positions int64 (B, T), or None: from 0 on."""
        explanation.entering(self)
        return ops.rope((q, k), self.cos, self.sin, positions=positions)

    def _apply(self, fn, recurse=True):
        for name in ("cos", "sin"):
            table = getattr(self, name)
            setattr(self, name, table.to(fn(table).device))  # moved, never rounded
        return self


class Sinusoidal(nn.Module):
    """Vaswani et al.'s table of sines and cosines; sines in the first half of the features, cosines in the second."""

    def __init__(self, positions: int, width: int):
        super().__init__()
        self.sizes = width, positions
        self.make_tables()

    def make_tables(self):
        width, positions = self.sizes
        pairs = torch.arange(0, width, 2).double()  # (d / 2)
        angles = torch.arange(positions).double()[:, None] / 10000 ** (pairs / width)  # (S, d / 2)
        table = torch.cat([angles.sin(), angles.cos()[:, : width // 2]], dim=1).float()  # (S, d)
        self.register_buffer("weight", table, persistent=False)

    def forward(self, positions):
        return self.weight[positions]
