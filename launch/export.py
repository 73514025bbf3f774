"""Write the weights of a run as a model that needs neither DeepSpeed nor the trainer.

    python launch/export.py runs/demo/run --output model                              the newest sound checkpoint
    python launch/export.py runs/demo/run --step 400 --output model                   that one
    python launch/export.py runs/demo/run --best --output model                       the best (run.keep_best keeps it)
    python launch/export.py runs/demo/run/checkpoints/step_00000400 --output model    the same
    python launch/export.py runs/demo/run --hf --output model                         for Hugging Face's transformers

In Python, `reformer.load_model("model")` is the model. A run may go on meanwhile; every byte of a checkpoint is checked
before it is used. The weights are those that the optimizer updates, in fp32, whatever precision the model ran in.

origin.json says of which checkpoint of which run they are (not with --hf). The tokenizer comes with them, checked to be
the one of the training, so that launch/generate.py continues a text; with --hf the ids of BOS and EOS alone, for
transformers' generate() to end where a document does. The run has a copy of it; --store takes it from a store. Where
there is none, the weights are written without it, and a note on standard error says so.
"""

import argparse
import sys
import warnings

from data_pipeline.output import as_path, exit_code
from trainer.config import ConfigError
from trainer.export import export
from trainer.selection import best_step


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=as_path, metavar="RUN|CHECKPOINT", help="folder of a run, or of one checkpoint")
    parser.add_argument(
        "--output", type=as_path, required=True, metavar="FOLDER", help="to write; it appears when complete"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="of a run, the checkpoint after N steps")
    which.add_argument("--best", action="store_true", help="of a run, the checkpoint with the lowest eval/loss")
    parser.add_argument("--store", type=as_path, metavar="FOLDER", help="to take the tokenizer from (default: the run)")
    parser.add_argument("--hf", action="store_true", help="write what Hugging Face's transformers reads")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    step = best_step(arguments.source) if arguments.best else arguments.step
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        written, note = export(arguments.source, step, arguments.output, arguments.hf, arguments.store)
    for each in [*(str(warning.message) for warning in caught), *([note] if note else [])]:
        print(f"note: {each}", file=sys.stderr)
    print(written)


def main() -> int:
    return exit_code(lambda: run(parse_arguments()), ConfigError)


if __name__ == "__main__":
    sys.exit(main())
