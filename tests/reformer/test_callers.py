"""What callers may do around a pass: reuse their memory, hook modules, choose dtypes and devices, freeze and share."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import assert_parity, gradients
from small_models import SMALL, LowRank, small_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from reformer import Reformer, ReformerConfig, lsh_attention
from reformer.config import ConfigError
from reformer.decoding import Decoder
from reformer.dense import dense_attention
from reformer.generation import choose
from reformer.hf import load_hf, save_hf
from reformer.local import local_attention
from reformer.lsh.hashing import draw_rotations
from reformer.weights import load_model, save_model

make_model = partial(small_model, attn_pattern=["lsh", "local"])
TOKENS = torch.randint(0, 50, (2, 101), generator=torch.Generator().manual_seed(1))
SEGMENTS = (torch.arange(101) >= 40).long().expand(2, -1)


@pytest.mark.parametrize("name", ["tokens", "labels", "segment_ids", "step"])
def test_what_a_model_was_given_may_change_before_the_backward(name: str) -> None:
    """Also where torch does not see it, as by NumPy, whose memory a tensor may share."""
    model, found = make_model(dropout=0.2, attn_dropout=0.2), []
    for is_changed in (False, True):
        given = {"tokens": TOKENS, "labels": TOKENS, "segment_ids": SEGMENTS, "step": torch.tensor(3)}
        given[name] = given[name].clone()
        loss = model(**given)
        if is_changed:
            given[name].numpy()[...] = given[name].flip(-1).numpy() if name != "step" else 4
        loss.backward()
        found.append(gradients(model))
    assert_parity(*found, 0)


Attend = Callable[..., Tensor]


def by_lsh(backend: str) -> Attend:
    buckets = torch.randint(0, 4, (1, 1, 2, 40), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"n_hashes": 2, "chunk_len": 8, "backend": backend}
    return lambda q, v, **given: lsh_attention(q, v, buckets, **options, **given)[0]


def locally(q: Tensor, v: Tensor, **given: Any) -> Tensor:
    return local_attention(q, v, v, chunk_len=8, **given)


GIVEN: dict[str, dict[str, Any]] = {
    "dropout_keys": {"dropout": 0.3, "dropout_keys": torch.tensor([[7]])},
    "key_padding_mask": {"key_padding_mask": torch.arange(40)[None] % 5 > 0},
    "segment_ids": {"segment_ids": (torch.arange(40)[None] >= 17).long()},
}


@pytest.mark.parametrize(
    ("attend", "name"),
    [
        *itertools.product((by_lsh("chunked"), locally, dense_attention), GIVEN),
        (by_lsh("dense"), "key_padding_mask"),
        (by_lsh("dense"), "segment_ids"),
    ],
)
def test_what_attention_was_given_may_change_before_the_backward(attend: Attend, name: str) -> None:
    """Of one head and one sample, where nothing has to be copied to be there for every head."""
    found = []
    for is_changed in (False, True):
        q, v, d_out = torch.randn(3, 1, 1, 40, 16, dtype=torch.float64, generator=generator(0))
        inputs = [x.requires_grad_() for x in (q, v)]
        given = {**GIVEN[name], name: GIVEN[name][name].clone()}
        out = attend(*inputs, **given)
        if is_changed:
            given[name].zero_()
        found.append(dict(zip("qv", torch.autograd.grad(out, inputs, d_out), strict=True)))
    assert_parity(*found, 0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("attend", [by_lsh("chunked"), by_lsh("dense"), locally, dense_attention])
def test_a_penalty_on_gradients_is_refused(attend: Attend) -> None:
    """Also where the gradient that comes in is a constant, as that of a sum."""
    q, v = (x.requires_grad_() for x in torch.randn(2, 1, 1, 40, 16).double())
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(attend(q, v).sum(), q, create_graph=True)


def test_the_reference_has_second_derivatives() -> None:
    q, v = (x.requires_grad_() for x in torch.randn(2, 1, 1, 40, 16).double())
    (d_q,) = torch.autograd.grad(by_lsh("reference")(q, v).sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(d_q.square().sum(), q)
    assert second.any()


def test_the_reference_has_torch_func_and_is_mapped_where_nothing_else_differs() -> None:
    """What docs/library.md says."""
    q, v = torch.randn(2, 1, 1, 40, 16).double()
    buckets = torch.randint(0, 4, (1, 1, 2, 40))
    options: dict[str, Any] = {"n_hashes": 2, "chunk_len": 8, "backend": "reference"}

    def hashed(q: Tensor) -> Tensor:
        return lsh_attention(q, v, rotations=torch.ones(1, 16, 2, 5), **options)[0].sum()

    def given(q: Tensor, buckets: Tensor = buckets) -> Tensor:
        return lsh_attention(q, v, buckets, **options)[0].sum()

    assert torch.func.grad(hashed)(q).any() and torch.func.jacrev(hashed)(q).any()
    torch.func.jvp(hashed, (q,), (q,))
    assert torch.equal(torch.func.vmap(given)(q[None]), given(q)[None])
    assert torch.func.jacfwd(given)(q).any() and torch.func.hessian(given)(q).any()
    for refused in (lambda: torch.func.vmap(hashed)(q[None]), lambda: torch.func.vmap(given)(q[None], buckets[None])):
        with pytest.raises(RuntimeError):
            refused()


def test_a_step_is_the_number_whatever_its_type() -> None:
    model = make_model(dropout=0.2, attn_dropout=0.2)
    losses = [model(TOKENS, TOKENS, step=step).item() for step in (3, np.int32(3), np.int64(3), torch.tensor(3))]
    assert losses == losses[:1] * 4 != [model(TOKENS, TOKENS, step=4).item()] * 4
    with pytest.raises(TypeError, match="float"):
        model(TOKENS, TOKENS, step=3.0)


def test_random_numbers_are_drawn_on_the_cpu_whatever_the_default_device() -> None:
    expected = draw_rotations(2, 8, 3, (4,), 0, 1, 2), choose(torch.zeros(50), 3, 1.0, 1.0)
    logits = torch.zeros(50)
    with torch.device("meta"):
        rotations, chosen = draw_rotations(2, 8, 3, (4,), 0, 1, 2), choose(logits, 3, 1.0, 1.0)
    assert torch.equal(rotations, expected[0]) and chosen == expected[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32])
def test_tokens_are_integers_of_any_type(dtype: torch.dtype) -> None:
    model = make_model()
    assert torch.equal(model(TOKENS.to(dtype)), model(TOKENS))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS.float(), "tokens must be integers, got torch.float32"),
        (TOKENS.bool(), "tokens must be integers, got torch.bool"),
        (TOKENS.numpy(), "tokens must be a torch tensor of integers, got ndarray"),
        (TOKENS + 1, r"from 1 to 50, expected ids from 0 to 49 \(vocab_size=50\): encode the text"),
        (TOKENS - 1, "from -1 to 48, expected ids from 0 to 49"),
    ],
)
def test_tokens_that_are_none(tokens: Tensor, message: str) -> None:
    assert {0, 49} <= set(TOKENS.flatten().tolist())
    with pytest.raises(ValueError, match=message):
        make_model()(tokens)


@pytest.mark.parametrize("dropped", ["dropout", "attn_dropout"])
def test_training_with_dropout_needs_a_step(dropped: str) -> None:
    """By default every pass would have the same masks."""
    model = make_model(**{dropped: 0.2})
    with pytest.raises(ValueError, match="training with dropout needs a step, from which its masks follow: pass step="):
        model(TOKENS, TOKENS)
    assert torch.equal(model.eval()(TOKENS), model(TOKENS, step=0))


@pytest.mark.filterwarnings("error")
def test_training_without_a_step_is_warned_of_where_it_repeats_rotations() -> None:
    model = make_model()
    with pytest.warns(
        UserWarning, match="repeats the hash rotations of step 0 in every pass: pass step=, the"
    ) as caught:
        model(TOKENS, TOKENS)
    assert [warning.filename for warning in caught] == [__file__]
    model(TOKENS, TOKENS, step=0)
    make_model(attn_pattern=["local"])(TOKENS)
    with torch.no_grad():
        model(TOKENS)
    model.eval()(TOKENS)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_without_memory_is_refused(device: str) -> None:
    tokens = TOKENS[:1].to(device)
    with torch.device("meta"):
        model = Reformer(ReformerConfig(**SMALL, attn_pattern=["lsh", "local"]))
    for use in (model, Decoder(model)):
        with pytest.raises(
            RuntimeError, match=r"tokens.weight is on the meta device.*model\.to_empty\(device='cpu'\) and"
        ):
            use(tokens)
    model.to_empty(device="cpu").load_state_dict(make_model().float().state_dict())
    assert model(TOKENS).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_labels_are_integers_of_any_type(dtype: torch.dtype) -> None:
    model, labels = make_model(), TOKENS.where(TOKENS != 3, -100)
    assert torch.equal(model(TOKENS, labels.to(dtype)), model(TOKENS, labels))
    with pytest.raises(ValueError, match=r"labels must be integers \[.*\] like tokens, got torch.float32"):
        model(TOKENS, labels.float())


@pytest.mark.parametrize("keep_ends", [True, False])
def test_hooks_of_every_module_are_called(keep_ends: bool) -> None:
    model, called = make_model(keep_ends=keep_ends), set()
    modules = {name: module for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(TOKENS, TOKENS)
    assert called == modules.keys()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_head_whose_weight_is_computed_once_for_several_uses_gets_its_gradient() -> None:
    model = make_model()
    parametrize.register_parametrization(model.head, "weight", Doubled())
    found = []
    for context in (torch.enable_grad(), parametrize.cached()):
        with context:
            model(TOKENS, TOKENS).backward()
        found.append(gradients(model))
    assert_parity(*found, 1e-12)


def test_nothing_to_train_needs_no_graph() -> None:
    model = make_model().requires_grad_(False)
    assert not model(TOKENS).requires_grad and not model(TOKENS, TOKENS).requires_grad
    model.blocks[1].feed_forward.in_bias.requires_grad_(True)
    model(TOKENS, TOKENS).backward()
    assert model.blocks[1].feed_forward.in_bias.grad.any()


def test_weights_of_two_layers_in_one_are_not_written(tmp_path: Path) -> None:
    model = make_model(n_layers=4)
    model.blocks[2].feed_forward.in_weight = model.blocks[0].feed_forward.in_weight
    for save in (
        lambda: save_model(tmp_path / "m", model.config, model.state_dict()),
        lambda: save_hf(model, tmp_path / "m"),
    ):
        with pytest.raises(ConfigError, match=r"blocks.2.*in_weight and blocks.0.*in_weight share their memory"):
            save()
    assert not list(tmp_path.iterdir())


class Sharded(Tensor):
    """As a DTensor: a part here, and a way to the whole."""

    full_tensor = None


def test_parts_of_sharded_weights_are_not_written(tmp_path: Path) -> None:
    model = make_model()
    weights = {name: weight.as_subclass(Sharded) for name, weight in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"head.bias is sharded, expected the whole: get_model_state_dict"):
        save_model(tmp_path / "m", model.config, weights)


def test_adapters_are_taken_off_before_a_model_is_written(tmp_path: Path) -> None:
    model = make_model().eval()
    attention = model.blocks[0].attention
    parametrize.register_parametrization(attention, "qk_weight", LowRank(attention.qk_weight))
    expected = model(TOKENS)
    for save in (
        lambda folder: save_model(folder, model.config, model.state_dict()),
        lambda folder: save_hf(model, folder),
    ):
        with pytest.raises(ConfigError, match=r"qk_weight.original is a parametrization's: take that off .*LoRA"):
            save(tmp_path / "m")
    parametrize.remove_parametrizations(attention, "qk_weight")
    save_model(tmp_path / "own", model.config, model.state_dict())
    save_hf(model, tmp_path / "hf")
    for loaded in (load_model(tmp_path / "own"), load_hf(tmp_path / "hf")):
        assert torch.equal(loaded(TOKENS), expected)


@pytest.mark.filterwarnings("error")
def test_lengths_that_transformers_would_refuse_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="max_seq_len=121 is no multiple of 8.* refuses those of more than 120 tokens"):
        save_hf(make_model(max_seq_len=121, n_buckets=4), tmp_path / "odd")
    save_hf(make_model(max_seq_len=120, n_buckets=4), tmp_path / "even")
    save_hf(make_model(max_seq_len=7, n_buckets=4), tmp_path / "short")


@pytest.mark.filterwarnings("error")
def test_a_number_of_buckets_that_transformers_would_take_from_its_first_sequence_is_told(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"transformers takes .* first sequence .* \(model.n_buckets=\[30\] is ours for"
    ):
        save_hf(make_model(), tmp_path / "none")
    save_hf(make_model(attn_pattern=["local"]), tmp_path / "local")
