"""torch.nn.RMSNorm on seqfuse.ops.rms_norm."""

import torch

from seqfuse import explanation, ops
from seqfuse.nn.layer_norm import mixes
from seqfuse.ops.layer_norm import LayerNormCase


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm, with an optional fused residual addition.

    forward(input [*, *normalized_shape]) -> same shape.
    forward(input, residual) -> (RMS(input + residual), input + residual).
    """

    def forward(self, input, residual=None):
        dims, weight = len(self.normalized_shape), self.weight
        if input.shape[input.dim() - dims :] != self.normalized_shape:
            raise RuntimeError(
                f"Given normalized_shape={list(self.normalized_shape)}, expected input with shape "
                f"[*, {', '.join(map(str, self.normalized_shape))}], but got input of size {list(input.shape)}"
            )
        if weight is not None and weight.dtype != input.dtype and not mixes(input.dtype, weight.dtype):
            explanation.handed_over(self, "input and weight have dtypes that only PyTorch's own op may judge")
            s = input if residual is None else input + residual
            y = super().forward(s)
            return y if residual is None else (y, s)
        # torch's default: the epsilon of the type that it computes in
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps if self.eps is None else self.eps
        explanation.entering(self)
        if dims == 1:
            return ops.rms_norm(input, weight, eps=eps, residual=residual)
        flat = [None if t is None else t.flatten(-dims) for t in (input, weight, residual)]
        out = ops.rms_norm(flat[0], flat[1], eps=eps, residual=flat[2])
        return out.view_as(input) if residual is None else tuple(t.view_as(input) for t in out)

    called_op = "rms_norm"  # what explain() may hear of it

    def typical_case(self):
        """(op, case) of a call of usual size, for explain() of a module that has not been called."""
        if self.weight is None:
            return None
        dtype = self.weight.dtype
        return self.called_op, LayerNormCase(
            self.weight.device.type, dtype, dtype, 2048, self.weight.numel(), False, self.training, rms=True
        )
