"""What the tests of the recurrent modules share: one call as a dict of outputs and gradients, under the error rule."""

import copy

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import seqfuse
from seqfuse.testing import assert_accurate


def rounded(module):
    """The module in float64, its parameters rounded to bf16, so that every dtype starts from the same numbers."""
    module = copy.deepcopy(module).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p.bfloat16())
    return module


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64).bfloat16().double()


def state_of(module, batch):
    """(h0, c0) for an LSTM, else h0, random."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = numbers(count, batch, module.proj_size or module.hidden_size)
    return (h, numbers(count, batch, module.hidden_size)) if module.mode == "LSTM" else h


def leaves_of(hx):
    return () if hx is None else hx if isinstance(hx, tuple) else (hx,)


def flat(out):
    """All tensors of a call's outputs, in order."""
    if isinstance(out, PackedSequence):
        return [out.data]
    return [out] if isinstance(out, torch.Tensor) else [t for o in out for t in flat(o)]


def call(module, dtype, x, hx=None, pack=None, seed=7, weights=None, **more):
    """{name: tensor}: outputs, and the gradients of input, state and parameters, of one call computed in `dtype`.

    pack: lengths by which x is packed first. The random masks are those of `seed`.
    """
    module = copy.deepcopy(module).to(dtype)
    x = x.to(dtype).requires_grad_()
    states = [s.to(dtype).requires_grad_() for s in leaves_of(hx)]
    hx = None if hx is None else tuple(states) if isinstance(hx, tuple) else states[0]
    torch.manual_seed(seed)
    given = x if pack is None else pack_padded_sequence(x, pack, module.batch_first, enforce_sorted=False)
    out = module(given, hx, **more)
    if pack is not None:
        out = (pad_packed_sequence(out[0], module.batch_first)[0], *out[1:])
    outputs = flat(out)
    generator = torch.Generator().manual_seed(3)
    ds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).bfloat16().to(o.dtype) for o in outputs]
    names, used = ["x", *(f"state{i}" for i in range(len(states)))], [x, *states]
    for name, p in module.named_parameters():
        names.append(name)
        used.append(p)
    grads = torch.autograd.grad(outputs, used, ds, allow_unused=True)
    found = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    return found | {f"d{n}": g for n, g in zip(names, grads, strict=True) if g is not None}


def compare(got, exact, theirs, names=None):
    assert got.keys() == exact.keys() == theirs.keys()
    for name in names or exact:
        dims = (0, 1) if exact[name].dim() == 3 and name in ("out0", "dx") else ()
        assert_accurate(got[name], exact[name], theirs[name], dims=dims, what=name)


def check(module, x, hx=None, dtype=torch.float32, backend="cpu", **more):
    """seqfuse on `backend` keeps the error rule: truth is the reference in float64, the measure the reference (plain
    PyTorch) at the same dtype, all with the same masks."""
    module = rounded(module)
    with seqfuse.backend("reference"):
        exact, theirs = call(module, torch.float64, x, hx, **more), call(module, dtype, x, hx, **more)
    with seqfuse.backend(backend):
        got = call(module, dtype, x, hx, **more)
    compare(got, exact, theirs)


def check_torch(module, x, hx=None, dtype=torch.float32, backend="cpu", **more):
    """The same for a torch.nn module, fused: truth and measure are torch.nn's own."""
    module = rounded(module)
    exact, theirs = call(module, torch.float64, x, hx, **more), call(module, dtype, x, hx, **more)
    with seqfuse.backend(backend):
        got = call(seqfuse.fuse(module), dtype, x, hx, **more)
    compare(got, exact, theirs)
