"""Loops over LSTMCell and GRUCell, whose steps take their weights' gradients together (ops/rnn_cell_loop.py): whatever
is asked of the graph, it answers what torch.nn's does."""

import copy
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import seqfuse
from seqfuse.ops import rnn_cell_loop
from seqfuse.ops.rnn_cell import MOST_ROWS
from seqfuse.testing import assert_accurate

CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
STEPS = 12  # more than the tickets of a first node


@pytest.fixture(autouse=True)
def on_the_cpu_backend():
    with seqfuse.backend("cpu"):
        yield


def trio(cell, width=5, H=7, **options):
    """torch's module in float64 and in float32, and ours, all with the same numbers."""
    torch.manual_seed(0)
    theirs = CELLS[cell](width, H, **options)
    return copy.deepcopy(theirs).double(), theirs, seqfuse.fuse(copy.deepcopy(theirs))


def loop(module, x, state=None):
    outputs = []
    for step in x:
        state = module(step, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs), state


def inputs(steps=STEPS, B=3, width=5):
    return torch.randn(steps, B, width, generator=torch.Generator().manual_seed(1))


def compare(cell, ask, **options):
    """ask(module, dtype) -> tensors, from each of the three modules, under the error rule."""
    exact, theirs, ours = trio(cell, **options)
    wanted, like, got = ask(exact, torch.float64), ask(theirs, torch.float32), ask(ours, torch.float32)
    assert len(got) == len(wanted)
    for a, b, c in zip(got, wanted, like, strict=True):
        if b is None:
            assert a is None and c is None
        else:
            assert_accurate(a.detach(), b.detach(), c.detach())


def tickets_of(y):
    """How many steps of the graph behind y have a ticket."""
    seen, todo, count = set(), [y.grad_fn], 0
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += bool(getattr(node, "has_ticket", False))
        todo += [n for n, _ in node.next_functions]
    return count


def every_gradient(module, dtype, steps=STEPS, B=3, width=5):
    x = inputs(steps, B, width).to(dtype).requires_grad_()
    y, _ = loop(module, x)
    return y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "B,width,H", [(1, 1, 1), (1, 5, 7), (2, 16, 32), (3, 9, 33), (7, 40, 24), (49, 8, 17)], ids=str
)
@pytest.mark.parametrize("cell", CELLS)
def test_every_gradient(isa, cell, B, width, H, bias):
    compare(cell, lambda m, dtype: every_gradient(m, dtype, 4, B, width), width=width, H=H, bias=bias)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_long_loop_uses_several_nodes(cell):
    compare(cell, lambda m, dtype: every_gradient(m, dtype, steps=150))
    y, _ = loop(trio(cell)[2], inputs(150))
    assert tickets_of(y) == 149  # but the first


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_bfloat16(cell):
    exact, theirs, ours = trio(cell)
    rounded = {n: p.bfloat16().double() for n, p in exact.state_dict().items()}
    for m in (exact, theirs, ours):
        m.load_state_dict(rounded)

    def ask(m, dtype):
        x = inputs().bfloat16().to(dtype)
        y, _ = loop(m.to(dtype), x)
        return y, *torch.autograd.grad(y.sum(), list(m.parameters()))

    low = torch.bfloat16
    for a, b, c in zip(ask(ours, low), ask(exact, torch.float64), ask(theirs, low), strict=True):
        assert_accurate(a.detach(), b.detach(), c.detach())


@pytest.mark.parametrize("cell", CELLS)
def test_parts_of_a_graph_and_a_second_pass_over_it(cell):
    def ask(module, dtype):
        x = inputs().to(dtype)
        y, _ = loop(module, x)
        early, late = y[:3].square().sum(), y[5].sum() + y[-1].square().sum()
        parameters = list(module.parameters())
        first = torch.autograd.grad(early, parameters, retain_graph=True)
        second = torch.autograd.grad(late, parameters[:1], retain_graph=True)
        again = torch.autograd.grad(late, parameters[1:], retain_graph=True)
        (early + late).backward()
        return *first, *second, *again, *[p.grad for p in parameters]

    compare(cell, ask)


@pytest.mark.parametrize("cell", CELLS)
def test_a_second_pass_without_retain_graph_raises(cell):
    y, _ = loop(trio(cell)[2], inputs())
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_of_inputs_only_take_no_weight_products(cell, monkeypatch):
    def ask(module, dtype):
        x = inputs().to(dtype).requires_grad_()
        return torch.autograd.grad(loop(module, x)[0].square().sum(), x)

    compare(cell, ask)
    monkeypatch.setattr(rnn_cell_loop, "over_rows", None)  # would raise
    ask(trio(cell)[2], torch.float32)


@pytest.mark.parametrize("cell", CELLS)
def test_frozen_weights_and_weights_frozen_on_the_way(cell):
    def ask(module, dtype):
        module.weight_ih.requires_grad_(False)
        y, state = loop(module, inputs().to(dtype))
        module.weight_ih.requires_grad_(True)
        module.bias_hh.requires_grad_(False)
        z, _ = loop(module, inputs().to(dtype), state)
        (y.sum() + z.square().sum()).backward()
        module.bias_hh.requires_grad_(True)
        return [p.grad for p in module.parameters()]

    compare(cell, ask)


@pytest.mark.parametrize("cell", CELLS)
def test_hooks_see_each_whole_gradient_once(cell):
    def ask(module, dtype):
        seen = []
        for p in module.parameters():
            p.register_hook(lambda g: seen.append(g) or g * 2)
            p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        loop(module, inputs().to(dtype))[0].square().sum().backward()
        assert len(seen) == 8
        return [p.grad for p in module.parameters()]

    compare(cell, ask)


@pytest.mark.parametrize("cell", CELLS)
def test_truncated_backpropagation_with_an_optimizer(cell):
    """The weights change between two graphs, and the state is carried over."""

    def ask(module, dtype):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        state = None
        for x in inputs(30).to(dtype).split(10):
            y, state = loop(module, x, state)
            optimizer.zero_grad()
            y.square().sum().backward()
            optimizer.step()
            state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        return [y, *module.parameters()]

    compare(cell, ask)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_new_numbers_in_the_weights_are_used_at_once(cell):
    def ask(module, dtype):
        x = inputs().to(dtype)
        first, _ = loop(module, x)
        with torch.no_grad():
            module.weight_hh.mul_(2)
        second, _ = loop(module, x)
        module.load_state_dict({n: p * 0.5 for n, p in module.state_dict().items()})
        third, _ = loop(module, x)
        module.weight_ih.data = module.weight_ih.data.flip(0)
        y, _ = loop(module, x)
        y.sum().backward()
        return first, second, third, y, *[p.grad for p in module.parameters()]

    compare(cell, ask)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_weight_changed_before_the_backward_pass_raises(cell):
    module = trio(cell)[2]
    y, _ = loop(module, inputs())
    with torch.no_grad():
        module.weight_hh.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_create_graph_after_a_loop(cell):
    def ask(module, dtype):
        x = inputs(5).to(dtype).requires_grad_()
        y, _ = loop(module, x)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (dx.square().sum() + y.sum()).backward()
        return [x.grad, *[p.grad for p in module.parameters()]]

    compare(cell, ask)


@pytest.mark.parametrize("cell", CELLS)
def test_branches_no_grad_segments_other_batches_and_shared_weights(cell):
    def ask(module, dtype):
        other = copy.deepcopy(module)
        for name, p in module.named_parameters():
            setattr(other, name, p)
        x = inputs().to(dtype)
        y, state = loop(module, x)
        left, _ = loop(module, x[:3], state)
        right, end = loop(other, x[:4], state)
        with torch.no_grad():
            _, dead = loop(module, x[:2], end)
        after, _ = loop(module, x[:2], dead)
        fewer = tuple(s[:2] for s in end) if isinstance(end, tuple) else end[:2]
        narrow, _ = loop(module, x[:3, :2], fewer)
        total = y.sum() + left.square().sum() - right.square().sum() + after.sum() + narrow.square().sum()
        total.backward()
        return [p.grad for p in module.parameters()]

    compare(cell, ask)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_checkpointed_segments(cell, reentrant):
    def ask(module, dtype):
        x = inputs(16).to(dtype).requires_grad_()

        def segment(x, *state):
            y, state = loop(module, x, (state if len(state) > 1 else state[0]) if state else None)
            return y, *(state if isinstance(state, tuple) else (state,))

        y, *state = segment(x[:5])
        for part in (x[5:10], x[10:]):
            z, *state = checkpoint(segment, part, *state, use_reentrant=reentrant)
            y = torch.cat([y, z])
        y.square().sum().backward()
        return [x.grad, *[p.grad for p in module.parameters()]]

    compare(cell, ask)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_weights_that_are_no_leaves_go_their_own_way(cell):
    """Weight drop, weight norm: torch.nn.utils.parametrize, and functional_call."""

    def parametrized(module, dtype):
        nn.utils.parametrizations.weight_norm(module, "weight_hh")
        return every_gradient(module, dtype)

    def called(module, dtype):
        leaves = {n: p.detach().requires_grad_() for n, p in module.named_parameters()}
        doubled = {n: p * 2 for n, p in leaves.items()}

        class Loop(nn.Module):
            def __init__(self):
                super().__init__()
                self.cell = module

            def forward(self, x):
                return loop(self.cell, x)[0]

        y = torch.func.functional_call(Loop(), {f"cell.{n}": p for n, p in doubled.items()}, inputs().to(dtype))
        return torch.autograd.grad(y.square().sum(), list(leaves.values()))

    compare(cell, parametrized)
    compare(cell, called)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_backward_passes_side_by_side(cell):
    """Two threads go back through different parts of one graph, and hand in rows to the same node."""
    _, _, ours = trio(cell)
    y, _ = loop(ours, inputs(40))
    losses = [y[10:20].sum(), y[25:].square().sum()]
    weights = list(ours.parameters())
    alone = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
    found = [None, None]

    def run(i):
        found[i] = torch.autograd.grad(losses[i], weights, retain_graph=True)

    for _ in range(5):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        for a, b in zip(found, alone, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_graph_leaves_nothing_behind(cell):
    module = trio(cell)[2]
    y = loop(module, inputs())[0]
    shared = next(n for n, _ in y.grad_fn.next_functions).loop
    gone = weakref.ref(shared.tickets[0].grad_fn)
    del shared
    assert gone() is not None
    y.sum().backward()
    copy.deepcopy(module)
    del y
    assert gone() is None


def test_deterministic():
    module = trio("lstm")[2]
    first, second = (every_gradient(module, torch.float32, steps=30) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_both_sides_of_the_row_limit(cell):
    for B in (MOST_ROWS, MOST_ROWS + 1):
        compare(cell, lambda m, dtype, B=B: every_gradient(m, dtype, 3, B))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck_of_a_step(cell):
    number, G = {"gru": (2, 3), "lstm": (3, 4)}[cell]
    B, width, H = 3, 6, 10
    x, h, c = torch.randn(B, width), torch.randn(B, H), torch.randn(B, H) if cell == "lstm" else None
    w_ih, w_hh, b = torch.randn(G * H, width), torch.randn(G * H, H), torch.randn(G * H)
    args = number, x, h, c, w_ih, w_hh, b, b, True
    torch.library.opcheck(torch.ops.seqfuse.rnn_cell_step.default, args)
    h_out, c_out, gates = torch.ops.seqfuse.rnn_cell_step(*args)
    back = torch.randn(B, H), None, gates, x, h, c, h_out, c_out if cell == "lstm" else None, w_ih, w_hh, True, True
    torch.library.opcheck(torch.ops.seqfuse.rnn_cell_step_bwd.default, (number, *back))


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(cell=0), "an LSTM's or a GRU's"),
        (dict(w_ih=torch.randn(8, 5)), "w_ih must be [8, 4]"),
        (dict(h=torch.randn(2, 2)), "h must be [3, 2]"),
        (dict(c=None), "c belongs to an LSTM"),
        (dict(x=torch.randn(3, 4).double()), "takes float32 and bfloat16"),
        (dict(x=torch.randn(3, 4).bfloat16()), "h must have the dtype"),
        (dict(b_ih=torch.randn(7)), "a bias must be [G*H]"),
        (dict(b_ih=torch.randn(8).bfloat16()), "of the dtype of x"),
    ],
)
def test_bad_arguments_of_a_step(change, text):
    given = dict(cell=3, x=torch.randn(3, 4), h=torch.randn(3, 2), c=torch.randn(3, 2), w_ih=torch.randn(8, 4),
                 w_hh=torch.randn(8, 2), b_ih=None, b_hh=None, save=True)  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        torch.ops.seqfuse.rnn_cell_step(*(given | change).values())
    assert text in str(caught.value)
