"""The plots of ``synkern reweight``, as PNG."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from synkern.recipes.detection import wrong_labels
from synkern.recipes.noise import ORIGINAL, SWAPPED
from synkern.recipes.plots import (
    ACCURACY,
    GROUP_COLOURS,
    PALETTE,
    STYLE,
    accuracy_by_epoch,
    draw_line,
    method_name,
    panels_of,
    save_figure,
)

if TYPE_CHECKING:
    from synkern.recipes.reweight_report import ReweightReport, ReweightRun

HISTOGRAMS, OUTER_LOSS = "weights_by_iteration.png", "outer_loss.png"
FILES = (ACCURACY, HISTOGRAMS, OUTER_LOSS)


def write_plots(report: ReweightReport) -> None:
    """Draw everything that the report has data for."""
    with matplotlib.rc_context(STYLE):
        save_figure(report.folder / ACCURACY, accuracy_by_epoch(report.by_method))
        method = report.shown_method
        if method is None:
            return
        wrong = wrong_labels(report.train.frame)
        runs = report.by_method[method]
        save_figure(report.folder / HISTOGRAMS, weight_histograms(runs, wrong))
        if any(run.outcome.iterations for run in runs):
            save_figure(report.folder / OUTER_LOSS, outer_losses(runs))


def weight_histograms(runs: list[ReweightRun], wrong: np.ndarray | None) -> Figure:
    """Weights of all seeds at up to four iterations or epochs, by right and wrong label where known (000, Figure 3).

    Of SunGen iterations 0, 5, 10 and the last one, as there.
    """
    first = runs[0].outcome
    steps = first.recorded or [len(first.history)]
    weights = np.stack([run.trace for run in runs])
    shown = list(range(min(3, len(steps))))
    if first.iterations is not None:
        shown = [position for position, step in enumerate(steps) if step in (0, 5, 10)]
    shown = list(dict.fromkeys([*shown, len(steps) - 1]))
    figure, panels = panels_of(len(shown), width=3.2)
    bins = np.linspace(0, max(1.0, float(weights.max())), 41).tolist()
    for axes, position in zip(panels, shown, strict=True):
        weight = weights[:, position]
        if wrong is None:
            axes.hist(weight.ravel(), bins=bins, color=PALETTE[0])
        else:
            parts = [weight[:, ~wrong].ravel(), weight[:, wrong].ravel()]
            colours = [GROUP_COLOURS[ORIGINAL], GROUP_COLOURS[SWAPPED]]
            axes.hist(parts, bins=bins, stacked=True, color=colours, label=["right label", "wrong label"])
        unit = "epoch" if first.iterations is None else "iteration"
        axes.set_title(f"{method_name(runs[0].method)}, {unit} {steps[position]}")
        axes.set_xlabel("weight")
    panels[0].set_ylabel("rows" if len(runs) == 1 else "rows, all seeds")
    if wrong is not None:
        panels[0].legend(loc="upper left")
    return figure


def outer_losses(runs: list[ReweightRun]) -> Figure:
    """Outer loss by iteration and, where the truth is known, how well the weights find wrong labels."""
    records = {run.seed: pd.DataFrame(run.outcome.iterations).set_index("iteration") for run in runs}
    known = all("auroc" in record and record["auroc"].notna().all() for record in records.values())
    figure, panels = panels_of(2 if known else 1, width=4.6)
    titles = {"outer_loss": "Mean outer loss", "auroc": "AUROC of wrong labels"}
    for axes, name in zip(panels, titles, strict=False):
        table = pd.DataFrame({seed: record[name] for seed, record in records.items()})
        draw_line(axes, table, None, PALETTE[0], unit="iteration")
        axes.set_title(titles[name])
    return figure
