"""Weights of a run's checkpoints as folders: which checkpoint, what is in them, and that they need no DeepSpeed."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluation import CPU, config
from safetensors.torch import save_file
from torch import Tensor

from reformer import Reformer, load_model
from reformer.hf import load_hf
from trainer import checkpoint
from trainer.config import RunConfig
from trainer.continuation import identity
from trainer.distributed import Launch

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))  # where Python itself looks, given launch/export.py
import export

sys.path.pop(0)

pytestmark = pytest.mark.usefixtures("process_group")
TIED_OR_NOT = pytest.mark.parametrize("run", [False, True], indirect=True, ids=["untied", "tied"])
TOKENS = torch.arange(60).remainder(20)[None]
WITHOUT = """
import sys
for name in ("deepspeed", "trainer", "data_pipeline"):
    sys.modules[name] = None  # an import fails
import torch
from safetensors.torch import load_file
from reformer import load_model
expected = load_file(sys.argv[2])
with torch.no_grad():
    assert torch.equal(load_model(sys.argv[1])(expected["tokens"]), expected["logits"])
try:
    import deepspeed
except ImportError:
    print("the same without DeepSpeed")
"""


def save(model: Reformer, plan: RunConfig, step: int) -> None:
    """A checkpoint as the trainer writes it, after a step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(TOKENS, TOKENS).backward()
    optimizer.step()
    engine = SimpleNamespace(module=model, optimizer=optimizer)
    checkpoint.save(engine, plan.run, step, identity(plan, {}, "", 1), {}, Launch("this test"), CPU)


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[int, Tensor]]:
    """The folder of a run, and for each of its checkpoints the logits of TOKENS; tied if the test says so."""
    plan = config(tie_embeddings=getattr(request, "param", False), run={"dir": tmp_path / "run", "keep_last": 9})
    model, logits = Reformer(plan.model), {}
    for step in (1, 2, 30):
        save(model, plan, step)
        with torch.no_grad():
            logits[step] = model(TOKENS)
    return tmp_path / "run", logits


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def damage(run_dir: Path, step: int) -> None:
    path = folder_of(run_dir, step) / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    return export.main()


def logits_of(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_model(folder)(TOKENS)


def test_a_checkpoint_that_the_run_removes_meanwhile(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, logits = run
    read = export.read_weights

    def remove(path: Path) -> dict[str, Tensor]:
        monkeypatch.setattr(export, "read_weights", read)
        shutil.rmtree(path)
        return read(path)

    monkeypatch.setattr(export, "read_weights", remove)
    assert call(monkeypatch, run_dir, "--output", tmp_path / "model") == 0
    assert torch.equal(logits_of(tmp_path / "model"), logits[2])


@TIED_OR_NOT
def test_a_model_without_deepspeed(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run_dir, logits = run
    assert call(monkeypatch, run_dir, "--output", tmp_path / "model") == 0
    assert capsys.readouterr().out.endswith(f"parameters after 30 steps, from {folder_of(run_dir, 30)}\n")
    save_file({"tokens": TOKENS, "logits": logits[30]}, tmp_path / "expected")
    command = [sys.executable, "-c", WITHOUT, tmp_path / "model", tmp_path / "expected"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "the same without DeepSpeed\n"


def test_a_step_or_a_checkpoint(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, logits = run
    assert call(monkeypatch, run_dir, "--step", "2", "--output", tmp_path / "two") == 0
    assert call(monkeypatch, folder_of(run_dir, 1), "--output", tmp_path / "one") == 0
    assert torch.equal(logits_of(tmp_path / "two"), logits[2])
    assert torch.equal(logits_of(tmp_path / "one"), logits[1])
    assert not torch.equal(logits[1], logits[2])


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run_dir, logits = run
    damage(run_dir, 30)
    assert call(monkeypatch, run_dir, "--output", tmp_path / "model") == 0
    assert f"{folder_of(run_dir, 30)} is damaged: rank_00000.safetensors is not what was" in capsys.readouterr().err
    assert torch.equal(logits_of(tmp_path / "model"), logits[2])
    for arguments in ([run_dir, "--step", "30"], [folder_of(run_dir, 30)]):
        assert call(monkeypatch, *arguments, "--output", tmp_path / "other") == 2
        assert "rank_00000.safetensors is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@TIED_OR_NOT
def test_hugging_face(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, logits = run
    assert call(monkeypatch, run_dir, "--hf", "--output", tmp_path / "model") == 0
    with torch.no_grad():
        theirs = load_hf(tmp_path / "model")(TOKENS)
    assert (theirs - logits[30]).abs().max() < 1e-4


def test_a_run_that_goes_on_may_take_the_checkpoint_away(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, logits = run
    moved = folder_of(run_dir, 31)

    def problems(path: Path) -> list[str]:
        if not moved.exists():
            shutil.copytree(path, moved)
            shutil.rmtree(path)
        return checkpoint.problems(path)

    monkeypatch.setattr(export, "problems", problems)
    assert call(monkeypatch, run_dir, "--output", tmp_path / "model") == 0
    assert torch.equal(logits_of(tmp_path / "model"), logits[30])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--step", "3"], "run has no sound checkpoint of step 3: those it has are of steps [1, 2, 30]"),
        (["nowhere"], "nowhere is neither a run nor a sound checkpoint: SHA256SUMS cannot be read"),
        (["nowhere", "--step", "3"], "--step 3 is for the folder of a run, and nowhere has no checkpoints in it"),
        (["run", "--output", "run"], "run exists and is not an empty folder: remove it, or give another name"),
    ],
)
def test_what_cannot_be_exported(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    output = [] if "--output" in arguments else ["--output", "model"]
    assert call(monkeypatch, *arguments, *output) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert sorted(tmp_path.rglob("*")) == before
