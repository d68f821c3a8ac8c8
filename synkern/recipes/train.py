"""``synkern train``: data sets in; table, plots, weights and models out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from synkern.recipes import plots, report
from synkern.recipes.checkpoint import load_state, save_state
from synkern.recipes.data import Columns, LabelledText, LabelSet, read_labelled
from synkern.recipes.errors import DataError, RecipeError
from synkern.recipes.files import write_atomic, write_json
from synkern.recipes.importance import METHODS, USES_DIVERSITY, USES_QUALITY, LossOptions, unweighted
from synkern.recipes.models import EncodedText, ModelFamily, model_family
from synkern.recipes.noise import add_noise
from synkern.recipes.progress import Progress
from synkern.recipes.report import MethodRun, Report
from synkern.recipes.settings import MAY_GROW, TrainSettings
from synkern.recipes.training import (
    Fit,
    classification_metrics,
    log_probability,
    predict_logits,
    steps_per_epoch,
)

RUN_FILE, NOISY_FILE = "run.json", "train_noisy.jsonl"
_FOLDERS = ("checkpoints", "runs", "models")


@dataclass(frozen=True)
class Data:
    """The three data sets: D_Q ("train"), D_P' ("real") and the rows to test on, with one label set."""

    train: LabelledText
    real: LabelledText
    test: LabelledText

    def parts(self) -> dict[str, LabelledText]:
        """The data sets by name."""
        return {"train": self.train, "real": self.real, "test": self.test}


def read_data(settings: TrainSettings) -> Data:
    """Read, sample and (with ``noise``) corrupt the data that the settings name.

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
    real = read(settings.real, labels=train.labels, default_split="validation").sample(settings.limit_real)
    test = read(settings.test, labels=train.labels, default_split="test").sample(settings.limit_test)
    train = train.sample(settings.limit_train)
    if settings.noise:
        noisy = add_noise(train.frame, len(train.labels.names), settings.noise_seed)
        train = LabelledText(noisy, train.labels, train.source, train.skipped)
    return Data(train, real, test)


def overlap_warnings(data: Data) -> list[str]:
    """A line for each two parts that share texts, without which a test tells little."""
    parts = data.parts()
    texts = {
        name: set(map(tuple, part.frame.filter(["text", "text_pair"]).to_numpy().tolist()))
        for name, part in parts.items()
    }
    pairs = (("test", "train"), ("test", "real"), ("real", "train"))
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


def _tensor_hash(model: nn.Module) -> str:
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Experiment:
    """All methods and seeds on one data set.

    Args:
        settings: resolved settings.
        data: what :func:`read_data` gave.
        show_progress: whether to print bars and a line an epoch to standard error.
    """

    def __init__(self, settings: TrainSettings, data: Data, show_progress: bool = True) -> None:
        self.settings, self.data = settings, data
        self.device = torch.device(settings.device)
        self.folder = settings.folder
        self.family: ModelFamily = model_family(settings.model, settings.max_length, data.train, data.real)
        self.encoded: dict[str, EncodedText] = {name: self.family.encode(part) for name, part in data.parts().items()}
        self._fingerprints = {name: part.fingerprint() for name, part in self.encoded.items()}
        self.checkers: list[dict[str, Any]] = []
        self.timings: dict[str, float] = {}
        self.progress = Progress(self._total_steps(), show_progress)

    def _total_steps(self) -> int:
        settings = self.settings
        train, real = (steps_per_epoch(len(self.encoded[name]), settings.batch_size) for name in ("train", "real"))
        checker_epochs = settings.checker_epochs
        once = len(settings.methods) * settings.epochs * train
        once += bool(set(settings.methods) & set(USES_QUALITY)) * checker_epochs * real
        once += bool(set(settings.methods) & set(USES_DIVERSITY)) * checker_epochs * train
        return once * settings.seeds

    def run(self) -> dict[str, Any]:
        """Train what is not trained yet; write and return the results."""
        results = []
        try:
            for seed in range(self.settings.seeds):
                checkers = CachedCheckers(self, seed)
                for method in self.settings.methods:
                    results.append(self._run_method(method, seed, checkers))
        finally:
            self.progress.close()
        return self._report(results).write()

    def _report(self, runs: list[MethodRun]) -> Report:
        parts = self.data.parts()
        description = {
            "settings": self.settings.to_json(),
            "versions": versions(),
            "data": {
                name: {
                    "source": part.source,
                    "rows": len(part),
                    "rows_skipped": len(part.skipped),
                    "label_counts": _label_counts(part),
                }
                for name, part in parts.items()
            },
            "labels": list(self.data.train.labels.names),
            "warnings": overlap_warnings(self.data),
        }
        return Report(self.folder, description, self.data.train.frame, runs, self.checkers, self.timings)

    def _run_method(self, method: str, seed: int, checkers: CachedCheckers) -> MethodRun:
        name = f"{method}-seed{seed}"
        finished = self.folder / "runs" / f"{name}.safetensors"
        # asked for also where the run is finished: the report shows the checkers' scores
        row_loss = METHODS[method](checkers, LossOptions(self.settings.gamma, self.settings.max_weight))
        if finished.exists():
            steps = steps_per_epoch(len(self.encoded["train"]), self.settings.batch_size)
            self.progress.skip(self.settings.epochs * steps)
        else:
            checkpoint = self.folder / "checkpoints" / f"{name}.safetensors"
            model = self.family.build(seed)
            state = Fit(
                model,
                self.encoded["train"],
                row_loss,
                self.settings.fit(self.settings.epochs),
                seed=seed,
                name=f"{method} seed {seed}",
                device=self.device,
                checkpoint=checkpoint,
                evaluate=self.evaluate,
                progress=self.progress,
            ).run()
            if self.settings.keep_models == "all" or (self.settings.keep_models == "first" and seed == 0):
                self.family.save(self.folder / "models" / name, model)
            save_state(
                finished,
                {
                    "history": state.history,
                    "seconds": state.seconds,
                    "weight": state.weight,
                    "probability": state.probability,
                },
            )
            checkpoint.unlink(missing_ok=True)
        saved = load_state(finished)
        self.timings[name] = saved["seconds"]
        return MethodRun(
            method,
            seed,
            saved["history"],
            saved["weight"].numpy(),
            saved["probability"].numpy(),
            checkers.known("quality"),
            checkers.known("diversity"),
        )

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Accuracy, macro F1 and loss on the real and the test rows."""
        parts = {name: self.encoded[name] for name in ("real", "test")}
        return {
            name: classification_metrics(predict_logits(model, part, self.device), part.target)
            for name, part in parts.items()
        }

    def checker_scores(self, kind: str, fit_on: str, seed: int) -> Tensor:
        """log P(y|x) of every training row by a checker fitted on the part ``fit_on``, (N,); fitted once, then cached.

        The cache's key is a hash of everything that decides the scores: initial parameters, tokens and labels of
        all parts, settings of the fit, seed, device, threads and versions.
        """
        fit = self.settings.fit(self.settings.checker_epochs)
        model = self.family.build(seed)
        description = {
            "fit": asdict(fit),
            "fit_on": fit_on,
            "seed": seed,
            "parameters": _tensor_hash(model),
            "data": self._fingerprints,
            "device": str(self.device),
            "threads": self.settings.threads,
            "versions": versions(),
        }
        key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        cached = self.folder / "cache" / f"{kind}-seed{seed}-{key[:20]}.safetensors"
        if cached.exists():
            self.progress.skip(fit.epochs * steps_per_epoch(len(self.encoded[fit_on]), fit.batch_size))
        else:
            checkpoint = self.folder / "checkpoints" / cached.name
            state = Fit(
                model,
                self.encoded[fit_on],
                unweighted,
                fit,
                seed=seed,
                name=f"{kind} checker seed {seed}",
                device=self.device,
                checkpoint=checkpoint,
                progress=self.progress,
            ).run()
            train = self.encoded["train"]
            scores = log_probability(predict_logits(model, train, self.device), train.target)
            save_state(cached, {"log_score": scores, "metrics": self.evaluate(model), "seconds": state.seconds})
            checkpoint.unlink(missing_ok=True)
        saved = load_state(cached)
        self.checkers.append({"checker": kind, "seed": seed, **saved["metrics"]})
        self.timings[f"{kind}-checker-seed{seed}"] = saved["seconds"]
        return saved["log_score"]


class CachedCheckers:
    """Quality and diversity checker of one seed, made when first asked for and shared by all methods."""

    def __init__(self, experiment: Experiment, seed: int) -> None:
        self._experiment, self._seed = experiment, seed
        self._scores: dict[str, Tensor] = {}

    def _log_score(self, kind: str, fit_on: str) -> Tensor:
        if kind not in self._scores:
            self._scores[kind] = self._experiment.checker_scores(kind, fit_on, self._seed)
        return self._scores[kind].to(self._experiment.device)

    def quality(self) -> Tensor:
        """log P'(y_i|x_i) of the training rows, (N,), by a model fitted on the real rows."""
        return self._log_score("quality", "real")

    def diversity(self) -> Tensor:
        """log Q(y_i|x_i) of the training rows, (N,), by a model fitted on the training rows."""
        return self._log_score("diversity", "train")

    def known(self, kind: str) -> np.ndarray | None:
        """Scores P(y_i|x_i) of a checker if a method has asked for it, else None."""
        return self._scores[kind].exp().numpy() if kind in self._scores else None


def run_train(
    settings: TrainSettings, *, resume: bool = False, overwrite: bool = False, show_progress: bool = True
) -> dict[str, Any]:
    """Train every method with every seed and write the report.

    Args:
        settings: what to do.
        resume: go on in an output folder that exists; finished runs are kept, an unfinished one goes on where its last
            checkpoint left it, to the same numbers as without the break.
        overwrite: empty an output folder that exists, but for cached checkers.
        show_progress: print bars and a line an epoch to standard error.

    Returns:
        What is in results.json.

    Raises:
        DataError: data that cannot be used.
        RecipeError: settings that cannot be used, an output folder that exists, or one that does not fit on ``resume``.
        Interrupted: SIGINT or SIGTERM came; ``resume`` goes on from there.
    """
    settings = settings.resolved()
    assert settings.threads is not None
    _check_folder(settings.folder, resume=resume, overwrite=overwrite)
    with fixed_arithmetic(settings.device, settings.threads):
        data = read_data(settings)
        for warning in overlap_warnings(data):
            warnings.warn(warning, stacklevel=2)
        if overwrite:
            _empty_folder(settings.folder)
        _open_run(settings, data, resume=resume)
        if settings.noise:
            write_rows(settings.folder / NOISY_FILE, data.train)
        return Experiment(settings, data, show_progress).run()


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


def _empty_folder(folder: Path) -> None:
    # run.json stays until it is replaced, and marks the folder as ours; the cache goes by content and cannot be stale
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (*report.FILES, *plots.FILES, NOISY_FILE):
        (folder / name).unlink(missing_ok=True)


def _open_run(settings: TrainSettings, data: Data, *, resume: bool) -> None:
    """Write run.json; on ``resume``, after a check that it belongs to the same settings and data."""
    path = settings.folder / RUN_FILE
    record = {
        "settings": settings.to_json(),
        "versions": versions(),
        "data": {name: part.fingerprint() for name, part in data.parts().items()},
    }
    if resume:
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in record["settings"].items():
            if name not in (*MAY_GROW, "out") and before["settings"].get(name) != value:
                raise RecipeError(
                    f"--resume: expected --{name.replace('_', '-')} {before['settings'].get(name)} as in "
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


def stored_settings(out: Path) -> TrainSettings:
    """Settings of an earlier run in the folder ``out``.

    Raises:
        RecipeError: there is none.
    """
    path = out / RUN_FILE
    if not path.is_file():
        raise RecipeError(f"--resume: expected an earlier run in {out}, got no {RUN_FILE} there; leave out --resume")
    return TrainSettings.from_json(json.loads(path.read_text(encoding="utf-8"))["settings"])
