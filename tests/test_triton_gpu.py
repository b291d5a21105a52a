"""The Triton kernels on a real GPU: the checks of the interpreter, bf16 too, planned tiles, bit-identical repeats."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton_checks as checks

from seqfuse.kernels import common, layer_norm, rnn, rnn_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(common.interpreting(), reason="the interpreter replaces the compiler in this process"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CELLS = tuple(rnn_plan.GATES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m,n",
    [
        (1, 1),
        (7000, 3),
        (4099, 64),
        (513, 100),
        (2048, 768),
        (333, 1000),
        (700, 4096),
        (99, 8192),
        (65, 9001),
        (9, 33000),
    ],
    ids=lambda v: str(v),
)
def test_layer_norm(m, n, dtype):
    checks.layer_norm(m, n, dtype, "cuda", repeat=True)


@pytest.mark.parametrize("n", [40, 8200, 40000])
@pytest.mark.parametrize(
    "options",
    [{"residual": False}, {"weight": False, "ds": False}, {"bias": False}, {"param_dtype": torch.float32}],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_layer_norm_options(n, options):
    checks.layer_norm(300, n, torch.bfloat16, "cuda", repeat=True, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "t,b,h",
    [(1, 1, 1), (20, 17, 20), (33, 3, 64), (50, 40, 128), (9, 5, 200), (12, 16, 300), (30, 64, 512), (8, 1, 1024)],
    ids=lambda v: str(v),
)
def test_rnn_scan(cell, t, b, h, dtype):
    checks.rnn_scan(cell, t, b, h, dtype, "cuda", plan=None, repeat=True)


@pytest.mark.parametrize("h", [48, 256])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "options",
    [
        {"reverse": True, "batch_major": True},
        {"bias": False, "dh_n": False, "dc_n": False},
        {"dy": False},
        {"strided_dy": True, "batch_major": True},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_rnn_scan_options(cell, h, options):
    checks.rnn_scan(cell, 10, 21, h, torch.bfloat16, "cuda", plan=None, **options)


@pytest.mark.parametrize("h", [48, 300])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn_inference_and_nan(cell, h):
    checks.rnn_inference(cell, 6, 20, h, torch.bfloat16, "cuda", plan=None)
    checks.rnn_nan(cell, torch.bfloat16, "cuda", plan=None)


def planned(tier, cell, dtype, batch, hidden, heads=1):
    """The plan of one tier on this GPU."""
    device = torch.device("cuda")
    facts = common.capability(device), common.sm_count(device)
    if tier == "step":  # a GPU so small that nothing else fits
        return rnn_plan.plan(cell, dtype, batch, hidden, (8, 9), 1, heads=heads, reach=2**31)
    result = rnn_plan.plan(cell, dtype, batch, hidden, *facts, heads=heads, persistent=tier == "persistent")
    if result.tier != tier:
        pytest.skip(f"no {tier} tier on this GPU: {result}")
    return result


TIER_CASES = [("tile", 48), ("tile", 128), ("step", 48), ("step", 300), ("persistent", 300), ("persistent", 512)]


@pytest.mark.parametrize("tier,h", TIER_CASES, ids=lambda v: str(v))
@pytest.mark.parametrize(
    "cell,option", [(cell, option) for cell in CELLS for option in checks.options_of(cell) if option != "heads"]
)
def test_rnn_option(cell, option, tier, h):
    plan = planned(tier, cell, torch.bfloat16, 21, h)
    checks.rnn_scan(cell, 9, 21, h, torch.bfloat16, "cuda", plan=plan, options=(option,), reverse=h == 48, repeat=True)


@pytest.mark.parametrize("tier,h", TIER_CASES, ids=lambda v: str(v))
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn_all_options(cell, reverse, tier, h):
    """Two heads of h units, two batch tiles."""
    options, plan = checks.options_of(cell), planned(tier, cell, torch.float16, 21, 2 * h, heads=2)
    checks.rnn_scan(
        cell, 12, 21, h, torch.float16, "cuda", plan=plan, options=options, reverse=reverse, batch_major=True,
        repeat=True,
    )  # fmt: skip


@pytest.mark.parametrize("batch,h", [(16, 512), (64, 512), (16, 768), (16, 1024), (5, 260)], ids=lambda v: str(v))
@pytest.mark.parametrize("cell", CELLS)
def test_persistent_tier(cell, batch, h):
    for dtype in (torch.bfloat16, torch.float16):
        checks.rnn_scan(
            cell, 40, batch, h, dtype, "cuda", plan=planned("persistent", cell, dtype, batch, h), repeat=True
        )


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_persistent_tier_a_thousand_times(cell):
    """A barrier that let one program through too early would show in some bit of some repeat."""
    t, b, h = 64, 32, 512
    plan = planned("persistent", cell, torch.bfloat16, b, h)
    scan = checks._rnn_inputs(cell, t, b, h, torch.bfloat16, "cuda", 1)
    dy = scan.rand(t, b, h)

    def run():
        y, h_n, c_n, gates, cells = scan.fwd(cell, False, True, False, plan)
        args = (dy, None, None, None, y, gates, cells, scan.h0, scan.c0, scan.w_hh)
        return y, h_n, c_n, gates, cells, *rnn.rnn_scan_bwd(cell, *args, launch_plan=plan)

    first = run()
    for repeat in range(1000):
        for one, other in zip(first, run(), strict=True):
            assert torch.equal(one, other), f"repeat {repeat} differs"


def test_persistent_tier_agrees_with_the_step_tier():
    """Long enough that a stale h would have spread."""
    scan = checks._rnn_inputs("lstm", 500, 32, 512, torch.bfloat16, "cuda", 2)
    first, second = (
        scan.fwd("lstm", False, False, False, planned(tier, "lstm", torch.bfloat16, 32, 512))[0].double()
        for tier in ("persistent", "step")
    )
    assert (first - second).norm() <= 2 * checks.FLOOR[torch.bfloat16] * first.norm()


def test_tiers_agree_over_many_steps():
    """A step that read the state of a neighbour too early or too late would drift apart from the one-program tier."""
    t, b, h = 400, 32, 128
    generator = torch.Generator("cuda").manual_seed(1)
    args = {"generator": generator, "device": "cuda"}
    xg, h0 = torch.randn(t, b, 4 * h, **args), torch.randn(b, h, **args)
    w, bias = torch.randn(4 * h, h, **args) * h**-0.5, torch.randn(4 * h, **args)
    inputs = [v.bfloat16() for v in (xg, h0, h0, w, bias)]
    tile = rnn_plan.plan("lstm", torch.bfloat16, b, h, (9, 0), 132)
    step = rnn_plan.plan("lstm", torch.bfloat16, b, h, (8, 9), 24)
    assert (tile.tier, step.tier) == ("tile", "step")
    if common.shared_memory(common.capability(xg.device)) < 140_000:
        pytest.skip("this GPU has too little shared memory for the tile tier at H=128")
    first = rnn.rnn_scan_fwd("lstm", *inputs, launch_plan=tile)[0].double()
    second = rnn.rnn_scan_fwd("lstm", *inputs, launch_plan=step)[0].double()
    floor = checks.FLOOR[torch.bfloat16]
    assert (first - second).norm() <= 2 * floor * first.norm()


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(8, 64, device="cuda:1")
    y = layer_norm.layer_norm_fwd(x, None, None, None, 1e-5)[0]
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (64,)))
