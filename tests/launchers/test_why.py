"""What a person is told first about a job: written records in, a text out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.launchers.records import Beat, RankRecord, keep_attempt
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
    folder: Path, records: list[RankRecord], beats: dict[int, dict[str, Any]], *, state: str = "failed", log: str = "",
    waits_for: str = "",
) -> str:  # fmt: skip
    (folder / "ranks").mkdir(exist_ok=True)
    (folder / "logs").mkdir()
    for record in records:
        (folder / "ranks" / f"rank-{record.rank}.json").write_text(json.dumps(dataclasses.asdict(record)))
    for rank, content in beats.items():
        (folder / "ranks" / f"rank-{rank}.beat").write_text(json.dumps(content))
    (folder / "logs" / "batch.log").write_text(log)
    return why(folder, state=state, end=None, waits_for=waits_for)


def kept(folder: Path, *attempts: list[RankRecord]) -> None:
    """The files of a job whose last attempt follows these."""
    (folder / "ranks").mkdir()
    (folder / "attempts").write_text("1 7 0 n\n" * (len(attempts) + 1))
    for number, records in enumerate(attempts, 1):
        lines = [json.dumps(dataclasses.asdict(record)) for record in records]
        (folder / "ranks" / f"attempt-{number}.jsonl").write_text("\n".join([*lines, '{"torn']))


def killed(rank: int, number: str = "SIGKILL", **how: Any) -> RankRecord:
    return ended(rank, exit_code=None, signal=number, message=f"killed by {number}", kind="", traceback="", **how)


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


def test_a_job_that_waits_in_the_queue_again_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("1 7 0 n1\n")
    left = [ended(rank, exit_code=75, message="", kind="") for rank in range(2)]
    text = told(tmp_path, left, {0: beat(0), 1: beat(1, waits=False)}, state="pending", waits_for="BeginTime")
    assert text.splitlines() == [
        "attempt 1: it stopped as asked, to be run again",
        "the job waits in the queue (BeginTime)",
    ]


def test_a_host_that_went_away_is_named_while_the_job_waits(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("1 7 0 n1\n")
    records = [killed(0, "SIGTERM"), ended(1, exit_code=None, message="")]
    records[1] = dataclasses.replace(records[1], ended=None)
    text = told(tmp_path, records, {}, state="pending", waits_for="Resources")
    assert text.splitlines()[0] == "attempt 1: rank 1 wrote no exit record (did n1 fail?)"


def test_a_rank_that_has_ended_hangs_nowhere(tmp_path: Path) -> None:
    records = [ended(0, exit_code=0, message="", kind=""), ended(1, ended=None, exit_code=None, message="")]
    text = told(tmp_path, records, {0: beat(0, waits=False), 1: beat(1)}, state="running")
    assert "rank 0 on n0 has ended (exit code 0) without entering all_reduce #4" in text
    assert "rank 0 on n0 has given no sign" not in text and "rank 0 on n0 has not entered" not in text


def test_a_killed_rank_of_an_attempt_that_was_followed_by_another_is_told(tmp_path: Path) -> None:
    closed = "RuntimeError: Connection closed by peer [10.0.0.2]:4711"
    kept(tmp_path, [ended(0, message=closed, ended=9.9), killed(2, ended=10.0), killed(3, "SIGTERM", ended=10.5)])
    text = told(tmp_path, [ended(0, exit_code=0, message="", kind="")], {}, state="finished")
    assert "attempt 1: rank 2 on n2 was killed by SIGKILL; the run went on as attempt 2" in text.splitlines()


def test_a_cancelled_job_does_not_say_that_no_rank_had_failed_where_one_had(tmp_path: Path) -> None:
    kept(tmp_path, [killed(2)])
    text = told(tmp_path, [], {}, state="cancelled")
    assert text.splitlines()[0] == "the job was cancelled in attempt 2"
    assert "no rank had failed" not in text and "rank 2 on n2 was killed by SIGKILL" in text


def test_slurms_own_sigkill_after_a_failure_is_not_the_cause(tmp_path: Path) -> None:
    closed = "RuntimeError: Connection closed by peer [10.0.0.2]:4711"
    text = told(tmp_path, [ended(0, message=closed, ended=10.0), killed(1, ended=40.0)], {})
    assert text.splitlines()[0].startswith("rank 0 on n0 failed: RuntimeError")


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("srun: unrecognized option '--container-image=a.sqsh'\nTry \"srun --help\"\n", "unrecognized option"),
        ("-----\nORTE was unable to start\n  Daemon exit status: 255\n-----\n", "Daemon exit status: 255"),
        ("only this\n", "only this"),
    ],
)
def test_what_the_starter_said_is_told_where_no_rank_came_to_be(log: str, words: str, tmp_path: Path) -> None:
    before = "t dtrain: attempt 1 on n1\nsrun: error: of another attempt\n"
    text = told(tmp_path, [], {}, log=f"{before}t dtrain: attempt 2 on n1\n{log}{log}t dtrain: what we say: failed\n")
    assert text.count(words) == 1 and "another attempt" not in text and "what we say" not in text


def test_where_all_ranks_stand_in_one_collective_the_network_is_the_suspect(tmp_path: Path) -> None:
    running = [ended(rank, ended=None, exit_code=None, message="") for rank in range(3)]
    text = told(tmp_path, running, {rank: beat(rank) for rank in range(3)}, state="running")
    assert "all ranks have entered all_reduce #4 of group 0 (10 Float) and stand in it" in text
    assert "the network between n0, n1, n2 is the suspect" in text
    assert "dtrain doctor launcher=slurm launcher.nodes=3" in text and "rank 2 on n2 has given no sign of life" in text


def test_the_records_of_an_attempt_are_kept_when_the_next_one_begins(tmp_path: Path) -> None:
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    for rank in range(2):
        record = RankRecord.begin(ranks, rank, host="n", attempt=0)
        record.end(ranks, -9, log=Path("/dev/null"), log_start=0)
    RankRecord.begin(ranks, 0, host="n", attempt=1)
    assert [record.signal for record in RankRecord.earlier(tmp_path)[1]] == ["SIGKILL"]
    keep_attempt(tmp_path)
    earlier = RankRecord.earlier(tmp_path)
    assert {number: [record.rank for record in records] for number, records in earlier.items()} == {1: [0, 1], 2: [0]}
    assert RankRecord.all(tmp_path) == []
