"""Which implementations of the operators this process has, and why others are missing."""

from __future__ import annotations

import platform

import torch

BACKENDS = ("cpu", "cuda", "triton")
_DEVICE_TYPES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "xpu")}
_MISSING = {
    "cuda": "this build of synkern has no CUDA kernels",
    "triton": "this build of synkern has no Triton kernels",
}


def available() -> tuple[str, ...]:
    """The backends that can be used in this process."""
    return tuple(name for name in BACKENDS if name not in _MISSING)


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
    if device.type not in _DEVICE_TYPES[backend]:
        raise ValueError(
            f"{name}: backend={backend!r} works on {' or '.join(_DEVICE_TYPES[backend])} tensors, got logits on "
            f"{device}; use logits.to({_DEVICE_TYPES[backend][0]!r}) or backend=None"
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
        "backends": {name: _MISSING.get(name, "available") for name in BACKENDS},
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
