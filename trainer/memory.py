"""Memory of this process, now and at most: on its device and on the host, in GiB."""

import re
import resource
import sys
from pathlib import Path

import torch


def memory_gib(device: torch.device) -> dict[str, float]:
    """By the tags of metrics.py. On a CPU, what is allocated is what is resident."""
    host = host_gib()
    allocated = torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else host
    return {"memory/allocated_gib": allocated, "memory/peak_gib": peak_gib(device), "memory/host_gib": host}


def host_gib() -> float:
    """Resident memory now; where the system does not tell, the most so far."""
    return _of_status("VmRSS") or _most_resident_gib()


def peak_gib(device: torch.device) -> float:
    """The most memory that this process has used so far, of a GPU or, on a CPU, of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux's high-water mark; getrusage would count what the launcher used before this program was loaded.
    return _of_status("VmHWM") or _most_resident_gib()


def _of_status(field: str) -> float | None:
    """A field of Linux's /proc/self/status; None on other systems."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 2**20 if found else None


def _most_resident_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
