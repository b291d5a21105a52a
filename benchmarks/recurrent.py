"""LSTM, GRU and RNN over whole sequences, time-major, without an initial state. Bound by matrix products and latency.

There is no baseline besides the module: torch.lstm, torch.gru and torch.rnn_tanh are what it calls, and nothing more.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from seqfuse import nn
from seqfuse.benchmarks.registry import Case

_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
_MODULES = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


@dataclass(frozen=True)
class Recurrent(Case):
    """T steps of a batch of B, width H in and out of every direction; the gradient comes back for y only."""

    T: int = 0
    B: int = 0
    H: int = 0
    layers: int = 1
    bidirectional: bool = False
    bound: ClassVar[str] = "compute"
    worst: ClassVar[dict[str, tuple[int, ...]]] = {"y": (0, 1), "dx": (0, 1)}

    @property
    def outputs(self):
        return ("y", "h_n", "c_n") if self.op == "lstm" else ("y", "h_n")

    @property
    def name(self) -> str:
        extra = f"-L{self.layers}" if self.layers > 1 else ""
        return f"T{self.T}-B{self.B}-H{self.H}{extra}{'-bi' if self.bidirectional else ''}"

    @property
    def eager_name(self) -> str:
        return f"torch.nn.{_MODULES[self.op]}"

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _weights(self) -> int:
        """Elements of all the matrices."""
        widths = [self.H] + [self._directions * self.H] * (self.layers - 1)
        return sum(self._directions * _GATES[self.op] * self.H * (width + self.H) for width in widths)

    def flops(self, mode: str) -> float:
        # every weight is one multiply-add a step and sequence; backward does it twice, for its input and for itself
        return 2.0 * self.T * self.B * self._weights() * (1 if mode == "fwd" else 3)

    def bytes(self, mode: str, itemsize: int) -> float:
        x, y = self.T * self.B * self.H, self.T * self.B * self.H * self._directions
        weights = self._weights()
        forward = x + weights + y
        return itemsize * (forward if mode == "fwd" else forward + 2 * x + 2 * y + 2 * weights)

    def sample(self, device: str):
        x = torch.randn(self.T, self.B, self.H, device=device)
        return [x], [torch.randn(self.T, self.B, self.H * self._directions, device=device)]

    def modules(self):
        kind = _MODULES[self.op]
        options = dict(num_layers=self.layers, bidirectional=self.bidirectional)
        eager = getattr(torch.nn, kind)(self.H, self.H, **options)
        ours = getattr(nn, kind)(self.H, self.H, **options)
        ours.load_state_dict(eager.state_dict())
        return eager, ours


def _cases(op):
    return (
        Recurrent(op, T=64, B=32, H=512),
        Recurrent(op, T=128, B=16, H=256, quick=True),
        Recurrent(op, T=256, B=1, H=512),
        Recurrent(op, T=64, B=4, H=320, quick=True),
        Recurrent(op, T=64, B=16, H=256, layers=2, bidirectional=True),
        Recurrent(op, T=256, B=64, H=768, devices=("cuda",)),
        Recurrent(op, T=1024, B=16, H=512, devices=("cuda",)),
    )


CASES = _cases("gru") + _cases("lstm") + _cases("rnn")
