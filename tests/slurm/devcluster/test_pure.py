"""What needs no cluster: rates, latencies, names, the configuration of Slurm."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from dtrain.cli.main import main
from dtrain.slurm.devcluster import cluster, daemons, links, state
from dtrain.slurm.devcluster.cluster import down, up
from dtrain.slurm.devcluster.daemons import slurm_conf
from dtrain.slurm.devcluster.state import (
    BadRequest,
    ClusterError,
    Facts,
    Rate,
    explained,
    locked,
    named,
    parse_latency,
    parse_rate,
)

GOLDEN = Path(__file__).with_name("golden") / "slurm.conf"
ADDRESSES = {"c1": "10.66.0.1", "c2": "10.66.0.2", "login": "10.66.0.254"}


@pytest.mark.parametrize(
    ("text", "bits"), [("1gbit", 10**9), ("100mbit", 10**8), ("2.5mbit", 2_500_000), ("64kbit", 64_000), ("none", None)]
)
def test_rates_are_read_and_written(text: str, bits: int | None) -> None:
    assert parse_rate(text) == Rate(bits) and parse_rate(str(parse_rate(text))) == Rate(bits)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fast", "write 50mbit"), ("100", "is no bandwidth"), ("10gbit", "above 2gbit the processor is the limit"),
        ("1kbit", "Slurm itself"),
    ],
)  # fmt: skip
def test_rates_that_cannot_be_had_are_refused(text: str, words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        parse_rate(text)


@pytest.mark.parametrize(("text", "seconds"), [("10ms", 0.01), ("0.5ms", 0.0005), ("1s", 1.0), ("none", 0.0)])
def test_latencies_are_read(text: str, seconds: float) -> None:
    assert parse_latency(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["10", "ms", "5s", "-1ms"])
def test_latencies_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ClusterError):
        parse_latency(text)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"name": "Two words"}, "at most 8 letters and digits"),
        ({"name": "far-too-long"}, "at most 8"),
        ({"nodes": 0}, "1 to 64 hosts"),
        ({"bandwidth": "1tbit"}, "is no bandwidth"),
        ({"latency": "1h"}, "is no latency"),
        ({"cpus_per_node": 0}, "a host has 1 at least"),
        ({"kill_wait": -1}, "0 to 65533 seconds"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_before_anything_is_made(how: dict[str, str | int], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        up(**how)  # type: ignore[arg-type]  # what a careless caller would pass


def test_the_configuration_of_slurm_is_the_golden_one() -> None:
    text = slurm_conf("dev", Path("/run/dtrain/dev"), ADDRESSES)
    if os.environ.get("DTRAIN_REWRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_facts_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "ROOT", tmp_path)
    (tmp_path / "dev").mkdir()
    facts = Facts("dev", ("c1",), ADDRESSES, {"login": 1}, {**dict.fromkeys(ADDRESSES), "c1": 10**9}, cut=("c1",))
    facts.write()
    assert Facts.read("dev") == facts


def test_the_cluster_that_is_meant_must_be_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "ROOT", tmp_path)
    with pytest.raises(ClusterError, match=r"no cluster is up \(up: none\); start one with: dtrain cluster up"):
        named(None)
    monkeypatch.setattr(Facts, "alive", True)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Facts(name, ("c1",), ADDRESSES, {"login": 1}, dict.fromkeys(ADDRESSES)).write()
    with pytest.raises(ClusterError, match=r"several clusters are up \(one, two\)"):
        named(None)
    assert named("two").name == "two"
    with pytest.raises(ClusterError, match=r"no cluster three is up \(up: one, two\)"):
        named("three")


def test_a_crashed_cluster_is_not_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "ROOT", tmp_path)
    (tmp_path / "dev").mkdir()
    pids = {"login": os.getpid()}  # a number that is another's now
    Facts("dev", ("c1",), ADDRESSES, pids, dict.fromkeys(ADDRESSES)).write()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "cluster.json").write_text("{")
    assert state.running() == []


# ---- what fails, and how it is told ---------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that lacks nothing and has no namespaces; its kernel's setting is a file. Returns that file."""
    allowed = tmp_path / "allowed"
    allowed.write_text("reno bbr")
    monkeypatch.setattr(state, "ROOT", tmp_path / "run")
    monkeypatch.setattr(links, "ALLOWED", allowed)
    monkeypatch.setattr(links, "namespaces", lambda _: [])
    monkeypatch.setattr(daemons, "check_machine", lambda **_: None)
    return allowed


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["up", "--nodes", "0"], 2, "1 to 64 hosts"),
        (["up", "word"], 2, "word: not understood"),
        (["down", "--name", "none"], 2, "there is no cluster none"),
    ],
)
def test_bad_input_is_exit_code_2(
    words: list[str], code: int, said: str, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", *words]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NetlinkError(17, "File exists"), "cluster dev did not start: .*File exists"),
        (PermissionError(1, "Operation not permitted"), "Operation not permitted.*; run it (as root|in a container)"),
        (subprocess.TimeoutExpired(["sinfo", "-N"], 30), "no end within 30 s of: sinfo -N"),
        (ClusterError("slurmctld did not start: why"), "slurmctld did not start: why"),
    ],
)
def test_what_fails_on_the_way_is_exit_code_1_told_in_a_line_and_taken_down(
    error: Exception, said: str, machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(links, "create", fail)
    assert main(["cluster", "up"]) == 1
    told = capsys.readouterr().err
    assert re.search(said, told) and told.startswith("dtrain: error: ") and told.count("\n") == 1
    assert not state.ROOT.exists() and machine.read_text() == "reno bbr"


def test_a_name_that_is_taken_is_refused_and_left_alone(machine: Path) -> None:
    (state.ROOT / "dev").mkdir(parents=True)
    with pytest.raises(BadRequest, match="cluster dev is up, or left something behind: dtrain cluster down"):
        up()
    assert (state.ROOT / "dev").is_dir()


def test_one_of_a_process_that_has_ended_is_inherited_once_and_one_of_a_living_process_is_not(machine: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as owner:
        cluster._take("dev")
        (state.ROOT / "dev" / cluster.OWNER).write_text(f"{owner.pid} {state._began(owner.pid)}")
        assert not cluster._inherit("dev")
        owner.kill()
        owner.wait()
    assert [cluster._inherit("dev"), cluster._inherit("dev")] == [True, False]
    with pytest.raises(BadRequest, match="cluster dev is up"):
        up()
    assert not cluster._inherit("none")


def test_a_process_is_told_from_one_that_got_its_number_later_and_from_a_zombie() -> None:
    assert state.alive(state.this_process())
    assert not state.alive(f"{os.getpid()} 1") and not state.alive(str(os.getpid())) and not state.alive("")
    with subprocess.Popen(["true"]) as ending:
        named = f"{ending.pid} {state._began(ending.pid)}"
        os.waitid(os.P_PID, ending.pid, os.WEXITED | os.WNOWAIT)
        assert not state.alive(named)


def test_a_folder_that_cannot_be_removed_is_told(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (state.ROOT / "dev").mkdir(parents=True)

    def refuse(path: Path, **_: object) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(ClusterError, match=r"cannot take cluster dev down: .*busy.*run/dev"):
        down("dev")


def test_an_up_that_fails_and_cannot_be_taken_down_tells_both(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(links, "create", fail)
    monkeypatch.setattr(links, "remove", fail)
    with pytest.raises(ClusterError, match=r"did not start: .*No space.*not all gone: cannot take cluster dev down"):
        up()


def test_a_daemon_that_never_gets_ready_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemons, "enter", lambda *_, **__: ["sleep", "10"])
    monkeypatch.setattr(daemons, "SECONDS", 0.1)
    (tmp_path / "munged.log").write_text("error: no entropy\n")
    with pytest.raises(ClusterError, match=r"munged was not ready after 0.1 s \(munged: error: no entropy\)"):
        daemons.start(tmp_path, {"login": 1}, [])


def test_latency_without_a_tun_device_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemons, "TUN", Path("/dev/net/none"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: name)
    daemons.check_machine()
    with pytest.raises(BadRequest, match=r"No such file.*modprobe tun.*or leave out --latency"):
        daemons.check_machine(tun=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces are root's")
def test_links_that_are_gone_are_told_and_not_made_again() -> None:
    facts = Facts("gone", ("c1",), ADDRESSES, {}, {"c1": None, "login": None})
    with pytest.raises(ClusterError, match="the network namespace dtrain-gone-c1 is gone"):
        links.shape("dtrain-gone-switch", links.namespace(facts.name, "c1"), "c1", Rate(None))
    assert links.namespaces("gone") == []


def test_errors_that_are_not_the_systems_are_left_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError), explained("counting"):
        print(1 / 0)


def test_several_clusters_and_no_name_is_bad_input_to_every_command(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Facts, "alive", True)
    for name in ("one", "two"):
        (state.ROOT / name).mkdir(parents=True)
        Facts(name, ("c1",), ADDRESSES, {"login": 1}, dict.fromkeys(ADDRESSES)).write()
    assert main(["cluster", "status"]) == 2
    assert "several clusters are up (one, two)" in capsys.readouterr().err


# ---- what clusters share ---------------------------------------------------------------------------------------------


def test_the_kernels_setting_is_put_back_by_the_last_cluster(machine: Path) -> None:
    cluster._take("one")
    cluster._take("two")
    assert machine.read_text() == "reno bbr cubic"
    down("one")
    assert machine.read_text() == "reno bbr cubic"
    down("two")
    assert machine.read_text() == "reno bbr" and not state.ROOT.exists()


def _come_and_go(name: str, times: int) -> None:
    """A cluster without daemons and links; at no time while it is up may the setting be gone."""
    for _ in range(times):
        cluster._take(name)
        assert "cubic" in links.ALLOWED.read_text().split()
        down(name)


@pytest.mark.processes
def test_clusters_that_come_and_go_at_once_do_not_take_the_setting_from_each_other(machine: Path) -> None:
    together = multiprocessing.get_context("fork")
    ones = [together.Process(target=_come_and_go, args=(name, 150)) for name in ("one", "two", "three")]
    for one in ones:
        one.start()
    for one in ones:
        one.join(50)
    assert [one.exitcode for one in ones] == [0, 0, 0]
    assert machine.read_text() == "reno bbr" and not state.ROOT.exists()


def test_the_lock_is_held_by_one_at_a_time_and_removed_folders_are_made_again(machine: Path) -> None:
    with locked():
        state.ROOT.rmdir()
    with locked():
        assert state.ROOT.is_dir()
