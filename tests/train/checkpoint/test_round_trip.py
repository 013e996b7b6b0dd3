"""What is written on one mesh and layout comes back on any other, exactly or by the declared translation."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm.layout import Segment, even_slice
from dtrain.errors import CheckpointError
from dtrain.train.checkpoint import Kind, Placement, RankState, digest, full_parameters, load, newest
from dtrain.train.checkpoint.export import export
from tests.fakes.checkpoint_threads import write_together

Shapes = dict[str, tuple[int, ...]]
Cut = dict[str, Segment]  # one shard's segments

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.int64]
PARAMETERS, RESIDUAL, ODD, STEP = "parameters", "sync.residual", "sync.odd", "optimizer.step"
KINDS: dict[str, Kind] = {PARAMETERS: "replicated", RESIDUAL: "per_worker", ODD: "per_worker", STEP: "per_worker"}


def slices(shapes: Shapes, shards: int) -> list[Cut]:
    """DDP and ZeRO-3: each parameter in even parts."""
    return [
        {fqn: even_slice(fqn, math.prod(shape), part=shard, parts=shards) for fqn, shape in shapes.items()}
        for shard in range(shards)
    ]


def rows(shapes: Shapes, shards: int) -> list[Cut]:
    """FSDP2: each parameter in even numbers of rows."""
    cuts: list[Cut] = [{} for _ in range(shards)]
    for fqn, shape in shapes.items():
        width = math.prod(shape[1:])
        for shard in range(shards):
            part = even_slice(fqn, shape[0] if shape else 1, part=shard, parts=shards)
            cuts[shard][fqn] = Segment(fqn, part.offset * width, part.numel * width)
    return cuts


def flat(shapes: Shapes, shards: int) -> list[Cut]:
    """ZeRO-1 and 2: all parameters end to end, padded, in even parts."""
    numels = {fqn: math.prod(shape) for fqn, shape in shapes.items()}
    width = -(-sum(numels.values()) // shards)
    cuts: list[Cut] = [{} for _ in range(shards)]
    start = 0
    for fqn, numel in numels.items():
        for shard in range(shards):
            low = min(max(shard * width - start, 0), numel)
            high = min(max((shard + 1) * width - start, 0), numel)
            cuts[shard][fqn] = Segment(fqn, low, high - low)
        start += numel
    return cuts


def whole(shapes: Shapes, shards: int) -> list[Cut]:
    """Every shard holds everything."""
    return [{fqn: Segment(fqn, 0, math.prod(shape)) for fqn, shape in shapes.items()} for _ in range(shards)]


@st.composite
def cuts(draw: st.DrawFn, shapes: Shapes, shards: int) -> list[Cut]:
    layout = draw(st.sampled_from([slices, rows, flat, whole, None]))
    if layout is not None:
        return layout(shapes, shards)
    found: list[Cut] = [{} for _ in range(shards)]
    for fqn, shape in shapes.items():
        numel = math.prod(shape)
        points = sorted(draw(st.lists(st.integers(0, numel), min_size=shards - 1, max_size=shards - 1)))
        order = draw(st.permutations(range(shards)))
        for shard, low, high in zip(order, [0, *points], [*points, numel], strict=True):
            found[shard][fqn] = Segment(fqn, low, high - low)
    return found


@st.composite
def shapes_of_models(draw: st.DrawFn) -> Shapes:
    shape = st.lists(st.integers(1, 5), max_size=3).map(tuple)
    return draw(st.dictionaries(st.sampled_from(["a.weight", "b|odd", "c", "d.é"]), shape, min_size=1, max_size=4))


class Values:
    """The truth: section -> replica -> fqn -> the whole tensor, flat."""

    def __init__(self, shapes: Shapes, replicas: int, seed: int, odd: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.shapes = shapes
        self.replicas = replicas
        shared = {fqn: torch.randn(math.prod(shape), generator=draw) for fqn, shape in shapes.items()}
        self.sections: dict[str, list[dict[str, Tensor]]] = {PARAMETERS: [shared] * replicas}
        self.sections[RESIDUAL] = [self._random(draw, torch.float32) for _ in range(replicas)]
        self.sections[ODD] = [self._random(draw, odd) for _ in range(replicas)]
        self.sections[STEP] = [{fqn: torch.tensor(7.0 + r) for fqn in shapes} for r in range(replicas)]

    def _random(self, draw: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            fqn: (torch.randn(math.prod(shape), generator=draw) * 3).abs().to(dtype)
            for fqn, shape in self.shapes.items()
        }

    def states(self, layout: list[Cut]) -> Iterator[RankState]:
        for replica in range(self.replicas):
            for shard, segments in enumerate(layout):
                yield RankState(
                    segments=dict(segments),
                    sections={section: cut(values[replica], segments) for section, values in self.sections.items()},
                    kinds=dict(KINDS),
                    numbers={"step": 12, "skipped": replica},
                    rng={"torch": torch.tensor([replica, shard, 200], dtype=torch.uint8)},
                    buffers={"bn.mean": torch.full((2, 2), 1.0 + replica), "bn.count": torch.tensor(3 + replica)},
                )


def cut(values: Mapping[str, Tensor], segments: Cut) -> dict[str, Tensor]:
    return {
        fqn: value if value.dim() == 0 else value[segments[fqn].offset : segments[fqn].stop]
        for fqn, value in values.items()
    }


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype
        and found[name].shape == expected[name].shape
        and found[name]
        .contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .equal(expected[name].contiguous().reshape(-1).view(torch.uint8))
        for name in expected
    )


def places(replicas: int, layout: list[Cut]) -> Iterator[tuple[Placement, Cut]]:
    for replica in range(replicas):
        for shard, segments in enumerate(layout):
            yield Placement(replica, replicas, shard, len(layout)), segments


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data(), shapes=shapes_of_models(), seed=st.integers(0, 2**31), odd=st.sampled_from(DTYPES))
def test_any_mesh_and_layout_reads_what_any_other_wrote(
    data: st.DataObject, shapes: Shapes, seed: int, odd: torch.dtype
) -> None:
    replicas, shards = data.draw(st.integers(1, 3), "replicas"), data.draw(st.integers(1, 3), "shards")
    new_replicas, new_shards = data.draw(st.integers(1, 3), "new replicas"), data.draw(st.integers(1, 3), "new shards")
    values = Values(shapes, replicas, seed, odd)
    layout = data.draw(cuts(shapes, shards), "layout")
    with tempfile.TemporaryDirectory() as name:
        written = list(values.states(layout))
        path = write_together(Path(name), step=12, states=written, shards=shards, shapes=shapes)
        assert newest(Path(name)) == path
        for place, segments in places(new_replicas, data.draw(cuts(shapes, new_shards), "new layout")):
            state = load(path, place=place, segments=segments, shapes=shapes)
            assert state.kinds == KINDS
            assert state.segments == segments
            assert same(state.sections[PARAMETERS], cut(values.sections[PARAMETERS][0], segments))
            exact = place.replicas == replicas
            check = _check_exact if exact else _check_translated
            check(state, values, place, segments)
            if exact and place.shards == shards:
                assert same(state.rng, written[place.rank].rng) and state.translated == {}
            else:
                assert state.rng == {} and "rng" in state.translated


def _check_exact(state: RankState, values: Values, place: Placement, segments: Cut) -> None:
    for section in KINDS:
        assert same(state.sections[section], cut(values.sections[section][place.replica], segments))
    assert state.numbers == {"step": 12, "skipped": place.replica}
    assert state.buffers["bn.mean"].equal(torch.full((2, 2), 1.0 + place.replica))
    assert state.buffers["bn.count"].equal(torch.tensor(3 + place.replica))


def _check_translated(state: RankState, values: Values, place: Placement, segments: Cut) -> None:
    count = values.replicas
    for section in (RESIDUAL, ODD):
        for fqn, found in state.sections[section].items():
            pieces = [cut(of_replica, segments)[fqn] for of_replica in values.sections[section]]
            if pieces[0].is_floating_point():
                total = torch.zeros(pieces[0].shape, dtype=torch.float64)
                for piece in pieces:
                    total += piece.double()
                assert found.dtype == pieces[0].dtype and found.equal((total / count).to(found.dtype))
            else:
                assert found.equal(pieces[0])
    assert same(state.sections[STEP], cut(values.sections[STEP][0], segments))
    assert state.numbers == {"step": 12, "skipped": 0}
    assert state.buffers["bn.mean"].equal(torch.full((2, 2), sum(1.0 + r for r in range(count)) / count))
    assert state.buffers["bn.count"].equal(torch.tensor(3))
    assert {RESIDUAL, ODD, STEP, "buffers"} <= state.translated.keys()
    assert PARAMETERS not in state.translated


@settings(max_examples=15, deadline=None)
@given(shapes=shapes_of_models(), old=st.integers(1, 4), new=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_the_mean_that_residuals_add_survives_a_change_of_the_number_of_replicas(
    shapes: Shapes, old: int, new: int, seed: int
) -> None:
    values = Values(shapes, old, seed, torch.bool)
    with tempfile.TemporaryDirectory() as name:
        path = write_together(
            Path(name), step=12, states=list(values.states(slices(shapes, 1))), shards=1, shapes=shapes
        )
        loaded = [
            load(path, place=place, segments=segments, shapes=shapes)
            for place, segments in places(new, whole(shapes, 1))
        ]
    for fqn in shapes:
        before = sum(values.sections[RESIDUAL][r][fqn].double().sum() for r in range(old)) / old
        after = sum(state.sections[RESIDUAL][fqn].double().sum() for state in loaded) / new
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(shapes=shapes_of_models(), seed=st.integers(0, 2**31))
def test_the_digest_and_the_file_of_an_export_do_not_depend_on_mesh_or_layout(shapes: Shapes, seed: int) -> None:
    digests = set()
    for replicas, shards, layout in [(1, 1, whole), (2, 2, rows), (1, 3, flat), (3, 2, slices)]:
        values = Values(shapes, replicas, seed, torch.uint8)
        with tempfile.TemporaryDirectory() as name:
            path = write_together(
                Path(name), step=12, states=list(values.states(layout(shapes, shards))), shards=shards, shapes=shapes
            )
            digests.add(export(path, Path(name) / "export" / "model.safetensors"))
            expected = {fqn: values.sections[PARAMETERS][0][fqn].reshape(shape) for fqn, shape in shapes.items()}
            assert same(full_parameters(path), expected)
            digests.add(digest(expected))
    assert len(digests) == 1


def test_pieces_that_share_memory_are_written_as_they_are(tmp_path: Path) -> None:
    buffer = torch.arange(6.0)
    segments = {"a": Segment("a", 0, 4), "b": Segment("b", 0, 2)}
    pieces = {"a": buffer[:4], "b": buffer[4:]}
    overlapping = {"a": buffer[1:5], "b": buffer.view(2, 3)[:, 1]}
    state = RankState(
        segments,
        {"x": pieces, "alias": dict(pieces), "y": overlapping},
        dict.fromkeys(["x", "alias", "y"], "replicated"),
    )
    shapes = {"a": (4,), "b": (2,)}
    path = write_together(tmp_path, step=1, states=[state], shards=1, shapes=shapes)
    found = load(path, place=Placement(0, 1, 0, 1), segments=segments, shapes=shapes)
    assert all(same(found.sections[section], state.sections[section]) for section in state.sections)


def test_special_floats_and_odd_dtypes_survive_bit_by_bit(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, -(2**31), 0x7F800000, 1, -1], dtype=torch.int32)
    segments = {"w": Segment("w", 0, 5)}
    tensors = {
        "nan": bits.view(torch.float32),
        "bf16": bits.view(torch.bfloat16)[::2],
        "bool": torch.tensor([True, False, True, True, False]),
        "uint8": torch.tensor([0, 255, 7, 128, 1], dtype=torch.uint8),
        "int64": torch.tensor([2**62 + 1, -(2**63), 0, 1, 3]),
        "half": torch.tensor([1e-8, 65504.0, -0.0, 3.0, 1.0], dtype=torch.float16),
    }
    sections = {name: {"w": tensor} for name, tensor in tensors.items()}
    for step, kind in enumerate(("replicated", "per_worker")):
        state = RankState(segments, sections, dict.fromkeys(sections, kind))  # type: ignore[arg-type]
        path = write_together(tmp_path, step=step, states=[state, state], shards=1, shapes={"w": (5,)})
        found = load(path, place=Placement(1, 2, 0, 1), segments=segments, shapes={"w": (5,)})
        assert all(same(found.sections[name], sections[name]) for name in sections)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.sections["p"].update(x=torch.zeros(2)), "'x'"),
        (lambda state: state.sections["p"].update(w=torch.zeros(3)), "segment of 2"),
        (lambda state: state.sections["p"].update(w=torch.zeros(1, 2)), "flat piece"),
        (lambda state: state.kinds.update(p="sharded"), "unknown kind 'sharded'"),
        (lambda state: state.kinds.pop("p"), "needs a kind"),
        (lambda state: state.kinds.update(q="replicated"), "every kind a section"),
        (lambda state: (state.sections.update(rng={}), state.kinds.update(rng="per_worker")), "'rng'"),
        (lambda state: (state.sections.update({"a|b": {}}), state.kinds.update({"a|b": "per_worker"})), "a|b"),
        (lambda state: state.segments.update(w=Segment("v", 0, 2)), "another name"),
        (lambda state: state.segments.update(w=Segment("w", -1, 2)), "below zero"),
        (lambda state: state.numbers.update(tokens=float("nan")), "nan"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_its_name(
    change: Callable[[RankState], object], message: str
) -> None:
    state = RankState({"w": Segment("w", 0, 2)}, {"p": {"w": torch.zeros(2)}}, {"p": "replicated"}, {"step": 1})
    change(state)
    with pytest.raises(CheckpointError, match=message.replace("|", r"\|")):
        state.validate()


@pytest.mark.parametrize("place", [(2, 2, 0, 1), (0, 1, 1, 1), (-1, 1, 0, 1), (0, 0, 0, 0)])
def test_a_place_outside_the_mesh_is_refused(place: tuple[int, int, int, int]) -> None:
    with pytest.raises(CheckpointError, match="no place in a mesh"):
        Placement(*place)
