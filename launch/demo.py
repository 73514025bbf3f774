"""From text to a trained Reformer: every step of the path, each one a command that you could type yourself.

    python launch/demo.py                    the Python standard library's own sources as the corpus
    python launch/demo.py --corpus books/    any folder of .txt files

Run again, it continues where it stopped, or says what is already there.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from bench.corpora import write_standard_library

from data_pipeline.errors import DataError
from data_pipeline.output import as_path, exit_code

ROOT = Path(__file__).parent.parent
VOCAB_SIZE = "1024"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=as_path, metavar="PATH", help="folder of .txt files, or one file")
    parser.add_argument("--output", type=as_path, metavar="DIR", help="where all results go (default: below runs/)")
    return parser.parse_args()


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
    return exit_code(lambda: run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
