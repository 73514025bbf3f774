"""Draw what `launch/benchmark.py --json` measured, both axes logarithmic.

    python launch/benchmark_plot.py benchmarks/model-cpu.json --output docs/model-cpu.png

Of `model` and `attention` time and memory against the length, of `memory` memory against the length and the depth.

Several files are drawn as one: measurements of the same sizes on the same machine, such as lengths that were measured
on another day. A line ends in a dotted stretch where the next length was left out because of what it was predicted to
take. Memory is the peak of the process, with what its libraries take.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.plot import Record, check_output, draw

from data_pipeline.errors import DataError
from data_pipeline.output import exit_code

SAME = ("what", "sizes", "dtype", "cpu", "threads")
"""What files have in common that are drawn as one."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="written by launch/benchmark.py --json")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".png, .svg or .pdf")
    return parser.parse_args()


def read(files: Sequence[Path]) -> Record:
    """The records of the files as one. Raises DataError for files that are no records, or do not belong together."""
    records = []
    for file in files:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            record = {"dtype": "float32"} | record  # which was not written where there was no other
            records.append({key: record[key] for key in (*SAME, "results")})
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} was not written by launch/benchmark.py --json: {error!r}") from None
    first = records[0]
    for file, record in zip(files, records, strict=True):
        for key in SAME:
            if record[key] != first[key]:
                raise DataError(
                    f"{files[0]} and {file} do not belong in one picture: "
                    f"their {key} are {first[key]} and {record[key]}. Draw them one by one"
                )
    return {**first, "results": [result for record in records for result in record["results"]]}


def run(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    draw(read(arguments.files), arguments.output)
    print(f"drew {arguments.output}")


def main() -> int:
    return exit_code(lambda: run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
