"""How much of the scores dense attention has at once."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reformer import dense as dense_module
from reformer.dense import dense_attention


class _LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.operations = 0, set[str]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        self.operations.add(str(function))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_dense_never_has_all_scores_at_once() -> None:
    n_tokens = 2048
    qk, v, d_out = (
        torch.randn(1, 1, n_tokens, 4, dtype=torch.float64, requires_grad=grad) for grad in (True, True, False)
    )
    with _LargestTensor() as largest:
        out = dense_attention(qk, v, dropout=0.1, dropout_keys=torch.zeros(1, 1).int())
        out.backward(d_out)
    assert "aten.baddbmm_.default" in largest.operations  # the backward was seen too
    assert 64 * n_tokens <= largest.numel <= dense_module.BLOCK_SCORES["cpu"] < n_tokens**2


@pytest.mark.parametrize(
    ("device", "n_heads", "n_tokens", "heads_of_block", "queries_of_block"),
    [
        ("cpu", 200, 100, 52, 100),
        ("cpu", 3, 1024, 2, 256),
        ("cpu", 3, 4096, 1, 128),
        ("cpu", 3, 2**20, 1, 64),
        ("meta", 100, 1000, 67, 1000),
        ("meta", 3, 2**15, 1, 2048),
        ("meta", 3, 2**21, 1, 64),
    ],
)
def test_blocks_of_dense_attention_are_as_large_as_memory_allows(
    device: str, n_heads: int, n_tokens: int, heads_of_block: int, queries_of_block: int
) -> None:
    """ "meta" stands for whatever is no CPU."""
    like = torch.empty(1, device=device).expand(n_heads, n_tokens, 8)
    view = dense_module._View(True, None, None, None, dropout=0.0, dropout_keys_G=None)
    first = next(view.blocks(like))
    assert (first.heads, first.queries) == (slice(0, heads_of_block), slice(0, queries_of_block))
    assert first.keys == first.queries
