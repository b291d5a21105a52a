"""What every Triton launcher shares: dtypes, device facts, block-size tables, and the one place that launches.

All launches go through `launch`, so that floating-point fusion is stated once (Triton's default changes in 3.10)
and so that the ahead-of-time tests can record exactly what a launcher would compile, without a GPU.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl

TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}

# triton.jit decides when it decorates, so the answer is fixed once the first kernel module was imported.
_INTERPRETING = bool(triton.knobs.runtime.interpret)

# How the kernels look for a tensor that is not on a GPU (interpreter, tests): an H100 with few multiprocessors,
# so that the loops of persistent kernels run more than once on small tensors.
_INTERPRETED_CAPABILITY = (9, 0)
_INTERPRETED_SM_COUNT = 3

# Bytes of shared memory one CTA may use, by compute capability.
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}

# Block-size tables, (op, architecture) -> rows of (largest N, rows per program, warps, who may), first fit wins.
# None stands for every architecture without a row of its own. N beyond the last row takes the chunked kernels. The
# widest rows leave few registers, so odd addresses (narrow loads) or 32-bit elements would spill there.
# Chosen from the compiled registers and spills (docs/triton.md); no figure in here was tuned on a GPU yet.
_ANY, _ALIGNED, _ALIGNED_16_BIT = range(3)
_BLOCKS: dict[tuple[str, int | None], tuple[tuple[int, int, int, int], ...]] = {
    ("layer_norm_fwd", None): (
        (64, 32, 4, _ANY),
        (128, 16, 4, _ANY),
        (256, 8, 4, _ANY),
        (512, 4, 4, _ANY),
        (1024, 2, 4, _ANY),
        (4096, 1, 4, _ANY),
        (8192, 1, 8, _ANY),
        (16384, 1, 16, _ANY),
        (32768, 1, 16, _ALIGNED_16_BIT),
    ),
    ("layer_norm_bwd", None): (
        (64, 32, 4, _ANY),
        (128, 16, 4, _ANY),
        (256, 8, 4, _ANY),
        (512, 4, 4, _ANY),
        (1024, 2, 4, _ANY),
        (4096, 1, 8, _ANY),
        (8192, 1, 16, _ALIGNED),
    ),
}


def blocks(op: str, n: int, itemsize: int, capability: tuple[int, int]) -> tuple[int, int] | None:
    """(rows per program, warps) for a row of `n` elements, or None where the row does not fit in registers."""
    table = _BLOCKS.get((op, arch(capability)), _BLOCKS[op, None])
    kind = _ANY if n % 16 else _ALIGNED if itemsize > 2 else _ALIGNED_16_BIT
    for largest, rows, warps, who in table:
        if n <= largest and who <= kind:
            return rows, warps
    return None


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""
    return _INTERPRETING


def arch(capability: tuple[int, int]) -> int:
    return capability[0] * 10 + capability[1]


def shared_memory(capability: tuple[int, int]) -> int:
    """Shared memory one CTA may use, in bytes; an unknown architecture is taken for a small one."""
    return SHARED_MEMORY.get(arch(capability), 101376)


@functools.cache
def _cuda_facts(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def _facts(device: torch.device) -> tuple[tuple[int, int], int]:
    if device.type == "cuda":
        return _cuda_facts(torch.cuda.current_device() if device.index is None else device.index)
    return _INTERPRETED_CAPABILITY, _INTERPRETED_SM_COUNT


def capability(device: torch.device) -> tuple[int, int]:
    return _facts(device)[0]


def sm_count(device: torch.device) -> int:
    """Multiprocessors of `device`; a small number when interpreting, so that persistent loops loop."""
    return _facts(device)[1]


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def max_registers(warps: int) -> int:
    """Registers a thread may have when one program fills a multiprocessor."""
    return min(255, 65536 // (32 * warps))


def launch(
    kernel,
    grid: tuple[int, ...],
    *args,
    num_warps: int = 4,
    maxnreg: int | None = None,
    cooperative: bool = False,
    **constants,
) -> None:
    """cooperative: the driver starts all programs at once, or none and raises: they may then wait for each other."""
    if cooperative and not interpreting():
        constants["launch_cooperative_grid"] = True
    if maxnreg is not None:
        constants["maxnreg"] = maxnreg
    kernel[grid](*args, num_warps=num_warps, num_stages=2, enable_fp_fusion=True, **constants)
