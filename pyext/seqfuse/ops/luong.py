"""luong_readout: a step of Luong's attention with its readout, in one call where PyTorch takes five."""

from typing import NamedTuple

import torch

from seqfuse import dispatch, reference
from seqfuse.ops import library
from seqfuse.ops.autograd import wants_gradient


class LuongCase(NamedTuple):
    """What the choice of a backend may depend on."""

    device: str
    dtype: torch.dtype
    rows: int
    grad: bool
    mixed: bool = False  # of several dtypes, as autocast may leave them

    def shape_class(self) -> str:
        return f"{str(self.dtype)[6:]} rows{dispatch.size_class(self.rows)}"


def luong_readout(query, keys, values, added, lengths=None):
    """tanh(added + sum_t a_t values_t), a the softmax over t of query . keys_t (arXiv:1508.04025, section 3.1).

    query, added: [S * n, H], n rows for each of S sources; keys, values: [S, T, H]; all of one floating-point dtype.
    lengths: int64 [S], how many places of a source exist, at least one, or None for all. Returns [S * n, H].
    """
    grad = wants_gradient(query, keys, values, added)
    mixed = not query.dtype == keys.dtype == values.dtype == added.dtype
    case = LuongCase(query.device.type, query.dtype, query.shape[0], grad, mixed)
    choice = dispatch.select("luong_readout", case)
    return dispatch.get("luong_readout", choice.backend).fwd(query, keys, values, added, lengths)


def _cpu_refusal(case: LuongCase) -> str | None:
    if case.grad:
        return "its kernel makes no gradient"
    if case.mixed:
        return "its kernel takes tensors of one dtype"
    if case.dtype != torch.float32:
        return f"its kernel takes float32, not {str(case.dtype).removeprefix('torch.')}"
    return library.cpu_refusal(case.device, case.dtype)


library.register_fake("luong_readout", lambda query, keys, values, added, lengths: query.new_empty(query.shape))
dispatch.register(
    "luong_readout",
    dispatch.Backend("cpu", library.kernel("luong_readout"), None, _cpu_refusal),
    dispatch.Backend("torch", reference.luong_readout, None, note="a chain of PyTorch's ops"),
    dispatch.Backend("reference", reference.luong_readout, None),
    # so that a model whose other ops run on them by name runs as a whole
    *(
        dispatch.Backend(name, reference.luong_readout, None, by_name_only="the products are PyTorch's own")
        for name in ("triton", "cuda")
    ),
)
