"""What a measurement will take, from those that took less: arithmetic, without torch."""

import math
from collections.abc import Sequence


def predict(points: Sequence[tuple[int, float]], place: int, power: float = 1.0) -> float:
    """The value at a place, such as a length, from (length, value) at one or more shorter ones, the longest last.

    It grows like the length to the power that the last two points show, held between 1 and 2 (4 to 16 times the
    value for 4 times the length): short lengths are dominated by what does not grow. One point shows none: then it is
    the power that is given.
    """
    longer, more = points[-1]
    if len(points) > 1:
        shorter, less = points[-2]
        power = min(max(math.log(more / less) / math.log(longer / shorter), 1.0), 2.0)
    return more * (place / longer) ** power


def predict_depth(points: Sequence[tuple[int, float]], n_layers: int) -> float:
    """The value at n_layers, from (layers, value) at smaller depths: so much for each layer, and so much besides.

    One point is in proportion: what would be there without any layer is not known.
    """
    deeper, more = points[-1]
    shallower, less = points[-2] if len(points) > 1 else (0, 0.0)
    return more + max(more - less, 0.0) / (deeper - shallower) * (n_layers - deeper)
