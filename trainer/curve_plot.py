"""Pictures of bits per byte: of a run, of several, of groups of runs; by step, or by tokens where steps have others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.curves import HELD_OUT, Curves, steps_are_alike
from trainer.groups import band

TRAINING = "train/bits_per_byte"
MARKERS = "os^Dv"
"""Of every ten curves, after which colours come again."""


def plot_run(run: Curves, file: Path) -> None:
    """Training batches and held-out rows. This and the others raise OSError or ValueError where they cannot write."""
    figure, axes = _figure(n_lines=0)
    _draw(axes, run, TRAINING, "-", label="training batches")
    _draw(axes, run, HELD_OUT, "o--", label="held-out documents")
    axes.legend()
    figure.savefig(file, dpi=150)


def plot_runs(runs: Sequence[Curves], file: Path) -> None:
    """Both of each run, which its folder names."""
    by_tokens = not steps_are_alike(runs)
    figure, axes = _figure(len(runs), by_tokens)
    held_out = []
    for number, run in enumerate(runs):
        _draw(axes, run, TRAINING, "-", by_tokens, color=f"C{number}", alpha=0.3)
        style = f"{_marker(number)}--"
        held_out.append(_draw(axes, run, HELD_OUT, style, by_tokens, color=f"C{number}", label=_plain(str(run.path))))
    _zoom(axes, held_out)
    figure.legend(title="held-out documents (faint: training batches)", loc="outside upper center")
    figure.savefig(file, dpi=150)


def plot_groups(groups: Sequence[Sequence[Curves]], labels: Sequence[str], file: Path) -> None:
    """Of the held-out rows, at the steps at which all runs of a group have a score: the mean, and from the lowest to
    the highest a band."""
    by_tokens = not steps_are_alike([run for runs in groups for run in runs])
    figure, axes = _figure(len(groups), by_tokens)
    held_out = []
    for number, (runs, label) in enumerate(zip(groups, labels, strict=True)):
        points = band(runs, HELD_OUT, by_tokens)
        places, means, lows, highs = zip(*points, strict=True) if points else ((), (), (), ())
        axes.plot(places, means, f"{_marker(number)}-", color=f"C{number}", label=_plain(label))
        axes.fill_between(places, lows, highs, color=f"C{number}", alpha=0.15, linewidth=0)
        held_out.append([*zip(places, lows, strict=True), *zip(places, highs, strict=True)])
    _zoom(axes, held_out)
    title = "held-out documents: mean of runs that differ in seeds alone, and from the lowest to the highest"
    figure.legend(title=title, loc="outside upper center")
    figure.savefig(file, dpi=150)


def _figure(n_lines: int, by_tokens: bool = False) -> tuple[Any, Any]:
    """An empty picture and its axes, with room for a legend of so many lines above."""
    from trainer.figures import Figure  # matplotlib's, which takes a while: only a drawing needs it

    figure: Any = Figure(figsize=(7, 3.5 + 0.22 * (n_lines and n_lines + 1)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="tokens" if by_tokens else "step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    return figure, axes


def _draw(
    axes: Any, run: Curves, tag: str, style: str, by_tokens: bool = False, **options: Any
) -> list[tuple[int, float]]:
    """A curve; its points."""
    points = [*run.finite(tag, by_tokens).items()]
    axes.plot(*zip(*points, strict=True) if points else ((), ()), style, **options)
    return points


def _marker(number: int) -> str:
    return MARKERS[number // 10 % len(MARKERS)]


def _zoom(axes: Any, curves: Sequence[Sequence[tuple[int, float]]]) -> None:
    """Show the part after half of the shortest curve: their beginnings would leave no room for what differs."""
    last = min((max(place for place, _ in points) for points in curves if points), default=0)
    later = [bits for points in curves for place, bits in points if 2 * place > last]
    if later:
        low, high = min(later), max(later)
        margin = 0.1 * (high - low) or 0.02 * high
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlim(left=last / 2)


def _plain(label: str) -> str:
    """What matplotlib shows as it is: it leaves out what begins with "_", and reads "$" as mathematics."""
    return f" {label}".replace("$", r"\$")
