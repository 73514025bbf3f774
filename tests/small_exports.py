"""Exported models of random weights, and what the library continues a text with by them."""

import json
from pathlib import Path

import numpy as np
import torch

from data_pipeline.tokenizer import ByteTokenizer, load_tokenizer
from reformer import Reformer, ReformerConfig, load_model, save_model
from reformer.generation import continue_tokens

BYTES = {"kind": "bytes", "vocab_size": 258, "sha256": ByteTokenizer.sha256, "bos": True, "eos": True}
NEVER = -100.0
"""A bias that keeps a token from being drawn."""


def write_export(
    folder: Path,
    vocab_size: int,
    others: dict[str, bytes],
    ends: tuple[int, int] = (256, 257),
    biases: tuple[float, float] = (NEVER, NEVER),
) -> Path:
    """An export of a model of random weights but for the biases of BOS and EOS, whose ids are `ends`."""
    torch.manual_seed(0)
    config = ReformerConfig(vocab_size=vocab_size, max_seq_len=64, d_model=16, n_layers=2, n_heads=2, dropout=0.5)
    model = Reformer(config)
    with torch.no_grad():
        model.head.bias[list(ends)] = torch.tensor(biases)
    save_model(folder, config, model.state_dict(), others)
    return folder


def tokenizer_record(**changes: object) -> dict[str, bytes]:
    return {"tokenizer.json": json.dumps({**BYTES, **changes}).encode()}


def expected(folder: Path, ids: list[int], n_tokens: int, **draws: float) -> bytes:
    """The bytes of the continuation, by the library."""
    model = load_model(folder)
    added = continue_tokens(model, model.config, torch.tensor(ids), n_tokens, **draws).tolist()
    kind = json.loads((folder / "tokenizer.json").read_bytes())["kind"]
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(folder / "tokenizer.model"))
    return tokenizer.decode(np.array(added))
