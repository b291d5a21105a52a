"""How a case is timed.

Contenders alternate, A B C A B C ..., so that whatever else the machine does meets all of them alike, and the speed-up
is the median of the ratios within each round. A sample is many calls if one call is short. Warm-up first; then rounds
until the medians are settled or the time is used up.

On a GPU a sample is one CUDA-graph replay between two events (if the contender can't be captured: many launches), over
sets of inputs that together exceed the L2 cache. The time that the host needs to issue a call is measured apart.
"""

import contextlib
import ctypes
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

SAMPLE_SECONDS = 1e-3  # a sample is at least this long
MAX_ROUNDS = 1000
SETTLED = 0.004  # relative standard error of a median at which more rounds would tell nothing new


@dataclass(frozen=True)
class Contender:
    """One implementation of a case. call(i) runs it on the i-th set of inputs; scope is entered around many calls.

    asked: the backend that a contender of ours is asked to run on ("auto" included); "" for the baselines.
    check: what the gate judges instead of the results of call(0). captured: whether a CUDA graph may hold call.
    """

    name: str
    call: Callable[[int], Sequence[torch.Tensor]]
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    asked: str = ""
    check: Callable[[], Sequence[torch.Tensor]] | None = None
    captured: bool = True


@dataclass
class Timing:
    """Seconds a call, one for each round. how: what a sample was. host: seconds to issue a call (GPU only)."""

    samples: list[float] = field(default_factory=list)
    how: str = ""
    host: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def spread(self) -> tuple[float, float]:
        """The 10th and the 90th percentile."""
        ordered = sorted(self.samples)
        last = len(ordered) - 1
        return ordered[round(0.1 * last)], ordered[round(0.9 * last)]


class CpuTimer:
    """Wall-clock time of a run of calls. The inputs stay in the caches if they fit, as they do for every contender."""

    sets = 1

    def prepare(self, contender: Contender, timing: Timing) -> Callable[[], float]:
        def run(calls: int) -> float:
            with contender.scope():
                start = time.perf_counter()
                for _ in range(calls):
                    contender.call(0)
                return (time.perf_counter() - start) / calls

        run(1)
        one = run(1)
        if one < SAMPLE_SECONDS:
            one = min(one, run(10))
        calls = max(1, math.ceil(SAMPLE_SECONDS / one))
        timing.how = f"wall clock, {calls} calls"
        return lambda: run(calls)


class CudaTimer:
    """Device time, and host time apart."""

    def __init__(self, sets: int):
        self.sets = sets

    def prepare(self, contender: Contender, timing: Timing) -> Callable[[], float]:
        def run(calls: int) -> None:
            for i in range(calls):
                contender.call(i % self.sets)

        stream = torch.cuda.Stream()  # capture wants its warm-up on a stream of its own
        stream.wait_stream(torch.cuda.current_stream())
        with contender.scope(), torch.cuda.stream(stream):
            run(3 + self.sets)
            one = self._between_events(lambda: run(self.sets)) / self.sets
        torch.cuda.current_stream().wait_stream(stream)
        calls = max(self.sets, min(256, math.ceil(2 * SAMPLE_SECONDS / one)))
        timing.host = self._host_time(contender, run)
        if not contender.captured:
            return self._launches(contender, timing, run, calls)
        try:
            graph = torch.cuda.CUDAGraph()
            with contender.scope(), torch.cuda.graph(graph):
                run(calls)
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError:  # something in it synchronises, or launches what a graph can't hold
            torch.cuda.synchronize()
            return self._launches(contender, timing, run, calls)
        timing.how = f"replay of a graph of {calls} calls"
        return lambda: self._between_events(graph.replay) / calls

    def _launches(self, contender: Contender, timing: Timing, run, calls: int) -> Callable[[], float]:
        timing.how = f"events around {calls} launches"
        return lambda: self._scoped(contender, lambda: run(calls)) / calls

    def _scoped(self, contender: Contender, work: Callable[[], None]) -> float:
        with contender.scope():
            return self._between_events(work)

    @staticmethod
    def _between_events(work: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    @staticmethod
    def _host_time(contender: Contender, run: Callable[[int], None], calls: int = 10) -> float:
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            with contender.scope():
                start = time.perf_counter()
                run(calls)
                times.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
        return statistics.median(times)


def timer(device: str, set_bytes: float) -> CpuTimer | CudaTimer:
    """The timer for a device. set_bytes: size of one set of inputs, which says how many sets exceed the L2 cache."""
    if device == "cpu":
        return CpuTimer()
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return CudaTimer(max(2, min(32, math.ceil(2 * cache / max(set_bytes, 1)))))


def alternate(
    contenders: Sequence[Contender], clock: CpuTimer | CudaTimer, seconds: float, min_rounds: int = 5
) -> dict[str, Timing]:
    """Time the contenders in turn: in every round each takes one sample, in the order given."""
    timings = {c.name: Timing() for c in contenders}
    with undisturbed():
        takers = [(timings[c.name], clock.prepare(c, timings[c.name])) for c in contenders]
        start = time.perf_counter()
        for rounds in range(1, MAX_ROUNDS + 1):
            for timing, take in takers:
                timing.samples.append(take())
            enough = time.perf_counter() - start > seconds or all(map(_settled, timings.values()))
            if rounds >= min_rounds and enough:
                break
    return timings


def _settled(timing: Timing) -> bool:
    n = len(timing.samples)
    if n < 20:
        return False
    low, _, high = statistics.quantiles(timing.samples, n=4)
    # standard error of a median: 1.25 sigma / sqrt(n), with sigma from the quartiles
    return 1.25 * (high - low) / 1.35 / math.sqrt(n) < SETTLED * timing.median


def ratio(baseline: Timing, contender: Timing) -> float:
    """How many times faster than the baseline: the median over the rounds."""
    return statistics.median(b / c for b, c in zip(baseline.samples, contender.samples, strict=True))


def keep_freed_memory(keep: bool = True) -> None:
    """Let glibc keep what is freed for the next call, for every contender alike; or (False) no longer.

    Left alone it gives megabytes back to the system at moments of its own choosing, and the next call that asks for
    them pays for every page again: at 2 MB a result, 0 to 700 page faults a call were seen, from nothing but the order
    of earlier allocations. Only while something is timed: over hundreds of training steps the heap that keeps
    everything falls into pieces, and grows by gigabytes. Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30 if keep else 32 << 20)  # M_MMAP_THRESHOLD; the lower is what glibc's own rises to
        mallopt(-1, 2**31 - 1 if keep else 64 << 20)  # M_TRIM_THRESHOLD


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection, no debugging modes, no page faults, and float32 that means float32 for every contender."""
    keep_freed_memory()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        keep_freed_memory(False)
        if collecting:
            gc.enable()
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


MEMORY = {
    "cpu": "most bytes held at once from torch's CPU allocator during one call, above what was held before it "
    "(scratch that a kernel takes from malloc itself is not seen)",
    "cuda": "torch.cuda.max_memory_allocated during one call, above what was held before it",
}


def peak_memory(contender: Contender, device: str) -> int:
    """Bytes: what MEMORY[device] says."""
    with contender.scope():
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contender.call(0)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with _no_stderr(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            results = contender.call(0)
        del results
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler's C++ side prints its starts and stops; the variable that stops it is read as torch is loaded."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
