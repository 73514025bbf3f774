"""The relations between TOML, DeepSpeed's JSON, the data and the number of ranks, in one function.

It runs on every rank before any process group starts, so no rank waits for another, and reports every problem at once.
Of the machine it asks what DeepSpeed would compile, and whether a folder can be written to; all else is pure. What
concerns DeepSpeed's JSON alone is in check_deepspeed.py, check_optimizer.py and check_offload.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

from data_pipeline.mixture import BLOCK_SAMPLES, block_counts
from data_pipeline.store import Store
from reformer.config import ConfigError, near_square
from trainer.check_deepspeed import batch, keys, objections, precision, switches, zero_stage
from trainer.check_offload import offload
from trainer.check_optimizer import optimizer, tables_of_no_width
from trainer.config import DataConfig, RunConfig

UNEVEN = 256
"""A position table with so many times more columns than rows is hardly one: of 1,048,576 positions, 64 x 16,384 is."""


@dataclass(frozen=True)
class StoreFacts:
    """What the relations need to know of a store."""

    seq_len: int
    vocab_size: int
    rows: Mapping[str, int]
    """Rows of each split."""
    tokenizer_sha256: str
    fingerprint: str
    """Of its content, wherever it lies."""
    bos: bool = True
    eos: bool = True
    """Whether documents begin with BOS and end with EOS."""

    @classmethod
    def of(cls, store: Store) -> Self:
        """The facts of a store on disk."""
        rows = {name: sum(stop - start for start, stop in store.split_rows(name)) for name in store.manifest.splits}
        manifest = store.manifest
        place = (manifest.tokenizer_sha256, manifest.fingerprint)
        return cls(store.seq_len, store.vocab_size, rows, *place, manifest.bos, manifest.eos)


def check(
    config: RunConfig,
    deepspeed: Mapping[str, Any],
    stores: Mapping[str, StoreFacts],
    world_size: int,
) -> None:
    """Raise one ConfigError that names every contradiction; return if there is none.

    stores: data.store, as "", and those of data.mixture by name.
    """
    problems = [
        *keys(deepspeed),
        *(_sharing(config, stores[""], world_size) or batch(deepspeed, world_size, config.run.sequence_parallel)),
        *switches(deepspeed),
        # These make sense for a valid stage only.
        *(zero_stage(deepspeed) or [*precision(deepspeed), *optimizer(deepspeed), *offload(deepspeed)]),
        *_data(config, stores),
        *tables_of_no_width(config.model, deepspeed),
    ]
    # DeepSpeed's own opinion is asked last: it would only repeat the ones above.
    if problems := (problems or objections(deepspeed)):
        raise ConfigError("\n".join(problems))


def _tiny_weights(data: DataConfig) -> list[str]:
    """A note for each source whose weight is so small that it is rounded up to one sample of a block."""
    weights = data.weights
    shares = block_counts(weights)
    return [
        f"data.mixture.{name}.weight={weight} is {weight / sum(weights.values()):.2g} of all weights, and 1 of "
        f"{BLOCK_SAMPLES:,} samples, the least that there can be, is drawn from it"
        for name, weight in weights.items()
        if shares[name] == 1 and weight / sum(weights.values()) < 0.8 / BLOCK_SAMPLES
    ]


def remarks(config: RunConfig, stores: Mapping[str, StoreFacts]) -> list[str]:
    """What is no contradiction, and may yet not be meant."""
    model, run, store, notes = config.model, config.run, stores[""], []
    if model.max_seq_len != store.seq_len:
        notes.append(
            f"model.max_seq_len={model.max_seq_len}, and the rows of {config.data.store} have {store.seq_len} "
            "tokens: positions after them are not trained"
        )
    if run.keep_best and run.save_every:
        both = math.lcm(run.eval_every, run.save_every)
        if both > max(run.eval_every, run.save_every):
            notes.append(
                f"run.keep_best: evaluations and checkpoints coincide only every {both:,} steps and at the end "
                f"(run.eval_every={run.eval_every}, run.save_every={run.save_every}); the best of these is kept"
            )
    notes += _tiny_weights(config.data)
    for name, facts in stores.items():
        if other := [mark.upper() for mark in ("bos", "eos") if getattr(facts, mark) != getattr(store, mark)]:
            notes.append(
                f"data.mixture.{name}: documents of {config.data.mixture[name].store} differ from those of "
                f"{config.data.store} in whether they have {' and '.join(other)}"
            )
    if run.warmup_steps >= run.steps:
        notes.append(f"run.warmup_steps={run.warmup_steps:,}, and run.steps={run.steps:,}: the peak is hardly reached")
    n_chunks = -(-store.seq_len // model.lsh_chunk_len)
    if model.has_lsh and n_chunks <= 2:
        notes.append(
            f"model.lsh_chunk_len={model.lsh_chunk_len}: rows of {store.seq_len} tokens are at most two chunks, "
            "of which LSH attention reaches all that dense attention does"
        )
    rows, columns = sorted(model.axial_shape or (1, 1))
    if columns > UNEVEN * rows:
        better = next(n for n in count(model.max_seq_len) if max(near_square(n)) <= 2 * min(near_square(n)))
        rows_of = f"Rows of {better} tokens (--seq-len) would have"
        way_out = "Left out, it would be" if better == model.max_seq_len else rows_of
        notes.append(
            f"model.axial_shape={list(model.axial_shape or ())}: of {model.max_seq_len} positions {columns} have a "
            f"vector of their own, which is much to learn. {way_out} a table of "
            f"{' x '.join(map(str, near_square(better)))}"
        )
    return notes


def _sharing(config: RunConfig, store: StoreFacts, world_size: int) -> list[str]:
    """Ranks that share sequences are as many in each group, and have equal parts and as many heads."""
    n_parts = config.run.sequence_parallel
    shared = {
        "the number of ranks": world_size,
        "model.n_heads": config.model.n_heads,
        f"the length of the rows of {config.data.store}": store.seq_len,
    }
    if not (wrong := [f"{what}, {number}" for what, number in shared.items() if number % n_parts]):
        return []
    most = math.gcd(*shared.values())
    return [f"run.sequence_parallel={n_parts} does not divide {' and '.join(wrong)}: give {most}, or a divisor of it"]


def _data(config: RunConfig, stores: Mapping[str, StoreFacts]) -> list[str]:
    model, data, store = config.model, config.data, stores[""]
    problems = []
    if not model.causal:
        problems.append(
            "model.causal=False: the trainer predicts the next token, which such a model already sees: leave it out"
        )
    if model.vocab_size != store.vocab_size:
        problems.append(
            f"model.vocab_size={model.vocab_size}, but the tokenizer of {data.store} has {store.vocab_size} tokens: "
            f"set model.vocab_size={store.vocab_size}"
        )
    if model.max_seq_len < store.seq_len:
        is_given = model.axial_shape != near_square(model.max_seq_len)
        of_positions = ", and model.axial_shape to two factors of that, or leave it out" if is_given else ""
        problems.append(
            f"model.max_seq_len={model.max_seq_len}, but the rows of {data.store} have {store.seq_len} tokens: "
            f"set model.max_seq_len={store.seq_len}{of_positions}"
        )
    problems += _splits(config, stores)
    return problems + [
        f"data.mixture.{name}: {key} of {data.mixture[name].store} is {theirs}, that of data.store={data.store} is "
        f"{ours}: build all stores of a mixture with one tokenizer and one --seq-len"
        for name, facts in stores.items()
        for key in ("tokenizer_sha256", "vocab_size", "seq_len")
        if (theirs := getattr(facts, key)) != (ours := getattr(store, key))
    ]


def _splits(config: RunConfig, stores: Mapping[str, StoreFacts]) -> list[str]:
    """Splits have rows, and what evaluations read is not trained on."""
    trained = list(config.data.trained.items())
    evaluated = list(config.data.evaluated.items()) if config.run.eval_every else []
    problems = []
    for name, read in trained + evaluated:
        rows = stores[name].rows
        if not rows.get(read.split):
            way_out = "; build it with --split, or set run.eval_every=0" if (name, read) in evaluated else ""
            full = ", ".join(f"'{known}'" for known, n_rows in rows.items() if n_rows)
            problems.append(f"{read.key}='{read.split}' has no rows in {read.store}: its splits are {full}{way_out}")
    held_out = {(stores[name].fingerprint, read.split): read for name, read in reversed(evaluated)}
    for name, read in trained:
        if same := held_out.get((stores[name].fingerprint, read.split)):
            problems.append(
                f"{read.key}='{read.split}' of {read.store} is also what evaluations read ({same.key} of "
                f"{same.store}): choose another split for one of them, or set run.eval_every=0"
            )
    return problems
