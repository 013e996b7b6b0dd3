"""The run folder before the workers start: whether there is a run to resume, whether it may, and what is recorded.

run.dir/config.yaml        the configuration of this run; ranks load only this
        config-K.yaml      the configuration before its K-th change
        environment.json   versions, git revision, devices, command line
        data.json          the data set's description, above all its digest
        checkpoints/step-*
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from dtrain.errors import ConfigError, DtrainError, ResumeError
from dtrain.launchers import strict_json
from dtrain.launchers import trust as trusted
from dtrain.launchers.job import ENDED, Facts, SchedulerError
from dtrain.launchers.job_list import holder
from dtrain.launchers.lock import LOCK, InUse, held
from dtrain.launchers.registry import open_job
from dtrain.report.environment import KEPT, NOT_KEPT, record
from dtrain.train.checkpoint.folders import OWNERS, write_text_durably
from dtrain.train.config.compatibility import check_resume
from dtrain.train.config.composition import load, to_yaml
from dtrain.train.config.data_contract import DATA as DATA
from dtrain.train.config.schema import Config
from dtrain.train.failure_memory import forget

CONFIG, ENVIRONMENT, OUTCOME, CHECKPOINTS = (
    "config.yaml", "environment.json", "outcome.json", "checkpoints",
)  # fmt: skip

IDENTITY = ("sha256", "digest", "vocab_size", "dtype", "count", "held_out")
"""The entries of a description that identify the data, as dtrain's data sets name them; the first two are digests."""


def absolute(config: Config) -> Config:
    """The configuration with absolute paths, so that it means the same wherever a worker starts."""
    resume = config.run.resume
    if resume not in ("auto", "never"):
        resume = str(Path(resume).absolute())
    weights = str(Path(config.run.weights).absolute()) if config.run.weights else ""
    folder = str(Path(config.run.dir).absolute())
    run = dataclasses.replace(config.run, dir=folder, resume=resume, weights=weights)
    log = {"log": str(Path(str(config.sync["log"])).absolute())} if config.sync.get("log") else {}
    data, model = _absolute_path(config.data), _absolute_path(config.model)
    return dataclasses.replace(config, run=run, sync={**config.sync, **log}, data=data, model=model)


def _absolute_path(settings: Mapping[str, object]) -> dict[str, object]:
    """With ``path`` absolute, if it is there: a user's target may mean something else by it."""
    path = settings.get("path")
    found = Path(path).expanduser() if isinstance(path, str) and path else None
    return {**settings, **({"path": str(found.absolute())} if found is not None and found.exists() else {})}


def previous(config: Config) -> Path | None:
    """The folder of the run to resume, by ``run.resume``; None for a fresh start.

    If ``run.dir`` has the run that was started from PATH, that run is resumed: the same command, repeated after it was
    stopped, must not start from PATH again.

    Raises:
        ResumeError: ``never`` with a run in ``run.dir``; a PATH without checkpoint; another run in ``run.dir``.
    """
    folder, resume = Path(config.run.dir), config.run.resume
    exists = _has_run(folder)
    if resume == "never":
        if exists:
            raise ResumeError(
                f"run.dir={folder} has a run already, and run.resume=never: choose another run.dir, or go on with "
                "run.resume=auto; nothing was overwritten"
            )
        return None
    if resume == "auto":
        return folder if exists else None
    source = Path(resume)
    if source.name.startswith("step-"):
        source = source.parent.parent
    if not _has_checkpoint(source) or (source != Path(resume) and not Path(resume).is_dir()):
        raise ResumeError(
            f"run.resume={resume} has no checkpoint: give a run folder with checkpoints/step-*, one of these folders, "
            "auto or never"
        )
    if source == folder and Path(resume) != folder:
        raise ResumeError(
            f"run.resume={resume} is a step of this very run: going back inside a run would mix two histories; give "
            "another run.dir to branch off there, or run.resume=auto to go on from the newest step"
        )
    if exists and source != folder:
        if load(folder / CONFIG).run.resume != resume:
            raise ResumeError(
                f"run.dir={folder} has a run that did not start from run.resume={resume}: choose another run.dir, or "
                "go on with run.resume=auto"
            )
        return folder
    return source


def check(config: Config, description: Mapping[str, object], folder: Path) -> None:
    """Check that the run in ``folder`` may resume with this configuration and these data.

    Raises:
        ResumeError: listing what differs.
    """
    if not (folder / CONFIG).is_file():
        raise ResumeError(f"{folder} has checkpoints but no {CONFIG}, so nobody can say whether they fit; put it back")
    try:
        changed = other_data(folder, description)
        same = not changed and has_digest(description) and (folder / DATA).is_file()
        check_resume(absolute(load(folder / CONFIG)), config, same_data=same)
    except ValueError as error:
        raise ResumeError(
            f"{folder / DATA} is damaged ({error}), so nobody can say whether the data are the same; delete it to "
            "go on without that check"
        ) from error
    if changed:
        raise ResumeError(
            f"the data have changed since {folder} was trained: {changed}; bring the same files back ({folder / DATA} "
            "lists them), or start a new run in another run.dir"
        )


def other_data(folder: Path, description: Mapping[str, object]) -> str:
    """How these data differ from those that the run in ``folder`` was launched with; empty if they do not.

    Raises ValueError for a damaged record of them.
    """
    try:
        stored, current = strict_json.read(folder / DATA), strict_json.parse(strict_json.dumps(description))
    except FileNotFoundError:
        return ""
    if not has_digest(stored) and not has_digest(current):  # a user's own description: compare all of it
        return "" if stored == current else f"they were {stored} and are {current}"
    names = {"sha256": "digest"}
    changes = [
        f"the {names.get(name, name)} was {stored.get(name)} and is {current.get(name)}"
        for name in IDENTITY
        if stored.get(name) != current.get(name) and (name in stored or name in ("sha256", "digest"))
    ]
    return ", ".join(changes)


def write(config: Config, description: Mapping[str, object]) -> Path:
    """Write config.yaml (an earlier one that differs is kept as config-K.yaml), environment.json and data.json.

    Returns:
        The path of config.yaml.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    folder = Path(config.run.dir)
    path = folder / CONFIG
    try:
        trusted.make_folder(folder)
        text = to_yaml(without_values(config))
        if path.is_file() and path.read_text() != text:
            number = 1 + sum(1 for _ in folder.glob("config-*.yaml"))
            os.replace(path, folder / f"config-{number}.yaml")
        write_text_durably(path, text, mode=OWNERS)
        write_text_durably(folder / ENVIRONMENT, strict_json.dumps(record(), indent=2))
        write_text_durably(folder / DATA, strict_json.dumps(description, indent=2))
        forget(folder)
        (folder / OUTCOME).unlink(missing_ok=True)  # that of an earlier launch must not be taken for this one's
    except trusted.Untrusted as error:
        raise ConfigError(f"run.dir={folder}: {error}") from error
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be written to: {error}; choose another run.dir") from error
    return path


def without_values(config: Config) -> Config:
    """The configuration as stored: ``launcher.environment`` with the values of known settings only, never secrets."""
    entries = [
        entry if (name := entry.partition("=")[0]) in KEPT else f"{name}={NOT_KEPT}"
        for entry in config.launcher.environment
    ]
    return dataclasses.replace(config, launcher=config.launcher.replaced(environment=tuple(entries)))


@contextlib.contextmanager
def withdrawn_if_refused(folder: Path) -> Iterator[None]:
    """Around `write` and a submission: undo what they leave in ``folder`` if the job is refused.

    A run that never started must not constrain the next one. A folder that was empty is emptied; in any other one the
    configuration and the records are restored. Refused means ``ValueError``: after any other error the job may exist,
    and would need its files.
    """
    before = {path.name for path in folder.iterdir()} - {LOCK} if folder.is_dir() else set()
    names = [name for name in before if name.startswith("config") or name in (ENVIRONMENT, DATA, OUTCOME)]
    stored = {name: (folder / name).read_bytes() for name in names}
    try:
        yield
    except ValueError:
        for path in list(folder.iterdir()) if folder.is_dir() else []:
            ours = path.name in (CONFIG, ENVIRONMENT, DATA) or path.match("config-*.yaml")
            if path.name in before or path.name == LOCK or (before and not ours):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for name, content in stored.items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                (folder / name).write_bytes(content)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the run folder within the block: see `dtrain.launchers.lock`.

    Raises:
        ConfigError: another run trains in it, or a job of it may still start; the folder is left as it was.
    """
    with contextlib.ExitStack() as stack:
        try:
            trusted.make_folder(folder)
            locks = stack.enter_context(held(folder, "a dtrain command"))
        except InUse as error:
            without_job(folder)  # its error says more
            raise ConfigError(
                f"run.dir={folder} is in use by another dtrain: wait, or choose another ({error.holder} holds it)"
            ) from error
        except trusted.Untrusted as error:
            raise ConfigError(f"run.dir={folder}: {error}") from error
        except OSError as error:
            raise ConfigError(f"run.dir={folder} cannot be written to: {error}; choose another run.dir") from error
        without_job(folder)
        if not locks:
            print(
                f"dtrain: warning: the file system of {folder} has no locks, so nothing keeps out a second dtrain that "
                "another machine starts there",
                file=sys.stderr,
            )
        yield


def without_job(folder: Path) -> None:
    """Raise ``ConfigError`` if the folder is that of a job which has not ended, or whose state cannot be found out."""
    try:
        job = holder(folder)
        state = job.state() if job is not None else "lost"
    except SchedulerError as error:
        raise ConfigError(_unasked(folder, error)) from error
    if job is not None and state not in ENDED:
        raise ConfigError(f"run.dir={folder} holds job {job.id}, which is {state}; cancel it or choose another run.dir")


def _unasked(folder: Path, error: SchedulerError) -> str:
    """The message for a folder whose job's state cannot be found out from here."""
    facts = Facts.read(folder)
    if open_job(facts).cluster_is_up():
        return (
            f"run.dir={folder} holds job {facts.id} of cluster {facts.cluster}, which is up and not asked from here: "
            f"dtrain jobs status {folder} says how it stands; cancel it, or choose another run.dir"
        )
    return (
        f"run.dir={folder} holds a job, and nobody can say whether it has ended: {error}. If you know that it has, "
        f"remove {folder / 'job.json'}; else choose another run.dir"
    )


def in_its_own(config: Config) -> Config:
    """The configuration with a new run folder, which is created; for command lines that name none."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(made(Path(config.run.dir)))))


def made(folder: Path) -> Path:
    """Create a folder of this name, or with a number appended: runs that start at the same moment must not share one.

    Raises:
        ConfigError: it cannot be made.
    """
    names = (f"-{number}" if number > 1 else "" for number in itertools.count(1))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while True:
            path = folder.with_name(folder.name + next(names))
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    except OSError as error:
        raise ConfigError(f"run.dir={folder} cannot be made: {error}; choose another run.dir") from error


def outcome(folder: Path) -> dict[str, object] | None:
    """What rank 0 recorded when the run ended normally: ``reason``, ``signal``, ``step``; None if it did not."""
    path = folder / OUTCOME
    if not path.is_file():
        return None
    try:
        record = strict_json.read(path)
        strict_json.integer(record, "step")
        if record.get("reason") not in ("finished", "stopped", "signal"):
            raise ValueError(f"its reason is {record.get('reason')!r:.80}")
    except (OSError, ValueError) as error:
        raise DtrainError(f"{path} is damaged: {error}; the same command goes on from the last checkpoint") from error
    return record


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / CHECKPOINTS).glob("step-*"))


def _has_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or _has_checkpoint(folder)


def has_digest(description: Mapping[str, object]) -> bool:
    """Whether a description identifies the data by a digest."""
    return "sha256" in description or "digest" in description
