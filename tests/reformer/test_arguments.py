"""What callers may give for a tensor, a number or a switch, and what is said of anything else."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_models import SMALL, small_model

from reformer import Reformer, ReformerConfig, lsh_attention
from reformer.decoding import Decoder
from reformer.dense import dense_attention
from reformer.generation import continue_tokens
from reformer.local import local_attention

TOKENS = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
HEADS = torch.randn(2, 3, 20, 4, generator=torch.Generator().manual_seed(2))
IDS, KEYS, BUCKETS = torch.zeros(2, 20).long(), torch.zeros(2, 3).long(), torch.zeros(2, 3, 1, 20).long()
ROTATIONS = torch.zeros(3, 4, 1, 3)


@pytest.mark.parametrize("name", ["labels", "segment_ids"])
def test_a_model_names_what_is_no_tensor(name: str) -> None:
    for given in (IDS.numpy(), IDS.tolist()):
        message = f"{name} must be a torch tensor of integers, got {type(given).__name__}: use torch.as_tensor"
        with pytest.raises(ValueError, match=message):
            small_model()(TOKENS, **{name: given}, step=0)


ATTENTIONS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (lsh_attention, {"qk": HEADS, "v": HEADS, "n_hashes": 1, "chunk_len": 4, "n_buckets": 6}),
    (local_attention, {"q": HEADS, "k": HEADS, "v": HEADS, "chunk_len": 4}),
    (dense_attention, {"qk": HEADS, "v": HEADS}),
]


@pytest.mark.parametrize(("attend", "valid"), ATTENTIONS)
def test_attention_names_what_is_no_tensor(attend: Callable[..., Any], valid: dict[str, Any]) -> None:
    masks = {"key_padding_mask": IDS, "segment_ids": IDS, "dropout_keys": KEYS}
    others = {"buckets": BUCKETS, "rotations": ROTATIONS} if attend is lsh_attention else {}
    heads = {name: x for name, x in valid.items() if x is HEADS}
    for name, x in (heads | masks | others).items():
        with pytest.raises(ValueError, match=f"^{name} must be a torch tensor of .*, got ndarray: use torch.as_tensor"):
            attend(**valid | {name: x.numpy()})


@pytest.mark.parametrize(("attend", "valid"), ATTENTIONS)
def test_a_switch_is_a_boolean(attend: Callable[..., Any], valid: dict[str, Any]) -> None:
    others = ["attend_across_buckets", "duplicate_correction"] if attend is lsh_attention else []
    for name in ("causal", *others):
        for given in ("yes", 1, None, np.int64(1), torch.tensor(True)):
            with pytest.raises(ValueError, match=rf"^{name}=.* must be True or False"):
                attend(**valid, **{name: given})
    torch.manual_seed(0)
    expected = attend(**valid, causal=False)
    torch.manual_seed(0)
    torch.testing.assert_close(attend(**valid, causal=np.bool_(False)), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 1.0}, "step=1.0 must be a whole number, got float"),
        ({"step": True}, "step=True must be a whole number, got bool"),
        ({"step": "1"}, "step='1' must be a whole number, got str"),
        ({"n_hashes": 2.0}, "n_hashes=2.0 must be a whole number, got float"),
        ({"step": torch.tensor(True)}, r"step=tensor\(True\) must be a whole number, got Tensor"),
        ({"n_hashes": True}, "n_hashes=True must be a whole number, got bool"),
        ({"n_hashes": "2"}, "n_hashes='2' must be a whole number, got str"),
        ({"sample_ids": 3}, "sample_ids=3 must be a list of whole numbers, one for each sample"),
        ({"sample_ids": torch.tensor(3)}, r"sample_ids=tensor\(3\) must be a list of whole numbers"),
        ({"sample_ids": [0, 1.5]}, "sample_ids=1.5 must be a whole number, got float"),
    ],
)
def test_a_model_names_what_is_no_whole_number(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        small_model()(TOKENS, **{"step": 0, **given})


def test_numbers_of_numpy_are_taken_as_the_numbers_that_they_are() -> None:
    model = small_model(dropout=0.2)
    expected = model(TOKENS, TOKENS, step=3, n_hashes=3, sample_ids=[4, 5])
    of_numpy = {"step": np.int64(3), "n_hashes": np.int32(3), "sample_ids": np.array([4, 5])}
    assert torch.equal(model(TOKENS, TOKENS, **of_numpy), expected)
    buckets = BUCKETS.expand(2, 3, 2, 20)
    options = [{"n_hashes": kind(2), "chunk_len": kind(4), "n_buckets": kind(4)} for kind in (int, np.int64)]
    ours, theirs = (lsh_attention(HEADS, HEADS, buckets, **given)[0] for given in options)
    assert torch.equal(ours, theirs)
    factors: Any = [np.int64(2), 4]
    hashed = lsh_attention(HEADS, HEADS, n_hashes=np.int64(2), chunk_len=np.int64(4), n_buckets=factors)[1]
    assert hashed.shape == (2, 3, 2, 20)
    ours, theirs = (local_attention(HEADS, HEADS, HEADS, chunk_len=kind(4)) for kind in (int, np.uint8))
    assert torch.equal(ours, theirs)


def test_numbers_of_a_continuation() -> None:
    model = small_model().eval()
    added = [continue_tokens(model, model.config, TOKENS[0], kind(2), seed=kind(5)) for kind in (int, np.int64)]
    assert torch.equal(*added)
    with pytest.raises(TypeError, match=r"n_tokens=2.0 must be a whole number, got float"):
        continue_tokens(model, model.config, TOKENS[0], 2.0)
    with pytest.raises(TypeError, match=r"seed=0.5 must be a whole number, got float"):
        continue_tokens(model, model.config, TOKENS, 2, seed=[1, 0.5])
    decoder = Decoder(model)
    rows: Any = [1.0]
    decoder(TOKENS)
    with pytest.raises(TypeError, match=r"rows=1.0 must be a whole number, got float"):
        decoder.keep(rows)


def test_a_model_is_made_of_a_configuration() -> None:
    with pytest.raises(TypeError, match=r"config must be a ReformerConfig, got dict: give Reformer\(ReformerConfig"):
        Reformer(SMALL)
    assert Reformer(ReformerConfig(**SMALL)).config.d_model == 16
