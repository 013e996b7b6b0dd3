"""A request to stop is seen at once, is one request, and never outlives its deadline."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dtrain.train.signals import StopRequest, overheard

REPOSITORY = Path(__file__).parents[1]


def wait_for(stop: StopRequest) -> int:
    while not stop.requested:
        time.sleep(0.005)
    return stop.requested


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_wins(number: int) -> None:
    with StopRequest(grace_seconds=50) as stop:
        assert stop.requested == 0 and stop.seconds_since == 0
        os.kill(os.getpid(), number)
        assert wait_for(stop) == number
        os.kill(os.getpid(), signal.SIGTERM if number != signal.SIGTERM else signal.SIGUSR1)
        before = stop.seconds_since
        time.sleep(0.05)
        assert stop.requested == number and stop.seconds_since > before > 0


def test_sigcont_asks_for_nothing() -> None:
    with StopRequest(grace_seconds=50) as stop:
        os.kill(os.getpid(), signal.SIGCONT)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert wait_for(stop) == signal.SIGUSR1


def test_it_is_seen_while_the_main_thread_is_blocked_in_c() -> None:
    libc = ctypes.CDLL(None)  # calls release the GIL; a mutex is not interrupted by signals, unlike sleep
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    seen: list[int] = []

    with StopRequest(grace_seconds=50) as stop:

        def signal_and_release() -> None:
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append(wait_for(stop))
            libc.pthread_mutex_unlock(mutex)

        thread = threading.Thread(target=signal_and_release)
        thread.start()
        libc.pthread_mutex_lock(mutex)  # returns only because the other thread has seen the request
        thread.join()
    assert seen == [signal.SIGTERM]


def test_the_old_handlers_and_wakeup_are_back_afterwards() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
    before = [signal.getsignal(number) for number in numbers]
    old = signal.set_wakeup_fd(write)
    try:
        with StopRequest(grace_seconds=50):
            assert signal.getsignal(signal.SIGTERM) is not before[0]
        assert signal.set_wakeup_fd(old) == write
    finally:
        os.close(read)
        os.close(write)
    assert [signal.getsignal(number) for number in numbers] == before
    assert not any(thread.name == "dtrain-stop-request" for thread in threading.enumerate())


def test_two_at_once_and_other_threads_are_refused() -> None:
    errors: list[str] = []

    def elsewhere() -> None:
        try:
            StopRequest(grace_seconds=1).__enter__()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]
    with StopRequest(grace_seconds=50), pytest.raises(RuntimeError, match="one at a time"):
        StopRequest(grace_seconds=50).__enter__()


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.processes
def test_a_main_thread_that_never_leaves_ends_with_75_and_its_stack() -> None:
    done = python("""
import ctypes, os, signal
from dtrain.train.signals import StopRequest, overheard
def stuck_in_a_collective():
    mutex = ctypes.create_string_buffer(64)
    os.kill(os.getpid(), signal.SIGUSR2)
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
with StopRequest(grace_seconds=0.3):
    stuck_in_a_collective()
""")
    assert done.returncode == 75
    assert "SIGUSR2 came 0.3 s ago" in done.stderr and "stuck_in_a_collective" in done.stderr


@pytest.mark.processes
def test_a_signal_to_a_forked_child_is_not_ours_and_terminates_it() -> None:
    done = python("""
import os, signal, time
from dtrain.train.signals import StopRequest, overheard
with StopRequest(grace_seconds=50) as stop:
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGINT)   # left to the parent
        os.kill(os.getpid(), signal.SIGTERM)  # how loaders end their workers
        os._exit(0)
    _, status = os.waitpid(child, 0)
    time.sleep(0.1)
    print(os.waitstatus_to_exitcode(status), stop.requested)
""")
    assert done.stdout.split() == [str(-signal.SIGTERM), "0"], done.stderr


def test_whoever_listens_in_hears_every_signal_and_the_handler_has_it_too() -> None:
    heard: list[int] = []
    handled: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, frame: handled.append(number))
    try:
        with overheard(heard.append):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGWINCH)  # ignored by default, and no stop signal
            deadline = time.monotonic() + 20
            while len(heard) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
        assert signal.set_wakeup_fd(-1) == -1
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert heard == [signal.SIGUSR1] * 2 and handled == [signal.SIGUSR1] * 3
