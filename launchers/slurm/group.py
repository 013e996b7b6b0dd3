"""A component of a heterogeneous job."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

__all__ = ["Group"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """One component of a heterogeneous job: ``workers`` ranks over ``nodes`` nodes of one sort."""

    nodes: int
    workers: int
    partition: str = ""
    constraint: str = ""
    gpus_per_node: int = 0

    @classmethod
    def parse(cls, text: str) -> Group:
        """From ``nodes=2 workers=4 constraint=a100``. Raises ``ValueError``.

        >>> Group.parse("nodes=2 workers=4 partition=gpu").workers
        4
        """
        known = {field.name: field.type for field in dataclasses.fields(cls)}
        values: dict[str, int | str] = {}
        for word in text.split():
            key, equals, value = word.partition("=")
            if not equals or key not in known or (known[key] == "int" and not re.fullmatch("[0-9]{1,9}", value)):
                raise ValueError(f"{text!r}: {word} is none of {', '.join(f'{key}=...' for key in known)}")
            values[key] = int(value) if known[key] == "int" else value
        if not (values.get("nodes") and values.get("workers")):
            raise ValueError(f"{text!r}: a group says nodes=N and workers=N, both at least 1")
        return cls(**values)  # type: ignore[arg-type]
