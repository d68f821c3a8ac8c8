"""The table of losses: tests, benchmarks, reference docs and integrations find every loss here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import losses, modules, reference


@dataclass(frozen=True)
class LossSpec:
    """One loss.

    Attributes:
        name: key in ``LOSSES``.
        function: the public function.
        module: its ``nn.Module`` twin.
        reference: the loss per row in plain torch, ``reference(logits, target, **operands, **options) -> (N,)``.
        operands: names of the tensors (N,) the loss takes beside target.
        variants: options that tests and benchmarks cover; the first are the defaults.
    """

    name: str
    function: Callable[..., Any]
    module: type[nn.Module]
    reference: Callable[..., Any]
    operands: tuple[str, ...] = ()
    variants: tuple[dict[str, Any], ...] = ({},)


def _losses() -> dict[str, LossSpec]:
    specs = (
        LossSpec(
            "cross_entropy", losses.fused_cross_entropy, modules.CrossEntropyLoss, reference.cross_entropy_loss,
            variants=({}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.3, "z_loss": 1e-3}),
        ),
        LossSpec("rce", losses.fused_rce_loss, modules.RCELoss, reference.rce_loss, variants=({}, {"log_zero": -4.0})),
        LossSpec("mae", losses.fused_mae_loss, modules.MAELoss, reference.mae_loss),
        LossSpec(
            "gce", losses.fused_gce_loss, modules.GCELoss, reference.gce_loss,
            variants=({}, {"q": 1.0}, {"q": 0.3}, {"truncation": 0.5}),
        ),
        LossSpec(
            "sce", losses.fused_sce_loss, modules.SCELoss, reference.sce_loss,
            variants=({}, {"alpha": 6.0, "beta": 0.1}),
        ),
        LossSpec(
            "focal", losses.fused_focal_loss, modules.FocalLoss, reference.focal_loss,
            variants=({}, {"gamma": 0.5}, {"gamma": 1.0}, {"gamma": 0.0}, {"detach_modulation": True}),
        ),
        LossSpec(
            "imp", losses.fused_imp_loss, modules.IMPLoss, reference.imp_loss, operands=("quality", "diversity"),
            variants=({}, {"max_weight": 1.2}),
        ),
        LossSpec(
            "dimp", losses.fused_dimp_loss, modules.DIMPLoss, reference.dimp_loss, operands=("quality",),
            variants=({}, {"detach_weight": False}, {"max_weight": 1.5}, {"detach_weight": False, "max_weight": 1.5}),
        ),
    )
    return {spec.name: spec for spec in specs}


LOSSES: dict[str, LossSpec] = _losses()
