"""The command line: what it prints, how it exits, and one clear error for each kind of bad input."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from on_disk import flip
from read_documents import write

from data_pipeline.cli import main
from data_pipeline.layout import record_file, write_manifest
from data_pipeline.store import Store

Run = Callable[..., "Result"]


class Result:
    """Exit code and output of a command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run_main(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return run_main


def fails(result: Result, *words: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr with all of `words`."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err


def test_the_whole_path(run: Run, corpus: Path, tmp_path: Path, odd_documents: dict[str, bytes]) -> None:
    model, store, decoded = tmp_path / "a.model", tmp_path / "a.zarr", tmp_path / "decoded"
    tokenizer = ("tokenizer", "--input", corpus, "--output", model, "--vocab-size", 530)
    assert run(*tokenizer).out == f"{model}: unigram, 530 pieces\n"
    assert "is already there" in run(*tokenizer).out
    build = ("build", "--input", corpus, "--tokenizer", model, "--output", store, "--seq-len", 512, "--workers", 2)
    built = run(*build, "--split", "val=0.0001")
    assert built.code == 0
    assert "note: val=0.0001 caught none of 15 documents" in built.out
    for word in ("bytes per token", "byte fallback", "padding", "stored bytes per token", "train", "val"):
        assert word in built.out
    assert "is already built" in run(*build, "--split", "val=0.0001").out
    assert run("verify", store).out == f"{store}: sound\n"
    assert run("verify", store, "--quick").code == 0
    inspected = run("inspect", store).out
    assert "documents by length in tokens:" in inspected
    assert "one_line.txt" in inspected
    assert run("decode", store, "--all", "--output", decoded).out == f"{decoded}: 15 documents\n"
    for name, content in odd_documents.items():
        assert (decoded / name).read_bytes() == content


def test_decode_writes_bytes_to_stdout(
    make_store: Callable[..., Store], odd_documents: dict[str, bytes], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    store = make_store()
    for name in ("crlf.txt", "nul.txt", "controls.txt"):
        assert main(["decode", str(store.path), "--document", name]) == 0
        assert capfdbinary.readouterr().out == odd_documents[name]
    assert main(["decode", str(store.path), "--split", "val"]) == 0
    assert {json.loads(line)["name"] for line in capfdbinary.readouterr().out.splitlines()} == {"plain.txt"}
    assert main(["decode", str(store.path), "--row", "0"]) == 0
    assert capfdbinary.readouterr().out in b"".join(odd_documents.values())


def test_it_runs_as_a_module_without_torch(corpus: Path, tmp_path: Path) -> None:
    """In a process of its own, where importing PyTorch fails."""
    write(tmp_path / "torch.py", b"raise ImportError('the pipeline must not need it')")
    arguments = ["build", "--input", corpus, "--tokenizer", "bytes", "--output", tmp_path / "a.zarr", "--workers", "2"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "data_pipeline", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    error = subprocess.run(
        [sys.executable, "-m", "data_pipeline", "inspect", "/nowhere"], capture_output=True, text=True
    )
    assert (error.returncode, error.stderr.count("\n")) == (2, 1)


def test_a_closed_pipe_is_no_error(make_store: Callable[..., Store]) -> None:
    store = make_store()
    command = f"{sys.executable} -m data_pipeline decode {store.path} --document one_line.txt | head -c 10"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "The quick ", "")


BAD_TEXT = {
    "missing": (None, ("does not exist", "expected a file, a folder")),
    "no text files": ({"a.md": b"x"}, ("no .txt, .jsonl, .parquet or FASTA files in", "named directly")),
    "all empty": ({"a.txt": b"", "b.txt": b""}, ("every file of --input is empty",)),
    "not UTF-8": ({"a.txt": b"fine", "b.txt": b"caf\xe9 "}, ("b.txt is not valid utf-8 at byte 3", "encoding=replace")),
    "cut off": ({"a.txt": "\u20ac".encode()[:2]}, ("a.txt is not valid utf-8 at byte 0",)),
}


@pytest.mark.parametrize("command", ["tokenizer", "build"])
@pytest.mark.parametrize("kind", BAD_TEXT)
def test_bad_text(run: Run, tmp_path: Path, tokenizer_file: Path, command: str, kind: str) -> None:
    files, words = BAD_TEXT[kind]
    for name, content in (files or {}).items():
        write(tmp_path / "corpus" / name, content)
    output = tmp_path / "output"
    options = ("--tokenizer", tokenizer_file, "--workers", 1) if command == "build" else ("--vocab-size", 300)
    fails(run(command, "--input", tmp_path / "corpus", "--output", output, *options), *words)
    assert [path.name for path in tmp_path.iterdir()] == (["corpus"] if files else [])


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_file(run: Run, tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "corpus" / "a.txt")
    (tmp_path / "corpus" / "b.txt").symlink_to(tmp_path / "gone")
    arguments = ("--input", path.parent, "--tokenizer", "bytes", "--output", tmp_path / "out", "--workers", workers)
    fails(run("build", *arguments), "cannot read", "b.txt", "No such file")
    (tmp_path / "corpus" / "b.txt").unlink()
    os.mkfifo(tmp_path / "corpus" / "b.txt")
    fails(run("build", *arguments), "b.txt is not a regular file")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus" / "a.txt")
    path.chmod(0)
    arguments = ("--input", path.parent, "--tokenizer", "bytes", "--output", tmp_path / "out")
    fails(process("build", *arguments), "a.txt", "cannot be read: Permission denied")


BAD_SETTINGS = [
    (("--seq-len", 1), ("--seq-len is 1", "expected 2 to")),
    (("--rows-per-shard", 0), ("--rows-per-shard is 0", "at least 1")),
    (("--workers", 0), ("--workers is 0",)),
    (("--split", "val"), ("--split holds 'val'", "NAME=FRACTION")),
    (("--split", "val=x"), ("--split holds 'val=x'",)),
    (("--split", "val=1.5"), ("the fraction 1.5", "expected above 0 and below 1")),
    (("--split", "val=nan"), ("the fraction nan",)),
    (("--split", "val=0"), ("the fraction 0",)),
    (("--split", "val=0.6,test=0.6"), ("holds out 1.2",)),
    (("--split", "val=0.1,val=0.1"), ("names val twice",)),
    (("--split", "val=0.1", "--split", "val=0.2"), ("--split names val twice",)),
    (("--split", "train=0.5"), ("names train",)),
    (("--split", "Val!=0.1"), ("'Val!'", "lower-case word")),
    (("--split", "val=0.5"), ("needs more different documents than the 1",)),
    (("--split", "val=0.999"), ("needs more different documents than the 1", "drop --split")),
    (("--split", "val=0.5", "--val-input", "x"), ("val is given twice",)),
    (("--val-input", "/nowhere"), ("input /nowhere does not exist",)),
    (("--tokenizer", "/nowhere.model"), ("cannot read tokenizer /nowhere.model",)),
    (("--vocab-size", 5), ("is for --tokenizer integers", "leave it out")),
    (("--stride", 5), ("--stride is for --packing book",)),
    (("--packing", "book", "--stride", 0), ("--stride is 0", "expected 1 to")),
    (("--encoding", "klingon"), ("--encoding is 'klingon'", "such as latin-1")),
    (("--encoding", "base64"), ("--encoding is 'base64'",)),
    (("--encoding", "undefined"), ("--encoding is 'undefined', which does not decode a file piece by piece",)),
    (("--encoding", "punycode"), ("--encoding is 'punycode', which does not", "such as latin-1")),
    (("--encoding", "idna"), ("--encoding is 'idna', which does not",)),
    (("--on-bad", "encoding"), ("--on-bad holds 'encoding'", "PROBLEM=POLICY")),
    (("--on-bad", "encoding=ignore"), ("encoding=ignore", "expected strict or replace or skip")),
    (("--on-bad", "empty=skip", "--on-bad", "empty=strict"), ("--on-bad names empty twice",)),
    (("--on-bad", "smell=skip"), ("--on-bad names 'smell'",)),
    (("--near-threshold", 0.4), ("--near-threshold is 0.4", "0.5 to 1")),
    (("--max-record-bytes", 0), ("--max-record-bytes is 0",)),
    (("--field", ""), ("--field is empty",)),
    (("--append",), ("--append:", "does not exist")),
]


@pytest.mark.parametrize(("options", "words"), BAD_SETTINGS, ids=lambda value: " ".join(map(str, value)))
def test_bad_settings(run: Run, tmp_path: Path, options: tuple, words: tuple[str, ...]) -> None:
    path = write(tmp_path / "corpus" / "a.txt")
    common = ("--input", path, "--tokenizer", "bytes", "--output", tmp_path / "out", "--workers", 1)
    fails(run("build", *common, *options), *words)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_none(run: Run, corpus: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.model")
    result = run("build", "--input", corpus, "--tokenizer", bad, "--output", tmp_path / "out")
    fails(result, "bad.model is not a SentencePiece model. Expected", "tokenizer makes one", '"bytes" or "integers"')


@pytest.mark.parametrize(
    "command",
    [
        "build --input a.txt --tokenizer bytes --output URL",
        "build --input a.txt --tokenizer bytes --output out --json URL",
        "build --input a.txt --tokenizer URL --output out",
        "tokenizer --input a.txt --output URL",
        "inspect URL",
        "inspect out --json URL",
        "verify URL",
        "decode URL --row 0",
        "decode out --all --output URL",
    ],
)
def test_urls_of_what_is_local(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt")
    result = run(*command.replace("URL", "s3://bucket/x").split())
    fails(result, "s3://bucket/x is a URL", "of this machine", "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def process(*arguments: object) -> Result:
    """In a process of its own, which is ended if it hangs, and in which root may not do what the others may not."""
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    command = [*prefix, sys.executable, "-m", "data_pipeline", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Result(done.returncode, done.stdout, done.stderr)


def test_an_output_without_a_folder(run: Run, tmp_path: Path) -> None:
    corpus, link, file = write(tmp_path / "a.txt"), tmp_path / "link", write(tmp_path / "file")
    link.symlink_to(tmp_path / "gone")
    build = ("build", "--input", corpus, "--tokenizer", "bytes", "--workers", 1, "--output")
    for output, words in (
        (link / "store", f"{link} is not a folder: choose another"),
        (link / "deep" / "store", f"{link} is not a folder: choose another"),
        ("/proc/foo", "No such file or directory: choose another"),
    ):
        fails(process(*build, output), f"cannot write to --output {output}: {words}")
    fails(run(*build, file / "store"), f"cannot write to --output {file}/store: {file} is not a folder")
    fails(run("tokenizer", "--input", tmp_path / "no", corpus, "--output", link / "a.model"), "no does not exist")
    fails(run("tokenizer", "--input", corpus, "--output", link / "a.model"), f"{link} is not a folder")


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write everywhere")
def test_an_output_without_permission(make_store: Callable[..., Store], corpus: Path, tmp_path: Path) -> None:
    store, closed = make_store(split={}).path, tmp_path / "closed"
    closed.mkdir(mode=0o500)
    build = ("build", "--input", corpus, "--tokenizer", "bytes", "--workers", 1)
    for command in (
        (*build, "--output", closed / "out"),
        (*build, "--output", tmp_path / "out", "--json", closed / "out"),
        ("decode", store, "--all", "--output", closed / "out"),
        ("inspect", store, "--json", closed / "out"),
    ):
        fails(process(*command), f"{closed / 'out'}: Permission denied: choose another folder")
    bad = write(tmp_path / "bad.txt", b"caf\xe9 ")  # what is wrong with it would be met first
    result = process("tokenizer", "--input", bad, "--output", closed / "out")
    fails(result, f"cannot write to --output {closed / 'out'}: Permission denied: choose another folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write everywhere")
def test_a_store_without_permission_is_not_appended_to(
    make_store: Callable[..., Store], tokenizer_file: Path, corpus: Path, tmp_path: Path
) -> None:
    store, bad = make_store(split={}).path, write(tmp_path / "bad.txt", b"caf\xe9 ")
    build = ("build", "--input", corpus, "--tokenizer", tokenizer_file, "--output", store, "--append", "--workers", 1)
    settings = ("--seq-len", 256, "--rows-per-shard", 8)
    store.chmod(0o500)
    assert "is already built" in process(*build, *settings).out
    result = process(*build[:3], bad, *build[3:], *settings)
    fails(result, f"cannot write to --output {store}: Permission denied: choose another folder")


def test_what_a_folder_holds_besides_is_noted_once(corpus: Path, tmp_path: Path) -> None:
    note = f"note: left out 1 file of other kinds in {corpus}: 1 .md\n"
    build = ("build", "--input", corpus, "--tokenizer", "bytes", "--output", tmp_path / "store", "--workers", 3)
    built = process(*build)
    assert (built.err.count("left out"), built.out.count("left out")) == (1, 0)
    assert built.err.startswith(note)
    again = process(*build)
    assert (again.err.count("left out"), again.out.count("left out")) == (0, 1)
    assert again.out.endswith(note)
    trained = process("tokenizer", "--input", corpus, "--output", tmp_path / "a.model", "--vocab-size", 530)
    assert (trained.err.count(note), trained.err.count("left out")) == (1, 1)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_output_that_is_something_else(run: Run, corpus: Path, tmp_path: Path, kind: str) -> None:
    output = write(tmp_path / "out") if kind == "file" else write(tmp_path / "out" / "file").parent
    result = run("build", "--input", corpus, "--tokenizer", "bytes", "--output", output)
    fails(result, "exists and is not a store", "choose another --output")
    assert output.exists()


def test_an_empty_folder_may_become_a_store(run: Run, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run("build", "--input", corpus, "--tokenizer", "bytes", "--output", tmp_path / "out").code == 0


def test_a_summary_that_cannot_be_written_is_refused_at_once(run: Run, corpus: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "summary.json"):
        options = ("--input", corpus, "--tokenizer", "bytes", "--output", tmp_path / "o", "--json", path)
        fails(run("build", *options), f"--json {path} cannot be written", "a file in a folder that exists")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", ["build", "inspect"])
def test_a_reader_who_leaves_takes_no_summary_with_him(run: Run, corpus: Path, tmp_path: Path, command: str) -> None:
    build = ("build", "--input", corpus, "--tokenizer", "bytes", "--output", tmp_path / "store")
    if command == "inspect":
        assert run(*build).code == 0
    words = build if command == "build" else ("inspect", tmp_path / "store")
    arguments = [sys.executable, "-u", "-m", "data_pipeline", *map(str, words), "--json", str(tmp_path / "summary")]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, check=True)
    os.close(writer)
    assert b"Traceback" not in done.stderr and (tmp_path / "summary").read_text().startswith("{")


def test_a_shard_is_no_larger_than_the_store(run: Run, corpus: Path, tmp_path: Path) -> None:
    options = ["--seq-len", 1000, "--tokenizer", "bytes", "--rows-per-shard", 10**12, "--output", tmp_path / "s"]
    assert run("build", "--input", corpus, *options).code == 0
    assert run("verify", tmp_path / "s").out.endswith("sound\n")
    assert len(list((tmp_path / "s" / "tokens" / "c").iterdir())) == 1


def test_other_settings_are_refused_by_name(run: Run, make_store: Callable[..., Store], corpus: Path) -> None:
    store = make_store()
    result = run("build", "--input", corpus, "--tokenizer", "bytes", "--output", store.path)
    fails(result, "seq_len: 256 -> 65536", "split: val=0.2 -> none", "another --output")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--vocab-size", 100_000), ("100000 pieces", "value <=", "Lower --vocab-size to at most", "give more text")),
        (("--vocab-size", 10), ("10 pieces", "smaller than required", "262. Raise --vocab-size to at least 262\n")),
        (("--vocab-size", 0), ("--vocab-size is 0",)),
        (("--max-bytes", 0), ("--max-bytes is 0",)),
    ],
)
def test_tokenizers_that_cannot_be(run: Run, corpus: Path, tmp_path: Path, options: tuple, words: tuple) -> None:
    fails(run("tokenizer", "--input", corpus, "--output", tmp_path / "a.model", *options), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_of_line_ends_trains_no_tokenizer(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "corpus" / "a.txt", b"\n\n\n\n")
    fails(run("tokenizer", "--input", tmp_path / "corpus", "--output", tmp_path / "a.model"), "give more text")


@pytest.mark.parametrize("command", ["verify", "inspect", "decode"])
def test_no_store(run: Run, tmp_path: Path, command: str) -> None:
    options = ("--row", 0) if command == "decode" else ()
    fails(run(command, tmp_path / "nothing", *options), "nothing does not exist", "data_pipeline build")


def test_damage(run: Run, make_store: Callable[..., Store], tmp_path: Path) -> None:
    store = make_store()
    shard = store.path / "tokens/c/0/0"
    flip(shard, 20)
    result = run("verify", store.path)
    assert result.code == 1
    assert f"problem: {shard} is damaged" in result.out
    fails(run("decode", store.path, "--row", 0), "row 0", str(shard), "build the store again")
    fails(run("decode", store.path, "--all", "--output", tmp_path / "decoded"), str(shard))
    assert not (tmp_path / "decoded").exists()
    shard.unlink()
    fails(run("inspect", store.path), f"{shard} is missing")


def test_bad_decodes(run: Run, make_store: Callable[..., Store], tmp_path: Path) -> None:
    store = make_store()
    full = write(tmp_path / "full" / "file").parent
    fails(run("decode", store.path, "--document", "nope.txt"), "has no document 'nope.txt'")
    fails(run("decode", store.path, "--row", 10_000), "has no row 10000: expected 0 to")
    fails(run("decode", store.path, "--row", -1), "has no row -1")
    fails(run("decode", store.path, "--all"), "--all and --output DIR go together")
    fails(run("decode", store.path, "--row", 0, "--output", full), "--all and --output DIR go together")
    fails(run("decode", store.path, "--all", "--output", full), "is not an empty directory")


@pytest.mark.parametrize("name", ["../a.txt", "/a.txt", "b/../../a.txt", ""])
def test_names_that_lead_out_are_refused(run: Run, make_store: Callable[..., Store], tmp_path: Path, name: str) -> None:
    store = make_store()
    table = store.path / "documents.jsonl"
    old = store.documents[0].name
    table.write_text(table.read_text().replace(f'"name": "{old}"', f'"name": "{name}"'))
    resign(store)
    fails(run("decode", store.path, "--all", "--output", tmp_path / "decoded"), "outside the output directory")
    assert not (tmp_path / "decoded").exists()


def resign(store: Store) -> None:
    """Makes a changed document table look like the one that was built."""
    record = {"documents.jsonl": record_file(store.path / "documents.jsonl")}
    write_manifest(store.path, store.manifest.model_copy(update={"files": store.manifest.files | record}))
