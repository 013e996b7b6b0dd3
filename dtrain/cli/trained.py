"""``dtrain eval``, ``dtrain generate`` and ``dtrain export``: what is done with the model of a run."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.cli import add_verb
from dtrain.errors import ConfigError
from dtrain.extras import OF_LAUNCHING, require
from dtrain.nearest import closest, hint

if TYPE_CHECKING:
    from torch import nn

    from dtrain.cli import Verbs
    from dtrain.train.initial_model import OfTheData

RUN = "a run folder that has ended, or one of its checkpoints: RUN/checkpoints/step-N"

EVAL = """\
settings:
  data=... data.path=...   other data than the run's, as for dtrain train
  examples=0               so many of the validation split, spread evenly; 0: all of them
  batch_size=16            examples in a forward pass

examples:
  dtrain eval runs/x                                 dtrain eval runs/x/checkpoints/step-0000000100 examples=64
  dtrain eval runs/x data=tokens data.path=tokens/   dtrain eval runs/x --json
"""
GENERATE = """\
settings:
  max_tokens=200    how many are appended
  temperature=1.0   0: the most likely token each time
  top_k=0           draw from the k most likely only; 0: from all
  seed=0            the same text again for the same seed
  tokenizer=FILE    a tokenizer.json, or bytes; that of the run's data by default

example:
  dtrain generate runs/x "def main(" max_tokens=100 temperature=0.8 top_k=40
"""
EXPORT = """\
What is written loads in transformers: AutoModelForCausalLM.from_pretrained(FOLDER), in fp32, with the tokenizer of
model.path. Of a run with LoRA it is an adapter: PeftModel.from_pretrained(base, FOLDER).

example:
  dtrain export runs/x --hf exported/
"""


def add(verbs: Verbs) -> None:
    """Add ``eval``, ``generate`` and ``export``."""
    evaluate = add_verb(verbs, "eval", does="measure the model of a run: loss, perplexity, bits per byte", epilog=EVAL)
    evaluate.add_argument("trained", metavar="RUN", help=RUN)
    evaluate.add_argument("--json", action="store_true", help="print the figures as JSON")
    evaluate.add_argument("words", nargs="*", metavar="SETTING", help="key=value")
    evaluate.set_defaults(run=_evaluate)
    generate = add_verb(verbs, "generate", does="continue a text with the model of a run", epilog=GENERATE)
    generate.add_argument("trained", metavar="RUN", help=RUN)
    generate.add_argument("text", metavar="TEXT", help="what is continued")
    generate.add_argument("words", nargs="*", metavar="SETTING", help="key=value")
    generate.set_defaults(run=_generate)
    export = add_verb(verbs, "export", does="write the model of a run as a folder of Hugging Face", epilog=EXPORT)
    export.add_argument("trained", metavar="RUN", help=RUN)
    export.add_argument("--hf", metavar="FOLDER", required=True, help="a new folder")
    export.set_defaults(run=_export)


def _evaluate(chosen: argparse.Namespace) -> int:
    require(OF_LAUNCHING)
    of_data = [word for word in chosen.words if word.startswith(("data=", "data.", "@"))]
    given = _settings(
        [word for word in chosen.words if word not in of_data],
        {"examples": int, "batch_size": int},
        others="data=..., data.KEY=...",
    )
    for name, value in given.items():
        if value < (1 if name == "batch_size" else 0):
            raise ConfigError(f"{name} is {value}; it cannot be so small")

    from dtrain.launchers import strict_json
    from dtrain.loading import config_of, load, of_the_data
    from dtrain.train.assessment import assess
    from dtrain.train.config import compose, instantiate

    run = Path(chosen.trained)
    config = config_of(run)
    known = of_the_data(config, run)
    if of_data:
        folder = run.parent.parent if run.parent.name == "checkpoints" else run
        config = compose([f"@{folder / 'config.yaml'}", *of_data])
    data: Any = instantiate(config.data, "data", split="validation")
    model = load(run)
    _check_fits(known, data, model)
    measured = assess(_on_device(model), data, **given)
    if chosen.json:
        print(strict_json.dumps(measured.as_dict(), indent=2), end="")
        return 0
    figures = [f"loss {measured.loss:.4f}", f"perplexity {measured.perplexity:,.4g}"]
    if measured.bits_per_byte is not None:
        figures.append(f"{measured.bits_per_byte:.4f} bits per byte")
    count = f"{measured.examples:,} examples, {measured.examples * measured.tokens_per_example:,} tokens"
    print(f"{run}: {'  '.join(figures)}  ({count} of the validation split)")
    return 0


def _generate(chosen: argparse.Namespace) -> int:
    require(OF_LAUNCHING)
    kinds: dict[str, Callable[[str], Any]] = {
        "max_tokens": int, "temperature": float, "top_k": int, "seed": int, "tokenizer": str,
    }  # fmt: skip
    given = _settings(chosen.words, kinds)

    from dtrain.loading import config_of, load, of_the_data
    from dtrain.train.generation import Codec, Sampling, continued

    tokenizer = given.pop("tokenizer", None)
    try:
        sampling = Sampling(**given)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    run = Path(chosen.trained)
    known = of_the_data(config_of(run), run)
    named: dict[str, object] = dict(known.tokenizer)
    if tokenizer is not None:
        named = {**named, "name": tokenizer} if tokenizer != "bytes" else {"name": "bytes"}
    codec = Codec.of(named)
    prompt = codec.encode(chosen.text)
    tokens = [*prompt, *continued(_on_device(load(run)), prompt, sampling, vocab_size=known.vocab_size)]
    print(codec.decode(tokens))
    return 0


def _export(chosen: argparse.Namespace) -> int:
    require(OF_LAUNCHING)
    if chosen.words:
        raise ConfigError(f"{' '.join(chosen.words)}: export takes a run and --hf FOLDER alone")
    out = Path(chosen.hf).expanduser()
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--hf {out} exists already; remove it, or name a new folder")

    from dtrain.loading import load

    model = load(chosen.trained)
    save = getattr(model, "save_pretrained", None)
    if not callable(save):
        raise ConfigError(
            f"the model of {chosen.trained} is a {type(model).__name__}, which is none of transformers; its weights "
            "are in RUN/export/model.safetensors, and dtrain.load(RUN) builds it"
        )
    partial = out.with_name(f".{out.name}.writing-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        save(partial)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise ConfigError(f"--hf {out} cannot be written: {error.strerror}; name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


def _settings(words: Sequence[str], kinds: Mapping[str, Callable[[str], Any]], others: str = "") -> dict[str, Any]:
    """``key=value`` words by name. Raises ``ConfigError`` for unknown ones, and values of another type."""
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in kinds:
            there_are = ", ".join([*kinds, *([others] if others else [])])
            raise ConfigError(f"{word}: there is no such setting{hint(closest(key, kinds))} (there are {there_are})")
        try:
            values[key] = kinds[key](text)
        except ValueError as error:
            kind = "an integer" if kinds[key] is int else "a number"
            raise ConfigError(f"{key} must be {kind}, but is {text!r}") from error
    return values


def _check_fits(known: OfTheData, data: Any, model: nn.Module) -> None:
    """Raise ``ConfigError`` where the model cannot read these data, or would read them as other tokens."""
    from dtrain.train.initial_model import OfTheData

    other = OfTheData.read(data)
    if known.vocab_size is not None and other.vocab_size is not None and other.vocab_size > known.vocab_size:
        raise ConfigError(
            f"the data have {other.vocab_size} different tokens, those of the run {known.vocab_size}; tokenize the "
            "text as the run's was"
        )
    identity = ["sha256" if "sha256" in known.tokenizer else "name"]
    if known.tokenizer and other.tokenizer and any(known.tokenizer.get(n) != other.tokenizer.get(n) for n in identity):
        raise ConfigError(
            f"the data were tokenized by {other.tokenizer.get('name')}, those of the run by "
            f"{known.tokenizer.get('name')}: the same numbers are other text; tokenize with the run's"
        )
    longest = int(getattr(model, "max_length", 0) or 0)
    if longest and other.tokens_per_example > longest:
        raise ConfigError(
            f"an example of the data has {other.tokens_per_example} tokens, the model takes {longest}; set "
            f"data.block={longest}"
        )


def _on_device(model: nn.Module) -> nn.Module:
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu")
