"""The default text with its validation windows in two halves: one to tune with, and one that is reported."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dtrain.train.data.text import SUFFIXES, ByteText, check_index, window

PARTS = ("tuning", "reported")


class HalvedText(ByteText):
    """`ByteText`; of the validation split the even windows ("tuning") or the odd ones ("reported").

    Raises ``ValueError`` for another ``part``.
    """

    def __init__(
        self, *, part: str, path: str | None = None, block: int = 128, split: str = "train",
        suffixes: Sequence[str] = SUFFIXES,
    ) -> None:  # fmt: skip
        if part not in PARTS:
            raise ValueError(f"part is {part!r}; choose {' or '.join(map(repr, PARTS))}")
        super().__init__(path=path, block=block, split=split, suffixes=suffixes)
        self._first, self._every = (PARTS.index(part), 2) if split == "validation" else (0, 1)
        self._description["part"] = part

    def __len__(self) -> int:
        return (super().__len__() - self._first + self._every - 1) // self._every

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        check_index(index, len(self))
        block = self.tokens_per_example
        return window(self._bytes, (self._first + index * self._every) * block, block)
