"""Finding documents, checking them, and cutting them where their bytes say."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.sources import find_documents, hash_document, plan_tasks, read_blocks


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_names_are_paths_below_the_folder(corpus: Path, odd_documents: dict[str, bytes]) -> None:
    documents = find_documents([corpus])
    assert [document.name for document in documents] == sorted(odd_documents)
    assert [document.n_bytes for document in documents] == [len(odd_documents[name]) for name in sorted(odd_documents)]


def test_a_file_counts_whatever_its_suffix(tmp_path: Path) -> None:
    path = write(tmp_path, "enwik8", b"text")
    assert [document.name for document in find_documents([path])] == ["enwik8"]


def test_a_link_to_a_folder_is_not_left_out_in_silence(tmp_path: Path) -> None:
    write(tmp_path, "corpus/a.txt", b"a")
    write(tmp_path, "elsewhere/b.txt", b"b")
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="corpus/link is a link to a folder: name that folder as an input of its own"):
        find_documents([tmp_path / "corpus"])


def test_twice_the_same_name_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "one/a.txt", b"a")
    write(tmp_path, "two/a.txt", b"b")
    with pytest.raises(DataError, match=r"two documents are named 'a.txt'"):
        find_documents([tmp_path / "one", tmp_path / "two"])


@pytest.mark.parametrize("before", [0, 5, 2**20 - 1, 2**20, 2**20 + 3])
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xe2\x82"])
def test_invalid_utf8_is_located(tmp_path: Path, before: int, bad: bytes) -> None:
    write(tmp_path, "a.txt", b"x" * before + bad)
    document = find_documents([tmp_path])[0]
    with pytest.raises(DataError, match=rf"a\.txt is not valid UTF-8 at byte {before} "):
        hash_document(document, utf8=True)
    hash_document(document, utf8=False)


def test_a_character_across_two_reads_is_fine(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", b"x" * (2**20 - 2) + "\U0001f642".encode())
    hash_document(find_documents([tmp_path])[0], utf8=True)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"before")
    document = find_documents([tmp_path])[0]
    path.write_bytes(b"after it")
    with pytest.raises(DataError, match="changed while it was being read"):
        list(read_blocks(document, 0, document.n_bytes, 4))


@given(
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=20),
    block_bytes=st.integers(1, 30),
    task_bytes=st.integers(1, 120),
)
def test_tasks_cover_every_document(sizes: list[int], block_bytes: int, task_bytes: int) -> None:
    tasks = plan_tasks(sizes, block_bytes, task_bytes)
    spans = [span for task in tasks for span in task]
    for document, size in enumerate(sizes):
        mine = [span for span in spans if span.document == document]
        assert mine[0].start == 0
        assert mine[-1].stop == size
        assert all(one.stop == other.start for one, other in pairwise(mine))
        assert all(span.start % block_bytes == 0 for span in mine)
    assert [span.document for span in spans] == sorted(span.document for span in spans)
    assert all(sum(span.stop - span.start for span in task) <= max(task_bytes, block_bytes) for task in tasks)


def test_many_empty_documents_are_many_tasks() -> None:
    assert len(plan_tasks([0] * 1000, 10, 100)) == 11


@given(text=st.text(alphabet=st.sampled_from("ab\n가\U0001f642"), max_size=120), block_bytes=st.integers(1, 40))
def test_blocks_are_the_document_and_hold_whole_characters(
    text: str, block_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("blocks"), "a.txt", text.encode() + b"!")
    document = find_documents([path])[0]
    blocks = list(read_blocks(document, 0, document.n_bytes, block_bytes))
    assert "".join(block.decode() for block in blocks) == text + "!"
    for span in (span for task in plan_tasks([document.n_bytes], block_bytes, 1) for span in task):
        number = span.start // block_bytes
        assert list(read_blocks(document, span.start, span.stop, block_bytes)) == [blocks[number]]
