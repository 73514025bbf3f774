"""`python launch/benchmark.py memory`: peak memory of a training step by length and by depth, and what holds it.

    python launch/benchmark.py memory --json benchmarks/memory-cpu.json --plot docs/memory-cpu.png
    python launch/benchmark.py memory --parts layer vocabulary

A step is forward, backward and an update by AdamW. Every measurement is a process of its own that takes two of them: in
the second one the optimizer's moments exist, and gradients do from the beginning to the end, since they are set to
zero between steps and not dropped (zero_grad(set_to_none=False), as gradient accumulation keeps them). So the peak
holds parameters, gradients, both moments and the activations all at once. It is Linux's high-water mark of resident
memory; "activations" is what is left of it without what the process had used once its libraries were imported,
parameters, gradients and moments.

length      all peers by length, at a fixed depth
depth       all peers by depth, at a fixed length
layer       ours by depth at a long length: bytes per layer, predicted from the configuration and measured
vocabulary  ours with a small and a large vocabulary: what it takes beyond the vocabulary's own parameters
recompute   ours and the same model under plain autograd, in turn: the time that reversibility costs (forward and
            backward), and the activations that it saves

`layer` and `vocabulary` run with MALLOC, below: what is freed goes back to the system at once, so that the peak is what
was needed at once. Otherwise glibc's malloc keeps freed blocks of up to 32 MiB for later, and the peak has their gaps
too, which grow with the number of parameters. `length`, `depth` and `recompute` run with malloc as a user has it.

The JSON file has a result for each measurement: the name of its part, its sizes, `step_s` (forward and backward of
each step; the first does not count in `seconds`), `peak_gib`, `imports_gib`, and the bytes of `parameters`, `gradients`
and `optimizer`. Under `figures` it has what is said about `depth` and the last three parts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from bench import plot
from bench.peers import MODELS, Model, Peer, Sizes, ours_by_autograd, random_tokens
from bench.process import (
    DEPTH,
    LENGTH,
    Axis,
    Limits,
    Result,
    add_options,
    begin,
    chosen,
    in_a_process,
    left_out,
    measure_peers,
    missing,
    new_record,
    reason,
    sizes_of,
    write,
)

from bench_memory.figures import FIGURES, VARIED, activations_gib, state_gib
from data_pipeline.output import SEVERAL, positive
from trainer.memory import peak_gib

MEMORY_PEERS = MODELS | {"ours-autograd": Peer(ours_by_autograd)}
PARTS = ("length", "depth", "layer", "vocabulary", "recompute")
STEPS = 2
"""In the second the optimizer's moments exist."""
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""glibc's own first threshold, above which a block has pages of its own; given, it does not grow to 32 MiB."""
TIMED_STEPS = 3
"""Where the time counts: the first does not."""


@dataclass(frozen=True)
class Part:
    """Points that are measured one after the other."""

    name: str
    points: list[Sizes]
    peers: list[str]
    axis: Axis | None = None
    """Along which a point says what the next will take; None if it does not."""
    rounds: int = 1
    steps: int = STEPS
    environ: Mapping[str, str] = field(default_factory=dict)


def add_command(commands: Any) -> None:
    """The command `memory` among the others, and its options."""
    parser = commands.add_parser(
        "memory",
        help="peak memory of a whole model by length and by depth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", **SEVERAL, choices=PARTS, default=list(PARTS), help="(default: all)")
    for name, defaults, of in (
        ("--seq-len", [2**power for power in range(10, 21, 2)], "lengths of `length`"),
        ("--depths", [2, 6, 12, 24], "layers of `depth` and `layer`"),
        ("--vocab-sizes", [1024, 131_072], "of `vocabulary`"),
    ):
        text = f"{of} (default: {' '.join(map(str, defaults))})"
        parser.add_argument(name, type=positive, **SEVERAL, default=defaults, metavar="N", help=text)
    for name, default, of in (
        ("--depth-tokens", 16_384, "length in `depth` and `recompute`"),
        ("--layer-tokens", 65_536, "length in `layer` and `vocabulary`"),
        ("--recompute-layers", 12, "layers in `recompute`"),
    ):
        parser.add_argument(name, type=positive, default=default, metavar="N", help=f"{of} (default: %(default)s)")
    drawn = f"picture of {', '.join(plot.MEMORY_PARTS)} (default: %(default)s)"
    parser.add_argument("--plot", type=Path, default=Path("memory.png"), metavar="FILE", help=drawn)
    parser.add_argument("--steps", type=positive, default=STEPS, help=argparse.SUPPRESS)  # of the one to measure
    add_options(parser, rounds="measurements of each in `recompute`")
    parser.set_defaults(dtype="float32", main=main)


def parts_of(arguments: argparse.Namespace) -> list[Part]:
    """What these arguments ask for."""
    peers = chosen(arguments.peers, list(MODELS))
    depths, vocabularies = sorted(set(arguments.depths)), sorted(set(arguments.vocab_sizes))
    short, long = sizes_of(arguments, arguments.depth_tokens), sizes_of(arguments, arguments.layer_tokens)
    parts = [
        Part("length", [sizes_of(arguments, length) for length in sorted(set(arguments.seq_len))], peers, LENGTH),
        Part("depth", [replace(short, n_layers=depth) for depth in depths], peers, DEPTH),
        Part("layer", [replace(long, n_layers=depth) for depth in depths], ["ours"], DEPTH, environ=MALLOC),
        Part("vocabulary", [replace(long, vocab_size=size) for size in vocabularies], ["ours"], environ=MALLOC),
        Part(
            "recompute",
            [replace(short, n_layers=arguments.recompute_layers)],
            ["ours", "ours-autograd"],
            rounds=arguments.rounds,
            steps=TIMED_STEPS,
        ),
    ]
    return [part for part in parts if part.name in arguments.parts]


# What one process measures.


def measure_here(peer: Peer[Model], sizes: Sizes, steps: int, threads: int) -> Result:
    """Build the peer's model and train it for so many steps, in this process."""
    begin(peer, threads)
    train_a_parameter()
    imports_gib = peak_gib(torch.device("cpu"))
    model, loss_of = peer.build(sizes)
    model.train()
    optimizer = optimizer_of(model.parameters())
    tokens_BT = random_tokens(sizes)
    step_s = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        begun = time.perf_counter()
        loss_of(tokens_BT).backward()
        step_s.append(time.perf_counter() - begun)
        optimizer.step()
    return {
        "seconds": statistics.median(step_s[1:] or step_s),
        "peak_gib": peak_gib(torch.device("cpu")),
        "imports_gib": imports_gib,
        **state_bytes(model, optimizer),
        "threads": torch.get_num_threads(),
        "step_s": step_s,
    }


def optimizer_of(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; fused, without temporaries of a parameter's size, which would be counted as activations."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def train_a_parameter() -> None:
    """An update of one number: the first one imports more of torch (150 MiB, measured), which no model takes."""
    parameter = torch.nn.Parameter(torch.ones(()))
    parameter.square().backward()
    optimizer_of([parameter]).step()


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the parameters, their gradients and the optimizer's state."""
    parameters: list[torch.Tensor] = list(model.parameters())
    held: dict[str, list[torch.Tensor]] = {
        "parameters": parameters,
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer": [value for state in optimizer.state.values() for value in state.values()],
    }
    return {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in held.items()}


def measure(arguments: argparse.Namespace, name: str, sizes: Sizes, part: Part) -> Result:
    """The same in a new process."""
    options = {**asdict(sizes), "steps": part.steps, "worker": name, "threads": arguments.threads}
    return in_a_process("memory", options, arguments.budget_s, part.environ)


# What is said about it.


HEADER = (
    f"{'part':<11}{'tokens':>9}{'layers':>8}{'vocabulary':>12}  {'peer':<14}{'peak GiB':>9}{'imports':>9}{'state':>8}"
    f"{'activations':>13}{'x ours':>8}{'seconds (min..max)':>26}"
)


def table(results: Sequence[Result]) -> str:
    """The rows of one point's results: medians, and the smallest and largest of the time."""
    ours = [result["peak_gib"] for result in results if result["peer"] == "ours" and "seconds" in result]
    rows = []
    for peer in dict.fromkeys(result["peer"] for result in results):
        mine = [result for result in results if result["peer"] == peer]
        found, first = [result for result in mine if "seconds" in result], mine[0]
        head = f"{first['part']:<11}{first['seq_len']:>9,}{first['n_layers']:>8}{first['vocab_size']:>12,}  {peer:<14}"
        rows.append(head + (cells(found, ours) if found else f"  {reason(mine[-1])}"))
    return "\n".join(rows)


def cells(found: Sequence[Result], ours: Sequence[float]) -> str:
    """What follows the name of a peer with these measurements."""
    gib = [
        statistics.median(map(value, found))
        for value in (lambda one: one["peak_gib"], lambda one: one["imports_gib"], state_gib, activations_gib)
    ]
    times = [result["seconds"] for result in found]
    multiple = f"{gib[0] / statistics.median(ours):.2f}" if ours else "-"
    seconds = f"{statistics.median(times):.2f} ({min(times):.2f}..{max(times):.2f})"
    return f"{gib[0]:>9.3f}{gib[1]:>9.3f}{gib[2]:>8.3f}{gib[3]:>13.3f}{multiple:>8}{seconds:>26}"


def measure_point(
    arguments: argparse.Namespace, part: Part, sizes: Sizes, earlier: Sequence[Result], limits: Limits
) -> list[Result]:
    """All results at one point of a part."""

    def skip(name: str) -> Result | None:
        if part.axis is None:
            return missing(MEMORY_PEERS[name])
        mine = [result for result in earlier if (result["part"], result["peer"]) == (part.name, name)]
        place = getattr(sizes, part.axis.key)
        return missing(MEMORY_PEERS[name]) or left_out(mine, place, limits, part.axis, part.steps)

    point = {"part": part.name} | {name: getattr(sizes, name) for name in VARIED}
    return measure_peers(
        part.peers,
        skip,
        lambda name: measure(arguments, name, sizes, part),
        part.rounds,
        limits.seconds,
        point,
    )


def run(arguments: argparse.Namespace) -> Result:
    """All parts; prints and writes after each point."""
    parts = parts_of(arguments)
    results: list[Result] = []
    record: Result = {**new_record("memory", arguments, results), "figures": {}}
    limits = Limits(arguments.budget_s, arguments.memory_share * record["ram_gib"])
    print(HEADER, flush=True)
    for part in parts:
        for sizes in part.points:
            if arguments.json:
                write(arguments.json, record)
            found = measure_point(arguments, part, sizes, results, limits)
            results += found
            print(table(found), flush=True)
        if part.name in FIGURES:
            figure_of, line_of = FIGURES[part.name]
            if figure := figure_of(results, record["sizes"]):
                record["figures"][part.name] = figure
                print(line_of(figure), flush=True)
    if arguments.json:
        write(arguments.json, record)
    return record


def main(arguments: argparse.Namespace) -> int:
    if arguments.worker:
        sizes = sizes_of(arguments, arguments.seq_len[0])
        print(json.dumps(measure_here(MEMORY_PEERS[arguments.worker], sizes, arguments.steps, arguments.threads)))
        return 0
    if set(plot.MEMORY_PARTS) & set(arguments.parts):
        plot.check_output(arguments.plot)  # that it cannot be drawn should not be learnt in an hour
    record = run(arguments)
    measured = {result["part"] for result in record["results"] if "seconds" in result}
    if measured & set(plot.MEMORY_PARTS):
        plot.draw(record, arguments.plot)
        print(f"drew {arguments.plot}")
    else:
        print(f"drew nothing: none of {', '.join(plot.MEMORY_PARTS)} was measured")
    return int(not any("seconds" in result for result in record["results"]))
