"""A Slurm job, watched from outside. The script's own files say how it ended, so no accounting is needed."""

from __future__ import annotations

from dtrain.launchers.job import Job, State
from dtrain.launchers.slurm.client import ask, job_record, job_state

__all__ = ["SlurmJob"]


class SlurmJob(Job):
    """A job, or an element of a job array (its id is then 12_3)."""

    def ask(self) -> State:
        """The state as Slurm knows it."""
        return job_state(self.id)

    def cancel(self) -> None:
        """``scancel``: the ranks get SIGTERM, and SIGKILL after the site's KillWait. It is not requeued."""
        ask("scancel", self.id)

    def signal(self, name: str) -> None:
        """Send a signal, such as "TERM" or "USR2", to every rank."""
        ask("scancel", f"--signal={name}", self.id)

    def nodes(self) -> str:
        """The nodes that it runs on, in Slurm's notation, or why it waits."""
        record = job_record(self.id)
        nodes = record.get("NodeList", "")
        return nodes if nodes and nodes != "(null)" else record.get("Reason", "")
