"""Ahead-of-time compilation of what the Triton launchers launch, without a GPU.

`record` runs a launcher on meta tensors and notes its launches instead of doing them, with the argument types,
alignments and constants Triton would specialise for; `compile_all` compiles them for a GPU that is not there and
reads the resources back from the cubin. So what is checked is what a GPU would be given, block sizes included.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from unittest import mock

import torch

from seqfuse.kernels import common

WORKERS = 2


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel, specialised, for one architecture."""

    label: str
    arch: int
    module: str
    kernel: str
    signature: tuple[tuple[str, str | tuple], ...]
    constants: tuple[tuple[tuple[int, ...], object], ...]
    divisible: tuple[tuple[int, ...], ...]
    num_warps: int
    maxnreg: int | None
    cooperative: bool

    def __str__(self) -> str:
        return f"{self.label} {self.kernel} sm_{self.arch}"

    def named_constants(self) -> dict[str, object]:
        names = [name for name, _ in self.signature]
        return {names[path[0]]: value for path, value in self.constants if len(path) == 1}


@dataclasses.dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    shared: int
    ptx: str


def _specialise(kernel, args: tuple, constants: dict) -> tuple[dict, dict, list]:
    """Signature, constants and 16-divisible arguments, as triton.jit derives them from a call; the latter two by path:
    (argument,), or (argument, field) inside a named tuple."""
    consts, divisible = {}, []

    def kind(value, path, is_constexpr, specialise):
        if is_constexpr or value is None:
            consts[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return type(value)(*(kind(v, (*path, i), False, specialise) for i, v in enumerate(value)))
        if isinstance(value, torch.Tensor):
            divisible.append(path)  # torch's allocations are aligned
            return f"*{common.TL_DTYPES[value.dtype]}".replace("uint", "u").replace("int", "i")
        if isinstance(value, float):
            return "fp32"
        if value == 1 and specialise:
            consts[path] = 1
            return "constexpr"
        if value % 16 == 0 and specialise:
            divisible.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    signature = {}
    for i, parameter in enumerate(kernel.params):
        specialise = not parameter.do_not_specialize
        signature[parameter.name] = kind(values[parameter.name], (i,), parameter.is_constexpr, specialise)
    return signature, consts, divisible


def record(label: str, arch: int, call: Callable[[], object], sm_count: int = 132) -> list[Job]:
    """The distinct launches of `call`, which runs a launcher on meta tensors, on a GPU of this architecture."""
    jobs: dict[Job, None] = {}

    def note(kernel, grid, *args, num_warps=4, maxnreg=None, cooperative=False, **constants):
        assert all(isinstance(n, int) and n > 0 for n in grid), grid
        signature, consts, divisible = _specialise(kernel, args, constants)
        job = Job(
            label, arch, kernel.__module__, kernel.__name__, tuple(signature.items()), tuple(consts.items()),
            tuple(divisible), num_warps, maxnreg, cooperative,
        )  # fmt: skip
        jobs[job] = None

    facts = (divmod(arch, 10), sm_count)
    with mock.patch.object(common, "launch", note), mock.patch.object(common, "_facts", lambda device: facts):
        call()
    return list(jobs)


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) from the cuobjdump that comes with Triton."""
    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage, text
    return int(usage[1]), int(usage[2])


def compile_job(job: Job) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    attrs = {path: [["tt.divisibility", 16]] for path in job.divisible}
    source = ASTSource(kernel, dict(job.signature), dict(job.constants), attrs)
    options = {"num_warps": job.num_warps, "num_stages": 2, "maxnreg": job.maxnreg, "enable_fp_fusion": True}
    options |= {"launch_cooperative_grid": job.cooperative}
    binary = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    registers, stack = _read_cubin(binary.asm["cubin"])
    return Resources(registers, stack, binary.metadata.shared, binary.asm["ptx"])


@contextlib.contextmanager
def _cache_dir():
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": folder}):
        yield


def compile_all(jobs: Iterable[Job]) -> dict[Job, Resources]:
    jobs = list(dict.fromkeys(jobs))
    context = multiprocessing.get_context("spawn")
    with _cache_dir(), concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        return dict(zip(jobs, pool.map(compile_job, jobs, chunksize=4), strict=True))
