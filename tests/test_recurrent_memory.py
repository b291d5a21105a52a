"""What a recurrent call holds in memory: at most what torch.nn does, and gradients where the saved gates lay."""

import copy
import gc

import pytest
import torch

import seqfuse
from seqfuse.benchmarks.harness import Contender, peak_memory
from seqfuse.ops import products
from seqfuse.ops.rnn_scan import CELLS
from seqfuse.testing import assert_accurate

KINDS = [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN]


def peak(call):
    """The most bytes of tensors that were alive at once, above those before the call."""
    return peak_memory(Contender("call", lambda _: call()), "cpu")


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_takes_less(kind, ways):
    theirs = kind(64, 128, num_layers=ways, bidirectional=ways == 2)
    ours, x = seqfuse.fuse(copy.deepcopy(theirs)), torch.randn(64, 16, 64, requires_grad=True)
    dy = torch.randn(64, 16, ways * 128)

    def measure(module):
        def step():
            module(x)[0].backward(dy)

        for _ in range(2):  # what the measured step would free of earlier ones is freed before it
            module.zero_grad(set_to_none=True)
            x.grad = None
            gc.collect()
            most = peak(step)
        return most

    with seqfuse.backend("cpu"):
        kept = measure(ours)
        ours.recompute = True
        again = measure(ours)
    assert 0 < again <= kept <= measure(theirs)
    assert again < 0.8 * kept or kind is torch.nn.RNN  # which keeps nothing but its outputs anyway


@pytest.mark.parametrize("widened", [False, True], ids=["", "widened"])
@pytest.mark.parametrize("T, B, H", [(64, 1, 256), (64, 4, 320), (64, 32, 256), (256, 1, 512)])
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_most_torchs(kind, dtype, train, T, B, H, widened, monkeypatch):
    """Widened: as where the processor multiplies no bf16. Beside it one bias may lie, which torch makes a
    product later."""
    if dtype == torch.bfloat16 and products.SLOW_BF16 and T * B > 256:
        pytest.skip("PyTorch multiplies bfloat16 in a plain loop here")
    if widened and dtype == torch.float32:
        pytest.skip("nothing to widen")
    theirs = kind(H, H, dtype=dtype)
    x, dy = torch.randn(T, B, H, dtype=dtype, requires_grad=train), torch.randn(T, B, H, dtype=dtype)

    def measure(module):
        def call():
            with torch.set_grad_enabled(train):
                y, _ = module(x)
            return torch.autograd.grad(y, (x, *module.parameters()), dy) if train else y

        call()
        return peak(call)

    most = measure(theirs)
    if widened:
        monkeypatch.setattr(products, "WIDEN_FROM", 0)
    assert 0 < measure(seqfuse.fuse(theirs)) <= most + H * x.element_size()


@pytest.mark.parametrize("B, H", [(1, 256), (16, 256), (32, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_loops_of_cells_take_at_most_torchs(kind, dtype, B, H):
    """One weight's gradient at a time, added in place to those of the steps behind."""
    if dtype == torch.bfloat16 and products.SLOW_BF16:
        pytest.skip("PyTorch multiplies bfloat16 in a plain loop here")
    x, dy = torch.randn(100, B, H, dtype=dtype, requires_grad=True), torch.randn(100, B, H, dtype=dtype)

    def measure(cell):
        def call():
            state, outputs = None, []
            for step in x:
                state = cell(step, state)
                outputs.append(state[0] if kind == "LSTMCell" else state)
            return torch.autograd.grad(torch.stack(outputs), (x, *cell.parameters()), dy)

        call()
        return peak(call)

    theirs = getattr(torch.nn, kind)(H, H, dtype=dtype)
    with seqfuse.backend("cpu"):
        assert 0 < measure(seqfuse.fuse(copy.deepcopy(theirs))) <= measure(theirs)


def gradients(module, x, dy, **how):
    with seqfuse.backend("cpu"):
        y, _ = module(x)
    return torch.autograd.grad(y, (x, *module.parameters()), dy, **how)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("kind", [seqfuse.nn.LSTM, seqfuse.nn.GRU])
def test_gradients_take_the_place_of_gates_only_where_nobody_looks_again(kind, ways, batch_first):
    module = kind(5, 24, 2, bidirectional=ways == 2, batch_first=batch_first)
    x, dy = torch.randn(7, 9, 5, requires_grad=True), torch.randn(2, 7, 9, ways * 24)
    once = [gradients(module, x, d) for d in dy]
    kept = gradients(module, x, dy[0], retain_graph=True)
    assert all(map(torch.equal, kept, once[0]))
    with seqfuse.backend("cpu"):
        y, _ = module(x)
    for d, expected in ((dy[0], once[0]), (dy[1], once[1]), (dy[0], once[0])):
        again = torch.autograd.grad(y, (x, *module.parameters()), d, retain_graph=True)
        assert all(map(torch.equal, again, expected))
    together = torch.autograd.grad(y, (x, *module.parameters()), dy, is_grads_batched=True)
    torchs = getattr(torch.nn, kind.__name__)(5, 24, 2, bidirectional=ways == 2, batch_first=batch_first)
    torchs.load_state_dict(module.state_dict())
    theirs = [gradients(torchs, x, d) for d in dy]
    exact = [gradients(torchs.double(), x.double(), d.double()) for d in dy]
    for i in range(2):
        for got, truth, plain in zip(together, exact[i], theirs[i], strict=True):
            assert_accurate(got[i], truth, plain)


@pytest.mark.parametrize("layout", ["time-major", "batch-major", "rows"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_in_gates_writes_what_the_op_returns(cell, layout):
    T, B, H, G = 6, 5, 20, 3 + (cell == "lstm")
    lengths = torch.tensor([6, 2, 0, 6, 4]) if layout == "rows" else None
    shape = (int(lengths.sum()), G * H) if layout == "rows" else (T, B, G * H)
    xg = torch.randn(shape)
    if layout == "batch-major":
        xg = xg.transpose(0, 1).contiguous().transpose(0, 1)
    h0, c0, w = torch.randn(B, H), torch.randn(B, H) if cell == "lstm" else None, torch.randn(G * H, H) / 5
    options = (lengths, *(None,) * 5, 0.0, 0.0)
    y, _, _, gates, cells = torch.ops.seqfuse.rnn_scan_fwd(
        CELLS[cell], xg, h0, c0, w, None, *options, True, True, False
    )
    assert all(g == 4 * s for g, s in zip(gates.stride()[:-1], y.stride()[:-1], strict=True)), "laid out as y is"
    args = (CELLS[cell], torch.randn_like(y), None, None, None, y, gates, cells, h0, c0, w, *options, True)
    dxg, dan, *rest = torch.ops.seqfuse.rnn_scan_bwd(*args)
    gates = gates.clone()
    here = torch.ops.seqfuse.rnn_scan_bwd_in_gates(*args[:6], gates, *args[7:])
    assert torch.equal(gates[..., : G * H], dxg) and (cell == "lstm" or torch.equal(gates[..., G * H :], dan))
    assert all(map(torch.equal, here, rest))
    torch.library.opcheck(torch.ops.seqfuse.rnn_scan_bwd_in_gates.default, (*args[:6], gates, *args[7:]))


def test_in_gates_is_for_cells_that_save_gates_of_that_width():
    y = torch.randn(3, 2, 4)
    with pytest.raises(RuntimeError, match="gates: no gradients can be written there"):
        torch.ops.seqfuse.rnn_scan_bwd_in_gates(
            CELLS["rnn_tanh"], y, None, None, None, y, torch.empty(0), torch.empty(0), torch.zeros(2, 4), None,
            torch.randn(4, 4), *(None,) * 6, 0.0, 0.0, False,
        )  # fmt: skip
