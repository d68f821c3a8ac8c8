"""Scores by contraction: exact for every layer with a rule, refused for what has none or would be wrong."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import meta_models as small
import pytest
import torch
from cases import cases as loss_cases
from cases import make_inputs
from tolerances import SCORES
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from synkern import fused_cross_entropy
from synkern.meta import MethodUnavailable, outer_direction, sample_scores, scored_step
from synkern.meta.rules import RULES, LinearRule

pytest.importorskip("transformers")

contraction = partial(sample_scores, method="contraction")


def scores_of(workload, direction, **options):
    return contraction(workload.model, workload.loss, workload.batch, direction, **options)


def assert_exact(workload, dtype, direction=None):
    workload = workload.to(dtype)
    direction = direction or small.direction_for(workload.model)
    expected = small.reference_scores(workload, direction)
    for _ in range(2):  # the first use verifies, the second does not
        scores = scores_of(workload, direction)
        assert scores.dtype == dtype and scores.shape == expected.shape and not scores.requires_grad
        assert small.relative_error(scores, expected) <= SCORES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", small.WORKLOADS)
def test_scores_are_exact(name, dtype):
    if name == "rms_decoder" and dtype == torch.float64:
        pytest.skip("transformers normalises in float32 whatever the model's dtype")
    assert_exact(small.WORKLOADS[name](), dtype)


@pytest.mark.parametrize("name", ["encoder", "cnn", "attention", "mlp"])
def test_each_parameter_alone(name):
    workload = small.WORKLOADS[name]().to(torch.float64)
    whole = small.direction_for(workload.model)
    workload.losses().sum().backward()
    reached = {n for n, p in workload.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-8}
    assert len(reached) > 10
    for parameter in reached:
        direction = {parameter: whole[parameter]}
        expected = small.reference_scores(workload, direction)
        assert (scores_of(workload, direction) - expected).abs().max() <= 1e-10 * (1 + expected.abs().max()), parameter


@pytest.mark.parametrize("case", loss_cases(), ids=str)
def test_every_loss(case):
    inputs = make_inputs(case, small.SAMPLES, small.CLASSES)

    def fused(model, batch):
        logits = model(batch["x"])
        operands = {name: x.to(logits.dtype) for name, x in inputs.operands.items()}
        return case.fused(logits, inputs.target, reduction="none", **operands)

    def plain(model, batch):
        return case.reference(model(batch["x"]), inputs.target, reduction="none", **inputs.operands)

    workload = small.mlp()
    direction = small.direction_for(workload.model)
    expected = small.reference_scores(replace(workload, loss=plain), direction)
    scores = scores_of(replace(workload, loss=fused), direction)
    assert small.relative_error(scores, expected) <= SCORES[torch.float32]


def test_the_gradient_of_an_outer_loss():
    workload = small.encoder()
    direction = outer_direction(workload.model, [workload.batch], lambda m, b: workload.loss(m, b).sum())
    expected = small.reference_scores(workload, direction)
    assert small.relative_error(scores_of(workload, direction), expected) <= SCORES[torch.float32]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_gradient_checkpointing(name, reentrant):
    workload = small.WORKLOADS[name]().to(torch.float64)
    direction = small.direction_for(workload.model)
    expected = small.reference_scores(workload, direction)
    workload.model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    for p in workload.model.parameters():
        p.grad = torch.full_like(p, 7)
    for _ in range(2):
        assert small.relative_error(scores_of(workload, direction), expected) <= SCORES[torch.float64]
    assert all((p.grad == 7).all() for p in workload.model.parameters())


def test_dropout_masks_are_those_of_the_forward_pass():
    workload = small.encoder().to(torch.float64)
    for module in workload.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    workload.model.train()
    direction = small.direction_for(workload.model)
    torch.manual_seed(5)
    expected = small.reference_scores(workload, direction)
    torch.manual_seed(5)
    assert small.relative_error(scores_of(workload, direction), expected) <= SCORES[torch.float64]
    assert small.relative_error(scores_of(workload, direction), expected) > 1e-3  # other masks


@pytest.mark.parametrize("name", ["encoder", "decoder", "cnn", "mlp", "attention"])
def test_bfloat16_autocast(name):
    workload = small.WORKLOADS[name]()
    direction = small.direction_for(workload.model)
    expected = small.reference_scores(workload, direction)

    def under_autocast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return workload.loss(model, batch)

    scores = scores_of(replace(workload, loss=under_autocast), direction)
    assert scores.dtype == torch.float32
    named = dict(workload.model.named_parameters())
    plain = []  # what the gradients themselves are worth in bfloat16
    for loss in under_autocast(workload.model, workload.batch):
        gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        pairs = [(v, g) for v, g in zip(direction.values(), gradients, strict=True) if g is not None]
        plain.append(sum((v.double() * g).sum() for v, g in pairs))
    allowed = 2 * small.relative_error(torch.stack(plain), expected) + torch.finfo(torch.bfloat16).eps / 2
    assert small.relative_error(scores, expected) <= allowed
    with torch.autocast("cpu", torch.bfloat16):  # also around the backward pass
        assert torch.equal(scores_of(workload, direction), scores)


def test_bfloat16_parameters():
    workload = small.mlp()
    half = workload.to(torch.bfloat16)
    direction = {name: v.float() for name, v in small.direction_for(half.model).items()}
    expected = small.reference_scores(half, direction)
    assert small.relative_error(scores_of(half, direction), expected) <= 4 * torch.finfo(torch.bfloat16).eps


def test_one_sample_and_none():
    workload = small.mlp()
    direction = small.direction_for(workload.model)
    expected = small.reference_scores(workload, direction)
    for i in range(small.SAMPLES):
        one = replace(workload, batch={k: x[i : i + 1] for k, x in workload.batch.items()})
        assert (scores_of(one, direction) - expected[i]).abs() <= 1e-5 * expected.abs().max()
    empty = replace(workload, batch={k: x[:0] for k, x in workload.batch.items()})
    assert scores_of(empty, direction).shape == (0,)


class Flattened(nn.Module):
    """Tokens as rows of a matrix, by sample or, wrongly, by time."""

    def __init__(self, by_time=False):
        super().__init__()
        self.inner, self.head, self.by_time = nn.Linear(7, 9), nn.Linear(9, small.CLASSES), by_time

    def forward(self, x):
        n, t = x.shape[:2]
        rows = x.transpose(0, 1).reshape(n * t, -1) if self.by_time else x.reshape(n * t, -1)
        y = self.inner(rows).tanh()
        y = y.view(t, n, -1).transpose(0, 1) if self.by_time else y.view(n, t, -1)
        return self.head(y.mean(1))


def test_flattened_activations():
    assert_exact(small.on_features(Flattened(), 3, 7), torch.float64)


class Positions(nn.Module):
    """Positions as most decoders write them, shared by all samples."""

    def __init__(self, length, kind):
        super().__init__()
        self.token, self.position = nn.Embedding(small.VOCABULARY, 8), nn.Embedding(length, 8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, small.CLASSES)
        self.kind = kind

    def forward(self, x):
        places = torch.arange(x.shape[1])
        position = self.position(places.unsqueeze(0) if self.kind == "(1, T)" else places)  # before samples are seen
        token = self.token(input=x.flatten()).view(*x.shape, -1) if self.kind == "flat" else self.token(x)
        return self.head(input=self.inner(token + position).relu().mean(1))


def position_workload(length, kind):
    model = Positions(length, kind)
    batch = {
        "x": torch.randint(0, small.VOCABULARY, (small.SAMPLES, length)),
        "target": torch.randint(0, small.CLASSES, (small.SAMPLES,)),
    }
    return small.Workload(model, batch, small.classifier_loss)


@pytest.mark.parametrize("kind", ["(T,)", "(1, T)", "flat"])
def test_positions_shared_by_the_samples(kind):
    for length in (4, 1, 2 * small.SAMPLES):
        assert_exact(position_workload(length, kind), torch.float64)


def test_positions_where_the_model_itself_is_not_called():
    workload = position_workload(4, "(1, T)")

    def loss(model, batch):
        x = model.token(batch["x"]) + model.position(torch.arange(4).unsqueeze(0))
        logits = model.head(model.inner(x).relu().mean(1))
        return fused_cross_entropy(logits, batch["target"], reduction="none")

    assert_exact(replace(workload, loss=loss), torch.float64)


def test_as_many_positions_as_samples():
    assert_exact(position_workload(small.SAMPLES, "(1, T)"), torch.float64)
    ambiguous = position_workload(small.SAMPLES, "(T,)")
    direction = small.direction_for(ambiguous.model)
    with pytest.raises(MethodUnavailable, match="module 'position'"):
        scores_of(ambiguous, direction)
    known = replace(ambiguous, batch={"x": ambiguous.batch["x"][:, :3], "target": ambiguous.batch["target"]})
    scores_of(known, direction)  # what the positions are has been seen on a batch where it is plain
    expected = small.reference_scores(ambiguous, direction)
    assert small.relative_error(scores_of(ambiguous, direction), expected) <= SCORES[torch.float32]


# Refusals


def refused(model, match, *shape, direction=None, loss=small.classifier_loss):
    batch = {"x": torch.randn(small.SAMPLES, *(shape or (7,))), "target": torch.arange(small.SAMPLES) % small.CLASSES}
    with pytest.raises(MethodUnavailable, match=match):
        contraction(model, loss, batch, direction or small.direction_for(model))
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


class Around(nn.Module):
    """Some layer between two linear ones."""

    def __init__(self, layer, before=7, after=7):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(7, before), layer, nn.Linear(after, small.CLASSES)

    def forward(self, x):
        return self.head(self.layer(self.first(x)))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(7))

    def forward(self, x):
        return x * self.scale


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x.round())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(7, 7, 7)

    def forward(self, x):
        return self.inner(x, x)


def with_replaced_forward():
    layer = nn.Linear(7, 7)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    return layer


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: nn.BatchNorm1d(7), r"'layer' \(BatchNorm1d\).*statistics"),
        (lambda: nn.BatchNorm1d(7, affine=False), r"'layer' \(BatchNorm1d\).*statistics"),
        (lambda: nn.BatchNorm1d(7, track_running_stats=False).eval(), r"'layer' \(BatchNorm1d\).*statistics"),
        (Twice, r"'layer.inner' \(Bilinear\).*no rule.*weight, bias"),
        (Scaled, r"'layer' \(Scaled\).*no rule.*scale"),
        (lambda: Quantised(7, 7), r"'layer' \(Quantised\).*no rule"),
        (lambda: nn.PReLU(), r"'layer' \(PReLU\).*no rule"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(7, 7)), r"'layer.*computed from others"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(7, 7)), r"'layer.*computed from others"),
        (lambda: nn.Sequential(nn.Unflatten(1, (7, 1)), nn.ConvTranspose1d(7, 7, 1)), "ConvTranspose1d.*no rule"),
    ],
)
def test_layers_that_are_refused(make, match):
    refused(Around(make()), match)


def test_weight_norm_of_old():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(7, 7))
    refused(Around(layer), r"'layer' \(Linear\).*computed from others")


def test_a_forward_replaced_on_the_instance():
    model = Around(with_replaced_forward())
    with pytest.raises(MethodUnavailable, match=r"'layer' \(Linear\).*replaced on the instance"):
        contraction(model, small.classifier_loss, {}, small.direction_for(model))


@pytest.mark.parametrize("options, match", [({"max_norm": 1.0}, "max_norm"), ({"scale_grad_by_freq": True}, "counts")])
def test_embeddings_that_are_refused(options, match):
    workload = position_workload(4, "(1, T)")
    workload.model.token = nn.Embedding(small.VOCABULARY, 8, **options)
    with pytest.raises(MethodUnavailable, match=rf"'token' \(Embedding\).*{match}"):
        scores_of(workload, small.direction_for(workload.model))


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_that_is_refused(options):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(7, 1, batch_first=True, **options), nn.Linear(7, 4)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0][:, 0])

    refused(Model(), rf"'attention' \(MultiheadAttention\).*{next(iter(options))}", 3, 7)


class TimeFirst(nn.Module):
    """Sequences as torch's recurrent layers and encoders have them by default."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.rms = nn.Linear(7, 5), nn.LayerNorm(5), nn.RMSNorm(5, eps=1e-5)
        self.head = nn.Linear(5, small.CLASSES)

    def forward(self, x):
        y = self.rms(self.norm(self.inner(x.transpose(0, 1))).tanh()).mean(0)
        return self.head(y)


@pytest.mark.parametrize("length", [4, 2 * small.SAMPLES])
def test_time_first(length):
    workload = small.on_features(TimeFirst(), length, 7)
    assert_exact(workload, torch.float64)
    square = replace(small.on_features(nn.Identity(), small.SAMPLES, 7), model=workload.model)
    assert_exact(replace(workload, batch=workload.batch | {"x": workload.batch["x"][:, :1]}), torch.float64)
    direction = small.direction_for(workload.model)
    scores_of(workload, direction)  # from here on it is known what dimension 0 is
    expected = small.reference_scores(square, direction)
    assert small.relative_error(scores_of(square, direction), expected) <= SCORES[torch.float32]


def test_samples_not_first():
    class Images(nn.Module):
        """Channels before the samples."""

        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(7, 5), nn.Linear(5, small.CLASSES)

        def forward(self, x):
            return self.head(self.inner(x.permute(1, 2, 0, 3)).tanh().mean((0, 1)))

    refused(TimeFirst(), r"'rms' \(RMSNorm\).*samples in dimension 0", small.SAMPLES, 7)  # looks right, is not
    refused(Images(), r"'inner' \(Linear\).*samples in dimension 0", 2, 2, 7)
    refused(Images(), r"'inner' \(Linear\).*samples in dimension 0", small.SAMPLES, 2, 7)
    refused(Images(), r"'inner' \(Linear\).*samples in dimension 0", 2 * small.SAMPLES, 2, 7)
    refused(Flattened(by_time=True), r"'inner' \(Linear\).*samples in dimension 0", 4, 7)


def test_samples_that_mix():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    def negatives_from_the_batch(model, batch):
        x = model(batch["x"])
        return fused_cross_entropy(x @ x.t(), torch.arange(len(x)), reduction="none")

    def chain(model, batch):
        logits = model(batch["x"])
        return fused_cross_entropy(logits + logits.roll(1, 0), batch["target"], reduction="none")

    refused(Around(Centred()), r"'first' \(Linear\).*losses of some samples depend on the rows of others")
    for loss in (negatives_from_the_batch, chain):
        refused(Around(nn.Tanh()), r"'head' \(Linear\).*losses of some samples depend", loss=loss)


def test_another_loss_is_looked_at_anew():
    workload = small.on_features(Around(nn.Tanh()), 7)
    direction = small.direction_for(workload.model)
    scores_of(workload, direction)

    def negatives_from_the_batch(model, batch):
        x = model(batch["x"])
        return fused_cross_entropy(x @ x.t(), torch.arange(len(x)), reduction="none")

    def decayed(model, batch):
        return workload.loss(model, batch) + model.head.weight.pow(2).sum()

    with pytest.raises(MethodUnavailable, match="depend on the rows of others"):
        scores_of(replace(workload, loss=negatives_from_the_batch), direction)
    with pytest.raises(MethodUnavailable, match=r"'head.weight'.*outside"):
        scores_of(replace(workload, loss=decayed), direction)


def test_no_double_backward():
    workload = small.mlp()
    with (
        pytest.raises(RuntimeError, match=r"double backward|differentiate twice"),
        scored_step(workload.model, small.direction_for(workload.model)) as step,
    ):
        step.reduce(workload.losses()).backward(create_graph=True)


def test_mixing_is_looked_for_again_in_a_new_layout():
    """What held for a matrix of rows says nothing about sequences."""

    class Either(TimeFirst):
        def forward(self, x):
            return self.head(self.inner(x)) if x.dim() == 2 else super().forward(x)

    model = Either()
    direction, flat = small.direction_for(model), replace(small.on_features(nn.Identity(), 7), model=model)
    scores_of(flat, direction)
    with pytest.raises(MethodUnavailable, match="'rms'"):
        scores_of(replace(small.on_features(nn.Identity(), small.SAMPLES, 7), model=model), direction)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_parameters_used_outside_their_module(reentrant):
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.head = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, small.CLASSES)

        def block(self, x):
            return self.inner(x) + F.linear(x, self.inner.weight)

        def forward(self, x):
            x = self.first(x)
            x = self.block(x) if reentrant is None else checkpoint(self.block, x, use_reentrant=reentrant)
            return self.head(x)

    model = Elsewhere()
    refused(model, r"'inner.weight' of module 'inner' \(Linear\) is used outside")
    assert all(p.grad is None for p in model.parameters())
    free = {name: v for name, v in small.direction_for(model).items() if name != "inner.weight"}
    workload = replace(small.on_features(nn.Identity(), 7), model=model)
    for direction in (free, free | {"inner.weight": torch.zeros(7, 7)}):
        assert_exact(workload, torch.float32, direction)
        assert_exact(workload, torch.float64, {name: v.double() for name, v in direction.items()})
    with pytest.raises(MethodUnavailable, match="outside"):  # remembered, or found again
        contraction(model, workload.loss, workload.batch, small.direction_for(model))


def test_a_parameter_that_is_the_input_of_another_layer():
    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(7, small.SAMPLES), nn.Linear(7, small.CLASSES)

        def forward(self, x):
            return self.head(x) + self.head(self.first.weight) + self.first(x).sum(1, keepdim=True) * x[:, :4]

    refused(Prompted(), r"'first.weight' of module 'first' \(Linear\) is used outside")


def test_layers_without_a_rule_and_without_a_direction_are_free():
    model = Around(Twice())
    direction = small.direction_for(model)
    workload = replace(small.on_features(nn.Identity(), 7), model=model)
    without = {name: v for name, v in direction.items() if not name.startswith("layer")}
    assert_exact(workload, torch.float32, without)
    assert_exact(workload, torch.float32, {n: v * (not n.startswith("layer")) for n, v in direction.items()})


def test_a_rule_of_ones_own(monkeypatch):
    monkeypatch.setitem(RULES, Quantised, LinearRule())  # as if rounding had no effect: inputs are whole numbers here
    workload = small.on_features(nn.Sequential(Quantised(7, 5), nn.Tanh(), nn.Linear(5, small.CLASSES)), 7)
    workload.batch["x"].round_()
    assert_exact(workload, torch.float32)


def test_compiled_models_are_refused():
    workload = small.mlp()
    direction = {f"_orig_mod.{name}": v for name, v in small.direction_for(workload.model).items()}
    with pytest.raises(MethodUnavailable, match="compiled"):
        contraction(torch.compile(workload.model), workload.loss, workload.batch, direction)
    workload.model[0].compile()
    with pytest.raises(MethodUnavailable, match=r"'0' \(Linear\).*compiled"):
        scores_of(workload, small.direction_for(workload.model))


def test_losses_without_a_gradient():
    workload = small.mlp()

    def detached(model, batch):
        with torch.no_grad():
            return workload.loss(model, batch)

    for _ in range(2):
        with pytest.raises(ValueError, match="do not depend on any parameter"):
            scores_of(replace(workload, loss=detached), small.direction_for(workload.model))
        scores_of(workload, small.direction_for(workload.model))


# What must stay as it was


def state_of(model):
    modules = [(type(m), sorted(vars(m)), dict(m._forward_pre_hooks)) for m in model.modules()]
    parameters = [(p.requires_grad, p._version, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return modules, parameters, torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()


def assert_same_state(model, before):
    modules, parameters, *flags = state_of(model)
    assert (modules, flags) == (before[0], list(before[2:]))
    for (needs, version, gradient), (needs_before, version_before, gradient_before) in zip(
        parameters, before[1], strict=True
    ):
        assert (needs, version) == (needs_before, version_before)
        assert gradient is gradient_before is None or torch.equal(gradient, gradient_before)


@pytest.mark.parametrize("when", ["first", "later"])
def test_the_model_is_given_back_as_it_was(when):
    workload = small.attention()
    direction = small.direction_for(workload.model)
    workload.model.head.weight.requires_grad_(False)
    workload.model.key.weight.grad = torch.ones_like(workload.model.key.weight)
    del direction["head.weight"]
    if when == "later":
        scores_of(workload, direction)
    before = state_of(workload.model)
    scores_of(workload, direction)
    assert_same_state(workload.model, before)

    def fails(model, batch):
        workload.loss(model, batch)
        raise KeyError("in the loss")

    with pytest.raises(KeyError):
        scores_of(replace(workload, loss=fails), direction)
    assert_same_state(workload.model, before)


def test_inference_of_encoder_layers_stays_captured():
    """In eval mode, and with parameters that require no grad, torch would take a path around the layers."""
    workload = small.attention()
    workload.model.eval()
    assert_exact(workload, torch.float64)


def test_a_copy_of_the_model_is_verified_anew():
    workload = small.on_features(Around(nn.Identity()), 7)
    direction = small.direction_for(workload.model)
    scores_of(workload, direction)
    twin = copy.deepcopy(workload.model)
    twin.layer = nn.BatchNorm1d(7)
    with pytest.raises(MethodUnavailable, match="BatchNorm1d"):
        contraction(twin, workload.loss, workload.batch, direction)
