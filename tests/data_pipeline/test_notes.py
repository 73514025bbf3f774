"""What a build tells about rows, arrays and text that are hardly what was meant."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build import build
from data_pipeline.config import BuildSettings, TextSettings
from data_pipeline.training import TrainingSettings, train_tokenizer


def notes(folder: Path, **changes: object) -> tuple[str, ...]:
    """Of a build of the arrays of a folder, in rows of 48 tokens."""
    given = {"inputs": (str(folder),), "tokenizer": "integers", "output": folder / "store", "vocab_size": 256}
    return build(BuildSettings(**{**given, "seq_len": 48, **changes})).notes


def save(folder: Path, *shapes: tuple[int, ...]) -> None:
    for number, shape in enumerate(shapes):
        np.save(folder / f"{number}.npy", np.ones(shape, np.uint8))


@pytest.mark.parametrize(
    ("n_values", "marks", "advice"),
    [
        (48, {"eos": False}, "49, BOS included. Choose --seq-len 49 or more, or --no-bos"),
        (48, {"bos": False}, "49, EOS included. Choose --seq-len 49 or more, or --no-eos"),
        (48, {}, "50, BOS and EOS included. Choose --seq-len 50 or more, or --no-eos --no-bos"),
        (47, {}, "49, BOS and EOS included. Choose --seq-len 49 or more, or --no-eos"),
        (49, {"bos": False, "eos": False}, "49. Choose --seq-len 49 or more"),
        (95, {}, "97, BOS and EOS included. Choose --seq-len 49 or more, or --no-eos"),
    ],
)
def test_rows_with_nothing_to_predict_are_told(tmp_path: Path, n_values: int, marks: dict, advice: str) -> None:
    np.save(tmp_path / "images.npy", np.ones((20, n_values), np.uint8))
    n_rows = 20 * (1 + (n_values + 2) // 48)
    told = f"20 of {n_rows} rows have one token to predict, or none: what rows of 48 tokens leave over of documents of "
    (note,) = notes(tmp_path, packing="book", **marks)
    assert note == told + advice
    longer = int(advice.partition("--seq-len ")[2].split()[0])
    assert notes(tmp_path, packing="book", **marks, seq_len=longer, output=tmp_path / "longer") == ()


def test_a_document_that_happens_to_end_after_a_row_is_not_told(tmp_path: Path) -> None:
    images = np.ones((150, 47), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, longer=np.ones((1, 48), np.uint8))
    assert notes(tmp_path, packing="book", eos=False) == ()
    np.savez(tmp_path / "a.npz", images=images, longer=np.ones((2, 48), np.uint8))
    (note,) = notes(tmp_path, packing="book", eos=False, output=tmp_path / "two")
    assert note.startswith("2 of 154 rows have one token to predict, or none")


@pytest.mark.parametrize(
    "changes", [{"packing": "stream"}, {"packing": "book", "stride": 20}, {"packing": "book", "stride": 47}]
)
def test_other_ways_to_pack_leave_nothing_over(tmp_path: Path, changes: dict) -> None:
    np.save(tmp_path / "images.npy", np.ones((200, 48), np.uint8))
    assert notes(tmp_path, eos=False, **changes) == ()


def test_a_document_shorter_than_a_row_whose_last_token_has_one_of_its_own(tmp_path: Path) -> None:
    save(tmp_path, *[(3,)] * 5)  # with marks 5 tokens each, and 25 are three rows and one token
    assert not any("one token to predict" in note for note in notes(tmp_path, packing="stream", seq_len=8))


def test_documents_of_next_to_nothing_are_not_what_a_row_left_over(tmp_path: Path) -> None:
    save(tmp_path, *[(1,)] * 5)
    assert not any("one token to predict" in note for note in notes(tmp_path, packing="book", eos=False))


@pytest.mark.parametrize(("n_documents", "told"), [(15, 0), (16, 1)])
def test_much_padding_is_told_where_there_are_rows_enough(tmp_path: Path, n_documents: int, told: int) -> None:
    save(tmp_path, *[(40,)] * n_documents)
    found = notes(tmp_path, packing="book", seq_len=100)
    assert [note.partition(",")[0] for note in found] == ["58% of the rows is padding"] * told


@pytest.mark.parametrize(("n_values", "told"), [(30, 1), (31, 0)])
def test_items_of_more_than_a_few_tokens_are_not_told(tmp_path: Path, n_values: int, told: int) -> None:
    np.save(tmp_path / "a.npy", np.ones((20, n_values), np.uint8))
    found = notes(tmp_path)
    assert [note.partition(" have")[0] for note in found] == ["20 documents out of arrays"] * told


@pytest.mark.parametrize("shape", [(40, 40, 3), (8, 8)])
def test_files_of_one_image_each_that_were_cut_are_told(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save(tmp_path, shape, shape, shape)
    assert notes(tmp_path, seq_len=400) == (
        f"3 .npy files came to {3 * shape[0]} documents, one for each item of the first dimension, and all have one "
        "shape, as files of one document each do: if a file is one document, stack all into one array, or save "
        "numpy.expand_dims(array, 0)",
    )
    save(tmp_path, shape, (shape[0] + 1, *shape[1:]), (5,), (1, *shape))
    (note,) = notes(tmp_path, seq_len=400, output=tmp_path / "other")
    n_documents = 2 * shape[0] + 1
    assert note.startswith(
        f"2 .npy files came to {n_documents} documents, one for each item of the first dimension: if"
    )


@pytest.mark.parametrize("shapes", [[(40, 40)], [(40, 40), (1600,)], [(1, 1600), (1, 1600)]])
def test_one_array_of_many_images_and_files_that_were_not_cut_are_not_told(
    tmp_path: Path, shapes: list[tuple[int, ...]]
) -> None:
    save(tmp_path, *shapes)
    np.savez(tmp_path / "archive.npz", x=np.ones((40, 40), np.uint8))
    assert notes(tmp_path, seq_len=2000) == ()


def test_items_that_were_left_out_do_not_count(tmp_path: Path) -> None:
    chorale = np.ones((50, 4), np.int16)
    chorale[:20] = 999
    np.save(tmp_path / "chorale.npy", chorale)
    (note,) = notes(tmp_path, policies={"encoding": "skip"})
    assert note.startswith("30 documents out of arrays have 6 tokens (the median). An array of more than")
    chorale[:48] = 999
    np.save(tmp_path / "chorale.npy", chorale)
    (note,) = notes(tmp_path, policies={"encoding": "skip"}, output=tmp_path / "two")
    assert note.startswith("2 documents out of arrays have")
    chorale[:49] = 999
    np.save(tmp_path / "chorale.npy", chorale)
    assert notes(tmp_path, policies={"encoding": "skip"}, output=tmp_path / "one") == ()


HANGUL = "태초에 하나님이 천지를 창조하시니라\n" * 50
TOLD = (
    "are single bytes, of characters that the tokenizer has no piece for (byte fallback). Likely causes: another "
    "Unicode normalisation than it was trained on (see --normalize nfc), another language, a vocabulary too small for "
    "its characters, or a wrong --encoding"
)


def test_text_that_the_tokenizer_has_no_pieces_for_is_told(tmp_path: Path) -> None:
    (tmp_path / "nfc").mkdir()
    (tmp_path / "nfd").mkdir()
    (tmp_path / "nfc" / "a.txt").write_text(HANGUL)
    (tmp_path / "nfd" / "b.txt").write_text(unicodedata.normalize("NFD", HANGUL))
    model = tmp_path / "a.model"
    train_tokenizer(TrainingSettings((str(tmp_path / "nfc"),), model, vocab_size=278))
    text = {"inputs": (str(tmp_path / "nfc"),), "tokenizer": str(model), "vocab_size": None, "seq_len": 512}
    assert notes(tmp_path, **text) == ()
    (note,) = notes(tmp_path, **text, val_inputs=(str(tmp_path / "nfd"),), output=tmp_path / "held_out")
    share, _, told = note.partition(" of the tokens of val ")
    assert told == TOLD and share.endswith("%") and 50 < int(share[:-1]) <= 100
    (note,) = notes(tmp_path, **{**text, "inputs": (str(tmp_path / "nfd"),)}, append=True)
    assert note.partition(" of the tokens added to train ")[2] == TOLD
    composed = {**text, "inputs": (str(tmp_path / "nfd"),), "text": TextSettings(normalize=("nfc",))}
    assert notes(tmp_path, **composed, output=tmp_path / "composed") == ()
