"""The words of a command line, ``key=value``, and their values: by hydra's grammar, unless the key holds text.

Text is everything after the first ``=``, verbatim: paths contain ``~ = , ( )`` and letters of any language, Slurm's
settings brackets, commas and ampersands, all of which are syntax to the grammar. Quotes around the whole text are
stripped. A list of text is split at its commas; the shell may have stripped the quotes of its elements.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from dtrain.errors import ConfigError

__all__ = ["Kind", "Word", "alternatives", "read", "value_of", "written"]

Kind = Literal["text", "optional text", "texts", "unknown", "value"]
"""What a key holds. ``texts``: a list of text. ``unknown``: not declared, so text if it parses as nothing else."""

FORM = re.compile(r"(?P<sign>[+~]{0,2})(?P<key>[^=@\s'\"\[\]{}(),]*)(?P<package>@[^=\s'\"]*)?", re.DOTALL)
CLOSING = {"[": "]", "(": ")", "{": "}"}
UNREAD: Any = object()
MOST_VALUES = 10_000


@dataclass(frozen=True)
class Word:
    """A parsed word: ``+key@package=text``. ``value``: what a file sets instead of text; ``origin``: that file."""

    given: str
    sign: str
    key: str
    package: str | None
    text: str
    value: object = UNREAD
    origin: str = ""

    @property
    def removes(self) -> bool:
        """Whether it removes its key: ``~key``."""
        return "~" in self.sign

    @property
    def from_file(self) -> bool:
        """Whether it comes from a file, not from the command line."""
        return self.value is not UNREAD


def read(given: str) -> Word:
    """Parse a word.

    >>> read("data.path=~/a=b").text
    '~/a=b'

    Raises:
        ConfigError: it has no ``=``, or no valid key before it.
    """
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"cannot read {given!a}: it is not UTF-8, in which everything is written down; give the file or folder "
            "another name, or a link to it"
        ) from error
    before, equals, text = given.partition("=")
    form = FORM.fullmatch(before)
    if form is None or (not equals and "~" not in form["sign"]):
        raise ConfigError(f"cannot read {given!r} (an override is written key=value)")
    package = form["package"]
    return Word(given, form["sign"], form["key"], package[1:] if package else None, text)


def written(key: str, text: str) -> str:
    """The word that sets ``key`` to this text, quoted where necessary.

    >>> written("run.dir", "runs/a=b"), written("run.dir", "it's"), written("run.dir", "'x'")
    ('run.dir=runs/a=b', "run.dir=it's", "run.dir='\\\\'x\\\\''")
    """
    plain = text != "null" and not re.search(r"\s", text) and text[:1] not in ("'", '"')
    return f"{key}={text if plain else _quoted(text)}"


def value_of(word: Word, kind: Kind, expected: str | None) -> object:
    """The value of a word for a key of this kind. ``expected``: a description of its valid values, if known.

    Raises:
        ConfigError: it cannot be parsed, or stands for several values.
    """
    if word.from_file:
        elements = word.value if kind == "texts" and isinstance(word.value, list) else [word.value]
        if kind not in ("value", "unknown") and any(isinstance(element, bool | float) for element in elements):
            raise ConfigError(f'{word.key} must be text, but is {word.value!r}; put it in quotes: {word.key}: "..."')
        return word.value
    if kind == "texts" and word.text.lstrip().startswith("["):
        return _texts(word)
    if kind in ("text", "optional text"):
        unquoted = _unquoted(word.text)
        return None if unquoted is None and word.text == "null" else word.text if unquoted is None else unquoted
    if kind == "texts" and not word.text.lstrip().startswith("{"):
        raise ConfigError(f"{word.given}: {word.key} is a list, which is written '{word.key}=[\"{word.text}\"]'")
    try:
        override = _parsed(word)
    except HydraException as error:
        if kind == "unknown" and word.text.lstrip()[:1] not in ("[", "{"):
            return word.text
        raise _unreadable(word, kind, expected) from error
    if override.is_sweep_override():
        raise ConfigError(
            f"{word.given}: a key has one value; a list is written {word.key}=[...], text with commas "
            f"\"{word.key}='...'\", and a run for each value is started by: dtrain train -m"
        )
    value = cast(object, override.value())
    if huge := huge_integer(value):
        must = f"{word.key} must be {expected}" if expected else word.key
        raise ConfigError(f"{must}: an integer has at most 64 bits, but is {huge}")
    return value


def huge_integer(value: object) -> str:
    """The first integer in it that has more than 64 bits, shortened; empty if there is none.

    No key takes one: as a float or in a tensor it raises ``OverflowError``.
    """
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        digits = hex(value) if value.bit_length() > 8_192 else str(value)  # str() refuses thousands of digits
        return digits if len(digits) <= 24 else f"{digits[:10]}... ({len(digits):,} digits)"
    inner: Iterable[object] = ()
    if isinstance(value, Mapping):
        inner = (*value, *value.values())
    elif isinstance(value, list | tuple):
        inner = value
    return next(filter(None, map(huge_integer, inner)), "")


def alternatives(word: Word, kind: Kind, loader: ConfigLoader) -> list[str]:
    """The values of a sweep's word, each as text; one for a word that has one value.

    ``loader`` expands ``glob(...)``.

    Raises:
        ConfigError: it cannot be parsed, or is no finite set of values.
    """
    if word.removes:
        return [word.text]
    if kind in ("text", "optional text", "texts"):
        return [value.strip() for value in _cut(word.text)]
    try:
        override = _parsed(word, loader)
    except HydraException as error:
        if kind == "unknown":
            return [value.strip() for value in _cut(word.text)]
        raise _unreadable(word, kind, None) from error
    if not override.is_sweep_override():
        return [word.text]
    if override.is_interval_sweep():
        raise ConfigError(f"{word.given}: an interval has no end of values; name them, as in {word.key}=0.1,0.2")
    if getattr(override._value, "shuffle", False):
        raise ConfigError(f"{word.given}: a sweep has one order, by which the same command goes on; leave shuffle out")
    values = [str(value) for value in itertools.islice(override.sweep_string_iterator(), MOST_VALUES + 1)]
    if not values:
        raise ConfigError(f"{word.given}: nothing is called like this; name the values: {word.key}=a,b,c")
    if len(values) > MOST_VALUES:
        raise ConfigError(f"{word.given}: these are more than {MOST_VALUES:,} values")
    return values


def _parsed(word: Word, loader: ConfigLoader | None = None) -> Override:
    """Raises ``HydraException`` for a syntax error."""
    package = f"@{word.package}" if word.package is not None else ""
    try:
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([f"{word.key}{package}={word.text}"])[0]
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets as deep
        raise HydraException(str(error)) from error
    return replace(parsed, input_line=word.given)


def _unreadable(word: Word, kind: Kind, expected: str | None) -> ConfigError:
    must = f"{word.key} must be {expected}" if expected else f"{word.text!r} is no value"
    way = f"text goes in quotes, and the whole word in others for the shell: \"{word.key}='...'\""
    if kind == "texts" or word.text.lstrip()[:1] in ("[", "{"):
        example = '{a: 1, b: "c=2"}' if word.text.lstrip()[:1] == "{" else '["a=1","b"]'
        way = (
            "what is opened must be closed, text with signs in it goes in quotes, and the whole word in single quotes, "
            f"as the shell takes others away: '{word.key}={example}'"
        )
    return ConfigError(f"cannot read {word.given!r}: {must}; {way}")


def _texts(word: Word) -> list[str]:
    """The elements of ``[a,"b",c=d]``.

    Raises:
        ConfigError: it is not closed, has empty elements, or is ambiguous without the quotes that the shell stripped.
    """
    text = word.text.strip()
    if _end(text, 0) != len(text) - 1:
        raise _unreadable(word, "texts", "a list")
    if not text[1:-1].strip():
        return []
    elements = [element.strip() for element in _cut(text[1:-1])]
    unquoted = [_unquoted(element) for element in elements]
    for before, after in itertools.pairwise(elements):
        if "=" in before and "=" not in after and after[:1] not in ("-", "'", '"') and before[:1] not in ("'", '"'):
            raise ConfigError(
                f"cannot read {word.given!r}: {after!r} may belong to {before!r}, or be an element of its own; the "
                f"shell takes quotes away, so the word goes in single quotes: '{word.key}=[\"{before},{after}\"]', or "
                f'\'{word.key}=["{before}","{after}"]\''
            )
    if any(not element for element in elements):
        raise ConfigError(f'cannot read {word.given!r}: an element is empty; leave its comma out, or write ""')
    return [element if plain is None else plain for element, plain in zip(elements, unquoted, strict=True)]


def _quoted(text: str) -> str:
    """Quote text for the grammar, in which backslashes count only before a quote."""
    text = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", text)
    return "'" + re.sub(r"\\+\Z", lambda match: match[0] * 2, text) + "'"


def _unquoted(text: str) -> str | None:
    """The text between the quotes; None if ``text`` is not quoted as a whole."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return None
    try:
        override = OverridesParser.create().parse_overrides([f"k={text}"])[0]
    except (HydraException, RecursionError):
        return None
    if override.is_sweep_override() or not isinstance(override._value, QuotedString):
        return None
    return str(override.value())


def _cut(text: str) -> list[str]:
    """Split at commas outside quotes and brackets. An opening sign that is not closed is an ordinary character.

    >>> _cut("'/a, b',/c[1,2],d(e")
    ["'/a, b'", '/c[1,2]', 'd(e']
    """
    parts, start, at = [], 0, 0
    while at < len(text):
        end = None
        if text[at] in "'\"" and not text[start:at].strip():
            quote = re.escape(text[at])
            whole = re.compile(rf"{quote}(?:\\.|[^\\{quote}])*{quote}(?=\s*(?:,|\Z))", re.DOTALL)
            match = whole.match(text, at)
            end = match.end() - 1 if match else None
        elif text[at] in CLOSING:
            end = _end(text, at)
        elif text[at] == ",":
            parts.append(text[start:at])
            start = at + 1
        at = (at if end is None else end) + 1
    return [*parts, text[start:]]


def _end(text: str, start: int) -> int | None:
    """Where the bracket at ``start`` is closed; None if it is not. Brackets in quotes do not count."""
    open_: list[str] = []
    quote = ""
    for at in range(start, len(text)):
        letter = text[at]
        if quote:
            quote = "" if letter == quote and text[at - 1] != "\\" else quote
        elif letter in "'\"" and open_ and text[at - 1] in "[,( {":
            quote = letter
        elif letter in CLOSING:
            open_.append(CLOSING[letter])
        elif open_ and letter == open_[-1]:
            open_.pop()
            if not open_:
                return at
    return None
