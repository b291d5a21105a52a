"""Attention against torch.nn.functional.scaled_dot_product_attention: causal, dense, windowed, with a trained bias,
softcapped; and decoding from a KV cache."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from seqfuse import ops
from seqfuse.benchmarks.registry import Case

SOFTCAP = 30.0


class Attention(torch.nn.Module):
    """PyTorch's call. A window is a boolean mask there; a bias is a parameter, so it gets a gradient."""

    def __init__(self, case: "AttentionCase"):
        super().__init__()
        self.kind, self.window, self.bias = case.kind, case.window, None
        T = case.T
        if case.bias_shape:
            self.bias = torch.nn.Parameter(torch.randn(case.bias_shape))
        if case.kind == "window":
            self.register_buffer("mask", torch.ones(T, T, dtype=torch.bool).tril().triu(1 - case.window))

    def forward(self, q, k, v):
        if self.kind == "softcap":  # PyTorch's op has none: what a model does instead
            scores = SOFTCAP * torch.tanh(q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 / SOFTCAP))
            return scores.softmax(-1) @ v
        mask = self.mask if self.kind == "window" else self.bias
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.kind == "causal")


class OurAttention(Attention):
    def forward(self, q, k, v):
        window = (self.window - 1, 0) if self.kind == "window" else None
        softcap = SOFTCAP if self.kind == "softcap" else None
        return ops.attention(q, k, v, causal=self.kind == "causal", window=window, bias=self.bias, softcap=softcap)


@dataclass(frozen=True)
class AttentionCase(Case):
    """q, k, v [B, H, T, D] -> [B, H, T, D], all with a gradient.

    kind: "dense", "causal", "window" (each query sees the last `window` keys), "bias" (dense, [1, H, T, T]), "biases"
    (dense, [B, H, T, T]) or "softcap" (dense).
    """

    kind: str = "causal"
    B: int = 1
    H: int = 8
    T: int = 0
    D: int = 64
    window: int = 256
    inputs: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    worst: ClassVar[dict[str, tuple[int, ...]]] = dict.fromkeys(("y", "dq", "dk", "dv", "dbias"), (0, 1))
    compiled: ClassVar[bool] = False  # it calls the same op

    @property
    def name(self) -> str:
        return f"{self.kind}-B{self.B}-H{self.H}-T{self.T}-D{self.D}"

    @property
    def eager_name(self) -> str:
        return "matmul, tanh, softmax" if self.kind == "softcap" else "F.scaled_dot_product_attention"

    @property
    def bias_shape(self) -> tuple[int, ...]:
        return {"bias": (1, self.H, self.T, self.T), "biases": (self.B, self.H, self.T, self.T)}.get(self.kind, ())

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
        bias = torch.Size(self.bias_shape).numel() if self.bias_shape else 0
        if mode == "fwd":
            return itemsize * (4 * heads + bias)  # q, k, v in, y out
        # and y, dy, q, k, v in, dq, dk, dv out; the bias in, its gradient out
        return itemsize * (12 * heads + 3 * bias)

    def sample(self, device: str):
        made = [torch.randn(self.B, self.H, self.T, self.D, device=device) for _ in range(4)]
        return made[:3], made[3:]

    def modules(self):
        eager, ours = Attention(self), OurAttention(self)
        ours.load_state_dict(eager.state_dict())
        return eager, ours

    def truth_of(self, call, inputs, parameters, grads):
        """Head by head, so that no more than one matrix of T x T is held in float64."""
        if parameters:
            return super().truth_of(call, inputs, parameters, grads)
        found = [torch.empty_like(t) for t in (*grads, *inputs)]
        for b in range(self.B):
            for h in range(self.H):
                here = slice(b, b + 1), slice(h, h + 1)
                head = super().truth_of(call, [t.detach()[here].requires_grad_() for t in inputs], [],
                                        [g[here] for g in grads])  # fmt: skip
                for whole, part in zip(found, head, strict=True):
                    whole[here] = part
        return found

    def others(self, eager, ours):
        """On a GPU: the kernels among which PyTorch's op chooses, by name, and FlexAttention compiled."""
        if self.devices != ("cuda",) or self.kind not in ("causal", "dense"):
            return {}
        found = {}
        for name, kernel in (("SDPA flash", SDPBackend.FLASH_ATTENTION), ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)):
            found[name] = functools.partial(_pinned, kernel, eager), eager
        found["FlexAttention compiled"] = _Flex(self), eager
        return found


def _pinned(kernel, module, *inputs):
    with sdpa_kernel(kernel):
        return module(*inputs)


class _Flex:
    """torch.nn.attention.flex_attention, compiled at its first call."""

    def __init__(self, case: AttentionCase):
        self.case, self.call = case, None

    def __call__(self, q, k, v):
        if self.call is None:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            T = self.case.T
            seen = None
            if self.case.kind == "causal":
                seen = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=q.device.type)
            self.call = functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=seen)
        return self.call(q, k, v)


class _Decode(torch.nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class _OurDecode(torch.nn.Module):
    def forward(self, q, k, v):
        lengths = torch.full((q.shape[0],), k.shape[2], device=q.device)
        return ops.attention_with_kv_cache(q, k, v, cache_lengths=lengths)


@dataclass(frozen=True)
class DecodeCase(Case):
    """One query [B, H, 1, D] for each sequence over a full cache of T keys [B, Hkv, T, D]."""

    B: int = 1
    H: int = 8
    Hkv: int = 8
    T: int = 4096
    D: int = 128
    bound: ClassVar[str] = "memory"
    inputs: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    worst: ClassVar[dict[str, tuple[int, ...]]] = {"y": (0, 1)}
    compiled: ClassVar[bool] = False
    modes: ClassVar[tuple[str, ...]] = ("fwd",)

    @property
    def name(self) -> str:
        return f"B{self.B}-H{self.H}-kv{self.Hkv}-T{self.T}-D{self.D}"

    @property
    def eager_name(self) -> str:
        return "F.scaled_dot_product_attention"

    def flops(self, mode: str) -> float:
        return 4 * self.D * self.T * self.B * self.H

    def bytes(self, mode: str, itemsize: int) -> float:
        return itemsize * self.B * self.D * (2 * self.H + 2 * self.Hkv * self.T)

    def sample(self, device: str):
        shapes = (self.H, 1), (self.Hkv, self.T), (self.Hkv, self.T)
        return [torch.randn(self.B, *s, self.D, device=device) for s in shapes], []

    def modules(self):
        return _Decode(), _OurDecode()


def _cpu(kind, T, D, **options):
    return AttentionCase("attention", kind=kind, B=max(1, 2048 // T), H=4 if T == 4096 else 8, T=T, D=D,
                         devices=("cpu",), **options)  # fmt: skip


def _gpu(kind, T, D):  # 16k tokens a batch; a bias of T x T is held in float64 as a whole
    return AttentionCase("attention", kind=kind, B=max(1, 16384 // T), H=8, T=T, D=D, devices=("cuda",))


CASES = (
    *(AttentionCase("attention", kind="causal", B=2, H=4, T=T, D=64, quick=T == 64) for T in (16, 64)),
    _cpu("causal", 256, 64, quick=True),
    *(_cpu("causal", T, D) for T in (256, 1024, 2048, 4096) for D in (64, 128) if (T, D) != (256, 64)),
    *(_cpu("dense", T, D) for T in (256, 1024, 2048, 4096) for D in (64, 128)),
    *(_cpu("window", 4096, D) for D in (64, 128)),
    *(_cpu("bias", T, D) for T in (512, 1024, 2048) for D in (64, 128)),
    *(_cpu(kind, 512, D) for kind in ("biases", "softcap") for D in (64, 128)),
    *(_gpu(kind, T, D) for kind in ("causal", "dense") for T in (512, 2048, 4096, 8192, 16384) for D in (64, 128, 256)),
    *(_gpu(kind, 4096, D) for kind in ("window", "bias", "softcap") for D in (64, 128)),
    DecodeCase("attention_decode", T=1024, quick=True),
    *(DecodeCase("attention_decode", B=B, Hkv=Hkv, devices=("cpu",)) for B in (1, 8) for Hkv in (8, 2)),
    *(DecodeCase("attention_decode", B=B, H=32, Hkv=8, T=32768, devices=("cuda",)) for B in (1, 8, 64)),
)
