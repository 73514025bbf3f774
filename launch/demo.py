"""From text to a trained Reformer: every step of the path, each one a command that you could type yourself.

    python launch/demo.py                    the Python standard library's own sources as the corpus
    python launch/demo.py --corpus books/    any folder of .txt files

Run again, it continues where it stopped, or says what is already there.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.output import exit_code

ROOT = Path(__file__).parent.parent
VOCAB_SIZE = "1024"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, metavar="PATH", help="folder of .txt files, or one file")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where all results go (default: below runs/)")
    return parser.parse_args()


def write_standard_library(folder: Path) -> None:
    """Copy the standard library's sources to `folder`, as .txt files; whole or not at all.

    Left out: what is installed beside it, and the few files that are not UTF-8 (tests of other encodings).
    """
    if folder.exists():
        print(f"{folder} is already there")
        return
    source = Path(sysconfig.get_path("stdlib"))
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    n_files = n_bytes = n_skipped = 0
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source)
        if {"site-packages", "dist-packages"} & set(name.parts):
            continue
        text = path.read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            n_skipped += 1
            continue
        target = partial / f"{name}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text)
        n_files, n_bytes = n_files + 1, n_bytes + len(text)
    if not n_files:
        raise DataError(f"no Python sources in {source}: name a folder of .txt files, make demo CORPUS=path")
    partial.rename(folder)
    print(
        f"{folder}: {n_files} files of Python's standard library, {n_bytes / 1e6:.1f} MB "
        f"({n_skipped} left out: not UTF-8)"
    )


def step(*command: str | Path) -> None:
    """Show a command and run it on the CPU. Raises DataError, which ends the demo, where it fails."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    code = subprocess.run(words, cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"}).returncode
    if code:
        raise DataError(f"the demo stopped: that command ended with exit code {code}")


def run(arguments: argparse.Namespace) -> None:
    name = f"demo-{arguments.corpus.name}" if arguments.corpus else "demo"
    output = (arguments.output or ROOT / "runs" / name).absolute()
    output.mkdir(parents=True, exist_ok=True)
    corpus = arguments.corpus.absolute() if arguments.corpus else output / "corpus"
    if not arguments.corpus:
        write_standard_library(corpus)

    pipeline = (Path(sys.executable), "-m", "data_pipeline")
    tokenizer, store, run_dir = output / "tokenizer.model", output / "store", output / "run"
    step(*pipeline, "tokenizer", "--input", corpus, "--output", tokenizer, "--vocab-size", VOCAB_SIZE)
    step(*pipeline, "build", "--input", corpus, "--tokenizer", tokenizer, "--output", store, "--split", "val=0.05")
    step(*pipeline, "verify", store)
    step(*pipeline, "inspect", store)
    step(
        *(Path(sys.executable).parent / "deepspeed", "-q", "--num_accelerators", "2", "launch/train.py"),
        *("--config", "launch/configs/demo_cpu.toml"),
        *(f"data.store={store}", f"run.dir={run_dir}"),
    )
    step(Path(sys.executable), "launch/report.py", run_dir)


def main() -> int:
    return exit_code(partial(run, parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
