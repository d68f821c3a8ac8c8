"""sample_scores and outer_direction: every exact method against plain gradients, the choice of a method, refusals."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from dataclasses import replace

import meta_models as small
import pytest
import torch
from tolerances import SCORES
from torch import library as torch_library
from torch import nn
from torch.nn import functional as F

from synkern import fused_cross_entropy, fused_dimp_loss
from synkern.meta import MethodUnavailable, outer_direction, sample_scores, scores

METHODS = ("contraction", "forward", "difference", "double_backward")


def scores_of(workload, direction, method, **options):
    return sample_scores(workload.model, workload.loss, workload.batch, direction, method=method, **options)


class Scale(nn.Module):
    """A layer that no rule knows."""

    def __init__(self, size=small.CLASSES):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size) * 1.3)

    def forward(self, x):
        return x * self.scale


class NoJvp(torch.autograd.Function):
    """x^2 with a backward alone, once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Square(nn.Module):
    def forward(self, x):
        return NoJvp.apply(x)


def unknown_layer():
    return small.on_features(nn.Sequential(nn.Linear(7, small.CLASSES), Scale()), 7)


def only_differences():
    return small.on_features(nn.Sequential(nn.Linear(7, small.CLASSES), Scale(), Square()), 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["forward", "double_backward"])
@pytest.mark.parametrize("name", small.WORKLOADS)
def test_exact_methods(name, method, dtype):
    workload = small.WORKLOADS[name]().to(dtype)
    direction = small.direction_for(workload.model)
    found = scores_of(workload, direction, method)
    assert found.dtype == dtype and found.shape == (small.SAMPLES,) and not found.requires_grad
    inside = torch.float32 if name == "rms_decoder" else dtype  # transformers' RMS norms compute in float32
    assert small.relative_error(found, small.reference_scores(workload, direction)) <= SCORES[inside]


@pytest.mark.parametrize("method", METHODS)
def test_parameters_left_out_have_direction_zero(method):
    workload = small.mlp()
    direction = {"3.weight": small.direction_for(workload.model)["3.weight"]}
    found = scores_of(workload, direction, method)
    assert small.relative_error(found, small.reference_scores(workload, direction)) <= 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_left_as_it_was(method):
    workload = small.mlp()
    model = workload.model.train()
    model[0].bias.requires_grad_(False)
    direction = {name: v for name, v in small.direction_for(model).items() if name != "0.bias"}
    outstanding = workload.losses().sum()  # a graph that holds the parameters
    model[3].weight.grad = torch.ones_like(model[3].weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        scores_of(workload, direction, method)
        assert not torch.is_grad_enabled()
    assert model.training and not model[0].bias.requires_grad and model[0].weight.requires_grad
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert model[0].weight.grad is None and torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    outstanding.backward()  # not spoilt by changes in place


@pytest.mark.parametrize("method", METHODS)
def test_dropout_masks_are_those_of_one_forward_pass(method):
    workload = small.on_features(
        nn.Sequential(nn.Linear(7, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, small.CLASSES)), 7
    )
    direction = small.direction_for(workload.model)
    torch.manual_seed(5)
    workload.losses()
    after = torch.get_rng_state()

    def seeded_loss(model, batch):
        torch.manual_seed(5)
        return workload.loss(model, batch)

    expected = small.reference_scores(replace(workload, loss=seeded_loss), direction)
    for _ in range(2):
        torch.manual_seed(5)
        found = scores_of(workload, direction, method)
        assert small.relative_error(found, expected) <= 1e-3
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("method", ["forward", "double_backward"])
def test_autocast(method):
    workload = small.encoder()
    direction = small.direction_for(workload.model)
    with torch.autocast("cpu", torch.bfloat16):
        found = scores_of(workload, direction, method)
    assert found.dtype == torch.float32
    assert small.relative_error(found, small.reference_scores(workload, direction)) <= 5e-2


def test_dimp_weight_is_a_constant():
    """The detached weight of DIMP: forward mode goes by the loss's own formula."""
    workload = small.mlp()

    def loss(model, batch):
        quality = torch.linspace(0.2, 0.9, small.SAMPLES, dtype=batch["x"].dtype)
        return fused_dimp_loss(model(batch["x"]), batch["target"], quality, reduction="none")

    workload = replace(workload, loss=loss)
    direction = small.direction_for(workload.model)
    expected = small.reference_scores(workload, direction)
    for method in ("contraction", "forward", "double_backward"):
        assert small.relative_error(scores_of(workload, direction, method), expected) <= SCORES[torch.float32], method


def choice(caplog, workload, direction):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="synkern.meta"):
        found = scores_of(workload, direction, "auto")
    assert small.relative_error(found, small.reference_scores(workload, direction)) <= 1e-3
    return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]


@pytest.mark.parametrize(
    ("make", "method", "why"),
    [
        (small.mlp, "contraction", ["the cheapest of the exact methods"]),
        (unknown_layer, "forward", ["not 'contraction'", "'1' (Scale)"]),
        (only_differences, "difference", ["not 'contraction'", "'1' (Scale)", "not 'forward'", "'2' (Square)"]),
    ],
    ids=["contraction", "forward", "difference"],
)
def test_auto_takes_the_cheapest_and_says_so_once(make, method, why, caplog):
    workload = make()
    direction = small.direction_for(workload.model)
    (line,) = choice(caplog, workload, direction)
    assert f"method {method!r}" in line
    for part in why:
        assert part in line
    assert choice(caplog, workload, direction) == []  # remembered
    assert method in choice(caplog, replace(workload, model=workload.model.eval()), direction)[0]


def test_auto_turns_to_another_method_when_the_loss_changes(caplog):
    """A choice made for one loss does not hold for another, here one with a part that has no derivative of its own."""
    workload = small.on_features(nn.Sequential(nn.Linear(7, small.CLASSES), Scale()), 7)
    direction = small.direction_for(workload.model)
    assert "'forward'" in choice(caplog, workload, direction)[0]

    def squared(model, batch):
        return NoJvp.apply(small.classifier_loss(model, batch))

    assert "'difference'" in choice(caplog, replace(workload, loss=squared), direction)[0]


@pytest.mark.parametrize("method", ["contraction", "auto"])
def test_a_new_loss_with_another_use_of_a_parameter(method):
    """What was found out with one loss does not hold for another."""
    workload = small.mlp()
    direction = small.direction_for(workload.model)
    scores_of(workload, direction, method)

    def decayed(model, batch):
        return small.classifier_loss(model, batch) + (model[0].weight ** 2).sum()

    decayed_workload = replace(workload, loss=decayed)
    if method == "contraction":
        with pytest.raises(MethodUnavailable, match=r"'0.weight'"):
            scores_of(decayed_workload, direction, method)
    else:
        found = scores_of(decayed_workload, direction, method)
        assert small.relative_error(found, small.reference_scores(decayed_workload, direction)) <= SCORES[torch.float32]


def test_auto_remembers_only_living_models():
    workload = small.mlp()
    scores_of(workload, small.direction_for(workload.model), "auto")
    count = len(scores._choices)
    del workload
    gc.collect()
    assert len(scores._choices) < count


@pytest.mark.parametrize(
    ("make", "method", "name"),
    [
        (unknown_layer, "contraction", r"'1' \(Scale\)"),
        (only_differences, "forward", r"'2' \(Square\)"),
        (only_differences, "double_backward", "Sequential"),
    ],
)
def test_a_method_that_cannot_be_had_names_the_module(make, method, name):
    workload = make()
    with pytest.raises(MethodUnavailable, match=name):
        scores_of(workload, small.direction_for(workload.model), method)


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_batch_statistics_are_refused(method):
    workload = small.cnn()
    direction = small.direction_for(workload.model)
    workload.model[4].train()
    with pytest.raises(ValueError, match=r"'4' \(BatchNorm2d\).*from the batch"):
        scores_of(workload, direction, method)


def test_forward_mode_refuses_what_runs_under_no_grad():
    """Backward stops at no_grad and forward mode does not."""
    workload = small.mlp()

    def loss(model, batch):
        with torch.no_grad():
            weight = model(batch["x"]).softmax(-1)[:, 0]
        return weight * small.classifier_loss(model, batch)

    workload = replace(workload, loss=loss)
    direction = small.direction_for(workload.model)
    with pytest.raises(MethodUnavailable, match="no_grad"):
        scores_of(workload, direction, "forward")
    found = scores_of(workload, direction, "auto")
    assert small.relative_error(found, small.reference_scores(workload, direction)) <= SCORES[torch.float32]


def test_forward_mode_refuses_operators_that_drop_the_tangent():
    library = torch_library.Library("synkern_test", "FRAGMENT")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: 2 * x, "CompositeExplicitAutograd")
    torch_library.register_autograd(
        "synkern_test::double", lambda ctx, grad: 2 * grad, lib=library
    )
    workload = small.mlp()

    def loss(model, batch):
        return fused_cross_entropy(
            torch.ops.synkern_test.double(model(batch["x"])), batch["target"], reduction="none"
        )

    workload = replace(workload, loss=loss)
    direction = small.direction_for(workload.model)
    with pytest.raises(MethodUnavailable, match="synkern_test"):
        scores_of(workload, direction, "forward")


def test_losses_without_gradient_are_an_error():
    workload = small.mlp()

    def loss(model, batch):
        with torch.no_grad():
            return small.classifier_loss(model, batch)

    for method in ("contraction", "double_backward"):
        with pytest.raises(ValueError, match="do not depend"):
            scores_of(replace(workload, loss=loss), small.direction_for(workload.model), method)


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda m, b: F.cross_entropy(m(b["x"]), b["target"]), ValueError, r"\(N,\), got \(\); use reduction='none'"),
        (lambda m, b: m(b["x"]), ValueError, r"got \(6, 4\)"),
        (lambda m, b: 1.0, TypeError, "got float"),
        (lambda m, b: b["target"], TypeError, "got torch.int64"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_losses_of_another_shape_are_an_error(loss, error, words, method):
    workload = replace(small.mlp(), loss=loss)
    with pytest.raises(error, match=words):
        scores_of(workload, small.direction_for(workload.model), method)


def wrong_directions(model):
    good = small.direction_for(model)
    weight = good["0.weight"]
    return {
        r"'0.wieght'.*did you mean '0.weight'": {"0.wieght": weight},
        r"got \(7, 16\)": {"0.weight": weight.t()},
        r"must be torch.float32.*got torch.float64; use .to": {"0.weight": weight.double()},
        r"device cpu, got meta": {"0.weight": weight.to("meta")},
        r"is empty": {},
        r"'0.bias', which does not require grad": good,
    }


def test_wrong_directions_are_explained():
    workload = small.mlp()
    workload.model[0].bias.requires_grad_(False)
    for words, direction in wrong_directions(workload.model).items():
        with pytest.raises(ValueError, match=words):
            scores_of(workload, direction, "auto")
    with pytest.raises(TypeError, match="must map parameter names"):
        scores_of(workload, [torch.ones(3)], "auto")
    with pytest.raises(TypeError, match="got list"):
        scores_of(workload, {"0.weight": [1.0]}, "auto")
    with pytest.raises(ValueError, match="method must be one of contraction"):
        scores_of(workload, {}, "hessian")


def test_a_shared_parameter_goes_by_its_first_name():
    workload = small.decoder()
    weight = workload.model.transformer.wte.weight
    with pytest.raises(ValueError, match=r"shared.*use 'transformer.wte.weight'"):
        scores_of(workload, {"lm_head.weight": torch.ones_like(weight)}, "forward")


def test_direction_is_the_gradient_of_the_summed_outer_loss():
    workload = small.mlp()
    model, batch = workload.model, workload.batch
    halves = [{k: x[part] for k, x in batch.items()} for part in (slice(2), slice(2, None))]
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    model[0].unused = nn.Linear(2, 2)
    found = outer_direction(model, iter(halves), lambda m, b: workload.loss(m, b).sum())
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(found["0.unused.weight"], torch.zeros(2, 2))
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight)) and model[0].weight.grad is None
    model.zero_grad()
    workload.losses().sum().backward()
    for name, gradient in small.gradients_of(model).items():
        torch.testing.assert_close(found[name], gradient)
    unit = outer_direction(model, halves, lambda m, b: workload.loss(m, b).sum(), normalize="norm")
    norm = torch.stack([v.norm() for v in found.values()]).norm()
    assert abs(torch.stack([v.norm() for v in unit.values()]).norm() - 1) < 1e-6
    torch.testing.assert_close(unit["0.weight"] * norm, found["0.weight"])
    zero = outer_direction(model, halves, lambda m, b: 0 * workload.loss(m, b).sum(), normalize="norm")
    assert all(torch.equal(v, torch.zeros_like(v)) for v in zero.values())


def test_direction_of_16_bit_parameters_is_float32():
    """Many small batches: in bfloat16 the sum would stop growing."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    found = outer_direction(model, [None] * 1000, lambda m, b: m(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
    assert found["weight"].dtype == torch.float32 and found["weight"].item() == 1000


def test_direction_scores_its_own_loss_downhill():
    """<v, grad l> summed over the outer batch itself is |v|^2."""
    workload = small.cnn()
    v = outer_direction(workload.model, [workload.batch], lambda m, b: workload.loss(m, b).sum())
    total = sum(x.double().square().sum() for x in v.values())
    torch.testing.assert_close(scores_of(workload, v, "auto").double().sum(), total, rtol=1e-5, atol=0)


def test_wrong_outer_losses_are_explained():
    workload = small.mlp()
    model, batches = workload.model, [workload.batch]
    with pytest.raises(ValueError, match=r"one number, got shape \(6,\)"):
        outer_direction(model, batches, workload.loss)
    with pytest.raises(TypeError, match="got float"):
        outer_direction(model, batches, lambda m, b: 0.0)
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        outer_direction(model, batches, lambda m, b: workload.loss(m, b).sum().detach())
    with pytest.raises(ValueError, match="at least one batch"):
        outer_direction(model, iter([]), lambda m, b: workload.loss(m, b).sum())
    with pytest.raises(ValueError, match="None or 'norm', got 'l2'"):
        outer_direction(model, batches, lambda m, b: workload.loss(m, b).sum(), normalize="l2")
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        outer_direction(nn.ReLU(), batches, lambda m, b: workload.loss(m, b).sum())


def test_the_package_loads_its_own_operators():
    """synkern.meta with a loss of torch, and nothing of synkern imported beside it."""
    program = (
        "import torch; from synkern.meta import sample_scores\n"
        "m, v = torch.nn.Linear(2, 1), {'weight': torch.ones(1, 2)}\n"
        "print(sample_scores(m, lambda m, x: m(x)[:, 0], torch.ones(3, 2), v, method='contraction').tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[2.0, 2.0, 2.0]", done.stderr
