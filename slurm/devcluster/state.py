"""The facts of a cluster that is up: one file, /run/dtrain/NAME/cluster.json, written atomically."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import ipaddress
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dtrain.launchers.environment import CLUSTER

__all__ = [
    "BadRequest", "ClusterError", "Facts", "Rate", "alive", "explained", "locked", "named", "parse_latency",
    "parse_rate", "running", "this_process",
]  # fmt: skip

ROOT = Path("/run/dtrain")
NAME = re.compile(r"[a-z][a-z0-9]{0,7}")
FASTEST_BITS = 2_000_000_000


class ClusterError(RuntimeError):
    """A cluster that cannot be made, found or changed; the message says what to do."""


class BadRequest(ClusterError):
    """The request cannot be met: nothing was begun and nothing changed."""


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn system errors within the block into a `ClusterError` that says what was being done."""
    try:
        yield
    except subprocess.TimeoutExpired as error:
        command = error.cmd if isinstance(error.cmd, str) else " ".join(map(str, error.cmd))
        raise ClusterError(f"{doing}: no end within {error.timeout:g} s of: {command}") from error
    except Exception as error:
        # Errors of netlink are no OSError. pyroute2 may be missing, and where it raised it has been imported.
        if not isinstance(error, OSError | subprocess.SubprocessError) and "pyroute2" not in type(error).__module__:
            raise
        forbidden = getattr(error, "errno", getattr(error, "code", 0)) in (errno.EPERM, errno.EACCES)
        way_out = (
            "run it in a container with --privileged, or in none" if os.geteuid() == 0 else "run it as root (sudo)"
        )
        hint = f"; {way_out}" if forbidden else ""
        raise ClusterError(f"{doing}: {error}{hint}") from error


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold ROOT, which the first cluster makes and the last one removes: one process at a time."""
    while True:
        with contextlib.suppress(FileExistsError):  # `exist_ok` would raise it if the folder goes away meanwhile
            ROOT.mkdir()
        try:
            handle = os.open(ROOT, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # removed just now
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # The previous holder may have removed the folder, and then this handle is stale.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(ROOT)):
                    break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        yield
    finally:
        os.close(handle)


def this_process() -> str:
    """An identity of the calling process that no later one has: its pid and when it began."""
    return f"{os.getpid()} {_began(os.getpid())}"


def alive(process: str) -> bool:
    """Whether a process that `this_process` named still runs. A truncated text names none."""
    number, _, began = process.partition(" ")
    with contextlib.suppress(OSError, ValueError):
        return began != "" and _began(int(number)) == began
    return False


def _began(pid: int) -> str:
    """When a process began, in ticks of the machine; a zombie has ended and has none."""
    # The name of a program, in brackets, may hold spaces and brackets itself.
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if words[0] in "ZX" else words[19]


@dataclass(frozen=True)
class Rate:
    """A link's rate in bits per second, the same in both directions; None: as fast as the machine goes."""

    bits: int | None

    def __str__(self) -> str:
        if self.bits is None:
            return "none"
        for unit, size in (("gbit", 10**9), ("mbit", 10**6), ("kbit", 10**3)):
            if self.bits % size == 0:
                return f"{self.bits // size}{unit}"
        return f"{self.bits}bit"


def parse_rate(text: str) -> Rate:
    """From "1gbit", "2.5mbit" or "none".

    Raises ``BadRequest`` for anything else, and for what these links cannot keep: above 2 gbit the processor is the
    limit, and a figure measured there says nothing about a network.

    >>> parse_rate("100mbit").bits
    100000000
    """
    if text == "none":
        return Rate(None)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(k|m|g)bit", text)
    if match is None:
        raise BadRequest(f"{text!r} is no bandwidth; write 50mbit, 1gbit, or none for no limit")
    bits = round(float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]])
    if not 64_000 <= bits <= FASTEST_BITS:
        raise BadRequest(
            f"a bandwidth of {text} cannot be had on one machine: below 64kbit Slurm itself times out, above 2gbit the "
            "processor is the limit and not the link; choose one in between, or none for no limit"
        )
    return Rate(bits)


def parse_latency(text: str) -> float:
    """Seconds one way, from "10ms" or "0.5s"; "none" is 0. Raises ``BadRequest``.

    >>> parse_latency("10ms")
    0.01
    """
    if text == "none":
        return 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", text)
    if match is None:
        raise BadRequest(f"{text!r} is no latency; write 10ms or 0.1s, or none")
    seconds = float(match[1]) / (1000 if match[2] == "ms" else 1)
    if seconds > 2:
        raise BadRequest(f"a latency of {text} is more than 2s one way, with which Slurm itself does not work")
    return seconds


@dataclass(frozen=True)
class Facts:
    """A cluster. ``pids``: host -> the process that holds its namespaces. ``latency_seconds``: one way, 0 for none."""

    name: str
    hosts: tuple[str, ...]
    addresses: dict[str, str]
    pids: dict[str, int]
    rates: dict[str, int | None]
    cut: tuple[str, ...] = ()
    latency_seconds: float = 0.0
    switch_pid: int = 0

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return ROOT / self.name

    @property
    def slurm_conf(self) -> Path:
        """Its configuration of Slurm."""
        return self.folder / "slurm.conf"

    def write(self) -> None:
        """Write cluster.json, atomically."""
        new = self.folder / "cluster.json.new"
        new.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        os.replace(new, self.folder / "cluster.json")

    @classmethod
    def read(cls, name: str) -> Facts:
        """Raises ``OSError`` if there is no such cluster, ``ValueError`` where its file is damaged."""
        try:
            stored = json.loads((ROOT / name / "cluster.json").read_text())
            facts = cls(**{**stored, "hosts": tuple(stored["hosts"]), "cut": tuple(stored["cut"])})
            facts._require_whole(name)
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"the file of cluster {name} is damaged: {error}") from error
        return facts

    def _require_whole(self, name: str) -> None:
        """Raises ``ValueError``, or other errors for values of other types."""
        named, rates = {*self.addresses}, [rate for rate in self.rates.values() if rate is not None]
        consistent = self.name == name and {*self.rates} == named >= {*self.hosts, *self.pids, *self.cut}
        counts = all(type(number) is int and number >= 0 for number in (self.switch_pid, *self.pids.values(), *rates))
        latency = type(self.latency_seconds) in (int, float) and 0 <= self.latency_seconds < math.inf
        if not (consistent and counts and latency):
            raise ValueError(f"the file of cluster {name} is damaged")
        for address in self.addresses.values():
            ipaddress.IPv4Address(address.strip())  # a number has no strip, and would be one

    @property
    def alive(self) -> bool:
        """Whether the process that holds its login host still runs: pids are reused."""
        try:
            words = Path(f"/proc/{self.pids.get('login', 0)}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return words[:2] == [b"sleep", b"infinity"]


def running() -> list[Facts]:
    """The clusters that are up on this machine."""
    clusters = []
    for path in sorted(ROOT.glob("*/cluster.json")) if ROOT.is_dir() else ():
        try:
            facts = Facts.read(path.parent.name)
        except (OSError, ValueError, TypeError):
            continue
        if facts.alive:
            clusters.append(facts)
    return clusters


def named(name: str | None) -> Facts:
    """The cluster of that name; without a name, the only one that is up. Raises ``BadRequest``."""
    up = running()
    names = ", ".join(facts.name for facts in up) or "none"
    if name is None and len(up) == 1:
        return up[0]
    if name is None and up:
        raise BadRequest(f"several clusters are up ({names}): say which, with --name NAME or {CLUSTER}=NAME")
    for facts in up:
        if facts.name == name:
            return facts
    what = f"no cluster {name} is up" if name else "no cluster is up"
    raise BadRequest(f"{what} (up: {names}); start one with: dtrain cluster up")
