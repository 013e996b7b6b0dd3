"""One worker process of ``dtrain train``: ``python -m dtrain.worker RUN/config.yaml``, started by a launcher.

It loads the frozen configuration, joins the process group that its environment describes (RANK, WORLD_SIZE,
MASTER_ADDR, ...), trains, and ends with 0 when rank 0 has left ``outcome.json``. To an elastic launcher any other code
means: start all again. Code 2 (bad configuration) it does not repeat. Under Slurm and MPI the exit code itself says
75 (checkpointed, run me again) or 130 (ended by the user).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path

from dtrain.errors import CHECKPOINTED, INTERRUPTED
from dtrain.launchers.local import die_with_parent
from dtrain.launchers.probe import settle
from dtrain.launchers.record import ATTEMPT


def main(arguments: list[str]) -> int:
    """Train one rank; returns the exit code. Raises what training raises, for the launcher's error file."""
    import torch
    import torch.distributed as dist

    from dtrain.clock import Clock
    from dtrain.comm.drivers.mpi import finalize
    from dtrain.config import load
    from dtrain.signals import StopRequest
    from dtrain.trainer import train

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")  # about torch's own internals
    (path,) = arguments
    config = load(Path(path))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        # A few seconds less than the launcher waits, so that the stacks of a rank that hangs reach its log.
        grace = max(1.0, config.launcher.grace_seconds - 5)
        with StopRequest(grace_seconds=grace) as stop:
            restart = os.environ.get(ATTEMPT, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
            attempt = f"{restart}-{os.environ.get('MASTER_PORT', '')}"
            clock = Clock.from_environment()
            outcome = train(config, requested=lambda: stop.requested, clock=clock, attempt=attempt)
    finally:
        dist.destroy_process_group()
        settle()
    finalize()
    if outcome.reason != "signal" or ("TORCHELASTIC_RUN_ID" in os.environ and ATTEMPT not in os.environ):
        return 0
    return INTERRUPTED if outcome.signal == signal.SIGINT else CHECKPOINTED


if __name__ == "__main__":
    die_with_parent()
    from torch.distributed.elastic.multiprocessing.errors import record

    from dtrain.errors import ConfigError

    try:
        code = record(main)(sys.argv[1:])
        sys.exit(code)
    except ConfigError as error:
        sys.exit(error.exit_code)
