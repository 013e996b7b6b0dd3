"""Suggestions for a key that does not exist."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dtrain.errors import ConfigError
from dtrain.train.config import targets

__all__ = ["keys_of", "unknown"]

SECTIONS = ("train", "optim", "run", "mesh", "data", "model", "engine", "launcher", "sync")
"""Order of preference where several sections have a key of one name: ``lr`` is the optimizer's."""


def keys_of(node: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Every key below, dotted, sections included."""
    for key, child in node.items():
        if key == "_target_":
            continue
        yield f"{prefix}{key}"
        if isinstance(child, dict):
            yield from keys_of(child, f"{prefix}{key}.")


def unknown(
    key: str, chosen: Mapping[str, object], takes: Sequence[str] | None = None, target: str = ""
) -> ConfigError:
    """The error for an unknown key, with the nearest one, or all valid ones.

    ``takes``: the keywords of ``target``, to whose mapping the key would belong.
    """
    section = key.rpartition(".")[0]
    more = [f"{section}.{name}" for name in takes or ()]
    keys = list(dict.fromkeys([*keys_of(chosen), *more]))
    near = _nearest(key, keys, anywhere=takes is None)
    if near is not None:
        return ConfigError(f"there is no key {key}{targets.hint(near)}")
    if takes is not None:
        return ConfigError(f"there is no key {key} ({target} takes {', '.join(takes) or 'nothing'})")
    first = key.partition(".")[0] + "."
    within = [known for known in keys if known.startswith(first)] or [known for known in keys if "." not in known]
    return ConfigError(f"there is no key {key or 'without a name'} (there are {', '.join(within)})")


def _nearest(key: str, keys: Sequence[str], *, anywhere: bool) -> str | None:
    """The key that was probably meant; ``anywhere``: also in another section than the given one."""
    section, _, last = key.rpartition(".")
    top = key.partition(".")[0]
    rank = {name: place for place, name in enumerate(SECTIONS)}
    ordered = sorted(keys, key=lambda known: (known.partition(".")[0] != top, rank.get(known.partition(".")[0], 99)))
    named = [known for known in ordered if _name(known) == last]
    if named and (anywhere or named[0].startswith(top + ".")):
        return named[0]
    siblings = [known for known in ordered if known.rpartition(".")[0] == section]
    if section and siblings:
        near = targets.closest(last, map(_name, siblings)) or _short_for(last, map(_name, siblings))
        if near is None and not anywhere:
            return None
        if near is not None:
            return f"{section}.{near}"
    else:
        near = targets.closest(key, keys)
        if near is not None:
            return near
    if not anywhere:
        return None
    names = list(dict.fromkeys(map(_name, ordered)))
    near = _short_for(last, names) or targets.closest(last, names)
    return next((known for known in ordered if _name(known) == near), None)


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _short_for(name: str, candidates: Iterator[str] | Sequence[str]) -> str | None:
    """The candidate that abbreviates ``name``, or that it abbreviates (``lr``, ``learning_rate``); None if several."""

    def initials(words: str) -> str:
        return "".join(word[:1] for word in words.split("_"))

    matches = [
        candidate
        for candidate in candidates
        if ("_" in name and candidate == initials(name))
        or ("_" in candidate and name in (initials(candidate), candidate.partition("_")[0]))
    ]
    return matches[0] if len(set(matches)) == 1 else None
