"""The reference of attention: what everything else is measured against."""

import pytest
import torch
import torch.nn.functional as F

from seqfuse.reference import AttentionOptions, attention, attention_decode, dropout_keep
from seqfuse.reference import attention as reference_attention
from seqfuse.reference.attention import _multiply


def _qkv(B=2, Hq=4, Hkv=2, Tq=5, Tk=7, D=8, Dv=6, grad=True):
    shapes = (B, Hq, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv)
    return [torch.randn(s, dtype=torch.float64, requires_grad=grad) for s in shapes]


def test_is_pytorchs_attention():
    q, k, v = _qkv()
    out, _ = attention(q, k, v, AttentionOptions(scale=8**-0.5, window_right=0, top_left=True))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def test_causal_is_bottom_right():
    q, k, v = _qkv()
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2)
    out, _ = attention(q, k, v, AttentionOptions(scale=8**-0.5, window_right=0))
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, scale=8**-0.5), rtol=1e-10, atol=1e-12
    )


def test_philox_gives_the_published_words():
    """Known answers of Random123's kat_vectors for philox4x32-10."""

    def keep_of(seed, j, i, h, b, word):
        """dropout_keep says of which p the word is the first to be dropped: bisect on its 32 bits."""
        low, high = 0, 2**32
        while high - low > 1:
            middle = (low + high) // 2
            index = [torch.tensor([x]) for x in (j, i, h, b)]
            kept = dropout_keep(torch.tensor([seed]), index[3], index[2], index[1], index[0], middle / 2**32)
            low, high = (middle, high) if kept.item() else (low, middle)
        assert low == word

    for j, word in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        keep_of(0, j, 0, 0, 0, word)
    most = 0xFFFFFFFF
    for j, word in enumerate((0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)):
        keep_of(-1, 4 * most + j, most, most, most, word)


def test_multiply_is_exact():
    x = torch.tensor([0, 1, 0xFFFF, 0x10000, 0x12345678, 0xFFFFFFFF])
    for m in (0xD2511F53, 0xCD9E8D57):
        high, low = _multiply(m, x)
        assert [(h << 32) + lo for h, lo in zip(high.tolist(), low.tolist(), strict=True)] == [
            m * y for y in x.tolist()
        ]


@pytest.mark.parametrize("top_left", (False, True))
def test_packed_sequences_equal_a_loop(top_left):
    starts_q, starts_k = torch.tensor([0, 3, 3, 10]), torch.tensor([0, 4, 9, 15])
    q, k, v = _qkv(B=1, Tq=12, Tk=15, grad=False)
    slopes, seed = torch.rand(3, 4), torch.tensor([123456789123])
    common = {"window_left": 2, "window_right": 0, "scale": 0.3, "softcap": 3.0, "top_left": top_left}
    out, lse = attention(q, k, v, AttentionOptions(cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, alibi_slopes=slopes,
                                                   seed=seed, dropout_p=0.3, **common))  # fmt: skip
    for s in range(3):
        one, two = slice(*starts_q[s : s + 2].tolist()), slice(*starts_k[s : s + 2].tolist())
        options = AttentionOptions(alibi_slopes=slopes[s], **common)
        plain, lse_s = attention(q[:, :, one], k[:, :, two], v[:, :, two], options)
        torch.testing.assert_close(lse_s, lse[:, :, one])
        i, j = torch.arange(plain.shape[2])[:, None], torch.arange(two.stop - two.start)
        kept = dropout_keep(seed, torch.tensor([[[[s]]]]), torch.arange(4)[:, None, None], i, j, 0.3)
        # a dropout mask is a key mask whose softmax still sums over everything
        hidden, lse_h = attention(q[:, :, one], k[:, :, two], v[:, :, two], options._replace(mask=kept))
        weight = torch.where(lse_h == -torch.inf, 0.0, (lse_h - lse_s).exp())[..., None] / 0.7
        torch.testing.assert_close(out[:, :, one], hidden * weight)
    assert out[:, :, 10:].abs().max() == 0
    assert (lse[:, :, 10:] == -torch.inf).all()


def test_gradients_and_their_gradients():
    q, k, v = _qkv(B=2, Hq=2, Hkv=1, Tq=3, Tk=4, D=3, Dv=2)
    bias = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    options = AttentionOptions(scale=0.3, softcap=2.0, window_right=0, key_lengths=torch.tensor([0, 3]),
                               alibi_slopes=torch.rand(2), dropout_p=0.2, seed=torch.tensor([5]))  # fmt: skip

    def f(q, k, v, bias):
        out, lse = attention(q, k, v, options._replace(bias=bias))
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(f, (q, k, v, bias))
    assert torch.autograd.gradgradcheck(f, (q, k, v, bias))


@pytest.mark.parametrize("nothing", ("keys", "queries", "batch"))
def test_empty(nothing):
    sizes = {"keys": {"Tk": 0}, "queries": {"Tq": 0}, "batch": {"B": 0}}[nothing]
    q, k, v = _qkv(**sizes)
    out, lse = reference_attention(q, k, v, AttentionOptions())
    assert out.shape == (*q.shape[:3], 6)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    out.sum().backward()
    assert all(t.grad is not None and (t.grad == 0).all() for t in (q, k, v))


def test_decode_reads_pages_in_the_order_of_the_table():
    q, k, v = _qkv(B=2, Tq=2, Tk=8, grad=False)
    lengths = torch.tensor([7, 3])
    dense = attention_decode(q, k, v, lengths, None, None, 0.3, -1, 0, 0.0)
    pages = [t.unflatten(2, (4, 2)).transpose(1, 2).flatten(0, 1) for t in (k, v)]  # (B * 4, Hkv, 2, D)
    order = torch.randperm(8)
    table = order.argsort().view(2, 4)
    paged = attention_decode(q, *(p[order] for p in pages), lengths, table, None, 0.3, -1, 0, 0.0)
    for a, b in zip(dense, paged, strict=True):
        torch.testing.assert_close(a, b)
