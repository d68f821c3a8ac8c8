"""The LSTM's operators against the equations in plain torch, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch import library as torch_library

import synkern.losses  # noqa: F401  (loads the operators and their fake kernels)

OPS = torch.ops.synkern
# samples, steps, units: below, at and above the kernel's tiles (6 and 24 samples, 16 columns)
SHAPES = [(1, 1, 1), (3, 5, 7), (6, 4, 16), (25, 9, 33), (50, 3, 20)]
# of gates, states and gradients of size one, after a few steps
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


def reference(projection: Tensor, w_hh: Tensor, state: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gates, cells, states = [], [cell], []
    for at_input in projection.unbind(1):
        i, f, g, o = (at_input + state @ w_hh.T).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cell = f * cell + i * g
        state = o * cell.tanh()
        gates.append(torch.cat([i, f, g, o], 1))
        cells.append(cell)
        states.append(state)
    return torch.stack(gates, 1), torch.stack(cells, 1), torch.stack(states, 1)


def problem(samples: int, steps: int, units: int) -> list[Tensor]:
    return [
        2 * torch.randn(samples, steps, 4 * units, dtype=torch.float64),
        torch.randn(4 * units, units, dtype=torch.float64) / units**0.5,
        torch.randn(samples, units, dtype=torch.float64) / 2,
        torch.randn(samples, units, dtype=torch.float64),
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_forward_and_backward(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    given = problem(*shape)
    projection, w_hh, first, first_cell = (x.clone().requires_grad_() for x in given)
    expected = reference(projection, w_hh, first, first_cell)
    actual = OPS.lstm(*(x.to(dtype) for x in given))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), y.detach(), rtol=0, atol=TOLERANCE[dtype])
    at_states, at_cells = torch.randn_like(expected[2]), torch.randn_like(expected[2])
    total = (expected[2] * at_states).sum() + (expected[1][:, 1:] * at_cells).sum()
    wanted = torch.autograd.grad(total, (projection, first, first_cell))
    found = OPS.lstm_backward(*actual[:2], given[1].to(dtype), at_states.to(dtype), at_cells.to(dtype))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=TOLERANCE[dtype])


def test_no_gradients_from_outside_are_zero_gradients() -> None:
    given = [x.float() for x in problem(4, 3, 5)]
    gates, cells, _ = OPS.lstm(*given)
    none = OPS.lstm_backward(gates, cells, given[1], None, None)
    assert all(torch.count_nonzero(x) == 0 for x in none)
    at_states = torch.randn(4, 3, 5)
    one = OPS.lstm_backward(gates, cells, given[1], at_states, None)
    other = OPS.lstm_backward(gates, cells, given[1], at_states, torch.zeros(4, 3, 5))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_saturated_and_hostile_inputs() -> None:
    projection = torch.zeros(4, 1, 8)
    projection[0], projection[1], projection[2], projection[3, 0, 0] = 1e4, -1e4, float("inf"), float("nan")
    gates, _, states = OPS.lstm(projection, torch.zeros(8, 2), torch.zeros(4, 2), torch.zeros(4, 2))
    assert gates[0].tolist() == gates[2].tolist() == [[1.0] * 8]
    assert gates[1].tolist() == [[0.0] * 4 + [-1.0] * 2 + [0.0] * 2]
    assert gates[3, 0, 0].isnan() and states[3, 0, 0].isnan() and not states[3, 0, 1].isnan()


def test_small_arguments_of_tanh_keep_their_digits() -> None:
    projection = torch.zeros(1, 1, 4)
    for x in (1e-6, 1e-3, 0.1, 0.7, 0.8, 3.0):
        projection[0, 0, 2] = x
        gates, _, _ = OPS.lstm(projection, torch.zeros(4, 1), torch.zeros(1, 1), torch.zeros(1, 1))
        torch.testing.assert_close(gates[0, 0, 2].double(), projection[0, 0, 2].double().tanh(),
                                   rtol=4e-7, atol=0)


@pytest.mark.parametrize("samples,steps", [(0, 3), (4, 0)])
def test_nothing_to_do(samples: int, steps: int) -> None:
    given = [x.float() for x in problem(samples, steps, 5)]
    gates, cells, states = OPS.lstm(*given)
    assert gates.shape == (samples, steps, 20) and states.shape == (samples, steps, 5)
    assert torch.equal(cells[:, 0], given[3])


def test_same_bits_for_any_number_of_threads() -> None:
    given = [x.float() for x in problem(64, 10, 40)]
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(OPS.lstm(*given)[2])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_operands_that_do_not_fit_are_refused() -> None:
    projection, w_hh, first, cell = (x.float() for x in problem(2, 3, 4))
    with pytest.raises(RuntimeError, match="w_hh"):
        OPS.lstm(projection, w_hh[:, :3], first, cell)
    with pytest.raises(RuntimeError, match="first"):
        OPS.lstm(projection, w_hh, first[:1], cell)
    with pytest.raises(RuntimeError, match="projection must be float32"):
        OPS.lstm(projection.half(), w_hh.half(), first.half(), cell.half())
    gates, cells, _ = OPS.lstm(projection, w_hh, first, cell)
    with pytest.raises(RuntimeError, match="grad_states"):
        OPS.lstm_backward(gates, cells, w_hh, torch.zeros(2, 3, 5), None)


def test_fake_kernels_fit() -> None:
    given = [x.float() for x in problem(3, 4, 5)]
    torch_library.opcheck(OPS.lstm.default, given, test_utils=("test_schema", "test_faketensor"))
    gates, cells, states = OPS.lstm(*given)
    backward = (gates, cells, given[1], torch.randn_like(states), None)
    torch_library.opcheck(OPS.lstm_backward.default, backward, test_utils=("test_schema", "test_faketensor"))
