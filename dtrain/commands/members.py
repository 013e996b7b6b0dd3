"""``dtrain members``: the store at which replicas meet that come and go."""

from __future__ import annotations

import argparse
import signal
import socket
from typing import TYPE_CHECKING

from dtrain.commands import add_verb
from dtrain.errors import DtrainError

if TYPE_CHECKING:
    from dtrain.commands import Verbs

EPILOG = """\
It holds a few numbers for each replica and no parameters; it must outlive all replicas, so let it run where none of
them does, or where the batch script does. Replicas name it: attach(..., members=Members("HOST:PORT", replicas=4)).

examples:
  dtrain members --port 29400
"""


def add(verbs: Verbs) -> None:
    """Add ``members``."""
    parser = add_verb(verbs, "members", does="serve the store at which replicas meet that come and go", epilog=EPILOG)
    parser.add_argument("--port", type=int, default=29400, help="0: any free one (default: %(default)s)")
    parser.set_defaults(run=_serve)


def _serve(chosen: argparse.Namespace) -> int:
    from dtrain.comm.drivers.members import serve

    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # before there are other threads to take them
    try:
        store = serve(chosen.port)
    except OSError as error:
        raise DtrainError(f"{error}; choose another port, or 0 for a free one") from error
    print(f"replicas meet at {socket.gethostname()}:{store.port}; Ctrl-C ends it", flush=True)
    signal.sigwait(ends)
    return 0
