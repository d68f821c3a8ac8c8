"""Native kernels for training on data that cannot be fully trusted.

Losses that weigh every row, with every derivative PyTorch knows: see ``fused_cross_entropy``, ``fused_dimp_loss`` and
their siblings. ``synkern.registry.LOSSES`` lists them all.
"""

from importlib.metadata import version as _version

from . import _library

_library.load()

from . import _abstract, _autograd  # noqa: E402

_registrations = _autograd.register()
_abstract.register(_registrations)

from .backends import empty_cache  # noqa: E402
from .losses import (  # noqa: E402
    fused_cross_entropy,
    fused_dimp_loss,
    fused_focal_loss,
    fused_gce_loss,
    fused_imp_loss,
    fused_mae_loss,
    fused_rce_loss,
    fused_sce_loss,
)
from .modules import (  # noqa: E402
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
