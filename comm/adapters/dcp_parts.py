"""The parts of ranks in a checkpoint of ``torch.distributed.checkpoint`` that `Attached.checkpoint` was saved in.

``dcp.load`` fills in the keys that its caller lists, and a rank of another mesh does not know those that were saved; so
they are read here, from the checkpoint's own list. The list, ``.metadata``, is a pickle, and so is each part in its
file: DCP has both run whatever code is in them. Here nothing of them runs: the list is read with stand-ins for the
classes that DCP has in it, and a part by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from dtrain.comm import tensor_file
from dtrain.comm.adapters.other_mesh import PLACE

LIST = ".metadata"
NAME = re.compile(r"[\w.-]{1,200}")
"""Of a file beside it."""

_METADATA = "torch.distributed.checkpoint.metadata"
_NAMED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, f"{kind}StorageMetadata") for kind in ("Bytes", "Tensor", "Chunk")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    *((module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
    *((module, f"Pure{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
}
"""Module and name of all that a list of DCP holds, in torch 2.8 to 2.15 and Python 3.11 to 3.13."""


class _StandIn:
    """In place of a class or function of torch: it keeps the fields that were saved, and does nothing."""

    def __init__(self, *args: object) -> None:
        self.fields: Mapping[object, object] = {}

    def __setstate__(self, state: object) -> None:
        self.fields = state if isinstance(state, dict) else {}


class _ListUnpickler(pickle._Unpickler):
    """The one in Python, not that in C: there the number of a memo's entry is how much memory it takes."""

    def find_class(self, module: str, name: str) -> type[_StandIn]:
        if (module, name) not in _NAMED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no list of DCP has, and is not run")
        return type(name, (_StandIn,), {})


def parts_of_checkpoint(folder: Path) -> dict[str, Callable[[], object]]:
    """How to read each part, by the name of its place; that raises ``ValueError`` for a damaged one, and
    ``FileNotFoundError`` for one whose file is missing.

    Raises ``ValueError`` for a list that is damaged, or names what no list of DCP has.
    """
    data = (folder / LIST).read_bytes()
    try:
        listed = _ListUnpickler(io.BytesIO(data)).load()
        entries, places = listed.fields["state_dict_metadata"], listed.fields["storage_data"]
        where = {index.fields["fqn"]: info.fields for index, info in places.items()}
        keys = [key for key, entry in entries.items() if type(entry).__name__ == "BytesStorageMetadata"]
        matches = [(key, PLACE.search(key)) for key in keys]
        return {match[0]: partial(_read, folder, key, where[key]) for key, match in matches if match is not None}
    except Exception as error:  # whatever unpickling damaged bytes raises: the other ranks wait for an answer
        raise ValueError(f"{folder / LIST} is damaged, or no list of DCP: {error}; take another copy") from error


def _read(folder: Path, key: str, place: Mapping[str, object]) -> object:
    """``place``: where DCP has put the part, see its ``_StorageInfo``."""
    name, offset, length = (place.get(field) for field in ("relative_path", "offset", "length"))
    if not (isinstance(name, str) and isinstance(offset, int) and isinstance(length, int)) or not NAME.fullmatch(name):
        raise ValueError(f"{key} lies at {place!r} of {folder}, which is no place that DCP gives; take another copy")
    if place.get("transform_descriptors"):
        raise ValueError(f"{key} of {folder} was saved through {place['transform_descriptors']}; save without these")
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no file {name}, in which {key} lies; copy all files of the checkpoint")
    if not 0 <= offset <= offset + length <= file.stat().st_size:
        raise ValueError(f"{key} ends at byte {offset + length} of {file}, which is shorter; take another copy")
    with file.open("rb") as opened:
        opened.seek(offset)
        data = opened.read(length)
    try:
        content = torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # torch has no error of its own for bytes that it cannot read
        raise ValueError(f"{key} of {file} cannot be read: {str(error)[:200]}; take another copy") from error
    if not isinstance(content, bytes):
        raise ValueError(f"{key} of {file} is a {type(content).__name__}, not the bytes of a sync's part")
    return tensor_file.decoded(content, f"{key} of {folder}")
