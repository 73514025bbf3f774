"""Write the weights of a run as a model that needs neither DeepSpeed nor the trainer.

    python launch/export.py runs/demo/run --output model                              the newest sound checkpoint
    python launch/export.py runs/demo/run --step 400 --output model                   that one
    python launch/export.py runs/demo/run --best --output model                       the best (run.keep_best keeps it)
    python launch/export.py runs/demo/run/checkpoints/step_00000400 --output model    the same
    python launch/export.py runs/demo/run --hf --output model                         for Hugging Face's transformers

In Python, `reformer.load_model("model")` is the model. A run may go on meanwhile; every byte of a checkpoint is checked
before it is used. The weights are those that the optimizer updates, in fp32, whatever precision the model ran in.

The tokenizer of the run's store comes with them (not with --hf), checked to be the one of the training, so that
launch/generate.py continues a text. Where the store is gone, damaged or another, the weights are written without it,
and a note on standard error says so; --store says where the store is now, if not where the run found it.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.store import Store
from data_pipeline.tokenizer_folder import Ends, tokenizer_files
from reformer import ReformerConfig, save_model
from reformer.hf import save_hf
from reformer.weights import assemble, refuse_existing
from trainer.checkpoint import SUMS, problems, published, read_state, read_weights
from trainer.config import ConfigError


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


NONE_YET = "wait until the run saves one (run.save_every), or have it do so now and go on later (SIGUSR1)"


def sound_checkpoint(source: Path, step: int | None) -> Path:
    """The checkpoint to export: of a run the newest whose files are what was written, or the one of a step.

    Raises ConfigError where there is none, or the one that was asked for is damaged.
    """
    if not (source / "checkpoints").is_dir():
        if step is not None:
            raise ConfigError(f"--step {step} is for the folder of a run, and {source} has no checkpoints in it")
        if not (source / SUMS).exists():
            what = "is neither a run nor a checkpoint" if source.exists() else "does not exist"
            raise ConfigError(f"{source} {what}: give the folder that was run.dir, or one of its checkpoints")
        if found := problems(source):
            raise ConfigError(f"{source} is damaged: {'; '.join(found)}")
        return source
    candidates = [each for each in published(source) if step in (None, each.step)]
    for checkpoint in reversed(candidates):
        found = problems(checkpoint.path)
        if not found:
            return checkpoint.path
        if not checkpoint.path.exists():  # the run that goes on has removed it, and has written others
            return sound_checkpoint(source, step)
        print(f"{checkpoint.path} is damaged: {'; '.join(found)}", file=sys.stderr)
    asked = "" if step is None else f" of step {step}"
    others = [str(each.step) for each in published(source) if each not in candidates and not problems(each.path)]
    way_out = f"there are those of steps {', '.join(others)}" if others else NONE_YET
    raise ConfigError(f"{source} has no sound checkpoint{asked}: {way_out}")


def best_step(run: Path) -> int:
    """After how many steps the held-out rows were predicted best, of those that were evaluated and saved."""
    if not (run / "checkpoints").is_dir():
        raise ConfigError(f"--best is for the folder of a run, and {run} has no checkpoints in it")
    step = int(read_state(sound_checkpoint(run, None))["progress"].get("best_step", 0))
    if not step:
        raise ConfigError(f"{run} has no checkpoint of a step that was evaluated: leave out --best, or give --step")
    if not any(each.step == step for each in published(run)):
        raise ConfigError(
            f"{run} was best after step {step}, whose checkpoint is not there any more (run.keep_best=true would have "
            "kept it, unless it was damaged): give another one with --step, or leave out --best"
        )
    return step


def read_checkpoint(source: Path, step: int | None) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Its folder, what it says about itself, and its weights. Raises ConfigError as above."""
    path = sound_checkpoint(source, step)
    try:
        return path, read_state(path), read_weights(path)
    except DataError:
        if path.exists():
            raise
    return read_checkpoint(source, step)  # the run that goes on has removed it meanwhile


def tokenizer_of(run: Path, store: Path) -> dict[str, bytes]:
    """The files of the tokenizer that a run was trained with: contents by name.

    Raises DataError where `store` is gone, its tokenizer is damaged, or it is not known to be that of the run.
    """
    manifest, expected = Manifest.read(store), recorded_tokenizer(run)
    # Without Store.open: a row that is missing is no reason to go without the tokenizer, which checks itself.
    tokenizer = Store(store, manifest).tokenizer
    if tokenizer.sha256 != expected:
        raise DataError(f"the tokenizer of {store} is not the one that {run} was trained with: give that run's store")
    return tokenizer_files(tokenizer, Ends(manifest.bos, manifest.eos))


def recorded_tokenizer(run: Path) -> str:
    """The hash of the tokenizer that a run was trained with. Raises DataError where its record does not say it."""
    try:
        return str(json.loads((run / "run.json").read_bytes())["store"]["tokenizer_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{run}/run.json does not say which tokenizer the run was trained with ({error!r}): give a checkpoint in "
            "the folder of its run"
        ) from None


def export(source: Path, step: int | None, output: Path, hf: bool, store: Path | None = None) -> str:
    """Write the folder; returns a line on what is in it.

    store: where the store of the run is, if not where the run found it.
    """
    refuse_existing(output)
    if hf and store:
        raise ConfigError("--store is for the tokenizer, which --hf does not write: leave out one of them")
    path, state, weights = read_checkpoint(source, step)
    config = ReformerConfig(**state["run"]["model"])
    if hf:
        save_hf(assemble(config, weights), output)
    else:
        save_model(output, config, weights, tokenizer_or_note(path, state["run"], store))
    n_parameters = sum(weight.numel() for weight in weights.values())
    return f"wrote {output}: {n_parameters:,} parameters after {state['step']} steps, from {path}"


def tokenizer_or_note(checkpoint: Path, run: Mapping[str, Any], store: Path | None) -> dict[str, bytes]:
    """The files of the tokenizer; none, and a note on standard error, where they cannot be had."""
    try:
        return tokenizer_of(checkpoint.absolute().parent.parent, store or Path(run["data"]["store"]))
    except (DataError, OSError) as error:
        print(
            f"note: without a tokenizer, which launch/generate.py needs: {error}. The weights are whole; to have both, "
            "export again with --store, the folder of the run's store",
            file=sys.stderr,
        )
        return {}


def main() -> int:
    arguments = parse_arguments()
    try:
        step = best_step(arguments.source) if arguments.best else arguments.step
        print(export(arguments.source, step, arguments.output, arguments.hf, arguments.store))
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
