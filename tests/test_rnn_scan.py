"""The scan's ops with everything that ScanOptions can ask for, against the reference in float64 through autograd."""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfuse import native
from seqfuse.reference import GATES, PLAIN, ScanOptions, rnn
from seqfuse.testing import assert_accurate

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

FUSED_PLAIN = dict(list(PLAIN._asdict().items())[:8])  # what the ops take of a scan's options
CELLS = ["rnn_tanh", "rnn_relu", "gru", "lstm"]
LEVELS = native.LEVELS[: native.LEVELS.index(native.build_facts().get("isa_detected", "baseline")) + 1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# "packed" is a layout and implies lengths; "heads" is w_hh's shape; "dcells" is a gradient; the rest are ScanOptions
ANY_CELL = ["lengths", "packed", "resets", "hidden_mask", "zone_h", "zoneout_h", "heads"]
LSTM_ONLY = ["peephole", "zone_c", "zoneout_c", "dcells"]
SEQUENCES = {"xg", "y", "cells", "dy", "dcells", "gates", "dxg", "dan", "resets", "zone_h", "zone_c"}


def options_of(cell):
    return ANY_CELL + LSTM_ONLY if cell == "lstm" else ANY_CELL


def rounded(*shape):
    """Standard normal float64 numbers that bf16 holds too, so that every dtype starts from the same ones."""
    return torch.randn(shape, dtype=torch.float64).bfloat16().double()


def lengths_for(T, B):
    lengths = torch.randint(0, T + 1, (B,))
    lengths[torch.randint(B, ())] = T
    return lengths


def case(cell, T, B, H, wanted=(), lengths=None, heads=None):
    """Inputs, options and gradients of one scan, all dense and float64: dict by name."""
    G, options = GATES[cell], {}
    if lengths is None and {"lengths", "packed"} & set(wanted):
        lengths = lengths_for(T, B)
    options["lengths"] = lengths
    if "resets" in wanted:
        options["resets"] = torch.rand(T, B) < 0.3
    if "hidden_mask" in wanted:
        options["hidden_mask"] = (torch.rand(B, H) < 0.7).double() * 1.5
    if "peephole" in wanted:
        options["peephole"] = rounded(3, H)
    for name in ("zone_h", "zone_c"):
        if name in wanted:
            options[name] = torch.rand(T, B, H) < 0.3
    for name, weight in (("zoneout_h", 0.25), ("zoneout_c", 0.125)):
        if name in wanted:
            options[name] = weight
    heads = heads or (2 if "heads" in wanted else 1)
    lstm = cell == "lstm"
    tensors = {"xg": rounded(T, B, G * H), "h0": rounded(B, H), "c0": rounded(B, H) if lstm else None}
    tensors["w_hh"] = (rounded(G * H, H // heads) * (heads / H) ** 0.5).bfloat16().double()
    tensors["b_hh"] = rounded(G * H)
    grads = {"dy": rounded(T, B, H), "dh_n": rounded(B, H), "dc_n": rounded(B, H) if lstm else None}
    grads["dcells"] = rounded(T, B, H) if "dcells" in wanted else None
    return tensors, ScanOptions(**options), grads


def cast(x, dtype):
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def by_reference(cell, tensors, options, grads, reverse, dtype):
    """Outputs and gradients through autograd, da among them: a leaf is added to each step's product."""
    leaves = {n: None if t is None else t.detach().clone().to(dtype).requires_grad_() for n, t in tensors.items()}
    product, steps = rnn.recurrent_product, []

    def recorded(*args):
        a = product(*args)
        steps.append(torch.zeros_like(a, requires_grad=True))
        return a + steps[-1]

    options = ScanOptions(*(cast(o, dtype) for o in options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rnn, "recurrent_product", recorded)
        y, h_n, c_n, cells = rnn.rnn_scan(cell, *leaves.values(), reverse, options)
    out = {"y": y, "h_n": h_n} | ({"c_n": c_n, "cells": cells} if cell == "lstm" else {})
    pairs = [(out[n], grads[f"d{n}"]) for n in out if grads[f"d{n}"] is not None]
    torch.autograd.backward([o for o, _ in pairs], [g.to(dtype) for _, g in pairs])
    found = {n: t.detach() for n, t in out.items()}
    found |= {"dxg": leaves["xg"].grad, "dh0": leaves["h0"].grad, "db_hh": leaves["b_hh"].grad}
    if cell == "lstm":
        found["dc0"] = leaves["c0"].grad
    if cell == "gru":
        da = [torch.zeros_like(s) if s.grad is None else s.grad for s in (reversed(steps) if reverse else steps)]
        found["dan"] = torch.stack(da)[..., -leaves["h0"].shape[1] :]
    return found


def pack(x, lengths):
    return torch.cat([x[:n, b] for b, n in enumerate(lengths.tolist())])


def unpack(x, lengths, T):
    dense = x.new_zeros(T, len(lengths), *x.shape[1:])
    for b, rows in enumerate(x.split(lengths.tolist())):
        dense[: len(rows), b] = rows
    return dense


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensor operations wait for each other on a busy machine; the ops get their threads in by_op."""
    with on_threads(1):
        yield


@contextlib.contextmanager
def on_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_op(cell, tensors, options, grads, reverse, dtype, packed=False, layout=lambda x: x, threads=1):
    """The same from the ops. What lies beyond a sequence's end is NaN in xg and dy."""
    T, B = tensors["xg"].shape[:2]
    lengths = options.lengths
    tensors, grads = dict(tensors), dict(grads)
    if lengths is not None:
        beyond = (torch.arange(T)[:, None] >= lengths)[..., None]
        for group, name in ((tensors, "xg"), (grads, "dy"), (grads, "dcells")):
            if group[name] is not None:
                group[name] = group[name].masked_fill(beyond, float("nan"))
    options = options._asdict()
    if packed:
        for group, name in itertools.product((tensors, options, grads), SEQUENCES):
            if group.get(name) is not None:
                group[name] = pack(group[name], lengths)
    else:
        for group, name in itertools.product((tensors, options, grads), SEQUENCES):
            if group.get(name) is not None:
                group[name] = layout(group[name])
    inputs = {n: cast(t, dtype) for n, t in tensors.items()}
    given = tuple(cast(o, dtype) for o in options.values())[:8]
    number = CELLS.index(cell)
    g = {n: None if t is None else t.to(torch.float32 if n == "dcells" else dtype) for n, t in grads.items()}
    states = [inputs[n] for n in ("h0", "c0", "w_hh")]
    fwd, bwd = torch.ops.seqfuse.rnn_scan_fwd, torch.ops.seqfuse.rnn_scan_bwd
    with on_threads(threads):
        y, h_n, c_n, gates, cells = fwd(number, *inputs.values(), *given, reverse, True, False)
        back = bwd(number, *g.values(), y, gates, cells, *states, *given, reverse)
    found = {"y": y, "h_n": h_n, "c_n": c_n, "cells": cells}
    found |= dict(zip(("dxg", "dan", "dh0", "dc0", "db_hh"), back, strict=True))
    absent = {"gru": {"c_n", "cells", "dc0"}, "lstm": {"dan"}}.get(cell, {"c_n", "cells", "dc0", "dan"})
    for name in absent:
        assert found.pop(name).shape == (0,)
    if packed:
        found = {n: unpack(t, lengths, T) if n in SEQUENCES else t for n, t in found.items()}
    return found


def check(cell, made, dtype, reverse, packed=False, layout=lambda x: x, threads=1):
    """The ops keep the error rule at every instruction set of this machine."""
    tensors, options, grads = made
    exact = by_reference(cell, tensors, options, grads, reverse, torch.float64)
    theirs = by_reference(cell, tensors, options, grads, reverse, dtype)
    # relu's derivative jumps at zero: within bf16's rounding of it either value is right (test_recurrent.py)
    jumps = cell == "rnn_relu" and dtype == torch.bfloat16
    for level in LEVELS:
        with native.isa_limit(level):
            got = by_op(cell, tensors, options, grads, reverse, dtype, packed, layout, threads)
        assert got.keys() == exact.keys()
        for name, truth in exact.items():
            if jumps and name.startswith("d"):
                continue
            dims = (0, 1) if name in SEQUENCES else (0,) if truth.dim() == 2 else ()
            # cells and db_hh are fp32 whatever the inputs are, but made of values of their dtype
            assert_accurate(got[name], truth, theirs[name], dims=dims, what=f"{name} at {level}", dtype=dtype)
        if options.lengths is not None:
            beyond = torch.arange(len(got["y"]))[:, None] >= options.lengths
            for name in SEQUENCES & got.keys():
                assert (got[name][beyond] == 0).all(), name


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_each_option(cell, dtype, reverse):
    for option in options_of(cell):
        check(cell, case(cell, 6, 7, 20, [option]), DTYPES[dtype], reverse, option == "packed")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_pairs_of_options(cell, dtype):
    for i, pair in enumerate(itertools.combinations(options_of(cell), 2)):
        check(cell, case(cell, 4, 5, 12, pair), DTYPES[dtype], i % 2 == 1, "packed" in pair)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("size", [(12, 16, 64), (5, 2, 480)], ids=["batch-split", "units-split"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_everything_at_once_on_many_threads(cell, size, packed, dtype):
    wanted = ["lengths", "resets", "hidden_mask", "zone_h", "peephole", "zone_c", "dcells"]
    if cell != "lstm":
        wanted = wanted[:4]
    for threads, heads in ((2, 1), (3, 1), (2, 2), (2, 3)) if size[2] == 480 else ((2, 1), (3, 1)):
        made = case(cell, *size, wanted, heads=heads)
        check(cell, made, DTYPES[dtype], threads == 3, packed, threads=threads)


@settings(max_examples=80)
@given(data=st.data())
def test_random_configurations(data):
    def draw(strategy):
        return data.draw(strategy)

    cell, dtype = draw(st.sampled_from(CELLS)), draw(st.sampled_from(sorted(DTYPES)))
    heads = draw(st.integers(1, 5))
    T, B, H = draw(st.integers(1, 9)), draw(st.integers(1, 20)), heads * draw(st.integers(1, 30))
    wanted = [o for o in options_of(cell) if draw(st.booleans())]
    torch.manual_seed(draw(st.integers(0, 1000)))
    made = case(cell, T, B, H, wanted, heads=heads)
    check(cell, made, DTYPES[dtype], draw(st.booleans()), "packed" in wanted, threads=draw(st.integers(1, 3)))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    "lengths",
    [[0, 0, 0, 0], [5, 5, 5, 5], [0, 5, 0, 1], [3, 2, 2, 3], [1, 2, 3, 4]],
    ids=lambda n: "-".join(map(str, n)),
)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_lengths(cell, lengths, reverse):
    made = case(cell, 5, 4, 20, lengths=torch.tensor(lengths))
    for packed in (False, True):
        check(cell, made, torch.float32, reverse, packed)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_a_sequence_of_length_zero_passes_its_state_through(cell):
    tensors, options, grads = case(cell, 5, 3, 20, lengths=torch.tensor([0, 5, 0]))
    got = by_op(cell, tensors, options, grads, False, torch.float32)
    for state, last in (("h0", "h_n"), ("c0", "c_n"))[: 2 if cell == "lstm" else 1]:
        assert torch.equal(got[last][[0, 2]], tensors[state][[0, 2]].float())
        assert torch.equal(got[f"d{state}"][[0, 2]], grads[f"d{last}"][[0, 2]].float())


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_packed_equals_dense(cell, reverse):
    made = case(cell, 12, 9, 40, options_of(cell))
    dense, packed = (by_op(cell, *made, reverse, torch.float32, packed=p) for p in (False, True))
    for name, value in dense.items():
        assert torch.equal(value, packed[name]), name


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_batch_major_and_sliced_sequences(cell):
    made = case(cell, 5, 4, 20, [o for o in options_of(cell) if o != "packed"])
    check(cell, made, torch.float32, True, layout=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))
    check(cell, made, torch.float32, False, layout=lambda x: torch.stack([x, x], -1)[..., 0])
    check(cell, made, torch.float32, False, layout=lambda x: torch.cat([x, x], 1)[:, : x.shape[1]])


@pytest.mark.parametrize("size", [(16, 16, 64), (6, 2, 480)], ids=["batch-split", "units-split"])
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_repeats_are_bit_identical(cell, heads, size):
    T, B, H = size
    made = case(cell, T, B, H // heads * heads, options_of(cell), heads=heads)
    for threads in (1, 2, 3):
        first, *others = (by_op(cell, *made, False, torch.float32, threads=threads) for _ in range(3))
        for name, value in first.items():
            assert all(torch.equal(value, o[name]) for o in others), name


@pytest.mark.parametrize("cell", CELLS)
def test_cells_and_inference_equal_training(cell):
    tensors, options, _ = case(cell, 6, 5, 20, ["lengths", "zone_h"])
    args = (CELLS.index(cell), *(cast(t, torch.float32) for t in tensors.values()), *options[:8], False)
    trained = torch.ops.seqfuse.rnn_scan_fwd(*args, True, False)
    for want_cells in (False, True):
        inferred = torch.ops.seqfuse.rnn_scan_fwd(*args, False, want_cells)
        assert all(torch.equal(a, b) for a, b in zip(trained[:3], inferred[:3], strict=True))
        assert inferred[3].shape == (0,)
        kept = want_cells and cell == "lstm"
        assert torch.equal(inferred[4], trained[4]) if kept else inferred[4].shape == (0,)


@pytest.mark.parametrize("packed", [False, True], ids=["batch-major", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, packed):
    lengths = torch.tensor([3, 1, 0, 2] if packed else [3, 3, 3, 3])  # opcheck looks at all of gates, written or not
    tensors, options, grads = case(cell, 3, 4, 20, options_of(cell), lengths=lengths)
    options, number = options._asdict(), CELLS.index(cell)
    for group, name in itertools.product((tensors, options, grads), SEQUENCES):
        if group.get(name) is not None:
            x = group[name]
            group[name] = pack(x, options["lengths"]) if packed else x.transpose(0, 1).contiguous().transpose(0, 1)
    inputs = [cast(t, torch.float32) for t in tensors.values()]
    given = tuple(cast(o, torch.float32) for o in options.values())[:8]
    for save, want_cells in ((True, False), (False, True)):
        args = (number, *inputs, *given, False, save, want_cells)
        torch.library.opcheck(torch.ops.seqfuse.rnn_scan_fwd.default, args)
    y, _, _, gates, cells = torch.ops.seqfuse.rnn_scan_fwd(number, *inputs, *given, False, True, False)
    args = (number, *(cast(g, torch.float32) for g in grads.values()), y, gates, cells, *inputs[1:4], *given, False)
    torch.library.opcheck(torch.ops.seqfuse.rnn_scan_bwd.default, args)


def lstm_call(T=3, B=2, H=6, packed=None, cell="lstm", **changed):
    """One forward call with the named arguments changed."""
    tensors, _, _ = case(cell, T, B, H)
    args = {n: cast(t, torch.float32) for n, t in tensors.items()} | FUSED_PLAIN
    if packed:
        args["xg"] = torch.randn(packed, 4 * H)
    args |= changed
    return torch.ops.seqfuse.rnn_scan_fwd(CELLS.index(cell), *args.values(), False, True, False)


@pytest.mark.parametrize(
    "changed,text",
    [
        ({"lengths": torch.tensor([3, 4])}, "lengths must lie in [0, 3], got 4"),
        ({"lengths": torch.tensor([-1, 3])}, "lengths must lie in [0, 3], got -1"),
        ({"lengths": torch.tensor([1, 2, 3])}, "lengths must be int64 [B], with B = 2"),
        ({"lengths": torch.tensor([1, 2], dtype=torch.int32)}, "lengths must be int64"),
        ({"packed": 5}, "xg must be 3-D [T, B, X], or 2-D [N, X] with lengths"),
        ({"packed": 5, "lengths": torch.tensor([3, 1])}, "lengths must add up to the 5 rows"),
        ({"packed": 5, "lengths": torch.tensor([4, 4])}, "lengths must add up to the 5 rows"),
        ({"packed": 5, "lengths": torch.tensor([2**62, 2**62])}, "lengths must lie in [0, 5]"),
        ({"packed": 5, "lengths": torch.tensor([7, -2])}, "lengths must lie in [0, 5], got 7"),
        ({"resets": torch.zeros(3, 3, dtype=torch.bool)}, "resets must have 2 elements in dimension 1, got 3"),
        ({"resets": torch.zeros(3, 2)}, "resets must have dtype bool"),
        ({"packed": 5, "lengths": torch.tensor([3, 2]), "resets": torch.zeros(3, 2, dtype=torch.bool)},
         "resets must be 1-D, got 2-D"),
        ({"hidden_mask": torch.ones(2, 5)}, "hidden_mask must have 6 elements in dimension 1, got 5"),
        ({"hidden_mask": torch.ones(2, 6).bfloat16()}, "hidden_mask must have the dtype of the sequence"),
        ({"peephole": torch.ones(2, 6)}, "peephole must have 3 elements"),
        ({"cell": "gru", "peephole": torch.ones(3, 6)}, "peephole: only the LSTM"),
        ({"cell": "gru", "zone_c": torch.zeros(3, 2, 6, dtype=torch.bool)}, "zone_c: only the LSTM"),
        ({"zone_h": torch.zeros(3, 2, 5, dtype=torch.bool)}, "zone_h must have 6 elements in dimension 2, got 5"),
        ({"zone_c": torch.zeros(3, 2, 6)}, "zone_c must have dtype bool"),
        ({"zoneout_h": 1.5}, "zoneout_h must lie in [0, 1], got 1.5"),
        ({"zoneout_c": float("nan")}, "zoneout_c must lie in [0, 1]"),
        ({"w_hh": torch.randn(24, 4)}, "w_hh must have H / heads columns for H = 6, got 4"),
        ({"w_hh": torch.randn(24, 0)}, "w_hh must have H / heads columns for H = 6, got 0"),
        ({"w_hh": torch.randn(18, 6)}, "w_hh must have 24 elements in dimension 0, got 18"),
        ({"c0": None}, "c0 is missing"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(changed, text):
    with pytest.raises(RuntimeError) as caught:
        lstm_call(**changed)
    assert text in str(caught.value).split("\n")[0]


@pytest.mark.parametrize(
    "name,value,text",
    [
        ("dcells", torch.randn(3, 2, 5), "dcells must have 6 elements in dimension 2, got 5"),
        ("dcells", torch.randn(3, 2, 6).bfloat16(), "dcells must have dtype float32"),
        ("dy", torch.randn(2, 2, 6), "dy must have 3 elements in dimension 0, got 2"),
        ("cells", torch.randn(2, 2, 6), "cells must have 3 elements in dimension 0, got 2"),
        ("gates", torch.randn(0), "gates must be 3-D, got 1-D"),
        ("lengths", torch.tensor([9, 1]), "lengths must lie in [0, 3], got 9"),
    ],
)
def test_bad_input_of_the_backward_pass(name, value, text):
    tensors, options, grads = case("lstm", 3, 2, 6)
    inputs = {n: cast(t, torch.float32) for n, t in tensors.items()}
    y, _, _, gates, cells = torch.ops.seqfuse.rnn_scan_fwd(3, *inputs.values(), *options[:8], False, True, False)
    args = {n: cast(g, torch.float32) for n, g in grads.items()} | {"y": y, "gates": gates, "cells": cells}
    args |= {n: inputs[n] for n in ("h0", "c0", "w_hh")} | FUSED_PLAIN
    args[name] = value
    with pytest.raises(RuntimeError) as caught:
        torch.ops.seqfuse.rnn_scan_bwd(3, *args.values(), False)
    assert text in str(caught.value).split("\n")[0]
