"""What a run is, for those who look at it later: RUN/run.json, and the same in TensorBoard.

RUN/run.json: one object, written before the first step.

    started, resumed_from_step          ISO time; null unless resumed
    continued                           [{step, before: {name: value}}] of each resume with other settings: after which
                                        step, and what they were until then, null where not given; names as in
                                        "config", and deepspeed.… as in "deepspeed"
    initial_sha256                      of the weights in run.init_from that it began with (initial.weights_sha256);
                                        null without that, or if an earlier version began it
    stops_before_a_step                 starts since the last checkpoint that were asked to stop before their first step
    config, deepspeed                   the resolved TOML side {model, data, run} and DeepSpeed's JSON
    store                               of data.store: {seq_len, vocab_size, rows: {split: number}, tokenizer_sha256,
                                        fingerprint, bos, eos}
    samples                             what the order of the samples follows from: seed, and store (its fingerprint)
                                        and split; of a mixture NAME.store, … and NAME.per_thousand of each source,
                                        and order, the version of how they are mixed
    launch                              {launcher, world_size, local_world_size, device, and peak_flops: what one such
                                        device could compute in a second (peaks.py); null if unknown, then no MFU}
    n_parameters                        of the model
    evaluated                           what evaluations are of, by the name of the mixture's store, "" for data.store:
                                        {rows: which rows, n_hashes: by how many rounds, null for those of the model,
                                        since: the first step of which that is true; evaluations before it were others}
    versions, git_commit                {package: version}, null where it is not installed; null outside of a checkout

In TensorBoard it is the texts run/config, run/deepspeed and run/environment (all the rest), and a row of the table
HPARAMS, whose columns are the two configurations and the newest values of all scalars.
"""

import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer import distributed
from trainer.check import StoreFacts
from trainer.config import ConfigError, flatten
from trainer.job import Job
from trainer.peaks import peak_flops
from trainer.run_files import RECORD, read_record, write_json

if TYPE_CHECKING:
    from trainer.metrics import Metrics  # TensorBoard, which environment() does without

PACKAGES = ("longhand", "deepspeed", "numpy", "zarr", "sentencepiece")


def write_record(
    job: Job,
    device: torch.device,
    metrics: "Metrics",
    n_parameters: int,
    evaluated: Mapping[str, Any],
    changed: Mapping[str, tuple[Any, Any]],
    initial_sha256: str | None,
) -> None:
    """Write RUN/run.json and show it in TensorBoard.

    changed: the values before and now of settings, since the checkpoint that the run continues from. initial_sha256: of
    a run that begins; one that continues keeps its own.
    """
    device_name, run_dir = distributed.device_name(device), job.config.run.dir
    resumed_from_step = metrics.first_step - 1 if metrics.first_step else None
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from_step": resumed_from_step,
        "continued": continued(
            run_dir, resumed_from_step, {name: before for name, (before, _) in changed.items() if name != "run.dir"}
        ),
        "initial_sha256": initial_sha256 if resumed_from_step is None else _until_now(run_dir).get("initial_sha256"),
        "stops_before_a_step": stops_since(run_dir, resumed_from_step),
        "config": job.config.model_dump(mode="json"),
        "deepspeed": job.deepspeed,
        "store": asdict(StoreFacts.of(job.store)),
        "samples": dict(job.samples.identity),
        "launch": {
            "launcher": job.launch.launcher,
            "world_size": job.launch.world_size,
            "local_world_size": job.launch.local_world_size,
            "device": device_name,
            "peak_flops": peak_flops(device_name, job.precision),
        },
        "n_parameters": n_parameters,
        "evaluated": dict(evaluated),
        **environment(),
    }
    write_json(run_dir / RECORD, record)
    show(metrics, record)


def continued(run_dir: Path, step: int | None, before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the record said until now of resumes before this step, and this one if settings were others before it."""
    if step is None:
        return []
    try:
        earlier = [each for each in _until_now(run_dir)["continued"] if each["step"] < step]
    except (KeyError, TypeError):  # of an earlier version
        earlier = []
    return [*earlier, *([{"step": step, "before": dict(before)}] if before else [])]


def _until_now(run_dir: Path) -> dict[str, Any]:
    """The record; nothing of a new run, or where it is damaged, and about to be replaced."""
    try:
        return read_record(run_dir)
    except ConfigError:
        return {}


def stops_since(run_dir: Path, resumed_from_step: int | None) -> int:
    """How many starts from this step were asked to stop before their first, by the record; 0 where that has none."""
    before = _until_now(run_dir)
    return int(before.get("stops_before_a_step") or 0) if before.get("resumed_from_step") == resumed_from_step else 0


def count_stop(run_dir: Path) -> int:
    """Add one to them, in the record of a start that is asked to stop before its first step; how many there are now."""
    record = read_record(run_dir)
    record["stops_before_a_step"] += 1
    write_json(run_dir / RECORD, record)
    return int(record["stops_before_a_step"])


def show(metrics: "Metrics", record: Mapping[str, Any]) -> None:
    """Put the object of run.json into TensorBoard.

    The texts belong to the first step that is reported next, so that a resume takes them back with that step's numbers.
    """
    sides = {"config": record["config"], "deepspeed": record["deepspeed"]}
    environment = {key: value for key, value in record.items() if key not in sides}
    for name, tree in {**sides, "environment": environment}.items():
        metrics.text(metrics.first_step, f"run/{name}", fenced(tree))
    metrics.hparams(flatten({**record["config"], "deepspeed": record["deepspeed"]}))


def fenced(tree: Mapping[str, Any]) -> str:
    """JSON as markdown shows it word for word."""
    return f"```json\n{json.dumps(tree, indent=2, ensure_ascii=False)}\n```"


def environment() -> dict[str, Any]:
    """Versions and git commit, for run.json."""
    # torch's with the CUDA that it was built for, which its package may leave out.
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {package: installed_version(package) for package in PACKAGES}
    return {"versions": versions, "git_commit": _git_commit()}


def installed_version(package: str) -> str | None:
    """None where it is not installed, as Longhand is not where PYTHONPATH names a clone of it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this code, marked if the tree has changes; None outside of a git checkout."""
    here = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
