"""torch.nn.LayerNorm on seqfuse.ops.layer_norm."""

import torch
import torch.nn.functional as F

from seqfuse import dispatch, explanation, ops
from seqfuse.ops.layer_norm import SMALL, LayerNormCase, small


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm, with an optional fused residual addition.

    forward(input [*, *normalized_shape]) -> same shape.
    forward(input, residual) -> (LN(input + residual), input + residual).
    """

    def forward(self, input, residual=None):
        if input.is_cpu and small(input.numel(), input.dtype, residual is not None) and self._direct():
            s = input if residual is None else input + residual
            y = F.layer_norm(s, self.normalized_shape, self.weight, self.bias, self.eps)
            return y if residual is None else (y, s)
        dims = len(self.normalized_shape)
        if input.shape[input.dim() - dims :] != self.normalized_shape:
            raise RuntimeError(
                f"Given normalized_shape={list(self.normalized_shape)}, expected input with shape "
                f"[*, {', '.join(map(str, self.normalized_shape))}], but got input of size {list(input.shape)}"
            )
        if torch.is_autocast_enabled(input.device.type) and input.device.type == "cuda":
            # autocast keeps this op in float32 on a GPU
            input, residual = input.float(), None if residual is None else residual.float()
        weight, bias = self.weight, self.bias
        if weight is not None and weight.dtype != input.dtype and not _mixes(input.dtype, weight.dtype):
            explanation.handed_over(self, "input and weight have dtypes that only PyTorch's own op may judge")
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        explanation.entering(self)
        if dims == 1:
            return ops.layer_norm(input, weight, bias, eps=self.eps, residual=residual)
        flat = [None if t is None else t.flatten(-dims) for t in (input, weight, bias, residual)]
        out = ops.layer_norm(*flat[:3], eps=self.eps, residual=flat[3])
        return out.view_as(input) if residual is None else tuple(t.view_as(input) for t in out)

    def _direct(self):
        """Small CPU inputs go straight to PyTorch, before anything is spent on looking at them."""
        if torch.compiler.is_compiling() or not dispatch.may_shortcut():
            return False
        explanation.handed_over(self, SMALL)
        return True

    def typical_case(self):
        """(op, case) of a call of usual size, for explain() of a module that has not been called."""
        if self.weight is None:
            return None
        dtype = self.weight.dtype
        return "layer_norm", LayerNormCase(
            self.weight.device.type, dtype, dtype, 2048, self.weight.numel(), False, self.training
        )


def _mixes(dtype, param):
    return param == torch.float32 and dtype in (torch.bfloat16, torch.float16)
