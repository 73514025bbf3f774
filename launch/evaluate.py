"""How well the model in a folder predicts the rows of a store, and what its LSH attention does for that.

    python launch/evaluate.py exported data/books_64k                          the split val, as the model was trained
    python launch/evaluate.py exported data/books_64k --split test --rows 50   the first 50 rows of another
    python launch/evaluate.py exported data/books_64k --attention 2 4 8 dense none --json scores.json

The folder is one that launch/export.py wrote, or Hugging Face's save_pretrained. --attention says what LSH layers do,
one setting after another on the same rows: a number of rounds, other than in training too; "dense": every token
before, which LSH attention approximates, at a cost that grows with the square of the length; "none": nothing, which
says whether the model uses them.

Behind a mean stands its standard error: how much it would vary with other rows of the kind. Settings are compared with
the first row by row, which leaves out what makes rows differ. Rows of one document are alike, so that both errors are
too small where few documents fill many rows. Hash rotations are those of step 0, as in evaluations during training.
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from generate import choose_device
from tqdm import tqdm

from data_pipeline.dataset import RowDataset
from data_pipeline.errors import DataError
from data_pipeline.output import reader_may_leave
from data_pipeline.store import Store
from reformer import ConfigError, Reformer
from trainer.compare import Attention, RowScore, attending, score_rows, standard_error, total
from trainer.exported import knows_tokenizer, read_model
from trainer.scoring import range_ends, range_name


def attention(word: str) -> Attention:
    """A setting of --attention."""
    if word in ("dense", "none"):
        return word  # type: ignore[return-value]
    if not (word.isdecimal() and int(word)):
        raise argparse.ArgumentTypeError(f"{word!r} is no setting: give a number of rounds from 1 on, dense or none")
    return int(word)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="EXPORT", help="folder of the model")
    parser.add_argument("store", type=Path, metavar="STORE", help="folder of the store")
    parser.add_argument("--split", default="val", metavar="NAME", help="whose rows (default: val)")
    parser.add_argument("--rows", type=int, metavar="N", help="score the first N (default: all)")
    parser.add_argument(
        "--attention",
        type=attention,
        nargs="+",
        default=[None],
        metavar="N|dense|none",
        help="of LSH layers: so many rounds, dense or none; several are compared (default: as in training)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores, with those of every row")
    return parser.parse_args()


def check(model: Reformer, arguments: argparse.Namespace, store: Store) -> list[str]:
    """What is to be said of a model and a store. Raises ConfigError where they do not fit, or not the arguments."""
    config, folder = model.config, arguments.folder
    if arguments.rows is not None and arguments.rows < 1:
        raise ConfigError(f"--rows {arguments.rows} must be at least 1; leave it out to score all")
    if not config.causal:
        raise ConfigError(f"the model in {folder} sees the tokens that it would have to predict (causal=False)")
    if config.vocab_size != store.vocab_size:
        raise ConfigError(
            f"the model in {folder} has {config.vocab_size} tokens, and the tokenizer of {store.path} "
            f"{store.vocab_size}: give a store that was built with the model's tokenizer"
        )
    if config.max_seq_len < store.seq_len:
        raise ConfigError(
            f"the model in {folder} takes {config.max_seq_len} tokens at most, and the rows of {store.path} have "
            f"{store.seq_len}: build a store with --seq-len {config.max_seq_len}"
        )
    if "lsh" not in config.attn_pattern and arguments.attention != [None]:
        raise ConfigError(
            f"--attention is for models with LSH attention, and the layers of {folder} are "
            f"{', '.join(config.attn_pattern)}: leave it out"
        )
    full = [name for name in store.manifest.splits if len(RowDataset(store, name))]
    if arguments.split not in full:
        raise ConfigError(f"--split {arguments.split} has no rows in {store.path}: its splits are {', '.join(full)}")
    if knows_tokenizer(folder, str(folder), store.path, store.manifest.tokenizer_sha256):
        return []
    return [f"{folder} does not say which tokenizer its model was trained with: it must be that of {store.path}"]


def named(setting: Attention, model: Reformer) -> str:
    """A setting, as the table calls it."""
    if setting is None:
        return f"{model.config.n_hashes} rounds" if "lsh" in model.config.attn_pattern else "as trained"
    return f"{setting} round{'s' * (setting > 1)}" if isinstance(setting, int) else setting


def evaluate(
    model: Reformer, setting: Attention, rows: RowDataset, n_rows: int, device: torch.device
) -> list[RowScore]:
    """The scores of the first n_rows rows. Raises DataError where one is damaged."""
    token_bytes = torch.from_numpy(rows.store.token_bytes.astype("int64"))
    numbers = tqdm(range(n_rows), desc=named(setting, model), unit="row", disable=None, leave=False)
    with attending(model, setting) as forward:
        return list(score_rows(forward, (rows[row] for row in numbers), token_bytes, device))


def facts(scores: Sequence[RowScore], first: Sequence[RowScore], seq_len: int) -> dict[str, Any]:
    """What is reported of a setting, beside the one that it is compared with; NaN is None."""
    of_rows, of_first = [row.all for row in scores], [row.all for row in first]
    score, n_tokens_N = total(of_rows), torch.tensor([row.n_tokens for row in of_rows], dtype=torch.float64)
    nll_N, first_nll_N = (torch.tensor([row.nll for row in each], dtype=torch.float64) for each in (of_rows, of_first))
    by_range = [total(ranges) for ranges in zip(*(row.by_position for row in scores), strict=True)]
    names = [range_name(end, seq_len).lstrip("0") for end in range_ends(seq_len)]
    values = {
        "nats_per_token": score.loss,
        "standard_error": standard_error(nll_N, n_tokens_N),
        "bits_per_token": score.bits_per_token,
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "more_than_first": score.loss - total(of_first).loss,
        "more_standard_error": standard_error(nll_N - first_nll_N, n_tokens_N),
        "seconds_a_row": median(row.seconds for row in scores),
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()} | {
        "by_position": {name: one.loss for name, one in zip(names, by_range, strict=True) if one.n_tokens},
        "rows": [{"nats": row.nll, "tokens": int(row.n_tokens), "bytes": row.n_bytes} for row in of_rows],
    }


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in (header, *lines)
    )


def cell(value: float | None, error: float | None = None, sign: str = "") -> str:
    """A number, and its standard error where there is one."""
    if value is None:
        return "none"
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def report(results: Sequence[dict[str, Any]]) -> str:
    """Two tables: the scores of each setting, and its loss by position."""
    header = [
        "LSH layers",
        "nats per token",
        "more than the first",
        "bits per token",
        "bits per byte",
        "perplexity",
        "s a row",
    ]
    lines = [
        [
            one["name"],
            cell(one["nats_per_token"], one["standard_error"]),
            cell(one["more_than_first"], one["more_standard_error"], "+") if index else "",
            *(cell(one[name]) for name in ("bits_per_token", "bits_per_byte", "perplexity")),
            f"{one['seconds_a_row']:.2f}",
        ]
        for index, one in enumerate(results)
    ]
    ends = list(results[0]["by_position"])
    by_position = [[one["name"], *(cell(one["by_position"][end]) for end in ends)] for one in results]
    where = "nats per token, by how many tokens of its own document are before it in the row, up to"
    return f"{table(header, lines)}\n\n{where}\n{table(['LSH layers', *ends], by_position)}"


def write(file: Path, record: dict[str, Any]) -> None:
    """Replace the file as a whole."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def run(arguments: argparse.Namespace) -> None:
    """Score, print and write. Raises ConfigError or DataError where something does not fit or is damaged."""
    device = choose_device(arguments.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = read_model(arguments.folder, str(arguments.folder)).eval()
    store = Store.open(arguments.store)
    for note in [*(str(each.message) for each in caught), *check(model, arguments, store)]:
        print(f"note: {note}", file=sys.stderr)
    rows, model = RowDataset(store, arguments.split), model.to(device)
    n_rows = min(arguments.rows or len(rows), len(rows))
    record: dict[str, Any] = {"model": str(arguments.folder), "store": str(arguments.store), "split": arguments.split}
    record |= {"rows": n_rows, "seq_len": store.seq_len, "settings": []}
    scores: list[list[RowScore]] = []
    for setting in arguments.attention:
        if arguments.json:  # before the first too: that it cannot be written should not be learnt in an hour
            write(arguments.json, record)
        scores.append(evaluate(model, setting, rows, n_rows, device))
        record["settings"].append({"name": named(setting, model), **facts(scores[-1], scores[0], store.seq_len)})
    if arguments.json:
        write(arguments.json, record)
    of_all = total(row.all for row in scores[0])
    predicted = f"{of_all.n_tokens:,.0f} tokens to predict, {of_all.n_bytes:,.0f} bytes"
    print(f"{arguments.folder} on {n_rows} rows of {arguments.split} in {arguments.store}: {predicted}\n")
    print(report(record["settings"]))


def main() -> int:
    arguments = parse_arguments()
    try:
        with reader_may_leave():
            run(arguments)
    except (ValueError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
