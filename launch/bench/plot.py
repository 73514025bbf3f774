"""Measurements as a picture, both axes logarithmic: what benchmark_plot.py and `benchmark.py memory` draw."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError

# Names and colours of the peers; the colours are Okabe and Ito's, which remain distinct to the colour-blind.
PEERS = {
    "ours": ("Longhand", "#0072B2"),
    "ours-dense": ("Longhand, dense", "#56B4E9"),
    "huggingface": ("Hugging Face", "#D55E00"),
    "lucidrains": ("reformer-pytorch", "#CC79A7"),
    "dense": ("dense attention", "#009E73"),
}
SECONDS = [
    (0.001, "1 ms"),
    (0.01, "10 ms"),
    (0.1, "0.1 s"),
    (1, "1 s"),
    (10, "10 s"),
    (60, "1 min"),
    (600, "10 min"),
    (3600, "1 h"),
]
SECONDS += [(36_000, "10 h")]
GIB = [(2.0**power, f"{2.0**power:g} GiB") for power in range(-3, 11)]
FORMATS = (".png", ".svg", ".pdf")
MEMORY_PARTS = ("length", "depth", "layer")
"""The parts of `memory` that are drawn; of the others a figure is printed."""
LABEL_GAP = 0.055
"""Smallest distance of two labels, as a share of the height of a panel."""

Record = dict[str, Any]


@dataclass
class Line:
    """One peer's values by length or depth, and what was predicted for the first that was left out."""

    values: dict[int, float] = field(default_factory=dict)
    predicted: dict[int, float] = field(default_factory=dict)

    @property
    def end(self) -> tuple[int, float]:
        return list({**self.values, **self.predicted}.items())[-1]


def lines(results: Sequence[Record], key: str, predicted_key: str, axis: str = "seq_len") -> dict[str, Line]:
    """By peer, the medians of a key along an axis, from short to long."""
    found: dict[str, Line] = {}
    for result in sorted(results, key=lambda result: result[axis]):
        line, place = found.setdefault(result["peer"], Line()), result[axis]
        if key in result:
            same = [one[key] for one in results if (one["peer"], one[axis]) == (result["peer"], place) and key in one]
            line.values[place] = statistics.median(same)
        elif predicted_key in result and line.values and not line.predicted:
            line.predicted[place] = result[predicted_key]
    return {peer: line for peer, line in found.items() if line.values}


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The places, each moved as little as makes neighbours at least a gap apart, in the same order.

    Neighbours that are too close become a group, spread evenly around the mean of where its members wanted to be.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(places)), key=lambda index: places[index]):
        groups.append([index])
        while len(groups) > 1 and _first(groups[-1], places, gap) - _last(groups[-2], places, gap) < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = list(places)
    for group in groups:
        for rank, index in enumerate(group):
            moved[index] = _first(group, places, gap) + rank * gap
    return moved


def _first(group: Sequence[int], places: Sequence[float], gap: float) -> float:
    return statistics.mean(places[index] for index in group) - gap * (len(group) - 1) / 2


def _last(group: Sequence[int], places: Sequence[float], gap: float) -> float:
    return _first(group, places, gap) + gap * (len(group) - 1)


def title(record: Record) -> str:
    """What was measured on what, in one line."""
    sizes = record["sizes"]
    kinds = {"memory": "a model", "model": f"a model of {sizes['n_layers']} layers"}
    step = "forward, backward and AdamW's update" if record["what"] == "memory" else "forward and backward"
    return (
        f"One training step of {kinds.get(record['what'], 'one layer of attention')}: d_model {sizes['d_model']}, "
        f"{sizes['n_heads']} heads, {sizes['n_hashes']} rounds, chunks of {sizes['chunk_len']}, {record['dtype']}\n"
        f"{step} with {record['threads']} threads on {record['cpu']}"
    )


def tokens(length: int) -> str:
    """1,024 as 1K, 1,048,576 as 1M."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if length % size == 0:
            return f"{length // size}{unit}"
    return f"{length:,}"


def draw_panel(
    axes: Any,
    by_peer: dict[str, Line],
    heading: str,
    ticks: Sequence[tuple[float, str]],
    along: str = "tokens in the sequence",
    name_of: Callable[[int], str] = tokens,
) -> None:
    """One panel: a line for each peer with its name at the end."""
    places = sorted({place for line in by_peer.values() for place in line.values})
    axes.set(xscale="log", yscale="log")
    for peer, line in by_peer.items():
        _, colour = PEERS.get(peer, (peer, "#555555"))
        ours = peer == "ours"
        style = {"color": colour, "linewidth": 2.6 if ours else 1.6, "zorder": 3 if ours else 2}
        axes.plot(line.values.keys(), line.values.values(), marker="o", markersize=5 if ours else 4, **style)
        if line.predicted:
            last = list(line.values.items())[-1]
            onward = [last, line.end]
            axes.plot(*zip(*onward, strict=True), ls=":", **{**style, "linewidth": 1.2})
            axes.plot(*line.end, marker="o", markersize=4, markerfacecolor="white", **style)
    axes.set_xticks(places, [name_of(place) for place in places])
    values = [value for line in by_peer.values() for value in (*line.values.values(), *line.predicted.values())]
    bottom = max((value for value, _ in ticks if value <= min(values)), default=min(values))
    top = min((value for value, _ in ticks if value >= max(values)), default=max(values))
    axes.set_yticks([value for value, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(bottom / 1.05, top * 1.05)
    axes.minorticks_off()
    axes.tick_params(length=0, labelsize=9)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.set_title(heading, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(along, fontsize=9)
    label_ends(axes, by_peer)


def label_ends(axes: Any, by_peer: dict[str, Line]) -> None:
    """The name of each peer to the right of where its line ends, without overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform(line.end) for line in by_peer.values()]
    heights = apart([y for _, y in ends], LABEL_GAP)
    for (peer, line), (x, _), height in zip(by_peer.items(), ends, heights, strict=True):
        name, colour = PEERS.get(peer, (peer, "#555555"))
        axes.annotate(
            f"{name}, predicted" if line.predicted else name,
            (x, height),
            xycoords="axes fraction",
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            fontweight="bold" if peer == "ours" else "normal",
        )


def check_output(output: Path) -> None:
    """Raises DataError if there is no way to draw into this file."""
    if not output.parent.is_dir():
        raise DataError(f"cannot draw {output}: there is no folder {output.parent}")
    if output.suffix not in FORMATS:
        raise DataError(f"cannot draw {output}: its name must end in one of {', '.join(FORMATS)}")
    try:  # without leaving a file, or changing one
        with output.open("r+b") if output.exists() else tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise DataError(f"cannot draw {output}: {error.strerror}") from None


def check_results(record: Record) -> None:
    """Raises DataError if there is nothing to draw, or if a line would join what was measured at different lengths."""
    measured = [result for result in record["results"] if "seconds" in result]
    if not measured:
        raise DataError("there is no measurement in these files: run launch/benchmark.py again")
    if record["what"] != "memory":
        return
    parts = dict.fromkeys(result["part"] for result in measured)
    if not set(parts) & set(MEMORY_PARTS):
        raise DataError(
            f"there is nothing to draw: a picture shows {', '.join(MEMORY_PARTS)}, and measured was "
            f"{', '.join(parts)}. Run launch/benchmark.py memory with --parts {' '.join(MEMORY_PARTS)}"
        )
    for part in ("depth", "layer"):
        lengths = sorted({result["seq_len"] for result in record["results"] if result["part"] == part})
        if len(lengths) > 1:
            raise DataError(
                f"part {part} was measured at {' and '.join(f'{length:,}' for length in lengths)} tokens, "
                "which do not belong in one line. Draw the files one by one"
            )


def draw(record: Record, output: Path) -> None:
    """Two panels: time and memory by length, or memory by length and by depth."""
    from trainer.figures import Figure  # matplotlib's, which takes a while: only a drawing needs it

    check_results(record)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    figure.suptitle(title(record), x=0.01, ha="left", fontsize=9, color="#555555")
    (draw_memory if record["what"] == "memory" else draw_time_and_memory)(panels, record)
    try:
        figure.savefig(output, dpi=150, facecolor="white")
    except OSError as error:
        raise DataError(f"cannot draw {output}: {error.strerror}") from None


def draw_time_and_memory(panels: Any, record: Record) -> None:
    draw_panel(panels[0], lines(record["results"], "seconds", "predicted_s"), "Time of a step", SECONDS)
    draw_panel(panels[1], lines(record["results"], "peak_gib", "predicted_gib"), "Peak memory", GIB)


def draw_memory(panels: Any, record: Record) -> None:
    """By length, and by depth: all peers at one length, and ours at a longer one."""
    of_part = {part: [result for result in record["results"] if result["part"] == part] for part in MEMORY_PARTS}
    by_length = lines(of_part["length"], "peak_gib", "predicted_gib")
    by_depth = lines(of_part["depth"], "peak_gib", "predicted_gib", "n_layers")
    for line in lines(of_part["layer"], "peak_gib", "predicted_gib", "n_layers").values():
        by_depth[f"Longhand, {tokens(of_part['layer'][0]['seq_len'])} tokens"] = line
    depth_tokens = f", {tokens(of_part['depth'][0]['seq_len'])} tokens" if of_part["depth"] else ""
    if by_length:
        draw_panel(panels[0], by_length, f"Peak memory by length, {record['sizes']['n_layers']} layers", GIB)
    if by_depth:
        draw_panel(panels[1], by_depth, f"Peak memory by depth{depth_tokens}", GIB, "layers", str)
    for panel, by_peer in zip(panels, (by_length, by_depth), strict=True):
        panel.set_visible(bool(by_peer))
