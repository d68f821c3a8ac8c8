"""Labelled text from .jsonl, .jsonl.gz, .csv, .parquet or a ``datasets`` id, every row checked.

A row that cannot be used is refused with its file and line, or skipped and counted.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from synkern.recipes.errors import DataError
from synkern.recipes.noise import GROUPS

_LINE_FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")
_FORMATS = (*_LINE_FORMATS, ".parquet")
# tried in this order where no column is named
_TEXT_COLUMNS: tuple[tuple[str, str | None], ...] = (("text", None), ("text_a", "text_b"))


class _BadRow(Exception):
    """What is wrong with one row."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; ``text=None`` looks for "text", then for the pair "text_a", "text_b"."""

    text: str | None = None
    text_pair: str | None = None
    label: str = "label"
    noise: str = "noise"
    true_label: str = "true_label"


@dataclass(frozen=True)
class LabelSet:
    """The classes, in index order.

    Labels are compared as text, so 1, "1" and 1.0 are one label. Where the names are not numbers themselves, a number
    is taken as an index into them.
    """

    names: tuple[str, ...]

    def index(self, label: str) -> int | None:
        """Index of a label (as :func:`canonical_label` gives it), None if it is not in the set."""
        if label in self.names:
            return self.names.index(label)
        if label.isdecimal() and int(label) < len(self.names) and not any(name.isdecimal() for name in self.names):
            return int(label)
        return None

    @classmethod
    def from_labels(cls, labels: Iterable[str]) -> LabelSet:
        """The distinct labels: in numerical order if all are whole numbers, else in alphabetical order."""
        distinct = set(labels)
        if all(label.removeprefix("-").isdecimal() for label in distinct):
            return cls(tuple(sorted(distinct, key=int)))
        return cls(tuple(sorted(distinct)))

    @classmethod
    def from_option(cls, value: str) -> LabelSet:
        """From names separated by commas, or from a JSON file: a list, or an object with a list ``labels``."""
        names: Any
        if not value.endswith(".json"):
            names = [name.strip() for name in value.split(",")]
        else:
            try:
                content = json.loads(Path(value).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(f"--labels {value}: expected a readable JSON file, got {error}") from error
            names = content.get("labels") if isinstance(content, dict) else content
        if not isinstance(names, list) or len(set(names)) < 2 or not all(isinstance(n, str) and n for n in names):
            raise DataError(
                f"--labels {value}: expected at least two different names, got {names!r}; "
                "give them as a,b,c or as a JSON file with a list `labels`"
            )
        return cls(tuple(names))


@dataclass(frozen=True)
class LabelledText:
    """Rows of text with labels.

    ``frame`` has the columns ``row`` (line or row number in the source), ``text``, ``text_pair`` (only for pairs),
    ``label`` (index into ``labels``) and, where the source has them, ``noise`` and ``true_label``.
    """

    frame: pd.DataFrame
    labels: LabelSet
    source: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def paired(self) -> bool:
        """Whether each row has two texts."""
        return "text_pair" in self.frame

    def fingerprint(self) -> str:
        """SHA-256 of all rows and of the label set."""
        digest = hashlib.sha256(repr((self.labels.names, list(self.frame.columns))).encode())
        digest.update(pd.util.hash_pandas_object(self.frame, index=False).to_numpy().tobytes())
        return digest.hexdigest()

    def sample(self, size: int | None, seed: int = 0) -> LabelledText:
        """A random part of at most ``size`` rows, in their order; everything if ``size`` is None."""
        if size is None or size >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), size=size, replace=False))
        return LabelledText(self.frame.iloc[chosen].reset_index(drop=True), self.labels, self.source, self.skipped)


def canonical_label(value: Any) -> str | None:
    """A label as text: 1, 1.0, True and " 1 " become "1"; None for a missing or empty one.

    Raises:
        TypeError: something that is neither text nor a whole number.
    """
    if isinstance(value, (bool, np.bool_)):
        return str(int(value))
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (float, np.floating)):
        if np.isnan(value):
            return None
        if float(value).is_integer():
            return str(int(value))
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    raise TypeError(f"expected text or a whole number, got {value!r}")


def read_labelled(
    source: str,
    columns: Columns | None = None,
    *,
    labels: LabelSet | None = None,
    default_split: str = "train",
    skip_bad_rows: bool = False,
) -> LabelledText:
    """Read labelled text.

    Args:
        source: a .jsonl, .jsonl.gz, .csv or .parquet file, or a ``datasets`` id as ``name``, ``name:split`` or
            ``name@configuration:split``; a folder that ``datasets`` can load counts as a name.
        columns: names of the columns.
        labels: the label set; None takes it from the rows.
        default_split: split of a ``datasets`` id without one.
        skip_bad_rows: leave out rows that cannot be used, and count them, instead of raising.

    Returns:
        The rows, with the label set.

    Raises:
        DataError: the source cannot be read, has no usable row, or (without ``skip_bad_rows``) has an unusable row.
    """
    columns = columns or Columns()
    if _suffix(source) is not None:
        reader = _Reader(source, columns, skip_bad_rows, file_records(Path(source)))
    else:
        records, labels = _hub_records(source, columns, default_split, labels)
        reader = _Reader(source, columns, skip_bad_rows, records)
    return reader.read(labels)


def _suffix(source: str) -> str | None:
    return next((suffix for suffix in _FORMATS if source.lower().endswith(suffix)), None)


@dataclass
class _Reader:
    source: str
    columns: Columns
    skip: bool
    records: Iterator[tuple[str, dict[str, Any] | _BadRow]]
    text: str = ""
    pair: str | None = None
    skipped: list[str] = field(default_factory=list)

    def read(self, labels: LabelSet | None) -> LabelledText:
        rows: list[dict[str, Any]] = []
        for where, record in self.records:
            try:
                if isinstance(record, _BadRow):
                    raise record
                row = self._row(record)
                if labels is not None:
                    self._index_labels(row, labels)
            except _BadRow as problem:
                self._refuse(where, problem)
            else:
                rows.append({"where": where, "row": int(where.rpartition(" ")[2]), **row})
        if not rows:
            raise DataError(
                f"{self.source}: expected rows with text and label, got no usable row ({len(self.skipped)} skipped)"
            )
        if labels is None:
            labels = LabelSet.from_labels(row["label"] for row in rows)
            self._index_from_rows(rows, labels)
        return LabelledText(_frame(rows, self.pair is not None), labels, self.source, tuple(self.skipped))

    def _refuse(self, where: str, problem: _BadRow) -> None:
        message = f"{self.source}, {where}: {problem}"
        if not self.skip:
            raise DataError(f"{message}; correct the row, or leave out such rows with --skip-bad-rows")
        self.skipped.append(message)

    def _row(self, record: dict[str, Any]) -> dict[str, Any]:
        if not self.text:
            self.text, self.pair = self._find_text(list(record))
        row = {"text": _text(record, self.text)}
        if self.pair is not None:
            row["text_pair"] = _text(record, self.pair)
        row["label"] = _label(record, self.columns.label)
        if record.get(self.columns.noise) in GROUPS:
            row["noise"] = record[self.columns.noise]
        if record.get(self.columns.true_label) is not None:
            row["true_label"] = _label(record, self.columns.true_label)
        return row

    def _find_text(self, names: list[str]) -> tuple[str, str | None]:
        if self.columns.label not in names:
            raise DataError(
                f"{self.source}: expected a column {self.columns.label!r} with labels, got {names}; "
                "name it with --label-column"
            )
        named = self.columns.text is not None
        wanted = ((self.columns.text, self.columns.text_pair),) if named else _TEXT_COLUMNS
        for text, pair in wanted:
            if text in names and (pair is None or pair in names):
                return text, pair
        described = " or ".join(" and ".join(filter(None, pair)) for pair in wanted)
        raise DataError(
            f"{self.source}: expected the text column {described}, got {names}; "
            "name it with --text-column (and --text-pair-column)"
        )

    @staticmethod
    def _index_labels(row: dict[str, Any], labels: LabelSet) -> None:
        for name in ("label", "true_label"):
            if name in row:
                index = labels.index(row[name])
                if index is None:
                    raise _BadRow(f"expected one of the labels {', '.join(labels.names)}, got {name} {row[name]!r}")
                row[name] = index

    def _index_from_rows(self, rows: list[dict[str, Any]], labels: LabelSet) -> None:
        bad = []
        for position, row in enumerate(rows):
            try:
                self._index_labels(row, labels)
            except _BadRow as problem:
                self._refuse(row["where"], problem)
                bad.append(position)
        for position in reversed(bad):
            del rows[position]


def _frame(rows: list[dict[str, Any]], paired: bool) -> pd.DataFrame:
    names = ["row", "text", *(["text_pair"] if paired else []), "label"]
    # truth that only some rows have says nothing about groups of rows
    names += [name for name in ("noise", "true_label") if all(name in row for row in rows)]
    return pd.DataFrame({name: [row[name] for row in rows] for name in names})


def _text(record: dict[str, Any], column: str) -> str:
    value = record.get(column)
    if value is None or (isinstance(value, float) and np.isnan(value)):
        raise _BadRow(f"expected text in column {column!r}, got none")
    if not isinstance(value, str):
        raise _BadRow(f"expected text in column {column!r}, got {type(value).__name__} {value!r}")
    if not value.strip():
        raise _BadRow(f"expected text in column {column!r}, got an empty one")
    # undecodable bytes were read as lone surrogates
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadRow(f"expected UTF-8 text in column {column!r}, got bytes that are not UTF-8")
    return value


def _label(record: dict[str, Any], column: str) -> str:
    try:
        label = canonical_label(record.get(column))
    except TypeError as error:
        raise _BadRow(f"label in column {column!r}: {error}") from error
    if label is None:
        raise _BadRow(f"expected a label in column {column!r}, got none")
    return label


def file_records(path: Path) -> Iterator[tuple[str, dict[str, Any] | _BadRow]]:
    """Rows of a file with their places, "line 7" or, in .parquet, "row 7"; an unreadable row comes as its problem."""
    suffix = _suffix(str(path))
    if not path.is_file():
        raise DataError(
            f"{path}: expected a file, got none at this path; check the name (the current folder is {Path.cwd()})"
        )
    try:
        if suffix == ".parquet":
            yield from _parquet_records(path)
            return
        opener = gzip.open if path.name.lower().endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _csv_records(file) if suffix in (".csv", ".csv.gz") else _jsonl_records(file)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: expected a readable {suffix} file, got {error}") from error


def _jsonl_records(file: IO[str]) -> Iterator[tuple[str, dict[str, Any] | _BadRow]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            yield (
                f"line {number}",
                _BadRow(f"expected one JSON object a line, got malformed JSON ({error.msg} at column {error.colno})"),
            )
            continue
        if isinstance(record, dict):
            yield f"line {number}", record
        else:
            yield f"line {number}", _BadRow(f"expected a JSON object, got {type(record).__name__}")


def _csv_records(file: IO[str]) -> Iterator[tuple[str, dict[str, Any] | _BadRow]]:
    # the default limit of 131072 characters a field is less than a long document
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        rows = csv.reader(file, strict=True)
        header: Sequence[str] | None = None
        while True:
            first = rows.line_num + 1
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"line {first}", _BadRow(f"expected a row of comma-separated values, got {error}")
                continue
            if not fields:
                continue
            if header is None:
                header = fields
            elif len(fields) != len(header):
                yield f"line {first}", _BadRow(f"expected {len(header)} fields as in the header, got {len(fields)}")
            else:
                yield f"line {first}", dict(zip(header, fields, strict=True))
    finally:
        csv.field_size_limit(limit)


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any] | _BadRow]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: expected a .parquet file, got {error}") from error


def _hub_records(
    source: str, columns: Columns, default_split: str, labels: LabelSet | None
) -> tuple[Iterator[tuple[str, dict[str, Any] | _BadRow]], LabelSet | None]:
    import datasets

    name, _, split = source.partition(":")
    name, _, configuration = name.partition("@")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split or default_split)
    except Exception as error:  # the packages below `datasets` raise many kinds
        raise DataError(
            f"{source}: expected a {', '.join(_FORMATS)} file or a dataset id that `datasets` can load as "
            f"name, name:split or name@configuration:split, got {type(error).__name__}: {error}"
        ) from error
    feature = rows.features.get(columns.label)
    if labels is None and isinstance(feature, datasets.ClassLabel):
        labels = LabelSet(tuple(feature.names))
    return ((f"row {number}", record) for number, record in enumerate(rows, start=1)), labels
