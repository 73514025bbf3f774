"""What runs have reported, read back out of their folders, and what differs between them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, RunConfig, flatten, spelled
from trainer.deepspeed_settings import global_batch_size
from trainer.run_files import RECORD, read_metrics, read_record

Point = tuple[int, float | None]
"""A step, and what was reported of it; None for what was not finite."""
HELD_OUT = "eval/bits_per_byte"
HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28,}")
OF_ROWS = ("eval", "lsh", "reversible")
"""What tags of evaluations begin with."""
SAID = ("deepspeed", "store", "samples", "launch", "evaluated", "versions", "git_commit")
"""What is read of run.json besides its configuration."""
INITIAL = "run.init_from (weights)"
"""What stands for the weights in that folder, whatever it is called."""
ABSENT = "-"
"""What stands for a setting that a run does not have."""
NEUTRAL = frozenset(
    {
        "run.deepspeed_config",  # the name of a file; what is in it is compared, as deepspeed.…
        # What a run reports besides its scores, and how often: none of it changes a weight.
        "run.log_every",
        "run.histogram_every",
        "run.profile_steps",
        "run.diagnostics",
        "run.sample_tokens",
        "run.ablation_rows",
        "run.spike_deviations",
        # Which checkpoints it leaves: a run that resumes goes on as if nothing had happened.
        "run.save_every",
        "run.keep_last",
        "run.keep_every",
        "run.keep_best",
        # When it gives up: until then its numbers are the same.
        "run.on_full_disk",
        "run.max_nonfinite",
        "run.watchdog_factor",
        "run.watchdog_min_s",
    }
)
"""Settings that change no score. (`settings` leaves out run.dir.)

Not among them are run.eval_every, since the best of more evaluations is lower; run.sequence_parallel and the model's
keep_ends, ff_chunk_tokens and loss_chunk_tokens, which change how sums are rounded; and data.on_damage, which may leave
out rows.
"""


STORE = re.compile(r"data\.store|data\.mixture\..*\.store")
"""Folders: what is in them is compared, by the fingerprints of stores."""


@dataclass(frozen=True)
class Curves:
    """What a run has reported so far."""

    path: Path
    record: Mapping[str, Any]
    """run.json: see record.py."""
    config: RunConfig
    metrics: Sequence[Mapping[str, float]]
    """metrics.jsonl: see metrics.py."""

    def points(self, tag: str) -> list[Point]:
        """The values of a tag, each with its step; of evaluations, those that compare with the newest."""
        since = self.since(tag)
        return [
            (int(values["step"]), values[tag]) for values in self.metrics if tag in values and values["step"] >= since
        ]

    def finite(self, tag: str, by_tokens: bool) -> dict[int, float]:
        """Those that are finite, by step; or by the tokens of the steps until then, padding included."""
        scale = self.tokens_per_step() if by_tokens else 1
        return {step * scale: value for step, value in self.points(tag) if value is not None}

    def since(self, tag: str) -> int:
        """The first step whose value of a tag compares with the newest: evaluations were of other rows before it."""
        first, *others = tag.split("/")
        return self._evaluated(others[1] if others[0] == "source" else "", "since", 0) if first in OF_ROWS else 0

    def rows(self, name: str) -> str | None:
        """Which rows of the mixture's store, or of data.store (""), are evaluated; None where none are."""
        rows: str | None = self._evaluated(name, "rows", None)
        return rows

    def fingerprints(self) -> list[tuple[Path, str]]:
        """The stores that it read, and the fingerprint of each."""
        data, samples = self.config.data, self.record["samples"]
        of_sources = [(source.store, samples[f"{name}.store"]) for name, source in data.mixture.items()]
        return [(data.store, self.record["store"]["fingerprint"]), *of_sources]

    def tokens_per_step(self) -> int:
        """Places of a batch, padding included; as the run was last started."""
        size = global_batch_size(
            self.record["deepspeed"], self.record["launch"]["world_size"], self.config.run.sequence_parallel
        )
        return size * int(self.record["store"]["seq_len"])

    def _evaluated(self, name: str, key: str, default: Any) -> Any:
        return self.record["evaluated"].get(name, {}).get(key, default)

    def column(self, tag: str) -> list[float]:
        """The finite values of a tag."""
        return [*self.finite(tag, by_tokens=False).values()]

    def recovered_mass(self) -> list[Point]:
        """Of each evaluation the share of dense attention that LSH attention recovers, the mean of its layers."""
        means: list[Point] = []
        since = self.since("lsh/")
        for values in (each for each in self.metrics if each["step"] >= since):
            tags = [tag for tag in values if tag.startswith("lsh/") and tag.endswith("/recovered_mass")]
            if shares := [values[tag] for tag in tags if values[tag] is not None]:
                means.append((int(values["step"]), sum(shares) / len(shares)))
        return means

    def best(self) -> Point | None:
        """The lowest bits per byte of held-out rows; None where there are none."""
        found = [(bits, step) for step, bits in self.finite(HELD_OUT, by_tokens=False).items()]
        return min(found)[::-1] if found else None


def read_curves(path: Path) -> Curves:
    """Of the run in a folder.

    Raises ConfigError where there is none, it is damaged or of another version, or no step has a line yet.
    """
    record, metrics = read_record(path), read_metrics(path)
    if missing := [name for name in SAID if name not in record]:
        raise ConfigError(f"{path / RECORD} does not say {', '.join(missing)}: use the version that wrote it")
    try:
        config = RunConfig(**record["config"])
    except ConfigError as error:
        raise ConfigError(f"{path} has a configuration that this version does not know: {error}") from None
    curves = Curves(path, record, config, metrics)
    if not (curves.points("train/loss") and curves.points("speed/tokens_per_s")):
        raise ConfigError(f"{path} has no training step yet: train first, or wait for its first line")
    return curves


def continued(record: Mapping[str, Any]) -> list[str]:
    """Of each resume with settings that change scores, by run.json: after which step, and what they were until then.

    What folders are called is not among them: a run goes on with the stores that it had, and run.init_from is not read
    again.
    """
    said = []
    for each in record.get("continued", []):
        was = [
            f"{name} was {spelled(value)}"
            for name, value in each["before"].items()
            if name not in NEUTRAL and name != "run.init_from" and not STORE.fullmatch(name)
        ]
        if was:
            said.append(f"at step {each['step']}, before which {', '.join(was)}")
    return said


def trained_scores(run: Curves) -> dict[int, float]:
    """Bits per byte of held-out rows, where finite, by tokens: without the beginning, whose weights are not trained."""
    return {tokens: bits for tokens, bits in run.finite(HELD_OUT, by_tokens=True).items() if tokens}


def common_tokens(runs: Sequence[Curves]) -> int | None:
    """The most tokens after which all runs have a score that have any (`trained_scores`); None where there are none."""
    places = [found.keys() for run in runs if (found := trained_scores(run))]
    return max(set.intersection(*map(set, places)), default=None) if places else None


def score(run: Curves, tokens: int | None) -> float | None:
    """What runs are compared by: the score after so many tokens, or the best (`trained_scores`); None where there are
    none."""
    return min((bits for after, bits in trained_scores(run).items() if tokens in (None, after)), default=None)


def steps_are_alike(runs: Sequence[Curves]) -> bool:
    """Whether a step has the same number of tokens in all of them."""
    return len({run.tokens_per_step() for run in runs}) == 1


def differences(runs: Sequence[Curves]) -> dict[str, list[str]]:
    """What is not the same for all runs, by name: of each, as it is to be shown."""
    tables = [settings(run) for run in runs]
    values = {name: [shown(table, name) for table in tables] for name in sorted(set().union(*tables))}
    return {name: of_each for name, of_each in values.items() if len(set(of_each)) > 1}


def shown(table: Mapping[str, Any], name: str) -> str:
    """A setting as it is to be shown: as JSON, or that there is none."""
    return json.dumps(table[name], ensure_ascii=False) if name in table else ABSENT


def settings(run: Curves) -> dict[str, Any]:
    """All that may make a difference for a run's numbers, by dotted name; of hashes the beginning."""
    record, launch = run.record, run.record["launch"]
    # Of a single store, other settings say what "samples" does.
    said = {name: record[name] for name in ("deepspeed", "versions", *(["samples"] if run.config.data.mixture else []))}
    place = {"device": launch["device"], "ranks": launch["world_size"], "git_commit": record["git_commit"]}
    evaluated = {"data.store.fingerprint": record["store"]["fingerprint"]}
    table = flatten({**run.config.model_dump(mode="json"), **said, **place, **evaluated})
    del table["run.dir"]  # always another
    if sha256 := record.get("initial_sha256"):
        table[INITIAL] = sha256
    if resumes := continued(record):
        table["continued"] = "; ".join(resumes)
    return {name: re.sub(HASH, r"\1", value) if isinstance(value, str) else value for name, value in table.items()}


def unlike(runs: Sequence[Curves], sources: Sequence[str]) -> dict[str, list[str | None]]:
    """Of "held out" and of these stores of the mixture, those that are not scored on the same rows in all runs: of each
    run on which; None where it is scored on none."""
    columns = {"": "held out"} | {name: f"of {name}" for name in sources}
    rows = {column: [run.rows(name) for run in runs] for name, column in columns.items()}
    return {column: of_runs for column, of_runs in rows.items() if len({*of_runs} - {None}) > 1}
