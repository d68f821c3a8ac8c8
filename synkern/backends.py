"""Which implementations of the operators this process has, and why others are missing."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec

import torch

from . import _library, _triton

BACKENDS = ("cpu", "cuda", "triton")
DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "xpu")}

# Who runs on tensors of a device where no backend is asked for: the first that can be had. The place for what a
# measurement says (benchmarks/results).
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}

# Why a backend cannot be had in this process, whatever the tensors.
_MISSING: dict[str, str] = {}
if _library.cuda_missing is not None:
    _MISSING["cuda"] = _library.cuda_missing
if find_spec("triton") is None:
    _MISSING["triton"] = "the package triton is not installed (`pip install 'synkern[triton]'`)"

# Triton decides at its import whether its kernels are compiled or interpreted.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def available() -> tuple[str, ...]:
    """The backends that can be used in this process. Triton's interpreter does not count: it is for tests."""
    return tuple(name for name in BACKENDS if _why_missing(name) is None)


def _why_missing(backend: str) -> str | None:
    """Why a backend cannot be had, or None."""
    if backend in _MISSING:
        return _MISSING[backend]
    if backend == "cpu" or any(getattr(torch, device).is_available() for device in DEVICES[backend]):
        return None
    return f"torch sees no {' or '.join(DEVICES[backend])} device"


def choose(name: str, backend: str | None, device: torch.device) -> str:
    """The namespace of operators for tensors of ``device``.

    Args:
        name: of the function, for messages.
        backend: that of the caller; None takes what fits the tensors.
        device: of the tensors.

    Raises:
        ValueError: unknown backend, a backend that is missing (says why), or tensors of another device.
    """
    if backend is not None:
        check(name, backend, device)
        return _triton.NAMESPACE if backend == "triton" else "synkern"
    if device.type not in PREFERENCE:  # meta tensors, and devices that the operators do not know
        return "synkern"
    for candidate in PREFERENCE[device.type]:
        if candidate not in _MISSING:
            return _triton.NAMESPACE if candidate == "triton" else "synkern"
    reasons = "; ".join(f"{candidate}: {_MISSING[candidate]}" for candidate in PREFERENCE[device.type])
    raise ValueError(f"{name}: no backend for tensors on {device} ({reasons}); use logits.cpu()")


def check(name: str, backend: str, device: torch.device) -> None:
    """Raises unless ``backend`` can run on tensors of ``device``.

    Raises:
        ValueError: unknown backend, a backend that is missing (says why), or tensors of another device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{name}: backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend in _MISSING:
        raise ValueError(
            f"{name}: backend={backend!r} cannot be had: {_MISSING[backend]}; "
            "use backend=None for what fits the tensors"
        )
    if device.type in DEVICES[backend]:
        return
    if backend == "triton" and device.type == "cpu":
        if _INTERPRETED:
            return
        raise ValueError(
            f"{name}: backend='triton' on CPU tensors runs Triton's interpreter, which is slow, for tests, and off; "
            "set TRITON_INTERPRET=1 in the environment before the program starts, or use backend=None"
        )
    raise ValueError(
        f"{name}: backend={backend!r} works on {' or '.join(DEVICES[backend])} tensors, got logits on "
        f"{device}; use logits.to({DEVICES[backend][0]!r}) or backend=None"
    )


def empty_cache() -> None:
    """Gives back the memory kept for the next large gradient on the CPU.

    A gradient of 8 MB or more that is mapped anew at every step spends longer in page faults than in the kernel, so the
    last one released, and no other, stays with the process. New work may always keep one again.
    """
    torch.ops.synkern.empty_cache()


def report() -> dict[str, object]:
    """Versions, instruction set, compiler, and for every backend ``"available"`` or why it is missing."""
    import synkern

    from . import _native

    return {
        "synkern": synkern.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "compiler": _native.compiler(),
        "instruction_set": _native.isa(),
        "threads": torch.get_num_threads(),
        "backends": {name: _why_missing(name) or "available" for name in BACKENDS},
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
