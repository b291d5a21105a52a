"""The registry through pytest-benchmark: `pytest benchmarks/ --benchmark-only` (the quick cases; --all-cases for all).

Each case is one group of two, PyTorch's own module and seqfuse; the gate comes first here too. pytest-benchmark times
the contenders one after the other, so on a machine that does something else `seqfuse bench`, which alternates them, is
the one to believe.
"""

import pytest
import torch

from seqfuse.benchmarks import contenders, gate, harness, registry

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark (pip install seqfuse[test])")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    everything = metafunc.config.getoption("--all-cases")
    rows = [
        (case, dtype, mode)
        for case in registry.find()
        if DEVICE in case.devices and (case.quick or everything) and case.missing() is None
        for dtype in case.dtypes(DEVICE)
        for mode in case.modes
    ]
    metafunc.parametrize("case,dtype,mode", rows, ids=[f"{c.id}-{d}-{m}" for c, d, m in rows], scope="module")


@pytest.fixture(scope="module")
def problem(case, dtype):
    built = case.build(DEVICE, dtype, quick=True)
    return built, built.truth()


@pytest.mark.parametrize("who", ["eager", "seqfuse"])
@pytest.mark.benchmark(min_rounds=3, max_time=0.2, warmup=True, warmup_iterations=2)
def test_bench(problem, case, dtype, mode, who, benchmark):
    built, truth = problem
    names = built.result_names(mode)
    everyone, _ = case.line_up(built, mode, ["auto"], compile=False)
    contender = everyone[0]
    yardstick, _, _ = contenders.call_once(contender, case.op)
    if who == "seqfuse":
        contender = next(c for c in everyone if c.asked)
        results, choice, _ = contenders.call_once(contender, case.op)
        verdict = gate.judge(results, truth[: len(names)], yardstick, names, case.worst)
        assert verdict.wrong is None, verdict.wrong
        benchmark.extra_info.update(error=verdict.error)
        if choice is not None:
            benchmark.extra_info.update(backend=choice.backend, reason=choice.reason)
    benchmark.group = f"{case.id} {dtype} {mode}"

    def call():
        contender.call(0)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with harness.undisturbed(), contender.scope():
        benchmark(call)
