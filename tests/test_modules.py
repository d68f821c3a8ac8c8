"""The nn.Module twins."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from cases import Case, cases, make_inputs
from torch import nn

ALL = cases()
DEFAULTS = cases(variants=False)


def module_of(case: Case, **options: Any) -> nn.Module:
    return case.spec.module(**case.options, **options)


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_module_is_the_function(case: Case, reduction: str) -> None:
    inputs = make_inputs(case, 6, 5)
    inputs.target[3] = 77
    module = module_of(
        case, class_weight=inputs.class_weight, reduction=reduction, ignore_index=77, backend=case.backend
    )
    actual = module(inputs.logits, inputs.target, *inputs.operands.values(), sample_weight=inputs.sample_weight)
    expected = case.fused(
        inputs.logits,
        inputs.target,
        sample_weight=inputs.sample_weight,
        class_weight=inputs.class_weight,
        reduction=reduction,
        ignore_index=77,
        **inputs.operands,
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    by_name = module(inputs.logits, inputs.target, sample_weight=inputs.sample_weight, **inputs.operands)
    torch.testing.assert_close(by_name, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_options_are_those_of_the_function(case: Case) -> None:
    """Each option can be given to the constructor, none silently ignored, with the function's default."""
    function = inspect.signature(case.spec.function).parameters
    tensors = {
        "logits",
        "target",
        "sample_weight",
        "normalizer",
        "class_weight",
        "ignore_index",
        "reduction",
        "backend",
    }
    operands = {prefix + name for name in case.spec.operands for prefix in ("", "log_")}
    constructor = inspect.signature(case.spec.module).parameters
    for name in function.keys() - tensors - operands:
        assert constructor[name].default == function[name].default, name
    with pytest.raises(TypeError, match="colour"):
        case.spec.module(colour="red")


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_class_weight_is_a_buffer(case: Case) -> None:
    inputs = make_inputs(case, 6, 5, torch.float32)
    module = module_of(case, class_weight=inputs.class_weight)
    assert list(module.parameters()) == []
    assert set(module.state_dict()) == {"class_weight"}
    assert set(module_of(case).state_dict()) == set()
    assert module_of(case).class_weight is None
    assert module.to(torch.float64).class_weight.dtype == torch.float64
    assert module.to("meta").class_weight.device.type == "meta"

    loaded = module_of(case, class_weight=torch.zeros(5))
    loaded.load_state_dict(module_of(case, class_weight=inputs.class_weight).state_dict())
    assert torch.equal(loaded.class_weight, inputs.class_weight)
    arguments = (inputs.logits, inputs.target, *inputs.operands.values())
    expected = module_of(case, class_weight=inputs.class_weight)(*arguments)
    torch.testing.assert_close(loaded(*arguments), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_deepcopy(case: Case) -> None:
    inputs = make_inputs(case, 6, 5, torch.float32)
    module = module_of(case, class_weight=inputs.class_weight.clone(), reduction="sum")
    twin = copy.deepcopy(module)
    arguments = (inputs.logits, inputs.target, *inputs.operands.values())
    expected = module(*arguments)
    torch.testing.assert_close(twin(*arguments), expected, rtol=0, atol=0)
    twin.class_weight.zero_()
    assert repr(twin) == repr(module)
    torch.testing.assert_close(module(*arguments), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_repr_shows_the_options(case: Case) -> None:
    module = module_of(case, reduction="sum", ignore_index=3, class_weight=torch.ones(5))
    shown = repr(module)
    assert shown.startswith(case.spec.module.__name__ + "(")
    assert shown == f"{case.spec.module.__name__}({module.extra_repr()})"
    for name, value in {**case.options, "reduction": "sum", "ignore_index": 3}.items():
        assert f"{name}={value!r}" in shown
    assert "class_weight" in shown


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_within_a_model(case: Case) -> None:
    """A training loop lowers the loss of a linear model."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 5)
            self.loss = module_of(case)

    inputs = make_inputs(case, 40, 5, torch.float32)
    model = Model().to(case.device)
    features = torch.randn(40, 8, device=case.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    likelihood = []
    for _ in range(30):
        optimizer.zero_grad()
        logits = model.head(features)
        model.loss(logits, inputs.target, *inputs.operands.values()).backward()
        optimizer.step()
        likelihood.append(logits.detach().log_softmax(1).gather(1, inputs.target[:, None]).exp().mean())
    assert likelihood[-1] > likelihood[0]
