"""Every contradiction between the files, the data and the ranks is found, and all of them at once."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from small_configs import DEEPSPEED, STORE, STORES, make_config

from trainer.check import check, remarks
from trainer.config import ConfigError


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_good_configuration_passes_on_any_number_of_ranks(world_size: int) -> None:
    check(make_config(), DEEPSPEED, STORES, world_size)


@pytest.mark.parametrize(("world_size", "n_parts"), [(2, 2), (8, 2), (4, 4), (32, 4)])
def test_ranks_that_share_sequences_count_as_one(world_size: int, n_parts: int) -> None:
    config = make_config(run_sequence_parallel=n_parts, model_n_heads=4)
    check(config, DEEPSPEED, STORES, world_size)
    too_many = {**DEEPSPEED, "train_batch_size": 2 * world_size // n_parts + 1, "train_micro_batch_size_per_gpu": 2}
    groups = rf"times {world_size // n_parts} \({world_size} ranks by {n_parts} for a sequence\)"
    with pytest.raises(ConfigError, match=f"is not divisible by train_micro_batch_size_per_gpu=2 {groups}"):
        check(config, too_many, STORES, world_size)


@pytest.mark.parametrize(
    ("world_size", "n_heads", "seq_len", "n_parts", "what"),
    [
        (6, 4, 256, 4, "the number of ranks, 6: give 2, or a divisor of it"),
        (8, 2, 256, 4, "model.n_heads, 2: give 2, or a divisor of it"),
        (9, 3, 256, 3, "the length of the rows of data/store, 256: give 1, or a divisor of it"),
        (1, 2, 256, 4, "the number of ranks, 1 and model.n_heads, 2: give 1, or a divisor of it"),
    ],
)
def test_sequences_that_cannot_be_shared(world_size: int, n_heads: int, seq_len: int, n_parts: int, what: str) -> None:
    config = make_config(run_sequence_parallel=n_parts, model_n_heads=n_heads, model_d_model=12 * n_heads)
    facts = replace(STORE, seq_len=seq_len)
    with pytest.raises(ConfigError, match=f"run.sequence_parallel={n_parts} does not divide {what}"):
        check(config, DEEPSPEED, {"": facts}, world_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": 9}, "train_batch_size=9 is not divisible by .*=1 times 2 ranks: 8 or 10 would do"),
        ({"train_batch_size": 1}, "2 or 4 would do|2 would do"),
        ({"train_batch_size": None}, "deepspeed.train_batch_size=None: give a number >= 1"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "train_micro_batch_size_per_gpu='auto': give a number >= 1"),
        ({"gradient_accumulation_steps": 3}, "train_batch_size=8 is not .*=1 times .*=3 times 2 ranks: 6 would be"),
        ({"scheduler": {"type": "WarmupLR"}}, "deepspeed.scheduler: the learning-rate schedule is in"),
        ({"fp16": {"enabled": True}}, "use bf16"),
        (
            {"sequence_parallel_size": 2},
            "deepspeed.sequence_parallel_size: use run.sequence_parallel instead; leave it out",
        ),
        ({"zero_optimisation": {}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stag": 2}}, "deepspeed.zero_optimization: unknown key 'stag': did you mean 'stage'"),
        (
            {"zero_optimization": {"stage": 4}},
            "deepspeed.zero_optimization.stage=4: give one of the numbers 0, 1, 2 and 3",
        ),
        ({"zero_optimization": {"stage": True}}, "deepspeed.zero_optimization.stage=True: give one of the numbers"),
        ({"zero_optimization": 2}, "this is a table of keys and values"),
        ({"lr": 1}, r"deepspeed.lr: set it in DeepSpeed's JSON, as optimizer.params.lr \(on the command line"),
        ({"bf16": {"enable": True}}, "deepspeed.bf16: unknown key 'enable': did you mean 'enabled'"),
        ({"gradient_clipping": "none"}, "deepspeed.gradient_clipping='none'"),
        ({"gradient_clipping": True}, "deepspeed.gradient_clipping=True: give the maximum gradient norm"),
        ({"gradient_predivide_factor": 4}, "deepspeed.gradient_predivide_factor: .*; leave it out"),
        ({"prescale_gradients": True}, "deepspeed.prescale_gradients: .*; leave it out"),
        ({"data_types": {"grad_acum_dtype": "bf16"}}, "deepspeed.data_types.grad_acum_dtype: .*'grad_accum_dtype'"),
        ({"aio": {"queue_dept": 8}}, "deepspeed.aio.queue_dept: unknown key; did you mean 'queue_depth'"),
        ({"optimizer": {"type": "AdamW", "parms": {"lr": 1}}}, "deepspeed.optimizer.parms: .* did you mean 'params'"),
        ({"optimizer": {**DEEPSPEED["optimizer"], "lr": 1}}, "deepspeed.optimizer.lr: "),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "without bf16_optimizer_states=True"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "quantized_weights=True: .* for GPUs only"),
        (
            {"communication_data_type": "fp8"},
            r"deepspeed.communication_data_type='fp8': give one of \('fp32', 'bf16', ",
        ),
        ({"communication_data_type": 3}, "deepspeed.communication_data_type=3: give one of"),
        ({"steps_per_print": 0}, "deepspeed.steps_per_print=0: give a number >= 1"),
        ({"steps_per_print": "a"}, "deepspeed.steps_per_print='a': give a number >= 1"),
        ({"wall_clock_breakdown": "x"}, "deepspeed.wall_clock_breakdown='x': give true or false"),
        ({"memory_breakdown": 3}, "deepspeed.memory_breakdown=3: give true or false"),
        ({"bf16": {"enabled": "False"}}, "deepspeed.bf16.enabled='False': give true or false"),
        ({"zero_optimization": {"compute_grad_norm": "no"}}, "compute_grad_norm='no': give true or false"),
        ({"zero_optimization": {"overlap_comm": "off"}}, "overlap_comm='off': give true or false"),
        (
            {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            "with weights in bf16 needs ZeRO",
        ),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "give 'fp32' or 'bf16'"),
    ],
)
def test_deepspeed_side(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(make_config(), {**deepcopy(DEEPSPEED), **changes}, STORES, world_size=2)


@pytest.mark.parametrize(
    ("batch", "world_size"),
    [
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 5),
        ({"train_micro_batch_size_per_gpu": 2}, 5),
        ({"train_batch_size": 6}, 3),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 2}, 3),
        ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}, 3),
    ],
)
def test_deepspeed_works_out_what_is_left_out_of_the_batch(batch: dict[str, Any], world_size: int) -> None:
    rest = {key: value for key, value in DEEPSPEED.items() if not key.startswith("train_")}
    check(make_config(), {**rest, **batch}, STORES, world_size)


@pytest.mark.parametrize(
    "harmless",
    [
        {"fp16": {"enabled": False}},
        {"prescale_gradients": False, "gradient_predivide_factor": 1},
        {"wall_clock_breakdown": True, "memory_breakdown": False, "steps_per_print": 7, "gradient_clipping": 1},
        {"zero_allow_untested_optimizer": True, "communication_data_type": None, "steps_per_print": 1e5},
        {"communication_data_type": "FP32", "steps_per_print": None, "memory_breakdown": 0},
        {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 0, "legacy_stage1": False}},
    ],
)
def test_what_is_switched_off_is_no_contradiction(harmless: dict[str, Any]) -> None:
    check(make_config(), {**DEEPSPEED, **harmless}, STORES, world_size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_vocab_size": 300}, "model.vocab_size=300, but .* has 258 tokens: set model.vocab_size=258"),
        ({"model_vocab_size": 257}, "model.vocab_size=257, but .* has 258 tokens: set model.vocab_size=258"),
        ({"model_max_seq_len": 128}, "model.max_seq_len=128, but .* 256 tokens: set model.max_seq_len=256$"),
        (
            {"model_max_seq_len": 128, "model_axial_shape": [4, 32]},
            "set model.max_seq_len=256, and model.axial_shape to two factors of that, or leave it out",
        ),
        (
            {"data_eval_split": "test"},
            "data.eval_split='test' has no rows in .*: its splits are 'train', 'val'; build it with --split, or",
        ),
        ({"data_train_split": "empty"}, "data.train_split='empty' has no rows"),
        ({"model_causal": False}, "model.causal=False: the trainer predicts the next token"),
    ],
)
def test_data_side(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(make_config(**changes), DEEPSPEED, STORES, world_size=1)


def test_steps_that_are_hardly_ever_both_evaluated_and_saved_are_remarked_on() -> None:
    often = {"run_keep_best": True, "run_eval_every": 50, "run_save_every": 100}
    assert remarks(make_config(**often), STORES) == []
    (line,) = remarks(make_config(**{**often, "run_save_every": 75}), STORES)
    assert line.startswith("run.keep_best: evaluations and checkpoints coincide only every 150 steps and at the end (")


def test_a_warm_up_as_long_as_the_run_is_remarked_on() -> None:
    assert remarks(make_config(run_steps=9, run_warmup_steps=8), STORES) == []
    (line,) = remarks(make_config(run_steps=9, run_warmup_steps=9), STORES)
    assert line == "run.warmup_steps=9, and run.steps=9: the peak is hardly reached"


def test_lsh_attention_that_is_dense_is_remarked_on() -> None:
    length = STORE.seq_len
    assert remarks(make_config(model_lsh_chunk_len=length // 2 - 2), STORES) == []
    for chunk_len in (length // 2, 2 * length):
        (line,) = remarks(make_config(model_lsh_chunk_len=chunk_len), STORES)
        assert line.startswith(f"model.lsh_chunk_len={chunk_len}: rows of {length} tokens are at most two chunks")
    assert remarks(make_config(model_lsh_chunk_len=length, model_attn_pattern=["local"]), STORES) == []


def test_an_uneven_position_table_is_remarked_on() -> None:
    """An image of 64 x 64 x 3 values and BOS is a prime number of tokens."""
    facts = replace(STORE, seq_len=12_289)
    (line,) = remarks(make_config(model_max_seq_len=12_289), {"": facts})
    assert line.startswith(
        "model.axial_shape=[1, 12289]: of 12289 positions 12289 have a vector of their own, which is "
    )
    assert line.endswith("Rows of 12296 tokens (--seq-len) would have a table of 106 x 116")
    facts = replace(STORE, seq_len=2**16)
    (line,) = remarks(make_config(model_max_seq_len=2**16, model_axial_shape=[8, 8192]), {"": facts})
    assert line.endswith("which is much to learn. Left out, it would be a table of 256 x 256")
    facts = replace(STORE, seq_len=2**20)
    assert remarks(make_config(model_max_seq_len=2**20, model_axial_shape=[64, 2**14]), {"": facts}) == []


def test_a_weight_below_the_least_share_is_remarked_on() -> None:
    def mixed(**weights: float) -> list[str]:
        mixture = {name: {"store": "store", "weight": weight} for name, weight in weights.items()}
        return remarks(make_config(data_mixture=mixture), STORES)

    assert mixed(one=0.001, two=0.999) == mixed(one=0.0009, two=1.0) == []
    (line,) = mixed(one=0.0001, two=1.0)
    assert line == (
        "data.mixture.one.weight=0.0001 is 0.0001 of all weights, and 1 of 1,000 samples, the least that there can be, "
        "is drawn from it"
    )


def test_positions_that_no_row_has_are_remarked_on() -> None:
    assert remarks(make_config(), STORES) == []
    sources = {"wiki": {"store": "data/wiki", "weight": 1.0}, "books": {"store": "data/books", "weight": 1.0}}
    facts = {"wiki": replace(STORE, eos=not STORE.eos, bos=not STORE.bos), "books": STORE}
    mixed = make_config(data_mixture=sources)
    (line,) = remarks(mixed, {"": STORE, **facts})
    assert line == (
        f"data.mixture.wiki: documents of data/wiki differ from those of {mixed.data.store} in whether they have BOS "
        "and EOS"
    )
    (line,) = remarks(make_config(model_max_seq_len=512), STORES)
    assert line.startswith("model.max_seq_len=512, and the rows of ")
    assert line.endswith(" have 256 tokens: positions after them are not trained")


def test_without_evaluation_no_split_is_needed_for_it() -> None:
    check(make_config(data_eval_split="test", run_eval_every=0), DEEPSPEED, STORES, world_size=1)


MIXTURE = {"books": {"store": "a", "weight": 3}, "web": {"store": "b", "weight": 1.0, "split": "val"}}


def test_a_mixture_reads_its_own_splits() -> None:
    rows = {"a": {"train": 1}, "b": {"val": 1}}
    books, web = (replace(STORE, rows=rows[name], fingerprint=f"of {name}") for name in ("a", "b"))
    held_out = replace(STORE, rows={"val": 2})
    config = make_config(data_mixture=MIXTURE)
    check(config, DEEPSPEED, {"": held_out, "books": books, "web": web}, 1)
    with pytest.raises(ConfigError) as raised:
        check(config, DEEPSPEED, {"": held_out, "books": web, "web": books}, 1)
    assert str(raised.value).splitlines() == [
        "data.train_split (for data.mixture.books)='train' has no rows in a: its splits are 'val'",
        "data.mixture.web.split='val' has no rows in b: its splits are 'train'",
    ]


HELD_OUT = r"is also what evaluations read \(data.eval_split of data/store\): choose another split for one of"


def test_what_is_held_out_is_not_trained_on() -> None:
    config = make_config(data_train_split="val")
    with pytest.raises(ConfigError, match=f"^data.train_split='val' of data/store {HELD_OUT} .* run.eval_every=0"):
        check(config, DEEPSPEED, STORES, world_size=1)
    check(make_config(data_train_split="val", run_eval_every=0), DEEPSPEED, STORES, world_size=1)


def test_what_is_held_out_is_not_trained_on_in_a_mixture_either() -> None:
    """Under another path too: a store is known by its content. A source without a split has data.train_split."""
    config = make_config(data_mixture=MIXTURE)
    other = replace(STORE, fingerprint="of another")
    check(config, DEEPSPEED, {"": STORE, "books": STORE, "web": other}, 1)
    with pytest.raises(ConfigError, match=f"^data.mixture.web.split='val' of b {HELD_OUT}"):
        check(config, DEEPSPEED, {"": STORE, "books": other, "web": STORE}, 1)
    config = make_config(data_mixture=MIXTURE, data_train_split="val")
    inherited = r"data.train_split \(for data.mixture.books\)='val' of a"
    with pytest.raises(ConfigError, match=f"^{inherited} {HELD_OUT}"):
        check(config, DEEPSPEED, {"": STORE, "books": STORE, "web": other}, 1)


def test_what_is_held_out_of_a_source_is_there_and_not_trained_on() -> None:
    web = {**MIXTURE["web"], "split": "train", "eval_split": "val"}
    config = make_config(data_mixture={**MIXTURE, "web": web})
    books, other = (replace(STORE, fingerprint=f"of {name}") for name in ("books", "web"))
    check(config, DEEPSPEED, {"": STORE, "books": books, "web": other}, 1)
    with pytest.raises(ConfigError, match=r"^data.mixture.web.eval_split='val' has no rows in b: its splits are 'tr"):
        check(config, DEEPSPEED, {"": STORE, "books": books, "web": replace(other, rows={"train": 1})}, 1)
    trained = {**MIXTURE["books"], "split": "val"}
    held_out = r"is also what evaluations read \(data.mixture.web.eval_split of b\): choose another"
    with pytest.raises(ConfigError, match=f"^data.mixture.books.split='val' of a {held_out}"):
        config = make_config(data_mixture={"books": trained, "web": web})
        check(config, DEEPSPEED, {"": STORE, "books": other, "web": other}, 1)
    check(
        make_config(data_mixture={"books": trained, "web": web}, run_eval_every=0),
        DEEPSPEED,
        {"": STORE, "books": other, "web": other},
        world_size=1,
    )


@pytest.mark.parametrize(("key", "value"), [("tokenizer_sha256", "xyz"), ("vocab_size", 300), ("seq_len", 128)])
def test_the_stores_of_a_mixture_must_agree(key: str, value: Any) -> None:
    facts = {"books": STORE, "web": replace(STORE, fingerprint="of b", **{key: value})}
    message = f"data.mixture.web: {key} of b is {value}, that of data.store=data/store is {getattr(STORE, key)}: build"
    with pytest.raises(ConfigError, match=message):
        check(make_config(data_mixture=MIXTURE), DEEPSPEED, {"": STORE, **facts}, 1)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        check(make_config(model_vocab_size=300), {**DEEPSPEED, "train_batch_size": 9, "amp": {}}, STORES, world_size=2)
    assert len(str(raised.value).splitlines()) == 3
