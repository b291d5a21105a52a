"""torch.library registrations: fake implementations of the C++ ops, and the Triton launchers as ops of their own.

A Triton launcher becomes `torch.ops.seqfuse_triton.NAME` with the schema of the C++ op, so that torch.compile sees one
opaque call with known output shapes either way.
"""

import functools
import importlib
import importlib.util
import os

import torch

from seqfuse import native

_triton = torch.library.Library("seqfuse_triton", "DEF")
_composed = torch.library.Library("seqfuse_composed", "DEF")


@functools.cache
def triton_missing() -> str | None:
    """None if Triton can be imported, else a sentence that says why not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def gpu_capability() -> tuple[int, int]:
    """(major, minor) of the current GPU; (0, 0) without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


gpu_capability._dynamo_marked_constant = True  # Dynamo can't trace a question to the driver


def old_gpu() -> str | None:
    """Why Triton's kernels can't run on the GPU that is there, or None."""
    if torch.version.hip:
        return "the Triton kernels are written for NVIDIA's GPUs, not for ROCm"
    major, minor = gpu_capability()
    return f"the Triton kernels need compute capability 8.0, this GPU has {major}.{minor}" if 0 < major < 8 else None


def triton_refusal(device: str, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can take a tensor of this device and dtype, or None."""
    if triton_missing():
        return triton_missing()
    if device != "cuda" and not (interpreting() and device == "cpu"):
        where = "no CUDA device is available" if not torch.cuda.is_available() else f"the tensors are on {device}"
        return f"{where}; Triton kernels need one (or TRITON_INTERPRET=1, which is slow and for tests)"
    if device == "cuda" and not interpreting() and (old := old_gpu()):
        return old
    if dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter computes bfloat16 wrongly"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def cpu_refusal(device: str, dtype: torch.dtype) -> str | None:
    """Why no CPU kernel can take a tensor of this device and dtype, or None."""
    if native.missing():
        return native.missing()
    if device != "cpu":
        return f"the tensors are on {device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the CPU kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def cuda_refusal(device: str, dtype: torch.dtype) -> str | None:
    """Why no CUDA C++ kernel can take a tensor of this device and dtype, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    if device != "cuda":
        return f"the tensors are on {device}"
    if native.missing():
        return native.missing()
    if not native.has_cuda():
        return "seqfuse was built without CUDA (a CUDA torch and nvcc must be there when it is built)"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the CUDA kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


NOT_RUN_ON_GPU = "compiled and interpreted, not yet run on a GPU"


def launcher(module: str, name: str):
    """seqfuse.kernels.MODULE.NAME, imported at the first call: Triton may be missing, and is slow to import."""
    return lambda *args: getattr(importlib.import_module(f"seqfuse.kernels.{module}"), name)(*args)


def register_fake(name: str, fake) -> None:
    """Register the fake of torch.ops.seqfuse.NAME, if the extension that defines it is there."""
    if native.missing() is None:
        torch.library.register_fake(f"seqfuse::{name}", fake)


def register_triton(name: str, schema: str, fake, launch) -> None:
    """Register a Triton launcher as torch.ops.seqfuse_triton.NAME."""
    _triton.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _triton.impl(name, launch, "CUDA")
    _triton.impl(name, launch, "CPU")  # the interpreter
    torch.library.register_fake(f"seqfuse_triton::{name}", fake, lib=_triton)


def register_op(name: str, schema: str, fake, launch) -> None:
    """Register the fake of torch.ops.seqfuse.NAME, and a Triton launcher with the same schema."""
    register_triton(name, schema, fake, launch)
    register_fake(name, fake)


def register_composed(name: str, schema: str, fake, run) -> None:
    """Register torch.ops.seqfuse_composed.NAME: GEMMs of ATen with kernels of ours in between, put together in Python.

    One opaque call for torch.compile, however many blocks it works through. No autograd reaches into it.
    """
    run = torch.no_grad()(run)
    _composed.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _composed.impl(name, run, "CPU")
    _composed.impl(name, run, "CUDA")
    torch.library.register_fake(f"seqfuse_composed::{name}", fake, lib=_composed)


def register_vmap(name: str) -> None:
    """torch.vmap over the op of this name: one call for each member, stacked. Its GEMMs outside become batched ones."""
    if native.missing() is None:
        torch.library.register_vmap(f"seqfuse::{name}", _member_by_member("seqfuse", name))
    if hasattr(torch.ops.seqfuse_triton, name):
        torch.library.register_vmap(f"seqfuse_triton::{name}", _member_by_member("seqfuse_triton", name), lib=_triton)


def _member_by_member(namespace, name):
    def rule(info, in_dims, *args):
        op = getattr(getattr(torch.ops, namespace), name)
        members = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        out = tuple(torch.stack(parts) for parts in zip(*members, strict=True))
        return out, (0,) * len(out)

    return rule


def kernel(name: str, namespace: str = "seqfuse"):
    """torch.ops.NAMESPACE.NAME as a function of a Backend; looked up when it is called, for it may not be there."""
    return lambda *args: getattr(getattr(torch.ops, namespace), name).default(*args)


def pair(name: str, namespace: str = "seqfuse"):
    """(fwd, bwd) of a Backend whose ops are called NAME_fwd and NAME_bwd."""
    return kernel(f"{name}_fwd", namespace), kernel(f"{name}_bwd", namespace)


def interpreter_is_for_tests(case) -> str | None:
    """Why `auto` passes Triton over where it would be interpreted, or None."""
    return "the interpreter is for tests" if case.device == "cpu" else None


def has_kernel(name: str, key: str) -> bool:
    """Whether torch.ops.seqfuse.NAME is implemented for this dispatch key ("CPU", "CUDA")."""
    if native.missing() is not None:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"seqfuse::{name}", key)
