"""Rows without a gradient are left out of products, and nothing changes but the time."""

from __future__ import annotations

import meta_models as small
import pytest
import torch
from test_scored_step import GRADIENTS, WAYS, assert_same_gradients, learned_weights, plain_gradients
from tolerances import SCORES

from synkern.meta import linear, rules, sample_scores, scored_step

pytest.importorskip("transformers")


@pytest.fixture
def found(monkeypatch):
    """Small layers count as large ones; how many rows each search left of how many."""
    found = []

    def search(b, work, live_rows=rules.live_rows):
        live = live_rows(b, work)
        found.append((len(b) if live is None else len(live), len(b)))
        return live

    monkeypatch.setattr(linear, "_LEAST_WORK", 1)
    monkeypatch.setattr(rules, "live_rows", search)
    return found


def rows_with_holes(dtype=torch.float64):
    a, b = torch.randn(12, 5, dtype=dtype), torch.randn(12, 3, dtype=dtype)
    b[[1, 4, 5, 8, 9, 10, 11]] = 0  # the third of four samples has one row left, the last none
    b[2, 0] = 0  # a zero in the first column of a row that counts
    return a, b


def test_rows_found():
    _, b = rows_with_holes()
    b[6] = torch.tensor([0.0, float("nan"), 0.0])
    assert linear.live_rows(b, 1 << 30).tolist() == [0, 2, 3, 6, 7]


@pytest.mark.parametrize("zero,work", [([], 1 << 30), ([3], 1 << 30), (range(12), 1 << 30), (range(6), 1000)])
def test_all_rows_where_leaving_some_out_does_not_pay(zero, work):
    b = torch.randn(12, 3)
    b[list(zero)] = 0
    assert linear.live_rows(b, work) is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weights", [None, [1.0, -0.5, 2.0, 0.5], [0.0, 1.0, 0.0, 1.0], [0.0] * 4])
def test_gradients_of_live_rows(weights, transposed):
    a, b = rows_with_holes()
    row_weight = None if weights is None else torch.tensor(weights).double()
    scale = torch.ones(4).double() if weights is None else row_weight
    scaled = b * scale.repeat_interleave(3)[:, None]
    expected = a.t() @ scaled if transposed else scaled.t() @ a
    weight, bias = linear.linear_gradients(a, b, (True, True), row_weight, transposed, linear.live_rows(b, 1 << 30))
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(bias, scaled.sum(0))


@pytest.mark.parametrize("weights", [None, [0.0, 1.0, -0.5, 1.0]])
def test_gradients_by_sample(weights):
    a, b = rows_with_holes()
    v, live = torch.randn(3, 5).double(), linear.live_rows(b, 1 << 30)
    row_weight = None if weights is None else torch.tensor(weights).double()
    whole = linear.gradient_by_sample(a, b, v, 4, row_weight, None)
    sparse = linear.gradient_by_sample(a, b, v, 4, row_weight, live)
    expected = torch.einsum("nrp,nrk->npk", b.view(4, 3, 3), a.view(4, 3, 5))
    for total, shares in (whole, sparse):
        torch.testing.assert_close(shares, (expected * v).sum((1, 2)))
        scale = torch.ones(4).double() if weights is None else row_weight
        torch.testing.assert_close(total, (expected * scale[:, None, None]).sum(0))


@pytest.mark.parametrize("way", ["mean", "weighted", "weighted mean", "reweighted"])
@pytest.mark.parametrize("by_sample", [False, True], ids=["by row", "by sample"])
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_models_with_padding(name, by_sample, way, found, monkeypatch):
    if by_sample:
        monkeypatch.setattr(linear, "_FEWEST_ROWS", 1)
    workload = small.WORKLOADS[name]().to(torch.float64)
    direction = small.direction_for(workload.model)
    expected = small.reference_scores(workload, direction)
    if way == "reweighted":
        given, options = {"reweight": learned_weights}, {"reduction": "sum"}
        _, gradients = plain_gradients(workload, sample_weight=learned_weights(expected), **options)
    else:
        given, options = {}, {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in WAYS[way].items()}
        _, gradients = plain_gradients(workload, **options)
    found.clear()
    with scored_step(workload.model, direction, **given) as step:
        step.reduce(workload.losses(), **options).backward()
    assert any(live < rows for live, rows in found)
    assert small.relative_error(step.scores, expected) <= SCORES[torch.float64]
    assert_same_gradients(small.gradients_of(workload.model), gradients, GRADIENTS[torch.float64])
    scores = sample_scores(workload.model, workload.loss, workload.batch, direction, method="contraction")
    assert small.relative_error(scores, expected) <= SCORES[torch.float64]
