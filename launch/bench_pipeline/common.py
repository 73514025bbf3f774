"""What the parts of `launch/benchmark.py pipeline` share: commands that are measured, corpora, tokenizers and stores.

Everything is measured from outside, as a user runs it: a command in processes of its own, its time, the memory of its
largest process (`usage.py`), and what it says. A command that fails is a result too.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any, BinaryIO

from bench.process import AS_ROOT

ROOT = Path(__file__).parents[2]
PIPELINE = (sys.executable, "-m", "data_pipeline")
WORKERS = Path(__file__).with_name("workers.py")
USAGE = Path(__file__).with_name("usage.py")
TINY_LINES = 4
Result = dict[str, Any]
_STAGE = re.compile(r"^(\w+): ([\d,]+) bytes, ([\d,]+) tokens, ([\d.,]+) s$", re.MULTILINE)


class FailedError(Exception):
    """A command of the benchmark ended with an error: its last line."""


@dataclass
class Bench:
    """One run of the benchmark."""

    arguments: Namespace
    folder: Path
    """Where corpora, tokenizers and stores go; removed in the end."""
    corpora: list[Path]
    keep: Callable[[Result], None]
    """Takes each result."""
    _made: dict[tuple[str, Path], Path] = field(default_factory=dict)

    def fresh(self, name: str) -> Path:
        """A path that is not there yet."""
        return next(path for n in count() if not (path := self.folder / f"{name}-{n}").exists())

    def tokenizer(self, corpus: Path) -> Path:
        """A SentencePiece model of the corpus, trained by our command when it is first asked for."""
        return self._once("tokenizer", corpus, self._train)

    def store(self, corpus: Path) -> Path:
        """A store of the corpus and its tokenizer, without splits, built when it is first asked for."""
        return self._once("store", corpus, self._build)

    def _once(self, what: str, corpus: Path, make: Callable[[Path, Path], None]) -> Path:
        if (what, corpus) not in self._made:
            path = self.fresh(what)
            make(corpus, path)
            self._made[what, corpus] = path
        return self._made[what, corpus]

    def _train(self, corpus: Path, output: Path) -> None:
        run(self.train_command(corpus, output), self.arguments.budget_s)

    def _build(self, corpus: Path, output: Path) -> None:
        run(self.build_command(corpus, self.tokenizer(corpus), output, 1), self.arguments.budget_s)

    def train_command(self, corpus: Path, output: Path) -> list[str]:
        words = ("tokenizer", "--input", corpus, "--output", output, "--vocab-size", self.arguments.vocab_size)
        return [*PIPELINE, *map(str, words)]

    def build_command(self, corpus: Path, tokenizer: Path | str, output: Path, workers: int) -> list[str]:
        words = ("build", "--input", corpus, "--tokenizer", tokenizer, "--output", output, "--workers", workers)
        return [*PIPELINE, *map(str, words), "--seq-len", str(self.arguments.seq_len)]


def run(words: Sequence[str], budget_s: int, environ: Mapping[str, str] = {}) -> Result:
    """Runs a command. Returns `seconds`, `cpu_s`, `peak_gib` of its largest process, and what it wrote: `out`, `err`.

    Raises FailedError when it fails or takes longer than the budget.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, out, err = (Path(folder, name) for name in ("report.json", "out", "err"))
        command = [sys.executable, "-I", str(USAGE), str(report), *words]
        with out.open("wb") as output, err.open("wb") as errors:
            code = _wait(command, output, errors, {**os.environ, **AS_ROOT, **environ}, budget_s)
        texts = {file.name: file.read_text(encoding="utf-8", errors="replace") for file in (out, err)}
        if code:
            lines = texts["err"].strip().splitlines() or [f"exit code {code}"]
            raise FailedError(next((line for line in reversed(lines) if "rror" in line), lines[-1]))
        return {**json.loads(report.read_text()), **texts}


def _wait(command: Sequence[str], out: BinaryIO, err: BinaryIO, environ: Mapping[str, str], budget_s: int) -> int:
    """The exit code of a command; one that takes too long is ended with all that it started."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environ, cwd=ROOT, start_new_session=True
    )
    try:
        return process.wait(budget_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # which mpirun hands on
        raise FailedError(f"stopped after {budget_s:,} s, the budget") from None
    finally:
        with suppress(subprocess.TimeoutExpired, ProcessLookupError):
            process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def worker(
    *words: str | int | Path, budget_s: int, python: str | Path = sys.executable, environ: Mapping[str, str] = {}
) -> Result:
    """What a worker (`workers.py`) prints, with `seconds` and `peak_gib` of its process."""
    done = run([str(python), str(WORKERS), *map(str, words)], budget_s, environ)
    lines = done.pop("out").splitlines()
    del done["err"]
    return {**done, **json.loads(lines[-1])}


def stages(log: str) -> dict[str, Result]:
    """The stages of a build, as its log tells them: name -> `bytes`, `tokens`, `seconds`."""

    def number(text: str) -> float:
        return float(text.replace(",", ""))

    return {
        name: {"bytes": int(number(n_bytes)), "tokens": int(number(tokens)), "seconds": number(seconds)}
        for name, n_bytes, tokens, seconds in _STAGE.findall(log)
    }


# Corpora.


def texts_of(corpus: Path) -> list[Path]:
    """The .txt files of a folder, or the one file."""
    return [corpus] if corpus.is_file() else sorted(path for path in corpus.rglob("*.txt") if path.is_file())


def size_of(corpus: Path) -> int:
    """Bytes of text."""
    return sum(path.stat().st_size for path in texts_of(corpus))


def repeated(corpus: Path, folder: Path, n_bytes: int) -> Path:
    """The corpus as often as it takes to be at least n_bytes, below `folder`."""
    for number in range(max(1, -(-n_bytes // size_of(corpus)))):
        for text in texts_of(corpus):
            name = text.name if text == corpus else text.relative_to(corpus).as_posix()
            target = folder / f"{number:03d}" / (name if name.endswith(".txt") else f"{name}.txt")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(text, target)
    return folder


def one_document(corpus: Path, folder: Path, n_bytes: int) -> Path:
    """A document of at least n_bytes: the corpus end to end, again and again."""
    folder.mkdir()
    with (folder / "document.txt").open("wb") as output:
        for text in cycle(texts_of(corpus)):
            output.write(text.read_bytes())
            if output.tell() >= n_bytes:
                return folder
    raise AssertionError("a cycle has no end")


def tiny_documents(corpus: Path, folder: Path, n_documents: int) -> Path:
    """So many documents of TINY_LINES lines of the corpus each, a thousand to a folder."""
    lines = (line for text in cycle(texts_of(corpus)) for line in text.read_bytes().splitlines(keepends=True))
    for number in range(n_documents):
        path = folder / f"{number // 1000:04d}" / f"{number % 1000:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(islice(lines, TINY_LINES)))
    return folder
