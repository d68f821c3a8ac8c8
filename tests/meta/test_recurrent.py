"""The contraction of LSTM and GRU: exact in every setting of the modules, as is what they return."""

from __future__ import annotations

import copy
from dataclasses import replace

import meta_models as small
import pytest
import torch
from tolerances import SCORES
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from synkern import fused_cross_entropy
from synkern.meta import MethodUnavailable, recurrent, sample_scores, scored_step

INPUTS, UNITS = 5, 4
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU}
SETTINGS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "time first, no biases": {"num_layers": 2, "bidirectional": True, "bias": False},
}


class Classifier(nn.Module):
    """Words, a recurrent module, and a head on all that it returns."""

    def __init__(self, kind, *, learned_start=False, **options):
        super().__init__()
        self.embed = nn.Embedding(small.VOCABULARY, INPUTS)
        self.rnn = KINDS[kind](INPUTS, UNITS, **options)
        states = (2 if kind == "lstm" else 1) if learned_start else 0
        parts = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
        self.start = nn.ModuleList(nn.Linear(small.CLASSES, parts * UNITS) for _ in range(states))
        self.head = nn.Linear(UNITS * (2 if self.rnn.bidirectional else 1) + UNITS, small.CLASSES)
        self.head.weight.data.mul_(3)

    def initial(self, batch):
        one_hot = nn.functional.one_hot(batch["target"], small.CLASSES).to(self.head.weight.dtype)
        states = [layer(one_hot).view(len(one_hot), -1, UNITS).transpose(0, 1) for layer in self.start]
        return None if not states else states[0] if len(states) == 1 else tuple(states)

    def forward(self, batch):
        first = self.rnn.batch_first
        x = self.embed(batch["tokens"])
        x = x if first else x.transpose(0, 1)
        if "lengths" in batch:
            x = pack_padded_sequence(x, batch["lengths"], batch_first=first, enforce_sorted=False)
        output, states = self.rnn(x, self.initial(batch))
        if "lengths" in batch:
            output, _ = pad_packed_sequence(output, batch_first=first)
        output = output if first else output.transpose(0, 1)
        states = states if isinstance(states, tuple) else (states,)
        ends = sum((number + 1) * state.tanh().sum(0) for number, state in enumerate(states))
        return self.head(torch.cat([output.mean(1), ends], 1))


def loss(model, batch):
    return fused_cross_entropy(model(batch), batch["target"], reduction="none")


def make(kind, *, packed=False, **options):
    batch = {
        "tokens": torch.randint(0, small.VOCABULARY, (small.SAMPLES, 7)),
        "target": torch.randint(0, small.CLASSES, (small.SAMPLES,)),
    }
    if packed:
        batch["lengths"] = torch.tensor([3, 7, 1, 5, 7, 2])
    return small.Workload(Classifier(kind, **options), batch, loss)


def contraction(workload, direction):
    return sample_scores(workload.model, workload.loss, workload.batch, direction, method="contraction")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_scores(kind, setting, packed, dtype):
    workload = make(kind, packed=packed, **SETTINGS[setting]).to(dtype)
    direction = small.direction_for(workload.model)
    expected = small.reference_scores(workload, direction)
    for _ in range(2):  # verified the first time
        assert small.relative_error(contraction(workload, direction), expected) <= SCORES[dtype]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_parameter_alone(kind, packed):
    workload = make(kind, packed=packed, learned_start=True, num_layers=2, bidirectional=True).to(torch.float64)
    whole = small.direction_for(workload.model)
    for name in whole:
        direction = {name: whole[name]}
        expected = small.reference_scores(workload, direction)
        assert expected.abs().max() > 1e-6, name
        assert (contraction(workload, direction) - expected).abs().max() <= 1e-10 * (1 + expected.abs().max()), name


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_scored_step_leaves_outputs_and_gradients_as_they_are(kind, setting, packed):
    workload = make(kind, packed=packed, learned_start=True, **SETTINGS[setting]).to(torch.float64)
    weight = torch.rand(small.SAMPLES, dtype=torch.float64)
    plain = copy.deepcopy(workload)
    losses = plain.losses()
    (weight * losses).sum().backward()
    direction = small.direction_for(workload.model)
    with scored_step(workload.model, direction) as step:
        found = workload.losses()
        step.reduce(found, sample_weight=weight, reduction="sum").backward()
    torch.testing.assert_close(found, losses, rtol=1e-12, atol=1e-12)
    expected = small.gradients_of(plain.model)
    gradients = small.gradients_of(workload.model)
    assert set(gradients) == set(expected) and len(gradients) > 6
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
    assert small.relative_error(step.scores, small.reference_scores(plain, direction)) <= SCORES[torch.float64]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_an_lstm_on_a_device_without_kernels(setting, packed, monkeypatch):
    """What other devices run, torch's forward and a loop of its operations backwards, is right on the CPU too."""
    monkeypatch.setattr(recurrent, "_has_kernels", lambda x: False)
    test_scores("lstm", setting, packed, torch.float64)
    test_a_scored_step_leaves_outputs_and_gradients_as_they_are("lstm", setting, packed)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reweighted_step(kind, packed):
    workload = make(kind, packed=packed, bidirectional=True).to(torch.float64)
    direction, plain = small.direction_for(workload.model), copy.deepcopy(workload)
    with scored_step(workload.model, direction, reweight=lambda scores: scores.clamp(min=0)) as step:
        step.reduce(workload.losses(), reduction="sum").backward()
    expected = small.reference_scores(plain, direction)
    (expected.clamp(min=0) * plain.losses()).sum().backward()
    assert small.relative_error(step.scores, expected) <= SCORES[torch.float64]
    torch.testing.assert_close(
        small.gradients_of(workload.model), small.gradients_of(plain.model), rtol=1e-7, atol=1e-10
    )


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers(kind):
    """Real dropout, that its backward knows: scores are those of the losses that were drawn."""
    workload = make(kind, num_layers=3, dropout=0.6, batch_first=True).to(torch.float64)
    direction = small.direction_for(workload.model)
    kept = []

    def recorded(model, batch):
        kept.append(workload.loss(model, batch).detach())
        return workload.loss(model, batch)

    recording = replace(workload, loss=recorded)
    contraction(recording, direction)
    contraction(recording, direction)
    assert not torch.equal(kept[0], kept[1])
    workload.model.eval()
    assert small.relative_error(contraction(workload, direction), small.reference_scores(workload, direction)) <= 1e-10
    workload.model.train()
    torch.manual_seed(1)
    names = [name for name in direction if name.startswith("rnn")]
    found = sum(contraction_with_seed(workload, {name: direction[name]}) for name in names)
    whole = contraction_with_seed(workload, {name: direction[name] for name in names})
    torch.testing.assert_close(found, whole)
    eps = 1e-6
    ahead, behind = (shifted_losses(workload, direction, names, sign * eps) for sign in (1, -1))
    torch.testing.assert_close(whole, (ahead - behind) / (2 * eps), rtol=1e-6, atol=1e-7)


def contraction_with_seed(workload, direction):
    torch.manual_seed(11)
    return contraction(workload, direction)


def shifted_losses(workload, direction, names, eps):
    """Losses at theta + eps v with the dropout masks that the contraction draws."""
    model = copy.deepcopy(workload.model)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).add_(direction[name], alpha=eps)
    kept = []

    def recorded(model, batch):
        losses = workload.loss(model, batch)
        kept.append(losses.detach())
        return losses

    contraction_with_seed(replace(workload, model=model, loss=recorded), direction)
    return kept[0]


def test_samples_of_length_zero_padding_do_not_matter():
    """What stands behind the end of a packed sequence reaches neither scores nor gradients."""
    workload = make("lstm", packed=True, bidirectional=True)
    direction = small.direction_for(workload.model)
    expected = contraction(workload, direction)
    tokens = workload.batch["tokens"].clone()
    behind = torch.arange(7) >= workload.batch["lengths"].unsqueeze(1)
    tokens[behind] = (tokens[behind] + 1) % small.VOCABULARY
    changed = replace(workload, batch=workload.batch | {"tokens": tokens})
    assert torch.equal(contraction(changed, direction), expected)


def test_sorted_packed_sequences():
    """enforce_sorted=True leaves no permutation in the packed sequence."""
    workload = make("lstm", packed=True, batch_first=True, bidirectional=True)
    lengths = torch.tensor([7, 7, 5, 3, 2, 1])

    def sorted_loss(model, batch):
        packed = pack_padded_sequence(model.embed(batch["tokens"]), lengths, batch_first=True, enforce_sorted=True)
        assert packed.sorted_indices is None
        output, (state, _) = model.rnn(packed)
        padded, _ = pad_packed_sequence(output, batch_first=True)
        logits = model.head(torch.cat([padded.mean(1), state.sum(0)], 1))
        return fused_cross_entropy(logits, batch["target"], reduction="none")

    workload = replace(workload, loss=sorted_loss)
    direction = small.direction_for(workload.model)
    expected = small.reference_scores(workload, direction)
    assert small.relative_error(contraction(workload, direction), expected) <= SCORES[torch.float32]


def test_projections_are_refused_by_name():
    model = nn.Sequential(nn.LSTM(INPUTS, UNITS, proj_size=2))
    direction = small.direction_for(model)
    with pytest.raises(MethodUnavailable, match=r"'0' \(LSTM\).*proj_size=2"):
        sample_scores(model, lambda m, b: m(b)[0].sum((0, 2)), torch.randn(3, 2, INPUTS), direction,
                      method="contraction")  # fmt: skip


def test_one_sequence_without_a_batch_is_refused():
    model = nn.Sequential(nn.LSTM(INPUTS, UNITS))
    with pytest.raises(MethodUnavailable, match=r"'0' \(LSTM\).*shape \(3, 5\); expected a batch"):
        sample_scores(model, lambda m, b: m(b)[0].sum(1), torch.randn(3, INPUTS), small.direction_for(model),
                      method="contraction")  # fmt: skip


def test_initial_states_of_another_shape_are_an_error():
    model = nn.GRU(INPUTS, UNITS, batch_first=True)
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 2, 4\), got \[1, 3, 4\]"):
        sample_scores(model, lambda m, b: m(b, torch.zeros(1, 3, UNITS))[0].sum((1, 2)), torch.randn(2, 3, INPUTS),
                      small.direction_for(model), method="contraction")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind):
    """Where the processor has no bfloat16 LSTM in oneDNN, the module itself cannot run so; the rule can."""
    workload = make(kind, batch_first=True, bidirectional=True)
    direction = small.direction_for(workload.model)
    expected = small.reference_scores(workload, direction)
    with torch.autocast("cpu", torch.bfloat16):
        found = contraction(workload, direction)
    assert found.dtype == torch.float32
    assert small.relative_error(found, expected) <= 5e-2


@pytest.mark.parametrize("method", ["forward", "difference", "double_backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_other_methods(kind, method):
    packed = method != "forward"  # torch has no forward formula for packing
    workload = make(kind, packed=packed, num_layers=2, bidirectional=True, batch_first=True)
    direction = small.direction_for(workload.model)
    found = sample_scores(workload.model, workload.loss, workload.batch, direction, method=method)
    assert small.relative_error(found, small.reference_scores(workload, direction)) <= 5e-3
    assert torch.backends.mkldnn.enabled
