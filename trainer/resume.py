"""Which run may go on from which checkpoint: the one that would compute the same numbers.

Settings that determine the numbers (FIXED) must not change; other changes are only reported.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from reformer.config import MEMORY_ONLY, ConfigError, ReformerConfig
from trainer.checkpoint import published, read_state
from trainer.config import RunConfig, flatten, spelled
from trainer.deepspeed_settings import global_batch_size

FIXED = (
    "store_fingerprint",
    "model",
    "data.train_split",
    "run.seed",
    "run.init_from",
    "train_batch_size",
    "deepspeed.optimizer",
    "deepspeed.bf16",
    "deepspeed.data_types",
)
"""What must be the same when a run continues: the model, what it began with, the order of the data, what the optimizer
computes."""
EVAL_STORE = "eval_store_fingerprint"
"""Of data.store where a mixture is trained on and it is for evaluations alone."""

_NEW_RUN = "begin a new run with these weights (launch/export.py, then run.init_from)"

FREE = ("deepspeed.optimizer.params.lr", *(f"model.{name}" for name in MEMORY_ONLY))
"""Exceptions to FIXED, which may change: the course of the learning rate, as by run.steps and run.decay; and what
decides about memory, which changes the numbers by rounding only."""


def identity(
    config: RunConfig,
    deepspeed_config: Mapping[str, Any],
    store_fingerprint: str | Mapping[str, str | int],
    world_size: int,
) -> dict[str, Any]:
    """What a checkpoint says about its run, as plain JSON values."""
    return {
        "store_fingerprint": store_fingerprint,
        "train_batch_size": global_batch_size(deepspeed_config, world_size, config.run.sequence_parallel),
        **config.model_dump(mode="json"),
        "deepspeed": dict(deepspeed_config),
    }


def refuse_another_run(run_dir: Path, current: Mapping[str, Any], new: bool) -> Mapping[str, Any]:
    """Raise a ConfigError where `current` cannot be begun or continued in this folder; nothing is written.

    Returns what checkpoints of this run are to say about it: `current`, and what the run began with long ago.

    new: whether the run is to be a new one.
    """
    found = published(run_dir)[::-1]
    if new and (found or any(path.stat().st_size for path in run_dir.glob("metrics.jsonl"))):
        reached = f"up to step {found[0].step}" if found else "without a checkpoint"
        raise ConfigError(
            f"{run_dir} already holds a run {reached}: leave out --new to continue it, or choose another folder with "
            "run.dir=…"
        )
    for checkpoint in found:
        with suppress(DataError):  # a damaged one: `sound_start` will see to it
            saved = read_state(checkpoint.path)
            if differences := _differences(saved["run"], current):
                raise ConfigError("\n".join([f"cannot continue from {checkpoint.path}:", *differences]))
            return {**current, "run": {**current["run"], "init_from": saved["run"]["run"].get("init_from")}}
    return current


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line for each value in FIXED that is not what it was, and one for each source that is new or gone."""
    before, now = _sources(saved), _sources(current)
    sources = before ^ now
    named = sorted(sources) if before and now else []
    lines = [
        f"data.mixture.{name} {'is new' if name in now else 'is not there any more'}, which changes the order of the "
        "samples: set it back, or start anew in another run.dir"
        for name in named
    ]
    if sources and not named:
        was, is_now = ("one store", "a mixture") if now else ("a mixture", "one store")
        lines = [
            f"the data were {was}, and are {is_now} now: set them back, {_NEW_RUN}, or start anew in another run.dir"
        ]
    return lines + [
        f"{name} {what}: {_way_back(name)}, or start anew in another run.dir"
        for name, what in changes(saved, current).items()
        if name not in FREE
        and not _same_beginning(name, saved, current)
        and any(f"{name}.".startswith(f"{fixed}.") for fixed in FIXED)
        and not (sources and name.startswith("store_fingerprint"))
    ]


def _sources(run: Mapping[str, Any]) -> set[str]:
    """The names of the mixture's stores, of what a checkpoint says about its run."""
    return set(run.get("data", {}).get("mixture", {}))


def _same_beginning(name: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether what changed is how run.init_from names its folder, or that it is named at all: it is not read again."""
    if name != "run.init_from":
        return False
    before, now = saved["run"].get("init_from"), current["run"]["init_from"]
    return now is None or (before is not None and Path(before).resolve() == Path(now).resolve())


def differing(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is not as a checkpoint's run was, by name: the value before and the one now, None for what is not given."""
    with suppress(ConfigError, TypeError):  # fields that are newer than the checkpoint had their default
        saved = {**saved, "model": ReformerConfig(**saved["model"]).model_dump(mode="json")}
    before, now = flatten(saved), flatten(json.loads(json.dumps(current)))
    values = {name: (before.get(name), now.get(name)) for name in sorted({*before, *now})}
    return {name: (was, is_now) for name, (was, is_now) in values.items() if was != is_now}


def changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """The same in words."""
    return {
        name: f"was {spelled(before)} and is {spelled(now)} now" + _what_follows(name, before, current["run"])
        for name, (before, now) in differing(saved, current).items()
    }


def _what_follows(name: str, before: Any, run: Mapping[str, Any]) -> str:
    """What a setting that was another one before means for the learning rate, and for the curves of evaluations."""
    if name == "run.steps" and run.get("decay") in ("cosine", "linear", "wsd"):
        return ": from here on the learning rate is that of a run of so many steps"
    if name in (EVAL_STORE, "data.eval_split", "run.eval_rows", "run.eval_n_hashes"):
        differ = ": evaluations may differ from here on, so that eval/* before it does not compare"
        best = ", and run.keep_best may begin anew: the best checkpoint until now would be removed in its turn"
        return differ + best * bool(run.get("keep_best"))
    source = re.fullmatch(r"data\.mixture\.(.*)\.eval_split", name)
    return f": eval/source/{source[1]}/* before it does not compare" if source and before is not None else ""


def _way_back(name: str) -> str:
    if re.fullmatch(r"store_fingerprint(\..*\.store)?", name):
        return (
            "it is another store, or was added to (--append), which changes the order; continue on that of before, "
            f"{_NEW_RUN}"
        )
    if re.fullmatch(r"store_fingerprint\..*\.per_thousand", name):
        return "how many of 1,000 samples are its own follows from data.mixture.*.weight; set these back"
    if name == "store_fingerprint.order":
        return f"another version of this program mixed the stores in another order; continue with that one, {_NEW_RUN}"
    return "set it back"
