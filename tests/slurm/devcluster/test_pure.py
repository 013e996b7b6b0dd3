"""What needs no cluster: rates, latencies, names, the configuration of Slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtrain.slurm.devcluster import state
from dtrain.slurm.devcluster.cluster import up
from dtrain.slurm.devcluster.daemons import slurm_conf
from dtrain.slurm.devcluster.state import ClusterError, Facts, Rate, named, parse_latency, parse_rate

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
    ],
)
def test_a_cluster_that_cannot_be_is_refused_before_anything_is_made(how: dict[str, str | int], words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        up(**how)  # type: ignore[arg-type]  # what a careless caller would pass


def test_the_configuration_of_slurm_is_the_golden_one() -> None:
    text = slurm_conf("dev", Path("/run/dtrain/dev"), ADDRESSES)
    if os.environ.get("DTRAIN_REWRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_facts_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "ROOT", tmp_path)
    (tmp_path / "dev").mkdir()
    facts = Facts("dev", ("c1",), ADDRESSES, {"login": 1}, {"c1": 10**9, "login": None}, cut=("c1",))
    facts.write()
    assert Facts.read("dev") == facts


def test_the_cluster_that_is_meant_must_be_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "ROOT", tmp_path)
    with pytest.raises(ClusterError, match=r"no cluster is up \(up: none\); start one with: dtrain cluster up"):
        named(None)
    monkeypatch.setattr(Facts, "alive", True)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Facts(name, ("c1",), ADDRESSES, {"login": 1}, {"c1": None}).write()
    with pytest.raises(ClusterError, match=r"several clusters are up \(one, two\)"):
        named(None)
    assert named("two").name == "two"
    with pytest.raises(ClusterError, match=r"no cluster three is up \(up: one, two\)"):
        named("three")


def test_a_crashed_cluster_is_not_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "ROOT", tmp_path)
    (tmp_path / "dev").mkdir()
    Facts("dev", ("c1",), ADDRESSES, {"login": os.getpid()}, {"c1": None}).write()  # a number that is another's now
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "cluster.json").write_text("{")
    assert state.running() == []
