"""Which checkpoint of a run is used elsewhere: the newest that is sound, the one of a step, the best.

A run may go on meanwhile, and remove checkpoints while it writes others.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.errors import DataError
from trainer.checkpoint import SUMS, checked, problems, published, read_state, read_weights
from trainer.config import ConfigError
from trainer.run_files import CHECKPOINTS
from trainer.terminal import show

NONE_YET = "wait until the run saves one (run.save_every), or have it do so now and go on later (SIGUSR1)"


def sound_checkpoint(source: Path, step: int | None) -> Path:
    """The checkpoint to export: of a run the newest whose files are what was written, or the one of a step.

    Raises ConfigError where there is none, or the one that was asked for is damaged.
    """
    if not (source / CHECKPOINTS).is_dir():
        if step is not None:
            raise ConfigError(f"--step {step} is for the folder of a run, and {source} has no checkpoints in it")
        if not (source / SUMS).exists():
            what = "is neither a run nor a checkpoint" if source.exists() else "does not exist"
            raise ConfigError(f"{source} {what}: give the folder that was run.dir, or one of its checkpoints")
        if found := problems(source):
            raise ConfigError(f"{source} is damaged: {'; '.join(found)}")
        return source
    for checkpoint, found in checked(source, step):
        if not found:
            return checkpoint.path
        show(f"{checkpoint.path} is damaged: {'; '.join(found)}", error=True)
    asked = "" if step is None else f" of step {step}"
    others = [] if step is None else [str(each.step) for each in published(source) if not problems(each.path)]
    way_out = f"there are those of steps {', '.join(others)}" if others else NONE_YET
    raise ConfigError(f"{source} has no sound checkpoint{asked}: {way_out}")


def best_step(run: Path) -> int:
    """After how many steps the held-out rows were predicted best, of those that were evaluated and saved."""
    if not (run / CHECKPOINTS).is_dir():
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
