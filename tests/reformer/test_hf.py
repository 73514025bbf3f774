"""The same model in Hugging Face's code and in ours: equal logits, loss and gradients; weights exchanged both ways.

Hugging Face's buckets are recorded while it runs and given to our LSH layers, so that both compute the same
function and not only one of the same distribution. All in float64; Hugging Face's loss alone is fp32.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_parity, gradients, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor

from reformer import ConfigError, Reformer, ReformerConfig, lsh_attention
from reformer.hf import (
    DEFAULTS,
    config_from_hf,
    config_to_hf,
    load_hf,
    save_hf,
    state_from_hf,
    state_to_hf,
    tensor_names,
)
from reformer.lsh.hashing import hash_to_buckets

# d_head is not d_model / n_heads, and no two numbers that could be taken for each other are equal.
SMALL: dict[str, Any] = {
    "vocab_size": 23, "max_seq_len": 96, "d_model": 20, "n_layers": 4, "n_heads": 2, "d_head": 6, "d_ff": 28,
    "n_buckets": (2, 6), "n_hashes": 2, "lsh_chunk_len": 8, "local_chunk_len": 16, "axial_shape": (8, 12),
    "axial_dims": (7, 13), "norm_eps": 1e-5, "seed": 3, "ff_chunk_tokens": 50, "loss_chunk_tokens": 70,
}  # fmt: skip


def make_model(**changes: object) -> Reformer:
    """A model in which no parameter is 0 or 1 everywhere, except the head's bias."""
    torch.manual_seed(0)
    model = Reformer(ReformerConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "head.bias":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()  # of numbers that are exact in fp32, in which transformers keeps its axial positions


def to_huggingface(model: Reformer, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    save_hf(model, folder)
    kind = transformers.ReformerModelWithLMHead if model.config.causal else transformers.ReformerForMaskedLM
    loaded, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return loaded


@contextmanager
def recorded_buckets() -> Iterator[dict[int, Tensor]]:
    """The buckets [B, H, R, T] that Hugging Face's LSH layers compute, by layer, without the offsets of rounds."""
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    original = LSHSelfAttention._hash_vectors
    buckets: dict[int, Tensor] = {}

    def hash_vectors(layer: Any, vectors: Tensor, num_hashes: int, mask: Tensor | None, **options: Any) -> Tensor:
        with_offsets = original(layer, vectors, num_hashes, mask, **options)
        by_round = with_offsets.unflatten(-1, (num_hashes, -1))
        assert layer.layer_idx not in buckets, "hashed twice"
        n_buckets = torch.tensor(layer.num_buckets).prod() + (mask is not None and not mask.all())
        buckets[layer.layer_idx] = by_round - torch.arange(num_hashes)[:, None] * n_buckets
        assert buckets[layer.layer_idx].min() >= 0 and buckets[layer.layer_idx].max() < n_buckets
        return with_offsets

    LSHSelfAttention._hash_vectors = hash_vectors
    try:
        yield buckets
    finally:
        LSHSelfAttention._hash_vectors = original


def inject(model: Reformer, buckets: dict[int, Tensor], n_tokens: int) -> None:
    """Let our LSH layers use these buckets, without those of padding tokens."""
    for layer, layer_buckets in buckets.items():
        model.blocks[layer].attention.inner = with_buckets(layer_buckets[..., :n_tokens])


def with_buckets(fixed: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda qk, v, _, **options: lsh_attention(qk, v, fixed, **options)


def assert_identical(actual: Reformer, expected: Reformer) -> None:
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        found = actual.state_dict()[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


def losses_logits_gradients(ours: Reformer, theirs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One training step of both on the same tokens, with the same buckets; all by our names."""
    torch.manual_seed(0)  # tokens, and Hugging Face's rotations
    tokens, labels = torch.randint(1, SMALL["vocab_size"], (2, 2, SMALL["max_seq_len"]))
    labels[0, 5:40] = labels[:, 0] = -100
    shifted = torch.cat([labels[:, 1:], labels.new_full((2, 1), -100)], dim=1) if ours.config.causal else labels
    with recorded_buckets() as buckets:
        out = theirs.double().train()(tokens, labels=labels)
        out.logits.retain_grad()
        out.loss.backward()
    assert len(buckets) == sum(ours.config.attention_kind(i) == "lsh" for i in range(ours.config.n_layers))
    inject(ours, buckets, SMALL["max_seq_len"])
    with torch.no_grad():
        logits = ours(tokens)
    loss = ours(tokens, shifted)
    loss.backward()
    # Not in transformers 5, which leaves the bias out: its gradient follows from that of the logits.
    theirs.lm_head.bias.grad = out.logits.grad.sum((0, 1))
    expected = state_from_hf(gradients(theirs), ours.config)
    return (
        {"loss": loss.detach(), "logits": logits, **gradients(ours)},
        {"loss": out.loss.detach().double(), "logits": out.logits.detach(), **expected},
    )


@pytest.mark.parametrize("n_hashes", [1, 2, 4])
@pytest.mark.parametrize("n_buckets", [8, (2, 6), None])
def test_a_training_step_equals_hugging_face(n_hashes: int, n_buckets: Any, tmp_path: Path) -> None:
    ours = make_model(n_hashes=n_hashes, n_buckets=n_buckets)
    actual, expected = losses_logits_gradients(ours, to_huggingface(ours, tmp_path / "hf"))
    assert_parity(actual, expected, 2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_pattern": ("lsh",), "n_layers": 2, "activation": "gelu"},
        {"attn_pattern": ("local",), "n_layers": 2},
        {"attn_pattern": ("lsh", "local", "local"), "n_layers": 3, "lsh_chunk_len": 32, "local_chunk_len": 8},
    ],
)
def test_other_layers_equal_hugging_face(changes: dict[str, Any], tmp_path: Path) -> None:
    ours = make_model(**changes)
    actual, expected = losses_logits_gradients(ours, to_huggingface(ours, tmp_path / "hf"))
    assert_parity(actual, expected, 2e-5)


@pytest.mark.parametrize("n_hashes", [1, 4])
def test_bidirectional_lsh_equals_hugging_face(n_hashes: int, tmp_path: Path) -> None:
    ours = make_model(causal=False, attn_pattern=("lsh",), n_layers=2, n_hashes=n_hashes)
    actual, expected = losses_logits_gradients(ours, to_huggingface(ours, tmp_path / "hf"))
    assert_parity(actual, expected, 2e-5)


@pytest.mark.parametrize("n_tokens", [1, 7, 8, 9, 63, 90])
def test_evaluation_at_any_length_equals_hugging_face(n_tokens: int, tmp_path: Path) -> None:
    """Lengths that Hugging Face pads, and those that it computes densely."""
    ours = make_model(local_chunk_len=8, n_hashes=4).eval()
    theirs = to_huggingface(ours, tmp_path / "hf").double().eval()
    tokens = torch.randint(1, SMALL["vocab_size"], (2, n_tokens))
    with torch.no_grad(), recorded_buckets() as buckets:
        expected = theirs(tokens).logits
        inject(ours, buckets, n_tokens)
        assert relative_error(ours(tokens), expected) < 2e-5
    assert bool(buckets) == (n_tokens > 8)


@pytest.mark.parametrize("factors", [(8,), (2, 6), (4, 2, 6)])
def test_the_same_rotations_give_the_same_buckets(factors: tuple[int, ...]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = transformers.ReformerConfig(num_attention_heads=2, attention_head_size=6, num_buckets=list(factors))
    layer = LSHSelfAttention(config, layer_idx=0)
    vectors = torch.randn(3, 2, 50, 6)
    torch.manual_seed(5)
    rotations = torch.randn(2, 6, 4, sum(factors) // 2)
    with recorded_buckets() as buckets:
        torch.manual_seed(5)
        layer._hash_vectors(vectors, 4, None)
    assert torch.equal(hash_to_buckets(vectors, rotations, factors).long(), buckets[0])


def test_round_trip_through_hugging_face_changes_nothing(tmp_path: Path) -> None:
    ours = make_model(dropout=0.25, attn_dropout=0.5).float()
    to_huggingface(ours, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = load_hf(tmp_path / "theirs")
    assert back.config == ours.config
    assert_identical(back, ours)
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 61))
    with torch.no_grad():
        assert torch.equal(back(tokens), ours(tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_saving_and_loading_keeps_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model().to(dtype)
    save_hf(model, tmp_path)
    assert_identical(load_hf(tmp_path), model)


def test_a_model_that_began_at_hugging_face(tmp_path: Path) -> None:
    """Of transformers' own default settings where ours can express them, and with its initial weights.

    Those are so small (standard deviation 0.02) that the epsilon in the keys' norm shows: see reformer/hf.py.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.ReformerModelWithLMHead(
        transformers.ReformerConfig(
            is_decoder=True, axial_pos_shape=[16, 16], max_position_embeddings=256,
            local_attention_probs_dropout_prob=0.0, num_hashes=2, attn_layers=["local", "lsh"], num_attention_heads=2,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_hf(tmp_path / "theirs")
    assert ours.config == ReformerConfig(
        vocab_size=320, max_seq_len=256, d_model=256, n_layers=2, attn_pattern=("local", "lsh"), n_heads=2, d_head=64,
        d_ff=512, n_hashes=2, norm_eps=1e-12, dropout=0.05, axial_shape=(16, 16), axial_dims=(64, 192),
    )  # fmt: skip
    tokens = torch.randint(1, 320, (1, 256))
    with torch.no_grad(), recorded_buckets() as buckets:
        expected = theirs(tokens).logits
        inject(ours.eval(), buckets, 256)
        assert relative_error(ours(tokens), expected) < 1e-4
    save_hf(ours, tmp_path / "again")
    written, again = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert written.keys() == again.keys() and all(torch.equal(written[name], again[name]) for name in written)


def test_a_trained_head_bias_is_exported_in_a_form_that_hugging_face_adds(tmp_path: Path) -> None:
    ours = make_model(attn_pattern=("local",), n_layers=1)
    with torch.no_grad():
        ours.head.bias.normal_()
    theirs = to_huggingface(ours, tmp_path / "hf").double().eval()
    assert theirs.lm_head.bias.abs().max() == 0
    back = load_hf(tmp_path / "hf")
    tokens = torch.randint(1, SMALL["vocab_size"], (2, SMALL["max_seq_len"]))
    with torch.no_grad():
        assert relative_error(theirs(tokens).logits, ours(tokens)) < 1e-12
        assert relative_error(back(tokens), ours(tokens)) < 1e-12
    changed = {name for name, tensor in ours.state_dict().items() if not torch.equal(tensor, back.state_dict()[name])}
    assert changed == {"head.weight", "head.norm_bias", "head.bias"}
    with torch.no_grad():
        ours.head.norm_weight[4] = 1e-7
    with pytest.raises(ConfigError, match=r"head.norm_weight has elements from 1.0e-07.*set head.bias to zero"):
        save_hf(ours, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_tied_embeddings_are_exported_as_a_head_of_its_own(bias: float, tmp_path: Path) -> None:
    ours = make_model(attn_pattern=("local",), n_layers=1, tie_embeddings=True)
    with torch.no_grad():
        ours.head.bias.normal_(std=bias)
    theirs = to_huggingface(ours, tmp_path / "hf").double().eval()
    back = load_hf(tmp_path / "hf")
    assert not back.config.tie_embeddings and back.head.weight.shape == (SMALL["vocab_size"], 2 * SMALL["d_model"])
    tokens = torch.randint(1, SMALL["vocab_size"], (2, SMALL["max_seq_len"]))
    with torch.no_grad():
        assert relative_error(theirs(tokens).logits, ours(tokens)) < 1e-12
        assert relative_error(back(tokens), ours(tokens)) < 1e-12


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ReformerConfig().to_dict()
    assert {**theirs, "longhand": {}} | DEFAULTS == {**theirs, "longhand": {}}


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
        ({"attn_layers": ["local", "global"]}, r"attn_layers=\['local', 'global'\]: expected a list"),
        ({"attn_layers": []}, r"attn_layers=\[\]"),
        ({"attn_layers": 4}, "attn_layers=4"),
        ({"is_decoder": False}, "is_decoder=False with local layers: without a causal mask"),
        ({"axial_pos_embds": False}, "axial_pos_embds=False.*axial position embeddings only"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True.*set it to false"),
        ({"hash_seed": 7}, "hash_seed=7.*set it to null"),
        ({"local_num_chunks_before": 2}, "local_num_chunks_before=2.*computes with 1"),
        ({"lsh_num_chunks_before": 0}, "lsh_num_chunks_before=0"),
        ({"lsh_num_chunks_after": 1}, "lsh_num_chunks_after=1.*computes with 0"),
        ({"is_decoder": False, "attn_layers": ["lsh"], "lsh_num_chunks_after": 0}, "lsh_num_chunks_after=0.*with 1"),
        ({"local_attention_probs_dropout_prob": 0.05}, "lsh_attention_probs_dropout_prob=0.1.*with 0.05: .*same value"),
        (
            {"attn_layers": ["lsh"], "lsh_attention_probs_dropout_prob": 1.5},
            r"'attn_dropout'(.|\n)*attn_dropout is lsh_attention_probs_dropout_prob",
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
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        load_hf(tmp_path)


def test_saving_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = make_model(), tmp_path / "hf"

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("reformer.hf.save_file", fail)
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


def test_the_readmes_example_runs(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL) if "load_hf" in block)
    subprocess.run([sys.executable, "-c", example], check=True, cwd=tmp_path)
    assert load_hf(tmp_path / "exported").config.vocab_size == 256
