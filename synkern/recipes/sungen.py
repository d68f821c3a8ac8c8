"""SunGen: sample weights from the training rows alone, by a robust outer loss (Algorithm 1 of 000).

000 is "Self-Guided Noise-Free Data Generation for Efficient Zero-Shot Learning" (Gao et al., ICLR 2023). A million
training rows there are tens of thousands here: ``ReweightSettings`` says what is scaled, and how.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from synkern import fused_cross_entropy, fused_gce_loss, fused_mae_loss, fused_rce_loss
from synkern.meta import SampleWeights, outer_direction, sample_scores, scored_step
from synkern.recipes.checkpoint import Interrupted, StopSignal, load_state, save_state
from synkern.recipes.detection import area_under_roc
from synkern.recipes.models import EncodedText, logits_of
from synkern.recipes.recipe import Outcome, Task, final_outcome
from synkern.recipes.settings import ReweightSettings
from synkern.recipes.training import Fit, RowLoss, sorted_batches, steps_per_epoch

OUTER = {"rce": fused_rce_loss, "mae": fused_mae_loss, "gce": fused_gce_loss, "ce": fused_cross_entropy}
# beside them, iterations 0, 5 and 10 of 000's Figure 3 and the last one
_RECORD_EVERY = 10
_FIRST_RECORDS = (0, 5, 10)
_GRADIENT_NORM = 3.0
Batch = tuple[dict[str, Tensor], Tensor]


def cross_entropies(model: nn.Module, batch: Batch) -> Tensor:
    """The inner loss of every row, (n,)."""
    inputs, target = batch
    return fused_cross_entropy(logits_of(model, inputs), target, reduction="none")


def weighted_cross_entropy(weight: Tensor) -> RowLoss:
    """mean(w_i CE_i) over the batch (000 Eq. 2), with a table (N,) of fixed weights."""

    def row_loss(logits: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = weight[rows]
        return fused_cross_entropy(logits, target, sample_weight=chosen), chosen

    return row_loss


def around_class_means(scores: Tensor, target: Tensor) -> Tensor:
    """Scores (N,) less the mean score of the row's class."""
    count = torch.bincount(target).clamp_min(1)
    mean = torch.zeros(len(count), device=scores.device, dtype=scores.dtype).index_add_(0, target, scores) / count
    return scores - mean[target]


def is_recorded(iteration: int, last: int) -> bool:
    """Whether the weights after this iteration are kept."""
    return iteration in _FIRST_RECORDS or iteration % _RECORD_EVERY == 0 or iteration == last


@dataclass
class Trace:
    """What the iterations left: the weights at the recorded ones, a record for each, seconds in its two parts."""

    recorded: list[int] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"inner": 0.0, "outer": 0.0})

    def keep(self, iteration: int, weight: Tensor, last: int) -> None:
        """Keep the weights after an iteration if it is one of those recorded."""
        if is_recorded(iteration, last):
            self.recorded.append(iteration)
            self.weights.append(weight.cpu().clone())


class ScoredFit(Fit):
    """Weighted cross entropy; in the last epoch, the rows' scores out of the same forward and backward passes.

    Args:
        weight: (N,) weights.
        direction: v.

    Attributes:
        scores: (N,), of the unweighted losses.
    """

    def __init__(
        self, model: nn.Module, data: EncodedText, *arguments: Any, weight: Tensor, direction: dict[str, Tensor],
        **options: Any,
    ) -> None:  # fmt: skip
        self.weight, self.direction = weight, direction
        self.scores = torch.zeros_like(weight)
        super().__init__(model, data, weighted_cross_entropy(weight), *arguments, **options)

    def update(self, inputs: dict[str, Tensor], target: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.state.epoch + 1 < self.settings.epochs:
            return super().update(inputs, target, index)
        weight = self.weight[index]
        with scored_step(self.model, self.direction) as step:
            logits = logits_of(self.model, inputs)
            loss = step.reduce(fused_cross_entropy(logits, target, reduction="none"), sample_weight=weight)
            self.optimizer.zero_grad()
            loss.backward()
        self.apply_gradients()
        self.scores[index] = step.scores
        return loss.detach(), weight, logits.detach()


class SunGen:
    """The bilevel loop of one seed.

    Each iteration (Algorithm 1, lines 3 to 5) trains a task model on mean(w_i CE_i), takes v, the gradient of the
    summed outer losses of a fixed random sample of the training rows (or of the trusted rows), and steps the weights
    along s_i = <v, grad CE_i> of all rows: weights rise where a row's gradient agrees with v. The step is Adam's on
    theta, w = sigmoid(theta / temperature) from w = 0.5, with cosine decay and the gradient's norm clipped at 3, as in
    the released code.

    With ``score_in_training`` the scores come out of the training steps themselves instead of a pass over all rows:
    along the v of the iteration before, at the parameters of the row's own step in the last epoch. (The first iteration
    has no v before it, and scores as usual; fresh parameters would have nothing to do with that v.)

    Three things differ on small data; ``restart="same"``, ``paper_scale`` and no ``class_balance`` give the original:

    - The released code restarts the task model from the same parameters every time, so that its slant comes back with
      every step. Fresh ones average it out.
    - Released, the meta-gradient has the factor eta / D of one plain inner step, and Adam's epsilon is 1e-8. On few
      rows the entries fall under epsilon; above it Adam's first steps are all as long as its rate, so that a few dozen
      iterations add up little but signs. Here s is divided by its mean magnitude, and epsilon is 3 / sqrt(N), the
      usual size of an entry once the norm is clipped: steps grow with the scores and end at the rate.
    - A task model of few steps leans to one class, and v then mainly says so: all rows of one class rise. With
      ``class_balance`` each class's scores are taken from their mean, so that they sum to 0.
    """

    def __init__(self, task: Task) -> None:
        settings = task.settings
        self.task, self.settings = task, settings
        self.rows = len(task.train)
        self.inner = settings.inner(self.rows)
        self.checkpoint = task.checkpoint("weights")
        self.initial = task.build().to(task.device)
        self.model = copy.deepcopy(self.initial)
        self.weights = SampleWeights(
            self.rows, init=0.5, parametrization=settings.parametrization, temperature=settings.temperature
        ).to(task.device)
        epsilon = 1e-8 if settings.paper_scale else _GRADIENT_NORM / self.rows**0.5
        self.optimizer = torch.optim.Adam(self.weights.parameters(), lr=settings.outer_learning_rate, eps=epsilon)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, settings.iterations))
        lengths = task.train.lengths
        self.score_batches = sorted_batches(lengths, np.arange(self.rows))
        self.direction: dict[str, Tensor] | None = None
        self.trace = Trace()
        self.trace.keep(0, self.weight, settings.iterations)
        if self.checkpoint.exists():
            self._restore()

    @property
    def weight(self) -> Tensor:
        """The weights (N,) as they are now."""
        return self.weights().detach()

    def run(self) -> tuple[SampleWeights, Trace]:
        """All iterations.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived; the iterations before this one are saved.
        """
        with StopSignal() as stop:
            while len(self.trace.records) < self.settings.iterations:
                self._iteration(stop)
        return self.weights, self.trace

    def _iteration(self, stop: StopSignal) -> None:
        number = len(self.trace.records) + 1
        name = f"{self.task.name} iteration {number}/{self.settings.iterations}"
        started = time.monotonic()
        scores = self._train(name, number)
        trained = time.monotonic()
        self._evaluation_mode()
        direction, outer_loss = self._outer_direction()
        if scores is None:
            scores = self._scores(direction, stop)
        if self.settings.score_in_training:
            self.direction = direction
        self._step(scores)
        mean_weight = float(self.weight.mean())
        record: dict[str, Any] = {"iteration": number, "outer_loss": outer_loss, "mean_weight": mean_weight}
        self.trace.seconds["inner"] += trained - started
        self.trace.seconds["outer"] += time.monotonic() - trained
        if self.task.wrong is not None:
            record["auroc"] = area_under_roc(self.weight.cpu().numpy(), self.task.wrong)
        if number % self.settings.test_every == 0 or number == self.settings.iterations:
            record |= self.task.evaluate(self.model)
        self.trace.records.append(record)
        self.trace.keep(number, self.weight, self.settings.iterations)
        self._save()
        self.task.progress.write(f"{name}: {_describe(record)}")

    def _train(self, name: str, number: int) -> Tensor | None:
        """Line 3: one epoch (or a few) of weighted cross entropy; with scores if there is a direction for them."""
        # another order of the batches in every iteration
        seed = self.task.seed * 1_000_003 + number
        self.model = self._start(seed)
        options: dict[str, Any] = {
            "seed": seed,
            "name": name,
            "device": self.task.device,
            "progress": self.task.progress,
            "announce": False,
        }
        if self.direction is None:
            Fit(self.model, self.task.train, weighted_cross_entropy(self.weight), self.inner, **options).run()
            return None
        fit = ScoredFit(
            self.model, self.task.train, self.inner, weight=self.weight, direction=self.direction, **options
        )
        fit.run()
        return fit.scores

    def _start(self, seed: int) -> nn.Module:
        # always a new module: what `difference` remembers of one must not tell a resumed run from an undisturbed one
        if self.settings.restart == "fresh":
            return self.task.family.build(seed).to(self.task.device)
        return copy.deepcopy(self.model if self.settings.restart == "continue" else self.initial)

    def _evaluation_mode(self) -> None:
        """Scores without dropout; recurrent layers stay as they are, since cuDNN has no backward pass in eval mode."""
        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, nn.RNNBase):
                module.train()

    def _outer_direction(self) -> tuple[dict[str, Tensor], float]:
        """Line 4, first half: v, the gradient of the summed outer losses, and their mean."""
        task, total = self.task, 0.0
        rows = self._outer_rows()
        batches = [task.outer.batch(part, task.device) for part in sorted_batches(task.outer.lengths, rows)]

        def outer_loss(model: nn.Module, batch: Batch) -> Tensor:
            nonlocal total
            inputs, target = batch
            loss = OUTER[self.settings.outer_loss](logits_of(model, inputs), target, reduction="sum")
            total += float(loss.detach())
            return loss

        return outer_direction(self.model, batches, outer_loss), total / len(rows)

    def _outer_rows(self) -> np.ndarray:
        """Rows of the outer sample that count: all, or those of its greatest weights (the ``outer_top`` share)."""
        rows = np.arange(len(self.task.outer))
        if self.settings.outer_top == 1 or self.task.outer_rows is None:
            return rows
        weight = self.weight.cpu().numpy()[self.task.outer_rows]
        return rows[weight >= np.quantile(weight, 1 - self.settings.outer_top)]

    def _scores(self, direction: dict[str, Tensor], stop: StopSignal) -> Tensor:
        """Line 4, second half: s_i = <v, grad CE_i> of every training row, (N,)."""
        task = self.task
        scores = torch.empty(self.rows, device=task.device)
        for rows in self.score_batches:
            if stop.signum is not None:
                raise Interrupted(stop.signum)
            batch = task.train.batch(rows, task.device)
            index = torch.as_tensor(rows, device=task.device)
            scores[index] = sample_scores(
                self.model, cross_entropies, batch, direction, method=self.settings.score_method
            )
        return scores

    def _step(self, scores: Tensor) -> None:
        """Line 5: one step of the weights."""
        options: dict[str, Any] = {"normalizer": 1, "scale": "mean"}
        if self.settings.paper_scale:
            options = {"normalizer": self.inner.batch_size, "learning_rate_inner": self.inner.learning_rate}
        if self.settings.class_balance:
            scores = around_class_means(scores, self.task.train.target.to(scores.device))
        self.optimizer.zero_grad()
        index = torch.arange(self.rows, device=scores.device)
        self.weights.apply_scores(index, scores, clip_norm=_GRADIENT_NORM, **options)
        self.optimizer.step()
        self.scheduler.step()
        self.weights.project_()

    def _save(self) -> None:
        model = self.model.state_dict() if self.settings.restart == "continue" else None
        save_state(
            self.checkpoint,
            {
                "trace": vars(self.trace),
                "weights": self.weights.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "model": model,
                "direction": self.direction,
            },
        )

    def _restore(self) -> None:
        saved = load_state(self.checkpoint)
        self.trace = Trace(**saved["trace"])
        self.weights.load_state_dict(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        if saved["model"] is not None:
            self.model.load_state_dict(saved["model"])
        if saved["direction"] is not None:
            self.direction = {name: value.to(self.task.device) for name, value in saved["direction"].items()}
        steps = self.inner.epochs * steps_per_epoch(self.rows, self.inner.batch_size)
        self.task.progress.skip(len(self.trace.records) * steps)


def sungen(task: Task) -> Outcome:
    """Algorithm 1, then a model of the subset drawn by its weights, or of all rows with them (no ``train_on_subset``).

    Row i is in the subset with probability w'_i, the weights scaled to sum to ``budget`` (000 section 3). On all rows
    the model learns those of small weight too, only later: benchmarks/results/reweight.
    """
    weights, trace = SunGen(task).run()
    weight = weights().detach()
    if task.settings.train_on_subset:
        model, state = task.fit(data=task.train.take(draw_subset(weights, task.settings, task.seed)))
    else:
        model, state = task.fit(weighted_cross_entropy(weight))
    return final_outcome(
        model,
        state,
        weight.cpu(),
        recorded=trace.recorded,
        trace=torch.stack(trace.weights),
        iterations=trace.records,
        seconds=trace.seconds,
    )


def draw_subset(weights: SampleWeights, settings: ReweightSettings, seed: int) -> np.ndarray:
    """Row numbers of a subset of about ``budget`` rows."""
    generator = torch.Generator().manual_seed(seed)
    return weights.sample_subset(settings.budget_rows(len(weights)), generator).numpy()


def _describe(record: dict[str, Any]) -> str:
    parts = [f"outer loss {record['outer_loss']:.4f}", f"mean weight {record['mean_weight']:.3f}"]
    if record.get("auroc") is not None:
        parts.append(f"AUROC of wrong labels {record['auroc']:.3f}")
    if "test" in record:
        parts.append(f"test accuracy {record['test']['accuracy']:.4f}")
    return ", ".join(parts)
