"""Pictures of bits per byte: of a run, of several, of groups of runs; by step, or by tokens where steps have others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.curves import HELD_OUT, Curves, steps_are_alike
from trainer.groups import band

Points = Sequence[tuple[float, float]]
"""Of a curve: steps or tokens, and bits per byte."""
TRAINING = "train/bits_per_byte"
MARKERS = "os^Dv"
"""Of every ten curves, after which colours come again."""
MOST_IN_COLOUR, BEST = 20, 10
"""Of more runs (or groups) than the first number, so many of the best are in colour and in the legend."""
OTHERS: dict[str, Any] = {"color": "0.75", "linewidth": 0.7, "markersize": 2}
"""How those that are in grey are drawn."""


def plot_run(run: Curves, file: Path) -> None:
    """Training batches and held-out rows. This and the others raise OSError or ValueError where they cannot write."""
    figure, axes = _figure(n_lines=0)
    _draw(axes, run, TRAINING, "-", label="training batches")
    _draw(axes, run, HELD_OUT, "o--", label="held-out documents")
    axes.legend()
    figure.savefig(file, dpi=150)


def plot_runs(runs: Sequence[Curves], file: Path) -> None:
    """Both of each run, which its folder names; the best first. Of those in grey only held-out rows."""
    by_tokens, n_shown = not steps_are_alike(runs), n_in_colour(len(runs))
    figure, axes = _figure(n_shown, by_tokens)
    others = [_draw(axes, run, HELD_OUT, ".-", by_tokens, **OTHERS) for run in runs[n_shown:]]
    held_out = []
    for number, run in enumerate(runs[:n_shown]):
        _draw(axes, run, TRAINING, "-", by_tokens, color=f"C{number}", alpha=0.3)
        style = f"{_marker(number)}--"
        held_out.append(_draw(axes, run, HELD_OUT, style, by_tokens, color=f"C{number}", label=_plain(str(run.path))))
    _zoom(axes, _better_half([*held_out, *others]))
    title = f"held-out documents (faint: training batches){_which(len(runs), 'runs')}"
    figure.legend(title=title, loc="outside upper center")
    figure.savefig(file, dpi=150)


def plot_groups(groups: Sequence[Sequence[Curves]], labels: Sequence[str], file: Path) -> None:
    """Of the held-out rows, at the steps at which all runs of a group have a score: the mean, and from the lowest to
    the highest a band. Of more than MOST_IN_COLOUR, the best first; those in grey have no band."""
    by_tokens = not steps_are_alike([run for runs in groups for run in runs])
    n_shown = n_in_colour(len(groups))
    figure, axes = _figure(n_shown, by_tokens)
    bands = [_columns(band(runs, HELD_OUT, by_tokens)) for runs in groups]
    for places, means, _, _ in bands[n_shown:]:
        axes.plot(places, means, ".-", **OTHERS)
    for number, (places, means, lows, highs) in enumerate(bands[:n_shown]):
        axes.plot(places, means, f"{_marker(number)}-", color=f"C{number}", label=_plain(labels[number]))
        axes.fill_between(places, lows, highs, color=f"C{number}", alpha=0.15, linewidth=0)
    edges = [[*zip((*places, *places), (*lows, *highs), strict=True)] for places, _, lows, highs in bands]
    _zoom(axes, _better_half(edges))
    title = "held-out documents: mean of runs that differ in seeds alone, and from the lowest to the highest"
    figure.legend(title=f"{title}{_which(len(groups), 'groups')}", loc="outside upper center")
    figure.savefig(file, dpi=150)


def n_in_colour(n_lines: int) -> int:
    """How many of so many runs or groups have a colour and a line in the legend."""
    return n_lines if n_lines <= MOST_IN_COLOUR else BEST


def _which(n_lines: int, what: str) -> str:
    """The end of a legend's title: which are in colour, where not all are."""
    n_shown = n_in_colour(n_lines)
    return "" if n_shown == n_lines else f"\nof the best {n_shown} of {n_lines} {what}; the others are grey"


def _better_half(curves: Sequence[Points]) -> Sequence[Points]:
    """What a picture with some in grey is to show, of all curves, the best first: the worst ones may have diverged."""
    return curves[: max(n_in_colour(len(curves)), len(curves) // 2)]


def _columns(points: Sequence[tuple[int, float, float, float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(zip(*points, strict=True)) if points else ((), (), (), ())


def _figure(n_lines: int, by_tokens: bool = False) -> tuple[Any, Any]:
    """An empty picture and its axes, with room for a legend of so many lines above."""
    from trainer.figures import Figure  # matplotlib's, which takes a while: only a drawing needs it

    figure: Any = Figure(figsize=(7, 3.5 + 0.22 * (n_lines and n_lines + 1)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="tokens" if by_tokens else "step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    return figure, axes


def _draw(axes: Any, run: Curves, tag: str, style: str, by_tokens: bool = False, **options: Any) -> Points:
    """A curve; its points."""
    points = [*run.finite(tag, by_tokens).items()]
    axes.plot(*zip(*points, strict=True) if points else ((), ()), style, **options)
    return points


def _marker(number: int) -> str:
    return MARKERS[number // 10 % len(MARKERS)]


def _zoom(axes: Any, curves: Sequence[Points]) -> None:
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
