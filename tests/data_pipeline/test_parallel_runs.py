"""The store is the same to the byte for any number of processes and MPI ranks, whoever is killed and whatever fills up.

SLURM's steps and arrays are in tests/slurm. How often kills and flips were tried: launch/benchmark.py pipeline-faults.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from bench.corpora import write_corpus
from bench_pipeline import flips, kills
from on_disk import resize

from data_pipeline.store import Store
from data_pipeline.verify import verify

MODES = [
    mode if mode != "mpirun" else pytest.param(mode, marks=pytest.mark.skipif(not has_mpirun, reason="no mpirun"))
    for has_mpirun in [Path(sys.executable).with_name("mpirun").exists()]
    for mode in kills.WORKERS
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> kills.Target:
    """Documents in several tasks and several shards, and the store of an undisturbed build in one process."""
    folder = tmp_path_factory.mktemp("target")
    write_corpus(folder / "corpus", 5_000_000)
    options = ("--tokenizer", str(tokenizer_file), "--seq-len", "4096", "--rows-per-shard", "64", "--split", "val=0.2")
    target = kills.Target(folder / "corpus", options, folder / "serial", {})
    begun = time.perf_counter()
    assert build("serial", target, target.expected).returncode == 0
    target.seconds.update(dict.fromkeys(kills.WORKERS, time.perf_counter() - begun))
    assert verify(target.expected) == []
    return target


def build(mode: str, target: kills.Target, output: Path) -> subprocess.CompletedProcess[str]:
    words = kills.build_command(mode, target, output)
    environment = {**os.environ, **kills.AS_ROOT}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("mode", MODES[1:])
def test_the_store_does_not_depend_on_who_builds_it(mode: str, target: kills.Target, tmp_path: Path) -> None:
    result = build(mode, target, tmp_path / "store")
    assert result.returncode == 0, result.stderr
    assert kills.first_difference(target.expected, tmp_path / "store") is None
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    figures, _, note = result.stdout.rstrip("\n").partition("\nnote: ")
    assert "\n" not in note and "byte fallback" in note  # of letters that the small corpus of the tokenizer has not
    assert build(mode, target, tmp_path / "store").stdout.split("\n", 1)[1] == figures + "\n"


@pytest.mark.parametrize("mode", MODES)
def test_a_build_that_is_killed_goes_on(mode: str, target: kills.Target, tmp_path: Path) -> None:
    for seed in range(20):  # on a machine that got idle since, a build may end before its kill comes
        folder = tmp_path / str(seed)
        folder.mkdir()
        trial = kills.run_trial(mode, target, folder, random.Random(seed))
        assert trial.passed, trial
        if trial.kills:
            return
    pytest.fail("twenty builds ended before they were killed")


def test_a_second_builder_is_refused(target: kills.Target, tmp_path: Path) -> None:
    output = tmp_path / "store"
    first = kills.start(kills.build_command("processes", target, output), tmp_path / "log")
    while not list((tmp_path / ".store.partial").glob("tokens/*.claim")):
        assert first.poll() is None
        time.sleep(0.01)
    psutil.Process(first.pid).suspend()  # else it might end first
    second = build("serial", target, output)
    psutil.Process(first.pid).resume()
    assert second.returncode == 2
    assert second.stderr == f"error: {output} is being built by another process: wait for it to end, or stop it\n"
    assert first.wait() == 0
    assert kills.first_difference(target.expected, output) is None


def test_a_disk_that_is_full(target: kills.Target, small_disk: Path) -> None:
    """In the first half of a build, when room for that is made in the second, and when there is room all is well."""
    output, work = small_disk / "store", small_disk / ".store.partial"
    expected = Store.open(target.expected)
    scratch = 2 * sum(document.tokens for document in expected.documents)
    stored = sum(file.n_bytes for file in expected.manifest.files.values())
    for n_bytes, stage in ((9 * scratch // 10, "tokens"), (scratch + stored // 2, "shards")):
        resize(small_disk, n_bytes)
        result = build("processes", target, output)
        assert result.returncode == 2
        assert f"error: no room is left on the disk of {small_disk}" in result.stderr
        assert "Traceback" not in result.stderr
        assert not output.exists()
        assert kills.Watch(work).stage() == stage
    resize(small_disk, scratch + 2 * stored)
    assert build("processes", target, output).returncode == 0
    assert kills.first_difference(target.expected, output) is None
    assert not work.exists()


def test_flipped_bits_are_found_and_never_read(tmp_path: Path) -> None:
    """In every file once, and then some."""
    rng = random.Random(0)
    store = flips.small_store(tmp_path)
    right = flips.read_all(store)
    sizes = {name: (store / name).stat().st_size for name in flips.list_files(store)}
    bits = [(name, rng.randrange(8 * size)) for name, size in sizes.items() if size]
    bits += [flips.draw_bit(sizes, rng) for _ in range(20)]
    for name, bit in bits:
        flip = flips.flip_once(store, name, bit, right)
        assert flip.verify != "nothing", flip
        assert flip.reading != "wrong", flip
    assert verify(store) == []
