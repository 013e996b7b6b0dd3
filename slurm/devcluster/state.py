"""What is known of a cluster that is up: one file, /run/dtrain/NAME/cluster.json, whole or not there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ClusterError", "Facts", "Rate", "named", "parse_latency", "parse_rate", "running"]

ROOT = Path("/run/dtrain")
NAME = re.compile(r"[a-z][a-z0-9]{0,7}")
FASTEST_BITS = 2_000_000_000


class ClusterError(RuntimeError):
    """A cluster that cannot be made, found or changed; the message says what to do."""


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

    Raises ``ClusterError`` for anything else, and for what these links cannot keep: above 2 gbit the processor is the
    limit, and a figure measured there says nothing about a network.

    >>> parse_rate("100mbit").bits
    100000000
    """
    if text == "none":
        return Rate(None)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(k|m|g)bit", text)
    if found is None:
        raise ClusterError(f"{text!r} is no bandwidth; write 50mbit, 1gbit, or none for no limit")
    bits = round(float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]])
    if not 64_000 <= bits <= FASTEST_BITS:
        raise ClusterError(
            f"a bandwidth of {text} cannot be had on one machine: below 64kbit Slurm itself times out, above 2gbit the "
            "processor is the limit and not the link; choose one in between, or none for no limit"
        )
    return Rate(bits)


def parse_latency(text: str) -> float:
    """Seconds one way, from "10ms" or "0.5s"; "none" is 0. Raises ``ClusterError``.

    >>> parse_latency("10ms")
    0.01
    """
    if text == "none":
        return 0.0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", text)
    if found is None:
        raise ClusterError(f"{text!r} is no latency; write 10ms or 0.1s, or none")
    seconds = float(found[1]) / (1000 if found[2] == "ms" else 1)
    if seconds > 2:
        raise ClusterError(f"a latency of {text} is more than 2s one way, with which Slurm itself does not work")
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
        """Whole or not at all."""
        new = self.folder / "cluster.json.new"
        new.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        os.replace(new, self.folder / "cluster.json")

    @classmethod
    def read(cls, name: str) -> Facts:
        """Raises ``OSError`` or ``ValueError`` if there is no such cluster."""
        found = json.loads((ROOT / name / "cluster.json").read_text())
        return cls(**{**found, "hosts": tuple(found["hosts"]), "cut": tuple(found["cut"])})

    @property
    def alive(self) -> bool:
        """Whether the process that holds its login host is still that: a number may have been given away again."""
        try:
            words = Path(f"/proc/{self.pids.get('login', 0)}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return words[:2] == [b"sleep", b"infinity"]


def running() -> list[Facts]:
    """The clusters that are up on this machine."""
    found = []
    for path in sorted(ROOT.glob("*/cluster.json")) if ROOT.is_dir() else ():
        try:
            facts = Facts.read(path.parent.name)
        except (OSError, ValueError, TypeError):
            continue
        if facts.alive:
            found.append(facts)
    return found


def named(name: str | None) -> Facts:
    """The cluster of that name; without a name, the only one that is up. Raises ``ClusterError``."""
    up = running()
    names = ", ".join(facts.name for facts in up) or "none"
    if name is None and len(up) == 1:
        return up[0]
    if name is None and up:
        raise ClusterError(f"several clusters are up ({names}): say which, with --name NAME or DTRAIN_CLUSTER=NAME")
    for facts in up:
        if facts.name == name:
            return facts
    what = f"no cluster {name} is up" if name else "no cluster is up"
    raise ClusterError(f"{what} (up: {names}); start one with: dtrain cluster up")
