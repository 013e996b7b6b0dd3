"""Causal language models of transformers, from a local folder, under dtrain's contract: batch in, mean loss out.

The folder is what ``save_pretrained`` writes: config.json, the weights (safetensors, sharded or not), a tokenizer.
Nothing is downloaded, and code in the folder is not run. transformers and peft are imported when a model is built.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.errors import ConfigError
from dtrain.extras import require
from dtrain.train.models.lora import LoRA

__all__ = ["CausalLM", "causal_lm"]

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
)  # fmt: skip


class CausalLM(nn.Module):
    """A causal language model ``lm`` of transformers, or of peft around one, that returns its loss for a batch.

    Names of parameters are those of ``lm`` behind "lm.". ``max_length``: the positions that it was trained for, 0
    where the architecture has no limit. ``folder``: where it came from.
    """

    def __init__(self, lm: nn.Module, folder: Path | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.folder = folder
        text = cast(Any, lm).config.get_text_config()
        self.max_length = int(getattr(text, "max_position_embeddings", None) or 0)
        self._router_weight = float(getattr(text, "router_aux_loss_coef", None) or 0.0)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token: int64 ``[examples, length]`` to ``[examples, length, vocabulary]``."""
        scores: Tensor = self.lm(input_ids=tokens, use_cache=False).logits
        return scores

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy (nats per token, fp32 scalar).

        ``batch``: ``{"input", "target"}``, int64 ``[examples, length]``, the target one token ahead, -100 where it
        does not count; or with ``input_ids`` and ``labels``, as transformers' own collators make it. In training a
        mixture of experts whose config has ``output_router_logits`` adds its load-balancing loss.
        """
        if "input_ids" in batch:
            loss: Tensor = self.lm(**batch, use_cache=False).loss
            return loss
        output = self.lm(input_ids=batch["input"], use_cache=False)
        loss = F.cross_entropy(output.logits.flatten(0, -2).float(), batch["target"].flatten())
        balance = getattr(output, "aux_loss", None)
        return loss if balance is None or not self.training else loss + self._router_weight * balance.float()

    def describe(self) -> dict[str, object]:
        """What identifies the files that a checkpoint of this model needs: nothing unless weights are frozen."""
        if self.folder is None or all(parameter.requires_grad for parameter in self.parameters()):
            return {}
        files = sorted(file for pattern in ("config.json", *WEIGHTS) for file in self.folder.glob(pattern))
        sha = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                sha.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
        return {"path": str(self.folder), "sha256": sha.hexdigest()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``lm`` as transformers and peft load it: config and safetensors, or an adapter alone; with the
        tokenizer of the folder that it came from.
        """
        out = Path(folder)
        with _quiet():
            cast(Any, self.lm).save_pretrained(out)
        for pattern in TOKENIZER if self.folder is not None else ():
            for file in cast(Path, self.folder).glob(pattern):
                if not (out / file.name).exists():
                    shutil.copyfile(file, out / file.name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Computed buffers, above all the rotary frequencies, keep fp32 when all of a model is cast: bf16 has 8 bits
        for a position.
        """
        stored = self.state_dict(keep_vars=True).keys()
        before = {n: b for n, b in self.named_buffers() if n not in stored and b.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of torch
        for name, buffer in before.items():
            owner, _, leaf = name.rpartition(".")
            cast_buffer = self.get_buffer(name)
            if cast_buffer.dtype != buffer.dtype:
                setattr(self.get_submodule(owner), leaf, buffer.to(cast_buffer.device))
        return self


def causal_lm(
    *, path: str, weights: bool = True, lora: LoRA | None = None, vocab_size: int = 0, max_length: int = 0
) -> CausalLM:
    """The causal language model in the folder ``path``, in fp32, with ``lora`` around it.

    On the meta device names and shapes are all that is read of the weights.

    Args:
        path: a folder with config.json.
        weights: load them; False: drawn from torch's global generator, as the architecture says.
        lora: adapters to train instead of all of the model.
        vocab_size: the data's; the model's may be larger.
        max_length: tokens of an example.

    Raises:
        ConfigError: the folder has no config.json, its weights are missing, incomplete or quantized, the model is no
            causal language model or one whose code lies in the folder, its vocabulary or its positions are fewer than
            the data's, a LoRA target fits no layer, or transformers is missing.
    """
    require(["transformers"])
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise ConfigError(f"model.path={path} {what}; give a folder that save_pretrained wrote (nothing is downloaded)")
    with _quiet():
        config = _config(folder)
        _check_sizes(folder, config.get_text_config(), vocab_size, max_length)
        lm = _with_weights(folder, config) if weights else _drawn(folder, config)
    _check_causal(folder, lm)
    return CausalLM((lora or LoRA()).around(lm), folder)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"model.path={folder}: its config.json is none of transformers: {_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"model.path={folder}: its weights are quantized, which gradients cannot train; give the folder of the "
            "weights that they were made from"
        )
    return config


def _check_sizes(folder: Path, text: Any, vocab_size: int, max_length: int) -> None:
    has, positions = int(getattr(text, "vocab_size", 0)), getattr(text, "max_position_embeddings", None)
    if has < vocab_size:
        raise ConfigError(
            f"model.path={folder} has a vocabulary of {has} tokens, the data have {vocab_size}; tokenize the text with "
            "the model's own tokenizer: dtrain data tokenize tokenizer=FOLDER/tokenizer.json, then data=tokens"
        )
    if positions is not None and 0 < positions < max_length:
        raise ConfigError(
            f"model.path={folder} has {positions} positions, an example of the data has {max_length} tokens; set "
            f"data.block={positions} or less"
        )


def _drawn(folder: Path, config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        lm: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        raise _no_causal_lm(folder, config, error) from error
    return lm


def _with_weights(folder: Path, config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    # from_pretrained refuses to be called where the default device is meta, but takes it as an argument.
    device = torch.get_default_device()
    try:
        with torch.device("cpu") if device.type == "meta" else contextlib.nullcontext():
            lm, loaded = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
                output_loading_info=True, **({"device_map": "meta"} if device.type == "meta" else {}),
            )  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"model.path={folder}: its weights cannot be read: {_line(error)}; put them there, or take "
            "model.weights=false to begin with weights drawn at random"
        ) from error
    except ValueError as error:
        raise _no_causal_lm(folder, config, error) from error
    except Exception as error:  # safetensors' own, and RuntimeError where shapes differ
        raise ConfigError(f"model.path={folder}: its weights do not fit its config.json: {_line(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ConfigError(
            f"model.path={folder}: its weights lack {', '.join(missing[:3])} ({len(missing)} in all), which "
            f"{type(lm).__name__} needs{_said(config)}; give the folder of a whole causal language model"
        )
    return cast(nn.Module, lm.train())


def _check_causal(folder: Path, lm: nn.Module) -> None:
    """Attention to later tokens would see the targets."""
    for name, module in lm.named_modules():
        if getattr(module, "is_causal", True) is False:
            raise ConfigError(
                f"model.path={folder}: {name} of {type(lm).__name__} attends to later tokens, so it is no causal "
                "language model; some architectures become one by is_decoder=true in config.json"
            )


def _no_causal_lm(folder: Path, config: Any, error: Exception) -> ConfigError:
    if getattr(config, "auto_map", None):
        return ConfigError(
            f"model.path={folder}: {type(config).__name__} needs code that lies in the folder, which is not run: load "
            "it yourself and hand it to dtrain.Trainer(model=...)"
        )
    return ConfigError(
        f"model.path={folder}: a {getattr(config, 'model_type', 'model')}{_said(config)} is no causal language model "
        f"of transformers; give a ...ForCausalLM ({_line(error)})"
    )


def _said(config: Any) -> str:
    names = getattr(config, "architectures", None)
    return f" (config.json says {', '.join(names)})" if names else ""


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: what matters in them becomes an error here."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
