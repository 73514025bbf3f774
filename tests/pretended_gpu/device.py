"""torch.cuda on top of backend.cpp: as much of what PyTorch's build for CPUs leaves out as the tests ask for.

The device has done everything as soon as it is asked to, so that a missing synchronisation goes unnoticed.
"""

import contextlib
import time
from types import SimpleNamespace

import torch

NAME = "pretended GPU"
GIB = 2**30


class Event:
    """Times of the CPU's clock: whatever was asked of the device is done."""

    def __init__(self, **_):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3

    def query(self):
        return True

    def synchronize(self):
        pass


class Stream(torch.Stream):
    cuda_stream = 0

    def __new__(cls, *_, **__):
        return super().__new__(cls, device="cuda:0")

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass


class Inert(contextlib.nullcontext):
    """A context such as torch.cuda.device(0)."""

    def __init__(self, *_):
        super().__init__()


def returns(value):
    """A function of its own: torch._dynamo tells torch's functions apart by their identity."""
    return lambda *_, **__: value


def install(fused_kernels: bool) -> None:
    """Put it into torch.cuda. Without the fused kernels the device is one that is too old for them."""
    stream = Stream()
    properties = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=8 * GIB, multi_processor_count=132)
    values = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "current_stream": stream,
        "get_device_name": NAME,
        "get_device_properties": properties,
        "get_device_capability": (9, 0) if fused_kernels else (7, 0),
        "is_bf16_supported": True,
        "memory_allocated": GIB,
        "max_memory_allocated": 2 * GIB,
        "memory_stats": {},
        **dict.fromkeys(("_lazy_init", "set_device", "synchronize", "manual_seed_all")),
        **dict.fromkeys(("empty_cache", "reset_peak_memory_stats")),
    }
    for name, value in values.items():
        setattr(torch.cuda, name, returns(value))
    torch.cuda.Event, torch.cuda.Stream = Event, Stream
    torch.cuda.device = torch.cuda.stream = Inert
    torch.cuda._initialized = True
    torch.cuda.nvtx = SimpleNamespace(range_push=returns(0), range_pop=returns(0))
    torch.version.cuda = "13.0"
