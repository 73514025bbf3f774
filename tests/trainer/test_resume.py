"""Which run may go on from which checkpoint, and what may have changed meanwhile."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import DEEPSPEED, IDENTITY, config, publish

from data_pipeline.errors import DataError
from trainer.checkpoint import read_state
from trainer.config import ConfigError
from trainer.resume import changes, identity, refuse_another_run

pytestmark = pytest.mark.usefixtures("process_group")


def test_a_run_is_not_begun_over_another(tmp_path: Path) -> None:
    refuse_another_run(tmp_path, IDENTITY, new=True)
    publish(tmp_path, 50)
    with pytest.raises(ConfigError, match="already holds a run up to step 50: leave out --new to continue it"):
        refuse_another_run(tmp_path, IDENTITY, new=True)


def test_what_a_change_means_for_evaluations_is_said() -> None:
    before = {**IDENTITY, "eval_store_fingerprint": "abc"}
    assert changes(before, {**before, "eval_store_fingerprint": "def"}) == {
        "eval_store_fingerprint": "was 'abc' and is 'def' now: evaluations may differ from here on, so that eval/* "
        "before it does not compare"
    }
    before, now = ({**IDENTITY, "data": {"mixture": {"web": {"eval_split": split}}}} for split in ("val", "test"))
    name = "data.mixture.web.eval_split"
    assert changes(before, now) == {name: "was 'val' and is 'test' now: eval/source/web/* before it does not compare"}
    assert changes(IDENTITY, now)[name] == "was not given and is 'test' now"
    of_more_rows = {**IDENTITY, "run": {**IDENTITY["run"], "eval_rows": 99}}
    assert "and is 99 now: evaluations may differ from here on" in changes(IDENTITY, of_more_rows)["run.eval_rows"]
    of_more_rows["run"]["keep_best"] = True
    assert changes(IDENTITY, of_more_rows)["run.keep_best"] == "was false and is true now"
    assert "the best checkpoint until now would be removed" in changes(IDENTITY, of_more_rows)["run.eval_rows"]


def test_nor_over_one_that_has_not_saved_yet(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    refuse_another_run(tmp_path, IDENTITY, new=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    refuse_another_run(tmp_path, IDENTITY, new=False)
    with pytest.raises(ConfigError, match="already holds a run without a checkpoint: leave out --new to continue it"):
        refuse_another_run(tmp_path, IDENTITY, new=True)


def test_what_does_not_decide_the_numbers_may_change(tmp_path: Path) -> None:
    old = json.loads(json.dumps(IDENTITY))
    del old["model"]["ff_chunk_tokens"]  # as if it were a field of a newer version
    publish(tmp_path, 50, old)
    changed = {
        **IDENTITY,
        "data": {**IDENTITY["data"], "store": "b"},
        "run": {**IDENTITY["run"], "steps": 20},
        "deepspeed": {
            "optimizer": {"params": {"lr": 2.0}},
            "train_batch_size": 4,
            "zero_optimization": {"stage": 3, "overlap_comm": True},
        },
    }
    refuse_another_run(tmp_path, changed, new=False)
    assert changes(old, changed) == {
        "data.store": "was 's' and is 'b' now",
        "run.steps": "was 9 and is 20 now: from here on the learning rate is that of a run of so many steps",
        "deepspeed.optimizer.params.lr": "was not given and is 2.0 now",
        "deepspeed.zero_optimization.stage": "was 2 and is 3 now",
        "deepspeed.zero_optimization.overlap_comm": "was false and is true now",
    }
    assert changes(old, IDENTITY) == {}
    constant = {**changed, "run": {**changed["run"], "decay": "constant"}}
    assert changes(old, constant)["run.steps"] == "was 9 and is 20 now"


def test_what_decides_about_memory_only_may_change_and_is_told(tmp_path: Path) -> None:
    """Versions before had numbers where "by device" stands now."""
    old = json.loads(json.dumps(IDENTITY))
    old["model"] |= {"ff_chunk_tokens": 4096, "loss_chunk_tokens": 2048, "keep_ends": False}
    publish(tmp_path, 50, old)
    refuse_another_run(tmp_path, IDENTITY, new=False)
    assert changes(old, IDENTITY) == {
        "model.ff_chunk_tokens": "was 4096 and is not given now",
        "model.loss_chunk_tokens": "was 2048 and is not given now",
        "model.keep_ends": "was false and is true now",
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"store_fingerprint": "xyz"}, r"'abc' and is 'xyz' now: it is another store, or was added to \(--append\)"),
        (
            {"store_fingerprint": {"books.store": "xyz"}},
            r"books.store was not given and is 'xyz' now: it is another store",
        ),
        (
            {"store_fingerprint": {"books.per_thousand": 1000}},
            "store_fingerprint.books.per_thousand was not given and is 1000",
        ),
        (
            {"store_fingerprint": {"order": 2}},
            "store_fingerprint.order was not given and is 2 now: another version of this program mixed the stores in",
        ),
        ({"train_batch_size": 8}, "train_batch_size was 4 and is 8 now"),
        ({"model": {**IDENTITY["model"], "n_layers": 3}}, "model.n_layers was 2 and is 3 now"),
        ({"run": {**IDENTITY["run"], "seed": 1}}, "run.seed was 0 and is 1 now"),
        ({"run": {**IDENTITY["run"], "init_from": "w"}}, "run.init_from was not given and is 'w' now: set it back, or"),
        (
            {"deepspeed": {**DEEPSPEED, "bf16": {"enabled": True}}},
            "deepspeed.bf16.enabled was not given and is true now",
        ),
    ],
)
def test_what_decides_them_may_not(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    publish(tmp_path, 50)
    with pytest.raises(ConfigError, match=message):
        refuse_another_run(tmp_path, {**IDENTITY, **changed}, new=False)


def test_sources_that_are_new_or_gone_are_named_once(tmp_path: Path) -> None:
    def run(**fingerprints: str) -> dict[str, Any]:
        each = {f"{name}.store": one for name, one in fingerprints.items()}
        mixture = {name: {"store": name, "weight": 1.0} for name in fingerprints}
        return {**IDENTITY, "store_fingerprint": each, "data": {**IDENTITY["data"], "mixture": mixture}}

    publish(tmp_path, 50, run(books="b", wiki="w"))
    with pytest.raises(ConfigError) as raised:
        refuse_another_run(tmp_path, run(books="b", genes="g"), new=False)
    assert [line.split(":")[0] for line in str(raised.value).splitlines()[1:]] == [
        "data.mixture.genes is new, which changes the order of the samples",
        "data.mixture.wiki is not there any more, which changes the order of the samples",
    ]
    with pytest.raises(ConfigError, match=r"store_fingerprint.wiki.store was 'w' and is 'x' now: it is another store"):
        refuse_another_run(tmp_path, run(books="b", wiki="x"), new=False)


def test_a_mixture_in_the_place_of_a_store_is_told_in_one_line(tmp_path: Path) -> None:
    mixture = {"mixture": {"books": {"store": "b", "weight": 1.0}}}
    now = {"store_fingerprint": {"books.store": "b"}, "data": {**IDENTITY["data"], **mixture}}
    publish(tmp_path, 50)
    with pytest.raises(ConfigError) as raised:
        refuse_another_run(tmp_path, {**IDENTITY, **now}, new=False)
    _, line = str(raised.value).splitlines()
    assert line.startswith("the data were one store, and are a mixture now: set them back, begin a new run with these")
    publish(tmp_path, 60, {**IDENTITY, **now})
    with pytest.raises(ConfigError, match="the data were a mixture, and are one store now: "):
        refuse_another_run(tmp_path, IDENTITY, new=False)


def test_weights_that_a_run_began_with_may_be_named_otherwise_or_not_at_all(tmp_path: Path) -> None:
    begun = {**IDENTITY, "run": {**IDENTITY["run"], "init_from": "weights"}}
    publish(tmp_path, 50, begun)
    for name in ("weights", str(Path("weights").resolve()), None):
        current = {**begun, "run": {**begun["run"], "init_from": name}}
        assert refuse_another_run(tmp_path, current, new=False) == begun
    with pytest.raises(ConfigError, match=r"run\.init_from was 'weights' and is 'others' now"):
        refuse_another_run(tmp_path, {**begun, "run": {**begun["run"], "init_from": "others"}}, new=False)


def test_damage_is_not_taken_for_another_run(tmp_path: Path) -> None:
    path = publish(tmp_path, 50) / "state.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    refuse_another_run(tmp_path, IDENTITY, new=False)
    with pytest.raises(DataError, match=r"step_00000050/state.json is not what was written"):
        read_state(path.parent)


@pytest.mark.parametrize("other", [2, 4])
def test_a_checkpoint_of_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: int) -> None:
    monkeypatch.setattr("trainer.checkpoint.FORMAT", other)
    publish(tmp_path, 50)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=f"step_00000050 is of format {other}, and this version reads 3"):
        refuse_another_run(tmp_path, IDENTITY, new=False)


def test_the_global_batch_is_fixed_however_it_is_given() -> None:
    given = ({"train_batch_size": 4}, {"train_micro_batch_size_per_gpu": 2})
    assert [identity(config(Path("r")), one, "abc", world_size=2)["train_batch_size"] for one in given] == [4, 4]
