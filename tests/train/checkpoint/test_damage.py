"""A damaged checkpoint is never loaded; the next older one is. Another model's is refused with the differences."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.comm.layout import Segment
from dtrain.errors import CheckpointError, ResumeError
from dtrain.train.checkpoint import Placement, RankState, export, full_parameters, load, newest, read_manifest, verify
from dtrain.train.checkpoint.manifest import MANIFEST, _seal
from dtrain.train.checkpoint.read import _mean
from dtrain.train.checkpoint.write import PartMissing
from tests.fakes.checkpoint_threads import write_each, write_together

Save = Callable[..., Path]

FILE = "rank-00002.safetensors"
SHAPES = {"a.weight": (3, 2), "b.bias": (5,)}
WHOLE = {"a.weight": Segment("a.weight", 0, 6), "b.bias": Segment("b.bias", 0, 5)}
ALONE = Placement(0, 1, 0, 1)


def truncate(path: Path) -> None:
    with (path / FILE).open("r+b") as file:
        file.truncate((path / FILE).stat().st_size - 1)


def flip(path: Path, name: str = FILE, at: int = -1) -> None:
    content = bytearray((path / name).read_bytes())
    content[at] ^= 1
    (path / name).write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated file": truncate,
    "flipped byte in a tensor": flip,
    "flipped byte in a header": lambda path: flip(path, at=20),
    "missing rank file": lambda path: (path / FILE).unlink(),
    "missing manifest": lambda path: (path / MANIFEST).unlink(),
    "truncated manifest": lambda path: (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes()[:-9]),
    "flipped byte in the manifest": lambda path: flip(path, MANIFEST, at=40),
    "empty manifest": lambda path: (path / MANIFEST).write_text(""),
    "manifest of another kind": lambda path: (path / MANIFEST).write_text(_seal({"format": 1})),
    "manifest that lists too few files": lambda path: drop_a_file(path),
}


def drop_a_file(path: Path) -> None:
    body = json.loads((path / MANIFEST).read_text())
    del body["files"][-1], body["crc32_of_the_rest"]
    (path / MANIFEST).write_text(_seal(body))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_newest_is_set_aside_with_a_warning_and_the_next_older_taken(
    damage: Callable[[Path], object], save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(1), save(2)
    damage(newer)
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == older
    assert newer.exists() and f"DAMAGED CHECKPOINT {newer}" in caplog.text and "skipped" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path, set_aside=True) == older
    assert not newer.exists() and (tmp_path / f"{newer.name}.corrupt-0").is_dir()
    assert f"DAMAGED CHECKPOINT {newer}" in caplog.text and "corrupt-0" in caplog.text
    caplog.clear()
    assert newest(tmp_path) == older and caplog.text == ""
    damage(save(2))
    assert newest(tmp_path, set_aside=True) == older
    assert (tmp_path / f"{newer.name}.corrupt-1").is_dir()


def test_without_crc_only_names_and_sizes_count(save: Save, tmp_path: Path) -> None:
    save(1)
    newer = save(2)
    flip(newer)
    assert newest(tmp_path, crc=False) == newer
    truncate(newer)
    assert newest(tmp_path, crc=False) != newer


def test_nothing_intact_is_none_and_an_error_in_the_log(
    save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest(tmp_path) is None and newest(tmp_path / "nowhere", set_aside=True) is None
    assert caplog.text == ""
    truncate(save(1))
    assert newest(tmp_path) is None
    assert "no intact checkpoint is left" in caplog.text


def test_latest_is_for_people_and_believed_by_nobody(save: Save, tmp_path: Path) -> None:
    save(1)
    newer = save(2)
    assert (tmp_path / "latest").read_text().strip() == newer.name
    (tmp_path / "latest").write_text("step-0000000009")
    assert newest(tmp_path) == newer
    (tmp_path / "latest").unlink()
    assert newest(tmp_path) == newer


def test_verify_and_load_name_the_damaged_file(save: Save) -> None:
    path = save(1)
    assert verify(path).step == 1
    flip(path)
    with pytest.raises(CheckpointError, match=rf"{FILE}.*CRC"):
        verify(path)
    truncate(path)
    with pytest.raises(CheckpointError, match=rf"{FILE}.*bytes"):
        load(path, place=ALONE, segments=WHOLE, shapes=SHAPES)
    (path / FILE).unlink()
    with pytest.raises(CheckpointError, match=FILE):
        load(path, place=ALONE, segments=WHOLE, shapes=SHAPES)
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path, place=ALONE, segments=WHOLE, shapes=SHAPES)


def test_a_header_that_is_no_safetensors_is_damage(save: Save) -> None:
    path = save(1)
    size = (path / FILE).stat().st_size
    (path / FILE).write_bytes(b"\xff" * size)
    with pytest.raises(CheckpointError, match=FILE):
        load(path, place=ALONE, segments=WHOLE, shapes=SHAPES)


def test_a_checkpoint_of_format_1_is_read_with_its_floats(save: Save) -> None:
    path = save(1)
    body = json.loads((path / MANIFEST).read_text())
    del body["crc32_of_the_rest"]
    for file in body["files"]:
        file["integers"] = file.pop("numbers") | {"part.0.scalar": 4609434218613702656, "part.0.captured": -1}
    (path / MANIFEST).write_text(_seal({**body, "format": 1}))
    assert read_manifest(path).files[0].numbers == {"step": 1, "part.0.scalar": 1.5, "part.0.captured": -1}
    verify(path)


def _other_section(body: dict[str, Any]) -> None:
    file = body["files"][3]
    del file["kinds"]["parameters"]
    file["sections"]["parameters"]["c"] = ["float32", 1]


def _no_dim(body: dict[str, Any]) -> None:
    for file in body["files"][2:]:
        file["sections"]["parameters"]["a.weight"][1] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_section, "ranks 0 and 3 list different sections"),
        (_no_dim, "disagree about dtype or 0-dim of 'a.weight'"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    save: Save, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = save(1)
    body = json.loads((path / MANIFEST).read_text())
    del body["crc32_of_the_rest"]
    change(body)
    (path / MANIFEST).write_text(_seal(body))
    with pytest.raises(CheckpointError, match=message):
        load(path, place=ALONE, segments=WHOLE, shapes=SHAPES)


def test_buffers_of_different_shapes_have_no_mean() -> None:
    with pytest.raises(CheckpointError, match=r"shape \(5,\), another \(3,\)"):
        _mean(iter([torch.zeros(5), torch.zeros(3)]))


def test_an_unknown_format_is_refused_and_left_alone(save: Save, tmp_path: Path) -> None:
    save(1)
    path = save(2)
    body = json.loads((path / MANIFEST).read_text())
    del body["crc32_of_the_rest"]
    (path / MANIFEST).write_text(_seal({**body, "format": 99}))
    for read in (
        lambda: newest(tmp_path, set_aside=True),
        lambda: load(path, place=ALONE, segments=WHOLE, shapes=SHAPES),
    ):
        with pytest.raises(ResumeError, match="format 99"):
            read()
    assert path.is_dir()


def test_another_model_is_refused_with_the_first_differences(save: Save) -> None:
    path = save(1)
    shapes = {"a.weight": (2, 3), "c.weight": (4,)}
    with pytest.raises(ResumeError) as refused:
        load(path, place=ALONE, segments={}, shapes=shapes)
    message = str(refused.value)
    assert "1 missing" in message and "c.weight" in message
    assert "1 unexpected" in message and "b.bias" in message
    assert "a.weight is (3, 2) in the checkpoint and (2, 3) in the model" in message
    assert refused.value.exit_code == 2
    with pytest.raises(ResumeError, match=r"30 missing.*x00, x01, x02, x03, x04, \.\.\."):
        load(path, place=ALONE, segments={}, shapes={**SHAPES, **{f"x{n:02d}": (1,) for n in range(30)}})


@pytest.mark.parametrize("segment", [Segment("a.weight", 4, 3), Segment("z", 0, 1)])
def test_segments_outside_the_model_are_refused(segment: Segment, save: Save) -> None:
    with pytest.raises(CheckpointError, match=segment.fqn):
        load(save(1), place=ALONE, segments={segment.fqn: segment}, shapes=SHAPES)


def one(start: int, stop: int, **more: dict[str, torch.Tensor]) -> RankState:
    return RankState(
        {"w": Segment("w", start, stop - start)},
        {"p": {"w": torch.zeros(stop - start)}, **more},
        dict.fromkeys(["p", *more], "per_worker"),
    )


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([one(0, 2), one(3, 5)], r"'p', 'w', replica 0: no rank holds the element 2"),
        ([one(0, 2), one(2, 4)], r"no rank holds the element 4"),
        ([one(0, 2), one(2, 5, q={"w": torch.zeros(3)})], "different sections"),
        ([one(0, 2, q={"w": torch.zeros(2)}), one(2, 5, q={"w": torch.zeros(())})], "disagree"),
        ([one(0, 2, q={"w": torch.zeros(2)}), one(2, 5, q={"w": torch.zeros(3).bool()})], "disagree"),
        ([one(0, 2), one(2, 6)], "beyond its shape"),
    ],
)
def test_pieces_that_do_not_make_whole_parameters_are_not_committed(
    states: list[RankState], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_together(tmp_path, step=1, states=states, shards=2, shapes={"w": (5,)})
    assert newest(tmp_path) is None
    path = write_together(tmp_path, step=1, states=[one(0, 2), one(2, 5)], shards=2, shapes={"w": (5,)})
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == [path.name]


@pytest.mark.parametrize("bad", [{0}, {1}, {3}, {1, 2}, {0, 3}])
def test_each_rank_raises_its_own_error_and_rank_0_that_nothing_is_committed(bad: set[int], tmp_path: Path) -> None:
    good = [one(0, 2), one(2, 5)] * 2
    states = [
        one(rank + 4, rank + 8) if rank in bad else state for rank, state in enumerate(good)
    ]  # each bad one names another end, so that its error is known by it
    ended = write_each(tmp_path, step=1, states=states, shards=2, shapes={"w": (5,)})
    for rank, end in enumerate(ended):
        if rank in bad:
            assert isinstance(end, CheckpointError) and f"[{rank + 4}, {rank + 8}) of 'w' ends beyond" in str(end)
        elif rank == 0:
            assert isinstance(end, PartMissing) and f"rank {min(bad)} has not written its part" in str(end)
        else:
            assert end == tmp_path / "step-0000000001"
    with pytest.raises(CheckpointError, match=rf"\[{min(bad) + 4}, {min(bad) + 8}\)"):
        write_together(tmp_path, step=1, states=states, shards=2, shapes={"w": (5,)})
    assert newest(tmp_path) is None


def test_a_folder_that_cannot_be_made_is_rank_0s_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_together(tmp_path / "file", step=1, states=[one(0, 2), one(2, 5)], shards=2, shapes={"w": (5,)})


def test_meta_that_json_cannot_hold_is_not_committed_and_no_rank_hangs(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_together(
            tmp_path, step=1, states=[one(0, 2), one(2, 5)], shards=2, shapes={"w": (5,)}, meta={"model": object()}
        )
    assert newest(tmp_path) is None


def test_meta_comes_back(tmp_path: Path) -> None:
    meta = {"model": "tiny", "width": 8, "betas": (0.9, 0.95), "nested": {"b": None, "a": True}}
    path = write_together(tmp_path, step=3, states=[one(0, 5)], shards=1, shapes={"w": (5,)}, meta=meta)
    manifest = read_manifest(path)
    assert manifest.meta == {**meta, "betas": [0.9, 0.95]}
    assert (manifest.step, manifest.mesh, manifest.shapes) == (3, (1, 1), {"w": (5,)})


def test_a_section_that_some_replicas_lack_is_kept_as_it_is_but_has_no_mean(tmp_path: Path) -> None:
    states = [one(0, 5, q={"w": torch.ones(5)}), one(0, 5, q={})]
    path = write_together(tmp_path, step=1, states=states, shards=1, shapes={"w": (5,)})
    segments = {"w": Segment("w", 1, 2)}
    assert load(path, place=Placement(1, 2, 0, 1), segments=segments, shapes={"w": (5,)}).sections["q"] == {}
    assert load(path, place=Placement(0, 2, 0, 1), segments=segments, shapes={"w": (5,)}).sections["q"]["w"].sum() == 2
    with pytest.raises(CheckpointError, match="1 of 2 replicas"):
        load(path, place=ALONE, segments=segments, shapes={"w": (5,)})


def test_export_takes_the_anchor_and_else_the_parameters(save: Save, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plain, anchored = save(1), save(2, anchor=True)
    assert full_parameters(plain)["b.bias"].tolist() == [100.0, 101.0, 102.0, 103.0, 104.0]
    assert full_parameters(anchored)["b.bias"].tolist() == [-200.0, -199.0, -198.0, -197.0, -196.0]
    assert full_parameters(anchored, "parameters")["a.weight"].tolist() == [[200, 201], [202, 203], [204, 205]]
    digests = [export(path, tmp_path / "out" / "model.safetensors") for path in (plain, anchored)]
    assert len(set(digests)) == 2
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {**SHAPES, "bn.mean": (1,)}
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    with pytest.raises(CheckpointError, match=r"sync\.anchor"):
        full_parameters(plain, "sync.anchor")
