"""The sbatch files of launch/slurm that build stores, on two nodes: the same bytes however, and whoever is stopped."""

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from bench.process import AS_ROOT
from on_disk import files_of
from slurm.cluster import Cluster, wait_until

from data_pipeline.cli import make_parser
from data_pipeline.verify import verify

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch" / "slurm"
OPTIONS = ("--seq-len", "1024", "--rows-per-shard", "64", "--split", "val=0.2")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
Submit = Callable[..., str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five documents of 2.5 MB, which make several tasks."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 8))) for _ in range(3000)]
    for number in range(5):
        lines = [" ".join(rng.choices(words, k=12)) for _ in range(1000)]
        (folder / f"{number}.txt").write_text("\n".join(lines) * 45)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    model = tmp_path_factory.mktemp("tokenizer") / "small.model"
    paths = ["--input", str(corpus), "--output", str(model)]
    command = [sys.executable, "-m", "data_pipeline", "tokenizer", *paths, "--vocab-size", "400"]
    subprocess.run([*command, "--max-bytes", "50000"], check=True, capture_output=True)
    return model


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: Path) -> Path:
    """The store, built by one process."""
    output = tmp_path_factory.mktemp("undisturbed") / "store"
    command = [sys.executable, "-m", "data_pipeline", "build", *build(corpus, tokenizer, output), "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True)
    assert verify(output) == []
    return output


def build(corpus: Path, tokenizer: Path, output: Path) -> list[str]:
    return ["--input", str(corpus), "--tokenizer", str(tokenizer), "--output", str(output), *OPTIONS]


def differences(expected: Path, found: Path) -> list[str]:
    one, other = files_of(expected), files_of(found)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@pytest.fixture
def submit(cluster: Cluster, corpus: Path, tokenizer: Path, tmp_path: Path) -> Submit:
    """submit(script, *options of sbatch, log=…): a build of `tmp_path / "store"`. Returns the number of the job."""

    def call(script: str, *options: str | Path, log: str = "log", **variables: str) -> str:
        arguments = build(corpus, tokenizer, tmp_path / "store")
        # What a build says goes to one file, with what other elements of an array say.
        options = ("--chdir", ROOT, f"--output={tmp_path / log}", *options)
        return cluster.submit(*options, SLURM / script, *arguments, environment=variables)

    return call


def claims(store: Path) -> list[Path]:
    """Of those who work now, in either half of the build."""
    return list(store.with_name(f".{store.name}.partial").glob("*/*.claim"))


def test_one_node(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """From text to a store that is sound, the tokenizer included."""
    text, store = tmp_path / "text", tmp_path / "store"
    text.mkdir()
    for path in corpus.iterdir():
        (text / path.name).write_text(path.read_text()[:20_000])
    options = ("--chdir", ROOT, "--cpus-per-task=2", f"--output={tmp_path / 'log'}")
    job = cluster.submit(*options, SLURM / "preprocess.sbatch", text, store, "400")
    assert cluster.wait(job) == ["COMPLETED"], (tmp_path / "log").read_text()
    assert f"{store}: sound" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_two_nodes(launcher: str, cluster: Cluster, submit: Submit, undisturbed: Path, tmp_path: Path) -> None:
    if not (ROOT / ".venv/bin" / launcher).exists() and not shutil.which(launcher):
        pytest.skip(f"no {launcher}")
    job = submit("preprocess_mpi.sbatch", *TWO_NODES, LAUNCHER=launcher, **AS_ROOT)
    wait_until(lambda: len(claims(tmp_path / "store")) == 2, "both nodes work", 60, cluster.show)
    assert cluster.wait(job) == ["COMPLETED"], (tmp_path / "log").read_text()
    assert differences(undisturbed, tmp_path / "store") == []
    assert (tmp_path / "log").read_text().count("tokenize: ") == 1, "one rank reports"


@pytest.mark.parametrize("elements", ["0-2", "5-7%1"])
def test_an_array(elements: str, cluster: Cluster, submit: Submit, undisturbed: Path, tmp_path: Path) -> None:
    """All elements at once; one after another, so that the first does everything and the others find it done."""
    job = submit("preprocess_array.sbatch", f"--array={elements}", "--cpus-per-task=1")
    assert cluster.wait(job) == ["COMPLETED"] * 3, (tmp_path / "log").read_text()
    assert differences(undisturbed, tmp_path / "store") == []


def test_an_element_that_is_cancelled(cluster: Cluster, submit: Submit, undisturbed: Path, tmp_path: Path) -> None:
    """The others do its work, once its claim is old; meanwhile another job is refused."""
    store = tmp_path / "store"
    job = submit("preprocess_array.sbatch", "--array=0-2", "--cpus-per-task=1")
    wait_until(lambda: len(claims(store)) == 3, "all elements work", 60, cluster.show)
    for element in (0, 2):  # not to be ready before the other job comes
        cluster.run("scontrol", "suspend", f"{job}_{element}")
    cluster.run("scancel", f"{job}_1")
    wait_until(lambda: cluster.states(job)[1] == "CANCELLED", "one is cancelled", 20, cluster.show)
    for claim in claims(store):  # of those who live too: what is done twice is the same twice
        with suppress(FileNotFoundError):
            os.utime(claim, (0, 0))
    other = submit("preprocess_array.sbatch", "--array=0-1", "--cpus-per-task=1", log="other")
    assert cluster.wait(other) == ["FAILED"] * 2
    assert "is being built by another process" in (tmp_path / "other").read_text()
    for element in (0, 2):
        cluster.run("scontrol", "resume", f"{job}_{element}")
    assert cluster.wait(job) == ["COMPLETED", "CANCELLED", "COMPLETED"], (tmp_path / "log").read_text()
    assert differences(undisturbed, store) == []


def test_a_job_that_is_requeued(cluster: Cluster, submit: Submit, undisturbed: Path, tmp_path: Path) -> None:
    """In the middle of its work, as when a node fails or another job comes first: it goes on where it was."""
    store = tmp_path / "store"
    job = submit("preprocess_mpi.sbatch", *TWO_NODES)
    records = f".{store.name}.partial/tokens/*.npz"
    wait_until(lambda: list(tmp_path.glob(records)), "a task is done", 60, cluster.show)
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: cluster.states(job) == ["PENDING"], "it waits again", 20, cluster.show)
    done = {path: path.stat().st_ino for path in tmp_path.glob(records)}
    assert done
    assert not store.exists()
    wait_until(lambda: claims(store), "it works again", 60, cluster.show)
    assert {path: path.stat().st_ino for path in done} == done
    assert cluster.wait(job) == ["COMPLETED"], (tmp_path / "log").read_text()
    assert differences(undisturbed, store) == []


@pytest.mark.parametrize("script", sorted(path.name for path in SLURM.glob("preprocess*.sbatch")))
def test_wrong_usage(script: str, cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("--chdir", ROOT, f"--output={tmp_path / 'log'}", "--array=0-0", SLURM / script)
    assert cluster.wait(job) == ["FAILED"]
    assert "usage: sbatch " in (tmp_path / "log").read_text()


def test_what_the_documentation_submits() -> None:
    """Where the arguments are those of `build`, they are understood."""
    lines = re.findall(
        r"^sbatch .*launch/slurm/preprocess_\w+\.sbatch (.*)", (ROOT / "docs/data.md").read_text(), re.MULTILINE
    )
    assert len(lines) == 2
    for line in lines:
        make_parser().parse_args(["build", *shlex.split(line)])
