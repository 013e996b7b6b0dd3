"""The planner's words, machines, choices and the command that it ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.cli.main import main
from dtrain.comm.clock.step import Step
from dtrain.errors import ConfigError
from dtrain.plan import planner
from dtrain.plan.describe import describe
from dtrain.plan.fits import Layout, NothingFits, fit, fits
from dtrain.plan.frontier import degrees
from dtrain.plan.ledger import Ledger
from dtrain.plan.losses import Losses
from dtrain.plan.machine import GPUS, Machine, in_order, machine
from dtrain.plan.memory import optimizer_memory
from dtrain.plan.question import asked
from dtrain.plan.sync_memory import NOTHING, sync_memory
from dtrain.train.config import compose, instantiate
from tests.plan.test_describe import SPECS, build


def tiny_machine(memory: int) -> Machine:
    return Machine("a small one", memory, {"fp32": 1e12, "bf16": 2e12}, 1e11)


def adamw(shapes: Any) -> Any:
    return optimizer_memory(torch.optim.AdamW, list(shapes))


def layout(engine: str = "ddp", shards: int = 1, checkpointed: bool = False) -> Layout:
    return Layout(engine=engine, replicas=2, shards=shards, checkpointed=checkpointed, bf16=False)


def described(casts: Any, checkpointed: bool, reentrant: bool) -> Any:
    return describe(build, SPECS, casts=casts, checkpointed=checkpointed, reentrant=reentrant)


# ---- words -----------------------------------------------------------------------------------------------------------


def test_own_words_are_told_from_those_of_the_configuration() -> None:
    question, rest = asked(["gpu=a100", "model=small", "link=1gbit", "nodes=4", "loss_budget=0.5%", "shards=8,1"])
    assert rest == ["model=small"]
    assert question.machine == {"gpu": "a100"}
    assert question.network == ("link=1gbit", "nodes=4")
    assert (question.loss_budget, question.shards) == (0.005, (1, 8))
    links = question.links(2)
    assert links is not None
    assert links.size == 4


@pytest.mark.parametrize(("words", "says"), [
    (["link=0mbit", "nodes=2"], "carries nothing"),
    (["link=100mbit,-3ms", "nodes=2"], "latency"),
    (["link=fast", "nodes=2"], "no quantity like 100mbit"),
    (["nodes=0"], "positive whole number"),
    (["loss_budget=much"], "loss_budget=much is no fraction"),
    (["utilization=100%"], "less than 100%"),
    (["shards=two"], "shards=two"),
    (["link=1gbit", "link=2gbit"], "given twice"),
    (["link=1gbit", "measured=x"], "one of the two"),
    (["measured=/nowhere"], "give the folder of a dtrain bench collectives"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_words(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        asked(words)[0].links(2)


def row(size: int, seconds: float, **more: object) -> str:
    values: dict[str, object] = {
        "op": "all_reduce", "backend": "gloo", "dtype": "float32", "world": 2, "bytes": size, "iterations": 9,
        "p50_ms": 1e3 * seconds, "interface": "eth0", "slowest_host": "a", "invalid": "",
    }  # fmt: skip
    whole = ("sent_bytes", "optimal_bytes", "slowest_rank", "wrong")
    rates = ("min_ms", "p95_ms", "p99_ms", "max_ms", "algbw_mbit", "busbw_mbit", "link_mbit", "slowest_by")
    values |= dict.fromkeys(whole, 0) | dict.fromkeys((*rates, "cpu_busy", "cpu_foreign"), 0.0)
    return json.dumps(values | more)


def test_links_are_read_from_a_sweep(tmp_path: Path) -> None:
    sizes = (4000, 100_000, 1_000_000, 4_000_000)
    (tmp_path / "rows.jsonl").write_text("\n".join(row(s, 4 * 0.005 + s / 12.5e6) for s in sizes) + "\n")
    links = asked([f"measured={tmp_path}"])[0].links(3)
    assert links is not None
    assert links.size == 3
    assert links.levels[0].link.rate == pytest.approx(12.5e6)
    assert links.levels[0].link.latency == pytest.approx(0.005)


def test_an_invalid_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(row(4000, 0.1, invalid="others took 40 % of the processor") + "\n")
    with pytest.raises(ConfigError, match="others took 40 % of the processor"):
        asked([f"measured={tmp_path}"])[0].links(2)


# ---- machines --------------------------------------------------------------------------------------------------------


def test_words_change_a_known_gpu() -> None:
    found = machine({"gpu": "h100", "memory": "96GB", "peak": "500tflops", "efficiency": "50%"})
    assert found.memory_bytes == 96 * 10**9
    assert found.rate("bf16") == 250e12


@pytest.mark.parametrize(("words", "says"), [
    ({"gpu": "h1000"}, "h100"),
    ({"gpu": "h100", "memory": "0GB"}, "memory=0GB is no quantity"),
    ({"gpu": "h100", "memory": "1GB"}, "nothing is left"),
    ({"gpu": "h100", "efficiency": "0%"}, "more than 0"),
    ({"gpu": "h100", "peak": "fast"}, "peak=fast"),
    ({"speed": "1"}, "no word of a machine"),
])  # fmt: skip
def test_a_machine_that_cannot_be_is_refused(words: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        machine(words)


def test_a_step_takes_the_seconds_of_its_flops() -> None:
    model, one = described("none", False, False), tiny_machine(10**9)
    step = one.step(model, "fp32", microbatches=3, stepped=1000)
    seconds = 3 * (model.forward_flops + model.backward_flops) / (1e12 * 0.4)
    assert step.seconds == pytest.approx(seconds + 28 * 1000 / 1e11)
    assert [p.fqn for p in step.parameters] == ["embedding.weight", *_inside(model), "norm.weight", "head.weight"]


def _inside(model: Any) -> list[str]:
    return [p.fqn for layer in in_order(model)[1:-1] for p in layer.parameters]


# ---- what fits -------------------------------------------------------------------------------------------------------


def test_each_rejected_layout_says_which_term_broke_it() -> None:
    model = described("none", False, False)
    peak = fit(layout(), model, tiny_machine(10**9), adamw).memory.peak
    small = Machine("small", int((peak - 1000) / 0.92), {"fp32": 1e12}, 1e11)
    rejected = fit(layout(), model, small, adamw)
    assert 0 < rejected.missing <= 1001
    assert rejected.broke in rejected.reason
    assert rejected.memory.terms[rejected.broke] >= rejected.missing


def test_a_model_that_fits_nowhere_names_the_nearest_and_what_is_missing() -> None:
    candidates = [layout(), layout("fsdp", 2), layout("fsdp", 2, checkpointed=True)]
    with pytest.raises(NothingFits, match=r"nearest is engine=fsdp mesh.shard=2 .*GB more; .* take") as error:
        fits(candidates, described, tiny_machine(1000), adamw, lambda _: NOTHING)
    assert error.value.nearest.missing == error.value.nearest.memory.peak - tiny_machine(1000).usable_bytes


def test_the_ledger_knows_its_terms() -> None:
    with pytest.raises(KeyError):
        Ledger().add("luck", 1)


# ---- syncs -----------------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.weight": (1000, 256),
    "blocks.0.w": (768, 256),
    "head.weight": (1000, 256),
}


@pytest.mark.parametrize(("words", "keeps"), [
    (("sync=dense",), {}),
    (("sync=every_step", "compress=int8_ef"), {"feedback": 1.0, "in flight": 1.0}),
    (("sync=every_step", "compress=topk_econtrol"), {"feedback": 3.0, "in flight": 3.0}),
    (("sync=diloco",), {"outer parameters": 1.0, "outer momentum": 1.0}),
    (("sync=diloco", "compress=none", "sync.outer_state=sharded"), {"outer parameters": 0.5, "outer momentum": 0.5}),
    (("sync=co2",), {"outer parameters": 1.0, "outer momentum": 1.0, "in flight": 1.0}),
])  # fmt: skip
def test_what_a_sync_keeps_is_what_its_page_says(words: tuple[str, ...], keeps: dict[str, float]) -> None:
    """In copies of the model in fp32: comm/feedback.py, comm/methods. In flight is at least this."""
    step = Step.even(dict(SHAPES), 0.0)
    whole = 4 * sum(parameter.numel for parameter in step.parameters)
    sync: Any = instantiate(compose([*words, "data.path=x", "run.dir=y"]).sync)
    found = sync_memory(sync, step, engine="ddp", replicas=2, shards=1)
    kept = {term: size / whole for term, size in found.beside.items()}
    for term, share in keeps.items():
        if term == "in flight":
            assert kept[term] > 0.85 * share
        else:
            assert kept[term] == pytest.approx(share, rel=0.02)
    assert set(kept) <= {*keeps, "in flight"}
    halves = sync_memory(sync, step, engine="fsdp", replicas=2, shards=2)
    for term in keeps.keys() - {"in flight"}:
        assert halves.beside[term] == pytest.approx(found.beside[term] / 2, rel=0.01)


def test_a_sync_without_a_row_is_never_picked_and_dense_costs_nothing(tmp_path: Path) -> None:
    table = tmp_path / "losses.json"
    table.write_text('{"source": "", "revision": "", "rows": {"int8_ef": 0.01}}')
    read = Losses.read(table)
    assert (read.of("dense"), read.of("int8_ef"), read.of("co2")) == (0.0, 0.01, None)
    table.write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        Losses.read(table)


def test_degrees_divide_the_ranks_and_the_bubble_is_the_formula() -> None:
    rows = degrees(described("none", False, False), tiny_machine(10**9), ranks=8, microbatches=16)
    assert all(row.tensor * row.pipeline * row.copies == 8 for row in rows)
    one = next(row for row in rows if row.pipeline == 1)
    assert one.bubble == 0
    assert all(row.bubble == (row.pipeline - 1) / (16 // row.copies + row.pipeline - 1) for row in rows)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("plan before you run. " * 500)
    return folder


def test_dtrain_plan_ends_with_a_command_that_composes(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "SYNCS", ("dense", "int8_ef", "diloco"))
    rows = Losses("page", "abc", {"int8_ef": 0.01, "diloco": 0.04})
    monkeypatch.setattr(Losses, "read", classmethod(lambda cls, path=None: rows))
    words = ["model.dim=32", "model.layers=2", "model.heads=2", "data.block=32", f"data.path={text}"]
    assert main(["plan", "--json", "gpu=h100", "link=100mbit,5ms", "nodes=2", "shards=1,2", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    by_name = {row["name"]: row for row in found["syncs"]}
    assert found["chosen"] == "int8_ef"
    assert "costs +4.0% in loss" in by_name["diloco"]["refused"]
    assert by_name["int8_ef"]["bytes_per_step"] < by_name["dense"]["bytes_per_step"] / 3
    assert found["links_bytes_per_second"].keys() == {"dense", "int8_ef"}
    command = found["command"].split()
    assert command[:2] == ["dtrain", "train"]
    config = compose([*command[2:], "run.dir=x"])
    assert config.sync["_target_"] == "dtrain.every_step"
    assert config.mesh.replicate * config.mesh.shard == config.launcher.workers


def test_without_links_only_memory_is_planned(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.dim=32", "model.layers=1", "model.heads=2", "data.block=32", f"data.path={text}", "shards=2"]
    assert main(["plan", "gpu=h100", *words]) == 0
    out = capsys.readouterr().out
    assert "no link was described" in out
    assert "dtrain train" in out
    assert main(["plan", "gpu=h100", "memory=1.7GB", *words, "model.dim=2048"]) == 2
    assert "fits nowhere" in capsys.readouterr().err


def test_every_gpu_of_the_table_is_complete() -> None:
    assert all(one.usable_bytes > 0 and set(one.peak) == {"fp32", "bf16"} for one in GPUS.values())
