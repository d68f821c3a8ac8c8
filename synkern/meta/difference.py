"""Scores as central differences of the losses: two forward passes without a graph, for any model."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .context import MethodUnavailable, PerSampleLoss, RandomState, differentiable_kernels, per_sample_losses
from .direction import direction_norm
from .double_backward import double_backward_scores
from .forward_mode import forward_scores

_log = logging.getLogger("synkern.meta")

Direction = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Precision:
    """What a difference can do in one arithmetic.

    step: the length |eps v| to begin with. Rounding weighs as 1 / step and curvature as step**2. Relative errors
        measured for a BiLSTM and a BERT-type encoder, new and trained: float32 at 3e-3 from 3e-6 to 1.5e-4; bfloat16
        autocast at 3e-2 from 1e-3 to 2e-2.
    wanted: the relative error with which a step is taken at once.
    limit: the relative error beyond which the scores are refused.
    rounding: of one loss.
    """

    step: float
    wanted: float
    limit: float
    rounding: float


_FLOAT64 = _Precision(step=1e-5, wanted=1e-6, limit=1e-2, rounding=torch.finfo(torch.float64).eps)
_FLOAT32 = _Precision(step=3e-3, wanted=1e-3, limit=1e-2, rounding=torch.finfo(torch.float32).eps)
_AUTOCAST = _Precision(step=3e-2, wanted=3e-2, limit=0.2, rounding=torch.finfo(torch.bfloat16).eps)

_CHECK_ROWS = 4
_CHECK_AGAIN = 8  # after 1, 8, 64, 512 calls, then every 512
_CHECK_AT_LEAST = 512
_OTHER_STEPS = (1 / 8, 8.0, 1 / 64, 64.0)


@dataclass
class _Record:
    """What is known of a model: the factor of its step that passed the last check, and when to check again."""

    kind: tuple[Any, ...]
    factor: float = 1.0
    calls: int = 0
    next_check: int = 0


# Weak: a record lives as long as its model does, and holds nothing of it.
_records: WeakKeyDictionary[nn.Module, _Record] = WeakKeyDictionary()


def difference_scores(model: nn.Module, per_sample_loss: PerSampleLoss, batch: Any, direction: Direction) -> Tensor:
    """s_i = (l_i(theta + eps v) - l_i(theta - eps v)) / (2 eps), from two forward passes without gradients.

    Both halves see the dropout masks of one ordinary forward pass, and neither sees the other's casts under autocast.
    Parameters (bit by bit), buffers and autocast's cache are afterwards as they were; the random generators are where
    one forward pass would have left them. The step eps follows from |v|, |theta| and the arithmetic.

    At a model's first call, at the 8th, 64th, 512th and then every 512 calls, the scores of up to four rows are
    compared with an exact method; where they disagree, other steps are tried. For this the batch has to be made of
    tensors, tuples, lists, dicts and dataclasses, with the samples in the first dimension of every tensor; a batch
    that cannot be cut is not checked, which a warning in the log ``synkern.meta`` says.

    Args:
        model: without wrapper.
        per_sample_loss: ``per_sample_loss(model, batch)`` returns (N,).
        batch: what ``per_sample_loss`` takes.
        direction: {name: (parameter, v)}, from :func:`~synkern.meta.direction.check_direction`.

    Returns:
        (N,) scores, float32 (float64 for float64 losses).

    Raises:
        MethodUnavailable: a parameter is 16-bit, so that its last digit is larger than the step; or the differences
            disagree with the exact scores at every step, as where a part of the loss is detached from the graph.
    """
    precision = _precision(direction)
    random = RandomState(model)
    v_norm = float(direction_norm(v for _, v in direction.values()))
    if not (math.isfinite(v_norm) and v_norm > 0):
        v_norm = 1.0  # v = 0 gives zeros and NaN gives NaN at any step
        record = _Record(())
    else:
        record = _record(model, precision)
    theta_norm = float(direction_norm(p.detach() for p, _ in direction.values()))
    step = _step_length(precision, theta_norm) / v_norm
    work = _Difference(model, per_sample_loss, direction, random)
    if record.kind and record.calls >= record.next_check:
        _check(work, batch, step, precision, record)
        record.next_check = min(max(record.calls, 1) * _CHECK_AGAIN, record.calls + _CHECK_AT_LEAST)
    record.calls += 1
    return work.scores(batch, step * record.factor)


def _precision(direction: Direction) -> _Precision:
    for name, (parameter, _) in direction.items():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise MethodUnavailable(
                f"sample_scores: method 'difference' needs parameters of 32 bits or more, got {name!r} in "
                f"{parameter.dtype}, whose last digit is larger than the step; use float32 parameters under "
                "torch.autocast, or another method"
            )
    parameter = next(iter(direction.values()))[0]
    if torch.is_autocast_enabled(parameter.device.type):
        return _AUTOCAST
    return _FLOAT64 if parameter.dtype == torch.float64 else _FLOAT32


def _record(model: nn.Module, precision: _Precision) -> _Record:
    kind = (precision, model.training)
    record = _records.get(model)
    if record is None or record.kind != kind:
        record = _records[model] = _Record(kind)
    return record


def _step_length(precision: _Precision, theta_norm: float) -> float:
    """|eps v|: not longer than a hundredth of theta, and well above the last digits of theta."""
    if not (math.isfinite(theta_norm) and theta_norm > 0):
        return precision.step
    smallest = 64 * torch.finfo(torch.float64 if precision is _FLOAT64 else torch.float32).eps * theta_norm
    return max(min(precision.step, 0.01 * theta_norm), smallest)


class _Difference:
    """Central differences of one model's losses along one direction, from one state of the random generators."""

    def __init__(
        self, model: nn.Module, per_sample_loss: PerSampleLoss, direction: Direction, random: RandomState
    ) -> None:
        self.model, self.per_sample_loss, self.random = model, per_sample_loss, random
        self.direction, self.elsewhere = direction, [torch.empty_like(p.detach()) for p, _ in direction.values()]

    def scores(self, batch: Any, eps: float) -> Tensor:
        ahead = self._losses(batch, eps)
        behind = self._losses(batch, -eps)
        dtype = torch.float64 if ahead.dtype == torch.float64 else torch.float32
        return ((ahead.double() - behind.double()) / (2 * eps)).to(dtype)

    def _losses(self, batch: Any, eps: float) -> Tensor:
        self.random.restore()
        with torch.no_grad(), _fresh_casts(), _plain_inference(), _kept_buffers(self.model), self._moved(eps):
            return per_sample_losses(self.per_sample_loss, self.model, batch)

    @contextmanager
    def _moved(self, eps: float) -> Iterator[None]:
        """The model at theta + eps v.

        The parameters' own memory is not written to: for the time being they stand on other memory. So they come back
        bit by bit, whatever happens in between, and graphs that hold them stay valid.
        """
        parameters = [parameter for parameter, _ in self.direction.values()]
        own = [parameter.data for parameter in parameters]
        try:
            for (parameter, v), moved in zip(self.direction.values(), self.elsewhere, strict=True):
                parameter.data = torch.add(parameter.data, v.to(parameter.dtype), alpha=eps, out=moved)
            yield
        finally:
            for parameter, data in zip(parameters, own, strict=True):
                parameter.data = data


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """Autocast keeps the 16-bit copies of parameters that it makes; they are of one half only."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def _plain_inference() -> Iterator[None]:
    """Without the shortcut of nn.TransformerEncoder, whose outputs at padded places are not those of training."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers that a forward pass changes (running statistics, power iterations) are put back."""
    kept = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, version, value in kept:
                module._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(value)


def _check(work: _Difference, batch: Any, step: float, precision: _Precision, record: _Record) -> None:
    """Compare a few rows with an exact method, and choose the factor of the step with which they agree."""
    rows, why_not = _few_rows(work, batch)
    exact = None
    if not why_not:
        exact, why_not = _exact_scores(work, rows)
    if exact is None:
        _log.warning("sample_scores: the differences are not checked against an exact method: %s", why_not)
        return
    errors: dict[float, _Error] = {}
    with differentiable_kernels(work.model):  # the same dropout masks as the exact method, also in attention
        for factor in dict.fromkeys((record.factor, 1.0, *_OTHER_STEPS)):
            errors[factor] = _error(work, rows, step * factor, exact, precision)
            if errors[factor].whole <= precision.wanted:
                break
    work.random.restore()
    record.factor = min(errors, key=lambda factor: errors[factor].whole)
    error = errors[record.factor]
    if not error.unexplained <= precision.limit:
        raise MethodUnavailable(
            f"sample_scores: differences of the losses disagree with the exact scores by {error.whole:.2g} of their "
            f"size at every step tried, expected at most {precision.limit:g}; a part of the loss may be detached from "
            "the graph, random in its own way or not smooth: use method='contraction' or 'double_backward'"
        )
    _log.debug("sample_scores: differences checked, relative error %.2g with |eps v| * %g", error.whole, record.factor)


class _Error(NamedTuple):
    """Distance from the exact scores relative to their size: all of it, and what rounding of the losses leaves over."""

    whole: float
    unexplained: float


def _error(work: _Difference, rows: Any, eps: float, exact: Tensor, precision: _Precision) -> _Error:
    scores, losses = work.scores(rows, eps), work._losses(rows, 0.0)
    rounding = precision.rounding * losses.double().norm().item() / eps
    distance = (scores.double() - exact.double()).norm().item()
    if math.isnan(distance):
        return _Error(math.inf, math.inf)
    size = max(exact.double().norm().item(), torch.finfo(torch.float64).tiny)
    return _Error(distance / size, max(distance - rounding, 0.0) / size)


def _exact_scores(work: _Difference, rows: Any) -> tuple[Tensor | None, str]:
    reasons = []
    for exact in (double_backward_scores, forward_scores):
        work.random.restore()
        try:
            with _fresh_casts(), _kept_buffers(work.model):
                return exact(work.model, work.per_sample_loss, rows, work.direction), ""
        except MethodUnavailable as error:
            reasons.append(str(error))
    return None, "; ".join(reasons)


def _few_rows(work: _Difference, batch: Any) -> tuple[Any, str]:
    """The first rows of a batch, or why they cannot be had."""
    count = len(work._losses(batch, 0.0))
    if count <= _CHECK_ROWS:
        return batch, ""
    try:
        rows = first_rows(batch, count, _CHECK_ROWS)
        got = len(work._losses(rows, 0.0))
    except Exception as error:  # whatever the caller's loss does with a batch that was cut wrongly
        return None, f"the batch cannot be cut to {_CHECK_ROWS} rows ({type(error).__name__}: {error})"
    if got != _CHECK_ROWS:
        return None, f"a batch cut to {_CHECK_ROWS} rows has {got} losses"
    return rows, ""


def first_rows(batch: Any, count: int, rows: int) -> Any:
    """The batch of the first ``rows`` of ``count`` samples.

    Args:
        batch: tensors with the samples in their first dimension, in tuples, lists, mappings and dataclasses of any
            depth. 0-d tensors, and what is none of these, stays whole.

    Raises:
        ValueError: a tensor's first dimension is not the samples, or there is no tensor.
    """
    tensors = 0

    def cut(value: Any) -> Any:
        nonlocal tensors
        if isinstance(value, Tensor):
            if value.dim() == 0:
                return value
            if len(value) != count:
                raise ValueError(f"expected tensors whose first dimension is {count}, got {tuple(value.shape)}")
            tensors += 1
            return value[:rows]
        return _map(cut, value)

    result = cut(batch)
    if not tensors:
        raise ValueError(f"expected a batch that holds tensors, got {type(batch).__name__}")
    return result


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, nn.utils.rnn.PackedSequence):
        raise ValueError("a PackedSequence has no dimension of samples")
    if isinstance(value, Mapping):
        result = copy.copy(value)
        if type(value) is dict:
            return {key: function(item) for key, item in value.items()}
        for key, item in value.items():  # a tokenizer's BatchEncoding has attributes beside its entries
            result[key] = function(item)  # type: ignore[index]
        return result
    if isinstance(value, tuple):
        items = [function(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [function(item) for item in value]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        result = copy.copy(value)
        for name in value.__dataclass_fields__:
            object.__setattr__(result, name, function(getattr(value, name)))
        return result
    return value
