"""Whole training steps as benchmarks: what is counted, that the builds train alike, and that the gate can fail."""

import json
import shutil

import pytest
import torch

from seqfuse.benchmarks import contenders, gate, models, registry, run
from seqfuse.benchmarks.ceilings import Ceilings
from seqfuse.interop import hf_layers

transformers = pytest.importorskip("transformers")

GPT2 = models._gpt2(32, 2, 2, T=24, V=61, B=3, quick=True)
LLAMA = models._llama(32, 2, 4, 2, 48, T=24, V=64, B=3, quick=True)
SEQ2SEQ = models.Seq2SeqStep("seq2seq_step", B=3, T=5, H=16, E=8, quick=True)
TINY = [GPT2, LLAMA, SEQ2SEQ]


@pytest.fixture
def small(monkeypatch):
    """The command on tiny models, with ceilings that cost nothing."""

    def ceilings(self, device, quick=False):
        self.device, self.repeats, self.gemm_size, self.large_copy = device, 1, 8, 1 << 12

    monkeypatch.setattr(registry, "suites", lambda: {"models": tuple(TINY)})
    monkeypatch.setattr(Ceilings, "__init__", ceilings)


def bench(path, op, dtype="fp32", **options):
    code = run.main([op], (), [dtype], True, False, path, device="cpu", seconds=0.01, compile=False, **options)
    return code, json.loads(path.read_text())["rows"]


def gains(monkeypatch, cls, factor):
    """The gradient through every module of this fused class is too large by a factor."""
    original = cls.forward

    def forward(self, x):
        y = original(self, x)
        if y.requires_grad:
            y.register_hook(lambda g: g * factor)
        return y

    monkeypatch.setattr(cls, "forward", forward)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ["decoder_step", "seq2seq_step"])
def test_record(small, tmp_path, capsys, op, dtype):
    code, rows = bench(tmp_path / "record.json", op, dtype)
    assert code == 0, rows
    assert [r["contender"] for r in rows] == ["torch eager", "seqfuse"] * (1 + (op == "decoder_step"))
    for row in rows:
        assert row["status"] == "ok" and row["mode"] == "step" and row["error_at"] == "losses"
        case = next(c for c in TINY if c.name == row["case"])
        assert row["tokens_per_s"] == pytest.approx(case.tokens_per_call / row["median_ms"] * 1e3, rel=1e-2)
        assert {"ratio", "tflops", "percent_of_ceiling", "peak_memory", "rounds"} <= set(row)
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and "MFU" in printed


def test_builds_train_alike_for_200_steps():
    problem = LLAMA.build("cpu", "fp32")
    assert len(problem.curve) == 200
    plain, fused = LLAMA.line_up(problem, "step", ["auto"], compile=False)[0]
    truth = problem.truth()
    first = contenders.call_once(plain, LLAMA.op)[0]
    assert truth[0].shape == (200,) and truth[0][-1] < 0.9 * truth[0][0]  # they learn something
    assert gate.judge(contenders.call_once(fused, LLAMA.op)[0], truth, first, ["losses"], {}).wrong is None


@pytest.mark.parametrize("dtype, factor", [("fp32", 1.01), ("bf16", -1.0)])
def test_wrong_gradient_gets_no_speed(small, tmp_path, monkeypatch, capsys, dtype, factor):
    gains(monkeypatch, hf_layers._RMSNorm, factor)
    code, rows = bench(tmp_path / "record.json", "decoder_step", dtype, case="llama")
    assert code == 1
    (ours,) = [r for r in rows if r["contender"] == "seqfuse"]
    assert ours["status"] == "wrong" and "losses: error" in ours["message"] and "median_ms" not in ours
    assert "wrong: no speed" in capsys.readouterr().out


def test_compiled_builds(monkeypatch):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled.append(model) or model)
    problem = GPT2.build("cpu", "fp32", quick=True)
    everyone, refused = GPT2.line_up(problem, "step", ["auto"], compile=True)
    assert [c.name for c in everyone] == ["torch eager", "seqfuse", "torch.compile", "seqfuse compiled"]
    plain, fused = compiled
    assert plain(torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).logits is not None
    assert fused(torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).logits is None
    assert not refused and plain is not fused and not any(c.captured for c in everyone)


def test_builds_start_from_the_same_weights_and_batches():
    problem, again = (case.build("cpu", "fp32", quick=True) for case in (GPT2, GPT2))
    for a, b in zip(problem.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(problem.curve[3][0], again.curve[3][0])
    assert not torch.equal(problem.curve[3][0], problem.curve[4][0])
    assert len(problem.curve) == models.QUICK_STEPS and models.STEPS == 200
    assert problem.curve[0] is problem.samples[0] and problem.curve[0][0].shape == (3, 24)


def test_work_of_known_models():
    assert GPT2.flops("step") == 6 * 72 * (2 * (12 * 32**2 + 32 * 25) + 32 * 61)
    # what transformers calls parameters of the layers, without norms and embeddings
    model = LLAMA.model()
    weights = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert LLAMA.flops("step") == 6 * 72 * (weights + 2 * 32 * 25 + 32 * 64)
    model = SEQ2SEQ.model()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in embeddings)
    scores = 2 * 5 * 16
    assert SEQ2SEQ.flops("step") == pytest.approx(6 * 15 * (matrices + scores))
    assert SEQ2SEQ.tokens_per_call == 30


def test_other_backends_are_refused(small, capsys):
    assert run.main(["seq2seq_step"], ["cpu"], ["fp32"], True, device="cpu") == 2
    assert "seqfuse cpu can't run seq2seq_step here: a whole model has many ops" in capsys.readouterr().out


def test_without_transformers(small, monkeypatch, capsys):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert run.main(["decoder_step"], (), ["fp32"], True, device="cpu") == 2
    printed = capsys.readouterr().out
    assert printed.count("decoder_step needs Hugging Face's transformers (pip install transformers)") == 1


def test_gpu_sizes_are_registered():
    names = {c.name for c in models.CASES if c.devices == ("cuda",)}
    assert {"gpt2-D768-L12-V50257-T1024-B16", "llama-D2048-L16-V128256-T2048-B4"} <= names
    assert all(c.dtypes("cuda") == ("bf16",) for c in models.CASES)
