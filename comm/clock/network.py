"""Networks, described: links with a rate and a latency in each direction, and units within units that they connect.

    link=100mbit,40ms sites=2 nodes=4         two sites of four nodes each; 100 Mbit/s and 40 ms one way between sites
    link=1gbit/100mbit,5ms nodes=8            eight nodes, each of which receives 1 Gbit/s and sends 100 Mbit/s

An op over all ranks takes the sum of two parts, S its `sent_bytes` on a rank:

    hops(op, ranks) x latency  +  the longest of  bytes through a link / its rate        over all levels

A ring passes each link of a unit once, with one rank's bytes; in an all-to-all every rank of a unit sends through the
unit's link what is for ranks of other units. Latencies add up over the hops of a ring, of which few leave a site.
Source: the alpha-beta model, Thakur et al., IJHPCA 19 (2005), section 3; gloo's hops: `dtrain.bench.fit`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Op, Shift, payload_bytes, sent_bytes

Backend: TypeAlias = Literal["gloo", "ring", "doubling"]
Hops: TypeAlias = Callable[[int], int]

HOPS: Mapping[Backend, Mapping[type, Hops]] = {
    # One-way delays in a row. gloo waits in each step of a ring until the receiver has said that it is ready.
    "gloo": {
        AllReduce: lambda n: 4 * (n - 1), AllGather: lambda n: 2 * (n - 1), AllToAll: lambda n: 2,
        Broadcast: lambda n: 2 * _rounds(n), Shift: lambda n: 2,
    },
    "ring": {
        AllReduce: lambda n: 2 * (n - 1), AllGather: lambda n: n - 1, AllToAll: lambda n: 1, Broadcast: lambda n: n - 1,
        Shift: lambda n: 1,
    },
    # Recursive halving and doubling: as many bytes, and each message twice as long as the one before.
    "doubling": {
        AllReduce: lambda n: 2 * _rounds(n), AllGather: lambda n: _rounds(n), AllToAll: lambda n: 1,
        Broadcast: lambda n: _rounds(n), Shift: lambda n: 1,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Link:
    """Between a unit and the others of its level. Rates in bytes per second, latencies in seconds one way.

    Raises ``ValueError`` for a rate that is not positive, and for a latency that is negative or not finite.
    """

    up: float = math.inf
    down: float = math.inf
    latency_up: float = 0.0
    latency_down: float = 0.0

    def __post_init__(self) -> None:
        for name, rate in (("up", self.up), ("down", self.down)):
            if not rate > 0:
                raise ValueError(f"a link with a rate of {rate!r} bytes/s {name} carries nothing; give one above 0")
        for latency in (self.latency_up, self.latency_down):
            if not 0 <= latency < math.inf:
                raise ValueError(f"a link with a latency of {latency!r} s cannot be; give 0 or more seconds one way")

    @property
    def rate(self) -> float:
        """Where as much is sent as is received."""
        return min(self.up, self.down)

    @property
    def latency(self) -> float:
        """One way, the mean of the two directions: a ring takes them in turn."""
        return (self.latency_up + self.latency_down) / 2


@dataclass(frozen=True)
class Level:
    """``count`` units called ``name`` in each unit of the level around it, each of them on a ``link`` of its own."""

    name: str
    count: int
    link: Link

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"{self.name}={self.count}: there is at least one")


@dataclass(frozen=True)
class Network:
    """Levels from the outermost to the innermost, whose units are replicas. ``backend``: what performs ops.
    ``measured``: the link that the outermost level is for one op, by the name of its class, where that is known.

    >>> network = Network.of("link=100mbit,40ms sites=2 nodes=4")
    >>> network.size, network.levels[0].link.up
    (8, 12500000.0)
    """

    levels: tuple[Level, ...]
    backend: Backend = "gloo"
    measured: Mapping[str, Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend={self.backend!r}; choose {' or '.join(get_args(Backend))}")

    @staticmethod
    def of(text: str | Sequence[str]) -> Network:
        """Parse a description, see `parsed`."""
        return parsed(text)

    @property
    def size(self) -> int:
        """Replicas."""
        return math.prod(level.count for level in self.levels)

    def resized(self, count: int) -> Network:
        """This network with ``count`` of its outermost units."""
        first = self.levels[0]
        return replace(self, levels=(Level(first.name, count, first.link), *self.levels[1:]))

    def transfer(self, op: Op, world: int) -> float:
        """Seconds for which ``op`` among ``world`` ranks keeps its busiest link."""
        if world == 1:
            return 0.0
        whole, inside = payload_bytes(op.payload), self.size
        own = whole * _rounds(world) if isinstance(op, Broadcast) and self.backend == "gloo" else whole
        if not isinstance(op, Broadcast):
            own = sent_bytes(op, rank=0, world=world)
        longest = 0.0
        for level, link in self._links(op):
            inside //= level.count
            if level.count == 1 and inside >= world:
                continue
            through = own
            if isinstance(op, AllToAll) and inside > 1:
                ranks = min(inside, world)
                through = ranks * own * (world - ranks) // (world - 1)
            longest = max(longest, through / link.rate)
        return longest

    def latency(self, op: Op, world: int) -> float:
        """Seconds of one-way delays in a row of ``op`` among ``world`` ranks."""
        if world == 1:
            return 0.0
        hops = HOPS[self.backend][type(op)](world)
        in_a_ring = isinstance(op, AllReduce | AllGather) and self.backend != "doubling"
        in_a_ring = in_a_ring or (isinstance(op, Broadcast) and self.backend == "ring")
        return hops * (self._mean_hop(op) if in_a_ring else self._farthest(op))

    def _farthest(self, op: Op) -> float:
        """One message to the farthest rank."""
        return sum(link.latency for level, link in self._links(op) if level.count > 1)

    def _mean_hop(self, op: Op) -> float:
        """The mean over the hops of a ring of all ranks in their order."""
        total, units = 0.0, 1
        for level, link in self._links(op):
            crossing = units * (level.count - 1) + (units == 1 and level.count > 1)  # the ring's last hop closes it
            total += crossing * link.latency
            units *= level.count
        return total / max(units, 1)

    def _links(self, op: Op) -> Iterator[tuple[Level, Link]]:
        """The levels, each with its link for ``op``."""
        for place, level in enumerate(self.levels):
            yield level, level.link if place else self.measured.get(type(op).__name__, level.link)


def _rounds(n: int) -> int:
    return max(1, math.ceil(math.log2(n)))


# ---- the words of a description --------------------------------------------------------------------------------------

UNITS = ("sites", "nodes", "ranks")
RATES = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8, "tbit": 1e12 / 8}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
EXAMPLE = "link=100mbit,40ms sites=2 nodes=4"


def parsed(text: str | Sequence[str]) -> Network:
    """A network from words.

    ``sites``, ``nodes`` (in each site) and ``ranks`` (replicas in each node) say how many there are; ``link`` is that
    of the outermost of them, ``node_link`` and ``rank_link`` those further in, which are ideal if they are not given. A
    link is RATE[/RATE up][,LATENCY one way[/LATENCY up]], and ``backend`` is gloo, ring or doubling.

    Raises ``ValueError`` for anything else, with what it would have to be.

    >>> [level.count for level in parsed("link=20mbit,1ms nodes=3").levels]
    [3]
    """
    words = text.split() if isinstance(text, str) else list(text)
    given: dict[str, str] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or name not in (*UNITS, "link", "node_link", "rank_link", "backend"):
            raise ValueError(
                f"{word!r} is no word of a network; it is described like {EXAMPLE}, with sites, nodes, ranks, link, "
                "node_link, rank_link and backend"
            )
        if name in given:
            raise ValueError(f"{name} is given twice, {given[name]} and {value}")
        given[name] = value
    counts = {name: _count(name, given[name]) for name in UNITS if name in given}
    if not counts:
        raise ValueError(f"nothing says how many replicas there are; give nodes=, sites= or ranks=, as in {EXAMPLE}")
    outermost = next(iter(counts))
    levels = []
    for name, count in counts.items():
        word = "link" if name == outermost else f"{name.removesuffix('s')}_link"
        levels.append(Level(name, count, parsed_link(given.pop(word)) if word in given else Link()))
    if unused := [name for name in ("link", "node_link", "rank_link") if name in given]:
        raise ValueError(f"{unused[0]} belongs to no units: the outermost ones are the {outermost}, on link=")
    backend = given.get("backend", "gloo")
    return Network(tuple(levels), backend)  # type: ignore[arg-type]  # checked there


def parsed_link(text: str) -> Link:
    """A link from ``RATE[/RATE up][,LATENCY[/LATENCY up]]``.

    >>> parsed_link("1gbit/100mbit,5ms").up
    12500000.0

    Raises ``ValueError`` for other text, no rate, and a negative latency.
    """
    rates, _, latencies = text.partition(",")
    down, _, up = rates.partition("/")
    there, _, back = latencies.partition("/")
    speeds = [_quantity(speed, RATES, text, "100mbit") for speed in (down, up or down)]
    delays = [_quantity(delay, SECONDS, text, "40ms") if delay else 0.0 for delay in (there, back or there)]
    try:
        return Link(down=speeds[0], up=speeds[1], latency_down=delays[0], latency_up=delays[1])
    except ValueError as error:
        raise ValueError(f"link={text}: {error}") from None


def _quantity(text: str, units: Mapping[str, float], whole: str, example: str) -> float:
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([a-z]+)", text.strip().lower())
    if match is None or match[2] not in units:
        raise ValueError(
            f"link={whole}: {text!r} is no quantity like {example}; units are {', '.join(units)} (a link has a rate, "
            "and after a comma its latency one way: 100mbit,40ms)"
        )
    return float(match[1]) * units[match[2]]


def _count(name: str, text: str) -> int:
    if not re.fullmatch(r"\d+", text.replace("_", "")) or int(text) < 1:
        raise ValueError(f"{name}={text}: give a positive whole number")
    return int(text)
