"""Every Triton kernel in the interpreter, against the float64 reference by the error rule.

Needs TRITON_INTERPRET=1 before Triton is imported, hence a pytest process of its own. bf16 is never used here: the
interpreter computes it wrongly without a word (Triton 3.9); tests/test_triton_gpu.py runs the same checks on a GPU.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton_checks as checks
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfuse.kernels import common, layer_norm, rnn, rnn_plan

pytestmark = pytest.mark.interpret

DTYPES = (torch.float32, torch.float16)
CELLS = tuple(rnn_plan.GATES)


TIERS = ("step", "tile", "persistent")


def tiles(tier: str) -> rnn_plan.LaunchPlan:
    """A plan of the smallest tiles, so that small tensors already take several of them and several trips of loops.

    The persistent tier's program holds all units (of a head, up to 32): programs run one after another here, and one
    that waited for a later one would wait forever.
    """
    smallest = {
        "step": rnn_plan.Tiles(16, 16, 16, 1, 1),
        "tile": rnn_plan.Tiles(16, 32, 0, 1, 0),
        "persistent": rnn_plan.Tiles(16, 32, 32, 2, 0),
    }
    return rnn_plan.LaunchPlan(tier, smallest[tier], smallest[tier], 0, "test")


def test_interpreting():
    assert common.interpreting()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m,n",
    [(1, 1), (70, 3), (5, 64), (33, 100), (9, 257), (3, 3000), (5, 8300)],
    ids=lambda v: str(v),
)
def test_layer_norm(m, n, dtype):
    checks.layer_norm(m, n, dtype, "cpu", residual=True, ds=True)


def test_layer_norm_very_wide():
    """Beyond the block tables in both directions."""
    assert common.blocks("layer_norm_fwd", 33000, 2, (9, 0)) is None
    checks.layer_norm(1, 33000, torch.float16, "cpu")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"residual": False, "ds": False},
        {"weight": False},
        {"bias": False},
        {"weight": False, "bias": False, "residual": True, "ds": False},
        {"param_dtype": torch.float32},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_layer_norm_options(chunked, options, monkeypatch):
    if chunked:  # the kernels for rows that do not fit in registers, on a row of several chunks
        monkeypatch.setattr(common, "blocks", lambda *_: None)
        monkeypatch.setattr(layer_norm, "_CHUNK", 64)
        monkeypatch.setattr(layer_norm, "_COLUMN_TILE", (2, 64))
    checks.layer_norm(21, 200, torch.float16, "cpu", **options)


@settings(max_examples=15)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
    weight=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_layer_norm_any(m, n, dtype, residual, weight, bias, seed):
    checks.layer_norm(m, n, dtype, "cpu", residual=residual, ds=residual, weight=weight, bias=bias, seed=seed)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "t,b,h,dtype",
    [(1, 1, 1, torch.float32), (3, 17, 20, torch.float32), (3, 2, 32, torch.float16)],
    ids=lambda v: str(v),
)
def test_rnn_scan(cell, tier, t, b, h, dtype):
    checks.rnn_scan(cell, t, b, h, dtype, "cpu", plan=tiles(tier))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize(
    "options",
    [
        {"reverse": True, "batch_major": True},
        {"bias": False, "dh_n": False, "dc_n": False},
        {"dy": False, "strided_dy": False},
        {"strided_dy": True, "batch_major": True},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_rnn_scan_options(cell, tier, options):
    checks.rnn_scan(cell, 3, 5, 19, torch.float32, "cpu", plan=tiles(tier), **options)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("h", [24, 130])
def test_rnn_scan_planned(cell, h):
    """The tiles that a GPU would be given, not the test's small ones."""
    checks.rnn_scan(cell, 2, 3, h, torch.float16, "cpu", plan=None)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cell", ["rnn_relu", "lstm"])
def test_rnn_inference_saves_nothing_and_agrees(cell, tier):
    checks.rnn_inference(cell, 3, 4, 21, torch.float32, "cpu", plan=tiles(tier))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cell", ["gru", "rnn_relu"])
def test_rnn_nan_propagates(cell, tier):
    checks.rnn_nan(cell, torch.float32, "cpu", plan=tiles(tier))


def units(tier):
    """Units of a head: in the step tier more than one tile of them."""
    return 18 if tier == "step" else 11


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "cell,option", [(cell, option) for cell in ("rnn_tanh", "gru", "lstm") for option in checks.options_of(cell)]
)
def test_rnn_option(cell, option, tier):
    dtype = torch.float32 if cell == "gru" else torch.float16
    checks.rnn_scan(cell, 3, 6, units(tier), dtype, "cpu", plan=tiles(tier), options=(option,))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_rnn_all_options(cell, tier, reverse):
    """Two heads, two batch tiles (in the step tier two unit tiles), and every option at once."""
    options, b = checks.options_of(cell), 5 if tier == "step" else 17
    checks.rnn_scan(
        cell, 3, b, units(tier), torch.float32, "cpu", plan=tiles(tier), options=options, reverse=reverse,
        batch_major=True,
    )  # fmt: skip


PAIRS = tuple(enumerate(itertools.combinations(checks.LSTM_OPTIONS, 2)))


@pytest.mark.parametrize("number,pair", PAIRS, ids=lambda v: "-".join(v) if isinstance(v, tuple) else None)
def test_rnn_pair_of_options(number, pair):
    """The cells, tiers and directions take turns."""
    cell = "gru" if number % 2 and set(pair) <= set(checks.OPTIONS) else "lstm"
    tier, reverse = TIERS[number % 3], bool(number // 3 % 2)
    checks.rnn_scan(cell, 3, 3, units(tier), torch.float32, "cpu", plan=tiles(tier), options=pair, reverse=reverse)


def test_rnn_reads_a_bias_of_any_stride():
    xg, h0, w, wide = torch.randn(2, 3, 15), torch.randn(3, 5), torch.randn(15, 5), torch.randn(15, 2)
    for bias in (wide[:, 0], wide[:1, 0].expand(15)):
        found = [rnn.rnn_scan_fwd("gru", xg, h0, None, w, b)[0] for b in (bias, bias.contiguous())]
        assert torch.equal(*found)


@pytest.mark.parametrize("tier", TIERS)
def test_rnn_inference_with_options(tier):
    checks.rnn_inference("lstm", 3, 4, units(tier), torch.float32, "cpu", plan=tiles(tier), options=checks.LSTM_OPTIONS)
    checks.rnn_inference("rnn_relu", 3, 4, units(tier), torch.float32, "cpu", plan=tiles(tier), options=("zone_h",))


def test_rnn_falls_back_where_the_driver_refuses(monkeypatch):
    """A GPU that cannot hold all programs at once says so at the launch; then one launch a step runs."""
    launch, kernels = common.launch, []

    def refusing(kernel, grid, *args, cooperative=False, **constants):
        if cooperative:
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
        kernels.append(kernel.__name__)
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(common, "launch", refusing)
    with pytest.warns(UserWarning, match="one launch a step runs instead: persistent"):
        checks.rnn_scan("lstm", 2, 3, 140, torch.float16, "cpu", plan=tiles("persistent"), options=("lengths",))
    assert set(kernels) == {"forward_step_kernel", "backward_step_kernel"}
    monkeypatch.setattr(common, "launch", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        checks.rnn_scan("lstm", 2, 3, 140, torch.float16, "cpu", plan=tiles("persistent"))


def test_rnn_says_what_it_does_not_take():
    xg, h0, w = torch.zeros(5, 12), torch.zeros(2, 4), torch.zeros(12, 4)
    with pytest.raises(ValueError, match="not packed"):
        rnn.rnn_scan_fwd("gru", xg, h0, None, w, None, lengths=torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="lengths are on meta, the sequences on cpu"):
        rnn.rnn_scan_fwd("gru", xg[:, None], h0, None, w, None, lengths=torch.zeros(1, device="meta"))


@settings(max_examples=16)
@given(
    cell=st.sampled_from(CELLS),
    tier=st.sampled_from(TIERS),
    t=st.integers(1, 4),
    b=st.integers(1, 18),
    h=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    reverse=st.booleans(),
    batch_major=st.booleans(),
    bias=st.booleans(),
    options=st.sets(st.sampled_from(checks.LSTM_OPTIONS)),
    seed=st.integers(0, 1000),
)
def test_rnn_scan_any(cell, tier, t, b, h, dtype, reverse, batch_major, bias, options, seed):
    options &= set(checks.options_of(cell))
    checks.rnn_scan(
        cell, t, b, h, dtype, "cpu", plan=tiles(tier), reverse=reverse, batch_major=batch_major, bias=bias, seed=seed,
        options=options,
    )  # fmt: skip
