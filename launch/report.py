"""Say in a few lines how a run went, and draw its curve.

Beside each first and last value is its step: training steps are reported every run.log_every, evaluations every
run.eval_every, and a run that was stopped in between has done more steps than its last line says.

python launch/report.py runs/demo/run
python launch/report.py runs/demo/run --plot loss.png
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.output import exit_code, reader_may_leave
from data_pipeline.store import Store
from trainer.baseline import unigram_score
from trainer.config import ConfigError, RunConfig
from trainer.terminal import see_curves

Point = tuple[int, float | None]
"""A step, and what was reported of it."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run: what run.dir was")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the bits per byte by step (.png or .svg)")
    return parser.parse_args()


def read_run(path: Path) -> tuple[RunConfig, list[dict[str, float]]]:
    """The configuration of a run, and its metrics by step."""
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        # The last one may be on its way, or cut short by a kill.
        return RunConfig(**record["config"]), [json.loads(line) for line in lines if line.endswith("\n")]
    except OSError as error:
        raise ConfigError(f"{path} is not the folder of a run: cannot read {error.filename}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: run.json or metrics.jsonl cannot be read: {error!r}") from None


def column(metrics: list[dict[str, float]], tag: str) -> list[float]:
    """The finite values of a tag."""
    return [values[tag] for values in metrics if values.get(tag) is not None]


def points(metrics: list[dict[str, float]], tag: str) -> list[Point]:
    """The values of a tag, each with its step; None for what was not finite."""
    return [(int(values["step"]), values[tag]) for values in metrics if tag in values]


def recovered_mass(metrics: list[dict[str, float]]) -> list[Point]:
    """Of each evaluation the share of dense attention that LSH attention recovers, the mean of its layers."""
    means: list[Point] = []
    for values in metrics:
        tags = [tag for tag in values if tag.startswith("lsh/") and tag.endswith("/recovered_mass")]
        if shares := [values[tag] for tag in tags if values[tag] is not None]:
            means.append((int(values["step"]), sum(shares) / len(shares)))
    return means


def best_evaluation(metrics: list[dict[str, float]]) -> Point | None:
    """The held-out bits per byte that were lowest; None where these are the last ones, or there are none."""
    evaluations = points(metrics, "eval/bits_per_byte")
    finite = [(bits, step) for step, bits in evaluations if bits is not None]
    if not finite or min(finite)[1] == evaluations[-1][0]:
        return None
    bits, step = min(finite)
    return step, bits


def unigram(config: RunConfig) -> str:
    """What a unigram model says of the held-out rows, or why that is not known: the rest of a report needs no store."""
    try:
        score = unigram_score(Store.open(config.data.store), config.data, config.run.eval_rows)
    except DataError as error:
        return f"unigram model, held out: not known, since {error}"
    return f"{row('unigram model, held out:', last=f'{score.bits_per_byte:.4f}')} bits per byte"


def report(path: Path, config: RunConfig, metrics: list[dict[str, float]]) -> str:
    """The text of the report."""
    if not any("train/loss" in values for values in metrics):
        raise ConfigError(f"{path} has no training step yet: train first, or wait for its first line")
    lines = [row("", "first", "step", "last", "step")]
    lines += [row(name, *cells(said[0]), *cells(said[-1])) for name, said in scores(metrics)]
    if best := best_evaluation(metrics):
        lines.append(row("held out, best, bits per byte", "", "", *cells(best)))
    if column(metrics, "eval/loss"):
        lines.append(unigram(config))
    if config.data.mixture:
        lines.append(f"held out is {config.data.eval_split!r} of {config.data.store}, batches are of the mixture")
    lines += [row(name, last=value) for name, value in costs(metrics)]
    return "\n".join([*lines, "", f"the run lies in {path}", f"see its curves:  {see_curves(path)}"])


def row(name: str, first: str = "", first_step: str = "", last: str = "", last_step: str = "") -> str:
    """A line of the report: reports and evaluations are not of the same steps, so each value has its own beside it."""
    return f"{name:<32}{first:>12}{first_step:>8}{last:>12}{last_step:>8}".rstrip()


def cells(point: Point) -> tuple[str, str]:
    """A value and its step; "none" for what was not finite."""
    step, value = point
    return "none" if value is None else f"{value:.4f}", str(step)


def scores(metrics: list[dict[str, float]]) -> Iterator[tuple[str, list[Point]]]:
    """What is predicted how well: a name, and its values in order, at least one."""
    names: dict[str, str] = {}
    for split, name in (("train", "training batch"), ("eval", "held out")):
        names |= {f"{split}/loss": f"{name}, nats per token", f"{split}/bits_per_byte": f"{name}, bits per byte"}
    sources = sorted({tag for values in metrics for tag in values if re.fullmatch("eval/source/.+/bits_per_byte", tag)})
    names |= {tag: f"  of {tag.split('/')[2]}, bits per byte" for tag in sources}
    positions = sorted({tag for values in metrics for tag in values if tag.startswith("eval/loss_at/")})
    names |= {tag: f"  up to {tag.split('/')[-1].lstrip('0')} tokens before" for tag in positions}
    names["eval/lsh_gain"] = "  more without LSH attention"
    for tag, name in names.items():
        if said := points(metrics, tag):
            yield name, said
    if recovered := recovered_mass(metrics):
        yield "dense attention recovered", recovered


def costs(metrics: list[dict[str, float]]) -> Iterator[tuple[str, str]]:
    """What the run took, and what went wrong in it: a name and a value."""
    speed = sorted(column(metrics, "speed/tokens_per_s"))
    yield "tokens per second (median)", f"{speed[len(speed) // 2]:,.0f}"
    if shares := sorted(column(metrics, "speed/mfu")):
        yield "of the devices' peak (median)", f"{shares[len(shares) // 2]:.1%}"
    yield "peak memory of a process, GiB", f"{max(column(metrics, 'memory/peak_gib')):.2f}"
    if saves := column(metrics, "speed/save_share"):
        yield "share of checkpoints", f"{saves[-1]:.1%}"
    for tag, name in (("train/skipped_steps", "steps skipped"), ("train/spikes", "spikes of the loss")):
        if counts := column(metrics, tag):
            yield name, f"{counts[-1]:.0f}"


def plot(metrics: list[dict[str, float]], file: Path) -> None:
    """Bits per byte of training batches and of the held-out rows, by step."""
    from trainer.figures import Figure  # matplotlib's, which takes a while: only a drawing needs it

    axes: Any
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for tag, style, label in (("train", "-", "training batches"), ("eval", "o--", "held-out documents")):
        steps = [values["step"] for values in metrics if values.get(f"{tag}/bits_per_byte") is not None]
        axes.plot(steps, column(metrics, f"{tag}/bits_per_byte"), style, label=label)
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def run(arguments: argparse.Namespace) -> None:
    config, metrics = read_run(arguments.run)
    text = report(arguments.run, config, metrics)
    with reader_may_leave():  # the drawing is wanted all the same
        print(text)
    if arguments.plot:
        try:
            plot(metrics, arguments.plot)
        except (OSError, ValueError) as error:  # no such folder, or a format that matplotlib does not write
            raise ConfigError(f"cannot draw {arguments.plot}: {error}") from None
        print(f"drew {arguments.plot}")


def main() -> int:
    return exit_code(partial(run, parse_arguments()), ConfigError)


if __name__ == "__main__":
    sys.exit(main())
