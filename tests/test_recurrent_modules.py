"""seqfuse.nn.RNN, LSTM, GRU as what torch.nn's are: arguments, PackedSequence, copies, transforms, compilation."""

import copy
import io
import pickle

import pytest
import torch
from recurrent_checks import call, check_torch, compare, flat, numbers, rounded, state_of
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqfuse
from seqfuse.testing import assert_accurate

KINDS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
OURS = {"rnn": seqfuse.nn.RNN, "gru": seqfuse.nn.GRU, "lstm": seqfuse.nn.LSTM}
BACKENDS = ["reference", "cpu"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["TBI", "BTI"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["packed", "lengths"])
def test_sequences_of_different_lengths(way, kind, batch_first, backend):
    """Truth is torch.nn with a PackedSequence; ours takes the same, or lengths=, in any order of lengths."""
    module = rounded(KINDS[kind](4, 6, num_layers=2, bidirectional=True, batch_first=batch_first))
    lengths = torch.tensor([3, 7, 1, 7, 5])
    x, hx = numbers(*((5, 7) if batch_first else (7, 5)), 4), state_of(module, 5)
    exact, theirs = (call(module, d, x, hx, pack=lengths) for d in (torch.float64, torch.float32))
    how = dict(pack=lengths) if way == "packed" else dict(lengths=lengths)
    with seqfuse.backend(backend):
        got = call(seqfuse.fuse(module), torch.float32, x, hx, **how)
    compare(got, exact, theirs)


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_packed_sequence_in_and_out(backend, enforce_sorted):
    module = nn.LSTM(4, 6, num_layers=2)
    x, lengths = torch.randn(7, 3, 4), torch.tensor([7, 4, 2] if enforce_sorted else [4, 7, 2])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    expected, state = module(packed)
    with seqfuse.backend(backend):
        got, ours = seqfuse.fuse(module)(packed)
    assert isinstance(got, PackedSequence) and torch.equal(got.batch_sizes, expected.batch_sizes)
    for a, b in ((got.sorted_indices, expected.sorted_indices), (got.unsorted_indices, expected.unsorted_indices)):
        assert (a is None and b is None) or torch.equal(a, b)
    for a, b in zip([got.data, *ours], [expected.data, *state], strict=True):
        assert_accurate(a, b.double(), b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, dict(num_layers=2, bidirectional=True, batch_first=True)], ids=["1", "2x2"])
@pytest.mark.parametrize("how", ["plain", "state", "packed"])
def test_proj_size(how, options, bias, backend):
    module = nn.LSTM(4, 9, proj_size=3, bias=bias, **options)
    x = numbers(*((5, 6) if module.batch_first else (6, 5)), 4)
    hx = None if how == "plain" else state_of(module, 5)
    more = dict(pack=torch.tensor([3, 6, 1, 2, 6])) if how == "packed" else {}
    check_torch(module, x, hx, backend=backend, **more)


@pytest.mark.parametrize("how", [{}, dict(pack=torch.tensor([12, 3, 9, 1]))], ids=["whole", "packed"])
def test_proj_size_in_bf16(how):
    """The product of the two weights, rounded to bf16, keeps the rule."""
    module = nn.LSTM(16, 64, proj_size=32)
    check_torch(module, numbers(12, 4, 16), state_of(module, 4), dtype=torch.bfloat16, **how)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_input(kind, backend):
    module = KINDS[kind](4, 6, num_layers=2, bidirectional=True)
    x = torch.randn(9, 4)
    hx = tuple(torch.randn(4, 6) for _ in range(2)) if kind == "lstm" else torch.randn(4, 6)
    expected = module(x, hx)
    with seqfuse.backend(backend):
        got = seqfuse.fuse(module)(x, hx)
        for a, b in zip(flat(got), flat(expected), strict=True):
            assert_accurate(a, b.double(), b)
        resets = torch.zeros(9, dtype=torch.bool)
        for a, b in zip(flat(module(x, hx, resets=resets)), flat(expected), strict=True):
            assert_accurate(a, b.double(), b)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers(kind):
    """p = 1 leaves the last layer its biases, as in torch.nn; p = 0.4 hits every layer but the last, in training."""
    module = KINDS[kind](4, 6, num_layers=3, dropout=1.0)
    x = torch.randn(9, 2, 4)
    expected = module(x)[0]
    fused = seqfuse.fuse(module)
    with seqfuse.backend("cpu"):
        got = fused(x)[0]
        assert_accurate(got, expected.double(), expected)
        fused.dropout = 0.4
        torch.manual_seed(1)
        first = fused(x)[0]
        torch.manual_seed(1)
        assert torch.equal(first, fused(x)[0]) and not torch.equal(first, fused(x)[0])
        fused.eval()
        assert torch.equal(fused(x)[0], fused(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequence(kind):
    """T beyond 65,535, forward and backward, whole and with lengths, equals two halves of which the second starts from
    the first one's state (70,000 steps of torch.nn's autograd would take a minute)."""
    module, x = seqfuse.fuse(rounded(KINDS[kind](2, 3))), numbers(70_000, 1, 2)

    class Halves(type(module)):
        def forward(self, input, hx=None):
            first, state = super().forward(input[:35_000], hx)
            second, state = super().forward(input[35_000:], state)
            return torch.cat([first, second]), state

    with seqfuse.backend("cpu"):
        whole = call(module, torch.float32, x)
        ragged = call(module, torch.float32, x, lengths=[70_000])
        module.__class__ = Halves
        halves = call(module, torch.float32, x)
    for name, t in halves.items():
        assert_accurate(whole[name], t.double(), t, what=name)
        assert_accurate(ragged[name], t.double(), t, what=name)


def test_long_sequence_of_torch():
    module, x = rounded(nn.RNN(2, 3)), numbers(70_000, 1, 2)
    with torch.no_grad():
        exact, theirs = module(x)[0], module.float()(x.float())[0]
        with seqfuse.backend("cpu"):
            got = seqfuse.fuse(module)(x.float())[0]
    assert_accurate(got, exact, theirs, dims=(0,))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_and_backward_in_eval_mode(kind, backend):
    check_torch(KINDS[kind](4, 6, num_layers=2, dropout=0.3).eval(), numbers(5, 1, 4), backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind):
    module = rounded(KINDS[kind](4, 6, num_layers=2, bidirectional=True))
    x, hx, lengths = numbers(5, 3, 4), state_of(module, 3), torch.tensor([5, 1, 4])
    exact, packed = call(module, torch.float64, x, hx), call(module, torch.float64, x, hx, pack=lengths)
    seqfuse.fuse(module)
    compare(call(module, torch.float64, x, hx), exact, exact)
    compare(call(module, torch.float64, x, hx, lengths=lengths), packed, packed)
    compare(call(module, torch.float64, x, hx, pack=lengths), packed, packed)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_both_ways_copies_and_pickles(kind):
    options = dict(num_layers=2, bidirectional=True, **(dict(proj_size=3) if kind == "lstm" else {}))
    theirs, ours = KINDS[kind](4, 6, **options), OURS[kind](4, 6, **options)
    assert list(theirs.state_dict()) == list(ours.state_dict()) and theirs.extra_repr() == ours.extra_repr()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(9, 2, 4)
    expected = theirs(x)[0]
    assert_accurate(ours(x)[0], expected.double(), expected)
    theirs.load_state_dict(ours.state_dict())
    ours.flatten_parameters()
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)
    for twin in copies:
        assert torch.equal(twin(x)[0], ours(x)[0])


def test_copies_and_state_dict_with_what_torch_has_not():
    options = dict(peephole=True, layer_norm=True, heads=2, zoneout=(0.1, 0.2), variational_dropout=0.1,
                   weight_drop=0.2, recompute=True)  # fmt: skip
    module = seqfuse.nn.LSTM(4, 6, bidirectional=True, **options)
    twin = pickle.loads(pickle.dumps(module))
    other = seqfuse.nn.LSTM(4, 6, bidirectional=True, **options)
    other.load_state_dict(module.state_dict())
    x = torch.randn(9, 2, 4)
    results = []
    for m in (module, twin, copy.deepcopy(module), other):
        torch.manual_seed(1)
        results.append(m(x)[0])
    assert all(torch.equal(r, results[0]) for r in results)
    assert {"weight_ph_l0", "weight_ln_ih_l0", "weight_ln_hh_l0", "weight_ln_c_l0", "bias_ln_c_l0_reverse"} <= set(
        module.state_dict()
    )
    assert "zoneout=(0.1, 0.2)" in repr(module) and "heads=2" in repr(module)
    assert module.weight_ln_c_l0.eq(1).all() and module.bias_ln_c_l0.eq(0).all()


def test_unfuse_leaves_what_torch_has_not_and_says_so():
    model = nn.Sequential(seqfuse.nn.LSTM(4, 6, zoneout=0.1), seqfuse.nn.GRU(6, 6))
    with pytest.warns(UserWarning, match="0 stays a LSTM of seqfuse: torch.nn has no zoneout"):
        seqfuse.unfuse(model)
    assert type(model[0]) is seqfuse.nn.LSTM and type(model[1]) is nn.GRU


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_ensemble_by_vmap(kind, backend):
    """torch.func over stacked modules equals one module after another: outputs, and gradients in both orders."""
    modules = [OURS[kind](3, 5, num_layers=2, bidirectional=True) for _ in range(3)]
    parameters, buffers = stack_module_state(modules)
    x = torch.randn(9, 2, 3)

    def loss(p, b, x):
        return functional_call(modules[0], (p, b), (x,))[0].square().sum()

    with seqfuse.backend(backend):
        together = vmap(loss, (0, 0, None))(parameters, buffers, x)
        inside = vmap(grad(loss), (0, 0, None))(parameters, buffers, x)
        together.sum().backward()
        one_x_each = vmap(loss)(parameters, buffers, x.expand(3, -1, -1, -1))
        for i, module in enumerate(modules):
            alone = module(x)[0].square().sum()
            alone.backward()
            assert_accurate(together[i], alone.double(), alone)
            assert_accurate(one_x_each[i], alone.double(), alone)
            for name, p in module.named_parameters():
                for g in (inside[name][i], parameters[name].grad[i]):
                    assert_accurate(g, p.grad.double(), p.grad, what=name)


def test_ensemble_draws_its_masks_one_by_one_or_together():
    module = seqfuse.nn.LSTM(3, 5, weight_drop=0.5, zoneout=0.3)
    parameters, buffers = stack_module_state([module, module])
    x = torch.randn(9, 2, 3)

    def run(randomness):
        return vmap(lambda p: functional_call(module, (p, buffers), (x,))[0], randomness=randomness)(parameters)

    different, same = run("different"), run("same")
    assert not torch.equal(different[0], different[1]) and torch.equal(same[0], same[1])


CALLS = {
    "lengths": ({}, dict(lengths=torch.tensor([9, 4]))),
    "resets": ({}, dict(resets=torch.tensor([[False, False]] * 4 + [[True, False]] * 5))),
    "proj_size": (dict(proj_size=3), {}),
    "zoneout": (dict(zoneout=(0.1, 0.2)), {}),
    "everything": (
        dict(num_layers=2, bidirectional=True, peephole=True, heads=2, zoneout=0.1, variational_dropout=0.2,
             weight_drop=0.1, recompute=True),
        dict(lengths=torch.tensor([9, 4]), resets=torch.zeros(9, 2, dtype=torch.bool), return_cell_states=True),
    ),
    "layer_norm": (dict(layer_norm=True), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_graph_break(name):
    torch._dynamo.reset()  # each of these modules compiles the same code again
    options, more = CALLS[name]
    module = seqfuse.nn.LSTM(3, 6, **options).eval()  # masks drawn by a compiled graph are not eager's
    x = torch.randn(9, 2, 3, requires_grad=True)
    expected = module(x, **more)
    exact = torch.autograd.grad(expected[0].square().sum(), [x, *module.parameters()], allow_unused=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = compiled(x, **more)
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert_accurate(a, b.double(), b)
    grads = torch.autograd.grad(got[0].square().sum(), [x, *module.parameters()], allow_unused=True)
    for a, b in zip(grads, exact, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert_accurate(a, b.double(), b)
    module.train()
    assert compiled(x, **more)[0].isfinite().all()


@pytest.mark.parametrize("name", CALLS)
def test_exports(name):
    options, more = CALLS[name]
    module = seqfuse.nn.LSTM(3, 6, **options).eval()
    x = torch.randn(9, 2, 3)
    exported = torch.export.export(module, (x,), more).module()
    for a, b in zip(flat(exported(x, **more)), flat(module(x, **more)), strict=True):
        assert_accurate(a, b.detach().double(), b.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_with_options(kind):
    extra = dict(peephole=True, layer_norm=True) if kind == "lstm" else {}
    module = OURS[kind](4, 6, num_layers=2, zoneout=0.1, weight_drop=0.2, **extra)
    x, lengths = torch.randn(9, 3, 4, requires_grad=True), torch.tensor([9, 2, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = module(x, lengths=lengths)
    assert y.dtype == torch.bfloat16 and y[2:, 1].eq(0).all()
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    "make,text",
    [
        (
            lambda: seqfuse.nn.LSTM(4, 6, zoneout=1.5),
            "zoneout must be a probability in [0, 1] or a pair of them, got 1.5",
        ),
        (lambda: seqfuse.nn.GRU(4, 6, zoneout=(0.1, 0.1)), "zoneout must be a probability in [0, 1], got (0.1, 0.1)"),
        (lambda: seqfuse.nn.GRU(4, 6, weight_drop="x"), "weight_drop must be a probability in [0, 1], got 'x'"),
        (lambda: seqfuse.nn.GRU(4, 6, variational_dropout=-1), "variational_dropout must be"),
        (lambda: seqfuse.nn.LSTM(4, 6, heads=4), "heads must be a whole number that divides hidden_size 6, got 4"),
        (lambda: seqfuse.nn.GRU(4, 6, peephole=True), "GRU: peephole is an option of the LSTM"),
        (lambda: seqfuse.nn.RNN(4, 6, layer_norm=True), "RNN: layer_norm is an option of the LSTM"),
        (lambda: seqfuse.nn.LSTM(4, 6, recompute=1), "recompute must be a bool, got 1"),
        (lambda: seqfuse.nn.LSTM(4, 6, zonout=0.1), "unexpected keyword argument 'zonout'"),
    ],
)
def test_bad_constructor_arguments_get_one_sentence(make, text):
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "more,text",
    [
        (dict(lengths=[5, 0, 1]), "lengths must lie between 1 and T = 5, got 0"),
        (dict(lengths=[5, 6, 1]), "lengths must lie between 1 and T = 5, got 6"),
        (dict(lengths=[5, 5]), "lengths must be int64 of shape [3] (one number for each sequence)"),
        (dict(lengths=torch.ones(3)), "got a float32 tensor of shape [3]"),
        (
            dict(lengths=[1, 2, None]),
            "lengths must be int64 of shape [3] (one number for each sequence), got [1, 2, None]",
        ),
        (dict(lengths="abc"), "lengths must be int64 of shape [3] (one number for each sequence), got 'abc'"),
        (dict(resets=torch.zeros(5, 3)), "resets must be a bool tensor of shape [5, 3], got a float32 tensor"),
        (dict(resets=torch.zeros(3, 5, dtype=torch.bool)), "resets must be a bool tensor of shape [5, 3]"),
        (dict(resets=torch.zeros(5, 3, dtype=torch.bool, device="meta")), "resets is on meta, but x is on cpu"),
    ],
)
def test_bad_call_arguments_get_one_sentence(more, text):
    for kind in OURS.values():
        with pytest.raises(ValueError) as caught:
            kind(4, 6)(torch.randn(5, 3, 4), **more)
        assert text in str(caught.value) and "\n" not in str(caught.value)


def test_lengths_need_a_batch_and_no_packed_sequence():
    module = seqfuse.nn.GRU(4, 6)
    with pytest.raises(ValueError, match="lengths needs a batch"):
        module(torch.randn(5, 4), lengths=[5])
    packed = pack_padded_sequence(torch.randn(5, 3, 4), [5, 4, 1])
    with pytest.raises(ValueError, match="lengths goes with a padded batch"):
        module(packed, lengths=[5, 4, 1])


@pytest.mark.parametrize("T", [4, 64])
def test_states_of_the_wrong_kind_get_one_sentence(T):
    x, h = torch.randn(T, 3, 4), torch.zeros(1, 3, 6)
    for kind in OURS.values():
        module = kind(4, 6)
        is_lstm = module.mode == "LSTM"
        for wrong, error, text in (
            (h.double(), ValueError, "h0 is float64, but input is float32: convert one of them"),
            (h.bfloat16(), ValueError, "h0 is bfloat16, but input is float32"),
            (h.to("meta"), ValueError, "h0 is on meta, but input is on cpu"),
            ((h, h), TypeError, "h0 must be a tensor, got tuple"),
        ):
            for with_grad in (True, False):
                with torch.set_grad_enabled(with_grad), pytest.raises(error) as caught:
                    module(x, (wrong, h) if is_lstm else wrong)
                assert text in str(caught.value) and "\n" not in str(caught.value)
        if is_lstm:
            with pytest.raises(ValueError, match=r"hx must be \(h0, c0\), got a tensor"):
                module(x, h)
