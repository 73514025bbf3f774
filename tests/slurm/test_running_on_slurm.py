"""docs/slurm.md, followed line by line on the cluster.

Smaller than there are the jobs, and the configuration behind the name launch/configs/books_64k.toml. Otherwise
the lines are typed as they stand, in a folder that looks like the repository.
"""

import json
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import Cluster, wait_until

ROOT = Path(__file__).parents[2]
SMALLER = {
    "--nodes=4": "--nodes=2 --ntasks-per-node=1",
    "--nodes=8": "--nodes=1 --ntasks-per-node=1",
    "--array=1-5%2": "--array=1-2%2 --nodes=1 --ntasks-per-node=1",
    "preprocess.sbatch /data/books data/books_64k": "preprocess.sbatch {books} data/books_64k 400",
}
STEPS = 10
TOML = f"""
[model]
vocab_size = 400
max_seq_len = 65536
d_model = 16
d_ff = 16
n_layers = 1
n_heads = 1
attn_pattern = ["local"]
local_chunk_len = 32

[data]
store = "data/books_64k"

[run]
dir = "runs/books_64k"
deepspeed_config = "small.json"
steps = {STEPS}
warmup_steps = 2
eval_every = {STEPS}
eval_rows = 1
save_every = 100
sample_tokens = 0
ablation_rows = 0
diagnostics = false
"""
DEEPSPEED = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
}


def lines_of_the_page() -> list[str]:
    page = (ROOT / "docs/slurm.md").read_text()
    return [line for block in re.findall(r"```\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder in which the repository's files are, and a small configuration under the name of a large one."""
    folder = tmp_path / "repository"
    (folder / "launch" / "configs").mkdir(parents=True)
    for path in [*ROOT.glob("*"), ROOT / ".venv", *ROOT.glob("launch/*")]:
        link = folder / path.relative_to(ROOT)
        if not link.exists() and path.name not in {"data", "runs"}:
            link.symlink_to(path)
    (folder / "launch/configs/books_64k.toml").write_text(TOML)
    (folder / "launch/configs/small.json").write_text(json.dumps(DEEPSPEED))
    (folder / "data").mkdir()
    return folder


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """300 documents of 2 KB."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 8))) for _ in range(3000)]
    (tmp_path / "books").mkdir()
    for number in range(300):
        lines = (" ".join(rng.choices(words, k=12)) for _ in range(30))
        (tmp_path / "books" / f"{number}.txt").write_text("\n".join(lines))
    return tmp_path / "books"


def test_the_page_is_true(cluster: Cluster, repository: Path, books: Path) -> None:
    install, preprocess, check, train, queue, tail, status, tensorboard, *then = lines_of_the_page()
    signal, cancel, resubmit, seeds, status_of_seeds, report = then
    metrics = repository / "runs/books_64k/metrics.jsonl"

    def steps() -> list[int]:
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        return [json.loads(line)["step"] for line in lines if "train/loss" in line]

    def typed(line: str) -> str:
        environment = cluster.environment | {"PATH": f"{ROOT / '.venv/bin'}:{cluster.environment['PATH']}"}
        command = ["bash", "-c", line]
        result = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}\n{logs()}"
        return result.stdout

    def submitted(line: str) -> str:
        for large, small in SMALLER.items():
            line = line.replace(large, small.format(books=books))
        [number] = re.findall(r"Submitted batch job (\d+)", typed(line))
        return str(number)

    def logs() -> str:
        return "\n".join(path.read_text() for path in sorted(repository.glob("*.log")))

    def wait(condition: Callable[[], object], what: str) -> None:
        wait_until(condition, what, 180, lambda: logs() + cluster.show())

    typed(install.replace("make", "make --dry-run"))
    assert cluster.wait(submitted(preprocess), 240) == ["COMPLETED"], logs()

    assert "2 rows, 131,072 tokens" in typed(check.replace("--check 32", "--check 2"))
    job = submitted(train)
    wait(steps, "it trains")
    assert re.search(rf"^ *{job} .* R ", typed(queue), re.MULTILINE)
    typed(signal.replace("JOB", job))
    wait(lambda: cluster.jobs(job)[0]["Restarts"] == "1", "it is requeued")
    done = len(steps())
    wait(lambda: len(steps()) > done, "it goes on")
    typed(cancel.replace("JOB", job))
    assert cluster.wait(job, 120) == ["CANCELLED"], "it was not too fast to be stopped"
    done = len(steps())
    assert f"SIGTERM after step {done}" in typed(tail.replace("tail -F", "cat"))
    assert "preempted; the same command goes on" in typed(status)

    assert cluster.wait(submitted(resubmit), 240) == ["COMPLETED"], logs()
    assert f"after step {done}" in logs()
    assert steps() == list(range(1, STEPS + 1))
    assert "finished" in typed(status)
    assert "train/loss" in typed(f"{tensorboard} --inspect")

    assert cluster.wait(submitted(seeds), 240) == ["COMPLETED"] * 2, logs()
    said = typed(status_of_seeds)
    assert [line.split()[:2] for line in said.splitlines()] == [[f"runs/seed_{n}", "finished"] for n in (1, 2)]
    assert re.search(r"^\[\d\] \[\d\] +2 +\d\.\d{4} ± \d\.\d{4}$", typed(report), re.MULTILINE)
