"""The weights' gradients of a loop over a cell, all steps at once.

    dw_ih = sum over t of dxg_t^T @ x_t,   dw_hh = sum over t of da_t^T @ h_{t-1}

Autograd would take a product of few rows in every step, write a gradient as large as the weight and add it to the one
before. Here the steps share one node, `_WeightGradients`, through which their weights' gradients flow: it has as many
outputs, called tickets, as there may be steps; each step takes one as an input, and what it returns as that ticket's
gradient is its rows of the sum, [dxg | da | x | h]. When the node runs, autograd has collected the rows of all steps of
this backward pass, and each gradient is one product over them. A loop of more steps has more nodes, each of which hands
the weights on to the next: gradients come back the same way, and each node adds its own to them in place.

Nothing is kept beside the graph. So parts of a graph, a second backward pass over it, gradients of some tensors only,
hooks on parameters, and several threads are what they are for any other node.
"""

import torch

from seqfuse.ops.autograd import apply, may_write
from seqfuse.ops.products import addmm
from seqfuse.ops.rnn_gradients import over_rows

MOST_TICKETS = 64  # of one node: so many steps, at most, keep their rows until their products are taken
# Rows of all of these, by bytes of a number: enough for a fast product, and less memory than torch.nn's graph holds
MOST_ROWS = {4: 384, 2: 256}


class Loop:
    """What the steps of one cell in one graph share: for which weights, and the tickets that no step has taken yet."""

    __slots__ = ("handed_on", "made", "needs", "tickets", "weights", "width")

    def __init__(self, weights, width):
        self.weights = self.handed_on = weights
        self.width = width
        self.needs = tuple(w is not None and w.requires_grad for w in weights)
        self.tickets, self.made = [], 0

    def goes_on_with(self, weights, width):
        """Whether a step with these weights and rows of this shape belongs to the loop."""
        for mine, needs, w in zip(self.weights, self.needs, weights, strict=True):
            if mine is not w or (w is not None and w.requires_grad is not needs):
                return False
        return self.width == width

    def ticket(self, cell):
        try:
            return self.tickets.pop()
        except IndexError:
            rows = MOST_ROWS[self.weights[1].element_size()]
            most = max(8, min(MOST_TICKETS, rows // max(self.width[0], 1)))
            self.made = min(4 * self.made or 8, most)
            made = apply(_WeightGradients, *self.handed_on, cell, self.width, self.made)
            self.handed_on, self.tickets = made[:4], list(made[4:])
            return self.tickets.pop()


def loop_of(cell, x, state, weights):
    """(the Loop of a step, or None; whether an earlier step began it). state: the h that comes in."""
    for w in weights:
        # what is no leaf may be changed in place between two steps, and then belongs to another node
        if w is not None and not (w.is_leaf and type(w) in (torch.nn.Parameter, torch.Tensor)):
            return None, False
    if not any([w is not None and w.requires_grad for w in weights]):
        return None, False
    gradients = weights[1].shape[0] * (2 if cell == "gru" else 1)
    width = x.shape[0], gradients + x.shape[1] + state.shape[1]
    before = getattr(state.grad_fn, "loop", None)  # the step that made it is a node of our Function
    if before is not None and before.goes_on_with(weights, width):
        return before, True
    return Loop(weights, width), False


class _WeightGradients(torch.autograd.Function):
    """Weights in, weights and tickets out: no numbers, only where gradients flow."""

    @staticmethod
    def forward(w_ih, w_hh, b_ih, b_hh, cell, width, count):
        tickets = w_hh.new_zeros(()).expand(count, *width).unbind()  # of the rows' shape, for autograd to check them by
        return w_ih, w_hh, b_ih, b_hh, *tickets

    @staticmethod
    def setup_context(ctx, inputs, output):
        w_ih, w_hh, _, _, ctx.cell, _, _ = inputs
        ctx.sizes = w_hh.shape[0], w_ih.shape[1], w_hh.shape[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        later, rows = grads[:4], [r for r in grads[4:] if r is not None]  # later: of the steps behind this node's
        if not rows:
            return (*later, None, None, None)
        needs, (gates, width, H) = ctx.needs_input_grad, ctx.sizes

        def columns(begin, end=None):
            """[steps * B, end - begin]: those of all steps together, and only those, for memory's sake."""
            cut = [r[:, begin:end] for r in rows]
            return cut[0] if len(cut) == 1 else torch.cat(cut)

        dw_ih = dw_hh = db_ih = db_hh = None
        dxg = columns(0, gates)
        if needs[2]:
            db_ih = dxg.sum(0)  # in float32 inside, which bias_gradient would make of all of it
        if needs[0]:
            dw_ih = _added(later[0], dxg, columns(-width - H, -H))
        da = dxg
        if ctx.cell == "gru":
            dxg = None
            da = columns(gates, 2 * gates)
        if needs[3]:
            db_hh = db_ih if db_ih is not None and da is dxg else da.sum(0)
        if needs[1]:
            dw_hh = _added(later[1], da, columns(-H))
        db_ih, db_hh = (
            b if a is None else a if b is None else a + b for a, b in zip(later[2:], (db_ih, db_hh), strict=True)
        )
        return dw_ih, dw_hh, db_ih, db_hh, None, None, None


def _added(later, d, rows):
    """later + d^T @ rows; later (None: zero) is the node's own, made by the one behind it for nobody else."""
    if later is None:
        return over_rows(d, rows)
    return addmm(later, d.t(), rows, None if torch.is_grad_enabled() or not may_write(later, d, rows) else later)
