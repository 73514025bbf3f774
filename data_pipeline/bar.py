"""How far something is that may take hours: a bar at a terminal, lines in a log file."""

import sys
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 30.0
"""From one line to the next in a log file."""


class Bar(tqdm):
    """How far something is, on standard error: a bar at a terminal, a line now and then in a log file."""

    monitor_interval = 0
    """No thread that looks after bars which are rarely updated."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._in_log = not (sys.stderr and sys.stderr.isatty())
        if self._in_log:
            options |= {"mininterval": LINE_EVERY_S, "miniters": 1, "leave": False}
        if not sys.stderr:  # it is closed
            options["disable"] = True
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self._in_log:
            return bool(super().display(msg, pos))
        if msg is None and 0 < self.n < self.total:
            print(how_far(self.desc, self.n, self.total, self.unit, self.format_dict["elapsed"]), file=sys.stderr)
        return False


def how_far(what: str, done: int, total: int, unit: str, elapsed_s: float, before: int = 0) -> str:
    """A line on what is under way; `before`: what was done when it began."""
    sizes = [tqdm.format_sizeof(n) + unit if unit == "B" else f"{n:,}" for n in (done, total)]
    left = f", {tqdm.format_interval((total - done) * elapsed_s / (done - before))} left" if done > before else ""
    return f"{what}: {' of '.join(sizes)}{'' if unit == 'B' else f' {unit}s'}{left}"
