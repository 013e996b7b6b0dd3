"""What is under way where torch's flight recorder does not look: gloo's sends and receives.

Whoever watches a rank from inside (`dtrain.launchers.probe`) reads `NOTED`: entries of the recorder's own form.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

NOTED: collections.deque[dict[str, object]] = collections.deque(maxlen=256)


def note(group: str, name: str, number: int, size: int, dtype: str) -> Callable[[], None]:
    """Note the collective ``number`` of ``group``, of ``size`` elements; call what is returned once it is over.

    >>> over = note("dtrain 1 of 0 1", "AllToAll", 4, 10, "uint8")
    >>> over()
    >>> NOTED.pop()["retired"]
    True
    """
    entry: dict[str, object] = {
        "record_id": f"{group} {name} {number}", "profiling_name": name, "collective_seq_id": number,
        "process_group": [group], "input_sizes": [[size]], "input_dtypes": [dtype], "time_created_ns": time.time_ns(),
        "retired": False,
    }  # fmt: skip
    NOTED.append(entry)
    return lambda: entry.update(retired=True)
