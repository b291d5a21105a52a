"""The benchmarks: what is registered makes sense, a wrong kernel gets no speed, records hold what they promise."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import seqfuse
from seqfuse import dispatch, native, tuned
from seqfuse.benchmarks import (
    attention,
    contenders,
    gate,
    harness,
    norms,
    records,
    recurrent,
    registry,
    run,
    tune,
)
from seqfuse.benchmarks.__main__ import app
from seqfuse.benchmarks.ceilings import Ceilings
from seqfuse.benchmarks.records import Row
from seqfuse.ops import products

ROOT = Path(__file__).resolve().parent.parent
CASES = registry.find()
TINY_NORM = norms.Norm("layer_norm", rows=96, cols=128, quick=True)
TINY_GRU = recurrent.Recurrent("gru", T=4, B=3, H=8, quick=True)
TINY = [
    TINY_NORM,
    norms.Norm("layer_norm", rows=5, cols=16, residual=True),
    TINY_GRU,
    recurrent.Recurrent("lstm", T=3, B=2, H=5, layers=2, bidirectional=True),
    recurrent.Recurrent("rnn", T=3, B=1, H=4),
    *(
        attention.AttentionCase("attention", kind=k, B=2, H=2, T=19, D=8, window=5)
        for k in ("causal", "window", "bias", "biases", "softcap")
    ),
    attention.DecodeCase("attention_decode", B=2, H=4, Hkv=2, T=19, D=8),
]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The command on two tiny cases, with ceilings that cost nothing and a tuned table of its own."""
    monkeypatch.setattr(registry, "suites", lambda: {"norms": (TINY_NORM,), "recurrent": (TINY_GRU,)})
    monkeypatch.setattr(Ceilings, "_best", lambda self, work: 1e-3)
    monkeypatch.setattr(Ceilings, "__init__", _small_ceilings)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuned.reload()
    yield tmp_path
    monkeypatch.undo()
    tuned.reload()
    dispatch.forget()


def _small_ceilings(self, device, quick=False):
    self.device, self.repeats, self.gemm_size, self.large_copy = device, 1, 8, 1 << 12


def bench(*args, **options):
    options = {"device": "cpu", "seconds": 0.01, "compile": False, **options}
    return run.main(*args, **options)


def broken(monkeypatch, fwd):
    """Replace layer_norm's `cpu` backend by one that is differentiable and runs everywhere."""
    monkeypatch.setitem(dispatch._ops["layer_norm"], "cpu", dispatch.Backend("cpu", fwd, None))
    dispatch.forget()


class TestRegistry:
    def test_ids_are_unique(self):
        assert len({c.id for c in CASES}) == len(CASES)

    @pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
    def test_work_and_traffic(self, case):
        assert 0 < case.flops("fwd") < math.inf and 0 < case.bytes("fwd", 2) < case.bytes("fwd", 4)
        if "fwd+bwd" in case.modes:
            assert case.flops("fwd") < case.flops("fwd+bwd") and case.bytes("fwd", 4) < case.bytes("fwd+bwd", 4)
        if case.op == "decode":  # in 16 bits two roundings soon choose different tokens
            assert case.dtypes("cpu") == case.dtypes("cuda") == ("fp32",)
            return
        model = "step" in case.modes
        slow = (case.op == "linear_cross_entropy" or model) and products.SLOW_BF16  # ATen's products would take minutes
        assert set(case.dtypes("cpu")) == ({"fp32"} if slow else {"fp32", "bf16"})
        assert ("fp16" in case.dtypes("cuda")) != model

    def test_work_of_known_sizes(self):
        assert recurrent.Recurrent("gru", T=2, B=3, H=4).flops("fwd") == 2 * (2 * 3) * (3 * 4) * (4 + 4)
        # two layers of two directions: the second layer reads both directions of the first
        both = recurrent.Recurrent("lstm", T=1, B=1, H=4, layers=2, bidirectional=True)
        assert both.flops("fwd") == 2 * 2 * (16 * (4 + 4) + 16 * (8 + 4))
        assert norms.Norm("layer_norm", rows=10, cols=8).bytes("fwd", 4) == 4 * (2 * 80 + 2 * 8)
        window = attention.AttentionCase("attention", kind="window", B=3, H=2, T=5, D=4, window=2)
        assert window.scores == 1 + 2 + 2 + 2 + 2 and window.flops("fwd") == 4 * 4 * 9 * 3 * 2

    def test_sizes_of_the_targets_are_there(self):
        ids = {c.id for c in CASES}
        rows = "512x1024", "2048x768", "4096x512"
        assert {f"layer_norm/{n}{r}" for n in rows for r in ("", "-residual")} <= ids
        for op in ("gru", "lstm", "rnn"):
            assert {f"{op}/{n}" for n in ("T64-B32-H512", "T128-B16-H256", "T256-B1-H512", "T64-B4-H320")} <= ids
        sizes = {f"T{T}-D{D}" for T in (256, 1024, 2048, 4096) for D in (64, 128)}
        for kind in ("causal", "dense"):
            assert sizes <= {i.split("H8-")[-1].split("H4-")[-1] for i in ids if i.startswith(f"attention/{kind}")}
        assert {f"attention/{kind}-B1-H8-T16384-D128" for kind in ("causal", "dense")} <= ids
        assert {"attention/window-B1-H4-T4096-D64", "attention/bias-B1-H8-T2048-D64"} <= ids

    def test_find(self):
        assert registry.find(["gru", "lstm", "rnn", "rnn_cell"]) == registry.find(["recurrent"])
        assert {c.op for c in registry.find(["norms", "gru"])} == {"layer_norm", "rms_norm", "gru"}
        assert registry.find(["gru", "recurrent"]) == registry.find(["recurrent"])
        for name in registry.SUITES:
            assert any(c.quick for c in registry.find([name]))

    @pytest.mark.parametrize("case,mode", [(c, m) for c in TINY for m in c.modes], ids=lambda v: getattr(v, "id", v))
    def test_contenders_agree(self, case, mode):
        problem = case.build("cpu", "fp32")
        names = problem.result_names(mode)
        truth = problem.truth()[: len(names)]
        others = [contenders.eager(problem, mode), *contenders.others(problem, mode)]
        yardstick = contenders.call_once(others[0], case.op)[0]
        for contender in [*others, contenders.ours(problem, mode, "auto"), contenders.ours(problem, mode, "reference")]:
            results, choice, described = contenders.call_once(contender, case.op)
            assert [r.requires_grad for r in results] == [False] * len(names)
            assert gate.judge(results, truth, yardstick, names, case.worst).wrong is None
            assert (choice is not None) == bool(contender.asked)
        assert described == contenders.describe(problem, mode) and described.grad == (mode == "fwd+bwd")

    def test_the_kernels_below_pytorchs_op_compete_on_a_gpu(self):
        """Flash attention by name also runs here, and the truth is found head by head."""
        case = attention.AttentionCase("attention", B=2, H=2, T=19, D=8, devices=("cuda",))
        problem = case.build("cpu", "fp32")
        found = {c.name: c for c in contenders.others(problem, "fwd+bwd")}
        assert list(found) == ["SDPA flash", "SDPA cuDNN", "FlexAttention compiled"]
        names, truth = problem.result_names("fwd+bwd"), problem.truth()
        whole = registry.Case.truth_of(case, problem.ours, *problem.samples[0][:1], [], problem.samples[0][1])
        yardstick = contenders.call_once(contenders.eager(problem, "fwd+bwd"), "attention")[0]
        for results in (contenders.call_once(found["SDPA flash"], "attention")[0], [t.detach() for t in whole]):
            assert gate.judge(results, truth, yardstick, names, case.worst).wrong is None

    def test_data_is_random_and_repeatable(self):
        first, again = (TINY_NORM.build("cpu", "fp32", sets=2) for _ in range(2))
        (x, *_), (dy,) = first.samples[0]
        assert torch.equal(x, again.samples[0][0][0]) and not torch.equal(x, first.samples[1][0][0])
        for t in (x, dy, *first.ours.parameters()):
            assert t.detach().std() > 0.05
        assert all(map(torch.equal, first.eager.parameters(), first.ours.parameters()))


class TestHarness:
    def test_contenders_alternate(self):
        order, entered = [], []

        class Clock:
            def prepare(self, contender, timing):
                return lambda: order.append(contender.name) or 1.0

        made = [harness.Contender(n, lambda i: entered.append(i)) for n in "ABC"]
        timings = harness.alternate(made, Clock(), seconds=0, min_rounds=4)
        assert "".join(order) == "ABC" * 4 and not entered
        assert [len(t.samples) for t in timings.values()] == [4, 4, 4]

    def test_stops_when_settled(self):
        class Clock:
            def prepare(self, contender, timing):
                return lambda: 1.0

        timings = harness.alternate([harness.Contender("A", lambda i: ())], Clock(), seconds=60)
        assert len(timings["A"].samples) == 20

    def test_ratio_is_taken_within_rounds(self):
        # a disturbance that doubles whole rounds leaves the ratio alone
        eager, ours = harness.Timing([2.0, 4.0, 2.0, 8.0]), harness.Timing([1.0, 2.0, 1.0, 4.0])
        assert harness.ratio(eager, ours) == 2.0
        assert harness.Timing([float(i) for i in range(11)]).spread() == (1.0, 9.0)

    def test_short_calls_are_repeated_inside_the_scope(self):
        entered, calls = [], []

        class Scope:
            def __enter__(self):
                entered.append(len(calls))

            def __exit__(self, *_):
                pass

        timing = harness.Timing()
        take = harness.CpuTimer().prepare(harness.Contender("A", calls.append, Scope), timing)
        calls.clear()
        entered.clear()
        assert 0 < take() < harness.SAMPLE_SECONDS
        assert entered == [0] and len(calls) > 10 and str(len(calls)) in timing.how

    @pytest.mark.parametrize("capturable", [True, False])
    def test_cuda_timer_rotates_inputs(self, monkeypatch, capturable):
        """The logic only, with stand-ins for the device: graph or launches, and every set of inputs in turn."""
        calls, replays = [], []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = len(calls) + 30 * len(replays)

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 0.1 * (end.at - self.at)  # 0.1 ms a call

        class Graph:
            def replay(self):
                replays.append(1)

        class Stream:
            def wait_stream(self, other):
                pass

        @contextlib.contextmanager
        def capture(graph):
            before = len(calls)
            yield
            assert calls[before:] == [i % 3 for i in range(20)]  # 2 ms in a sample
            if not capturable:
                raise RuntimeError("operation not permitted when stream is capturing")

        for name, value in dict(
            Event=Event, CUDAGraph=Graph, Stream=Stream, current_stream=Stream, graph=capture,
            stream=contextlib.nullcontext, synchronize=lambda: None,
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        timing = harness.Timing()
        take = harness.CudaTimer(sets=3).prepare(harness.Contender("A", calls.append), timing)
        calls.clear()
        replays.clear()
        seconds = take()
        if capturable:
            assert (len(calls), len(replays)) == (0, 1) and "graph of 20 calls" in timing.how
            assert seconds == pytest.approx(30 * 1e-4 / 20)
        else:
            assert calls == [i % 3 for i in range(20)] and not replays and "20 launches" in timing.how
            assert seconds == pytest.approx(1e-4)
        assert timing.host > 0

    def test_peak_memory(self):
        def call(i):
            a = torch.empty(1000, dtype=torch.float32)
            b = a + 1  # 8,000 bytes are held here
            del a
            return [b, torch.empty(500, dtype=torch.float32)]

        torch.utils.deterministic.fill_uninitialized_memory = False  # filling makes scalars of its own
        try:
            peak = harness.peak_memory(harness.Contender("A", call), "cpu")
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = True
        assert 8000 <= peak < 8200

    def test_modes_of_debugging_are_off_and_come_back(self):
        before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
        with harness.undisturbed():
            assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.allow_tf32
            assert not torch.utils.deterministic.fill_uninitialized_memory
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32) == before
        assert torch.utils.deterministic.fill_uninitialized_memory  # tests/conftest.py

    def test_ceilings_are_measured(self):
        ceilings = Ceilings("cpu", quick=True)
        ceilings.gemm_size, ceilings.large_copy = 64, 1 << 20
        assert 1e6 < ceilings.limit("compute", "fp32", 0) < 1e15
        assert 1e6 < ceilings.limit("memory", "bf16", 1 << 16) < 1e14
        assert set(ceilings.measured()) == {"copy_GB/s", "gemm_fp32_TFLOP/s", "gemm_bf16_TFLOP/s"}


class TestGate:
    truth = [torch.arange(1.0, 13).reshape(3, 4).double()]

    def test_one_wrong_row_is_refused(self):
        right = self.truth[0].float()
        wrong = right.clone()
        wrong[0] *= 1 + 3e-6  # within the floor over the whole tensor, outside it in row 0
        assert gate.judge([right], self.truth, [right], ["y"], {"y": (0,)}).wrong is None
        assert gate.judge([wrong], self.truth, [right], ["y"], {}).wrong is None
        verdict = gate.judge([wrong], self.truth, [right], ["y"], {"y": (0,)})
        assert "worst slice" in verdict.wrong and verdict.where == "y"

    @pytest.mark.parametrize("spoil", [lambda t: t * float("nan"), lambda t: t[:2], lambda t: torch.zeros_like(t)])
    def test_baseline_must_be_the_same_function(self, spoil):
        assert gate.judge([spoil(self.truth[0].float())], self.truth, None, ["y"], {}).wrong

    def test_missing_results(self):
        assert "instead of 2" in gate.judge(self.truth, self.truth * 2, None, ["y", "dx"], {}).wrong


class TestCommand:
    def test_record(self, small):
        path = small / "record.json"
        assert bench((), (), ("fp32",), True, False, path) == 0
        record = json.loads(path.read_text())
        assert record["machine"]["torch"] == torch.__version__ and record["machine"]["threads"] >= 1
        assert {"date", "commit", "dirty", "ceilings", "memory_is", "geomeans"} <= set(record)
        assert str(Path.home()) not in path.read_text()
        assert len(record["rows"]) == 2 * (3 + 2)  # layer_norm has F.layer_norm too; two modes
        for row in record["rows"]:
            assert row["status"] == "ok" and row["dtype"] == "fp32" and row["median_ms"] > 0
            assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["rounds"] >= 3
            assert {"ratio", "tflops", "gbs", "percent_of_ceiling", "peak_memory", "error", "error_torch"} <= set(row)
        ours = [r for r in record["rows"] if r["contender"] == "seqfuse"]
        assert len(ours) == 4 and all(r["backend"] and r["reason"] and r["asked"] == "auto" for r in ours)
        eager = [r for r in record["rows"] if r["contender"].startswith("torch.nn")]
        assert all(r["ratio"] == 1 for r in eager)

    def test_wrong_kernel_gets_no_speed(self, small, monkeypatch, capsys):
        def off_by_a_percent(x, residual, weight, bias, eps, *options):
            return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps) * 1.01, None

        broken(monkeypatch, off_by_a_percent)
        path = small / "record.json"
        assert bench(["layer_norm"], ["cpu"], ["fp32"], True, False, path, mode=["fwd"]) == 1
        rows = json.loads(path.read_text())["rows"]
        (ours,) = [r for r in rows if r["contender"] == "seqfuse cpu"]
        assert ours["status"] == "wrong" and "y: error 0.01" in ours["message"]
        assert not any({"median_ms", "ratio", "gbs", "percent_of_ceiling"} & set(row) for row in rows)
        printed = capsys.readouterr().out
        assert "wrong: no speed" in printed and "y: error 0.01" in printed and "1.00x" not in printed

    def test_kernel_that_raises(self, small, monkeypatch, capsys):
        def breaks(*args):
            raise RuntimeError("the kernel broke down")

        broken(monkeypatch, breaks)
        assert bench(["layer_norm"], ["cpu", "torch"], ["bf16"], True, mode=["fwd+bwd"]) == 1
        printed = capsys.readouterr().out
        assert "the kernel broke down" in printed and "seqfuse torch" in printed

    def test_backend_that_cannot_run(self, small, capsys):
        assert bench(["gru"], ["triton"], ["fp32"], True) == 2
        assert "seqfuse triton can't run gru here" in capsys.readouterr().out

    def test_interrupted_run_keeps_what_it_has(self, small, monkeypatch):
        measure, calls = harness.alternate, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 3:  # layer_norm is done, gru has begun
                raise KeyboardInterrupt
            return measure(*args)

        monkeypatch.setattr(harness, "alternate", interrupted)
        assert bench((), (), ["fp32"], True, False, small) == 130
        (path,) = small.glob("*.json")
        assert path.name == records.file_name("cpu")
        record = json.loads(path.read_text())
        assert record["interrupted"] and {r["op"] for r in record["rows"]} == {"layer_norm"}

    def test_torch_compile_is_a_baseline(self, small, capsys):
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            pytest.skip("torch.compile needs a C++ compiler on a CPU")
        assert bench(["layer_norm"], (), ["fp32"], True, mode=["fwd"], compile=True) == 0
        assert "torch.compile" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "arguments, said",
        [
            (["nonsense"], "unknown op 'nonsense': use layer_norm"),
            (["--backend", "cudnn"], "unknown backend 'cudnn': use one of auto"),
            (["--dtype", "int8"], "unknown dtype 'int8': use one of fp32"),
            (["--dtype", "fp16", "--device", "cpu"], "fp16 is measured on a GPU only"),
            (["--mode", "bwd"], "unknown mode 'bwd': use one of fwd"),
            (["--device", "tpu"], "must be cpu or cuda, got 'tpu'"),
            (["--seconds", "0"], "--seconds must be above 0"),
            (["--case", "T1-B1", "--device", "cpu"], "no case has 'T1-B1' in its name"),
            (["--tune", "--backend", "auto"], "leave out --backend auto"),
            (["--json", "nowhere/record.json"], "the folder nowhere does not exist"),
        ],
    )
    def test_bad_arguments_give_one_sentence(self, arguments, said):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and not isinstance(result.exception, ValueError)
        assert said in result.stderr and result.stderr.startswith("seqfuse: ")
        assert result.stderr.count("\n") == 1 and not result.stdout

    def test_a_table_that_can_not_be_kept_is_no_surprise_at_the_end(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        result = CliRunner().invoke(app, ["layer_norm", "--tune", "--quick"])
        assert result.exit_code == 2 and "its table can't be kept in" in result.output.replace("\n", " ")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_gpu_asked_for_where_there_is_none(self):
        result = CliRunner().invoke(app, ["--device", "cuda"])
        assert result.exit_code == 2 and "torch sees no CUDA device" in result.stderr


class TestTune:
    def test_auto_follows_the_measurement(self, small, monkeypatch, capsys):
        speeds = {"seqfuse torch": 1.0, "seqfuse cpu": 2.0, TINY_NORM.eager_name: 1.0, "F.layer_norm": 1.0}

        def fake(right, clock, seconds, rounds):
            return {c.name: harness.Timing([speeds[c.name]] * rounds) for c in right}

        def chosen():
            problem = TINY_NORM.build("cpu", "fp32")
            return contenders.call_once(contenders.ours(problem, "fwd+bwd", "auto"), "layer_norm")[1]

        if not native.missing():
            assert chosen().backend == "torch" and "at this size" in chosen().refused[0][1]  # the built-in rule
        monkeypatch.setattr(harness, "alternate", fake)
        assert bench(["layer_norm"], (), ["fp32"], True, True) == 0
        assert chosen() == dispatch.Choice("layer_norm", "torch", "measured fastest on this machine (bench --tune)")
        assert str(tuned.path()) in capsys.readouterr().out.replace("\n", "")
        tuned.reload()  # from the file, as the next process does
        assert chosen().backend == "torch"
        if not native.missing():
            speeds["seqfuse cpu"] = 0.5
            assert bench(["layer_norm"], (), ["fp32"], True, True) == 0
            assert chosen().backend == "cpu" and "measured" in chosen().reason

    def test_winner_of_a_class(self):
        def row(case, backend, ms, status="ok"):
            return Row("gru", case, "fwd", "fp32", f"seqfuse {backend}", status, backend, backend, "", "", ms,
                       shape_class="small")  # fmt: skip

        rows = [row("a", "cpu", 1.0), row("a", "torch", 2.0), row("b", "cpu", 3.0), row("b", "torch", 2.0)]
        assert tune.winners(rows) == {"gru": {"small": "cpu"}}  # sqrt(3) against 2
        assert tune.winners([*rows[:2], row("b", "cpu", None, "wrong"), rows[3]]) == {"gru": {"small": "torch"}}
        assert tune.winners([row("a", "cpu", None, "failed")]) == {}

    def test_reference_is_no_candidate(self):
        assert tune.candidates("gru", "cpu") == ["cpu", "cuda", "torch"]
        assert "reference" not in tune.candidates("gru", "cuda") and "triton" in tune.candidates("gru", "cuda")


def test_pytest_benchmark_runs_the_same_cases():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    done = subprocess.run([*command, "-k", "64x512 and fp32"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, the suite would run")
def test_gpu_suite_without_a_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", "benchmarks/gpu_suite.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no torch that sees a CUDA device" in done.stderr


def test_seqfuse_bench_never_changes_the_backend_of_the_process(small):
    before = dispatch.forced_backend()
    bench(["gru"], ["torch"], ["fp32"], True, mode=["fwd"])
    assert dispatch.forced_backend() == before and seqfuse.backend is dispatch.backend and torch.is_grad_enabled()
