"""launch/train.py, in which one rank hangs in its seventh step: HANG="HOW RANK" python hanging_train.py …"""

import os
import runpy
import signal
import time
from pathlib import Path
from typing import Any

import trainer.loop
from data_pipeline.dataset import RowDataset

HANGS_AT = 6
"""The step, counted from 0."""


def stuck(*_: Any, **__: Any) -> Any:
    time.sleep(600)


def hang_in_data(position: int) -> None:
    """Every step takes 4 samples."""
    if position >= 4 * HANGS_AT:
        stuck()


def hang_in_forward(step: int) -> None:
    if step == HANGS_AT:
        stuck()


def stop_in_forward(step: int) -> None:
    if step == HANGS_AT:
        os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    how, rank = os.environ["HANG"].split()
    if os.environ["RANK"] == rank:
        read, forward = RowDataset.slice_of, trainer.loop.forward
        if how == "data":
            RowDataset.slice_of = lambda self, i, *rest: hang_in_data(i) or read(self, i, *rest)  # type: ignore
        else:
            hang = {"forward": hang_in_forward, "stop": stop_in_forward}[how]
            trainer.loop.forward = lambda engine, batch, step: hang(step) or forward(engine, batch, step)  # type: ignore
    runpy.run_path(str(Path(__file__).parents[2] / "launch" / "train.py"), run_name="__main__")


main()
