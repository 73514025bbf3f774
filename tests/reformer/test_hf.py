"""The same model in Hugging Face's code and in ours: equal logits, loss and gradients; weights exchanged both ways.

Hugging Face's buckets are recorded while it runs and given to our LSH layers, so that both compute the same
function and not only one of the same distribution. All in float64; Hugging Face's loss alone is fp32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hf_models import SMALL, assert_identical, make_model, to_huggingface
from parity import assert_parity, gradients, relative_error
from safetensors.torch import load_file
from torch import Tensor

from reformer import ConfigError, Reformer, ReformerConfig, lsh_attention
from reformer.hf import (
    load_hf,
    save_hf,
    state_from_hf,
)
from reformer.lsh.hashing import hash_to_buckets


@contextmanager
def recorded_buckets() -> Iterator[dict[int, Tensor]]:
    """The buckets [B, H, R, T] that Hugging Face's LSH layers compute, by layer, without the offsets of rounds.

    The same in every run: left alone, its layers draw their seeds from the system, and now and then a short query comes
    out, with which the epsilon in its keys' norm shows in the gradients.
    """
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

    with (
        patch.object(LSHSelfAttention, "_hash_vectors", hash_vectors),
        patch("torch.seed", side_effect=count().__next__),
    ):
        yield buckets


def inject(model: Reformer, buckets: dict[int, Tensor], n_tokens: int) -> None:
    """Let our LSH layers use these buckets, without those of padding tokens."""
    for layer, layer_buckets in buckets.items():
        model.blocks[layer].attention.inner = with_buckets(layer_buckets[..., :n_tokens])


def with_buckets(fixed: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda qk, v, _, **options: lsh_attention(qk, v, fixed, **options)


def losses_logits_gradients(ours: Reformer, theirs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One training step of both on the same tokens, with the same buckets; all by our names."""
    torch.manual_seed(0)
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
        {"attn_pattern": ("lsh",), "n_layers": 2, "causal": False, "n_hashes": 1},
        {"attn_pattern": ("lsh",), "n_layers": 2, "causal": False, "n_hashes": 4},
    ],
)
def test_other_layers_equal_hugging_face(changes: dict[str, Any], tmp_path: Path) -> None:
    ours = make_model(**changes)
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
    ours = make_model(dropout=0.25, attn_dropout=0.5).float().eval()
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
            is_decoder=True, axial_pos_shape=[16, 16], max_position_embeddings=256, num_hashes=2,
            attn_layers=["local", "lsh"], num_attention_heads=2,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"share one attn_dropout; name it.* by load_hf\(folder, attn_dropout=0.0\)"):
        load_hf(tmp_path / "theirs")
    assert load_hf(tmp_path / "theirs", attn_dropout=0.1).config.attn_dropout == 0.1
    ours = load_hf(tmp_path / "theirs", attn_dropout=0.0)
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
