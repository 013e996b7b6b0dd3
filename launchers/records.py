"""The records of every rank in FOLDER/ranks, which show why a job ended, or what it is waiting for.

rank-K.json      how rank K ended, or that it runs; written by `dtrain.launchers.rank`
rank-K.error     the exception that ended it           rank-K.beat  its heartbeat; both by `dtrain.launchers.probe`
attempt-N.jsonl  the rank-K.json of attempt N, a line each, once another attempt has begun; the first has number 1
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from dtrain.launchers import exit_codes
from dtrain.launchers.exit_codes import ENDED_WELL
from dtrain.launchers.failure import read_log_end, signal_name
from dtrain.launchers.strict_json import Damaged, json_in, lines_in, number_in, shaped

__all__ = ["ATTEMPT", "Beat", "RankRecord", "damaged", "first_cause", "keep_attempt", "rank_files", "write_end"]

KILLED_SECONDS = 2.0  # others notice that a rank was killed before that is written down
ATTEMPT = "DTRAIN_ATTEMPT"
"""Environment of the ranks: how often all of them were started before."""


def rank_files(folder: Path) -> Path:
    """The folder of the ranks' records within a job's folder."""
    return folder / "ranks"


def keep_attempt(folder: Path) -> None:
    """Move the records of all ranks to the file of their attempt, before another one begins."""
    ranks = rank_files(folder)
    for path in sorted(ranks.glob("rank-*.json")):
        _keep(path)
    for path in (*ranks.glob("rank-*.beat"), *ranks.glob("rank-*.error")):
        path.unlink(missing_ok=True)


def first_cause(folder: Path) -> str:
    """The rank that failed first in the last attempt, not in consequence of another, in words; empty if none did.

    A killed rank is the cause of errors up to ``KILLED_SECONDS`` before its record: others notice it earlier.
    """
    over = sorted((record for record in RankRecord.all(folder) if record.ended is not None), key=_time)
    killed = next((r for r in over if (r.signal or "").startswith("SIG") and r.signal != "SIGTERM"), None)
    failed = next((r for r in over if r.exit_code is not None and r.exit_code not in ENDED_WELL), None)
    first = killed if failed is None or (killed and _time(killed) < _time(failed) + KILLED_SECONDS) else failed
    if first is None:
        return ""
    how = f"exit code {first.exit_code}"
    if first.signal:
        how = f"{first.signal}, exit code {exit_codes.of_process(-signal.Signals[first.signal])}"
    return f"rank {first.rank} on {first.host} first: {how}"


def _time(record: RankRecord) -> float:
    return record.ended or 0.0


def write_end(folder: Path, code: int, reason: str, *, job: str, cause: str | None = None) -> None:
    """Record how a job has ended, atomically. ``job``: its number, ``cause``: what went wrong, if known."""
    content: dict[str, object] = {"code": code, "reason": reason, "job": job, "time": int(time.time())}
    new = folder / "end.json.new"
    new.write_text(json.dumps(content if cause is None else {**content, "cause": cause}) + "\n")
    os.replace(new, folder / "end.json")


def damaged(folder: Path) -> list[str]:
    """Which of a job's records are torn or damaged."""
    ranks = rank_files(folder)
    names = [path.name for path in ranks.glob("rank-*.json") if RankRecord.read(path) is None]
    names += [path.name for path in ranks.glob("rank-*.beat") if Beat.read(path) is None]
    return sorted(f"ranks/{name}" for name in names)


def _keep(path: Path) -> None:
    record = RankRecord.read(path)
    if record is not None:
        with (path.parent / f"attempt-{record.attempt + 1}.jsonl").open("a") as kept:
            kept.write(json.dumps(dataclasses.asdict(record)) + "\n")
    path.unlink(missing_ok=True)


@dataclass(frozen=True)
class RankRecord:
    """One rank's last attempt. Times in seconds since 1970; ``exit_code`` and ``signal`` are None while it runs.

    ``message`` and ``traceback``: the exception that ended it, else the last lines of its log. ``kind``: the class of
    the exception, ``Hang`` for a collective that did not end, empty if unknown.
    """

    rank: int
    host: str
    attempt: int
    pid: int
    started: float
    ended: float | None = None
    exit_code: int | None = None
    signal: str | None = None
    kind: str = ""
    message: str = ""
    traceback: str = ""
    log: str = ""

    @classmethod
    def begin(cls, folder: Path, rank: int, *, host: str, attempt: int) -> RankRecord:
        """Record that the rank runs; its record of an earlier attempt is kept with that attempt."""
        record = cls(rank=rank, host=host, attempt=attempt, pid=os.getpid(), started=time.time())
        last = cls.read(folder / f"rank-{rank}.json")
        if last is not None and last.attempt != attempt:
            _keep(folder / f"rank-{rank}.json")
        (folder / f"rank-{rank}.error").unlink(missing_ok=True)
        (folder / f"rank-{rank}.beat").unlink(missing_ok=True)
        record._write(folder)
        return record

    def end(self, folder: Path, code: int, *, log: Path, log_start: int) -> None:
        """Record how it ended: ``code`` as subprocess reports it, -N for signal N."""
        kind, message, trace, ended = "", "", "", time.time()
        try:
            error = shaped(_Error, json_in(folder / f"rank-{self.rank}.error"))
        except Damaged:
            error = None
        if error is not None:
            kind, message, trace = error.kind, error.message, error.traceback
            ended = error.time  # when it failed, not when it had been cleared away
        elif code not in ENDED_WELL:
            message, trace = read_log_end(log, log_start)
            if code < 0:
                name = signal_name(-code)
                message = f"killed by {name}" + (" (out of memory? see dmesg)" if name == "SIGKILL" else "")
        dataclasses.replace(
            self, ended=ended, exit_code=code if code >= 0 else None, signal=signal_name(-code) if code < 0 else None,
            kind=kind, message=message, traceback=trace, log=str(log),
        )._write(folder)  # fmt: skip

    @classmethod
    def all(cls, folder: Path) -> list[RankRecord]:
        """Every rank's record of the last attempt, in rank order."""
        records = [cls.read(path) for path in rank_files(folder).glob("rank-*.json")]
        return sorted((record for record in records if record is not None), key=lambda record: record.rank)

    @classmethod
    def read(cls, path: Path) -> RankRecord | None:
        """The record in a file; None if it is torn or damaged."""
        if number_in(path.name, "rank-{}.json") is None:
            return None
        return cls._of(json_in(path))

    @classmethod
    def earlier(cls, folder: Path) -> dict[int, list[RankRecord]]:
        """Number of each attempt before the last one, from 1 -> the records of its ranks, in rank order."""
        attempts = {}
        for path in rank_files(folder).glob("attempt-*.jsonl"):
            number = number_in(path.name, "attempt-{}.jsonl")
            if number is not None:
                records = [record for line in lines_in(path) if (record := cls._of(line)) is not None]
                attempts[number] = sorted(records, key=lambda record: record.rank)
        return dict(sorted(attempts.items()))

    @classmethod
    def _of(cls, content: object) -> RankRecord | None:
        try:
            return shaped(cls, content)
        except Damaged:
            return None

    @staticmethod
    def verdict(folder: Path, workers: int) -> int:
        """The exit code of a job by its ranks' records: a launcher's own mixes in the ranks that it ended."""
        codes = [record.exit_code for record in RankRecord.all(folder) if record.ended is not None]
        return exit_codes.verdict(codes, workers)

    def _write(self, folder: Path) -> None:
        path = folder / f"rank-{self.rank}.json"
        new = path.with_suffix(".json.new")
        new.write_text(json.dumps(dataclasses.asdict(self)) + "\n")
        os.replace(new, path)


@dataclass(frozen=True)
class Beat:
    """A heartbeat: at ``time`` the main thread stood at ``stack`` and had done so since ``since``.

    ``what``: the oldest collective that has not ended; ``number`` counts them in ``group``. ``entered``: group -> the
    number of the last collective that the rank entered there.
    """

    rank: int
    time: float
    since: float
    host: str
    stack: tuple[str, ...]
    what: str
    group: str
    number: int
    entered: dict[str, int]

    @classmethod
    def all(cls, folder: Path) -> list[Beat]:
        """Every rank's last heartbeat, in rank order."""
        beats = [cls.read(path) for path in rank_files(folder).glob("rank-*.beat")]
        return sorted((beat for beat in beats if beat is not None), key=lambda beat: beat.rank)

    @classmethod
    def read(cls, path: Path) -> Beat | None:
        """The heartbeat in a file; None if it is torn or damaged."""
        rank, content = number_in(path.name, "rank-{}.beat"), json_in(path)
        if rank is None or not isinstance(content, dict):
            return None
        try:
            waiting = content.get("waiting")
            awaited = shaped(_Waiting, waiting) if waiting is not None else _Waiting()
            return shaped(cls, content, rank=rank, what=awaited.what, group=awaited.group, number=awaited.number)
        except Damaged:
            return None


@dataclass(frozen=True)
class _Waiting:
    """The part of a heartbeat about the collective that is waited for."""

    what: str = ""
    group: str = ""
    number: int = 0


@dataclass(frozen=True)
class _Error:
    """rank-K.error."""

    kind: str
    message: str
    traceback: str
    time: float
