"""Where ranks of one machine meet: only there, anew for each attempt, and without anything that is unpickled."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import psutil
import pytest

from dtrain.launchers import rendezvous as meeting
from dtrain.launchers.elastic_agent import launch

LISTENERS = """
import json, os, sys
import psutil

def listeners(process):
    return [list(c.laddr) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]

attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
found = {"ours": listeners(psutil.Process(int(os.environ["DTRAIN_LAUNCHER_PID"])))}
found |= {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")}
open(sys.argv[1] + "/" + attempt + ".json", "w").write(json.dumps(found))
sys.exit(attempt == "0")
"""


@pytest.mark.processes
def test_a_machine_alone_has_one_listener_on_loopback_for_each_attempt(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(LISTENERS)
    command = [sys.executable, "-u", str(tmp_path / "worker.py"), str(tmp_path)]
    before = listeners()  # of tests that came earlier in this process
    ending = launch(
        command, workers=1, log_folder=tmp_path / "logs", max_restarts=1, grace_seconds=5, threads_per_worker=1
    )
    assert (ending.kind, ending.restarts) == ("finished", 1)
    attempts = [json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1)]
    for found in attempts:
        new = {(address, port) for address, port in found["ours"]} - before
        assert new == {(found["MASTER_ADDR"], int(found["MASTER_PORT"]))}
        assert (found["MASTER_ADDR"], found["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
    assert attempts[0]["MASTER_PORT"] != attempts[1]["MASTER_PORT"], "an attempt would read what the one before wrote"
    assert listeners() <= before


def listeners() -> set[tuple[str, int]]:
    """Where this process listens."""
    return {
        (c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN
    }


def test_ranks_of_one_machine_meet_on_loopback_whatever_its_name_means() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "0"}
    store = meeting.of_environment(place)["store"]
    assert place["GLOO_SOCKET_IFNAME"] == place["NCCL_SOCKET_IFNAME"] == "lo"
    assert addresses_of(store.port) == {socket.inet_aton("127.0.0.1")[::-1].hex().upper()}
    peer = meeting.of_environment({**place, "RANK": "1", "MASTER_PORT": str(store.port)})["store"]
    peer.set("here", "1")
    assert store.get("here") == b"1"


def test_the_store_of_an_agent_is_left_to_torch() -> None:
    assert meeting.of_environment({"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}) == {}
    assert meeting.of_environment({}) == {}


def test_an_address_that_others_know_by_another_name_is_not_listened_at_alone() -> None:
    assert meeting._where("127.0.1.1") == meeting.EVERYWHERE
    assert meeting._where("192.0.2.1") == meeting.EVERYWHERE  # an address that nobody has


def addresses_of(port: int) -> set[str]:
    """Where this machine listens at ``port``, as the kernel writes addresses."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [row[1].partition(":") for row in rows if row[3] == "0A"]
    return {address for address, _, number in listening if int(number, 16) == port}
