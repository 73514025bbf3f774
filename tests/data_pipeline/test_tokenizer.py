"""Tokenizers give every byte back, and cuts do not change ids."""

import hashlib
import io
import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import tokenizer as tokenizer_module
from data_pipeline.blocks import BLOCK_BYTES
from data_pipeline.config import TextSettings
from data_pipeline.documents import Reading, Span, plan_tasks, read_parts
from data_pipeline.errors import DataError
from data_pipeline.files import find_files
from data_pipeline.tokenizer import cut_pieces, load_tokenizer, token_dtype

UNHURRIED = settings(deadline=None)  # a busy machine is no failure
TEXT = st.text(max_size=60) | st.text(alphabet="\u2581 \t\r\n\0ab가\ufeff\u0301", max_size=60)


@UNHURRIED
@given(text=TEXT)
def test_any_text_comes_back(text: str, tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    ids = tokenizer.encode(text.encode())
    assert tokenizer.decode(ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@UNHURRIED
@given(data=st.binary(max_size=100))
def test_any_bytes_come_back(data: bytes) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(data)
    assert ids.tolist() == list(data)
    assert tokenizer.decode(np.concatenate(([tokenizer.bos_id], ids, [tokenizer.eos_id]))) == data


@pytest.mark.parametrize(
    ("n_values", "item_bytes"), [(1, 1), (256, 1), (257, 2), (65_536, 2), (65_537, 4), (70_000, 4)]
)
def test_integers_are_their_own_ids(n_values: int, item_bytes: int) -> None:
    tokenizer = load_tokenizer("integers", n_values)
    values = [0, n_values // 2, n_values - 1]
    data = b"".join(value.to_bytes(item_bytes, "little") for value in values)
    ids = tokenizer.encode(data)
    assert ids.tolist() == values
    assert ids.dtype == token_dtype(n_values + 2) == token_dtype(tokenizer.vocab_size)
    assert tokenizer.decode(np.concatenate(([tokenizer.bos_id], ids, [tokenizer.eos_id]))) == data
    assert (tokenizer.bos_id, tokenizer.eos_id) == (n_values, n_values + 1)
    assert tokenizer.token_bytes.tolist() == [item_bytes] * n_values + [0, 0]
    assert tokenizer.is_byte_fallback.shape == (n_values + 2,)
    assert not tokenizer.is_byte_fallback[ids].any()
    assert len(tokenizer.encode(b"")) == 0


def test_the_most_integers_fit_their_type() -> None:
    tokenizer = load_tokenizer("integers", 2**24)
    data = (2**24 - 1).to_bytes(4, "little")
    ids = tokenizer.encode(data)
    assert ids.tolist() == [2**24 - 1]
    assert tokenizer.decode(np.append(ids, ids.dtype.type(tokenizer.eos_id))) == data


@pytest.mark.parametrize("value", [10, 11])
def test_a_value_outside_the_vocabulary_is_no_special_id(value: int) -> None:
    message = f"value {value} is outside the vocabulary of --vocab-size 10: expected 0 to 9"
    with pytest.raises(DataError, match=message):
        load_tokenizer("integers", 10).encode(bytes([9, value]))


@pytest.mark.parametrize("dtype", ["u1", "i8", ">u2", "<u4", "i2"])
def test_arrays_of_any_integer_type_are_their_values(dtype: str) -> None:
    values = np.array([[9, 0, 3], [1, 2, 50]], dtype)
    for n_values in (51, 1000, 2**20):
        tokenizer = load_tokenizer("integers", n_values)
        assert tokenizer.encode(values).tolist() == tokenizer.encode(values[:, ::-1][:, ::-1]).tolist()
        assert tokenizer.encode(values).tolist() == [9, 0, 3, 1, 2, 50]
        assert tokenizer.encode(values == 9).tolist() == [1, 0, 0, 0, 0, 0]
    with pytest.raises(DataError, match="the value 50 is outside the vocabulary of --vocab-size 50: expected 0 to 49"):
        load_tokenizer("integers", 50).encode(values)


def test_what_is_no_array_of_values_is_refused() -> None:
    tokenizer = load_tokenizer("integers", 1000)
    with pytest.raises(DataError, match="the value -1 is outside the vocabulary"):
        tokenizer.encode(np.array([3, -1]))
    with pytest.raises(DataError, match="an array of float64 holds no integers: convert it"):
        tokenizer.encode(np.array([3.0]))
    with pytest.raises(DataError, match="3 bytes are no values of 2 bytes each"):
        tokenizer.encode(bytes(3))


def test_tokenizers_of_integers_are_told_apart() -> None:
    hashes = {load_tokenizer("integers", n).sha256 for n in (2, 255, 256)}
    assert len(hashes) == 3
    assert hashlib.sha256(b"integers:256").hexdigest() in hashes


@pytest.mark.parametrize(
    ("name", "vocab_size", "message"),
    [
        ("integers", None, "integers needs --vocab-size"),
        ("integers", 0, "--vocab-size is 0: expected 1 to 16777216"),
        ("integers", 2**24 + 1, "--vocab-size is 16777217: expected 1 to 16777216"),
        ("bytes", 256, "--vocab-size 256 is for --tokenizer integers"),
        ("some.model", 256, "--tokenizer some.model has a vocabulary of its own: leave it out"),
    ],
)
def test_the_vocabulary_is_given_for_integers_alone(name: str, vocab_size: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tokenizer(name, vocab_size)


@UNHURRIED
@given(text=TEXT)
def test_ids_are_those_of_plain_sentencepiece(text: str, tokenizer_file: Path) -> None:
    ids = load_tokenizer(str(tokenizer_file)).encode(text.encode())
    assert ids.dtype == np.uint16
    assert ids.tolist() == plain_ids(text, tokenizer_file)


def test_ids_of_many_pieces_are_those_of_plain_sentencepiece(tokenizer_file: Path) -> None:
    rng = random.Random(0)
    words = ["fox ", "dog\n", "\u2581", "quick\r\n", "가", " ", "\U0001f642", "x" * 50]
    text = "".join(rng.choices(words, k=60_000))
    assert len(text) > 5 * tokenizer_module.PIECE_CHARS
    assert load_tokenizer(str(tokenizer_file)).encode(text.encode()).tolist() == plain_ids(text, tokenizer_file)


def plain_ids(text: str, model: Path) -> list[int]:
    """The slow, obvious twin of `SentencePieceTokenizer.encode`."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    space = [processor.piece_to_id(piece) for piece in ("<0xE2>", "<0x96>", "<0x81>")]
    ids = []
    for piece in cut_pieces(text):
        for number, part in enumerate(piece.split("\u2581")):
            ids += (space if number else []) + processor.encode(part)
    return ids


def test_bytes_that_are_no_text_are_refused(tokenizer_file: Path) -> None:
    with pytest.raises(UnicodeDecodeError):
        load_tokenizer(str(tokenizer_file)).encode(b"caf\xe9 au lait")


def test_every_odd_document_comes_back(tokenizer_file: Path, odd_documents: dict[str, bytes]) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    for content in odd_documents.values():
        assert tokenizer.decode(tokenizer.encode(content)) == content


def test_every_code_point_comes_back(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    surrogates = range(0xD800, 0xE000)
    text = "".join(chr(c) for c in range(0x20000) if c not in surrogates).encode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_nothing(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.token_bytes[[0, 1, 2]].tolist() == [0, 0, 0]
    assert tokenizer.decode(np.array([1, 2])) == b""


def test_line_ends_are_one_token(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    assert len(tokenizer.encode(b"\n")) == len(tokenizer.encode(b"\r\n")) == 1
    assert len(tokenizer.encode(b"\n\r\n\n")) == 3


def test_dtype_leaves_room_for_the_fill_value() -> None:
    assert token_dtype(65_535) == np.uint16
    assert token_dtype(65_536) == np.uint32


def test_pieces_are_the_text_and_end_at_newlines() -> None:
    limit = tokenizer_module.PIECE_CHARS
    line = "x" * 999 + "\n"
    text = line * 200 + "y" * 2 * limit + "\n" + line
    pieces = list(cut_pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= limit
    assert pieces[0].endswith("\n")


def test_a_text_of_one_piece_is_not_cut_and_a_newline_in_front_is_one_to_cut_after() -> None:
    limit = tokenizer_module.PIECE_CHARS
    whole = "x\n" * (limit // 2)
    assert list(cut_pieces(whole)) == [whole]
    assert list(cut_pieces("\n" + "x" * limit)) == ["\n", "x" * limit]


@pytest.mark.parametrize("text", ["word word\n", "word " * 9, "가나다 "])
def test_spans_give_the_ids_of_the_whole(text: str, tmp_path: Path, tokenizer_file: Path) -> None:
    content = (text * (BLOCK_BYTES * 5 // 4 // len(text.encode()))).encode()
    (tmp_path / "a.txt").write_bytes(content)
    files = find_files([str(tmp_path)], {}, arrays=False)
    reading = Reading(TextSettings(), "sentencepiece")
    tokenizer = load_tokenizer(str(tokenizer_file))

    def encode(span: Span) -> list[int]:
        blocks = chain.from_iterable(part.blocks for part in read_parts(files[0], span, reading))
        return np.concatenate([tokenizer.encode(block) for block in blocks]).tolist()

    whole = encode(Span(0, 0, len(content)))
    assert tokenizer.decode(np.array(whole)) == content
    spans = list(chain.from_iterable(plan_tasks(files, reading.text, BLOCK_BYTES)))
    assert len(spans) > 1
    assert list(chain.from_iterable(map(encode, spans))) == whole


def lossy_model(**changes: object) -> bytes:
    model = io.BytesIO()
    sentences = iter(["some words to train on, and more of them"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, hard_vocab_limit=False, minloglevel=2, **changes
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 40}, "does not keep text exactly"),
        ({"vocab_size": 300, "byte_fallback": True}, "does not keep text exactly"),
        ({"vocab_size": 300, "byte_fallback": True, "bos_id": -1}, "has no BOS or no EOS"),
        ({"vocab_size": 300, "byte_fallback": True, "eos_id": -1}, "has no BOS or no EOS"),
    ],
)
def test_a_model_that_loses_text_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "lossy.model"
    path.write_bytes(lossy_model(**changes))
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(path))


@pytest.mark.parametrize("content", [b"", b"not a model\n" * 10])
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        load_tokenizer(str(path))


def test_a_model_that_lowers_capitals_is_refused(tmp_path: Path) -> None:
    """Of all that SentencePiece's own rules change, this changes nothing, not even a length."""
    (tmp_path / "rules.tsv").write_text("41\t61\n")  # A becomes a
    path = tmp_path / "lossy.model"
    rules = {"normalization_rule_tsv": str(tmp_path / "rules.tsv"), "add_dummy_prefix": False}
    path.write_bytes(lossy_model(vocab_size=300, byte_fallback=True, remove_extra_whitespaces=False, **rules))
    with pytest.raises(DataError, match="does not keep text exactly"):
        load_tokenizer(str(path))


def test_text_that_a_model_changes_where_the_probe_does_not_look_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rules.tsv").write_text("1D400\t41\n")  # a bold A becomes a plain one
    path = tmp_path / "lossy.model"
    rules = {"normalization_rule_tsv": str(tmp_path / "rules.tsv"), "add_dummy_prefix": False}
    path.write_bytes(lossy_model(vocab_size=300, byte_fallback=True, remove_extra_whitespaces=False, **rules))
    tokenizer = load_tokenizer(str(path))
    with pytest.raises(DataError, match="does not keep text exactly"):
        tokenizer.encode("\U0001d400".encode())


def test_a_folder_with_a_model_in_it_says_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read tokenizer .*: Is a directory\. Expected a SentencePiece model"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read tokenizer .*: Is a directory\. Give .*/tokenizer\.model"):
        load_tokenizer(str(tmp_path))
