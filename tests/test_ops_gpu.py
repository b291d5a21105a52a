"""What `auto` runs first on a GPU besides attention and recurrent layers, as a user calls it: norms, gated activations,
rope and the vocabulary losses by Triton, forward and every gradient, in layouts as models have them.

The same calls run in the interpreter, on the CPU, so that what stands here is known to be right before a GPU sees it.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import seqfuse
from seqfuse import ops
from seqfuse.kernels import common
from seqfuse.testing import assert_accurate

INTERPRETED = common.interpreting()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.interpret if INTERPRETED else pytest.mark.gpu

ROWS = 6 if INTERPRETED else 3000
WIDTHS = (40, 257) if INTERPRETED else (40, 257, 1024, 5000)
WORDS = 130 if INTERPRETED else 32003
DEEP = 24 if INTERPRETED else 512


def angles(n):
    at = torch.arange(32)[:, None] * torch.rand(n)
    return at.cos(), at.sin()


def losses(call):
    def run(x, weight, *rest):
        target = torch.randint(0, WORDS, (x.shape[0],), generator=torch.Generator().manual_seed(3)).to(x.device)
        return call(x, weight, *rest, target=target)

    return run


def of_a_part(call):
    """Of the first third of each row, as q of a projection to q, k and v; and the result is a part of a larger one."""

    def run(x, *rest):
        y = call(x.unflatten(-1, (3, -1))[:, 0], *rest)
        return torch.cat([y, y], -1)

    return run


def wide(n):
    return torch.randn(ROWS, 3 * n), torch.randn(n)


# name -> (call, width -> its tensors, of which gradients are wanted)
CALLS = {
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, w, b), lambda n: (torch.randn(ROWS, n) + 2, *torch.randn(2, n))),
    "layer_norm-residual": (
        lambda x, r, w, b: ops.layer_norm(x, w, b, residual=r, zero_centered=True),
        lambda n: (*torch.randn(2, ROWS, n), *torch.randn(2, n)),
    ),
    "layer_norm-part": (of_a_part(lambda x, w: ops.layer_norm(x, w)), wide),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w), lambda n: (torch.randn(ROWS, n), torch.randn(n))),
    "rms_norm-residual": (
        lambda x, r, w: ops.rms_norm(x, w, residual=r),
        lambda n: (*torch.randn(2, ROWS, n), torch.randn(n)),
    ),
    "rms_norm-part": (of_a_part(lambda x, w: ops.rms_norm(x, w)), wide),
    "swiglu": (lambda both: ops.swiglu(*both.chunk(2, -1)), lambda n: (torch.randn(ROWS, 2 * n),)),
    "geglu": (lambda gate, up: ops.geglu(gate, up), lambda n: tuple(torch.randn(2, ROWS, n))),
    "geglu-tanh": (lambda gate, up: ops.geglu(gate, up, approximate="tanh"), lambda n: tuple(torch.randn(2, ROWS, n))),
    "cross_entropy": (
        lambda x: ops.cross_entropy(x, torch.arange(x.shape[0], device=x.device) % WORDS, label_smoothing=0.1),
        lambda n: (torch.randn(ROWS, WORDS),),
    ),
    "linear_cross_entropy": (
        losses(
            lambda x, w, b, target: ops.linear_cross_entropy(x, w, target, bias=b, label_smoothing=0.1, z_loss=1e-4)
        ),
        lambda n: (torch.randn(ROWS, DEEP), torch.randn(WORDS, DEEP) / DEEP**0.5, torch.randn(WORDS)),
    ),
    "linear_log_probs": (
        losses(lambda x, w, target: ops.linear_log_probs(x, w, target, softcap=5.0)),
        lambda n: (torch.randn(ROWS, DEEP), torch.randn(WORDS, DEEP) / DEEP**0.5),
    ),
    "kl_loss": (
        lambda x, w, y: ops.kl_loss(x, w, y.detach(), w.detach().flip(0), temperature=2.0),
        lambda n: (torch.randn(ROWS, DEEP), torch.randn(WORDS, DEEP) / DEEP**0.5, torch.randn(ROWS, DEEP)),
    ),
}
for interleaved in (False, True):
    CALLS[f"rope-{interleaved}"] = (
        lambda x, i=interleaved: ops.rope(
            x.transpose(1, 2), *(t.to(x.device, x.dtype) for t in TABLES), offset=3, interleaved=i
        ),
        lambda n: (torch.randn(2, 17, 3, 40),),
    )
TABLES = angles(16)
# losses and rope have sizes of their own
SIZED = [(name, n) for name in CALLS for n in (WIDTHS if "norm" in name or "glu" in name else WIDTHS[:1])]


def outcome(name, tensors, dtype, backend):
    """Results and gradients of the call in a dtype."""
    leaves = [t.to(DEVICE, dtype).requires_grad_() for t in tensors]
    with seqfuse.backend(backend):
        y = CALLS[name][0](*leaves)
        found = y if isinstance(y, tuple) else (y,)
        total = sum((t.float() if dtype != torch.float64 else t).mul(weights(t)).sum() for t in found)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [t.detach() for t in (*found, *grads) if t is not None]


def weights(t):
    return torch.arange(t.numel(), device=t.device).view(t.shape).sin()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "width"), SIZED)
def test_forward_and_gradients(name, width, dtype):
    torch.manual_seed(0)
    tensors = [t.to(dtype) for t in CALLS[name][1](width)]
    ours, truth, plain = (
        outcome(name, tensors, d, backend)
        for d, backend in ((dtype, "triton"), (torch.float64, "reference"), (dtype, "reference"))
    )
    again = outcome(name, tensors, dtype, "triton")
    for i, (got, wanted, same, repeat) in enumerate(zip(ours, truth, plain, again, strict=True)):
        assert_accurate(got, wanted, same, what=f"{name}, tensor {i}", dtype=dtype)
        assert torch.equal(got, repeat)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("width", WIDTHS)
def test_dropout_in_front_of_a_norm(width, rms):
    """The mask is the one that every backend draws, forward and again backward."""
    x, residual = torch.randn(2, ROWS, width, device=DEVICE)
    norm = ops.rms_norm if rms else ops.layer_norm
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        torch.manual_seed(4)
        leaves = [t.to(dtype).requires_grad_() for t in (x, residual)]
        with seqfuse.backend(backend):
            y, s = norm(leaves[0], residual=leaves[1], dropout_p=0.3)
            found.append([y.detach(), s.detach(), *torch.autograd.grad((y * weights(y)).sum() + s.sum(), leaves)])
    for got, wanted, same in zip(*found, strict=True):
        assert_accurate(got, wanted, same)


@pytest.mark.skipif(INTERPRETED, reason="a GPU's: nothing is compiled in the interpreter")
def test_fullgraph():
    """Nor does a question to the driver break the graph."""

    def block(x, w):
        y = ops.rms_norm(x, w)
        q = y.unflatten(-1, (2, -1)).transpose(1, 2)
        return ops.swiglu(*ops.attention(q, q, q, causal=True).flatten(1, 2).chunk(2, -1)).sum()

    x, w = torch.randn(2, 64, 128, device=DEVICE, requires_grad=True), torch.randn(128, device=DEVICE)
    wanted = torch.autograd.grad(block(x, w), x)[0]
    got = torch.autograd.grad(torch.compile(block, fullgraph=True)(x, w), x)[0]
    assert_accurate(got, wanted.double())


def test_empty():
    for shape in ((0, 64), (4, 0)):
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        with seqfuse.backend("triton"):
            y, s = ops.rms_norm(x, residual=x)
            (y.sum() + s.sum()).backward()
        assert y.shape == x.grad.shape == shape
