"""What a checkpoint holds is read by any number of ranks under any ZeRO stage; by the same ones to the bit.

What is special: each number of ranks is one launch that goes through all its cases, since DeepSpeed takes longer to
import than a case to run.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nvme
import pytest
import torch
from workers import run_workers
from zero_matrix import Case

from trainer.checkpoint import problems, published, read_weights
from trainer.state import WEIGHT, SavedSlices

STEPS, MORE = 3, 2
CASES = {
    "zero0": Case(0, dropout=0.1),
    "zero0-bf16": Case(0, bf16=True),
    "zero1": Case(1, 2, tied=True),
    "zero2": Case(2, 2, dropout=0.1),
    "zero2-bf16": Case(2, 2, bf16=True, tied=True),
    "zero3": Case(3, 2, dropout=0.1),
    "zero3-bf16": Case(3, bf16=True),
    "zero2-cpu": Case(2, 2, variant="cpu-optimizer"),
    "zero3-cpu": Case(3, 2, variant="cpu-parameters"),
    "adafactor": Case(0, 2, dropout=0.1, optimizer="Adafactor"),
    "adafactor-bf16": Case(0, bf16=True, optimizer="Adafactor"),
}
DRIVE = {"variant": "nvme-optimizer", "large": True}
DRIVE_WEIGHTS = {"variant": "nvme-parameters", "large": True}
FROM = "zero2"
"""The case whose checkpoint, of each number of ranks, all others of the same model and precision go on from."""

Task = Mapping[str, Any]


def task(case: Case, load: Path | None, first: int, steps: int, save: Path | None, weights: Path | None = None) -> Task:
    return {
        "case": asdict(case),
        "load": load and str(load),
        "weights": weights and str(weights),
        "first": first,
        "steps": steps,
        "save": save and str(save),
    }


def flat(steps: list[list[float]]) -> list[float]:
    return [number for step in steps for number in step]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, list[Task]], list[Any]]:
    """launch(ranks, tasks): the losses and norms of each task."""

    def run(ranks: int, tasks: list[Task]) -> list[Any]:
        folder = tmp_path_factory.mktemp("launch")
        (folder / "plan.json").write_text(json.dumps(tasks))
        paths = [folder / name for name in ("plan.json", "rendezvous", "output.json")]
        arguments = [(*paths, rank, ranks) for rank in range(ranks)]
        run_workers(Path(__file__).with_name("state_worker.py"), folder, arguments)
        return json.loads((folder / "output.json").read_text())

    return run


@pytest.fixture(scope="module")
def saved(launch, tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, int], tuple[Path, list[Any]]]:
    """For each case and number of ranks: its checkpoint after STEPS, and what STEPS + MORE without a break are."""
    folder = tmp_path_factory.mktemp("saved")
    found = {}
    for ranks in (1, 2):
        cases = CASES if ranks == 2 else {name: CASES[name] for name in ("zero0", FROM, "zero3", "adafactor")}
        tasks = []
        for name, case in cases.items():
            path = folder / f"{name}-{ranks}"
            tasks += [task(case, None, 0, STEPS + MORE, None), task(case, None, 0, STEPS, path)]
        results = launch(ranks, tasks)
        for name, whole, part in zip(cases, results[::2], results[1::2], strict=True):
            assert isinstance(whole, list), whole
            assert part == whole[:STEPS]
            (only,) = published(folder / f"{name}-{ranks}")
            found[name, ranks] = (only.path, whole)
    return found


def test_they_are_sound_and_name_every_element_once(saved) -> None:
    for path, steps in saved.values():
        assert problems(path) == []
        weights = read_weights(path)
        *_, norm = steps[STEPS - 1]
        assert norm**2 == pytest.approx(sum(weight.double().square().sum().item() for weight in weights.values()))
        with SavedSlices.open(path) as slices:
            for (name, kind), entries in slices._found.items():
                if kind in (WEIGHT, "exp_avg", "exp_avg_sq"):
                    sizes = [file.get_slice(key).get_shape()[0] for _, file, key in entries]
                    assert [begin for begin, _, _ in entries] == [sum(sizes[:i]) for i in range(len(sizes))]
                    assert sum(sizes) == weights[name].numel()


def test_the_same_ranks_and_stage_go_on_to_the_bit(saved, launch) -> None:
    for ranks in (1, 2):
        own = [(name, path, steps[STEPS:]) for (name, n), (path, steps) in saved.items() if n == ranks]
        results = launch(ranks, [task(CASES[name], path, STEPS, MORE, None) for name, path, _ in own])
        for (name, _, more), result in zip(own, results, strict=True):
            assert result == more, name


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (2, 4), (2, 2)])
def test_other_ranks_and_stages_go_on(saved, launch, before: int, now: int) -> None:
    path, steps = saved[FROM, before]
    # Of the same model: no dropout differs, no tied embeddings.
    cases = [Case(stage, 4 // now if stage else 1, dropout=0.1) for stage in (0, 1, 2, 3)]
    results = launch(now, [task(case, path, STEPS, MORE, None) for case in cases])
    for case, result in zip(cases, results, strict=True):
        assert isinstance(result, list), result
        assert flat(result) == pytest.approx(flat(steps[STEPS:]), rel=1e-5), str(case)


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_adafactor_goes_on_with_other_ranks(saved, launch, before: int, now: int) -> None:
    path, steps = saved["adafactor", before]
    (result,) = launch(now, [task(CASES["adafactor"], path, STEPS, MORE, None)])
    assert flat(result) == pytest.approx(flat(steps[STEPS:]), rel=1e-5)
    with SavedSlices.open(path) as slices:
        kinds = {kind for _, kind in slices._found}
    assert kinds == {WEIGHT, "step", "row_var", "col_var", "variance"}


def test_reading_and_writing_again_changes_nothing(saved, launch, tmp_path: Path) -> None:
    """No step between the two: every number of the new checkpoint is the old one's, whoever has cut it how."""
    path, _ = saved[FROM, 2]
    cases = {f"zero{stage}": Case(stage, 4, dropout=0.1) for stage in (0, 1, 2, 3)}
    launch(1, [task(case, path, STEPS, 0, tmp_path / name) for name, case in cases.items()])
    expected = digest(path)
    for name in cases:
        (copy,) = published(tmp_path / name)
        assert digest(copy.path) == expected, name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_alone_begin_a_run_under_every_stage(saved, launch, tmp_path: Path, tied: bool) -> None:
    """In full precision, to the bit; with an optimizer that has not taken a step, so that all stages part alike."""
    own = {name: case for name, case in CASES.items() if case.tied == tied}
    path, _ = saved["zero1" if tied else FROM, 2]
    of_fp32 = {name: case for name, case in own.items() if not case.bf16 and case.optimizer == "AdamW"}
    plain = [replace(case, dropout=0.0) for case in of_fp32.values()]
    tasks = [task(case, None, 0, 0, tmp_path / name, path) for name, case in own.items()]
    tasks += [task(case, None, 0, MORE, None, path) for case in plain]
    results = launch(2, [*tasks, task(plain[0], None, 0, MORE, None)])
    begun, (first, *others), random = results[: len(own)], results[len(own) : -1], results[-1]
    assert begun == [[]] * len(own)
    for name in own:
        (copy,) = published(tmp_path / name)
        assert digest(copy.path, [WEIGHT]) == digest(path, [WEIGHT]), name
    assert flat(first) != pytest.approx(flat(random), rel=1e-2)
    for name, other in zip(list(of_fp32)[1:], others, strict=True):
        assert flat(other) == pytest.approx(flat(first), rel=1e-5), name


def digest(path: Path, kinds: Sequence[str] = (WEIGHT, "exp_avg", "exp_avg_sq")) -> str:
    """Of all numbers, by parameter and kind, however they are cut."""
    total = hashlib.sha256()
    with SavedSlices.open(path) as saved:
        for name, shape in saved.shapes.items():
            for kind in kinds:
                total.update(saved.read(name, kind, 0, torch.Size(shape).numel()).numpy().tobytes())
            if "exp_avg" in kinds:
                total.update(str(saved.whole(name, "step").item()).encode())
    return total.hexdigest()


@pytest.mark.parametrize("case", [Case(3, 2, dropout=0.1, **DRIVE), Case(3, 2, bf16=True, **DRIVE_WEIGHTS)], ids=str)
def test_from_a_drive_and_back(launch, tmp_path: Path, case: Case) -> None:
    """ZeRO-Infinity: what lives on NVMe is saved and continued like the rest."""
    if reason := nvme.why_not():
        pytest.skip(reason)
    whole, part = launch(2, [task(case, None, 0, STEPS + MORE, None), task(case, None, 0, STEPS, tmp_path / "a")])
    assert isinstance(part, list), part
    (only,) = published(tmp_path / "a")
    plain = replace(case, variant="")
    tasks = [task(c, only.path, STEPS, MORE, None) for c in (case, plain)]
    again, elsewhere, _ = launch(2, [*tasks, task(case, None, 0, 0, tmp_path / "b", only.path)])
    (begun,) = published(tmp_path / "b")
    assert digest(begun.path, [WEIGHT]) == digest(only.path, [WEIGHT])
    assert again == whole[STEPS:]
    assert flat(elsewhere) == pytest.approx(flat(whole[STEPS:]), rel=1e-5)
