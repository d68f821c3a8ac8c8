"""Hugging Face ``Trainer``: any loss of synkern as ``compute_loss_func``.

    loss = loss_function("dimp", quality_column="quality")
    trainer = Trainer(
        model,
        TrainingArguments("out", remove_unused_columns=False),
        train_dataset=data,  # has a column "quality"
        data_collator=loss.collator(DataCollatorWithPadding(tokenizer), model=model),
        compute_loss_func=loss,
    )
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import LOSSES, LossSpec
from ._columns import IGNORE_INDEX, NEUTRAL, LabelsWithColumns, WeightedCollator

__all__ = ["LabelsWithColumns", "TrainerLoss", "WeightedCollator", "loss_function"]

# Set by the integration: the labels' -100, the sum over the batch divided by the Trainer's count, one tensor returned.
_RESERVED = ("ignore_index", "reduction", "normalizer", "return_weights")
_SHIFTED_OUTPUTS = ("CausalLM",)
_ALIGNED_OUTPUTS = ("MaskedLM", "TokenClassifier", "Seq2SeqLM")


def loss_function(
    name: str,
    *,
    quality_column: str | None = None,
    diversity_column: str | None = None,
    log_quality_column: str | None = None,
    log_diversity_column: str | None = None,
    sample_weight_column: str | None = None,
    shift_labels: bool | None = None,
    evaluation_loss: str | None = None,
    **loss_options: Any,
) -> TrainerLoss:
    r"""A loss for ``Trainer(compute_loss_func=...)`` that reads its operands from columns of the data set.

    .. math:: L = \frac{1}{M} \sum_i L_i

    over the labels i that are not -100: one a sample for sequence classification, one a token for token classification,
    masked, causal and sequence-to-sequence language modelling. M is ``num_items_in_batch``, which the ``Trainer``
    counts over all batches of an optimiser step and all processes, so that gradient accumulation and several processes
    give the gradient of one large batch. Without it M is the number of kept labels of this batch. ``class_weight`` and
    sample weights scale the terms of the sum and leave M alone.

    A column holds a number a sample, which counts for each of the sample's tokens, or a list with a number a token:
    the number in place t belongs to the label in place t. Causal models are recognised by the class of their output;
    labels and columns are shifted by one token for them, and the logits are read where they lie.

    Use ``.collator(...)`` of the result as the data collator: it ties the columns to the labels.

    Args:
        name: key of ``synkern.registry.LOSSES``, such as "dimp", "imp", "focal" or "cross_entropy".
        quality_column, diversity_column, log_quality_column, log_diversity_column: names of the columns that hold these
            operands of the loss; exactly one of each pair that the loss takes.
        sample_weight_column: name of the column that holds sample weights, any sign.
        shift_labels: whether logits at one token predict the next label; None decides by the class of the model's
            output.
        evaluation_loss: name of a loss without operands that is used instead while gradients are off. Evaluation sets
            then need no columns.
        loss_options: options of the loss, such as ``gamma``, ``max_weight``, ``class_weight`` (C,) or ``backend``; and
            ``<operand>_column`` for operands of other registered losses.

    Returns:
        The loss function. It keeps no state between calls.

    Raises:
        ValueError: an unknown loss, a column that the loss does not take, or one that it lacks.
        TypeError: an option that the loss does not take.
    """
    columns = {
        "quality": quality_column,
        "log_quality": log_quality_column,
        "diversity": diversity_column,
        "log_diversity": log_diversity_column,
        "sample_weight": sample_weight_column,
    }
    for key in [key for key in loss_options if key.endswith("_column")]:
        columns[key.removesuffix("_column")] = loss_options.pop(key)
    spec = _lookup(name)
    return TrainerLoss(
        spec,
        {operand: column for operand, column in columns.items() if column is not None},
        loss_options,
        shift_labels=shift_labels,
        evaluation=None if evaluation_loss is None else _evaluation_spec(evaluation_loss),
    )


class TrainerLoss:
    """What ``loss_function`` returns: called as ``loss(outputs, labels, num_items_in_batch=None)``."""

    def __init__(
        self,
        spec: LossSpec,
        columns: Mapping[str, str],
        options: Mapping[str, Any],
        *,
        shift_labels: bool | None = None,
        evaluation: LossSpec | None = None,
    ) -> None:
        _check_columns(spec, columns)
        _check_options(spec, options)
        self.spec = spec
        self.operand_columns = dict(columns)
        self.options = dict(options)
        self.shift_labels = shift_labels
        self.evaluation = evaluation

    def __repr__(self) -> str:
        parts = [repr(self.spec.name)]
        parts += [f"{operand}_column={column!r}" for operand, column in self.operand_columns.items()]
        parts += [f"{key}={value!r}" for key, value in self.options.items()]
        if self.shift_labels is not None:
            parts.append(f"shift_labels={self.shift_labels}")
        if self.evaluation is not None:
            parts.append(f"evaluation_loss={self.evaluation.name!r}")
        return f"loss_function({', '.join(parts)})"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the data set's columns that the loss reads."""
        return tuple(dict.fromkeys(self.operand_columns.values()))

    def collator(
        self, collator: Callable[[list[Any]], Any], *, model: nn.Module | None = None, padding_side: str | None = None
    ) -> WeightedCollator:
        """A data collator that keeps this loss's columns; see ``WeightedCollator``.

        Args:
            collator: the data collator to wrap.
            model: where given, columns that its forward does not take are dropped before ``collator`` sees them.
            padding_side: "right" or "left"; by default that of the collator's tokenizer, else "right".
        """
        return WeightedCollator(
            collator, self.columns, model=model, padding_side=padding_side, optional=self.evaluation is not None
        )

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        """The loss of one batch.

        Args:
            outputs: the model's output; a mapping with "logits", or a tuple that begins with the logits: (N, C), or
                (N, T, C) for a label a token.
            labels: (N,) or (N, T), as the collator made them; -100 is ignored.
            num_items_in_batch: number or 0-d tensor, the denominator; None counts the labels of this batch.

        Returns:
            0-d, float64 for float64 logits and float32 otherwise. Auxiliary losses of the model, such as a router's,
            are not part of it.

        Raises:
            ValueError: no labels, no logits, labels without the columns, or shapes that do not fit.
        """
        logits = _logits(outputs)
        if labels is None:
            raise ValueError(
                "loss_function: expected labels, got None; give the data set a column 'labels', or 'label' where the "
                "collator renames it"
            )
        spec, columns, options = self.spec, self.operand_columns, self.options
        if self.evaluation is not None and not torch.is_grad_enabled():
            spec, columns, options = self.evaluation, {}, {}
        values = self._values(labels, columns)
        target = labels.as_subclass(Tensor).to(logits.device)
        shift = logits.dim() > 2 and self._shifts(outputs)
        operands = {name: _aligned(value.to(logits.device), target, shift) for name, value in values.items()}
        if shift:
            target = _shifted(target, IGNORE_INDEX)
        options = {k: v.to(logits.device) if isinstance(v, Tensor) else v for k, v in options.items()}
        return spec.function(
            logits, target, **operands, **options, ignore_index=IGNORE_INDEX,
            normalizer=_normalizer(num_items_in_batch, target),
        )  # fmt: skip

    def _values(self, labels: Tensor, columns: Mapping[str, str]) -> dict[str, Tensor]:
        carried = labels.columns if isinstance(labels, LabelsWithColumns) else {}
        missing = sorted(set(columns.values()) - carried.keys())
        if not missing:
            return {operand: carried[column] for operand, column in columns.items()}
        got = ", ".join(map(repr, carried)) or "none"
        if torch.is_grad_enabled():
            remedy = (
                "use loss.collator(...) as data_collator, TrainingArguments(remove_unused_columns=False), and with an "
                "iterable data set on several processes accelerator_config={'dispatch_batches': False}"
            )
        else:
            remedy = (
                "add the columns to the evaluation set, or pass evaluation_loss='cross_entropy' to loss_function; "
                "data_collator must be loss.collator(...) with TrainingArguments(remove_unused_columns=False)"
            )
        raise ValueError(
            f"loss_function({self.spec.name!r}): expected labels with the columns {', '.join(map(repr, missing))}, "
            f"got {got}; {remedy}"
        )

    def _shifts(self, outputs: Any) -> bool:
        """Whether logits at token t predict the label at t + 1."""
        if self.shift_labels is not None:
            return self.shift_labels
        name = type(outputs).__name__
        if any(part in name for part in _SHIFTED_OUTPUTS):
            return True
        if any(part in name for part in _ALIGNED_OUTPUTS):
            return False
        raise ValueError(
            "loss_function: expected a model's output whose class tells whether logits predict the next token, got "
            f"{name}; pass shift_labels=True for a causal language model, shift_labels=False otherwise"
        )


def _lookup(name: str) -> LossSpec:
    if name not in LOSSES:
        raise ValueError(f"loss_function: name must be one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]


def _evaluation_spec(name: str) -> LossSpec:
    spec = _lookup(name)
    if spec.operands:
        allowed = ", ".join(other for other, s in LOSSES.items() if not s.operands)
        raise ValueError(
            f"loss_function: evaluation_loss must be a loss without operands ({allowed}), got {name!r}, which takes "
            f"{', '.join(spec.operands)}; leave evaluation_loss out to evaluate with the training loss"
        )
    return spec


def _alternatives(spec: LossSpec, operand: str) -> tuple[str, ...]:
    """Names under which the loss's function takes the operand."""
    taken = inspect.signature(spec.function).parameters
    return tuple(name for name in (operand, f"log_{operand}") if name in taken)


def _check_columns(spec: LossSpec, columns: Mapping[str, str]) -> None:
    """Raises unless the columns are the loss's operands, each once."""
    where = f"loss_function({spec.name!r})"
    choices = [_alternatives(spec, operand) for operand in spec.operands]
    known = [name for names in choices for name in names] + ["sample_weight"]
    unknown = [f"{name}_column" for name in columns if name not in known]
    if unknown:
        takes = ", ".join(f"{name}_column" for name in known)
        raise ValueError(f"{where}: expected columns among {takes}, got {', '.join(unknown)}; leave it out")
    for names in choices:
        given = [name for name in names if name in columns]
        expected = " or ".join(f"{name}_column" for name in names)
        if len(given) != 1:
            raise ValueError(
                f"{where}: expected {expected}, got {'both' if given else 'neither' if len(names) > 1 else 'none'}; "
                f"pass the name of the data set's column, for instance {names[0]}_column={names[0]!r}"
            )
    wrong = next((name for name, column in columns.items() if not isinstance(column, str)), None)
    if wrong is not None:
        raise TypeError(
            f"{where}: {wrong}_column must be the name of a column, got {type(columns[wrong]).__name__}; pass a string"
        )


def _check_options(spec: LossSpec, options: Mapping[str, Any]) -> None:
    """Raises for an option that the loss does not take, or that the integration sets itself."""
    where = f"loss_function({spec.name!r})"
    reserved = [name for name in options if name in _RESERVED]
    if reserved:
        raise TypeError(
            f"{where}: {', '.join(reserved)} cannot be set, because the Trainer needs one number, summed over labels "
            "other than -100 and divided by its own count; leave it out"
        )
    tensors = {name for operand in spec.operands for name in _alternatives(spec, operand)}
    tensors |= {"logits", "target", "sample_weight"}
    known = [n for n in inspect.signature(spec.function).parameters if n not in tensors and n not in _RESERVED]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"{where}: expected options among {', '.join(known)}, got {', '.join(unknown)}; leave it out")


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(logits, Tensor):
        got = ", ".join(map(str, outputs)) if isinstance(outputs, Mapping) else type(logits).__name__
        raise ValueError(
            f"loss_function: expected a model output with logits, got {got}; use a model with a classification or "
            "language modelling head, and use_liger_kernel=False"
        )
    return logits


def _shifted(x: Tensor, fill: float) -> Tensor:
    """x one token earlier. Shifting these instead of slicing the logits spares a copy of the logits."""
    return nn.functional.pad(x[..., 1:], (0, 1), value=fill)


def _aligned(column: Tensor, target: Tensor, shift: bool) -> Tensor:
    """The column in the shape of target: a sample's number for each of its tokens, a token's number with its label."""
    if column.dim() < target.dim():
        return column.reshape(-1, *[1] * (target.dim() - 1)).expand(target.shape)
    return _shifted(column, NEUTRAL) if shift else column


def _normalizer(num_items_in_batch: Tensor | float | None, target: Tensor) -> Tensor | float:
    if num_items_in_batch is None:
        return (target != IGNORE_INDEX).sum()
    if not isinstance(num_items_in_batch, Tensor):
        return num_items_in_batch
    if num_items_in_batch.dim() != 0:
        raise ValueError(
            "loss_function: expected num_items_in_batch as a number or a 0-d tensor, got shape "
            f"{tuple(num_items_in_batch.shape)}, as nn.DataParallel makes it; run one process a device with torchrun"
        )
    return num_items_in_batch.to(target.device)
