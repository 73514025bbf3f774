"""The share of the peak is that of the device which is there, or there is none."""

import pytest

from trainer.peaks import PEAKS, mfu, peak_flops


@pytest.mark.parametrize(
    ("device", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
    ],
)
def test_dense_peaks(device: str, bf16: float, fp32: float) -> None:
    assert peak_flops(device, "bf16") == pytest.approx(bf16, rel=1e-3)
    assert peak_flops(device, "fp32") == pytest.approx(fp32, rel=5e-3)


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a seventh of it
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",
        "NVIDIA GH200 120GB",
        "NVIDIA H20",
        "NVIDIA L400",
        "AMD Instinct MI300X",
        "cpu",
        "",
    ],
)
def test_what_only_looks_like_a_known_device_has_no_peak(device: str) -> None:
    assert [peak_flops(device, dtype) for dtype in ("bf16", "fp32")] == [None] * 2


def test_no_peak_for_a_type_that_the_device_only_emulates() -> None:
    assert peak_flops("Tesla V100-SXM2-32GB", "bf16") is None
    assert peak_flops("Tesla V100-SXM2-32GB", "fp32") == 15.7e12
    assert peak_flops("Tesla V100-PCIE-16GB", "fp32") == 14e12


def test_an_unknown_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        peak_flops("NVIDIA H200", "torch.bfloat16")


def test_the_table_makes_sense() -> None:
    """Nobody's tensor cores are slower than the other cores, or 40 times faster; intensities are those of GPUs."""
    for device, peaks in PEAKS.items():
        assert 5 <= peaks.fp32 / peaks.bytes_per_s <= 110, device
        if peaks.bf16:
            assert 1.5 <= peaks.bf16 / peaks.fp32 <= 40, device
            assert 60 <= peaks.bf16 / peaks.bytes_per_s <= 500, device


def test_mfu_by_hand() -> None:
    assert mfu(8e15, 2.0, 4, 1e15) == 1.0
    assert mfu(1e15, 10.0, 1, peak_flops("NVIDIA A100-SXM4-80GB", "bf16")) == pytest.approx(1 / 3.12)
    assert mfu(1e15, 10.0, 1, peak_flops("cpu", "fp32")) is None
