"""The block shapes of the Triton attention kernels on paper."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from seqfuse.kernels import attention_plan, common

ARCHS = (80, 89, 90, 120)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ("half", "tf32", "fp32"))
@pytest.mark.parametrize("kernel", attention_plan.KERNELS)
def test_every_head_dimension_has_tiles_that_fit(kernel, kind, arch):
    for width in (1, 16, 65, 128, 200, 256, 512):
        if width > attention_plan.MAX_HEAD_DIM[kernel]:
            continue
        for causal in (False, True):
            for extras in (False, True):
                tiles = attention_plan.plan(kernel, kind, width, divmod(arch, 10), causal, extras)
                padded = attention_plan.padded(width)
                taken = attention_plan.shared_bytes(kernel, kind, padded, tiles, arch)
                assert taken <= common.SHARED_MEMORY[arch]


def test_plan_of_an_h100():
    def of(kernel, width, **flags):
        return str(attention_plan.plan(kernel, "half", width, (9, 0), **flags))

    assert of("forward", 128) == "m128 n128 warps8 stages2"
    assert of("forward", 128, causal=True) == "m128 n64 warps8 stages3"
    assert of("forward", 128, causal=True, extras=True) == "m128 n32 warps8 stages2"
    assert of("key", 96) == of("key", 128) != of("key", 64)


def test_too_wide():
    with pytest.raises(ValueError, match="up to 256"):
        attention_plan.plan("key", "half", 300, (9, 0))


def test_printable():
    assert "forward half sm_90 D128: m128 n128" in attention_plan.table()


def test_decoding_takes_more_splits_the_fewer_programs_there_are():
    assert attention_plan.splits(8, 32768, 64, 132) == 33
    assert attention_plan.splits(1, 32768, 64, 132) == 64
    assert attention_plan.splits(1000, 32768, 64, 132) == 1
    assert attention_plan.splits(1, 100, 64, 132) == 1  # too short to split
    assert attention_plan.decode_plan(64, "half", 128, (9, 0)).block_m == 64
    assert attention_plan.decode_plan(8, "half", 128, (9, 0)).block_m == 16
