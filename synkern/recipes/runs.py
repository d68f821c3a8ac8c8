"""What every recipe's run has: data sets read and checked, an output folder that is never mixed up, its description."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from synkern.recipes.data import Columns, LabelledText, LabelSet, read_labelled
from synkern.recipes.errors import DataError, RecipeError
from synkern.recipes.files import write_atomic, write_json
from synkern.recipes.models import EncodedText, ModelFamily, model_family
from synkern.recipes.progress import Progress
from synkern.recipes.settings import MAY_GROW, Settings, flag
from synkern.recipes.training import classification_metrics, predict_logits

RUN_FILE, NOISY_FILE = "run.json", "train_noisy.jsonl"
_FOLDERS = ("checkpoints", "runs", "models")
AnySettings = TypeVar("AnySettings", bound=Settings)


@dataclass(frozen=True)
class Data:
    """The training rows, the rows to test on and, where the recipe has them, trusted ("real") rows; one label set."""

    train: LabelledText
    test: LabelledText
    real: LabelledText | None = None

    def parts(self) -> dict[str, LabelledText]:
        """The data sets by name."""
        real = {} if self.real is None else {"real": self.real}
        return {"train": self.train, **real, "test": self.test}


def read_parts(settings: Settings, real: str | None) -> Data:
    """Read and sample the data that the settings name.

    Args:
        settings: of any recipe.
        real: source of the trusted rows, if there are any.

    Raises:
        DataError: a source cannot be used.
    """
    columns = Columns(
        settings.text_column, settings.text_pair_column, settings.label_column, true_label=settings.true_label_column
    )
    read = partial(read_labelled, columns=columns, skip_bad_rows=settings.skip_bad_rows)
    labels = LabelSet.from_option(settings.labels) if settings.labels else None
    train = read(settings.train, labels=labels, default_split="train")
    if len(train.labels.names) < 2:
        raise DataError(
            f"{settings.train}: expected at least 2 different labels in column {settings.label_column!r}, "
            f"got {', '.join(train.labels.names)}; name another column with --label-column"
        )
    trusted = None
    if real is not None:
        trusted = read(real, labels=train.labels, default_split="validation").sample(settings.limit_real)
    test = read(settings.test, labels=train.labels, default_split="test").sample(settings.limit_test)
    return Data(train.sample(settings.limit_train), test, trusted)


def overlap_warnings(data: Data) -> list[str]:
    """A line for each two parts that share texts, without which a test tells little."""
    parts = data.parts()
    texts = {
        name: set(map(tuple, part.frame.filter(["text", "text_pair"]).to_numpy().tolist()))
        for name, part in parts.items()
    }
    pairs = [pair for pair in (("test", "train"), ("test", "real"), ("real", "train")) if {*pair} <= set(parts)]
    shared = {(one, other): len(texts[one] & texts[other]) for one, other in pairs}
    return [
        f"{count} texts of {parts[one].source} ({one}) also stand in {parts[other].source} ({other})"
        for (one, other), count in shared.items()
        if count
    ]


def _label_counts(part: LabelledText) -> dict[str, int]:
    counts = part.frame["label"].value_counts()
    return {name: int(counts.get(index, 0)) for index, name in enumerate(part.labels.names)}


def write_rows(path: Path, data: LabelledText) -> None:
    """Write rows as JSON lines that :func:`read_labelled` reads back; labels by name."""
    frame = data.frame.rename(columns={"text": "text_a", "text_pair": "text_b"}) if data.paired else data.frame
    names = dict(enumerate(data.labels.names))
    frame = frame.assign(**{name: frame[name].map(names) for name in ("label", "true_label") if name in frame})
    write_atomic(path, lambda temporary: frame.to_json(temporary, orient="records", lines=True, force_ascii=False))


def versions() -> dict[str, str]:
    """Versions that the numbers may depend on."""
    result = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for package in ("synkern", "transformers", "tokenizers"):
        with contextlib.suppress(PackageNotFoundError):
            result[package] = version(package)
    return result


@contextlib.contextmanager
def fixed_arithmetic(device: str, threads: int) -> Iterator[None]:
    """Fix the number of threads and, on a GPU, deterministic kernels: the same run gives the same bits."""
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)


class Bench:
    """The data sets as tokens, the family of models to fit on them, and the bars.

    Args:
        settings: resolved settings.
        data: the data sets.
        show_progress: whether to print bars and a line an epoch to standard error.
    """

    def __init__(self, settings: Settings, data: Data, show_progress: bool = True) -> None:
        self.data = data
        self.device = torch.device(settings.device)
        self.folder = settings.folder
        texts = [data.train] if data.real is None else [data.train, data.real]
        self.family: ModelFamily = model_family(settings.model, settings.max_length, *texts)
        self.encoded: dict[str, EncodedText] = {name: self.family.encode(part) for name, part in data.parts().items()}
        self.timings: dict[str, float] = {}
        self.progress = Progress(show=show_progress)

    def describe(self, settings: Settings) -> dict[str, Any]:
        """Settings, versions and data, for results.json."""
        return {
            "settings": settings.to_json(),
            "versions": versions(),
            "data": {
                name: {
                    "source": part.source,
                    "rows": len(part),
                    "rows_skipped": len(part.skipped),
                    "label_counts": _label_counts(part),
                }
                for name, part in self.data.parts().items()
            },
            "labels": list(self.data.train.labels.names),
            "warnings": overlap_warnings(self.data),
        }

    def metrics(self, model: nn.Module, parts: Sequence[str]) -> dict[str, Any]:
        """Accuracy, macro F1 and loss on the named parts."""
        data = {name: self.encoded[name] for name in parts}
        return {
            name: classification_metrics(predict_logits(model, part, self.device), part.target)
            for name, part in data.items()
        }


def run_recipe(
    settings: AnySettings,
    read: Callable[[AnySettings], Data],
    experiment: Callable[[AnySettings, Data], dict[str, Any]],
    *,
    outputs: Sequence[str],
    noisy: bool,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Check the output folder, read the data, run.

    Args:
        settings: not yet resolved.
        read: gives the data.
        experiment: does the work in the output folder; gives what is in results.json.
        outputs: names of the files it writes there, beside the folders that all recipes have.
        noisy: whether ``read`` changed the training rows, so that they are to be written too.
        resume: go on in an output folder that exists; finished runs are kept.
        overwrite: empty an output folder that exists, but for the cache.

    Raises:
        DataError: data that cannot be used.
        RecipeError: settings that cannot be used, an output folder that exists, or one that does not fit on ``resume``.
        Interrupted: SIGINT or SIGTERM came; ``resume`` goes on from there.
    """
    settings = settings.resolved()
    assert settings.threads is not None
    _check_folder(settings.folder, resume=resume, overwrite=overwrite)
    with fixed_arithmetic(settings.device, settings.threads):
        data = read(settings)
        for warning in overlap_warnings(data):
            warnings.warn(warning, stacklevel=3)
        if overwrite:
            _empty_folder(settings.folder, outputs)
        _open_run(settings, data, resume=resume)
        if noisy:
            write_rows(settings.folder / NOISY_FILE, data.train)
        return experiment(settings, data)


def _check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--out {folder}: expected a folder, got a file; choose another name")
    if not folder.exists() or not any(folder.iterdir()):
        if resume:
            raise RecipeError(f"--resume: expected an earlier run in {folder}, got none; leave out --resume")
    elif not (folder / RUN_FILE).is_file():
        raise RecipeError(
            f"--out {folder}: expected an absent or empty folder, or one of an earlier run, got other "
            "files; choose another folder"
        )
    elif not (resume or overwrite):
        raise RecipeError(
            f"--out {folder}: expected an absent or empty folder, got an earlier run; go on with "
            "--resume, start again with --overwrite, or choose another folder"
        )


def _empty_folder(folder: Path, outputs: Sequence[str]) -> None:
    # run.json stays until it is replaced, and marks the folder as ours; the cache goes by content and cannot be stale
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (*outputs, NOISY_FILE):
        (folder / name).unlink(missing_ok=True)


def _open_run(settings: Settings, data: Data, *, resume: bool) -> None:
    """Write run.json; on ``resume``, after a check that it belongs to the same settings and data."""
    path = settings.folder / RUN_FILE
    record: dict[str, Any] = {
        "recipe": type(settings).__name__,
        "settings": settings.to_json(),
        "versions": versions(),
        "data": {name: part.fingerprint() for name, part in data.parts().items()},
    }
    if resume:
        before = _stored_run(settings.folder, type(settings))
        for name, value in record["settings"].items():
            if name not in (*MAY_GROW, "out") and before["settings"].get(name) != value:
                raise RecipeError(
                    f"--resume: expected {flag(name)} {before['settings'].get(name)} as in "
                    f"the earlier run, got {value}; leave the option out, or choose another --out"
                )
        for name, fingerprint in record["data"].items():
            if before["data"][name] != fingerprint:
                raise RecipeError(
                    f"--resume: expected the same {name} rows as in the earlier run, got other ones from "
                    f"{getattr(settings, name)}; bring the old file back, or start again with --overwrite"
                )
        if before["versions"] != record["versions"]:
            raise RecipeError(
                f"--resume: expected the versions {before['versions']} of the earlier run, got "
                f"{record['versions']}; the numbers could differ: start again with --overwrite"
            )
    write_json(path, record)


def _stored_run(folder: Path, kind: type[Settings]) -> dict[str, Any]:
    path = folder / RUN_FILE
    if not path.is_file():
        raise RecipeError(f"--resume: expected an earlier run in {folder}, got no {RUN_FILE} there; leave out --resume")
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("recipe") != kind.__name__:
        raise RecipeError(
            f"--resume: expected an earlier run of the same command in {folder}, got one of another command; "
            "choose another --out"
        )
    return record


def stored_settings(out: Path, kind: type[AnySettings]) -> AnySettings:
    """Settings of an earlier run in the folder ``out``.

    Raises:
        RecipeError: there is none, or one of another command.
    """
    return kind.from_json(_stored_run(out, kind)["settings"])
