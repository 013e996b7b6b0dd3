"""The pages on loss at few bytes: what is tuned, what is reported, and which lines are held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.few_bytes import (
    ADAMW,
    ALONE,
    CANDIDATES,
    COMMON,
    EVERY_SYNC,
    FIXED,
    LINES,
    MUON,
    SEEDS,
    all_syncs_report,
    best,
    few_bytes_report,
    settings,
)
from benchmarks.halved_text import HalvedText
from benchmarks.sparse_routes import ALL_GATHER, DENSE, ROWS, TWO_PHASE, sparse_routes_report
from dtrain.train.config import compose
from dtrain.train.data.text import ByteText
from tests.benchmarks.test_page import missed, run

CHOSEN = {name: candidates[0] for name, candidates in CANDIDATES.items()}


def test_every_row_is_tuned_alike() -> None:
    assert {len(candidates) for candidates in CANDIDATES.values()} == {4}
    assert FIXED.keys() == CANDIDATES.keys() and LINES.keys() <= FIXED.keys()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_setting_can_be_composed() -> None:
    tried = [(*FIXED[name], *words) for name, candidates in CANDIDATES.items() for words in candidates]
    of_all = [(inside.lower(), words) for inside in ALONE for words in {**EVERY_SYNC, **ALONE[inside]}.values()]
    of_all_words = [(f"optim={optimizer}", *words) for optimizer, words in of_all]
    for words in {*tried, *settings(CHOSEN).values(), *of_all_words}:
        compose(["run.dir=x", *COMMON, "data.part=tuning", *words])


@pytest.mark.parametrize(("loss", "bytes_", "lines"), [(1.9, 3.9, 0), (2.1, 3.9, 4), (1.9, 4.1, 1)])
def test_lines_are_those_of_the_issue(loss: float, bytes_: float, lines: int) -> None:
    """AdamW 2.0 and Muon 1.88; the rows at 4000 / bytes times fewer bytes, where 1000x allows 4."""
    runs = {name: [run(last=1.9, sent=4000)] * len(SEEDS) for name in settings(CHOSEN)}
    runs[ADAMW], runs[MUON] = ([run(last=end, sent=4000)] * len(SEEDS) for end in (2.0, 1.88))
    for name, less in zip(LINES, (100, 400, 1000), strict=True):
        runs[name] = [run(last=loss, sent=round(bytes_ * 1000 / less))] * len(SEEDS)
    trials = {name: {CHOSEN[name]: [1.0, 1.0]} for name in CANDIDATES}
    report = few_bytes_report(trials, CHOSEN, runs)
    assert len(missed(report)) == lines
    assert "| MuLoCo, 100x |" in report.body and "chosen |" in report.body


def test_the_table_of_all_has_a_row_for_each() -> None:
    names = {inside: [*EVERY_SYNC, *ALONE[inside]] for inside in ALONE}
    report = all_syncs_report({(name, inside): run(last=2.0) for inside in ALONE for name in names[inside]})
    assert all(f"| {name} |" in report.body for name in {*names["AdamW"], *names["Muon"]})
    assert "| muloco | - | 2.0000 (+0.0%) |" in report.body


@pytest.mark.parametrize(("gathered", "bytes_", "lines"), [(1.8, 1000, 0), (1.9, 1000, 1), (1.8, 1001, 1)])
def test_top_k_is_held_to_its_line(gathered: float, bytes_: int, lines: int) -> None:
    runs = {
        DENSE: [run(last=1.5)] * 3,
        TWO_PHASE: [run(last=2.0)] * 3,
        ALL_GATHER: [run(last=gathered, sent=bytes_)] * 3,
    }
    assert len(missed(sparse_routes_report(runs))) == lines
    for words in ROWS.values():
        compose(["run.dir=x", *words])


def test_only_what_ran_with_every_seed_can_win() -> None:
    assert best({("a",): [0.5], ("b",): [1.0, 2.0], ("c",): [1.4, 1.5]}) == ("c",)


def test_the_halves_share_no_validation_window_and_all_training_ones(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 200)
    whole, *halves = (
        ByteText(path=str(tmp_path), block=32, split="validation"),
        *(HalvedText(part=part, path=str(tmp_path), block=32, split="validation") for part in ("tuning", "reported")),
    )
    assert len(halves[0]) + len(halves[1]) == len(whole)
    for number, half in enumerate(halves):
        for index in range(len(half)):
            assert torch.equal(half[index]["input"], whole[number + 2 * index]["input"])
        with pytest.raises(IndexError):
            half[len(half)]
    training = HalvedText(part="tuning", path=str(tmp_path), block=32)
    assert len(training) == len(ByteText(path=str(tmp_path), block=32))
    with pytest.raises(ValueError, match="part is 'x'; choose 'tuning' or 'reported'"):
        HalvedText(part="x", path=str(tmp_path))
