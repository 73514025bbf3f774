"""The model in a folder that launch/export.py or Hugging Face's save_pretrained wrote, and what it was trained with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_folder import TOKENIZER_MODEL, Ends, read_record, read_tokenizer
from reformer import Reformer, load_model
from reformer.hf import load_hf
from reformer.weights import export_first, is_hf, read_config
from trainer.config import ConfigError
from trainer.run_files import CHECKPOINTS

ORIGIN = "origin.json"
"""Of which checkpoint of which run a model is: see export.py."""


def read_model(folder: Path, name: str) -> Reformer:
    """The model in a folder that launch/export.py, save_model, save_hf or Hugging Face's save_pretrained wrote.

    Nobody trains it as it is: attention dropout, of which Hugging Face's folders may have two kinds, is 0 in theirs.

    Raises ConfigError where there is none, or it is damaged.

    name: what the folder is called in errors.
    """
    if not folder.is_dir():
        raise ConfigError(f"{name} is not a folder: give one that launch/export.py or save_pretrained wrote")
    if (folder / CHECKPOINTS).is_dir() or (folder / "SHA256SUMS").is_file():
        raise ConfigError(export_first(folder, name))
    model = load_hf(folder, attn_dropout=0.0) if is_hf(read_config(folder)) else load_model(folder)
    if any(not parameter.float().isfinite().all() for parameter in model.parameters()):
        raise ConfigError(f"{name} has weights that are not finite: give those of an earlier checkpoint")
    return model


def read_generator(folder: Path) -> tuple[Reformer, Tokenizer, Ends]:
    """The model in a folder that launch/export.py wrote, its tokenizer, and what its documents have around them.

    Raises ConfigError or DataError where the folder is another one, is damaged, or has no tokenizer.
    """
    model = read_model(folder, str(folder)).eval()
    if not model.config.causal:
        raise ConfigError(f"the model in {folder} sees the tokens that it would have to add (causal=False)")
    tokenizer, ends = read_tokenizer(folder)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens, and its model {model.config.vocab_size}: "
            "export the model again"
        )
    return model, tokenizer, ends


def choose_device(name: str | None) -> torch.device:
    """The one that --device asks for, or the best that there is. Raises ConfigError where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here; leave it out, or give --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def tokenizer_notes(folder: Path, name: str, store: Path, tokenizer_sha256: str) -> list[str]:
    """A note where the folder does not say which tokenizer its model was trained with.

    Raises ConfigError where that is not the one of the store, by its hash, and DataError where it cannot be read.
    """
    record = read_record(folder)
    trained_with = record.get("sha256", read_origin(folder).get("tokenizer_sha256"))
    if trained_with not in (None, tokenizer_sha256):
        tokenizer = record["kind"] if record.get("kind") in ("bytes", "integers") else folder / TOKENIZER_MODEL
        way_out = f"--tokenizer {tokenizer}" if "sha256" in record else "that of the run in its origin.json"
        raise ConfigError(
            f"{name} was trained with another tokenizer than that of {store}, so their token ids do not mean the same. "
            f"Build the store with {way_out}, or give another folder"
        )
    unknown = f"{folder} does not say which tokenizer its model was trained with: it must be that of {store}"
    return [unknown] if trained_with is None else []


def read_origin(folder: Path) -> Mapping[str, Any]:
    """What is said of where the model comes from; nothing where no launch/export.py has said it, or it is damaged."""
    try:
        record = json.loads((folder / ORIGIN).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, Mapping) else {}
