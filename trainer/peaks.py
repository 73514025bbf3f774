"""How fast a GPU could be, for MFU and for rooflines: products of dense matrices and memory, from NVIDIA's documents.

A device is known by its whole name, as torch gives it, or not at all. A part of a name would take an H100 PCIe for an
H100 SXM, a slice of a GPU ("… MIG 1g.10gb") for the whole, a laptop's chip for the desktop's, and the share of the peak
would be wrong without anybody noticing. What is not in the table has no MFU.

    bf16    tensor cores, accumulating in fp32, as torch multiplies; without sparsity, with which data sheets print
            twice as much
    fp32    the ordinary cores, as torch multiplies unless TF32 is allowed
"""

from dataclasses import dataclass

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Peaks:
    """Peak rates of one device; None where it has no such unit."""

    bytes_per_s: float
    bf16: float | None
    """FLOPs per second, as the other."""
    fp32: float


def _peaks(gb_per_s: float, bf16: float | None, fp32: float) -> Peaks:
    return Peaks(gb_per_s * GIGA, None if bf16 is None else bf16 * TERA, fp32 * TERA)


_NVL_COMPUTE = (835.5, 60.0)  # H100 and H200 data sheets, 1,671 with sparsity
_A100_COMPUTE = (312.0, 19.5)  # A100 data sheet
_V100_SXM = _peaks(900, None, 15.7)  # V100 data sheet; no tensor cores for bf16
_V100_PCIE = _peaks(900, None, 14.0)

PEAKS = {
    "NVIDIA B200": _peaks(8000, 2250.0, 75.0),  # HGX B200 data sheet: of eight 36,000 with sparsity, 600
    "NVIDIA H200": _peaks(4800, 989.5, 67.0),  # H200 data sheet
    "NVIDIA H200 NVL": _peaks(4800, *_NVL_COMPUTE),
    "NVIDIA H100 80GB HBM3": _peaks(3350, 989.5, 67.0),  # SXM; H100 data sheet, 1,979 with sparsity
    "NVIDIA H100 PCIe": _peaks(2000, 756.5, 51.2),  # H100 PCIe data sheet (2022), 1,513 with sparsity
    "NVIDIA H100 NVL": _peaks(3900, *_NVL_COMPUTE),
    "NVIDIA A100-SXM4-80GB": _peaks(2039, *_A100_COMPUTE),
    "NVIDIA A100-SXM4-40GB": _peaks(1555, *_A100_COMPUTE),
    "NVIDIA A100 80GB PCIe": _peaks(1935, *_A100_COMPUTE),
    "NVIDIA A100-PCIE-40GB": _peaks(1555, *_A100_COMPUTE),
    "NVIDIA L40S": _peaks(864, 362.05, 91.6),  # L40S data sheet
    "NVIDIA L40": _peaks(864, 181.05, 90.5),  # L40 data sheet
    "NVIDIA L4": _peaks(300, 121.0, 30.3),  # L4 data sheet, 242 with sparsity
    "NVIDIA A10": _peaks(600, 125.0, 31.2),  # A10 data sheet
    "NVIDIA A30": _peaks(933, 165.0, 10.3),  # A30 data sheet
    "NVIDIA A40": _peaks(696, 149.7, 37.4),  # A40 data sheet
    "NVIDIA RTX A6000": _peaks(768, 154.8, 38.7),  # GA102 white paper, appendix A
    "Tesla V100-SXM2-16GB": _V100_SXM,
    "Tesla V100-SXM2-32GB": _V100_SXM,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "Tesla T4": _peaks(320, None, 8.1),  # T4 data sheet
    "NVIDIA GeForce RTX 4090": _peaks(1008, 165.2, 82.6),  # Ada white paper, appendix A
    "NVIDIA GeForce RTX 3090": _peaks(936, 71.0, 35.6),  # GA102 white paper, appendix A
}
"""By the device's name as torch.cuda.get_device_name() has it."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The dense peak in FLOPs per second; None for a device, or a type on it, that has none in the table.

    dtype: "bf16" or "fp32". Raises ValueError for any other.
    """
    if dtype not in ("bf16", "fp32"):
        raise ValueError(f"dtype={dtype!r} must be bf16 or fp32")
    peaks = PEAKS.get(device_name)
    return None if peaks is None else getattr(peaks, dtype)


def mfu(flops_per_step: float, seconds: float, n_devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: what a step needs (flops.py) over what n_devices could do meanwhile, from 0 to 1.

    seconds: of one step. None where the peak of a device is not known, as on CPUs.
    """
    return None if peak is None else flops_per_step / (seconds * n_devices * peak)
