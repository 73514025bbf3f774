"""What is said about the results of `launch/benchmark.py pipeline`: medians, ratios, targets.

Pure functions from results (dictionaries) to figures and lines.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

Result = dict[str, Any]


def of(results: Sequence[Result], **values: Any) -> list[Result]:
    """The measurements among results with these values; not what was left out or failed."""
    measured = [result for result in results if not {"left_out", "error"} & set(result)]
    return [result for result in measured if all(result.get(key) == value for key, value in values.items())]


def median(results: Sequence[Result], key: str) -> float:
    return statistics.median(result[key] for result in results)


def tokenize(results: Sequence[Result]) -> list[Result]:
    """For each way and number of workers: MB/s of tokenizing and of the whole command, and of what raw does.

    of_raw: raw-numpy in as many processes, in the same rounds; of_raw_times_workers: in one process, times workers.
    """
    timed = [result for result in of(results, part="tokenize") if "stage_s" in result]
    figures = []
    for peer, workers in dict.fromkeys((result["peer"], result["workers"]) for result in timed):
        mine = of(timed, peer=peer, workers=workers)
        speeds = [result["bytes"] / result["stage_s"] / 1e6 for result in mine]
        figure = {"peer": peer, "workers": workers, "mb_s": statistics.median(speeds)}
        figure |= {"slowest": min(speeds), "fastest": max(speeds), "rounds": len(mine)}
        if "seconds" in mine[0]:
            whole = statistics.median(result["bytes"] / result["seconds"] / 1e6 for result in mine)
            figure |= {"whole_mb_s": whole, "peak_gib": max(result["peak_gib"] for result in mine)}
        figures.append(figure)
    speed = {(figure["peer"], figure["workers"]): figure["mb_s"] for figure in figures}
    for figure in figures:
        for key, raw, times in (
            ("of_raw", ("raw-numpy", figure["workers"]), 1),
            ("of_raw_list", ("raw-list", figure["workers"]), 1),
            ("of_raw_times_workers", ("raw-numpy", 1), figure["workers"]),
        ):
            if raw in speed:
                figure[key] = figure["mb_s"] / speed[raw] / times
    return figures


def read(results: Sequence[Result]) -> list[Result]:
    """For each reader, warm and cold: rows a second, and the largest share that was in memory before a pass."""
    measured = of(results, part="read")
    figures = []
    for peer, temperature in dict.fromkeys((result["peer"], result["temperature"]) for result in measured):
        mine = of(measured, peer=peer, temperature=temperature)
        speeds = [result["rows_per_s"] for result in mine]
        figure = {"peer": peer, "temperature": temperature, "rows_per_s": statistics.median(speeds)}
        figure |= {"slowest": min(speeds), "fastest": max(speeds), "median_ms": median(mine, "median_ms")}
        figure |= {"p99_ms": median(mine, "p99_ms"), "bytes": mine[0]["bytes"]}
        figure["resident_before"] = max(result["resident_before"] for result in mine)
        figures.append(figure)
    return figures


# Lines.


def tokenize_lines(results: Sequence[Result]) -> list[str]:
    lines = [
        f"{'tokenize':<14}{'workers':>8}{'MB/s (min..max)':>24}{'whole MB/s':>12}{'of raw':>8}{'of raw lists':>14}"
        f"{'of 1 x workers':>16}{'GiB':>7}"
    ]
    for figure in tokenize(results):
        speed = f"{figure['mb_s']:.1f} ({figure['slowest']:.1f}..{figure['fastest']:.1f})"
        whole, gib = number(figure, "whole_mb_s", ".1f"), number(figure, "peak_gib", ".2f")
        ratios = [number(figure, key, ".3f") for key in ("of_raw", "of_raw_list", "of_raw_times_workers")]
        lines.append(
            f"{figure['peer']:<14}{figure['workers']:>8}{speed:>24}{whole:>12}{ratios[0]:>8}{ratios[1]:>14}"
            f"{ratios[2]:>16}{gib:>7}"
        )
    lines += [
        f"datatrove's ids are those of SentencePiece in {result['same_lines']:,} of {result['compared_lines']:,} lines"
        for result in results
        if "same_lines" in result
    ]
    return [*lines, "target: ours at least 0.90 of raw"]


def number(figure: Result, key: str, form: str) -> str:
    return format(figure[key], form) if key in figure else "-"


def size_lines(results: Sequence[Result]) -> list[str]:
    return [
        f"size {result['corpus']}: {result['bytes_per_token']:.3f} bytes per token in tokens/, "
        f"{result['store_bytes_per_token']:.3f} in all; {result['tokens']:,} tokens of {result['vocab_size']:,} kinds, "
        f"{result['padding']:.2%} padding (target: at most 1.40)"
        for result in of(results, part="size")
    ]


def read_lines(results: Sequence[Result]) -> list[str]:
    lines = [
        f"{'read':<14}{'':>6}{'rows/s (min..max)':>30}{'median ms':>11}{'99% ms':>9}{'MB':>9}{'in memory before':>18}"
    ]
    for figure in read(results):
        speed = f"{figure['rows_per_s']:,.0f} ({figure['slowest']:,.0f}..{figure['fastest']:,.0f})"
        lines.append(
            f"{figure['peer']:<14}{figure['temperature']:>6}{speed:>30}{figure['median_ms']:>11.3f}"
            f"{figure['p99_ms']:>9.3f}{figure['bytes'] / 1e6:>9.1f}{figure['resident_before']:>18.1%}"
        )
    return lines


def memory_lines(results: Sequence[Result]) -> list[str]:
    return [
        f"memory {result['corpus']} ({result['documents']:,}, {result['bytes'] / 1e6:.0f} MB), {result['command']}: "
        f"{result['peak_gib']:.2f} GiB in the largest process, {result['seconds']:.0f} s (target: below 1 GB)"
        for result in of(results, part="memory")
    ]


def stall_lines(results: Sequence[Result]) -> list[str]:
    return [
        f"stall: {result['data_stall']:.3%} of a step of {result['step_s']:.2f} s, {result['largest']:.3%} at most "
        "(target: below 1%)"
        for result in of(results, part="stall")
    ]


def scale_lines(results: Sequence[Result]) -> list[str]:
    lines = []
    for result in of(results, part="scale", what="plan"):
        steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["step_s"].items())
        lines.append(
            f"scale: {result['documents']:,} documents, {result['bytes'] / 1e12:.2f} TB, {result['rows']:,} rows: "
            f"{result['planning_s']:.1f} s ({steps}), {result['peak_gib']:.2f} GiB (target: a minute, 2 GB)"
        )
    for result in of(results, part="scale", what="permutation"):
        lines += [
            f"scale: a permutation of {length}: {one['call_us']:.1f} us and {one['peak_bytes']:,} bytes a call"
            for length, one in result["by_length"].items()
        ]
    return lines


LINES: dict[str, Callable[[Sequence[Result]], list[str]]] = {
    "tokenize": tokenize_lines,
    "size": size_lines,
    "read": read_lines,
    "memory": memory_lines,
    "stall": stall_lines,
    "scale": scale_lines,
}
FIGURES: dict[str, Callable[[Sequence[Result]], list[Result]]] = {"tokenize": tokenize, "read": read}


def lines_of(part: str, results: Sequence[Result]) -> list[str]:
    """What is said about a part: its figures, then what was left out and what failed, and why."""
    mine = [result for result in results if result["part"] == part]
    excuses = []
    for result in mine:
        name = " ".join(str(result[key]) for key in ("part", "peer", "workers") if key in result)
        if "left_out" in result:
            excuses.append(f"{name}: left out: {result['left_out']}")
        if "error" in result:
            excuses.append(f"{name}: error: {result['error']}")
    return [*(LINES[part](mine) if of(mine) else ()), *excuses]
