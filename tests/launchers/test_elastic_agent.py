"""Launching ranks on this machine: how they end, who is blamed, and that none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.launchers.elastic_agent import Ending, Failure, launch, root_cause

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.processes

# Workers without torch: they start in milliseconds. `fail` writes what torch's @record writes.
PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
folder = Path(sys.argv[1])

def fail(message, code=1, at=None):
    extra = {"py_callstack": 'File "model.py", line 7, in forward', "timestamp": str(int(time.time()))}
    path = os.environ["TORCHELASTIC_ERROR_FILE"]
    with open(path, "w") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    if at is not None:
        os.utime(path, (at, at))
    os._exit(code)
"""


def worker(folder: Path, body: str) -> list[str]:
    script = folder / "worker.py"
    script.write_text(PRELUDE + textwrap.dedent(body))
    return [sys.executable, "-u", str(script), str(folder)]


def run(
    folder: Path,
    body: str,
    *,
    workers: int = 2,
    max_restarts: int = 0,
    on_restart: Callable[[Failure, int], None] | None = None,
) -> Ending:
    return launch(
        worker(folder, body),
        workers=workers,
        log_folder=folder / "logs",
        max_restarts=max_restarts,
        grace_seconds=20,
        threads_per_worker=1,
        environment={"COLOUR": "blue"},
        on_restart=on_restart,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_all_ranks_finish_and_see_their_environment(tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS COLOUR"
    before = dict(os.environ)
    ending = run(
        tmp_path, f"print(*(os.environ[n] for n in '{names}'.split()))\nprint('err', file=sys.stderr)", workers=3
    )
    assert ending == Ending("finished", None, 0, ())
    for rank in range(3):
        header, *lines = (tmp_path / f"logs/rank-{rank}.log").read_text().splitlines()
        assert header.startswith("----") and lines == [f"{rank} {rank} 3 127.0.0.1 1 blue", "err"]
    assert dict(os.environ) == before


def test_arguments_arrive_as_they_are(tmp_path: Path) -> None:
    odd = ["$$", "${local_rank}", "a b", "'", '"', ""]
    launch(
        [*worker(tmp_path, "print(json.dumps(sys.argv[2:]))"), *odd],
        workers=1,
        log_folder=tmp_path / "logs",
        max_restarts=0,
        grace_seconds=5,
        threads_per_worker=1,
    )
    assert json.loads((tmp_path / "logs/rank-0.log").read_text().splitlines()[-1]) == odd


def test_the_exception_comes_first_and_its_consequences_are_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Rank 0 notices before rank 1 has written down why it left; rank 2 would wait for ever.
    body = """
    now = time.time()
    if rank == 0:
        fail("RuntimeError: [../third_party/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4711", at=now - 5)
    if rank == 1:
        time.sleep(0.3)
        fail("ValueError: the loss is nan")
    time.sleep(600)
    """
    ending = run(tmp_path, body, workers=3)
    assert ending.kind == "failed" and ending.restarts == 0
    assert [failure.rank for failure in ending.failures] == [1, 0, 2]
    assert [failure.consequence for failure in ending.failures] == [False, True, True]
    first, *rest = root_cause(ending).splitlines()
    assert first == "rank 1 failed: ValueError: the loss is nan"
    assert "model.py:7 in forward" in rest[0] and rest[1].endswith("rank-1.log")
    assert rest[2].strip() == "2 other ranks failed in consequence"
    assert capfd.readouterr() == ("", "")  # nothing of the agent


def test_equal_failures_are_counted_as_such(tmp_path: Path) -> None:
    ending = run(tmp_path, "fail('OSError: disk full')")
    assert "1 other rank failed in the same way" in root_cause(ending)


def test_a_peer_error_is_the_cause_when_there_is_no_other(tmp_path: Path) -> None:
    ending = run(tmp_path, "fail('RuntimeError: Connection reset by peer', at=1000 - rank)")
    assert [(failure.rank, failure.consequence) for failure in ending.failures] == [(1, False), (0, True)]


def test_a_plain_exception_is_found_in_the_log(tmp_path: Path) -> None:
    ending = run(tmp_path, "raise KeyError('lr')", workers=1)
    (failure,) = ending.failures
    assert failure.message == "KeyError: 'lr'" and failure.exit_code == 1 and "worker.py" in failure.where


def test_a_recorded_exception_has_its_traceback(tmp_path: Path) -> None:
    body = """
    from torch.distributed.elastic.multiprocessing.errors import record
    @record
    def main():
        raise ZeroDivisionError("no tokens")
    main()
    """
    (failure,) = run(tmp_path, body, workers=1).failures
    assert failure.message == "ZeroDivisionError: no tokens" and failure.where.endswith("in main")


@pytest.mark.parametrize(
    ("body", "code", "name", "message"),
    [
        ("print('bye'); sys.exit(3)", 3, None, "its last line was: bye"),
        ("os._exit(4)", 4, None, "it wrote nothing"),
        ("os.kill(os.getpid(), signal.SIGKILL)", None, "SIGKILL", "killed by SIGKILL (out of memory? see dmesg)"),
        # Killed while it wrote its error file: torch's agent would die of the torn JSON.
        ("Path(os.environ['TORCHELASTIC_ERROR_FILE']).write_text('{'); sys.exit(1)", 1, None, "it wrote nothing"),
    ],
)
def test_ranks_that_say_nothing(tmp_path: Path, body: str, code: int | None, name: str | None, message: str) -> None:
    (failure,) = run(tmp_path, body, workers=1).failures
    assert (failure.exit_code, failure.signal, failure.message) == (code, name, message)


def test_a_killed_worker_restarts_all_and_the_logs_hold_both_attempts(tmp_path: Path) -> None:
    body = """
    print("attempt", attempt)
    if attempt == 0:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    """
    told: list[tuple[int, str | None, int]] = []
    ending = run(
        tmp_path, body, max_restarts=2, on_restart=lambda failure, n: told.append((failure.rank, failure.signal, n))
    )
    assert ending.kind == "finished" and ending.restarts == 1 and ending.failures == ()
    assert told == [(1, "SIGKILL", 1)] and ending.earlier[0].rank == 1
    lines = (tmp_path / "logs/rank-0.log").read_text().splitlines()
    assert [line for line in lines if not line.startswith("----")] == ["attempt 0", "attempt 1"]
    assert sum(line.startswith("----") for line in lines) == 2


def test_restarts_are_bounded(tmp_path: Path) -> None:
    ending = run(tmp_path, "fail(f'ValueError: attempt {attempt}')", workers=1, max_restarts=2)
    assert ending.kind == "failed" and ending.restarts == 2
    assert [failure.message for failure in (*ending.earlier, *ending.failures)] == [
        f"ValueError: attempt {attempt}" for attempt in range(3)
    ]
    assert "after 2 restarts" in root_cause(ending)


def test_a_bad_configuration_is_not_tried_again(tmp_path: Path) -> None:
    ending = run(tmp_path, "fail('ConfigError: no such optimizer', code=2)", max_restarts=3)
    assert ending.restarts == 0 and ending.failures[0].exit_code == 2


def test_a_second_launch_in_the_same_folder_appends(tmp_path: Path) -> None:
    run(tmp_path, "fail('ValueError: old')", workers=1)
    ending = run(tmp_path, "print('new'); sys.exit(5)", workers=1)
    assert ending.failures[0].message == "its last line was: new"
    assert (tmp_path / "logs/rank-0.log").read_text().count("----\n") == 2


def test_what_cannot_be_launched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers=0"):
        run(tmp_path, "", workers=0)
    (failure,) = launch(
        ["no-such-program"],
        workers=1,
        log_folder=tmp_path / "logs",
        max_restarts=0,
        grace_seconds=1,
        threads_per_worker=1,
    ).failures
    assert failure.exit_code == 127 and "no-such-program" in failure.message
    errors: list[Exception] = []

    def elsewhere() -> None:
        try:
            run(tmp_path, "")
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


LAUNCHER = """
import json, sys
from pathlib import Path
from dtrain.launchers.elastic_agent import launch, root_cause
ending = launch(sys.argv[2:], workers=2, log_folder=Path(sys.argv[1]) / "logs", max_restarts=3, grace_seconds=20,
                threads_per_worker=1)
print(json.dumps([ending.kind, ending.signal, ending.restarts, [f.exit_code for f in ending.failures]]))
"""


def start_launcher(folder: Path, body: str) -> subprocess.Popen[str]:
    (folder / "launcher.py").write_text(LAUNCHER)
    process = subprocess.Popen(
        [sys.executable, str(folder / "launcher.py"), str(folder), *worker(folder, body)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: all((folder / f"ready-{rank}").exists() for rank in range(2)) or process.poll() is not None)
    return process


CHECKPOINTING = """
def checkpoint(number, frame):
    signal.signal(number, signal.SIG_IGN)
    time.sleep(0.5 + 0.5 * rank)
    (folder / f"saved-{rank}").write_text(str(number))
    os._exit(%s)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, checkpoint)
(folder / f"ready-{rank}").write_text(str(os.getpid()))
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGUSR2, signal.SIGUSR2),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
def test_a_signal_reaches_the_workers_who_have_time_to_save(tmp_path: Path, sent: int, arrives: int) -> None:
    launcher = start_launcher(tmp_path, CHECKPOINTING % "0")
    launcher.send_signal(sent)
    time.sleep(0.3)
    launcher.send_signal(signal.SIGTERM)  # as impatient people and schedulers do
    output, _ = launcher.communicate()
    assert json.loads(output) == ["signalled", sent, 0, []]
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)] == [str(int(arrives))] * 2


def test_ranks_that_fail_while_they_are_stopped_are_told_and_not_restarted(tmp_path: Path) -> None:
    launcher = start_launcher(tmp_path, CHECKPOINTING % "3 * (1 - rank)")
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate()
    assert json.loads(output) == ["signalled", signal.SIGTERM, 0, [3]]
    assert (tmp_path / "saved-1").exists()


@pytest.mark.parametrize("dies", ["fail('no luck')", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_pain_12_no_process_that_a_rank_has_started_outlives_a_failure(dies: str, tmp_path: Path) -> None:
    # The helper of the rank that fails, and that of the other one, which does not end by itself either.
    body = f"""
    import subprocess
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = subprocess.Popen(["sleep", "300"])
    (folder / f"helper-{{rank}}.new").write_text(str(helper.pid))
    os.rename(folder / f"helper-{{rank}}.new", folder / f"helper-{{rank}}")
    while not ((folder / "helper-0").exists() and (folder / "helper-1").exists()):
        time.sleep(0.01)
    if rank == 1:
        {dies}
    time.sleep(300)
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dtrain.launchers.elastic_agent.ROOT_SECONDS", 0.2)
        patch.setattr("dtrain.launchers.elastic_agent.PEER_SECONDS", 0.5)
        assert run(tmp_path, body).kind == "failed"
    helpers = [int((tmp_path / f"helper-{rank}").read_text()) for rank in range(2)]
    deadline = time.monotonic() + 5
    wait_for(lambda: all(gone(helper) for helper in helpers) or time.monotonic() > deadline)
    left = [helper for helper in helpers if not gone(helper)]
    for helper in left:
        os.kill(helper, signal.SIGKILL)
    assert left == []


def test_no_worker_outlives_a_killed_launcher(tmp_path: Path) -> None:
    body = """
    from dtrain.launchers.elastic_agent import die_with_parent
    die_with_parent()
    (folder / f"ready-{rank}").write_text(str(os.getpid()))
    time.sleep(600)
    """
    launcher = start_launcher(tmp_path, body)
    pids = [int((tmp_path / f"ready-{rank}").read_text()) for rank in range(2)]
    assert not any(gone(pid) for pid in pids)
    launcher.kill()
    launcher.communicate()
    wait_for(lambda: all(gone(pid) for pid in pids))


def test_a_worker_that_starts_after_its_launcher_died_ends_at_once() -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    script = "from dtrain.launchers.elastic_agent import die_with_parent; die_with_parent(); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "DTRAIN_LAUNCHER_PID": str(dead.pid)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL and done.stdout == b""
