"""Table, JSON and plot of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from synkern.recipes.files import write_atomic, write_json, write_text

from .cases import MODES
from .goals import Verdict
from .results import COMPARED, Record


@dataclass(frozen=True)
class Report:
    """All of a run: where and how it was measured, what came out, what could not be measured and why, the goals."""

    environment: dict[str, Any]
    records: list[Record]
    skipped: dict[str, str]
    verdicts: list[Verdict]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> str:
    """A table that reads as plain text too; the first ``left`` columns to the left, empty ones left out."""
    filled = [i for i in range(len(head)) if any(row[i] for row in rows)]
    head, rows = [head[i] for i in filled], [[row[i] for i in filled] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, scale = next((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("us", 0.0)) if seconds >= 0.9995 * s)
    value = seconds / (scale or 1e-6)
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"


def size_in_bytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _row(record: Record) -> list[str]:
    timing = record.timing
    return [
        f"{record.case}{' (noisy)' if record.is_noisy else ''}",
        record.peer,
        duration(timing.median),
        f"{duration(timing.first_quartile)} - {duration(timing.third_quartile)}",
        size_in_bytes(record.case.least_bytes),
        f"{record.gigabytes_per_second:.3g}",
        _number(record.percent_of_floor, ".0f"),
        *(_number(record.times.get(name), ".3g") for name in COMPARED),
        _number(record.peak_extra_arrays, ".2f"),
        f"{record.error:.1e}" if record.error else "",
    ]


HEAD = (
    "case", "peer", "median", "quartiles", "must move", "GB/s", "% of floor",
    *(f"/ {name}" for name in COMPARED), "peak extra", "error",
)


def results_table(records: Sequence[Record]) -> str:
    """A table for each mode, a row for each case and peer."""
    parts = []
    for mode, description in MODES.items():
        rows = [_row(record) for record in records if record.case.mode == mode]
        if rows:
            floors = " or ".join(f"`{floor}`" for floor in description.floors)
            parts.append(f"## {description.title}\n\nFloor: {floors}.\n\n{markdown_table(HEAD, rows)}")
    return "\n\n".join(parts)


def goals_table(verdicts: Sequence[Verdict]) -> str:
    """What is asked beside what was measured."""
    rows = [[v.subject, v.asked + (" (stretch)" if v.stretch else ""), v.measured, v.text] for v in verdicts]
    return "## Goals\n\n" + markdown_table(("what", "asked", "measured", "verdict"), rows)


def as_text(report: Report) -> str:
    """The whole report in Markdown."""
    parts = ["# synkern benchmark", environment_text(report.environment), results_table(report.records)]
    if any(record.is_noisy for record in report.records):
        parts.insert(1, "**Other programs used the machine meanwhile: do not quote the times of cases marked noisy.**")
    if report.verdicts:
        parts.append(goals_table(report.verdicts))
    if report.skipped:
        parts.append("## Not measured\n\n" + "\n".join(f"- {name}: {why}" for name, why in report.skipped.items()))
    return "\n\n".join(parts) + "\n"


def environment_text(environment: dict[str, Any]) -> str:
    def flat(value: Any) -> str:
        return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)

    return "\n".join(f"- {name}: {flat(value)}" for name, value in environment.items())


def as_json(report: Report) -> dict[str, Any]:
    """Plain values only; times in seconds."""
    return {
        "environment": report.environment,
        "records": [
            {
                **asdict(record),
                "case": {**asdict(record.case), "options": dict(record.case.options)},
                "least_bytes": record.case.least_bytes,
                "gigabytes_per_second": record.gigabytes_per_second,
                "percent_of_floor": record.percent_of_floor,
            }
            for record in report.records
        ],
        "skipped": report.skipped,
        "goals": [{**asdict(verdict), "verdict": verdict.text} for verdict in report.verdicts],
    }


def plot(records: Sequence[Record], path: Path) -> None:
    """Time relative to the floor, log scale: a panel for each mode and dtype, a line of marks for each case."""
    shown = [record for record in records if "floor" in record.times]
    panels = list(dict.fromkeys((record.case.mode, record.case.dtype) for record in shown))
    if not panels:
        return
    peers = list(dict.fromkeys(record.peer for record in shown))
    lines = [
        list(dict.fromkeys(str(record.case) for record in shown if (record.case.mode, record.case.dtype) == panel))
        for panel in panels
    ]
    heights = [0.35 * len(names) + 1.2 for names in lines]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, sum(heights) + 0.6), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, (mode, dtype), names in zip(axes[:, 0], panels, lines, strict=True):
        for index, peer in enumerate(peers):
            marked = [r for r in shown if (r.case.mode, r.case.dtype, r.peer) == (mode, dtype, peer)]
            axis.scatter(
                [r.times["floor"] for r in marked], [names.index(str(r.case)) for r in marked], label=peer, zorder=3,
                color=f"C{index}", marker="o" if peer.startswith("synkern") else "sDv^<>PX"[index % 8], s=42,
            )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axis.set_title(f"{MODES[mode].title}, {dtype}", fontsize=10)
        axis.grid(axis="x", which="both", alpha=0.3)
    axes[-1, 0].set_xlabel("time, as a multiple of the floor's")
    handles = {h.get_label(): h for a in axes[:, 0] for h in a.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130))
    plt.close(figure)


LEAST_LENGTHS = 3  # of rows, for a curve


def plot_rates(records: Sequence[Record], path: Path) -> None:
    """Percent of the floor's rate against C, loss + backward: a panel for each dtype, a line for each peer."""
    shown = [r for r in records if r.case.mode == "train" and r.percent_of_floor is not None and r.peer != r.floor]
    dtypes = list(dict.fromkeys(record.case.dtype for record in shown))
    if len({record.case.classes for record in shown}) < LEAST_LENGTHS:
        return
    figure, axes = plt.subplots(1, len(dtypes), figsize=(6 * len(dtypes), 4.5), squeeze=False, layout="constrained")
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for peer in dict.fromkeys(record.peer for record in shown):
            line = sorted(
                (r.case.classes, r.percent_of_floor) for r in shown if (r.case.dtype, r.peer) == (dtype, peer)
            )
            axis.plot([c for c, _ in line], [percent for _, percent in line], marker="o", label=peer)
        axis.axhline(100, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="classes", ylabel="% of the floor's rate", ylim=(0, None), title=dtype)
        axis.grid(which="both", alpha=0.3)
    axes[0, -1].legend(fontsize=8)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130))
    plt.close(figure)


def save(report: Report, folder: Path, name: str) -> list[Path]:
    """Writes name.json, name.md, name.png and, where rows of several lengths were measured, name-rates.png."""
    data, text, image = (folder / f"{name}.{suffix}" for suffix in ("json", "md", "png"))
    write_json(data, as_json(report))
    write_text(text, as_text(report))
    plot(report.records, image)
    rates = folder / f"{name}-rates.png"
    plot_rates(report.records, rates)
    return [path for path in (data, text, image, rates) if path.exists()]
