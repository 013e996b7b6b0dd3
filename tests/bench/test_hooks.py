"""`dtrain bench hooks`: every hook between real ranks, each first exchange held to what one process makes of it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtrain import every_step
from dtrain.bench import hook_rows
from dtrain.bench.hook_rows import HookRow
from dtrain.bench.hooks import AS_ALL_REDUCE, GROUPS, HOOKS, OURS, SPARSE, SUMMABLE, TORCH, gradient
from dtrain.bench.rows import read_as
from dtrain.cli.main import main
from dtrain.comm.methods.every_step import EveryStep
from dtrain.train.config import compose, instantiate
from tests.bench.samples import ROW

FIGURES = {name: getattr(ROW, name) for name in ROW.__dataclass_fields__}


def sample(**changes: object) -> HookRow:
    figures = {**FIGURES, "wire_bytes": 375_000, "error": 1e-3, "encode": 0.25, "exchange": 0.5, "decode": 0.25}
    return HookRow(**{**figures, **changes})


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_hooks_are_right_between_real_ranks(tmp_path: Path) -> None:
    names = (
        "torch.all_reduce",
        "torch.bf16",
        "torch.powersgd",
        "none",
        "int4_ef",
        "topk_ef21",
        "topk_ef:all_gather",
        "topk_int4_ef:sparse_all_reduce",
        "powersgd_ef:all_reduce",
    )
    words = ("launcher.workers=3", "bench.min_bytes=6K", "bench.max_bytes=6K", "bench.iterations=3")
    command = [sys.executable, "-m", "dtrain", "bench", "hooks", *words, f"bench.ops={','.join(names)}"]
    done = subprocess.run([*command, f"run.dir={tmp_path}"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row.op: row for row in read_as(tmp_path / "rows.jsonl", HookRow)}
    assert list(rows) == [name for name in names if name != "torch.bf16"]
    assert "torch.bf16 runs over NCCL only" in done.stdout
    assert all(row.wrong == 0 and row.world == 3 and row.iterations == 3 for row in rows.values())
    assert rows["none"].wire_bytes == pytest.approx(rows["none"].optimal_bytes, rel=0.01)
    assert rows["none"].error < 1e-6 < rows["int4_ef"].error < 1 and rows["int4_ef"].less > 5
    for name in names[3:]:
        row = rows[name]
        assert row.encode + row.exchange + row.decode == pytest.approx(1.0)


def test_the_line_of_a_row_is_relative_to_the_plain_all_reduce_of_its_size() -> None:
    plain = sample(op="torch.all_reduce", p50_ms=100.0)
    other = sample(op="torch.all_reduce", p50_ms=1.0, bytes=4)
    mine = sample(op="int8_ef", p50_ms=25.0)
    line = hook_rows.line(mine, [plain, other, mine])
    assert " 4.00x " in line and " 4.0x " in line and " 25% " in line and "INVALID" not in line
    assert len(line) == len(hook_rows.HEAD)
    assert " - " in hook_rows.line(mine, [other, mine])


def test_a_summary_tells_what_is_wrong() -> None:
    told = "\n".join(hook_rows.summary([sample(wrong=3), sample(invalid="busy", interface="lo")]))
    assert "3 values were WRONG" in told and "1 of 2 rows are INVALID" in told and "no link" in told
    assert hook_rows.summary([]) == ["no row was finished"]


@pytest.mark.slow
def test_what_an_all_reduce_can_carry_is_offered_there() -> None:
    assert {name.removesuffix(AS_ALL_REDUCE) for name in OURS if name.endswith(AS_ALL_REDUCE)} == set(SUMMABLE)
    for name in (name for name in OURS if ":" not in name):
        spec = {**compose(["sync=every_step", f"compress={name}"]).sync, "route": "all_reduce"}
        if name in SUMMABLE:
            assert isinstance(instantiate(spec, "sync"), EveryStep)
        elif not name.startswith(("lgreco_powersgd", "accordion")):
            with pytest.raises(Exception, match="all-reduce"):
                instantiate(spec, "sync")
        of_their_own = {"two_phase", "all_gather", "sparse_all_reduce"} if name in SPARSE else set()
        assert {op.partition(":")[2] for op in OURS if op.startswith(f"{name}:")} - {"all_reduce"} == of_their_own
        with contextlib.nullcontext() if name in SPARSE else pytest.raises(Exception, match=r"sparse|refused"):
            instantiate({**spec, "route": "sparse_all_reduce"}, "sync")
    assert GROUPS["all"] == HOOKS == (*TORCH, *OURS)
    assert every_step(route="all_reduce").route == "all_reduce"


def test_a_gradient_is_a_function_of_its_rank() -> None:
    one, same, other = (gradient(rank, 1000, torch.device("cpu")) for rank in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.dim() == 2 and 900 < one.numel() <= 1000 and 0.2 < one.shape[0] / one.shape[1] < 5


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("bench.ops=int9_ef", "there is nothing called int9_ef to measure; did you mean int8_ef"),
        ("bench.dtype=bfloat16", "in fp32"),
        ("bench.transport=mpi", "leave both settings out"),
        ("train.steps=3", "bench takes bench.KEY"),
    ],
)
def test_bad_settings_are_refused(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "hooks", word]) == 2
    assert said in capsys.readouterr().err
