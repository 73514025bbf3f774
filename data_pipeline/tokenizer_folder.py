"""The tokenizer in the folder of a run or an exported model, which makes text of the model's tokens.

tokenizer.json     {"kind": "sentencepiece", "bytes" or "integers", "vocab_size", "sha256": of the tokenizer,
                    "bos" and "eos": whether documents began and ended with these in training}
tokenizer.model    the SentencePiece model, if there is one
"""

import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.tokenizer import N_ENDS, SentencePieceTokenizer, Tokenizer, load_tokenizer

TOKENIZER_RECORD, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.model"


class Ends(NamedTuple):
    """What documents began and ended with in training."""

    bos: bool
    eos: bool


def tokenizer_files(tokenizer: Tokenizer, ends: Ends) -> dict[str, bytes]:
    """What to write: contents by name of the file."""
    facts = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256, **ends._asdict()}
    model = {TOKENIZER_MODEL: tokenizer.model} if isinstance(tokenizer, SentencePieceTokenizer) else {}
    return {TOKENIZER_RECORD: (json.dumps(facts, indent=2) + "\n").encode(), **model}


def read_tokenizer(folder: str | Path) -> tuple[Tokenizer, Ends]:
    """What was written. Raises DataError where it is missing or damaged."""
    folder = Path(folder)
    path = folder / TOKENIZER_RECORD
    record = read_record(folder)
    if not record:
        raise DataError(
            f"{folder} has no tokenizer ({TOKENIZER_RECORD} is missing): export it again where the run's store is "
            "(launch/export.py --store, and without --hf). A folder of save_hf or save_pretrained has none of ours: "
            "continue its tokens in Python (docs/library.md)"
        )
    if "added_tokens" in record:
        raise DataError(
            f"{path} is Hugging Face's, which is not read here: continue the model's tokens in Python (docs/library.md)"
        )
    try:
        kind, sha256, n_values = record["kind"], record["sha256"], operator.index(record["vocab_size"]) - N_ENDS
        ends = Ends(record["bos"], record["eos"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} does not name a tokenizer ({error!r}): copy it, or export the model, again") from None
    if kind == "integers":
        tokenizer = load_tokenizer(kind, n_values)
    else:
        tokenizer = load_tokenizer(kind if kind == "bytes" else str(folder / TOKENIZER_MODEL))
    if tokenizer.sha256 != sha256:
        raise DataError(f"the tokenizer of {folder} is not what {path} says: copy the folder again")
    return tokenizer, ends


def read_record(folder: Path) -> Mapping[str, Any]:
    """What is said of the tokenizer; nothing where there is no such file, and another object where it is of Hugging
    Face's, who have another file of this name.

    Raises DataError where it cannot be read.
    """
    path = folder / TOKENIZER_RECORD
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        record = None
    if not isinstance(record, Mapping):
        raise DataError(f"{path} cannot be read: copy it, or export the model, again")
    return record
