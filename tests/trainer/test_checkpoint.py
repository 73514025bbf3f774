"""Which checkpoint is continued, what is wrong with those that are not, and what is kept; without DeepSpeed."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.ops.adam import FusedAdam
from on_disk import flip
from small_checkpoints import CPU, IDENTITY, config, engine, publish
from torch import nn

from trainer.checkpoint import (
    Checkpoint,
    SaveError,
    checked,
    load,
    problems,
    published,
    read_state,
    read_weights,
    remove_leftovers,
    save,
    sound_start,
)
from trainer.config import ConfigError
from trainer.distributed import detect
from trainer.resume import refuse_another_run
from trainer.state import SavedSlices

pytestmark = pytest.mark.usefixtures("process_group")


class Kernel:
    """In place of the C++ of DeepSpeed's FusedAdam: the same in Python, without a compiler.

    It has the powers of the betas as cpu_adam.h does: running products, in fp32, unless the step is not the next.
    """

    def __init__(self) -> None:
        self.step, self.powers = 0, torch.ones(2)

    def count(self, betas: torch.Tensor, step: int) -> None:
        if step == self.step + 1:
            self.powers = self.powers * betas
        elif step != self.step:
            self.powers = betas**step
        self.step = step

    def load(self) -> "Kernel":
        return self

    def multi_tensor_adam(self, chunk, skip, tensors, lr, beta1, beta2, eps, step, *_: Any) -> None:
        self.count(torch.tensor([beta1, beta2]), step)
        for gradient, weight, mean, square in zip(*tensors, strict=True):
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (square / (1 - self.powers[1])).sqrt()
            weight.data -= lr / (1 - self.powers[0]) * mean / (root + eps)


def fused(seed: int, steps: int, start: Path | None = None) -> Any:
    """As much of an engine with DeepSpeed's FusedAdam, after steps of it, from a checkpoint or anew."""
    torch.manual_seed(seed)
    model = nn.Linear(30, 20)
    own = SimpleNamespace(module=model, optimizer=FusedAdam(model.parameters(), lr=0.1))
    if start:
        load(own, Checkpoint(start, 0))
    for _ in range(steps):
        model(torch.ones(2, 30)).square().sum().backward()
        own.optimizer.step()
        own.optimizer.zero_grad()
    return own


@pytest.mark.parametrize("before", [0, 3, 40])
def test_deepspeeds_own_adam_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    """Its count of steps is kept with one tensor of several; without a gradient so far it has counted none."""
    monkeypatch.setattr("deepspeed.ops.adam.fused_adam.FusedAdamBuilder", Kernel)
    half = fused(0, before)
    half.optimizer.step()  # a step that is left out has no gradients
    path = save(half, config(tmp_path).run, 5, IDENTITY, {}, detect({}), CPU).path
    expected, resumed = fused(0, before + 3), fused(1, 3, path)
    assert all(map(torch.equal, resumed.module.parameters(), expected.module.parameters()))
    again = save(resumed, config(tmp_path).run, 8, IDENTITY, {}, detect({}), CPU).path
    with SavedSlices.open(again) as saved:
        assert {name: saved.whole(name, "step").item() for name in saved.shapes} == dict.fromkeys(
            ("weight", "bias"), before + 3
        )


def start(run_dir: Path, said: list[str] | None = None) -> Checkpoint | None:
    return sound_start(run_dir, detect({}), CPU, (said if said is not None else []).append)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_what_was_saved(tmp_path: Path) -> None:
    path = publish(tmp_path, 5)
    assert names(path) == ["SHA256SUMS", "rank_00000.safetensors", "state.json"]
    assert problems(path) == []
    state = read_state(path)
    assert (state["format"], state["step"], state["world_size"]) == (3, 5, 1)
    assert state["run"] == json.loads(json.dumps(IDENTITY))
    weights, expected = read_weights(path), dict(engine(5).module.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_newest_published_one_is_continued(tmp_path: Path) -> None:
    assert start(tmp_path) is None
    publish(tmp_path, 50)
    newest = publish(tmp_path, 100)
    (tmp_path / "checkpoints" / ".partial-step_00000150").mkdir()
    for other in ("step_notes", "step_200", "step_000000200", "step_٣"):
        (tmp_path / "checkpoints" / other).mkdir()
    assert [found.step for found in published(tmp_path)] == [50, 100]
    assert start(tmp_path) == Checkpoint(newest, 100)
    remove_leftovers(tmp_path)
    assert not list(newest.parent.glob(".partial-*"))
    assert names(newest.parent)[:3] == ["step_000000200", "step_00000050", "step_00000100"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_any(path: Path) -> None:
    flip(path, random.randrange(path.stat().st_size), random.randrange(8))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def replace_by_another(path: Path) -> None:
    shutil.copy(path.parent.with_name("step_00000050") / path.name, path)


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (cut, empty, flip_any, append, replace_by_another, make_a_folder, Path.unlink)


@pytest.mark.parametrize("name", ["state.json", "rank_00000.safetensors", "SHA256SUMS"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_one_is_put_aside_and_the_one_before_is_continued(
    tmp_path: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(8):
        random.seed(seed)
        shutil.rmtree(tmp_path, ignore_errors=True)
        before, newest = publish(tmp_path, 50), publish(tmp_path, 100)
        damage(newest / name)
        assert problems(newest) != []
        refuse_another_run(tmp_path, IDENTITY, new=False)
        said: list[str] = []
        assert start(tmp_path, said) == Checkpoint(before, 50)
        aside = newest.with_name("damaged-step_00000100")
        assert said == [f"put aside as {aside}; trying the checkpoint before it"]
        assert aside.is_dir() and not newest.exists()
        assert f"damaged checkpoint {newest}: " in capsys.readouterr().out


@pytest.mark.parametrize(("before", "after"), [(b"n\n", b"n"), (b"s\n", b"s\x0b"), (b"n\n", b"n\n#")])
def test_not_even_a_line_break_goes_unnoticed(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = publish(tmp_path, 50)
    sums = path / "SHA256SUMS"
    sums.write_bytes(sums.read_bytes().replace(before, after))
    assert problems(path) != []


def test_what_is_damaged_and_cannot_be_put_aside_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish(tmp_path, 50)
    flip_any(path / "state.json")

    def fail(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ConfigError, match=r"cannot rename .*step_00000050, which is damaged: Permission denied"):
        start(tmp_path)


def test_a_file_that_does_not_belong_there_is_damage(tmp_path: Path) -> None:
    path = publish(tmp_path, 50)
    (path / "rank_00001.safetensors").write_bytes(b"")
    assert problems(path) == ["rank_00001.safetensors does not belong there"]


def test_sums_that_do_not_name_the_weights_are_damage(tmp_path: Path) -> None:
    path = publish(tmp_path, 50)
    _, line = (path / "SHA256SUMS").read_text().splitlines(keepends=True)
    (path / "SHA256SUMS").write_text(line)
    (path / "rank_00000.safetensors").unlink()
    assert problems(path) == ["SHA256SUMS does not name what every checkpoint has"]


def test_one_that_a_run_removes_while_it_is_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, newest = publish(tmp_path, 50), publish(tmp_path, 100)

    def remove(path: Path) -> list[str]:
        shutil.rmtree(newest, ignore_errors=True)
        return problems(path)

    monkeypatch.setattr("trainer.checkpoint.problems", remove)
    assert list(checked(tmp_path)) == [(Checkpoint(before, 50), [])]


def test_each_rank_reads_its_share(tmp_path: Path) -> None:
    path = publish(tmp_path, 50)
    flip_any(path / "rank_00000.safetensors")
    found = [problems(path, share, 2) for share in (0, 1)]
    assert sorted(map(len, found)) == [0, 1]


def test_where_none_is_sound_nothing_is_begun_silently(tmp_path: Path) -> None:
    flip_any(publish(tmp_path, 50) / "rank_00000.safetensors")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"no checkpoint of .* is sound: damaged-step_00000050 are damaged"):
            start(tmp_path)


def test_saved_again_after_damage_it_is_sound(tmp_path: Path) -> None:
    publish(tmp_path, 50)
    flip_any(publish(tmp_path, 100) / "state.json")
    assert start(tmp_path) is not None
    assert problems(publish(tmp_path, 100)) == []


def test_damaged_again_it_is_put_aside_again(tmp_path: Path) -> None:
    before = publish(tmp_path, 50)
    for _ in range(2):
        flip_any(publish(tmp_path, 100) / "state.json")
        assert start(tmp_path) == Checkpoint(before, 50)


def test_what_an_interrupted_save_left_is_no_part_of_the_next(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".partial-step_00000050"
    left.mkdir(parents=True)
    (left / "rank_00001.safetensors").write_bytes(b"")
    assert problems(publish(tmp_path, 50)) == []


def test_a_rank_with_nothing_to_write_has_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.state.local_slices", lambda engine: {})
    path = publish(tmp_path, 50)
    assert names(path) == ["SHA256SUMS", "state.json"]
    assert "rank_00000" not in (path / "SHA256SUMS").read_text()


def test_what_a_node_does_not_see_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish(tmp_path, 50)
    monkeypatch.setattr(Path, "is_dir", lambda self: self != path)  # as on a node without the file system
    with pytest.raises(ConfigError, match=rf"{path} exists for rank 0, but not on "):
        start(tmp_path)
    monkeypatch.undo()
    assert [checkpoint.path for checkpoint in published(tmp_path)] == [path]


def test_others_may_read_all_files_as_the_user_lets_them(tmp_path: Path) -> None:
    path = publish(tmp_path, 50)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_the_last_ones_and_every_so_manyth_are_kept(tmp_path: Path) -> None:
    for step in range(1, 9):
        publish(tmp_path, step, keep_last=2, keep_every=3)
    assert [found.step for found in published(tmp_path)] == [3, 6, 7, 8]
    assert names(tmp_path / "checkpoints") == [f"step_{step:08d}" for step in (3, 6, 7, 8)]


def test_one_that_cannot_be_removed_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = publish(tmp_path, 1, keep_last=1)
    rename = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path == first:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    publish(tmp_path, 2, keep_last=1)
    assert f"note: cannot remove {first}, which need not be kept: Device or resource busy" in capsys.readouterr().out
    publish(tmp_path, 3, keep_last=1)
    assert [found.step for found in published(tmp_path)] == [1, 3]


def test_none_is_removed_for_one_that_may_be_worse(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    save(engine(), config(tmp_path, keep_last=1).run, 2, IDENTITY, {}, detect({}), CPU, removes=False)
    assert [found.step for found in published(tmp_path)] == [1, 2]


def test_of_a_link_to_another_disk_the_link_is_removed(tmp_path: Path) -> None:
    path = publish(tmp_path, 1)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert start(tmp_path) == Checkpoint(path, 1)
    publish(tmp_path, 2, keep_last=1)
    assert names(path.parent) == ["step_00000002"]
    assert problems(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("free", [1000, 500_000], ids=["not for the tensors", "for them alone"])
def test_without_room_nothing_is_written_and_the_message_says_how_much_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    publish(tmp_path, 50)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    says = rf"step_00000060, of [\d,]+ bytes: .* has {free:,} bytes left, and .* are needed"
    with pytest.raises(SaveError, match=says):
        publish(tmp_path, 60)
    assert names(tmp_path / "checkpoints") == ["step_00000050"]


@pytest.mark.parametrize("failing", ["save_file", "hash_file", "_sync", "_publish"])
def test_a_save_that_fails_anywhere_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    publish(tmp_path, 50)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"trainer.checkpoint.{failing}", fail)
    with pytest.raises(SaveError, match="No space left on device"):
        publish(tmp_path, 60)
    assert names(tmp_path / "checkpoints") == ["step_00000050"]
    monkeypatch.undo()
    assert problems(publish(tmp_path, 60)) == []
