"""The benchmark harness: that it checks, takes turns, weighs memory and reports what it measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synkern.registry import LOSSES

# Appended, so that the installed package is tested and not the source folder of the same name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

typer_testing = pytest.importorskip("typer.testing", reason="the harness needs the packages of the dev extra")
pytest.importorskip("matplotlib", reason="the harness needs the packages of the dev extra")

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import contraction, devices, goals, memory, peers, report, results, runner, timing  # noqa: E402
from benchmarks.cases import MODES, Case, cases, make_problem  # noqa: E402
from benchmarks.checks import WrongResult, check  # noqa: E402

CPU = torch.device("cpu")
# Compiling takes seconds a case; the smoke benchmark does it.
QUICK_PEERS = [peer for peer in peers.PEERS.values() if peer.name != "compile" and "cpu" in peer.devices]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small(loss: str = "dimp", mode: str = "train", dtype: str = "float32") -> Case:
    return Case(loss, 8, 6, dtype, mode)


def record(case: Case, peer: str, seconds: float, **changes: Any) -> results.Record:
    """A record as of a run in which eager takes 1 s, the compiled code 0.5 s, cross entropy 0.25 s, the copy 0.1 s."""
    measured = timing.Timing(seconds, seconds, seconds, seconds, 1, 9)
    times = {"eager": seconds, "compile": seconds / 0.5, "cross_entropy": seconds / 0.25, "floor": seconds / 0.1}
    return replace(results.Record(case, peer, measured, "copy", times, 0.0), **changes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_peer_is_right_on_every_loss(loss: str, mode: str) -> None:
    for case in cases([loss], [(8, 6)], ["float32", "bfloat16"], [mode], variants=True):
        problem = make_problem(case, CPU)
        expected: dict[str, Any] = {}
        for peer in QUICK_PEERS:
            if mode in peer.modes:
                check(peer, peer.prepare(problem), problem, expected)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_a_floor_and_every_peer_a_mode(mode: str) -> None:
    assert all(mode in peers.PEERS[floor].modes and peers.PEERS[floor].computes is None for floor in MODES[mode].floors)
    assert {"synkern", "eager"} <= {peer.name for peer in peers.peers_for(mode, tuple(peers.PEERS))}


def without_softmax(gradient: Tensor, target: Tensor) -> Tensor:
    kept = torch.zeros_like(gradient)
    kept[torch.arange(len(target)), target] = gradient[torch.arange(len(target)), target]
    return kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("quantity", "spoil"),
    [
        ("value", lambda x, _: x * 1.3),
        ("value", lambda x, _: x * float("nan")),
        ("gradient", lambda x, _: x * 1.5),
        ("gradient", without_softmax),
    ],
)
def test_wrong_results_are_refused(dtype: str, quantity: str, spoil: Callable[[Tensor, Tensor], Tensor]) -> None:
    problem = make_problem(Case("dimp", 8, 1000, dtype, "train"), CPU)
    peer = peers.PEERS["synkern"]
    step = peer.prepare(problem)
    outcome = step.outcome()
    outcome[quantity] = spoil(outcome[quantity], problem.target)
    with pytest.raises(WrongResult, match=f"synkern, dimp 8x1000 {dtype}, train: {quantity}"):
        check(peer, replace(step, outcome=lambda: outcome), problem, {})


def test_a_copy_that_copies_something_else_is_refused() -> None:
    problem = make_problem(small(), CPU)
    step = peers.Step(lambda: None, lambda: {"copy": torch.zeros_like(problem.logits)})
    with pytest.raises(WrongResult, match="copy"):
        check(peers.PEERS["copy"], step, problem, {})


def test_peers_are_timed_in_turns() -> None:
    rounds, calls = 12, []
    plan = timing.Plan(seconds=0, sample_seconds=0, least_rounds=rounds)
    names = ("a", "b", "c")
    timings = timing.time_in_turns({name: lambda name=name: calls.append(name) for name in names}, devices.Cpu(), plan)
    in_rounds = [tuple(calls[i : i + 3]) for i in range(len(calls) - 3 * rounds, len(calls), 3)]
    assert all(sorted(turn) == list(names) for turn in in_rounds)
    assert len(set(in_rounds)) > 1, "the order never changes"
    assert {t.rounds for t in timings.values()} == {rounds}


def test_short_calls_are_timed_in_batches_and_medians_are_per_call() -> None:
    class Clock(devices.Cpu):
        def seconds_per_call(self, call: Callable[[], Any], repeats: int) -> float:
            return float(call())

    calls: dict[str, Callable[[], Any]] = {"short": lambda: 1e-5, "long": lambda: 1e-1}
    timings = timing.time_in_turns(calls, Clock(), timing.Plan(seconds=1.0, sample_seconds=2e-3, most_rounds=20))
    assert (timings["short"].median, timings["long"].median) == (1e-5, 1e-1)
    assert timings["short"].repeats == 200
    assert timings["long"].repeats == 1
    assert timings["long"].rounds == 9, "9 rounds of 0.1 s fill a second"


def test_ratios_and_bandwidth() -> None:
    case = Case("dimp", 1000, 1000, "float32", "tangent")
    seconds = {"synkern": 4e-3, "eager": 8e-3, "read: sum": 3e-3, "read: dot": 2e-3}
    timings = {name: timing.Timing(s, s, s, s, 1, 9) for name, s in seconds.items()}
    ours = results.records_of(case, timings, dict.fromkeys(seconds, 0.0), {}, 0.0)[0]
    assert ours.times == {"eager": 0.5, "floor": 2.0}, "the floor is the faster read"
    assert ours.floor == "read: dot"
    assert ours.percent_of_floor == 50
    assert ours.gigabytes_per_second == pytest.approx(2 * 4e6 / 4e-3 / 1e9)


def test_goals_are_judged_by_the_measured_ratio() -> None:
    case = Case("dimp", 512, 32000, "float32", "train")

    def verdicts(seconds: float, **changes: Any) -> dict[str, bool | None]:
        return {v.asked: v.met for v in goals.judge([record(case, "synkern", seconds, **changes)])}

    assert verdicts(0.12) == {
        "at least 8x as fast as eager": True,
        "at least 3x as fast as compile": True,
        "at most 2 of the time of copy": True,
    }
    assert not any(verdicts(0.3).values())
    assert set(verdicts(0.12, cores_busy_elsewhere=1.0).values()) == {None}
    asked = "peak extra memory: one (N, C) gradient"
    assert verdicts(0.12, peak_extra_arrays=1.0)[asked] is True
    assert verdicts(0.12, peak_extra_arrays=2.0, cores_busy_elsewhere=1.0)[asked] is False
    assert goals.judge([record(replace(case, rows=511), "synkern", 0.1)]) == []


def test_the_report_shows_every_record(tmp_path: Path) -> None:
    case = Case("dimp", 512, 32000, "float32", "train")
    records = [record(case, "synkern", 0.2), record(case, "eager", 1.0)]
    written = report.Report({"torch": "x"}, records, {"compile": "no compiler"}, goals.judge(records))
    data, text, image = report.save(written, tmp_path, "run")
    rows = [line.split("|") for line in text.read_text().splitlines() if "| dimp 512x32000 float32 " in line]
    assert [(row[2].strip(), row[3].strip()) for row in rows] == [("synkern", "200 ms"), ("eager", "1.00 s")]
    assert "no compiler" in text.read_text()
    assert "NOT MET" in text.read_text(), "a fifth of eager's time is no eighth"
    loaded = json.loads(data.read_text())
    assert [r["timing"]["median"] for r in loaded["records"]] == [0.2, 1.0]
    assert loaded["records"][0]["case"]["classes"] == 32000
    assert image.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.md", "run.png"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.346e-6, "2.35 us"), (9.999e-4, "1.00 ms"), (0.0123, "12.3 ms"), (123e-6, "123 us"), (1.5, "1.50 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize(("peer", "arrays"), [("synkern", 1.0), ("eager", 3.0)])
def test_peak_memory_of_a_call(peer: str, arrays: float) -> None:
    case = Case("dimp", 64, 128 * 1024, "float32", "train")
    assert memory.peak_extra_arrays(case, peer, "cpu", threads=1) == pytest.approx(arrays, abs=0.05)


def invoke(*arguments: str) -> Any:
    import typer

    app = typer.Typer()
    app.command()(command.main)
    return typer_testing.CliRunner().invoke(app, arguments)


def test_the_command_measures_and_saves(tmp_path: Path) -> None:
    run = invoke(
        *("--loss", "focal", "--loss", "imp", "--size", "5x3", "--dtype", "float32", "--mode", "all"),
        *("--peer", "synkern", "--peer", "eager", "--peer", "copy", "--seconds", "0", "--threads", "1"),
        *("--out", str(tmp_path), "--name", "tiny"),
    )
    assert run.exit_code == 0, run.output
    records = json.loads((tmp_path / "tiny.json").read_text())["records"]
    measured = [(r["case"]["loss"], r["case"]["mode"]) for r in records if r["peer"] == "synkern"]
    assert sorted(measured) == sorted((loss, mode) for loss in ("focal", "imp") for mode in MODES)
    assert {r["peer"] for r in records} == {"synkern", "eager", "copy"}
    assert all(r["timing"]["median"] > 0 for r in records)


def test_the_command_reports_nothing_on_wrong_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = peers.PEERS["eager"]

    def off_by_a_third(problem: Any) -> peers.Step:
        step = eager.prepare(problem)
        return replace(step, outcome=lambda: {name: x * 4 / 3 for name, x in step.outcome().items()})

    monkeypatch.setitem(peers.PEERS, "eager", replace(eager, prepare=off_by_a_third))
    run = invoke("--size", "5x3", "--dtype", "float32", "--mode", "train", "--peer", "eager", "--out", str(tmp_path))
    assert run.exit_code == 1
    assert "eager, dimp 5x3 float32, train: value is off" in run.output
    assert not list(tmp_path.iterdir())


def test_problems_of_a_case_share_their_compiled_code() -> None:
    first, second = (make_problem(small(), CPU, seed) for seed in (0, 1))
    assert peers._compiled(first) is peers._compiled(second)
    assert peers._compiled(make_problem(small("focal"), CPU)) is not peers._compiled(first)


def test_calls_go_round_and_start_again() -> None:
    called: list[int] = []
    call = runner.in_rotation([lambda i=i: called.append(i) for i in range(3)])
    for _ in range(7):
        call()
    assert called == [0, 1, 2, 0, 1, 2, 0]


def test_a_gpu_goes_round_as_many_inputs_as_its_cache_would_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"L2_cache_size": 50_000_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    gpu = devices.DEVICES["cuda"]
    assert gpu.copies(400_000_000) == 1
    assert gpu.copies(32_000_000) == 7
    assert gpu.copies(4) == 32


def test_a_peer_that_overwrites_its_logits_is_checked_on_fresh_ones() -> None:
    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
            n = len(logits)
            loss = torch.nn.functional.cross_entropy(logits, target)
            logits.data.copy_((logits.softmax(1) - torch.nn.functional.one_hot(target, logits.shape[1])) / n)
            ctx.gradient = logits.detach().clone()
            return loss

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return ctx.gradient * grad, None

    problem = make_problem(Case("cross_entropy", 8, 6, "float32", "train"), CPU)
    before = problem.logits.detach().clone()
    step = peers._overwriting_step(problem, lambda logits, target: Overwriting.apply(logits, target))
    step.run()
    check(peers.PEERS["cross_entropy"], step, problem, {})
    check(peers.PEERS["cross_entropy"], step, problem, {})
    assert torch.equal(problem.logits.detach(), before)


def test_goals_of_a_gpu() -> None:
    case = Case("dimp", 8192, 32000, "bfloat16", "train")
    fast = record(case, "synkern", 0.11, times={"floor": 1.1, "cross_entropy": 0.4, "compile": 0.5, "quack": 1.05})
    verdicts = {v.asked: (v.measured, v.met) for v in goals.judge([fast], goals.CUDA_GOALS)}
    assert verdicts["at least 88 % of the rate of copy"] == ("91 %", True)
    assert verdicts["at most 1 of the time of quack"] == ("1.05", False)
    assert "at most 1 of the time of liger" not in verdicts, "which was not measured"
    small = Case("dimp", 32, 3, "float32", "train")
    slow = [v for v in goals.judge([record(small, "synkern graph", 12e-6)], goals.CUDA_GOALS) if "us" in v.asked]
    assert [(v.asked, v.measured, v.met) for v in slow] == [("at most 10 us", "12.00 us", False)]


def test_a_curve_is_drawn_where_rows_have_several_lengths(tmp_path: Path) -> None:
    records = [
        record(Case("dimp", 8, c, "float32", "train"), peer, seconds)
        for c in (10, 100, 1000) for peer, seconds in (("synkern", 0.2), ("copy", 0.1))
    ]  # fmt: skip
    paths = report.save(report.Report({}, records, {}, []), tmp_path, "run")
    assert paths[-1].name == "run-rates.png"
    assert paths[-1].read_bytes().startswith(b"\x89PNG")


def test_the_contraction_is_checked_measured_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = timing.Plan(seconds=0, sample_seconds=0, least_rounds=2)
    text, data = contraction.run("cpu", {"torch": "x"}, plan, tmp_path, smoke=True)
    assert "of the matrix rate" in text.read_text()
    assert set(json.loads(data.read_text())["results"]) == {"float32", "bfloat16"}
    wrong = {"product, then row dots": lambda: torch.ones(3), "synkern": lambda: torch.full((3,), 1.1)}
    with pytest.raises(WrongResult, match="contraction, float32"):
        contraction.check(wrong, "float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_says_that_there_is_no_gpu() -> None:
    run = invoke("--device", "cuda")
    assert run.exit_code == 2
    assert "nothing to measure on 'cuda'" in run.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--loss", "hinge"), "unknown loss 'hinge'"),
        (("--size", "32"), "a size is rows x classes"),
        (("--size", "0x3"), "a size is rows x classes"),
        (("--device", "abacus"), "unknown device 'abacus'"),
        (("--mode", "third"), "unknown mode 'third'"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_options(arguments: tuple[str, ...], message: str) -> None:
    run = invoke(*arguments)
    assert run.exit_code == 2
    assert message in run.output.replace("\n", " ")
