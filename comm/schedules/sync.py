"""What a sync is to its user: a small frozen value (`Sync`), and that value at work on one rank (`Attached`)."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from dtrain.comm.combine import consolidate
from dtrain.comm.compressors.lowrank import matrices
from dtrain.comm.drivers.meter import Meter
from dtrain.comm.drivers.run import Channel
from dtrain.comm.fused import compile_what_is_due
from dtrain.comm.layout import in_messages
from dtrain.comm.norms import Norm, pooled, recalibrated
from dtrain.comm.ops import AllGather, AllReduce, Axis, Broadcast, Flow
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.adaptive import Settled, begun
from dtrain.comm.plans.base import Plan, kinds_of, unmatched
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, State

MANY_SKIPPED = 10
"""Steps in a row that nobody could make, after which it is said."""


class Sync(Protocol):
    """A method: when, what, how small, how combined. Made by functions such as `every_step` and `diloco`."""

    def bind(self, pieces: Pieces, seed: int) -> Attached:
        """This method at work on one rank's pieces. Every rank must call it; it may communicate."""


class Attached(ABC):
    """A sync at work. Call `step` where ``optimizer.step()`` was called; clip between `finish` and `step`."""

    parameters_kind: Kind
    """Whether the live parameters and the inner optimizer's state are equal on all replicas."""

    counters: tuple[str, ...] = ("steps", "skipped", "skipped_in_a_row")
    """Attributes that a checkpoint keeps."""

    settings: tuple[str, ...] = ()
    """Fields of the spec that a state belongs to, beside the compressors."""

    def __init__(self, pieces: Pieces, state: State, plan: Plan, seed: int, spec: object) -> None:
        self.pieces = pieces
        self.seed = seed
        self.state = state
        self.plan = begun(plan, list(pieces.shapes))
        self.steps = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.gauges: dict[str, float] = {}
        self.decisions: list[str] = []  # for people, who take them out
        self.matrices = matrices(pieces.segments, pieces.shapes)
        own = (f"{name}={getattr(spec, name)}" for name in self.settings)
        method = f"{type(self).__name__}: {'; '.join(map(str, plan.compressions))}"
        self.told = _without_addresses("; ".join([method, *own]))
        self._shows = False
        self.stepped_elsewhere: frozenset[str] = frozenset()
        """Parameters that the optimizer of ``pieces`` does not step, though they are trained."""
        self.require_still: Callable[[], None] = lambda: None
        """Raises ``RuntimeError`` if somebody has moved them since the last step."""
        self._warn_of_rules(plan)
        self._begin(f"{spec}")

    @property
    def meter(self) -> Meter:
        """What this rank has sent, and how long it stood waiting."""
        return self.pieces.channel.meter

    def estimate(self, loss: Callable[[], Tensor]) -> float:
        """What methods of forward passes only are stepped from: see `ForwardOnly.estimate`.

        Raises ``RuntimeError`` here: this method is stepped from gradients.
        """
        raise RuntimeError(
            f"{type(self).__name__} is stepped from gradients: call loss.backward() before step(); estimate(...) "
            "is for one_byte and fedkseed"
        )

    def finish(self) -> None:
        """Block until the gradients are those that the optimizer may use."""
        self.pieces.finish()

    def step(self) -> bool:
        """Step the inner optimizer, then communicate what this sync communicates after it.

        Returns False if some rank's gradient was not finite: then no rank has stepped, no state has changed, and
        ``skipped`` has gone up.
        """
        self._require_live("step()")
        self.finish()
        compile_what_is_due()
        ok = self._agree(self._gradients_ok() and self.pieces.gradients_finite())
        if ok:
            for fqn in self.pieces.unused():
                self.state.unstage(fqn)  # what feedback sent for it was not applied
            self.state.commit()
            self._advance()
            self.skipped_in_a_row = 0
        else:
            self.state.rollback()
            self.pieces.skip()
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == MANY_SKIPPED:
                warnings.warn(
                    f"{MANY_SKIPPED} steps in a row were skipped, step {self.steps} the last: some gradients are not "
                    "finite; lower the learning rate, look at the data, or go back to a checkpoint",
                    RuntimeWarning, stacklevel=2,
                )  # fmt: skip
        self.steps += 1
        self._after_step()
        return ok

    def _advance(self) -> None:
        """One step of the parameters along what the exchange has left in the gradients."""
        self.pieces.step()

    @abstractmethod
    def _gradients_ok(self) -> bool:
        """Whether the exchange of this step's gradients succeeded; the same on all peers. Called once a step."""

    @abstractmethod
    def _after_step(self) -> None:
        """What happens to the parameters when the inner optimizer has stepped."""

    def close_round(self) -> bool:
        """Combine now what the next step that communicates would combine; True if there was anything.

        Call it once at the end of training: the steps since the last round of a local update are lost otherwise. Every
        rank must call it. A method that communicates at every step has nothing to close.
        """
        return False

    def settle(self) -> None:  # noqa: B027, methods that send nothing in the background have nothing to do
        """Wait for what is under way, so that all that `state_dict` needs is here. Every rank must call it.

        Nothing is applied before its time: training goes on as if this had not been called.
        """

    def consolidate(self) -> None:
        """Give every replica the mean of what feedback keeps: nothing that is applied changes but for round-off.

        It bounds what low rank leaves in each replica where their data differ. Costs one exchange in full precision.
        Every rank must call it, between two steps.
        """
        key = Key(self.seed, self.steps, self.pieces.place.rank)
        self.pieces.channel.run(consolidate(self.state, self.pieces.place, key), "consolidate")

    def rescale(self, factor: float) -> None:
        """Multiply what feedback keeps, when the scale of the gradients changes by ``factor``.

        Call it on every rank where a loss scale changes, with new / old; with error_feedback also where the learning
        rate does, with old / new, if what is left from before shall count as much as it would have then.

        Raises ``ValueError`` for a factor that is not positive and finite.
        """
        if not 0 < factor < math.inf:
            raise ValueError(f"factor is {factor!r}; give the new scale over the old one, a positive finite number")
        kept = {name for name, kind in kinds_of(self.plan).items() if kind != "opaque"}
        self.state.scale(kept, factor)

    @contextmanager
    def evaluation(self, *, recalibrate: Callable[[], object] | None = None) -> Iterator[None]:
        """Within it the model holds the parameters that are to be evaluated and exported; they are not trained there.

        Every rank must enter it. ``recalibrate``: runs the model on some training batches (ten do), for BatchNorm:
        within the block its running statistics are those of these passes on all ranks, and behind it what they were.

        >>> def passes():
        ...     for batch in batches:
        ...         model(batch)
        >>> with sync.evaluation(recalibrate=passes):  # doctest: +SKIP
        ...     validate(model)
        """
        shown, norms = self._to_evaluate(), list[Norm]()
        live, before = self.pieces.read() if shown is not None else {}, self._shows
        try:
            if shown is not None:
                self.pieces.write(shown)
                self._shows = True
            if recalibrate is not None:
                norms = recalibrated(recalibrate)
                self._votes.run(pooled(norms, self._alike), "recalibrate")
            yield
        finally:
            for norm in norms:
                norm.put_back()
            self._shows = before
            if shown is not None:
                self.pieces.write(live)

    @property
    def _alike(self) -> tuple[Axis, ...]:
        """The axes along which all ranks evaluate together."""
        return ("shard", "replicate") if "shard" in self.pieces.channel.places else ("replicate",)

    def _to_evaluate(self) -> dict[str, Tensor] | None:
        """What `evaluation` shows; None for the parameters as they are."""
        return None

    def _require_live(self, what: str) -> None:
        """Raise ``RuntimeError`` within `evaluation`, at whose end whatever ``what`` changes would be lost."""
        if self._shows:
            raise RuntimeError(
                f"{what} within sync.evaluation(), where the model holds what is to be evaluated; call it behind that "
                "block"
            )

    def state_dict(self) -> dict[str, object]:
        """Plain tensors, integers and text: ``{"tensors": {fqn: {name: tensor}}, "integers": ..., "parameters": ...}``.

        Each rank has its own. The last entry is a digest of this rank's parameters, which are saved apart. Every rank
        must call it at the same step.
        """
        self._require_live("state_dict()")
        self.settle()
        digest = _digest(self.pieces.read(copy=False))
        return {
            "tensors": self.state.tensors, "integers": self.integers(), "parameters": digest, "place": self._place(),
            "sync": self.told,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict`, after the model's and the optimizer's own states have been loaded.

        Raises ``ValueError`` for the state of another method, or one with other settings, and if the model does not
        hold the parameters that this rank had when the state was taken. A state whose "sync" entry was taken out is
        loaded as far as the names of what both keep agree.
        """
        found = state if isinstance(state, Mapping) else {}
        tensors, integers = found.get("tensors"), found.get("integers")
        if not isinstance(tensors, Mapping) or not isinstance(integers, Mapping):
            raise TypeError("the state of a sync is {'tensors': {fqn: {name: tensor}}, 'integers': {name: int}}")
        saved = state.get("sync")
        if saved not in (None, self.told):
            raise ValueError(
                f"this state was saved with {unlike(str(saved), self.told)}, and this is "
                f"{unlike(self.told, str(saved))}; attach what it was saved with, or take out its entry 'sync' if the "
                "change is meant"
            )
        if state.get("place") not in (None, self._place()):
            raise ValueError(
                f"this state was taken by {state['place']}, and this is {self._place()}; every rank loads its own files"
            )
        if state.get("parameters") not in (None, _digest(self.pieces.read(copy=False))):
            raise ValueError(
                "the model does not hold the parameters that this rank had when this state was taken; on every rank: "
                "attach, then load the model's and the optimizer's states, then the sync's, each from this rank's own "
                "files (in a round of a local update the replicas differ)"
            )
        try:
            self.state.load(tensors)
            self.load_integers({name: int(value) for name, value in integers.items()})
        except KeyError as error:
            raise ValueError(f"this state was saved with another sync: {error.args[0]}") from error

    def integers(self) -> dict[str, int]:
        return {**{name: getattr(self, name) for name in self.counters}, **self.plan.integers()}

    def load_integers(self, integers: Mapping[str, int]) -> None:
        for name in self.counters:
            setattr(self, name, integers[name])
        self.plan.load_integers({name: integers[name] for name in self.plan.integers()})

    def report(self) -> str:
        """One line for people: what was sent and what it cost."""
        meter = self.meter
        sent = f"{meter.sent_bytes / 1e6:.1f} MB" if meter.sent_bytes >= 1e5 else f"{meter.sent_bytes:,} bytes"
        return f"{self.steps} steps, {self.skipped} skipped, sent {sent}, {meter.exposed_seconds:.2f} s exposed"

    def detach(self) -> None:
        """Stop syncing and leave the model as it was found."""
        self.pieces.detach()
        self.pieces.channel.close()

    def _place(self) -> str:
        replicas, shards = self.pieces.channel.places["replicate"], self.pieces.channel.places["shard"]
        return f"replica {replicas.rank} of {replicas.size}, shard {shards.rank} of {shards.size}"

    def _measure(self, values: Mapping[str, Tensor], key: Key) -> None:
        """Let the plan see what is about to be compressed, if it is due."""
        if not self.plan.due():
            return
        for fqn, value in values.items():
            feedback, own = self.plan.of(fqn, key.step).feedback, replace(key, fqn=fqn, phase="plan")
            fresh = feedback.fresh(fqn, value, self.state.look())  # nothing of this is committed
            meant = feedback.correct(fqn, value, self.state.look())
            self.plan.measure(fqn, fresh, meant, self.matrices[fqn], self.pieces.place.size, own)

    def _review(self) -> None:
        """Let the plan decide what to use from now on. Every rank must call it, once for each exchange."""
        if not isinstance(self.plan, Settled):
            before = self.plan.changes
            self.pieces.channel.run(self.plan.review(), "plan")
            if self.plan.changes != before:
                self.decisions.append(self.plan.table().partition("\n")[0])

    def _begin(self, spec: str) -> None:
        """Begin alike: what replica 0 holds, after all were seen to have the same method and model."""
        self._require_agreement(spec)
        for names in in_messages(self.pieces.shapes):  # one after the other: large models have no room for a second one
            own = self.pieces.read(names, copy=False)
            self.pieces.write(self.pieces.channel.run(_broadcast(own), "set-up"), names)

    def _agreement(self, spec: str) -> bytes:
        """A digest of what all peers must be given alike."""
        held = sorted((fqn, *vars(segment).values()) for fqn, segment in self.pieces.segments.items())
        text = f"{self.told}\n{_without_addresses(spec)}\n{held}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def _require_agreement(self, spec: str) -> None:
        """Raise ``ValueError`` unless all peers were given the same method and model."""
        mine = torch.tensor(list(self._agreement(spec)), dtype=torch.uint8)
        everybody = self.pieces.channel.run(_gather(mine), "agreement")
        other = [rank for rank, digest in enumerate(everybody) if not torch.equal(digest, mine)]
        if other:
            raise ValueError(
                f"replicas {other} were given another sync or another model than this one, which has {self.told} and "
                f"{len(self.pieces.segments)} parameters; give all ranks the same"
            )

    def _warn_of_rules(self, plan: Plan) -> None:
        for pattern in unmatched(plan, self.pieces.shapes):
            warnings.warn(
                f"by_layer: {pattern!r} matches no parameter; names are like {', '.join(list(self.pieces.shapes)[:3])}",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip

    def _agree(self, ok: bool) -> bool:
        """Whether ``ok`` holds on every rank of this replica."""
        return not bool(self._over_shards(torch.tensor([0.0 if ok else 1.0]), "agree"))

    def _over_shards(self, values: Tensor, label: str) -> Tensor:
        """The sum over the ranks of this replica. Every rank must call it."""
        # At once where there is nobody to ask: the way to a channel's thread and back takes milliseconds under load.
        alone = self.pieces.channel.places["shard"].size == 1
        return values.cpu() if alone else self._votes.run(_sum_over_shards(values.cpu()), label)

    @property
    def _votes(self) -> Channel:
        """What votes within the replica go through."""
        return self.pieces.channel


def _digest(values: Mapping[str, Tensor]) -> str:
    """Of every element, whatever the order of the names."""
    found = hashlib.blake2b(digest_size=16)
    for fqn in sorted(values):
        found.update(fqn.encode())
        found.update(values[fqn].contiguous().cpu().numpy().tobytes())
    return found.hexdigest()


def unlike(one: str, other: str) -> str:
    """The settings of ``one``, as `Attached.told` has them, that ``other`` does not have.

    >>> unlike("Attached: fp32; every_steps=5; mix=0.0", "Attached: fp32; every_steps=6; mix=0.0")
    'every_steps=5'
    """
    others = other.split("; ")
    return "; ".join(part for part in one.split("; ") if part not in others) or "nothing else"


def _without_addresses(text: str) -> str:
    """So that a function or an object of somebody else is called the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _gather(own: Tensor) -> Flow[Tensor]:
    (everybody,) = yield AllGather((own,))
    return everybody


def _sum_over_shards(values: Tensor) -> Flow[Tensor]:
    (total,) = yield AllReduce((values,), "sum", axis="shard")
    return total


def _broadcast(values: Mapping[str, Tensor]) -> Flow[dict[str, Tensor]]:
    reply = yield Broadcast(tuple(values.values()), source=0)
    return dict(zip(values, reply, strict=True))
