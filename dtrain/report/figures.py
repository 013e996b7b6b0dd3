"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["in_bytes", "in_time"]


def in_bytes(count: float) -> str:
    """Bytes with a decimal unit and three digits.

    >>> in_bytes(512), in_bytes(41_234_567), in_bytes(4_870_000_000), in_bytes(999_999)
    ('512 B', '41.2 MB', '4.87 GB', '1.00 MB')
    """
    if count < 999.5:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        count /= 1000
        if count < 999.5 or unit == "PB":
            break
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:,.{digits}f} {unit}"


def in_time(seconds: float) -> str:
    """A duration in its two largest units.

    >>> in_time(4.27), in_time(192), in_time(3785), in_time(187_200)
    ('4.3 s', '3 m 12 s', '1 h 03 m', '2 d 04 h')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} m"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"
