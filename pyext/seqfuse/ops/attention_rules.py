"""Which backend runs a call of attention or of decoding, what each of them takes, and the built-in rules of `auto`."""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from seqfuse import dispatch, native, reference
from seqfuse.ops import attention_cuda_rules, attention_op, library  # noqa: F401 (attention_op registers the ops)
from seqfuse.reference import AttentionOptions
from seqfuse.reference.attention import Positions, written


class AttentionCase(NamedTuple):
    """What the choice of a backend may depend on. options: what the call does besides softmax(q k^T) v, as `describe`
    names it; packed sequences have B = their number and the T of all of them together."""

    device: str
    dtype: torch.dtype
    B: int
    Hq: int
    Hkv: int
    Tq: int
    Tk: int
    D: int
    Dv: int
    grad: bool
    options: tuple[str, ...] = ()
    scale: float = 1.0

    @property
    def capability(self) -> tuple[int, int]:
        """(major, minor) of the GPU; (0, 0) without one."""
        return library.gpu_capability()

    def shape_class(self) -> str:
        power = dispatch.size_class
        return (
            f"{str(self.dtype)[6:]} Tq{power(self.Tq)} Tk{power(self.Tk)} D{self.D} BH{power(self.B * self.Hq)}"
            f"{' gqa' if self.Hq != self.Hkv else ''}{' grad' if self.grad else ''}"
            f"{''.join(f' +{o}' for o in self.options)}"
        )


def describe(q, k, v, options: AttentionOptions, grad: bool, lse: bool) -> AttentionCase:
    """The case of checked arguments."""
    o, found = options, []
    if o.window_left >= 0 or o.window_right > 0:
        found.append("window")
    elif o.window_right == 0:
        found.append("causal")
    if o.top_left and o.window_right >= 0:
        found.append("top-left")
    given = {
        "softcap": o.softcap,
        "ALiBi": o.alibi_slopes is not None,
        "bias": o.bias is not None,
        "bias gradient": o.bias is not None and o.bias.requires_grad and grad,
        "mask": o.mask is not None,
        "key_lengths": o.key_lengths is not None,
        "packed sequences": o.cu_seqlens_q is not None,
        "dropout": o.dropout_p,
        "return_lse": lse,
    }
    found += [name for name, there in given.items() if there]
    (B, Hq, Tq, D), (_, Hkv, Tk, _) = q.shape, k.shape
    B = B if o.cu_seqlens_q is None else o.cu_seqlens_q.shape[0] - 1
    return AttentionCase(q.device.type, q.dtype, B, Hq, Hkv, Tq, Tk, D, v.shape[3], grad, tuple(found), o.scale)


# What PyTorch's scaled_dot_product_attention has no argument for, and no mask can say.
_BEYOND_SDPA = {
    "softcap": "scaled_dot_product_attention has no softcap",
    "ALiBi": "scaled_dot_product_attention has no ALiBi but as a bias of Tq x Tk for every head",
    "packed sequences": "scaled_dot_product_attention takes no packed sequences",
    "dropout": "scaled_dot_product_attention draws another dropout mask, and ours is the same on every backend",
    "return_lse": "scaled_dot_product_attention does not return the log-sum-exp",
}


def torch_refusal(case: AttentionCase) -> str | None:
    """Why scaled_dot_product_attention can't express the call, or None."""
    return next((_BEYOND_SDPA[o] for o in case.options if o in _BEYOND_SDPA), None)


_MASKED = ("window", "mask", "key_lengths", "bias")


def _needs_mask(case):
    if any(o in _MASKED for o in case.options):
        return True
    return "causal" in case.options and "top-left" not in case.options and case.Tq != case.Tk


def _torch_path(case):
    return "SDPA with a mask of Tq x Tk" if _needs_mask(case) else "SDPA"


def torch_attention(q, k, v, *options):
    """scaled_dot_product_attention, with whatever hides keys as its mask. (out, None)."""
    o = AttentionOptions(*options)
    Tq, Tk = q.shape[2], k.shape[2]
    if o.key_lengths is not None:  # what lies behind does not exist, and 0 * NaN is NaN
        k, v = (written(t, o.key_lengths) for t in (k, v))
    limited = o.window_left >= 0 or o.window_right >= 0
    bare = o.bias is None and o.mask is None and o.key_lengths is None and o.query_start is None
    causal = bare and o.window_left < 0 and o.window_right == 0 and (o.top_left or Tq == Tk)
    mask = None
    if not causal and (limited or not bare):
        mask = Positions(q, k, o).visible()
        if o.bias is not None:
            mask = o.bias.to(q.dtype).masked_fill(~mask, -torch.inf)
        else:
            mask = mask.expand(*mask.shape[:-2], Tq, Tk)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=o.scale, enable_gqa=gqa), None


def _reference(q, k, v, *options):
    return reference.attention(q, k, v, AttentionOptions(*options))


def _kernel_missing(name, key):
    return None if library.has_kernel(name, key) else f"this build has no {key} kernel for it"


# asked once: whether a kernel is registered does not change, and torch.compile need not trace the question
_MISSING = {
    (op, key): _kernel_missing(op, key) for op in ("attention_fwd", "attention_bwd", "attention_decode")
    for key in ("CPU", "CUDA")
}  # fmt: skip

# Head dimensions above which the CPU and Triton kernels are not made: forward, with gradients.
WIDEST = 512, 256


def _too_wide(case):
    limit = WIDEST[case.grad]
    if max(case.D, case.Dv) <= limit:
        return None
    return f"its kernels take head dimensions up to {limit}{' with gradients' if case.grad else ''}"


def _cpu_refusal(case):
    return library.cpu_refusal(case.device, case.dtype) or _MISSING["attention_fwd", "CPU"] or _too_wide(case)


def triton_refusal(case):
    return library.triton_refusal(case.device, case.dtype) or _too_wide(case)


def cpu_decode_refusal(case):
    return library.cpu_refusal(case.device, case.dtype) or _MISSING["attention_decode", "CPU"] or _too_wide(case)


def _cuda_refusal(case):
    refusal = library.cuda_refusal(case.device, case.dtype) or _MISSING["attention_fwd", "CUDA"]
    if refusal is None and case.grad:
        refusal = _MISSING["attention_bwd", "CUDA"]
    return refusal or attention_cuda_rules.refusal(case)


# Scores of all heads, at a head dimension of 64, from which our CPU kernel was measured faster than PyTorch's: below
# them the way to it costs more than it saves (about 45 us forward, 75 with gradients; two threads, AVX2, 2026-11-25,
# one alternating run over T 16 to 256). By dtype, and whether gradients are wanted: dense; causal, or hidden otherwise.
CPU_FASTER_FROM = {
    (torch.float32, False): (1 << 18, 1 << 16),
    (torch.float32, True): (1 << 17, 1 << 15),
    (torch.bfloat16, False): (1 << 17, 1 << 16),
    (torch.bfloat16, True): (1 << 12, 1 << 12),
}
# The same for bfloat16 where its pairs are multiplied (two threads, AVX512-BF16, 2026-11-28), dense and causal alike.
CPU_FASTER_FROM_WITH_DOTS = {False: 1 << 15, True: 1 << 11}
# The same on processors with a tile unit (one and two threads, 2026-11-29): fp32, whose kernel is AVX-512's, and bf16.
CPU_FASTER_FROM_WITH_TILES = {
    (torch.float32, False): 1 << 15,
    (torch.float32, True): 1 << 15,
    (torch.bfloat16, False): 1 << 11,
    (torch.bfloat16, True): 1 << 11,
}


def _least(dtype, grad, hides):
    if native.isa_has("amx"):
        return CPU_FASTER_FROM_WITH_TILES.get((dtype, grad), 0)
    if dtype == torch.bfloat16 and native.bf16_dots():
        return CPU_FASTER_FROM_WITH_DOTS[grad]
    return CPU_FASTER_FROM.get((dtype, grad), (0, 0))[hides]


def _cpu_prefers(case):
    if torch_refusal(case) is not None:
        return None  # what is left is the reference, which keeps whole matrices of Tq x Tk
    scores = case.B * case.Hq * case.Tq * case.Tk * (case.D + case.Dv) // 128
    hides = "causal" in case.options or any(o in _MASKED for o in case.options)
    if scores < _least(case.dtype, case.grad, hides):
        return "at this size PyTorch's own scaled_dot_product_attention was measured faster"
    return None


def _gpu_prefers(case):
    if torch_refusal(case) is not None:
        return None  # what is left is the reference, which keeps whole matrices of Tq x Tk
    return "not yet measured against PyTorch's own scaled_dot_product_attention on a GPU"


def triton_prefers(case):
    return library.interpreter_is_for_tests(case) or _gpu_prefers(case)


dispatch.register(
    "attention",
    dispatch.Backend("cpu", *library.pair("attention"), _cpu_refusal, _cpu_prefers,
                     path=lambda c: "flash on the CPU"),
    dispatch.Backend("cuda", *library.pair("attention"), _cuda_refusal, note=library.NOT_RUN_ON_GPU,
                     by_name_only=f"{library.NOT_RUN_ON_GPU}: only asked for by name"),
    dispatch.Backend("triton", *library.pair("attention", "seqfuse_triton"), triton_refusal, triton_prefers,
                     note=library.NOT_RUN_ON_GPU),
    dispatch.Backend("torch", torch_attention, None, torch_refusal, note="PyTorch's own op", path=_torch_path),
    dispatch.Backend("reference", _reference, None, path=lambda c: "whole matrices of Tq x Tk in float32"),
    least=lambda: tuple(_least(*c) for c in itertools.product((torch.float32, torch.bfloat16), *[(False, True)] * 2)),
)  # fmt: skip

for _name in ("attention_fwd", "attention_bwd"):
    library.register_vmap(_name)
