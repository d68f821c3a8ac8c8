"""``nn.Module`` twins of the losses: options in the constructor, tensors in ``forward``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import losses

_DEFAULTS: dict[str, Any] = {"ignore_index": -100, "reduction": "mean", "backend": None}


class _RowLoss(nn.Module):
    """Holds a loss's options; ``class_weight`` is a buffer, so that it moves and is saved with the module."""

    class_weight: Tensor | None

    def __init__(
        self, function: Any, options: dict[str, Any], class_weight: Tensor | None, common: dict[str, Any]
    ) -> None:
        super().__init__()
        unknown = sorted(common.keys() - _DEFAULTS.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: expected options among {sorted([*options, 'class_weight', *_DEFAULTS])}, "
                f"got {', '.join(unknown)}; pass tensors to forward"
            )
        self._function = function
        self._options = options
        self._common = {**_DEFAULTS, **common}
        self.register_buffer("class_weight", class_weight)

    def extra_repr(self) -> str:
        shown = [f"{k}={v!r}" for k, v in self._options.items()]
        shown += [f"{k}={v!r}" for k, v in self._common.items() if v != _DEFAULTS[k]]
        if self.class_weight is not None:
            shown.append(f"class_weight=({self.class_weight.shape[0]},)")
        return ", ".join(shown)

    def forward(self, logits: Tensor, target: Tensor, *operands: Tensor, **tensors: Any) -> Any:
        """The loss of logits (*, C) and target (*).

        Args:
            operands: the tensors that the function takes after target, in its order.
            tensors: ``sample_weight``, ``normalizer``, and the function's tensors by name.
        """
        return self._function(
            logits, target, *operands, class_weight=self.class_weight, **self._options, **self._common, **tensors
        )


class CrossEntropyLoss(_RowLoss):
    """See ``synkern.fused_cross_entropy``."""

    def __init__(
        self, *, label_smoothing: float = 0.0, z_loss: float = 0.0, class_weight: Tensor | None = None, **common: Any
    ) -> None:
        options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        super().__init__(losses.fused_cross_entropy, options, class_weight, common)


class RCELoss(_RowLoss):
    """See ``synkern.fused_rce_loss``."""

    def __init__(
        self, *, log_zero: float = losses.LOG_ZERO, class_weight: Tensor | None = None, **common: Any
    ) -> None:
        super().__init__(losses.fused_rce_loss, {"log_zero": log_zero}, class_weight, common)


class MAELoss(_RowLoss):
    """See ``synkern.fused_mae_loss``."""

    def __init__(self, *, class_weight: Tensor | None = None, **common: Any) -> None:
        super().__init__(losses.fused_mae_loss, {}, class_weight, common)


class GCELoss(_RowLoss):
    """See ``synkern.fused_gce_loss``."""

    def __init__(
        self, *, q: float = 0.7, truncation: float | None = None, class_weight: Tensor | None = None, **common: Any
    ) -> None:
        super().__init__(losses.fused_gce_loss, {"q": q, "truncation": truncation}, class_weight, common)


class SCELoss(_RowLoss):
    """See ``synkern.fused_sce_loss``."""

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        beta: float = 1.0,
        log_zero: float = losses.LOG_ZERO,
        class_weight: Tensor | None = None,
        **common: Any,
    ) -> None:
        options = {"alpha": alpha, "beta": beta, "log_zero": log_zero}
        super().__init__(losses.fused_sce_loss, options, class_weight, common)


class FocalLoss(_RowLoss):
    """See ``synkern.fused_focal_loss``."""

    def __init__(
        self,
        *,
        gamma: float = 2.0,
        detach_modulation: bool = False,
        class_weight: Tensor | None = None,
        **common: Any,
    ) -> None:
        options = {"gamma": gamma, "detach_modulation": detach_modulation}
        super().__init__(losses.fused_focal_loss, options, class_weight, common)


class IMPLoss(_RowLoss):
    """See ``synkern.fused_imp_loss``; ``forward(logits, target, quality, diversity)``."""

    def __init__(
        self,
        *,
        max_weight: float | None = None,
        return_weights: bool = False,
        class_weight: Tensor | None = None,
        **common: Any,
    ) -> None:
        options = {"max_weight": max_weight, "return_weights": return_weights}
        super().__init__(losses.fused_imp_loss, options, class_weight, common)


class DIMPLoss(_RowLoss):
    """See ``synkern.fused_dimp_loss``; ``forward(logits, target, quality)``."""

    def __init__(
        self,
        *,
        detach_weight: bool = True,
        max_weight: float | None = None,
        return_weights: bool = False,
        class_weight: Tensor | None = None,
        **common: Any,
    ) -> None:
        options = {"detach_weight": detach_weight, "max_weight": max_weight, "return_weights": return_weights}
        super().__init__(losses.fused_dimp_loss, options, class_weight, common)
