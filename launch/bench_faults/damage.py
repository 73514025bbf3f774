"""Damaged checkpoints: the part `damage` of `python launch/benchmark.py faults`.

Every file of the newest checkpoint of a finished run of two ranks, and in one case out of four of the newest two, in
every way: cut short, emptied, removed, one bit flipped, a block of zeros, the same file of the checkpoint before,
another file of this one, a file too many. Each time the trainer's own choice of where to start (checkpoint.sound_start)
must say what is wrong, put the checkpoint aside and take the one before it. One case in fifteen is also started by the
command itself, on two ranks, and must end with the same curve.
"""

import io
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from bench_faults.jobs import Run, tail, wait
from bench_faults.kills import flaw
from bench_faults.runs import Bench, Undisturbed
from trainer import checkpoint
from trainer.config import ConfigError
from trainer.distributed import Launch

MODE, VARIANT = "deepspeed", "ZeRO-2, dropout"
RUN_EVERY = 15
BLOCK = 4096


@dataclass
class Damage:
    """One damage, and who noticed."""

    what: str
    file: str
    """Its name; of one that was added, its new name."""
    checkpoints: int
    """How many were damaged: the newest, or the newest two."""
    said: str
    """The first thing that checkpoint.problems finds; empty if it finds nothing."""
    started_from: int | None
    """Step that the trainer's choice was; None if it refused to start."""
    expected: int
    """Step of the newest checkpoint that was not damaged."""
    aside: int
    """Checkpoints that were put aside and reported."""
    ended: str = ""
    """What came of the whole run, where it was started: "identical", or what went wrong."""

    @property
    def passed(self) -> bool:
        right = self.started_from == self.expected and self.aside == self.checkpoints
        return bool(self.said) and right and self.ended in ("", "identical")


def cut_short(path: Path, before: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(1, len(content))])


def emptied(path: Path, before: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def removed(path: Path, before: Path, rng: random.Random) -> None:
    path.unlink()


def bit_flipped(path: Path, before: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def zeros(path: Path, before: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    begin = rng.randrange(len(content))
    stop = min(begin + BLOCK, len(content))
    if not any(content[begin:stop]):  # a place that was zero anyway would be no damage
        begin, stop = 0, min(BLOCK, len(content))
    content[begin:stop] = bytes(stop - begin)
    path.write_bytes(content)


def of_before(path: Path, before: Path, rng: random.Random) -> None:
    shutil.copyfile(before / path.name, path)


def of_another(path: Path, before: Path, rng: random.Random) -> None:
    others = [other for other in sorted(path.parent.iterdir()) if other != path]
    shutil.copyfile(rng.choice(others), path)


def one_too_many(path: Path, before: Path, rng: random.Random) -> None:
    name = rng.choice(("rank_00002.safetensors", "state.json.partial", "core", f".{path.name}.swp"))
    shutil.copyfile(path, path.with_name(name))


WAYS: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "cut short": cut_short,
    "emptied": emptied,
    "removed": removed,
    "bit flipped": bit_flipped,
    "block of zeros": zeros,
    "that of the checkpoint before": of_before,
    "another file of this one": of_another,
    "one too many": one_too_many,
}


def damage(template: Run, folder: Path, file: str, way: str, depth: int, rng: random.Random) -> tuple[Damage, Run]:
    """Damages a copy of a run's newest checkpoints, so many, and asks the trainer where it would start."""
    run = replace(template, dir=folder)
    shutil.copytree(template.dir, folder)
    *_, before, last, newest = checkpoint.published(folder)
    for victim, older in ((newest, last), (last, before))[:depth]:
        WAYS[way](victim.path / file, older.path, rng)
    said = [line for victim in (newest, last)[:depth] for line in checkpoint.problems(victim.path)[:1]]
    return Damage(
        way, file, depth, said[0] if len(said) == depth else "", None, (newest, last, before)[depth].step, 0
    ), run


def choose(found: Damage, run: Run) -> None:
    """Fills in what the trainer chooses in this run's folder."""
    with suppress(ConfigError), redirect_stdout(io.StringIO()):  # it tells what is damaged
        chosen = checkpoint.sound_start(run.dir, Launch("no launcher"), torch.device("cpu"), lambda line: None)
        found.started_from = chosen.step if chosen else 0
    found.aside = aside(run)


def start(found: Damage, run: Run, bench: Bench, length: Undisturbed) -> None:
    """Fills in what comes of this run when it is started."""
    job = bench.start(MODE, run)
    code = wait(job, run)
    text = job.log.read_text(errors="replace")
    steps = [int(step) for step in re.findall(r"continuing from \S*step_(\d+)", text)]
    found.started_from = steps[0] if steps else None
    found.aside = aside(run) if text.count("put aside as ") == aside(run) else 0
    problem = flaw(run, length, code)
    found.ended = f"{problem}: {tail(job)}" if problem else "identical"


def aside(run: Run) -> int:
    return len(list((run.dir / "checkpoints").glob("damaged-step_*")))


@contextmanager
def process_group() -> Iterator[None]:
    """This process alone, for what asks all ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def damages(bench: Bench, times: int, seed: int) -> Iterator[Damage]:
    """So many damages, every file and way in turn."""
    rng, length = random.Random(seed), bench.undisturbed(MODE, VARIANT)
    files = sorted(path.name for path in checkpoint.published(length.run.dir)[-1].path.iterdir())
    turns = [(file, way) for way in WAYS for file in files]
    with process_group():
        for number in range(times):
            folder = bench.folder / f"damaged-{number}"
            depth = 2 if rng.random() < 0.25 else 1
            found, run = damage(length.run, folder, *turns[number % len(turns)], depth, rng)
            if number % RUN_EVERY == 0:
                start(found, run, bench, length)
            else:
                choose(found, run)
            shutil.rmtree(folder)
            yield found


def table(found: Sequence[Damage]) -> str:
    """A line for each file and way."""
    cells: dict[tuple[str, str], list[Damage]] = {}
    for each in found:
        cells.setdefault((each.file, each.what), []).append(each)
    rows = [f"{'file':<26}{'damage':<31}{'times':>6}{'recovered':>11}{'run to the end':>16}"]
    for (file, what), some in sorted(cells.items()):
        ended = sum(each.ended == "identical" for each in some)
        rows.append(f"{file:<26}{what:<31}{len(some):>6}{sum(each.passed for each in some):>11}{ended:>16}")
    rows += [f"FAILED: {each}" for each in found if not each.passed]
    return "\n".join(rows)
