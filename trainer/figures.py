"""Pictures of numbers, for TensorBoard and for files: there are no windows."""

import os
from collections.abc import Mapping

# matplotlib refuses to be imported where this names something that is not installed, as in a shell of Jupyter.
os.environ["MPLBACKEND"] = "agg"

from matplotlib.figure import Figure


def figure_by_position(by_position: Mapping[int, float]) -> Figure:
    """The loss in nats per token over the position in a document, by the position at which each range ends.

    A model that uses a context of some length has a curve that falls up to there.
    """
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(by_position), list(by_position.values()), "o-")
    axes.set_xscale("log", base=4)
    axes.set_xticks(list(by_position), [f"{end // 1024}K" if end >= 1024 else str(end) for end in by_position])
    axes.set(xlabel="tokens of the document before, up to", ylabel="held-out loss, nats per token")
    axes.grid(alpha=0.3)
    return figure
