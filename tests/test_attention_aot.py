"""The Triton attention kernels compiled ahead of time with the planned tiles, for GPUs that are not here.

Asserted as in tests/test_triton_aot.py: spills, registers, shared memory, tensor cores.
That it runs is not provable here.
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton_aot as aot

from seqfuse.kernels import attention, attention_decode, common

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler in this process"
)

BF16, FP32 = torch.bfloat16, torch.float32
ARCHS = (80, 89, 90, 120)

# (job, bytes of stack a thread that are tolerated), and why: none may be added without a reason
SPILLS = {
    # Two registers. Half the keys a tile would spill nothing, and rescale the accumulator twice as often; which is
    # faster only a GPU can tell.
    "bf16-128-dense-atomics forward_kernel sm_90": 8,
}


def call(D, dtype=BF16, causal=True, extras=False, packed=False, deterministic=True, backward=True, tf32=False):
    """Forward and backward of 4096 tokens with every option, or none."""

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def go():
        B, H, Hkv, T = 1 if packed else 2, 8, 4, 4096
        q, k = empty(B, H, T, D), empty(B, Hkv, T, D)
        options = [None] * 8 + [0.1, -1, 0 if causal else -1, False, 0.0, 0.0]
        if extras:
            options[2], options[7] = empty(H, dtype=FP32), empty(1, dtype=torch.int64)
            options[9], options[12], options[13] = 256, 50.0, 0.1
        if extras and not packed:
            options[0], options[1] = empty(1, H, T, T), empty(B, 1, 1, T, dtype=torch.bool)
            options[3], options[6] = empty(B, dtype=torch.int64), empty(B, dtype=torch.int32)
        if packed:
            options[4] = options[5] = empty(9, dtype=torch.int32)
        out, lse = attention.attention_fwd(q, k, k, *options)
        if backward:
            attention.attention_bwd(out, lse, q, k, k, out, lse, *options, extras and not packed, deterministic)

    def precisely():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            go()
        finally:
            torch.set_float32_matmul_precision(before)

    return precisely


def decode_call(D, page):
    def go():
        cache = torch.empty(64, 4, page or 4096, D, dtype=BF16, device="meta")
        q = torch.empty(2, 16, 1, D, dtype=BF16, device="meta")
        lengths = torch.empty(2, dtype=torch.int32, device="meta")
        table = torch.empty(2, 256, dtype=torch.int32, device="meta") if page else None
        cache = cache if page else cache[:2]
        attention_decode.attention_decode(q, cache, cache, lengths, table, None, 0.1, -1, 0, 0.0)
        attention_decode.kv_cache_append(cache, cache, q[:, :4], q[:, :4], lengths, table)

    return go


def table():
    """(label, launcher call, architectures). sm_89 and sm_120 have sm_80's rows, so they take fewer here."""
    yield "bf16-64", call(64), (80, 90)
    yield "bf16-128", call(128), ARCHS
    yield "bf16-128-dense-atomics", call(128, causal=False, deterministic=False), (80, 90)
    yield "bf16-256", call(256), (80, 90)
    yield "bf16-512", call(512, backward=False), ARCHS
    yield "bf16-128-extras", call(128, extras=True), ARCHS
    yield "bf16-80-packed", call(80, packed=True), (90,)
    yield "tf32-128", call(128, FP32, tf32=True), (80, 90)
    yield "fp32-128", call(128, FP32), (80,)
    yield "fp32-64", call(64, FP32), (90,)
    yield "bf16-128-decode", decode_call(128, 0), (80, 90)
    yield "bf16-128-decode-pages", decode_call(128, 16), ARCHS


@pytest.fixture(scope="module")
def compiled():
    jobs = [job for label, go, archs in table() for arch in archs for job in aot.record(label, arch, go)]
    return aot.compile_all(jobs)


def failures(compiled, wrong):
    return [f"{job}: {text}" for job, got in compiled.items() if (text := wrong(job, got))]


def test_nothing_spills(compiled):
    def wrong(job, got):
        if got.stack > SPILLS.get(str(job), 0):
            return f"{got.stack} bytes of stack, {got.registers} registers"

    assert not failures(compiled, wrong)


def test_registers(compiled):
    def wrong(job, got):
        if got.registers * job.num_warps * 32 > 65536:
            return f"{got.registers} registers, {job.num_warps} warps"

    assert not failures(compiled, wrong)


def test_shared_memory(compiled):
    def wrong(job, got):
        if got.shared > common.SHARED_MEMORY[job.arch]:
            return f"{got.shared} bytes of shared memory, {common.SHARED_MEMORY[job.arch]} exist"

    assert not failures(compiled, wrong)


def test_tensor_cores(compiled):
    """wgmma on Hopper where a tile has 64 rows or more (D 512 has not the registers); fp32 multiplies in plain fp32."""

    def wrong(job, got):
        if job.kernel in ("row_kernel", "merge_kernel", "append_kernel"):
            return None
        hopper = "wgmma.mma_async" in got.ptx
        c = job.named_constants()
        rows = c["BLOCK_N"] if job.kernel == "key_kernel" else c["BLOCK_M"]
        if "fp32" in job.label:
            return "tensor cores in fp32" if hopper or "mma.sync" in got.ptx else None
        if hopper != (job.arch == 90 and rows >= 64) and "tf32" not in job.label:
            return f"wgmma: {hopper} with {rows} rows"
        return None if hopper or "mma.sync" in got.ptx else "no tensor cores"

    assert not failures(compiled, wrong)
