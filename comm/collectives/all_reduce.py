"""The mean by one native all-reduce, for linear compressors of one dtype. The transport orders the summation.

Bytes: those of a ring, 2 (W - 1) / W of the encoded size; a weighted mean, and one with ``present``, send one element
more. There are no votes: a rank whose values cannot be used sends NaN.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dtrain.comm.collectives.two_phase import (
    Combined,
    all_finite,
    all_staged_finite,
    all_usable,
    coder_of,
    cut,
    device_of,
)
from dtrain.comm.layout import Named
from dtrain.comm.ops import AllReduce, Flow, Payload
from dtrain.comm.plans.plan import Plan
from dtrain.comm.seeds import Key
from dtrain.comm.state import State


def native_mean(
    values: Named,
    plan: Plan,
    key: Key,
    state: State,
    weight: float | None = None,
    present: bool | None = None,
    usable: bool = True,
) -> Flow[Combined]:
    """The mean of flat ``values`` over the peers. New feedback state is staged in ``state``.

    ``weight``, ``present`` and ``usable``: as in `two_phase`; weights for payloads in fp32.
    """
    chosen = {fqn: plan.of(fqn, key.step) for fqn in values}
    if weight is not None or not usable or any(compression.feedback.kinds for compression in chosen.values()):
        usable = usable and all_usable(values, chosen)
    if weight is not None and not usable:
        weight = 0.0
    payloads: list[Payload] = []
    for fqn, value in values.items():
        coder, feedback = coder_of(chosen[fqn], value), chosen[fqn].feedback
        if weight == 0:
            feedback.carry_over(fqn, value, state)
            payloads.append(coder.encode(torch.zeros_like(value).view(1, -1), replace(key, fqn=fqn)))
        else:
            payloads.append(feedback.encode(fqn, value, coder, 1, replace(key, fqn=fqn), state))
    sent = tuple(tensor for payload in payloads for tensor in payload)
    if not (usable and all_staged_finite(chosen, state)) and weight != 0:
        sent = tuple(torch.full_like(tensor, torch.nan) for tensor in sent)
    reply, finite, present = yield from _reduced(sent, weight, present, device_of(values))
    results = {}
    for (fqn, value), payload in zip(values.items(), cut(reply, payloads), strict=True):
        decoded = coder_of(chosen[fqn], value).decode(payload, value.numel(), replace(key, fqn=fqn).shared)[0]
        results[fqn] = chosen[fqn].feedback.result(fqn, decoded, state)
    return Combined(results, finite and all_finite(results), present is not False)


def _reduced(
    sent: Payload, weight: float | None, present: bool | None, device: torch.device
) -> Flow[tuple[Payload, bool, bool | None]]:
    """The mean of ``sent``, by ``weight`` if there is one; whether any rank counted; and whether any was present."""
    if weight is None and present is None:
        return (yield AllReduce(sent, "mean")), True, None
    if weight is None:
        like = sent[0] if sent else torch.empty(0, device=device)
        *means, share = yield AllReduce((*sent, like.new_full((1,), float(bool(present)))), "mean")
        return tuple(means), True, float(share) > 0
    weight_tensor = torch.tensor([weight], device=device)
    *sums, total = yield AllReduce((*(weight * tensor for tensor in sent), weight_tensor), "sum")
    return tuple(tensor.div_(total) for tensor in sums), float(total) > 0, present
