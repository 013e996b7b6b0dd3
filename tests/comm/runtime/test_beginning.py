"""Attaching sends a model part by part: there is no room for a second one where models are large."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dtrain import co2, diloco, every_step, slowmo, streaming_diloco
from dtrain.comm import layout
from dtrain.comm.ops import Op, payload_bytes
from dtrain.comm.runtime.method import Sync
from dtrain.comm.transports.threads import Seat
from dtrain.comm.transports.transport import CompletedWork
from dtrain.testing.replicas import Replicas, equal
from tests.comm.zoo import named

MESSAGE, LARGEST, WORLD = 64, 150, 2
SIZES = [10, 40, 30, LARGEST, 5, 64, 64, 1, 20] * 3

SPECS: dict[str, Callable[[], Sync]] = {
    "every_step": every_step,
    "diloco": lambda: diloco(every_steps=4),
    "sharded": lambda: diloco(every_steps=4, outer_state="sharded"),
    "streaming": lambda: streaming_diloco(every_steps=4, overlap_steps=1),
    "slowmo": lambda: slowmo(every_steps=4),
    "co2": lambda: co2(every_steps=4),
}


@pytest.mark.parametrize("name", SPECS)
def test_no_op_of_the_beginning_holds_more_than_a_message_and_a_parameter(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    issue = Seat.issue

    def noted(seat: Seat, op: Op) -> CompletedWork:
        sent.append(payload_bytes(op.payload))
        return issue(seat, op)

    monkeypatch.setattr(Seat, "issue", noted)
    monkeypatch.setattr(layout, "MESSAGE", MESSAGE)
    start = named(5, SIZES)
    replicas = Replicas(SPECS[name](), WORLD, start=start)
    assert max(sent) <= 4 * (MESSAGE + LARGEST) < 4 * sum(SIZES)
    assert sum(sent) >= 4 * sum(SIZES)
    assert all(equal(replicas.live(rank), start) for rank in range(WORLD))


def test_a_model_goes_in_some_thirty_parts_at_most() -> None:
    """DeepSpeed takes written values over for the whole model each time."""
    shapes = {f"w{number}": (layout.MESSAGE,) for number in range(200)}
    groups = layout.in_messages(shapes)
    assert [name for group in groups for name in group] == list(shapes) and len(groups) <= 33
    assert torch.tensor([len(group) for group in groups]).max() <= 7
