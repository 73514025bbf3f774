"""How a run went: a text, and values for programs."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.store import Store
from trainer.baseline import unigram_score
from trainer.curves import HELD_OUT, Curves, Point, continued
from trainer.scoring import source_tag
from trainer.terminal import see_curves


def unigram(run: Curves) -> float | DataError:
    """Bits per byte of a unigram model on the held-out rows, or why they are not known: all else needs no store."""
    data = run.config.data
    try:
        for path, fingerprint in run.fingerprints():
            if Store.open(path).manifest.fingerprint != fingerprint:
                raise DataError(f"{path} is not the store that it was: it was built anew, or added to")
        return unigram_score(data, run.config.run.eval_rows).bits_per_byte
    except DataError as error:
        return error


def report(run: Curves) -> tuple[str, dict[str, Any]]:
    """The report on a run, as a text and as values: those of `run_values`, `unigram_bits_per_byte` of a run that is
    evaluated (null where it is not known), and `notes`."""
    config, evaluations, said = run.config, run.points(HELD_OUT), list(scores(run))
    width = max(32, *(len(name) + 1 for _, name, _ in said))
    values, notes = run_values(run), list[str]()
    lines = [row(width, "", "first", "step", "last", "step")]
    lines += [row(width, name, *cells(points[0]), *cells(points[-1])) for _, name, points in said]
    if (best := run.best()) and best[0] != evaluations[-1][0]:
        lines.append(row(width, "held out, best, bits per byte", "", "", *cells(best)))
    is_evaluated = bool(run.column("eval/loss") and config.run.eval_every)  # by what is configured now
    if is_evaluated:
        bits = unigram(run)
        if isinstance(bits, DataError):
            notes.append(f"unigram model, held out: not known, since {bits}")
        else:
            lines.append(f"{row(width, 'unigram model, held out:', last=f'{bits:.4f}')} bits per byte")
        values["unigram_bits_per_byte"] = None if isinstance(bits, DataError) else bits
    if since := run.since(HELD_OUT):
        notes.append(f"evaluations before step {since} were of other rows, or by other rounds, and are left out")
    notes += [f"continued with other settings {each}" for each in continued(run.record)]
    if config.data.mixture and is_evaluated:
        notes.append(f"held out is {config.data.eval_split!r} of {config.data.store}, batches are of the mixture")
    lines += notes
    lines += [row(width, name, last=f"{value:{form}}") for _, name, value, form in costs(run)]
    lines += ["", f"the run lies in {run.path}", f"see its curves:  {see_curves(run.path)}"]
    return "\n".join(lines), {**values, "notes": notes}


def run_values(run: Curves) -> dict[str, Any]:
    """What is said of a run: `scores` by tag, `best` of the held-out rows (null without any), and what it cost."""
    spans = {tag: {"first": point(points[0]), "last": point(points[-1])} for tag, _, points in scores(run)}
    best = run.best()
    values = {"run": str(run.path), "steps": n_steps(run), "scores": spans, "best": best and point(best)}
    since = {"evaluations_since": run.since(HELD_OUT)}
    return {**values, **since, **{key: value for key, _, value, _ in costs(run)}}


def point(found: Point) -> dict[str, float | None]:
    """A value and its step; null for what was not finite."""
    return {"step": found[0], "value": found[1]}


def n_steps(run: Curves) -> int:
    return run.points("train/loss")[-1][0]


def row(width: int, name: str, first: str = "", first_step: str = "", last: str = "", last_step: str = "") -> str:
    """A line of the report: reports and evaluations are not of the same steps, so each value has its own beside it."""
    return f"{name:<{width}}{first:>12}{first_step:>8}{last:>12}{last_step:>8}".rstrip()


def cells(point: Point) -> tuple[str, str]:
    """A value and its step; "none" for what was not finite."""
    step, value = point
    return "none" if value is None else f"{value:.4f}", str(step)


def scores(run: Curves) -> Iterator[tuple[str, str, list[Point]]]:
    """What is predicted how well: a tag, its name, and its values in order, at least one."""
    tags = sorted({tag for values in run.metrics for tag in values})
    names: dict[str, str] = {}
    for split, name in (("train", "training batch"), ("eval", "held out")):
        names |= {f"{split}/loss": f"{name}, nats per token", f"{split}/bits_per_byte": f"{name}, bits per byte"}
    positions = [tag for tag in tags if tag.startswith("eval/loss_at/")]
    names |= {tag: f"  up to {tag.split('/')[-1].lstrip('0')} tokens before" for tag in positions}
    names["eval/lsh_gain"] = "  more without LSH attention"
    for name in sorted(run.config.data.mixture):
        names[source_tag(name, "bits_per_byte")] = f"held out of {name}, bits per byte"
    for tag, name in names.items():
        if said := run.points(tag):
            yield tag, name, said
    if recovered := run.recovered_mass():
        yield "lsh/recovered_mass", "dense attention recovered", recovered


def costs(run: Curves) -> Iterator[tuple[str, str, float, str]]:
    """What the run took, and what went wrong in it: a key, a name, a value and its format."""
    yield "tokens_per_s", "tokens per second (median)", median(run.column("speed/tokens_per_s")), ",.0f"
    if shares := run.column("speed/mfu"):
        yield "mfu", "of the devices' peak (median)", median(shares), ".1%"
    yield "peak_gib", "peak memory of a process, GiB", max(run.column("memory/peak_gib")), ".2f"
    if (saves := run.column("speed/save_share")) and saves[-1]:  # a line is written before its step's checkpoint
        yield "save_share", "share of earlier checkpoints", saves[-1], ".1%"
    for tag, name in (("train/skipped_steps", "steps skipped"), ("train/spikes", "spikes of the loss")):
        if counts := run.column(tag):
            yield tag.removeprefix("train/"), name, counts[-1], ".0f"
