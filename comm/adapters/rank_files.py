"""What one rank needs to go on, in a file of its own: trained parameters, buffers, optimizer and sync.

Within a round of a local update the replicas differ, and residuals differ always; a framework's own files have the main
process's alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtrain.comm import tensor_file
from dtrain.comm.adapters.forwarding import hyperparameters
from dtrain.comm.adapters.other_mesh import Wanted, mesh_of, remade
from dtrain.comm.ops import Place
from dtrain.comm.pieces import Pieces
from dtrain.comm.runtime.saved import Entries, place_name
from dtrain.comm.runtime.saved_state import REFUSED, Beside, SavedState, digest

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

    def __init__(self, sync: Attached, pieces: Held, saved: SavedState) -> None:
        self._sync, self._pieces, self._saved = sync, pieces, saved
        self._loaded: str | None = None  # a digest of the parameters, until the first step from them

    def save(self, folder: Path) -> None:
        """`Attached.save`."""

        def write() -> int:
            folder.mkdir(parents=True, exist_ok=True)
            tensor_file.write(folder / f"{self.place()}{SUFFIX}", content)
            return self._sync.steps

        with self._sync.evaluation().paused():
            content = self._content()
            self._together(write, "was not written")

    def load(self, folder: Path) -> None:
        """`Attached.load`."""

        def read() -> object:
            parts = _parts_in(folder)
            own = parts.get(self.place())
            return own() if own is not None else self._remade(folder, parts)

        self._restore(read)

    def encoded(self) -> bytes:
        """What `save` would write."""
        with self._sync.evaluation().paused():
            return tensor_file.encoded(self._content())

    def decode(self, content: bytes) -> None:
        """Undo `encoded`; raises as `load` does."""
        self._restore(lambda: tensor_file.decoded(content, f"the part of {self.place()}"))

    def place(self) -> str:
        """The name of this rank's part."""
        places = self._pieces.channel.places
        return place_name(places["replicate"], places["shard"])

    def _remade(self, folder: Path, parts: Mapping[str, Callable[[], object]]) -> dict[str, Any]:
        """This rank's part, made of those of another mesh; see `other_mesh`."""
        places, sync, pieces = self._pieces.channel.places, self._sync, self._pieces
        replicas, shards = places["replicate"], places["shard"]
        mesh = mesh_of(parts)
        if mesh is None or mesh == (replicas.size, shards.size):
            raise FileNotFoundError(
                f"{folder} has no part of {self.place()}, but {', '.join(sorted(parts)) or 'of no rank'}. On another "
                "number of ranks than saved, every rank needs the parts of all in one folder; without them begin a new "
                "run from the weights"
            )

        def read(replica: int, shard: int) -> dict[str, Any]:
            content = parts[place_name(Place(replica, mesh[0]), Place(shard, mesh[1]))]()
            return _of_this_format(content)

        wanted = Wanted(
            pieces.segments, pieces.held, pieces.shapes, self._stepped(), sync.state.kinds, sync.parameters_kind,
            replicas,
        )  # fmt: skip
        try:
            content = remade(read, mesh, wanted)
        # A digest is no signature, see `tensor_file`.
        except (LookupError, AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(f"the parts in {folder} do not fit each other: {error!r}; take another copy") from error
        if replicas.rank == shards.rank == 0:
            own = "exactly" if mesh[0] == replicas.size else "as the mean over the replicas"
            warnings.warn(
                f"{folder} was saved on {mesh[0]} replicas of {mesh[1]} ranks, and these are {replicas.size} of "
                f"{shards.size}: what each replica had of its own is restored {own}, and what a compressor keeps in "
                "another shape begins anew",
                UserWarning, stacklevel=8,
            )  # fmt: skip
        return {**content, "sync": {self.place(): content["sync"]}}

    def _stepped(self) -> list[tuple[str, torch.Size]] | None:
        """The parameters of the inner optimizer in its order; None for DeepSpeed's, which are flat."""
        names = {id(parameter): fqn for fqn, parameter in self._pieces.trained.parameters.items()}
        stepped = [p for group in self._pieces.optimizer.param_groups for p in group["params"]]
        if not any(id(p) in names for p in stepped):
            return None
        return [(names.get(id(p), ""), p.to_local().shape if isinstance(p, DTensor) else p.shape) for p in stepped]

    def _content(self) -> dict[str, Any]:
        cut = {"segments": self._pieces.segments, "held": self._pieces.held}
        return {
            "format": FORMAT,
            **{name: {fqn: [s.offset, s.numel] for fqn, s in segments.items()} for name, segments in cut.items()},
            "parameters": self._pieces.read(copy=False),
            "buffers": self._buffers(),
            "optimizer": self._pieces.optimizer_snapshot(),
            "sync": {place: dict(cast(Entries, entries).entries) for place, entries in self._sync.state_dict().items()},
        }

    def _restore(self, read: Callable[[], object]) -> None:
        content: dict[str, Any] = {}

        def checked() -> int:
            content.update(self._checked(read()))
            return self._saved.step_of(content["sync"])

        self._together(checked, "was not read")
        states = len(content["optimizer"]["state"])
        self._saved.load(content["sync"], Beside(content["parameters"], states))  # or nothing at all is changed
        self._pieces.trained.clear()
        self._pieces.write(content["parameters"])
        buffers = self._buffers()
        with torch.no_grad():
            for name, value in content["buffers"].items():
                buffers[name].copy_(value)
        self._pieces.load_optimizer_snapshot(content["optimizer"])
        if self._pieces.trained.differ:
            self._loaded = digest(self._pieces.read(copy=False))

    def require_kept(self) -> None:
        """Before the first step after loading: raise ``RuntimeError`` if the model holds other parameters by now.

        Within a round each replica has its own. A loader of several parts, such as DCP, may load those of the model's
        own entry behind ours.
        """
        loaded, self._loaded = self._loaded, None
        # The modes of a schedule-free optimizer change the parameters, and so does a loss that is tried on them.
        changes = callable(getattr(self._pieces.optimizer, "eval", None)) or self._sync.method.samples
        if loaded is None or changes or loaded == digest(self._pieces.read(copy=False)):
            return
        raise RuntimeError(
            "something loaded other parameters after sync.checkpoint or sync.load() had loaded this rank's; load them "
            "last, or leave the model and the optimizer, which they contain, out of what is loaded (with torchtitan: "
            'checkpoint.exclude_from_loading = ["model", "optimizer"])'
        )

    def _buffers(self) -> dict[str, Tensor]:
        return dict(self._pieces.trained.model.named_buffers())

    def _checked(self, content: object) -> dict[str, Any]:
        """Raises ``ValueError`` for another format or model."""
        content = _of_this_format(content)
        for kind, now in (("parameters", self._pieces.read(copy=False)), ("buffers", self._buffers())):
            saved = {name: _kind(value) for name, value in _table(content, kind).items()}
            here = {name: _kind(value) for name, value in now.items()}
            differing = sorted({name for name, _ in {*saved.items()} ^ {*here.items()}}, key=str)
            if differing:
                name = differing[0]
                raise ValueError(
                    f"what was saved are the {kind} of another model: {name} is {saved.get(name, 'not there')}, and "
                    f"here {here.get(name, 'not there')} ({len(differing)} differ); attach to the model that was saved"
                )
        _require_snapshot(_table(content, "optimizer"), self._pieces.optimizer, self._pieces.shapes)
        _table(content, "sync")
        return content

    def _together(self, work: Callable[[], int], what: str) -> None:
        """Do it on all ranks; ``work`` returns its step. Raises on all of them if it failed on one, or steps differ."""
        failed: Exception | None = None
        step = REFUSED
        try:
            step = work()
        except Exception as error:  # raised below, whatever it is: the other ranks wait for this one's answer
            failed = error
        replicas, shards = self._sync.context.membership.gather_number(step)
        if failed is not None:
            raise failed
        if len({*replicas, *shards} - {REFUSED}) > 1:
            raise ValueError(
                f"the parts are of different steps: {replicas} on the replicas, {shards} on the ranks of this one; all "
                "ranks make the same number of steps, and save and load at the same one"
            )
        if REFUSED in (*replicas, *shards):
            where = [rank for rank, its in enumerate(replicas) if its == REFUSED] or "of another shard"
            raise RuntimeError(f"the part of replicas {where} {what}, and they say why; this rank's is all right")


class RankCheckpoint:
    """A ``Stateful`` for ``torch.distributed.checkpoint``, synchronous or not; see `Attached.checkpoint`."""

    def __init__(self, files: RankFiles) -> None:
        self._files = files

    def state_dict(self) -> dict[str, Any]:
        """This rank's part under a key of its own, as bytes: tensors would be taken for copies of other replicas'."""
        return {self._files.place(): self._files.encoded()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if the checkpoint has no part of this rank, and as `Attached.load`."""
        if self._files.place() not in state:
            raise ValueError(
                f"the checkpoint has {', '.join(state)}, and this is {self._files.place()}; on another number of ranks "
                "leave this out of what dcp.load loads, and call sync.load(folder)"
            )
        self._files.decode(state[self._files.place()])


def _parts_in(folder: Path) -> Mapping[str, Callable[[], object]]:
    """How to read each part that `save`, or DCP with `RankCheckpoint`, has left in ``folder``."""
    if (folder / ".metadata").is_file():
        from dtrain.comm.adapters.dcp_parts import parts_of_checkpoint

        return parts_of_checkpoint(folder)
    paths = folder.glob(f"replica-*{SUFFIX}") if folder.is_dir() else ()
    return {path.name.removesuffix(SUFFIX): partial(tensor_file.read, path) for path in paths}


def _of_this_format(content: object) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"what was saved is of another format than {FORMAT}, which this version of dtrain reads")
    return content


def _table(content: Mapping[Any, Any], name: str) -> Mapping[Any, Any]:
    value = content.get(name)
    if not isinstance(value, Mapping):
        raise ValueError(f"what was saved has no table {name!r}, but {str(value)[:40]!r}; take another copy")
    return value


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"no tensor, but {str(value)[:40]!r}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _require_snapshot(
    saved: Mapping[Any, Any], optimizer: torch.optim.Optimizer, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ``ValueError`` for the snapshot of an optimizer with other groups, parameters or kinds of values."""
    groups, here = saved.get("groups"), hyperparameters(optimizer)
    if not isinstance(groups, list) or len(groups) != len(here):
        count = len(groups) if isinstance(groups, list) else "no"
        raise ValueError(
            f"the saved optimizer has {count} groups of parameters, and this one {len(here)}; make the same one"
        )
    for group, now in zip(groups, here, strict=True):
        for name, value in group.items() if isinstance(group, Mapping) else [("all of it", group)]:
            if not _alike(value, now.get(name, value if isinstance(group, Mapping) else {})):
                raise ValueError(
                    f"the saved optimizer has {name} = {str(value)[:40]!r}, and this one {now.get(name)!r}; make the "
                    "same one"
                )
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    for key, named in _table(saved, "state").items():
        inner = dict(named) if isinstance(named, Mapping) else None
        known = 0 <= key < count if isinstance(key, int) else inner is not None and inner.keys() <= shapes.keys()
        if inner is None or not known:
            raise ValueError(
                f"the saved optimizer has state for parameter {key!r}, and this one has {count} parameters; make the "
                "same one"
            )


def _alike(saved: object, now: object) -> bool:
    """Whether a hyperparameter has the kind of the present one; what is None in one of them may be anything."""
    numbers, sequences = (int, float, Tensor), (list, tuple)  # DCP makes lists of tuples
    if saved is None or now is None or type(saved) is type(now):
        return True
    return any(isinstance(saved, kinds) and isinstance(now, kinds) for kinds in (numbers, sequences))
