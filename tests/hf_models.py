"""A small model in our code and in Hugging Face's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from reformer import Reformer, ReformerConfig
from reformer.hf import save_hf

# d_head is not d_model / n_heads, and no two numbers that could be taken for each other are equal.
SMALL: dict[str, Any] = {
    "vocab_size": 23, "max_seq_len": 96, "d_model": 20, "n_layers": 4, "n_heads": 2, "d_head": 6, "d_ff": 28,
    "n_buckets": (2, 6), "n_hashes": 2, "lsh_chunk_len": 8, "local_chunk_len": 16, "axial_shape": (8, 12),
    "axial_dims": (7, 13), "norm_eps": 1e-5, "seed": 3, "ff_chunk_tokens": 50, "loss_chunk_tokens": 70,
    "keep_ends": False,
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


def assert_identical(actual: Reformer, expected: Reformer) -> None:
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        found = actual.state_dict()[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
