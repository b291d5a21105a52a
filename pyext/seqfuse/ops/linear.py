"""linear: torch.nn.functional.linear with kernels of its own for the few rows of a step of decoding, and for all
products where PyTorch's library leaves half of the processor unused."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from seqfuse import dispatch, native, reference
from seqfuse.ops import checks, library, products
from seqfuse.ops.autograd import apply, autocast_is_on, traced, wants_gradient
from seqfuse.ops.products import FEW_ROWS, MOST_ROWS, NATIVE_BF16, many_rows_pay, matmul, own_floats, own_linear


class LinearCase(NamedTuple):
    """What the choice of a backend may depend on. special: why only PyTorch's own op will do, or ""."""

    device: str
    dtype: torch.dtype
    rows: int
    inputs: int
    outputs: int
    grad: bool
    special: str = ""
    dense: bool = True  # the numbers of each row of the weight lie together

    def shape_class(self) -> str:
        power = dispatch.size_class
        grad = " grad" if self.grad else ""
        return f"{str(self.dtype)[6:]} rows{self.rows} in{power(self.inputs)} out{power(self.outputs)}{grad}"


def linear(x, weight, bias=None):
    """x weight^T + bias: torch.nn.functional.linear, faster where decoding calls it.

    x: [..., K]; weight: [N, K], or [K]; bias: [N], [] or None; all of one dtype. Returns [..., N], or [...].
    On a CPU, float32 or bfloat16 can be multiplied by kernels of ours, with float32 sums: up to 128 rows without a
    gradient, and any rows, forward and backward, of float32 where MKL leaves half of the processor unused
    (seqfuse.native.mkl_is_narrow) and of bfloat16 where the processor has no instructions for it, or slow ones
    (bf16_dots_are_slow). Everything else is PyTorch's own call, so autocast, subclasses of tensors and torch.func work
    as they do there. Parameters stay as nn.Linear keeps them: nothing is packed. Differentiable twice.
    Raises TypeError or ValueError on bad arguments.
    """
    key = None if traced() else _key(x, weight, bias)
    found = _known.get(key)
    if found is not None:
        run, choice, case = found
        dispatch.tell(choice, case)
        return run(x, weight, bias)
    _check(x, weight, bias)
    case = _describe(x, weight, bias)
    choice = dispatch.select("linear", case)
    run = _run(dispatch.get("linear", choice.backend), case)
    if key is not None:
        if len(_known) >= 1024:  # ever-changing shapes must not fill the memory
            _known.clear()
        _known[key] = run, choice, case
    return run(x, weight, bias)


def _run(backend, case):
    if backend.bwd is None:
        return backend.fwd
    if case.grad:
        return _with_gradient
    if torch.compiler.is_compiling():
        few = not compiled_pays(case.dtype, case.inputs, case.outputs)
    else:
        few = case.rows <= MOST_ROWS and case.dense
    return torch.ops.seqfuse.linear_fwd.default if few else backend.fwd


def _with_gradient(x, weight, bias):
    return apply(LinearFunction, x, weight, bias)


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        return own_linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, dy):
        return _gradients(dy, *ctx.saved_tensors, ctx.needs_input_grad)


def _gradients(dy, x, weight, needs):
    """(dx, dweight, dbias), None where none is needed. Differentiable: where that is wanted the products are ATen's."""
    count = x.shape[:-1].numel()
    d, rows = dy.reshape(count, weight.shape[0]), x.reshape(count, weight.shape[1])
    dx = dweight = dbias = None
    if needs[0]:
        dx = matmul(d, weight).view(x.shape)
    if needs[1]:  # laid out as the weight is: what is done with it then copies nothing
        dweight = matmul(rows.t(), d).t() if weight.stride(1) != 1 else matmul(d.t(), rows)
    if needs[2]:
        dbias = d.sum(0)
    return dx, dweight, dbias


# Calls that were checked and chosen before: (backend's function, choice, case), by all that either looks at.
_known = {}


_PLAIN = {torch.Tensor, torch.nn.Parameter}


def _key(x, weight, bias):
    """What `_known` knows a call by. None, which is never known, for a call that is looked at closely each time."""
    if type(x) is not torch.Tensor or type(weight) not in _PLAIN or not (x.is_cpu and weight.is_cpu):
        return None
    told = None
    if bias is not None:
        if type(bias) not in _PLAIN or not bias.is_cpu:
            return None
        told = bias.shape, bias.dtype
    if torch.is_autocast_enabled("cpu"):
        return None
    return (x.shape, x.dtype, weight.shape, weight.dtype, weight.stride(), told, wants_gradient(x, weight, bias),
            dispatch.epoch(), torch.get_num_threads())  # fmt: skip


def _check(x, weight, bias):
    checks.tensor("linear", "x", x)
    checks.tensor("linear", "weight", weight, (1, 2))
    if x.dim() == 0:
        raise ValueError(f"linear: x must have at least one dimension, got {checks.describe(x)}")
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"linear: x must end in weight's {weight.shape[-1]} inputs, got {checks.describe(x)} and "
            f"{checks.describe(weight)}"
        )
    checks.same_device("linear", "weight", weight, "x", x)
    if bias is not None:
        checks.tensor("linear", "bias", bias)
        checks.shape("linear", "bias", bias, weight.shape[:-1])
        checks.same_device("linear", "bias", bias, "x", x)
    if not autocast_is_on(x):  # which converts them
        checks.same_dtype("linear", "weight", weight, "x", x)
        if bias is not None:
            checks.same_dtype("linear", "bias", bias, "x", x)


def _describe(x, weight, bias):
    """The case of checked arguments."""
    special = ""
    if any(t is not None and type(t) not in _PLAIN for t in (x, weight, bias)) and not torch.compiler.is_compiling():
        special = "one of the tensors is of a class of its own, which has its own linear"
    elif autocast_is_on(x):
        special = "autocast converts the weights, and keeps them converted, for PyTorch's own op"
    elif torch._C._are_functorch_transforms_active():
        special = "a transform of torch.func is at work"
    elif weight.dim() == 1:
        special = "the weight has one dimension"
    rows = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
    grad = wants_gradient(x, weight, bias)
    dense = weight.dim() == 1 or weight.stride(1) == 1 or weight.shape[1] <= 1
    return LinearCase(x.device.type, x.dtype, rows, weight.shape[-1], weight.shape[0], grad, special, dense)


def _cpu_refusal(case: LinearCase) -> str | None:
    if case.special:
        return case.special
    compiling = torch.compiler.is_compiling()
    if case.grad and compiling and not compiled_pays(case.dtype, case.inputs, case.outputs):
        return "PyTorch's own product goes into the compiler's graph"
    return library.cpu_refusal(case.device, case.dtype)


# Elements of the weight from which our kernel was measured no slower than PyTorch's op, at every number of rows, from
# AVX2 on (one and two threads: docs/linear.md). Either side must have _SIDE at least: a sum or a result is long then.
_WORTH_IT = {torch.float32: 1 << 18, torch.bfloat16: 1 << 14}
_SIDE = 128
_WIDENED_ROWS = 4


def _cpu_prefers(case: LinearCase) -> str | None:
    if native.isa() == "baseline":
        return "without AVX2 it was not measured against PyTorch's own op"
    side = min(case.inputs, case.outputs)
    if side >= _SIDE and own_floats(case.dtype, *_sizes(case)):
        return None
    hard = case.grad or not case.dense
    if hard and case.dtype == torch.bfloat16 and min(_sizes(case)) >= products.WIDEN_FROM:
        return None  # one or three products that PyTorch takes in a plain loop, in software or by slow instructions
    if case.grad:
        return "with a gradient PyTorch's own products are as fast"
    if not case.dense:
        return "the rows of the weight are not dense"
    if case.dtype == torch.bfloat16:
        if NATIVE_BF16 and case.rows > (FEW_ROWS if native.bf16_dots() else _WIDENED_ROWS):
            return "for so many rows oneDNN's own bfloat16 was measured faster"
    elif FEW_ROWS < case.rows and not many_rows_pay(case.rows):
        return "for so many rows PyTorch's own product was measured faster"
    if side >= _SIDE and case.inputs * case.outputs >= _WORTH_IT[case.dtype]:
        return None
    return "at this size PyTorch's own linear was measured faster"


def _cpu_path(case: LinearCase) -> str:
    return "MKL leaves half of this processor unused" if own_floats(case.dtype, *_sizes(case)) else ""


def _sizes(case: LinearCase) -> tuple[int, int, int]:
    return case.rows, case.inputs, case.outputs


def compiled_pays(dtype: torch.dtype, inputs: int, outputs: int) -> bool:
    """Whether torch.compile is to leave a layer's products to us, however many rows there will be."""
    return products.atens_is_slow(dtype) and min(inputs, outputs) >= _SIDE


def ever_pays(weight) -> bool:
    """Whether `auto` takes a kernel of ours for any call with this weight as it is now."""
    if weight.dim() != 2 or library.cpu_refusal(weight.device.type, weight.dtype):
        return False
    like = LinearCase("cpu", weight.dtype, 1, weight.shape[1], weight.shape[0], False, dense=weight.stride(1) == 1)
    calls = ((1, False), (1024, False), (1024, True))
    return any(_cpu_prefers(like._replace(rows=rows, grad=grad)) is None for rows, grad in calls)


def _fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


library.register_fake("linear_fwd", _fake)
dispatch.register(
    "linear",
    dispatch.Backend("cpu", own_linear, _gradients, _cpu_refusal, _cpu_prefers, path=_cpu_path),
    dispatch.Backend("torch", F.linear, None, note="PyTorch's own op"),
    dispatch.Backend("reference", reference.linear, None),
    # so that a model whose other ops run on them by name runs as a whole
    *(dispatch.Backend(name, F.linear, None, by_name_only="products are PyTorch's own") for name in ("triton", "cuda")),
)
