"""What a rank remembers of a failure, so that the attempt after it can tell an accident from what must come again.

RUN/logs/failed-rank-K.json    the step and the error of rank K's last failure; gone at the next launch of the run
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from dtrain.launchers import strict_json

__all__ = ["Failed", "forget"]


@dataclass(frozen=True)
class Failed:
    """A failure: after how many steps, and with what error."""

    step: int
    error: str

    def again(self, folder: Path, rank: int) -> bool:
        """Whether this rank's last failure was the same; from now on this one is its last."""
        path = folder / "logs" / f"failed-rank-{rank}.json"
        mine = {**asdict(self), "error": re.sub(r"0x[0-9a-f]+", "", self.error)}
        with contextlib.suppress(OSError, ValueError):
            if strict_json.read(path) == mine:
                return True
        with contextlib.suppress(OSError):  # the error itself is what matters
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(strict_json.dumps(mine), encoding="utf-8")
        return False


def forget(folder: Path) -> None:
    """A new launch begins: its code, data or machine may be others."""
    for path in folder.glob("logs/failed-rank-*.json"):
        path.unlink(missing_ok=True)
