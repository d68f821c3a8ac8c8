"""What ``synkern reweight`` leaves behind: results.json, tables, the weight of every row, a subset, plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from synkern.meta import SampleWeights
from synkern.recipes.data import LabelledText
from synkern.recipes.detection import detection, wrong_labels
from synkern.recipes.files import write_atomic, write_json, write_text
from synkern.recipes.plots import method_name
from synkern.recipes.recipe import Outcome
from synkern.recipes.report import RESULTS, TABLE, TIMINGS, WEIGHTS, cell, markdown_table, spread, spreads
from synkern.recipes.runs import write_rows
from synkern.recipes.settings import ReweightSettings
from synkern.recipes.sungen import draw_subset

ROWS, SUBSET = "rows.md", "subset.jsonl"
FILES = (RESULTS, TABLE, WEIGHTS, TIMINGS, ROWS, SUBSET)
# rows at each end of rows.md, and characters of a text shown there
_SHOWN, _SHOWN_CHARACTERS = 15, 300


@dataclass(frozen=True)
class ReweightRun:
    """One method with one seed."""

    method: str
    seed: int
    outcome: Outcome

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """A record for each epoch of the final training."""
        return self.outcome.history

    @property
    def weight(self) -> np.ndarray | None:
        """How far each training row is trusted, (N,)."""
        return None if self.outcome.weight is None else self.outcome.weight.numpy()

    @property
    def trace(self) -> np.ndarray:
        """The recorded weights (R, N), or the last ones alone; empty where the method has none."""
        kept = self.outcome.trace if self.outcome.trace is not None else self.outcome.weight
        return np.empty((0, 0), np.float32) if kept is None else np.atleast_2d(kept.numpy())


@dataclass(frozen=True)
class ReweightReport:
    """All that is written at the end; ``train``: the training rows; ``description`` goes into results.json as it is."""

    folder: Path
    description: dict[str, Any]
    settings: ReweightSettings
    train: LabelledText
    runs: list[ReweightRun]
    timings: dict[str, Any]

    @property
    def by_method(self) -> dict[str, list[ReweightRun]]:
        """The seeds of every method."""
        return {method: [run for run in self.runs if run.method == method] for method in self.settings.methods}

    def mean_weight(self, method: str) -> np.ndarray | None:
        """Mean over the seeds of each row's weight, (N,); None where the method has none."""
        weights = [run.weight for run in self.by_method[method] if run.weight is not None]
        return np.mean(weights, axis=0) if weights else None

    @property
    def shown_method(self) -> str | None:
        """The method whose weights are shown in detail: sungen, else the first that has any."""
        weighing = [method for method in self.settings.methods if self.mean_weight(method) is not None]
        return "sungen" if "sungen" in weighing else next(iter(weighing), None)

    def write(self) -> dict[str, Any]:
        """Write everything to ``folder``; return what is in results.json."""
        from synkern.recipes import reweight_plots

        wrong = wrong_labels(self.train.frame)
        results = {
            **self.description,
            "runs": [_run_record(run, wrong) for run in self.runs],
            "summary": {method: self._summary(method, wrong) for method in self.settings.methods},
        }
        table = weight_table(self)
        if table is not None:
            write_atomic(self.folder / WEIGHTS, lambda temporary: table.to_parquet(temporary, compression="zstd"))
        if self.shown_method is not None:
            self._write_rows(self.shown_method)
        reweight_plots.write_plots(self)
        write_text(self.folder / TABLE, markdown(self, results))
        write_json(self.folder / TIMINGS, self.timings)
        # last: where results.json is, the rest is
        write_json(self.folder / RESULTS, results)
        return results

    def _summary(self, method: str, wrong: np.ndarray | None) -> dict[str, Any]:
        runs = self.by_method[method]
        summary = {
            "last_epoch": spreads([run.epochs[-1] for run in runs]),
            "by_epoch": [spreads(list(records)) for records in zip(*(run.epochs for run in runs), strict=True)],
        }
        mean = self.mean_weight(method)
        if wrong is None or mean is None:
            return summary
        found = [detection(run.weight, wrong) for run in runs if run.weight is not None]
        names = [name for name in ("auroc", "precision_at_wrong") if found[0][name] is not None]
        summary["detection"] = {name: spread([float(record[name] or 0) for record in found]) for name in names}
        summary["detection_by_mean_weight"] = detection(mean, wrong)
        return summary

    def _write_rows(self, method: str) -> None:
        """The rows of least and greatest mean weight, and a subset drawn by the mean weights."""
        mean = self.mean_weight(method)
        assert mean is not None
        write_text(self.folder / ROWS, extreme_rows(self.train, mean, method))
        # the table wants weights up to 1, and only their ratios count here
        share = torch.from_numpy(mean).float() / float(mean.max())
        weights = SampleWeights(len(mean), init=share, parametrization="clamp")
        chosen = draw_subset(weights, self.settings, seed=0)
        frame = self.train.frame.assign(weight=mean).iloc[chosen].reset_index(drop=True)
        write_rows(self.folder / SUBSET, LabelledText(frame, self.train.labels, self.train.source))


def _run_record(run: ReweightRun, wrong: np.ndarray | None) -> dict[str, Any]:
    record: dict[str, Any] = {"method": run.method, "seed": run.seed, "epochs": run.epochs}
    if run.outcome.iterations is not None:
        record["iterations"] = run.outcome.iterations
    if run.outcome.recorded is not None:
        record["recorded"] = run.outcome.recorded
    if wrong is not None and run.weight is not None:
        record["detection"] = detection(run.weight, wrong)
    return record


def weight_table(report: ReweightReport) -> pd.DataFrame | None:
    """One row for every training row, method and seed; None if no method has weights.

    ``history`` lists the row's weights at the iterations (or epochs) that results.json calls ``recorded``.
    """
    kept = [name for name in ("row", "label", "true_label") if name in report.train.frame]
    train = report.train.frame[kept].rename_axis("index").reset_index()
    parts = []
    for run in report.runs:
        if run.weight is None:
            continue
        columns = {"method": run.method, "seed": run.seed, "weight": run.weight, "history": list(run.trace.T)}
        parts.append(train.assign(**columns))
    return pd.concat(parts, ignore_index=True) if parts else None


def extreme_rows(train: LabelledText, weight: np.ndarray, method: str) -> str:
    """The rows of least and of greatest weight, as Markdown (000 Table 6)."""
    order = np.argsort(weight, kind="stable")
    count = min(_SHOWN, len(order) // 2)
    parts = [
        f"# Removed: the least weights of {method_name(method)}\n",
        _row_table(train, weight, order[:count]),
        "# Selected: the greatest weights\n",
        _row_table(train, weight, order[::-1][:count]),
    ]
    return "\n".join(parts)


def _row_table(train: LabelledText, weight: np.ndarray, rows: np.ndarray) -> str:
    names, frame = train.labels.names, train.frame
    known = "true_label" in frame
    lines = []
    for row in rows:
        record = frame.iloc[row]
        text = " / ".join(record[name] for name in ("text", "text_pair") if name in frame)
        if len(text) > _SHOWN_CHARACTERS:
            text = text[:_SHOWN_CHARACTERS].rsplit(" ", 1)[0] + " ..."
        truth = [names[record["true_label"]]] if known else []
        # a bar or a line break would end the cell
        text = " ".join(text.replace("|", "\\|").split())
        lines.append([text, names[record["label"]], *truth, f"{weight[row]:.4f}"])
    return markdown_table(["text", "label", *(["true label"] if known else []), "weight"], lines)


def markdown(report: ReweightReport, results: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    summary, methods = results["summary"], report.settings.methods
    seeds = report.settings.seeds
    note = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    epochs = [str(record["epoch"]) for record in report.runs[0].epochs]
    parts = [
        f"# Test accuracy in % by epoch, and macro F1 of the last one, {note}\n",
        markdown_table(
            ["method", *(f"epoch {number}" for number in epochs), "macro F1"],
            [
                [
                    method_name(method),
                    *(cell(record["accuracy"]) for record in summary[method]["by_epoch"]),
                    cell(summary[method]["last_epoch"]["macro_f1"]),
                ]
                for method in methods
            ],
        ),
    ]
    found = [method for method in methods if summary[method].get("detection")]
    if found:
        base = summary[found[0]]["detection_by_mean_weight"]
        parts += [
            f"# Finding the {base['wrong']} wrong labels among {base['rows']} rows, in %\n",
            markdown_table(
                ["method", "AUROC", "precision at that many rows", "AUROC of the seeds' mean weight"],
                [
                    [
                        method_name(method),
                        cell(summary[method]["detection"]["auroc"]),
                        cell(summary[method]["detection"]["precision_at_wrong"]),
                        f"{100 * summary[method]['detection_by_mean_weight']['auroc']:.1f}",
                    ]
                    for method in found
                ],
            ),
        ]
    return "\n".join(parts)
