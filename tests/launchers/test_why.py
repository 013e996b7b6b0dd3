"""What a person is told first about a job: written records in, a text out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.launchers.record import Beat, RankRecord
from dtrain.launchers.why import why

TRACE = 'Traceback (most recent call last):\n  File "/home/me/train.py", line 12, in step\n'


def ended(rank: int, **how: Any) -> RankRecord:
    values: dict[str, Any] = {
        "exit_code": 1,
        "message": "ValueError: no luck",
        "kind": "ValueError",
        "traceback": TRACE,
    }
    return RankRecord(rank, f"n{rank}", 0, 100 + rank, 0.0, **{**values, "ended": 10.0 + rank, "log": "x.log", **how})


def beat(rank: int, *, number: int = 4, since: float = 0.0, time: float = 90.0, waits: bool = True) -> dict[str, Any]:
    what = {"what": f"all_reduce #{number} of group 0 (10 Float)", "group": "0", "number": number}
    stack = [f'  File "/home/me/train.py", line {20 + rank}, in load', "    wait_for_data()"]
    return {
        "time": time, "since": since, "host": f"n{rank}", "pid": 1, "stack": stack, "waiting": what if waits else None,
        "entered": {"0": number if waits else number - 1},
    }  # fmt: skip


def told(
    folder: Path, records: list[RankRecord], beats: dict[int, dict[str, Any]], *, state: str = "failed", log: str = ""
) -> str:
    (folder / "ranks").mkdir()
    (folder / "logs").mkdir()
    for record in records:
        (folder / "ranks" / f"rank-{record.rank}.json").write_text(json.dumps(dataclasses.asdict(record)))
    for rank, content in beats.items():
        (folder / "ranks" / f"rank-{rank}.beat").write_text(json.dumps(content))
    (folder / "logs" / "batch.log").write_text(log)
    return why(folder, state=state, end=None)


def test_the_earliest_real_error_comes_first_and_equal_ones_are_one_line(tmp_path: Path) -> None:
    closed = "RuntimeError: Connection closed by peer [10.0.0.2]:4711"
    text = told(
        tmp_path,
        [
            ended(0, message=closed, ended=5.0),
            ended(1, ended=9.0),
            ended(2),
            ended(3, exit_code=None, signal="SIGTERM", message="killed by SIGTERM"),
        ],
        {},
    )
    first, where, log, *rest = text.splitlines()
    assert first == "rank 1 on n1 failed: ValueError: no luck"
    assert where == "  at /home/me/train.py:12 in step (exit code 1)" and log == "  log: x.log"
    assert rest[:2] == ["  1 other rank (2) failed in the same way", "  2 other ranks (0, 3) failed in consequence"]


def test_another_error_that_came_later_is_told_too(tmp_path: Path) -> None:
    text = told(tmp_path, [ended(0), ended(1, message="KeyError: 3", kind="KeyError")], {})
    assert "  rank 1 on n1 failed later: KeyError: 3" in text


def test_the_rank_that_never_entered_a_collective_is_named_with_its_stack(tmp_path: Path) -> None:
    hang = {"kind": "Hang", "message": "waited 60 s in all_reduce #4 of group 0 (10 Float)", "traceback": ""}
    records = [
        ended(0, **hang),
        ended(1, exit_code=None, signal="SIGKILL", message="killed", kind=""),
        ended(2, **hang),
    ]
    text = told(tmp_path, records, {0: beat(0), 1: beat(1, waits=False), 2: beat(2)})
    first = text.splitlines()[0]
    assert first.startswith(
        "rank 1 on n1 has not entered all_reduce #4 of group 0 (10 Float), in which 2 other ranks wait"
    )
    assert "line 21, in load" in text and "wait_for_data()" in text and "line 20" not in text


def test_who_waits_in_another_group_is_not_the_one_who_is_missing(tmp_path: Path) -> None:
    # Replicas (0, 1) and (2, 3). Rank 1 has not come to its shard group; rank 3 waits for it in the replicate axis.
    beats = {0: beat(0), 1: beat(1, waits=False), 2: beat(2, since=20.0), 3: beat(3, since=20.0)}
    for rank in (2, 3):
        beats[rank]["waiting"] = {"what": "AllReduce #2 of group replicas", "group": "replicas", "number": 2}
        beats[rank]["entered"] = {"replicas": 2}
    text = told(tmp_path, [], beats, state="failed")
    assert text.splitlines()[0].startswith("rank 1 on n1 has not entered all_reduce #4 of group 0")
    assert "rank 2" not in text and "rank 3" not in text


def test_a_hang_of_a_job_that_still_runs_is_told_as_it_goes_on(tmp_path: Path) -> None:
    running = [ended(rank, ended=None, exit_code=None, message="") for rank in range(2)]
    text = told(tmp_path, running, {0: beat(0), 1: beat(1, waits=False)}, state="running")
    assert "rank 1 on n1 has not entered all_reduce #4" in text


def test_a_rank_without_a_sign_of_life_is_named(tmp_path: Path) -> None:
    text = told(tmp_path, [], {0: beat(0, time=1000.0, since=900.0), 1: beat(1, time=100.0)}, state="lost")
    assert "rank 1 on n1 has given no sign of life for 900 s" in text


def test_the_scheduler_is_quoted(tmp_path: Path) -> None:
    text = told(
        tmp_path,
        [],
        {},
        log="x dtrain: attempt 1\nslurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 1 DUE TO TIME LIMIT ***\n",
    )
    assert "DUE TO TIME LIMIT" in text


@pytest.mark.parametrize("state", ["pending", "running"])
def test_nothing_wrong_is_said_so(state: str, tmp_path: Path) -> None:
    assert told(tmp_path, [], {}, state=state) == f"the job is {state}; nothing has failed"


def test_records_that_are_torn_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "rank-0.json").write_text('{"rank": 0, "ho')
    (tmp_path / "ranks" / "rank-0.beat").write_text("")
    assert RankRecord.all(tmp_path) == [] and Beat.all(tmp_path) == []


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ((0, 0), 0), ((75, 75), 75), ((0, 75), 75), ((0, 2), 2), ((75, 130), 130), ((0, 1), 1), ((0,), 1), ((), 1),
        ((75, None), 1),
    ],
)  # fmt: skip
def test_the_verdict_over_a_job(codes: tuple[int | None, ...], verdict: int, tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    for rank, code in enumerate(codes):
        record = ended(rank, exit_code=code, signal=None if code is not None else "SIGKILL")
        (tmp_path / "ranks" / f"rank-{rank}.json").write_text(json.dumps(dataclasses.asdict(record)))
    assert RankRecord.verdict(tmp_path, 2) == verdict
