"""Seconds by phase: on the host's clock, and on a device's that runs behind the host."""

import time
from collections.abc import Callable

import pytest
import torch

from trainer import timing
from trainer.timing import Stopwatch


class Host:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(timing, "time", host)
    return host


def test_parts_add_up_and_reading_begins_anew(host: Host) -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.phase("forward"):
            host.now_s += 2
        with watch.phase("backward"):
            host.now_s += 5
    assert watch.read() == {"forward": 4, "backward": 10}
    assert watch.read() == {}


def test_a_part_that_fails_is_counted(host: Host) -> None:
    watch = Stopwatch(torch.device("cpu"))
    with pytest.raises(ValueError, match="no row"), watch.phase("data"):
        host.now_s += 1
        raise ValueError("no row")
    assert watch.read() == {"data": 1}


class Device:
    """A device that is behind the host: what it was given is done when it is told to go on, or waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms = 0.0
        self.queue: list[Callable[[], None]] = []
        self.n_waits = 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.ms: float | None = None

            def record(self, stream: str) -> None:
                assert stream == "current stream of cuda:0"
                device.queue.append(lambda: setattr(self, "ms", device.now_ms))

            def query(self) -> bool:
                return self.ms is not None

            def synchronize(self) -> None:
                device.n_waits += 1
                device.go_on()

            def elapsed_time(self, end: "Event") -> float:
                assert self.ms is not None and end.ms is not None
                return end.ms - self.ms

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current stream of {device}")

    def work(self, ms: float) -> None:
        self.queue.append(lambda: setattr(self, "now_ms", self.now_ms + ms))

    def go_on(self) -> None:
        for done in self.queue:
            done()
        self.queue.clear()


def test_a_gpu_is_timed_by_its_own_clock_and_waited_for_only_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    watch = Stopwatch(torch.device("cuda:0"))
    for _ in range(3):
        with watch.phase("forward"):
            device.work(1000.0)
        with watch.phase("backward"):
            device.work(2000.0)
    assert device.n_waits == 0
    assert watch.read() == {"forward": 3.0, "backward": 6.0}
    assert device.n_waits == 1
    assert watch.read() == {}


def test_a_part_within_another_is_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    watch = Stopwatch(torch.device("cuda:0"))
    for name in ("forward", "backward"):
        with pytest.raises(KeyError), watch.phase(name):
            device.work(1000.0)
            with watch.phase("exchange"):
                device.work(500.0)
                raise KeyError
    with watch.phase("exchange"):
        device.work(250.0)
    seconds = {"forward": 1.5, "forward/exchange": 0.5, "backward": 1.5, "backward/exchange": 0.5, "exchange": 0.25}
    assert watch.read() == seconds


def test_a_gpu_keeps_no_more_events_than_it_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    watch = Stopwatch(torch.device("cuda:0"))
    for _ in range(1000):
        with watch.phase("forward"):
            device.work(1.0)
            device.go_on()
    assert len(watch._pending) <= 2
    assert watch.read() == {"forward": pytest.approx(1.0)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    watch = Stopwatch(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    begun = time.perf_counter()
    for _ in range(3):
        with watch.phase("products"):
            for _ in range(20):
                x = x @ x / 4096
    seconds = watch.read()["products"]
    assert 0.0 < seconds <= time.perf_counter() - begun
