"""`verify` on sound stores of every kind, on what a wrong build would make, and against the input files."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_stores import write_store

from data_pipeline.errors import DataError
from data_pipeline.files import InputFile
from data_pipeline.layout import list_files, record_file, write_manifest, write_sidecars
from data_pipeline.manifest import MANIFEST_NAME, Manifest, SplitRecord
from data_pipeline.packing import Segments
from data_pipeline.store import Store, list_part, part_path
from data_pipeline.tokenizer import IntegerTokenizer, load_tokenizer
from data_pipeline.verify import verify

DOCUMENTS = {
    "long.txt": b"0123456789" * 12,
    "bytes.bin": bytes(range(256)),
    "list.jsonl/0": b"one",
    "list.jsonl/1": b"",
    "list.jsonl/2": b"\n\n",
    "a_row.txt": b"just a row: 14",
}

KINDS = {
    "bestfit": {},
    "stream": {"packing": "stream"},
    "stream without marks": {"packing": "stream", "bos": False, "eos": False},
    "book": {"packing": "book"},
    "book, half a window on": {"packing": "book", "stride": 8, "eos": False},
    "book, one token on": {"packing": "book", "stride": 1, "bos": False},
    "book, stride that does not divide": {"packing": "book", "stride": 7},
    "bestfit without marks": {"bos": False, "eos": False},
    "one token a row": {"seq_len": 2, "stride": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_store(tmp_path: Path, kind: str) -> None:
    write_store(tmp_path / "s", DOCUMENTS, val=["list.jsonl/0", "bytes.bin"], **KINDS[kind])
    assert verify(tmp_path / "s") == []
    assert verify(tmp_path / "s", quick=True) == []


def test_a_sound_store_of_text_and_of_integers(tmp_path: Path, tokenizer_file: Path) -> None:
    texts = {name: content for name, content in DOCUMENTS.items() if name != "bytes.bin"}
    write_store(tmp_path / "text", texts, load_tokenizer(str(tokenizer_file)), packing="book", stride=5)
    values = np.random.default_rng(0).integers(0, 300, 50).astype("<u2")
    write_store(tmp_path / "integers", {"x.npy": values.tobytes()}, IntegerTokenizer(300))
    assert verify(tmp_path / "text") + verify(tmp_path / "integers") == []


def rewrite(path: Path, change: Callable[[Segments], Segments]) -> None:
    """Signs other segments, as a bug in the packing would have."""
    store = Store.open(path)
    segments = change(Segments(*(column.copy() for column in store.segments)))
    tables = store.documents, store.inputs, store.problems
    write_sidecars(path, segments, store.n_rows, store.tokenizer, *tables)
    sign(path, store.manifest)


def sign(path: Path, manifest: Manifest, **changes: object) -> None:
    files = {name: record_file(path / name) for name in list_files(path) if name != MANIFEST_NAME}
    write_manifest(path, manifest.model_copy(update={"files": files, **changes}))


def one_window_early(segments: Segments) -> Segments:
    segments.document_start[1] -= 1
    return segments


def a_shorter_window(segments: Segments) -> Segments:
    segments.length[0] -= 1
    return segments


def without_the_last(segments: Segments) -> Segments:
    return Segments(*(column[:-1] for column in segments))


def the_first_twice(segments: Segments) -> Segments:
    segments.document_start[1] = 0
    return segments


@pytest.mark.parametrize("packing", ["book", "bestfit"])
@pytest.mark.parametrize("change", [one_window_early, a_shorter_window, without_the_last, the_first_twice])
def test_documents_that_are_not_covered(tmp_path: Path, packing: str, change: Callable[[Segments], Segments]) -> None:
    stride = 6 if packing == "book" else 16
    write_store(tmp_path / "s", {"a.txt": DOCUMENTS["long.txt"]}, packing=packing, stride=stride)
    rewrite(tmp_path / "s", change)
    assert "document 'a.txt' is not covered exactly once" in verify(tmp_path / "s")


def test_windows_of_another_stride(tmp_path: Path) -> None:
    write_store(tmp_path / "s", {"a.txt": DOCUMENTS["long.txt"]}, packing="book", stride=6)
    sign(tmp_path / "s", Manifest.read(tmp_path / "s"), stride=7)
    assert verify(tmp_path / "s") == ["document 'a.txt' is not covered exactly once"]


def test_marks_that_the_settings_do_not_have(tmp_path: Path) -> None:
    write_store(tmp_path / "s", {"a.txt": b"short"})
    sign(tmp_path / "s", Manifest.read(tmp_path / "s"), bos=False)
    assert verify(tmp_path / "s") == [f"row 0 of {tmp_path}/s does not mark where documents begin and end"]


def test_rows_of_another_split(tmp_path: Path) -> None:
    write_store(tmp_path / "s", {"a.txt": b"train", "b.txt": b"valid"}, val=["b.txt"])
    manifest = Manifest.read(tmp_path / "s")
    train, val = manifest.splits["train"], manifest.splits["val"]
    swapped = {
        "train": train.model_copy(update={"rows": val.rows}),
        "val": val.model_copy(update={"rows": train.rows}),
    }
    sign(tmp_path / "s", manifest, splits=swapped)
    rows = [f"row {row} of {tmp_path}/s holds documents of another split" for row in (0, 1)]
    assert verify(tmp_path / "s") == rows


@pytest.mark.parametrize("field", ["n_bytes", "tokens", "placed_tokens", "mixed_rows"])
def test_figures_that_are_not_those_of_the_tables(tmp_path: Path, field: str) -> None:
    write_store(tmp_path / "s", DOCUMENTS)
    manifest = Manifest.read(tmp_path / "s")
    (split,) = manifest.splits.values()
    assert isinstance(split, SplitRecord)
    sign(tmp_path / "s", manifest, splits={"train": split.model_copy(update={field: getattr(split, field) + 1})})
    (problem,) = verify(tmp_path / "s")
    assert f"split train of {tmp_path}/s has {field}" in problem


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"name": "bytes.bin", "n_bytes": 256', '"name": "bytes.bin", "n_bytes": 255', "has n_bytes"),
        ('"id": 1', '"id": 2', "is not one that its manifest counts"),
        ('"split": "train"', '"split": "dev"', "is not one that its manifest counts"),
        ('{"id": 0', '{"id": 0, "id": 0', ""),
    ],
)
def test_a_document_table_that_does_not_fit(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_store(tmp_path / "s", DOCUMENTS)
    table = tmp_path / "s" / "documents.jsonl"
    table.write_text(table.read_text().replace(old, new, 1))
    sign(tmp_path / "s", Manifest.read(tmp_path / "s"))
    problems = verify(tmp_path / "s")
    assert any(message in problem for problem in problems) if message else problems == []


def test_a_document_table_of_another_length(tmp_path: Path) -> None:
    write_store(tmp_path / "s", DOCUMENTS)
    table = tmp_path / "s" / "documents.jsonl"
    lines = table.read_text().splitlines(keepends=True)
    for other, message in (
        (lines[:-1], f"{tmp_path}/s lists 5 documents, and its manifest counts 6"),
        ([*lines, lines[-1].replace('"id": 5', '"id": 6')], "document 'a_row.txt' of .* is not one that its manifest"),
    ):
        table.write_text("".join(other))
        sign(tmp_path / "s", Manifest.read(tmp_path / "s"))
        assert re.match(message, verify(tmp_path / "s")[0])


def test_problems_that_the_manifest_does_not_count(tmp_path: Path) -> None:
    write_store(tmp_path / "s", DOCUMENTS)
    sign(tmp_path / "s", Manifest.read(tmp_path / "s"), problems={"empty/kept": 1})
    assert verify(tmp_path / "s") == [f"{tmp_path}/s lists other problems than its manifest counts"]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The input files of the store in `tmp_path`/s."""
    files = {"a.txt": b"a document", "b.txt": b"another", "deep/c.txt": b"a third"}
    for name, content in files.items():
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_bytes(content)
    write_store(tmp_path / "s", files)
    return tmp_path / "corpus"


def test_sources_that_are_the_same(tmp_path: Path, sources: Path) -> None:
    assert verify(tmp_path / "s", sources=[str(sources)]) == []


@pytest.mark.parametrize("quick", [True, False])
def test_sources_that_are_on_one_side_only(tmp_path: Path, sources: Path, quick: bool) -> None:
    write_store(part_path(tmp_path / "s", "0001"), {"later.txt": b"appended"})
    list_part(tmp_path / "s", "0001")
    (sources / "deep" / "c.txt").unlink()
    (sources / "new.txt").write_text("not in the store")
    assert verify(tmp_path / "s", quick, sources=[str(sources)]) == [
        f"{sources}/new.txt is there and is not recorded",
        "input 'deep/c.txt' is recorded and is not there",
        "input 'later.txt' is recorded and is not there",
    ]


def test_a_source_that_has_changed(tmp_path: Path, sources: Path) -> None:
    (sources / "b.txt").write_bytes(b"anotheR")
    for quick in (True, False):
        (problem,) = verify(tmp_path / "s", quick, sources=[str(sources)])
        assert f"{sources}/b.txt is not what the store was made of under the name 'b.txt'" in problem


def test_a_source_that_is_compressed_now(tmp_path: Path, sources: Path) -> None:
    """Its name is the same, its bytes are not."""
    (sources / "b.txt").unlink()
    (sources / "b.txt.gz").write_bytes(gzip.compress(b"another"))
    (problem,) = verify(tmp_path / "s", sources=[str(sources)])
    assert "b.txt.gz is not what the store was made of" in problem


def test_a_document_that_is_not_what_its_file_holds(tmp_path: Path, sources: Path) -> None:
    """The store is sound in itself, and the file is the one that was read: read wrong, then."""
    records = tmp_path / "records"
    records.mkdir()
    (records / "r.jsonl").write_text('{"text": "right"}\n{"text": "also right"}\n')
    shutil.rmtree(tmp_path / "s")
    write_store(tmp_path / "s", {"r.jsonl/0": b"wrong", "r.jsonl/1": b"also right"})
    recorded = record_file(records / "r.jsonl")
    line = {"name": "r.jsonl", "n_bytes": recorded.n_bytes, "sha256": recorded.sha256}
    (tmp_path / "s" / "inputs.jsonl").write_text(json.dumps(line) + "\n")
    sign(tmp_path / "s", Manifest.read(tmp_path / "s"))
    assert verify(tmp_path / "s", quick=True, sources=[str(records)]) == []
    message = f"document 'r.jsonl/0' is not what {records}/r.jsonl holds"
    assert verify(tmp_path / "s", sources=[str(records)]) == [message]


def test_a_source_that_could_not_be_read_then(tmp_path: Path, sources: Path) -> None:
    table = tmp_path / "s" / "inputs.jsonl"
    table.write_text(table.read_text().replace(record_file(sources / "a.txt").sha256, "0" * 64))
    sign(tmp_path / "s", Manifest.read(tmp_path / "s"))
    assert verify(tmp_path / "s", sources=[str(sources)]) == []


def test_a_source_that_cannot_be_read(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: InputFile) -> str:
        raise DataError(f"cannot read {file.location}: Input/output error")

    monkeypatch.setattr("data_pipeline.verify.hash_file", fail)
    problems = verify(tmp_path / "s", sources=[str(sources)])
    assert [problem.split(":")[0] for problem in problems] == [
        f"cannot read {sources}/{name}" for name in ("a.txt", "b.txt", "deep/c.txt")
    ]


def test_sources_of_something_else(tmp_path: Path, sources: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "z.txt").write_text("z")
    with pytest.raises(DataError, match=r"made of none of the files in .*other: give --source what --input was given"):
        verify(tmp_path / "s", sources=[str(other)])


def test_damaged_inputs_do_not_hide_other_problems(tmp_path: Path, sources: Path) -> None:
    (tmp_path / "s" / "inputs.jsonl").write_bytes(bytes((tmp_path / "s" / "inputs.jsonl").stat().st_size))
    (tmp_path / "s" / "tokens/c/0/0").unlink()
    problems = "\n".join(verify(tmp_path / "s", sources=[str(sources)]))
    assert "inputs.jsonl is damaged" in problems
    assert "tokens/c/0/0 is missing" in problems


MANY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from small_stores import write_store
from data_pipeline.verify import verify
path = Path(sys.argv[1])
verify(path / "little")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert verify(path / "large") == []
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """40 MB of tokens in one document and in rows of a million."""
    text = np.random.default_rng(0).integers(0, 256, 20 << 20, np.uint8).tobytes()
    settings = {"seq_len": 1 << 20, "stride": 1 << 20, "rows_per_shard": 4}
    write_store(tmp_path / "little", {"a": b"little"}, **settings)
    write_store(tmp_path / "large", {"a": text}, **settings)
    command = [sys.executable, "-c", MANY, str(tmp_path), str(Path(__file__).parent.parent)]
    grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(grown) * (1024 if sys.platform == "linux" else 1) < 32 << 20
