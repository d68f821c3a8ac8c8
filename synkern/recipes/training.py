"""A training loop for losses that weigh every row; it can stop at any step and go on to the same numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from synkern import fused_cross_entropy
from synkern.recipes.checkpoint import Interrupted, StopSignal, load_state, save_state
from synkern.recipes.models import EncodedText, logits_of
from synkern.recipes.progress import Progress

# seconds between two checkpoints inside an epoch, so that a kill in a long epoch costs little
CHECKPOINT_INTERVAL = 300.0
_EVALUATION_BATCH = 64
# tokens in a batch without optimisation: few calls, and still in the caches
_BATCH_TOKENS = 4096
# rows are sorted by length within this many batches: little padding, and still a random order
_BATCHES_PER_BUCKET = 50

RowLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""logits (n, C), target (n,), row numbers (n,) -> the batch's loss and the weights (n,) that its rows had in it."""


@dataclass(frozen=True)
class FitSettings:
    """How a model is fitted: 003, Appendix F, for transformers models; 000 (SunGen) for the BiLSTM."""

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str
    linear_decay: bool
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclass
class FitState:
    """All of a training that is not in model, optimizer and scheduler.

    ``weight`` and ``probability`` (epochs, N) hold what each row had when it was trained on: its weight in the loss
    and the model's probability of its label; NaN where training has not come to.
    """

    weight: Tensor
    probability: Tensor
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers of the batches of one epoch: shuffled, then sorted by length within buckets of 50 batches.

    The result follows from the arguments alone, so a resumed epoch finds the same batches.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    result: list[np.ndarray] = []
    bucket = batch_size * _BATCHES_PER_BUCKET
    for start in range(0, len(order), bucket):
        rows = order[start : start + bucket]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        result.extend(rows[first : first + batch_size] for first in range(0, len(rows), batch_size))
    return [result[index] for index in generator.permutation(len(result))]


def sorted_batches(lengths: np.ndarray, rows: np.ndarray, tokens: int = _BATCH_TOKENS) -> list[np.ndarray]:
    """The given rows sorted by length, in batches of about ``tokens`` tokens: fewest calls, hardly any padding.

    For passes in which the order does not matter.
    """
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    result, start = [], 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end + 1 - start) * lengths[rows[end]] > tokens:
            result.append(rows[start:end])
            start = end
    return result


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Number of batches of one epoch."""
    return math.ceil(rows / batch_size)


@torch.inference_mode()
def predict_logits(model: nn.Module, data: EncodedText, device: torch.device) -> Tensor:
    """Logits (N, C) of all rows in evaluation mode, on the CPU, in the rows' order."""
    model.eval()
    order = np.argsort(data.lengths, kind="stable")
    logits: list[Tensor] = []
    for start in range(0, len(order), _EVALUATION_BATCH):
        inputs, _ = data.batch(order[start : start + _EVALUATION_BATCH], device)
        logits.append(logits_of(model, inputs).float().cpu())
    result = torch.cat(logits)
    return result[torch.from_numpy(np.argsort(order))]


def log_probability(logits: Tensor, target: Tensor) -> Tensor:
    """log P(y|x) of every row, (N,)."""
    return -fused_cross_entropy(logits.detach(), target, reduction="none")


def classification_metrics(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Accuracy, macro F1 (mean over the classes that occur as label or as prediction) and mean cross entropy."""
    predicted = logits.argmax(1)
    classes = logits.shape[1]
    confusion = torch.bincount(target * classes + predicted, minlength=classes**2).view(classes, classes).double()
    hits, support, guesses = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occurs = (support + guesses) > 0
    f1 = 2 * hits[occurs] / (support + guesses)[occurs]
    return {
        "accuracy": float((predicted == target).double().mean()),
        "macro_f1": float(f1.mean()),
        "loss": float(fused_cross_entropy(logits, target)),
    }


def _describe(record: dict[str, Any]) -> str:
    parts = [f"train loss {record['train_loss']:.4f}"]
    for name, value in record.items():
        if isinstance(value, dict):
            scores = " ".join(f"{key.replace('_', ' ')} {number:.4f}" for key, number in value.items())
            parts.append(f"{name} {scores}")
    return "; ".join(parts)


class Fit:
    """One model fitted on one data set.

    Args:
        model: a fresh model; it is trained in place.
        data: its training rows.
        row_loss: the loss of a batch, given logits, target and the numbers of its rows.
        settings: epochs, batch size and optimizer.
        seed: of batch order and dropout.
        name: shown in the progress bars.
        checkpoint: a .safetensors file to save the state to after every epoch, every five minutes and on a signal;
            where it exists already, training goes on from it.
        evaluate: gives the entries of an epoch's record, after that epoch.
        progress: the bars.
        announce: whether to print a line after every epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        data: EncodedText,
        row_loss: RowLoss,
        settings: FitSettings,
        *,
        seed: int,
        name: str,
        device: torch.device,
        checkpoint: Path | None = None,
        evaluate: Callable[[nn.Module], dict[str, Any]] | None = None,
        progress: Progress | None = None,
        announce: bool = True,
    ) -> None:
        self.announce = announce
        self.model, self.data, self.row_loss, self.settings = model.to(device), data, row_loss, settings
        self.seed, self.name, self.device, self.checkpoint = seed, name, device, checkpoint
        self.evaluate, self.progress = evaluate, progress or Progress(show=False)
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        self.optimizer = kinds[settings.optimizer](
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.steps = steps_per_epoch(len(data), settings.batch_size)
        total = self.steps * settings.epochs
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1.0 - step / total if settings.linear_decay else 1.0
        )
        unknown = torch.full((settings.epochs, len(data)), math.nan, device=device)
        self.state = FitState(weight=unknown, probability=unknown.clone())
        torch.manual_seed(seed)
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)

    def run(self) -> FitState:
        """Train until the last epoch.

        Returns:
            The state, with one entry of ``history`` for every epoch.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived; the state has been saved if there is a checkpoint file.
        """
        with StopSignal() as stop:
            while self.state.epoch < self.settings.epochs:
                self._epoch(stop)
            # a signal that came during the last evaluation, or after it
            if stop.signum is not None:
                raise Interrupted(stop.signum)
        self.progress.end_epoch()
        return self.state

    def _epoch(self, stop: StopSignal) -> None:
        state, started = self.state, time.monotonic()
        saved = started
        order = batches(self.data.lengths, self.settings.batch_size, self.seed, state.epoch)
        self.progress.start_epoch(f"{self.name} epoch {state.epoch + 1}/{self.settings.epochs}", self.steps, state.step)
        self.model.train()
        for rows in order[state.step :]:
            state.loss_sum += self._step(rows)
            state.step += 1
            self.progress.step()
            now = time.monotonic()
            if stop.signum is not None or now - saved > CHECKPOINT_INTERVAL:
                state.seconds += now - started
                started = saved = now
                self._save()
            if stop.signum is not None:
                raise Interrupted(stop.signum)
        self.end_epoch()
        record = {"epoch": state.epoch + 1, "train_loss": state.loss_sum / self.steps}
        if self.evaluate is not None:
            record |= self.evaluate(self.model)
        state.history.append(record)
        if self.announce:
            self.progress.write(f"{self.name} epoch {state.epoch + 1}/{self.settings.epochs}: {_describe(record)}")
        state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
        state.seconds += time.monotonic() - started
        self._save()

    def _step(self, rows: np.ndarray) -> float:
        inputs, target = self.data.batch(rows, self.device)
        index = torch.as_tensor(rows, device=self.device)
        loss, weight, logits = self.update(inputs, target, index)
        self.scheduler.step()
        self.state.weight[self.state.epoch, index] = weight.float()
        self.state.probability[self.state.epoch, index] = log_probability(logits, target).exp().float()
        return loss.item()

    def update(self, inputs: dict[str, Tensor], target: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One optimisation step; methods that need more than a loss of the logits override it.

        Args:
            inputs: of the model, {name: (n, T)}.
            target: labels (n,).
            index: row numbers (n,).

        Returns:
            The loss, the weights (n,) that the rows had in it, and the logits (n, C).
        """
        logits = logits_of(self.model, inputs)
        loss, weight = self.row_loss(logits, target, index)
        self.descend(loss)
        return loss, weight, logits

    def descend(self, loss: Tensor) -> None:
        """Follow the clipped gradient of ``loss`` by one step of the optimizer."""
        self.optimizer.zero_grad()
        loss.backward()
        self.apply_gradients()

    def apply_gradients(self) -> None:
        """One step of the optimizer along the clipped gradients that the parameters hold."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()

    def end_epoch(self) -> None:
        """Called after the last step of every epoch, before the evaluation; methods override it."""

    def extra_state(self) -> dict[str, Any]:
        """What a method keeps beside model and optimizer, for the checkpoint."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`extra_state` gave."""

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        save_state(
            self.checkpoint,
            {
                "state": vars(self.state),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": cuda,
                "extra": self.extra_state(),
            },
        )

    def _restore(self, checkpoint: Path) -> None:
        saved = load_state(checkpoint)
        self.state = FitState(**saved["state"])
        self.state.weight = self.state.weight.to(self.device)
        self.state.probability = self.state.probability.to(self.device)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.load_extra_state(saved["extra"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
        self.progress.skip(self.state.epoch * self.steps + self.state.step)
