"""What this machine can do at best, measured in the same run: a large matrix product, and copies."""

import functools
import math
import time

import torch

from seqfuse.benchmarks.harness import CudaTimer, undisturbed
from seqfuse.benchmarks.registry import DTYPES


class Ceilings:
    """Best of several repeats, each measured at its first use. A rate above 100% of one is a mistake somewhere."""

    def __init__(self, device: str, quick: bool = False):
        self.device, self.repeats = device, 5 if quick else 12
        self.gemm_size = {"cpu": 1024 if quick else 2048, "cuda": 8192}[device]
        self.large_copy = 1 << (28 if device == "cpu" else 31)

    @functools.cache  # noqa: B019  one object a run
    def gemm(self, dtype: str) -> float:
        """FLOP/s of a large square matrix product; of a smaller one where a large one takes seconds (bfloat16 on a CPU
        without instructions for it)."""
        n = 256

        def product():
            a, b = (torch.randn(n, n, device=self.device).to(DTYPES[dtype]) for _ in range(2))
            return self._best(lambda: torch.mm(a, b))

        small = product()
        if self.device == "cuda" or small * (self.gemm_size / n) ** 3 < 1.0:
            n = self.gemm_size
            return 2.0 * n**3 / product()
        return 2.0 * n**3 / small

    @functools.cache  # noqa: B019
    def copy(self, moved: int) -> float:
        """Bytes a second, read plus written, of a copy that moves `moved` bytes."""
        source = torch.randn(moved // 8, device=self.device)
        target = torch.empty_like(source)
        calls = max(1, min(100, (1 << 26) // moved))
        return 2.0 * source.nbytes * calls / self._best(lambda: [target.copy_(source) for _ in range(calls)])

    def limit(self, bound: str, dtype: str, moved: float) -> float:
        """FLOP/s or bytes/s that a case of this kind could reach at most.

        On a CPU the copy is as large as the case: tensors that fit the caches are not limited by the memory. On a GPU
        the inputs rotate past the cache, so the limit is the large copy.
        """
        if bound == "compute":
            return self.gemm(dtype)
        if self.device == "cuda":
            return self.copy(self.large_copy)
        return self.copy(min(self.large_copy, max(1 << 12, 1 << round(math.log2(moved)))))

    def measured(self) -> dict[str, float]:
        """{what: rate} for the record; measures what was not yet."""
        out = {"copy_GB/s": round(self.copy(self.large_copy) / 1e9, 1)}
        for dtype in ("fp32", "bf16") if self.device == "cpu" else DTYPES:
            out[f"gemm_{dtype}_TFLOP/s"] = round(self.gemm(dtype) / 1e12, 4)
        return out

    def _best(self, work) -> float:
        with undisturbed(), torch.no_grad():
            work()
            if self.device == "cuda":
                return min(CudaTimer._between_events(work) for _ in range(self.repeats))
            times = []
            for _ in range(self.repeats):
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
            return min(times)
