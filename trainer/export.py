"""The weights of a checkpoint, written as a model that needs neither DeepSpeed nor the trainer; exported.py reads it.

config.json, model.safetensors    the model, as reformer.save_model writes it
origin.json                       {checkpoint, step, run: as in its state.json}
tokenizer.json, tokenizer.model   of the run's store: see data_pipeline/tokenizer_folder.py
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_folder import Ends, tokenizer_files
from reformer import ReformerConfig, save_model
from reformer.hf import save_hf
from reformer.weights import assemble, refuse_existing
from trainer.config import ConfigError
from trainer.run_files import RECORD, read_record
from trainer.selection import read_checkpoint

ORIGIN = "origin.json"


def export(source: Path, step: int | None, output: Path, hf: bool, store: Path | None) -> tuple[str, str | None]:
    """Write the weights of a run or a checkpoint into a folder, which appears when it is complete.

    step: of a run, the checkpoint after that many steps; the newest sound one if None. hf: as what Hugging Face's
    transformers reads. store: where the store of the run is, if not where the run found it.

    Returns a line on what was written, and a note where it is without the tokenizer. Raises ConfigError where there is
    no such checkpoint, none that is sound, or `output` exists.
    """
    refuse_existing(output)
    path, state, weights = read_checkpoint(source, step)
    config = ReformerConfig(**state["run"]["model"])
    found, note = None, None
    try:
        found = tokenizer_of(path.absolute().parent.parent, store or Path(state["run"]["data"]["store"]))
    except (DataError, OSError) as error:
        note = (
            f"without a tokenizer, which generating a text needs: {error}. The weights are whole; to have both, export "
            "again with --store, the folder of the run's store"
        )
    if hf:
        save_hf(assemble(config, weights), output, **(ids_of_ends(*found) if found else {}))
    else:
        save_model(output, config, weights, {ORIGIN: origin(path, state), **(tokenizer_files(*found) if found else {})})
    n_parameters = sum(weight.numel() for weight in weights.values())
    return f"wrote {output}: {n_parameters:,} parameters after {state['step']} steps, from {path}", note


def origin(checkpoint: Path, state: Mapping[str, Any]) -> bytes:
    """Where weights come from: the checkpoint, its step, and the configuration, stores and batch of its run."""
    record = {"checkpoint": str(checkpoint.absolute()), "step": state["step"], "run": state["run"]}
    return (json.dumps(record, indent=2) + "\n").encode()


def ids_of_ends(tokenizer: Tokenizer, ends: Ends) -> dict[str, int | None]:
    """What save_hf is to write of BOS and EOS."""
    return {
        "bos_token_id": tokenizer.bos_id if ends.bos else None,
        "eos_token_id": tokenizer.eos_id if ends.eos else None,
    }


def tokenizer_of(run: Path, store: Path) -> tuple[Tokenizer, Ends]:
    """The tokenizer that a run was trained with, and what documents began and ended with.

    Raises DataError where `store` is gone, its tokenizer is damaged, or it is not known to be that of the run.
    """
    manifest, expected = Manifest.read(store), recorded_tokenizer(run)
    # Without Store.open: a row that is missing is no reason to go without the tokenizer, which checks itself.
    tokenizer = Store(store, manifest).tokenizer
    if tokenizer.sha256 != expected:
        raise DataError(f"the tokenizer of {store} is not the one that {run} was trained with: give that run's store")
    return tokenizer, Ends(manifest.bos, manifest.eos)


def recorded_tokenizer(run: Path) -> str:
    """The hash of the tokenizer that a run was trained with. Raises DataError where its record does not say it."""
    try:
        return str(read_record(run)["store"]["tokenizer_sha256"])
    except ConfigError as error:
        reason = str(error)
    except (KeyError, TypeError):
        reason = f"{run / RECORD} does not say which tokenizer the run was trained with"
    raise DataError(f"{reason}: give a checkpoint in the folder of its run")
