"""Dropout's mask, a function of a seed and of where an element stands: Philox4x32-10 (Salmon et al. 2011).

The same words as on every other backend (reference/attention.py, dropout_keep); attention and the norms draw from it.
"""

from __future__ import annotations

import triton
import triton.language as tl


def drop_below(p: float) -> int | None:
    """For an int32 argument: a word of the generator up to this one, both unsigned, drops its element. None: none."""
    threshold = int(p * 2**32)
    if threshold == 0:
        return None
    return threshold - 1 if threshold <= 2**31 else threshold - 1 - 2**32


@triton.jit
def kept(seed_ptr, below, j4, i, h, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements stay, as int8 [ROWS, COLUMNS]. j4 [1, COLUMNS / 4]: j // 4 of four neighbours; i: [ROWS, 1].

    One counter gives the words of four neighbours. Computed once and put side by side, they cost a quarter of Philox's
    80 integer instructions an element and one trip of a byte an element through shared memory.
    """
    zero = tl.zeros([1, 1], tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), j4 + zero, i + zero, h + zero, b + zero)
    below = tl.full([], below, tl.int32).to(tl.uint32, bitcast=True)
    k0, k1, k2, k3 = (
        (w0 > below).to(tl.int8),
        (w1 > below).to(tl.int8),
        (w2 > below).to(tl.int8),
        (w3 > below).to(tl.int8),
    )
    return tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), [ROWS, COLUMNS])
