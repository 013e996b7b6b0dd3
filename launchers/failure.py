"""How ranks fail, which of them failed first, and a short report of it."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtrain.launchers.strict_json import json_in

__all__ = [
    "CONSEQUENCE", "Ending", "Failure", "advice", "read_error", "read_log_end", "read_probe", "root_cause",
    "signal_name",
]  # fmt: skip

TAIL_BYTES = 65536
LOOPBACK = re.compile(r"remote=\[127\.[0-9.]+\]|connect\w*[^\n]{0,80}\b127\.0\.1\.1\b", re.IGNORECASE)
# What a healthy rank reports when another one is gone. It does not show the cause.
CONSEQUENCE = re.compile(
    r"connection (was likely )?closed|connection reset|connection refused|connection aborted|broken pipe|socket closed"
    r"|socketTimeout|timed out (waiting|after)|application timeout caused pair closure|wait timeout|recvValue failed"
    r"|failed to recv|sendBytes failed|DistNetworkError|DistStoreError|ncclRemoteError|remote process (exited|has)"
    r"|watchdog (caught )?collective|connectFullMesh",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """How one rank failed: by ``exit_code`` or by ``signal``. ``time`` in seconds since 1970.

    ``consequence``: most likely it failed because another rank had failed.
    """

    rank: int
    exit_code: int | None
    signal: str | None
    message: str
    traceback: str
    host: str
    log: Path
    time: float
    consequence: bool

    @property
    def where(self) -> str:
        """The innermost frame outside of libraries, ``file.py:12 in function``; empty without a traceback."""
        frames: list[tuple[str, str, str]] = re.findall(r'File "([^"\n]+)", line (\d+), in (.+)', self.traceback)
        ours = [frame for frame in frames if "/lib/python" not in frame[0]] or frames
        return "{}:{} in {}".format(*ours[-1]) if ours else ""


@dataclass(frozen=True)
class Ending:
    """How a launch ended.

    kind      "finished": all ranks left with 0. "signalled": the launching process got ``signal`` and passed it on,
              whatever the ranks made of it. "failed": a rank failed and the restarts are used up.
    restarts  how often all ranks were started again.
    failures  of the last attempt, the root cause first. Ranks may also fail while they are stopped by a signal.
    earlier   the root cause of each attempt that was followed by a restart.
    """

    kind: Literal["finished", "signalled", "failed"]
    signal: int | None
    restarts: int
    failures: tuple[Failure, ...]
    earlier: tuple[Failure, ...] = ()


def root_cause(ending: Ending) -> str:
    """The text to print first after a launch that did not finish: rank, what, where, log, and which others failed."""
    if not ending.failures:
        how = f"stopped by {signal.Signals(ending.signal).name}" if ending.signal else "all ranks finished"
        return how
    root, *later = ending.failures
    code = f"signal {root.signal}" if root.signal else f"exit code {root.exit_code}"
    lines = [f"rank {root.rank} failed: {root.message}"]
    lines.append(f"  at {root.where} ({code}, host {root.host})" if root.where else f"  {code}, host {root.host}")
    lines.append(f"  log: {root.log}")
    lines += [f"  -> {way_out}"] if (way_out := advice(root.message)) else []
    same = sum(failure.message == root.message and not failure.consequence for failure in later)
    consequence = sum(failure.consequence for failure in later)
    for count, how in ((same, "in the same way"), (len(later) - same - consequence, "in another way: see their logs")):
        if count:
            lines.append(f"  {count} other rank{'s' * (count > 1)} failed {how}")
    if consequence:
        lines.append(f"  {consequence} other rank{'s' * (consequence > 1)} failed in consequence")
    if ending.restarts:
        lines.append(f"  after {ending.restarts} restart{'s' * (ending.restarts > 1)}")
    return "\n".join(lines)


def advice(message: str) -> str:
    """The way out of known errors whose message has none; empty for others."""
    if LOOPBACK.search(message):
        return (
            "a host's name leads to its own loopback there, which no other host can reach: set launcher.interface to "
            "the network between the hosts, or mend /etc/hosts; dtrain doctor with the same launcher says where"
        )
    return ""


def signal_name(number: int) -> str:
    """The name, such as SIGKILL for 9; real-time signals have none of their own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def read_error(path: Path) -> tuple[str, str] | None:
    """(message, traceback) of a file written by torch's ``@record``; None if there is none or it is torn."""
    content = json_in(path)
    message = content.get("message") if isinstance(content, dict) else None
    if isinstance(message, str):
        return message, ""
    more = message.get("extraInfo") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(more, dict) or not _is_time(more.get("timestamp")):
        return None
    return str(message.get("message", "")), str(more.get("py_callstack", ""))


def _is_time(value: object) -> bool:
    """Whether torch's agent, which reads it too, accepts it."""
    if isinstance(value, str):
        return re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value) is not None
    return isinstance(value, int | float) and abs(value) < 1e18


def read_probe(path: Path) -> tuple[str, str] | None:
    """(message, traceback) of a file written by `dtrain.launchers.probe`; None if there is none or it is torn."""
    content = json_in(path)
    if not isinstance(content, dict) or not ("message" in content and "traceback" in content):
        return None
    return str(content["message"]), str(content["traceback"])


def read_log_end(path: Path, start: int) -> tuple[str, str]:
    """(message, traceback) of a program that wrote no error file: its last traceback, else its last line."""
    try:
        with path.open("rb") as log:
            log.seek(max(start, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = log.read(TAIL_BYTES).decode(errors="replace")
    except OSError as error:
        return f"its log cannot be read: {error}", ""
    _, head, body = text.rpartition("Traceback (most recent call last):\n")
    lines = [line for line in body.splitlines() if line.strip()]
    if not head:
        return (f"its last line was: {lines[-1].strip()}" if lines else "it wrote nothing"), ""
    message = next((line for line in lines if not line.startswith(" ")), "an exception")
    return message, head + body
