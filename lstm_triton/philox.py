"""Philox 4x32-10, the counter-based random numbers of zoneout, in integer tensor arithmetic.

The same words as Triton's tl.philox. Any word is computed from its counter alone, so that a kernel, a host and a
backward pass each draw what they need, in any order.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Multipliers of the two products, and what the two halves of the key grow by each round.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

WORD = 0xFFFFFFFF

#: One of a tensor that broadcasts, and a number.
Counter = Tensor | int


def kept(seed: Tensor, t: Counter, rows: int, columns: int, probability: float, word: int) -> Tensor:
    """Which elements of a state [rows, columns] zoneout keeps at step t, each with the probability: bool.

    seed is one int64, [] or [1]; t is the step's index in memory, a number or a tensor that broadcasts, say [T, 1, 1].
    word is 0 for h and 1 for c, whose draws are independent. seed is not looked at, so that nothing waits for it.
    """
    column = torch.arange(columns, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    drawn = philox(seed.reshape(()), (column, row, t, 0))[word]
    return (drawn >> 8) < threshold(probability)


def threshold(probability: float) -> int:
    """Kept is what draws 24 bits below this."""
    return round(probability * 2**24)


def philox(seed: Tensor, counter: tuple[Counter, Counter, Counter, Counter]) -> tuple[Tensor, ...]:
    """Four random words in [0, 2^32), int64, for counters of as many bits; the key is the low and high half of seed."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _product(a: int, b: Counter) -> tuple[Counter, Counter]:
    """High and low word of the product of two words, by 16 bits of b at a time: int64 would not hold it whole."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | (low & 0xFFFF)
