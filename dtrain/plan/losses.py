"""What each sync costs in loss, as it was measured: a table that ships with the package.

`benchmarks/plan_losses.py` writes it from the evidence page of all syncs at equal tokens; nothing in it is estimated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import ConfigError
from dtrain.launchers import strict_json

__all__ = ["EXACT", "TABLE", "Losses"]

TABLE = Path(__file__).with_name("losses.json")
EXACT = "dense"
"""The baseline: data parallelism, whose cost in loss is 0 by definition."""


@dataclass(frozen=True)
class Losses:
    """``rows``: validation loss relative to dense minus 1, by name of the sync. ``source``: the page, ``revision``: of
    the code that made it; both empty where the table has no rows.
    """

    source: str
    revision: str
    rows: Mapping[str, float]

    @classmethod
    def read(cls, path: Path = TABLE) -> Losses:
        """Raises ``ConfigError`` for a table that is damaged."""
        try:
            entries = strict_json.read(path)
            rows = strict_json.object_of(entries, "rows")
            return cls(str(entries["source"]), str(entries["revision"]), {k: float(str(v)) for k, v in rows.items()})
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path} is damaged ({error}); install dtrain again") from error

    def of(self, sync: str) -> float | None:
        """None: not measured."""
        return 0.0 if sync == EXACT else self.rows.get(sync)
