"""Finding the files of a corpus, in any place."""

import gzip
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations
from read_documents import only, write

from data_pipeline.errors import DataError
from data_pipeline.files import find_files, read_content
from data_pipeline.manifest import MANIFEST_NAME


def names(*inputs: object, arrays: bool = False) -> list[str]:
    return [file.name for file in find_files([str(source) for source in inputs], {}, arrays)]


def test_names_are_paths_below_the_folder(corpus: Path, odd_documents: dict[str, bytes]) -> None:
    files = find_files([str(corpus)], {}, False)
    assert [file.name for file in files] == sorted(odd_documents)
    assert [file.n_bytes for file in files] == [len(odd_documents[name]) for name in sorted(odd_documents)]


def test_a_home_that_no_shell_has_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in --input=~/corpus, and in lists."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "corpus" / "a.txt", b"text")
    write(tmp_path / "list", b"~/corpus/a.txt\n")
    assert names("~/corpus") == names("~/corpus/*.txt") == names("~/corpus/a.txt") == ["a.txt"]
    assert names("@~/list") == ["~/corpus/a.txt"]


def test_every_kind_of_file_in_a_folder(tmp_path: Path) -> None:
    text = ["a.txt", "b.txt.gz", "c.jsonl", "d/e.jsonl.zst", "f.parquet", "g.txt.xz"]
    for name in [*text, "h.npy", "i.npz", "readme.md", "j.gz", ".k.txt", ".l/m.txt"]:
        write(tmp_path / name, b"content")
    assert names(tmp_path) == ["a.txt", "b.txt", "c.jsonl", "d/e.jsonl", "f.parquet", "g.txt"]
    assert names(tmp_path, arrays=True) == ["h.npy", "i.npz"]
    kinds = {file.name: (file.kind, file.compression) for file in find_files([str(tmp_path)], {}, False)}
    assert kinds["a.txt"] == ("text", "")
    assert kinds["b.txt"] == ("text", ".gz")
    assert kinds["d/e.jsonl"] == ("jsonl", ".zst")
    assert kinds["f.parquet"] == ("parquet", "")


def test_suffixes_count_in_upper_case_too(tmp_path: Path) -> None:
    for name in ("A.TXT", "B.Txt.GZ", "C.JSONL.zst", "D.PARQUET", "e.NPY", "F.NPZ", "G.PDF"):
        write(tmp_path / name, b"content")
    assert names(tmp_path) == ["A.TXT", "B.Txt", "C.JSONL", "D.PARQUET"]
    assert names(tmp_path, arrays=True) == ["F.NPZ", "e.NPY"]
    found = [(file.kind, file.compression) for file in find_files([str(tmp_path)], {}, False)]
    assert found == [("text", ""), ("text", ".gz"), ("jsonl", ".zst"), ("parquet", "")]
    assert b"".join(read_content(only(write(tmp_path / "H.GZ", gzip.compress(b"text"))))) == b"text"


def test_what_is_left_out_of_folders_is_noted(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    def notes(*inputs: object, arrays: bool = False) -> list[str]:
        noted: list[str] = []
        find_files([str(source) for source in inputs], {}, arrays, noted)
        return noted

    one, other = tmp_path / "one", tmp_path / "other"
    write(one / "a.txt", b"text")
    assert notes(one) == []
    write(one / ".hidden", b"no input, and nobody takes it for one")
    assert notes(one) == []
    for name in ("b.pdf", "deep/c.PDF", "d.tar.gz", "README"):
        write(one / name, b"x")
    assert notes(one) == [f"left out 4 files of other kinds in {one}: 2 .pdf, 1 .tar.gz, 1 without suffix"]
    assert notes(one / "a.txt", f"{one}/READM*") == [], "files that were asked for one by one"
    for name in ("a.npy", "b.a", "c.b", "d.c"):
        write(other / name, b"x")
    assert notes(other, arrays=True) == [f"left out 3 files of other kinds in {other}: 1 .a, 1 .b, 1 .c"]
    write(other / "e.txt", b"x")
    assert notes(one, other) == [
        f"left out 8 files of other kinds in {one} and 1 more: 2 .pdf, 1 .a, 1 .b, 1 .c, 1 .npy, 2 more"
    ]
    memory.pipe({"/books/a.txt": b"text", "/books/.git/b.md": b"x", "/books/c.md": b"x"})
    assert notes("memory://books") == ["left out 1 file of other kinds in memory://books: 1 .md"]


def test_formats_that_are_read_as_they_are_are_noted(tmp_path: Path) -> None:
    for name in (
        "a.txt",
        "records.JSON",
        "b.tar.gz",
        "enwik8",
        "code.py",
        "c.fa",
        "c.fa.fai",
        "d.fa.fai",
        "d.fa.gz.gzi",
    ):
        write(tmp_path / name, b"x")
    noted: list[str] = []
    find_files([f"{tmp_path}/*"], {}, False, noted)
    told = (
        "is one document, read as it is, .tar and all (likewise 2 .fai, 1 .gzi, 1 .json): records are read out of "
        ".jsonl, .parquet and FASTA"
    )
    assert noted == [f"{tmp_path / 'b.tar.gz'} {told}"]
    noted.clear()
    find_files([f"{tmp_path}/*.JSON"], {}, False, noted)
    told = "is one document, read as it is, .json and all: records are read out of .jsonl, .parquet and FASTA"
    assert noted == [f"{tmp_path / 'records.JSON'} {told}"]


def test_a_file_that_is_named_counts_whatever_its_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "enwik8", b"text")
    assert names(path) == ["enwik8"]
    assert only(path).kind == "text"


def test_a_relative_path_may_be_read_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "books/a.txt", b"a")
    monkeypatch.chdir(tmp_path)
    files = [only(source) for source in ("books", "books/a.txt", "books/*.txt", "./books//*")]
    assert {file.name for file in files} == {"a.txt"}
    monkeypatch.chdir("/")
    assert [b"".join(read_content(file)) for file in files] == [b"a"] * 4


def test_names_of_a_glob_are_below_what_is_fixed_in_it(tmp_path: Path) -> None:
    for name in ("books/en/a.txt", "books/ko/deep/b.txt", "books/ko/c.md"):
        write(tmp_path / name, b"text")
    assert names(tmp_path / "books" / "**" / "*.txt") == ["en/a.txt", "ko/deep/b.txt"]
    assert names(tmp_path / "books" / "k*" / "*") == ["ko/c.md"]
    with pytest.raises(DataError, match=r"no file matches .*\*\.csv"):
        names(tmp_path / "*.csv")


def test_a_glob_whose_first_part_is_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in/a.txt", b"a")
    first, *others = tmp_path.parts[1:]
    assert names("/".join(["", f"{first[:-1]}?", *others, "in/*.txt"])) == ["/".join([first, *others, "in/a.txt"])]
    monkeypatch.chdir(tmp_path)
    assert names("*/*.txt") == names("i*/a.txt") == ["in/a.txt"]


def test_a_file_with_a_star_in_its_name_is_itself(tmp_path: Path) -> None:
    write(tmp_path / "a[1].txt", b"text")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_a_list_names_its_files_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one/text.txt", "two/text.txt", "three/x/y.txt", "four/a1.txt", "four/b.txt"):
        write(tmp_path / name, b"text")
    write(tmp_path / "list", b"one/text.txt\n\n./two/text.txt\r\nthree\nfour/a*.txt\n")
    assert names("@list") == ["four/a1.txt", "one/text.txt", "three/x/y.txt", "two/text.txt"]
    write(tmp_path / "list", "\ufeffone/text.txt\r\n".encode())  # as Windows writes it
    assert names("@list") == ["one/text.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n", "list is empty"),
        (b"missing.txt\n", "missing.txt does not exist.*of the list .*list, whose paths are relative to the"),
        (b"@list\n", "names the list @list"),
    ],
)
def test_lists_that_make_no_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "list", content)
    with pytest.raises(DataError, match=message):
        names("@list")
    with pytest.raises(DataError, match="cannot read the list of inputs nowhere"):
        names("@nowhere")


def test_a_store_in_the_folder_is_no_input(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"a")
    for name in ("zarr.json", "manifest.json", "documents.jsonl", "parts/0001/documents.jsonl"):
        write(tmp_path / "store" / name, b"{}\n")
    write(tmp_path / "b/manifest.json", b"")
    write(tmp_path / "b/b.txt", b"b")
    assert names(tmp_path) == ["a.txt", "b/b.txt"]


def test_documents_of_one_name_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one" / "corpus.jsonl.gz", b"")
    write(tmp_path / "two" / "corpus.jsonl/deep/0", b"x")
    with pytest.raises(DataError, match=r"deep/0 is in a folder with the name of another input, 'corpus.jsonl'"):
        names(one, f"{tmp_path}/two/**")
    assert names(f"{tmp_path}/two/**") == ["corpus.jsonl/deep/0"]


def test_a_link_to_a_folder_is_not_left_out_in_silence(tmp_path: Path) -> None:
    write(tmp_path / "corpus/a.txt", b"a")
    write(tmp_path / "elsewhere/b.txt", b"b")
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    for corpus in (tmp_path / "corpus", f"file://{tmp_path / 'corpus'}"):
        with pytest.raises(DataError, match="corpus/link is a link to a folder: name that folder as an input of its"):
            names(corpus)


def test_stores_are_no_input_however_they_are_found(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    """Their tables are JSON lines. A folder that has only one of the two files is none."""
    tables = [
        f"{store}/{name}"
        for store in ("store", "deep/store")
        for name in ("documents.jsonl", "zarr.json", MANIFEST_NAME)
    ]
    others = ["a.jsonl", "deep/b.jsonl", "other/c.jsonl", "other/zarr.json"]
    for name in [*tables, *others]:
        write(tmp_path / name, b"text")
        memory.pipe(f"/corpus/{name}", b"text")
    expected = ["a.jsonl", "deep/b.jsonl", "other/c.jsonl"]
    for corpus in (str(tmp_path), f"file://{tmp_path}", "memory://corpus"):
        assert names(corpus) == names(f"{corpus}/**/*.jsonl") == expected
    for place in (f"{tmp_path}/store", "memory://corpus/store"):
        with pytest.raises(DataError, match=r"no file matches|no \.txt, "):
            names(f"{place}/*.jsonl")
        assert names(f"{place}/documents.jsonl") == ["documents.jsonl"], "who names it wants it"


@pytest.mark.parametrize("other", ["two/a.txt", "two/a.txt.gz"])
def test_twice_the_same_name_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    write(tmp_path / "one/a.txt", b"a")
    write(tmp_path / other, b"b")
    with pytest.raises(
        DataError, match=r"two files are named 'a.txt'.*, or @LIST \(a text file with the folders in it"
    ):
        names(tmp_path / "one", tmp_path / "two")
    (tmp_path / "list").write_text("one\ntwo\n")
    monkeypatch.chdir(tmp_path)
    assert names("@list") == ["one/a.txt", "two/a.txt"]


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        names(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no \.txt, \.jsonl, \.parquet or FASTA files"):
        names(tmp_path)
    with pytest.raises(DataError, match=r"no \.npy or \.npz files"):
        names(tmp_path, arrays=True)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"cannot read .*dangling\.txt: No such file"):
        names(tmp_path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt is not a regular file"):
        names(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    write(tmp_path / os.fsdecode(b"\xff.txt"), b"text")
    with pytest.raises(DataError, match=r"'\\udcff\.txt' is not valid UTF-8"):
        names(tmp_path)


def test_text_and_arrays_are_not_mixed_up(tmp_path: Path) -> None:
    text, array = write(tmp_path / "a.txt", b"text"), tmp_path / "b.npy"
    np.save(array, np.arange(3))
    with pytest.raises(DataError, match=r"b\.npy is an array: use --tokenizer integers"):
        names(text, array)
    with pytest.raises(DataError, match=r"a\.txt is not an array"):
        names(text, array, arrays=True)


def test_held_out_inputs_are_marked_and_must_hold_something(tmp_path: Path) -> None:
    one, other, empty = (
        str(write(tmp_path / name, content)) for name, content in (("b.txt", b"b"), ("a.txt", b"a"), ("c.txt", b""))
    )
    assert [(file.name, file.split) for file in find_files([one], {"val": [other]}, False)] == [
        ("a.txt", "val"),
        ("b.txt", None),
    ]
    with pytest.raises(DataError, match="every file of --val-input is empty"):
        find_files([one], {"val": [empty]}, False)
    with pytest.raises(DataError, match="every file of --input is empty"):
        find_files([empty], {"val": [one]}, False)


def test_urls_of_files_folders_and_globs(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("/books/a.txt", "/books/deep/b.txt.gz", "/books/.hidden/c.txt", "/books/d.md"):
        memory.pipe(name, gzip.compress(b"text") if name.endswith(".gz") else b"text")
    assert names("memory://books") == names("memory://books/") == ["a.txt", "deep/b.txt"]
    assert names("memory://books/**/*.txt.gz") == ["deep/b.txt"]
    assert names("memory://books/d.md") == ["d.md"]
    assert names("memory://books/**/*.txt") == ["a.txt"], "what is hidden is not matched"
    assert names("memory://books/.hidden/*.txt") == ["c.txt"], "but where the glob asks for it"
    files = find_files(["memory://books"], {}, False)
    assert [b"".join(read_content(file)) for file in files] == [b"text", b"text"]
    assert files[1].n_bytes == len(gzip.compress(b"text"))
    assert names("memory://") == ["books/a.txt", "books/deep/b.txt"]
    assert names("memory://*/*.txt") == ["books/a.txt"]
    with pytest.raises(DataError, match=r"no \.txt, .* files in memory://nowhere"):
        names("memory://nowhere")


def test_a_list_of_urls(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    for name in ("/one/text.txt", "/two/text.txt"):
        memory.pipe(name, b"text")
    listing = write(tmp_path / "list", b"memory://one/text.txt\nmemory://two/text.txt\n")
    assert names(f"@{listing}") == ["one/text.txt", "two/text.txt"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://a/b.txt", "cannot open nothing://a/b.txt: Protocol not known"),
        ("zip://a.txt::memory://b.zip", "is a chain of URLs"),
    ],
)
def test_urls_that_cannot_be_opened(url: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        names(url)


def test_a_url_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"class": "no_such_package.FarFileSystem", "err": "Install no_such_package to access far"}
    monkeypatch.setitem(known_implementations, "far", missing)
    with pytest.raises(DataError, match="cannot open far://a: Install no_such_package"):
        names("far://a")


def test_a_url_with_a_query_is_refused() -> None:
    with pytest.raises(DataError, match="has a query, so that it does not say what kind of file it is"):
        names("https://example.org/a.jsonl.gz?version=1")


def test_what_is_named_itself_is_not_left_out(tmp_path: Path) -> None:
    write(tmp_path / "in/a.txt", b"a")
    pdf = write(tmp_path / "in/sub/b.PDF", b"b")
    write(tmp_path / "in/c.pdf", b"c")
    notes: list[str] = []
    find_files([str(tmp_path / "in"), str(pdf)], {}, arrays=False, notes=notes)
    assert notes[0] == f"left out 1 file of other kinds in {tmp_path / 'in'}: 1 .pdf"
    assert notes[1].startswith(f"{pdf} is one document, read as it is, .pdf and all: ") and len(notes) == 2
