"""What `launch/benchmark.py pipeline` measures, each in a process of its own that prints one line of JSON.

    python launch/bench_pipeline/workers.py encode MODEL CORPUS INDEX COUNT    raw SentencePiece: the bound
    python launch/bench_pipeline/workers.py datatrove TOKENIZER.json JSONL OUTPUT COUNT
    python launch/bench_pipeline/workers.py rows PEER STORE PATH SEED warm|cold
    python launch/bench_pipeline/workers.py scale FOLDER DOCUMENTS BYTES
    python launch/bench_pipeline/workers.py permutation

Every import stands in the function that needs it. A peer may live in another virtual environment, which has neither
this project nor its libraries, and nobody's time or memory has another's imports in it.
"""

import ctypes
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

PIECE_CHARS = 1 << 16
SEED = 0
Result = dict[str, Any]
ReadRow = Callable[[int], Any]
"""Row number -> its tokens, an array [T]."""


# Tokenizing.


def encode(model: str, corpus: str, index: str, count: str, kind: str) -> Result:
    """Encode every count-th piece of 64K characters, cut and in memory before the clock starts; the ids are dropped.

    kind: "list", SentencePiece's default, or "numpy", its fastest. Says "ready" and begins when it is sent a line.
    """
    import sentencepiece

    texts = (path.read_bytes().decode() for path in sorted(Path(corpus).rglob("*.txt")))
    pieces = [text[start : start + PIECE_CHARS] for text in texts for start in range(0, len(text), PIECE_CHARS)]
    pieces = pieces[int(index) :: int(count)]
    n_bytes = sum(len(piece.encode()) for piece in pieces)
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    to_ids = partial(processor.encode, return_type="numpy") if kind == "numpy" else processor.encode
    to_ids("once")  # so that the clock does not see the import of NumPy
    print("ready", flush=True)
    sys.stdin.readline()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    n_tokens = sum(len(to_ids(piece)) for piece in pieces)
    seconds, cpu_s = time.perf_counter() - begun, time.process_time() - begun_cpu
    return {"stage_s": seconds, "cpu_s": cpu_s, "bytes": n_bytes, "tokens": n_tokens}


def datatrove(tokenizer: str, jsonl: str, output: str, count: str) -> Result:
    """datatrove's local pipeline: JSON lines to files of ids, an EOS after each document, not shuffled."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    tokenize = DocumentTokenizer(
        f"{output}/ids", tokenizer_name_or_path=tokenizer, eos_token="</s>", batch_size=8, shuffle_documents=False
    )
    pipeline = [JsonlReader(jsonl), tokenize]
    executor = LocalPipelineExecutor(pipeline, tasks=int(count), workers=int(count), logging_dir=f"{output}/logs")
    begun = time.perf_counter()
    executor.run()
    seconds = time.perf_counter() - begun
    n_bytes = sum(path.stat().st_size for path in Path(output, "ids").glob("*.ds"))
    return {"stage_s": seconds, "tokens": n_bytes // 2}


# Reading rows.


def rows(peer: str, store: str, path: str, seed: str, temperature: str) -> Result:
    """Read every row once in random order; warm: once before, too; cold: what the kernel keeps of the files is dropped.

    A process has one pass: pages that it has mapped cannot be dropped. Also the sum of all tokens that were read, which
    is the same for all who read the same.
    """
    read, n_rows, files = ROWS[peer](store, path)
    order = list(range(n_rows))
    random.Random(int(seed)).shuffle(order)
    if temperature == "cold":
        drop_pages(files)
    else:
        for row in order:
            read(row)
    resident = resident_share(files)
    seconds: list[float] = []
    total = 0
    for row in order:
        begun = time.perf_counter()
        tokens = read(row)
        seconds.append(time.perf_counter() - begun)
        total += int(tokens.sum())
    n_bytes = sum(file.stat().st_size for file in files)
    return {"row_s": seconds, "resident_before": resident, "sum": total, "bytes": n_bytes}


def store_rows(store: str, path: str) -> tuple[ReadRow, int, list[Path]]:
    """A store's rows, checked, as they are stored."""
    from data_pipeline.store import Store

    opened = Store.open(store)
    return opened.read_row, opened.n_rows, files_below(store, "tokens")


def store_samples(store: str, path: str) -> tuple[ReadRow, int, list[Path]]:
    """What training reads: tokens, labels and segments as tensors."""
    from data_pipeline.dataset import RowDataset
    from data_pipeline.store import Store

    dataset = RowDataset(Store.open(store))
    return lambda row: dataset[row].tokens, len(dataset), files_below(store, "tokens")


def memmap_rows(store: str, path: str) -> tuple[ReadRow, int, list[Path]]:
    """A raw file, copied out row by row: nothing is decoded or checked."""
    import numpy as np

    about = json.loads(Path(path, "rows.json").read_text())
    file = Path(path, "rows.raw")
    array = np.memmap(file, about["dtype"], "r", shape=tuple(about["shape"]))
    return lambda row: np.array(array[row]), len(array), [file]


def mds_rows(store: str, path: str) -> tuple[ReadRow, int, list[Path]]:
    """MosaicML streaming, local and not compressed; its checksums are not looked at when it reads."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=f"{path}/mds", batch_size=1, shuffle=False)
    return lambda row: dataset[row]["tokens"], len(dataset), files_below(path, "mds")


def write_mds(path: str) -> Result:
    """The rows of the raw file as MDS shards, of the size that is its default."""
    import numpy as np
    from streaming import MDSWriter

    about = json.loads(Path(path, "rows.json").read_text())
    array = np.memmap(Path(path, "rows.raw"), about["dtype"], "r", shape=tuple(about["shape"]))
    column = f"ndarray:{about['dtype']}:{about['shape'][1]}"
    with MDSWriter(out=f"{path}/mds", columns={"tokens": column}) as writer:
        for row in array:
            writer.write({"tokens": np.array(row)})
    return {}


ROWS = {"ours": store_rows, "ours-sample": store_samples, "memmap": memmap_rows, "mds": mds_rows}


def files_below(folder: str, name: str) -> list[Path]:
    return sorted(path for path in Path(folder, name).rglob("*") if path.is_file())


def drop_pages(files: list[Path]) -> None:
    """Ask the kernel to forget what it keeps of the files; it keeps what is not on disk yet, hence the fsync."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident_share(files: list[Path]) -> float:
    """What share of the files' pages is in memory, as mincore(2) says."""
    system = ctypes.CDLL(None, use_errno=True)
    system.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    resident = n_pages = 0
    for file in files:
        with mapped(file) as (address, n_bytes):
            pages = (ctypes.c_ubyte * -(-n_bytes // mmap.PAGESIZE))()
            if system.mincore(address, n_bytes, ctypes.addressof(pages)):
                raise OSError(ctypes.get_errno(), "mincore", str(file))
            resident, n_pages = resident + sum(page & 1 for page in pages), n_pages + len(pages)
    return resident / n_pages


@contextmanager
def mapped(file: Path) -> Iterator[tuple[int, int]]:
    """A file in the address space, not touched: (address, bytes)."""
    n_bytes = file.stat().st_size
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), n_bytes, mmap.MAP_PRIVATE) as memory:
        view = ctypes.c_char.from_buffer(memory)  # private, hence writable, hence it gives its address
        yield ctypes.addressof(view), n_bytes
        del view


# A corpus that is too large to be here.


def scale(folder: str, documents: str, n_bytes: str) -> Result:
    """Plan a build of so many documents of so many bytes in all, of which only the sizes exist."""
    import numpy as np

    from bench_pipeline.scale import made_columns, planned_shards, write_files
    from data_pipeline import planning, stages, store

    work = write_files(Path(folder), int(documents), int(n_bytes))
    steps: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = function()
        steps[name] = time.perf_counter() - begun
        return result

    files = timed("list of files", lambda: work.files)
    tasks = timed("tokenize tasks", lambda: work.tasks)
    columns = made_columns(tasks)
    merged = timed("documents", lambda: planning.merge_parts(columns))
    given_split, known = np.full(len(files), ""), store.known_documents(None)
    plan = timed("plan", lambda: planning.make_plan(merged, given_split, known, stages.plan_settings(work)))
    shards = timed("shard tasks", lambda: planned_shards(plan, work.decisive.rows_per_shard))
    splits = timed("figures of splits", lambda: planning.split_records(merged, plan))
    table = timed("table of documents", lambda: sum(1 for _ in planning.document_records(merged, plan, files)))
    return {
        "documents": table,
        "bytes": sum(split.n_bytes for split in splits.values()),
        "tokens": int(merged.n_tokens.sum()),
        "rows": plan.n_rows,
        "tokenize_tasks": len(tasks),
        "shard_tasks": shards,
        "planning_s": sum(steps.values()),
        "step_s": steps,
    }


def permutation() -> Result:
    """Time for one place of a permutation by its size, and what memory it takes."""
    import tracemalloc

    from data_pipeline.order import permute

    found = {}
    for power in range(3, 13, 3):
        length, n_calls = 10**power, 20_000
        indices = random.Random(SEED).choices(range(length), k=n_calls)
        begun = time.perf_counter()
        for index in indices:
            permute(index, length, SEED, epoch=0)
        seconds = time.perf_counter() - begun
        tracemalloc.start()
        images = {index: permute(index, length, SEED, epoch=1) for index in indices[:100]}
        peak = max(0, traced_peak(partial(permute, length - 1, length, SEED, 1)))
        tracemalloc.stop()
        if len(set(images.values())) != len(images) or not all(0 <= image < length for image in images.values()):
            raise SystemExit(f"error: permute is no permutation of {length}")
        found[f"1e{power}"] = {"call_us": seconds / n_calls * 1e6, "peak_bytes": peak}
    return {"by_length": found}


def traced_peak(function: Callable[[], Any]) -> int:
    """Bytes that a call had allocated at most, more than before; tracemalloc must be on."""
    import tracemalloc

    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    function()
    return tracemalloc.get_traced_memory()[1] - before


WORKERS: dict[str, Callable[..., Result]] = {
    function.__name__: function for function in (encode, datatrove, rows, write_mds, scale, permutation)
}


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # launch/, as for what starts this
    print(json.dumps(WORKERS[sys.argv[1]](*sys.argv[2:])))
