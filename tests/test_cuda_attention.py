"""The Hopper attention kernels, executed on the CPU by the host side of the device layer under AddressSanitizer and
UBSan (tests/host_device: TMA writes the swizzled bytes, wgmma reads them by their descriptors, both late), against the
float64 truth. What this cannot show: docs/cuda.md."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from host_device.runner import DTYPES, Failed

from seqfuse import reference
from seqfuse.ops.attention_cuda_rules import refusal
from seqfuse.testing import assert_accurate

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


# The layer: panels that arrive late and are swizzled, products that are late, barriers of some warps


def panels(host, a, b, c, by_columns=False, mistake=0, seed=1):
    numbers = {"dtype": DTYPES[a.dtype], "by_columns": by_columns, "mistake": mistake, "seed": seed, "rows": len(c)}
    out = host("panels", numbers, {"a": a, "b": b, "c": c}, {"out": (64 * 64, torch.float32)})["out"]
    return out.view(64, 64)


def operands(dtype=torch.bfloat16, rows=128):
    return [torch.randn(s).to(dtype) for s in ((64, 128), (64, 128), (rows, 64))]


@pytest.mark.parametrize("dtype", HALVES)
def test_products_of_swizzled_panels(host, dtype):
    a, b, c = operands(HALVES[dtype])
    for seed in (1, 2):
        assert_accurate(panels(host, a, b, c, seed=seed), a.double() @ b.double().T, dims=(0, 1))
        assert_accurate(panels(host, a, b, c, True, seed=seed), a.double() @ c.double(), dims=(0, 1))


def test_rows_outside_the_tensor_are_zero(host):
    a, b, c = operands(rows=77)
    assert_accurate(panels(host, a, b, c, True), a[:, :77].double() @ c.double(), dims=(0, 1))


@pytest.mark.parametrize(
    "mistake,words",
    [
        (2, "without a wgmma_fence"),
        (4, "no multiple of 1024"),
        (5, "wait for ever at arrivals"),
        (6, "barrier 5 is left with 96 of 128 threads"),
        (7, "different numbers of wgmma"),
    ],
    ids=["no-fence", "unaligned", "few-bytes", "no-barrier", "uneven"],
)
def test_mistakes_with_panels_are_caught(host, mistake, words):
    with pytest.raises(Failed) as caught:
        panels(host, *operands(), mistake=mistake)
    assert words in str(caught.value)


@pytest.mark.parametrize("mistake", [1, 3], ids=["no-wait-for-bytes", "no-wait-for-products"])
def test_reading_too_early_gives_wrong_results(host, mistake):
    a, b, c = operands()
    wrong = 0
    for seed in range(1, 7):
        try:
            out = panels(host, a, b, c, mistake=mistake, seed=seed)
            wrong += not torch.allclose(out, a.float() @ b.float().T, atol=1e-3)
        except Failed as failed:
            assert "leaving the kernel" in str(failed)
            wrong += 1
    assert wrong, "nothing was late in any schedule"


# tiles, heads, batches, heads of a section
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (5, 3, 2, 4), (4, 6, 1, 6), (3, 7, 3, 2)], ids=str)
@pytest.mark.parametrize("longest", [False, True])
def test_every_tile_has_one_block(host, sizes, longest):
    tiles, heads, batches, section = sizes
    numbers = dict(zip(("tiles", "heads", "batches", "section"), sizes, strict=True)) | {"longest": longest}
    n = tiles * heads * batches
    found = [int(x) for x in host("place", numbers, {}, {"out": (n, torch.float32)})["out"]]
    places = [(x % 1000, x // 1000000 * heads + x // 1000 % 1000) for x in found]
    assert sorted(places) == [(t, h) for t in range(tiles) for h in range(heads * batches)]
    first = places[: tiles * min(section, heads * batches)]
    assert {h for _, h in first} == set(range(min(section, heads * batches))), "the first section comes first"
    assert [t for t, _ in first] == sorted((t for t, _ in first), reverse=longest)


# Forward


class Heads:
    """A tensor [B, H, T, D] in one of the layouts that the contract allows, its gaps full of NaN."""

    def __init__(self, layout, B, H, T, D):
        self.shape = (B, H, T, D)
        if layout == "bthd":  # as a projection leaves it
            self.strides = (T * H * D, D, H * D)
        elif layout == "padded":  # a slice of wider rows, heads and batches
            self.strides = (H * (T + 1) * (D + 8) + 24, (T + 1) * (D + 8), D + 8)
        elif layout == "odd":  # rows that the copy engine can't address
            self.strides = (H * T * (D + 1), T * (D + 1), D + 1)
        else:
            self.strides = (H * T * D, T * D, D)
        self.count = (
            0 if 0 in self.shape else sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=False)) + D
        )

    def numbers(self, name):
        return {f"{name}_{d}": s for d, s in zip("bht", self.strides, strict=True)}

    def view(self, flat):
        return flat.as_strided(self.shape, (*self.strides, 1))

    def store(self, x):
        flat = torch.full((self.count,), float("nan"), dtype=x.dtype)
        self.view(flat).copy_(x)
        return flat


def sample(B, Hq, Hkv, Tq, Tk, D, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, Hq, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, D)]
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def forward(host, q, k, v, causal, scale, layout="dense", **numbers):
    (B, Hq, Tq, D), (_, Hkv, Tk, _) = q.shape, k.shape
    layouts = {n: Heads(layout, *t.shape) for n, t in (("q", q), ("k", k), ("v", v), ("out", q))}
    numbers |= {"B": B, "Hq": Hq, "Hkv": Hkv, "Tq": Tq, "Tk": Tk, "D": D, "causal": causal, "scale": float(scale)}
    numbers["dtype"] = DTYPES[q.dtype]
    for name, here in layouts.items():
        numbers |= here.numbers(name)
    inputs = {n: layouts[n].store(t) for n, t in (("q", q), ("k", k), ("v", v))}
    outputs = {"out": (layouts["out"].count, q.dtype), "lse": (B * Hq * Tq, torch.float32)}
    found = host("attention_forward", numbers, inputs, outputs)
    gaps = torch.ones(layouts["out"].count, dtype=torch.bool)
    layouts["out"].view(gaps).fill_(False)
    assert found["out"][gaps].isnan().all(), "written between the rows of out"
    return layouts["out"].view(found["out"]), found["lse"].view(B, Hq, Tq)


def truth(q, k, v, causal, scale, dtype=torch.float64):
    options = reference.AttentionOptions(scale=scale, window_right=0 if causal else -1)
    return reference.attention(q.to(dtype), k.to(dtype), v.to(dtype), options)


def check(host, B, Hq, Hkv, Tq, Tk, D, dtype, causal, scale=None, seed=0, **options):
    q, k, v = sample(B, Hq, Hkv, Tq, Tk, D, dtype, seed)
    scale = D**-0.5 if scale is None else scale
    out, lse = forward(host, q, k, v, causal, scale, seed=seed + 1, **options)
    true, theirs = truth(q, k, v, causal, scale), truth(q, k, v, causal, scale, dtype)
    assert_accurate(out, true[0], theirs[0], dims=(0, 1, 2), what="out")
    assert_accurate(lse, true[1], theirs[1], dims=(0, 1, 2), what="lse")
    return out, lse


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", HALVES)
def test_forward(host, dtype, D, causal):
    check(host, 1, 2, 1, 300, 300, D, HALVES[dtype], causal)


# Tq, Tk: one; one key more than a block; queries and keys of several blocks; more queries than keys, and none
SIZES = [(1, 1), (5, 129), (130, 257), (300, 40), (40, 700), (3, 0)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "Tq{}-Tk{}".format(*s))
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
def test_forward_of_odd_sizes(host, causal, size):
    check(host, 1, 1, 1, *size, 64, torch.bfloat16, causal)


@pytest.mark.parametrize("layout", ["bthd", "padded"])
def test_forward_of_strided_heads(host, layout):
    check(host, 2, 4, 2, 70, 150, 64, torch.bfloat16, True, layout=layout)
    check(host, 1, 3, 1, 150, 70, 128, torch.float16, False, layout=layout)


def test_forward_of_large_scores(host):
    """The maximum of a row moves from block to block, and l is dominated by few keys."""
    check(host, 1, 1, 1, 70, 500, 64, torch.bfloat16, False, scale=1.0)
    check(host, 1, 1, 1, 70, 500, 128, torch.float16, True, scale=0.7)


def test_forward_under_many_schedules(host):
    """Five blocks of keys through two buffers; even and odd seeds (scheduler.cpp), the same bits under each."""
    first = None
    for seed in range(1, 7):
        q, k, v = sample(1, 1, 1, 128, 600, 64, torch.bfloat16)
        out, lse = forward(host, q, k, v, True, 0.125, seed=seed)
        first = first or (out, lse)
        assert torch.equal(out, first[0]) and torch.equal(lse, first[1])
    assert_accurate(first[0], truth(q, k, v, True, 0.125)[0], dims=(2,))


def test_rows_that_see_no_key_are_zero(host):
    q, k, v = sample(1, 1, 1, 200, 30, 64, torch.bfloat16)
    out, lse = forward(host, q, k, v, True, 0.125)
    assert (out[:, :, :170] == 0).all() and (lse[:, :, :170] == -torch.inf).all()
    assert (out[:, :, 170:] != 0).any(-1).all() and lse[:, :, 170:].isfinite().all()


def test_a_nan_stays_in_its_row(host):
    q, k, v = sample(1, 1, 1, 70, 140, 64, torch.bfloat16)
    q[0, 0, 5, 3] = torch.nan
    out, lse = forward(host, q, k, v, False, 0.125)
    others = torch.arange(70) != 5
    assert out[0, 0, 5].isnan().all() and out[0, 0, others].isfinite().all() and lse[0, 0, others].isfinite().all()


@pytest.mark.parametrize(
    "what", ["fp32", "head size", "scale", "capability", "stride"], ids=lambda w: w.replace(" ", "-")
)
def test_what_the_launcher_refuses(host, what):
    D = 96 if what == "head size" else 64
    q, k, v = sample(1, 1, 1, 8, 8, D, torch.float32 if what == "fp32" else torch.bfloat16)
    layout = "odd" if what == "stride" else "dense"
    numbers = {"capability": 80} if what == "capability" else {}
    with pytest.raises(Failed, match="attention_forward returned 801"):
        forward(host, q, k, v, False, -1.0 if what == "scale" else 0.125, layout, **numbers)


# Backward


def backward(host, q, k, v, out, lse, dout, dlse, causal, scale, layout="dense", **numbers):
    (B, Hq, Tq, D), (_, Hkv, Tk, _) = q.shape, k.shape
    tensors = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
    results = {"dq": q, "dk": k, "dv": v}
    layouts = {n: Heads(layout, *t.shape) for n, t in (tensors | results).items()}
    numbers |= {"B": B, "Hq": Hq, "Hkv": Hkv, "Tq": Tq, "Tk": Tk, "D": D, "causal": causal, "scale": float(scale)}
    numbers["dtype"] = DTYPES[q.dtype]
    for name, here in layouts.items():
        numbers |= here.numbers(name)
    inputs = {n: layouts[n].store(t) for n, t in tensors.items()} | {"lse": lse, "dlse": dlse}
    found = host("attention_backward", numbers, inputs, {n: (layouts[n].count, q.dtype) for n in results})
    for name in results:
        gaps = torch.ones(layouts[name].count, dtype=torch.bool)
        layouts[name].view(gaps).fill_(False)
        assert found[name][gaps].isnan().all(), f"written between the rows of {name}"
    return {n: layouts[n].view(found[n]) for n in results}


def gradients(q, k, v, dout, dlse, causal, scale, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    out, lse = truth(*leaves, causal, scale, dtype)
    visible = lse > -torch.inf
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + torch.where(visible, lse, 0.0).mul(dlse.to(lse.dtype)).sum()
    return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(loss, leaves), strict=True))


def pytorch_gradients(q, k, v, dout, dlse, causal, scale):
    """By torch's own ops at the kernel's dtype, which round P and dS to it as every flash kernel does."""
    (Tq, Tk), group = (q.shape[2], k.shape[2]), q.shape[1] // k.shape[1]
    if min(Tq, Tk) == 0 or (causal and Tq > Tk):  # rows that see no key: not SDPA's
        return gradients(q, k, v, dout, dlse, causal, scale, q.dtype)
    visible = torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq) if causal else None
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, attn_mask=visible, scale=scale, enable_gqa=group > 1)
    loss = (out * dout).sum()
    if dlse is not None:
        scores = leaves[0] @ leaves[1].repeat_interleave(group, 1).mT * scale
        scores = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
        loss = loss + (scores.logsumexp(-1) * dlse).sum()
    return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(loss, leaves), strict=True))


def check_backward(
    host, B, Hq, Hkv, Tq, Tk, D, dtype, causal, scale=None, seed=0, layout="dense", with_dlse=True, **numbers
):
    q, k, v = sample(B, Hq, Hkv, Tq, Tk, D, dtype, seed)
    scale = D**-0.5 if scale is None else scale
    dout = torch.randn(B, Hq, Tq, D).to(dtype)
    dlse = torch.randn(B, Hq, Tq) if with_dlse else None
    out, lse = truth(q, k, v, causal, scale, dtype)
    numbers["seed"] = seed + 1
    got = backward(host, q, k, v, out, lse.float(), dout, dlse, causal, scale, layout, **numbers)
    true = gradients(q, k, v, dout, dlse, causal, scale, torch.float64)
    theirs = pytorch_gradients(q, k, v, dout, dlse, causal, scale)
    for name, x in got.items():
        assert_accurate(x, true[name], theirs[name], dims=(0, 1, 2), what=name)
    return got


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", HALVES)
def test_backward(host, dtype, D, causal):
    check_backward(host, 1, 2, 1, 200, 200, D, HALVES[dtype], causal)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "Tq{}-Tk{}".format(*s))
@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
def test_backward_of_odd_sizes(host, causal, size):
    check_backward(host, 1, 1, 1, *size, 64, torch.bfloat16, causal)


@pytest.mark.parametrize("layout", ["bthd", "padded"])
def test_backward_of_strided_heads(host, layout):
    check_backward(host, 2, 4, 2, 70, 150, 64, torch.bfloat16, True, layout=layout)
    check_backward(host, 1, 3, 1, 150, 70, 128, torch.float16, False, layout=layout, with_dlse=False)


def test_backward_under_many_schedules(host):
    """Streams longer than the buffers; even and odd seeds (scheduler.cpp), the same bits under each."""
    q, k, v = sample(1, 2, 1, 130, 330, 64, torch.bfloat16)
    out, lse = truth(q, k, v, True, 0.125, torch.bfloat16)
    dout, first = torch.randn(q.shape).bfloat16(), None
    for seed in range(1, 7):
        got = backward(host, q, k, v, out, lse.float(), dout, None, True, 0.125, seed=seed)
        first = first or got
        assert all(torch.equal(got[n], first[n]) for n in got)


def test_rows_that_see_no_key_have_no_gradient(host):
    got = check_backward(host, 1, 1, 1, 200, 30, 64, torch.bfloat16, True)
    assert (got["dq"][:, :, :170] == 0).all()


def test_queries_without_keys_and_keys_without_queries(host):
    assert (check_backward(host, 1, 1, 1, 5, 0, 64, torch.bfloat16, True)["dq"] == 0).all()
    got = check_backward(host, 1, 1, 1, 0, 5, 128, torch.bfloat16, False)
    assert (got["dk"] == 0).all() and (got["dv"] == 0).all()


# The rules in Python


class Case(NamedTuple):
    dtype: torch.dtype = torch.bfloat16
    D: int = 128
    Dv: int = 128
    capability: tuple[int, int] = (9, 0)
    options: frozenset[str] = frozenset({"causal"})
    scale: float = 0.1


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"capability": (8, 0)}, "this device has 8.0"),
        ({"capability": (10, 0)}, "this device has 10.0"),
        ({"dtype": torch.float32}, "not float32"),
        ({"D": 96, "Dv": 96}, "not D=96"),
        ({"Dv": 64}, "not D=128 with Dv=64"),
        ({"options": frozenset({"causal", "dropout"})}, "do not take dropout"),
        ({"scale": 0.0}, "a positive scale, not 0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),  # sets print in no fixed order
)
def test_rules(changes, words):
    assert refusal(Case()) is None and refusal(Case(D=64, Dv=64, dtype=torch.float16, options=frozenset())) is None
    assert words in refusal(Case(**changes))
