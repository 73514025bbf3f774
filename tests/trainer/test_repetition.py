"""A run that is begun again out of the folder of one: what is said of where it will not be the same."""

import json
from pathlib import Path

import torch
from evaluation import config
from small_stores import write_store

from data_pipeline.store import Store
from reformer import Reformer, save_model
from trainer.initial import folder_sha256
from trainer.repetition import repetition_notes


def test_other_weights_and_settings_that_were_changed_on_the_way(tmp_path: Path) -> None:
    model, run_dir = Reformer(config().model), tmp_path / "run"
    save_model(tmp_path / "model", model.config, model.state_dict())
    run_dir.mkdir()
    write_store(tmp_path / "store", {"a": b"text"})
    store = Store.open(tmp_path / "store")
    record = {"config": {}, "continued": [], "initial_sha256": folder_sha256(tmp_path / "model")}
    record |= {"store": {"fingerprint": store.manifest.fingerprint}, "samples": {"web.store": "another"}}
    (run_dir / "run.json").write_text(json.dumps(record))
    again = config(run={"dir": tmp_path / "again", "init_from": tmp_path / "model"})
    assert repetition_notes(run_dir, again, {"": store}) == []
    assert repetition_notes(run_dir, again, {"": store, "new": store}) == []
    added_to = [f"{store.path} is not the store that {run_dir} read: it was built anew, or added to"]
    assert repetition_notes(run_dir, again, {"": store, "web": store}) == added_to
    with torch.no_grad():
        model.head.bias += 1
    save_model(tmp_path / "other", model.config, model.state_dict())
    other = config(run={"dir": tmp_path / "again", "init_from": tmp_path / "other"})
    changes = [{"step": step, "before": {name: 7}} for step, name in ((3, "run.steps"), (5, "run.log_every"))]
    (run_dir / "run.json").write_text(json.dumps({**record, "continued": changes}))
    write_store(tmp_path / "larger", {"a": b"text", "b": b"more"})
    larger = Store.open(tmp_path / "larger")
    assert repetition_notes(run_dir, other, {"": larger}) == [
        f"{run_dir} went on with other settings at step 3, before which run.steps was 7; what begins with its last "
        "ones may be another run",
        f"{larger.path} is not the store that {run_dir} read: it was built anew, or added to",
        f"run.init_from={tmp_path}/other holds other weights than those that {run_dir} began with",
    ]
    assert len(repetition_notes(run_dir, config(run={"dir": tmp_path / "again"}), {"": store})) == 1
    (run_dir / "run.json").write_text('{"config": {}}')
    assert repetition_notes(run_dir, other, {"": store, "web": store}) == [], (
        "of an earlier version, which says nothing"
    )
