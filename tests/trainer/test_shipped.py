"""What is shipped works as it is: every configuration and script."""

import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

from reformer import Reformer
from trainer.check import StoreFacts, check
from trainer.config import load
from trainer.engine import parameter_groups

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", [1, 2])
def test_configurations_load_pass_and_build(path: Path, world_size: int) -> None:
    config, deepspeed = load(path)
    store = StoreFacts(config.model.max_seq_len, config.model.vocab_size, {"train": 100, "val": 10}, "", "")
    check(config, deepspeed, {"": store}, world_size)
    with torch.device("meta"):
        model = Reformer(config.model)
    groups = parameter_groups(model)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "path", [*CONFIGS[0].parent.glob("*.json"), ROOT / "ds_config.json"], ids=lambda path: path.stem
)
def test_deepspeed_configurations_go_with_any_other(path: Path) -> None:
    config, deepspeed = load(ROOT / "launch" / "configs" / "enwik8_64k.toml", (), path)
    check(config, deepspeed, {"": StoreFacts(2**16, 258, {"train": 100, "val": 10}, "", "")}, world_size=2)


def test_weight_decay_is_for_matrices_only() -> None:
    config, _ = load(ROOT / "launch" / "configs" / "demo_cpu.toml")
    with torch.device("meta"):
        model = Reformer(config.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = ([names[id(parameter)] for parameter in group["params"]] for group in parameter_groups(model))
    assert "embedding.tokens.weight" in plain
    assert not [name for name in plain if name.endswith("feed_forward.in_weight")]
    assert not [name for name in decayed if "position" in name or "bias" in name or "norm" in name]
    assert [name for name in decayed if "attention" in name]


@pytest.mark.parametrize("script", sorted((ROOT / "launch" / "slurm").glob("*.sbatch")), ids=lambda path: path.stem)
def test_batch_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_no_script_hides_a_package() -> None:
    """Python puts the folder of a script first on its path: files there are modules, and folders may be packages.

    Some files in the folders are scripts too, whose neighbours must not hide a module of Python's own.
    """
    launch = ROOT / "launch"
    names = {path.stem for path in launch.glob("*.py")} | {path.parent.name for path in launch.glob("*/__init__.py")}
    assert {"train", "benchmark", "bench", "bench_pipeline"} <= names
    assert not (names | {path.stem for path in launch.glob("*/*.py")}) & set(sys.stdlib_module_names)
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != launch]  # which tests import from
    assert not [name for name in names if PathFinder.find_spec(name, elsewhere)]
