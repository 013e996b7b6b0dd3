"""Who is on the replicate axis while replicas come and go: agreed upon in a store, with process groups for each epoch.

    a replica       beats in the store every second, and says where it stands when it wants to be in the next epoch
    an epoch        a list of members that all of them read from the store, and groups of their own between them
    the next one    begins where a member is lost or a newcomer waits: when every old member has said where it stands,
                    or beats no more, whoever sees that first writes the list down

Nobody leads: any replica may be lost at any time. The store may not; it is a TCPStore that a process serves which is no
replica (`serve`). A replica has an id, never used twice, and a slot, its share of the data, which goes to the next
newcomer when it is free. With a shard axis the first rank of a replica speaks for it, and all of them read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore

from dtrain.comm.drivers.gloo_transport import GlooTransport, PeersLost
from dtrain.comm.drivers.reaching import reach
from dtrain.comm.drivers.transport import Travelling
from dtrain.comm.ops import Op, Place

log = logging.getLogger(__name__)

BEAT_SECONDS, POLL_SECONDS = 1.0, 0.05
CONNECT_SECONDS = 60.0
AXES = 2  # flights travel beside what is waited for
NOBODY = -1


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
        found = json.loads(text)
        slots = {int(number): slot for number, slot in found["slots"].items()}
        return cls(found["number"], slots, found["donor"], tuple(found["behind"]))


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

    Raises ``ValueError`` for what is no address and ``ConnectionError`` if no store answers within a minute; it says
    after five seconds that it waits. When replicas come or go, each says so through ``logging``.
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
    ) -> None:
        self.address, self.replicas, self.run, self.grace = address, replicas, run, grace_seconds
        self.patience, self.timeout = patience_seconds, timeout_seconds
        self.groups: list[GlooTransport] = []
        self.epoch: Epoch | None = None
        self.id = NOBODY
        self._store = self._connected()
        self._pulse: _Pulse | None = None

    # ---- what a schedule asks ----------------------------------------------------------------------------------------

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
        return int(self._store.add("arrivals", 0))

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

    def _connected(self) -> Store:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"the store's address is {self.address!r}; give host:port")
        reach(host, int(port), min(CONNECT_SECONDS, self.timeout))
        try:
            store = TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=self.timeout))
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise ConnectionError(f"no store answers at {self.address} ({error}); start one: dtrain members") from error
        return PrefixStore(self.run, store)

    def _arrive(self) -> None:
        if self._pulse is not None:
            self._pulse.end()
        self.id = self._tell(self._store.add("arrivals", 1) - 1 if self._shard.rank == 0 else 0)
        own = self.id if self._shard.rank == 0 else None
        self._pulse = _Pulse(self._connected(), own, self.patience)

    def _ready(self, number: int) -> dict[int, int]:
        """Who wants to be in epoch ``number``, and where each stands."""
        keys = {member: f"ready/{number}/{member}" for member in range(self.arrivals)}
        return {member: int(self._store.get(key)) for member, key in keys.items() if self._store.check([key])}

    def _written(self, number: int, before: Epoch | None, position: int, since: float) -> Epoch:
        """The record of epoch ``number``, once there is one."""
        key = f"epoch/{number}"
        if self._shard.rank == 0 and not self._store.check([key]):
            self._store.set(f"ready/{number}/{self.id}", str(position))
        while not self._store.check([key]):
            if time.monotonic() - since > self.timeout:
                raise TimeoutError(f"nobody let replica {self.id} in for {self.timeout:g} s; are the others training?")
            if self._shard.rank == 0:
                self._propose(number, before)
            time.sleep(POLL_SECONDS)
        return Epoch.from_json(self._store.get(key))

    def _propose(self, number: int, before: Epoch | None) -> None:
        assert self._pulse is not None  # join() came first
        proposal = propose(number, before, self._ready(number), self._pulse.alive, self.replicas)
        if proposal is not None:
            self._store.compare_set(f"epoch/{number}", "", proposal.to_json())  # the first one counts

    def _group(self, name: str, ids: list[int]) -> GlooTransport:
        ids = sorted(ids)
        prefix = f"{self._now.number}/{name}/{','.join(map(str, ids))}/{self._shard.rank}"
        store = PrefixStore(prefix, self._connected())
        store.set_timeout(timedelta(seconds=self.patience))
        try:
            group = ProcessGroupGloo(store, ids.index(self.id), len(ids), timedelta(seconds=self.patience))
            group.set_timeout(timedelta(seconds=self.timeout))
        except (RuntimeError, dist.DistStoreError) as error:
            raise PeersLost(f"no group of replicas {ids} came about: {error}") from error
        return GlooTransport(group)


class _Pulse:
    """Beats for this replica, and listens to the others, on a thread and a connection of its own."""

    def __init__(self, store: Store, own: int | None, patience: float) -> None:
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
            return said != b"gone" and time.monotonic() - self._heard[member][1] < self._patience

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

    def _listen(self, member: int) -> bytes:
        key = f"beat/{member}"
        said: bytes = self._store.get(key) if self._store.check([key]) else b""
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

    def issue(self, op: Op) -> Travelling:
        groups = self._members.groups
        if self._index >= len(groups):
            raise PeersLost("the epoch was left")
        return groups[self._index].issue(op)

    def twin(self) -> MembersTransport:
        return MembersTransport(self._members, self._index + 1)


def serve(port: int, host: str = "0.0.0.0") -> TCPStore:
    """A store for `Members`, served by this process as long as it holds what is returned. 0: any free port.

    Raises ``OSError`` if the port cannot be served.
    """
    try:
        return TCPStore(host, port, is_master=True, wait_for_workers=False)
    except dist.DistNetworkError as error:
        raise OSError(f"port {port} cannot be served: {error}") from error
