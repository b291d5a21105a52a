"""Every Triton kernel compiled ahead of time, as its launcher would launch it, for GPUs that are not here.

Asserted: no spills (STACK = 0, the list of exceptions is empty), registers, shared memory within the architecture's
limit, and tensor-core or asynchronous-copy instructions where they are meant to be. Not provable here: that it runs.
"""

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton_aot as aot

from seqfuse.kernels import (
    common,
    cross_entropy,
    gated,
    layer_norm,
    rnn,
    rnn_persistent,
    rnn_plan,
    rnn_step,
    rnn_tile,
    rope,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler in this process"
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHS = (80, 89, 90, 120)


def layer_norm_call(m, n, dtype, param_dtype=None, residual=True, p=0.0, rms=False):
    def call():
        x = torch.empty(m, n, dtype=dtype, device="meta")
        w = torch.empty(n, dtype=param_dtype or dtype, device="meta")
        r, bias = x if residual else None, None if rms else w
        options = torch.empty(1, dtype=torch.int64, device="meta") if p else None, p, rms, p > 0
        y, s, mean, rstd = layer_norm.layer_norm_fwd(x, r, w, bias, 1e-5, *options)
        layer_norm.layer_norm_bwd(y, r, x, w, mean, rstd, True, not rms, residual, *options)

    return call


def loss_call(vocabulary, dtype, every=False, backward=False):
    """every: all options. backward: with the log-sum-exp of an earlier call, the gradient alone."""

    def call():
        logits = torch.empty(1024, vocabulary, dtype=dtype, device="meta")
        target = torch.empty(1024, dtype=torch.int64, device="meta")
        cw, rows = (torch.empty(n, dtype=torch.float32, device="meta") for n in (vocabulary, 1024))
        options = (cw, rows, rows if backward else None, logits, -100, 0.1, 30.0, 1e-4)
        plain = (None, rows[:1], rows if backward else None, logits, -100, 0.0, 0.0, 0.0)
        cross_entropy.cross_entropy_rows(logits, target, *(options if every else plain))

    return call


def kl_call(vocabulary, dtype, masked=True):
    def call():
        logits = torch.empty(2, 1024, vocabulary, dtype=dtype, device="meta")
        keep = torch.empty(1024, dtype=torch.bool, device="meta") if masked else None
        scale = torch.empty(1, dtype=torch.float32, device="meta")
        cross_entropy.kl_rows(*logits, keep, scale, logits[0], 2.0)

    return call


def gated_call(columns, dtype, activation):
    def call():
        both = torch.empty(1024, 2 * columns, dtype=dtype, device="meta")
        gate, up = both.chunk(2, -1)
        gated.gated_bwd(gated.gated_fwd(gate, up, activation), gate, up, activation)

    return call


def rope_call(dim, half, dtype, interleaved=False, positions=False):
    def call():
        x = torch.empty(4, 2048, 32, dim, dtype=dtype, device="meta").transpose(1, 2)
        table = torch.empty(4096, half, dtype=torch.float32, device="meta")
        given = torch.empty(4, 2048, dtype=torch.int64, device="meta") if positions else None
        for inverse in (False, True):
            rope.rope(x, table, table, given, 0, interleaved, inverse)

    return call


LSTM_OPTIONS = ("lengths", "resets", "hidden_mask", "peephole", "zone_h", "zone_c")
GRU_OPTIONS = ("lengths", "resets", "hidden_mask", "zone_h")


def rnn_call(cell, batch, hidden, dtype, save=True, options=(), heads=1, persistent=False):
    """persistent: as if the persistent tier had been proved on every architecture."""

    def call():
        def empty(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        g, t = rnn.GATES[cell], 3
        shapes = {
            "lengths": empty(batch, dtype=torch.int64),
            "resets": empty(t, batch, dtype=torch.bool),
            "hidden_mask": empty(batch, hidden),
            "peephole": empty(3, hidden),
            "zone_h": empty(t, batch, hidden, dtype=torch.bool),
            "zone_c": empty(t, batch, hidden, dtype=torch.bool),
            "zoneout_h": 0.1,
            "zoneout_c": 0.1,
        }
        o = {name: shapes[name] for name in options}
        xg, w, b = empty(t, batch, g * hidden), empty(g * hidden, hidden // heads), empty(g * hidden)
        h0 = empty(batch, hidden)
        c0 = h0 if cell == "lstm" else None
        y, _, _, gates, cells = rnn.rnn_scan_fwd(cell, xg, h0, c0, w, b, **o, save=save)
        if save:
            dcells = cells if options and cell == "lstm" else None
            rnn.rnn_scan_bwd(cell, y, h0, c0, dcells, y, gates, cells, h0, c0, w, **o)

    def proved():
        with mock.patch.object(rnn_plan, "PROVED", frozenset(ARCHS)):
            call()

    return proved if persistent else call


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
    yield "rms-bf16-4096", layer_norm_call(4096, 4096, BF16, rms=True), ARCHS
    yield "rms-fp32-65536", layer_norm_call(4096, 65536, FP32, rms=True), (90,)
    yield "ln-bf16-4096-dropout", layer_norm_call(4096, 4096, BF16, p=0.1), (80, 90)
    yield "ln-fp32-1008-dropout", layer_norm_call(4096, 1008, FP32, p=0.1), (90, 120)
    yield "rms-bf16-8192-dropout", layer_norm_call(4096, 8192, BF16, p=0.1, rms=True), (90,)
    yield "loss-bf16-128256", loss_call(128256, BF16), ARCHS
    yield "loss-bf16-50257-options", loss_call(50257, BF16, every=True), (80, 90)
    yield "loss-fp32-32000-options", loss_call(32000, FP32, every=True), (90,)
    yield "loss-fp16-32000-backward", loss_call(32000, FP16, every=True, backward=True), (90,)
    yield "kl-bf16-128256", kl_call(128256, BF16), ARCHS
    yield "kl-fp32-50257", kl_call(50257, FP32, masked=False), (90,)
    yield "swiglu-bf16-14336", gated_call(14336, BF16, 0), ARCHS
    yield "geglu-fp16-11008", gated_call(11008, FP16, 1), (90,)
    yield "geglu-tanh-fp32-3073", gated_call(3073, FP32, 2), (80, 90)
    yield "rope-bf16-128", rope_call(128, 64, BF16), ARCHS
    yield "rope-fp32-256-interleaved", rope_call(256, 128, FP32, interleaved=True, positions=True), (90,)
    yield "rope-fp16-80-part", rope_call(80, 16, FP16, positions=True), (80, 90)
    # tile tier
    yield "lstm-bf16-128", rnn_call("lstm", 32, 128, BF16), (80, 90)
    yield "gru-bf16-104", rnn_call("gru", 32, 104, BF16), (90,)
    yield "rnn-bf16-256", rnn_call("rnn_tanh", 32, 256, BF16), (80,)
    yield "lstm-fp16-64", rnn_call("lstm", 32, 64, FP16), (89, 120)
    yield "lstm-fp32-64", rnn_call("lstm", 32, 64, FP32), (80, 90)
    yield "rnn-fp32-128", rnn_call("rnn_relu", 32, 128, FP32), (89,)
    yield "gru-bf16-5", rnn_call("gru", 1, 5, BF16), (90,)
    yield "lstm-bf16-128-inference", rnn_call("lstm", 32, 128, BF16, save=False), (90,)
    yield "lstm-bf16-128-options", rnn_call("lstm", 32, 128, BF16, options=LSTM_OPTIONS), (90,)
    yield "lstm-bf16-128-two-options", rnn_call("lstm", 32, 128, BF16, options=("lengths", "zone_h")), (80,)
    yield "gru-bf16-128-options", rnn_call("gru", 32, 128, BF16, options=GRU_OPTIONS), (90,)
    yield "rnn-bf16-256-options", rnn_call("rnn_tanh", 32, 256, BF16, options=GRU_OPTIONS), (90,)
    yield "lstm-fp32-64-options", rnn_call("lstm", 32, 64, FP32, options=("lengths", "zoneout_h")), (90,)
    yield "gru-fp16-512-heads8", rnn_call("gru", 32, 512, FP16, heads=8), (120,)
    # step tier
    yield "lstm-bf16-1024-b16", rnn_call("lstm", 16, 1024, BF16), (80, 90, 120)
    yield "gru-bf16-1024-b64", rnn_call("gru", 64, 1024, BF16), (89, 90)
    yield "lstm-bf16-302-b16", rnn_call("lstm", 16, 302, BF16), (90,)
    yield "rnn-bf16-301-b64", rnn_call("rnn_relu", 64, 301, BF16), (80,)
    yield "lstm-fp32-512-b1", rnn_call("lstm", 1, 512, FP32), (90,)
    yield "gru-fp32-512-b32", rnn_call("gru", 32, 512, FP32), (80,)
    yield "lstm-bf16-1024-options", rnn_call("lstm", 16, 1024, BF16, options=LSTM_OPTIONS), (90,)
    yield "gru-bf16-512-heads2", rnn_call("gru", 16, 512, BF16, heads=2), (90,)
    # persistent tier
    yield "lstm-bf16-512-persistent", rnn_call("lstm", 16, 512, BF16, persistent=True), ARCHS
    yield "lstm-bf16-1024-persistent", rnn_call("lstm", 16, 1024, BF16, persistent=True), (90,)
    yield (
        "lstm-bf16-1024-options-persistent",
        rnn_call("lstm", 16, 1024, BF16, options=LSTM_OPTIONS, persistent=True),
        (90,),
    )
    yield "gru-bf16-768-options-persistent", rnn_call("gru", 16, 768, BF16, options=GRU_OPTIONS, persistent=True), (80,)
    yield "rnn-bf16-1024-b64-persistent", rnn_call("rnn_tanh", 64, 1024, BF16, persistent=True), (90,)
    yield "lstm-fp16-512-b128-persistent", rnn_call("lstm", 128, 512, FP16, persistent=True), (90,)
    yield "gru-bf16-604-heads2-persistent", rnn_call("gru", 16, 604, BF16, heads=2, persistent=True), (90,)


@pytest.fixture(scope="module")
def compiled():
    jobs = [job for label, call, archs in table() for arch in archs for job in aot.record(label, arch, call)]
    return aot.compile_all(jobs)


def failures(compiled, wrong):
    return [f"{job}: {text}" for job, got in compiled.items() if (text := wrong(job, got))]


def test_every_kernel_is_compiled(compiled):
    """Jitted functions are kernels, named so, or helpers that a kernel calls."""
    modules = (cross_entropy, gated, layer_norm, rnn_tile, rnn_step, rnn_persistent, rope)
    names = {n for m in modules for n, f in vars(m).items() if isinstance(f, triton.JITFunction)}
    kernels = {n for n in names if n.endswith("_kernel")}
    assert len(kernels) == 17
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


def test_persistent_kernels_fit_as_planned(compiled):
    """The plan counts resident programs by shared memory and 256 registers a thread: no kernel may need more."""

    def wrong(job, got):
        if "persistent" not in job.kernel:
            return None
        c = job.named_constants()
        tiles = rnn_plan.Tiles(c["BLOCK_B"], c["BLOCK_H"], c["BLOCK_K"], job.num_warps, 0)
        planned = rnn_plan.persistent_shared(c["G"], tiles, job.kernel.startswith("backward"))
        if got.shared > planned or not job.cooperative:
            return f"{got.shared} bytes of shared memory, planned {planned}; cooperative: {job.cooperative}"

    assert not failures(compiled, wrong)


def test_persistent_kernels_wait_before_they_read(compiled):
    """In the time loop: acquire, then the loads of what others wrote, past the L1, then release; w_hh before it."""

    def wrong(job, got):
        if "persistent" not in job.kernel:
            return None
        before, header, loop = got.ptx.partition("Loop Header: Depth=1")
        order = [loop.find(text) for text in ("gpu.acquire", "ld.global.cg", "gpu.release")]
        if not header or -1 in order or order != sorted(order):
            return f"acquire, read, release at {order} of the loop"
        acquire, read, release = order
        stored = loop.rfind("st.global", 0, release)
        # one thread acquires and releases for all: barriers carry it to the others, and what they stored to it
        if "bar.sync" not in loop[acquire:read] or stored == -1 or "bar.sync" not in loop[stored:release]:
            return "no barrier of the program beside an acquire or a release"
        if "gpu.acquire" in before or "ld.global.cg" in before:
            return "an exchange outside of the loop"
        wide = "604" not in job.label  # heads of 302 units: the loads of w_hh are as narrow as those of the gates
        if wide and ("ld.global.v4.b32" not in before or "ld.global.v4.b32" in loop):
            return "w_hh is not loaded once, before the loop"

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
