"""The copies between a padded batch and the rows that exist (ops/rnn_ragged.py), against indexing."""

import pytest
import torch

import seqfuse  # noqa: F401  (registers the ops)
from seqfuse import native
from seqfuse.ops import rnn_ragged
from seqfuse.ops.rnn_gradients import state_before

pytestmark = pytest.mark.skipif(bool(native.missing()), reason="needs the compiled extension")

SIZES = [
    ((1,), 1, 1),
    ((3, 1, 2), 4, 5),
    ((2, 2), 2, 7),
    ((5, 9, 1, 9, 4), 9, 300),
    ((0, 3, 0), 3, 2),
    ((64,) * 8, 64, 64),
]


def rows_by_index(padded, lengths):
    return torch.cat([padded[:n, b] for b, n in enumerate(lengths)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
@pytest.mark.parametrize("layout", ["time-major", "batch-major", "strided"])
@pytest.mark.parametrize("lengths,T,X", SIZES, ids=str)
def test_pack_and_pad(lengths, T, X, layout, dtype):
    B, n = len(lengths), torch.tensor(lengths)
    wide = torch.randn(B, T, X + 3) > 0 if dtype == torch.bool else torch.randn(B, T, X + 3).to(dtype)
    padded = wide[..., :X].transpose(0, 1)
    if layout != "strided":
        padded = padded.contiguous() if layout == "time-major" else wide[..., :X].contiguous().transpose(0, 1)
    expected = rows_by_index(padded, lengths)
    rows = torch.ops.seqfuse.rnn_pack(padded, n)
    assert torch.equal(rows, expected)
    exists = torch.arange(T)[:, None] < n
    for batch_major in (False, True):
        back = torch.ops.seqfuse.rnn_pad(rows, n, T, batch_major)
        assert torch.equal(back, torch.where(exists[..., None], padded, torch.zeros_like(padded)))
        assert (back.transpose(0, 1) if batch_major else back).is_contiguous()


@pytest.mark.parametrize("single", [False, True])
def test_their_gradients_are_each_other(single):
    n, T = torch.tensor([3, 1, 4]), 4
    ragged = rnn_ragged.rows_of(n, T)
    shape = (T, 3) if single else (T, 3, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ragged.pack, x) and torch.autograd.gradgradcheck(ragged.pack, x)
    rows = ragged.pack(x).detach().requires_grad_()
    for batch_major in (False, True):
        assert torch.autograd.gradcheck(lambda r, m=batch_major: ragged.pad(r, m), rows)
        assert torch.autograd.gradgradcheck(lambda r, m=batch_major: ragged.pad(r, m), rows)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_first", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (3, 1, 2), (5, 9, 1, 9, 4)], ids=str)
def test_the_state_before_each_step(lengths, with_first, reverse):
    states, first = torch.randn(sum(lengths), 6), torch.randn(len(lengths), 6) if with_first else None
    expected, start = [], 0
    for b, n in enumerate(lengths):
        own, entry = states[start : start + n], first[b : b + 1] if with_first else torch.zeros(1, 6)
        expected.append(torch.cat([own[1:], entry]) if reverse else torch.cat([entry, own[:-1]]))
        start += n
    got = state_before(states, first, reverse, torch.tensor(lengths), None)
    assert torch.equal(got, torch.cat(expected))


@pytest.mark.parametrize(
    "call,text",
    [
        (lambda o: o.rnn_pack(torch.randn(3, 2, 4), torch.tensor([1, 4])), "lengths must lie in [0, 3], got 4"),
        (lambda o: o.rnn_pack(torch.randn(3, 2, 4), torch.tensor([1])), "with B = 2"),
        (lambda o: o.rnn_pack(torch.randn(3, 2), torch.tensor([1, 2])), "must be [T, B, X]"),
        (lambda o: o.rnn_pad(torch.randn(4, 2), torch.tensor([1, 2]), 3, False), "add up to the 4 rows"),
        (lambda o: o.rnn_pad(torch.randn(3, 2), torch.tensor([-1, 4]), 4, False), "got -1"),
        (lambda o: o.rnn_shift(torch.randn(3, 2), torch.tensor([1, 2]), torch.randn(3, 2), False), "first must have 2"),
        (lambda o: o.rnn_shift(torch.randn(3, 2), torch.tensor([1.0, 2.0]), None, False), "int64"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(RuntimeError) as caught:
        call(torch.ops.seqfuse)
    assert text in str(caught.value)
