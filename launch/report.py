"""Say in a few lines how a run went, and draw its curve.

python launch/report.py runs/demo/run
python launch/report.py runs/demo/run --plot loss.png
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.store import Store
from trainer.baseline import unigram_score
from trainer.config import ConfigError, RunConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run: what run.dir was")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the bits per byte by step (.png or .svg)")
    return parser.parse_args()


def read_run(path: Path) -> tuple[RunConfig, list[dict[str, float]]]:
    """The configuration of a run, and its metrics by step."""
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return RunConfig(**record["config"]), [json.loads(line) for line in lines]
    except OSError as error:
        raise ConfigError(f"{path} is not the folder of a run: cannot read {error.filename}") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: run.json or metrics.jsonl cannot be read: {error!r}") from None


def column(metrics: list[dict[str, float]], tag: str) -> list[float]:
    return [values[tag] for values in metrics if values.get(tag) is not None]


def recovered_mass(metrics: list[dict[str, float]]) -> list[float]:
    """Of each evaluation the share of dense attention that LSH attention recovers, the mean of its layers."""
    means = []
    for values in metrics:
        tags = [tag for tag in values if tag.startswith("lsh/") and tag.endswith("/recovered_mass")]
        if shares := [values[tag] for tag in tags if values[tag] is not None]:
            means.append(sum(shares) / len(shares))
    return means


def report(path: Path, config: RunConfig, metrics: list[dict[str, float]]) -> str:
    """The text of the report."""
    if not column(metrics, "train/loss"):
        raise ConfigError(f"{path} has no training step yet: train first, or wait for its first line")
    rows = [("", "first step", f"step {int(metrics[-1]['step'])}")]
    for split, name in (("train", "training batch"), ("eval", "held out")):
        for tag, unit in ((f"{split}/loss", "nats per token"), (f"{split}/bits_per_byte", "bits per byte")):
            if values := column(metrics, tag):
                rows.append((f"{name}, {unit}", f"{values[0]:.4f}", f"{values[-1]:.4f}"))
    if recovered := recovered_mass(metrics):
        rows.append(("dense attention recovered", f"{recovered[0]:.4f}", f"{recovered[-1]:.4f}"))
    lines = [f"{name:<32}{first:>12}{last:>12}" for name, first, last in rows]
    if column(metrics, "eval/loss"):
        unigram = unigram_score(Store.open(config.data.store), config.data, config.run.eval_rows)
        lines.append(f"{'unigram model, held out:':<32}{'':>12}{unigram.bits_per_byte:>12.4f} bits per byte")
    speed = sorted(column(metrics, "speed/tokens_per_s"))
    lines += [
        f"{'tokens per second (median)':<32}{'':>12}{speed[len(speed) // 2]:>12,.0f}",
        f"{'peak memory of a process, GiB':<32}{'':>12}{max(column(metrics, 'memory/peak_gib')):>12.2f}",
        "",
        f"the run lies in {path}",
        f"see its curves:  {Path(sys.executable).parent / 'tensorboard'} --logdir {path / 'tensorboard'}",
    ]
    return "\n".join(lines)


def plot(metrics: list[dict[str, float]], file: Path) -> None:
    """Bits per byte of training batches and of the held-out rows, by step."""
    from matplotlib.figure import Figure  # of the extras `bench` and `dev`: only a drawing needs it

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


def main() -> int:
    arguments = parse_arguments()
    try:
        config, metrics = read_run(arguments.run)
        print(report(arguments.run, config, metrics))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.plot:
        try:
            plot(metrics, arguments.plot)
        except (OSError, ValueError) as error:  # no such folder, or a format that matplotlib does not write
            print(f"error: cannot draw {arguments.plot}: {error}", file=sys.stderr)
            return 2
        print(f"drew {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
