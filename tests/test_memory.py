"""Memory that really is used: the resident set of a fresh process, beside the size of one (N, C) array."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from cases import Case, cases, make_inputs
from torch import Tensor

from synkern import fused_dimp_loss
from synkern.reference import dimp_loss

DEFAULTS = cases(variants=False)
ALL = cases()

# Runs in a process of its own: the peak of the resident set only ever grows, so each process measures one thing, and
# the logits are made in place to leave the peak where the current size is.
PROGRAM = """
import json, pathlib, re, sys, torch, synkern
from synkern.registry import LOSSES
import torch.autograd.forward_ad as fwad

what, dtype, names = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3].split(",")
torch.set_num_threads(1)
n, c = 400, 50_000

def peak():
    # Not ru_maxrss, which a child process inherits from its parent.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

def inputs(name, n):
    operands = {k: torch.rand(n) + 0.1 for k in LOSSES[name].operands}
    return torch.randint(0, 7, (n,)), {"sample_weight": torch.rand(n), **operands}

def loss_of(name, logits, function=None):
    target, rest = inputs(name, logits.shape[0])
    if function == "eager":
        weight = rest.pop("sample_weight")
        return (LOSSES[name].reference(logits, target, **rest) * weight).mean()
    return LOSSES[name].function(logits, target, **rest)

def first_order(name, logits, function=None):
    torch.autograd.grad(loss_of(name, logits, function), logits)

def second_order(name, logits):
    (g,) = torch.autograd.grad(loss_of(name, logits), logits, create_graph=True)
    torch.autograd.grad(g, logits, logits.detach())

def tangent(name, logits):
    with fwad.dual_level():
        loss_of(name, fwad.make_dual(logits.detach(), logits.detach()))

def run(name, logits):
    if what == "forward":
        loss_of(name, logits.detach())
    elif what == "tangent":
        tangent(name, logits)
    elif what == "hvp":
        second_order(name, logits)
    elif what == "eager":
        first_order(name, logits, "eager")
    else:
        first_order(name, logits)

if what == "expanded":
    logits = torch.empty(1, c, dtype=dtype).uniform_().expand(n, c).requires_grad_()
elif what == "strided":
    logits = torch.empty(n, 2 * c, dtype=dtype).uniform_()[:, :c].requires_grad_()
elif what == "leading":
    logits = torch.empty(4, n // 4, c, dtype=dtype).uniform_().reshape(n, c).requires_grad_()
else:
    logits = torch.empty(n, c, dtype=dtype).uniform_().requires_grad_()
# Lifts the current size above the peak of importing, so that every page from here on shows.
ballast = torch.ones(2**27, dtype=torch.uint8)
small = torch.rand(3, 7, dtype=torch.float32).to(dtype).requires_grad_()
extra = {}
for name in names:
    run(name, small)
for name in names:
    before = peak()
    run(name, logits)
    extra[name] = (peak() - before) / (n * c * logits.element_size())
print(json.dumps(extra))
"""
NAMES = ",".join(dict.fromkeys(case.name for case in DEFAULTS))
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is that of Linux")


def extra_arrays(what: str, dtype: str = "float32", names: str = NAMES) -> float:
    """How many arrays of the size of the logits the process grew by, at most, over all losses."""
    command = [sys.executable, "-c", PROGRAM, what, dtype, names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    grown: dict[str, float] = json.loads(done.stdout)
    return sum(grown.values())


@pytest.mark.parametrize(
    ("what", "dtype", "arrays"),
    [
        ("forward", "float32", 0),
        ("gradient", "float32", 1),
        ("gradient", "bfloat16", 1),
        ("tangent", "float32", 0),
        ("strided", "float32", 1),
        ("expanded", "float32", 1),
        ("leading", "bfloat16", 1),
        # The first gradient, which is differentiated, and the second.
        ("hvp", "float32", 2),
    ],
)
def test_peak_memory(what: str, dtype: str, arrays: int) -> None:
    extra = extra_arrays(what, dtype)
    # A tenth of an array for pages of other things.
    assert arrays - 0.1 < extra < arrays + 0.1


def test_the_measure_sees_what_eager_uses() -> None:
    assert extra_arrays("eager", names="dimp") > 1.5


def is_unchanged(tensor: Tensor, before: Tensor, version: int) -> bool:
    return tensor._version == version and torch.equal(tensor, before)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_inputs_are_never_overwritten(case: Case) -> None:
    inputs = make_inputs(case, 7, 40, torch.float32)
    logits = inputs.logits.requires_grad_()
    weight = inputs.sample_weight.requires_grad_()
    tensors = [logits, inputs.target, weight, inputs.class_weight, *inputs.operands.values()]
    before = [(tensor, tensor.detach().clone(), tensor._version) for tensor in tensors]
    cotangent = torch.randn(7, device=case.device)
    loss = case.fused(
        logits,
        inputs.target,
        sample_weight=weight,
        class_weight=inputs.class_weight,
        reduction="none",
        **inputs.operands,
    )
    kept = (loss, loss.detach().clone(), loss._version)
    (gradient,) = torch.autograd.grad(loss, logits, cotangent, create_graph=True)
    first = (gradient, gradient.detach().clone(), gradient._version)
    torch.autograd.grad(gradient, (logits, weight), torch.randn_like(gradient))
    for tensor, copy, version in [*before, kept, first]:
        assert is_unchanged(tensor, copy, version)


LAYOUTS = {
    "row stride": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "negated view": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_every_layout_gives_the_same(case: Case, layout: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 6, 37, dtype)
    other = LAYOUTS[layout](inputs.logits)
    assert torch.equal(other, inputs.logits)
    rest = {"sample_weight": inputs.sample_weight, **inputs.operands}
    rest_strided = {name: tensor.repeat_interleave(3)[::3] for name, tensor in rest.items()}
    target = inputs.target.repeat_interleave(2)[::2]

    def derivatives(logits: Tensor, target: Tensor, rest: dict[str, Tensor]) -> tuple[Tensor, ...]:
        logits = logits.detach().requires_grad_()
        loss = case.fused(logits, target, reduction="none", **rest)
        cotangent = torch.arange(1.0, 7.0, device=case.device)
        (first,) = torch.autograd.grad(loss, logits, cotangent, create_graph=True)
        (second,) = torch.autograd.grad(first, logits, torch.ones_like(first).cumsum(1))
        return loss.detach(), first.detach(), second

    actual, expected = derivatives(other, target, rest_strided), derivatives(inputs.logits, inputs.target, rest)
    torch.testing.assert_close(actual, expected, check_stride=False)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_an_expanded_row(case: Case) -> None:
    inputs = make_inputs(case, 6, 37)
    row = inputs.logits[:1].clone().requires_grad_()
    loss = case.fused(row.expand(6, 37), inputs.target, reduction="sum", **inputs.operands)
    copied = inputs.logits[:1].repeat(6, 1).requires_grad_()
    expected = case.fused(copied, inputs.target, reduction="sum", **inputs.operands)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, row)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, copied)[0].sum(dim=0, keepdim=True))


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_an_expanded_cotangent(case: Case) -> None:
    """What ``loss.sum().backward()`` passes to the backward kernel has stride zero."""
    inputs = make_inputs(case, 6, 37)
    logits = inputs.logits.clone().requires_grad_()
    loss = case.fused(logits, inputs.target, reduction="none", **inputs.operands)
    one = torch.ones((), dtype=torch.float64, device=case.device)
    (actual,) = torch.autograd.grad(loss, logits, one.expand(6), retain_graph=True)
    (expected,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("n", [10, 300])
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_gradients_that_are_kept_stay_what_they_are(case: Case, n: int) -> None:
    """Memory of one call must not serve the next one as long as someone holds it; nor may it be read unwritten."""
    inputs = make_inputs(case, n, 10_000, torch.float32)
    kept = []
    for scale in (1.0, 2.0, 0.5):
        logits = (inputs.logits * scale).requires_grad_()
        loss = case.fused(logits, inputs.target, **inputs.operands)
        (gradient,) = torch.autograd.grad(loss, logits)
        kept.append((gradient, gradient.clone()))
        view = gradient[1:3]
        dropped = torch.full_like(gradient, torch.nan)
        del gradient, dropped
        assert torch.equal(view, kept[-1][1][1:3])
    for gradient, copy in kept:
        assert not gradient.isnan().any()
        assert torch.equal(gradient, copy)


@pytest.mark.parametrize("classes", [20011, 32000])
def test_a_gradient_that_outgrows_the_caches(classes: int) -> None:
    """It lies in the block that is kept between calls: rows that start anywhere, every element, the target's column."""
    rows = (24 << 20) // (4 * classes)
    logits = torch.randn(rows, classes, requires_grad=True)
    target, quality = torch.randint(0, classes, (rows,)), torch.rand(rows) + 0.1
    fused_dimp_loss(logits, target, quality).backward()
    wide = logits.detach().double().requires_grad_()
    dimp_loss(wide, target, quality.double()).mean().backward()
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=2e-5, atol=1e-12)
