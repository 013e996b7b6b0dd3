"""SIGKILL at every stage, and at every single file operation: the previous or the new checkpoint is always there.

Run as a program (``python test_crash.py FOLDER``) this file makes the crashes: it imports torch once and then forks
two ranks per crash, so a hundred crashes take seconds. The tests look at what they left.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dtrain.comm.layout import Segment
from dtrain.train.checkpoint import RANK0_STAGES, STAGES, Placement, RankState, load, newest, write
from tests.fakes.checkpoint_threads import write_together

SHAPES = {"w": (8,)}
SHARDS = 2
SCENARIOS = {"next": 3, "rerun": 2}  # name -> the step that is written when it crashes; 1 and 2 are there already
KILLED = [(rank, stage) for rank in range(SHARDS) for stage in STAGES if rank == 0 or stage not in RANK0_STAGES]


def state(shard: int, step: int, generation: int) -> RankState:
    values = torch.arange(4.0) + 4 * shard + 100 * step + 1000 * generation
    segments = {"w": Segment("w", 4 * shard, 4)}
    return RankState(
        segments,
        {"parameters": {"w": values}, "residual": {"w": -values}},
        {"parameters": "replicated", "residual": "per_worker"},
        {"step": step, "generation": generation},
    )


def together(folder: Path, step: int, generation: int) -> Path:
    states = [state(shard, step, generation) for shard in range(SHARDS)]
    return write_together(folder, step=step, states=states, shards=SHARDS, shapes=SHAPES)


# --- the program -----------------------------------------------------------------------------------------------


def file_barrier(folder: Path, rank: int) -> Callable[[], None]:
    """A barrier of files, one per rank and round."""
    rounds = itertools.count()

    def barrier() -> None:
        number = next(rounds)
        (folder / f"{number}-{rank}").touch()
        while not (folder / f"{number}-{1 - rank}").exists():
            time.sleep(0.0005)

    return barrier


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_operation(folder: Path, number: int) -> None:
    """Let this process die just before the number-th operation that Python does on a file in ``folder``."""
    left = itertools.count(number, -1)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        names = [str(value) for value in arguments if isinstance(value, str | os.PathLike)]
        of_files = event == "open" or event.startswith("os.")
        if of_files and any(name.startswith(str(folder)) for name in names) and next(left) == 0:
            die()

    sys.addaudithook(hook)


def crash(folder: Path, step: int, victim: int, *, stage: str = "", operation: int = -1) -> bool:
    """Write ``step`` with two processes of which ``victim`` dies; False if it did not come to that."""
    meeting = folder.with_name(folder.name + ".meeting")
    meeting.mkdir(parents=True)
    for before in (1, 2):
        together(folder, before, 0)
    pids = []
    for rank in range(SHARDS):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if operation >= 0 and rank == victim:
                    die_at_operation(folder, operation)
                write(
                    folder,
                    step=step,
                    state=state(rank, step, 1),
                    place=Placement(0, 1, rank, SHARDS),
                    shapes=SHAPES,
                    barrier=file_barrier(meeting, rank),
                    on_stage=lambda name, rank=rank: die() if (name, rank) == (stage, victim) else None,  # type: ignore[misc]
                )
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    died = os.WIFSIGNALED(os.waitpid(pids[victim], 0)[1])
    other, other_done = pids[1 - victim], False
    while not other_done and met(meeting, 1 - victim) <= met(meeting, victim):
        other_done = os.waitpid(other, os.WNOHANG)[0] == other
        time.sleep(0.0005)
    if not other_done:  # it waits at a barrier to which the victim will not come
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    return died


def met(meeting: Path, rank: int) -> int:
    return len(list(meeting.glob(f"*-{rank}")))


def main(root: Path) -> None:
    torch.set_num_threads(1)
    crashes: dict[str, bool] = {}
    for scenario, step in SCENARIOS.items():
        for rank, stage in KILLED:
            name = f"{scenario}-{rank}-{stage}"
            crashes[name] = crash(root / name, step, rank, stage=stage)
        for operation in itertools.count():
            name = f"{scenario}-operation-{operation}"
            crashes[name] = crash(root / name, step, 0, operation=operation)
            if not crashes[name]:
                break
    (root / "crashes.json").write_text(json.dumps(crashes))


# --- the tests -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bool]]:
    root = tmp_path_factory.mktemp("crashes")
    done = subprocess.run(
        [sys.executable, __file__, str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert done.returncode == 0, done.stderr
    return root, json.loads((root / "crashes.json").read_text())


def found(folder: Path) -> tuple[int, int]:
    """(step, generation) of the newest checkpoint, once it has proved to be whole and of one piece."""
    path = newest(folder, set_aside=True)
    assert path is not None
    whole = load(path, place=Placement(0, 1, 0, 1), segments={"w": Segment("w", 0, 8)}, shapes=SHAPES)
    step, generation = int(whole.numbers["step"]), int(whole.numbers["generation"])
    expected = torch.arange(8.0) + 100 * step + 1000 * generation
    assert whole.sections["parameters"]["w"].equal(expected) and whole.sections["residual"]["w"].equal(-expected)
    return step, generation


def check_goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A rerun writes as if nothing had happened, and leaves nothing behind."""
    together(folder, 3, 2)
    assert found(folder) == (3, 2)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latest", "step-0000000002", "step-0000000003"]
    assert (folder / "latest").read_text() == "step-0000000003\n"
    assert "DAMAGED" not in caplog.text


@pytest.mark.processes
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("rank", "stage"), KILLED)
def test_killed_at_a_stage(
    scenario: str,
    rank: int,
    stage: str,
    crashes: tuple[Path, dict[str, bool]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    root, died = crashes
    name = f"{scenario}-{rank}-{stage}"
    assert died[name], "the rank was to die there"
    committed = STAGES.index(stage) >= STAGES.index("renamed")
    if stage == "gathered" and rank == 1:  # rank 0 needs rank 1 no more, and commits
        committed = True
    with caplog.at_level(logging.WARNING):
        assert found(root / name) == ((SCENARIOS[scenario], 1) if committed else (2, 0))
        check_goes_on(root / name, caplog)


@pytest.mark.processes
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_before_any_file_operation_of_rank_0(
    scenario: str, crashes: tuple[Path, dict[str, bool]], caplog: pytest.LogCaptureFixture
) -> None:
    root, died = crashes
    names = [name for name in died if name.startswith(f"{scenario}-operation-")]
    assert len(names) > 20 and [died[name] for name in names] == [True] * (len(names) - 1) + [False]
    generations = []
    with caplog.at_level(logging.WARNING):
        for name in names:
            step, generation = found(root / name)
            assert (step, generation) in ((2, 0), (SCENARIOS[scenario], 1))
            generations.append(generation)
            check_goes_on(root / name, caplog)
    assert generations == sorted(generations), "there is one moment before which it is the old one, and after, the new"
    assert set(generations) == {0, 1}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
