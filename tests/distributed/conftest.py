"""A tiny store whose rows differ in what there is to predict, and the real launchers to train on it."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
import warm_start
from on_disk import flip
from side_by_side import free_port, own_share

from data_pipeline.cli import main as data_pipeline

ROOT = Path(__file__).parents[2]
LIMIT_S = 240
"""Until ranks must have ended."""
LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "SLURM_PROCID",
)

TOML = """
[model]
vocab_size = 258
max_seq_len = 256
d_model = 32
n_layers = 2
n_heads = 2
n_hashes = 2
lsh_chunk_len = 32
local_chunk_len = 32

[data]
store = "{store}"

[run]
dir = "runs/test"
deepspeed_config = "deepspeed.json"
steps = 4
warmup_steps = 2
eval_every = 4
eval_rows = 5
sample_tokens = 2
save_every = 2
"""
DEEPSPEED = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01, "torch_adam": True, "fused": True}},
}


def build_store(folder: Path, seed: int) -> Path:
    """One document a row, 130 to 250 bytes long: 14 rows to train on, 7 held out."""
    rng = random.Random(seed)
    for split, n_documents in (("train", 14), ("val", 7)):
        (folder / split).mkdir()
        for i in range(n_documents):
            words = ("".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(60))
            (folder / split / f"{split}_{i:02d}.txt").write_text(" ".join(words)[: rng.randint(130, 250)])
    path = folder / "store"
    inputs = ["--input", str(folder / "train"), "--val-input", str(folder / "val")]
    settings = ["--tokenizer", "bytes", "--seq-len", "256", "--workers", "1"]
    assert data_pipeline(["build", *inputs, *settings, "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all of pytest's processes."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_store(tmp_path_factory.mktemp("data"), seed=0)


@pytest.fixture
def damaged(store: Path, tmp_path: Path) -> Path:
    """The store with a flipped bit in its first row: sizes are right, so only the checksum tells when it is read."""
    path = tmp_path / "store"
    shutil.copytree(store, path)
    flip(path / "tokens/c/0/0", 20)
    return path


@pytest.fixture(scope="session")
def other_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shape, with other text."""
    return build_store(tmp_path_factory.mktemp("data"), seed=1)


@dataclass
class Run:
    """What a finished launch left behind."""

    dir: Path
    code: int
    output: str
    errors: str

    @property
    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]

    def column(self, tag: str) -> list[float]:
        return [line[tag] for line in self.metrics if tag in line]


Train = Callable[..., Run]


@pytest.fixture(scope="session")
def config(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "test.toml").write_text(TOML.format(store=store))
    (folder / "deepspeed.json").write_text(json.dumps(DEEPSPEED))
    return folder / "test.toml"


@pytest.fixture(scope="session")
def train(config: Path) -> Train:
    """train(ranks, run_dir, *arguments): `python launch/train.py`, or as many with the variables that torchrun sets.

    They start warm: see warm_start.py.
    """

    def launch(ranks: int, run_dir: Path, *arguments: str) -> Run:
        return run_forks([[*script(config, run_dir), *arguments]] * ranks, run_dir, torchrun_variables(ranks))

    return launch


def torchrun_variables(ranks: int) -> list[dict[str, str]]:
    """Of each rank; none for one alone."""
    if ranks == 1:
        return [{}]
    job = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@pytest.fixture(scope="session")
def train_by_deepspeed(config: Path) -> Train:
    """train_by_deepspeed(ranks, run_dir, *arguments): with DeepSpeed's launcher, which takes seconds to start."""

    def launch(ranks: int, run_dir: Path, *arguments: str) -> Run:
        start = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
        place = ["--master_port", str(free_port())]
        return run([[*start, *place, *script(config, run_dir), *arguments]], run_dir, [{}])

    return launch


@pytest.fixture(scope="session")
def train_by_srun(config: Path) -> Train:
    """train_by_srun(tasks, run_dir, *arguments): as many processes, with the variables that srun sets."""

    def launch(tasks: int, run_dir: Path, *arguments: str) -> Run:
        job = {"SLURM_JOB_ID": str(free_job_id()), "SLURM_JOB_NODELIST": "localhost"}
        job |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_NODEID": "0"}
        job |= {"SLURM_NTASKS": str(tasks), "SLURM_TASKS_PER_NODE": str(tasks)}
        ranks = [job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(tasks)]
        command = [sys.executable, *script(config, run_dir), *arguments]
        return run([command] * tasks, run_dir, ranks)

    return launch


def assert_resumed_equals_uninterrupted(train: Callable[[], Run], tags: Sequence[str]) -> None:
    """To the bit: where the second checkpoint is lost, the same command goes on from the first."""
    whole = train()
    expected = {tag: whole.column(tag) for tag in tags}
    assert all(expected.values()), expected
    checkpoints = whole.dir / "checkpoints"
    (checkpoints / "step_00000004").rename(checkpoints / ".partial-step_00000004")
    again = train()
    assert json.loads((again.dir / "run.json").read_text())["resumed_from_step"] == 2
    assert {tag: again.column(tag) for tag in tags} == expected


def script(config: Path, run_dir: Path) -> list[str]:
    return ["launch/train.py", "--config", str(config), f"run.dir={run_dir}"]


def clean_environ() -> dict[str, str]:
    """Ours, of no launcher; with one thread, since tests run side by side, where waiting for threads costs the most."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES} | {
        "OMP_NUM_THREADS": "1"
    }


def run(commands: list[list[str]], run_dir: Path, variables: list[dict[str, str]]) -> Run:
    """Run commands side by side, each with its variables, until all have ended."""
    environ = clean_environ()
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environ | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command, own in zip(commands, variables, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    output, errors = ("".join(texts) for texts in zip(*outputs, strict=True))
    codes = [process.returncode for process in processes]
    return Run(run_dir, exit_code(codes), output, errors)


def run_forks(commands: list[list[str]], run_dir: Path, variables: list[dict[str, str]]) -> Run:
    """The same with `python COMMAND` for each, started warm."""
    environ = clean_environ()
    with tempfile.TemporaryDirectory() as name:
        files = [(Path(name) / f"{i}.out", Path(name) / f"{i}.err") for i in range(len(variables))]
        for file in chain(*files):
            file.touch()
        processes = [
            warm_start.start(words, ROOT, environ | own, *streams)
            for words, own, streams in zip(commands, variables, files, strict=True)
        ]
        try:
            codes = warm_start.exit_codes(processes, LIMIT_S)
        finally:
            for process in processes:
                process.kill()
        output, errors = ("".join(file.read_text() for file in streams) for streams in zip(*files, strict=True))
    assert None not in codes, f"not at the end after {LIMIT_S} s: {codes}\n{output}\n{errors}"
    return Run(run_dir, exit_code(codes), output, errors)


def exit_code(codes: list[int]) -> int:
    """The one of all ranks: the largest, that of a signal as a shell says it."""
    return max(code if code >= 0 else 128 - code for code in codes)


def free_job_id() -> int:
    """A number for a SLURM job that is also the port that follows from it, on which nothing listens."""
    while True:
        number = random.choice(own_share(range(20_000, 30_000)))
        with suppress(OSError), socket.create_server(("", number)):
            return number
