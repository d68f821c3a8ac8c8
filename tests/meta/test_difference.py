"""Scores as differences of losses: exact enough, the same dropout masks twice, nothing changed, wrong ones refused."""

from __future__ import annotations

import collections
import dataclasses
import gc
import logging
from dataclasses import replace

import meta_models as small
import pytest
import torch
from tolerances import DIFFERENCE
from torch import nn

from synkern import fused_dimp_loss
from synkern.meta import MethodUnavailable, difference, sample_scores


def scores_of(workload, direction):
    return sample_scores(workload.model, workload.loss, workload.batch, direction, method="difference")


@pytest.fixture
def warnings_of(caplog):
    caplog.set_level(logging.WARNING, logger="synkern.meta")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", small.WORKLOADS)
def test_values(name, dtype, warnings_of):
    workload = small.WORKLOADS[name]().to(dtype)
    direction = small.direction_for(workload.model)
    found = scores_of(workload, direction)
    inside = torch.float32 if name == "rms_decoder" else dtype  # transformers' RMS norms compute in float32
    assert found.dtype == dtype and not found.requires_grad
    assert small.relative_error(found, small.reference_scores(workload, direction)) <= DIFFERENCE[inside]
    assert not warnings_of()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_step_does_not_depend_on_the_size_of_the_direction(scale):
    workload = small.encoder()
    direction = {name: scale * v for name, v in small.direction_for(workload.model).items()}
    expected = small.reference_scores(workload, direction) / scale
    assert small.relative_error(scores_of(workload, direction) / scale, expected) <= DIFFERENCE[torch.float32]


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_step_goes_with_the_size_of_the_parameters(scale):
    """A function of theta / scale; at scale 1e-4 a step of the usual length would be fifty times theta."""
    model = nn.Linear(7, small.CLASSES, bias=False)
    nn.init.normal_(model.weight, std=scale)
    workload = small.on_features(model, 7)
    nn.init.normal_(model.weight, std=scale)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]).div(scale).sin(), batch["target"], reduction="none")

    workload = replace(workload, loss=loss)
    direction = {"weight": torch.randn(small.CLASSES, 7)}
    expected = small.reference_scores(workload, direction) * scale
    assert small.relative_error(scores_of(workload, direction) * scale, expected) <= 1e-2


def test_dropout_masks_are_drawn_once():
    """Every sample's masks are the same in both halves: without that the difference is noise over a small step."""
    workload = small.on_features(
        nn.Sequential(nn.Linear(7, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, small.CLASSES)), 7
    )
    direction = small.direction_for(workload.model)
    torch.manual_seed(3)
    exact = sample_scores(workload.model, workload.loss, workload.batch, direction, method="double_backward")
    after = torch.get_rng_state()
    for _ in range(2):  # with the check and without
        torch.manual_seed(3)
        assert small.relative_error(scores_of(workload, direction), exact.double()) <= DIFFERENCE[torch.float32]
        assert torch.equal(torch.get_rng_state(), after)
    assert small.relative_error(scores_of(workload, direction), exact.double()) > 0.1  # other masks


class Interrupting(nn.Module):
    """Raises in its second call in the range, when the parameters are somewhere else."""

    def __init__(self, error):
        super().__init__()
        self.linear, self.error, self.calls, self.armed = nn.Linear(7, small.CLASSES), error, 0, False
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        if self.armed and self.calls == 2:
            raise self.error
        return self.linear(x)


@pytest.mark.parametrize("error", [None, RuntimeError("stop"), KeyboardInterrupt()])
def test_parameters_and_buffers_come_back_bit_by_bit(error):
    model = Interrupting(error)
    workload = small.on_features(model, 7)
    with torch.no_grad():
        model.linear.weight[0, :3] = torch.tensor([-0.0, 1e-42, float("nan")])
        model.linear.weight[0, 2] = 1e30
    direction = small.direction_for(model)
    scores_of(workload, direction)  # the check is done
    before = {name: (p.data_ptr(), p._version, p.detach().clone()) for name, p in model.named_parameters()}
    model.calls, model.armed, count = 0, error is not None, model.count.clone()
    if error is None:
        scores_of(workload, direction)
    else:
        with pytest.raises(type(error)):
            scores_of(workload, direction)
    for name, parameter in model.named_parameters():
        place, version, value = before[name]
        assert (parameter.data_ptr(), parameter._version) == (place, version)
        assert torch.equal(parameter.detach().view(torch.int32), value.view(torch.int32)), name
    assert torch.equal(model.count, count)
    assert model.calls == 2


def test_power_iterations_are_undone():
    workload = small.on_features(nn.utils.parametrizations.spectral_norm(nn.Linear(7, small.CLASSES)), 7)
    for _ in range(50):  # until they stand still: each half iterates from the same start
        workload.losses()
    before = {name: buffer.clone() for name, buffer in workload.model.named_buffers()}
    direction = small.direction_for(workload.model)
    scores_of(workload, direction)
    assert before and all(torch.equal(b, before[name]) for name, b in workload.model.named_buffers())


def test_inside_one_autocast_region():
    """Autocast would give the second half the first one's casts: a difference of zero."""
    workload = small.encoder()
    direction = small.direction_for(workload.model)
    expected = small.reference_scores(workload, direction)
    with torch.autocast("cpu", torch.bfloat16):
        workload.losses()  # fills the cache
        found = scores_of(workload, direction)
        workload.losses().sum().backward()  # nothing made without a graph is left in the cache
    assert small.relative_error(found, expected) <= DIFFERENCE[torch.bfloat16]
    assert all(p.grad is not None for name, p in workload.model.named_parameters())


def test_16_bit_parameters_are_refused():
    workload = small.mlp()
    workload.model[3].bfloat16()
    with pytest.raises(MethodUnavailable, match=r"'3.weight' in torch.bfloat16.*float32 parameters under"):
        scores_of(workload, small.direction_for(workload.model))


@pytest.mark.parametrize("how", ["a loss with a constant weight", "under no_grad"])
def test_what_backward_does_not_see_is_refused(how):
    """The difference sees the change of DIMP's weight, which its gradient takes for a constant."""
    workload = small.mlp()

    def dimp(model, batch):
        quality = torch.linspace(0.2, 0.9, len(batch["x"]))
        return fused_dimp_loss(model(batch["x"]), batch["target"], quality, reduction="none")

    def weighted(model, batch):
        with torch.no_grad():
            weight = model(batch["x"]).softmax(-1)[:, 0]
        return weight * small.classifier_loss(model, batch)

    workload = replace(workload, loss=dimp if "constant" in how else weighted)
    with pytest.raises(MethodUnavailable, match=r"disagree with the exact scores.*detached"):
        scores_of(workload, small.direction_for(workload.model))


def test_another_step_is_found_where_the_loss_bends():
    """sin(2000 x): the usual step goes over half a period."""

    def loss(model, batch):
        return (2000 * model(batch["x"])).sin().sum(1)

    model = nn.Linear(7, 1).double()
    batch = {"x": torch.randn(small.SAMPLES, 7), "target": torch.zeros(small.SAMPLES)}
    workload = small.Workload(model, batch, loss).to(torch.float32)
    direction = small.direction_for(workload.model)
    found = scores_of(workload, direction)
    assert difference._records[workload.model].factor == 1 / 64
    assert small.relative_error(found, small.reference_scores(workload, direction)) <= 5e-2


def counted(workload):
    sizes = []

    def loss(model, batch):
        losses = workload.loss(model, batch)
        sizes.append(len(losses))
        return losses

    return replace(workload, loss=loss), sizes


def test_checks_are_rare():
    workload, sizes = counted(small.mlp())
    direction = small.direction_for(workload.model)
    passes = []
    for _ in range(70):
        sizes.clear()
        scores_of(workload, direction)
        passes.append(len(sizes))
    assert [call for call, count in enumerate(passes) if count > 2] == [0, 8, 64]
    assert min(passes) == 2
    workload.model.eval()
    sizes.clear()
    scores_of(workload, direction)
    assert len(sizes) > 2  # another mode, another check


def test_a_check_costs_one_full_pass_at_most():
    workload, sizes = counted(small.mlp())
    scores_of(workload, small.direction_for(workload.model))
    assert sizes.count(small.SAMPLES) == 3 and sizes.count(4) >= 3


def test_nothing_is_kept_of_a_model():
    workload = small.mlp()
    scores_of(workload, small.direction_for(workload.model))
    count = len(difference._records)
    del workload
    gc.collect()
    assert len(difference._records) < count


def test_a_batch_that_cannot_be_cut_is_said_in_the_log(warnings_of):
    """Samples in the second dimension: the first rows would be the first words of every sample."""
    workload = small.on_features(nn.Linear(7, small.CLASSES), 7)
    batch = {"x": torch.randn(3, small.SAMPLES, 7), "target": workload.batch["target"]}

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]).sum(0), batch["target"], reduction="none")

    workload = replace(workload, batch=batch, loss=loss)
    direction = small.direction_for(workload.model)
    found = scores_of(workload, direction)
    assert small.relative_error(found, small.reference_scores(workload, direction)) <= DIFFERENCE[torch.float32]
    (line,) = warnings_of()
    assert "not checked" in line and "first dimension is 6, got (3, 6, 7)" in line


Pair = collections.namedtuple("Pair", ["x", "rest"])


@dataclasses.dataclass(frozen=True)
class Row:
    x: torch.Tensor
    name: str


def test_batches_are_cut_in_their_own_shape():
    from transformers import BatchEncoding

    x = torch.arange(12).view(6, 2)
    cut = difference.first_rows(Pair(x, [Row(x, "a"), {"n": torch.tensor(3.0), "s": None}]), 6, 4)
    assert isinstance(cut, Pair) and torch.equal(cut.x, x[:4])
    assert isinstance(cut.rest[0], Row) and len(cut.rest[0].x) == 4 and cut.rest[0].name == "a"
    assert cut.rest[1] == {"n": torch.tensor(3.0), "s": None}
    encoded = BatchEncoding({"input_ids": x})
    cut = difference.first_rows(encoded, 6, 4)
    assert isinstance(cut, BatchEncoding) and len(cut["input_ids"]) == 4 and len(encoded["input_ids"]) == 6
    assert len(cut.input_ids) == 4
    assert len(difference.first_rows((x, x), 6, 4)[1]) == 4
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(6, 3, 1), torch.tensor([3] * 6), batch_first=True)
    for wrong in (packed, "text", x.t()):
        with pytest.raises(ValueError):
            difference.first_rows(wrong, 6, 4)


def test_direction_of_zero_or_nan():
    workload = small.mlp()
    zero = {name: torch.zeros_like(v) for name, v in small.direction_for(workload.model).items()}
    assert torch.equal(scores_of(workload, zero), torch.zeros(small.SAMPLES))
    nan = {name: torch.full_like(v, torch.nan) for name, v in zero.items()}
    assert scores_of(workload, nan).isnan().all()
