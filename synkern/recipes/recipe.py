"""What a method of ``synkern reweight`` is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from synkern.recipes.importance import unweighted
from synkern.recipes.models import EncodedText, ModelFamily
from synkern.recipes.progress import Progress
from synkern.recipes.settings import ReweightSettings
from synkern.recipes.training import Fit, FitState, RowLoss


@dataclass(frozen=True)
class Outcome:
    """One method with one seed.

    ``history`` has a record for each epoch of the final training; ``weight`` (N,) says how far each training row is
    trusted (greater: more), None where the method has no opinion; ``recorded`` and ``trace`` (R, N) are earlier
    weights, by iteration or epoch; ``iterations`` has a record for each iteration of SunGen; ``probability``
    (epochs, N) is the model's probability of each row's label when it was trained on; ``model`` is None once saved.
    """

    history: list[dict[str, Any]]
    model: nn.Module | None
    seconds: dict[str, float]
    probability: Tensor
    weight: Tensor | None = None
    recorded: list[int] | None = None
    trace: Tensor | None = None
    iterations: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Task:
    """One seed of one method: the data, fresh models, and a way to fit them.

    ``outer`` is the sample that meta-gradients look at: ``outer_rows`` of the training rows, or, where that is None,
    the trusted rows. ``wrong`` (N,) says which labels are wrong, for reports alone; None where nobody knows.
    """

    name: str
    seed: int
    settings: ReweightSettings
    family: ModelFamily
    train: EncodedText
    outer: EncodedText
    outer_rows: np.ndarray | None
    wrong: np.ndarray | None
    device: torch.device
    progress: Progress
    checkpoint: Callable[[str], Path]
    evaluate: Callable[[nn.Module], dict[str, Any]]
    outcome_of: Callable[[str], Outcome]

    def build(self) -> nn.Module:
        """A fresh model; the same for every method."""
        return self.family.build(self.seed)

    def fit(
        self,
        row_loss: RowLoss = unweighted,
        *,
        kind: Callable[..., Fit] = Fit,
        model: nn.Module | None = None,
        data: EncodedText | None = None,
        **options: Any,
    ) -> tuple[nn.Module, FitState]:
        """The final training: a fresh model, tested after every epoch, saved at every step from which it can go on.

        Args:
            row_loss: the loss of a batch.
            kind: :class:`Fit` or a method's own kind of it.
            model: instead of the usual one.
            data: instead of all training rows.
            options: of ``kind``.
        """
        epochs = self.settings.epochs
        assert epochs is not None
        fit = kind(
            self.build() if model is None else model,
            self.train if data is None else data,
            row_loss,
            self.settings.fit(epochs),
            seed=self.seed,
            name=self.name,
            device=self.device,
            checkpoint=self.checkpoint("fit"),
            evaluate=self.evaluate,
            progress=self.progress,
            **options,
        )
        state = fit.run()
        return fit.model, state


def final_outcome(model: nn.Module, state: FitState, weight: Tensor | None = None, **more: Any) -> Outcome:
    """The outcome of a method whose only training is the final one; further fields as they are given."""
    seconds = {"training": state.seconds, **more.pop("seconds", {})}
    return Outcome(state.history, model, seconds, state.probability.cpu(), weight, **more)
