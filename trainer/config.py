"""What a run is made of: `[model]`, `[data]` and `[run]` from TOML, and DeepSpeed's own JSON beside them.

Every number has one owner. The JSON file owns what DeepSpeed consumes (batch sizes, precision, ZeRO, clipping,
optimizer and its peak learning rate), TOML owns the rest, and nothing stands in both. A value comes from, each
beating the one before: the defaults below, the file, `a.b=c` on the command line; `deepspeed.a.b=c` changes the JSON.
How the two files, the data and the number of ranks must fit together is written in check.py.
"""

import datetime
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin

from pydantic import AfterValidator, Field, field_validator, model_validator

from data_pipeline.output import as_path
from reformer.config import ConfigError, ReformerConfig, StrictConfig
from trainer.run_files import RECORD, read_record

OF_DEEPSPEED = {
    name: f"set it in DeepSpeed's JSON, as {key} (on the command line: deepspeed.{key}=...)"
    for key, names in {
        "optimizer": ("optimizer",),
        "optimizer.params.lr": ("lr", "learning_rate"),
        "optimizer.params.weight_decay": ("weight_decay",),
        "optimizer.params.betas": ("betas",),
        "train_batch_size": ("train_batch_size", "batch_size"),
        "train_micro_batch_size_per_gpu": ("train_micro_batch_size_per_gpu", "micro_batch_size"),
        "gradient_accumulation_steps": ("gradient_accumulation_steps",),
        "gradient_clipping": ("gradient_clipping", "grad_clip", "max_grad_norm"),
        "bf16": ("bf16",),
        "fp16": ("fp16",),
        "zero_optimization": ("zero_optimization",),
    }.items()
    for name in names
}


UserPath = Annotated[Path, AfterValidator(as_path)]
"""A path whose `~` is a home."""


class SourceConfig(StrictConfig):
    """One of several stores to train on."""

    store: UserPath = Field(strict=False)
    """Folder of the store, relative to the working directory."""
    weight: float = Field(gt=0.0, allow_inf_nan=False)
    """Share of the samples, relative to the sum of all weights; rounded to 1/1000, at least 1/1000."""
    split: str | None = Field(default=None, min_length=1)
    """Split to train on; data.train_split when not given."""
    eval_split: str | None = Field(default=None, min_length=1)
    """Split to evaluate on as well, as eval/source/NAME/…; it must not be trained on. Without it, this store is not
    evaluated."""


class ReadSplit(NamedTuple):
    """A split that a run reads."""

    key: str
    """What names it in the configuration."""
    store: Path
    split: str


class DataConfig(StrictConfig):
    """What to read. The stores are named as in `mixture`; data.store is ""."""

    store: UserPath = Field(strict=False)
    """Folder of the store that `python -m data_pipeline build` wrote, relative to the working directory."""
    mixture: dict[str, SourceConfig] = Field(default_factory=dict)
    """Stores to train on in place of data.store, by names of your own; evaluations go on reading data.store, and
    each source's eval_split."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "val"
    """Split of data.store to evaluate on; it must not be trained on, unless run.eval_every is 0."""
    on_damage: Literal["strict", "skip"] = "strict"
    """"strict": a damaged row stops the run; "skip": it is left out and counted in data/skipped_rows. Evaluations
    always stop."""

    @property
    def weights(self) -> dict[str, float]:
        """Of the stores that are trained on, by name."""
        return {name: source.weight for name, source in self.mixture.items()} or {"": 1.0}

    @property
    def trained(self) -> dict[str, ReadSplit]:
        """What is trained on, by the name of its store: of the mixture's, or of data.store if there is no mixture."""
        of_sources = {
            name: ReadSplit(f"data.mixture.{name}.split", source.store, source.split)
            if source.split
            else ReadSplit(f"data.train_split (for data.mixture.{name})", source.store, self.train_split)
            for name, source in self.mixture.items()
        }
        return of_sources or {"": ReadSplit("data.train_split", self.store, self.train_split)}

    @property
    def evaluated(self) -> dict[str, ReadSplit]:
        """What is evaluated on, by the name of its store: of data.store, then of each source that has an eval_split."""
        return {"": ReadSplit("data.eval_split", self.store, self.eval_split)} | {
            name: ReadSplit(f"data.mixture.{name}.eval_split", source.store, source.eval_split)
            for name, source in self.mixture.items()
            if source.eval_split
        }

    @field_validator("mixture")
    @classmethod
    def _check_names(cls, mixture: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        if "" in mixture:
            raise ValueError("a store needs a name: '' is that of data.store")
        for name, source in mixture.items():  # names of what is evaluated are parts of TensorBoard's tags
            if source.eval_split and not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"the name {name!r} must be of letters, digits, '_', '-' and '.'")
        return mixture


class LoopConfig(StrictConfig):
    """How long to train, what to report and what to keep."""

    elsewhere = OF_DEEPSPEED

    dir: UserPath = Field(strict=False)
    """Folder of the run (checkpoints, TensorBoard events, metrics), relative to the working directory."""
    deepspeed_config: UserPath = Field(strict=False)
    """DeepSpeed's JSON file, relative to the TOML file; `--deepspeed_config` takes its place."""
    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly to the optimizer's `lr`; a shorter run stops on the way."""
    decay: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; "wsd" (warmup, stable, decay) falls in the last decay_steps alone."""
    decay_steps: int | None = Field(default=None, ge=1)
    """With decay="wsd": the steps over which the learning rate falls linearly."""
    final_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Lowest learning rate, as a fraction of the peak: where cosine, linear and wsd are when the last step is done, so
    that a step more would have it; inverse_sqrt's floor."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights and of the order of the samples."""
    init_from: UserPath | None = Field(default=None, strict=False)
    """Folder of the initial weights of a new run, instead of random ones, relative to the working directory: written by
    launch/export.py or Hugging Face's save_pretrained, with the tensors of [model]. Its vocab_size may be smaller, and
    its max_seq_len shorter if its axial_shape has as many columns."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Consecutive ranks that share each sequence, each with an equal part of its tokens; 1: no sharing. Must divide the
    number of ranks, model.n_heads and the row length; may change when a run resumes."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of metrics."""
    eval_every: int = Field(default=100, ge=0)
    """Steps between evaluations, besides the first and the last one; 0: no evaluations."""
    eval_rows: int = Field(default=64, ge=1)
    """Rows of the evaluation split to use, at most: drawn at random, the same ones in every evaluation."""
    eval_n_hashes: int | None = Field(default=None, ge=1)
    """Rounds of LSH attention in evaluations, more or fewer than in training; model.n_hashes when not given."""
    diagnostics: bool = True
    """Whether an evaluation also looks at one row's buckets, recovered attention and reconstruction; a seventh of the
    cost of evaluating that row (measured)."""
    save_every: int = Field(default=100, ge=0)
    """Steps between checkpoints, besides the one at the end; 0: only that one. None is written while losses are not
    finite, since the weights may be the cause; weights that are not finite are never saved."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints to keep; older ones are removed."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints at multiples of this step are never removed; 0: no such rule."""
    keep_best: bool = False
    """Whether the checkpoint with the lowest eval/loss so far, of the steps both evaluated and saved, is kept too."""
    on_full_disk: Literal["stop", "continue"] = "stop"
    """Whether the run stops when the disk has no room for a checkpoint or a report; earlier checkpoints stay. For the
    last step's checkpoint it always stops."""
    max_nonfinite: int = Field(default=10, ge=1)
    """A step whose loss or gradient norm is not finite changes nothing; this many in a row stop the run."""
    spike_deviations: float = Field(default=6.0, ge=0.0, allow_inf_nan=False)
    """A loss this many standard deviations above the mean of the last 100 is reported as a spike; 0: never."""
    watchdog_factor: float = Field(default=20.0, ge=0.0, allow_inf_nan=False)
    """A phase of a step is a hang once it takes this many times its longest duration so far; 0: never. Its first
    occurrence since the start may take six hours."""
    watchdog_min_s: float = Field(default=300.0, gt=0.0, le=1e6)
    """Seconds below which nothing counts as a hang."""
    profile_steps: str | None = None
    """Steps to profile, as in "10..12": their trace is written to the folder `profile` of the run."""
    histogram_every: int = Field(default=0, ge=0)
    """Steps from one histogram of the gradients of each parameter to the next; 0: none at all."""
    sample_tokens: int = Field(default=64, ge=0)
    """Tokens that each evaluation adds to a held-out text, shown in TensorBoard; 0: none."""
    ablation_rows: int = Field(default=2, ge=0)
    """Held-out rows that an evaluation also scores with the LSH layers' attention left out; 0: none."""

    @model_validator(mode="after")
    def _check_folders(self) -> Self:
        for name, folder in (("dir", self.dir), ("init_from", self.init_from)):
            if folder == Path():
                raise ValueError(f"run.{name} is empty, or the working directory itself: give it a folder of its own")
        if self.init_from is not None and self.init_from.resolve() == self.dir.resolve():
            raise ValueError(f"run.init_from={self.init_from} is run.dir itself: give the run a folder of its own")
        return self

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        if self.decay == "wsd" and self.decay_steps is None:
            raise ValueError("run.decay='wsd' falls in the last run.decay_steps: give their number")
        if self.decay != "wsd" and self.decay_steps is not None:
            raise ValueError(
                f"run.decay_steps={self.decay_steps} is for run.decay='wsd', not {self.decay!r}: leave it out"
            )
        if self.decay_steps and self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"run.warmup_steps={self.warmup_steps} and run.decay_steps={self.decay_steps} are more than "
                f"run.steps={self.steps}: lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        if self.keep_best and not self.eval_every:
            raise ValueError("run.keep_best=true, and run.eval_every=0 evaluates nothing: change one of them")
        return self

    @field_validator("profile_steps", mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> Any:
        """A number as the text that it was, of which `_check_profile_steps` says what is meant."""
        return str(given) if isinstance(given, int | float) and not isinstance(given, bool) else given

    @model_validator(mode="after")
    def _check_profile_steps(self) -> Self:
        if self.profile_steps is not None:
            window = profiled_steps(self.profile_steps)
            if not window or window[0] < 1 or window[-1] > self.steps:
                text = self.profile_steps
                alone = f" ({text}..{text} for this step alone)" if text.isdecimal() else ""
                raise ValueError(
                    f"run.profile_steps={text!r} must be a first and a last step from 1 to "
                    f'run.steps={self.steps}, as in "10..12"{alone}: change it, or leave it out'
                )
        return self


def profiled_steps(text: str) -> range:
    """The steps of run.profile_steps, first and last included; none if it is no such thing."""
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text, flags=re.ASCII)
    return range(int(found[1]), int(found[2]) + 1) if found else range(0)


class RunConfig(StrictConfig):
    """The TOML side of a run."""

    elsewhere = OF_DEEPSPEED

    model: ReformerConfig
    """The model to train."""
    data: DataConfig
    """The data to train it on."""
    run: LoopConfig
    """The course of the training."""

    @model_validator(mode="after")
    def _check_rounds(self) -> Self:
        if self.run.eval_n_hashes is not None and not self.model.has_lsh:
            raise ValueError(
                f"run.eval_n_hashes={self.run.eval_n_hashes} is the number of LSH rounds, but the model has no LSH "
                f"layer (model.attn_pattern={self.model.attn_pattern}, n_layers={self.model.n_layers}): leave it out, "
                "or add one"
            )
        return self


def load(
    path: Path, overrides: Iterable[str] = (), deepspeed_path: Path | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    """Read the two files and apply the overrides; the pair (TOML side, DeepSpeed side).

    path: the TOML file; or the folder of a run, whose run.json has both sides as the run was last started. An override
    of run.deepspeed_config is relative to the working directory then.
    """
    tables, recorded = _recorded(path) if path.is_dir() else (_read(path, tomllib.loads), None)
    changes = [parse_override(override) for override in overrides]
    for keys, value in changes:
        if keys[0] != "deepspeed":
            _assign(tables, keys, value)
    if deepspeed_path and isinstance(tables.get("run"), dict):
        tables["run"].setdefault("deepspeed_config", os.path.realpath(deepspeed_path))
    config = RunConfig(**tables)
    if recorded is None:
        deepspeed = _read(deepspeed_path or path.parent / config.run.deepspeed_config, json.loads)
    elif deepspeed_path or any(keys == ["run", "deepspeed_config"] for keys, _ in changes):
        deepspeed = _read(deepspeed_path or config.run.deepspeed_config, json.loads)
    else:
        deepspeed = recorded
    for keys, value in changes:
        if keys[0] == "deepspeed":
            _assign(deepspeed, keys[1:], value)
    return config, deepspeed


def _recorded(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides of a run that lies in this folder now. Raises ConfigError where its record has them not."""
    record = read_record(run_dir)
    tables, deepspeed = record["config"], record.get("deepspeed")
    if not isinstance(tables.get("run"), dict) or not isinstance(deepspeed, dict):
        raise ConfigError(f"{run_dir / RECORD} has no settings of a run and of DeepSpeed: give the files in its place")
    return {**tables, "run": {**tables["run"], "dir": str(run_dir)}}, deepspeed


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=c` as (["a", "b"], c): c is read as TOML where it is TOML, and is a string otherwise, or a list of words, as
    `["local", "lsh"]` without its quotes, which a shell takes away. What reads like a number or a truth value is a
    string too where a path or a text is wanted."""
    name, equals, value = text.partition("=")
    keys = name.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        sections: dict[str, type[StrictConfig]] = {"model": ReformerConfig, "data": DataConfig, "run": LoopConfig}
        meant = [f"'{table}.{text}'" for table, kind in sections.items() if equals and name in kind.model_fields]
        way_out = f"did you mean {' or '.join(meant)}?" if meant else "an override looks like run.steps=100"
        raise ConfigError(f"cannot read '{text}': {OF_DEEPSPEED.get(name, way_out)}")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        words = re.fullmatch(r"\[\s*([a-z][\w-]*(?:\s*,\s*[a-z][\w-]*)*)\s*,?\s*\]", value)
        return keys, re.split(r"\s*,\s*", words[1]) if words else value
    if len(parsed) > 1:
        raise ConfigError(f"cannot read {text!r}: an override is one key and one value")
    looks_otherwise: tuple[type, ...] = (datetime.date, datetime.time)  # of which no key is, but a name may look so
    if {str, Path} & _kinds(keys):
        looks_otherwise += (int, float)
    return keys, value.strip() if isinstance(parsed["value"], looks_otherwise) else parsed["value"]


def _kinds(keys: list[str]) -> set[Any]:
    """What the value of this key may be; nothing where there is no such key."""
    kind: Any = RunConfig
    for key in keys:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif isinstance(kind, type) and issubclass(kind, StrictConfig) and key in kind.model_fields:
            kind = kind.model_fields[key].annotation
        else:
            return set()
    kinds = {kind} if get_origin(kind) is dict else {kind, *get_args(kind)}
    return {get_args(each)[0] if get_origin(each) is Annotated else each for each in kinds}


def _read(path: Path, parse: Any) -> dict[str, Any]:
    """A file's tables; every way of not being readable is a ConfigError with the file's name."""
    try:
        tables = parse(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except (OSError, ValueError) as error:
        kind = "JSON" if parse is json.loads else "TOML"
        reason = error.strerror if isinstance(error, OSError) else f"it is not {kind}: {error}"
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from None
    if not isinstance(tables, dict):
        raise ConfigError(f"{path} must hold one object of keys and values")
    return tables


def _assign(tables: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set tables[a][b]... = value, making tables on the way."""
    *parents, last = keys
    for key in parents:
        tables = tables.setdefault(key, {})
        if not isinstance(tables, dict):
            raise ConfigError(f"cannot set {'.'.join(keys)}: '{key}' is a value, not a table")
    tables[last] = value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one level of dotted names; what two configurations are compared by."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def spelled(value: Any) -> str:
    """As TOML and JSON write it, which have nothing for what is left out."""
    if value is None:
        return "not given"
    return str(value).lower() if isinstance(value, bool) else repr(value)
