"""``synkern reweight``: rows of doubtful labels in; weights, a cleaned subset, models, tables and plots out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from synkern.recipes import reweight_plots, reweight_report
from synkern.recipes.checkpoint import load_state, save_state
from synkern.recipes.detection import wrong_labels
from synkern.recipes.noise import flip_labels
from synkern.recipes.recipe import Outcome, Task
from synkern.recipes.reweight_report import ReweightReport, ReweightRun
from synkern.recipes.rivals import RIVALS
from synkern.recipes.runs import Bench, Data, read_parts, run_recipe
from synkern.recipes.settings import ReweightSettings
from synkern.recipes.sungen import sungen
from synkern.recipes.training import steps_per_epoch

METHODS: dict[str, Callable[[Task], Outcome]] = {"sungen": sungen, **RIVALS}
# methods that start from the outcome of another one
_NEEDS = {"confidence": "zerogen"}


def read_data(settings: ReweightSettings) -> Data:
    """Read, sample and (with ``flip_labels``) corrupt the data that the settings name.

    Raises:
        DataError: a source cannot be used.
    """
    data = read_parts(settings, settings.real)
    if not settings.flip_labels:
        return data
    train = data.train
    frame = flip_labels(train.frame, settings.flip_labels, len(train.labels.names), settings.noise_seed)
    return replace(data, train=replace(train, frame=frame))


class Reweighting(Bench):
    """All methods and seeds on one data set.

    Args:
        settings: resolved settings.
        data: what :func:`read_data` gave.
        show_progress: whether to print bars and lines to standard error.
    """

    def __init__(self, settings: ReweightSettings, data: Data, show_progress: bool = True) -> None:
        super().__init__(settings, data, show_progress)
        self.settings = settings
        self.wrong = wrong_labels(data.train.frame)
        self.progress.expect(self._total_steps())

    def _total_steps(self) -> int:
        methods = {*self.settings.methods, *(_NEEDS[name] for name in self.settings.methods if name in _NEEDS)}
        return self.settings.seeds * sum(self._steps(method) for method in methods)

    def _steps(self, method: str) -> int:
        """Optimisation steps of one seed."""
        settings, rows = self.settings, len(self.encoded["train"])
        subset = method == "confidence" or (method == "sungen" and settings.train_on_subset)
        assert settings.epochs is not None
        last = settings.epochs * steps_per_epoch(settings.budget_rows(rows) if subset else rows, settings.batch_size)
        if method != "sungen":
            return last
        inner = settings.inner(rows)
        return last + settings.iterations * inner.epochs * steps_per_epoch(rows, inner.batch_size)

    def run(self) -> dict[str, Any]:
        """Run what has not been run yet; write and return the results."""
        settings, runs = self.settings, []
        try:
            for seed in range(settings.seeds):
                runs += [ReweightRun(method, seed, self.outcome(method, seed)) for method in settings.methods]
        finally:
            self.progress.close()
        description = {**self.describe(settings), "scaled": self._scaled()}
        return ReweightReport(self.folder, description, settings, self.data.train, runs, self.timings).write()

    def _scaled(self) -> dict[str, int]:
        """What the settings leave to the number of rows."""
        rows = len(self.encoded["train"])
        outer = self.settings.outer_rows(rows) if self.data.real is None else len(self.data.real)
        return {
            "outer_rows": outer,
            "inner_epochs": self.settings.inner(rows).epochs,
            "inner_batch_size": self.settings.inner_batch(rows),
            "budget_rows": self.settings.budget_rows(rows),
        }

    def outcome(self, method: str, seed: int) -> Outcome:
        """The outcome of one method with one seed: run the first time, read from its file afterwards."""
        name = f"{method}-seed{seed}"
        finished = self.folder / "runs" / f"{name}.safetensors"
        if not finished.exists():
            self._run(method, seed, name, finished)
        elif name not in self.timings:
            self.progress.skip(self._steps(method))
        saved = load_state(finished)
        self.timings[name] = saved["seconds"]
        return Outcome(model=None, **saved)

    def _run(self, method: str, seed: int, name: str, finished: Path) -> None:
        outcome = METHODS[method](self._task(method, seed))
        keep = self.settings.keep_models
        if keep == "all" or (keep == "first" and seed == 0):
            assert outcome.model is not None
            self.family.save(self.folder / "models" / name, outcome.model)
        save_state(finished, {key: value for key, value in vars(outcome).items() if key != "model"})
        for path in (self.folder / "checkpoints").glob(f"{name}-*.safetensors"):
            path.unlink()
        self.timings[name] = 0.0

    def _task(self, method: str, seed: int) -> Task:
        train = self.encoded["train"]
        outer, outer_rows = self.encoded.get("real"), None
        if outer is None:
            # the same for every seed and method, as the training rows are
            generator = np.random.default_rng(self.settings.noise_seed)
            chosen = generator.choice(len(train), size=self.settings.outer_rows(len(train)), replace=False)
            outer_rows = np.sort(chosen)
            outer = train.take(outer_rows)
        name = f"{method}-seed{seed}"
        return Task(
            name=f"{method} seed {seed}",
            seed=seed,
            settings=self.settings,
            family=self.family,
            train=train,
            outer=outer,
            outer_rows=outer_rows,
            wrong=self.wrong,
            device=self.device,
            progress=self.progress,
            checkpoint=lambda part: self.folder / "checkpoints" / f"{name}-{part}.safetensors",
            evaluate=lambda model: self.metrics(model, ("test",)),
            outcome_of=lambda other: self.outcome(other, seed),
        )


def run_reweight(
    settings: ReweightSettings, *, resume: bool = False, overwrite: bool = False, show_progress: bool = True
) -> dict[str, Any]:
    """Run every method with every seed and write the report.

    Args:
        settings: what to do.
        resume: go on in an output folder that exists; finished runs are kept, an unfinished one goes on where its last
            checkpoint is and ends with the same bits.
        overwrite: empty an output folder that exists.
        show_progress: print bars and lines to standard error.

    Returns:
        What is in results.json.

    Raises:
        DataError: data that cannot be used.
        RecipeError: settings that cannot be used, an output folder that exists, or one that does not fit on ``resume``.
        Interrupted: SIGINT or SIGTERM came; ``resume`` goes on from there.
    """
    return run_recipe(
        settings,
        read_data,
        lambda resolved, data: Reweighting(resolved, data, show_progress).run(),
        outputs=(*reweight_report.FILES, *reweight_plots.FILES),
        noisy=settings.flip_labels > 0,
        resume=resume,
        overwrite=overwrite,
    )
