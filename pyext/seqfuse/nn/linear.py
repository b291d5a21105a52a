"""torch.nn.Linear on seqfuse.ops.linear."""

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling

from seqfuse import dispatch, explanation, ops
from seqfuse.ops import products
from seqfuse.ops.linear import LinearCase, compiled_pays, ever_pays


class Linear(torch.nn.Linear):
    """torch.nn.Linear, for the few rows of a step of decoding and for processors that its library leaves half unused.

    forward(input [*, in_features]) -> [*, out_features].
    """

    def forward(self, input):
        if is_dynamo_compiling():
            ours = input.is_cpu and compiled_pays(input.dtype, self.in_features, self.out_features)
            return (ops.linear if ours else F.linear)(input, self.weight, self.bias)
        if type(input) is not torch.Tensor or not input.is_cpu:
            return F.linear(input, self.weight, self.bias)
        if self._pytorch_is_as_fast(input) and dispatch.may_shortcut():
            explanation.handed_over(self, "with a gradient, or for so many rows, PyTorch's own product is as fast")
            return F.linear(input, self.weight, self.bias)
        explanation.entering(self)
        return ops.linear(input, self.weight, self.bias)

    def _pytorch_is_as_fast(self, input):
        """What `auto` would say of most calls, for less than it costs to ask."""
        if not torch.is_grad_enabled() and input.numel() <= products.MOST_ROWS * self.in_features:
            return False
        return not products.atens_is_slow(input.dtype)

    called_op = "linear"  # what explain() may hear of it

    def typical_case(self):
        """(op, case) of a call of usual size, for explain() of a module that has not been called."""
        weight = self.weight
        return self.called_op, LinearCase(
            weight.device.type, weight.dtype, 1, weight.shape[1], weight.shape[0], grad=False
        )


def pays(module: torch.nn.Linear) -> bool:
    """Whether fuse() puts this class in the place of the module's: only where calls may go faster."""
    return ever_pays(module.weight)
