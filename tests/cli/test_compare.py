"""``dtrain compare`` as people use it: the table, the page, and folders that are no runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.cli.main import main
from tests.report.run_folders import write_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a", ["sync=dense"])
    write_run(tmp_path / "runs" / "b", ["sync=diloco"])
    return tmp_path


def test_runs_are_compared_in_a_table_and_a_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "runs/a", "runs/b", "--out", "both.html"]) == 0
    head, a, b, line = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["run", "sync"] and a.split()[0] == "a" and b.split()[:2] == ["b", "diloco"]
    assert line == f"report: {runs / 'both.html'}" and (runs / "both.html").read_text().count("<svg") == 7


def test_a_folder_stands_for_the_runs_below_it_and_those_without_metrics_are_left_out(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_run(runs / "runs" / "c") / "metrics.jsonl").unlink()
    assert main(["compare", "runs"]) == 0
    printed = capsys.readouterr().out
    assert "left out: " in printed and "runs/c has no metrics yet" in printed and (runs / "compare.html").is_file()


def test_one_run_has_its_own_report_drawn_again(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "runs/a"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {runs / 'runs' / 'a' / 'report.html'}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["runs/a", "runs/a/traffic"], "traffic is no run, and has none below it"),
        (["runs/a", "runs/b", "--out", "nowhere/x.html"], "--out nowhere/x.html cannot be written"),
        (["runs/a", "runs/d"], "d has no metrics yet"),
    ],
)
def test_bad_input_is_said(runs: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    (write_run(runs / "runs" / "d") / "metrics.jsonl").unlink()
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err and not list(runs.glob("*.html"))
