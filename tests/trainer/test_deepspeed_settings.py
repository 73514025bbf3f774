"""The batch that a DeepSpeed configuration means."""

import pytest

from trainer.deepspeed_settings import BATCH_KEYS, as_data_parallel, global_batch_size, micro_batch_size


@pytest.mark.parametrize(
    ("deepspeed", "sequences"),
    [
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1}, 8),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 12),
        ({"train_micro_batch_size_per_gpu": 2}, 4),
    ],
)
def test_deepspeed_counts_parts_and_the_trainer_sequences(deepspeed: dict[str, int], sequences: int) -> None:
    assert global_batch_size(deepspeed, world_size=4, n_parts=2) == sequences
    seen = as_data_parallel(deepspeed, n_parts=2)
    assert seen == {**deepspeed, **({"train_batch_size": 16} if "train_batch_size" in deepspeed else {})}
    assert global_batch_size(seen, world_size=4, n_parts=1) == 2 * sequences


@pytest.mark.parametrize("n_parts", [1, 2])
@pytest.mark.parametrize(
    ("given", "at_once"),
    [((64, 2, None), 2), ((64, None, 4), 4), ((64, None, None), 16), ((None, 3, 5), 3), ((None, 3, None), 3)],
)
def test_the_micro_batch_follows_from_what_is_given(given: tuple[int | None, ...], at_once: int, n_parts: int) -> None:
    """On four ranks, or on four groups that share sequences."""
    batch = {key: number for key, number in zip(BATCH_KEYS, given, strict=True) if number}
    assert micro_batch_size(batch, 4 * n_parts, n_parts) == at_once
