"""The record of where a run was made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.report.environment import record


def test_it_is_json_with_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = json.loads(json.dumps(record()))
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3])) and "torch" in found["versions"]
    assert found["environment"]["NCCL_DEBUG"] == "INFO" and "secret" not in json.dumps(found)


def test_git_is_that_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record()["git"] is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], [*identity, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *command], check=True)
    clean = record()["git"]
    assert isinstance(clean, dict) and len(clean["revision"]) == 40 and clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert record()["git"] == clean | {"dirty": True}
