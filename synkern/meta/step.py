"""Scores inside a training step: one forward, one backward, and the gradients that the step would have made anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._checks import check_reduction
from .capture import Capture, Run, SampleCheck
from .context import unwrap
from .direction import check_direction
from .linear import Gradients

_NAME = "scored_step"


def scored_step(
    model: nn.Module,
    direction: Mapping[str, Tensor],
    *,
    reweight: Callable[[Tensor], Tensor] | None = None,
    samples: int | None = None,
) -> ScoredStep:
    """A training step that also gives s_i = <v, grad l_i> of every sample, from one more matrix product a layer.

    ::

        with scored_step(model, direction) as step:
            losses = fused_cross_entropy(model(x), y, reduction="none")      # (N,)
            loss = step.reduce(losses, sample_weight=weights)
            loss.backward()
        step.scores                                                          # (N,), and .grad as always

    The scores are those of the unweighted losses, also where a weight is zero. The gradients are those of plain
    backward, through autograd: hooks, accumulation and DistributedDataParallel see nothing new. Costs one matrix
    product a layer, about a third of a step; on the CPU a tenth to a fifth with 64 tokens or more a sample, where the
    share is read off each sample's gradient, and less with padding, whose rows have no gradient and are left out. Fused
    attention, autocast and gradient checkpointing stay as they are.

    With ``reweight`` the weights come out of the scores, in the same backward (learning to reweight): every layer keeps
    its input and output gradient until the scores are complete, then ``reweight(scores)`` gives the weights, then
    the weighted gradients are made. Until then ``loss`` is that of weights one.

    The first time that a model is used, an extra backward over half of the losses makes sure that samples do not mix.

    Args:
        model: the model, or its DistributedDataParallel wrapper. Forward and backward are to happen inside ``with``,
            the forward by calling the model or its modules.
        direction: tensors by parameter name, as from :func:`outer_direction`; parameters it does not name have
            direction zero.
        reweight: takes the scores (N,), returns weights (N,). Ren et al. use
            ``lambda s: s.clamp(min=0) / s.clamp(min=0).sum().clamp(min=1e-12)`` with ``reduction="sum"``.
        samples: N, needed only where embeddings of positions that all samples share cannot be told from the first
            tensor that the model is given.

    Returns:
        A :class:`ScoredStep` to be opened by ``with``.

    Raises:
        TypeError, ValueError: a direction that does not fit the model, a parameter with a direction whose layer has no
            rule or that is used outside its module, samples that mix. The message names the module.

    Source: Ren et al., Learning to Reweight Examples (ICML 2018); SunGen (Gao et al., ICLR 2023), Eq. 11.
    """
    if reweight is not None and not callable(reweight):
        raise TypeError(f"{_NAME}: reweight must be callable, got {type(reweight).__name__}; pass a function of scores")
    return ScoredStep(model, direction, reweight, samples)


class ScoredStep:
    """What ``with scored_step(...) as step`` gives."""

    def __init__(
        self, model: nn.Module, direction: Mapping[str, Tensor], reweight: Callable[[Tensor], Tensor] | None,
        samples: int | None,
    ) -> None:  # fmt: skip
        gradients = "at once" if reweight is None else "deferred"
        pairs = check_direction(model, direction, _NAME)
        self._capture = Capture(
            unwrap(model), pairs, _NAME, gradients=gradients, samples=samples, distributed=model is not unwrap(model)
        )
        self._reweight = reweight
        self._run: Run | None = None
        self._unit: Tensor | None = None
        self._check: SampleCheck | None = None
        self._scores: Tensor | None = None
        self._weights: Tensor | None = None
        self._reduced = self._open = self._by_sum = False

    def __enter__(self) -> ScoredStep:
        self._capture.__enter__()
        if self._reweight is not None:
            self._parameters = [p for p in self._capture.model.parameters() if p.requires_grad]
            with torch.enable_grad():
                self._capture.token = _Gate.apply(self, *self._parameters)
        self._open = True
        return self

    def __exit__(self, kind: Any, *exception: object) -> None:
        self._open = False
        self._capture.close()
        if kind is not None:
            self._run = None  # with what layers left there
        try:
            if self._run is None:
                return
            if self._reweight is not None and self._weights is None:
                raise ValueError(
                    f"{_NAME}: backward did not reach the layers of the model, so that there are no weights"
                )
            self._complete()
        finally:
            # It may hold the losses, whose graph holds this step: a cycle that no collector sees; it cost a run 21 GB.
            self._reweight = None

    @property
    def scores(self) -> Tensor:
        """(N,) scores of the unweighted losses, float32 (float64 where layers are); after ``backward``."""
        if self._run is None:
            raise ValueError(
                f"{_NAME}: no scores yet; call step.reduce(losses, ...) and then .backward() on what it returns"
            )
        return self._complete()

    @property
    def weights(self) -> Tensor:
        """(N,) what ``reweight`` made of the scores; after ``backward``."""
        if self._weights is None:
            raise ValueError(f"{_NAME}: no weights; they come from reweight=, in .backward()")
        return self._weights

    def reduce(
        self,
        losses: Tensor,
        *,
        sample_weight: Tensor | None = None,
        reduction: str = "mean",
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The weighted loss of the batch, to call ``backward`` on.

        Args:
            losses: (N,), one a sample.
            sample_weight: (N,), any sign; None for ones. Differentiable. Not together with ``reweight``.
            reduction: "mean" divides by N, "weighted_mean" by the sum of the weights, "sum".
            normalizer: number or 0-d tensor that replaces the denominator of a mean: gradient accumulation.

        Returns:
            The loss, 0-d.

        Raises:
            TypeError, ValueError: an argument that does not fit; a second call in one step; with weights, a parameter
                that requires grad and is used otherwise than by a captured layer, since its gradient would not be
                weighted; samples that mix.
        """
        self._check_arguments(losses, sample_weight, reduction, normalizer)
        self._reduced = True
        self._check = self._capture.verify(losses)
        if sample_weight is not None or self._reweight is not None:
            self._refuse_unweighted()
        self._by_sum = reduction == "weighted_mean" and normalizer is None
        denominator = 1.0 if reduction == "sum" else losses.shape[0] if normalizer is None else normalizer
        return _Reduce.apply(self, losses, sample_weight, denominator)  # type: ignore[no-any-return]

    def _check_arguments(
        self, losses: Tensor, sample_weight: Tensor | None, reduction: str, normalizer: object
    ) -> None:
        if not self._open:
            raise ValueError(f"{_NAME}: reduce was called outside of its with block; expected forward, reduce and "
                             "backward inside")  # fmt: skip
        if self._reduced:
            raise ValueError(f"{_NAME}: reduce was called twice in one step; open a step for each backward pass")
        check_reduction(_NAME, reduction, normalizer)
        if reduction == "none":
            raise ValueError(f"{_NAME}: reduction must be mean, weighted_mean or sum, got 'none'")
        if not isinstance(losses, Tensor) or not losses.dtype.is_floating_point:
            got = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(f"{_NAME}: losses must be a floating torch.Tensor (N,), got {got}")
        if losses.dim() != 1 or not losses.shape[0]:
            raise ValueError(
                f"{_NAME}: losses must have shape (N,), N > 0, one a sample, got {tuple(losses.shape)}; use "
                "reduction='none', and average over the tokens of a sample"
            )
        if not losses.requires_grad:
            raise ValueError(f"{_NAME}: the losses do not depend on any parameter that requires grad")
        if sample_weight is None:
            return
        if self._reweight is not None:
            raise ValueError(f"{_NAME}: got sample_weight and reweight; expected one of them")
        if not isinstance(sample_weight, Tensor) or not sample_weight.dtype.is_floating_point:
            got = sample_weight.dtype if isinstance(sample_weight, Tensor) else type(sample_weight).__name__
            raise TypeError(f"{_NAME}: sample_weight must be a floating torch.Tensor, got {got}")
        if sample_weight.shape != losses.shape or sample_weight.device != losses.device:
            raise ValueError(
                f"{_NAME}: sample_weight must have shape {tuple(losses.shape)} and be on {losses.device} as the "
                f"losses, got {tuple(sample_weight.shape)} on {sample_weight.device}"
            )

    def _refuse_unweighted(self) -> None:
        """The losses' cotangents carry no weights: only captured layers put them into the gradients they make."""
        capture = self._capture
        reasons = [f"{name!r}: {reason}" for name, reason in capture.uncaptured.items()]
        reasons += [
            f"{name!r}: it is used outside its module's forward, by {node}"
            for name, node in capture.foreign.items()
        ]
        reasons += [f"{alien}: it is no parameter of the model" for alien in capture.aliens]
        if reasons:
            raise ValueError(
                f"{_NAME}: expected weights to reach every gradient, but they would not reach that of {reasons[0]}; "
                "leave out the weights, or what it is that requires grad"
            )

    def _start(self, run: Run, unit: Tensor) -> None:
        """Backward begins; ``unit`` is what the losses' gradients are multiplied by."""
        if not self._open:
            raise ValueError(f"{_NAME}: backward must be called inside the with block, where the layers are captured")
        self._run = self._capture.run = run
        self._unit, self._scores = unit, None

    def _complete(self) -> Tensor:
        """The scores, compared with those of the check, once."""
        assert self._run is not None and self._unit is not None
        if self._scores is None:
            total = self._run.shares(self._unit.device).sum(0)
            self._scores = total / self._unit.to(total.dtype)
            check, self._check = self._check, None
            if check is not None:
                self._capture.settle(check, self._scores)
        return self._scores

    def _deferred_gradients(self) -> Gradients:
        """Scores, then weights, then the weighted gradient of every parameter."""
        assert self._run is not None and self._run.deferred is not None and self._reweight is not None
        scores, n = self._complete(), self._run.samples
        with torch.enable_grad():
            weights = self._reweight(scores)
        if not isinstance(weights, Tensor) or weights.shape != (n,):
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"{_NAME}: reweight must return weights of shape ({n},), as the scores, got {got}")
        self._weights = weights = weights.detach().to(scores.dtype)
        factor = self._row_factor(weights)
        self._run.closed = True
        total: dict[int, Tensor] = {}
        pending, self._run.deferred = self._run.deferred, []
        while pending:
            layer, gradients = pending.pop()
            for parameter, gradient in zip(layer.parameters, gradients(factor), strict=True):
                if gradient is not None:
                    known = total.get(id(parameter))
                    total[id(parameter)] = gradient if known is None else known + gradient
        return tuple(total.get(id(parameter)) for parameter in self._parameters)

    def _row_factor(self, weights: Tensor) -> Tensor:
        """What a sample's gradient is multiplied by, beside the common factor that its loss's cotangent carries."""
        return weights * (len(weights) / weights.sum()) if self._by_sum else weights


class _Reduce(torch.autograd.Function):
    """sum_i w_i l_i / D, whose backward gives all losses the same cotangent u and leaves the weights to the layers.

    u holds what all samples share, D included, so that a loss scale keeps 16-bit gradients in range. With the weights
    summing to D, u is 1/N and they carry the rest: the scores stay finite where the weights sum to zero.
    """

    @staticmethod
    def forward(ctx: Any, step: ScoredStep, losses: Tensor, weight: Tensor | None, denominator: Any) -> Tensor:
        if step._by_sum and weight is not None:
            value = (losses * weight).sum() / weight.sum()
        else:
            value = (losses if weight is None else losses * weight).sum() / denominator
        ctx.step, ctx.denominator = step, denominator
        ctx.save_for_backward(losses, weight, value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        step: ScoredStep = ctx.step
        losses, weight, value = ctx.saved_tensors
        n, unit = len(losses), grad / ctx.denominator
        factor = None if weight is None else step._row_factor(weight)
        run = Run(n, wants_gradients=True, row_weight=factor, deferred=step._reweight is not None)
        step._start(run, unit)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = (losses - value) * (grad / weight.sum()) if step._by_sum else losses * unit
        return None, unit.to(losses.dtype).expand(n).contiguous(), grad_weight, None


class _Gate(torch.autograd.Function):
    """A zero that every layer of a reweighted step depends on: its backward comes after all of theirs."""

    @staticmethod
    def forward(ctx: Any, step: ScoredStep, *parameters: Tensor) -> Tensor:
        ctx.step, ctx.engine = step, step._capture
        ctx.set_materialize_grads(False)
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any) -> Any:
        step: ScoredStep = ctx.step
        if step._run is None:  # a backward that only looks whether samples mix
            return (None,) * (1 + len(step._parameters))
        with torch.autocast(step._capture.leaf.device.type, enabled=False):
            return None, *step._deferred_gradients()
