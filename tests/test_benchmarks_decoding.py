"""Greedy decoding as a benchmark: what is counted, that both contenders say the same, and that the gate can fail."""

import json

import pytest

import seqfuse
from seqfuse.benchmarks import decoding, registry, run
from seqfuse.benchmarks.ceilings import Ceilings

pytest.importorskip("transformers")

TINY = decoding.GreedyDecoding("decode", D=32, L=2, heads=2, V=61, B=2, T=5, new=7, quick=True)


@pytest.fixture
def small(monkeypatch):
    """The command on a tiny model, with ceilings that cost nothing."""

    def ceilings(self, device, quick=False):
        self.device, self.repeats, self.gemm_size, self.large_copy = device, 1, 8, 1 << 12

    monkeypatch.setattr(registry, "suites", lambda: {"decoding": (TINY,)})
    monkeypatch.setattr(Ceilings, "__init__", ceilings)


def bench(path):
    code = run.main(["decode"], (), ["fp32"], True, False, path, device="cpu", seconds=0.01, compile=False)
    return code, json.loads(path.read_text())["rows"]


def test_record(small, tmp_path, capsys):
    code, rows = bench(tmp_path / "record.json")
    assert code == 0, rows
    assert [r["contender"] for r in rows] == ["transformers, static", "seqfuse"]
    for row in rows:
        assert row["status"] == "ok" and row["mode"] == "generate" and row["error"] == 0
        assert row["tokens_per_s"] == pytest.approx(TINY.B * TINY.new / row["median_ms"] * 1e3, rel=1e-2)


def test_another_token_has_no_speed(small, tmp_path, capsys, monkeypatch):
    honest = seqfuse.generate

    def off_by_one(*args, **options):
        ids = honest(*args, **options)
        ids[-1, -1] = (ids[-1, -1] + 1) % TINY.V
        return ids

    monkeypatch.setattr(seqfuse, "generate", off_by_one)
    code, rows = bench(tmp_path / "record.json")
    assert code == 1 and [r["status"] for r in rows] == ["ok", "wrong"]
    assert rows[1].get("median_ms") is None
