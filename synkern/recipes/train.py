"""``synkern train``: data sets in; table, plots, weights and models out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from synkern.recipes import plots, report
from synkern.recipes.checkpoint import load_state, save_state
from synkern.recipes.importance import METHODS, USES_DIVERSITY, USES_QUALITY, LossOptions, unweighted
from synkern.recipes.models import tensor_hash
from synkern.recipes.noise import add_noise
from synkern.recipes.report import MethodRun, Report
from synkern.recipes.runs import Bench, Data, read_parts, run_recipe, versions
from synkern.recipes.settings import TrainSettings
from synkern.recipes.training import Fit, log_probability, predict_logits, steps_per_epoch


def read_data(settings: TrainSettings) -> Data:
    """Read, sample and (with ``noise``) corrupt the data that the settings name.

    Raises:
        DataError: a source cannot be used.
    """
    data = read_parts(settings, settings.real)
    if not settings.noise:
        return data
    train = data.train
    noisy = add_noise(train.frame, len(train.labels.names), settings.noise_seed)
    return replace(data, train=replace(train, frame=noisy))


class Experiment(Bench):
    """All methods and seeds on one data set.

    Args:
        settings: resolved settings.
        data: what :func:`read_data` gave.
        show_progress: whether to print bars and a line an epoch to standard error.
    """

    def __init__(self, settings: TrainSettings, data: Data, show_progress: bool = True) -> None:
        super().__init__(settings, data, show_progress)
        self.settings = settings
        self._fingerprints = {name: part.fingerprint() for name, part in self.encoded.items()}
        self.checkers: list[dict[str, Any]] = []
        self.progress.expect(self._total_steps())

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
        description = self.describe(self.settings)
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
        return self.metrics(model, ("real", "test"))

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
            "parameters": tensor_hash(model),
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
    return run_recipe(
        settings,
        read_data,
        lambda resolved, data: Experiment(resolved, data, show_progress).run(),
        outputs=(*report.FILES, *plots.FILES),
        noisy=settings.noise,
        resume=resume,
        overwrite=overwrite,
    )
