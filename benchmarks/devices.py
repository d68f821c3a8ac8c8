"""All that depends on the device: clock, synchronisation, memory, description. One more is a row of ``DEVICES``."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
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

    def missing(self) -> str | None:
        """Why nothing can run on it here, or None."""

    def copies(self, array_bytes: int) -> int:
        """How many problems with arrays of this size to go round, so that no cache answers for memory."""

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

    def missing(self) -> str | None:
        return None

    def copies(self, array_bytes: int) -> int:
        """The caches' share is part of what is measured on a processor: the sizes go from all of it to none."""
        return 1

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


class Cuda:
    """The current NVIDIA GPU."""

    name = "cuda"
    torch_device = torch.device("cuda")
    most_copies = 32  # small arrays are all latency, wherever they lie

    def missing(self) -> str | None:
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
        return None if torch.cuda.is_available() else "torch sees no GPU; run on a machine that has one"

    def copies(self, array_bytes: int) -> int:
        """Together four times as large as the last cache."""
        cache = torch.cuda.get_device_properties(self.torch_device).L2_cache_size
        return max(1, min(self.most_copies, -(-4 * cache // max(1, array_bytes))))

    def seconds_per_call(self, call: Callable[[], Any], repeats: int) -> float:
        """By the GPU's own clock, between two marks in its queue: what the host takes counts where it is the slower."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    def peak_extra_bytes(self, call: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.torch_device)
        return {
            "model": properties.name,
            "memory": f"{properties.total_memory / 1e9:.0f} GB",
            "processors": properties.multi_processor_count,
            "last_cache": f"{properties.L2_cache_size / 1e6:.0f} MB",
            "cuda": torch.version.cuda,
            "driver": _nvidia_smi("driver_version"),
            "clocks": f"{_nvidia_smi('clocks.max.sm')} / {_nvidia_smi('clocks.max.memory')} at most",
        }

    def busy_elsewhere(self) -> Callable[[], float | None]:
        return lambda: None  # a GPU does not say whose work it did


def _nvidia_smi(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


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


DEVICES: dict[str, Device] = {device.name: device for device in (Cpu(), Cuda())}
