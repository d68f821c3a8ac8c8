"""The rule of nn.LSTM and nn.GRU: a forward with their results, and a backward that has the gradients of the gates.

With b_t the gradient at the gates' inputs W_ih x_t + W_hh h_{t-1} + biases, both weights are linear layers: their share
of a score is sum_t <b_t, V_ih x_t + V_hh h_{t-1} + v_ih + v_hh>. The LSTM's steps run in native kernels on the CPU. On
other devices, and for the GRU, torch's fused forward is kept: the gates of all steps follow from its inputs and outputs
in one matrix product, and a loop goes over the steps backwards. A sequence of any length and direction is brought to
one form, forward and padded at its end, where gradients are zero by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from .context import MethodUnavailable
from .linear import Gradients, LinearMap, wide
from .rules import RULES, Layer, Rule, cast_for_autocast, layer_backward

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class _Steps(NamedTuple):
    """One layer and direction in the dtype of its sums: N samples, T steps, I inputs, H units, G gates.

    x (N, T, I) inputs; h (N, T, H) states before each step; w_ih (G H, I), w_hh (G H, H), biases (G H,) or None.
    """

    x: Tensor
    h: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None

    @staticmethod
    def of(x: Tensor, first: Tensor, weights: Sequence[Tensor | None], output: Tensor | None = None) -> _Steps:
        """With the states (N, T, H) that a layer gave, or with room for them."""
        dtype = wide(x.dtype)
        h = torch.empty(*x.shape[:2], first.shape[1], dtype=dtype, device=x.device)
        h[:, 0] = first
        if output is not None:
            h[:, 1:] = output[:, :-1]
        return _Steps(x.to(dtype), h, *(None if w is None else w.to(dtype) for w in weights))  # type: ignore[arg-type]

    def from_input(self) -> Tensor:
        """W_ih x + b_ih at all steps, (N, T, G H)."""
        return F.linear(self.x, self.w_ih, self.b_ih)

    def from_state(self) -> Tensor:
        """W_hh h + b_hh at all steps, (N, T, G H)."""
        return F.linear(self.h, self.w_hh, self.b_hh)


def _has_kernels(x: Tensor) -> bool:
    """Whether the LSTM's steps run natively on the device of x."""
    return x.device.type == "cpu"


def _lstm_forward(steps: _Steps, first_cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The layer in kernels: i, f, o = sigmoid and g = tanh of W_ih x + W_hh h + b; c_t = f c + i g; h_t = o tanh(c_t).

    Returns:
        Gates i, f, g, o (N, T, 4, H); cells (N, T + 1, H), from the first one on; states (N, T, H). ``steps.h`` is
        filled on the way.
    """
    n, length, units = steps.h.shape
    projection = steps.from_input()
    if steps.b_hh is not None:
        projection += steps.b_hh
    gates, cells, states = torch.ops.synkern.lstm.default(projection, steps.w_hh, steps.h[:, 0], first_cell)
    steps.h[:, 1:] = states[:, :-1]
    return gates.view(n, length, 4, units), cells, states


def _lstm_gates(steps: _Steps, first_cell: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and cells as :func:`_lstm_forward` has them, from known states: one product for all steps, any device."""
    n, length, units = steps.h.shape
    flat = steps.from_input()
    flat += steps.from_state()
    gates = flat.view(n, length, 4, units)
    gates[:, :, :2].sigmoid_()
    gates[:, :, 2].tanh_()
    gates[:, :, 3].sigmoid_()
    cells = gates.new_empty(n, length + 1, units)
    cells[:, 0] = first_cell
    torch.mul(gates[:, :, 0], gates[:, :, 2], out=cells[:, 1:])
    cell = cells[:, 0]
    for f_t, cell_t in zip(gates[:, :, 1].unbind(1), cells[:, 1:].unbind(1), strict=True):
        cell = cell_t.addcmul_(f_t, cell)
    return gates, cells


def _lstm_backward(
    steps: _Steps, gates: Tensor, cells: Tensor, grad_output: Tensor | None, grad_cells: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at the gates' inputs (N, T, 4 H), and of the first state and cell (N, H).

    Step by step backwards, with dh the gradient at h_t and dc at c_t:  dc += dh o (1 - tanh(c)^2);  at the inputs of
    i, f, g, o  dc g i (1 - i), dc c_{t-1} f (1 - f), dc i (1 - g^2), dh tanh(c) o (1 - o);  then dc f and these times
    W_hh go to step t - 1.
    Native on the CPU; elsewhere a loop over the steps.

    Args:
        grad_output: (N, T, H) gradients at the states, or None.
        grad_cells: (N, T, H) gradients at the cells from outside, or None.
    """
    n, length, units = steps.h.shape
    if _has_kernels(gates):
        given = (None if x is None else x.to(gates.dtype) for x in (grad_output, grad_cells))
        return torch.ops.synkern.lstm_backward.default(gates.view(n, length, -1), cells, steps.w_hh, *given)
    grad = torch.empty_like(gates)
    dh, dc = (gates.new_zeros(n, units) for _ in range(2))
    squashed, through = torch.empty_like(dh), torch.empty_like(dh)
    outside = [None if x is None else x.to(gates.dtype).unbind(1) for x in (grad_output, grad_cells)]
    flat, parts = grad.view(n, length, -1).unbind(1), [grad[:, :, k].unbind(1) for k in range(4)]
    first_two = grad[:, :, :2].unbind(1)
    i, f, g, o = (gates[:, :, k].unbind(1) for k in range(4))
    i_f, cell = gates[:, :, :2].unbind(1), cells.unbind(1)
    for t in range(length - 1, -1, -1):
        if outside[0] is not None:
            dh += outside[0][t]
        if outside[1] is not None:
            dc += outside[1][t]
        torch.tanh(cell[t + 1], out=squashed)
        torch.mul(dh, o[t], out=through)
        dc += _tanh_backward(through, squashed, grad_input=through)
        torch.mul(dc, g[t], out=parts[0][t])
        torch.mul(dc, cell[t], out=parts[1][t])
        _sigmoid_backward(first_two[t], i_f[t], grad_input=first_two[t])
        torch.mul(dc, i[t], out=through)
        _tanh_backward(through, g[t], grad_input=parts[2][t])
        _sigmoid_backward(torch.mul(dh, squashed, out=through), o[t], grad_input=parts[3][t])
        dc *= f[t]
        torch.mm(flat[t], steps.w_hh, out=dh)
    return grad.view(n, length, -1), dh, dc


def _spread(grad_cell: Tensor | None, last: Tensor | None, length: int) -> Tensor | None:
    """Gradients at the cells returned (N, H), put at the step each belongs to, (N, T, H)."""
    if grad_cell is None:
        return None
    n, units = grad_cell.shape
    spread = grad_cell.new_zeros(n, length, units)
    if last is None:
        spread[:, -1] = grad_cell
    else:
        spread[torch.arange(n, device=last.device), last] = grad_cell
    return spread


def _gru_backward(steps: _Steps, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at W_ih x + b_ih and at W_hh h + b_hh, (N, T, 3 H) each, and of the first state.

    With a = W_ih x + b_ih, s = W_hh h + b_hh:  r = sigmoid(a_r + s_r), z = sigmoid(a_z + s_z), m = tanh(a_n + r s_n),
    h_t = (1 - z) m + z h_{t-1}. So all gradients of a step are dh times known factors: at m's argument
    e = (1 - z)(1 - m^2), at r's  e s_n r (1 - r), at z's  (h_{t-1} - m) z (1 - z), at s_n  e r.
    """
    n, length, units = steps.h.shape
    a_r, a_z, a_n = steps.from_input().view(n, length, 3, units).unbind(2)
    s = steps.from_state().view(n, length, 3, units)
    s_r, s_z, s_n = s.unbind(2)
    r, z = (a_r + s_r).sigmoid_(), (a_z + s_z).sigmoid_()
    m = torch.addcmul(a_n, r, s_n).tanh_()
    e = (1 - z).mul_(1 - m * m)
    grad_s = torch.empty_like(s)  # first the factors of dh, then, step by step, the gradients
    torch.mul(e * s_n, r * (1 - r), out=grad_s[:, :, 0])
    torch.mul(steps.h - m, z * (1 - z), out=grad_s[:, :, 1])
    torch.mul(e, r, out=grad_s[:, :, 2])
    at_state = torch.empty_like(steps.h)
    to_state = at_state.new_zeros(n, units)
    gates, flat = grad_s.unbind(1), grad_s.view(n, length, -1).unbind(1)
    z_t, at_t, from_above = z.unbind(1), at_state.unbind(1), grad_output.to(at_state.dtype).unbind(1)
    for t in range(length - 1, -1, -1):
        now = torch.add(to_state, from_above[t], out=at_t[t])
        gates[t].mul_(now.unsqueeze(1))
        torch.mul(now, z_t[t], out=to_state)
        to_state.addmm_(flat[t], steps.w_hh)
    grad_a = grad_s.clone()
    torch.mul(at_state, e, out=grad_a[:, :, 2])
    return grad_a.view(n, length, -1), grad_s.view(n, length, -1), to_state


class _LSTM(torch.autograd.Function):
    """One layer in one direction: (N, T, I) -> states (N, T, H) and last cells (N, H)."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, last: Tensor | None, anchor: Tensor, x: Tensor, first: Tensor, first_cell: Tensor,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.layer, ctx.last, ctx.dtypes = layer, last, (x.dtype, first.dtype, first_cell.dtype)
        ctx.set_materialize_grads(False)
        x, first, *weights = cast_for_autocast(x, first, *weights)  # type: ignore[assignment]
        cell = first_cell.to(wide(x.dtype))
        with torch.autocast(x.device.type, enabled=False):  # sums stay wide
            gates, cells, output, steps = _lstm_states(x, first, cell, weights)
        ctx.save_for_backward(gates, cells, *steps)
        ends = cells[:, -1] if last is None else cells[torch.arange(len(last), device=last.device), last + 1]
        return output.to(x.dtype), ends.to(x.dtype, copy=True)

    @layer_backward
    def backward(ctx: Any, grad_output: Tensor | None, grad_cell: Tensor | None) -> Any:
        gates, cells, *parts = ctx.saved_tensors
        steps = _Steps(*parts)
        at, dh, dc = _lstm_backward(steps, gates, cells, grad_output, _spread(grad_cell, ctx.last, gates.shape[1]))
        return _finish(ctx, steps, at, at, dh, dc)


class _GRU(torch.autograd.Function):
    """One layer in one direction: (N, T, I) -> states (N, T, H)."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, anchor: Tensor, x: Tensor, first: Tensor, *weights: Tensor | None
    ) -> Tensor:
        ctx.layer, ctx.dtypes = layer, (x.dtype, first.dtype)
        output = torch.gru(x, first.unsqueeze(0), *_fused_options(weights))[0]
        ctx.save_for_backward(*_Steps.of(x, first, weights, output))
        return output

    @layer_backward
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        steps = _Steps(*ctx.saved_tensors)
        return _finish(ctx, steps, *_gru_backward(steps, grad_output))


def _lstm_states(
    x: Tensor, first: Tensor, first_cell: Tensor, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, _Steps]:
    """Gates, cells and states of all steps, by the faster way for the device."""
    if _has_kernels(x):
        steps = _Steps.of(x, first, weights)
        return *_lstm_forward(steps, first_cell), steps
    # one fused kernel, though the gates have to be made again, is faster than a loop of small ones
    output = torch.lstm(x, (first.unsqueeze(0), first_cell.to(x.dtype).unsqueeze(0)), *_fused_options(weights))[0]
    steps = _Steps.of(x, first, weights, output)
    return *_lstm_gates(steps, first_cell), output, steps


def _fused_options(weights: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Arguments of torch.lstm and torch.gru after input and state: one layer, one direction, samples first."""
    given = [weight for weight in weights if weight is not None]
    return given, len(given) == 4, 1, 0.0, False, False, True


def _finish(ctx: Any, steps: _Steps, at_input: Tensor, at_state: Tensor, *first: Tensor) -> tuple[Tensor | None, ...]:
    """What a backward returns, given the gradients at the gates' inputs and of the first states."""
    layer = ctx.layer
    v_ih, v_hh, v_b_ih, v_b_hh = layer.directions
    ih, hh, b_ih, b_hh = layer.needs
    same = b_hh and b_ih and at_input is at_state  # an LSTM's two biases are one
    of_input, of_state = (
        LinearMap(layer, a.flatten(0, 1), b.flatten(0, 1), direction, needs)
        for a, b, direction, needs in (
            (steps.x, at_input, (v_ih, v_b_ih), (ih, b_ih)),
            (steps.h, at_state, (v_hh, v_b_hh), (hh, b_hh and not same)),
        )
    )

    def contribution(n: int) -> Tensor:
        return torch.stack([part.share(n) for part in (of_input, of_state) if part.has_direction]).sum(0)

    def gradients(row_weight: Tensor | None) -> Gradients:
        weight_ih, bias_ih = of_input.gradients(row_weight)
        weight_hh, bias_hh = of_state.gradients(row_weight)
        found = (weight_ih, weight_hh, bias_ih, bias_ih if same else bias_hh)
        return tuple(
            None if gradient is None or tensor is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(found, layer.tensors, strict=True)
        )

    tensors = layer.finish(at_state, contribution, gradients)
    leading = len(ctx.needs_input_grad) - len(ctx.dtypes) - len(tensors)  # layer, anchor and the like
    needs = ctx.needs_input_grad[leading:]
    of_x = at_input.matmul(steps.w_ih) if needs[0] else None
    inputs = (of_x, *first)
    cast = (
        gradient.to(dtype) if gradient is not None and needed else None
        for gradient, dtype, needed in zip(inputs, ctx.dtypes, needs, strict=False)
    )
    return (*(None,) * leading, *cast, *tensors)


class _Ragged:
    """Sequences of different lengths: packed rows (R, D) as padded ones (N, T, D), in the caller's order of samples."""

    def __init__(self, packed: PackedSequence) -> None:
        self.packed = packed
        sizes, device = packed.batch_sizes, packed.data.device
        self.n, self.length = int(sizes[0]), len(sizes)
        step = torch.repeat_interleave(torch.arange(self.length), sizes)
        rank = torch.arange(len(packed.data)) - (sizes.cumsum(0) - sizes)[step]
        step, rank = step.to(device), rank.to(device)
        sample = rank if packed.sorted_indices is None else packed.sorted_indices[rank]
        self.place = sample * self.length + step
        lengths = torch.bincount(sample, minlength=self.n)
        self.last = lengths - 1
        at = torch.arange(self.length, device=device)
        turned = torch.where(at < lengths.unsqueeze(1), lengths.unsqueeze(1) - 1 - at, at)
        self.turned = (torch.arange(self.n, device=device).unsqueeze(1) * self.length + turned).view(-1)

    def padded(self, rows: Tensor) -> Tensor:
        full = rows.new_zeros(self.n * self.length, rows.shape[1])
        return full.index_copy(0, self.place, rows).view(self.n, self.length, -1)

    def pack(self, x: Tensor) -> PackedSequence:
        rows = x.reshape(self.n * self.length, -1).index_select(0, self.place)
        packed = self.packed
        return PackedSequence(rows, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)

    def reverse(self, x: Tensor) -> Tensor:
        """Each sequence turned round within its length."""
        return x.reshape(self.n * self.length, -1).index_select(0, self.turned).view(x.shape)

    def at_end(self, x: Tensor) -> Tensor:
        return x[torch.arange(self.n, device=x.device), self.last]


class RecurrentRule(Rule):
    """nn.LSTM and nn.GRU: layers, directions, packed sequences, dropout between layers, initial states."""

    def parameter_names(self, module: Any) -> tuple[str, ...]:
        return tuple(module._flat_weights_names)

    def reason(self, module: Any) -> str | None:
        if module.proj_size:
            return f"proj_size={module.proj_size} (an LSTM with projections) has no rule"
        return None

    def forward(self, layer: Layer, input: Any, hx: Any = None) -> Any:  # type: ignore[override]
        module: Any = layer.module
        ragged = _Ragged(input) if isinstance(input, PackedSequence) else None
        if ragged is None and input.dim() != 3:
            raise MethodUnavailable(
                f"{layer.engine.caller}: {layer.name} got an input of shape {tuple(input.shape)}; expected a batch of "
                "sequences, 3 dimensions"
            )
        x = ragged.padded(input.data) if ragged is not None else _turned(module, input)
        output, states = self._layers(layer, x, _initial(module, x, hx), ragged)
        result = ragged.pack(output) if ragged is not None else _turned(module, output)
        return result, states if isinstance(module, nn.LSTM) else states[0]

    def _layers(
        self, layer: Layer, x: Tensor, initial: tuple[Tensor, ...], ragged: _Ragged | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        module: Any = layer.module
        directions = 2 if module.bidirectional else 1
        finals = []
        for number in range(module.num_layers):
            outputs = []
            for direction in range(directions):
                part = number * directions + direction
                output, last = _run(_part(layer, part), x, tuple(s[part] for s in initial), ragged, direction == 1)
                outputs.append(output)
                finals.append(last)
            x = torch.cat(outputs, dim=2) if directions == 2 else outputs[0]
            if number < module.num_layers - 1:
                x = F.dropout(x, module.dropout, module.training)
        return x, tuple(torch.stack(kind) for kind in zip(*finals, strict=True))


def _turned(module: Any, x: Tensor) -> Tensor:
    """Between the module's order of dimensions and samples first, either way."""
    return x if module.batch_first else x.transpose(0, 1)


def _initial(module: Any, x: Tensor, hx: Any) -> tuple[Tensor, ...]:
    """The states (layers x directions, N, H) to begin with, zero if not given; checked as torch does."""
    shape = (module.num_layers * (2 if module.bidirectional else 1), len(x), module.hidden_size)
    kinds = 2 if isinstance(module, nn.LSTM) else 1
    if hx is None:
        return (x.new_zeros(shape),) * kinds
    states = hx if kinds == 2 else (hx,)
    for state in states:
        module.check_hidden_size(state, shape)
    return tuple(states)


def _part(layer: Layer, number: int) -> Layer:
    """The layer of one number of layer and direction, whose tensors are W_ih, W_hh, b_ih, b_hh."""
    module: Any = layer.module
    count = 4 if module.bias else 2
    return layer.part(slice(number * count, (number + 1) * count), 4)


def _run(
    layer: Layer, x: Tensor, initial: tuple[Tensor, ...], ragged: _Ragged | None, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction: its output (N, T, H) and its last states (N, H)."""
    reverse: Callable[[Tensor], Tensor] = (lambda y: y.flip(1)) if ragged is None else ragged.reverse
    if backwards:
        x = reverse(x)
    last = None if ragged is None else ragged.last
    cells: tuple[Tensor, ...] = ()
    if isinstance(layer.module, nn.LSTM):
        output, *cells = _LSTM.apply(layer, last, layer.anchor, x, *initial, *layer.tensors)
    else:
        output = _GRU.apply(layer, layer.anchor, x, *initial, *layer.tensors)
    layer.see(output)
    states = (output[:, -1] if ragged is None else ragged.at_end(output), *cells)
    return reverse(output) if backwards else output, states


RULES[nn.LSTM] = RecurrentRule()
RULES[nn.GRU] = RecurrentRule()
