"""What one rank needs to go on, in a file of its own: trained parameters, buffers, optimizer and sync.

Within a round of a local update the replicas differ, and residuals differ always; a framework's own files have the main
process's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from dtrain.comm import tensor_file
from dtrain.comm.pieces import Pieces
from dtrain.comm.runtime.saved import Entries, place_name

if TYPE_CHECKING:
    from dtrain.comm.adapters.trained_parameters import Trained
    from dtrain.comm.runtime.attached import Attached

FORMAT = 1
SUFFIX = ".safetensors"


class Held(Pieces, Protocol):
    """Pieces of a real model."""

    trained: Trained

    def optimizer_snapshot(self) -> dict[str, Any]:
        """The inner optimizer's state and hyperparameters on this rank: plain values and tensors."""

    def load_optimizer_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        """Undo `optimizer_snapshot`. Raises ``ValueError`` for that of another optimizer."""


class RankFiles:
    """Saves and loads this rank's file; all ranks succeed, or all raise."""

    def __init__(self, sync: Attached, pieces: Held) -> None:
        self._sync, self._pieces = sync, pieces

    def save(self, folder: Path) -> None:
        """`Attached.save`."""

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            tensor_file.write(self._path(folder), content)

        with self._sync.evaluation().paused():
            content = {
                "format": FORMAT,
                "parameters": self._pieces.read(copy=False),
                "buffers": self._buffers(),
                "optimizer": self._pieces.optimizer_snapshot(),
                "sync": {
                    place: dict(cast(Entries, entries).entries) for place, entries in self._sync.state_dict().items()
                },
            }
            self._together(write, "was not written")

    def load(self, folder: Path) -> None:
        """`Attached.load`."""
        path = self._path(folder)
        content: dict[str, Any] = {}

        def read() -> None:
            if not path.exists():
                there = sorted(p.name for p in folder.glob(f"replica-*{SUFFIX}")) if folder.is_dir() else []
                raise FileNotFoundError(
                    f"{folder} holds no {path.name}, but {', '.join(there) or 'no file of any rank'}; resume on as "
                    "many ranks as saved, or begin a new run from the weights"
                )
            content.update(self._checked(tensor_file.read(path), path))

        self._together(read, "was not read")
        self._pieces.write(content["parameters"])
        buffers = self._buffers()
        with torch.no_grad():
            for name, value in content["buffers"].items():
                buffers[name].copy_(value)
        self._pieces.load_optimizer_snapshot(content["optimizer"])
        self._sync.load_state_dict(content["sync"])

    def _path(self, folder: Path) -> Path:
        places = self._pieces.channel.places
        return folder / f"{place_name(places['replicate'], places['shard'])}{SUFFIX}"

    def _buffers(self) -> dict[str, Tensor]:
        return dict(self._pieces.trained.model.named_buffers())

    def _checked(self, content: object, path: Path) -> dict[str, Any]:
        """The file's content. Raises ``ValueError`` for another format or model."""
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is of another format than {FORMAT}, which this version of dtrain reads")
        for kind, now in (("parameters", self._pieces.read(copy=False)), ("buffers", self._buffers())):
            saved = {name: tuple(value.shape) for name, value in content[kind].items()}
            here = {name: tuple(value.shape) for name, value in now.items()}
            differing = sorted({name for name, _ in {*saved.items()} ^ {*here.items()}})
            if differing:
                name = differing[0]
                raise ValueError(
                    f"{path} holds the {kind} of another model: {name} is {saved.get(name, 'not there')}, and here "
                    f"{here.get(name, 'not there')} ({len(differing)} differ); attach to the model that was saved"
                )
        return content

    def _together(self, work: Callable[[], None], what: str) -> None:
        """Do it on all ranks; raises on all of them if it failed on one."""
        failed: Exception | None = None
        try:
            work()
        except (OSError, TypeError, ValueError) as error:
            failed = error
        replicas, shards = self._sync.context.membership.gather_number(int(failed is not None))
        if failed is not None:
            raise failed
        if any((*replicas, *shards)):
            where = [rank for rank, wrong in enumerate(replicas) if wrong] or "of another shard"
            raise RuntimeError(f"the file of replicas {where} {what}, and they say why; this rank's is all right")
