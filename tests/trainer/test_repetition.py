"""A run that is begun again out of the folder of one: what is said of where it will not be the same."""

import json
from pathlib import Path

import torch
from evaluation import config

from reformer import Reformer, save_model
from trainer.initial import folder_sha256
from trainer.repetition import repetition_notes


def test_other_weights_and_settings_that_were_changed_on_the_way(tmp_path: Path) -> None:
    model, run_dir = Reformer(config().model), tmp_path / "run"
    save_model(tmp_path / "model", model.config, model.state_dict())
    run_dir.mkdir()
    record = {"config": {}, "continued": [], "initial_sha256": folder_sha256(tmp_path / "model")}
    (run_dir / "run.json").write_text(json.dumps(record))
    again = config(run={"dir": tmp_path / "again", "init_from": tmp_path / "model"})
    assert repetition_notes(run_dir, again) == []
    with torch.no_grad():
        model.head.bias += 1
    save_model(tmp_path / "other", model.config, model.state_dict())
    other = config(run={"dir": tmp_path / "again", "init_from": tmp_path / "other"})
    changes = [{"step": step, "before": {name: 7}} for step, name in ((3, "run.steps"), (5, "run.log_every"))]
    (run_dir / "run.json").write_text(json.dumps({**record, "continued": changes}))
    assert repetition_notes(run_dir, other) == [
        f"{run_dir} went on with other settings at step 3, before which run.steps was 7; what begins with its last "
        "ones is not the same run",
        f"run.init_from={tmp_path}/other holds other weights than those that {run_dir} began with",
    ]
    assert len(repetition_notes(run_dir, config(run={"dir": tmp_path / "again"}))) == 1
