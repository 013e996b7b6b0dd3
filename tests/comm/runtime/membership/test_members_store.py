"""The store at which replicas meet: strangers change nothing there, and junk neither ends a replica nor holds it up."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore, TCPStore

from dtrain import Members
from dtrain.comm.ops import Place
from dtrain.comm.runtime.membership import store_server
from dtrain.comm.runtime.membership.members import Epoch, serve
from dtrain.comm.runtime.membership.sealed_messages import (
    MOST_BYTES,
    PROTOCOL,
    Mistrust,
    Sealed,
    _derived,
    answered,
    opened,
)
from dtrain.comm.runtime.membership.secret import made_secret, read_secret, secret_file
from dtrain.comm.runtime.membership.store_client import GuardedStore, Line
from dtrain.comm.runtime.membership.store_server import StoreServer

SECRET = b"a secret of the tests that is long enough"


@pytest.fixture(autouse=True)
def _own_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def server() -> Iterator[StoreServer]:
    served = StoreServer("127.0.0.1", 0, SECRET)
    yield served
    served.close()


def store_of(server: StoreServer, seconds: float = 10.0) -> GuardedStore:
    return GuardedStore(Line("127.0.0.1", server.port, SECRET, seconds), "run/", timedelta(seconds=seconds))


# ---- it is a store -------------------------------------------------------------------------------------------------


def test_it_does_what_the_stores_of_torch_do(server: StoreServer) -> None:
    store, other = store_of(server), store_of(server).below("group", timedelta(seconds=1))
    store.set("key", "text")
    assert store.get("key") == b"text" and store.look("none") is None and store.check(["key"])
    assert not store.check(["key", "none"]) and not other.check(["key"])
    assert (store.add("count", 2), store.add("count", -5)) == (2, -3)
    for expected, desired in (("", "one"), ("", "two"), ("one", "three"), ("x", "four")):
        reference = HashStore()
        if store.check(["word"]):
            reference.set("word", store.get("word").decode())
        assert store.compare_set("word", expected, desired) == reference.compare_set("word", expected, desired)
        assert store.get("word") == reference.get("word")
    assert store.compare_set("missing", "expected", "desired") == b"expected" and not store.check(["missing"])
    other.set("a", b"\0\1")
    assert store.under("group/") == {"a": b"\0\1"}
    assert store.delete_key("key") and not store.delete_key("key")


def test_who_waits_is_woken_and_a_time_limit_holds(server: StoreServer) -> None:
    store, other = store_of(server), store_of(server)
    threading.Timer(0.2, lambda: other.set("late", "here")).start()
    assert store.get("late") == b"here"
    with pytest.raises(dist.DistStoreError, match="nobody has set never"):
        store.wait(["never"], timedelta(seconds=0.1))
    store.set("still", "usable")


def test_what_a_client_asks_wrongly_ends_nothing(server: StoreServer) -> None:
    store = store_of(server)
    store.set("word", "no number")
    for fields in ([b"unknown"], [b"set", b"key"], [b"add", b"run/word", b"1"], [b"wait"], []):
        with pytest.raises(dist.DistStoreError):
            store.line.ask(*fields)
    assert store.get("word") == b"no number"


# ---- strangers -----------------------------------------------------------------------------------------------------


def test_another_secret_is_told_at_once(server: StoreServer) -> None:
    with pytest.raises(Mistrust, match="another secret"):
        Line("127.0.0.1", server.port, SECRET + b"!", 5.0)


def test_a_store_of_torch_is_told_from_ours_both_ways(server: StoreServer) -> None:
    with pytest.raises((dist.DistNetworkError, dist.DistStoreError, RuntimeError)):
        TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=1)).set("run/key", "junk")
    assert store_of(server).num_keys() == 0
    theirs = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(OSError):
        Line("127.0.0.1", theirs.port, SECRET, 0.5)


@given(st.binary(max_size=200))
def test_whatever_a_stranger_says_nothing_is_kept(said: bytes) -> None:
    data = _kept_after(lambda connection: connection.sendall(said))
    assert data == {}


@given(st.binary(max_size=200), st.booleans())
def test_whatever_follows_the_right_beginning_nothing_is_kept(said: bytes, whole: bool) -> None:
    data = _kept_after(lambda connection: connection.sendall(PROTOCOL + (bytes(32) if whole else b"") + said))
    assert data == {}


def _kept_after(attack: Callable[[socket.socket], None]) -> dict[bytes, bytes]:
    """What a server holds after one connection, without its threads."""
    served = StoreServer.__new__(StoreServer)
    served._secret, served._data, served._changed = SECRET, store_server._Data(), threading.Condition()
    served._strangers, served._known, served._lock = {}, set(), threading.Lock()
    served._warned_at, served._turned_away = float("inf"), 0
    ours, theirs = socket.socketpair()
    with theirs:
        attack(theirs)
        theirs.shutdown(socket.SHUT_WR)
        served._serve(ours)
    return served._data


def test_a_conversation_that_was_recorded_is_worth_nothing_in_another_connection(server: StoreServer) -> None:
    recorded: list[bytes] = []
    with socket.create_connection(("127.0.0.1", server.port)) as connection:

        class Recording:
            def sendall(self, data: bytes) -> None:
                recorded.append(data)
                connection.sendall(data)

            def recv(self, count: int) -> bytes:
                return connection.recv(count)

        sealed = opened(Recording(), SECRET)  # type: ignore[arg-type]
        sealed.send(b"add", b"run/count", b"1")
        assert sealed.receive() == [b"ok", b"1"]
        connection.sendall(recorded[-1])  # once more in the same one
        assert connection.recv(1) == b"", "a message was taken twice"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"".join(recorded))
        connection.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):
                pass
    assert store_of(server).get("count") == b"1"


@pytest.mark.parametrize("at", [0, 3, 4, 20, 36, 40, 60, -1])
def test_a_message_that_was_changed_on_its_way_is_refused(at: int) -> None:
    ours, theirs = socket.socketpair()
    keys = _derived(SECRET, b"up", bytes(64)), _derived(SECRET, b"down", bytes(64))
    with ours, theirs:
        Sealed(ours, keys).send(b"set", b"key", b"a value of some length")
        message = bytearray(theirs.recv(4096))
        message[at] ^= 1
        again, receiver = socket.socketpair()
        with again, receiver:
            again.sendall(message)
            again.shutdown(socket.SHUT_WR)
            with pytest.raises((Mistrust, EOFError)):
                Sealed(receiver, keys[::-1]).receive()


def test_a_length_that_is_too_large_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall((MOST_BYTES + 1).to_bytes(4, "big") + bytes(32))
        with pytest.raises(Mistrust, match="at most"):
            Sealed(ours, (b"", b"")).receive()


def test_a_crowd_that_says_nothing_keeps_nobody_out(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_server, "PROOF_SECONDS", 1.0)
    threads = threading.active_count()  # tests before this one may have left some
    crowd = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3 * store_server.STRANGERS)]
    store = store_of(server)
    store.set("key", "here")
    deadline = time.monotonic() + 20
    while (left := len(server._strangers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == 0, f"{left} strangers are still there"
    for one in crowd:
        one.close()
    assert store.get("key") == b"here" and threading.active_count() < threads + store_server.STRANGERS


def test_both_ends_prove_that_they_know_the_secret() -> None:
    ours, theirs = socket.socketpair()
    found: list[object] = []
    with ours, theirs:
        thread = threading.Thread(target=lambda: found.append(answered(theirs, SECRET)))
        thread.start()
        sealed = opened(ours, SECRET)
        thread.join()
        peer = found[0]
        assert isinstance(peer, Sealed)
        sealed.send(b"", b"\xff", b"x" * 100_000)
        assert peer.receive() == [b"", b"\xff", b"x" * 100_000]


# ---- the secret ----------------------------------------------------------------------------------------------------


def test_a_secret_is_made_once_and_for_its_owner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.umask(0)
    try:
        first = made_secret()
    finally:
        os.umask(old)
    assert first == made_secret() == read_secret() and len(first) == 64
    assert stat.S_IMODE(secret_file().stat().st_mode) == 0o600
    secret_file().chmod(0o640)
    with pytest.raises(ValueError, match=r"mode 0640.*chmod 600"):
        read_secret()
    monkeypatch.setenv("DTRAIN_MEMBERS_SECRET", "x" * 31)
    with pytest.raises(ValueError, match="has 31 characters"):
        read_secret()
    monkeypatch.setenv("DTRAIN_MEMBERS_SECRET", "x" * 32)
    assert read_secret() == made_secret() == b"x" * 32


def test_a_secret_that_is_missing_is_told_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtrain members.*DTRAIN_MEMBERS_SECRET"):
        Members("127.0.0.1:1", replicas=1, secret_file=tmp_path / "none")


# ---- junk of one who knows the secret ------------------------------------------------------------------------------


def test_replicas_listen_where_the_store_sees_them() -> None:
    store, own = serve(0), psutil.Process()
    before = {c.laddr.port for c in own.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    members = Members(f"127.0.0.1:{store.port}", replicas=1, patience_seconds=5, timeout_seconds=30)
    members.join(Place(0, 1), lambda given: given)
    members.enter(-1)
    listening = {c.laddr for c in own.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in listening if address.port not in before} == {"127.0.0.1"}
    members.close()


def test_one_that_others_cannot_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    store = serve(0)
    here = Members(f"127.0.0.1:{store.port}", replicas=2)
    here.join(Place(0, 1), lambda given: given)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    with pytest.raises(ValueError, match=r"their own machine.*not localhost"):
        Members(f"127.0.0.1:{store.port}", replicas=2).join(Place(0, 1), lambda given: given)
    here.close()


JUNK = [b"", b"{}", b"null", b"[]", b"\xff", b"1", b'{"number": 0, "slots": {"0": 0}, "donor": 7, "behind": []}',
        b'{"number": 0, "slots": {"0": 0, "1": 0}, "donor": -1, "behind": []}', b"[" * 100_000,
        b'{"number": 5, "slots": {"0": 0, "1": 1}, "donor": -1, "behind": []}',
        b'{"number": 0, "slots": {"-1": 0}, "donor": -1, "behind": []}']  # fmt: skip


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_junk_neither_ends_nor_holds_up_those_who_meet(junk: bytes) -> None:
    store = serve(0)
    liar = GuardedStore(Line("127.0.0.1", store.port, made_secret(), 5.0), "dtrain/", timedelta(seconds=5))
    liar.add("arrivals", 500_000)
    for key in ("epoch/0", "ready/0/500000", "ready/0/x", "ready/0/7", "beat/500001"):
        liar.set(key, junk)
    found: dict[int, Epoch] = {}

    def meet(number: int) -> None:
        members = Members(f"127.0.0.1:{store.port}", replicas=2, patience_seconds=5, timeout_seconds=30)
        members.join(Place(0, 1), lambda given: given)
        found[number] = members.enter(-1)
        members.close()

    threads = [threading.Thread(target=meet, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 2 and found[0] == found[1] and {*found[0].slots} == {500_000, 500_001}


KEYS = st.sampled_from(["number", "slots", "donor", "behind", "0", "1"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
)


@given(ANYTHING)
def test_a_record_of_an_epoch_is_read_whole_or_refused(content: object) -> None:
    try:
        found = Epoch.from_json(json.dumps(content).encode())
    except ValueError:
        return
    assert Epoch.from_json(found.to_json().encode()) == found and {*found.behind} <= {*found.slots}
