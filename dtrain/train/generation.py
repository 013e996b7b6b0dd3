"""Text from a trained model: its tokenizer, and sampling token by token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError
from dtrain.extras import require

__all__ = ["Codec", "Sampling", "continued"]


@dataclass(frozen=True)
class Codec:
    """Text to tokens, and back."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]

    @classmethod
    def of(cls, tokenizer: Mapping[str, object]) -> Codec:
        """As a data set describes its tokenizer: ``{"name": "bytes"}``, or the path of a tokenizer.json and its sha256.

        Raises:
            ConfigError: there is no description, the file is missing or another one, or the package is.
        """
        name = tokenizer.get("name")
        if not name:
            raise ConfigError(
                "nothing says how text becomes tokens here: the run's data set has no tokenizer; give one: "
                "tokenizer=bytes, or tokenizer=FILE of a tokenizer.json"
            )
        if name == "bytes":
            return cls(
                lambda text: list(text.encode("utf-8", "surrogateescape")),
                lambda tokens: bytes(token for token in tokens if token < 256).decode("utf-8", "replace"),
            )
        require(["tokenizers"])
        from tokenizers import Tokenizer

        try:
            content = Path(str(name)).expanduser().read_bytes()
            loaded: Any = Tokenizer.from_buffer(content)
        except OSError as error:
            raise ConfigError(
                f"the tokenizer {name} of the run's data cannot be read: {error.strerror}; put it back, or say where a "
                "copy is: tokenizer=FILE"
            ) from error
        except Exception as error:  # the package raises bare Exception for a file that it cannot parse
            raise ConfigError(f"{name} is no tokenizer.json of the package tokenizers: {error}") from error
        wanted = tokenizer.get("sha256")
        if wanted and wanted != (actual := hashlib.sha256(content).hexdigest()):
            raise ConfigError(
                f"{name} is not the tokenizer that the run's data were made with: its SHA-256 is {actual[:16]}..., "
                f"theirs was {str(wanted)[:16]}...; bring that file back"
            )
        return cls(
            lambda text: list(loaded.encode(text, add_special_tokens=False).ids),
            lambda tokens: str(loaded.decode(list(tokens), skip_special_tokens=False)),
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """``temperature`` 0 takes the most likely token; ``top_k``: only the k most likely are drawn from, all for 0.

    Raises ``ValueError`` for values out of range.
    """

    max_tokens: int = 200
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; give at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; give 0 (the most likely token) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give 1 or more, or 0 to draw from all tokens")

    def choose(self, scores: Tensor, generator: torch.Generator) -> int:
        """A token by its score: ``[vocabulary]``."""
        scores = scores.detach().float().cpu()
        if not self.temperature:
            return int(scores.argmax())
        if 0 < self.top_k < scores.numel():
            lowest = scores.topk(self.top_k).values[-1]
            scores = scores.masked_fill(scores < lowest, float("-inf"))
        probabilities = (scores / self.temperature).softmax(dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=generator))


def continued(
    model: nn.Module, prompt: Sequence[int], sampling: Sampling, *, vocab_size: int | None = None
) -> Iterator[int]:
    """The tokens that ``model`` appends to ``prompt``, one by one; the same ones for the same seed.

    ``model.logits(tokens)`` gives scores ``[1, length, vocabulary]``; it sees the last ``model.max_length`` tokens.
    ``vocab_size``: that of the data, where the model's is larger. All of the context is read again for each token.

    Raises:
        ConfigError: the model has no ``logits``, or the prompt is empty or has tokens outside of the vocabulary.
    """
    logits = getattr(model, "logits", None)
    if not callable(logits):
        raise ConfigError(
            f"{type(model).__name__} has no logits(tokens) -> [examples, length, vocabulary], which generation needs; "
            "add that method to the model"
        )
    if not prompt:
        raise ConfigError("the text is empty, and a model continues what there is; give at least one character")
    window = int(getattr(model, "max_length", 0) or 0)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = list(prompt)
    for _ in range(sampling.max_tokens):
        seen = torch.tensor([tokens[-window:]], device=device)
        with torch.no_grad():
            scores = _scores(logits, seen, tokens)[0, -1, :vocab_size]
        tokens.append(sampling.choose(scores, generator))
        yield tokens[-1]


def _scores(logits: Callable[[Tensor], Tensor], seen: Tensor, tokens: Sequence[int]) -> Tensor:
    try:
        return logits(seen)
    except IndexError as error:
        raise ConfigError(
            f"the text has the token {max(tokens)}, which the model does not know; the tokenizer is another one than "
            "the data's"
        ) from error
