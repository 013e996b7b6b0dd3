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
    simulate,
    train,
    trained,
)

COMMANDS = cast("list[Command]", [
    train, trained, compare, launch, jobs, doctor, bench, simulate, cluster, data, members, log,
])  # fmt: skip
