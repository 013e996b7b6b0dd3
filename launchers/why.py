"""Why a job ended, or what it waits for: the earliest real error of all ranks first, equal ones together.

a rank raised          its host, error and line; then who fell with it
ranks hang             who has not entered the collective that the others wait in, and where that rank stands
the scheduler did it   time limit, node failure, memory, cancelled: in its own words
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.launchers.failure import CONSEQUENCE, Failure
from dtrain.launchers.record import Beat, RankRecord

__all__ = ["why"]

STALE_SECONDS = 30.0
HANGING_SECONDS = 5.0  # a collective takes its time
SCHEDULER = re.compile(
    r"slurmstepd[-\w]*: error: .*|srun: error: .*|CANCELLED AT .*|DUE TO .*|[Oo]ut.of.[Mm]emory.*|oom.kill.*"
)


def why(folder: Path, *, state: str, end: Mapping[str, object] | None) -> str:
    """The text for a person; see the module. ``state`` and ``end`` are the job's own."""
    records, beats = RankRecord.all(folder), Beat.all(folder)
    lines: list[str] = []
    if state in ("pending", "running") and not _failures(records):
        lines += _waiting(records, beats, now=time.time()) or [f"the job is {state}; nothing has failed"]
    elif state == "finished":
        lines.append("the job has finished")
    elif state == "cancelled" and not _failures(records):
        lines.append("the job was cancelled; no rank had failed")
    else:
        lines += _failed(records, beats)
    if end is not None and end.get("code"):
        lines.append(f"the job ended with exit code {end['code']}: {end['reason']}")
    elif end is None and state in ("failed", "lost", "cancelled"):
        lines.append(f"Slurm says: {state}" if state != "lost" else "the scheduler does not know the job any longer")
    lines += _said_by_the_scheduler(folder / "logs" / "batch.log")
    attempts = _attempts(folder)
    if attempts > 1:
        lines.append(f"it was the {attempts}. attempt")
    return "\n".join(lines)


def _failures(records: Sequence[RankRecord]) -> list[RankRecord]:
    """Ranks that ended badly, causes before consequences, the earliest first."""
    failed = [
        record
        for record in records
        if record.ended is not None and (record.signal or record.exit_code not in (0, 75, 130, None))
    ]
    return sorted(failed, key=lambda record: (_consequence(record), record.ended or 0, record.rank))


def _consequence(record: RankRecord) -> bool:
    """Whether it most likely failed because another rank had. A hang is one as long as anybody has a better reason."""
    killed = record.signal in ("SIGTERM", "SIGKILL") or record.kind == "Hang"
    return killed or bool(CONSEQUENCE.search(record.message))


def _failed(records: Sequence[RankRecord], beats: Sequence[Beat]) -> list[str]:
    failures = _failures(records)
    if not failures:
        return _waiting(records, beats, now=max((beat.time for beat in beats), default=time.time()))
    root = failures[0]
    hangs = [record for record in failures if record.kind == "Hang"]
    if root.kind == "Hang" or (hangs and _consequence(root)):
        lines = _waiting(records, beats, now=max(beat.time for beat in beats)) if beats else []
        return [*lines, *(f"rank {record.rank} on {record.host}: {record.message}" for record in hangs[:1])]
    code = f"signal {root.signal}" if root.signal else f"exit code {root.exit_code}"
    where = _failure(root).where
    lines = [f"rank {root.rank} on {root.host} failed: {root.message}"]
    lines.append(f"  at {where} ({code})" if where else f"  {code}")
    lines.append(f"  log: {root.log}")
    same = [record for record in failures[1:] if _shape(record.message) == _shape(root.message)]
    fallen = [record for record in failures[1:] if record not in same and _consequence(record)]
    other = [record for record in failures[1:] if record not in same and record not in fallen]
    for group, how in ((same, "failed in the same way"), (fallen, "failed in consequence")):
        if group:
            lines.append(f"  {_ranks(group)} {how}")
    for record in other[:4]:
        lines.append(f"  rank {record.rank} on {record.host} failed later: {record.message}")
    return lines


def _failure(record: RankRecord) -> Failure:
    return Failure(
        record.rank, record.exit_code, record.signal, record.message, record.traceback, record.host, Path(record.log),
        record.ended or 0.0, False,
    )  # fmt: skip


def _shape(message: str) -> str:
    """A message without its numbers: the same error on another rank differs in little else."""
    return re.sub(r"\d+", "#", message)


def _ranks(records: Sequence[RankRecord]) -> str:
    numbers = ", ".join(str(record.rank) for record in records[:8]) + (", ..." if len(records) > 8 else "")
    return f"{len(records)} other rank{'s' * (len(records) > 1)} ({numbers})"


def _waiting(records: Sequence[RankRecord], beats: Sequence[Beat], *, now: float) -> list[str]:
    """Who waits for whom: the ranks that have not entered the collective in which others stand, and their stacks."""
    hosts = {record.rank: record.host for record in records}
    silent = [beat for beat in beats if now - beat.time > STALE_SECONDS]
    lines = [
        f"rank {beat.rank} on {beat.host} has given no sign of life for {now - beat.time:.0f} s" for beat in silent
    ]
    waiting = [beat for beat in beats if beat.what]
    if not waiting or now - min(beat.since for beat in waiting) < HANGING_SECONDS:
        return lines
    first = min(waiting, key=lambda beat: beat.since)
    with_it = [beat for beat in waiting if (beat.group, beat.number) == (first.group, first.number)]
    behind = [beat for beat in beats if beat not in with_it and beat.entered.get(first.group, 0) < first.number]
    # Ranks that never were in this group, and wait in another one, wait for somebody too, or are not even members.
    missing = [beat for beat in behind if not beat.what or first.group in beat.entered] or behind
    seconds = now - first.since
    if not missing:
        unseen = sorted(set(hosts) - {beat.rank for beat in beats})
        who = f"ranks {unseen} have never given a sign of life; " if unseen else ""
        ranks = ", ".join(str(beat.rank) for beat in with_it)
        return [*lines, f"{who}ranks {ranks} stand in {first.what} for {seconds:.0f} s; its last line:", *_place(first)]
    for beat in missing:
        lines.append(
            f"rank {beat.rank} on {beat.host} has not entered {first.what}, in which {len(with_it)} "
            f"other rank{'s' * (len(with_it) != 1)} wait{'s' * (len(with_it) == 1)} for {seconds:.0f} s; its stack:"
        )
        lines += _place(beat)
    return lines


def _place(beat: Beat) -> list[str]:
    ours = [part for part in beat.stack if "<frozen runpy>" not in part and "launchers/probe.py" not in part]
    return [f"    {line}" for part in ours[-6:] for line in part.splitlines()]


def _said_by_the_scheduler(log: Path) -> list[str]:
    """Its last words, where it had any."""
    try:
        text = log.read_text(errors="replace")[-20000:]
    except OSError:
        return []
    last = text.rpartition(" dtrain: attempt ")[2]
    found = [match.group(0) for line in last.splitlines() if (match := SCHEDULER.search(line))]
    return [f"  {line}" for line in dict.fromkeys(found)][-6:]


def _attempts(folder: Path) -> int:
    try:
        return len((folder / "attempts").read_text().splitlines())
    except OSError:
        return 0
