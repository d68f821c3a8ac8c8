"""All that depends on the device: clock, synchronisation, memory, description. One more is a row of ``DEVICES``."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch


class Device(Protocol):
    """What the harness asks of a device."""

    name: str
    torch_device: torch.device

    def seconds_per_call(self, call: Callable[[], Any], repeats: int) -> float:
        """Mean time of ``repeats`` calls, all work finished."""

    def peak_extra_bytes(self, call: Callable[[], Any]) -> int:
        """The most memory that one call holds beyond what is held before it. Runs in a process of its own."""

    def describe(self) -> dict[str, Any]:
        """Model, features and settings, for the report."""

    def busy_elsewhere(self) -> Callable[[], float | None]:
        """Starts watching; the result, called later, says how much of the device others used, in cores."""


class Cpu:
    """The host's processor."""

    name = "cpu"
    torch_device = torch.device("cpu")

    def seconds_per_call(self, call: Callable[[], Any], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def peak_extra_bytes(self, call: Callable[[], Any]) -> int:
        """High-water mark of resident memory, which Linux resets when asked.

        It counts every page that is touched, whoever allocated it: torch, a kernel's own scratch, generated code.
        A profiler of torch's allocator would miss the second, and ``ru_maxrss`` cannot be reset, so that it would
        report compiling or warming up instead.
        """
        _return_free_pages()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)

    def describe(self) -> dict[str, Any]:
        return {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "huge_pages": _huge_pages(),
        }

    def busy_elsewhere(self) -> Callable[[], float | None]:
        start, others = time.perf_counter(), _cpu_seconds_of_others()

        def cores() -> float | None:
            now = _cpu_seconds_of_others()
            return None if others is None or now is None else (now - others) / (time.perf_counter() - start)

        return cores


def _cpu_seconds_of_others() -> float | None:
    """Processor time that everything but this process and its finished children has had since the machine started."""
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, irq, soft_irq, steal = map(int, fields)
    busy = (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def _return_free_pages() -> None:
    """Freed memory that the allocator keeps would otherwise hide what the call takes."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _huge_pages() -> str | None:
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return setting.split("[")[-1].split("]")[0]


DEVICES: dict[str, Device] = {device.name: device for device in (Cpu(),)}
