"""What the CUDA C++ attention kernels for Hopper take, on plain values: no tensor and no device is needed to ask."""

import torch

HEAD_SIZES = (64, 128)
OPTIONS = frozenset({"causal", "return_lse"})


def refusal(case) -> str | None:
    """Why the kernel can't take the case, or None.

    case: anything with dtype (torch.dtype), D, Dv (head sizes of q and v), capability ((major, minor) of the device),
    options (names of what the call uses beyond softmax(q k^T) v; "causal" is the bottom-right one) and scale (float).
    Forward and backward take the same; backward is deterministic.
    """
    if case.capability != (9, 0):
        return f"the CUDA C++ attention kernels need compute capability 9.0, this device has {_dotted(case.capability)}"
    if case.dtype not in (torch.bfloat16, torch.float16):
        name = str(case.dtype).removeprefix("torch.")
        return f"the CUDA C++ attention kernels take bfloat16 and float16, not {name}"
    if case.D != case.Dv or case.D not in HEAD_SIZES:
        return f"the CUDA C++ attention kernels take heads of 64 and 128, not D={case.D} with Dv={case.Dv}"
    others = sorted(set(case.options) - OPTIONS)
    if others:
        return f"the CUDA C++ attention kernels do not take {others[0]}"
    if not case.scale > 0:
        return f"the CUDA C++ attention kernels take a positive scale, not {case.scale}"
    return None


def _dotted(capability):
    return ".".join(map(str, capability))
