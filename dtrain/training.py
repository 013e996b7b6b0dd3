"""`Trainer`: runs of ``dtrain train`` from a program or a notebook, of models and data sets that it made itself.

One process trains by itself; under torchrun, or in a process group that exists, each process is a rank. The run folder,
the configuration in it, checkpoints, metrics and the export are those of the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import ConfigError
from dtrain.extras import OF_TRAINING, require
from dtrain.loading import load

if TYPE_CHECKING:
    from torch import nn

    from dtrain.train.config import Config
    from dtrain.train.given import Examples
    from dtrain.train.metrics import Row
    from dtrain.train.results import Outcome

__all__ = ["Results", "Trainer"]

DAY = 86_400.0


@dataclass(frozen=True)
class Results:
    """What a run has come to.

    ``reason``: "finished", "stopped" as ``train.stop_after_steps`` asked, or "signal". ``loss``: of the last step that
    was logged, over all ranks; ``validation_loss``: the last one; None where there is none. ``rows``: metrics.jsonl,
    all of it. ``folder``: the run folder; ``weights``: what `dtrain.load` takes, the folder or its last checkpoint,
    None where there is no checkpoint.
    """

    folder: Path
    reason: str
    step: int
    loss: float | None
    validation_loss: float | None
    rows: Sequence[Row]
    weights: Path | None


class Trainer:
    """Trains as ``dtrain train`` does, in the calling processes. Nothing happens before `train`.

        trainer = dtrain.Trainer("sync=diloco", model=net, data=examples, train={"steps": 200}, run={"dir": "runs/x"})
        results = trainer.train()

    Args:
        words: those of the command line: ``"engine=ddp"``, ``"train.steps=200"``, ``"@exp.yaml"``.
        model: a ``torch.nn.Module`` with ``model(batch) -> loss``, or a causal language model of transformers or peft.
            A copy is trained; at the end of `train` the object has the trained weights, and is in eval mode. All ranks
            begin with rank 0's. Or a choice (``"hf"``) or keys, as for the other sections.
        data: a data set: ``len()``, and ``[i]``, a dict of tensors; or a choice or keys.
        validation: a data set that is evaluated; without one, data that are an object are not evaluated.
        on_row: called on rank 0 with each row of metrics; by default it is printed.
        settings: sections of the configuration by name: a choice, ``sync="diloco"``, or keys, ``train={"steps": 200}``.

    The mesh is one replica per process, or as ``mesh.shard`` says. Keywords win over words.
    """

    def __init__(
        self,
        *words: str,
        model: nn.Module | Mapping[str, object] | str | None = None,
        data: Examples | Mapping[str, object] | str | None = None,
        validation: Examples | None = None,
        on_row: Callable[[Row], None] | None = None,
        **settings: object,
    ) -> None:
        require(OF_TRAINING)
        from dtrain.train.config.keywords import as_words

        if bad := [word for word in words if not isinstance(word, str)]:
            raise TypeError(f"{bad[0]!r:.80} is no word such as 'train.steps=200'; a model is given by model=...")
        self._on_row, self._objects = on_row, dict[str, object]()
        self._model = self._handed_model(model)
        self._words = [*words, *as_words(settings)]
        if self._model is not None:
            self._words += _stands_for("model", model)
        elif model is not None:
            self._words += as_words({"model": model})
        if data is not None and not isinstance(data, str | Mapping):
            self._handed_data(data, validation)
            self._words += _stands_for("data", data)
        elif validation is not None:
            raise ConfigError("validation is a data set, but data is none: give data=... as an object, too")
        elif data is not None:
            self._words += as_words({"data": data})
        self._folder = ""

    def train(self) -> Results:
        """Train to the end, from the newest checkpoint in ``run.dir`` if there is one. Call it in every process.

        Ctrl-C, or SIGTERM to any rank, has all ranks write a checkpoint and stop; the same call resumes there, to the
        bit. After Ctrl-C it raises ``KeyboardInterrupt``, so that a notebook does not run its next cells; after another
        signal it returns, with ``reason`` "signal".

        Raises:
            ConfigError: settings that do not fit, before anything is trained; the same on all ranks.
            DtrainError: as ``dtrain train``, whose errors these are.
        """
        from dtrain.comm.transports.json_gather import gather_json
        from dtrain.train import given
        from dtrain.train.process_group import joined, make_equal

        with _quiet(), joined() as (rank, world), given.given(self._objects):
            with contextlib.ExitStack() as stack:
                config = self._agreed(rank, world, stack)
                if self._model is not None:
                    make_equal(self._model)
                outcome = self._run(config, world)
                gather_json(rank)  # rank 0 has written all of it
            results = _results(config, outcome)
            if self._model is not None and results.weights is not None:
                load(results.weights, model=self._model)
        if outcome.signal == signal.SIGINT:
            raise KeyboardInterrupt(f"checkpointed at step {outcome.step}; the same call resumes there")
        return results

    def _handed_model(self, model: nn.Module | Mapping[str, object] | str | None) -> nn.Module | None:
        from torch import nn

        from dtrain.train.given import returning_loss

        if not isinstance(model, nn.Module):
            return None
        handed = self._objects["model"] = returning_loss(model)
        return handed

    def _handed_data(self, data: object, validation: object) -> None:
        from dtrain.train.given import described

        self._objects["train"] = described(data, "data")
        if validation is not None:
            self._objects["validation"] = described(validation, "validation")
        else:
            self._words.append("train.evaluation_examples=0")

    def _agreed(self, rank: int, world: int, stack: contextlib.ExitStack) -> Config:
        """Rank 0 composes, checks and writes the configuration, and holds the lock of the run folder; all load it."""
        from dtrain.comm.transports.json_gather import gather_json
        from dtrain.train.config import load as load_config
        from dtrain.train.config.run_folder import CONFIG

        failure: Exception | None = None
        answer: dict[str, str] = {}
        if rank == 0:
            try:
                answer = {"folder": str(self._written(world, stack))}
            except Exception as error:  # the other ranks wait for the answer
                failure, answer = error, {"error": f"{error}"}
        answer = gather_json(answer)[0]
        if failure is not None:
            raise failure
        if "error" in answer:
            raise ConfigError(answer["error"])
        self._folder = answer["folder"]
        return load_config(Path(self._folder) / CONFIG)

    def _written(self, world: int, stack: contextlib.ExitStack) -> Path:
        from dtrain.train.config import run_folder, validate
        from dtrain.train.config.composition import compose_named

        again = [f"run.dir={self._folder}"] if self._folder else []
        # 0 replicas: as many as there are processes for.
        config, named = compose_named(["mesh.replicate=0", "mesh.shard=1", *self._words, *again])
        if config.launcher.name != "local":
            raise ConfigError(f"launcher={config.launcher.name}: a Trainer starts no processes; leave the launcher out")
        replicas = config.mesh.replicate or max(1, world // max(1, config.mesh.shard))
        mesh = dataclasses.replace(config.mesh, replicate=replicas)
        config = dataclasses.replace(config, mesh=mesh, launcher=config.launcher.replaced(workers=world))
        config = run_folder.absolute(config)
        description = validate(config)
        if previous := run_folder.previous(config):
            run_folder.check(config, description, previous)
        if not named:
            config = run_folder.in_its_own(config)
        stack.enter_context(run_folder.locked(Path(config.run.dir)))
        run_folder.write(config, description)
        return Path(config.run.dir)

    def _run(self, config: Config, world: int) -> Outcome:
        from dtrain.report.progress import printer
        from dtrain.train.signals import StopRequest
        from dtrain.train.trainer import train

        on_row = self._on_row or printer(config.train.steps)
        if threading.current_thread() is not threading.main_thread():
            return train(config, on_row=on_row)  # signals go to the main thread alone
        # A process by itself waits for nobody, and has no launcher that would end it.
        with StopRequest(grace_seconds=config.launcher.grace_seconds if world > 1 else DAY) as stop:
            return train(config, requested=lambda: stop.requested, on_row=on_row)


def _stands_for(section: str, handed: object) -> list[str]:
    from dtrain.train.given import name_of

    return [f"{section}=custom", f"{section}._target_=dtrain.train.given.{section}", f"{section}.of={name_of(handed)}"]


def _results(config: Config, outcome: Outcome) -> Results:
    from dtrain.train.checkpoint.folders import step_folders
    from dtrain.train.checkpoint.weights import EXPORTED

    folder = Path(config.run.dir)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    checkpoints = step_folders(folder / "checkpoints")
    exported = outcome.reason != "signal" and (folder / EXPORTED).is_file()
    return Results(
        folder=folder,
        reason=outcome.reason,
        step=outcome.step,
        loss=next((row["loss"] for row in reversed(rows) if "loss" in row), None),
        validation_loss=next((row["validation_loss"] for row in reversed(rows) if "validation_loss" in row), None),
        rows=rows,
        weights=folder if exported else checkpoints[-1] if checkpoints else None,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of torch about its own internals, as in the workers of the command."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
        yield
