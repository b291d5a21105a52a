"""The cluster-persistent recurrent kernels, executed on the CPU by the host side of the device layer under
AddressSanitizer and UBSan, against the float64 truth: cells, both 16-bit types and tf32, options, odd sizes, both
directions in one launch, and the plan."""

import functools

import pytest
import torch
from host_device.runner import DTYPES, Failed, Layout
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_on_host import CELLS, FLOATS, check_recurrent, recurrent_on_host, recurrent_sample
from test_rnn_scan import by_reference, case

from seqfuse import native
from seqfuse.reference import rnn as reference_rnn
from seqfuse.testing import assert_accurate

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


# The layer: what one block sends to another


def test_sent_bytes_are_counted(host):
    x = torch.randn(2, 4, 128)
    for seed in (1, 2, 3):
        numbers = {"blocks": 8, "rounds": 5, "mistake": 0, "seed": seed}
        out = host("relay", numbers, {"in": x}, {"out": (1024, torch.float32)})["out"]
        assert torch.equal(out.view(2, 4, 128), x.roll(5, 1))


def test_reading_before_the_bytes_have_come_gives_wrong_results(host):
    x, wrong = torch.randn(2, 4, 128), 0
    for seed in (1, 2, 3, 4):
        numbers = {"blocks": 8, "rounds": 5, "mistake": 1, "seed": seed}
        try:
            out = host("relay", numbers, {"in": x}, {"out": (1024, torch.float32)})["out"]
            wrong += not torch.equal(out.view(2, 4, 128), x.roll(5, 1))
        except Failed as failed:
            assert "arrivals" in str(failed) or "leaving the kernel" in str(failed)
            wrong += 1
    assert wrong, "in no schedule was a message late"


@pytest.mark.parametrize(
    "mistake,words",
    [
        (2, "is left with -16 bytes to come"),
        (3, "was not initialised"),
        (4, "go to different blocks"),
        (5, "its launch asked for"),
        (6, "no block 4 in a cluster"),
    ],
    ids=["too-few-bytes", "no-init", "wrong-count", "dynamic-size", "no-such-block"],
)
def test_mistakes_of_clusters_are_caught(host, mistake, words):
    with pytest.raises(Failed) as caught:
        numbers = {"blocks": 4, "rounds": 1, "mistake": mistake}
        host("relay", numbers, {"in": torch.randn(4, 128)}, {"out": (512, torch.float32)})
    assert words in str(caught.value)


# The plain scan

# T, B, H: size one; odd; one block, full and not; rows in two clusters; several blocks, tails in units
SIZES = [(1, 1, 1), (4, 3, 7), (3, 5, 32), (3, 17, 40), (2, 33, 64), (4, 2, 70)]


def check(host, *args, **options):
    check_recurrent(host, *args, kernels="rnn_cluster", **options)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "T{}-B{}-H{}".format(*s))
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_scan(host, cell, size):
    check(host, cell, *size, torch.bfloat16)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_scan_in_fp16(host, cell):
    check(host, cell, 3, 3, 40, torch.float16)


@pytest.mark.parametrize("cell,H", [("rnn_tanh", 270), ("gru", 161), ("lstm", 270)])
def test_scan_in_larger_clusters(host, cell, H):
    check(host, cell, 2, 3, H, torch.bfloat16)


@pytest.mark.parametrize("layout", ["batch", "padded"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_layouts_in_reverse(host, cell, layout):
    check(host, cell, 4, 3, 40, torch.bfloat16, reverse=True, layout=layout)
    check(host, cell, 3, 2, 9, torch.float16, reverse=True, layout=layout)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_unaligned_memory(host, cell):
    check(host, cell, 2, 3, 16, torch.bfloat16, offset=4)


def test_relu(host):
    tensors, _ = recurrent_sample("rnn_relu", 4, 3, 33, torch.bfloat16)
    check(host, "rnn_relu", 4, 3, 33, torch.bfloat16, save=False)
    # its derivative jumps at zero, where rounding decides: positive values keep away from there
    tensors = {n: t.abs() + 0.25 if n == "xg" else t.abs() * 0.25 for n, t in tensors.items()}
    grads = {"y": torch.ones_like(tensors["xg"]), "h_n": torch.ones_like(tensors["h0"])}
    got = recurrent_on_host(host, "rnn_relu", tensors, grads, False, torch.bfloat16, kernels="rnn_cluster")
    reference = by_reference("rnn_relu", _named(tensors), no_options(), _gradients(grads), False, torch.float64)
    for name in ("y", "dxg", "dh0", "db_hh"):
        assert_accurate(got[name], reference[name], what=name, dtype=torch.bfloat16)


@pytest.mark.parametrize("cell", CELLS)
def test_inference_saves_nothing(host, cell):
    check(host, cell, 4, 3, 24, torch.bfloat16, save=False)


@pytest.mark.parametrize("without", [("y",), ("h_n",), ("y", "c_n"), ("h_n", "c_n")], ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_missing_gradients(host, cell, without):
    check(host, cell, 3, 2, 8, torch.bfloat16, without=[n for n in without if n != "c_n" or cell == "lstm"])


def test_without_bias(host):
    for cell in ("rnn_tanh", "gru", "lstm"):
        check(host, cell, 2, 3, 8, torch.bfloat16, bias=False)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_long_sequence_keeps_its_state_in_fp32(host, cell):
    check(host, cell, 24, 2, 8, torch.bfloat16)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_scan_is_the_same_for_every_schedule(host, cell):
    tensors, grads = recurrent_sample(cell, 4, 2, 70, torch.bfloat16)
    first, *others = (
        recurrent_on_host(host, cell, tensors, grads, False, torch.bfloat16, seed=seed, kernels="rnn_cluster")
        for seed in (1, 2, 3)
    )
    assert all(torch.equal(first[n], other[n]) for other in others for n in first)


# Options

OPTIONS = ["lengths", "resets", "zone_h", "zoneout_h"]
LSTM_OPTIONS = [*OPTIONS, "zone_c", "zoneout_c", "dcells"]
SEQUENCES = {"xg", "y", "cells", "dy", "dcells", "gates", "dxg", "dan", "resets", "zone_h", "zone_c"}


def no_options():
    return case("lstm", 1, 1, 1)[1]


def _named(tensors):
    return {n: tensors.get(n) for n in ("xg", "h0", "c0", "w_hh", "b_hh")}


def _gradients(grads):
    return {f"d{n}": grads.get(n) for n in ("y", "h_n", "c_n", "cells")}


def run_with_options(host, cell, tensors, options, grads, reverse, dtype, layout="time", seed=1):
    """Outputs and gradients of the cluster kernels. What lies beyond a sequence's end is NaN in xg, dy and dcells."""
    T, B, X = tensors["xg"].shape
    H = X if cell.startswith("rnn") else tensors["h0"].shape[1]
    saved = 4 if cell in ("gru", "lstm") else 1 if options.zone_h is not None or options.zoneout_h else 0
    widths = {"xg": X, "y": H, "dy": H, "dxg": X, "gates": saved * H, "cells": H, "dcells": H, "dan": H}
    single = {"cells": torch.float32, "dcells": torch.float32}
    lay = {n: Layout(layout, T, B, width, single.get(n, dtype)) for n, width in widths.items() if width}
    lay |= {"resets": Layout("time", T, B, 1, torch.bool)}
    lay |= {n: Layout("batch" if layout == "batch" else "time", T, B, H, torch.bool) for n in ("zone_h", "zone_c")}
    given = {n: t for n, t in options._asdict().items() if isinstance(t, torch.Tensor)}
    numbers = {"cell": CELLS[cell], "dtype": DTYPES[dtype], "T": T, "B": B, "H": H, "reverse": reverse, "seed": seed}
    numbers |= {n: float(w) for n in ("zoneout_h", "zoneout_c") if (w := getattr(options, n))}
    beyond = None if options.lengths is None else (torch.arange(T)[:, None] >= options.lengths)[..., None]

    def stored(name, t):
        if name not in lay:
            return t if t.dtype in (torch.bool, torch.int64) else t.to(dtype)
        if t.dtype == torch.bool:
            flat = torch.zeros(lay[name].count, dtype=torch.bool)
            lay[name].view(flat).copy_(t.view(T, B, -1))
            return flat
        if beyond is not None and name in ("xg", "dy", "dcells"):
            t = t.masked_fill(beyond, float("nan"))
        return lay[name].store(t.to(lay[name].dtype))

    def call(op, inputs, outputs):
        inputs = {n: stored(n, t) for n, t in inputs.items() if t is not None}
        shapes = [n for n in (*inputs, *outputs) if n in lay]
        strides = {k: v for n in shapes for k, v in lay[n].numbers(n).items()}
        sizes = {n: (lay[n].count, lay[n].dtype) if n in lay else (size, kind) for n, (size, kind) in outputs.items()}
        found = host(op, numbers | strides, inputs, sizes)
        assert all(lay[n].untouched(found[n]) for n in found if n in lay), "a gap between rows was written"
        return {n: lay[n].view(t) if n in lay else t if n == "db_hh" else t.view(B, H) for n, t in found.items()}

    lstm, state = cell == "lstm", (B * H, dtype)
    outputs = {"y": (0, 0), "h_n": state} | ({"gates": (0, 0)} if saved else {})
    outputs |= {"c_n": state, "cells": (0, 0)} if lstm else {}
    found = call("rnn_cluster_forward", {**tensors, **given}, outputs)
    inputs = {n: found.get(n) for n in ("y", "gates", "cells")} | {n: tensors[n] for n in ("h0", "c0", "w_hh")}
    outputs = {"dxg": (0, 0), "dh0": state, "db_hh": (X, torch.float32)}
    outputs |= {"dc0": state} if lstm else {"dan": (0, 0)} if cell == "gru" else {}
    found |= call("rnn_cluster_backward", {**inputs, **grads, **given}, outputs)
    gates = found.pop("gates", None)
    if beyond is not None and gates is not None:
        assert gates[beyond.expand_as(gates)].isnan().all(), "gates are not written beyond the end"
    return found


def check_options(host, cell, T, B, H, wanted, dtype=torch.bfloat16, reverse=False, lengths=None, **how):
    tensors, options, grads = case(cell, T, B, H, wanted, lengths)
    exact = by_reference(cell, tensors, options, grads, reverse, torch.float64)
    by_them = by_tf32 if dtype == torch.float32 else functools.partial(by_reference, dtype=dtype)
    theirs = by_them(cell, tensors, options, grads, reverse)
    got = run_with_options(host, cell, tensors, options, grads, reverse, dtype, **how)
    assert got.keys() == exact.keys()
    for name, truth in exact.items():
        if cell == "rnn_relu" and name.startswith("d"):  # its derivative jumps at zero, see test_recurrent.py
            continue
        dims = (0, 1) if name in SEQUENCES else (0,) if truth.dim() == 2 else ()
        assert_accurate(got[name], truth, theirs[name], dims=dims, what=f"{cell} {wanted} {name}", dtype=dtype)
    if options.lengths is not None:
        beyond = torch.arange(T)[:, None] >= options.lengths
        for name in SEQUENCES & got.keys():
            assert (got[name][beyond] == 0).all(), f"{name} beyond a sequence's end"


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_each_option(host, cell, reverse):
    for option in LSTM_OPTIONS if cell == "lstm" else OPTIONS:
        check_options(host, cell, 5, 4, 20, [option], reverse=reverse)


@settings(max_examples=16)
@given(
    cell=st.sampled_from(["rnn_tanh", "gru", "lstm"]),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 70)),
    dtype=st.sampled_from(sorted(HALVES)),
    wanted=st.sets(st.sampled_from(LSTM_OPTIONS)),
    reverse=st.booleans(),
    layout=st.sampled_from(["time", "batch", "padded"]),
    seed=st.integers(0, 1000),
)
def test_random_options(host, cell, sizes, dtype, wanted, reverse, layout, seed):
    wanted = sorted(wanted if cell == "lstm" else wanted & set(OPTIONS))
    wanted = [w for w in wanted if not (w.startswith("zoneout") and w.replace("zoneout", "zone") in wanted)]
    torch.manual_seed(seed)
    check_options(host, cell, *sizes, wanted, HALVES[dtype], reverse, layout=layout, seed=seed)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_empty_sequences_keep_the_initial_state(host, cell, reverse):
    wanted = ["lengths", "resets", "zone_h"]
    check_options(host, cell, 4, 3, 33, wanted, reverse=reverse, lengths=torch.tensor([0, 4, 1]))
    check_options(host, cell, 2, 2, 8, wanted, reverse=reverse, lengths=torch.tensor([0, 0]))


def test_a_large_batch_with_lengths(host):
    check_options(host, "lstm", 2, 70, 3, ["lengths", "dcells"])


def test_an_option_that_the_kernel_lacks_is_refused(host):
    tensors, options, grads = case("lstm", 2, 2, 8, ["hidden_mask"])
    with pytest.raises(Failed, match="returned 801"):
        run_with_options(host, "lstm", tensors, options, grads, False, torch.bfloat16)
    with pytest.raises(Failed, match="returned 1"):
        check_recurrent(host, "lstm", 1, 1, 258, FLOATS["fp32"], kernels="rnn_cluster")


# float32 in tf32: what a kernel that rounds h and w_hh to tf32 before each product may lose. The baseline of the error
# rule is the reference in float32 with that rounding; backward, da and w_hh are rounded.


def tf32(x):
    """To the nearest tf32, ties away from zero: the GPU's cvt.rna."""
    return ((x.float().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Tf32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w):
        ctx.save_for_backward(h, w)
        return tf32(h) @ tf32(w).t()

    @staticmethod
    def backward(ctx, da):
        h, w = ctx.saved_tensors
        return tf32(da) @ tf32(w), da.t() @ h


def by_tf32(cell, tensors, options, grads, reverse):
    def product(h, w_hh, b_hh, norm=None):
        return Tf32Product.apply(h, w_hh) + b_hh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_rnn, "recurrent_product", product)
        return by_reference(cell, tensors, options, grads, reverse, torch.float32)


def test_rounding_to_tf32(host):
    bits = torch.randint(-(2**31), 2**31, (4000,), dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x = torch.cat([x[x.isfinite()], torch.tensor([0.0, -0.0, 1.0 + 2**-11, 1.0 + 2**-12, -1.0 - 2**-11])])
    out = host("round_tf32", {"n": len(x)}, {"in": x}, {"out": (len(x), torch.float32)})["out"]
    assert torch.equal(out, tf32(x))
    assert out[-3:].tolist() == [1.0 + 2**-10, 1.0, -1.0 - 2**-10]
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    out = host("mma_tf32", {}, {"a": a, "b": b}, {"out": (128, torch.float32)})["out"]
    assert_accurate(out.view(16, 8), tf32(a).double() @ tf32(b).double().T, dims=(0, 1))


@pytest.mark.parametrize(
    "size", [(1, 1, 1), (3, 3, 7), (3, 17, 40), (2, 2, 130)], ids=lambda s: "T{}-B{}-H{}".format(*s)
)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_float32(host, cell, size):
    check_options(host, cell, *size, [], torch.float32)


def test_float32_of_the_largest_cluster(host):
    check_options(host, "rnn_tanh", 2, 1, 300, [], torch.float32, reverse=True)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_float32_with_options(host, cell):
    both = ["lengths", "resets"] + (["zone_c", "dcells"] if cell == "lstm" else [])
    check_options(host, cell, 4, 3, 33, [*both, "zone_h"], torch.float32, layout="batch")
    check_options(host, cell, 3, 2, 10, ["zoneout_h", "lengths"], torch.float32, reverse=True, layout="padded")


# Both directions of a layer in one launch: every bit as from two launches, in memory that lies together


def side_by_side(pair):
    return torch.cat(pair, -1)


COLUMNS = {"xg", "y", "dy", "dxg", "dan"}


def run_both(host, cell, scans, options, grads, dtype, seed):
    """Outputs and gradients of both directions: of each name what one launch for both wrote.

    scans: for each direction its tensors; options: of each; grads: of each."""
    T, B, X = scans[0]["xg"].shape
    H = scans[0]["h0"].shape[1]
    saved = 4 if cell in ("gru", "lstm") else 1 if options[0].zone_h is not None or options[0].zoneout_h else 0

    def together(name, pair):
        if pair[0] is None:
            return None
        kind = torch.float32 if name in ("cells", "dcells") else dtype
        pair = [t if t.dtype in (torch.bool, torch.int64) else t.to(kind) for t in pair]
        return side_by_side(pair) if name in COLUMNS else torch.stack(pair)

    wide = {"xg": 2 * X, "y": 2 * H, "dy": 2 * H, "dxg": 2 * X, "dan": 2 * H}
    wide |= {n: saved * H if n == "gates" else H for n in ("gates", "cells", "dcells", "zone_h", "zone_c")} | {
        "resets": 1
    }
    numbers = {
        "cell": CELLS[cell],
        "dtype": DTYPES[dtype],
        "T": T,
        "B": B,
        "H": H,
        "reverse": 0,
        "seed": seed,
        "scans": 2,
    }
    numbers |= {f"{n}_t": B * w for n, w in wide.items()} | {f"{n}_b": w for n, w in wide.items()}
    numbers |= {n: float(w) for n in ("zoneout_h", "zoneout_c") if (w := getattr(options[0], n))}
    inputs = {n: together(n, [s[n] for s in scans]) for n in ("xg", "h0", "c0", "w_hh", "b_hh")}
    given = {n: together(n, [getattr(o, n) for o in options]) for n in ("zone_h", "zone_c")}
    given |= {n: getattr(options[0], n) for n in ("lengths", "resets")}
    rows, states, lstm = 2 * T * B, (2 * B * H, dtype), cell == "lstm"
    outputs = {"y": (rows * H, dtype), "h_n": states} | ({"gates": (rows * saved * H, dtype)} if saved else {})
    outputs |= {"c_n": states, "cells": (rows * H, torch.float32)} if lstm else {}
    found = host("rnn_cluster_forward", numbers, inputs | given, outputs)
    again = {n: inputs[n] for n in ("h0", "c0", "w_hh")} | {n: found.get(n) for n in ("y", "gates", "cells")} | given
    again |= {n: together(n, [g[n] for g in grads]) for n in grads[0]}
    outputs = {"dxg": (rows * X, dtype), "dh0": states, "db_hh": (2 * X, torch.float32)}
    outputs |= {"dc0": states} if lstm else {"dan": (rows * H, dtype)} if cell == "gru" else {}
    found |= host("rnn_cluster_backward", numbers, again, outputs)
    found.pop("gates", None)

    def apart(name, t, way):
        if name in COLUMNS:
            return t.view(T, B, 2, -1)[:, :, way]
        return (
            t.view(2, T, B, H)[way]
            if name == "cells"
            else t.view(2, -1 if name == "db_hh" else B, H if name != "db_hh" else 1)[way]
        )

    return [{n: apart(n, t, way).reshape(-1) for n, t in found.items()} for way in range(2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", [[], ["lengths", "resets", "zone_h", "zone_c", "dcells"], ["zoneout_h"]], ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_both_directions_in_one_launch(host, cell, wanted, dtype):
    T, B, H = 3, 18, 34
    wanted = [w for w in wanted if cell == "lstm" or w not in ("zone_c", "dcells")]
    lengths = torch.arange(B) % (T + 1) if "lengths" in wanted else None
    (one, options, grads), (two, options2, grads2) = (case(cell, T, B, H, wanted, lengths) for _ in range(2))
    options2 = options2._replace(lengths=options.lengths, resets=options.resets)
    if lengths is not None:  # the launches of one direction put NaN there, those of both zeros: neither is read
        beyond = (torch.arange(T)[:, None] >= lengths)[..., None]
        for t in (one["xg"], two["xg"], *(g[n] for g in (grads, grads2) for n in ("dy", "dcells") if g[n] is not None)):
            t.masked_fill_(beyond, 0.0)
    found = run_both(host, cell, (one, two), (options, options2), (grads, grads2), dtype, seed=3)
    pairs = zip(found, ((one, options, grads, False), (two, options2, grads2, True)), strict=True)
    for got, (tensors, own, gradients, reverse) in pairs:
        alone = run_with_options(host, cell, tensors, own, gradients, reverse, dtype)
        assert got.keys() == alone.keys()
        for name, t in alone.items():
            assert torch.equal(got[name], t.reshape(-1)), f"{name}, reverse={reverse}"


# The plan


def plan(*args):
    if native.missing() is not None:
        pytest.skip(native.missing())
    from seqfuse import _C

    return _C.rnn_cluster_plan(*args)


def test_plan_of_what_fits():
    found = plan(CELLS["lstm"], DTYPES[torch.bfloat16], 200, 512, 90, 6)
    assert found["refusal"] is None
    assert (found["blocks"], found["groups"], found["waves"], found["extent"]) == (16, 13, 3, 512)
    found = plan(CELLS["gru"], DTYPES[torch.float16], 1, 70, 90, 40)
    assert (found["blocks"], found["groups"], found["waves"], found["extent"]) == (3, 1, 1, 256)
    assert found["text"] == "one launch: 1 clusters of 3 blocks, 40 at a time (1 waves), extent 256"


@pytest.mark.parametrize(
    "dtype,H,capability,resident,words",
    [
        (torch.bfloat16, 64, 80, 9, "has 8.0"),
        (torch.bfloat16, 64, 120, 9, "has 12.0"),
        (torch.float32, 64, 90, 9, "in tf32, which torch.set_float32_matmul_precision must allow"),
        (torch.bfloat16, 513, 90, 9, "512 hidden units at most, not 513"),
        (torch.bfloat16, 512, 90, 0, "no room for a cluster of 16 blocks"),
    ],
)
def test_plan_says_why_not(dtype, H, capability, resident, words):
    found = plan(CELLS["lstm"], DTYPES[dtype], 16, H, capability, resident)
    assert words in found["refusal"] and found["text"] == f"one launch a step: {found['refusal']}"


@pytest.mark.parametrize("backward", [False, True])
def test_plan_for_the_current_device(host, backward):
    def text(**changes):
        numbers = {"cell": 3, "dtype": 1, "B": 40, "H": 70, "backward": backward}
        numbers |= {"capability": 90, "resident": 2, "allow": 1, "scans": 1, "tf32": 0} | changes
        return bytes(host("rnn_cluster_plan", numbers, {}, {"text": (120, torch.uint8)})["text"]).decode().strip()

    assert text() == "one launch: 3 clusters of 3 blocks, 2 at a time (2 waves), extent 256"
    assert text(scans=2) == "one launch: 6 clusters of 3 blocks, 2 at a time (3 waves), extent 256"
    assert "must allow" in text(dtype=0) and text(dtype=0, tf32=1) == text()
    assert "switched off" in text(allow=0)
    assert "no room" in text(resident=0)
    assert "has 8.9" in text(capability=89)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("H", [256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shared_memory_fits_the_architecture(cell, H, dtype):
    found = plan(CELLS[cell], DTYPES[dtype], 16, H, 90, 1, 1, True)
    if dtype == torch.float32 and H == 512 and cell != "rnn_tanh":
        assert "256 hidden units at most in float32" in found["refusal"]
        return
    assert found["shared_forward"] <= 48 * 1024 or dtype == torch.float32  # in 16 bits there is nothing to ask for
    assert max(found["shared_forward"], found["shared_backward"]) <= 232448  # of a block on sm_90
