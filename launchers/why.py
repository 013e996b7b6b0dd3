"""Why a job ended, or what it waits for: the earliest real error of all ranks first, equal ones together.

a rank raised          its host, error and line; then the ranks that failed with it
ranks hang             which rank has not entered the collective that the others wait in, and its stack
no rank has started    what srun or mpirun printed
the scheduler did it   time limit, node failure, memory, cancelled: in its own words

The attempts before the last one are summarized in a line each.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.launchers.exit_codes import ENDED_WELL, RUN_AGAIN
from dtrain.launchers.failure import CONSEQUENCE, Failure, advice
from dtrain.launchers.records import KILLED_SECONDS, Beat, RankRecord, damaged
from dtrain.launchers.strict_json import json_in, tail

__all__ = ["why"]

STALE_SECONDS = 30.0
HANGING_SECONDS = 5.0  # a collective takes its time
TAIL_BYTES = 20_000  # of the script's log
SCHEDULER = re.compile(
    r"slurmstepd[-\w]*: error: .*|srun: error: .*|CANCELLED AT .*|DUE TO .*|[Oo]ut.of.[Mm]emory.*|oom.kill.*"
)
ERROR = re.compile(
    r"error|fatal|unrecognized|cannot|can't|could not|unable|failed|not found|no such|denied|refused|exit status",
    re.IGNORECASE,
)


def why(folder: Path, *, state: str, end: Mapping[str, object] | None, waits_for: str = "") -> str:
    """The text for a person; see the module. ``state``, ``end`` and ``waits_for`` are the job's own."""
    records, beats = RankRecord.all(folder), Beat.all(folder)
    earlier = RankRecord.earlier(folder)
    last, log = max(_attempts(folder), len(earlier) + bool(records)), folder / "logs" / "batch.log"
    if state == "pending":
        waits = f" ({waits_for})" if waits_for else ""
        if not last:
            return f"the job is pending; nothing has failed{waits and '; it waits for ' + waits_for}"
        attempts = {**earlier, last: records} if records else earlier
        return "\n".join([*_ends(attempts, last=last), f"the job waits in the queue{waits}"])
    lines: list[str] = []
    failures = _failures(records)
    if state == "running" and not failures:
        lines += _waiting(records, beats, now=time.time(), live=True) or ["the job is running; nothing has failed"]
    elif state == "finished":
        lines.append("the job has finished")
    elif state == "cancelled" and not failures:
        fell = any(_failures(ranks) for ranks in earlier.values())
        lines.append(f"the job was cancelled{f' in attempt {last}' if fell else '; no rank had failed'}")
    else:
        lines += _failed(records, beats)
    if end is not None and end.get("code"):
        lines.append(f"the job ended with exit code {end['code']}: {end['reason']}")
    elif end is None and state in ("failed", "lost", "cancelled"):
        lines.append(f"Slurm says: {state}" if state != "lost" else "the scheduler does not know the job any longer")
    if not records and state in ("failed", "lost", "cancelled"):
        lines += _starter_output(log)
    lines += [line for line in _scheduler_output(log) if line not in lines]
    lines += _ends(earlier, last=last)
    if broken := _damaged(folder, ended=end is not None):
        lines.append(broken)
    if last > 1:
        lines.append(f"it was the {last}. attempt" if state != "running" else f"this is attempt {last}")
    return "\n".join(lines)


def _damaged(folder: Path, *, ended: bool) -> str:
    """Which records were left out, as they cannot be read; empty if none was."""
    names = damaged(folder)
    names += (
        ["end.json"] if not ended and (folder / "end.json").exists() and json_in(folder / "end.json") is None else []
    )
    if not names:
        return ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"damaged, and left out here: {', '.join(names[:4])}{more}"


def _ends(attempts: Mapping[int, Sequence[RankRecord]], *, last: int) -> list[str]:
    """A line for each attempt: how it ended, by its first cause, and what came then."""
    went_on = {number: f"; the run went on as attempt {number + 1}" for number in attempts if number < last}
    return [f"attempt {number}: {_how(records)}{went_on.get(number, '')}" for number, records in attempts.items()]


def _how(records: Sequence[RankRecord]) -> str:
    """How an attempt ended."""
    failures = _failures(records)
    silent = [record for record in records if record.ended is None]
    if failures and not (silent and failures[0].signal == "SIGTERM"):
        root = failures[0]
        if root.signal:
            return f"rank {root.rank} on {root.host} was killed by {root.signal}"
        return f"rank {root.rank} on {root.host} failed: {root.message}"
    if silent:
        hosts = ", ".join(sorted({record.host for record in silent}))
        question = f"did {hosts} fail" if len(silent) < len(records) else f"did srun, mpirun or {hosts} fail"
        numbers = ", ".join(str(record.rank) for record in silent[:8]) + (", ..." if len(silent) > 8 else "")
        return f"rank{'s' * (len(silent) > 1)} {numbers} wrote no exit record ({question}?)"
    if any(record.exit_code == RUN_AGAIN for record in records):
        return "it stopped as asked, to be run again"
    return "all ranks ended well" if records else "no rank left a record"


def _failures(records: Sequence[RankRecord]) -> list[RankRecord]:
    """Ranks that ended badly, causes before consequences, the earliest first."""
    failed = [record for record in records if record.ended is not None and not _ended_well(record)]
    first = min((record.ended or 0.0 for record in failed), default=0.0)

    def order(record: RankRecord) -> tuple[bool, bool, float, int]:
        killed = record.signal == "SIGKILL" and (record.ended or 0.0) <= first + KILLED_SECONDS
        return _consequence(record), not killed, record.ended or 0.0, record.rank

    return sorted(failed, key=order)


def _ended_well(record: RankRecord) -> bool:
    return not record.signal and (record.exit_code is None or record.exit_code in ENDED_WELL)


def _consequence(record: RankRecord) -> bool:
    """Whether it most likely failed because another rank had. So is a hang if another rank has a better reason."""
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
    lines += [f"  -> {way_out}"] if (way_out := advice(root.message)) else []
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


def _waiting(records: Sequence[RankRecord], beats: Sequence[Beat], *, now: float, live: bool = False) -> list[str]:
    """Who waits for whom: the ranks that have not entered the collective in which others wait, and their stacks.

    ``live``: the job still runs, so that a rank that has ended waits for nobody.
    """
    over = {record.rank: record for record in records if record.ended is not None and (live or _ended_well(record))}
    running = [beat for beat in beats if beat.rank not in over]
    lines = [
        f"rank {beat.rank} on {beat.host} has given no sign of life for {now - beat.time:.0f} s"
        for beat in running
        if now - beat.time > STALE_SECONDS
    ]
    waiting = [beat for beat in running if beat.what]
    if not waiting or now - min(beat.since for beat in waiting) < HANGING_SECONDS:
        return lines
    first = min(waiting, key=lambda beat: beat.since)
    with_it = [beat for beat in waiting if (beat.group, beat.number) == (first.group, first.number)]
    behind = [beat for beat in beats if beat not in with_it and beat.entered.get(first.group, 0) < first.number]
    # Ranks that never entered this group, and wait in another one, wait for a rank too, or are no members.
    missing = [beat for beat in behind if not beat.what or first.group in beat.entered] or behind
    seconds = now - first.since
    if not missing:
        return [*lines, *_all_inside(records, beats, with_it, seconds)]
    for beat in missing:
        others = f"{len(with_it)} other rank{'s' * (len(with_it) != 1)} wait{'s' * (len(with_it) == 1)}"
        end = over.get(beat.rank)
        if end is not None:
            how = end.signal or f"exit code {end.exit_code}"
            lines.append(
                f"rank {beat.rank} on {beat.host} has ended ({how}) without entering {first.what}, in which {others}"
            )
            continue
        lines.append(
            f"rank {beat.rank} on {beat.host} has not entered {first.what}, in which {others} for {seconds:.0f} s; "
            "its stack:"
        )
        lines += _place(beat)
    return lines


def _all_inside(
    records: Sequence[RankRecord], beats: Sequence[Beat], inside: Sequence[Beat], seconds: float
) -> list[str]:
    """No rank is missing in the collective: then its messages do not arrive."""
    first = min(inside, key=lambda beat: beat.since)
    unseen = [record for record in records if record.rank not in {beat.rank for beat in beats} and record.ended is None]
    lines = [f"rank {record.rank} on {record.host} has never given a sign of life" for record in unseen]
    ranks = ", ".join(str(beat.rank) for beat in inside[:8]) + (", ..." if len(inside) > 8 else "")
    if unseen or len(inside) == 1:
        stand = f"rank{'s' * (len(inside) > 1)} {ranks} stand{'s' * (len(inside) == 1)}"
        return [*lines, f"{stand} in {first.what} for {seconds:.0f} s; its last line:", *_place(first)]
    hosts = sorted({beat.host for beat in inside})
    everybody = "all ranks" if len(inside) == len(records) else f"ranks {ranks}, all that are in it,"
    lines.append(f"{everybody} have entered {first.what} and stand in it for {seconds:.0f} s: nobody is missing there")
    if len(hosts) > 1:
        lines.append(f"  so the network between {', '.join(hosts)} is the suspect: a link that is down, or drops data")
        lines.append(
            f"  next: dtrain doctor launcher=slurm launcher.nodes={len(hosts)}     measures every pair of nodes"
        )
    return [*lines, "  their last lines:", *_place(first)]


def _place(beat: Beat) -> list[str]:
    ours = [frame for frame in beat.stack if "<frozen runpy>" not in frame and "launchers/probe.py" not in frame]
    return [f"    {line}" for frame in ours[-6:] for line in frame.splitlines()]


def _starter_output(log: Path) -> list[str]:
    """What srun or mpirun printed where no rank started: its errors, else its last lines, once each."""
    output = [line.strip() for line in _last_attempt(log) if line.strip() and " dtrain: " not in line]
    output = [line for line in output if line.strip("-=*# ")]  # frames around a message
    errors = [line for line in dict.fromkeys(output) if ERROR.search(line)]
    lines = errors or list(dict.fromkeys(output))[-6:]
    return (
        ["no rank has started; the last words of what starts them:", *(f"  {line}" for line in lines[:12])]
        if lines
        else []
    )


def _scheduler_output(log: Path) -> list[str]:
    """The scheduler's last lines, if any."""
    words = [match.group(0) for line in _last_attempt(log) if (match := SCHEDULER.search(line))]
    return [f"  {line}" for line in dict.fromkeys(words)][-6:]


def _last_attempt(log: Path) -> list[str]:
    """The lines of the script's log since its last attempt began."""
    text = tail(log, TAIL_BYTES)
    _, begun, last = text.rpartition(" dtrain: attempt ")
    return last.splitlines()[1 if begun else 0 :]


def _attempts(folder: Path) -> int:
    return len(tail(folder / "attempts", 1 << 20).splitlines())
