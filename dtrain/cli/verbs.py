"""All verbs of ``dtrain``, in the order in which its help lists them."""

from __future__ import annotations

from typing import cast

from dtrain.cli import (
    Command,
    bench,
    cluster,
    compare,
    data,
    doctor,
    jobs,
    launch,
    log,
    members,
    plan,
    simulate,
    train,
    trained,
)

__all__ = ["COMMANDS"]

COMMANDS = cast("list[Command]", [
    train, trained, compare, launch, jobs, doctor, plan, bench, simulate, cluster, data, members, log,
])  # fmt: skip
