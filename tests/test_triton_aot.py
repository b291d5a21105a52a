"""Every Triton kernel compiled ahead of time, as its launcher would launch it, for GPUs that are not here.

Asserted: no spills (STACK = 0, the list of exceptions is empty), registers, shared memory within the architecture's
limit, and tensor-core or asynchronous-copy instructions where they are meant to be. Not provable here: that it runs.
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton_aot as aot

from seqfuse.kernels import common, layer_norm, rnn, rnn_kernels

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler in this process"
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHS = (80, 89, 90, 120)


def layer_norm_call(m, n, dtype, param_dtype=None, residual=True):
    def call():
        x = torch.empty(m, n, dtype=dtype, device="meta")
        w = torch.empty(n, dtype=param_dtype or dtype, device="meta")
        y, s, mean, rstd = layer_norm.layer_norm_fwd(x, x if residual else None, w, w, 1e-5)
        layer_norm.layer_norm_bwd(y, y if residual else None, x, w, mean, rstd, True, True)

    return call


def rnn_call(cell, batch, hidden, dtype, save=True):
    def call():
        meta = {"dtype": dtype, "device": "meta"}
        g = rnn.GATES[cell]
        xg, w, b = torch.empty(3, batch, g * hidden, **meta), torch.empty(g * hidden, hidden, **meta), None
        b = torch.empty(g * hidden, **meta)
        h0 = torch.empty(batch, hidden, **meta)
        c0 = h0 if cell == "lstm" else None
        y, _, _, gates, cells = rnn.rnn_scan_fwd(cell, xg, h0, c0, w, b, False, save)
        if save:
            rnn.rnn_scan_bwd(cell, y, h0, c0, y, gates, cells, h0, c0, w, False)

    return call


def table():
    """(label, launcher call, architectures): the edges of the block tables and plans. One job takes 0.3 to 2 s."""
    yield "ln-bf16-64", layer_norm_call(4096, 64, BF16), (90,)
    yield "ln-fp16-768", layer_norm_call(4096, 768, FP16, param_dtype=FP32, residual=False), (90, 120)
    yield "ln-bf16-4095", layer_norm_call(4096, 4095, BF16), (90,)
    yield "ln-fp32-16383", layer_norm_call(4096, 16383, FP32), (90,)
    yield "ln-bf16-8192", layer_norm_call(4096, 8192, BF16), ARCHS
    yield "ln-fp32-8192", layer_norm_call(4096, 8192, FP32), (80, 90)
    yield "ln-bf16-32768", layer_norm_call(4096, 32768, BF16), (80, 90)
    yield "ln-fp32-16384", layer_norm_call(4096, 16384, FP32), (80,)
    yield "ln-bf16-65536", layer_norm_call(4096, 65536, BF16), ARCHS
    # tile tier
    yield "lstm-bf16-128", rnn_call("lstm", 32, 128, BF16), (80, 90)
    yield "gru-bf16-104", rnn_call("gru", 32, 104, BF16), (90,)
    yield "rnn-bf16-256", rnn_call("rnn_tanh", 32, 256, BF16), (80,)
    yield "lstm-fp16-64", rnn_call("lstm", 32, 64, FP16), (89, 120)
    yield "lstm-fp32-64", rnn_call("lstm", 32, 64, FP32), (80, 90)
    yield "rnn-fp32-128", rnn_call("rnn_relu", 32, 128, FP32), (89,)
    yield "gru-bf16-5", rnn_call("gru", 1, 5, BF16), (90,)
    yield "lstm-bf16-128-inference", rnn_call("lstm", 32, 128, BF16, save=False), (90,)
    # step tier
    yield "lstm-bf16-1024-b16", rnn_call("lstm", 16, 1024, BF16), (80, 90, 120)
    yield "gru-bf16-1024-b64", rnn_call("gru", 64, 1024, BF16), (89, 90)
    yield "lstm-bf16-302-b16", rnn_call("lstm", 16, 302, BF16), (90,)
    yield "rnn-bf16-301-b64", rnn_call("rnn_relu", 64, 301, BF16), (80,)
    yield "lstm-fp32-512-b1", rnn_call("lstm", 1, 512, FP32), (90,)
    yield "gru-fp32-512-b32", rnn_call("gru", 32, 512, FP32), (80,)


@pytest.fixture(scope="module")
def compiled():
    jobs = [job for label, call, archs in table() for arch in archs for job in aot.record(label, arch, call)]
    return aot.compile_all(jobs)


def failures(compiled, wrong):
    return [f"{job}: {text}" for job, got in compiled.items() if (text := wrong(job, got))]


def test_every_kernel_is_compiled(compiled):
    """Jitted functions are kernels, named so, or helpers that a kernel calls."""
    names = {n for m in (layer_norm, rnn_kernels) for n, f in vars(m).items() if isinstance(f, triton.JITFunction)}
    kernels = {n for n in names if n.endswith("_kernel")}
    assert len(kernels) == 10
    for arch in ARCHS:
        assert {job.kernel for job in compiled if job.arch == arch} == kernels, f"not all for sm_{arch}"


def test_nothing_spills(compiled):
    assert not failures(compiled, lambda job, got: got.stack and f"{got.stack} bytes of stack")


def test_registers(compiled):
    """A CTA's registers fit in a multiprocessor's 64 k, and no thread is at the architecture's last register."""

    def wrong(job, got):
        if got.registers >= 255 or got.registers * job.num_warps * 32 > 65536:
            return f"{got.registers} registers, {job.num_warps} warps"

    assert not failures(compiled, wrong)


def test_shared_memory(compiled):
    def wrong(job, got):
        limit = common.SHARED_MEMORY[job.arch]
        if got.shared > limit:
            return f"{got.shared} bytes of shared memory, {limit} exist"

    assert not failures(compiled, wrong)


def test_tensor_cores(compiled):
    """16-bit recurrent products run on tensor cores, fp32 ones in plain fp32 (tf32 would miss the error rule)."""

    def wrong(job, got):
        if "rnn" not in job.module:
            return None
        tensor_core = "mma.sync" in got.ptx or "wgmma.mma_async" in got.ptx
        if tensor_core != ("fp32" not in job.label) or "tf32" in got.ptx:
            return f"tensor cores: {tensor_core}"

    assert not failures(compiled, wrong)


def test_step_kernels_copy_asynchronously(compiled):
    def wrong(job, got):
        aligned = "301" not in job.label  # 16-bit rows of odd length: a copy would be of two bytes
        if job.kernel == "forward_step_kernel" and aligned and "cp.async" not in got.ptx:
            return "no cp.async"

    assert not failures(compiled, wrong)


def test_wide_loads(compiled):
    """Rows whose length is a multiple of 16 move in 16-byte vectors."""

    def wrong(job, got):
        odd = any(n in job.label for n in ("4095", "16383"))
        if job.kernel == "forward_rows_kernel" and not odd and "ld.global.v4.b32" not in got.ptx:
            return "no 16-byte loads"

    assert not failures(compiled, wrong)


if __name__ == "__main__":  # the table in docs/triton.md: python tests/test_triton_aot.py
    found = aot.compile_all([j for label, call, archs in table() for a in archs for j in aot.record(label, a, call)])
    for job, got in found.items():
        print(f"| {job.label} | {job.kernel} | sm_{job.arch} | {job.num_warps} | {got.registers} | {got.shared} |")
