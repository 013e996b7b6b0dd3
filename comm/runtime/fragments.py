"""How a model is cut into fragments, and when each of them is exchanged.

A block is numbered by the first number in a name: ``blocks.3.attention.qkv.weight`` belongs to block 3. Fragments hold
whole blocks: every P-th one (strided) or neighbours (sequential). Parameters in no block (embeddings, last norm, head)
join the smallest fragment, or form one of their own if they are larger than that. Tied weights have one name.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Pattern: TypeAlias = Literal["strided", "sequential"]
FirstRound: TypeAlias = Literal["full", "early"]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Fragments:
    """How to cut a model. ``layers``: blocks in each fragment; 0: one fragment. ``patterns``: of names, by fragment.

    ``auto``: ``layers`` is chosen once steps and exchanges were measured; see `knobs`.
    """

    layers: int = 0
    pattern: Pattern = "strided"
    patterns: tuple[tuple[str, ...], ...] = ()
    staggered: bool = True
    first_round: FirstRound = "full"
    auto: bool = False

    def cut(self, shapes: Shapes) -> list[list[str]]:
        """The names in each fragment, every trained parameter once, none empty.

        Raises ``ValueError`` for a model without numbered blocks, and for patterns that leave out a parameter or name
        one twice.
        """
        if self.patterns:
            return _by_hand(self.patterns, shapes)
        if not self.layers:
            return [list(shapes)]
        return _by_blocks(self.layers, self.pattern, shapes)

    def due(self, step: int, count: int, every_steps: int, *, first: bool) -> list[int]:
        """The fragments that are exchanged after step ``step`` of a period of ``every_steps``, counted from 1.

        ``first``: it is the first period. ``first_round="full"``: each fragment's first exchange comes after a full
        period (the paper's schedule); "early": after a part of the first period, as in torchft.
        """
        early = self.first_round == "early" and self.staggered
        turns = range(1, count + 1) if early else range(count)
        offsets = [turn * every_steps // count if self.staggered else 0 for turn in turns]
        if first and not early:
            offsets = [0 if offset == 0 else every_steps + 1 for offset in offsets]
        return [number for number, offset in enumerate(offsets) if step == (offset or every_steps)]


WHOLE = Fragments()


def fragments(
    layers: int | Literal["auto"],
    *,
    pattern: Pattern = "strided",
    patterns: Sequence[Sequence[str]] = (),
    staggered: bool = True,
    first_round: FirstRound = "full",
) -> Fragments:
    """Check and make `Fragments`; see `streaming_diloco` for the arguments."""
    if layers != "auto" and (not isinstance(layers, int) or isinstance(layers, bool) or layers < 0):
        raise ValueError(f"layers_per_fragment is {layers!r}; give a whole number of blocks, 0 for all, or 'auto'")
    if pattern not in ("strided", "sequential"):
        raise ValueError(f"pattern is {pattern!r}; choose 'strided' or 'sequential'")
    if first_round not in ("full", "early"):
        raise ValueError(f"first_round is {first_round!r}; choose 'full' or 'early'")
    by_hand = tuple(tuple(names) for names in patterns)
    if any(not names for names in by_hand):
        raise ValueError("a fragment without a pattern would be empty; give every fragment at least one name")
    if layers == "auto":
        if by_hand:
            raise ValueError("layers_per_fragment='auto' counts blocks, and the fragments are named by hand; give one")
        return Fragments(1, pattern, by_hand, bool(staggered), first_round, auto=True)
    return Fragments(layers, pattern, by_hand, bool(staggered), first_round)


def _by_hand(patterns: Sequence[Sequence[str]], shapes: Shapes) -> list[list[str]]:
    cut = [[fqn for fqn in shapes if any(fnmatch.fnmatchcase(fqn, p) for p in names)] for names in patterns]
    counts = {fqn: sum(fqn in fqns for fqns in cut) for fqn in shapes}
    missing = [fqn for fqn, count in counts.items() if not count]
    twice = [fqn for fqn, count in counts.items() if count > 1]
    if missing or twice:
        wrong = f"{missing[0]} is in none" if missing else f"{twice[0]} is in two"
        raise ValueError(
            f"the fragments must hold every trained parameter once: {wrong} of {[list(names) for names in patterns]} "
            f"({len(missing)} parameters in none, {len(twice)} in more than one)"
        )
    empty = [list(names) for names, fqns in zip(patterns, cut, strict=True) if not fqns]
    if empty:
        raise ValueError(f"no parameter matches the fragment {empty[0]}; the names are like {next(iter(shapes))}")
    return cut


def _by_blocks(layers: int, pattern: Pattern, shapes: Shapes) -> list[list[str]]:
    blocks: dict[tuple[str, int], list[str]] = {}
    rest: list[str] = []
    for fqn in shapes:
        numbered = re.match(r"(?:(.*?)\.)?(\d+)\.", fqn)
        if numbered:
            blocks.setdefault((numbered[1] or "", int(numbered[2])), []).append(fqn)
        else:
            rest.append(fqn)
    if not blocks:
        raise ValueError(
            f"layers_per_fragment={layers} counts numbered blocks, and no parameter has a number in its name (they are "
            f"like {next(iter(shapes), 'nothing')}); name the fragments by hand: "
            "fragments_by_name=[['embedding*'], ['body.*']]"
        )
    count = math.ceil(len(blocks) / layers)
    cut: list[list[str]] = [[] for _ in range(count)]
    for place, names in enumerate(blocks.values()):
        cut[place % count if pattern == "strided" else place // layers].extend(names)
    smallest = min(range(count), key=lambda number: _elements(cut[number], shapes))
    if _elements(rest, shapes) > _elements(cut[smallest], shapes):
        cut.append(rest)
    else:
        cut[smallest].extend(rest)
    return cut


def _elements(names: Sequence[str], shapes: Shapes) -> int:
    return sum(math.prod(shapes[fqn]) for fqn in names)
