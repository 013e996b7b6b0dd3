"""What a sync keeps comes back whole, or is refused: nothing of it is lost without a word."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dtrain import dgc, diloco, every_step, fedavg_m, local_sgd, one_byte, post_local_sgd, streaming_diloco
from dtrain.comm.runtime.method import Sync
from dtrain.comm.runtime.saved import Entries
from dtrain.compress import ef21, error_feedback, powersgd, quantize, topk
from dtrain.outer import nesterov
from dtrain.testing.replicas import Replicas, equal

State = dict[str, Any]
FEEDBACK = every_step(compress=error_feedback(topk(0.3)))
SPECS: dict[str, Sync] = {
    "dense": every_step(),
    "feedback": FEEDBACK,
    "ef21": every_step(compress=ef21(topk(0.3))),
    "low rank": every_step(compress=error_feedback(powersgd(2))),
    "all-gather": every_step(compress=error_feedback(topk(0.3)), route="all_gather"),
    "sparse all-reduce": every_step(compress=error_feedback(topk(0.1)), route="sparse_all_reduce"),
    "dgc": dgc(0.1, warmup_steps=5),
    "diloco, top-k": diloco(every_steps=4, compress=error_feedback(topk(0.1, values=quantize(bits=4, block=16)))),
    "diloco": diloco(every_steps=4, compress=error_feedback(quantize(bits=8, block=16))),
    "sharded": diloco(every_steps=4, outer_state="sharded"),
    "offloaded": diloco(every_steps=4, outer_state="offloaded"),
    "streaming": streaming_diloco(every_steps=6, layers_per_fragment=0, overlap_steps=3),
    "few bits": every_step(compress=error_feedback(quantize("least_squares", bits=2, block=16)), lossless=1),
    "few bits, streaming": streaming_diloco(
        every_steps=6,
        layers_per_fragment=0,
        overlap_steps=3,
        lossless=1,
        compress=error_feedback(quantize("least_squares", bits=1, block=16)),
    ),
    "fedavg_m": fedavg_m(every_steps=4),
    "warm-up": post_local_sgd(every_steps=4, warmup_steps=20),
}


def trained(spec: Sync, steps: int = 7, world: int = 2) -> Replicas:
    replicas = Replicas(spec, world)
    replicas.train(steps)
    return replicas


def states(replicas: Replicas) -> list[State]:
    return cast("list[State]", replicas.all(lambda rank: replicas.attached[rank].state_dict()))


def through_a_file(state: State) -> State:
    """As `torch.load` gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return cast(State, torch.load(file, weights_only=True))


def again(replicas: Replicas, kept: list[State]) -> Replicas:
    """Others, of the same parameters, that have loaded ``kept``."""
    others = Replicas(replicas.spec, replicas.world, start=replicas.start)
    for rank in range(replicas.world):
        others.pieces[rank].write(replicas.live(rank))
    others.all(lambda rank: others.attached[rank].load_state_dict(kept[rank]))
    return others


def refusal(replicas: Replicas, state: State) -> str:
    """What the first of others says that are to load ``state``."""
    others = Replicas(replicas.spec, 1, start=replicas.start)
    others.pieces[0].write(replicas.live(0))
    with pytest.raises(ValueError) as error:
        others.attached[0].load_state_dict(state)
    assert not others.attached[0].steps  # nothing of it was taken
    return str(error.value)


@pytest.mark.parametrize("way", ["as it is", "file", "copied", "pickled", "merged"])
@pytest.mark.parametrize("name", SPECS)
def test_a_state_goes_on_bitwise(name: str, way: str) -> None:
    one = trained(SPECS[name])
    kept = states(one)
    ways: dict[str, Callable[[State], State]] = {
        "as it is": lambda state: state,
        "file": through_a_file,
        "copied": copy.deepcopy,
        "pickled": lambda state: cast(State, pickle.loads(pickle.dumps(state))),
        "merged": lambda state: {**kept[1], **kept[0]},
    }
    kept_so = [copy.deepcopy(ways[way](state)) for state in kept]
    other = again(one, kept_so)
    for replicas in (one, other):
        replicas.train(9)
    for rank in range(2):
        assert equal(one.live(rank), other.live(rank))
        for state_name in one.attached[rank].state.kinds:
            assert equal(one.kept(rank, state_name), other.kept(rank, state_name))


def test_each_rank_has_a_name_of_its_own_and_plain_contents() -> None:
    kept = [through_a_file(state) for state in states(trained(FEEDBACK))]
    assert [list(state) for state in kept] == [["replica-0-of-2.shard-0-of-1"], ["replica-1-of-2.shard-0-of-1"]]
    (own,) = kept[0].values()
    assert own["numbers"]["steps"] == 7 and own["holds"]["residual of layers.2.weight"] == "float32 [61]"
    assert own["tensors"]["layers.2.weight"]["residual"].shape == (61,)


def test_what_was_read_before_can_be_read_still() -> None:
    state = states(trained(FEEDBACK, world=1))[0]
    assert state["numbers"]["steps"] == 7 and state.get("place") == "replica 0 of 1, shard 0 of 1"
    assert set(state["tensors"]) == {"layers.0.weight", "layers.1.weight", "layers.2.weight"}
    assert state.get("no such entry") is None


def broken(change: Callable[[State], object], spec: Sync = FEEDBACK) -> str:
    replicas = trained(spec, world=1)
    state = through_a_file(states(replicas)[0])
    change(state["replica-0-of-1.shard-0-of-1"])
    return refusal(replicas, state)


def set_to(entry: str, *path: str, value: object) -> Callable[[State], object]:
    def change(state: State) -> None:
        place = state[entry]
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value

    return change


W = "layers.2.weight"
DAMAGES: dict[str, tuple[Callable[[State], object], str]] = {
    "a tensor is missing": (lambda s: s["tensors"][W].pop("residual"), "1 of them are missing (residual of layers.2.w"),
    "a parameter is missing": (lambda s: s["tensors"].pop(W), "holds 3 tensors, and 1 of them are missing"),
    "all are missing": (lambda s: s["tensors"].clear(), "3 of them are missing"),
    "one too many": (set_to("tensors", W, "velocity", value=torch.zeros(61)), "holds ['velocity'], this sync keeps"),
    "another shape": (set_to("tensors", W, "residual", value=torch.zeros(60)), "residual of layers.2.weight: float"),
    "another dtype": (set_to("tensors", W, "residual", value=torch.zeros(61).half()), "float16 [61]"),
    "no tensor": (set_to("tensors", W, "residual", value=[1.0]), "no tensors by name for 'layers.2.weight'"),
    "text for a number": (set_to("numbers", "steps", value="7"), "steps of the state to load is '7'; it is"),
    "a fraction": (set_to("numbers", "steps", value=7.5), "steps of the state to load is 7.5"),
    "a truth value": (set_to("numbers", "steps", value=True), "steps of the state to load is True"),
    "no number": (set_to("numbers", "skipped", value=None), "skipped of the state to load is None"),
    "below zero": (set_to("numbers", "steps", value=-1), "steps of the state to load is -1; it counts"),
    "huge": (set_to("numbers", "steps", value=10**30), "an integer of 64 bits"),
    "a counter is missing": (lambda s: s["numbers"].pop("steps"), "steps is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_refused_before_anything_is_taken(damage: str) -> None:
    change, words = DAMAGES[damage]
    assert words in broken(change)


@pytest.mark.parametrize("damage", ["another shape", "another dtype", "no tensor", "one too many"])
def test_so_is_a_state_that_has_no_list(damage: str) -> None:
    """As it was saved before, or as a checkpoint of dtrain's has it."""

    def change(state: State) -> None:
        del state["holds"]
        DAMAGES[damage][0](state)

    told = broken(change)
    assert "the state to load holds" in told


def test_without_a_list_an_anchor_is_still_missed() -> None:
    def change(state: State) -> None:
        del state["holds"], state["tensors"][W]["anchor"]

    assert "lacks anchor of layers.2.weight" in broken(change, diloco(every_steps=4))


@pytest.mark.parametrize("name", SPECS)
def test_a_state_from_before_still_goes_on_bitwise(name: str) -> None:
    """One rank's entries alone, without a list of them."""
    one = trained(SPECS[name])
    kept = [through_a_file(state) for state in states(one)]
    old = [{key: value for key, value in own.items() if key != "holds"} for state in kept for own in state.values()]
    other = again(one, old)
    for replicas in (one, other):
        replicas.train(5)
    assert all(equal(one.live(rank), other.live(rank)) for rank in range(2))


@pytest.mark.parametrize("state", [None, {}, [1], {"tensors": {}}, {"replica-0-of-1.shard-0-of-1": 3}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(TypeError, match="the state of a sync is"):
        Replicas(FEEDBACK, 1).attached[0].load_state_dict(state)


def test_the_state_of_another_rank_is_refused_where_each_has_its_own() -> None:
    kept = [through_a_file(state) for state in states(trained(FEEDBACK))]
    (own,) = kept[0].values()
    others = Replicas(FEEDBACK, 2)

    def load(rank: int, state: State) -> str:
        with pytest.raises(ValueError) as error:
            others.attached[rank].load_state_dict(state | {"parameters": None})
        return str(error.value)

    first, second = others.all(lambda rank: load(rank, kept[0]))
    assert "replicas [1] refused the states that they were to load, and say why" in first
    assert "every rank saves its own state, and every rank loads its own files" in second
    _, second = others.all(lambda rank: load(rank, own))
    assert "was taken by replica 0 of 2, shard 0 of 1, and this is replica 1" in second
    assert [attached.steps for attached in others.attached] == [0, 0]


@pytest.mark.parametrize("spec", [every_step(), every_step(compress=quantize(bits=8)), one_byte()])
def test_where_all_keep_the_same_one_file_is_enough(spec: Sync) -> None:
    """What a framework writes from the main process is all that there is."""
    one = Replicas(spec, 2)
    if isinstance(spec, type(every_step())):
        one.train(5)
    kept = through_a_file(states(one)[0])
    states(one)  # and nobody minds that the others are thrown away
    assert again(one, [kept, kept]).attached[1].steps == one.attached[1].steps
    one.all(lambda rank: one.attached[rank].verify())


def test_states_of_different_steps_are_refused_on_all_ranks() -> None:
    one = trained(FEEDBACK, 5)
    early = [through_a_file(state) for state in states(one)]
    one.train(3)
    late = [through_a_file(state) for state in states(one)]
    mixed = [early[0] | {"parameters": None}, late[1] | {"parameters": None}]
    others = Replicas(FEEDBACK, 2)

    def load(rank: int) -> str:
        with pytest.raises(ValueError) as error:
            others.attached[rank].load_state_dict(mixed[rank])
        return str(error.value)

    assert all("of different steps: [5, 8] on the replicas" in told for told in others.all(load))
    assert [attached.steps for attached in others.attached] == [0, 0]


def test_what_nothing_was_loaded_into_is_refused() -> None:
    replicas = Replicas(FEEDBACK, 1)
    template = states(replicas)[0]
    with pytest.raises(ValueError, match="nothing was loaded into it since"):
        replicas.attached[0].load_state_dict(template)
    replicas.train(2)
    kept = copy.deepcopy(states(replicas)[0])
    live = replicas.live(0)
    replicas.train(2)
    replicas.pieces[0].write(live)
    replicas.attached[0].load_state_dict(kept)  # back in memory
    assert replicas.attached[0].steps == 2


# ---- whoever takes a sync for a plain object -------------------------------------------------------------------------


def accelerate_saves(replicas: Replicas) -> list[bytes]:
    """``save_custom_state`` of accelerate 1.15: every rank asks, the main process writes."""
    return replicas.all(lambda rank: _if_main(rank, replicas.attached[rank].state_dict()))


def fabric_saves(replicas: Replicas) -> list[bytes]:
    """``Strategy.save_checkpoint`` of lightning.fabric 2.6: stateful objects are asked on every rank."""

    def save(rank: int) -> bytes:
        state = {"step": 3, "sync": replicas.attached[rank]}
        converted = {name: o.state_dict() if hasattr(o, "state_dict") else o for name, o in state.items()}
        return _if_main(rank, converted)

    return replicas.all(save)


def _if_main(rank: int, state: object) -> bytes:
    file = io.BytesIO()
    if rank == 0:
        torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize("name", [name for name in SPECS if name != "dense"])
@pytest.mark.parametrize("saves", [accelerate_saves, fabric_saves])
def test_a_framework_that_writes_the_main_process_only_is_found_out_at_once(name: str, saves: Any) -> None:
    replicas = trained(SPECS[name])
    with pytest.warns(RuntimeWarning, match="the state of step 7 was thrown away unread"):
        saves(replicas)
    replicas.attached[0].saved.require_read()
    call = {"diloco": "close_round", "ef21": "state_dict", "sharded": "detach"}.get(name, "step")
    with pytest.raises(RuntimeError, match="gave at step 7 was thrown away unread") as error:
        getattr(replicas.attached[1], call)()
    assert "Every rank saves its own: torch.save(sync.state_dict()" in str(error.value)


def test_whoever_looks_into_it_has_it() -> None:
    looks: dict[str, Callable[[State], object]] = {
        "file": through_a_file, "copy": copy.deepcopy, "dict": dict, "merged": lambda state: {**state},
        "joined": lambda state: state | {"sync": None}, "joins": lambda state: {"sync": None} | state,
        "entry": lambda state: state["numbers"], "items": lambda state: list(state.items()),
        "keys": lambda state: list(state), "pickle": pickle.dumps, "get": lambda state: state.get("sync"),
    }  # fmt: skip
    replicas = trained(FEEDBACK, world=1)
    for look in looks.values():
        look(states(replicas)[0])
        gc.collect()
        replicas.attached[0].saved.require_read()
    with pytest.warns(RuntimeWarning, match="thrown away unread"):
        states(replicas)
    with pytest.raises(RuntimeError, match="was thrown away"):
        replicas.attached[0].state_dict()


@pytest.mark.parametrize("how", [pickle.dumps, copy.deepcopy, copy.copy, lambda sync: torch.save(sync, io.BytesIO())])
def test_a_sync_at_work_is_not_copied(how: Callable[[object], object]) -> None:
    for spec in (FEEDBACK, diloco(every_steps=3)):
        with pytest.raises(TypeError, match="cannot be pickled or copied; save its state"):
            how({"sync": Replicas(spec, 1).attached[0]} if how is not copy.copy else Replicas(spec, 1).attached[0])


def test_entries_are_a_value_that_nobody_takes_apart() -> None:
    from collections.abc import Mapping

    own = Entries({"numbers": {"steps": 1}})
    assert not isinstance(own, Mapping) and "numbers" in own and dict(own)["numbers"] == {"steps": 1}
    own["sync"] = "x"
    assert own.pop("sync") == "x" and own.pop("sync") is None and list(own) == ["numbers"]
    assert isinstance(pickle.loads(pickle.dumps(own)), dict)


# ---- within an evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["feedback", "diloco", "sharded", "offloaded", "streaming", "fedavg_m", "warm-up"])
def test_saved_within_an_evaluation_it_brings_the_live_parameters_back(name: str) -> None:
    """A framework saves what the model shows then, the anchor; training goes on as if nobody had looked."""
    one = trained(SPECS[name])
    kept: list[tuple[dict[str, Tensor], State]] = []

    def save(rank: int) -> tuple[dict[str, Tensor], State]:
        with one.attached[rank].evaluation(), one.attached[rank].evaluation():
            state = cast(State, one.attached[rank].state_dict())
            return one.live(rank), through_a_file(state)

    def load(other: Replicas) -> None:
        other.all(lambda rank: other.attached[rank].load_state_dict(kept[rank][1]))

    kept = one.all(save)
    for with_live in (False, True):
        other = Replicas(one.spec, 2, start=one.start)
        for rank in range(2):
            other.pieces[rank].write(one.live(rank) if with_live else kept[rank][0])
        load(other)
        assert all(equal(other.live(rank), one.live(rank)) for rank in range(2))
        reference = one.resumed()
        for replicas in (reference, other):
            replicas.train(6)
        assert all(equal(reference.live(rank), other.live(rank)) for rank in range(2))


def test_so_it_is_with_weights_that_are_neither() -> None:
    one = trained(diloco(every_steps=5), 7, world=1)
    with one.attached[0].evaluation():
        state = through_a_file(states(one)[0])
    other = Replicas(one.spec, 1, start=one.start)
    other.pieces[0].write({fqn: value + 1 for fqn, value in one.live(0).items()})
    with pytest.raises(ValueError, match="the model does not hold the parameters"):
        other.attached[0].load_state_dict(state)


def test_nothing_is_warned_of_on_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = trained(local_sgd(every_steps=3), 4)
        again(one, states(one)).train(2)
    assert nesterov().lr == 0.7
