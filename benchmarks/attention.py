"""Attention against torch.nn.functional.scaled_dot_product_attention: causal, dense, windowed, with a trained bias."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from seqfuse import ops
from seqfuse.benchmarks.registry import Case


class Attention(torch.nn.Module):
    """PyTorch's call. A window is a boolean mask there; a bias [1, H, T, T] is a parameter, so it gets a gradient."""

    def __init__(self, kind: str, H: int, T: int, window: int):
        super().__init__()
        self.kind, self.window, self.bias = kind, window, None
        if kind == "bias":
            self.bias = torch.nn.Parameter(torch.randn(1, H, T, T))
        if kind == "window":
            self.register_buffer("mask", torch.ones(T, T, dtype=torch.bool).tril().triu(1 - window))

    def forward(self, q, k, v):
        mask = self.mask if self.kind == "window" else self.bias
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.kind == "causal")


class OurAttention(Attention):
    def forward(self, q, k, v):
        window = (self.window - 1, 0) if self.kind == "window" else None
        return ops.attention(q, k, v, causal=self.kind == "causal", window=window, bias=self.bias)


@dataclass(frozen=True)
class AttentionCase(Case):
    """q, k, v [B, H, T, D] -> [B, H, T, D], all with a gradient.

    kind: "dense", "causal", "window" (each query sees the last `window` keys) or "bias" (dense, [1, H, T, T]).
    """

    kind: str = "causal"
    B: int = 1
    H: int = 8
    T: int = 0
    D: int = 64
    window: int = 256
    inputs: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    worst: ClassVar[dict[str, tuple[int, ...]]] = dict.fromkeys(("y", "dq", "dk", "dv"), (0, 1))
    compiled: ClassVar[bool] = False  # it calls the same op

    @property
    def name(self) -> str:
        return f"{self.kind}-B{self.B}-H{self.H}-T{self.T}-D{self.D}"

    @property
    def eager_name(self) -> str:
        return "F.scaled_dot_product_attention"

    @property
    def scores(self) -> float:
        """How many of a head's T x T scores are seen."""
        T, W = self.T, min(self.window, self.T)
        return {"causal": T * (T + 1) / 2, "window": T * W - W * (W - 1) / 2}.get(self.kind, T * T)

    def flops(self, mode: str) -> float:
        # two products forward, and five backward
        return 2 * self.D * self.scores * self.B * self.H * (2 if mode == "fwd" else 7)

    def bytes(self, mode: str, itemsize: int) -> float:
        heads = self.B * self.H * self.T * self.D
        bias = self.H * self.T**2 if self.kind == "bias" else 0
        if mode == "fwd":
            return itemsize * (4 * heads + bias)  # q, k, v in, y out
        # and y, dy, q, k, v in, dq, dk, dv out; the bias in, its gradient out
        return itemsize * (12 * heads + 3 * bias)

    def sample(self, device: str):
        made = [torch.randn(self.B, self.H, self.T, self.D, device=device) for _ in range(4)]
        return made[:3], made[3:]

    def modules(self):
        eager, ours = (kind(self.kind, self.H, self.T, self.window) for kind in (Attention, OurAttention))
        ours.load_state_dict(eager.state_dict())
        return eager, ours


def _cpu(kind, T, D, **options):
    return AttentionCase("attention", kind=kind, B=max(1, 2048 // T), H=4 if T == 4096 else 8, T=T, D=D,
                         devices=("cpu",), **options)  # fmt: skip


def _gpu(kind, T, D):  # the truth in float64 keeps T x T matrices, so not beyond 4096 and 8k tokens
    return AttentionCase("attention", kind=kind, B=8192 // T, H=8, T=T, D=D, devices=("cuda",))


CASES = (
    *(AttentionCase("attention", kind="causal", B=2, H=4, T=T, D=64, quick=T == 64) for T in (16, 64)),
    _cpu("causal", 256, 64, quick=True),
    *(_cpu("causal", T, D) for T in (256, 1024, 2048, 4096) for D in (64, 128) if (T, D) != (256, 64)),
    *(_cpu("dense", T, D) for T in (256, 1024, 2048) for D in (64, 128)),
    *(_cpu("window", 4096, D) for D in (64, 128)),
    *(_cpu("bias", T, D) for T in (512, 1024, 2048) for D in (64, 128)),
    *(_gpu(kind, T, D) for kind in ("causal", "dense") for T in (512, 2048, 4096) for D in (64, 128, 256)),
    *(_gpu(kind, 4096, D) for kind in ("window", "bias") for D in (64, 128)),
)
