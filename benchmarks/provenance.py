"""Of which code a page of docs/evidence tells, and how far the code has moved since.

Nothing is measured with changes that are not committed. A page names the revision that made it, and each of its runs
the one that made that. What a page measures is declared here, by paths of today; how many commits have touched them
since is counted when somebody asks: `stale`, ``make evidence ARGS=stale``.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.page import table

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = "docs/evidence"

TRAINING = ("comm", "configs", "dtrain/train", "benchmarks/harness.py")
STEPS = ("comm", "configs/compress", "configs/sync", "dtrain/train/models", "benchmarks/step_timing.py")
HOSTS = ("comm", "dtrain/train/data", "dtrain/train/models", "tests/programs")

MEASURES: Mapping[str, tuple[str, ...]] = {
    "fifteen": (*TRAINING, "benchmarks/training.py"),
    "quality": (*TRAINING, "benchmarks/training.py"),
    "default": (*TRAINING, "benchmarks/training.py"),
    "kill": (*TRAINING, "launchers", "benchmarks/training.py"),
    "network": (
        "comm/channel.py", "comm/transports", "dtrain/bench", "slurm/devcluster", "benchmarks/link_calibration.py",
    ),
    "stopping": (*TRAINING, "launchers", "slurm", "benchmarks/stopping.py"),
    "few_bytes": (*TRAINING, "benchmarks/few_bytes.py"),
    "sparse_routes": (*TRAINING, "benchmarks/sparse_routes.py"),
    "all_syncs": (*TRAINING, "benchmarks/few_bytes.py"),
    "best_six": (*TRAINING, "benchmarks/few_bytes.py", "benchmarks/best_six.py"),
    "equal_time": (*TRAINING, "slurm/devcluster", "benchmarks/few_bytes.py", "benchmarks/best_six.py"),
    "time_to_loss": (*TRAINING, "slurm/devcluster", "benchmarks/few_bytes.py", "benchmarks/time_to_loss.py"),
    "small_model": (*TRAINING, "benchmarks/few_bytes.py", "benchmarks/time_to_loss.py"),
    "muon": ("comm/inner_optimizers", "dtrain/train/models", "benchmarks/muon.py"),
    "kernels": ("comm/kernels.py", "comm/compressors/quantize.py", "benchmarks/kernels.py"),
    "compressors": (*TRAINING, "benchmarks/compression.py"),
    "loss": (*TRAINING, "benchmarks/compression.py"),
    "lgreco": (*TRAINING, "benchmarks/lgreco.py"),
    "powersgd": (*STEPS, "benchmarks/slow_links.py"),
    "slow": (*STEPS, "benchmarks/slow_links.py"),
    "local": (*STEPS, "benchmarks/slow_links.py"),
    "torchft": (*HOSTS[:-1], "benchmarks/vs_torchft.py"),
    "overlap": (*HOSTS[:-1], "benchmarks/overlap.py"),
    "equal_tokens": (*TRAINING, "benchmarks/equal_tokens.py"),
    "elastic": (*HOSTS, "benchmarks/elastic.py"),
    "one_byte": (*HOSTS, "benchmarks/one_byte.py"),
    "clock_bytes": ("comm", "configs", "dtrain/train/engines", "benchmarks/clock_bytes.py"),
    "utilization": ("comm", "benchmarks/utilization.py"),
    "leaks": ("comm", "dtrain/train", "benchmarks/leaks.py"),
    "shared_seed": ("comm", "benchmarks/digits.py", "benchmarks/shared_seed.py"),
    "fine_tuning": (*TRAINING, "benchmarks/fine_tuning.py"),
    "gpu": ("comm", "dtrain/train/models", "tests/gpu", "benchmarks/gpu.py"),
    "plan_memory": ("comm", "dtrain/plan", "dtrain/train/engines", "dtrain/train/models", "benchmarks/plan_memory.py"),
    "suite": ("comm", "configs", "dtrain", "launchers", "slurm", "tests"),
    "fuzz": ("comm", "dtrain", "launchers", "slurm", "tests/fuzz"),
    "kill_and_resume": (*TRAINING, "tests/kill", "tests/programs"),
}  # fmt: skip
"""By name of the page: the files and folders whose change may change its figures."""


class DirtyTree(Exception):
    """Changes that are not committed: what would be measured has no name."""


def require_clean(root: Path = ROOT) -> None:
    """Raise `DirtyTree`, naming the files, if one is changed, added or removed. The pages themselves may be."""
    lines = git(root, "status", "--porcelain", "--untracked-files=all").splitlines()
    names = [line[3:] for line in lines if not within(line[3:], (EVIDENCE,))]
    if names:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise DirtyTree(
            f"not measured, as these have changes that are not committed: {', '.join(names[:10])}{more}; commit them, "
            "or measure in a worktree of its own (git worktree add FOLDER)"
        )


def revision(root: Path = ROOT) -> str:
    """Of what is checked out."""
    return git(root, "rev-parse", "HEAD").strip()


def commits_since(since: str, paths: Sequence[str], root: Path = ROOT) -> int | None:
    """How many commits after ``since`` touched what is now at ``paths``, wherever that stood; None if it is not known.

    It is not where a clone is shallow, or history was written anew.
    """
    try:
        log = git(root, "log", "--format=%x00", "--name-status", "-M", f"{since}..HEAD")
    except RuntimeError:
        return None
    count, earlier = 0, set[str]()  # where files stood before they were moved: commits come newest first
    for commit in log.split("\0")[1:]:
        changes = [line.split("\t") for line in commit.strip().splitlines()]
        touching = [names for _, *names in changes if any(name in earlier or within(name, paths) for name in names)]
        earlier.update(names[0] for names in touching if len(names) == 2)
        count += bool(touching)
    return count


def stale(folder: Path, root: Path = ROOT) -> str:
    """Every page of ``folder``, the oldest first, as a table."""
    rows: list[tuple[int, list[str]]] = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        made, *words = content["made"]["revision"].split(",")
        revisions, paths = {made, *content.get("kept_runs", {})}, MEASURES.get(path.stem, ("comm", "dtrain"))
        counts = [commits_since(made_at, paths, root) for made_at in revisions]
        known = [count for count in counts if count is not None]
        since = "unknown" if len(known) < len(counts) else str(max(known))
        rows.append((
            max(known, default=0) if len(known) == len(counts) else 1 << 30,
            [path.stem, made[:10], since, "; ".join([*words, *_kept(content)]).strip(), ", ".join(paths)],
        ))  # fmt: skip
    rows.sort(key=lambda row: -row[0])
    return table(["page", "made at", "commits since on what it measures", "but", "measures"], [row for _, row in rows])


def _kept(content: Mapping[str, Mapping[str, int]]) -> Iterable[str]:
    for made, count in content.get("kept_runs", {}).items():
        yield f"{count} runs at {made[:10]}"


def within(name: str, paths: Iterable[str]) -> bool:
    """Whether a file is one of ``paths`` or below one."""
    return any(name == path or name.startswith(f"{path}/") for path in paths)


def git(root: Path, *words: str) -> str:
    """What git prints. Raises ``RuntimeError`` with what it says."""
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"git {words[0]} in {root} failed: {done.stderr.strip()}")
    return done.stdout
