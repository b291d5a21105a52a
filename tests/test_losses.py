"""cross_entropy and linear_cross_entropy against the float64 reference: kernels at every instruction set, and ops."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import seqfuse
from seqfuse import reference
from seqfuse.ops import loss_blocks
from seqfuse.reference import LossOptions
from seqfuse.testing import assert_accurate

DTYPES = [torch.float32, torch.bfloat16]
EVERYTHING = {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 1e-2, "class_weight": True}
OPTIONS = [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"z_loss": 0.1}, {"class_weight": True}, EVERYTHING]


def ids(options):
    return ",".join(options) or "plain"


def sample(tokens, vocabulary, width, dtype, *, bias=True, class_weight=False, ignored=0.3):
    """(x, weight, bias), target, class_weight. Some targets are ignored, the first one never."""
    x = torch.randn(tokens, width).to(dtype)
    weight = (torch.randn(vocabulary, width) * 2 / width**0.5).to(dtype)
    target = torch.randint(0, vocabulary, (tokens,))
    target[1:][torch.rand(max(tokens - 1, 0)) < ignored] = -100
    cw = torch.rand(vocabulary) + 0.5 if class_weight else None
    return (x, weight, torch.randn(vocabulary).to(dtype) if bias else None), target, cw


def run(call, tensors, upstream, dtype=None):
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    loss = call(*leaves)
    loss.backward(upstream.to(loss.dtype))
    return [loss.detach(), *(t.grad for t in leaves if t is not None)]


def truth_of(losses, target, class_weight, options, reduction):
    if reduction == "none":
        return losses
    return losses.sum() * reference.loss_scale(target, class_weight, options.ignore_index, reduction, losses.dtype)


def check(tensors, target, class_weight, reduction, given_logits=False, backend="cpu", upstream=None, **options):
    """Loss and gradients of ours, held against the reference in float64 and in the dtype of the tensors."""
    known = LossOptions(
        -100, options.get("label_smoothing", 0.0), options.get("softcap", 0.0), options.get("z_loss", 0.0)
    )
    if upstream is None:
        upstream = torch.randn(target.shape if reduction == "none" else ())

    def ours(x, weight=None, bias=None):
        with seqfuse.backend(backend):
            if given_logits:
                return seqfuse.ops.cross_entropy(x, target, class_weight=class_weight, reduction=reduction, **options)
            return seqfuse.ops.linear_cross_entropy(
                x, weight, target, bias=bias, class_weight=class_weight, reduction=reduction, **options
            )

    def plain(x, weight=None, bias=None):
        logits = x if given_logits else F.linear(x, weight, bias)
        cw = None if class_weight is None else class_weight.double() if x.dtype == torch.float64 else class_weight
        return truth_of(reference.cross_entropy(logits, target, cw, known), target, cw, known, reduction)

    tensors = tensors[:1] if given_logits else tensors
    names = ("loss", "dx", "dweight", "dbias")[: len(tensors) + 1]
    got = run(ours, tensors, upstream)
    exact, theirs = run(plain, tensors, upstream, torch.float64), run(plain, tensors, upstream)
    every = zip(names[: len(got)], got, exact, theirs, strict=True)
    for name, a, b, c in every:
        assert_accurate(a, b, c, dims=(0,) if a.dim() == 2 else (), what=name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_kernel_keeps_the_error_rule(isa, dtype, options, reduction):
    options = dict(options)
    tensors, target, cw = sample(21, 77, 12, dtype, class_weight=options.pop("class_weight", False))
    check(tensors, target, cw, reduction, **options)
    logits = torch.randn(21, 77).mul(2).to(dtype)
    check((logits,), target, cw, reduction, given_logits=True, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_several_blocks(dtype, reduction, monkeypatch):
    monkeypatch.setattr(loss_blocks, "_BLOCK", 7 * 50)
    monkeypatch.setitem(loss_blocks._LEAST_TOKENS, "cpu", 1)
    tensors, target, cw = sample(40, 50, 16, dtype, class_weight=True)
    assert loss_blocks.tokens_in_a_block(40, 50, "cpu") == 7
    check(tensors, target, cw, reduction, label_smoothing=0.1)


@pytest.mark.parametrize("options", [o for o in OPTIONS if "label_smoothing" not in o], ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_without_a_gradient_blocks_are_parts_of_the_vocabulary(dtype, options, monkeypatch):
    monkeypatch.setattr(loss_blocks, "_BLOCK", 16 * 600)
    monkeypatch.setitem(loss_blocks._LEAST_TOKENS, "cpu", 1)
    monkeypatch.setattr(loss_blocks, "_IN_CACHE", 1)  # blocks of 256 columns, the last of 88
    options = dict(options)
    (x, weight, bias), target, cw = sample(40, 600, 16, dtype, class_weight=options.pop("class_weight", False))
    known = LossOptions(-100, 0.0, options.get("softcap", 0.0), options.get("z_loss", 0.0))

    def plain(dtype):
        wide = [t.to(dtype) for t in (x, weight, bias)]
        return reference.linear_cross_entropy(*wide, target, None if cw is None else cw.to(dtype), known)

    shapes = []
    mm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, out: (shapes.append(out.shape), mm(*a, out=out))[1])
    with torch.no_grad(), seqfuse.backend("cpu"):
        got = seqfuse.ops.linear_cross_entropy(
            x, weight, target, bias=bias, class_weight=cw, reduction="none", **options
        )
    assert [shape[1] for shape in shapes] == [256, 256, 88]
    assert_accurate(got, plain(torch.float64), plain(dtype))


@settings(max_examples=40)
@given(
    tokens=st.integers(4, 30),
    vocabulary=st.integers(2, 200),
    width=st.integers(4, 20),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    class_weight=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.2]),
    softcap=st.sampled_from([None, 4.0]),
    z_loss=st.sampled_from([0.0, 0.05]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_random_configurations(
    tokens, vocabulary, width, dtype, bias, class_weight, softcap, reduction, seed, **options
):
    """From 4 tokens of width 4 up: the error of one number, a sum that cancels, is luck, PyTorch's as well as ours.

    What a size of one does to the indexing is test_one_token_of_width_one's business.
    """
    torch.manual_seed(seed)
    tensors, target, cw = sample(tokens, vocabulary, width, dtype, bias=bias, class_weight=class_weight)
    if softcap:
        options["softcap"] = softcap
    check(tensors, target, cw, reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_one_token_of_width_one(isa, dtype):
    weight = torch.linspace(0, 3, 16)[:, None].to(dtype)  # the target's is zero: no term of dx cancels another
    check((torch.ones(1, 1, dtype=dtype), weight, None), torch.tensor([0]), None, "mean")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"label_smoothing": 0.2, "class_weight": True}], ids=ids
)
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_is_torchs_cross_entropy(backend, options, reduction):
    """Also its token-weighted mean, and its value where every target is ignored or there is none."""
    options = dict(options)
    tensors, target, cw = sample(9, 20, 8, torch.float32, class_weight=options.pop("class_weight", False))
    for t in (target, torch.full_like(target, -100)):
        with seqfuse.backend(backend):
            got = seqfuse.ops.linear_cross_entropy(
                *tensors[:2], t, bias=tensors[2], class_weight=cw, reduction=reduction, **options
            )
        wide = [v.double() for v in tensors]
        args = (t, None if cw is None else cw.double())
        truth = F.cross_entropy(F.linear(*wide), *args, reduction=reduction, **options)
        theirs = F.cross_entropy(F.linear(*tensors), t, cw, reduction=reduction, **options)
        assert_accurate(got, truth, theirs)


def test_all_ignored_gives_zero_gradients_and_no_tokens_work():
    (x, weight, _), _, _ = sample(4, 10, 8, torch.float32)
    for tokens in (4, 0):
        leaves = [x[:tokens].clone().requires_grad_(), weight.clone().requires_grad_()]
        target = torch.full((tokens,), -100)
        with seqfuse.backend("cpu"):
            loss = seqfuse.ops.linear_cross_entropy(*leaves, target, reduction="sum")
        loss.backward()
        assert loss == 0 and all(torch.equal(t.grad, torch.zeros_like(t)) for t in leaves)


def test_nan_and_excluded_words():
    logits = torch.randn(3, 40)
    logits[0, 3] = float("nan")
    logits[1, 7:12] = float("-inf")
    target = torch.tensor([1, 2, 3])
    with seqfuse.backend("cpu"):
        got = seqfuse.ops.cross_entropy(logits, target, reduction="none")
    assert got[0].isnan()
    assert_accurate(got[1:], F.cross_entropy(logits.double(), target, reduction="none")[1:])


def test_the_logits_are_never_whole_and_a_second_backward_computes_again():
    tensors, target, _ = sample(12, 30, 8, torch.float32, bias=False)
    x, weight = (t.requires_grad_() for t in tensors[:2])
    with seqfuse.backend("cpu"):
        loss = seqfuse.ops.linear_cross_entropy(x, weight, target)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (x, weight), torch.tensor(2.0))
    for a, b, again in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        assert_accurate(again, 2 * b.double())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward(reduction):
    tensors, target, cw = sample(6, 11, 5, torch.float32, class_weight=True)
    known = LossOptions(-100, 0.1, 4.0, 0.1)

    def second(call, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        loss = call(*leaves).square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def ours(x, weight, bias):
        with seqfuse.backend("cpu"):
            return seqfuse.ops.linear_cross_entropy(
                x, weight, target, bias=bias, class_weight=cw, reduction=reduction, label_smoothing=0.1, softcap=4.0,
                z_loss=0.1,
            )  # fmt: skip

    def plain(x, weight, bias):
        losses = reference.linear_cross_entropy(x, weight, bias, target, cw.to(x.dtype), known)
        return truth_of(losses, target, cw.to(x.dtype), known, reduction)

    got, exact, theirs = second(ours, torch.float32), second(plain, torch.float64), second(plain, torch.float32)
    for a, b, c in zip(got, exact, theirs, strict=True):
        assert_accurate(a, b, c, what="second derivative")


def test_reference_is_differentiable_twice():
    tensors, target, cw = sample(3, 5, 4, torch.float64, class_weight=True)
    leaves = [t.double().requires_grad_() for t in tensors]

    def call(*args):
        return reference.linear_cross_entropy(*args, target, cw.double(), LossOptions(-100, 0.1, 3.0, 0.1))

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


def test_opcheck():
    (x, weight, bias), target, cw = sample(6, 24, 8, torch.float32, class_weight=True)
    op = torch.ops.seqfuse_composed.cross_entropy.default
    options = (-100, 0.1, 4.0, 0.1, (True, True, True), "cpu")
    for scale in (None, torch.tensor([0.5]), torch.rand(6)):
        torch.library.opcheck(op, (x, weight, bias, target, cw, scale, None, *options))
        for wanted in ((True, False, False), (False, True, False), (False, False, True)):
            torch.library.opcheck(op, (x, weight, bias, target, cw, scale, None, *options[:4], wanted, "cpu"))
        torch.library.opcheck(op, (F.linear(x, weight), None, None, target, None, scale, None, *options))
    _, lse, *_ = op(x, weight, bias, target, cw, None, None, *options)
    torch.library.opcheck(op, (x, weight, bias, target, cw, torch.rand(6), lse, *options))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction):
    tensors, target, _ = sample(10, 30, 8, torch.float32)
    upstream = torch.randn(10) if reduction == "none" else torch.tensor(0.7)

    def ours(x, weight, bias):
        return seqfuse.ops.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction)

    def theirs(x, weight, bias):
        return F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)

    got = run(torch.compile(ours, fullgraph=True), tensors, upstream)
    every = zip(got, run(theirs, tensors, upstream, torch.float64), run(theirs, tensors, upstream), strict=True)
    for a, b, c in every:
        assert_accurate(a, b, c)


def test_autocast_and_more_dimensions():
    (x, weight, bias), target, _ = sample(12, 30, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = seqfuse.ops.linear_cross_entropy(x.view(3, 4, 8), weight, target.view(3, 4), bias=bias)
        theirs = F.cross_entropy(F.linear(x, weight, bias).float(), target)
    assert loss.dtype == torch.float32
    truth = F.cross_entropy(F.linear(x.double(), weight.double(), bias.double()), target)
    assert_accurate(loss, truth, theirs, dtype=torch.bfloat16)


def test_repeats_are_bit_identical():
    tensors, target, cw = sample(64, 300, 16, torch.float32, class_weight=True)

    def call(x, weight, bias):
        with seqfuse.backend("cpu"):
            return seqfuse.ops.linear_cross_entropy(x, weight, target, bias=bias, class_weight=cw, label_smoothing=0.1)

    first, second = (run(call, tensors, torch.tensor(1.0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


X, W, T = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda op: op([1.0], W, T), TypeError, "x must be a tensor"),
        (lambda op: op(X, W[:, :3], T), ValueError, "x must be [..., 3]"),
        (lambda op: op(X, W.double(), T), ValueError, "weight is float64, but x is float32"),
        (lambda op: op(X, W, T, bias=X), ValueError, "bias must have shape [5]"),
        (lambda op: op(X, W, T[:2]), ValueError, "target must have shape [3]"),
        (lambda op: op(X, W, T.int()), TypeError, "target must be an int64 tensor"),
        (lambda op: op(X, W, T, reduction="max"), ValueError, "reduction must be one of"),
        (lambda op: op(X, W, T, label_smoothing=2.0), ValueError, "label_smoothing must be between 0 and 1"),
        (lambda op: op(X, W, T, softcap=-1.0), ValueError, "softcap must be positive"),
        (lambda op: op(X, W, T, z_loss=-1.0), ValueError, "z_loss must be at least 0"),
        (lambda op: op(X, W, T, class_weight=torch.ones(4)), ValueError, "class_weight must have shape [5]"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, text):
    with pytest.raises(error) as caught:
        call(seqfuse.ops.linear_cross_entropy)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_target_out_of_range_raises():
    with seqfuse.backend("cpu"), pytest.raises(RuntimeError, match="target 5 is out of bounds"):
        seqfuse.ops.linear_cross_entropy(X, W, torch.tensor([0, 5, 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_rows_of_a_block_begin_at_cache_lines(dtype):
    block = loss_blocks._block(torch.empty(1, dtype=dtype), 3, 33)
    assert block.shape == (3, 33) and block.stride(0) * block.element_size() % 64 == 0
    assert loss_blocks._block(torch.empty(1, dtype=dtype), 3, 64).is_contiguous()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range_raises_where_blocks_are_parts_of_the_vocabulary(reduction, monkeypatch):
    monkeypatch.setattr(loss_blocks, "_BLOCK", 1)
    monkeypatch.setitem(loss_blocks._LEAST_TOKENS, "cpu", 1)
    for wrong in (5, -1):
        with torch.no_grad(), seqfuse.backend("cpu"), pytest.raises(IndexError, match=f"target {wrong} is out of bou"):
            seqfuse.ops.linear_cross_entropy(X, W, torch.tensor([0, wrong, 1]), reduction=reduction)


def test_a_masked_part_of_the_vocabulary_without_a_gradient(monkeypatch):
    """Blocks of columns of which no word is allowed add nothing to the sum."""
    monkeypatch.setattr(loss_blocks, "_BLOCK", 1)
    monkeypatch.setitem(loss_blocks._LEAST_TOKENS, "cpu", 1)
    monkeypatch.setattr(loss_blocks, "_IN_CACHE", 1)  # blocks of 256 columns
    (x, weight, _), target, _ = sample(10, 1000, 16, torch.float32)
    bias = torch.full((1000,), float("-inf"))
    bias[300:500] = 0.0
    target = 300 + target % 200
    with torch.no_grad(), seqfuse.backend("cpu"):
        got = seqfuse.ops.linear_cross_entropy(x, weight, target, bias=bias, reduction="none")
    exact = F.cross_entropy(x.double() @ weight.double().t() + bias, target, reduction="none")
    assert_accurate(got, exact)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_all_logits_have_in_common_does_not_round(isa, offset, smoothing):
    logits, target = torch.randn(20, 77) + offset, torch.randint(0, 77, (20,))
    options = dict(label_smoothing=smoothing, reduction="none")
    with seqfuse.backend("cpu"):
        got = seqfuse.ops.cross_entropy(logits, target, **options)
    assert_accurate(got, F.cross_entropy(logits.double(), target, **options))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_costs_no_product(frozen, monkeypatch):
    tensors, target, _ = sample(21, 77, 12, torch.float32)
    leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
    x, weight, bias = leaves
    made, product = [], loss_blocks.products.product
    monkeypatch.setattr(loss_blocks.products, "product", lambda *a, **k: (made.append(1), product(*a, **k))[1])
    with seqfuse.backend("cpu"):
        seqfuse.ops.linear_cross_entropy(x, weight, target, bias=bias).backward()
    assert len(made) == (3 if frozen == 2 else 2) and leaves[frozen].grad is None
    exact = [t.double().requires_grad_() for t in tensors]
    F.cross_entropy(F.linear(*exact), target).backward()
    for i, (leaf, e) in enumerate(zip(leaves, exact, strict=True)):
        if i != frozen:
            assert_accurate(leaf.grad, e.grad)


@pytest.mark.parametrize(
    "option,error,text",
    [
        (dict(softcap="3"), TypeError, "softcap must be a number, got '3' (str)"),
        (dict(softcap=float("inf")), ValueError, "softcap must be finite, got inf"),
        (dict(z_loss=None), TypeError, "z_loss must be a number, got None"),
        (dict(label_smoothing="a"), TypeError, "label_smoothing must be a number"),
        (dict(ignore_index=1.5), TypeError, "ignore_index must be an integer, got 1.5"),
        (dict(ignore_index=None), TypeError, "ignore_index must be a number, got None"),
    ],
)
def test_options_that_are_no_numbers_get_one_sentence(option, error, text):
    with pytest.raises(error) as caught:
        seqfuse.ops.cross_entropy(torch.randn(3, 5), torch.zeros(3, dtype=torch.int64), **option)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_no_words_and_no_width():
    nobody = torch.zeros(0, dtype=torch.int64)
    with seqfuse.backend("cpu"):
        assert seqfuse.ops.cross_entropy(torch.randn(0, 0), nobody, reduction="sum") == 0
        loss = seqfuse.ops.linear_cross_entropy(torch.randn(3, 0), torch.randn(5, 0), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(loss, torch.tensor(5.0).log())
