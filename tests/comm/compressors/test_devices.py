"""Compressors stay on the device of their rows and do not look at values, for which a GPU's stream would be waited for.

On the meta device, whose tensors have no values: whatever copies some to the CPU, or asks for one, raises.
"""

from __future__ import annotations

import pytest
import torch

from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.seeds import Key
from tests.comm.zoo import COMPRESSORS

KEY = Key(0, 0, 1, "w", "send")
CHECKS_POSITIONS = {"top-k", "top-k, 8-bit values", "compeft", "compeft, sparse"}
"""Those whose `decode` refuses what is no code of ascending positions, once for each tensor."""


@pytest.mark.parametrize("width", [0, 1, 61, 600])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_nothing_leaves_the_device(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compressor, own = COMPRESSORS[name], Key.generator
    monkeypatch.setattr(Key, "generator", lambda key, device: None if device.type == "meta" else own(key, device))
    sent = compressor.encode(torch.empty(3, width, device="meta"), KEY)
    expected = compressor.encode(torch.ones(3, width), KEY)
    assert [(t.shape, t.dtype) for t in sent] == [(t.shape, t.dtype) for t in expected]
    assert {tensor.device.type for tensor in sent} == {"meta"}
    if name in CHECKS_POSITIONS and width:
        with pytest.raises(RuntimeError, match="meta"):
            compressor.decode(sent, width, KEY.shared)
        return
    decoded = compressor.decode(sent, width, KEY.shared)
    assert (decoded.shape, decoded.dtype, decoded.device.type) == ((3, width), torch.float32, "meta")


@pytest.mark.parametrize(
    "name", [name for name, compressor in COMPRESSORS.items() if hasattr(compressor, "encode_sum")]
)
def test_one_pass_stays_there_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compressor: Compressor = COMPRESSORS[name]
    monkeypatch.setattr(Key, "generator", lambda key, device: None)
    rows = torch.empty(3, 61, device="meta")
    both = compressor.encode_sum(rows, rows)  # type: ignore[attr-defined]
    tensors = [*compressor.encode_mean(compressor.encode(rows, KEY), 61, KEY)[1]]  # type: ignore[attr-defined]
    if both is not None:
        tensors += [*both[0], both[1]]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
