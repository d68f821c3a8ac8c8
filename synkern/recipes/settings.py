"""Everything that decides the numbers of ``synkern train`` and ``synkern reweight``."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from synkern.recipes.errors import RecipeError
from synkern.recipes.models import BILSTM
from synkern.recipes.training import FitSettings

KEEP_MODELS = ("first", "all", "none")
# of an output folder, these may change when it is resumed: they add runs, and alter none
MAY_GROW = ("methods", "seeds", "keep_models")
OUTER_LOSSES = ("rce", "mae", "gce", "ce")
RESTARTS = ("fresh", "same", "continue")
PARAMETRIZATIONS = ("sigmoid", "clamp")
SCORE_METHODS = ("auto", "contraction", "forward", "difference", "double_backward")
# 000 draws 50k of 1M rows as the outer sample; below a thousand rows the direction becomes noisy
_OUTER_SHARE, _OUTER_LEAST, _OUTER_MOST = 0.05, 1_000, 50_000
# 000: five epochs of the LSTM, three of DistilBERT
_EPOCHS = {True: 5, False: 3}
# the fewest steps in which an untrained BiLSTM learns anything; one epoch of the million rows of 000 has 31,000. Rows
# seen twice are learned by heart, wrong labels and all, so the batches shrink first, to this size at the least.
_INNER_STEPS, _INNER_LEAST_BATCH = 400, 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options that all recipes share; None stands for the model's own default, see :meth:`resolved`."""

    # these two differ between the recipes: AdamW's rate for transformers, and the numbers that must be at least 1
    transformers_rate: ClassVar[float]
    counts: ClassVar[tuple[str, ...]] = ()

    train: str
    test: str
    out: str
    methods: tuple[str, ...]
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
    noise_seed: int = 0
    batch_size: int = 32
    learning_rate: float | None = None
    max_length: int = 128
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    device: str = "auto"
    threads: int | None = None
    keep_models: str = "first"

    def __post_init__(self) -> None:
        limits = ("threads", "limit_train", "limit_real", "limit_test")
        self.check_from(1, "seeds", "batch_size", "max_length", *limits, *self.counts)
        self.check_above_zero("learning_rate", "clip_norm")
        self.check_from(0, "weight_decay")
        self.check_choice("keep_models", KEEP_MODELS)
        if self.text_pair_column is not None and self.text_column is None:
            raise RecipeError("--text-pair-column: expected --text-column as well, got none; name both columns")

    def check_from(self, least: int, *names: str) -> None:
        """Refuse a number below ``least``."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= least:
                kind = "a number" if isinstance(value, float) else "a whole number"
                raise RecipeError(f"{option(name)}: expected {kind} from {least}, got {value}")

    def check_above_zero(self, *names: str, most: float | None = None) -> None:
        """Refuse a number that is not above 0, or above ``most``."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not (value > 0 and (most is None or value <= most)):
                limit = "" if most is None else f" and at most {most:g}"
                raise RecipeError(f"{option(name)}: expected a number above 0{limit}, got {value}")

    def check_choice(self, name: str, choices: Collection[str]) -> None:
        """Refuse anything but one of the words ``choices``."""
        if getattr(self, name) not in choices:
            raise RecipeError(f"{option(name)}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")

    @property
    def from_scratch(self) -> bool:
        """Whether the model starts from random parameters (the BiLSTM)."""
        return self.model == BILSTM

    def resolved(self) -> Self:
        """The same settings without None or "auto": what is left to the machine or the model is filled in.

        Raises:
            RecipeError: the device cannot be had.
        """
        import torch

        learning_rate = self.learning_rate
        if learning_rate is None:
            learning_rate = 1e-3 if self.from_scratch else self.transformers_rate
        return dataclasses.replace(
            self,
            learning_rate=learning_rate,
            device=_device(self.device),
            threads=self.threads or torch.get_num_threads(),
        )

    def fit(self, epochs: int) -> FitSettings:
        """How one model is fitted, in ``epochs`` epochs; the settings must be resolved."""
        assert self.learning_rate is not None
        scratch = self.from_scratch
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
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        return cls(**{**value, "methods": tuple(value["methods"])})

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """Options of ``synkern train``."""

    transformers_rate: ClassVar[float] = 6e-5
    counts: ClassVar[tuple[str, ...]] = ("epochs", "checker_epochs")

    real: str
    methods: tuple[str, ...] = ("dimp",)
    noise: bool = False
    epochs: int = 5
    checker_epochs: int = 5
    gamma: float = 2.0
    max_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_above_zero("max_weight")
        self.check_from(0, "gamma")


@dataclass(frozen=True, kw_only=True)
class ReweightSettings(Settings):
    """Options of ``synkern reweight``.

    Scaled to the data: 000 has a million training rows, draws 50,000 of them as the outer sample, and trains the task
    model for one epoch of 31,000 steps of 32 rows an iteration. What N rows get here :meth:`outer_rows`,
    :meth:`inner_batch` and :meth:`inner` say.
    """

    transformers_rate: ClassVar[float] = 2e-5
    counts: ClassVar[tuple[str, ...]] = ("epochs", "inner_epochs", "inner_batch_size", "outer_size", "test_every")

    real: str | None = None
    methods: tuple[str, ...] = ("sungen",)
    flip_labels: float = 0.0
    epochs: int | None = None
    iterations: int = 50
    inner_epochs: int | None = None
    inner_batch_size: int | None = None
    outer_loss: str = "rce"
    outer_size: int | None = None
    outer_top: float = 1.0
    outer_learning_rate: float = 0.25
    parametrization: str = "sigmoid"
    temperature: float = 1.0
    restart: str = "fresh"
    class_balance: bool = True
    paper_scale: bool = False
    score_method: str = "difference"
    score_in_training: bool = False
    test_every: int = 5
    budget: float = 0.5
    train_on_subset: bool = False
    label_smoothing: float = 0.1
    noise_rate: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_from(0, "iterations")
        self.check_above_zero("outer_learning_rate", "temperature", "budget")
        self.check_above_zero("outer_top", most=1)
        self.check_choice("outer_loss", OUTER_LOSSES)
        self.check_choice("parametrization", PARAMETRIZATIONS)
        self.check_choice("restart", RESTARTS)
        self.check_choice("score_method", SCORE_METHODS)
        for name in ("flip_labels", "label_smoothing", "noise_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{option(name)}: expected a share from 0 and below 1, got {getattr(self, name)}")
        if self.score_in_training and self.restart == "fresh":
            raise RecipeError(
                "--score-in-training: expected --restart same or continue, got fresh; the direction comes from the "
                "iteration before and says nothing about new parameters"
            )
        if self.real is None and self.limit_real is not None:
            raise RecipeError("--limit-real: expected --real as well, got none; the outer rows go by --outer-size")

    def resolved(self) -> Self:
        """Also with the number of epochs of the final model: 5 for the BiLSTM, 3 for transformers (000, F.2)."""
        return dataclasses.replace(super().resolved(), epochs=self.epochs or _EPOCHS[self.from_scratch])

    def outer_rows(self, rows: int) -> int:
        """How many of the training rows make up the outer sample: 5 %, at least 1,000 (or all), at most 50,000."""
        if self.outer_size is not None:
            return min(self.outer_size, rows)
        return min(rows, max(_OUTER_LEAST, min(_OUTER_MOST, round(_OUTER_SHARE * rows))))

    def inner_batch(self, rows: int) -> int:
        """Rows in an inner step: ``batch_size``; of a BiLSTM halved, at most to 8, while an epoch has few steps."""
        if self.inner_batch_size is not None:
            return self.inner_batch_size
        size = self.batch_size
        while self.from_scratch and rows / size < 0.75 * _INNER_STEPS and size >= 2 * _INNER_LEAST_BATCH:
            size //= 2
        return size

    def inner(self, rows: int) -> FitSettings:
        """The inner training: one epoch, as in 000; of a BiLSTM on few rows as many as 400 steps take."""
        size = self.inner_batch(rows)
        epochs = self.inner_epochs
        if epochs is None:
            epochs = max(1, round(_INNER_STEPS * size / rows)) if self.from_scratch else 1
        return dataclasses.replace(self.fit(epochs), batch_size=size)

    def budget_rows(self, rows: int) -> int:
        """Size of the subset: ``budget`` as a number of rows, or up to 1 as a share of them; all rows at most."""
        return min(rows, max(1, round(self.budget * rows if self.budget <= 1 else self.budget)))


def option(name: str) -> str:
    """A field as it is called on the command line."""
    return f"--{name.replace('_', '-')}"


def parse_methods(value: str, methods: Collection[str] | None = None) -> tuple[str, ...]:
    """Methods from a list separated by commas; "all" stands for every method.

    Args:
        value: what stands behind --method.
        methods: the names there are; those of ``synkern train`` if None.

    Raises:
        RecipeError: an unknown method.
    """
    if methods is None:
        from synkern.recipes.importance import METHODS

        methods = METHODS
    names = [name.strip().lower() for name in value.split(",")]
    if "all" in names:
        return tuple(methods)
    for name in names:
        if name not in methods:
            raise RecipeError(
                f"--method: expected one or more of {', '.join(methods)} (separated by commas) or all, got {name!r}"
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
