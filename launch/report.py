"""Say in a few lines how a run went, or how several compare, and draw the curves.

Beside each first and last value is its step: training steps are reported every run.log_every, evaluations every
run.eval_every, and a run that was stopped in between has done more steps than its last line says.

python launch/report.py runs/demo/run
python launch/report.py runs/demo/run --plot loss.png
python launch/report.py runs/one runs/two runs/three --plot losses.png        a line each, and what differs
python launch/report.py runs/rounds_* --json rounds.json                      the same as values, for programs

Several runs are compared at the last step at which all were evaluated; where their steps have different numbers of
tokens, after the most tokens. What is no run, or has no training step yet, is left out. Of runs that differ in seeds
alone (run.seed, model.seed; what changes no score may differ too) there is a line for each group, and what it has more
than the group of the run that was given first.

Of more than 20 runs (or groups) the picture has the best ten in colour and the others in grey; of a setting with more
than ten values those of the best three are shown, with their number and range. --json has all.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.output import as_path, exit_code, reader_may_leave
from data_pipeline.staging import check_json, write_figures
from trainer.comparison import Comparison, compare, comparison_text, comparison_values, label
from trainer.config import ConfigError
from trainer.curve_plot import n_in_colour, plot_groups, plot_run, plot_runs
from trainer.curves import Curves, read_curves
from trainer.run_report import report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=as_path, nargs="+", metavar="RUN", help="folder of a run: what run.dir was")
    parser.add_argument("--plot", type=as_path, metavar="FILE", help="also draw the bits per byte (.png or .svg)")
    parser.add_argument("--json", type=as_path, metavar="FILE", help="also write what is said as values")
    return parser.parse_args()


def read_all(paths: Sequence[Path]) -> list[Curves]:
    """Of several, what is no run, or has no step yet, is left out with a note.

    Raises ConfigError where there is no other, or a single one is no run.
    """
    if len(paths) == 1:
        return [read_curves(paths[0])]
    runs, before = [], set[str]()
    for path in paths:
        place = os.path.realpath(path)
        if place in before:
            print(f"note: left out: {path} was given before", file=sys.stderr)
            continue
        before.add(place)
        try:
            runs.append(read_curves(path))
        except ConfigError as error:
            print(f"note: left out: {error}", file=sys.stderr)
    if not runs:
        raise ConfigError(f"none of these {len(paths)} is a run that can be reported")
    return runs


def draw(reported: Curves | Comparison, file: Path) -> None:
    """A picture of a run, of several, or of groups of them. Raises OSError or ValueError where it cannot be written."""
    if isinstance(reported, Curves):
        plot_run(reported, file)
    elif not reported.groups:
        plot_runs(reported.runs, file)
    else:
        drawn = reported.groups
        if n_in_colour(len(drawn)) < len(drawn):  # those of the best
            drawn = sorted(drawn, key=lambda group: group.score.mean if group.score else math.inf)
        labels = [label(group) for group in drawn]
        plot_groups([[reported.runs[place] for place in group.places] for group in drawn], labels, file)


def run(arguments: argparse.Namespace) -> None:
    check_json(arguments.json)
    if arguments.plot and (arguments.plot.is_dir() or not arguments.plot.suffix):
        raise ConfigError(f"--plot {arguments.plot}: give the name of a file that ends in .png, .svg or .pdf")
    runs = read_all(arguments.runs)
    compared = compare(runs) if len(runs) > 1 else None
    text, values = (comparison_text(compared), comparison_values(compared)) if compared else report(runs[0])
    with reader_may_leave():  # the file and the drawing are wanted all the same
        print(text)
    if arguments.json:
        write_figures(arguments.json, json.dumps(values, indent=1, allow_nan=False) + "\n")
    if arguments.plot:
        try:
            draw(compared or runs[0], arguments.plot)
        except (OSError, ValueError) as error:  # no such folder, or a format that matplotlib does not write
            raise ConfigError(f"cannot draw {arguments.plot}: {error}") from None
        print(f"drew {arguments.plot}")


def main() -> int:
    return exit_code(lambda: run(parse_arguments()), ConfigError)


if __name__ == "__main__":
    sys.exit(main())
