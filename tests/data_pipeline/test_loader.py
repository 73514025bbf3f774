"""The loader: the same global sequence on any number of ranks, whatever was read ahead, and nothing left behind."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_disk import flip

import data_pipeline
from data_pipeline.dataset import IGNORED_LABEL, RowDataset, Sample
from data_pipeline.errors import DataError, reading_failed
from data_pipeline.loader import Loader, MicroBatch
from data_pipeline.mixture import Mixture
from data_pipeline.store import Store

BATCH = 8


class Numbered:
    """Samples that say their position, and may be slow or damaged."""

    def __init__(self, damaged: tuple[int, ...] = (), blanks: bool = True, seconds: float = 0.0) -> None:
        self.damaged, self.blanks, self.seconds = damaged, blanks, seconds
        self.asked: list[int] = []
        self.identity: dict[str, str | int] = {"store": "abc", "seed": 0}
        self.form: dict[str, str | int] = {}

    def slice_of(self, position: int, part: int, n_parts: int) -> Sample:
        self.asked.append(position)
        time.sleep(self.seconds * (position % 2))  # so that later ones are ready first
        if position in self.damaged:
            raise DataError(f"row of position {position} is damaged")
        return Sample(*torch.tensor([[position], [1], [part]]))

    def blank_of(self, position: int, part: int, n_parts: int) -> Sample:
        if not self.blanks:
            raise DataError("the table of segments is damaged")
        return Sample(*torch.tensor([[position], [IGNORED_LABEL], [part]]))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def positions(batch: list[MicroBatch]) -> list[int]:
    return [int(sample.tokens[0]) for _, samples in batch for sample in samples]


def global_batches(loaders: list[Loader], n: int) -> list[int]:
    """The next n global batches as one sequence: what each rank gets, put where its ids say."""
    sequence = []
    for _ in range(n):
        placed: dict[int, int] = {}
        for batch in map(next, loaders):
            for ids, samples in batch:
                placed |= dict(zip(ids, (int(sample.tokens[0]) for sample in samples), strict=True))
        assert sorted(placed) == list(range(BATCH))
        sequence += [placed[i] for i in range(BATCH)]
    return sequence


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_one_sequence_through_resumes_on_other_numbers_of_ranks(micro: int) -> None:
    state, sequence = None, []
    for world_size in (1, 2, 4, 3):  # the last does not divide the batch
        loaders = [Loader(Numbered(seconds=0.001), BATCH, micro, rank, world_size) for rank in range(world_size)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        sequence += global_batches(loaders, 3)
        states = {json.dumps(loader.state_dict()) for loader in loaders}
        (state,) = states
        for loader in loaders:
            loader.close()
    assert sequence == list(range(4 * 3 * BATCH))


def test_what_was_read_ahead_is_bounded_and_not_consumed() -> None:
    samples = Numbered()
    with Loader(samples, BATCH, rank=1, world_size=2, ahead=2) as loader:
        assert positions(next(loader)) == [1, 3, 5, 7]
        state = loader.state_dict()
        assert state == {"n_consumed": BATCH, "samples": {"store": "abc", "seed": 0}}
        for _ in range(500):
            if len(samples.asked) == 12:
                break
            time.sleep(0.01)
        assert sorted(samples.asked) == list(range(1, 3 * BATCH, 2))
    with Loader(samples, BATCH) as other:
        other.load_state_dict(state)
        assert positions(next(other)) == list(range(BATCH, 2 * BATCH))


def test_a_state_may_be_loaded_in_the_middle() -> None:
    with Loader(Numbered(), BATCH) as loader:
        start = loader.state_dict()
        first = positions(next(loader))
        next(loader)
        loader.load_state_dict(start)
        assert positions(next(loader)) == first
    with Loader(Numbered(), BATCH, n_consumed=40) as loader:
        assert positions(next(loader)) == list(range(40, 48))


def test_a_state_of_other_samples_is_refused() -> None:
    samples, others = Numbered(), Numbered()
    others.identity = {"store": "xyz", "split": "train", "seed": 0}
    with Loader(samples, BATCH) as loader, Loader(others, BATCH) as other:
        next(loader)
        message = "split was None and is 'train' now; store was 'abc' and is 'xyz' now: set it back, or start anew"
        with pytest.raises(DataError, match=message):
            other.load_state_dict(loader.state_dict())
        assert other.n_consumed == 0


@pytest.mark.parametrize("state", [{}, {"n_consumed": -1, "samples": {}}, {"n_consumed": "8", "samples": {}}])
def test_what_is_no_state_is_refused(state: dict[str, object]) -> None:
    with Loader(Numbered(), BATCH) as loader, pytest.raises(DataError, match=r"is not what Loader.state_dict\(\) gave"):
        loader.load_state_dict(state)


def test_a_damaged_row_is_an_error_in_its_turn() -> None:
    with Loader(Numbered(damaged=(BATCH + 3,)), BATCH) as loader:
        assert positions(next(loader)) == list(range(BATCH))
        for _ in range(2):
            with pytest.raises(DataError, match="row of position 11 is damaged"):
                next(loader)
        assert loader.state_dict()["n_consumed"] == BATCH


def test_a_damaged_row_can_be_skipped(caplog: pytest.LogCaptureFixture) -> None:
    damaged = (3, BATCH + 1, 5 * BATCH)
    with Loader(Numbered(damaged), BATCH, on_damage="skip", ahead=6) as loader:
        with caplog.at_level(logging.WARNING):
            delivered = [sample for _ in range(2) for _, samples in next(loader) for sample in samples]
        assert loader.n_skipped == 2  # the third was read, but not delivered
    assert [int(sample.tokens[0]) for sample in delivered] == list(range(2 * BATCH))
    assert [i for i, sample in enumerate(delivered) if sample.labels[0] == IGNORED_LABEL] == [3, BATCH + 1]
    assert [record.message for record in caplog.records] == [
        f"left out: row of position {position} is damaged" for position in damaged[:2]
    ]


@pytest.mark.parametrize("damaged_part", [0, 1])
def test_a_row_that_is_damaged_in_one_part_is_skipped_in_all(damaged_part: int) -> None:
    class Halved(Numbered):
        def slice_of(self, position: int, part: int, n_parts: int) -> Sample:
            if position == 2 and (n_parts == 1 or part == damaged_part):
                raise DataError(f"part {damaged_part} is damaged")
            return super().slice_of(position, part, n_parts)

    for part in (0, 1):
        with Loader(Halved(), BATCH, on_damage="skip", part=part, n_parts=2) as loader:
            delivered = [sample for _, samples in next(loader) for sample in samples]
        assert loader.n_skipped == 1
        assert [i for i, sample in enumerate(delivered) if sample.labels[0] == IGNORED_LABEL] == [2]


def test_what_has_no_blank_cannot_be_skipped() -> None:
    with (
        Loader(Numbered(damaged=(3,), blanks=False), BATCH, on_damage="skip") as loader,
        pytest.raises(DataError, match="the table of segments is damaged"),
    ):
        next(loader)


def test_an_interrupted_wait_ends_the_threads() -> None:
    class Interrupting(Numbered):
        def slice_of(self, position: int, part: int, n_parts: int) -> Sample:
            if position == 2 * BATCH:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
            return super().slice_of(position, part, n_parts)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), Loader(Interrupting(), BATCH, ahead=1) as loader:
            for _ in range(1000):
                next(loader)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_closed_loader_delivers_nothing() -> None:
    loader = Loader(Numbered(), BATCH)
    next(loader)
    loader.close()
    loader.close()
    assert list(loader) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_damage": "Strict"}, "on_damage='Strict': choose one of strict, skip"),
        ({"on_damage": None}, "on_damage=None: choose one of strict, skip"),
        ({"n_consumed": -1}, "n_consumed=-1 must be at least 0"),
        ({"threads": 0}, "threads=0 and ahead=2 at least 1"),
        ({"ahead": 0}, "threads=2 and ahead=0 at least 1"),
    ],
)
def test_options_that_are_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(Numbered(), BATCH, **options)


@pytest.mark.parametrize("kind", [np.int64, np.int8])
@pytest.mark.parametrize("mixed", [False, True])
def test_numbers_of_numpy(make_store: Callable[..., Store], kind: type, mixed: bool) -> None:
    store = make_store()

    def first_of(number: Callable[[int], Any]) -> tuple[list[MicroBatch], str]:
        rows = RowDataset(store, seed=number(5))
        samples = Mixture({"a": rows}, {"a": 1}, seed=number(3)) if mixed else rows
        options = {"part": number(1), "n_parts": number(2), "n_consumed": number(4), "threads": number(1)}
        with Loader(samples, number(8), number(2), number(1), number(2), **options, ahead=number(1)) as loader:
            return next(loader), json.dumps(loader.state_dict())

    (expected, state), (found, found_state) = first_of(int), first_of(kind)
    assert found_state == state and [ids for ids, _ in found] == [ids for ids, _ in expected]
    for (_, some), (_, others) in zip(found, expected, strict=True):
        assert all(map(torch.equal, sum(some, ()), sum(others, ())))


@pytest.mark.parametrize("option", ["batch_size", "micro_batch_size", "n_consumed", "part", "threads"])
def test_what_is_no_integer_is_refused_at_once(option: str) -> None:
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        Loader(Numbered(), **{"batch_size": BATCH, option: 2.0})


def test_a_forked_child_is_told_that_its_loader_has_no_threads() -> None:
    """It would wait for them for ever."""
    with Loader(Numbered(), BATCH) as loader:
        next(loader)
        if not (child := os.fork()):
            signal.alarm(60)
            try:
                next(loader)
            except RuntimeError as error:
                os._exit("made in another process" not in str(error))
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


def test_files_that_run_out_are_no_damage() -> None:
    """The rows are sound: to leave them out would be to train on nothing."""

    class Exhausted(Numbered):
        def slice_of(self, position: int, part: int, n_parts: int) -> Sample:
            raise reading_failed(OSError(errno.EMFILE, "Too many open files"), "the row is damaged")

    with Loader(Exhausted(), BATCH, on_damage="skip") as loader, pytest.raises(DataError, match="Too many open files"):
        next(loader)


def test_rows_of_a_store_go_through_epochs(make_store: Callable[..., Store]) -> None:
    dataset = RowDataset(make_store(seq_len=2048), seed=3)  # smaller than a global batch
    size = 2 * len(dataset) + 1
    with Loader(dataset, size, micro_batch_size=2) as loader:
        read = [sample for _ in range(2) for _, samples in next(loader) for sample in samples]
    expected = [dataset.slice_of(position, 0, 1) for position in range(2 * size)]
    assert len(read) == 2 * size
    assert all(torch.equal(a, b) for pair in zip(read, expected, strict=True) for a, b in zip(*pair, strict=True))


def test_ranks_that_share_rows_get_their_parts(make_store: Callable[..., Store]) -> None:
    dataset = RowDataset(make_store())
    mixture = Mixture({"train": dataset, "val": RowDataset(dataset.store, "val")}, {"train": 3, "val": 1})
    with (
        Loader(mixture, 4) as whole,
        Loader(mixture, 4, n_parts=2) as left,
        Loader(mixture, 4, part=1, n_parts=2) as right,
    ):
        for (_, rows), *parts in zip(next(whole), next(left), next(right), strict=True):
            halves = zip(*(samples for _, samples in parts), strict=True)
            for row, both in zip(rows, halves, strict=True):
                for tensor, pieces in zip(row, zip(*both, strict=True), strict=True):
                    assert torch.equal(torch.cat(pieces), tensor)


def test_a_damaged_shard_is_named_or_skipped(
    make_store: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    dataset = RowDataset(make_store())
    n, path = len(dataset), dataset.store.path
    shard = path / "tokens/c/0/0"
    flip(shard, 30)  # in its first row
    with Loader(dataset, n) as loader, pytest.raises(DataError, match=rf"row 0 of {path} is damaged in shard {shard}"):
        next(loader)
    with Loader(dataset, n, on_damage="skip") as loader:
        (epoch,) = [[sample for _, samples in next(loader) for sample in samples]]
    assert loader.n_skipped == 1
    assert f"left out: row 0 of {path} is damaged in shard {shard}" in caplog.text
    (blank,) = [sample for sample in epoch if (sample.labels == IGNORED_LABEL).all()]
    assert (blank.tokens == dataset.store.manifest.eos_id).all()
    assert int(blank.segment_ids.max()) == len(dataset.store.segments_of(0))
    others = {tuple(sample.tokens.tolist()) for sample in epoch if sample is not blank}
    assert others <= {tuple(dataset[i].tokens.tolist()) for i in range(1, n)}


def test_nothing_but_the_data_set_and_the_loader_needs_torch() -> None:
    names = {path.stem for path in Path(data_pipeline.__file__).parent.glob("*.py")} - {"dataset", "loader"}
    imports = "; ".join(f"import data_pipeline.{name}" for name in sorted(names) if not name.startswith("__"))
    assert "data_pipeline.mixture" in imports
    subprocess.run([sys.executable, "-c", f"import sys; sys.modules['torch'] = None; {imports}"], check=True)
