"""Losses that ignore what they should, positions, any length, learning."""

import pytest
import torch
from parity import gradients
from torch import Tensor, nn
from torch.nn import functional as F

from reformer import Reformer, ReformerConfig
from reformer.arguments import check_tokens
from reformer.feed_forward import FeedForward
from reformer.positions import AxialPositions

SMALL = {"vocab_size": 20, "max_seq_len": 64, "d_model": 16, "n_layers": 2, "n_heads": 2, "lsh_chunk_len": 8}


def test_loss_equals_cross_entropy_of_the_logits() -> None:
    model = Reformer(ReformerConfig(**SMALL)).double()
    tokens, labels = torch.randint(0, 20, (2, 2, 33))
    labels[0, 5:] = -100
    with torch.no_grad():
        logits, loss = model(tokens), model(tokens, labels)
    assert logits.shape == (2, 33, 20)
    assert torch.allclose(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()), rtol=1e-12)


def test_no_label_at_all_is_a_loss_of_zero_with_zero_gradients() -> None:
    model = Reformer(ReformerConfig(**SMALL))
    loss = model(torch.zeros(1, 20, dtype=torch.int64), torch.full((1, 20), -100))
    loss.backward()
    assert loss == 0 and all(gradient.abs().max() == 0 for gradient in gradients(model).values())


@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (2, 0), (1, 2, 5)])
def test_tokens_are_rows(shape: tuple[int, ...]) -> None:
    model = Reformer(ReformerConfig(vocab_size=20, max_seq_len=64, d_model=16, n_heads=2))
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\], each at least 1"):
        model(torch.zeros(shape, dtype=torch.int64))


def test_an_array_of_tokens_is_told_how_to_become_a_tensor() -> None:
    with pytest.raises(ValueError, match=r"must be a torch tensor of integers, got ndarray: use torch.as_tensor"):
        Reformer(ReformerConfig(**SMALL))(torch.ones(1, 5, dtype=torch.int64).numpy())


def test_tokens_that_are_not_on_the_cpu_are_not_waited_for() -> None:
    """ "meta" stands for whatever is no CPU: there is no value to look at."""
    check_tokens(torch.zeros(1, 5, dtype=torch.int64, device="meta"), 20)


def test_backward_twice_is_refused() -> None:
    model = Reformer(ReformerConfig(**SMALL))
    loss = model(torch.zeros(1, 20, dtype=torch.int64), torch.zeros(1, 20, dtype=torch.int64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over already"):
        loss.backward()


def test_a_new_model_starts_as_glorot_has_it_with_norms_that_change_nothing() -> None:
    torch.manual_seed(0)
    model = Reformer(ReformerConfig(**SMALL))
    for name, parameter in model.blocks.named_parameters():
        if parameter.ndim == 2:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.95 * bound < parameter.abs().max() <= bound, name
        else:
            assert (parameter == ("norm_weight" in name)).all(), name
    config = ReformerConfig(vocab_size=2, d_model=128, max_seq_len=10_000)
    for table in AxialPositions(config).parameters():
        assert 0.019 < table.std() < 0.021


def test_axial_positions_concatenate_row_and_column() -> None:
    config = ReformerConfig(vocab_size=2, d_model=6, n_heads=1, max_seq_len=12, axial_shape=(3, 4), axial_dims=(2, 4))
    positions = AxialPositions(config)
    table = positions(10)
    assert table.shape == (10, 6)
    for t in range(10):
        assert torch.equal(table[t], torch.cat([positions.rows[t // 4], positions.columns[t % 4]]))
    for start, n_tokens, n_rows in ((0, 5, 2), (5, 3, 1), (7, 2, 2)):
        some = positions(n_tokens, start)
        assert torch.equal(some, positions(12)[start : start + n_tokens])
        assert some.untyped_storage().nbytes() == 4 * n_rows * 4 * 6, "of the rows that they are in, no more"
    with pytest.raises(ValueError, match="13 tokens but the position table covers 3 x 4 = 12"):
        positions(13)


@pytest.mark.parametrize("n_tokens", [1, 2, 9, 63, 64])
def test_any_length_works(n_tokens: int) -> None:
    model = Reformer(ReformerConfig(**SMALL))
    tokens = torch.randint(0, 20, (1, n_tokens))
    model(tokens, tokens).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_bfloat16_parameters_keep_streams_and_loss_in_fp32() -> None:
    torch.manual_seed(0)
    model = Reformer(ReformerConfig(**SMALL))
    tokens = torch.randint(0, 20, (2, 64))
    exact = model(tokens, tokens).detach()
    model.bfloat16()
    streams = []
    model.head.register_forward_pre_hook(lambda _, inputs: streams.extend(inputs[:2]))
    loss = model(tokens, tokens)
    loss.backward()
    assert [y.dtype for y in streams] == [torch.float32, torch.float32]
    assert loss.dtype == torch.float32 and abs(loss.item() / exact.item() - 1) < 0.02
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_documents_in_one_row_do_not_see_each_other() -> None:
    model = Reformer(ReformerConfig(**{**SMALL, "causal": False})).double()
    tokens = torch.randint(0, 20, (1, 60))
    segments = torch.tensor([[1] * 25 + [2] * 35])
    other = tokens.clone()
    other[:, 25:] = torch.randint(0, 20, (1, 35))
    gradient_of = []
    embedded = model.embedding(tokens).detach().requires_grad_()
    model.embedding.register_forward_hook(lambda *_: embedded)
    logits = model(tokens, segment_ids=segments)
    (gradient_of,) = torch.autograd.grad(logits[:, :25].square().sum(), embedded)
    assert gradient_of[:, :25].abs().max() > 0 and gradient_of[:, 25:].abs().max() == 0


def test_lsh_attention_learns_to_recall_by_content() -> None:
    """Keys with a bit each, then the keys again in another order: what was the bit? Chance is ln 2 = 0.693.

    One LSH layer, so that the answer can only come from the earlier occurrence, up to eight chunks away.
    """
    torch.manual_seed(0)
    n_keys, batch = 32, 4
    model = Reformer(
        ReformerConfig(
            vocab_size=3 * n_keys, max_seq_len=2 * n_keys, d_model=64, d_ff=64, n_layers=1, n_heads=2,
            attn_pattern=["lsh"], lsh_chunk_len=8, n_hashes=4,
        )
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for step in range(220):
        first, second = (torch.rand(batch, n_keys).argsort(dim=1) for _ in range(2))
        bits = torch.randint(0, 2, (batch, n_keys))
        tokens = torch.cat([2 * first + bits, 2 * n_keys + second], dim=1)
        answers = bits.gather(1, first.argsort(dim=1).gather(1, second))
        labels = torch.cat([torch.full_like(answers, -100), answers], dim=1)
        loss = model(tokens, labels, step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss of the last 20 steps {sum(losses[-20:]) / 20:.3f}")
    assert sum(losses[-20:]) / 20 < 0.4


def test_another_head_in_place_of_a_tied_one_is_that_one() -> None:
    """Also if it has a matrix of its own, which nobody ties."""

    class Sum(nn.Linear):
        def forward(self, y1: Tensor, y2: Tensor, labels: Tensor | None, per_token: bool) -> Tensor:
            return super().forward(y1 + y2)

    model = Reformer(ReformerConfig(vocab_size=9, max_seq_len=16, d_model=16, n_layers=1, tie_embeddings=True))
    model.head = Sum(16, 3)
    assert model(torch.zeros(1, 8, dtype=torch.int64), step=0).shape == (1, 8, 3)


def test_the_norm_of_a_feed_forward_layer_has_the_epsilon_of_the_configuration() -> None:
    layer = FeedForward(ReformerConfig(vocab_size=2, d_model=8, n_heads=2, max_seq_len=16, norm_eps=0.5)).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    inner = F.linear(F.layer_norm(x, (8,), eps=0.5), layer.in_weight).relu()
    assert torch.allclose(layer(x)[0], F.linear(inner, layer.out_weight), rtol=0, atol=1e-12)
