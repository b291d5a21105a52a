"""torch.nn.LayerNorm on seqfuse.ops.layer_norm."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling

from seqfuse import dispatch, explanation, ops
from seqfuse.native import door
from seqfuse.ops.autograd import autocast_is_on, traced, wants_gradient
from seqfuse.ops.layer_norm import LayerNormCase, run


class _Route(NamedTuple):
    """What the last call was like, and the backend that the dispatcher chose for it."""

    shape: torch.Size
    dtype: torch.dtype
    residual: bool
    grad: bool
    epoch: int
    threads: int
    opening: int  # of the door
    backend: str


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm, with an optional fused residual addition.

    forward(input [*, *normalized_shape]) -> same shape.
    forward(input, residual) -> (LN(input + residual), input + residual).
    """

    _route: _Route | None = None

    def forward(self, input, residual=None):
        # a call like the last one goes where that went, with as little in between as can be
        route = None if is_dynamo_compiling() else self._route
        if route is not None:
            weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
            out = door.layer_norm(input, residual, weight, bias, self.eps, route.opening, route.backend)
            if out is not None:
                return out
            if _is_like(route, input, residual, weight, bias):
                y, s = run(route.backend, input, residual, weight, bias, self.eps, route.grad)
                return y if residual is None else (y, s)
        return self._look_closely(input, residual)

    def _look_closely(self, input, residual):
        dims = len(self.normalized_shape)
        if input.shape[input.dim() - dims :] != self.normalized_shape:
            raise RuntimeError(
                f"Given normalized_shape={list(self.normalized_shape)}, expected input with shape "
                f"[*, {', '.join(map(str, self.normalized_shape))}], but got input of size {list(input.shape)}"
            )
        if autocast_is_on(input) and input.device.type == "cuda":
            # autocast keeps this op in float32 on a GPU
            input, residual = input.float(), None if residual is None else residual.float()
        weight, bias = self.weight, self.bias
        if weight is not None and weight.dtype != input.dtype and not mixes(input.dtype, weight.dtype):
            if input.is_cpu:  # PyTorch's sentence names neither
                raise RuntimeError(
                    f"LayerNorm: input is {str(input.dtype)[6:]}, but weight is {str(weight.dtype)[6:]}: "
                    "convert one of them"
                )
            explanation.handed_over(self, "input and weight have dtypes that only PyTorch's own op may judge")
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        explanation.entering(self)
        if dims == 1:
            out = ops.layer_norm(input, weight, bias, eps=self.eps, residual=residual)
            self._remember(input, residual)
            return out
        flat = [None if t is None else t.flatten(-dims) for t in (input, weight, bias, residual)]
        out = ops.layer_norm(*flat[:3], eps=self.eps, residual=flat[3])
        return out.view_as(input) if residual is None else tuple(t.view_as(input) for t in out)

    def _remember(self, input, residual):
        if traced() or not input.is_cpu or type(input) is not torch.Tensor:
            return
        choice = explanation.last_choice(self)
        if choice is None or not dispatch.nobody_else_listens():
            return
        grad = wants_gradient(input, self.weight, self.bias, residual)
        self._route = _Route(input.shape, input.dtype, residual is not None, grad, dispatch.epoch(),
                             torch.get_num_threads(), door.opened(), choice.backend)  # fmt: skip

    def __getstate__(self):  # a copy, or a pickle, starts afresh
        return {k: v for k, v in self.__dict__.items() if k != "_route"}

    called_op = "layer_norm"  # what explain() may hear of it

    def typical_case(self):
        """(op, case) of a call of usual size, for explain() of a module that has not been called."""
        if self.weight is None:
            return None
        dtype = self.weight.dtype
        return self.called_op, LayerNormCase(
            self.weight.device.type, dtype, dtype, 2048, self.weight.numel(), False, self.training
        )


def _is_like(route, input, residual, weight, bias):
    """Whether a call is like the one that took this route: where the door is shut, for a tuned table say."""
    return (
        not traced()
        and route.shape == input.shape
        and route.dtype is input.dtype
        and input.is_cpu
        and weight is not None
        and bias is not None
        and weight.dtype is route.dtype is bias.dtype
        and route.epoch == dispatch.epoch()
        and route.threads == torch.get_num_threads()
        and route.residual == (residual is not None)
        and (residual is None or (residual.shape == route.shape and residual.dtype is route.dtype))
        and route.grad == wants_gradient(input, weight, bias, residual)
        and not torch.is_autocast_enabled("cpu")
    )


def mixes(dtype, param):
    return param == torch.float32 and dtype in (torch.bfloat16, torch.float16)
