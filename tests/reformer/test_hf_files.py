"""Folders of Hugging Face's weights: configurations, names, and what cannot be read or written, each by its name."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import SMALL, assert_identical, make_model
from parity import gradients, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor

from reformer import ConfigError, Reformer, ReformerConfig
from reformer.hf import config_from_hf, config_to_hf, fold_head_bias, load_hf, save_hf, state_from_hf, state_to_hf
from reformer.hf_names import DEFAULTS, tensor_names


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = {**transformers.ReformerConfig().to_dict(), "longhand": {}}
    defaults, theirs = json.loads(json.dumps(DEFAULTS)), json.loads(json.dumps(theirs))  # tuples are lists in a file
    assert theirs | defaults == theirs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "n_buckets": None,
            "activation": "gelu",
            "dropout": 0.25,
            "attn_dropout": 0.5,
            "n_layers": 5,
            "attn_pattern": ("lsh", "local"),
        },
        {"n_buckets": 8, "causal": False, "attn_pattern": ("lsh",)},
    ],
)
def test_configurations_survive_json(changes: dict[str, Any]) -> None:
    config = ReformerConfig(**{**SMALL, **changes})
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_tensor_names_cover_the_state_exactly_once() -> None:
    model = make_model()
    names = tensor_names(model.config)
    assert names.keys() == model.state_dict().keys() and len(set(names.values())) == len(names)
    back = state_from_hf(state_to_hf(model.state_dict(), model.config), model.config)
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type='bert'.*folder of a Reformer"),
        ({"attn_pattern": ["lsh"]}, "is one of launch/export.py or save_model: read the folder with load_model"),
        ({"attn_layers": ["local", "global"]}, r"attn_layers=\['local', 'global'\]: expected a list"),
        ({"attn_layers": []}, r"attn_layers=\[\]"),
        ({"attn_layers": 4}, "attn_layers=4"),
        ({"attn_layers": [["lsh"], "local"]}, r"attn_layers=\[\['lsh'\], 'local'\]: expected a list"),
        ({"is_decoder": "false"}, "is_decoder='false' in config.json: expected true or false"),
        ({"num_buckets": 0}, r"each factor must be even(.|\n)*n_buckets is num_buckets"),
        ({"is_decoder": False}, "is_decoder=False with local layers: without a causal mask"),
        ({"axial_pos_embds": False}, "axial_pos_embds=False.*axial position embeddings only"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True.*set it to false"),
        ({"hash_seed": 7}, "hash_seed=7.*set it to null"),
        ({"local_num_chunks_before": 2}, "local_num_chunks_before=2.*computes with 1"),
        ({"lsh_num_chunks_before": 0}, "lsh_num_chunks_before=0"),
        ({"lsh_num_chunks_after": 1}, "lsh_num_chunks_after=1.*computes with 0"),
        ({"is_decoder": False, "attn_layers": ["lsh"], "lsh_num_chunks_after": 0}, "lsh_num_chunks_after=0.*with 1"),
        (
            {"local_attention_probs_dropout_prob": 0.05},
            "lsh_attention_probs_dropout_prob=0.1.*with 0.05: .*attn_dropout=0.0",
        ),
        (
            {"attn_layers": ["lsh"], "lsh_attention_probs_dropout_prob": 1.5},
            r"'attn_dropout'(.|\n)*In config.json, attn_dropout is lsh_attention_probs_dropout_prob",
        ),
        ({"axial_pos_shape": [8, 6, 2]}, r"axial_pos_shape=\[8, 6, 2\].*two axes"),
        ({"axial_pos_shape": "8"}, "axial_pos_shape='8'"),
        ({"max_position_embeddings": 500}, "max_position_embeddings=500.*their product"),
        ({"axial_pos_embds_dim": [7, 7]}, r"must sum to d_model=20(.|\n)*axial_dims is axial_pos_embds_dim"),
        ({"hidden_act": "gelu_new"}, r"'relu' or 'gelu' \(got 'gelu_new'\)(.|\n)*activation is hidden_act"),
        ({"num_buckets": [4, 3]}, r"each factor must be even(.|\n)*n_buckets is num_buckets"),
        ({"hidden_dropout_prob": 1.0}, r"'dropout'(.|\n)*dropout is hidden_dropout_prob"),
        ({"lsh_attn_chunk_length": None}, r"got None(.|\n)*lsh_chunk_len is lsh_attn_chunk_length"),
        ({"longhand": {"d_model": 3}}, r"longhand={'d_model': 3}: expected an object of nothing but"),
        ({"longhand": 3}, "longhand=3"),
        ({"longhand": {"seed": -1}}, "'seed'"),
    ],
)
def test_what_cannot_be_imported_is_named(changes: dict[str, Any], message: str) -> None:
    values = config_to_hf(ReformerConfig(**SMALL, attn_dropout=0.1))
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attend_across_buckets": False}, "attend_across_buckets=False has no counterpart"),
        ({"duplicate_correction": True}, "duplicate_correction=True has no counterpart"),
        ({"causal": False}, "causal=False with attn_pattern"),
        ({"attn_pattern": ("lsh", "dense")}, "'dense'.*no dense attention; load the weights into a model with 'lsh'"),
    ],
)
def test_what_cannot_be_exported_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        save_hf(make_model(**changes), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_hf(make_model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    query = "reformer.encoder.layers.0.attention.self_attention.query.weight"
    odd = {**tensors, "extra.weight": torch.zeros(2), query: torch.zeros(3, 20), "lm_head.bias": torch.zeros(23).int()}
    del odd["lm_head.decoder.weight"]
    rewrite(tmp_path, odd)
    with pytest.raises(ConfigError) as error:
        load_hf(tmp_path)
    for line in (
        "lm_head.decoder.weight is missing",
        "extra.weight is not part of such a model",
        f"{query} is [3, 20], expected [12, 20]",
        "lm_head.bias is torch.int32, expected floating-point numbers",
    ):
        assert line in str(error.value)


def test_a_bias_that_transformers_5_ignores_is_warned_of_and_used(tmp_path: Path) -> None:
    ours = make_model()
    save_hf(ours, tmp_path)
    bias = torch.randn(SMALL["vocab_size"], dtype=torch.float64)
    rewrite(tmp_path, {**load_file(tmp_path / "model.safetensors"), "lm_head.bias": bias})
    with pytest.warns(UserWarning, match="lm_head.bias is not zero"):
        loaded = load_hf(tmp_path)
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 30))
    with torch.no_grad():
        assert relative_error(loaded(tokens), ours(tokens) + bias) < 1e-12


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json is missing: give a folder"):
        load_hf(tmp_path)
    save_hf(make_model(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
        load_hf(tmp_path)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"model.safetensors is missing: only one file of safetensors"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"must hold an object.*got list"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON"):
        load_hf(tmp_path)


def test_saving_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = make_model(), tmp_path / "hf"

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("reformer.weights.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            save_hf(model, folder)
    assert not folder.exists()
    save_hf(model, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    with pytest.raises(FileExistsError, match="not an empty folder: remove it"):
        save_hf(model, folder)
    assert load_hf(folder).config == model.config


def test_a_loaded_model_does_not_depend_on_the_file(tmp_path: Path) -> None:
    """The file is mapped into memory when it is read: were the tensors not copied, this would change them."""
    model = make_model()
    save_hf(model, tmp_path)
    loaded = load_hf(tmp_path)
    weights = tmp_path / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-4000, 2)
        file.write(bytes(4000))
    assert_identical(loaded, model)
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 40))
    loaded(tokens, tokens).backward()
    assert gradients(loaded).keys() == dict(model.named_parameters()).keys()


def test_a_partitioned_model_is_refused(tmp_path: Path) -> None:
    model = make_model()
    model.head.weight.data = model.head.weight.data.new_empty(0)  # as under ZeRO-3
    with pytest.raises(ConfigError, match=r"gathered from all ranks\n  head.weight is \[0\], expected \[23, 40\]"):
        save_hf(model, tmp_path / "hf")


def test_the_documented_example_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/library.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "load_hf" in block)
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", example], check=True, cwd=tmp_path)
    assert load_hf(tmp_path / "exported_hf").config.vocab_size == 256


@pytest.mark.parametrize(
    ("max_seq_len", "said"),
    [
        (30, "max_seq_len=30 is no multiple of 12, .* refuses those of more than 24 tokens"),
        (10, "max_seq_len=10 is no multiple of 12, .* refuses those of more than 4 tokens"),
    ],
)
def test_lengths_that_transformers_refuses_are_told(max_seq_len: int, said: str, tmp_path: Path) -> None:
    kinds = {"attn_pattern": ("local", "lsh"), "local_chunk_len": 4, "lsh_chunk_len": 6, "n_buckets": 2}
    model = Reformer(ReformerConfig(vocab_size=8, n_layers=2, d_model=8, n_heads=1, max_seq_len=max_seq_len, **kinds))
    with pytest.warns(UserWarning, match=said):
        save_hf(model, tmp_path / "hf")


def test_of_buckets_nothing_is_said_without_lsh_layers(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    size = {"vocab_size": 8, "n_layers": 1, "d_model": 8, "n_heads": 1, "max_seq_len": 64}
    save_hf(Reformer(ReformerConfig(**size, attn_pattern=("local",))), tmp_path / "hf")
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"n_buckets=None: .* \(model.n_buckets=\[2\] is ours"):
        save_hf(Reformer(ReformerConfig(**size, attn_pattern=("lsh",))), tmp_path / "lsh")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_bias_is_folded_whatever_the_norm_adds_up_to(sign: float) -> None:
    """Where sum(s/g) is n or -n, one of the two signs of c divides by zero."""
    torch.manual_seed(0)
    gain = torch.rand(6) + 0.5
    state = {"weight": torch.randn(5, 6), "bias": torch.randn(5), "norm_weight": gain, "norm_bias": sign * gain}
    folded = fold_head_bias({f"head.{name}": tensor for name, tensor in state.items()})
    z = torch.randn(3, 6)
    z = z - z.mean(dim=1, keepdim=True)

    def head(weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return (norm_weight * z + norm_bias) @ weight.T + bias

    found = head(**{name: folded[f"head.{name}"] for name in state})
    assert not folded["head.bias"].any()
    assert torch.allclose(found, head(**state), atol=1e-5)
