"""Code is loaded from the user's own folders alone, and a job's files name no other process than its own."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.comm import kernels as fused
from dtrain.errors import ConfigError
from dtrain.launchers import background, call, rank
from dtrain.launchers import job_list as registry
from dtrain.launchers import trust as trusted
from dtrain.launchers.background import BackgroundJob, began
from dtrain.launchers.code_copy import Snapshot
from dtrain.launchers.environment import Environment
from dtrain.launchers.job import Facts, command_of
from dtrain.launchers.trust import Untrusted, make_folder, opened, require_own, write_private
from dtrain.train.config import compose, load, run_folder

NOBODY = 65534


@pytest.fixture(params=[0o002, 0o022, 0o000])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


# ---- whose a folder is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o757, 0o1777, 0o720])
def test_what_others_can_write_to_is_refused_with_the_way_out(tmp_path: Path, mode: int) -> None:
    folder, file = tmp_path / "job", tmp_path / "job" / "function.pkl"
    make_folder(folder)
    write_private(file, b"code")
    with opened(file) as found:
        assert found.read() == b"code"
    folder.chmod(mode)
    for asked in (lambda: require_own(folder), lambda: opened(file), lambda: make_folder(folder)):
        with pytest.raises(Untrusted, match=rf"{folder}.*mode {mode:04o}.*chmod go-w.*DTRAIN_TRUSTED_FOLDERS"):
            asked()
    folder.chmod(0o755)
    file.chmod(mode)
    with pytest.raises(Untrusted, match=r"function.pkl"):
        opened(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_somebody_else_is_refused_and_a_folder_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "job")
    os.chown(tmp_path / "job", NOBODY, NOBODY)
    with pytest.raises(Untrusted, match=rf"belongs to user {NOBODY}, and you are 0"):
        require_own(tmp_path / "job")
    monkeypatch.setenv("DTRAIN_TRUSTED_FOLDERS", f"/elsewhere:{tmp_path}")
    require_own(tmp_path / "job")
    monkeypatch.setenv("DTRAIN_TRUSTED_FOLDERS", f"{tmp_path}/jo")
    with pytest.raises(Untrusted):
        require_own(tmp_path / "job")


def test_a_link_is_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    write_private(tmp_path / "elsewhere", b"other code")
    make_folder(tmp_path / "job")
    (tmp_path / "job" / "function.pkl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        opened(tmp_path / "job" / "function.pkl")


def test_whatever_the_umask_what_is_made_here_can_be_loaded_again(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "new" / "job"
    command_of(lambda: 1, folder)
    assert stat.S_IMODE((folder / "function.pkl").stat().st_mode) == 0o600
    call.main(folder)
    with opened(folder / "results" / "rank-0.pkl") as file:
        assert pickle.load(file) == 1
    code = tmp_path / "code"
    (code / "package").mkdir(parents=True)
    (code / "package" / "module.py").write_text("")
    snapshot = Snapshot(code, code, folder / "code")
    snapshot.take()
    for below in (folder / "code", folder / "code" / "package"):
        require_own(below)


# ---- everything that loads asks ------------------------------------------------------------------------------------


def loaders(folder: Path) -> dict[str, Callable[[], object]]:
    facts = Facts("1", "local", "job", str(folder), (), 1, 0.0)
    place = Environment("plain", 0, 1, 0, 1, 0, 1, 0)
    return {
        "function": lambda: call.main(folder),
        "result": lambda: BackgroundJob(facts).result(),
        "command": lambda: background.main("local", folder),
        "submit": lambda: background.LocalLauncher().start(["true"], folder=folder),
        "submit a function": lambda: command_of(lambda: 1, folder),
        "run folder": lambda: run_folder.write(compose([f"run.dir={folder}"]), {}),
        "rank": lambda: rank.run(folder, ["touch", str(folder / "ran")], place),
    }


@pytest.mark.parametrize("what", sorted(loaders(Path())))
def test_nothing_is_loaded_from_a_folder_that_others_write_to(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "job"
    make_folder(folder)
    make_folder(folder / "results")
    evil = tmp_path / "ran"
    bomb = pickle.dumps([]) + pickle.dumps(Bomb(str(evil)))
    for path in (folder / "function.pkl", folder / "results" / "rank-0.pkl"):
        write_private(path, bomb)
    write_private(folder / "background.json", json.dumps({"program": ["touch", str(evil)], "settings": {}}).encode())
    write_private(folder / "end.json", b'{"code": 0, "reason": "finished", "job": "1"}')
    folder.chmod(0o777)
    if what == "rank":
        assert loaders(folder)[what]() == 2 and not (folder / "ran").exists()
        assert "chmod go-w" in (folder / "logs" / "rank-0.log").read_text()
    else:
        with pytest.raises((Untrusted, ConfigError), match=r"everybody can write to it.*chmod go-w"):
            loaders(folder)[what]()
    assert not evil.exists()


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_a_cache_of_kernels_that_somebody_else_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = tmp_path / "torchinductor", tmp_path / "cache"
    theirs.mkdir()
    theirs.chmod(0o777)
    monkeypatch.setenv(fused.CACHE, str(theirs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(ours))
    fused._keep_cache_private()
    assert os.environ[fused.CACHE] == str(ours / "dtrain" / "inductor")
    require_own(Path(os.environ[fused.CACHE]))
    theirs.chmod(0o700)
    monkeypatch.setenv(fused.CACHE, str(theirs))
    fused._keep_cache_private()
    assert os.environ[fused.CACHE] == str(theirs)


# ---- what is kept of secrets ---------------------------------------------------------------------------------------


def test_values_for_the_ranks_are_readable_by_their_owner_alone_and_in_no_record(tmp_path: Path, umask: int) -> None:
    secret = 'launcher.environment=["HF_TOKEN=hf_secret","NCCL_DEBUG=INFO"]'
    config = compose([f"run.dir={tmp_path / 'run'}", secret])
    path = run_folder.write(config, {})
    require_own(path)
    require_own(path.parent)
    for file in path.parent.iterdir():
        assert "hf_secret" not in file.read_text()
    assert load(path).launcher.environment == ("HF_TOKEN=(not kept)", "NCCL_DEBUG=INFO")
    assert config.launcher.environment == ("HF_TOKEN=hf_secret", "NCCL_DEBUG=INFO")


# ---- whose a process is --------------------------------------------------------------------------------------------


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the user's that has nothing to do with any job."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def forged(where: Path, victim: subprocess.Popen[bytes], more: dict[str, object]) -> None:
    facts = Facts(str(victim.pid), "local", "job", "1000", ("true",), 1, time.time())
    (where / "job.json").write_text(json.dumps({**dataclasses.asdict(facts), **more}))


FORGED = [{}, {"folder": "sleep"}, {"launcher": "mpi"}, {"started": True}, {"folder": "/", "started": True}]


@pytest.mark.processes
@pytest.mark.parametrize("forge", FORGED, ids=str)
def test_a_file_that_names_any_process_does_not_end_it(
    tmp_path: Path, victim: subprocess.Popen[bytes], forge: dict[str, object]
) -> None:
    more = {**forge, "started": began(str(victim.pid))} if forge.get("started") else forge
    forged(tmp_path, victim, more)
    (job,) = registry.resolve(str(tmp_path))
    assert job.state() == "lost"
    with pytest.raises(LookupError, match=rf"process {victim.pid} is not the job of .*left alone"):
        job.cancel()
    with pytest.raises(subprocess.TimeoutExpired):
        victim.wait(0.3)


@pytest.mark.processes
@pytest.mark.parametrize("number", ["-1", "0", "x", "", "99999999999999999999", "-0x1", "1.5"])
def test_a_number_that_is_no_process_of_a_job_ends_nothing(tmp_path: Path, number: str) -> None:
    job = BackgroundJob(Facts(number, "local", "job", str(tmp_path), (), 1, 0.0))
    job.cancel()
    assert job.state() == "lost"


@pytest.mark.processes
def test_another_jobs_process_is_not_this_ones(tmp_path: Path) -> None:
    """Its job.json is copied into another folder, or its folder is replaced by another process of the same number."""
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    for folder in (theirs, mine):
        folder.mkdir()
    words = ["-c", "import time; time.sleep(1000)", "-m", "dtrain.launchers.background", "local", str(theirs)]
    with subprocess.Popen([sys.executable, *words]) as process:
        try:
            facts = Facts(str(process.pid), "local", "job", str(theirs), (), 1, 0.0)
            while began(str(process.pid)) is None or BackgroundJob(facts).state() != "running":
                time.sleep(0.01)
            started = began(str(process.pid))
            assert started is not None
            facts = dataclasses.replace(facts, started=started)
            (mine / "job.json").write_text(json.dumps(dataclasses.asdict(facts)))
            (job,) = registry.resolve(str(mine))
            assert job.folder == theirs or job.state() == "lost"
            reused = BackgroundJob(dataclasses.replace(facts, started=started + "1"))
            assert reused.state() == "lost"
            with pytest.raises(LookupError, match="left alone"):
                reused.cancel()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
            BackgroundJob(facts).cancel()
            assert process.wait(10) == -signal.SIGTERM
        finally:
            process.kill()


@pytest.mark.processes
@pytest.mark.parametrize("written", [True, False])
def test_a_lock_that_is_a_link_names_nobody_who_has_that_file_open(tmp_path: Path, written: bool) -> None:
    diary, folder = tmp_path / "diary", tmp_path / "folder"
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    with diary.open("w") as opened_by_victim, subprocess.Popen(["sleep", "1000"], stdout=opened_by_victim) as victim:
        try:
            diary.write_text(f"a dtrain command, process {victim.pid} on here\n")
            (folder / ".lock").symlink_to(diary)
            if written:
                facts = Facts(str(victim.pid), "foreground", "job", str(folder), (), 1, 0.0)
                (folder / "job.json").write_text(json.dumps(dataclasses.asdict(facts)))
            (job,) = registry.resolve(str(folder))
            assert job.state() == "lost"
            job.cancel()
            with pytest.raises(subprocess.TimeoutExpired):
                victim.wait(0.3)
        finally:
            victim.kill()


def test_the_environment_names_folders_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_TRUSTED_FOLDERS", "")
    make_folder(tmp_path / "x")
    (tmp_path / "x").chmod(0o777)
    with pytest.raises(Untrusted):
        trusted.require_own(tmp_path / "x")
