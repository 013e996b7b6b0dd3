"""A Slurm job, watched from outside. The script's own files record how it ended, so no accounting is needed.

Slurm's job ids begin again with every new cluster, and a controller forgets. So an id is trusted only where the job
that has it now writes the log that was requested at the submission.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, TypeAlias

from dtrain.launchers.environment import CLUSTER
from dtrain.launchers.job import Facts, Job, State
from dtrain.launchers.slurm.client import SlurmError, ask, cluster, job_line, job_record, job_state, since

__all__ = ["Place", "SlurmJob", "place_of"]

Place: TypeAlias = Literal["here", "elsewhere", "gone"]
"""Of a job's cluster: asked from here; another one; gone, although its name may be in use again."""


def place_of(facts: Facts) -> Place:
    """Where a job's cluster is, seen from here."""
    current = cluster()
    if facts.cluster in ("", current.name):
        # One of `dtrain cluster` may have come up again under its old name.
        same = facts.came_up in (0.0, current.came_up) and current.came_up <= facts.submitted
        return "here" if same else "gone"
    if facts.came_up and since(facts.cluster) != facts.came_up:
        return "gone"
    return "elsewhere"


class SlurmJob(Job):
    """A job, or an element of a job array (its id is then 12_3)."""

    scheduled: ClassVar[bool] = True
    _ours = False  # confirmed by Slurm: ids are not reused while the cluster is up

    @classmethod
    def located(cls, facts: Facts) -> Facts:
        """With the cluster that Slurm's commands talk to from here."""
        current = cluster()
        return dataclasses.replace(facts, cluster=current.name or facts.cluster, came_up=current.came_up)

    def is_here(self) -> bool:
        """Whether its cluster is the one that is asked from here."""
        return place_of(self.facts) == "here"

    def cluster_is_up(self) -> bool:
        """Whether a cluster of `dtrain cluster` is up, by its files."""
        return bool(self.facts.came_up) and since(self.facts.cluster) == self.facts.came_up

    def ask(self) -> State:
        """The state as Slurm knows it; lost where its id is another job's now, or its cluster is gone."""
        place = place_of(self.facts)
        if place == "elsewhere" and cluster().name:
            raise SlurmError(self._elsewhere())
        if place == "gone" or not self._known():
            return "lost"
        return job_state(self.id)

    def cancel(self) -> None:
        """``scancel``: the ranks get SIGTERM, and SIGKILL after the site's KillWait. It is not requeued.

        Raises ``SlurmError`` where the id is not, or is no longer, this job's.
        """
        self._must_be_ours()
        ask("scancel", self.id)

    def signal(self, name: str) -> None:
        """Send a signal, such as "TERM" or "USR2", to every rank. Raises as `cancel`."""
        self._must_be_ours()
        ask("scancel", f"--signal={name}", self.id)

    def nodes(self) -> str:
        """The nodes that it runs on, in Slurm's notation; empty while it waits."""
        nodes = self._record().get("NodeList", "")
        return "" if nodes == "(null)" else nodes

    def waits_for(self) -> str:
        """Slurm's reason why it has not started; empty once it has."""
        record = self._record()
        reason = record.get("Reason", "") if record.get("JobState") == "PENDING" else ""
        return "" if reason in ("None", "(null)") else reason

    def _record(self) -> dict[str, str]:
        return job_record(self.id) if place_of(self.facts) == "here" and self._known() else {}

    def _known(self) -> bool:
        """Whether Slurm's job of this id is this one, or Slurm has forgotten it."""
        if self._ours:
            return True
        line = job_line(self.id)
        self._ours = bool(line) and self._is_in(line)
        return self._ours or not line

    def _is_in(self, line: str) -> bool:
        named = f" JobName={self.facts.name} " in line
        if "%" in str(self.folder):  # a placeholder of Slurm's
            return named
        logs = [f" StdOut={self.folder}/logs/batch.log"]
        if "_" in self.id:
            # An element that waits has no id of its own yet, so only the folder of an array's logs identifies it.
            logs = [f" StdOut={parent / self.facts.name}-array/batch-" for parent in self.folder.parents]
        return named and any(log in line for log in logs)

    def _must_be_ours(self) -> None:
        place = place_of(self.facts)
        if place == "elsewhere":
            raise SlurmError(self._elsewhere())
        if place == "gone":
            raise SlurmError(f"job {self.id} ({self.folder}) went with its cluster {self.facts.cluster}; nothing runs")
        line = job_line(self.id)
        if not line:
            raise SlurmError(f"Slurm does not know job {self.id} ({self.folder}) any longer: it has ended")
        if not self._is_in(line):
            raise SlurmError(
                f"Slurm's job {self.id} is another one now than that of {self.folder}, and is left alone; "
                f"scontrol show job {self.id} says whose it is"
            )

    def _elsewhere(self) -> str:
        other, here = self.facts.cluster, cluster().name or "no cluster"
        how = f"set {CLUSTER}={other}" if self.facts.came_up else "go to its login host"
        return f"job {self.id} ({self.folder}) is of cluster {other}, and this is {here}: {how}"
