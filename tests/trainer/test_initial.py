"""Which folders a new run may begin with, and what is said of the others."""

import json
from pathlib import Path

import pytest
import torch
from evaluation import config

from data_pipeline.tokenizer import TOKENIZER_RECORD
from reformer import Reformer, ReformerConfig, save_model
from reformer.hf import save_hf
from reformer.weights import assemble
from trainer.config import ConfigError
from trainer.initial import ROWS, check_initial, read_initial

STORE, OURS = Path("data/store"), "0123abc"
UNKNOWN = "does not say which tokenizer its model was trained with: it must be that of data/store"


def model_config(**changes: object) -> ReformerConfig:
    return config(**changes).model


def write(folder: Path, model: Reformer | None = None, **record: object) -> Path:
    """A folder as launch/export.py writes it; without a tokenizer if nothing is known of it."""
    model = model or Reformer(model_config())
    others = {TOKENIZER_RECORD: json.dumps(record).encode()} if record else {}
    save_model(folder, model.config, model.state_dict(), others)
    return folder


def test_an_exported_model_of_the_stores_tokenizer(tmp_path: Path) -> None:
    model = Reformer(model_config())
    folder = write(tmp_path / "model", model, kind="sentencepiece", sha256=OURS)
    assert check_initial(folder, model.config, STORE, OURS) == []
    assert check_initial(folder, model_config(dropout=0.1, seed=3, keep_ends=False), STORE, OURS) == []
    read = read_initial(folder, model_config(), 0)
    assert list(read) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(read[name], parameter) for name, parameter in model.named_parameters())


def test_one_of_hugging_faces_and_one_in_half_precision(tmp_path: Path) -> None:
    model = Reformer(model_config())
    save_hf(model, tmp_path / "hf")
    (tmp_path / "hf" / TOKENIZER_RECORD).write_text('{"version": "1.0"}')  # theirs has this name, too
    (note,) = check_initial(tmp_path / "hf", model.config, STORE, OURS)
    assert note == f"{tmp_path / 'hf'} {UNKNOWN}"
    assert torch.equal(read_initial(tmp_path / "hf", model_config(), 0)["head.weight"], model.head.weight)

    half = Reformer(model_config(tie_embeddings=True)).bfloat16()
    folder = write(tmp_path / "half", half)
    assert check_initial(folder, half.config, STORE, OURS) == [f"{folder} {UNKNOWN}"]
    assert "head.weight" not in read_initial(folder, model_config(), 0)


def test_what_changes_no_weight_may_differ_and_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", kind="bytes", sha256=OURS)
    notes = check_initial(folder, model_config(n_hashes=8, attn_pattern=["local", "dense"]), STORE, OURS)
    assert notes == [
        "model.attn_pattern is ('local', 'dense'), and ('local', 'lsh') there (run.init_from)",
        "model.n_hashes is 8, and 2 there (run.init_from)",
    ]


def test_a_model_of_shorter_sequences(tmp_path: Path) -> None:
    """Its positions are the first ones, and what it computes of its sequences is what it computed."""
    model = Reformer(model_config(axial_shape=(4, 16), n_buckets=8)).eval()
    folder = write(tmp_path / "model", model, kind="bytes", sha256=OURS)
    longer = model_config(axial_shape=(12, 16), max_seq_len=192, n_buckets=8)
    assert check_initial(folder, longer, STORE, OURS) == [
        "model.max_seq_len is 192, and 64 there (run.init_from)",
        "model.axial_shape is (12, 16), and (4, 16) there (run.init_from)",
        f"positions from 64 on are not in {folder}: they begin as random ones",
    ]
    read = read_initial(folder, longer, seed=5)
    grown = assemble(longer, read).eval()
    tokens = torch.randint(0, 20, (2, 64))
    with torch.no_grad():
        assert torch.equal(grown(tokens), model(tokens))
    rows = grown.embedding.positions.rows
    assert torch.equal(rows, read_initial(folder, longer, seed=5)[ROWS])
    assert not torch.equal(rows, read_initial(folder, longer, seed=6)[ROWS])
    assert rows.shape == (12, 4) and 0.01 < rows[4:].std() < 0.03

    for other in (
        model_config(axial_shape=(8, 24), max_seq_len=192),
        model_config(axial_shape=(8, 16), max_seq_len=128, d_ff=7),
    ):
        with pytest.raises(
            ConfigError, match=r"\(longer sequences are possible with as many columns in axial_shape as"
        ):
            check_initial(folder, other, STORE, OURS)
    with pytest.raises(
        ConfigError, match=r"axial_shape is \(2, 16\), and \(4, 16\) there. Set \[model\] to that model, or"
    ):
        check_initial(folder, model_config(axial_shape=(2, 16), max_seq_len=32, n_buckets=8), STORE, OURS)


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", kind="bytes", sha256=OURS)
    with pytest.raises(ConfigError) as error:
        check_initial(folder, model_config(d_model=32, attn_pattern=["lsh"]), STORE, OURS)
    assert str(error.value) == (
        f"run.init_from={folder} holds another model than [model]: model.d_model is 32, and 16 there; "
        "model.attn_pattern is ('lsh',), and ('local', 'lsh') there; model.d_head is 16, and 8 there; model.d_ff is "
        "128, and 64 there; model.axial_dims is (8, 24), and (4, 12) there. Set [model] to that model, or give another "
        "folder"
    )


@pytest.mark.parametrize(
    ("record", "way_out"),
    [({"kind": "sentencepiece"}, "--tokenizer {}/tokenizer.model, "), ({"kind": "bytes"}, "--tokenizer bytes, ")],
)
def test_another_tokenizer_is_refused(tmp_path: Path, record: dict[str, str], way_out: str) -> None:
    folder = write(tmp_path / "model", **record, sha256="another")
    with pytest.raises(ConfigError, match="was trained with another tokenizer than that of data/store") as error:
        check_initial(folder, model_config(), STORE, OURS)
    assert f"Build the store with {way_out.format(folder)}" in str(error.value)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", write(tmp_path / "model") / "config.json"):
        with pytest.raises(ConfigError, match=f"init_from={folder} is no folder: give one that launch/export.py wrote"):
            read_initial(folder, model_config(), 0)
    with pytest.raises(ConfigError, match=r"config\.json is missing: give a folder that launch/export\.py"):
        read_initial(tmp_path, model_config(), 0)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="is a run or a checkpoint of one: export its model first, python launch/exp"):
        read_initial(tmp_path, model_config(), 0)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        read_initial(tmp_path / "model", model_config(), 0)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = Reformer(model_config())
    with torch.no_grad():
        model.head.bias[3] = torch.nan
    folder = write(tmp_path / "model", model)
    with pytest.raises(ConfigError, match="has weights that are not finite: give those of an earlier checkpoint"):
        check_initial(folder, model.config, STORE, OURS)
