"""The optimizer's settings: what it does not take, what trains nothing, and where it would be another function."""

from typing import Any

import pytest
from small_configs import STORES

from trainer.check import check
from trainer.config import ConfigError, RunConfig

CONFIG = RunConfig(
    model={"vocab_size": 258, "max_seq_len": 256},
    data={"store": "data/store"},
    run={"dir": "runs/x", "deepspeed_config": "x.json", "steps": 10},
)


def asked(kind: Any, stage: int = 0, offload: dict[str, Any] | None = None, **params: Any) -> None:
    """What check() says to an optimizer."""
    zero = {"stage": stage, **({"offload_optimizer": offload} if offload else {})}
    optimizer = {"type": kind, "params": params}
    deepspeed = {"train_batch_size": 8, "zero_optimization": zero, "optimizer": optimizer}
    check(CONFIG, deepspeed, STORES, world_size=2)


def test_an_optimizer_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r'optimizer.type=None: give "AdamW", "Adam" or "Adafactor"'):
        check(CONFIG, {"train_batch_size": 8}, STORES, world_size=2)


@pytest.mark.parametrize("kind", ["SGD", "adafactor", 5, ["AdamW"]])
def test_an_optimizer_that_is_none_of_the_three(kind: Any) -> None:
    """DeepSpeed finds Adafactor under torch's own name for it alone."""
    with pytest.raises(ConfigError, match=r'optimizer.type=.*: give "AdamW", "Adam" or "Adafactor"'):
        asked(kind, lr=1e-3)


def test_adafactor_trains_no_table_of_no_width() -> None:
    model = CONFIG.model.model_copy(update={"axial_dims": (0, CONFIG.model.d_model)})
    config = CONFIG.model_copy(update={"model": model})
    adamw, adafactor = (
        {"train_batch_size": 8, "optimizer": {"type": kind, "params": {"lr": 1e-3, **more}}}
        for kind, more in (("AdamW", {"torch_adam": True}), ("Adafactor", {}))
    )
    check(config, adamw, STORES, world_size=2)
    with pytest.raises(ConfigError, match=r"model.axial_dims=\[0, \d+\]: Adafactor cannot train a table of width 0"):
        check(config, adafactor, STORES, world_size=2)


@pytest.mark.parametrize("kind", ["AdamW", "adam", "Adafactor"])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "params.lr: give the peak learning rate as a finite number"),
        ({"lr": float("nan")}, "params.lr=nan: give the peak"),
        ({"lr": True}, "params.lr=True: give the peak"),
        ({"lr": "1e-3"}, "params.lr='1e-3': give the peak"),
        ({"lr": -1.0}, "params.lr=-1.0: give the peak learning rate as a finite number above 0"),
        ({"lr": 0}, "params.lr=0: give the peak"),
        ({"lr": 1, "weigth_decay": 0}, "params.weigth_decay: unknown key; did you mean 'weight_decay'"),
        ({"lr": 1, "params": []}, "params.params: not a key"),
        ({"lr": 1e-3, "weight_decay": -1}, "params: .*weight_decay.* -1"),
        ({"lr": 1e-3, "weight_decay": "x"}, "params.weight_decay='x': give a value like 0"),
        ({"lr": 1e-3, "maximize": 1}, "params.maximize=1: give a value like false"),
        ({"lr": 1e-3, "foreach": "yes"}, "params.foreach='yes': give a value like null"),
    ],
)
def test_settings_of_any_optimizer(monkeypatch: pytest.MonkeyPatch, kind: str, params: Any, message: str) -> None:
    monkeypatch.setattr("trainer.extensions.missing_for", lambda _: "")
    with pytest.raises(ConfigError, match=message):
        asked(kind, **params)


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("AdamW", {"betas": [0.9, float("inf")]}, r"params.betas=\[0.9, inf\]: give a value like \[0.9, 0.999\]"),
        ("AdamW", {"betas": [0.9]}, r"params.betas=\[0.9\]: give a value like \[0.9, 0.999\]"),
        ("AdamW", {"betas": [0.9, None]}, "params.betas=.*: give a value like"),
        ("AdamW", {"eps": "x"}, "params.eps='x': give a value like 1e-08"),
        ("AdamW", {"torch_adam": "false"}, "params.torch_adam='false': give a value like true"),
        ("AdamW", {"beta2_decay": -0.8}, "params.beta2_decay: "),
        ("AdamW", {"adam_w_mode": False}, 'params.adam_w_mode=False: .* set deepspeed.optimizer.type="Adam"'),
        ("adamw", {"adam_w_mode": False, "torch_adam": True}, "params.adam_w_mode=False: AdamW always"),
        ("AdamW", {"torch_adam": True, "fused": True, "foreach": True}, "params: `fused` and `foreach` cannot be"),
        ("Adafactor", {"eps": 1e-3}, r"params.eps=0.001: give a value like \[null, 0.001\]"),
        ("Adafactor", {"eps": [None, None]}, "params.eps=.*: give a value like"),
        ("Adafactor", {"d": 0.5}, "params: Clipping threshold d should be >= 1 but is: 0.5"),
        ("Adafactor", {"beta2_decay": 0.8}, "params: beta2_decay should be <= 0 but is: 0.8"),
        ("Adafactor", {"torch_adam": True}, "params.torch_adam: not a key"),
        ("Adafactor", {"betas": [0.9, 0.99]}, "params.betas: "),
    ],
)
def test_settings_of_one(monkeypatch: pytest.MonkeyPatch, kind: str, params: dict[str, Any], message: str) -> None:
    monkeypatch.setattr("trainer.extensions.missing_for", lambda _: "")
    with pytest.raises(ConfigError, match=message):
        asked(kind, lr=1e-3, **params)


def test_adafactor_with_all_its_settings() -> None:
    both = {"d": 2, "beta2_decay": -0.5, "weight_decay": 0.1, "foreach": True, "maximize": False}
    asked("Adafactor", lr=1e-2, eps=[None, 1e-3], **both)
    asked("Adafactor", lr=1, eps=[1e-30, 1e-4], **both)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adafactor_needs_whole_matrices(stage: int) -> None:
    message = rf"^deepspeed.optimizer.type='Adafactor' under ZeRO stage {stage}: .*stage=0 .*, or use AdamW$"
    with pytest.raises(ConfigError, match=message):
        asked("Adafactor", stage, lr=1e-2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"fused": True}, "params.fused: DeepSpeed's own Adam does not take it.* torch_adam=true"),
        ({}, "an Adam of its own, which needs a compiler: .*params.torch_adam=true for PyTorch's"),
    ],
)
def test_the_adam_that_it_will_be(monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], message: str) -> None:
    monkeypatch.setattr("trainer.extensions.missing_for", lambda builder: "a compiler" if "Adam" in builder else "")
    with pytest.raises(ConfigError, match=message):
        asked("AdamW", 2, lr=1e-3, **params)


def test_torchs_adam_may_be_offloaded() -> None:
    asked("AdamW", 2, {"device": "cpu"}, lr=1e-3, torch_adam=True)


def test_deepspeeds_own_adam_where_it_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    builders = []
    monkeypatch.setattr("trainer.extensions.missing_for", lambda builder: builders.append(builder) or "")
    for offload in (None, {"device": "cpu"}):
        asked("AdamW", 2, offload, lr=1e-3, weight_decay=0.1)
    assert builders == ["FusedAdamBuilder", "CPUAdamBuilder"]
