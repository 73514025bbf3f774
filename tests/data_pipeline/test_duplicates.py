"""Copies are found, exact and near; other texts are not; and the answer is the same everywhere."""

import hashlib
import importlib.metadata
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import duplicates
from data_pipeline.duplicates import Signature, exact, near
from data_pipeline.errors import DataError
from data_pipeline.planning import merge_parts
from data_pipeline.scratch import Columns

UNHURRIED = settings(deadline=None)  # a busy machine is no failure


def digests(contents: list[bytes]) -> np.ndarray:
    hashes = b"".join(hashlib.sha256(content).digest() for content in contents)
    return np.frombuffer(hashes, np.uint8).reshape(len(contents), 32)


def signature(text: str | bytes) -> np.ndarray:
    result = Signature()
    result.update(text.encode() if isinstance(text, str) else text)
    return result.value()


def similarity(one: str, other: str) -> float:
    """As the signatures estimate it."""
    return float((signature(one) == signature(other)).mean())


def true_similarity(one: str, other: str) -> float:
    a, b = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one.split(), other.split()))
    return len(a & b) / len(a | b)


def novel(seed: int, n_words: int = 2000) -> list[str]:
    return [f"w{k}" for k in np.random.default_rng(seed).zipf(1.2, n_words) % 5000]


def edited(words: list[str], n_edits: int, seed: int) -> list[str]:
    """The words with some of them, spread at random, replaced by others."""
    rng = np.random.default_rng(seed)
    words = list(words)
    for place in rng.choice(len(words), n_edits, replace=False):
        words[place] = f"x{rng.integers(1 << 30)}"
    return words


# Exact copies


@UNHURRIED
@given(st.lists(st.integers(0, 9), max_size=30), st.lists(st.integers(5, 12), max_size=10))
def test_exact_finds_the_first_of_each_content(contents: list[int], known: list[int]) -> None:
    def as_digests(values: list[int]) -> np.ndarray:
        return digests([str(value).encode() for value in values])

    expected = [
        -2 if v in known else contents.index(v) if contents.index(v) < i else -1 for i, v in enumerate(contents)
    ]
    found = exact(as_digests(contents), as_digests(known))
    assert found.dtype == np.int64
    assert found.tolist() == expected


@UNHURRIED
@given(st.integers(0, 31))
def test_every_byte_of_the_hash_counts(place: int) -> None:
    hashes = np.zeros((3, 32), np.uint8)
    hashes[1, place] = 1
    assert exact(hashes, hashes[:0]).tolist() == [-1, -1, 0]


def test_a_million_hashes_take_seconds() -> None:
    hashes = np.random.default_rng(0).integers(0, 256, (1_000_000, 32), np.uint8)
    hashes[500_000:] = hashes[:500_000]
    begin = time.perf_counter()
    found = exact(hashes, hashes[:0])
    assert time.perf_counter() - begin < 10
    assert (found[:500_000] == -1).all()
    assert np.array_equal(found[500_000:], np.arange(500_000))


# Words


def slow_words(text: str) -> Iterator[str]:
    """The slow, obvious twin of what `Signature` takes for words."""
    word = ""
    for char in text:
        lone = "\u3000" <= char <= "\u9fff"
        between = not char.isalnum() if char < "\u0080" else char <= "\u00bf" or "\u2000" <= char <= "\u2fff"
        if word and (lone or between):
            yield word
            word = ""
        if lone:
            yield char
        elif not between:
            word += char.lower() if char < "\u0080" else char
    if word:
        yield word


@UNHURRIED
@given(st.text(st.sampled_from("aAbBz09 \n_-é«»\u00a0—“”ßЖ가나世界、あ\u2fff\u3000\u9fff\ua000𠀀"), max_size=60))
def test_equal_words_and_no_others_hash_equal(text: str) -> None:
    hashes = duplicates._hash_words(text.encode()).hashes.tolist()
    words = list(slow_words(text))
    assert len(hashes) == len(words)
    assert len(set(zip(words, hashes, strict=True))) == len(set(words)) == len(set(hashes))


@UNHURRIED
@given(st.binary(max_size=40))
def test_any_bytes_have_a_signature(data: bytes) -> None:
    assert signature(data).shape == (128,)


def test_layout_punctuation_and_case_do_not_matter() -> None:
    plain = (
        '"Where\'s papa going with that ax?" said Fern to her mother - as they were setting the table for breakfast.'
    )
    typeset = plain.upper().replace(" ", "\r\n").replace('"', "“").replace("'", "’").replace("-", "—\u00a0")
    assert np.array_equal(signature(plain), signature(typeset))
    assert not np.array_equal(signature(plain), signature(plain.replace("Fern", "Jane")))


def test_the_numbers_are_the_same_on_every_machine() -> None:
    value = signature("It was the best of times, it was the worst of times; 世界 of été.")
    assert value.dtype == np.uint32
    assert value[:4].tolist() == [251408187, 885627704, 90816364, 284869939]


# Blocks and parts


def test_cutting_between_words_changes_nothing() -> None:
    text = " ".join(novel(0, 300))
    whole = Signature()
    for word in text.split():
        whole.update(word.encode() + b" ")
        whole.update(b"")
    assert np.array_equal(whole.value(), signature(text))


@UNHURRIED
@given(st.text("ab \u00e9\u4e16\u2014.", max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_cutting_between_characters_changes_nothing(text: str, cuts: list[int]) -> None:
    whole = Signature()
    for start, stop in pairwise([0, *sorted(cuts), len(text)]):
        whole.update(text[start:stop].encode())
        whole.value()
    assert np.array_equal(whole.value(), signature(text))


def test_words_and_shingles_over_more_than_two_blocks() -> None:
    whole = Signature()
    for block in (b"x abc", b"def", b"ghi y z", b"", b"z w v"):
        whole.update(block)
    assert np.array_equal(whole.value(), signature("x abcdefghi y zz w v"))


def test_a_word_of_many_blocks_is_one_word() -> None:
    """Two genomes without line breaks are alike if they are the same, not if they share most of their blocks."""
    blocks = [bytes([letter]) * 1000 for letter in b"ACGTACGT"]
    one, same, other = Signature(), Signature(), Signature()
    for block in blocks:
        one.update(block)
        same.update(block.lower())
        other.update(block if block != blocks[3] else b"N" * 1000)
    assert np.array_equal(one.value(), same.value()) and not (one.value() == other.value()).any()
    assert np.array_equal(one.value(is_whole=False), signature("")), "a part of a longer word is no shingle"


def test_value_may_be_asked_for_at_any_time() -> None:
    one = Signature()
    for block in (b"three words only", b" and now some more of them", b" and yet more"):
        one.update(block)
        one.value()
    assert np.array_equal(one.value(), signature("three words only and now some more of them and yet more"))


def test_parts_merge_by_minimum() -> None:
    words = novel(1, 1000)
    parts = np.minimum(signature(" ".join(words[:500])), signature(" ".join(words[500:])))
    assert (parts == signature(" ".join(words))).mean() > 0.95


def test_a_document_in_parts_has_the_smallest_numbers_of_all_of_them() -> None:
    signatures = np.stack([signature(" ".join(novel(seed, 300))) for seed in range(3)])
    n = np.zeros(3, np.int64)
    parts = Columns(n, np.array([True, False, True]), n - 1, n + 9, n + 5, n, n, n, digests([b""] * 3), signatures)
    assert np.array_equal(merge_parts(parts).minhash, [np.minimum(*signatures[:2]), signatures[2]])


# Near copies

NONE = np.zeros((0, 128), np.uint32)
"""Signatures of a store without documents."""


def test_estimates_are_as_good_as_promised() -> None:
    """Unbiased, with a standard error of sqrt(J (1 - J) / 128)."""
    scores = []
    for seed in range(150):
        words = novel(seed, 400)
        one, other = " ".join(words), " ".join(edited(words, 5 + seed % 20, seed))
        true = true_similarity(one, other)
        scores.append((similarity(one, other) - true) / np.sqrt(true * (1 - true) / 128))
    assert abs(np.mean(scores)) < 4 / np.sqrt(len(scores))
    assert 0.8 < np.std(scores) < 1.2


def test_recall_and_precision() -> None:
    """150 texts, each with an edited copy somewhere after it: what is similar is found, and nothing else."""
    originals = [novel(seed, 500) for seed in range(150)]
    texts = [" ".join(words) for words in originals]
    texts += [" ".join(edited(words, k % 50, k)) for k, words in enumerate(originals)]
    true = [true_similarity(texts[k], texts[150 + k]) for k in range(150)]
    found = near(np.stack([signature(text) for text in texts]), 0.8, NONE)
    assert (found[:150] == -1).all()
    assert set((found[150:] - np.arange(150))[found[150:] >= 0].tolist()) == {0}  # to its own original, or to none
    similar = [found[150 + k] >= 0 for k, s in enumerate(true) if s >= 0.87]
    different = [found[150 + k] >= 0 for k, s in enumerate(true) if s < 0.7]
    assert len(similar) >= 10
    assert np.mean(similar) > 0.95
    assert len(different) >= 50
    assert not any(different)


@pytest.mark.parametrize("alphabet", ["\u4e00", "\uac00"], ids=["without-spaces", "hangul"])
def test_other_scripts(alphabet: str) -> None:
    rng = np.random.default_rng(0)

    def text() -> str:
        chars = "".join(chr(ord(alphabet) + k) for k in rng.integers(0, 2000, 3000))
        return chars if alphabet == "\u4e00" else " ".join(chars[i : i + 3] for i in range(0, 3000, 3))

    one, other = text(), text()
    reprint = f"{one[:1500]}。{one[1500:]}"
    assert near(np.stack([signature(t) for t in (one, other, reprint)]), 0.8, NONE).tolist() == [-1, -1, 0]


def rows_like(first: int, changed: int) -> np.ndarray:
    """A signature of 128 numbers, of which the first `changed` are not those of `rows_like(first, 0)`."""
    row = np.arange(128, dtype=np.uint32) + np.uint32(1000 * first)
    row[:changed] += np.uint32(1_000_000)
    return row


def test_copies_of_a_dropped_copy_are_kept() -> None:
    """0 ~ 1 ~ 2, but 0 and 2 differ: 1 goes, and 2 has nothing like it left."""
    rows = np.stack([rows_like(1, 0), rows_like(1, 20), rows_like(1, 40), rows_like(1, 40)])
    assert near(rows, 0.8, NONE).tolist() == [-1, 0, -1, 2]


def test_what_is_there_already_stays_and_comes_first() -> None:
    """Also where two of it are alike. 1 is like 0 alone, which goes."""
    known = np.stack([rows_like(1, 0), rows_like(1, 10), rows_like(3, 0), np.full(128, 2**32 - 1, np.uint32)])
    rows = np.stack([rows_like(1, 20), rows_like(1, 40), rows_like(2, 0), rows_like(2, 10), rows_like(3, 30), known[3]])
    assert near(rows, 0.8, known).tolist() == [-2, -1, -1, 2, -1, -1]
    assert near(rows[:0], 0.8, known).tolist() == []
    assert near(rows[:1], 0.8, known[2:]).tolist() == [-1]


def test_the_earliest_original_is_named() -> None:
    rows = np.stack([rows_like(9, 0), rows_like(1, 0), rows_like(1, 30), rows_like(1, 15)])
    assert near(rows, 0.8, NONE).tolist() == [-1, -1, -1, 1]


def test_documents_without_words_are_like_no_other() -> None:
    texts = ["", " \n—«»", "", "Amen", "amen.", "Amen and amen"]
    assert near(np.stack([signature(text) for text in texts]), 0.8, NONE).tolist() == [-1, -1, -1, -1, 3, -1]


def test_no_documents() -> None:
    assert near(np.zeros((0, 128), np.uint32), 0.8, NONE).tolist() == []
    assert exact(np.zeros((0, 32), np.uint8), np.zeros((0, 32), np.uint8)).tolist() == []


def test_only_equal_signatures_at_threshold_one() -> None:
    assert near(np.stack([rows_like(1, 0), rows_like(1, 1), rows_like(1, 0)]), 1.0, NONE).tolist() == [-1, -1, 0]


@pytest.mark.parametrize("threshold", np.arange(0.5, 1.001, 0.05))
def test_bands_keep_their_promise(threshold: float) -> None:
    n_bands, n_numbers = duplicates._bands(threshold)
    assert n_bands * n_numbers <= 128
    assert 1 - (1 - threshold**n_numbers) ** n_bands >= 0.9
    assert duplicates._bands(0.8) == (16, 8)


@pytest.mark.parametrize("threshold", [0.4, 1.01, float("nan")])
def test_a_threshold_without_meaning_is_refused(threshold: float) -> None:
    with pytest.raises(DataError, match="--near-threshold is"):
        near(np.zeros((0, 128), np.uint32), threshold, NONE)


# The library


@pytest.fixture
def fresh_library() -> Iterator[None]:
    duplicates._datasketch.cache_clear()
    yield
    duplicates._datasketch.cache_clear()


@pytest.mark.usefixtures("fresh_library")
def test_without_datasketch_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(DataError, match=r"needs the package datasketch: pip install 'longhand\[corpus\]'"):
        Signature()


@pytest.mark.usefixtures("fresh_library")
def test_an_old_datasketch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.6.5")
    with pytest.raises(DataError, match=r"2\.0 or later, and 1\.6\.5 is installed"):
        Signature()


def test_a_document_is_as_bad_as_its_worst_part() -> None:
    n = np.zeros(3, np.int64)
    bad = np.array([0, 2, 0])
    sha256, minhash = np.zeros((3, 32), np.uint8), np.zeros((3, 0), np.uint32)
    columns = Columns(n, np.array([True, False, True]), n - 1, n + 9, n + 5, n, bad, bad, sha256, minhash)
    merged = merge_parts(columns)
    assert merged.bad.tolist() == merged.replaced.tolist() == [2, 0]


def test_a_word_that_ends_in_the_next_block_does_not_go_on_in_the_one_after_it() -> None:
    whole = Signature()
    for block in (b"x y z w a", b"b ", b"c"):
        whole.update(block)
    assert np.array_equal(whole.value(), signature("x y z w ab c"))


def test_the_least_threshold_and_the_most() -> None:
    assert near(NONE, 0.5, NONE).tolist() == []
    assert duplicates._bands(1.0) == (2, 64)
