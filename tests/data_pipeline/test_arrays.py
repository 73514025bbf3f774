"""Documents out of arrays of integers."""

import gzip
import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from read_documents import blocks_of, only, problems, read, whole

from data_pipeline.build import build
from data_pipeline.config import BuildSettings, TextSettings
from data_pipeline.dataset import IGNORED_LABEL, RowDataset
from data_pipeline.documents import BLOCK_BYTES, Reading, Span, read_parts
from data_pipeline.errors import DataError
from data_pipeline.files import InputFile


def integers(vocab_size: int, field: str = "text", **policies: str) -> Reading:
    return Reading(TextSettings(field=field), "integers", vocab_size, policies)


def save_array(path: Path, array: np.ndarray) -> InputFile:
    np.save(path, array)
    return only(path, arrays=True)


@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", ">u2", "<i4", ">i8", "<u8"])
@pytest.mark.parametrize(("vocab_size", "stored"), [(100, "<u1"), (256, "<u1"), (257, "<u2"), (70_000, "<u4")])
def test_items_of_an_array_are_documents(tmp_path: Path, dtype: str, vocab_size: int, stored: str) -> None:
    array = np.arange(2 * 3 * 4, dtype=dtype).reshape(2, 3, 4)
    results = read(save_array(tmp_path / "a.npy", array), integers(vocab_size))
    assert results == [(0, array[0].astype(stored).tobytes(), []), (1, array[1].astype(stored).tobytes(), [])]
    flat = read(save_array(tmp_path / "b.npy", array.reshape(-1)), integers(vocab_size))
    assert flat == [(0, array.astype(stored).tobytes(), [])]


def test_truth_values_are_0_and_1(tmp_path: Path) -> None:
    """A piano roll."""
    roll = np.array([[True, False, True], [False, False, True]])
    assert read(save_array(tmp_path / "a.npy", roll), integers(2)) == [(0, b"\1\0\1", []), (1, b"\0\0\1", [])]
    ((_, problem, detail), _) = problems(save_array(tmp_path / "b.npy", roll), integers(1))
    assert (problem, detail) == ("encoding", "has the value 1 at place 0: expected 0 to 0")
    floats = save_array(tmp_path / "c.npy", roll.astype(float))
    assert "values of type float64, not integers: convert it" in problems(floats, integers(2))[0][2]


@settings(deadline=None)  # files take the time they take
@given(
    length=st.integers(0, 60), n_bytes=st.integers(4, 40), dtype=st.sampled_from(["u1", ">i8"]), vocab_size=st.just(300)
)
def test_blocks_of_an_array_depend_on_its_values_alone(
    length: int, n_bytes: int, dtype: str, vocab_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    array = np.arange(3 * length, dtype=dtype).reshape(3, length)
    file = save_array(tmp_path_factory.mktemp("array") / "a.npy", array)
    data = array.astype("<u2")
    with blocks_of(n_bytes):
        items = [list(part.blocks) for part in read_parts(file, whole(file), integers(vocab_size))]
    step = n_bytes // 2
    assert items == [[row[i : i + step].tobytes() for i in range(0, length, step)] for row in data]


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_arrays_of_an_archive_follow_each_other(tmp_path: Path, savez: Callable[..., None], suffix: str) -> None:
    plain = tmp_path / "a.npz"
    savez(plain, zeros=np.zeros((2, 3), np.uint8), names=np.array(["a" * 58]), one=np.array([1, 2]), f=np.ones(2))
    path = tmp_path / f"b.npz{suffix}"
    path.write_bytes(gzip.compress(plain.read_bytes()) if suffix else plain.read_bytes())
    file = only(path, arrays=True)
    results = read(file, integers(10))
    assert [record for record, _, _ in results] == [0, 1, 2, 3, 4]
    assert [results[i][1] for i in (0, 1, 3)] == [bytes(3), bytes(3), bytes([1, 2])]
    assert results[2][1] == (
        "unreadable",
        "holds values of type <U58 in its array names, not integers: name the one to read, --field zeros or one",
    )
    assert "float64" in str(results[4][1])
    assert [result for _, result, _ in read(file, integers(10, field="one"))] == [bytes([1, 2])]
    ((record, problem, detail),) = problems(file, integers(10, field="nope"))
    assert (record, problem) == (-1, "unreadable")
    assert "has no array 'nope' but zeros, names, one, f" in detail


def test_arrays_by_url(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(6).reshape(2, 3))
    fsspec.filesystem("memory").pipe("/arrays/a.npz", (tmp_path / "a.npz").read_bytes())
    file = only("memory://arrays", arrays=True)
    assert [result for _, result, _ in read(file, integers(10))] == [bytes([0, 1, 2]), bytes([3, 4, 5])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"duplicates": "near"}, "compares words, which integers are not: use drop"),
        (
            {"policies": {"encoding": "replace"}},
            "cannot replace an integer outside the vocabulary: use encoding=skip, or a larger --vocab",
        ),
        ({"text": TextSettings(encoding="latin-1")}, "leave out --encoding and --normalize"),
        (
            {"text": TextSettings(field="x")},
            "--field x names an array of .npz files, and none of the inputs is one: le",
        ),
    ],
)
def test_settings_that_have_no_meaning_for_integers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    np.save(tmp_path / "a.npy", np.arange(5))
    with pytest.raises(DataError, match=message):
        build(BuildSettings((str(tmp_path),), "integers", tmp_path / "store", vocab_size=9, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_a_field_is_for_archives_and_other_arrays_may_be_with_them(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5))
    np.savez(tmp_path / "b.npz", x=np.arange(6), y=np.arange(7))
    text, output = TextSettings(field="x"), tmp_path / "store"
    build(BuildSettings((str(tmp_path),), "integers", output, vocab_size=9, text=text))
    np.save(tmp_path / "c.npy", np.arange(8))
    store = build(BuildSettings((str(tmp_path / "c.npy"),), "integers", output, 9, text=text, append=True)).store
    assert [(document.name, document.tokens) for document in store.documents] == [
        ("a.npy/0", 7),
        ("b.npz/0", 8),
        ("c.npy/0", 10),
    ]


@pytest.mark.parametrize(("value", "dtype"), [(-1, np.int8), (10, np.uint8), (2**40, np.int64), (-(2**40), np.int64)])
def test_values_outside_the_vocabulary(tmp_path: Path, value: int, dtype: type) -> None:
    array = np.zeros((3, 4), dtype)
    array[1, 2] = value
    file = save_array(tmp_path / "a.npy", array)
    for policy in ("strict", "skip", "replace"):  # there is no value to replace it by
        results = read(file, integers(10, encoding=policy))
        assert [results[i][1] for i in (0, 2)] == [bytes(4)] * 2
        assert results[1][1] == ("encoding", f"has the value {value} at place 2: expected 0 to 9")


def test_arrays_that_are_not_read(tmp_path: Path) -> None:
    fortran = save_array(tmp_path / "a.npy", np.asfortranarray(np.zeros((3, 4), int)))
    assert "Fortran order: save numpy.ascontiguousarray(array)" in problems(fortran, integers(10))[0][2]
    np.save(tmp_path / "b.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    objects = only(tmp_path / "b.npy", arrays=True)
    assert problems(objects, integers(10))[0][2] == (
        "holds Python objects, not integers: save each piece as an array of its own, numpy.savez(file, *pieces)"
    )
    np.savez(tmp_path / "both.npz", a=np.array([None]), b=np.arange(5))
    assert problems(only(tmp_path / "both.npz", arrays=True), integers(10))[0][2].startswith(
        "holds Python objects in its array a, not integers: name the one to read, --field b, or save each piece as an"
    )
    for name, content in (("c.npy", b"not an array"), ("d.npz", b"not an archive"), ("e.npy", b"\x93NUMPY\x01\x00")):
        (tmp_path / name).write_bytes(content)
        ((record, problem, _),) = problems(only(tmp_path / name, arrays=True), integers(10))
        assert problem == "unreadable"
        assert record <= 0


def test_of_many_arrays_some_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", names=np.array(["a"]), **{name: np.arange(3) for name in "abcde"})
    ((_, _, detail),) = problems(only(tmp_path / "a.npz", arrays=True), integers(10))
    assert detail.endswith("not integers: name the one to read, --field a or b or c or another")
    np.savez(tmp_path / "b.npz", names=np.array(["a"]), floats=np.ones(2))  # none of which would do
    detail = problems(only(tmp_path / "b.npz", arrays=True), integers(10))[0][2]
    assert detail.endswith("not integers: convert it to integers")


def refusal(path: Path, **changes: Any) -> str:
    """Why a build of values below 10 stops."""
    with pytest.raises(DataError) as error:
        build(BuildSettings((str(path),), "integers", path.parent / "out", vocab_size=10, **changes))
    return str(error.value)


def test_errors_speak_of_items_not_of_records_and_bytes(tmp_path: Path) -> None:
    values = np.zeros((3, 4), np.uint8)
    values[2] = 10
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "b.npz", x=values, names=np.array(["a"]))
    np.save(tmp_path / "c.npy", np.ones(3))
    assert refusal(tmp_path / "a.npy").startswith(f"{tmp_path}/a.npy, item 2, has the value 10 at place 0: expected")
    assert refusal(tmp_path / "b.npz").startswith(
        f"{tmp_path}/b.npz has the value 10 at place 0, item 2 of its array x"
    )
    assert refusal(tmp_path / "c.npy").startswith(
        f"{tmp_path}/c.npy holds values of type float64, not integers: convert"
    )
    (tmp_path / "d.npy.gz").write_bytes(gzip.compress((tmp_path / "a.npy").read_bytes())[:-9])
    assert refusal(tmp_path / "d.npy.gz").startswith(f"{tmp_path}/d.npy.gz ends early")


@pytest.mark.parametrize("changes", [{}, {"bos": False, "eos": False}, {"split": {"val": 0.5}}])
def test_arrays_without_items_are_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    np.save(tmp_path / "a.npy", np.zeros((0, 30), np.uint8))
    assert refusal(tmp_path / "a.npy", **changes).startswith("the inputs hold no documents: their arrays have no items")


def test_items_without_values_are_told(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 0), np.uint8))
    assert refusal(tmp_path / "a.npy", bos=False, eos=False) == (
        "no document is left of the 2 that were found: 2 with the problem empty. Change --on-bad or --no-bos or "
        "--no-eos, or add documents"
    )


def test_a_second_array_in_a_file_is_not_lost_in_silence(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.save(file, np.arange(6).reshape(2, 3))
        np.save(file, np.arange(3))
    ((record, problem, detail),) = problems(only(tmp_path / "a.npy", arrays=True), integers(10))
    assert (record, problem) == (2, "unreadable")
    assert "goes on after its array" in detail


def test_values_after_an_array_of_an_archive_are_not_lost_in_silence(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.arange(6).reshape(2, 3))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content.getvalue() + b"\0")
        archive.writestr("y.npy", content.getvalue())
    results = [result for _, result, _ in read(only(tmp_path / "a.npz", arrays=True), integers(10))]
    assert results[:2] == results[3:] == [bytes([0, 1, 2]), bytes([3, 4, 5])]
    assert results[2][0] == "unreadable"
    assert "goes on after its array x: save each array in a file of its own, or under a name" in str(results[2][1])


def npy(header: str) -> bytes:
    """An .npy file of ten bytes under a header, which may be damaged."""
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(10)


@pytest.mark.parametrize("shape", ["(-5,)", "(-5, 2)", "(2, -5)", f"({10**20},)", f"(2, {10**20})", f"({2**60},)"])
def test_shapes_that_cannot_be(tmp_path: Path, shape: str) -> None:
    (tmp_path / "a.npy").write_bytes(npy(f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}\n"))
    ((record, problem, detail),) = problems(only(tmp_path / "a.npy", arrays=True), integers(10))
    assert (record, problem) == (0, "unreadable")
    assert detail == f"its array has the shape {shape}: expected lengths from 0 on, and in all below 2**63 bytes"


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (5,)\n",  # tokenize.TokenError
        "{'descr': (), 'fortran_order': False, 'shape': (5,)}\n",  # IndexError
    ],
)
def test_a_header_that_numpy_fails_on(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.npy").write_bytes(npy(header))
    ((record, problem, detail),) = problems(only(tmp_path / "a.npy", arrays=True), integers(10))
    assert (record, problem) == (0, "unreadable")
    assert "holds no array that can be read" in detail


@pytest.mark.parametrize(
    ("signature", "place", "detail"),
    [
        (b"PK\1\2", 6, "is not an .npz file, or is damaged (zip file version 25.5)"),
        (b"PK\1\2", 10, "has a member x that is no array that can be read (That compression method is not supported)"),
        (b"PK\5\6", 18, "has a member x that is no array that can be read ([Errno 22] Invalid argument)"),  # its place
    ],
)
def test_a_damaged_directory(tmp_path: Path, signature: bytes, place: int, detail: str) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(6))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(signature) + place] = 255
    (tmp_path / "a.npz").write_bytes(data)
    ((_, problem, said),) = problems(only(tmp_path / "a.npz", arrays=True), integers(10))
    assert (problem, said) == ("unreadable", detail)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("place", [0.05, 0.5])
def test_a_member_that_does_not_expand(tmp_path: Path, method: int, place: float) -> None:
    content = io.BytesIO()
    np.save(content, np.random.default_rng(0).integers(0, 10, (4, 1000)))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("x.npy", content.getvalue())
        archive.writestr("y.npy", content.getvalue())
    start = zipfile.ZipFile(tmp_path / "a.npz").getinfo("x.npy")
    data = bytearray((tmp_path / "a.npz").read_bytes())
    damaged = 40 + int(start.compress_size * place)
    data[damaged : damaged + 9] = b"\xff" * 9
    (tmp_path / "a.npz").write_bytes(data)
    results = read(only(tmp_path / "a.npz", arrays=True), integers(10))
    assert results[0][1][0] == ("unreadable" if method == zipfile.ZIP_BZIP2 else "truncated")  # bz2 raises OSError
    assert [len(result) for _, result, _ in results[1:]] == [1000] * 4


def test_a_truncated_array_ends_with_the_item_in_which_it_ends(tmp_path: Path) -> None:
    save_array(tmp_path / "a.npy", np.ones((1000, 4), ">u2"))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[: len(data) - 997 * 8 - 3])
    file = only(tmp_path / "a.npy", arrays=True)
    results = read(file, integers(10))
    assert [result for _, result, _ in results[:2]] == [bytes([1] * 4)] * 2
    assert results[2:] == [
        (2, ("truncated", "ends early: 2 values are there instead of 4"), []),
    ]
    kept = read(file, integers(10, truncated="replace"))
    assert kept[2][1] == bytes([1] * 2)
    assert kept[2][2][0].problem == "truncated"
    assert len(kept) == 3


def test_a_damaged_archive(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 10, (4, 1000), np.uint8)
    np.savez(tmp_path / "a.npz", x=values, y=values)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(values[0].tobytes()) + 5] ^= 1  # nothing but the checksum of all four items tells
    (tmp_path / "b.npz").write_bytes(data)
    for policy in ("strict", "skip", "replace"):
        results = read(only(tmp_path / "b.npz", arrays=True), integers(10, truncated=policy))
        assert results[0][1] == (
            "truncated",
            "its array x is corrupt, and there is no telling where (Bad CRC-32 for file 'x.npy')",
        )
        assert [result for _, result, _ in results[1:]] == [row.tobytes() for row in values]
    (tmp_path / "c.npz").write_bytes(data[:-30])
    assert problems(only(tmp_path / "c.npz", arrays=True), integers(10))[0][:2] == (-1, "truncated")


def test_an_array_larger_than_memory_is_streamed(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = (1 << 33,)
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": shape})
    with (tmp_path / "a.npy").open("wb") as file:
        file.write(header.getvalue())
        file.truncate(len(header.getvalue()) + 8 * math.prod(shape))  # 64 GB that take no room
    parts = read_parts(only(tmp_path / "a.npy", arrays=True), Span(0, 0, 0), integers(10))
    assert next(next(parts).blocks) == bytes(BLOCK_BYTES)


def test_a_part_that_was_left_early_does_not_disturb_the_next(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        np.save(file, np.arange(3 * 5_000_000).reshape(3, -1) % 251)
    parts = read_parts(only(tmp_path / "a.npz", arrays=True), Span(0, 0, 0), integers(256))
    starts = [next(part.blocks)[0] for part in parts]
    assert starts == [0, 5_000_000 % 251, 10_000_000 % 251]


@pytest.mark.parametrize(("vocab_size", "value_bytes"), [(256, 1), (257, 2), (65_537, 4)])
def test_bits_per_byte_of_images_are_bits_per_value(tmp_path: Path, vocab_size: int, value_bytes: int) -> None:
    """As docs/data.md says: with BOS and without EOS all values are predicted, and nothing else."""
    np.save(tmp_path / "images.npy", np.arange(4 * 48).reshape(4, 4, 4, 3))
    image_rows = BuildSettings((str(tmp_path),), "integers", tmp_path / "store", vocab_size, seq_len=60, eos=False)
    rows = RowDataset(build(replace(image_rows, packing="book")).store)
    assert len(rows) == 4
    for row in rows:
        labels = row.labels[row.labels != IGNORED_LABEL]
        assert len(labels) == 48
        assert rows.store.token_bytes[labels.numpy()].sum() == value_bytes * 48
