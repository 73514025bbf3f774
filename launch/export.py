"""Write the weights of a run as a model that needs neither DeepSpeed nor the trainer.

    python launch/export.py runs/demo/run --output model                              the newest sound checkpoint
    python launch/export.py runs/demo/run --step 400 --output model                   that one
    python launch/export.py runs/demo/run --best --output model                       the best (run.keep_best keeps it)
    python launch/export.py runs/demo/run/checkpoints/step_00000400 --output model    the same
    python launch/export.py runs/demo/run --hf --output model                         for Hugging Face's transformers

In Python, `reformer.load_model("model")` is the model. A run may go on meanwhile; every byte of a checkpoint is checked
before it is used. The weights are those that the optimizer updates, in fp32, whatever precision the model ran in.

origin.json says of which checkpoint of which run they are (not with --hf). The tokenizer of the run's store comes with
them, checked to be the one of the training, so that launch/generate.py continues a text; with --hf the ids of BOS and
EOS alone, for transformers' generate() to end where a document does. Where the store is gone, damaged or another, the
weights are written without it, and a note on standard error says so; --store says where the store is now, if not where
the run found it.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.output import exit_code
from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_folder import Ends, tokenizer_files
from reformer import ReformerConfig, save_model
from reformer.hf import save_hf
from reformer.weights import assemble, refuse_existing
from trainer.config import ConfigError
from trainer.run_files import RECORD, read_record
from trainer.selection import best_step, read_checkpoint

ORIGIN = "origin.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT", help="folder of a run, or of one checkpoint")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="to write; it appears when complete"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="of a run, the checkpoint after N steps")
    which.add_argument("--best", action="store_true", help="of a run, the checkpoint with the lowest eval/loss")
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="the run's store (default: its data.store)")
    parser.add_argument("--hf", action="store_true", help="write what Hugging Face's transformers reads")
    return parser.parse_args()


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


def export(source: Path, step: int | None, output: Path, hf: bool, store: Path | None = None) -> str:
    """Write the folder; returns a line on what is in it.

    store: where the store of the run is, if not where the run found it.
    """
    refuse_existing(output)
    path, state, weights = read_checkpoint(source, step)
    config = ReformerConfig(**state["run"]["model"])
    found = tokenizer_or_note(path, state["run"], store)
    if hf:
        save_hf(assemble(config, weights), output, **(ids_of_ends(*found) if found else {}))
    else:
        save_model(output, config, weights, {ORIGIN: origin(path, state), **(tokenizer_files(*found) if found else {})})
    n_parameters = sum(weight.numel() for weight in weights.values())
    return f"wrote {output}: {n_parameters:,} parameters after {state['step']} steps, from {path}"


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


def tokenizer_or_note(checkpoint: Path, run: Mapping[str, Any], store: Path | None) -> tuple[Tokenizer, Ends] | None:
    """The tokenizer; None, and a note on standard error, where it cannot be had."""
    try:
        return tokenizer_of(checkpoint.absolute().parent.parent, store or Path(run["data"]["store"]))
    except (DataError, OSError) as error:
        print(
            f"note: without a tokenizer, which generating a text needs: {error}. The weights are whole; to have both, "
            "export again with --store, the folder of the run's store",
            file=sys.stderr,
        )
        return None


def run(arguments: argparse.Namespace) -> None:
    step = best_step(arguments.source) if arguments.best else arguments.step
    print(export(arguments.source, step, arguments.output, arguments.hf, arguments.store))


def main() -> int:
    return exit_code(partial(run, parse_arguments()), ConfigError)


if __name__ == "__main__":
    sys.exit(main())
