"""The methods that 000 compares SunGen with (Tables 3, 7, 8, 11), and two relatives of it, each a short recipe.

Where a method asks for a small clean set ("meta" or "validation" rows), it gets what SunGen gets, as in 000: another
sample of the same training rows, or the trusted rows of ``--real`` if there are any. Its outer loss is cross entropy,
as in the method's own paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from synkern import fused_cross_entropy, fused_rce_loss
from synkern.meta import outer_direction, scored_step
from synkern.recipes.models import EncodedText, logits_of
from synkern.recipes.recipe import Outcome, Task, final_outcome
from synkern.recipes.training import Fit

# Meta-Weight-Net: one hidden layer of 100 units, Adam's usual rate
_HIDDEN_UNITS, _NET_RATE = 100, 1e-3
# Hu et al.: what a row's weight is divided by at each visit, and the least weight
_FADING, _LEAST_WEIGHT = 10.0, 1e-5
# co-teaching: epochs until the full share is dropped
_RAMP_EPOCHS = 10
# temporal ensembling: momentum of the mean prediction, greatest factor of the consistency term, steepness of its ramp
_MOMENTUM, _CONSISTENCY, _RAMP = 0.6, 30.0, 5.0


def outer_cross_entropy(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    """Mean cross entropy of an outer batch."""
    inputs, target = batch
    return fused_cross_entropy(logits_of(model, inputs), target)


def zerogen(task: Task) -> Outcome:
    """Cross entropy on all rows: ZeroGen, and the plain training that everything is compared with."""
    return final_outcome(*task.fit())


def label_smoothing(task: Task) -> Outcome:
    """Cross entropy with smoothed targets (000 Table 8)."""
    smoothing = task.settings.label_smoothing

    def row_loss(logits: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        loss = fused_cross_entropy(logits, target, label_smoothing=smoothing)
        return loss, torch.ones(len(rows), device=logits.device)

    return final_outcome(*task.fit(row_loss))


def one_level_rce(task: Task) -> Outcome:
    """Reverse cross entropy trains the model itself; no weights (000 Table 11)."""

    def row_loss(logits: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return fused_rce_loss(logits, target), torch.ones(len(rows), device=logits.device)

    return final_outcome(*task.fit(row_loss))


def confidence(task: Task) -> Outcome:
    """Rows of the highest mean probability of their label over the epochs of plain training; cross entropy on them.

    As many rows as ``budget`` says. Source: 000 Table 3, after Swayamdipta et al., 2020.
    """
    mean = task.outcome_of("zerogen").probability.mean(0)
    kept = mean.argsort(descending=True, stable=True)[: task.settings.budget_rows(len(mean))]
    model, state = task.fit(data=task.train.take(kept.sort().values.numpy()))
    return final_outcome(model, state, mean)


class OuterFit(Fit):
    """A training whose every step looks at an outer batch.

    Args:
        outer: the outer rows.
    """

    def __init__(self, *arguments: Any, outer: EncodedText, **options: Any) -> None:
        self.outer = outer
        super().__init__(*arguments, **options)

    def outer_direction_of(self, model: nn.Module) -> dict[str, Tensor]:
        """v, the gradient of a random outer batch's mean cross entropy at the parameters of ``model``.

        The batch follows from seed, epoch and step alone, so that a resumed training finds it again.
        """
        generator = np.random.default_rng([self.seed, self.state.epoch, self.state.step])
        size = min(self.settings.batch_size, len(self.outer))
        rows = generator.choice(len(self.outer), size=size, replace=False)
        return outer_direction(model, [self.outer.batch(rows, self.device)], outer_cross_entropy)

    def reweighted(
        self,
        inputs: dict[str, Tensor],
        target: Tensor,
        direction: dict[str, Tensor],
        weigh: Callable[[Tensor, Tensor], Tensor],
        reduction: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step on sum or mean of w_i CE_i, the weights made from this very batch's scores.

        Args:
            inputs: of the model.
            target: labels (n,).
            direction: v of the scores s_i = <v, grad CE_i>.
            weigh: scores (n,) and losses (n,) -> weights (n,).
            reduction: "sum" or "mean".

        Returns:
            What :meth:`Fit.update` does.
        """
        losses = torch.empty(0)
        with scored_step(self.model, direction, reweight=lambda scores: weigh(scores, losses.detach())) as step:
            logits = logits_of(self.model, inputs)
            losses = fused_cross_entropy(logits, target, reduction="none")
            self.optimizer.zero_grad()
            step.reduce(losses, reduction=reduction).backward()
        self.apply_gradients()
        loss = (step.weights * losses.detach()).sum()
        return loss / len(losses) if reduction == "mean" else loss, step.weights, logits.detach()


def share_of_sum(weight: Tensor) -> Tensor:
    """The weights divided by their sum; all zero if none is above zero."""
    return weight / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)


class L2RW(OuterFit):
    """w_i = max(s_i, 0) / sum_j max(s_j, 0), from the parameters the step starts at.

    Source: Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018.
    """

    def update(self, inputs: dict[str, Tensor], target: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        direction = self.outer_direction_of(self.model)
        return self.reweighted(
            inputs, target, direction, lambda scores, losses: share_of_sum(scores.clamp_min(0)), "sum"
        )


class VirtualStep(OuterFit):
    """A training that looks at the outer loss one step ahead, on a copy of the model."""

    _ahead: nn.Module | None = None

    def ahead(self, changes: Iterable[Tensor]) -> nn.Module:
        """The copy, at the model's parameters plus ``changes``."""
        if self._ahead is None:
            self._ahead = copy.deepcopy(self.model)
        with torch.no_grad():
            for copied, parameter, change in zip(
                self._ahead.parameters(), self.model.parameters(), changes, strict=True
            ):
                torch.add(parameter, change, out=copied)
        return self._ahead

    def weighted_gradients(self, inputs: dict[str, Tensor], target: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """Gradients of sum_i w_i CE_i, one for each parameter."""
        loss = fused_cross_entropy(logits_of(self.model, inputs), target, sample_weight=weight, reduction="sum")
        return torch.autograd.grad(loss, list(self.model.parameters()))


class MetaWeightNet(VirtualStep):
    """w_i = MLP(CE_i), the small network 1-100-1 trained so that the step with its weights lowers the outer loss.

    With theta' = theta - (eta / n) sum_i w_i grad CE_i, a plain gradient step of the task model's rate eta, the network
    descends along sum_i -(eta / n) <grad L_outer(theta'), grad CE_i> grad MLP(CE_i); then the model takes its step with
    the new weights.

    Source: Shu et al., "Meta-Weight-Net", NeurIPS 2019.
    """

    def __init__(self, *arguments: Any, seed: int, device: torch.device, **options: Any) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(1, _HIDDEN_UNITS), nn.ReLU(), nn.Linear(_HIDDEN_UNITS, 1), nn.Sigmoid()
        ).to(device)
        self.net_optimizer = torch.optim.Adam(self.net.parameters(), lr=_NET_RATE)
        super().__init__(*arguments, seed=seed, device=device, **options)

    def update(self, inputs: dict[str, Tensor], target: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rate = self.settings.learning_rate / len(target)
        with torch.no_grad():
            losses = fused_cross_entropy(logits_of(self.model, inputs), target, reduction="none")
            weight = self._weigh(losses)
        gradients = self.weighted_gradients(inputs, target, weight)
        direction = self.outer_direction_of(self.ahead(-rate * gradient for gradient in gradients))

        def learn_and_weigh(scores: Tensor, losses: Tensor) -> Tensor:
            with torch.enable_grad():
                surrogate = -rate * (scores * self._weigh(losses)).sum()
            self.net_optimizer.zero_grad()
            surrogate.backward()
            self.net_optimizer.step()
            with torch.no_grad():
                return self._weigh(losses)

        return self.reweighted(inputs, target, direction, learn_and_weigh, "mean")

    def _weigh(self, losses: Tensor) -> Tensor:
        return self.net(losses.unsqueeze(1)).squeeze(1)

    def extra_state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "net_optimizer": self.net_optimizer.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.net_optimizer.load_state_dict(state["net_optimizer"])


class Hu2019(VirtualStep):
    """w_i <- max(w_i / 10 - d L_outer(theta + sum_j w_j delta_j) / d w_i, 1e-5), divided by the batch's sum.

    delta_i is the change that Adam would make for row i alone, -eta m_i / sqrt(v), with m_i = beta1 m + (1 - beta1)
    grad CE_i. Here v is Adam's second moment before the step: the row's own square would enter it with weight 0.001
    only, and without it the derivative is -eta <u, m_i>, u = grad L_outer / sqrt(v): one score along u. As in the
    released code, weights start at 0, and the first step, before Adam has any moments, weighs all rows alike.

    Source: Hu et al., "Learning Data Manipulation for Augmentation and Weighting", NeurIPS 2019.
    """

    def __init__(self, model: nn.Module, data: EncodedText, *arguments: Any, device: torch.device,
                 **options: Any) -> None:  # fmt: skip
        self.table = torch.zeros(len(data), device=device)
        super().__init__(model, data, *arguments, device=device, **options)

    def update(self, inputs: dict[str, Tensor], target: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.optimizer.state:
            return super(OuterFit, self).update(inputs, target, index)
        beta, scale = self.optimizer.param_groups[0]["betas"][0], self._scale()
        moments = [self.optimizer.state[parameter]["exp_avg"] for parameter in self.model.parameters()]
        weight = self.table[index]
        gradients = self.weighted_gradients(inputs, target, weight)
        total = weight.sum()
        changes = (
            -factor * (beta * total * moment + (1 - beta) * gradient)
            for factor, moment, gradient in zip(scale, moments, gradients, strict=True)
        )
        outer = self.outer_direction_of(self.ahead(changes))
        direction = {name: value * factor for (name, value), factor in zip(outer.items(), scale, strict=True)}
        common = sum((u * moment).sum() for u, moment in zip(direction.values(), moments, strict=True))

        def weigh(scores: Tensor, losses: Tensor) -> Tensor:
            derivative = -(beta * common + (1 - beta) * scores)
            self.table[index] = (weight / _FADING - derivative).clamp_min(_LEAST_WEIGHT)
            return share_of_sum(self.table[index])

        return self.reweighted(inputs, target, direction, weigh, "sum")

    def _scale(self) -> list[Tensor]:
        """eta / ((1 - beta1^t) (sqrt(v / (1 - beta2^t)) + epsilon)) of every entry of every parameter."""
        group = self.optimizer.param_groups[0]
        result = []
        for parameter in self.model.parameters():
            state = self.optimizer.state[parameter]
            first, second = (1 - beta ** float(state["step"]) for beta in group["betas"])
            result.append(group["lr"] / first / ((state["exp_avg_sq"] / second).sqrt() + group["eps"]))
        return result

    def extra_state(self) -> dict[str, Any]:
        return {"table": self.table}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.table.copy_(state["table"])


class TwoModels(nn.Module):
    """Two models of different seeds; predictions are those of the first."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits (N, C) of the first model."""
        return logits_of(self.first, inputs)


class CoTeaching(Fit):
    """Each of two models learns from the rows whose loss is small for the other one.

    In epoch t (from 0) a share ``noise_rate * min(t / 10, 1)`` of the batch is left out; the loss is the mean over the
    rows kept. A row's weight is 1, 1/2 or 0: the share of the models that learned from it.

    Args:
        noise_rate: share of wrong labels, which the method needs to be told.

    Source: Han et al., "Co-teaching", NeurIPS 2018.
    """

    def __init__(self, model: TwoModels, *arguments: Any, noise_rate: float, **options: Any) -> None:
        self.noise_rate = noise_rate
        self.models = (model.first, model.second)
        super().__init__(model, *arguments, **options)

    def update(self, inputs: dict[str, Tensor], target: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dropped = self.noise_rate * min(self.state.epoch / _RAMP_EPOCHS, 1.0)
        kept = max(1, round((1 - dropped) * len(target)))
        logits = [logits_of(model, inputs) for model in self.models]
        losses = [fused_cross_entropy(z, target, reduction="none") for z in logits]
        small = [loss.detach().argsort(stable=True)[:kept] for loss in losses]
        loss = losses[0][small[1]].mean() + losses[1][small[0]].mean()
        self.descend(loss)
        weight = torch.zeros(len(target), device=loss.device)
        for rows in small:
            weight[rows] += 0.5
        return loss / 2, weight, logits[0]

    def apply_gradients(self) -> None:
        for model in self.models:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.settings.clip_norm)
        self.optimizer.step()


class TemporalEnsembling(Fit):
    """CE plus r(t) mean (p - z)^2, z the running mean of the row's earlier predictions p.

    After each epoch Z = 0.6 Z + 0.4 p; z = Z / (1 - 0.6^t) after t epochs. r(t) = 30 exp(-5 (1 - t / T)^2) in epoch t
    of 0 .. T, zero in the first.

    Source: Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017; 000 Table 8.
    """

    def __init__(self, model: nn.Module, data: EncodedText, *arguments: Any, classes: int, device: torch.device,
                 **options: Any) -> None:  # fmt: skip
        self.mean = torch.zeros(len(data), classes, device=device)
        self.now = torch.zeros_like(self.mean)
        super().__init__(model, data, *arguments, device=device, **options)

    def update(self, inputs: dict[str, Tensor], target: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        epoch, last = self.state.epoch, self.settings.epochs - 1
        logits = logits_of(self.model, inputs)
        probability = logits.softmax(1)
        loss = fused_cross_entropy(logits, target)
        if epoch:
            factor = _CONSISTENCY * math.exp(-_RAMP * (1 - epoch / last) ** 2)
            earlier = self.mean[index] / (1 - _MOMENTUM**epoch)
            loss = loss + factor * (probability - earlier).square().mean()
        self.descend(loss)
        self.now[index] = probability.detach()
        return loss, torch.ones(len(target), device=loss.device), logits

    def end_epoch(self) -> None:
        self.mean.mul_(_MOMENTUM).add_(self.now, alpha=1 - _MOMENTUM)

    def extra_state(self) -> dict[str, Any]:
        return {"mean": self.mean, "now": self.now}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.mean.copy_(state["mean"])
        self.now.copy_(state["now"])


def _weighing(kind: Callable[..., Fit]) -> Callable[[Task], Outcome]:
    """A method that weighs rows with the outer sample; a row's weight is its mean over the epochs."""

    def method(task: Task) -> Outcome:
        model, state = task.fit(kind=kind, outer=task.outer)
        return _with_epoch_weights(model, state)

    return method


def _with_epoch_weights(model: nn.Module, state: Any) -> Outcome:
    epochs = list(range(1, len(state.weight) + 1))
    trace = state.weight.cpu()
    return final_outcome(model, state, trace.mean(0), recorded=epochs, trace=trace)


def co_teaching(task: Task) -> Outcome:
    """Co-teaching with ``noise_rate``; the first model is the result."""
    # any other seed than those of the runs would do
    pair = TwoModels(task.build(), task.family.build(task.seed + 1_000_003))
    model, state = task.fit(kind=CoTeaching, model=pair, noise_rate=task.settings.noise_rate)
    assert isinstance(model, TwoModels)
    return _with_epoch_weights(model.first, state)


def temporal_ensembling(task: Task) -> Outcome:
    """Temporal ensembling on all rows."""
    return final_outcome(*task.fit(kind=TemporalEnsembling, classes=len(task.family.labels.names)))


RIVALS: dict[str, Callable[[Task], Outcome]] = {
    "zerogen": zerogen,
    "l2rw": _weighing(L2RW),
    "meta-weight-net": _weighing(MetaWeightNet),
    "hu2019": _weighing(Hu2019),
    "confidence": confidence,
    "co-teaching": co_teaching,
    "label-smoothing": label_smoothing,
    "temporal-ensembling": temporal_ensembling,
    "one-level-rce": one_level_rce,
}
