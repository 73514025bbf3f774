"""Which folders a new run may begin with, and what is said of the others."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from evaluation import CPU, config
from safetensors.torch import load_file, save_file

from data_pipeline.tokenizer_folder import TOKENIZER_RECORD
from reformer import Reformer, ReformerConfig, save_model
from reformer.hf import save_hf
from reformer.weights import assemble
from trainer import initial
from trainer.config import ConfigError
from trainer.distributed import Launch
from trainer.exported import read_model
from trainer.initial import ROWS, check_initial, folder_sha256, read_initial, weights_sha256

pytestmark = pytest.mark.usefixtures("process_group")
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
    without_effect = {
        "dropout": 0.1,
        "attn_dropout": 0.1,
        "ff_chunk_tokens": 8,
        "loss_chunk_tokens": 8,
        "keep_ends": False,
    }
    assert check_initial(folder, model_config(**without_effect), STORE, OURS) == []
    read = read_initial(folder, model_config(), 0).parameters
    assert list(read) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(read[name], parameter) for name, parameter in model.named_parameters())


def test_one_of_hugging_faces_and_one_in_half_precision(tmp_path: Path) -> None:
    model = Reformer(model_config())
    save_hf(model, tmp_path / "hf")
    (tmp_path / "hf" / TOKENIZER_RECORD).write_text('{"version": "1.0"}')  # theirs has this name, too
    (note,) = check_initial(tmp_path / "hf", model.config, STORE, OURS)
    assert note == f"{tmp_path / 'hf'} {UNKNOWN}"
    assert torch.equal(read_initial(tmp_path / "hf", model_config(), 0).parameters["head.weight"], model.head.weight)

    half = Reformer(model_config(tie_embeddings=True)).bfloat16()
    folder = write(tmp_path / "half", half)
    assert check_initial(folder, half.config, STORE, OURS) == [f"{folder} {UNKNOWN}"]
    assert "head.weight" not in read_initial(folder, half.config, 0).parameters
    grown = read_initial(folder, model_config(tie_embeddings=True, vocab_size=30), 0).parameters
    assert {parameter.dtype for parameter in grown.values()} == {torch.bfloat16}


def test_hugging_faces_two_kinds_of_attention_dropout_do_not_matter(tmp_path: Path) -> None:
    """Whoever begins with the folder has a dropout of its own; whoever evaluates it, none."""
    model, folder = Reformer(model_config()), tmp_path / "hf"
    save_hf(model, folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "local_attention_probs_dropout_prob": 0.05}))
    assert check_initial(folder, model_config(attn_dropout=0.1), STORE, OURS) == [f"{folder} {UNKNOWN}"]
    assert torch.equal(
        read_initial(folder, model_config(attn_dropout=0.1), 0).parameters["head.weight"], model.head.weight
    )
    assert read_model(folder, str(folder)).config == model.config


def test_what_changes_no_weight_may_differ_and_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", kind="bytes", sha256=OURS)
    changed = model_config(n_hashes=8, attn_pattern=["local", "dense"], seed=3)
    notes = check_initial(folder, changed, STORE, OURS)
    assert notes == [
        "model.attn_pattern is ('local', 'dense'), and ('local', 'lsh') there (run.init_from)",
        "model.n_hashes is 8, and 2 there (run.init_from)",
        "model.seed is 3, and 0 there (run.init_from)",
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
    read, sha256 = read_initial(folder, longer, seed=5)
    assert sha256 == folder_sha256(folder), "of what is there"
    grown = assemble(longer, read).eval()
    tokens = torch.randint(0, 20, (2, 64))
    with torch.no_grad():
        assert torch.equal(grown(tokens), model(tokens))
    rows = grown.embedding.positions.rows
    assert torch.equal(rows, read_initial(folder, longer, seed=5).parameters[ROWS])
    assert not torch.equal(rows, read_initial(folder, longer, seed=6).parameters[ROWS])
    assert rows.shape == (12, 4) and 0.01 < rows[4:].std() < 0.03

    for other, such_as in (
        (model_config(axial_shape=(8, 24), max_seq_len=192), r": \[12, 16\]\)"),
        (model_config(axial_shape=(8, 16), max_seq_len=128, d_ff=7), r": \[8, 16\]\)"),
        (model_config(axial_shape=(10, 10), max_seq_len=100), r"\)"),
    ):
        said = r"\(longer sequences are possible with as many columns in axial_shape as there"
        with pytest.raises(ConfigError, match=said + such_as):
            check_initial(folder, other, STORE, OURS)
    with pytest.raises(
        ConfigError, match=r"axial_shape is \(2, 16\), and \(4, 16\) there. Set \[model\] to that model \(rows may"
    ):
        check_initial(folder, model_config(axial_shape=(2, 16), max_seq_len=32, n_buckets=8), STORE, OURS)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_fewer_tokens(tmp_path: Path, tied: bool) -> None:
    """Hugging Face's have no BOS and EOS of ours: these are new, and what it says of the others is what it said."""
    model = Reformer(model_config(tie_embeddings=tied)).eval()
    with torch.no_grad():
        model.head.bias.uniform_(-3, -2)
    folder = write(tmp_path / "model", model)
    larger = model_config(vocab_size=2020, tie_embeddings=tied)
    assert check_initial(folder, larger, STORE, OURS) == [
        "model.vocab_size is 2020, and 20 there (run.init_from)",
        f"tokens from 20 on are not in {folder}: they begin as random ones",
        f"{folder} {UNKNOWN}",
    ]
    read = read_initial(folder, larger, seed=5).parameters
    grown, tokens = assemble(larger, read).eval(), torch.randint(0, 20, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(grown(tokens)[..., :20], model(tokens))
    for name in initial.TOKENS[:: 2 if tied else 1]:
        old, new = read[name][:20], read[name][20:]
        assert len(new) == 2000 and not torch.equal(new, read_initial(folder, larger, seed=6).parameters[name][20:])
        torch.testing.assert_close(new.mean(dim=0), old.mean(dim=0), atol=0.12 * float(old.std()), rtol=0)
        spread = (old - old.mean(dim=0)).std()
        assert float((new - new.mean(dim=0)).std() / spread) == pytest.approx(1, abs=0.1)
    with pytest.raises(ConfigError, match="vocab_size is 18, and 20 there"):
        check_initial(folder, model_config(vocab_size=18, tie_embeddings=tied), STORE, OURS)


def test_layers_of_the_same_kinds_are_no_difference(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", kind="bytes", sha256=OURS)
    assert check_initial(folder, model_config(attn_pattern=["local", "lsh"] * 2), STORE, OURS) == []


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


def test_only_what_does_not_fit_is_named_and_lengths_have_a_way_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", kind="bytes", sha256=OURS)
    may_differ = {"n_hashes": 8, "seed": 3, "lsh_chunk_len": 8}
    with pytest.raises(ConfigError) as error:
        check_initial(folder, model_config(attn_pattern=["lsh"], **may_differ), STORE, OURS)
    assert str(error.value) == (
        f"run.init_from={folder} holds another model than [model]: model.attn_pattern is ('lsh',), and "
        "('local', 'lsh') there. Set [model] to that model, or give another folder"
    )
    with pytest.raises(ConfigError, match=r"Set .* model \(rows may be shorter than max_seq_len: leave it at 64\), or"):
        check_initial(folder, model_config(max_seq_len=32), STORE, OURS)


@pytest.mark.parametrize("changes", [{"n_heads": 4, "d_head": 4}, {"activation": "gelu"}], ids=str)
def test_nor_is_one_whose_tensors_mean_something_else(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = write(tmp_path / "model", kind="bytes", sha256=OURS)
    with pytest.raises(ConfigError, match=f"holds another model than .model.: model.{next(iter(changes))} is "):
        check_initial(folder, model_config(**changes), STORE, OURS)


@pytest.mark.parametrize(
    ("record", "way_out"),
    [
        ({"kind": "sentencepiece"}, "--tokenizer {}/tokenizer.model, "),
        ({"kind": "bytes"}, "--tokenizer bytes, "),
        ({}, "--tokenizer {}/tokenizer.model, "),
    ],
)
def test_another_tokenizer_is_refused(tmp_path: Path, record: dict[str, str], way_out: str) -> None:
    folder = write(tmp_path / "model", **record, sha256="another")
    with pytest.raises(ConfigError, match="was trained with another tokenizer than that of data/store") as error:
        check_initial(folder, model_config(), STORE, OURS)
    assert f"Build the store with {way_out.format(folder)}" in str(error.value)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", write(tmp_path / "model") / "config.json"):
        with pytest.raises(
            ConfigError,
            match=f"init_from={folder} is not a folder: give one that launch/export.py or save_pretrained wrote",
        ):
            read_initial(folder, model_config(), 0)
    with pytest.raises(ConfigError, match=r"config\.json is missing: give a folder that launch/export\.py"):
        read_initial(tmp_path, model_config(), 0)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="is a run or a checkpoint of one: export its model first, python launch/exp"):
        read_initial(tmp_path, model_config(), 0)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON"):
        read_initial(tmp_path / "model", model_config(), 0)


def test_what_hugging_face_leaves_out_is_a_note(tmp_path: Path) -> None:
    model = Reformer(model_config())
    folder = tmp_path / "hf"
    save_hf(model, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.bias": torch.ones(20)}, folder / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bias, _ = check_initial(folder, model.config, STORE, OURS)
        assert torch.equal(read_initial(folder, model.config, 0).parameters["head.bias"], torch.ones(20))
    assert bias.startswith(f"{folder}: lm_head.bias is not zero. It is added to the logits")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        read_model(folder, str(folder))


def test_a_folder_that_has_changed_since_or_is_another_one_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, launch = Reformer(model_config()), Launch("this test")
    folder = write(tmp_path / "model", model)
    weights, sha256 = initial.agreed_weights(folder, model.config, 0, launch, CPU)
    assert sha256 == folder_sha256(folder) == weights_sha256(weights)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    with pytest.raises(ConfigError, match="is not what it was when it was checked: keep it until the first step"):
        initial.agreed_weights(folder, model_config(d_ff=24), 0, launch, CPU)

    monkeypatch.setattr(initial, "hosts", lambda: ["alpha", "beta", "gamma"])
    for other in (1, -1):
        monkeypatch.setattr(initial, "all_gather", lambda own, _, other=other: [own, own, [own[0] + other]])
        with pytest.raises(
            ConfigError, match=r"other weights for rank 2 on gamma than for rank 0 on alpha: have all nodes"
        ):
            initial.agreed_weights(folder, model.config, 0, launch, CPU)


def test_what_tells_weights_apart() -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    digest = weights_sha256(weights)
    assert digest == weights_sha256({name: tensor.float() for name, tensor in weights.items()})
    for other in ({**weights, "a": torch.tensor([0, 0, 1e-40])}, {"c": weights["a"], "b": weights["b"]}):
        assert weights_sha256(other) != digest


def test_a_run_is_not_where_its_weights_come_from(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.init_from=.* is run\.dir itself: give the run a folder of its own"):
        config(run={"dir": tmp_path, "init_from": tmp_path / "link"})


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = Reformer(model_config())
    with torch.no_grad():
        model.head.bias[3] = torch.nan
    folder = write(tmp_path / "model", model)
    with pytest.raises(ConfigError, match="has weights that are not finite: give those of an earlier checkpoint"):
        check_initial(folder, model.config, STORE, OURS)
