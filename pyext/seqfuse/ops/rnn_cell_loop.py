"""The weights' gradients of a loop over a cell, all steps at once.

    dw_ih = sum over t of dxg_t^T @ x_t,   dw_hh = sum over t of da_t^T @ h_{t-1}

Autograd would take a product of few rows in every step, write a gradient as large as the weight and add it to the one
before. Here the steps share one node, `_WeightGradients`, through which their weights' gradients flow: it has as many
outputs, called tickets, as there may be steps; each step takes one as an input, and what it returns as that ticket's
gradient is its rows of the sum, [dxg | da | x | h]. When the node runs, autograd has collected the rows of all steps of
this backward pass, and each gradient is one product over them.

Nothing is kept beside the graph. So parts of a graph, a second backward pass over it, gradients of some tensors only,
hooks on parameters, and several threads are what they are for any other node.
"""

import torch

from seqfuse.ops.autograd import apply
from seqfuse.ops.rnn_gradients import bias_gradient, over_rows

MOST_TICKETS = 64  # of one node: so many steps, at most, keep their rows until their products are taken
MOST_ROWS = 384  # of all of these together: enough for a fast product, and less memory than torch.nn's graph holds


class Loop:
    """What the steps of one cell in one graph share: for which weights, and the tickets that no step has taken yet."""

    __slots__ = ("made", "needs", "tickets", "weights", "width")

    def __init__(self, weights, width):
        self.weights, self.width = weights, width
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
            most = max(8, min(MOST_TICKETS, MOST_ROWS // max(self.width[0], 1)))
            self.made = min(4 * self.made or 8, most)
            made = list(apply(_WeightGradients, *self.weights, cell, self.width, self.made))
            taken = made.pop()
            self.tickets = made
            return taken


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
    """Weights in, tickets out: no numbers, only where gradients flow."""

    @staticmethod
    def forward(w_ih, w_hh, b_ih, b_hh, cell, width, count):
        return w_hh.new_zeros(()).expand(count, *width).unbind()  # of the rows' shape, for autograd to check them by

    @staticmethod
    def setup_context(ctx, inputs, output):
        w_ih, w_hh, _, _, ctx.cell, _, _ = inputs
        ctx.sizes = w_hh.shape[0], w_ih.shape[1], w_hh.shape[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *rows):
        rows = [r for r in rows if r is not None]
        if not rows:
            return (None,) * 7
        needs, (gates, width, H) = ctx.needs_input_grad, ctx.sizes

        def columns(begin, end=None):
            """[steps * B, end - begin]: those of all steps together, and only those, for memory's sake."""
            cut = [r[:, begin:end] for r in rows]
            return cut[0] if len(cut) == 1 else torch.cat(cut)

        dw_ih = dw_hh = db_ih = db_hh = None
        dxg = columns(0, gates)
        if needs[2]:
            db_ih = bias_gradient(dxg).to(dxg.dtype)
        if needs[0]:
            dw_ih = over_rows(dxg, columns(-width - H, -H))
        da = dxg
        if ctx.cell == "gru":
            dxg = None
            da = columns(gates, 2 * gates)
        if needs[3]:
            db_hh = db_ih if db_ih is not None and da is dxg else bias_gradient(da).to(da.dtype)
        if needs[1]:
            dw_hh = over_rows(da, columns(-H))
        return dw_ih, dw_hh, db_ih, db_hh, None, None, None
