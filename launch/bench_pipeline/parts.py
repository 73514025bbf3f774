"""The parts of `launch/benchmark.py pipeline` other than `tokenize`.

size     Bytes per token of a store of each corpus: all of tokens/, and the whole folder; tokens are those of documents,
         BOS and EOS included, not padding.
read     Every row in random order, warm and cold. `ours` is Store.read_row: decompressed, checksums compared, ids
         checked. `ours-sample` is what training takes: RowDataset, with labels and segments as tensors. `memmap` copies
         the same rows out of a raw file of the same ids; `mds` is MosaicML streaming, local, not compressed, one row a
         sample. Cold: the kernel is asked to drop the files' pages before the pass (POSIX_FADV_DONTNEED), and
         `resident_before` is the share of them that mincore(2) still finds in memory.
memory   The tokenizer command and the build, for one large document and for many tiny ones: the resident memory of
         the largest process.
stall    The share of a training step that waits for data, as the trainer reports it: launch/train.py with the demo's
         model, on rows of bytes.
scale    Planning a build of which only the sizes exist, and a permutation by its length.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench_pipeline.common import (
    ROOT,
    Bench,
    FailedError,
    Result,
    one_document,
    run,
    size_of,
    texts_of,
    tiny_documents,
    worker,
)
from bench_pipeline.tokenizing import tokenize
from data_pipeline.store import Store
from trainer.run_files import read_metrics

READERS = ("ours", "ours-sample", "memmap", "mds")
CONFIG = ROOT / "launch" / "configs" / "demo_cpu.toml"


# Size.


def size(bench: Bench) -> None:
    """Keeps one result for each corpus."""
    for corpus in bench.corpora:
        store = Store.open(bench.store(corpus))
        n_tokens = sum(split.tokens for split in store.manifest.splits.values())
        in_tokens, in_all = bytes_below(store.path / "tokens"), bytes_below(store.path)
        bench.keep(
            {
                "part": "size",
                "corpus": corpus.name,
                "vocab_size": store.vocab_size,
                "text_bytes": size_of(corpus),
                "tokens": n_tokens,
                "rows": store.n_rows,
                "padding": 1 - n_tokens / (store.n_rows * store.seq_len),
                "tokens_bytes": in_tokens,
                "store_bytes": in_all,
                "bytes_per_token": in_tokens / n_tokens,
                "store_bytes_per_token": in_all / n_tokens,
            }
        )


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# Reading.


def read(bench: Bench) -> None:
    """Keeps one result for each measurement."""
    store = bench.store(bench.corpora[0])
    copies = bench.fresh("rows")
    total = write_raw(Store.open(store), copies)
    python = bench.arguments.mds_python
    active = list(READERS)
    if not (mds_version := version_in(python, "mosaicml-streaming")):
        active.remove("mds")
        way = "python -m venv .venv/mds && .venv/mds/bin/python -m pip install -r launch/bench_pipeline/mosaicml.txt"
        reason = f"mosaicml-streaming is not installed in {python}: {way}, or name its Python with --mds-python"
        bench.keep({"part": "read", "peer": "mds", "left_out": reason})
    else:
        worker("write_mds", copies, budget_s=bench.arguments.budget_s, python=python)
    for seed in range(bench.arguments.rounds):
        for name in active:
            for temperature in ("warm", "cold"):
                words = ("rows", name, store, copies, seed, temperature)
                mine = python if name == "mds" else sys.executable
                found = worker(*words, budget_s=bench.arguments.budget_s, python=mine)
                if (sum_read := found.pop("sum")) != total:
                    raise FailedError(f"{name} read other tokens: their sum is {sum_read}, not {total}")
                version = {"version": mds_version} if name == "mds" else {}
                bench.keep(
                    {"part": "read", "peer": name, "temperature": temperature, **version, **summary_of_rows(found)}
                )


def summary_of_rows(found: Result) -> Result:
    """Instead of the seconds of each row, what they come to."""
    row_s = found.pop("row_s")
    return {
        **found,
        "rows": len(row_s),
        "rows_per_s": len(row_s) / sum(row_s),
        "median_ms": statistics.median(row_s) * 1e3,
        "p99_ms": float(np.quantile(row_s, 0.99)) * 1e3,
    }


def write_raw(store: Store, folder: Path) -> int:
    """Writes a store's rows end to end, as np.memmap reads them. Returns the sum of all their tokens."""
    folder.mkdir()
    total = 0
    with (folder / "rows.raw").open("wb") as output:
        for number in range(store.n_rows):
            row = store.read_row(number)
            output.write(row.tobytes())
            total += int(row.sum())
    about = {"dtype": row.dtype.name, "shape": (store.n_rows, store.seq_len)}
    (folder / "rows.json").write_text(json.dumps(about))
    return total


def version_in(python: Path, package: str) -> str | None:
    """The version of a package in another Python's environment; None without it."""
    if not python.exists():
        return None
    question = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([str(python), "-c", question], capture_output=True, text=True)
    return done.stdout.strip() or None


# Memory.


def memory(bench: Bench) -> None:
    """Keeps one result for each corpus and command."""
    source, arguments = bench.corpora[0], bench.arguments
    corpora: dict[str, Callable[[Path], Path]] = {
        "one document": lambda folder: one_document(source, folder, int(arguments.document_mb * 1e6)),
        "tiny documents": lambda folder: tiny_documents(source, folder, arguments.documents),
    }
    for name, make in corpora.items():
        corpus = make(bench.fresh("memory"))
        model, output = bench.fresh("tokenizer"), bench.fresh("built")
        workers = max(arguments.workers)
        point = {"part": "memory", "corpus": name, "bytes": size_of(corpus), "documents": len(texts_of(corpus))}
        for command, words in (
            ("tokenizer", bench.train_command(corpus, model)),
            ("build", bench.build_command(corpus, model, output, workers)),
        ):
            done = run(words, arguments.budget_s)
            bench.keep({**point, "command": command, **{key: done[key] for key in ("seconds", "cpu_s", "peak_gib")}})


# Training.


def stall(bench: Bench) -> None:
    """Keeps one result."""
    arguments = bench.arguments
    store, run_dir = bench.fresh("bytes-store"), bench.fresh("run")
    run(bench.build_command(bench.corpora[0], "bytes", store, 1), arguments.budget_s)
    words = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(CONFIG), f"data.store={store}"]
    words += [f"run.dir={run_dir}", f"run.steps={arguments.steps}", "run.eval_every=0", "run.save_every=0"]
    words += ["run.warmup_steps=1", "model.vocab_size=258", f"model.max_seq_len={arguments.seq_len}"]
    done = run(words, arguments.budget_s, {"DS_ACCELERATOR": "cpu"})
    lines = read_metrics(run_dir)[1:]  # the first step starts the readers
    shares = [line["speed/data_stall"] for line in lines]
    if not shares:
        raise FailedError("--steps must be 2 or more: the first does not count")
    bench.keep(
        {
            "part": "stall",
            "data_stall": statistics.median(shares),
            "largest": max(shares),
            "steps": shares,
            "step_s": statistics.median(line["speed/step_s"] for line in lines),
            "seconds": done["seconds"],
            "peak_gib": done["peak_gib"],
        }
    )


# Scale.


def scale(bench: Bench) -> None:
    """Keeps a result for planning and one for the permutation."""
    folder, arguments = bench.fresh("scale"), bench.arguments
    folder.mkdir()
    n_bytes = int(arguments.scale_tb * 1e12)
    planned = worker("scale", folder, arguments.scale_documents, n_bytes, budget_s=arguments.budget_s)
    bench.keep({"part": "scale", "what": "plan", **planned})
    bench.keep({"part": "scale", "what": "permutation", **worker("permutation", budget_s=arguments.budget_s)})


PARTS: dict[str, Callable[[Bench], None]] = {
    function.__name__: function for function in (tokenize, size, read, memory, stall, scale)
}
