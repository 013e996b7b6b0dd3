"""What a sync is to its user: a small frozen value (`Sync`), and that value at work on one rank (`Attached`)."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from dtrain.comm.channel import Channel
from dtrain.comm.collectives.exchange import consolidate
from dtrain.comm.kernels import compile_what_is_due
from dtrain.comm.layout import in_messages, matrices
from dtrain.comm.norms import Norm, pooled, recalibrated
from dtrain.comm.ops import AllGather, AllReduce, Axis, Broadcast, Flow
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.adaptive import Settled, begun
from dtrain.comm.plans.plan import Plan, kinds_of, unmatched
from dtrain.comm.runtime.consistency import PARAMETER, Held, ReplicasDiffer, Tie, Verdict, compared
from dtrain.comm.runtime.optimizer_mode import mode_kept
from dtrain.comm.runtime.saved import (
    EACH_SAVES,
    NOTHING_LOADED,
    Entries,
    RankedState,
    entries_for,
    holdings,
    integers_of,
    place_name,
    require_same_sync,
    tensors_of,
)
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, State, Tensors
from dtrain.comm.transports.meter import Meter

MANY_SKIPPED = 10
"""Steps in a row that nobody could make, after which it is said."""


REFUSED = -1
"""What a rank tells the others in place of the step of its state, if it cannot go on with that."""


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

    _alike_means = "parameters, optimizer state"
    """What `_held_alike` is, for people."""

    _from_the_beginning: tuple[str, ...] = ()
    """Names of what is kept of every parameter from the first step on."""

    def __init__(self, pieces: Pieces, state: State, plan: Plan, seed: int, spec: object) -> None:
        self.pieces = pieces
        self.seed = seed
        self.state = state
        self.plan = begun(plan, list(pieces.shapes))
        self.steps = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.repairs = 0
        self.tie: Tie = getattr(spec, "tie", "stop")
        self.meter: Meter = pieces.channel.meter  # what this rank has sent, and how long it stood waiting
        self.gauges: dict[str, float] = {}
        self.decisions: list[str] = []  # for people, who take them out
        self.matrices = matrices(pieces.segments, pieces.shapes)
        own = (f"{name}={getattr(spec, name)}" for name in self.settings)
        method = f"{type(self).__name__}: {'; '.join(map(str, plan.compressions))}"
        self.told = _without_addresses("; ".join([method, *own]))
        self.stepped_elsewhere: frozenset[str] = frozenset()
        """Parameters that the optimizer of ``pieces`` does not step, though they are trained."""
        self.require_still: Callable[[], None] = lambda: None
        """Raises ``RuntimeError`` if somebody has moved them since the last step."""
        self._live: Mapping[str, Tensor] | None = None  # while something else is shown
        self._detached = False
        self._saves = 0
        self._given: weakref.ref[Entries] | None = None
        self._lost_at: int | None = None
        self._warn_of_rules(plan)
        self._warn_of_ranks(self.plan)
        self._begin(f"{spec}")

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
        An optimizer that has modes (schedule-free) is given back in the one that it had.

        >>> def passes():
        ...     for batch in batches:
        ...         model(batch)
        >>> with sync.evaluation(recalibrate=passes):  # doctest: +SKIP
        ...     validate(model)
        """
        shown, norms = self._to_evaluate(), list[Norm]()
        live, before = self.pieces.read() if shown is not None else {}, self._live
        try:
            if shown is not None:
                self.pieces.write(shown)
                self._live = live if before is None else before
            if recalibrate is not None:
                norms = recalibrated(recalibrate)
                self._votes.run(pooled(norms, self._alike), "recalibrate")
            with mode_kept(self.pieces.optimizer):
                yield
        finally:
            for norm in norms:
                norm.put_back()
            self._live = before
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
        self._require_saved()
        if self._detached:
            raise RuntimeError(f"{what} after detach() was called: attach the model again, or step its own optimizer")
        if self._live is not None:
            raise RuntimeError(
                f"{what} within sync.evaluation(), where the model holds what is to be evaluated; call it behind that "
                "block"
            )

    def verify(self) -> bool:
        """Compare what must be equal on all replicas, and make it so; True if it was. Every rank must call it.

        The largest group that agrees is right, and the others take what it has, with a warning that names them. Raises
        `ReplicasDiffer` where no group is the largest, unless ``tie="first"`` says whom to take then; where replicas do
        not even hold the same tensors; and if only some were asked for their state since they were attached.
        """
        size = self.pieces.place.size
        found = self._compared()
        told = self._over_shards(found.told(size), "agree")
        wrong = [rank for rank in range(size) if told[rank]]
        if bool(told[size:].any()):
            raise ReplicasDiffer(f"step {self.steps}: {found.refusal(told[size:], self._alike_means, self._saves)}")
        if wrong:
            self._take_over(found.values)
            self.repairs += 1
            warnings.warn(
                f"step {self.steps}: what must be equal on all replicas ({self._alike_means}) differed on replicas "
                f"{wrong} and was replaced by the others'; {found.first}look at their memory and processors",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        return not wrong

    def _compared(self) -> Verdict:
        flow = compared(self._held_alike, self._alike_in_words(), self._saves_alike(), self.pieces.place, self.tie)
        return self.pieces.channel.run(flow, "guard")

    def _saves_alike(self) -> int:
        """How often every rank must have been asked for its state; 0 where that does not matter."""
        return self._saves if self._each_its_own else 0

    def _held_alike(self) -> Held:
        """What must be equal on all replicas now, in memory of its own but for parameters."""
        names = sorted(name for name, kind in self.state.kinds.items() if kind == "replicated")
        for fqn in sorted(self.state.tensors):
            for name in names:
                if name in self.state.tensors[fqn]:
                    yield f"{name} of {fqn}", self.state.tensors[fqn][name]

    def _alike_in_words(self) -> str:
        """What must be equal on all replicas now and is no tensor."""
        return ""

    def _parameters_alike(self) -> Held:
        """The parameters, one after the other, for `_held_alike` where they are equal on all replicas."""
        for fqn in self.pieces.segments:
            yield PARAMETER + fqn, self.pieces.read([fqn], copy=False)[fqn]

    def _take_over(self, values: Mapping[str, Tensor]) -> None:
        """Set what is wrong here: ``values`` by the names of `_held_alike`. Every rank calls it, as it writes."""
        for name, tensor in self._held_alike():
            if name in values and not name.startswith(PARAMETER):
                tensor.copy_(values[name])
        mine = {name.removeprefix(PARAMETER): value for name, value in values.items() if name.startswith(PARAMETER)}
        self.pieces.write({**self.pieces.read(), **mine})

    @property
    def _each_its_own(self) -> bool:
        """Whether a rank keeps what no other rank has."""
        kinds = set(self.state.kinds.values())
        shards = self.pieces.channel.places["shard"].size
        return self.parameters_kind == "per_worker" or "per_worker" in kinds or (shards > 1 and bool(kinds))

    def state_dict(self) -> dict[str, object]:
        """This rank's state, by its place: ``{"replica-0-of-2.shard-0-of-1": {"tensors": ..., "integers": ..., ...}}``.

        Plain tensors, integers and text; see `dtrain.comm.runtime.saved`. Each rank has its own, and every rank must
        call it at the same step and save what it gets. "parameters" is a digest of this rank's parameters, which are
        saved apart; taken within `evaluation`, a state holds also the live ones, and brings them back.
        """
        self._require_saved()
        self.settle()
        self._saves += 1
        tensors = {fqn: dict(named) for fqn, named in self.state.tensors.items()}
        entries: dict[str, object] = {
            "tensors": tensors, "holds": holdings(tensors), "integers": self.integers(),
            "parameters": _digest(self.pieces.read(copy=False)), "place": self._place(), "sync": self.told,
            "optimizer": self._optimizer_states(),
        }  # fmt: skip
        if self._live is not None:
            entries["live"] = dict(self._live)
        own, step, me = Entries(entries), self.steps, weakref.ref(self)
        self._given = weakref.ref(own)

        def unread() -> None:
            attached = me()
            if attached is not None:
                attached._lost_at = step
                warnings.warn(f"the state of step {step} was thrown away unread", RuntimeWarning, stacklevel=2)

        return RankedState(self._name(), own, unread if self._each_its_own else None)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict`, after the model's and the optimizer's own states have been loaded.

        Every rank must call it, with its own state or with what was put together of several ranks'. Raises
        ``ValueError`` for the state of another rank, of another method, or one with other settings, for one of which a
        part is missing, if the model does not hold the parameters that this rank had when the state was taken, and if
        the ranks' states are of different steps. ``state | {"sync": None}`` is loaded as far as the names of what both
        keep agree.
        """
        refusal: Exception | None = None
        tensors: Tensors = {}
        integers = {"steps": REFUSED}
        try:
            entries, tensors, integers = self._taken_apart(state)
        except (TypeError, ValueError) as error:
            refusal = error
        replicas, shards = self._told_by_all(integers["steps"])
        if refusal is not None:
            raise refusal
        if REFUSED in (*replicas, *shards):
            other = [rank for rank, step in enumerate(replicas) if step == REFUSED]
            raise ValueError(
                f"replicas {other or 'of another shard'} refused the states that they were to load, and say why; load "
                "one and the same checkpoint on all ranks"
            )
        if len({*replicas, *shards}) > 1:
            raise ValueError(
                f"the states that are loaded are of different steps: {replicas} on the replicas, {shards} on the ranks "
                "of this one; load one and the same checkpoint on all ranks"
            )
        before = self.state.tensors, self.integers()
        try:
            self.state.load(self._brought_here(tensors))
            self.load_integers(integers)
        except (KeyError, ValueError) as error:
            self.state.tensors = before[0]
            self.load_integers(before[1])
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"this state was saved with another sync: {error.args[0]} is missing") from error
        if isinstance(live := entries.get("live"), Mapping):
            self.pieces.write(live)

    def _taken_apart(self, state: object) -> tuple[Mapping[str, object], Tensors, dict[str, int]]:
        """This rank's entries, and their tensors and integers, if it can go on with them."""
        given = self._given() if self._given is not None else None
        if given is not None and isinstance(state, Mapping) and any(value is given for value in state.values()):
            raise ValueError(NOTHING_LOADED)
        entries = entries_for(state, self._name(), whichever=not self._each_its_own)
        require_same_sync(entries, self.told, self._place() if self._each_its_own else None)
        tensors = tensors_of(entries, self.state.kinds, self.pieces.segments, self._from_the_beginning)
        integers = integers_of(entries, self.counters)
        self._require_parameters(entries)
        self._require_optimizer(entries)
        return entries, tensors, integers

    def _require_parameters(self, entries: Mapping[str, object]) -> None:
        saved = entries.get("parameters")
        if saved is None:
            return
        now = _digest(self.pieces.read(copy=False))
        others = str(entries.get("place")).partition(", ")[2] not in self._place()  # another shard: other parameters
        live = entries.get("live")
        if saved != now and not others and not (isinstance(live, Mapping) and _digest(live) == now):
            raise ValueError(
                "the model does not hold the parameters that this rank had when this state was taken; on every rank: "
                "attach, then load the model's and the optimizer's states, then the sync's, each from this rank's own "
                "files (in a round of a local update the replicas differ)"
            )

    def _require_optimizer(self, entries: Mapping[str, object]) -> None:
        """Raise ``ValueError`` if the optimizer has lost all of the state that it had when this was taken."""
        saved = entries.get("optimizer")
        if isinstance(saved, int) and saved > 0 and not self._optimizer_states():
            raise ValueError(
                f"the optimizer has no state, and had that of {saved} parameters when this was taken: load the "
                "optimizer's state first, then the sync's; if it is to begin anew, leave out the entry 'optimizer': "
                'load_state_dict(state | {"optimizer": None})'
            )

    def _optimizer_states(self) -> int:
        """Of how many parameters the optimizer keeps something."""
        kept = self.pieces.optimizer.state.values()
        return sum(any(isinstance(value, Tensor) for value in one.values()) for one in kept)

    def _told_by_all(self, number: int) -> tuple[list[int], list[int]]:
        """``number`` of all replicas, and of all ranks of this one. Every rank must call it."""
        own = torch.tensor([number])
        shards = self.pieces.channel.run(_gather(own, "shard"), "agreement")
        return self.pieces.channel.run(_gather(own), "agreement").flatten().tolist(), shards.flatten().tolist()

    def _brought_here(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """On the device of the parameter that each belongs to."""
        devices = {fqn: value.device for fqn, value in self.pieces.read(copy=False).items()}
        found: dict[str, dict[str, Tensor]] = {}
        for fqn, named in tensors.items():
            found[fqn] = {name: tensor.to(devices.get(fqn, tensor.device)) for name, tensor in named.items()}
        return found

    def _require_saved(self) -> None:
        """Raise ``RuntimeError`` if a state that this rank gave was thrown away by whoever had asked for it."""
        if self._lost_at is not None:
            step, self._lost_at = self._lost_at, None
            raise RuntimeError(
                f"the state that {self._place()} gave at step {step} was thrown away unread, so what it keeps is not "
                "in that checkpoint: a framework asked all ranks and wrote what the main process got (as "
                f"register_for_checkpointing of accelerate, or save of lightning.fabric). {EACH_SAVES}"
            )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is at work in this process, between its model and the links, and cannot be "
            f"pickled or copied; save its state. {EACH_SAVES}"
        )

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
        self._detached = True
        self.pieces.detach()
        self.pieces.channel.close()
        self._require_saved()

    def _name(self) -> str:
        """Of this rank's entries in a state."""
        return place_name(self.pieces.channel.places["replicate"], self.pieces.channel.places["shard"])

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

    def _warn_of_ranks(self, plan: Plan) -> None:
        """Say it if low rank was asked for and no matrix is sent so: adapters have a low rank themselves."""
        low = {}
        for fqn, matrix in self.matrices.items():
            compressor = plan.of(fqn, 0).two_rounds
            if compressor is not None and matrix.rows > 1 and matrix.columns > 1:
                low[fqn] = compressor
        if low and not any(compressor.pays(self.matrices[fqn]) for fqn, compressor in low.items()):
            fqn, compressor = next(iter(low.items()))
            warnings.warn(
                f"powersgd: rank {compressor.rank} makes none of {len(low)} matrices smaller by min_rate; all of them, "
                f"such as {fqn} of {self.pieces.shapes[fqn]}, are sent in fp32. Give a lower rank, or quantize(bits=8)",
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


def _without_addresses(text: str) -> str:
    """So that a function or an object of somebody else is called the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _gather(own: Tensor, axis: Axis = "replicate") -> Flow[Tensor]:
    (everybody,) = yield AllGather((own,), axis)
    return everybody


def _sum_over_shards(values: Tensor) -> Flow[Tensor]:
    (total,) = yield AllReduce((values,), "sum", axis="shard")
    return total


def _broadcast(values: Mapping[str, Tensor]) -> Flow[dict[str, Tensor]]:
    reply = yield Broadcast(tuple(values.values()), source=0)
    return dict(zip(values, reply, strict=True))
