"""Losses of single tokens, by document; and windows that overlap, in which each token counts once."""

import json
import random
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from small_stores import write_store

from data_pipeline.dataset import RowDataset
from data_pipeline.store import Store
from reformer import load_model

SEQ_LEN = 64
TEXTS = {
    str(i): bytes(random.Random(i).choices(b"abcd ", k=length)) for i, length in enumerate((30, 200, 500, 64, 9, 7))
}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """launch/evaluate.py: its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--device", "cpu"])
        code = evaluate.main()
        return (code, *capfd.readouterr())

    return run


def make_store(folder: Path, packing: str, stride: int = SEQ_LEN) -> Store:
    write_store(folder, TEXTS, val=list(TEXTS)[1:], seq_len=SEQ_LEN, packing=packing, stride=stride)
    return Store.open(folder)


def read_losses(folder: Path) -> dict[str, np.ndarray]:
    """By name of the document."""
    index = json.loads((folder / "documents.json").read_bytes())
    return {about["name"]: np.load(folder / about["file"]) for about in index}


@pytest.mark.parametrize("packing", ["bestfit", "stream", "book"])
def test_the_losses_of_tokens_are_those_of_rows_put_together(
    exported: Path, call, tmp_path: Path, packing: str
) -> None:
    store = make_store(tmp_path / "store", packing)
    code, _, error = call(exported, store.path, "--per-token", tmp_path / "losses", "--json", tmp_path / "scores.json")
    assert code == 0, error
    found, (scores,) = read_losses(tmp_path / "losses"), json.loads((tmp_path / "scores.json").read_bytes())["settings"]
    assert {each["name"] for each in scores["by_document"]} == found.keys() == TEXTS.keys() - {"0"}
    for each in scores["by_document"]:
        losses = found[each["name"]]
        assert len(losses) == len(TEXTS[each["name"]]) + 2 and losses.dtype == np.float32
        assert np.isfinite(losses).sum() == each["tokens"] and np.isnan(losses[0]), "BOS is not predicted"
        assert np.nansum(losses, dtype=np.float64) == pytest.approx(each["nats"], rel=1e-6)
    rows, model = RowDataset(store, "val"), load_model(exported)
    for row in range(len(rows)):
        tokens, labels, segment_ids = (x[None] for x in rows[row])
        with torch.no_grad():
            losses_T = model(tokens, labels, segment_ids=segment_ids, per_token=True)[0].numpy()
        for start, length, document, begin in rows.segments_of(row).tolist():
            own = found[store.documents[document].name][begin + 1 : begin + length]
            np.testing.assert_allclose(own, losses_T[start : start + length - 1], rtol=1e-6)


@pytest.mark.parametrize("stride", [1, 20, 48, 63])
def test_a_token_of_several_windows_counts_in_the_first(exported: Path, call, tmp_path: Path, stride: int) -> None:
    store = make_store(tmp_path / "store", "book", stride)
    code, out, error = call(exported, store.path, "--per-token", tmp_path / "losses")
    assert code == 0 and f"overlap (--stride {stride}): of each, the tokens count that no row before it has\n" in error
    found = read_losses(tmp_path / "losses")
    n_tokens = sum(len(text) + 1 for name, text in TEXTS.items() if name != "0")
    assert f": {n_tokens:,} tokens to predict in 5 documents (of so few, " in out
    assert all(np.isfinite(losses[1:]).all() and np.isnan(losses[0]) for losses in found.values())
    rows, model = RowDataset(store, "val"), load_model(exported)
    first: dict[tuple[str, int], float] = {}
    for row in range(len(rows)):
        tokens, labels, segment_ids = (x[None] for x in rows[row])
        with torch.no_grad():
            losses_T = model(tokens, labels, segment_ids=segment_ids, per_token=True)[0].tolist()
        for start, length, document, begin in rows.segments_of(row).tolist():
            for place in range(start, start + length - 1):
                first.setdefault((store.documents[document].name, begin + place - start + 1), losses_T[place])
    for (name, place), loss in first.items():
        assert found[name][place] == pytest.approx(loss, rel=1e-5)


def test_windows_that_overlap_are_as_many_documents(exported: Path, call, tmp_path: Path) -> None:
    """And their error is no smaller."""
    errors = []
    for stride in (SEQ_LEN, 16):
        store = make_store(tmp_path / f"{stride}", "book", stride)
        code, printed, said = call(exported, store.path, "--json", tmp_path / "scores.json")
        assert code == 0 and ("rows of" in said) == (stride == 16) and "in 5 documents (of so few, " in printed
        (found,) = json.loads((tmp_path / "scores.json").read_bytes())["settings"]
        assert len(found["by_document"]) == 5
        errors.append(found["standard_error"])
    assert errors[1] > 0.7 * errors[0]


def test_what_cannot_be_written_is_refused_before_anything_is_scored(
    exported: Path, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store", "book")
    code, out, error = call(exported, store.path, "--per-token", store.path)
    assert (code, out) == (2, "") and f"{store.path} exists and is not an empty folder" in error
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, out, error = call(exported, store.path, "--per-token", ".")
    assert (code, out) == (2, "") and "the output . has no name of its own" in error
    code, out, error = call(exported, store.path, "--per-token", tmp_path / "new", "--attention", "1", "2")
    assert (code, out) == (2, "") and "--per-token is of one setting of --attention" in error
    (tmp_path / "file").write_text("x")
    code, out, error = call(exported, store.path, "--per-token", tmp_path / "file" / "new")
    assert (code, out) == (2, "") and f"cannot write to --per-token {tmp_path / 'file' / 'new'}" in error
