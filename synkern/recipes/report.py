"""What a recipe leaves behind: results.json, a table, plots, and the weight of every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from synkern.recipes.files import write_atomic, write_json, write_text
from synkern.recipes.noise import GROUPS, known_groups

RESULTS, TABLE, WEIGHTS, TIMINGS = "results.json", "table.md", "weights.parquet", "timings.json"
FILES = (RESULTS, TABLE, WEIGHTS, TIMINGS)
# beyond this many entries weights.parquet holds the last epoch only
_MAX_WEIGHT_ROWS = 5_000_000


@dataclass(frozen=True)
class MethodRun:
    """One method with one seed.

    ``epochs`` has a record for every epoch; ``weight`` and ``probability`` (epochs, N) hold the weight of each training
    row and the model's probability of its label when it was trained on; ``quality`` and ``diversity`` (N,) are the
    checkers' scores, None where the method has no such checker.
    """

    method: str
    seed: int
    epochs: list[dict[str, Any]]
    weight: np.ndarray
    probability: np.ndarray
    quality: np.ndarray | None = None
    diversity: np.ndarray | None = None

    @property
    def best_on_real(self) -> dict[str, Any]:
        """The first of the epochs with the highest accuracy on the real rows."""
        return max(self.epochs, key=lambda record: record["real"]["accuracy"])


@dataclass(frozen=True)
class Report:
    """All that is written at the end of a recipe.

    ``train`` has a row for each row of ``weight``, with the columns of :class:`LabelledText`; ``description`` goes into
    results.json as it is.
    """

    folder: Path
    description: dict[str, Any]
    train: pd.DataFrame
    runs: list[MethodRun]
    checkers: list[dict[str, Any]]
    timings: dict[str, float]

    @property
    def methods(self) -> list[str]:
        """Methods in the order they were run."""
        return list(dict.fromkeys(run.method for run in self.runs))

    def of(self, method: str) -> list[MethodRun]:
        """All seeds of a method."""
        return [run for run in self.runs if run.method == method]

    def write(self) -> dict[str, Any]:
        """Write everything to ``folder``; return what is in results.json."""
        from synkern.recipes import plots

        results = {
            **self.description,
            "runs": [
                {
                    "method": run.method,
                    "seed": run.seed,
                    "epochs": run.epochs,
                    "best_epoch_on_real": run.best_on_real["epoch"],
                }
                for run in self.runs
            ],
            "checkers": self.checkers,
            "summary": {method: self._summary(method) for method in self.methods},
        }
        groups = group_means(self)
        if groups is not None:
            # JSON has no NaN
            results["groups"] = groups.astype(object).where(groups.notna(), None).to_dict(orient="records")
        table = weight_table(self)
        write_atomic(self.folder / WEIGHTS, lambda temporary: table.to_parquet(temporary, compression="zstd"))
        plots.write_plots(self, groups)
        write_text(self.folder / TABLE, markdown(self, results))
        write_json(self.folder / TIMINGS, self.timings)
        # last: where results.json is, the rest is
        write_json(self.folder / RESULTS, results)
        return results

    def _summary(self, method: str) -> dict[str, Any]:
        runs = self.of(method)
        return {
            "last_epoch": spreads([run.epochs[-1] for run in runs]),
            "best_epoch_on_real": spreads([run.best_on_real for run in runs]),
            "by_epoch": [spreads(list(records)) for records in zip(*(run.epochs for run in runs), strict=True)],
        }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, sample standard deviation (None for a single value), least and greatest value."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": deviation, "min": float(min(values)), "max": float(max(values))}


def spreads(records: list[dict[str, Any]]) -> dict[str, Any]:
    """:func:`spread` of test accuracy, macro F1 and loss."""
    return {name: spread([record["test"][name] for record in records]) for name in ("accuracy", "macro_f1", "loss")}


def weight_table(report: Report) -> pd.DataFrame:
    """One row for every training row, method, seed and epoch (the last epoch only, if there would be very many)."""
    last_only = sum(run.weight.size for run in report.runs) > _MAX_WEIGHT_ROWS
    kept = [name for name in ("row", "label", "noise", "true_label") if name in report.train]
    train = report.train[kept].rename_axis("index").reset_index()
    parts = []
    for run in report.runs:
        for epoch in range(len(run.weight) - 1 if last_only else 0, len(run.weight)):
            parts.append(
                train.assign(
                    method=run.method,
                    seed=run.seed,
                    epoch=epoch + 1,
                    weight=run.weight[epoch],
                    probability=run.probability[epoch],
                    quality=np.nan if run.quality is None else run.quality,
                    diversity=np.nan if run.diversity is None else run.diversity,
                )
            )
    return pd.concat(parts, ignore_index=True).astype({"quality": "float32", "diversity": "float32"})


def group_means(report: Report) -> pd.DataFrame | None:
    """Mean weight, probability and checker scores of original, swapped and duplicated rows; None if not known.

    One row for every method, seed, epoch and group (003, Figures 4 to 7).
    """
    group = known_groups(report.train)
    if group is None:
        return None
    rows = []
    for run in report.runs:
        for epoch in range(len(run.weight)):
            for name in GROUPS:
                chosen = (group == name).to_numpy()
                if chosen.any():
                    rows.append(
                        {
                            "method": run.method,
                            "seed": run.seed,
                            "epoch": epoch + 1,
                            "group": name,
                            "rows": int(chosen.sum()),
                            "weight": float(run.weight[epoch, chosen].mean()),
                            "probability": float(run.probability[epoch, chosen].mean()),
                            "quality": None if run.quality is None else float(run.quality[chosen].mean()),
                            "diversity": None if run.diversity is None else float(run.diversity[chosen].mean()),
                        }
                    )
    return pd.DataFrame(rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns aligned so that it also reads well in a terminal."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if not column else "-" * (width - 1) + ":") for column, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)]) + "\n"


def cell(value: dict[str, float | None]) -> str:
    """Mean and standard deviation in %."""
    deviation = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * (value['mean'] or 0.0):.1f}{deviation}"


def markdown(report: Report, results: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    summary = results["summary"]
    rows = []
    for method in report.methods:
        last, best = summary[method]["last_epoch"], summary[method]["best_epoch_on_real"]
        rows.append(
            [method, cell(last["accuracy"]), cell(last["macro_f1"]), cell(best["accuracy"]), cell(best["macro_f1"])]
        )
    quality = [record["test"] for record in report.checkers if record["checker"] == "quality"]
    if quality:
        scores = [cell(spread([record[name] for record in quality])) for name in ("accuracy", "macro_f1")]
        rows.append(["quality checker (real rows only)", *scores, "", ""])
    seeds = len({run.seed for run in report.runs})
    spread_note = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    parts = [
        f"# Test accuracy and macro F1 in %, {spread_note}\n",
        markdown_table(
            [
                "method",
                "accuracy, last epoch",
                "macro F1, last epoch",
                "accuracy, best epoch on real",
                "macro F1, best epoch on real",
            ],
            rows,
        ),
        "The real rows trained the quality checker, so choosing an epoch by them favours late epochs: every epoch is "
        "below.\n",
        "# Test accuracy in % by epoch\n",
        markdown_table(
            ["method", *(str(record["epoch"]) for record in report.runs[0].epochs)],
            [
                [method, *(cell(epoch["accuracy"]) for epoch in summary[method]["by_epoch"])]
                for method in report.methods
            ],
        ),
    ]
    if "groups" in results:
        parts += ["# Mean weight by kind of row, last epoch\n", _group_table(report, pd.DataFrame(results["groups"]))]
    return "\n".join(parts)


def _group_table(report: Report, groups: pd.DataFrame) -> str:
    last = groups[groups["epoch"] == groups["epoch"].max()]
    means = last.pivot_table(index="method", columns="group", values="weight")
    names = [name for name in GROUPS if name in means.columns]
    rows = [[method, *(f"{means.loc[method, name]:.3f}" for name in names)] for method in report.methods]
    return markdown_table(["method", *names], rows)
