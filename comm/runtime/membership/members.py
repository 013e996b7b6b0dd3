"""Membership of the replicate axis in an elastic run: agreed upon in a store, with process groups for each epoch.

    a replica       writes a heartbeat to the store every second, and its position to enter the next epoch
    an epoch        a list of members that all of them read from the store, and process groups between them
    the next one    begins where a member is lost or a newcomer waits: once every old member has written its position
                    or its heartbeat has stopped, whoever sees that first writes the list

There is no leader: any replica may be lost at any time. The store may not; it is a process of its own (`serve`). It
serves only clients that share its secret (`secret`), and what it returns is validated nevertheless: a record that no
replica can have written is ignored. The gloo groups do not check the secret: see docs/security.md.
A replica has an id, never used twice, and a slot, its share of the data, which the next newcomer gets when it is free.
With a shard axis the first rank of a replica writes for it, and all of them read.
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

import torch.distributed as dist

from dtrain.comm.ops import Op, Place
from dtrain.comm.runtime.membership.reachability import reach
from dtrain.comm.runtime.membership.secret import made_secret, read_secret
from dtrain.comm.runtime.membership.store_client import GuardedStore, Line
from dtrain.comm.runtime.membership.store_server import StoreServer
from dtrain.comm.torch_private import gloo_group
from dtrain.comm.transports.gloo import GlooTransport, PeersLost
from dtrain.comm.transports.transport import Work

log = logging.getLogger(__name__)

BEAT_SECONDS, POLL_SECONDS = 1.0, 0.05
WARN_SECONDS = 5.0
"""A newcomer that has waited for so long logs what it waits for."""
CONNECT_SECONDS = 60.0
AXES = 2  # exchanges that overlap inner steps have one of their own
NOBODY = -1
MOST_MEMBERS, MOST_STEPS = 1 << 20, 1 << 53
INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class Epoch:
    """Its members: ``slots`` by id. ``donor``: the one whose state those that are ``behind`` copy, or NOBODY."""

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
            fields = json.loads(text)
            slots = {int(number): _within(slot, 0, MOST_MEMBERS) for number, slot in fields["slots"].items()}
            behind = tuple(_within(member, 0, MOST_MEMBERS) for member in fields["behind"])
            epoch = cls(
                _within(fields["number"], 0, MOST_STEPS), slots, _within(fields["donor"], -1, MOST_MEMBERS), behind
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no record of an epoch: {text[:100]!r}") from error
        valid = all(0 <= member < MOST_MEMBERS for member in slots) and {*behind, epoch.donor} <= {NOBODY, *slots}
        if not valid or len({*slots.values()}) < len(slots) or (behind and epoch.donor == NOBODY):
            raise ValueError(f"no record of an epoch: {text[:100]!r}")
        return epoch


def _within(value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r:.100} is no number from {least} to {most}")
    return value


def propose(number: int, before: Epoch | None, ready: Mapping[int, int], alive: Callable[[int], bool],
            wanted: int) -> Epoch | None:  # fmt: skip
    """The next epoch; None while it cannot be decided. ``ready``: the positions written for it, by id.

    >>> first = propose(0, None, {0: -1, 1: -1}, lambda number: True, wanted=2)
    >>> first.slots, first.donor
    ({0: 0, 1: 1}, -1)
    >>> propose(1, first, {0: 7, 2: -1}, lambda number: number != 1, wanted=2)
    Epoch(number=1, slots={0: 0, 2: 1}, donor=0, behind=(2,))
    """
    old = before.slots if before is not None else {}
    if any(member not in ready and alive(member) for member in old):
        return None
    present = [member for member in sorted(ready) if alive(member)]
    slots = {member: old[member] for member in present if member in old}
    newcomers = [member for member in present if member not in old]
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
    """What is new in an epoch, as a log message.

    >>> changes(Epoch(0, {0: 0, 1: 1}, -1, ()), Epoch(1, {0: 0, 2: 1}, 0, (2,)))
    'replicas [1] are lost, replicas [2] have come, going on with 2'
    """
    old, new = set(before.slots if before else now.slots), set(now.slots)
    lost = [f"replicas {sorted(old - new)} are lost"] * bool(old - new)
    come = [f"replicas {sorted(new - old)} have come"] * bool(new - old)
    return ", ".join([*lost, *come, f"going on with {len(new)}" if before else f"in, as one of {len(new)}"])


class Members:
    """One rank's membership in an elastic run, for `attach`.

    Args:
        address: "host:port" of the store, see `serve`.
        replicas: how many the first epoch waits for.
        patience_seconds: a replica without a heartbeat for so long is taken for dead.
        timeout_seconds: limit of an exchange, and of a newcomer's wait for an epoch: longer than a round.
        grace_seconds: when others have waited for this replica for so long, it ends its round with the steps that it
            has made; by default they wait.
        run: a name, where one store serves several runs.
        secret_file: holds the secret of the store; see `dtrain.comm.runtime.membership.secret` for the usual places.

    Raises ``ValueError`` for an invalid address and without a secret, ``ConnectionError`` if no store answers within a
    minute or the store has another secret; after five seconds it logs that it waits. Replicas that come or go are
    logged, too.

    ``came_by``: how a newcomer of `one_byte` got its weights: "log" or "weights"; else "".
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

    # ---- for a method ------------------------------------------------------------------------------------------------

    def join(self, shard: Place, from_first: Callable[[int], int]) -> None:
        """Get an id. Every rank of the replica must call it.

        ``shard``: this rank among those of its replica. ``from_first``: gives the number of the first of them to all.
        """
        self._shard, self._from_first = shard, from_first
        self._arrive()

    @property
    def slot(self) -> int:
        """This replica's share of the data."""
        return self._now.slots[self.id]

    @property
    def place(self) -> Place:
        """This replica on the replicate axis; alone before the first epoch."""
        if self.epoch is None:
            return Place(0, 1)
        ids = sorted(self._now.slots)
        return Place(ids.index(self.id), len(ids))

    @property
    def arrivals(self) -> int:
        """How many replicas have joined so far, lost ones included."""
        return self._store.add("arrivals", 0)

    def transport(self) -> MembersTransport:
        """The replicate axis between the members of the present epoch."""
        return MembersTransport(self, 0)

    def called(self, position: int) -> bool:
        """Whether the next epoch begins at ``position``, since a newcomer waits; the same for all members."""
        waiting = [number for number in self._ready(self._now.number + 1) if number not in self._now.slots]
        return bool(self._store.compare_set(self._meeting(position), "", "yes" if waiting else "no") == b"yes")

    def late(self, position: int) -> bool:
        """Whether some member has waited at ``position`` for ``grace_seconds``, as far as this replica has seen."""
        if self.grace == math.inf:
            return False
        assert self._pulse is not None
        return self._pulse.there_for(self._meeting(position)) >= self.grace

    def _meeting(self, position: int) -> str:
        """The key that the first member writes that waits at ``position``."""
        return f"called/{self._now.number}/{position}"

    def first_text(self, text: str) -> str:
        """The ``text`` of the first replica of this run that called this, for this rank's shard."""
        first: bytes = self._store.compare_set(f"text/{self._shard.rank}", "", text)
        return first.decode()

    def position_of(self, member: int) -> int | None:
        """The position that a member wrote to enter this epoch; None if the store has it no more."""
        return self._ready(self._now.number).get(member)

    def leave(self) -> None:
        """Abort this epoch's exchanges, here and thereby at its other members."""
        groups, self.groups = self.groups, []
        for group in groups:
            group.abort()

    def enter(self, position: int) -> Epoch:
        """Wait for the next epoch and make its groups. ``position``: how far this replica is, NOBODY for a newcomer.

        Raises ``PeersLost`` if one of its members is lost meanwhile, or if this replica was taken for dead and must
        join again as a newcomer; ``TimeoutError`` if no epoch with this replica begins.
        """
        self.leave()
        before, since = self.epoch, time.monotonic()
        epoch = self._wait_for_epoch(before.number + 1 if before is not None else 0, before, position, since)
        while before is None and self.id not in epoch.slots:  # a newcomer reads them all
            epoch = self._wait_for_epoch(epoch.number + 1, epoch, position, since)
        self.epoch = epoch
        if self.id not in epoch.slots:
            self.epoch = None
            self._arrive()
            raise PeersLost(f"this replica was silent for {self.patience:g} s and was left out; it comes again")
        assert self._pulse is not None
        self._pulse.watch(epoch.slots, f"epoch/{epoch.number + 1}", self.leave)
        self.groups = [self._group(f"axis{number}", list(epoch.slots)) for number in range(AXES)]
        if self._shard.rank == 0:
            log.warning("replica %d: %s", self.id, changes(before, epoch))
        return epoch

    @contextlib.contextmanager
    def between(self, ids: list[int]) -> Iterator[GlooTransport]:
        """An axis between some members of this epoch, within the block; only those call it."""
        group = self._group("between", ids)
        try:
            yield group
        finally:
            group.abort()

    def close(self) -> None:
        """Leave the run."""
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
        self.id = self._from_first(self._store.add("arrivals", 1) - 1 if self._shard.rank == 0 else 0)
        member = self.id if self._shard.rank == 0 else None
        self._pulse = _Pulse(self._connected(), member, self.patience)

    def _require_same_network(self) -> None:
        """Raise ``ValueError`` if some replicas listen on the loopback interface only, and others on a network."""
        local = self._store.line.local.partition("%")[0]
        loopback = "interface" not in self._device() and ip_address(local).is_loopback
        network = "their own machine" if loopback else "a network"
        first = self._store.compare_set("listen", "", network).decode(errors="replace")
        if first != network:
            raise ValueError(
                f"this replica, with the store at {self.address}, would listen for others on {network}, and they do on "
                f"{first}; give all replicas one address (not localhost for those on the store's machine), or name a "
                f"network interface with {INTERFACE}"
            )

    def _ready(self, number: int) -> dict[int, int]:
        """The positions of those that want to enter epoch ``number``, by id."""
        positions = {}
        for member, position in self._store.under(f"ready/{number}/").items():
            with contextlib.suppress(ValueError):
                positions[_within(int(member), 0, MOST_MEMBERS)] = _within(int(position), NOBODY, MOST_STEPS)
        return positions

    def _wait_for_epoch(self, number: int, before: Epoch | None, position: int, since: float) -> Epoch:
        """Wait for the record of epoch ``number``."""
        key, ready_key = f"epoch/{number}", f"ready/{number}/{self.id}"
        warn_at = since + WARN_SECONDS if before is None else math.inf
        while True:
            record = self._store.look(key) or b""
            with contextlib.suppress(ValueError):
                epoch = Epoch.from_json(record)
                if epoch.number == number:
                    return epoch
            if time.monotonic() - since > self.timeout:
                raise TimeoutError(f"nobody let replica {self.id} in for {self.timeout:g} s; are the others training?")
            if self._shard.rank == 0:
                if self._store.look(ready_key) != str(position).encode():
                    self._store.set(ready_key, str(position))
                self._propose(number, before, record)
                if time.monotonic() > warn_at:
                    warn_at = math.inf
                    log.warning("replica %d waits at %s: %s", self.id, self.address, self._awaited(number))
            time.sleep(POLL_SECONDS)

    def _awaited(self, number: int) -> str:
        """What a newcomer waits for, as a log message."""
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
            group = gloo_group(
                store, ids.index(self.id), len(ids), connect=patience, timeout=timedelta(seconds=self.timeout),
                **self._device(),
            )  # fmt: skip
        except (RuntimeError, dist.DistStoreError) as error:
            raise PeersLost(f"no group of replicas {ids} came about: {error}") from error
        return GlooTransport(group, store)

    def _device(self) -> dict[str, str]:
        """Where groups listen: on the interface that the environment names, else at this rank's address at the store.

        A loopback interface in the environment is ignored: local launchers set it for the ranks within a replica.
        """
        name = os.environ.get(INTERFACE, "").partition(",")[0]
        return {"interface": name} if name not in ("", "lo", "lo0") else {"hostname": self._store.line.local}


class _Pulse:
    """Writes this replica's heartbeat and reads the others', on a thread and a connection of its own."""

    def __init__(self, store: GuardedStore, member: int | None, patience: float) -> None:
        self._store, self._member, self._patience = store, member, patience
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
        """Whether its heartbeat has changed within the time of patience, as far as this replica has read it."""
        with self._lock:
            beat = self._listen(member)
            return beat not in (b"", b"gone") and time.monotonic() - self._heard[member][1] < self._patience

    def watch(self, members: Iterable[int], successor: str, on_end: Callable[[], None]) -> None:
        """Call ``on_end`` once: when one of ``members`` is lost, or the key ``successor`` is there."""
        self._watched, self._successor = [member for member in members if member != self._member], successor
        self._on_end = on_end

    def there_for(self, key: str) -> float:
        """For how many seconds ``key`` has existed, as far as the thread has seen; does not wait for the network."""
        if key != self._key:
            self._key, self._there_since = key, math.inf
        return time.monotonic() - self._there_since

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        if self._member is not None:
            self._store.set(f"beat/{self._member}", "gone")
        self._store.line.close()

    def _listen(self, member: int) -> bytes:
        beat = self._store.look(f"beat/{member}") or b""
        if member not in self._heard or self._heard[member][0] != beat:
            self._heard[member] = beat, time.monotonic()
        return beat

    def _beat(self, count: int) -> None:
        if self._member is not None:
            self._store.set(f"beat/{self._member}", str(count))

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
    """The replicate axis between the members of the present epoch."""

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
        """`Members` closes the groups."""


def serve(port: int, host: str = "127.0.0.1", *, secret_file: str | Path | None = None) -> StoreServer:
    """Serve a store for `Members` from this process, as long as the returned object lives.

    ``port``: 0 for any free one. ``host``: the address to listen at; "0.0.0.0" for all.
    Raises ``OSError`` if the port cannot be served there, ``ValueError`` without a secret that can be read or made.
    """
    try:
        return StoreServer(host, port, made_secret(secret_file))
    except OSError as error:
        raise OSError(f"port {port} cannot be served at {host}: {error}") from error
