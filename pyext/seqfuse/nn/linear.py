"""torch.nn.Linear on seqfuse.ops.linear."""

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling

from seqfuse import explanation, ops
from seqfuse.ops.linear import LinearCase, ever_pays


class Linear(torch.nn.Linear):
    """torch.nn.Linear, for the few rows of a step of decoding and for processors that its library leaves half unused.

    forward(input [*, in_features]) -> [*, out_features].
    """

    def forward(self, input):
        if is_dynamo_compiling() or not input.is_cpu:
            return F.linear(input, self.weight, self.bias)
        explanation.entering(self)
        return ops.linear(input, self.weight, self.bias)

    def typical_case(self):
        weight = self.weight
        return "linear", LinearCase(weight.device.type, weight.dtype, 1, *reversed(weight.shape), grad=False)


def pays(module: torch.nn.Linear) -> bool:
    """Whether fuse() puts this class in the place of the module's: only where calls may go faster."""
    return ever_pays(module.weight)
