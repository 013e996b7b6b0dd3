"""One byte for a number: a sign, and 127 magnitudes that are a quarter of a power of two apart.

    bit 7: the sign;  bits 0 to 6: q;  value = +-2^((q - 64) / 4), from 1.8e-5 to 5.5e4;  q = 0: zero

The values come from a table of four fp32 constants and exact powers of two, never from exp(), whose last bit depends on
the machine's library. Round to nearest errs by up to 9 %. Values too large are clipped, so a byte also bounds what
one faulty replica can do; NaN and infinity are encoded as 0.
"""

from __future__ import annotations

import bisect
import itertools
import math

VERSION = "quarter-octaves/1"

_QUARTERS = (1.0, 1.1892070770263672, 1.4142135381698608, 1.6817928552627563)
"""2^(0/4), ..., 2^(3/4), each rounded to fp32."""
VALUES = tuple(0.0 if q == 0 else math.ldexp(_QUARTERS[(q - 64) % 4], (q - 64) // 4) for q in range(128))
"""By q. Exact in fp32."""
NOTHING = 0
_BORDERS = tuple((low + high) / 2 for low, high in itertools.pairwise(VALUES))


def encode(number: float, uniform: float | None = None) -> int:
    """The byte, in [0, 256), whose value is nearest to ``number``.

    ``uniform``: in [0, 1), drawn for this number: rounds up or down at random: unbiased within the range of the
    code.

    >>> decode(encode(-3.1))
    -3.3635857105255127
    """
    size = abs(number)
    if not math.isfinite(number):
        return NOTHING
    if uniform is None:
        q = bisect.bisect_left(_BORDERS, size)
    else:
        above = min(bisect.bisect_left(VALUES, size), 127)
        below = max(above - 1, 0)
        gap = VALUES[above] - VALUES[below]
        q = above if gap == 0 or uniform * gap < size - VALUES[below] else below
    return q | (0x80 if number < 0 and q else 0)


def decode(byte: int) -> float:
    """The number that ``byte`` stands for, exact in fp32. Both bytes with q = 0 are zero."""
    size = VALUES[byte & 0x7F]
    return -size if byte & 0x80 and size else size
