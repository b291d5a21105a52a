"""Rotary position embedding. Its gradient is the rotation back, so it is differentiable as often as one likes."""

import operator
from typing import NamedTuple

import torch

from seqfuse import dispatch, reference
from seqfuse.ops import checks, library
from seqfuse.ops.autograd import apply, requires_gradient, told_of_change, traced, wants_gradient


class RopeCase(NamedTuple):
    """What the choice of a backend may depend on."""

    device: str
    dtype: torch.dtype
    elements: int
    interleaved: bool
    grad: bool

    def shape_class(self) -> str:
        kind = "neighbours" if self.interleaved else "halves"
        return f"{str(self.dtype)[6:]} {kind} {dispatch.size_class(self.elements)}{' grad' if self.grad else ''}"


def rope(x, cos, sin, *, positions=None, offset=0, interleaved=False, inplace=False):
    """Turn the pairs of each head by their position's angles: (a cos - b sin, b cos + a sin).

    x: [B, H, T, D], any strides with dense heads, or a tuple of such tensors (q and k, say), which gives a tuple.
    cos, sin: [S, R / 2], of x's dtype or float32, without gradients; the first R <= D elements of a head are turned and
    the others passed on. Pairs are (i, R / 2 + i), GPT-NeoX's layout, or with interleaved=True (2i, 2i + 1), GPT-J's.
    positions: int64 [T] or [B, T], rows of the tables; without them token t has offset + t. inplace: overwrite x, where
    no gradient is recorded. Returns tensors like x. Raises TypeError or ValueError on bad arguments; a position outside
    of the tables raises on a CPU, and is not looked at on a GPU, where that would wait for it.
    Source: Su et al. 2021, "RoFormer" (arXiv:2104.09864).
    """
    xs = x if isinstance(x, (tuple, list)) else (x,)
    for t in xs:
        _check(t, cos, sin, positions, offset)
    if requires_gradient(cos, sin):
        raise ValueError("rope: cos and sin get no gradient: detach them")
    if inplace and (traced() or requires_gradient(*xs)):
        raise ValueError("rope: inplace=True needs inference: a gradient of x is recorded, or the call is traced")
    tables = [t.float() if t.dtype != torch.float64 else t for t in (cos, sin)]
    positions = None if positions is None else positions.contiguous()
    offset = offset if isinstance(offset, torch.SymInt) else operator.index(offset)
    out = tuple(_rope(t, *(t.contiguous() for t in tables), positions, offset, interleaved, inplace) for t in xs)
    return out if isinstance(x, (tuple, list)) else out[0]


def _rope(x, cos, sin, positions, offset, interleaved, inplace):
    grad = wants_gradient(x)
    case = RopeCase(x.device.type, x.dtype, x.numel(), interleaved, grad)
    backend = dispatch.get("rope", dispatch.select("rope", case).backend)
    args = (cos, sin, positions, offset, interleaved, False)
    if backend.bwd is None:
        if positions is not None:
            _check_numbers(positions, cos)
        y = backend.fwd(x, *args)
        return x.copy_(y) if inplace else y
    if inplace and x.stride(3) == 1 and not _overlaps(x):  # copy_ says what is wrong with one that overlaps
        _INTO[backend.name](x, *args, x)
        told_of_change(x)
        return x
    y = apply(RopeFunction, x, *args, backend.name) if grad else backend.fwd(x, *args)
    return x.copy_(y) if inplace else y


def _check_numbers(positions, cos):
    """What the kernels look at themselves, where that does not wait for a device."""
    if not positions.is_cpu or traced() or not positions.numel():
        return
    for position in positions.aminmax():
        if not 0 <= int(position) < cos.shape[0]:
            raise IndexError(f"rope: position {int(position)} is outside of tables of {cos.shape[0]} rows")


def _overlaps(x):
    return any(size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True))


class RopeFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, cos, sin, positions, offset, interleaved, inverse, name):
        return dispatch.get("rope", name).fwd(x, cos, sin, positions, offset, interleaved, inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, cos, sin, positions, offset, interleaved, inverse, name = inputs
        ctx.save_for_backward(cos, sin, positions)
        ctx.call = offset, interleaved, inverse, name

    @staticmethod
    def backward(ctx, dy):
        offset, interleaved, inverse, name = ctx.call
        args = (dy, *ctx.saved_tensors, offset, interleaved, not inverse)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # by the same kernel
            dx = apply(RopeFunction, *args, name)
        else:
            dx = dispatch.get("rope", name).fwd(*args)
        return dx, *(None,) * 7


def _check(x, cos, sin, positions, offset):
    checks.tensor("rope", "x", x, (4,))
    checks.tensor("rope", "cos", cos, (2,))
    checks.tensor("rope", "sin", sin, (2,))
    checks.shape("rope", "sin", sin, cos.shape)
    for name, t in (("cos", cos), ("sin", sin)):
        checks.same_device("rope", name, t, "x", x)
        if t.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"rope: {name} must have x's dtype or be float32, got {checks.describe(t)}")
    if 2 * cos.shape[1] > x.shape[3]:
        raise ValueError(
            f"rope: cos has {cos.shape[1]} columns, at most half a head of x ({x.shape[3] // 2}) is accepted"
        )
    if positions is None:
        if not isinstance(offset, torch.SymInt) and not hasattr(offset, "__index__"):
            raise TypeError(f"rope: offset must be an integer, got {checks.describe(offset)}")
        if not 0 <= offset <= cos.shape[0] - x.shape[2]:
            raise ValueError(
                f"rope: offset {offset} and {x.shape[2]} time steps do not fit into tables of {cos.shape[0]} rows"
            )
        return
    if not isinstance(positions, torch.Tensor) or positions.dtype != torch.int64:
        raise TypeError(f"rope: positions must be an int64 tensor, got {checks.describe(positions)}")
    if tuple(positions.shape) not in ((x.shape[2],), (x.shape[0], x.shape[2])):
        raise ValueError(
            f"rope: positions must have shape {[x.shape[2]]} or {[x.shape[0], x.shape[2]]}, "
            f"got {checks.describe(positions)}"
        )
    checks.same_device("rope", "positions", positions, "x", x)


def _on_dense_heads(call):
    """An op whose result has x's strides, for which the elements of a head must lie side by side."""
    return lambda x, *rest: call(x if x.stride(3) == 1 else x.contiguous(), *rest)


_cpu_rope = _on_dense_heads(library.kernel("rope", "seqfuse_composed"))
_triton_rope = _on_dense_heads(library.kernel("rope", "seqfuse_triton"))


def _new_rope(x, cos, sin, positions, offset, interleaved, inverse):
    y = torch.empty_like(x)  # of x's strides, so that both are walked through in the order of memory
    torch.ops.seqfuse.rope.default(x, cos, sin, positions, offset, interleaved, inverse, y)
    return y


_SCHEMA = "(Tensor x, Tensor cos, Tensor sin, Tensor? positions, int offset, bool interleaved, bool inverse) -> Tensor"
_INTO = {"cpu": library.kernel("rope"), "triton": library.launcher("rope", "rope")}  # with y, which may be x itself


def _fake(x, *_):
    return torch.empty_like(x)


library.register_composed("rope", _SCHEMA, _fake, _new_rope)
library.register_triton("rope", _SCHEMA, _fake, library.launcher("rope", "rope"))


def _cpu_prefers(case: RopeCase) -> str | None:
    if case.elements >= (1 << 15 if case.grad else 1 << 17):  # measured, two threads, AVX2: docs/losses.md
        return None
    return "at this size plain PyTorch costs less than ours does to reach its kernel"


dispatch.register(
    "rope",
    dispatch.Backend("cpu", _cpu_rope, _cpu_rope, lambda c: library.cpu_refusal(c.device, c.dtype), _cpu_prefers),
    dispatch.Backend("triton", _triton_rope, _triton_rope, lambda c: library.triton_refusal(c.device, c.dtype),
                     library.interpreter_is_for_tests, note=library.NOT_RUN_ON_GPU),
    dispatch.Backend("torch", reference.rope, None, note="plain PyTorch"),
    dispatch.Backend("reference", reference.rope, None),
)  # fmt: skip
