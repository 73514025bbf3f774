"""The output head against plain autograd, tied and not: values, gradients, hooks, and what it holds in memory.

Axes: B batch, T tokens, t tokens of a chunk, M model, V vocabulary.
"""

from collections import Counter
from copy import deepcopy

import pytest
import torch
from parity import assert_parity, gradients
from torch import Tensor
from torch.nn import functional as F

from reformer import Reformer, ReformerConfig
from reformer.call import Call

SMALL = {"vocab_size": 23, "max_seq_len": 64, "d_model": 12, "n_layers": 2, "n_heads": 2, "lsh_chunk_len": 8}


def make_model(**changes: object) -> Reformer:
    """A model in which no parameter is 0 or 1 everywhere."""
    torch.manual_seed(0)
    model = Reformer(ReformerConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def make_batch(n_tokens: int = 51) -> tuple[Tensor, Tensor]:
    """Tokens and labels [2, T]; a third of the labels and a stretch of several chunks are ignored."""
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, SMALL["vocab_size"], (2, 2, n_tokens), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[1, 10:30] = -100
    return tokens, labels


def plain_loss(model: Reformer, tokens: Tensor, labels: Tensor) -> Tensor:
    """Every step of the definition on the whole sequence, by plain autograd."""
    y1 = y2 = model.embedding(tokens)
    for block in model.blocks:
        y1, y2, _ = block(y1, y2, Call(0))
    head, both = model.head, torch.cat([y1, y2], dim=-1)
    normed = F.layer_norm(both, both.shape[-1:], head.norm_weight, head.norm_bias, head.norm_eps)
    if model.config.tie_embeddings:
        logits = (normed @ head.projection_weight.T) @ model.embedding.tokens.weight.T + head.bias
    else:
        logits = normed @ head.weight.T + head.bias
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 17, 102, 1000])
def test_loss_and_gradients_are_those_of_plain_autograd(tied: bool, chunk_tokens: int) -> None:
    model = make_model(tie_embeddings=tied, loss_chunk_tokens=chunk_tokens)
    tokens, labels = make_batch()
    loss = model(tokens, labels)
    loss.backward()
    actual = {"loss": loss.detach(), **gradients(model)}
    expected = plain_loss(model, tokens, labels)
    expected.backward()
    assert_parity(actual, {"loss": expected.detach(), **gradients(model)}, 1e-10)
    with torch.no_grad():
        assert_parity({"loss": model(tokens, labels)}, {"loss": expected.detach()}, 1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_every_hook_fires_once_per_backward(tied: bool) -> None:
    model = make_model(tie_embeddings=tied, loss_chunk_tokens=7)
    fired: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.update([name]))
    model(*make_batch()).backward()
    assert fired == dict.fromkeys(dict(model.named_parameters()), 1)


def test_a_tied_embedding_is_one_parameter() -> None:
    tied, untied = (Reformer(ReformerConfig(**SMALL, tie_embeddings=choice)) for choice in (True, False))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (tied, untied)]
    vocab_size, d_model = SMALL["vocab_size"], SMALL["d_model"]
    assert sizes[1] - sizes[0] == vocab_size * 2 * d_model - d_model * 2 * d_model
    assert "head.weight" not in dict(tied.named_parameters())
    # Each of the two modules knows it, so that ZeRO-3 gathers it for either.
    assert any(parameter is tied.embedding.tokens.weight for parameter in tied.head.parameters(recurse=False))


def test_a_tied_embedding_stays_tied() -> None:
    """Through conversions, copies, and a state_dict, which goes back into another tied model."""
    model, other = (make_model(tie_embeddings=True) for _ in range(2))
    with torch.no_grad():
        other.embedding.tokens.weight.zero_()
    other.load_state_dict(model.state_dict(), strict=True)
    tokens, labels = make_batch()
    assert torch.equal(make_model(tie_embeddings=True)(tokens, labels), other(tokens, labels))
    for converted in (model, other, deepcopy(model), model.to(torch.float32), model.bfloat16(), model.half().double()):
        assert converted.head.weight is converted.embedding.tokens.weight
        with torch.no_grad():
            converted.embedding.tokens.weight.fill_(3.0)
        assert (converted.head.weight == 3).all()


@pytest.mark.parametrize("tied", [False, True])
def test_logits_start_at_unit_variance(tied: bool) -> None:
    torch.manual_seed(0)
    model = Reformer(ReformerConfig(vocab_size=500, d_model=64, n_layers=1, tie_embeddings=tied))
    y1, y2 = torch.randn(2, 1, 300, 64)
    assert model.head(y1, y2).std().item() == pytest.approx(1.0, rel=0.1)
