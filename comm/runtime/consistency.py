"""Compares what must be equal on all replicas, by hashes, and repairs it by broadcast.

All that is applied is decoded from the same bytes, so rounding cannot make replicas differ. A bit that flips in memory,
hardware that computes something else, a learning rate or a hook that differs, and a bug can: silently, until the loss
shows it. The largest group of equal replicas is right, and the others copy its values. Where the two largest are of one
size, as always with two replicas, which of them is right cannot be known.
Communication: 16 bytes from each replica; where they differ also a hash of each tensor, and a broadcast of each that
differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from dtrain.comm.ops import AllGather, Broadcast, Flow, Place
from dtrain.comm.runtime.saved import EACH_SAVES
from dtrain.comm.shadowed import on_shadows
from dtrain.comm.torch_private import is_traceable_wrapper_subclass

Tie: TypeAlias = Literal["stop", "first"]
"""What happens where the largest groups are of one size: an error, or all take the values of the first of them."""

Held: TypeAlias = Iterable[tuple[str, Tensor]]
"""What a rank holds, by name, in the same order on all peers."""

Problem: TypeAlias = Literal["", "tie", "unlike", "saved"]
PROBLEMS: tuple[Problem, ...] = ("tie", "unlike", "saved")
PARAMETER = "parameter "
"""The prefix of parameters' names in `Held`."""

DIGEST_BYTES, COUNT_BYTES, TENSOR_BYTES = 12, 4, 8
COLUMNS = 512
ABSENT = 2 ** (8 * COUNT_BYTES) - 1
"""In place of a rank's number of saves: it had no part in the last step, and is not compared."""


class ReplicasDiffer(RuntimeError):
    """What must be equal on all replicas is not, and no group of them is the largest."""


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison. ``groups``: ranks that agree, the largest first; one of all where nothing differs.

    ``problem``: why nothing was repaired. "tie": the largest groups are of one size; "unlike": they hold different
    tensors; "saved": some saved their state more often than others. ``names``: the tensors that differ. ``values``:
    their right values, on ranks that have others.
    """

    groups: list[list[int]]
    problem: Problem = ""
    names: list[str] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The first tensor that differs, as the beginning of a sentence."""
        return f"{self.names[0]} is the first of {len(self.names)} that differ; " if self.names else ""

    def flags(self, size: int) -> Tensor:
        """1 for each of ``size`` replicas that is wrong, then for each of PROBLEMS; to be summed over the shards."""
        flags = torch.zeros(size + len(PROBLEMS))
        for rank in (rank for group in self.groups[1:] for rank in group):
            flags[rank] = 1.0
        if self.problem:
            flags[size + PROBLEMS.index(self.problem)] = 1.0
        return flags

    def refusal(self, problems: Tensor, means: str, saves: int) -> str:
        """Why replicas cannot be made equal. ``problems``: those of `flags`, summed. ``means``: what must be equal."""
        unlike, saved = (bool(problems[PROBLEMS.index(problem)]) for problem in ("unlike", "saved"))
        who = " and ".join(map(str, self.groups)) if self.problem else "some, as another shard has seen,"
        if saved:
            return (
                f"replicas {who} were not asked equally often for their state (this one {saves} times), and each keeps "
                f"what no other has: a checkpoint without it is lost. {EACH_SAVES}"
            )
        if unlike:
            return (
                f"replicas {who} do not hold the same tensors, or their optimizers count other steps; load the same "
                "checkpoint on all of them"
            )
        return (
            f"replicas {who} differ in what must be equal ({means}), and nobody can know which is right; {self.first}"
            "go back to the last checkpoint, and look at their learning rates, memory and processors. Or say whose is "
            "to be taken: tie='first' is that of the first"
        )


def require_guard(verify_every: object, tie: object, unit: str) -> None:
    """Raise ``ValueError`` for an invalid period or tie rule."""
    if not isinstance(verify_every, int) or isinstance(verify_every, bool) or verify_every < 0:
        raise ValueError(f"verify_every is {verify_every!r}; give a whole number of {unit}, 0 for never")
    if tie not in get_args(Tie):
        raise ValueError(f"tie is {tie!r}; choose 'stop', or 'first' to go on with the first replica's")


def compared(held: Callable[[], Held], more: str, saves: int, place: Place, tie: Tie) -> Flow[Verdict]:
    """Compare what all peers hold.

    ``held`` may be called twice. ``more``: what else must be equal, as text. ``saves``: how often this rank has saved
    its state; `ABSENT`: it is not compared.
    """
    names, hashes, kinds = [], [], []
    for name, tensor in held():
        names.append(name)
        hashes.append(fingerprint(tensor))
        kinds.append(f"{name}: {tensor.dtype} {list(tensor.shape)}")
    layout = hashlib.blake2b("\n".join([more, *kinds]).encode(), digest_size=TENSOR_BYTES).digest()
    digest = hashlib.blake2b(layout + b"".join(hashes), digest_size=DIGEST_BYTES).digest()
    rows = yield from _gathered(digest + (saves % 2 ** (8 * COUNT_BYTES)).to_bytes(COUNT_BYTES, "little"))
    absent = [rank for rank, row in enumerate(rows) if int.from_bytes(row[DIGEST_BYTES:], "little") == ABSENT]
    groups = groups_of([row[:DIGEST_BYTES] for row in rows], absent)
    counts = groups_of([row[DIGEST_BYTES:] for row in rows], absent)
    if len(counts) > 1:
        return Verdict(counts, "saved")
    if len(groups) <= 1:
        return Verdict(groups)
    layouts = groups_of((yield from _gathered(layout)), absent)
    if len(layouts) > 1:
        return Verdict(layouts, "unlike")
    tensor_hashes = yield from _gathered(b"".join(hashes))
    slices = [slice(number * TENSOR_BYTES, (number + 1) * TENSOR_BYTES) for number in range(len(names))]
    present = [row for rank, row in enumerate(tensor_hashes) if rank not in absent]
    differ = [name for name, where in zip(names, slices, strict=True) if len({row[where] for row in present}) > 1]
    if tie == "stop" and len(groups[0]) == len(groups[1]):
        return Verdict(groups, "tie", differ)
    values, source = {}, groups[0][0]
    for name, tensor in held():
        if name in differ:
            (content,) = yield Broadcast((_bytes_of(tensor),), source)
            if place.rank not in (*groups[0], *absent):
                values[name] = content.view(tensor.dtype).view(tensor.shape)
    return Verdict(groups, "", differ, values)


def plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors within ``tensor``: a DTensor's local one, a quantized one's codes."""
    if is_traceable_wrapper_subclass(tensor):
        for attribute in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, attribute)
            if isinstance(inner, Tensor):  # a DTensor names its mesh too
                yield from plain(name if attribute == "_local_tensor" else f"{name}.{attribute}", inner)
    else:
        yield name, tensor.detach()


def kept_by(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an optimizer's state on this rank, not copied."""
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    listed = {id(parameter) for parameter in stepped}
    flat = [key for key in optimizer.state if isinstance(key, Tensor) and id(key) not in listed]  # ZeRO 3 hides them
    for number, parameter in enumerate((*stepped, *flat)):
        for name, value in sorted(optimizer.state.get(parameter, {}).items(), key=lambda item: str(item[0])):
            if isinstance(value, Tensor):
                yield from plain(f"{name} of the optimizer's parameter {number}", value)


def numbers_of(optimizer: torch.optim.Optimizer) -> str:
    """The numbers of an optimizer's state that are no tensors, such as step counts, as text."""
    numbers = [
        f"{name}={value}"
        for state in optimizer.state.values()
        if isinstance(state, Mapping)
        for name, value in state.items()
        if isinstance(value, int | float)
    ]
    return ", ".join(numbers)


def _of_no_values(tensor: Tensor) -> bytes:
    """`fingerprint`, equal on all ranks, after a pass over the tensor."""
    tensor.sum()
    return bytes(TENSOR_BYTES)


@on_shadows(_of_no_values)
def fingerprint(tensor: Tensor) -> bytes:
    """TENSOR_BYTES that change with any bit: a hash of the row and column sums of its words, modulo 2^64.

    Sums run at memory bandwidth on the tensor's own device; a hash of all bytes would take ten times as long.

    >>> one = torch.zeros(10_000)
    >>> two = one.clone()
    >>> two[7] = 1e-30
    >>> fingerprint(one) == fingerprint(one.clone()), fingerprint(one) == fingerprint(two)
    (True, False)
    """
    flat = _bytes_of(tensor)
    digest = hashlib.blake2b(digest_size=TENSOR_BYTES)
    rows = flat.numel() // (8 * COLUMNS)
    if rows:
        if flat.data_ptr() % 8 or flat.storage_offset() % 8:
            flat = flat.clone()
        words = flat[: rows * 8 * COLUMNS].view(torch.int64).view(rows, COLUMNS)
        for sums in (words.sum(0), words.sum(1)):
            digest.update(sums.cpu().numpy().tobytes())
    digest.update(flat[rows * 8 * COLUMNS :].cpu().numpy().tobytes())
    return digest.digest()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _gathered(content: bytes) -> Flow[list[bytes]]:
    payload = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)
    (rows,) = yield AllGather((payload,))
    return [bytes(row) for row in rows.to(torch.uint8).tolist()]


def groups_of(rows: Sequence[Hashable], absent: Sequence[int] = ()) -> list[list[int]]:
    """Groups of ranks with equal rows, without ``absent`` ones: the largest first, then by their lowest rank."""
    groups: dict[Hashable, list[int]] = {}
    for rank, row in enumerate(rows):
        if rank not in absent:
            groups.setdefault(row, []).append(rank)
    return sorted(groups.values(), key=lambda ranks: (-len(ranks), ranks[0]))
