"""What is declared equal on all replicas is so, or is made so: hashes now and then, repair by broadcast.

All that is applied is decoded from the same bytes, so replicas cannot drift apart by rounding. They can by a bit that
flips in memory, by hardware that computes something else, by a learning rate or a hook that differs, and by a bug;
without a word, until the loss shows it. The largest group that agrees is right, and those outside of it take what it
has. Where two groups are as large, as always with two replicas, nobody can know which is right.
Communication: 16 bytes of each replica. Where they differ also a hash of each tensor, and a broadcast of those that
differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dtrain.comm.ops import AllGather, Broadcast, Flow, Place
from dtrain.comm.runtime.saved import EACH_SAVES

Tie: TypeAlias = Literal["stop", "first"]
"""What happens where replicas differ and nobody can know which is right: an error, or all take the first one's."""

Held: TypeAlias = Iterable[tuple[str, Tensor]]
"""What a rank holds, by name, in one order on all peers."""

Problem: TypeAlias = Literal["", "tie", "unlike", "saved"]
PROBLEMS: tuple[Problem, ...] = ("tie", "unlike", "saved")
PARAMETER = "parameter "
"""What names of parameters among what is held begin with."""

DIGEST_BYTES, COUNT_BYTES, TENSOR_BYTES = 12, 4, 8
COLUMNS = 512
ABSENT = 2 ** (8 * COUNT_BYTES) - 1
"""In place of how often a rank was asked for its state: it has no part in the last step, and is not compared."""


class ReplicasDiffer(RuntimeError):
    """What must be equal on all replicas is not, and nobody can know which of them is right."""


@dataclass(frozen=True)
class Verdict:
    """What a comparison has found. ``groups``: ranks that agree, the largest first; one of all where nothing differs.

    ``problem``: why nothing was repaired. "tie": the largest groups are as large; "unlike": they do not hold the same
    tensors; "saved": some were asked more often for their state than others. ``names``: what differs. ``values``: the
    right values of it, on ranks that have others.
    """

    groups: list[list[int]]
    problem: Problem = ""
    names: list[str] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """For people: the first of what differs."""
        return f"{self.names[0]} is the first of {len(self.names)} that differ; " if self.names else ""

    def told(self, size: int) -> Tensor:
        """What the ranks of a replica tell each other, to be summed: which of ``size`` replicas are wrong; problems."""
        found = torch.zeros(size + len(PROBLEMS))
        for rank in (rank for group in self.groups[1:] for rank in group):
            found[rank] = 1.0
        if self.problem:
            found[size + PROBLEMS.index(self.problem)] = 1.0
        return found

    def refusal(self, problems: Tensor, means: str, saves: int) -> str:
        """Why replicas cannot be made equal: ``problems`` as `told`, of any shard. ``means``: what must be equal."""
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
    """Raise ``ValueError`` for a period or a rule that is none."""
    if not isinstance(verify_every, int) or isinstance(verify_every, bool) or verify_every < 0:
        raise ValueError(f"verify_every is {verify_every!r}; give a whole number of {unit}, 0 for never")
    if tie not in get_args(Tie):
        raise ValueError(f"tie is {tie!r}; choose 'stop', or 'first' to go on with the first replica's")


def compared(held: Callable[[], Held], more: str, saves: int, place: Place, tie: Tie) -> Flow[Verdict]:
    """Compare what all peers hold, and find out what is right.

    ``held`` may be called twice. ``more``: what must be equal besides, in words. ``saves``: how often this rank was
    asked for its state; `ABSENT`: it is not compared.
    """
    names, hashes, kinds = [], [], []
    for name, tensor in held():
        names.append(name)
        hashes.append(fingerprint(tensor))
        kinds.append(f"{name}: {tensor.dtype} {list(tensor.shape)}")
    layout = hashlib.blake2b("\n".join([more, *kinds]).encode(), digest_size=TENSOR_BYTES).digest()
    whole = hashlib.blake2b(layout + b"".join(hashes), digest_size=DIGEST_BYTES).digest()
    rows = yield from _gathered(whole + (saves % 2 ** (8 * COUNT_BYTES)).to_bytes(COUNT_BYTES, "little"))
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
    each = yield from _gathered(b"".join(hashes))
    parts = [slice(number * TENSOR_BYTES, (number + 1) * TENSOR_BYTES) for number in range(len(names))]
    here = [row for rank, row in enumerate(each) if rank not in absent]
    differ = [name for name, part in zip(names, parts, strict=True) if len({row[part] for row in here}) > 1]
    if tie == "stop" and len(groups[0]) == len(groups[1]):
        return Verdict(groups, "tie", differ)
    values, source = {}, groups[0][0]
    for name, tensor in held():
        if name in differ:
            (found,) = yield Broadcast((_bytes_of(tensor),), source)
            if place.rank not in (*groups[0], *absent):
                values[name] = found.view(tensor.dtype).view(tensor.shape)
    return Verdict(groups, "", differ, values)


def plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors with memory of their own in ``tensor``: a DTensor's local one, a quantized one's codes."""
    if is_traceable_wrapper_subclass(tensor):
        for inner in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, inner)
            if isinstance(part, Tensor):  # a DTensor names its mesh too
                yield from plain(name if inner == "_local_tensor" else f"{name}.{inner}", part)
    else:
        yield name, tensor.detach()


def kept_by(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an optimizer's state, this rank's part, in the optimizer's own memory."""
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    known = {id(parameter) for parameter in stepped}
    flat = [key for key in optimizer.state if isinstance(key, Tensor) and id(key) not in known]  # ZeRO 3 hides them
    for number, parameter in enumerate((*stepped, *flat)):
        for name, value in sorted(optimizer.state.get(parameter, {}).items(), key=lambda item: str(item[0])):
            if isinstance(value, Tensor):
                yield from plain(f"{name} of the optimizer's parameter {number}", value)


def numbers_of(optimizer: torch.optim.Optimizer) -> str:
    """The numbers of an optimizer's state that are no tensors, such as step counts, in words."""
    kept = [
        f"{name}={value}"
        for state in optimizer.state.values()
        if isinstance(state, Mapping)
        for name, value in state.items()
        if isinstance(value, int | float)
    ]
    return ", ".join(kept)


def fingerprint(tensor: Tensor) -> bytes:
    """TENSOR_BYTES that change with any bit: of the sums of rows and of columns of its words, modulo 2^64.

    Sums run at the speed of memory, on the tensor's own device; a hash of all bytes would take ten times as long.

    >>> one = torch.zeros(10_000)
    >>> two = one.clone()
    >>> two[7] = 1e-30
    >>> fingerprint(one) == fingerprint(one.clone()), fingerprint(one) == fingerprint(two)
    (True, False)
    """
    flat = _bytes_of(tensor)
    found = hashlib.blake2b(digest_size=TENSOR_BYTES)
    rows = flat.numel() // (8 * COLUMNS)
    if rows:
        if flat.data_ptr() % 8 or flat.storage_offset() % 8:
            flat = flat.clone()
        words = flat[: rows * 8 * COLUMNS].view(torch.int64).view(rows, COLUMNS)
        for sums in (words.sum(0), words.sum(1)):
            found.update(sums.cpu().numpy().tobytes())
    found.update(flat[rows * 8 * COLUMNS :].cpu().numpy().tobytes())
    return found.digest()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _gathered(own: bytes) -> Flow[list[bytes]]:
    (rows,) = yield AllGather((torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else torch.empty(0),))
    return [bytes(row) for row in rows.to(torch.uint8).tolist()]


def groups_of(rows: Sequence[Hashable], absent: Sequence[int] = ()) -> list[list[int]]:
    """Ranks with equal rows, but the ``absent``: the largest group first, of equal ones that of the lowest rank."""
    found: dict[Hashable, list[int]] = {}
    for rank, row in enumerate(rows):
        if rank not in absent:
            found.setdefault(row, []).append(rank)
    return sorted(found.values(), key=lambda ranks: (-len(ranks), ranks[0]))
