"""`benchmark.py pipeline --parts tokenize`: builds against raw SentencePiece and datatrove, on the same text.

    raw-numpy    the bound: `encode` of pieces of 64K characters that are cut and in memory, ids as arrays
    raw-list     the same with ids as lists, SentencePiece's default
    ours         python -m data_pipeline build --workers N: reads, checks and hashes the files, tokenizes, packs rows,
                 compresses them with checksums, and writes a manifest
    ours-mpirun  the same build under mpirun -n N
    datatrove    JsonlReader -> DocumentTokenizer: one file of uint16 ids per process, an EOS after each document. It
                 has whole documents as JSON lines, and a `tokenizers` Unigram model with the same pieces and scores.
                 It does not cut documents, pack, compress, hash or check, nor shuffle here. The corpus is not repeated
                 for it: `tokenizers` spends ten times the processor time of SentencePiece, however the spaces and line
                 ends are described to it.

`stage_s` is the time of tokenizing alone: of the loop (raw; the slowest of N processes), of the build's tokenize stage
with the start of its processes, as its log tells it (to half a second), of datatrove's executor. `seconds` is the whole
command. Each process has one thread. Rounds go through all of them in turn.

Not here: Megatron-LM's preprocess_data is not in the package megatron-core, dolma does not install with this Python and
these versions, and litdata has no tokenizer of its own.
"""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from bench_pipeline.common import (
    WORKERS,
    Bench,
    FailedError,
    Result,
    repeated,
    run,
    size_of,
    stages,
    texts_of,
    worker,
)

RAW = {"raw-numpy": "numpy", "raw-list": "list"}
PEERS = (*RAW, "ours", "ours-mpirun", "datatrove")
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
JSONL_FILES = 8
"""datatrove shares out files."""
COMPARED_LINES = 20_000
_BYTE_OR_CONTROL = -1e4
"""A score that no text chooses: pieces such as <0x41> and </s> are spelled in text like any other word."""


def tokenize(bench: Bench) -> None:
    """Keeps one result for each measurement."""
    corpus = repeated(bench.corpora[0], bench.fresh("repeated"), int(bench.arguments.tokenize_mb * 1e6))
    model = bench.tokenizer(bench.corpora[0])
    n_bytes = size_of(corpus)
    active = [(name, workers) for workers in bench.arguments.workers for name in PEERS if (name, workers) != _MPI_ALONE]
    prepared: tuple[Path, Path] | None = None
    for number in range(bench.arguments.rounds):
        for name, workers in list(active):
            point = {"part": "tokenize", "peer": name, "workers": workers, "bytes": n_bytes}
            try:
                if reason := missing(name):
                    bench.keep({**point, "left_out": reason})
                    active.remove((name, workers))
                elif name in RAW:
                    bench.keep({**point, **encode(model, corpus, workers, RAW[name], bench.arguments.budget_s)})
                elif name == "datatrove":
                    prepared = prepared or prepare_datatrove(bench, model)
                    point["bytes"] = size_of(bench.corpora[0])
                    bench.keep({**point, **datatrove(bench, *prepared, workers)})
                else:
                    bench.keep({**point, **build(bench, model, corpus, workers, name == "ours-mpirun")})
            except FailedError as error:
                bench.keep({**point, "round": number, "error": str(error)})
                active.remove((name, workers))


_MPI_ALONE = ("ours-mpirun", 1)
"""One rank is no team."""


def missing(name: str) -> str | None:
    """Why a peer cannot be measured; None if it can."""
    if name == "datatrove" and not find_spec("datatrove"):
        return "datatrove is not installed: pip install -e '.[bench]'"
    if name == "ours-mpirun" and not mpirun().exists():
        return f"there is no {mpirun()}: pip install -e '.[dev]'"
    return None


def mpirun() -> Path:
    """The one that belongs to the environment's mpi4py."""
    return Path(sys.executable).with_name("mpirun")


def encode(model: Path, corpus: Path, workers: int, kind: str, budget_s: int) -> Result:
    """Raw SentencePiece in so many processes, which begin together."""
    command = [sys.executable, str(WORKERS), "encode", str(model), str(corpus)]
    processes = [
        subprocess.Popen(
            [*command, str(index), str(workers), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for index in range(workers)
    ]
    try:
        for process in processes:
            if process.stdout and process.stdout.readline() != "ready\n":
                raise FailedError("raw SentencePiece cannot begin: see above")
        for process in processes:
            if process.stdin:
                process.stdin.write("\n")
                process.stdin.flush()
        found = [json.loads(process.communicate(timeout=budget_s)[0]) for process in processes]
    except subprocess.TimeoutExpired:
        raise FailedError(f"stopped after {budget_s:,} s, the budget") from None
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return {
        "stage_s": max(one["stage_s"] for one in found),
        "cpu_s": sum(one["cpu_s"] for one in found),
        "bytes": sum(one["bytes"] for one in found),
        "tokens": sum(one["tokens"] for one in found),
    }


def build(bench: Bench, model: Path, corpus: Path, workers: int, under_mpirun: bool) -> Result:
    """A whole build, whose store is removed."""
    output = bench.fresh("built")
    command = bench.build_command(corpus, model, output, 1 if under_mpirun else workers)
    if under_mpirun:
        command = [str(mpirun()), "--oversubscribe", "--bind-to", "none", "-n", str(workers), *command]
    try:
        done = run(command, bench.arguments.budget_s)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    found = stages(done.pop("err"))
    if "tokenize" not in found:
        raise FailedError("the build's log has no line `tokenize: … bytes, … tokens, … s`")
    del done["out"]
    # The log has tenths of a second.
    stage_s = max(found["tokenize"]["seconds"], 0.05)
    return {**done, "stage_s": stage_s, "tokens": found["tokenize"]["tokens"], "stages": found}


# datatrove.


def prepare_datatrove(bench: Bench, model: Path) -> tuple[Path, Path]:
    """The tokenizer and the text as datatrove reads them; keeps what share of lines it gives the same ids."""
    corpus = bench.corpora[0]
    tokenizer, jsonl = bench.fresh("tokenizer-json"), bench.fresh("jsonl")
    bench.keep({"part": "tokenize", "peer": "datatrove", **convert(model, tokenizer, corpus)})
    write_jsonl(corpus, jsonl)
    return tokenizer, jsonl


def convert(model: Path, output: Path, corpus: Path) -> Result:
    """Writes a SentencePiece unigram model as a `tokenizers` one, and compares them line by line."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [
        (
            processor.id_to_piece(token),
            _BYTE_OR_CONTROL
            if processor.is_byte(token) or processor.is_control(token) or processor.is_unknown(token)
            else processor.get_score(token),
        )
        for token in range(processor.vocab_size())
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\r\n", "\n")])  # user-defined pieces
    tokenizer.save(str(output))
    lines = [
        line for text in texts_of(corpus)[:20] for line in text.read_bytes().decode().splitlines(keepends=True) if line
    ][:COMPARED_LINES]
    same = sum(tokenizer.encode(line).ids == processor.encode(line) for line in lines)
    return {"compared_lines": len(lines), "same_lines": same}


def write_jsonl(corpus: Path, folder: Path) -> None:
    """Documents as JSON lines in a few files of about the same size."""
    folder.mkdir()
    sizes = dict.fromkeys(range(JSONL_FILES), 0)
    for path in sorted(texts_of(corpus), key=lambda path: -path.stat().st_size):
        smallest = min(sizes, key=lambda number: (sizes[number], number))
        sizes[smallest] += path.stat().st_size
        line = json.dumps({"id": str(path), "text": path.read_bytes().decode()})
        with (folder / f"{smallest}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def datatrove(bench: Bench, tokenizer: Path, jsonl: Path, workers: int) -> Result:
    output = bench.fresh("datatrove")
    return worker("datatrove", tokenizer, jsonl, output, workers, budget_s=bench.arguments.budget_s, environ=ONE_THREAD)
