"""`dtrain doctor`: who is named for what, on figures of our own making and between real processes."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.cli.doctor import read
from dtrain.doctor import names as names_module
from dtrain.doctor.checks import disk, own_name
from dtrain.doctor.finding import Finding
from dtrain.doctor.names import names
from dtrain.doctor.pairs import Exchange, Server, exchange, rounds
from dtrain.doctor.verdict import Report, findings, render
from dtrain.launchers.failure import Ending, Failure, advice, root_cause

SAME = {"dtrain": "1", "torch": "2"}


def reports(rates: dict[tuple[int, int], float], **skews: float) -> list[Report]:
    """Four hosts with these rates between them."""

    def of(rank: int) -> tuple[Exchange, ...]:
        mine = [(other, rate) for (one, other), rate in rates.items() if one == rank]
        return tuple(Exchange(other, 1.0, rate, skews.get(f"n{other}", 0.0)) for other, rate in mine)

    return [Report(rank, f"n{rank}", SAME, (), of(rank)) for rank in range(4)]


def problems(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.host, finding.check) for finding in found if finding.level != "ok"]


@pytest.mark.parametrize("count", range(2, 10))
def test_every_pair_meets_once_and_nobody_is_in_two_pairs_of_a_round(count: int) -> None:
    assert sorted(itertools.chain(*rounds(count))) == list(itertools.combinations(range(count), 2))
    for pairs in rounds(count):
        hosts = list(itertools.chain(*pairs))
        assert len(hosts) == len(set(hosts))


def test_the_slow_node_is_named_and_nobody_else() -> None:
    rates = {pair: 100.0 if 2 in pair else 950.0 for pair in itertools.combinations(range(4), 2)}
    found = findings(reports(rates), 4)
    assert problems(found) == [("n2", "bandwidth")]
    assert "launcher.exclude=n2" in render(found, reports(rates))


def test_equal_links_are_no_problem_however_slow() -> None:
    rates = dict.fromkeys(itertools.combinations(range(4), 2), 10.0)
    assert problems(findings(reports(rates), 4)) == []
    assert render(findings(reports(rates), 4), reports(rates)).endswith("no problems found")


def test_a_clock_that_is_off_is_a_warning() -> None:
    rates = dict.fromkeys(itertools.combinations(range(4), 2), 10.0)
    found = findings(reports(rates, n3=-7.0), 4)
    assert {finding.what for finding in found if finding.check == "clock"} == {"the clock of n3 is -7.0 s off"}


def test_a_rank_without_a_report_and_a_node_with_other_versions_are_named() -> None:
    (first, second, *_) = reports({})
    other = Report(2, "n2", {"dtrain": "1", "torch": "3"}, (), (Exchange(1, error="n1:5: timed out"),))
    found = findings([first, second, other], 4)
    assert problems(found) == [("rank 3", "report"), ("n2", "versions"), ("n2", "pair with n1")]


def test_an_exchange_measures_latency_rate_and_clock() -> None:
    server = Server()
    try:
        found = exchange(1, "127.0.0.1", server.port)
    finally:
        server.close()
    assert found.error == "" and found.latency_ms > 0 and found.mbit > 0 and abs(found.skew_seconds) < 1


def test_a_host_that_does_not_answer_is_a_finding() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "refused" in exchange(3, "127.0.0.1", port).error.lower()


def test_a_name_that_does_not_resolve_is_a_problem_with_a_way_out() -> None:
    (found,) = own_name("no-such-host.invalid")
    assert found.level == "problem" and "/etc/hosts" in found.way_out


def test_a_name_that_leads_to_the_loopback_stands_in_the_way_of_two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for address in ("127.0.1.1", "203.0.113.7"):  # and one of no machine here: an old entry
        monkeypatch.setattr(socket, "getaddrinfo", NameService({"n0": address}, {}).getaddrinfo)
        (alone,), (two,) = own_name("n0"), own_name("n0", hosts=2)
        assert alone.level == "warning" and "harmless on one machine" in alone.way_out
        assert two.level == "problem" and "set launcher.interface" in two.way_out
        assert render([two], []).endswith("1 problem") and "mind the warning above" in render([alone], [])
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
        (chosen,) = own_name("n0", hosts=2)
        assert chosen.level == "ok" and "ranks meet by eth0" in chosen.what
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "getaddrinfo", NameService({**HOSTS, "n1": "127.0.1.1"}, {}).getaddrinfo)
    assert names("n0", ["n0", "n1"])[0].level == "problem"


def test_training_that_cannot_connect_names_the_way_out() -> None:
    message = "RuntimeError: Gloo connectFullMesh failed with [...] Connection refused, remote=[127.0.1.1]:40817"
    failure = Failure(0, 1, None, message, "", "n0", Path("rank-0.log"), 1.0, True)
    assert "launcher.interface" in root_cause(Ending("failed", None, 0, (failure,)))
    assert advice("RuntimeError: Connection closed by peer [10.0.0.2]:4711") == ""


def test_a_damaged_report_is_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "doctor").mkdir()
    good = {"rank": 0, "host": "n0", "versions": SAME, "findings": [], "exchanges": []}
    for number, content in enumerate(
        [json.dumps(good), "{", "[]", json.dumps({**good, "findings": [{"level": "bad"}]})]
    ):
        (tmp_path / "doctor" / f"rank-{number}.json").write_text(content)
    found = findings(read(tmp_path), 4)
    assert problems(found) == [(f"rank {rank}", "report") for rank in (1, 2, 3)]


def test_a_folder_that_cannot_be_written_to_is_a_problem(tmp_path: Path) -> None:
    found = list(disk("here", Path("/proc")))
    assert found[-1].level == "problem" and "choose another run.dir" in found[-1].way_out
    assert [finding.level for finding in disk("here", tmp_path)][1] in ("ok", "warning")
    assert list(tmp_path.iterdir()) == []


class NameService:
    """Two tables: name -> address, and address -> names. Told to `socket` in place of the machine's own."""

    def __init__(self, forward: dict[str, str], back: dict[str, list[str]]) -> None:
        self._forward, self._back = forward, back

    def getaddrinfo(self, name: str, *_: object) -> list[tuple[object, ...]]:
        if name not in self._forward:
            raise socket.gaierror(-2, "Name or service not known")
        return [(None, None, None, "", (self._forward[name], 0))]

    def gethostbyaddr(self, address: str) -> tuple[str, list[str], list[str]]:
        if address not in self._back:
            raise socket.herror(1, "Unknown host")
        official, *aliases = self._back[address]
        return official, aliases, [address]


HOSTS = {"n0": "10.0.0.1", "n1": "10.0.0.2"}


@pytest.mark.parametrize(
    ("back", "more", "level", "said"),
    [
        ({"10.0.0.1": ["n0"], "10.0.0.2": ["n1.site.example"]}, {}, "ok", "2 lead back"),
        ({"10.0.0.1": ["node0", "n0"], "10.0.0.2": ["n1"]}, {}, "ok", "2 lead back"),
        # A second name of the same host, as sites have for another network.
        ({"10.0.0.1": ["n0"], "10.0.0.2": ["n1i"]}, {"n1i": "10.0.0.2"}, "ok", "2 lead back"),
        ({"10.0.0.1": ["n0"]}, {}, "warning", "no name for 10.0.0.2 (n1)"),
        ({"10.0.0.1": ["n0"], "10.0.0.2": ["n0"]}, {}, "problem", "n1 is 10.0.0.2, but 10.0.0.2 is n0"),
        (
            {"10.0.0.1": ["n0"], "10.0.0.2": ["old"]}, {"old": "10.0.0.9"}, "problem",
            "n1 is 10.0.0.2, but 10.0.0.2 is old",
        ),
        ({"10.0.0.1": ["n0"], "10.0.0.2": ["nowhere"]}, {}, "ok", "2 lead back"),
    ],
)  # fmt: skip
def test_an_address_that_leads_back_to_another_host_is_a_problem_and_one_without_a_name_a_warning(
    back: dict[str, list[str]], more: dict[str, str], level: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = NameService({**HOSTS, **more}, back)
    monkeypatch.setattr(socket, "getaddrinfo", service.getaddrinfo)
    monkeypatch.setattr(socket, "gethostbyaddr", service.gethostbyaddr)
    forward, reverse = names("n0", ["n0", "n1"])
    assert forward.level == "ok" and (reverse.check, reverse.level, reverse.what) == ("reverse names", level, said)
    assert bool(reverse.way_out) == (level != "ok")


def test_the_loopback_leads_back_to_nobody_in_particular(monkeypatch: pytest.MonkeyPatch) -> None:
    service = NameService({"n0": "127.0.1.1"}, {"127.0.1.1": ["localhost"]})
    monkeypatch.setattr(socket, "getaddrinfo", service.getaddrinfo)
    monkeypatch.setattr(socket, "gethostbyaddr", service.gethostbyaddr)
    assert [finding.level for finding in names("n0", ["n0"])] == ["ok", "ok"]


def test_a_name_server_that_does_not_answer_is_not_waited_for_at_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_module, "PATIENCE_SECONDS", -1.0)
    monkeypatch.setattr(socket, "getaddrinfo", NameService(HOSTS, {}).getaddrinfo)
    found = names("n0", ["n0", "n1"])[-1]
    assert (found.level, found.what) == ("warning", "look-ups take so long that 2 of 2 were left out")


def test_names_that_do_not_resolve_are_a_problem_and_the_others_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    service = NameService(HOSTS, {"10.0.0.1": ["n1"]})
    monkeypatch.setattr(socket, "getaddrinfo", service.getaddrinfo)
    monkeypatch.setattr(socket, "gethostbyaddr", service.gethostbyaddr)
    assert [finding.what for finding in names("n0", ["n0", "n1", "n2"]) if finding.level == "problem"] == [
        "n2 do not resolve", "n0 is 10.0.0.1, but 10.0.0.1 is n1",
    ]  # fmt: skip


@pytest.mark.processes
def test_this_machine_is_checked_and_told_as_json(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", "doctor", "--json", f"run.dir={tmp_path / 'run'}"], capture_output=True,
        text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"port", "interface", "disk space", "disk write", "backend"} <= {
        one["check"] for one in json.loads(done.stdout)
    }
