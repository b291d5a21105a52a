"""Builds the host driver once per session and calls the launchers of csrc/cuda through it, on the CPU."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/include/seqfuse/types.h: enum class DType
FLAGS = [
    *["-std=c++20", "-g1", "-fno-omit-frame-pointer", "-DSEQFUSE_HOST_DEVICE", "-w"],
    *["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    *[f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}", f"-I{HERE}"],
]


class Failed(Exception):
    """The driver stopped; the text is what it said."""


class HostDevice:
    def __init__(self, folder: Path):
        self.folder = folder
        # AddressSanitizer must come first among the libraries; the driver frees nothing, it ends
        self.environment = {n: v for n, v in os.environ.items() if n != "LD_PRELOAD"}
        self.environment["ASAN_OPTIONS"] = "detect_leaks=0"
        compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
        objects = [folder / f"{source.name}.o" for source in sources]
        commands = []
        for source, target in zip(sources, objects, strict=True):
            # most of the compile time goes into the kernels, most of the run time into the scheduler
            level = "-O2" if source.name == "scheduler.cpp" else "-O0"
            commands.append([compiler, *FLAGS, level, "-x", "c++", "-c", str(source), "-o", str(target)])
        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(self._compile, commands):
                pass
        self.driver = folder / "driver"
        self._compile([compiler, "-fsanitize=address,undefined", *map(str, objects), "-ldl", "-o", str(self.driver)])

    @staticmethod
    def _compile(command):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

    def __call__(self, op, numbers=None, inputs=None, outputs=None, offset=0):
        """Run one job. numbers: name -> int or float. inputs: name -> tensor (its storage order is what is passed) or
        None. outputs: name -> (elements, dtype). offset: bytes between a 256-byte boundary and every buffer.
        Returns name -> flat tensor; raises Failed with the driver's words, a sanitizer's report among them."""
        lines = [f"op {op}"]
        for name, value in (numbers or {}).items():
            lines.append(f"float {name} {value!r}" if isinstance(value, float) else f"int {name} {int(value)}")
        for name, tensor in (inputs or {}).items():
            if tensor is None:
                continue
            path = self.folder / f"in_{name}"
            path.write_bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            lines.append(f"in {name} {path} {offset}")
        for name, (count, dtype) in (outputs or {}).items():
            lines.append(f"out {name} {self.folder / f'out_{name}'} {count * dtype.itemsize} {offset}")
        job = self.folder / "job"
        job.write_text("\n".join(lines) + "\n")
        done = subprocess.run([str(self.driver), str(job)], capture_output=True, text=True, env=self.environment)
        if done.returncode:
            raise Failed(done.stderr)
        found = {}
        for name, (count, dtype) in (outputs or {}).items():
            raw = bytearray((self.folder / f"out_{name}").read_bytes())
            found[name] = torch.frombuffer(raw, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
        return found


class Layout:
    """A sequence tensor [T, B, X] in one of the memory layouts that the contract allows."""

    def __init__(self, kind, T, B, X, dtype):
        self.shape, self.dtype = (T, B, X), dtype
        gap = 3 if kind == "padded" else 0  # as in a slice of a wider tensor
        self.strides = (X + gap, T * (X + gap)) if kind == "batch" else (B * (X + gap), X + gap)
        self.count = (T - 1) * self.strides[0] + (B - 1) * self.strides[1] + X

    def numbers(self, name):
        return {f"{name}_t": self.strides[0], f"{name}_b": self.strides[1]}

    def view(self, flat):
        return flat.as_strided(self.shape, (*self.strides, 1))

    def store(self, tensor):
        """The memory of this layout, with NaN where nothing belongs to the tensor."""
        flat = torch.full((self.count,), float("nan"), dtype=self.dtype)
        self.view(flat).copy_(tensor)
        return flat

    def untouched(self, flat):
        """Whether the gaps of an output still hold what they held before the call."""
        rest = torch.ones(self.count, dtype=torch.bool)
        self.view(rest).fill_(False)
        return bool(flat[rest].isnan().all())
