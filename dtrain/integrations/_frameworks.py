"""The packages of others that the integrations plug into, and with which versions that was tested."""

from __future__ import annotations

import importlib.metadata
import warnings

from dtrain.comm.transports.json_gather import gather_json

TESTED = {"transformers": ("5.24", "5.24"), "accelerate": ("1.15", "1.15"), "lightning": ("2.6", "2.6")}
"""By package: the oldest and the newest minor version."""


def require(package: str) -> None:
    """Raise ``ImportError`` if ``package`` is missing; warn if it is a version that was not tested.

    The integrations call methods of trainers that their authors may change between minor versions.
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"this integration needs {package}, which is not installed: pip install {package}") from error
    oldest, newest = (_numbers(edge) for edge in TESTED[package])
    if not oldest <= _numbers(version) <= newest:
        tested = " to ".join(dict.fromkeys(TESTED[package]))
        warnings.warn(
            f"dtrain was tested with {package} {tested}, and this is {version}: it is tried. If it fails, install what "
            "was tested, or step the sync in a loop of your own",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip


def require_alike(integration: str, **settings: object) -> None:
    """Raise ``ValueError`` on all ranks unless they use the same integration with the same settings.

    Every rank must call it, before `attach`.
    """
    ranks = gather_json({"integration": integration, **settings})
    for name, value in ranks[0].items():
        other = next((rank for rank, theirs in enumerate(ranks) if theirs.get(name) != value), None)
        if other is not None:
            raise ValueError(
                f"ranks differ: {name} is {value!r} on rank 0 and {ranks[other].get(name)!r} on rank {other}; run the "
                "same script with the same settings on all ranks"
            )


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor.

    >>> _numbers("5.24.0")
    (5, 24)
    """
    return tuple(int(number) for number in version.split(".")[:2])
