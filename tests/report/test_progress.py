"""What a person sees of a running run."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

from dtrain.report.progress import Progress, printer, say
from dtrain.train.metrics import cut


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(step: int, loss: float | None = 2.0) -> dict[str, float | int | None]:
    return {
        "step": step,
        "loss": loss,
        "tokens": 1000 * step,
        "seconds": 0.5 * step,
        "sent_bytes": 1_000_000 * step,
        "exposed_seconds": 0.05 * step,
    }


def append(path: Path, *rows: dict[str, float | int | None]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)


def wait_for(stream: io.StringIO, text: str) -> None:
    while text not in stream.getvalue():
        time.sleep(0.01)


def test_plain_lines(tmp_path: Path) -> None:
    stream, path = io.StringIO(), tmp_path / "metrics.jsonl"
    with Progress(path, steps=1000, stream=stream) as progress:
        wait_for(stream, "starting workers\n")
        append(path, row(1), row(2, loss=None))
        wait_for(stream, "step 2/")
        append(path, {"step": 2, "validation_loss": 1.25})
        progress.say("rank 1 was killed: starting again")
    lines = stream.getvalue().splitlines()
    assert "step 2: validation loss 1.2500" in lines and "rank 1 was killed: starting again" in lines
    assert "step 2/1,000  loss not finite  2,000 tokens/s  sent 2.00 MB per rank  exposed communication 10.0 %" in lines
    assert stream.getvalue().replace("\n", "").isprintable()


def test_every_row_is_a_plain_line_however_fast_they_come(tmp_path: Path) -> None:
    stream, path = io.StringIO(), tmp_path / "metrics.jsonl"
    with Progress(path, steps=25, stream=stream):
        append(path, row(5))
        wait_for(stream, "step 5/25")
        append(path, row(10), row(15), {"step": 15, "validation_loss": 1.5}, row(20))
        wait_for(stream, "step 20/25")
        append(path, row(25))
    steps = [line.split()[1] for line in stream.getvalue().splitlines() if line.startswith("step ") and "/" in line]
    assert steps == ["5/25", "10/25", "15/25", "20/25", "25/25"]


def test_a_cut_file_takes_the_step_back_and_repeats_no_validation(tmp_path: Path) -> None:
    stream, path = io.StringIO(), tmp_path / "metrics.jsonl"
    append(path, row(1), {"step": 1, "validation_loss": 9.0})  # of an earlier launch
    with Progress(path, steps=10, stream=stream):
        append(path, row(2), {"step": 2, "validation_loss": 8.0}, row(6))
        wait_for(stream, "step 6/10")
        cut(path, 2)
        append(path, row(3))
        wait_for(stream, "step 3/10")
        assert "2,000 tokens/s" in stream.getvalue().splitlines()[-1]
    assert stream.getvalue().count("validation") == 1
    assert stream.getvalue().count("step 1/") == 0 and stream.getvalue().count("step 2/") == 1  # told once


def test_a_torn_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    stream, path = io.StringIO(), tmp_path / "metrics.jsonl"
    text = json.dumps(row(4)) + "\n"
    with Progress(path, steps=10, stream=stream):
        path.write_text(text[:20])
        time.sleep(0.5)
        with path.open("a") as file:
            file.write(text[20:])
        wait_for(stream, "step 4/10")


def test_a_terminal_shows_validation_above_one_line(tmp_path: Path) -> None:
    stream, path = Terminal(), tmp_path / "metrics.jsonl"
    with Progress(path, steps=10, stream=stream):
        wait_for(stream, "starting workers")
        append(path, row(7), {"step": 7, "validation_loss": 1.5})
        wait_for(stream, "step 7: validation loss 1.5000")
    assert "step 7/10" in stream.getvalue()


def test_what_was_decided_is_a_line_once(tmp_path: Path) -> None:
    path, stream = tmp_path / "metrics.jsonl", io.StringIO()
    decided: dict[str, float | int | str | bool | None] = {"step": 9, "decision": "every_steps=12 hides it"}
    path.write_text("")
    with Progress(path, steps=20, stream=stream):
        path.write_text(json.dumps(decided) + "\n")
    assert stream.getvalue().splitlines()[-1] == "step 9: every_steps=12 hides it"
    shown = io.StringIO()
    printer(20, shown)(decided)
    assert shown.getvalue() == "step 9: every_steps=12 hides it\n"


def test_the_rows_of_a_log_are_lines_at_once() -> None:
    stream = io.StringIO()
    show = printer(1000, stream)
    for each in (row(1), {"step": 1, "validation_loss": 1.25}, row(2, loss=float("nan"))):
        show(dict(each))
    assert stream.getvalue().splitlines() == [
        "step 1/1,000  loss 2.0000  2,000 tokens/s  sent 1.00 MB per rank  exposed communication 10.0 %",
        "step 1: validation loss 1.2500",
        "step 2/1,000  loss not finite  2,000 tokens/s  sent 2.00 MB per rank  exposed communication 10.0 %",
    ]


def test_a_reader_that_has_left_does_not_end_a_run(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # `dtrain train | head`
    with os.fdopen(writing, "w") as stream, Progress(tmp_path / "metrics.jsonl", steps=3, stream=stream) as progress:
        progress.say("restart 1 of at most 3")
        say("run x", stream)
        printer(3, stream)({"step": 1, "loss": 2.5})
