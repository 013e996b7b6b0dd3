"""Which example stands at which sample position: a seeded shuffle of every epoch, without state and without tables.

A Feistel network (Luby and Rackoff 1988) is a bijection of the 2k-bit integers for any round function; walking the
cycle until the value falls below ``length`` makes it one of [0, length) (Black and Rogaway 2002, section 5). The domain
is the smallest power of four that holds ``length``, at most 4 * length, so that at most 4 walks are expected.
Integers are masked to 64 bits: the same result on every platform and in every Python.
"""

from __future__ import annotations

MASK = (1 << 64) - 1
ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """Scatter 64 bits (the finalizer of SplitMix64, Steele, Lea and Flood 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def example_at(seed: int, position: int, length: int) -> int:
    """The example, in [0, length), at global sample ``position`` (from 0, not wrapped at the end of an epoch).

    Within an epoch, ``position // length``, every example is visited once. Raises ``ValueError`` for a negative
    position or an empty data set.

    >>> sorted(example_at(7, position, 10) for position in range(10, 20)) == list(range(10))
    True
    """
    if length < 1:
        raise ValueError(f"length is {length}: an empty data set has no examples to visit")
    if position < 0:
        raise ValueError(f"position is {position}; sample positions count from 0")
    epoch, place = divmod(position, length)
    key = _mix((_mix((seed + GOLDEN) & MASK) + (epoch + 1) * GOLDEN) & MASK)
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for number in range(1, ROUNDS + 1):
            left, right = right, left ^ (_mix((key + number * GOLDEN + right) & MASK) & mask)
        place = left << half | right
        if place < length:
            return place
