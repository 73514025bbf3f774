"""What a forward pass draws follows from its step, layer and sample, and from nothing else."""

import itertools

import torch
from torch import Tensor

from reformer import Reformer, ReformerConfig, lsh_attention
from reformer.call import Call
from reformer.gradients import GradientSum
from reformer.lsh.hashing import draw_rotations


def test_dropout_keeps_the_mean_and_differs_by_everything_that_it_depends_on() -> None:
    like = torch.empty(2, 300, 40)
    masks: list[Tensor] = []
    for seed, step, layer, half in itertools.product((6, 5), (0, 1), (0, 1), ("attention", "feed_forward")):
        kept = Call(seed, step, sample_ids=(3, 8), dropout=0.25).kept(like, layer, half)
        assert kept is not None and kept.dtype == torch.bool
        assert abs(kept.float().mean().item() - 0.75) < 0.015
        masks.extend(kept)
    again = Call(seed=5, step=1, sample_ids=(8,), dropout=0.25).kept(like[:1], 1, "feed_forward")
    assert again is not None and torch.equal(again[0], masks[-1])
    for one, other in itertools.combinations(masks, 2):
        agreement = (one == other).float().mean().item()
        assert abs(agreement - (0.75**2 + 0.25**2)) < 0.03  # as often as independent masks agree


def test_rotations_and_masks_do_not_depend_on_torchs_default_dtype() -> None:
    like = torch.empty(1, 50, 40, dtype=torch.float32)

    def drawn() -> list[Tensor]:
        kept = Call(seed=5, sample_ids=(3,), dropout=0.001).kept(like, 0, "attention")
        assert kept is not None
        return [kept, draw_rotations(2, 8, 2, (16,), 1, 2, 3)]

    expected, default = drawn(), torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert all(map(torch.equal, drawn(), expected))
    finally:
        torch.set_default_dtype(default)


def test_rotations_and_dropout_keys_are_drawn_anew_in_every_step_and_layer() -> None:
    config = ReformerConfig(vocab_size=20, max_seq_len=40, d_model=16, n_layers=2, n_heads=2, attn_dropout=0.1)
    model = Reformer(config.model_copy(update={"attn_pattern": ("lsh",), "lsh_chunk_len": 8}))
    drawn: list[tuple[Tensor, Tensor]] = []

    def recording(qk: Tensor, v: Tensor, buckets: Tensor | None, **options: Tensor) -> tuple[Tensor, Tensor]:
        drawn.append((options["rotations"], options["dropout_keys"]))
        return lsh_attention(qk, v, buckets, **options)

    for block in model.blocks:
        block.attention.inner = recording
    tokens = torch.zeros(1, 40, dtype=torch.int64)
    with torch.no_grad():
        for step in (0, 1, 0):
            model(tokens, step=step)
    assert len(drawn) == 6
    for (rotations, keys), (other_rotations, other_keys) in itertools.combinations(drawn[:4], 2):
        assert not torch.equal(rotations, other_rotations) and not torch.equal(keys, other_keys)
    for first, again in zip(drawn[:2], drawn[4:], strict=True):
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_gradients_of_half_precision_parameters_are_added_up_in_fp32() -> None:
    parameter = torch.zeros(1, dtype=torch.bfloat16)
    total = GradientSum([parameter])
    for _ in range(1000):  # in bf16 the sum would stop at 256
        total.add_known([torch.ones(1, dtype=torch.bfloat16)])
    assert total.sums[0].item() == 1000 and total.sums[0].dtype == torch.float32
