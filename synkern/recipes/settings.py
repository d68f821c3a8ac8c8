"""Everything that decides the numbers of ``synkern train`` and ``synkern reweight``.

The fields are also the commands' options (``synkern.cli.options`` makes them from here): each is written once, with its
default and its help. Nothing heavy is imported, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from synkern.recipes.errors import RecipeError

if TYPE_CHECKING:
    from synkern.recipes.training import FitSettings

BILSTM = "bilstm"
DATA, WEIGHTS, TRAINING, OUTPUT = "Data", "Weights (sungen)", "Training", "Output"
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


def option(default: Any, panel: str, text: str, name: str | None = None) -> Any:
    """A field that is an option too: its panel of ``--help``, the help, and its name where the field has another."""
    return dataclasses.field(default=default, metadata={"panel": panel, "help": text, "name": name})


def _learning_rate(transformers_rate: float, suited: str) -> Any:
    rate = f"{transformers_rate:.0e}".replace("e-0", "e-")
    return option(
        None, TRAINING,
        f"Default: 1e-3, Adam, constant for the BiLSTM; {rate}, AdamW, falling to 0 for transformers, which suits "
        f"{suited}: a small encoder such as MiniLM needs 2e-4 to 5e-4.",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options that all recipes share; None stands for the model's own default, see :meth:`resolved`.

    ``train``, ``test`` and ``out`` have no default: a run cannot do without them.
    """

    # these two differ between the recipes: AdamW's rate for transformers, and the numbers that must be at least 1
    transformers_rate: ClassVar[float]
    counts: ClassVar[tuple[str, ...]] = ()

    out: str = option(dataclasses.MISSING, OUTPUT, "Folder for everything that is written.")
    train: str = option(
        dataclasses.MISSING, DATA,
        "Rows to train on, labels not to be trusted: .jsonl, .jsonl.gz, .csv, .parquet, or a `datasets` id as name, "
        "name:split or name@configuration:split.",
    )  # fmt: skip
    test: str = option(dataclasses.MISSING, DATA, "Rows to test on.")
    methods: tuple[str, ...] = option((), TRAINING, "Methods to compare.", "method")
    model: str = option(
        BILSTM, TRAINING, "bilstm (trained from scratch, nothing to download) or a transformers model by folder or id."
    )
    seeds: int = option(3, TRAINING, "Number of seeds, from 0.")
    text_column: str | None = option(None, DATA, "Default: text, or text_a with text_b.")
    text_pair_column: str | None = option(None, DATA, "Second text of a pair.")
    label_column: str = option("label", DATA, "Text or whole numbers.")
    true_label_column: str = option(
        "true_label", DATA, "Right labels of the training rows, if known; used in tables and plots only."
    )
    labels: str | None = option(
        None, DATA,
        "Label names in index order, as a,b,c or a JSON file with a list `labels`. Default: those in --train.",
    )  # fmt: skip
    skip_bad_rows: bool = option(False, DATA, "Leave out rows that cannot be used, and count them.")
    limit_train: int | None = option(None, DATA, "Use a random part of --train.")
    limit_real: int | None = option(None, DATA, "Use a random part of --real.")
    limit_test: int | None = option(None, DATA, "Use a random part of --test.")
    noise_seed: int = option(0, DATA, "Seed of the noise.")
    batch_size: int = option(32, TRAINING, "Rows in a step.")
    learning_rate: float | None = option(None, TRAINING, "Of AdamW or Adam.")
    max_length: int = option(128, TRAINING, "Tokens at which a row is cut.")
    weight_decay: float = option(0.0, TRAINING, "Of AdamW or Adam.")
    clip_norm: float = option(1.0, TRAINING, "Greatest norm of a step's gradient.")
    device: str = option("auto", TRAINING, "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")
    threads: int | None = option(None, TRAINING, "CPU threads. Default: torch's choice.")
    keep_models: str = option("first", OUTPUT, "Which trained models to save: those of the first seed, all or none.")

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
                raise RecipeError(f"{flag(name)}: expected {kind} from {least}, got {value}")

    def check_above_zero(self, *names: str, most: float | None = None) -> None:
        """Refuse a number that is not above 0, or above ``most``."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not (value > 0 and (most is None or value <= most)):
                limit = "" if most is None else f" and at most {most:g}"
                raise RecipeError(f"{flag(name)}: expected a number above 0{limit}, got {value}")

    def check_choice(self, name: str, choices: Collection[str]) -> None:
        """Refuse anything but one of the words ``choices``."""
        if getattr(self, name) not in choices:
            raise RecipeError(f"{flag(name)}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")

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
        from synkern.recipes.training import FitSettings

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

    real: str = option(dataclasses.MISSING, DATA, "A few rows with labels that can be trusted.")
    methods: tuple[str, ...] = option(
        ("dimp",), TRAINING, "ce, focal, imp, dimp, several with commas, or all.", "method"
    )
    noise: bool = option(
        False, DATA, "Corrupt --train: a third as it is, a third with another label, a third twice."
    )
    noise_seed: int = option(0, DATA, "Seed of --noise.")
    epochs: int = option(5, TRAINING, "Epochs of each method.")
    checker_epochs: int = option(
        5, TRAINING, "Epochs of quality and diversity checker; a BiLSTM on fewer than 500 --real rows may need more."
    )
    learning_rate: float | None = _learning_rate(transformers_rate, "BERT-base")
    gamma: float = option(2.0, TRAINING, "Exponent of the focal loss.")
    max_weight: float | None = option(
        None, TRAINING, "Greatest weight of a row in imp and dimp. Default: none."
    )

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

    real: str | None = option(
        None, DATA,
        "A few rows with labels that can be trusted, as outer rows. Default: a random sample of --train, as in the "
        "paper.",
    )  # fmt: skip
    methods: tuple[str, ...] = option(
        ("sungen", "zerogen"), TRAINING,
        "sungen, zerogen (plain training), l2rw, meta-weight-net, hu2019, confidence, co-teaching, label-smoothing, "
        "temporal-ensembling, one-level-rce, several with commas, or all.",
        "method",
    )  # fmt: skip
    flip_labels: float = option(0.0, DATA, "Give this share of --train another label, and report how it is found.")
    noise_seed: int = option(0, DATA, "Seed of --flip-labels, and of the choice of the outer rows.")
    iterations: int = option(50, WEIGHTS, "Outer iterations.")
    inner_epochs: int | None = option(
        None, WEIGHTS,
        "Epochs of the task model in an iteration. Default: 1, as in the paper; for the BiLSTM on less than 2,400 rows "
        "more, to make 400 steps.",
    )  # fmt: skip
    inner_batch_size: int | None = option(
        None, WEIGHTS,
        "Rows in a step of the task model. Default: --batch-size; for the BiLSTM on less than 9,600 rows 16 or 8, to "
        "make 400 steps an epoch.",
    )  # fmt: skip
    outer_loss: str = option("rce", WEIGHTS, "rce, mae, gce or ce.")
    outer_size: int | None = option(
        None, WEIGHTS,
        "Rows in the outer sample. Default: 5 % of --train as in the paper, but from 1,000 (or all) to 50,000.",
    )  # fmt: skip
    outer_top: float = option(
        1.0, WEIGHTS,
        "Share of the outer rows, those of greatest weight, that count in the outer loss; the released code has an "
        "option for 0.9.",
    )  # fmt: skip
    outer_learning_rate: float = option(0.25, WEIGHTS, "Of Adam on the weights, with cosine decay.")
    parametrization: str = option(
        "sigmoid", WEIGHTS, "sigmoid, or clamp (the weights themselves, kept in 0 to 1)."
    )
    temperature: float = option(1.0, WEIGHTS, "Of the sigmoid.")
    restart: str = option(
        "fresh", WEIGHTS,
        "Where the task model of an iteration starts: fresh (new random parameters), same (those of the first "
        "iteration, as in the released code) or continue (where the last one ended).",
    )  # fmt: skip
    class_balance: bool = option(
        True, WEIGHTS,
        "Take each class's scores from their mean, so that no class as a whole gains or loses weight; not in the "
        "paper.",
    )  # fmt: skip
    paper_scale: bool = option(
        False, WEIGHTS,
        "Scores times rate / batch size and Adam's epsilon 1e-8, as in the paper. By default scores are divided by "
        "their mean magnitude and epsilon is 3 / sqrt(rows): on small data the former are under epsilon, or count "
        "with their sign alone.",
    )  # fmt: skip
    score_method: str = option(
        "difference", WEIGHTS,
        "difference (two passes without gradients, good to four digits), contraction or forward (exact), "
        "double_backward (exact, slow), or auto (the cheapest exact one).",
    )  # fmt: skip
    score_in_training: bool = option(
        False, WEIGHTS,
        "Take the scores out of the task model's own steps, along the direction of the iteration before: quicker, but"
        " not what the paper does. Needs --restart same or continue.",
    )  # fmt: skip
    test_every: int = option(5, WEIGHTS, "Test the task model after each so many iterations.")
    budget: float = option(
        0.5, OUTPUT,
        "Size of the subset: a share of --train, or above 1 a number of rows; also of what confidence keeps.",
    )  # fmt: skip
    train_on_subset: bool = option(
        True, TRAINING,
        "Train the final model of sungen on the subset, as the paper does, rather than on all rows with their weights.",
    )  # fmt: skip
    epochs: int | None = option(
        None, TRAINING, "Epochs of the final model of each method. Default: 5 for the BiLSTM, 3 for transformers."
    )
    learning_rate: float | None = _learning_rate(transformers_rate, "DistilBERT")
    label_smoothing: float = option(0.1, TRAINING, "Of label-smoothing.")
    noise_rate: float = option(0.3, TRAINING, "Share of wrong labels that co-teaching is told.")

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
                raise RecipeError(f"{flag(name)}: expected a share from 0 and below 1, got {getattr(self, name)}")
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


def flag(name: str) -> str:
    """A field as it is called on the command line."""
    return f"--{name.replace('_', '-')}"


def parse_methods(value: str, methods: Collection[str]) -> tuple[str, ...]:
    """Methods from a list separated by commas; "all" stands for every method.

    Args:
        value: what stands behind --method.
        methods: the names there are.

    Raises:
        RecipeError: an unknown method.
    """
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
