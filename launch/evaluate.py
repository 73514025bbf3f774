"""How well the model in a folder predicts the rows of a store, and what its LSH attention does for that.

    python launch/evaluate.py exported data/books_64k                          the split val, as the model was trained
    python launch/evaluate.py exported data/books_64k --split test --rows 50   50 rows of another, drawn at random
    python launch/evaluate.py exported data/books_64k --attention 2 4 8 dense none --json scores.json
    python launch/evaluate.py exported data/books_64k --per-token losses      the loss of each token, by document

The folder is one that launch/export.py wrote, or Hugging Face's save_pretrained. --attention says what LSH layers do,
one setting after another on the same rows: a number of rounds, other than in training too; "dense": every token
before, which LSH attention approximates, at a cost that grows with the square of the length; "none": nothing, which
says whether the model uses them.

Each mean comes with its standard error over documents, because tokens of one document are correlated. Settings are
compared with the first one document by document, so that differences between documents cancel out. Hash rotations are
always those of step 0, as in evaluations during training; other rotations would shift the differences slightly, which
the standard error does not include.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from json import dumps
from typing import Any, Literal, cast

from data_pipeline.bar import Bar
from data_pipeline.dataset import RowDataset
from data_pipeline.output import SEVERAL, as_path, exit_code, table
from data_pipeline.staging import check_json, check_writable, partial_path, write_figures
from data_pipeline.store import Store
from reformer import ConfigError, Reformer
from reformer.weights import refuse_existing
from trainer.attention_comparison import Attention, Scores, attending, check, report, score_rows
from trainer.batches import drawn
from trainer.exported import choose_device, read_model
from trainer.leakage import inherited
from trainer.token_losses import TokenLosses

MOST_ROUNDS = 1024
"""Far more than are of use: a typing error is not computed for hours."""
FEWEST_DOCUMENTS = 10
"""A standard deviation of fewer is mostly chance."""
NO_BETTER = 0.75
"""Nats above those of a guess among all tokens: a model that has not been trained has 0.5 to 0.7."""


def attention(word: str) -> Attention:
    """A setting of --attention."""
    if word in ("dense", "none"):
        return cast(Literal["dense", "none"], word)
    if not (word.isdecimal() and 1 <= int(word) <= MOST_ROUNDS):
        expected = f"a number of rounds from 1 to {MOST_ROUNDS}, dense or none"
        raise argparse.ArgumentTypeError(f"{word!r} is no setting: give {expected}")
    return int(word)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=as_path, metavar="EXPORT", help="folder of the model")
    parser.add_argument("store", type=as_path, metavar="STORE", help="folder of the store")
    parser.add_argument("--split", default="val", metavar="NAME", help="whose rows (default: val)")
    parser.add_argument("--rows", type=int, metavar="N", help="score N of them, always the same draw (default: all)")
    parser.add_argument(
        "--attention",
        type=attention,
        **SEVERAL,
        default=[None],
        metavar="N|dense|none",
        help="for LSH layers: N rounds, dense or none; several are compared (default: as in training)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: cuda where there is one)")
    parser.add_argument("--json", type=as_path, metavar="FILE", help="write the scores, with those of every document")
    parser.add_argument(
        "--per-token",
        type=as_path,
        metavar="FOLDER",
        help="write the loss of every token, an array for each document (trainer/token_losses.py); of one --attention",
    )
    return parser.parse_args()


def check_options(arguments: argparse.Namespace, model: Reformer, store: Store) -> None:
    """Raises ConfigError where there are no such rows, or no LSH layers for --attention; DataError where --per-token
    cannot be written."""
    if arguments.rows is not None and arguments.rows < 1:
        raise ConfigError(f"--rows {arguments.rows} must be at least 1; leave it out to score all")
    if not model.config.has_lsh and arguments.attention != [None]:
        raise ConfigError(f"--attention is for LSH attention, which no layer of {arguments.folder} has: leave it out")
    if arguments.per_token:
        if len(arguments.attention) > 1:
            raise ConfigError("--per-token is of one setting of --attention: give one, and a folder for each")
        refuse_existing(arguments.per_token)
        partial_path(arguments.per_token)
        check_writable(arguments.per_token.parent, f"--per-token {arguments.per_token}")
    full = [name for name in store.manifest.splits if len(RowDataset(store, name))]
    if arguments.split not in full:
        raise ConfigError(f"--split {arguments.split} has no rows in {store.path}: its splits are {', '.join(full)}")


def named(setting: Attention, model: Reformer) -> str:
    """A setting, as the table calls it."""
    if setting is None and not model.config.has_lsh:
        return "as trained"
    rounds = model.config.n_hashes if setting is None else setting
    return f"{rounds} round{'s' * (rounds > 1)}" if isinstance(rounds, int) else rounds


def cell(value: float | None, error: float | None = None, sign: str = "") -> str:
    """A number, and its standard error where there is one."""
    if value is None:
        return "–"
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Two of them: the scores of each setting, and its loss by position."""
    plain = {"bits_per_token": "bits per token", "bits_per_byte": "bits per byte", "perplexity": "perplexity"}
    header = ["LSH layers", "nats per token", "more than the first", *plain.values(), "s a row"]
    lines = [
        [
            one["name"],
            cell(one["nats_per_token"], one["standard_error"]),
            cell(one["more_than_first"], one["more_standard_error"], "+") if index else "",
            *(cell(one[name]) for name in plain),
            f"{one['seconds_a_row']:.2f}",
        ]
        for index, one in enumerate(results)
    ]
    ends = list(results[0]["by_position"])
    by_position = [[one["name"], *(cell(one["by_position"][end]) for end in ends)] for one in results]
    where = "loss in nats per token, by the number of tokens of the same document before it in the row, up to"
    return f"{table([header, *lines])}\n\n{where}\n{table([['LSH layers', *ends], *by_position])}"


def run(arguments: argparse.Namespace) -> None:
    """Score, print and write. Raises ConfigError or DataError where something does not fit or is damaged.

    What has been scored until then is printed and written.
    """
    device = choose_device(arguments.device)
    check_json(arguments.json)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = read_model(arguments.folder, str(arguments.folder)).eval()
    store = Store.open(arguments.store)
    check_options(arguments, model, store)
    notes = [*check(model, store, arguments.folder), *inherited(arguments.folder, store, arguments.split)]
    for note in [*(str(each.message) for each in caught), *notes]:
        print(f"note: {note}", file=sys.stderr)
    rows, model = RowDataset(store, arguments.split), model.to(device)
    numbers = sorted(drawn(len(rows), arguments.rows or len(rows)))
    record: dict[str, Any] = {"model": str(arguments.folder), "store": str(arguments.store), "split": arguments.split}
    names = [named(setting, model) for setting in arguments.attention]
    record |= {"seq_len": store.seq_len, "rows": numbers, "asked": names, "settings": []}
    scored = (document for number in numbers for document in rows.segments_of(number)[:, 2].tolist())
    documents = store.names_of(set(scored)) if arguments.json else {}
    first: Scores | None = None
    of_tokens = TokenLosses() if arguments.per_token else None
    try:
        for setting, name in zip(arguments.attention, names, strict=True):
            bar = Bar(numbers, desc=name, unit="row", leave=False)
            with attending(model, setting) as forward:
                scores = score_rows(forward, rows, bar, device, of_tokens)
            if not scores.all.n_tokens:
                raise ConfigError(f"the rows of {arguments.split} in {store.path} have no token to predict")
            first = first or scores
            record["settings"].append({"name": name, **report(scores, first, documents)})
            if arguments.json:
                write_figures(arguments.json, dumps(record, indent=1, allow_nan=False) + "\n")
        if of_tokens:
            of_tokens.write(arguments.per_token, store)
    finally:
        if first:
            show(record, first, arguments, model.config.vocab_size)


def show(record: Mapping[str, Any], first: Scores, arguments: argparse.Namespace, vocab_size: int) -> None:
    """Print what was found of a model of so many tokens."""
    n_tokens, n_bytes, n_documents = first.all.n_tokens, first.all.n_bytes, len(first.by_document)
    few = "" if n_documents >= FEWEST_DOCUMENTS else " (of so few, standard errors say little)"
    if n_documents == 1:
        few = " (of a single one there is no standard error)"
    predicted = f"{n_tokens:,.0f} tokens to predict in {n_documents:,} documents{few}, {n_bytes:,.0f} bytes"
    n_rows = len(record["rows"])
    print(f"{arguments.folder} on {n_rows} rows of {arguments.split} in {arguments.store}: {predicted}\n")
    print(tables(record["settings"]))
    guess, nats = math.log(vocab_size), record["settings"][0]["nats_per_token"]
    if nats is None:
        print("note: the loss is no finite number: the weights have diverged", file=sys.stderr)
    elif nats > guess + NO_BETTER:
        print(
            f"note: {nats:.4f} nats are more than the {guess:.4f} of a guess among {vocab_size} tokens: are the "
            "store's token ids those that the model was trained with?",
            file=sys.stderr,
        )


def main() -> int:
    return exit_code(lambda: run(parse_arguments()), ConfigError)


if __name__ == "__main__":
    sys.exit(main())
