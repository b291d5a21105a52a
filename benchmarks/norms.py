"""Layer and RMS normalisation, alone and with the residual addition of a pre-norm block. Bound by memory."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from seqfuse import nn
from seqfuse.benchmarks.registry import Case


class AddNorm(torch.nn.Module):
    """What a model does without a fused residual: an addition, then the norm."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x, residual):
        s = x + residual
        return self.norm(s), s


class OurAddNorm(AddNorm):
    def forward(self, x, residual):
        return self.norm(x, residual)


@dataclass(frozen=True)
class Norm(Case):
    """rows x cols, with weight and (layer_norm) bias. Outputs (y) or, with a residual, (y, x + residual),
    both with a gradient."""

    rows: int = 0
    cols: int = 0
    residual: bool = False
    bound: ClassVar[str] = "memory"

    @property
    def inputs(self):
        return ("x", "residual") if self.residual else ("x",)

    @property
    def outputs(self):
        return ("y", "s") if self.residual else ("y",)

    @property
    def worst(self):
        return dict.fromkeys(("y", "s", "dx", "dresidual"), (0,))

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.cols}{'-residual' if self.residual else ''}"

    @property
    def eager_name(self) -> str:
        name = self.kinds[0].__name__
        return f"x + r, nn.{name}" if self.residual else f"torch.nn.{name}"

    @property
    def kinds(self):
        """PyTorch's module and ours."""
        return (torch.nn.RMSNorm, nn.RMSNorm) if self.op == "rms_norm" else (torch.nn.LayerNorm, nn.LayerNorm)

    def flops(self, mode: str) -> float:
        # forward: sum, square of the difference, normalise, scale and shift; backward about twice that
        return self.rows * self.cols * (8 + self.residual) * (1 if mode == "fwd" else 3)

    def bytes(self, mode: str, itemsize: int) -> float:
        tensors = 4 if self.residual else 2  # x (and r) in, y (and s) out
        params, rows = 1 if self.op == "rms_norm" else 2, 0
        if mode == "fwd+bwd":
            tensors += 4 if self.residual else 3  # dy, s (and ds) in, dx out: dresidual is the same tensor
            params += params + 1  # the weight in, gradients out
            rows = 2 if self.op == "rms_norm" else 4  # float32 (mean and) rstd out and in again
        return itemsize * (tensors * self.rows * self.cols + params * self.cols) + 4 * rows * self.rows

    def sample(self, device: str):
        inputs = [torch.randn(self.rows, self.cols, device=device) for _ in self.inputs]
        return inputs, [torch.randn(self.rows, self.cols, device=device) for _ in self.outputs]

    def modules(self):
        eager, ours = (kind(self.cols, eps=1e-5) for kind in self.kinds)
        if self.residual:
            eager, ours = AddNorm(eager), OurAddNorm(ours)
        with torch.no_grad():
            for p in eager.parameters():  # torch starts at ones and zeros
                p.add_(0.1 * torch.randn_like(p))
        ours.load_state_dict(eager.state_dict())
        return eager, ours

    def others(self, eager, ours):
        if self.residual:
            return {}  # torch has no op for the pair
        if self.op == "rms_norm":
            return {"F.rms_norm": (lambda x: F.rms_norm(x, (self.cols,), eager.weight, eager.eps), eager)}
        return {"F.layer_norm": (lambda x: F.layer_norm(x, (self.cols,), eager.weight, eager.bias, eager.eps), eager)}


def _case(rows, cols, residual=False, op="layer_norm", **options):
    return Norm(op, rows=rows, cols=cols, residual=residual, **options)


CASES = (
    _case(16, 256),
    _case(64, 512, quick=True),
    _case(512, 1024, quick=True),
    _case(2048, 768),
    _case(4096, 512),
    _case(16384, 1024, devices=("cuda",)),
    _case(16384, 4096, devices=("cuda",)),
    _case(64, 512, True),
    _case(512, 1024, True, quick=True),
    _case(2048, 768, True),
    _case(4096, 512, True),
    _case(16384, 4096, True, devices=("cuda",)),
    _case(64, 512, op="rms_norm"),
    _case(512, 1024, op="rms_norm", quick=True),
    _case(2048, 768, op="rms_norm"),
    _case(4096, 512, op="rms_norm"),
    _case(512, 1024, True, op="rms_norm"),
    _case(2048, 768, True, op="rms_norm"),
    _case(4096, 512, True, op="rms_norm"),
)
