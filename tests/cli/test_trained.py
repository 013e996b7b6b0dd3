"""`dtrain.load`, `dtrain eval`, `dtrain generate` and `dtrain export`: what can be done with a run that has ended."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import pytest
import torch

import dtrain
from dtrain.cli.main import main
from dtrain.errors import CheckpointError, ConfigError
from dtrain.train.assessment import assess
from dtrain.train.checkpoint.weights import weights_of
from dtrain.train.data.text import ByteText
from dtrain.train.data.tokenize import tokenize
from dtrain.train.generation import Sampling, continued
from dtrain.train.models.hf import CausalLM
from dtrain.train.models.transformer import Transformer
from tests.hf_models import tiny_llama

pytestmark = pytest.mark.timeout(120)

FEW = {
    "engine": "ddp", "sync": "diloco", "optim": {"inner": {"lr": 0.02}, "warmup_steps": 1},
    "train": {"steps": 12, "batch_size": 8, "checkpoint_every_steps": 4, "keep_checkpoints": 4},
}  # fmt: skip
TINY = {"dim": 32, "layers": 1, "heads": 2}
Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(8):
        (folder / f"{number}.txt").write_text("\n".join(f"{i} times {number} is {i * number}" for i in range(60)))
    return folder


def train(folder: Path, data: Mapping[str, object], **settings: object) -> Path:
    keywords = {**FEW, "run": {"dir": folder}, "data": data, **settings}
    dtrain.Trainer(on_row=lambda row: None, **keywords).train()  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of a tiny transformer on bytes."""
    return train(tmp_path_factory.mktemp("run"), {"path": text, "block": 32}, model=TINY)


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return cast(CausalLM, model).logits(tokens)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# ---- load ----------------------------------------------------------------------------------------------------------


def test_a_run_is_loaded_as_its_config_says(run: Path) -> None:
    before = torch.get_rng_state()
    model = dtrain.load(run)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generators are left as they were"
    assert isinstance(model, Transformer) and not model.training and model.max_length == 32
    exported = weights_of(run)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_is_loaded_too(run: Path) -> None:
    early = dtrain.load(run / "checkpoints" / "step-0000000004")
    last = dtrain.load(str(run / "checkpoints" / "step-0000000012"))
    whole = dtrain.load(run)
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), whole.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(early.parameters(), whole.parameters(), strict=True))


def test_the_data_are_not_needed(text: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(text, tmp_path / "text")
    folder = train(tmp_path / "run", {"path": copy, "block": 32}, model=TINY)
    shutil.rmtree(copy)
    assert dtrain.load(folder).max_length == 32
    (folder / "model.json").unlink()  # as a run of an earlier version, of which the data are asked
    with pytest.raises(ConfigError, match="cannot open"):
        dtrain.load(folder)


def test_a_run_of_an_earlier_version_is_loaded_by_its_data(run: Path, tmp_path: Path) -> None:
    earlier = shutil.copytree(run, tmp_path / "run")
    (earlier / "model.json").unlink()
    assert dtrain.load(earlier).max_length == 32


def test_what_cannot_be_loaded_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run: it has no config\.yaml; give a run folder"):
        dtrain.load(tmp_path)
    unfinished = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(unfinished / "export")
    with pytest.raises(CheckpointError, match=r"it has not ended; give a checkpoint: .*step-0000000012"):
        dtrain.load(unfinished)
    with pytest.raises(CheckpointError, match="holds weights of another model"):
        dtrain.load(run, model=torch.nn.Linear(2, 2))
    (unfinished / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.json is damaged"):
        dtrain.load(unfinished)
    unfinished.chmod(0o777)
    with pytest.raises(ConfigError, match="everybody can write to it"):
        dtrain.load(unfinished)


# ---- eval ----------------------------------------------------------------------------------------------------------


def test_eval_says_what_training_said(run: Path, shell: Shell) -> None:
    code, out, _ = shell("eval", run, "examples=64", "--json")
    figures = json.loads(out)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row["validation_loss"] for row in rows if "validation_loss" in row][-1]
    assert code == 0 and figures["loss"] == pytest.approx(trained, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["bits_per_byte"] == pytest.approx(figures["loss"] / math.log(2))


def test_eval_takes_the_whole_split_by_default(run: Path, text: Path, shell: Shell) -> None:
    held_out = ByteText(path=str(text), block=32, split="validation")
    code, out, _ = shell("eval", run)
    whole = assess(dtrain.load(run), held_out, batch_size=5)
    assert code == 0 and f"({len(held_out):,} examples, {32 * len(held_out):,} tokens of the validation split)" in out
    assert f"loss {whole.loss:.4f}  perplexity " in out and "bits per byte" in out


def test_eval_takes_other_data(run: Path, text: Path, tmp_path: Path, shell: Shell) -> None:
    tokenize(source=text, out=tmp_path / "tokens")
    code, out, _ = shell("eval", run, "data=tokens", f"data.path={tmp_path / 'tokens'}", "data.block=32", "--json")
    ours = shell("eval", run, f"data.path={text}", "--json")[1]
    # The same bytes, held out in the same way.
    assert code == 0 and json.loads(out) == json.loads(ours)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["example=3"],
            "example=3: there is no such setting; did you mean examples? (there are examples, batch_size, ",
        ),
        (["examples=few"], "examples must be an integer, but is 'few'"),
        (["batch_size=0"], "batch_size is 0; it cannot be so small"),
        (["data.block=64"], "an example of the data has 64 tokens, the model takes 32; set data.block=32"),
        (["data.pth=x"], "did you mean data.path?"),
        (["data.path=/nowhere"], "cannot open '/nowhere'"),
    ],
)
def test_eval_refuses_what_does_not_fit(words: list[str], said: str, run: Path, shell: Shell) -> None:
    code, _, err = shell("eval", run, *words)
    assert code == 2 and said in err


# ---- generate ------------------------------------------------------------------------------------------------------


def test_text_is_continued_the_same_way_for_the_same_seed(run: Path, shell: Shell) -> None:
    words = ("max_tokens=20", "temperature=0.8", "top_k=10")
    texts = [shell("generate", run, "3 times", f"seed={seed}", *words)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and all(text.startswith("3 times") for text in texts)
    greedy = {shell("generate", run, "3 times", f"seed={seed}", "temperature=0")[1] for seed in (1, 2)}
    assert len(greedy) == 1
    # A token is a byte, so that the text is 20 bytes longer, in whatever characters.
    tokens = list(continued(dtrain.load(run), list(b"3 times"), Sampling(max_tokens=20, temperature=0.8, top_k=10)))
    assert len(tokens) == 20


def test_samples_are_drawn_from_the_distribution_of_the_model() -> None:
    scores, generator = torch.tensor([1.0, 2.0, 3.0, -50.0]), torch.Generator().manual_seed(0)
    drawn = [Sampling(temperature=2.0, top_k=2).choose(scores, generator) for _ in range(4000)]
    share = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    expected = torch.tensor([0.0, *(scores[1:3] / 2).softmax(0).tolist(), 0.0])
    torch.testing.assert_close(share, expected, atol=0.03, rtol=0)
    assert Sampling(temperature=0).choose(scores, generator) == 2


def test_a_tokenizer_of_the_data_is_used(text: Path, tmp_path: Path, shell: Shell) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [file.read_text() for file in text.glob("*.txt")],
        tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.save(str(tmp_path / "bpe.json"))
    tokenize(source=text, out=tmp_path / "tokens", tokenizer=str(tmp_path / "bpe.json"))
    data: dict[str, object] = {
        "_target_": "dtrain.train.data.tokens.TokenFile",
        "path": tmp_path / "tokens",
        "block": 16,
    }
    folder = train(tmp_path / "run", data, model=TINY)
    code, out, _ = shell("generate", folder, "3 times 4", "max_tokens=5")
    assert code == 0 and out.startswith("3 times 4")
    figures = json.loads(shell("eval", folder, "--json")[1])
    assert figures["bits_per_byte"] is None and figures["perplexity"] > 1
    code, _, err = shell("eval", folder, "data=text", f"data.path={text}", "data.block=16")
    assert code == 2 and "the data were tokenized by bytes" in err
    (tmp_path / "bpe.json").rename(tmp_path / "moved.json")
    code, _, err = shell("generate", folder, "3 times")
    assert code == 2 and "put it back, or say where a copy is: tokenizer=FILE" in err
    assert shell("generate", folder, "3 times", f"tokenizer={tmp_path / 'moved.json'}", "max_tokens=2")[0] == 0
    (tmp_path / "moved.json").write_text((tmp_path / "moved.json").read_text() + " ")
    code, _, err = shell("generate", folder, "3 times", f"tokenizer={tmp_path / 'moved.json'}")
    assert code == 2 and "is not the tokenizer that the run's data were made with" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["", "seed=1"], "the text is empty"),
        (["a", "temprature=1"], "did you mean temperature?"),
        (["a", "temperature=-1"], "temperature is -1.0; give 0 (the most likely token) or more"),
        (["a", "top_k=-1"], "top_k is -1; give 1 or more"),
        (["a", "max_tokens=0"], "max_tokens is 0; give at least 1"),
        (["a", "seed=x"], "seed must be an integer, but is 'x'"),
        (["a", "tokenizer=/nowhere"], "the tokenizer /nowhere of the run's data cannot be read"),
    ],
)
def test_generate_refuses_what_does_not_fit(words: list[str], said: str, run: Path, shell: Shell) -> None:
    code, _, err = shell("generate", run, *words)
    assert code == 2 and said in err


def test_a_model_without_logits_cannot_generate() -> None:
    with pytest.raises(ConfigError, match=re.escape("Linear has no logits(tokens)")):
        next(continued(torch.nn.Linear(1, 1), [1], Sampling()))


# ---- export --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses names of transformers that are deprecated
def test_exports_load_in_transformers_with_equal_logits(text: Path, tmp_path: Path, shell: Shell) -> None:
    """All of a model, then adapters on that export, from a checkpoint too; both continue a text alike."""
    base = tiny_llama(tmp_path / "base")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    tokens = torch.tensor([list(b"3 times 4 is 12")])
    data: dict[str, object] = {"path": text, "block": 32}
    hf = {"_target_": "dtrain.train.models.hf.causal_lm", "path": base}
    folder = train(tmp_path / "run", data, model=hf)
    code, out, _ = shell("export", folder, "--hf", tmp_path / "out")
    assert code == 0 and "model.safetensors" in out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = dtrain.load(folder)
    assert torch.equal(theirs(input_ids=tokens).logits, logits(ours, tokens))
    greedy = theirs.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
    assert greedy.tolist() == list(continued(ours, tokens[0].tolist(), Sampling(max_tokens=6, temperature=0)))

    lora = {"_target_": "dtrain.train.models.lora.LoRA", "rank": 4, "targets": ["q_proj"]}
    adapted = train(tmp_path / "adapted", data, model={**hf, "path": tmp_path / "out", "lora": lora})
    for source in (adapted, adapted / "checkpoints" / "step-0000000008"):
        exported = tmp_path / f"adapter-{source.name}"
        assert shell("export", source, "--hf", exported)[0] == 0
        assert (exported / "adapter_model.safetensors").exists() and not (exported / "model.safetensors").exists()
        base_again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        again = peft.PeftModel.from_pretrained(base_again, exported)
        assert torch.equal(again(input_ids=tokens).logits, logits(dtrain.load(source), tokens))
    # Adapters begin another run, whose base is in the folder.
    further = {**hf, "path": tmp_path / "out", "lora": lora}
    more = train(tmp_path / "more", data, model=further, run={"dir": tmp_path / "more", "weights": adapted})
    first, last = (json.loads(shell("eval", path, "--json")[1])["loss"] for path in (adapted, more))
    assert last < first


def test_export_refuses_what_does_not_fit(run: Path, tmp_path: Path, shell: Shell) -> None:
    code, _, err = shell("export", run, "--hf", tmp_path / "out")
    assert code == 2 and "is a Transformer, which is none of transformers" in err and not (tmp_path / "out").exists()
    code, _, err = shell("export", run, "--hf", run)
    assert code == 2 and "exists already; remove it, or name a new folder" in err
    code, _, err = shell("export", run, "a=b", "--hf", tmp_path / "out")
    assert code == 2 and "export takes a run and --hf FOLDER alone" in err
