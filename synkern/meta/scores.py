"""Per-sample scores s_i = <v, grad l_i>: one call, four ways."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .capture import contraction_scores
from .context import MethodUnavailable, PerSampleLoss, RandomState, refuse_batch_statistics, unwrap, without_sync
from .difference import difference_scores
from .direction import check_direction
from .double_backward import double_backward_scores
from .forward_mode import forward_scores

_log = logging.getLogger("synkern.meta")

METHODS = ("contraction", "forward", "difference", "double_backward")

# The choice of "auto" for a model, and what it was made for. Weak: it lives as long as the model does.
_choices: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def sample_scores(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    batch: Any,
    direction: Mapping[str, Tensor],
    *,
    method: str = "auto",
) -> Tensor:
    """How fast each sample's loss changes along a direction of the parameters, s_i = <v, grad l_i>.

    For v the gradient of an outer loss this is the one-step meta-gradient: after a gradient step on
    (1/D) sum_i w_i l_i with learning rate eta, the outer loss changes with w_i by -(eta/D) s_i, which
    :meth:`SampleWeights.apply_scores` applies.

    ============== ========= ===================== ==============================================================
    method         cost      exact                 cannot be had
    ============== ========= ===================== ==============================================================
    contraction    3 F       yes                   for layers without a rule, parameters used outside their module
    forward        3 F       yes                   where torch has no forward formula
    difference     2 F       to 1e-4 in float32    with 16-bit parameters, for losses with detached parts
    double_backward 5 F      yes                   where torch has no second derivative
    ============== ========= ===================== ==============================================================

    with F one forward pass. Parameters and their ``.grad``, the model's mode and, for the difference, its buffers stay
    as they are. Under DistributedDataParallel every process scores its own samples and nothing is communicated.

    Args:
        model: the model, in the mode (train or eval) in which the losses are meant; a DistributedDataParallel wrapper
            is taken off.
        per_sample_loss: called as ``per_sample_loss(model, batch)``; returns the N losses, ``reduction="none"``.
        batch: what ``per_sample_loss`` takes.
        direction: tensors by parameter name, as from :func:`outer_direction`; parameters it does not name have
            direction zero.
        method: one of the table, or "auto": contraction, else forward, else difference. What it takes, and why,
            is said in the log ``synkern.meta`` at level INFO, once for a model as long as it stays the same.

    Returns:
        (N,) scores, float32 (float64 for float64 losses).

    Raises:
        TypeError, ValueError: an argument that does not fit, or a method that cannot be had for this model, with the
            module's name; also a batch normalisation in train mode, under which no loss belongs to one sample.

    Source: SunGen (Gao et al., ICLR 2023), Eq. 11, without its sign.
    """
    if method not in (*METHODS, "auto"):
        raise ValueError(f"sample_scores: method must be one of {', '.join((*METHODS, 'auto'))}, got {method!r}")
    checked = check_direction(model, direction)
    refuse_batch_statistics(model)
    with without_sync(model):
        run = _Run(unwrap(model), per_sample_loss, batch, checked)
        scores = run.auto() if method == "auto" else run.by(method)
    return scores if scores.dtype == torch.float64 else scores.float()


class _Run:
    """One batch to be scored."""

    def __init__(
        self,
        model: nn.Module,
        per_sample_loss: PerSampleLoss,
        batch: Any,
        direction: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        self.model, self.per_sample_loss, self.batch, self.direction = model, per_sample_loss, batch, direction

    def by(self, method: str) -> Tensor:
        """The scores by one method."""
        ways = {
            "contraction": contraction_scores,
            "forward": forward_scores,
            "difference": difference_scores,
            "double_backward": double_backward_scores,
        }
        return ways[method](self.model, self.per_sample_loss, self.batch, self.direction)

    def auto(self) -> Tensor:
        """The scores by the cheapest exact method there is, else by differences."""
        kind = (self.model.training, tuple(self.direction), _autocast(self.direction))
        known = [method for made_for, method in [_choices.get(self.model, (None, ""))] if made_for == kind]
        random = RandomState(self.model)
        reasons: dict[str, str] = {}
        for method in dict.fromkeys((*known, "contraction", "forward", "difference")):
            try:
                scores = self.by(method)
            except MethodUnavailable as error:
                reasons[method] = str(error)
                random.restore()  # the next method is to see the dropout masks of one forward pass
                continue
            if method not in known:
                _choices[self.model] = (kind, method)
                _log.info(
                    "sample_scores: auto takes method %r for %s; %s", method, type(self.model).__name__, _why(reasons)
                )
            return scores
        raise MethodUnavailable(f"sample_scores: no method can be had; {_why(reasons)}")


def _autocast(direction: dict[str, tuple[Tensor, Tensor]]) -> bool:
    return any(torch.is_autocast_enabled(kind) for kind in {v.device.type for _, v in direction.values()})


def _why(reasons: dict[str, str]) -> str:
    if not reasons:
        return "the cheapest of the exact methods"
    return "; ".join(f"not {method!r}: {reason.removeprefix('sample_scores: ')}" for method, reason in reasons.items())
