"""Workers on this machine, under torch's elastic agent: ranks, rendezvous, restarts, logs and a diagnosis.

    launching process (main thread)                 one process per rank, each its own session
    launch(): elastic agent, rendezvous   -- argv -> worker, stdout and stderr appended to logs/rank-K.log
              stop signal                 -- same signal, once -> worker checkpoints and leaves in grace_seconds
              a rank failed               -- SIGTERM -> the others; then all start again, max_restarts times
              killed with -9              -- die_with_parent() in the worker -> SIGKILL

The agent is torch's own ``LocalElasticAgent``, as ``elastic_launch`` builds it, with two methods replaced:
``elastic_launch`` raises from its signal handler, which orphans workers when the signal falls between two starts or
comes twice, and it loses the exit codes of workers that it stops.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dtrain.launchers import rendezvous as meeting
from dtrain.launchers.exit_codes import NEVER_AGAIN
from dtrain.launchers.failure import (
    CONSEQUENCE,
    Ending,
    Failure,
    read_error,
    read_log_end,
    read_probe,
    root_cause,
    signal_name,
)
from dtrain.launchers.inherited_environment import handed_on, replaced
from dtrain.launchers.probe import FOLDER
from dtrain.launchers.stop_signals import FirstSignal, passed_on

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

__all__ = ["Ending", "Failure", "die_with_parent", "launch", "root_cause"]

LAUNCHER_PID = "DTRAIN_LAUNCHER_PID"  # environment of the workers: the process that they must not outlive
POLL_SECONDS = 0.05
ROOT_SECONDS = 2.0  # after the first failure others may still record theirs, which can be the cause
PEER_SECONDS = 10.0  # then SIGTERM, and this long until SIGKILL
PR_SET_PDEATHSIG = 1
# Appending, so that a restart keeps what came before: the agent itself opens log files with "w". `exec` keeps the pid.
INTO_LOG = 'exec "$@" >>"$DTRAIN_LOG" 2>&1 </dev/null'


def die_with_parent() -> None:
    """Have the kernel kill this process when the process that launched it dies. Workers call it first thing.

    Outside :func:`launch` (Slurm, a plain shell) it ties the process to its parent. It does nothing except on Linux.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    launcher = int(os.environ.get(LAUNCHER_PID, parent))
    # The launcher may have died before prctl. Another parent is fine while the launcher lives: a wrapper script.
    if os.getppid() != parent or (parent != launcher and not _alive(launcher)):
        os.kill(os.getpid(), signal.SIGKILL)


def launch(
    argv: Sequence[str],
    *,
    workers: int,
    log_folder: Path,
    max_restarts: int,
    grace_seconds: float,
    threads_per_worker: int,
    environment: Mapping[str, str] | None = None,
    on_restart: Callable[[Failure, int], None] | None = None,
) -> Ending:
    """Run ``argv`` as ``workers`` ranks on this machine and wait until they have ended.

    Workers find RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and TORCHELASTIC_RESTART_COUNT in their
    environment (``environment`` is added to it). What rank K writes is appended to ``log_folder/rank-K.log`` as it
    comes. SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP (as SIGTERM) are passed on once; after ``grace_seconds`` what is
    left is killed. A failed rank restarts all, at most ``max_restarts`` times, never after exit code 2 (or 126 and 127,
    a shell's for a missing program); ``on_restart(root cause, number of the restart)`` is called before. Raises
    RuntimeError outside the main thread, ValueError for an empty ``argv`` or no workers.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("launch() must run on the main thread: only there can signals reach the workers")
    if not argv or workers < 1:
        raise ValueError(f"nothing to launch: argv={list(argv)}, workers={workers}; give a command and a worker")
    log_folder = log_folder.resolve()
    log_folder.mkdir(parents=True, exist_ok=True)
    extra = {"OMP_NUM_THREADS": str(threads_per_worker), "PYTHONUNBUFFERED": "1", LAUNCHER_PID: str(os.getpid())}
    extra |= {**meeting.on_loopback(), **(environment or {})}
    with FirstSignal(signal.SIGQUIT) as stop, _agent_environment(), _agent_log(log_folder / "launcher.log"):
        run = _Run(log_folder, workers, max_restarts, grace_seconds, extra, on_restart)
        agent = _agent(argv, run, stop)
        from torch.distributed.elastic.multiprocessing import SignalException

        try:
            agent.run()
        except _Stopped:
            pass
        except SignalException as quit_signal:  # SIGQUIT, the only signal left to torch's handler
            return run.ending("signalled", int(quit_signal.sigval))
        finally:
            agent._rdzv_handler.shutdown()
        if stop.number:
            return run.ending("signalled", stop.number)
        return run.ending("failed" if run.failures else "finished", None)


class _Stopped(Exception):
    """The workers were stopped because the launching process got a signal."""


@dataclass
class _Run:
    """The state of the ranks of one launch, independent of torch."""

    folder: Path
    workers: int
    max_restarts: int
    grace_seconds: float
    environment: dict[str, str]
    on_restart: Callable[[Failure, int], None] | None
    attempt: int = field(default=-1, init=False)
    earlier: list[Failure] = field(default_factory=list, init=False)
    failures: list[Failure] = field(default_factory=list, init=False)
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)
    log_starts: dict[int, int] = field(default_factory=dict, init=False)  # rank -> where in its log this attempt begins
    ended_at: dict[int, float] = field(default_factory=dict, init=False)
    cut_short: set[int] = field(default_factory=set, init=False)  # ranks that we ended because of another rank

    def log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def error_file(self, rank: int) -> Path:
        return self.folder / "errors" / f"attempt-{self.attempt}" / f"rank-{rank}.json"

    def probe_file(self, rank: int) -> Path | None:
        """The error file of a rank under `dtrain.launchers.probe`; None without a probe."""
        folder = self.environment.get(FOLDER)
        return Path(folder) / f"rank-{rank}.error" if folder else None

    def prepare(self) -> None:
        """Begin the next attempt: a header line in every log, and no error file of an older launch."""
        self.attempt += 1
        self.processes, self.log_starts, self.ended_at, self.failures = {}, {}, {}, []
        self.cut_short = set()
        for rank in range(self.workers):
            self.error_file(rank).parent.mkdir(parents=True, exist_ok=True)
            for path in filter(None, (self.error_file(rank), self.probe_file(rank))):
                path.unlink(missing_ok=True)
            with self.log(rank).open("a") as log:
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                log.write(f"---- rank {rank} of {self.workers}, attempt {self.attempt + 1}, {now} ----\n")
                self.log_starts[rank] = log.tell()

    def running(self) -> list[int]:
        codes = {rank: process.poll() for rank, process in self.processes.items()}
        for rank, code in codes.items():
            if code is not None:
                self.ended_at.setdefault(rank, time.time())
        return [rank for rank, code in codes.items() if code is None]

    def failed(self) -> bool:
        self.running()
        return any(process.returncode for process in self.processes.values())

    def wait(self, seconds: float) -> bool:
        """Wait for all ranks; whether they have ended."""
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def kill(self) -> None:
        for rank in self.running():
            self.cut_short.add(rank)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[rank].pid, signal.SIGKILL)
        self.wait(PEER_SECONDS)

    def sweep(self) -> None:
        """Kill processes that ranks have left behind, such as loaders: they hold ports, memory and files."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # each rank began a session of its own

    def stop(self, number: int) -> None:
        """Pass a signal on to the ranks (not to their helper processes), wait for the checkpoint, kill what is left."""
        for rank in self.running():
            self.processes[rank].send_signal(passed_on(number))
        if not self.wait(self.grace_seconds):
            self.kill()
        self.sweep()
        self.record(f"still running {self.grace_seconds:g} s after the signal, so it was killed")

    def settle(self) -> None:
        """After a first failure: let the others record theirs, then end them."""
        if not self.wait(ROOT_SECONDS):
            self.cut_short.update(self.running())
            for rank in self.running():
                self.processes[rank].send_signal(signal.SIGTERM)
            if not self.wait(PEER_SECONDS):
                self.kill()
        self.sweep()
        self.record("ended because another rank had failed")

    def record(self, why_cut: str) -> None:
        failures = [self._failure(rank, why_cut) for rank, process in self.processes.items() if process.returncode]
        self.failures = sorted(failures, key=lambda failure: (failure.consequence, failure.time, failure.rank))

    def _failure(self, rank: int, why_cut: str) -> Failure:
        code = self.processes[rank].returncode
        name = signal_name(-code) if code < 0 else None
        report = read_error(self.error_file(rank))
        # An unreadable error file makes the agent itself fail, with an error that hides this one.
        if not report:
            self.error_file(rank).unlink(missing_ok=True)
        ended = self.error_file(rank).stat().st_mtime if report else self.ended_at[rank]
        probe = self.probe_file(rank)
        if not report and probe and (report := read_probe(probe)):
            ended = probe.stat().st_mtime
        message, trace = report or read_log_end(self.log(rank), self.log_starts[rank])
        if rank in self.cut_short and not report:
            message = why_cut
        elif name and not report:
            message = f"killed by {name}" + (" (out of memory? see dmesg)" if name == "SIGKILL" else "")
        consequence = (rank in self.cut_short and not report) or bool(CONSEQUENCE.search(message))
        where = self.log(rank)
        return Failure(
            rank, None if name else code, name, message, trace, socket.gethostname(), where, ended, consequence
        )

    def before_restart(self) -> None:
        self.earlier.append(self.failures[0])
        if self.on_restart:
            self.on_restart(self.failures[0], self.attempt + 1)

    def ending(self, kind: Literal["finished", "signalled", "failed"], number: int | None) -> Ending:
        if self.failures and not any(not failure.consequence for failure in self.failures):
            # There is no other cause: take the earliest.
            self.failures[0] = replace(self.failures[0], consequence=False)
        return Ending(kind, number, max(self.attempt, 0), tuple(self.failures), tuple(self.earlier))


def _agent(argv: Sequence[str], run: _Run, stop: FirstSignal) -> LocalElasticAgent:
    """The elastic agent that ``elastic_launch`` would build, but it stops for ``stop`` and reports to ``run``."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        def _start_workers(self, worker_group: WorkerGroup) -> dict[int, object]:
            if stop.number:
                raise _Stopped
            run.prepare()
            pids: dict[int, object] = super()._start_workers(worker_group)
            handlers = self._pcontext.subprocess_handlers  # type: ignore[union-attr]
            run.processes = {rank: handler.proc for rank, handler in handlers.items()}
            return pids

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            if stop.number:
                run.stop(stop.number)
                raise _Stopped
            if run.failed():
                run.settle()
                if run.failures[0].exit_code in NEVER_AGAIN:
                    self._remaining_restarts = 0
                if self._remaining_restarts and not stop.number:
                    run.before_restart()
            elif run.running():
                return RunResult(state=WorkerState.HEALTHY)
            collected: RunResult = super()._monitor_workers(worker_group)  # all have ended
            return collected

    # The agent substitutes "${local_rank}" in arguments, so a dollar sign must be doubled to arrive as one.
    shell = [word.replace("$", "$$") for word in ("-c", INTO_LOG, "worker", *argv)]
    spec = WorkerSpec(
        role="worker",
        local_world_size=run.workers,
        entrypoint="/bin/sh",
        args=tuple(shell),
        rdzv_handler=meeting.one_machine(),
        max_restarts=run.max_restarts,
        monitor_interval=0.1,
        local_addr=meeting.LOOPBACK,
    )
    # Before torch 2.12 it waits for 30 seconds between SIGTERM and SIGKILL, whatever it is told.
    told: dict[str, Any] = {"shutdown_timeout": int(PEER_SECONDS)}
    knows = inspect.signature(LocalElasticAgent).parameters
    return Agent(spec, _logs_specs(run), **{name: value for name, value in told.items() if name in knows})


def _logs_specs(run: _Run) -> LogsSpecs:
    """Where the agent lets workers write errors; their output goes to the logs by the shell that starts them."""
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

    class Logs(LogsSpecs):
        @property
        def root_log_dir(self) -> str:
            return str(run.folder)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            errors = {rank: str(run.error_file(rank)) for rank in envs}
            for rank, environment in envs.items():
                environment["TORCHELASTIC_ERROR_FILE"] = errors[rank]
                environment["DTRAIN_LOG"] = str(run.log(rank))
                environment.update(run.environment)
            terminal = dict.fromkeys(envs, "")  # the agent's word for "opens no file"
            return LogsDest(stdouts=terminal, stderrs=terminal, error_files=errors)

    return Logs()


@contextlib.contextmanager
def _agent_environment() -> Iterator[None]:
    """Set what the agent reads from its own environment, and passes on to the ranks; restored afterwards."""
    wanted = {
        **handed_on(os.environ, "job"),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",  # the others are ours; the list may not be empty
    }
    with replaced(wanted):
        yield


@contextlib.contextmanager
def _agent_log(path: Path) -> Iterator[None]:
    """Send the agent's own lines to a file, so that the terminal shows the root cause first."""
    logger = logging.getLogger("torch.distributed.elastic")
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        handler.close()


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"  # a zombie is dead, only not yet waited for
