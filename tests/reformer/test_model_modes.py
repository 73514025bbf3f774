"""A model in all modes of attention: dropout of weights in training, other rounds or full attention in evaluation."""

from functools import partial

import pytest
import torch
from parity import assert_parity, gradients
from small_models import make_batch, plain_loss, small_model
from torch import Tensor

from reformer import lsh_attention
from reformer.call import Call

make_model = partial(small_model, attn_pattern=["lsh", "dense", "local"])


@pytest.mark.parametrize("kinds", [["lsh"], ["local"], ["dense"], ["lsh", "dense", "local"]])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_dropout_is_replayed_in_the_backward(kinds: list[str], causal: bool) -> None:
    model = make_model(attn_pattern=kinds, attn_dropout=0.3, dropout=0.1, causal=causal)
    tokens, labels, segments = make_batch()
    state = torch.get_rng_state()
    loss = model(tokens, labels, segment_ids=segments, step=3, sample_ids=(5, 9))
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    reversible = gradients(model)
    call = Call(0, 3, sample_ids=(5, 9), dropout=0.1, segment_ids_BT=segments, attn_dropout=0.3)
    expected = plain_loss(model, tokens, labels, call)
    expected.backward()
    assert_parity({"loss": loss.detach(), **reversible}, {"loss": expected.detach(), **gradients(model)}, 1e-9)


def test_attention_dropout_differs_by_step_layer_sample_and_head_and_is_off_in_evaluation() -> None:
    device = torch.device("cpu")
    keys = [
        Call(seed, step, sample_ids=(0, 1), attn_dropout=0.1).attn_dropout_keys(layer, 2, device)
        for seed in (0, 1)
        for step in (0, 1)
        for layer in (0, 1)
    ]
    assert torch.stack(keys).unique().numel() == 2 * 2 * 2 * 2 * 2
    assert Call(0).attn_dropout_keys(0, 2, device) is None
    model = make_model(attn_dropout=0.5)
    tokens, labels, _ = make_batch()
    trained = [model(tokens, labels, step=step).item() for step in (0, 0, 1)]
    assert trained[0] == trained[1]
    model.eval()
    evaluated = model(tokens, labels).item()
    assert evaluated == make_model().eval()(tokens, labels).item() != trained[0]


def test_a_sample_drops_the_same_attention_on_any_rank() -> None:
    model = make_model(attn_dropout=0.3, dropout=0.2)
    tokens, _, _ = make_batch()
    together = model(tokens, step=0, sample_ids=(6, 7))
    alone = model(tokens[1:], step=0, sample_ids=(7,))
    assert_parity({"logits": alone.detach()}, {"logits": together[1:].detach()}, 1e-12)
    assert not torch.allclose(model(tokens[1:], step=0, sample_ids=(6,)), alone)


@pytest.mark.parametrize("n_hashes", [1, 3, 8])
def test_other_rounds_are_those_of_a_model_configured_so(n_hashes: int) -> None:
    """In evaluation; and in training, where the backward has to use as many."""
    tokens, labels, segments = make_batch()
    results = []
    for model, given in ((make_model(), n_hashes), (make_model(n_hashes=n_hashes), None)):
        loss = model(tokens, labels, segment_ids=segments, step=2, n_hashes=given)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    assert_parity(*results, 1e-12)
    assert results[0]["loss"] != make_model()(tokens, labels, segment_ids=segments, step=2)


def test_the_rounds_of_training_are_the_first_of_more_rounds() -> None:
    model = make_model(attn_pattern=["lsh"], n_layers=1)
    used = []

    def recording(*inputs: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        out, buckets = lsh_attention(*inputs, **options)
        used.append(buckets)
        return out, buckets

    model.blocks[0].attention.inner = recording
    tokens, _, _ = make_batch()
    with torch.no_grad():
        model(tokens), model(tokens, n_hashes=8)
    assert used[0].shape[2] == 2 and used[1].shape[2] == 8
    assert torch.equal(used[1][:, :, :2], used[0])
    assert not torch.equal(used[1][:, :, 2], used[0][:, :, 0])


def test_weights_trained_with_lsh_are_evaluated_with_full_attention() -> None:
    """The parameters are the same; and with chunks as long as the sequence so is the function."""
    lsh = make_model(attn_pattern=["lsh", "local"], lsh_chunk_len=101).eval()
    dense = make_model(attn_pattern=["dense", "local"]).eval()
    with torch.no_grad():
        for parameter in lsh.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    dense.load_state_dict(lsh.state_dict(), strict=True)
    tokens, labels, segments = make_batch()
    results = []
    for model in (lsh, dense):
        loss = model(tokens, labels, segment_ids=segments)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    assert_parity(*results, 1e-11)


@pytest.mark.parametrize(("kinds", "n_hashes"), [(["lsh"], 0), (["lsh"], -1), (["local", "dense"], 4)])
def test_rounds_that_cannot_be_are_refused(kinds: list[str], n_hashes: int) -> None:
    model = make_model(attn_pattern=kinds)
    with pytest.raises(ValueError, match=f"n_hashes={n_hashes} must be at least 1.*attn_pattern.*the model's 2"):
        model(make_batch()[0], n_hashes=n_hashes)
