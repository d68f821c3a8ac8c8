"""Native kernels for training on data that cannot be fully trusted.

Losses that weigh every row, with every derivative PyTorch knows: see ``fused_cross_entropy``, ``fused_dimp_loss`` and
their siblings. ``synkern.registry.LOSSES`` lists them all. ``synkern.numpy`` holds them for numpy, without torch,
which is why the names below are only loaded when they are asked for.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends import empty_cache
    from .losses import (
        fused_cross_entropy,
        fused_dimp_loss,
        fused_focal_loss,
        fused_gce_loss,
        fused_imp_loss,
        fused_mae_loss,
        fused_rce_loss,
        fused_sce_loss,
    )
    from .modules import (
        CrossEntropyLoss,
        DIMPLoss,
        FocalLoss,
        GCELoss,
        IMPLoss,
        MAELoss,
        RCELoss,
        SCELoss,
    )

__version__ = _version("synkern")

__all__ = [
    "CrossEntropyLoss",
    "DIMPLoss",
    "FocalLoss",
    "GCELoss",
    "IMPLoss",
    "MAELoss",
    "RCELoss",
    "SCELoss",
    "empty_cache",
    "fused_cross_entropy",
    "fused_dimp_loss",
    "fused_focal_loss",
    "fused_gce_loss",
    "fused_imp_loss",
    "fused_mae_loss",
    "fused_rce_loss",
    "fused_sce_loss",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'synkern' has no attribute {name!r}")
    module = "backends" if name == "empty_cache" else "losses" if name.startswith("fused_") else "modules"
    value = getattr(_import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
