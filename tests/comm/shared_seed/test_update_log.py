"""The log of a run: replay to the bit from anywhere, what a crash leaves, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dtrain.cli.main import main
from dtrain.comm.layout import Segment, even_slice
from dtrain.comm.shared_seed.digest import partial, unsigned
from dtrain.comm.shared_seed.directions import CHUNK, Step, Walk, scales, walk_on
from dtrain.comm.shared_seed.replay import replay
from dtrain.comm.shared_seed.update_log import Header, LogError, Record, UpdateLog, read, to_bytes

SHAPES = {"w": (13, 31), "b": (7,), "long": (CHUNK + 300,)}
SEGMENTS = {fqn: Segment(fqn, 0, torch.Size(shape).numel()) for fqn, shape in SHAPES.items()}
WALK = Walk(key=77, samples=2)


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {fqn: torch.randn(segment.numel, generator=generator) for fqn, segment in SEGMENTS.items()}


FEW = {fqn: value[:500] for fqn, value in weights().items()}


def steps(count: int, first: int = 0) -> list[Step]:
    """Three machines, of which the second leaves after two steps."""
    return [
        Step(n, int(n >= 2), (0, 1, 5) if n < 2 else (0, 5), 0.1 / (1 + n), 0.01 * (n % 2), bytes(
            (37 * n + 11 * i) % 256 for i in range(2 * (3 if n < 2 else 2))
        ))
        for n in range(first, first + count)
    ]  # fmt: skip


def digest(values: dict[str, Tensor], segments: dict[str, Segment] = SEGMENTS) -> int:
    return unsigned(partial(values, segments))


def header() -> Header:
    return Header(WALK, SHAPES, digest(weights()))


def written(path: Path, count: int = 5) -> dict[str, Tensor]:
    values = weights()
    with UpdateLog(path, header()) as log:
        for step in steps(count):
            walk_on(values, SEGMENTS, WALK, step)
            log.append(Record(step, digest(values)))
    return values


def test_replay_from_the_start_and_from_any_snapshot_is_the_run_to_the_bit(tmp_path: Path) -> None:
    ended = written(tmp_path / "log")
    found = read(tmp_path / "log")
    assert found.header == header() and found.torn_bytes == 0
    values, snapshot = weights(), weights()
    for record in found.records:
        walk_on(values, SEGMENTS, found.header.walk, record.step)
        assert digest(values) == record.digest
        if record.step.number < 2:
            walk_on(snapshot, SEGMENTS, found.header.walk, record.step)
    for record in found.records[2:]:
        walk_on(snapshot, SEGMENTS, found.header.walk, record.step)
    assert all(torch.equal(values[fqn], ended[fqn]) and torch.equal(snapshot[fqn], ended[fqn]) for fqn in ended)


@pytest.mark.parametrize("noise", ["signs", "normal"])
@pytest.mark.parametrize("ways", [2, 3, 7])
def test_shards_walk_as_the_whole_does(noise: str, ways: int) -> None:
    walk, step, whole = replace(WALK, noise=noise), steps(1)[0], weights()  # type: ignore[arg-type]
    pieces = []
    for part in range(ways):
        segments = {fqn: even_slice(fqn, whole[fqn].numel(), part=part, parts=ways) for fqn in whole}
        pieces.append((segments, {fqn: whole[fqn][s.offset : s.stop].clone() for fqn, s in segments.items()}))
    walk_on(whole, SEGMENTS, walk, step)
    for segments, values in pieces:
        walk_on(values, segments, walk, step)
    for fqn, value in whole.items():
        assert torch.equal(torch.cat([values[fqn] for _, values in pieces]), value)
    assert unsigned(sum((partial(values, s) for s, values in pieces), torch.zeros(1, dtype=torch.int64))) == digest(
        whole
    )


@given(st.sampled_from(list(SHAPES)), st.integers(0, 10**6), st.integers(0, 31))
def test_the_digest_sees_every_bit_of_every_element(fqn: str, at: int, bit: int) -> None:
    values = {name: value.clone() for name, value in FEW.items()}
    segments = {name: Segment(name, 0, value.numel()) for name, value in values.items()}
    before = digest(values, segments)
    values[fqn].view(torch.int32)[at % values[fqn].numel()] ^= -(2**31) if bit == 31 else 1 << bit
    assert digest(values, segments) != before


def test_the_digest_knows_where_a_value_is() -> None:
    swapped = weights()
    swapped["w"][[3, 4]] = swapped["w"][[4, 3]]
    renamed = {"v": weights()["w"]}
    assert digest(swapped) != digest(weights())
    assert digest(renamed, {"v": Segment("v", 0, 403)}) != digest({"w": renamed["v"]})


def test_a_crash_in_the_last_record_costs_that_record_only(tmp_path: Path) -> None:
    written(tmp_path / "log")
    data = (tmp_path / "log").read_bytes()
    whole = read(tmp_path / "log").records
    for cut in range(1, 60):
        (tmp_path / "torn").write_bytes(data[:-cut])
        found = read(tmp_path / "torn")
        assert found.records == whole[: len(found.records)] and len(found.records) >= 3
        with UpdateLog(tmp_path / "torn", header()) as log:
            for step in steps(5)[len(log.records) :]:
                log.append(Record(step, whole[step.number].digest))
        assert (tmp_path / "torn").read_bytes() == data


@given(st.data())
def test_a_byte_that_is_damaged_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    with UpdateLog(path, header()) as log:
        for step in steps(5):
            log.append(Record(step, 1))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(LogError):
        read(path)


def test_a_log_of_something_else_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "log")
    for other, words in [
        (
            replace(header(), first=5),
            "is the log of another run: its first weights' digest is [0-9a-f]{16}, .* another folder",
        ),
        (replace(header(), walk=replace(WALK, key=78)), "is the log of another run: its walk"),
        (replace(header(), shapes={**SHAPES, "b": (8,)}), r"another model: b has the shape \(7,\) there and \(8,\)"),
    ]:
        with pytest.raises(LogError, match=words):
            UpdateLog(tmp_path / "log", other)
    for other, words in [
        (replace(header(), generator="mt19937"), "its generator is 'mt19937'"),
        (replace(header(), golden="00"), "its generator's numbers is '00'"),
        (replace(header(), code="floats"), "its code is 'floats'"),
    ]:
        (tmp_path / "other").unlink(missing_ok=True)
        UpdateLog(tmp_path / "other", other).close()
        with pytest.raises(LogError, match=words):
            read(tmp_path / "other")
    (tmp_path / "text").write_text("no log at all")
    with pytest.raises(LogError, match="no update log"):
        read(tmp_path / "text")


def test_steps_come_one_after_the_other(tmp_path: Path) -> None:
    written(tmp_path / "log", 3)
    with UpdateLog(tmp_path / "log", header()) as log, pytest.raises(ValueError, match="step 2 is not behind step 2"):
        log.append(Record(steps(3)[2]))


def test_a_run_that_goes_on_within_its_log_leaves_the_rest_of_it_beside(tmp_path: Path) -> None:
    """A death behind the last checkpoint, or another branch from it."""
    first = written(tmp_path / "first", 1)
    written(tmp_path / "log", 3)
    before = (tmp_path / "log").read_bytes()
    for number in (1, 2):
        with UpdateLog(tmp_path / "log", header()) as log:
            with pytest.warns(RuntimeWarning, match=f"ends at step 2 .* on at step 1 with .*log.{number}"):
                log.go_on(1, start=digest(first))
            log.append(Record(steps(2)[1]))
            log.append(Record(steps(3)[2], digest=number))
            assert [record.step.number for record in log.tail(1)] == [1, 2]
    assert (tmp_path / "log.1").read_bytes() == before
    assert [record.step.number for record in read(tmp_path / "log").records] == [0, 1, 2]
    assert read(tmp_path / "log").header == header()


def test_a_branch_does_not_go_on_behind_another_one_that_is_as_long(tmp_path: Path) -> None:
    one = written(tmp_path / "log", 3)
    with UpdateLog(tmp_path / "log", header()) as log:
        with pytest.warns(RuntimeWarning, match="ends at step 2 with the weights .* on at step 3 with 0+5"):
            log.go_on(3, start=5)
        log.append(Record(steps(1, first=3)[0]))
    assert read(tmp_path / "log").header == replace(header(), start=5)
    with UpdateLog(tmp_path / "log.1", header()) as log:
        log.go_on(3, start=digest(one))
        assert len(log.records) == 3
    with UpdateLog(tmp_path / "log", header()) as log:  # and now from the beginning: of the run's first weights
        with pytest.warns(RuntimeWarning, match="begins again at step 0"):
            log.append(Record(steps(1)[0]))
        assert log.header == header()


def test_a_run_that_begins_again_leaves_its_old_log_as_it_was(tmp_path: Path) -> None:
    written(tmp_path / "log", 3)
    before = (tmp_path / "log").read_bytes()
    for number in (1, 2):
        with UpdateLog(tmp_path / "log", header()) as log:
            with pytest.warns(RuntimeWarning, match=f"begins again at step 0; it is kept as .*log.{number}"):
                log.append(Record(steps(1)[0]))
            with pytest.raises(ValueError, match="step 0 is not behind step 0"):
                log.append(Record(steps(1)[0]))
    assert (tmp_path / "log.1").read_bytes() == before
    assert len(read(tmp_path / "log.2").records) == len(read(tmp_path / "log").records) == 1


def test_a_run_that_goes_on_behind_the_end_of_its_log_begins_another_one(tmp_path: Path) -> None:
    later, end = written(tmp_path / "log", 3), written(tmp_path / "whole", 5)
    for values in (later, end):
        walk_on(values, SEGMENTS, WALK, steps(1, first=5)[0])
    with UpdateLog(tmp_path / "log", header()) as log:
        with pytest.warns(RuntimeWarning, match="it ends at step 2 .* the run goes on at step 5"):
            log.go_on(5, digest(weights()))
        log.append(Record(steps(1, first=5)[0]))
    with UpdateLog(tmp_path / "log", header()) as log:  # of the same run still
        log.go_on(6, 0)
        assert log.header.start == digest(weights())
    _, first, taken = replay(read(tmp_path / "log"), {fqn: v.view(SHAPES[fqn]) for fqn, v in weights().items()})
    assert (first, taken) == (5, 6)
    with pytest.raises(LogError, match="give those before step 5, with which it begins"):
        replay(read(tmp_path / "log"), {fqn: v.view(SHAPES[fqn]) for fqn, v in end.items()})


def test_records_that_were_cut_out_are_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end = {fqn: value.view(SHAPES[fqn]) for fqn, value in written(tmp_path / "log", 8).items()}
    first = {fqn: value.view(SHAPES[fqn]) for fqn, value in weights().items()}
    save_file(first, tmp_path / "first")
    save_file(end, tmp_path / "end")
    whole, verify = read(tmp_path / "log"), ["log", "verify", f"{tmp_path / 'log'}", "--weights"]
    assert whole.gaps() == [] and main([*verify, f"{tmp_path / 'first'}"]) == 0
    assert main([*verify, f"{tmp_path / 'end'}"]) == 1
    assert "nothing was replayed: " in capsys.readouterr().err
    for lost in ([3, 4], [0], [0, 1, 5]):
        kept = [replace(record, digest=0) for record in whole.records if record.step.number not in lost]
        with UpdateLog(tmp_path / f"cut{len(lost)}", header()) as log:
            log.append(replace(kept[0], digest=1))
        path = tmp_path / f"cut{len(lost)}"
        header_bytes = path.read_bytes()[: -len(to_bytes([replace(kept[0], digest=1)]))]
        path.write_bytes(header_bytes + to_bytes(kept))
        assert main(["log", "verify", str(path)]) == 1
        assert f"the records of steps {lost[0]} to " in capsys.readouterr().err
        with pytest.raises(LogError, match="are missing"):
            replay(read(path), first)


# --- what machines found, and what becomes of it ----------------------------------------------------------------------


def scale_of(walk: Walk, codes: bytes, workers: tuple[int, ...] = (0, 1, 2)) -> list[float]:
    return [scale for _, _, scale in scales(walk, Step(0, 0, workers, 1.0, 0.0, codes))]


def test_common_directions_have_rules() -> None:
    one, four, big = 64, 72, 127  # 1, 4 and the largest
    common = Walk(key=1, seeds="common")
    assert scale_of(common, bytes([one, one, four])) == [-2.0]
    assert scale_of(replace(common, rule="median"), bytes([one, big, four])) == [-4.0]
    assert scale_of(replace(common, rule="trimmed_mean"), bytes([one, big, 0x80 | big])) == [-1.0]
    assert scale_of(replace(common, rule="majority"), bytes([one, four, 0x80 | big])) == pytest.approx([-1 / 3])
    with pytest.raises(ValueError, match="leaves nothing of 2 replicas"):
        scale_of(replace(common, rule="trimmed_mean"), bytes([one, one]), (0, 1))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="only a mean makes sense"):
        Walk(key=1, rule="median")
    with pytest.raises(ValueError, match="at least one direction"):
        Walk(key=1, samples=0)
    with pytest.raises(ValueError, match="ascending order"):
        Step(0, 0, (1, 1), 0.1, 0.0, b"12")
    with pytest.raises(ValueError, match="not as many of each"):
        Step(0, 0, (0, 1), 0.1, 0.0, b"123")
    with pytest.raises(ValueError, match="where each sends 2"):
        list(scales(WALK, Step(0, 0, (0, 1), 0.1, 0.0, b"12")))
