"""One worker process of ``dtrain train``: ``python -m dtrain.train.worker RUN/config.yaml``, started by a launcher.

It loads the frozen configuration, joins the process group that its environment describes (RANK, WORLD_SIZE,
MASTER_ADDR, ...), trains, and ends with 0 when rank 0 has left ``outcome.json``. An elastic launcher restarts all ranks
after any other code; after 2 (bad configuration, or an error that would recur) no launcher does. Under Slurm and MPI
the exit code is 75 (stopped as asked, run again) or 130 (ended by the user) where that applies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from dtrain.errors import ConfigError, DtrainError
from dtrain.launchers import probe
from dtrain.launchers import rendezvous as meeting
from dtrain.launchers import trust as trusted
from dtrain.launchers.elastic_agent import die_with_parent
from dtrain.launchers.exit_codes import BAD_CONFIG, INTERRUPTED, RUN_AGAIN
from dtrain.launchers.lock import HELD, InUse, held
from dtrain.launchers.probe import await_gloo_threads
from dtrain.launchers.records import ATTEMPT
from dtrain.report.at_the_end import closing
from dtrain.train.garbage import loading

INTERFACE = "GLOO_SOCKET_IFNAME"


def main(arguments: list[str]) -> int:
    """Train one rank; returns the exit code. Raises what training raises, for the launcher's error file."""
    with loading():
        import torch.distributed as dist

        from dtrain.comm.transports.mpi import finalize
        from dtrain.report.progress import printer
        from dtrain.train.config import load
        from dtrain.train.mesh import own_device, patience
        from dtrain.train.signals import StopRequest
        from dtrain.train.time_limit import Clock
        from dtrain.train.trainer import train

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")  # about torch's own internals
    (path,) = arguments
    try:
        for loaded in (Path(path).parent, Path(path)):
            trusted.require_own(loaded)
    except FileNotFoundError:
        pass  # load() raises the better error
    except trusted.Untrusted as error:
        raise ConfigError(str(error)) from error
    config = load(Path(path))
    check_interface(os.environ.get(INTERFACE, ""), (name for _, name in socket.if_nameindex()))
    # `dtrain train` on one machine shows the rows of metrics.jsonl itself; elsewhere they belong in the log.
    in_foreground = "TORCHELASTIC_RUN_ID" in os.environ and ATTEMPT not in os.environ
    backend = "nccl" if own_device().type == "cuda" else "gloo"
    with alone(Path(config.run.dir)):
        dist.init_process_group(backend, timeout=patience(backend), **meeting.of_environment())
        try:
            # A few seconds less than the launcher waits, so that the stacks of a rank that hangs reach its log.
            grace = max(1.0, config.launcher.grace_seconds - 5)
            with StopRequest(grace_seconds=grace) as stop:
                restart = os.environ.get(ATTEMPT, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
                attempt = f"{restart}-{os.environ.get('MASTER_PORT', '')}"
                clock = Clock.from_environment()
                on_row = (lambda row: None) if in_foreground else printer(config.train.steps)
                outcome = train(
                    config, requested=lambda: stop.requested, clock=clock, attempt=attempt, on_row=on_row
                )  # fmt: skip
                if dist.get_rank() == 0 and not in_foreground:
                    print(closing(outcome, Path(config.run.dir), report=config.run.report), flush=True)
        finally:
            dist.destroy_process_group()
            await_gloo_threads()
    finalize()
    if outcome.reason != "signal" or in_foreground:
        return 0
    return INTERRUPTED if outcome.signal == signal.SIGINT else RUN_AGAIN


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of the run folder on rank 0, unless its launcher does (`launchers.lock`).

    Raises:
        ConfigError: another run trains in it.
    """
    locked = os.environ.get(HELD)
    if os.environ.get("RANK", "0") != "0" or (locked and os.path.realpath(locked) == os.path.realpath(folder)):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder, "rank 0"):
            yield
    except InUse as error:
        raise ConfigError(f"run.dir={error}: wait for it, end it, or choose another") from error


def check_interface(wanted: str, interfaces: Iterable[str]) -> None:
    """Check that this host has the network interfaces that gloo is to use: gloo's own error names no key.

    Raises:
        ConfigError: it lacks one, so that a restart is useless.
    """
    names = sorted(interfaces)
    missing = [name for name in wanted.split(",") if name and name not in names]
    if missing:
        raise ConfigError(
            f"launcher.interface ({INTERFACE}): {socket.gethostname()} has no network interface {', '.join(missing)}, "
            f"only {', '.join(names)}; name one that every node has, or leave launcher.interface out"
        )


if __name__ == "__main__":
    die_with_parent()
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        # `dtrain train` on one machine starts this program itself, all others under the probe.
        with contextlib.nullcontext() if probe.watches() else probe.probed():
            code = record(main)(sys.argv[1:])
        sys.exit(code)
    except DtrainError as error:
        if error.exit_code != BAD_CONFIG:
            raise
        print(f"dtrain: error: {error}", file=sys.stderr, flush=True)  # into the rank's log
        sys.exit(error.exit_code)
