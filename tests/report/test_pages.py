"""What stands on the page of a run and of several, without drawing it; and that a page holds what it was given."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path

import pytest

from dtrain.bench import hook_rows, table
from dtrain.errors import ConfigError
from dtrain.report.at_the_end import write_report, write_sweep
from dtrain.report.page import Facts, Notes, Page, Table
from dtrain.report.plots import Bars, Curve, Lines
from dtrain.report.run_figures import read_run, read_runs
from dtrain.report.run_page import page_of_run, page_of_runs
from tests.bench.samples import sample
from tests.report.run_folders import write_run

ROOT = Path(__file__).resolve().parent.parent.parent


def plots(page: Page) -> dict[str, Lines | Bars]:
    return {part.title: part for part in page.parts if isinstance(part, Lines | Bars)}


def test_the_figures_of_a_run_are_those_of_its_files(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a" / "x"))
    assert run.name == "a/x" and run.last.step == 40 and run.validation[-1] == (40.0, 1.1 + 4 / 40)
    assert run.data == "one" and run.summary is not None and run.decisions == ((40, "replica 1 was repaired <b>"),)
    assert [rank.bytes_as for rank in run.traffic] == [{"gradients": 3_000_000, "control": 960}] * 2
    between = run.at(39)
    assert between is not None and between.step == 38 and run.at(1) is None


def test_the_page_of_a_run_shows_loss_time_and_bytes(tmp_path: Path) -> None:
    page = page_of_run(read_run(write_run(tmp_path / "x", ["sync=diloco"])))
    shown = plots(page)
    assert list(shown) == [
        "Loss against steps", "Loss against bytes", "Loss against time", "Time of a step", "A step of training",
        "Communication beside it", "Sent by whom",
    ]  # fmt: skip
    bars = shown["A step of training"]
    assert isinstance(bars, Bars)
    assert {name: round(values[0], 6) for name, values in bars.parts} == {
        "computing": 400, "exposed communication": 50, "data and the rest": 50,
    }  # fmt: skip
    sent = shown["Sent by whom"]
    assert isinstance(sent, Bars) and sent.rows == ["rank 0 on c1", "rank 1 on c2"]
    assert [name for name, _ in sent.parts] == ["gradients", "control"]
    by_bytes = shown["Loss against bytes"]
    assert isinstance(by_bytes, Lines) and by_bytes.x == "MB sent per rank" and by_bytes.curves[0].x[-1] == 4.0


def test_an_older_run_without_the_split_has_no_plot_of_it(tmp_path: Path) -> None:
    page = page_of_run(read_run(write_run(tmp_path / "x", split=False)))
    assert not {"A step of training", "Communication beside it"} & set(plots(page))


def test_the_choice_stands_on_the_page_with_its_reasons(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x")
    choice = {
        "sync": "diloco",
        "why": "the link is slow",
        "candidates": [{"sync": "dense", "ms": 9500.0}, {"ms": None}],
    }
    (folder / "choice.json").write_text(json.dumps(choice))
    parts = page_of_run(read_run(folder)).parts
    notes = next(part for part in parts if isinstance(part, Notes) and "chosen" in part.title)
    assert notes.lines == ["sync: diloco", "why: the link is slow"]
    listed = next(part for part in parts if isinstance(part, Table) and part.title == "candidates")
    assert listed.head == ["sync", "ms"] and listed.rows == [["dense", "9,500"], ["-", "-"]]


def test_runs_are_compared_by_what_differs_and_the_best_stands_out(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "a", ["sync=dense"], steps=40), "a"),
        read_run(write_run(tmp_path / "b", ["sync=dense", "optim.inner.lr=0.5"], steps=30, bytes_per_step=1000), "b"),
    ]
    page = page_of_runs(runs)
    assert page.table is not None and page.table.head[:2] == ["run", "optim.inner.lr"]
    assert page.table.best == [0] and "the runs are not equally long: 30 to 40 steps" in page.warnings
    by_bytes = plots(page)["Loss against bytes"]
    assert isinstance(by_bytes, Lines) and by_bytes.log == "x"  # a hundred times as many
    assert "0.5" in page.text()


@pytest.mark.parametrize(
    ("words", "digest", "warning"),
    [
        ([], "two", "trained on other data"),
        (["model.layers=1"], "one", "have other models"),
        (["train.batch_size=64"], "one", "batch sizes differ"),
    ],
)
def test_runs_that_are_not_alike_are_said_to_be(tmp_path: Path, words: list[str], digest: str, warning: str) -> None:
    write_run(tmp_path / "a")
    other = write_run(tmp_path / "b", words)
    (other / "data.json").write_text(json.dumps({"sha256": digest}))
    page = page_of_runs([read_run(tmp_path / "a"), read_run(other)])
    assert len(page.warnings) == 1 and warning in page.warnings[0]


@pytest.mark.parametrize(
    ("broken", "message"),
    [("nowhere", "is no folder"), ("config.yaml", "no config.yaml"), ("metrics.jsonl", "has no metrics yet")],
)
def test_what_is_no_run_is_refused_with_the_way_out(tmp_path: Path, broken: str, message: str) -> None:
    folder = write_run(tmp_path / "x")
    (folder / broken).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=message):
        read_run(tmp_path / "nowhere" if broken == "nowhere" else folder)


def test_damaged_metrics_are_refused_and_damaged_traffic_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x")
    (folder / "traffic" / "rank-0.json").write_text('{"rank": "x"}')
    (folder / "summary.json").write_text("no summary")
    (folder / "choice.json").write_text("[1]")
    run = read_run(folder)
    assert [rank.rank for rank in run.traffic] == [1] and run.summary is None and run.choice == {}
    (folder / "metrics.jsonl").write_text("x\ny\n")
    with pytest.raises(ConfigError, match="line 1 is not a JSON object"):
        read_run(folder)
    with pytest.raises(ConfigError, match="line 1"):
        read_runs([("x", folder)])


# ---- drawing -------------------------------------------------------------------------------------------------------


def test_a_page_is_one_file_that_loads_nothing_and_escapes_all_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    evil = "<script>alert(1)</script> & $x^2$"
    page = Page(
        evil, evil,
        [
            Facts([(evil, evil, evil)]), Notes([evil], evil), Table([evil], [[evil]], title=evil, note=evil),
            Lines(title=evil, x=evil, y=evil, curves=[Curve(evil, [1, 2], [1, 2]), Curve(evil, [], [])], note=evil),
            Bars(title=evil, x=evil, rows=[evil], parts=[(evil, [1.0]), (evil, [0.0])], note=evil),
        ],
        warnings=[evil],
    )  # fmt: skip
    path = tmp_path / "page.html"
    page.write(path)
    text = path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert "<script" not in text and text.count("<svg") == 2 and "#a100" not in text and "#a000" not in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert "prefers-color-scheme:dark" in text and "alert(1)" in text and "$x^2$" in text


def test_gaps_and_nothing_at_all_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    nan = float("nan")
    some = Lines(
        title="t", x="x", y="y", log="xy",
        curves=[Curve("a", [1, 2, 3], [1, nan, 3], low=[1, nan, 2], high=[2, nan, 4], style="points")],
    )  # fmt: skip
    assert "(1 to 2)" in some.html() and "<svg" in some.html()
    many = list(map(float, range(10_000)))
    assert len(Lines(title="t", x="x", y="y", curves=[Curve("a", many, many)]).html()) < 60_000
    assert "<svg" in Lines(title="t", x="x", y="y", curves=[]).html()
    assert "<svg" in Bars(title="t", x="x", rows=[], parts=[]).html()


def test_a_sweep_of_a_bench_has_a_page(tmp_path: Path) -> None:
    rows = [sample(op=op, bytes=size) for op in ("all_reduce", "all_gather") for size in (1000, 10_000)]
    page = table.page("bench/today", rows, ["a line"])
    bandwidth = plots(page)["Bus bandwidth"]
    assert isinstance(bandwidth, Lines)
    assert [curve.name for curve in bandwidth.curves] == ["all_reduce", "all_gather", "the link's rate"]
    assert len(page.text().splitlines()) == 5
    assert table.page("x", [], ["no row was finished"]).lead == "no row was finished"
    assert hook_rows.page("x", [], []).lead == "no row was finished"
    pytest.importorskip("matplotlib")
    assert table.report(tmp_path, rows, ["a line"]) == f"report: {tmp_path / 'report.html'}"


def test_the_page_of_the_docs_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "reports.md").read_text(), re.DOTALL)
    exec(compile(block, "reports.md", "exec"), {})
    assert (tmp_path / "plan.html").read_text().count("<svg") == 1


# ---- at the end of a run -------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_page_which_is_drawn_once(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "x")
    (folder / "outcome.json").write_text("{}")
    line = write_report(folder)
    assert line == f"report: {folder / 'report.html'}"
    (folder / "report.html").write_text("kept")
    assert write_report(folder) == line and (folder / "report.html").read_text() == "kept"
    assert write_sweep(tmp_path, [("a", folder), ("b", tmp_path / "gone")]) == f"report: {tmp_path / 'report.html'}"
    assert "left out: " in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_drawn_is_told_of_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "x")
    imported = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")
        return imported(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    assert "needs matplotlib: pip install 'dtrain[report]', then dtrain compare" in write_report(folder)
    (folder / "metrics.jsonl").unlink()
    assert "has no metrics yet" in write_report(folder)
    assert not (folder / "report.html").exists()
