"""The words of `dtrain train` for a sync that is called by one name."""

from __future__ import annotations

from dtrain.train.config.choices import folder


def sync_words(name: str) -> tuple[str, ...]:
    """Of a sync, or of the mean of the gradients at every step under a compressor.

    >>> sync_words("diloco"), sync_words("int8_ef")
    (('sync=diloco',), ('sync=every_step', 'compress=int8_ef'))
    """
    if (folder() / "sync" / f"{name}.yaml").exists():
        return (f"sync={name}",)
    return "sync=every_step", f"compress={name}"
