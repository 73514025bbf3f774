"""What the memory benchmark concludes: bytes per layer, what a vocabulary adds, what reversibility costs and saves.

Predictions come from the configuration alone. Nothing is fitted, and no model is built for them but one without memory.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

from bench.peers import Sizes, config_of
from bench.process import Result

from reformer import ReformerConfig
from reformer.lsh.hashing import bucket_dtype, bucket_factors
from reformer.weights import skeleton

STATE = ("parameters", "gradients", "optimizer")
"""Keys of a result, in bytes: what training holds whatever the length."""
VARIED = ("seq_len", "n_layers", "vocab_size")
"""Sizes in which results of one run differ."""
GIB = 2**30


def predicted_bytes(sizes: Sizes) -> dict[str, int]:
    """What of ours grows with depth and vocabulary.

    Parameters and gradients in fp32, AdamW's two moments in fp32, and the buckets [B, H, R, T] of every LSH layer.
    """
    config = config_of(sizes)
    parameters = sum(parameter.nbytes for parameter in skeleton(config).parameters())
    kinds = [config.attention_kind(layer) for layer in range(sizes.n_layers)]
    buckets = kinds.count("lsh") * bucket_bytes(config, sizes.seq_len)
    return {"parameters": parameters, "gradients": parameters, "optimizer": 2 * parameters, "buckets": buckets}


def bucket_bytes(config: ReformerConfig, seq_len: int) -> int:
    """Bytes of one LSH layer's buckets [1, H, R, T], in the dtype that so many buckets need."""
    factors = bucket_factors(config.n_buckets, seq_len, config.lsh_chunk_len)
    return config.n_heads * config.n_hashes * seq_len * bucket_dtype(factors).itemsize


def state_gib(result: Result) -> float:
    """Parameters, gradients and the optimizer's state."""
    return sum(result[name] for name in STATE) / GIB


def activations_gib(result: Result) -> float:
    """What is left of the peak without libraries, parameters, gradients and the optimizer's state."""
    return result["peak_gib"] - result["imports_gib"] - state_gib(result)


def measured(results: Sequence[Result], part: str, peer: str = "ours") -> list[Result]:
    """The measurements of one peer in one part."""
    return [result for result in results if (result["part"], result["peer"]) == (part, peer) and "seconds" in result]


def ends(results: Sequence[Result], part: str, key: str) -> tuple[Result, Result] | None:
    """The measurements with the smallest and the largest value of a key; None if there are no two values."""
    found = sorted(measured(results, part), key=lambda result: result[key])
    return (found[0], found[-1]) if found and found[0][key] < found[-1][key] else None


def growth_of_prediction(less: Result, more: Result, sizes: Mapping[str, int]) -> dict[str, int]:
    """The bytes by which the prediction for one measurement is above that for another."""
    low, high = (predicted_bytes(Sizes(**{**sizes, **{key: one[key] for key in VARIED}})) for one in (less, more))
    return {name: high[name] - low[name] for name in high}


# Figures: from the results of a run and its sizes, or None where they were not measured. Then what is printed.


def layer_figure(part: str, results: Sequence[Result], sizes: Mapping[str, int]) -> Result | None:
    """Bytes per layer between the shallowest and the deepest of ours in a part, predicted and measured.

    And between neighbours: what is taken once, such as by the first layer that is at neither end of the stack, is not
    taken by every layer.
    """
    if not (found := ends(results, part, "n_layers")):
        return None
    by_depth = {result["n_layers"]: result for result in measured(results, part)}
    neighbours = pairwise(by_depth[depth] for depth in sorted(by_depth))
    between = [bytes_per_layer(*pair, sizes) for pair in neighbours]
    return {"seq_len": found[0]["seq_len"], **bytes_per_layer(*found, sizes), "between": between}


def bytes_per_layer(less: Result, more: Result, sizes: Mapping[str, int]) -> Result:
    """Of what the deeper of two measurements takes beyond the other."""
    n_layers = more["n_layers"] - less["n_layers"]
    predicted = {name: size / n_layers for name, size in growth_of_prediction(less, more, sizes).items()}
    measured_bytes = (more["peak_gib"] - less["peak_gib"]) * GIB / n_layers
    return {
        "n_layers": [less["n_layers"], more["n_layers"]],
        "predicted_bytes": predicted,
        "measured_bytes": measured_bytes,
        "ratio": measured_bytes / sum(predicted.values()),
    }


def layer_line(of: str, figure: Result) -> str:
    predicted = figure["predicted_bytes"]
    parts = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in predicted.items())
    between = ", ".join(
        f"{one['n_layers'][0]} to {one['n_layers'][1]}: {one['measured_bytes'] / 1e6:.2f}" for one in figure["between"]
    )
    return (
        f"Bytes per layer at {figure['seq_len']:,} tokens, from {figure['n_layers'][0]} to {figure['n_layers'][1]} "
        f"layers: predicted {sum(predicted.values()) / 1e6:.2f} MB ({parts}), "
        f"measured {figure['measured_bytes'] / 1e6:.2f} MB ({between}), {figure['ratio']:.3f} times ({of})"
    )


def vocabulary_figure(results: Sequence[Result], sizes: Mapping[str, int]) -> Result | None:
    """What the largest vocabulary of part `vocabulary` takes beyond the smallest, predicted and measured."""
    if not (found := ends(results, "vocabulary", "vocab_size")):
        return None
    less, more = found
    predicted_gib = sum(growth_of_prediction(less, more, sizes).values()) / GIB
    return {
        "seq_len": less["seq_len"],
        "vocab_sizes": [less["vocab_size"], more["vocab_size"]],
        "predicted_gib": predicted_gib,
        "measured_gib": more["peak_gib"] - less["peak_gib"],
        "ratio": more["peak_gib"] / (less["peak_gib"] + predicted_gib),
    }


def vocabulary_line(figure: Result) -> str:
    small, large = figure["vocab_sizes"]
    return (
        f"A vocabulary of {large:,} in place of {small:,} at {figure['seq_len']:,} tokens: parameters, gradients and "
        f"moments predicted {figure['predicted_gib']:.3f} GiB more, measured {figure['measured_gib']:.3f} GiB more; "
        f"the peak is {figure['ratio']:.3f} times the small one's with what is predicted (target: within 10%)"
    )


def recompute_figure(results: Sequence[Result], _: Mapping[str, int]) -> Result | None:
    """What reversibility costs in time and saves in activations: ours against plain autograd, part `recompute`."""
    ours, plain = measured(results, "recompute"), measured(results, "recompute", "ours-autograd")
    if not (ours and plain):
        return None
    ours_s, plain_s = ([result["seconds"] for result in some] for some in (ours, plain))
    ours_gib, plain_gib = (statistics.median(map(activations_gib, some)) for some in (ours, plain))
    return {
        "seq_len": ours[0]["seq_len"],
        "n_layers": ours[0]["n_layers"],
        "times": statistics.median(ours_s) / statistics.median(plain_s),
        "times_by_round": [a / b for a, b in zip(ours_s, plain_s, strict=False)],
        "activations_gib": [ours_gib, plain_gib],
        "activation_share": ours_gib / plain_gib,
    }


def recompute_line(figure: Result) -> str:
    by_round, (ours_gib, plain_gib) = figure["times_by_round"], figure["activations_gib"]
    return (
        f"Reversible, {figure['n_layers']} layers at {figure['seq_len']:,} tokens: {figure['times']:.2f} "
        f"({min(by_round):.2f}..{max(by_round):.2f}) times the time of plain autograd (target: at most 1.40); "
        f"activations {ours_gib:.3f} of {plain_gib:.3f} GiB, {figure['activation_share']:.3f} of them "
        f"(target: at most 0.25)"
    )


FIGURES: dict[str, tuple[Callable[[Sequence[Result], Mapping[str, int]], Result | None], Callable[[Result], str]]] = {
    "depth": (partial(layer_figure, "depth"), partial(layer_line, "with the gaps that malloc keeps")),
    "layer": (partial(layer_figure, "layer"), partial(layer_line, "target: within 10%")),
    "vocabulary": (vocabulary_figure, vocabulary_line),
    "recompute": (recompute_figure, recompute_line),
}
"""By the name of a part."""
