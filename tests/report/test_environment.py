"""The record of where a run was made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.report.environment import KEPT, record


def test_it_is_json_with_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = json.loads(json.dumps(record()))
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3])) and "torch" in found["versions"]
    assert found["environment"]["NCCL_DEBUG"] == "INFO" and "secret" not in json.dumps(found)


FAMILIES = ("SLURM", "NCCL", "GLOO", "OMP", "TORCH", "TORCHELASTIC", "DTRAIN", "AWS", "HF", "WANDB", "GITHUB", "CUDA",
            "UCX", "MKL", "PMI", "OMPI", "AZURE", "GOOGLE", "OPENAI", "DATABASE", "SSH", "PYTORCH")  # fmt: skip
SECRETS = ("JWT", "TOKEN", "KEY", "API_KEY", "PASSWORD", "PASSWD", "SECRET", "SECRET_ACCESS_KEY", "CREDENTIALS", "AUTH",
           "URL", "PROXY", "COOKIE", "PRIVATE_KEY", "SESSION", "DSN", "WEBHOOK", "MEMBERS_SECRET", "REST_TOKEN",
           "JOB_COMMENT", "JOB_EXTRA", "PIN", "CERT", "BEARER", "LICENSE")  # fmt: skip


def test_no_variable_is_kept_whose_name_may_be_that_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{family}_{secret}" for family in FAMILIES for secret in SECRETS]
    names += [name.lower() for name in names] + [*SECRETS, "http_proxy", "SLURM_JWT", "SLURM_JWT_DAEMON", "TORCH"]
    for name in names:
        monkeypatch.setenv(name, f"value-of-{name}")
    monkeypatch.setattr(
        sys, "orig_argv", ["dtrain", "train", "launcher.environment=[HF_TOKEN=value-of-x]", "train.steps=3"]
    )
    text = json.dumps(record())
    assert "value-of" not in text and "train.steps=3" in text
    assert not KEPT & {*names}


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
