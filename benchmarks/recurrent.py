"""LSTM, GRU and RNN over whole sequences, dense and of many lengths, and loops over cells; no initial state.
Bound by matrix products and latency.

There is no baseline besides the module: torch.lstm, torch.gru and torch.rnn_tanh are what it calls, and nothing more.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

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

    def _steps(self) -> float:
        """Steps of all sequences together."""
        return self.T * self.B

    def flops(self, mode: str) -> float:
        # every weight is one multiply-add a step and sequence; backward does it twice, for its input and for itself
        return 2.0 * self._steps() * self._weights() * (1 if mode == "fwd" else 3)

    def bytes(self, mode: str, itemsize: int) -> float:
        x, y = self._steps() * self.H, self._steps() * self.H * self._directions
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


class Packed(torch.nn.Module):
    """What a model does with torch.nn for sequences of many lengths: pack, run, pad."""

    def __init__(self, rnn: torch.nn.Module, lengths: torch.Tensor):
        super().__init__()
        self.rnn, self.lengths = rnn, lengths

    def forward(self, x):
        packed = pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], total_length=x.shape[0])[0]


class Ragged(Packed):
    """The same with lengths=."""

    def forward(self, x):
        return self.rnn(x, lengths=self.lengths.to(x.device))[0]


@dataclass(frozen=True)
class Lengths(Recurrent):
    """A batch of sequences with lengths spread evenly over T/2 .. T, in no order; results beyond an end are zero."""

    @property
    def outputs(self):
        return ("y",)

    @property
    def name(self) -> str:
        return super().name + "-lengths"

    @property
    def eager_name(self) -> str:
        return f"torch.nn.{_MODULES[self.op]}, packed"

    def lengths(self) -> torch.Tensor:
        spread = torch.linspace(self.T // 2, self.T, self.B).round().long() if self.B > 1 else torch.tensor([self.T])
        return spread[torch.randperm(self.B, generator=torch.Generator().manual_seed(self.B))]

    def _steps(self) -> float:
        return float(self.lengths().sum())

    def modules(self):
        eager, ours = super().modules()
        return Packed(eager, self.lengths()), Ragged(ours, self.lengths())

    def others(self, eager, ours):
        """Our own call over the padding too: what the lengths have to beat."""

        def padded(x):
            keep = torch.arange(self.T, device=x.device)[:, None] < ours.lengths.to(x.device)
            return ours.rnn(x)[0] * keep[:, :, None]

        return {"seqfuse, padded": (padded, ours)}


class CellLoop(torch.nn.Module):
    """A cell of torch.nn in a Python loop."""

    def __init__(self, cell: torch.nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state, outputs = None, []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


@dataclass(frozen=True)
class Cells(Recurrent):
    """T calls of a cell. torch.compile would unroll them, which takes minutes."""

    cell: str = "lstm"
    compiled: ClassVar[bool] = False

    @property
    def outputs(self):
        return ("y",)

    @property
    def name(self) -> str:
        return f"{self.cell}-{super().name}"

    @property
    def eager_name(self) -> str:
        return f"torch.nn.{_MODULES[self.cell]}Cell"

    def _weights(self) -> int:
        return _GATES[self.cell] * self.H * 2 * self.H

    def modules(self):
        kind = f"{_MODULES[self.cell]}Cell"
        eager, ours = getattr(torch.nn, kind)(self.H, self.H), getattr(nn, kind)(self.H, self.H)
        ours.load_state_dict(eager.state_dict())
        return CellLoop(eager), CellLoop(ours)


def _cases(op):
    grid = [(T, B, H) for T in (64, 256) for B in (1, 4, 16, 32) for H in (256, 320, 512)]
    return (
        Recurrent(op, T=128, B=16, H=256, quick=True),
        *(Recurrent(op, T=T, B=B, H=H, quick=(T, B, H) == (64, 4, 320)) for T, B, H in grid),
        Recurrent(op, T=64, B=16, H=256, layers=2, bidirectional=True),
        # what the kernels of csrc/cuda that run a scan in one launch are to be measured on
        *(Recurrent(op, T=512, B=B, H=H, devices=("cuda",)) for H in (128, 256, 384, 512) for B in (1, 16, 64, 128)),
        Recurrent(op, T=256, B=64, H=768, devices=("cuda",)),
        Recurrent(op, T=1024, B=16, H=512, devices=("cuda",)),
        *(Lengths(op, T=T, B=B, H=H, quick=B == 16) for T, B, H in ((64, 32, 512), (128, 16, 256), (256, 4, 320))),
    )


CASES = (
    *_cases("gru"),
    *_cases("lstm"),
    *_cases("rnn"),
    *(
        Cells("rnn_cell", T=100, B=B, H=H, cell=cell, quick=(B, H) == (16, 256))
        for cell in ("lstm", "gru", "rnn")
        for B, H in ((1, 256), (16, 256), (32, 512))
    ),
)
