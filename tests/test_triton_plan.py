"""Launch plans and block tables on paper: no GPU, no Triton compilation."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from seqfuse.kernels import common, rnn_plan
from seqfuse.kernels.rnn_plan import GATES, persistent_shared, plan, refusal, resident

# name -> compute capability, multiprocessors
GPUS = {"H100": ((9, 0), 132), "H200": ((9, 0), 132), "A100": ((8, 0), 108), "RTX 4060": ((8, 9), 24)}
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "gpu,cell,dtype,batch,hidden,expected",
    [
        # w_hh of 4 x 128 x 128 in 16 bits is 128 KB: on chip on the big GPUs, not on the small one
        ("H100", "lstm", BF16, 16, 128, "tile: fwd [b16 h128 warps8] bwd [b16 h128 warps8], 1 programs"),
        ("H200", "lstm", BF16, 40, 104, "tile: fwd [b16 h128 warps8] bwd [b16 h128 warps8], 3 programs"),
        ("A100", "lstm", BF16, 16, 128, "tile: fwd [b16 h128 warps8] bwd [b16 h128 warps8], 1 programs"),
        (
            "RTX 4060", "lstm", BF16, 16, 128,
            "step: fwd [b16 h8 k128 stages4 warps4] bwd [b16 h16 k128 stages4 warps2], 16 programs",
        ),
        ("RTX 4060", "gru", BF16, 1, 64, "tile: fwd [b16 h64 warps8] bwd [b16 h64 warps8], 1 programs"),
        ("H100", "rnn_tanh", BF16, 32, 200, "tile: fwd [b16 h256 warps8] bwd [b16 h256 warps8], 2 programs"),
        ("H100", "lstm", FP32, 8, 64, "tile: fwd [b16 h64 warps8] bwd [b16 h64 warps8], 1 programs"),
        # one wave of the narrowest unit tiles that the multiprocessors hold at once
        (
            "H100", "lstm", BF16, 16, 1024,
            "step: fwd [b16 h8 k128 stages4 warps4] bwd [b16 h16 k128 stages4 warps2], 128 programs",
        ),
        (
            "A100", "lstm", BF16, 16, 1024,
            "step: fwd [b16 h16 k128 stages4 warps4] bwd [b16 h16 k128 stages4 warps2], 64 programs",
        ),
        (
            "H100", "gru", BF16, 128, 768,
            "step: fwd [b64 h16 k64 stages4 warps4] bwd [b64 h16 k64 stages4 warps4], 96 programs",
        ),
        (
            "H100", "lstm", FP32, 1, 512,
            "step: fwd [b1 h8 k32 stages2 warps4] bwd [b1 h16 k32 stages2 warps4], 64 programs",
        ),
        # rows that are no multiple of 16 bytes: the largest tile would spill
        (
            "H100", "lstm", BF16, 16, 100,
            "step: fwd [b16 h8 k128 stages4 warps4] bwd [b16 h16 k128 stages4 warps2], 13 programs",
        ),
        # rows of w_hh at odd addresses: shorter chunks
        (
            "H100", "rnn_relu", BF16, 3, 301,
            "step: fwd [b16 h16 k32 stages4 warps2] bwd [b16 h16 k32 stages4 warps2], 19 programs",
        ),
    ],
)  # fmt: skip
def test_plan(gpu, cell, dtype, batch, hidden, expected):
    result = plan(cell, dtype, batch, hidden, *GPUS[gpu])
    assert str(result).startswith(expected)
    assert result.reason in str(result)


TOO_MANY = "programs that wait for each other need more than"


@pytest.mark.parametrize(
    "gpu,cell,dtype,batch,hidden,heads,expected",
    [
        ("H100", "lstm", BF16, 16, 512, 1, "persistent: fwd [b16 h8 k512 warps4] bwd [b16 h8 k512 warps4], 64"),
        ("H200", "lstm", BF16, 16, 1024, 1, "persistent: fwd [b16 h8 k1024 warps8] bwd [b16 h8 k1024 warps8], 128 "),
        # two programs a multiprocessor, then wider ones
        ("H100", "lstm", BF16, 64, 512, 1, "persistent: fwd [b16 h8 k512 warps4] bwd [b16 h8 k512 warps4], 256"),
        ("H100", "lstm", BF16, 128, 512, 1, "persistent: fwd [b16 h16 k512 warps4] bwd [b16 h16 k512 warps4], 256 "),
        ("H100", "lstm", BF16, 144, 512, 1, f"288 {TOO_MANY} 132 multiprocessors"),
        ("A100", "lstm", BF16, 16, 512, 1, "persistent: fwd [b16 h8 k512 warps4] bwd [b16 h8 k512 warps4], 64"),
        ("A100", "gru", BF16, 16, 768, 1, "persistent: fwd [b16 h8 k1024 warps8] bwd [b16 h8 k1024 warps8], 96"),
        ("A100", "lstm", BF16, 16, 1024, 1, f"64 {TOO_MANY} 108 multiprocessors"),
        ("RTX 4060", "lstm", BF16, 16, 128, 1, "persistent: fwd [b16 h8 k128 warps4] bwd [b16 h8 k128 warps4], 16"),
        ("RTX 4060", "lstm", BF16, 16, 512, 1, f"32 {TOO_MANY} 24 multiprocessors"),
        # a barrier for each head
        ("H100", "gru", BF16, 16, 1024, 4, "persistent: fwd [b16 h8 k256 warps4] bwd [b16 h8 k256 warps4], 128"),
        ("H100", "lstm", FP32, 16, 512, 1, "the persistent tier holds 16-bit weights only"),
        ("H100", "lstm", BF16, 16, 1025, 1, "the persistent tier ends at 1024 units"),
        # what needs no barrier has none
        ("H100", "lstm", BF16, 16, 512, 4, "tile: fwd [b16 h128 warps8] bwd [b16 h128 warps8], 4"),
    ],
)  # fmt: skip
def test_persistent_plan(gpu, cell, dtype, batch, hidden, heads, expected):
    result = plan(cell, dtype, batch, hidden, *GPUS[gpu], heads=heads, persistent=True)
    assert expected in str(result)
    assert result.tier == ("step" if "persistent tier" in expected or TOO_MANY in expected else expected.split(":")[0])


def test_kernels_that_wait_are_chosen_where_they_are_proved(monkeypatch):
    case = ("lstm", BF16, 16, 512, *GPUS["H100"])
    assert not rnn_plan.PROVED, "an architecture needs a record of the run on hardware in docs/triton.md"
    assert plan(*case).tier == "step"
    assert plan(*case).reason.endswith("the persistent tier would take 64 programs, and has not been proved on sm_90")
    assert plan(*case, persistent=True).tier == "persistent"
    monkeypatch.setattr(rnn_plan, "PROVED", frozenset({90}))
    assert plan(*case).tier == "persistent"
    assert plan(*case, persistent=False).tier == "step"
    assert plan("lstm", BF16, 16, 512, *GPUS["A100"]).tier == "step"


def test_options_that_the_largest_tiles_have_no_registers_for():
    assert plan("lstm", FP32, 16, 64, *GPUS["H100"], options=2).tier == "tile"
    assert plan("lstm", FP32, 16, 64, *GPUS["H100"], options=3).tier == "step"
    assert plan("lstm", FP32, 16, 32, *GPUS["H100"], options=6).tier == "tile"
    assert plan("lstm", BF16, 16, 128, *GPUS["A100"], options=3).tier == "step"
    assert plan("lstm", BF16, 16, 128, *GPUS["H100"], options=6).tier == "tile"


def test_refusal():
    assert refusal() is None
    assert "not packed" in refusal(packed=True) and "layer normalisation" in refusal(norm=True)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("cell", GATES)
def test_plans_are_sound_everywhere(gpu, cell):
    capability, sm_count = GPUS[gpu]
    for dtype in (FP32, BF16):
        for batch in (1, 3, 16, 33, 64, 500):
            for hidden in (1, 16, 17, 64, 100, 128, 256, 300, 1024, 4096):
                result = plan(cell, dtype, batch, hidden, capability, sm_count)
                assert result == plan(cell, dtype, batch, hidden, capability, sm_count)
                assert result.tier in ("tile", "step") and result.programs > 0
                waiting = plan(cell, dtype, batch, hidden, capability, sm_count, persistent=True)
                if waiting.tier == "persistent":  # all programs at once, or they would wait forever
                    for tiles, backward in ((waiting.forward, False), (waiting.backward, True)):
                        room = resident(GATES[cell], tiles, backward, capability)
                        assert waiting.programs <= room * sm_count and tiles.block_k >= hidden
                        memory = persistent_shared(GATES[cell], tiles, backward)
                        assert room * memory <= common.shared_memory(capability)
                for tiles in (result.forward, result.backward):
                    sizes = [tiles.block_b, tiles.block_h, tiles.warps, tiles.block_k or 1]
                    assert all(v & (v - 1) == 0 for v in sizes), "a tile that Triton refuses"
                    if result.tier == "tile":
                        assert tiles.block_h >= hidden
                        itemsize = 4 if dtype == FP32 else 2
                        assert GATES[cell] * tiles.block_h**2 * itemsize < common.shared_memory(capability)


def test_sequences_far_apart_take_the_step_tier():
    """Batch-major memory of a very long sequence: 32-bit offsets inside a tile would overflow."""
    assert plan("lstm", BF16, 16, 64, *GPUS["H100"], reach=2**27 - 1).tier == "tile"
    assert plan("lstm", BF16, 16, 64, *GPUS["H100"], reach=2**27).tier == "step"


def test_block_tables():
    assert common.blocks("layer_norm_fwd", 1, 2, (9, 0)) == (32, 4)
    assert common.blocks("layer_norm_fwd", 768, 2, (8, 0)) == (2, 4)
    assert common.blocks("layer_norm_fwd", 32768, 2, (9, 0)) == (1, 16)
    assert common.blocks("layer_norm_fwd", 32769, 2, (9, 0)) is None
    assert common.blocks("layer_norm_bwd", 8192, 2, (12, 0)) == (1, 16)
    assert common.blocks("layer_norm_bwd", 8193, 2, (12, 0)) is None
    assert common.blocks("layer_norm_fwd", 32768, 4, (9, 0)) is None
    # odd rows need more registers, so the widest class is not theirs
    assert common.blocks("layer_norm_bwd", 8191, 2, (9, 0)) is None
    assert common.blocks("layer_norm_bwd", 4095, 2, (9, 0)) == (1, 8)


def test_small_helpers():
    assert [common.next_power_of_2(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert common.shared_memory((9, 0)) == 232448 and common.shared_memory((7, 5)) == 101376
    assert common.sm_count(torch.device("cpu")) > 0
