"""``dtrain members``: the store at which the replicas of an elastic run meet."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
from typing import TYPE_CHECKING

from dtrain.cli import add_verb
from dtrain.errors import ConfigError, DtrainError

if TYPE_CHECKING:
    from dtrain.cli import Verbs

EPILOG = """\
It holds a few numbers for each replica and no parameters; it must outlive all replicas, so let it run where none of
them does, or where the batch script does. Replicas name it: attach(..., members=Members("HOST:PORT", replicas=4)).

It listens on this machine alone unless --host names an address, and only to those who know its secret: a file that it
makes, mode 0600. Replicas find it there; on machines that do not share this folder, copy it, or set
DTRAIN_MEMBERS_SECRET_FILE or DTRAIN_MEMBERS_SECRET. The replicas' own connections know no secret and are not encrypted:
see docs/security.md for the networks that this is for.

examples:
  dtrain members --port 29400                         for replicas on this machine
  dtrain members --port 29400 --host 10.0.0.1         for those on its network
"""


def add(verbs: Verbs) -> None:
    """Add ``members``."""
    parser = add_verb(
        verbs, "members", does="serve the store at which the replicas of an elastic run meet", epilog=EPILOG
    )
    parser.add_argument("--port", type=int, default=29400, help="0: any free one (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at, 0.0.0.0: all (default: %(default)s)")
    parser.add_argument("--secret-file", metavar="FILE", help="holds the secret; made if there is none")
    parser.set_defaults(run=_serve)


def _serve(chosen: argparse.Namespace) -> int:
    from dtrain.comm.runtime.membership.members import serve
    from dtrain.comm.runtime.membership.secret import VALUE, secret_file

    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # before there are other threads to take them
    if not 0 <= chosen.port < 1 << 16:
        raise ConfigError(f"--port {chosen.port}: give 0 to 65535")
    try:
        store = serve(chosen.port, chosen.host, secret_file=chosen.secret_file)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise DtrainError(f"{error}; choose another port, or 0 for a free one, or another --host") from error
    everywhere = chosen.host in ("0.0.0.0", "::", "")
    print(f"replicas meet at {socket.gethostname() if everywhere else chosen.host}:{store.port}; Ctrl-C ends it")
    by_value = os.environ.get(VALUE) and not chosen.secret_file
    print(f"their secret is {f'that of {VALUE}' if by_value else f'in {secret_file(chosen.secret_file)}'}", flush=True)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    signal.sigwait(ends)
    return 0
