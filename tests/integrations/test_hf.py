"""transformers.Trainer with a sync in it: one line, and nothing is lost at a checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from dtrain import diloco, every_step, streaming_diloco
from dtrain.comm.collectives.two_phase import two_phase_bytes
from dtrain.comm.runtime.method import Sync
from dtrain.compress import cast, error_feedback, quantize
from dtrain.inner import chain
from dtrain.integrations._frameworks import require, require_alike
from dtrain.integrations.hf import EXCHANGED, FOLDER, SKIPPED, SyncCallback, sync_with
from dtrain.testing import WorkerPool

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

INT8 = quantize(bits=8, block=16)
METHODS: dict[str, Sync] = {
    "dense": every_step(),
    "int8": every_step(compress=error_feedback(INT8)),
    "diloco": diloco(every_steps=4),
    "streaming": streaming_diloco(every_steps=4, overlap_steps=2, layers_per_fragment=1),
}
STOP, END, LENGTH = 6, 11, 16


def blocks(number: int = 200) -> list[dict[str, Tensor]]:
    """Pieces of the standard library, as bytes."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()[: LENGTH * number]))
    return [{"input_ids": ids, "labels": ids} for ids in text.view(-1, LENGTH)]


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, use_cache=False, **sizes))


@contextmanager
def launched() -> Iterator[None]:
    """As if torchrun had started this process, and Accelerate for the first time."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    os.environ.update(variables)
    disable_progress_bar()
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        for name in variables:
            del os.environ[name]


def made(folder: str, model: nn.Module, *, optimizers: Any = (None, None), **arguments: Any) -> Trainer:
    settings = {"max_steps": END, "learning_rate": 0.02, "per_device_train_batch_size": 4, "logging_steps": 1}
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    trainer = Trainer(
        model,
        TrainingArguments(folder, **{**settings, **fixed, **arguments}),
        train_dataset=blocks(),
        eval_dataset=blocks(8),
        optimizers=optimizers,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def digest(model: nn.Module) -> str:
    return hashlib.blake2b(b"".join(p.detach().float().numpy().tobytes() for p in model.parameters())).hexdigest()


def loss_of_saved(folder: Path) -> float:
    """Of the model that the trainer has saved there, over the data that it evaluates with."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    batch = torch.stack([block["input_ids"] for block in blocks(8)])
    with torch.no_grad():
        return float(model(input_ids=batch, labels=batch).loss)


# ---- resumed, bitwise ------------------------------------------------------------------------------------------------


def plain_model(seed: int) -> tuple[nn.Module, Any]:
    return llama(seed), (None, None)


def with_lora(seed: int) -> tuple[nn.Module, Any]:
    from peft import LoraConfig, get_peft_model

    model = llama()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)), (None, None)


def with_two_optimizers(seed: int) -> tuple[nn.Module, Any]:
    model = llama(seed)
    head = SGD(model.lm_head.parameters(), lr=0.1, momentum=0.9)
    return model, (chain(AdamW(model.model.parameters(), lr=0.02), head), None)


MODELS: dict[str, Callable[[int], tuple[nn.Module, Any]]] = {
    "plain": plain_model,
    "lora": with_lora,
    "two": with_two_optimizers,
}


class Kept(TrainerCallback):  # type: ignore[misc]
    """Keeps the sync, which is detached at the end of training."""

    def __init__(self, synced: SyncCallback) -> None:
        self.synced, self.sync = synced, synced.sync

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sync = self.synced.sync

    def labels(self) -> list[str]:
        """Of what was sent."""
        assert self.sync is not None
        return [label for _, label, _ in self.sync.meter.by]


def went_on(name: str, kind: str, latest: bool, folder: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a run gives, and one that went on from its checkpoint in the middle of a round, in a new trainer."""
    with launched():
        found: dict[str, Any] = {}
        for part in ("whole", "again"):
            model, optimizers = MODELS[kind](int(part == "again"))
            trainer = made(
                folder, model, optimizers=optimizers, save_steps=STOP, eval_strategy="steps", eval_steps=3, **arguments
            )
            synced = sync_with(trainer, METHODS[name])
            checkpoint = str(Path(folder) / f"checkpoint-{STOP}")
            kept = Kept(synced)
            trainer.add_callback(kept)
            trainer.train(resume_from_checkpoint=None if part == "whole" else latest or checkpoint)
            assert synced.sync is None and f"{END} steps, 0 skipped" in synced.report
            found[part] = digest(model), losses(trainer)
            if part == "whole":
                history = trainer.state.log_history
                found["evaluated"] = {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}
                found["sent"] = [entry[EXCHANGED] for entry in history if EXCHANGED in entry]
                found["messages"] = len({label for label in kept.labels() if label.startswith("fragment")}) or 1
                found["parameters"] = [p.numel() for p in model.parameters() if p.requires_grad]
                dist.barrier()
                if dist.get_rank() == 0:
                    shutil.rmtree(Path(folder) / f"checkpoint-{END}")
                dist.barrier()
        return found


CASES = [
    *((name, "plain", {}) for name in METHODS),
    ("diloco", "plain", {"gradient_accumulation_steps": 2, "bf16": True}),
    ("int8", "plain", {"gradient_accumulation_steps": 2}),
    ("streaming", "lora", {}),
    ("int8", "lora", {"activation_checkpointing": True}),
    ("diloco", "two", {}),
]


@pytest.mark.parametrize(("name", "kind", "arguments"), CASES)
def test_it_goes_on_bitwise(pool: WorkerPool, name: str, kind: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    one, other = pool.run(went_on, name, kind, name == "diloco", str(tmp_path), arguments, world=2)
    assert one["whole"] == one["again"] == other["again"]
    assert other["whole"][0] == one["whole"][0]  # replicas are equal after the last round
    first, *_, last = one["whole"][1]
    assert last < first - (0.01 if kind == "lora" else 0.5)
    if kind == "plain" and "bf16" not in arguments:
        evaluated = one["evaluated"][STOP]
        assert evaluated == pytest.approx(loss_of_saved(tmp_path / f"checkpoint-{STOP}"), abs=1e-6)
    assert one["sent"][-1] - one["sent"][0] == declared_bytes(name, one["parameters"], one["messages"])


def declared_bytes(name: str, parameters: list[int], messages: int) -> int:
    """Between the first step and the end: an exchange a step, or three rounds, two whole ones and a last one."""
    exchanges, weighted = (END - 1, False) if name in ("dense", "int8") else (3, True)
    one = two_phase_bytes(parameters, INT8 if name == "int8" else cast("fp32"), 2, weighted=weighted)
    empty = two_phase_bytes([], cast("fp32"), 2, weighted=weighted)
    saves = 2 * 8  # whether all files were written
    return exchanges * (one + (messages - 1) * empty) + saves


# ---- as data parallelism ---------------------------------------------------------------------------------------------


def dense_and_plain(folder: str) -> list[list[float]]:
    found = []
    for name in ("plain", "dense"):
        with launched():
            trainer = made(folder, llama(), max_steps=30, save_strategy="no", lr_scheduler_type="cosine")
            if name == "dense":
                sync_with(trainer, METHODS[name])
            trainer.train()
            found.append(losses(trainer))
    return found


def test_dense_is_the_trainers_own_data_parallelism(pool: WorkerPool, tmp_path: Path) -> None:
    for plain, dense in pool.run(dense_and_plain, str(tmp_path), world=2):
        assert len(plain) == 30 and dense == pytest.approx(plain, abs=1e-5)


# ---- what else trainers do -------------------------------------------------------------------------------------------


def trained_twice(folder: str) -> tuple[list[float], list[str], float, float]:
    """Losses of two calls of ``train()``; digests behind each; what is evaluated behind them and what is saved."""
    with launched():
        model = llama()
        trainer = made(folder, model, save_strategy="no", max_steps=6)
        synced = sync_with(trainer, METHODS["diloco"])
        found, digests = [], []
        for _ in range(2):
            trainer.train()
            found.extend(losses(trainer))
            digests.append(digest(model))
        assert "6 steps" in synced.report and trainer.args.average_tokens_across_devices is False
        evaluated = trainer.evaluate()["eval_loss"]
        trainer.save_model(str(Path(folder) / "end"))
        dist.barrier()
        return found, digests, evaluated, loss_of_saved(Path(folder) / "end")


def test_train_may_be_called_again(pool: WorkerPool, tmp_path: Path) -> None:
    one, other = pool.run(trained_twice, str(tmp_path), world=2)
    assert one[:2] == other[:2]
    assert one[0][-1] < one[0][5] < one[0][0]
    assert one[2] == pytest.approx(one[3], abs=1e-6)


def broken_off(folder: str) -> tuple[str, str]:
    class Once(TrainerCallback):  # type: ignore[misc]
        done = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and not self.done:
                self.done = True
                raise OSError("the disk is full")

    with launched():
        model = llama()
        trainer = made(folder, model, save_strategy="no", max_steps=6)
        trainer.add_callback(Once())
        sync_with(trainer, METHODS["diloco"])
        text = said(trainer.train)
        trainer.train()
        return text, digest(model)


def test_train_may_be_called_again_after_an_error(pool: WorkerPool, tmp_path: Path) -> None:
    one, other = pool.run(broken_off, str(tmp_path), world=2)
    assert one == other and one[0] == "OSError: the disk is full"


def best_at_the_end(folder: str) -> tuple[str, float, float]:
    """The model is the best one that was saved, not the last."""
    with launched():
        model = llama()
        every = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "save_total_limit": 1, "max_steps": 12}
        trainer = made(folder, model, load_best_model_at_end=True, greater_is_better=True, **every)
        sync_with(trainer, METHODS["diloco"])
        trainer.train()
        assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-3")  # of the highest loss
        return digest(model), float(trainer.state.best_metric), loss_of_saved(Path(folder) / "checkpoint-3")


def test_the_best_model_is_chosen_and_loaded_at_the_outer_parameters(pool: WorkerPool, tmp_path: Path) -> None:
    (one, metric, saved), (other, *_) = pool.run(best_at_the_end, str(tmp_path), world=2)
    assert one == other and metric == pytest.approx(saved, abs=1e-6)


class Poison(TrainerCallback):  # type: ignore[misc]
    """Rank 1's gradients of one step are not finite."""

    def __init__(self, model: Any) -> None:
        self.now = False
        model.lm_head.weight.register_hook(lambda grad: grad * float("nan") if self.now else grad)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = state.global_step == 2 and dist.get_rank() == 1


def with_a_skipped_step(name: str, folder: str, scale: bool) -> dict[str, Any]:
    with launched():
        model = llama()
        trainer = made(folder, model, save_strategy="no", max_steps=5, max_grad_norm=0.0)
        trainer.add_callback(Poison(model))
        if scale:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        sync_with(trainer, METHODS[name])
        trainer.train()
        return {
            "model": digest(model),
            "rates": [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry],
            "skipped": [entry[SKIPPED] for entry in trainer.state.log_history if SKIPPED in entry],
            "scale": trainer.accelerator.scaler.get_scale() if scale else None,
        }


@pytest.mark.parametrize(("name", "scale"), [("int8", False), ("int8", True), ("diloco", False)])
def test_a_skipped_step(pool: WorkerPool, name: str, scale: bool, tmp_path: Path) -> None:
    """Where all ranks skip it, their schedulers wait; where one replica does, none does."""
    one, other = pool.run(with_a_skipped_step, name, str(tmp_path), scale, world=2)
    waits = name == "int8"
    assert one["model"] == other["model"] and one["rates"] == other["rates"]
    assert one["skipped"][-1] == int(waits) and other["skipped"] == [0, 0, 1, 1, 1, 1]
    assert one["rates"][3:] == pytest.approx([0.02 * (1 - step / 5) for step in ((2, 3) if waits else (3, 4))])
    assert one["scale"] == other["scale"] == (512.0 if scale else None)


def gathers(trainer: Trainer) -> list[Any]:
    """What the trainer gathers, from now on."""
    gathered: list[Any] = []
    gather = trainer.accelerator.gather

    def counted(values: Any) -> Any:
        gathered.append(values)
        return gather(values)

    trainer.accelerator.gather = counted
    return gathered


def quietly(folder: str) -> tuple[int, bool]:
    """Collectives of the trainer's own in a step without an exchange, and whether DDP broadcasts buffers."""
    with launched():
        trainer = made(folder, llama(), save_strategy="no", max_steps=3, logging_steps=3)
        calls = gathers(trainer)
        sync_with(trainer, METHODS["diloco"])
        trainer.train()
        return len(calls), trainer.model_wrapped.will_sync_module_buffers()


def test_the_trainer_sends_nothing_of_its_own_in_a_step(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(quietly, str(tmp_path), world=2) == [(0, False)] * 2


# ---- TRL -------------------------------------------------------------------------------------------------------------


def fine_tuned(folder: str) -> list[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {**{str(byte): byte for byte in range(255)}, "<pad>": 255}
    columns = {"input_ids": [block["input_ids"].clamp(max=254).tolist() for block in blocks(64)]}
    rows = Dataset(pyarrow.table(columns), fingerprint="text")
    found = []
    with launched():
        for part in ("whole", "again"):
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), eos_token="<pad>", pad_token="<pad>"
            )
            fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False}
            fixed["dataset_kwargs"] = {"skip_prepare_dataset": True}
            settings = {"max_steps": END, "learning_rate": 0.02, "save_steps": STOP, "logging_steps": 1}
            arguments = SFTConfig(folder, per_device_train_batch_size=4, max_length=LENGTH, **fixed, **settings)
            model = llama(int(part == "again"))
            trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
            trainer.remove_callback(PrinterCallback)
            sync_with(trainer, METHODS["streaming"])
            calls = gathers(trainer)
            trainer.train(resume_from_checkpoint=None if part == "whole" else f"{folder}/checkpoint-{STOP}")
            assert not calls
            found.append({"digest": digest(model), "losses": losses(trainer)})
            dist.barrier()
    return found


def test_trl_goes_on_bitwise(pool: WorkerPool, tmp_path: Path) -> None:
    (whole, again), (other, _) = pool.run(fine_tuned, str(tmp_path), world=2)
    assert whole == again and other["digest"] == whole["digest"]
    assert whole["losses"][-1] < whole["losses"][0] - 0.3


# ---- what is refused -------------------------------------------------------------------------------------------------


def said(work: Callable[[], object]) -> str:
    try:
        work()
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused_at_once(kind: str, folder: str) -> str:
    with launched():
        trainer = made(folder, llama(), save_strategy="no", max_steps=2, enable_jit_checkpoint=kind == "jit")
        if kind == "twice":
            sync_with(trainer, METHODS["dense"])
        if kind == "late":
            trainer.is_in_train = True
        if kind == "in train":
            return said(lambda: late(trainer))
        if kind == "no trainer":
            return said(lambda: sync_with(llama(), METHODS["dense"]))
        return said(lambda: sync_with(trainer, typing.cast(Sync, diloco) if kind == "no method" else METHODS["dense"]))


def late(trainer: Trainer) -> None:
    class Late(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            sync_with(trainer, METHODS["dense"])

    trainer.add_callback(Late())
    trainer.train()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("twice", "ValueError: this trainer has a sync already"),
        ("in train", "ValueError: sync_with came when train() had begun"),
        ("no trainer", "TypeError: sync_with got a LlamaForCausalLM; give a transformers.Trainer"),
        ("no method", "TypeError: sync is diloco itself; call it"),
        ("jit", "ValueError: enable_jit_checkpoint saves when a rank gets a signal"),
    ],
)
def test_it_is_refused_before_anything_is_changed(pool: WorkerPool, kind: str, words: str, tmp_path: Path) -> None:
    assert all(text.startswith(words) for text in pool.run(refused_at_once, kind, str(tmp_path), world=2))


def test_a_trainer_without_torch_distributed_is_refused(tmp_path: Path) -> None:
    trainer = made(str(tmp_path), llama())
    with pytest.raises(ValueError, match=r"runs in one process, without torch\.distributed"):
        sync_with(trainer, METHODS["dense"])


def resumed(kind: str, folder: str) -> str:
    """What a trainer with DiLoCo is told by a checkpoint, or that it has trained."""
    with launched():
        before = made(folder, llama(), save_steps=STOP, save_only_model=kind == "only the model")
        if kind != "plain":
            sync_with(before, METHODS["int8" if kind == "another" else "diloco"])
        before.train()
        dist.barrier()
        if kind == "a rank's is missing" and dist.get_rank() == 1:
            (Path(folder) / f"checkpoint-{STOP}" / FOLDER / "replica-1-of-2.shard-0-of-1.safetensors").unlink()
        dist.barrier()
        trainer = made(folder, llama(1), save_strategy="no")
        synced = sync_with(trainer, METHODS["diloco"], begin_anew=kind == "plain, anew")
        text = said(lambda: trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{STOP}"))
        if synced.sync is not None:
            synced.sync.detach()
        return text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("plain", ["FileNotFoundError: ", "FileNotFoundError: "]),
        ("only the model", ["FileNotFoundError: ", "FileNotFoundError: "]),
        ("a rank's is missing", ["RuntimeError: the part of replicas [1] was not read", "FileNotFoundError: "]),
        ("another", ["ValueError: this state was saved with", "ValueError: this state was saved with"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    pool: WorkerPool, kind: str, words: list[str], tmp_path: Path
) -> None:
    texts = pool.run(resumed, kind, str(tmp_path), world=2)
    assert [text.startswith(word) for text, word in zip(texts, words, strict=True)] == [True, True], texts
    if kind == "plain":
        assert all("begin_anew=True" in text for text in texts)


def begun_anew(folder: str) -> tuple[float, float, list[float], str]:
    with launched():
        plain = made(folder, llama(), save_steps=STOP)
        plain.train()
        model = llama(1)
        trainer = made(folder, model, save_strategy="no")
        sync_with(trainer, METHODS["diloco"], begin_anew=True)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{STOP}")
        return losses(plain)[STOP], losses(trainer)[STOP], losses(trainer), digest(model)


def test_a_round_is_begun_from_a_plain_checkpoint(pool: WorkerPool, tmp_path: Path) -> None:
    one, other = pool.run(begun_anew, str(tmp_path), world=2)
    plain, anew, all_losses, _ = one
    assert anew == pytest.approx(plain, abs=1e-5) and len(all_losses) == END  # the first step is the plain run's
    assert one == other


def with_other_settings(folder: str) -> str:
    with launched():
        trainer = made(folder, llama(), save_strategy="no", gradient_accumulation_steps=1 + dist.get_rank())
        sync_with(trainer, METHODS["diloco"])
        return said(trainer.train)


def test_ranks_with_different_settings_are_refused(pool: WorkerPool, tmp_path: Path) -> None:
    words = "ValueError: ranks differ: gradient_accumulation_steps is 1 on rank 0 and 2 on rank 1"
    assert all(text.startswith(words) for text in pool.run(with_other_settings, str(tmp_path), world=2))


def with_other_integrations() -> str:
    return said(lambda: require_alike(f"dtrain.integrations.{('hf', 'lightning')[dist.get_rank()]}"))


def test_ranks_with_different_integrations_are_refused(pool: WorkerPool) -> None:
    words = "ValueError: ranks differ: integration is 'dtrain.integrations.hf' on rank 0 and"
    assert all(text.startswith(words) for text in pool.run(with_other_integrations, world=2))


def test_a_version_that_was_not_tested_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "4.57.1")
    with pytest.warns(RuntimeWarning, match=r"tested with transformers 5.24, and this is 4.57.1: it is tried"):
        require("transformers")


def test_what_remains_on_the_slow_links_is_told(pool: WorkerPool, tmp_path: Path) -> None:
    for texts in pool.run(told, str(tmp_path), world=2):
        assert len(texts) == 2 and all("over the slow links at every step" in text for text in texts)


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from blocks()


def told(folder: str) -> list[str]:
    with launched(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = made(folder, llama(), include_num_input_tokens_seen="all")
        trainer.train_dataset = Endless()
        caught.clear()
        sync_with(trainer, METHODS["diloco"])
        return [str(warning.message) for warning in caught]
