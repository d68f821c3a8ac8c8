"""The scored step: scores of the unweighted losses, and the gradients that plain backward makes."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import meta_models as small
import pytest
import torch
from tolerances import SCORES
from torch import nn
from torch.nn import functional as F

from synkern.meta import MethodUnavailable, linear, sample_scores, scored_step

pytest.importorskip("transformers")

GRADIENTS = {torch.float64: 1e-10, torch.float32: 2e-5}  # of the largest entry of a parameter's gradient
WEIGHTS = torch.tensor([0.0, 1.5, -0.5, 0.25, 2.0, 1.0])
WAYS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "normalizer": {"normalizer": 4.0},
    "tensor normalizer": {"normalizer": torch.tensor(3.0)},
    "weighted": {"sample_weight": WEIGHTS},
    "weighted sum": {"sample_weight": WEIGHTS, "reduction": "sum"},
    "weighted mean": {"sample_weight": WEIGHTS, "reduction": "weighted_mean"},
    "weighted normalizer": {"sample_weight": WEIGHTS, "normalizer": 5.0},
}


def plain_loss(losses, sample_weight=None, reduction="mean", normalizer=None):
    weight = torch.ones_like(losses) if sample_weight is None else sample_weight
    denominator = {"mean": len(losses), "sum": 1.0, "weighted_mean": weight.sum()}[reduction]
    return (losses * weight).sum() / (denominator if normalizer is None else normalizer)


def plain_gradients(workload, **options):
    model = workload.model
    model.zero_grad()
    loss = plain_loss(workload.losses(), **options)
    loss.backward()
    gradients = small.gradients_of(model)
    model.zero_grad()
    return loss.detach(), gradients


def assert_same_gradients(got, expected, tolerance):
    assert got.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        assert (got[name] - gradient).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["encoder", "decoder", "cnn", "mlp", "attention", "shared"])
def test_scores_and_gradients(name, way):
    workload = small.WORKLOADS[name]().to(torch.float64)
    options = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in WAYS[way].items()}
    direction = small.direction_for(workload.model)
    expected, gradients = plain_gradients(workload, **options)
    scores = small.reference_scores(workload, direction)
    for _ in range(2):
        workload.model.zero_grad()
        with scored_step(workload.model, direction) as step:
            loss = step.reduce(workload.losses(), **options)
            loss.backward()
        torch.testing.assert_close(loss.detach(), expected)
        assert small.relative_error(step.scores, scores) <= SCORES[torch.float64]
        assert_same_gradients(small.gradients_of(workload.model), gradients, GRADIENTS[torch.float64])


@pytest.mark.parametrize("name", ["encoder", "rms_decoder", "cnn_1d", "mlp"])
def test_in_float32(name):
    workload = small.WORKLOADS[name]()
    direction = small.direction_for(workload.model)
    _, gradients = plain_gradients(workload, sample_weight=WEIGHTS)
    with scored_step(workload.model, direction) as step:
        step.reduce(workload.losses(), sample_weight=WEIGHTS).backward()
    assert small.relative_error(step.scores, small.reference_scores(workload, direction)) <= SCORES[torch.float32]
    assert step.scores.dtype == torch.float32
    assert_same_gradients(small.gradients_of(workload.model), gradients, GRADIENTS[torch.float32])


def test_gradients_accumulate_and_hooks_see_them():
    workload = small.encoder().to(torch.float64)
    direction = small.direction_for(workload.model)
    _, gradients = plain_gradients(workload)
    seen = []
    for name, p in workload.model.named_parameters():
        p.grad = torch.ones_like(p)
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    with scored_step(workload.model, direction) as step:
        step.reduce(workload.losses()).backward()
    accumulated = {name: g - 1 for name, g in small.gradients_of(workload.model).items()}
    assert sorted(seen) == sorted(gradients)
    assert_same_gradients({name: accumulated[name] for name in gradients}, gradients, GRADIENTS[torch.float64])
    assert all(not accumulated[name].any() for name in accumulated.keys() - gradients.keys())


def test_gradient_of_the_weights():
    workload = small.mlp().to(torch.float64)
    direction = small.direction_for(workload.model)
    for reduction in ("mean", "sum", "weighted_mean"):
        weight, other = (WEIGHTS.double().requires_grad_() for _ in range(2))
        with scored_step(workload.model, direction) as step:
            step.reduce(workload.losses(), sample_weight=weight, reduction=reduction).backward()
        plain_loss(workload.losses(), other, reduction).backward()
        torch.testing.assert_close(weight.grad, other.grad)


def test_frozen_parameters_get_nothing():
    workload = small.encoder()
    for p in workload.model.bert.embeddings.parameters():
        p.requires_grad_(False)
    workload.model.bert.encoder.layer[0].attention.self.query.bias.requires_grad_(False)
    named = dict(workload.model.named_parameters())
    direction = {name: v for name, v in small.direction_for(workload.model).items() if named[name].requires_grad}
    _, gradients = plain_gradients(workload, sample_weight=WEIGHTS)
    with scored_step(workload.model, direction) as step:
        step.reduce(workload.losses(), sample_weight=WEIGHTS).backward()
    assert small.relative_error(step.scores, small.reference_scores(workload, direction)) <= SCORES[torch.float32]
    assert_same_gradients(small.gradients_of(workload.model), gradients, GRADIENTS[torch.float32])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reweighted", [False, True])
def test_gradient_checkpointing(reentrant, reweighted):
    workload = small.encoder().to(torch.float64)
    direction = small.direction_for(workload.model)
    scores = small.reference_scores(workload, direction)
    weights = learned_weights(scores) if reweighted else WEIGHTS.double()
    _, gradients = plain_gradients(workload, sample_weight=weights)
    workload.model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        workload.model.zero_grad()
        with scored_step(workload.model, direction, reweight=learned_weights if reweighted else None) as step:
            given = {} if reweighted else {"sample_weight": weights}
            step.reduce(workload.losses(), **given).backward()
        assert small.relative_error(step.scores, scores) <= SCORES[torch.float64]
        assert_same_gradients(small.gradients_of(workload.model), gradients, GRADIENTS[torch.float64])


def test_autocast_and_a_loss_scale():
    workload = small.encoder()
    direction = small.direction_for(workload.model)
    scores = small.reference_scores(workload, direction)
    with torch.autocast("cpu", torch.bfloat16):
        loss = plain_loss(workload.losses(), WEIGHTS)
    loss.backward()
    gradients = small.gradients_of(workload.model)
    workload.model.zero_grad()
    with scored_step(workload.model, direction) as step:
        with torch.autocast("cpu", torch.bfloat16):
            loss = step.reduce(workload.losses(), sample_weight=WEIGHTS)
        (1024 * loss).backward()
    scaled = {name: g / 1024 for name, g in small.gradients_of(workload.model).items()}
    assert_same_gradients(scaled, gradients, 0.05)
    assert small.relative_error(step.scores, scores) <= 0.05


class Long(nn.Module):
    """Layers and samples so large that shares are read off each sample's gradient."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.first, self.second, self.head = nn.Linear(128, 144), Conv1D(128, 144), nn.Linear(128, small.CLASSES)

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).mean(1))


@pytest.mark.parametrize("way", ["mean", "weighted", "weighted mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_samples(dtype, way, monkeypatch):
    workload = small.on_features(Long(), 64, 128).to(dtype)
    direction = small.direction_for(workload.model)
    options = {k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in WAYS[way].items()}
    _, gradients = plain_gradients(workload, **options)
    calls = []
    by_sample = linear.gradient_by_sample
    monkeypatch.setattr(linear, "gradient_by_sample", lambda *args: calls.append(1) or by_sample(*args))
    with scored_step(workload.model, direction) as step:
        step.reduce(workload.losses(), **options).backward()
    assert len(calls) == 2
    assert small.relative_error(step.scores, small.reference_scores(workload, direction)) <= SCORES[dtype]
    assert_same_gradients(small.gradients_of(workload.model), gradients, GRADIENTS[dtype])


# Reweighting


def learned_weights(scores):
    positive = scores.clamp(min=0)
    return positive / positive.sum()


@pytest.mark.parametrize("reduction", ["sum", "mean", "weighted_mean"])
@pytest.mark.parametrize("name", ["encoder", "decoder", "cnn", "mlp", "attention", "shared"])
def test_reweighting_equals_two_passes(name, reduction):
    """Learning to reweight as published: differentiate the outer loss after a virtual step, then train with weights."""
    workload = small.WORKLOADS[name]().to(torch.float64)
    direction = small.direction_for(workload.model)
    scores = small.reference_scores(workload, direction)
    weights = learned_weights(scores)
    assert 0 < (weights > 0).sum() < len(weights)
    _, gradients = plain_gradients(workload, sample_weight=weights, reduction=reduction)
    for _ in range(2):
        workload.model.zero_grad()
        with scored_step(workload.model, direction, reweight=learned_weights) as step:
            step.reduce(workload.losses(), reduction=reduction).backward()
        assert small.relative_error(step.scores, scores) <= SCORES[torch.float64]
        torch.testing.assert_close(step.weights, weights)
        assert_same_gradients(small.gradients_of(workload.model), gradients, GRADIENTS[torch.float64])


def test_reweighting_accumulates():
    workload = small.mlp().to(torch.float64)
    direction = small.direction_for(workload.model)
    weights = learned_weights(small.reference_scores(workload, direction))
    _, gradients = plain_gradients(workload, sample_weight=weights, reduction="sum")
    for _ in range(3):
        with scored_step(workload.model, direction, reweight=learned_weights) as step:
            step.reduce(workload.losses(), reduction="sum").backward()
    assert_same_gradients(
        {name: g / 3 for name, g in small.gradients_of(workload.model).items()}, gradients, GRADIENTS[torch.float64]
    )


@pytest.mark.parametrize("weights", [lambda s: s[:-1], lambda s: s.sum(), lambda s: 1.0])
def test_weights_of_a_wrong_shape(weights):
    workload = small.mlp()
    with (
        pytest.raises(ValueError, match=r"reweight must return weights of shape \(6,\)"),
        scored_step(workload.model, small.direction_for(workload.model), reweight=weights) as step,
    ):
        step.reduce(workload.losses()).backward()
    assert not any("forward" in vars(module) for module in workload.model.modules())


# Refusals


def around_an_unknown_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mid, self.head = nn.Linear(7, 5), nn.Bilinear(5, 5, 5), nn.Linear(5, small.CLASSES)

        def forward(self, x):
            x = self.first(x)
            return self.head(self.mid(x, x))

    return small.on_features(Model(), 7)


def test_weights_need_every_gradient_to_be_captured():
    workload = around_an_unknown_layer()
    direction = {n: v for n, v in small.direction_for(workload.model).items() if not n.startswith("mid")}
    _, gradients = plain_gradients(workload)
    with scored_step(workload.model, direction) as step:  # without weights it does not matter
        step.reduce(workload.losses()).backward()
    assert_same_gradients(small.gradients_of(workload.model), gradients, GRADIENTS[torch.float32])
    assert small.relative_error(step.scores, small.reference_scores(workload, direction)) <= SCORES[torch.float32]
    for options, given in (({}, {"sample_weight": WEIGHTS}), ({"reweight": learned_weights}, {})):
        with (
            pytest.raises(ValueError, match=r"would not reach that of 'mid.weight'.*Bilinear"),
            scored_step(workload.model, direction, **options) as step,
        ):
            step.reduce(workload.losses(), **given)


def test_weights_need_parameters_to_be_used_by_their_modules():
    workload = small.on_features(nn.Sequential(nn.Linear(7, 7), nn.Linear(7, small.CLASSES)), 7)

    def loss(model, batch):
        x = F.linear(model[0](batch["x"]), model[0].weight)
        return small.classifier_loss(model[1], batch | {"x": x})

    workload = replace(workload, loss=loss)
    direction = {n: v for n, v in small.direction_for(workload.model).items() if n != "0.weight"}
    _, gradients = plain_gradients(workload)
    with scored_step(workload.model, direction) as step:
        step.reduce(workload.losses()).backward()
    assert_same_gradients(small.gradients_of(workload.model), gradients, GRADIENTS[torch.float32])
    with (
        pytest.raises(ValueError, match=r"'0.weight'.*outside its module's forward"),
        scored_step(workload.model, direction) as step,
    ):
        step.reduce(workload.losses(), sample_weight=WEIGHTS)


def test_weights_and_inputs_that_require_grad():
    workload = small.mlp()
    direction = small.direction_for(workload.model)
    workload.batch["x"].requires_grad_()
    with (
        pytest.raises(ValueError, match=r"a tensor of shape \(6, 7\).*no parameter of the model"),
        scored_step(workload.model, direction) as step,
    ):
        step.reduce(workload.losses(), sample_weight=WEIGHTS)
    workload.batch["x"].requires_grad_(False)
    with scored_step(workload.model, direction) as step:
        step.reduce(workload.losses(), sample_weight=WEIGHTS).backward()
    assert small.relative_error(step.scores, small.reference_scores(workload, direction)) <= SCORES[torch.float32]


def test_another_loss_in_the_same_backward():
    workload = small.mlp()
    direction = small.direction_for(workload.model)
    with pytest.raises(MethodUnavailable, match="no other loss"), scored_step(workload.model, direction) as step:
        logits = workload.model(workload.batch["x"])
        losses = F.cross_entropy(logits, workload.batch["target"], reduction="none")
        (step.reduce(losses) + logits.pow(2).mean()).backward()
    decay = sum(p.pow(2).sum() for p in workload.model.parameters())
    workload.model.zero_grad()
    with scored_step(workload.model, direction) as step:  # one of the parameters alone is no matter
        (step.reduce(workload.losses()) + decay).backward()
    assert small.relative_error(step.scores, small.reference_scores(workload, direction)) <= SCORES[torch.float32]
    got = small.gradients_of(workload.model)
    workload.model.zero_grad()
    (workload.losses().mean() + sum(p.pow(2).sum() for p in workload.model.parameters())).backward()
    assert_same_gradients(got, small.gradients_of(workload.model), GRADIENTS[torch.float32])


def test_batch_statistics_are_refused():
    workload = small.on_features(nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, small.CLASSES)), 7)
    with (
        pytest.raises(MethodUnavailable, match=r"'1' \(BatchNorm1d\)"),
        scored_step(workload.model, small.direction_for(workload.model)),
    ):
        pass


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (lambda x: {"losses": x.mean()}, ValueError, r"shape \(N,\).*got \(\)"),
        (lambda x: {"losses": x[:0]}, ValueError, r"got \(0,\)"),
        (lambda x: {"losses": x.detach()}, ValueError, "do not depend on any parameter"),
        (lambda x: {"losses": 1.0}, TypeError, "got float"),
        (lambda x: {"losses": x, "sample_weight": WEIGHTS[:3]}, ValueError, r"shape \(6,\).*got \(3,\)"),
        (lambda x: {"losses": x, "sample_weight": [1.0] * 6}, TypeError, "got list"),
        (lambda x: {"losses": x, "reduction": "none"}, ValueError, "got 'none'"),
        (lambda x: {"losses": x, "reduction": "median"}, ValueError, "'median'"),
        (lambda x: {"losses": x, "reduction": "sum", "normalizer": 2.0}, ValueError, "normalizer"),
    ],
)
def test_arguments(arguments, error, match):
    workload = small.mlp()
    with pytest.raises(error, match=match), scored_step(workload.model, small.direction_for(workload.model)) as step:
        step.reduce(**arguments(workload.losses()))


def test_number_of_samples_given():
    """Positions looked up before anything shows how many samples there are."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.head = nn.Embedding(4, 7), nn.Linear(7, small.CLASSES)

    def loss(model, batch):
        position = model.position(torch.arange(4).unsqueeze(0))
        return small.classifier_loss(model.head, {"x": (batch["x"] * position).sum(1), "target": batch["target"]})

    workload = replace(small.on_features(nn.Identity(), 4, 7), model=Model(), loss=loss)
    direction = small.direction_for(workload.model)
    with pytest.raises(ValueError, match=r"'position' \(Embedding\)"), scored_step(workload.model, direction) as step:
        step.reduce(workload.losses()).backward()
    with scored_step(workload.model, direction, samples=small.SAMPLES) as step:
        step.reduce(workload.losses()).backward()
    assert small.relative_error(step.scores, small.reference_scores(workload, direction)) <= SCORES[torch.float32]
    with pytest.raises(ValueError, match="repeated 3 times"), scored_step(workload.model, direction, samples=3) as step:
        position = workload.model.position(torch.arange(4).unsqueeze(0))
        step.reduce(workload.model.head((workload.batch["x"][:1] * position).sum(1)).logsumexp(1)[:2])


def test_order_of_calls():
    workload = small.mlp()
    direction = small.direction_for(workload.model)
    with scored_step(workload.model, direction) as step:
        with pytest.raises(ValueError, match="no scores yet"):
            _ = step.scores
        loss = step.reduce(workload.losses())
        with pytest.raises(ValueError, match="called twice"):
            step.reduce(workload.losses())
        with pytest.raises(ValueError, match="no weights"):
            _ = step.weights
    with pytest.raises(ValueError, match="inside the with block"):
        loss.backward()
    with pytest.raises(ValueError, match="outside of its with block"):
        step.reduce(workload.losses())
    with (
        pytest.raises(ValueError, match="sample_weight and reweight"),
        scored_step(workload.model, direction, reweight=learned_weights) as step,
    ):
        step.reduce(workload.losses(), sample_weight=WEIGHTS)
    with (
        pytest.raises(ValueError, match=r"another way than step.reduce"),
        scored_step(workload.model, direction, reweight=learned_weights),
    ):
        workload.losses().mean().backward()
    with pytest.raises(TypeError, match="callable"):
        scored_step(workload.model, direction, reweight=WEIGHTS)
    with pytest.raises(ValueError, match=r"names 'nothing'"):
        scored_step(workload.model, {"nothing": WEIGHTS})


def test_a_backward_without_reduce_is_plain():
    workload = small.mlp()
    direction = small.direction_for(workload.model)
    _, gradients = plain_gradients(workload)
    with scored_step(workload.model, direction):
        workload.losses().mean().backward()
    assert_same_gradients(small.gradients_of(workload.model), gradients, GRADIENTS[torch.float32])


def test_two_backward_passes_of_one_loss():
    workload = small.mlp().to(torch.float64)
    direction = small.direction_for(workload.model)
    _, gradients = plain_gradients(workload)
    with scored_step(workload.model, direction) as step:
        loss = step.reduce(workload.losses())
        loss.backward(retain_graph=True)
        first = step.scores
        (3 * loss).backward()
    torch.testing.assert_close(step.scores, first)
    assert_same_gradients(
        {name: g / 4 for name, g in small.gradients_of(workload.model).items()}, gradients, GRADIENTS[torch.float64]
    )


def test_the_model_is_given_back_after_an_exception():
    workload = small.attention()
    hooks = [len(m._forward_pre_hooks) for m in workload.model.modules()]
    for options in ({}, {"reweight": learned_weights}):
        with pytest.raises(KeyError), scored_step(workload.model, small.direction_for(workload.model), **options):
            raise KeyError("in the body")
        assert not any("forward" in vars(module) for module in workload.model.modules())
        assert hooks == [len(m._forward_pre_hooks) for m in workload.model.modules()]
        assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("way", ["scores", "step", "reweighted", "failed"])
def test_nothing_is_kept_alive(way):
    workload = small.encoder()
    direction = small.direction_for(workload.model)
    given = workload.model.bert.pooler.dense
    activations = []
    workload.model.bert.pooler.register_forward_hook(lambda m, i, o: activations.append(weakref.ref(o)))

    def failing(scores):
        raise KeyError("no weights")

    step = None
    if way == "scores":
        sample_scores(workload.model, workload.loss, workload.batch, direction, method="contraction")
    else:
        reweight = {"reweighted": learned_weights, "failed": failing}.get(way)
        step = scored_step(workload.model, direction, reweight=reweight)
        with contextlib.suppress(KeyError), step:
            loss = step.reduce(workload.losses())
            loss.backward()
        del loss
    assert activations and all(x() is None for x in activations)
    model, given = weakref.ref(workload.model), weakref.ref(given)
    del workload, step
    gc.collect()
    assert model() is None and given() is None


def test_weights_made_from_the_losses_keep_nothing_alive():
    """The function of the scores holds the losses and their graph the step: a cycle through what no collector sees."""
    workload = small.mlp()

    def one_step():
        direction = small.direction_for(workload.model)
        with scored_step(workload.model, direction, reweight=lambda s: s.clamp(min=0) * losses.detach()) as step:
            losses = workload.losses()
            step.reduce(losses).backward()
        return [weakref.ref(x) for x in (losses, step, step.weights, *direction.values())]

    left = one_step()
    gc.collect()
    assert not [x() for x in left if x() is not None]


def test_training_with_scores_is_training():
    """The same parameters after some steps of Adam as without scores, and scores that follow the parameters."""
    workload = small.encoder().to(torch.float64)
    twin = copy.deepcopy(workload.model)
    direction = small.direction_for(workload.model)
    for model, scored in ((workload.model, True), (twin, False)):
        optimizer, own = torch.optim.Adam(model.parameters(), 1e-2), replace(workload, model=model)
        for _ in range(4):
            optimizer.zero_grad()
            if scored:
                expected = sample_scores(model, workload.loss, workload.batch, direction, method="contraction")
                with scored_step(model, direction) as step:
                    step.reduce(own.losses(), sample_weight=WEIGHTS.double()).backward()
                assert small.relative_error(step.scores, expected) <= SCORES[torch.float64]
            else:
                plain_loss(own.losses(), WEIGHTS.double()).backward()
            optimizer.step()
    for a, b in zip(workload.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_two_processes_give_the_gradients_of_one(tmp_path):
    from safetensors.torch import load_file

    script = Path(__file__).with_name("ddp_scored_step.py")
    import ddp_scored_step

    expected = ddp_scored_step.one_process()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(script.parent), str(script.parent.parent)]),
    }  # fmt: skip
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = load_file(tmp_path / "result.safetensors")
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
