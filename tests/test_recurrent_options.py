"""What torch.nn's recurrent layers have not: each option by itself against a second way to say the same, all of them
together on the fused kernels, padding that leaks nothing, second derivatives, repeatability, recomputation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_checks import call, check, compare, flat, numbers, rounded, state_of
from torch.nn.utils.rnn import pack_padded_sequence

import seqfuse
from seqfuse.ops import rnn_extras
from seqfuse.testing import assert_accurate

KINDS = {"rnn": seqfuse.nn.RNN, "gru": seqfuse.nn.GRU, "lstm": seqfuse.nn.LSTM}


def close(a, b):
    """a equals b, computed in float64 in another way."""
    assert_accurate(a, b.detach(), b.detach())


# One option at a time: the reference in float64 against another way to say the same.


@pytest.mark.parametrize("kind", KINDS)
def test_resets_equal_separate_sequences(kind):
    module = KINDS[kind](3, 4).double()
    x, resets = numbers(7, 2, 3), torch.zeros(7, 2, dtype=torch.bool)
    resets[4] = True
    hx = state_of(module, 2)
    y, state = module(x, hx, resets=resets)
    first, second = module(x[:4], hx)[0], module(x[4:])
    close(y, torch.cat([first, second[0]]))
    for a, b in zip(flat(state), flat(second[1]), strict=True):
        close(a, b)


def test_cell_states_equal_a_loop():
    for more in ({}, dict(proj_size=2)):
        module = seqfuse.nn.LSTM(3, 4, **more).double()
        x, state, seen = numbers(6, 2, 3), None, []
        for t in range(6):
            _, state = module(x[t : t + 1], state)
            seen.append(state[1][0])
        cells = module(x, return_cell_states=True)[2]
        close(cells, torch.stack(seen))
        module.batch_first = True
        close(module(x.transpose(0, 1), return_cell_states=True)[2], torch.stack(seen, 1))
        close(module(x[:, 0], return_cell_states=True)[2], torch.stack(seen)[:, 0])
        packed = module(pack_padded_sequence(x, [6, 6]), return_cell_states=True)[2]
        close(packed.data, torch.stack(seen).flatten(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_equal_a_block_diagonal_matrix(kind):
    """Unit j of a gate sees only the units of its own head."""
    module, dense = KINDS[kind](3, 6, heads=3).double(), KINDS[kind](3, 6).double()
    weights = dict(module.named_parameters())
    blocks = weights["weight_hh_l0"].view(-1, 3, 2, 2)  # (gate, head, unit, k)
    weights["weight_hh_l0"] = torch.cat([torch.block_diag(*gate) for gate in blocks])
    x = numbers(5, 2, 3)
    close(module(x)[0], torch.func.functional_call(dense, weights, (x,))[0])


def test_peephole_and_layer_norm_equal_the_equations():
    module = seqfuse.nn.LSTM(3, 4, peephole=True, layer_norm=True).double()
    for p in module.parameters():
        torch.nn.init.normal_(p)
    x, h, c, seen = numbers(5, 2, 3), torch.zeros(2, 4).double(), torch.zeros(2, 4).double(), []
    p_i, p_f, p_o = module.weight_ph_l0
    for t in range(5):
        gates = F.layer_norm(x[t] @ module.weight_ih_l0.T, (16,), module.weight_ln_ih_l0) + module.bias_ih_l0
        gates = gates + F.layer_norm(h @ module.weight_hh_l0.T, (16,), module.weight_ln_hh_l0) + module.bias_hh_l0
        i, f, g, o = gates.chunk(4, -1)
        c = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
        shown = F.layer_norm(c, (4,), module.weight_ln_c_l0, module.bias_ln_c_l0)
        h = (o + p_o * c).sigmoid() * shown.tanh()
        seen.append(h)
    close(module(x)[0], torch.stack(seen))


def test_zoneout_equals_a_loop_over_cells():
    """In evaluation the expectation; in training a unit either keeps its value or takes the new one."""
    module = seqfuse.nn.LSTM(3, 4, zoneout=(0.3, 0.2)).double().eval()
    plain = copy.deepcopy(module)
    plain.zoneout = 0.0
    x, h, c, seen = numbers(5, 2, 3), torch.zeros(1, 2, 4).double(), torch.zeros(1, 2, 4).double(), []
    for t in range(5):
        _, (new_h, new_c) = plain(x[t : t + 1], (h, c))
        h, c = 0.3 * h + 0.7 * new_h, 0.2 * c + 0.8 * new_c
        seen.append(h[0])
    close(module(x)[0], torch.stack(seen))
    module.train()
    module.zoneout = 1.0
    assert module(x)[0].eq(0).all()
    module.zoneout = (0.4, 0.0)
    y, _, cells = module(numbers(200, 2, 3), return_cell_states=True)
    kept = y[1:] == y[:-1]
    assert 0.3 < kept.double().mean() < 0.5 and not (cells[1:] == cells[:-1]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_weight_drop_and_variational_dropout_equal_masked_weights_and_inputs(kind, monkeypatch):
    masks = []

    def record(shape, p, like):
        masks.append(torch.rand(shape) < p)
        return ~masks[-1] / (1 - p)

    monkeypatch.setattr(rnn_extras, "keep_mask", record)
    module, plain = KINDS[kind](3, 4, weight_drop=0.5).double(), KINDS[kind](3, 4).double()
    x = numbers(5, 2, 3)
    y = module(x)[0]
    weights = dict(module.named_parameters())
    weights["weight_hh_l0"] = weights["weight_hh_l0"] * ~masks[0] * 2
    close(y, torch.func.functional_call(plain, weights, (x,))[0])
    module.weight_drop, module.variational_dropout = 0.0, (0.5, 0.0)
    y = module(x)[0]
    close(y, torch.func.functional_call(plain, dict(module.named_parameters()), (x * ~masks[1] * 2,))[0])
    module.variational_dropout = (0.0, 0.5)  # one sequence: a mask of h is a mask of w_hh's columns
    y = module(x[:, :1])[0]
    weights = dict(module.named_parameters())
    weights["weight_hh_l0"] = weights["weight_hh_l0"] * ~masks[2] * 2
    close(y, torch.func.functional_call(plain, weights, (x[:, :1],))[0])
    assert [m.shape for m in masks] == [plain.weight_hh_l0.shape, (2, 3), (1, 4)]


def test_masks_have_their_probability():
    torch.manual_seed(2)
    for p in (0.0, 0.01, 0.25, 0.5, 0.9, 1.0):
        share = rnn_extras.drawn((1000, 401), p, "cpu").double().mean().item()
        assert abs(share - p) <= 5 * (p * (1 - p) / 401_000) ** 0.5  # five standard deviations
        keep = rnn_extras.keep_mask((1000, 401), p, torch.empty(0))
        assert abs(keep.eq(0).double().mean().item() - p) <= 5 * (p * (1 - p) / 401_000) ** 0.5
        assert p == 1 or torch.allclose(keep[keep != 0], torch.tensor(1 / (1 - p)), rtol=1e-6, atol=0)


# All of it on the CPU kernel.

SINGLE = {
    "lengths": ({}, dict(lengths=torch.tensor([7, 1, 4]))),
    "resets": ({}, dict(resets=torch.rand(7, 3, generator=torch.Generator().manual_seed(1)) < 0.3)),
    "zoneout": (dict(zoneout=0.3), {}),
    "variational_dropout": (dict(variational_dropout=(0.2, 0.4)), {}),
    "weight_drop": (dict(weight_drop=0.5), {}),
    "heads": (dict(heads=3), {}),
    "recompute": (dict(recompute=True), {}),
    "recompute with lengths": (dict(recompute=True), dict(lengths=torch.tensor([7, 1, 4]))),
    "peephole": (dict(peephole=True), {}),
    "cell states": ({}, dict(return_cell_states=True)),
    "peephole, zoneout": (dict(peephole=True, zoneout=0.3), dict(lengths=torch.tensor([7, 1, 4]))),
}
LSTM_ONLY = ("peephole", "cell states", "peephole, zoneout")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "kind,name", [(k, n) for k in KINDS for n in SINGLE if k == "lstm" or n not in LSTM_ONLY], ids=str
)
def test_option_keeps_the_error_rule(kind, name, mode, dtype):
    options, more = SINGLE[name]
    module = KINDS[kind](5, 18, num_layers=2, bidirectional=True, dropout=0.2, **options).train(mode == "train")
    check(module, numbers(7, 3, 5), state_of(module, 3), dtype=dtype, **more)


probability = st.sampled_from([0.0, 0.3])


@settings(max_examples=40)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 1000))
def test_options_compose(data, kind, seed):
    torch.manual_seed(seed)
    draw, flag = data.draw, st.booleans()
    options = dict(
        num_layers=draw(st.integers(1, 2)), bidirectional=draw(flag), batch_first=draw(flag), bias=draw(flag),
        dropout=draw(probability), weight_drop=draw(probability), heads=draw(st.sampled_from([1, 2])),
        zoneout=draw(probability), variational_dropout=draw(probability), recompute=draw(flag),
    )  # fmt: skip
    if options["num_layers"] == 1:
        options["dropout"] = 0.0
    if kind == "lstm":
        options["peephole"] = draw(flag)
        options["zoneout"] = draw(st.tuples(probability, probability))
        options["variational_dropout"] = draw(st.tuples(probability, probability))
        if draw(flag):  # the fused scan has no projected h to drop
            options["proj_size"], options["zoneout"] = 4, (0.0, options["zoneout"][1])
            options["variational_dropout"] = (options["variational_dropout"][0], 0.0)
    module = KINDS[kind](3, 6, **options).train(draw(flag))
    T, B = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    shape = (B, T) if module.batch_first else (T, B)
    more, lengths = {}, torch.randint(1, T + 1, (B,))
    way = draw(st.sampled_from(["whole", "lengths", "packed"]))
    if way == "lengths":
        more["lengths"] = lengths
    if way == "packed":
        more["pack"] = lengths
    if draw(flag):
        more["resets"] = torch.rand(shape) < 0.3
    if kind == "lstm" and way != "packed" and draw(flag):
        more["return_cell_states"] = True
    check(module, numbers(*shape, 3), state_of(module, B) if draw(flag) else None, **more)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_padding_leaks(kind, recompute, backend):
    """NaN in the padding of the input and of the outputs' gradients changes no bit of anything."""
    extra = dict(peephole=True, layer_norm=backend == "reference") if kind == "lstm" else {}
    module = KINDS[kind](3, 8, num_layers=2, bidirectional=True, zoneout=0.2, variational_dropout=0.2, dropout=0.2,
                         recompute=recompute, **extra)  # fmt: skip
    lengths = torch.tensor([7, 2, 5])
    padding = torch.arange(7)[:, None] >= lengths
    results = []
    for filling in (0.0, float("nan")):
        x = torch.randn(7, 3, 3, generator=torch.Generator().manual_seed(1))
        x[padding] = filling
        x.requires_grad_()
        torch.manual_seed(1)
        with seqfuse.backend(backend):
            y, state = module(x, lengths=lengths)
        assert y[padding].eq(0).all()
        dy = torch.ones_like(y)
        dy[padding] = filling
        states = flat(state)
        grads = torch.autograd.grad([y, *states], [x, *module.parameters()], [dy, *map(torch.ones_like, states)])
        assert grads[0][padding].eq(0).all()
        results.append([y, *states, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative(kind):
    """gradgradcheck through the reference, and create_graph=True on the CPU kernel against it."""
    extra = dict(peephole=True, layer_norm=True) if kind == "lstm" else {}
    module = KINDS[kind](1, 2, heads=2, zoneout=0.2, **extra).double().eval()
    x, lengths = torch.randn(3, 2, 1, dtype=torch.float64, requires_grad=True), torch.tensor([3, 1])
    names = [n for n, _ in module.named_parameters()]
    resets = torch.tensor([[False, False], [False, True], [True, False]])

    def run(x, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        return flat(torch.func.functional_call(module, weights, (x,), dict(lengths=lengths, resets=resets)))

    inputs = (x, *(p.detach().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("way", ["rows", "recompute", "proj_size"])
@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_through_the_kernel(kind, way):
    if way == "proj_size" and kind != "lstm":
        return
    extra = dict(peephole=True, **(dict(proj_size=2) if way == "proj_size" else {})) if kind == "lstm" else {}
    zoneout = (0.0, 0.3) if way == "proj_size" else 0.3
    module = rounded(KINDS[kind](3, 4, zoneout=zoneout, weight_drop=0.3, recompute=way == "recompute", **extra))
    x, hx, lengths = numbers(5, 3, 3), state_of(module, 3), torch.tensor([5, 1, 3])

    def second(dtype, backend):
        m, leaf = copy.deepcopy(module).to(dtype), x.to(dtype).requires_grad_()
        state = tuple(s.to(dtype) for s in hx) if isinstance(hx, tuple) else hx.to(dtype)
        torch.manual_seed(1)
        with seqfuse.backend(backend):
            y, _ = m(leaf, state, lengths=lengths)
            used = [leaf, *m.parameters()]
            first = torch.autograd.grad(y.square().sum(), used, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), used, materialize_grads=True)

    exact, theirs, got = (second(*how) for how in (
        (torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "cpu")))  # fmt: skip
    for a, b, c in zip(got, exact, theirs, strict=True):
        assert_accurate(a, b, c)


@pytest.mark.parametrize("kind", KINDS)
def test_repeats_are_bit_identical(kind):
    extra = dict(peephole=True) if kind == "lstm" else {}
    module = KINDS[kind](16, 64, num_layers=2, bidirectional=True, zoneout=0.1, variational_dropout=0.1,
                         weight_drop=0.2, heads=2, **extra)  # fmt: skip
    x, hx = numbers(20, 6, 16), state_of(module, 6)
    more = dict(lengths=torch.tensor([20, 1, 7, 20, 13, 2]), resets=torch.rand(20, 6) < 0.1)
    with seqfuse.backend("cpu"):
        first, *others = (call(module, torch.float32, x, hx, **more) for _ in range(3))
    for other in others:
        assert all(torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("way", ["plain", "lengths", "resets"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recomputation_is_bit_identical(kind, way):
    """In float32, but for the gradient of the biases, which is summed segment by segment."""
    extra = dict(peephole=True) if kind == "lstm" else {}
    module = KINDS[kind](16, 64, bidirectional=True, zoneout=0.1, **extra)
    x, hx = numbers(30, 6, 16), state_of(module, 6)
    more = dict(lengths=torch.tensor([30, 1, 7, 30, 13, 2])) if way == "lengths" else {}
    more |= dict(resets=torch.rand(30, 6) < 0.1) if way == "resets" else {}
    with seqfuse.backend("cpu"):
        kept = call(module, torch.float32, x, hx, **more)
        module.recompute = True
        again = call(module, torch.float32, x, hx, **more)
    summed = [n for n in kept if "bias" in n or "weight_ph" in n]
    if way != "lengths":  # rows of a ragged batch go through other GEMMs than padded ones
        assert all(torch.equal(kept[n], again[n]) for n in kept if n not in summed)
        kept = {n: kept[n] for n in summed}
    compare({n: again[n] for n in kept}, {n: t.double() for n, t in kept.items()}, kept)


def test_what_a_two_way_layer_keeps_may_not_be_overwritten():
    """Both directions find their y in the concatenation that is the output: changing it in place is noticed."""
    module, x = seqfuse.nn.GRU(4, 6, bidirectional=True), torch.randn(5, 3, 4)
    with seqfuse.backend("cpu"):
        y, h = module(x)
        y.detach().zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h.sum().backward()
        _, h = module(x)  # only the last state is used: the outputs still serve
        h.sum().backward()
    expected = torch.nn.GRU(4, 6, bidirectional=True).double()
    expected.load_state_dict({n: p.double() for n, p in module.state_dict().items()})
    expected(x.double())[1].sum().backward()
    for (name, p), q in zip(module.named_parameters(), expected.parameters(), strict=True):
        assert_accurate(p.grad, q.grad, q.grad.float(), what=name)


def test_recomputation_keeps_less():
    """What stays alive between forward and backward: y and a few c, not the gates of every step."""

    def kept(**options):
        module = seqfuse.nn.LSTM(8, 64, **options)
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(64, 16, 8)
        with seqfuse.backend("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(x)
        return sum(sizes.values()) - x.nbytes - sum(p.nbytes for p in module.parameters())

    y = 64 * 16 * 64 * 4
    assert kept(recompute=True) <= 1.2 * y < 5 * y <= kept()
