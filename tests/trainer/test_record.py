"""What a run is, as TensorBoard shows it: texts, and a row of the table that compares runs."""

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from event_readers import events, texts
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler

from trainer.check import StoreFacts
from trainer.config import LoopConfig, RunConfig
from trainer.distributed import Launch
from trainer.job import Job
from trainer.memory import host_gib, memory_gib, peak_gib
from trainer.metrics import Metrics
from trainer.record import continued, environment, show, stops_since, write_record


def record(d_model: int) -> dict[str, Any]:
    """The object of run.json, as far as it matters here."""
    model = {"d_model": d_model, "attn_pattern": ["local", "lsh"], "d_ff": None, "tie_embeddings": True}
    return {
        "config": {"model": model, "run": {"decay": "cosine"}},
        "deepspeed": {"optimizer": {"params": {"lr": 3e-4, "betas": [0.9, 0.99]}}},
        "launch": {"world_size": 2},
        "versions": {"torch": "2.x"},
    }


def table(folder: Path) -> dict[str, api_pb2.SessionGroup]:
    """The rows of HPARAMS by the run that they are of, as TensorBoard sends them to the browser."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = Context(TBContext(data_provider=provider))
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=10, allowed_statuses=statuses)
    experiment = context.experiment_from_metadata(
        RequestContext(), "", None, context.hparams_metadata(RequestContext(), ""), None
    )
    for info in experiment.metric_infos:
        request.col_params.add(metric=info.name)
    groups = Handler(RequestContext(), context, "", request).run().session_groups
    return {group.sessions[0].name.split("/")[0]: group for group in groups}


def cell(group: api_pb2.SessionGroup, tag: str) -> float:
    return next(metric.value for metric in group.metric_values if metric.name.tag == tag)


def test_hparams_compare_runs_while_they_go_on_and_at_their_end(tmp_path: Path) -> None:
    for name, d_model, losses in (("small", 8, [5.0, 4.0]), ("large", 16, [5.0, 3.0, 2.0])):
        metrics = Metrics(tmp_path / name, 0)
        show(metrics, record(d_model))
        for step, loss in enumerate(losses):
            metrics.write(step, {"eval/loss": loss, "train/loss": loss + 0.5})
        if name == "large":
            metrics.close(finished=True)
    found = table(tmp_path)
    assert {name: cell(group, "eval/loss") for name, group in found.items()} == {"small": 4.0, "large": 2.0}
    assert cell(found["large"], "train/loss") == 2.5
    assert found["large"].sessions[0].status == api_pb2.STATUS_SUCCESS
    assert found["small"].sessions[0].status == api_pb2.STATUS_UNKNOWN
    hparams = found["large"].hparams
    assert hparams["model.d_model"].number_value == 16
    assert hparams["run.decay"].string_value == "cosine"
    assert hparams["model.attn_pattern"].string_value == '["local", "lsh"]'
    assert hparams["deepspeed.optimizer.params.lr"].number_value == pytest.approx(3e-4)
    assert "model.d_ff" not in hparams


def test_a_run_that_is_continued_stays_one_row_and_ends(tmp_path: Path) -> None:
    for first in (0, 1):
        metrics = Metrics(tmp_path / "run", first)
        show(metrics, record(8))
        metrics.write(first + 1, {"eval/loss": 4.0 - first})
        metrics.close(finished=first == 1)
    found = table(tmp_path)
    assert list(found) == ["run"]
    assert cell(found["run"], "eval/loss") == 3.0
    assert found["run"].sessions[0].status == api_pb2.STATUS_SUCCESS


def test_configuration_and_environment_as_texts(tmp_path: Path) -> None:
    for first in (0, 4, 4):  # the second start dies before it has saved anything
        metrics = Metrics(tmp_path, first)
        show(metrics, record(8))
        metrics.close()
    found = events(tmp_path)
    sides = {"config": record(8)["config"], "deepspeed": record(8)["deepspeed"]}
    sides["environment"] = {"launch": {"world_size": 2}, "versions": {"torch": "2.x"}}
    for name, side in sides.items():
        shown = texts(found, f"run/{name}")
        assert [step for step, _ in shown] == [0, 5]
        begin, *lines, end = shown[0][1].splitlines()
        assert (begin, end) == ("```json", "```")
        assert json.loads("\n".join(lines)) == side


def test_environment() -> None:
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["zarr"] == importlib.metadata.version("zarr")
    assert "git_commit" in found


def test_a_clone_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.record.PACKAGES", ("no-such-package", "zarr"))
    versions = environment()["versions"]
    assert versions["no-such-package"] is None and versions["zarr"]


def test_memory_grows_with_what_is_allocated_and_the_peak_stays() -> None:
    cpu = torch.device("cpu")
    before = memory_gib(cpu)
    assert list(before) == ["memory/allocated_gib", "memory/peak_gib", "memory/host_gib"]
    assert 0.01 < before["memory/host_gib"] < 100
    some = torch.ones(2**27)  # half a GiB
    during = host_gib()
    del some
    assert during - before["memory/host_gib"] == pytest.approx(0.5, abs=0.1)
    assert peak_gib(cpu) >= during - 0.01
    assert host_gib() < during - 0.3


def test_memory_of_a_gpu_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    found = memory_gib(torch.device("cuda:0"))
    assert (found["memory/allocated_gib"], found["memory/peak_gib"]) == (1.0, 3.0)
    assert found["memory/host_gib"] == pytest.approx(host_gib(), abs=0.1)


@pytest.mark.parametrize(
    ("device_name", "deepspeed", "peak"),
    [
        ("NVIDIA H100 PCIe", {"bf16": {"enabled": True}}, 756.5e12),
        ("NVIDIA H100 PCIe", {}, 51.2e12),
        ("CPU, 1 thread per process", {}, None),
    ],
)
def test_run_json_states_the_peak_that_mfu_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_name: str, deepspeed: dict[str, Any], peak: float | None
) -> None:
    store = MagicMock()
    monkeypatch.setattr("trainer.record.StoreFacts.of", lambda _: StoreFacts(8, 9, {"train": 1}, "sha", "abc"))
    monkeypatch.setattr("trainer.record.distributed.device_name", lambda _: device_name)
    run = LoopConfig(dir=tmp_path, deepspeed_config="x.json", steps=3)
    config = RunConfig(model={"vocab_size": 9}, data={"store": "s"}, run=run.model_dump())
    job = Job(config, deepspeed, {"": store}, SimpleNamespace(identity={"seed": 1}), Launch("none", 0, 1, 0, 1), {})
    metrics = Metrics(tmp_path, 2)
    (tmp_path / "run.json").write_text('{"config": {}, "initial_sha256": "abc"}')
    write_record(job, torch.device("cpu"), metrics, 7, {"": {"rows": "7", "since": 3}}, {"run.steps": (2, 3)}, None)
    metrics.close()
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["launch"]["peak_flops"] == peak
    assert found["launch"]["device"] == device_name
    assert (found["resumed_from_step"], found["n_parameters"], found["store"]["fingerprint"]) == (2, 7, "abc")
    assert found["evaluated"] == {"": {"rows": "7", "since": 3}} and found["stops_before_a_step"] == 0
    assert found["continued"] == [{"step": 2, "before": {"run.steps": 2}}]
    assert found["initial_sha256"] == "abc", "as the record of its beginning says"


def test_settings_of_before_are_kept_as_far_as_the_run_is(tmp_path: Path) -> None:
    assert continued(tmp_path, None, {}) == continued(tmp_path, 3, {}) == []
    before = [{"step": step, "before": {"run.steps": step}} for step in (2, 4, 6)]
    (tmp_path / "run.json").write_text(json.dumps({"config": {}, "continued": before}))
    assert continued(tmp_path, 7, {}) == before
    assert continued(tmp_path, 4, {"run.steps": 5}) == [before[0], {"step": 4, "before": {"run.steps": 5}}]
    assert continued(tmp_path, 4, {}) == before[:1], "what came after the checkpoint is forgotten"
    assert continued(tmp_path, None, {}) == []
    (tmp_path / "run.json").write_text('{"config": {}}')
    assert continued(tmp_path, 4, {"run.steps": None}) == [{"step": 4, "before": {"run.steps": None}}]


def test_stops_are_counted_until_there_is_another_checkpoint(tmp_path: Path) -> None:
    assert stops_since(tmp_path, None) == 0, "a new run"
    (tmp_path / "run.json").write_text('{"config": {}, "resumed_from_step": 2, "stops_before_a_step": 3}')
    assert [stops_since(tmp_path, step) for step in (2, 4, None)] == [3, 0, 0]
    for of_others in ("", ', "stops_before_a_step": null'):
        (tmp_path / "run.json").write_text(f'{{"config": {{}}, "resumed_from_step": null{of_others}}}')
        assert stops_since(tmp_path, None) == 0
    (tmp_path / "run.json").write_text('{"config"')
    assert stops_since(tmp_path, None) == 0
