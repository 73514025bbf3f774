"""Write the weights of a run as a model that needs neither DeepSpeed nor the trainer.

    python launch/export.py runs/demo/run --output model                              the newest sound checkpoint
    python launch/export.py runs/demo/run --step 400 --output model                   that one
    python launch/export.py runs/demo/run/checkpoints/step_00000400 --output model    the same
    python launch/export.py runs/demo/run --hf --output model                         for Hugging Face's transformers

In Python, `reformer.load_model("model")` is the model. A run may go on meanwhile; every byte of a checkpoint is checked
before it is used. The weights are those that the optimizer updates, in fp32, whatever precision the model ran in.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.errors import DataError
from reformer import ReformerConfig, save_model
from reformer.hf import save_hf
from reformer.weights import assemble, refuse_existing
from trainer.checkpoint import problems, published, read_state, read_weights
from trainer.config import ConfigError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT", help="folder of a run, or of one checkpoint")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="to write; it appears when complete"
    )
    parser.add_argument("--step", type=int, metavar="N", help="of a run, the checkpoint after N steps")
    parser.add_argument("--hf", action="store_true", help="write what Hugging Face's transformers reads")
    return parser.parse_args()


def sound_checkpoint(source: Path, step: int | None) -> Path:
    """The checkpoint to export: of a run the newest whose files are what was written, or the one of a step.

    Raises ConfigError where there is none, or the one that was asked for is damaged.
    """
    if not (source / "checkpoints").is_dir():
        if step is not None:
            raise ConfigError(f"--step {step} is for the folder of a run, and {source} has no checkpoints in it")
        if found := problems(source):
            raise ConfigError(f"{source} is neither a run nor a sound checkpoint: {'; '.join(found)}")
        return source
    candidates = [each for each in published(source) if step in (None, each.step)]
    for checkpoint in reversed(candidates):
        found = problems(checkpoint.path)
        if not found:
            return checkpoint.path
        if not checkpoint.path.exists():  # the run that goes on has removed it, and has written others
            return sound_checkpoint(source, step)
        print(f"{checkpoint.path} is damaged: {'; '.join(found)}", file=sys.stderr)
    steps = [each.step for each in published(source)]
    asked = "" if step is None else f" of step {step}"
    raise ConfigError(f"{source} has no sound checkpoint{asked}: those it has are of steps {steps}")


def read_checkpoint(source: Path, step: int | None) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Its folder, what it says about itself, and its weights. Raises ConfigError as above."""
    path = sound_checkpoint(source, step)
    try:
        return path, read_state(path), read_weights(path)
    except DataError:
        if path.exists():
            raise
    return read_checkpoint(source, step)  # the run that goes on has removed it meanwhile


def export(source: Path, step: int | None, output: Path, hf: bool) -> str:
    """Write the folder; returns a line on what is in it."""
    refuse_existing(output)
    path, state, weights = read_checkpoint(source, step)
    config = ReformerConfig(**state["run"]["model"])
    if hf:
        save_hf(assemble(config, weights), output)
    else:
        save_model(output, config, weights)
    n_parameters = sum(weight.numel() for weight in weights.values())
    return f"wrote {output}: {n_parameters:,} parameters after {state['step']} steps, from {path}"


def main() -> int:
    arguments = parse_arguments()
    try:
        print(export(arguments.source, arguments.step, arguments.output, arguments.hf))
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
