"""All engines compute the same, all syncs train, and a run that was stopped is as if it never had been."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dtrain.testing import WorkerPool
from tests.comm.adapters.test_left_open import threads_of_gloo
from tests.laws.conftest import Undisturbed
from tests.laws.jobs import ENGINES, FIFTEEN, run

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

MESHES = [(4, 1), (1, 2), (2, 1)]


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_dense_losses_agree_on_all_engines(undisturbed: Undisturbed, engine: str) -> None:
    reference, losses = undisturbed("ddp", "dense").losses, undisturbed(engine, "dense").losses
    assert len(losses) == 60
    for step in range(1, 51):
        assert losses[step] == pytest.approx(reference[step], rel=1e-5)
    # The norm that clipped each step is the whole model's, however the engine shards it.
    norms = undisturbed("ddp", "dense").gradient_norms
    assert undisturbed(engine, "dense").gradient_norms == pytest.approx(norms, rel=1e-4)
    assert max(norms.values()) > 1.0  # some steps were clipped


@pytest.mark.parametrize(("engine", "sync"), FIFTEEN)
def test_training_lowers_the_loss(undisturbed: Undisturbed, engine: str, sync: str) -> None:
    losses = undisturbed(engine, sync).losses
    assert losses[60] < 0.8 * losses[1]


@pytest.mark.parametrize(("engine", "sync"), FIFTEEN)
def test_stop_and_resume_is_never_stopped(
    undisturbed: Undisturbed, stopped: Undisturbed, pool: WorkerPool, text: Path, engine: str, sync: str
) -> None:
    whole, half = undisturbed(engine, sync), stopped(engine, sync)
    assert half.outcomes[0].reason == "stopped"
    again = run(pool, half.folder, text, engine, sync)
    assert again.losses == whole.losses
    assert again.digest == whole.digest


COMPRESSED = {
    "topk_ef21": ["compress=topk_ef21"],
    "topk_econtrol": ["compress=topk_econtrol"],
    "lgreco_powersgd": ["compress=lgreco_powersgd"],
    "ef21w": [
        "sync.compress={_target_:dtrain.plans.ef21w,compressor:{_target_:dtrain.compress.topk,density:0.05},warmup_steps:12}"
    ],
    "accordion": [  # stopped after 11 steps it has summed the gradients of two
        "sync.compress={_target_:dtrain.plans.accordion,"
        "critical:{_target_:dtrain.compress.error_feedback,compressor:{_target_:dtrain.compress.topk,density:0.2}},"
        "otherwise:{_target_:dtrain.compress.error_feedback,compressor:{_target_:dtrain.compress.topk,density:0.05}},"
        "every:4,accumulate:3}"
    ],
    "onebit_adam": ["sync=onebit_adam", "sync.warmup_steps=6"],
    "dgc": ["sync=dgc", "sync.density=0.05", "sync.warmup_steps=10", "optim=sgd", "optim.inner.momentum=0"],
    "scaffold_m": ["sync=scaffold_m", "sync.every_steps=4", "sync.beta=0.5", "optim=sgd", "optim.inner.momentum=0"],
}


# Elementwise state is cut and put together as that of int8_ef, in the fifteen: one engine of each kind is enough.
ELEMENTWISE = [(e, m) for e in ("fsdp", "zero1") for m in ("topk_ef21", "topk_econtrol", "ef21w", "accordion", "dgc")]
ODD = [(e, m) for e in ENGINES for m in ("lgreco_powersgd", "onebit_adam")]


CORRECTED = [(e, "scaffold_m") for e in ("ddp", "fsdp", "zero3")]


@pytest.mark.parametrize(("engine", "method"), [*ODD, *ELEMENTWISE, *CORRECTED])
def test_every_state_of_a_compression_comes_back(
    pool: WorkerPool, text: Path, tmp_path: Path, engine: str, method: str
) -> None:
    """Factors, estimates, momenta and a plan made after 10 steps; another mesh goes on with what can be translated."""
    chosen = [*COMPRESSED[method], "train.steps=14"]
    whole = run(pool, tmp_path / "whole", text, engine, "every_step", *chosen)
    run(pool, tmp_path / "half", text, engine, "every_step", *chosen, "train.stop_after_steps=11")
    shutil.copytree(tmp_path / "half", tmp_path / "other")
    again = run(pool, tmp_path / "half", text, engine, "every_step", *chosen)
    assert again.losses == whole.losses
    assert again.digest == whole.digest
    other = run(pool, tmp_path / "other", text, engine, "every_step", *chosen, mesh=(4, 1))
    assert other.losses[12] == pytest.approx(whole.losses[12], rel=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_within_a_round_changes_nothing(
    pool: WorkerPool, text: Path, tmp_path: Path, undisturbed: Undisturbed, engine: str
) -> None:
    looked = run(pool, tmp_path / "run", text, engine, "diloco", "train.evaluate_every_steps=7")
    never = undisturbed(engine, "diloco")
    assert looked.losses == never.losses
    assert looked.digest == never.digest


def test_a_run_that_ends_within_a_round_exports_what_it_learned(pool: WorkerPool, text: Path, tmp_path: Path) -> None:
    short = run(pool, tmp_path / "short", text, "fsdp", "diloco", "train.steps=6")
    whole = run(pool, tmp_path / "whole", text, "fsdp", "diloco", "train.steps=6", "sync.every_steps=6")
    assert short.digest == whole.digest


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("engine", "sync"), FIFTEEN)
def test_another_mesh_goes_on_without_a_jump(
    undisturbed: Undisturbed,
    stopped: Undisturbed,
    pool: WorkerPool,
    text: Path,
    engine: str,
    sync: str,
    mesh: tuple[int, int],
) -> None:
    # The global batches are the same on every mesh, so the losses can be compared step by step. What differs: round-off
    # (dense), whose residual is which (int8_ef: the mean is kept), and the replicas' drift (diloco: they are averaged).
    tolerance = {"dense": 1e-4, "int8_ef": 1e-2, "diloco": 5e-2}[sync]
    reference = undisturbed(engine, sync).losses
    half = stopped(engine, sync)
    losses = run(pool, half.folder, text, engine, sync, "train.stop_after_steps=34", mesh=mesh).losses
    for step in range(31, 35):
        assert losses[step] == pytest.approx(reference[step], rel=tolerance)


def test_a_run_goes_on_with_another_engine(
    undisturbed: Undisturbed, stopped: Undisturbed, pool: WorkerPool, text: Path
) -> None:
    reference = undisturbed("zero2", "dense").losses
    half = stopped("zero2", "dense")
    run(pool, half.folder, text, "fsdp", "dense", "train.stop_after_steps=33")
    losses = run(pool, half.folder, text, "zero3", "dense", "train.stop_after_steps=36").losses
    for step in range(31, 37):
        assert losses[step] == pytest.approx(reference[step], rel=1e-4)


# int8_ef asks most of an engine: gradients handed over in another dtype, and state of its own.
BF16 = [*((engine, "int8_ef") for engine in ENGINES), *((e, s) for e in ("fsdp", "zero2") for s in ("dense", "diloco"))]


@pytest.mark.parametrize(("engine", "sync"), BF16)
def test_bf16_accumulation_and_recomputation_train_and_resume(
    pool: WorkerPool, text: Path, tmp_path: Path, engine: str, sync: str
) -> None:
    options = ["engine.precision=bf16", "engine.activation_checkpointing=true", "train.microbatch_size=1"]
    options += ["train.steps=12", "sync.every_steps=4"] if sync == "diloco" else ["train.steps=12"]
    whole = run(pool, tmp_path / "whole", text, engine, sync, *options)
    run(pool, tmp_path / "half", text, engine, sync, *options, "train.stop_after_steps=6")
    again = run(pool, tmp_path / "half", text, engine, sync, *options)
    assert again.losses == whole.losses
    assert again.digest == whole.digest
    assert whole.losses[12] < whole.losses[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_that_trains_again_keeps_no_groups_of_what_has_ended(
    pool: WorkerPool, text: Path, tmp_path: Path, engine: str
) -> None:
    found = []
    for number in range(2):
        run(pool, tmp_path / str(number), text, engine, "dense", "train.steps=2", mesh=(2, 1))
        found.append(pool.run(threads_of_gloo, world=2)[0])
    assert found[0] == found[1]
