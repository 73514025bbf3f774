"""torch.cuda on top of backend.cpp: what PyTorch's build for CPUs leaves out, for one device that is always ready."""

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

    def wait(self, stream=None):
        pass


class Stream(torch.Stream):
    cuda_stream = 0

    def __new__(cls, *_, **__):
        return super().__new__(cls, device="cuda:0")

    def __init__(self, *_, **__):
        pass

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event

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
    stream, generator = Stream(), torch.Generator()
    properties = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=8 * GIB, multi_processor_count=132)
    nothing = ("_lazy_init", "init", "set_device", "synchronize", "set_stream", "empty_cache", "ipc_collect")
    values = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "current_stream": stream,
        "default_stream": stream,
        "get_device_name": NAME,
        "get_device_properties": properties,
        "get_device_capability": (9, 0) if fused_kernels else (7, 0),
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "memory_allocated": GIB,
        "max_memory_allocated": 2 * GIB,
        "memory_reserved": 2 * GIB,
        "max_memory_reserved": 2 * GIB,
        "memory_stats": {},
        "mem_get_info": (6 * GIB, 8 * GIB),
        "reset_peak_memory_stats": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        **dict.fromkeys(nothing),
    }
    for name, value in values.items():
        setattr(torch.cuda, name, returns(value))
    torch.cuda.Event, torch.cuda.Stream = Event, Stream
    torch.cuda.device = torch.cuda.device_of = torch.cuda.stream = Inert
    torch.cuda._initialized, torch.cuda.default_generators = True, (generator,)
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = lambda seed: generator.manual_seed(seed)
    torch.cuda.initial_seed = lambda: generator.initial_seed()
    torch.cuda.nvtx = SimpleNamespace(range_push=returns(0), range_pop=returns(0), mark=returns(None))
    torch.version.cuda = "13.0"
