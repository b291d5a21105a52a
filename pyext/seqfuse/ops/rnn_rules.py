"""Which backend runs a call of lstm, gru or rnn: what each of them takes, and the built-in rules of `auto`."""

import functools
from typing import NamedTuple

import torch

from seqfuse import dispatch, native
from seqfuse.ops import library
from seqfuse.ops.products import OWN_FLOATS, SLOW_BF16
from seqfuse.ops.rnn_scan import CELLS


class RecurrentCase(NamedTuple):
    """What the choice of a backend may depend on. extras: names of what goes beyond torch.nn's plain call.
    tf32: float32 on a GPU whose products may be in tf32."""

    cell: str
    device: str
    dtype: torch.dtype
    T: int
    B: int
    input_size: int
    hidden_size: int
    layers: int
    bidirectional: bool
    grad: bool
    extras: tuple[str, ...] = ()
    heads: int = 1
    tf32: bool = False

    def shape_class(self) -> str:
        power = dispatch.size_class
        return (
            f"{str(self.dtype)[6:]} T{power(self.T)} B{power(self.B)} I{power(self.input_size)} H{self.hidden_size}"
            f"{' bidirectional' if self.bidirectional else ''}{' grad' if self.grad else ''}"
            f"{''.join(f' +{e}' for e in self.extras)}"
        )


# why a backend does not take an extra
_FUSED = {
    "layer_norm": "layer normalisation inside the step needs a sum over all hidden units, which the fused scan does "
    "not exchange between its workers",
    "dropout of a projected h": "the fused scan runs over the state before its projection, so it has no projected h to "
    "drop or to keep",
}
# what the CUDA cluster kernel takes beyond the plain scan, and why it does not take the rest
_CLUSTER_TAKES = ("lengths", "packed_sequence", "resets", "zoneout", "return_cell_states")
_CLUSTER = {
    "peephole": "the CUDA C++ kernels have no peepholes",
    "heads": "the CUDA C++ kernels have no block-diagonal heads",
    "variational_dropout of h": "the CUDA C++ kernels have no mask between h and its product",
}
_IN_THE_SCAN = (
    "lengths",
    "resets",
    "zoneout",
    "variational_dropout of h",
    "layer_norm",
    "peephole",
    "heads",
    "return_cell_states",
    "recompute",
    "dropout of a projected h",
)
_TORCH_TAKES = ("proj_size", "narrow proj_size", "packed_sequence", "weight_drop")


def _extra_refusal(case, reasons):
    for extra in case.extras:
        if extra in reasons:
            return reasons[extra]
    return None


def _fused_refusal(case):
    return "the batch is empty" if case.B == 0 else case.extras and _extra_refusal(case, _FUSED)


def _cuda_plans(case):
    """The cluster kernel's launch plans for the forward pass and, with a gradient, the backward pass."""
    number, scans = _DTYPE_NUMBERS[case.dtype], 2 if case.bidirectional and "recompute" not in case.extras else 1
    return [
        native.rnn_cluster_plan_here(CELLS[case.cell], number, case.B, case.hidden_size, scans, case.tf32, backward)
        for backward in (False, *([True] if case.grad else []))
    ]


def _cuda_refusal(case):
    """What the CUDA kernels don't take: the cluster kernel has some options, the one with a launch a step has none."""
    if case.B == 0:
        return "the batch is empty"
    if refusal := _extra_refusal(case, {**_FUSED, **_CLUSTER}):
        return refusal
    option = next((e for e in case.extras if e in _CLUSTER_TAKES), None)
    if option is None or (option == "return_cell_states" and not case.grad):
        return None  # one launch a step will do
    refusal = next((plan["refusal"] for plan in _cuda_plans(case) if plan["refusal"]), None)
    return None if refusal is None else f"{option} needs the CUDA cluster kernel, and {refusal}"


def torch_refusal(case):
    """Why PyTorch's own op can't take the call, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile breaks the graph at torch's own recurrent ops, or unrolls them over time"
    for extra in case.extras:
        if extra not in _TORCH_TAKES:
            return f"PyTorch's own op has no {extra}"
        if extra == "weight_drop" and case.device != "cpu":
            return "cuDNN wants its weights in one flat buffer, which a dropped w_hh is not part of"
    return None


SHORT_STEPS = 8
SHORT = f"inference over fewer than {SHORT_STEPS} steps: packing the weights costs more than the scan saves"


def _cpu_prefers(case):
    """Built-in rules of `auto` on a CPU: measured with two threads, AMX, AVX-512 and AVX2 (docs/recurrent.md)."""
    if case.extras and torch_refusal(case) is not None:
        return None  # what is left is the reference, a Python loop
    if "packed_sequence" in case.extras:
        return None  # torch's packed path is a loop over steps
    if SLOW_BF16 and case.dtype == torch.bfloat16:
        return None  # PyTorch's own runs its products in a plain loop here
    if not case.grad and case.T < SHORT_STEPS:
        return SHORT
    if case.grad and case.T < {"lstm": 1, "gru": 2}.get(case.cell, 4):
        return "training over so few steps: packing the weights costs more than the scan saves"
    if "narrow proj_size" in case.extras and case.B >= 8:
        return "with so narrow a projection PyTorch's own product of every step is smaller than ours, and was faster"
    if case.cell != "lstm" or "proj_size" in case.extras:
        return None
    wide = native.isa_has("avx512")  # oneDNN gains more from it than our scan, whose products are smaller
    amx = native.isa_has("amx")
    large = amx or (wide and native.bf16_dots_are_slow())  # they have an L2 of 2 MB a core, which holds larger w_hh
    few = case.B < (8 if amx else 12 if case.hidden_size >= 512 else 7)
    if case.dtype == torch.float32 and case.B < 8 and OWN_FLOATS and wide:
        return None  # the products around the scan are ours too
    if case.dtype == torch.float32 and case.B >= 4 and not (large and (case.grad or few)):
        if not case.grad or wide or (case.T * case.B >= 1024 and case.B >= 8) or case.hidden_size >= 512:
            return "oneDNN's float32 LSTM was measured 1.1 to 1.3 times as fast at this batch size"
    if case.dtype == torch.float32 and not case.grad and case.T < 128 and case.hidden_size >= 512 and not large:
        return "packing so large a w_hh takes longer than the scan over so few steps saves against oneDNN"
    if case.dtype == torch.bfloat16 and not case.grad and case.B >= 8 and native.bf16_dots() and not large:
        return "oneDNN's bfloat16 LSTM was measured 1.1 times as fast in inference at this batch size"
    return None


def _gpu_prefers(case):
    if case.extras and torch_refusal(case) is not None:
        return None  # what is left is the reference, a Python loop
    return "not yet measured against cuDNN on a GPU"


def torch_path(case):
    """Which library PyTorch's own op ends in."""
    if case.device == "cuda":
        return "cuDNN" if torch.backends.cudnn.enabled and torch.backends.cudnn.is_available() else "ATen"
    if case.cell != "lstm" or not case.B or not torch.backends.mkldnn.is_available():
        return "ATen"
    loop = "proj_size" in case.extras or "packed_sequence" in case.extras
    # oneDNN's bfloat16 needs instructions that not every processor has
    takes = case.dtype == torch.float32 or (case.dtype == torch.bfloat16 and _onednn_takes_bf16())
    return "oneDNN" if takes and not loop and torch.backends.mkldnn.enabled else "ATen"


@functools.cache
def _onednn_takes_bf16():
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _cpu_path(case):
    rows = "lengths" in case.extras or "packed_sequence" in case.extras
    return "fused CPU scan" + (" over the rows that exist" if rows and "recompute" not in case.extras else "")


def _triton_path(case):
    options = sum(e in _IN_THE_SCAN and e not in ("heads", "recompute") for e in case.extras)
    return f"Triton, {_triton_tier(case.cell, case.dtype, case.B, case.hidden_size, case.device, case.heads, options)}"


@functools.lru_cache(1024)
def _triton_tier(cell, dtype, batch, hidden, device, heads, options):
    from seqfuse.kernels import common, rnn  # imported here: Triton may be missing, and is slow to import

    facts = common.capability(torch.device(device)), common.sm_count(torch.device(device))
    return f"{rnn.plan(cell, dtype, batch, hidden, *facts, heads=heads, options=options).tier} tier"


_DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/include/seqfuse/types.h


def _cuda_path(case):
    """The launches of forward and, where it differs, backward."""
    passes = [
        f"one launch a step, as {plan['refusal']}"
        if plan["refusal"]
        else f"clusters of {plan['blocks']} blocks, {plan['groups']} in {plan['waves']} wave{'s' * (plan['waves'] > 1)}"
        for plan in _cuda_plans(case)
    ]
    text = passes[0] if len(set(passes)) == 1 else f"forward {passes[0]}; backward {passes[1]}"
    return f"CUDA C++, {text} ({library.NOT_RUN_ON_GPU})"


def _never(*_):
    raise AssertionError("lstm, gru and rnn run layer by layer: see rnn_layer.py")


def _backends():
    def refuses(rule, more=_fused_refusal):
        return lambda case: rule(case.device, case.dtype) or more(case) or None

    return (
        dispatch.Backend("cpu", _never, _never, refuses(library.cpu_refusal), _cpu_prefers, path=_cpu_path),
        dispatch.Backend(
            "triton",
            _never,
            _never,
            refuses(library.triton_refusal),
            lambda c: library.interpreter_is_for_tests(c) or _gpu_prefers(c),
            note=library.NOT_RUN_ON_GPU,
            path=_triton_path,
        ),
        dispatch.Backend(
            "cuda",
            _never,
            _never,
            refuses(library.cuda_refusal, _cuda_refusal),
            note=library.NOT_RUN_ON_GPU,
            by_name_only=f"{library.NOT_RUN_ON_GPU}: only asked for by name",
            path=_cuda_path,
        ),
        dispatch.Backend("torch", _never, None, torch_refusal, note="PyTorch's own op", path=torch_path),
        dispatch.Backend("reference", _never, None, path=lambda c: "a Python loop over the steps"),
    )


for _op in ("lstm", "gru", "rnn"):
    dispatch.register(_op, *_backends())
