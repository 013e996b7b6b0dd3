"""The parts of ranks in a checkpoint of ``torch.distributed.checkpoint`` that `Attached.checkpoint` was saved in.

``dcp.load`` fills in the keys that its caller lists, and a rank of another mesh does not know those that were saved; so
they are read here, from the checkpoint's own list.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from dtrain.comm import tensor_file
from dtrain.comm.adapters.other_mesh import PLACE


def parts_of_checkpoint(folder: Path) -> dict[str, Callable[[], object]]:
    """How to read each part, by the name of its place. Raises ``ValueError`` for a list that is damaged.

    The list, ``.metadata``, is a pickle of torch's, which runs code that is in it (docs/security.md).
    """
    try:
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    except OSError:
        raise
    except Exception as error:  # whatever unpickling damaged bytes raises: the other ranks wait for an answer
        raise ValueError(f"{folder / '.metadata'} is damaged, or no list of DCP: {error}; take another copy") from error
    parts: dict[str, Callable[[], object]] = {}
    for key, entry in entries.items():
        match = PLACE.search(key)
        if match is not None and isinstance(entry, BytesStorageMetadata):
            parts[match[0]] = partial(_read, folder, key)
    return parts


def _read(folder: Path, key: str) -> object:
    state: dict[str, object] = {key: None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # this rank reads by itself
        try:
            load(state, storage_reader=FileSystemReader(folder), no_dist=True)
        except CheckpointException as error:  # which is no Exception
            raise ValueError(f"{key} of {folder} cannot be read: {error}") from error
    content = state[key]
    if not isinstance(content, bytes):
        raise ValueError(f"{key} of {folder} is a {type(content).__name__}, not the bytes of a sync's part")
    return tensor_file.decoded(content, f"{key} of {folder}")
