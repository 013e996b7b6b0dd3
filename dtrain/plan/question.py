"""What `dtrain plan` is asked: its own words, apart from those of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.bench.fit import fit
from dtrain.bench.rows import Row, read_as
from dtrain.comm.clock.network import Level, Link, Network
from dtrain.errors import ConfigError
from dtrain.plan.machine import share

OF_NETWORK = ("link", "node_link", "rank_link", "sites", "nodes", "ranks", "backend")
OF_MACHINE = ("gpu", "memory", "peak", "bandwidth", "efficiency")
OWN = (*OF_NETWORK, *OF_MACHINE, "measured", "loss_budget", "utilization", "shards")


@dataclass(frozen=True)
class Question:
    """``network``: words, see `dtrain.comm.clock.network`. ``machine``: see `dtrain.plan.machine`. ``measured``: rows
    of `dtrain bench collectives`, instead of a described link. ``shards``: those that are tried; none: 1, 2, 4, 8.
    """

    network: tuple[str, ...] = ()
    machine: dict[str, str] = field(default_factory=dict)
    measured: str = ""
    loss_budget: float = 0.02
    utilization: float = 0.95
    shards: tuple[int, ...] = ()

    def links(self, replicas: int) -> Network | None:
        """The network between the replicas, ``replicas`` of them where the words do not say how many; None without any.

        Raises ``ConfigError``.
        """
        if self.measured:
            return measured_network(Path(self.measured).expanduser(), replicas)
        if not self.network:
            return None
        counted = any(word.startswith(("sites=", "nodes=", "ranks=")) for word in self.network)
        try:
            return Network.of([*self.network, *(() if counted else (f"nodes={replicas}",))])
        except ValueError as error:
            raise ConfigError(str(error)) from error


def asked(words: Sequence[str]) -> tuple[Question, list[str]]:
    """The question, and the words that are left for the configuration.

    >>> question, rest = asked(["link=100mbit,40ms", "sites=2", "model=tiny", "loss_budget=1%"])
    >>> question.network, question.loss_budget, rest
    (('link=100mbit,40ms', 'sites=2'), 0.01, ['model=tiny'])

    Raises ``ConfigError`` for values that cannot be.
    """
    given: dict[str, str] = {}
    rest = []
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or key not in OWN:
            rest.append(word)
        elif key in given:
            raise ConfigError(f"{key} is given twice, {given[key]} and {value}")
        else:
            given[key] = value
    if "measured" in given and "link" in given:
        raise ConfigError("link= describes a link, and measured= has measured it; give one of the two")
    budget, wanted = share(given.get("loss_budget", "2%"), "loss_budget"), given.get("utilization", "95%")
    utilization = share(wanted, "utilization")
    if not 0 < utilization < 1:
        raise ConfigError(f"utilization={wanted}: give more than 0 and less than 100%")
    return Question(
        network=tuple(f"{key}={given[key]}" for key in OF_NETWORK if key in given),
        machine={key: given[key] for key in OF_MACHINE if key in given},
        measured=given.get("measured", ""),
        loss_budget=budget,
        utilization=utilization,
        shards=_shards(given.get("shards", "")),
    ), rest


def measured_network(path: Path, replicas: int) -> Network:
    """Links as `dtrain bench collectives` has measured them: the fit of its all-reduces among the fewest ranks.

    Raises ``ConfigError`` for no rows, for rows that are invalid, and for a fit that does not describe its own sweep.
    """
    file = path / "rows.jsonl" if path.is_dir() else path
    try:
        rows = read_as(file, Row)
    except (OSError, ValueError) as error:
        raise ConfigError(f"measured={path}: {error}; give the folder of a dtrain bench collectives") from error
    sweep = [row for row in rows if row.op in ("all_reduce", "comm.all_reduce") and row.world > 1]
    if not sweep:
        raise ConfigError(
            f"measured={path} has no all_reduce between ranks; give the folder of a dtrain bench collectives"
        )
    if wrong := next((row for row in sweep if row.invalid or row.wrong), None):
        reason = wrong.invalid or f"{wrong.wrong} values were wrong"
        raise ConfigError(
            f"measured={path}: its row of {wrong.bytes:,} bytes says nothing about the link ({reason}); repeat the "
            "sweep on quiet machines"
        )
    world, op = min(row.world for row in sweep), min(row.op for row in sweep)
    seconds = {row.bytes: row.p50_ms / 1e3 for row in sweep if row.world == world and row.op == op}
    try:
        found = fit("all_reduce", world, seconds)
    except ValueError as error:
        raise ConfigError(f"measured={path}: {error}; sweep all_reduce over more sizes") from error
    if not found.usable:
        raise ConfigError(
            f"measured={path}: no link with one rate and one latency describes this sweep, {found.worst:,} bytes are "
            f"off by {found.residual:.0%}; repeat it with larger messages (bench.max_bytes=64M), or describe the link"
        )
    link = Link(1 / found.beta, 1 / found.beta, found.alpha, found.alpha)
    return Network((Level("nodes", replicas, link),))


def _shards(text: str) -> tuple[int, ...]:
    if not text:
        return ()
    numbers = text.strip("[]").split(",")
    if not all(number.strip().isdigit() and int(number) > 0 for number in numbers):
        raise ConfigError(f"shards={text}: give numbers of ranks, such as 1,2,8")
    return tuple(sorted({int(number) for number in numbers}))
