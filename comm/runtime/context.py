"""What a method works with on one rank: pieces of the model, state, plan, counters, votes within its replica."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dtrain.comm.collectives.routes import Route, described
from dtrain.comm.compressors.compressor import is_sparse
from dtrain.comm.layout import Named, matrices
from dtrain.comm.ops import Place
from dtrain.comm.pieces import Pieces
from dtrain.comm.plans.adaptive import begun
from dtrain.comm.plans.plan import Plan, kinds_of, unmatched
from dtrain.comm.runtime.agreement import sum_over_shards, without_addresses
from dtrain.comm.runtime.membership.membership import Fixed, Membership
from dtrain.comm.seeds import Key
from dtrain.comm.shared_seed.digest import partial, unsigned
from dtrain.comm.state import Kind, State


def description(name: str, plan: Plan, spec: object, settings: tuple[str, ...] = ()) -> str:
    """What a state belongs to: the method, its compressors, and ``settings``, fields of ``spec``."""
    method = f"{name}: {'; '.join(map(str, plan.compressions))}"
    return without_addresses("; ".join([method, *(f"{field}={getattr(spec, field)}" for field in settings)]))


class Context:
    """What `Attached` and its method share on one rank.

    Args:
        description: of the method, see `description`.
        kinds: of the state's names.
        parameters_kind: "replicated" if the live parameters and the inner optimizer's state are equal on all replicas,
            else "per_worker".
        membership: who is on the replicate axis; by default the peers of ``pieces``.
    """

    def __init__(
        self,
        pieces: Pieces,
        seed: int,
        description: str,
        *,
        plan: Plan,
        kinds: Mapping[str, Kind],
        parameters_kind: Kind,
        membership: Membership | None = None,
    ) -> None:
        self.pieces, self.seed, self.description = pieces, seed, description
        self.state, self.parameters_kind = State(kinds), parameters_kind
        self.membership: Membership = Fixed(pieces) if membership is None else membership
        self.plan = begun(plan, list(pieces.shapes))
        self.fed_back = {*kinds_of(plan)}  # names of the state that feedback and compressors keep
        self.matrices = matrices(pieces.segments, pieces.shapes)
        self.meter = pieces.channel.meter  # bytes sent and exposed seconds
        self.steps = self.skipped = self.skipped_in_a_row = self.repairs = 0
        self.saves = 0  # how often this rank has saved its state
        self.gauges: dict[str, float] = {}
        self.decisions: list[str] = []  # as text; their reader clears the list
        self._route: Route | None = None
        self._routed: object = None
        self.stepped_elsewhere: frozenset[str] = frozenset()
        """Trained parameters that the optimizer of ``pieces`` does not step."""
        self.require_still: Callable[[], None] = lambda: None
        """Raises ``RuntimeError`` if the parameters were changed outside of a step."""
        self.warn_of_rules(plan)
        self._warn_of_ranks()

    def begin(self, spec: str, identity: str = "") -> None:
        """Make the replicas equal; see `Membership.begin`."""
        self.membership.begin(self.description, f"{spec}; seed={self.seed}", identity)

    @property
    def place(self) -> Place:
        """This rank on the replicate axis, now."""
        return self.pieces.channel.places["replicate"]

    @property
    def rate(self) -> float:
        """The inner optimizer's learning rate, of its first group."""
        return float(self.pieces.optimizer.param_groups[0]["lr"])

    @property
    def differs_by_rank(self) -> bool:
        """Whether a rank's state differs from that of all others."""
        kinds = set(self.state.kinds.values())
        shards = self.pieces.channel.places["shard"].size
        return self.parameters_kind == "per_worker" or "per_worker" in kinds or (shards > 1 and bool(kinds))

    def key(self, again: int = 0) -> Key:
        """The key of this rank's draws in this step."""
        return Key(self.seed, self.steps, self.place.rank, again=again)

    def agree_in_replica(self, ok: bool) -> bool:
        """Whether ``ok`` holds on every rank of this replica. Every rank must call it."""
        return not bool(self.over_shards(torch.tensor([0.0 if ok else 1.0]), "agree"))

    def over_shards(self, values: Tensor, label: str) -> Tensor:
        """The sum over the ranks of this replica. Every rank must call it."""
        return sum_over_shards(self.membership.votes, values, label)

    def digest(self, values: Named | None = None) -> int:
        """Of every element of the parameters, or of ``values``; the same for every sharding. All ranks must call it."""
        values = self.pieces.read() if values is None else values
        return unsigned(self.over_shards(partial(values, self.pieces.segments), "digest"))

    def measure(self, values: Mapping[str, Tensor], key: Key) -> None:
        """Show the plan what is about to be compressed; what it keeps of it is staged."""
        if self.plan.settled:
            return
        for fqn, value in values.items():
            self.plan.accumulate(fqn, value, self.state)
        if not self.plan.due():
            return
        for fqn, value in values.items():
            feedback, drawn = self.plan.of(fqn, key.step).feedback, replace(key, fqn=fqn, phase="plan")
            fresh = feedback.fresh(fqn, value, self.state.look())  # nothing of this is committed
            corrected = feedback.correct(fqn, value, self.state.look())
            self.plan.measure(fqn, fresh, corrected, self.matrices[fqn], self.place.size, drawn)

    def tell_routes(self, route: Route) -> None:
        """Add what takes which route of ``route``, and its bytes, to ``decisions``: now, and whenever that changes."""
        self._route = route
        self._tell_routes()

    def _tell_routes(self) -> None:
        if self._route is None or not any(is_sparse(compression.by_row) for compression in self.plan.compressions):
            return
        chosen = {fqn: self.plan.of(fqn, self.steps) for fqn in self.pieces.segments}
        world, numels = self.place.size, {fqn: segment.numel for fqn, segment in self.pieces.segments.items()}
        if (routed := (world, *chosen.values())) != self._routed:
            self._routed = routed
            text = described(chosen, numels, world, self._route)
            self.decisions += [] if text is None else [text]

    def review(self) -> None:
        """Let the plan choose its compressions anew. Every rank must call it, once for each exchange."""
        if not self.plan.settled:
            before = self.plan.changes
            self.pieces.channel.run(self.plan.review(self.state, self.rate), "plan")
            if self.plan.changes != before:
                self.decisions.append(self.plan.table().partition("\n")[0])
        self._tell_routes()

    def warn_of_rules(self, plan: Plan) -> None:
        """Warn of patterns in ``plan`` that match no parameter."""
        for pattern in unmatched(plan, self.pieces.shapes):
            warnings.warn(
                f"by_layer: {pattern!r} matches no parameter; names are like {', '.join(list(self.pieces.shapes)[:3])}",
                RuntimeWarning, stacklevel=4,
            )  # fmt: skip

    def _warn_of_ranks(self) -> None:
        """Warn if low rank makes no matrix smaller, as for adapters, whose rank is low already."""
        low = {}
        for fqn, matrix in self.matrices.items():
            compressor = self.plan.of(fqn, 0).two_rounds
            if compressor is not None and matrix.rows > 1 and matrix.columns > 1:
                low[fqn] = compressor
        if low and not any(compressor.pays(self.matrices[fqn]) for fqn, compressor in low.items()):
            fqn, compressor = next(iter(low.items()))
            warnings.warn(
                f"powersgd: rank {compressor.rank} makes none of {len(low)} matrices smaller by min_rate; all of them, "
                f"such as {fqn} of {self.pieces.shapes[fqn]}, are sent in fp32. Give a lower rank, or quantize(bits=8)",
                RuntimeWarning, stacklevel=4,
            )  # fmt: skip
