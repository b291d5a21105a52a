"""linear: torch.nn.functional.linear with a kernel of its own for the few rows of a step of decoding."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from seqfuse import dispatch, native, reference
from seqfuse.ops import checks, library
from seqfuse.ops.autograd import traced, wants_gradient
from seqfuse.ops.products import FEW_ROWS, NATIVE_BF16, many_rows_pay


class LinearCase(NamedTuple):
    """What the choice of a backend may depend on. special: why only PyTorch's own op will do, or ""."""

    device: str
    dtype: torch.dtype
    rows: int
    inputs: int
    outputs: int
    grad: bool
    special: str = ""

    def shape_class(self) -> str:
        power = dispatch.size_class
        return f"{str(self.dtype)[6:]} rows{self.rows} in{power(self.inputs)} out{power(self.outputs)}"


def linear(x, weight, bias=None):
    """x weight^T + bias: torch.nn.functional.linear, faster where decoding calls it.

    x: [..., K]; weight: [N, K], or [K]; bias: [N], [] or None; all of one dtype. Returns [..., N], or [...].
    On a CPU, up to 128 rows of float32 or bfloat16 without a gradient can be multiplied by a kernel of ours, with
    float32 sums; everything else is PyTorch's own call, so gradients, autocast, subclasses of tensors and torch.func
    work as they do there. Parameters stay as nn.Linear keeps them: nothing is packed.
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
    run = dispatch.get("linear", choice.backend).fwd
    if key is not None:
        if len(_known) >= 1024:  # ever-changing shapes must not fill the memory
            _known.clear()
        _known[key] = torch.ops.seqfuse.linear_fwd.default if choice.backend == "cpu" else run, choice, case
    return run(x, weight, bias)


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
    if torch.is_grad_enabled() and wants_gradient(x, weight, bias):
        return None  # PyTorch's own work takes longer there than the checks
    if torch.is_autocast_enabled("cpu"):
        return None
    return (x.shape, x.dtype, weight.shape, weight.dtype, weight.stride(), told, dispatch.epoch(),
            torch.get_num_threads())  # fmt: skip


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
    if not torch.is_autocast_enabled(x.device.type):  # which converts them
        checks.same_dtype("linear", "weight", weight, "x", x)
        if bias is not None:
            checks.same_dtype("linear", "bias", bias, "x", x)


def _describe(x, weight, bias):
    """The case of checked arguments."""
    special = ""
    if any(t is not None and type(t) not in _PLAIN for t in (x, weight, bias)) and not torch.compiler.is_compiling():
        special = "one of the tensors is of a class of its own, which has its own linear"
    elif torch.is_autocast_enabled(x.device.type):
        special = "autocast converts the weights, and keeps them converted, for PyTorch's own op"
    elif torch._C._are_functorch_transforms_active():
        special = "a transform of torch.func is at work"
    elif weight.dim() == 1:
        special = "the weight has one dimension"
    elif weight.stride(1) != 1 and weight.shape[1] > 1:
        special = "the rows of the weight are not dense"
    rows = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
    grad = wants_gradient(x, weight, bias)
    return LinearCase(x.device.type, x.dtype, rows, weight.shape[-1], weight.shape[0], grad, special)


def _cpu_refusal(case: LinearCase) -> str | None:
    if case.special:
        return case.special
    if case.grad:
        return "its kernel makes no gradient"
    return library.cpu_refusal(case.device, case.dtype)


# Elements of the weight from which our kernel was measured no slower than PyTorch's op, at every number of rows, from
# AVX2 on (one and two threads: docs/linear.md). Either side must have _SIDE at least: a sum or a result is long then.
_WORTH_IT = {torch.float32: 1 << 18, torch.bfloat16: 1 << 14}
_SIDE = 128
_WIDENED_ROWS = 4


def _cpu_prefers(case: LinearCase) -> str | None:
    if native.isa() == "baseline":
        return "without AVX2 it was not measured against PyTorch's own op"
    if case.dtype == torch.bfloat16:
        if NATIVE_BF16 and case.rows > (FEW_ROWS if native.isa_has("avx512_bf16") else _WIDENED_ROWS):
            return "for so many rows oneDNN's own bfloat16 was measured faster"
    elif FEW_ROWS < case.rows and not many_rows_pay(case.rows):
        return "for so many rows PyTorch's own product was measured faster"
    if min(case.inputs, case.outputs) >= _SIDE and case.inputs * case.outputs >= _WORTH_IT[case.dtype]:
        return None
    return "at this size PyTorch's own linear was measured faster"


def _fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


library.register_fake("linear_fwd", _fake)
dispatch.register(
    "linear",
    dispatch.Backend("cpu", library.kernel("linear_fwd"), None, _cpu_refusal, _cpu_prefers),
    dispatch.Backend("torch", F.linear, None, note="PyTorch's own op"),
    dispatch.Backend("reference", reference.linear, None),
    # so that a model whose other ops run on them by name runs as a whole
    *(dispatch.Backend(name, F.linear, None, by_name_only="products are PyTorch's own") for name in ("triton", "cuda")),
)
