"""The secret that replicas share with the members' store, from the environment or a file of the user.

DTRAIN_MEMBERS_SECRET        the secret itself, for containers and schedulers that pass secrets on
DTRAIN_MEMBERS_SECRET_FILE   a file that holds it; by default $XDG_STATE_HOME/dtrain/members.secret (~/.local/state)

Whoever knows it may write anything to the store, so only its owner may read the file. It is never printed,
logged or sent.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

__all__ = ["VALUE", "made_secret", "read_secret", "secret_file"]

VALUE, FILE = "DTRAIN_MEMBERS_SECRET", "DTRAIN_MEMBERS_SECRET_FILE"
LEAST, MOST = 32, 4096  # characters


def secret_file(file: str | Path | None = None) -> Path:
    """``file``, else the one that the environment names, else the default."""
    if file or os.environ.get(FILE):
        return Path(file or os.environ[FILE])
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "dtrain" / "members.secret"


def read_secret(file: str | Path | None = None) -> bytes:
    """The secret. Raises ``ValueError`` if there is none, it is short, or others may read it."""
    if file is None and os.environ.get(VALUE):
        return _long_enough(os.environ[VALUE], VALUE)
    path = secret_file(file)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(
            f"no secret for the members' store: {path} ({error.strerror}). `dtrain members` makes one; bring that file "
            f"here with mode 0600, or set {FILE} or {VALUE}"
        ) from error
    with os.fdopen(descriptor, "rb") as opened:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_uid not in (os.geteuid(), 0) or about.st_mode & 0o077:
            raise ValueError(
                f"{path} holds the members' secret and has mode {stat.S_IMODE(about.st_mode):04o}, owner "
                f"{about.st_uid}: others may know it; take it for yourself alone (chmod 600), or make a new one"
            )
        return _long_enough(opened.read(MOST).decode("utf-8", "replace"), str(path))


def made_secret(file: str | Path | None = None) -> bytes:
    """The secret; without one, a new one, in its file of mode 0600. Raises ``ValueError`` as `read_secret`."""
    if file is None and os.environ.get(VALUE):
        return read_secret()
    path = secret_file(file)
    if not path.exists():
        new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
                opened.write(f"{secrets.token_hex(32)}\n")
            try:
                os.link(new, path)  # atomic: the first process has made it
            except FileExistsError:
                pass
            finally:
                new.unlink()
        except OSError as error:
            raise ValueError(
                f"no secret can be written to {path} ({error.strerror}); name another file with {FILE}, or set {VALUE}"
            ) from error
    return read_secret(file)


def _long_enough(text: str, where: str) -> bytes:
    secret = text.strip()
    if not LEAST <= len(secret) <= MOST:
        raise ValueError(
            f"the members' secret in {where} has {len(secret)} characters; it takes {LEAST} to {MOST}, as openssl rand "
            "-hex 32 makes them"
        )
    return secret.encode()
