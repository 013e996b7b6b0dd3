"""Who is on the replicate axis while replicas come and go: agreed upon in a store, with process groups for each epoch.

    a replica       beats in the store every second, and says where it stands when it wants to be in the next epoch
    an epoch        a list of members that all of them read from the store, and groups of their own between them
    the next one    begins where a member is lost or a newcomer waits: when every old member has said where it stands,
                    or beats no more, whoever sees that first writes the list down

Nobody leads: any replica may be lost at any time. The store may not; it is a process that is no replica (`serve`). It
listens to those who share its secret (`secret`), and what it says is checked nevertheless: what no replica can have
written counts as not written. The gloo groups themselves know no secret: see docs/security.md.
A replica has an id, never used twice, and a slot, its share of the data, which goes to the next newcomer when it is
free. With a shard axis the first rank of a replica speaks for it, and all of them read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroupGloo

from dtrain.comm.ops import Op, Place
from dtrain.comm.runtime.membership.reachability import reach
from dtrain.comm.runtime.membership.secret import made_secret, read_secret
from dtrain.comm.runtime.membership.store_client import GuardedStore, Line
from dtrain.comm.runtime.membership.store_server import StoreServer
from dtrain.comm.transports.gloo import GlooTransport, PeersLost
from dtrain.comm.transports.transport import Work

log = logging.getLogger(__name__)

BEAT_SECONDS, POLL_SECONDS = 1.0, 0.05
TELL_SECONDS = 5.0
"""A newcomer that has waited for so long says for what."""
CONNECT_SECONDS = 60.0
AXES = 2  # what overlaps inner steps has its own, beside what is waited for
NOBODY = -1
MOST_MEMBERS, MOST_STEPS = 1 << 20, 1 << 53
INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class Epoch:
    """Who is in it: slots by id. ``donor``: whose state those who are ``behind`` copy, or NOBODY."""

    number: int
    slots: Mapping[int, int]
    donor: int
    behind: tuple[int, ...]

    def to_json(self) -> str:
        return json.dumps({**vars(self), "slots": {str(number): slot for number, slot in self.slots.items()}})

    @classmethod
    def from_json(cls, text: bytes) -> Epoch:
        """Raises ``ValueError`` for what `to_json` cannot have written."""
        try:
            found = json.loads(text)
            slots = {int(number): _within(slot, 0, MOST_MEMBERS) for number, slot in found["slots"].items()}
            behind = tuple(_within(member, 0, MOST_MEMBERS) for member in found["behind"])
            epoch = cls(
                _within(found["number"], 0, MOST_STEPS), slots, _within(found["donor"], -1, MOST_MEMBERS), behind
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no record of an epoch: {text[:100]!r}") from error
        there = all(0 <= member < MOST_MEMBERS for member in slots) and {*behind, epoch.donor} <= {NOBODY, *slots}
        if not there or len({*slots.values()}) < len(slots) or (behind and epoch.donor == NOBODY):
            raise ValueError(f"no record of an epoch: {text[:100]!r}")
        return epoch


def _within(value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r:.100} is no number from {least} to {most}")
    return value


def propose(number: int, before: Epoch | None, ready: Mapping[int, int], alive: Callable[[int], bool],
            wanted: int) -> Epoch | None:  # fmt: skip
    """The next epoch, from where everybody stands (``ready``: positions by id); None while it is not yet decided.

    >>> first = propose(0, None, {0: -1, 1: -1}, lambda number: True, wanted=2)
    >>> first.slots, first.donor
    ({0: 0, 1: 1}, -1)
    >>> propose(1, first, {0: 7, 2: -1}, lambda number: number != 1, wanted=2)
    Epoch(number=1, slots={0: 0, 2: 1}, donor=0, behind=(2,))
    """
    old = before.slots if before is not None else {}
    if any(member not in ready and alive(member) for member in old):
        return None
    there = [member for member in sorted(ready) if alive(member)]
    slots = {member: old[member] for member in there if member in old}
    newcomers = [member for member in there if member not in old]
    if not slots and len(newcomers) < wanted:
        return None
    for newcomer in newcomers:
        slots[newcomer] = min(set(range(len(slots) + 1)) - set(slots.values()))
    furthest = max(ready[member] for member in slots)
    if furthest < 0:
        return Epoch(number, slots, NOBODY, ())
    donor = min(member for member in slots if ready[member] == furthest)
    return Epoch(number, slots, donor, tuple(member for member in slots if ready[member] < furthest))


def changes(before: Epoch | None, now: Epoch) -> str:
    """What is new in an epoch, for people.

    >>> changes(Epoch(0, {0: 0, 1: 1}, -1, ()), Epoch(1, {0: 0, 2: 1}, 0, (2,)))
    'replicas [1] are lost, replicas [2] have come, going on with 2'
    """
    old, new = set(before.slots if before else now.slots), set(now.slots)
    lost = [f"replicas {sorted(old - new)} are lost"] * bool(old - new)
    come = [f"replicas {sorted(new - old)} have come"] * bool(new - old)
    return ", ".join([*lost, *come, f"going on with {len(new)}" if before else f"in, as one of {len(new)}"])


class Members:
    """One rank's part in a run whose replicas come and go, for `attach`.

    Args:
        address: "host:port" of the store, see `serve`.
        replicas: how many the first epoch waits for.
        patience_seconds: a replica that has been silent for so long is taken for dead.
        timeout_seconds: how long an exchange may take, and how long a newcomer waits to be let in: longer than a round.
        grace_seconds: when others have waited for this replica for so long, it ends its round with the steps that it
            has made; by default they wait.
        run: a name, where one store serves several runs.
        secret_file: holds the secret of the store; see `dtrain.comm.runtime.membership.secret` for the usual places.

    Raises ``ValueError`` for what is no address and where there is no secret, and ``ConnectionError`` if no store
    answers within a minute, or one with another secret; it says after five seconds that it waits. When replicas come or
    go, each says so through ``logging``.

    ``came_by``: how a machine of `one_byte` that came later got its weights: "log" or "weights"; else "".
    ``left_out_steps``: inner steps that this replica did not make, since the others had waited for ``grace_seconds``.
    """

    def __init__(
        self,
        address: str,
        *,
        replicas: int,
        patience_seconds: float = 15.0,
        timeout_seconds: float = 600.0,
        grace_seconds: float = math.inf,
        run: str = "dtrain",
        secret_file: str | Path | None = None,
    ) -> None:
        self.address, self.replicas, self.run, self.grace = address, replicas, run, grace_seconds
        self.patience, self.timeout = patience_seconds, timeout_seconds
        self.groups: list[GlooTransport] = []
        self.epoch: Epoch | None = None
        self.id = NOBODY
        self.came_by = ""
        self.left_out_steps = 0
        self._secret = read_secret(secret_file)
        self._store = self._connected()
        self._pulse: _Pulse | None = None

    # ---- what a method asks ----------------------------------------------------------------------------------------

    def join(self, shard: Place, tell: Callable[[int], int]) -> None:
        """Get an id. ``shard``: this rank among those of its replica, which all do so; ``tell`` gives them its first
        one's number.
        """
        self._shard, self._tell = shard, tell
        self._arrive()

    @property
    def slot(self) -> int:
        """This replica's share of the data."""
        return self._now.slots[self.id]

    @property
    def place(self) -> Place:
        """Of this replica on the axis; alone before the first epoch."""
        if self.epoch is None:
            return Place(0, 1)
        ids = sorted(self._now.slots)
        return Place(ids.index(self.id), len(ids))

    @property
    def arrivals(self) -> int:
        """How many replicas have come so far, those included that have gone."""
        return self._store.add("arrivals", 0)

    def transport(self) -> MembersTransport:
        """The axis between the members of whatever epoch it is."""
        return MembersTransport(self, 0)

    def called(self, position: int) -> bool:
        """Whether the next epoch is to begin here, since a newcomer waits. All members get the same answer."""
        waiting = [number for number in self._ready(self._now.number + 1) if number not in self._now.slots]
        return bool(self._store.compare_set(self._meeting(position), "", "yes" if waiting else "no") == b"yes")

    def late(self, position: int) -> bool:
        """Whether somebody has waited at ``position`` for as long as the grace lasts, as this replica has heard."""
        if self.grace == math.inf:
            return False
        assert self._pulse is not None
        return self._pulse.there_for(self._meeting(position)) >= self.grace

    def _meeting(self, position: int) -> str:
        """What the first member writes that comes to where they wait for each other."""
        return f"called/{self._now.number}/{position}"

    def first_said(self, text: str) -> str:
        """The text that the first replica of this run gave, at this rank's shard."""
        said: bytes = self._store.compare_set(f"text/{self._shard.rank}", "", text)
        return said.decode()

    def stands(self, member: int) -> int | None:
        """Where a member said that it stands when this epoch began; None if that is not known any more."""
        return self._ready(self._now.number).get(member)

    def leave(self) -> None:
        """Break off what is under way in this epoch, here and, as they notice, at its other members."""
        groups, self.groups = self.groups, []
        for group in groups:
            group.abort()

    def enter(self, position: int) -> Epoch:
        """Wait for the next epoch and make its groups. ``position``: how far this replica is, NOBODY for a newcomer.

        Raises ``PeersLost`` if a member of it was lost meanwhile, or if this replica was taken for dead, and has to
        come again as a newcomer; ``TimeoutError`` if nobody lets it in.
        """
        self.leave()
        before, since = self.epoch, time.monotonic()
        found = self._written(before.number + 1 if before is not None else 0, before, position, since)
        while before is None and self.id not in found.slots:  # a newcomer reads them all
            found = self._written(found.number + 1, found, position, since)
        self.epoch = found
        if self.id not in found.slots:
            self.epoch = None
            self._arrive()
            raise PeersLost(f"this replica was silent for {self.patience:g} s and was left out; it comes again")
        assert self._pulse is not None
        self._pulse.watch(found.slots, f"epoch/{found.number + 1}", self.leave)
        self.groups = [self._group(f"axis{number}", list(found.slots)) for number in range(AXES)]
        if self._shard.rank == 0:
            log.warning("replica %d: %s", self.id, changes(before, found))
        return found

    @contextlib.contextmanager
    def between(self, ids: list[int]) -> Iterator[GlooTransport]:
        """An axis between some members of this epoch, for once; those alone call it."""
        group = self._group("between", ids)
        try:
            yield group
        finally:
            group.abort()

    def close(self) -> None:
        """Leave for good."""
        self.leave()
        if self._pulse is not None:
            self._pulse.end()

    # ---- the store ---------------------------------------------------------------------------------------------------

    @property
    def _now(self) -> Epoch:
        if self.epoch is None:
            raise RuntimeError("this replica is in no epoch yet; enter() comes first")
        return self.epoch

    def _connected(self) -> GuardedStore:
        host, _, port = self.address.rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
            raise ValueError(f"the store's address is {self.address!r}; give host:port")
        reach(host, int(port), min(CONNECT_SECONDS, self.timeout))
        try:
            line = Line(host.strip("[]"), int(port), self._secret, self.timeout)
        except OSError as error:
            raise ConnectionError(f"no store answers at {self.address} ({error}); start one: dtrain members") from error
        return GuardedStore(line, f"{self.run}/", timedelta(seconds=self.timeout))

    def _arrive(self) -> None:
        if self._pulse is not None:
            self._pulse.end()
        self._require_same_network()
        self.id = self._tell(self._store.add("arrivals", 1) - 1 if self._shard.rank == 0 else 0)
        own = self.id if self._shard.rank == 0 else None
        self._pulse = _Pulse(self._connected(), own, self.patience)

    def _require_same_network(self) -> None:
        """Raise ``ValueError`` where some can only be reached from their own machine, and others are elsewhere."""
        here = "interface" not in self._device() and ip_address(self._store.line.local.partition("%")[0]).is_loopback
        mine = "their own machine" if here else "a network"
        theirs = self._store.compare_set("listen", "", mine).decode(errors="replace")
        if theirs != mine:
            raise ValueError(
                f"this replica, with the store at {self.address}, would listen for others on {mine}, and they do on "
                f"{theirs}; give all replicas one address (not localhost for those on the store's machine), or name a "
                f"network interface with {INTERFACE}"
            )

    def _ready(self, number: int) -> dict[int, int]:
        """Who wants to be in epoch ``number``, and where each stands."""
        found = {}
        for member, said in self._store.under(f"ready/{number}/").items():
            with contextlib.suppress(ValueError):
                found[_within(int(member), 0, MOST_MEMBERS)] = _within(int(said), NOBODY, MOST_STEPS)
        return found

    def _written(self, number: int, before: Epoch | None, position: int, since: float) -> Epoch:
        """The record of epoch ``number``, once there is one."""
        key, own = f"epoch/{number}", f"ready/{number}/{self.id}"
        silent_until = since + TELL_SECONDS if before is None else math.inf
        while True:
            said = self._store.look(key) or b""
            with contextlib.suppress(ValueError):
                found = Epoch.from_json(said)
                if found.number == number:
                    return found
            if time.monotonic() - since > self.timeout:
                raise TimeoutError(f"nobody let replica {self.id} in for {self.timeout:g} s; are the others training?")
            if self._shard.rank == 0:
                if self._store.look(own) != str(position).encode():
                    self._store.set(own, str(position))
                self._propose(number, before, said)
                if time.monotonic() > silent_until:
                    silent_until = math.inf
                    log.warning("replica %d waits at %s: %s", self.id, self.address, self._awaited(number))
            time.sleep(POLL_SECONDS)

    def _awaited(self, number: int) -> str:
        """What a newcomer waits for, for people."""
        if number == 0:
            return f"{len(self._ready(number))} of {self.replicas} replicas are here"
        return (
            "the others let it in at the end of a round; if none of them trains any more, another run needs a store, "
            "or a name (Members(run=...)), of its own"
        )

    def _propose(self, number: int, before: Epoch | None, instead_of: bytes) -> None:
        assert self._pulse is not None  # join() came first
        proposal = propose(number, before, self._ready(number), self._pulse.alive, self.replicas)
        if proposal is not None:
            self._store.compare_set(f"epoch/{number}", instead_of, proposal.to_json())  # the first one counts

    def _group(self, name: str, ids: list[int]) -> GlooTransport:
        ids = sorted(ids)
        prefix = f"{self._now.number}/{name}/{','.join(map(str, ids))}/{self._shard.rank}"
        store, patience = self._store.below(prefix, timedelta(seconds=self.patience)), timedelta(seconds=self.patience)
        try:
            group = ProcessGroupGloo(store, ids.index(self.id), len(ids), self._options(patience))
            group.set_timeout(timedelta(seconds=self.timeout))
        except (RuntimeError, dist.DistStoreError) as error:
            raise PeersLost(f"no group of replicas {ids} came about: {error}") from error
        return GlooTransport(group, store)

    def _options(self, patience: timedelta) -> Any:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs do not know it
        options._devices = [ProcessGroupGloo.create_device(**self._device())]
        options._timeout = patience
        return options

    def _device(self) -> dict[str, str]:
        """Where groups listen: on the interface that the environment names, else at the address that the store sees.

        A launcher of one machine names the loopback interface, for the ranks of a replica among themselves.
        """
        name = os.environ.get(INTERFACE, "").partition(",")[0]
        return {"interface": name} if name not in ("", "lo", "lo0") else {"hostname": self._store.line.local}


class _Pulse:
    """Beats for this replica, and listens to the others, on a thread and a connection of its own."""

    def __init__(self, store: GuardedStore, own: int | None, patience: float) -> None:
        self._store, self._own, self._patience = store, own, patience
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._watched: list[int] = []
        self._successor = ""
        self._on_end: Callable[[], None] = lambda: None
        self._key, self._there_since = "", math.inf
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="dtrain-members", daemon=True)
        self._thread.start()

    def alive(self, member: int) -> bool:
        """Whether it has beaten within the time of patience, as far as was listened to."""
        with self._lock:
            said = self._listen(member)
            return said not in (b"", b"gone") and time.monotonic() - self._heard[member][1] < self._patience

    def watch(self, members: Iterable[int], successor: str, on_end: Callable[[], None]) -> None:
        """Call ``on_end`` once, when one of ``members`` is alive no more, or the others have gone on to a successor."""
        self._watched, self._successor = [member for member in members if member != self._own], successor
        self._on_end = on_end

    def there_for(self, key: str) -> float:
        """For how many seconds there has been ``key``, as far as it was asked for; no network is waited for."""
        if key != self._key:
            self._key, self._there_since = key, math.inf
        return time.monotonic() - self._there_since

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        if self._own is not None:
            self._store.set(f"beat/{self._own}", "gone")
        self._store.line.close()

    def _listen(self, member: int) -> bytes:
        said = self._store.look(f"beat/{member}") or b""
        if member not in self._heard or self._heard[member][0] != said:
            self._heard[member] = said, time.monotonic()
        return said

    def _beat(self, count: int) -> None:
        if self._own is not None:
            self._store.set(f"beat/{self._own}", str(count))

    def _run(self) -> None:
        count = 0
        while not self._ended.wait(BEAT_SECONDS):
            count += 1
            with self._lock:
                self._beat(count)
            key = self._key
            if key and self._there_since == math.inf and self._store.check([key]) and key == self._key:
                self._there_since = time.monotonic()
            over = bool(self._successor) and self._store.check([self._successor])
            if over or not all(self.alive(member) for member in self._watched):
                self._watched, self._successor = [], ""
                self._on_end()


class MembersTransport:
    """The replicate axis between the members of whatever epoch it is."""

    in_stream_order = False

    def __init__(self, members: Members, index: int) -> None:
        self._members, self._index = members, index

    @property
    def rank(self) -> int:
        return self._members.place.rank

    @property
    def size(self) -> int:
        return self._members.place.size

    def issue(self, op: Op) -> Work:
        groups = self._members.groups
        if self._index >= len(groups):
            raise PeersLost("the epoch was left")
        return groups[self._index].issue(op)

    def clone(self) -> MembersTransport:
        return MembersTransport(self._members, self._index + 1)

    def close(self) -> None:
        """The groups are `Members`' own."""


def serve(port: int, host: str = "127.0.0.1", *, secret_file: str | Path | None = None) -> StoreServer:
    """A store for `Members`, served by this process as long as it holds what is returned. 0: any free port.

    ``host``: the address to listen at; "0.0.0.0" for all. Raises ``OSError`` if the port cannot be served there, and
    ``ValueError`` where there is no secret and none can be made.
    """
    try:
        return StoreServer(host, port, made_secret(secret_file))
    except OSError as error:
        raise OSError(f"port {port} cannot be served at {host}: {error}") from error
