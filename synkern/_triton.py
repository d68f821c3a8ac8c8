"""The operators again in a namespace of their own, run by Triton: what ``backend="triton"`` calls.

Where a GPU has no other kernels, the same implementations are registered for the operators of ``synkern`` too. Triton
is imported when the first kernel runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import library as torch_library

from . import _library

NAMESPACE = "synkern_triton"
OPERATORS = (
    "row_loss", "row_loss_and_gradient", "row_loss_rescale", "row_loss_backward", "row_loss_tangent", "row_loss_hvp",
    "linear_contraction", "embedding_contraction", "norm_contraction",
)


@functools.cache
def _implementations() -> dict[str, Callable[..., Any]]:
    try:
        import triton
    except ImportError as error:
        raise ImportError(
            "synkern: there are no compiled kernels for this device, and the package triton, which would make some, is "
            "not installed; use `pip install 'synkern[triton]'`, or .cpu()"
        ) from error
    from .triton_kernels import launch, operators

    if launch.is_interpreted and isinstance(triton.language.sum, triton.JITFunction):
        raise RuntimeError(
            "synkern: TRITON_INTERPRET was set after triton had been imported, and cannot be heeded any more; set it "
            "before the program starts"
        )
    return operators.OPERATORS


def _implementation(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return _implementations()[name](*args)

    return call


def _define() -> list[torch_library.Library]:
    """One schema for both namespaces: that of the compiled library."""
    ours = torch_library.Library(NAMESPACE, "DEF")
    native = torch_library.Library("synkern", "IMPL")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.synkern, name).default._schema)
        ours.define(schema.removeprefix("synkern::"))
        implementation = _implementation(name)
        for key in ("CPU", "CUDA", "XPU"):  # CPU: the interpreter
            ours.impl(name, implementation, key)
        native.impl(name, implementation, "XPU")
        if _library.cuda_missing is not None:
            native.impl(name, implementation, "CUDA")
    return [ours, native]


_libraries = _define()  # undone when the objects go
