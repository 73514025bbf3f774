"""What cannot live in the memory of the CPU or on NVMe, and what would keep steps from being skipped, is refused."""

from tempfile import gettempdir
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator
from small_configs import DEEPSPEED, STORES, make_config

from trainer.check import check
from trainer.config import ConfigError


def offloading(stage: int, **devices: dict[str, Any]) -> dict[str, Any]:
    zero = {"zero_optimization": {"stage": stage, **devices}}
    return {**DEEPSPEED, **zero, "bf16": {"enabled": True}}


CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": gettempdir()}


@pytest.mark.parametrize(
    ("stage", "devices", "message"),
    [
        (0, {"offload_optimizer": CPU}, "offload_optimizer.device='cpu' .* stage 0: .*stage to 1 or 2 or 3"),
        (2, {"offload_optimizer": NVME}, "offload_optimizer.device='nvme' .* stage 2: .*stage to 3"),
        (2, {"offload_param": CPU}, "offload_param.device='cpu' .* stage 2: leave it out, or set .*stage to 3"),
        (3, {"offload_optimizer": {"device": "nvme"}}, "offload_optimizer.nvme_path is missing: give a folder"),
        (3, {"offload_optimizer": {"device": "disk"}}, "deepspeed.zero_optimization: 'offload_optimizer.device'.*disk"),
        (3, {"offload_optimizer": "cpu"}, "deepspeed.zero_optimization: 'offload_optimizer'.*'cpu'"),
        (3, {"offload_optimizer": {"device": ["cpu"]}}, r"'offload_optimizer.device'.*\['cpu'\]"),
        (3, {"offload_param": {"device": {}}}, "'offload_param.device'.*{}"),
        (
            3,
            {"offload_optimizer": {**NVME, "nvme_path": __file__}},
            r"nvme_path='.*\.py' cannot be .*: Not a directory",
        ),
        (3, {"offload_optimizer": {**NVME, "nvme_path": "/proc/nope"}}, "nvme_path='/proc/nope' cannot be written to"),
        (3, {"offload_param": {**NVME, "nvme_path": 5}}, "'offload_param.nvme_path'.*5"),
        (2, {"cpu_offload": True}, r"\.cpu_offload: .* use offload_optimizer.device='cpu'"),
        (2, {"cpu_offload_param": True}, r"\.cpu_offload_param: .* use offload_param.device='cpu'"),
        (3, {"cpu_offload_use_pin_memory": True}, r"\.cpu_offload_use_pin_memory: .* use .*offload_param.pin_memory"),
        (
            2,
            {"offload_optimizer": {**CPU, "ratio": 0.3}},
            "^deepspeed.*offload_optimizer.ratio=0.3 needs ZeRO-3: leave",
        ),
        (3, {"offload_optimizer": {**CPU, "ratio": 0.3}}, "ratio=0.3 with .*torch_adam: .*leave one of them out"),
        (
            3,
            {"offload_optimizer": {**CPU, "super_offload": True}},
            "super_offload keeps the moments in another process",
        ),
    ],
)
def test_what_cannot_be_offloaded(
    monkeypatch: pytest.MonkeyPatch, stage: int, devices: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("trainer.extensions.missing_for", lambda _: "")
    with pytest.raises(ConfigError, match=message):
        check(make_config(), offloading(stage, **devices), STORES, world_size=2)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("zero_optimization", "compute_grad_norm", False),
        ("zero_optimization", "zenflow", {"topk_ratio": 0.1}),
        ("zero_optimization", "legacy_stage1", True),
        ("zero_optimization", "stage3_module_granularity_threshold", 1000),
        ("bf16", "check_grad_overflow", False),
    ],
)
def test_what_would_keep_steps_from_being_skipped_saved_or_run(section: str, key: str, value: Any) -> None:
    settings = {**DEEPSPEED, section: {**DEEPSPEED.get(section, {}), key: value}}
    with pytest.raises(ConfigError, match=rf"deepspeed.{section}.{key}=.*; leave it out"):
        check(make_config(), settings, STORES, world_size=2)


def test_a_stage_as_text_gets_no_sentence_about_offloading() -> None:
    settings = {**DEEPSPEED, "zero_optimization": {"stage": "2", "offload_optimizer": CPU}}
    with pytest.raises(ConfigError) as raised:
        check(make_config(), settings, STORES, world_size=2)
    assert str(raised.value) == "deepspeed.zero_optimization.stage='2': give one of the numbers 0, 1, 2 and 3"


@pytest.mark.parametrize(
    "devices", [{"offload_optimizer": NVME}, {"offload_param": NVME, "offload_optimizer": CPU}, {"offload_param": NVME}]
)
def test_nvme_needs_a_library(monkeypatch: pytest.MonkeyPatch, devices: dict[str, Any]) -> None:
    missing = {"AsyncIOBuilder": "libaio with its headers (Debian: libaio-dev)"}
    monkeypatch.setattr("trainer.extensions.missing_for", missing.pop)
    with pytest.raises(ConfigError, match=r"nvme needs .*async_io, which needs libaio .*: .* device to 'cpu'"):
        check(make_config(), offloading(3, **devices), STORES, world_size=2)
    monkeypatch.setattr("trainer.extensions.missing_for", lambda _: "")
    check(make_config(), offloading(3, **devices), STORES, world_size=2)


@pytest.mark.parametrize("has_fp16", [False, True])
def test_fp32_parameters_on_nvme_stay_fp32(monkeypatch: pytest.MonkeyPatch, has_fp16: bool) -> None:
    monkeypatch.setattr("trainer.extensions.missing_for", lambda _: "")
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: has_fp16)
    settings = {**offloading(3, offload_param=NVME), "bf16": {"enabled": False}}
    if has_fp16:
        check(make_config(), settings, STORES, world_size=2)
        return
    with pytest.raises(ConfigError, match=r"in fp32: .* no fp16; set deepspeed.bf16.enabled=true, or .* 'cpu'"):
        check(make_config(), settings, STORES, world_size=2)
