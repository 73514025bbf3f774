"""A window of steps under torch's profiler: RUN/profile/rank_00000_steps_10-12.json.gz, which Perfetto opens.

The window is named by steps as they are logged, counted from 1, whatever step the run starts from, and outside of it
nothing is done or kept. Rank 0 alone is profiled: the others do the same work, and wait for it in the same collectives.
In the trace the steps are ranges "step 10" and their phases those of timing.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainer.config import profiled_steps
from trainer.run_files import PROFILE
from trainer.terminal import show


class Profiler:
    """Profiles those of a run's steps that it was asked for. A context manager: what it has at the end, it keeps."""

    def __init__(self, run_dir: Path, profile_steps: str | None, rank: int) -> None:
        """profile_steps: run.profile_steps, "10..12" or None."""
        self._folder, self._rank = run_dir / PROFILE, rank
        steps = profiled_steps(profile_steps) if profile_steps is not None else range(0)
        self.last_step = steps[-1] if steps else 0
        """After which the trace is to be written; 0 for none."""
        self._wanted = steps if rank == 0 else range(0)
        self._profile: profile | None = None
        self._seen: list[int] = []

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a step, the first being 1."""
        if step not in self._wanted:
            yield
            return
        if self._profile is None:
            self._profile = profile(activities=_activities())
            self._profile.start()
        self._seen.append(step)
        with record_function(f"step {step}"):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # so that the step's range holds its kernels

    def write(self) -> None:
        """Stop, and publish the trace, if there is one, under the name of the steps that are in it. Raises OSError."""
        if self._profile is None:
            return
        finished, self._profile = self._profile, None
        finished.stop()
        name = f"rank_{self._rank:05d}_steps_{self._seen[0]}-{self._seen[-1]}.json.gz"
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f".partial-{name}"
        finished.export_chrome_trace(str(partial))
        partial.replace(self._folder / name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Write the trace of a window that the run has stopped in."""
        try:
            self.write()
        except OSError as unwritten:  # the run is over: there is nothing that this could stop
            show(f"cannot write the profile in {self._folder}: {unwritten}", error=True)


def _activities() -> list[ProfilerActivity]:
    devices = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *devices]
