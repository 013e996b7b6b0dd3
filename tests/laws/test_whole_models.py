"""Models of transformers from a folder: on all engines alike, adapters alone where asked, resumed to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import dtrain
from dtrain.testing import WorkerPool
from dtrain.train.checkpoint.weights import weights_of
from dtrain.train.config import compose, to_yaml
from dtrain.train.config.validation import validate
from tests.hf_models import tiny_gpt2, tiny_llama
from tests.laws.jobs import ENGINES, Finished, train_once
from tests.sync_words import sync_words

pytest.importorskip("peft")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

FEW = (
    "model=hf", "data.block=32", "train.batch_size=8", "train.steps=8", "train.log_every_steps=1",
    "train.evaluation_examples=8", "train.evaluate_every_steps=0", "train.checkpoint_every_steps=0",
    "optim.warmup_steps=2", "optim.inner.lr=0.003", "engine.bucket_mib=0.08",
)  # fmt: skip
LORA = ("model.lora.rank=4", "model.lora.targets=[q_proj,v_proj]")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("gpt2"))


def run(
    pool: WorkerPool, folder: Path, text: Path, model: Path, engine: str, sync: str, *words: str,
    mesh: Sequence[int] = (2, 2),
) -> Finished:  # fmt: skip
    replicas, shards = mesh
    group = [f"mesh.replicate={replicas}", f"mesh.shard={shards}", f"launcher.workers={replicas * shards}"]
    extra = ["sync.every_steps=4"] if sync == "diloco" else []
    chosen = [f"engine={engine}", *sync_words(sync), f"run.dir={folder}", f"data.path={text}", *group, *FEW, *extra]
    config = compose([*chosen, f"model.path={model}", *words])
    validate(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    return Finished(folder, pool.run(train_once, config, world=replicas * shards))


@pytest.mark.parametrize("sync", ["int8_ef", "diloco"])
def test_every_engine_trains_the_same_model(
    sync: str, pool: WorkerPool, text: Path, llama: Path, tmp_path: Path
) -> None:
    """Weights of the folder, tied embeddings: one parameter for both ends."""
    runs = {engine: run(pool, tmp_path / engine, text, llama, engine, sync) for engine in ENGINES}
    reference = runs["ddp"]
    assert reference.losses[8] < reference.losses[1] - 0.1
    for engine, found in runs.items():
        assert found.losses == pytest.approx(reference.losses, rel=1e-4), engine
        assert found.summary["validation_loss"] == pytest.approx(reference.summary["validation_loss"], rel=1e-3)
    exported = weights_of(runs["zero3"].folder)
    assert "lm.lm_head.weight" not in exported and "lm.model.embed_tokens.weight" in exported
    loaded = dtrain.load(runs["zero3"].folder)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in loaded.named_parameters())


def test_adapters_alone_are_sent_and_kept_on_every_engine(
    pool: WorkerPool, text: Path, llama: Path, tmp_path: Path
) -> None:
    runs = {engine: run(pool, tmp_path / engine, text, llama, engine, "int8_ef", *LORA) for engine in ENGINES}
    reference = runs["ddp"]
    elements = 2 * (4 * 32 + 32 * 4 + 4 * 32 + 16 * 4)  # two layers; the values have 16 rows
    assert reference.losses[8] < reference.losses[1]
    for engine, found in runs.items():
        assert found.losses == pytest.approx(reference.losses, rel=1e-3), engine
        assert found.summary["dense_bytes_per_rank"] == 8 * 4 * elements // 2, engine
        exported = weights_of(found.folder)
        assert all(".lora_" in name for name in exported), engine
        assert sum(tensor.numel() for tensor in exported.values()) == elements, engine


@pytest.mark.parametrize(
    ("engine", "sync", "lora"), [("fsdp", "diloco", True), ("ddp", "int8_ef", False), ("zero2", "diloco", False)]
)
def test_a_resumed_run_never_stopped(
    engine: str, sync: str, lora: bool, pool: WorkerPool, text: Path, gpt2: Path, tmp_path: Path
) -> None:
    """With dropout, and in the middle of a round; adapters on another engine's mesh, too."""
    words = ["model.lora.rank=4"] if lora else []
    whole = run(pool, tmp_path / "whole", text, gpt2, engine, sync, *words)
    run(pool, tmp_path / "parts", text, gpt2, engine, sync, *words, "train.stop_after_steps=6")
    parts = run(pool, tmp_path / "parts", text, gpt2, engine, sync, *words)
    assert parts.losses == whole.losses and parts.digest == whole.digest


def test_a_base_that_has_changed_is_not_resumed_from(pool: WorkerPool, text: Path, llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    words = [*LORA, "train.stop_after_steps=2"]
    run(pool, tmp_path / "run", text, base, "ddp", "int8_ef", *words, mesh=(2, 1))
    stored = load_file(base / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in stored.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="the frozen weights have changed since the run was launched"):
        run(pool, tmp_path / "run", text, base, "ddp", "int8_ef", *LORA, mesh=(2, 1))


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_bf16_and_recomputed_activations(
    engine: str, pool: WorkerPool, text: Path, llama: Path, tmp_path: Path
) -> None:
    words = ["engine.precision=bf16", "engine.activation_checkpointing=true", "train.steps=4"]
    found = run(pool, tmp_path, text, llama, engine, "int8_ef", *words)
    assert found.losses[4] < found.losses[1] and found.summary["skipped_steps"] == 0
