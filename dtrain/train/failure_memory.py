"""Whether a failure is transient or recurs: by its kind, and by a rank's record of the last attempt's failure.

RUN/logs/failed-rank-K.json    the step and the error of rank K's last failure; gone at the next launch of the run
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from dtrain.errors import DtrainError, FailedAtTheStart, FailedTwice
from dtrain.launchers import strict_json
from dtrain.launchers.failure import CONSEQUENCE

__all__ = ["Failed", "final", "forget", "may_pass"]


@dataclass(frozen=True)
class Failed:
    """A failure: after how many steps, and with what error."""

    step: int
    error: str

    def again(self, folder: Path, rank: int) -> bool:
        """Whether this rank's last failure was the same; records this one in its place."""
        path = folder / "logs" / f"failed-rank-{rank}.json"
        record = {**asdict(self), "error": re.sub(r"0x[0-9a-f]+", "", self.error)}
        with contextlib.suppress(OSError, ValueError):
            if strict_json.read(path) == record:
                return True
        with contextlib.suppress(OSError):  # the error itself is what matters
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(strict_json.dumps(record), encoding="utf-8")
        return False


def may_pass(error: Exception) -> bool:
    """Whether it may be transient. Our own errors carry that in their exit code; disks and links may recover."""
    of_links = type(error).__module__.startswith("torch.distributed") or CONSEQUENCE.search(str(error)) is not None
    return isinstance(error, DtrainError | OSError) or of_links


def final(error: Exception, *, step: int, rank: int, folder: Path) -> DtrainError | None:
    """The error that keeps launchers from restarting the run; None if a restart may help.

    ``step``: the number of completed steps, 0 also where set-up failed.
    """
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    what = f"{type(error).__name__}: {error}{notes}"
    if not step:
        return FailedAtTheStart(f"{what}; no step was done yet, so it would happen again: not started again")
    if Failed(step, what).again(folder, rank):
        return FailedTwice(f"{what}; step {step} failed like this before it was started again, too: not started again")
    return None


def forget(folder: Path) -> None:
    """Delete the records at a new launch, whose code, data or machine may differ."""
    for path in folder.glob("logs/failed-rank-*.json"):
        path.unlink(missing_ok=True)
