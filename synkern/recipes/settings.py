"""Everything that decides the numbers of ``synkern train``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synkern.recipes.errors import RecipeError
from synkern.recipes.models import BILSTM
from synkern.recipes.training import FitSettings

KEEP_MODELS = ("first", "all", "none")
# of an output folder, these may change when it is resumed: they add runs, and alter none
MAY_GROW = ("methods", "seeds", "keep_models")


@dataclass(frozen=True)
class TrainSettings:
    """Options of ``synkern train``; None stands for the model's own default, see :meth:`resolved`."""

    train: str
    real: str
    test: str
    out: str
    methods: tuple[str, ...] = ("dimp",)
    seeds: int = 3
    model: str = BILSTM
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str = "label"
    true_label_column: str = "true_label"
    labels: str | None = None
    skip_bad_rows: bool = False
    limit_train: int | None = None
    limit_real: int | None = None
    limit_test: int | None = None
    noise: bool = False
    noise_seed: int = 0
    epochs: int = 5
    checker_epochs: int = 5
    batch_size: int = 32
    learning_rate: float | None = None
    max_length: int = 128
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    gamma: float = 2.0
    max_weight: float | None = None
    device: str = "auto"
    threads: int | None = None
    keep_models: str = "first"

    def __post_init__(self) -> None:
        _check_settings(self)

    def resolved(self) -> TrainSettings:
        """The same settings without None or "auto": what is left to the machine or the model is filled in.

        Raises:
            RecipeError: the device cannot be had.
        """
        import torch

        scratch = self.model == BILSTM
        learning_rate = self.learning_rate
        if learning_rate is None:
            learning_rate = 1e-3 if scratch else 6e-5
        return dataclasses.replace(
            self,
            learning_rate=learning_rate,
            device=_device(self.device),
            threads=self.threads or torch.get_num_threads(),
        )

    def fit(self, epochs: int) -> FitSettings:
        """How one model is fitted, in ``epochs`` epochs; the settings must be resolved."""
        assert self.learning_rate is not None
        scratch = self.model == BILSTM
        return FitSettings(
            epochs=epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            clip_norm=self.clip_norm,
            weight_decay=self.weight_decay,
            optimizer="adam" if scratch else "adamw",
            linear_decay=not scratch,
        )

    def to_json(self) -> dict[str, Any]:
        """As a dictionary that JSON can hold."""
        return {**dataclasses.asdict(self), "methods": list(self.methods)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrainSettings:
        """The inverse of :meth:`to_json`."""
        return cls(**{**value, "methods": tuple(value["methods"])})

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out)


def parse_methods(value: str) -> tuple[str, ...]:
    """Methods from a list separated by commas; "all" stands for every method.

    Raises:
        RecipeError: an unknown method.
    """
    from synkern.recipes.importance import METHODS

    names = [name.strip().lower() for name in value.split(",")]
    if "all" in names:
        return tuple(METHODS)
    for name in names:
        if name not in METHODS:
            raise RecipeError(
                f"--method: expected one or more of {', '.join(METHODS)} (separated by commas) or all, got {name!r}"
            )
    return tuple(dict.fromkeys(names))


def _device(name: str) -> str:
    import torch

    gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if gpu else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not gpu):
        raise RecipeError(
            f"--device: expected auto, cpu or, where torch finds a GPU, cuda, got {name!r}; torch "
            f"{torch.__version__} finds {'one' if gpu else 'none'} here"
        )
    return name


def _check_settings(settings: TrainSettings) -> None:
    for name in (
        "seeds",
        "epochs",
        "checker_epochs",
        "batch_size",
        "max_length",
        "threads",
        "limit_train",
        "limit_real",
        "limit_test",
    ):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise RecipeError(f"--{name.replace('_', '-')}: expected a whole number from 1, got {value}")
    for name in ("learning_rate", "clip_norm", "max_weight"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise RecipeError(f"--{name.replace('_', '-')}: expected a number above 0, got {value}")
    for name in ("gamma", "weight_decay"):
        value = getattr(settings, name)
        if not value >= 0:
            raise RecipeError(f"--{name.replace('_', '-')}: expected a number from 0, got {value}")
    if settings.keep_models not in KEEP_MODELS:
        raise RecipeError(f"--keep-models: expected one of {', '.join(KEEP_MODELS)}, got {settings.keep_models!r}")
    if settings.text_pair_column is not None and settings.text_column is None:
        raise RecipeError("--text-pair-column: expected --text-column as well, got none; name both columns")
