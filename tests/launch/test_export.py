"""Weights of a run's checkpoints as folders: which checkpoint, what is in them, and that they need no DeepSpeed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import export
import numpy as np
import pytest
import torch
from evaluation import CPU, config
from on_disk import flip
from safetensors.torch import save_file
from small_stores import write_store
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.store import Store
from data_pipeline.tokenizer import IntegerTokenizer, Tokenizer, load_tokenizer
from data_pipeline.tokenizer_folder import Ends, read_tokenizer
from reformer import Reformer, load_model
from reformer.hf import load_hf
from trainer import checkpoint, selection
from trainer.config import RunConfig
from trainer.distributed import Launch
from trainer.export import ids_of_ends
from trainer.resume import identity
from trainer.run_tokenizer import keep_tokenizer, recorded_tokenizer

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
    flip(folder_of(run_dir, step) / "rank_00000.safetensors", -9, 2)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    return export.main()


def logits_of(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_model(folder)(TOKENS)


def test_a_checkpoint_that_the_run_removes_meanwhile(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, logits = run
    read = selection.read_weights

    def remove(path: Path) -> dict[str, Tensor]:
        monkeypatch.setattr(selection, "read_weights", read)
        shutil.rmtree(path)
        return read(path)

    monkeypatch.setattr(selection, "read_weights", remove)
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
    way_out = "no sound checkpoint of step 30: there are those of steps 1, 2\n"
    for arguments, said in (([run_dir, "--step", "30"], way_out), ([folder_of(run_dir, 30)], "")):
        assert call(monkeypatch, *arguments, "--output", tmp_path / "other") == 2
        error = capsys.readouterr().err
        assert "rank_00000.safetensors is not what was written" in error and said in error
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

    find = checkpoint.problems

    def problems(path: Path) -> list[str]:
        if not moved.exists():
            shutil.copytree(path, moved)
            shutil.rmtree(path)
        return find(path)

    monkeypatch.setattr(checkpoint, "problems", problems)
    assert call(monkeypatch, run_dir, "--output", tmp_path / "model") == 0
    assert torch.equal(logits_of(tmp_path / "model"), logits[30])


def run_on(tmp_path: Path, tokenizer: Tokenizer, content: bytes, **settings: object) -> Path:
    """The folder of a run on a store of this tokenizer, with a checkpoint and a record."""
    store, run_dir = tmp_path / "store", tmp_path / "run"
    write_store(store, {"a": content}, tokenizer, **settings)
    plan = config(vocab_size=tokenizer.vocab_size, run={"dir": run_dir})
    plan = plan.model_copy(update={"data": plan.data.model_copy(update={"store": store})})
    save(Reformer(plan.model), plan, 1)
    (run_dir / "run.json").write_text(json.dumps({"config": {}, "store": {"tokenizer_sha256": tokenizer.sha256}}))
    return run_dir


def test_the_tokenizer_of_the_store_comes_with_the_weights(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    run_dir = run_on(tmp_path, tokenizer, b"The lazy fox", bos=False)
    (tmp_path / "store" / "tokens" / "c" / "0" / "0").unlink()  # a row that is missing does not matter
    for source in (run_dir, folder_of(run_dir, 1)):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        assert call(monkeypatch, source, "--output", tmp_path / "model") == 0
        assert capsys.readouterr().err == ""
        assert (tmp_path / "model" / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
        assert json.loads((tmp_path / "model" / "tokenizer.json").read_bytes()) == {
            "kind": "sentencepiece",
            "vocab_size": 400,
            "sha256": tokenizer.sha256,
            "bos": False,
            "eos": True,
        }
    assert read_tokenizer(tmp_path / "model")[0].sha256 == tokenizer.sha256
    origin = json.loads((tmp_path / "model" / "origin.json").read_bytes())
    assert (origin["checkpoint"], origin["step"]) == (str(folder_of(run_dir, 1)), 1)
    assert origin["run"]["data"]["store"] == str(tmp_path / "store") and origin["run"]["model"]["vocab_size"] == 400


@pytest.mark.parametrize("tokenizer", [load_tokenizer("bytes"), IntegerTokenizer(1000)], ids=["bytes", "integers"])
def test_tokenizers_without_a_model(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = run_on(tmp_path, tokenizer, np.arange(20, dtype="<u2").tobytes())
    assert call(monkeypatch, run_dir, "--output", tmp_path / "model") == 0
    facts = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    facts |= {"bos": True, "eos": True}
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_bytes()) == facts
    assert not (tmp_path / "model" / "tokenizer.model").exists()


@pytest.mark.parametrize("bos", [True, False])
def test_transformers_is_told_where_documents_end(
    tmp_path: Path, bos: bool, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = IntegerTokenizer(1000)
    run_dir = run_on(tmp_path, tokenizer, np.arange(20, dtype="<u2").tobytes(), bos=bos)
    shutil.move(tmp_path / "store", tmp_path / "moved")
    for number, (store, ids) in enumerate({"store": (None, None), "moved": (1000 if bos else None, 1001)}.items()):
        output = tmp_path / f"model_{number}"
        assert call(monkeypatch, run_dir, "--hf", "--output", output, "--store", tmp_path / store) == 0
        errors = capsys.readouterr().err
        assert "\nnote: n_buckets=None" in f"\n{errors}" and "Warning" not in errors
        assert ("note: without the ids of BOS and EOS: " in errors) == (store == "store")
        origin = json.loads((output / "origin.json").read_bytes())
        known = None if store == "store" else tokenizer.sha256
        assert (origin["checkpoint"], origin["tokenizer_sha256"]) == (str(folder_of(run_dir, 1)), known)
        config = json.loads((output / "config.json").read_bytes())
        assert (config["bos_token_id"], config["eos_token_id"]) == ids
        assert transformers.ReformerModelWithLMHead.from_pretrained(output).generation_config.eos_token_id == ids[1]


def test_the_copy_in_the_run_is_enough_and_a_damaged_one_is_not_taken(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run_dir = run_on(tmp_path, load_tokenizer(str(tokenizer_file)), b"The lazy fox", eos=False)
    store = Store.open(tmp_path / "store")
    keep_tokenizer(run_dir, store, pytest.fail)
    stamps = {path: path.stat().st_mtime_ns for path in run_dir.glob("tokenizer.*")}
    keep_tokenizer(run_dir, store, pytest.fail)
    assert {path.name for path in stamps} == {"tokenizer.json", "tokenizer.model"}
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, "not written again"
    shutil.move(tmp_path / "store", tmp_path / "moved")
    assert call(monkeypatch, run_dir, "--output", tmp_path / "model") == 0
    assert capsys.readouterr().err == ""
    copies = [
        [(folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer.model")]
        for folder in (run_dir, tmp_path / "model")
    ]
    assert copies[0] == copies[1]
    flip(run_dir / "tokenizer.json", -1)
    assert call(monkeypatch, run_dir, "--output", tmp_path / "without") == 0
    assert "store does not exist" in capsys.readouterr().err
    assert call(monkeypatch, run_dir, "--output", tmp_path / "with", "--store", tmp_path / "moved") == 0
    assert capsys.readouterr().err == "" and read_tokenizer(tmp_path / "with")[1].eos is False
    write_store(tmp_path / "bytes", {"a": b"text"}, load_tokenizer("bytes"))
    keep_tokenizer(run_dir, Store.open(tmp_path / "bytes"), pytest.fail)
    assert read_tokenizer(run_dir)[0].kind == "bytes" and not (run_dir / "tokenizer.model").exists()
    said: list[str] = []
    flip(tmp_path / "moved" / "tokenizer.model", -1)
    keep_tokenizer(tmp_path / "other", Store.open(tmp_path / "moved"), said.append)
    assert len(said) == 1 and "tokenizer.model is damaged" in said[0]


def test_weights_without_a_tokenizer_where_it_cannot_be_had(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    run_dir = run_on(tmp_path, tokenizer, b"The lazy fox")
    store, record = tmp_path / "store", run_dir / "run.json"
    whole = record.read_text()
    damages = {
        "store does not exist": lambda: shutil.move(store, tmp_path / "moved"),
        "tokenizer.model is damaged": lambda: flip(store / "tokenizer.model", -1),
        "manifest.json": lambda: flip(store / "manifest.json", -1),
        "is not the one that": lambda: record.write_text(whole.replace(tokenizer.sha256, "of another")),
        "run.json does not say which tokenizer": lambda: record.write_text('{"config": {}}'),
        "run.json is damaged": lambda: flip(record, -1),
        f"cannot read {record}: No such file or directory: give a checkpoint in the folder of its run": record.unlink,
    }
    shutil.copytree(store, tmp_path / "sound")
    for number, (message, damage_it) in enumerate(damages.items()):
        damage_it()
        output = tmp_path / f"model_{number}"
        assert call(monkeypatch, run_dir, "--output", output) == 0
        out, error = capsys.readouterr()
        assert error.startswith("note: without a tokenizer, which generating a text needs: ") and message in error
        assert out.startswith("wrote ")
        assert sorted(file.name for file in output.iterdir()) == ["config.json", "model.safetensors", "origin.json"]
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(tmp_path / "sound", store)
        record.write_text(whole)
    shutil.rmtree(store)
    assert call(monkeypatch, run_dir, "--output", tmp_path / "model", "--store", tmp_path / "moved") == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--step", "3"], "run has no sound checkpoint of step 3: there are those of steps 1, 2, 30"),
        (["run", "--best"], "run has no checkpoint of a step that was evaluated: leave out --best, or give --step"),
        (["nowhere"], "nowhere does not exist: give the folder that was run.dir, or one of its"),
        ([".."], ".. is neither a run nor a checkpoint: give the folder that was run.dir"),
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


def test_a_copy_in_the_run_that_is_of_another_tokenizer_is_not_taken(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file))
    run_dir = run_on(tmp_path, tokenizer, b"The lazy fox")
    write_store(tmp_path / "bytes", {"a": b"The lazy fox"})
    keep_tokenizer(run_dir, Store.open(tmp_path / "bytes"), pytest.fail)
    assert call(monkeypatch, run_dir, "--output", tmp_path / "model") == 0
    assert read_tokenizer(tmp_path / "model")[0].sha256 == tokenizer.sha256
    shutil.move(tmp_path / "store", tmp_path / "moved")
    assert call(monkeypatch, run_dir, "--output", tmp_path / "without") == 0
    assert "note: without a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("record", [{}, {"store": None}, {"store": []}], ids=str)
def test_a_record_that_does_not_say_which_tokenizer(tmp_path: Path, record: dict) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"config": {}, **record}))
    with pytest.raises(DataError, match=r"run.json does not say which tokenizer the run was trained with: give a che"):
        recorded_tokenizer(tmp_path)


def test_a_folder_that_is_there_is_refused_before_weights_are_read(
    run, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("trainer.export.read_checkpoint", lambda *_: pytest.fail("read"))
    assert call(monkeypatch, run[0], "--output", run[0]) == 2
    assert "run exists and is not an empty folder" in capsys.readouterr().err
    in_the_way = run[0].parent / "file"
    in_the_way.write_text("no folder")
    assert call(monkeypatch, run[0], "--output", in_the_way / "model") == 2
    said = f"cannot write to --output {in_the_way / 'model'}: {in_the_way} is not a folder: choose another"
    assert said in capsys.readouterr().err


def test_a_checkpoint_that_is_named_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run_dir = run_on(tmp_path, load_tokenizer("bytes"), b"The lazy fox")
    monkeypatch.chdir(run_dir / "checkpoints")
    assert call(monkeypatch, folder_of(run_dir, 1).name, "--output", tmp_path / "model") == 0
    assert capsys.readouterr().err == "" and read_tokenizer(tmp_path / "model")[0].kind == "bytes"


def test_ends_that_documents_do_not_have_are_no_ids() -> None:
    tokenizer = load_tokenizer("bytes")
    assert ids_of_ends(tokenizer, Ends(True, False)) == {"bos_token_id": 256, "eos_token_id": None}
    assert ids_of_ends(tokenizer, Ends(False, True)) == {"bos_token_id": None, "eos_token_id": 257}
