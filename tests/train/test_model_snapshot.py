"""What a checkpoint keeps of a sync, and what it need not have."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from dtrain import every_step
from dtrain.compress import error_feedback, topk
from dtrain.errors import ResumeError
from dtrain.plans import accordion
from dtrain.testing.replicas import Replicas
from dtrain.train.checkpoint.state import RankState
from dtrain.train.model_snapshot import capture, put_back


def without(state: RankState, section: str) -> RankState:
    kept = {name: tensors for name, tensors in state.sections.items() if name != section}
    kinds = {name: kind for name, kind in state.kinds.items() if name != section}
    return dataclasses.replace(state, sections=kept, kinds=kinds)


def test_the_sums_of_a_plan_begin_anew_where_a_checkpoint_has_none() -> None:
    """Those of earlier revisions have none; what a compression keeps is never left out."""
    plan = accordion(error_feedback(topk(0.5)), error_feedback(topk(0.1)), every=5)
    replicas = Replicas(every_step(compress=plan), 1)
    replicas.train(3)
    (attached,), model = replicas.attached, nn.Module()
    state = capture(attached, model)
    put_back(without(state, "sync.accumulated"), attached, model)
    assert attached.steps == 3 and replicas.kept(0, "residual") and not replicas.kept(0, "accumulated")
    put_back(state, attached, model)
    assert replicas.kept(0, "accumulated")
    with pytest.raises(ResumeError, match=r"the checkpoint holds \['accumulated'\] state of its sync"):
        put_back(without(state, "sync.residual"), attached, model)
    replicas.close()
