"""metrics.jsonl is valid JSON whatever is written, and a resume cuts it to what its checkpoint knows."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.report.progress import Progress
from dtrain.train.metrics import MetricsWriter, cut, read
from dtrain.train.metrics.rows import as_line
from dtrain.train.metrics.sinks import SINKS


def refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


@given(st.dictionaries(st.text(), st.none() | st.floats() | st.integers() | st.text() | st.booleans()))
def test_every_row_is_one_line_of_strict_json(row: dict[str, float | int | str | bool | None]) -> None:
    line = as_line(row)
    back = json.loads(line, parse_constant=refuse)
    assert line.endswith("\n") and len(line.splitlines()) == 1
    assert back == {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }


def test_rows_come_back_and_reach_tensorboard(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0 / step, "tokens": 10 * step} for step in (1, 2)]
    with MetricsWriter(tmp_path, enabled=True) as metrics:
        for row in rows:
            metrics.write(row)
            assert read(tmp_path / "metrics.jsonl")[-1] == row  # flushed
        metrics.write({"step": 3, "loss": math.nan})
    assert read(tmp_path / "metrics.jsonl") == [*rows, {"step": 3, "loss": None}]
    assert scalars(tmp_path, "loss") == {1: 1.0, 2: 0.5}


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_a_resume_hides_what_it_trains_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, enabled=True) as metrics:
        for step in range(1, 6):
            metrics.write({"step": step, "loss": float(step)})
    cut(path, 3)
    assert [row["step"] for row in read(path)] == [1, 2, 3]
    with MetricsWriter(tmp_path, enabled=True, purge_step=4) as metrics:
        metrics.write({"step": 4, "loss": 40.0})
    assert [row["loss"] for row in read(path)] == [1.0, 2.0, 3.0, 40.0]
    assert scalars(tmp_path, "loss") == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0}


def test_a_disabled_writer_leaves_no_trace(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", enabled=False) as metrics:
        metrics.write({"step": 1})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"step": 1.5}, {"step": None}])
def test_a_row_without_a_step_is_refused(tmp_path: Path, row: dict[str, float | None]) -> None:
    with MetricsWriter(tmp_path, enabled=True) as metrics, pytest.raises(ValueError, match="integer step"):
        metrics.write(row)


def test_a_torn_last_line_is_left_out_cut_and_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    torn = '{"step": 1}\n{"step": 2, "lo'
    path.write_text(torn)
    assert read(path) == [{"step": 1}]
    cut(path, 9)
    assert path.read_text() == '{"step": 1}\n'
    path.write_text(torn)
    with MetricsWriter(tmp_path, enabled=True) as metrics:
        metrics.write({"step": 2})
    assert read(path) == [{"step": 1}, {"step": 2}]


def test_damage_elsewhere_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 .*nonsense"):
        read(path)


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path / "none") == []
    cut(tmp_path / "none", 3)
    assert list(tmp_path.iterdir()) == []


def test_cut_leaves_only_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"note": "no step"}\n')
    cut(path, 1)
    assert path.read_text() == '{"step": 1}\n{"note": "no step"}\n' and list(tmp_path.iterdir()) == [path]


class Failing:
    """Stands for TensorBoard on a disk that has become full at ``fails``."""

    def __init__(self, fails: str) -> None:
        self.fails = fails

    def write(self, *_: object) -> None:
        if self.fails == "add":
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        if self.fails == "close":
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fails", ["open", "add", "close"])
def test_tensorboard_that_fails_is_warned_of_once_and_rows_go_on(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fails == "open":
        (tmp_path / "tensorboard").write_text("no folder")
    else:
        monkeypatch.setitem(SINKS, "tensorboard", ("tensorboard", lambda _: Failing(fails)))
    metrics = MetricsWriter(tmp_path, enabled=True)

    def three() -> None:
        with metrics:
            for step in (1, 2, 3):
                metrics.write({"step": step, "loss": 1.0})

    with pytest.warns(RuntimeWarning, match=r"tensorboard is written no more.*metrics\.jsonl goes on") as warned:
        three()
    assert len(warned) == 1 and [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    "value", ["[1]", "{}", "1" * 30, "NaN", "Infinity", "[" * 100_000, '"x"'], ids=lambda text: text[:9]
)
def test_a_damaged_value_is_no_row_or_one_that_can_be_shown(value: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = {"step": 2, "loss": 1.0, "seconds": 1.0, "tokens": 5}
    for name in ("step", "loss", "seconds", "decision", "sent_bytes"):
        path.write_text(as_line({**good, "step": 1}) + f'{{"step": 2, "{name}": {value}}}\n' + as_line(good))
        stream = io.StringIO()
        with Progress(tmp_path / "not yet", steps=3, stream=stream) as progress:
            path.rename(tmp_path / "not yet")
            progress.close()
        assert "step 1/3" in stream.getvalue() and "step 2/3" in stream.getvalue()
        (tmp_path / "not yet").unlink()
