"""Sweeps of the clock: which cells words mean, what a calibration gives, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

import dtrain
from dtrain.bench.fit import predict
from dtrain.bench.hook_rows import HookRow
from dtrain.cli.main import main
from dtrain.comm.clock.network import Level, Link, Network
from dtrain.comm.clock.wire import Wire
from dtrain.errors import ConfigError
from dtrain.simulation.calibration import OPS, _op, calibrated, slower_and_faster
from dtrain.simulation.sweep import Row, simulated
from dtrain.simulation.table import head, line, summary
from dtrain.simulation.words import cells
from tests.bench.samples import sample

MODEL = ("parameters=4m", "layers=4", "step_seconds=0.5")
SIZES = (4_000, 100_000, 1_000_000, 4_000_000, 16_000_000)


def rows(*words: str) -> list[Row]:
    return list(simulated([*MODEL, *words])[0])


def swept(latency: float, rate: float, world: int = 2) -> list[object]:
    """Rows as the model itself has them."""
    wire, found = Wire(Network((Level("nodes", world, Link(rate, rate, latency, latency)),))), []
    for op in OPS:
        for size in SIZES:
            wire.busy.clear()
            seconds = wire.carry(_op(op, size, world), world, 0.0)
            found.append(sample(op=f"comm.{op}", world=world, bytes=size, p50_ms=seconds * 1e3))
    return found  # type: ignore[return-value]


def test_words_that_are_given_several_times_are_swept_over() -> None:
    made = cells([*MODEL, "link=10mbit..50mbit,40ms", "nodes=2", "nodes=8", "sync=dense"])
    assert [(cell.swept["link"], cell.network.size) for cell in made] == [
        (link, nodes) for link in ("10mbit,40ms", "20mbit,40ms", "40mbit,40ms", "50mbit,40ms") for nodes in (2, 8)
    ]
    assert made[0].network.levels[0].link == Link(1.25e6, 1.25e6, 0.04, 0.04)
    assert made[0].configured == ("sync=dense",)


def test_utilization_rises_with_the_rate_and_with_the_period() -> None:
    by_rate = [row.utilization for row in rows("link=1mbit..64mbit,5ms", "nodes=2", "sync=diloco", "compress=none")]
    assert by_rate == sorted(by_rate) and by_rate[0] < by_rate[-1]
    words = ("link=10mbit,5ms", "nodes=2", "sync=local_sgd", "sync.every_steps=5", "sync.every_steps=50")
    seldom_last = [row.utilization for row in rows(*words)]
    assert seldom_last[0] < seldom_last[1]
    ring = [row.step_seconds for row in rows("link=10mbit,5ms", "backend=ring", "nodes=2..8", "sync=dense")]
    assert ring == sorted(ring)


def test_tokens_last_as_long_as_the_steps_take() -> None:
    (row,) = rows("link=1gbit", "nodes=4", "sync=dense", "tokens=1b", "tokens_per_step=1m")
    assert row.tokens_per_second == pytest.approx(4e6 / row.step_seconds)
    assert row.hours == pytest.approx(1e9 / row.tokens_per_second / 3600)


def test_failures_and_stragglers_cost_goodput() -> None:
    words = ("link=1gbit,1ms", "nodes=8", "sync=diloco", "sync.every_steps=10", "restart_seconds=60")
    (undisturbed,) = rows(*words)
    (restart,), (members,), (slow,) = (
        rows(*words, *more)
        for more in (
            ("failures_per_hour=24", "steps=600"),
            ("failures_per_hour=24", "steps=600", "policy=members"),
            ("slow=1x1.5",),
        )
    )
    assert restart.failures > 0 and members.failures > 0
    assert restart.goodput < members.goodput < undisturbed.goodput
    assert slow.step_seconds == pytest.approx(0.75, rel=0.01)


def test_a_calibration_gives_back_what_the_rows_were_made_of() -> None:
    found = calibrated(swept(0.005, 1e7))  # type: ignore[arg-type]
    assert found.link.latency == pytest.approx(0.005, rel=1e-3)
    assert found.link.rate == pytest.approx(1e7, rel=1e-3)
    assert found.error < 1e-3 and found.world == 2
    assert set(found.links) == {"AllReduce", "AllGather", "AllToAll"}
    four = predict("all_reduce", 4, 1_000_000, 0.005, 1e-7)
    network = Network((Level("nodes", 4, found.link),), measured=found.links)
    assert Wire(network).carry(_op("all_reduce", 1_000_000, 4), 4, 0.0) == pytest.approx(four, rel=1e-3)


def test_a_wider_spread_of_the_rows_is_a_wider_interval(tmp_path: Path) -> None:
    measured = swept(0.002, 2e6)
    noisy = [dataclasses.replace(row, p50_ms=row.p50_ms * (1.1 if number % 2 else 0.9))  # type: ignore[type-var, attr-defined]
             for number, row in enumerate(measured)]  # fmt: skip
    found = []
    for name, those in (("exact", measured), ("noisy", noisy)):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in those)  # type: ignore[call-overload]
        (tmp_path / name / "rows.jsonl").write_text(text)
        found += rows(f"calibrate={tmp_path / name}", "nodes=2", "nodes=4", "sync=dense")
    exact, _, wide, beyond = found
    assert exact.step_seconds_low == pytest.approx(exact.step_seconds_high, rel=1e-2)
    assert wide.step_seconds_low < wide.step_seconds < wide.step_seconds_high
    assert wide.utilization_low < wide.utilization < wide.utilization_high
    assert not wide.extrapolated and "2 ranks" in beyond.extrapolated
    assert "extrapolated" in line(beyond) and any("extrapolated" in text for text in summary(found, ()))


def test_encoding_takes_the_time_that_was_measured() -> None:
    def hook(share: float) -> HookRow:
        base = dataclasses.asdict(sample(op="int8_ef", world=2, bytes=4_000_000, p50_ms=100.0))
        return HookRow(**base, wire_bytes=1, error=0.0, encode=share / 2, exchange=1 - share, decode=share / 2)

    slow, fast = (calibrated(swept(0.001, 1e8), [hook(share)]).rate_of("int8_ef") for share in (0.5, 0.1))  # type: ignore[arg-type]
    assert fast == pytest.approx(5 * slow)
    assert calibrated(swept(0.001, 1e8)).rate_of("int8_ef") == float("inf")  # type: ignore[arg-type]


def test_links_are_worse_and_better_by_the_error() -> None:
    network = Network((Level("nodes", 2, Link(1e6, 1e6, 0.01, 0.01)),))
    worse, better = slower_and_faster(network, 0.25)
    assert worse.levels[0].link.rate == 8e5 and better.levels[0].link.rate == pytest.approx(1e6 / 0.75)
    assert (worse.levels[0].link.latency, better.levels[0].link.latency) == (0.0125, 0.0075)


def test_the_command_prints_a_table_and_writes_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sweep"
    words = ["link=10mbit,40ms", "link=1gbit,40ms", "sites=2", "sync=dense", f"run.dir={folder}", *MODEL]
    assert main(["simulate", *words]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == head(["link"]) and printed[1].startswith("10mbit,40ms") and printed[2].startswith("1gbit,40ms")
    content = json.loads((folder / "simulation.json").read_text())
    assert [row["swept"] for row in content["rows"]] == [{"link": "10mbit,40ms"}, {"link": "1gbit,40ms"}]
    assert content["rows"][0]["utilization"] < content["rows"][1]["utilization"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("link=0mbit", "nodes=2"), "carries nothing"),
        (("link=1mbit,-2ms", "nodes=2"), "cannot be"),
        (("nodes=2",), "what are the links"),
        (("link=1mbit",), "how many replicas"),
        (("link=1mbit", "nodes=2", "calibrate=here"), "has no rows"),
        (("link=1mbit", "nodes=2", "step_second=2"), "did you mean step_seconds"),
        (("link=1mbit", "nodes=2", "engine=fsdp2"), "did you mean fsdp"),
        (("link=1mbit", "nodes=2", "tokens=1b"), "tokens_per_step"),
        (("link=1mbit", "nodes=2", "slow=half"), "RANKSxFACTOR"),
        (("link=1mbit", "nodes=2", "jitter=-1"), "from 0 on"),
        (("link=1mbit", "nodes=2", "steps=2.5"), "whole number"),
        (("link=1mbit", "nodes=2", "failures_per_hour=1", "policy=hope"), "choose restart or members"),
        (("link=1mbit", "nodes=2", "sync=dense", "failures_per_hour=1", "policy=members"), "policy=restart"),
        (("link=1mbit", "nodes=2", "sync=every_step", "sync.lossless=3"), "lossless codes values"),
        (("link=1mbit", "nodes=2", "sync=dilocco"), "dilocco"),
        (("link=9mbit..1mbit", "nodes=2"), "begins behind its end"),
        (("link=1mbit", "nodes=2", "order=chaos"), "choose program"),
        (("link=1mbit", *(f"nodes={n}" for n in range(1, 60)), *(f"seed={n}" for n in range(60))), "cells"),
    ],
)
def test_what_cannot_be_is_refused_in_words(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        rows(*words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("parameters=1m",), "step_seconds"),
        (("step_seconds=1",), "what is the model"),
        (("step_seconds=1", "shapes=nowhere.json"), "No such file"),
        (("step_seconds=1", "parameters=1m", "backward=1.5"), "share in"),
    ],
)
def test_a_step_that_is_none_is_refused(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        list(simulated(["link=1mbit", "nodes=2", *words])[0])


def test_invalid_rows_and_rows_of_several_worlds_calibrate_nothing() -> None:
    with pytest.raises(ConfigError, match=r"invalid \(foreign CPU\)"):
        calibrated([sample(invalid="foreign CPU")])
    with pytest.raises(ConfigError, match="one number of them"):
        calibrated([sample(world=2), sample(world=4)])
    with pytest.raises(ConfigError, match="three sizes"):
        calibrated([sample(world=2)])


@pytest.mark.parametrize("page", ["README.md", "docs/simulate.md"])
def test_commands_of_the_docs_are_words(page: str) -> None:
    text = Path(page).read_text()
    commands = [line.strip(" `|") for line in re.findall(r"dtrain simulate [^`|\n]*=[^`|\n]*", text)]
    assert commands
    for command in commands:
        words = command.split()[2:]
        assert cells([word for word in words if not word.startswith("calibrate=")])


def test_the_verb_does_not_hide_the_function_of_its_name() -> None:
    assert callable(dtrain.simulate)


def test_shapes_are_read_from_an_export(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"layers.0.w": torch.zeros(3, 2), "head": torch.zeros(5)}, tmp_path / "model.safetensors")
    words = ["link=1mbit", "nodes=2", f"shapes={tmp_path / 'model.safetensors'}", "step_seconds=1", "sync=dense"]
    (cell,) = cells(words)
    assert {parameter.fqn: parameter.shape for parameter in cell.asked.step().parameters} == {
        "layers.0.w": (3, 2), "head": (5,)
    }  # fmt: skip
