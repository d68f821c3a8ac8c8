"""Importing this module loads the compiled operators into ``torch.ops.synkern``."""

from __future__ import annotations

from pathlib import Path

import torch


def _find(name: str) -> Path | None:
    import synkern

    for folder in synkern.__path__:  # an editable install has two folders
        path = Path(folder) / name
        if path.exists():
            return path
    return None


def _load() -> None:
    path = _find("libsynkern_ops.so")
    if path is None:
        raise ImportError(
            "synkern: the compiled library libsynkern_ops.so is missing from the installed package; "
            "reinstall with `pip install --force-reinstall --no-deps synkern`, or build with `pip install .`"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"synkern: {path.name} does not load under torch {torch.__version__} (needs >= 2.11): {error}"
        ) from error


def _load_cuda() -> str | None:
    """Adds the kernels at the CUDA key, which needs no GPU; returns why there are none, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    path = _find("libsynkern_cuda.so")
    if path is None:
        return "this build of synkern has no CUDA kernels (`pip install . -C cmake.define.SYNKERN_CUDA=ON` makes them)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load under torch {torch.__version__}: {error}"
    return None


_load()
cuda_missing = _load_cuda()  # backends says it to whoever asks for the CUDA kernels
