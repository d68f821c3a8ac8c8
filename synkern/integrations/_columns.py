"""Columns of numbers, one a sample or one a token, that travel with the labels of a batch.

A ``Trainer`` hands its loss function the model's outputs and the labels, nothing else. Other entries of the batch go to
the model, which refuses what it does not know. So the collator ties the columns to the labels: a subclass of ``Tensor``
that is the labels in every way, and whose moves between devices and processes take the columns along. Nothing is kept
outside the batch, so threads, several trainers and several processes cannot mix columns up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
NEUTRAL = 1.0  # finite as a probability, as a logarithm and as a weight; only read where the label is ignored
_LABEL_NAMES = ("label", "label_ids", "labels")
_MOVES = {
    Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory, Tensor.detach, Tensor.clone, Tensor.contiguous,
}  # fmt: skip


class LabelsWithColumns(Tensor):
    """Integer labels that carry ``columns``, a dict of float tensors, from device to device.

    Moves, copies, slices of samples and concatenation of batches keep the columns; every other operation, such as a
    comparison or an index into tokens, gives a plain tensor.
    """

    columns: dict[str, Tensor]

    @classmethod
    def attach(cls, labels: Tensor, columns: Mapping[str, Tensor]) -> LabelsWithColumns:
        """The same labels, sharing their memory, with the columns tied to them."""
        carrier = labels.as_subclass(cls)
        carrier.columns = dict(columns)
        return carrier

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            columns = _columns_after(func, args, kwargs, result)
            return result if columns is None else cls.attach(result, columns)

    def __deepcopy__(self, memo: dict[int, Any]) -> LabelsWithColumns:
        labels = self.as_subclass(Tensor).clone()
        memo[id(self)] = copied = self.attach(labels, {name: c.clone() for name, c in self.columns.items()})
        return copied


def _columns_after(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> dict[str, Tensor] | None:
    """The columns that belong to the result of ``func``; None where the result stands for no samples."""
    if func in _MOVES:
        columns = args[0].columns
        if func is Tensor.pin_memory:
            return {name: column.pin_memory() for name, column in columns.items()}
        non_blocking = bool(kwargs.get("non_blocking", False))
        return {name: column.to(result.device, non_blocking=non_blocking) for name, column in columns.items()}
    if func is Tensor.__getitem__ and isinstance(args[1], slice):
        return {name: column[args[1]] for name, column in args[0].columns.items()}
    if func is torch.cat and (args[1] if len(args) > 1 else kwargs.get("dim", 0)) == 0:
        parts = [getattr(part, "columns", {}) for part in args[0]]
        shapes = [{name: column.shape[1:] for name, column in part.items()} for part in parts]
        if all(shape == shapes[0] for shape in shapes):
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return None


class WeightedCollator:
    """A data collator that keeps extra columns of numbers: wraps any other collator.

    The wrapped collator never sees the columns. They come out tied to ``batch["labels"]``, where a loss made by
    ``loss_function`` finds them; to everything else ``batch["labels"]`` is the tensor it was.

    A column holds one number a sample, or a list with one number a token. Lists are padded as the labels are. Collators
    that pad (``DataCollatorWithPadding``, ``DataCollatorForTokenClassification``, ``DataCollatorForLanguageModeling``,
    ``DataCollatorForSeq2Seq``, ...) and those that join all samples into one row (``DataCollatorWithFlattening``) are
    both supported.

    Args:
        collator: called with the samples without the columns; returns a mapping with torch tensors.
        columns: names of the columns to keep.
        model: where given, columns that ``model.forward`` does not take, such as raw text, are dropped before the
            wrapped collator sees them. This is what the ``Trainer`` does with ``remove_unused_columns=True``, which has
            to be off because it would drop the extra columns as well.
        padding_side: "right" or "left"; by default that of the collator's tokenizer, else "right".
        optional: let batches pass in which no sample has any of the columns.

    Raises:
        ValueError: when called: a column is absent from some sample, holds NaN, or does not fit the tokens.
        TypeError: when called: a column does not hold numbers, or the batch is not made of torch tensors.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        columns: Sequence[str],
        *,
        model: nn.Module | None = None,
        padding_side: str | None = None,
        optional: bool = False,
    ) -> None:
        if isinstance(columns, str):
            raise TypeError(f"WeightedCollator: columns must be a list of names, got {columns!r}; use [{columns!r}]")
        if padding_side is None:
            padding_side = getattr(getattr(collator, "tokenizer", None), "padding_side", "right")
        if padding_side not in ("right", "left"):
            raise ValueError(f"WeightedCollator: padding_side must be 'right' or 'left', got {padding_side!r}")
        self.collator = collator
        self.columns = tuple(columns)
        self.padding_side = padding_side
        self.optional = optional
        self._model_columns = None if model is None else _forward_columns(model)

    def __call__(self, features: list[Mapping[str, Any]]) -> Any:
        """The wrapped collator's batch, with the columns tied to its labels where it has labels."""
        batch = self.collator([self._without_columns(row) for row in features])
        labels = batch.get("labels")
        if labels is None or not self.columns:
            return batch
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"WeightedCollator: labels must be a torch.Tensor, got {type(labels).__name__} from "
                f"{type(self.collator).__name__}; make it return torch tensors (return_tensors='pt')"
            )
        if self.optional and all(row.get(name) is None for row in features for name in self.columns):
            return batch
        columns = {name: self._collate(name, features, labels) for name in self.columns}
        batch["labels"] = LabelsWithColumns.attach(labels, columns)
        return batch

    def _without_columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        kept = self._model_columns
        return {
            name: value
            for name, value in row.items()
            if name not in self.columns and (kept is None or name in kept or name in _LABEL_NAMES)
        }

    def _collate(self, name: str, features: list[Mapping[str, Any]], labels: Tensor) -> Tensor:
        """(N,) or the shape of labels, float32."""
        rows = [_numbers(name, i, row) for i, row in enumerate(features)]
        per_token = rows[0].dim() == 1
        mixed = next((i for i, x in enumerate(rows) if x.dim() != rows[0].dim()), None)
        if mixed is not None:
            raise ValueError(
                f"WeightedCollator: column {name!r} must hold one number a sample or one list a sample throughout, "
                f"got both (samples 0 and {mixed} of the batch); use one of the two"
            )
        if per_token and labels.dim() != 2:
            raise ValueError(
                f"WeightedCollator: column {name!r} must hold one number a sample because labels have shape "
                f"{tuple(labels.shape)}, got a list of {len(rows[0])} numbers; reduce it to one number a sample"
            )
        lengths = [_token_count(row) for row in features]
        if per_token:
            _check_lengths(name, rows, lengths)
        if labels.dim() == 2 and labels.shape[0] == 1 and len(rows) > 1:
            return _joined(name, rows, lengths, labels)
        if labels.shape[0] != len(rows):
            raise ValueError(
                f"WeightedCollator: expected labels for {len(rows)} samples, got shape {tuple(labels.shape)} from "
                f"{type(self.collator).__name__}; columns need a collator that keeps samples apart, or joins all in one"
            )
        return self._padded(name, rows, labels.shape[1]) if per_token else torch.stack(rows)

    def _padded(self, name: str, rows: list[Tensor], length: int) -> Tensor:
        column = torch.full((len(rows), length), NEUTRAL)
        for i, x in enumerate(rows):
            if len(x) > length:
                raise ValueError(
                    f"WeightedCollator: column {name!r} must hold at most {length} numbers to match the labels, got "
                    f"{len(x)} in sample {i} of the batch; truncate it together with the tokens"
                )
            if self.padding_side == "right":
                column[i, : len(x)] = x
            else:
                column[i, length - len(x) :] = x
        return column


def _forward_columns(model: Any) -> frozenset[str]:
    """What the model's forward takes; for an adapter, what the model inside it takes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(inner.forward).parameters)


def _numbers(name: str, i: int, row: Mapping[str, Any]) -> Tensor:
    """The column's value in one sample: 0-d or 1-d, float32."""
    value = row.get(name)
    if value is None:
        raise ValueError(
            f"WeightedCollator: column {name!r} is missing from sample {i} of the batch, which has "
            f"{', '.join(map(repr, row)) or 'no columns'}; add the column to the data set, and use "
            "TrainingArguments(remove_unused_columns=False): by default the Trainer drops what the model does not take"
        )
    try:
        x = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"WeightedCollator: column {name!r} must hold numbers, got {type(value).__name__} in sample {i} of the "
            f"batch ({error}); convert it to float, or to a list of floats"
        ) from error
    if x.dim() > 1:
        raise ValueError(
            f"WeightedCollator: column {name!r} must hold a number or a list of numbers, got shape {tuple(x.shape)} in "
            f"sample {i} of the batch; flatten it"
        )
    if x.isnan().any():
        raise ValueError(
            f"WeightedCollator: column {name!r} must not hold NaN, got NaN in sample {i} of the batch; fill in the "
            "value, or drop the sample"
        )
    return x


def _token_count(row: Mapping[str, Any]) -> int | None:
    """The number of labels of the sample, or of its tokens where the collator makes the labels."""
    for name in ("labels", "label_ids", "label", "input_ids"):
        value: Any = row.get(name)
        if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1:
            return len(value)
    return None


def _check_lengths(name: str, rows: list[Tensor], lengths: list[int | None]) -> None:
    for i, (x, length) in enumerate(zip(rows, lengths, strict=True)):
        if length is not None and len(x) != length:
            raise ValueError(
                f"WeightedCollator: column {name!r} must hold one number a token, expected {length}, got {len(x)} in "
                f"sample {i} of the batch; align it with the tokens (special tokens count), or give one number a sample"
            )


def _joined(name: str, rows: list[Tensor], lengths: list[int | None], labels: Tensor) -> Tensor:
    """The column of samples that the collator joined into one row: (1, tokens)."""
    parts = [x if x.dim() == 1 else x.expand(length or 0) for x, length in zip(rows, lengths, strict=True)]
    column = torch.cat(parts).unsqueeze(0)
    if column.shape != labels.shape:
        raise ValueError(
            f"WeightedCollator: column {name!r} of the joined samples has {column.shape[1]} numbers, expected "
            f"{labels.shape[1]} to match labels {tuple(labels.shape)}; the collator must join whole samples in order"
        )
    return column
