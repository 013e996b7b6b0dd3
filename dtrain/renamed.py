"""Names of version 0.1.0 from before its folders were reordered, and their current ones.

On the command line an old name is refused with the new one; in a stored configuration it is translated.
"""

from __future__ import annotations

from collections.abc import Mapping

_COMPRESS = (
    "cast", "compeft", "econtrol", "ef21", "error_feedback", "powersgd", "projection", "quantize", "randk", "sign",
    "terngrad", "topk",
)  # fmt: skip
RENAMED: Mapping[str, str] = {
    **{f"dtrain.{name}": f"dtrain.compress.{name}" for name in _COMPRESS},
    **{f"dtrain.{name}": f"dtrain.outer.{name}" for name in ("adam", "fedhyper", "nesterov", "sgd")},
    **{f"dtrain.{name}": f"dtrain.plans.{name}" for name in ("accordion", "after", "by_layer", "ef21w", "lgreco")},
    "dtrain.mean": "dtrain.aggregators.mean",
    "dtrain.data.text.ByteText": "dtrain.train.data.text.ByteText",
    "dtrain.data.tokens.TokenFile": "dtrain.train.data.tokens.TokenFile",
    "dtrain.models.transformer.Transformer": "dtrain.train.models.transformer.Transformer",
}

CHOICES: Mapping[str, str] = {
    f"sync={name}": f"sync=every_step compress={name}"
    for name in ("bf16", "int4_ef", "int8", "int8_ef", "powersgd_ef", "sign_ef", "topk_ef")
}
"""Choices that stood for two others."""
