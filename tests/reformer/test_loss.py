"""The output head against plain autograd, tied and not: values, gradients, hooks, and what it holds in memory.

Axes: B batch, T tokens, t tokens of a chunk, M model, V vocabulary.
"""

import weakref
from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from parity import assert_parity, gradients, relative_error
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reformer import Reformer, ReformerConfig
from reformer.call import Call
from reformer.loss import OutputHead, mean_loss

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
    normed = F.layer_norm(both, both.shape[-1:], head.norm_weight, head.norm_bias, model.config.norm_eps)
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
@pytest.mark.parametrize("chunk_tokens", [1, 17, 1000])
def test_the_loss_of_each_token(tied: bool, chunk_tokens: int) -> None:
    """As cross entropy gives it, and their mean is the mean loss to the bit."""
    model = make_model(tie_embeddings=tied, loss_chunk_tokens=chunk_tokens)
    tokens, labels = make_batch()
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens).transpose(1, 2), labels, reduction="none")
        losses = model(tokens, labels, per_token=True)
        mean = model(tokens, labels)
    assert_parity({"losses": losses}, {"losses": expected}, 1e-12)
    assert not losses[labels < 0].any() and losses[labels >= 0].all()
    assert torch.equal(mean_loss(losses, labels, chunk_tokens), mean)
    half = model.bfloat16()
    with torch.no_grad():
        losses = half(tokens, labels, per_token=True)
        assert losses.dtype == torch.float32
        assert torch.equal(mean_loss(losses, labels, chunk_tokens), half(tokens, labels))
        nothing = torch.full_like(labels, -100)
        assert not half(tokens, nothing, per_token=True).any() and half(tokens, nothing) == 0


def test_the_loss_of_each_token_is_without_gradients() -> None:
    model, (tokens, labels) = make_model(), make_batch()
    with pytest.raises(ValueError, match=r"without gradients: give labels, in torch.no_grad\(\)"):
        model(tokens, labels, per_token=True)
    with torch.no_grad(), pytest.raises(ValueError, match="give labels"):
        model(tokens, per_token=True)


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


def test_a_lost_tie_is_an_error_with_a_way_out() -> None:
    model = make_model(tie_embeddings=True)
    tokens, labels = make_batch()
    expected = model(tokens, labels)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"set model\.head\.weight = model\.embedding\.tokens\.weight"):
        model(tokens, labels)
    model.head.weight = model.embedding.tokens.weight
    assert torch.equal(model(tokens, labels), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_start_at_unit_variance(tied: bool) -> None:
    torch.manual_seed(0)
    model = Reformer(ReformerConfig(vocab_size=500, d_model=64, n_layers=1, tie_embeddings=tied))
    y1, y2 = torch.randn(2, 1, 300, 64)
    assert model.head(y1, y2).std().item() == pytest.approx(1.0, rel=0.1)


def make_head(n_tokens: int, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[OutputHead, list[Tensor]]:
    """A head of its own, and two streams [1, T, M] in fp32 or better."""
    torch.manual_seed(0)
    settings = ReformerConfig(n_heads=1, **config)
    embedding = torch.nn.Parameter(0.3 * torch.randn(settings.vocab_size, settings.d_model))
    head = OutputHead(settings, embedding if settings.tie_embeddings else None).to(dtype)
    streams = torch.randn(2, 1, n_tokens, settings.d_model, dtype=torch.promote_types(dtype, torch.float32))
    return head, [y.requires_grad_() for y in streams]


def plain_head_loss(head: OutputHead, streams: list[Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(head(*streams).flatten(0, 1), labels.flatten())


def differentiated(head: OutputHead, streams: list[Tensor], loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, [*streams, *head.parameters()])
    return dict(zip(["loss", "y1", "y2", *dict(head.named_parameters())], [loss.detach(), *found], strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 149, 150])
def test_chunks_change_nothing_but_rounding(tied: bool, chunk_tokens: int) -> None:
    """The third chunk of 16 has no label at all."""
    head, streams = make_head(
        150, torch.float64, vocab_size=70, d_model=16, tie_embeddings=tied, loss_chunk_tokens=chunk_tokens
    )
    labels = torch.randint(0, 70, (1, 150))
    labels[:, 30:50] = labels[:, ::3] = -100
    actual = differentiated(head, streams, head(*streams, labels))
    assert_parity(actual, differentiated(head, streams, plain_head_loss(head, streams, labels)), 1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast", "largest", "smallest"),
    [(torch.float32, False, 1e-5, 0.0), (torch.float32, True, 2e-2, 1e-4), (torch.bfloat16, False, 2e-2, 1e-4)],
)
def test_errors_are_those_of_the_products_dtype(
    dtype: torch.dtype, autocast: bool, largest: float, smallest: float, tied: bool
) -> None:
    """Against float64 with the same weights. Under autocast, an error above `smallest` shows products in bf16."""
    head, streams = make_head(150, dtype, vocab_size=70, d_model=16, tie_embeddings=tied, loss_chunk_tokens=16)
    labels = torch.randint(-30, 70, (1, 150))
    labels[labels < 0] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = differentiated(head, streams, head(*streams, labels))
    assert actual["loss"].dtype == actual["y1"].dtype == torch.float32 and actual["weight"].dtype == dtype
    exact_head, exact_streams = deepcopy(head).double(), [y.detach().double().requires_grad_() for y in streams]
    exact = differentiated(exact_head, exact_streams, plain_head_loss(exact_head, exact_streams, labels))
    errors = {name: relative_error(tensor.double(), exact[name]) for name, tensor in actual.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < largest and min(errors["y1"], errors["weight"]) >= smallest


def test_under_autocast_the_gradient_of_the_bias_is_not_rounded() -> None:
    """Without weights each probability is a third, which bf16 has not."""
    head, streams = make_head(2, vocab_size=3, d_model=4)
    with torch.no_grad():
        head.weight.zero_(), head.bias.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        head(*streams, torch.tensor([[0, 1]])).backward()
    assert head.bias.grad.tolist() == pytest.approx([-1 / 6, -1 / 6, 1 / 3], rel=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_autocast_leaves_float64_alone(tied: bool) -> None:
    head, streams = make_head(20, torch.float64, vocab_size=7, d_model=8, tie_embeddings=tied)
    labels = torch.randint(0, 7, (1, 20))
    with torch.autocast("cpu", torch.bfloat16):
        actual = differentiated(head, streams, head(*streams, labels))
    assert_parity(actual, differentiated(head, streams, plain_head_loss(head, streams, labels)), 1e-12)


def test_the_loss_of_streams_in_half_precision_is_fp32() -> None:
    head, streams = make_head(20, torch.bfloat16, vocab_size=7, d_model=8)
    halves, labels = [y.bfloat16() for y in streams], torch.randint(0, 7, (1, 20))
    loss, losses = head(*halves, labels), head(*halves, labels, per_token=True)
    assert loss.dtype == losses.dtype == torch.float32
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-6)


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    """Where a probability is too small for the dtype, the loss is still the difference of the logits."""
    head, streams = make_head(1, vocab_size=5, d_model=4)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([1000.0, 0.0, -1000.0, 0.0, 0.0]))
    loss = head(*streams, torch.tensor([[2]]))
    assert loss.item() == pytest.approx(2000, rel=0.01)
    assert all(gradient.isfinite().all() for gradient in differentiated(head, streams, loss).values())


@pytest.mark.parametrize("wrong", [23, -1, -101, 10**9])
def test_labels_that_are_no_tokens_are_named(wrong: int) -> None:
    tokens, labels = make_batch()
    labels[1, 40] = wrong
    with pytest.raises(ValueError, match=f"labels contain {wrong}, expected token ids from 0 to 22: use -100"):
        make_model()(tokens, labels)


class Meter(TorchDispatchMode):
    """The bytes of tensors made while it is active, at their most, and the elements of the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known | self.live.keys():
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
                self.largest = max(self.largest, tensor.numel())
        self.peak = max(self.peak, sum(self.live.values()))
        return result


VOCAB, N_TOKENS, CHUNK, D_MODEL = 5003, 600, 40, 8


def metered(tied: bool, dtype: torch.dtype, training: bool, whole: bool = False) -> tuple[OutputHead, Meter]:
    head, streams = make_head(
        N_TOKENS, dtype, vocab_size=VOCAB, d_model=D_MODEL, tie_embeddings=tied, loss_chunk_tokens=CHUNK
    )
    labels = torch.randint(0, VOCAB, (1, N_TOKENS))
    with Meter() as meter, torch.set_grad_enabled(training):
        loss = plain_head_loss(head, streams, labels) if whole else head(*streams, labels)
        if training:
            loss.backward()
    return head, meter


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_holds_its_gradients_and_one_chunk_of_logits(tied: bool, dtype: torch.dtype) -> None:
    """With half-precision weights: sums in fp32, a product of their size, and one chunk's logits in both dtypes."""
    head, meter = metered(tied, dtype, training=True)
    n_parameters, half = sum(parameter.numel() for parameter in head.parameters()), dtype != torch.float32
    logits, gradients = CHUNK * VOCAB, n_parameters + 2 * N_TOKENS * D_MODEL
    expected = 4 * (logits + gradients) + (2 * (logits + n_parameters) if half else 0)
    print(f"peak {meter.peak}, expected {expected}, largest tensor {meter.largest}")
    assert expected * 0.9 < meter.peak < expected * 1.05
    assert meter.largest == logits


@pytest.mark.parametrize("tied", [False, True])
def test_evaluation_holds_one_chunk_of_logits(tied: bool) -> None:
    _, meter = metered(tied, torch.float32, training=False)
    assert meter.largest == CHUNK * VOCAB and meter.peak < 4 * CHUNK * VOCAB * 1.05


@pytest.mark.parametrize("training", [True, False])
def test_few_tokens_hold_no_whole_chunk(training: bool) -> None:
    head, streams = make_head(3, vocab_size=VOCAB, d_model=1, loss_chunk_tokens=CHUNK)
    with Meter() as meter, torch.set_grad_enabled(training):
        head(*streams, torch.zeros(1, 3, dtype=torch.int64))
    assert meter.largest == 3 * VOCAB


def test_the_meter_sees_what_whole_logits_take() -> None:
    _, meter = metered(False, torch.float32, training=True, whole=True)
    assert meter.largest == N_TOKENS * VOCAB and meter.peak > 2 * 4 * N_TOKENS * VOCAB


@pytest.mark.parametrize("shape", [(2, 49), (1, 50), (50, 2), (2, 51)])
def test_labels_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    """Shorter ones would be paired with the tokens of other samples."""
    model = Reformer(ReformerConfig(vocab_size=20, max_seq_len=64, d_model=16, n_layers=1, n_heads=2, lsh_chunk_len=8))
    tokens = torch.randint(0, 20, (2, 50))
    labels = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels must be integers \[2, 50\] like tokens, got"):
        model(tokens, labels)
    with pytest.raises(ValueError, match=r"labels must be \[2, 50\] like the tokens, got"):
        model.head(*torch.randn(2, 2, 50, 16), labels)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_token_that_cannot_be_predicted_leaves_ignored_labels_alone(with_gradients: bool) -> None:
    """A bias of -inf masks a token out; the loss of a label that does not count must not become 0 times infinity."""
    torch.manual_seed(0)
    model = Reformer(ReformerConfig(vocab_size=20, max_seq_len=64, d_model=16, n_layers=1, n_heads=2, lsh_chunk_len=8))
    with torch.no_grad():
        model.head.bias[0] = -torch.inf
    tokens, labels = torch.randint(1, 20, (2, 2, 50))
    labels[0, 10:30] = -100
    with torch.set_grad_enabled(with_gradients):
        loss = model(tokens, labels)
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    if with_gradients:
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("weights", [torch.float16, torch.float32])
def test_loss_scaling_protects_small_probabilities_in_fp16(weights: torch.dtype) -> None:
    """A probability times 1 / 65,536 is nothing in fp16, and the loss scale comes after the gradients are computed."""
    torch.manual_seed(0)
    head = OutputHead(ReformerConfig(vocab_size=256, max_seq_len=65_536, d_model=8, n_heads=1)).to(weights)
    streams = torch.randn(2, 1, 65_536, 8).requires_grad_()
    labels = torch.randint(0, 256, (1, 65_536))
    with torch.autocast("cpu", dtype=torch.float16, enabled=weights == torch.float32):
        (head(streams[0], streams[1], labels) * 2**16).backward()
    found = {"streams": streams.grad, **{name: p.grad.float() for name, p in head.named_parameters()}}
    exact = OutputHead(ReformerConfig(vocab_size=256, max_seq_len=65_536, d_model=8, n_heads=1))
    exact.load_state_dict({name: value.float() for name, value in head.state_dict().items()})
    streams.grad = None
    (exact(streams[0], streams[1], labels) * 2**16).backward()
    expected = {"streams": streams.grad, **{name: p.grad for name, p in exact.named_parameters()}}
    assert_parity(found, expected, 1e-2)
