"""What an installed dtrain holds: real copies of what the checkout has behind links, and no top-level `comm`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "runs", "build", "dist", "*.egg-info",
                                    "__pycache__", "tests")  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout: setuptools leaves build/ and *.egg-info where it builds."""
    source, out = tmp_path_factory.mktemp("source") / "dtrain", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_SOURCE)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (made,) = out.glob("dtrain-*.whl")
    return made


def files(top: str, pattern: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / top).rglob(pattern) if "__pycache__" not in path.parts}


def test_the_wheel_holds_every_file_behind_the_links(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {entry.filename: entry for entry in archive.infolist()}
        behind = (
            files("comm", "*.py")
            | files("launchers", "*.py")
            | files("configs", "*.yaml")
            | files("slurm", "*.py")
            | files("slurm", "*.j2")
        )
        assert len(behind) > 50 and {f"dtrain/{name}" for name in behind} <= held.keys()
        for name in behind:
            entry = held[f"dtrain/{name}"]
            assert (entry.external_attr >> 16) & 0o170000 in (0, 0o100000), f"{name} is no regular file"
            assert archive.read(entry) == (ROOT / name).read_bytes()
        own = {name for name in files("dtrain", "*.py") if (ROOT / name).resolve().is_relative_to(ROOT / "dtrain")}
        assert own <= held.keys() and "dtrain/py.typed" in held


def test_the_wheel_has_one_top_level_package_without_tests_and_benchmarks(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {top for name in names if not (top := name.partition("/")[0]).endswith(".dist-info")} == {"dtrain"}
    assert not [name for name in names if "benchmarks" in name or "/tests/" in name]


def test_an_installed_dtrain_composes_and_imports_behind_the_links(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    # The checkout's own dtrain must not be what is found: -P keeps the current folder out of sys.path.
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import dtrain, dtrain.launchers.elastic_agent\n"
        "from dtrain import every_step\n"
        "from dtrain.train.config import compose\n"
        "print(dtrain.__file__, every_step.__module__, compose(['run.dir=x']).engine.name)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{tmp_path}/site/dtrain/__init__.py", "dtrain.comm.methods.every_step", "fsdp"]


def test_the_wheel_asks_for_torch_and_numpy_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "dtrain = dtrain.cli.main:main" in archive.read(entry_points).decode()
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert [need for need in needed if "extra ==" not in need] == ["torch>=2.8", "numpy>=1.26"]
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    published = {"train", "report", "zero", "mpi", "slurm", "cluster", "text", "lossless", "hf", "dev"}
    assert extras == {*published, "wandb", "mlflow", "trackio"}
