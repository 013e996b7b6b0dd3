"""Files of tensors, with the permissions of the umask and a digest that readers verify."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtrain.errors import CheckpointError

DIGEST = "tensors_digest"
PARAMETERS_DIGEST = "parameters_digest"
META = "meta"
"""Entries of the metadata of what dtrain exports."""


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file durably. Tensors must be contiguous and share no memory.

    Raises OSError where the file system refuses it. safetensors replaces the file by one that only its owner may read,
    whatever the umask; the mode is restored.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode & 0o7777
    finally:
        os.close(descriptor)
    try:
        save_file(dict(tensors), path, dict(metadata) if metadata else None)
    except SafetensorError as error:
        raise _as_os_error(error, path) from error
    if path.stat().st_mode & 0o7777 != mode:
        path.chmod(mode)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of named tensors: name, dtype, shape and bytes of each, in the order of the names.

    >>> one, other = {"w": torch.zeros(2)}, {"w": torch.zeros(2, 1)}
    >>> tensors_digest(one) == tensors_digest(dict(one)), tensors_digest(one) == tensors_digest(other)
    (True, False)
    """
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        shape = "x".join(str(length) for length in tensor.shape)
        sha.update(f"{name}\0{tensor.dtype}\0{shape}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return sha.hexdigest()


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, verified by its `DIGEST` if it has one.

    Raises CheckpointError for a file that is missing, not safetensors, or changed since it was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if DIGEST in metadata and tensors_digest(tensors) != metadata[DIGEST]:
        raise CheckpointError(
            f"{path} does not hold the tensors that it was written with: its digest is {metadata[DIGEST][:16]}..., "
            f"that of what it holds {tensors_digest(tensors)[:16]}...; it is damaged, so take another copy"
        )
    return tensors, metadata


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    number = re.search(r"os error (\d+)", str(error))
    code = int(number.group(1)) if number else errno.EIO
    return OSError(code, os.strerror(code) if number else str(error), str(path))
