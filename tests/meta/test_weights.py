"""SampleWeights: the meta-gradient with its sign and factor, subsets that meet their budget, files."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from synkern.meta import SampleWeights, gather_scores, outer_direction, sample_scores

ETA = 0.3


def one_step_outer_loss(weights, index):
    """The outer loss after one weighted gradient step, differentiated through the step."""
    torch.manual_seed(1)
    x, y, outer_x, outer_y = torch.randn(6, 3), torch.randn(6), torch.randn(5, 3), torch.randn(5)
    theta = torch.randn(3, requires_grad=True)
    losses = (x @ theta - y).square()
    inner = (weights(index) * losses).sum() / len(index)
    (gradient,) = torch.autograd.grad(inner, theta, create_graph=True)
    return (outer_x @ (theta - ETA * gradient) - outer_y).square().mean(), (x, y, outer_x, outer_y, theta)


@pytest.mark.parametrize(
    ("parametrization", "temperature", "init"), [("sigmoid", 1.0, 0.5), ("sigmoid", 2.5, 0.2), ("clamp", 1.0, 0.7)]
)
def test_the_gradient_is_that_of_the_outer_loss_after_a_step(parametrization, temperature, init):
    weights = SampleWeights(9, init, parametrization, temperature)
    index = torch.tensor([2, 4, 8, 0, 1, 6])
    torch.testing.assert_close(weights(index), torch.full((6,), init))
    outer, (x, y, outer_x, outer_y, theta) = one_step_outer_loss(weights, index)
    (expected,) = torch.autograd.grad(outer, weights.table)

    model = nn.Linear(3, 1, bias=False)
    gradient = ((weights(index) * 2 * (x @ theta - y)) @ x / 6).detach()
    with torch.no_grad():
        model.weight.copy_(theta - ETA * gradient)  # v is taken after the step, the samples' gradients before it
    v = outer_direction(model, [None], lambda m, _: (m(outer_x).squeeze(1) - outer_y).square().mean())
    with torch.no_grad():
        model.weight.copy_(theta)
    scores = sample_scores(model, lambda m, _: (m(x).squeeze(1) - y).square(), None, v)
    weights.apply_scores(index, scores, learning_rate_inner=ETA)
    torch.testing.assert_close(weights.table.grad, expected)
    assert weights.table.grad[[3, 5, 7]].count_nonzero() == 0

    weights.table.grad = None
    weights.apply_scores(index, scores, normalizer=12)
    torch.testing.assert_close(weights.table.grad, expected / ETA / 2)


def test_gradients_gather_until_the_optimizer_steps():
    weights = SampleWeights(4, parametrization="clamp")
    weights.apply_scores(torch.tensor([0, 1]), torch.tensor([1.0, -2.0]), normalizer=1)
    weights.apply_scores(torch.tensor([1, 1], dtype=torch.int32), torch.tensor([4.0, 8.0]).double(), normalizer=1)
    assert weights.table.grad.tolist() == [-1.0, -10.0, 0.0, 0.0]
    weights.apply_scores(torch.tensor([], dtype=torch.int64), torch.tensor([]), clip_norm=1.0)
    torch.testing.assert_close(weights.table.grad.norm(), torch.tensor(1.0))
    torch.optim.SGD(weights.parameters(), lr=0.1).step()
    after = weights().detach()
    assert after[1] > after[0] > after[2] == after[3] == 0.5  # a positive score raises the weight


def test_scaled_scores_do_not_depend_on_their_size():
    """Adam's epsilon swallows the tiny gradients of a large normalizer."""
    index, scores = torch.arange(3), torch.tensor([1.0, -2.0, 6.0])
    moved = []
    for size in (1e-12, 1.0):
        weights = SampleWeights(3)
        optimizer = torch.optim.Adam(weights.parameters(), lr=0.25)
        weights.apply_scores(index, size * scores, scale="mean", normalizer=1)
        torch.testing.assert_close(weights.table.grad, -scores / 3 / 4)  # the sigmoid's slope is 1/4
        optimizer.step()
        moved.append(weights().detach())
    torch.testing.assert_close(*moved)
    weights.table.grad = None
    weights.apply_scores(index, torch.zeros(3), scale="mean")
    assert torch.equal(weights.table.grad, torch.zeros(3))


def test_clamped_weights_come_back_from_the_ends():
    weights = SampleWeights(2, parametrization="clamp", cap=2.0)
    with torch.no_grad():
        weights.table.copy_(torch.tensor([-5.0, 7.0]))
    assert weights().tolist() == [0.0, 2.0]
    weights.apply_scores(torch.tensor([0, 1]), torch.tensor([1.0, -1.0]), normalizer=1)
    assert weights.table.tolist() == [0.0, 2.0] and weights.table.grad.tolist() == [-1.0, 1.0]


tables = st.lists(st.one_of(st.just(0.0), st.floats(2**-20, 1.0, width=32)), min_size=1, max_size=40).filter(any)


@given(tables, st.floats(0.01, 1.2))
def test_inclusion_probabilities(table, share):
    weights = SampleWeights(len(table), torch.tensor(table), "clamp")
    budget = share * len(table)
    found = weights.inclusion_probabilities(budget)
    weight = weights().detach().double()
    positive = weight > 0
    assert found.dtype == torch.float64 and found.min() >= 0 and found.max() <= 1
    assert torch.equal(found > 0, positive)
    assert math.isclose(found.sum().item(), min(budget, positive.sum().item()), rel_tol=1e-6)
    order = weight.argsort()
    assert (found[order].diff() >= 0).all()
    free = found[(found < 1) & positive] / weight[(found < 1) & positive]
    assert free.numel() == 0 or free.max() <= free.min() * (1 + 1e-9)  # those below 1 are proportional to w
    if budget >= len(table):
        assert torch.equal(found, positive.double())


def test_water_filling_by_hand():
    weights = SampleWeights(4, torch.tensor([0.1, 0.9, 0.2, 0.3]), "clamp")
    # 0.9 is held at 1; the other 1.5 go over 0.6 in proportion: 0.25, 0.5, 0.75
    torch.testing.assert_close(
        weights.inclusion_probabilities(2.5), torch.tensor([0.25, 1.0, 0.5, 0.75], dtype=torch.float64)
    )


def test_subsets_have_their_probabilities():
    weights = SampleWeights(50, torch.linspace(0, 1, 50), "clamp")
    expected = weights.inclusion_probabilities(20)
    generator = torch.Generator().manual_seed(0)
    count = torch.zeros(50, dtype=torch.float64)
    sizes = []
    for _ in range(2000):
        kept = weights.sample_subset(20, generator)
        assert kept.dtype == torch.int64 and (kept.diff() > 0).all()
        count[kept] += 1
        sizes.append(len(kept))
    error = (count / 2000 - expected).abs()
    assert (error <= 4.5 * (expected * (1 - expected) / 2000).sqrt()).all()  # 4.5 standard deviations
    assert abs(sum(sizes) / 2000 - 20) < 0.5 and len(set(sizes)) > 3
    again = weights.sample_subset(20, torch.Generator().manual_seed(7))
    assert torch.equal(again, weights.sample_subset(20, torch.Generator().manual_seed(7)))


def test_a_budget_above_the_positive_weights_is_said_in_the_log(caplog):
    weights = SampleWeights(4, torch.tensor([0.0, 0.5, 0.5, 0.0]), "clamp")
    with caplog.at_level(logging.WARNING, logger="synkern.meta"):
        assert weights.sample_subset(3).tolist() == [1, 2]
    assert "only 2 samples have a positive weight" in caplog.text


@pytest.mark.parametrize("parametrization", ["sigmoid", "clamp"])
def test_files(tmp_path, parametrization):
    pytest.importorskip("safetensors")
    parquet = pytest.importorskip("pyarrow.parquet")
    init = torch.tensor([0.1, 0.7, 0.25])
    options = {"temperature": 1.7} if parametrization == "sigmoid" else {"cap": 1.1}
    weights = SampleWeights(3, init, parametrization, **options)
    weights.save(tmp_path / "new" / "weights.safetensors")
    found = SampleWeights.load(tmp_path / "new" / "weights.safetensors")
    assert torch.equal(found.table, weights.table) and repr(found) == repr(weights)
    assert (found.temperature, found.cap) == (weights.temperature, weights.cap)
    weights.to_parquet(tmp_path / "plain.parquet")
    weights.to_parquet(tmp_path / "named.parquet", rows=["a", "b", "c"])
    assert parquet.read_table(tmp_path / "plain.parquet")["row"].to_pylist() == [0, 1, 2]
    table = parquet.read_table(tmp_path / "named.parquet").to_pydict()
    assert table["row"] == ["a", "b", "c"] and table["weight"] == weights().tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["named.parquet", "new", "plain.parquet"]
    with pytest.raises(ValueError, match="expected 3 rows, got 1"):
        weights.to_parquet(tmp_path / "wrong.parquet", rows=["a"])


def test_a_foreign_file_is_refused(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"table": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"file of SampleWeights.save.*got None"):
        SampleWeights.load(tmp_path / "other.safetensors")


def test_state_dict():
    weights = SampleWeights(3, torch.tensor([0.1, 0.7, 0.25]))
    other = SampleWeights(3)
    other.load_state_dict(weights.state_dict())
    assert torch.equal(other(), weights())


def test_gathering_without_processes_changes_nothing():
    index, scores = torch.tensor([3, 1]), torch.tensor([0.5, 2.0])
    assert gather_scores(index, scores) == (index, scores)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "at least 1, got 0"),
        ({"parametrization": "softmax"}, "one of sigmoid, clamp, got 'softmax'"),
        ({"init": 1.0}, "between 0 and 1, both excluded, got 1"),
        ({"init": 1.5, "parametrization": "clamp"}, "from 0 to 1, got 1.5"),
        ({"init": torch.ones(3)}, r"shape \(2,\), got \(3,\)"),
        ({"init": float("nan")}, "got nan"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"cap": 2.0}, "belongs to parametrization='clamp'"),
    ],
)
def test_wrong_settings_are_explained(options, words):
    with pytest.raises(ValueError, match=words):
        SampleWeights(**{"n": 2, **options})


def test_wrong_arguments_are_explained():
    weights = SampleWeights(3)
    index, scores = torch.arange(2), torch.ones(2)
    for wrong, words in (
        ({"scale": "std"}, "one of none, mean, got 'std'"),
        ({"normalizer": 0}, "normalizer must be positive, got 0"),
        ({"index": torch.arange(3)}, r"got \(3,\) and \(2,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            weights.apply_scores(**{"index": index, "scores": scores, **wrong})
    with pytest.raises(TypeError, match=r"got torch\.float32"):
        weights.apply_scores(scores, scores)
    with pytest.raises(TypeError, match="got list"):
        weights.apply_scores(index, [1.0, 2.0])
    with pytest.raises(ValueError, match="budget must be positive"):
        weights.inclusion_probabilities(0)
    with torch.no_grad():
        weights.table[1] = torch.nan
    with pytest.raises(ValueError, match="NaN for sample 1"):
        weights.sample_subset(2)
    with pytest.raises(ValueError, match="zero for every sample"):
        SampleWeights(3, 0.0, "clamp").sample_subset(2)
