"""The weights of a checkpoint, written as a model that needs neither DeepSpeed nor the trainer; exported.py reads it.

config.json, model.safetensors    the model, as reformer.save_model writes it, or for transformers reformer.hf.save_hf
origin.json                       {checkpoint, step, run: as in its state.json, tokenizer_sha256: null if not known}
tokenizer.json, tokenizer.model   of the run: see run_tokenizer.py; not for transformers, which has its own
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.staging import check_writable
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_folder import Ends, tokenizer_files
from reformer import ReformerConfig, save_model
from reformer.hf import save_hf
from reformer.weights import assemble, refuse_existing
from trainer.exported import ORIGIN
from trainer.run_tokenizer import tokenizer_of
from trainer.selection import read_checkpoint


def export(source: Path, step: int | None, output: Path, hf: bool, store: Path | None) -> tuple[str, str | None]:
    """Write the weights of a run or a checkpoint into a folder, which appears when it is complete.

    step: of a run, the checkpoint after that many steps; the newest sound one if None. hf: as what Hugging Face's
    transformers reads. store: a store to take the tokenizer from, if not from the run.

    Returns a line on what was written, and a note where it is without the tokenizer. Raises ConfigError where there is
    no such checkpoint, none that is sound, or `output` exists, and DataError where it cannot be written.
    """
    refuse_existing(output)
    check_writable(output.absolute().parent, f"--output {output}")
    path, state, weights = read_checkpoint(source, step)
    config = ReformerConfig(**state["run"]["model"])
    found, note = None, None
    try:
        found = tokenizer_of(path.absolute().parent.parent, store, Path(state["run"]["data"]["store"]))
    except (DataError, OSError) as error:
        without = "the ids of BOS and EOS" if hf else "a tokenizer, which generating a text needs"
        note = (
            f"without {without}: {error}. The weights are whole; to have both, export again with --store, the folder "
            "of a store of this tokenizer"
        )
    others = {ORIGIN: origin(path, state, found[0].sha256 if found else None)}
    if hf:
        save_hf(assemble(config, weights), output, **(ids_of_ends(*found) if found else {}), others=others)
    else:
        save_model(output, config, weights, {**others, **(tokenizer_files(*found) if found else {})})
    n_parameters = sum(weight.numel() for weight in weights.values())
    return f"wrote {output}: {n_parameters:,} parameters after {state['step']} steps, from {path}", note


def origin(checkpoint: Path, state: Mapping[str, Any], tokenizer_sha256: str | None) -> bytes:
    """Where weights come from: the checkpoint, its step, the configuration, stores and batch of its run, and the
    tokenizer's hash if it is known."""
    record = {"checkpoint": str(checkpoint.absolute()), "step": state["step"], "run": state["run"]}
    return (json.dumps({**record, "tokenizer_sha256": tokenizer_sha256}, indent=2) + "\n").encode()


def ids_of_ends(tokenizer: Tokenizer, ends: Ends) -> dict[str, int | None]:
    """What save_hf is to write of BOS and EOS."""
    return {
        "bos_token_id": tokenizer.bos_id if ends.bos else None,
        "eos_token_id": tokenizer.eos_id if ends.eos else None,
    }
