"""The methods SunGen is compared with: each one's weights and steps against its formula, written out with autograd."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from recipe_rows import make_rows, write_jsonl
from torch import Tensor, nn
from torch.nn import functional

from synkern.recipes.checkpoint import load_state
from synkern.recipes.models import logits_of
from synkern.recipes.reweight import METHODS, Reweighting, read_data, run_reweight
from synkern.recipes.rivals import L2RW, CoTeaching, Hu2019, MetaWeightNet, TemporalEnsembling, TwoModels
from synkern.recipes.settings import ReweightSettings
from synkern.recipes.training import Fit

ROWS = 12
CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path: Path) -> ReweightSettings:
    train, test = (write_jsonl(tmp_path / f"{seed}.jsonl", make_rows(40, seed)) for seed in (0, 1))
    return ReweightSettings(
        train=str(train), test=str(test), out=str(tmp_path / "out"), seeds=1, epochs=2, batch_size=ROWS,
        outer_size=ROWS, flip_labels=0.3, threads=1, device="cpu", iterations=1, learning_rate=0.01,
        clip_norm=1e6,
    )  # fmt: skip


@pytest.fixture
def make_fit(settings: ReweightSettings) -> Callable[..., Any]:
    """A training of any kind, in float64, its first batch, and a copy of its model before the first step."""
    resolved = settings.resolved()
    experiment = Reweighting(resolved, read_data(resolved), show_progress=False)
    task = experiment._task("zerogen", 0)

    def make(kind: type[Fit], model: nn.Module | None = None, **options: Any) -> Any:
        model = (model or task.build()).double()
        fit = kind(model, task.train, None, resolved.fit(2), seed=0, name="test", device=CPU, **options)
        rows = np.arange(ROWS)
        return fit, *task.train.batch(rows, CPU), torch.as_tensor(rows), task.outer, copy.deepcopy(model)

    return make


def losses_of(model: nn.Module, inputs: dict[str, Tensor], target: Tensor) -> Tensor:
    return functional.cross_entropy(logits_of(model, inputs), target, reduction="none")


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


def dot(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return sum(((a * b).sum() for a, b in zip(one, other, strict=True)), torch.zeros((), dtype=torch.float64))


def outer_gradient(fit: Any, model: nn.Module, outer: Any) -> list[Tensor]:
    """The outer sample is as large as a batch, so that the random batch holds all of it."""
    inputs, target = outer.batch(np.arange(ROWS), CPU)
    return gradients(model, losses_of(model, inputs, target).mean())


def changed(model: nn.Module, changes: list[Tensor]) -> nn.Module:
    result = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, change in zip(result.parameters(), changes, strict=True):
            parameter += change
    return result


def row_gradients(model: nn.Module, inputs: dict[str, Tensor], target: Tensor) -> list[list[Tensor]]:
    return [gradients(model, loss) for loss in losses_of(model, inputs, target)]


def adam_step(model: nn.Module, loss: Tensor) -> nn.Module:
    """What one step of a new Adam does to a copy of the model."""
    result = copy.deepcopy(model)
    for parameter, gradient in zip(result.parameters(), gradients(model, loss), strict=True):
        parameter.grad = gradient
    torch.optim.Adam(result.parameters(), lr=0.01).step()
    return result


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_l2rw(make_fit: Callable[..., Any]) -> None:
    fit, inputs, target, index, outer, before = make_fit(L2RW, outer=make_fit(Fit)[4])
    _, weight, _ = fit.update(inputs, target, index)
    v = outer_gradient(fit, before, outer)
    scores = torch.stack([dot(v, g) for g in row_gradients(before, inputs, target)])
    positive = scores.clamp_min(0)
    expected = positive / positive.sum()
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-6)
    assert 0 < int((expected == 0).sum()) < ROWS
    assert_same(fit.model, adam_step(before, (weight * losses_of(before, inputs, target)).sum()))


def test_meta_weight_net(make_fit: Callable[..., Any]) -> None:
    fit, inputs, target, index, outer, before = make_fit(MetaWeightNet, outer=make_fit(Fit)[4])
    fit.net.double()
    net = copy.deepcopy(fit.net)
    _, weight, _ = fit.update(inputs, target, index)
    losses = losses_of(before, inputs, target)
    column = losses.detach().unsqueeze(1)
    rate = 0.01 / ROWS
    w = net(column).squeeze(1).detach()
    v = outer_gradient(fit, changed(before, [-rate * g for g in gradients(before, (w * losses).sum())]), outer)
    scores = torch.stack([dot(v, g) for g in row_gradients(before, inputs, target)])
    expected = copy.deepcopy(net)
    (-rate * (scores * expected(column).squeeze(1)).sum()).backward()
    torch.optim.Adam(expected.parameters(), lr=1e-3).step()
    torch.testing.assert_close(weight, expected(column).squeeze(1).detach(), rtol=1e-5, atol=1e-7)
    assert not torch.equal(weight, w)
    assert_same(fit.model, adam_step(before, (weight * losses).mean()))


def test_hu2019(make_fit: Callable[..., Any]) -> None:
    fit, inputs, target, index, outer, _ = make_fit(Hu2019, outer=make_fit(Fit)[4])
    fit.row_loss = _unweighted
    _, first, _ = fit.update(inputs, target, index)
    assert (first == 1).all() and (fit.table == 0).all(), "the first step weighs all rows alike"
    fit.table[index] = torch.linspace(0, 0.2, ROWS)
    fit.table = fit.table.double()
    before, raw = copy.deepcopy(fit.model), fit.table[index].clone()
    state = [{k: v.clone() for k, v in fit.optimizer.state[p].items()} for p in fit.model.parameters()]
    _, weight, _ = fit.update(inputs, target, index)
    deltas = []
    for row in row_gradients(before, inputs, target):
        delta = []
        for gradient, kept in zip(row, state, strict=True):
            first_moment = (0.9 * kept["exp_avg"] + 0.1 * gradient) / (1 - 0.9)
            second_moment = kept["exp_avg_sq"] / (1 - 0.999)
            delta.append(-0.01 * first_moment / (second_moment.sqrt() + 1e-8))
        deltas.append(delta)
    total = [sum(w * delta[i] for w, delta in zip(raw, deltas, strict=True)) for i in range(len(state))]
    v = outer_gradient(fit, changed(before, total), outer)
    derivative = torch.stack([dot(v, delta) for delta in deltas])
    expected = (raw / 10 - derivative).clamp_min(1e-5)
    torch.testing.assert_close(fit.table[index], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(weight, expected / expected.sum(), rtol=1e-4, atol=1e-7)


def _unweighted(logits: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return functional.cross_entropy(logits, target), torch.ones(len(rows), dtype=torch.float64)


def test_co_teaching(make_fit: Callable[..., Any], settings: ReweightSettings) -> None:
    first, second = (make_fit(Fit)[0].model for _ in range(2))
    with torch.no_grad():
        second.output.weight.neg_()
    fit, inputs, target, index, _, before = make_fit(CoTeaching, TwoModels(first, second), noise_rate=0.5)
    _, weight, _ = fit.update(inputs, target, index)
    assert (weight == 1).all(), "in the first epoch nothing is left out"
    fit.model.load_state_dict(before.state_dict())
    fit.state.epoch = 5
    fit.optimizer.state.clear()
    _, weight, _ = fit.update(inputs, target, index)
    losses = [losses_of(model, inputs, target) for model in (before.first, before.second)]
    # 0.5 * 5 / 10 of 12 rows are left out
    small = [set(loss.argsort()[:9].tolist()) for loss in losses]
    assert weight.tolist() == [((row in small[0]) + (row in small[1])) / 2 for row in range(ROWS)]
    expected = sum(loss[sorted(rows)].mean() for loss, rows in zip(losses, reversed(small), strict=True))
    assert_same(fit.model, adam_step(before, expected))
    fit.state.epoch = 20
    assert fit.update(inputs, target, index)[1].sum() == 6, "the ramp ends after ten epochs"


def test_temporal_ensembling(make_fit: Callable[..., Any]) -> None:
    fit, inputs, target, index, _, before = make_fit(TemporalEnsembling, classes=2)
    fit.mean, fit.now = fit.mean.double(), fit.now.double()
    plain = losses_of(before, inputs, target).mean()
    loss, _, logits = fit.update(inputs, target, index)
    torch.testing.assert_close(loss.detach(), plain.detach())
    assert_same(fit.model, adam_step(before, plain))
    fit.end_epoch()
    earlier = logits.softmax(1).detach()
    torch.testing.assert_close(fit.mean[index] / 0.4, earlier)
    fit.state.epoch = 1
    now = copy.deepcopy(fit.model)
    z = logits_of(now, inputs)
    # the last of two epochs: the ramp is at its end
    expected = functional.cross_entropy(z, target) + 30 * (z.softmax(1) - earlier).square().mean()
    torch.testing.assert_close(fit.update(inputs, target, index)[0].detach(), expected.detach())
    fit.end_epoch()
    torch.testing.assert_close(fit.mean[index], 0.6 * 0.4 * earlier + 0.4 * z.softmax(1).detach())


def test_confidence_keeps_the_rows_that_plain_training_believes(settings: ReweightSettings) -> None:
    run_reweight(dataclasses.replace(settings, methods=("confidence",), budget=0.25), show_progress=False)
    runs = settings.folder / "runs"
    plain, own = (load_state(runs / f"{name}-seed0.safetensors") for name in ("zerogen", "confidence"))
    torch.testing.assert_close(own["weight"], plain["probability"].mean(0))
    assert own["probability"].shape == (2, 10), "a quarter of 40 rows"


@pytest.mark.parametrize("method", [name for name in METHODS if name != "sungen"])
def test_every_method_gives_comparable_outputs_and_resumes(
    method: str, settings: ReweightSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(settings, methods=(method,))
    results = run_reweight(settings, show_progress=False)
    assert [record["epoch"] for record in results["runs"][0]["epochs"]] == [1, 2]
    weighing = method in ("l2rw", "meta-weight-net", "hu2019", "confidence", "co-teaching")
    assert ("detection" in results["summary"][method]) == weighing
    if weighing:
        table = pd.read_parquet(settings.folder / "weights.parquet")
        assert len(table) == 40 and table["weight"].notna().all()
    broken = dataclasses.replace(settings, out=settings.out + "2")
    original, count = Fit._step, 0

    def interrupted(self: Fit, rows: np.ndarray) -> float:
        nonlocal count
        count += 1
        if count == 6:
            raise RuntimeError("power cut")
        return original(self, rows)

    monkeypatch.setattr(Fit, "_step", interrupted)
    with pytest.raises(RuntimeError, match="power cut"):
        run_reweight(broken, show_progress=False)
    monkeypatch.setattr(Fit, "_step", original)
    run_reweight(broken, resume=True, show_progress=False)
    one, other = (load_state(Path(s.out) / "runs" / f"{method}-seed0.safetensors") for s in (settings, broken))
    assert one["history"] == other["history"]
    assert torch.equal(one["probability"], other["probability"])
