"""Gated activations: swiglu and geglu. Only gate and up are kept for the backward pass."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling

from seqfuse import dispatch, reference
from seqfuse.native import door
from seqfuse.ops import checks, library
from seqfuse.ops.autograd import apply, differentiable_gradients, is_differentiated, wants_gradient
from seqfuse.reference.gated import ACTIVATIONS

SILU, GELU, GELU_TANH = range(3)


class GatedCase(NamedTuple):
    """What the choice of a backend may depend on."""

    device: str
    dtype: torch.dtype
    elements: int
    activation: int
    grad: bool

    def shape_class(self) -> str:
        kind = ACTIVATIONS[self.activation]
        return f"{str(self.dtype)[6:]} {kind} {dispatch.size_class(self.elements)}{' grad' if self.grad else ''}"


def swiglu(gate, up):
    """silu(gate) * up. gate, up: [..., N] of one floating dtype; rows may be strided (halves of one projection).

    Differentiable twice. Raises TypeError or ValueError on bad arguments. Source: Shazeer 2020 (arXiv:2002.05202).
    """
    return _gated("swiglu", gate, up, SILU)


def geglu(gate, up, *, approximate="none"):
    """gelu(gate) * up, with gelu(g) = g Phi(g), or its approximation by tanh (approximate="tanh", as in F.gelu).

    Everything else as in swiglu.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f'geglu: approximate must be "none" or "tanh", got {approximate!r}')
    return _gated("geglu", gate, up, GELU if approximate == "none" else GELU_TANH)


def _gated(op, gate, up, activation):
    if not is_dynamo_compiling():
        y = door.gated(gate, up, activation)
        if y is not None:
            return y
    checks.tensor(op, "gate", gate)
    checks.tensor(op, "up", up)
    checks.shape(op, "up", up, gate.shape)
    checks.same_device(op, "up", up, "gate", gate)
    checks.same_dtype(op, "up", up, "gate", gate)
    if up is gate:  # Dynamo takes no tensor twice
        up = gate.view_as(gate)
    grad = wants_gradient(gate, up)
    case = GatedCase(gate.device.type, gate.dtype, gate.numel(), activation, grad)
    backend = dispatch.get("gated", dispatch.select("gated", case).backend)
    if backend.bwd is None:
        return backend.fwd(gate, up, activation)
    rows = [t.reshape(1, 1) if t.dim() == 0 else checks.rows(t) for t in (gate, up)]
    y = apply(GatedFunction, *rows, activation, backend.name) if grad else backend.fwd(*rows, activation)
    return y.view(gate.shape)


class GatedFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gate, up, activation, name):
        return dispatch.get("gated", name).fwd(gate, up, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gate, up, activation, name = inputs
        ctx.save_for_backward(gate, up)
        ctx.call = activation, name

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        activation, name = ctx.call
        if is_differentiated(dy, gate, up):
            dgate, dup = differentiable_gradients(
                lambda gate, up: [reference.gated(gate, up, activation)], [dy], (gate, up), ctx.needs_input_grad
            )
        else:
            dgate, dup = dispatch.get("gated", name).bwd(dy, gate, up, activation)
        return dgate, dup, None, None


def _torch_gated(gate, up, activation):
    if activation == SILU:
        return F.silu(gate) * up
    return F.gelu(gate, approximate="none" if activation == GELU else "tanh") * up


def _fake_fwd(gate, up, activation):
    return gate.new_empty(gate.shape)


def _fake_bwd(dy, gate, up, activation):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


library.register_op(
    "gated_fwd", "(Tensor gate, Tensor up, int activation) -> Tensor", _fake_fwd,
    library.launcher("gated", "gated_fwd"),
)  # fmt: skip
library.register_op(
    "gated_bwd", "(Tensor dy, Tensor gate, Tensor up, int activation) -> (Tensor dgate, Tensor dup)", _fake_bwd,
    library.launcher("gated", "gated_bwd"),
)  # fmt: skip

# Elements from which our kernel was measured no slower on a CPU than PyTorch's ops, by activation (two threads, AVX2:
# docs/losses.md). Below, reaching it costs more than it saves.
_WORTH_IT = {SILU: 1 << 18, GELU: 1 << 17, GELU_TANH: 1 << 16}


def _cpu_prefers(case: GatedCase) -> str | None:
    if case.elements >= _WORTH_IT[case.activation]:
        return None
    return "at this size PyTorch's own calls cost less than ours does to reach its kernel"


dispatch.register(
    "gated",
    dispatch.Backend("cpu", *library.pair("gated"), lambda c: library.cpu_refusal(c.device, c.dtype), _cpu_prefers),
    dispatch.Backend("triton", *library.pair("gated", "seqfuse_triton"),
                     lambda c: library.triton_refusal(c.device, c.dtype), library.interpreter_is_for_tests,
                     note=library.NOT_RUN_ON_GPU),
    dispatch.Backend("torch", _torch_gated, None, note="PyTorch's own activation and product"),
    dispatch.Backend("reference", reference.gated, None),
    least=lambda: tuple(_WORTH_IT.values()),
)  # fmt: skip
