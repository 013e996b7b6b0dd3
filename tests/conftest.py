"""What every test has in common: how hypothesis searches, and the same random numbers whichever test came before."""

from __future__ import annotations

import gc
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from dtrain.testing import WorkerPool
from tests.gpu.card import asked

# No deadline: the machines that run the tests are shared, and an example that is slow once is no finding.
settings.register_profile("local", deadline=None)
# In CI the same examples each time: a red build says something about the change, not about luck. People's machines
# go on searching.
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
# `make test-quick`: tests that name a number of examples keep theirs.
settings.register_profile("quick", deadline=None, max_examples=10)
# The list of the user's jobs, and secrets, are the user's: tests have a folder of their own.
_STATE = tempfile.TemporaryDirectory(prefix="dtrain-tests-")
os.environ["XDG_STATE_HOME"] = _STATE.name
# One thread, as the workers have: two test processes on two cores then do not fight, and sums keep their order.
torch.set_num_threads(1)
# Under nohup, or behind `&` in a script, these are ignored, and so they would be in every process that a test starts.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config: pytest.Config) -> None:
    """But for those of `tests/gpu`, tests are on the CPU where there is a card too."""
    if torch.version.cuda is not None and not asked(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Modules and thousands of tests stay to the end; garbage collections need not look at them again and again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--few", type=int, metavar="N", help="run at most N cases of each test function")
    parser.addoption("--slowest", type=Path, metavar="FILE", help="write a table of the twenty slowest tests there")


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """Whoever uses the pool starts processes, whether its file says so or not; `--few` leaves out cases."""
    for item in items:
        if "pool" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")
    most: int | None = config.getoption("--few")
    if most is not None:
        chosen = _few(items, most)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]


def _few(items: list[pytest.Item], most: int) -> set[str]:
    """Of each test function at most so many cases, spread evenly over all of its cases."""
    cases: dict[str, list[str]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item.nodeid)
    return {
        ids[number * len(ids) // min(most, len(ids))] for ids in cases.values() for number in range(min(most, len(ids)))
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The slowest tests, with what sets them up, in the order of their time."""
    path: Path | None = config.getoption("--slowest")
    if path is None:
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] += report.duration  # type: ignore[assignment]
    rows = [f"| {duration:.1f} | {name} |" for name, duration in seconds.most_common(20)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["| seconds | test |", "|---:|---|", *rows, ""]))
    terminalreporter.write_line(f"the twenty slowest tests: {path}")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The global generators of Python, numpy and torch, for code that draws from them; hypothesis has its own."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes that every test of real collectives shares: starting them takes longer than most jobs."""
    with WorkerPool(4) as workers:
        yield workers
