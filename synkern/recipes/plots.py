"""The plots of a report, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from synkern.recipes.files import write_atomic
from synkern.recipes.noise import DUPLICATED, GROUPS, ORIGINAL, SWAPPED

if TYPE_CHECKING:
    from synkern.recipes.report import Report

ACCURACY, HISTOGRAM, GROUP_WEIGHTS, CHECKER_SCORES = (
    "accuracy_by_epoch.png",
    "weights_histogram.png",
    "weights_by_group.png",
    "checker_scores.png",
)
FILES = (ACCURACY, HISTOGRAM, GROUP_WEIGHTS, CHECKER_SCORES)
# Okabe and Ito's palette: told apart by colour-blind readers too
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
# as methods are called in prose; a method has the same colour in every report
_METHODS = {
    "ce": ("cross entropy", "#0072B2"), "focal": ("focal", "#E69F00"), "imp": ("IMP", "#009E73"),
    "dimp": ("DIMP", "#D55E00"),
    "sungen": ("SunGen", "#D55E00"), "zerogen": ("plain (ZeroGen)", "#0072B2"), "l2rw": ("L2RW", "#E69F00"),
    "meta-weight-net": ("Meta-Weight-Net", "#009E73"), "hu2019": ("Hu et al.", "#CC79A7"),
    "confidence": ("confidence", "#56B4E9"), "co-teaching": ("co-teaching", "#F0E442"),
    "label-smoothing": ("label smoothing", "#000000"), "temporal-ensembling": ("temporal ensembling", "#999999"),
    "one-level-rce": ("one-level RCE", "#882255"),
}  # fmt: skip
# with more lines than this, bands would hide them
_MOST_BANDS = 5
GROUP_COLOURS = {ORIGINAL: "#0072B2", SWAPPED: "#D55E00", DUPLICATED: "#009E73"}
STYLE: Any = {
    "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 10,
    "axes.titlesize": 11, "legend.frameon": False, "savefig.dpi": 150,
}  # fmt: skip


def write_plots(report: Report, groups: pd.DataFrame | None) -> None:
    """Draw everything that the report has data for."""
    with matplotlib.rc_context(STYLE):
        runs = {method: report.of(method) for method in report.methods}
        save_figure(report.folder / ACCURACY, accuracy_by_epoch(runs))
        varying = [method for method in report.methods if any(np.ptp(run.weight[-1]) > 0 for run in report.of(method))]
        if varying:
            save_figure(report.folder / HISTOGRAM, weight_histograms(report, varying))
            if groups is not None:
                save_figure(report.folder / GROUP_WEIGHTS, group_lines(groups, varying))
        if groups is not None and groups["quality"].notna().any():
            save_figure(report.folder / CHECKER_SCORES, checker_scores(groups))


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, atomically."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def panels_of(count: int, width: float = 4.2, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels side by side."""
    # Figure without pyplot: no display, no global state
    figure = Figure(figsize=(max(width * count, 5.0), height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def method_name(method: str) -> str:
    """A method as it is called in prose."""
    return _METHODS[method][0]


def draw_line(axes: Axes, table: pd.DataFrame, label: str | None, colour: str, unit: str = "epoch",
              band: bool = True) -> None:  # fmt: skip
    """Mean of the columns (seeds) against the index (``unit``), with a ``band`` from the least to the greatest."""
    axes.plot(table.index, table.mean(axis=1), marker="o", markersize=4, color=colour, label=label)
    if band and table.shape[1] > 1:
        axes.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


class HasEpochs(Protocol):
    """One method with one seed, tested after every epoch."""

    @property
    def seed(self) -> int: ...

    @property
    def epochs(self) -> list[dict[str, Any]]: ...


def accuracy_by_epoch(runs: Mapping[str, Sequence[HasEpochs]]) -> Figure:
    """Test accuracy and macro F1 of every method, with the range over seeds (003, Figure 1; 000, Figure 1).

    Args:
        runs: the seeds of every method.
    """
    figure, panels = panels_of(2, width=4.6)
    crowded = len(runs) > _MOST_BANDS
    for axes, metric, title in zip(panels, ("accuracy", "macro_f1"), ("Test accuracy", "Test macro F1"), strict=True):
        for method, seeds in runs.items():
            table = pd.DataFrame(
                {run.seed: {record["epoch"]: record["test"][metric] for record in run.epochs} for run in seeds}
            )
            draw_line(axes, 100 * table, *_METHODS[method], band=not crowded)
        axes.set_title(title)
        axes.set_ylabel("%")
    if crowded:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    else:
        panels[0].legend()
    count = max(map(len, runs.values()))
    if count > 1:
        band = "" if crowded else "; the band reaches from the lowest to the highest"
        figure.supxlabel(f"mean of {count} seeds{band}", fontsize=8)
    return figure


def weight_histograms(report: Report, methods: list[str]) -> Figure:
    """Weights of the training rows in the last epoch, by kind of row where it is known."""
    from synkern.recipes.noise import known_groups

    group = known_groups(report.train)
    figure, panels = panels_of(len(methods))
    for axes, method in zip(panels, methods, strict=True):
        weights = np.stack([run.weight[-1] for run in report.of(method)])
        positive = weights[weights > 0]
        # far tails would leave all else in one bar: they go to the outermost ones
        low, high = np.quantile(positive, [0.005, 0.995])
        bins = np.geomspace(max(low, high * 1e-6), high * 1.0001, 40).tolist()
        clipped = np.clip(weights, bins[0], bins[-1])
        if group is None:
            axes.hist(clipped.ravel(), bins=bins, color=PALETTE[0])
        else:
            for name in GROUPS:
                chosen = (group == name).to_numpy()
                if chosen.any():
                    axes.hist(
                        clipped[:, chosen].ravel(),
                        bins=bins,
                        histtype="step",
                        linewidth=1.6,
                        weights=np.full(clipped[:, chosen].size, 100 / clipped[:, chosen].size),
                        color=GROUP_COLOURS[name],
                        label=name,
                    )
            axes.legend(loc="upper left")
        axes.set_xscale("log")
        axes.set_title(method_name(method))
        axes.set_xlabel("weight in the last epoch")
        axes.set_ylabel("rows" if group is None else "% of the rows of its kind")
    return figure


def _by_epoch(groups: pd.DataFrame, method: str, group: str, value: str) -> pd.DataFrame:
    chosen = groups[(groups["method"] == method) & (groups["group"] == group)]
    return chosen.pivot(index="epoch", columns="seed", values=value)


def group_lines(groups: pd.DataFrame, methods: list[str]) -> Figure:
    """Mean weight of each kind of row by epoch (003, Figure 7)."""
    figure, panels = panels_of(len(methods))
    for axes, method in zip(panels, methods, strict=True):
        for name in GROUPS:
            table = _by_epoch(groups, method, name, "weight")
            if len(table):
                draw_line(axes, table, name, GROUP_COLOURS[name])
        axes.set_title(f"{method_name(method)}: mean weight")
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
    panels[0].legend()
    return figure


def checker_scores(groups: pd.DataFrame) -> Figure:
    """Checkers' scores and IMP's weight by kind of row (003, Figures 4 and 5); the model's own score (Figure 6)."""
    last = groups[groups["epoch"] == groups["epoch"].max()]
    bars = {}
    for label, column in (("quality P'(y|x)", "quality"), ("diversity Q(y|x)", "diversity")):
        if last[column].notna().any():
            bars[label] = last.dropna(subset=[column]).groupby("group")[column].mean()
    if (last["method"] == "imp").any():
        bars["IMP weight"] = last[last["method"] == "imp"].groupby("group")["weight"].mean()
    dynamic = (groups["method"] == "dimp").any()
    figure, panels = panels_of(2 if dynamic else 1, width=4.8)
    names = [name for name in GROUPS if name in set(last["group"])]
    for offset, (label, means) in enumerate(bars.items()):
        width = 0.8 / len(bars)
        positions = np.arange(len(names)) + (offset - (len(bars) - 1) / 2) * width
        drawn = panels[0].bar(positions, means[names], width=0.92 * width, color=PALETTE[offset], label=label)
        panels[0].bar_label(drawn, fmt="%.2f", fontsize=8)
    panels[0].set_xticks(range(len(names)), names)
    panels[0].set_title("Checkers' mean scores")
    panels[0].margins(y=0.3)
    panels[0].legend(ncols=3, fontsize=8, loc="upper center")
    if dynamic:
        for name in names:
            draw_line(panels[1], _by_epoch(groups, "dimp", name, "probability"), name, GROUP_COLOURS[name])
        panels[1].set_title("DIMP's diversity checker: the model's P(y|x; θ)")
        panels[1].set_ylim(0, 1)
        panels[1].legend()
    return figure
