"""The benchmark of the meta-gradient: every workload runs, agrees with its reference, and is judged by its numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import meta, meta_workloads
from benchmarks.checks import WrongResult
from benchmarks.meta_workloads import SIZES, WORKLOADS, Way
from benchmarks.timing import Timing


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_all_ways_agree(workload: str) -> None:
    ways = WORKLOADS[workload].prepare(SIZES["smoke"], torch.device("cpu"))
    ways = {name: way for name, way in ways.items() if not way.missing}
    errors = meta.check(workload, ways)
    compared = [name for name, way in ways.items() if way.tolerance is not None]
    assert WORKLOADS[workload].reference in compared and len(compared) > 1
    assert all(errors[name] is not None for name in compared)
    for goal in WORKLOADS[workload].goals:
        assert {goal.way, goal.against} <= set(ways)


def test_a_wrong_way_is_not_reported() -> None:
    ways = WORKLOADS["bilstm scores"].prepare(SIZES["smoke"], torch.device("cpu"))
    right = ways["contraction"]
    wrong = replace(right, run=lambda: 1.01 * right.run())  # type: ignore[operator]
    with pytest.raises(WrongResult, match="contraction: off by"):
        meta.check("bilstm scores", {"double backward": ways["double backward"], "contraction": wrong})


def result(way: str, median: float, peak: int | None = None) -> meta.Result:
    return meta.Result("encoder scored step", way, Timing(median, median, median, median, 1, 5), peak, None)


@pytest.mark.parametrize("seconds,peak,verdicts", [(1.3, 120, ["met", "met"]), (1.4, 140, ["NOT MET", "NOT MET"])])
def test_goals_are_judged(seconds: float, peak: int, verdicts: list[str]) -> None:
    results = [result("training step", 1.0, 100), result("scored_step", seconds, peak)]
    rows = meta.judge("encoder scored step", results)
    assert [row[-1] for row in rows] == verdicts
    assert "scored_step" in meta.table("encoder scored step", results)


def test_memory_that_was_not_measured_is_not_judged() -> None:
    rows = meta.judge("encoder scored step", [result("training step", 1.0), result("scored_step", 1.2)])
    assert len(rows) == 1 and rows[0][-1] == "met"


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    away = {"there": Way(lambda: None), "away": Way(lambda: None, missing="nothing is not installed")}
    workload = replace(WORKLOADS["bilstm scores"], prepare=lambda size, device: away)
    monkeypatch.setitem(WORKLOADS, "bilstm scores", workload)
    assert list(meta._able("bilstm scores", SIZES["smoke"], "cpu")) == ["there"]
    assert "nothing is not installed" in "".join(capsys.readouterr())
    assert meta_workloads._missing("no_such_package_at_all") == "no_such_package_at_all is not installed"
