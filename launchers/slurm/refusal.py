"""What sbatch says when it refuses a job, with the keys of dtrain that made the directives it speaks of."""

from __future__ import annotations

from collections.abc import Iterator

from dtrain.launchers.slurm.settings import SlurmSettings

__all__ = ["told", "unanswered"]

SILENCE = ("Unable to contact slurm controller", "Connection refused", "timed out", "munge")

WORDS = {
    "memory": ("memory",),
    "constraint": ("feature", "constraint"),
    "gpus": ("gres", "gpu", "tres"),
    "partition": ("partition",),
    "account": ("account", "association"),
    "qos": ("qos",),
    "reservation": ("reservation",),
    "exclude": ("node name", "exclude"),
    "time": ("time limit", "time specification"),
    "cpus": ("cpu",),
    "nodes": ("node count", "more processors"),
    "array": ("array",),
    "sbatch": ("unrecognized option", "invalid option", "unknown option", "ambiguous", "requires an argument"),
}
"""What a directive is called in the errors of sbatch, where it does not name it."""


def unanswered(said: str) -> bool:
    """Whether nobody was there to judge the job: then the same command may be taken later."""
    return any(word.lower() in said.lower() for word in SILENCE)


def told(said: str, settings: SlurmSettings) -> str:
    """The message for a person: each of sbatch's lines once, the keys it may mean, and the way out.

    >>> print(told("sbatch: error: Batch job submission failed: Invalid feature specification",
    ...            SlurmSettings(constraint="a100")))
    sbatch refused the job: Batch job submission failed: Invalid feature specification
    This comes from launcher.constraint=a100 (--constraint): change it, or leave it out; ...
    """
    lines = dict.fromkeys(_bare(line) for line in said.splitlines() if line.strip())
    words = "; ".join(line for line in lines if not line.startswith('Try "sbatch')) or "it said nothing"
    asked = _asked(settings)
    speaks = [topic for topic, names in WORDS.items() if any(name in words.lower() for name in names)]
    meant = [what for topic, what in asked if topic in speaks]
    surely = bool(meant)
    meant = meant or [what for _, what in asked]  # "Requested node configuration is not available": any of them
    whence = "This comes from" if surely else "It does not say which directive; those of this job come from"
    return (
        f"sbatch refused the job: {words}\n{whence} {', '.join(meant)}: change it, or leave it out; `sinfo` and "
        "`scontrol show node` tell what the cluster has"
    )


def _bare(line: str) -> str:
    return line.strip().removeprefix("sbatch: ").removeprefix("error: ")


def _asked(settings: SlurmSettings) -> list[tuple[str, str]]:
    """The topic of each directive that the job was given, and the key and value that made it."""
    return list(_keys(settings))


def _keys(settings: SlurmSettings) -> Iterator[tuple[str, str]]:
    named = (
        ("memory", "memory_gib", "mem", settings.memory_gib),
        ("constraint", "constraint", "constraint", settings.constraint),
        ("gpus", "gpus_per_node", "gpus-per-node", settings.gpus_per_node),
        ("partition", "partition", "partition", settings.partition),
        ("account", "account", "account", settings.account),
        ("qos", "qos", "qos", settings.qos),
        ("reservation", "reservation", "reservation", settings.reservation),
        ("exclude", "exclude", "exclude", settings.exclude),
        ("array", "array_parallel", "array", settings.array_parallel),
    )
    for topic, key, directive, value in named:
        if value:
            yield topic, f"launcher.{key}={value} (--{directive})"
    for group in settings.groups:
        yield from ((topic, f"launcher.groups ({group})") for topic in ("constraint", "gpus", "partition"))
    for directive in settings.sbatch:
        name = directive.lstrip("-").partition("=")[0]
        topic = next((topic for topic, key, known, _ in named if known == name), "sbatch")
        yield topic, f"launcher.sbatch=[{directive}] (--{name})"
    for topic, key, directive, number in (
        ("time", "minutes", "time", settings.minutes),
        ("cpus", "threads_per_worker", "cpus-per-task", settings.threads_per_worker),
        ("nodes", "nodes", "nodes", settings.all_nodes),
        ("nodes", "workers", "ntasks-per-node", settings.all_workers),
    ):
        yield topic, f"launcher.{key}={number} (--{directive})"
