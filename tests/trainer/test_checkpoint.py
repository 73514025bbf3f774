"""Which checkpoint is the newest, and what keeps a run from continuing; without DeepSpeed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.checkpoint import TAG, identity, nvme_note, published, remove_leftovers, save, starting_point
from trainer.config import ConfigError, RunConfig
from trainer.distributed import detect

IDENTITY: dict[str, Any] = {
    "store_fingerprint": "abc",
    "world_size": 2,
    "train_batch_size": 4,
    "model": {"n_layers": 2, "axial_shape": [2, 4]},
    "data": {"store": "a", "train_split": "train"},
    "run": {"seed": 0, "steps": 10},
    "deepspeed": {"train_batch_size": 4, "zero_optimization": {"stage": 2, "overlap_comm": False}},
}


def publish(run_dir: Path, step: int, identity: dict[str, Any] = IDENTITY) -> Path:
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    (path / TAG).mkdir(parents=True)
    (path / TAG / "weights").write_bytes(b"1234")
    state = {"step": step, "run": identity, "n_bytes": {"weights": 4}}
    (path / "state.json").write_text(json.dumps(state))
    return path


def test_the_newest_published_one_is_continued(tmp_path: Path) -> None:
    assert starting_point(tmp_path, IDENTITY, resume=True) is None
    publish(tmp_path, 50)
    newest = publish(tmp_path, 100)
    (tmp_path / "checkpoints" / ".partial-step_00000150").mkdir()
    (tmp_path / "checkpoints" / "step_notes").mkdir()
    assert [found.step for found in published(tmp_path)] == [50, 100]
    start = starting_point(tmp_path, IDENTITY, resume=True)
    assert start is not None
    assert (start.path, start.step) == (newest, 100)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step_00000050", "step_00000100", "step_notes"]


def test_a_run_is_not_begun_over_another(tmp_path: Path) -> None:
    publish(tmp_path, 50)
    with pytest.raises(ConfigError, match="already holds a run up to step 50: continue it with --resume"):
        starting_point(tmp_path, IDENTITY, resume=False)


def test_what_does_not_decide_the_numbers_may_change(tmp_path: Path) -> None:
    publish(tmp_path, 50)
    changed = {
        **IDENTITY,
        "model": {"axial_shape": (2, 4), "n_layers": 2},
        "data": {"store": "b", "train_split": "train"},
        "run": {"seed": 0, "steps": 20},
        "deepspeed": {"train_batch_size": 4, "zero_optimization": {"stage": 2, "overlap_comm": True}},
    }
    assert starting_point(tmp_path, changed, resume=True) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store_fingerprint": "xyz"}, r"'abc' and is 'xyz' now: it is another store, or was added to \(--append\)"),
        ({"store_fingerprint": {"books.store": "xyz"}}, r"books.store was None and is 'xyz' now: it is another store"),
        (
            {"store_fingerprint": {"books.per_thousand": 1000}},
            "store_fingerprint.books.per_thousand was None and is 1000",
        ),
        ({"world_size": 1}, "world_size was 2 and is 1 now"),
        ({"train_batch_size": 8}, "train_batch_size was 4 and is 8 now"),
        ({"model": {"n_layers": 3, "axial_shape": [2, 4]}}, "model.n_layers was 2 and is 3 now"),
        ({"run": {"seed": 1}}, "run.seed was 0 and is 1 now"),
        (
            {"deepspeed": {"train_batch_size": 4, "zero_optimization": {"stage": 3}}},
            "deepspeed.zero_optimization.stage was 2 and is 3 now",
        ),
        (
            {"deepspeed": {**IDENTITY["deepspeed"], "bf16": {"enabled": True}}},
            "deepspeed.bf16.enabled was None and is True now",
        ),
    ],
)
def test_what_decides_them_may_not(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    publish(tmp_path, 50)
    with pytest.raises(ConfigError, match=message):
        starting_point(tmp_path, {**IDENTITY, **changes}, resume=True)


@pytest.mark.parametrize("text", ['{"step": 5', "{}", '{"step": 4, "run": []}', '{"run": {}, "n_bytes": 3}', "[]"])
def test_a_damaged_state_is_named(tmp_path: Path, text: str) -> None:
    (publish(tmp_path, 50) / "state.json").write_text(text)
    with pytest.raises(ConfigError, match=r"step_00000050 is damaged: state.json.*Remove that folder"):
        starting_point(tmp_path, IDENTITY, resume=True)


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    weights = publish(tmp_path, 50) / TAG / "weights"
    weights.write_bytes(b"123")
    with pytest.raises(ConfigError, match="is damaged: deepspeed/weights has 3 bytes instead of 4"):
        starting_point(tmp_path, IDENTITY, resume=True)
    weights.unlink()
    with pytest.raises(ConfigError, match="is damaged: deepspeed/weights is missing"):
        starting_point(tmp_path, IDENTITY, resume=True)


def test_files_in_folders_of_deepspeeds_are_counted_and_folders_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_checkpoint(path: str, tag: str) -> None:
        for name in ("weights", "offloaded_tensors/rank0/optimizer/moment.swp"):
            (Path(path) / tag / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(path) / tag / name).write_bytes(b"1234")

    monkeypatch.setattr("trainer.checkpoint.barrier", lambda _: None)
    engine: Any = SimpleNamespace(save_checkpoint=save_checkpoint)
    path = save(engine, tmp_path, 50, IDENTITY, 3, detect({}), torch.device("cpu"))
    sizes = json.loads((path / "state.json").read_text())["n_bytes"]
    assert sizes == {"weights": 4, "offloaded_tensors/rank0/optimizer/moment.swp": 4}
    assert starting_point(tmp_path, IDENTITY, resume=True) is not None
    (path / TAG / "offloaded_tensors/rank0/optimizer/moment.swp").unlink()
    with pytest.raises(ConfigError, match=r"deepspeed/offloaded_tensors/rank0/optimizer/moment.swp is missing"):
        starting_point(tmp_path, IDENTITY, resume=True)


def offloading(**devices: str) -> dict[str, Any]:
    parts = {f"offload_{part}": {"device": device} for part, device in devices.items()}
    return {"zero_optimization": {"stage": 3, **parts}}


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"optimizer": "nvme"}, {"optimizer": "nvme"}, "offload_optimizer.device='nvme', .*: start anew in another"),
        ({"optimizer": "nvme"}, {"optimizer": "cpu"}, "offload_optimizer.device='nvme', .*: start anew in another"),
        ({"optimizer": "cpu"}, {"optimizer": "nvme"}, "offload_optimizer.device='nvme': .*; set the device to 'cpu'"),
        ({"param": "nvme"}, {"param": "nvme"}, "offload_param.device='nvme': .*; set the device to 'cpu'"),
    ],
)
def test_what_is_on_nvme_is_not_continued_and_not_called_damaged(
    tmp_path: Path, before: dict[str, str], now: dict[str, str], message: str
) -> None:
    weights = publish(tmp_path, 50, {**IDENTITY, "deepspeed": offloading(**before)}) / TAG / "weights"
    # Checkpoints written before folders were left out of the list of files have such an entry.
    weights.unlink()
    weights.mkdir()
    with pytest.raises(ConfigError, match=f"cannot continue from .*step_00000050.* with .*{message}"):
        starting_point(tmp_path, {**IDENTITY, "deepspeed": offloading(**now)}, resume=True)


def test_parameters_that_were_on_nvme_go_on_from_the_cpu(tmp_path: Path) -> None:
    publish(tmp_path, 50, {**IDENTITY, "deepspeed": offloading(param="nvme", optimizer="cpu")})
    current = {**IDENTITY, "deepspeed": offloading(param="cpu", optimizer="cpu")}
    assert starting_point(tmp_path, current, resume=True) is not None


def test_how_a_run_can_be_continued_is_noted_where_it_needs_saying() -> None:
    assert nvme_note({}) == nvme_note(offloading(optimizer="cpu", param="none")) == ""
    assert "offload_optimizer.device='nvme' this run cannot be continued" in nvme_note(offloading(optimizer="nvme"))
    assert "offload_param.device='nvme', set the device to 'cpu' to continue" in nvme_note(offloading(param="nvme"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to run.dir=.*file/run: Not a directory: choose another"):
        starting_point(tmp_path / "file" / "run", IDENTITY, resume=False)


@pytest.mark.parametrize(
    ("deepspeed", "expected"),
    [
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1}, 8),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 12),
        ({"train_micro_batch_size_per_gpu": 2}, 4),
    ],
)
def test_the_global_batch_is_fixed_however_it_is_given(deepspeed: dict[str, int], expected: int) -> None:
    config = RunConfig(
        model={"vocab_size": 9}, data={"store": "s"}, run={"dir": "r", "deepspeed_config": "x.json", "steps": 1}
    )
    assert identity(config, deepspeed, "abc", world_size=2)["train_batch_size"] == expected
