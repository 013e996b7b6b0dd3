"""The built-in text, whose examples take their time, so that signals fall within steps."""

from __future__ import annotations

import os
import time

from torch import Tensor

from dtrain.train.data.text import ByteText

SECONDS = "DTRAIN_TEST_SECONDS_PER_EXAMPLE"


class SlowText(ByteText):
    """``ByteText`` with a pause before each example, if the environment asks for one."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        time.sleep(float(os.environ.get(SECONDS, "0")))
        return super().__getitem__(index)
