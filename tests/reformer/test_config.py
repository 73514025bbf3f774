"""Every error of the configuration names the value and the way out."""

from datetime import date

import numpy as np
import pytest

from reformer import ConfigError, ReformerConfig


def test_derived_fields_are_filled_in() -> None:
    config = ReformerConfig(vocab_size=10, d_model=64, n_heads=4, max_seq_len=1000)
    assert (config.d_head, config.d_ff, config.axial_shape, config.axial_dims) == (16, 256, (25, 40), (16, 48))
    assert ReformerConfig(**config.model_dump()) == config


def test_attention_pattern_repeats() -> None:
    config = ReformerConfig(vocab_size=10, n_layers=5, attn_pattern=("local", "local", "lsh", "local"))
    assert [config.attention_kind(i) for i in range(5)] == ["local", "local", "lsh", "local", "local"]


@pytest.mark.parametrize(
    ("pattern", "n_layers", "has_lsh"),
    [(("local", "lsh"), 1, False), (("local", "lsh"), 2, True), (("dense",), 3, False), (("lsh", "local"), 1, True)],
)
def test_a_model_has_lsh_if_one_of_its_layers_is(pattern: tuple[str, ...], n_layers: int, has_lsh: bool) -> None:
    assert ReformerConfig(vocab_size=10, n_layers=n_layers, attn_pattern=pattern).has_lsh == has_lsh


def test_a_configuration_does_not_change() -> None:
    config = ReformerConfig(vocab_size=10)
    with pytest.raises(ConfigError) as error:
        config.n_heads = 2
    way_out = "ReformerConfig(**{**config.model_dump(), 'n_heads': 2})"
    message = f"a ReformerConfig does not change: make another one for n_heads=2, {way_out}, without what is to follow"
    assert str(error.value).startswith(message)
    assert config.n_heads == 4 and eval(way_out) == ReformerConfig(vocab_size=10, n_heads=2, d_head=64)
    with pytest.raises(ConfigError, match=r"^a ReformerConfig does not change: it has no field 'dmodel', either$"):
        ReformerConfig(vocab_size=10).dmodel = 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_hash": 2}, "unknown key 'n_hash': did you mean 'n_hashes'"),
        ({"zzzzzzzz": 2}, "the known keys are vocab_size"),
        ({"d_model": "wide"}, "'d_model': input should be a valid integer.*got 'wide'"),
        ({"d_model": 30}, "d_model=30 is not divisible by n_heads=4"),
        ({"n_layers": 0}, "'n_layers'"),
        ({"n_heads": 0}, "'n_heads'.*greater than or equal to 1"),
        ({"max_seq_len": 0}, "'max_seq_len'.*greater than or equal to 1"),
        ({"d_model": 0}, "'d_model'.*greater than or equal to 1"),
        ({"n_buckets": (4, 3)}, "must be even"),
        ({"n_buckets": ()}, "must be even"),
        ({"attn_pattern": ()}, "attn_pattern is empty"),
        ({"axial_shape": (3, 4)}, r"axial_shape=\(3, 4\) covers 12 positions, but max_seq_len=65536.*\(256, 256\)"),
        ({"axial_shape": (-256, -256)}, r"axial_shape=\(-256, -256\) covers 0 positions, but max_seq_len=65536"),
        ({"axial_dims": (3, 4)}, "must sum to d_model=256"),
        ({"axial_dims": (-4, 260)}, "must sum to d_model=256"),
        ({"attn_pattern": ["global"]}, "'attn_pattern.0'"),
        ({"n_buckets": 0}, "n_buckets=0: each factor must be even and at least 2"),
        ({"n_buckets": (2**13, 2**12)}, "there can be up to 16,777,216 buckets"),
        ({"dropout": 1.0}, "'dropout'"),
        ({"attn_dropout": 1.0}, "'attn_dropout'.*less than 1"),
        ({"attn_dropout": -0.1}, "'attn_dropout'.*greater than or equal to 0"),
        ({"norm_eps": 0.0}, "'norm_eps'.*greater than 0"),
        ({"seed": 2**63}, "'seed'.*less than 9223372036854775808"),
        ({"seed": -1}, "'seed'.*greater than or equal to 0"),
        ({"vocab_size": None}, "'vocab_size'"),
        ({"vocab_size": 0}, "'vocab_size'.*greater than or equal to 2"),
        ({"loss_chunk_tokens": 0}, "'loss_chunk_tokens'.*greater than or equal to 1"),
    ],
)
def test_errors(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReformerConfig(**{"vocab_size": 10, **values})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "50"}, r"'vocab_size': input should be a valid integer \(got '50'\)"),
        ({"vocab_size": 50.0}, r"'vocab_size': input should be a valid integer \(got 50.0\)"),
        ({"d_model": "32"}, "'d_model': input should be a valid integer"),
        ({"max_seq_len": 1024.0}, "'max_seq_len': input should be a valid integer"),
        ({"n_hashes": True}, r"'n_hashes': input should be a valid integer \(got True\)"),
        ({"causal": 1}, r"'causal': input should be a valid boolean \(got 1\): give true or false"),
        ({"causal": "False"}, r"'causal': input should be a valid boolean \(got 'False'\): give true or false"),
        ({"d_model": np.float64(32)}, r"'d_model': input should be a valid integer \(got np.float64\(32.0\)\)"),
        ({"d_model": np.bool_(True)}, r"'d_model': input should be a valid integer \(got np.True_\)"),
        ({"dropout": "0.1"}, "'dropout': input should be a valid number"),
        ({"attn_pattern": "lsh"}, r"'attn_pattern': input should be a list, such as \[\"lsh\"\]"),
        ({"attn_pattern": "[local, lsh]"}, r"input should be a list, such as \[\"local\", \"lsh\"\] \(got '\[local, "),
        ({"axial_shape": 64}, r"'axial_shape': input should be a list \(got 64\)"),
        ({"axial_shape": "(16, 4)"}, r"'axial_shape': input should be a list, such as \[16, 4\] \(got '\(16, 4\)'\)"),
        ({"axial_shape": ""}, r"'axial_shape': input should be a list \(got ''\)"),
        ({"axial_shape": date(2020, 1, 1)}, r"input should be a list, such as \[\"2020-01-01\"\] \(got datetime"),
        ({"axial_shape": [256]}, "'axial_shape.1' is missing"),
        ({"axial_shape": [256, True]}, "'axial_shape.1': input should be a valid integer"),
        ({"n_buckets": "8"}, "'n_buckets.int': input should be a valid integer"),
        ({"n_buckets": [4.0]}, r"'n_buckets.*0': input should be a valid integer \(got 4.0\)"),
    ],
)
def test_values_of_another_kind_are_refused_not_converted(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReformerConfig(**{"vocab_size": 50, **change})


def test_lists_and_whole_numbers_as_files_have_them() -> None:
    config = ReformerConfig(vocab_size=50, attn_pattern=["lsh"], axial_shape=[128, 512], n_buckets=[4, 8], dropout=0)
    assert (config.attn_pattern, config.axial_shape, config.n_buckets) == (("lsh",), (128, 512), (4, 8))


def test_integers_of_numpy_are_kept_as_pythons() -> None:
    given = {"vocab_size": 50, "d_model": 32, "max_seq_len": 64, "axial_shape": (4, 16), "n_buckets": [4, 8], "seed": 3}
    of_numpy = {
        name: type(value)(map(np.int64, value)) if isinstance(value, tuple | list) else np.uint32(value)
        for name, value in given.items()
    }
    config = ReformerConfig(**of_numpy)
    assert config == ReformerConfig(**given)
    kept = [config.d_model, config.d_ff, config.d_head, *config.axial_shape, *config.axial_dims, *config.n_buckets]
    assert {type(number) for number in kept} == {int}
